//! Readers of JSON text that build no tree, and the purpose of each.
//!
//! | reader | reads | assumes | for |
//! |---|---|---|---|
//! | [`members`] | a whole object, long texts with vector instructions | nothing; what it accepts is valid | request bodies: where `model`, `stream` and `stream_options` stand |
//! | `request::fields::parse` | the same, by `serde` | nothing; reports what is wrong and where | request bodies that [`members`] leaves to a parser |
//! | [`scan`] | parts of a text, by searching it | valid JSON | each event of a stream: whether it mentions a usage, and its texts |
//! | [`usage::reported`](crate::usage::Reported) | a whole object, by `serde`; plain numbers by hand | nothing; odd values count as absent | events and answers that mention a usage |
//! | [`usage::Finder`](crate::usage::Finder) | JSON of any length, in pieces, without keeping it | nothing; never fails | long answers, and events too long to keep |
//! | [`response::event_template`](crate::response::event_template) | an event that differs from the last one only in its texts | an equal event was read before | most events of a stream |
//! | `serde_json::Value` | a whole text, as a tree | nothing | texts read once a request at most: a stream's first events, error bodies, estimates |

pub(crate) mod members;
pub(crate) mod scan;

use std::slice::SliceIndex;

/// Returns the part of `bytes` at `range`, which must lie within them. A range outside is a bug of the caller: debug
/// builds, and so the tests, panic; release builds return an empty part, so that no request panics.
pub(crate) fn part<I: SliceIndex<[u8], Output = [u8]>>(bytes: &[u8], range: I) -> &[u8] {
    let part = bytes.get(range);
    debug_assert!(part.is_some(), "a part that does not lie within {} bytes", bytes.len());
    part.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_lies_within() {
        assert_eq!(part(b"abc", 1..), b"bc");
        assert_eq!(part(b"abc", 3..), b"");
    }

    #[test]
    #[should_panic(expected = "does not lie within 3 bytes")]
    fn a_wrong_offset_is_found_by_tests() {
        part(b"abc", 2..4);
    }
}
