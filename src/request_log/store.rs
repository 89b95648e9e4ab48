//! The file of the log: writing batches of entries to it, and deleting its oldest.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rusqlite::types::{ToSqlOutput, Value, ValueRef};
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension as _, ToSql, params};

use super::entry::{Attempted, BODY_BYTES_MAX, Entry, KeptBody, Name, PASSED_OVER_MAX, PassedOver, cut, millis};
use crate::database::{Schema, Unusable, identity, make_file};
use crate::fault::HeldBy;
use crate::response::redact::Secrets;

/// The file's schema. Its id is "aptr" in ASCII.
pub(super) const SCHEMA: Schema<'static> =
    Schema { application_id: 0x6170_7472, steps: &[include_str!("schema/1.sql")], named_by: "server.requestLog.path" };
/// Attempts of one request, by which the ids of attempts are spaced.
pub(super) const ATTEMPT_IDS: i64 = 128;
/// Names that are kept once; more stand where they are used. A name has 200 characters at most, so this is 3 MB.
const NAMES_MAX: usize = 16_384;
/// Longest wait for another process's lock, which holds it for one batch.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(1);
/// Size beyond which the write-ahead log is cut back after a checkpoint, in bytes.
const WAL_BYTES_MAX: i64 = 16 * 1024 * 1024;
/// Requests that are deleted in one transaction.
const DELETED_AT_ONCE: i64 = 1000;
/// Free pages that are given back to the file system in one step.
const VACUUMED_AT_ONCE: u32 = 256;
/// Share of the file's size that is left for what comes next.
const SPARE_SHARE: i64 = 16;
/// A day in milliseconds.
const DAY_MS: i64 = 24 * 60 * 60 * 1000;
/// Compression of bodies; higher levels cost the writer more than they save.
const ZSTD_LEVEL: i32 = 1;

/// Error of the file.
#[derive(Debug)]
pub struct StoreError {
    /// True if the file cannot be trusted.
    pub is_corrupt: bool,
    /// True if somebody else holds its lock.
    pub is_busy: bool,
    /// What is wrong, with the way out.
    pub message: String,
}

/// What of the log is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Age of the oldest requests.
    pub age: Duration,
    /// Largest size of the file, in bytes.
    pub bytes_max: u64,
}

/// The file, opened to be written.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    path: PathBuf,
    identity: (u64, u64),
    /// Ids of names.
    names: HashMap<Arc<str>, i64>,
}

/// Ids that the names of one entry have, or the texts themselves.
enum Stored<'a> {
    Id(i64),
    Text(&'a str),
    None,
}

impl ToSql for Stored<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Self::Id(id) => ToSqlOutput::Owned(Value::Integer(*id)),
            Self::Text(text) => ToSqlOutput::Borrowed(ValueRef::Text(text.as_bytes())),
            Self::None => ToSqlOutput::Owned(Value::Null),
        })
    }
}

