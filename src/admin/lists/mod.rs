//! Lists of objects over several endpoints: each endpoint lists its own, and the client gets one list, a page at a time.
//!
//! Clients page by the id of the last object they have seen. Where that is at each endpoint is remembered with the page; a cursor that is
//! not remembered is found by reading the lists from their beginning.

mod call;
mod cursors;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::task::JoinSet;

pub(crate) use self::call::ListCall;
pub(crate) use self::cursors::Cursors;
use self::cursors::{Cursor, PageEnd};
use super::Answer;
use crate::config::CallKind;
use crate::exchange::own_call::{OwnAnswer, OwnCall, OwnCalls};
use crate::fault::{Fault, excerpt};
use crate::ledger::places::{Thing, ThingKind};
use crate::ledger::{Drawn, Permit};
use crate::request::forward;
use crate::request::shape::CallShape;
use crate::response::objects::Found;
use crate::routing::callers::Named;
use crate::routing::health::Gate;
use crate::routing::objects::{self, Owner};
use crate::routing::pool::{Endpoint, Pool};
use crate::routing::router::ModelName;

/// Pages of each endpoint that are asked for to answer one page: to find a cursor that is not remembered, or where the endpoint's own
/// pages are shorter. Each takes a permit.
const PAGES_MAX: usize = 20;
/// Keys of one endpoint, each of another organisation, that are asked for one list; what the others have is missing in it.
const KEYS_MAX: usize = 16;
/// Objects of one page whose places are noted. Those of an endpoint's own answers are known already.
const NOTED_MAX: usize = 500;
/// Longest time for an endpoint's page, before the list goes on without it.
const PAGE_TIME_MAX: Duration = Duration::from_secs(30);
/// Longest time for the whole answer.
const ANSWER_TIME_MAX: Duration = Duration::from_mins(2);
/// Names the endpoints whose objects are missing in a list.
const PARTIAL: HeaderName = HeaderName::from_static("x-api-together-partial");

/// A page as an endpoint gives it.
#[derive(Deserialize)]
struct Page<'a> {
    #[serde(borrow, default)]
    data: Vec<&'a RawValue>,
    #[serde(default)]
    has_more: bool,
}

/// What is read of an object.
#[derive(Deserialize, Default)]
struct Head {
    #[serde(default)]
    id: String,
    #[serde(default, alias = "created")]
    created_at: serde_json::Value,
}

/// An object of a list.
#[derive(Debug)]
struct Item {
    id: String,
    /// Seconds of Unix time.
    created_at: i64,
    text: Box<str>,
}

impl Item {
    fn new(raw: &RawValue) -> Option<Self> {
        let Head { id, created_at } = serde_json::from_str(raw.get()).ok()?;
        let seconds = || created_at.as_str()?.parse::<jiff::Timestamp>().ok().map(jiff::Timestamp::as_second);
        let created_at = created_at.as_i64().or_else(seconds).unwrap_or_default();
        (!id.is_empty()).then(|| Self { id, created_at, text: raw.get().into() })
    }
}

/// The part of a list that one endpoint has.
struct Source<'a> {
    endpoint: &'a Arc<Endpoint>,
    /// The key, by its place among the endpoint's.
    lane: usize,
    /// Objects that have come and have not been taken, in the endpoint's order.
    items: VecDeque<Item>,
    /// The last one that was asked for.
    fetched: Option<Box<str>>,
    /// The last one that was taken.
    taken: Option<Box<str>>,
    has_more: bool,
    /// Pages that it has been asked for.
    pages: usize,
    failure: Option<Failure>,
}

impl Source<'_> {
    /// The organisation whose list it is.
    fn organization(&self) -> &Arc<str> {
        let lane = self.endpoint.lanes.get(self.lane);
        lane.map_or(&self.endpoint.config.organization, |lane| &lane.config.organization)
    }

    /// True if its next object has to be asked for.
    fn is_due(&self) -> bool {
        self.items.is_empty() && self.has_more
    }

    /// Takes in a page. One that does not go on from the last one ends the list: the endpoint overlooks the cursor.
    fn take_in(&mut self, items: Vec<Item>, has_more: bool) {
        let last: Option<Box<str>> = items.last().map(|item| item.id.as_str().into());
        let goes_on = last.is_some() && last != self.fetched;
        self.has_more = has_more && goes_on;
        if goes_on {
            self.fetched = last;
            self.items.extend(items);
        }
    }
}

