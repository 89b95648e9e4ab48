//! Token statistics on the server.

use std::collections::BTreeMap;
use std::time::SystemTime;

use jiff::Timestamp;

use super::connection::{Connection, ConnectionOptions};
use super::wire::{Arguments, split};
use super::{Server as _, base_of, texts, unusable};
use crate::ledger::LedgerError;
use crate::ledger::stats::{
    DAYS_KEPT, HOURS_KEPT, KeyStats, ModelStats, Part, Per, Statistics, Stats, UsageRow, oldest,
};
use crate::usage::Cost;

/// Reader of the statistics on a server, with a connection of its own for each time.
#[derive(Debug)]
pub struct ServerStatistics {
    /// How the server is reached.
    pub options: ConnectionOptions,
    /// Prefix of the ledger's keys.
    pub prefix: String,
}

/// A row: its moment (0 for the totals), the names of its field, when it was used last, and the numbers.
struct StatsRow {
    moment: i64,
    names: Vec<String>,
    last_used_ms: i64,
    cost: Cost,
}

impl ServerStatistics {
    /// Reads the rows of a table that are not too old.
    fn table(&self, connection: &mut Connection, name: &str, after: i64) -> Result<Vec<StatsRow>, LedgerError> {
        let key = format!("{}tokens:{name}", base_of(&self.prefix));
        let moments: Vec<i64> = if name.ends_with("total") {
            vec![0]
        } else {
            let list = run(connection, &[&["ZRANGEBYSCORE", &key, &format!("({after}"), "+inf"]])?;
            list.into_iter().flatten().filter_map(|moment| moment.parse().ok()).collect()
        };
        let keys: Vec<String> =
            moments.iter().map(|moment| if *moment == 0 { key.clone() } else { format!("{key}:{moment}") }).collect();
        let commands: Vec<[&str; 2]> = keys.iter().map(|key| ["HGETALL", key.as_str()]).collect();
        let tables = run(connection, &commands.iter().map(|command| &command[..]).collect::<Vec<_>>())?;
        let row = |moment: i64, pair: &[String]| {
            let [names, numbers] = pair else { return None };
            let mut numbers = numbers.split(' ').map(str::parse::<u64>);
            let last_used_ms = i64::try_from(numbers.next()?.ok()?).ok()?;
            let mut columns = [0; Cost::COLUMNS.len()];
            for column in &mut columns {
                // An older version may have written fewer.
                *column = numbers.next().and_then(Result::ok).unwrap_or_default();
            }
            Some(StatsRow { moment, names: split(names)?, last_used_ms, cost: Cost::from_columns(columns) })
        };
        let rows = moments.iter().zip(&tables).flat_map(|(moment, table)| {
            table.chunks_exact(2).filter_map(|pair| row(*moment, pair)).collect::<Vec<_>>()
        });
        Ok(rows.collect())
    }

    fn connect(&self) -> Result<Connection, LedgerError> {
        Connection::new(self.options.clone())
    }

    fn keys(&self, connection: &mut Connection, second: i64) -> Result<KeyStats, LedgerError> {
        let mut keys = KeyStats::new();
        for row in self.table(connection, "key-total", 0)? {
            let [key, endpoint, model] = names(&row, connection)?;
            let entry = keys.entry(key).or_default().entry(endpoint).or_default().entry(model).or_default();
            (entry.cost, entry.last_used_ms) = (row.cost, row.last_used_ms);
        }
        for row in self.table(connection, "key-day", oldest(second, DAYS_KEPT))? {
            let [key, endpoint, model] = names(&row, connection)?;
            let entry = keys.entry(key).or_default().entry(endpoint).or_default().entry(model).or_default();
            add_part(&mut entry.days, &row);
        }
        Ok(keys)
    }
}

/// The names that a row has.
fn names<const N: usize>(row: &StatsRow, connection: &Connection) -> Result<[String; N], LedgerError> {
    let names = <[String; N]>::try_from(row.names.clone());
    names.map_err(|names| unusable(connection.name(), &format!("has a row of statistics with the names {names:?}")))
}

fn add_part(parts: &mut BTreeMap<i64, Part>, row: &StatsRow) {
    let part = Part { tokens: row.cost.exact.tokens.total, spent: row.cost.money.spent };
    if part != Part::default() {
        parts.insert(row.moment, part);
    }
}

fn run(connection: &mut Connection, commands: &[&[&str]]) -> Result<Vec<Vec<String>>, LedgerError> {
    let command = |words: &&[&str]| {
        let mut arguments = Arguments::default();
        for word in *words {
            arguments.text(word);
        }
        arguments
    };
    if commands.is_empty() {
        return Ok(Vec::new());
    }
    Ok(connection.run(commands.iter().map(command).collect())?.into_iter().map(texts).collect())
}

fn second(now: SystemTime) -> i64 {
    Timestamp::try_from(now).unwrap_or_default().as_second()
}

impl Statistics for ServerStatistics {
    fn read(&self, now: SystemTime) -> Result<(Stats, KeyStats), LedgerError> {
        let (mut connection, second) = (self.connect()?, second(now));
        let mut stats = Stats::new();
        for row in self.table(&mut connection, "total", 0)? {
            let [endpoint, model] = names(&row, &connection)?;
            let entry: &mut ModelStats = stats.entry(endpoint).or_default().entry(model).or_default();
            (entry.cost, entry.last_used_ms) = (row.cost, row.last_used_ms);
        }
        for (table, kept) in [("hour", HOURS_KEPT), ("day", DAYS_KEPT)] {
            for row in self.table(&mut connection, table, oldest(second, kept))? {
                let [endpoint, model] = names(&row, &connection)?;
                let entry = stats.entry(endpoint).or_default().entry(model).or_default();
                add_part(if table == "hour" { &mut entry.hours } else { &mut entry.days }, &row);
            }
        }
        let keys = self.keys(&mut connection, second)?;
        Ok((stats, keys))
    }

    fn read_key(&self, key: &str, now: SystemTime) -> Result<Stats, LedgerError> {
        let mut connection = self.connect()?;
        Ok(self.keys(&mut connection, second(now))?.remove(key).unwrap_or_default())
    }

    fn last_used_of_keys(&self) -> Result<BTreeMap<String, i64>, LedgerError> {
        let mut connection = self.connect()?;
        let mut used = BTreeMap::new();
        for row in self.table(&mut connection, "key-total", 0)? {
            let [key, _, _] = names(&row, &connection)?;
            let last: &mut i64 = used.entry(key).or_default();
            *last = (*last).max(row.last_used_ms);
        }
        Ok(used)
    }

    fn usage(&self, (per, by_key): (Per, bool), now: SystemTime) -> Result<Vec<UsageRow>, LedgerError> {
        let mut connection = self.connect()?;
        let (table, kept) = match (per, by_key) {
            (_, true) => ("key-day", DAYS_KEPT),
            (Per::Hour, false) => ("hour", HOURS_KEPT),
            (Per::Day, false) => ("day", DAYS_KEPT),
        };
        let mut found = Vec::new();
        for row in self.table(&mut connection, table, oldest(second(now), kept))? {
            let (key, endpoint, model) = if by_key {
                let [key, endpoint, model] = names(&row, &connection)?;
                (Some(key), endpoint, model)
            } else {
                let [endpoint, model] = names(&row, &connection)?;
                (None, endpoint, model)
            };
            found.push(UsageRow { begins: row.moment, endpoint, model, key, cost: row.cost });
        }
        Ok(found)
    }
}
