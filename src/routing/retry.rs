//! Outcomes of attempts: their effect on the endpoint, and whether they are retried. Pure.

use std::fmt;
use std::time::Duration;

use crate::config::{Retry, Trouble};
use crate::response::classify::{Meaning, Wait};
use crate::routing::health::{Effect, MISSING_REST, REST_GUESS, Scope};
use crate::telemetry::metrics;

/// Outcome of an attempt, or of the answer that it is about to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The endpoint answered with this status, which is no error.
    Answered {
        /// The status.
        status: u16,
    },
    /// The endpoint answered with an error.
    Error {
        /// What it means.
        meaning: Meaning,
        /// Where it stood.
        place: Place,
    },
    /// A 200 with nothing in it.
    Empty,
    /// A 200 that is no answer to the call.
    Unrecognised,
    /// A good answer, but no stream, after the gateway had begun one for its client.
    NotStreamed,
    /// A refusal of the `stream_options` that the gateway added; the attempt is repeated without.
    UsageRefused,
    /// No connection could be made to any of its addresses, or its name could not be resolved.
    ConnectFailed,
    /// The proxy on the way to it did not take our login (407).
    ProxyRefused,
    /// The connection or stream broke before the answer could be committed.
    Broken,
    /// No byte, or no event with content, in time, or a stream below `retry.minTokensPerSecond`.
    TooSlow,
    /// The permit expired while the connection was made, and the limit has no other; nothing was sent.
    LimitReached,
    /// The client went away.
    ClientGone,
    /// A fault of the client's request or of ours, which no endpoint had a part in.
    Ours,
}

/// Where an error stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the status of the answer.
    Status,
    /// In the body of a 200.
    Body,
    /// In an event of a stream.
    Event,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered { status } => write!(f, "answered {status}"),
            Self::Error { meaning: Meaning { status, trouble, rule, .. }, place } => {
                let how = match place {
                    Place::Status => "answered",
                    Place::Body => "answered 200 with error",
                    Place::Event => "streamed error",
                };
                write!(f, "{how} {status} ({} by {rule})", trouble.name())
            }
            Self::Empty => f.write_str("gave an empty answer"),
            Self::Unrecognised => f.write_str("answered 200 with something else than an answer"),
            Self::NotStreamed => f.write_str("answered without the stream that its client has the header of"),
            Self::UsageRefused => f.write_str("refused stream_options"),
            Self::ConnectFailed => f.write_str("could not be connected to"),
            Self::ProxyRefused => f.write_str("was not reached: its proxy wants another user and password (407)"),
            Self::Broken => f.write_str("broke off before its answer"),
            Self::TooSlow => f.write_str("did not answer in time"),
            Self::LimitReached => f.write_str("reached its limit before it could be asked"),
            Self::ClientGone => f.write_str("lost its client, which disconnected"),
            Self::Ours => f.write_str("was not asked"),
        }
    }
}

impl Outcome {
    /// The outcome of a status alone. `wait` is what the headers ask for.
    pub fn of_status(status: u16, wait: Option<Duration>) -> Self {
        match status {
            ..400 => Self::Answered { status },
            _ => Self::Error { meaning: Meaning::of_status(status, wait), place: Place::Status },
        }
    }

    /// What the error means, if it is one.
    pub fn meaning(&self) -> Option<&Meaning> {
        match self {
            Self::Error { meaning, .. } => Some(meaning),
            _ => None,
        }
    }

    /// True if an attempt that came to this end may be billed, though it reported no tokens: it was under way.
    pub fn may_be_billed(&self) -> bool {
        match self {
            Self::TooSlow
            | Self::Broken
            | Self::Empty
            | Self::Unrecognised
            | Self::NotStreamed
            | Self::ClientGone
            | Self::Answered { .. } => true,
            Self::Error { .. }
            | Self::ConnectFailed
            | Self::ProxyRefused
            | Self::LimitReached
            | Self::UsageRefused
            | Self::Ours => false,
        }
    }

    /// True if it is an answer of the class 2xx.
    pub fn is_success(&self) -> bool {
        matches!(self, Self::Answered { status: 200..=299 })
    }

