//! What an attempt showed, held against whom it belongs to: the endpoint, one of its models, or one of its keys.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::AskedModel;
use crate::config::{AlertEvent, Breaker, Trouble};
use crate::response::classify::{Meaning, Wait};
use crate::routing::health::{Effect, Gate, Scope, Seen};
use crate::routing::health_record::{HealthRecord, Trial};
use crate::routing::lanes::{Lane, LaneLive};
use crate::routing::pool::Endpoint;
use crate::routing::refusals::ADDRESS_REST;
use crate::routing::retry::Outcome;
use crate::telemetry::alerts;

/// Whom an attempt asks, with which key, and the records of health that it began under.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The endpoint.
    pub endpoint: Arc<Endpoint>,
    /// The key, by its place among the endpoint's.
    pub lane: usize,
    /// Number of the endpoint's record.
    record: u32,
    /// Number of the key's.
    lane_record: u32,
}

impl Asked {
    /// An endpoint that is asked now, with this key.
    pub fn new(endpoint: &Arc<Endpoint>, lane: usize) -> Self {
        let record = endpoint.live.health.number();
        let lane_record = endpoint.lanes.get(lane).and_then(Lane::live).map_or(0, |live| live.health.number());
        Self { endpoint: Arc::clone(endpoint), lane, record, lane_record }
    }

    /// The key.
    pub fn lane(&self) -> Option<&Lane> {
        self.endpoint.lanes.get(self.lane)
    }

    /// What the key has for itself, if it is one of several.
    pub fn lane_live(&self) -> Option<&Arc<LaneLive>> {
        self.lane()?.live()
    }

    /// The endpoint in words, with the key if it is one of several.
    pub fn words(&self) -> String {
        let id = &self.endpoint.config.id;
        match self.lane().filter(|lane| lane.live().is_some()) {
            Some(lane) => format!("endpoint {id}, key {}", lane.config.label),
            None => format!("endpoint {id}"),
        }
    }

    /// Takes in that the attempt went well, or that nothing can be said of it.
    pub fn note_well(
        &self,
        model: &AskedModel,
        (effect, began): (Effect, Instant),
        trial: Option<&Trial>,
        breaker: &Breaker,
    ) {
        let live = &self.endpoint.live;
        let seen = |record| Seen { effect, began, trial: trial.and_then(|trial| trial.scope_in(record)) };
        let (name, noted) = (model.name(), live.key(model.name()));
        live.learn(name, &seen(&live.health), self.record, Instant::now, breaker);
        if let Some(lane) = self.lane_live() {
            // What a name showed before it was known to be a model's stands where it was noted.
            let also = Some(live.key(name)).filter(|known| *known != noted);
            lane.learn((noted, also), &seen(&lane.health), self.lane_record, Instant::now, breaker);
            let is_answer = matches!(effect, Effect::Answers | Effect::Success);
            if is_answer && live.refusals.answered(&lane.health, Instant::now()) {
                let id = &self.endpoint.config.id;
                log::info!(
                    "endpoint {id}: a key is answered, so this machine's address is not refused, or not any more"
                );
            }
        }
    }
}

impl Asked {
    /// Lets what was asked rest for as long as a good answer says that nothing is left of a limit.
    pub fn rest_unasked(&self, model: &AskedModel, wait: Duration, breaker: &Breaker) {
        let now = Instant::now();
        let effect = Effect::Rest { scope: Scope::Model, wait, guessed: false };
        let seen = Seen { effect, began: now, trial: None };
        let live = &self.endpoint.live;
        match self.lane_live() {
            Some(lane) => lane.learn((live.key(model.name()), None), &seen, self.lane_record, || now, breaker),
            None => live.learn(model.name(), &seen, self.record, || now, breaker),
        };
        let (whom, name) = (self.words(), model.name().name);
        log::info!("{whom}, model {name:?}: says that nothing is left, so it rests for {:.1} s", wait.as_secs_f64());
    }
}

/// A failure. It may turn out to be the request's: then it is held against nobody.
#[derive(Debug)]
pub struct Charge {
    pub(super) asked: Asked,
    pub(super) model: AskedModel,
    pub(super) outcome: Outcome,
    pub(super) effect: Effect,
    pub(super) began: Instant,
    pub(super) trial: Option<Trial>,
    pub(super) breaker: Breaker,
}

/// Failures of one kind are alike.
type ChargeKind = (mem::Discriminant<Outcome>, Option<u16>);

impl Charge {
    /// What two endpoints may have in common: how it failed, and the status of an error.
    pub fn kind(&self) -> ChargeKind {
        (mem::discriminant(&self.outcome), self.outcome.meaning().map(|meaning| meaning.status))
    }

    /// True if the answer had nothing in it.
    pub fn is_of_empty_answer(&self) -> bool {
        self.outcome == Outcome::Empty
    }

    /// Holds it against the endpoint, or against the key if it is the key's and one of several.
    pub fn apply(self) {
        match self.asked.lane_live().cloned() {
            Some(lane) if self.outcome.is_of_key() => self.apply_to_key(&lane),
            _ => self.apply_to_endpoint(),
        }
    }

