//! The log's thread: it writes what waits, deletes what is too old, and stops while the file or its disk do not allow it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::entry::Entry;
use super::queue::{Queue, Reason, Taken};
use super::store::{Store, StoreError};
use crate::database::{self, beside};

/// Time between an entry and its write. A process that is killed loses no more than that.
const WRITE_BEHIND: Duration = Duration::from_millis(200);
/// Longest share of one processor core that the writer takes, as one in so many: beyond it entries are dropped.
const CORE_SHARE: u32 = 4;
/// Longest rest between two rounds. The work of a round is bounded, so a long one has waited for its disk.
const REST_MAX: Duration = Duration::from_secs(1);
/// Entries for which one step of deletion is made, each of which deletes more.
const DELETED_FOR: usize = 500;
/// Shortest time between two looks at the file, its disk, and what is too old.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// The same while nothing comes.
const IDLE_LOOK_INTERVAL: Duration = Duration::from_mins(1);
/// Pause after an error, doubled each time up to the longest.
const RETRY_AFTER: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_mins(1);
/// Longest time for which a batch waits for somebody else's lock, a second at a time.
const BUSY_MAX: Duration = Duration::from_secs(5);
/// Interval of log lines about what lasts.
const TELL_AGAIN: Duration = Duration::from_mins(10);
/// Free room of the disk below which nothing is written, since the ledger needs it: a share of it in percent, and bytes.
const FREE_PERCENT_MIN: u64 = 5;
const FREE_BYTES_MIN: u64 = 1024 * 1024 * 1024;

/// State of the log's thread.
pub(super) struct Writer {
    path: PathBuf,
    queue: Arc<Queue>,
    store: Option<Store>,
    /// Pause after the last error.
    retry_after: Duration,
    /// Earliest moment at which the file is used again after an error.
    retry_at: Option<Instant>,
    look_at: Option<Instant>,
    told_at: Option<Instant>,
    /// True if more is to be deleted.
    has_surplus: bool,
    /// Entries dropped when that was last told.
    dropped_told: u64,
}

impl Writer {
    pub(super) fn new(path: &Path, queue: Arc<Queue>) -> Self {
        Self {
            path: path.to_owned(),
            queue,
            store: None,
            retry_after: RETRY_AFTER,
            retry_at: None,
            look_at: None,
            told_at: None,
            has_surplus: false,
            dropped_told: 0,
        }
    }

    /// Writes until the log is closed.
    pub(super) fn run(&mut self) {
        let ends = EndsWithThread(Arc::clone(&self.queue));
        // There from the start, so that it can be read before anything is written.
        self.look(Instant::now());
        if self.retry_at.is_none() {
            self.open();
        }
        loop {
            let longest = if self.has_surplus { Duration::ZERO } else { IDLE_LOOK_INTERVAL };
            self.queue.wait(longest);
            self.queue.pause(WRITE_BEHIND);
            let began = Instant::now();
            self.look(began);
            let Taken { entries, closing } = self.queue.take();
            let is_empty = entries.is_empty();
            self.write(&entries, began);
            // At least as many as came, or the file would grow.
            let steps = if closing { 0 } else { 1 + entries.len() / DELETED_FOR };
            (0..steps).for_each(|_| self.delete_surplus());
            drop(entries);
            self.tell_dropped(began);
            if closing && is_empty {
                break;
            }
            // Others need the processor as well.
            self.queue.pause((began.elapsed() * (CORE_SHARE - 1)).min(REST_MAX));
        }
        self.store = None;
        drop(ends);
    }

    fn write(&mut self, entries: &[Entry], now: Instant) {
        if entries.is_empty() {
            return;
        }
        if self.retry_at.is_some_and(|at| now < at) || !self.open() {
            return self.queue.drop_some(Reason::Failing, entries.len());
        }
        let Some(store) = &mut self.store else { return };
        let mut written = store.write(entries);
        // Somebody reads long, or copies the file. Meanwhile others wait in the queue.
        while written.as_ref().is_err_and(|error| error.is_busy) && now.elapsed() < BUSY_MAX && !self.queue.is_closing()
        {
            written = store.write(entries);
        }
        match written {
            Ok(()) => {
                self.queue.note_written(entries.len());
                self.works();
            }
            Err(error) => {
                self.queue.drop_some(Reason::Failing, entries.len());
                self.fails(&error);
            }
        }
    }

    /// Opens the file if it is not open. False if that fails.
    fn open(&mut self) -> bool {
        if self.store.is_some() {
            return true;
        }
        match Store::open(&self.path) {
            Ok(store) => {
                self.store = Some(store);
                true
            }
            Err(error) => {
                self.fails(&error);
                // A corrupt file has been moved aside.
                if error.is_corrupt {
                    self.store = Store::open(&self.path).ok();
                }
                self.store.is_some()
            }
        }
    }

    fn works(&mut self) {
        self.retry_after = RETRY_AFTER;
        self.retry_at = None;
        if self.queue.set_error(None).is_some() {
            log::info!("request log {}: written again", self.path.display());
        }
    }

    fn fails(&mut self, error: &StoreError) {
        if error.is_corrupt {
            let seen = self.store.take().map(|store| store.identity());
            return self.replace(seen);
        }
        self.stop(&error.message, Instant::now());
    }

