//! Keys of an endpoint → one: as the strategy chooses endpoints, so it chooses among the keys of one. In the common case a few are looked
//! at, however many there are; all of them only if those are closed or at their limits.

use std::sync::Arc;
use std::time::Instant;

use crate::config::Strategy;
use crate::limit::{Clock, Stamp};
use crate::routing::health::Gate;
use crate::routing::lanes::Lane;
use crate::routing::pool::Endpoint;
use crate::routing::router::{Candidate, ModelName, Tried};

/// Keys that are drawn before all are looked at.
const DRAWS: usize = 4;
/// Keys that are compared for the one with the most left.
const COMPARED: usize = 16;
/// Attempts of one request at one endpoint, each with another key.
pub(super) const LANES_TRIED_MAX: usize = 3;
/// Keys of one endpoint that are drawn from at once by a request that finds none with room; of more those first that seem to have some.
const DRAWN_MAX: usize = 256;

/// A request among the keys of an endpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct Among<'a> {
    pub endpoint: &'a Endpoint,
    pub candidate: &'a Candidate,
    pub model: ModelName<'a>,
    pub tried: &'a [Tried],
    /// Number of its session, whose requests have the same key while that can take them.
    pub session: Option<u64>,
    /// The organisations one of whose keys it needs; none if any key will do.
    pub organizations: &'a [Arc<str>],
    pub strategy: Strategy,
    pub clock: &'a Clock,
}

/// A key, and whether its health lets the request through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub lane: usize,
    pub gate: Gate,
    /// True if its limits seem to be reached.
    pub is_full: bool,
}

/// How close a key comes to taking a request.
type Rank = (u8, Instant);

