//! The endpoints: an immutable snapshot that a request holds, and the live state behind it that outlives every reload.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use http::HeaderValue;

use crate::config::{self, Breaker, CallKind, CallSet, Config, Door, Server};
use crate::ledger::budgets::Spends;
use crate::ledger::{Account, AccountId, AccountSet, Client, Drawn, Otherwise, Wanted};
use crate::limit::{Clock, Stamp};
use crate::response::redact::Secrets;
use crate::routing::accounts::EndpointAccounts;
use crate::routing::callers::Caller;
use crate::routing::discovered::Discovered;
use crate::routing::health::{Effect, EndpointHealth, Gate, MODELS_MAX, Scope, Seen};
use crate::routing::objects::Objects;
use crate::routing::path_memory::PathMemory;
use crate::routing::router::{Candidate, Candidates, ModelName, Router};
use crate::routing::sessions::Sessions;
use crate::routing::usage_injection::InjectionMemory;
use crate::upstream::Upstream;
use crate::usage::prices::PriceList;

/// One config, ready to serve.
#[derive(Debug)]
pub struct Pool {
    /// The `server` part of the config.
    pub server: config::Server,
    /// The endpoints, in the order of the config file.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// Model → candidates.
    pub router: Router,
    /// True if an endpoint has limits by model.
    pub has_model_limits: bool,
    /// What is known of objects that are nowhere.
    pub objects: Arc<Objects>,
    /// True if an endpoint has some calls only.
    pub has_call_lists: bool,
    /// True if what was made at one endpoint is not at every other one.
    pub has_several_organizations: bool,
    /// Where sessions are, whichever config they began under.
    pub sessions: Arc<Sessions>,
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
    /// Other addresses, for some calls.
    doors: Vec<(CallKind, Upstream)>,
    /// Secrets that its answers must not show.
    pub secrets: Secrets,
    /// What its models cost.
    pub prices: PriceList,
    /// Accounts of its requests, with the limits of this config.
    pub accounts: EndpointAccounts,
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
        let same_prices = before.is_some_and(|pool| pool.server.prices == server.prices);
        let router = Router::new(&endpoints).with_fallbacks(&server.fallbacks);
        let number = ledger.next_config();
        let endpoints: Vec<Arc<Endpoint>> = endpoints
            .into_iter()
            .map(|config| {
                let before = known.get(config.id.as_ref());
                if let Some(before) = before {
                    before.live.discovered.ask_soon();
                }
                // Its addresses are known as well. A CA file may have changed, whatever its name.
                if let Some(before) = before
                    && before.config == config
                    && same_days
                    && same_prices
                    && config.tls.ca_file.is_none()
                {
                    return Ok(Arc::clone(before));
                }
                let upstream = Upstream::new(&config)?;
                let door = |door: &Door| Ok((door.calls, Upstream::of_door(&config, door)?));
                let doors = config.formats.iter().map(door).collect::<std::io::Result<_>>()?;
                let new = || Arc::new(Live::new(ledger.account(&AccountId::Endpoint(Arc::clone(&config.id)))));
                let live = before.map_or_else(new, |before| Arc::clone(&before.live));
                if before.is_some_and(|before| is_reached_otherwise(&before.config, &config)) {
                    live.start_anew();
                }
                let secrets = secrets_of(&config);
                let accounts = EndpointAccounts::new(&config, &live.account, &server.timezone, (number, &ledger));
                let id_header = id_header(&config.id);
                let prices = prices(&config, &server);
                Ok(Arc::new(Endpoint { config, id_header, upstream, doors, secrets, prices, accounts, live }))
            })
            .collect::<std::io::Result<_>>()?;
        ledger.list_accounts(number, endpoints.iter().flat_map(|endpoint| endpoint.accounts.all()).cloned());
        let has_model_limits = endpoints.iter().any(|endpoint| endpoint.accounts.has_model_limits());
        let has_call_lists = endpoints.iter().any(|endpoint| endpoint.config.calls != CallSet::ALL);
        // Those that are switched off as well: what was made there is not elsewhere.
        let organizations: HashSet<&str> = endpoints.iter().map(|one| &*one.config.organization).collect();
        let has_several_organizations = organizations.len() > 1;
        let sessions = before.map(|before| Arc::clone(&before.sessions)).unwrap_or_default();
        Ok(Self {
            server,
            endpoints,
            router,
            has_model_limits,
            objects: before.map(|before| Arc::clone(&before.objects)).unwrap_or_default(),
            has_call_lists,
            has_several_organizations,
            sessions,
            ledger,
            version: 1,
            loaded_at: SystemTime::now(),
        })
    }

    /// Draws a permit for a call of the gateway's own, which waits for none.
    pub async fn draw_for_own_call(&self, accounts: &Arc<AccountSet>) -> Drawn {
        if !accounts.is_limited() {
            return Drawn::Granted(0, self.ledger.unlimited(accounts));
        }
        let spends = Spends::default();
        let wanted = Wanted { accounts: Arc::clone(accounts), not_before: Stamp::default(), spends };
        self.ledger.draw(self.ledger.ticket(), vec![wanted], Otherwise::LookElsewhere).await
    }

    /// Those of some candidates whose endpoints have calls of this kind.
    pub fn having_call(&self, candidates: &Arc<Candidates>, kind: CallKind) -> Arc<Candidates> {
        if !self.has_call_lists {
            return Arc::clone(candidates);
        }
        let has = |candidate: &Candidate| {
            self.endpoints.get(candidate.endpoint).is_some_and(|one| one.config.calls.contains(kind))
        };
        candidates.having_call(kind, has)
    }

    /// Those of some candidates that a caller's requests may go to.
    pub fn open_to(&self, candidates: &Arc<Candidates>, caller: &Caller) -> Arc<Candidates> {
        let is_open = |candidate: &Candidate| {
            let endpoint = self.endpoints.get(candidate.endpoint);
            endpoint.is_some_and(|endpoint| caller.key.allows_endpoint(&endpoint.config.id))
                && candidate.fallback.as_ref().is_none_or(|model| caller.key.allows_model(model))
        };
        candidates.open_to(caller.number, is_open)
    }

    /// The clocks that limits and health go by, as they are now.
    pub fn clock(&self) -> Clock {
        self.ledger.clock()
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
    let headers = config.headers.iter().map(|(_, value)| value.as_bytes());
    let query = config.query.iter().map(|(_, value)| value.expose().as_bytes());
    std::iter::once(key).chain(headers).chain(query).collect()
}

