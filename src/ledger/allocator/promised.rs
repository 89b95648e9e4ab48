//! Moments promised to each caller. A caller that asks again too early gets the same moment, or an earlier one, so that asking
//! again and again does not push it out.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use crate::ledger::account_set::NextFree;
use crate::ledger::messages::{CallerId, Wanted};
use crate::ledger::{Account, LimitedAccount};
use crate::limit::Stamp;

/// Callers whose moments are remembered; those of others are promised anew each time.
const CALLERS_MAX: usize = 10_000;
/// Moments of one caller that are remembered: a caller may be many clients behind one address.
const MOMENTS_MAX: usize = 1000;

/// A moment that a caller was told.
#[derive(Debug)]
pub(super) struct Told {
    /// The accounts that a permit of that moment is of, each with whether it has promised one.
    accounts: Box<[(Weak<Account>, bool)]>,
    /// The moment.
    pub(super) at: Stamp,
    /// Ticket of the first draw that can know of the promise. Earlier ones are requests of their own.
    known_from: u64,
}

impl Told {
    /// A moment of a set of accounts, told to everybody who comes from this ticket on.
    pub(super) fn new(free: &NextFree<'_>, known_from: u64) -> Self {
        let told = |of: &LimitedAccount| (Arc::downgrade(&of.account), free.is_promised_by(of));
        Self { accounts: free.set.accounts().iter().map(told).collect(), at: free.at, known_from }
    }

    /// The same promise, told again.
    pub(super) fn known_from(self, known_from: u64) -> Self {
        Self { known_from, ..self }
    }

    /// Takes the promise back, so that its permits are free for others.
    pub(super) fn withdraw(&self) {
        let promised = self.accounts.iter().filter(|(_, has_promised)| *has_promised);
        for account in promised.filter_map(|(account, _)| account.upgrade()) {
            account.mirror().quota.withdraw(self.at);
        }
    }

    /// True if it is a moment of the same accounts: one of fewer of them would not do.
    fn is_of(&self, wanted: &Wanted) -> bool {
        let same = |((known, _), of): (&(Weak<Account>, bool), &LimitedAccount)| {
            std::ptr::eq(known.as_ptr(), Arc::as_ptr(&of.account))
        };
        let accounts = wanted.accounts.accounts();
        self.accounts.len() == accounts.len() && self.accounts.iter().zip(accounts).all(same)
    }
}

/// The moments of all callers.
#[derive(Debug, Default)]
pub(super) struct Promised(HashMap<CallerId, VecDeque<Told>>);

impl Promised {
    /// Takes out the moment that a caller was told longest ago, if it knew of it when it asked, and if it is to come.
    pub(super) fn take(&mut self, caller: CallerId, ticket: u64, wanted: &[Wanted], now: Stamp) -> Option<Told> {
        let moments = self.0.get_mut(&caller)?;
        moments.retain(|told| told.at > now);
        let at =
            moments.iter().position(|told| told.known_from <= ticket && wanted.iter().any(|wanted| told.is_of(wanted)));
        let told = at.and_then(|at| moments.remove(at));
        if moments.is_empty() {
            self.0.remove(&caller);
        }
        told
    }

    /// Remembers a moment.
    pub(super) fn note(&mut self, caller: CallerId, told: Told, now: Stamp) {
        if self.0.len() >= CALLERS_MAX && !self.0.contains_key(&caller) {
            self.0.retain(|_, moments| {
                moments.retain(|told| told.at > now);
                !moments.is_empty()
            });
            if self.0.len() >= CALLERS_MAX {
                return;
            }
        }
        let moments = self.0.entry(caller).or_default();
        if moments.len() < MOMENTS_MAX {
            moments.push_back(told);
        }
    }
}