    /// Stops for a while.
    fn stop(&mut self, why: &str, now: Instant) {
        self.retry_at = Some(now + self.retry_after);
        self.retry_after = (self.retry_after * 2).min(RETRY_AFTER_MAX);
        let before = self.queue.set_error(Some(why.to_owned()));
        let is_due = self.told_at.is_none_or(|told| now.saturating_duration_since(told) >= TELL_AGAIN);
        if before.is_none() || is_due {
            self.told_at = Some(now);
            log::warn!("{why}; requests go on, and are not in the request log meanwhile");
        }
    }

    /// Moves a corrupt file aside. Only the newest of such is kept.
    fn replace(&mut self, seen: Option<(u64, u64)>) {
        let path = self.path.display();
        match database::move_aside(&self.path, seen) {
            Ok(Some(aside)) => {
                log::error!("request log {path}: the file is corrupt; it was moved to {}", aside.display());
                if let Err(error) = remove_other_asides(&self.path, &aside) {
                    log::warn!("request log {path}: older corrupt files beside it cannot be removed: {error}");
                }
            }
            Ok(None) => log::warn!("request log {path}: another process has replaced the corrupt file"),
            Err(error) => {
                let why = format!("request log {path}: the file is corrupt, and cannot be moved aside: {error}");
                self.stop(&why, Instant::now());
            }
        }
    }

    /// Looks at the file and its disk, once in a while.
    fn look(&mut self, now: Instant) {
        if self.look_at.is_some_and(|at| now < at) {
            return;
        }
        self.look_at = Some(now + LOOK_INTERVAL);
        if self.store.as_ref().is_some_and(Store::was_replaced) {
            log::warn!("request log {}: the file was deleted or replaced, and is begun anew", self.path.display());
            self.store = None;
        }
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        if let Some(why) = room(folder).and_then(Room::shortage) {
            self.stop(&format!("request log {}: {why}", self.path.display()), now);
        }
        self.has_surplus = true;
        if let Some(store) = &self.store {
            self.queue.note_bytes(store.used());
        }
    }

    fn delete_surplus(&mut self) {
        if !self.has_surplus || self.retry_at.is_some_and(|at| Instant::now() < at) {
            self.has_surplus = false;
            return;
        }
        let retention = self.queue.retention();
        let Some(store) = &mut self.store else {
            self.has_surplus = false;
            return;
        };
        match store.retain(retention, SystemTime::now()) {
            Ok(has_more) => self.has_surplus = has_more,
            Err(error) => {
                self.has_surplus = false;
                self.fails(&error);
            }
        }
    }

    /// Says how many entries were dropped, now and then.
    fn tell_dropped(&mut self, now: Instant) {
        let full = self.queue.dropped().by_reason().find(|(reason, _)| *reason == Reason::Full);
        let dropped = full.map_or(0, |(_, count)| count);
        let is_due = self.told_at.is_none_or(|told| now.saturating_duration_since(told) >= TELL_AGAIN);
        if dropped > self.dropped_told && is_due && self.retry_at.is_none() {
            self.told_at = Some(now);
            let more = dropped - self.dropped_told;
            self.dropped_told = dropped;
            log::warn!(
                "request log {}: {more} requests are not in it, since more came than it takes; \
                 api_together_request_log_dropped_total counts them",
                self.path.display()
            );
        }
    }
}

/// Ends all waiting for the thread when it ends, for whatever reason.
struct EndsWithThread(Arc<Queue>);

impl Drop for EndsWithThread {
    fn drop(&mut self) {
        if !self.0.is_closing() {
            self.0.set_error(Some("its thread has ended, which is a fault of this program".to_owned()));
        }
        self.0.close();
        self.0.end();
        // What came behind the last look.
        self.0.drop_some(Reason::Failing, self.0.take().entries.len());
    }
}

/// Room of a disk, in bytes.
#[derive(Clone, Copy, Debug)]
struct Room {
    free: u64,
    total: u64,
}

impl Room {
    /// Says so if there is too little.
    fn shortage(self) -> Option<String> {
        let least = FREE_BYTES_MIN.max(self.total / 100 * FREE_PERCENT_MIN);
        let mib = |bytes: u64| bytes / 1024 / 1024;
        (self.free < least).then(|| {
            format!(
                "its disk has {} MiB left, and it stops below {} MiB ({FREE_PERCENT_MIN} % or 1 GiB), so that the ledger has room; \
                 make room, or name a file on another disk in server.requestLog.path",
                mib(self.free),
                mib(least)
            )
        })
    }
}

/// The room of a folder's disk, or of that of the nearest one above it that is there; none if that cannot be found out.
fn room(folder: &Path) -> Option<Room> {
    let there = folder.ancestors().find(|folder| folder.exists())?;
    let disk = rustix::fs::statvfs(there).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(disk.f_frsize);
    Some(Room { free: bytes(disk.f_bavail), total: bytes(disk.f_blocks) })
}

/// Removes files that were moved aside before this one.
fn remove_other_asides(path: &Path, newest: &Path) -> io::Result<()> {
    let prefix = beside(path, ".corrupt-");
    let folder = path.parent().unwrap_or(Path::new("."));
    let is_old = |path: &Path| {
        let bytes = |path: &Path| path.as_os_str().as_encoded_bytes().to_vec();
        bytes(path).starts_with(&bytes(&prefix)) && !bytes(path).starts_with(&bytes(newest))
    };
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if is_old(&path) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}
