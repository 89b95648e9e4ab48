//! Model → candidates: which endpoints serve a name, and under which name each is asked for it.
//!
//! Everything is worked out when the config is loaded. A request costs one look-up for an exact name, and one for each
//! distinct pattern length otherwise, however many endpoints there are.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasherDefault, DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::config::{self, CallKind};
use crate::limit::Stamp;
use crate::routing::rate_headers::Rates;
use crate::telemetry::metrics::{self, Counters};

/// One endpoint that can take a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The endpoint's place in the pool.
    pub endpoint: usize,
    /// The name it is asked for, where that is not the client's own.
    pub model: Option<Arc<str>>,
    /// Candidates of a lower tier go first; a higher one is used only when none below it can take the request.
    pub tier: usize,
    /// Share among the candidates of its tier.
    pub weight: u32,
    /// The model that it serves in place of the one that was asked for, where that is another one (`server.fallbacks`).
    pub fallback: Option<Arc<str>>,
}

impl Candidate {
    /// What distinguishes it from the other candidates: an endpoint may serve a model and what takes its place.
    pub fn tried(&self, lane: usize, is_over: bool) -> Tried {
        Tried { endpoint: self.endpoint, lane, is_over, fallback: self.fallback.clone() }
    }
}

/// A candidate that a request has been to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    /// The endpoint's place in the pool.
    pub endpoint: usize,
    /// The key that was sent, by its place among the endpoint's.
    pub lane: usize,
    /// False if it may be gone to once more, with another key.
    pub is_over: bool,
    /// The model that it served in place of the one that was asked for.
    pub fallback: Option<Arc<str>>,
}

impl Tried {
    /// True if it was this candidate.
    pub fn is(&self, candidate: &Candidate) -> bool {
        self.endpoint == candidate.endpoint && self.fallback == candidate.fallback
    }
}

/// A model as an endpoint is asked for it; empty for a request without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelName<'a> {
    /// Name.
    pub name: &'a str,
    /// True if the config has it, so that no client can have made it up.
    pub in_config: bool,
}

/// The candidates for a name, ordered by tier.
#[derive(Debug, Default)]
pub struct Candidates {
    list: Vec<Candidate>,
    /// The label that metrics have for the name.
    label: Box<str>,
    /// True if the name is one of the config, false if it matched a pattern.
    is_exact: bool,
    /// Metrics of each candidate, once there was a request.
    counters: Vec<OnceLock<Arc<Counters>>>,
    /// The endpoints that are none of them, and why, once it was asked for.
    pub(super) outside: OnceLock<Option<Arc<str>>>,
    /// Running sum of the weights of the first tier.
    first_tier: Vec<u64>,
    /// True if all weights are the same, so that no search is needed.
    is_even: bool,
    /// Last rates of many candidates.
    pub(crate) rates: Mutex<Option<(Stamp, Rates)>>,
    /// The running weights of smooth weighted round robin, one for each candidate.
    pub(crate) turns: Mutex<Vec<i64>>,
    /// Those of them that have a kind of calls, once one was asked for.
    by_call: Mutex<Vec<(CallKind, Arc<Self>)>>,
    /// Those of them that a caller's requests may go to, by the caller's number, the latest last.
    by_caller: Mutex<VecDeque<(u64, Arc<Self>)>>,
}

/// Callers whose candidates are kept, so that their turns go on; of more the earliest are worked out anew.
const CALLERS_MAX: usize = 64;

impl Candidates {
    fn new(label: &str, mut matches: Vec<Match>) -> Self {
        // A closer match wins over a wider one; among equals the lower priority number goes first.
        matches.sort_by_key(|m| (std::cmp::Reverse(m.closeness), m.priority, m.endpoint));
        let mut tier = 0;
        let mut list: Vec<Candidate> = Vec::with_capacity(matches.len());
        let mut rank_before = None;
        for m in matches {
            let rank = (m.closeness, m.priority);
            if rank_before.is_some_and(|before| before != rank) {
                tier += 1;
            }
            rank_before = Some(rank);
            let Match { endpoint, model, weight, fallback, .. } = m;
            list.push(Candidate { endpoint, model, tier, weight, fallback });
        }
        let turns = Mutex::new(vec![0; list.len()]);
        let first = || list.iter().take_while(|candidate| candidate.tier == 0);
        let is_even = first().all(|candidate| list.first().is_some_and(|one| one.weight == candidate.weight));
        let first_tier = first()
            .scan(0_u64, |sum, candidate| {
                *sum += u64::from(candidate.weight);
                Some(*sum)
            })
            .collect();
        let counters = list.iter().map(|_| OnceLock::new()).collect();
        let is_exact = label != metrics::OTHER;
        Self {
            list,
            label: label.into(),
            is_exact,
            counters,
            outside: OnceLock::new(),
            first_tier,
            is_even,
            turns,
            rates: Mutex::default(),
            by_call: Mutex::default(),
            by_caller: Mutex::default(),
        }
    }