impl Among<'_> {
    /// True if the request may have a key at all.
    fn may_have(&self, index: usize, lane: &Lane) -> bool {
        let is_tried = |tried: &Tried| tried.lane == index && tried.is(self.candidate);
        lane.config.has_model(self.model.name)
            && (self.organizations.is_empty() || self.organizations.contains(&lane.config.organization))
            && !self.tried.iter().any(is_tried)
    }

    fn gate(&self, lane: &Lane) -> Gate {
        lane.gate(|| self.endpoint.live.key(self.model), self.clock.now)
    }

    /// A key that could take the request now, as far as is known.
    fn open(&self, index: usize) -> Option<Found> {
        let lane = self.endpoint.lanes.get(index)?;
        if lane.seems_full(self.clock.boot) || !self.may_have(index, lane) {
            return None;
        }
        let gate = self.gate(lane);
        matches!(gate, Gate::Open | Gate::TrialDue).then_some(Found { lane: index, gate, is_full: false })
    }

    /// Chooses a key that could take the request now; none if there is none.
    pub(super) fn choose(&self) -> Option<Found> {
        let lanes = &self.endpoint.lanes;
        let all = lanes.list().len();
        if !self.organizations.is_empty() {
            return self.places().find_map(|lane| self.open(lane));
        }
        if let Some(found) = self.session.and_then(|session| self.open(lanes.at_share(session))) {
            return Some(found);
        }
        let drawn = match self.strategy {
            Strategy::Random => (0..DRAWS).find_map(|_| self.open(lanes.draw())),
            Strategy::RoundRobin => (0..DRAWS).find_map(|_| self.open(lanes.next_in_turn())),
            Strategy::LeastBusy | Strategy::Fastest => self.least_of(2, busyness),
            Strategy::MostLeft => self.least_of(COMPARED, |lane| self.used(lane)),
            Strategy::FillFirst => {
                let first = lanes.first_with_room(self.clock.boot);
                let found = from(first, all).find_map(|lane| self.open(lane));
                if let Some(found) = found.filter(|_| self.tried.is_empty()) {
                    lanes.note_first_with_room(found.lane);
                }
                return found;
            }
        };
        drawn.or_else(|| self.places().find_map(|lane| self.open(lane)))
    }

    /// All places of keys that it may have, from a random one on.
    fn places(&self) -> Box<dyn Iterator<Item = usize>> {
        let lanes = &self.endpoint.lanes;
        let begin = |all: usize| fastrand::usize(..all.max(1));
        if self.organizations.is_empty() {
            let all = lanes.list().len();
            return Box::new(from(begin(all), all));
        }
        let mut theirs = lanes.of_organizations(self.organizations);
        let first = begin(theirs.len()).min(theirs.len());
        theirs.rotate_left(first);
        Box::new(theirs.into_iter())
    }

    /// The same, in the order in which they are drawn from.
    fn places_to_draw_from(&self) -> Box<dyn Iterator<Item = usize>> {
        let all = self.endpoint.lanes.list().len();
        let is_in_order = self.strategy == Strategy::FillFirst && self.organizations.is_empty();
        if is_in_order { Box::new(0..all) } else { self.places() }
    }

    /// The one with the lowest score of some, or of all where they are no more.
    fn least_of(&self, some: usize, score: impl Fn(&Lane) -> f64) -> Option<Found> {
        let lanes = &self.endpoint.lanes;
        let all = lanes.list().len();
        let scored = |index: usize| Some((score(lanes.get(index)?), self.open(index)?));
        let least = |one: (f64, Found), other: (f64, Found)| if other.0 < one.0 { other } else { one };
        let best = if all <= some {
            self.places().filter_map(scored).reduce(least)
        } else {
            (0..some).filter_map(|_| scored(lanes.draw())).reduce(least)
        };
        best.map(|(_, found)| found)
    }

    fn used(&self, lane: &Lane) -> f64 {
        lane.limited().map_or(0.0, |of| 1.0 - of.account.view().share_left(self.clock.boot))
    }

    /// The key that comes closest to taking the request: one with room before one without, and the one before others that may be tried out
    /// first. None if the request may have none any more.
    pub(super) fn closest(&self) -> Option<Found> {
        let lanes = &self.endpoint.lanes;
        let mut closest: Option<(Rank, Found)> = None;
        for (index, lane) in self.places().filter_map(|index| Some((index, lanes.get(index)?))) {
            if !self.may_have(index, lane) {
                continue;
            }
            let (gate, is_full) = (self.gate(lane), lane.seems_full(self.clock.boot));
            let found = Found { lane: index, gate, is_full };
            let rank = self.rank(gate, is_full);
            if gate == Gate::Open && !is_full {
                return Some(found);
            }
            if closest.is_none_or(|(known, _)| rank < known) {
                closest = Some((rank, found));
            }
        }
        closest.map(|(_, found)| found)
    }

    /// The lower, the closer.
    fn rank(&self, gate: Gate, is_full: bool) -> Rank {
        let now = self.clock.now;
        match gate {
            Gate::Open => (u8::from(is_full), now),
            Gate::TrialDue => (2, now),
            Gate::Cooling { until } | Gate::Resting { until, may_try: true } => (3, until),
            Gate::OnTrial => (4, now),
            Gate::Resting { until, may_try: false } => (5, until),
        }
    }

    /// Keys that are open, or rest until some moment, each with the moment from which it may be asked: those first that seem to have
    /// room now. `is_full`: the endpoint seems to have none itself, so that a few of them are enough to find that out.
    pub(super) fn drawn_from(&self, is_full: bool) -> Vec<(usize, Stamp)> {
        let at_most = if is_full { DRAWS } else { DRAWN_MAX };
        let lanes = &self.endpoint.lanes;
        let (mut drawn, mut with_room) = (Vec::new(), 0);
        for (index, lane) in self.places_to_draw_from().filter_map(|at| Some((at, lanes.get(at)?))) {
            if !self.may_have(index, lane) {
                continue;
            }
            let from = match self.gate(lane) {
                Gate::Open => Stamp::default(),
                Gate::Resting { until, .. } => self.clock.boot + until.saturating_duration_since(self.clock.now),
                Gate::TrialDue | Gate::OnTrial | Gate::Cooling { .. } => continue,
            };
            let is_full = from == Stamp::default() && lane.seems_full(self.clock.boot);
            drawn.push((index, from, is_full));
            with_room += usize::from(from == Stamp::default() && !is_full);
            if with_room >= at_most {
                break;
            }
        }
        if drawn.len() > at_most || self.strategy == Strategy::MostLeft {
            let used = |lane: usize| lanes.get(lane).map_or(0.0, |lane| self.used(lane));
            let is_ranked = self.strategy == Strategy::MostLeft;
            drawn.sort_by(|one, other| {
                let by_room = (one.1, one.2).cmp(&(other.1, other.2));
                by_room.then_with(|| {
                    if is_ranked { used(one.0).total_cmp(&used(other.0)) } else { std::cmp::Ordering::Equal }
                })
            });
            drawn.truncate(at_most);
        }
        drawn.into_iter().map(|(lane, from, _)| (lane, from)).collect()
    }
}

fn busyness(lane: &Lane) -> f64 {
    lane.live().map_or(0.0, |live| f64::from(live.in_flight()) / f64::from(lane.config.weight.max(1)))
}

