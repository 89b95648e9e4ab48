//! Token statistics by endpoint and model, in hours and days.

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
        Self { endpoint: Arc::clone(endpoint), model: model.into(), hour, day, at_ms, cost }
    }
}

impl Spent {
    /// True if it has the same endpoint, model, hour and day.
    pub(super) fn is_kind_of(&self, other: &Self) -> bool {
        (self.hour, self.day) == (other.hour, other.day) && self.model == other.model && self.endpoint == other.endpoint
    }

    /// Adds another entry of the same endpoint, model, hour and day.
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
    /// Total tokens by the beginning of the hour (seconds of Unix time), without estimates.
    pub hours: BTreeMap<i64, u64>,
    /// Total tokens by the beginning of the day (seconds of Unix time), without estimates.
    pub days: BTreeMap<i64, u64>,
}

/// Statistics by endpoint, then by model.
pub type Stats = BTreeMap<String, BTreeMap<String, ModelStats>>;

/// Reads the statistics while another connection may write them. This takes time, so it must not be called on the
/// request path.
pub fn read(path: &Path, now: SystemTime) -> Result<Stats, LedgerError> {
    let connection = sqlite::open_to_read(path)?;
    let second = Timestamp::try_from(now).unwrap_or_default().as_second();
    read_from(&connection, second).map_err(|error| sqlite::explain(path, &error))
}

fn read_from(connection: &Connection, now: i64) -> rusqlite::Result<Stats> {
    let mut stats = Stats::new();
    // A transaction, so that all reads see the same state even if the ledger is written meanwhile.
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