    /// Those of them that have calls of this kind, as `has` says the first time.
    pub fn having_call(&self, kind: CallKind, has: impl Fn(&Candidate) -> bool) -> Arc<Self> {
        let mut by_call = self.by_call.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, known)) = by_call.iter().find(|(known, _)| *known == kind) {
            return Arc::clone(known);
        }
        let having = Arc::new(self.narrowed(has));
        by_call.push((kind, Arc::clone(&having)));
        having
    }

    /// Those of them that the requests of the caller of this number may go to, as `is_open` says the first time.
    pub fn open_to(&self, caller: u64, is_open: impl Fn(&Candidate) -> bool) -> Arc<Self> {
        let mut by_caller = self.by_caller.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, known)) = by_caller.iter().find(|(known, _)| *known == caller) {
            return Arc::clone(known);
        }
        let open = Arc::new(self.narrowed(is_open));
        if by_caller.len() >= CALLERS_MAX {
            by_caller.pop_front();
        }
        by_caller.push_back((caller, Arc::clone(&open)));
        open
    }

    /// Those of them that have a price for a model, as `has_price` says the first time.
    pub fn priced(&self, model: Option<&str>, has_price: impl Fn(&Candidate) -> bool) -> Arc<Self> {
        // Numbers of callers are small.
        let mut hasher = DefaultHasher::new();
        model.hash(&mut hasher);
        self.open_to(hasher.finish() | 1 << 63, has_price)
    }

    /// The same, those first whose endpoint, by its place in the pool, is one of these: all others are for when none of them can take the
    /// request.
    #[must_use]
    pub fn preferring(&self, is_first: impl Fn(usize) -> bool) -> Self {
        let tiers = self.list.last().map_or(0, |last| last.tier + 1);
        let matches =
            self.list.iter().map(|candidate| candidate.as_match(if is_first(candidate.endpoint) { 0 } else { tiers }));
        Self { is_exact: self.is_exact, ..Self::new(&self.label, matches.collect()) }
    }

    /// Some of them.
    #[must_use]
    pub fn narrowed(&self, is_kept: impl Fn(&Candidate) -> bool) -> Self {
        let kept = self.list.iter().filter(|candidate| is_kept(candidate));
        let matches = kept.map(|candidate| candidate.as_match(0));
        Self { is_exact: self.is_exact, ..Self::new(&self.label, matches.collect()) }
    }

    /// The same, and behind them those of other models, each the first of them that can take a request in its place.
    fn with_fallbacks(&self, others: &[(Arc<str>, Arc<Self>)]) -> Self {
        let mut matches: Vec<Match> = self.list.iter().map(|candidate| candidate.as_match(0)).collect();
        let mut behind = self.list.last().map_or(0, |last| last.tier + 1);
        for (name, other) in others {
            matches.extend(other.list.iter().map(|candidate| Match {
                model: Some(candidate.model.clone().unwrap_or_else(|| Arc::clone(name))),
                fallback: Some(Arc::clone(name)),
                ..candidate.as_match(behind)
            }));
            behind += other.list.last().map_or(0, |last| last.tier + 1);
        }
        Self { is_exact: self.is_exact, ..Self::new(&self.label, matches) }
    }

    /// True if some of them serve another model.
    pub fn have_fallbacks(&self) -> bool {
        self.list.last().is_some_and(|last| last.fallback.is_some())
    }

    /// The name that a candidate is asked for, of a request for `asked`.
    pub fn model_of<'a>(&self, candidate: &'a Candidate, asked: Option<&'a str>) -> ModelName<'a> {
        match &candidate.model {
            Some(mapped) => ModelName { name: mapped, in_config: true },
            None => ModelName { name: asked.unwrap_or_default(), in_config: self.is_exact },
        }
    }

    /// True if the name is one of the config, false if it matched a pattern.
    pub fn is_exact(&self) -> bool {
        self.is_exact
    }

    /// The label that metrics have for the name: itself if it is an exact one of the config.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Returns the metrics of requests to this candidate.
    pub fn counters(&self, candidate: usize) -> Option<&Arc<Counters>> {
        self.counters.get(candidate).map(|counters| counters.get_or_init(Arc::default))
    }

    /// Draws one of the first tier by weight; `None` if it is empty. However many there are, it costs a few
    /// comparisons.
    pub fn draw(&self) -> Option<usize> {
        let drawn = match self.first_tier.as_slice() {
            [] => return None,
            [_] => return Some(0),
            several if self.is_even => return Some(fastrand::usize(..several.len())),
            [.., total] => fastrand::u64(..(*total).max(1)),
        };
        Some(self.first_tier.partition_point(|sum| *sum <= drawn))
    }

    /// The candidates, the first tier first.
    pub fn list(&self) -> &[Candidate] {
        &self.list
    }
}

