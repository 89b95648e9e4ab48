//! Health of an endpoint and of each of its models: errors in a row, cool-down, half-open trial, rest. Pure; the clock is passed
//! in.
//!
//! ```text
//!            `failures` in a row                 cool-down over, one request at a time
//!   open ────────────────────────► cooling ─────────────────────────────► trial
//!    ▲                                ▲                                     │
//!    └──────────── success ───────────┼───────────── success ◄──────────────┤
//!                                     └───────────── failure ◄──────────────┘
//! ```
//!
//! Vendors limit and fail by model, so each model has a health of its own. Trouble of the key, the account or the connection
//! belongs to the endpoint as a whole, and so does trouble that most of its models show at once.
//!
//! A rest is something else: the endpoint asked for a pause until a moment, which does not count as an error. Where it did not say
//! how long, the length is a guess, and one request at a time may try in spite of it when nobody else is left. A longer rest is not
//! shortened by a later one, and an answer that began before a rest or a cool-down ends neither. A long rest is tried by one request
//! before its end.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::config::Breaker;

/// The rest of a model or an endpoint that is at its limit and does not say for how long.
pub(crate) const REST_GUESS: Duration = Duration::from_secs(5);
/// The rest of a model that the endpoint does not have: its owner may add it.
pub(crate) const MISSING_REST: Duration = Duration::from_mins(10);
/// Time for which an endpoint is left alone whose key was refused, doubled each time up to a limit.
const KEY_REST: Duration = Duration::from_mins(10);
const KEY_REST_MAX: Duration = Duration::from_hours(6);
/// Time after which a rest that lasts longer is tried by one request, doubled each time.
const PROBE_AFTER: Duration = Duration::from_mins(10);
/// Models of one endpoint whose health is kept apart; all others share one.
pub(crate) const MODELS_MAX: usize = 256;
/// Name that they share which find no room.
const OTHERS: &str = "(others)";
/// Requests that a model must have had before its trouble counts as the endpoint's.
const USES_MIN: u32 = 2;

/// Health of one endpoint, or of one of its models, by the outcomes of attempts.
#[derive(Clone, Debug, Default)]
pub struct Health {
    errors_in_row: u32,
    cooling: Option<Closed>,
    resting: Option<Rest>,
    trial_under_way: bool,
    /// Refusals of the key in a row.
    refusals: u32,
    /// Requests in a row that tried a long rest before its end, and were told to wait on.
    probes: u32,
    failed_at: Option<Instant>,
    /// Outcomes since there was any trouble at the endpoint.
    uses: u32,
}

/// A time without requests.
#[derive(Clone, Copy, Debug)]
struct Closed {
    since: Instant,
    until: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Rest {
    closed: Closed,
    guessed: bool,
    /// When one request tries it before its end.
    probe: Instant,
}

/// Whether health lets a request through now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// Requests may go there.
    Open,
    /// The cool-down is over; one request may try.
    TrialDue,
    /// It failed repeatedly and gets no requests, unless nothing else is there.
    Cooling {
        /// The end of the cool-down.
        until: Instant,
    },
    /// A trial is under way; nothing else may go there until it ends, unless nothing else is there.
    OnTrial,
    /// It asked for a pause.
    Resting {
        /// The end of the rest.
        until: Instant,
        /// True if it did not say for how long, and no request tries it in spite of that.
        may_try: bool,
    },
}

/// How long something takes no requests, and what counts towards the next time: what processes say to each other of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Closing {
    /// End of the cool-down.
    pub cooling: Option<Instant>,
    /// End of the rest.
    pub resting: Option<Instant>,
    /// True if the length of the rest is a guess.
    pub guessed: bool,
    /// Errors in a row.
    pub errors_in_row: u32,
    /// Refusals of the key in a row.
    pub refusals: u32,
}

impl Closing {
    /// Difference between two ends that is none: clocks of machines differ a little.
    const SAME: Duration = Duration::from_secs(1);

    /// True if it takes requests.
    pub fn is_open(&self) -> bool {
        self.cooling.is_none() && self.resting.is_none()
    }

    /// True if it takes no requests at this moment.
    pub fn ends_after(&self, now: Instant) -> bool {
        self.cooling.into_iter().chain(self.resting).any(|until| until > now)
    }

