//! Hold or commit: what of an endpoint's answer the client may see, and when. Pure; bytes in, verdict out.
//!
//! Nothing has reached the client before commit, so until then another endpoint can take over. Errors that may be
//! retried are held to their end, streams until their first event with content, JSON answers until it is known that
//! they are not empty. Audio, files and the rest are never held.

use std::borrow::Cow;
use std::sync::LazyLock;
use std::time::Duration;

use bytes::Bytes;
use memchr::memmem::Finder as Needle;
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::json::scan::has_member;
use crate::request::call::Call;
use crate::request::content_type::{is_event_stream, is_json};
use crate::response::sse::Splitter;
use crate::routing::retry::Outcome;
use crate::usage::Reported;

/// Most bytes of an answer that are held back (64 KiB), not counting the last chunk.
pub const HOLD_BYTES_MAX: usize = 64 * 1024;
/// Longest wait for the body of an error while another endpoint is available: the status says enough.
const ERROR_BODY_WAIT_MAX: Duration = Duration::from_secs(5);
/// Longest time that a stream that has sent data is held while no event has content.
pub const HOLD_TIME_MAX: Duration = Duration::from_secs(5);

static COMPLETION: LazyLock<Needle<'static>> = LazyLock::new(|| Needle::new(b"\"completion_tokens\""));

/// Parts of an answer's header that matter here.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// The status.
    pub status: u16,
    /// The `Content-Type`.
    pub content_type: Option<&'a str>,
    /// Pause that the endpoint asked for, if this is a 429.
    pub rest: Duration,
    /// True if no body follows.
    pub end: bool,
    /// True if the answer ends when the connection does, so that HTTP cannot tell its end from a break.
    pub ends_with_connection: bool,
}

/// Terms of an attempt.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Call of the API: only a completion can be empty by its usage.
    pub call: Call,
    /// True if the answer should have a body (not for a HEAD).
    pub expects_body: bool,
    /// True if another endpoint could take over.
    pub more: bool,
    /// True if `stream_options` were added to the request.
    pub usage_injected: bool,
}

/// Decision about the answer so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Wait for more.
    Hold,
    /// Let everything through, now and from here on.
    Commit,
    /// Drop the answer: the attempt came to this end.
    Drop(Outcome),
}

/// Kind of answer that is being held.
#[derive(Debug)]
enum AnswerKind {
    /// Nothing has come yet.
    Nothing,
    /// An error, held whole; dropped at its end if another endpoint is to be tried instead.
    Error { outcome: Outcome, drop: bool },
    /// An event stream, held until it says something.
    Stream(Box<Splitter>),
    /// A JSON answer, held until its end.
    Json,
    /// Committed.
    Open,
}

/// Judges one attempt's answer as it comes in.
#[derive(Debug)]
pub struct Judge {
    terms: Terms,
    kind: AnswerKind,
    held: Vec<Bytes>,
    held_bytes: usize,
    has_data: bool,
    ends_with_connection: bool,
}

impl Judge {
    /// A judge for a fresh attempt.
    pub fn new(terms: Terms) -> Self {
        Self {
            terms,
            kind: AnswerKind::Nothing,
            held: Vec::new(),
            held_bytes: 0,
            has_data: false,
            ends_with_connection: false,
        }
    }

    /// True if an error is being held.
    pub fn is_error(&self) -> bool {
        matches!(self.kind, AnswerKind::Error { .. })
    }

    /// Notes that no other endpoint can take over any more.
    pub fn no_more(&mut self) {
        self.terms.more = false;
        if let AnswerKind::Error { drop, .. } = &mut self.kind {
            *drop = false;
        }
    }

    /// Takes the header. `retryable` says whether an outcome may be tried elsewhere.
    pub fn header(&mut self, head: Head<'_>, retryable: impl FnOnce(&Outcome) -> bool) -> Verdict {
        let outcome = Outcome::Status { status: head.status, rest: head.rest };
        self.ends_with_connection = head.ends_with_connection;
        self.kind = if head.status >= 400 {
            // One that no other endpoint will take over is held too, so that a key quoted in it is found however it is
            // cut.
            let drop = self.terms.more && retryable(&outcome);
            AnswerKind::Error { outcome, drop }
        } else if head.status != 200 || !self.terms.expects_body {
            AnswerKind::Open
        } else if is_event_stream(head.content_type) {
            AnswerKind::Stream(Box::default())
        } else if self.terms.more && self.may_be_empty(head.content_type) {
            AnswerKind::Json
        } else {
            AnswerKind::Open
        };
        if head.end { self.end() } else { self.so_far() }
    }

