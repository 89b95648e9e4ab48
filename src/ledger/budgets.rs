//! Budgets of callers' keys: what a request may cost is reserved before each attempt, and settled after it at what it did cost.
//!
//! A reservation is a row with its owner. If that process dies, another one settles it at what was known of it: neither a leak,
//! by which a budget would fill with what was never spent, nor a gap.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use jiff::Timestamp;

use super::{Client, LedgerError};
use crate::config::{Budget, BudgetPeriod, BudgetUnit};
use crate::limit::{Period, Stamp};
use crate::usage::prices::NanoUsd;

/// An amount in each unit of budgets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Tokens.
    pub tokens: u64,
    /// 1e-9 US dollars.
    pub nano_usd: u64,
}

impl Amount {
    /// The amount in a unit.
    pub fn of(&self, unit: BudgetUnit) -> u64 {
        match unit {
            BudgetUnit::NanoUsd => self.nano_usd,
            BudgetUnit::Tokens => self.tokens,
        }
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            tokens: self.tokens.saturating_add(other.tokens),
            nano_usd: self.nano_usd.saturating_add(other.nano_usd),
        }
    }
}

/// What an attempt may take of its caller's budgets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spends {
    /// The most that it can take, as far as that can be foreseen.
    pub reserved: Amount,
    /// What it takes at least, once it has been sent.
    pub known: Amount,
}

/// Unit and period of a budget, by which what was spent is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BudgetKind {
    /// Unit.
    pub unit: BudgetUnit,
    /// Period.
    pub period: BudgetPeriod,
}

impl BudgetKind {
    /// An amount as people write it.
    pub fn amount(self, number: u64) -> String {
        match self.unit {
            BudgetUnit::NanoUsd => format!("${}", NanoUsd(number)),
            BudgetUnit::Tokens => format!("{number} tokens"),
        }
    }

    /// The kind of a text that [`fmt::Display`] has written.
    pub fn parse(text: &str) -> Option<Self> {
        let (unit, period) = text.split_once('/')?;
        let unit = match unit {
            "usd" => BudgetUnit::NanoUsd,
            "tokens" => BudgetUnit::Tokens,
            _ => return None,
        };
        Some(Self { unit, period: BudgetPeriod::named(period)? })
    }
}

impl fmt::Display for BudgetKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.unit {
            BudgetUnit::NanoUsd => "usd",
            BudgetUnit::Tokens => "tokens",
        };
        write!(f, "{unit}/{}", self.period.word())
    }
}

/// The budgets of a key, as its entry has them.
#[derive(Debug)]
pub struct BudgetSet {
    /// The key's name.
    pub key: Arc<str>,
    /// Its budgets.
    pub budgets: Vec<Budget>,
}

impl BudgetSet {
    /// True if one of them is in dollars, so that what has no price cannot be asked for.
    pub fn counts_money(&self) -> bool {
        self.budgets.iter().any(|budget| budget.unit == BudgetUnit::NanoUsd)
    }
}

/// Methods for what is kept of a budget.
pub trait BudgetTerms {
    /// Unit and period.
    fn kind(&self) -> BudgetKind;
    /// How much of it there is at this moment, raises included.
    fn limit_at(&self, wall: SystemTime) -> u64;
}

impl BudgetTerms for Budget {
    fn kind(&self) -> BudgetKind {
        BudgetKind { unit: self.unit, period: self.period }
    }

    fn limit_at(&self, wall: SystemTime) -> u64 {
        let now = Timestamp::try_from(wall).unwrap_or_default();
        let raises = self.raises.iter().filter(|raise| now < raise.until);
        raises.fold(self.limit, |limit, raise| limit.saturating_add(raise.by))
    }
}

/// What was spent of a budget in a period, and what is reserved of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Spent.
    pub spent: u64,
    /// Reserved.
    pub reserved: u64,
}

impl Totals {
    /// Both together.
    pub fn taken(&self) -> u64 {
        self.spent.saturating_add(self.reserved)
    }
}

/// State of a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetView {
    /// Unit and period.
    pub kind: BudgetKind,
    /// How much of it there is.
    pub limit: u64,
    /// What is taken of it.
    pub totals: Totals,
    /// When its period ends; none for all time.
    pub ends: Option<SystemTime>,
}

/// A budget that has no room for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldBudget {
    /// The key's name.
    pub key: Arc<str>,
    /// The budget.
    pub view: BudgetView,
    /// What the request could take, in the budget's unit.
    pub wanted: u64,
}

/// The part of a reservation that is of one budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReservationRow {
    /// The key's name.
    pub key: Arc<str>,
    /// Unit and period of the budget.
    pub kind: BudgetKind,
    /// Period that it was made in.
    pub period: Period,
    /// What is reserved.
    pub amount: u64,
    /// What it comes to if its owner dies.
    pub known: u64,
}

