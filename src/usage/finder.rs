//! Finder: finds the tokens that JSON of any length reports, however it is cut into pieces, without keeping it.

use super::{Usage, reported};
use crate::json::part;

/// Longest value of a `usage`, in bytes. A usage has some hundred bytes; a longer value is ignored.
const VALUE_BYTES_MAX: usize = 16 * 1024;
/// Length in bytes that no key that matters here reaches.
const KEY_BYTES_MAX: usize = 16;

/// A key that matters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum UsageKey {
    /// Any other key.
    #[default]
    Other,
    /// The key `usage`.
    Usage,
    /// The key `timings`, which replaces a missing usage.
    Timings,
    /// A key that may hold a usage: `response`, `message`, `x_groq`.
    Holder,
}

impl UsageKey {
    fn from_name(name: &[u8]) -> Self {
        match name {
            b"usage" => Self::Usage,
            b"timings" => Self::Timings,
            b"response" | b"message" | b"x_groq" => Self::Holder,
            _ => Self::Other,
        }
    }
}

/// State between two pieces. It cannot fail, and its size is bounded, whatever the bytes are.
#[derive(Debug, Default)]
pub struct Finder {
    depth: u32,
    /// The key whose value is being read, at the first depth and at the second.
    keys: [UsageKey; 2],
    in_string: bool,
    escaped: bool,
    /// Beginning of the last string.
    string: Vec<u8>,
    capture: Option<Capture>,
    usage: Option<Usage>,
    timings: Option<Usage>,
}

/// A value that is being copied.
#[derive(Debug)]
struct Capture {
    key: UsageKey,
    /// Depth at which the value ends.
    depth: u32,
    bytes: Vec<u8>,
}

impl Finder {
    /// Reads the next piece.
    pub fn feed(&mut self, mut piece: &[u8]) {
        while !piece.is_empty() {
            let used = if self.in_string { self.string(piece) } else { self.structure(piece) };
            piece = part(piece, used..);
        }
    }

    /// True if all brackets and strings that were opened are closed.
    pub fn is_whole(&self) -> bool {
        self.depth == 0 && !self.in_string
    }

    /// Returns the usage found so far.
    pub fn usage(&self) -> Option<Usage> {
        self.usage.or(self.timings)
    }

    /// Reads the inside of a string up to its next escape or its end. Returns the number of bytes read.
    fn string(&mut self, bytes: &[u8]) -> usize {
        if std::mem::take(&mut self.escaped) {
            self.keep(part(bytes, ..1));
            return 1;
        }
        let Some(found) = memchr::memchr2(b'"', b'\\', bytes) else {
            self.keep(bytes);
            return bytes.len();
        };
        let is_end = bytes.get(found) == Some(&b'"');
        self.in_string = !is_end;
        self.escaped = !is_end;
        // A copied value includes its quotation mark, a key does not.
        let end = if is_end && self.capture.is_none() { found } else { found + 1 };
        self.keep(part(bytes, ..end));
        found + 1
    }

