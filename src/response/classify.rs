//! What an endpoint's error means: whose trouble it is, by which rule, and for how long. Pure. It serves error answers, errors
//! in the body of a 200, and events of streams alike.
//!
//! The user's own rules (`apis[].errors`) come first, then what is known of vendors (`vendors`), then the
//! status. A verdict against a key, an account or an endpoint needs a code or a type, or a message in the vendor's own words
//! from its beginning on: vendors quote prompts and model names in their messages, and no caller may steer a verdict.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use serde_json::Value;

use super::vendor_error::VendorError;
use super::vendors::{self, Lasts, Row};
use crate::config::{ErrorRule, Trouble};

/// Rule that decided where no code and no words were known.
pub(crate) const BY_STATUS: &str = "status";
/// Rule that decided where the config says what an error means.
pub(crate) const BY_CONFIG: &str = "apis[].errors";

/// Status of an error that says none: the endpoint failed, as far as anybody knows.
const STATUS_UNKNOWN: u16 = 502;

/// Meaning of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meaning {
    /// Status of the answer, or the one that its body says.
    pub status: u16,
    /// Whose trouble it is.
    pub trouble: Trouble,
    /// Rule that decided: a row of the table of vendors, `apis[].errors` or `status`.
    pub rule: &'static str,
    /// Time for which the endpoint asks to be left alone.
    pub wait: Wait,
    /// A digest of its code and its words, to find two that are alike.
    pub words: u64,
}

/// Time for which an endpoint asks to be left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It does not say.
    Unsaid,
    /// This long.
    Stated(Duration),
    /// Until its day is over: a daily quota is used up.
    Day,
    /// Until a quota turns that is not known here: the money is used up.
    Quota,
    /// Not at all: the request alone is larger than the limit.
    Not,
}

impl Meaning {
    /// Meaning of a status alone.
    pub fn of_status(status: u16, wait: Option<Duration>) -> Self {
        let wait = wait.map_or(Wait::Unsaid, Wait::Stated);
        Self { status, trouble: by_status(status), rule: BY_STATUS, wait, words: status.into() }
    }

    /// True if a code, a type, or a vendor's own words decided, not the status alone.
    pub fn is_known(&self) -> bool {
        self.rule != BY_STATUS
    }
}

/// Returns what an error answer means. `wait` is what its headers ask for.
pub fn of_answer(status: u16, body: &[u8], wait: Option<Duration>, rules: &[ErrorRule]) -> Meaning {
    classify(status, &VendorError::from_body(body), wait, rules)
}

/// Returns what an error means that stands in the body of a 200, or in a stream.
pub(crate) fn of_value(value: &Value, rules: &[ErrorRule]) -> Option<Meaning> {
    VendorError::in_answer(value).map(|error| of_error(&error, rules))
}

/// Returns what an error means that has no status but the one it says itself.
pub(crate) fn of_error(error: &VendorError, rules: &[ErrorRule]) -> Meaning {
    let status = error.status.or_else(|| status_of_names(error)).unwrap_or(STATUS_UNKNOWN);
    classify(status, error, None, rules)
}

fn classify(status: u16, error: &VendorError, wait: Option<Duration>, rules: &[ErrorRule]) -> Meaning {
    let stated = |wait: Option<Duration>| wait.map_or(Wait::Unsaid, Wait::Stated);
    let wait = wait.or(error.wait);
    let words = digest(status, error);
    if let Some(rule) = rules.iter().find(|rule| fits(rule, status, error)) {
        let wait = stated(wait.or(error.wait_in_words));
        return Meaning { status, trouble: rule.means, rule: BY_CONFIG, wait, words };
    }
    if let Some(row) = vendors::ROWS.iter().find(|row| row_fits(row, status, error)) {
        let wait = match row.lasts {
            Lasts::AsSaid => stated(wait.or(error.wait_in_words)),
            Lasts::Day => Wait::Day,
            Lasts::Quota => Wait::Quota,
            Lasts::Not => Wait::Not,
        };
        return Meaning { status, trouble: row.means, rule: row.id, wait, words };
    }
    // Where nothing is known, words may be the prompt's. A 429 is about the vendor's own limit.
    let wait_in_words = error.wait_in_words.filter(|_| status == 429);
    Meaning { status, trouble: by_status(status), rule: BY_STATUS, wait: stated(wait.or(wait_in_words)), words }
}

