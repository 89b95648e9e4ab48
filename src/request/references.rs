//! The objects that a request names, by their ids: files, stored responses, conversations and others that were made at one
//! endpoint and are nowhere else. They stand in its path, its query and its body.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, LazyLock};

use aho_corasick::AhoCorasick;
use memchr::memmem::Finder;
use percent_encoding::percent_decode;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::call::Call;
use super::shape;
use crate::json::part;
use crate::json::scan::{self, Key};

/// Objects of one request that are looked for; a request with more names the same endpoint by the first ones.
pub const OBJECTS_MAX: usize = 32;
/// Longest id in bytes; a longer text is none.
pub const ID_BYTES_MAX: usize = 255;
/// Bytes before the type of an item in which its object begins.
const ITEM_BYTES_MAX: usize = 512;
/// Bytes of a text that was sealed for one organisation by which it is told from others: they hold when it was written, and a random
/// number.
const SEALED_BYTES: usize = 128;

/// Members of JSON bodies whose value is an id, a list of ids, or an object with an `id`, as they stand in a body.
const KEYS: [&str; 18] = [
    "\"previous_response_id\"",
    "\"conversation\"",
    "\"file_id\"",
    "\"input_file_id\"",
    "\"file_ids\"",
    "\"training_file\"",
    "\"validation_file\"",
    "\"assistant_id\"",
    "\"thread_id\"",
    "\"vector_store_id\"",
    "\"vector_store_ids\"",
    "\"container\"",
    "\"container_id\"",
    "\"response_id\"",
    "\"upload_id\"",
    "\"eval_id\"",
    "\"skill_id\"",
    "\"batch_id\"",
];
/// An item of an earlier answer, by its id.
const ITEM_REFERENCE: &str = "\"item_reference\"";
/// Texts that only the organisation that wrote them can read: reasoning, and the signature of thinking.
const SEALED: [&str; 2] = ["\"encrypted_content\"", "\"signature\""];

/// Calls but the simplest may name any of them.
static ANY: LazyLock<Option<AhoCorasick>> = LazyLock::new(|| {
    let patterns = KEYS.into_iter().chain([ITEM_REFERENCE]).chain(SEALED);
    AhoCorasick::new(patterns).inspect_err(|error| log::error!("ids cannot be searched for: {error}")).ok()
});
/// A chat may name files only.
static FILE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"file_id\""));

/// Objects that a request names.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct References {
    /// Their ids, as they stand in path, query and body in this order; each once.
    pub ids: Vec<Arc<str>>,
    /// Number of them that stand in the path.
    pub in_path: usize,
    /// Names of texts that were sealed for one organisation.
    pub sealed: Vec<Arc<str>>,
}

impl References {
    /// Finds them. `json` is the body, if it is JSON.
    pub fn find(call: Call, path: &str, query: Option<&str>, json: Option<&[u8]>) -> Self {
        let mut found = Self::default();
        for segment in shape::ids(path).filter(|_| names_objects(path)) {
            found.add(&percent_decode(segment.as_bytes()).decode_utf8_lossy());
        }
        found.in_path = found.ids.len();
        let pairs = query.into_iter().flat_map(|query| query.split('&')).filter_map(|pair| pair.split_once('='));
        for (_, id) in pairs.filter(|(name, _)| name.ends_with("_id")) {
            found.add(&percent_decode(id.as_bytes()).decode_utf8_lossy());
        }
        if let Some(json) = json {
            found.search(call, json);
        }
        found
    }

