//! Meter: measures one answer as it passes. It reads the reported tokens, notes when the first token has come, and
//! keeps a sample of the text for an estimate, in case the endpoint does not report its tokens.

use std::borrow::Cow;
use std::sync::LazyLock;

use bytes::Bytes;
use memchr::memmem::Finder as Needle;
use serde::Deserialize;

use super::{Finder, Reported, Usage, reported};
use crate::json::part;
use crate::json::scan::{has_member, strings};
use crate::request::call::Call;

/// Bytes of a stream's text that are kept for an estimate. The rest is assumed to be similar.
pub const SAMPLE_BYTES_MAX: usize = 16 * 1024;
/// Bytes of a JSON answer that are kept for an estimate, in at most `BODY_PIECES_MAX` pieces, which are not copied. The
/// rest is assumed to be similar.
pub const BODY_BYTES_MAX: usize = 256 * 1024;
const BODY_PIECES_MAX: usize = 4096;

static USAGE: LazyLock<Needle<'static>> = LazyLock::new(|| Needle::new(b"\"usage\""));
static TIMINGS: LazyLock<Needle<'static>> = LazyLock::new(|| Needle::new(b"\"timings\""));
static FINISH: LazyLock<Needle<'static>> = LazyLock::new(|| Needle::new(b"\"finish_reason\""));
static DELTA: LazyLock<Needle<'static>> = LazyLock::new(|| Needle::new(b"delta\""));

/// True if an event may contain a usage, or a null in its place.
pub fn mentions_usage(data: &[u8]) -> bool {
    USAGE.find(data).is_some()
}

/// True if an event may report tokens. Many endpoints send a null in every chunk but one.
fn says_usage(data: &[u8]) -> bool {
    has_member(data, &USAGE, b"{") || TIMINGS.find(data).is_some()
}

/// Measurements of one answer. Their size is bounded, and they can neither change nor fail the answer.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own about the answer")]
pub struct Meter {
    call: Call,
    /// True if text is kept for an estimate.
    estimates: bool,
    /// Reader for JSON that comes in several pieces, and for events that are too long to be kept; `None` until it is
    /// needed.
    finder: Option<Box<Finder>>,
    /// First piece of a JSON answer. It is read when a second piece comes or the answer ends: an answer in one piece is
    /// first searched near its end.
    first: Bytes,
    usage: Option<Usage>,
    /// True if only the prompt's tokens have been reported, as in the first event of Anthropic's messages.
    reported_prompt_only: bool,
    text: AnswerText,
    has_timings: bool,
    /// True once a token of a stream has come.
    has_token: bool,
    fed: Fed,
    end: End,
}

/// Form of the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Fed {
    /// Nothing readable so far.
    #[default]
    Nothing,
    Json,
    Events,
}

/// Report of the endpoint about the answer's end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    /// Nothing so far.
    #[default]
    Open,
    /// A finish reason.
    Finished,
    /// The answer is complete.
    Complete,
}

/// Text of an answer, as far as it is kept.
#[derive(Debug, Default)]
pub enum AnswerText {
    /// No text, or none that is kept.
    #[default]
    None,
    /// Beginning of a stream's text, escaped as in JSON strings.
    Sample {
        /// The text, at most [`SAMPLE_BYTES_MAX`] bytes.
        sample: Vec<u8>,
        /// Length of the whole text in bytes.
        bytes: u64,
    },
    /// A JSON answer, as far as it is kept.
    Json {
        /// Its pieces.
        pieces: Vec<Bytes>,
        /// Length of the pieces in bytes, at most [`BODY_BYTES_MAX`].
        kept: usize,
        /// Length of the whole answer in bytes.
        bytes: u64,
    },
}

impl Meter {
    /// Returns a meter for the answer to this call.
    pub fn new(call: Call, estimates: bool) -> Self {
        Self {
            call,
            estimates: estimates && call.is_text(),
            finder: None,
            first: Bytes::new(),
            usage: None,
            reported_prompt_only: false,
            text: AnswerText::None,
            has_timings: false,
            has_token: false,
            fed: Fed::Nothing,
            end: End::Open,
        }
    }

