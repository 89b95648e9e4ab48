//! Redacts an endpoint's secrets wherever its answer quotes them: one star for each byte, so that the length stays what the header
//! says. Pure.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use memchr::memmem::Finder;

use crate::json::part;

/// Shorter secrets would redact ordinary words.
const SECRET_BYTES_MIN: usize = 8;
/// A quoted or masked secret is looked for across the boundary of two pieces up to this length.
const CARRY_BYTES: usize = 512;

/// The secrets of one endpoint: its key, and the values of the headers that its config adds. Shared, as every attempt holds
/// them.
#[derive(Clone, Default)]
pub struct Secrets(Arc<[Secret]>);

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} secrets", self.0.len())
    }
}

impl<'a> FromIterator<&'a [u8]> for Secrets {
    fn from_iter<I: IntoIterator<Item = &'a [u8]>>(secrets: I) -> Self {
        let secrets = secrets.into_iter().filter(|secret| secret.len() >= SECRET_BYTES_MIN);
        Self(secrets.map(Secret::new).collect())
    }
}

impl Secrets {
    /// True if a text quotes one of the secrets in full.
    pub fn are_in(&self, text: &[u8]) -> bool {
        self.0.iter().any(|secret| secret.is_in(text))
    }

    /// Returns the piece with every secret that it quotes redacted; the piece itself if it quotes none.
    pub fn blot_whole(&self, piece: &Bytes) -> Bytes {
        if !self.are_in(piece) {
            return piece.clone();
        }
        let mut text = piece.to_vec();
        self.hide_whole(&mut text);
        text.into()
    }

    /// Redacts every secret, quoted whole or masked by the vendor (`sk-ab***yz`).
    fn hide(&self, text: &mut [u8]) {
        self.hide_whole(text);
        for word in key_like_words(text) {
            let Some(part) = text.get_mut(word) else { continue };
            if self.0.iter().any(|secret| is_masked_form(part, secret.text.needle())) {
                part.fill(b'*');
            }
        }
    }

    fn hide_whole(&self, text: &mut [u8]) {
        // All are found before any is hidden: one may be a part of another.
        let found: Vec<Range<usize>> = self.0.iter().flat_map(|secret| secret.quotations(text)).collect();
        for quotation in found {
            if let Some(part) = text.get_mut(quotation) {
                part.fill(b'*');
            }
        }
    }

    /// Length of the longest quotation, in bytes.
    fn longest(&self) -> usize {
        self.0.iter().map(|secret| secret.longest).max().unwrap_or_default()
    }
}

/// One secret, and the ways in which a vendor may write it: as it is, escaped in JSON (once, or as text within JSON), percent-encoded,
/// or in HTML. Letters and digits are never escaped, nor are `-`, `.` and `_`; a secret of nothing else has one form.
struct Secret {
    text: Finder<'static>,
    /// The other forms, if there are any.
    escaped: Option<Escaped>,
    longest: usize,
}

/// The forms of a secret with signs in it.
struct Escaped {
    /// The longest stretch that is never escaped, by which a quotation is found.
    stretch: Finder<'static>,
    /// What stands before that stretch, and behind it: for each byte all its forms.
    before: Vec<Vec<Vec<u8>>>,
    after: Vec<Vec<Vec<u8>>>,
}

impl Secret {
    fn new(text: &[u8]) -> Self {
        let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._".contains(byte);
        let stretch = text.split(|byte| !is_plain(byte)).max_by_key(|stretch| stretch.len()).unwrap_or_default();
        let (mut escaped, mut longest) = (None, text.len());
        // One of signs only is looked for as it is.
        if !stretch.is_empty() && stretch.len() < text.len() {
            let start = Finder::new(stretch).find(text).unwrap_or_default();
            let forms = |bytes: &[u8]| -> Vec<_> { bytes.iter().map(|byte| forms(*byte, is_plain(byte))).collect() };
            let (before, after) = (forms(part(text, ..start)), forms(part(text, start + stretch.len()..)));
            let ends = before.iter().chain(&after).filter_map(|forms| forms.iter().map(Vec::len).max());
            longest = stretch.len() + ends.sum::<usize>();
            escaped = Some(Escaped { stretch: Finder::new(stretch).into_owned(), before, after });
        }
        Self { text: Finder::new(text).into_owned(), escaped, longest }
    }

    fn is_in(&self, text: &[u8]) -> bool {
        // Most keys have one form, and most texts have no part of any.
        self.text.find(text).is_some()
            || self.escaped.as_ref().is_some_and(|escaped| escaped.quotations(text).next().is_some())
    }

    /// Where a text quotes the secret in full.
    fn quotations(&self, text: &[u8]) -> Vec<Range<usize>> {
        let length = self.text.needle().len();
        let mut found: Vec<_> = starts(&self.text, text).map(|start| start..start + length).collect();
        found.extend(self.escaped.iter().flat_map(|escaped| escaped.quotations(text)));
        found
    }
}