/// A digest of what an error says, without what differs each time: numbers, dates and ids of requests. What is left of a key that a
/// vendor quotes stays in it.
fn digest(status: u16, error: &VendorError) -> u64 {
    let is_id = |word: &&str| word.bytes().any(|byte| byte.is_ascii_digit()) && !word.contains('*');
    let mut hasher = DefaultHasher::new();
    (status, &error.codes, &error.kinds).hash(&mut hasher);
    error.message.split_whitespace().filter(|word| !is_id(word)).for_each(|word| word.hash(&mut hasher));
    hasher.finish()
}

fn fits(rule: &ErrorRule, status: u16, error: &VendorError) -> bool {
    let ErrorRule { status: wanted, code, kind, message, means: _ } = rule;
    wanted.is_none_or(|wanted| wanted == status)
        && code.as_ref().is_none_or(|code| error.codes.contains(code))
        && kind.as_ref().is_none_or(|kind| error.kinds.contains(kind))
        && message.as_ref().is_none_or(|message| message.matches(&error.message))
}

fn row_fits(row: &Row, status: u16, error: &VendorError) -> bool {
    let names = |wanted: &str, given: &[String]| {
        wanted.is_empty() || given.iter().any(|name| crate::config::matches_glob(wanted, name))
    };
    (row.statuses.is_empty() || row.statuses.contains(&status))
        && names(row.code, &error.codes)
        && names(row.kind, &error.kinds)
        && (row.message.is_empty() || crate::config::matches_glob(row.message, &error.message))
}

/// Meaning of a status where the body says nothing that is known.
fn by_status(status: u16) -> Trouble {
    match status {
        401..=403 => Trouble::Key,
        404 => Trouble::CallMissing,
        429 => Trouble::ModelLimit,
        // 498 is Groq's word for a lack of capacity.
        408 | 425 | 498 | 500.. => Trouble::ModelFailure,
        _ => Trouble::Request,
    }
}

