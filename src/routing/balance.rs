//! Candidates → one: by tier, then by what each endpoint's health allows, then by the strategy. Whether it has a permit is
//! asked afterwards ([`admission`](crate::routing::admission)); what seems to be at a limit goes last.

use std::borrow::Cow;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use crate::config::Strategy;
use crate::ledger::AccountSet;
use crate::limit::{Clock, Stamp};
use crate::request::shape::CallShape;
use crate::routing::health::Gate;
use crate::routing::health_record::Trial;
use crate::routing::lane_choice::{Among, Found, LANES_TRIED_MAX};
use crate::routing::pool::{Endpoint, Pool};
use crate::routing::router::{Candidate, Candidates, ModelName, Tried};

/// A request among its candidates.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// The config it runs under.
    pub pool: &'a Pool,
    /// Candidates.
    pub candidates: &'a Candidates,
    /// The model it asks for.
    pub model: Option<&'a str>,
    /// The shape of its call, if it has one.
    pub shape: Option<CallShape>,
    /// Candidates that it has been to.
    pub tried: &'a [Tried],
    /// Candidate that goes before others of its tier, if it can take the request.
    pub preferred: Option<usize>,
    /// What it wants of an endpoint's keys.
    pub keys: KeyWish<'a>,
}

/// What a request wants of the keys of an endpoint that has several.
#[derive(Clone, Copy, Debug, Default)]
pub struct KeyWish<'a> {
    /// Number of its session, whose requests have the same key while that can take them.
    pub session: Option<u64>,
    /// The organisations one of whose keys it needs, since what it names was made there; none if it needs no particular one.
    pub organizations: &'a [Arc<str>],
}

/// How a candidate can be reached.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// The key, by its place among the endpoint's.
    pub lane: usize,
    /// Whether health lets the request through.
    pub gate: Gate,
    /// True if that is the key's health, not the endpoint's.
    is_keys: bool,
    /// True if the key's own limits seem to be reached.
    is_full: bool,
}

impl Way {
    /// The endpoint's gate where it is closed, the key's elsewhere.
    fn new(gate: Gate, key: Found) -> Self {
        let is_keys = gate == Gate::Open;
        Self { lane: key.lane, gate: if is_keys { key.gate } else { gate }, is_keys, is_full: key.is_full }
    }

    /// The only key, whose health is the endpoint's.
    fn of_one(gate: Gate) -> Self {
        Self { lane: 0, gate, is_keys: false, is_full: false }
    }
}

impl Candidates {
    /// The place of an endpoint among them, if it is one.
    pub fn place_of(&self, pool: &Pool, endpoint: &str) -> Option<usize> {
        let is_it = |index: usize| pool.endpoints.get(index).is_some_and(|one| *one.config.id == *endpoint);
        self.list().iter().position(|candidate| is_it(candidate.endpoint))
    }
}

