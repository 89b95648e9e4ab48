//! The ledger on one machine: a SQLite file in WAL mode. Several processes can use it at once, it can be opened with
//! `sqlite3`, and a power failure does not corrupt it.

mod budgets;
mod examine;
mod file;
mod statistics;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::civil::Date;
use rusqlite::types::{ToSql, Value};
use rusqlite::{Connection, OptionalExtension, params};

use super::claims::{Claims, Verdict};
use super::notices::Notice;
use super::places::{DELETED_AT_ONCE, PLACES_MAX, Place, PlaceChange, Thing, ThingKind};
use super::stats::Spent;
use super::{AccountId, Change, FaultKind, Ledger, LedgerError, ModelList, Rows};
use crate::config::LedgerSync;
use crate::database::{Schema, identity, make_file};
use crate::limit::{Counts, Days, SPAN, Slot, Stamp, Unknown};
use crate::usage::Cost;
pub use examine::examine;
pub(super) use file::explain;
pub use file::{LOCK_WAIT_MAX, checkpoint, open_to_read};
use file::{connect, explain_unusable, unusable};
pub use statistics::FileStatistics;

/// The file's schema. Its id is "aptg" in ASCII.
const SCHEMA: Schema<'static> = Schema {
    application_id: 0x6170_7467,
    steps: &[
        include_str!("schema/1.sql"),
        include_str!("schema/2.sql"),
        include_str!("schema/3.sql"),
        include_str!("schema/4.sql"),
        include_str!("schema/5.sql"),
        include_str!("schema/6.sql"),
    ],
    named_by: "server.ledger",
};
/// `kind` of [`AccountId::Models`] in the tables `account_minute` and `account_day`.
const MODELS: &str = "models";
/// The same of [`AccountId::Lane`].
const LANE: &str = "lane";
/// The same of [`AccountId::Caller`].
const CALLER: &str = "key";
/// The same of [`AccountId::CallerModels`].
const CALLER_MODELS: &str = "key_models";

/// The tables that an account's counts are in.
enum Tables<'a> {
    /// In the tables of endpoints, by this id.
    Endpoint(&'a Arc<str>),
    /// In those of all other accounts, by kind, owner and part.
    Other(&'static str, &'a Arc<str>, &'a str),
}

impl<'a> Tables<'a> {
    fn of(account: &'a AccountId) -> Self {
        match account {
            AccountId::Endpoint(id) => Self::Endpoint(id),
            AccountId::Models { endpoint, models } => Self::Other(MODELS, endpoint, models),
            AccountId::Lane { endpoint, lane } => Self::Other(LANE, endpoint, lane),
            AccountId::Caller(caller) => Self::Other(CALLER, caller, ""),
            AccountId::CallerModels { caller, models } => Self::Other(CALLER_MODELS, caller, models),
        }
    }
}
static OPENED: AtomicU64 = AtomicU64::new(0);

/// Circumstances in which a ledger is opened.
#[derive(Clone, Copy, Debug)]
pub struct Opening<'a> {
    /// Id of this boot of the machine, from [`boot_id`].
    pub boot_id: Option<&'a str>,
    /// The current moment, counted from that boot.
    pub now: Stamp,
    /// True if the previous file is lost, and the counts of the last minute with it. Attempts that depend on these
    /// counts must wait until the lost ones would no longer count.
    pub minute_unknown: bool,
}

/// A ledger in a SQLite file.
#[derive(Debug)]
pub struct SqliteLedger {
    connection: Connection,
    path: PathBuf,
    identity: (u64, u64),
    unknown_until: Stamp,
    /// Distinguishes the connections of one process: each begins to count the changes of others from zero.
    opened: u64,
    /// Longest wait for a lock in microseconds; 0 for the default.
    lock_wait: Arc<AtomicU64>,
}

/// Returns the id of this boot of the machine; `None` if the system has none.
pub fn boot_id() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty())
}

/// Checks the file for damage, before anything is counted in it.
fn check_pages(connection: &Connection, path: &Path) -> Result<(), LedgerError> {
    let found: String =
        connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(|error| explain(path, &error))?;
    if found == "ok" {
        return Ok(());
    }
    Err(LedgerError { kind: FaultKind::Corrupt, message: format!("ledger {}: {found}", path.display()) })
}

