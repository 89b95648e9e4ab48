//! The most tokens that a request can take, as a guess that needs no tokenizer: it is made before the request is sent.

use memchr::{memchr, memmem};
use serde::de::IgnoredAny;

use crate::json::{members, part};

/// Bytes of text that a token has at least; of most languages' texts, more (a rule of thumb for OpenAI's tokenizers is 4).
const BYTES_OF_TOKEN: usize = 3;
/// What stands before a picture or a sound in a body.
const BASE64: &[u8] = b";base64,";
/// Tokens of a picture: of a large one, as OpenAI counts it, about as many.
const PICTURE_TOKENS: u64 = 1000;
/// Answers of one prompt.
const ANSWERS_MAX: u64 = 128;
/// Prompts of one request: as many as OpenAI takes.
const PROMPTS_MAX: usize = 2048;

/// The most tokens that a request can take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenBound {
    /// Of the prompt.
    pub prompt: u64,
    /// Of all its answers.
    pub answer: u64,
}

impl TokenBound {
    /// Both together.
    pub fn total(self) -> u64 {
        self.prompt.saturating_add(self.answer)
    }
}

/// The most tokens of the prompt and the answer of a JSON body. `reserve`: of an answer whose length the client does not bound, or bounds
/// higher.
pub(crate) fn token_bound(body: &[u8], reserve: u64) -> TokenBound {
    let (mut longest, mut answers, mut prompts) = (None, None, 1);
    // What is not JSON has been refused, or is no prompt.
    let _whole = members::members(body, |key, range| {
        let value = part(body, range);
        let number = || std::str::from_utf8(value).ok()?.parse::<u64>().ok();
        match key {
            b"max_tokens" | b"max_completion_tokens" | b"max_output_tokens" => longest = number().max(longest),
            // Of `best_of` answers all are paid, and the best `n` are shown.
            b"n" | b"best_of" => answers = number().max(answers),
            b"prompt" => prompts = elements(value),
            _ => {}
        }
    });
    let answer = longest.unwrap_or(reserve).min(reserve);
    let answers = answers.unwrap_or(1).clamp(1, ANSWERS_MAX).saturating_mul(prompts);
    TokenBound { prompt: prompt_bound(body), answer: answer.saturating_mul(answers) }
}

/// Prompts in a list of texts, or of lists of tokens, each of which is answered; a list of tokens is one prompt.
fn elements(prompt: &[u8]) -> u64 {
    let first = prompt.strip_prefix(b"[").map(<[u8]>::trim_ascii_start).and_then(<[u8]>::first);
    if !matches!(first, Some(b'"' | b'[')) {
        return 1;
    }
    // Elements that take no room, however many there are.
    let prompts = serde_json::from_slice::<Vec<IgnoredAny>>(prompt).map_or(1, |list| list.len());
    u64::try_from(prompts.clamp(1, PROMPTS_MAX)).unwrap_or(1)
}

fn prompt_bound(body: &[u8]) -> u64 {
    let (mut rest, mut bytes, mut pictures) = (body, 0, 0);
    while let Some(at) = memmem::find(rest, BASE64) {
        bytes += at;
        pictures += 1;
        let data = part(rest, at + BASE64.len()..);
        rest = part(data, memchr(b'"', data).unwrap_or(data.len())..);
    }
    let text = u64::try_from((bytes + rest.len()).div_ceil(BYTES_OF_TOKEN)).unwrap_or(u64::MAX);
    text.saturating_add(PICTURE_TOKENS * pictures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_bounded_by_its_client_or_by_the_reserve() {
        let prompt = |body: &str| u64::try_from(body.len().div_ceil(3)).unwrap();
        for (body, answer) in [
            (r#"{"messages":[]}"#, 4096),
            (r#"{"max_tokens":10}"#, 10),
            (r#"{"max_completion_tokens":20,"n":3}"#, 60),
            (r#"{"max_output_tokens": 30}"#, 30),
            (r#"{"max_tokens":10,"n":2,"best_of":5}"#, 50),
            (r#"{"max_tokens":10,"best_of":3,"n":2,"prompt":["a","b"]}"#, 60),
            (r#"{"max_tokens":10,"prompt":[[1,2],[3],[4]]}"#, 30),
            (r#"{"max_tokens":10,"prompt":[1,2,3]}"#, 10),
            (r#"{"max_tokens":10,"prompt":"[1,2]"}"#, 10),
            (r#"{"max_tokens":10,"prompt":[]}"#, 10),
            (r#"{"max_completion_tokens":100,"max_tokens":1}"#, 100),
            (r#"{"max_tokens":999999}"#, 4096),
            (r#"{"max_tokens":null,"n":2}"#, 8192),
            (r#"{"max_tokens":-1}"#, 4096),
            (r#"{"n":18446744073709551615}"#, 4096 * 128),
        ] {
            let expected = TokenBound { prompt: prompt(body), answer };
            assert_eq!(token_bound(body.as_bytes(), 4096), expected, "{body}");
        }
        assert_eq!(token_bound(b"", 7).total(), 7);
        assert_eq!(token_bound(b"not JSON", 7).total(), 10);
    }

    #[test]
    fn a_picture_is_not_text() {
        let picture = "A".repeat(3_000_000);
        let body = format!(r#"{{"a":"data:image/png;base64,{picture}","b":"data:x;base64,{picture}","max_tokens":1}}"#);
        let bound = token_bound(body.as_bytes(), 4096).total();
        assert!((2000..2100).contains(&bound), "{bound}");
        assert!(token_bound(b"x;base64,AAA", 0).total() < 1010);
    }
}
