//! Meaning of endpoints' errors, as the user says it in `apis[].errors`, and the words for it.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Whose trouble an endpoint's error is. It decides whether another endpoint is tried, and what is held against this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Trouble {
    /// The request is at fault: any endpoint would refuse it. It is passed on, and nobody's failure.
    Request,
    /// A rate limit or quota of this model is reached: the model rests at this endpoint.
    ModelLimit,
    /// A rate limit or quota of the whole account is reached: the endpoint rests.
    AccountLimit,
    /// The model failed: overloaded, loading, broken. Repeated failures make it cool down at this endpoint.
    ModelFailure,
    /// The endpoint does not have the model: the model rests there.
    ModelMissing,
    /// The endpoint does not have the call at all.
    CallMissing,
    /// The endpoint does not have an object that the request names: a file, a stored response.
    ObjectMissing,
    /// The key is refused, or its account is out of credit: the endpoint is left alone for a while.
    Key,
    /// The endpoint as a whole failed. Repeated failures make it cool down.
    Endpoint,
}

impl Trouble {
    /// Name in the config file, in logs and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::ModelLimit => "model_limit",
            Self::AccountLimit => "account_limit",
            Self::ModelFailure => "model_failure",
            Self::ModelMissing => "model_missing",
            Self::CallMissing => "call_missing",
            Self::ObjectMissing => "object_missing",
            Self::Key => "key",
            Self::Endpoint => "endpoint",
        }
    }
}

/// One rule of `apis[].errors`: an error that has all of what is set means this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorRule {
    /// Status of the answer, or the code in the body of a 200.
    pub status: Option<u16>,
    /// `error.code`, and what other vendors have in its place.
    pub code: Option<String>,
    /// `error.type`.
    pub kind: Option<String>,
    /// `error.message`.
    pub message: Option<MessagePattern>,
    /// What it means.
    pub means: Trouble,
}

/// A whole message; `*` stands for any text.
#[derive(Clone, PartialEq, Eq)]
pub struct MessagePattern(String);

impl MessagePattern {
    /// Takes the text as it is.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// True if the message is this one.
    pub fn matches(&self, message: &str) -> bool {
        matches_glob(&self.0, message)
    }
}

impl fmt::Debug for MessagePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// True if a text is the pattern, in which `*` stands for any text. The parts between the stars are taken at their first
/// place, so the time is bounded by the product of both lengths.
pub fn matches_glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = rest.get(at + part.len()..).unwrap_or_default(),
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
    fn a_star_stands_for_any_text() {
        for (pattern, text, matches) in [
            ("busy", "busy", true),
            ("busy", "busy!", false),
            ("busy*", "busy!", true),
            ("*busy", "very busy", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("a*a", "a", false),
            ("*", "", true),
            ("", "", true),
            ("", "x", false),
            ("The model `*` does not exist*", "The model `x` does not exist or you do not have access to it.", true),
            ("The model `*` does not exist*", "You said: The model `x` does not exist", false),
        ] {
            assert_eq!(matches_glob(pattern, text), matches, "{pattern} on {text}");
        }
    }

    proptest! {
        #[test]
        fn it_matches_what_is_put_in(parts in prop::collection::vec("[ab]{0,4}", 1..5), fill in "[abc]{0,6}") {
            let (pattern, text) = (parts.join("*"), parts.join(&fill));
            prop_assert!(matches_glob(&pattern, &text), "{} on {}", pattern, text);
        }
    }
}
