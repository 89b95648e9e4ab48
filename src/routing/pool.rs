//! The endpoints: an immutable snapshot that a request holds, and the live state behind it that outlives every reload.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use http::HeaderValue;

use crate::config::{self, Breaker, Config};
use crate::ledger::{Account, Client, Permit, Wanted};
use crate::limit::{Clock, Limits, Stamp};
use crate::response::redact::Secrets;
use crate::routing::health::{Effect, Gate, Health};
use crate::routing::router::Router;
use crate::routing::usage_injection::InjectionMemory;
use crate::upstream::Upstream;

/// One config, ready to serve.
#[derive(Debug)]
pub struct Pool {
    /// The `server` part of the config.
    pub server: config::Server,
    /// The endpoints, in the order of the config file.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// Model → candidates.
    pub router: Router,
    /// Source of permits.
    pub ledger: Client,
    /// The number of the config, counted from the start of the process.
    pub version: u64,
    /// When it was loaded.
    pub loaded_at: SystemTime,
}

/// One endpoint of a pool.
#[derive(Debug)]
pub struct Endpoint {
    /// Configuration.
    pub config: config::Endpoint,
    /// Id as a header's value: escaped outside ASCII.
    pub id_header: HeaderValue,
    /// Address and connection.
    pub upstream: Upstream,
    /// Secrets that its answers must not show.
    pub secrets: Secrets,
    /// Limits.
    pub limits: Arc<Limits>,
    /// Live state, whichever config it came from.
    pub live: Arc<Live>,
}

impl Pool {
    /// The pool of a config. Endpoints that were known before, by their id, keep their live state.
    pub fn new(config: Config, ledger: Client, before: Option<&Self>) -> std::io::Result<Self> {
        let Config { server, endpoints } = config;
        let known: HashMap<&str, &Arc<Endpoint>> =
            before.iter().flat_map(|pool| &pool.endpoints).map(|e| (e.config.id.as_ref(), e)).collect();
        let same_days = before.is_some_and(|pool| pool.server.timezone == server.timezone);
        let router = Router::new(&endpoints);
        let endpoints: Vec<Arc<Endpoint>> = endpoints
            .into_iter()
            .map(|config| {
                let before = known.get(config.id.as_ref());
                // Its addresses are known as well. A CA file may have changed, whatever its name.
                if let Some(before) = before
                    && before.config == config
                    && same_days
                    && config.tls.ca_file.is_none()
                {
                    return Ok(Arc::clone(before));
                }
                let upstream = Upstream::new(&config)?;
                let new = || Arc::new(Live::new(ledger.account(&config.id)));
                let live = before.map_or_else(new, |before| Arc::clone(&before.live));
                live.account.look_again();
                let secrets = secrets_of(&config);
                let limits = Arc::new(Limits::new(&config, &server.timezone));
                let id_header = id_header(&config.id);
                Ok(Arc::new(Endpoint { config, id_header, upstream, secrets, limits, live }))
            })
            .collect::<std::io::Result<_>>()?;
        ledger.set_endpoints(endpoints.iter().map(|endpoint| endpoint.account()).collect());
        Ok(Self { server, endpoints, router, ledger, version: 1, loaded_at: SystemTime::now() })
    }

    /// The clocks that limits and health go by, as they are now.
    pub fn clock(&self) -> Clock {
        self.ledger.clock()
    }

    /// A permit of an endpoint that has no limits.
    pub fn unlimited(&self, endpoint: &Endpoint) -> Permit {
        self.ledger.unlimited(&endpoint.live.account, &endpoint.limits)
    }
}

fn id_header(id: &str) -> HeaderValue {
    let escaped = || HeaderValue::from_str(&id.escape_unicode().to_string());
    let plain = if id.is_ascii() { HeaderValue::from_str(id) } else { escaped() };
    // An id with control characters in it.
    plain.or_else(|_| escaped()).unwrap_or_else(|_| HeaderValue::from_static("-"))
}

fn secrets_of(config: &config::Endpoint) -> Secrets {
    let key = config.api_key.expose().as_bytes();
    std::iter::once(key).chain(config.headers.iter().map(|(_, value)| value.as_bytes())).collect()
}

impl Endpoint {
    /// Returns its account, with the limits of this config.
    pub fn account(&self) -> (Arc<Account>, Arc<Limits>) {
        (Arc::clone(&self.live.account), Arc::clone(&self.limits))
    }

