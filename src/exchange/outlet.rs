//! What of a committed answer goes to the client: pieces are read on their way, joined where they are small, and checked to be
//! whole at their end.

use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use http::header::TRANSFER_ENCODING;
use pingora::protocols::http::HttpTask;
use pingora::{Error, ErrorType};

use super::reading::Reading;
use super::session::Framing;
use crate::config::ErrorRule;
use crate::exchange::{CutBy, Exchange, ExchangeState};
use crate::response::classify;
use crate::routing::retry::{Outcome, Place};

/// Pieces that are sent together are copied into one up to this size.
const JOINED_BYTES_MAX: usize = 16 * 1024;
/// Number of tasks in one batch that shows that the endpoint sends faster than they are taken.
const TASKS_OF_BURST: usize = 4;

/// The way of a committed answer to the client.
pub(super) struct Outlet {
    exchange: Arc<Exchange>,
    /// Reader of the body on its way.
    pub(super) reading: Reading,
    /// Pieces to pass on of the tasks under way.
    pieces: Vec<Bytes>,
    /// True once the endpoint has said that its stream is complete.
    pub(super) complete: bool,
    framing: Framing,
    /// True once the client has a header, so that the endpoint's own is left off.
    pub(super) opened: bool,
    /// True if the request log keeps the body.
    is_kept: bool,
}

impl Outlet {
    pub(super) fn new(exchange: &Arc<Exchange>, framing: Framing) -> Self {
        Self {
            exchange: Arc::clone(exchange),
            reading: Reading::Blind,
            pieces: Vec::new(),
            complete: false,
            framing,
            opened: false,
            is_kept: exchange.state().answer.is_some(),
        }
    }

    /// Returns the tasks to write, and the error that follows them, if one does.
    ///
    /// With `gathers`, a burst of events is not written yet: the next tasks are there already, and a write costs more
    /// than a hundred events.
    pub(super) fn outgoing(&mut self, tasks: Vec<HttpTask>, gathers: bool) -> (Vec<HttpTask>, Option<Box<Error>>) {
        let gathers = gathers && tasks.len() >= TASKS_OF_BURST && self.reading.is_stream();
        let mut out = Vec::with_capacity(tasks.len());
        for task in tasks {
            match task {
                HttpTask::Failed(error) => {
                    self.push_pieces(&mut out, false);
                    if self.complete {
                        out.extend(self.end_whole());
                    }
                    return (out, Some(error));
                }
                HttpTask::Header(mut header, end) => {
                    if self.framing == Framing::Connection {
                        header.remove_header(&TRANSFER_ENCODING);
                    }
                    if end && let Some(attempt) = &mut self.exchange.state().attempt {
                        attempt.body_ended();
                    }
                    if !self.opened {
                        out.push(HttpTask::Header(header, end));
                    }
                }
                HttpTask::Body(piece, last) => {
                    let cut = self.body(piece.unwrap_or_default(), last);
                    if last || cut.is_some() {
                        self.push_pieces(&mut out, cut.is_none());
                    }
                    if cut.is_some() {
                        return (out, cut);
                    }
                }
                HttpTask::Done | HttpTask::Trailer(_) => {
                    let cut = self.body(Bytes::new(), true);
                    // The task itself says if it is the last.
                    self.push_pieces(&mut out, false);
                    if cut.is_some() {
                        return (out, cut);
                    }
                    out.push(task);
                }
                task @ HttpTask::UpgradedBody(..) => out.push(task),
            }
        }
        let gathered: usize = self.pieces.iter().map(Bytes::len).sum();
        if !(gathers && out.is_empty() && gathered < JOINED_BYTES_MAX) {
            self.push_pieces(&mut out, false);
        }
        (out, None)
    }

    /// True if gathered pieces have to be written when nothing follows them.
    pub(super) fn has_gathered(&self) -> bool {
        !self.pieces.is_empty()
    }

    /// Takes the gathered pieces.
    pub(super) fn take_gathered(&mut self) -> Vec<HttpTask> {
        let mut out = Vec::new();
        self.push_pieces(&mut out, false);
        out
    }

