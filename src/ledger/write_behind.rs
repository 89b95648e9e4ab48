//! Changes that are written a little later: tokens, attempts without a permit from the ledger, permits given back. They
//! wait here for the next batch that writes them, and stay if it fails.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::account::Entry;
use super::allocator::Tally;
use super::batch::{Batch, write};
use super::notices::{NOTICES_MAX, Notice};
use super::places::{CHANGES_MAX, PlaceChange};
use super::stats::{MODELS_MAX, OTHER_MODELS};
use super::{Account, AccountSet, LedgerError, Spent};
use crate::limit::{Clock, Stamp};

/// Time after which a change is written.
pub(super) const WRITE_DELAY: Duration = Duration::from_millis(100);
/// Token counts that wait while the ledger cannot be written; more are lost, logged and counted.
const SPENT_MAX: usize = 10_000;

/// Changes that wait to be written.
#[derive(Debug)]
pub(super) struct WriteBehind {
    /// Accounts with unwritten changes.
    accounts: Vec<Arc<Account>>,
    /// Accounts whose requests in flight have become fewer, where the ledger counts these.
    in_flight: Vec<Arc<Account>>,
    spent: HashMap<SpentKey, Spent>,
    /// In the order in which they were made.
    places: Vec<PlaceChange>,
    /// Lists of models, by endpoint; as many as a config has.
    model_lists: HashMap<Arc<str>, Arc<str>>,
    /// What is said to other processes, by subject; at most [`NOTICES_MAX`].
    notices: HashMap<Arc<str>, Notice>,
    /// Models seen so far, by endpoint; at most [`MODELS_MAX`] for each.
    models: HashMap<Arc<str>, HashSet<Arc<str>>>,
    /// Moment at which the changes are due.
    pub(super) due_at: Stamp,
}

/// Endpoint, model, caller's key, hour, day.
type SpentKey = (Arc<str>, Arc<str>, Option<Arc<str>>, i64, i64);

impl Default for WriteBehind {
    fn default() -> Self {
        Self {
            accounts: Vec::new(),
            in_flight: Vec::new(),
            spent: HashMap::new(),
            places: Vec::new(),
            model_lists: HashMap::new(),
            notices: HashMap::new(),
            models: HashMap::new(),
            due_at: Stamp::NEVER,
        }
    }
}

impl WriteBehind {
    /// True if no change waits.
    pub(super) fn is_empty(&self) -> bool {
        self.accounts.is_empty()
            && self.in_flight.is_empty()
            && self.spent.is_empty()
            && self.places.is_empty()
            && self.model_lists.is_empty()
            && self.notices.is_empty()
    }

    /// Schedules a write, [`WRITE_DELAY`] from now at the latest.
    pub(super) fn due_soon(&mut self, clock: &Clock) {
        self.due_at = self.due_at.min(clock.boot + WRITE_DELAY);
    }

    /// Postpones the write after a failure, so that it is not retried at once.
    pub(super) fn postpone(&mut self, clock: &Clock) {
        self.due_at = self.due_at.max(clock.boot + WRITE_DELAY);
    }

    /// Adds a change that the account's mirror counts already.
    pub(super) fn add(&mut self, account: &Arc<Account>, entry: Entry) {
        let mut mirror = account.mirror();
        if mirror.unwritten.is_empty() {
            self.accounts.push(Arc::clone(account));
        }
        entry.merge_into(&mut mirror.unwritten);
    }

    /// Notes that the requests in flight of a set's accounts are to be written.
    pub(super) fn note_in_flight(&mut self, accounts: &AccountSet) {
        for of in accounts.accounts().iter().filter(|of| of.shares_concurrency()) {
            if !self.in_flight.iter().any(|known| Arc::ptr_eq(known, &of.account)) {
                self.in_flight.push(Arc::clone(&of.account));
            }
        }
    }

    /// Adds to the token statistics.
    pub(super) fn add_spent(&mut self, mut spent: Spent, tally: &Tally) {
        let seen = self.models.entry(Arc::clone(&spent.endpoint)).or_default();
        if !seen.contains(&spent.model) {
            if seen.len() < MODELS_MAX {
                seen.insert(Arc::clone(&spent.model));
            } else {
                spent.model = OTHER_MODELS.into();
            }
        }
        let key = (Arc::clone(&spent.endpoint), Arc::clone(&spent.model), spent.key.clone(), spent.hour, spent.day);
        if let Some(kept) = self.spent.get_mut(&key) {
            kept.merge(&spent);
        } else if self.spent.len() < SPENT_MAX {
            self.spent.insert(key, spent);
        } else {
            let lost = tally.lost.fetch_add(1, Ordering::Relaxed) + 1;
            if lost.is_power_of_two() {
                log::error!("the tokens of {lost} answers are lost: the ledger has not been writable for too long");
            }
        }
    }

    /// Adds a change of places.
    pub(super) fn add_place(&mut self, change: PlaceChange) {
        if self.places.len() < CHANGES_MAX {
            self.places.push(change);
            return;
        }
        // The last one makes room, so that this is logged once for each failure of the ledger.
        if self.places.len() == CHANGES_MAX {
            log::error!(
                "where objects and sessions are is not noted any more: the ledger has not been writable for too long"
            );
            self.places.push(change);
        }
    }

    /// Adds a list of models.
    pub(super) fn add_models(&mut self, endpoint: Arc<str>, list: Arc<str>) {
        self.model_lists.insert(endpoint, list);
    }

    /// Adds what is said to other processes.
    pub(super) fn add_notice(&mut self, notice: Notice) {
        if self.notices.len() < NOTICES_MAX || self.notices.contains_key(&notice.subject) {
            self.notices.insert(Arc::clone(&notice.subject), notice);
        }
    }

    /// Writes all changes, as part of a batch.
    pub(super) fn write(&self, batch: &mut Batch<'_>) -> Result<(), LedgerError> {
        self.in_flight.iter().try_for_each(|account| batch.write_in_flight(account))?;
        let ledger = &mut *batch.ledger;
        self.accounts.iter().try_for_each(|account| write(ledger, account, &account.mirror().unwritten))?;
        self.spent.values().try_for_each(|spent| ledger.add_tokens(spent))?;
        self.places.iter().try_for_each(|change| ledger.change_place(change))?;
        self.model_lists.iter().try_for_each(|(endpoint, list)| ledger.keep_models(endpoint, list))?;
        self.notices.values().try_for_each(|notice| ledger.tell(notice))
    }

    /// Clears the changes after the commit.
    pub(super) fn forget_written(&mut self) {
        self.accounts.drain(..).for_each(|account| account.mirror().unwritten.clear());
        self.in_flight.clear();
        self.spent.clear();
        self.places.clear();
        self.model_lists.clear();
        self.notices.clear();
        self.due_at = Stamp::NEVER;
    }
}
