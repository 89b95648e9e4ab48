//! The endpoints: an immutable snapshot that a request holds, and the live state behind it that outlives every reload.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::HeaderValue;

use crate::config::{self, CallKind, CallSet, Config, Door, Server};
use crate::ledger::budgets::Spends;
use crate::ledger::{AccountId, AccountSet, Client, Drawn, LimitedAccount, Otherwise, Wanted};
use crate::limit::{Clock, Limits, Stamp};
use crate::routing::accounts::EndpointAccounts;
use crate::routing::callers::Caller;
use crate::routing::health::Gate;
use crate::routing::health_record::HealthRecord;
use crate::routing::lanes::{self, Lane, Lanes};
use crate::routing::live::Live;
use crate::routing::objects::Objects;
use crate::routing::router::{Candidate, Candidates, ModelName, Router};
use crate::routing::sessions::Sessions;
use crate::telemetry::trends::FirstBytes;
use crate::upstream::{Credential, Upstream};
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
    /// Its keys.
    pub lanes: Lanes,
    /// What its models cost.
    pub prices: PriceList,
    /// Accounts of its requests, with the limits of this config.
    pub accounts: EndpointAccounts,
    /// Live state, whichever config it came from.
    pub live: Arc<Live>,
}

impl Pool {
    /// Times to the first byte of each endpoint, by its id: their number and sum.
    pub(crate) fn first_bytes(&self) -> impl Iterator<Item = FirstBytes<'_>> {
        self.endpoints.iter().map(|endpoint| (endpoint.config.id.as_ref(), endpoint.live.first_byte_total()))
    }

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
                if before.is_some_and(|before| begins_anew(&before.config, &config)) {
                    live.start_anew();
                }
                let limits = |by_kind| Limits::in_days_of(&config, by_kind, &server.timezone);
                let lanes = Lanes::new(&lanes::Source {
                    endpoint: &config,
                    before: before.map(|before| &before.lanes),
                    begins_anew: before.is_some_and(|before| is_reached_otherwise(&before.config, &config)),
                    limits: &limits,
                    ledger: &ledger,
                })?;
                let accounts = EndpointAccounts::new(&config, &live.account, &server.timezone, (number, &ledger));
                let id_header = id_header(&config.id);
                let prices = prices(&config, &server);
                Ok(Arc::new(Endpoint { config, id_header, upstream, doors, lanes, prices, accounts, live }))
            })
            .collect::<std::io::Result<_>>()?;
        let of_keys = |endpoint: &Arc<Endpoint>| -> Vec<LimitedAccount> {
            endpoint.lanes.list().iter().filter_map(|lane| lane.limited().cloned()).collect()
        };
        let of_endpoints = endpoints.iter().flat_map(|endpoint| endpoint.accounts.all()).cloned();
        ledger.list_accounts(number, of_endpoints.chain(endpoints.iter().flat_map(of_keys)));
        let has_model_limits = endpoints.iter().any(|endpoint| endpoint.accounts.has_model_limits());
        let has_call_lists = endpoints.iter().any(|endpoint| endpoint.config.calls != CallSet::ALL);
        // Those that are switched off as well: what was made there is not elsewhere.
        let lanes = endpoints.iter().flat_map(|endpoint| endpoint.lanes.list());
        let organizations: HashSet<&str> = lanes.map(|lane| &*lane.config.organization).collect();
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

    /// Returns the accounts that a request for a model with one of its keys counts in.
    pub fn accounts_at(&self, model: ModelName<'_>, lane: usize) -> Cow<'_, Arc<AccountSet>> {
        let base = self.accounts_of(model);
        self.lanes.get(lane).map_or(Cow::Borrowed(base), |lane| lane.accounts_with(base))
    }

    /// Returns the draw of a permit for a model with one of its keys, if it may be asked from that moment on.
    pub fn wanted(&self, model: ModelName<'_>, lane: usize, not_before: Stamp) -> Wanted {
        Wanted { accounts: self.accounts_at(model, lane).into_owned(), not_before, spends: Spends::default() }
    }

    /// The key for a call of the gateway's own: the first that could take a request, or else the first.
    pub fn lane_for_own_call(&self, clock: &Clock) -> usize {
        let is_open = |lane: &Lane| lane.gate(|| "", clock.now) == Gate::Open && !lane.seems_full(clock.boot);
        self.lanes.list().iter().position(is_open).unwrap_or_default()
    }

    /// One of its keys, as requests for calls of a kind carry it.
    pub fn credential(&self, kind: CallKind, lane: usize) -> Option<&Credential> {
        let door = self.doors.iter().position(|(calls, _)| *calls == kind);
        self.lanes.get(lane)?.credential(door.map_or(0, |door| door + 1))
    }

    /// Whether its health lets requests through at all, whatever their model, with one key or another.
    pub fn gate(&self, now: Instant) -> Gate {
        match self.gate_of_whole(now) {
            Gate::Open if !self.lanes.is_pool() => Gate::Open,
            Gate::Open => self.lanes.gate(now, |lane| self.gate_of_lane(lane, now)),
            closed => closed,
        }
    }

    /// Whether the health of one of its keys lets requests through at all, whatever their model.
    pub fn gate_of_lane(&self, lane: &Lane, now: Instant) -> Gate {
        lane.live().map_or(Gate::Open, |live| self.gate_in(&live.health, now))
    }

    /// True if one of its keys at least could take a request now. `is_denied`: what is limited takes nothing, since the ledger cannot be
    /// used.
    pub fn has_key_to_serve(&self, clock: &Clock, is_denied: bool) -> bool {
        self.lanes.list().iter().any(|lane| {
            let is_open = || matches!(self.gate_of_lane(lane, clock.now), Gate::Open | Gate::TrialDue);
            !(lane.seems_full(clock.boot) || is_denied && lane.limited().is_some()) && is_open()
        })
    }

    fn gate_of_whole(&self, now: Instant) -> Gate {
        self.gate_in(&self.live.health, now)
    }

    /// The gate of all models in a record of health.
    fn gate_in(&self, record: &HealthRecord, now: Instant) -> Gate {
        if !record.is_troubled() {
            return Gate::Open;
        }
        let config = &self.config;
        let mut names = config.models.iter().chain(config.model_mapping.keys());
        let has_patterns = names.any(|name| name.ends_with('*'));
        let models: Vec<&str> = config.sent_models().collect();
        let models = (!has_patterns && !models.is_empty()).then(|| models.iter().copied());
        record.read().gate_of_all(models, now)
    }
}

