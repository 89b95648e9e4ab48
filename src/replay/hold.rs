//! What of a response is held back, and what goes out.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING};
use pingora::http::ResponseHeader;
use pingora::protocols::http::HttpTask;
use pingora::{Error, Result};

use super::Plan;
use crate::blot::{Blotter, Secrets};
use crate::context::{Committed, Exchange, Kept};
use crate::health;
use crate::request::Call;
use crate::respond::{self, HOLD_TIME_MAX, Head, Judge, Terms, Verdict};
use crate::retry::Outcome;
use crate::usage::Meter;

/// The response of the attempt under way.
pub(super) struct Hold {
    exchange: Arc<Exchange>,
    plan: Plan,
    judge: Judge,
    /// What is held back; bounded by the judge.
    held: Vec<HttpTask>,
    committed: bool,
    status: u16,
    /// When the attempt is over unless something comes.
    deadline: Option<Instant>,
    /// When a stream that has begun with data, but has not said anything yet, is let through all the same.
    held_until: Option<Instant>,
    /// How long the endpoint may take between two pieces.
    idle: Duration,
    secrets: Secrets,
    /// For an error: its body goes through this.
    blotter: Option<Blotter>,
    event_stream: bool,
    /// Reads what the answer cost.
    meter: Meter,
    /// The last bytes sent of an event stream.
    tail: [u8; 4],
}

/// What is due when a deadline has passed.
pub(super) enum Due {
    /// This goes out.
    Flush(Vec<HttpTask>),
    /// The attempt is over.
    GiveUp,
}

impl Hold {
    pub(super) fn new(plan: Plan, exchange: &Arc<Exchange>) -> Self {
        Self {
            exchange: Arc::clone(exchange),
            plan,
            judge: Judge::new(Terms { call: Call::Other, expects_body: true, more: false }),
            held: Vec::new(),
            committed: false,
            status: 0,
            deadline: None,
            held_until: None,
            idle: Duration::MAX,
            secrets: Secrets::default(),
            blotter: None,
            event_stream: false,
            meter: Meter::default(),
            tail: [0; 4],
        }
    }

    /// An attempt begins: whatever the last one left is forgotten.
    pub(super) fn begin_attempt(&mut self) {
        self.held.clear();
        self.held_until = None;
        let state = self.exchange.state();
        if let Some(attempt) = &state.attempt {
            self.judge = Judge::new(attempt.terms);
            self.deadline = Instant::now().checked_add(attempt.first_byte_timeout);
            self.idle = attempt.endpoint.config.timeouts.idle;
            self.secrets = attempt.endpoint.secrets.clone();
        }
    }

    pub(super) fn is_committed(&self) -> bool {
        self.committed
    }

    /// Takes a task of the response in while it is held back.
    pub(super) fn take_in(&mut self, task: HttpTask) -> Result<Verdict> {
        if Instant::now() > self.plan.budget_ends {
            self.judge.no_more();
        }
        let verdict = match task {
            HttpTask::Failed(error) => {
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
                self.note_byte();
                self.judge.body(piece, end)
            }
            HttpTask::Body(_, false) | HttpTask::UpgradedBody(_, false) => return Ok(Verdict::Hold),
            HttpTask::Body(_, true) | HttpTask::UpgradedBody(_, true) | HttpTask::Trailer(_) | HttpTask::Done => {
                self.judge.end()
            }
        };
        self.held.push(task);
        self.move_deadline();
        Ok(verdict)
    }

    fn take_in_header(&mut self, header: &ResponseHeader, end: bool) -> Verdict {
        self.status = header.status.as_u16();
        let content_type = header.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        self.event_stream = respond::is_event_stream(content_type);
        self.meter = if header.status.is_success() {
            Meter::new(self.event_stream, respond::is_json(content_type))
        } else {
            Meter::default()
        };
        let rest = match self.status {
            429 => health::rest_asked(&header.headers, SystemTime::now()),
            _ => Duration::ZERO,
        };
        if let Some(attempt) = &mut self.exchange.state().attempt {
            attempt.answer = Some(Outcome::Status { status: self.status, rest });
        }
        let retry = &self.plan.pool.server.retry;
        let head = Head { status: self.status, content_type, rest, end };
        self.judge.header(head, |outcome| outcome.is_retryable(retry))
    }

    fn note_byte(&self) {
        if let Some(attempt) = &mut self.exchange.state().attempt {
            attempt.first_byte_came();
        }
    }

    fn move_deadline(&mut self) {
        if self.judge.waits_for_word() {
            self.held_until = self.held_until.or_else(|| Instant::now().checked_add(HOLD_TIME_MAX));
        } else if let Some(wait) = self.judge.patience(self.idle) {
            self.deadline = Instant::now().checked_add(wait);
        }
    }

    /// What was held, now that the answer is the client's.
    pub(super) fn commit(&mut self) -> Vec<HttpTask> {
        self.committed = true;
        self.held_until = None;
        self.judge.commit();
        let event_stream = self.event_stream;
        let mut state = self.exchange.state();
        state.committed = Some(Committed { at: Instant::now(), event_stream, between_events: true });
        state.kept = None;
        if let Some(attempt) = &mut state.attempt {
            attempt.begins_to_answer();
        }
        drop(state);
        if self.status >= 400 {
            self.blotter = Some(Blotter::new(self.secrets.clone()));
        }
        mem::take(&mut self.held)
    }