impl SqliteLedger {
    /// Opens the ledger. Creates it if it does not exist.
    pub fn open(path: &Path, sync: LedgerSync, opening: &Opening<'_>) -> Result<Self, LedgerError> {
        let is_new = make_file(path).map_err(|error| unusable(path, &error.to_string()))?;
        let lock_wait = Arc::default();
        let connection = connect(path, sync, &lock_wait).map_err(|error| explain(path, &error))?;
        let identity = identity(path).map_err(|error| unusable(path, &error.to_string()))?;
        let mut ledger = Self {
            connection,
            path: path.to_owned(),
            identity,
            unknown_until: Stamp::default(),
            opened: OPENED.fetch_add(1, Ordering::Relaxed) + 1,
            lock_wait,
        };
        check_pages(&ledger.connection, path)?;
        ledger.migrate(&SCHEMA)?;
        ledger.begin_boot(opening)?;
        if is_new {
            log::info!("ledger {}: created", path.display());
        }
        Ok(ledger)
    }

    /// Sets the longest wait for another process's lock.
    pub fn set_lock_wait(&self, wait: Duration) {
        let micros = u64::try_from(wait.as_micros()).unwrap_or_default();
        self.lock_wait.store(micros, Ordering::Relaxed);
    }

    /// True if the path does not name this file any more: it was deleted, or another process moved it aside.
    pub fn was_replaced(&self) -> bool {
        identity(&self.path).ok() != Some(self.identity)
    }

    /// Returns device and inode of the file, which stay the same if it is renamed.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Migrates the schema to the newest version.
    fn migrate(&mut self, schema: &Schema<'_>) -> Result<(), LedgerError> {
        let before = schema.migrate(&mut self.connection).map_err(|why| explain_unusable(&self.path, &why))?;
        let newest = schema.steps.len();
        if before.number < newest && !before.is_empty {
            log::info!("ledger {}: schema upgraded from version {} to {newest}", self.path.display(), before.number);
        }
        Ok(())
    }

