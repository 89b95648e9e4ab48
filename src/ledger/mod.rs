//! Every count on disk: permits and tokens.
//!
//! The ledger is the only authority. A permit is drawn from it before the attempt is sent, so a process that is killed
//! leaves no attempt uncounted, and all processes that share a ledger share the limits exactly. All draws that wait at
//! one moment are served in one batch, so that many requests cost one commit.
//!
//! ```text
//! request ── Client::draw ──► inbox ──► thread: Allocator ── begin, read, add, commit ──► Ledger (SQLite)
//!    ▲                                    │
//!    └────────── Permit ◄─────────────────┘          spent: nothing more to do
//!                  └── dropped unspent: given back, through the inbox
//! ```
//!
//! | module | owns |
//! |---|---|
//! | `account` | what limits belong to, and its counts as this process knows them |
//! | `account_set` | the accounts that one attempt counts in, all or none |
//! | [`budgets`] | what a request may take of its caller's budgets, reserved and settled |
//! | `client` | the handle to the ledger's thread |
//! | `messages` | the messages to that thread and its replies |
//! | [`notices`] | what processes say to each other |
//! | `permit` | the right to one attempt, which gives itself back if it is not used |
//! | `prefetch` | permits drawn ahead of their requests |
//! | `allocator` | the order in which draws are served; pure except for the ledger and the clocks that it is given |
//! | `batch` | the decision which draws of a batch are granted, in one transaction |
//! | [`claims`] | what the draws of a batch take, and what the ledger has granted of it |
//! | [`places`] | where objects and sessions are |
//! | `write_behind` | changes that are written a little later |
//! | `thread` | the allocator's thread, its errors, and checkpoints |
//! | [`sqlite`] | the ledger on one machine, a SQLite file |
//! | [`redis`] | the ledger of many machines, a Redis or Valkey server |
//! | [`stats`] | token statistics |

mod account;
mod account_set;
mod allocator;
mod batch;
pub mod budgets;
pub mod claims;
mod client;
mod messages;
pub mod notices;
mod permit;
pub mod places;
mod prefetch;
pub mod redis;
pub mod sqlite;
pub mod stats;
mod thread;
mod write_behind;

use std::fmt;
use std::sync::Arc;

use jiff::civil::Date;

use budgets::{BudgetKind, BudgetRows};
use claims::{Claims, Verdict};
use notices::Notice;
use places::{Place, PlaceChange, Thing, ThingKind};

use crate::limit::{Counts, Days, Slot, Unknown};

pub use account::{Account, AccountId};
pub use account_set::{AccountSet, LimitedAccount};
pub use allocator::{Allocator, Tally, Used};
pub use client::{Client, QueuePlace};
pub use messages::{CallerDraw, CallerId, Drawn, HeldEndpoint, Otherwise, OwnDraw, QueuedBy, Refusal, Wanted};
pub use permit::{Permit, Reservation};
pub use stats::Spent;
pub use thread::{Keeper, LedgerState};