impl Escaped {
    fn quotations<'a>(&'a self, text: &'a [u8]) -> impl Iterator<Item = Range<usize>> + 'a {
        starts(&self.stretch, text).filter_map(move |start| {
            let behind = part(text, start + self.stretch.needle().len()..);
            let after = reach(self.after.iter(), |at, form| part(behind, at..).starts_with(form))?;
            let ahead = part(text, ..start);
            let before = reach(self.before.iter().rev(), |at, form| part(ahead, ..ahead.len() - at).ends_with(form))?;
            Some(start - before..start + self.stretch.needle().len() + after)
        })
    }
}

/// Where a text has a needle, also where two of them overlap.
fn starts<'a>(needle: &'a Finder<'static>, text: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    let mut from = 0;
    std::iter::from_fn(move || {
        let start = from + needle.find(text.get(from..)?)?;
        from = start + 1;
        Some(start)
    })
}

/// The most bytes that one form of each byte takes, one behind the other; none if they do not fit. `fits`: whether a form stands behind so
/// many bytes. All ways are followed, since the longest form of one byte may leave none for the next.
fn reach<'a>(bytes: impl Iterator<Item = &'a Vec<Vec<u8>>>, fits: impl Fn(usize, &[u8]) -> bool) -> Option<usize> {
    let mut reached = vec![0];
    for forms in bytes {
        let mut next: Vec<usize> = Vec::new();
        for at in reached {
            next.extend(forms.iter().filter(|form| fits(at, form)).map(|form| at + form.len()));
        }
        next.sort_unstable();
        next.dedup();
        reached = next;
    }
    reached.last().copied()
}

/// All ways in which a byte of a secret may be written.
fn forms(byte: u8, is_plain: bool) -> Vec<Vec<u8>> {
    let raw = vec![byte];
    if is_plain {
        return vec![raw];
    }
    let sign = char::from(byte);
    let mut forms: Vec<String> = Vec::new();
    for hex in [format!("{byte:02x}"), format!("{byte:02X}")] {
        forms.extend([
            format!("%25{hex}"),
            format!("%{hex}"),
            format!("\\\\u00{hex}"),
            format!("\\u00{hex}"),
            format!("&#x{hex};"),
        ]);
    }
    forms.extend([
        format!("\\\\\\{sign}"),
        format!("\\\\{sign}"),
        format!("\\{sign}"),
        format!("&#{byte};"),
        format!("&#{byte:03};"),
    ]);
    let named = match byte {
        b'&' => Some("&amp;"),
        b'<' => Some("&lt;"),
        b'>' => Some("&gt;"),
        b'"' => Some("&quot;"),
        b'\'' => Some("&apos;"),
        _ => None,
    };
    forms.extend(named.map(str::to_owned));
    forms.into_iter().map(String::into_bytes).chain([raw]).collect()
}

/// Redacts an error that comes in pieces, and holds its last bytes back until the next one, so that a secret which is cut
/// in two is found.
#[derive(Debug)]
pub struct Redactor {
    secrets: Secrets,
    carry: Vec<u8>,
}

impl Redactor {
    /// Returns a redactor of these secrets.
    pub fn new(secrets: Secrets) -> Self {
        Self { secrets, carry: Vec::new() }
    }

    /// Takes the next piece, and returns the bytes that can be sent.
    pub fn piece(&mut self, piece: &[u8], end: bool) -> Bytes {
        let mut text = std::mem::take(&mut self.carry);
        text.extend_from_slice(piece);
        self.secrets.hide(&mut text);
        if !end {
            self.carry = text.split_off(text.len().saturating_sub(CARRY_BYTES.max(self.secrets.longest())));
        }
        text.into()
    }
}

/// Runs of the characters that keys and their masks are made of.
fn key_like_words(text: &[u8]) -> Vec<Range<usize>> {
    let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_*.".contains(byte) || !byte.is_ascii();
    let mut words = Vec::new();
    let mut at = 0;
    while let Some(start) = text.get(at..).and_then(|rest| rest.iter().position(is_part)) {
        let start = at + start;
        let rest = part(text, start..);
        let length = rest.iter().position(|byte| !is_part(byte)).unwrap_or(rest.len());
        at = start + length;
        // A full stop after the key belongs to the sentence.
        let trimmed = rest.get(..length).and_then(|word| word.iter().rposition(|byte| *byte != b'.'));
        words.push(start..trimmed.map_or(at, |last| start + last + 1));
    }
    words
}

