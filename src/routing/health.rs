//! Health of an endpoint: errors in a row, cool-down, half-open trial, rest. Pure; the clock is passed in.
//!
//! ```text
//!            `failures` in a row                 cool-down over, one request at a time
//!   open ────────────────────────► cooling ─────────────────────────────► trial
//!    ▲                                ▲                                     │
//!    └──────────── success ───────────┼───────────── success ◄──────────────┤
//!                                     └───────────── failure ◄──────────────┘
//! ```
//!
//! A rest is something else: the endpoint asked for a pause (429) until a moment, which does not count as an error.

use std::time::{Duration, Instant, SystemTime};

use http::HeaderMap;

use crate::config::Breaker;

/// The rest of an endpoint that answers 429 and does not say for how long.
pub(crate) const REST_DEFAULT: Duration = Duration::from_secs(5);
/// Longest rest, whatever the endpoint asks for: longer than any daily quota takes to come back.
const REST_MAX: Duration = Duration::from_hours(24);

/// Health of one endpoint, by the outcomes of its attempts.
#[derive(Debug, Default)]
pub struct Health {
    errors_in_row: u32,
    cooling_until: Option<Instant>,
    trial_under_way: bool,
    resting_until: Option<Instant>,
}

/// Returns whether health lets a request through now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// Requests may go there.
    Open,
    /// The cool-down is over; one request may try.
    TrialDue,
    /// It failed repeatedly and gets no requests, unless nothing else is there.
    Cooling {
        /// The end of the cool-down.
        until: Instant,
    },
    /// A trial is under way; nothing else may go there until it ends.
    OnTrial,
    /// It asked for a pause.
    Resting {
        /// The end of the rest.
        until: Instant,
    },
}

/// Effect of an attempt on the health of its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It has begun to answer as it should.
    Answers,
    /// It answered as it should, to the end.
    Success,
    /// It failed, in a way that its next request may fail as well.
    Failure,
    /// It asked for a pause of this length.
    Rest(Duration),
    /// No effect: the request was at fault, or the client disconnected.
    Neutral,
}

impl Health {
    /// Answer of an endpoint's health to a request.
    pub fn gate(&self, now: Instant) -> Gate {
        if let Some(until) = self.resting_until.filter(|until| *until > now) {
            return Gate::Resting { until };
        }
        match self.cooling_until {
            None => Gate::Open,
            Some(_) if self.trial_under_way => Gate::OnTrial,
            Some(until) if until > now => Gate::Cooling { until },
            Some(_) => Gate::TrialDue,
        }
    }

    /// Lets one request through to an endpoint that is cooling down. False if one is there already.
    pub fn begin_trial(&mut self) -> bool {
        let begun = self.cooling_until.is_some() && !self.trial_under_way;
        self.trial_under_way |= begun;
        begun
    }

    /// Ends the trial, whatever it showed.
    pub fn end_trial(&mut self) {
        self.trial_under_way = false;
    }

    /// Takes in what an attempt showed. `trial` says whether it was the trial.
    pub fn learn(&mut self, effect: Effect, trial: bool, now: Instant, breaker: &Breaker) {
        match effect {
            // Others may come again, but the errors stand until an answer has come to its end: an endpoint whose streams all
            // break would never cool down otherwise.
            Effect::Answers => self.cooling_until = None,
            Effect::Success => *self = Self { trial_under_way: self.trial_under_way, ..Self::default() },
            Effect::Rest(wait) => self.resting_until = now.checked_add(wait.min(REST_MAX)),
            Effect::Neutral => {}
            Effect::Failure => {
                self.errors_in_row = self.errors_in_row.saturating_add(1);
                // An attempt that began before the cool-down and fails in it does not make it longer.
                let begins = self.cooling_until.is_none() || trial;
                if self.errors_in_row >= breaker.failures && begins {
                    self.cooling_until = now.checked_add(breaker.cool_down);
                }
            }
        }
    }

    /// Errors since the last success.
    pub fn errors_in_row(&self) -> u32 {
        self.errors_in_row
    }

    /// True while nothing at all is held against the endpoint, so that a look at it may be skipped.
    pub fn is_spotless(&self) -> bool {
        self.errors_in_row == 0 && self.cooling_until.is_none() && self.resting_until.is_none()
    }

    /// The end of the cool-down, if it is cooling down.
    pub fn cooling_until(&self) -> Option<Instant> {
        self.cooling_until
    }

    /// The end of the rest, if one was asked for.
    pub fn resting_until(&self) -> Option<Instant> {
        self.resting_until
    }
}