/// True if what is held against the endpoint says nothing any more. Each key of several has a record of its own.
fn begins_anew(before: &config::Endpoint, now: &config::Endpoint) -> bool {
    let is_pool = before.keys.is_pool && now.keys.is_pool;
    !is_pool && before.keys != now.keys || is_reached_otherwise(before, now)
}

/// True if another address or way leads to the endpoint now, so that no record says anything any more.
fn is_reached_otherwise(before: &config::Endpoint, now: &config::Endpoint) -> bool {
    before.base_url != now.base_url
        || before.auth_header != now.auth_header
        || before.formats != now.formats
        || before.version_path != now.version_path
        || before.query != now.query
        || before.proxy != now.proxy
        || before.headers != now.headers
        || before.tls != now.tls
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::config;
    use crate::routing::health::{Effect, Scope, Seen};
    use crate::routing::live::test_support::{BREAKER, MODEL, learn};
    use std::time::Duration;

    fn client() -> Client {
        Client::new(Clock::read)
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
            let record = live.health.number();
            learn(&live, Effect::KeyRefused { at_most: Duration::MAX }, None);
            Pool::new(config(&format!(r#"[{{"id":"a",{repaired}}}]"#)), client(), Some(&before)).unwrap();
            assert_eq!(live.gate(MODEL, Instant::now()), Gate::Open, "{repaired}");
            // What an attempt with the old key shows is of the past.
            let late =
                Seen { effect: Effect::KeyRefused { at_most: Duration::MAX }, began: Instant::now(), trial: None };
            assert_eq!(live.learn(MODEL, &late, record, Instant::now, &BREAKER), None);
            assert_eq!(live.gate(MODEL, Instant::now()), Gate::Open);
        }
    }
}
