//! Tokens that an answer reports, in any dialect.
//!
//! | dialect | where | what |
//! |---|---|---|
//! | chat, completions, embeddings | `usage` | `prompt_tokens`, `completion_tokens`, `total_tokens`, `*_tokens_details` |
//! | responses | `usage`, in events `response.usage` | `input_tokens`, `output_tokens`, `*_tokens_details` |
//! | images, transcriptions | `usage` | the same, or a duration, which does not count tokens |
//! | Anthropic's messages | `usage`, in events also `message.usage` | `input_tokens` without cached tokens |
//! | Groq | also `x_groq.usage` | the same as chat |
//! | Moonshot | also `usage` within a choice, `cached_tokens` | the same as chat |
//! | `DeepSeek` | `usage` | the same as chat, and `prompt_cache_hit_tokens` |
//! | llama.cpp | `timings` | `prompt_n`, `cache_n`, `predicted_n` |

mod cost;
mod finder;
mod lenient;
mod meter;
mod plain;
pub mod prices;
mod reported;

pub use cost::{Cost, Money, Speed, Sum, Tokens, tokens_per_second};
pub use finder::Finder;
pub use meter::{AnswerText, BODY_BYTES_MAX, Meter, SAMPLE_BYTES_MAX, answer_texts, event_texts, mentions_usage};
pub use reported::Reported;

/// Upper bound for a count. No answer has that many tokens: a larger number is an error of the endpoint, and must not
/// distort the sums.
const TOKENS_MAX: u64 = 1 << 32;

/// Counts as an answer reports them. A count that is missing or malformed is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// `prompt_tokens`.
    prompt: Option<u64>,
    /// `completion_tokens`.
    completion: Option<u64>,
    /// `input_tokens`: some calls have it instead of `prompt_tokens`, some endpoints send both.
    input: Option<u64>,
    /// `output_tokens`, in the same role for the answer.
    output: Option<u64>,
    total: Option<u64>,
    /// Tokens of the prompt that came from a cache.
    cached: Option<u64>,
    /// Tokens read from a cache. Anthropic does not include them, nor those written to a cache, in `input_tokens`.
    cache_read: Option<u64>,
    cache_written: Option<u64>,
    /// Tokens of the answer spent on reasoning, which is not shown.
    reasoning: Option<u64>,
    audio_in: Option<u64>,
    /// Part of both the cached tokens and those that are audio.
    cached_audio: Option<u64>,
    audio_out: Option<u64>,
}

impl Usage {
    /// Takes over the counts of a later event of the same answer. Counts that it does not have stay.
    pub fn update(&mut self, later: Self) {
        let of = |later: Option<u64>, mine: Option<u64>| later.or(mine);
        *self = Self {
            prompt: of(later.prompt, self.prompt),
            completion: of(later.completion, self.completion),
            input: of(later.input, self.input),
            output: of(later.output, self.output),
            total: of(later.total, self.total),
            cached: of(later.cached, self.cached),
            cache_read: of(later.cache_read, self.cache_read),
            cache_written: of(later.cache_written, self.cache_written),
            reasoning: of(later.reasoning, self.reasoning),
            audio_in: of(later.audio_in, self.audio_in),
            cached_audio: of(later.cached_audio, self.cached_audio),
            audio_out: of(later.audio_out, self.audio_out),
        };
    }

    /// True if the prompt has tokens and the answer has none.
    pub fn is_of_empty_answer(&self) -> bool {
        self.completion == Some(0) && self.total.is_some_and(|total| total > 0) && self.total == self.prompt
    }

    /// Returns the tokens of the prompt, if they were reported.
    pub fn prompt(&self) -> Option<u64> {
        let apart = self.cache_read.unwrap_or(0) + self.cache_written.unwrap_or(0);
        self.prompt.or_else(|| self.input.map(|input| input + apart))
    }

