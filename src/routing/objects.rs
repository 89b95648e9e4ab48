//! Objects: what was made at one endpoint lives there and nowhere else, so a request that names it goes there. An obligation: if that
//! endpoint cannot take the request, the answer says so, and no other endpoint's 404 stands in for it.

use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lru::LruCache;

use crate::config::AffinityRules;
use crate::fault::{Fault, excerpt};
use crate::ledger::Client;
use crate::ledger::places::{Place, PlaceChange, SOLE_CALLER, Thing, ThingKind};
use crate::limit::Clock;
use crate::request::references::References;
use crate::response::objects::Found;
use crate::routing::callers::Caller;
use crate::routing::lanes::Lane;
use crate::routing::pool::{Endpoint, Pool};
use crate::routing::router::Candidates;

/// Endpoints that are asked for an object that nobody knows, since it may have been made without the gateway.
pub const SEARCHED_MAX: usize = 3;
/// Objects that a good answer to one request shows to be at its endpoint, though nobody knew them: an endpoint may overlook an id that
/// it does not have.
const LEARNED_MAX: usize = 8;
/// Time for which it is remembered that an object was nowhere.
const ABSENT: Duration = Duration::from_mins(1);
/// Ids that are remembered to be nowhere; of more the ones first that were asked for longest ago.
const ABSENT_MAX: usize = 10_000;
/// Time that may be missing from how long an object is remembered before its use is noted.
const RENEWED_AFTER: Duration = Duration::from_hours(6);

/// Ids that no endpoint knew lately.
#[derive(Debug)]
pub struct Objects {
    absent: Mutex<LruCache<Arc<str>, Instant>>,
}

impl Default for Objects {
    fn default() -> Self {
        // Bounded where it grows; a bounded one would take its room at once.
        Self { absent: Mutex::new(LruCache::unbounded()) }
    }
}

/// Whose objects a request may name: what one caller made, another neither finds nor lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Name of its key.
    name: Arc<str>,
    /// True if what anybody made is everybody's.
    is_shared: bool,
}

impl Default for Owner {
    /// Whoever has the server's one key.
    fn default() -> Self {
        static SOLE: LazyLock<Arc<str>> = LazyLock::new(|| SOLE_CALLER.into());
        Self { name: Arc::clone(&SOLE), is_shared: false }
    }
}

impl Owner {
    /// The owner of what a request makes. `shared`: all callers share what they make.
    pub fn new(caller: Option<&Caller>, shared: bool) -> Self {
        match caller {
            Some(caller) if !shared => Self { name: Arc::clone(caller.name()), is_shared: false },
            _ => Self { is_shared: shared, ..Self::default() },
        }
    }

    /// True if it may see a thing that is at these places. What nobody is known to have made is for whoever has the server's one key.
    pub fn sees(&self, places: &[Place]) -> bool {
        self.is_shared || places.iter().any(|place| self.owns(place)) || places.is_empty() && *self.name == *SOLE_CALLER
    }

    fn owns(&self, place: &Place) -> bool {
        self.is_shared || place.owner == self.name
    }

    /// A text that stands for one of its own among those of all callers.
    pub fn key(&self, id: &Arc<str>) -> Arc<str> {
        if *self.name == *SOLE_CALLER { Arc::clone(id) } else { format!("{}\n{id}", self.name).into() }
    }
}

/// Objects of one request.
#[derive(Clone, Debug, Default)]
pub struct Named {
    owner: Owner,
    /// Those that are known, and are to be remembered longer if the request succeeds.
    renewed: Vec<Thing>,
    /// Those that are not known: the endpoint that answers has them.
    unknown: Vec<Arc<str>>,
    /// The object that the request is about.
    subject: Option<Arc<str>>,
    /// True if none is known, so that some endpoints are asked one after the other.
    pub is_searched: bool,
    /// True if the ledger could not be read: they may be known all the same.
    is_unread: bool,
}

/// Where a request may go for the objects that it names.
#[derive(Debug)]
pub struct Resolved {
    /// The endpoints that have them; none if that is not known.
    pub candidates: Option<Arc<Candidates>>,
    /// The objects.
    pub named: Named,
    /// Who can read the request's sealed reasoning; anybody else is asked without it.
    pub readers: Option<Readers>,
    /// The organisations whose objects or sealed reasoning it names: of an endpoint's several keys it needs one of theirs.
    pub organizations: Vec<Arc<str>>,
}

