//! Token statistics by endpoint and model, in hours and days.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::LedgerError;
use crate::usage::Cost;
use crate::usage::prices::NanoUsd;

/// Time for which hours are kept.
pub const HOURS_KEPT: Duration = Duration::from_hours(48);
/// Time for which days are kept.
pub const DAYS_KEPT: Duration = Duration::from_hours(400 * 24);
/// Upper bound on the model names that are kept apart for one endpoint, since an endpoint with `*` may be asked for any
/// name. All further names are counted together as [`OTHER_MODELS`].
pub const MODELS_MAX: usize = 256;
/// Name under which all further models are counted.
pub const OTHER_MODELS: &str = "other";

/// Tokens that an answer spent, and when.
#[derive(Clone, Debug)]
pub struct Spent {
    /// The endpoint's id.
    pub endpoint: Arc<str>,
    /// The model that the client asked for.
    pub model: Arc<str>,
    /// Name of the caller's own key, if the request had one.
    pub key: Option<Arc<str>>,
    /// Beginning of the hour, in seconds of Unix time.
    pub hour: i64,
    /// Beginning of the day, in seconds of Unix time.
    pub day: i64,
    /// End of the answer, in milliseconds of Unix time.
    pub at_ms: i64,
    /// Tokens and speed.
    pub cost: Cost,
}

impl Spent {
    /// Returns the entry of an answer that ends at this moment, with the hour and the day of a time zone.
    pub fn now(endpoint: &Arc<str>, model: &str, cost: Cost, zone: &TimeZone, wall: SystemTime) -> Self {
        let Begins { hour, day } = Begins::new(wall, zone);
        let at_ms = Timestamp::try_from(wall).unwrap_or_default().as_millisecond();
        Self { endpoint: Arc::clone(endpoint), model: model.into(), key: None, hour, day, at_ms, cost }
    }
}

impl Spent {
    /// The same for a request with a caller's own key.
    #[must_use]
    pub fn by(self, key: Option<&Arc<str>>) -> Self {
        Self { key: key.cloned(), ..self }
    }

    /// True if it has the same endpoint, model, key, hour and day.
    pub(super) fn is_kind_of(&self, other: &Self) -> bool {
        (self.hour, self.day) == (other.hour, other.day)
            && self.model == other.model
            && self.endpoint == other.endpoint
            && self.key == other.key
    }

    /// Adds another entry of the same endpoint, model, key, hour and day.
    pub(super) fn merge(&mut self, other: &Self) {
        self.cost.merge(&other.cost);
        self.at_ms = self.at_ms.max(other.at_ms);
    }
}

/// Beginnings of an hour and a day, in seconds of Unix time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begins {
    /// The hour.
    pub hour: i64,
    /// The day.
    pub day: i64,
}

impl Begins {
    /// Returns the beginnings for a moment in a time zone.
    pub fn new(wall: SystemTime, zone: &TimeZone) -> Self {
        let now = Timestamp::try_from(wall).unwrap_or_default().to_zoned_datetime(zone.clone());
        let second = now.timestamp().as_second();
        // Local hours, which need not begin with those of UTC.
        let hour = second - i64::from(now.minute()) * 60 - i64::from(now.second());
        Self { hour, day: now.start_of_day().map_or(hour, |day| day.timestamp().as_second()) }
    }
}

/// Statistics of one model of an endpoint.
#[derive(Clone, Debug, Default)]
pub struct ModelStats {
    /// Tokens and speed since the last reset.
    pub cost: Cost,
    /// End of the last answer, in milliseconds of Unix time.
    pub last_used_ms: i64,
    /// Parts of it by the beginning of the hour (seconds of Unix time).
    pub hours: BTreeMap<i64, Part>,
    /// Parts of it by the beginning of the day (seconds of Unix time).
    pub days: BTreeMap<i64, Part>,
}

/// What one hour or day took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Tokens, without estimates.
    pub tokens: u64,
    /// What it cost, as far as there are prices.
    pub spent: NanoUsd,
}

impl Part {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: &Self) -> Self {
        let spent = NanoUsd(self.spent.0.saturating_add(other.spent.0));
        Self { tokens: self.tokens.saturating_add(other.tokens), spent }
    }
}

/// Statistics by endpoint, then by model.
pub type Stats = BTreeMap<String, BTreeMap<String, ModelStats>>;

/// Statistics by the callers' own keys, then as all others. They have no hours.
pub type KeyStats = BTreeMap<String, Stats>;

/// Reader of the statistics, while they may be written. It takes time, so it must not be used on the request path.
pub trait Statistics: fmt::Debug + Send + Sync {
    /// Reads the statistics, and those by the callers' own keys.
    fn read(&self, now: SystemTime) -> Result<(Stats, KeyStats), LedgerError>;
    /// Reads those of one key.
    fn read_key(&self, key: &str, now: SystemTime) -> Result<Stats, LedgerError>;
    /// Reads when each key was used last, in milliseconds of Unix time.
    fn last_used_of_keys(&self) -> Result<BTreeMap<String, i64>, LedgerError>;
    /// Reads what was taken in each hour or day that is kept. `by_key`: by the callers' own keys, which have days only.
    fn usage(&self, part: (Per, bool), now: SystemTime) -> Result<Vec<UsageRow>, LedgerError>;
}

/// Length of the parts of a series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Per {
    /// An hour.
    Hour,
    /// A day.
    Day,
}

impl Per {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hour => "hour",
            Self::Day => "day",
        }
    }
}

/// What the answers of one endpoint, model and caller's key took in an hour or a day.
#[derive(Clone, Debug)]
pub struct UsageRow {
    /// Its beginning, in seconds of Unix time.
    pub begins: i64,
    /// Id of the endpoint.
    pub endpoint: String,
    /// Model, as the endpoint was asked for it.
    pub model: String,
    /// Name of the caller's own key, where it is counted by these.
    pub key: Option<String>,
    /// What they took.
    pub cost: Cost,
}

/// Returns the second of Unix time at or before which an hour or a day must begin to be too old to be kept.
pub(super) fn oldest(now: i64, kept: Duration) -> i64 {
    now.saturating_sub(i64::try_from(kept.as_secs()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_begin_by_the_clock_on_the_wall() {
        let begins = |text: &str, zone: &str| {
            let millis = text.parse::<Timestamp>().unwrap().as_millisecond();
            let wall = SystemTime::UNIX_EPOCH + Duration::from_millis(millis.unsigned_abs());
            let Begins { hour, day } = Begins::new(wall, &TimeZone::get(zone).unwrap());
            let text = |second| Timestamp::from_second(second).unwrap().to_string();
            (text(hour), text(day))
        };
        assert_eq!(
            begins("2026-11-25T17:56:12.5Z", "UTC"),
            ("2026-11-25T17:00:00Z".into(), "2026-11-25T00:00:00Z".into())
        );
        assert_eq!(
            begins("2026-11-25T17:56:12Z", "Asia/Kolkata"),
            ("2026-11-25T17:30:00Z".into(), "2026-11-24T18:30:00Z".into())
        );
    }
}
