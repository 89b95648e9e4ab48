//! Tokens that an answer says it cost, read beside the way: it can neither change nor fail the answer.

use bytes::Bytes;
use serde::Deserialize;

use crate::ledger::Tokens;
use crate::sse::{Event, Splitter};

/// A JSON answer that is longer is not read for its tokens.
const JSON_BYTES_MAX: usize = 1024 * 1024;

/// No answer costs more; a number beyond it is a fault of the endpoint's, and must not spoil every sum.
const TOKENS_MAX: u64 = 1 << 32;

/// Reads one answer as it passes.
#[derive(Debug, Default)]
pub struct Meter {
    kind: Kind,
    tokens: Option<Tokens>,
}

#[derive(Debug, Default)]
enum Kind {
    /// Nothing to be read here.
    #[default]
    Blind,
    /// Pieces of the answer, which are not copied.
    Json { pieces: Vec<Bytes>, bytes: usize },
    /// The last event that has a usage counts.
    Stream(Box<Splitter>),
}

impl Meter {
    /// For an answer of this kind.
    pub fn new(is_event_stream: bool, is_json: bool) -> Self {
        let kind = match (is_event_stream, is_json) {
            (true, _) => Kind::Stream(Box::default()),
            (false, true) => Kind::Json { pieces: Vec::new(), bytes: 0 },
            (false, false) => Kind::Blind,
        };
        Self { kind, tokens: None }
    }

    /// Takes in a piece.
    pub fn piece(&mut self, piece: &Bytes) {
        match &mut self.kind {
            Kind::Blind => {}
            Kind::Json { pieces, bytes } => {
                *bytes += piece.len();
                if *bytes > JSON_BYTES_MAX {
                    self.kind = Kind::Blind;
                } else {
                    pieces.push(piece.clone());
                }
            }
            Kind::Stream(splitter) => {
                let tokens = &mut self.tokens;
                splitter.feed(piece, |event| {
                    if let Event::Data(data) = event
                        && memchr::memmem::find(data, b"\"usage\"").is_some()
                    {
                        *tokens = read(data).or(*tokens);
                    }
                });
            }
        }
    }

    /// What was read so far; a JSON answer is read at its end.
    pub fn so_far(&mut self, end: bool) -> Option<Tokens> {
        if end && let Kind::Json { pieces, .. } = std::mem::take(&mut self.kind) {
            self.tokens = match pieces.as_slice() {
                [] => None,
                [one] => read(one),
                several => read(&several.concat()),
            };
        }
        self.tokens
    }
}

/// What an answer says of its tokens, as far as it says so.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[expect(clippy::struct_field_names, reason = "the names are OpenAI's")]
pub struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    /// Some calls have these names in place of the first two, some endpoints both.
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    total_tokens: Option<u64>,
}

impl Usage {
    /// Of a JSON object: its `usage`, or that of the `response` within it, as the events of the responses API have it.
    pub fn of(json: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Answer {
            usage: Option<Usage>,
            response: Option<Inner>,
        }
        #[derive(Deserialize)]
        struct Inner {
            usage: Option<Usage>,
        }
        let Answer { usage, response } = serde_json::from_slice(json).ok()?;
        usage.or_else(|| response?.usage)
    }

    /// Whether it counts a prompt and not one token of an answer.
    pub fn is_of_empty_answer(&self) -> bool {
        self.completion_tokens == Some(0)
            && self.total_tokens.is_some_and(|total| total > 0)
            && self.total_tokens == self.prompt_tokens
    }

    /// The tokens, within what can be.
    fn tokens(&self) -> Tokens {
        let sane = |tokens: Option<u64>| tokens.map(|tokens| tokens.min(TOKENS_MAX));
        let prompt = sane(self.prompt_tokens.or(self.input_tokens)).unwrap_or(0);
        let completion = sane(self.completion_tokens.or(self.output_tokens)).unwrap_or(0);
        Tokens { prompt, completion, total: sane(self.total_tokens).unwrap_or(prompt + completion) }
    }
}

fn read(json: &[u8]) -> Option<Tokens> {
    Usage::of(json).map(|usage| usage.tokens())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meter(mut meter: Meter, body: &str, piece_bytes: usize) -> Option<Tokens> {
        for piece in body.as_bytes().chunks(piece_bytes) {
            meter.piece(&Bytes::copy_from_slice(piece));
        }
        meter.so_far(true)
    }

    #[test]
    fn a_json_answer_is_read_however_it_is_cut() {
        let body = r#"{"id":"x","usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}"#;
        for piece_bytes in [1, 7, 1000] {
            let tokens = meter(Meter::new(false, true), body, piece_bytes);
            assert_eq!(tokens, Some(Tokens { prompt: 3, completion: 4, total: 7 }));
        }
        assert_eq!(meter(Meter::new(false, true), r#"{"usage":null}"#, 5), None);
        assert_eq!(meter(Meter::new(false, false), body, 5), None);
        assert_eq!(
            meter(Meter::new(false, true), &format!("{{\"x\":\"{}\"}}", "y".repeat(JSON_BYTES_MAX)), 9999),
            None
        );
    }

    #[test]
    fn the_last_usage_of_a_stream_counts() {
        let body = "data: {\"usage\":null}\n\ndata: {\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":1}}\n\n\
                    data: {\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}\n\ndata: [DONE]\n\n";
        for piece_bytes in [1, 7, 1000] {
            let tokens = meter(Meter::new(true, false), body, piece_bytes);
            assert_eq!(tokens, Some(Tokens { prompt: 3, completion: 4, total: 7 }));
        }
    }

    #[test]
    fn names_and_numbers_may_be_odd() {
        let tokens = |json: &str| read(json.as_bytes()).map(|t| (t.prompt, t.completion, t.total));
        assert_eq!(tokens(r#"{"usage":{"input_tokens":3,"output_tokens":4}}"#), Some((3, 4, 7)));
        let both = r#"{"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7,"input_tokens":3,"output_tokens":4}}"#;
        assert_eq!(tokens(both), Some((3, 4, 7)));
        assert_eq!(
            tokens(r#"{"type":"x","response":{"usage":{"input_tokens":1,"output_tokens":2}}}"#),
            Some((1, 2, 3))
        );
        assert_eq!(tokens(r#"{"usage":{"total_tokens":18446744073709551615}}"#), Some((0, 0, TOKENS_MAX)));
        for none in
            [r#"{"usage":{"total_tokens":-1}}"#, r#"{"usage":{"total_tokens":99999999999999999999}}"#, "[]", "{"]
        {
            assert_eq!(tokens(none), None, "{none}");
        }
    }
}
