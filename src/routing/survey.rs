//! Why other endpoints were not asked: those that could not take a request just then, and those that never could. For the log.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::config::CallKind;
use crate::fault::HeldBy;
use crate::limit::{Clock, LimitReason};
use crate::routing::balance::Options;
use crate::routing::callers::Caller;
use crate::routing::health::Gate;
use crate::routing::lanes::Lane;
use crate::routing::pool::{Endpoint, Pool};
use crate::routing::router::{Candidates, ModelName};

/// Candidates that are looked at for one choice.
const LOOKED_AT_MAX: usize = 32;
/// Endpoints that are named.
const NAMED_MAX: usize = 16;
/// Keys of one endpoint that are looked at; of one that has more it is not said that all are closed.
const LANES_MAX: usize = 16;

/// The candidates that could not take a request when one of them was chosen, each with the reason.
pub(crate) fn passed_over(options: &Options<'_>, chosen: usize, clock: &Clock) -> Vec<HeldBy> {
    let list = options.candidates.list();
    if list.len() < 2 {
        return Vec::new();
    }
    let others = (0..list.len().min(LOOKED_AT_MAX)).filter(|index| *index != chosen);
    others.filter_map(|index| held(options, index, clock)).take(NAMED_MAX).collect()
}

/// What held a candidate back; none if nothing did, or the request has been there.
fn held(options: &Options<'_>, index: usize, clock: &Clock) -> Option<HeldBy> {
    let candidate = options.candidates.list().get(index)?;
    if options.tried.iter().any(|tried| tried.is(candidate)) {
        return None;
    }
    let (endpoint, model) = (options.endpoint(index)?, options.model_of(index)?);
    let held = HeldBy {
        endpoint: Arc::clone(&endpoint.config.id),
        is_public: false,
        models: None,
        key: None,
        reason: LimitReason::CallMissing,
        wait: Duration::ZERO,
    };
    if endpoint.live.paths.lacks(options.shape, model.name, clock.now) {
        return Some(held);
    }
    if let Some((reason, wait)) = closed(endpoint.live.gate(model, clock.now), clock) {
        return Some(HeldBy { reason, wait, ..held });
    }
    let accounts = endpoint.accounts_of(model);
    if accounts.seems_full(clock.boot) {
        let views = accounts.accounts().iter().map(|of| (of.account.view().held, of.account.id().models()));
        let longest = views.filter_map(|(held, models)| Some((held?, models))).max_by_key(|(held, _)| held.until);
        let (by, models) = longest?;
        return Some(HeldBy { reason: by.by, wait: clock.boot.until(by.until), models: models.cloned(), ..held });
    }
    let (lane, reason, wait) = first_lane(endpoint, model, clock)?;
    Some(HeldBy { key: Some(Arc::clone(&lane.config.label)), reason, wait, ..held })
}

fn closed(gate: Gate, clock: &Clock) -> Option<(LimitReason, Duration)> {
    match gate {
        Gate::Open => None,
        Gate::Resting { until, .. } => Some((LimitReason::Rest, until.saturating_duration_since(clock.now))),
        Gate::Cooling { until } => Some((LimitReason::CoolingDown, until.saturating_duration_since(clock.now))),
        Gate::OnTrial | Gate::TrialDue => Some((LimitReason::CoolingDown, Duration::ZERO)),
    }
}

/// The key of an endpoint that opens first, if all of several are closed.
fn first_lane<'a>(
    endpoint: &'a Endpoint,
    model: ModelName<'_>,
    clock: &Clock,
) -> Option<(&'a Lane, LimitReason, Duration)> {
    let lanes = endpoint.lanes.list();
    if !endpoint.lanes.is_pool() || lanes.len() > LANES_MAX {
        return None;
    }
    let held = |lane: &'a Lane| {
        let gate = lane.gate(|| endpoint.live.key(model), clock.now);
        let by_limit = || {
            let held = lane.limited()?.account.view().held.filter(|held| held.until > clock.boot)?;
            Some((held.by, clock.boot.until(held.until)))
        };
        let (reason, wait) = closed(gate, clock).or_else(by_limit)?;
        Some((lane, reason, wait))
    };
    // One that is open ends the search.
    let all: Option<Vec<_>> = lanes.iter().map(held).collect();
    all?.into_iter().min_by_key(|(.., wait)| *wait)
}

/// An endpoint that was no candidate, and why.
#[derive(Serialize)]
struct Outside<'a> {
    endpoint: &'a str,
    reason: &'static str,
}

impl Candidates {
    /// The endpoints that are none of them, each with the reason, as JSON; none if there are none. `model`, `kind` and `caller` are those
    /// that the candidates were found for; it is worked out for the first request.
    pub(crate) fn outside(
        &self,
        pool: &Pool,
        (model, kind): (Option<&str>, CallKind),
        caller: Option<&Caller>,
    ) -> Option<Arc<str>> {
        let find = || {
            let mut are_candidates = vec![false; pool.endpoints.len()];
            for candidate in self.list() {
                are_candidates.get_mut(candidate.endpoint).into_iter().for_each(|is| *is = true);
            }
            let of_model = model.map_or(Some(pool.router.any()), |model| pool.router.find(model));
            let others = pool.endpoints.iter().zip(are_candidates).enumerate().filter(|(_, (_, is_one))| !is_one);
            let list: Vec<_> = others
                .take(NAMED_MAX)
                .map(|(index, (endpoint, _))| {
                    let serves_model = of_model.is_some_and(|candidates| candidates.has(index));
                    Outside { endpoint: &endpoint.config.id, reason: why(endpoint, (serves_model, kind), caller) }
                })
                .collect();
            if list.is_empty() { None } else { serde_json::to_string(&list).ok().map(Arc::from) }
        };
        self.outside.get_or_init(find).clone()
    }

    fn has(&self, endpoint: usize) -> bool {
        self.list().iter().any(|candidate| candidate.endpoint == endpoint)
    }
}

/// Why an endpoint is no candidate.
fn why(endpoint: &Endpoint, (serves_model, kind): (bool, CallKind), caller: Option<&Caller>) -> &'static str {
    let config = &endpoint.config;
    if !config.enabled {
        "disabled"
    } else if !config.usable() {
        "no_permits"
    } else if !serves_model {
        "not_this_model"
    } else if !config.calls.contains(kind) {
        "not_this_call"
    } else if caller.is_some_and(|caller| !caller.key.allows_endpoint(&config.id)) {
        "not_this_key"
    } else {
        // It does not have what the request names, or no price for a caller with a budget.
        "not_this_request"
    }
}
