//! An endpoint's error, in whatever shape its vendor puts it: what it is called, what it says, and how long to wait. Pure.
//!
//! | shape | whose |
//! |---|---|
//! | `{"error":{"message","type","code"}}` | OpenAI's, and most others' |
//! | `[{"error":{"message","code","status","details":[…]}}]` | Gemini's, in OpenAI's format |
//! | `{"type":"error","error":{"type","message"}}` | Anthropic's |
//! | `{"error":"…"}`, `{"error":"…","error_type":"…"}` | Ollama's, LM Studio's, TGI's |
//! | `{"object":"error","message","type","code"}` | vLLM's, SGLang's |
//! | `{"type":"error","code","message"}`, `{"response":{"error":{…}}}` | events of OpenAI's responses |
//! | `{"code","message"}`, `{"code","msg"}`, `{"error_code","error_msg"}` | DashScope's, relays', Qianfan's |
//! | `{"base_resp":{"status_code","status_msg"}}` | MiniMax's |
//! | `{"success":false,"errors":[{"code","message"}]}` | Cloudflare's |
//! | `{"detail":"…"}`, `{"detail":[{"msg"}]}` | FastAPI's |
//! | `{"ResponseMetadata":{"Error":{…}}}`, `{"Response":{"Error":{…}}}` | Volcengine's, Tencent's |
//! | `{"choices":[{"error":{…}}]}` | OpenRouter's, within an answer |

use std::time::Duration;

use serde_json::{Map, Value};

use super::wait;

/// Bytes of a message that are kept and compared. Vendors' words stand at its beginning.
const MESSAGE_BYTES_MAX: usize = 2048;

/// An endpoint's error.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct VendorError {
    /// Status that stands in the body.
    pub(crate) status: Option<u16>,
    /// `code`, `status` and `reason`, whichever there are.
    pub(crate) codes: Vec<String>,
    /// `type`.
    pub(crate) kinds: Vec<String>,
    /// Message; empty if there is none.
    pub(crate) message: String,
    /// Time to wait that a member of the body says.
    pub(crate) wait: Option<Duration>,
    /// Time to wait that the message says, which may quote a prompt.
    pub(crate) wait_in_words: Option<Duration>,
}

impl VendorError {
    /// Reads the body of an answer whose status says that it is an error.
    pub(crate) fn from_body(body: &[u8]) -> Self {
        match serde_json::from_slice::<Value>(body) {
            Ok(value) => Self::in_answer(&value).unwrap_or_else(|| Self::from_members(&value)),
            Err(_) => Self { message: cut(&String::from_utf8_lossy(body)).to_owned(), ..Self::default() },
        }
    }

    /// Reads an error out of a value that may be an answer. `None` if it is no error.
    pub(crate) fn in_answer(value: &Value) -> Option<Self> {
        let object = match value {
            Value::Object(object) => object,
            Value::Array(items) => return items.first().filter(|first| first.is_object()).and_then(Self::in_answer),
            _ => return None,
        };
        let text = |key: &str| object.get(key).and_then(Value::as_str);
        if let Some(error) = object.get("error").filter(|error| is_error(error)) {
            return Some(Self::from_error(error, object));
        }
        if object.get("object").and_then(Value::as_str) == Some("error") || text("type") == Some("error") {
            return Some(Self::from_members(value));
        }
        if let Some(inner) = ["response", "ResponseMetadata", "Response"].iter().find_map(|key| object.get(*key)) {
            let error = ["error", "Error"].iter().find_map(|key| inner.get(*key)).filter(|error| is_error(error));
            if let Some(error) = error {
                return Some(Self::from_error(error, object));
            }
        }
        if let Some(state) = object.get("base_resp").filter(|state| state.get("status_code") != Some(&Value::from(0))) {
            return state.get("status_code").map(|_| Self::from_members(state));
        }
        let errors = object.get("errors").and_then(Value::as_array);
        if let Some(first) = errors.and_then(|errors| errors.first()) {
            return Some(Self::from_error(first, object));
        }
        let in_choice = |choice: &'_ Value| choice.get("error").filter(|error| is_error(error)).cloned();
        let choices = object.get("choices").and_then(Value::as_array);
        if let Some(error) = choices.and_then(|choices| choices.iter().find_map(in_choice)) {
            return Some(Self::from_error(&error, object));
        }
        let has_message = ["message", "msg", "error_msg", "errmsg"].iter().any(|key| text(key).is_some());
        let has_code =
            ["code", "error_code", "errcode", "__type", "status"].iter().any(|key| object.contains_key(*key));
        let is_failed = text("status").is_some_and(|status| matches!(status, "failed" | "error"))
            || object.get("success") == Some(&Value::Bool(false));
        let is_error = has_message && has_code || object.contains_key("detail") || is_failed;
        is_error.then(|| Self::from_members(value))
    }

