//! Calls of the API.

use http::Method;

/// Call of the API, as far as its answer is judged, measured and estimated by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `/chat/completions` and `/completions`: an answer without a single token is empty.
    Completion,
    /// `/responses`.
    Responses,
    /// Anthropic's `/messages`.
    Messages,
    /// `/embeddings`.
    Embeddings,
    /// Any other call that may report tokens.
    Other,
    /// A call that reports at most the tokens of another call, such as reading a stored answer.
    Unmetered,
}

impl Call {
    /// The call that a method and a path stand for.
    pub fn new(method: &Method, path: &str) -> Self {
        let path = path.trim_end_matches('/');
        match path {
            _ if method != Method::POST => Self::Unmetered,
            "/v1/chat/completions" => Self::Completion,
            "/v1/responses" => Self::Responses,
            "/v1/messages" => Self::Messages,
            "/v1/embeddings" => Self::Embeddings,
            _ if counts_only(path) => Self::Unmetered,
            _ if changes_what_is_stored(path) => Self::Unmetered,
            _ if path.ends_with("/completions") => Self::Completion,
            _ => Self::Other,
        }
    }

    /// True if it is answered with text written by a model.
    pub fn is_text(self) -> bool {
        matches!(self, Self::Completion | Self::Responses | Self::Messages)
    }
}

/// True if a `POST` is answered with a count of tokens, which costs nothing.
fn counts_only(path: &str) -> bool {
    matches!(path, "/v1/messages/count_tokens" | "/v1/responses/input_tokens" | "/v1/tokenize" | "/v1/detokenize")
}

/// True if a `POST` changes an answer that was made before, and is answered with the usage of that one.
fn changes_what_is_stored(path: &str) -> bool {
    let makes_another = path.ends_with("/compact") || path.ends_with("/submit_tool_outputs");
    let is_stored = path.starts_with("/v1/chat/completions/") || path.starts_with("/v1/responses/");
    path.ends_with("/cancel") || !makes_another && (is_stored || path.contains("/runs/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_told_by_method_and_path() {
        let of = |method: Method, path: &str| Call::new(&method, path);
        assert_eq!(of(Method::POST, "/v1/chat/completions/"), Call::Completion);
        assert_eq!(of(Method::POST, "/v1/completions"), Call::Completion);
        assert_eq!(of(Method::POST, "/v1/responses"), Call::Responses);
        assert_eq!(of(Method::POST, "/v1/messages"), Call::Messages);
        assert_eq!(of(Method::POST, "/v1/threads/t/messages"), Call::Other);
        assert_eq!(of(Method::POST, "/v1/images/generations"), Call::Other);
        assert_eq!(of(Method::GET, "/v1/responses/r"), Call::Unmetered, "it was counted when it was made");
        assert_eq!(of(Method::POST, "/v1/responses/r/cancel"), Call::Unmetered);
        assert_eq!(of(Method::POST, "/v1/messages/count_tokens"), Call::Unmetered);
        assert_eq!(of(Method::POST, "/v1/chat/completions/c"), Call::Unmetered);
        assert_eq!(of(Method::POST, "/v1/responses/compact"), Call::Other);
        assert_eq!(of(Method::POST, "/v1/threads/t/runs"), Call::Other);
        assert_eq!(of(Method::POST, "/v1/threads/t/runs/r"), Call::Unmetered);
        assert_eq!(of(Method::POST, "/v1/threads/t/runs/r/submit_tool_outputs"), Call::Other);
    }
}
