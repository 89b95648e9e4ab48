//! Reads an object of counts as nearly all endpoints write it: whole numbers, nulls and objects of such, under keys without
//! escapes. Whatever else there is in it, nothing is read, and a JSON parser has to.

/// Longer numbers are left to a parser: this many digits are no more than a `u64` holds.
const DIGITS_MAX: usize = 18;

/// What is left to be read.
pub(super) struct Plain<'a>(&'a [u8]);

impl<'a> Plain<'a> {
    pub(super) fn new(json: &'a [u8]) -> Self {
        Self(json)
    }

    /// What follows what was read.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// Reads an object. Each of its values is to be read by `value`, which is told the key.
    pub(super) fn object(&mut self, mut value: impl FnMut(&mut Self, &[u8]) -> Option<()>) -> Option<()> {
        self.sign(b'{')?;
        if self.sign(b'}').is_some() {
            return Some(());
        }
        loop {
            let key = self.key()?;
            self.sign(b':')?;
            value(self, key)?;
            if self.sign(b',').is_none() {
                return self.sign(b'}');
            }
        }
    }

    /// Whether an object comes next.
    pub(super) fn is_at_object(&self) -> bool {
        self.0.trim_ascii_start().first() == Some(&b'{')
    }

    /// Reads a number, or a null as none.
    pub(super) fn number(&mut self) -> Option<Option<u64>> {
        let text = self.0.trim_ascii_start();
        if let Some(rest) = text.strip_prefix(b"null") {
            self.0 = rest;
            return Some(None);
        }
        let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (number, rest) = text.split_at_checked(digits)?;
        let is_whole = matches!(number, [b'0'] | [b'1'..=b'9', ..]) && !matches!(rest, [b'.' | b'e' | b'E', ..]);
        if !is_whole || digits > DIGITS_MAX {
            return None;
        }
        self.0 = rest;
        Some(Some(number.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0'))))
    }

    fn key(&mut self) -> Option<&'a [u8]> {
        self.sign(b'"')?;
        let (key, rest) = self.0.split_at_checked(memchr::memchr2(b'"', b'\\', self.0)?)?;
        self.0 = rest.strip_prefix(b"\"")?;
        Some(key)
    }

    /// Reads this sign, if it comes next.
    fn sign(&mut self, sign: u8) -> Option<()> {
        self.0 = self.0.trim_ascii_start().strip_prefix(&[sign])?;
        Some(())
    }
}
