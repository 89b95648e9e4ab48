//! Recognises an event of a stream that differs from an earlier one only in its texts, as nearly all do: the result of reading
//! that one holds for this one, too. Pure.

use std::ops::Range;

use memchr::memmem;

/// Places of one event that may differ.
const GAPS_MAX: usize = 4;
/// A longer event is not kept.
const BLOCK_BYTES_MAX: usize = 4096;
/// Differences beside the texts: padding, and a number.
const PADDING: &[u8] = b"\"obfuscation\":\"";
const NUMBER: &[u8] = b"\"sequence_number\":";

/// An event that was read, by what of it may differ in the next ones.
#[derive(Debug)]
pub(crate) struct EventTemplate {
    block: Box<[u8]>,
    /// In order, without overlap.
    gaps: Vec<Gap>,
    cut: Option<Cut>,
}

#[derive(Debug)]
struct Gap {
    range: Range<usize>,
    kind: GapKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GapKind {
    /// A string that is measured.
    Text,
    /// Any other string.
    Word,
    /// Digits.
    Number,
}

/// Part that is taken out of the event.
#[derive(Debug)]
struct Cut {
    range: Range<usize>,
    /// Number of gaps before it.
    after: usize,
}

/// An event that is like the one that was read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Like<'a> {
    texts: [&'a [u8]; GAPS_MAX],
    /// Part that is taken out of it.
    pub cut: Option<Range<usize>>,
}

impl<'a> Like<'a> {
    /// Returns its texts; those that it does not have are empty.
    pub(crate) fn texts(&self) -> impl Iterator<Item = &'a [u8]> {
        self.texts.into_iter()
    }
}

impl EventTemplate {
    /// Makes a template out of an event that was read: the places of its texts, without their quotation marks, and the
    /// part that was taken out. `None` if it is not a kind of event that can be recognised.
    pub(crate) fn new(
        block: &[u8],
        texts: impl Iterator<Item = Range<usize>>,
        cut: Option<Range<usize>>,
    ) -> Option<Self> {
        if block.len() > BLOCK_BYTES_MAX {
            return None;
        }
        let mut gaps: Vec<Gap> = texts.map(|range| Gap { range, kind: GapKind::Text }).collect();
        if let Some(at) = memmem::find(block, PADDING) {
            let start = at + PADDING.len();
            gaps.push(Gap { range: start..start + string(block.get(start..)?)?, kind: GapKind::Word });
        }
        if let Some(at) = memmem::find(block, NUMBER) {
            let start = at + NUMBER.len();
            gaps.push(Gap { range: start..start + digits(block.get(start..)?), kind: GapKind::Number });
        }
        gaps.sort_by_key(|gap| gap.range.start);
        let is_apart = gaps.is_sorted_by(|one, next| one.range.end <= next.range.start);
        let is_whole = |gap: &Gap| {
            gap.kind == GapKind::Number
                || block.get(gap.range.clone()).is_some_and(|text| memchr::memchr2(b'\n', b'\r', text).is_none())
                    && gap.range.start.checked_sub(1).and_then(|before| block.get(before)) == Some(&b'"')
                    && block.get(gap.range.end) == Some(&b'"')
        };
        if gaps.len() > GAPS_MAX || !is_apart || !gaps.iter().all(is_whole) {
            return None;
        }
        let cut = match cut {
            None => None,
            Some(range) => {
                let after = gaps.iter().take_while(|gap| gap.range.end <= range.start).count();
                // It lies between two gaps, or behind the last.
                if gaps.get(after).is_some_and(|next| next.range.start < range.end) {
                    return None;
                }
                Some(Cut { range, after })
            }
        };
        Some(Self { block: block.into(), gaps, cut })
    }

