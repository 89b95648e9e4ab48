//! A finished request as the log keeps it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::HeaderValue;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::without_keys;
use crate::fault::HeldBy;
use crate::limit::LimitReason;
use crate::response::redact::{Redactor, Secrets};
use crate::usage::Tokens;
use crate::usage::prices::NanoUsd;

/// Attempts of one request that are kept, as many as a request can have (`retry.attempts`).
pub const ATTEMPTS_MAX: usize = 100;
/// Bytes of a body that are kept.
pub(super) const BODY_BYTES_MAX: usize = 64 * 1024;
/// Bytes behind them that are looked at as well, so that no secret is cut in two before it is found.
const LOOKED_AT_BEHIND: usize = 4 * 1024;
/// Endpoints that are named as passed over, by one attempt.
pub(super) const PASSED_OVER_MAX: usize = 16;

/// A text that the log keeps once if it comes again and again, and each time if clients can make it up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// One of the config's, or of this program's own.
    Known(Arc<str>),
    /// Any other.
    Any(Arc<str>),
}

impl Name {
    /// A name that clients may have made up, cut to a sane length.
    pub fn any(text: &str) -> Self {
        Self::Any(cut(text).into())
    }
}

/// Characters of a value from outside that are kept.
const TEXT_CHARS_MAX: usize = 200;

/// A text from outside, cut to a sane length.
pub(super) fn cut(text: &str) -> &str {
    if text.len() <= TEXT_CHARS_MAX {
        return text;
    }
    text.char_indices().nth(TEXT_CHARS_MAX).and_then(|(end, _)| text.get(..end)).unwrap_or(text)
}

/// A finished request.
#[derive(Debug)]
pub struct Entry {
    /// When it ended.
    pub ended: SystemTime,
    /// Its id.
    pub id: Option<HeaderValue>,
    /// Id of the trace that it belongs to.
    pub trace: Option<u128>,
    /// Name of the client's key, if it is a caller's own.
    pub key: Option<Arc<str>>,
    /// JSON of that key's labels, if it has any.
    pub tags: Option<Arc<str>>,
    /// The client's address.
    pub address: Option<IpAddr>,
    /// Hash of its session's name.
    pub session: Option<u64>,
    /// The method.
    pub method: Name,
    /// The path, without its query, which may hold secrets.
    pub path: Name,
    /// The model that the client named.
    pub model: Option<Name>,
    /// The model that served in its place.
    pub fallback: Option<Arc<str>>,
    /// The model that the endpoint was asked for, where that is another.
    pub endpoint_model: Option<Arc<str>>,
    /// The endpoint that was asked last.
    pub endpoint: Option<Arc<str>>,
    /// What is shown of the key that it was sent, if it has several.
    pub lane: Option<Arc<str>>,
    /// How its session was followed.
    pub affinity: Option<&'static str>,
    /// True if it asked for a stream.
    pub stream: bool,
    /// The status that the client got; none if it got nothing.
    pub status: Option<u16>,
    /// Label of the fault, if there was one.
    pub fault: Option<&'static str>,
    /// Whose trouble the last endpoint's error was, and the rule that says so.
    pub trouble: Option<(&'static str, &'static str)>,
    /// Time for which it waited for a permit.
    pub queued: Duration,
    /// Time until the first of the answer was let through.
    pub first_byte: Option<Duration>,
    /// Time until the first token of a stream.
    pub first_token: Option<Duration>,
    /// Time from there to the end.
    pub generation: Option<Duration>,
    /// Time until the last byte.
    pub total: Duration,
    /// Tokens that the endpoint reported.
    pub tokens: Option<Tokens>,
    /// What they cost.
    pub cost: Option<NanoUsd>,
    /// Bytes of the request's body.
    pub request_bytes: u64,
    /// Body bytes that the client got.
    pub bytes: u64,
    /// Endpoints that could not be asked in the end.
    pub held: Vec<HeldBy>,
    /// JSON of the endpoints that could not have been asked at all.
    pub outside: Option<Arc<str>>,
    /// Why it failed.
    pub cause: Option<String>,
    /// Version of the config that it ran under.
    pub config: u64,
    /// Its attempts, at most [`ATTEMPTS_MAX`].
    pub attempts: Vec<Attempted>,
    /// Its bodies, if its key asks for it.
    pub bodies: Option<Box<Bodies>>,
}

