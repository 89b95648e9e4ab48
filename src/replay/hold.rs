//! What of a response is held back, and what goes out.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING};
use pingora::http::ResponseHeader;
use pingora::protocols::http::HttpTask;
use pingora::{Error, ErrorType, Result};

use super::Plan;
use crate::blot::{Blotter, Secrets};
use crate::context::{Committed, Exchange, ExchangeState, Kept};
use crate::decode::Decoder;
use crate::health;
use crate::relay::Relay;
use crate::request::Call;
use crate::respond::{self, HOLD_TIME_MAX, Head, Judge, Terms, Verdict};
use crate::retry::Outcome;
use crate::sse::Splitter;
use crate::usage::Meter;

/// A stream whose endpoint has said that it is whole, and holds it open all the same, is ended after this time: clients that
/// read to the end should not wait for it. Ended by us, the endpoint's connection is lost for the next request.
const LINGER_MAX: Duration = Duration::from_millis(80);

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
    /// When a stream that is whole is ended.
    lingers_until: Option<Instant>,
    /// How long the endpoint may take between two pieces.
    idle: Duration,
    secrets: Secrets,
    /// For an error: its body goes through this.
    blotter: Option<Blotter>,
    /// How the body is read that goes to the client.
    reading: Reading,
    /// For the judge, what is compressed is read apart.
    decoder: Option<Decoder>,
}

/// How an answer's body is read.
enum Reading {
    /// It is not.
    Blind,
    Json,
    Stream(Relay),
    /// Compressed: beside the way. With a splitter if it is an event stream.
    Encoded(Decoder, Option<Splitter>),
}

impl Reading {
    fn of(header: &ResponseHeader, content_type: Option<&str>, strips: bool) -> Self {
        let is_event_stream = respond::is_event_stream(content_type);
        match Decoder::of(&header.headers) {
            _ if !header.status.is_success() => Self::Blind,
            Some(decoder) => Self::Encoded(decoder, is_event_stream.then(Splitter::default)),
            None if is_event_stream => Self::Stream(Relay::new(strips)),
            None if respond::is_json(content_type) => Self::Json,
            None => Self::Blind,
        }
    }

    /// Measures a piece, and gives what of it goes to the client.
    fn piece(&mut self, piece: Bytes, end: bool, meter: &mut Meter, out: &mut Vec<Bytes>) {
        match self {
            Self::Stream(relay) => {
                relay.piece(&piece, meter, out);
                if end {
                    out.push(relay.rest());
                }
                return;
            }
            Self::Json => meter.json(&piece),
            Self::Encoded(decoder, splitter) => decoder.feed(&piece, |plain| {
                let plain = Bytes::copy_from_slice(plain);
                match splitter {
                    None => meter.json(&plain),
                    Some(splitter) => splitter.feed(&plain, |data| data.into_iter().for_each(|data| meter.event(data))),
                }
            }),
            Self::Blind => {}
        }
        if end && matches!(self, Self::Json | Self::Encoded(_, None)) {
            meter.json_ended();
        }
        out.push(piece);
    }
}

/// What is due when a deadline has passed.
pub(super) enum Due {
    /// This goes out.
    Flush(Vec<HttpTask>),
    /// The response is whole and ends now.
    End,
    /// The attempt is over.
    GiveUp,
}

impl Hold {
    pub(super) fn new(plan: Plan, exchange: &Arc<Exchange>) -> Self {
        Self {
            exchange: Arc::clone(exchange),
            plan,
            judge: Judge::new(Terms { call: Call::Other, expects_body: true, more: false, asks_usage: false }),
            held: Vec::new(),
            committed: false,
            status: 0,
            deadline: None,
            held_until: None,
            lingers_until: None,
            idle: Duration::MAX,
            secrets: Secrets::default(),
            blotter: None,
            reading: Reading::Blind,
            decoder: None,
        }
    }

    /// An attempt begins: whatever the last one left is forgotten.
    pub(super) fn begin_attempt(&mut self) {
        self.held.clear();
        self.decoder = None;
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
                self.judge_body(piece, end)
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
        let rest = match self.status {
            429 => health::rest_asked(&header.headers, SystemTime::now()),
            _ => Duration::ZERO,
        };
        let mut head = Head { status: self.status, content_type, rest, end, ends_with_connection: false };
        let mut strips = false;
        if let Some(attempt) = &mut self.exchange.state().attempt {
            attempt.answer = Some(Outcome::Status { status: self.status, rest });
            head.ends_with_connection = attempt.ends_with_connection;
            strips = attempt.terms.asks_usage;
        }
        self.reading = Reading::of(header, content_type, strips);
        self.decoder = Decoder::of(&header.headers);
        let retry = &self.plan.pool.server.retry;
        self.judge.header(head, |outcome| outcome.is_retryable(retry))
    }

    /// Only what can be read can be judged.
    fn judge_body(&mut self, piece: &Bytes, end: bool) -> Verdict {
        let Some(decoder) = &mut self.decoder else { return self.judge.body(piece, end) };
        let mut plain = Vec::new();
        decoder.feed(piece, |part| plain.extend_from_slice(part));
        if decoder.is_broken() && !self.judge.is_error() {
            return self.judge.commit();
        }
        self.judge.body(&plain.into(), end)
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
        self.decoder = None;
        self.judge.commit();
        let event_stream = matches!(self.reading, Reading::Stream(_));
        let mut state = self.exchange.state();
        state.committed = Some(Committed { at: Instant::now(), event_stream, between_events: true, complete: None });
        state.kept = None;
        if let Some(attempt) = &mut state.attempt {
            attempt.begins_to_answer(&self.plan.pool);
        }
        drop(state);
        if self.status >= 400 {
            self.blotter = Some(Blotter::new(self.secrets.clone()));
        }
        mem::take(&mut self.held)
    }

