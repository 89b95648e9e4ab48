//! Token statistics: by endpoint and model, in hours and days.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use rusqlite::Connection;

use super::LedgerError;
use super::sqlite;
use crate::usage::Cost;

/// Hours are kept so long.
pub const HOURS_KEPT: Duration = Duration::from_hours(48);
/// Days are kept so long.
pub const DAYS_KEPT: Duration = Duration::from_hours(400 * 24);
/// Names of models that are told apart for one endpoint; an endpoint of `*` may be asked for any. All others are one.
pub const MODELS_MAX: usize = 256;
/// The name of all others.
pub const OTHER_MODELS: &str = "other";

/// Tokens spent, and the moment.
#[derive(Clone, Debug)]
pub struct Spent {
    /// The endpoint's id.
    pub endpoint: Arc<str>,
    /// The model that it was asked for.
    pub model: Arc<str>,
    /// The hour, in seconds of Unix time at which it begins.
    pub hour: i64,
    /// The day, likewise.
    pub day: i64,
    /// The moment, in milliseconds of Unix time.
    pub at_ms: i64,
    /// Amount.
    pub cost: Cost,
}

impl Spent {
    /// Returns the entry of one answer at this moment, by the hours and days of a time zone.
    pub fn now(endpoint: &Arc<str>, model: &str, cost: Cost, zone: &TimeZone, wall: SystemTime) -> Self {
        let Begins { hour, day } = Begins::new(wall, zone);
        let at_ms = Timestamp::try_from(wall).unwrap_or_default().as_millisecond();
        Self { endpoint: Arc::clone(endpoint), model: model.into(), hour, day, at_ms, cost }
    }
}

impl Spent {
    /// True if it has the same model, hour and day.
    pub(super) fn is_kind_of(&self, other: &Self) -> bool {
        (self.hour, self.day) == (other.hour, other.day) && self.model == other.model && self.endpoint == other.endpoint
    }

    /// Adds another of the same kind.
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
    /// Returns those of a moment in a time zone.
    pub fn new(wall: SystemTime, zone: &TimeZone) -> Self {
        let now = Timestamp::try_from(wall).unwrap_or_default().to_zoned_datetime(zone.clone());
        let second = now.timestamp().as_second();
        // By the clock on the wall, whose hours need not begin with those of UTC.
        let hour = second - i64::from(now.minute()) * 60 - i64::from(now.second());
        Self { hour, day: now.start_of_day().map_or(hour, |day| day.timestamp().as_second()) }
    }
}

/// Statistics of one model of an endpoint.
#[derive(Clone, Debug, Default)]
pub struct ModelStats {
    /// Since the last reset.
    pub cost: Cost,
    /// The last one's moment, in milliseconds of Unix time.
    pub last_used_ms: i64,
    /// Total tokens by the hour's begin, without estimates.
    pub hours: BTreeMap<i64, u64>,
    /// Total tokens by the day's beginning, without estimates.
    pub days: BTreeMap<i64, u64>,
}

/// Statistics by endpoint, then by model.
pub type Stats = BTreeMap<String, BTreeMap<String, ModelStats>>;

/// Reads the statistics, beside whoever writes them. It takes time: not for the request path.
pub fn read(path: &Path, now: SystemTime) -> Result<Stats, LedgerError> {
    let connection = sqlite::open_to_read(path)?;
    let second = Timestamp::try_from(now).unwrap_or_default().as_second();
    read_from(&connection, second).map_err(|error| sqlite::explain(path, &error))
}

fn read_from(connection: &Connection, now: i64) -> rusqlite::Result<Stats> {
    let mut stats = Stats::new();
    // One moment's, whatever is written meanwhile.
    let connection = connection.unchecked_transaction()?;
    let columns = Cost::COLUMNS.join(", ");
    let mut totals = connection.prepare(&format!("SELECT endpoint, model, last_used, {columns} FROM token_total"))?;
    let mut rows = totals.query([])?;
    while let Some(row) = rows.next()? {
        let entry = stats.entry(row.get(0)?).or_default().entry(row.get(1)?).or_default();
        entry.last_used_ms = row.get(2)?;
        let mut columns = [0; Cost::COLUMNS.len()];
        for (column, index) in columns.iter_mut().zip(3_usize..) {
            *column = row.get(index)?;
        }
        entry.cost = Cost::from_columns(columns);
    }
    for (table, key, kept) in [("token_hour", "hour", HOURS_KEPT), ("token_day", "day", DAYS_KEPT)] {
        let mut parts = connection
            .prepare(&format!("SELECT endpoint, model, {key}, total FROM {table} WHERE {key} > ?1 AND total > 0"))?;
        let mut rows = parts.query([oldest(now, kept)])?;
        while let Some(row) = rows.next()? {
            let entry = stats.entry(row.get(0)?).or_default().entry(row.get(1)?).or_default();
            let parts = if key == "hour" { &mut entry.hours } else { &mut entry.days };
            parts.insert(row.get(2)?, row.get(3)?);
        }
    }
    Ok(stats)
}

/// Returns the last second that is too old to be kept.
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
