//! One attempt at one endpoint: the guards it holds, and what it reports to the endpoint's health.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Ask;
use crate::config::{Breaker, Server, StreamUsage};
use crate::exchange::judge::Terms;
use crate::ledger::{Client, Drawn, Permit};
use crate::limit::Clock;
use crate::request::call::Call;
use crate::response::decode::Encoding;
use crate::routing::admission::Choice;
use crate::routing::health::Effect;
use crate::routing::pool::{Endpoint, InFlight, Pool, Trial};
use crate::routing::retry::Outcome;
use crate::routing::usage_injection::UsageInjection;
use crate::telemetry::metrics::{Counters, metrics};
use crate::usage::Meter;

/// Progress of an attempt's answer.
#[derive(Debug)]
enum Stage {
    /// The header has not come.
    Waiting,
    /// The header has come, with this outcome; the client has seen nothing of it.
    Held(Outcome),
    /// It is let through to the client.
    Committed(Outcome),
    /// The attempt's outcome has been counted, once and for all.
    Concluded {
        /// True if an answer with a status of success was let through before.
        succeeded: bool,
    },
}

/// One attempt at one endpoint. Its outcome is counted once; an attempt that is dropped before that counts for nothing.
#[derive(Debug)]
pub struct Attempt {
    /// The endpoint.
    pub endpoint: Arc<Endpoint>,
    /// The model it is asked for, where that is not the client's own name.
    pub model: Option<Arc<str>>,
    /// Terms by which the answer is judged.
    pub terms: Terms,
    /// Timeout until the first byte.
    pub first_byte_timeout: Duration,
    stage: Stage,
    /// The endpoint refused the `stream_options` that were added to this attempt, so it is repeated without.
    pub usage_refused: bool,
    /// True if the answer ends when the connection does.
    pub ends_with_connection: bool,
    /// Compression of the body; `None` if it is plain.
    pub encoding: Option<Encoding>,
    /// Measurements of the answer.
    pub meter: Meter,
    /// Metrics of its endpoint and model.
    pub counters: Option<Arc<Counters>>,
    permit: Permit,
    /// When the endpoint was chosen.
    chosen_at: Clock,
    started: Instant,
    /// When the header was sent.
    pub sent_at: Instant,
    trial: Option<Trial>,
    breaker: Breaker,
    first_byte: Option<Duration>,
    first_token: Option<Instant>,
    in_flight: Option<InFlight>,
}

impl Attempt {
    /// An attempt that begins now.
    pub fn new(
        endpoint: &Arc<Endpoint>,
        model: Option<Arc<str>>,
        terms: Terms,
        choice: Choice,
        server: &Server,
        now: Instant,
    ) -> Self {
        Self {
            in_flight: Some(endpoint.live.enter()),
            endpoint: Arc::clone(endpoint),
            model,
            terms,
            first_byte_timeout: endpoint.config.timeouts.first_byte,
            stage: Stage::Waiting,
            usage_refused: false,
            ends_with_connection: false,
            encoding: None,
            meter: Meter::new(terms.call, server.estimate_tokens),
            counters: None,
            permit: choice.permit,
            chosen_at: choice.at,
            started: now,
            sent_at: now,
            trial: choice.trial,
            breaker: server.breaker.clone(),
            first_byte: None,
            first_token: None,
        }
    }

    /// Draws a fresh permit for a header that goes out so late that its first permit has expired. If there is none, returns what
    /// the draw came to.
    pub async fn send(&mut self, ledger: &Client) -> Result<(), Drawn> {
        // On an overloaded machine a fresh permit may have expired again when it arrives.
        const SWAPS_MAX: usize = 3;
        for _ in 0..SWAPS_MAX {
            self.swap_permit(ledger).await?;
            if self.send_now(&ledger.clock()) {
                return Ok(());
            }
        }
        Err(Drawn::Unavailable)
    }

    /// Sends the header now if the permit is still valid.
    pub fn send_now(&mut self, clock: &Clock) -> bool {
        let holds = !self.permit.is_stale(clock);
        if holds {
            self.permit.spend();
            self.sent_at = clock.now;
        }
        holds
    }

    /// Gives the permit back: the endpoint is known never to have received the request.
    pub fn never_sent(&mut self) {
        self.permit.never_sent();
    }

    /// Prepares to be sent again. The endpoint may have counted the first time, so that takes another permit.
    pub async fn begin_anew(&mut self, ledger: &Client) -> Result<(), Drawn> {
        self.stage = Stage::Waiting;
        self.first_byte = None;
        self.started = Instant::now();
        if !self.permit.is_spent() {
            return Ok(());
        }
        if self.endpoint.limits.any() {
            return self.swap_permit(ledger).await;
        }
        let (account, limits) = self.endpoint.account();
        self.permit = ledger.unlimited(&account, &limits);
        Ok(())
    }

    async fn swap_permit(&mut self, ledger: &Client) -> Result<(), Drawn> {
        match ledger.swap(&mut self.permit).await {
            Drawn::Granted(_, permit) => {
                self.permit = permit;
                Ok(())
            }
            none => Err(none),
        }
    }

    /// Notes the header of the answer.
    pub fn header_came(&mut self, outcome: Outcome) {
        self.stage = Stage::Held(outcome);
    }

    /// True once the header of its answer has come.
    pub fn has_header(&self) -> bool {
        !matches!(self.stage, Stage::Waiting)
    }

