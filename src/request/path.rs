//! Paths as clients mean them: people type base URLs with `/v1` twice, without it, or with a slash too many, and Azure's SDKs have paths
//! of their own.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;

/// Prefix of every call of the API.
const ROOT: &str = "/v1";
/// Prefix of the paths of Azure's SDKs.
const AZURE: &str = "/openai/";
/// What follows it in calls to a model, before the deployment's name.
const DEPLOYMENTS: &str = "deployments/";

/// First segments of the API's calls, OpenAI's and those of endpoints that have more. A path that begins with one of them
/// lacks its `/v1`.
const COLLECTIONS: [&str; 34] = [
    "assistants",
    "audio",
    "batches",
    "chat",
    "classify",
    "completions",
    "containers",
    "conversations",
    "detokenize",
    "edits",
    "embeddings",
    "evals",
    "files",
    "fim",
    "fine_tuning",
    "images",
    "messages",
    "models",
    "moderations",
    "ocr",
    "organization",
    "pooling",
    "realtime",
    "rerank",
    "reranks",
    "responses",
    "score",
    "skills",
    "threads",
    "tokenize",
    "uploads",
    "vector_stores",
    "videos",
    "voices",
];

/// Returns the path as it is meant: one slash in place of several, one `/v1` at its beginning, none at its end.
pub(crate) fn as_meant(path: &str) -> Cow<'_, str> {
    let mut meant = with_single_slashes(path);
    if meant.contains('%') {
        meant = Cow::Owned(with_unreserved_decoded(&meant));
    }
    if let Some(rest) = meant.strip_prefix(AZURE) {
        // The rest is typed as by everybody, without the deployment.
        let call = deployment_and_call(rest).map_or(rest, |(_, call)| call);
        meant = Cow::Owned(rooted(&format!("/{call}")));
    }
    if under_root(&meant).is_none_or(starts_with_root) || meant.ends_with('/') {
        meant = Cow::Owned(rooted(&meant));
    }
    meant
}

/// Decodes what needs no encoding (RFC 3986, 2.3): an endpoint that decodes its paths would read it so.
fn with_unreserved_decoded(path: &str) -> String {
    let mut plain = String::with_capacity(path.len());
    let mut rest = path;
    while let Some((before, after)) = rest.split_once('%') {
        plain.push_str(before);
        let byte = after.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        if let Some(byte) = byte.filter(|byte| byte.is_ascii_alphanumeric() || b"-._~".contains(byte)) {
            plain.push(byte.into());
            rest = after.get(2..).unwrap_or_default();
        } else {
            plain.push('%');
            rest = after;
        }
    }
    plain.push_str(rest);
    plain
}

fn with_single_slashes(path: &str) -> Cow<'_, str> {
    if !path.contains("//") {
        return Cow::Borrowed(path);
    }
    let mut single = String::with_capacity(path.len());
    for letter in path.chars() {
        if letter != '/' || !single.ends_with('/') {
            single.push(letter);
        }
    }
    Cow::Owned(single)
}

/// True for a path of Azure's SDKs.
pub(crate) fn is_azure(path: &str) -> bool {
    with_single_slashes(path).starts_with(AZURE)
}

/// The deployment that a path of Azure's SDKs names, which is its model.
pub(crate) fn deployment(path: &str) -> Option<String> {
    let path = with_single_slashes(path);
    let (name, _) = deployment_and_call(path.strip_prefix(AZURE)?)?;
    let name = percent_decode_str(name).decode_utf8().ok()?;
    (!name.is_empty()).then(|| name.into_owned())
}

fn deployment_and_call(rest: &str) -> Option<(&str, &str)> {
    rest.strip_prefix(DEPLOYMENTS)?.split_once('/')
}

fn rooted(path: &str) -> String {
    let mut rest = path;
    while let Some(inner) = under_root(rest) {
        rest = inner;
    }
    let is_call = rest.len() < path.len() || COLLECTIONS.contains(&rest.split('/').nth(1).unwrap_or_default());
    let rest = if is_call { rest.trim_end_matches('/') } else { rest };
    if is_call { [ROOT, rest].concat() } else { rest.to_owned() }
}

/// What follows `/v1` in a path, if it begins so.
fn under_root(path: &str) -> Option<&str> {
    path.strip_prefix(ROOT).filter(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn starts_with_root(path: &str) -> bool {
    under_root(path).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_served_as_meant() {
        for (typed, meant) in [
            ("/v1/chat/completions", "/v1/chat/completions"),
            ("/v1/v1/chat/completions", "/v1/chat/completions"),
            ("/v1/v1/v1/embeddings", "/v1/embeddings"),
            ("//v1//chat///completions", "/v1/chat/completions"),
            ("/chat/completions", "/v1/chat/completions"),
            ("//responses/", "/v1/responses"),
            ("/v1/responses/", "/v1/responses"),
            ("/models", "/v1/models"),
            ("/models/meta/llama", "/v1/models/meta/llama"),
            ("/messages/count_tokens", "/v1/messages/count_tokens"),
            ("/v1/", "/v1"),
            ("/v1", "/v1"),
            ("/v1/%66iles/file%2D1/cont%65nt", "/v1/files/file-1/content"),
            ("/%76%31/chat/completions", "/v1/chat/completions"),
            ("/v1/models/a%2Fb%25", "/v1/models/a%2Fb%25"),
            ("/v1/x%", "/v1/x%"),
            ("/v1/x%+1%6", "/v1/x%+1%6"),
            // Azure's.
            ("/openai/deployments/gpt-4o/chat/completions", "/v1/chat/completions"),
            ("/openai/deployments/a%2Fb/audio/transcriptions", "/v1/audio/transcriptions"),
            ("/openai/v1/responses", "/v1/responses"),
            ("/openai/responses/resp_1", "/v1/responses/resp_1"),
            ("/openai/files", "/v1/files"),
            ("/openai/models", "/v1/models"),
            ("/openai/unheard_of", "/unheard_of"),
            ("//openai//deployments/gpt-4o/chat/completions", "/v1/chat/completions"),
            // Not ours to guess.
            ("/", "/"),
            ("/status", "/status"),
            ("/metrics", "/metrics"),
            ("/v2/chat/completions", "/v2/chat/completions"),
            ("/v1x/chat", "/v1x/chat"),
            ("/chatter", "/chatter"),
            ("/v1/files/v1/x", "/v1/files/v1/x"),
            ("/v1/v1x", "/v1/v1x"),
        ] {
            assert_eq!(as_meant(typed), meant, "{typed}");
        }
        assert_eq!(deployment("/openai/deployments/a%2Fb/chat/completions").as_deref(), Some("a/b"));
        let doubled = "//openai/deployments/a/chat/completions";
        assert_eq!((deployment(doubled).as_deref(), is_azure(doubled)), (Some("a"), true));
        assert_eq!((deployment("/openai/deployments/"), deployment("/v1/deployments/a/chat")), (None, None));
        assert!(matches!(as_meant("/v1/chat/completions"), Cow::Borrowed(_)), "the usual path is not copied");
    }
}