/// True if a word is the secret's beginning, then a mask of stars or dots, then the secret's end, at least two
/// characters of both.
fn is_masked_form(word: &[u8], secret: &[u8]) -> bool {
    const MASK_BYTES_MIN: usize = 3;
    let is_mask = |byte: &u8| *byte == b'*' || *byte == b'.' || !byte.is_ascii();
    let Some(first) = word.iter().position(is_mask) else { return false };
    let last = word.iter().rposition(is_mask).unwrap_or(first);
    let (head, rest) = word.split_at(first);
    let (mask, tail) = rest.split_at(last + 1 - first);
    mask.len() >= MASK_BYTES_MIN
        && mask.iter().all(is_mask)
        && head.len() + tail.len() >= 2
        && secret.starts_with(head)
        && secret.ends_with(tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "sk-abcdefghijklmnop";

    fn secrets() -> Secrets {
        [KEY.as_bytes(), b"azure-key/+=", b"short"].into_iter().collect()
    }

    fn blotted(pieces: &[&str]) -> String {
        let mut redactor = Redactor::new(secrets());
        let mut out = Vec::new();
        for (index, piece) in pieces.iter().enumerate() {
            out.extend_from_slice(&redactor.piece(piece.as_bytes(), index + 1 == pieces.len()));
        }
        assert_eq!(out.len(), pieces.concat().len(), "the length stays");
        String::from_utf8_lossy(&out).into_owned()
    }

    #[test]
    fn secrets_are_blotted_out_whole_and_masked() {
        for (text, expected) in [
            ("key sk-abcdefghijklmnop is bad", "key ******************* is bad"),
            ("provided: sk-ab***********mnop. You", "provided: ********************. You"),
            ("\"sk-abc…nop\"", "\"************\""),
            ("sk-ab...op!", "**********!"),
            ("header azure-key/+= it is", "header ************ it is"),
        ] {
            assert_eq!(blotted(&[text]), expected);
        }
        let other = "see ***bold*** and v1...v2 or sk-xy****zz, short";
        assert_eq!(blotted(&[other]), other);
    }

    #[test]
    fn escaped_secrets_are_blotted_out() {
        for text in [
            r"azure-key\/+=",
            r"azure-key\u002f+\u003d",
            r"azure-key\u002F\u002B\u003D",
            "azure-key%2F%2B%3D",
            "azure-key%2f%2b%3d",
            "azure-key/%2B=",
            "azure-key%252F%252B%253D",
            r"azure-key\\\/+=",
            r"azure-key\\u002f+=",
            "azure-key&#47;&#43;&#61;",
            "azure-key&#x2F;+&#x3d;",
        ] {
            let around = |inner: &str| format!(r#"{{"message":"Bad key: {inner}, sorry"}}"#);
            assert_eq!(blotted(&[&around(text)]), around(&"*".repeat(text.len())), "{text}");
            for cut in 1..text.len() {
                let (head, tail) = text.split_at(cut);
                let pieces = [format!("{}{head}", "x ".repeat(1000)), format!("{tail}{}", " x".repeat(1000))];
                assert!(!blotted(&[&pieces[0], &pieces[1]]).contains("azure"), "{text} cut at {cut}");
            }
        }
        let other = r"azure-key, azure-key/, azure-key\/\/, azure-key%2F%2B%3E";
        assert_eq!(blotted(&[other]), other);
        let odd: Secrets = [
            r"ab\\cd\efgh".as_bytes(),
            b"key%25with&amp;in",
            b"aaaa/b+cd",
            b"azure~secret~9",
            b"cookie=sk-abcdefgh; b=second",
            b"sk-abcdefgh",
        ]
        .into_iter()
        .collect();
        for text in [
            r"x ab\\cd\efgh y",
            r"x ab\\\\cd\\efgh y",
            "x key%25with&amp;in y",
            "x key%2525with%26amp%3Bin y",
            "aaaaa/b+cd",
            "x azure%7Esecret%7E9",
            "x cookie=sk-abcdefgh; b=second y",
            "it&#039;s azure~secret~9",
        ] {
            let mut hidden = text.as_bytes().to_vec();
            odd.hide_whole(&mut hidden);
            let hidden = String::from_utf8(hidden).unwrap();
            assert_eq!(hidden.len(), text.len());
            for part in ["cd", "with", "secret", "abcdefgh", "second"] {
                assert!(!hidden.contains(part), "{text}: {hidden}");
            }
        }
        let signs: Secrets = [br#"&<>"'/+=@"#.as_slice(), b"/+=/+=abc", b"a/b"].into_iter().collect();
        for text in [r#"x &<>"'/+=@ y"#, "%2F%2B%3D%2F%2B%3Dabc", r"\/+=\/+=abc"] {
            assert!(signs.are_in(text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn a_secret_that_is_cut_in_two_is_found() {
        let long = "x ".repeat(1000);
        for cut in 1..KEY.len() {
            let (head, tail) = KEY.split_at(cut);
            let text = blotted(&[&format!("{long}{head}"), &format!("{tail} {long}")]);
            assert!(text.contains(&"*".repeat(KEY.len())), "cut at {cut}");
            let masked = "sk-abc****mnop";
            let (head, tail) = masked.split_at(cut.min(masked.len() - 1));
            let text = blotted(&[&format!("{long}{head}"), &format!("{tail} {long}")]);
            assert!(text.contains(&"*".repeat(masked.len())), "cut at {cut}");
        }
    }

    #[test]
    fn pieces_without_a_secret_are_not_copied() {
        let piece = Bytes::from_static(b"data: nothing to see\n\n");
        assert_eq!(secrets().blot_whole(&piece).as_ptr(), piece.as_ptr());
        let piece = Bytes::from(format!("data: {KEY}\n\n"));
        assert_eq!(secrets().blot_whole(&piece), format!("data: {}\n\n", "*".repeat(KEY.len())));
    }
}