/// Why an endpoint's part is missing.
enum Failure {
    /// It does not have such lists.
    NoList,
    /// It cannot be asked now; the fault if no other can either.
    Missing(Fault),
}

/// Whoever asks for a list.
#[derive(Debug)]
pub(crate) struct Asker<'a> {
    /// The caller, if it has a key of its own, and that key.
    pub(crate) named: Option<&'a Named>,
    /// Whose objects it may see.
    pub(crate) owner: Owner,
    /// True if others have made objects that it may not see.
    pub(crate) is_one_of_several: bool,
}

/// A list that is read for somebody.
struct Reader<'a> {
    pool: &'a Pool,
    list: &'a ListCall<'a>,
    asker: &'a Asker<'a>,
    /// Headers that each endpoint is sent.
    headers: HeaderMap,
}

/// True if the list has to be put together here: from the parts of several endpoints, or from what one caller may see. Otherwise an endpoint is
/// asked as for anything else.
pub(crate) fn is_divided(pool: &Pool, list: &ListCall<'_>, asker: &Asker<'_>) -> bool {
    let parts = sources(pool, (list, asker), None).len();
    parts > 1 || parts == 1 && asker.is_one_of_several
}

/// Answers a list.
pub(crate) async fn answer(
    pool: &Pool,
    cursors: &Cursors,
    (list, asker): (&ListCall<'_>, &Asker<'_>),
    headers: &HeaderMap,
) -> Result<Answer, Fault> {
    let headers = forward::forwarded(headers, &pool.server, asker.named.map(|named| &named.key), false);
    let reader = Reader { pool, list, asker, headers };
    let answered = tokio::time::timeout(ANSWER_TIME_MAX, merged(&reader, cursors)).await;
    answered.unwrap_or(Err(Fault::EndpointTimeout))
}

async fn merged(reader: &Reader<'_>, cursors: &Cursors) -> Result<Answer, Fault> {
    let Reader { pool, list, asker, .. } = *reader;
    if list.pages_back {
        let problem = "A list over several endpoints, or of one caller's own, can be paged forward only: use `after` in place of \
                       `before`.";
        return Err(Fault::RequestInvalid { problem: problem.into() });
    }
    let now = pool.clock().now;
    let key = |last: &str| asker.owner.key(&list.key(last).into()).to_string();
    let known = list.after.map(|after| cursors.find(&key(after), after, now)).transpose()?.flatten();
    let mut sources = sources(pool, (list, asker), known.as_deref());
    if let (Some(after), None) = (list.after, known)
        && !skip_to(reader, &mut sources, after).await?
    {
        cursors.put(key(after), PageEnd::Nowhere(now));
        return Err(Fault::ObjectUnknown { id: excerpt(after) });
    }
    let size = list.page_size();
    // Where most may be others', as many as there are to be had.
    let asked = if asker.is_one_of_several { list.page_sizes().1 } else { size };
    refill(reader, &mut sources, asked).await;
    refuse(&sources)?;
    let mut page = Vec::with_capacity(size);
    while page.len() < size && !sources.iter().any(Source::is_due) {
        let Some(source) = next_source(&mut sources, list.is_ascending) else { break };
        let Some(item) = source.items.pop_front() else { break };
        source.taken = Some(item.id.as_str().into());
        if page.len() < NOTED_MAX {
            note(pool, &item, (source.endpoint, source.lane), &asker.owner);
        }
        page.push(item);
        // An endpoint gives fewer than it was asked for, if it wants to.
        if source.is_due() {
            refill(reader, &mut sources, asked).await;
        }
    }
    // One that is missing and was read before has more, for all that is known.
    let is_missing = |source: &Source<'_>| source.failure.is_some() && source.taken.is_some() && !page.is_empty();
    let has_more = sources.iter().any(|source| !source.items.is_empty() || source.has_more || is_missing(source));
    if let Some(last) = page.last() {
        remember(cursors, key(&last.id), &sources);
    }
    Ok(body(list, &page, has_more, &sources, pool.server.endpoint_headers))
}