impl<'a> Options<'a> {
    /// The endpoint of a candidate.
    pub fn endpoint(&self, index: usize) -> Option<&'a Endpoint> {
        self.pool.endpoints.get(self.candidates.list().get(index)?.endpoint).map(AsRef::as_ref)
    }

    /// The model that a candidate is asked for.
    pub fn model_of(&self, index: usize) -> Option<ModelName<'a>> {
        Some(self.candidates.model_of(self.candidates.list().get(index)?, self.model))
    }

    /// Whether health lets the request through to a candidate, with any key that it may still have there.
    pub fn gate(&self, index: usize, clock: &Clock) -> Option<Gate> {
        let candidate = self.candidates.list().get(index)?;
        Some(self.closest_way(candidate, self.endpoint(index)?, self.model_of(index)?, clock)?.gate)
    }

    /// Whether health lets the request through to a candidate with one of its keys.
    pub fn gate_at(&self, index: usize, lane: usize, clock: &Clock) -> Option<Gate> {
        let (endpoint, model) = (self.endpoint(index)?, self.model_of(index)?);
        match endpoint.live.gate(model, clock.now) {
            Gate::Open => Some(endpoint.lanes.get(lane)?.gate(|| endpoint.live.key(model), clock.now)),
            closed => Some(closed),
        }
    }

    /// Begins to try out a candidate that is cooling down; none if another request does.
    pub fn begin_trial(&self, index: usize, way: Way) -> Option<Trial> {
        let (endpoint, model) = (self.endpoint(index)?, self.model_of(index)?);
        if !way.is_keys {
            return endpoint.live.begin_trial(model);
        }
        endpoint.lanes.get(way.lane)?.live()?.health.begin_trial(endpoint.live.key(model))
    }

    fn among(
        &'a self,
        candidate: &'a Candidate,
        endpoint: &'a Endpoint,
        model: ModelName<'a>,
        clock: &'a Clock,
    ) -> Among<'a> {
        let KeyWish { session, organizations } = self.keys;
        let (tried, strategy) = (self.tried, self.pool.server.strategy);
        let are_there = organizations.iter().any(|one| endpoint.lanes.have_organization(one));
        let organizations = if are_there { organizations } else { &[] };
        Among { endpoint, candidate, model, tried, session, organizations, strategy, clock }
    }

    /// A way to a candidate that could take the request now, as far as its keys go.
    fn way(&self, candidate: &Candidate, endpoint: &Endpoint, model: ModelName<'_>, clock: &Clock) -> Option<Way> {
        let gate = endpoint.live.gate(model, clock.now);
        if !endpoint.lanes.is_pool() {
            return Some(Way::of_one(gate));
        }
        Some(Way::new(gate, self.among(candidate, endpoint, model, clock).choose()?))
    }

    /// The way to a candidate that is open, or opens first; none if the request may have none of its keys any more.
    fn closest_way(
        &self,
        candidate: &Candidate,
        endpoint: &Endpoint,
        model: ModelName<'_>,
        clock: &Clock,
    ) -> Option<Way> {
        let gate = endpoint.live.gate(model, clock.now);
        if !endpoint.lanes.is_pool() {
            return Some(Way::of_one(gate));
        }
        Some(Way::new(gate, self.among(candidate, endpoint, model, clock).closest()?))
    }

    /// A candidate that the request has not been to, and that is not known to lack its call.
    fn untried(&self, candidate: &'a Candidate, now: Instant) -> Option<(&'a Endpoint, ModelName<'a>)> {
        if !self.tried.is_empty() && !self.may_be_tried(candidate) {
            return None;
        }
        let endpoint = self.pool.endpoints.get(candidate.endpoint)?;
        let model = self.candidates.model_of(candidate, self.model);
        (!endpoint.live.paths.lacks(self.shape, model.name, now)).then_some((endpoint, model))
    }

    /// True if the request has not been there, or may go there once more with another key.
    fn may_be_tried(&self, candidate: &Candidate) -> bool {
        let there = || self.tried.iter().filter(|tried| tried.is(candidate));
        there().all(|tried| !tried.is_over) && there().count() < LANES_TRIED_MAX
    }

    /// True if every candidate is known to lack the call.
    pub fn is_call_unknown(&self, now: Instant) -> bool {
        let lacks = |candidate: &Candidate| {
            let endpoint = self.pool.endpoints.get(candidate.endpoint);
            let model = self.candidates.model_of(candidate, self.model);
            endpoint.is_some_and(|endpoint| endpoint.live.paths.lacks(self.shape, model.name, now))
        };
        self.candidates.list().iter().all(lacks)
    }

    /// The accounts that the request counts in at a candidate, with one of its keys.
    pub fn accounts(&self, index: usize, lane: usize) -> Option<Cow<'a, Arc<AccountSet>>> {
        Some(self.endpoint(index)?.accounts_at(self.model_of(index)?, lane))
    }

    /// True if a candidate seems to be at a limit: a hint for where to look first.
    fn seems_full(&self, endpoint: &Endpoint, model: ModelName<'_>, clock: &Clock) -> bool {
        let accounts = endpoint.accounts_of(model);
        accounts.seems_full(clock.boot) || accounts.in_ledger() && self.pool.ledger.is_down()
    }
}

/// The candidate that was chosen.
#[derive(Debug)]
pub struct Pick {
    /// Place among the candidates.
    pub candidate: usize,
    /// The key, by its place among the endpoint's.
    pub lane: usize,
    /// Held by the request that tries an endpoint or a key out after its errors.
    pub trial: Option<Trial>,
}

