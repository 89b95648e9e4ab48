//! Reader of the messages that an endpoint sends over a WebSocket (RFC 6455, 5.2), as they pass. Nothing is changed; what cannot be read
//! is passed over.

use bytes::Bytes;

use crate::request::websocket::{FrameHeader, HEADER_BYTES_MAX};

/// Longest message that is read. Sound comes in small ones, and what reports tokens holds text.
const MESSAGE_BYTES_MAX: usize = 1024 * 1024;

/// Reader of one direction of a WebSocket.
#[derive(Debug, Default)]
pub struct FrameReader {
    /// Header of the frame that has begun, as far as it has come.
    header: Vec<u8>,
    /// Bytes of the frame's content that have yet to come; none before its header is whole.
    left: Option<u64>,
    /// The message so far.
    message: Vec<u8>,
    /// True if the message goes on in a further frame.
    goes_on: bool,
    /// True if the message is not read: it is too long, compressed or masked, or holds no text.
    is_skipped: bool,
    is_control: bool,
}

impl FrameReader {
    /// Reads a piece, and calls `each` with every message of text that it completes.
    pub fn feed(&mut self, piece: &Bytes, mut each: impl FnMut(&[u8])) {
        let mut rest = &piece[..];
        while !rest.is_empty() {
            let Some(left) = self.left else {
                rest = self.read_header(rest);
                // A frame may be empty.
                if self.left == Some(0) {
                    self.end_frame(&mut each);
                }
                continue;
            };
            let length = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
            let (content, after) = rest.split_at(length);
            self.take(content);
            self.left = left.checked_sub(length as u64);
            rest = after;
            if self.left == Some(0) {
                self.end_frame(&mut each);
            }
        }
    }

    /// Reads a part of a frame's header. Returns what follows it.
    fn read_header<'a>(&mut self, piece: &'a [u8]) -> &'a [u8] {
        let mut bytes = piece.iter();
        for byte in bytes.by_ref() {
            self.header.push(*byte);
            if let Some(header) = FrameHeader::read(&self.header) {
                self.begin_frame(&header);
                break;
            }
            debug_assert!(self.header.len() < HEADER_BYTES_MAX, "a header has an end");
        }
        bytes.as_slice()
    }

    fn begin_frame(&mut self, header: &FrameHeader) {
        self.header.clear();
        self.left = Some(header.length);
        self.is_control = header.is_control();
        if self.is_control {
            return;
        }
        self.goes_on = !header.is_final;
        if !header.continues() {
            self.message.clear();
            self.is_skipped = !header.begins_text();
        }
        // A server's frames are not masked.
        self.is_skipped |= header.is_extended || header.mask.is_some();
    }

    /// True if the last message has come to its end, so that another one may stand behind it.
    pub fn is_between_messages(&self) -> bool {
        self.left.is_none() && self.header.is_empty() && !self.goes_on
    }

    fn take(&mut self, content: &[u8]) {
        if self.is_control || self.is_skipped {
            return;
        }
        if self.message.len() + content.len() > MESSAGE_BYTES_MAX {
            self.is_skipped = true;
            self.message = Vec::new();
            return;
        }
        self.message.extend_from_slice(content);
    }

    fn end_frame(&mut self, each: &mut impl FnMut(&[u8])) {
        self.left = None;
        if self.is_control || self.goes_on {
            return;
        }
        if !self.is_skipped {
            each(&self.message);
        }
        self.message.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(first: u8, content: &[u8]) -> Vec<u8> {
        let length = content.len();
        let mut frame = vec![first];
        match length {
            0..126 => frame.push(u8::try_from(length).unwrap()),
            126..65_536 => {
                frame.push(126);
                frame.extend(u16::try_from(length).unwrap().to_be_bytes());
            }
            _ => {
                frame.push(127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        frame.extend(content);
        frame
    }

    fn read(stream: &[u8], step: usize) -> Vec<String> {
        let (mut reader, mut messages) = (FrameReader::default(), Vec::new());
        for piece in stream.chunks(step) {
            let piece = Bytes::copy_from_slice(piece);
            reader.feed(&piece, |message| messages.push(String::from_utf8_lossy(message).into_owned()));
        }
        messages
    }

    #[test]
    fn messages_of_text_are_read_and_others_passed_over() {
        let long = "x".repeat(70_000);
        let stream = [
            frame(0x81, b"one"),
            frame(0x82, b"sound"),
            // In three frames, with a ping between them.
            frame(0x01, b"t"),
            frame(0x89, b"ping"),
            frame(0x00, b"w"),
            frame(0x80, b"o"),
            // Compressed.
            frame(0xc1, b"deflated"),
            frame(0x81, b""),
            frame(0x81, long.as_bytes()),
            // Masked, as only a client's are.
            vec![0x81, 0x82, 1, 2, 3, 4, 5, 6],
            frame(0x81, &vec![b'y'; MESSAGE_BYTES_MAX + 1]),
            frame(0x81, b"last"),
            frame(0x88, b""),
        ]
        .concat();
        for step in [1, 7, 200, stream.len()] {
            assert_eq!(read(&stream, step), ["one", "two", "", &long, "last"], "{step}");
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_it_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), step in 1_usize..50) {
            read(&bytes, step);
        }
    }
}
