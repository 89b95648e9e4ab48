//! The endpoints: an immutable snapshot that a request holds, and the live state behind it that outlives every reload.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use jiff::tz::TimeZone;

use crate::blot::Secrets;
use crate::config::{self, Breaker, Config, Limit};
use crate::health::{Effect, Gate, Health};
use crate::limit::{self, Calendar, Clock, Quota, Usage};
use crate::route::Router;
use crate::upstream::Upstream;

/// A permit older than this when its request is sent is swapped for a fresh one.
const PERMIT_AGE_MAX: Duration = Duration::from_millis(250);

/// One config, ready to serve.
#[derive(Debug)]
pub struct Pool {
    /// The `server` part of the config.
    pub server: config::Server,
    /// The endpoints, in the order of the config file.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// Model → candidates.
    pub router: Router,
    calendar: Calendar,
}

/// One endpoint of a pool.
#[derive(Debug)]
pub struct Endpoint {
    /// As the config has it.
    pub config: config::Endpoint,
    /// Where it is and how it is reached.
    pub upstream: Upstream,
    /// What its answers must not show.
    pub secrets: Secrets,
    /// What is known of it, whichever config it came from.
    pub live: Arc<Live>,
}

impl Pool {
    /// The pool of a config. Endpoints that were known before, by their id, keep their live state.
    pub fn new(config: Config, before: Option<&Self>) -> std::io::Result<Self> {
        let known: HashMap<&str, &Arc<Live>> =
            before.iter().flat_map(|pool| &pool.endpoints).map(|e| (e.config.id.as_ref(), &e.live)).collect();
        let router = Router::new(&config.endpoints);
        let endpoints = config
            .endpoints
            .into_iter()
            .map(|config| {
                let upstream = Upstream::new(&config)?;
                let live = known.get(config.id.as_ref()).map_or_else(Arc::default, |live| Arc::clone(live));
                let secrets = secrets_of(&config);
                Ok(Arc::new(Endpoint { config, upstream, secrets, live }))
            })
            .collect::<std::io::Result<_>>()?;
        Ok(Self { server: config.server, endpoints, router, calendar: Calendar::new(TimeZone::system()) })
    }

    /// The clocks that limits and health go by, as they are now.
    pub fn clock(&self) -> Clock {
        self.calendar.clock(Instant::now(), SystemTime::now())
    }
}

fn secrets_of(config: &config::Endpoint) -> Secrets {
    let key = config.api_key.expose().as_bytes();
    std::iter::once(key).chain(config.headers.iter().map(|(_, value)| value.as_bytes())).collect()
}

impl Endpoint {
    /// How long until its limits allow another attempt; none if they do now.
    pub fn full_for(&self, clock: &Clock) -> Option<Duration> {
        let quota = self.quota();
        let is_limited = [quota.rpm, quota.rpd].iter().any(|limit| matches!(limit, Limit::AtMost(_)));
        if is_limited { lock(&self.live.usage).full_for(quota, clock) } else { None }
    }

    /// Counts an attempt, if the limits allow it.
    pub fn take_permit(&self, clock: &Clock) -> Option<Permit> {
        let counted = lock(&self.live.usage).take(self.quota(), clock)?;
        Some(Permit { counted: Some(counted), taken: clock.now, live: Arc::clone(&self.live) })
    }

    fn quota(&self) -> Quota {
        Quota { rpm: self.config.rpm, rpd: self.config.rpd }
    }
}

/// One attempt that was counted. Dropped before it is spent, it was never sent and is given back.
#[derive(Debug)]
pub struct Permit {
    counted: Option<limit::Permit>,
    taken: Instant,
    live: Arc<Live>,
}