/// A candidate that could be chosen.
#[derive(Clone, Copy, Debug)]
struct Eligible {
    index: usize,
    way: Way,
}

/// Picks one of the candidates that were not tried yet and do not seem to be at a limit.
pub fn pick(options: &Options<'_>, clock: &Clock) -> Option<Pick> {
    if let Some(AtOnce { candidate, lane, is_trial }) = at_once(options, clock) {
        if !is_trial {
            return Some(Pick { candidate, lane, trial: None });
        }
        let way = Way { lane, gate: Gate::TrialDue, is_keys: true, is_full: false };
        if let Some(pick) = begin(options, candidate, way) {
            return Some(pick);
        }
    }
    let mut eligible = Vec::with_capacity(options.candidates.list().len());
    let mut tier = 0;
    for (index, candidate) in options.candidates.list().iter().enumerate() {
        if candidate.tier != tier {
            if let Some(pick) = choose(options, &mut eligible, clock) {
                return Some(pick);
            }
            tier = candidate.tier;
        }
        let Some((endpoint, model)) = options.untried(candidate, clock.now) else { continue };
        if options.seems_full(endpoint, model, clock) {
            continue;
        }
        let way = options.way(candidate, endpoint, model, clock);
        if let Some(way) = way.filter(|way| matches!(way.gate, Gate::Open | Gate::TrialDue)) {
            eligible.push(Eligible { index, way });
        }
    }
    choose(options, &mut eligible, clock)
}

/// A candidate that was drawn, and a key of it that is open or to be tried out.
#[derive(Clone, Copy, Debug)]
struct AtOnce {
    candidate: usize,
    lane: usize,
    is_trial: bool,
}

/// The choice of a strategy that draws, if all that it draws could take the request: then it is the same as if every candidate had
/// been looked at, and costs as much for a thousand of them as for one.
fn at_once(options: &Options<'_>, clock: &Clock) -> Option<AtOnce> {
    let Options { pool, candidates, .. } = *options;
    let if_open = |drawn: usize| {
        let candidate = candidates.list().get(drawn)?;
        let (endpoint, model) = options.untried(candidate, clock.now)?;
        if options.seems_full(endpoint, model, clock) || endpoint.live.gate(model, clock.now) != Gate::Open {
            return None;
        }
        if !endpoint.lanes.is_pool() {
            return Some(AtOnce { candidate: drawn, lane: 0, is_trial: false });
        }
        // A key that was refused is one of many, and tried again when it is drawn.
        let Found { lane, gate, .. } = options.among(candidate, endpoint, model, clock).choose()?;
        Some(AtOnce { candidate: drawn, lane, is_trial: gate == Gate::TrialDue })
    };
    if let Some(preferred) = options.preferred {
        // Those of its tier are for when it cannot take the request, and are not drawn from before that is known.
        return if_open(preferred).filter(|_| candidates.list().get(preferred).is_some_and(|one| one.tier == 0));
    }
    let draw = || if_open(candidates.draw()?);
    let better = |score: &dyn Fn(usize) -> f64| {
        let (first, second) = (draw()?, draw()?);
        // Two draws of the same candidate are no comparison, unless there is no other.
        if first.candidate == second.candidate && candidates.list().len() > 1 {
            return None;
        }
        Some(if score(second.candidate) < score(first.candidate) { second } else { first })
    };
    match pool.server.strategy {
        Strategy::Random => draw(),
        Strategy::RoundRobin | Strategy::MostLeft => None,
        Strategy::FillFirst => if_open(0),
        Strategy::LeastBusy => better(&|index| busyness(options, index)),
        Strategy::Fastest => better(&|index| slowness(options, index, clock.now)),
    }
}

