//! The shape of a call: method and path, if no id stands in it.

use std::sync::LazyLock;

use http::Method;

/// A call, whichever request makes it. Two calls of one shape are had by an endpoint, or neither is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallShape(u64);

/// Segments of the API's paths behind the first one. Any other is an id, or may be one.
const WORDS: [&str; 46] = [
    "batches",
    "calls",
    "cancel",
    "chat",
    "checkpoints",
    "client_secrets",
    "compact",
    "complete",
    "completions",
    "content",
    "count_tokens",
    "edits",
    "embeddings",
    "events",
    "file_batches",
    "files",
    "fim",
    "generations",
    "graders",
    "input_items",
    "input_tokens",
    "items",
    "jobs",
    "messages",
    "parts",
    "permissions",
    "ratings",
    "realtime",
    "results",
    "runs",
    "search",
    "sessions",
    "speech",
    "steps",
    "submit_tool_outputs",
    "threads",
    "transcription_sessions",
    "transcriptions",
    "translations",
    "uploads",
    "usage",
    "variations",
    "vector_stores",
    "videos",
    "voice_consents",
    "voices",
];

impl CallShape {
    /// The shape of a method and a path under `/v1`; none if an id may stand in it.
    pub fn new(method: &Method, path: &str) -> Option<Self> {
        let mut segments = path.strip_prefix("/v1/")?.split('/');
        let first = segments.next()?;
        let is_word = !first.is_empty() && first.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
        let has_id = !is_word || segments.any(|segment| !WORDS.contains(&segment));
        (!has_id).then(|| Self(hash(method.as_str(), path)))
    }

    /// The same call for one model alone.
    #[must_use]
    pub fn of_model(self, model: &str) -> Self {
        Self(self.0 ^ hash("model", model))
    }

    /// A number below 64, for a set of shapes in one word.
    pub fn bit(self) -> u64 {
        1 << (self.0 & 63)
    }
}

/// The ids in a path under `/v1`: its segments but the first that are neither words, known or not, nor numbers. An id that an endpoint
/// has made up has a digit, a capital or a hyphen in it.
pub(crate) fn ids(path: &str) -> impl Iterator<Item = &str> {
    let segments = path.strip_prefix("/v1/").into_iter().flat_map(|path| path.split('/').skip(1));
    let is_word = |segment: &str| segment.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    let is_number = |segment: &str| segment.bytes().all(|byte| byte.is_ascii_digit());
    segments.filter(move |segment| !is_word(segment) && !is_number(segment))
}

/// FNV-1a, as paths are short, from a beginning of this process's own: nobody can look for paths that collide.
fn hash(method: &str, path: &str) -> u64 {
    static BASIS: LazyLock<u64> = LazyLock::new(|| fastrand::u64(..));
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = method.bytes().chain(path.bytes()).fold(*BASIS, step);
    // The lower bits alone depend on too little.
    hash ^ hash >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_an_id_has_no_shape() {
        let shape = |path| CallShape::new(&Method::POST, path);
        for path in [
            "/v1/chat/completions",
            "/v1/messages/count_tokens",
            "/v1/responses/input_tokens",
            "/v1/unheard_of",
            "/v1/audio/transcriptions",
        ] {
            assert!(shape(path).is_some(), "{path}");
        }
        for path in [
            "/v1/files/file-abc",
            "/v1/responses/resp_abc",
            "/v1/responses/resp_abc/cancel",
            "/v1/threads/thread_x/messages",
            "/v1/containers/mine",
            "/v1/Files",
            "/v1/file-abc",
            "/v1/",
            "/v1",
            "/other",
        ] {
            assert_eq!(shape(path), None, "{path}");
        }
        assert_ne!(shape("/v1/files"), shape("/v1/batches"));
        assert_ne!(shape("/v1/files"), CallShape::new(&Method::GET, "/v1/files"));
    }
}
