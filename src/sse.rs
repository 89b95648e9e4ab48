//! An incremental splitter for server-sent events (WHATWG HTML, 9.2.6).
//!
//! Right for any chunking, for `\n`, `\r\n` and `\r`, comments, several `data:` lines and a byte-order mark. Memory is
//! bounded: the data of an event longer than [`EVENT_BYTES_MAX`] is given up, and the event is told as [`Event::TooLong`].

/// The longest data of one event that is kept: far more than an event of a chat stream, and little to hold.
pub const EVENT_BYTES_MAX: usize = 64 * 1024;

/// What an event carried.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Its `data:` lines, joined by line feeds.
    Data(&'a [u8]),
    /// More than is kept.
    TooLong,
}

/// The state between two chunks.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "they are independent: any combination can occur")]
pub struct Splitter {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    too_long: bool,
    after_cr: bool,
    begun: bool,
}

impl Splitter {
    /// Takes the next bytes and tells `each` every event that they complete.
    pub fn feed(&mut self, mut chunk: &[u8], mut each: impl FnMut(Event<'_>)) {
        while !chunk.is_empty() {
            if std::mem::take(&mut self.after_cr) && chunk.first() == Some(&b'\n') {
                chunk = chunk.get(1..).unwrap_or_default();
                continue;
            }
            let Some(end) = memchr::memchr2(b'\n', b'\r', chunk) else {
                self.keep(chunk);
                return;
            };
            let (line, rest) = chunk.split_at(end);
            self.after_cr = rest.first() == Some(&b'\r');
            self.keep(line);
            self.end_line(&mut each);
            chunk = rest.get(1..).unwrap_or_default();
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        // Room for the field's name beside the longest data.
        let room = (EVENT_BYTES_MAX + 16).saturating_sub(self.line.len());
        match bytes.get(..room) {
            Some(fits) if bytes.len() > room => {
                self.too_long = true;
                self.line.extend_from_slice(fits);
            }
            _ => self.line.extend_from_slice(bytes),
        }
    }

    fn end_line(&mut self, each: &mut impl FnMut(Event<'_>)) {
        let mut line = std::mem::take(&mut self.line);
        let mut content = line.as_slice();
        if !std::mem::replace(&mut self.begun, true) {
            content = content.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(content);
        }
        if content.is_empty() {
            self.end_event(each);
        } else if let Some(value) = data_value(content) {
            self.add_data(value);
        }
        line.clear();
        self.line = line;
    }

    fn add_data(&mut self, value: &[u8]) {
        if self.data.len() + value.len() >= EVENT_BYTES_MAX {
            self.too_long = true;
            self.has_data = true;
            return;
        }
        if self.has_data {
            self.data.push(b'\n');
        }
        self.has_data = true;
        self.data.extend_from_slice(value);
    }

    fn end_event(&mut self, each: &mut impl FnMut(Event<'_>)) {
        if std::mem::take(&mut self.too_long) {
            each(Event::TooLong);
        } else if self.has_data {
            each(Event::Data(&self.data));
        }
        self.has_data = false;
        self.data.clear();
    }
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
            splitter.feed(chunk, |event| {
                events.push(match event {
                    Event::Data(data) => Some(String::from_utf8_lossy(data).into_owned()),
                    Event::TooLong => None,
                });
            });
        }
        events
    }

    fn data(texts: &[&str]) -> Vec<Option<String>> {
        texts.iter().map(|text| Some((*text).to_owned())).collect()
    }

    #[test]
    fn fields_comments_and_line_ends() {
        let stream = b"\xEF\xBB\xBFdata: one\n\n: ping\n\nevent: x\r\ndata:two\r\ndata\r\ndata:  three\r\n\r\ndatum: no\r\rdata: [DONE]\r\r";
        assert_eq!(events(&[stream]), data(&["one", "two\n\n three", "[DONE]"]));
    }

    #[test]
    fn an_unfinished_event_is_none() {
        assert_eq!(events(&[b"data: a\n"]), data(&[]));
    }

    #[test]
    fn too_long_events_are_told_and_forgotten() {
        let long = format!("data: {}\n\ndata: next\n\n", "x".repeat(3 * EVENT_BYTES_MAX));
        assert_eq!(events(&[long.as_bytes()]), [None, Some("next".to_owned())]);
        let lines = format!("{}\ndata: next\n\n", "data: 0123456789\n".repeat(EVENT_BYTES_MAX / 8));
        assert_eq!(events(&[lines.as_bytes()]), [None, Some("next".to_owned())]);
    }

    proptest! {
        #[test]
        fn every_way_of_cutting_gives_the_same_events(
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
        }
    }
}
