//! Permit: the right to one attempt, which gives itself back if it is not used.

use std::sync::Arc;

use super::messages::Return;
use super::{Account, Client, Wanted};
use crate::limit::{Clock, Counted, Limits, PERMIT_AGE_MAX, Stamp};

/// The right to one attempt. A permit that is dropped before it is spent is given back, since the attempt was never
/// sent.
#[derive(Debug)]
pub struct Permit {
    account: Arc<Account>,
    limits: Arc<Limits>,
    client: Client,
    /// Count in the ledger; `None` without one: the attempt needs none, or the ledger cannot be used.
    counted: Option<Counted>,
    /// True while the request counts as in flight.
    concurrent: bool,
    stage: PermitStage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PermitStage {
    Held,
    Spent,
    GivenBack,
}

impl Permit {
    pub(super) fn new(client: &Client, account: &Arc<Account>, limits: &Arc<Limits>, counted: Option<Counted>) -> Self {
        Self {
            account: Arc::clone(account),
            limits: Arc::clone(limits),
            client: client.clone(),
            counted,
            concurrent: false,
            stage: PermitStage::Held,
        }
    }

    /// Counts the request as in flight until the permit is dropped.
    pub(super) fn in_flight(mut self) -> Self {
        self.concurrent = true;
        self
    }

    /// Marks the attempt as sent.
    pub fn spend(&mut self) {
        if self.stage != PermitStage::Held {
            return;
        }
        self.stage = PermitStage::Spent;
        self.account.count_sent();
        if self.counted.is_none() && self.account.count_unwritten() {
            // `None`: the thread has ended, and the attempt is not written any more.
            self.client.push_behind(|messages| messages.unwritten = true);
        }
    }

    /// True if the permit is too old to be spent, because limits apply to the moment at which a request is sent.
    pub fn is_stale(&self, clock: &Clock) -> bool {
        let Some(counted) = self.counted.filter(|_| self.stage == PermitStage::Held) else { return false };
        clock.boot - counted.at >= PERMIT_AGE_MAX || !counted.days.cover(&self.limits.calendar.days(clock.wall))
    }

    /// True once the attempt has been sent.
    pub fn is_spent(&self) -> bool {
        self.stage == PermitStage::Spent
    }

    /// Takes back [`Permit::spend`]: the endpoint certainly never received the attempt, so it may be sent again with
    /// the same permit.
    pub fn never_sent(&mut self) {
        if self.stage == PermitStage::Spent && self.counted.is_some() {
            self.stage = PermitStage::Held;
            self.account.take_back_sent();
        }
    }

    /// Ends the permit, after the attempt or without one.
    pub fn end(&mut self) {
        if let Some(returned) = self.take_return() {
            // If the thread has ended, the attempt stays counted: counts may be too high, never too low.
            self.client.push(|messages| messages.returns.push(returned));
        }
    }

    /// Returns the input for a draw of another permit of the same endpoint.
    pub(super) fn wanted(&self) -> Wanted {
        let (account, limits) = (Arc::clone(&self.account), Arc::clone(&self.limits));
        Wanted { account, limits, not_before: Stamp::default() }
    }

    /// Takes out what is to be given back: the count, unless it is spent, and the place among the requests in flight.
    pub(super) fn take_return(&mut self) -> Option<Return> {
        let unsent = std::mem::replace(&mut self.stage, PermitStage::GivenBack) == PermitStage::Held;
        let counted = self.counted.take().filter(|_| unsent);
        let concurrent = std::mem::take(&mut self.concurrent);
        let returned = Return { account: Arc::clone(&self.account), counted, concurrent };
        (counted.is_some() || concurrent).then_some(returned)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.end();
    }
}
