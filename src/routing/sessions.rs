//! Sessions: the endpoint that answered a session last has the beginning of its next request in its cache, so the next request
//! prefers it. It is a preference and no more: a session never waits for an endpoint, nor is it refused for one.
//!
//! What is known here is a cache of the ledger, which all processes share and which outlives them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::HeaderValue;
use lru::LruCache;
use tokio::time::timeout;

use crate::ledger::Client;
use crate::ledger::places::{Place, PlaceChange, SOLE_CALLER, Thing, ThingKind};
use crate::limit::Clock;
use crate::request::session_name::SessionName;
use crate::routing::kept_sessions::{Kept, KeptSessions};
use crate::routing::pool::Endpoint;

/// Time for which a session is kept from its last request on. Providers' caches last five minutes to an hour.
const KEPT: Duration = Duration::from_hours(1);
/// Names that have come once and may be single requests'.
const ONCE_MAX: usize = 10_000;
/// Longest wait for the ledger to say where a session was. It is no more than a preference, and a prompt that is read anew takes seconds.
const LOOK_UP_MAX: Duration = Duration::from_millis(250);
/// Time after which the ledger notes that a session goes on.
const RENEWED_AFTER: Duration = Duration::from_mins(5);

/// Sessions of this process. They outlive every reload.
#[derive(Debug)]
pub struct Sessions {
    kept: Mutex<KeptSessions>,
    once: Mutex<LruCache<u64, Arc<str>>>,
}

/// The session of one request.
#[derive(Clone, Debug)]
pub struct Session {
    name: SessionName,
    /// Id of the endpoint that has its cache.
    at: Option<Arc<str>>,
    /// True once that endpoint turns out to be no place for it.
    is_dropped: bool,
    /// True if its name has come for the first time and may be a single request's.
    is_maybe: bool,
}

/// How a request was served, as its session goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Affinity {
    /// By the endpoint of its session.
    Followed,
    /// By an endpoint that is its session's from now on, the first.
    New,
    /// By another one this once, since that endpoint could not take it.
    Spilled,
    /// By an endpoint that is its session's from now on, in place of one that is no candidate any more.
    Moved,
}

impl Affinity {
    /// Name in headers and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Followed => "followed",
            Self::New => "new",
            Self::Spilled => "spilled",
            Self::Moved => "moved",
        }
    }

    /// Value of the header `x-api-together-affinity`.
    pub fn header(self) -> HeaderValue {
        HeaderValue::from_static(self.name())
    }
}

impl Default for Sessions {
    fn default() -> Self {
        // Bounded where they grow; a bounded one would take its room at once.
        Self { kept: Mutex::default(), once: Mutex::new(LruCache::unbounded()) }
    }
}

impl Sessions {
    /// Returns the session of this name.
    pub async fn find(&self, name: SessionName, ledger: &Client) -> Session {
        match self.recall(name, ledger.clock().now) {
            Some(session) => session,
            // Boxed, since it would make every request's future larger.
            None => Box::pin(self.look_up(name, ledger)).await,
        }
    }

    /// Returns a session as far as it is known without the ledger.
    fn recall(&self, name: SessionName, now: Instant) -> Option<Session> {
        let mut kept = lock(&self.kept);
        let at = Some(Arc::clone(&kept.used(name.hash, now, KEPT)?.endpoint));
        Some(Session { name, at, is_dropped: false, is_maybe: false })
    }

    /// Looks a session up that is not known here.
    async fn look_up(&self, name: SessionName, ledger: &Client) -> Session {
        let asked = async { if ledger.is_down() { None } else { ledger.find_places(vec![thing(name)]).await } };
        let found = timeout(LOOK_UP_MAX, asked).await.ok().flatten();
        let place = found.into_iter().flatten().flatten().next();
        let mut at = place.map(|place| place.endpoint);
        if let Some(endpoint) = &at {
            self.keep(name, endpoint, ledger.clock().now);
        } else {
            at = lock(&self.once).get(&name.hash).cloned();
        }
        Session { name, is_dropped: false, is_maybe: !name.is_certain && at.is_none(), at }
    }

