//! `OpenAI`'s wire shapes, in the key order `OpenAI` sends: a reader that looks for `usage` near
//! the end of the bytes must find it there. Hence text, not sorted JSON maps.

use std::iter;
use std::time::UNIX_EPOCH;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Options;
use super::behaviour::{Behaviour, Empty};
use super::reply::Events;

/// The last event of a stream.
pub(super) const DONE: &str = "data: [DONE]\n\n";

/// Deltas of one answer; more than any model gives, and a bound against a mistyped number.
const MAX_EVENTS: usize = 1_000_000;

/// Bytes of one delta; a proxy's limits on events are far below.
const MAX_EVENT_BYTES: usize = 16 << 20;

/// Bytes of text of a whole answer where it has to be held in memory.
const MAX_TEXT: usize = 256 << 20;

/// The text, word by word and over again. Nothing in it needs escaping in JSON.
const WORDS: [&str; 8] = ["Hello", " from", " the", " simulator,", " word", " by", " word,", " again."];

/// The fields of a request that shape its answer.
#[derive(Default, Deserialize)]
pub(super) struct AskedFor {
    pub(super) model: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) stream: bool,
    stream_options: Option<StreamOptions>,
    messages: Option<Value>,
    prompt: Option<Value>,
    pub(super) input: Option<Value>,
    pub(super) encoding_format: Option<String>,
    pub(super) dimensions: Option<usize>,
    /// A behaviour that this request alone asks for.
    pub(super) sim: Option<Behaviour>,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default, deserialize_with = "nullable")]
    include_usage: bool,
}

/// Clients send `null` where they could omit.
fn nullable<'de, D: serde::Deserializer<'de>>(from: D) -> Result<bool, D::Error> {
    Ok(Option::<bool>::deserialize(from)?.unwrap_or_default())
}

impl AskedFor {
    pub(super) fn parse(body: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(body)
            .map_err(|error| format!("We could not parse the JSON body of your request. ({error})"))
    }

    /// Words of all texts in the question.
    fn prompt_tokens(&self) -> usize {
        [&self.messages, &self.prompt, &self.input].into_iter().flatten().map(words).sum()
    }
}

fn words(value: &Value) -> usize {
    match value {
        Value::String(text) => text.split_whitespace().count(),
        Value::Array(list) => list.iter().map(words).sum(),
        Value::Object(fields) => ["content", "text"].into_iter().filter_map(|key| fields.get(key)).map(words).sum(),
        // A token id.
        Value::Number(_) => 1,
        Value::Null | Value::Bool(_) => 0,
    }
}

/// Content of an answer, before it has a shape.
pub(super) struct Text {
    pub(super) number: u64,
    pub(super) created: u64,
    /// Returns it as a JSON string, with its quotes.
    pub(super) model: String,
    pub(super) prompt_tokens: usize,
    pub(super) words: usize,
    event_bytes: Option<usize>,
    /// True if the counts are sent.
    pub(super) usage: bool,
    /// The same for the responses call, which counts without being asked.
    pub(super) responses_usage: bool,
    /// True if a stream's other chunks carry `"usage":null`.
    null_usage: bool,
}

impl Text {
    pub(super) fn new(ask: &AskedFor, behaviour: &Behaviour, number: u64, stream: bool) -> Self {
        let asked = ask.stream_options.as_ref().is_some_and(|options| options.include_usage);
        let words = if behaviour.empty == Some(Empty::ZeroUsage) { 0 } else { behaviour.events };
        Self {
            number,
            created: unix_seconds(),
            model: quoted(ask.model.as_deref().unwrap_or_default()),
            prompt_tokens: ask.prompt_tokens(),
            words: words.min(MAX_EVENTS),
            event_bytes: behaviour.event_bytes.map(|bytes| bytes.min(MAX_EVENT_BYTES)),
            usage: behaviour.usage.unwrap_or(!stream || asked),
            responses_usage: behaviour.usage != Some(false),
            null_usage: asked && behaviour.usage != Some(false),
        }
    }

    /// The text's pieces.
    pub(super) fn deltas(&self) -> impl Iterator<Item = String> + Send + use<> {
        let filler = self.event_bytes.map(|bytes| "x".repeat(bytes));
        let words = WORDS.into_iter().cycle().take(self.words);
        words.map(move |word| filler.clone().unwrap_or_else(|| word.into()))
    }

    /// The whole text.
    pub(super) fn whole(&self) -> String {
        let mut whole = String::new();
        for delta in self.deltas() {
            if whole.len() + delta.len() > MAX_TEXT {
                log::warn!("simulator: a text is cut at {MAX_TEXT} bytes");
                break;
            }
            whole.push_str(&delta);
        }
        whole
    }

    fn usage_json(&self) -> String {
        let (prompt, completion) = (self.prompt_tokens, self.words);
        format!(
            r#"{{"prompt_tokens":{prompt},"completion_tokens":{completion},"total_tokens":{total},"prompt_tokens_details":{{"cached_tokens":0,"audio_tokens":0}},"completion_tokens_details":{{"reasoning_tokens":0,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}}}"#,
            total = prompt + completion,
        )
    }

