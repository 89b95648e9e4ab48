//! The last hour of each endpoint by minutes, taken from the counters of the metrics once a minute: nothing of it stands on the way
//! of a request.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::metrics::{Totals, metrics, to_f64};

/// Minutes that are kept.
pub(crate) const MINUTES: usize = 60;

/// Counters of an endpoint, or what they grew by in a minute.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Counts {
    attempts: u64,
    failed: u64,
    /// Good answers whose first byte was timed, and the sum of these times.
    answers: u64,
    first_bytes: Duration,
}

impl Counts {
    fn since(self, before: Self) -> Self {
        Self {
            attempts: self.attempts.saturating_sub(before.attempts),
            failed: self.failed.saturating_sub(before.failed),
            answers: self.answers.saturating_sub(before.answers),
            first_bytes: self.first_bytes.saturating_sub(before.first_bytes),
        }
    }
}

/// Time to the first byte of good answers of an endpoint: their number and sum since the process started.
pub(crate) type FirstBytes<'a> = (&'a str, (u64, Duration));

/// The last hour of every endpoint. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trends(Arc<Mutex<Kept>>);

/// At most [`MINUTES`], each with the endpoints that had attempts in it.
#[derive(Debug, Default)]
struct Kept {
    /// Counters when the last minute ended.
    before: HashMap<String, Counts>,
    minutes: VecDeque<HashMap<String, Counts>>,
}

/// The last hour of an endpoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Trend {
    /// Attempts that have ended.
    pub(crate) attempts: u64,
    /// Those of them that failed by the endpoint.
    pub(crate) failed: u64,
    /// Mean time from an attempt's beginning to the first byte of a good answer by minutes, in milliseconds, the oldest first and the
    /// one that runs last; none where nothing was answered.
    pub(crate) first_byte_ms: Vec<Option<f64>>,
}

impl Trends {
    /// Ends a minute.
    pub(crate) fn end_minute<'a>(&self, times: impl Iterator<Item = FirstBytes<'a>>) {
        let now = counts(times);
        let mut kept = self.lock();
        let minute = kept.since(&now);
        if kept.minutes.len() >= MINUTES {
            kept.minutes.pop_front();
        }
        kept.minutes.push_back(minute);
        kept.before = now;
    }

    /// The last hour of each endpoint that had any attempt in it.
    pub(crate) fn of_all<'a>(&self, times: impl Iterator<Item = FirstBytes<'a>>) -> HashMap<String, Trend> {
        let now = counts(times);
        let kept = self.lock();
        let running = kept.since(&now);
        let minutes: Vec<_> = kept.minutes.iter().chain([&running]).collect();
        let mut trends: HashMap<String, Trend> = HashMap::new();
        for (place, minute) in minutes.iter().enumerate() {
            for (endpoint, counts) in *minute {
                match trends.get_mut(endpoint) {
                    Some(trend) => trend.add(place, *counts),
                    None => trends.entry(endpoint.clone()).or_default().add(place, *counts),
                }
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

impl Trend {
    fn add(&mut self, minute: usize, Counts { attempts, failed, answers, first_bytes }: Counts) {
        self.attempts += attempts;
        self.failed += failed;
        self.first_byte_ms.resize(minute, None);
        self.first_byte_ms.push((answers > 0).then(|| first_bytes.as_secs_f64() * 1e3 / to_f64(answers)));
    }
}

/// The counters as they are now.
fn counts<'a>(times: impl Iterator<Item = FirstBytes<'a>>) -> HashMap<String, Counts> {
    let totals = metrics().map(super::metrics::Metrics::totals).unwrap_or_default();
    let counted =
        |(endpoint, Totals { attempts, failed })| (endpoint, Counts { attempts, failed, ..Counts::default() });
    let mut counts: HashMap<String, Counts> = totals.into_iter().map(counted).collect();
    for (endpoint, (answers, first_bytes)) in times {
        if let Some(counts) = counts.get_mut(endpoint) {
            (counts.answers, counts.first_bytes) = (answers, first_bytes);
        }
    }
    counts
}

impl Kept {
    fn since(&self, now: &HashMap<String, Counts>) -> HashMap<String, Counts> {
        let minute = |(endpoint, now): (&String, &Counts)| {
            let minute = now.since(self.before.get(endpoint).copied().unwrap_or_default());
            (minute != Counts::default()).then(|| (endpoint.clone(), minute))
        };
        now.iter().filter_map(minute).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::OK;

    #[test]
    fn an_hour_is_kept_by_minutes() {
        let trends = Trends::default();
        let (endpoint, metrics) = ("of-the-trends-test", metrics().unwrap());
        let times = |count: u64, millis| [(endpoint, (count, Duration::from_millis(millis)))].into_iter();
        trends.end_minute(times(0, 0));
        metrics.attempt(endpoint, OK, None);
        metrics.attempt(endpoint, "status_5xx", None);
        // The endpoint has no part in these.
        metrics.attempt(endpoint, "client_gone", None);
        trends.end_minute(times(1, 100));
        metrics.attempt(endpoint, OK, None);
        let trend = trends.of_all(times(2, 400))[endpoint].clone();
        assert_eq!((trend.attempts, trend.failed), (3, 1));
        let rounded: Vec<_> = trend.first_byte_ms.iter().map(|ms| ms.map(f64::round)).collect();
        assert_eq!(rounded, [None, Some(100.0), Some(300.0)]);
        for _ in 0..=MINUTES {
            trends.end_minute(times(2, 400));
        }
        assert!(!trends.of_all(times(2, 400)).contains_key(endpoint), "that was more than an hour ago");
        assert_eq!(trends.lock().minutes.len(), MINUTES);
    }
}
