//! Frames of a WebSocket (RFC 6455, 5.2): their headers, a client's messages as they come, and messages of our own.

use std::ops::Range;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::{Bytes, BytesMut};
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY};

use crate::json::part;

/// Longest header of a frame.
pub(crate) const HEADER_BYTES_MAX: usize = 14;

const TEXT: u8 = 1;
const CLOSE: u8 = 8;
const FINAL: u8 = 0x80;
const MASKED: u8 = 0x80;
/// In place of a length: it stands in the two bytes that follow.
const LENGTH_IN_2: u8 = 126;
/// The same, in eight bytes.
const LENGTH_IN_8: u8 = 127;

/// Header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameHeader {
    /// Length of the header itself, in bytes.
    pub(crate) bytes: usize,
    /// True if it ends its message.
    pub(crate) is_final: bool,
    /// True if an extension changed its content.
    pub(crate) is_extended: bool,
    opcode: u8,
    /// The mask of its content, as a client's frames have one.
    pub(crate) mask: Option<[u8; 4]>,
    /// Length of its content, in bytes.
    pub(crate) length: u64,
}

impl FrameHeader {
    /// The header that these bytes begin with; none while it is not whole.
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let [first, second] = *bytes.first_chunk::<2>()?;
        let short = second & !MASKED;
        let length_bytes = match short {
            LENGTH_IN_2 => 2,
            LENGTH_IN_8 => 8,
            _ => 0,
        };
        let length = bytes.get(2..2 + length_bytes)?;
        let length = length.iter().fold(0, |length: u64, byte| length << 8 | u64::from(*byte));
        let after = bytes.get(2 + length_bytes..)?;
        let mask = if second & MASKED == 0 { None } else { Some(*after.first_chunk()?) };
        Some(Self {
            bytes: 2 + length_bytes + if mask.is_some() { 4 } else { 0 },
            is_final: first & FINAL != 0,
            is_extended: first & 0x70 != 0,
            opcode: first & 0x0f,
            mask,
            length: if length_bytes == 0 { short.into() } else { length },
        })
    }

    /// True for a ping, a pong or a close, which may stand between the frames of a message.
    pub(crate) fn is_control(&self) -> bool {
        self.opcode >= CLOSE
    }

    /// True if the frame goes on with a message that has begun.
    pub(crate) fn continues(&self) -> bool {
        self.opcode == 0
    }

    /// True if a message of text begins with it.
    pub(crate) fn begins_text(&self) -> bool {
        self.opcode == TEXT
    }
}

/// A frame of text that is a whole message.
pub(crate) fn text_frame(text: &[u8], mask: Option<[u8; 4]>) -> Vec<u8> {
    frame(FINAL | TEXT, text, mask)
}

/// A frame that closes the connection, with the reason's number (RFC 6455, 7.4.1).
pub(crate) fn close_frame(code: u16) -> Vec<u8> {
    frame(FINAL | CLOSE, &code.to_be_bytes(), None)
}

fn frame(first: u8, content: &[u8], mask: Option<[u8; 4]>) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER_BYTES_MAX + content.len());
    let masked = if mask.is_some() { MASKED } else { 0 };
    frame.push(first);
    match (u8::try_from(content.len()), u16::try_from(content.len())) {
        (Ok(short @ 0..=125), _) => frame.push(masked | short),
        (_, Ok(length)) => {
            frame.push(masked | LENGTH_IN_2);
            frame.extend(length.to_be_bytes());
        }
        _ => {
            frame.push(masked | LENGTH_IN_8);
            frame.extend((content.len() as u64).to_be_bytes());
        }
    }
    match mask {
        None => frame.extend_from_slice(content),
        Some(mask) => {
            frame.extend(mask);
            frame.extend(content.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        }
    }
    frame
}

