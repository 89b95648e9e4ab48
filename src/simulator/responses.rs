//! `/v1/responses`: one JSON object, or typed events that build it up.

use std::iter;

use bytes::Bytes;

use super::reply::Events;
use super::shapes::{Text, quoted};

/// The whole answer.
pub(super) fn response(text: &Text) -> String {
    let item = item(text, "completed", &part(&quoted(&text.whole())));
    object(text, "completed", &item)
}

/// The events; each one's type also stands in its `event:` line.
pub(super) fn events(text: Text) -> Events {
    let empty_part = part(r#""""#);
    let deltas = text.deltas().map(delta_fields(&text));
    let before = [
        ("created", response_field(&object(&text, "in_progress", ""))),
        ("in_progress", response_field(&object(&text, "in_progress", ""))),
        ("output_item.added", format!(r#""output_index":0,"item":{}"#, item(&text, "in_progress", ""))),
        ("content_part.added", format!(r#"{},"part":{empty_part}"#, place(&text))),
    ];
    // Made only when the deltas are through: it holds the whole text.
    let after = iter::once_with(move || closing(&text)).flatten();
    let all = before.into_iter().chain(deltas.map(|fields| ("output_text.delta", fields))).chain(after);
    Box::new(all.enumerate().map(|(sequence, (name, fields))| event(name, sequence, &fields)))
}

fn closing(text: &Text) -> [(&'static str, String); 4] {
    let whole = quoted(&text.whole());
    let (place, part) = (place(text), part(&whole));
    let item = item(text, "completed", &part);
    [
        ("output_text.done", format!(r#"{place},"text":{whole},"logprobs":[]"#)),
        ("content_part.done", format!(r#"{place},"part":{part}"#)),
        ("output_item.done", format!(r#""output_index":0,"item":{item}"#)),
        ("completed", response_field(&object(text, "completed", &item))),
    ]
}

fn event(name: &str, sequence: usize, fields: &str) -> Bytes {
    let kind = format!("response.{name}");
    format!("event: {kind}\ndata: {{\"type\":\"{kind}\",\"sequence_number\":{sequence},{fields}}}\n\n").into()
}

fn delta_fields(text: &Text) -> impl Fn(String) -> String + Send + use<> {
    let place = place(text);
    move |delta| format!(r#"{place},"delta":"{delta}","logprobs":[]"#)
}

fn response_field(object: &str) -> String {
    format!(r#""response":{object}"#)
}

/// Text in the response.
fn place(text: &Text) -> String {
    format!(r#""item_id":"msg_sim{}","output_index":0,"content_index":0"#, text.number)
}

/// `text` is a JSON string.
fn part(text: &str) -> String {
    format!(r#"{{"type":"output_text","annotations":[],"logprobs":[],"text":{text}}}"#)
}

fn item(text: &Text, status: &str, content: &str) -> String {
    format!(
        r#"{{"id":"msg_sim{}","type":"message","status":"{status}","content":[{content}],"role":"assistant"}}"#,
        text.number
    )
}

fn object(text: &Text, status: &str, output: &str) -> String {
    let Text { number, created, model, .. } = text;
    let usage = if status == "completed" { usage(text) } else { "null".into() };
    format!(
        r#"{{"id":"resp_sim{number}","object":"response","created_at":{created},"status":"{status}","error":null,"incomplete_details":null,"instructions":null,"max_output_tokens":null,"model":{model},"output":[{output}],"parallel_tool_calls":true,"previous_response_id":null,"store":false,"temperature":1.0,"text":{{"format":{{"type":"text"}}}},"tool_choice":"auto","tools":[],"top_p":1.0,"truncation":"disabled","usage":{usage},"metadata":{{}}}}"#
    )
}

/// A null, as when the behaviour forbids the counts.
fn usage(text: &Text) -> String {
    if !text.responses_usage {
        return "null".into();
    }
    let (input, output) = (text.prompt_tokens, text.words);
    format!(
        r#"{{"input_tokens":{input},"input_tokens_details":{{"cached_tokens":0}},"output_tokens":{output},"output_tokens_details":{{"reasoning_tokens":0}},"total_tokens":{}}}"#,
        input + output
    )
}
