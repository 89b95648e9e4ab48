//! Hold or commit: what of an endpoint's answer the client may see, and when. Pure; bytes in, verdict out.
//!
//! Nothing has reached the client before commit, so until then another endpoint can take over. A status is not believed: errors
//! are held to their end and classified, streams until their first event with content, JSON answers until it is known that they
//! are answers. Audio, files and the rest are never held.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::de::IgnoredAny;

use super::objects::is_object_missing;
use crate::config::{ErrorRule, Retry, Trouble};
use crate::request::call::Call;
use crate::request::content_type::{is_event_stream, is_json};
use crate::response::answer::{self, Says};
use crate::response::classify::{self, Meaning};
use crate::response::sse::Splitter;
use crate::routing::retry::{Outcome, Place};

/// Most bytes of an answer that are held back (64 KiB), not counting the last chunk.
pub const HOLD_BYTES_MAX: usize = 64 * 1024;
/// Longest wait for the body of an error while another endpoint is available: the status says enough.
const ERROR_BODY_WAIT_MAX: Duration = Duration::from_secs(5);
/// Longest time that a stream that has sent data is held while no event has content.
pub const HOLD_TIME_MAX: Duration = Duration::from_secs(5);
/// Only a proxy says so, and what it wants is between it and us: the client has a login of its own to care for.
const PROXY_LOGIN_WANTED: u16 = 407;
/// Time over which the pace of a stream is measured if the config sets a lowest one.
const PACE_TIME: Duration = Duration::from_secs(2);

/// Parts of an answer's header that matter here.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// The status.
    pub status: u16,
    /// The `Content-Type`.
    pub content_type: Option<&'a str>,
    /// Pause that the headers ask for, if this is an error.
    pub wait: Option<Duration>,
    /// True if no body follows.
    pub end: bool,
    /// True if the answer ends when the connection does, so that HTTP cannot tell its end from a break.
    pub ends_with_connection: bool,
}

/// Terms of an attempt.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are independent: any combination can occur")]
pub struct Terms {
    /// Call of the API.
    pub call: Call,
    /// True if the client asked for a stream.
    pub streams: bool,
    /// True if the answer should have a body (not for a HEAD).
    pub expects_body: bool,
    /// True if another endpoint could take over.
    pub more: bool,
    /// True if, beside or instead of that, another key of the same endpoint can take over from trouble of this key.
    pub more_keys: bool,
    /// True if another endpoint may take over from an answer that is merely empty.
    pub more_if_empty: bool,
    /// True if the request names an object that nobody knows, so that another endpoint may have it.
    pub searches: bool,
    /// The `stream_options` of the request.
    pub usage: UsageTerms,
}

/// Whether `stream_options` were added to the request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsageTerms {
    /// True if they were.
    pub injected: bool,
    /// True if the endpoint took some lately, so that it does not refuse them now.
    pub is_proven: bool,
}

/// Rules of the config by which an answer is judged.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// What is retried.
    pub retry: &'a Retry,
    /// Meaning of the endpoint's errors.
    pub errors: &'a [ErrorRule],
}

/// Decision about the answer so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Wait for more.
    Hold,
    /// Let everything through, now and from here on.
    Commit,
    /// Drop the answer: the attempt came to this end.
    Drop(Outcome),
}

/// Form of a body, as its first byte shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Server-sent events.
    Stream,
    /// JSON, or something that was to be JSON.
    Json,
}

/// Kind of answer that is being held.
#[derive(Debug)]
enum AnswerKind {
    /// Nothing has come yet.
    Nothing,
    /// An error, held whole. `likely` says whether its status is one that is retried.
    Error { status: u16, wait: Option<Duration>, likely: bool },
    /// A body whose first byte has not come; `labelled` says whether its label calls it a stream.
    Unseen { labelled: bool },
    /// An event stream, held until it says something.
    Stream(Box<HeldStream>),
    /// A JSON answer, held until its end.
    Json,
    /// Committed.
    Open,
}