/// `Sec-WebSocket-Accept` for this `Sec-WebSocket-Key` (RFC 6455, 4.2.2).
pub(crate) fn accept(key: &[u8]) -> String {
    const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    let mut digest = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
    digest.update(key);
    digest.update(GUID);
    BASE64_STANDARD.encode(digest.finish())
}

/// A client's message, or a frame of control.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// Its frames, as they came.
    pub(crate) frames: Bytes,
    /// Its content, without the mask; none if it is a frame of control.
    pub(crate) text: Option<Vec<u8>>,
    mask: [u8; 4],
    is_close: bool,
}

impl Message {
    /// True if the client closes the connection.
    pub(crate) fn is_close(&self) -> bool {
        self.is_close
    }

    /// Its frames with another text in place of a part of it.
    pub(crate) fn with(&self, range: Range<usize>, new: &[u8]) -> Bytes {
        let text = self.text.as_deref().unwrap_or_default();
        let new = [part(text, ..range.start), new, part(text, range.end..)].concat();
        text_frame(&new, Some(self.mask)).into()
    }
}

/// Reason why a client's messages cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MessageError {
    /// One is longer than it may be.
    TooLong,
    /// They are not framed as a client frames them.
    Unframed,
}

/// Reader of a client's messages, which holds one until it is whole.
#[derive(Debug)]
pub(crate) struct MessageReader {
    bytes_max: usize,
    /// Bytes that have come and belong to a frame that is not whole.
    pending: BytesMut,
    /// Frames of the message under way, whole ones.
    frames: BytesMut,
    /// Its content so far, if it is text.
    text: Option<Vec<u8>>,
    has_begun: bool,
}

