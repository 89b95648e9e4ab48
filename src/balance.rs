//! Candidates → one: by tier, then by what each endpoint's health allows, then by the strategy.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use crate::config::Strategy;
use crate::health::Gate;
use crate::limit::Clock;
use crate::pool::{Endpoint, Permit, Pool, Trial};
use crate::route::{Candidate, Candidates};

/// What was found for a request.
#[derive(Debug)]
pub enum Pick {
    /// This one.
    Take(Choice),
    /// None now: at least one is only at a limit, the first of them until then.
    LimitsReached(Duration),
    /// None now: each is cooling down with a trial under way, or was tried.
    None,
}

/// The candidate that was chosen.
#[derive(Debug)]
pub struct Choice {
    /// Its place among the candidates.
    pub candidate: usize,
    /// Held by the request that tries an endpoint out after its errors.
    pub trial: Option<Trial>,
    /// What was counted for it.
    pub permit: Permit,
}

/// A candidate that could be chosen.
#[derive(Clone, Copy, Debug)]
struct Eligible {
    index: usize,
    trial: bool,
}

/// Picks one of the candidates that were not tried yet.
pub fn pick(pool: &Pool, candidates: &Candidates, tried: &[usize], clock: &Clock) -> Pick {
    let mut eligible = Vec::with_capacity(candidates.list().len());
    let mut tier = 0;
    for (index, candidate) in candidates.list().iter().enumerate() {
        if candidate.tier != tier {
            if let Some(choice) = choose(pool, candidates, &mut eligible, clock) {
                return Pick::Take(choice);
            }
            tier = candidate.tier;
        }
        let Some(endpoint) = untried(pool, candidate, tried) else { continue };
        if endpoint.full_for(clock).is_some() {
            continue;
        }
        match endpoint.live.gate(clock.now) {
            Gate::Open => eligible.push(Eligible { index, trial: false }),
            Gate::TrialDue => eligible.push(Eligible { index, trial: true }),
            Gate::Cooling { .. } | Gate::OnTrial | Gate::Resting { .. } => {}
        }
    }
    match choose(pool, candidates, &mut eligible, clock) {
        Some(choice) => Pick::Take(choice),
        None => last_resort(pool, candidates, tried, clock),
    }
}

/// Whether any candidate that was not tried yet could take the request.
pub fn any_left(pool: &Pool, candidates: &Candidates, tried: &[usize], clock: &Clock) -> bool {
    candidates.list().iter().filter_map(|candidate| untried(pool, candidate, tried)).any(|endpoint| {
        endpoint.full_for(clock).is_none()
            && matches!(endpoint.live.gate(clock.now), Gate::Open | Gate::TrialDue | Gate::Cooling { .. })
    })
}

fn untried<'a>(pool: &'a Pool, candidate: &Candidate, tried: &[usize]) -> Option<&'a Endpoint> {
    if tried.contains(&candidate.endpoint) {
        return None;
    }
    pool.endpoints.get(candidate.endpoint).map(AsRef::as_ref)
}

/// One of the eligible candidates of a tier, which are used up. One whose permit or trial another request took meanwhile
/// leaves the choice to the rest.
fn choose(pool: &Pool, candidates: &Candidates, eligible: &mut Vec<Eligible>, clock: &Clock) -> Option<Choice> {
    while !eligible.is_empty() {
        let at = if eligible.len() == 1 { 0 } else { by_strategy(pool, candidates, eligible, clock.now) };
        let Eligible { index, trial } = eligible.swap_remove(at);
        if let Some(choice) = take(pool, candidates, index, trial, clock) {
            eligible.clear();
            return Some(choice);
        }
    }
    None
}

/// Takes a permit, and the trial if this is to be one, or neither.
fn take(pool: &Pool, candidates: &Candidates, candidate: usize, trial: bool, clock: &Clock) -> Option<Choice> {
    let endpoint = endpoint_of(pool, candidates, candidate)?;
    let permit = endpoint.take_permit(clock)?;
    let trial = if trial { Some(endpoint.live.begin_trial()?) } else { None };
    Some(Choice { candidate, trial, permit })
}

/// When nothing is open: the endpoint whose cool-down ends first is tried, one request at a time.
fn last_resort(pool: &Pool, candidates: &Candidates, tried: &[usize], clock: &Clock) -> Pick {
    let mut cooling = Vec::new();
    let mut frees_first: Option<Duration> = None;
    for (index, candidate) in candidates.list().iter().enumerate() {
        let Some(endpoint) = untried(pool, candidate, tried) else { continue };
        let limited_for = match (endpoint.live.gate(clock.now), endpoint.full_for(clock)) {
            (Gate::Cooling { until }, None) => {
                cooling.push((until, index));
                continue;
            }
            (Gate::Resting { until }, full) => full.max(Some(until.saturating_duration_since(clock.now))),
            (Gate::Open, full) => full,
            (Gate::TrialDue | Gate::OnTrial | Gate::Cooling { .. }, _) => continue,
        };
        frees_first = frees_first.into_iter().chain(limited_for).min();
    }
    cooling.sort_unstable();
    let first = cooling.into_iter().find_map(|(_, index)| take(pool, candidates, index, true, clock));
    match (first, frees_first) {
        (Some(choice), _) => Pick::Take(choice),
        (None, Some(wait)) => Pick::LimitsReached(wait),
        (None, None) => Pick::None,
    }
}

