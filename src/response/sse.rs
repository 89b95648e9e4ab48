//! An incremental splitter for server-sent events (WHATWG HTML, 9.2.6).
//!
//! Right for any chunking, for `\n`, `\r\n` and `\r`, comments, several `data:` lines and a byte-order mark. A block, the lines
//! of one event with the empty line that ends it, is reported as a place in the piece that it came in; only one that is cut
//! across pieces is put together, once. Memory is bounded: a block longer than [`BLOCK_BYTES_MAX`] is reported in parts.

use std::borrow::Cow;
use std::mem;

use bytes::{Bytes, BytesMut};

use crate::json::part;

/// Length of a block that is handled as a whole: far more than one of a chat stream, and little to hold.
pub const BLOCK_BYTES_MAX: usize = 64 * 1024;

const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// Meaning of the next bytes of a piece; the number is where in the piece they end.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// A whole block, all of it in this piece.
    Block(usize),
    /// A whole block that began in earlier pieces.
    Joined(Bytes, usize),
    /// A part of a block that is too long to be handled as a whole; what was kept of earlier pieces comes before it.
    Part {
        /// Bytes from earlier pieces.
        kept: Bytes,
        /// End of the part in this piece.
        end: usize,
        /// True if the block ends with it.
        last: bool,
    },
    /// The line feed of a block's end whose carriage return came with an earlier piece.
    LineFeed(usize),
    /// The piece is used up; what is left of it is kept.
    More,
}

/// The state between two pieces.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "they are independent: any combination can occur")]
pub struct Splitter {
    /// The block that has begun in earlier pieces.
    kept: BytesMut,
    /// True if a line has begun.
    in_line: bool,
    /// True if the last byte was a carriage return.
    after_cr: bool,
    /// True if that ended a block.
    block_ended: bool,
    /// True if the block under way is handled in parts.
    in_parts: bool,
}

impl Splitter {
    /// The next step within a piece, from the end of the last one on.
    pub fn next(&mut self, piece: &Bytes, from: usize) -> Step {
        let rest = part(piece, from..);
        if rest.is_empty() {
            return Step::More;
        }
        if mem::take(&mut self.block_ended) && rest.first() == Some(&b'\n') {
            self.after_cr = false;
            return Step::LineFeed(from + 1);
        }
        let end = self.block_end(rest);
        let length = end.unwrap_or(rest.len());
        if self.in_parts || self.kept.len() + length > BLOCK_BYTES_MAX {
            self.in_parts = end.is_none();
            return Step::Part { kept: self.kept.split().freeze(), end: from + length, last: end.is_some() };
        }
        match end {
            Some(length) if self.kept.is_empty() => Step::Block(from + length),
            Some(length) => {
                self.kept.extend_from_slice(part(rest, ..length));
                Step::Joined(self.kept.split().freeze(), from + length)
            }
            None => {
                self.kept.extend_from_slice(rest);
                Step::More
            }
        }
    }

    /// Returns the kept bytes of the block under way.
    pub fn kept(&self) -> &[u8] {
        &self.kept
    }

    /// Returns the kept bytes of the block under way, without comments that no line but comments has come after.
    pub fn kept_event(&self) -> &[u8] {
        if self.keeps_comments_only() { &[] } else { &self.kept }
    }

    /// Takes whole comment lines that stand alone so far: a comment is part of no event, so nobody has to wait for the rest.
    pub fn take_comments(&mut self) -> Option<Bytes> {
        self.keeps_comments_only().then(|| self.kept.split().freeze())
    }

    fn keeps_comments_only(&self) -> bool {
        self.kept.last() == Some(&b'\n') && comments_before(&self.kept) == self.kept.len()
    }

    /// Takes the kept bytes of a block that never ended.
    pub fn take_rest(&mut self) -> Bytes {
        self.kept.split().freeze()
    }

    /// Takes the next piece, and passes each event that it completes to `each`: its data, or `None` if it was too long.
    pub fn feed(&mut self, piece: &Bytes, mut each: impl FnMut(Option<&[u8]>)) {
        let mut at = 0;
        loop {
            at = match self.next(piece, at) {
                Step::Block(end) => {
                    if let Some(data) = piece.get(at..end).and_then(data) {
                        each(Some(&data));
                    }
                    end
                }
                Step::Joined(block, end) => {
                    if let Some(data) = data(&block) {
                        each(Some(&data));
                    }
                    end
                }
                Step::Part { end, last, .. } => {
                    if last {
                        each(None);
                    }
                    end
                }
                Step::LineFeed(end) => end,
                Step::More => return,
            };
        }
    }

