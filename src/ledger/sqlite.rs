//! The ledger on one machine: a SQLite file in WAL mode. Several processes may hold it at once, a person can open it with
//! `sqlite3`, and a loss of power cannot break it.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use jiff::civil::Date;
use rusqlite::types::{ToSql, Value};
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, params};

use super::stats::Spent;
use super::{Change, FaultKind, Ledger, LedgerError};
use crate::config::LedgerSync;
use crate::limit::{Counts, Days, SPAN, Slot, Stamp};
use crate::usage::Cost;

/// Marks the file as ours: "aptg" in ASCII.
const APPLICATION_ID: i64 = 0x6170_7467;
/// The steps from one version of the schema to the next. A step may add but never change what is there: while an upgrade is
/// under way the version before writes to the same file (so long as it does not have to open it again).
const MIGRATIONS: [&str; 2] = [include_str!("schema/1.sql"), include_str!("schema/2.sql")];
/// Small pages, since a commit writes every page that it touches, and touches two or three.
const PAGE_BYTES: u32 = 1024;
/// How long a batch waits for another process's, which takes a fraction of a millisecond, or another program's.
pub const LOCK_WAIT_MAX: Duration = Duration::from_secs(1);
/// Between two looks whether the lock is free. SQLite's own handler backs off up to 100 ms.
const LOCK_POLL: Duration = Duration::from_micros(50);
/// To begin the log anew the writer's lock is held while readers are waited for, no longer than this: batches wait meanwhile.
const CHECKPOINT_LOCK_WAIT: Duration = Duration::from_millis(10);
/// A log longer than this is written back even if the next batch has to wait for it.
const LOG_BYTES_MAX: i64 = 16 * 1024 * 1024;

static OPENED: AtomicU64 = AtomicU64::new(0);

/// When and after what a ledger is opened.
#[derive(Clone, Copy, Debug)]
pub struct Opening<'a> {
    /// Which start of the machine this is ([`boot_id`]).
    pub boot_id: Option<&'a str>,
    /// The moment, counted from that start.
    pub now: Stamp,
    /// The file before it is gone, and the counts of the last minute with it: nothing that goes by them may be sent until they
    /// cannot count any more.
    pub minute_unknown: bool,
}

/// A ledger in a file.
#[derive(Debug)]
pub struct SqliteLedger {
    connection: Connection,
    path: PathBuf,
    identity: (u64, u64),
    unknown_until: Stamp,
    /// Tells the connections of one process apart: each begins to count the changes of others anew.
    opened: u64,
    /// In microseconds; 0 for the longest.
    lock_wait: Arc<AtomicU64>,
}

/// Which start of the machine this is; none where the system does not tell.
pub fn boot_id() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty())
}

