//! Account: what limits belong to, and its counts as this process knows them, whichever config the limits came from.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Change;
use crate::limit::{Counted, Days, Quota, Slot, Stamp, View};

/// Upper bound on the changes that wait while the ledger cannot be written. Beyond it, changes are merged into the
/// oldest one if they count in the same days, so that each day's count stays right.
const UNWRITTEN_MAX: usize = 1024;

/// Longest time for which an account seems full. It can have room earlier: another process may give permits back, the
/// config may change, the clock may be set.
const HINT_MAX: Duration = Duration::from_secs(1);

/// What an account's limits belong to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AccountId {
    /// All requests to an endpoint, by its id.
    Endpoint(Arc<str>),
    /// Requests to an endpoint for some of its models.
    Models {
        /// The endpoint's id.
        endpoint: Arc<str>,
        /// A pattern of its `modelLimits`, or one name that matches it.
        models: Arc<str>,
    },
    /// Requests with one of an endpoint's keys.
    Lane {
        /// The endpoint's id.
        endpoint: Arc<str>,
        /// The key's name, or a digest of it.
        lane: Arc<str>,
    },
    /// All requests with a caller's own key, by the key's name.
    Caller(Arc<str>),
    /// Requests with it for some models.
    CallerModels {
        /// The key's name.
        caller: Arc<str>,
        /// A pattern of its `modelLimits`.
        models: Arc<str>,
    },
}

impl AccountId {
    /// Returns the id of its endpoint, or the name of its caller's key.
    pub fn owner(&self) -> &Arc<str> {
        match self {
            Self::Endpoint(owner)
            | Self::Models { endpoint: owner, .. }
            | Self::Lane { endpoint: owner, .. }
            | Self::Caller(owner)
            | Self::CallerModels { caller: owner, .. } => owner,
        }
    }

    /// Returns the models that it is of; `None` if it is of all.
    pub fn models(&self) -> Option<&Arc<str>> {
        match self {
            Self::Endpoint(_) | Self::Lane { .. } | Self::Caller(_) => None,
            Self::Models { models, .. } | Self::CallerModels { models, .. } => Some(models),
        }
    }
}

impl fmt::Display for AccountId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Endpoint(endpoint) => f.write_str(endpoint),
            Self::Models { endpoint, models } => write!(f, "{endpoint}, model {models}"),
            Self::Lane { endpoint, lane } => write!(f, "{endpoint}, key {lane}"),
            Self::Caller(caller) => write!(f, "key {caller}"),
            Self::CallerModels { caller, models } => write!(f, "key {caller}, model {models}"),
        }
    }
}

/// An account.
#[derive(Debug)]
pub struct Account {
    id: AccountId,
    /// True if requests in flight are counted in the ledger, since processes on several machines share it.
    shares_concurrency: bool,
    /// Attempts sent since the start.
    attempts: AtomicU64,
    /// Attempts sent without a permit from the ledger and not written to it yet.
    unwritten: AtomicU64,
    /// Hint: the moment before which no permit becomes free, as the allocator last found it. Until then what needs one comes
    /// after others.
    full_until: AtomicU64,
    view: Mutex<View>,
    /// Used by the allocator only.
    mirror: Mutex<Mirror>,
}

/// The allocator's copy of an account's counts in the ledger.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    pub(super) quota: Quota,
    /// Generation of the ledger that `quota` was read from; `None` if it has to be read.
    pub(super) read_at: Option<u64>,
    /// Changes that `quota` includes already and that are written to the ledger a little later.
    pub(super) unwritten: Vec<Entry>,
    /// Changes of the current batch.
    pub(super) drawn: Vec<Entry>,
}

/// A change that is added to the ledger in one step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) slot: Slot,
    pub(super) days: Days,
    pub(super) change: Change,
}

impl Entry {
    pub(super) fn new(counted: Counted, change: Change) -> Self {
        Self { slot: counted.slot, days: counted.days, change }
    }

    /// Adds the change to a list, merged with the entry of the same slot and days if there is one.
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
    /// Returns an account without any counts yet.
    pub(super) fn new(id: AccountId, shares_concurrency: bool) -> Self {
        Self {
            id,
            shares_concurrency,
            attempts: AtomicU64::default(),
            unwritten: AtomicU64::default(),
            full_until: AtomicU64::default(),
            view: Mutex::default(),
            mirror: Mutex::default(),
        }
    }

    /// Returns what its limits belong to.
    pub fn id(&self) -> &AccountId {
        &self.id
    }

    /// True if requests in flight are counted in the ledger.
    pub(super) fn shares_concurrency(&self) -> bool {
        self.shares_concurrency
    }

    /// Returns the number of attempts sent since the start of this process.
    pub fn attempts(&self) -> u64 {
        self.attempts.load(Ordering::Relaxed)
    }

    /// True if the allocator found no free permit when it last looked. Permits that other processes have given back
    /// since are not considered.
    pub fn seems_full(&self, now: Stamp) -> bool {
        self.full_until.load(Ordering::Relaxed) > now.0
    }

    /// True if the allocator found no free permit when it last looked, and has not found one since. Unlike [`Account::seems_full`] it
    /// holds until the moment that was found then, however long ago: for choosing among many.
    pub fn is_held(&self, now: Stamp) -> bool {
        self.view().held.is_some_and(|held| held.until > now)
    }

    /// Clears the hint that it is full, because its limits or counts may have changed.
    pub fn look_again(&self) {
        self.full_until.store(0, Ordering::Relaxed);
        lock(&self.view).held = None;
    }

    /// Returns the limits and what is left of them, as the allocator last found them: about a second old at most while
    /// anything counts.
    pub fn view(&self) -> View {
        *lock(&self.view)
    }

    pub(super) fn count_sent(&self) {
        self.attempts.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn take_back_sent(&self) {
        self.attempts.fetch_sub(1, Ordering::Relaxed);
    }

    /// Counts an attempt that is to be written behind. True if no other attempt waits for that already.
    pub(super) fn count_unwritten(&self) -> bool {
        self.unwritten.fetch_add(1, Ordering::Relaxed) == 0
    }

    pub(super) fn take_unwritten(&self) -> u64 {
        // Of many accounts only a few have any.
        if self.has_unwritten() { self.unwritten.swap(0, Ordering::Relaxed) } else { 0 }
    }

    /// True if attempts wait to be collected by the allocator.
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

/// Locks a mutex even if it is poisoned: its content is read from the ledger again whenever it may be out of date.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
