//! Reasoning that only the organisation can read that wrote it, as it stands in a request: what is cut out where another one is to
//! answer.

use std::ops::Range;

use serde::de::{Deserializer as _, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::call::Call;
use crate::json::members::member;
use crate::json::part;

/// The ranges of a JSON body that hold sealed reasoning, in their order: items of `input` with encrypted content, and blocks of thinking
/// in `messages`, or a whole message that has nothing else.
pub fn ranges(call: Call, body: &[u8]) -> Vec<Range<usize>> {
    match call {
        Call::Responses => member(body, 0..body.len(), "input").map(|input| items(body, input)).unwrap_or_default(),
        Call::Messages => member(body, 0..body.len(), "messages").map(|list| messages(body, list)).unwrap_or_default(),
        Call::Completion | Call::Embeddings | Call::Other | Call::Unmetered => Vec::new(),
    }
}

fn items(body: &[u8], input: Range<usize>) -> Vec<Range<usize>> {
    let items = elements(body, input);
    let is_sealed = |item: &Range<usize>| {
        let is_text = |range: Range<usize>| part(body, range).starts_with(b"\"");
        kind(body, item) == Some(b"\"reasoning\"")
            && member(body, item.clone(), "encrypted_content").is_some_and(is_text)
    };
    cuts(&items, &items.iter().map(is_sealed).collect::<Vec<_>>())
}

fn messages(body: &[u8], list: Range<usize>) -> Vec<Range<usize>> {
    let messages = elements(body, list);
    let mut inner = Vec::new();
    let mut whole = Vec::with_capacity(messages.len());
    for message in &messages {
        let blocks =
            member(body, message.clone(), "content").map(|content| elements(body, content)).unwrap_or_default();
        let is_sealed: Vec<bool> = blocks
            .iter()
            .map(|block| matches!(kind(body, block), Some(b"\"thinking\"" | b"\"redacted_thinking\"")))
            .collect();
        let is_whole = !blocks.is_empty() && is_sealed.iter().all(|sealed| *sealed);
        whole.push(is_whole);
        if !is_whole {
            inner.extend(cuts(&blocks, &is_sealed));
        }
    }
    inner.extend(cuts(&messages, &whole));
    inner.sort_by_key(|range| range.start);
    inner
}

/// The `type` of an object, in its quotation marks.
fn kind<'a>(body: &'a [u8], object: &Range<usize>) -> Option<&'a [u8]> {
    member(body, object.clone(), "type").map(|range| part(body, range))
}

/// The ranges of a list's elements. None for what is no list.
fn elements(body: &[u8], list: Range<usize>) -> Vec<Range<usize>> {
    struct Elements<'a>(&'a [u8]);
    impl<'de> Visitor<'de> for Elements<'_> {
        type Value = Vec<Range<usize>>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a list")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut ranges = Vec::new();
            while let Some(element) = list.next_element::<&RawValue>()? {
                let start = (element.get().as_ptr() as usize).saturating_sub(self.0.as_ptr() as usize);
                ranges.push(start..start + element.get().len());
            }
            Ok(ranges)
        }
    }
    let text = part(body, list);
    serde_json::Deserializer::from_slice(text).deserialize_seq(Elements(body)).unwrap_or_default()
}

/// What is cut out of a list to be rid of some of its elements, each with the comma that separated it.
fn cuts(elements: &[Range<usize>], is_cut: &[bool]) -> Vec<Range<usize>> {
    let mut cuts = Vec::new();
    let mut at = 0;
    while at < elements.len() {
        let run = is_cut.iter().skip(at).take_while(|cut| **cut).count();
        let before = at.checked_sub(1).and_then(|before| elements.get(before));
        let (first, last) = (elements.get(at), elements.get((at + run).saturating_sub(1)));
        if let (1.., Some(first), Some(last)) = (run, first, last) {
            cuts.push(match (elements.get(at + run), before) {
                (Some(next), _) => first.start..next.start,
                (None, Some(before)) => before.end..last.end,
                (None, None) => first.start..last.end,
            });
        }
        at += run + 1;
    }
    cuts
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn without(call: Call, body: &Value) -> Value {
        let text = serde_json::to_string_pretty(body).unwrap();
        let mut left = text.clone();
        for range in ranges(call, text.as_bytes()).into_iter().rev() {
            left.replace_range(range, "");
        }
        serde_json::from_str(&left).unwrap_or_else(|error| panic!("{left}: {error}"))
    }

    #[test]
    fn items_of_sealed_reasoning_are_cut_out() {
        let sealed = json!({ "type": "reasoning", "id": "rs_1", "encrypted_content": "gAAA" });
        let open = json!({ "type": "reasoning", "id": "rs_2", "encrypted_content": null });
        let said = json!({ "role": "user", "content": "\"type\":\"reasoning\"" });
        for (input, expected) in [
            (json!([sealed, said, sealed, sealed, open, said, sealed]), json!([said, open, said])),
            (json!([sealed]), json!([])),
            (json!([said, sealed]), json!([said])),
            (json!([sealed, said]), json!([said])),
            (json!([said]), json!([said])),
            (json!("text"), json!("text")),
        ] {
            let body = json!({ "model": "m", "input": input, "store": false });
            assert_eq!(without(Call::Responses, &body)["input"], expected, "{input}");
        }
        assert!(ranges(Call::Completion, b"{\"input\":[{\"type\":\"reasoning\"}]}").is_empty());
    }

    #[test]
    fn blocks_of_thinking_are_cut_out_and_messages_that_hold_nothing_else() {
        let thinking = json!({ "type": "thinking", "thinking": "so", "signature": "s" });
        let redacted = json!({ "type": "redacted_thinking", "data": "d" });
        let text = json!({ "type": "text", "text": "hi" });
        let message = |content: Value| json!({ "role": "assistant", "content": content });
        let user = json!({ "role": "user", "content": "hello" });
        let body = json!({ "messages": [
            user,
            message(json!([thinking, text, redacted])),
            message(json!([thinking, redacted])),
            message(json!([text])),
        ] });
        let expected = json!([user, message(json!([text])), message(json!([text]))]);
        assert_eq!(without(Call::Messages, &body)["messages"], expected);
    }
}
