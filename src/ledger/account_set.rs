//! Account set: the accounts that one attempt counts in. It draws a permit of each of them, or of none.

use std::sync::{Arc, Mutex, MutexGuard};

use super::account::lock;
use super::prefetch::{Demand, PrefetchBuffer};
use super::{Account, AccountId};
use crate::limit::{Clock, CountedAt, Counts, Held, Limits, Stamp, View};

/// An account, and the limits that a config sets for it.
#[derive(Clone, Debug)]
pub struct LimitedAccount {
    /// The account.
    pub account: Arc<Account>,
    /// Its limits.
    pub limits: Arc<Limits>,
}

impl LimitedAccount {
    /// Returns its limits and what is left of them, by the counts of this process.
    pub(super) fn count_up(&self, clock: &Clock) -> View {
        self.account.mirror().quota.view(&self.limits, clock)
    }

    /// Publishes what is left of its limits.
    pub(super) fn publish(&self, clock: &Clock) {
        self.account.publish(self.count_up(clock), clock.boot);
    }
}

/// The accounts of an attempt under one config. Attempts of the same kind share a set, and the permits drawn ahead for it.
#[derive(Debug)]
pub struct AccountSet {
    accounts: Box<[LimitedAccount]>,
    in_ledger: bool,
    is_concurrency_limited: bool,
    /// Permits drawn ahead, each of every account.
    pub(super) prefetch: PrefetchBuffer,
    /// Used by the allocator only.
    demand: Mutex<Demand>,
}

impl AccountSet {
    /// Returns the set of these accounts.
    pub fn new(accounts: Vec<LimitedAccount>) -> Self {
        Self {
            in_ledger: accounts.iter().any(|of| of.limits.in_ledger()),
            is_concurrency_limited: accounts.iter().any(|of| of.limits.is_concurrency_limited()),
            accounts: accounts.into(),
            prefetch: PrefetchBuffer::default(),
            demand: Mutex::default(),
        }
    }

    /// Returns its accounts.
    pub fn accounts(&self) -> &[LimitedAccount] {
        &self.accounts
    }

    /// True if attempts need a permit from the ledger.
    pub fn in_ledger(&self) -> bool {
        self.in_ledger
    }

    /// True if concurrent requests are limited.
    pub fn is_concurrency_limited(&self) -> bool {
        self.is_concurrency_limited
    }

    /// True if attempts need a permit at all.
    pub fn is_limited(&self) -> bool {
        self.in_ledger || self.is_concurrency_limited
    }

    /// True if one of the accounts had no permit left when the allocator last looked.
    pub fn seems_full(&self, now: Stamp) -> bool {
        self.is_limited() && self.accounts.iter().any(|of| of.account.seems_full(now))
    }

    /// Counts an attempt that is sent. True if it is to be written behind and no other one of an account waits for that.
    pub(super) fn count_sent(&self, is_unwritten: bool) -> bool {
        let mut is_first = false;
        for LimitedAccount { account, .. } in &self.accounts {
            account.count_sent();
            is_first |= is_unwritten && account.count_unwritten();
        }
        is_first
    }

    pub(super) fn take_back_sent(&self) {
        self.accounts.iter().for_each(|of| of.account.take_back_sent());
    }

    /// True if an attempt that was counted at that moment needs no other days now.
    pub(super) fn days_last(&self, counted: CountedAt, clock: &Clock) -> bool {
        self.accounts.iter().all(|of| of.limits.calendar.covers(counted.wall, clock.wall))
    }
}

/// Why a set has no permit: the account that holds it longest.
pub(super) type HeldAccount = (AccountId, Held);

/// Methods for the allocator, which alone uses the accounts' counts: nothing comes between two steps of it.
impl AccountSet {
    /// Counts an attempt in every account, or in none if one of them is at a limit.
    pub(super) fn take(&self, clock: &Clock) -> Result<CountedAt, HeldAccount> {
        self.all_free(|of| of.account.mirror().quota.held(&of.limits, clock))?;
        let counted = CountedAt { boot: clock.boot, wall: clock.wall };
        // Attempts without a permit from the ledger are counted when they are sent.
        self.add(counted, u64::from(self.in_ledger));
        self.begin();
        Ok(counted)
    }

    /// Counts a request as in flight, without the ledger: only concurrent requests are limited.
    pub(super) fn enter(&self, clock: &Clock) -> Result<(), HeldAccount> {
        self.all_free(|of| of.account.mirror().quota.concurrency_holds(&of.limits, clock.boot))?;
        self.begin();
        Ok(())
    }

    fn all_free(&self, held: impl Fn(&LimitedAccount) -> Option<Held>) -> Result<(), HeldAccount> {
        let all = self.accounts.iter().filter_map(|of| Some((of, held(of)?)));
        match all.max_by_key(|(_, held)| held.until) {
            Some((of, held)) => Err((of.account.id().clone(), held)),
            None => Ok(()),
        }
    }

    /// Counts attempts in every account.
    pub(super) fn add(&self, counted: CountedAt, attempts: u64) {
        for LimitedAccount { account, limits } in &self.accounts {
            account.mirror().quota.add(limits.counted(counted), Counts { attempts, tokens: 0 });
        }
    }

    fn begin(&self) {
        self.accounts.iter().for_each(|of| of.account.mirror().quota.enter(&of.limits));
    }

    /// Ends a request that was counted as in flight.
    pub(super) fn release(&self) {
        self.accounts.iter().for_each(|of| of.account.mirror().quota.release(&of.limits));
    }

    /// Returns the moment at which every account has a permit that is not promised yet, and the account that has it last.
    pub(super) fn next_free(&self, clock: &Clock, not_before: Stamp) -> Option<(Stamp, &LimitedAccount)> {
        let next = |of: &LimitedAccount| of.account.mirror().quota.next_free(&of.limits, clock, not_before);
        self.accounts.iter().map(|of| (next(of), of)).max_by_key(|(at, _)| *at)
    }

    pub(super) fn demand(&self) -> MutexGuard<'_, Demand> {
        lock(&self.demand)
    }
}