fn prices(config: &config::Endpoint, server: &Server) -> PriceList {
    PriceList::new(&config.prices, &server.prices, config.price_provider.as_deref(), config.base_url.to_string())
}

impl Endpoint {
    /// True if it takes a WebSocket for calls of this kind whose model stands in the first message.
    pub fn takes_web_socket(&self, kind: CallKind) -> bool {
        self.config.web_sockets.contains(kind)
    }

    /// Address and connection for calls of a kind.
    pub fn upstream_of(&self, kind: CallKind) -> &Upstream {
        let door = self.doors.iter().find(|(calls, _)| *calls == kind);
        door.map_or(&self.upstream, |(_, upstream)| upstream)
    }

    /// All of its addresses.
    pub fn upstreams(&self) -> impl Iterator<Item = &Upstream> {
        std::iter::once(&self.upstream).chain(self.doors.iter().map(|(_, upstream)| upstream))
    }

    /// Returns the accounts that a request for a model counts in.
    pub fn accounts_of(&self, model: ModelName<'_>) -> &Arc<AccountSet> {
        self.accounts.of_model(model.name, || self.live.is_known(model))
    }

    /// Returns the draw of a permit for a model, if it may be asked from that moment on.
    pub fn wanted(&self, model: ModelName<'_>, not_before: Stamp) -> Wanted {
        Wanted { accounts: Arc::clone(self.accounts_of(model)), not_before, spends: Spends::default() }
    }

