//! Every count on disk: permits and tokens.
//!
//! The ledger is the only authority. A permit is drawn from it before the attempt is sent, so a process that is killed leaves
//! nothing uncounted, and all processes that share a ledger share the limits exactly. All who wait at one moment are served
//! in one batch, so that many requests cost one commit.
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
//! | `account` | what a process knows of one endpoint's counts |
//! | `client` | the way to the ledger's thread |
//! | `messages` | what goes that way, and what comes back |
//! | `permit` | the right to one attempt, which gives itself back |
//! | `prefetch` | permits drawn ahead of their requests |
//! | `allocator` | who is served when, and in which order; pure but for the ledger it is given |
//! | `batch` | which draws of a batch are granted, in one transaction |
//! | `write_behind` | what is written a little later |
//! | `thread` | the allocator's thread, its faults, and checkpoints |
//! | [`sqlite`] | the ledger on one machine |
//! | [`stats`] | token statistics |

mod account;
mod allocator;
mod batch;
mod client;
mod messages;
mod permit;
mod prefetch;
pub mod sqlite;
pub mod stats;
mod thread;
mod write_behind;

use std::fmt;

use jiff::civil::Date;

use crate::limit::{Counts, Days, Slot, Stamp};

pub use account::Account;
pub use allocator::{Allocator, Tally, Used};
pub use client::{Client, QueuePlace};
pub use messages::{Drawn, Otherwise, Refusal, Wanted};
pub use permit::Permit;
pub use stats::Spent;
pub use thread::{Keeper, LedgerState};

/// Interface between the allocator and a ledger. A batch is one transaction: no other process writes between `begin`
/// and `commit`.
pub trait Ledger {
    /// Begins a batch. The number is another one whenever anybody else has written since the last batch.
    fn begin(&mut self) -> Result<u64, LedgerError>;
    /// Returns the counts of an endpoint from a slot on, in any order.
    fn minute(&mut self, endpoint: &str, oldest: Slot) -> Result<Vec<(Slot, Counts)>, LedgerError>;
    /// Returns the counts of an endpoint on a day.
    fn day(&mut self, endpoint: &str, date: Date) -> Result<Counts, LedgerError>;
    /// Adds to what was counted in a slot and in each of the days, or takes back.
    fn add(&mut self, endpoint: &str, slot: Slot, days: Days, change: Change) -> Result<(), LedgerError>;
    /// Adds to the token statistics.
    fn add_tokens(&mut self, spent: &Spent) -> Result<(), LedgerError>;
    /// Forgets the token statistics of an endpoint, or of all.
    fn reset_tokens(&mut self, endpoint: Option<&str>) -> Result<(), LedgerError>;
    /// Forgets the slots of an endpoint that no longer count.
    fn forget(&mut self, endpoint: &str, oldest: Slot) -> Result<(), LedgerError>;
    /// Forgets hours and days of the token statistics that begin at these seconds of Unix time or before.
    fn forget_tokens(&mut self, hours: i64, days: i64) -> Result<(), LedgerError>;
    /// Ends the batch: all of it counts from here on.
    fn commit(&mut self) -> Result<(), LedgerError>;
    /// Ends the batch: nothing of it counts.
    fn roll_back(&mut self);
    /// Until then the counts of the minute may be incomplete.
    fn unknown_until(&self) -> Stamp;
}

/// A change of what was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Attempts.
    pub attempts: i64,
    /// Tokens.
    pub tokens: i64,
}

impl Change {
    /// True if nothing changes.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Adds another change to it.
    pub fn merge(&mut self, other: Self) {
        self.attempts = self.attempts.saturating_add(other.attempts);
        self.tokens = self.tokens.saturating_add(other.tokens);
    }
}

/// Kind of an error of the ledger, which decides what is done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Another program holds it; it may be free the next time.
    Locked,
    /// It cannot be written or read: disk full, read-only, gone.
    Unusable,
    /// The content of the file cannot be trusted.
    Corrupt,
}

/// A fault of the ledger.
#[derive(Clone, Debug)]
pub struct LedgerError {
    /// Kind.
    pub kind: FaultKind,
    /// Message, with the way out if there is one.
    pub message: String,
}

impl fmt::Display for LedgerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for LedgerError {}
