//! One attempt at one endpoint: the guards it holds, and what it reports to the endpoint's health.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;

use super::charge::{Asked, Charge};
use super::objects::is_object_missing;
use super::{Ask, AttemptBudget, AttemptObjects};
use crate::config::{Breaker, Server, StreamUsage, Trouble};
use crate::exchange::judge::Terms;
use crate::fault::HeldBy;
use crate::ledger::{AccountSet, Client, Drawn, Permit};
use crate::limit::Clock;
use crate::request::call::Call;
use crate::request::fields::ServiceTier;
use crate::request::shape::CallShape;
use crate::request::trace;
use crate::request_log::{Attempted, Name};
use crate::response::classify::Meaning;
use crate::response::decode::Encoding;
use crate::response::redact::Secrets;
use crate::routing::admission::Choice;
use crate::routing::health::{Effect, Scope};
use crate::routing::health_record::Trial;
use crate::routing::lanes::{LaneInFlight, LaneLive};
use crate::routing::live::InFlight;
use crate::routing::pool::{Endpoint, Pool};
use crate::routing::retry::Outcome;
use crate::routing::router::ModelName;
use crate::routing::sessions::{Affinity, Session};
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
        /// How it ended.
        outcome: Outcome,
        /// True if an answer with a status of success was let through before.
        succeeded: bool,
    },
}

/// The model that an attempt asks its endpoint for.
#[derive(Clone, Debug, Default)]
pub struct AskedModel {
    /// The name it is mapped to, where that is not the client's own.
    pub mapped: Option<Arc<str>>,
    /// The name that the client sent, if it sent one.
    pub named: Option<Arc<str>>,
    /// True if the config has the name that the endpoint is sent.
    pub in_config: bool,
}

impl AskedModel {
    /// The name that the endpoint is sent.
    pub fn name(&self) -> ModelName<'_> {
        let name = self.mapped.as_deref().or(self.named.as_deref()).unwrap_or_default();
        ModelName { name, in_config: self.in_config }
    }
}

/// Label in the request log of an attempt that its request ended without.
const UNFINISHED: &str = "unfinished";

/// Interim answers (1xx) of one attempt, which are not sent on.
const INTERIM_MAX: u8 = 100;

/// One attempt at one endpoint. Its outcome is counted once; an attempt that is dropped before that counts for nothing.
#[derive(Debug)]
pub struct Attempt {
    /// The endpoint, and the key that it is sent.
    pub asked: Asked,
    /// The model it is asked for.
    pub model: AskedModel,
    /// Shape of the call, if the endpoint is remembered to have it or not.
    pub shape: Option<CallShape>,
    /// Terms by which the answer is judged.
    pub terms: Terms,
    /// Timeout until the first byte.
    pub first_byte_timeout: Duration,
    stage: Stage,
    /// The endpoint refused the `stream_options` that were added to this attempt, so it is repeated without.
    pub usage_refused: bool,
    /// True if the answer ends when the connection does.
    pub ends_with_connection: bool,
    /// Pause that an error's headers ask for, as the endpoint sent them.
    pub wait: Option<Duration>,
    /// Time for which nothing is left of a limit, as a good answer says.
    pub until_room: Option<Duration>,
    /// Compression of the body; `None` if it is plain.
    pub encoding: Option<Encoding>,
    /// Measurements of the answer.
    pub meter: Meter,
    /// True if the answer was let through although it has nothing in it.
    pub is_empty: bool,
    /// Metrics of its endpoint and model.
    pub counters: Option<Arc<Counters>>,
    /// The objects of its request and its answer.
    pub objects: Option<Box<AttemptObjects>>,
    /// The request's session.
    pub session: Option<Session>,
    /// How that is served by this attempt.
    pub affinity: Option<Affinity>,
    /// Tier of service that is asked for.
    pub tier: Option<ServiceTier>,
    /// What is reserved of the caller's budgets.
    pub budget: Option<Box<AttemptBudget>>,
    permit: Permit,
    /// When the endpoint was chosen.
    chosen_at: Clock,
    started: Instant,
    /// When the header was sent.
    pub sent_at: Instant,
    /// Interim answers so far.
    interim: u8,
    trial: Option<Trial>,
    /// Its failure, as long as it may be the request's.
    charge: Option<Charge>,
    /// Its span of the request's trace.
    pub span: u64,
    /// Candidates that could not be asked in its place, if requests are logged.
    pub passed_over: Vec<HeldBy>,
    breaker: Breaker,
    first_byte: Option<Duration>,
    first_token: Option<Instant>,
    in_flight: Option<(InFlight, Option<LaneInFlight>)>,
}

