//! Relay of an event stream to the client: whole events, as they came, without what only the gateway asked for and
//! without the endpoint's secrets. Pure.
//!
//! Half an event is kept until it is whole, since no parser of events can use it; so a stream that breaks leaves no half of one
//! behind, unless it is longer than is kept.

use std::ops::Range;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::json::part;
use crate::json::scan;
use crate::request::call::Call;
use crate::response::answer;
use crate::response::event_template::EventTemplate;
use crate::response::redact::{Redactor, Secrets};
use crate::response::sse::{self, Splitter, Step};
use crate::usage::{Meter, event_texts, mentions_usage};

/// The state between two pieces of one stream.
#[derive(Debug)]
pub struct Relay {
    splitter: Splitter,
    /// True if the gateway asked for the usage, and the client did not.
    strips: bool,
    secrets: Secrets,
    /// True if the last block was taken out.
    dropped: bool,
    /// Redaction of an event that is too long to be kept whole.
    long: Option<Redactor>,
    /// The last event that said nothing but text, since the next one is likely to be like it.
    template: Option<EventTemplate>,
    /// Number of events since one was like the last.
    unlike: u8,
    /// First event that may be an error.
    error: Option<Bytes>,
}

/// Number of different events in a row after which a stream is read event by event.
const UNLIKE_MAX: u8 = 16;

/// Treatment of a block.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Pass,
    Drop,
    /// These bytes of it are taken out.
    Cut(Range<usize>),
}

impl Relay {
    /// Returns a relay for a stream of an endpoint that has these secrets; `strips` if the gateway asked for a usage
    /// that the client must not see.
    pub fn new(strips: bool, secrets: Secrets) -> Self {
        Self {
            splitter: Splitter::default(),
            strips,
            secrets,
            dropped: false,
            long: None,
            template: None,
            unlike: 0,
            error: None,
        }
    }

    /// Takes the next piece: measures it, and adds to `out` the part to pass on. Nothing is copied but events that are cut across
    /// pieces, and those that are too long to be kept.
    pub fn piece(&mut self, piece: &Bytes, meter: &mut Meter, out: &mut Vec<Bytes>) {
        // From here on nothing is in `out` yet.
        let mut from = 0;
        let mut at = 0;
        loop {
            at = match self.splitter.next(piece, at) {
                Step::Block(end) => {
                    match self.fate(part(piece, at..end), meter) {
                        Fate::Pass => {}
                        Fate::Drop => {
                            self.add(out, piece, from, at);
                            from = end;
                        }
                        Fate::Cut(cut) => {
                            self.add(out, piece, from, at + cut.start);
                            from = at + cut.end;
                        }
                    }
                    end
                }
                Step::Joined(block, end) => {
                    self.block(&block, meter, out);
                    from = end;
                    end
                }
                Step::Part { kept, end, last } => {
                    self.add(out, piece, from, at);
                    let rest = part(piece, at..end);
                    meter.part(&kept, false);
                    meter.part(rest, last);
                    let redactor = self.long.get_or_insert_with(|| Redactor::new(self.secrets.clone()));
                    out.extend([redactor.piece(&kept, false), redactor.piece(rest, last)]);
                    if last {
                        self.long = None;
                    }
                    self.dropped = false;
                    from = end;
                    end
                }
                Step::LineFeed(end) => {
                    if self.dropped {
                        from = end;
                    }
                    end
                }
                Step::More => break,
            };
        }
        self.add(out, piece, from, at);
        if let Some(comments) = self.splitter.take_comments() {
            self.add(out, &comments, 0, comments.len());
        }
        // A client that reads lines waits for no more than this one, and an endpoint may hold the rest back.
        if is_done_line(self.splitter.kept()) {
            self.end(meter, out);
        }
    }

    /// Measures and adds the rest at the end of the stream: a last event that was never completed.
    pub fn end(&mut self, meter: &mut Meter, out: &mut Vec<Bytes>) {
        if let Some(mut long) = self.long.take() {
            out.push(long.piece(b"", true));
        }
        let rest = self.splitter.take_rest();
        self.block(&rest, meter, out);
    }

    /// Takes the first event that may be an error.
    pub fn take_error(&mut self) -> Option<Bytes> {
        self.error.take()
    }

