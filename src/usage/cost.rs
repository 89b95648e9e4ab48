//! Tokens and costs of answers, as plain sums.

use std::time::Duration;

use super::prices::NanoUsd;

/// Shorter than that is not how long a stream took to be generated: all of it lay ready.
const GENERATION_MIN: Duration = Duration::from_millis(10);

/// Tokens a second of a stream that took this long from its first token to its end; none if that says nothing.
pub fn tokens_per_second(tokens: u64, time: Duration) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "nobody counts that many")]
    (tokens > 0 && time >= GENERATION_MIN).then(|| tokens as f64 / time.as_secs_f64())
}

/// Tokens of one answer or of many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Tokens of the prompt.
    pub prompt: u64,
    /// Tokens of the answer.
    pub completion: u64,
    /// Total of both, as the endpoint reports it.
    pub total: u64,
    /// Tokens of the prompt that came from a cache.
    pub cached: u64,
    /// Tokens of the answer spent on reasoning, which is not shown.
    pub reasoning: u64,
    /// Audio tokens of the prompt and the answer.
    pub audio: u64,
}

impl Tokens {
    /// Adds the tokens of another answer.
    pub fn merge(&mut self, other: &Self) {
        let Self { prompt, completion, total, cached, reasoning, audio } = other;
        let sums = [
            (&mut self.prompt, prompt),
            (&mut self.completion, completion),
            (&mut self.total, total),
            (&mut self.cached, cached),
            (&mut self.reasoning, reasoning),
            (&mut self.audio, audio),
        ];
        for (mine, other) in sums {
            *mine = mine.saturating_add(*other);
        }
    }
}

/// Number of answers and their tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// Answers.
    pub requests: u64,
    /// Tokens of these answers.
    pub tokens: Tokens,
}

/// Speed of streams, as sums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Speed {
    /// Streams whose tokens were reported.
    pub streams: u64,
    /// Tokens of their answers.
    pub tokens: u64,
    /// Time from the request to the first token of the answer, in milliseconds.
    pub first_token_ms: u64,
    /// Time from the first token to the end of the answer, in milliseconds.
    pub ms: u64,
}

/// Tokens of one answer or of many, and their speed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Answers whose tokens the endpoint reported.
    pub exact: Sum,
    /// Answers whose tokens were estimated because the endpoint reported none.
    pub estimated: Sum,
    /// Speed of the streams among them.
    pub speed: Speed,
    /// What they cost.
    pub money: Money,
}

/// What answers cost, and how many have no price.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Money {
    /// Price of those that have one.
    pub spent: NanoUsd,
    /// Answers whose model has no price.
    pub unpriced: u64,
}

impl Cost {
    /// Names of its numbers, for tables that keep them.
    pub(crate) const COLUMNS: [&str; 16] = [
        "requests",
        "prompt",
        "completion",
        "total",
        "cached",
        "reasoning",
        "audio",
        "estimated_requests",
        "estimated_prompt",
        "estimated_completion",
        "streams",
        "stream_tokens",
        "first_token_ms",
        "stream_ms",
        "nano_usd",
        "unpriced",
    ];

    /// Returns the cost of one answer that reported its tokens.
    pub fn exact(tokens: Tokens, speed: Speed) -> Self {
        Self { exact: Sum { requests: 1, tokens }, speed, ..Self::default() }
    }

    /// Returns the cost of one answer whose tokens were estimated.
    pub fn estimated(prompt: u64, completion: u64) -> Self {
        let tokens = Tokens { prompt, completion, total: prompt + completion, ..Tokens::default() };
        Self { estimated: Sum { requests: 1, tokens }, ..Self::default() }
    }

    /// The same with its price, if it has one.
    #[must_use]
    pub fn priced(self, price: Option<NanoUsd>) -> Self {
        let money = match price {
            Some(spent) => Money { spent, unpriced: 0 },
            None => Money { spent: NanoUsd(0), unpriced: 1 },
        };
        Self { money, ..self }
    }

    /// Returns all tokens, reported and estimated. Token limits use this sum: an estimate is better than counting
    /// unreported tokens as zero.
    pub fn tokens(&self) -> u64 {
        self.exact.tokens.total.saturating_add(self.estimated.tokens.total)
    }

    /// Adds another cost.
    pub fn merge(&mut self, other: &Self) {
        let mut columns = self.to_columns();
        columns.iter_mut().zip(other.to_columns()).for_each(|(mine, other)| *mine = mine.saturating_add(other));
        *self = Self::from_columns(columns);
    }

    /// Returns the numbers in the order of [`Cost::COLUMNS`].
    pub(crate) fn to_columns(self) -> [u64; Self::COLUMNS.len()] {
        let Self { exact, estimated, speed, money } = self;
        let Tokens { prompt, completion, total, cached, reasoning, audio } = exact.tokens;
        let guessed = estimated.tokens;
        [
            exact.requests,
            prompt,
            completion,
            total,
            cached,
            reasoning,
            audio,
            estimated.requests,
            guessed.prompt,
            guessed.completion,
            speed.streams,
            speed.tokens,
            speed.first_token_ms,
            speed.ms,
            money.spent.0,
            money.unpriced,
        ]
    }

    pub(crate) fn from_columns(columns: [u64; Self::COLUMNS.len()]) -> Self {
        let [requests, prompt, completion, total, cached, reasoning, audio, rest @ ..] = columns;
        let [guessed, guessed_prompt, guessed_completion, rest @ ..] = rest;
        let [streams, stream_tokens, first_token_ms, ms, nano_usd, unpriced] = rest;
        let guess = Self::estimated(guessed_prompt, guessed_completion).estimated.tokens;
        Self {
            exact: Sum { requests, tokens: Tokens { prompt, completion, total, cached, reasoning, audio } },
            estimated: Sum { requests: guessed, tokens: guess },
            speed: Speed { streams, tokens: stream_tokens, first_token_ms, ms },
            money: Money { spent: NanoUsd(nano_usd), unpriced },
        }
    }
}