/// The endpoints that have the list, one of each organisation, as far as it has been read.
fn sources<'a>(
    pool: &'a Pool,
    (list, asker): (&ListCall<'_>, &Asker<'_>),
    known: Option<&[Cursor]>,
) -> Vec<Source<'a>> {
    let kind = CallKind::of_path(list.path);
    let shape = CallShape::new(&Method::GET, list.path);
    let now = pool.clock().now;
    let mut organizations: HashSet<&Arc<str>> = HashSet::new();
    let mut sources = Vec::new();
    let usable = pool.endpoints.iter().filter(|one| one.config.usable() && one.config.calls.contains(kind));
    let is_allowed = |id: &str| asker.named.is_none_or(|named| named.caller.key.allows_endpoint(id));
    let mut endpoints: Vec<_> = usable.filter(|one| is_allowed(&one.config.id)).collect();
    // Of one organisation any endpoint that can be asked now.
    endpoints.sort_by_key(|endpoint| !matches!(endpoint.gate(now), Gate::Open));
    for endpoint in endpoints.into_iter().filter(|one| !one.live.paths.lacks(shape, "", now)) {
        // Of several keys those first that can be used now.
        let (open, closed): (Vec<_>, Vec<_>) = endpoint
            .lanes
            .list()
            .iter()
            .enumerate()
            .partition(|(_, lane)| lane.gate(|| "", now) == Gate::Open && !lane.seems_full(pool.clock().boot));
        let mut of_endpoint = 0;
        for (index, lane) in open.into_iter().chain(closed) {
            let organization = &lane.config.organization;
            if !organizations.insert(organization) {
                continue;
            }
            of_endpoint += 1;
            let cursor = known.iter().copied().flatten().find(|cursor| cursor.organization == *organization);
            let after = cursor.and_then(|cursor| cursor.after.clone());
            let is_left_out = of_endpoint > KEYS_MAX;
            sources.push(Source {
                endpoint,
                lane: index,
                items: VecDeque::new(),
                fetched: after.clone(),
                taken: after,
                has_more: !is_left_out,
                pages: 0,
                failure: is_left_out.then_some(Failure::Missing(Fault::NoneAvailable)),
            });
            if is_left_out {
                break;
            }
        }
    }
    sources
}

/// Notes where an object of a list is.
fn note(pool: &Pool, item: &Item, at: (&Endpoint, usize), owner: &Owner) {
    let until = objects::remembered_until(pool, &pool.clock());
    objects::note_found(vec![Found::Object(item.id.as_str().into())], at, owner, until, &pool.ledger);
}

/// Reads the lists from their beginning until an object has been passed. False if it is not there.
async fn skip_to(reader: &Reader<'_>, sources: &mut [Source<'_>], after: &str) -> Result<bool, Fault> {
    let list = reader.list;
    for _ in 0..PAGES_MAX {
        refill(reader, sources, list.page_sizes().1).await;
        refuse(sources)?;
        while !sources.iter().any(Source::is_due) {
            let Some(source) = next_source(sources, list.is_ascending) else { break };
            let Some(item) = source.items.pop_front() else { break };
            source.taken = Some(item.id.as_str().into());
            if item.id == after {
                return Ok(true);
            }
        }
        if sources.iter().all(|source| source.items.is_empty() && !source.has_more) {
            break;
        }
    }
    Ok(false)
}

/// Asks each endpoint that has nothing left for its next page, all at once, and again while a page has nothing that its asker may see.
async fn refill(reader: &Reader<'_>, sources: &mut [Source<'_>], size: usize) {
    while sources.iter().any(|source| source.is_due() && source.pages < PAGES_MAX) {
        refill_once(reader, sources, size).await;
        if !reader.asker.is_one_of_several {
            return;
        }
    }
    // So many pages of others' objects: what is behind them is missing, and holds nobody up.
    for source in sources.iter_mut().filter(|source| source.is_due()) {
        source.has_more = false;
        source.failure = Some(Failure::Missing(Fault::EndpointTimeout));
    }
}

