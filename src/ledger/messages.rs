//! Messages to the ledger's thread, and their replies.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::{Account, Permit, Spent};
use crate::limit::{Counted, LimitReason, Limits, Stamp, View};

/// An endpoint that would do.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Account.
    pub account: Arc<Account>,
    /// Limits in the config that the request runs under.
    pub limits: Arc<Limits>,
    /// It asked to be left alone until then.
    pub not_before: Stamp,
}

/// Result of a draw.
#[derive(Debug)]
pub enum Drawn {
    /// A permit of the endpoint at this place in the list.
    Granted(usize, Permit),
    /// Every endpoint is at a limit.
    Refused(Refusal),
    /// The ledger cannot be used, and limited endpoints are not asked without it.
    Unavailable,
}

/// Refusal: no endpoint has a permit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Time until a permit frees that is promised to no other client.
    pub wait: Duration,
    /// Reason for each endpoint, by its place in the list.
    pub held: Vec<(usize, LimitReason)>,
}

/// A request for a permit.
#[derive(Debug)]
pub(super) struct Draw {
    pub(super) ticket: u64,
    pub(super) wanted: Vec<Wanted>,
    pub(super) otherwise: Otherwise,
    /// The permit that the new one is to stand for.
    pub(super) instead_of: Option<Return>,
    pub(super) reply: oneshot::Sender<Drawn>,
}

/// Alternative if no endpoint of the list has a permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Otherwise {
    /// The request has other places to go to.
    LookElsewhere,
    /// It is refused, and told when to come back.
    Refuse,
    /// It waits for its turn until this moment.
    WaitUntil(Stamp),
}

/// An attempt is over, or never was one.
#[derive(Debug)]
pub(super) struct Return {
    pub(super) account: Arc<Account>,
    /// Count to take back.
    pub(super) counted: Option<Counted>,
    /// True if it was counted as in flight.
    pub(super) concurrent: bool,
}

/// Tokens that were spent.
#[derive(Debug)]
pub(super) struct Bill {
    pub(super) account: Arc<Account>,
    pub(super) limits: Arc<Limits>,
    pub(super) spent: Spent,
}

/// A question for what counts.
#[derive(Debug)]
pub(super) struct Look {
    pub(super) accounts: Vec<(Arc<Account>, Arc<Limits>)>,
    pub(super) reply: oneshot::Sender<Vec<View>>,
}

/// The token statistics of an endpoint, or of all, are to be forgotten.
#[derive(Debug)]
pub(super) struct Reset {
    pub(super) endpoint: Option<Arc<str>>,
    pub(super) reply: oneshot::Sender<bool>,
}

/// Everything that waits for the ledger's thread.
#[derive(Debug, Default)]
pub(super) struct Messages {
    pub(super) draws: Vec<Draw>,
    pub(super) returns: Vec<Return>,
    pub(super) bills: Vec<Bill>,
    pub(super) looks: Vec<Look>,
    pub(super) resets: Vec<Reset>,
    /// Replies due once everything so far is written.
    pub(super) flushes: Vec<oneshot::Sender<bool>>,
    /// The endpoints of the config that is current, if it is another one.
    pub(super) endpoints: Option<Vec<(Arc<Account>, Arc<Limits>)>>,
    /// True if an account has attempts to be written behind.
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
            && self.flushes.is_empty()
            && self.endpoints.is_none()
            && !self.unwritten
            && !self.closing
    }
}