impl MessageReader {
    /// A reader of messages of at most this many bytes, their frames included.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, pending: BytesMut::new(), frames: BytesMut::new(), text: None, has_begun: false }
    }

    /// Takes in a piece of what the client sends.
    pub(crate) fn push(&mut self, piece: &[u8]) {
        self.pending.extend_from_slice(piece);
    }

    /// Bytes that it holds.
    pub(crate) fn bytes(&self) -> usize {
        self.pending.len() + self.frames.len()
    }

    /// Everything that has come and was not handed out.
    pub(crate) fn take_rest(&mut self) -> Bytes {
        let mut rest = std::mem::take(&mut self.frames);
        rest.extend_from_slice(&std::mem::take(&mut self.pending));
        (self.text, self.has_begun) = (None, false);
        rest.freeze()
    }

    /// The next message that is whole.
    pub(crate) fn next(&mut self) -> Result<Option<Message>, MessageError> {
        // By its first byte already, so that what is no frame is not waited for.
        if self.pending.first().is_some_and(|first| first & 0x70 != 0 || !matches!(first & 0x0f, 0..=2 | 8..=10)) {
            return Err(MessageError::Unframed);
        }
        while let Some(header) = FrameHeader::read(&self.pending) {
            let length = usize::try_from(header.length).unwrap_or(usize::MAX).saturating_add(header.bytes);
            if self.frames.len().saturating_add(length) > self.bytes_max {
                return Err(MessageError::TooLong);
            }
            let is_in_order = header.is_control() || header.continues() == self.has_begun;
            let Some(mask) = header.mask.filter(|_| is_in_order && !header.is_extended) else {
                return Err(MessageError::Unframed);
            };
            if self.pending.len() < length {
                return Ok(None);
            }
            let frame = self.pending.split_to(length);
            if header.is_control() {
                let is_close = header.opcode == CLOSE;
                return Ok(Some(Message { frames: frame.freeze(), text: None, mask, is_close }));
            }
            self.take(&header, &frame, mask);
            if header.is_final {
                self.has_begun = false;
                let (frames, text) = (std::mem::take(&mut self.frames).freeze(), self.text.take());
                return Ok(Some(Message { frames, text, mask, is_close: false }));
            }
        }
        Ok(None)
    }

    fn take(&mut self, header: &FrameHeader, frame: &[u8], mask: [u8; 4]) {
        if !self.has_begun {
            self.has_begun = true;
            self.text = Some(Vec::new());
        }
        if let Some(text) = &mut self.text {
            let content = part(frame, header.bytes..);
            text.extend(content.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        }
        self.frames.extend_from_slice(frame);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MASK: [u8; 4] = [1, 2, 3, 4];

    fn read(stream: &[u8], step: usize) -> Result<Vec<Message>, MessageError> {
        let (mut reader, mut messages) = (MessageReader::new(100_000), Vec::new());
        for piece in stream.chunks(step) {
            reader.push(piece);
            while let Some(message) = reader.next()? {
                messages.push(message);
            }
        }
        Ok(messages)
    }

    #[test]
    fn the_key_of_the_standard_is_accepted_as_it_says() {
        assert_eq!(accept(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn messages_are_read_in_pieces_of_any_size() {
        let long = "x".repeat(70_000);
        let parts = [
            text_frame(b"one", Some(MASK)),
            frame(FINAL | 2, b"sound", Some(MASK)),
            frame(TEXT, b"t", Some(MASK)),
            frame(FINAL | 9, b"ping", Some(MASK)),
            frame(0, b"w", Some([9; 4])),
            frame(FINAL, b"o", Some(MASK)),
            text_frame(b"", Some(MASK)),
            text_frame(long.as_bytes(), Some(MASK)),
            frame(FINAL | CLOSE, b"", Some(MASK)),
        ];
        let stream = parts.concat();
        for step in [1, 7, 200, stream.len()] {
            let messages = read(&stream, step).unwrap();
            let texts: Vec<_> =
                messages.iter().map(|one| one.text.as_deref().map(|text| str::from_utf8(text).unwrap())).collect();
            assert_eq!(texts, [Some("one"), Some("sound"), None, Some("two"), Some(""), Some(&long), None], "{step}");
            assert!(messages.last().unwrap().is_close());
            // The ping stood between the frames of another message, and every byte goes on.
            assert_eq!(messages.iter().map(|one| one.frames.len()).sum::<usize>(), stream.len());
        }
    }

    #[test]
    fn a_part_of_a_message_is_replaced() {
        let messages = read(&text_frame(br#"{"model":"a"}"#, Some(MASK)), 3).unwrap();
        let changed = read(&messages[0].with(9..12, b"\"other\""), 100).unwrap();
        assert_eq!(changed[0].text.as_deref(), Some(&br#"{"model":"other"}"#[..]));
    }

    #[test]
    fn what_is_not_a_clients_message_is_refused() {
        assert_eq!(read(&text_frame(b"not masked", None), 100), Err(MessageError::Unframed));
        assert_eq!(read(&frame(FINAL, b"continues nothing", Some(MASK)), 100), Err(MessageError::Unframed));
        assert_eq!(read(&text_frame("x".repeat(100_000).as_bytes(), Some(MASK)), 1000), Err(MessageError::TooLong));
        assert_eq!(read(&frame(FINAL | 0x40 | TEXT, b"deflated", Some(MASK)), 100), Err(MessageError::Unframed));
        for first in [b"G", b"0", &[3]] {
            assert_eq!(read(first, 1), Err(MessageError::Unframed), "a byte is enough");
        }
        let endless = [0x81, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4];
        assert_eq!(read(&endless, 100), Err(MessageError::TooLong));
    }

    proptest! {
        #[test]
        fn whatever_comes_it_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), step in 1_usize..50) {
            drop(read(&bytes, step));
        }

        #[test]
        fn every_text_comes_back(text in prop::collection::vec(any::<u8>(), 0..70_000), mask in any::<[u8; 4]>()) {
            let messages = read(&text_frame(&text, Some(mask)), 4096).unwrap();
            prop_assert_eq!(messages[0].text.as_ref(), Some(&text));
        }
    }
}