impl SqliteLedger {
    /// Opens the ledger, and makes it if it is not there.
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
        ledger.check_pages()?;
        ledger.migrate(&MIGRATIONS)?;
        ledger.begin_boot(opening)?;
        if is_new {
            log::info!("ledger {}: made", path.display());
        }
        Ok(ledger)
    }

    /// Opens the ledger to read statistics from it, beside whoever writes it.
    pub fn open_to_read(path: &Path) -> Result<Connection, LedgerError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags).map_err(|error| explain(path, &error))?;
        connection.busy_timeout(LOCK_WAIT_MAX).map_err(|error| explain(path, &error))?;
        Ok(connection)
    }

    /// Waits no longer than this for somebody else's lock, from now on.
    pub fn set_lock_wait(&self, wait: Duration) {
        let micros = u64::try_from(wait.as_micros()).unwrap_or_default();
        self.lock_wait.store(micros, Ordering::Relaxed);
    }

    /// Whether the file of this name is another one by now: deleted, or moved aside by another process.
    pub fn was_replaced(&self) -> bool {
        identity(&self.path).ok() != Some(self.identity)
    }

    /// Moves a file that cannot be trusted aside, with all that belongs to it, unless another process did so already. Returns
    /// where it went.
    pub fn move_aside(path: &Path, seen: Option<(u64, u64)>) -> io::Result<Option<PathBuf>> {
        // Held until it is dropped, so that only one process moves it.
        let lock = OpenOptions::new().create(true).append(true).mode(0o600).open(beside(path, ".lock"))?;
        lock.lock()?;
        let now = identity(path)?;
        if seen.is_some_and(|seen| seen != now) {
            return Ok(None);
        }
        let aside = beside(path, &format!(".corrupt-{}", Timestamp::now().strftime("%Y%m%dT%H%M%SZ")));
        for ending in ["-wal", "-shm"] {
            match fs::rename(beside(path, ending), beside(&aside, ending)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        fs::rename(path, &aside)?;
        Ok(Some(aside))
    }

    /// Which file this is, whatever becomes of its name.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Finds a file that was damaged before anything is counted in it.
    fn check_pages(&self) -> Result<(), LedgerError> {
        let found: String = self
            .connection
            .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
            .map_err(|error| explain(&self.path, &error))?;
        if found == "ok" {
            return Ok(());
        }
        Err(LedgerError { kind: FaultKind::Corrupt, message: format!("ledger {}: {found}", self.path.display()) })
    }

    /// Brings the schema to the last version.
    fn migrate(&mut self, steps: &[&str]) -> Result<(), LedgerError> {
        self.exec("BEGIN IMMEDIATE")?;
        let migrated = self.migrate_inside(steps);
        match migrated {
            Ok(()) => self.exec("COMMIT"),
            Err(error) => {
                self.roll_back();
                Err(error)
            }
        }
    }

    fn migrate_inside(&mut self, steps: &[&str]) -> Result<(), LedgerError> {
        let number = |name: &str| self.connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
        let version = number("user_version").map_err(|error| explain(&self.path, &error))?;
        let application = number("application_id").map_err(|error| explain(&self.path, &error))?;
        let tables = self.connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get::<_, u32>(0));
        let is_empty = tables.map_err(|error| explain(&self.path, &error))? == 0;
        if application != APPLICATION_ID && !is_empty {
            let why = "is another program's database; name another file in server.ledger";
            return Err(unusable(&self.path, why));
        }
        let done = usize::try_from(version).unwrap_or(usize::MAX);
        let Some(todo) = steps.get(done..) else {
            let why = format!(
                "has schema version {version}, and this program knows {} at most; run the newer program that wrote it, or \
                 name another file in server.ledger",
                steps.len()
            );
            return Err(unusable(&self.path, &why));
        };
        if todo.is_empty() {
            return Ok(());
        }
        for step in todo {
            self.exec(step)?;
        }
        self.exec(&format!("PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {}", steps.len()))?;
        if !is_empty {
            log::info!("ledger {}: schema brought from version {version} to {}", self.path.display(), steps.len());
        }
        Ok(())
    }

    /// Stamps count from the machine's start, so those of an earlier one mean nothing now; and the last commits before it may
    /// be gone. What was sent then is at least as old as this start is, so after [`SPAN`] all is well again.
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
        let newest: Option<u64> =
            self.connection.query_row("SELECT max(slot) FROM minute", [], |row| row.get(0)).map_err(fail)?;
        // Where the system does not tell, a stamp from the future does.
        let is_other = match (&before, boot_id) {
            (Some(before), Some(boot_id)) => before != boot_id,
            _ => newest.is_some_and(|newest| newest > Slot::of(now).0),
        };
        if is_other {
            self.run("DELETE FROM minute", &[])?;
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
        // Of endpoints that are in no config any more, nobody else forgets them.
        let oldest = Slot::oldest_that_counts(now).0;
        self.run("DELETE FROM minute WHERE slot < ?1", &[&oldest])?;
        self.commit()
    }

    fn exec(&mut self, sql: &str) -> Result<(), LedgerError> {
        self.connection.execute_batch(sql).map_err(|error| explain(&self.path, &error))
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

    fn minute(&mut self, endpoint: &str, oldest: Slot) -> Result<Vec<(Slot, Counts)>, LedgerError> {
        let read = || -> rusqlite::Result<Vec<(Slot, Counts)>> {
            let mut statement = self.connection.prepare_cached(
                "SELECT slot, max(attempts, 0), max(tokens, 0) FROM minute WHERE endpoint = ?1 AND slot >= ?2",
            )?;
            let rows = statement.query_map(params![endpoint, oldest.0], |row| {
                Ok((Slot(row.get(0)?), Counts { attempts: row.get(1)?, tokens: row.get(2)? }))
            })?;
            rows.collect()
        };
        read().map_err(|error| explain(&self.path, &error))
    }

    fn day(&mut self, endpoint: &str, date: Date) -> Result<Counts, LedgerError> {
        let read = || -> rusqlite::Result<Option<Counts>> {
            let mut statement = self
                .connection
                .prepare_cached("SELECT max(attempts, 0), max(tokens, 0) FROM day WHERE endpoint = ?1 AND day = ?2")?;
            let counts = |row: &rusqlite::Row<'_>| Ok(Counts { attempts: row.get(0)?, tokens: row.get(1)? });
            statement.query_row(params![endpoint, date.to_string()], counts).optional()
        };
        read().map(Option::unwrap_or_default).map_err(|error| explain(&self.path, &error))
    }

    fn add(&mut self, endpoint: &str, slot: Slot, days: Days, change: Change) -> Result<(), LedgerError> {
        // What was forgotten meanwhile cannot be taken back: it must not go below nothing.
        const MINUTE: &str = "INSERT INTO minute VALUES (?1, ?2, max(?3, 0), max(?4, 0)) ON CONFLICT DO UPDATE SET \
             attempts = max(attempts + ?3, 0), tokens = max(tokens + ?4, 0)";
        const DAY: &str = "INSERT INTO day VALUES (?1, ?2, max(?3, 0), max(?4, 0)) ON CONFLICT DO UPDATE SET \
             attempts = max(attempts + ?3, 0), tokens = max(tokens + ?4, 0)";
        let Change { attempts, tokens } = change;
        self.run(MINUTE, &[&endpoint, &slot.0, &attempts, &tokens])?;
        days.each().try_for_each(|date| self.run(DAY, &[&endpoint, &date.to_string(), &attempts, &tokens]))
    }

    fn add_tokens(&mut self, spent: &Spent) -> Result<(), LedgerError> {
        let cost = spent.cost.to_columns();
        let names = Cost::COLUMNS.join(", ");
        let places: Vec<String> = (4..4 + cost.len()).map(|place| format!("?{place}")).collect();
        let sums: Vec<String> =
            Cost::COLUMNS.iter().zip(&places).map(|(name, place)| format!("{name} = {name} + {place}")).collect();
        let (places, sums) = (places.join(", "), sums.join(", "));
        for (table, key, when) in [
            ("token_hour", "hour", spent.hour),
            ("token_day", "day", spent.day),
            ("token_total", "last_used", spent.at_ms),
        ] {
            let newest = if key == "last_used" { "last_used = max(last_used, ?3), " } else { "" };
            let sql = format!(
                "INSERT INTO {table} (endpoint, model, {key}, {names}) VALUES (?1, ?2, ?3, {places}) \
                 ON CONFLICT DO UPDATE SET {newest}{sums}"
            );
            let mut parameters: Vec<&dyn ToSql> = vec![&spent.endpoint, &spent.model, &when];
            parameters.extend(cost.iter().map(|column| column as &dyn ToSql));
            self.run(&sql, &parameters)?;
        }
        Ok(())
    }

    fn reset_tokens(&mut self, endpoint: Option<&str>) -> Result<(), LedgerError> {
        let endpoint = endpoint.map_or(Value::Null, |id| Value::Text(id.to_owned()));
        ["token_hour", "token_day", "token_total"].iter().try_for_each(|table| {
            self.run(&format!("DELETE FROM {table} WHERE ?1 IS NULL OR endpoint = ?1"), &[&endpoint])
        })
    }

    fn forget(&mut self, endpoint: &str, oldest: Slot) -> Result<(), LedgerError> {
        self.run("DELETE FROM minute WHERE endpoint = ?1 AND slot < ?2", &[&endpoint, &oldest.0])
    }

    fn forget_tokens(&mut self, hours: i64, days: i64) -> Result<(), LedgerError> {
        self.run("DELETE FROM token_hour WHERE hour <= ?1", &[&hours])?;
        self.run("DELETE FROM token_day WHERE day <= ?1", &[&days])
    }

    fn commit(&mut self) -> Result<(), LedgerError> {
        self.run("COMMIT", &[])
    }

    fn roll_back(&mut self) {
        // After some faults SQLite has done so already.
        if !self.connection.is_autocommit()
            && let Err(error) = self.exec("ROLLBACK")
        {
            log::error!("ledger {}: {error}", self.path.display());
        }
    }

    fn unknown_until(&self) -> Stamp {
        self.unknown_until
    }
}

/// Writes the log back into the file, from a connection of its own, so that no batch waits for the disk. What comes in
/// meanwhile waits for the next time, unless it has become much.
pub fn checkpoint(path: &Path) -> Result<(), LedgerError> {
    let run = || {
        let wait = u64::try_from(CHECKPOINT_LOCK_WAIT.as_micros()).unwrap_or_default();
        let connection = connect(path, LedgerSync::Normal, &Arc::new(AtomicU64::new(wait)))?;
        let checkpoint = |mode: &str| {
            let row = |row: &rusqlite::Row<'_>| Ok((row.get::<_, bool>(0)?, row.get::<_, i64>(1)?));
            connection.query_row(&format!("PRAGMA wal_checkpoint({mode})"), [], row)
        };
        let (_, pages) = checkpoint("PASSIVE")?;
        if pages * i64::from(PAGE_BYTES) <= LOG_BYTES_MAX {
            return Ok(());
        }
        let (is_held, pages) = checkpoint("RESTART")?;
        if is_held && pages * i64::from(PAGE_BYTES) > 4 * LOG_BYTES_MAX {
            let mib = pages * i64::from(PAGE_BYTES) / 1024 / 1024;
            log::warn!(
                "ledger {}: its log has grown to {mib} MiB, since another program reads the file without end",
                path.display()
            );
        }
        Ok(())
    };
    run().map_err(|error| explain(path, &error))
}

/// `lock_wait` is how long to wait for somebody else's lock, in microseconds; 0 for the longest.
fn connect(path: &Path, sync: LedgerSync, lock_wait: &Arc<AtomicU64>) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags)?;
    let (lock_wait, mut began) = (Arc::clone(lock_wait), Instant::now());
    connection.busy_handler(Some(move |polls| {
        if polls == 0 {
            began = Instant::now();
        }
        std::thread::sleep(LOCK_POLL);
        let wait = match lock_wait.load(Ordering::Relaxed) {
            0 => LOCK_WAIT_MAX,
            micros => Duration::from_micros(micros),
        };
        began.elapsed() < wait
    }))?;
    connection.set_prepared_statement_cache_capacity(32);
    connection.pragma_update(None, "page_size", PAGE_BYTES)?;
    let mode = connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get::<_, String>(0))?;
    if !mode.eq_ignore_ascii_case("wal") {
        let why = format!("the file system does not let SQLite keep a write-ahead log there (it says {mode})");
        return Err(rusqlite::Error::ToSqlConversionFailure(why.into()));
    }
    let sync = match sync {
        LedgerSync::Normal => "NORMAL",
        LedgerSync::Full => "FULL",
    };
    connection.pragma_update(None, "synchronous", sync)?;
    connection.pragma_update_and_check(None, "wal_autocheckpoint", 0, |_| Ok(()))?;
    connection.pragma_update_and_check(None, "journal_size_limit", LOG_BYTES_MAX, |_| Ok(()))?;
    Ok(connection)
}

