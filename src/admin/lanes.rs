//! The keys of endpoints that have several, as the status and the metrics show them: never more of a key than its name and its last
//! characters.

use serde_json::{Value, json};

use super::status::{Views, by_kind, cool_down_ends, iso, quota, rest_ends, time_of};
use crate::config::{Limit, PerLimit};
use crate::ledger::LimitedAccount;
use crate::limit::Clock;
use crate::routing::health::{Gate, Health};
use crate::routing::lanes::{Lane, LaneLive};
use crate::routing::pool::Endpoint;

/// Keys of one endpoint that are shown one by one, those in trouble first.
const SHOWN_MAX: usize = 100;

/// What a key can do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LaneState {
    CoolingDown,
    Resting,
    Full,
    Open,
}

impl LaneState {
    pub(super) const ALL: [Self; 4] = [Self::Open, Self::Full, Self::Resting, Self::CoolingDown];

    fn of(endpoint: &Endpoint, lane: &Lane, clock: &Clock) -> Self {
        match endpoint.gate_of_lane(lane, clock.now) {
            Gate::Cooling { .. } | Gate::OnTrial | Gate::TrialDue => Self::CoolingDown,
            Gate::Resting { .. } => Self::Resting,
            Gate::Open if lane.seems_full(clock.boot) => Self::Full,
            Gate::Open => Self::Open,
        }
    }

    pub(super) fn word(self) -> &'static str {
        match self {
            Self::CoolingDown => "cooling_down",
            Self::Resting => "resting",
            Self::Full => "full",
            Self::Open => "open",
        }
    }
}

/// How many keys are in each state.
pub(super) fn counts(endpoint: &Endpoint, clock: &Clock) -> [(LaneState, u64); 4] {
    let mut counts = LaneState::ALL.map(|state| (state, 0));
    for lane in endpoint.lanes.list() {
        let state = LaneState::of(endpoint, lane, clock);
        for (_, count) in counts.iter_mut().filter(|(one, _)| *one == state) {
            *count += 1;
        }
    }
    counts
}

/// The keys that are shown one by one.
fn shown(endpoint: &Endpoint, clock: &Clock) -> Vec<(LaneState, usize)> {
    let lanes = endpoint.lanes.list().iter().enumerate();
    let mut all: Vec<_> = lanes.map(|(index, lane)| (LaneState::of(endpoint, lane, clock), index)).collect();
    if all.len() > SHOWN_MAX {
        all.sort_unstable();
        all.truncate(SHOWN_MAX);
        all.sort_unstable_by_key(|(_, index)| *index);
    }
    all
}

/// The limits of those keys.
pub(super) fn limited<'a>(endpoint: &'a Endpoint, clock: &Clock) -> Vec<&'a LimitedAccount> {
    let lanes = &endpoint.lanes;
    if !lanes.is_pool() {
        return Vec::new();
    }
    shown(endpoint, clock).into_iter().filter_map(|(_, index)| lanes.get(index)?.limited()).collect()
}

/// The keys of an endpoint, one by one or only their number; nothing if it has one only.
pub(super) fn status((endpoint, is_listed): (&Endpoint, bool), views: &Views, clock: &Clock) -> Option<Value> {
    let lanes = &endpoint.lanes;
    if !lanes.is_pool() {
        return None;
    }
    let counts: serde_json::Map<String, Value> =
        counts(endpoint, clock).into_iter().map(|(state, count)| (state.word().to_owned(), count.into())).collect();
    let listed = if is_listed { shown(endpoint, clock) } else { Vec::new() };
    let list: Vec<Value> = listed
        .into_iter()
        .filter_map(|(state, index)| {
            let lane = lanes.get(index)?;
            Some(one((endpoint, lane), lane.live()?, state, (views, clock)))
        })
        .collect();
    Some(json!({ "count": lanes.list().len(), "byState": counts, "list": list }))
}

fn one(
    (endpoint, lane): (&Endpoint, &Lane),
    live: &LaneLive,
    state: LaneState,
    (views, clock): (&Views, &Clock),
) -> Value {
    let gate = endpoint.gate_of_lane(lane, clock.now);
    let health = live.health.read();
    let models: serde_json::Map<String, Value> = health
        .models()
        .filter(|(_, health)| health.gate(clock.now) != Gate::Open)
        .map(|(model, health)| (model.to_owned(), of_model(health, clock)))
        .collect();
    let view = lane.limited().map(|of| (of, views.of(of)));
    let in_flight = u64::from(live.in_flight());
    json!({
        "key": lane.config.label.as_ref(),
        "state": state.word(),
        "inFlight": in_flight,
        "attempts": live.requests(),
        "errorCount": health.errors_in_row(),
        "coolDownEnds": cool_down_ends(gate, clock.now),
        "restEnds": rest_ends(gate, clock.now),
        "models": models,
        "limits": view.as_ref().map(|(of, _)| by_kind(&of.limits.by_kind.map(Limit::as_number))),
        "quota": view.as_ref().map(|(of, view)| {
            quota(&of.limits, view, PerLimit { max_concurrent: in_flight, ..view.used }, clock)
        }),
        "heldBy": view.as_ref().and_then(|(_, view)| Some(view.held?.by.to_string())),
        "limitFrees": view.as_ref().and_then(|(_, view)| Some(time_of(view.held?.until, clock))),
        "lastError": live.last_error().map(|error| json!({ "at": iso(error.at), "what": error.what })),
    })
}

fn of_model(health: &Health, clock: &Clock) -> Value {
    let gate = health.gate(clock.now);
    json!({ "coolDownEnds": cool_down_ends(gate, clock.now), "restEnds": rest_ends(gate, clock.now) })
}