    /// True if the client has been sent a part of an incomplete event.
    pub fn is_within_event(&self) -> bool {
        self.long.is_some()
    }

    fn block(&mut self, block: &Bytes, meter: &mut Meter, out: &mut Vec<Bytes>) {
        match self.fate(block, meter) {
            Fate::Pass => self.add(out, block, 0, block.len()),
            Fate::Drop => {}
            Fate::Cut(cut) => {
                self.add(out, block, 0, cut.start);
                self.add(out, block, cut.end, block.len());
            }
        }
    }

    /// An error in the middle of a stream may quote the endpoint's key.
    fn add(&self, out: &mut Vec<Bytes>, piece: &Bytes, from: usize, to: usize) {
        if from < to {
            out.push(self.secrets.blot_whole(&piece.slice(from..to)));
        }
    }

    fn fate(&mut self, block: &[u8], meter: &mut Meter) -> Fate {
        if let Some(like) = self.template.as_ref().and_then(|template| template.matches(block)) {
            meter.like_event(like.texts());
            (self.dropped, self.unlike) = (false, 0);
            return like.cut.map_or(Fate::Pass, Fate::Cut);
        }
        let mut fate = Fate::Pass;
        if let Some(data) = sse::data(block) {
            let says_text_only = meter.event(&data);
            if self.strips && mentions_usage(&data) {
                fate = without_usage(block, &data);
            }
            if answer::mentions_error(&data) && self.error.is_none() {
                self.error = Some(Bytes::copy_from_slice(&data));
            }
            if says_text_only && self.unlike < UNLIKE_MAX {
                self.unlike += 1;
                self.template = template_of(block, &data, meter.call(), &fate);
            }
        }
        self.dropped = fate == Fate::Drop;
        match sse::comments_before(block) {
            comments if self.dropped && comments > 0 => Fate::Cut(comments..block.len()),
            _ => fate,
        }
    }
}

fn template_of(block: &[u8], data: &[u8], call: Call, fate: &Fate) -> Option<EventTemplate> {
    let cut = match fate {
        Fate::Pass => None,
        Fate::Cut(cut) => Some(cut.clone()),
        Fate::Drop => return None,
    };
    let mut texts = Vec::new();
    event_texts(call, data, |text| texts.push(offset(block, text).map(|start| start..start + text.len())));
    let texts: Vec<Range<usize>> = texts.into_iter().collect::<Option<_>>()?;
    EventTemplate::new(block, texts.into_iter(), cut)
}

/// True for the line that ends a chat's stream, if its event is not yet ended.
fn is_done_line(kept: &[u8]) -> bool {
    const BYTES_MAX: usize = 24;
    kept.len() <= BYTES_MAX
        && matches!(kept.last(), Some(b'\n' | b'\r'))
        && sse::data(kept).is_some_and(|data| data.trim_ascii() == b"[DONE]")
}

/// Finds the part that an endpoint sends only because it was asked for the usage: a chunk of its own, with no choices
/// in it, and a `"usage":null` in all others. A usage beside choices is not that: endpoints that put it there do so
/// without being asked.
fn without_usage(block: &[u8], data: &[u8]) -> Fate {
    #[derive(Deserialize)]
    struct Chunk<'a> {
        #[serde(borrow)]
        choices: Option<&'a RawValue>,
        #[serde(borrow)]
        error: Option<&'a RawValue>,
        #[serde(borrow, default, deserialize_with = "scan::even_null")]
        usage: Option<&'a RawValue>,
    }
    if let Some(place) = null_near_the_end(data).and_then(|place| offset(block, data).map(|at| at + place)) {
        return cut(block, place);
    }
    let Ok(Chunk { choices, error, usage: Some(usage) }) = serde_json::from_slice(data) else { return Fate::Pass };
    if usage.get() != "null" {
        let is_empty = |choices: &RawValue| {
            let inside = choices.get().strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
            inside.is_some_and(|inside| inside.trim().is_empty())
        };
        return if error.is_none() && choices.is_none_or(is_empty) { Fate::Drop } else { Fate::Pass };
    }
    offset(block, usage.get().as_bytes()).map_or(Fate::Pass, |start| cut(block, start))
}