/// A stream that has not said anything yet.
#[derive(Debug, Default)]
struct HeldStream {
    splitter: Splitter,
    has_data: bool,
    /// Events with content since the first one, while their pace is measured.
    paced: Option<(Instant, u32)>,
}

/// Judges one attempt's answer as it comes in.
#[derive(Debug)]
pub struct Judge {
    terms: Terms,
    kind: AnswerKind,
    form: Option<Form>,
    held: Vec<Bytes>,
    held_bytes: usize,
    has_bytes: bool,
    ends_with_connection: bool,
    /// Outcome of an answer that is let through although it is an error.
    outcome: Option<Outcome>,
    /// Body of an error that stood in a 200.
    error_body: Option<Bytes>,
    /// True if an answer with nothing in it is let through.
    is_empty: bool,
}

impl Judge {
    /// A judge for a fresh attempt.
    pub fn new(terms: Terms) -> Self {
        Self {
            terms,
            kind: AnswerKind::Nothing,
            form: None,
            held: Vec::new(),
            held_bytes: 0,
            has_bytes: false,
            ends_with_connection: false,
            outcome: None,
            error_body: None,
            is_empty: false,
        }
    }

    /// True if an error is being held.
    pub fn is_error(&self) -> bool {
        matches!(self.kind, AnswerKind::Error { .. })
    }

    /// Form of the body, once it is known.
    pub fn form(&self) -> Option<Form> {
        self.form
    }

    /// Notes that no other endpoint can take over any more.
    pub fn no_more(&mut self) {
        (self.terms.more, self.terms.more_keys) = (false, false);
    }

    /// Takes the outcome of an error that is let through.
    pub fn take_outcome(&mut self) -> Option<Outcome> {
        self.outcome.take()
    }

    /// Takes the body of an error that stood in a 200.
    pub fn take_error_body(&mut self) -> Option<Bytes> {
        self.error_body.take()
    }

    /// Takes the header.
    pub fn header(&mut self, head: Head<'_>, rules: &Rules<'_>) -> Verdict {
        if head.status == PROXY_LOGIN_WANTED {
            return Verdict::Drop(Outcome::ProxyRefused);
        }
        self.ends_with_connection = head.ends_with_connection;
        let labelled = is_event_stream(head.content_type);
        let is_judged = answer::is_judged(self.terms.call);
        self.kind = if head.status >= 400 {
            // One that no other endpoint will take over is held too, so that it can be classified, and a key quoted in it is found
            // however it is cut.
            let is_wanted = rules.retry.statuses.contains(head.status) || self.terms.searches && head.status == 404;
            let likely = (self.terms.more || self.terms.more_keys) && is_wanted;
            AnswerKind::Error { status: head.status, wait: head.wait, likely }
        } else if head.status != 200 || !self.terms.expects_body {
            AnswerKind::Open
        } else if labelled {
            // Its first event may be an error.
            if self.terms.more || self.terms.more_keys {
                AnswerKind::Unseen { labelled }
            } else {
                self.form = Some(Form::Stream);
                AnswerKind::Open
            }
        } else if is_judged {
            AnswerKind::Unseen { labelled }
        } else if self.terms.more && head.content_type.is_none_or(|value| is_json(Some(value))) {
            // Of other calls it is known only that an empty answer is none.
            self.form = Some(Form::Json);
            AnswerKind::Json
        } else {
            AnswerKind::Open
        };
        if head.end { self.end(rules) } else { self.so_far(rules) }
    }

    /// Takes a piece of the body.
    pub fn body(&mut self, piece: &Bytes, end: bool, rules: &Rules<'_>, now: Instant) -> Verdict {
        self.has_bytes = true;
        self.held_bytes += piece.len();
        let piece = match self.kind {
            AnswerKind::Open | AnswerKind::Nothing => return self.so_far(rules),
            AnswerKind::Unseen { labelled } => {
                self.held.push(piece.clone());
                let Some(form) = form(&self.joined(), labelled, self.terms.streams, end) else {
                    return if end { self.end(rules) } else { self.so_far(rules) };
                };
                self.begin(form)
            }
            AnswerKind::Stream(_) => piece.clone(),
            AnswerKind::Json | AnswerKind::Error { .. } => {
                self.held.push(piece.clone());
                return if end { self.end(rules) } else { self.so_far(rules) };
            }
        };
        if let Some(verdict) = self.events(&piece, rules, now) {
            return verdict;
        }
        if end { self.end(rules) } else { self.so_far(rules) }
    }