impl Attempt {
    /// An attempt that begins now.
    pub fn new(
        endpoint: &Arc<Endpoint>,
        model: AskedModel,
        terms: Terms,
        choice: Choice,
        server: &Server,
        now: Instant,
    ) -> Self {
        let asked = Asked::new(endpoint, choice.lane);
        Self {
            in_flight: Some((endpoint.live.enter(), asked.lane_live().map(LaneLive::enter))),
            asked,
            model,
            shape: None,
            terms,
            interim: 0,
            first_byte_timeout: endpoint.config.timeouts.first_byte,
            stage: Stage::Waiting,
            usage_refused: false,
            ends_with_connection: false,
            wait: None,
            until_room: None,
            encoding: None,
            meter: Meter::new(terms.call, server.estimate_tokens),
            is_empty: false,
            counters: None,
            objects: None,
            session: None,
            affinity: None,
            tier: None,
            budget: None,
            permit: choice.permit,
            chosen_at: choice.at,
            started: now,
            sent_at: now,
            trial: choice.trial,
            charge: None,
            span: trace::span(),
            passed_over: Vec::new(),
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
            self.set_budget_sent(true);
        }
        holds
    }

    fn set_budget_sent(&mut self, is_sent: bool) {
        if let Some(budget) = &mut self.budget {
            budget.set_sent(is_sent);
        }
    }

    /// Takes what the answer has taken so far out of the caller's budgets. True if one of them has no room for more, and the answer is
    /// to be cut off.
    pub fn passes_budget(&mut self) -> bool {
        let bytes = self.meter.text_bytes();
        self.budget.as_mut().is_some_and(|budget| budget.watch(bytes))
    }

    /// Gives the permit back: the endpoint is known never to have received the request.
    pub fn never_sent(&mut self) {
        self.permit.never_sent();
        self.set_budget_sent(false);
    }

    /// Prepares to be sent again. The endpoint may have counted the first time, so that takes another permit.
    pub async fn begin_anew(&mut self, ledger: &Client) -> Result<(), Drawn> {
        self.stage = Stage::Waiting;
        self.first_byte = None;
        self.started = Instant::now();
        if !self.permit.is_spent() {
            return Ok(());
        }
        if self.accounts().is_limited() {
            return self.swap_permit(ledger).await;
        }
        self.permit = ledger.unlimited(self.accounts());
        Ok(())
    }

    /// The secrets that its answer must not show.
    pub fn secrets(&self) -> Secrets {
        self.asked.lane().map(|lane| lane.secrets.clone()).unwrap_or_default()
    }

    /// The accounts that it counts in.
    pub fn accounts(&self) -> &Arc<AccountSet> {
        self.permit.accounts()
    }

    /// Takes another permit for what the endpoint counts as another request on the same connection, unless there is one that was not
    /// spent.
    pub async fn take_another_permit(&mut self, ledger: &Client) -> Result<(), Drawn> {
        if self.permit.is_unspent() && !self.permit.is_stale(&ledger.clock()) {
            return Ok(());
        }
        if self.accounts().is_limited() {
            return self.swap_permit(ledger).await;
        }
        self.permit = ledger.unlimited(self.accounts());
        Ok(())
    }

    /// Spends it.
    pub fn spend_another_permit(&mut self) {
        self.permit.spend();
    }