impl Store {
    /// Opens the file. Creates it if it does not exist.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let fail = |error: &rusqlite::Error| explain(path, error);
        let is_new = make_file(path).map_err(|error| unusable(path, &error.to_string()))?;
        let mut connection = connect(path).map_err(|error| fail(&error))?;
        let identity = identity(path).map_err(|error| unusable(path, &error.to_string()))?;
        let before = SCHEMA.migrate(&mut connection).map_err(|why| match why {
            Unusable::Sqlite(error) => fail(&error),
            Unusable::Foreign(why) => unusable(path, &why),
        })?;
        if is_new {
            log::info!("request log {}: created", path.display());
        } else if before.number < SCHEMA.steps.len() && !before.is_empty {
            log::info!("request log {}: schema upgraded from version {}", path.display(), before.number);
        }
        let mut store = Self { connection, path: path.to_owned(), identity, names: HashMap::new() };
        store.read_names().map_err(|error| fail(&error))?;
        Ok(store)
    }

    /// True if the path does not name this file any more.
    pub fn was_replaced(&self) -> bool {
        identity(&self.path).ok() != Some(self.identity)
    }

    /// Device and inode of the file.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    fn read_names(&mut self) -> rusqlite::Result<()> {
        let mut statement = self.connection.prepare_cached("SELECT text, id FROM name ORDER BY id LIMIT ?1")?;
        let rows = statement.query_map([NAMES_MAX], |row| Ok((Arc::from(row.get_ref(0)?.as_str()?), row.get(1)?)))?;
        self.names = rows.collect::<rusqlite::Result<_>>()?;
        Ok(())
    }

    /// Writes entries in one transaction: all or none.
    pub fn write(&mut self, entries: &[Entry]) -> Result<(), StoreError> {
        let written = self.write_in_one(entries);
        if written.is_err() {
            // Nothing can be done if even that fails; the next transaction will say so.
            self.connection.execute_batch("ROLLBACK").unwrap_or_default();
            // Those that the transaction added are not there.
            self.names.clear();
            self.read_names().unwrap_or_default();
        }
        written.map_err(|error| explain(&self.path, &error))
    }

    fn write_in_one(&mut self, entries: &[Entry]) -> rusqlite::Result<()> {
        self.connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        for entry in entries {
            self.write_entry(entry)?;
        }
        self.connection.prepare_cached("COMMIT")?.execute([])?;
        Ok(())
    }

    fn write_entry(&mut self, entry: &Entry) -> rusqlite::Result<()> {
        let id = self.write_request(entry)?;
        self.write_detail(id, entry)?;
        for (place, attempt) in (0..ATTEMPT_IDS).zip(&entry.attempts) {
            self.write_attempt(id * ATTEMPT_IDS + place, attempt, entry.ended - entry.total)?;
        }
        if let Some(bodies) = &entry.bodies {
            self.write_body(id * 2, &bodies.request, &bodies.secrets)?;
            self.write_body(id * 2 + 1, &bodies.answer, &bodies.secrets)?;
        }
        Ok(())
    }

    fn write_request(&mut self, entry: &Entry) -> rusqlite::Result<i64> {
        const SQL: &str = "INSERT INTO request (ended, number, key, endpoint, tried, model, status, fault, session) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)";
        let before = entry.attempts.split_last().map_or(&[][..], |(_, before)| before);
        let tried = self.tried(before)?;
        let (key, endpoint) = (self.known(entry.key.as_ref())?, self.known(entry.endpoint.as_ref())?);
        let (model, fault) = (self.stored(entry.model.as_ref())?, self.own(entry.fault)?);
        let session = entry.session.map(u64::cast_signed);
        self.connection.prepare_cached(SQL)?.insert(params![
            millis(entry.ended),
            number_of(id_text(entry)),
            key,
            endpoint,
            tried,
            model,
            entry.status,
            fault,
            session,
        ])
    }

    /// Ids of the names of the endpoints of some attempts, each once.
    fn tried(&mut self, attempts: &[Attempted]) -> rusqlite::Result<Option<String>> {
        let mut ids = Vec::new();
        for attempt in attempts {
            if let Stored::Id(id) = self.known(Some(&attempt.endpoint))?
                && !ids.contains(&id)
            {
                ids.push(id);
            }
        }
        let list: Vec<String> = ids.iter().map(i64::to_string).collect();
        Ok((!list.is_empty()).then(|| format!(",{},", list.join(","))))
    }

    fn write_detail(&mut self, id: i64, entry: &Entry) -> rusqlite::Result<()> {
        const SQL: &str = "INSERT INTO detail VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, \
             ?18, ?19, ?20, ?21, ?22, ?23, ?24, ?25, ?26, ?27, ?28, ?29, ?30, ?31, ?32)";
        let (trouble, rule) = entry.trouble.unzip();
        let tokens = entry.tokens.as_ref();
        let cost = entry.cost.map(|cost| whole(cost.0));
        let held = passed_over(&entry.held, entry.ended);
        let cause = entry.cause.as_deref().map(cut);
        let address = entry.address.map(|address| address.to_string());
        let (path, method) = (self.stored(Some(&entry.path))?, self.stored(Some(&entry.method))?);
        let (fallback, endpoint_model) =
            (self.known(entry.fallback.as_ref())?, self.known(entry.endpoint_model.as_ref())?);
        let (lane, affinity) = (self.known(entry.lane.as_ref())?, self.own(entry.affinity)?);
        let (trouble, rule) = (self.own(trouble)?, self.own(rule)?);
        let tags = self.known(entry.tags.as_ref())?;
        let outside = self.known(entry.outside.as_ref())?;
        self.connection.prepare_cached(SQL)?.execute(params![
            id,
            id_text(entry),
            entry.trace.map(u128::to_be_bytes),
            address,
            tags,
            method,
            path,
            fallback,
            endpoint_model,
            lane,
            affinity,
            entry.stream,
            trouble,
            rule,
            micros(entry.queued),
            entry.first_byte.map(micros),
            entry.first_token.map(micros),
            entry.generation.map(micros),
            micros(entry.total),
            tokens.map(|tokens| whole(tokens.prompt)),
            tokens.map(|tokens| whole(tokens.completion)),
            tokens.map(|tokens| whole(tokens.total)),
            tokens.map(|tokens| whole(tokens.cached)),
            tokens.map(|tokens| whole(tokens.reasoning)),
            tokens.map(|tokens| whole(tokens.audio)),
            cost,
            whole(entry.request_bytes),
            whole(entry.bytes),
            held,
            outside,
            cause,
            whole(entry.config),
        ])?;
        Ok(())
    }

    fn write_attempt(&mut self, id: i64, attempt: &Attempted, came: SystemTime) -> rusqlite::Result<()> {
        const SQL: &str = "INSERT INTO attempt VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)";
        let (trouble, rule) = attempt.trouble.unzip();
        let passed_over = passed_over(&attempt.passed_over, came + attempt.began);
        let (endpoint, lane) = (self.known(Some(&attempt.endpoint))?, self.known(attempt.lane.as_ref())?);
        let (model, outcome) = (self.stored(attempt.model.as_ref())?, self.name(attempt.outcome)?);
        let (trouble, rule) = (self.own(trouble)?, self.own(rule)?);
        self.connection.prepare_cached(SQL)?.execute(params![
            id,
            micros(attempt.began),
            micros(attempt.took),
            attempt.first_byte.map(micros),
            endpoint,
            lane,
            model,
            attempt.span.cast_signed(),
            outcome,
            attempt.status,
            trouble,
            rule,
            passed_over,
        ])?;
        Ok(())
    }

    fn write_body(&mut self, id: i64, body: &KeptBody, secrets: &Secrets) -> rusqlite::Result<()> {
        if body.length == 0 {
            return Ok(());
        }
        let text = body.redacted(secrets);
        let pressed = zstd::bulk::compress(text.as_bytes(), ZSTD_LEVEL).map_err(|error| {
            // It fails for want of memory only.
            rusqlite::Error::ToSqlConversionFailure(error.into())
        })?;
        let mut statement = self.connection.prepare_cached("INSERT INTO body VALUES (?1, ?2, ?3, ?4)")?;
        statement.execute(params![id, whole(body.length), body.bytes.len().min(BODY_BYTES_MAX), pressed])?;
        Ok(())
    }

    fn stored<'a>(&mut self, name: Option<&'a Name>) -> rusqlite::Result<Stored<'a>> {
        match name {
            None => Ok(Stored::None),
            Some(Name::Known(text)) => self.name(text),
            Some(Name::Any(text)) => Ok(Stored::Text(cut(text))),
        }
    }

    fn known<'a>(&mut self, name: Option<&'a Arc<str>>) -> rusqlite::Result<Stored<'a>> {
        name.map_or(Ok(Stored::None), |name| self.name(name))
    }

    fn own(&mut self, name: Option<&'static str>) -> rusqlite::Result<Stored<'static>> {
        name.map_or(Ok(Stored::None), |name| self.name(name))
    }

    /// The id of a name, or the name itself if there are too many already.
    fn name<'a>(&mut self, text: &'a str) -> rusqlite::Result<Stored<'a>> {
        if let Some(id) = self.names.get(text) {
            return Ok(Stored::Id(*id));
        }
        if self.names.len() >= NAMES_MAX {
            return Ok(Stored::Text(text));
        }
        // Another process may have added it.
        self.connection.prepare_cached("INSERT OR IGNORE INTO name (text) VALUES (?1)")?.execute([text])?;
        let mut statement = self.connection.prepare_cached("SELECT id FROM name WHERE text = ?1")?;
        let id = statement.query_row([text], |row| row.get(0))?;
        self.names.insert(text.into(), id);
        Ok(Stored::Id(id))
    }

    /// Deletes some requests that are too old, or too many for the file's size. True if there are more of them.
    pub fn retain(&mut self, retention: Retention, now: SystemTime) -> Result<bool, StoreError> {
        self.delete_some(retention, now).map_err(|error| explain(&self.path, &error))
    }

    fn delete_some(&mut self, retention: Retention, now: SystemTime) -> rusqlite::Result<bool> {
        let bytes_max = i64::try_from(retention.bytes_max).unwrap_or(i64::MAX);
        let too_old = millis(now).saturating_sub(i64::try_from(retention.age.as_millis()).unwrap_or(i64::MAX));
        let Size { used, free } = self.size()?;
        let is_full = used > bytes_max - bytes_max / SPARE_SHARE;
        let end = self.end_of_surplus((too_old, millis(now)), is_full)?;
        if let Some(end) = end {
            self.delete_before(end)?;
        }
        if used + free > bytes_max && free > 0 {
            let sql = format!("PRAGMA incremental_vacuum({VACUUMED_AT_ONCE})");
            let mut statement = self.connection.prepare_cached(&sql)?;
            // It gives one page back at each step.
            let mut steps = statement.query([])?;
            while steps.next()?.is_some() {}
            return Ok(true);
        }
        Ok(end.is_some())
    }

    /// Returns the id before which requests are to be deleted now. The newest one always stays, so that no id is used twice.
    fn end_of_surplus(&self, (too_old, now): (i64, i64), is_full: bool) -> rusqlite::Result<Option<i64>> {
        let number = |sql: &str, parameters: &[&dyn ToSql]| {
            self.connection.prepare_cached(sql)?.query_row(parameters, |row| row.get::<_, i64>(0)).optional()
        };
        let oldest = number("SELECT id FROM request ORDER BY id LIMIT 1", &[])?;
        let newest = number("SELECT id FROM request ORDER BY id DESC LIMIT 1", &[])?;
        let Some((oldest, newest)) = oldest.zip(newest) else { return Ok(None) };
        let at_once = (oldest + DELETED_AT_ONCE).min(newest);
        let end = if is_full {
            at_once
        } else {
            // A row of a time to come is of a clock that was wrong, and keeps no other.
            const SQL: &str = "SELECT id FROM request WHERE id < ?1 AND ended BETWEEN ?2 AND ?3 ORDER BY id LIMIT 1";
            number(SQL, &[&at_once, &too_old, &now.saturating_add(DAY_MS)])?.unwrap_or(at_once)
        };
        Ok((end > oldest).then_some(end))
    }

    fn delete_before(&mut self, end: i64) -> rusqlite::Result<()> {
        let transaction = self.connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        for (table, ids) in [("request", 1), ("detail", 1), ("attempt", ATTEMPT_IDS), ("body", 2)] {
            let sql = format!("DELETE FROM {table} WHERE id < ?1");
            transaction.prepare_cached(&sql)?.execute([end.saturating_mul(ids)])?;
        }
        transaction.commit()
    }

    fn size(&self) -> rusqlite::Result<Size> {
        let number = |name: &str| {
            self.connection.prepare_cached(&format!("PRAGMA {name}"))?.query_row([], |row| row.get::<_, i64>(0))
        };
        let (pages, free, page_size) = (number("page_count")?, number("freelist_count")?, number("page_size")?);
        Ok(Size { used: (pages - free) * page_size, free: free * page_size })
    }

    /// Has the file behave as on a disk that has no more room than for so many pages.
    #[cfg(test)]
    pub(super) fn limit_pages(&self, pages: Option<u32>) {
        let pages = pages.unwrap_or(u32::MAX - 1);
        self.connection.pragma_update_and_check(None, "max_page_count", pages, |_| Ok(())).unwrap();
    }

    /// Bytes of the file that are used.
    pub fn used(&self) -> u64 {
        self.size().ok().and_then(|size| u64::try_from(size.used).ok()).unwrap_or_default()
    }
}

