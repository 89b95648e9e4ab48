//! Live state of an endpoint: its health, what it has in flight, what is remembered of it. It outlives every reload.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use crate::config::Breaker;
use crate::ledger::Account;
use crate::routing::discovered::Discovered;
use crate::routing::health::{Effect, EndpointHealth, Gate, MODELS_MAX, Scope, Seen};
use crate::routing::health_record::{HealthRecord, Trial};
use crate::routing::path_memory::PathMemory;
use crate::routing::refusals::Refusals;
use crate::routing::router::ModelName;
use crate::routing::usage_injection::InjectionMemory;

/// Longest name that can be a model's, unless the config has it: it is a key in the ledger and a label of metrics.
const MODEL_BYTES_MAX: usize = 200;

/// Name under which the health of all models is kept that the config does not have and that have never succeeded.
const UNKNOWN_MODELS: &str = "*";

/// Live state of an endpoint, shared by every request and every config that has it.
#[derive(Debug)]
pub struct Live {
    /// Health of the endpoint and its models; with several keys, as far as it is not that of one of them.
    pub health: Arc<HealthRecord>,
    /// Refusals of its keys, if it has several.
    pub refusals: Refusals,
    /// Models that matched a pattern and have succeeded, at most [`MODELS_MAX`].
    served: RwLock<HashSet<Box<str>>>,
    /// Account in the ledger.
    pub account: Arc<Account>,
    in_flight: AtomicU32,
    first_byte: Mutex<Average>,
    last_error: Mutex<Option<LastError>>,
    /// Memory about `stream_options` that the gateway added.
    pub usage_injection: InjectionMemory,
    /// Memory of the calls that it does not have.
    pub paths: PathMemory,
    /// Models that it lists itself.
    pub discovered: Discovered,
}

/// The last failure of an endpoint, for the status page.
#[derive(Clone, Debug)]
pub struct LastError {
    /// When.
    pub at: SystemTime,
    /// Description.
    pub what: String,
}

impl Live {
    /// Returns the state of an endpoint that nothing is known of yet.
    pub fn new(account: Arc<Account>) -> Self {
        Self {
            health: Arc::default(),
            refusals: Refusals::default(),
            served: RwLock::default(),
            account,
            in_flight: AtomicU32::default(),
            first_byte: Mutex::default(),
            last_error: Mutex::default(),
            usage_injection: InjectionMemory::default(),
            discovered: Discovered::default(),
            paths: PathMemory::default(),
        }
    }

    /// Returns whether a request for a model may go to the endpoint now.
    pub fn gate(&self, model: ModelName<'_>, now: Instant) -> Gate {
        self.health.gate(|| self.key(model), now)
    }

    /// Names that clients make up share one entry, so that they can neither fill the memory nor pass for models.
    pub fn key<'a>(&self, model: ModelName<'a>) -> &'a str {
        if self.is_known(model) { model.name } else { UNKNOWN_MODELS }
    }

    /// True if the name is a model's: the config has it, or it has been answered.
    pub fn is_known(&self, model: ModelName<'_>) -> bool {
        model.in_config || read(&self.served).contains(model.name)
    }

    /// Lets one request through to what is cooling down; none if another one was faster.
    pub fn begin_trial(&self, model: ModelName<'_>) -> Option<Trial> {
        self.health.begin_trial(self.key(model))
    }

    /// Takes in what an attempt of the record of this number showed. Returns what begins to cool down by it.
    pub fn learn(
        &self,
        model: ModelName<'_>,
        seen: &Seen,
        record: u32,
        now: impl FnOnce() -> Instant,
        breaker: &Breaker,
    ) -> Option<Scope> {
        let shows_model = seen.effect == Effect::Success && !model.in_config;
        if self.health.has_nothing_to_learn(seen, record) {
            if shows_model {
                self.note_served(model.name);
            }
            return None;
        }
        // What a name showed before it was known stands where it was noted.
        let key = self.key(model);
        let is_new = shows_model && self.note_served(model.name);
        self.health.learn(key, is_new.then_some(model.name), seen, now(), breaker)
    }

    /// Notes that a name is a model's. True if that was not known.
    fn note_served(&self, model: &str) -> bool {
        if model.len() > MODEL_BYTES_MAX || read(&self.served).contains(model) {
            return false;
        }
        let mut served = self.served.write().unwrap_or_else(PoisonError::into_inner);
        served.len() < MODELS_MAX && served.insert(model.into())
    }

    /// Forgets what is held against the endpoint.
    pub fn start_anew(&self) {
        self.health.begin_anew();
        self.refusals.forget();
        *lock(&self.last_error) = None;
        self.paths.forget();
        self.usage_injection.forget();
    }

    /// Reads the health, for the status page.
    pub fn health(&self) -> MutexGuard<'_, EndpointHealth> {
        self.health.read()
    }

    /// When a request for a model failed last.
    pub fn failed_at(&self, model: ModelName<'_>) -> Option<Instant> {
        let key = self.key(model);
        self.health.read().failed_at(key)
    }

    /// Counts a request in until the guard is dropped, at the last byte of its answer.
    pub fn enter(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }

    /// Requests that the endpoint is answering at this moment.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Takes in how long the first byte of a good answer took.
    pub fn observe_first_byte(&self, took: Duration, now: Instant) {
        lock(&self.first_byte).observe(took, now);
    }

    /// The decaying average of the time to the first byte; none before the first good answer.
    pub fn first_byte(&self, now: Instant) -> Option<Duration> {
        lock(&self.first_byte).at(now)
    }

    /// The average of the time to the first byte as it was last taken, for the status page.
    pub fn first_byte_mean(&self) -> Option<Duration> {
        lock(&self.first_byte).mean()
    }

    /// Number and sum of all these times since the process started.
    pub fn first_byte_total(&self) -> (u64, Duration) {
        let Average { count, sum, .. } = *lock(&self.first_byte);
        (count, sum)
    }

    /// Remembers a failure.
    pub fn note_error(&self, what: String) {
        *lock(&self.last_error) = Some(LastError { at: SystemTime::now(), what });
    }

    /// The last failure, if there was one.
    pub fn last_error(&self) -> Option<LastError> {
        lock(&self.last_error).clone()
    }
}