    /// Adds the pieces to pass on; small pieces that came together are joined, since each becomes a chunk or a frame.
    fn push_pieces(&mut self, out: &mut Vec<HttpTask>, end: bool) {
        // An empty piece that ends nothing would count as the last chunk.
        self.pieces.retain(|piece| !piece.is_empty());
        if self.is_kept
            && let Some(kept) = &mut self.exchange.state().answer
        {
            self.pieces.iter().for_each(|piece| kept.add(piece));
        }
        let bytes = self.pieces.iter().map(Bytes::len).sum();
        if self.pieces.len() > 1 && bytes <= JOINED_BYTES_MAX {
            let mut joined = BytesMut::with_capacity(bytes);
            for piece in self.pieces.drain(..) {
                joined.extend_from_slice(&piece);
            }
            self.pieces.push(joined.freeze());
        }
        let before = out.len();
        out.extend(self.pieces.drain(..).map(|piece| HttpTask::Body(Some(piece), false)));
        if end {
            match out.get_mut(before..).and_then(<[HttpTask]>::last_mut) {
                Some(HttpTask::Body(_, last)) => *last = true,
                _ => out.push(HttpTask::Body(Some(Bytes::new()), true)),
            }
        }
    }

    /// Takes in a piece, and keeps the part that goes to the client. Fails if the endpoint's body has ended and is not whole.
    fn body(&mut self, piece: Bytes, last: bool) -> Option<Box<Error>> {
        let Self { exchange, reading, pieces, complete, .. } = self;
        let mut state = exchange.state();
        let ExchangeState { attempt: Some(attempt), committed: Some(committed), ended, .. } = &mut *state else {
            pieces.push(piece);
            return None;
        };
        if attempt.objects.is_some() {
            attempt.read_objects(&piece, reading.is_stream(), last);
        }
        reading.piece(piece, &mut attempt.meter, pieces);
        let mut is_cut = false;
        if last {
            let whole = pieces.len();
            reading.end(&mut attempt.meter, pieces);
            is_cut = attempt.is_cut();
            if is_cut {
                // Half an event is of no use to the client.
                pieces.truncate(whole);
            }
        }
        if let Some(event) = reading.take_error()
            && let Some(outcome) = error_of(&event, &attempt.asked.endpoint.config.errors)
        {
            // The client sees it; the endpoint answers for it.
            attempt.means(outcome);
        }
        attempt.note_measured();
        let is_over_budget = attempt.passes_budget() && !last && !attempt.meter.is_complete();
        committed.between_events = !reading.is_within_event();
        if reading.is_stream() && attempt.meter.is_complete() && committed.complete.is_none() {
            committed.complete = Some(Instant::now());
            *complete = true;
        }
        if is_over_budget {
            state.cut = Some(CutBy::Budget);
            state.ended = Some(Outcome::Ours);
            return Some(Error::explain(ErrorType::ConnectionClosed, "a budget has no room for more").into_up());
        }
        if !is_cut {
            if last {
                attempt.body_ended();
            }
            // What other endpoints failed at waits for the first content of this one.
            if !state.charges.is_empty() {
                state.settle_charges(false);
            }
            return None;
        }
        *ended = Some(Outcome::Broken);
        Some(Error::explain(ErrorType::ConnectionClosed, "the answer was cut").into_up())
    }

    /// Notes that the stream is complete: for the client it ends whole, whatever the endpoint does next.
    pub(super) fn end_whole(&mut self) -> Vec<HttpTask> {
        let mut rest = Vec::new();
        if let Some(attempt) = &mut self.exchange.state().attempt {
            self.reading.end(&mut attempt.meter, &mut rest);
            attempt.note_measured();
        }
        if let Some(kept) = self.exchange.state().answer.as_mut().filter(|_| self.is_kept) {
            for piece in &rest {
                kept.add(piece);
            }
        }
        vec![HttpTask::Body(Some(rest.concat().into()), true)]
    }
}

/// What an event of a committed stream means, if it is an error.
fn error_of(event: &[u8], rules: &[ErrorRule]) -> Option<Outcome> {
    let value = serde_json::from_slice(event).ok()?;
    let meaning = classify::of_value(&value, rules)?;
    Some(Outcome::Error { meaning, place: Place::Event })
}