/// Who can read what is sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readers {
    /// The endpoints, by their places in the pool.
    pub endpoints: BTreeSet<usize>,
    /// The organisations: of an endpoint's several keys those of theirs.
    pub organizations: Vec<Arc<str>>,
}

impl Readers {
    /// True if an endpoint, by its place in the pool, can read it with one of its keys.
    pub fn include(&self, (index, endpoint): (usize, &Endpoint), lane: usize) -> bool {
        let is_theirs = |lane: &Lane| self.organizations.contains(&lane.config.organization);
        self.endpoints.contains(&index)
            && (!endpoint.lanes.is_pool() || endpoint.lanes.get(lane).is_some_and(is_theirs))
    }
}

impl Objects {
    /// Finds where the objects of a request are, among the candidates of its model.
    pub async fn resolve(
        &self,
        pool: &Pool,
        (references, owner, is_one_of_several): (References, Owner, bool),
        all: &Arc<Candidates>,
    ) -> Result<Resolved, Fault> {
        let mut named = Named { owner, subject: references.subject.clone(), ..Named::default() };
        let guesses = references.objects.iter().filter(|object| !object.is_certain);
        let guesses: Vec<Arc<str>> = guesses.map(|object| Arc::clone(&object.id)).collect();
        let mut at: Option<Shared> = None;
        let mut sealed: Option<(BTreeSet<usize>, Vec<Arc<str>>)> = None;
        let renewed_before = remembered_until(pool, &pool.clock()).saturating_sub_unsigned(RENEWED_AFTER.as_secs());
        let found = look_up(pool, references).await;
        named.is_unread = found.is_err();
        if named.is_unread && is_one_of_several {
            // Whose they are is not known, so they are nobody's.
            return Err(Fault::LedgerUnavailable);
        }
        for (thing, places) in found.unwrap_or_else(|unread| unread) {
            if thing.kind == ThingKind::Sealed {
                // Its organisation can read it for every caller. The last one is the one that goes on.
                if !places.is_empty() {
                    let theirs = organizations(&places);
                    let mut readers = usable(pool, &places);
                    readers.retain(|index| !is_of_another_key(pool, *index, &theirs));
                    sealed = Some((readers, theirs));
                }
                continue;
            }
            let Some(own) =
                own(places, &named.owner).map_err(|()| Fault::ObjectUnknown { id: excerpt(&thing.name) })?
            else {
                if !guesses.contains(&thing.name) {
                    named.unknown.push(thing.name);
                }
                continue;
            };
            let here = endpoints(pool, &thing, &own)?;
            let theirs = organizations(&own);
            if here.iter().all(|index| is_of_another_key(pool, *index, &theirs)) {
                // Its key is not there any more, or was the endpoint's only one: some keys are asked one after the other.
                named.unknown.push(Arc::clone(&thing.name));
                named.is_searched = true;
            }
            at = Some(match at {
                None => Shared { id: Arc::clone(&thing.name), places: here, organizations: theirs },
                Some(shared) => shared.with(pool, &thing, (&here, &theirs))?,
            });
            if own.iter().any(|place| place.until < renewed_before) {
                named.renewed.push(thing);
            }
        }
        let (candidates, theirs) = match at {
            None => {
                named.is_searched = !named.unknown.is_empty();
                self.refuse_absent(&named, pool.clock().now)?;
                (None, Vec::new())
            }
            Some(Shared { id, places, organizations }) => {
                if named.is_searched {
                    self.refuse_absent(&named, pool.clock().now)?;
                }
                let narrowed = all.narrowed(|candidate| places.contains(&candidate.endpoint));
                if narrowed.list().is_empty() {
                    return Err(apart_from_model(pool, &id, &places));
                }
                (Some(Arc::new(narrowed)), organizations)
            }
        };
        let Some((readers, of_sealed)) = sealed else {
            return Ok(Resolved { candidates, named, readers: None, organizations: theirs });
        };
        let (candidates, readers) = read_by(candidates.as_ref().unwrap_or(all), readers, &pool.server.affinity)?;
        let organizations = match readers {
            // Any key will do where the reasoning may be left out.
            Some(_) => theirs,
            None if theirs.is_empty() => of_sealed.clone(),
            None => theirs.into_iter().filter(|one| of_sealed.contains(one)).collect(),
        };
        let readers = readers.map(|endpoints| Readers { endpoints, organizations: of_sealed });
        Ok(Resolved { candidates: Some(candidates), named, readers, organizations })
    }

