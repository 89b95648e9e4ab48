//! Messages to the ledger's thread, and their replies.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::budgets::{BudgetSet, BudgetView, Extend, HeldBudget, Settled, Spends, Unreserved};
use super::notices::Notice;
use super::places::{Place, PlaceChange, Thing};
use super::{AccountId, AccountSet, LimitedAccount, ModelList, Permit, Spent};
use crate::config::LimitKind;
use crate::fault::HeldBy;
use crate::limit::{CountedAt, Counts, Held, LimitReason, Stamp, View};

/// An endpoint that can serve the request.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The accounts that the request counts in if it goes there.
    pub accounts: Arc<AccountSet>,
    /// End of the pause that the endpoint asked for (its rest).
    pub not_before: Stamp,
    /// What the request may take of its caller's budgets if it goes there.
    pub spends: Spends,
}

/// The accounts of a caller's own key, which a request counts in wherever it goes.
#[derive(Clone, Debug)]
pub struct CallerDraw {
    /// The accounts.
    pub accounts: Arc<AccountSet>,
    /// Tokens that are reserved of their limits until it is known how many it takes.
    pub tokens: u64,
}

/// What a request draws of its caller's own, wherever it goes.
#[derive(Clone, Debug, Default)]
pub struct OwnDraw {
    /// Permits of the key's limits; none if it has no limits, or has drawn them for an earlier attempt.
    pub caller: Option<CallerDraw>,
    /// The key's budgets, which every attempt draws from.
    pub budgets: Option<Arc<BudgetSet>>,
}

/// Result of a draw.
#[derive(Debug)]
pub enum Drawn {
    /// A permit of the endpoint at this position in the list.
    Granted(usize, Permit),
    /// No endpoint of the list has a permit.
    Refused(Refusal),
    /// The ledger cannot be used, and limited endpoints take no requests without it.
    Unavailable,
}

/// Refusal: no endpoint has a permit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Time until a permit becomes free that is not promised to another client.
    pub wait: Duration,
    /// Reason for each endpoint of the list.
    pub held: Vec<HeldEndpoint>,
    /// The caller's own account that is at a limit, if one is: then no endpoint was looked at.
    pub caller: Option<(AccountId, Held)>,
    /// The caller's budget that has no room for it, if that is why.
    pub budget: Option<Box<HeldBudget>>,
}

/// Why an endpoint has no permit for the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldEndpoint {
    /// Its position in the list.
    pub at: usize,
    /// The account that is at a limit; of several the one for longest. `None` if the endpoint rests.
    pub account: Option<AccountId>,
    /// Reason, and its end.
    pub held: Held,
}

impl Refusal {
    /// False if it is known that none of the endpoints has a permit until this moment.
    pub fn may_end_by(&self, end: Stamp) -> bool {
        may_end_by(&self.held, end)
    }
}

/// False if all of these last beyond this moment. Requests in flight may end at any time.
pub(super) fn may_end_by(held: &[HeldEndpoint], end: Stamp) -> bool {
    let may_end = |held: &HeldEndpoint| match held.held.by {
        LimitReason::Full(LimitKind::MaxConcurrent, _) => true,
        _ => held.held.until <= end,
    };
    held.is_empty() || held.iter().any(may_end)
}

impl HeldEndpoint {
    /// Returns it as a fault tells it. Names of the endpoint's own models are no more the client's than its id.
    pub fn held_by(&self, endpoint: Arc<str>, is_public: bool, now: Stamp) -> HeldBy {
        let models = self.account.as_ref().and_then(AccountId::models).cloned();
        HeldBy { endpoint, is_public, models, key: None, reason: self.held.by, wait: now.until(self.held.until) }
    }
}

/// A request for a permit.
#[derive(Debug)]
pub(super) struct Draw {
    pub(super) ticket: u64,
    pub(super) wanted: Vec<Wanted>,
    /// What is drawn together with it, or not at all.
    pub(super) caller: Option<CallerDraw>,
    /// Budgets that what it may take is reserved of.
    pub(super) budgets: Option<Arc<BudgetSet>>,
    pub(super) otherwise: Otherwise,
    /// The permit that is given back for the new one.
    pub(super) instead_of: Option<Return>,
    /// True if its request was in flight until it was drawn, and stays so if it is refused.
    pub(super) keeps_place: bool,
    pub(super) reply: oneshot::Sender<Drawn>,
}

/// A caller: its address, as long as nothing else distinguishes callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallerId(pub u64);

/// Reaction if no endpoint of the list has a permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Otherwise {
    /// The request has other candidates to try.
    LookElsewhere,
    /// The request is refused, and the reply names this caller a time to come back.
    Refuse(CallerId),
    /// The request waits in the queue.
    Wait {
        /// Until this moment; then it looks again who is open.
        until: Stamp,
        /// End of its time in the queue. If it is known that nothing can be free by then, the request is not kept waiting.
        end: Stamp,
        /// Who waits.
        by: QueuedBy,
    },
}

