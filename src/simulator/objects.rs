//! Objects that a simulator keeps, if its options say so: files, stored responses and the others that clients make, show, list and delete. Each
//! simulator knows its own only.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use http::Method;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use super::record::Arrived;
use super::reply::Reply;

/// Objects kept; a test that makes more has forgotten to stop.
const OBJECTS_MAX: usize = 100_000;
/// Objects of a page, unless the client says otherwise.
const PAGE: usize = 20;
const PAGE_MAX: usize = 100;

/// Collections by their paths under `/v1/`, with the beginning of their ids, and the name of their objects.
const COLLECTIONS: [(&str, &str, &str); 13] = [
    ("fine_tuning/jobs", "ftjob-", "fine_tuning.job"),
    ("chat/completions", "chatcmpl-", "chat.completion"),
    ("messages/batches", "msgbatch_", "message_batch"),
    ("files", "file-", "file"),
    ("batches", "batch_", "batch"),
    ("responses", "resp_", "response"),
    ("conversations", "conv_", "conversation"),
    ("threads", "thread_", "thread"),
    ("assistants", "asst_", "assistant"),
    ("vector_stores", "vs_", "vector_store"),
    ("uploads", "upload_", "upload"),
    ("containers", "cntr_", "container"),
    ("videos", "video_", "video"),
];

/// Members of a body that name an object.
const REFERENCES: [&str; 6] =
    ["previous_response_id", "conversation", "input_file_id", "training_file", "assistant_id", "thread_id"];

/// Objects of one simulator, in the order in which they were made.
#[derive(Default)]
pub(super) struct Objects {
    made: BTreeMap<u64, Value>,
}

impl Objects {
    /// Answers a call about objects; none if it is about none.
    pub(super) fn answer(&mut self, arrived: &Arrived, number: u64) -> Option<Reply> {
        let (path, query) = arrived.path_and_query.split_once('?').unwrap_or((&arrived.path_and_query, ""));
        let (_, path) = path.split_once("/v1/")?;
        let (collection, prefix, name) = COLLECTIONS.into_iter().find(|(begin, ..)| {
            path.strip_prefix(begin).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })?;
        let rest = path.get(collection.len()..)?.trim_matches('/');
        match (rest, &arrived.method) {
            ("", &Method::GET) => Some(self.list(name, query)),
            // The model answers these.
            ("", _) if matches!(collection, "responses" | "chat/completions") => None,
            ("", _) => Some(self.make(&format!("{prefix}{number:x}"), name, number, &arrived.body)),
            (rest, method) => {
                let mut segments = rest.split('/');
                let id = percent_decode_str(segments.next()?).decode_utf8_lossy();
                Some(self.about(&id, segments.next(), method))
            }
        }
    }

    /// Keeps an answer that a model made, if it is stored, and makes what it answers to known.
    pub(super) fn keep(&mut self, id: &str, name: &str, number: u64) {
        self.put(number, json!({ "id": id, "object": name, "created_at": now() }));
    }

    /// The first object that a body names and this simulator does not have.
    pub(super) fn missing(&self, body: &[u8]) -> Option<Reply> {
        let body: Value = serde_json::from_slice(body).ok()?;
        let named = REFERENCES.into_iter().filter_map(|member| Some((member, body.get(member)?.as_str()?)));
        let (member, id) = named.into_iter().find(|(_, id)| !self.has(id))?;
        Some(if member == "previous_response_id" {
            let message = format!("Previous response with id '{id}' not found.");
            Reply::error(400, &message, Some("previous_response_not_found"))
        } else {
            not_found(id)
        })
    }

    fn has(&self, id: &str) -> bool {
        self.made.values().any(|one| one["id"] == id || one["output_file_id"] == id)
    }

    fn make(&mut self, id: &str, name: &str, number: u64, body: &[u8]) -> Reply {
        if let Some(missing) = self.missing(body) {
            return missing;
        }
        let output = (name == "batch").then(|| format!("file-out-{number:x}"));
        let made = json!({ "id": id, "object": name, "created_at": now(), "output_file_id": output });
        self.put(number, made.clone());
        Reply::json(200, made.to_string())
    }

    fn put(&mut self, number: u64, made: Value) {
        if self.made.len() >= OBJECTS_MAX {
            self.made.pop_first();
        }
        self.made.insert(number, made);
    }

    fn about(&mut self, id: &str, part: Option<&str>, method: &Method) -> Reply {
        if !self.has(id) {
            return not_found(id);
        }
        if *method == Method::DELETE && part.is_none() {
            self.made.retain(|_, one| one["id"] != id);
            return Reply::json(200, json!({ "id": id, "deleted": true }).to_string());
        }
        if part == Some("content") {
            return Reply::json(200, format!("content of {id}"));
        }
        let found = self.made.values().find(|one| one["id"] == id);
        let object = found.cloned().unwrap_or_else(|| json!({ "id": id, "object": "file" }));
        Reply::json(200, object.to_string())
    }

    /// A page of the objects of one name, the newest first.
    fn list(&self, name: &str, query: &str) -> Reply {
        let parameter = |wanted: &str| {
            query.split('&').filter_map(|pair| pair.split_once('=')).find(|(name, _)| *name == wanted).map(|(_, v)| v)
        };
        let limit = parameter("limit").and_then(|limit| limit.parse().ok()).unwrap_or(PAGE).min(PAGE_MAX);
        let mut all: Vec<&Value> = self.made.values().rev().filter(|one| one["object"] == name).collect();
        if parameter("order") == Some("asc") {
            all.reverse();
        }
        let from = match parameter("after") {
            None => 0,
            Some(after) => match all.iter().position(|one| one["id"] == after) {
                Some(at) => at + 1,
                None => return not_found(after),
            },
        };
        let page: Vec<&Value> = all.iter().skip(from).take(limit).copied().collect();
        let id = |one: Option<&&Value>| one.map_or(Value::Null, |one| one["id"].clone());
        let list = json!({ "object": "list", "data": page, "first_id": id(page.first()), "last_id": id(page.last()),
            "has_more": all.len() > from + page.len() });
        Reply::json(200, list.to_string())
    }
}

fn not_found(id: &str) -> Reply {
    Reply::error(404, &format!("No such object: {id}"), None)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
