//! The objects that a request names, by their ids: files, stored responses, conversations and others that were made at one
//! endpoint and are nowhere else. They stand in its path, its query and its body.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, LazyLock};

use aho_corasick::AhoCorasick;
use percent_encoding::percent_decode;
use serde::de::{Deserializer as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::call::Call;
use super::shape;
use crate::json::part;
use crate::json::scan::Key;

/// Objects of one request that are looked for; a request with more names the same endpoint by the first ones.
pub const OBJECTS_MAX: usize = 32;
/// Longest id in bytes; a longer text is none.
pub const ID_BYTES_MAX: usize = 255;
/// The same as a JSON string, each of whose bytes may be an escape of six.
const QUOTED_BYTES_MAX: usize = 6 * ID_BYTES_MAX + 2;
/// Bytes before the type of an item in which its object begins.
const ITEM_BYTES_MAX: usize = 512;
/// Bytes of an object in which its `id` stands.
const OBJECT_BYTES_MAX: usize = 4096;
/// JSON objects of one body that are read for their `id`, so that a body full of them costs no more than its length.
const LOOKS_MAX: usize = 256;
/// Bytes of a text that was sealed for one organisation by which it is told from others: they hold when it was written, and a random
/// number.
const SEALED_BYTES: usize = 128;

/// Members of JSON bodies whose value is an id, a list of ids, or an object with an `id`, as they stand in a body.
const KEYS: [&str; 25] = [
    PREVIOUS_RESPONSE,
    CONVERSATION,
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
    "\"agent_id\"",
    "\"certificate_ids\"",
    "\"comparison_response_id\"",
    "\"project_id\"",
    "\"vault_ids\"",
    VIDEO,
    VOICE,
];
const PREVIOUS_RESPONSE: &str = "\"previous_response_id\"";
/// Clients of relays put the name of their session there.
const CONVERSATION: &str = "\"conversation\"";
/// As texts these are names, such as `alloy`; as objects with an `id` they are what somebody made.
const VIDEO: &str = "\"video\"";
const VOICE: &str = "\"voice\"";
/// An item of an earlier answer, by its id.
const ITEM_REFERENCE: &str = "\"item_reference\"";
/// How ids begin that endpoints make up. Other texts under these keys may be anything, such as an argument of a tool.
const KINDS: [&str; 37] = [
    "asst_",
    "batch_",
    "cfile_",
    "chatcmpl-",
    "ci_",
    "cntr_",
    "conv_",
    "cu_",
    "eval_",
    "evalrun_",
    "fc_",
    "file-",
    "file_",
    "fs_",
    "ft-",
    "ftckpt_",
    "ftjob-",
    "ig_",
    "item_",
    "lsh_",
    "mcp_",
    "mcpl_",
    "msg_",
    "msgbatch_",
    "resp_",
    "rs_",
    "rtc_",
    "run_",
    "sess_",
    "skill_",
    "step_",
    "thread_",
    "upload_",
    "video_",
    "vs_",
    "vsfb_",
    "ws_",
];
/// Texts that only the organisation that wrote them can read: reasoning, and the signature of thinking.
const SEALED: [&str; 2] = ["\"encrypted_content\"", "\"signature\""];

/// Calls but the simplest may name any of them.
static ANY: LazyLock<Option<AhoCorasick>> = LazyLock::new(|| {
    let patterns = KEYS.into_iter().chain([ITEM_REFERENCE]).chain(SEALED);
    AhoCorasick::new(patterns).inspect_err(|error| log::error!("ids cannot be searched for: {error}")).ok()
});
/// A chat may name files, and the audio of an earlier turn, only.
static OF_CHAT: LazyLock<Option<AhoCorasick>> = LazyLock::new(|| {
    AhoCorasick::new(["\"file_id\"", AUDIO])
        .inspect_err(|error| log::error!("ids cannot be searched for: {error}"))
        .ok()
});
const AUDIO: &str = "\"audio\"";

/// An object that a request names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// Its id.
    pub id: Arc<str>,
    /// True if it is an id even if nobody knows it. Another text binds the request only if an answer has shown it as one.
    pub is_certain: bool,
}

