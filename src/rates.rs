//! What this proxy can still take for a model, in the headers that OpenAI has for it.

use std::sync::PoisonError;
use std::time::Duration;

use http::{HeaderName, HeaderValue};

use crate::config::Limit;
use crate::health::Gate;
use crate::limit::{Clock, Gauge};
use crate::pool::Pool;
use crate::route::Candidates;

/// How they all begin; an endpoint's own are not for the client, whom they tell nothing about the others.
pub const PREFIX: &str = "x-ratelimit-";

/// Requests or tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// What all endpoints of the model take together.
    pub limit: u64,
    /// What they still take now.
    pub remaining: u64,
    /// Until they take all of it again.
    pub reset: Duration,
}

/// Both, as far as every endpoint of the model has such a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Requests.
    pub requests: Option<Rate>,
    /// Tokens.
    pub tokens: Option<Rate>,
}

impl Rates {
    /// Those of a model, as its endpoints were seen last, at most about a second ago.
    pub fn of(pool: &Pool, candidates: &Candidates, clock: &Clock) -> Self {
        /// So many are added up for every request, more only now and then.
        const ADDED_UP_MAX: usize = 16;
        const NOW_AND_THEN: Duration = Duration::from_millis(100);
        if candidates.list().len() <= ADDED_UP_MAX {
            return Self::add_up(pool, candidates, clock);
        }
        let mut told = candidates.rates.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, rates)) = *told
            && clock.boot - at < NOW_AND_THEN
        {
            return rates;
        }
        let rates = Self::add_up(pool, candidates, clock);
        *told = Some((clock.boot, rates));
        rates
    }

    fn add_up(pool: &Pool, candidates: &Candidates, clock: &Clock) -> Self {
        let nothing = Rate { limit: 0, remaining: 0, reset: Duration::ZERO };
        let mut rates = Self { requests: Some(nothing), tokens: Some(nothing) };
        for candidate in candidates.list() {
            let Some(endpoint) = pool.endpoints.get(candidate.endpoint) else { continue };
            if !endpoint.limits.in_ledger() {
                return Self::default();
            }
            let view = endpoint.live.account.view();
            let is_open = endpoint.live.gate(clock.now) == Gate::Open;
            let add = |rate: Option<Rate>, gauges: [(Limit, Option<Gauge>); 2]| {
                let rate = rate?;
                // The tighter one is what a client will run into.
                let gauge = gauges.into_iter().filter_map(known).min_by_key(Gauge::left)?;
                let reset = gauge.resets.map_or(Duration::ZERO, |resets| clock.boot.until(resets));
                let left = if is_open { gauge.left() } else { 0 };
                Some(Rate {
                    limit: rate.limit.saturating_add(gauge.limit),
                    remaining: rate.remaining.saturating_add(left),
                    reset: rate.reset.max(reset),
                })
            };
            let limits = &endpoint.limits;
            rates.requests = add(rates.requests, [(limits.rpm, view.rpm), (limits.rpd, view.rpd)]);
            rates.tokens = add(rates.tokens, [(limits.tpm, view.tpm), (limits.tpd, view.tpd)]);
        }
        rates
    }

    /// As headers.
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

/// What is seen of a limit; before it was looked at for the first time, nothing is used.
fn known((limit, gauge): (Limit, Option<Gauge>)) -> Option<Gauge> {
    let Limit::AtMost(limit) = limit else { return None };
    Some(gauge.map_or(Gauge { limit, used: 0, resets: None }, |gauge| Gauge { limit, ..gauge }))
}

/// As OpenAI writes it: `12ms`, `8.64s`, `6m0s`, `23h59m30s`. Pushed together by hand, since it is written for every answer.
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
