//! Reader for an object of counts as nearly all endpoints write it: whole numbers, nulls and objects of such, with keys
//! without escapes. Anything else is a [`Surprise`] and is left to a JSON parser.

/// Number of digits that always fit into a `u64`. Longer numbers are left to a parser.
const DIGITS_MAX: usize = 18;

/// Error: the input does not have the plain form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Surprise;

/// Reader; holds the rest of the input.
pub(super) struct Plain<'a>(&'a [u8]);

impl<'a> Plain<'a> {
    pub(super) fn new(json: &'a [u8]) -> Self {
        Self(json)
    }

    /// Returns the rest of the input.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// Reads an object. `value` reads each of its values, and is passed the key.
    pub(super) fn object(
        &mut self,
        mut value: impl FnMut(&mut Self, &[u8]) -> Result<(), Surprise>,
    ) -> Result<(), Surprise> {
        self.sign(b'{')?;
        if self.sign(b'}').is_ok() {
            return Ok(());
        }
        loop {
            let key = self.key()?;
            self.sign(b':')?;
            value(self, key)?;
            if self.sign(b',').is_err() {
                return self.sign(b'}');
            }
        }
    }

    /// True if an object comes next.
    pub(super) fn is_at_object(&self) -> bool {
        self.0.trim_ascii_start().first() == Some(&b'{')
    }

    /// Reads a number; `None` for a null.
    pub(super) fn number(&mut self) -> Result<Option<u64>, Surprise> {
        let text = self.0.trim_ascii_start();
        if let Some(rest) = text.strip_prefix(b"null") {
            self.0 = rest;
            return Ok(None);
        }
        let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (number, rest) = text.split_at_checked(digits).ok_or(Surprise)?;
        let is_whole = matches!(number, [b'0'] | [b'1'..=b'9', ..]) && !matches!(rest, [b'.' | b'e' | b'E', ..]);
        if !is_whole || digits > DIGITS_MAX {
            return Err(Surprise);
        }
        self.0 = rest;
        Ok(Some(number.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0'))))
    }

    fn key(&mut self) -> Result<&'a [u8], Surprise> {
        self.sign(b'"')?;
        let end = memchr::memchr2(b'"', b'\\', self.0).ok_or(Surprise)?;
        let (key, rest) = self.0.split_at_checked(end).ok_or(Surprise)?;
        self.0 = rest.strip_prefix(b"\"").ok_or(Surprise)?;
        Ok(key)
    }

    /// Reads this character, after any white space.
    fn sign(&mut self, sign: u8) -> Result<(), Surprise> {
        self.0 = self.0.trim_ascii_start().strip_prefix(&[sign]).ok_or(Surprise)?;
        Ok(())
    }
}
