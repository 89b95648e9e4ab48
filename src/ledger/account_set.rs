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
    /// True if its requests in flight are limited, and counted in the ledger.
    pub(super) fn shares_concurrency(&self) -> bool {
        self.account.shares_concurrency() && self.limits.is_concurrency_limited()
    }

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
            in_ledger: accounts.iter().any(|of| of.limits.in_ledger() || of.shares_concurrency()),
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

    /// True if tokens are limited.
    pub fn counts_tokens(&self) -> bool {
        self.accounts.iter().any(|of| of.limits.counts_tokens())
    }

    /// True if concurrent requests are limited.
    pub fn is_concurrency_limited(&self) -> bool {
        self.is_concurrency_limited
    }

    /// True if attempts need a permit at all.
    pub fn is_limited(&self) -> bool {
        self.in_ledger || self.is_concurrency_limited
    }

    /// The share that is left of the limits, from 0 to 1: the smallest of the accounts', as the allocator last found them.
    pub fn share_left(&self, now: Stamp) -> f64 {
        self.accounts.iter().map(|of| of.account.view().share_left(now)).fold(1.0, f64::min)
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

/// The moment at which a set has a free permit.
pub(super) struct NextFree<'a> {
    pub(super) at: Stamp,
    pub(super) set: &'a AccountSet,
    /// The accounts whose own next permit it is. Others have one earlier, and a promise of theirs would put off
    /// requests for which that is enough.
    promised_by: Vec<&'a LimitedAccount>,
}

impl NextFree<'_> {
    /// Promises the permit.
    pub(super) fn promise(&self, clock: &Clock) {
        for LimitedAccount { account, limits } in &self.promised_by {
            account.mirror().quota.promise(self.at, limits, clock);
        }
    }

    pub(super) fn is_promised_by(&self, of: &LimitedAccount) -> bool {
        self.promised_by.iter().any(|promised| Arc::ptr_eq(&promised.account, &of.account))
    }
}

/// Why a set has no permit: the account that holds it longest.
pub(super) type HeldAccount = (AccountId, Held);

/// Methods for the allocator, which alone uses the accounts' counts: nothing comes between two steps of it.
impl AccountSet {
    /// Counts an attempt in every account, or in none if one of them is at a limit.
    pub(super) fn take(&self, clock: &Clock) -> Result<CountedAt, HeldAccount> {
        self.check_room(clock, 0)?;
        Ok(self.count(clock, 0))
    }

    /// Fails if one of the accounts has no room for a request that takes this many tokens.
    pub(super) fn check_room(&self, clock: &Clock, tokens: u64) -> Result<(), HeldAccount> {
        self.all_free(|of| of.account.mirror().quota.held_for(&of.limits, clock, tokens))
    }

    /// Counts a request in every account, and reserves these tokens of it.
    pub(super) fn count(&self, clock: &Clock, tokens: u64) -> CountedAt {
        let counted = CountedAt::now(clock);
        // Attempts without a permit from the ledger are counted when they are sent.
        self.add(counted, Counts { attempts: u64::from(self.in_ledger), tokens });
        self.enter_all();
        counted
    }

    /// Fails if one of the accounts has as many requests in flight as it may have.
    pub(super) fn check_concurrency(&self, clock: &Clock) -> Result<(), HeldAccount> {
        self.all_free(|of| of.account.mirror().quota.concurrency_holds(&of.limits, clock.boot))
    }

    /// Counts a request as in flight, without the ledger: only concurrent requests are limited.
    pub(super) fn enter(&self, clock: &Clock) -> Result<(), HeldAccount> {
        self.check_concurrency(clock)?;
        self.enter_all();
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
    pub(super) fn add(&self, counted: CountedAt, counts: Counts) {
        for LimitedAccount { account, limits } in &self.accounts {
            account.mirror().quota.add(limits.counted(counted), counts);
        }
    }

    pub(super) fn enter_all(&self) {
        self.accounts.iter().for_each(|of| of.account.mirror().quota.enter(&of.limits));
    }

    /// Ends a request that was counted as in flight.
    pub(super) fn release(&self) {
        self.accounts.iter().for_each(|of| of.account.mirror().quota.release(&of.limits));
    }

    /// Returns the next moment, not before `not_before`, at which every account has a permit that is not promised yet.
    /// Only accounts that are at a limit put it off: what others have promised for later is no reason to wait for it.
    pub(super) fn next_free(&self, clock: &Clock, not_before: Stamp) -> NextFree<'_> {
        let held = |of: &LimitedAccount| of.account.mirror().quota.held(&of.limits, clock).is_some();
        let is_any_held = self.accounts.iter().any(held);
        let next = |of: &LimitedAccount| of.account.mirror().quota.next_free(&of.limits, clock, not_before);
        let binding = self.accounts.iter().filter(|of| !is_any_held || held(of));
        let moments: Vec<(Stamp, &LimitedAccount)> = binding.map(|of| (next(of), of)).collect();
        let at = moments.iter().map(|(at, _)| *at).max().unwrap_or(not_before);
        let promised_by = moments.into_iter().filter(|(own, _)| *own == at).map(|(_, of)| of).collect();
        NextFree { at, set: self, promised_by }
    }

    pub(super) fn demand(&self) -> MutexGuard<'_, Demand> {
        lock(&self.demand)
    }
}