    /// Makes the counts of the minute valid for this boot. Slots count from the machine's boot, so slots of an earlier
    /// boot mean nothing now; and the last commits before a restart may be lost. All attempts before the restart are at
    /// least as old as this boot, so the minute is known again [`SPAN`] after it.
    fn begin_boot(&mut self, opening: &Opening<'_>) -> Result<(), LedgerError> {
        let Opening { boot_id, now, minute_unknown } = *opening;
        let meta = |connection: &Connection, key: &str| -> rusqlite::Result<Option<String>> {
            let value = connection.query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get(0));
            value.optional().map(Option::flatten)
        };
        self.begin()?;
        let path = self.path.clone();
        let fail = |error: rusqlite::Error| explain(&path, &error);
        let before = meta(&self.connection, "boot_id").map_err(fail)?;
        let until = meta(&self.connection, "minute_unknown_until").map_err(fail)?;
        let newest: Option<u64> = self
            .connection
            .query_row(
                "SELECT max(slot) FROM (SELECT slot FROM minute UNION ALL SELECT slot FROM account_minute)",
                [],
                |row| row.get(0),
            )
            .map_err(fail)?;
        // Without a boot id, a slot in the future shows that the machine was restarted.
        let is_other = match (&before, boot_id) {
            (Some(before), Some(boot_id)) => before != boot_id,
            _ => newest.is_some_and(|newest| newest > Slot::new(now).0),
        };
        if is_other {
            self.run("DELETE FROM minute", &[])?;
            self.run("DELETE FROM account_minute", &[])?;
            // Whoever made reservations before the restart is dead.
            self.run("DELETE FROM reservation_owner", &[])?;
            self.unknown_until = Stamp::default() + SPAN;
        } else {
            self.unknown_until = until.and_then(|until| until.parse().ok()).map(Stamp).unwrap_or_default();
        }
        if minute_unknown {
            self.unknown_until = self.unknown_until.max(now + SPAN);
        }
        let until = self.unknown_until.0.to_string();
        self.run("INSERT OR REPLACE INTO meta VALUES ('minute_unknown_until', ?1)", &[&until])?;
        self.run("INSERT OR REPLACE INTO meta VALUES ('boot_id', ?1)", &[&boot_id])?;
        // Accounts that are in no config any more are removed only here.
        let oldest = Slot::oldest_that_counts(now).0;
        self.run("DELETE FROM minute WHERE slot < ?1", &[&oldest])?;
        self.run("DELETE FROM account_minute WHERE slot < ?1", &[&oldest])?;
        self.run("COMMIT", &[])
    }

    fn exec(&mut self, sql: &str) -> Result<(), LedgerError> {
        self.connection.execute_batch(sql).map_err(|error| explain(&self.path, &error))
    }

    /// Adds to a table of the token statistics, which may be one by callers' keys. `column` holds the moment.
    fn add_spent(
        &mut self,
        table: &str,
        column: &str,
        moment: i64,
        (key, spent): (Option<&Arc<str>>, &Spent),
    ) -> Result<(), LedgerError> {
        let cost = spent.cost.to_columns();
        let mut parameters: Vec<&dyn ToSql> = vec![&spent.endpoint, &spent.model, &moment];
        parameters.extend(cost.iter().map(|number| number as &dyn ToSql));
        let names = Cost::COLUMNS.join(", ");
        let places: Vec<String> = (4..4 + cost.len()).map(|place| format!("?{place}")).collect();
        let sums = Cost::COLUMNS.iter().zip(&places).map(|(name, place)| format!("{name} = {name} + {place}"));
        let sums = sums.collect::<Vec<_>>().join(", ");
        let (mut names, mut places) = (format!("endpoint, model, {column}, {names}"), places.join(", "));
        if let Some(key) = key {
            parameters.push(key);
            names.push_str(", key");
            places = format!("{places}, ?{}", parameters.len());
        }
        let newest = if column == "last_used" { "last_used = max(last_used, ?3), " } else { "" };
        let sql = format!(
            "INSERT INTO {table} ({names}) VALUES (?1, ?2, ?3, {places}) ON CONFLICT DO UPDATE SET {newest}{sums}"
        );
        self.run(&sql, &parameters)
    }

    /// Returns the places of a thing.
    fn places_of(&self, thing: &Thing, now: i64) -> Result<Vec<Place>, LedgerError> {
        const SQL: &str = "SELECT owner, endpoint, organization, until FROM place \
             WHERE kind = ?1 AND name = ?2 AND until > ?3 ORDER BY until DESC";
        let read = || -> rusqlite::Result<Vec<Place>> {
            let row = |row: &rusqlite::Row<'_>| {
                let [owner, endpoint, organization] =
                    [row.get::<_, String>(0)?, row.get(1)?, row.get(2)?].map(Into::into);
                Ok(Place { owner, endpoint, organization, until: row.get(3)? })
            };
            let key = params![thing.kind.name(), thing.name, now];
            self.connection.prepare_cached(SQL)?.query_map(key, row)?.collect()
        };
        read().map_err(|error| explain(&self.path, &error))
    }

    fn run(&mut self, sql: &str, parameters: &[&dyn ToSql]) -> Result<(), LedgerError> {
        let ran = self.connection.prepare_cached(sql).and_then(|mut statement| statement.execute(parameters));
        ran.map(|_| ()).map_err(|error| explain(&self.path, &error))
    }
}

impl Ledger for SqliteLedger {
    fn begin(&mut self) -> Result<u64, LedgerError> {
        self.run("BEGIN IMMEDIATE", &[])?;
        let version = self
            .connection
            .prepare_cached("PRAGMA data_version")
            .and_then(|mut statement| statement.query_row([], |row| row.get::<_, u32>(0)));
        match version {
            Ok(version) => Ok(self.opened << u32::BITS | u64::from(version)),
            Err(error) => {
                self.roll_back();
                Err(explain(&self.path, &error))
            }
        }
    }