    /// Takes a piece of the body.
    pub fn body(&mut self, piece: &Bytes, end: bool) -> Verdict {
        match &mut self.kind {
            AnswerKind::Open | AnswerKind::Nothing => return self.so_far(),
            AnswerKind::Stream(splitter) => {
                let said = first_word(splitter, piece, &mut self.has_data);
                match said {
                    Some(Word::Error) if self.terms.more => return Verdict::Drop(Outcome::ErrorEvent),
                    Some(Word::Done) if self.terms.more => return Verdict::Drop(Outcome::Empty),
                    Some(Word::Content | Word::Error | Word::Done) => return self.commit(),
                    Some(Word::Preface) | None => {}
                }
            }
            AnswerKind::Json | AnswerKind::Error { .. } => self.held.push(piece.clone()),
        }
        self.held_bytes += piece.len();
        if end { self.end() } else { self.so_far() }
    }

    /// Decides about an answer that ended without another piece.
    pub fn end(&mut self) -> Verdict {
        match &self.kind {
            AnswerKind::Error { outcome, .. }
                if self.terms.usage_injected && refuses_usage(outcome, &self.joined()) =>
            {
                Verdict::Drop(Outcome::UsageRefused)
            }
            AnswerKind::Error { outcome, drop: true } => Verdict::Drop(outcome.clone()),
            AnswerKind::Stream(_) if self.terms.more => Verdict::Drop(Outcome::Empty),
            AnswerKind::Json if self.terms.more && is_empty_answer(&self.joined(), self.terms.call) => {
                Verdict::Drop(Outcome::Empty)
            }
            AnswerKind::Json if self.terms.more && self.ends_with_connection && is_cut(&self.joined()) => {
                Verdict::Drop(Outcome::Broken)
            }
            _ => self.commit(),
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

    /// True while a stream that has sent data has had no event with content, which bounds the wait.
    pub fn waits_for_word(&self) -> bool {
        matches!(self.kind, AnswerKind::Stream(_)) && self.has_data
    }

    /// Timeout for the next piece of an answer whose header has come and whose end is awaited; `idle` is the endpoint's
    /// timeout between any two pieces.
    pub fn patience(&self, idle: Duration) -> Option<Duration> {
        match self.kind {
            AnswerKind::Error { drop: true, .. } => Some(idle.min(ERROR_BODY_WAIT_MAX)),
            AnswerKind::Error { drop: false, .. } | AnswerKind::Json => Some(idle),
            AnswerKind::Nothing | AnswerKind::Stream(_) | AnswerKind::Open => None,
        }
    }

    /// Returns the outcome of an answer that stops here, if its header decided it.
    pub fn outcome_if_cut(&self) -> Option<Outcome> {
        match &self.kind {
            AnswerKind::Error { outcome, .. } => Some(outcome.clone()),
            _ => None,
        }
    }

    fn so_far(&mut self) -> Verdict {
        match &self.kind {
            AnswerKind::Open => Verdict::Commit,
            AnswerKind::Error { outcome, drop: true } if self.held_bytes >= HOLD_BYTES_MAX => {
                Verdict::Drop(outcome.clone())
            }
            _ if self.held_bytes >= HOLD_BYTES_MAX => self.commit(),
            _ => Verdict::Hold,
        }
    }

    /// Sound and files are passed on as they come; JSON, and a body without a content type, may turn out empty.
    fn may_be_empty(&self, content_type: Option<&str>) -> bool {
        content_type.is_none_or(|value| is_json(Some(value))) || self.terms.call == Call::Completion
    }

    fn joined(&self) -> Cow<'_, [u8]> {
        match self.held.as_slice() {
            [] => Cow::Borrowed(&[]),
            [one] => Cow::Borrowed(one),
            several => Cow::Owned(several.concat()),
        }
    }
}

/// Meaning of an event of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Word {
    /// A role, an identifier, a ping: nothing that the client waits for.
    Preface,
    /// `[DONE]`.
    Done,
    /// An error.
    Error,
    /// Text, a tool call, reasoning, a finish.
    Content,
}

/// The first event that is more than a preface, if the piece completes one.
fn first_word(splitter: &mut Splitter, piece: &Bytes, has_data: &mut bool) -> Option<Word> {
    let mut first = None;
    splitter.feed(piece, |data| {
        *has_data = true;
        if first.is_none_or(|word| word == Word::Preface) {
            // An event too long to be read counts as content.
            first = Some(data.map_or(Word::Content, word));
        }
    });
    first
}