    /// A JSON answer around its choices.
    fn object(&self, prefix: &str, object: &str, choices: &str) -> String {
        let usage = if self.usage { format!(r#","usage":{}"#, self.usage_json()) } else { String::new() };
        format!(r#"{}{choices}]{usage},"system_fingerprint":"fp_sim"}}"#, self.head(prefix, object, ""))
    }

    fn head(&self, prefix: &str, object: &str, fingerprint: &str) -> String {
        let Self { number, created, model, .. } = self;
        format!(
            r#"{{"id":"{prefix}-sim{number}","object":"{object}","created":{created},"model":{model},{fingerprint}"choices":["#
        )
    }

    /// A stream: `first`, one chunk per delta made by `choice`, `last`, usage, the end.
    fn stream(
        self,
        head: &str,
        first: Option<&str>,
        choice: impl Fn(String) -> String + Send + 'static,
        last: &str,
    ) -> Events {
        let head = format!("data: {head}");
        let tail = if self.null_usage { "],\"usage\":null}\n\n" } else { "]}\n\n" };
        let chunk = |choices: &str| Bytes::from(format!("{head}{choices}{tail}"));
        let first = first.map(chunk);
        let last = chunk(last);
        let usage = self.usage.then(|| Bytes::from(format!("{head}],\"usage\":{}}}\n\n", self.usage_json())));
        let deltas = self.deltas().map(move |text| format!("{head}{}{tail}", choice(text)).into());
        let end = iter::once(last).chain(usage).chain(iter::once(Bytes::from_static(DONE.as_bytes())));
        Box::new(first.into_iter().chain(deltas).chain(end))
    }
}

/// Seconds since 1970; a clock before that counts as then.
fn unix_seconds() -> u64 {
    UNIX_EPOCH.elapsed().map_or(0, |time| time.as_secs())
}

pub(super) fn chat(text: &Text) -> String {
    let content = quoted(&text.whole());
    let choice = format!(
        r#"{{"index":0,"message":{{"role":"assistant","content":{content},"refusal":null,"annotations":[]}},"logprobs":null,"finish_reason":"stop"}}"#
    );
    text.object("chatcmpl", "chat.completion", &choice)
}

pub(super) fn chat_events(text: Text) -> Events {
    let head = text.head("chatcmpl", "chat.completion.chunk", r#""system_fingerprint":"fp_sim","#);
    let choice = |delta: &str, reason: &str| {
        format!(r#"{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}}}"#)
    };
    let first = choice(r#"{"role":"assistant","content":"","refusal":null}"#, "null");
    let last = choice("{}", r#""stop""#);
    let middle = move |text| choice(&format!(r#"{{"content":"{text}"}}"#), "null");
    text.stream(&head, Some(&first), middle, &last)
}

pub(super) fn completion(text: &Text) -> String {
    let choice = completion_choice(&text.whole(), r#""stop""#);
    text.object("cmpl", "text_completion", &choice)
}

pub(super) fn completion_events(text: Text) -> Events {
    let head = text.head("cmpl", "text_completion", r#""system_fingerprint":"fp_sim","#);
    let last = completion_choice("", r#""stop""#);
    text.stream(&head, None, |text| completion_choice(&text, "null"), &last)
}

fn completion_choice(text: &str, reason: &str) -> String {
    format!(r#"{{"text":"{text}","index":0,"logprobs":null,"finish_reason":{reason}}}"#)
}

pub(super) fn moderation(ask: &AskedFor, text: &Text) -> String {
    let categories = ["harassment", "hate", "self-harm", "sexual", "violence"];
    let flags: Value = categories.into_iter().map(|name| (name.to_owned(), json!(false))).collect();
    let scores: Value = categories.into_iter().map(|name| (name.to_owned(), json!(0.0))).collect();
    let inputs = ask.input.as_ref().and_then(Value::as_array).map_or(1, Vec::len);
    let result = json!({ "flagged": false, "categories": flags, "category_scores": scores });
    let results = vec![result.to_string(); inputs].join(",");
    format!(r#"{{"id":"modr-sim{}","model":{},"results":[{results}]}}"#, text.number, text.model)
}

pub(super) fn models(options: &Options) -> String {
    let list: Vec<_> = options.models.iter().map(|id| model_object(options, id)).collect();
    format!(r#"{{"object":"list","data":[{}]}}"#, list.join(","))
}

/// One model, if it is listed; every model when none is.
pub(super) fn model(options: &Options, id: &str) -> Option<String> {
    let known = options.models.is_empty() || options.models.iter().any(|model| model == id);
    known.then(|| model_object(options, id))
}

fn model_object(options: &Options, id: &str) -> String {
    let (id, owner) = (quoted(id), quoted(&options.name));
    format!(r#"{{"id":{id},"object":"model","created":1700000000,"owned_by":{owner}}}"#)
}

pub(super) fn error(status: u16, message: &str, code: Option<&str>) -> String {
    let (kind, usual_code) = match status {
        429 => ("requests", Some("rate_limit_exceeded")),
        500.. => ("server_error", None),
        _ => ("invalid_request_error", None),
    };
    let message = quoted(message);
    let code = code.or(usual_code).map_or("null".into(), quoted);
    format!(r#"{{"error":{{"message":{message},"type":"{kind}","param":null,"code":{code}}}}}"#)
}

/// A JSON string with its quotes.
pub(super) fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