/// One request in flight at an endpoint.
#[derive(Debug)]
pub struct InFlight(Arc<Live>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A moving average that fades while nothing is added to it, so that an endpoint once slow is tried again.
#[derive(Debug, Default)]
struct Average {
    seconds: f64,
    taken: Option<Instant>,
    /// Samples, and their sum.
    count: u64,
    sum: Duration,
}

impl Average {
    /// The weight of a new sample.
    const SAMPLE_WEIGHT: f64 = 0.2;
    /// The average falls to a third in this time without samples.
    const FADE: Duration = Duration::from_mins(1);

    fn observe(&mut self, took: Duration, now: Instant) {
        let sample = took.as_secs_f64();
        self.seconds = match self.taken {
            None => sample,
            Some(_) => self.seconds + Self::SAMPLE_WEIGHT * (sample - self.seconds),
        };
        self.taken = Some(now);
        self.count += 1;
        self.sum += took;
    }

    fn at(&self, now: Instant) -> Option<Duration> {
        let age = now.saturating_duration_since(self.taken?);
        let faded = self.seconds * (-age.as_secs_f64() / Self::FADE.as_secs_f64()).exp();
        Some(Duration::from_secs_f64(faded))
    }

    fn mean(&self) -> Option<Duration> {
        self.taken.map(|_| Duration::from_secs_f64(self.seconds))
    }
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// Takes a poisoned lock as well: each of these guards plain values that are never left half written.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(super) mod test_support {
    use super::*;

    pub(crate) const BREAKER: Breaker = Breaker { failures: 1, cool_down: Duration::from_mins(1) };
    pub(crate) const MODEL: ModelName<'_> = ModelName { name: "m", in_config: true };

    /// An endpoint learns how an attempt ended.
    pub(crate) fn learn(live: &Live, effect: Effect, trial: Option<&Trial>) -> Option<Scope> {
        let seen = Seen { effect, began: Instant::now(), trial: trial.map(Trial::scope) };
        live.learn(MODEL, &seen, live.health.number(), Instant::now, &BREAKER)
    }
}

#[cfg(test)]
mod tests {
    use super::test_support::{BREAKER, MODEL, learn};
    use super::*;
    use crate::ledger::{AccountId, Client};
    use crate::limit::Clock;

    fn client() -> Client {
        Client::new(Clock::read)
    }

    #[test]
    fn a_success_closes_the_matter() {
        let live = Arc::new(Live::new(client().account(&AccountId::Endpoint("a".into()))));
        assert_eq!(learn(&live, Effect::Failure(Scope::Model), None), Some(Scope::Model), "it begins to cool down");
        drop(live.begin_trial(MODEL));
        let trial = live.begin_trial(MODEL).expect("the last one ended");
        assert!(live.begin_trial(MODEL).is_none(), "one at a time");
        assert_eq!(learn(&live, Effect::Success, Some(&trial)), None);
        drop(trial);
        assert_eq!(live.gate(MODEL, Instant::now()), Gate::Open);
        assert!(live.health.read().is_spotless());
    }

    #[test]
    fn names_that_clients_make_up_share_one_health() {
        let live = Live::new(client().account(&AccountId::Endpoint("a".into())));
        let name = |name| ModelName { name, in_config: false };
        let learn = |model, effect| {
            let seen = Seen { effect, began: Instant::now(), trial: None };
            live.learn(model, &seen, 0, Instant::now, &BREAKER)
        };
        assert_eq!(learn(name("served"), Effect::Success), None);
        learn(name("made-up-1"), Effect::Failure(Scope::Model));
        let now = Instant::now();
        assert_ne!(live.gate(name("made-up-2"), now), Gate::Open);
        assert_eq!(live.gate(name("served"), now), Gate::Open, "it has succeeded once");
        assert_eq!(live.gate(MODEL, now), Gate::Open);
        for n in 0..2 * MODELS_MAX {
            live.note_served(&n.to_string());
        }
        assert_eq!(read(&live.served).len(), MODELS_MAX);
    }

    #[test]
    fn in_flight_is_exact() {
        let live = Arc::new(Live::new(client().account(&AccountId::Endpoint("a".into()))));
        let guards: Vec<_> = (0..3).map(|_| live.enter()).collect();
        assert_eq!(live.in_flight(), 3);
        drop(guards);
        assert_eq!(live.in_flight(), 0);
    }

    #[test]
    fn the_average_fades() {
        let now = Instant::now();
        let mut average = Average::default();
        assert_eq!(average.at(now), None);
        average.observe(Duration::from_millis(100), now);
        average.observe(Duration::from_millis(200), now);
        assert_eq!(average.at(now).unwrap().as_millis(), 120);
        assert!(average.at(now + Duration::from_mins(2)).unwrap() < Duration::from_millis(20));
        assert_eq!(average.mean().unwrap().as_millis(), 120);
    }
}