    /// True once an answer with a status of success has been let through.
    pub fn has_succeeded(&self) -> bool {
        match &self.stage {
            Stage::Committed(outcome) => is_success(outcome),
            Stage::Concluded { succeeded } => *succeeded,
            Stage::Waiting | Stage::Held(_) => false,
        }
    }

    /// Notes that the answer is let through. A good one may still break off, so it is concluded at its end.
    pub fn committed(&mut self, pool: &Pool, now: Instant) {
        let Stage::Held(outcome) = &self.stage else { return };
        let outcome = outcome.clone();
        if !matches!(outcome, Outcome::Status { status: 100..=399, .. }) {
            self.conclude(&outcome);
            return;
        }
        self.stage = Stage::Committed(outcome);
        self.remember_refusal(pool);
        let trial = self.trial.is_some();
        self.report_to_health(Effect::Answers);
        if trial {
            log::info!("endpoint {}: answers again", self.endpoint.config.id);
        }
        self.report_first_byte(now);
    }

    /// Remembers an endpoint that refused `stream_options` and has answered now without them, and one that compresses its
    /// streams, from which the usage cannot be taken out.
    fn remember_refusal(&self, pool: &Pool) {
        let endpoint = &self.endpoint;
        if self.usage_refused || self.terms.usage_injected && self.encoding.is_some() {
            endpoint.live.usage_injection.note_refused(pool.clock().boot);
        }
        if self.usage_refused {
            log::info!(
                "endpoint {}: it refused stream_options, so they are not added to its streams for an hour; set \
                 \"streamUsage\": \"never\" for it to make that permanent",
                endpoint.config.id
            );
        }
    }

    /// True if an answer that has ended was cut off: only the connection ended, and the content does not say that it is
    /// complete.
    pub fn is_cut(&self) -> bool {
        self.ends_with_connection && !self.meter.is_whole()
    }

    /// Releases the endpoint's place once its answer has ended and is good, before the client sees the last byte,
    /// so that a client that sends one request after the other finds it free.
    pub fn body_ended(&mut self) {
        self.request_ended();
        self.in_flight = None;
        self.permit.end();
    }

    /// Concludes the attempt at the end of the request.
    pub fn request_ended(&mut self) {
        if let Stage::Held(outcome) | Stage::Committed(outcome) = &self.stage {
            let outcome = outcome.clone();
            self.conclude(&outcome);
        }
    }

    /// Decides if `stream_options` are added to the request.
    pub fn inject_usage(&mut self, ask: &Ask) -> bool {
        let endpoint = &self.endpoint;
        self.terms.usage_injected = ask.call == Call::Completion
            && ask.usage_edit.is_some()
            && endpoint.config.stream_usage == StreamUsage::Auto
            && !self.usage_refused
            && endpoint.live.usage_injection.state(ask.pool.clock().boot) == UsageInjection::Wanted;
        self.terms.usage_injected
    }

    /// Counts how the attempt ended, once: in the metrics, the log, and the endpoint's health.
    pub fn conclude(&mut self, outcome: &Outcome) {
        if matches!(self.stage, Stage::Concluded { .. }) {
            return;
        }
        self.stage = Stage::Concluded { succeeded: self.has_succeeded() };
        if let Some(metrics) = metrics() {
            metrics.attempt(&self.endpoint.config.id, outcome.label(), self.counters.as_deref());
        }
        let endpoint = &self.endpoint;
        let id = &endpoint.config.id;
        if let Outcome::Status { status: status @ (401 | 403), .. } = outcome {
            log::warn!("endpoint {id}: its key is refused (status {status}); check its apiKey");
        }
        let effect = outcome.effect();
        match effect {
            Effect::Failure => endpoint.live.note_error(outcome.to_string()),
            Effect::Rest(wait) => log::info!("endpoint {id}: rests for {:.1} s, as it asked", wait.as_secs_f64()),
            Effect::Answers | Effect::Success | Effect::Neutral => {}
        }
        self.report_to_health(effect);
    }

    fn report_to_health(&mut self, effect: Effect) {
        let trial = self.trial.take();
        let live = &self.endpoint.live;
        if live.learn(effect, trial.is_some(), Instant::now, &self.breaker) {
            let seconds = self.breaker.cool_down.as_secs();
            let (id, errors) = (&self.endpoint.config.id, live.health().errors_in_row());
            log::warn!("endpoint {id}: {errors} errors in a row; cooling down for {seconds} s");
        }
    }

    /// Notes that the first byte of the answer's body has come.
    pub fn first_byte_came(&mut self, now: Instant) {
        self.first_byte.get_or_insert_with(|| now.saturating_duration_since(self.started));
    }

    /// Notes that the meter has seen more of the answer: of a stream, when its first token came.
    pub fn note_measured(&mut self) {
        if self.first_token.is_none() && self.meter.has_token() {
            self.first_token = Some(Instant::now());
        }
    }

    /// When the first token of a stream came.
    pub fn first_token(&self) -> Option<Instant> {
        self.first_token
    }

    /// The time to the first byte counts once the answer is known to be good.
    fn report_first_byte(&mut self, now: Instant) {
        self.first_byte_came(now);
        if let Some(took) = self.first_byte {
            self.endpoint.live.observe_first_byte(took, self.started + took);
        }
    }

    /// The clocks at a moment of this attempt, for statistics.
    pub fn clock_at(&self, now: Instant) -> Clock {
        self.chosen_at.at(now)
    }
}

fn is_success(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Status { status: 200..=299, .. })
}