    /// Ends the attempt; an error answer is kept in case that nothing better comes.
    pub(super) fn drop_answer(&mut self, outcome: Outcome) {
        let held = mem::take(&mut self.held);
        let kept = (self.status >= 400).then(|| keep(held, &self.secrets)).flatten();
        let mut state = self.exchange.state();
        state.kept = kept;
        state.ended = Some(outcome);
    }

    /// What of committed tasks is to be written, and the error that follows them, if one does.
    pub(super) fn outgoing(&mut self, tasks: Vec<HttpTask>) -> (Vec<HttpTask>, Option<Box<Error>>) {
        let mut out = Vec::with_capacity(tasks.len());
        for task in tasks {
            match task {
                HttpTask::Failed(error) => return (out, Some(error)),
                HttpTask::Header(mut header, end) => {
                    if self.plan.http_10 {
                        header.remove_header(&TRANSFER_ENCODING);
                    }
                    out.push(HttpTask::Header(header, end));
                }
                HttpTask::Body(piece, end) => {
                    let piece = piece.unwrap_or_default();
                    self.read_tokens(&piece, end);
                    let piece = self.without_secrets(piece, end);
                    // An empty piece that ends nothing would be taken for the last chunk.
                    if end || !piece.is_empty() {
                        self.remember_sent(&piece);
                        out.push(HttpTask::Body(Some(piece), end));
                    }
                }
                HttpTask::Done | HttpTask::Trailer(_) => {
                    self.read_tokens(&Bytes::new(), true);
                    let rest = self.without_secrets(Bytes::new(), true);
                    if !rest.is_empty() {
                        out.push(HttpTask::Body(Some(rest), false));
                    }
                    out.push(task);
                }
                task @ HttpTask::UpgradedBody(..) => out.push(task),
            }
        }
        (out, None)
    }

    fn read_tokens(&mut self, piece: &Bytes, end: bool) {
        self.meter.piece(piece);
        // A stream may break off before its end, or its reader go away.
        if (end || self.event_stream)
            && let tokens @ Some(_) = self.meter.so_far(end)
            && let Some(attempt) = &mut self.exchange.state().attempt
        {
            attempt.tokens = tokens;
        }
    }

    fn without_secrets(&mut self, piece: Bytes, end: bool) -> Bytes {
        match &mut self.blotter {
            Some(blotter) => blotter.piece(&piece, end),
            // An error in the middle of a stream may quote the key as well.
            None if self.event_stream => self.secrets.blot_whole(&piece),
            None => piece,
        }
    }

    fn remember_sent(&mut self, piece: &Bytes) {
        let mut state = self.exchange.state();
        if let Some(attempt) = &mut state.attempt {
            attempt.first_byte_came();
        }
        let Some(committed) = &mut state.committed else { return };
        for byte in piece.iter().skip(piece.len().saturating_sub(self.tail.len())) {
            self.tail.rotate_left(1);
            self.tail[3] = *byte;
        }
        let tail = &self.tail;
        committed.between_events = tail.ends_with(b"\n\n") || tail.ends_with(b"\r\r") || tail == b"\r\n\r\n";
    }

    /// The client is being written to, which may take as long as it takes.
    pub(super) fn pause(&mut self) {
        self.deadline = None;
    }

    /// The endpoint is waited for again.
    pub(super) fn resume(&mut self) {
        self.deadline = Instant::now().checked_add(self.idle);
    }

    /// When something is due if nothing comes before.
    pub(super) fn due_at(&self) -> Option<Instant> {
        self.held_until.into_iter().chain(self.deadline).min()
    }

    /// What is due now.
    pub(super) fn due(&mut self) -> Due {
        let held_enough = self.held_until.is_some_and(|until| until <= Instant::now());
        if self.committed {
            self.exchange.state().ended = Some(Outcome::TooSlow);
            return Due::GiveUp;
        }
        if self.judge.waits_for_word() && (held_enough || !self.judge.may_drop()) {
            return Due::Flush(self.commit());
        }
        let outcome = self.judge.outcome_if_cut().unwrap_or(Outcome::TooSlow);
        self.drop_answer(outcome);
        Due::GiveUp
    }
}

/// The header and body of an error answer, framed anew, with the endpoint's secrets blotted out.
fn keep(tasks: Vec<HttpTask>, secrets: &Secrets) -> Option<Kept> {
    let mut kept: Option<Kept> = None;
    let mut body = Vec::new();
    let mut ended = false;
    for task in tasks {
        match task {
            HttpTask::Header(mut header, end) => {
                header.remove_header(&TRANSFER_ENCODING);
                ended |= end;
                kept = Some(Kept { header, body: None });
            }
            HttpTask::Body(piece, end) => {
                body.extend_from_slice(&piece.unwrap_or_default());
                ended |= end;
            }
            HttpTask::Done | HttpTask::Trailer(_) => ended = true,
            _ => {}
        }
    }
    let mut kept = kept?;
    if ended {
        let body = Blotter::new(secrets.clone()).piece(&body, true);
        kept.header.insert_header(CONTENT_LENGTH, body.len()).ok()?;
        kept.body = Some(body);
    }
    Some(kept)
}
