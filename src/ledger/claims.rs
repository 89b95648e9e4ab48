//! Claims: what the draws of a batch take, and the limits that it must fit in.
//!
//! A ledger that nobody else writes during a batch grants every claim, since its counts were read a moment ago. One that several
//! machines write at once checks each claim itself, and may grant a part of it.

use std::sync::Arc;

use super::budgets::ReservationRow;
use super::{Account, AccountSet, Change, Ledger, LedgerError, LimitedAccount};
use crate::limit::{CountedAt, Slot, Stamp};

/// What one batch claims.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    /// Distinguishes this process's reservations from all others'.
    pub owner: i64,
    /// Claims of draws.
    pub draws: Vec<Claim>,
    /// Reservations that are to grow.
    pub growths: Vec<Growth>,
}

/// What draws of one kind take. Their accounts get all of it, or none.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The endpoint's accounts, if the ledger counts them.
    pub endpoint: Option<Arc<AccountSet>>,
    /// The caller's own accounts, if the ledger counts them.
    pub caller: Option<Arc<AccountSet>>,
    /// When they are counted.
    pub counted: CountedAt,
    /// Number of draws; a ledger may grant the first ones only.
    pub draws: u64,
    /// Tokens that each of them reserves of the caller's accounts.
    pub tokens: u64,
    /// Permits that are prefetched with them.
    pub ahead: Ahead,
    /// What its one draw reserves of budgets.
    pub reservation: Option<NewReservation>,
}

/// Permits that were prefetched together with one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ahead {
    /// Of the endpoint's accounts.
    pub endpoint: u64,
    /// Of the caller's.
    pub caller: u64,
}

/// A reservation that is made.
#[derive(Clone, Debug)]
pub struct NewReservation {
    /// Its number.
    pub id: i64,
    /// Its parts.
    pub parts: Vec<LimitedPart>,
}

/// A part of a reservation, and how much there is of its budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitedPart {
    /// The part.
    pub row: ReservationRow,
    /// What is added to what the budget has reserved.
    pub more: u64,
    /// How much of the budget there is.
    pub limit: u64,
}

/// A reservation that grows by the whole of what its parts add, or stays as large as it is. What is known of it is noted in any case.
#[derive(Clone, Debug)]
pub struct Growth {
    /// Its number.
    pub id: i64,
    /// Its parts, as they are to be.
    pub parts: Vec<LimitedPart>,
}

/// What a ledger has granted of the claims of a batch.
#[derive(Debug, Default)]
pub struct Verdict {
    /// When it has counted them, and in which slot, if those are not the ones that were claimed.
    pub counted: Option<(Stamp, Slot)>,
    /// What it has granted of each claim; `None` if all.
    pub draws: Option<Vec<Part>>,
    /// What came of each growth.
    pub growths: Vec<Grown>,
}

/// The part of a claim that was granted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Draws.
    pub draws: u64,
    /// Prefetched permits.
    pub ahead: Ahead,
}

/// What came of a growth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grown {
    /// The budgets had room for it.
    Done,
    /// A budget had no room for it.
    NoRoom,
    /// Another process took its owner for dead, and has settled it.
    Gone,
}

impl Part {
    /// Takes one draw out of it, with as much of what it has prefetched as there is. False if none is left.
    pub(super) fn take(&mut self, ahead: &mut Ahead) -> bool {
        if self.draws == 0 {
            return false;
        }
        self.draws -= 1;
        ahead.endpoint = ahead.endpoint.min(self.ahead.endpoint);
        ahead.caller = ahead.caller.min(self.ahead.caller);
        self.ahead.endpoint -= ahead.endpoint;
        self.ahead.caller -= ahead.caller;
        true
    }
}

impl Claim {
    /// Returns its accounts, each with what it counts for them: attempts, and tokens.
    pub fn changes(&self) -> impl Iterator<Item = (&LimitedAccount, Change)> {
        self.changes_of(Part { draws: self.draws, ahead: self.ahead })
    }

    /// Returns the number of its draws that are of an account.
    pub fn draws_of(&self, account: &Account) -> u64 {
        let is_of = self.changes().filter(|(of, _)| std::ptr::eq(Arc::as_ptr(&of.account), account)).count();
        self.draws.saturating_mul(u64::try_from(is_of).unwrap_or(u64::MAX))
    }

    /// The same as [`Claim::changes`] for a part of it.
    pub fn changes_of(&self, part: Part) -> impl Iterator<Item = (&LimitedAccount, Change)> {
        let attempts = |ahead| signed(part.draws.saturating_add(ahead));
        let of_endpoint = Change { attempts: attempts(part.ahead.endpoint), tokens: 0 };
        let tokens = signed(self.tokens.saturating_mul(part.draws));
        let of_caller = Change { attempts: attempts(part.ahead.caller), tokens };
        let [endpoint, caller] =
            [&self.endpoint, &self.caller].map(|set| set.as_deref().map(AccountSet::accounts).unwrap_or_default());
        endpoint.iter().map(move |of| (of, of_endpoint)).chain(caller.iter().map(move |of| (of, of_caller)))
    }
}

impl Claims {
    /// True if nothing is claimed.
    pub fn is_empty(&self) -> bool {
        self.draws.is_empty() && self.growths.is_empty()
    }

    /// Writes all claims to a ledger that nobody else writes meanwhile.
    pub fn write(&self, ledger: &mut dyn Ledger) -> Result<Verdict, LedgerError> {
        for claim in &self.draws {
            for (LimitedAccount { account, limits }, change) in claim.changes() {
                let counted = limits.counted(claim.counted);
                ledger.add(account.id(), counted.slot, counted.days, change)?;
            }
            let Some(NewReservation { id, parts }) = &claim.reservation else { continue };
            for LimitedPart { row, more, .. } in parts {
                ledger.put_reservation(self.owner, *id, row)?;
                ledger.change_budget(row, 0, signed(*more))?;
            }
        }
        let growths = self.growths.iter().map(|growth| self.grow(growth, ledger)).collect::<Result<_, _>>()?;
        Ok(Verdict { growths, ..Verdict::default() })
    }

    fn grow(&self, Growth { id, parts }: &Growth, ledger: &mut dyn Ledger) -> Result<Grown, LedgerError> {
        for LimitedPart { row, .. } in parts {
            if !ledger.grow_reservation(self.owner, *id, row)? {
                return Ok(Grown::Gone);
            }
        }
        parts.iter().try_for_each(|part| ledger.change_budget(&part.row, 0, signed(part.more)))?;
        Ok(Grown::Done)
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
