//! Is this an answer? What the body of a 200, or an event of a stream, says: content, nothing, an error, or something that is
//! no answer to the call. One predicate for both forms. Pure.
//!
//! | call | an answer has | it says nothing if |
//! |---|---|---|
//! | chat, completions | `choices` | each is finished with `stop`, or not at all, and holds no content |
//! | responses | `output`, or a status | it is completed, and no item of it holds content |
//! | messages | `content` | it ended its turn, and no block of it holds content |
//! | embeddings | `data` | never |
//!
//! Content is text, a tool call, a refusal, reasoning, sound or another medium. An answer that was cut by its length, by a
//! filter or for a tool is one even without.

use std::sync::LazyLock;

use memchr::memmem::Finder as Needle;
use serde_json::{Map, Value};

use super::vendor_error::VendorError;
use crate::json::scan::has_member;
use crate::request::call::Call;

static ERROR: LazyLock<Needle<'static>> = LazyLock::new(|| Needle::new(b"error\""));
static CHOICES: LazyLock<Needle<'static>> = LazyLock::new(|| Needle::new(b"\"choices\""));
static CONTENT: LazyLock<Needle<'static>> = LazyLock::new(|| Needle::new(b"\"content\""));
static TEXT: LazyLock<Needle<'static>> = LazyLock::new(|| Needle::new(b"\"text\""));
static OUTPUT: LazyLock<Needle<'static>> = LazyLock::new(|| Needle::new(b"\"output\""));
static DATA: LazyLock<Needle<'static>> = LazyLock::new(|| Needle::new(b"\"data\""));
static EMBEDDING: LazyLock<Needle<'static>> = LazyLock::new(|| Needle::new(b"\"embedding\""));

/// What an answer or an event says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Says {
    /// Something that the client asked for.
    Content,
    /// Nothing: a whole answer that is empty, or an event that is a preface, a ping or a bare end.
    Nothing,
    /// The stream is complete.
    End,
    /// An error.
    Error(Box<VendorError>),
    /// What is no answer to the call.
    Unknown,
}

/// True if the call's answers are known, so that it can be said whether something is one.
pub(crate) fn is_judged(call: Call) -> bool {
    matches!(call, Call::Completion | Call::Responses | Call::Messages | Call::Embeddings)
}

/// Returns what a whole JSON answer says. Nearly all show in a few searches that they are good, and need no parser.
pub(crate) fn answer(call: Call, body: &[u8]) -> Says {
    if is_plainly_good(call, body) { Says::Content } else { parsed(call, body) }
}

fn parsed(call: Call, body: &[u8]) -> Says {
    let Ok(value) = serde_json::from_slice::<Value>(body) else { return Says::Unknown };
    let Value::Object(object) = &value else { return error(&value).unwrap_or(Says::Unknown) };
    let said = match call {
        Call::Completion => completion(object),
        Call::Responses => response(object),
        Call::Messages => message(object),
        Call::Embeddings => object.get("data").filter(|data| data.is_array()).map(|_| Says::Content),
        Call::Other | Call::Unmetered => Some(Says::Content),
    };
    match said {
        Some(Says::Content) => Says::Content,
        said => error(&value).or(said).unwrap_or(Says::Unknown),
    }
}

/// Returns whether the beginning of a long JSON answer looks like one.
pub(crate) fn begins_well(call: Call, beginning: &[u8]) -> bool {
    let key = match call {
        Call::Completion => &CHOICES,
        Call::Responses => &OUTPUT,
        Call::Messages => &CONTENT,
        Call::Embeddings => &DATA,
        Call::Other | Call::Unmetered => return true,
    };
    key.find(beginning).is_some() || beginning.trim_ascii_start().starts_with(b"{") && !mentions_error(beginning)
}

