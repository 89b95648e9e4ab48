//! The held response: it is judged as it comes in, and let through or dropped.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, TRANSFER_ENCODING};
use http::{HeaderValue, Response};
use pingora::http::ResponseHeader;
use pingora::protocols::http::HttpTask;
use pingora::{Error, Result};

use super::attempt::Attempt;
use super::outlet::Outlet;
use super::reading::{BodyHeader, Reading};
use super::session::{Framing, Plan};
use super::timers::{Due, Timers};
use crate::exchange::judge::{Form, HOLD_TIME_MAX, Head, Judge, Rules, Terms, UsageTerms, Verdict};
use crate::exchange::{Committed, CutBy, Exchange, Kept};
use crate::request::call::Call;
use crate::request::content_type::is_event_stream;
use crate::response::decode::{Decoder, Encoding};
use crate::response::redact::Secrets;
use crate::routing::pool::Endpoint;
use crate::routing::retry::{Outcome, Place};
use crate::upstream::cork::Cork;
use crate::usage::Reported;
use crate::usage::prices::PricedTokens;

/// What an answer cost, in US dollars.
const COST: &str = "x-api-together-cost-usd";
/// A comment, which every reader of streams skips and every proxy on the way takes for life.
const PING: Bytes = Bytes::from_static(b": ping\n\n");

/// The response of the attempt under way.
pub(super) struct HeldResponse {
    exchange: Arc<Exchange>,
    pub(super) plan: Plan,
    judge: Judge,
    /// Held tasks; bounded by the judge.
    held: Vec<HttpTask>,
    committed: bool,
    header: HeaderSeen,
    pub(super) timers: Timers,
    /// Endpoint of the attempt.
    endpoint: Option<Arc<Endpoint>>,
    secrets: Secrets,
    pub(super) outlet: Outlet,
    /// Decoder for the judge, which reads a compressed answer separately.
    decoder: Option<Decoder>,
}

/// What the header of the attempt's answer said.
#[derive(Debug, Default)]
struct HeaderSeen {
    status: u16,
    content_type: Option<HeaderValue>,
    encoding: Option<Encoding>,
    usage_injected: bool,
}

/// Action that is due when a deadline has passed.
pub(super) enum DueAction {
    /// This goes out.
    Flush(Vec<HttpTask>),
    /// These go out as they are: a header of our own, comments. Nothing is committed by them.
    Raw(Vec<HttpTask>),
    /// The response is whole and ends now, with this.
    End(Vec<HttpTask>),
    /// The attempt is over.
    GiveUp,
    /// Nothing yet.
    Wait,
}

impl HeldResponse {
    pub(super) fn new(plan: Plan, exchange: &Arc<Exchange>) -> Self {
        let nothing = Terms {
            call: Call::Other,
            streams: false,
            expects_body: true,
            more: false,
            more_keys: false,
            more_if_empty: false,
            searches: false,
            usage: UsageTerms::default(),
        };
        Self {
            exchange: Arc::clone(exchange),
            outlet: Outlet::new(exchange, plan.framing),
            plan,
            judge: Judge::new(nothing),
            held: Vec::new(),
            committed: false,
            header: HeaderSeen::default(),
            timers: Timers::default(),
            endpoint: None,
            secrets: Secrets::default(),
            decoder: None,
        }
    }

    /// Begins an attempt, and clears the state of the last one.
    pub(super) fn begin_attempt(&mut self) {
        self.held.clear();
        self.decoder = None;
        let ping_at = self.timers.ping_at;
        self.timers = Timers::default();
        let state = self.exchange.state();
        if let Some(attempt) = &state.attempt {
            self.judge = Judge::new(attempt.terms);
            self.timers.deadline = attempt.sent_at.checked_add(attempt.first_byte_timeout);
            if let Some(ping) = self.plan.ping {
                // The silence of an attempt before counts as well.
                self.timers.ping_at = ping_at.or_else(|| attempt.sent_at.checked_add(ping));
            }
            self.secrets = attempt.secrets();
            self.endpoint = Some(Arc::clone(&attempt.asked.endpoint));
        }
    }

