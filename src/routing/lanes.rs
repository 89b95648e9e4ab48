//! The keys of an endpoint. Where it has several, each is a lane: with permits of its own, a health of its own, and a share of the
//! endpoint's requests. What belongs to the endpoint whatever the key stays with the endpoint.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use crate::config::{self, Breaker, Limit, PerLimit};
use crate::ledger::{AccountId, AccountSet, Client, LimitedAccount};
use crate::limit::{Limits, Stamp};
use crate::response::redact::Secrets;
use crate::routing::health::{Gate, Scope, Seen};
use crate::routing::health_record::HealthRecord;
use crate::routing::live::LastError;
use crate::routing::rates::Gauges;
use crate::upstream::Credential;

/// Keys of an endpoint under one config.
#[derive(Debug)]
pub struct Lanes {
    list: Box<[Lane]>,
    is_pool: bool,
    /// Running sum of their weights.
    sums: Box<[u64]>,
    /// True if all weights are the same, so that no search is needed.
    is_even: bool,
    /// Steps of this length through the sum of the weights come to each key as often as its weight says, and to the same one seldom twice
    /// in a row.
    stride: u64,
    turns: AtomicU64,
    /// Where the first key was that had room, with [`Strategy::FillFirst`](config::Strategy::FillFirst), and when that was last looked for
    /// from the beginning.
    first: AtomicUsize,
    first_looked_at: AtomicU64,
    /// True if some keys are not for all models.
    have_models: bool,
    /// The keys of each organisation.
    by_organization: HashMap<Arc<str>, Vec<usize>>,
    /// What they have together, and when that was added up.
    pub(super) gauges: Mutex<Option<(Stamp, Gauges)>>,
}

/// One key of an endpoint.
#[derive(Debug)]
pub struct Lane {
    /// Configuration.
    pub config: config::Lane,
    /// Secrets that answers to its requests must not show.
    pub secrets: Secrets,
    /// The key as requests carry it: to the endpoint's own address, and to each further one.
    credentials: Box<[Credential]>,
    /// What it has for itself; none if it is the endpoint's only one, whose counts and health are the endpoint's then.
    own: Option<Own>,
}

#[derive(Debug)]
struct Own {
    live: Arc<LaneLive>,
    limited: Option<LaneAccounts>,
}

/// The accounts of requests with a key that has limits: those of the endpoint, and its own.
#[derive(Debug)]
struct LaneAccounts {
    own: LimitedAccount,
    /// For each set of the endpoint's accounts that was drawn from, the same with the key's own. As many at most as the endpoint has
    /// sets for models.
    sets: Mutex<Vec<(Arc<AccountSet>, Arc<AccountSet>)>>,
}

/// Live state of a key, which outlives every reload.
#[derive(Debug, Default)]
pub struct LaneLive {
    /// Digest of the key: another key under the same name begins anew.
    digest: Box<str>,
    /// Its health, as far as trouble is the key's.
    pub health: Arc<HealthRecord>,
    in_flight: AtomicU32,
    requests: AtomicU64,
    last_error: Mutex<Option<LastError>>,
}

impl LaneLive {
    /// State of a key that nothing is known of.
    fn new(digest: Box<str>) -> Self {
        Self { digest, ..Self::default() }
    }

    /// Counts a request in until the guard is dropped.
    pub fn enter(self: &Arc<Self>) -> LaneInFlight {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        LaneInFlight(Arc::clone(self))
    }

    /// Requests that are answered with it at this moment.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Attempts with it since the start.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Takes in what an attempt of the record of this number showed, for a model, which may have been known under another name until now.
    /// Returns what begins to cool down by it.
    pub fn learn(
        &self,
        (model, also): (&str, Option<&str>),
        seen: &Seen,
        record: u32,
        now: impl FnOnce() -> Instant,
        breaker: &Breaker,
    ) -> Option<Scope> {
        if self.health.has_nothing_to_learn(seen, record) {
            return None;
        }
        self.health.learn(model, also, seen, now(), breaker)
    }