    /// Whether its health lets requests through at all, whatever their model.
    pub fn gate(&self, now: Instant) -> Gate {
        if !self.live.troubled.load(Ordering::Acquire) {
            return Gate::Open;
        }
        let config = &self.config;
        let mut names = config.models.iter().chain(config.model_mapping.keys());
        let has_patterns = names.any(|name| name.ends_with('*'));
        let models: Vec<&str> = config.sent_models().collect();
        let models = (!has_patterns && !models.is_empty()).then(|| models.iter().copied());
        self.live.health().gate_of_all(models, now)
    }
}

/// True if another key, address or way leads to the endpoint now, so that its record says nothing any more.
fn is_reached_otherwise(before: &config::Endpoint, now: &config::Endpoint) -> bool {
    before.api_key != now.api_key
        || before.base_url != now.base_url
        || before.auth_header != now.auth_header
        || before.formats != now.formats
        || before.version_path != now.version_path
        || before.query != now.query
        || before.proxy != now.proxy
        || before.headers != now.headers
        || before.tls != now.tls
}

/// The right to try out what is cooling down; dropped, it is free for the next.
#[derive(Debug)]
pub struct Trial {
    live: Arc<Live>,
    scope: Scope,
    model: Box<str>,
}

impl Trial {
    /// What is tried out.
    pub fn scope(&self) -> Scope {
        self.scope
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        lock(&self.live.health).end_trial(self.scope, &self.model);
    }
}

/// Longest name that can be a model's, unless the config has it: it is a key in the ledger and a label of metrics.
const MODEL_BYTES_MAX: usize = 200;

/// Name under which the health of all models is kept that the config does not have and that have never succeeded.
const UNKNOWN_MODELS: &str = "*";