/// Objects that a request names.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct References {
    /// The objects, as they stand in path, query and body in this order; each once.
    pub objects: Vec<Reference>,
    /// The object that the request is about: the only one in its path, at its end.
    pub subject: Option<Arc<str>>,
    /// Names of texts that were sealed for one organisation, the last ones of the body.
    pub sealed: Vec<Arc<str>>,
    /// True if it names more than are looked for.
    pub is_cut: bool,
    /// True if it is a chat that is spoken, or asks for that, so that a later turn may name its audio.
    pub has_audio: bool,
    /// JSON objects that have been read for their `id`.
    looks: usize,
}

impl References {
    /// Finds them. `json` is the body, if it is JSON.
    pub fn find(call: Call, path: &str, query: Option<&str>, json: Option<&[u8]>) -> Self {
        let mut found = Self::default();
        for segment in shape::ids(path).filter(|_| names_objects(path)) {
            found.add(&percent_decode(segment.as_bytes()).decode_utf8_lossy(), true);
        }
        if let [only] = &*found.objects
            && shape::ids(path).last().is_some_and(|last| path.ends_with(last))
        {
            found.subject = Some(Arc::clone(&only.id));
        }
        let pairs = query.into_iter().flat_map(|query| query.split('&')).filter_map(|pair| pair.split_once('='));
        for (_, id) in pairs.filter(|(name, _)| *name == "call_id") {
            found.add(&percent_decode(id.as_bytes()).decode_utf8_lossy(), true);
        }
        if let Some(json) = json {
            found.search(call, json);
        }
        found
    }

    /// Adds the ids that stand in fields of a form, at these places.
    pub fn add_fields(&mut self, form: &[u8], fields: &[Range<usize>]) {
        for field in fields {
            let id = String::from_utf8_lossy(part(form, field.clone()));
            self.add(&id, KINDS.iter().any(|kind| id.starts_with(kind)));
        }
    }