    /// Returns how many of these bytes belong to the block, if it ends in them.
    fn block_end(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while let Some(found) = bytes.get(at..).and_then(|rest| memchr::memchr2(b'\n', b'\r', rest)) {
            let is_second_half = found == 0 && self.after_cr && bytes.get(at) == Some(&b'\n');
            let ends_line = self.in_line || found > 0;
            at += found + 1;
            self.after_cr = bytes.get(at - 1) == Some(&b'\r');
            self.in_line = false;
            if is_second_half || ends_line {
                continue;
            }
            if self.after_cr && bytes.get(at) == Some(&b'\n') {
                self.after_cr = false;
                at += 1;
            }
            self.block_ended = self.after_cr;
            return Some(at);
        }
        if at < bytes.len() {
            self.in_line = true;
            self.after_cr = false;
        }
        None
    }
}

/// Length of the comment lines that a block begins with. They belong to no event, so that whatever becomes of it they go on.
pub fn comments_before(block: &[u8]) -> usize {
    let mut length = 0;
    while let Some(rest) = block.get(length..).filter(|rest| rest.first() == Some(&b':')) {
        // A line may end in a carriage return alone, but whoever writes comments ends it in a line feed.
        match memchr::memchr2(b'\n', b'\r', rest) {
            Some(end) if rest.get(end) == Some(&b'\n') => length += end + 1,
            Some(end) if rest.get(end + 1) == Some(&b'\n') => length += end + 2,
            _ => break,
        }
    }
    length
}

/// The data of a block, its `data:` lines joined by line feeds; none if it has no such line, as a comment.
pub fn data(block: &[u8]) -> Option<Cow<'_, [u8]>> {
    let mut data: Option<Cow<'_, [u8]>> = None;
    for line in lines(block.strip_prefix(BYTE_ORDER_MARK).unwrap_or(block)) {
        let Some(value) = data_value(line) else { continue };
        match &mut data {
            None => data = Some(Cow::Borrowed(value)),
            Some(data) => {
                let data = data.to_mut();
                data.push(b'\n');
                data.extend_from_slice(value);
            }
        }
    }
    data
}

/// The lines of a block. Between the halves of a `\r\n` there is an empty one, which says nothing.
fn lines(block: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = block;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = memchr::memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
        let (line, after) = rest.split_at(end);
        rest = after.get(1..).unwrap_or_default();
        Some(line)
    })
}