    /// Returns the draw of a permit, if it may be asked from that moment on.
    pub fn wanted(&self, not_before: Stamp) -> Wanted {
        let (account, limits) = self.account();
        Wanted { account, limits, not_before }
    }

    /// True if it seems to be at a limit: a hint for where to look first.
    pub fn seems_full(&self, now: Stamp) -> bool {
        self.limits.any() && self.live.account.seems_full(now)
    }
}

/// The right to try an endpoint out that is cooling down; dropped, it is free for the next.
#[derive(Debug)]
pub struct Trial(Arc<Live>);

impl Drop for Trial {
    fn drop(&mut self) {
        lock(&self.0.health).end_trial();
    }
}

/// Live state of an endpoint, shared by every request and every config that has it.
#[derive(Debug)]
pub struct Live {
    health: Mutex<Health>,
    /// Set while `health` has anything to say, so that the common case takes no lock.
    troubled: AtomicBool,
    /// Account in the ledger.
    pub account: Arc<Account>,
    in_flight: AtomicU32,
    first_byte: Mutex<Average>,
    last_error: Mutex<Option<LastError>>,
    /// Memory about `stream_options` that the gateway added.
    pub usage_injection: InjectionMemory,
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
            health: Mutex::default(),
            troubled: AtomicBool::default(),
            account,
            in_flight: AtomicU32::default(),
            first_byte: Mutex::default(),
            last_error: Mutex::default(),
            usage_injection: InjectionMemory::default(),
        }
    }

    /// Returns whether a request may go to the endpoint now.
    pub fn gate(&self, now: Instant) -> Gate {
        if self.troubled.load(Ordering::Acquire) { lock(&self.health).gate(now) } else { Gate::Open }
    }

    /// Lets one request through to an endpoint that is cooling down; none if another one was faster.
    pub fn begin_trial(self: &Arc<Self>) -> Option<Trial> {
        lock(&self.health).begin_trial().then(|| Trial(Arc::clone(self)))
    }

    /// Takes in what an attempt showed. Returns true if the endpoint begins to cool down by it.
    pub fn learn(&self, effect: Effect, trial: bool, now: impl FnOnce() -> Instant, breaker: &Breaker) -> bool {
        let idle = !trial && matches!(effect, Effect::Answers | Effect::Success | Effect::Neutral);
        if idle && !self.troubled.load(Ordering::Acquire) {
            return false;
        }
        let mut health = lock(&self.health);
        let before = health.cooling_until();
        health.learn(effect, trial, now(), breaker);
        self.troubled.store(!health.is_spotless(), Ordering::Release);
        health.cooling_until() > before
    }

    /// Reads the health, for the status page.
    pub fn health(&self) -> MutexGuard<'_, Health> {
        lock(&self.health)
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

/// Takes a poisoned lock as well: each of these guards plain values that are never left half written.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::config;

    fn client() -> Client {
        Client::new(Clock::read)
    }

    const BREAKER: Breaker = Breaker { failures: 1, cool_down: Duration::from_mins(1) };

    #[test]
    fn live_state_outlives_a_reload_by_id() {
        let before = Pool::new(config(r#"[{"id":"a","models":["m"]},{"id":"b"}]"#), client(), None).unwrap();
        before.endpoints[0].live.learn(Effect::Failure, false, Instant::now, &BREAKER);
        let after = Pool::new(config(r#"[{"id":"new"},{"id":"a","models":["n"]}]"#), client(), Some(&before)).unwrap();
        assert!(Arc::ptr_eq(&before.endpoints[0].live, &after.endpoints[1].live));
        assert!(!matches!(after.endpoints[1].live.gate(Instant::now()), Gate::Open));
        assert_eq!(after.endpoints[0].live.gate(Instant::now()), Gate::Open);
    }

    #[test]
    fn a_success_closes_the_matter() {
        let live = Arc::new(Live::new(client().account(&"a".into())));
        let now = Instant::now();
        assert!(live.learn(Effect::Failure, false, || now, &BREAKER), "it begins to cool down");
        drop(live.begin_trial());
        let trial = live.begin_trial().expect("the last one ended");
        assert!(live.begin_trial().is_none(), "one at a time");
        assert!(!live.learn(Effect::Success, true, || now, &BREAKER));
        drop(trial);
        assert_eq!(live.gate(now), Gate::Open);
        assert!(!live.troubled.load(Ordering::Relaxed));
    }

    #[test]
    fn in_flight_is_exact() {
        let live = Arc::new(Live::new(client().account(&"a".into())));
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