    /// Begins to read a body of this form. Returns what of it the stream has yet to read.
    fn begin(&mut self, form: Form) -> Bytes {
        self.form = Some(form);
        if form == Form::Json {
            self.kind = AnswerKind::Json;
            return Bytes::new();
        }
        self.kind = AnswerKind::Stream(Box::default());
        let first = self.joined().into_owned().into();
        self.held.clear();
        first
    }

    /// Reads the events that a piece completes. None if they do not decide.
    fn events(&mut self, piece: &Bytes, rules: &Rules<'_>, now: Instant) -> Option<Verdict> {
        let AnswerKind::Stream(stream) = &mut self.kind else { return None };
        let HeldStream { splitter, has_data, paced } = &mut **stream;
        let (call, pace) = (self.terms.call, rules.retry.tokens_per_second_min.filter(|_| self.terms.more));
        let mut decided = None;
        splitter.feed(piece, |data| {
            *has_data = true;
            if decided.is_some() {
                return;
            }
            // An event too long to be read counts as content.
            match data.map_or(Says::Content, |data| answer::event(call, data)) {
                Says::Nothing => {}
                Says::Content if pace.is_some() => {
                    let (_, tokens) = paced.get_or_insert((now, 0));
                    *tokens += 1;
                }
                says => decided = Some((says, Bytes::copy_from_slice(data.unwrap_or_default()))),
            }
        });
        if let Some((says, data)) = decided {
            return Some(self.said(says, data, rules));
        }
        self.pace(rules, now)
    }

    /// Decides about a stream whose pace is measured. None if it is too early.
    pub fn pace(&mut self, rules: &Rules<'_>, now: Instant) -> Option<Verdict> {
        let AnswerKind::Stream(stream) = &self.kind else { return None };
        let ((since, tokens), least) = (stream.paced?, rules.retry.tokens_per_second_min?);
        let enough = f64::from(least) * PACE_TIME.as_secs_f64();
        if f64::from(tokens) >= enough {
            return Some(self.commit());
        }
        let is_over = now.saturating_duration_since(since) >= PACE_TIME;
        is_over.then(|| if self.terms.more { Verdict::Drop(Outcome::TooSlow) } else { self.commit() })
    }

    /// When the pace of a stream is known, if it is being measured.
    pub fn pace_known_at(&self) -> Option<Instant> {
        let AnswerKind::Stream(stream) = &self.kind else { return None };
        stream.paced?.0.checked_add(PACE_TIME)
    }

    fn said(&mut self, says: Says, data: Bytes, rules: &Rules<'_>) -> Verdict {
        match says {
            Says::End if self.has_paced() => self.commit(),
            Says::End => self.empty(),
            Says::Error(error) => self.error_in_200(classify::of_error(&error, rules.errors), Place::Event, data),
            Says::Unknown if self.terms.more => Verdict::Drop(Outcome::Unrecognised),
            Says::Content | Says::Nothing | Says::Unknown => self.commit(),
        }
    }

    fn has_paced(&self) -> bool {
        matches!(&self.kind, AnswerKind::Stream(stream) if stream.paced.is_some())
    }

    /// An error that stood in a 200 is none of an answer, whoever is left: its own status says more than the 200.
    fn error_in_200(&mut self, meaning: Meaning, place: Place, body: Bytes) -> Verdict {
        if self.refuses_usage(&meaning, &body) {
            return Verdict::Drop(Outcome::UsageRefused);
        }
        self.error_body = Some(body);
        Verdict::Drop(Outcome::Error { meaning, place })
    }