impl Permit {
    /// The attempt is on its way.
    pub fn spend(&mut self) {
        if self.counted.take().is_some() {
            self.live.attempts.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether it was counted for a moment that is not this one any more: the limits are about when a request is sent.
    pub fn is_stale(&self, clock: &Clock) -> bool {
        let waited = clock.now.saturating_duration_since(self.taken) > PERMIT_AGE_MAX;
        self.counted.is_some_and(|counted| waited || counted.is_of_another_day(clock))
    }

    /// Gives it back: the attempt was not sent.
    pub fn give_back(&mut self) {
        if let Some(counted) = self.counted.take() {
            lock(&self.live.usage).give_back(counted);
        }
    }

    /// Whether the attempt is on its way, or was.
    pub fn is_spent(&self) -> bool {
        self.counted.is_none()
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.give_back();
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

/// What is known of an endpoint, shared by every request and every config that has it.
#[derive(Debug)]
pub struct Live {
    health: Mutex<Health>,
    /// Set while `health` has anything to say, so that the common case takes no lock.
    troubled: AtomicBool,
    usage: Mutex<Usage>,
    in_flight: AtomicU32,
    first_byte: Mutex<Average>,
    /// Attempts that were sent, since the start.
    attempts: AtomicU64,
    last_error: Mutex<Option<LastError>>,
}

impl Default for Live {
    fn default() -> Self {
        Self {
            health: Mutex::default(),
            troubled: AtomicBool::default(),
            usage: Mutex::new(Usage::new(Instant::now())),
            in_flight: AtomicU32::default(),
            first_byte: Mutex::default(),
            attempts: AtomicU64::default(),
            last_error: Mutex::default(),
        }
    }
}

/// The last failure of an endpoint, for the status page.
#[derive(Clone, Debug)]
pub struct LastError {
    /// When.
    pub at: SystemTime,
    /// What happened.
    pub what: String,
}

impl Live {
    /// Whether a request may go to the endpoint now.
    pub fn gate(&self, now: Instant) -> Gate {
        if self.troubled.load(Ordering::Acquire) { lock(&self.health).gate(now) } else { Gate::Open }
    }

    /// Lets one request through to an endpoint that is cooling down; none if another one was faster.
    pub fn begin_trial(self: &Arc<Self>) -> Option<Trial> {
        lock(&self.health).begin_trial().then(|| Trial(Arc::clone(self)))
    }

    /// Takes in what an attempt showed. Returns true if the endpoint begins to cool down by it.
    pub fn learn(&self, effect: Effect, trial: bool, now: Instant, breaker: &Breaker) -> bool {
        let idle = !trial && matches!(effect, Effect::Answers | Effect::Success | Effect::Neutral);
        if idle && !self.troubled.load(Ordering::Acquire) {
            return false;
        }
        let mut health = lock(&self.health);
        let before = health.cooling_until();
        health.learn(effect, trial, now, breaker);
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

    /// The attempts of the last minute and of today.
    pub fn used(&self, clock: &Clock) -> (u64, u64) {
        lock(&self.usage).used(clock)
    }

    /// Attempts that were sent since the start.
    pub fn attempts(&self) -> u64 {
        self.attempts.load(Ordering::Relaxed)
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

/// A poisoned lock is taken all the same: each of these guards plain values that are never left half written.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::config;

    const BREAKER: Breaker = Breaker { failures: 1, cool_down: Duration::from_mins(1) };

    #[test]
    fn live_state_outlives_a_reload_by_id() {
        let before = Pool::new(config(r#"[{"id":"a","models":["m"]},{"id":"b"}]"#), None).unwrap();
        before.endpoints[0].live.learn(Effect::Failure, false, Instant::now(), &BREAKER);
        let after = Pool::new(config(r#"[{"id":"new"},{"id":"a","models":["n"]}]"#), Some(&before)).unwrap();
        assert!(Arc::ptr_eq(&before.endpoints[0].live, &after.endpoints[1].live));
        assert!(!matches!(after.endpoints[1].live.gate(Instant::now()), Gate::Open));
        assert_eq!(after.endpoints[0].live.gate(Instant::now()), Gate::Open);
    }

    #[test]
    fn a_success_closes_the_matter() {
        let live = Arc::new(Live::default());
        let now = Instant::now();
        assert!(live.learn(Effect::Failure, false, now, &BREAKER), "it begins to cool down");
        drop(live.begin_trial());
        let trial = live.begin_trial().expect("the last one ended");
        assert!(live.begin_trial().is_none(), "one at a time");
        assert!(!live.learn(Effect::Success, true, now, &BREAKER));
        drop(trial);
        assert_eq!(live.gate(now), Gate::Open);
        assert!(!live.troubled.load(Ordering::Relaxed));
    }

    #[test]
    fn in_flight_is_exact() {
        let live = Arc::new(Live::default());
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