    /// Returns the tokens. Counts that were not reported are derived from the others, or zero.
    pub fn tokens(&self) -> Tokens {
        let prompt = self.prompt().unwrap_or(0);
        let completion = self.completion.or(self.output).unwrap_or(0);
        Tokens {
            prompt,
            completion,
            total: self.total.unwrap_or(prompt + completion),
            cached: self.cached.or(self.cache_read).unwrap_or(0),
            reasoning: self.reasoning.unwrap_or(0),
            audio: self.audio_in.unwrap_or(0) + self.audio_out.unwrap_or(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn tokens(json: &Value) -> Option<Tokens> {
        Reported::from_json(json.to_string().as_bytes()).map(|reported| reported.usage.tokens())
    }

    fn plain(prompt: u64, completion: u64, total: u64) -> Tokens {
        Tokens { prompt, completion, total, ..Tokens::default() }
    }

    #[test]
    fn each_dialect_is_understood() {
        let details = json!({ "cached_tokens": 2, "audio_tokens": 1 });
        let reasoning = json!({ "reasoning_tokens": 3, "audio_tokens": 4 });
        let chat = json!({ "prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14,
            "prompt_tokens_details": details, "completion_tokens_details": reasoning });
        let responses = json!({ "input_tokens": 5, "output_tokens": 9, "total_tokens": 14,
            "input_tokens_details": details, "output_tokens_details": reasoning });
        let full = Tokens { cached: 2, reasoning: 3, audio: 5, ..plain(5, 9, 14) };
        for json in [
            json!({ "usage": chat }),
            json!({ "usage": responses }),
            json!({ "type": "response.completed", "response": { "usage": responses } }),
            json!({ "x_groq": { "usage": chat } }),
            json!({ "choices": [{ "usage": chat }] }),
        ] {
            assert_eq!(tokens(&json), Some(full), "{json}");
        }
        let of = |usage: Value| tokens(&json!({ "usage": usage }));
        let anthropic = json!({ "input_tokens": 5, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 1,
            "output_tokens": 2 });
        assert_eq!(of(anthropic.clone()), Some(Tokens { cached: 7, ..plain(13, 2, 15) }));
        assert_eq!(tokens(&json!({ "type": "message_start", "message": { "usage": anthropic } })), of(anthropic));
        let transcription = json!({ "type": "tokens", "input_tokens": 14, "output_tokens": 45, "total_tokens": 59,
            "input_token_details": { "text_tokens": 0, "audio_tokens": 14 } });
        assert_eq!(of(transcription), Some(Tokens { audio: 14, ..plain(14, 45, 59) }));
        assert_eq!(of(json!({ "type": "duration", "seconds": 9 })), None);
        assert_eq!(of(json!({ "prompt_tokens": 8, "total_tokens": 8 })), Some(plain(8, 0, 8)));
        let deepseek = json!({ "prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6,
            "prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 1 });
        assert_eq!(of(deepseek), Some(Tokens { cached: 4, ..plain(5, 1, 6) }));
        // Gemini counts reasoning tokens in the total only.
        let gemini = json!({ "prompt_tokens": 4, "completion_tokens": 10, "total_tokens": 114 });
        assert_eq!(of(gemini), Some(plain(4, 10, 114)));
        let llama = json!({ "timings": { "cache_n": 3, "prompt_n": 2, "predicted_n": 4, "predicted_ms": 5.5 } });
        assert_eq!(tokens(&llama), Some(Tokens { cached: 3, ..plain(5, 4, 9) }));
    }

    #[test]
    fn names_and_numbers_may_be_odd() {
        let of = |usage: Value| tokens(&json!({ "usage": usage }));
        let both = json!({ "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "input_tokens": 3,
            "output_tokens": 4, "cache_read_input_tokens": 1 });
        assert_eq!(of(both), Some(Tokens { cached: 1, ..plain(3, 4, 7) }));
        assert_eq!(of(json!({ "total_tokens": u64::MAX })), Some(plain(0, 0, TOKENS_MAX)));
        assert_eq!(of(json!({ "prompt_tokens": 12.0, "completion_tokens": "4" })), Some(plain(12, 0, 12)));
        let broken = json!({ "prompt_tokens": 1, "prompt_tokens_details": null, "completion_tokens_details": [5] });
        assert_eq!(of(broken), Some(plain(1, 0, 1)));
        for none in [json!({ "total_tokens": -1 }), json!({ "total_tokens": 1.5 }), json!([]), json!(null), json!(3)] {
            assert_eq!(of(none.clone()), None, "{none}");
        }
        for text in ["[]", "{", "", "3"] {
            assert_eq!(Reported::from_json(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn later_events_add_to_earlier_ones() {
        let of = |usage: Value| reported::usage(usage.to_string().as_bytes()).unwrap();
        let mut usage = of(json!({ "input_tokens": 25, "cache_read_input_tokens": 5, "output_tokens": 1 }));
        usage.update(of(json!({ "output_tokens": 15 })));
        assert_eq!(usage.tokens(), Tokens { cached: 5, ..plain(30, 15, 45) });
        let mut usage = of(json!({ "prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4 }));
        usage.update(of(json!({ "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7 })));
        assert_eq!(usage.tokens(), plain(3, 4, 7));
    }
}
