//! Token statistics in the file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use jiff::Timestamp;
use rusqlite::{Connection, params};

use super::{explain, open_to_read};
use crate::ledger::LedgerError;
use crate::ledger::stats::{
    DAYS_KEPT, HOURS_KEPT, KeyStats, ModelStats, Part, Per, Statistics, Stats, UsageRow, oldest,
};
use crate::usage::Cost;
use crate::usage::prices::NanoUsd;

/// Reader of the statistics of a file, with a connection of its own.
#[derive(Debug)]
pub struct FileStatistics(pub PathBuf);

impl Statistics for FileStatistics {
    fn read(&self, now: SystemTime) -> Result<(Stats, KeyStats), LedgerError> {
        let (path, second) = (&self.0, second(now));
        let connection = open_to_read(path)?;
        let both = || -> rusqlite::Result<_> {
            // A transaction, so that all reads see the same state even if the ledger is written meanwhile.
            let connection = connection.unchecked_transaction()?;
            Ok((read_stats(&connection, second)?, read_keys(&connection, second, None)?))
        };
        both().map_err(|error| explain(path, &error))
    }

    fn read_key(&self, key: &str, now: SystemTime) -> Result<Stats, LedgerError> {
        let connection = open_to_read(&self.0)?;
        let mut keys = read_keys(&connection, second(now), Some(key)).map_err(|error| explain(&self.0, &error))?;
        Ok(keys.remove(key).unwrap_or_default())
    }

    fn last_used_of_keys(&self) -> Result<BTreeMap<String, i64>, LedgerError> {
        let connection = open_to_read(&self.0)?;
        let read = || -> rusqlite::Result<_> {
            let mut keys = connection.prepare("SELECT key, MAX(last_used) FROM key_total GROUP BY key")?;
            keys.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        };
        read().map_err(|error| explain(&self.0, &error))
    }

    fn usage(&self, part: (Per, bool), now: SystemTime) -> Result<Vec<UsageRow>, LedgerError> {
        usage(&self.0, part, second(now))
    }
}

fn second(now: SystemTime) -> i64 {
    Timestamp::try_from(now).unwrap_or_default().as_second()
}

fn usage(path: &Path, (per, by_key): (Per, bool), second: i64) -> Result<Vec<UsageRow>, LedgerError> {
    let connection = open_to_read(path)?;
    let (table, kept) = match (per, by_key) {
        (_, true) => ("key_day", DAYS_KEPT),
        (Per::Hour, false) => ("token_hour", HOURS_KEPT),
        (Per::Day, false) => ("token_day", DAYS_KEPT),
    };
    let (column, key) = (per.name(), if by_key { "key" } else { "NULL" });
    let columns = Cost::COLUMNS.join(", ");
    let sql = format!("SELECT {column}, endpoint, model, {key}, {columns} FROM {table} WHERE {column} > ?1");
    let read = || -> rusqlite::Result<Vec<UsageRow>> {
        let row = |row: &rusqlite::Row<'_>| {
            let (begins, endpoint, model, key) = (row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?);
            Ok(UsageRow { begins, endpoint, model, key, cost: read_cost(row, 4)? })
        };
        connection.prepare(&sql)?.query_map([oldest(second, kept)], row)?.collect()
    };
    read().map_err(|error| explain(path, &error))
}

fn read_stats(connection: &Connection, now: i64) -> rusqlite::Result<Stats> {
    let mut stats = Stats::new();
    let columns = Cost::COLUMNS.join(", ");
    let mut totals = connection.prepare(&format!("SELECT endpoint, model, last_used, {columns} FROM token_total"))?;
    let mut rows = totals.query([])?;
    while let Some(row) = rows.next()? {
        let entry = stats.entry(row.get(0)?).or_default().entry(row.get(1)?).or_default();
        read_total(entry, row, 2)?;
    }
    for (table, column, kept) in [("token_hour", "hour", HOURS_KEPT), ("token_day", "day", DAYS_KEPT)] {
        let sql = format!(
            "SELECT endpoint, model, {column}, total, nano_usd FROM {table} \
             WHERE {column} > ?1 AND (total > 0 OR nano_usd > 0)"
        );
        let mut parts = connection.prepare(&sql)?;
        let mut rows = parts.query([oldest(now, kept)])?;
        while let Some(row) = rows.next()? {
            let entry = stats.entry(row.get(0)?).or_default().entry(row.get(1)?).or_default();
            let part = Part { tokens: row.get(3)?, spent: NanoUsd(row.get(4)?) };
            if column == "hour" { &mut entry.hours } else { &mut entry.days }.insert(row.get(2)?, part);
        }
    }
    Ok(stats)
}

fn read_keys(connection: &Connection, now: i64, only: Option<&str>) -> rusqlite::Result<KeyStats> {
    const DAYS: &str = "SELECT key, endpoint, model, day, total, nano_usd FROM key_day \
         WHERE (?1 IS NULL OR key = ?1) AND day > ?2 AND (total > 0 OR nano_usd > 0)";
    let mut keys = KeyStats::new();
    let columns = Cost::COLUMNS.join(", ");
    let sql = format!("SELECT key, endpoint, model, last_used, {columns} FROM key_total WHERE ?1 IS NULL OR key = ?1");
    let mut totals = connection.prepare(&sql)?;
    let mut rows = totals.query([only])?;
    while let Some(row) = rows.next()? {
        let of_key = keys.entry(row.get(0)?).or_default().entry(row.get(1)?).or_default();
        read_total(of_key.entry(row.get(2)?).or_default(), row, 3)?;
    }
    let mut days = connection.prepare(DAYS)?;
    let mut rows = days.query(params![only, oldest(now, DAYS_KEPT)])?;
    while let Some(row) = rows.next()? {
        let of_key = keys.entry(row.get(0)?).or_default().entry(row.get(1)?).or_default();
        let part = Part { tokens: row.get(4)?, spent: NanoUsd(row.get(5)?) };
        of_key.entry(row.get(2)?).or_default().days.insert(row.get(3)?, part);
    }
    Ok(keys)
}

/// Reads the moment that stands in a column, and the numbers behind it.
fn read_total(entry: &mut ModelStats, row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<()> {
    entry.last_used_ms = row.get(column)?;
    entry.cost = read_cost(row, column + 1)?;
    Ok(())
}

/// Reads the numbers that stand from a column on.
fn read_cost(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<Cost> {
    let mut columns = [0; Cost::COLUMNS.len()];
    for (number, index) in columns.iter_mut().zip(column..) {
        *number = row.get(index)?;
    }
    Ok(Cost::from_columns(columns))
}