    /// Counts another request that the endpoint has taken, whether there was a permit for it or not.
    pub fn count_another(&self, ledger: &Client) {
        ledger.unlimited(self.accounts()).spend();
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

    /// Notes an interim answer (1xx). True if the endpoint sends nothing else, and is given up.
    pub fn interim_came(&mut self) -> bool {
        self.interim = self.interim.saturating_add(1);
        self.interim > INTERIM_MAX
    }

    /// Notes the header of the answer.
    pub fn header_came(&mut self, outcome: Outcome) {
        self.stage = Stage::Held(outcome);
    }

    /// Notes what the answer means, once its body has been read, or an event of it that says otherwise.
    pub fn means(&mut self, outcome: Outcome) {
        if let Stage::Held(known) | Stage::Committed(known) = &mut self.stage {
            *known = outcome;
        }
    }

    /// What the error meant that it ended with.
    pub fn meaning(&self) -> Option<Meaning> {
        self.concluded()?.meaning().copied()
    }

    /// How it ended, once it has.
    fn concluded(&self) -> Option<&Outcome> {
        match &self.stage {
            Stage::Concluded { outcome, .. } => Some(outcome),
            _ => None,
        }
    }

    /// The attempt as the request log has it, at its end. `came`: when the request came.
    pub(crate) fn entry(&self, came: Instant, now: Instant) -> Attempted {
        let outcome = self.concluded();
        let meaning = outcome.and_then(Outcome::meaning);
        let status = match outcome {
            Some(Outcome::Answered { status }) => Some(*status),
            _ => meaning.map(|meaning| meaning.status),
        };
        let name = self.model.mapped.as_ref().or(self.model.named.as_ref());
        Attempted {
            began: self.started.saturating_duration_since(came),
            took: now.saturating_duration_since(self.started),
            first_byte: self.first_byte,
            endpoint: Arc::clone(&self.asked.endpoint.config.id),
            lane: self.asked.lane().filter(|lane| lane.live().is_some()).map(|lane| Arc::clone(&lane.config.label)),
            model: name.map(|name| if self.model.in_config { Name::Known(Arc::clone(name)) } else { Name::any(name) }),
            span: self.span,
            outcome: outcome.map_or(UNFINISHED, Outcome::label),
            status,
            trouble: meaning.map(|meaning| (meaning.trouble.name(), meaning.rule)),
            passed_over: self.passed_over.clone(),
        }
    }

    /// Takes the failure that may be the request's.
    pub fn take_charge(&mut self) -> Option<Charge> {
        self.charge.take()
    }

    /// True once the header of its answer has come.
    pub fn has_header(&self) -> bool {
        !matches!(self.stage, Stage::Waiting)
    }

    /// True once an answer with a status of success has been let through.
    pub fn has_succeeded(&self) -> bool {
        match &self.stage {
            Stage::Committed(outcome) => outcome.is_success(),
            Stage::Concluded { succeeded, .. } => *succeeded,
            Stage::Waiting | Stage::Held(_) => false,
        }
    }

    /// Notes that the answer is let through. A good one may still break off, so it is concluded at its end.
    pub fn committed(&mut self, pool: &Pool, now: Instant) {
        let Stage::Held(outcome) = self.stage else { return };
        if !matches!(outcome, Outcome::Answered { .. }) {
            self.conclude(&outcome);
            return;
        }
        self.stage = Stage::Committed(outcome);
        self.remember_refusal(pool);
        if let (Some(session), true) = (&self.session, outcome.is_success()) {
            pool.sessions.note(session, self.affinity, &self.asked.endpoint, &pool.ledger, &self.chosen_at.at(now));
        }
        if let (Some(objects), true) = (&self.objects, outcome.is_success()) {
            objects.answered(&self.asked);
        }
        let trial = self.trial.is_some();
        self.report_to_health(&outcome, Effect::Answers);
        if let (Some(wait), true) = (self.until_room, outcome.is_success()) {
            self.asked.rest_unasked(&self.model, wait, &self.breaker);
        }
        if trial {
            log::info!("{}: answers again", self.asked.words());
        }
        self.report_first_byte(now);
    }

    /// Remembers an endpoint that refused `stream_options` and has answered now without them, and one that compresses its
    /// streams, from which the usage cannot be taken out.
    fn remember_refusal(&self, pool: &Pool) {
        let endpoint = &self.asked.endpoint;
        if self.usage_refused || self.terms.usage.injected && self.encoding.is_some() {
            endpoint.live.usage_injection.note_refused(pool.clock().boot);
        }
        if self.terms.usage.injected && self.encoding.is_none() {
            endpoint.live.usage_injection.note_accepted(self.chosen_at.boot);
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

    /// Notes the objects in a piece of its answer, which the client is sent afterwards.
    pub fn read_objects(&mut self, piece: &Bytes, is_stream: bool, ends: bool) {
        let succeeded = self.has_succeeded();
        if let Some(objects) = self.objects.as_mut().filter(|_| succeeded) {
            objects.read(piece, is_stream, ends, &self.asked);
        }
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
        if let Stage::Held(outcome) | Stage::Committed(outcome) = self.stage {
            self.conclude(&outcome);
        }
    }

    /// Decides if `stream_options` are added to the request.
    pub fn inject_usage(&mut self, ask: &Ask) -> bool {
        let endpoint = &self.asked.endpoint;
        let now = self.chosen_at.boot;
        self.terms.usage.injected = ask.call == Call::Completion
            && ask.usage_edit.is_some()
            && endpoint.config.stream_usage == StreamUsage::Auto
            && !self.usage_refused
            && endpoint.live.usage_injection.state(now) == UsageInjection::Wanted;
        self.terms.usage.is_proven = endpoint.live.usage_injection.has_accepted(now);
        self.terms.usage.injected
    }

    /// Counts how the attempt ended, once: in the metrics, the log, and the endpoint's health.
    pub fn conclude(&mut self, outcome: &Outcome) {
        if matches!(self.stage, Stage::Concluded { .. }) {
            return;
        }
        self.stage = Stage::Concluded { outcome: *outcome, succeeded: self.has_succeeded() };
        if let Some(metrics) = metrics() {
            metrics.attempt(&self.asked.endpoint.config.id, outcome.label(), self.counters.as_deref());
            if let Some(meaning) = outcome.meaning() {
                metrics.error(&self.asked.endpoint.config.id, meaning.trouble.name(), meaning.rule);
            }
        }
        self.remember_call(outcome);
        if let Some(objects) = self.objects.as_ref().filter(|_| is_object_missing(outcome)) {
            objects.missing(!self.terms.more && !self.terms.more_keys, &self.chosen_at);
        }
        let effect = outcome.effect(|| self.day_left());
        self.log_effect(outcome, effect);
        if outcome.is_shared_by_request() {
            self.charge = Some(self.charge(outcome, effect));
        } else {
            self.report_to_health(outcome, effect);
        }
    }

    /// Remembers whether the endpoint has the call.
    fn remember_call(&self, outcome: &Outcome) {
        let (Some(shape), paths) = (self.shape, &self.asked.endpoint.live.paths) else { return };
        // What it says may be about an object that the request names.
        let names_objects = self.objects.as_ref().is_some_and(|objects| objects.names_any());
        match outcome {
            Outcome::Answered { status: 200..=299 } => paths.note_served(shape),
            Outcome::Error { meaning, .. } if meaning.trouble == Trouble::CallMissing && !names_objects => {
                // Where the words are not known it may be about the model, which any client can make up.
                let of_model = (!meaning.is_known()).then(|| self.model.name().name);
                paths.note_missing(shape, of_model, Instant::now());
            }
            _ => {}
        }
    }

    /// True if its answer, which is one, goes to the client.
    pub fn answers_well(&self) -> bool {
        matches!(&self.stage, Stage::Committed(outcome) if outcome.is_success())
            || matches!(self.stage, Stage::Concluded { succeeded: true, .. })
    }

    /// True if a stream of its has had content. Those of calls whose events are not known are taken to have some.
    pub fn stream_has_content(&self) -> bool {
        let is_counted = || self.meter.reported().is_some_and(|usage| usage.tokens().completion > 0);
        !self.terms.call.is_text() || self.meter.has_token() || is_counted()
    }

    /// Logs a rest. A refused key is logged where it is charged.
    fn log_effect(&self, outcome: &Outcome, effect: Effect) {
        let Effect::Rest { scope, wait, guessed } = effect else { return };
        let (whom, name) = (self.asked.words(), self.model.name().name);
        let model = if scope == Scope::Model && !name.is_empty() { format!(", model {name:?}") } else { String::new() };
        let why = if guessed { "a guess, since it does not say for how long" } else { "as it asked" };
        log::info!("{whom}{model}: rests for {:.1} s, {why}; it {outcome}", wait.as_secs_f64());
    }

    /// The rest of the endpoint's day.
    fn day_left(&self) -> Duration {
        let wall = SystemTime::now();
        let (_, ends) = self.asked.endpoint.accounts.whole().limits.calendar.today_and_clear(wall);
        ends.duration_since(wall).unwrap_or_default()
    }

    fn charge(&mut self, outcome: &Outcome, effect: Effect) -> Charge {
        Charge {
            asked: self.asked.clone(),
            model: self.model.clone(),
            outcome: *outcome,
            effect,
            began: self.started,
            trial: self.trial.take(),
            breaker: self.breaker.clone(),
        }
    }

    fn report_to_health(&mut self, outcome: &Outcome, effect: Effect) {
        if matches!(effect, Effect::Answers | Effect::Success | Effect::Neutral) {
            let trial = self.trial.take();
            self.asked.note_well(&self.model, (effect, self.started), trial.as_ref(), &self.breaker);
        } else {
            self.charge(outcome, effect).apply();
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
            self.asked.endpoint.live.observe_first_byte(took, self.started + took);
        }
    }

    /// The clocks at a moment of this attempt, for statistics.
    pub fn clock_at(&self, now: Instant) -> Clock {
        self.chosen_at.at(now)
    }
}
