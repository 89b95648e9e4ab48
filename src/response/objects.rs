//! The objects in an answer, by their ids: the one that it makes or shows, those that it lists, and the items that a later request may
//! refer to. They are at the endpoint that answers, and nowhere else.

use std::sync::Arc;

use bytes::Bytes;
use memchr::memmem;
use serde_json::Value;

use super::sse::Splitter;
use crate::request::references::{ID_BYTES_MAX, sealed_name};

/// Bytes of a JSON answer that are kept to be read at its end. Of a longer one the first ones are searched for its own id.
const JSON_BYTES_MAX: usize = 1024 * 1024;
const HEAD_BYTES_MAX: usize = 4096;
/// Objects of one answer that are noted: a list has a hundred.
const OBJECTS_MAX: usize = 256;
/// Events of a stream that may name the object that it makes.
const FIRST_EVENTS: usize = 4;
/// Names that stand in later events with ids.
const EVENTS_WITH_IDS: [&[u8]; 3] = [b"response.output_item.done", b"signature_delta", b"thread.run.created"];

/// What is looked for in an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Objects.
    pub objects: bool,
    /// Texts that only the organisation can read that wrote them.
    pub sealed: bool,
    /// The audio of a chat, which a later turn may name.
    pub audio: bool,
}

/// Something that is at the endpoint that answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// An object, by its id.
    Object(Arc<str>),
    /// A sealed text, by its name.
    Sealed(Arc<str>),
}

/// Reader of one answer's body.
#[derive(Debug)]
pub struct ObjectReader {
    wanted: Wanted,
    body: Body,
    found: Vec<Found>,
}

#[derive(Debug)]
enum Body {
    Json { pieces: Vec<Bytes>, kept: usize },
    Stream { splitter: Box<Splitter>, events: usize },
}

impl ObjectReader {
    /// A reader of an answer that is a stream, or JSON.
    pub fn new(wanted: Wanted, is_stream: bool) -> Self {
        let body = if is_stream {
            Body::Stream { splitter: Box::default(), events: 0 }
        } else {
            Body::Json { pieces: Vec::new(), kept: 0 }
        };
        Self { wanted, body, found: Vec::new() }
    }

    /// Reads a piece of the body.
    pub fn piece(&mut self, piece: &Bytes) {
        let Self { wanted, body, found } = self;
        match body {
            Body::Json { pieces, kept } => {
                if *kept <= JSON_BYTES_MAX {
                    pieces.push(piece.clone());
                }
                *kept += piece.len();
            }
            Body::Stream { splitter, events } => splitter.feed(piece, |data| {
                let Some(data) = data else { return };
                *events += 1;
                if wanted.audio
                    && let Some(id) = audio_id(data)
                {
                    note(found, Found::Object(id));
                    wanted.audio = false;
                }
                let names_ids = || EVENTS_WITH_IDS.iter().any(|name| memmem::find(data, name).is_some());
                if (*events <= FIRST_EVENTS || names_ids())
                    && let Ok(value) = serde_json::from_slice(data)
                {
                    read(&value, *wanted, found);
                }
            }),
        }
    }

    /// Reads the end of the body.
    pub fn end(&mut self) {
        let Body::Json { pieces, kept } = &mut self.body else { return };
        let body = std::mem::take(pieces).concat();
        if let Some(id) = audio_id(&body).filter(|_| self.wanted.audio) {
            note(&mut self.found, Found::Object(id));
        }
        if *kept > JSON_BYTES_MAX {
            let head = body.get(..HEAD_BYTES_MAX.min(body.len())).unwrap_or_default();
            if let Some(id) = first_id(head).filter(|_| self.wanted.objects) {
                note(&mut self.found, Found::Object(id));
            }
        } else if let Ok(value) = serde_json::from_slice(&body) {
            read(&value, self.wanted, &mut self.found);
        }
    }

    /// Takes what has been found since the last time.
    pub fn take_found(&mut self) -> Vec<Found> {
        std::mem::take(&mut self.found)
    }
}

/// Members of an object that name others which were made with it.
const MADE_WITH_IT: [&str; 6] = ["id", "thread_id", "output_file_id", "error_file_id", "container_id", "conversation"];