/// Status of an error that says only what it is called.
fn status_of_names(error: &VendorError) -> Option<u16> {
    const NAMES: [(&str, u16); 24] = [
        ("invalid_request_error", 400),
        ("invalid_request", 400),
        ("BadRequestError", 400),
        ("BadRequest", 400),
        ("INVALID_ARGUMENT", 400),
        ("context_length_exceeded", 400),
        ("invalid_prompt", 400),
        ("authentication_error", 401),
        ("UNAUTHENTICATED", 401),
        ("invalid_api_key", 401),
        ("billing_error", 402),
        ("permission_error", 403),
        ("PERMISSION_DENIED", 403),
        ("not_found_error", 404),
        ("NotFoundError", 404),
        ("NOT_FOUND", 404),
        ("request_too_large", 413),
        ("rate_limit_error", 429),
        ("rate_limit_exceeded", 429),
        ("RESOURCE_EXHAUSTED", 429),
        ("server_error", 500),
        ("api_error", 500),
        ("UNAVAILABLE", 503),
        ("overloaded_error", 529),
    ];
    let names = error.codes.iter().chain(&error.kinds);
    names.filter_map(|name| NAMES.iter().find(|(known, _)| known == name)).map(|(_, status)| *status).next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MessagePattern;
    use proptest::prelude::*;

    fn means(status: u16, body: &str) -> Trouble {
        of_answer(status, body.as_bytes(), None, &[]).trouble
    }

    /// Troubles that are held against a key, an account or a whole endpoint.
    fn is_against_all(trouble: Trouble) -> bool {
        matches!(trouble, Trouble::Key | Trouble::AccountLimit | Trouble::Endpoint)
    }

    #[test]
    fn the_table_says_what_each_row_is_for() {
        for (at, row) in vendors::ROWS.iter().enumerate() {
            assert!(!row.source.is_empty(), "{}", row.id);
            assert!(vendors::ROWS.iter().skip(at + 1).all(|other| other.id != row.id), "{} stands twice", row.id);
            let names = !row.code.is_empty() || !row.kind.is_empty();
            assert!(names || !row.message.is_empty(), "{} fits everything", row.id);
            assert!(
                names || !row.message.starts_with('*') || row.means == Trouble::Request,
                "{} can be steered",
                row.id
            );
            // An error made of the row alone is decided by it, or by an earlier one that means the same.
            let fill = |pattern: &str| pattern.replace('*', "x");
            let error = VendorError {
                codes: Some(fill(row.code)).filter(|code| !code.is_empty()).into_iter().collect(),
                kinds: Some(fill(row.kind)).filter(|kind| !kind.is_empty()).into_iter().collect(),
                message: fill(row.message),
                ..VendorError::default()
            };
            let status = row.statuses.first().copied().unwrap_or(400);
            let meaning = classify(status, &error, None, &[]);
            assert_eq!((meaning.trouble, meaning.is_known()), (row.means, true), "{}: {}", row.id, meaning.rule);
        }
    }

    #[test]
    fn what_vendors_say_beside_the_status_decides() {
        for (status, body, trouble, wait) in [
            // A 402 that is only a wait, and two that a smaller request does not get.
            (
                402,
                r#"{"error":{"code":402,"message":"x","metadata":{"limit_source":"openrouter_in_flight_budget","retry_after_seconds":7}}}"#,
                Trouble::AccountLimit,
                Wait::Stated(Duration::from_secs(7)),
            ),
            (
                402,
                r#"{"error":{"code":402,"message":"This request requires more credits, or fewer max_tokens. You requested up to 9 tokens, but can only afford 3."}}"#,
                Trouble::AccountLimit,
                Wait::Not,
            ),
            (402, r#"{"error":{"code":402,"message":"Insufficient credits"}}"#, Trouble::Key, Wait::Unsaid),
            // Azure says a day where no wait would help.
            (
                429,
                r#"{"error":{"code":"429","message":"Requests to the ChatCompletions_Create Operation under Azure OpenAI API version 2024-02-01 have exceeded token rate limit. Please retry after 86400 seconds."}}"#,
                Trouble::ModelLimit,
                Wait::Not,
            ),
            // Overload that looks like a limit, and the other way round.
            (
                429,
                r#"{"success":false,"errors":[{"code":3040,"message":"No more data centers"}]}"#,
                Trouble::ModelFailure,
                Wait::Unsaid,
            ),
            (
                429,
                r#"{"success":false,"errors":[{"code":3036,"message":"You have used up"}]}"#,
                Trouble::AccountLimit,
                Wait::Day,
            ),
            (
                500,
                r#"{"type":"error","error":{"type":"api_error","message":"Overloaded"}}"#,
                Trouble::ModelFailure,
                Wait::Unsaid,
            ),
            // Trouble of a key or a model in a 400 or a 401.
            (
                400,
                r#"{"code":"invalid-argument","error":"Incorrect API key provided: xa***. You can obtain an API key from https://console.x.ai."}"#,
                Trouble::Key,
                Wait::Unsaid,
            ),
            (
                400,
                r#"{"status":400,"title":"Bad Request","detail":"Function id 'f': DEGRADED function cannot be invoked"}"#,
                Trouble::ModelFailure,
                Wait::Unsaid,
            ),
            (
                400,
                r#"{"success":false,"errors":[{"code":5007,"message":"No such model m or task"}]}"#,
                Trouble::ModelMissing,
                Wait::Unsaid,
            ),
            (
                401,
                r#"{"error":{"code":"invalid_model","message":"No permission to use the model"}}"#,
                Trouble::ModelMissing,
                Wait::Unsaid,
            ),
            (
                400,
                r#"{"error":{"message":"Organization has been restricted. Please reach out to support.","type":"invalid_request_error"}}"#,
                Trouble::Key,
                Wait::Unsaid,
            ),
        ] {
            let meaning = of_answer(status, body.as_bytes(), None, &[]);
            assert_eq!((meaning.trouble, meaning.wait), (trouble, wait), "{body}: {}", meaning.rule);
        }
        // A prompt that a failing server quotes does not count as its own words.
        let quoting = r#"{"error":{"message":"Invalid prompt: try again in 24h0m0s."}}"#;
        assert_eq!(of_answer(503, quoting.as_bytes(), None, &[]).wait, Wait::Unsaid);
        assert_eq!(of_answer(429, quoting.as_bytes(), None, &[]).wait, Wait::Stated(Duration::from_hours(24)));
        let in_body = |body: &str| of_value(&serde_json::from_str(body).unwrap(), &[]).map(|meaning| meaning.trouble);
        assert_eq!(
            in_body(r#"{"error_code":110,"error_msg":"Access token invalid or no longer valid"}"#),
            Some(Trouble::Key)
        );
        assert_eq!(
            in_body(r#"{"error_code":18,"error_msg":"Open api qps request limit reached"}"#),
            Some(Trouble::ModelLimit)
        );
    }

    #[test]
    fn what_is_unknown_goes_by_its_status() {
        for (status, trouble) in [
            (400, Trouble::Request),
            (401, Trouble::Key),
            (402, Trouble::Key),
            (403, Trouble::Key),
            (404, Trouble::CallMissing),
            (408, Trouble::ModelFailure),
            (409, Trouble::Request),
            (413, Trouble::Request),
            (422, Trouble::Request),
            (425, Trouble::ModelFailure),
            (429, Trouble::ModelLimit),
            (500, Trouble::ModelFailure),
            (503, Trouble::ModelFailure),
            (599, Trouble::ModelFailure),
        ] {
            let meaning = of_answer(status, br#"{"error":{"message":"Unheard of."}}"#, None, &[]);
            assert_eq!((meaning.trouble, meaning.rule), (trouble, BY_STATUS), "{status}");
        }
    }

    #[test]
    fn the_users_rules_come_first() {
        let body = r#"{"error":{"message":"Quota of 5 is gone","type":"t","code":"insufficient_quota"}}"#;
        let rule = |message: Option<&str>, kind: Option<&str>, status| ErrorRule {
            status,
            code: None,
            kind: kind.map(str::to_owned),
            message: message.map(MessagePattern::new),
            means: Trouble::Request,
        };
        let decided = |rule| of_answer(429, body.as_bytes(), None, &[rule]).rule;
        assert_eq!(decided(rule(Some("Quota of * is gone"), Some("t"), Some(429))), BY_CONFIG);
        for no in
            [rule(Some("Quota of *"), None, Some(400)), rule(Some("gone"), None, None), rule(None, Some("u"), None)]
        {
            assert_eq!(decided(no), "openai/insufficient_quota");
        }
    }

    #[test]
    fn an_error_in_a_body_brings_its_own_status() {
        let status = |body: &str| of_value(&serde_json::from_str(body).unwrap(), &[]).map(|meaning| meaning.status);
        assert_eq!(status(r#"{"error":{"code":429,"message":"x"}}"#), Some(429));
        assert_eq!(status(r#"{"error":{"code":"400","message":"x"}}"#), Some(400));
        assert_eq!(status(r#"{"object":"error","message":"x","type":"BadRequestError","code":400}"#), Some(400));
        assert_eq!(status(r#"{"type":"error","error":{"type":"overloaded_error","message":"x"}}"#), Some(529));
        assert_eq!(status(r#"{"error":{"message":"x"}}"#), Some(502));
        assert_eq!(status(r#"{"choices":[]}"#), None);
    }

    #[test]
    fn what_a_caller_writes_steers_nothing() {
        let baits =
            vendors::ROWS.iter().filter(|row| is_against_all(row.means)).map(|row| row.message.replace('*', "x"));
        for bait in baits.filter(|bait| !bait.is_empty()) {
            for message in [
                format!("Invalid prompt: {bait}"),
                format!("`{bait}` is not a valid model"),
                format!("Your input contained: \"{bait}\""),
            ] {
                let body = serde_json::json!({ "error": { "message": message, "type": "invalid_request_error" } });
                for status in [400, 404, 413, 422] {
                    let trouble = means(status, &body.to_string());
                    assert!(!is_against_all(trouble), "{status} {message}: {trouble:?}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic_and_a_fault_of_the_request_stays_one(
            status in prop::sample::select(vec![400_u16, 404, 405, 409, 413, 415, 422]),
            text in "\\PC{0,80}",
            shape in prop::sample::select(vec![
                "{\"error\":{\"message\":T}}", "{\"error\":T}", "{\"detail\":T}", "{\"message\":T,\"code\":1}", "T", "[T]",
                "{\"error\":{\"message\":\"Invalid input\",\"param\":T,\"prompt\":T}}",
            ]),
        ) {
            let body = shape.replace('T', &serde_json::json!(text).to_string());
            let meaning = of_answer(status, body.as_bytes(), None, &[]);
            prop_assert!(!is_against_all(meaning.trouble), "{}: {:?}", body, meaning);
            of_answer(status, text.as_bytes(), None, &[]);
        }
    }
}