/// Rows of budgets in a ledger, read and written as parts of a batch.
pub trait BudgetRows {
    /// Returns what is taken of a budget in a period.
    fn budget(&mut self, key: &str, kind: BudgetKind, period: i64) -> Result<Totals, LedgerError>;
    /// Returns the latest period of a budget that anything was taken in. One that begins after `now` does not count: the clock was ahead.
    fn latest_period(&mut self, key: &str, kind: BudgetKind, now: i64) -> Result<Option<i64>, LedgerError>;
    /// Changes what is spent and reserved of a budget.
    fn change_budget(&mut self, row: &ReservationRow, spent: i64, reserved: i64) -> Result<(), LedgerError>;
    /// Writes a part of a new reservation.
    fn put_reservation(&mut self, owner: i64, id: i64, row: &ReservationRow) -> Result<(), LedgerError>;
    /// Writes a part of a reservation in the place of what it was. Returns false if it is gone, since another process took its owner for
    /// dead and has settled it.
    fn grow_reservation(&mut self, owner: i64, id: i64, row: &ReservationRow) -> Result<bool, LedgerError>;
    /// Deletes a part of a reservation, and counts what is spent in its place; or what is spent beyond that if it is gone, since another
    /// process has settled it. Returns false if it is known to be gone.
    fn settle_reservation(
        &mut self,
        owner: i64,
        id: i64,
        row: &ReservationRow,
        spent: SpentInstead,
    ) -> Result<bool, LedgerError>;
    /// Notes that the owner of reservations is alive.
    fn hear(&mut self, owner: i64, now: Stamp) -> Result<(), LedgerError>;
    /// True if there are reservations of others than this owner.
    fn has_others_reservations(&mut self, owner: i64) -> Result<bool, LedgerError>;
    /// Returns the parts of reservations whose owners, others than this one, were not heard of since.
    fn dead_reservations(&mut self, owner: i64, since: Stamp) -> Result<Vec<OthersReservation>, LedgerError>;
    /// Lets each budget have reserved what its reservations come to. Returns how many had something else.
    fn reconcile_budgets(&mut self) -> Result<usize, LedgerError>;
    /// Forgets owners that were not heard of since and have no reservations, and budgets of periods that are over for long.
    fn forget_budgets(&mut self, since: Stamp, now: i64) -> Result<(), LedgerError>;
}

/// What is spent in the place of a part of a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpentInstead {
    /// If the part is there.
    pub of_it: i64,
    /// If it is gone.
    pub if_gone: i64,
}

/// A part of another process's reservation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OthersReservation {
    /// The process.
    pub owner: i64,
    /// Its number of the reservation.
    pub id: i64,
    /// The part.
    pub row: ReservationRow,
}

/// A reservation of one attempt. It is settled once what that took is known. One that is dropped before is settled at what is known by
/// then: nothing if it was never sent.
#[derive(Debug)]
pub struct BudgetHold {
    client: Client,
    id: u64,
    set: Arc<BudgetSet>,
    spends: Spends,
    is_sent: bool,
    overrun: Arc<AtomicBool>,
}

/// What an attempt took of the budgets that it had reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Settled {
    pub(super) id: u64,
    pub(super) amount: Amount,
}

/// What was taken of budgets without a reservation.
#[derive(Debug)]
pub(super) struct Unreserved {
    pub(super) set: Arc<BudgetSet>,
    pub(super) amount: Amount,
}

/// More that an attempt takes than it had reserved.
#[derive(Debug)]
pub(super) struct Extend {
    pub(super) id: u64,
    pub(super) set: Arc<BudgetSet>,
    pub(super) more: Amount,
    pub(super) known: Amount,
    /// Set if a budget has no room for it.
    pub(super) overrun: Arc<AtomicBool>,
}

impl BudgetHold {
    pub(super) fn new(client: &Client, id: u64, set: Arc<BudgetSet>, spends: Spends) -> Self {
        Self { client: client.clone(), id, set, spends, is_sent: false, overrun: Arc::default() }
    }

    /// Notes that the attempt has been sent, or certainly was not received.
    pub fn set_sent(&mut self, is_sent: bool) {
        self.is_sent = is_sent;
    }

    /// What is reserved.
    pub fn reserved(&self) -> Amount {
        self.spends.reserved
    }

    /// Notes what the attempt has taken so far, and reserves more, in whole steps, once it has taken what was reserved.
    pub fn progress(&mut self, known: Amount, step: Amount) {
        self.spends.known = known;
        let reserved = self.spends.reserved;
        let steps = |known: u64, reserved: u64, step: u64| known.saturating_sub(reserved).div_ceil(step.max(1));
        let steps = steps(known.tokens, reserved.tokens, step.tokens).max(steps(
            known.nano_usd,
            reserved.nano_usd,
            step.nano_usd,
        ));
        if steps == 0 {
            return;
        }
        let more = Amount { tokens: step.tokens.saturating_mul(steps), nano_usd: step.nano_usd.saturating_mul(steps) };
        self.spends.reserved = self.spends.reserved.plus(more);
        let (set, overrun) = (Arc::clone(&self.set), Arc::clone(&self.overrun));
        let extend = Extend { id: self.id, set, more, known, overrun };
        // `None`: the thread has ended, and the process with it.
        self.client.push(|messages| messages.extends.push(extend));
    }

    /// True if a budget had no room for what it took beyond what was reserved.
    pub fn has_overrun(&self) -> bool {
        self.overrun.load(Ordering::Relaxed)
    }

    /// Settles it at what the attempt took.
    pub fn settle(mut self, amount: Amount) {
        self.spends.known = amount;
        self.is_sent = true;
    }

    /// Settles it at nothing: the attempt is not billed.
    pub fn release(self) {
        self.settle(Amount::default());
    }
}

impl Drop for BudgetHold {
    fn drop(&mut self) {
        let amount = if self.is_sent { self.spends.known } else { Amount::default() };
        let settled = Settled { id: self.id, amount };
        // If the thread has ended, the row stays, and another process settles it.
        self.client.push_behind(|messages| messages.settled.push(settled));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_read_as_they_are_written() {
        for text in ["usd/day", "tokens/5h", "usd/total", "tokens/month"] {
            assert_eq!(BudgetKind::parse(text).unwrap().to_string(), text);
        }
        for text in ["", "usd", "eur/day", "usd/year"] {
            assert_eq!(BudgetKind::parse(text), None, "{text}");
        }
    }
}