    /// True if it names none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty() && self.sealed.is_empty()
    }

    fn search(&mut self, call: Call, json: &[u8]) {
        match call {
            Call::Embeddings => {}
            Call::Completion => {
                for at in FILE.find_iter(json) {
                    self.member(json, at..at + FILE.needle().len());
                }
            }
            Call::Responses | Call::Messages | Call::Other | Call::Unmetered => {
                for found in ANY.iter().flat_map(|any| any.find_iter(json)) {
                    let range = found.range();
                    match found.pattern().as_usize() {
                        key if key < KEYS.len() => self.member(json, range),
                        key if key == KEYS.len() => self.item(json, range.start),
                        _ => self.sealed(json, range),
                    }
                }
            }
        }
    }

    /// Takes the ids of a member whose key stands at this place. A value that is none of these names nothing.
    fn member(&mut self, json: &[u8], key: Range<usize>) {
        let Some(value) = value_of(json, key) else { return };
        match value.first() {
            Some(b'"') => drop(self.text(value)),
            Some(b'[') => self.list(part(value, 1..)),
            Some(b'{') => self.object(value),
            _ => {}
        }
    }

    /// Takes the ids of a list of strings, behind its bracket.
    fn list(&mut self, list: &[u8]) {
        let mut rest = list.trim_ascii_start();
        while rest.starts_with(b"\"") && self.ids.len() < OBJECTS_MAX {
            let Some(length) = self.text(rest) else { return };
            let after = part(rest, length..).trim_ascii_start();
            rest = after.strip_prefix(b",").unwrap_or_default().trim_ascii_start();
        }
    }

    /// Takes the id that a JSON string holds, and returns the string's length.
    fn text(&mut self, value: &[u8]) -> Option<usize> {
        let mut values = serde_json::Deserializer::from_slice(value).into_iter::<Key<'_>>();
        let Key(id) = values.next()?.ok()?;
        self.add(&id);
        Some(values.byte_offset())
    }

    /// Takes the `id` of a JSON object.
    fn object(&mut self, value: &[u8]) {
        #[derive(Deserialize)]
        struct Object<'a> {
            #[serde(borrow, default, deserialize_with = "scan::even_null")]
            id: Option<&'a RawValue>,
        }
        let mut values = serde_json::Deserializer::from_slice(value).into_iter::<Object<'_>>();
        if let Some(Ok(Object { id: Some(id) })) = values.next() {
            self.text(id.get().as_bytes());
        }
    }

    /// Takes the id of an item whose type stands at this place.
    fn item(&mut self, json: &[u8], at: usize) {
        let before = part(json, at.saturating_sub(ITEM_BYTES_MAX)..at);
        if let Some(begins) = memchr::memrchr(b'{', before) {
            self.object(part(json, at - before.len() + begins..));
        }
    }

    fn sealed(&mut self, json: &[u8], key: Range<usize>) {
        let text = value_of(json, key).and_then(|value| value.strip_prefix(b"\""));
        if let Some(name) = text.and_then(sealed_name)
            && self.sealed.len() < OBJECTS_MAX
            && !self.sealed.contains(&name)
        {
            self.sealed.push(name);
        }
    }

    fn add(&mut self, id: &str) {
        let is_id = (1..=ID_BYTES_MAX).contains(&id.len());
        if is_id && self.ids.len() < OBJECTS_MAX && !self.ids.iter().any(|known| **known == *id) {
            self.ids.push(id.into());
        }
    }
}

/// First segments of the paths of calls that make, show or list objects.
const COLLECTIONS: [&str; 15] = [
    "assistants",
    "batches",
    "chat",
    "containers",
    "conversations",
    "evals",
    "files",
    "fine_tuning",
    "realtime",
    "responses",
    "skills",
    "threads",
    "uploads",
    "vector_stores",
    "videos",
];

/// True if the segments of a path that are no words of the API are ids of objects.
fn names_objects(path: &str) -> bool {
    let path = path.strip_prefix("/v1/").unwrap_or_default();
    let first = path.split('/').next().unwrap_or_default();
    COLLECTIONS.contains(&first) || path.starts_with("messages/batches")
}

/// True if the answer to a call may name objects that stay at its endpoint. `store`: what the request says of storing the answer.
pub fn shows_objects(call: Call, path: &str, store: Option<bool>) -> bool {
    match call {
        Call::Completion => store == Some(true),
        Call::Responses => store != Some(false),
        Call::Messages | Call::Embeddings => false,
        Call::Other | Call::Unmetered => names_objects(path),
    }
}

/// The name of a text that was sealed for one organisation, given from behind its quotation mark on. None for a short one, which is
/// something else.
pub fn sealed_name(text: &[u8]) -> Option<Arc<str>> {
    let text = part(text, ..text.len().min(SEALED_BYTES));
    let text = part(text, ..memchr::memchr2(b'"', b'\\', text).unwrap_or(text.len()));
    let text: Cow<'_, str> = String::from_utf8_lossy(text);
    (text.len() >= SEALED_BYTES / 2).then(|| text.into())
}

