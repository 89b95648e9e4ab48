//! The held response, and the part of it that is passed on.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_TYPE, TRANSFER_ENCODING};
use pingora::http::ResponseHeader;
use pingora::protocols::http::HttpTask;
use pingora::{Error, ErrorType, Result};

use super::reading::{BodyHeader, Reading};
use super::session::Plan;
use crate::exchange::judge::{HOLD_TIME_MAX, Head, Judge, Terms, Verdict};
use crate::exchange::{Committed, Exchange, ExchangeState, Kept};
use crate::request::call::Call;
use crate::response::decode::{Decoder, Encoding};
use crate::response::redact::Secrets;
use crate::routing::health;
use crate::routing::retry::Outcome;
use crate::upstream::cork::Cork;

/// Time after which we end a stream that is complete but that its endpoint keeps open: clients that read to the
/// end should not wait for it. The endpoint's connection is then lost for the next request.
const LINGER_MAX: Duration = Duration::from_millis(80);

/// Pieces that are sent together are copied into one up to this size.
const JOINED_BYTES_MAX: usize = 16 * 1024;
/// Number of tasks in one batch that shows that the endpoint sends faster than they are taken.
const TASKS_OF_BURST: usize = 4;

/// The response of the attempt under way.
pub(super) struct HeldResponse {
    exchange: Arc<Exchange>,
    pub(super) plan: Plan,
    judge: Judge,
    /// Held tasks; bounded by the judge.
    held: Vec<HttpTask>,
    committed: bool,
    status: u16,
    /// When the attempt is given up unless something comes.
    deadline: Option<Instant>,
    /// When a stream that has begun, but has had no content yet, is let through anyway.
    held_until: Option<Instant>,
    /// True once the endpoint has said that its stream is complete.
    complete: bool,
    /// When such a stream is ended.
    lingers_until: Option<Instant>,
    /// Timeout between two pieces of the answer.
    idle: Duration,
    secrets: Secrets,
    /// Reader of the body on its way to the client.
    reading: Reading,
    /// Pieces to pass on of the tasks under way.
    pieces: Vec<Bytes>,
    encoding: Option<Encoding>,
    /// Decoder for the judge, which reads a compressed answer separately.
    decoder: Option<Decoder>,
}

/// Action that is due when a deadline has passed.
pub(super) enum DueAction {
    /// This goes out.
    Flush(Vec<HttpTask>),
    /// The response is whole and ends now, with this.
    End(Vec<HttpTask>),
    /// The attempt is over.
    GiveUp,
}

impl HeldResponse {
    pub(super) fn new(plan: Plan, exchange: &Arc<Exchange>) -> Self {
        Self {
            exchange: Arc::clone(exchange),
            plan,
            judge: Judge::new(Terms { call: Call::Other, expects_body: true, more: false, usage_injected: false }),
            held: Vec::new(),
            committed: false,
            status: 0,
            deadline: None,
            held_until: None,
            complete: false,
            lingers_until: None,
            idle: Duration::MAX,
            secrets: Secrets::default(),
            reading: Reading::Blind,
            pieces: Vec::new(),
            encoding: None,
            decoder: None,
        }
    }

    /// Begins an attempt, and clears the state of the last one.
    pub(super) fn begin_attempt(&mut self) {
        self.held.clear();
        self.decoder = None;
        self.held_until = None;
        let state = self.exchange.state();
        if let Some(attempt) = &state.attempt {
            self.judge = Judge::new(attempt.terms);
            self.deadline = attempt.sent_at.checked_add(attempt.first_byte_timeout);
            self.idle = attempt.endpoint.config.timeouts.idle;
            self.secrets = attempt.endpoint.secrets.clone();
        }
    }

    /// True once the attempt has sent all of the request's body.
    pub(super) fn is_body_sent(&self) -> bool {
        self.exchange.state().body.is_empty()
    }

    /// Returns the next piece of the request's body.
    pub(super) fn next_body_piece(&self) -> Option<Bytes> {
        self.exchange.state().body.pop_front()
    }

    /// Takes the cork that delays the request's header.
    pub(super) fn take_cork(&self) -> Option<Cork> {
        self.exchange.state().cork.take()
    }

    pub(super) fn is_committed(&self) -> bool {
        self.committed
    }

    /// Takes in a task of the response while the response is held.
    pub(super) fn take_in(&mut self, task: HttpTask, now: Instant) -> Result<Verdict> {
        if now > self.plan.budget_ends {
            self.judge.no_more();
        }
        let verdict = match task {
            HttpTask::Failed(error) => {
                self.measure_held();
                let mut state = self.exchange.state();
                state.ended = self.judge.outcome_if_cut();
                state.kept = None;
                return Err(error);
            }
            // An endpoint's 100 or 103 says nothing about its answer, and the attempt may yet be dropped.
            HttpTask::Header(ref header, _) if header.status.is_informational() => return Ok(Verdict::Hold),
            HttpTask::Header(ref header, end) => self.take_in_header(header, end),
            HttpTask::Body(Some(ref piece), end) | HttpTask::UpgradedBody(Some(ref piece), end)
                if !piece.is_empty() =>
            {
                self.note_byte(now);
                self.judge_body(piece, end)
            }
            HttpTask::Body(_, false) | HttpTask::UpgradedBody(_, false) => return Ok(Verdict::Hold),
            HttpTask::Body(_, true) | HttpTask::UpgradedBody(_, true) | HttpTask::Trailer(_) | HttpTask::Done => {
                self.judge.end()
            }
        };
        self.held.push(task);
        self.move_deadline(now);
        Ok(verdict)
    }