/// Interface between the allocator and a ledger. What is written in a batch is written as one, with `commit`.
pub trait Ledger: BudgetRows {
    /// Begins a batch. Returns the generation: a number that differs from the last one if another process may have written
    /// since the last batch.
    fn begin(&mut self) -> Result<u64, LedgerError>;
    /// True if no other process writes between `begin` and `commit`, so that what is decided by the counts of a batch holds. Where
    /// others do, counts that were read earlier are good enough to propose what is drawn: `commit` has the last word.
    fn is_exclusive(&self) -> bool;
    /// Generation since which counts that were read are good enough to propose what is drawn, where several write at once.
    fn trusted_since(&self) -> u64;
    /// Reads these rows in one step, if each would take a journey of its own.
    fn fetch(&mut self, rows: &Rows) -> Result<(), LedgerError>;
    /// Returns the counts of an account from a slot on, in any order.
    fn minute(&mut self, account: &AccountId, oldest: Slot) -> Result<Vec<(Slot, Counts)>, LedgerError>;
    /// Returns the counts of an account on a day.
    fn day(&mut self, account: &AccountId, date: Date) -> Result<Counts, LedgerError>;
    /// Returns how many requests of an account other processes have in flight, if the ledger counts those.
    fn others_in_flight(&mut self, account: &AccountId) -> Result<u64, LedgerError>;
    /// Sets how many requests of an account this process has in flight, without those that this batch claims.
    fn set_in_flight(&mut self, account: &AccountId, own: u64) -> Result<(), LedgerError>;
    /// Adds a change, which may be negative, to the counts of a slot and of each of the days.
    fn add(&mut self, account: &AccountId, slot: Slot, days: Days, change: Change) -> Result<(), LedgerError>;
    /// Adds to the token statistics.
    fn add_tokens(&mut self, spent: &Spent) -> Result<(), LedgerError>;
    /// Deletes the token statistics of one endpoint, or of all if `None`.
    fn reset_tokens(&mut self, endpoint: Option<&str>) -> Result<(), LedgerError>;
    /// Deletes the slots of an account that are older than `oldest`.
    fn forget(&mut self, account: &AccountId, oldest: Slot) -> Result<(), LedgerError>;
    /// Deletes the hours and days of the token statistics that begin at or before these seconds of Unix time.
    fn forget_tokens(&mut self, hours: i64, days: i64) -> Result<(), LedgerError>;
    /// Deletes the counts of an account on days before this one, but for its three newest: the clock may be wrong.
    fn forget_days(&mut self, account: &AccountId, before: Date) -> Result<(), LedgerError>;
    /// Returns the accounts of models that have counts, the newest first; a thousand at most.
    fn accounts_of_models(&mut self) -> Result<Vec<AccountId>, LedgerError>;
    /// Returns the places of each of these things, of all owners, that are not forgotten at this second of Unix time.
    fn places(&mut self, things: &[Thing], now: i64) -> Result<Vec<Vec<Place>>, LedgerError>;
    /// Writes a change of places.
    fn change_place(&mut self, change: &PlaceChange) -> Result<(), LedgerError>;
    /// Deletes some places that are over at this second of Unix time; with `surplus` also some of a kind that has more than
    /// [`places::PLACES_MAX`]. True if it still has more.
    fn forget_places(&mut self, kind: ThingKind, now: i64, surplus: bool) -> Result<bool, LedgerError>;
    /// Keeps the list of models of an endpoint.
    fn keep_models(&mut self, endpoint: &str, list: &str) -> Result<(), LedgerError>;
    /// Returns the lists of models that are kept, by endpoint.
    fn model_lists(&mut self) -> Result<Vec<ModelList>, LedgerError>;
    /// Commits the batch, with as much of its claims as there is room for. The rows are read with it; so are those of claims that are not
    /// granted whole. They are the counts of the next round of this batch.
    fn commit(&mut self, claims: &Claims, rows: &Rows) -> Result<Verdict, LedgerError>;
    /// Says something to the other processes that share the ledger.
    fn tell(&mut self, notice: &Notice) -> Result<(), LedgerError>;
    /// Takes out what others have said since.
    fn take_heard(&mut self) -> Vec<Notice>;
    /// Hears of the others, though there is nothing to do.
    fn touch(&mut self) -> Result<(), LedgerError>;
    /// Rolls the batch back.
    fn roll_back(&mut self);
    /// Returns the moments until which counts may be incomplete.
    fn unknown(&self) -> Unknown;
}

/// Rows that are read together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// Accounts, each with the days that are looked at.
    pub accounts: Vec<(AccountId, Days)>,
    /// Budgets, by the key's name.
    pub budgets: Vec<(Arc<str>, BudgetKind)>,
}

impl Rows {
    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.accounts.is_empty() && self.budgets.is_empty()
    }
}

/// The list of models of an endpoint: its id, and the list as it answered.
pub type ModelList = (Arc<str>, Arc<str>);

/// A change of counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Attempts; negative if they are given back.
    pub attempts: i64,
    /// Tokens.
    pub tokens: i64,
}

impl Change {
    /// True if the change is zero.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Adds another change.
    pub fn merge(&mut self, other: Self) {
        self.attempts = self.attempts.saturating_add(other.attempts);
        self.tokens = self.tokens.saturating_add(other.tokens);
    }
}

/// Kind of a ledger error. It decides how the error is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Another program holds the lock. The next attempt may succeed.
    Locked,
    /// The ledger cannot be written or read: disk full, read-only, or missing.
    Unusable,
    /// The content of the file cannot be trusted.
    Corrupt,
    /// Nothing was heard of the batch. No draw of it is granted; what else it writes is kept by the ledger until it is written.
    Unanswered,
}

/// An error of the ledger.
#[derive(Clone, Debug)]
pub struct LedgerError {
    /// Kind.
    pub kind: FaultKind,
    /// Message, with a way to fix the error if there is one.
    pub message: String,
}

impl fmt::Display for LedgerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for LedgerError {}