/// The value of a member whose key, quotation marks included, stands at this place. None if it stands in a text, or is a text itself.
fn value_of(json: &[u8], key: Range<usize>) -> Option<&[u8]> {
    if key.start > 0 && json.get(key.start - 1) == Some(&b'\\') {
        return None;
    }
    let value = part(json, key.end..).trim_ascii_start().strip_prefix(b":")?;
    Some(value.trim_ascii_start())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn found(call: Call, path: &str, query: &str, body: &Value) -> Vec<String> {
        let body = body.to_string();
        let references = References::find(call, path, Some(query), Some(body.as_bytes()));
        references.ids.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn ids_stand_in_paths_and_queries() {
        let of = |path: &str, query: &str| found(Call::Unmetered, path, query, &json!({}));
        assert_eq!(of("/v1/files/file-1/content", ""), ["file-1"]);
        assert_eq!(of("/v1/vector_stores/vs_1/files/file-1", ""), ["vs_1", "file-1"]);
        assert_eq!(of("/v1/threads/thread%5F1/runs/run_1/steps", "limit=3"), ["thread_1", "run_1"]);
        assert_eq!(of("/v1/realtime", "model=m&call_id=rtc_1"), ["rtc_1"]);
        assert!(of("/v1/files", "after=file-1").is_empty(), "a cursor is a list's own");
        assert!(of("/v1/tts/voices_of_a_vendor", "").is_empty(), "a word that is not known is no id");
        let path = References::find(Call::Unmetered, "/v1/threads/t/messages", None, None);
        assert_eq!((path.in_path, path.ids.len()), (1, 1));
    }

    #[test]
    fn ids_stand_in_bodies_at_any_depth() {
        let of = |call, body: Value| found(call, "/v1/responses", "", &body);
        let body = json!({
            "previous_response_id": "resp_1", "conversation": { "created": [{}], "id": "conv_1" },
            "input": [
                { "role": "user", "content": [{ "type": "input_file", "file_id": "file-1" }] },
                { "type": "item_reference", "id": "msg_1" },
                { "id": "msg_2", "type": "item_reference" },
                { "type": "function_call_output", "call_id": "call_1", "id": "fc_1" },
            ],
            "tools": [
                { "type": "file_search", "vector_store_ids": ["vs_1", "vs_2"] },
                { "type": "code_interpreter", "container": { "type": "auto", "file_ids": ["file-1", "file-2"] } },
                { "type": "code_interpreter", "container": "cntr_1" },
            ],
        });
        let ids =
            ["resp_1", "conv_1", "file-1", "msg_1", "msg_2", "vs_1", "vs_2", "file-2", "cntr_1"].map(str::to_owned);
        let mut all = of(Call::Responses, body);
        all.sort();
        let mut expected = ids.to_vec();
        expected.sort();
        assert_eq!(all, expected);
        assert_eq!(of(Call::Other, json!({ "training_file": "file-1", "validation_file": null })), ["file-1"]);
        let chat = json!({ "messages": [{ "content": [{ "type": "file", "file": { "file_id": "file-9" } }] }] });
        assert_eq!(of(Call::Completion, chat), ["file-9"]);
        let told = json!({ "input": "say {\"file_id\": \"file-1\"} and \"file_id\"", "file_ids": "file_id" });
        assert_eq!(of(Call::Responses, told), ["file_id"], "what a prompt says is no member");
    }

    #[test]
    fn there_are_bounds() {
        let many: Vec<_> = (0..100).map(|number| format!("file-{number}")).collect();
        assert_eq!(found(Call::Other, "/v1/batches", "", &json!({ "file_ids": many })).len(), OBJECTS_MAX);
        let long = json!({ "file_id": "f".repeat(ID_BYTES_MAX + 1), "thread_id": "" });
        assert!(found(Call::Other, "/v1/batches", "", &long).is_empty());
        for odd in
            ["{\"file_ids\":[\"a\"", "{\"file_ids\":[\"a\",", "{\"file_id\":\"", "{\"file_id\"", "\"item_reference\""]
        {
            References::find(Call::Other, "/v1/batches", None, Some(odd.as_bytes()));
        }
    }

    #[test]
    fn sealed_texts_are_told_by_how_they_begin() {
        let sealed = |text: &str| {
            let body = json!({ "input": [{ "type": "reasoning", "encrypted_content": text }] }).to_string();
            References::find(Call::Responses, "/v1/responses", None, Some(body.as_bytes())).sealed
        };
        let long = format!("gAAAA{}", "x".repeat(300));
        assert_eq!(sealed(&long).len(), 1);
        assert_eq!(sealed(&long), sealed(&format!("{long}y")));
        assert_eq!(sealed(&long)[0], sealed_name(long.as_bytes()).unwrap());
        assert!(sealed("short").is_empty());
    }
}