/// Size of the file in bytes: pages that are used, and free ones.
struct Size {
    used: i64,
    free: i64,
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(LOCK_WAIT_MAX)?;
    connection.set_prepared_statement_cache_capacity(32);
    // Before the first table is made.
    connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
    let mode = connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get::<_, String>(0))?;
    if !mode.eq_ignore_ascii_case("wal") {
        let why = format!("the file system does not let SQLite keep a write-ahead log there (it says {mode})");
        return Err(rusqlite::Error::ToSqlConversionFailure(why.into()));
    }
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    // What is deleted is not to be found in free pages.
    connection.pragma_update(None, "secure_delete", "ON")?;
    connection.pragma_update_and_check(None, "journal_size_limit", WAL_BYTES_MAX, |_| Ok(()))?;
    Ok(connection)
}

/// JSON of endpoints that were passed over at a moment; none if there were none.
fn passed_over(held: &[HeldBy], at: SystemTime) -> Option<String> {
    if held.is_empty() {
        return None;
    }
    let list: Vec<_> = held.iter().take(PASSED_OVER_MAX).map(|held| PassedOver::new(held, at)).collect();
    serde_json::to_string(&list).ok()
}

fn id_text(entry: &Entry) -> &str {
    entry.id.as_ref().and_then(|id| id.to_str().ok()).unwrap_or_default()
}

/// The number by which a request's id is found. It is the same on every machine and in every version.
pub(super) fn number_of(request_id: &str) -> u32 {
    // FNV-1a (http://www.isthe.com/chongo/tech/comp/fnv/).
    request_id.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// A number as SQLite has it.
fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn micros(time: Duration) -> i64 {
    i64::try_from(time.as_micros()).unwrap_or(i64::MAX)
}

fn unusable(path: &Path, why: &str) -> StoreError {
    StoreError { is_corrupt: false, is_busy: false, message: format!("request log {}: {why}", path.display()) }
}

pub(super) fn explain(path: &Path, error: &rusqlite::Error) -> StoreError {
    let (is_corrupt, way_out) = match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => (true, ""),
        Some(ErrorCode::DiskFull) => (false, "; make room on that disk"),
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen) => {
            (false, "; let this program write to the file and its folder, or name another in server.requestLog.path")
        }
        _ => (false, ""),
    };
    let is_busy = matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked));
    StoreError { is_corrupt, is_busy, ..unusable(path, &format!("{error}{way_out}")) }
}
