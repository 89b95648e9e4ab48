//! A request's body, collected from its chunks within bounds of size and time.

use std::time::Duration;

use bytes::{Bytes, BytesMut};

use crate::fault::Fault;

/// Longest pause between two pieces of a body; a client that pauses longer is gone or stalls on purpose.
pub(crate) const BODY_IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time for a whole body, however steadily it arrives.
pub(crate) const BODY_TOTAL_TIMEOUT: Duration = Duration::from_mins(10);

/// Collects a body from its chunks, up to a limit. A body of one chunk is kept as it came, without a copy.
#[derive(Debug)]
pub(crate) struct Collector {
    bytes_max: usize,
    declared: usize,
    first: Bytes,
    joined: BytesMut,
}

impl Collector {
    /// A collector for a body of `declared` bytes, if the client said how many, and at most `bytes_max`.
    pub(crate) fn new(declared: Option<u64>, bytes_max: usize) -> Result<Self, Fault> {
        let declared = match declared.map(usize::try_from) {
            None => 0,
            Some(Ok(length)) if length <= bytes_max => length,
            Some(_) => return Err(Fault::BodyTooLarge { bytes_max }),
        };
        Ok(Self { bytes_max, declared, first: Bytes::new(), joined: BytesMut::new() })
    }

    /// Returns the length of the body so far.
    pub(crate) fn bytes(&self) -> usize {
        self.first.len() + self.joined.len()
    }

    /// The length that its client has said it has, or none.
    pub(crate) fn declared(&self) -> usize {
        self.declared
    }

    /// Takes the next chunk.
    pub(crate) fn push(&mut self, chunk: Bytes) -> Result<(), Fault> {
        let length = self.bytes() + chunk.len();
        if length > self.bytes_max {
            return Err(Fault::BodyTooLarge { bytes_max: self.bytes_max });
        }
        if self.first.is_empty() && self.joined.is_empty() {
            self.first = chunk;
            return Ok(());
        }
        if self.joined.is_empty() {
            // There is room for all of it, and what is not written to takes none up.
            self.joined.reserve(self.declared.max(length));
            self.joined.extend_from_slice(&std::mem::take(&mut self.first));
        }
        self.joined.extend_from_slice(&chunk);
        Ok(())
    }

    /// The whole body.
    pub(crate) fn finish(self) -> Bytes {
        if self.joined.is_empty() { self.first } else { self.joined.freeze() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_collected_up_to_its_limit() {
        let mut one = Collector::new(Some(3), 10).unwrap();
        let chunk = Bytes::from_static(b"abc");
        one.push(chunk.clone()).unwrap();
        assert_eq!(one.finish().as_ptr(), chunk.as_ptr(), "one chunk is not copied");

        let mut several = Collector::new(None, 10).unwrap();
        several.push(Bytes::from_static(b"12345")).unwrap();
        several.push(Bytes::from_static(b"67890")).unwrap();
        assert_eq!(several.push(Bytes::from_static(b"x")), Err(Fault::BodyTooLarge { bytes_max: 10 }));
        assert_eq!(&several.finish()[..], b"1234567890");

        assert_eq!(Collector::new(Some(11), 10).err(), Some(Fault::BodyTooLarge { bytes_max: 10 }));
    }
}