    /// True if an error may be about the `stream_options` that were added to the request, and not about something the client
    /// sent: it names them, or the endpoint has not shown that it takes them.
    fn refuses_usage(&self, meaning: &Meaning, body: &[u8]) -> bool {
        let names = |name: &str| memchr::memmem::find(body, name.as_bytes()).is_some();
        let is_refusal = matches!(meaning.status, 400 | 422) && meaning.trouble == Trouble::Request;
        let is_named = || names("stream_options") || names("include_usage");
        self.terms.usage.injected && is_refusal && (!self.terms.usage.is_proven || is_named())
    }

    /// A whole answer with nothing in it.
    fn empty(&mut self) -> Verdict {
        if self.terms.more && self.terms.more_if_empty {
            return Verdict::Drop(Outcome::Empty);
        }
        self.is_empty = true;
        self.commit()
    }

    /// True if a whole answer with nothing in it was let through, since nobody else was left.
    pub fn let_empty_through(&self) -> bool {
        self.is_empty
    }

    /// Decides about an answer that ended without another piece.
    pub fn end(&mut self, rules: &Rules<'_>) -> Verdict {
        match self.kind {
            AnswerKind::Error { status, wait, .. } => self.error_ended(status, wait, rules),
            AnswerKind::Stream(_) if self.has_paced() => self.commit(),
            AnswerKind::Stream(_) => self.empty(),
            AnswerKind::Unseen { .. } | AnswerKind::Json => self.json_ended(rules),
            AnswerKind::Nothing | AnswerKind::Open => self.commit(),
        }
    }

    fn error_ended(&mut self, status: u16, wait: Option<Duration>, rules: &Rules<'_>) -> Verdict {
        let meaning = classify::of_answer(status, &self.joined(), wait, rules.errors);
        if self.refuses_usage(&meaning, &self.joined()) {
            return Verdict::Drop(Outcome::UsageRefused);
        }
        let outcome = Outcome::Error { meaning, place: Place::Status };
        let searches_on = self.terms.searches && is_object_missing(&outcome);
        let more = self.terms.more || self.terms.more_keys && (outcome.may_try_another_key() || searches_on);
        if more && (outcome.is_retryable(rules.retry) || searches_on) || outcome.is_hidden(rules.retry) {
            return Verdict::Drop(outcome);
        }
        self.outcome = Some(outcome);
        self.commit()
    }

    fn json_ended(&mut self, rules: &Rules<'_>) -> Verdict {
        let body = self.joined();
        let is_blank = is_blank(&body);
        if !answer::is_judged(self.terms.call) {
            return if is_blank { self.empty() } else { self.commit() };
        }
        match answer::answer(self.terms.call, &body) {
            Says::Content | Says::End => self.commit(),
            Says::Nothing => self.empty(),
            Says::Error(error) => {
                let body = body.into_owned().into();
                self.error_in_200(classify::of_error(&error, rules.errors), Place::Body, body)
            }
            Says::Unknown if is_blank => Verdict::Drop(Outcome::Empty),
            Says::Unknown if self.ends_with_connection && is_cut(&body) => Verdict::Drop(Outcome::Broken),
            Says::Unknown => Verdict::Drop(Outcome::Unrecognised),
        }
    }

    /// Lets everything through from here on.
    pub fn commit(&mut self) -> Verdict {
        self.kind = AnswerKind::Open;
        self.held = Vec::new();
        Verdict::Commit
    }

    /// True if another endpoint could take over.
    pub fn may_drop(&self) -> bool {
        self.terms.more
    }

    /// True once a byte of the body has come.
    pub fn has_bytes(&self) -> bool {
        self.has_bytes
    }

    /// True while a stream is held that has sent something; `has_data` of [`Judge::has_data`] says what.
    pub fn holds_stream(&self) -> bool {
        matches!(self.kind, AnswerKind::Stream(_)) && self.has_bytes
    }

    /// True if the stream that is held has had an event with data, which bounds the wait for one with content.
    pub fn has_data(&self) -> bool {
        matches!(&self.kind, AnswerKind::Stream(stream) if stream.has_data)
    }

