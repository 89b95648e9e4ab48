//! Moments promised to each caller. A caller that asks again too early gets the same moment, or an earlier one, so that asking
//! again and again does not push it out.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use crate::ledger::Account;
use crate::ledger::messages::{CallerId, Wanted};
use crate::limit::Stamp;

/// Callers whose moments are remembered; those of others are promised anew each time.
const CALLERS_MAX: usize = 10_000;
/// Moments of one caller that are remembered: a caller may be many clients behind one address.
const MOMENTS_MAX: usize = 1000;

/// A moment that a caller was told.
#[derive(Debug)]
pub(super) struct Told {
    account: Weak<Account>,
    /// The moment.
    pub(super) at: Stamp,
    /// Ticket of the first draw that can know of the promise. Earlier ones are requests of their own.
    known_from: u64,
}

impl Told {
    /// A moment of an account, told to everybody who comes from this ticket on.
    pub(super) fn new(account: &Arc<Account>, at: Stamp, known_from: u64) -> Self {
        Self { account: Arc::downgrade(account), at, known_from }
    }

    /// The account that it is a moment of, if that is still used.
    pub(super) fn account(&self) -> Option<Arc<Account>> {
        self.account.upgrade()
    }

    fn is_of(&self, wanted: &Wanted) -> bool {
        wanted.accounts.accounts().iter().any(|of| std::ptr::eq(self.account.as_ptr(), Arc::as_ptr(&of.account)))
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