    /// Notes that no endpoint that was asked knows the objects of a request.
    pub fn note_absent(&self, named: &Named, now: Instant) {
        if named.is_unread {
            return;
        }
        let mut absent = lock(&self.absent);
        for id in &named.unknown {
            absent.put(named.owner.key(id), now);
        }
        while absent.len() > ABSENT_MAX {
            absent.pop_lru();
        }
    }

    /// An object that was nowhere a moment ago is not searched for again.
    fn refuse_absent(&self, named: &Named, now: Instant) -> Result<(), Fault> {
        let mut absent = lock(&self.absent);
        for id in &named.unknown {
            let key = named.owner.key(id);
            let is_absent = absent.peek(&key).is_some_and(|since| now.saturating_duration_since(*since) < ABSENT);
            if is_absent {
                return Err(Fault::ObjectUnknown { id: excerpt(id) });
            }
            absent.pop(&key);
        }
        Ok(())
    }
}

/// The endpoints, by their places in the pool, that have all objects so far, of which this is the first.
struct Shared {
    id: Arc<str>,
    places: BTreeSet<usize>,
    /// Organisations that have all of them.
    organizations: Vec<Arc<str>>,
}

impl Shared {
    /// Those of them that have another one as well.
    fn with(self, pool: &Pool, thing: &Thing, (here, theirs): (&BTreeSet<usize>, &[Arc<str>])) -> Result<Self, Fault> {
        let mut both: BTreeSet<usize> = self.places.intersection(here).copied().collect();
        let organizations: Vec<_> = self.organizations.into_iter().filter(|one| theirs.contains(one)).collect();
        if organizations.is_empty() {
            // No key of several reaches both.
            both.retain(|index| pool.endpoints.get(*index).is_some_and(|endpoint| !endpoint.lanes.is_pool()));
        }
        if both.is_empty() {
            return Err(Fault::ObjectsApart { ids: [&self.id, &thing.name].map(|id| excerpt(id)) });
        }
        Ok(Self { places: both, organizations, ..self })
    }
}

/// True if an endpoint has several keys, none of which is of these organisations.
fn is_of_another_key(pool: &Pool, index: usize, theirs: &[Arc<str>]) -> bool {
    let has_none = |endpoint: &Arc<Endpoint>| {
        endpoint.lanes.is_pool() && !theirs.iter().any(|one| endpoint.lanes.have_organization(one))
    };
    pool.endpoints.get(index).is_some_and(has_none)
}

fn organizations(places: &[Place]) -> Vec<Arc<str>> {
    places.iter().map(|place| Arc::clone(&place.organization)).collect()
}

/// The places of each thing that a request names. An error has the things alone: the ledger cannot be read.
async fn look_up(pool: &Pool, references: References) -> Result<Vec<Located>, Vec<Located>> {
    let objects = references.objects.into_iter().map(|object| Thing { kind: ThingKind::Object, name: object.id });
    let sealed = references.sealed.into_iter().map(|name| Thing { kind: ThingKind::Sealed, name });
    let things: Vec<Thing> = objects.chain(sealed).collect();
    let found = if pool.ledger.is_down() { None } else { pool.ledger.find_places(things.clone()).await };
    match found {
        Some(found) => Ok(things.into_iter().zip(found).collect()),
        None => Err(things.into_iter().map(|thing| (thing, Vec::new())).collect()),
    }
}

/// A thing with its places.
type Located = (Thing, Vec<Place>);

/// The places of a caller's own thing; none if it is not known, an error if it is another caller's.
fn own(places: Vec<Place>, owner: &Owner) -> Result<Option<Vec<Place>>, ()> {
    let is_known = !places.is_empty();
    let own: Vec<Place> = places.into_iter().filter(|place| owner.owns(place)).collect();
    match (is_known, own.is_empty()) {
        (true, true) => Err(()),
        (false, _) => Ok(None),
        (true, false) => Ok(Some(own)),
    }
}

impl Named {
    /// Notes that an endpoint has answered a request for these objects, so that it has them. `deleted`: the one it is about is gone.
    pub fn note_answered(&self, at: (&Endpoint, usize), deleted: bool, until: i64, ledger: &Client) {
        let unknown =
            self.unknown.iter().take(LEARNED_MAX).map(|id| Thing { kind: ThingKind::Object, name: Arc::clone(id) });
        for thing in unknown.chain(self.renewed.iter().cloned()) {
            ledger.change_place(PlaceChange::Note(thing, place_at(at, &self.owner, until)));
        }
        if deleted {
            self.forget_subject(ledger);
        }
    }