/// Makes the file, for its owner only, and its folder. Returns whether it was not there.
fn make_file(path: &Path) -> io::Result<bool> {
    if let Some(folder) = path.parent()
        && !folder.as_os_str().is_empty()
    {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    match OpenOptions::new().create_new(true).write(true).mode(0o600).open(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// The file's device and number, whatever becomes of its name. It may not be opened for that: closing it would give up SQLite's locks on it.
pub fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

fn unusable(path: &Path, why: &str) -> LedgerError {
    LedgerError { kind: FaultKind::Unusable, message: format!("ledger {}: {why}", path.display()) }
}

pub(super) fn explain(path: &Path, error: &rusqlite::Error) -> LedgerError {
    let (kind, way_out) = match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            (FaultKind::Locked, "; if it lasts, another program holds it: close that program")
        }
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => (FaultKind::Corrupt, ""),
        Some(ErrorCode::DiskFull) => (FaultKind::Unusable, "; make room on that disk"),
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen) => (
            FaultKind::Unusable,
            "; let this program write to the file and its folder, or name another in server.ledger",
        ),
        _ => (FaultKind::Unusable, ""),
    };
    LedgerError { kind, message: format!("ledger {}: {error}{way_out}", path.display()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::ledger::stats;
    use crate::usage::{Speed, Tokens};
    use jiff::civil::date;

    const BOOT: Opening<'_> = Opening { boot_id: Some("boot"), now: Stamp(1_000_000), minute_unknown: false };

    fn open(path: &Path, opening: &Opening<'_>) -> SqliteLedger {
        SqliteLedger::open(path, LedgerSync::Normal, opening).unwrap()
    }

    fn one_day() -> Days {
        Days { first: date(2026, 11, 25), last: date(2026, 11, 25) }
    }

    fn batch(ledger: &mut SqliteLedger, work: impl FnOnce(&mut SqliteLedger)) -> u64 {
        let generation = ledger.begin().unwrap();
        work(ledger);
        ledger.commit().unwrap();
        generation
    }

    fn add(ledger: &mut SqliteLedger, slot: u64, attempts: i64) -> u64 {
        batch(ledger, |ledger| ledger.add("a", Slot(slot), one_day(), Change { attempts, tokens: 7 }).unwrap())
    }

    fn minute(ledger: &mut SqliteLedger) -> Vec<(u64, u64)> {
        let mut slots = Vec::new();
        batch(ledger, |ledger| {
            let rows = ledger.minute("a", Slot(0)).unwrap();
            slots = rows.into_iter().map(|(slot, counts)| (slot.0, counts.attempts)).collect();
        });
        slots
    }

    #[test]
    fn what_is_added_is_there_and_what_is_rolled_back_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/folder/ledger.db");
        let mut ledger = open(&path, &BOOT);
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        add(&mut ledger, 4000, 2);
        add(&mut ledger, 4000, 1);
        add(&mut ledger, 4000, -1);
        ledger.begin().unwrap();
        ledger.add("a", Slot(4000), one_day(), Change { attempts: 5, tokens: 0 }).unwrap();
        ledger.roll_back();
        assert_eq!(minute(&mut ledger), [(4000, 2)]);
        // What was forgotten meanwhile is not taken below nothing.
        add(&mut ledger, 4001, -3);
        assert_eq!(minute(&mut ledger), [(4000, 2), (4001, 0)]);
        ledger.begin().unwrap();
        assert_eq!(ledger.day("a", date(2026, 11, 25)).unwrap(), Counts { attempts: 0, tokens: 28 });
        assert_eq!(ledger.day("b", date(2026, 11, 25)).unwrap(), Counts::default());
        ledger.forget("a", Slot(4001)).unwrap();
        ledger.commit().unwrap();
        assert_eq!(minute(&mut ledger), [(4001, 0)]);
    }

    #[test]
    fn a_generation_changes_when_somebody_else_has_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.db");
        let (mut one, mut other) = (open(&path, &BOOT), open(&path, &BOOT));
        let first = add(&mut one, 4000, 1);
        assert_eq!(add(&mut one, 4000, 1), first, "its own commits do not count");
        checkpoint(&path).unwrap();
        add(&mut other, 4000, 1);
        let second = add(&mut one, 4000, 1);
        assert_ne!(second, first);
        assert_eq!(minute(&mut other), [(4000, 4)]);
        drop(one);
        let mut again = open(&path, &BOOT);
        let third = add(&mut again, 4000, 1);
        assert!(third != first && third != second, "another connection begins to count anew");
    }

    #[test]
    fn a_start_of_the_machine_closes_the_minute_and_keeps_the_day() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.db");
        let mut ledger = open(&path, &BOOT);
        assert_eq!(ledger.unknown_until(), Stamp(0), "a new ledger knows that there was nothing");
        add(&mut ledger, 4000, 3);
        drop(ledger);
        assert_eq!(open(&path, &BOOT).unknown_until(), Stamp(0), "the same start");
        let later = Opening { boot_id: Some("another"), now: Stamp(20_000), minute_unknown: false };
        let mut ledger = open(&path, &later);
        assert_eq!(ledger.unknown_until(), Stamp(0) + SPAN);
        assert_eq!(minute(&mut ledger), []);
        ledger.begin().unwrap();
        assert_eq!(ledger.day("a", date(2026, 11, 25)).unwrap().attempts, 3);
        ledger.roll_back();
        drop(ledger);
        assert_eq!(open(&path, &later).unknown_until(), Stamp(0) + SPAN, "whoever opens it later knows as well");
    }

    #[test]
    fn without_a_boot_id_a_stamp_from_the_future_tells() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.db");
        let unnamed = |now| Opening { boot_id: None, now: Stamp(now), minute_unknown: false };
        let mut ledger = open(&path, &unnamed(1_000_000));
        add(&mut ledger, 4000, 3);
        drop(ledger);
        assert_eq!(minute(&mut open(&path, &unnamed(1_001_000))), [(4000, 3)]);
        let mut ledger = open(&path, &unnamed(5000));
        assert_eq!((minute(&mut ledger), ledger.unknown_until()), (Vec::new(), Stamp(0) + SPAN));
    }

    #[test]
    fn the_schema_is_brought_forward_and_nothing_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.db");
        let mut ledger = open(&path, &BOOT);
        add(&mut ledger, 4000, 3);
        let newer = [MIGRATIONS[0], MIGRATIONS[1], "ALTER TABLE day ADD COLUMN note TEXT"];
        ledger.migrate(&newer).unwrap();
        ledger.migrate(&newer).unwrap();
        assert_eq!(minute(&mut ledger), [(4000, 3)]);
        let version: i64 = ledger.connection.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
        assert_eq!(version, 3);
        ledger.connection.prepare("SELECT note FROM day").unwrap();
        drop(ledger);
        // The version before does not know what the newer one may have meant.
        let error = SqliteLedger::open(&path, LedgerSync::Normal, &BOOT).unwrap_err();
        assert_eq!(error.kind, FaultKind::Unusable);
        assert!(error.message.contains("schema version 3") && error.message.contains("server.ledger"), "{error}");
    }

    #[test]
    fn a_step_that_fails_leaves_the_schema_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.db");
        let mut ledger = open(&path, &BOOT);
        add(&mut ledger, 4000, 3);
        ledger
            .migrate(&[MIGRATIONS[0], MIGRATIONS[1], "ALTER TABLE day ADD COLUMN x TEXT; SELECT nonsense"])
            .unwrap_err();
        drop(ledger);
        assert_eq!(minute(&mut open(&path, &BOOT)), [(4000, 3)]);
    }

    #[test]
    fn a_damaged_file_is_found_out_and_moved_aside_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.db");
        let mut ledger = open(&path, &BOOT);
        for slot in 4000..4200 {
            add(&mut ledger, slot, 1);
        }
        drop(ledger);
        // The header is whole, a page within is not.
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2 / 1024 * 1024;
        bytes[middle..middle + 1024].fill(0xA5);
        fs::write(&path, &bytes).unwrap();
        let seen = identity(&path).unwrap();
        let error = SqliteLedger::open(&path, LedgerSync::Normal, &BOOT).unwrap_err();
        assert_eq!(error.kind, FaultKind::Corrupt, "{error}");
        let aside = SqliteLedger::move_aside(&path, Some(seen)).unwrap().unwrap();
        assert_eq!(fs::read(&aside).unwrap(), bytes);
        let ledger = open(&path, &Opening { minute_unknown: true, ..BOOT });
        assert_eq!(ledger.unknown_until(), BOOT.now + SPAN);
        // Another process that has seen the same file leaves the new one alone.
        assert_eq!(SqliteLedger::move_aside(&path, Some(seen)).unwrap(), None);
        assert!(!ledger.was_replaced());
        fs::remove_file(&path).unwrap();
        assert!(ledger.was_replaced());
    }

    #[test]
    fn statistics_that_are_too_old_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.db");
        let mut ledger = open(&path, &BOOT);
        let now: i64 = 1_795_608_000;
        let spent = |hours_ago: i64| Spent {
            endpoint: "a".into(),
            model: "m".into(),
            hour: now - hours_ago * 3600,
            day: now - hours_ago / 24 * 86_400,
            at_ms: (now - hours_ago * 3600) * 1000,
            cost: Cost::exact(Tokens { total: 3, ..Tokens::default() }, Speed::default()),
        };
        batch(&mut ledger, |ledger| {
            for hours_ago in [0, 47, 48, 399 * 24, 400 * 24] {
                ledger.add_tokens(&spent(hours_ago)).unwrap();
            }
        });
        let wall = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(now.unsigned_abs());
        let kept = |path: &Path| {
            let model = stats::read(path, wall).unwrap()["a"]["m"].clone();
            (model.hours.len(), model.days.len(), model.cost.exact.requests, model.last_used_ms)
        };
        let expected = (2, 4, 5, now * 1000);
        assert_eq!(kept(&path), expected, "they are not shown any more");
        let rows = |ledger: &SqliteLedger| -> i64 {
            let sql = "SELECT (SELECT count(*) FROM token_hour) + (SELECT count(*) FROM token_day)";
            ledger.connection.query_row(sql, [], |row| row.get(0)).unwrap()
        };
        let before = rows(&ledger);
        let oldest = |kept| stats::oldest(now, kept);
        batch(&mut ledger, |ledger| {
            ledger.forget_tokens(oldest(stats::HOURS_KEPT), oldest(stats::DAYS_KEPT)).unwrap();
        });
        assert!(rows(&ledger) < before, "nor kept");
        assert_eq!(kept(&path), expected);
        batch(&mut ledger, |ledger| ledger.reset_tokens(Some("b")).unwrap());
        assert_eq!(kept(&path), expected);
        batch(&mut ledger, |ledger| ledger.reset_tokens(Some("a")).unwrap());
        assert!(stats::read(&path, wall).unwrap().is_empty());
    }

    #[test]
    fn the_log_does_not_grow_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.db");
        let mut ledger = open(&path, &BOOT);
        let log_bytes = || fs::metadata(beside(&path, "-wal")).unwrap().len();
        let mut greatest = 0;
        for _ in 0..40 {
            for slot in 4000..4300 {
                add(&mut ledger, slot, 1);
            }
            checkpoint(&path).unwrap();
            greatest = greatest.max(log_bytes());
        }
        assert!(greatest < 4 * 1024 * 1024, "{greatest}");
    }
}
