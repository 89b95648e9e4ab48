//! A request of the log as it is read and shown.

use std::sync::Arc;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::entry::PassedOver;
use crate::fault::reference::CLIENT_GONE;

/// A request of the log.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Logged {
    /// Its row, which grows in the order in which requests ended.
    pub row: i64,
    /// Its id.
    pub id: String,
    /// Id of the trace that it belongs to.
    pub trace: Option<String>,
    /// When it came.
    #[schemars(with = "String")]
    pub time: Timestamp,
    /// Name of the client's key.
    pub key: Option<Arc<str>>,
    /// Labels of that key.
    pub tags: Vec<String>,
    /// The client's address.
    pub address: Option<String>,
    /// Hash of its session's name, in hexadecimal digits.
    pub session: Option<String>,
    /// The method.
    pub method: Arc<str>,
    /// The path.
    pub path: Arc<str>,
    /// The model that the client named.
    pub model: Option<Arc<str>>,
    /// The model that served in its place.
    pub fallback: Option<Arc<str>>,
    /// The endpoint that was asked last.
    pub endpoint: Option<Arc<str>>,
    /// What is shown of the key that it was sent, if it has several.
    pub endpoint_key: Option<Arc<str>>,
    /// The model that it was asked for, where that is another.
    pub endpoint_model: Option<Arc<str>>,
    /// How its session was followed.
    pub affinity: Option<Arc<str>>,
    /// True if it asked for a stream.
    pub stream: bool,
    /// The status that the client got; none if it got nothing.
    pub status: Option<u16>,
    /// Label of the fault, if there was one.
    pub fault: Option<Arc<str>>,
    /// Whose trouble the last endpoint's error was.
    pub trouble: Option<Arc<str>>,
    /// Rule that says so.
    pub rule: Option<Arc<str>>,
    /// Why it failed.
    pub cause: Option<String>,
    /// Time for which it waited for a permit.
    pub queued_ms: Millis,
    /// Time until the first of the answer was let through.
    pub first_byte_ms: Option<Millis>,
    /// Time until the first token of a stream.
    pub first_token_ms: Option<Millis>,
    /// Time until the last byte.
    pub total_ms: Millis,
    /// Tokens a second, from the first one to the end.
    pub tokens_per_second: Option<f64>,
    /// Tokens of the prompt, as the endpoint reported them.
    pub prompt_tokens: Option<u64>,
    /// Tokens of the answer.
    pub completion_tokens: Option<u64>,
    /// Both.
    pub total_tokens: Option<u64>,
    /// Tokens of the prompt that came from a cache.
    pub cached_tokens: Option<u64>,
    /// Tokens of the answer spent on reasoning.
    pub reasoning_tokens: Option<u64>,
    /// Audio tokens.
    pub audio_tokens: Option<u64>,
    /// What they cost, in US dollars.
    pub cost_usd: Option<f64>,
    /// Bytes of the request's body.
    pub request_bytes: u64,
    /// Body bytes that the client got.
    pub bytes: u64,
    /// Version of the config that it ran under.
    pub config: u64,
    /// Its attempts.
    pub attempts: Vec<LoggedAttempt>,
    /// Endpoints that could not be asked in the end, each with the reason.
    pub held: Vec<PassedOver>,
    /// Endpoints that could not have been asked at all, each with the reason.
    pub outside: Vec<Outside>,
}

impl Logged {
    /// True if the client got an error or a broken answer.
    pub fn is_failed(&self) -> bool {
        let is_gone = self.fault.as_deref() == Some(CLIENT_GONE);
        self.status.is_some_and(|status| status >= 400) || self.fault.is_some() && !is_gone
    }
}

/// An attempt of a request.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoggedAttempt {
    /// When it began, after the request came.
    pub began_ms: Millis,
    /// Time until it was concluded.
    pub took_ms: Millis,
    /// Time to the first byte of the answer's body.
    pub first_byte_ms: Option<Millis>,
    /// The endpoint.
    pub endpoint: Arc<str>,
    /// What is shown of the key that it was sent, if it has several.
    pub endpoint_key: Option<Arc<str>>,
    /// The model that it was asked for.
    pub model: Option<Arc<str>>,
    /// Its span of the trace.
    pub span: String,
    /// How it ended.
    pub outcome: Arc<str>,
    /// The status that it answered.
    pub status: Option<u16>,
    /// Whose trouble its error was.
    pub trouble: Option<Arc<str>>,
    /// Rule that says so.
    pub rule: Option<Arc<str>>,
    /// Candidates that could not be asked in its place, each with the reason.
    pub passed_over: Vec<PassedOver>,
}

/// An endpoint that was no candidate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Outside {
    /// Its id.
    pub endpoint: String,
    /// The reason, in a word.
    pub reason: String,
}

/// The beginning of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedBody {
    /// What is kept of it, without keys; nothing if it is no text.
    pub text: String,
    /// Bytes that this was of.
    pub kept: u64,
    /// Length of the whole body.
    pub length: u64,
}

impl LoggedBody {
    /// It with a note of what was cut off or not kept.
    pub fn shown(&self) -> String {
        let Self { text, kept, length } = self;
        match length.saturating_sub(if text.is_empty() { 0 } else { *kept }) {
            0 => text.clone(),
            more => format!("{text}… ({more} more bytes are not kept)"),
        }
    }
}

/// A time of so many microseconds, in milliseconds with one decimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, JsonSchema)]
#[schemars(with = "f64")]
pub struct Millis(pub i64);

impl Millis {
    /// The number.
    #[expect(clippy::cast_precision_loss, reason = "no request takes that long")]
    pub fn number(self) -> f64 {
        (self.0 as f64 / 100.0).round() / 10.0
    }
}

impl Serialize for Millis {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.number())
    }
}