    /// Compares an event with the template, and returns the differences.
    pub(crate) fn matches<'a>(&self, block: &'a [u8]) -> Option<Like<'a>> {
        let mut like = Like { texts: [&[]; GAPS_MAX], cut: None };
        // Where the same bytes go on, in this block and in the one that is matched.
        let (mut own, mut at) = (0, 0);
        for (nth, gap) in self.gaps.iter().enumerate() {
            self.place_cut(nth, own, at, &mut like);
            let fixed = self.block.get(own..gap.range.start)?;
            let rest = block.get(at..)?.strip_prefix(fixed)?;
            let length = match gap.kind {
                GapKind::Number => digits(rest),
                GapKind::Text | GapKind::Word => string(rest)?,
            };
            let differs = rest.get(..length)?;
            // A line that ends within a text is no text's.
            if memchr::memchr2(b'\n', b'\r', differs).is_some() {
                return None;
            }
            if let (GapKind::Text, Some(text)) = (gap.kind, like.texts.get_mut(nth)) {
                *text = differs;
            }
            at += fixed.len() + length;
            own = gap.range.end;
        }
        self.place_cut(self.gaps.len(), own, at, &mut like);
        (block.get(at..)? == self.block.get(own..)?).then_some(like)
    }

    fn place_cut(&self, nth: usize, own: usize, at: usize, like: &mut Like<'_>) {
        if let Some(Cut { range, after }) = &self.cut
            && *after == nth
        {
            like.cut = Some(range.start - own + at..range.end - own + at);
        }
    }
}

/// Returns the length of the rest of the string, up to its quotation mark.
fn string(rest: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let found = at + memchr::memchr2(b'"', b'\\', rest.get(at..)?)?;
        if rest.get(found) == Some(&b'"') {
            return Some(found);
        }
        at = found + 2;
    }
}

fn digits(rest: &[u8]) -> usize {
    rest.iter().take_while(|byte| byte.is_ascii_digit()).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: &str = "data: {\"sequence_number\":7,\"content\":\"Hi\",\"usage\":null,\"obfuscation\":\"ab\"}\n\n";

    fn place(block: &str, part: &str) -> Range<usize> {
        let start = block.find(part).unwrap();
        start..start + part.len()
    }

    fn template() -> EventTemplate {
        let cut = place(BLOCK, ",\"usage\":null");
        EventTemplate::new(BLOCK.as_bytes(), std::iter::once(place(BLOCK, "Hi")), Some(cut)).unwrap()
    }

    #[test]
    fn what_differs_in_its_texts_only_is_recognised() {
        for (number, text, padding) in
            [("7", "Hi", "ab"), ("12345", "", ""), ("8", "a \\\"word\\\" \\\\", "x"), ("", "é", "\\u0041")]
        {
            let block = BLOCK.replace('7', number).replace("Hi", text).replace("ab", padding);
            let like = template().matches(block.as_bytes()).unwrap_or_else(|| panic!("{block}"));
            assert_eq!(like.texts().collect::<Vec<_>>().concat(), text.as_bytes());
            assert_eq!(like.cut, Some(place(&block, ",\"usage\":null")), "{block}");
        }
    }

    #[test]
    fn whatever_else_differs_is_not() {
        for (from, to) in [
            ("7", "x"),
            ("Hi", "a\"b"),
            ("Hi", "a\nb"),
            ("Hi", "a\\"),
            ("null", "{}"),
            ("null", "nulL"),
            ("content", "Content"),
            ("data", "date"),
            ("\n\n", "\n"),
            ("\n\n", "\n\n\n"),
            ("\"obfuscation\":\"ab\"", "\"a\":1"),
            (":\"Hi\"", ":null"),
        ] {
            let block = BLOCK.replace(from, to);
            assert_eq!(template().matches(block.as_bytes()), None, "{block}");
        }
        assert_eq!(template().matches(b""), None);
        assert_eq!(template().matches(&BLOCK.as_bytes()[..40]), None);
    }

    #[test]
    fn not_every_event_has_a_shape() {
        let of = |block: &str, texts: &[Range<usize>], cut| {
            EventTemplate::new(block.as_bytes(), texts.iter().cloned(), cut).is_some()
        };
        assert!(of(BLOCK, &[], None));
        assert!(!of(BLOCK, &[place(BLOCK, "content")], Some(place(BLOCK, "tent"))), "what is cut differs");
        assert!(!of(BLOCK, &[place(BLOCK, "onten")], None), "it is no string");
        assert!(!of(BLOCK, &[place(BLOCK, "Hi"), place(BLOCK, "Hi\",\"usage")], None), "they overlap");
        assert!(!of(BLOCK, &[0..0, 900..901], None));
        assert!(!of(&"x".repeat(BLOCK_BYTES_MAX + 1), &[], None));
        let many: Vec<_> = (0..5).map(|nth| 1 + 3 * nth..2 + 3 * nth).collect();
        assert!(!of("\"a\"\"a\"\"a\"\"a\"\"a\"", &many, None));
    }
}
