//! The session of a request, as its client names it: requests of one session share a beginning, which their endpoint has in its
//! cache.

use std::borrow::Cow;
use std::hash::{DefaultHasher, Hasher};
use std::ops::Range;

use http::HeaderMap;
use serde::Deserialize;
use serde::de::{Deserializer as _, Error as _, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::json::part;
use crate::json::scan::{self, Key};

/// Longest name of a session in bytes; a longer one is none.
const NAME_BYTES_MAX: usize = 255;
/// Bytes of a prompt's beginning that are compared.
const PREFIX_BYTES_MAX: usize = 16 * 1024;
/// Messages that are looked at for the first one of the user.
const MESSAGES_MAX: usize = 64;
/// Longest `metadata` that is looked at; OpenAI's allows 16 pairs of 576 characters.
const METADATA_BYTES_MAX: usize = 64 * 1024;

/// Headers by which agents name a session, in the order in which they count.
const HEADERS: [&str; 3] = ["x-session-id", "session_id", "x-session-affinity"];
/// It names a session for some clients, and a single request for others.
const MAYBE_HEADER: &str = "x-client-request-id";

/// Members of a JSON body that name a session, or that its requests have in common, by their ranges.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SessionFields {
    /// `prompt_cache_key`.
    pub prompt_cache_key: Option<Range<usize>>,
    /// `metadata`.
    pub metadata: Option<Range<usize>>,
    /// `conversation`.
    pub conversation: Option<Range<usize>>,
    /// `system` or `instructions`.
    pub system: Option<Range<usize>>,
    /// `tools`.
    pub tools: Option<Range<usize>>,
    /// `messages` or `input`.
    pub messages: Option<Range<usize>>,
}

impl SessionFields {
    /// Takes a member in, if it is one of them.
    pub(super) fn take(&mut self, key: &[u8], range: impl FnOnce() -> Range<usize>) {
        let place = match key {
            b"prompt_cache_key" => &mut self.prompt_cache_key,
            b"metadata" => &mut self.metadata,
            b"conversation" => &mut self.conversation,
            b"system" | b"instructions" => &mut self.system,
            b"tools" => &mut self.tools,
            b"messages" | b"input" => &mut self.messages,
            _ => return,
        };
        *place = Some(range());
    }
}

/// A session, by a hash of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionName {
    /// Hash of the name and the model, the same in every process.
    pub hash: u64,
    /// Hash of the caller's name; 0 for requests with the key that all have.
    pub caller: u64,
    /// False if the name may be a single request's, and is a session's only if it comes again.
    pub is_certain: bool,
}

impl SessionName {
    /// Finds the session of a request for a model, if it has one. `prefix`: one that names none is known by how its prompt begins.
    pub fn find(
        headers: &HeaderMap,
        body: &[u8],
        fields: &SessionFields,
        (caller, model): (&str, Option<&str>),
        prefix: bool,
    ) -> Option<Self> {
        let of = (caller, model);
        let caller = if caller.is_empty() { 0 } else { hash(b"caller", (caller, None), []) };
        let header = |name: &str| Some(headers.get(name)?.as_bytes().trim_ascii()).filter(|value| is_name(value));
        let named = |name: &[u8]| Self { hash: hash(b"name", of, [name]), caller, is_certain: true };
        if let Some(name) = HEADERS.into_iter().find_map(header) {
            return Some(named(name));
        }
        let in_body = |field: &Option<Range<usize>>| field.as_ref().map(|range| part(body, range.clone()));
        let name = in_body(&fields.prompt_cache_key).and_then(name_of_json);
        let name = name.or_else(|| in_body(&fields.metadata).and_then(user_of_metadata));
        let name =
            name.or_else(|| in_body(&fields.conversation).and_then(name_of_json).filter(|name| !is_object_id(name)));
        if let Some(name) = name {
            return Some(named(name.as_bytes()));
        }
        if let Some(name) = header(MAYBE_HEADER) {
            return Some(Self { hash: hash(b"name", of, [name]), caller, is_certain: false });
        }
        if !prefix {
            return None;
        }
        let begins = fields.messages.as_ref().map(|range| first_messages(part(body, range.clone())));
        let begins = begins.filter(|begins| !begins.is_empty())?;
        let shared = [in_body(&fields.system), in_body(&fields.tools), Some(begins)];
        Some(Self { hash: hash(b"prefix", of, shared.into_iter().flatten()), caller, is_certain: true })
    }
}