    /// Forgets where the object is that the request is about.
    pub fn forget_subject(&self, ledger: &Client) {
        if let Some(id) = &self.subject {
            let thing = Thing { kind: ThingKind::Object, name: Arc::clone(id) };
            ledger.change_place(PlaceChange::Forget(thing, Arc::clone(&self.owner.name)));
        }
    }
}

/// Notes what an answer showed to be at its endpoint.
pub fn note_found(found: Vec<Found>, at: (&Endpoint, usize), owner: &Owner, until: i64, ledger: &Client) {
    for one in found {
        let thing = match one {
            Found::Object(name) => Thing { kind: ThingKind::Object, name },
            Found::Sealed(name) => Thing { kind: ThingKind::Sealed, name },
        };
        ledger.change_place(PlaceChange::Note(thing, place_at(at, owner, until)));
    }
}

/// When something that is used now is forgotten.
pub fn remembered_until(pool: &Pool, clock: &Clock) -> i64 {
    clock.seconds_after(pool.server.affinity.id_time)
}

/// The place of what was made with one of an endpoint's keys.
fn place_at((endpoint, lane): (&Endpoint, usize), owner: &Owner, until: i64) -> Place {
    let organization = endpoint.lanes.get(lane).map_or(&endpoint.config.organization, |lane| &lane.config.organization);
    Place {
        owner: Arc::clone(&owner.name),
        endpoint: Arc::clone(&endpoint.config.id),
        organization: Arc::clone(organization),
        until,
    }
}

/// The endpoints that have a thing: where it was seen, and the others of that organisation.
fn having<'a>(pool: &'a Pool, places: &'a [Place]) -> impl Iterator<Item = (usize, &'a Endpoint)> {
    let has = |endpoint: &Endpoint| {
        // A key that is gone may have been changed for another one of the same account.
        let is_it = |place: &Place| {
            place.endpoint == endpoint.config.id || endpoint.lanes.have_organization(&place.organization)
        };
        places.iter().any(is_it)
    };
    pool.endpoints.iter().map(AsRef::as_ref).enumerate().filter(move |(_, endpoint)| has(endpoint))
}

/// Those of them that are switched on.
fn usable(pool: &Pool, places: &[Place]) -> BTreeSet<usize> {
    having(pool, places).filter(|(_, endpoint)| endpoint.config.usable()).map(|(index, _)| index).collect()
}

/// Those of them that are switched on. A fault if there are none.
fn endpoints(pool: &Pool, thing: &Thing, places: &[Place]) -> Result<BTreeSet<usize>, Fault> {
    let usable = usable(pool, places);
    if !usable.is_empty() {
        return Ok(usable);
    }
    let endpoint = places.first().map(|place| place.endpoint.to_string()).filter(|_| pool.server.endpoint_headers);
    let id = excerpt(&thing.name);
    let is_gone = having(pool, places).next().is_none();
    Err(if is_gone { Fault::ObjectGone { id, endpoint } } else { Fault::ObjectDisabled { id, endpoint } })
}

/// The candidates of a request whose reasoning these endpoints can read, and these if others may be asked without it.
fn read_by(
    candidates: &Arc<Candidates>,
    readers: BTreeSet<usize>,
    rules: &AffinityRules,
) -> Result<(Arc<Candidates>, Option<BTreeSet<usize>>), Fault> {
    let reads = |endpoint: usize| readers.contains(&endpoint);
    if rules.drop_sealed {
        return Ok((Arc::new(candidates.preferring(reads)), Some(readers)));
    }
    let narrowed = candidates.narrowed(|candidate| reads(candidate.endpoint));
    if narrowed.list().is_empty() { Err(Fault::SealedApart) } else { Ok((Arc::new(narrowed), None)) }
}

/// The fault of a request for a model that is not served where its objects are.
fn apart_from_model(pool: &Pool, id: &str, places: &BTreeSet<usize>) -> Fault {
    let names = places.iter().filter_map(|index| pool.endpoints.get(*index)).map(|one| one.config.id.to_string());
    let endpoint = names.into_iter().next().filter(|_| pool.server.endpoint_headers);
    Fault::ModelApart { id: excerpt(id), endpoint }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
