//! The file of the ledger: connecting to it, writing its log back, explaining its errors.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::config::LedgerSync;
use crate::database::Unusable;
use crate::ledger::{FaultKind, LedgerError};

/// Page size. Pages are small, because a commit writes every page that it changes, and it changes two or three.
const PAGE_BYTES: u32 = 1024;
/// Longest wait for a lock: another process's batch takes a fraction of a millisecond, another program may take longer.
pub const LOCK_WAIT_MAX: Duration = Duration::from_secs(1);
/// Time between two attempts to take the lock. SQLite's own handler waits up to 100 ms between two.
const LOCK_POLL: Duration = Duration::from_micros(50);
/// Longest time for which a checkpoint holds the writer's lock to restart the write-ahead log while it waits for
/// readers. Batches wait meanwhile.
const CHECKPOINT_LOCK_WAIT: Duration = Duration::from_millis(10);
/// Size beyond which the write-ahead log is written back even if the next batch has to wait for it, in bytes.
const LOG_BYTES_MAX: i64 = 16 * 1024 * 1024;

/// Opens the ledger to read statistics from it, beside the process that writes it.
pub fn open_to_read(path: &Path) -> Result<Connection, LedgerError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(|error| explain(path, &error))?;
    connection.busy_timeout(LOCK_WAIT_MAX).map_err(|error| explain(path, &error))?;
    Ok(connection)
}

/// Writes the write-ahead log back into the file. Uses a connection of its own, so that no batch waits for the disk.
/// Pages that are added meanwhile wait for the next checkpoint, unless the log has become longer than `LOG_BYTES_MAX`.
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
                "ledger {}: its write-ahead log has grown to {mib} MiB, since another program keeps reading the file",
                path.display()
            );
        }
        Ok(())
    };
    run().map_err(|error| explain(path, &error))
}

/// Opens a connection for reading and writing. `lock_wait` is the longest wait for another connection's lock, in
/// microseconds; 0 for [`LOCK_WAIT_MAX`].
pub(super) fn connect(path: &Path, sync: LedgerSync, lock_wait: &Arc<AtomicU64>) -> rusqlite::Result<Connection> {
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

pub(super) fn unusable(path: &Path, why: &str) -> LedgerError {
    LedgerError { kind: FaultKind::Unusable, message: format!("ledger {}: {why}", path.display()) }
}

pub(in crate::ledger) fn explain(path: &Path, error: &rusqlite::Error) -> LedgerError {
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

/// Explains why the file is not one that this program can use.
pub(super) fn explain_unusable(path: &Path, why: &Unusable) -> LedgerError {
    match why {
        Unusable::Sqlite(error) => explain(path, error),
        Unusable::Foreign(why) => unusable(path, why),
    }
}