fn is_name(value: &[u8]) -> bool {
    (1..=NAME_BYTES_MAX).contains(&value.len())
}

/// A conversation of OpenAI's is an object that one endpoint has.
fn is_object_id(name: &str) -> bool {
    name.starts_with("conv_")
}

/// The name in a JSON string.
fn name_of_json(raw: &[u8]) -> Option<Cow<'_, str>> {
    // Escapes make it longer.
    if raw.len() > 6 * NAME_BYTES_MAX {
        return None;
    }
    let Key(name) = serde_json::from_slice(raw).ok()?;
    Some(name).filter(|name| is_name(name.as_bytes()))
}

/// The name in `metadata.user_id`.
fn user_of_metadata(raw: &[u8]) -> Option<Cow<'_, str>> {
    #[derive(Deserialize)]
    struct Metadata<'a> {
        #[serde(borrow, default, deserialize_with = "scan::even_null")]
        user_id: Option<&'a RawValue>,
    }
    if raw.len() > METADATA_BYTES_MAX {
        return None;
    }
    let Metadata { user_id } = serde_json::from_slice(raw).ok()?;
    name_of_json(user_id?.get().as_bytes())
}

/// The beginning of a list of messages, up to the end of the first one that is the user's. Of a text, all of it.
fn first_messages(raw: &[u8]) -> &[u8] {
    struct UntilUser<'a>(&'a [u8], &'a mut usize);
    impl<'de> Visitor<'de> for UntilUser<'_> {
        type Value = ();

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("messages")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
            #[derive(Deserialize)]
            struct Message<'a> {
                #[serde(borrow, default, deserialize_with = "scan::even_null")]
                role: Option<&'a RawValue>,
            }
            for _ in 0..MESSAGES_MAX {
                let Some(message) = list.next_element::<&RawValue>()? else { return Ok(()) };
                let begins = (message.get().as_ptr() as usize).saturating_sub(self.0.as_ptr() as usize);
                *self.1 = begins + message.get().len();
                let role = serde_json::from_str::<Message<'_>>(message.get()).ok().and_then(|message| message.role);
                if role.is_some_and(|role| role.get() == "\"user\"") {
                    break;
                }
            }
            // What follows need not be read.
            Err(A::Error::custom("enough"))
        }
    }
    let mut end = raw.len();
    if raw.starts_with(b"[") {
        end = 0;
        // Its end has been noted, whatever comes of the rest.
        serde_json::Deserializer::from_slice(raw).deserialize_seq(UntilUser(raw, &mut end)).unwrap_or_default();
    }
    part(raw, ..end)
}

