//! Outcomes of attempts: their effect on the endpoint, and whether they are retried. Pure.

use std::fmt;
use std::time::Duration;

use crate::config::Retry;
use crate::routing::health::Effect;
use crate::telemetry::metrics;

/// Outcome of an attempt, or of the answer that it is about to give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The endpoint answered with this status; `rest` is the pause that it asked for if it is a 429.
    Status {
        /// The status.
        status: u16,
        /// Pause from `Retry-After`, or the default.
        rest: Duration,
    },
    /// A 200 with nothing in it.
    Empty,
    /// A stream whose first event is an error.
    ErrorEvent,
    /// A refusal of the `stream_options` that the gateway added; the attempt is repeated without.
    UsageRefused,
    /// No connection could be made to any of its addresses, or its name could not be resolved.
    ConnectFailed,
    /// The connection or stream broke before the answer could be committed.
    Broken,
    /// No byte, or no event with content, within the first-byte timeout.
    TooSlow,
    /// The permit expired while the connection was made, and the limit has no other; nothing was sent.
    LimitReached,
    /// The client went away.
    ClientGone,
    /// A fault of the client's request or of ours, which no endpoint had a part in.
    Ours,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status { status, .. } => write!(f, "answered {status}"),
            Self::Empty => f.write_str("gave an empty answer"),
            Self::ErrorEvent => f.write_str("began its stream with an error"),
            Self::UsageRefused => f.write_str("refused stream_options"),
            Self::ConnectFailed => f.write_str("could not be connected to"),
            Self::Broken => f.write_str("broke off before its answer"),
            Self::TooSlow => f.write_str("did not answer in time"),
            Self::LimitReached => f.write_str("reached its limit before it could be asked"),
            Self::ClientGone => f.write_str("lost its client, which disconnected"),
            Self::Ours => f.write_str("was not asked"),
        }
    }
}

impl Outcome {
    /// A short stable name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Status { status: 100..=399, .. } => metrics::OK,
            Self::Status { status: 401 | 403, .. } => "key_refused",
            Self::Status { status: 429, .. } => "rate_limited",
            Self::Status { status: 400..=499, .. } => "status_4xx",
            Self::Status { .. } => "status_5xx",
            Self::Empty => "empty",
            Self::ErrorEvent => "error_event",
            Self::UsageRefused => "usage_refused",
            Self::ConnectFailed => "connect_failed",
            Self::Broken => "broken",
            Self::TooSlow => "too_slow",
            Self::LimitReached => "limit_reached",
            Self::ClientGone => "client_gone",
            Self::Ours => "ours",
        }
    }

    /// Returns the effect on the endpoint's health.
    pub fn effect(&self) -> Effect {
        match self {
            Self::Status { status, rest } => match status {
                100..=399 => Effect::Success,
                429 => Effect::Rest(*rest),
                401..=403 | 408 | 425 | 500..=599 => Effect::Failure,
                // Faults of the request: any endpoint would give this answer.
                _ => Effect::Neutral,
            },
            Self::LimitReached | Self::ClientGone | Self::Ours | Self::UsageRefused => Effect::Neutral,
            Self::Empty | Self::ErrorEvent | Self::ConnectFailed | Self::Broken | Self::TooSlow => Effect::Failure,
        }
    }

    /// True if another endpoint may do better, as long as nothing has reached the client.
    pub fn is_retryable(&self, retry: &Retry) -> bool {
        match self {
            Self::Status { status, .. } => retry.statuses.contains(*status),
            Self::ClientGone | Self::Ours => false,
            Self::UsageRefused
            | Self::Empty
            | Self::ErrorEvent
            | Self::ConnectFailed
            | Self::Broken
            | Self::TooSlow
            | Self::LimitReached => true,
        }
    }
}

/// True if one more attempt may begin after this many, and this long after the request came.
pub fn may_begin(retry: &Retry, attempts: u32, elapsed: Duration) -> bool {
    attempts == 0 || (attempts < retry.attempts && elapsed < retry.budget)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::config;

    fn retry() -> Retry {
        config("[]").server.retry
    }

    #[test]
    fn faults_of_the_request_are_neither_retried_nor_held_against_the_endpoint() {
        for status in [400, 405, 409, 413, 415, 422] {
            let outcome = Outcome::Status { status, rest: Duration::ZERO };
            assert!(!outcome.is_retryable(&retry()), "{status}");
            assert_eq!(outcome.effect(), Effect::Neutral, "{status}");
        }
    }

    #[test]
    fn faults_of_the_endpoint_are_both() {
        for status in [401, 402, 403, 408, 425, 500, 502, 503, 504, 529, 599] {
            let outcome = Outcome::Status { status, rest: Duration::ZERO };
            assert!(outcome.is_retryable(&retry()), "{status}");
            assert_eq!(outcome.effect(), Effect::Failure, "{status}");
        }
    }

    #[test]
    fn a_404_is_retried_but_not_held_against_the_endpoint() {
        let outcome = Outcome::Status { status: 404, rest: Duration::ZERO };
        assert!(outcome.is_retryable(&retry()));
        assert_eq!(outcome.effect(), Effect::Neutral);
    }

    #[test]
    fn a_429_rests_the_endpoint() {
        let rest = Duration::from_secs(3);
        let outcome = Outcome::Status { status: 429, rest };
        assert!(outcome.is_retryable(&retry()));
        assert_eq!(outcome.effect(), Effect::Rest(rest));
    }

    #[test]
    fn attempts_and_budget_bound_a_request() {
        let retry = retry();
        assert!(may_begin(&retry, 9, Duration::ZERO));
        assert!(!may_begin(&retry, 10, Duration::ZERO));
        assert!(!may_begin(&retry, 1, retry.budget));
        assert!(may_begin(&retry, 0, retry.budget), "the first attempt always begins");
    }
}
