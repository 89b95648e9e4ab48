//! Walks through the members of a JSON object, many times faster than a parser that reads byte by byte: it skips long
//! texts, as in prompts and pictures, with vector instructions. Everything that it accepts is valid JSON; whatever it
//! is unsure of is left to a parser.

use std::ops::Range;

use super::part;

/// Depth limit, the same as `serde_json`'s.
const DEPTH_MAX: usize = 127;

/// The range of a member's value, of the object that stands at this place of a text.
pub(crate) fn member(text: &[u8], object: Range<usize>, wanted: &str) -> Option<Range<usize>> {
    let mut found = None;
    members(part(text, object.clone()), |key, range| {
        if key == wanted.as_bytes() {
            found = Some(object.start + range.start..object.start + range.end);
        }
    })?;
    found
}

/// Calls `each` with every key of the outermost object, without its quotation marks, and the range of its value.
/// Returns `None` if this is not a valid JSON object, or if a key has escapes. `each` may have been called before that
/// is known.
pub(crate) fn members<'a>(json: &'a [u8], mut each: impl FnMut(&'a [u8], Range<usize>)) -> Option<()> {
    simdutf8::basic::from_utf8(json).ok()?;
    let mut walk = Walk { json, at: 0 };
    walk.blanks();
    walk.byte(b'{')?;
    walk.blanks();
    if walk.peek()? != b'}' {
        loop {
            walk.byte(b'"')?;
            let key = walk.at;
            let has_escapes = walk.string()?;
            let key = json.get(key..walk.at - 1).filter(|_| !has_escapes)?;
            walk.blanks();
            walk.byte(b':')?;
            walk.blanks();
            let start = walk.at;
            walk.value(1)?;
            each(key, start..walk.at);
            walk.blanks();
            if walk.peek()? == b'}' {
                break;
            }
            walk.byte(b',')?;
            walk.blanks();
        }
    }
    walk.byte(b'}')?;
    walk.blanks();
    (walk.at == json.len()).then_some(())
}

struct Walk<'a> {
    json: &'a [u8],
    at: usize,
}