    fn minute(&mut self, account: &AccountId, oldest: Slot) -> Result<Vec<(Slot, Counts)>, LedgerError> {
        let row =
            |row: &rusqlite::Row<'_>| Ok((Slot(row.get(0)?), Counts { attempts: row.get(1)?, tokens: row.get(2)? }));
        let read = || -> rusqlite::Result<Vec<(Slot, Counts)>> {
            match Tables::of(account) {
                Tables::Endpoint(id) => {
                    const SQL: &str = "SELECT slot, max(attempts, 0), max(tokens, 0) FROM minute \
                         WHERE endpoint = ?1 AND slot >= ?2";
                    self.connection.prepare_cached(SQL)?.query_map(params![id, oldest.0], row)?.collect()
                }
                Tables::Other(kind, owner, part) => {
                    const SQL: &str = "SELECT slot, max(attempts, 0), max(tokens, 0) FROM account_minute \
                         WHERE kind = ?1 AND owner = ?2 AND part = ?3 AND slot >= ?4";
                    let key = params![kind, owner, part, oldest.0];
                    self.connection.prepare_cached(SQL)?.query_map(key, row)?.collect()
                }
            }
        };
        read().map_err(|error| explain(&self.path, &error))
    }

    fn day(&mut self, account: &AccountId, date: Date) -> Result<Counts, LedgerError> {
        let row = |row: &rusqlite::Row<'_>| Ok(Counts { attempts: row.get(0)?, tokens: row.get(1)? });
        let date = date.to_string();
        let read = || -> rusqlite::Result<Option<Counts>> {
            match Tables::of(account) {
                Tables::Endpoint(id) => {
                    const SQL: &str =
                        "SELECT max(attempts, 0), max(tokens, 0) FROM day WHERE endpoint = ?1 AND day = ?2";
                    self.connection.prepare_cached(SQL)?.query_row(params![id, date], row).optional()
                }
                Tables::Other(kind, owner, part) => {
                    const SQL: &str = "SELECT max(attempts, 0), max(tokens, 0) FROM account_day \
                         WHERE kind = ?1 AND owner = ?2 AND part = ?3 AND day = ?4";
                    let key = params![kind, owner, part, date];
                    self.connection.prepare_cached(SQL)?.query_row(key, row).optional()
                }
            }
        };
        read().map(Option::unwrap_or_default).map_err(|error| explain(&self.path, &error))
    }

    // Requests in flight are each process's own.

    fn others_in_flight(&mut self, _account: &AccountId) -> Result<u64, LedgerError> {
        Ok(0)
    }

    fn set_in_flight(&mut self, _account: &AccountId, _own: u64) -> Result<(), LedgerError> {
        Ok(())
    }

    fn add(&mut self, account: &AccountId, slot: Slot, days: Days, change: Change) -> Result<(), LedgerError> {
        // Counts that were removed meanwhile cannot be taken back: the value must not become negative.
        let Change { attempts, tokens } = change;
        match Tables::of(account) {
            Tables::Endpoint(id) => {
                const MINUTE: &str = "INSERT INTO minute VALUES (?1, ?2, max(?3, 0), max(?4, 0)) \
                     ON CONFLICT DO UPDATE SET attempts = max(attempts + ?3, 0), tokens = max(tokens + ?4, 0)";
                const DAY: &str = "INSERT INTO day VALUES (?1, ?2, max(?3, 0), max(?4, 0)) \
                     ON CONFLICT DO UPDATE SET attempts = max(attempts + ?3, 0), tokens = max(tokens + ?4, 0)";
                self.run(MINUTE, &[id, &slot.0, &attempts, &tokens])?;
                days.each().try_for_each(|date| self.run(DAY, &[id, &date.to_string(), &attempts, &tokens]))
            }
            Tables::Other(kind, owner, part) => {
                const MINUTE: &str = "INSERT INTO account_minute VALUES (?1, ?2, ?3, ?4, max(?5, 0), max(?6, 0)) \
                     ON CONFLICT DO UPDATE SET attempts = max(attempts + ?5, 0), tokens = max(tokens + ?6, 0)";
                const DAY: &str = "INSERT INTO account_day VALUES (?1, ?2, ?3, ?4, max(?5, 0), max(?6, 0)) \
                     ON CONFLICT DO UPDATE SET attempts = max(attempts + ?5, 0), tokens = max(tokens + ?6, 0)";
                self.run(MINUTE, &[&kind, owner, &part, &slot.0, &attempts, &tokens])?;
                days.each()
                    .try_for_each(|date| self.run(DAY, &[&kind, owner, &part, &date.to_string(), &attempts, &tokens]))
            }
        }
    }

