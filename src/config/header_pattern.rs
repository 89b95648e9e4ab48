//! Names of headers, exact or by their beginning, as typed in `server.forwardHeaders`.

use std::fmt;
use std::str::FromStr;

/// A header's name in lower case, or the beginning of names if it ends in `*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderPattern(String);

impl HeaderPattern {
    /// True if the header has this name; `name` is in lower case.
    pub fn matches(&self, name: &str) -> bool {
        match self.0.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => name == self.0,
        }
    }
}

impl fmt::Display for HeaderPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text is not a header's name.
#[derive(Debug, PartialEq, Eq)]
pub struct HeaderPatternError;

impl FromStr for HeaderPattern {
    type Err = HeaderPatternError;

    fn from_str(text: &str) -> Result<Self, HeaderPatternError> {
        let text = text.trim().to_ascii_lowercase();
        let name = text.strip_suffix('*').unwrap_or(&text);
        // RFC 9110, 5.6.2, but for the star, which stands for the rest of a name here.
        let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'+-.^_`|~".contains(&byte);
        if text.is_empty() || !name.bytes().all(is_part) {
            return Err(HeaderPatternError);
        }
        Ok(Self(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_exact_or_begin_so() {
        let pattern = |text: &str| text.parse::<HeaderPattern>().unwrap();
        assert!(pattern("X-Team").matches("x-team") && !pattern("X-Team").matches("x-team-id"));
        assert!(pattern("x-team*").matches("x-team-id") && !pattern("x-team*").matches("x-tea"));
        assert!(pattern("*").matches("anything"));
        for wrong in ["", "a b", "x*y", "x-team:", "x**", "é"] {
            assert_eq!(wrong.parse::<HeaderPattern>(), Err(HeaderPatternError), "{wrong}");
        }
    }
}