    /// The bytes of a stream's event that is not complete yet. Whatever came before it, without data, were comments.
    pub fn incomplete_event(&self) -> &[u8] {
        match &self.kind {
            AnswerKind::Stream(stream) => stream.splitter.kept_event(),
            _ => &[],
        }
    }

    /// Timeout for the next piece of an answer whose header has come; `idle` is the endpoint's timeout between any two pieces.
    /// None while the one for the first byte holds.
    pub fn patience(&self, idle: Duration) -> Option<Duration> {
        match self.kind {
            AnswerKind::Error { likely: true, .. } => Some(idle.min(ERROR_BODY_WAIT_MAX)),
            AnswerKind::Error { likely: false, .. } | AnswerKind::Json => Some(idle),
            AnswerKind::Unseen { labelled: false } if !self.terms.streams => Some(idle),
            AnswerKind::Unseen { .. } | AnswerKind::Stream(_) if self.has_bytes => Some(idle),
            AnswerKind::Nothing | AnswerKind::Unseen { .. } | AnswerKind::Stream(_) | AnswerKind::Open => None,
        }
    }

    /// Returns the outcome of an answer that stops here, if its header decided it.
    pub fn outcome_if_cut(&self) -> Option<Outcome> {
        match self.kind {
            AnswerKind::Error { status, wait, .. } => Some(Outcome::of_status(status, wait)),
            _ => None,
        }
    }

    fn so_far(&mut self, rules: &Rules<'_>) -> Verdict {
        let is_full = self.held_bytes >= HOLD_BYTES_MAX;
        match self.kind {
            AnswerKind::Open => Verdict::Commit,
            AnswerKind::Error { status, wait, likely: true } if is_full => {
                Verdict::Drop(Outcome::of_status(status, wait))
            }
            AnswerKind::Error { status, wait, likely: false } if is_full => {
                let outcome = Outcome::of_status(status, wait);
                if outcome.is_hidden(rules.retry) {
                    return Verdict::Drop(outcome);
                }
                self.outcome = Some(outcome);
                self.commit()
            }
            AnswerKind::Json if is_full && !answer::begins_well(self.terms.call, &self.joined()) => {
                Verdict::Drop(Outcome::Unrecognised)
            }
            _ if is_full => self.commit(),
            _ => Verdict::Hold,
        }
    }

    fn joined(&self) -> Cow<'_, [u8]> {
        match self.held.as_slice() {
            [] => Cow::Borrowed(&[]),
            [one] => Cow::Borrowed(one),
            several => Cow::Owned(several.concat()),
        }
    }
}

/// The form of a body by its first bytes, whatever its label says. None if they do not show it yet.
fn form(bytes: &[u8], labelled: bool, asked: bool, end: bool) -> Option<Form> {
    const FIELDS: [&[u8]; 5] = [b":", b"data", b"event", b"id:", b"retry:"];
    let text = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes).trim_ascii_start();
    let first = text.first()?;
    if matches!(first, b'{' | b'[' | b'<') {
        return Some(Form::Json);
    }
    if labelled || FIELDS.iter().any(|field| text.starts_with(field)) {
        return Some(Form::Stream);
    }
    // The rest of a field's name may come with the next piece.
    let may_be_field = FIELDS.iter().any(|field| field.starts_with(text));
    if may_be_field && !end {
        return None;
    }
    Some(if asked && may_be_field { Form::Stream } else { Form::Json })
}

/// True for no body, and for `{}`.
fn is_blank(body: &[u8]) -> bool {
    let body = body.trim_ascii();
    let inside = body.strip_prefix(b"{").and_then(|rest| rest.strip_suffix(b"}"));
    body.is_empty() || inside.is_some_and(|inside| inside.trim_ascii().is_empty())
}

/// True if a JSON answer stops before its end.
fn is_cut(body: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(body).is_err_and(|error| error.is_eof())
}

#[cfg(test)]
mod tests;