impl Candidate {
    /// The match that it is made of, in the same order, behind so many tiers.
    fn as_match(&self, behind: usize) -> Match {
        Match {
            endpoint: self.endpoint,
            model: self.model.clone(),
            closeness: EXACT - behind - self.tier,
            priority: 0,
            weight: self.weight,
            fallback: self.fallback.clone(),
        }
    }
}

/// Closeness of a match: longer patterns are closer than shorter ones, exact names closest of all.
type Closeness = usize;
const EXACT: Closeness = usize::MAX;

struct Match {
    endpoint: usize,
    model: Option<Arc<str>>,
    closeness: Closeness,
    priority: u32,
    weight: u32,
    fallback: Option<Arc<str>>,
}

/// Names come from the config, so no client can choose them to collide, and a look-up costs the same in every process.
type Index = HashMap<Box<str>, Arc<Candidates>, BuildHasherDefault<DefaultHasher>>;

/// The index from model names to candidates.
#[derive(Debug, Default)]
pub struct Router {
    exact: Index,
    /// Prefixes of the patterns, without the `*`.
    prefixes: Index,
    /// The distinct lengths of those, the longest first.
    prefix_lengths: Vec<usize>,
    any: Arc<Candidates>,
    names: Vec<Box<str>>,
    /// Models that others take the place of, with all their candidates.
    with_fallbacks: Index,
}

impl Router {
    /// The index over the endpoints of a config. Endpoints that are switched off are in none of its answers.
    pub fn new(endpoints: &[config::Endpoint]) -> Self {
        let names: BTreeSet<&str> = usable(endpoints).flat_map(|(_, endpoint)| served(endpoint)).collect();
        let (patterns, exact): (Vec<&str>, Vec<&str>) = names.into_iter().partition(|name| name.ends_with('*'));
        let mut prefix_lengths: Vec<usize> = patterns.iter().map(|pattern| pattern.len() - 1).collect();
        prefix_lengths.sort_unstable_by(|a, b| b.cmp(a));
        prefix_lengths.dedup();
        let candidates = |name: &str, label: &str| {
            let matches = usable(endpoints).filter_map(|(index, endpoint)| match_of(index, endpoint, name));
            Arc::new(Candidates::new(label, matches.collect()))
        };
        let any = usable(endpoints).map(|(index, endpoint)| any_match(index, endpoint)).collect();
        // Whatever model has a pattern for its longest match is matched by just those patterns that match the pattern
        // itself, so its candidates are known beforehand.
        let prefix = |pattern: &str| pattern.trim_end_matches('*').into();
        Self {
            prefixes: patterns.iter().map(|pattern| (prefix(pattern), candidates(pattern, metrics::OTHER))).collect(),
            exact: exact.iter().map(|name| ((*name).into(), candidates(name, name))).collect(),
            any: Arc::new(Candidates::new(metrics::NONE, any)),
            names: exact.into_iter().map(Into::into).collect(),
            prefix_lengths,
            with_fallbacks: Index::default(),
        }
    }

    /// The same with models that others take the place of, once nobody can take a request for them.
    #[must_use]
    pub fn with_fallbacks(mut self, fallbacks: &BTreeMap<String, Vec<String>>) -> Self {
        let all = |(model, names): (&String, &Vec<String>)| {
            let others: Vec<_> =
                names.iter().filter_map(|name| Some((name.as_str().into(), Arc::clone(self.find(name)?)))).collect();
            let nobody = Arc::new(Candidates::new(model, Vec::new()));
            let own = self.find(model).unwrap_or(&nobody);
            (model.as_str().into(), Arc::new(own.with_fallbacks(&others)))
        };
        let all: Index = fallbacks.iter().map(all).filter(|(_, candidates)| !candidates.list().is_empty()).collect();
        self.with_fallbacks = all;
        self
    }

    /// The candidates for a model; none if no endpoint serves or maps it.
    pub fn find(&self, model: &str) -> Option<&Arc<Candidates>> {
        if !self.with_fallbacks.is_empty()
            && let Some(all) = self.with_fallbacks.get(model)
        {
            return Some(all);
        }
        self.exact.get(model).or_else(|| {
            self.prefix_lengths
                .iter()
                .filter_map(|length| model.get(..*length))
                .find_map(|prefix| self.prefixes.get(prefix))
        })
    }

    /// The candidates for a request that names no model: every endpoint.
    pub fn any(&self) -> &Arc<Candidates> {
        &self.any
    }

    /// Every exact name that is served or mapped, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(AsRef::as_ref)
    }
}

