//! Candidates → one: by tier, then by what each endpoint's health allows, then by the strategy. Whether it has a permit is
//! asked afterwards ([`admission`](crate::routing::admission)); what seems to be at a limit goes last.

use std::sync::PoisonError;
use std::time::Instant;

use crate::config::Strategy;
use crate::limit::{Clock, Stamp};
use crate::routing::health::Gate;
use crate::routing::pool::{Endpoint, Pool, Trial};
use crate::routing::router::{Candidate, Candidates};

/// The candidate that was chosen.
#[derive(Debug)]
pub struct Pick {
    /// Place among the candidates.
    pub candidate: usize,
    /// Held by the request that tries an endpoint out after its errors.
    pub trial: Option<Trial>,
}

/// A candidate that could be chosen.
#[derive(Clone, Copy, Debug)]
struct Eligible {
    index: usize,
    trial: bool,
}

/// Picks one of the candidates that were not tried yet and do not seem to be at a limit.
pub fn pick(pool: &Pool, candidates: &Candidates, tried: &[usize], clock: &Clock) -> Option<Pick> {
    if let Some(candidate) = at_once(pool, candidates, tried, clock) {
        return Some(Pick { candidate, trial: None });
    }
    let mut eligible = Vec::with_capacity(candidates.list().len());
    let mut tier = 0;
    for (index, candidate) in candidates.list().iter().enumerate() {
        if candidate.tier != tier {
            if let Some(pick) = choose(pool, candidates, &mut eligible, clock) {
                return Some(pick);
            }
            tier = candidate.tier;
        }
        let Some(endpoint) = untried(pool, candidate, tried) else { continue };
        if seems_full(pool, endpoint, clock) {
            continue;
        }
        match endpoint.live.gate(clock.now) {
            Gate::Open => eligible.push(Eligible { index, trial: false }),
            Gate::TrialDue => eligible.push(Eligible { index, trial: true }),
            Gate::Cooling { .. } | Gate::OnTrial | Gate::Resting { .. } => {}
        }
    }
    choose(pool, candidates, &mut eligible, clock)
}

/// The choice of a strategy that draws, if all that it draws could take the request: then it is the same as if every candidate had
/// been looked at, and costs as much for a thousand of them as for one.
fn at_once(pool: &Pool, candidates: &Candidates, tried: &[usize], clock: &Clock) -> Option<usize> {
    let draw = || {
        let drawn = candidates.draw()?;
        let endpoint = untried(pool, candidates.list().get(drawn)?, tried)?;
        (!seems_full(pool, endpoint, clock) && endpoint.live.gate(clock.now) == Gate::Open).then_some(drawn)
    };
    let better = |score: &dyn Fn(usize) -> f64| {
        let (first, second) = (draw()?, draw()?);
        // Two draws of the same candidate are no comparison, unless there is no other.
        if first == second && candidates.list().len() > 1 {
            return None;
        }
        Some(if score(second) < score(first) { second } else { first })
    };
    match pool.server.strategy {
        Strategy::Random => draw(),
        Strategy::RoundRobin => None,
        Strategy::LeastBusy => better(&|index| busyness(pool, candidates, index)),
        Strategy::Fastest => better(&|index| slowness(pool, candidates, index, clock.now)),
    }
}

/// Every candidate that was not tried yet and could take the request if its limits allow it, each with the moment from which
/// it may be asked: the first tier first, each tier from a random place on, so that what spills over is spread.
pub fn open(pool: &Pool, candidates: &Candidates, tried: &[usize], clock: &Clock) -> Vec<(usize, Stamp)> {
    let mut open = Vec::with_capacity(candidates.list().len());
    let mut tier_begins = 0;
    let mut tier = 0;
    for (index, candidate) in candidates.list().iter().enumerate() {
        if candidate.tier != tier {
            rotate(&mut open, tier_begins);
            (tier, tier_begins) = (candidate.tier, open.len());
        }
        let Some(endpoint) = untried(pool, candidate, tried) else { continue };
        match endpoint.live.gate(clock.now) {
            Gate::Open => open.push((index, Stamp::default())),
            Gate::Resting { until } => open.push((index, clock.boot + until.saturating_duration_since(clock.now))),
            Gate::TrialDue | Gate::OnTrial | Gate::Cooling { .. } => {}
        }
    }
    rotate(&mut open, tier_begins);
    open
}