    /// Reads an error that is an object of its own, or a text, beside other members.
    fn from_error(error: &Value, beside: &Map<String, Value>) -> Self {
        let mut read = Self::default();
        match error {
            Value::String(text) => {
                // Some write JSON into the text.
                match serde_json::from_str::<Value>(text).ok().as_ref().and_then(Self::in_answer) {
                    Some(inner) => read = inner,
                    None => cut(text).clone_into(&mut read.message),
                }
                read.add_members(beside);
            }
            Value::Object(object) => {
                read.add_members(object);
                read.add_details(object);
            }
            _ => read.add_members(beside),
        }
        read.wait_in_words = wait::in_message(&read.message).or(read.wait_in_words);
        read
    }

    /// Reads an error whose members stand side by side.
    fn from_members(value: &Value) -> Self {
        let mut read = Self::default();
        if let Value::Object(object) = value {
            read.add_members(object);
            read.add_details(object);
        }
        read.wait_in_words = wait::in_message(&read.message).or(read.wait_in_words);
        read
    }

    fn add_members(&mut self, object: &Map<String, Value>) {
        for key in ["code", "status", "error_code", "errcode", "status_code", "reason", "Code", "__type"] {
            self.add_code(object.get(key));
        }
        for key in ["type", "error_type"] {
            if let Some(kind) = object.get(key).and_then(Value::as_str) {
                self.kinds.push(kind.to_owned());
            }
        }
        if self.message.is_empty() {
            let message = ["message", "msg", "error_msg", "errmsg", "status_msg", "Message", "detail", "error"];
            let message = message.iter().find_map(|key| message_of(object.get(*key)?));
            self.message = message.map(|text| cut(text).to_owned()).unwrap_or_default();
        }
    }

    fn add_code(&mut self, code: Option<&Value>) {
        let text = match code {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Number(number)) => number.to_string(),
            _ => return,
        };
        let number = text.parse().ok().filter(|status| (400..=599).contains(status));
        self.status = self.status.or(number);
        if !self.codes.contains(&text) {
            self.codes.push(text);
        }
    }

    /// Reads what Google says in `details`, and `OpenRouter` in `metadata`.
    fn add_details(&mut self, object: &Map<String, Value>) {
        let details = object.get("details").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        for detail in details {
            self.add_code(detail.get("reason"));
            let violations = detail.get("violations").and_then(Value::as_array);
            for violation in violations.map(Vec::as_slice).unwrap_or_default() {
                self.add_code(violation.get("quotaId"));
            }
            if let Some(delay) = detail.get("retryDelay").and_then(Value::as_str) {
                self.wait = self.wait.or_else(|| wait::duration(delay));
            }
        }
        if let Some(metadata) = object.get("metadata") {
            if metadata.get("flagged_input").is_some() {
                self.codes.push("flagged_input".to_owned());
            }
            for key in ["limit_source", "error_type"] {
                self.add_code(metadata.get(key));
            }
            self.wait = self.wait.or_else(|| wait_of(metadata));
            self.wait_in_words = metadata.get("raw").and_then(Value::as_str).and_then(wait::in_message);
        }
    }
}

/// The wait in `OpenRouter`'s `metadata`: its own word, or a header of the provider that it asked.
fn wait_of(metadata: &Value) -> Option<Duration> {
    let header = || metadata.get("headers")?.get("Retry-After");
    let value = metadata.get("retry_after_seconds").or_else(header)?;
    let seconds = value.as_f64().or_else(|| value.as_str()?.parse().ok())?;
    Duration::try_from_secs_f64(seconds).ok().map(|wait| wait.min(wait::WAIT_MAX))
}

/// True for a member `error` that is one: some write null, nothing or false where there is none.
fn is_error(error: &Value) -> bool {
    match error {
        Value::Object(object) => !object.is_empty(),
        Value::String(text) => !text.is_empty(),
        Value::Bool(is) => *is,
        Value::Array(items) => !items.is_empty(),
        Value::Null | Value::Number(_) => false,
    }
}

/// The text of a message, which may stand in a list of complaints.
fn message_of(value: &Value) -> Option<&str> {
    match value {
        Value::String(text) => Some(text),
        Value::Array(items) => items.first().and_then(message_of),
        Value::Object(object) => ["message", "msg", "detail"].iter().find_map(|key| message_of(object.get(*key)?)),
        _ => None,
    }
}