    /// True if it names none.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty() && self.sealed.is_empty()
    }

    fn search(&mut self, call: Call, json: &[u8]) {
        match call {
            Call::Embeddings => {}
            Call::Completion => {
                for found in OF_CHAT.iter().flat_map(|of_chat| of_chat.find_iter(json)) {
                    self.member(json, found.range());
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
        let Some(value) = value_of(json, key.clone()) else { return };
        match (value.first(), part(json, key)) {
            (Some(b'"'), name) if name == CONVERSATION.as_bytes() && !value.starts_with(b"\"conv_") => {}
            (Some(b'"'), name) if [VIDEO, VOICE, AUDIO].iter().any(|one| name == one.as_bytes()) => {}
            (Some(b'"'), name) => drop(self.text(value, name == PREVIOUS_RESPONSE.as_bytes())),
            (Some(b'['), _) => self.list(part(value, 1..)),
            (Some(b'{'), name) => {
                self.has_audio |= name == AUDIO.as_bytes();
                self.object(value);
            }
            _ => {}
        }
    }

    /// Takes the ids of a list of strings, behind its bracket.
    fn list(&mut self, list: &[u8]) {
        let mut rest = list.trim_ascii_start();
        while rest.starts_with(b"\"") && !self.is_cut {
            let Some(length) = self.text(rest, false) else { return };
            let after = part(rest, length..).trim_ascii_start();
            rest = after.strip_prefix(b",").unwrap_or_default().trim_ascii_start();
        }
    }

    /// Takes the id that a JSON string holds, and returns the string's length. None if it is too long for an id.
    fn text(&mut self, value: &[u8], is_certain: bool) -> Option<usize> {
        let value = part(value, ..value.len().min(QUOTED_BYTES_MAX));
        let mut values = serde_json::Deserializer::from_slice(value).into_iter::<Key<'_>>();
        let Key(id) = values.next()?.ok()?;
        self.add(&id, is_certain || KINDS.iter().any(|kind| id.starts_with(kind)));
        Some(values.byte_offset())
    }

    /// Takes the `id` of a JSON object.
    fn object(&mut self, value: &[u8]) {
        if self.looks >= LOOKS_MAX || self.objects.len() >= OBJECTS_MAX {
            self.is_cut = true;
            return;
        }
        self.looks += 1;
        let mut found = None;
        let value = part(value, ..value.len().min(OBJECT_BYTES_MAX));
        // What comes behind it is not read, and may be cut off.
        if serde_json::Deserializer::from_slice(value).deserialize_map(IdOf { found: &mut found }).is_err() {
            log::trace!("a JSON object was read as far as its id");
        }
        if let Some(id) = found {
            self.text(id.get().as_bytes(), false);
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
            && !self.sealed.contains(&name)
        {
            if self.sealed.len() >= OBJECTS_MAX {
                self.sealed.remove(0);
            }
            self.sealed.push(name);
        }
    }

    fn add(&mut self, id: &str, is_certain: bool) {
        let is_id = (1..=ID_BYTES_MAX).contains(&id.len());
        self.is_cut |= is_id && self.objects.len() >= OBJECTS_MAX;
        if is_id && self.objects.len() < OBJECTS_MAX && !self.objects.iter().any(|known| *known.id == *id) {
            self.objects.push(Reference { id: id.into(), is_certain });
        }
    }
}

/// Reads an object up to its `id`.
struct IdOf<'f, 'de> {
    found: &'f mut Option<&'de RawValue>,
}

impl<'de> Visitor<'de> for IdOf<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Key(key)) = map.next_key()? {
            if key == "id" {
                *self.found = Some(map.next_value()?);
                return Ok(());
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

/// Fields of forms whose value is an id: what SDKs make of objects is `video[id]`, `input_reference[file_id]` and the like.
const FIELDS: [&[u8]; 2] = [b"consent", b"file_id"];
const FIELD_ENDS: [&[u8]; 3] = [b"[id]", b"[file_id]", b"file_ids[]"];

/// True if a field of a form may be the id of an object.
pub(crate) fn is_field_of_object(name: &[u8]) -> bool {
    FIELDS.contains(&name) || FIELD_ENDS.iter().any(|end| name.ends_with(end))
}

/// First segments of the paths of calls that make, show or list objects.
const COLLECTIONS: [&str; 24] = [
    "agents",
    "assistants",
    "batches",
    "chat",
    "chatkit",
    "containers",
    "conversations",
    "evals",
    "files",
    "fine_tuning",
    "live",
    // A model that was fine-tuned is deleted where it is; all models are shown by the gateway itself.
    "models",
    "organization",
    "projects",
    "realtime",
    "responses",
    "safety",
    "skills",
    "threads",
    "uploads",
    "vaults",
    "vector_stores",
    "videos",
    "webhook_endpoints",
];

/// True if the segments of a path that are no words of the API are ids of objects.
fn names_objects(path: &str) -> bool {
    let path = path.strip_prefix("/v1/").unwrap_or_default();
    let first = path.split('/').next().unwrap_or_default();
    COLLECTIONS.contains(&first) || ["messages/batches", "audio/voice"].iter().any(|begin| path.starts_with(begin))
}

/// True if the answer to a call may name objects that stay at its endpoint. `store`: what the request says of storing the answer.
pub fn shows_objects(call: Call, path: &str, store: Option<bool>) -> bool {
    match call {
        Call::Completion => store == Some(true),
        Call::Responses => store != Some(false),
        Call::Messages | Call::Embeddings => false,
        // What a file holds is not the answer of an API, even if it looks like one.
        Call::Other | Call::Unmetered => {
            names_objects(path) && !["/content", "/results"].iter().any(|end| path.ends_with(end))
        }
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
        references.objects.iter().map(|one| one.id.to_string()).collect()
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
        for path in
            ["/v1/videos/video_1/remix", "/v1/realtime/calls/rtc_1/accept", "/v1/fine_tuning/jobs/ftjob-1/pause"]
        {
            assert_eq!(of(path, "").len(), 1, "{path}: a word that is not known is no id");
        }
        assert_eq!(of("/v1/skills/skill_1/versions/2", ""), ["skill_1"]);
        assert!(of("/v1/threads", "user_id=u1&session_id=s1").is_empty());
        let subject = |path| References::find(Call::Unmetered, path, None, None).subject;
        assert_eq!(subject("/v1/files/file-1").as_deref(), Some("file-1"));
        assert_eq!(subject("/v1/chat/completions/chatcmpl-1").as_deref(), Some("chatcmpl-1"));
        for path in ["/v1/files/file-1/content", "/v1/vector_stores/vs_1/files/file-1", "/v1/files"] {
            assert_eq!(subject(path), None, "{path}: it is about no object, or takes none away");
        }
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
        let voice = |voice: Value| of(Call::Other, json!({ "model": "tts", "voice": voice }));
        assert_eq!(voice(json!({ "id": "voice_1" })), ["voice_1"]);
        assert!(voice(json!("alloy")).is_empty());
        let told = json!({ "input": "say {\"file_id\": \"file-1\"} and \"file_id\"", "file_ids": "file_id" });
        assert_eq!(of(Call::Responses, told), ["file_id"], "what a prompt says is no member");
    }

    #[test]
    fn ids_stand_in_the_fields_of_forms() {
        for name in ["consent", "file_id", "video[id]", "input_reference[file_id]", "file_ids[]"] {
            assert!(is_field_of_object(name.as_bytes()), "{name}");
        }
        for name in ["model", "prompt", "file", "id", "[id"] {
            assert!(!is_field_of_object(name.as_bytes()), "{name}");
        }
        let mut references = References::default();
        references.add_fields(b"file-1 cons_2", &[0..6, 7..13, 6..6]);
        let found: Vec<_> = references.objects.iter().map(|one| (&*one.id, one.is_certain)).collect();
        assert_eq!(found, [("file-1", true), ("cons_2", false)]);
    }

    #[test]
    fn a_text_that_may_be_anything_is_not_certain() {
        let of = |body: Value| {
            let body = body.to_string();
            References::find(Call::Messages, "/v1/messages", None, Some(body.as_bytes())).objects
        };
        let tool = |input: Value| json!({ "messages": [{ "content": [{ "type": "tool_use", "input": input }] }] });
        for input in [json!({ "container": "web-1" }), json!({ "thread_id": "17" }), json!({ "file_id": "a/b" })] {
            assert!(of(tool(input.clone())).iter().all(|one| !one.is_certain), "{input}");
        }
        assert!(of(tool(json!({ "conversation": "chat-1" }))).is_empty(), "the name of a session");
        let certain =
            json!({ "previous_response_id": "7c1", "conversation": "conv_1", "input": [{ "file_id": "file-1" }] });
        assert!(of(certain.clone()).len() == 3 && of(certain).iter().all(|one| one.is_certain));
        assert!(of(json!({ "container": { "id": "cntr_1", "cut": "x".repeat(OBJECT_BYTES_MAX) } }))[0].is_certain);
    }

    #[test]
    fn reading_is_linear_in_the_body() {
        let mut deep = String::new();
        for _ in 0..100 {
            deep.push_str("{\"a\":[");
            deep.push_str(&"\"item_reference\",".repeat(28));
            deep.push_str("0],\"b\":");
        }
        let body = deep.clone() + "\"" + &"x".repeat(4 * 1024 * 1024) + "\"" + &"}".repeat(100);
        serde_json::from_str::<serde::de::IgnoredAny>(&body).unwrap();
        let references = References::find(Call::Responses, "/v1/responses", None, Some(body.as_bytes()));
        assert_eq!((references.objects.len(), references.looks), (0, LOOKS_MAX));
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
        let many: Vec<_> = (0..100).map(|number| json!({ "signature": format!("{number:0>90}") })).collect();
        let body = json!({ "messages": many }).to_string();
        let last = References::find(Call::Messages, "/v1/messages", None, Some(body.as_bytes())).sealed;
        assert_eq!((last.len(), last.last().map(|name| &name[88..])), (OBJECTS_MAX, Some("99")));
    }
}