/// Every candidate that was not tried yet and could take the request if its limits allow it, each with the moment from which
/// it may be asked: the first tier first, each tier from a random place on, so that what spills over is spread.
pub fn open(options: &Options<'_>, clock: &Clock) -> Vec<OpenWay> {
    let mut open = Vec::with_capacity(options.candidates.list().len());
    let mut tier_begins = 0;
    let mut tier = 0;
    for (index, candidate) in options.candidates.list().iter().enumerate() {
        if candidate.tier != tier {
            order(options, &mut open, tier_begins, clock);
            (tier, tier_begins) = (candidate.tier, open.len());
        }
        let Some((endpoint, model)) = options.untried(candidate, clock.now) else { continue };
        let from = match endpoint.live.gate(model, clock.now) {
            Gate::Open => Stamp::default(),
            Gate::Resting { until, .. } => clock.boot + until.saturating_duration_since(clock.now),
            Gate::TrialDue | Gate::OnTrial | Gate::Cooling { .. } => continue,
        };
        if endpoint.lanes.is_pool() {
            let is_full = options.seems_full(endpoint, model, clock);
            let keys = options.among(candidate, endpoint, model, clock).drawn_from(is_full);
            open.extend(keys.into_iter().map(|(lane, at)| OpenWay { index, lane, from: from.max(at) }));
        } else {
            open.push(OpenWay { index, lane: 0, from });
        }
    }
    order(options, &mut open, tier_begins, clock);
    open
}

/// A way to a candidate that is open, or rests until a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenWay {
    /// Place among the candidates.
    pub index: usize,
    /// The key, by its place among the endpoint's.
    pub lane: usize,
    /// When it may be asked.
    pub from: Stamp,
}

/// Puts the candidates of a tier, the last of the list, into the order in which they are drawn from: as the strategy has one, or else
/// from a random one on, and the preferred one first.
fn order(options: &Options<'_>, open: &mut [OpenWay], tier_begins: usize, clock: &Clock) {
    let Some(tier) = open.get_mut(tier_begins..).filter(|tier| tier.len() > 1) else { return };
    match options.pool.server.strategy {
        Strategy::FillFirst => {}
        Strategy::MostLeft => {
            let used = |way: &OpenWay| 1.0 - share_left(options, way.index, way.lane, clock);
            tier.sort_by(|one, other| used(one).total_cmp(&used(other)));
        }
        Strategy::Random | Strategy::RoundRobin | Strategy::LeastBusy | Strategy::Fastest => {
            tier.rotate_left(fastrand::usize(..tier.len()));
        }
    }
    let preferred = tier.iter().position(|way| Some(way.index) == options.preferred);
    if let Some(at) = preferred {
        tier.swap(0, at);
    }
}

/// Candidates that may be tried when nothing is open, one request at a time: those that cool down, and those whose rest is our own
/// guess. The one first whose time ends first.
pub fn last_resorts(options: &Options<'_>, clock: &Clock) -> Vec<(usize, Way)> {
    let mut resorts = Vec::new();
    for (index, candidate) in options.candidates.list().iter().enumerate() {
        let Some((endpoint, model)) = options.untried(candidate, clock.now) else { continue };
        let Some(way) = options.closest_way(candidate, endpoint, model, clock) else { continue };
        match way.gate {
            Gate::TrialDue => resorts.push((clock.now, index, way)),
            Gate::Cooling { until } | Gate::Resting { until, may_try: true } => resorts.push((until, index, way)),
            Gate::Open | Gate::OnTrial | Gate::Resting { may_try: false, .. } => {}
        }
    }
    resorts.sort_unstable_by_key(|(until, index, _)| (*until, *index));
    resorts.into_iter().map(|(_, index, way)| (index, way)).collect()
}

/// The floor: candidates that are asked although they cool down and somebody tries them out, since nobody else is left. The one
/// that failed longest ago goes first, unless it has more to do for this gateway than the next. Empty if any candidate is open.
pub fn floor(options: &Options<'_>, clock: &Clock) -> Vec<(usize, Way)> {
    let mut floor = Vec::new();
    for (index, candidate) in options.candidates.list().iter().enumerate() {
        let Some((endpoint, model)) = options.untried(candidate, clock.now) else { continue };
        let Some(way) = options.closest_way(candidate, endpoint, model, clock) else { continue };
        match way.gate {
            Gate::Open => return Vec::new(),
            Gate::TrialDue | Gate::Cooling { .. } | Gate::OnTrial => {
                floor.push((endpoint.live.in_flight(), endpoint.live.failed_at(model), index, way));
            }
            Gate::Resting { .. } => {}
        }
    }
    floor.sort_unstable_by_key(|(in_flight, failed_at, index, _)| (*in_flight, *failed_at, *index));
    floor.into_iter().map(|(.., index, way)| (index, way)).collect()
}