    fn seen(&self, effect: Effect, record: &Arc<HealthRecord>) -> Seen {
        let trial = self.trial.as_ref().and_then(|trial| trial.scope_in(record));
        Seen { effect, began: self.began, trial }
    }

    fn apply_to_endpoint(&self) {
        let live = &self.asked.endpoint.live;
        if matches!(self.effect, Effect::Failure(_) | Effect::KeyRefused { .. }) {
            live.note_error(self.outcome.to_string());
        }
        if self.outcome.meaning().is_some_and(|meaning| meaning.trouble == Trouble::Key) {
            self.tell_refused();
        }
        let seen = self.seen(self.effect, &live.health);
        let cools = live.learn(self.model.name(), &seen, self.asked.record, Instant::now, &self.breaker);
        if let Some(scope) = cools {
            let now = Instant::now();
            let id = &self.asked.endpoint.config.id;
            self.log_cooling(&format!("endpoint {id}"), scope, live.gate(self.model.name(), now), now);
        }
    }

    fn apply_to_key(&self, lane: &LaneLive) {
        let Asked { endpoint, record, lane_record, .. } = &self.asked;
        let live = &endpoint.live;
        // An account without money is no address that is refused, and words that nobody knows may be about the request.
        let is_refusal = |meaning: &&Meaning| meaning.trouble == Trouble::Key && meaning.wait != Wait::Quota;
        let meaning = self.outcome.meaning().filter(is_refusal).filter(|_| self.outcome.may_try_another_key());
        let now = Instant::now();
        if let Some(meaning) = meaning
            && live.refusals.are_of_address(&lane.health, meaning.words, now)
        {
            return self.apply_to_address(now);
        }
        if matches!(self.effect, Effect::Failure(_) | Effect::KeyRefused { .. }) {
            lane.note_error(self.outcome.to_string());
        }
        if self.outcome.meaning().is_some_and(|meaning| meaning.trouble == Trouble::Key) {
            self.tell_refused();
        }
        let key = live.key(self.model.name());
        let seen = self.seen(self.effect, &lane.health);
        let cools = lane.learn((key, None), &seen, *lane_record, || now, &self.breaker);
        // It has answered, whatever it says of the key.
        let seen = self.seen(Effect::Answers, &live.health);
        live.learn(self.model.name(), &seen, *record, || now, &self.breaker);
        if let Some(scope) = cools {
            self.log_cooling(&self.asked.words(), scope, lane.health.gate(|| key, now), now);
        }
        if cools.is_some() || matches!(self.effect, Effect::Rest { .. }) {
            self.tell_if_empty(now);
        }
    }

    /// Tells that a key is refused.
    fn tell_refused(&self) {
        let whom = self.asked.words();
        let outcome = &self.outcome;
        let is_poor = outcome.meaning().is_some_and(|meaning| meaning.wait == Wait::Quota);
        let what = if is_poor { "its account has no credit" } else { "its key is refused" };
        let message = format!("{whom}: {what}; it {outcome}; check the key in the config, and its account");
        log::warn!("{message}");
        alerts::raise(AlertEvent::KeyRefused, whom.trim_start_matches("endpoint "), message);
    }

    /// The keys are not to blame, and the endpoint rests as a whole.
    fn apply_to_address(&self, now: Instant) {
        let Asked { endpoint, record, .. } = &self.asked;
        let id = &endpoint.config.id;
        endpoint.live.note_error(self.outcome.to_string());
        let effect = Effect::Rest { scope: Scope::Endpoint, wait: ADDRESS_REST, guessed: true };
        let seen = self.seen(effect, &endpoint.live.health);
        endpoint.live.learn(self.model.name(), &seen, *record, || now, &self.breaker);
        let message = format!(
            "endpoint {id}: several keys were refused at once with the same words, so it is probably this machine's address that is \
             refused and not the keys, and nothing is held against them; it rests for {} s; it {}",
            ADDRESS_REST.as_secs(),
            self.outcome
        );
        log::warn!("{message}");
        alerts::raise(AlertEvent::KeyRefused, id, message);
    }

    fn log_cooling(&self, whom: &str, scope: Scope, gate: Gate, now: Instant) {
        let whom = match (scope, self.model.name().name) {
            (Scope::Model, name) if !name.is_empty() => format!("{whom}, model {name:?}"),
            _ => whom.to_owned(),
        };
        let until = match gate {
            Gate::Cooling { until } => format!(" for {:.0} s", until.saturating_duration_since(now).as_secs_f64()),
            _ => String::new(),
        };
        log::warn!("{whom}: cooling down{until}; its last error: it {}", self.outcome);
    }

    /// Tells it if the endpoint has no key left that could be sent now.
    fn tell_if_empty(&self, now: Instant) {
        let endpoint = &self.asked.endpoint;
        let lanes = endpoint.lanes.list();
        if lanes.iter().any(|lane| endpoint.gate_of_lane(lane, now) == Gate::Open) {
            return;
        }
        let id = &endpoint.config.id;
        let message =
            format!("endpoint {id}: none of its {} keys can be used now; `api-together status` says why", lanes.len());
        log::error!("{message}");
        alerts::raise(AlertEvent::PoolEmpty, id, message);
    }
}