    fn take_in_header(&mut self, header: &ResponseHeader, end: bool) -> Verdict {
        self.status = header.status.as_u16();
        let content_type = header.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let rest = match self.status {
            429 => health::rest_asked(&header.headers, SystemTime::now()),
            _ => Duration::ZERO,
        };
        let mut head = Head { status: self.status, content_type, rest, end, ends_with_connection: false };
        let (mut usage_injected, mut encoding) = (false, None);
        if let Some(attempt) = &mut self.exchange.state().attempt {
            attempt.header_came(Outcome::Status { status: self.status, rest });
            head.ends_with_connection = attempt.ends_with_connection;
            usage_injected = attempt.terms.usage_injected;
            encoding = attempt.encoding;
        }
        let header = BodyHeader { status: self.status, content_type, encoding, usage_injected };
        self.reading = Reading::new(&header, &self.secrets);
        self.encoding = encoding.filter(|encoding| *encoding != Encoding::Unknown);
        self.decoder = encoding.map(Decoder::new);
        let retry = &self.plan.pool.server.retry;
        self.judge.header(head, |outcome| outcome.is_retryable(retry))
    }

    /// Decodes a piece for the judge, which reads plain text only.
    fn judge_body(&mut self, piece: &Bytes, end: bool) -> Verdict {
        let Some(decoder) = &mut self.decoder else { return self.judge.body(piece, end) };
        let mut plain = Vec::new();
        decoder.feed(piece, |part| plain.extend_from_slice(&part));
        if decoder.is_broken() && !self.judge.is_error() {
            return self.judge.commit();
        }
        self.judge.body(&plain.into(), end)
    }

    fn note_byte(&self, now: Instant) {
        if let Some(attempt) = &mut self.exchange.state().attempt {
            attempt.first_byte_came(now);
        }
    }

    fn move_deadline(&mut self, now: Instant) {
        if self.judge.waits_for_word() {
            self.held_until = self.held_until.or_else(|| now.checked_add(HOLD_TIME_MAX));
        } else if let Some(wait) = self.judge.patience(self.idle) {
            self.deadline = now.checked_add(wait);
        }
    }

    /// Commits the answer, and returns the held tasks.
    pub(super) fn commit(&mut self, now: Instant) -> Vec<HttpTask> {
        self.committed = true;
        self.held_until = None;
        self.decoder = None;
        self.judge.commit();
        let event_stream = self.reading.takes_events();
        let mut state = self.exchange.state();
        state.committed = Some(Committed { at: now, event_stream, between_events: true, complete: None });
        state.kept = None;
        if let Some(attempt) = &mut state.attempt {
            attempt.committed(&self.plan.pool, now);
        }
        mem::take(&mut self.held)
    }

    /// Ends the attempt; an error answer is kept in case that nothing better comes.
    pub(super) fn drop_answer(&mut self, outcome: Outcome) {
        self.measure_held();
        let held = mem::take(&mut self.held);
        let kept = (self.status >= 400).then(|| Kept::new(held, self.encoding, &self.secrets)).flatten();
        let mut state = self.exchange.state();
        state.kept = kept;
        state.ended = Some(outcome);
    }

    /// Measures the held tasks, which never reach the client but may report tokens.
    pub(super) fn measure_held(&mut self) {
        let Some(attempt) = &mut self.exchange.state().attempt else { return };
        if self.committed || self.status >= 400 {
            return;
        }
        let mut unseen = Vec::new();
        for task in &self.held {
            if let HttpTask::Body(Some(piece), _) = task {
                self.reading.piece(piece.clone(), &mut attempt.meter, &mut unseen);
            }
        }
        self.reading.end(&mut attempt.meter, &mut unseen);
        attempt.note_measured();
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
                    if self.plan.http_10 {
                        header.remove_header(&TRANSFER_ENCODING);
                    }
                    if end && let Some(attempt) = &mut self.exchange.state().attempt {
                        attempt.body_ended();
                    }
                    out.push(HttpTask::Header(header, end));
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
        attempt.note_measured();
        committed.between_events = !reading.is_within_event();
        if reading.is_stream() && attempt.meter.is_complete() && committed.complete.is_none() {
            committed.complete = Some(Instant::now());
            *complete = true;
        }
        if !is_cut {
            if last {
                attempt.body_ended();
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
        vec![HttpTask::Body(Some(rest.concat().into()), true)]
    }

    /// Stops the deadlines while the client is being written to, since a slow client is not the endpoint's failure.
    pub(super) fn pause(&mut self) {
        self.deadline = None;
        self.lingers_until = None;
    }

    /// Starts the deadlines again: the endpoint is waited for.
    pub(super) fn resume(&mut self) {
        let now = Instant::now();
        self.deadline = now.checked_add(self.idle);
        self.lingers_until = now.checked_add(LINGER_MAX).filter(|_| self.complete);
    }

    /// Returns when the next action is due, unless something arrives before.
    pub(super) fn due_at(&self) -> Option<Instant> {
        [self.held_until, self.lingers_until, self.deadline].into_iter().flatten().min()
    }

    /// Returns the action that is due now.
    pub(super) fn due(&mut self) -> DueAction {
        let held_enough = self.held_until.is_some_and(|until| until <= Instant::now());
        if self.lingers_until.is_some_and(|until| until <= Instant::now()) {
            return DueAction::End(self.end_whole());
        }
        if self.committed {
            self.exchange.state().ended = Some(Outcome::TooSlow);
            return DueAction::GiveUp;
        }
        if self.judge.waits_for_word() && (held_enough || !self.judge.may_drop()) {
            return DueAction::Flush(self.commit(Instant::now()));
        }
        let outcome = self.judge.outcome_if_cut().unwrap_or(Outcome::TooSlow);
        self.drop_answer(outcome);
        DueAction::GiveUp
    }
}