    fn add_tokens(&mut self, spent: &Spent) -> Result<(), LedgerError> {
        self.add_spent("token_hour", "hour", spent.hour, (None, spent))?;
        self.add_spent("token_day", "day", spent.day, (None, spent))?;
        self.add_spent("token_total", "last_used", spent.at_ms, (None, spent))?;
        let Some(key) = &spent.key else { return Ok(()) };
        self.add_spent("key_day", "day", spent.day, (Some(key), spent))?;
        self.add_spent("key_total", "last_used", spent.at_ms, (Some(key), spent))
    }

    fn reset_tokens(&mut self, endpoint: Option<&str>) -> Result<(), LedgerError> {
        let endpoint = endpoint.map_or(Value::Null, |id| Value::Text(id.to_owned()));
        ["token_hour", "token_day", "token_total", "key_day", "key_total"].iter().try_for_each(|table| {
            self.run(&format!("DELETE FROM {table} WHERE ?1 IS NULL OR endpoint = ?1"), &[&endpoint])
        })
    }

    fn forget(&mut self, account: &AccountId, oldest: Slot) -> Result<(), LedgerError> {
        match Tables::of(account) {
            Tables::Endpoint(id) => self.run("DELETE FROM minute WHERE endpoint = ?1 AND slot < ?2", &[id, &oldest.0]),
            Tables::Other(kind, owner, part) => {
                const SQL: &str =
                    "DELETE FROM account_minute WHERE kind = ?1 AND owner = ?2 AND part = ?3 AND slot < ?4";
                self.run(SQL, &[&kind, owner, &part, &oldest.0])
            }
        }
    }

    fn forget_tokens(&mut self, hours: i64, days: i64) -> Result<(), LedgerError> {
        self.run("DELETE FROM token_hour WHERE hour <= ?1", &[&hours])?;
        self.run("DELETE FROM token_day WHERE day <= ?1", &[&days])?;
        self.run("DELETE FROM key_day WHERE day <= ?1", &[&days])
    }

    fn forget_days(&mut self, account: &AccountId, before: Date) -> Result<(), LedgerError> {
        let before = before.to_string();
        match Tables::of(account) {
            Tables::Endpoint(id) => {
                const SQL: &str = "DELETE FROM day WHERE endpoint = ?1 AND day < ?2 AND day NOT IN \
                     (SELECT day FROM day WHERE endpoint = ?1 ORDER BY day DESC LIMIT 3)";
                self.run(SQL, &[id, &before])
            }
            Tables::Other(kind, owner, part) => {
                const SQL: &str = "DELETE FROM account_day WHERE kind = ?1 AND owner = ?2 AND part = ?3 AND day < ?4 \
                     AND day NOT IN (SELECT day FROM account_day WHERE kind = ?1 AND owner = ?2 AND part = ?3 \
                     ORDER BY day DESC LIMIT 3)";
                self.run(SQL, &[&kind, owner, &part, &before])
            }
        }
    }

    fn accounts_of_models(&mut self) -> Result<Vec<AccountId>, LedgerError> {
        let read = || -> rusqlite::Result<Vec<AccountId>> {
            const SQL: &str = "SELECT owner, part FROM account_day WHERE kind = ?1 \
                 GROUP BY owner, part ORDER BY max(day) DESC LIMIT 1000";
            let mut statement = self.connection.prepare(SQL)?;
            let rows = statement.query_map([MODELS], |row| {
                let [endpoint, models] = [row.get::<_, String>(0)?, row.get(1)?].map(Into::into);
                Ok(AccountId::Models { endpoint, models })
            })?;
            rows.collect()
        };
        read().map_err(|error| explain(&self.path, &error))
    }

    fn places(&mut self, things: &[Thing], now: i64) -> Result<Vec<Vec<Place>>, LedgerError> {
        things.iter().map(|thing| self.places_of(thing, now)).collect()
    }