fn cut(text: &str) -> &str {
    text.get(..text.floor_char_boundary(MESSAGE_BYTES_MAX)).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> VendorError {
        VendorError::from_body(body.as_bytes())
    }

    #[test]
    fn each_shape_is_read() {
        for (body, status, code, kind, message) in [
            (
                r#"{"error":{"message":"No.","type":"invalid_request_error","param":null,"code":"invalid_api_key"}}"#,
                None,
                "invalid_api_key",
                "invalid_request_error",
                "No.",
            ),
            (
                r#"[{"error":{"code":400,"message":"No.","status":"INVALID_ARGUMENT"}}]"#,
                Some(400),
                "INVALID_ARGUMENT",
                "",
                "No.",
            ),
            (
                r#"{"type":"error","error":{"type":"overloaded_error","message":"No."}}"#,
                None,
                "",
                "overloaded_error",
                "No.",
            ),
            (r#"{"error":"No."}"#, None, "", "", "No."),
            (r#"{"error":"No.","error_type":"overloaded"}"#, None, "", "overloaded", "No."),
            (
                r#"{"object":"error","message":"No.","type":"NotFoundError","param":null,"code":404}"#,
                Some(404),
                "404",
                "NotFoundError",
                "No.",
            ),
            (
                r#"{"type":"error","code":"server_error","message":"No.","param":null}"#,
                None,
                "server_error",
                "error",
                "No.",
            ),
            (
                r#"{"type":"response.failed","response":{"status":"failed","error":{"code":"rate_limit_exceeded","message":"No."}}}"#,
                None,
                "rate_limit_exceeded",
                "",
                "No.",
            ),
            (r#"{"code":"InvalidApiKey","message":"No.","request_id":"x"}"#, None, "InvalidApiKey", "", "No."),
            (r#"{"error_code":17,"error_msg":"No."}"#, None, "17", "", "No."),
            (r#"{"choices":null,"base_resp":{"status_code":1004,"status_msg":"No."}}"#, None, "1004", "", "No."),
            (r#"{"success":false,"errors":[{"code":10000,"message":"No."}],"result":null}"#, None, "10000", "", "No."),
            (r#"{"detail":"No."}"#, None, "", "", "No."),
            (r#"{"detail":[{"loc":["body"],"msg":"No.","type":"missing"}]}"#, None, "", "", "No."),
            (r#"{"ResponseMetadata":{"Error":{"Code":"Throttled","Message":"No."}}}"#, None, "Throttled", "", "No."),
            (
                r#"{"choices":[{"finish_reason":"error","error":{"code":502,"message":"No."}}]}"#,
                Some(502),
                "502",
                "",
                "No.",
            ),
            (r#"{"error":{"code":"401","message":"No."}}"#, Some(401), "401", "", "No."),
            ("<html>No.</html>", None, "", "", "<html>No.</html>"),
            ("", None, "", "", ""),
        ] {
            let read = read(body);
            assert_eq!((read.status, read.message.as_str()), (status, message), "{body}");
            assert!(
                code.is_empty() && read.codes.is_empty() || read.codes.iter().any(|one| one == code),
                "{body}: {read:?}"
            );
            assert!(kind.is_empty() || read.kinds.iter().any(|one| one == kind), "{body}: {read:?}");
        }
    }

    #[test]
    fn googles_details_say_why_and_how_long() {
        let body = r#"{"error":{"code":429,"message":"You exceeded your current quota.","status":"RESOURCE_EXHAUSTED","details":[
            {"@type":"type.googleapis.com/google.rpc.QuotaFailure","violations":[{"quotaId":"GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]},
            {"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"RATE_LIMIT_EXCEEDED"},
            {"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"25.5s"}]}}"#;
        let read = read(body);
        assert_eq!((read.status, read.wait), (Some(429), Some(Duration::from_millis(25_500))));
        for code in ["RESOURCE_EXHAUSTED", "RATE_LIMIT_EXCEEDED", "GenerateRequestsPerDayPerProjectPerModel-FreeTier"] {
            assert!(read.codes.iter().any(|one| one == code), "{code}");
        }
    }

    #[test]
    fn openrouters_moderation_is_known_by_its_shape() {
        let body = r#"{"error":{"code":403,"message":"m","metadata":{"reasons":["violence"],"flagged_input":"…"}}}"#;
        assert!(read(body).codes.iter().any(|code| code == "flagged_input"));
    }

    #[test]
    fn an_answer_is_no_error() {
        for answer in [
            r#"{"id":"x","object":"chat.completion","choices":[{"message":{"content":"hi"}}],"error":null}"#,
            r#"{"choices":[{"message":{"content":"hi"}}],"error":{}}"#,
            r#"{"choices":[{"message":{"content":"hi"},"error":null}],"error":"","base_resp":{"status_code":0,"status_msg":""}}"#,
            r#"{"object":"response","status":"completed","error":null,"output":[]}"#,
            r#"{"object":"list","data":[]}"#,
            r#"{"type":"message","content":[]}"#,
            r#"{"errors":[]}"#,
            "[]",
            "[1]",
            "3",
            "{}",
        ] {
            let value: Value = serde_json::from_str(answer).unwrap();
            assert_eq!(VendorError::in_answer(&value), None, "{answer}");
        }
    }

    #[test]
    fn an_error_within_a_text_is_read() {
        let read = read(r#"{"error":"{\"error\":{\"code\":429,\"message\":\"Please try again in 7s.\"}}"}"#);
        assert_eq!((read.status, read.wait_in_words), (Some(429), Some(Duration::from_secs(7))));
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let read = read(&format!(r#"{{"error":"{}"}}"#, "é".repeat(5000)));
        assert_eq!(read.message.len(), MESSAGE_BYTES_MAX);
    }
}