    /// Notes that an endpoint has served a session, and how.
    pub fn note(&self, session: &Session, how: Option<Affinity>, endpoint: &Endpoint, ledger: &Client, clock: &Clock) {
        let hash = session.name.hash;
        let Some(how) = how else { return self.note_once(hash, &endpoint.config.id) };
        let writes = match how {
            Affinity::New | Affinity::Moved => {
                self.keep(session.name, &endpoint.config.id, clock.now);
                true
            }
            Affinity::Followed => self.is_due(session.name, &endpoint.config.id, clock.now),
            Affinity::Spilled => false,
        };
        if writes {
            ledger.change_place(PlaceChange::Note(
                thing(session.name),
                Place {
                    owner: SOLE_CALLER.into(),
                    endpoint: Arc::clone(&endpoint.config.id),
                    organization: Arc::clone(&endpoint.config.organization),
                    until: clock.seconds_after(KEPT),
                },
            ));
        }
    }

    /// Forgets where a session is: its endpoint cannot serve it any more.
    pub fn forget(&self, session: &Session, ledger: &Client) {
        lock(&self.kept).forget(session.name.hash);
        lock(&self.once).pop(&session.name.hash);
        ledger.change_place(PlaceChange::Forget(thing(session.name), SOLE_CALLER.into()));
    }

    /// Number of sessions that are known here.
    pub fn count(&self) -> usize {
        lock(&self.kept).len()
    }

    fn note_once(&self, hash: u64, endpoint: &Arc<str>) {
        let mut once = lock(&self.once);
        once.put(hash, Arc::clone(endpoint));
        if once.len() > ONCE_MAX {
            once.pop_lru();
        }
    }

    fn keep(&self, name: SessionName, endpoint: &Arc<str>, now: Instant) {
        let kept = Kept { endpoint: Arc::clone(endpoint), caller: name.caller, used: now, written: now };
        lock(&self.kept).keep(name.hash, kept);
    }

    /// True if the ledger is to be told that a session is still at its endpoint.
    fn is_due(&self, name: SessionName, endpoint: &Arc<str>, now: Instant) -> bool {
        let mut kept = lock(&self.kept);
        let Some(known) = kept.peek_mut(name.hash) else {
            drop(kept);
            self.keep(name, endpoint, now);
            return true;
        };
        let is_due = now.saturating_duration_since(known.written) >= RENEWED_AFTER;
        if is_due {
            known.written = now;
        }
        is_due
    }
}

impl Session {
    /// Id of the endpoint that has its cache, if there is one.
    pub fn at(&self) -> Option<&str> {
        self.at.as_deref()
    }

    /// A number that is always the same for it, and seldom another's.
    pub fn number(&self) -> u64 {
        self.name.hash
    }

    /// Notes that its endpoint turned out to be no place for it.
    pub fn drop_place(&mut self) {
        self.is_dropped = true;
    }

    /// How it is served by an endpoint of this tier; none if its name may be a single request's. `place`: the tier of its own
    /// endpoint, if that is a candidate.
    pub fn affinity(&self, endpoint: &str, tier: usize, place: Option<usize>) -> Option<Affinity> {
        let affinity = match (&self.at, place) {
            (None, _) => Affinity::New,
            (Some(at), _) if **at == *endpoint => Affinity::Followed,
            // An endpoint that goes before it can take requests again, and has them from now on.
            (Some(_), Some(place)) if place <= tier && !self.is_dropped => Affinity::Spilled,
            (Some(_), _) => Affinity::Moved,
        };
        (!self.is_maybe).then_some(affinity)
    }
}

fn thing(name: SessionName) -> Thing {
    Thing { kind: ThingKind::Session, name: format!("{:016x}", name.hash).into() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