fn word(data: &[u8]) -> Word {
    if data.trim_ascii() == b"[DONE]" {
        return Word::Done;
    }
    let Ok(Value::Object(event)) = serde_json::from_slice::<Value>(data) else { return Word::Content };
    if event.get("error").is_some_and(|error| !error.is_null()) {
        return Word::Error;
    }
    if let Some(choices) = event.get("choices").and_then(Value::as_array) {
        return if choices.iter().any(choice_says_something) { Word::Content } else { Word::Preface };
    }
    match event.get("type").and_then(Value::as_str) {
        Some("error" | "response.failed") => Word::Error,
        Some(
            "response.created"
            | "response.queued"
            | "response.in_progress"
            | "message_start"
            | "content_block_start"
            | "ping",
        ) => Word::Preface,
        _ => Word::Content,
    }
}

fn choice_says_something(choice: &Value) -> bool {
    let delta = choice.get("delta").and_then(Value::as_object);
    delta.is_some_and(|delta| delta.iter().any(|(key, value)| key != "role" && !is_blank(value)))
        || choice.get("finish_reason").is_some_and(|reason| !reason.is_null())
        || choice.get("text").is_some_and(|text| !is_blank(text))
        || choice.get("message").is_some_and(|message| !is_blank(message))
}

fn is_blank(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// True if an error is about the `stream_options` that were added to the request, and not about something the client
/// sent.
fn refuses_usage(outcome: &Outcome, body: &[u8]) -> bool {
    let names = |name: &str| memchr::memmem::find(body, name.as_bytes()).is_some();
    matches!(outcome, Outcome::Status { status: 400 | 422, .. }) && (names("stream_options") || names("include_usage"))
}

/// True if a JSON answer stops before its end.
fn is_cut(body: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(body).is_err_and(|error| error.is_eof())
}

/// Empty means: no body or `{}`; for completions also a usage that counts a prompt and not one token of an answer.
fn is_empty_answer(body: &[u8], call: Call) -> bool {
    let body = body.trim_ascii();
    let inside = body.strip_prefix(b"{").and_then(|rest| rest.strip_suffix(b"}"));
    if body.is_empty() || inside.is_some_and(|inside| inside.trim_ascii().is_empty()) {
        return true;
    }
    // Nearly all answers show it in their first bytes, and need no parser.
    call == Call::Completion
        && has_member(body, &COMPLETION, b"0")
        && Reported::from_json(body).is_some_and(|reported| reported.usage.is_of_empty_answer())
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: Option<&str> = Some("application/json");
    const SSE: Option<&str> = Some("text/event-stream; charset=utf-8");
    const ROLE: &str =
        "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n";
    const TEXT: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"Hi\"}}]}\n\n";

    fn judge(more: bool) -> Judge {
        Judge::new(terms(more))
    }

    fn terms(more: bool) -> Terms {
        Terms { call: Call::Completion, expects_body: true, more, usage_injected: false }
    }

    fn header(judge: &mut Judge, status: u16, content_type: Option<&str>) -> Verdict {
        let rest = Duration::ZERO;
        let head = Head { status, content_type, rest, end: false, ends_with_connection: false };
        judge.header(head, |_| status != 400)
    }

    fn body(judge: &mut Judge, text: &str, end: bool) -> Verdict {
        judge.body(&Bytes::copy_from_slice(text.as_bytes()), end)
    }

    fn stream(more: bool, first: &str) -> Verdict {
        let mut judge = judge(more);
        assert_eq!(header(&mut judge, 200, SSE), Verdict::Hold);
        body(&mut judge, first, false)
    }

    #[test]
    fn a_stream_is_held_until_it_says_something() {
        assert_eq!(stream(true, ROLE), Verdict::Hold);
        assert_eq!(stream(true, ": ping\n\n"), Verdict::Hold);
        assert_eq!(stream(true, &TEXT[..20]), Verdict::Hold);
        assert_eq!(stream(true, &format!("{ROLE}{TEXT}")), Verdict::Commit);
        for said in [
            r#"{"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}"#,
            r#"{"choices":[{"delta":{"reasoning_content":"hm"}}]}"#,
            r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#,
            r#"{"choices":[{"text":"x"}]}"#,
            r#"{"type":"response.output_text.delta","delta":"x"}"#,
            r#"{"type":"content_block_delta"}"#,
            "not json",
        ] {
            assert_eq!(stream(true, &format!("data: {said}\n\n")), Verdict::Commit, "{said}");
        }
        for preface in [r#"{"choices":[]}"#, r#"{"type":"response.created"}"#, r#"{"type":"message_start"}"#] {
            assert_eq!(stream(true, &format!("data: {preface}\n\n")), Verdict::Hold, "{preface}");
        }
    }

    #[test]
    fn a_stream_that_begins_with_an_error_or_is_empty_is_dropped() {
        assert_eq!(stream(true, "data: {\"error\":{\"message\":\"x\"}}\n\n"), Verdict::Drop(Outcome::ErrorEvent));
        assert_eq!(stream(true, "data: {\"type\":\"response.failed\"}\n\n"), Verdict::Drop(Outcome::ErrorEvent));
        assert_eq!(stream(true, "data: [DONE]\n\n"), Verdict::Drop(Outcome::Empty));
        assert_eq!(stream(false, "data: [DONE]\n\n"), Verdict::Commit, "nobody else is left");
        let mut judge = judge(true);
        header(&mut judge, 200, SSE);
        assert_eq!(body(&mut judge, ROLE, true), Verdict::Drop(Outcome::Empty));
    }

    #[test]
    fn empty_answers_are_dropped_while_another_endpoint_is_left() {
        let zero = r#"{"usage":{"prompt_tokens":5,"completion_tokens":0,"total_tokens":5}}"#;
        for empty in ["", " { }\n", "{}", zero] {
            let mut judge = judge(true);
            assert_eq!(header(&mut judge, 200, JSON), Verdict::Hold);
            assert_eq!(body(&mut judge, empty, true), Verdict::Drop(Outcome::Empty), "{empty}");
        }
        let mut judge = judge(false);
        assert_eq!(header(&mut judge, 200, JSON), Verdict::Commit, "nobody else is left");
    }

    #[test]
    fn once_nobody_can_take_over_everything_is_let_through() {
        let zero = r#"{"usage":{"prompt_tokens":5,"completion_tokens":0,"total_tokens":5}}"#;
        for (status, text) in [(200, zero), (503, "{}")] {
            let mut judge = judge(true);
            assert_eq!(header(&mut judge, status, JSON), Verdict::Hold);
            judge.no_more();
            assert_eq!(body(&mut judge, text, true), Verdict::Commit, "{status}");
        }
    }

    #[test]
    fn an_embedding_is_never_empty_by_its_usage() {
        let zero = r#"{"usage":{"prompt_tokens":5,"completion_tokens":0,"total_tokens":5}}"#;
        let mut judge = Judge::new(Terms { call: Call::Other, ..terms(true) });
        header(&mut judge, 200, JSON);
        assert_eq!(body(&mut judge, zero, true), Verdict::Commit);
    }

    #[test]
    fn whole_answers_are_committed_at_their_end_or_at_64_kib() {
        let mut judge = judge(true);
        header(&mut judge, 200, JSON);
        assert_eq!(body(&mut judge, r#"{"id":1,"#, false), Verdict::Hold);
        assert_eq!(body(&mut judge, r#""usage":{"completion_tokens":2}}"#, true), Verdict::Commit);
        let mut large = self::judge(true);
        header(&mut large, 200, JSON);
        assert_eq!(body(&mut large, &"x".repeat(HOLD_BYTES_MAX), false), Verdict::Commit);
    }

    #[test]
    fn errors_are_held_whole_and_dropped_if_another_may_do_better() {
        let status = |status| Outcome::Status { status, rest: Duration::ZERO };
        let mut retried = judge(true);
        assert_eq!(header(&mut retried, 503, JSON), Verdict::Hold);
        assert_eq!(body(&mut retried, "{", false), Verdict::Hold);
        assert_eq!(body(&mut retried, "}", true), Verdict::Drop(status(503)));
        let mut fault = judge(true);
        assert_eq!(header(&mut fault, 400, JSON), Verdict::Hold);
        assert_eq!(body(&mut fault, "{}", true), Verdict::Commit);
        let mut last = judge(false);
        assert_eq!(header(&mut last, 503, None), Verdict::Hold);
        assert_eq!(last.end(), Verdict::Commit);
        let mut large = judge(true);
        header(&mut large, 503, JSON);
        assert_eq!(body(&mut large, &"x".repeat(HOLD_BYTES_MAX), false), Verdict::Drop(status(503)));
    }

    #[test]
    fn other_answers_are_never_held() {
        let mut sound = Judge::new(Terms { call: Call::Other, ..terms(true) });
        assert_eq!(header(&mut sound, 200, Some("audio/mpeg")), Verdict::Commit);
        assert_eq!(header(&mut judge(true), 302, None), Verdict::Commit);
        let mut head = Judge::new(Terms { call: Call::Other, expects_body: false, ..terms(true) });
        let end =
            Head { status: 200, content_type: None, rest: Duration::ZERO, end: true, ends_with_connection: false };
        assert_eq!(head.header(end, |_| true), Verdict::Commit);
    }
}