async fn refill_once(reader: &Reader<'_>, sources: &mut [Source<'_>], size: usize) {
    let Reader { pool, list, headers, .. } = reader;
    let shape = CallShape::new(&Method::GET, list.path);
    let kind = CallKind::of_path(list.path);
    let mut pages = JoinSet::new();
    for (index, source) in sources.iter_mut().enumerate() {
        if !source.is_due() || source.pages >= PAGES_MAX {
            continue;
        }
        source.pages += 1;
        let (endpoint, headers) = (Arc::clone(source.endpoint), headers.clone());
        let (target, lane) = (list.target(source.fetched.as_deref(), size), source.lane);
        let permit = draw(pool, source.endpoint, lane).await;
        match permit {
            Err(fault) => {
                source.has_more = false;
                source.failure = Some(Failure::Missing(fault));
            }
            Ok(mut permit) => {
                pages.spawn(async move {
                    permit.spend();
                    (index, page(&endpoint, (kind, lane), &target, &headers).await)
                });
            }
        }
    }
    for (index, page) in pages.join_all().await {
        let Some(source) = sources.get_mut(index) else { continue };
        match page {
            Ok((items, has_more)) => {
                if let Some(shape) = shape {
                    source.endpoint.live.paths.note_served(shape);
                }
                source.take_in(items, has_more);
                keep_own(reader, source).await;
            }
            // It knows the list, but not the object any more that it was to go on from.
            Err(Failure::NoList) if let Some(after) = &source.fetched => {
                source.has_more = false;
                source.failure = Some(Failure::Missing(Fault::ObjectUnknown { id: excerpt(after) }));
            }
            Err(failure) => {
                if let (Failure::NoList, Some(shape)) = (&failure, shape) {
                    source.endpoint.live.paths.note_missing(shape, None, pool.clock().now);
                }
                source.has_more = false;
                source.failure = Some(failure);
            }
        }
    }
}

/// Leaves out what its asker may not see.
async fn keep_own(reader: &Reader<'_>, source: &mut Source<'_>) {
    if !reader.asker.is_one_of_several || source.items.is_empty() {
        return;
    }
    let things = source.items.iter().map(|item| Thing { kind: ThingKind::Object, name: item.id.as_str().into() });
    let Some(places) = reader.pool.ledger.find_places(things.collect()).await else {
        // Nobody's are shown while it is not known whose they are.
        source.items.clear();
        source.has_more = false;
        source.failure = Some(Failure::Missing(Fault::LedgerUnavailable));
        return;
    };
    let mut places = places.into_iter();
    source.items.retain(|_| places.next().is_some_and(|places| reader.asker.owner.sees(&places)));
}

/// A permit for a page.
async fn draw(pool: &Pool, endpoint: &Arc<Endpoint>, lane: usize) -> Result<Permit, Fault> {
    let now = pool.clock();
    let is_open = |gate| matches!(gate, Gate::Open | Gate::TrialDue);
    let of_key = endpoint.lanes.get(lane).map_or(Gate::Open, |lane| lane.gate(|| "", now.now));
    if !is_open(endpoint.gate(now.now)) || !is_open(of_key) {
        return Err(Fault::NoneAvailable);
    }
    match pool.draw_for_own_call(&endpoint.accounts_at(ModelName { name: "", in_config: true }, lane)).await {
        Drawn::Granted(_, permit) => Ok(permit),
        Drawn::Refused(refusal) => {
            let (id, is_public) = (&endpoint.config.id, pool.server.endpoint_headers);
            let held = refusal.held.iter().map(|held| held.held_by(Arc::clone(id), is_public, now.boot)).collect();
            Err(Fault::LimitsReached { wait: refusal.wait, held })
        }
        Drawn::Unavailable => Err(Fault::LedgerUnavailable),
    }
}