    /// True if it lasts longer than another one.
    pub fn lasts_longer_than(&self, other: &Self) -> bool {
        let is_later = |one: Option<Instant>, other: Option<Instant>| match (one, other) {
            (Some(one), Some(other)) => one.saturating_duration_since(other) > Self::SAME,
            (one, None) => one.is_some(),
            (None, Some(_)) => false,
        };
        is_later(self.cooling, other.cooling) || is_later(self.resting, other.resting)
    }
}

/// What an effect or a state belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The endpoint as a whole.
    Endpoint,
    /// The model that was asked for.
    Model,
}

/// Effect of an attempt on health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It has begun to answer as it should.
    Answers,
    /// It answered as it should, to the end.
    Success,
    /// It failed, in a way that its next request may fail as well.
    Failure(Scope),
    /// It asked for a pause.
    Rest {
        /// What rests.
        scope: Scope,
        /// How long.
        wait: Duration,
        /// True if the length is our guess.
        guessed: bool,
    },
    /// It refused the key, or its account has no credit.
    KeyRefused {
        /// Time after which its quota may turn.
        at_most: Duration,
    },
    /// No effect: the request was at fault, or the client disconnected.
    Neutral,
}

/// An attempt, as far as health is concerned with it.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Its effect.
    pub effect: Effect,
    /// When it began.
    pub began: Instant,
    /// Set if it was a trial.
    pub trial: Option<Scope>,
}

impl Health {
    /// Returns whether it lets a request through.
    pub fn gate(&self, now: Instant) -> Gate {
        if let Some(Rest { closed, guessed, probe }) = self.resting.filter(|rest| rest.closed.until > now) {
            if probe <= now && !self.trial_under_way && self.cooling.is_none_or(|closed| closed.until <= now) {
                return Gate::TrialDue;
            }
            return Gate::Resting { until: closed.until, may_try: guessed && !self.trial_under_way };
        }
        match self.cooling {
            None => Gate::Open,
            Some(_) if self.trial_under_way => Gate::OnTrial,
            Some(Closed { until, .. }) if until > now => Gate::Cooling { until },
            Some(_) => Gate::TrialDue,
        }
    }

    /// Lets one request through. False if one is there already.
    fn begin_trial(&mut self) -> bool {
        !std::mem::replace(&mut self.trial_under_way, true)
    }

    fn end_trial(&mut self) {
        self.trial_under_way = false;
    }

    /// It answers. Others may come again, but the errors stand until an answer has come to its end: an endpoint whose streams
    /// all break would never cool down otherwise.
    fn answers(&mut self, began: Instant) {
        self.cooling = self.cooling.filter(|closed| began < closed.since);
    }

    fn succeeded(&mut self, began: Instant) {
        self.answers(began);
        self.resting = self.resting.filter(|rest| began < rest.closed.since);
        if self.cooling.is_none() {
            self.errors_in_row = 0;
            self.refusals = 0;
        }
        if self.resting.is_none() {
            self.probes = 0;
        }
    }

    /// Returns true if it begins to cool down.
    fn failed(&mut self, seen: &Seen, is_trial: bool, now: Instant, breaker: &Breaker) -> bool {
        self.errors_in_row = self.errors_in_row.saturating_add(1);
        self.failed_at = Some(now);
        // An attempt that began before the cool-down, or that went there for want of another, does not make it longer.
        let begins = (self.cooling.is_none() || is_trial) && self.errors_in_row >= breaker.failures;
        if begins {
            self.close(seen.began, now, breaker.cool_down);
        }
        begins
    }

    fn close(&mut self, began: Instant, now: Instant, how_long: Duration) {
        // Answers that begin from now on show something new.
        let since = if self.cooling.is_some() { began.max(now) } else { now };
        self.cooling = now.checked_add(how_long).map(|until| Closed { since, until });
    }

