//! The last hour of each endpoint by minutes, taken from the counters of the metrics once a minute: nothing of it stands on the way
//! of a request.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::metrics::{Totals, metrics, to_f64};

/// Minutes that are kept.
pub(crate) const MINUTES: usize = 60;

/// What happened at an endpoint in a minute.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Minute {
    attempts: u64,
    failed: u64,
    answers: u64,
    first_byte_seconds: f64,
}

impl Minute {
    fn between(before: Totals, now: Totals) -> Self {
        Self {
            attempts: now.attempts.saturating_sub(before.attempts),
            failed: now.failed.saturating_sub(before.failed),
            answers: now.answers.saturating_sub(before.answers),
            first_byte_seconds: (now.first_byte_seconds - before.first_byte_seconds).max(0.0),
        }
    }
}

/// The last hour of every endpoint. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trends(Arc<Mutex<Kept>>);

/// At most [`MINUTES`], each with the endpoints that had attempts in it.
#[derive(Debug, Default)]
struct Kept {
    /// Counters when the last minute ended.
    before: HashMap<String, Totals>,
    minutes: VecDeque<HashMap<String, Minute>>,
}

/// The last hour of an endpoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Trend {
    /// Attempts that have ended.
    pub(crate) attempts: u64,
    /// Those of them that failed by the endpoint.
    pub(crate) failed: u64,
    /// Mean time to the first byte by minutes, in milliseconds, the oldest first and the one that runs last; none where nothing was
    /// answered.
    pub(crate) first_byte_ms: Vec<Option<f64>>,
}

impl Trends {
    /// Ends a minute.
    pub(crate) fn end_minute(&self) {
        let now = metrics().map(super::metrics::Metrics::totals).unwrap_or_default();
        let mut kept = self.lock();
        let minute = kept.since(&now);
        if kept.minutes.len() >= MINUTES {
            kept.minutes.pop_front();
        }
        kept.minutes.push_back(minute);
        kept.before = now;
    }

    /// The last hour of each endpoint that had any attempt in it.
    pub(crate) fn of_all(&self) -> HashMap<String, Trend> {
        let now = metrics().map(super::metrics::Metrics::totals).unwrap_or_default();
        let kept = self.lock();
        let running = kept.since(&now);
        let minutes: Vec<_> = kept.minutes.iter().chain([&running]).collect();
        let mut trends: HashMap<String, Trend> = HashMap::new();
        for (place, minute) in minutes.iter().enumerate() {
            for (endpoint, Minute { attempts, failed, answers, first_byte_seconds }) in *minute {
                let trend = trends.entry(endpoint.clone()).or_default();
                trend.attempts += attempts;
                trend.failed += failed;
                trend.first_byte_ms.resize(place, None);
                trend.first_byte_ms.push((*answers > 0).then(|| first_byte_seconds * 1e3 / to_f64(*answers)));
            }
        }
        for trend in trends.values_mut() {
            trend.first_byte_ms.resize(minutes.len(), None);
        }
        trends
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn since(&self, now: &HashMap<String, Totals>) -> HashMap<String, Minute> {
        let minute = |(endpoint, now): (&String, &Totals)| {
            let minute = Minute::between(self.before.get(endpoint).copied().unwrap_or_default(), *now);
            (minute != Minute::default()).then(|| (endpoint.clone(), minute))
        };
        now.iter().filter_map(minute).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::{Ended, OK};

    #[test]
    fn an_hour_is_kept_by_minutes() {
        let trends = Trends::default();
        let (endpoint, metrics) = ("of-the-trends-test", metrics().unwrap());
        let ended = |millis| Ended {
            endpoint: Some(endpoint),
            model: "m",
            status: Some(200),
            outcome: OK,
            first_byte: Some(std::time::Duration::from_millis(millis)),
            total: std::time::Duration::from_secs(1),
            counters: None,
            key: None,
        };
        trends.end_minute();
        metrics.attempt(endpoint, OK, None);
        metrics.request(&ended(100));
        metrics.attempt(endpoint, "status_5xx", None);
        // The endpoint has no part in these.
        metrics.attempt(endpoint, "client_gone", None);
        trends.end_minute();
        metrics.attempt(endpoint, OK, None);
        metrics.request(&ended(300));
        let trend = trends.of_all()[endpoint].clone();
        assert_eq!((trend.attempts, trend.failed), (3, 1));
        let rounded: Vec<_> = trend.first_byte_ms.iter().map(|ms| ms.map(f64::round)).collect();
        assert_eq!(rounded, [None, Some(100.0), Some(300.0)]);
        for _ in 0..=MINUTES {
            trends.end_minute();
        }
        assert!(!trends.of_all().contains_key(endpoint), "that was more than an hour ago");
        assert_eq!(trends.lock().minutes.len(), MINUTES);
    }
}