/// A hash that is the same in every process, of as much as is compared.
fn hash<'a>(kind: &[u8], (caller, model): (&str, Option<&str>), parts: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    let mut hasher = DefaultHasher::new();
    let mut left = PREFIX_BYTES_MAX;
    let mut write = |bytes: &[u8]| {
        hasher.write(&(bytes.len() as u64).to_le_bytes());
        hasher.write(bytes);
    };
    write(kind);
    write(model.unwrap_or_default().as_bytes());
    if !caller.is_empty() {
        write(caller.as_bytes());
    }
    for text in parts {
        let text = part(text, ..text.len().min(left));
        left -= text.len();
        write(text);
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::fields;
    use http::HeaderValue;
    use serde_json::{Value, json};

    fn found(headers: &[(&'static str, &str)], body: &Value, prefix: bool) -> Option<SessionName> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, HeaderValue::from_str(value).unwrap());
        }
        let body = body.to_string();
        let fields = fields::scan(body.as_bytes()).unwrap();
        let model = fields.model.as_ref().map(|model| &*model.name);
        SessionName::find(&map, body.as_bytes(), &fields.session, ("", model), prefix)
    }

    #[test]
    fn the_first_name_counts_wherever_it_stands() {
        let name = |name: &str| {
            Some(SessionName { hash: hash(b"name", ("", None), [name.as_bytes()]), caller: 0, is_certain: true })
        };
        let all = json!({ "prompt_cache_key": "key", "metadata": { "user_id": "user" }, "conversation": "talk" });
        let headers = [("x-session-id", "one"), ("session_id", "two"), ("x-session-affinity", "three")];
        for first in 0..3 {
            let expected = ["one", "two", "three"][first];
            assert_eq!(found(&headers[first..], &all, false), name(expected));
        }
        assert_eq!(found(&[("x-client-request-id", "r")], &all, false), name("key"));
        for (body, expected) in [
            (json!({ "prompt_cache_key": null, "metadata": { "user_id": "user" } }), Some("user")),
            (json!({ "metadata": { "user_id": 7 }, "conversation": "t\u{e4}lk" }), Some("t\u{e4}lk")),
            (json!({ "metadata": null, "conversation": "conv_1" }), None),
            (json!({ "conversation": { "id": "conv_1" } }), None),
            (json!({ "prompt_cache_key": "", "metadata": "m" }), None),
            (json!({ "prompt_cache_key": "k".repeat(256) }), None),
        ] {
            assert_eq!(found(&[], &body, false), expected.and_then(name), "{body}");
        }
        assert_eq!(found(&[("session_id", " ")], &json!({}), false), None);
        let maybe = found(&[("x-client-request-id", "r")], &json!({}), false).unwrap();
        assert!(!maybe.is_certain);
    }

    #[test]
    fn a_session_is_one_for_each_model() {
        let of = |model: &str| found(&[], &json!({ "model": model, "prompt_cache_key": "k" }), false);
        assert_ne!(of("a"), of("b"));
    }

    #[test]
    fn a_prompt_that_begins_alike_is_one_session() {
        let system = json!({ "role": "system", "content": "be brief" });
        let user = |text: &str| json!({ "role": "user", "content": text });
        let turn = |more: &[Value]| {
            let mut messages = vec![system.clone(), user("hello")];
            messages.extend_from_slice(more);
            json!({ "messages": messages, "tools": [{ "type": "function" }] })
        };
        let first = found(&[], &turn(&[]), true);
        assert!(first.is_some());
        assert_eq!(found(&[], &turn(&[json!({ "role": "assistant" }), user("and?")]), true), first);
        assert_eq!(found(&[], &turn(&[]), false), None, "it is not wanted");
        let mut other = turn(&[]);
        other["tools"] = json!([]);
        assert_ne!(found(&[], &other, true), first);
        assert_ne!(found(&[], &json!({ "messages": [system, user("bye")] }), true), first);
        let responses = |input: Value| found(&[], &json!({ "instructions": "i", "input": input }), true);
        assert_eq!(responses(json!("hello")), responses(json!("hello")));
        assert_ne!(responses(json!("hello")), responses(json!("bye")));
        assert_eq!(responses(json!([])), None);
        // A long prompt is compared as far as is affordable.
        let long = |end: &str| responses(json!(format!("{}{end}", "x".repeat(PREFIX_BYTES_MAX))));
        assert_eq!(long("a"), long("b"));
    }

    #[test]
    fn the_hash_is_the_same_in_every_build() {
        // What is in the ledger was written by an earlier build.
        assert_eq!(hash(b"name", ("", Some("gpt-4o")), [&b"session"[..]]), 11_736_326_259_625_821_589);
        let other = hash(b"name", ("ada", Some("gpt-4o")), [&b"session"[..]]);
        assert_ne!(other, 11_736_326_259_625_821_589, "another caller's is another session");
    }
}
