//! Keys that must never be printed, logged or written back.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer};
use subtle::ConstantTimeEq;

/// A secret shorter than this shows none of its characters.
const SHOWN_CHARS_MIN: usize = 16;
/// What is shorter is no key.
const KEY_CHARS_MIN: usize = 11;
const SHOWN_AT_START: usize = 3;
const SHOWN_AT_END: usize = 4;

/// A key. It is read from a file but cannot be written to one, and it prints as a mask.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// Wraps a key.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The key itself. The only way out, so that every use can be found by name.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Compares a key in constant time: the time taken shows nothing but the length.
    pub fn matches(&self, given: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(given).into()
    }
}

/// Covers what looks like a key in a text that is shown: it may have been put into the wrong place.
pub(crate) fn without_keys(text: &str) -> String {
    /// How keys of well-known vendors begin.
    const BEGINNINGS: [&str; 9] = ["sk-", "sk_", "gsk_", "xai-", "AIza", "nvapi-", "hf_", "pplx-", "ghp_"];
    let is_of_key = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let mut shown = String::new();
    for piece in text.split_inclusive(|c| !is_of_key(c)) {
        let word = piece.trim_end_matches(|c| !is_of_key(c));
        if word.len() >= KEY_CHARS_MIN && BEGINNINGS.iter().any(|begin| word.starts_with(begin)) {
            shown.push_str(&Secret::new(word).to_string());
            shown.push_str(piece.strip_prefix(word).unwrap_or_default());
        } else {
            shown.push_str(piece);
        }
    }
    shown
}

/// A start and an end let an operator distinguish two keys; seven characters are not enough to use one.
impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let length = self.0.chars().count();
        if length < SHOWN_CHARS_MIN {
            return f.write_str("****");
        }
        let start: String = self.0.chars().take(SHOWN_AT_START).collect();
        let end: String = self.0.chars().skip(length - SHOWN_AT_END).collect();
        write!(f, "{start}…{end}")
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({self})")
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.matches(other.0.as_bytes())
    }
}

impl Eq for Secret {}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

/// `writeOnly` is JSON Schema's own word for "never shown"; the config checker goes by it too.
impl JsonSchema for Secret {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Secret".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "writeOnly": true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_key_in_the_wrong_place_is_covered() {
        for (text, shown) in [
            (r#"found the string "sk-aaaaaaaaaaaabbbb""#, r#"found the string "sk-…bbbb""#),
            ("sk-7d1f93a8c05 is not an IP address", "**** is not an IP address"),
            ("apis[0].gsk_0123456789abcdef: unknown key", "apis[0].gsk…cdef: unknown key"),
            ("the example's `sk-123`, a task-oriented-words", "the example's `sk-123`, a task-oriented-words"),
            ("密钥：sk-aaaaaaaaaaaabbbb。", "密钥：sk-…bbbb。"),
        ] {
            assert_eq!(without_keys(text), shown);
        }
    }

    #[test]
    fn a_long_secret_shows_its_start_and_end() {
        let secret = Secret::new("sk-abcdefghijklmnop");
        assert_eq!(secret.to_string(), "sk-…mnop");
        assert_eq!(format!("{secret:?}"), "Secret(sk-…mnop)");
    }

    #[test]
    fn a_short_secret_shows_nothing() {
        assert_eq!(Secret::new("sk-123").to_string(), "****");
        assert_eq!(Secret::new("123456789012345").to_string(), "****");
        assert_eq!(Secret::new("1234567890123456").to_string(), "123…3456");
        assert_eq!(Secret::new("").to_string(), "****");
    }

    #[test]
    fn matching_takes_the_whole_key() {
        let secret = Secret::new("sk-123");
        assert!(secret.matches(b"sk-123"));
        for wrong in [&b"sk-12"[..], b"sk-124", b"sk-1234", b"", b"SK-123"] {
            assert!(!secret.matches(wrong), "{wrong:?}");
        }
        assert_ne!(secret, Secret::new("sk-1234"));
        assert_eq!(secret, Secret::new("sk-123"));
    }

    #[test]
    fn it_is_read_as_plain_text() {
        let secret: Secret = serde_json::from_str("\"sk-\\u00e9\"").unwrap();
        assert_eq!(secret.expose(), "sk-é");
    }

    proptest! {
        #[test]
        fn a_mask_never_shows_more_than_seven_characters(text in "\\PC{0,80}") {
            let mask = Secret::new(text.clone()).to_string();
            if mask != "****" {
                prop_assert!(mask.chars().count() <= SHOWN_AT_START + SHOWN_AT_END + 1);
                prop_assert!(text.chars().count() >= SHOWN_CHARS_MIN);
            }
        }
    }
}