/// One page of an endpoint, and whether it has more.
async fn page(
    endpoint: &Endpoint,
    (kind, lane): (CallKind, usize),
    target: &str,
    headers: &HeaderMap,
) -> Result<(Vec<Item>, bool), Failure> {
    let id = &endpoint.config.id;
    let upstream = endpoint.upstream_of(kind);
    let addresses = upstream.addresses().await;
    let Some(address) = addresses.ok().and_then(|addresses| addresses.first().copied()) else {
        return Err(Failure::Missing(Fault::EndpointUnreachable));
    };
    let calls = OwnCalls::new(endpoint, (kind, lane), address);
    let call = OwnCall { headers: Some(headers), ..OwnCall::get(target) };
    let answered = tokio::time::timeout(PAGE_TIME_MAX, calls.ask(call)).await;
    let OwnAnswer { status, body } = match answered {
        Ok(Ok(answer)) => answer,
        Ok(Err((what, _))) => {
            log::warn!("endpoint {id}: its part of a list is missing: {what}");
            return Err(Failure::Missing(Fault::EndpointUnreachable));
        }
        Err(_) => return Err(Failure::Missing(Fault::EndpointTimeout)),
    };
    if matches!(status, 404 | 405 | 501) {
        return Err(Failure::NoList);
    }
    let page: Option<Page<'_>> = serde_json::from_slice(&body).ok().filter(|_| status == 200);
    let Some(Page { data, has_more }) = page else {
        log::warn!("endpoint {id}: its part of a list is missing: it answered {status}");
        let fault = match status {
            200 => Fault::EndpointUnrecognised,
            401..=403 => Fault::EndpointKeyRefused,
            _ => Fault::EndpointError { status },
        };
        return Err(Failure::Missing(fault));
    };
    Ok((data.into_iter().filter_map(Item::new).collect(), has_more))
}

/// The endpoint that has the next object of the list.
fn next_source<'a, 'b>(sources: &'a mut [Source<'b>], is_ascending: bool) -> Option<&'a mut Source<'b>> {
    let ordered = sources.iter_mut().filter(|source| !source.items.is_empty());
    ordered.min_by(|one, other| {
        let (Some(one), Some(other)) = (one.items.front(), other.items.front()) else {
            return std::cmp::Ordering::Equal;
        };
        let by_time = one.created_at.cmp(&other.created_at);
        let by_time = if is_ascending { by_time } else { by_time.reverse() };
        by_time.then_with(|| one.id.cmp(&other.id))
    })
}

/// The fault of a list that no endpoint gives.
fn refuse(sources: &[Source<'_>]) -> Result<(), Fault> {
    let is_without = |source: &Source<'_>| source.failure.is_some() && source.items.is_empty();
    if !sources.iter().all(is_without) {
        return Ok(());
    }
    let missing = sources.iter().find_map(|source| match &source.failure {
        Some(Failure::Missing(fault)) => Some(fault.clone()),
        _ => None,
    });
    Err(missing.unwrap_or(Fault::CallUnknown))
}

fn remember(cursors: &Cursors, key: String, sources: &[Source<'_>]) {
    let read = sources
        .iter()
        .map(|source| Cursor { organization: Arc::clone(source.organization()), after: source.taken.clone() });
    cursors.put(key, PageEnd::At(read.collect()));
}

fn body(list: &ListCall<'_>, page: &[Item], has_more: bool, sources: &[Source<'_>], is_public: bool) -> Answer {
    let data: Vec<&str> = page.iter().map(|item| &*item.text).collect();
    let id = |item: Option<&Item>| item.map_or(serde_json::Value::Null, |item| item.id.as_str().into());
    let object = if list.cursor == "after" { "\"object\":\"list\"," } else { "" };
    let text = format!(
        "{{{object}\"data\":[{}],\"first_id\":{},\"last_id\":{},\"has_more\":{has_more}}}",
        data.join(","),
        id(page.first()),
        id(page.last()),
    );
    let mut answer = Answer::json(200, text);
    let missing = sources.iter().filter(|source| matches!(source.failure, Some(Failure::Missing(_))));
    let names: Vec<&str> =
        missing.map(|source| if is_public { &*source.endpoint.config.id } else { "hidden" }).collect();
    if let (false, Ok(value)) = (names.is_empty(), HeaderValue::from_str(&names.join(", "))) {
        answer.headers.push((PARTIAL, value));
    }
    answer
}