    /// A short stable name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Answered { .. } => metrics::OK,
            Self::Error { place: Place::Event, .. } => "error_event",
            Self::Error { meaning, .. } => match (meaning.trouble, meaning.status) {
                (Trouble::Key, _) => "key_refused",
                (Trouble::ModelLimit | Trouble::AccountLimit, _) => "rate_limited",
                (_, ..=499) => "status_4xx",
                _ => "status_5xx",
            },
            Self::Empty => "empty",
            Self::Unrecognised | Self::NotStreamed => "unrecognised",
            Self::UsageRefused => "usage_refused",
            Self::ConnectFailed | Self::ProxyRefused => "connect_failed",
            Self::Broken => "broken",
            Self::TooSlow => "too_slow",
            Self::LimitReached => "limit_reached",
            Self::ClientGone => "client_gone",
            Self::Ours => "ours",
        }
    }

    /// Returns the effect on the endpoint's health. `day_left` is the rest of its day.
    pub fn effect(&self, day_left: impl Fn() -> Duration) -> Effect {
        match self {
            Self::Answered { .. } => Effect::Success,
            Self::Error { meaning, .. } => effect_of(meaning, day_left),
            Self::LimitReached | Self::ClientGone | Self::Ours | Self::UsageRefused | Self::NotStreamed => {
                Effect::Neutral
            }
            Self::ConnectFailed | Self::ProxyRefused => Effect::Failure(Scope::Endpoint),
            Self::Empty | Self::Unrecognised | Self::Broken | Self::TooSlow => Effect::Failure(Scope::Model),
        }
    }

    /// True if it is the trouble of the key that was sent, or of its account.
    pub fn is_of_key(&self) -> bool {
        self.meaning().is_some_and(|meaning| {
            matches!(meaning.trouble, Trouble::Key | Trouble::ModelLimit | Trouble::AccountLimit)
        })
    }

    /// True if another key of the endpoint may do better. A request that is larger than a limit is so with each key, and a refusal in
    /// words that nobody knows may be of the request.
    pub fn may_try_another_key(&self) -> bool {
        let is_shared = |meaning: &Meaning| meaning.wait == Wait::Not || meaning.status == 403 && !meaning.is_known();
        self.is_of_key() && !self.meaning().is_some_and(is_shared)
    }

    /// True if another endpoint may do better, as long as nothing has reached the client.
    pub fn is_retryable(&self, retry: &Retry) -> bool {
        match self {
            Self::Error { meaning, .. } => is_error_retryable(meaning, retry),
            // Another one would have to be paid for as well.
            Self::Answered { .. } | Self::NotStreamed | Self::ClientGone | Self::Ours => false,
            Self::UsageRefused
            | Self::Empty
            | Self::Unrecognised
            | Self::ConnectFailed
            | Self::ProxyRefused
            | Self::Broken
            | Self::TooSlow
            | Self::LimitReached => true,
        }
    }

    /// True if the client is not shown it as it came: it is an endpoint's complaint about the gateway's key or account, which
    /// the client would take for one about its own.
    pub fn is_hidden(&self, retry: &Retry) -> bool {
        let Self::Error { meaning, .. } = self else { return false };
        let refuses_us = meaning.trouble == Trouble::Endpoint && matches!(meaning.status, 401 | 403);
        (meaning.trouble == Trouble::Key || refuses_us) && !retry.show_endpoint_key_errors
    }

    /// True if it is the request's own fault once two endpoints have said it alike, since one prompt can make every server fail,
    /// or say nothing.
    pub fn is_shared_by_request(&self) -> bool {
        let meaning = match self {
            Self::Empty | Self::Unrecognised => return true,
            Self::Error { meaning, .. } => meaning,
            _ => return false,
        };
        let is_page = meaning.trouble == Trouble::Endpoint && meaning.status == 403;
        let is_failure = meaning.trouble == Trouble::ModelFailure;
        // A wall before an endpoint may forbid a prompt.
        is_page || is_failure && matches!(meaning.status, 400 | 404..=428 | 430..=500)
    }
}

/// Longest rest for a daily quota.
const DAY_LEFT_MAX: Duration = Duration::from_hours(1);

fn effect_of(meaning: &Meaning, day_left: impl Fn() -> Duration) -> Effect {
    let at_most = if meaning.wait == Wait::Quota { day_left() } else { Duration::MAX };
    let rest = |scope, guess: Duration| match meaning.wait {
        Wait::Stated(wait) => Effect::Rest { scope, wait, guessed: false },
        // Its day may turn at another time than is known here.
        Wait::Day => Effect::Rest { scope, wait: day_left().min(DAY_LEFT_MAX), guessed: false },
        Wait::Unsaid | Wait::Quota => Effect::Rest { scope, wait: guess, guessed: true },
        Wait::Not => Effect::Neutral,
    };
    match meaning.trouble {
        Trouble::Request | Trouble::CallMissing | Trouble::ObjectMissing => Effect::Neutral,
        Trouble::ModelLimit => rest(Scope::Model, REST_GUESS),
        Trouble::AccountLimit => rest(Scope::Endpoint, REST_GUESS),
        Trouble::ModelMissing => Effect::Rest { scope: Scope::Model, wait: MISSING_REST, guessed: true },
        Trouble::ModelFailure if meaning.wait != Wait::Unsaid => rest(Scope::Model, REST_GUESS),
        Trouble::ModelFailure => Effect::Failure(Scope::Model),
        Trouble::Key if meaning.is_known() => Effect::KeyRefused { at_most },
        Trouble::Endpoint if meaning.wait != Wait::Unsaid => rest(Scope::Endpoint, REST_GUESS),
        Trouble::Key | Trouble::Endpoint => Effect::Failure(Scope::Endpoint),
    }
}

