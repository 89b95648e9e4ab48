//! Searches JSON without parsing it, for code that looks at every event of a stream. Assumes valid JSON. On anything
//! else the result is unspecified, but it does not panic.

use std::borrow::Cow;
use std::fmt;

use memchr::memmem::Finder;
use serde::de::Visitor;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::part;

/// Reads a member so that null is `Some`, as opposed to an absent member.
pub(crate) fn even_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// A key, borrowed from the JSON unless it contains escapes.
#[derive(Debug)]
pub(crate) struct Key<'a>(pub Cow<'a, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl<'de> Visitor<'de> for KeyVisitor {
            type Value = Key<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_borrowed_str<E>(self, key: &'de str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Borrowed(key)))
            }

            fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Owned(key.to_owned())))
            }
        }
        deserializer.deserialize_str(KeyVisitor)
    }
}

/// True if the JSON has this key (given with its quotation marks), at any depth, with a value that begins with `value`.
pub(crate) fn has_member(data: &[u8], key: &Finder<'_>, value: &[u8]) -> bool {
    key.find_iter(data).any(|at| {
        let after = part(data, at + key.needle().len()..).trim_ascii_start();
        after.strip_prefix(b":").is_some_and(|rest| rest.trim_ascii_start().starts_with(value))
    })
}

/// Returns the members with string values, at any depth: key and value without their quotation marks.
pub(crate) fn strings(json: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let mut rest = json;
    std::iter::from_fn(move || {
        loop {
            let (key, after) = string(rest)?;
            rest = after;
            let Some(value) = after.trim_ascii_start().strip_prefix(b":") else { continue };
            if let Some((value, after)) = text(value.trim_ascii_start()) {
                rest = after;
                return Some((key, value));
            }
        }
    })
}

/// Returns the string that these bytes begin with, and the bytes after it.
fn text(json: &[u8]) -> Option<(&[u8], &[u8])> {
    if json.first() == Some(&b'"') { string(json) } else { None }
}

/// Returns the first string, and the bytes after it.
fn string(json: &[u8]) -> Option<(&[u8], &[u8])> {
    let text = json.get(memchr::memchr(b'"', json)? + 1..)?;
    let mut at = 0;
    loop {
        let found = at + memchr::memchr2(b'"', b'\\', text.get(at..)?)?;
        if text.get(found) == Some(&b'"') {
            return Some((text.get(..found)?, text.get(found + 1..)?));
        }
        at = found + 2;
    }
}

/// True if the bytes after a value end the JSON that contains it: only members with string values come before the last
/// bracket. The value is then a member of the outermost object, whose bracket that is.
pub(crate) fn ends_outermost(after: &[u8]) -> bool {
    let mut rest = after.trim_ascii();
    while rest != b"}" {
        let member = || {
            let (_, after) = text(rest.strip_prefix(b",")?.trim_ascii_start())?;
            let (_, after) = text(after.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start())?;
            Some(after.trim_ascii_start())
        };
        match member() {
            Some(after) => rest = after,
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn members_with_texts_are_found_at_any_depth() {
        let json = br#"{"a":"b","c":[{"d" : "e\"f"},"g"],"h":7,"i":{"j":""}}"#;
        let found: Vec<_> = strings(json).collect();
        assert_eq!(found, [(&b"a"[..], &b"b"[..]), (b"d", br#"e\"f"#), (b"j", b"")]);
        assert!(has_member(json, &Finder::new(b"\"h\""), b"7"));
        assert!(!has_member(json, &Finder::new(b"\"h\""), b"8"));
    }

    #[test]
    fn the_end_of_the_outermost_object_is_told() {
        for after in ["}", " } ", r#","a":"b"}"#, r#" , "a" : "b\"}" , "c":""}"#] {
            assert!(ends_outermost(after.as_bytes()), "{after}");
        }
        for after in ["", "}}", "]}", r#","a":1}"#, r#","a":"b""#, r#","a":{}}"#, r#","a":"b"}]}"#, r#"},"a":"b"}"#] {
            assert!(!ends_outermost(after.as_bytes()), "{after}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes in prop::collection::vec(prop::sample::select(b"{}[]:,\"\\ua ".to_vec()), 0..60)) {
            strings(&bytes).for_each(drop);
            ends_outermost(&bytes);
            has_member(&bytes, &Finder::new(b"\"a\""), b"\"");
        }
    }
}
