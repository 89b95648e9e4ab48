//! Counts of one endpoint as this process knows them, whichever config the endpoint came from.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Change;
use super::prefetch::{Demand, PrefetchBuffer};
use crate::limit::{Counted, Days, Quota, Slot, Stamp, View};

/// Changes that wait to be written while the ledger cannot be; beyond that they are written as if they were as old as the
/// oldest, which still counts them in the right days.
const UNWRITTEN_MAX: usize = 1024;

/// An endpoint seems full for no longer than this: what another process gives back, a changed config and a clock that is set
/// can open it before.
const HINT_MAX: Duration = Duration::from_secs(1);

/// One endpoint's account.
#[derive(Debug)]
pub struct Account {
    id: Arc<str>,
    /// Attempts sent since the start.
    attempts: AtomicU64,
    /// Attempts among them that needed no permit and are not written to the ledger yet.
    unwritten: AtomicU64,
    /// A hint: the allocator said last that nothing frees before this moment. It puts the endpoint behind others.
    full_until: AtomicU64,
    view: Mutex<View>,
    /// Permits drawn ahead.
    pub(super) prefetch: PrefetchBuffer,
    /// The allocator's own.
    mirror: Mutex<Mirror>,
}

/// The allocator's part of an account.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    pub(super) quota: Quota,
    /// The number of the ledger's state that `quota` was read from; none: it has to be read.
    pub(super) read_at: Option<u64>,
    /// Changes that `quota` has already, to be written to the ledger a little later.
    pub(super) unwritten: Vec<Entry>,
    /// Drawn in the batch under way.
    pub(super) drawn: Vec<Entry>,
    pub(super) demand: Demand,
}

/// Change that is added to the ledger in one step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) slot: Slot,
    pub(super) days: Days,
    pub(super) change: Change,
}

impl Entry {
    pub(super) fn new(counted: Counted, change: Change) -> Self {
        Self { slot: counted.slot(), days: counted.days, change }
    }

    /// Adds it to a list, to what is there for the same slot and days.
    pub(super) fn merge_into(self, entries: &mut Vec<Self>) {
        let same = |entry: &&mut Self| entry.slot == self.slot && entry.days == self.days;
        if let Some(entry) = entries.iter_mut().rev().find(same) {
            entry.change.merge(self.change);
            return;
        }
        entries.push(self);
        if entries.len() > UNWRITTEN_MAX
            && let Some(other) = entries.iter().skip(1).position(|e| entries.first().is_some_and(|f| f.days == e.days))
        {
            let merged = entries.remove(other + 1);
            if let Some(first) = entries.first_mut() {
                first.change.merge(merged.change);
            }
        }
    }
}

impl Account {
    /// The account of an endpoint that nothing is known of yet.
    pub(super) fn new(id: Arc<str>) -> Self {
        Self {
            id,
            attempts: AtomicU64::default(),
            unwritten: AtomicU64::default(),
            full_until: AtomicU64::default(),
            view: Mutex::default(),
            prefetch: PrefetchBuffer::default(),
            mirror: Mutex::default(),
        }
    }

    /// The endpoint's id.
    pub fn id(&self) -> &Arc<str> {
        &self.id
    }

    /// Attempts sent since the start of this process.
    pub fn attempts(&self) -> u64 {
        self.attempts.load(Ordering::Relaxed)
    }

    /// True if the allocator found nothing free when it last looked. It may be wrong by what other processes have given
    /// back since.
    pub fn seems_full(&self, now: Stamp) -> bool {
        self.full_until.load(Ordering::Relaxed) > now.0
    }

    /// Forgets that it seemed full, as its limits may be others.
    pub fn look_again(&self) {
        self.full_until.store(0, Ordering::Relaxed);
    }

    /// Limits and their remaining parts when the allocator last looked, at most about a second ago while anything
    /// counts.
    pub fn view(&self) -> View {
        *lock(&self.view)
    }

    pub(super) fn count_sent(&self) {
        self.attempts.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn take_back_sent(&self) {
        self.attempts.fetch_sub(1, Ordering::Relaxed);
    }

    /// Counts an attempt that is to be written behind. True if nobody else's waits for that already.
    pub(super) fn count_unwritten(&self) -> bool {
        self.unwritten.fetch_add(1, Ordering::Relaxed) == 0
    }

    pub(super) fn take_unwritten(&self) -> u64 {
        self.unwritten.swap(0, Ordering::Relaxed)
    }

    /// True if attempts wait to be collected.
    pub(super) fn has_unwritten(&self) -> bool {
        self.unwritten.load(Ordering::Relaxed) > 0
    }

    pub(super) fn publish(&self, view: View, now: Stamp) {
        let full_until = view.held.map_or(Stamp::default(), |held| held.until.min(now + HINT_MAX));
        self.full_until.store(full_until.0, Ordering::Relaxed);
        *lock(&self.view) = view;
    }

    pub(super) fn mirror(&self) -> MutexGuard<'_, Mirror> {
        lock(&self.mirror)
    }
}

/// A poisoned lock is taken all the same: what it guards is read from the ledger again at the next doubt.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
