//! What of an event stream goes on to the client: whole events, as they came, but for what only we asked for. Pure.
//!
//! Half an event is kept until it is whole, which costs a client nothing, since it could not read it before either; so a
//! stream that breaks never leaves one behind.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::sse::{self, Splitter, Step};
use crate::usage::{Meter, mentions_usage};

/// The state between two pieces of one stream.
#[derive(Debug)]
pub struct Relay {
    splitter: Splitter,
    /// Whether we asked for the usage, and the client did not.
    strips: bool,
    /// Whether the last block was taken out.
    dropped: bool,
    /// Whether the part of an event has gone on that is not whole yet.
    within_event: bool,
}

/// What becomes of a block.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Pass,
    Drop,
    /// These bytes of it are taken out.
    Cut(std::ops::Range<usize>),
}

impl Relay {
    /// For a stream; `strips` if we asked for a usage that the client must not see.
    pub fn new(strips: bool) -> Self {
        Self { splitter: Splitter::default(), strips, dropped: false, within_event: false }
    }

    /// Takes the next piece: measures it, and adds to `out` what goes on. Nothing is copied but events that are cut across
    /// pieces.
    pub fn piece(&mut self, piece: &Bytes, meter: &mut Meter, out: &mut Vec<Bytes>) {
        // What goes on from here is not yet in `out`.
        let mut from = 0;
        let mut at = 0;
        loop {
            at = match self.splitter.next(piece, at) {
                Step::Block(end) => {
                    match self.fate(piece.get(at..end).unwrap_or_default(), meter) {
                        Fate::Pass => {}
                        Fate::Drop => {
                            add(out, piece, from, at);
                            from = end;
                        }
                        Fate::Cut(cut) => {
                            add(out, piece, from, at + cut.start);
                            from = at + cut.end;
                        }
                    }
                    end
                }
                Step::Joined(block, end) => {
                    match self.fate(&block, meter) {
                        Fate::Pass => out.push(block),
                        Fate::Drop => {}
                        Fate::Cut(cut) => {
                            add(out, &block, 0, cut.start);
                            add(out, &block, cut.end, block.len());
                        }
                    }
                    from = end;
                    end
                }
                Step::Part { kept, end, last } => {
                    meter.part(&kept, false);
                    meter.part(piece.get(at..end).unwrap_or_default(), last);
                    if !kept.is_empty() {
                        out.push(kept);
                    }
                    self.dropped = false;
                    self.within_event = !last;
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
        add(out, piece, from, at);
    }

    /// The stream came to its end: what was kept of a last event goes on as it is.
    pub fn rest(&mut self) -> Bytes {
        self.splitter.take_rest()
    }

    /// Whether the client has been sent a part of an event that is not whole.
    pub fn is_within_event(&self) -> bool {
        self.within_event
    }

    fn fate(&mut self, block: &[u8], meter: &mut Meter) -> Fate {
        let mut fate = Fate::Pass;
        if let Some(data) = sse::data(block) {
            meter.event(&data);
            if self.strips && mentions_usage(&data) {
                fate = without_usage(block, &data);
            }
        }
        self.dropped = fate == Fate::Drop;
        fate
    }
}

fn add(out: &mut Vec<Bytes>, piece: &Bytes, from: usize, to: usize) {
    if from < to {
        out.push(piece.slice(from..to));
    }
}

/// What an endpoint sends only because it was asked for the usage: a chunk of its own without choices, and a `"usage":null`
/// in all others. A usage beside choices is not that: endpoints that put it there do so unasked.
fn without_usage(block: &[u8], data: &[u8]) -> Fate {
    #[derive(Deserialize)]
    struct Chunk<'a> {
        #[serde(borrow)]
        choices: Option<&'a RawValue>,
        #[serde(borrow, default, deserialize_with = "even_null")]
        usage: Option<&'a RawValue>,
    }
    /// An absent value and a null are told apart.
    fn even_null<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
        <&RawValue>::deserialize(deserializer).map(Some)
    }
    let Ok(Chunk { choices, usage: Some(usage) }) = serde_json::from_slice(data) else { return Fate::Pass };
    if usage.get() != "null" {
        let has_none = |choices: &RawValue| {
            let inside = choices.get().strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
            inside.is_some_and(|inside| inside.trim().is_empty())
        };
        return if choices.is_some_and(has_none) { Fate::Drop } else { Fate::Pass };
    }
    // Data of several lines is a copy, whose places are not those of the block.
    let start = (usage.get().as_ptr() as usize).checked_sub(block.as_ptr() as usize);
    match start.and_then(|start| member(block, start, start + usage.get().len())) {
        Some(range) => Fate::Cut(range),
        None => Fate::Pass,
    }
}

/// The member of an object whose value stands there, with the comma that parts it from its neighbour.
fn member(block: &[u8], start: usize, end: usize) -> Option<std::ops::Range<usize>> {
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
    use crate::request::Call;
    use proptest::prelude::*;

    fn relayed(strips: bool, stream: &str, piece_bytes: usize) -> String {
        let (mut relay, mut meter) = (Relay::new(strips), Meter::new(Call::Completion, false));
        let mut out = Vec::new();
        for piece in stream.as_bytes().chunks(piece_bytes) {
            relay.piece(&Bytes::copy_from_slice(piece), &mut meter, &mut out);
        }
        out.push(relay.rest());
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
    fn a_line_feed_goes_with_its_block() {
        assert_seen("data: {\"choices\":[],\"usage\":{}}\r\n\r\ndata: a\r\n\r\n", "data: a\r\n\r\n");
        assert_seen("data: {\"choices\":[],\"usage\":{}}\r\rdata: a\r\r", "data: a\r\r");
    }

    #[test]
    fn a_usage_beside_choices_is_the_endpoints_own_way() {
        let stream = "data: {\"choices\":[{\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":1}}\n\n\
                      data: {\"choices\":[{\"usage\":null}]}\n\n\
                      data: {\"usage\":{}}\n\ndata: {\"a\":1,\ndata: \"usage\":null}\n\ndata: \"usage\"\n\n";
        assert_seen(stream, stream);
    }

    #[test]
    fn half_an_event_waits_and_the_rest_comes_at_the_end() {
        let (mut relay, mut meter) = (Relay::new(false), Meter::new(Call::Completion, false));
        let mut out = Vec::new();
        relay.piece(&Bytes::from_static(b"data: a\n\ndata: b"), &mut meter, &mut out);
        assert_eq!(out, ["data: a\n\n"]);
        relay.piece(&Bytes::from_static(b"\n"), &mut meter, &mut out);
        assert_eq!(out, ["data: a\n\n"]);
        assert_eq!(relay.rest(), "data: b\n");
        assert!(!relay.is_within_event());
    }

    #[test]
    fn an_event_that_is_too_long_goes_through_as_it_comes() {
        let long = format!("data: {}\n\ndata: [DONE]\n\n", "x".repeat(200_000));
        let (mut relay, mut meter) = (Relay::new(true), Meter::new(Call::Completion, false));
        let mut out = Vec::new();
        let bytes = long.as_bytes();
        relay.piece(&Bytes::copy_from_slice(&bytes[..100_000]), &mut meter, &mut out);
        assert_eq!(out.iter().map(Bytes::len).sum::<usize>(), 100_000);
        assert!(relay.is_within_event());
        relay.piece(&Bytes::copy_from_slice(&bytes[100_000..]), &mut meter, &mut out);
        assert!(!relay.is_within_event() && meter.is_complete());
        assert_eq!(out.concat(), bytes);
    }

    #[test]
    fn whole_events_are_not_copied() {
        let (mut relay, mut meter) = (Relay::new(true), Meter::new(Call::Completion, false));
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
            let (mut relay, mut meter) = (Relay::new(true), Meter::new(Call::Completion, true));
            let mut out = Vec::new();
            for piece in &pieces {
                relay.piece(&Bytes::copy_from_slice(piece), &mut meter, &mut out);
            }
            out.push(relay.rest());
            prop_assert_eq!(out.concat(), pieces.concat());
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