fn endpoint_of<'a>(pool: &'a Pool, candidates: &Candidates, index: usize) -> Option<&'a Endpoint> {
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
    use crate::config::test_support::config;
    use crate::health::Effect;

    fn pool(strategy: Strategy, apis: &str) -> Pool {
        let mut config = config(apis);
        config.server.strategy = strategy;
        Pool::new(config, None).unwrap()
    }

    fn picks(pool: &Pool, times: usize) -> Vec<usize> {
        let candidates = pool.router.find("m").unwrap();
        let mut counts = vec![0; pool.endpoints.len()];
        for _ in 0..times {
            match pick(pool, candidates, &[], &pool.clock()) {
                Pick::Take(choice) => counts[candidates.list()[choice.candidate].endpoint] += 1,
                other => panic!("{other:?}"),
            }
        }
        counts
    }

    fn learn(pool: &Pool, index: usize, effect: Effect, times: usize) {
        for _ in 0..times {
            pool.endpoints[index].live.learn(effect, false, Instant::now(), &pool.server.breaker);
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
        let order: Vec<usize> = (0..8)
            .map(|_| match pick(&pool, candidates, &[], &pool.clock()) {
                Pick::Take(choice) => choice.candidate,
                other => panic!("{other:?}"),
            })
            .collect();
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
    fn when_all_cool_down_the_first_due_is_tried_once() {
        let pool = pool(Strategy::Random, r#"[{"id":"a","models":["m"]},{"id":"b","models":["m"]}]"#);
        let candidates = pool.router.find("m").unwrap();
        learn(&pool, 1, Effect::Failure, 3);
        std::thread::sleep(Duration::from_millis(2));
        learn(&pool, 0, Effect::Failure, 3);
        assert!(any_left(&pool, candidates, &[], &pool.clock()));
        let mut trials = Vec::new();
        for first_due in [1, 0] {
            match pick(&pool, candidates, &[], &pool.clock()) {
                Pick::Take(Choice { candidate, trial: Some(trial), .. }) => {
                    assert_eq!(candidate, first_due);
                    trials.push(trial);
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(pick(&pool, candidates, &[], &pool.clock()), Pick::None));
        assert!(!any_left(&pool, candidates, &[], &pool.clock()));
    }

    #[test]
    fn when_all_rest_the_earliest_end_is_told() {
        let pool = pool(Strategy::Random, TWO);
        learn(&pool, 0, Effect::Rest(Duration::from_mins(1)), 1);
        learn(&pool, 1, Effect::Rest(Duration::from_secs(9)), 1);
        let candidates = pool.router.find("m").unwrap();
        match pick(&pool, candidates, &[], &pool.clock()) {
            Pick::LimitsReached(wait) => assert!((8..=9).contains(&wait.as_secs()), "{wait:?}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_was_tried_is_not_picked_again() {
        let pool = pool(Strategy::Random, TWO);
        let candidates = pool.router.find("m").unwrap();
        assert!(matches!(pick(&pool, candidates, &[0, 1], &pool.clock()), Pick::None));
        assert!(any_left(&pool, candidates, &[0], &pool.clock()));
        assert!(!any_left(&pool, candidates, &[0, 1], &pool.clock()));
    }

    #[test]
    fn full_endpoints_are_passed_over_and_permits_of_attempts_never_sent_come_back() {
        let pool = pool(
            Strategy::Random,
            r#"[{"id":"a","models":["m"],"rpm":2},{"id":"b","models":["m"],"rpd":1,"priority":1}]"#,
        );
        let candidates = pool.router.find("m").unwrap();
        let take = || match pick(&pool, candidates, &[], &pool.clock()) {
            Pick::Take(choice) => choice,
            other => panic!("{other:?}"),
        };
        let held = [take(), take()];
        assert_eq!(held.map(|choice| choice.candidate), [0, 0], "dropped, so given back");
        for expected in [0, 0, 1] {
            let mut choice = take();
            assert_eq!(choice.candidate, expected);
            choice.permit.spend();
        }
        assert!(!any_left(&pool, candidates, &[], &pool.clock()));
        match pick(&pool, candidates, &[], &pool.clock()) {
            Pick::LimitsReached(wait) => assert!((59..=61).contains(&wait.as_secs()), "{wait:?}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_last_permit_is_taken_once_however_many_come() {
        let pool = pool(Strategy::Random, r#"[{"id":"a","models":["m"],"rpm":100}]"#);
        let candidates = pool.router.find("m").unwrap();
        let taken = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        if let Pick::Take(mut choice) = pick(&pool, candidates, &[], &pool.clock()) {
                            choice.permit.spend();
                            taken.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(taken.into_inner(), 100);
    }
}