    /// Reads the data of an event. Returns true if the event had nothing but text, so that events of the same form need
    /// not be read.
    pub fn event(&mut self, data: &[u8]) -> bool {
        self.fed = Fed::Events;
        if data.trim_ascii() == b"[DONE]" {
            self.end = End::Complete;
            return false;
        }
        if self.call == Call::Unmetered {
            return false;
        }
        let says_usage = says_usage(data);
        if says_usage {
            self.read_usage(data);
        }
        match self.call {
            Call::Completion if self.end == End::Open && finishes(data) => self.end = End::Finished,
            Call::Responses | Call::Messages if is_last(data) => self.end = End::Complete,
            _ => {}
        }
        if self.call.is_text() && (self.estimates || !self.has_token) {
            event_texts(self.call, data, |raw| self.text(raw));
        }
        self.call.is_text() && self.end == End::Open && !says_usage
    }

    /// Reads the texts of an event that has the same form as an earlier one with nothing but text.
    pub fn like_event<'a>(&mut self, texts: impl Iterator<Item = &'a [u8]>) {
        if self.estimates || !self.has_token {
            texts.for_each(|raw| self.text(raw));
        }
    }

    /// Returns the call.
    pub fn call(&self) -> Call {
        self.call
    }

    /// Reads a part of an event that is too long to be kept.
    pub fn part(&mut self, part: &[u8], last: bool) {
        self.fed = Fed::Events;
        self.finder().feed(part);
        if self.estimates && self.call == Call::Completion {
            self.add_text(part.len(), &[]);
        }
        if last {
            if matches!(self.call, Call::Responses | Call::Messages) && self.finder().usage().is_some() {
                self.end = End::Complete;
            }
            self.read_found();
        }
    }

    /// Reads a piece of a JSON answer.
    pub fn json(&mut self, piece: &Bytes) {
        if self.fed == Fed::Json {
            let first = std::mem::take(&mut self.first);
            let finder = self.finder();
            finder.feed(&first);
            finder.feed(piece);
        } else {
            self.fed = Fed::Json;
            self.first = piece.clone();
        }
        if !self.estimates {
            return;
        }
        if let AnswerText::None = self.text {
            self.text = AnswerText::Json { pieces: Vec::new(), kept: 0, bytes: 0 };
        }
        if let AnswerText::Json { pieces, kept, bytes } = &mut self.text {
            *bytes += to_u64(piece.len());
            if *kept + piece.len() <= BODY_BYTES_MAX && pieces.len() < BODY_PIECES_MAX {
                *kept += piece.len();
                pieces.push(piece.clone());
            }
        }
    }

    /// Ends a JSON answer.
    pub fn json_ended(&mut self) {
        let only = std::mem::take(&mut self.first);
        if let Some(usage) = reported::near_the_end(&only) {
            self.end = End::Complete;
            if self.call != Call::Unmetered {
                self.update(usage);
            }
            return;
        }
        let finder = self.finder();
        finder.feed(&only);
        if finder.is_whole() {
            self.end = End::Complete;
        }
        self.read_found();
    }

    fn finder(&mut self) -> &mut Finder {
        self.finder.get_or_insert_default()
    }

    fn read_found(&mut self) {
        let found = self.finder.take().and_then(|finder| finder.usage());
        if let Some(found) = found.filter(|_| self.call != Call::Unmetered) {
            self.reported_prompt_only = false;
            self.update(found);
        }
    }

    fn read_usage(&mut self, data: &[u8]) {
        if let Some(Reported { usage, begins_message, has_timings }) = Reported::from_json(data) {
            self.reported_prompt_only = begins_message;
            self.has_timings |= has_timings;
            self.update(usage);
        }
    }

    fn update(&mut self, reported: Usage) {
        match &mut self.usage {
            Some(usage) => usage.update(reported),
            None => self.usage = Some(reported),
        }
    }

    fn text(&mut self, raw: &[u8]) {
        if raw.is_empty() {
            return;
        }
        if self.estimates {
            self.add_text(raw.len(), raw);
        }
        self.has_token = true;
    }

    /// Adds `length` bytes of text, and keeps as many of `raw` as there is room for.
    fn add_text(&mut self, length: usize, raw: &[u8]) {
        if length == 0 {
            return;
        }
        if let AnswerText::None = self.text {
            self.text = AnswerText::Sample { sample: Vec::new(), bytes: 0 };
        }
        if let AnswerText::Sample { sample, bytes } = &mut self.text {
            *bytes += to_u64(length);
            let room = SAMPLE_BYTES_MAX.saturating_sub(sample.len());
            sample.extend_from_slice(beginning(raw, room));
        }
    }

    /// Returns the usage that the endpoint reported; `None` if it reported none, or only the prompt's tokens.
    pub fn reported(&self) -> Option<Usage> {
        self.usage.filter(|_| !self.reported_prompt_only)
    }

    /// Returns the prompt's tokens, if they were reported even though the answer's were not.
    pub fn prompt_reported(&self) -> Option<u64> {
        self.usage.and_then(|usage| usage.prompt())
    }

    /// True once a token of a stream has come.
    pub fn has_token(&self) -> bool {
        self.has_token
    }

    /// True if any text came that can be estimated.
    pub fn has_text(&self) -> bool {
        !matches!(self.text, AnswerText::None)
    }

    /// Length of a stream's text that has come, in bytes, if it is counted for an estimate. Of an answer in one piece that is not known
    /// until it is whole: much of it need not be text.
    pub fn text_bytes(&self) -> u64 {
        match &self.text {
            AnswerText::None | AnswerText::Json { .. } => 0,
            AnswerText::Sample { bytes, .. } => *bytes,
        }
    }

    /// Counts the text of the answer, even if it is not to be estimated.
    pub fn count_text(&mut self) {
        self.estimates = self.call.is_text();
    }

    /// True if the answer had llama.cpp's `timings`: such an endpoint reports its tokens without being asked.
    pub fn has_timings(&self) -> bool {
        self.has_timings
    }

    /// True if the endpoint reported that its answer is complete.
    pub fn is_complete(&self) -> bool {
        self.end == End::Complete
    }

    /// True if an answer that has ended may be complete, judging by its content: JSON ends with its last bracket, a
    /// chat gives a finish reason, a response or message has a last event. Other answers always may be.
    pub fn is_whole(&self) -> bool {
        match (self.fed, self.call) {
            (Fed::Json, _) | (Fed::Events, Call::Responses | Call::Messages) => self.end == End::Complete,
            (Fed::Events, Call::Completion) => self.end >= End::Finished,
            (Fed::Nothing, _) | (Fed::Events, Call::Embeddings | Call::Other | Call::Unmetered) => true,
        }
    }

    /// Takes out the text, for an estimate.
    pub fn take_text(&mut self) -> AnswerText {
        std::mem::take(&mut self.text)
    }
}