/// True if an untried candidate could take the request, as far as is known.
pub fn any_left(options: &Options<'_>, clock: &Clock) -> bool {
    options.candidates.list().iter().any(|candidate| {
        let Some((endpoint, model)) = options.untried(candidate, clock.now) else { return false };
        let way = || options.closest_way(candidate, endpoint, model, clock);
        !options.seems_full(endpoint, model, clock)
            && way().is_some_and(|way| !way.is_full && !matches!(way.gate, Gate::Resting { may_try: false, .. }))
    })
}

/// Chooses one of the eligible candidates of a tier, which are used up. If another request took its trial meanwhile,
/// the choice is made among the rest.
fn choose(options: &Options<'_>, eligible: &mut Vec<Eligible>, clock: &Clock) -> Option<Pick> {
    while !eligible.is_empty() {
        let preferred = eligible.iter().position(|one| Some(one.index) == options.preferred);
        let at = match preferred {
            Some(at) => at,
            None if eligible.len() == 1 => 0,
            None => by_strategy(options, eligible, clock),
        };
        let Eligible { index: candidate, way } = eligible.swap_remove(at);
        if let Some(pick) = begin(options, candidate, way) {
            eligible.clear();
            return Some(pick);
        }
    }
    None
}

/// Goes this way; none if it is to be tried out, and another request does that.
fn begin(options: &Options<'_>, candidate: usize, way: Way) -> Option<Pick> {
    let lane = way.lane;
    match way.gate {
        Gate::TrialDue => options.begin_trial(candidate, way).map(|trial| Pick { candidate, lane, trial: Some(trial) }),
        _ => Some(Pick { candidate, lane, trial: None }),
    }
}

/// The place, among the eligible ones, of the one that the strategy takes.
fn by_strategy(options: &Options<'_>, eligible: &[Eligible], clock: &Clock) -> usize {
    let candidates = options.candidates;
    match options.pool.server.strategy {
        Strategy::Random => by_weight(candidates, eligible),
        Strategy::RoundRobin => by_turn(candidates, eligible),
        Strategy::LeastBusy => better_of_two(candidates, eligible, |index| busyness(options, index)),
        Strategy::Fastest => better_of_two(candidates, eligible, |index| slowness(options, index, clock.now)),
        Strategy::MostLeft => most_left(options, eligible, clock),
        Strategy::FillFirst => eligible.iter().enumerate().min_by_key(|(_, one)| one.index).map_or(0, |(at, _)| at),
    }
}

fn weight(candidates: &Candidates, index: usize) -> u32 {
    candidates.list().get(index).map_or(1, |candidate| candidate.weight)
}

fn by_weight(candidates: &Candidates, eligible: &[Eligible]) -> usize {
    let total: u64 = eligible.iter().map(|e| u64::from(weight(candidates, e.index))).sum();
    let mut drawn = fastrand::u64(..total.max(1));
    for (at, Eligible { index, .. }) in eligible.iter().enumerate() {
        let share = u64::from(weight(candidates, *index));
        if drawn < share {
            return at;
        }
        drawn -= share;
    }
    0
}

/// Smooth weighted round robin: each gains its weight, the one that is ahead goes and pays the sum.
fn by_turn(candidates: &Candidates, eligible: &[Eligible]) -> usize {
    let mut turns = candidates.turns.lock().unwrap_or_else(PoisonError::into_inner);
    let mut total = 0;
    let mut ahead: Option<(i64, usize, usize)> = None;
    for (at, Eligible { index, .. }) in eligible.iter().enumerate() {
        let gain = i64::from(weight(candidates, *index));
        total += gain;
        let Some(turn) = turns.get_mut(*index) else { continue };
        *turn += gain;
        if ahead.is_none_or(|(most, ..)| *turn > most) {
            ahead = Some((*turn, at, *index));
        }
    }
    let Some((_, at, index)) = ahead else { return 0 };
    if let Some(turn) = turns.get_mut(index) {
        *turn -= total;
    }
    at
}