/// Reads an answer, or an event.
fn read(value: &Value, wanted: Wanted, found: &mut Vec<Found>) {
    object(value, wanted, found);
    for member in ["response", "item", "file", "conversation", "delta"] {
        if let Some(inner) = value.get(member).filter(|inner| inner.is_object()) {
            object(inner, wanted, found);
        }
    }
    let lists = [value.get("data"), value.get("output"), value.get("content"), value.pointer("/response/output")];
    for item in lists.into_iter().flatten().filter_map(Value::as_array).flatten() {
        object(item, wanted, found);
    }
    let files = value.get("result_files").and_then(Value::as_array).into_iter().flatten();
    for id in files.filter(|_| wanted.objects).filter_map(id_of) {
        note(found, Found::Object(id));
    }
}

/// Takes what one JSON object names.
fn object(value: &Value, wanted: Wanted, found: &mut Vec<Found>) {
    if wanted.objects {
        for id in MADE_WITH_IT.into_iter().filter_map(|member| id_of(value.get(member)?)) {
            note(found, Found::Object(id));
        }
    }
    if wanted.sealed {
        let texts = ["encrypted_content", "signature"].into_iter().filter_map(|member| value.get(member)?.as_str());
        for name in texts.filter_map(|text| sealed_name(text.as_bytes())) {
            note(found, Found::Sealed(name));
        }
    }
}

fn id_of(value: &Value) -> Option<Arc<str>> {
    value.as_str().filter(|id| (1..=ID_BYTES_MAX).contains(&id.len())).map(Into::into)
}

/// The `id` that an object of which only the beginning is known begins with, or nearly so.
fn first_id(head: &[u8]) -> Option<Arc<str>> {
    let (_, id) = crate::json::scan::strings(head).find(|(key, _)| *key == b"id")?;
    Some(std::str::from_utf8(id).ok()?.into())
}

/// The id of the audio in a chat's answer. It stands before the sound itself, which is long.
fn audio_id(body: &[u8]) -> Option<Arc<str>> {
    // As the value of a key, so not in a text, whose quotation marks are escaped.
    let is_value = |at: &usize| {
        let key = body.get(..*at).unwrap_or_default().trim_ascii_end().strip_suffix(b":");
        key.is_some_and(|key| key.trim_ascii_end().ends_with(b"\"id\""))
    };
    let at = memmem::find_iter(body, b"\"audio_").find(is_value)?;
    let id = body.get(at + 1..)?;
    let id = id.get(..memchr::memchr(b'"', id.get(..ID_BYTES_MAX + 1).unwrap_or(id))?)?;
    // No escapes are in it, nor anything that is not a word's.
    let is_word = id.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
    Some(std::str::from_utf8(id).ok().filter(|_| is_word)?.into())
}