    fn change_place(&mut self, change: &PlaceChange) -> Result<(), LedgerError> {
        const FORGET: &str = "DELETE FROM place WHERE kind = ?1 AND name = ?2 AND owner = ?3";
        const NOTE: &str = "INSERT INTO place VALUES (?1, ?2, ?3, ?4, ?5, ?6) \
             ON CONFLICT DO UPDATE SET organization = ?5, until = max(until, ?6)";
        match change {
            PlaceChange::Forget(thing, owner) => self.run(FORGET, &[&thing.kind.name(), &thing.name, owner]),
            PlaceChange::Note(thing, place) => {
                let Place { owner, endpoint, organization, until } = place;
                if thing.kind == ThingKind::Session {
                    const MOVE: &str =
                        "DELETE FROM place WHERE kind = ?1 AND name = ?2 AND owner = ?3 AND endpoint <> ?4";
                    self.run(MOVE, &[&thing.kind.name(), &thing.name, owner, endpoint])?;
                }
                self.run(NOTE, &[&thing.kind.name(), &thing.name, owner, endpoint, organization, until])
            }
        }
    }

    fn forget_places(&mut self, kind: ThingKind, now: i64, surplus: bool) -> Result<bool, LedgerError> {
        const OVER: &str = "DELETE FROM place WHERE (kind, name, owner, endpoint) IN \
             (SELECT kind, name, owner, endpoint FROM place WHERE kind = ?1 AND until <= ?2 LIMIT ?3)";
        const SURPLUS: &str = "DELETE FROM place WHERE (kind, name, owner, endpoint) IN \
             (SELECT kind, name, owner, endpoint FROM place WHERE kind = ?1 ORDER BY until LIMIT ?2)";
        self.run(OVER, &[&kind.name(), &now, &DELETED_AT_ONCE])?;
        if !surplus {
            return Ok(false);
        }
        // Counted each time, since another process may have been here meanwhile.
        let sql = "SELECT count(*) FROM place WHERE kind = ?1";
        let rows = self
            .connection
            .prepare_cached(sql)
            .and_then(|mut rows| rows.query_row([kind.name()], |row| row.get::<_, u32>(0)));
        let over = rows.map_err(|error| explain(&self.path, &error))?.saturating_sub(PLACES_MAX);
        self.run(SURPLUS, &[&kind.name(), &over.min(DELETED_AT_ONCE)])?;
        Ok(over > DELETED_AT_ONCE)
    }

    fn keep_models(&mut self, endpoint: &str, list: &str) -> Result<(), LedgerError> {
        self.run("INSERT OR REPLACE INTO model_list VALUES (?1, ?2)", &[&endpoint, &list])
    }

    fn model_lists(&mut self) -> Result<Vec<ModelList>, LedgerError> {
        let read = || -> rusqlite::Result<Vec<_>> {
            let row = |row: &rusqlite::Row<'_>| Ok((row.get::<_, String>(0)?.into(), row.get::<_, String>(1)?.into()));
            self.connection.prepare("SELECT endpoint, list FROM model_list")?.query_map([], row)?.collect()
        };
        read().map_err(|error| explain(&self.path, &error))
    }

    fn is_exclusive(&self) -> bool {
        true
    }

    fn trusted_since(&self) -> u64 {
        u64::MAX
    }

    fn fetch(&mut self, _rows: &Rows) -> Result<(), LedgerError> {
        Ok(())
    }

    fn commit(&mut self, claims: &Claims, _rows: &Rows) -> Result<Verdict, LedgerError> {
        let verdict = claims.write(self)?;
        self.run("COMMIT", &[])?;
        Ok(verdict)
    }

    // Processes on one machine have their own look at endpoints.

    fn tell(&mut self, _notice: &Notice) -> Result<(), LedgerError> {
        Ok(())
    }

    fn take_heard(&mut self) -> Vec<Notice> {
        Vec::new()
    }

    fn touch(&mut self) -> Result<(), LedgerError> {
        Ok(())
    }

    fn roll_back(&mut self) {
        // SQLite has rolled back by itself after some errors.
        if !self.connection.is_autocommit()
            && let Err(error) = self.exec("ROLLBACK")
        {
            log::error!("ledger {}: {error}", self.path.display());
        }
    }

    fn unknown(&self) -> Unknown {
        Unknown { minute_until: self.unknown_until, ..Unknown::default() }
    }
}

#[cfg(test)]
mod tests;