    /// Ends the attempt; an error answer is kept in case that nothing better comes, and of an empty one what it cost.
    pub(super) fn drop_answer(&mut self, outcome: Outcome) {
        let held = mem::take(&mut self.held);
        if outcome == Outcome::Empty {
            self.measure(&held);
        }
        let kept = (self.status >= 400).then(|| keep(held, &self.secrets)).flatten();
        let mut state = self.exchange.state();
        state.kept = kept;
        state.ended = Some(outcome);
    }

    fn measure(&mut self, held: &[HttpTask]) {
        let Some(attempt) = &mut self.exchange.state().attempt else { return };
        for task in held {
            if let HttpTask::Body(Some(piece), _) = task {
                self.reading.piece(piece.clone(), false, &mut attempt.meter, &mut Vec::new());
            }
        }
        self.reading.piece(Bytes::new(), true, &mut attempt.meter, &mut Vec::new());
    }

    /// What of committed tasks is to be written, and the error that follows them, if one does.
    pub(super) fn outgoing(&mut self, tasks: Vec<HttpTask>) -> (Vec<HttpTask>, Option<Box<Error>>) {
        let mut out = Vec::with_capacity(tasks.len());
        for task in tasks {
            match task {
                HttpTask::Failed(error) => {
                    if self.lingers_until.is_some() {
                        self.end_whole(&mut out);
                    }
                    return (out, Some(error));
                }
                HttpTask::Header(mut header, end) => {
                    if self.plan.http_10 {
                        header.remove_header(&TRANSFER_ENCODING);
                    }
                    out.push(HttpTask::Header(header, end));
                }
                HttpTask::Body(piece, end) => {
                    if self.body(piece.unwrap_or_default(), end, &mut out) {
                        return (
                            out,
                            Some(Error::explain(ErrorType::ConnectionClosed, "the stream was cut").into_up()),
                        );
                    }
                }
                HttpTask::Done | HttpTask::Trailer(_) => {
                    if self.body(Bytes::new(), true, &mut out) {
                        return (
                            out,
                            Some(Error::explain(ErrorType::ConnectionClosed, "the stream was cut").into_up()),
                        );
                    }
                    // The end is the task's own to say.
                    if let Some(HttpTask::Body(piece, end)) = out.last_mut() {
                        *end = false;
                        if piece.as_ref().is_none_or(Bytes::is_empty) {
                            out.pop();
                        }
                    }
                    out.push(task);
                }
                task @ HttpTask::UpgradedBody(..) => out.push(task),
            }
        }
        (out, None)
    }

    /// Adds what of a piece goes to the client. True if the answer stops here and is not whole.
    fn body(&mut self, piece: Bytes, end: bool, out: &mut Vec<HttpTask>) -> bool {
        let exchange = Arc::clone(&self.exchange);
        let mut state = exchange.state();
        let ExchangeState { attempt: Some(attempt), committed: Some(committed), ended, .. } = &mut *state else {
            out.push(HttpTask::Body(Some(piece), end));
            return false;
        };
        let mut pieces = Vec::new();
        self.reading.piece(piece, end, &mut attempt.meter, &mut pieces);
        let is_cut = end && attempt.is_cut() && matches!(self.reading, Reading::Stream(_));
        let last = pieces.len().saturating_sub(1);
        for (index, piece) in pieces.into_iter().enumerate() {
            let ends = end && index == last && !is_cut;
            let piece = match &mut self.blotter {
                Some(blotter) => blotter.piece(&piece, ends),
                // An error in the middle of a stream may quote the key as well.
                None if committed.event_stream => self.secrets.blot_whole(&piece),
                None => piece,
            };
            // An empty piece that ends nothing would be taken for the last chunk.
            if ends || !piece.is_empty() {
                attempt.first_byte_came();
                out.push(HttpTask::Body(Some(piece), ends));
            }
        }
        match &self.reading {
            Reading::Stream(relay) => committed.between_events = !relay.is_within_event(),
            Reading::Encoded(_, Some(_)) => {}
            Reading::Blind | Reading::Json | Reading::Encoded(_, None) => return false,
        }
        if attempt.meter.is_complete() && committed.complete.is_none() {
            committed.complete = Some(Instant::now());
            self.lingers_until = Instant::now().checked_add(LINGER_MAX);
        }
        if is_cut {
            *ended = Some(Outcome::Broken);
        }
        is_cut
    }

    /// The endpoint has said that its stream is whole, so that is how it ends for the client, whatever it does then.
    pub(super) fn end_whole(&mut self, out: &mut Vec<HttpTask>) {
        let rest = match &mut self.reading {
            Reading::Stream(relay) => self.secrets.blot_whole(&relay.rest()),
            Reading::Blind | Reading::Json | Reading::Encoded(..) => Bytes::new(),
        };
        out.push(HttpTask::Body(Some(rest), true));
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
        [self.held_until, self.lingers_until, self.deadline].into_iter().flatten().min()
    }

    /// What is due now.
    pub(super) fn due(&mut self) -> Due {
        let held_enough = self.held_until.is_some_and(|until| until <= Instant::now());
        if self.lingers_until.is_some_and(|until| until <= Instant::now()) {
            return Due::End;
        }
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