fn note(found: &mut Vec<Found>, one: Found) {
    if found.len() < OBJECTS_MAX && !found.contains(&one) {
        found.push(one);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const ALL: Wanted = Wanted { objects: true, sealed: true, audio: false };

    fn names(found: Vec<Found>) -> Vec<String> {
        let name = |found| match found {
            Found::Object(id) => id.to_string(),
            Found::Sealed(name) => format!("sealed {}", &name[..5]),
        };
        found.into_iter().map(name).collect()
    }

    fn in_json(answer: &Value, wanted: Wanted) -> Vec<String> {
        let text = answer.to_string();
        let mut reader = ObjectReader::new(wanted, false);
        for piece in text.as_bytes().chunks(7) {
            reader.piece(&Bytes::copy_from_slice(piece));
        }
        reader.end();
        names(reader.take_found())
    }

    #[test]
    fn an_answer_names_itself_and_what_was_made_with_it() {
        let seal = "x".repeat(100);
        for (answer, expected) in [
            (json!({ "id": "file-1", "object": "file" }), &["file-1"][..]),
            (json!({ "id": "batch_1", "output_file_id": "file-2", "error_file_id": null }), &["batch_1", "file-2"]),
            (json!({ "id": "run_1", "thread_id": "thread_1" }), &["run_1", "thread_1"]),
            (json!({ "id": "ftjob-1", "result_files": ["file-3"] }), &["ftjob-1", "file-3"]),
            (json!({ "id": "upload_1", "file": { "id": "file-4" } }), &["upload_1", "file-4"]),
            (json!({ "object": "list", "data": [{ "id": "a" }, { "id": "b" }], "first_id": "a" }), &["a", "b"]),
            (
                json!({ "id": "resp_1", "conversation": { "id": "conv_1" }, "output": [
                    { "id": "rs_1", "encrypted_content": seal }, { "id": "ci_1", "container_id": "cntr_1" }] }),
                &["resp_1", "conv_1", "rs_1", "sealed xxxxx", "ci_1", "cntr_1"],
            ),
            (json!({ "content": [{ "type": "thinking", "signature": seal }] }), &["sealed xxxxx"]),
            (json!({ "id": 7, "data": "text" }), &[]),
            (json!([]), &[]),
        ] {
            assert_eq!(in_json(&answer, ALL), expected, "{answer}");
        }
        let answer = json!({ "id": "msg_1", "content": [{ "signature": seal }] });
        assert_eq!(in_json(&answer, Wanted { objects: false, sealed: true, audio: false }), ["sealed xxxxx"]);
        assert_eq!(in_json(&answer, Wanted { objects: true, sealed: false, audio: false }), ["msg_1"]);
    }

    #[test]
    fn a_chat_names_its_audio_however_long_that_is() {
        let wanted = Wanted { audio: true, ..Wanted::default() };
        let audio = |data: &str| json!({ "id": "audio_68-a", "data": data });
        for data in ["c291bmQ=", &"y".repeat(JSON_BYTES_MAX)] {
            let answer = json!({ "id": "chatcmpl-1", "choices": [{ "message": { "audio": audio(data) } }] });
            assert_eq!(in_json(&answer, wanted), ["audio_68-a"]);
        }
        let text = json!({ "choices": [{ "message": { "content": "say \"audio_x" } }] });
        assert!(in_json(&text, wanted).is_empty(), "{text}");
        let mut reader = ObjectReader::new(wanted, true);
        for delta in [json!({}), audio("c291"), audio("bmQ=")] {
            reader.piece(&format!("data: {}\n\n", json!({ "choices": [{ "delta": { "audio": delta } }] })).into());
        }
        assert_eq!(names(reader.take_found()), ["audio_68-a"]);
    }

    #[test]
    fn a_long_answer_names_itself() {
        let answer = json!({ "object": "response", "id": "resp_1", "output": [{ "id": "x", "text": "y".repeat(JSON_BYTES_MAX) }] });
        assert_eq!(in_json(&answer, ALL), ["resp_1"]);
    }

    #[test]
    fn a_stream_names_what_it_makes_as_it_passes() {
        let seal = "x".repeat(100);
        let events = [
            json!({ "type": "response.created", "response": { "id": "resp_1" } }),
            json!({ "type": "response.output_text.delta", "item_id": "msg_1", "delta": "one" }),
            json!({ "type": "response.output_text.delta", "item_id": "msg_1", "delta": "two" }),
            json!({ "type": "response.output_text.delta", "item_id": "msg_1", "delta": "three" }),
            json!({ "type": "response.output_text.delta", "item_id": "msg_1", "delta": "four" }),
            json!({ "type": "response.output_item.done", "item": { "id": "rs_1", "encrypted_content": seal } }),
            json!({ "type": "content_block_delta", "delta": { "type": "signature_delta", "signature": seal } }),
        ];
        let mut reader = ObjectReader::new(ALL, true);
        let stream: String = events.iter().map(|event| format!("data: {event}\n\n")).collect::<Vec<_>>().concat();
        let (first, rest) = stream.as_bytes().split_at(90);
        reader.piece(&Bytes::copy_from_slice(first));
        assert_eq!(names(reader.take_found()), ["resp_1"], "before the stream ends");
        rest.chunks(11).for_each(|piece| reader.piece(&Bytes::copy_from_slice(piece)));
        assert_eq!(names(reader.take_found()), ["rs_1", "sealed xxxxx"]);
    }
}