/// Inside of a JSON string a quotation mark is escaped, so that what is found is a key, if not always the outermost one.
fn is_plainly_good(call: Call, body: &[u8]) -> bool {
    if !body.trim_ascii_start().starts_with(b"{") || !body.trim_ascii_end().ends_with(b"}") {
        return false;
    }
    let has = match call {
        Call::Completion => has_member(body, &CHOICES, b"[{") && says_text(body, &CONTENT),
        Call::Responses => OUTPUT.find(body).is_some() && says_text(body, &TEXT),
        Call::Messages => has_member(body, &CONTENT, b"[{") && says_text(body, &TEXT),
        Call::Embeddings => has_member(body, &DATA, b"[{") && EMBEDDING.find(body).is_some(),
        Call::Other | Call::Unmetered => true,
    };
    has && !mentions_error(body)
}

/// True if this key has a text that is not empty.
fn says_text(body: &[u8], key: &Needle<'_>) -> bool {
    key.find_iter(body).any(|at| {
        let value = body.get(at + key.needle().len()..).unwrap_or_default().trim_ascii_start();
        let value = value.strip_prefix(b":").unwrap_or_default().trim_ascii_start();
        matches!(value, [b'"', first, ..] if *first != b'"')
    })
}

/// True if an error may stand in the JSON: a key or a value that ends so, but for a null one.
pub(crate) fn mentions_error(json: &[u8]) -> bool {
    ERROR.find_iter(json).any(|at| {
        let after = json.get(at + ERROR.needle().len()..).unwrap_or_default().trim_ascii_start();
        !after.strip_prefix(b":").is_some_and(|value| value.trim_ascii_start().starts_with(b"null"))
    })
}

/// Returns what an event of a stream says.
pub(crate) fn event(call: Call, data: &[u8]) -> Says {
    let data = data.trim_ascii();
    if data == b"[DONE]" {
        return Says::End;
    }
    if data.is_empty() {
        return Says::Nothing;
    }
    let Ok(value) = serde_json::from_slice::<Value>(data) else {
        return if is_judged(call) { Says::Unknown } else { Says::Content };
    };
    let Value::Object(object) = &value else { return error(&value).unwrap_or(Says::Unknown) };
    let said = match call {
        Call::Completion => chunk(object),
        Call::Responses => response_event(object),
        Call::Messages => message_event(object),
        Call::Embeddings | Call::Other | Call::Unmetered => None,
    };
    if said == Some(Says::Content) {
        return Says::Content;
    }
    error(&value).or(said).unwrap_or(if is_judged(call) { Says::Unknown } else { Says::Content })
}

fn error(value: &Value) -> Option<Says> {
    VendorError::in_answer(value).map(|error| Says::Error(Box::new(error)))
}

fn completion(answer: &Map<String, Value>) -> Option<Says> {
    let choices = answer.get("choices")?.as_array()?;
    Some(if choices.iter().any(choice_says_something) { Says::Content } else { Says::Nothing })
}

fn chunk(event: &Map<String, Value>) -> Option<Says> {
    match event.get("choices") {
        Some(Value::Array(choices)) if choices.iter().any(choice_says_something) => Some(Says::Content),
        Some(Value::Array(_)) => Some(Says::Nothing),
        // A usage by itself, a first chunk that only says what model answers, a ping.
        _ => {
            let is_frame = ["usage", "type", "object"].iter().any(|key| event.contains_key(*key));
            is_frame.then_some(Says::Nothing)
        }
    }
}

/// A choice of a chat or a completion, or what a chunk adds to one.
fn choice_says_something(choice: &Value) -> bool {
    let holds = |key: &str| choice.get(key).and_then(Value::as_object).is_some_and(message_holds_something);
    let ended = choice.get("finish_reason").and_then(Value::as_str);
    holds("delta")
        || holds("message")
        || choice.get("text").is_some_and(|text| !is_blank(text))
        || ended.is_some_and(|reason| !matches!(reason, "" | "stop" | "error" | "eos" | "end_turn"))
}

fn message_holds_something(message: &Map<String, Value>) -> bool {
    // Whatever is not the frame of a message is content: text, tool calls, reasoning in any vendor's word, sound.
    const FRAME: [&str; 5] = ["role", "annotations", "name", "id", "audio_id"];
    message.iter().any(|(key, value)| !FRAME.contains(&key.as_str()) && !is_blank(value))
}

