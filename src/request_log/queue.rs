//! Entries that wait to be written: bounded, and never waited for.

use std::mem;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::LogState;
use super::entry::Entry;
use super::store::Retention;

/// Entries that wait. One takes about a kibibyte, so these are 8 MiB.
const ENTRIES_MAX: usize = 8192;
/// Bytes of the bodies that wait with them.
const BODY_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Requests without a right key that are kept in a second.
const STRANGERS_A_SECOND: u32 = 10;

/// Reason why an entry is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// More came than can be written.
    Full,
    /// The file cannot be written, or its disk has too little room.
    Failing,
    /// Too many requests without a right key.
    Strangers,
}

impl Reason {
    /// All reasons.
    pub const ALL: [Self; 3] = [Self::Full, Self::Failing, Self::Strangers];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Failing => "failing",
            Self::Strangers => "strangers",
        }
    }
}

/// Entries that were dropped, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped([u64; Reason::ALL.len()]);

impl Dropped {
    /// Each reason with its number.
    pub fn by_reason(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().zip(self.0)
    }

    /// The number in all.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

/// The queue, and what the writer and its askers know of each other.
#[derive(Debug)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    came: Condvar,
    /// Length of the queue, so that a request sees that it is full without the lock.
    length: AtomicUsize,
    /// True while nothing can be written.
    is_failing: AtomicBool,
    dropped: [AtomicU64; Reason::ALL.len()],
    written: AtomicU64,
    bytes: AtomicU64,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    entries: Vec<Entry>,
    body_bytes: usize,
    closing: bool,
    /// The second that is counted, and the strangers in it.
    strangers: Option<(Instant, u32)>,
}

#[derive(Debug)]
struct State {
    retention: Retention,
    error: Option<String>,
    has_ended: bool,
}

/// What the writer takes.
pub(super) struct Taken {
    pub(super) entries: Vec<Entry>,
    pub(super) closing: bool,
}

impl Queue {
    pub(super) fn new(retention: Retention) -> Self {
        Self {
            waiting: Mutex::default(),
            came: Condvar::new(),
            length: AtomicUsize::new(0),
            is_failing: AtomicBool::new(false),
            dropped: Default::default(),
            written: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            state: Mutex::new(State { retention, error: None, has_ended: false }),
            ended: Condvar::new(),
        }
    }

    /// True if there is room for another entry; if not, it counts as dropped.
    pub(super) fn takes(&self, is_stranger: bool) -> bool {
        if self.length.load(Ordering::Relaxed) >= ENTRIES_MAX {
            let is_failing = self.is_failing.load(Ordering::Relaxed);
            self.drop_some(if is_failing { Reason::Failing } else { Reason::Full }, 1);
            return false;
        }
        if is_stranger && !self.takes_stranger(Instant::now()) {
            self.drop_some(Reason::Strangers, 1);
            return false;
        }
        true
    }

    fn takes_stranger(&self, now: Instant) -> bool {
        let mut waiting = lock(&self.waiting);
        match &mut waiting.strangers {
            Some((since, count)) if now.saturating_duration_since(*since) < Duration::from_secs(1) => {
                *count = count.saturating_add(1);
                *count <= STRANGERS_A_SECOND
            }
            strangers => {
                *strangers = Some((now, 1));
                true
            }
        }
    }

    pub(super) fn add(&self, mut entry: Entry) {
        let bytes = |entry: &Entry| {
            entry.bodies.as_ref().map_or(0, |bodies| bodies.request.bytes.len() + bodies.answer.bytes.len())
        };
        let mut waiting = lock(&self.waiting);
        if waiting.entries.len() >= ENTRIES_MAX || waiting.closing && lock(&self.state).has_ended {
            drop(waiting);
            return self.drop_some(Reason::Full, 1);
        }
        let with_bodies = waiting.body_bytes + bytes(&entry);
        if with_bodies > BODY_BYTES_MAX {
            entry.bodies = None;
        } else {
            waiting.body_bytes = with_bodies;
        }
        waiting.entries.push(entry);
        self.length.store(waiting.entries.len(), Ordering::Relaxed);
        let is_first = waiting.entries.len() == 1;
        drop(waiting);
        if is_first {
            self.came.notify_one();
        }
    }

    /// Waits for the first entry, at most for this time.
    pub(super) fn wait(&self, longest: Duration) {
        let waiting = lock(&self.waiting);
        let is_idle = |waiting: &mut Waiting| waiting.entries.is_empty() && !waiting.closing;
        drop(self.came.wait_timeout_while(waiting, longest, is_idle));
    }

    /// Waits for this time, or until the log is closed.
    pub(super) fn pause(&self, time: Duration) {
        let waiting = lock(&self.waiting);
        drop(self.came.wait_timeout_while(waiting, time, |waiting| !waiting.closing));
    }

    /// Takes all that waits.
    pub(super) fn take(&self) -> Taken {
        let mut waiting = lock(&self.waiting);
        waiting.body_bytes = 0;
        let entries = mem::take(&mut waiting.entries);
        self.length.store(0, Ordering::Relaxed);
        Taken { entries, closing: waiting.closing }
    }

    pub(super) fn is_closing(&self) -> bool {
        lock(&self.waiting).closing
    }

    pub(super) fn close(&self) {
        lock(&self.waiting).closing = true;
        self.came.notify_all();
    }

    /// Notes that nothing is written any more.
    pub(super) fn end(&self) {
        lock(&self.state).has_ended = true;
        self.ended.notify_all();
    }

    /// Waits until nothing is written any more. False if that takes longer.
    pub(super) fn wait_until_ended(&self, longest: Duration) -> bool {
        let state = lock(&self.state);
        let waited = self.ended.wait_timeout_while(state, longest, |state| !state.has_ended);
        waited.is_ok_and(|(state, _)| state.has_ended)
    }

    pub(super) fn drop_some(&self, reason: Reason, count: usize) {
        if let Some(dropped) = self.dropped.get(reason as usize) {
            dropped.fetch_add(count as u64, Ordering::Relaxed);
        }
    }

    pub(super) fn note_written(&self, count: usize) {
        self.written.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(super) fn note_bytes(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
    }

    /// Notes why nothing can be written, or that all is well. Returns what was noted before.
    pub(super) fn set_error(&self, error: Option<String>) -> Option<String> {
        self.is_failing.store(error.is_some(), Ordering::Relaxed);
        mem::replace(&mut lock(&self.state).error, error)
    }

    pub(super) fn retention(&self) -> Retention {
        lock(&self.state).retention
    }

    pub(super) fn set_retention(&self, retention: Retention) {
        lock(&self.state).retention = retention;
    }

    pub(super) fn dropped(&self) -> Dropped {
        Dropped(self.dropped.each_ref().map(|count| count.load(Ordering::Relaxed)))
    }

    pub(super) fn state(&self, path: Box<Path>) -> LogState {
        LogState {
            path,
            error: lock(&self.state).error.clone(),
            written: self.written.load(Ordering::Relaxed),
            waiting: self.length.load(Ordering::Relaxed),
            dropped: self.dropped(),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it is held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
