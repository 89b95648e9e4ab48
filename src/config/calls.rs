//! Calls of the API by their names, as `apis[].calls` and `apis[].formats` have them.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Calls of one kind, by the first segments of their paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CallKind {
    /// `/v1/chat/…`.
    Chat,
    /// `/v1/completions`.
    Completions,
    /// `/v1/responses…`.
    Responses,
    /// Anthropic's `/v1/messages…`.
    Messages,
    /// `/v1/embeddings`.
    Embeddings,
    /// `/v1/moderations`.
    Moderations,
    /// `/v1/rerank` and `/v1/reranks`.
    Rerank,
    /// `/v1/images/…`.
    Images,
    /// `/v1/audio/…`.
    Audio,
    /// `/v1/videos…`.
    Videos,
    /// `/v1/realtime…`.
    Realtime,
    /// `/v1/files…`.
    Files,
    /// `/v1/uploads…`.
    Uploads,
    /// `/v1/batches…`.
    Batches,
    /// `/v1/fine_tuning/…`.
    FineTuning,
    /// `/v1/conversations…`.
    Conversations,
    /// `/v1/vector_stores…`.
    VectorStores,
    /// `/v1/containers…`.
    Containers,
    /// `/v1/assistants…`.
    Assistants,
    /// `/v1/threads…`.
    Threads,
    /// `/v1/evals…`.
    Evals,
    /// Every other one.
    Other,
}

impl CallKind {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::Chat,
        Self::Completions,
        Self::Responses,
        Self::Messages,
        Self::Embeddings,
        Self::Moderations,
        Self::Rerank,
        Self::Images,
        Self::Audio,
        Self::Videos,
        Self::Realtime,
        Self::Files,
        Self::Uploads,
        Self::Batches,
        Self::FineTuning,
        Self::Conversations,
        Self::VectorStores,
        Self::Containers,
        Self::Assistants,
        Self::Threads,
        Self::Evals,
        Self::Other,
    ];

    /// Name in the config file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
            Self::Responses => "responses",
            Self::Messages => "messages",
            Self::Embeddings => "embeddings",
            Self::Moderations => "moderations",
            Self::Rerank => "rerank",
            Self::Images => "images",
            Self::Audio => "audio",
            Self::Videos => "videos",
            Self::Realtime => "realtime",
            Self::Files => "files",
            Self::Uploads => "uploads",
            Self::Batches => "batches",
            Self::FineTuning => "fine_tuning",
            Self::Conversations => "conversations",
            Self::VectorStores => "vector_stores",
            Self::Containers => "containers",
            Self::Assistants => "assistants",
            Self::Threads => "threads",
            Self::Evals => "evals",
            Self::Other => "other",
        }
    }

    /// The kind of calls of this path, as it is meant.
    pub fn of_path(path: &str) -> Self {
        let path = path.strip_prefix("/v1/").unwrap_or_default();
        let first = path.split('/').next().unwrap_or_default();
        match first {
            "reranks" => Self::Rerank,
            "other" => Self::Other,
            _ => Self::named(first).unwrap_or(Self::Other),
        }
    }

    /// The kind of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for CallKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Calls that are made over a WebSocket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum WebSocketCall {
    /// `/v1/responses`.
    Responses,
    /// `/v1/realtime`.
    Realtime,
}

/// A set of kinds of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallSet(u32);

impl CallSet {
    /// All of them.
    pub const ALL: Self = Self(u32::MAX);

    /// True if the set has calls of this kind.
    pub fn contains(self, kind: CallKind) -> bool {
        self.0 & Self::bit(kind) != 0
    }

    /// The kinds that it has, in their order.
    pub fn kinds(self) -> impl Iterator<Item = CallKind> {
        CallKind::ALL.into_iter().filter(move |kind| self.contains(*kind))
    }

    fn bit(kind: CallKind) -> u32 {
        1 << kind as u32
    }
}

impl FromIterator<CallKind> for CallSet {
    fn from_iter<I: IntoIterator<Item = CallKind>>(kinds: I) -> Self {
        Self(kinds.into_iter().fold(0, |set, kind| set | Self::bit(kind)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_tells_the_kind_of_its_call() {
        for (path, name) in [
            ("/v1/chat/completions", "chat"),
            ("/v1/completions", "completions"),
            ("/v1/messages/count_tokens", "messages"),
            ("/v1/audio/speech", "audio"),
            ("/v1/fine_tuning/jobs/ftjob-1", "fine_tuning"),
            ("/v1/reranks", "rerank"),
            ("/v1/realtime", "realtime"),
            ("/v1/unheard_of", "other"),
            ("/v1/other", "other"),
            ("/elsewhere", "other"),
        ] {
            assert_eq!(CallKind::of_path(path).name(), name, "{path}");
        }
        for kind in CallKind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
    }

    #[test]
    fn a_set_has_what_was_put_in() {
        let set: CallSet = [CallKind::Chat, CallKind::Other].into_iter().collect();
        assert_eq!(set.kinds().collect::<Vec<_>>(), [CallKind::Chat, CallKind::Other]);
        assert_eq!(CallSet::ALL.kinds().count(), CallKind::ALL.len());
    }
}