/// Returns the range of bytes that borrow from the block. Data of several lines is a copy, which has none.
fn offset(block: &[u8], part: &[u8]) -> Option<usize> {
    let start = (part.as_ptr() as usize).checked_sub(block.as_ptr() as usize)?;
    (start + part.len() <= block.len()).then_some(start)
}

/// The place of a null usage that nothing but plain members follow. Nearly all are so, and need no parser.
fn null_near_the_end(data: &[u8]) -> Option<usize> {
    let after_key = memchr::memmem::rfind(data, b"\"usage\"")? + b"\"usage\"".len();
    let value = data.get(after_key..)?.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start();
    let after = value.strip_prefix(b"null")?;
    (data.trim_ascii_start().starts_with(b"{") && scan::ends_outermost(after)).then_some(data.len() - value.len())
}

/// Takes out the null that begins there.
fn cut(block: &[u8], start: usize) -> Fate {
    member(block, start, start + b"null".len()).map_or(Fate::Pass, Fate::Cut)
}

/// The member of an object whose value stands there, with the comma that parts it from its neighbour.
fn member(block: &[u8], start: usize, end: usize) -> Option<Range<usize>> {
    block.get(start..end)?;
    let before =
        block.get(..start)?.trim_ascii_end().strip_suffix(b":")?.trim_ascii_end().strip_suffix(b"\"usage\"")?;
    let before = before.trim_ascii_end();
    if let Some(before) = before.strip_suffix(b",") {
        return Some(before.trim_ascii_end().len()..end);
    }
    // It is the first one.
    let after = block.get(end..)?.trim_ascii_start();
    let after = after.strip_prefix(b",").map_or(after, |rest| rest.trim_ascii_start());
    Some(before.len()..block.len() - after.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::call::Call;
    use proptest::prelude::*;

    fn relayed(strips: bool, stream: &str, piece_bytes: usize) -> String {
        let (mut relay, mut meter) = (Relay::new(strips, Secrets::default()), Meter::new(Call::Completion, false));
        let mut out = Vec::new();
        for piece in stream.as_bytes().chunks(piece_bytes) {
            relay.piece(&Bytes::copy_from_slice(piece), &mut meter, &mut out);
        }
        relay.end(&mut meter, &mut out);
        String::from_utf8(out.concat()).unwrap()
    }

    fn assert_seen(stream: &str, seen: &str) {
        for piece_bytes in [1, 2, 3, 7, 50, 100_000] {
            assert_eq!(relayed(true, stream, piece_bytes), seen, "in pieces of {piece_bytes}");
            assert_eq!(relayed(false, stream, piece_bytes), stream, "in pieces of {piece_bytes}");
        }
    }

    #[test]
    fn a_usage_that_only_we_asked_for_is_not_seen() {
        assert_seen(
            "data: {\"id\":1,\"choices\":[{\"delta\":{\"content\":\"\\\"usage\\\":null\"}}],\"usage\":null}\n\n\
             data: {\"choices\":[{}], \"usage\" : null , \"obfuscation\":\"x\"}\r\n\r\n: ping\n\n\
             data: {\"usage\": null, \"choices\":[{}]}\n\nevent: x\ndata: {\"usage\":null}\n\n\
             data: {\"choices\":[ ],\"usage\":{\"prompt_tokens\":1}}\r\n\r\ndata: [DONE]\n\n",
            "data: {\"id\":1,\"choices\":[{\"delta\":{\"content\":\"\\\"usage\\\":null\"}}]}\n\n\
             data: {\"choices\":[{}] , \"obfuscation\":\"x\"}\r\n\r\n: ping\n\n\
             data: {\"choices\":[{}]}\n\nevent: x\ndata: {}\n\ndata: [DONE]\n\n",
        );
    }

    #[test]
    fn a_usage_without_choices_is_the_one_that_we_asked_for() {
        for usage in
            ["{\"usage\":{}}", "{\"choices\":null,\"usage\":{\"total_tokens\":1}}", "{\"choices\":[ ],\"usage\":{}}"]
        {
            assert_seen(&format!("data: a\n\ndata: {usage}\n\ndata: b\n\n"), "data: a\n\ndata: b\n\n");
            // Even if its event is never ended.
            assert_seen(&format!("data: a\n\ndata: {usage}\n"), "data: a\n\n");
        }
    }

    #[test]
    fn the_last_line_waits_for_nothing() {
        let (mut relay, mut meter) = (Relay::new(true, Secrets::default()), Meter::new(Call::Completion, false));
        let mut out = Vec::new();
        relay.piece(&Bytes::from_static(b"data: [DONE]"), &mut meter, &mut out);
        assert!(out.is_empty() && !meter.is_complete());
        relay.piece(&Bytes::from_static(b"\n"), &mut meter, &mut out);
        assert!(meter.is_complete());
        relay.piece(&Bytes::from_static(b"\n"), &mut meter, &mut out);
        assert_eq!(out, ["data: [DONE]\n", "\n"]);
    }

    #[test]
    fn no_secret_goes_on_however_it_is_cut() {
        let secret = b"sk-0123456789abcdef";
        let secrets: Secrets = std::iter::once(&secret[..]).collect();
        let quoted = String::from_utf8_lossy(secret);
        let long = "x".repeat(70_000);
        let stream =
            format!("data: {{\"error\":\"{quoted}\"}}\n\ndata: {long}{quoted}{long}{quoted}\n\ndata: {quoted}");
        for piece_bytes in [1, 5, 1000, 65_536, 1_000_000] {
            let (mut relay, mut meter) = (Relay::new(true, secrets.clone()), Meter::new(Call::Completion, false));
            let mut out = Vec::new();
            for piece in stream.as_bytes().chunks(piece_bytes) {
                relay.piece(&Bytes::copy_from_slice(piece), &mut meter, &mut out);
            }
            relay.end(&mut meter, &mut out);
            assert_eq!(out.concat(), stream.replace(&*quoted, &"*".repeat(secret.len())).into_bytes(), "{piece_bytes}");
        }
    }

    #[test]
    fn a_line_feed_goes_with_its_block() {
        assert_seen("data: {\"choices\":[],\"usage\":{}}\r\n\r\ndata: a\r\n\r\n", "data: a\r\n\r\n");
        assert_seen("data: {\"choices\":[],\"usage\":{}}\r\rdata: a\r\r", "data: a\r\r");
    }

    #[test]
    fn a_usage_beside_choices_is_the_endpoints_own_way() {
        let stream = "data: {\"choices\":[{\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":1}}\n\n\
                      data: {\"choices\":[{\"usage\":null}]}\n\n\
                      data: {\"error\":{},\"usage\":{}}\n\ndata: {\"a\":1,\ndata: \"usage\":null}\n\ndata: \"usage\"\n\n";
        assert_seen(stream, stream);
    }

    #[test]
    fn half_an_event_waits_and_the_rest_comes_at_the_end() {
        let (mut relay, mut meter) = (Relay::new(false, Secrets::default()), Meter::new(Call::Completion, false));
        let mut out = Vec::new();
        relay.piece(&Bytes::from_static(b"data: a\n\ndata: b"), &mut meter, &mut out);
        assert_eq!(out, ["data: a\n\n"]);
        relay.piece(&Bytes::from_static(b"\n"), &mut meter, &mut out);
        assert_eq!(out, ["data: a\n\n"]);
        relay.end(&mut meter, &mut out);
        assert_eq!(out, ["data: a\n\n", "data: b\n"]);
    }

    #[test]
    fn a_comment_waits_for_no_event() {
        let (mut relay, mut meter) = (Relay::new(false, Secrets::default()), Meter::new(Call::Completion, false));
        let mut out = Vec::new();
        for (piece, sent) in [
            (": PROC", ""),
            ("ESSING\n", ": PROCESSING\n"),
            (": again\r\n", ": again\r\n"),
            ("data: a\n", ""),
            (": within\n", ""),
            ("\n", "data: a\n: within\n\n"),
            (": ping\n\n", ": ping\n\n"),
            ("data: b\n\n: c\n", "data: b\n\n: c\n"),
            ("\n", "\n"),
        ] {
            relay.piece(&Bytes::from_static(piece.as_bytes()), &mut meter, &mut out);
            assert_eq!(out.concat(), sent.as_bytes(), "{piece}");
            out.clear();
        }
    }

    #[test]
    fn an_event_that_is_too_long_goes_through_as_it_comes() {
        let long = format!("data: {}\n\ndata: [DONE]\n\n", "x".repeat(200_000));
        let (mut relay, mut meter) = (Relay::new(true, Secrets::default()), Meter::new(Call::Completion, false));
        let mut out = Vec::new();
        let bytes = long.as_bytes();
        relay.piece(&Bytes::copy_from_slice(&bytes[..100_000]), &mut meter, &mut out);
        // But for the last bytes, in which a key could have begun.
        assert!(out.iter().map(Bytes::len).sum::<usize>() > 99_000);
        assert!(relay.is_within_event());
        relay.piece(&Bytes::copy_from_slice(&bytes[100_000..]), &mut meter, &mut out);
        assert!(!relay.is_within_event() && meter.is_complete());
        assert_eq!(out.concat(), bytes);
    }

    #[test]
    fn whole_events_are_not_copied() {
        let (mut relay, mut meter) = (Relay::new(true, Secrets::default()), Meter::new(Call::Completion, false));
        let piece = Bytes::from_static(b"data: a\n\ndata: {\"choices\":[],\"usage\":{}}\n\ndata: b\n\ndata: c\n\n");
        let mut out = Vec::new();
        relay.piece(&piece, &mut meter, &mut out);
        assert_eq!(out, ["data: a\n\n", "data: b\n\ndata: c\n\n"], "neighbours go as one");
        assert_eq!((out[0].as_ptr(), out[1].as_ptr()), (piece.as_ptr(), piece[42..].as_ptr()));
    }

    proptest! {
        #[test]
        fn not_a_byte_changes_unless_it_is_to(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..20),
        ) {
            let (mut relay, mut meter) = (Relay::new(true, Secrets::default()), Meter::new(Call::Completion, true));
            let mut out = Vec::new();
            for piece in &pieces {
                relay.piece(&Bytes::copy_from_slice(piece), &mut meter, &mut out);
            }
            relay.end(&mut meter, &mut out);
            prop_assert_eq!(out.concat(), pieces.concat());
        }

        #[test]
        fn what_is_recognised_is_what_would_have_been_read(
            events in prop::collection::vec(
                (
                    prop::sample::select(vec!["", "Hi", "\\\"", "\\\\", "\\n", "usage", "a\"", "\"usage\":{}", "\n"]),
                    prop::sample::select(vec!["null", "{\"prompt_tokens\":1}", "1"]),
                    prop::sample::select(vec!["null", "\"stop\""]),
                    prop::sample::select(vec!["", ",\"obfuscation\":\"x\"", ",\"obfuscation\":\"xyz\"", ",\"n\":1"]),
                    prop::sample::select(vec!["\n\n", "\r\n\r\n", "\n", ""]),
                ),
                0..12,
            ),
            strips in any::<bool>(),
        ) {
            let events: Vec<String> = events
                .into_iter()
                .map(|(text, usage, reason, padding, end)| format!(
                    "data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}},\"finish_reason\":{reason}}}],\"usage\":{usage}{padding}}}{end}"
                ))
                .collect();
            let stream = Bytes::from(events.concat());
            let run = |unlike| {
                let mut relay = Relay { unlike, ..Relay::new(strips, Secrets::default()) };
                let mut meter = Meter::new(Call::Completion, true);
                let mut out = Vec::new();
                relay.piece(&stream, &mut meter, &mut out);
                relay.end(&mut meter, &mut out);
                let (told, whole, first) = (meter.reported(), meter.is_whole(), meter.has_token());
                (out.concat(), told, whole, first, format!("{:?}", meter.take_text()))
            };
            prop_assert_eq!(run(0), run(UNLIKE_MAX));
        }

        #[test]
        fn however_it_is_cut_the_same_goes_on(
            parts in prop::collection::vec(
                prop::sample::select(vec![
                    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1}}", "data: {\"choices\":[{}],\"usage\":null}", "\n", "\r\n",
                    "\r", "\n\n", ": c", "data: {\"usage\":null", "}",
                ]),
                0..30,
            ),
            piece_bytes in 1usize..60,
        ) {
            let stream = parts.concat();
            prop_assert_eq!(relayed(true, &stream, piece_bytes), relayed(true, &stream, stream.len().max(1)));
        }
    }
}