fn rotate<T>(list: &mut [T], begins: usize) {
    if let Some(tier) = list.get_mut(begins..)
        && tier.len() > 1
    {
        tier.rotate_left(fastrand::usize(..tier.len()));
    }
}

/// Endpoints that may be tried when nothing is open, one request at a time, the one first whose cool-down ends first.
pub fn last_resorts(pool: &Pool, candidates: &Candidates, tried: &[usize], clock: &Clock) -> Vec<usize> {
    let mut resorts = Vec::new();
    for (index, candidate) in candidates.list().iter().enumerate() {
        let Some(endpoint) = untried(pool, candidate, tried) else { continue };
        match endpoint.live.gate(clock.now) {
            Gate::TrialDue => resorts.push((clock.now, index)),
            Gate::Cooling { until } => resorts.push((until, index)),
            Gate::Open | Gate::OnTrial | Gate::Resting { .. } => {}
        }
    }
    resorts.sort_unstable();
    resorts.into_iter().map(|(_, index)| index).collect()
}

/// True if an untried candidate could take the request, as far as is known.
pub fn any_left(pool: &Pool, candidates: &Candidates, tried: &[usize], clock: &Clock) -> bool {
    candidates.list().iter().filter_map(|candidate| untried(pool, candidate, tried)).any(|endpoint| {
        !seems_full(pool, endpoint, clock)
            && matches!(endpoint.live.gate(clock.now), Gate::Open | Gate::TrialDue | Gate::Cooling { .. })
    })
}

fn seems_full(pool: &Pool, endpoint: &Endpoint, clock: &Clock) -> bool {
    endpoint.seems_full(clock.boot) || endpoint.limits.in_ledger() && pool.ledger.is_down()
}

fn untried<'a>(pool: &'a Pool, candidate: &Candidate, tried: &[usize]) -> Option<&'a Endpoint> {
    if tried.contains(&candidate.endpoint) {
        return None;
    }
    pool.endpoints.get(candidate.endpoint).map(AsRef::as_ref)
}

/// Chooses one of the eligible candidates of a tier, which are used up. If another request took its trial meanwhile,
/// the choice is made among the rest.
fn choose(pool: &Pool, candidates: &Candidates, eligible: &mut Vec<Eligible>, clock: &Clock) -> Option<Pick> {
    while !eligible.is_empty() {
        let at = if eligible.len() == 1 { 0 } else { by_strategy(pool, candidates, eligible, clock.now) };
        let Eligible { index: candidate, trial } = eligible.swap_remove(at);
        let begun =
            if trial { endpoint_of(pool, candidates, candidate).and_then(|e| e.live.begin_trial()) } else { None };
        if begun.is_some() == trial {
            eligible.clear();
            return Some(Pick { candidate, trial: begun });
        }
    }
    None
}

/// The endpoint of a candidate.
pub fn endpoint_of<'a>(pool: &'a Pool, candidates: &Candidates, index: usize) -> Option<&'a Endpoint> {
    pool.endpoints.get(candidates.list().get(index)?.endpoint).map(AsRef::as_ref)
}

