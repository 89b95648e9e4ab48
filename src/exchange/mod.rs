//! One request at one endpoint: its data, the current attempt, and the state of its answer.

mod ask;
mod attempt;
mod budget;
mod charge;
mod hold;
pub mod judge;
mod kept;
mod objects;
mod outlet;
pub(crate) mod own_call;
mod own_headers;
mod reading;
pub(crate) mod running;
pub(crate) mod scheduling;
pub(crate) mod session;
mod timers;

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;

use crate::request_log::KeptBody;
use crate::routing::retry::Outcome;
use crate::upstream::cork::Cork;
#[cfg(test)]
pub(crate) use ask::PROMPT_BYTES_MAX;
pub use ask::{Ask, BodyModel};
pub use attempt::{AskedModel, Attempt};
pub use budget::AttemptBudget;
pub use charge::{Asked, Charge};
pub use kept::Kept;
pub use objects::{AskedObjects, AttemptObjects, Sealed, is_object_missing};
pub use own_headers::OwnHeaders;
pub use running::Cancel;

/// Why the gateway cuts an answer off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutBy {
    /// A budget of its caller has no room for more.
    Budget,
    /// Its caller's key was revoked, and what runs with it is to end.
    Key,
    /// Somebody who runs the gateway ended it.
    Operator,
}

/// State that the hooks share with the session that holds the response back.
#[derive(Debug, Default)]
pub struct Exchange {
    state: Mutex<ExchangeState>,
    /// An end that those who run the gateway can put to it.
    pub cancel: Cancel,
}

/// The state behind [`Exchange`].
#[derive(Debug, Default)]
pub struct ExchangeState {
    /// The attempt under way.
    pub attempt: Option<Attempt>,
    /// Outcome of the attempt, once it has been given up.
    pub ended: Option<Outcome>,
    /// Set once the client has been sent anything.
    pub committed: Option<Committed>,
    /// True once the client has a header of ours and comments, of an answer that has not come yet.
    pub opened: bool,
    /// Why the gateway cuts the answer off, once it does.
    pub cut: Option<CutBy>,
    /// The last error answer that was kept from the client.
    pub kept: Option<Kept>,
    /// The answer's body as the client gets it, if the request log keeps it.
    pub(crate) answer: Option<Box<KeptBody>>,
    /// Failures that may be the request's; at most one for each attempt.
    pub charges: Vec<Charge>,
    /// Rest of the request's body that the attempt under way has yet to send.
    pub body: VecDeque<Bytes>,
    /// Delays the request's header until its body is written.
    pub cork: Option<Cork>,
}

/// Answer that the client has been sent a part of.
#[derive(Clone, Copy, Debug)]
pub struct Committed {
    /// When its first part was let through.
    pub at: Instant,
    /// True if it is an event stream that one more event can be added to.
    pub event_stream: bool,
    /// True if the last byte sent ended an event.
    pub between_events: bool,
    /// When the endpoint said that its answer is complete; a lost connection after that is not a break.
    pub complete: Option<Instant>,
}

impl ExchangeState {
    /// Holds the failures against their endpoints, but for those that two or more endpoints gave alike: these are the
    /// request's own, unless another endpoint answered it. That is known once its answer has any content, or the request is
    /// over.
    pub fn settle_charges(&mut self, is_over: bool) {
        self.charges.extend(self.attempt.as_mut().and_then(Attempt::take_charge));
        if self.charges.is_empty() {
            return;
        }
        let has_content = self.has_content();
        if !is_over && !has_content {
            return;
        }
        let is_silent = !has_content && self.attempt.as_ref().is_some_and(Attempt::answers_well);
        let charges = std::mem::take(&mut self.charges);
        let kinds: Vec<_> = charges.iter().map(Charge::kind).collect();
        for charge in charges {
            let alike = kinds.iter().filter(|kind| **kind == charge.kind()).count();
            // The last empty answer is let through, so it is no charge.
            let is_alike = alike > 1 || charge.is_of_empty_answer() && is_silent;
            if !is_alike || has_content {
                charge.apply();
            }
        }
    }

    /// True if the answer that goes to the client has anything in it, as far as it has come.
    fn has_content(&self) -> bool {
        let Some(attempt) = self.attempt.as_ref().filter(|attempt| attempt.answers_well()) else { return false };
        let is_stream = self.committed.is_some_and(|committed| committed.event_stream);
        !attempt.is_empty && (!is_stream || attempt.stream_has_content())
    }
}

impl Exchange {
    /// The state. The lock is hardly ever contended: one task runs the hooks and the session in turn, and a list of what is under way
    /// looks into it now and then.
    pub fn state(&self) -> MutexGuard<'_, ExchangeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