/// Returns the pause that an endpoint's 429 asks for: `retry-after-ms`, else `Retry-After` in seconds or as a date (RFC
/// 9110, 10.2.3), else five seconds.
pub(crate) fn rest_asked(headers: &HeaderMap, wall_clock: SystemTime) -> Duration {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let millis = text("retry-after-ms").and_then(|text| seconds(text, 1e-3));
    let asked = millis.or_else(|| {
        let text = text("retry-after")?;
        seconds(text, 1.0).or_else(|| {
            let date = httpdate::parse_http_date(text).ok()?;
            Some(date.duration_since(wall_clock).unwrap_or_default())
        })
    });
    asked.unwrap_or(REST_DEFAULT).min(REST_MAX)
}

fn seconds(text: &str, unit: f64) -> Option<Duration> {
    let value: f64 = text.parse().ok()?;
    Duration::try_from_secs_f64(value * unit).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BREAKER: Breaker = Breaker { failures: 3, cool_down: Duration::from_mins(10) };

    fn failed(health: &mut Health, times: u32, now: Instant) {
        for _ in 0..times {
            health.learn(Effect::Failure, false, now, &BREAKER);
        }
    }

    #[test]
    fn cools_down_after_errors_in_a_row_only() {
        let now = Instant::now();
        let mut health = Health::default();
        failed(&mut health, 2, now);
        health.learn(Effect::Success, false, now, &BREAKER);
        failed(&mut health, 2, now);
        assert_eq!(health.gate(now), Gate::Open);
        failed(&mut health, 1, now);
        let until = now + BREAKER.cool_down;
        assert_eq!(health.gate(now), Gate::Cooling { until });
        assert_eq!(health.gate(until), Gate::TrialDue);
    }

    #[test]
    fn one_trial_at_a_time_decides() {
        let now = Instant::now();
        let mut health = Health::default();
        failed(&mut health, 3, now);
        let due = now + BREAKER.cool_down;
        assert!(health.begin_trial());
        assert!(!health.begin_trial(), "a second trial beside the first");
        assert_eq!(health.gate(due), Gate::OnTrial);
        health.learn(Effect::Failure, true, due, &BREAKER);
        health.end_trial();
        assert_eq!(health.gate(due), Gate::Cooling { until: due + BREAKER.cool_down });
        assert!(health.begin_trial());
        health.learn(Effect::Neutral, true, due, &BREAKER);
        health.end_trial();
        assert!(health.begin_trial(), "a trial whose client went away leaves room for the next");
        health.learn(Effect::Success, true, due, &BREAKER);
        health.end_trial();
        assert_eq!(health.gate(due), Gate::Open);
        assert!(health.is_spotless());
    }

    #[test]
    fn an_answer_that_breaks_off_is_one_more_error() {
        let now = Instant::now();
        let mut health = Health::default();
        failed(&mut health, 3, now);
        assert!(health.begin_trial());
        health.learn(Effect::Answers, true, now, &BREAKER);
        health.end_trial();
        assert_eq!(health.gate(now), Gate::Open, "others may come while the trial's stream goes on");
        failed(&mut health, 1, now);
        assert_eq!(health.gate(now), Gate::Cooling { until: now + BREAKER.cool_down });
    }

    #[test]
    fn late_failures_do_not_prolong_a_cool_down() {
        let now = Instant::now();
        let mut health = Health::default();
        failed(&mut health, 3, now);
        failed(&mut health, 5, now + Duration::from_mins(1));
        assert_eq!(health.gate(now), Gate::Cooling { until: now + BREAKER.cool_down });
    }

    #[test]
    fn a_rest_is_no_error() {
        let now = Instant::now();
        let mut health = Health::default();
        health.learn(Effect::Rest(Duration::from_secs(7)), false, now, &BREAKER);
        let until = now + Duration::from_secs(7);
        assert_eq!(health.gate(now), Gate::Resting { until });
        assert_eq!(health.gate(until), Gate::Open);
        assert_eq!(health.errors_in_row(), 0);
    }

    #[test]
    fn rest_as_asked() {
        let wall = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let asked = |millis: &str, after: &str| {
            let mut headers = HeaderMap::new();
            for (name, value) in [("retry-after-ms", millis), ("retry-after", after)] {
                if !value.is_empty() {
                    headers.insert(name, value.parse().unwrap());
                }
            }
            rest_asked(&headers, wall)
        };
        let secs = Duration::from_secs;
        assert_eq!(asked("1500", "9"), Duration::from_millis(1500));
        assert_eq!(asked("", "9"), secs(9));
        assert_eq!(asked("", "Sun, 06 Nov 1994 08:50:07 GMT"), secs(30));
        assert_eq!(asked("", "Sun, 06 Nov 1994 08:00:00 GMT"), secs(0));
        for nonsense in ["soon", "-3", "1e300", ""] {
            assert_eq!(asked("", nonsense), REST_DEFAULT, "{nonsense}");
        }
        assert_eq!(asked("", "999999999"), REST_MAX);
    }
}