/// An attempt of it.
#[derive(Clone, Debug)]
pub struct Attempted {
    /// When it began, after the request came.
    pub began: Duration,
    /// Time until it was concluded.
    pub took: Duration,
    /// Time to the first byte of the answer's body.
    pub first_byte: Option<Duration>,
    /// The endpoint.
    pub endpoint: Arc<str>,
    /// What is shown of the key that it was sent, if it has several.
    pub lane: Option<Arc<str>>,
    /// The model that it was asked for.
    pub model: Option<Name>,
    /// Its span of the trace.
    pub span: u64,
    /// How it ended, by its label in metrics.
    pub outcome: &'static str,
    /// The status that it answered, in its header or in its body.
    pub status: Option<u16>,
    /// Whose trouble its error was, and the rule that says so.
    pub trouble: Option<(&'static str, &'static str)>,
    /// The candidates that could not be asked in its place.
    pub passed_over: Vec<HeldBy>,
}

/// The bodies of a request and its answer, as far as they are kept.
#[derive(Debug, Default)]
pub struct Bodies {
    /// The request's.
    pub request: KeptBody,
    /// The answer's.
    pub answer: KeptBody,
    /// Secrets of the endpoint that answered, which are redacted.
    pub secrets: Secrets,
}

/// The beginning of a body.
#[derive(Debug, Default)]
pub struct KeptBody {
    /// Bytes that are kept, 64 KiB at most.
    pub bytes: Vec<u8>,
    /// Length of the whole body.
    pub length: u64,
}

impl KeptBody {
    /// Takes in a piece of the body.
    pub fn add(&mut self, piece: &[u8]) {
        let room = (BODY_BYTES_MAX + LOOKED_AT_BEHIND).saturating_sub(self.bytes.len());
        self.bytes.extend_from_slice(piece.get(..room).unwrap_or(piece));
        self.length = self.length.saturating_add(piece.len() as u64);
    }

    /// What is kept, as text without keys. Nothing of what is no text, such as audio.
    pub fn redacted(&self, secrets: &Secrets) -> String {
        let text = match std::str::from_utf8(&self.bytes) {
            Ok(text) => text,
            // Cut within a character.
            Err(error) if error.error_len().is_none() => {
                let whole = self.bytes.get(..error.valid_up_to()).unwrap_or_default();
                std::str::from_utf8(whole).unwrap_or_default()
            }
            Err(_) => return String::new(),
        };
        let own = Redactor::new(secrets.clone()).piece(text.as_bytes(), true);
        let mut redacted = without_keys(&String::from_utf8_lossy(&own));
        if let Some((end, _)) = redacted.char_indices().take_while(|(at, _)| *at <= BODY_BYTES_MAX).last()
            && redacted.len() > BODY_BYTES_MAX
        {
            redacted.truncate(end);
        }
        redacted
    }
}

/// An endpoint that was passed over, as the log has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PassedOver {
    /// Its id.
    pub endpoint: String,
    /// What is shown of the key whose limit it is, if it is one of several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The models whose limit it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub models: Option<String>,
    /// The reason, in a word: `rpm`, `resting`, `cooling_down` and others.
    pub reason: String,
    /// The same as a sentence says it.
    pub words: String,
    /// When it is over; none if that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub until: Option<Timestamp>,
}

impl PassedOver {
    /// An endpoint that was held back at a moment.
    pub fn new(held: &HeldBy, at: SystemTime) -> Self {
        let reason = match held.reason {
            LimitReason::Full(kind, _) => kind.key(),
            LimitReason::MinuteUnknown => "minute_unknown",
            LimitReason::LedgerBegins => "ledger_begins",
            LimitReason::Rest => "resting",
            LimitReason::CoolingDown => "cooling_down",
            LimitReason::CallMissing => "call_missing",
        };
        Self {
            endpoint: held.endpoint.to_string(),
            key: held.key.as_deref().map(ToOwned::to_owned),
            models: held.models.as_deref().map(ToOwned::to_owned),
            reason: reason.to_owned(),
            words: held.reason.to_string(),
            until: if held.wait.is_zero() { None } else { Timestamp::from_millisecond(millis(at + held.wait)).ok() },
        }
    }
}

impl PassedOver {
    /// It in words, with moments as they are said now.
    pub fn shown(&self, moment: impl Fn(Timestamp) -> String) -> String {
        let key = self.key.as_ref().map(|key| format!(", key {key}")).unwrap_or_default();
        let models = self.models.as_ref().map(|models| format!(" for {models}")).unwrap_or_default();
        let until = self.until.map(|until| format!(", until {}", moment(until))).unwrap_or_default();
        format!("{}{key}: {}{models}{until}", self.endpoint, self.words)
    }
}

/// Milliseconds of Unix time.
pub(super) fn millis(at: SystemTime) -> i64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
