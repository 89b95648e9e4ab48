//! Permit: the right to one attempt, which gives itself back if it is not used.

use std::sync::Arc;

use super::budgets::{BudgetHold, Spends};
use super::messages::Return;
use super::{AccountSet, Client, Wanted};
use crate::limit::{Clock, CountedAt, Counts, PERMIT_AGE_MAX, Stamp};

/// The right to one attempt, of every account of its set. A permit that is dropped before it is spent is given back, since the attempt was never
/// sent.
#[derive(Debug)]
pub struct Permit {
    accounts: Arc<AccountSet>,
    client: Client,
    /// When it was counted in the ledger; `None` without a count: the attempt needs none, or the ledger cannot be used.
    counted: Option<CountedAt>,
    /// True while the request counts as in flight.
    concurrent: bool,
    stage: PermitStage,
    /// What only few permits have.
    more: Option<Box<More>>,
}

/// What is held together with a permit.
#[derive(Debug, Default)]
struct More {
    /// That of the caller's own accounts, which was drawn with it.
    caller: Option<Permit>,
    /// Tokens that are reserved, until it is known how many the request takes.
    reserved: Option<Reservation>,
    /// What is reserved of the caller's budgets.
    budgets: Option<BudgetHold>,
}

/// Tokens that are reserved of some accounts. They are free again once this is dropped, and what was taken in their place has been
/// counted.
#[derive(Debug)]
pub struct Reservation {
    accounts: Arc<AccountSet>,
    client: Client,
    counted: CountedAt,
    tokens: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let counted = Some((self.counted, Counts { attempts: 0, tokens: self.tokens }));
        let returned = Return { accounts: Arc::clone(&self.accounts), counted, concurrent: false };
        // If the thread has ended, they stay reserved: counts may be too high, never too low.
        self.client.push_behind(|messages| messages.returns.push(returned));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PermitStage {
    Held,
    Spent,
    GivenBack,
}

impl Permit {
    pub(super) fn new(client: &Client, accounts: &Arc<AccountSet>, counted: Option<CountedAt>) -> Self {
        Self {
            accounts: Arc::clone(accounts),
            client: client.clone(),
            counted,
            concurrent: false,
            stage: PermitStage::Held,
            more: None,
        }
    }

    /// A permit that was granted, and what it takes for these accounts.
    pub(super) fn granted(client: &Client, accounts: &Arc<AccountSet>, counted: Option<CountedAt>) -> Self {
        let permit = Self::new(client, accounts, counted.filter(|_| accounts.in_ledger()));
        if accounts.is_concurrency_limited() { permit.in_flight() } else { permit }
    }

    /// The same, with these tokens reserved.
    pub(super) fn with_reserved(mut self, reserved: Option<(CountedAt, u64)>) -> Self {
        let reserved = reserved.filter(|(_, tokens)| *tokens > 0 && self.accounts.in_ledger());
        if let Some((counted, tokens)) = reserved {
            let (accounts, client) = (Arc::clone(&self.accounts), self.client.clone());
            self.more.get_or_insert_default().reserved = Some(Reservation { accounts, client, counted, tokens });
        }
        self
    }

    pub(super) fn set_caller(&mut self, caller: Self) {
        self.more.get_or_insert_default().caller = Some(caller);
    }

    /// Takes out the permit of the caller's own accounts, which holds for the whole request.
    pub fn take_caller(&mut self) -> Option<Self> {
        self.more.as_mut()?.caller.take()
    }

    pub(super) fn set_budgets(&mut self, hold: BudgetHold) {
        self.more.get_or_insert_default().budgets = Some(hold);
    }

    /// Takes out what is reserved of the caller's budgets for the attempt.
    pub fn take_budgets(&mut self) -> Option<BudgetHold> {
        self.more.as_mut()?.budgets.take()
    }

    /// Takes out the tokens that are reserved.
    pub fn take_reservation(&mut self) -> Option<Reservation> {
        self.more.as_mut()?.reserved.take()
    }

    /// Counts the request as in flight until the permit is dropped.
    pub(super) fn in_flight(mut self) -> Self {
        self.concurrent = true;
        self
    }

    /// Its request stays in flight, though it got no permit in place of this one.
    pub(super) fn stays_in_flight(&mut self) {
        self.concurrent = true;
    }

    /// Returns the accounts that the attempt counts in.
    pub fn accounts(&self) -> &Arc<AccountSet> {
        &self.accounts
    }

    /// Marks the attempt as sent.
    pub fn spend(&mut self) {
        if self.stage != PermitStage::Held {
            return;
        }
        self.stage = PermitStage::Spent;
        if self.accounts.count_sent(self.counted.is_none()) {
            // `None`: the thread has ended, and the attempt is not written any more.
            self.client.push_behind(|messages| messages.unwritten = true);
        }
    }

    /// True if the permit is too old to be spent, because limits apply to the moment at which a request is sent.
    pub fn is_stale(&self, clock: &Clock) -> bool {
        let Some(counted) = self.counted.filter(|_| self.stage == PermitStage::Held) else { return false };
        clock.boot - counted.boot >= PERMIT_AGE_MAX || !self.accounts.days_last(counted, clock)
    }

    /// True once the attempt has been sent.
    pub fn is_spent(&self) -> bool {
        self.stage == PermitStage::Spent
    }

    /// True while it is there to be spent.
    pub fn is_unspent(&self) -> bool {
        self.stage == PermitStage::Held
    }

    /// Takes back [`Permit::spend`]: the endpoint certainly never received the attempt, so it may be sent again with
    /// the same permit.
    pub fn never_sent(&mut self) {
        if self.stage == PermitStage::Spent && self.counted.is_some() {
            self.stage = PermitStage::Held;
            self.accounts.take_back_sent();
        }
    }

    /// Ends the permit, after the attempt or without one.
    pub fn end(&mut self) {
        if let Some(returned) = self.take_return() {
            // If the thread has ended, the attempt stays counted: counts may be too high, never too low.
            self.client.push(|messages| messages.returns.push(returned));
        }
    }

    /// Returns the input for a draw of another permit of the same accounts.
    pub(super) fn wanted(&self) -> Wanted {
        Wanted { accounts: Arc::clone(&self.accounts), not_before: Stamp::default(), spends: Spends::default() }
    }

    /// Takes out what is to be given back: the count, unless it is spent, and the place among the requests in flight.
    pub(super) fn take_return(&mut self) -> Option<Return> {
        let unsent = std::mem::replace(&mut self.stage, PermitStage::GivenBack) == PermitStage::Held;
        let one = Counts { attempts: 1, tokens: 0 };
        let counted = self.counted.take().filter(|_| unsent).map(|counted| (counted, one));
        let concurrent = std::mem::take(&mut self.concurrent);
        (counted.is_some() || concurrent).then(|| Return { accounts: Arc::clone(&self.accounts), counted, concurrent })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.end();
    }
}