fn to_u64(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// Returns at most `room` bytes from the beginning of a text, without cutting a character or an escape.
fn beginning(raw: &[u8], room: usize) -> &[u8] {
    /// Length of an escaped surrogate pair: twice `\u` and four digits.
    const ESCAPE_BYTES_MAX: usize = 12;
    if raw.len() <= room {
        return raw;
    }
    let mut end = room;
    while end > 0 && raw.get(end).is_some_and(|byte| byte & 0xC0 == 0x80) {
        end -= 1;
    }
    let near = end.saturating_sub(ESCAPE_BYTES_MAX);
    if let Some(escape) = raw.get(near..end).and_then(|bytes| memchr::memchr(b'\\', bytes)) {
        end = near + escape;
    }
    while end > 0 && raw.get(end - 1) == Some(&b'\\') {
        end -= 1;
    }
    part(raw, ..end)
}

/// True if a chunk of a chat has a finish reason.
fn finishes(data: &[u8]) -> bool {
    has_member(data, &FINISH, b"\"") && !has_member(data, &FINISH, b"\"\"")
}

/// True if an event is the last one of a response or of Anthropic's message.
fn is_last(data: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Event<'a> {
        #[serde(borrow, rename = "type")]
        kind: Cow<'a, str>,
    }
    const KINDS: [&str; 4] = ["response.completed", "response.incomplete", "response.failed", "message_stop"];
    // Most events are neither, which a search shows without a parser.
    KINDS.iter().any(|kind| memchr::memmem::find(data, kind.as_bytes()).is_some())
        && serde_json::from_slice::<Event<'_>>(data).is_ok_and(|event| KINDS.contains(&&*event.kind))
}

/// Calls `each` with every text of an event, as it stands between its quotation marks.
pub fn event_texts<'a>(call: Call, data: &'a [u8], mut each: impl FnMut(&'a [u8])) {
    let keys: &[&[u8]] = match call {
        Call::Completion => &[b"content", b"reasoning_content", b"reasoning", b"text", b"arguments", b"refusal"],
        // Other events repeat the whole text.
        Call::Responses if DELTA.find(data).is_some() => &[b"delta"],
        Call::Messages if DELTA.find(data).is_some() => &[b"text", b"partial_json", b"thinking"],
        _ => return,
    };
    strings(data).filter(|(key, _)| keys.contains(key)).for_each(|(_, text)| each(text));
}