/// The power of two choices: two are drawn, the one with the lower score goes. Close to the best of all, and no herd
/// follows one momentary best.
fn better_of_two(candidates: &Candidates, eligible: &[Eligible], score: impl Fn(usize) -> f64) -> usize {
    let first = by_weight(candidates, eligible);
    // The second is drawn from the others, so that two candidates are always compared.
    let mut others = eligible.to_vec();
    others.remove(first);
    let second = by_weight(candidates, &others);
    let second = if second >= first { second + 1 } else { second };
    let score_at = |at: usize| eligible.get(at).map_or(f64::MAX, |e| score(e.index));
    if score_at(second) < score_at(first) { second } else { first }
}

/// The one with the largest share of its limits left; of several, one by weight.
fn most_left(options: &Options<'_>, eligible: &[Eligible], clock: &Clock) -> usize {
    let shares: Vec<f64> = eligible.iter().map(|one| share_left(options, one.index, one.way.lane, clock)).collect();
    let most = shares.iter().copied().fold(0.0, f64::max);
    let best: Vec<usize> = shares.iter().enumerate().filter(|(_, share)| **share >= most).map(|(at, _)| at).collect();
    let among: Vec<Eligible> = best.iter().filter_map(|at| eligible.get(*at).copied()).collect();
    best.get(by_weight(options.candidates, &among)).copied().unwrap_or_default()
}

fn share_left(options: &Options<'_>, index: usize, lane: usize, clock: &Clock) -> f64 {
    options.accounts(index, lane).map_or(0.0, |accounts| accounts.share_left(clock.boot))
}

fn busyness(options: &Options<'_>, index: usize) -> f64 {
    let in_flight = options.endpoint(index).map_or(0, |endpoint| endpoint.live.in_flight());
    f64::from(in_flight) / f64::from(weight(options.candidates, index).max(1))
}