    /// Forgets what is held against the key.
    pub(crate) fn start_anew(&self) {
        self.health.begin_anew();
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Remembers a failure of the key.
    pub fn note_error(&self, what: String) {
        let error = LastError { at: SystemTime::now(), what };
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    /// The last failure, if there was one.
    pub fn last_error(&self) -> Option<LastError> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One request in flight with a key.
#[derive(Debug)]
pub struct LaneInFlight(Arc<LaneLive>);

impl Drop for LaneInFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where lanes come from.
pub struct Source<'a> {
    /// Their endpoint.
    pub endpoint: &'a config::Endpoint,
    /// The endpoint's lanes under the config before.
    pub before: Option<&'a Lanes>,
    /// True if another address or way leads to the endpoint now, so that no record says anything any more.
    pub begins_anew: bool,
    /// Makes limits of some numbers.
    pub limits: &'a dyn Fn(PerLimit<Limit>) -> Limits,
    /// Where they draw from.
    pub ledger: &'a Client,
}

impl Lanes {
    /// The keys of an endpoint. Those that were known before keep their live state.
    pub fn new(source: &Source<'_>) -> std::io::Result<Self> {
        let keys = &source.endpoint.keys;
        let known: HashMap<&str, &Arc<LaneLive>> = source.before.iter().flat_map(|before| before.live()).collect();
        let mut limits: Option<Arc<Limits>> = None;
        let list = keys.lanes.iter().map(|config| {
            let own = if keys.is_pool {
                let digest: Box<str> = config::lane_digest(&config.key).into();
                let known = known.get(&*config.id).filter(|known| known.digest == digest && !source.begins_anew);
                let live = known.map_or_else(|| Arc::new(LaneLive::new(digest)), |known| Arc::clone(known));
                let is_limited = config.limits.each().any(|(_, limit)| limit != Limit::Unlimited);
                let limited = is_limited.then(|| {
                    // Those of one file share their limits.
                    let shared = limits.take().filter(|shared| shared.by_kind == config.limits);
                    let shared = shared.unwrap_or_else(|| Arc::new((source.limits)(config.limits)));
                    limits = Some(Arc::clone(&shared));
                    LaneAccounts::new(source, config, shared)
                });
                Some(Own { live, limited })
            } else {
                None
            };
            Ok(Lane {
                secrets: secrets(source.endpoint, &config.key),
                credentials: credentials(source.endpoint, &config.key)?,
                config: config.clone(),
                own,
            })
        });
        let list: Box<[Lane]> = list.collect::<std::io::Result<_>>()?;
        let sums: Box<[u64]> = list
            .iter()
            .scan(0_u64, |sum, lane| {
                *sum += u64::from(lane.config.weight);
                Some(*sum)
            })
            .collect();
        let is_even = list.iter().all(|lane| list.first().is_some_and(|one| one.config.weight == lane.config.weight));
        let total = sums.last().copied().unwrap_or(1);
        let have_models = list.iter().any(|lane| !lane.config.models.is_empty());
        let mut by_organization: HashMap<Arc<str>, Vec<usize>> = HashMap::new();
        for (index, lane) in list.iter().enumerate() {
            by_organization.entry(Arc::clone(&lane.config.organization)).or_default().push(index);
        }
        Ok(Self {
            list,
            is_pool: keys.is_pool,
            is_even,
            stride: stride(total),
            sums,
            turns: AtomicU64::default(),
            first: AtomicUsize::default(),
            first_looked_at: AtomicU64::default(),
            have_models,
            by_organization,
            gauges: Mutex::default(),
        })
    }

    /// True if each key has counts and a health of its own.
    pub fn is_pool(&self) -> bool {
        self.is_pool
    }

    /// The keys, in the order of the config.
    pub fn list(&self) -> &[Lane] {
        &self.list
    }

    /// True if one of the keys belongs to this organisation.
    pub fn have_organization(&self, organization: &str) -> bool {
        self.by_organization.contains_key(organization)
    }

    /// The keys that belong to one of these organisations.
    pub fn of_organizations(&self, organizations: &[Arc<str>]) -> Vec<usize> {
        organizations.iter().filter_map(|one| self.by_organization.get(one)).flatten().copied().collect()
    }

    /// True if what was made with one key is not there for each other one.
    pub fn have_several_organizations(&self) -> bool {
        self.by_organization.len() > 1
    }

    /// A key by its place.
    pub fn get(&self, lane: usize) -> Option<&Lane> {
        self.list.get(lane)
    }

    /// Their live states, by id.
    fn live(&self) -> impl Iterator<Item = (&str, &Arc<LaneLive>)> {
        self.list.iter().filter_map(|lane| Some((&*lane.config.id, &lane.own.as_ref()?.live)))
    }

    /// The gate of the first of them that is open, or else of the one that opens first.
    pub fn gate(&self, now: Instant, gate_of: impl Fn(&Lane) -> Gate) -> Gate {
        let mut first: Option<(Instant, Gate)> = None;
        for gate in self.list.iter().map(gate_of) {
            let opens = match gate {
                Gate::Open => return Gate::Open,
                Gate::TrialDue | Gate::OnTrial => now,
                Gate::Cooling { until } | Gate::Resting { until, .. } => until,
            };
            if first.is_none_or(|(known, _)| opens < known) {
                first = Some((opens, gate));
            }
        }
        first.map_or(Gate::Open, |(_, gate)| gate)
    }

    /// Draws one by weight, however many there are in a few comparisons.
    pub fn draw(&self) -> usize {
        if self.is_even { fastrand::usize(..self.list.len().max(1)) } else { self.at_share(fastrand::u64(..)) }
    }

    /// The one whose share of all numbers this one is in: always the same for the same number.
    pub fn at_share(&self, number: u64) -> usize {
        let total = self.sums.last().copied().unwrap_or(1).max(1);
        let drawn = number % total;
        self.sums.partition_point(|sum| *sum <= drawn)
    }

    /// The one whose turn it is.
    pub fn next_in_turn(&self) -> usize {
        let turn = self.turns.fetch_add(1, Ordering::Relaxed);
        if self.is_even {
            let keys = u64::try_from(self.list.len().max(1)).unwrap_or(1);
            return usize::try_from(turn % keys).unwrap_or_default();
        }
        self.at_share(turn.wrapping_mul(self.stride))
    }

    /// Where to look first for one that has room, if the first of them is to be used up before the next. Where keys are not for all models
    /// there is no such place.
    pub fn first_with_room(&self, now: Stamp) -> usize {
        /// Milliseconds after which those before are looked at again: their limits may have room by then.
        const LOOKED_AFTER: u64 = 1000;
        let looked_at = self.first_looked_at.load(Ordering::Relaxed);
        if self.have_models || now.0.saturating_sub(looked_at) >= LOOKED_AFTER {
            self.first_looked_at.store(now.0, Ordering::Relaxed);
            return 0;
        }
        self.first.load(Ordering::Relaxed)
    }

    /// Notes where it was found, by a request that may have any key.
    pub fn note_first_with_room(&self, lane: usize) {
        self.first.store(lane, Ordering::Relaxed);
    }
}

impl Lanes {
    /// The records of health of several keys, each with the key's digest.
    pub(super) fn health_records(&self) -> impl Iterator<Item = (Arc<str>, Arc<HealthRecord>)> {
        let lives = self.list.iter().filter_map(Lane::live);
        lives.map(|live| (Arc::from(&*live.digest), Arc::clone(&live.health)))
    }
}

impl Lane {
    /// The key as requests carry it to the endpoint's address of this number.
    pub fn credential(&self, address: usize) -> Option<&Credential> {
        self.credentials.get(address)
    }

    /// Live state, if it is one of several keys.
    pub fn live(&self) -> Option<&Arc<LaneLive>> {
        self.own.as_ref().map(|own| &own.live)
    }

    /// Its own limits, if it has any.
    pub fn limited(&self) -> Option<&LimitedAccount> {
        self.own.as_ref()?.limited.as_ref().map(|limited| &limited.own)
    }

    /// Whether its own health lets a request through. `model`: the name under which its health is noted.
    pub fn gate<'a>(&self, model: impl FnOnce() -> &'a str, now: Instant) -> Gate {
        self.own.as_ref().map_or(Gate::Open, |own| own.live.health.gate(model, now))
    }

    /// True if its own limits seem to be reached, by what was found when they were last looked at.
    pub fn seems_full(&self, now: Stamp) -> bool {
        self.limited().is_some_and(|of| of.account.is_held(now))
    }

    /// The accounts of a request with it that counts in these of its endpoint.
    pub fn accounts_with<'a>(&self, base: &'a Arc<AccountSet>) -> Cow<'a, Arc<AccountSet>> {
        match self.own.as_ref().and_then(|own| own.limited.as_ref()) {
            None => Cow::Borrowed(base),
            Some(limited) => Cow::Owned(limited.with(base)),
        }
    }
}