fn usable(endpoints: &[config::Endpoint]) -> impl Iterator<Item = (usize, &config::Endpoint)> {
    endpoints.iter().enumerate().filter(|(_, endpoint)| endpoint.usable())
}

fn served(endpoint: &config::Endpoint) -> impl Iterator<Item = &str> {
    endpoint.models.iter().map(String::as_str).chain(endpoint.model_mapping.keys().map(String::as_str))
}

fn any_match(index: usize, endpoint: &config::Endpoint) -> Match {
    let (priority, weight) = (endpoint.priority, endpoint.weight);
    Match { endpoint: index, model: None, closeness: EXACT, priority, weight, fallback: None }
}

/// An endpoint's closest match for a name (or for a pattern, taken as a name), mapped names before served ones.
fn match_of(index: usize, endpoint: &config::Endpoint, name: &str) -> Option<Match> {
    let mapped = endpoint.model_mapping.iter().map(|(from, to)| (from.as_str(), Some(to.as_str())));
    let served = endpoint.models.iter().map(|model| (model.as_str(), None));
    let (closeness, _, target) = mapped
        .chain(served)
        .filter_map(|(pattern, target)| Some((closeness(pattern, name)?, target.is_some(), target)))
        .max_by_key(|(closeness, mapped, _)| (*closeness, *mapped))?;
    let model = target.filter(|target| *target != name).map(Into::into);
    Some(Match { model, closeness, ..any_match(index, endpoint) })
}

fn closeness(pattern: &str, name: &str) -> Option<Closeness> {
    match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix).then_some(prefix.len()),
        None => (pattern == name).then_some(EXACT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::config;

    fn router(apis: &str) -> Router {
        Router::new(&config(apis).endpoints)
    }

    /// The endpoints that serve a model, tier by tier, each with the name it is asked for.
    fn tiers(router: &Router, model: &str) -> Vec<Vec<(usize, Option<String>)>> {
        let mut tiers: Vec<Vec<_>> = Vec::new();
        for c in router.find(model).map_or(&[][..], |found| found.list()) {
            tiers.resize_with(c.tier + 1, Vec::new);
            tiers[c.tier].push((c.endpoint, c.model.as_deref().map(str::to_owned)));
        }
        tiers
    }

    #[test]
    fn closer_matches_go_first_and_wider_ones_stand_behind_them() {
        let router = router(
            r#"[{"id":"any","models":["*"]}, {"id":"wide","models":["gpt-4*"]},
                {"id":"close","models":["gpt-4o*"]}, {"id":"exact","models":["gpt-4o"]}]"#,
        );
        let plain = |index| vec![(index, None)];
        assert_eq!(tiers(&router, "gpt-4o"), [plain(3), plain(2), plain(1), plain(0)]);
        assert_eq!(tiers(&router, "gpt-4o-mini"), [plain(2), plain(1), plain(0)]);
        assert_eq!(tiers(&router, "gpt-4.1"), [plain(1), plain(0)]);
        assert_eq!(tiers(&router, "llama"), [plain(0)]);
    }

    #[test]
    fn priority_orders_equal_matches() {
        let router =
            router(r#"[{"id":"b","models":["m"],"priority":5}, {"id":"a","models":["m"]}, {"id":"c","models":["m"]}]"#);
        assert_eq!(tiers(&router, "m"), [vec![(1, None), (2, None)], vec![(0, None)]]);
    }

    #[test]
    fn mapped_names_are_served_and_translated() {
        let router = router(
            r#"[{"id":"a","models":["gpt-3.5-turbo"],"modelMapping":{"gpt-3.5":"gpt-3.5-turbo","fast*":"tiny","same":"same"}}]"#,
        );
        assert_eq!(tiers(&router, "gpt-3.5"), [vec![(0, Some("gpt-3.5-turbo".into()))]]);
        assert_eq!(tiers(&router, "gpt-3.5-turbo"), [vec![(0, None)]]);
        assert_eq!(tiers(&router, "faster"), [vec![(0, Some("tiny".into()))]]);
        assert_eq!(tiers(&router, "same"), [vec![(0, None)]]);
        assert!(router.find("other").is_none());
    }

    #[test]
    fn endpoints_that_are_off_are_nowhere() {
        let router = router(
            r#"[{"id":"a","models":["m"],"enabled":false}, {"id":"b","models":["m"],"rpm":0}, {"id":"c","models":["n"]}]"#,
        );
        assert!(router.find("m").is_none());
        assert_eq!(router.any().list().len(), 1);
        assert_eq!(router.names().collect::<Vec<_>>(), ["n"]);
    }

    #[test]
    fn names_that_end_inside_a_character_do_not_panic() {
        let router = router(r#"[{"id":"a","models":["abc*"]}]"#);
        assert!(router.find("a→").is_none());
    }
}