    fn key_refused(&mut self, began: Instant, at_most: Duration, now: Instant) -> bool {
        // One that went there before the end for want of another says nothing new.
        let begins = self.refusals == 0 || self.cooling.is_none_or(|closed| closed.until <= began);
        self.failed_at = Some(now);
        if begins {
            let doublings = self.refusals.min(16);
            self.refusals = self.refusals.saturating_add(1);
            self.errors_in_row = self.errors_in_row.saturating_add(1);
            self.close(began, now, KEY_REST.saturating_mul(1 << doublings).min(KEY_REST_MAX).min(at_most));
        }
        begins
    }

    /// The longer rest stands. A long one is tried before its end, after times that double: who asked for it may have paid, or been
    /// given more, meanwhile.
    fn rests(&mut self, wait: Duration, guessed: bool, now: Instant) {
        let Some(until) = now.checked_add(wait).filter(|_| wait > Duration::ZERO) else { return };
        let stands = self.resting.is_some_and(|rest| rest.closed.until >= until);
        if !stands {
            let probe = self.next_probe(now);
            self.resting = Some(Rest { closed: Closed { since: now, until }, guessed, probe });
        }
    }

    fn next_probe(&self, now: Instant) -> Instant {
        // A rest that ends before it is tried by nobody.
        now.checked_add(PROBE_AFTER.saturating_mul(1 << self.probes.min(16))).unwrap_or(now)
    }

    /// A request that tried it came to nothing good: the next one tries it later.
    fn probed_in_vain(&mut self, now: Instant) {
        if self.resting.is_none_or(|rest| rest.probe > now) {
            return;
        }
        self.probes = self.probes.saturating_add(1);
        let probe = self.next_probe(now);
        self.resting = self.resting.map(|rest| Rest { probe, ..rest });
    }

    /// Errors since the last success.
    pub fn errors_in_row(&self) -> u32 {
        self.errors_in_row
    }

    /// Returns what others may know of it.
    pub fn closing(&self) -> Closing {
        Closing {
            cooling: self.cooling_until(),
            resting: self.resting_until(),
            guessed: self.resting.is_some_and(|rest| rest.guessed),
            errors_in_row: self.errors_in_row,
            refusals: self.refusals,
        }
    }

    /// Takes in what another process has found out. What lasts longer stands, unless it is open there.
    fn take_over(&mut self, closing: &Closing, now: Instant) {
        if closing.is_open() {
            *self = Self {
                trial_under_way: self.trial_under_way,
                failed_at: self.failed_at,
                uses: self.uses,
                ..Self::default()
            };
            return;
        }
        self.errors_in_row = self.errors_in_row.max(closing.errors_in_row);
        self.refusals = self.refusals.max(closing.refusals);
        if let Some(until) = closing.cooling.filter(|until| self.cooling_until() < Some(*until)) {
            self.cooling = Some(Closed { since: now, until });
        }
        if let Some(until) = closing.resting {
            self.rests(until.saturating_duration_since(now), closing.guessed, now);
        }
    }

    /// True while nothing at all is held against it, so that a look at it may be skipped.
    fn is_spotless(&self) -> bool {
        self.errors_in_row == 0 && self.cooling.is_none() && self.resting.is_none()
    }

    /// True while it takes no requests, or only one at a time, after failures.
    pub fn is_cooling(&self) -> bool {
        self.cooling.is_some()
    }

    /// The end of the cool-down, if it is cooling down.
    pub fn cooling_until(&self) -> Option<Instant> {
        self.cooling.map(|closed| closed.until)
    }

    /// The end of the rest, if one was asked for.
    pub fn resting_until(&self) -> Option<Instant> {
        self.resting.map(|rest| rest.closed.until)
    }

    /// When it failed last.
    pub fn failed_at(&self) -> Option<Instant> {
        self.failed_at
    }
}

/// Health of an endpoint and of its models.
#[derive(Debug, Default)]
pub struct EndpointHealth {
    whole: Health,
    /// By the name that the endpoint is asked for, of those that were used since there was any trouble. Beyond [`MODELS_MAX`]
    /// all others share [`OTHERS`].
    models: HashMap<Box<str>, Health>,
}

impl EndpointHealth {
    /// Returns whether it lets a request for a model through.
    pub fn gate(&self, model: &str, now: Instant) -> Gate {
        match self.whole.gate(now) {
            Gate::Open => {}
            closed => return closed,
        }
        match self.models.get(self.key(model)).filter(|health| health.uses >= USES_MIN || !health.is_spotless()) {
            Some(health) => health.gate(now),
            None => self.gate_of_most(now).unwrap_or(Gate::Open),
        }
    }