impl Walk<'_> {
    fn peek(&self) -> Option<u8> {
        self.json.get(self.at).copied()
    }

    fn byte(&mut self, byte: u8) -> Option<()> {
        (self.peek()? == byte).then(|| self.at += 1)
    }

    fn blanks(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.peek() {
            self.at += 1;
        }
    }

    fn word(&mut self, word: &[u8]) -> Option<()> {
        self.json.get(self.at..)?.starts_with(word).then(|| self.at += word.len())
    }

    fn value(&mut self, depth: usize) -> Option<()> {
        match self.peek()? {
            b'"' => {
                self.at += 1;
                self.string().map(drop)
            }
            b'{' => self.list(b'}', depth + 1, |walk| {
                walk.byte(b'"')?;
                walk.string()?;
                walk.blanks();
                walk.byte(b':')?;
                walk.blanks();
                walk.value(depth + 1)
            }),
            b'[' => self.list(b']', depth + 1, |walk| walk.value(depth + 1)),
            b't' => self.word(b"true"),
            b'f' => self.word(b"false"),
            b'n' => self.word(b"null"),
            _ => self.number(),
        }
    }

    fn list(&mut self, end: u8, depth: usize, mut item: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        if depth > DEPTH_MAX {
            return None;
        }
        self.at += 1;
        self.blanks();
        if self.peek()? == end {
            self.at += 1;
            return Some(());
        }
        loop {
            item(self)?;
            self.blanks();
            if self.peek()? == end {
                self.at += 1;
                return Some(());
            }
            self.byte(b',')?;
            self.blanks();
        }
    }

    /// Reads the rest of a string with its closing quotation mark. Returns true if it has escapes.
    fn string(&mut self) -> Option<bool> {
        let mut has_escapes = false;
        loop {
            let rest = self.json.get(self.at..)?;
            let found = memchr::memchr2(b'"', b'\\', rest)?;
            // Control characters are not allowed. The minimum is computed from many bytes at a time.
            if rest.get(..found)?.iter().fold(u8::MAX, |least, byte| least.min(*byte)) < b' ' {
                return None;
            }
            self.at += found + 1;
            if rest.get(found) == Some(&b'"') {
                return Some(has_escapes);
            }
            has_escapes = true;
            match self.peek()? {
                b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => self.at += 1,
                b'u' => {
                    let digits = self.json.get(self.at + 1..self.at + 5)?;
                    digits.iter().all(u8::is_ascii_hexdigit).then_some(())?;
                    self.at += 5;
                }
                _ => return None,
            }
        }
    }

    fn number(&mut self) -> Option<()> {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1;
        } else {
            self.digits()?;
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digits()?;
        }
        Some(())
    }

    fn digits(&mut self) -> Option<()> {
        let begins = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        (self.at > begins).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    fn walked(json: &[u8]) -> Option<Vec<(String, String)>> {
        let mut found = Vec::new();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        members(json, |key, range| found.push((text(key), text(&json[range])))).map(|()| found)
    }

    #[test]
    fn members_are_told_as_they_stand() {
        let json = br#" { "a" : "x\"y" , "b":[1,{"a":-0.5e+3},[]], "":{} ,"c":null} "#;
        let found = walked(json).unwrap();
        let expected = [("a", r#""x\"y""#), ("b", r#"[1,{"a":-0.5e+3},[]]"#), ("", "{}"), ("c", "null")];
        assert_eq!(found, expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
        assert_eq!(walked(b"{}"), Some(Vec::new()));
    }

    #[test]
    fn what_is_no_json_is_not_accepted() {
        for json in [
            "",
            "{",
            "[]",
            "1",
            "{}x",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{\"a\":01}",
            "{\"a\":1.}",
            "{\"a\":.5}",
            "{\"a\":1e}",
            "{\"a\":-}",
            "{\"a\":tru}",
            "{\"a\":[1,]}",
            "{\"a\":[1}",
            "{\"a\":\"\n\"}",
            "{\"a\":\"\\x\"}",
            "{\"a\":\"\\u12g4\"}",
            "{\"a\":\"\\u12",
            "{\"a\":\"",
            "{a:1}",
            "{\"a\":1 \"b\":2}",
            "{\"\\u0061\":1}",
        ] {
            assert_eq!(walked(json.as_bytes()), None, "{json}");
        }
        assert_eq!(walked(b"{\"a\":\"\xff\"}"), None);
        let deep = |depth: usize| format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
        assert!(walked(deep(DEPTH_MAX - 1).as_bytes()).is_some());
        assert!(walked(deep(DEPTH_MAX).as_bytes()).is_none());
        assert!(serde_json::from_str::<Value>(&deep(DEPTH_MAX - 1)).is_ok());
    }

    proptest! {
        #[test]
        fn it_accepts_what_a_parser_does(
            bytes in prop::collection::vec(prop::sample::select(b"{}[]:,\"\\ua10.-e n".to_vec()), 0..40),
        ) {
            let json = [&b"{\"a\":"[..], &bytes, b"}"].concat();
            let walked = walked(&json);
            let parsed = serde_json::from_slice::<serde::de::IgnoredAny>(&json);
            if walked.is_some() {
                prop_assert!(parsed.is_ok(), "{}", String::from_utf8_lossy(&json));
            }
        }

        #[test]
        fn it_accepts_all_that_is_written_by_one(
            members in prop::collection::hash_map("[a-zé ]{0,5}", ".{0,20}|[0-9]{1,5}", 0..6), nested in any::<bool>()
        ) {
            let object: serde_json::Map<String, Value> = members
                .into_iter()
                .map(|(key, text)| (key, if nested { serde_json::json!([{ "x": text }, 1.5e-7, -3, true]) } else { text.into() }))
                .collect();
            let json = serde_json::to_string(&object).unwrap();
            let walked = walked(json.as_bytes()).expect("it is valid");
            prop_assert_eq!(walked.len(), object.len());
            for (key, value) in walked {
                prop_assert_eq!(&serde_json::from_str::<Value>(&value).unwrap(), &object[&key]);
            }
        }
    }
}
