//! Where an endpoint wants its key.

use std::fmt;

use http::{HeaderName, header};

/// Where an endpoint wants its key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AuthHeader {
    /// `Authorization: Bearer KEY`.
    #[default]
    Authorization,
    /// A header that holds the bare key.
    Header(HeaderName),
    /// A parameter of the query.
    Query(String),
}

/// Headers that hold a bare key.
const HEADERS: [&str; 3] = ["api-key", "x-api-key", "x-goog-api-key"];
const QUERY: &str = "query:";

impl AuthHeader {
    /// Reads it as the config has it; `None` if it is none that is known.
    pub fn parse(text: &str) -> Option<Self> {
        let name = text.to_ascii_lowercase();
        if name == header::AUTHORIZATION.as_str() {
            return Some(Self::Authorization);
        }
        if let Some(parameter) = text.strip_prefix(QUERY) {
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
            return (!parameter.is_empty() && parameter.bytes().all(is_plain))
                .then(|| Self::Query(parameter.to_owned()));
        }
        HEADERS.into_iter().find(|known| *known == name).map(|known| Self::Header(HeaderName::from_static(known)))
    }
}

impl fmt::Display for AuthHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Authorization => f.write_str("authorization"),
            Self::Header(name) => f.write_str(name.as_str()),
            Self::Query(parameter) => write!(f, "{QUERY}{parameter}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_places_are_understood() {
        for text in ["authorization", "api-key", "x-api-key", "x-goog-api-key", "query:key", "query:api_key"] {
            assert_eq!(AuthHeader::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(AuthHeader::parse("X-API-Key"), AuthHeader::parse("x-api-key"));
        for text in ["", "query:", "query:a b", "cookie", "Bearer"] {
            assert_eq!(AuthHeader::parse(text), None, "{text}");
        }
    }
}
