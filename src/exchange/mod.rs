//! One request at one endpoint: what it asks for, the attempt under way, and what became of the answer so far.

mod ask;
mod attempt;
mod hold;
pub mod judge;
mod reading;
pub(crate) mod scheduling;
pub(crate) mod session;

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use pingora::http::ResponseHeader;

use crate::routing::retry::Outcome;
use crate::upstream::cork::Cork;
pub use ask::Ask;
#[cfg(test)]
pub(crate) use ask::PROMPT_BYTES_MAX;
pub use attempt::Attempt;

/// An endpoint's error answer, kept in case that no other endpoint does better.
#[derive(Debug)]
pub struct Kept {
    /// Its header, ready for the client.
    pub header: Box<ResponseHeader>,
    /// Its body; none if it was too large to keep or never came to its end.
    pub body: Option<Bytes>,
}

/// What the hooks share with the session that holds the response back.
#[derive(Debug, Default)]
pub struct Exchange(Mutex<ExchangeState>);

/// The state behind [`Exchange`].
#[derive(Debug, Default)]
pub struct ExchangeState {
    /// The attempt under way.
    pub attempt: Option<Attempt>,
    /// Why the attempt was given up, once it was.
    pub ended: Option<Outcome>,
    /// Set once the client has been sent anything.
    pub committed: Option<Committed>,
    /// The last error answer that was dropped.
    pub kept: Option<Kept>,
    /// What is left to be sent of the request's body, by the attempt under way.
    pub body: VecDeque<Bytes>,
    /// What keeps the request's header back until its body is written.
    pub cork: Option<Cork>,
}

/// What the client has been sent the beginning of.
#[derive(Clone, Copy, Debug)]
pub struct Committed {
    /// When the first of it was let through.
    pub at: Instant,
    /// Whether it is an event stream that one more event can be added to.
    pub event_stream: bool,
    /// Whether the last byte sent ended an event.
    pub between_events: bool,
    /// When the endpoint said that its answer is whole; whatever comes then is no break.
    pub complete: Option<Instant>,
}

impl Exchange {
    /// The state. The lock is never contended: one task runs the hooks and the session in turn.
    pub fn state(&self) -> MutexGuard<'_, ExchangeState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