    /// Reads bytes outside of strings: one byte, or more at a depth where nothing matters. Returns the number of bytes
    /// read.
    fn structure(&mut self, bytes: &[u8]) -> usize {
        if self.depth > 3 && self.capture.is_none() {
            // Deep inside, as in an embedding's numbers, only the depth matters.
            let end = memchr::memchr3(b'"', b'}', b']', bytes).unwrap_or(bytes.len());
            let opened = memchr::memchr2_iter(b'{', b'[', part(bytes, ..end)).count();
            self.depth = self.depth.saturating_add(u32::try_from(opened).unwrap_or(u32::MAX));
            if end > 0 {
                return end;
            }
        }
        let Some(byte) = bytes.first() else { return 0 };
        match byte {
            b',' | b'}' if self.capture.as_ref().is_some_and(|capture| capture.depth == self.depth) => {
                self.end_capture();
            }
            _ => self.keep_structure(*byte),
        }
        match byte {
            b'"' => {
                self.in_string = true;
                if self.capture.is_none() {
                    self.string.clear();
                }
            }
            b'{' | b'[' => {
                self.depth = self.depth.saturating_add(1);
                self.set_key(UsageKey::Other);
            }
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
            }
            b',' => self.set_key(UsageKey::Other),
            b':' => self.key_ended(),
            _ => {}
        }
        1
    }

    fn key_ended(&mut self) {
        let key = UsageKey::from_name(&self.string);
        self.string.clear();
        let counts = match (self.depth, key) {
            (1, UsageKey::Usage | UsageKey::Timings) => true,
            (2, UsageKey::Usage) => self.keys.first() == Some(&UsageKey::Holder),
            _ => false,
        };
        self.set_key(key);
        if counts && self.capture.is_none() {
            self.capture = Some(Capture { key, depth: self.depth, bytes: Vec::new() });
        }
    }

    fn set_key(&mut self, key: UsageKey) {
        let slot = usize::try_from(self.depth).unwrap_or(usize::MAX).wrapping_sub(1);
        if let Some(slot) = self.keys.get_mut(slot) {
            *slot = key;
        }
    }

    fn keep_structure(&mut self, byte: u8) {
        if self.capture.is_some() {
            self.keep(&[byte]);
        }
    }

    /// Keeps bytes of the value being copied, or of a string that may be a key.
    fn keep(&mut self, bytes: &[u8]) {
        match &mut self.capture {
            Some(capture) if capture.bytes.len() + bytes.len() > VALUE_BYTES_MAX => {
                // The value is too long to be a usage, so it is not parsed.
                capture.key = UsageKey::Other;
                capture.bytes.clear();
            }
            Some(capture) => capture.bytes.extend_from_slice(bytes),
            None => {
                let room = (KEY_BYTES_MAX + 1).saturating_sub(self.string.len());
                self.string.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
            }
        }
    }

    fn end_capture(&mut self) {
        let Some(Capture { key, bytes, .. }) = self.capture.take() else { return };
        match key {
            UsageKey::Usage => self.usage = reported::usage(&bytes).or(self.usage),
            UsageKey::Timings => self.timings = reported::timings(&bytes).or(self.timings),
            UsageKey::Other | UsageKey::Holder => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::Reported;
    use proptest::prelude::*;
    use serde_json::Value;

    fn find(json: &[u8], piece_bytes: usize) -> Option<Usage> {
        let mut finder = Finder::default();
        json.chunks(piece_bytes).for_each(|piece| finder.feed(piece));
        finder.usage()
    }

    #[test]
    fn only_the_answers_own_usage_is_found() {
        let usage = r#"{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}"#;
        let expected = Reported::from_json(format!(r#"{{"usage":{usage}}}"#).as_bytes()).map(|reported| reported.usage);
        assert!(expected.is_some());
        let other = r#"{"prompt_tokens":9,"completion_tokens":9,"total_tokens":99}"#;
        for (json, is_found) in [
            (format!(r#"{{"usage":{usage}}}"#), true),
            (format!(r#"{{"id":"\"usage\":{{}}","usage" : {usage} , "x":[]}}"#), true),
            (format!(r#"{{"response":{{"a":[1,{{"usage":{other}}}],"usage":{usage}}}}}"#), true),
            (format!(r#"{{"message":{{"usage":{usage}}},"type":"message_start"}}"#), true),
            (format!(r#"{{"data":[[[[{{"usage":{other}}},"]"]]]],"usage":{usage}}}"#), true),
            (format!(r#"{{"data":[[[[[1,2],[3,{{"a":"}}"}}]]]]],"usage":{usage}}}"#), true),
            (format!(r#"{{"x":{{"usage":{other}}}}}"#), false),
            (format!(r#"{{"data":[{{"usage":{other}}}]}}"#), false),
            (format!(r#"{{"a":"usage","b":{other}}}"#), false),
            (format!(r#"["usage",{other}]"#), false),
            (r#"{"usage":null}"#.to_owned(), false),
            (format!(r#"{{"usage":{{"x":"{}"}}}}"#, "y".repeat(2 * VALUE_BYTES_MAX)), false),
        ] {
            for piece_bytes in [1, 2, 7, 10_000_000] {
                let found = find(json.as_bytes(), piece_bytes);
                assert_eq!(found, expected.filter(|_| is_found), "{json} in pieces of {piece_bytes}");
            }
        }
    }

    #[test]
    fn timings_stand_in_for_a_usage() {
        let json = br#"{"content":"x","timings":{"prompt_n":5,"predicted_n":7}}"#;
        let tokens = find(json, 3).unwrap().tokens();
        assert_eq!((tokens.prompt, tokens.completion, tokens.total), (5, 7, 12));
        let json = br#"{"usage":{"prompt_tokens":1,"completion_tokens":1},"timings":{"prompt_n":5,"predicted_n":7}}"#;
        assert_eq!(find(json, 3).unwrap().tokens().total, 2);
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<i32>().prop_map(Value::from),
            prop::sample::select(vec!["usage", "\"", "\\", "a:b", "{", "é", "]}"]).prop_map(Value::from),
            Just(serde_json::json!({ "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7 })),
        ];
        leaf.prop_recursive(6, 40, 5, |inner| {
            let key = prop::sample::select(vec!["usage", "response", "message", "choices", "x\"y", "z"]);
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::hash_map(key, inner, 0..5)
                    .prop_map(|fields| fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn as_a_full_parse_finds_it(json in json(), piece_bytes in 1usize..20) {
            let text = json.to_string();
            let of = |holder: Option<&Value>| holder.and_then(|value| reported::usage(value.get("usage")?.to_string().as_bytes()));
            let own = of(Some(&json));
            // If several holders have a usage, the last one counts, which depends on the order of the keys. So only the
            // presence of a usage is compared.
            let held: Vec<_> = ["response", "message"].iter().filter_map(|key| of(json.get(key))).collect();
            let found = find(text.as_bytes(), piece_bytes);
            prop_assert_eq!(found.is_some(), own.is_some() || !held.is_empty(), "{}", text);
        }

        #[test]
        fn no_bytes_make_it_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..20)) {
            let mut finder = Finder::default();
            for piece in &pieces {
                finder.feed(piece);
            }
            finder.usage();
        }

        #[test]
        fn no_json_like_bytes_make_it_panic(
            bytes in prop::collection::vec(prop::sample::select(b"{}[]:,\"\\ua1 usage".to_vec()), 0..200)
        ) {
            for piece_bytes in [1, 3, 1000] {
                find(&bytes, piece_bytes);
            }
        }
    }
}
