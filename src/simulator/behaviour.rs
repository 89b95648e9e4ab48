//! Behaviour of one answer, and its spelling in a model's name.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Begins model names that spell their behaviour.
const MODEL_PREFIX: &str = "sim:";

/// Behaviour of one answer. In JSON all fields are optional and in camelCase.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
// Each flag is one independent fault; an enum would forbid their combinations.
#[allow(clippy::struct_excessive_bools)]
pub struct Behaviour {
    /// Status code; outside 2xx the body is an `OpenAI` error, in 2xx other than 200 it is `{}`,
    /// unless `body` or `echo` is set.
    pub status: u16,
    /// Additional response headers; `content-length` and the like replace the generated ones.
    pub headers: Vec<(String, String)>,
    /// Raw body instead of the generated one.
    pub body: Option<String>,
    /// Content type instead of the generated one. With `text/event-stream`, `body` is sent
    /// event by event and without a length.
    pub content_type: Option<String>,
    /// Milliseconds before the response header, once the request is read.
    pub header_delay_ms: u64,
    /// Milliseconds between the header and the first byte of the body.
    pub first_chunk_delay_ms: u64,
    /// Milliseconds between two events, and between two pieces of `drip`.
    pub chunk_delay_ms: u64,
    /// Point at which the answer stalls until the peer disconnects.
    pub stall: Option<StallAt>,
    /// Point at which the answer breaks off.
    pub reset: Option<ResetAt>,
    /// Way in which it breaks off.
    pub reset_how: ResetHow,
    /// Kind of empty answer.
    pub empty: Option<Empty>,
    /// Content deltas of a stream, words of a JSON answer, and completion tokens.
    pub events: usize,
    /// Bytes of text in each delta; by default one English word.
    pub event_bytes: Option<usize>,
    /// Usage in the answer. By default like `OpenAI`: always in JSON, in a stream on request.
    pub usage: Option<bool>,
    /// Status 200, but the first event (or the JSON body) is an error object, and the only one.
    pub first_event_error: bool,
    /// After the header, SSE comments at this interval of milliseconds for ever, and no data.
    pub ping_ms: Option<u64>,
    /// The body is written in pieces of at most that many bytes, one write each.
    pub drip: Option<usize>,
    /// Answers without reading the request body, then closes. Only in the script of `*` and in
    /// the default, since the model is not known before the body is read.
    pub early: bool,
    /// Answers with what arrived: `{"echo":{"method","path","headers","body","bodyBytes"}}`.
    pub echo: bool,
    /// JSON without `content-length`.
    pub chunked: bool,
    /// JSON or SSE regardless of what was asked for.
    pub answer_as: Option<AnswerAs>,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            status: 200,
            headers: Vec::new(),
            body: None,
            content_type: None,
            header_delay_ms: 0,
            first_chunk_delay_ms: 0,
            chunk_delay_ms: 0,
            stall: None,
            reset: None,
            reset_how: ResetHow::Fin,
            empty: None,
            events: 5,
            event_bytes: None,
            usage: None,
            first_event_error: false,
            ping_ms: None,
            drip: None,
            early: false,
            echo: false,
            chunked: false,
            answer_as: None,
        }
    }
}

impl Behaviour {
    /// Answers with that status, and an error body outside 2xx.
    pub fn status(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    /// The same with one more response header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// The behaviour that a model's name spells; `None` for ordinary names.
    pub fn from_model(model: &str) -> Option<Result<Self, String>> {
        let list = model.strip_prefix(MODEL_PREFIX)?;
        Some(parse_list(list))
    }

    /// True if the answer does not depend on the call.
    pub(super) fn answers_any_path(&self) -> bool {
        self.body.is_some() || self.echo || self.status != 200 || self.empty == Some(Empty::Body)
    }

    pub(super) fn header_delay(&self) -> Duration {
        Duration::from_millis(self.header_delay_ms)
    }
}

/// Point at which an answer stalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum StallAt {
    /// No response header ever comes.
    Header,
    /// The header comes, nothing of the body.
    AfterHeader,
    /// That many events come. A JSON body counts as two events, its halves.
    AfterEvents(usize),
}

/// Point at which an answer breaks off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum ResetAt {
    /// The request is read, no header comes.
    BeforeHeader,
    /// The header comes, nothing of the body.
    AfterHeader,
    /// That many events come. A JSON body counts as two events, its halves.
    AfterEvents(usize),
    /// That many whole events come, and half of the next.
    MidEvent(usize),
}

/// Way in which an answer breaks off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum ResetHow {
    /// The connection closes in an orderly way, before the final chunk or byte.
    #[default]
    Fin,
    /// TCP RST; on HTTP/2 `RST_STREAM`, and the connection lives on.
    Rst,
}

/// Kinds of answers with status 200 and nothing in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Empty {
    /// `content-length: 0`.
    Body,
    /// The JSON object `{}`, also when a stream was asked for.
    Object,
    /// Well-formed, but without text and with zero completion tokens.
    ZeroUsage,
    /// A stream that ends at once. For JSON the same as `Body`.
    NoEvents,
    /// A stream of nothing but `[DONE]`. For JSON the same as `Body`.
    DoneOnly,
}

/// Forces the form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum AnswerAs {
    /// JSON, even if a stream was asked for.
    Json,
    /// A stream, even if JSON was asked for.
    Sse,
}

/// Turns the list into the JSON form, so that names and types are checked in one place.
fn parse_list(list: &str) -> Result<Behaviour, String> {
    let mut fields = Map::new();
    let mut headers = Vec::new();
    for pair in list.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let (key, text) = pair.split_once('=').ok_or_else(|| format!("'{pair}' has no '='"))?;
        match key {
            "retryAfter" => headers.push(json!(["retry-after", text])),
            "header" => headers.push(parse_header(text)?),
            "midEvent" => {
                fields.insert("reset".into(), json!({ "midEvent": scalar(text) }));
            }
            _ => {
                fields.insert(key.into(), field(key, text));
            }
        }
    }
    if !headers.is_empty() {
        fields.insert("headers".into(), Value::Array(headers));
    }
    serde_json::from_value(Value::Object(fields)).map_err(|error| error.to_string())
}

fn parse_header(text: &str) -> Result<Value, String> {
    let (name, value) = text.split_once(':').ok_or_else(|| format!("'{text}' has no ':'"))?;
    Ok(json!([name.trim(), value.trim()]))
}

fn field(key: &str, text: &str) -> Value {
    match (key, scalar(text)) {
        ("body" | "contentType", _) => Value::from(text),
        ("stall" | "reset", count @ Value::Number(_)) => json!({ "afterEvents": count }),
        (_, value) => value,
    }
}

fn scalar(text: &str) -> Value {
    match (text.parse::<u64>(), text) {
        (Ok(number), _) => Value::from(number),
        (_, "true") => Value::Bool(true),
        (_, "false") => Value::Bool(false),
        _ => Value::from(text),
    }
}