/// The value of a `data` field; one space after the colon is not part of it.
fn data_value(line: &[u8]) -> Option<&[u8]> {
    match line.strip_prefix(b"data")? {
        [] => Some(&[]),
        [b':', b' ', value @ ..] | [b':', value @ ..] => Some(value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn events(chunks: &[&[u8]]) -> Vec<Option<String>> {
        let mut splitter = Splitter::default();
        let mut events = Vec::new();
        for chunk in chunks {
            splitter.feed(&Bytes::copy_from_slice(chunk), |data| {
                events.push(data.map(|data| String::from_utf8_lossy(data).into_owned()));
            });
        }
        events
    }

    fn data(texts: &[&str]) -> Vec<Option<String>> {
        texts.iter().map(|text| Some((*text).to_owned())).collect()
    }

    /// Every byte of the stream as the steps report it, and whether each step's bytes end a block.
    fn told(chunks: &[&[u8]]) -> (Vec<u8>, usize) {
        let mut splitter = Splitter::default();
        let (mut bytes, mut blocks) = (Vec::new(), 0);
        for chunk in chunks {
            let chunk = Bytes::copy_from_slice(chunk);
            let mut at = 0;
            loop {
                let (kept, end) = match splitter.next(&chunk, at) {
                    Step::Block(end) => (Bytes::new(), end),
                    Step::Joined(block, end) => {
                        bytes.extend_from_slice(&block);
                        blocks += 1;
                        at = end;
                        continue;
                    }
                    Step::Part { kept, end, last } => {
                        blocks += usize::from(last);
                        bytes.extend_from_slice(&kept);
                        bytes.extend_from_slice(&chunk[at..end]);
                        at = end;
                        continue;
                    }
                    Step::LineFeed(end) => {
                        bytes.push(b'\n');
                        at = end;
                        continue;
                    }
                    Step::More => break,
                };
                blocks += 1;
                bytes.extend_from_slice(&kept);
                bytes.extend_from_slice(&chunk[at..end]);
                at = end;
            }
        }
        bytes.extend_from_slice(&splitter.take_rest());
        (bytes, blocks)
    }

    #[test]
    fn fields_comments_and_line_ends() {
        let stream = b"\xEF\xBB\xBFdata: one\n\n: ping\n\nevent: x\r\ndata:two\r\ndata\r\ndata:  three\r\n\r\ndatum: no\r\rdata: [DONE]\r\r";
        assert_eq!(events(&[stream]), data(&["one", "two\n\n three", "[DONE]"]));
    }

    #[test]
    fn a_block_is_told_at_its_first_line_end_and_the_line_feed_apart() {
        assert_eq!(events(&[b"data: a\r\n\r"]), data(&["a"]), "nobody waits for the line feed");
        let mut splitter = Splitter::default();
        let piece = Bytes::from_static(b"data: a\r\n\r");
        assert_eq!(splitter.next(&piece, 0), Step::Block(10));
        assert_eq!(splitter.next(&piece, 10), Step::More);
        let piece = Bytes::from_static(b"\n\r\ndata: b\r\n\r\n");
        assert_eq!(splitter.next(&piece, 0), Step::LineFeed(1));
        assert_eq!(splitter.next(&piece, 1), Step::Block(3), "an empty block");
        assert_eq!(splitter.next(&piece, 3), Step::Block(14));
    }

    #[test]
    fn comments_before_an_event_are_known() {
        for (block, length) in [
            (": a\n\n", 4),
            (": a\r\n: b\ndata: c\n\n", 9),
            ("data: c\n: a\n\n", 0),
            (": a\rdata: c\r\r", 0),
            (": a", 0),
            ("", 0),
        ] {
            assert_eq!(comments_before(block.as_bytes()), length, "{block:?}");
        }
    }

    #[test]
    fn a_block_is_not_copied_unless_it_is_cut() {
        let mut splitter = Splitter::default();
        let piece = Bytes::from_static(b"data: a\n\ndata: b\n\ndata: c");
        assert_eq!(splitter.next(&piece, 0), Step::Block(9));
        assert_eq!(splitter.next(&piece, 9), Step::Block(18));
        assert_eq!(splitter.next(&piece, 18), Step::More);
        let piece = Bytes::from_static(b"\n\nrest");
        assert_eq!(splitter.next(&piece, 0), Step::Joined("data: c\n\n".into(), 2));
        assert_eq!(splitter.next(&piece, 2), Step::More);
        assert_eq!(splitter.take_rest(), "rest");
    }

    #[test]
    fn an_unfinished_event_is_none() {
        assert_eq!(events(&[b"data: a\n"]), data(&[]));
    }

    #[test]
    fn too_long_events_are_told_and_forgotten() {
        let long = format!("data: {}\n\ndata: next\n\n", "x".repeat(3 * BLOCK_BYTES_MAX));
        for size in [long.len(), 10_000, 1_000_000] {
            let chunks: Vec<_> = long.as_bytes().chunks(size).collect();
            assert_eq!(events(&chunks), [None, Some("next".to_owned())], "{size}");
            assert_eq!(told(&chunks), (long.clone().into_bytes(), 2));
        }
        let lines = format!("{}\ndata: next\n\n", "data: 0123456789\n".repeat(BLOCK_BYTES_MAX / 8));
        assert_eq!(events(&[lines.as_bytes()]), [None, Some("next".to_owned())]);
    }

    proptest! {
        #[test]
        fn every_way_of_cutting_gives_the_same_events_and_bytes(
            pieces in prop::collection::vec(
                prop::sample::select(vec!["data: a", "data:b", "\n", "\r\n", "\r", ": c", "event: e", "\n\n", "data", "é"]), 0..40),
            cuts in prop::collection::vec(0usize..400, 0..40),
        ) {
            let stream = pieces.concat().into_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(stream.len())).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let chunks: Vec<&[u8]> = cuts.windows(2).map(|cut| &stream[cut[0]..cut[1]]).collect();
            prop_assert_eq!(events(&chunks), events(&[&stream]));
            prop_assert_eq!(told(&chunks), (stream.clone(), told(&[&stream]).1));
        }
    }
}