/// The place, among the eligible ones, of the one that the strategy takes.
fn by_strategy(pool: &Pool, candidates: &Candidates, eligible: &[Eligible], now: Instant) -> usize {
    match pool.server.strategy {
        Strategy::Random => by_weight(candidates, eligible),
        Strategy::RoundRobin => by_turn(candidates, eligible),
        Strategy::LeastBusy => better_of_two(candidates, eligible, |index| busyness(pool, candidates, index)),
        Strategy::Fastest => better_of_two(candidates, eligible, |index| slowness(pool, candidates, index, now)),
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

fn busyness(pool: &Pool, candidates: &Candidates, index: usize) -> f64 {
    let in_flight = endpoint_of(pool, candidates, index).map_or(0, |endpoint| endpoint.live.in_flight());
    f64::from(in_flight) / f64::from(weight(candidates, index).max(1))
}

/// The time to the first byte. One that has never answered is tried before any other, but by one request at a time.
fn slowness(pool: &Pool, candidates: &Candidates, index: usize, now: Instant) -> f64 {
    let Some(endpoint) = endpoint_of(pool, candidates, index) else { return f64::MAX };
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
    use crate::routing::health::Effect;

    fn pool(strategy: Strategy, apis: &str) -> Pool {
        let mut config = config(apis);
        config.server.strategy = strategy;
        Pool::new(config, Client::new(Clock::read), None).unwrap()
    }

    fn picks(pool: &Pool, times: usize) -> Vec<usize> {
        let candidates = pool.router.find("m").unwrap();
        let mut counts = vec![0; pool.endpoints.len()];
        for _ in 0..times {
            let pick = pick(pool, candidates, &[], &pool.clock()).expect("one is open");
            counts[candidates.list()[pick.candidate].endpoint] += 1;
        }
        counts
    }

    fn learn(pool: &Pool, index: usize, effect: Effect, times: usize) {
        for _ in 0..times {
            pool.endpoints[index].live.learn(effect, false, Instant::now, &pool.server.breaker);
        }
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
        let candidates = pool.router.find("m").unwrap();
        let next = || pick(&pool, candidates, &[], &pool.clock()).expect("both are open").candidate;
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
    fn lower_tiers_are_for_when_nothing_above_can_take_it() {
        let pool = pool(Strategy::Random, r#"[{"id":"a","models":["m"]},{"id":"b","models":["m"],"priority":1}]"#);
        assert_eq!(picks(&pool, 20), [20, 0]);
        learn(&pool, 0, Effect::Rest(Duration::from_mins(1)), 1);
        assert_eq!(picks(&pool, 20), [0, 20]);
    }

    #[test]
    fn when_all_cool_down_the_first_due_is_the_first_resort() {
        let pool = pool(Strategy::Random, r#"[{"id":"a","models":["m"]},{"id":"b","models":["m"]}]"#);
        let candidates = pool.router.find("m").unwrap();
        learn(&pool, 1, Effect::Failure, 3);
        std::thread::sleep(Duration::from_millis(2));
        learn(&pool, 0, Effect::Failure, 3);
        assert!(any_left(&pool, candidates, &[], &pool.clock()));
        assert!(pick(&pool, candidates, &[], &pool.clock()).is_none());
        assert!(open(&pool, candidates, &[], &pool.clock()).is_empty());
        assert_eq!(last_resorts(&pool, candidates, &[], &pool.clock()), [1, 0]);
        let _trials: Vec<_> = pool.endpoints.iter().map(|endpoint| endpoint.live.begin_trial().unwrap()).collect();
        assert!(last_resorts(&pool, candidates, &[], &pool.clock()).is_empty());
        assert!(!any_left(&pool, candidates, &[], &pool.clock()));
    }

    #[test]
    fn whoever_rests_may_be_waited_for() {
        let pool = pool(Strategy::Random, TWO);
        learn(&pool, 0, Effect::Rest(Duration::from_mins(1)), 1);
        let candidates = pool.router.find("m").unwrap();
        let clock = pool.clock();
        let mut open = open(&pool, candidates, &[], &clock);
        open.sort_unstable();
        let [(0, rests), (1, is_open)] = open[..] else { panic!("{open:?}") };
        assert!((59_000..=60_001).contains(&(rests - clock.boot).as_millis()), "{rests:?}");
        assert_eq!(is_open, Stamp::default());
    }

    #[test]
    fn what_spills_over_is_spread_within_its_tier() {
        let apis = r#"[{"id":"a","models":["m"]},{"id":"b","models":["m"]},{"id":"c","models":["m"],"priority":1}]"#;
        let pool = pool(Strategy::Random, apis);
        let candidates = pool.router.find("m").unwrap();
        let mut firsts = [0, 0, 0];
        for _ in 0..100 {
            let open = open(&pool, candidates, &[], &pool.clock());
            assert_eq!(open.len(), 3);
            assert_eq!(open[2].0, 2, "the second tier comes last");
            firsts[open[0].0] += 1;
        }
        assert!(firsts[0] > 20 && firsts[1] > 20, "{firsts:?}");
    }

    #[test]
    fn what_was_tried_is_not_picked_again() {
        let pool = pool(Strategy::Random, TWO);
        let candidates = pool.router.find("m").unwrap();
        assert!(pick(&pool, candidates, &[0, 1], &pool.clock()).is_none());
        assert!(any_left(&pool, candidates, &[0], &pool.clock()));
        assert!(!any_left(&pool, candidates, &[0, 1], &pool.clock()));
    }
}