/// Calls `each` with every text of a JSON answer, whole or cut, as it stands between its quotation marks.
pub fn answer_texts<'a>(call: Call, json: &'a [u8], mut each: impl FnMut(&'a [u8])) {
    const KEYS: [&[u8]; 7] =
        [b"content", b"reasoning_content", b"reasoning", b"text", b"arguments", b"refusal", b"thinking"];
    if call.is_text() {
        strings(json).filter(|(key, _)| KEYS.contains(key)).for_each(|(_, text)| each(text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(call: Call, events: &[&str]) -> String {
        let mut meter = Meter::new(call, true);
        for event in events {
            meter.event(event.as_bytes());
        }
        match meter.take_text() {
            AnswerText::Sample { sample, bytes } => {
                assert_eq!(usize::try_from(bytes).unwrap(), sample.len());
                String::from_utf8(sample).unwrap()
            }
            AnswerText::None => String::new(),
            AnswerText::Json { pieces, .. } => panic!("{pieces:?}"),
        }
    }

    #[test]
    fn the_texts_of_each_kind_of_stream_are_sampled() {
        let chat = [
            r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
            r#"{"choices":[{"delta":{"reasoning_content":"Hm "},"logprobs":{"content":[{"token":"x"}]}}]}"#,
            r#"{"choices":[{"delta":{ "content" : "a \"b\" \\" }}]}"#,
            r#"{"choices":[{"delta":{"tool_calls":[{"function":{"name":"f","arguments":"{\"x\"}"}}]}}]}"#,
            r#"{"choices":[],"usage":null}"#,
            "[DONE]",
        ];
        assert_eq!(sample(Call::Completion, &chat), r#"Hm a \"b\" \\{\"x\"}"#);
        let response = [
            r#"{"type":"response.output_text.delta","delta":"Hi"}"#,
            r#"{"type":"response.output_text.done","text":"Hi"}"#,
            r#"{"type":"response.completed","response":{"output":[{"content":[{"text":"Hi"}]}]}}"#,
        ];
        assert_eq!(sample(Call::Responses, &response), "Hi");
        let message = [
            r#"{"type":"content_block_start","content_block":{"type":"text","text":""}}"#,
            r#"{"type":"content_block_delta","delta":{"type":"text_delta","text":"Hi"}}"#,
            r#"{"type":"content_block_delta","delta":{"type":"input_json_delta","partial_json":"{}"}}"#,
        ];
        assert_eq!(sample(Call::Messages, &message), "Hi{}");
        assert_eq!(sample(Call::Other, &chat), "");
    }

    #[test]
    fn a_sample_is_bounded_and_counts_the_rest() {
        let mut meter = Meter::new(Call::Completion, true);
        let event = format!(r#"{{"choices":[{{"text":"{}"}}]}}"#, "x".repeat(1000));
        assert!((0..100).all(|_| meter.event(event.as_bytes())));
        let AnswerText::Sample { sample, bytes } = meter.take_text() else { panic!("it has text") };
        assert!(sample.len() <= SAMPLE_BYTES_MAX && sample.len() > SAMPLE_BYTES_MAX - 1000, "{}", sample.len());
        assert_eq!(bytes, 100_000);
        let mut meter = Meter::new(Call::Completion, true);
        (0..100).for_each(|_| meter.json(&Bytes::from(vec![b' '; 10_000])));
        let AnswerText::Json { pieces, kept, bytes } = meter.take_text() else { panic!("it has text") };
        assert_eq!((pieces.len(), kept, bytes), (26, 260_000, 1_000_000), "nor is a long answer kept whole");
        // A single event may be longer than the sample.
        let mut meter = Meter::new(Call::Completion, true);
        meter.event(format!(r#"{{"choices":[{{"text":"{}"}}]}}"#, "é\\n".repeat(10_000)).as_bytes());
        meter.part("x".repeat(70_000).as_bytes(), true);
        let AnswerText::Sample { sample, bytes } = meter.take_text() else { panic!("it has text") };
        assert_eq!(bytes, 110_000);
        let text = String::from_utf8(sample).unwrap();
        assert!(text.len() > SAMPLE_BYTES_MAX - 20 && (text.ends_with("é") || text.ends_with("\\n")), "{}", text.len());
    }

    #[test]
    fn a_beginning_cuts_no_escape() {
        for room in 0..=20 {
            let text = r"a\\b\u00e9\ud83d\ude00é";
            let begun = std::str::from_utf8(beginning(text.as_bytes(), room)).unwrap();
            assert!(serde_json::from_str::<String>(&format!("\"{begun}\"")).is_ok(), "{room}: {begun}");
        }
        assert_eq!(beginning(b"abc", 3), b"abc");
    }

    #[test]
    fn json_is_whole_with_its_last_bracket() {
        let is_whole = |text: &'static str| {
            let mut meter = Meter::new(Call::Completion, false);
            meter.json(&Bytes::from_static(text.as_bytes()));
            meter.json_ended();
            meter.is_whole()
        };
        assert!(is_whole(r#" {"a":[{"b":"}"}]} "#) && is_whole("[]") && is_whole("7"));
        assert!(!is_whole(r#"{"a":[{"b":"}"}]"#) && !is_whole(r#""abc"#));
    }

    #[test]
    fn the_end_is_told_in_each_kind_of_stream() {
        let ends = |call: Call, data: &str| {
            let mut meter = Meter::new(call, false);
            meter.event(data.as_bytes());
            (meter.is_complete(), meter.is_whole())
        };
        assert_eq!(ends(Call::Completion, " [DONE] "), (true, true));
        assert_eq!(ends(Call::Completion, r#"{"choices":[{"finish_reason": "stop"}]}"#), (false, true));
        assert_eq!(ends(Call::Completion, r#"{"choices":[{"finish_reason":null}]}"#), (false, false));
        assert_eq!(ends(Call::Responses, r#"{"type":"response.completed"}"#), (true, true));
        assert_eq!(ends(Call::Completion, r#"{"choices":[{"finish_reason":""}]}"#), (false, false));
        assert_eq!(ends(Call::Responses, r#"{"delta":"response.completed"}"#), (false, false));
        let echoed = r#"{"type":"response.created","response":{"metadata":{"type":"response.completed"}}}"#;
        assert_eq!(ends(Call::Responses, echoed), (false, false));
        assert_eq!(ends(Call::Other, "{}"), (false, true), "there is no telling");
        assert_eq!(ends(Call::Messages, r#"{"type":"message_stop"}"#), (true, true));
    }

    #[test]
    fn the_first_token_is_the_first_text() {
        let mut meter = Meter::new(Call::Completion, false);
        meter.event(br#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#);
        assert!(!meter.has_token());
        meter.event(br#"{"choices":[{"delta":{"content":"x"}}]}"#);
        assert!(meter.has_token());
        assert!(matches!(meter.take_text(), AnswerText::None), "nothing is kept unless it is to be estimated");
    }

    #[test]
    fn anthropics_first_event_tells_of_the_prompt_only() {
        let mut meter = Meter::new(Call::Messages, true);
        meter.event(br#"{"type":"message_start","message":{"usage":{"input_tokens":25,"output_tokens":1}}}"#);
        assert_eq!((meter.reported(), meter.prompt_reported()), (None, Some(25)));
        meter.event(br#"{"type":"message_delta","usage":{"output_tokens":15}}"#);
        let tokens = meter.reported().unwrap().tokens();
        assert_eq!((tokens.prompt, tokens.completion, tokens.total), (25, 15, 40));
    }

    #[test]
    fn an_event_too_long_to_be_kept_is_read_all_the_same() {
        let mut meter = Meter::new(Call::Responses, false);
        let event = format!(
            r#"data: {{"type":"response.completed","response":{{"output":"{}","usage":{{"input_tokens":1,"output_tokens":2}}}}}}"#,
            "x".repeat(100_000)
        );
        event.as_bytes().chunks(1000).for_each(|part| meter.part(part, false));
        meter.part(b"\n\n", true);
        assert_eq!(meter.reported().unwrap().tokens().total, 3);
        assert!(meter.is_complete());
    }

    #[test]
    fn what_is_not_a_call_of_its_own_is_not_measured() {
        let usage = r#"{"usage":{"prompt_tokens":3,"completion_tokens":4}}"#;
        let mut meter = Meter::new(Call::Unmetered, true);
        meter.json(&Bytes::from_static(usage.as_bytes()));
        meter.json_ended();
        meter.event(usage.as_bytes());
        assert_eq!(meter.reported(), None);
    }
}