    /// The exchange that it holds an answer of.
    pub(super) fn exchange(&self) -> Arc<Exchange> {
        Arc::clone(&self.exchange)
    }

    /// Notes that the answer is cut off, since its caller's key was revoked, or somebody ended it.
    pub(super) fn note_cut(&self, by: CutBy) {
        let mut state = self.exchange.state();
        state.cut = Some(by);
        state.ended = Some(Outcome::ClientGone);
    }

    fn idle(&self) -> Duration {
        self.endpoint.as_ref().map_or(Duration::MAX, |endpoint| endpoint.config.timeouts.idle)
    }

    /// Judges, by the rules of the config.
    fn judged(&mut self, judge: impl FnOnce(&mut Judge, &Rules<'_>) -> Verdict) -> Verdict {
        let errors = self.endpoint.as_ref().map_or(&[][..], |endpoint| &endpoint.config.errors);
        let rules = Rules { retry: &self.plan.pool.server.retry, errors };
        judge(&mut self.judge, &rules)
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

    /// True if the client has a header of ours and nothing but comments, so that another endpoint may still take over.
    pub(super) fn is_merely_opened(&self) -> bool {
        self.outlet.opened && !self.committed
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
            HttpTask::Header(ref header, _) if header.status.is_informational() => {
                let is_flood = self.exchange.state().attempt.as_mut().is_some_and(Attempt::interim_came);
                return Ok(if is_flood { Verdict::Drop(Outcome::Broken) } else { Verdict::Hold });
            }
            HttpTask::Header(ref header, end) => self.take_in_header(header, end),
            HttpTask::Body(Some(ref piece), end) | HttpTask::UpgradedBody(Some(ref piece), end)
                if !piece.is_empty() =>
            {
                self.note_byte(now);
                self.judge_body(piece, end, now)
            }
            HttpTask::Body(_, false) | HttpTask::UpgradedBody(_, false) => return Ok(Verdict::Hold),
            HttpTask::Body(_, true) | HttpTask::UpgradedBody(_, true) | HttpTask::Trailer(_) | HttpTask::Done => {
                self.judged(Judge::end)
            }
        };
        self.held.push(task);
        self.move_deadline(now);
        if verdict == Verdict::Commit && self.is_merely_opened() && !self.goes_on_as_stream() {
            // The client has the header of a stream already, which the endpoint could not know of.
            let outcome = self.judge.take_outcome().unwrap_or(Outcome::NotStreamed);
            return Ok(Verdict::Drop(outcome));
        }
        Ok(verdict)
    }

    fn goes_on_as_stream(&self) -> bool {
        self.header.status == 200 && self.judge.form() == Some(Form::Stream) && self.header.encoding.is_none()
    }

    fn take_in_header(&mut self, header: &ResponseHeader, end: bool) -> Verdict {
        let status = header.status.as_u16();
        let content_type = header.headers.get(CONTENT_TYPE);
        let content_type_text = content_type.and_then(|value| value.to_str().ok());
        let mut head = Head { status, content_type: content_type_text, wait: None, end, ends_with_connection: false };
        self.header = HeaderSeen { status, content_type: content_type.cloned(), encoding: None, usage_injected: false };
        if let Some(attempt) = &mut self.exchange.state().attempt {
            attempt.header_came(Outcome::of_status(status, attempt.wait));
            head.wait = attempt.wait;
            head.ends_with_connection = attempt.ends_with_connection;
            self.header.usage_injected = attempt.terms.usage.injected;
            self.header.encoding = attempt.encoding;
        }
        self.decoder = self.header.encoding.map(Decoder::new);
        self.judged(|judge, rules| judge.header(head, rules))
    }

    /// Decodes a piece for the judge, which reads plain text only.
    fn judge_body(&mut self, piece: &Bytes, end: bool, now: Instant) -> Verdict {
        let Some(decoder) = &mut self.decoder else {
            return self.judged(|judge, rules| judge.body(piece, end, rules, now));
        };
        let mut plain = Vec::new();
        decoder.feed(piece, |part| plain.extend_from_slice(&part));
        if decoder.is_broken() && !self.judge.is_error() {
            return self.judge.commit();
        }
        self.judged(|judge, rules| judge.body(&plain.into(), end, rules, now))
    }

    fn note_byte(&self, now: Instant) {
        if let Some(attempt) = &mut self.exchange.state().attempt {
            attempt.first_byte_came(now);
        }
    }

    fn move_deadline(&mut self, now: Instant) {
        if self.judge.holds_stream() {
            let was_held_for_data = self.judge.has_data();
            self.timers.held_until = match self.timers.held_until {
                // Once opened, only data bounds the hold again.
                None if was_held_for_data || !self.outlet.opened => now.checked_add(HOLD_TIME_MAX),
                held_until => held_until,
            };
            self.timers.pace_known_at = self.judge.pace_known_at();
        }
        if let Some(wait) = self.judge.patience(self.idle()) {
            self.timers.deadline = now.checked_add(wait);
            self.timers.thinking_ends = self.thinking_ends(now);
        }
    }

    /// A stream that has said nothing, or a body of blank lines, thinks. JSON that has begun is being written.
    fn thinking_ends(&self, now: Instant) -> Option<Instant> {
        let thinks = self.judge.has_bytes() && !self.judge.is_error() && self.judge.form() != Some(Form::Json);
        let from_now_on = || now.checked_add(self.endpoint.as_ref()?.config.timeouts.thinking);
        if thinks { self.timers.thinking_ends.or_else(from_now_on) } else { None }
    }

    /// Chooses how the body is read on its way, now that its form is known.
    fn choose_reading(&mut self) {
        let HeaderSeen { status, ref content_type, encoding, usage_injected } = self.header;
        let content_type = content_type.as_ref().and_then(|value| value.to_str().ok());
        let header = BodyHeader { status, content_type, form: self.judge.form(), encoding, usage_injected };
        self.outlet.reading = Reading::new(&header, &self.secrets);
    }

    /// Commits the answer, and returns the held tasks.
    pub(super) fn commit(&mut self, now: Instant) -> Vec<HttpTask> {
        self.committed = true;
        self.timers.committed();
        self.decoder = None;
        self.choose_reading();
        self.label_stream();
        self.add_cost(now);
        let outcome = self.judge.take_outcome();
        self.judge.commit();
        let event_stream = self.outlet.reading.takes_events();
        let mut state = self.exchange.state();
        state.committed = Some(Committed { at: now, event_stream, between_events: true, complete: None });
        state.kept = None;
        if let Some(attempt) = &mut state.attempt {
            if let Some(outcome) = outcome {
                attempt.means(outcome);
            }
            attempt.is_empty = self.judge.let_empty_through();
            attempt.committed(&self.plan.pool, now);
        }
        state.settle_charges(false);
        drop(state);
        mem::take(&mut self.held)
    }

    /// A stream that its endpoint calls something else is called one: some clients go by the label.
    fn label_stream(&mut self) {
        let content_type = self.header.content_type.as_ref().and_then(|value| value.to_str().ok());
        if self.judge.form() != Some(Form::Stream) || is_event_stream(content_type) {
            return;
        }
        if let Some(HttpTask::Header(header, _)) = self.held.first_mut() {
            // The name is known to be valid.
            header.insert_header(CONTENT_TYPE, HeaderValue::from_static("text/event-stream")).unwrap_or_default();
        }
    }

    /// Says what a JSON answer cost, if it is here as a whole and the config wants it said. Of others it is not known yet.
    fn add_cost(&mut self, now: Instant) {
        let is_whole =
            || matches!(self.held.last(), Some(HttpTask::Body(_, true) | HttpTask::Done | HttpTask::Trailer(_)));
        if !self.plan.pool.server.cost_header
            || self.header.status != 200
            || self.header.encoding.is_some()
            || !is_whole()
        {
            return;
        }
        let price = self.exchange.state().attempt.as_ref().and_then(|attempt| {
            let body: Vec<&Bytes> = self.held.iter().filter_map(body_of).collect();
            let usage = match &*body {
                [whole] => Reported::from_json(whole)?.usage,
                pieces => {
                    Reported::from_json(&pieces.iter().flat_map(|piece| piece.iter().copied()).collect::<Vec<u8>>())?
                        .usage
                }
            };
            let (model, wall) = (attempt.model.name().name, attempt.clock_at(now).wall);
            attempt.asked.endpoint.prices.cost(model, &PricedTokens::of(&usage), attempt.tier, wall)
        });
        if let (Some(price), Some(HttpTask::Header(header, _))) = (price, self.held.first_mut()) {
            // Digits and a point are a value.
            header.insert_header(COST, price.to_string()).unwrap_or_default();
        }
    }

    /// Ends the attempt; an error answer is kept in case that nothing better comes.
    pub(super) fn drop_answer(&mut self, outcome: Outcome) {
        self.measure_held();
        let held = mem::take(&mut self.held);
        let error_body = self.judge.take_error_body();
        let kept = match (outcome, error_body) {
            (Outcome::Error { meaning, place: Place::Body | Place::Event }, Some(body)) => {
                Kept::of_error(held, meaning.status, &body, &self.secrets)
            }
            _ if self.header.status >= 400 => {
                let encoding = self.header.encoding.filter(|encoding| *encoding != Encoding::Unknown);
                Kept::new(held, encoding, &self.secrets)
            }
            _ => None,
        };
        let mut state = self.exchange.state();
        state.kept = kept;
        state.ended = Some(outcome);
    }

    /// Measures the held tasks, which never reach the client but may report tokens.
    pub(super) fn measure_held(&mut self) {
        if self.committed || self.header.status >= 400 || self.held.is_empty() {
            return;
        }
        self.choose_reading();
        let Some(attempt) = &mut self.exchange.state().attempt else { return };
        let mut unseen = Vec::new();
        for task in &self.held {
            if let HttpTask::Body(Some(piece), _) = task {
                self.outlet.reading.piece(piece.clone(), &mut attempt.meter, &mut unseen);
            }
        }
        self.outlet.reading.end(&mut attempt.meter, &mut unseen);
        attempt.note_measured();
    }

    /// Takes what may go to a client that has the header of a stream: the comments that have come.
    pub(super) fn take_comments(&mut self) -> Option<HttpTask> {
        if !self.is_merely_opened() || self.judge.has_data() || self.judge.form() != Some(Form::Stream) {
            return None;
        }
        let all: Vec<u8> = self.held.iter().filter_map(body_of).flatten().copied().collect();
        let incomplete = self.judge.incomplete_event().to_vec();
        let comments = all.len().checked_sub(incomplete.len()).filter(|length| *length > 0)?;
        self.held.retain(|task| body_of(task).is_none());
        if !incomplete.is_empty() {
            self.held.push(HttpTask::Body(Some(incomplete.into()), false));
        }
        Some(HttpTask::Body(Some(Bytes::copy_from_slice(all.get(..comments)?)), false))
    }

    /// Opens the stream to the client with a header of our own, unless it is open.
    fn open(&mut self) -> Option<HttpTask> {
        if mem::replace(&mut self.outlet.opened, true) || self.committed {
            return None;
        }
        self.exchange.state().opened = true;
        let mut parts = Response::new(()).into_parts().0;
        parts.headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        parts.headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        if self.plan.framing == Framing::Chunks {
            parts.headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        self.plan.own_headers.add_to(&mut parts.headers);
        Some(HttpTask::Header(Box::new(parts.into()), false))
    }

    /// Returns the tasks to write, and the error that follows them, if one does.
    pub(super) fn outgoing(&mut self, tasks: Vec<HttpTask>, gathers: bool) -> (Vec<HttpTask>, Option<Box<Error>>) {
        self.outlet.outgoing(tasks, gathers)
    }

    /// Starts the deadlines again after a write: the endpoint is waited for.
    pub(super) fn resume(&mut self) {
        let ping = self.ping_time();
        let (idle, now) = (self.idle(), Instant::now());
        if self.committed {
            self.timers.resume(now, idle, self.outlet.complete, ping);
        } else {
            self.timers.ping_at = ping.and_then(|ping| now.checked_add(ping));
        }
    }

    /// A ping or comments have been written. The endpoint's deadlines stand: it has said nothing.
    pub(super) fn pinged(&mut self) {
        self.timers.ping_at = self.ping_time().and_then(|ping| Instant::now().checked_add(ping));
    }

    fn ping_time(&self) -> Option<Duration> {
        self.plan.ping.filter(|_| self.outlet.opened || self.outlet.reading.takes_events())
    }

    /// Returns the action that is due now.
    pub(super) fn due(&mut self) -> DueAction {
        let now = Instant::now();
        match self.timers.due(now) {
            None => DueAction::Wait,
            Some(Due::End) => DueAction::End(self.outlet.end_whole()),
            Some(Due::Pace) => self.pace_is_known(now),
            Some(Due::Release) => self.release(now),
            Some(Due::Ping) => self.ping(now),
            Some(Due::GiveUp) => self.give_up(now),
        }
    }

    fn pace_is_known(&mut self, now: Instant) -> DueAction {
        self.timers.pace_known_at = None;
        let verdict = self.judged(|judge, rules| judge.pace(rules, now).unwrap_or(Verdict::Hold));
        match verdict {
            Verdict::Hold => DueAction::Wait,
            Verdict::Commit => DueAction::Flush(self.commit(now)),
            Verdict::Drop(outcome) => {
                self.drop_answer(outcome);
                DueAction::GiveUp
            }
        }
    }

    /// A stream has been held long enough: what has said anything goes out whole; of one that only thinks, the comments do.
    fn release(&mut self, now: Instant) -> DueAction {
        self.timers.held_until = None;
        if self.judge.has_data() || !self.judge.may_drop() {
            return DueAction::Flush(self.commit(now));
        }
        if !self.plan.streams || self.header.encoding.is_some() {
            return DueAction::Wait;
        }
        let header = self.open();
        DueAction::Raw(header.into_iter().chain(self.take_comments()).collect())
    }

    fn ping(&mut self, now: Instant) -> DueAction {
        let Some(ping) = self.plan.ping else { return DueAction::Wait };
        self.timers.ping_at = now.checked_add(ping);
        if self.committed && self.outlet.reading.is_within_event() {
            return DueAction::Wait;
        }
        let header = self.open();
        DueAction::Raw(header.into_iter().chain([HttpTask::Body(Some(PING), false)]).collect())
    }

    fn give_up(&mut self, now: Instant) -> DueAction {
        if self.committed {
            self.exchange.state().ended = Some(Outcome::TooSlow);
            return DueAction::GiveUp;
        }
        if self.judge.has_data() && !self.judge.may_drop() {
            return DueAction::Flush(self.commit(now));
        }
        let outcome = self.judge.outcome_if_cut().unwrap_or(Outcome::TooSlow);
        self.drop_answer(outcome);
        DueAction::GiveUp
    }
}

fn body_of(task: &HttpTask) -> Option<&Bytes> {
    match task {
        HttpTask::Body(Some(piece), _) => Some(piece),
        _ => None,
    }
}