/// All places below `all` from one on, around.
fn from(first: usize, all: usize) -> impl Iterator<Item = usize> {
    (first..all).chain(0..first.min(all))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;
    use crate::config::Breaker;
    use crate::config::test_support::config;
    use crate::ledger::Client;
    use crate::limit::Clock;
    use crate::routing::health::{Effect, Scope, Seen};
    use crate::routing::pool::Pool;

    fn pool(keys: usize, of: impl Fn(usize) -> Value) -> Pool {
        let keys: Vec<Value> = (0..keys).map(of).collect();
        let apis = json!([{ "id": "a", "models": ["m"], "apiKeys": keys }]);
        Pool::new(config(&apis.to_string()), Client::new(Clock::read), None).unwrap()
    }

    fn plain(number: usize) -> Value {
        json!(format!("sk-{number}-4be2a90c7d115f38"))
    }

    fn among<'a>(pool: &'a Pool, strategy: Strategy, tried: &'a [Tried], clock: &'a Clock) -> Among<'a> {
        let candidate = &pool.router.find("m").unwrap().list()[0];
        let model = ModelName { name: "m", in_config: true };
        let endpoint = &pool.endpoints[0];
        Among { endpoint, candidate, model, tried, session: None, organizations: &[], strategy, clock }
    }

    fn learn(pool: &Pool, lane: usize, effect: Effect) {
        let live = pool.endpoints[0].lanes.list()[lane].live().unwrap();
        let seen = Seen { effect, began: Instant::now(), trial: None };
        let breaker = Breaker { failures: 1, cool_down: Duration::from_mins(1) };
        live.learn(("m", None), &seen, live.health.number(), Instant::now, &breaker);
    }

    const REFUSED: Effect = Effect::KeyRefused { at_most: Duration::MAX };

    const STRATEGIES: [Strategy; 6] = [
        Strategy::Random,
        Strategy::RoundRobin,
        Strategy::LeastBusy,
        Strategy::Fastest,
        Strategy::MostLeft,
        Strategy::FillFirst,
    ];

    #[test]
    fn every_strategy_finds_the_one_that_is_left() {
        for strategy in STRATEGIES {
            let pool = pool(40, plain);
            for lane in (0..40).filter(|lane| *lane != 23) {
                learn(
                    &pool,
                    lane,
                    if lane % 2 == 0 {
                        REFUSED
                    } else {
                        Effect::Rest { scope: Scope::Model, wait: Duration::from_mins(1), guessed: false }
                    },
                );
            }
            let clock = pool.clock();
            let among = among(&pool, strategy, &[], &clock);
            for _ in 0..20 {
                assert_eq!(among.choose(), Some(Found { lane: 23, gate: Gate::Open, is_full: false }), "{strategy:?}");
            }
            assert_eq!(among.closest().unwrap().lane, 23);
            learn(&pool, 23, REFUSED);
            assert_eq!(among.choose(), None, "{strategy:?}");
            assert!(matches!(among.closest().unwrap().gate, Gate::Cooling { .. }), "one that rests is not tried out");
            assert_eq!(among.drawn_from(false).len(), 19, "those that rest may be waited for");
        }
    }

    #[test]
    fn each_is_chosen_as_often_as_its_weight_says() {
        for (strategy, least) in [(Strategy::Random, 120), (Strategy::RoundRobin, 200)] {
            let pool = pool(
                4,
                |number| json!({ "key": format!("sk-{number}"), "name": number.to_string(), "weight": if number == 2 { 3 } else { 1 } }),
            );
            let clock = pool.clock();
            let among = among(&pool, strategy, &[], &clock);
            let mut chosen = [0; 4];
            let mut in_a_row = 0;
            let mut before = 4;
            for _ in 0..1200 {
                let lane = among.choose().unwrap().lane;
                in_a_row += usize::from(lane == before);
                before = lane;
                chosen[lane] += 1;
            }
            assert!(
                chosen[2] >= 3 * least - 60 && chosen.iter().all(|count| *count >= least),
                "{strategy:?}: {chosen:?}"
            );
            assert!(strategy == Strategy::Random || in_a_row <= 600, "{in_a_row}");
        }
    }

    #[test]
    fn a_request_has_each_key_once_and_three_at_most() {
        let pool = pool(5, plain);
        let clock = pool.clock();
        let candidate = &pool.router.find("m").unwrap().list()[0];
        let tried: Vec<Tried> = [0, 1, 3].into_iter().map(|lane| candidate.tried(lane, false)).collect();
        let among = among(&pool, Strategy::Random, &tried, &clock);
        for _ in 0..50 {
            assert!([2, 4].contains(&among.choose().unwrap().lane));
        }
        assert_eq!(among.drawn_from(false).len(), 2);
    }

    #[test]
    fn of_many_keys_those_are_drawn_from_that_have_room() {
        let pool = pool(2 * DRAWN_MAX, plain);
        for lane in 0..2 * DRAWN_MAX - 3 {
            learn(&pool, lane, Effect::Rest { scope: Scope::Model, wait: Duration::from_mins(1), guessed: false });
        }
        let clock = pool.clock();
        let drawn = among(&pool, Strategy::Random, &[], &clock).drawn_from(false);
        assert_eq!(drawn.len(), DRAWN_MAX);
        assert!(drawn[..3].iter().all(|(_, from)| *from == Stamp::default()));
        assert!(drawn[3..].iter().all(|(_, from)| *from > Stamp::default()));
    }

    #[test]
    fn another_key_of_a_name_begins_anew_and_the_others_go_on() {
        let apis = |first: &str| {
            let keys = json!([{ "key": first, "name": "one" }, { "key": "sk-b", "name": "two" }]);
            json!([{ "id": "a", "models": ["m"], "apiKeys": keys }]).to_string()
        };
        let client = Client::new(Clock::read);
        let before = Pool::new(config(&apis("sk-a")), client.clone(), None).unwrap();
        learn(&before, 0, REFUSED);
        learn(&before, 1, REFUSED);
        let after = Pool::new(config(&apis("sk-other")), client, Some(&before)).unwrap();
        let gates: Vec<Gate> =
            after.endpoints[0].lanes.list().iter().map(|lane| lane.gate(|| "m", Instant::now())).collect();
        assert!(matches!(gates[..], [Gate::Open, Gate::Cooling { .. }]), "{gates:?}");
    }
}