impl LaneAccounts {
    fn new(source: &Source<'_>, config: &config::Lane, limits: Arc<Limits>) -> Self {
        let id = AccountId::Lane { endpoint: Arc::clone(&source.endpoint.id), lane: Arc::clone(&config.id) };
        let own = LimitedAccount { account: source.ledger.account(&id), limits };
        own.account.look_again();
        Self { own, sets: Mutex::default() }
    }

    fn with(&self, base: &Arc<AccountSet>) -> Arc<AccountSet> {
        let mut sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, set)) = sets.iter().find(|(known, _)| Arc::ptr_eq(known, base)) {
            return Arc::clone(set);
        }
        let accounts = base.accounts().iter().chain([&self.own]).cloned().collect();
        let set = Arc::new(AccountSet::new(accounts));
        sets.push((Arc::clone(base), Arc::clone(&set)));
        set
    }
}

fn credentials(endpoint: &config::Endpoint, key: &config::Secret) -> std::io::Result<Box<[Credential]>> {
    let places = std::iter::once(&endpoint.auth_header).chain(endpoint.formats.iter().map(|door| &door.auth_header));
    let credential = |place| {
        Credential::new(key, place)
            .ok_or_else(|| std::io::Error::other("one of its keys has characters that no HTTP header can carry"))
    };
    places.map(credential).collect()
}

fn secrets(endpoint: &config::Endpoint, key: &config::Secret) -> Secrets {
    let headers = endpoint.headers.iter().map(|(_, value)| value.as_bytes());
    let query = endpoint.query.iter().map(|(_, value)| value.expose().as_bytes());
    std::iter::once(key.expose().as_bytes()).chain(headers).chain(query).collect()
}

/// A step about the golden ratio of a sum, and coprime to it, so that steps of it come to every number once before any comes again.
fn stride(total: u64) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let near = total / 8 * 5;
    (near.max(1)..=total.max(1)).find(|step| gcd(*step, total) == 1).unwrap_or(1)
}