    fn key<'a>(&self, model: &'a str) -> &'a str {
        if self.models.len() < MODELS_MAX || self.models.contains_key(model) { model } else { OTHERS }
    }

    /// The gate of a model that nothing is known of, if most of those that were used are in trouble: the endpoint is then.
    fn gate_of_most(&self, now: Instant) -> Option<Gate> {
        let used = || self.models.values().filter(|health| health.uses >= USES_MIN);
        let closed = || used().map(|health| health.gate(now)).filter(|gate| *gate != Gate::Open);
        let count = closed().count();
        if count < 2 || 2 * count <= used().count() {
            return None;
        }
        if self.whole.trial_under_way {
            return Some(Gate::OnTrial);
        }
        // The first of them that may be asked again.
        closed().min_by_key(|gate| match gate {
            Gate::Cooling { until } | Gate::Resting { until, .. } => *until,
            Gate::Open | Gate::TrialDue | Gate::OnTrial => now,
        })
    }

    /// Lets one request for a model through in spite of a cool-down or a rest. None if one is there already.
    pub fn begin_trial(&mut self, model: &str) -> Option<Scope> {
        let key = self.key(model);
        let of_model = self.models.get_mut(key).filter(|health| !health.is_spotless());
        match of_model {
            Some(health) if self.whole.is_spotless() => health.begin_trial().then_some(Scope::Model),
            _ => self.whole.begin_trial().then_some(Scope::Endpoint),
        }
    }

    /// Ends a trial, whatever it showed.
    pub fn end_trial(&mut self, scope: Scope, model: &str) {
        match scope {
            Scope::Endpoint => self.whole.end_trial(),
            Scope::Model => {
                let key = self.key(model);
                if let Some(health) = self.models.get_mut(key) {
                    health.end_trial();
                }
            }
        }
    }

    /// Takes in what an attempt for a model showed. Returns what begins to cool down by it.
    pub fn learn(&mut self, model: &str, seen: &Seen, now: Instant, breaker: &Breaker) -> Option<Scope> {
        let key = self.key(model);
        let Self { whole, models } = self;
        let of_model = models.entry(key.into()).or_default();
        of_model.uses = of_model.uses.saturating_add(1);
        let is_trial = |scope| seen.trial == Some(scope);
        if matches!(seen.effect, Effect::Failure(_) | Effect::Rest { .. } | Effect::KeyRefused { .. }) {
            match seen.trial {
                Some(Scope::Model) => of_model.probed_in_vain(now),
                Some(Scope::Endpoint) => whole.probed_in_vain(now),
                None => {}
            }
        }
        match seen.effect {
            Effect::Answers => {
                of_model.answers(seen.began);
                whole.answers(seen.began);
            }
            Effect::Success => {
                of_model.succeeded(seen.began);
                whole.succeeded(seen.began);
            }
            Effect::Failure(Scope::Model) => {
                let begins = of_model.failed(seen, seen.trial.is_some(), now, breaker);
                // A trial of the whole that fails keeps the whole closed.
                if is_trial(Scope::Endpoint) && whole.is_cooling() {
                    whole.failed(seen, true, now, breaker);
                }
                return begins.then_some(Scope::Model);
            }
            Effect::Failure(Scope::Endpoint) => {
                let begins = whole.failed(seen, is_trial(Scope::Endpoint), now, breaker);
                return begins.then_some(Scope::Endpoint);
            }
            Effect::Rest { scope, wait, guessed } => {
                let rests = if scope == Scope::Model { of_model } else { whole };
                rests.rests(wait, guessed, now);
            }
            Effect::KeyRefused { at_most } => {
                return whole.key_refused(seen.began, at_most, now).then_some(Scope::Endpoint);
            }
            Effect::Neutral => {}
        }
        None
    }

    /// Gives a model the health that it had under another name until now.
    pub fn inherit(&mut self, model: &str, from: &str) {
        let known = self.models.get(from).filter(|health| !health.is_spotless()).cloned();
        if let Some(known) = known.filter(|_| self.models.len() < MODELS_MAX) {
            self.models.insert(model.into(), Health { trial_under_way: false, ..known });
        }
    }

    /// True while nothing at all is held against it, so that a look at it may be skipped.
    pub fn is_spotless(&self) -> bool {
        self.whole.is_spotless() && self.models.values().all(Health::is_spotless)
    }

    /// Forgets which models were used, once all is well.
    pub fn forget_uses(&mut self) {
        self.models.clear();
    }

    /// Takes back what was held against it as a whole since this moment of before, but for a trial that is under way.
    pub fn put_back_whole(&mut self, mut before: Health) {
        before.trial_under_way = self.whole.trial_under_way;
        self.whole = before;
    }

    /// Takes in what another process has found out of a model, or of the whole if it names none.
    pub fn take_over(&mut self, model: &str, closing: &Closing, now: Instant) {
        if model.is_empty() {
            self.whole.take_over(closing, now);
        } else if !closing.is_open() || self.models.contains_key(model) {
            let key: Box<str> = self.key(model).into();
            self.models.entry(key).or_default().take_over(closing, now);
        }
    }

    /// Health of the endpoint as a whole.
    pub fn whole(&self) -> &Health {
        &self.whole
    }

    /// Health of each model that anything is held against, in no order.
    pub fn models(&self) -> impl Iterator<Item = (&str, &Health)> {
        self.models.iter().filter(|(_, health)| !health.is_spotless()).map(|(model, health)| (model.as_ref(), health))
    }

    /// The gate of the endpoint as a whole, for a question about all its models: its own, or, if all of them are closed, that of
    /// the one which opens first. `models` are its models where all are known; else those count that were used.
    pub fn gate_of_all<'a>(&self, models: Option<impl Iterator<Item = &'a str>>, now: Instant) -> Gate {
        let whole = self.whole.gate(now);
        if whole != Gate::Open {
            return whole;
        }
        let gates: Vec<Gate> = match models {
            Some(models) => models.map(|model| self.gate(model, now)).collect(),
            None => self.models.values().map(|health| health.gate(now)).collect(),
        };
        if gates.contains(&Gate::Open) {
            return Gate::Open;
        }
        let first = gates.into_iter().min_by_key(|gate| match gate {
            Gate::Cooling { until } | Gate::Resting { until, .. } => *until,
            Gate::Open | Gate::TrialDue | Gate::OnTrial => now,
        });
        first.unwrap_or(Gate::Open)
    }

    /// The most errors in a row of any of its models, or of itself.
    pub fn errors_in_row(&self) -> u32 {
        let of_models = self.models.values().map(Health::errors_in_row);
        of_models.chain([self.whole.errors_in_row()]).max().unwrap_or_default()
    }

    /// When a request for a model failed last, of the model or of the endpoint as a whole.
    pub fn failed_at(&self, model: &str) -> Option<Instant> {
        self.whole.failed_at.max(self.models.get(self.key(model)).and_then(Health::failed_at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BREAKER: Breaker = Breaker { failures: 3, cool_down: Duration::from_mins(10) };
    const KEY_REFUSED: Effect = Effect::KeyRefused { at_most: Duration::MAX };
    const FAILURE: Effect = Effect::Failure(Scope::Model);

    /// An endpoint's health, and the moment at which things happen.
    struct Scene {
        health: EndpointHealth,
        now: Instant,
    }

    impl Scene {
        fn new() -> Self {
            Self { health: EndpointHealth::default(), now: Instant::now() }
        }

        /// Things happen a moment later.
        fn later(&mut self, time: Duration) -> &mut Self {
            self.now += time;
            self
        }

        fn seen(&mut self, model: &str, effect: Effect, trial: Option<Scope>) -> Option<Scope> {
            self.now += Duration::from_millis(1);
            let seen = Seen { effect, began: self.now, trial };
            self.now += Duration::from_millis(1);
            self.health.learn(model, &seen, self.now, &BREAKER)
        }

        fn times(&mut self, times: u32, model: &str, effect: Effect) -> &mut Self {
            for _ in 0..times {
                self.seen(model, effect, None);
            }
            self
        }

        fn gate(&self, model: &str) -> Gate {
            self.health.gate(model, self.now)
        }

        fn cools(&self, model: &str) -> bool {
            matches!(self.gate(model), Gate::Cooling { .. })
        }
    }

    #[test]
    fn cools_down_after_errors_in_a_row_only() {
        let mut scene = Scene::new();
        scene.times(2, "m", FAILURE).times(1, "m", Effect::Success).times(2, "m", FAILURE);
        assert_eq!(scene.gate("m"), Gate::Open);
        assert_eq!(scene.seen("m", FAILURE, None), Some(Scope::Model));
        assert_eq!(scene.gate("m"), Gate::Cooling { until: scene.now + BREAKER.cool_down });
        scene.later(BREAKER.cool_down);
        assert_eq!(scene.gate("m"), Gate::TrialDue);
    }

    #[test]
    fn what_another_process_has_found_out_closes_and_opens() {
        let (mut one, mut other) = (Scene::new(), Scene::new());
        other.now = one.now;
        one.times(3, "m", FAILURE).seen("", KEY_REFUSED, None);
        let told: Vec<(String, Closing)> =
            one.health.models().map(|(model, health)| (model.to_owned(), health.closing())).collect();
        for (model, closing) in &told {
            other.health.take_over(model, closing, other.now);
        }
        other.health.take_over("", &one.health.whole().closing(), other.now);
        assert!(other.cools("m") && other.cools("n"), "the key is refused everywhere");
        assert_eq!(other.health.whole().closing(), one.health.whole().closing());
        // A shorter one takes nothing back.
        let shorter = Closing { cooling: Some(other.now + Duration::from_secs(5)), ..Closing::default() };
        other.health.take_over("m", &shorter, other.now);
        assert!(!shorter.lasts_longer_than(&told[0].1) && told[0].1.lasts_longer_than(&shorter));
        other.health.take_over("", &Closing::default(), other.now);
        assert!(other.cools("m"));
        assert_eq!(other.gate("n"), Gate::Open);
        other.health.take_over("m", &Closing::default(), other.now);
        other.health.take_over("unheard-of", &Closing::default(), other.now);
        assert!(other.health.is_spotless());
        assert_eq!(other.seen("m", FAILURE, None), None, "it begins anew");
    }

    #[test]
    fn one_model_in_trouble_leaves_the_others_alone() {
        let mut scene = Scene::new();
        scene.times(3, "m", FAILURE);
        assert!(scene.cools("m"));
        assert_eq!(scene.gate("n"), Gate::Open);
        scene.times(1, "m", Effect::Rest { scope: Scope::Model, wait: Duration::from_hours(1), guessed: false });
        assert!(matches!(scene.gate("m"), Gate::Resting { .. }));
        assert_eq!(scene.gate("n"), Gate::Open);
        let all = |models: [&'static str; 2]| scene.health.gate_of_all(Some(models.into_iter()), scene.now);
        assert_eq!(all(["m", "n"]), Gate::Open);
        assert!(matches!(all(["m", "m"]), Gate::Resting { .. }));
    }

    #[test]
    fn trouble_of_most_models_is_the_endpoints() {
        let mut scene = Scene::new();
        scene.times(3, "a", FAILURE);
        assert_eq!(scene.gate("c"), Gate::Open, "one is not most");
        scene.times(3, "b", FAILURE);
        assert!(scene.cools("c"), "two of two are");
        assert_eq!(scene.health.begin_trial("c"), Some(Scope::Endpoint));
        assert_eq!(scene.gate("c"), Gate::OnTrial);
        assert_eq!(scene.health.begin_trial("c"), None);
        scene.health.end_trial(Scope::Endpoint, "c");
        scene.times(2, "c", Effect::Success);
        assert_eq!(scene.gate("c"), Gate::Open, "it is known to work");
        scene.times(2, "d", Effect::Success);
        assert_eq!(scene.gate("e"), Gate::Open, "two of four are not most");
        let mut once = Scene::new();
        once.times(3, "a", FAILURE).times(
            1,
            "b",
            Effect::Rest { scope: Scope::Model, wait: REST_GUESS, guessed: true },
        );
        assert_eq!(once.gate("c"), Gate::Open, "a single request proves nothing");
    }

    #[test]
    fn trouble_of_the_key_or_the_connection_is_the_endpoints_at_once() {
        for effect in [
            Effect::Failure(Scope::Endpoint),
            KEY_REFUSED,
            Effect::Rest { scope: Scope::Endpoint, wait: REST_GUESS, guessed: false },
        ] {
            let mut scene = Scene::new();
            scene.times(3, "m", effect);
            assert_ne!(scene.gate("n"), Gate::Open, "{effect:?}");
        }
    }

    #[test]
    fn one_trial_at_a_time_decides() {
        let mut scene = Scene::new();
        scene.times(3, "m", FAILURE).later(BREAKER.cool_down);
        assert_eq!(scene.health.begin_trial("m"), Some(Scope::Model));
        assert_eq!(scene.health.begin_trial("m"), None, "a second trial beside the first");
        assert_eq!(scene.gate("m"), Gate::OnTrial);
        scene.seen("m", FAILURE, Some(Scope::Model));
        scene.health.end_trial(Scope::Model, "m");
        assert_eq!(scene.gate("m"), Gate::Cooling { until: scene.now + BREAKER.cool_down });
        assert!(scene.health.begin_trial("m").is_some());
        scene.seen("m", Effect::Neutral, Some(Scope::Model));
        scene.health.end_trial(Scope::Model, "m");
        assert!(scene.health.begin_trial("m").is_some(), "a trial whose client went away leaves room for the next");
        scene.seen("m", Effect::Success, Some(Scope::Model));
        scene.health.end_trial(Scope::Model, "m");
        assert_eq!(scene.gate("m"), Gate::Open);
        assert!(scene.health.is_spotless());
    }

    #[test]
    fn an_answer_that_breaks_off_is_one_more_error() {
        let mut scene = Scene::new();
        scene.times(3, "m", FAILURE);
        assert!(scene.health.begin_trial("m").is_some());
        scene.seen("m", Effect::Answers, Some(Scope::Model));
        scene.health.end_trial(Scope::Model, "m");
        assert_eq!(scene.gate("m"), Gate::Open, "others may come while the trial's stream goes on");
        scene.times(1, "m", FAILURE);
        assert!(scene.cools("m"));
    }

    #[test]
    fn late_failures_do_not_prolong_a_cool_down() {
        let mut scene = Scene::new();
        scene.times(3, "m", FAILURE);
        let until = scene.health.models["m"].cooling_until();
        scene.later(Duration::from_mins(1)).times(5, "m", FAILURE);
        assert_eq!(scene.health.models["m"].cooling_until(), until);
    }

    #[test]
    fn an_answer_that_began_before_ends_neither_rest_nor_cool_down() {
        let rest = Effect::Rest { scope: Scope::Model, wait: Duration::from_mins(5), guessed: false };
        for (times, effect) in [(3, FAILURE), (1, rest), (1, KEY_REFUSED)] {
            let mut scene = Scene::new();
            let long = Seen { effect: Effect::Success, began: scene.now, trial: None };
            scene.times(times, "m", effect);
            let closed = scene.gate("m");
            scene.health.learn("m", &long, scene.now, &BREAKER);
            assert_eq!(scene.gate("m"), closed, "{effect:?}");
            scene.times(1, "m", Effect::Success);
            assert_eq!(scene.gate("m"), Gate::Open, "{effect:?}");
        }
    }

    #[test]
    fn the_longer_rest_stands_and_is_no_error() {
        let mut scene = Scene::new();
        let rest = |secs, guessed| Effect::Rest { scope: Scope::Model, wait: Duration::from_secs(secs), guessed };
        scene.times(1, "m", rest(3600, false));
        let until = scene.now + Duration::from_hours(1);
        scene.times(3, "m", rest(5, true));
        assert_eq!(scene.gate("m"), Gate::Resting { until, may_try: false });
        assert_eq!(scene.health.errors_in_row(), 0);
        scene.later(Duration::from_hours(1));
        assert_eq!(scene.gate("m"), Gate::Open);
        scene.times(1, "m", rest(0, false));
        assert_eq!(scene.gate("m"), Gate::Open, "not at all");
    }

    #[test]
    fn a_guessed_rest_may_be_tried_by_one_at_a_time() {
        let mut scene = Scene::new();
        scene.times(1, "m", Effect::Rest { scope: Scope::Model, wait: REST_GUESS, guessed: true });
        assert!(matches!(scene.gate("m"), Gate::Resting { may_try: true, .. }));
        assert_eq!(scene.health.begin_trial("m"), Some(Scope::Model));
        assert!(matches!(scene.gate("m"), Gate::Resting { may_try: false, .. }));
        scene.seen("m", Effect::Success, Some(Scope::Model));
        scene.health.end_trial(Scope::Model, "m");
        assert_eq!(scene.gate("m"), Gate::Open);
    }

    #[test]
    fn a_refused_key_is_left_alone_for_longer_each_time() {
        let mut scene = Scene::new();
        let mut waits = Vec::new();
        for round in 0..8 {
            let trial = (round > 0).then(|| scene.health.begin_trial("m").unwrap());
            scene.seen("m", KEY_REFUSED, trial);
            if let Some(scope) = trial {
                scene.health.end_trial(scope, "m");
            }
            let Gate::Cooling { until } = scene.gate("any") else { panic!("{:?}", scene.gate("any")) };
            waits.push((until - scene.now).as_secs() / 60);
            // Others that were on their way change nothing.
            scene.times(2, "m", KEY_REFUSED);
            scene.now = until;
            assert_eq!(scene.gate("m"), Gate::TrialDue);
        }
        assert_eq!(waits, [10, 20, 40, 80, 160, 320, 360, 360]);
        let trial = scene.health.begin_trial("m");
        scene.seen("m", Effect::Success, trial);
        assert!(scene.health.is_spotless());
    }

    #[test]
    fn requests_for_want_of_another_endpoint_make_no_rest_longer() {
        let mut scene = Scene::new();
        scene.times(1, "m", KEY_REFUSED);
        let Gate::Cooling { until } = scene.gate("m") else { panic!("{:?}", scene.gate("m")) };
        for _ in 0..5 {
            let trial = scene.health.begin_trial("m");
            scene.seen("m", KEY_REFUSED, trial);
            scene.health.end_trial(trial.unwrap(), "m");
        }
        assert_eq!(scene.gate("m"), Gate::Cooling { until });
    }

    #[test]
    fn the_number_of_models_is_bounded() {
        let mut scene = Scene::new();
        for model in 0..2 * MODELS_MAX {
            scene.times(1, &model.to_string(), FAILURE);
        }
        assert_eq!(scene.health.models.len(), MODELS_MAX + 1);
        // What finds no room is in trouble together, and the endpoint as a whole is not.
        assert!(scene.cools("another") && scene.health.whole().is_spotless());
    }

    #[test]
    fn a_long_rest_is_tried_before_its_end_at_doubling_intervals() {
        let mut scene = Scene::new();
        let rest = Effect::Rest { scope: Scope::Model, wait: Duration::from_hours(5), guessed: false };
        scene.times(1, "m", rest);
        let begun = scene.now;
        let mut tried = Vec::new();
        for _ in 0..300 {
            scene.later(Duration::from_mins(1));
            if scene.gate("m") == Gate::TrialDue {
                tried.push((scene.now - begun).as_secs() / 60);
                let trial = scene.health.begin_trial("m");
                assert!(matches!(scene.gate("m"), Gate::Resting { may_try: false, .. }), "one at a time");
                scene.seen(
                    "m",
                    Effect::Rest { scope: Scope::Model, wait: Duration::from_hours(1), guessed: false },
                    trial,
                );
                scene.health.end_trial(trial.unwrap(), "m");
            }
        }
        assert_eq!(tried, [10, 30, 70, 150]);
        scene.times(1, "n", rest).later(Duration::from_mins(11));
        let trial = scene.health.begin_trial("n");
        scene.seen("n", Effect::Success, trial);
        scene.health.end_trial(trial.unwrap(), "n");
        assert_eq!(scene.gate("n"), Gate::Open);
        scene.times(1, "n", Effect::Rest { scope: Scope::Model, wait: Duration::from_mins(9), guessed: false });
        scene.later(Duration::from_mins(8));
        assert!(matches!(scene.gate("n"), Gate::Resting { .. }), "a short one is not");
    }
}