fn response(answer: &Map<String, Value>) -> Option<Says> {
    let output = answer.get("output").and_then(Value::as_array);
    let status = answer.get("status").and_then(Value::as_str);
    if output.is_some_and(|items| items.iter().any(item_says_something)) {
        return Some(Says::Content);
    }
    match status {
        Some("completed") => Some(Says::Nothing),
        // It is not over, or was cut, and says so.
        Some("queued" | "in_progress" | "incomplete" | "cancelled") => Some(Says::Content),
        Some(_) => None,
        None => output.map(|_| Says::Nothing),
    }
}

/// An item of a response: a message needs content, anything else (a call of a tool, reasoning, a picture) is some.
fn item_says_something(item: &Value) -> bool {
    match item.get("type").and_then(Value::as_str) {
        Some("message") | None => item.get("content").is_some_and(parts_say_something),
        Some("reasoning") => {
            ["summary", "content", "encrypted_content"].iter().any(|key| item.get(*key).is_some_and(|v| !is_blank(v)))
        }
        Some(_) => true,
    }
}

/// Parts of a message's content: a text needs letters, anything else is content.
fn parts_say_something(content: &Value) -> bool {
    match content {
        Value::Array(parts) => parts.iter().any(|part| {
            let texts = ["text", "refusal", "thinking"];
            let text = texts.iter().find_map(|key| part.get(*key));
            text.map_or_else(|| !is_blank(part), |text| !is_blank(text))
        }),
        other => !is_blank(other),
    }
}

fn response_event(event: &Map<String, Value>) -> Option<Says> {
    let item = || event.get("item").is_some_and(|item| item.get("type").is_some_and(|kind| kind != "message"));
    let part = || event.get("part").is_some_and(|part| parts_say_something(&Value::Array(vec![part.clone()])));
    let whole = || event.get("response").and_then(Value::as_object).and_then(response);
    let kind = event.get("type").and_then(Value::as_str)?;
    let says = |something: bool| Some(if something { Says::Content } else { Says::Nothing });
    match kind {
        "error" | "response.failed" => None,
        // What is done was said before.
        "response.created"
        | "response.queued"
        | "response.in_progress"
        | "response.output_item.done"
        | "response.content_part.done"
        | "response.output_text.done" => Some(Says::Nothing),
        "response.output_item.added" => says(item()),
        "response.content_part.added" => says(part()),
        // Whatever came before, this is all of it.
        "response.completed" => Some(if whole() == Some(Says::Nothing) { Says::End } else { Says::Content }),
        kind if kind.starts_with("response.") => Some(Says::Content),
        // Pings and whatever vendors add.
        _ => Some(Says::Nothing),
    }
}

fn message(answer: &Map<String, Value>) -> Option<Says> {
    let content = answer.get("content").filter(|_| answer.get("type").is_none_or(|kind| kind == "message"))?;
    let ended = answer.get("stop_reason").and_then(Value::as_str);
    Some(if parts_say_something(content) || is_cut_short(ended) { Says::Content } else { Says::Nothing })
}

fn is_cut_short(stop_reason: Option<&str>) -> bool {
    stop_reason.is_some_and(|reason| !matches!(reason, "" | "end_turn" | "stop" | "stop_sequence"))
}

fn message_event(event: &Map<String, Value>) -> Option<Says> {
    let says = |something: bool| Some(if something { Says::Content } else { Says::Nothing });
    match event.get("type").and_then(Value::as_str)? {
        "error" => None,
        "message_stop" => Some(Says::End),
        "content_block_start" => {
            let block = event.get("content_block");
            says(block.is_some_and(|block| parts_say_something(&Value::Array(vec![block.clone()]))))
        }
        "content_block_delta" => Some(Says::Content),
        "message_delta" => {
            let ended = event.get("delta").and_then(|delta| delta.get("stop_reason")).and_then(Value::as_str);
            says(is_cut_short(ended))
        }
        _ => Some(Says::Nothing),
    }
}