/// The time to the first byte. One that has never answered is tried before any other, but by one request at a time.
fn slowness(options: &Options<'_>, index: usize, now: Instant) -> f64 {
    let Some(endpoint) = options.endpoint(index) else { return f64::MAX };
    match endpoint.live.first_byte(now) {
        Some(time) => time.as_secs_f64(),
        None if endpoint.live.in_flight() == 0 => -1.0,
        None => f64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use crate::config::test_support::config;
    use crate::ledger::Client;
    use crate::routing::health::{Effect, Scope, Seen};

    fn pool(strategy: Strategy, apis: &str) -> Pool {
        let mut config = config(apis);
        config.server.strategy = strategy;
        Pool::new(config, Client::new(Clock::read), None).unwrap()
    }

    /// A candidate that a request has been to, by its endpoint's place.
    fn at(endpoint: usize) -> Tried {
        Tried { endpoint, lane: 0, is_over: true, fallback: None }
    }

    fn options<'a>(pool: &'a Pool, tried: &'a [Tried]) -> Options<'a> {
        Options {
            pool,
            candidates: pool.router.find("m").unwrap(),
            model: Some("m"),
            shape: None,
            tried,
            preferred: None,
            keys: KeyWish::default(),
        }
    }

    fn places(ways: &[(usize, Way)]) -> Vec<usize> {
        ways.iter().map(|(index, _)| *index).collect()
    }

    fn picks(pool: &Pool, times: usize) -> Vec<usize> {
        let options = options(pool, &[]);
        let mut counts = vec![0; pool.endpoints.len()];
        for _ in 0..times {
            let pick = pick(&options, &pool.clock()).expect("one is open");
            counts[options.candidates.list()[pick.candidate].endpoint] += 1;
        }
        counts
    }

    fn learn(pool: &Pool, index: usize, effect: Effect, times: usize) {
        for _ in 0..times {
            let seen = Seen { effect, began: Instant::now(), trial: None };
            let model = ModelName { name: "m", in_config: true };
            pool.endpoints[index].live.learn(model, &seen, 0, Instant::now, &pool.server.breaker);
        }
    }

    const FAILURE: Effect = Effect::Failure(Scope::Model);

    fn rest(guessed: bool) -> Effect {
        Effect::Rest { scope: Scope::Model, wait: Duration::from_mins(1), guessed }
    }

    const TWO: &str = r#"[{"id":"a","models":["m"],"weight":3},{"id":"b","models":["m"]}]"#;

    #[test]
    fn random_goes_by_weight() {
        let counts = picks(&pool(Strategy::Random, TWO), 4000);
        assert!((2800..3200).contains(&counts[0]), "{counts:?}");
    }

    #[test]
    fn round_robin_is_smooth_and_exact() {
        let pool = pool(Strategy::RoundRobin, TWO);
        let next = || pick(&options(&pool, &[]), &pool.clock()).expect("both are open").candidate;
        let order: Vec<usize> = (0..8).map(|_| next()).collect();
        assert_eq!(order, [0, 0, 1, 0, 0, 0, 1, 0]);
    }

    #[test]
    fn least_busy_takes_the_one_with_fewer_in_flight_for_its_weight() {
        let pool = pool(Strategy::LeastBusy, TWO);
        let _two: Vec<_> = (0..2).map(|_| pool.endpoints[0].live.enter()).collect();
        assert_eq!(picks(&pool, 20), [0, 20], "2/3 against 0/1");
        let _one = pool.endpoints[1].live.enter();
        assert_eq!(picks(&pool, 20), [20, 0], "2/3 against 1/1");
    }

    #[test]
    fn fastest_tries_new_ones_and_then_takes_the_faster() {
        let pool = pool(Strategy::Fastest, TWO);
        let now = Instant::now();
        pool.endpoints[0].live.observe_first_byte(Duration::from_millis(10), now);
        assert_eq!(picks(&pool, 20), [0, 20], "a new one is tried first");
        pool.endpoints[1].live.observe_first_byte(Duration::from_millis(50), now);
        assert_eq!(picks(&pool, 20), [20, 0]);
    }

    #[test]
    fn fill_first_goes_by_the_order_of_the_file() {
        let pool = pool(Strategy::FillFirst, r#"[{"id":"a","models":["m"]},{"id":"b","models":["m"]}]"#);
        assert_eq!(picks(&pool, 20), [20, 0]);
        learn(&pool, 0, rest(false), 1);
        assert_eq!(picks(&pool, 20), [0, 20]);
        assert_eq!(open(&options(&pool, &[]), &pool.clock())[0].index, 0, "it is waited for first");
    }

    #[test]
    fn lower_tiers_are_for_when_nothing_above_can_take_it() {
        let pool = pool(Strategy::Random, r#"[{"id":"a","models":["m"]},{"id":"b","models":["m"],"priority":1}]"#);
        assert_eq!(picks(&pool, 20), [20, 0]);
        learn(&pool, 0, rest(false), 1);
        assert_eq!(picks(&pool, 20), [0, 20]);
    }

    #[test]
    fn when_all_cool_down_the_first_due_is_the_first_resort() {
        let pool = pool(Strategy::Random, r#"[{"id":"a","models":["m"]},{"id":"b","models":["m"]}]"#);
        let options = options(&pool, &[]);
        learn(&pool, 1, FAILURE, 3);
        std::thread::sleep(Duration::from_millis(2));
        learn(&pool, 0, FAILURE, 3);
        assert!(any_left(&options, &pool.clock()));
        assert!(pick(&options, &pool.clock()).is_none());
        assert!(open(&options, &pool.clock()).is_empty());
        assert_eq!(places(&last_resorts(&options, &pool.clock())), [1, 0]);
        let _trials: Vec<_> =
            (0..2).map(|index| options.begin_trial(index, Way::of_one(Gate::Open)).unwrap()).collect();
        assert!(last_resorts(&options, &pool.clock()).is_empty());
        // The last ones are never refused: the one first that failed longest ago, or that has less to do.
        assert!(any_left(&options, &pool.clock()));
        assert_eq!(places(&floor(&options, &pool.clock())), [1, 0]);
        let _busy = pool.endpoints[1].live.enter();
        assert_eq!(places(&floor(&options, &pool.clock())), [0, 1]);
    }

    #[test]
    fn while_one_is_open_nothing_that_cools_down_is_the_floor() {
        let pool = pool(Strategy::Random, TWO);
        learn(&pool, 0, FAILURE, 3);
        assert!(floor(&options(&pool, &[]), &pool.clock()).is_empty());
        assert_eq!(places(&floor(&options(&pool, &[at(1)]), &pool.clock())), [0]);
        learn(&pool, 1, rest(false), 1);
        assert_eq!(
            places(&floor(&options(&pool, &[]), &pool.clock())),
            [0],
            "one that rests by its own word is left alone"
        );
    }

    #[test]
    fn a_rest_that_is_a_guess_is_tried_by_one_request() {
        let pool = pool(Strategy::Random, TWO);
        learn(&pool, 0, rest(true), 1);
        learn(&pool, 1, rest(false), 1);
        let options = options(&pool, &[]);
        assert_eq!(places(&last_resorts(&options, &pool.clock())), [0]);
        let _trial = options.begin_trial(0, Way::of_one(Gate::Open)).unwrap();
        assert!(last_resorts(&options, &pool.clock()).is_empty());
        assert!(!any_left(&options, &pool.clock()));
        assert_eq!(open(&options, &pool.clock()).len(), 2, "both may be waited for");
    }

    #[test]
    fn whoever_rests_may_be_waited_for() {
        let pool = pool(Strategy::Random, TWO);
        learn(&pool, 0, rest(false), 1);
        let clock = pool.clock();
        let mut open = open(&options(&pool, &[]), &clock);
        open.sort_unstable_by_key(|way| way.index);
        let [OpenWay { index: 0, from: rests, .. }, OpenWay { index: 1, from: is_open, .. }] = open[..] else {
            panic!("{open:?}")
        };
        assert!((59_000..=60_001).contains(&(rests - clock.boot).as_millis()), "{rests:?}");
        assert_eq!(is_open, Stamp::default());
    }

    #[test]
    fn what_spills_over_is_spread_within_its_tier() {
        let apis = r#"[{"id":"a","models":["m"]},{"id":"b","models":["m"]},{"id":"c","models":["m"],"priority":1}]"#;
        let pool = pool(Strategy::Random, apis);
        let mut firsts = [0, 0, 0];
        for _ in 0..100 {
            let open = open(&options(&pool, &[]), &pool.clock());
            assert_eq!(open.len(), 3);
            assert_eq!(open[2].index, 2, "the second tier comes last");
            firsts[open[0].index] += 1;
        }
        assert!(firsts[0] > 20 && firsts[1] > 20, "{firsts:?}");
    }

    #[test]
    fn the_preferred_one_goes_first_within_its_tier() {
        let apis = r#"[{"id":"a","models":["m"]},{"id":"b","models":["m"]},{"id":"c","models":["m"],"priority":1}]"#;
        for strategy in [Strategy::Random, Strategy::RoundRobin, Strategy::LeastBusy, Strategy::Fastest] {
            let pool = pool(strategy, apis);
            let prefers = |preferred| Options { preferred: Some(preferred), ..options(&pool, &[]) };
            for _ in 0..20 {
                assert_eq!(pick(&prefers(1), &pool.clock()).unwrap().candidate, 1);
                assert_eq!(open(&prefers(1), &pool.clock())[0].index, 1);
                assert_ne!(pick(&prefers(2), &pool.clock()).unwrap().candidate, 2, "a better tier is open");
                assert_eq!(open(&prefers(2), &pool.clock())[2].index, 2);
            }
            learn(&pool, 1, rest(false), 1);
            assert_eq!(pick(&prefers(1), &pool.clock()).unwrap().candidate, 0, "it cannot take it");
        }
    }

    #[test]
    fn what_was_tried_is_not_picked_again() {
        let pool = pool(Strategy::Random, TWO);
        assert!(pick(&options(&pool, &[at(0), at(1)]), &pool.clock()).is_none());
        assert!(any_left(&options(&pool, &[at(0)]), &pool.clock()));
        assert!(!any_left(&options(&pool, &[at(0), at(1)]), &pool.clock()));
    }
}