/// What a rule says decides where there is one, the user's list of statuses elsewhere.
fn is_error_retryable(meaning: &Meaning, retry: &Retry) -> bool {
    match meaning.trouble {
        _ if !meaning.is_known() => retry.statuses.contains(meaning.status),
        Trouble::Request | Trouble::ObjectMissing => false,
        // It is asked once, and the answer is remembered.
        Trouble::CallMissing => meaning.status != 404 || retry.statuses.contains(404),
        Trouble::ModelLimit
        | Trouble::AccountLimit
        | Trouble::ModelFailure
        | Trouble::ModelMissing
        | Trouble::Key
        | Trouble::Endpoint => true,
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
    use crate::response::classify;

    fn retry() -> Retry {
        config("[]").server.retry
    }

    fn effect(outcome: Outcome) -> Effect {
        outcome.effect(|| Duration::from_hours(3))
    }

    fn status(status: u16) -> Outcome {
        Outcome::of_status(status, None)
    }

    fn of_body(status: u16, body: &str) -> Outcome {
        Outcome::Error { meaning: classify::of_answer(status, body.as_bytes(), None, &[]), place: Place::Status }
    }

    #[test]
    fn faults_of_the_request_are_neither_retried_nor_held_against_the_endpoint() {
        for code in [400, 404, 405, 409, 413, 415, 422] {
            assert!(!status(code).is_retryable(&retry()), "{code}");
            assert_eq!(effect(status(code)), Effect::Neutral, "{code}");
        }
    }

    #[test]
    fn faults_of_the_endpoint_are_both() {
        for code in [401, 402, 403] {
            assert!(status(code).is_retryable(&retry()), "{code}");
            assert_eq!(effect(status(code)), Effect::Failure(Scope::Endpoint), "{code}");
        }
        for code in [408, 425, 500, 502, 503, 504, 529, 599] {
            assert!(status(code).is_retryable(&retry()), "{code}");
            assert_eq!(effect(status(code)), Effect::Failure(Scope::Model), "{code}");
        }
    }

    #[test]
    fn limits_rest_what_they_belong_to() {
        let rest = |scope, secs, guessed| Effect::Rest { scope, wait: Duration::from_secs(secs), guessed };
        let stated = Some(Duration::from_secs(3));
        for (outcome, expected) in [
            (Outcome::of_status(429, stated), rest(Scope::Model, 3, false)),
            (status(429), rest(Scope::Model, 5, true)),
            (Outcome::of_status(503, stated), rest(Scope::Model, 3, false)),
            (Outcome::of_status(529, stated), rest(Scope::Model, 3, false)),
            (
                of_body(429, r#"{"error":{"type":"rate_limit_reached_error","message":"x"}}"#),
                rest(Scope::Endpoint, 5, true),
            ),
            (of_body(429, r#"{"error":{"message":"Please try again in 20s."}}"#), rest(Scope::Model, 20, false)),
            (of_body(404, r#"{"error":{"code":"model_not_found","message":"x"}}"#), rest(Scope::Model, 600, true)),
            (
                of_body(
                    429,
                    r#"{"error":{"details":[{"violations":[{"quotaId":"RequestsPerDayPerProject"}]},{"retryDelay":"25s"}]}}"#,
                ),
                rest(Scope::Model, 3600, false),
            ),
        ] {
            assert!(outcome.is_retryable(&retry()), "{outcome}");
            assert_eq!(effect(outcome), expected, "{outcome}");
        }
    }

    #[test]
    fn what_is_too_large_goes_elsewhere_and_rests_nobody() {
        let body = r#"{"error":{"code":"rate_limit_exceeded","type":"tokens","message":"Request too large for model `x` in organization `o` on tokens per minute (TPM): Limit 6000, Requested 14810"}}"#;
        let outcome = of_body(413, body);
        assert!(outcome.is_retryable(&retry()));
        assert_eq!(effect(outcome), Effect::Neutral);
    }

    #[test]
    fn a_key_is_refused_by_its_name_whatever_the_status() {
        for (status, body) in [
            (
                400,
                r#"[{"error":{"code":400,"message":"API key not valid. Please pass a valid API key.","status":"INVALID_ARGUMENT"}}]"#,
            ),
            (401, r#"{"error":{"code":"invalid_api_key","message":"x"}}"#),
            (429, r#"{"error":{"code":"insufficient_quota","message":"x"}}"#),
        ] {
            let outcome = of_body(status, body);
            assert!(outcome.is_retryable(&retry()));
            // Money may come when the quota turns.
            let at_most = if status == 429 { Duration::from_hours(3) } else { Duration::MAX };
            assert_eq!(effect(outcome), Effect::KeyRefused { at_most }, "{outcome}");
        }
        let flagged =
            of_body(403, r#"{"error":{"code":403,"message":"x","metadata":{"reasons":["a"],"flagged_input":"b"}}}"#);
        assert!(!flagged.is_retryable(&retry()));
        assert_eq!(effect(flagged), Effect::Neutral);
    }

    #[test]
    fn what_two_endpoints_may_say_alike_of_a_request() {
        for code in [408, 425, 500] {
            assert!(status(code).is_shared_by_request(), "{code}");
        }
        for code in [401, 402, 403, 429, 502, 503, 504, 529] {
            assert!(!status(code).is_shared_by_request(), "{code}");
        }
        assert!(!Outcome::Broken.is_shared_by_request());
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