/// Live state of an endpoint, shared by every request and every config that has it.
#[derive(Debug)]
pub struct Live {
    health: Mutex<EndpointHealth>,
    /// Set while `health` has anything to say, so that the common case takes no lock.
    troubled: AtomicBool,
    /// Number of times that the record began anew: what an attempt of before shows says nothing.
    record: AtomicU32,
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
            health: Mutex::default(),
            troubled: AtomicBool::default(),
            record: AtomicU32::default(),
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
        if self.troubled.load(Ordering::Acquire) { self.gate_in_trouble(model, now) } else { Gate::Open }
    }

    fn gate_in_trouble(&self, model: ModelName<'_>, now: Instant) -> Gate {
        let key = self.key(model);
        lock(&self.health).gate(key, now)
    }

    /// Names that clients make up share one entry, so that they can neither fill the memory nor pass for models.
    fn key<'a>(&self, model: ModelName<'a>) -> &'a str {
        if self.is_known(model) { model.name } else { UNKNOWN_MODELS }
    }

    /// True if the name is a model's: the config has it, or it has been answered.
    fn is_known(&self, model: ModelName<'_>) -> bool {
        model.in_config || read(&self.served).contains(model.name)
    }

    /// Lets one request through to what is cooling down; none if another one was faster.
    pub fn begin_trial(self: &Arc<Self>, model: ModelName<'_>) -> Option<Trial> {
        let key = self.key(model);
        let scope = lock(&self.health).begin_trial(key)?;
        Some(Trial { live: Arc::clone(self), scope, model: key.into() })
    }

    /// The number of the current record, for [`Live::learn`].
    pub fn record(&self) -> u32 {
        self.record.load(Ordering::Relaxed)
    }

    /// Takes in what an attempt of this record showed. Returns what begins to cool down by it.
    pub fn learn(
        &self,
        model: ModelName<'_>,
        seen: &Seen,
        record: u32,
        now: impl FnOnce() -> Instant,
        breaker: &Breaker,
    ) -> Option<Scope> {
        let is_well = matches!(seen.effect, Effect::Answers | Effect::Success | Effect::Neutral);
        if is_well && seen.trial.is_none() && !self.troubled.load(Ordering::Acquire) || record != self.record() {
            if seen.effect == Effect::Success && !model.in_config {
                self.note_served(model.name);
            }
            return None;
        }
        // What a name showed before it was known stands where it was noted.
        let key = self.key(model);
        let is_new = seen.effect == Effect::Success && !model.in_config && self.note_served(model.name);
        let mut health = lock(&self.health);
        let cools = health.learn(key, seen, now(), breaker);
        if is_new {
            health.inherit(model.name, key);
        }
        let is_spotless = health.is_spotless();
        if is_spotless {
            health.forget_uses();
        }
        self.troubled.store(!is_spotless, Ordering::Release);
        cools
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
    fn start_anew(&self) {
        let mut health = lock(&self.health);
        *health = EndpointHealth::default();
        self.record.fetch_add(1, Ordering::Relaxed);
        self.troubled.store(false, Ordering::Release);
        *lock(&self.last_error) = None;
        self.paths.forget();
        self.usage_injection.forget();
    }

    /// Reads the health, for the status page.
    pub fn health(&self) -> MutexGuard<'_, EndpointHealth> {
        lock(&self.health)
    }

    /// When a request for a model failed last.
    pub fn failed_at(&self, model: ModelName<'_>) -> Option<Instant> {
        let key = self.key(model);
        lock(&self.health).failed_at(key)
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

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
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
    const MODEL: ModelName<'_> = ModelName { name: "m", in_config: true };

    fn learn(live: &Live, effect: Effect, trial: Option<&Trial>) -> Option<Scope> {
        let seen = Seen { effect, began: Instant::now(), trial: trial.map(Trial::scope) };
        live.learn(MODEL, &seen, live.record(), Instant::now, &BREAKER)
    }

    #[test]
    fn live_state_outlives_a_reload_by_id() {
        let before = Pool::new(config(r#"[{"id":"a","models":["m"]},{"id":"b"}]"#), client(), None).unwrap();
        learn(&before.endpoints[0].live, Effect::Failure(Scope::Model), None);
        let after = Pool::new(config(r#"[{"id":"new"},{"id":"a","models":["n"]}]"#), client(), Some(&before)).unwrap();
        assert!(Arc::ptr_eq(&before.endpoints[0].live, &after.endpoints[1].live));
        assert!(Arc::ptr_eq(&before.sessions, &after.sessions));
        assert_ne!(after.endpoints[1].live.gate(MODEL, Instant::now()), Gate::Open);
        assert_eq!(after.endpoints[0].live.gate(MODEL, Instant::now()), Gate::Open);
    }

    #[test]
    fn another_key_address_or_proxy_begins_a_clean_record() {
        for repaired in
            [r#""apiKey":"another-key""#, r#""baseUrl":"http://127.0.0.1:7""#, r#""proxy":"http://127.0.0.1:8""#]
        {
            let before = Pool::new(config(r#"[{"id":"a"}]"#), client(), None).unwrap();
            let live = Arc::clone(&before.endpoints[0].live);
            let record = live.record();
            learn(&live, Effect::KeyRefused, None);
            Pool::new(config(&format!(r#"[{{"id":"a",{repaired}}}]"#)), client(), Some(&before)).unwrap();
            assert_eq!(live.gate(MODEL, Instant::now()), Gate::Open, "{repaired}");
            // What an attempt with the old key shows is of the past.
            let late = Seen { effect: Effect::KeyRefused, began: Instant::now(), trial: None };
            assert_eq!(live.learn(MODEL, &late, record, Instant::now, &BREAKER), None);
            assert_eq!(live.gate(MODEL, Instant::now()), Gate::Open);
        }
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
        assert!(!live.troubled.load(Ordering::Relaxed));
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
