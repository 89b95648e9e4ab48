//! Rates of a model, in OpenAI's headers.

use std::time::Duration;

use http::{HeaderName, HeaderValue};

/// Prefix of all of them. An endpoint's own are not forwarded, since they say nothing about the others.
pub(crate) const PREFIX: &str = "x-ratelimit-";

/// Requests or tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Limit of all endpoints of the model together.
    pub limit: u64,
    /// Remaining part now.
    pub remaining: u64,
    /// Time until all of it is free again.
    pub reset: Duration,
}

/// Both rates, as far as every endpoint of the model has such a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Requests.
    pub requests: Option<Rate>,
    /// Tokens.
    pub tokens: Option<Rate>,
}

impl Rates {
    /// Of each kind the rate that has less remaining.
    pub fn tighter(self, other: Self) -> Self {
        let tighter = |one: Option<Rate>, other| one.into_iter().chain(other).min_by_key(|rate: &Rate| rate.remaining);
        Self { requests: tighter(self.requests, other.requests), tokens: tighter(self.tokens, other.tokens) }
    }

    /// Returns the headers.
    pub fn headers(&self) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
        const REQUESTS: [HeaderName; 3] = [
            HeaderName::from_static("x-ratelimit-limit-requests"),
            HeaderName::from_static("x-ratelimit-remaining-requests"),
            HeaderName::from_static("x-ratelimit-reset-requests"),
        ];
        const TOKENS: [HeaderName; 3] = [
            HeaderName::from_static("x-ratelimit-limit-tokens"),
            HeaderName::from_static("x-ratelimit-remaining-tokens"),
            HeaderName::from_static("x-ratelimit-reset-tokens"),
        ];
        let each = |names: [HeaderName; 3], rate: Rate| {
            let reset = HeaderValue::try_from(duration(rate.reset)).unwrap_or_else(|_| HeaderValue::from_static("0s"));
            names.into_iter().zip([rate.limit.into(), rate.remaining.into(), reset])
        };
        let requests = self.requests.map(|rate| each(REQUESTS, rate));
        let tokens = self.tokens.map(|rate| each(TOKENS, rate));
        requests.into_iter().chain(tokens).flatten()
    }
}

/// Formats a duration as OpenAI does: `12ms`, `8.64s`, `6m0s`, `23h59m30s`. Put together by hand, since it is written
/// for every answer.
fn duration(duration: Duration) -> String {
    let (seconds, millis) = (duration.as_secs(), duration.subsec_millis());
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let mut text = String::with_capacity(16);
    let mut push = |number: u64, unit: &str| {
        text.push_str(itoa::Buffer::new().format(number));
        text.push_str(unit);
    };
    if seconds == 0 && millis > 0 {
        push(millis.into(), "ms");
        return text;
    }
    if hours > 0 {
        push(hours, "h");
    }
    if hours > 0 || minutes > 0 {
        push(minutes, "m");
    }
    push(seconds % 60, "");
    if millis > 0 {
        // With a thousand on top it has all of its digits, and one more.
        let mut digits = itoa::Buffer::new();
        let digits = digits.format(1000 + millis).trim_end_matches('0');
        text.push('.');
        text.push_str(digits.get(1..).unwrap_or_default());
    }
    text.push('s');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_openai_does() {
        for (millis, text) in [
            (0, "0s"),
            (12, "12ms"),
            (1000, "1s"),
            (8640, "8.64s"),
            (8007, "8.007s"),
            (9100, "9.1s"),
            (3_600_050, "1h0m0.05s"),
            (60_000, "1m0s"),
            (360_000, "6m0s"),
            (86_370_000, "23h59m30s"),
        ] {
            assert_eq!(duration(Duration::from_millis(millis)), text);
        }
    }
}