fn is_blank(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.iter().all(is_blank),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(call: Call, body: &str) -> &'static str {
        name(&answer(call, body.as_bytes()))
    }

    fn of_event(call: Call, data: &str) -> &'static str {
        name(&event(call, data.as_bytes()))
    }

    fn name(says: &Says) -> &'static str {
        match says {
            Says::Content => "content",
            Says::Nothing => "nothing",
            Says::End => "end",
            Says::Error(_) => "error",
            Says::Unknown => "unknown",
        }
    }

    #[test]
    fn a_chat_is_known_by_what_it_says() {
        for (body, says) in [
            (r#"{"choices":[{"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}]}"#, "content"),
            // Text is never empty, whatever the usage says.
            (
                r#"{"choices":[{"message":{"content":"Hi"}}],"usage":{"prompt_tokens":5,"completion_tokens":0,"total_tokens":5}}"#,
                "content",
            ),
            (
                r#"{"choices":[{"message":{"content":""},"finish_reason":"stop"}],"usage":{"completion_tokens":9}}"#,
                "nothing",
            ),
            (
                r#"{"choices":[{"message":{"role":"assistant","content":null,"refusal":null,"annotations":[]},"finish_reason":"stop"}]}"#,
                "nothing",
            ),
            (r#"{"choices":[{"message":{"content":""},"finish_reason":"length"}]}"#, "content"),
            (r#"{"choices":[{"message":{"content":""},"finish_reason":"content_filter"}]}"#, "content"),
            (
                r#"{"choices":[{"message":{"content":null,"tool_calls":[{"id":"x"}]},"finish_reason":"tool_calls"}]}"#,
                "content",
            ),
            (r#"{"choices":[{"message":{"content":null,"refusal":"No."},"finish_reason":"stop"}]}"#, "content"),
            (r#"{"choices":[{"message":{"content":"","reasoning_content":"hm"},"finish_reason":"stop"}]}"#, "content"),
            (r#"{"choices":[{"message":{"content":null,"audio":{"data":"x"}},"finish_reason":"stop"}]}"#, "content"),
            (r#"{"choices":[{"message":{"content":[{"type":"text","text":"Hi"}]}}]}"#, "content"),
            (r#"{"choices":[{"text":"Hi","finish_reason":"stop"}]}"#, "content"),
            (r#"{"choices":[]}"#, "nothing"),
            (r#"{"choices":[{"message":{"content":"Hi"}}],"error":null}"#, "content"),
            (r#"{"choices":[{"message":{"content":"The \"error\" is here"}}]}"#, "content"),
            (
                r#"{"choices":[{"message":{"content":""},"finish_reason":"error","error":{"code":502,"message":"x"}}]}"#,
                "error",
            ),
            (r#"{"error":{"message":"x","code":429}}"#, "error"),
            (r#"{"error":"x"}"#, "error"),
            (r#"{"object":"error","message":"x","code":400}"#, "error"),
            (r#"{"choices":null,"base_resp":{"status_code":1004,"status_msg":"x"}}"#, "error"),
            (r#"{"success":false,"errors":[{"code":1,"message":"x"}]}"#, "error"),
            (r#"{"detail":"Not Found"}"#, "error"),
            (r#"{"error":{"message":"you wrote \"choices\":[{\"content\":\"x\"}]"}}"#, "error"),
            (r#"[{"error":{"message":"x","code":400}}]"#, "error"),
            (r#"{"status":"ok"}"#, "unknown"),
            (r#"{"id":"x","data":{"answer":"Hi"}}"#, "unknown"),
            ("{}", "unknown"),
            ("", "unknown"),
            ("[]", "unknown"),
            ("<!DOCTYPE html><html>…</html>", "unknown"),
            ("OK", "unknown"),
        ] {
            assert_eq!(of(Call::Completion, body), says, "{body}");
        }
    }

    #[test]
    fn other_calls_are_known_by_what_they_say() {
        for (call, body, says) in [
            (
                Call::Responses,
                r#"{"object":"response","status":"completed","error":null,"output":[{"type":"message","content":[{"type":"output_text","text":"Hi"}]}]}"#,
                "content",
            ),
            (
                Call::Responses,
                r#"{"status":"completed","output":[{"type":"message","content":[{"type":"output_text","text":""}]}]}"#,
                "nothing",
            ),
            (Call::Responses, r#"{"status":"completed","output":[]}"#, "nothing"),
            (
                Call::Responses,
                r#"{"status":"completed","output":[{"type":"function_call","name":"f","arguments":"{}"}]}"#,
                "content",
            ),
            (Call::Responses, r#"{"status":"incomplete","output":[]}"#, "content"),
            (Call::Responses, r#"{"status":"queued","output":[]}"#, "content"),
            (
                Call::Responses,
                r#"{"status":"failed","error":{"code":"server_error","message":"x"},"output":[]}"#,
                "error",
            ),
            (Call::Responses, r#"{"choices":[{"message":{"content":"Hi"}}]}"#, "unknown"),
            (
                Call::Messages,
                r#"{"type":"message","content":[{"type":"text","text":"Hi"}],"stop_reason":"end_turn"}"#,
                "content",
            ),
            (Call::Messages, r#"{"type":"message","content":[],"stop_reason":"end_turn"}"#, "nothing"),
            (Call::Messages, r#"{"type":"message","content":[],"stop_reason":"max_tokens"}"#, "content"),
            (
                Call::Messages,
                r#"{"type":"message","content":[{"type":"tool_use","name":"f","input":{}}],"stop_reason":"tool_use"}"#,
                "content",
            ),
            (Call::Messages, r#"{"type":"error","error":{"type":"overloaded_error","message":"x"}}"#, "error"),
            (
                Call::Embeddings,
                r#"{"object":"list","data":[{"embedding":[0.1]}],"usage":{"prompt_tokens":8,"total_tokens":8}}"#,
                "content",
            ),
            (Call::Embeddings, r#"{"data":[]}"#, "content"),
            (Call::Embeddings, r#"{"error":"x","data":null}"#, "error"),
            (Call::Embeddings, r#"{"answer":42}"#, "unknown"),
            (Call::Other, r#"{"anything":"goes"}"#, "content"),
        ] {
            assert_eq!(of(call, body), says, "{call:?} {body}");
        }
    }

    #[test]
    fn events_are_known_by_what_they_say() {
        for (call, data, says) in [
            (
                Call::Completion,
                r#"{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#,
                "nothing",
            ),
            (Call::Completion, r#"{"choices":[{"delta":{"content":"Hi"}}]}"#, "content"),
            (Call::Completion, r#"{"choices":[{"delta":{"reasoning":"hm"}}]}"#, "content"),
            (Call::Completion, r#"{"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}"#, "content"),
            (Call::Completion, r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#, "nothing"),
            (Call::Completion, r#"{"choices":[{"delta":{},"finish_reason":"length"}]}"#, "content"),
            (Call::Completion, r#"{"choices":[],"usage":{"prompt_tokens":3}}"#, "nothing"),
            (Call::Completion, "[DONE]", "end"),
            (Call::Completion, "", "nothing"),
            (Call::Completion, r#"{"error":{"message":"x"}}"#, "error"),
            (Call::Completion, r#"{"object":"error","message":"x","code":400}"#, "error"),
            (
                Call::Completion,
                r#"{"choices":[{"delta":{},"finish_reason":"error"}],"error":{"code":502,"message":"x"}}"#,
                "error",
            ),
            (Call::Completion, r#"{"type":"ping"}"#, "nothing"),
            (Call::Completion, r#"{"object":"chat.completion.chunk","model":"m"}"#, "nothing"),
            (Call::Completion, "upstream went away", "unknown"),
            (Call::Completion, r#"{"hello":1}"#, "unknown"),
            (
                Call::Responses,
                r#"{"type":"response.created","response":{"status":"in_progress","error":null}}"#,
                "nothing",
            ),
            (
                Call::Responses,
                r#"{"type":"response.output_item.added","item":{"type":"message","content":[]}}"#,
                "nothing",
            ),
            (Call::Responses, r#"{"type":"response.output_item.added","item":{"type":"function_call"}}"#, "content"),
            (Call::Responses, r#"{"type":"response.output_text.delta","delta":"x"}"#, "content"),
            (Call::Responses, r#"{"type":"response.completed","response":{"status":"completed","output":[]}}"#, "end"),
            (
                Call::Responses,
                r#"{"type":"response.incomplete","response":{"status":"incomplete","output":[]}}"#,
                "content",
            ),
            (
                Call::Responses,
                r#"{"type":"response.failed","response":{"error":{"code":"server_error","message":"x"}}}"#,
                "error",
            ),
            (Call::Responses, r#"{"type":"error","code":"rate_limit_exceeded","message":"x"}"#, "error"),
            (Call::Responses, r#"{"type":"keepalive"}"#, "nothing"),
            (Call::Messages, r#"{"type":"message_start","message":{"usage":{"input_tokens":1}}}"#, "nothing"),
            (Call::Messages, r#"{"type":"content_block_start","content_block":{"type":"text","text":""}}"#, "nothing"),
            (
                Call::Messages,
                r#"{"type":"content_block_start","content_block":{"type":"tool_use","name":"f"}}"#,
                "content",
            ),
            (Call::Messages, r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":"x"}}"#, "content"),
            (Call::Messages, r#"{"type":"ping"}"#, "nothing"),
            (Call::Messages, r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"}}"#, "nothing"),
            (Call::Messages, r#"{"type":"message_delta","delta":{"stop_reason":"max_tokens"}}"#, "content"),
            (Call::Messages, r#"{"type":"message_stop"}"#, "end"),
            (Call::Messages, r#"{"type":"error","error":{"type":"overloaded_error","message":"x"}}"#, "error"),
            (Call::Other, r#"{"type":"transcript.text.delta","delta":"x"}"#, "content"),
            (Call::Other, r#"{"error":{"message":"x"}}"#, "error"),
            (Call::Other, "anything", "content"),
        ] {
            assert_eq!(of_event(call, data), says, "{call:?} {data}");
        }
    }

    #[test]
    fn a_null_error_is_not_mentioned() {
        assert!(!mentions_error(br#"{"error":null,"a":"error"#));
        assert!(!mentions_error(br#"{"error" : null}"#));
        for error in [
            r#"{"error":{}}"#,
            r#"{"error":null,"last_error":{}}"#,
            r#"{"type":"error"}"#,
            r#"{"finish_reason":"error"}"#,
        ] {
            assert!(mentions_error(error.as_bytes()), "{error}");
        }
    }

    #[test]
    fn the_beginning_of_a_long_answer_is_enough() {
        assert!(begins_well(Call::Completion, br#"{"id":"x","choices":[{"message":{"content":"aaaa"#));
        assert!(begins_well(Call::Embeddings, br#"{"object":"list","data":[{"embedding":[0.1,"#));
        assert!(begins_well(Call::Completion, br#"{"id":"x","prompt_logprobs":[1,2"#), "it may come yet");
        assert!(!begins_well(Call::Completion, b"<!DOCTYPE html><html>"));
        assert!(!begins_well(Call::Completion, br#"{"error":{"message":"aaaa"#));
    }

    proptest! {
        #[test]
        fn fast_or_slow_the_same_is_said(
            content in prop::sample::select(vec!["\"\"", "\"Hi\"", "null", "\"\\\"error\\\":1\"", "[]"]),
            error in prop::sample::select(vec!["", ",\"error\":null", ",\"error\":{\"code\":400,\"message\":\"x\"}"]),
            key in prop::sample::select(vec!["choices", "outputs"]),
        ) {
            let body = format!("{{\"{key}\":[{{\"message\":{{\"content\":{content}}}}}]{error}}}");
            prop_assert_eq!(name(&answer(Call::Completion, body.as_bytes())), name(&parsed(Call::Completion, body.as_bytes())));
        }

        #[test]
        fn nothing_makes_it_panic(text in "\\PC{0,60}|[{}\\[\\]:,\"a1]{0,40}") {
            for call in [Call::Completion, Call::Responses, Call::Messages, Call::Embeddings, Call::Other] {
                answer(call, text.as_bytes());
                event(call, text.as_bytes());
                begins_well(call, text.as_bytes());
            }
        }
    }
}