impl Otherwise {
    /// Who waits, if the request does.
    pub(super) fn queued_by(&self) -> QueuedBy {
        match self {
            Self::Wait { by, .. } => *by,
            Self::LookElsewhere | Self::Refuse(_) => QueuedBy::default(),
        }
    }
}

/// Who waits in the queue, where callers take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuedBy {
    /// Number of the caller that has a key of its own; 0 for all others.
    pub caller: u64,
    /// Turns that it has for each one of a caller of weight 1.
    pub weight: u32,
}

impl Default for QueuedBy {
    fn default() -> Self {
        Self { caller: 0, weight: 1 }
    }
}

/// An attempt that has ended, a permit that was never used, or tokens that were reserved.
#[derive(Debug)]
pub(super) struct Return {
    pub(super) accounts: Arc<AccountSet>,
    /// What was counted, and when, if it is to be taken back; `None` if the attempt was sent or needed no count.
    pub(super) counted: Option<(CountedAt, Counts)>,
    /// True if the request was counted as in flight.
    pub(super) concurrent: bool,
}

/// Tokens that an answer has spent.
#[derive(Debug)]
pub(super) struct Bill {
    pub(super) accounts: Arc<AccountSet>,
    /// The caller's own accounts, if there are any.
    pub(super) caller: Option<Arc<AccountSet>>,
    pub(super) spent: Spent,
}

/// A question for the current counts of accounts.
#[derive(Debug)]
pub(super) struct Look {
    pub(super) accounts: Vec<LimitedAccount>,
    pub(super) reply: oneshot::Sender<Vec<View>>,
}

/// A question for the state of budgets.
#[derive(Debug)]
pub(super) struct BudgetLook {
    pub(super) set: Arc<BudgetSet>,
    /// What is found.
    pub(super) found: Vec<BudgetView>,
    /// None if the ledger cannot be read.
    pub(super) reply: oneshot::Sender<Option<Vec<BudgetView>>>,
}

/// A question for the places of things.
#[derive(Debug)]
pub(super) struct Find {
    pub(super) things: Vec<Thing>,
    /// The places of each, once they have been read.
    pub(super) found: Vec<Vec<Place>>,
    /// None if the ledger cannot be read.
    pub(super) reply: oneshot::Sender<Option<Vec<Vec<Place>>>>,
}

/// A request to delete the token statistics of one endpoint, or of all if `None`.
#[derive(Debug)]
pub(super) struct Reset {
    pub(super) endpoint: Option<Arc<str>>,
    pub(super) reply: oneshot::Sender<bool>,
}

/// An account with the limits of a config.
#[derive(Debug)]
pub(super) struct Listed {
    /// The config's number, from [`Client::next_config`](super::Client::next_config).
    pub(super) config: u64,
    pub(super) of: LimitedAccount,
}

/// Everything that waits for the ledger's thread.
#[derive(Debug, Default)]
pub(super) struct Messages {
    pub(super) draws: Vec<Draw>,
    pub(super) returns: Vec<Return>,
    pub(super) bills: Vec<Bill>,
    pub(super) looks: Vec<Look>,
    pub(super) resets: Vec<Reset>,
    pub(super) finds: Vec<Find>,
    pub(super) budget_looks: Vec<BudgetLook>,
    /// Reservations that grow.
    pub(super) extends: Vec<Extend>,
    /// What was taken of budgets without a reservation.
    pub(super) unreserved: Vec<Unreserved>,
    /// Reservations that are over.
    pub(super) settled: Vec<Settled>,
    pub(super) places: Vec<PlaceChange>,
    /// Lists of models, by endpoint.
    pub(super) model_lists: Vec<ModelList>,
    /// What is said to other processes.
    pub(super) notices: Vec<Notice>,
    /// Senders to be answered once everything so far is written.
    pub(super) flushes: Vec<oneshot::Sender<bool>>,
    /// Accounts that a config has.
    pub(super) listed: Vec<Listed>,
    /// True if they are those of a new config.
    pub(super) new_config: bool,
    /// True if an account has attempts that are to be written behind.
    pub(super) unwritten: bool,
    pub(super) closing: bool,
}

impl Messages {
    pub(super) fn is_empty(&self) -> bool {
        self.draws.is_empty()
            && self.returns.is_empty()
            && self.bills.is_empty()
            && self.looks.is_empty()
            && self.resets.is_empty()
            && self.finds.is_empty()
            && self.budget_looks.is_empty()
            && self.extends.is_empty()
            && self.unreserved.is_empty()
            && self.settled.is_empty()
            && self.places.is_empty()
            && self.model_lists.is_empty()
            && self.notices.is_empty()
            && self.flushes.is_empty()
            && self.listed.is_empty()
            && !self.new_config
            && !self.unwritten
            && !self.closing
    }
}
