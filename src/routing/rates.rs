//! Rates of a model: the remaining parts of its endpoints' limits, added up.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::config::Limit;
use crate::ledger::AccountSet;
use crate::limit::{Clock, Gauge, Stamp};
use crate::routing::balance::Options;
use crate::routing::health::Gate;
use crate::routing::lanes::Lanes;
use crate::routing::rate_headers::{Rate, Rates};

/// Number of endpoints, and of keys of one, that are added up for every request; more are added up only now and then.
const ADDED_UP_MAX: usize = 16;
const NOW_AND_THEN: Duration = Duration::from_millis(100);

/// Rates of a model, as its endpoints were seen last, at most about a second ago.
pub(crate) fn of_model(options: &Options<'_>, clock: &Clock) -> Rates {
    let candidates = options.candidates;
    // Names that match one pattern have the same candidates, but may have limits of their own.
    let may_differ = options.pool.has_model_limits && !candidates.is_exact();
    if candidates.list().len() <= ADDED_UP_MAX || may_differ {
        return add_up(options, clock);
    }
    seen_lately(&candidates.rates, clock, || add_up(options, clock))
}

/// A sum as it was seen last, or anew if that was too long ago.
fn seen_lately<T: Copy>(last: &Mutex<Option<(Stamp, T)>>, clock: &Clock, add_up: impl FnOnce() -> T) -> T {
    let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((at, sum)) = *last
        && clock.boot - at < NOW_AND_THEN
    {
        return sum;
    }
    let sum = add_up();
    *last = Some((clock.boot, sum));
    sum
}

fn add_up(options: &Options<'_>, clock: &Clock) -> Rates {
    let nothing = Rate { limit: 0, remaining: 0, reset: Duration::ZERO };
    let mut rates = Rates { requests: Some(nothing), tokens: Some(nothing) };
    for index in 0..options.candidates.list().len() {
        let (Some(endpoint), Some(model)) = (options.endpoint(index), options.model_of(index)) else { continue };
        let accounts = endpoint.accounts_of(model);
        let of_keys = if endpoint.lanes.is_pool() { of_lanes(&endpoint.lanes, clock) } else { Gauges::default() };
        if !accounts.in_ledger() && of_keys == Gauges::default() {
            return Rates::default();
        }
        let is_open = endpoint.live.gate(model, clock.now) == Gate::Open;
        let add = |rate: Option<Rate>, gauge: Option<Gauge>| {
            let (rate, gauge) = (rate?, gauge?);
            let reset = gauge.resets.map_or(Duration::ZERO, |resets| clock.boot.until(resets));
            let left = if is_open { gauge.left() } else { 0 };
            Some(Rate {
                limit: rate.limit.saturating_add(gauge.limit),
                remaining: rate.remaining.saturating_add(left),
                reset: rate.reset.max(reset),
            })
        };
        let (requests, tokens) = tightest(accounts);
        rates.requests = add(rates.requests, tighter(requests, of_keys.requests));
        rates.tokens = add(rates.tokens, tighter(tokens, of_keys.tokens));
    }
    rates
}

/// What the keys of an endpoint have together: nothing of a kind, unless each of them has a limit of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Gauges {
    requests: Option<Gauge>,
    tokens: Option<Gauge>,
}

/// What the keys of an endpoint have together, as they were seen last; of many now and then.
fn of_lanes(lanes: &Lanes, clock: &Clock) -> Gauges {
    if lanes.list().len() <= ADDED_UP_MAX {
        return add_lanes(lanes, clock);
    }
    seen_lately(&lanes.gauges, clock, || add_lanes(lanes, clock))
}

fn add_lanes(lanes: &Lanes, clock: &Clock) -> Gauges {
    let nothing = Some(Gauge { limit: 0, used: 0, resets: None });
    let mut sum = Gauges { requests: nothing, tokens: nothing };
    for lane in lanes.list() {
        let Some(of) = lane.limited() else { return Gauges::default() };
        let is_open = lane.gate(|| "", clock.now) == Gate::Open;
        let add = |sum: Option<Gauge>, gauge: Option<Gauge>| {
            let (sum, gauge) = (sum?, gauge?);
            let used = if is_open { gauge.used } else { gauge.limit };
            Some(Gauge {
                limit: sum.limit.saturating_add(gauge.limit),
                used: sum.used.saturating_add(used),
                resets: sum.resets.max(gauge.resets),
            })
        };
        let limits = of.limits.by_kind.zip(of.account.view().gauges);
        sum.requests = add(sum.requests, tightest_of([limits.rpm, limits.rpd], None));
        sum.tokens = add(sum.tokens, tightest_of([limits.tpm, limits.tpd], None));
    }
    sum
}

fn tighter(one: Option<Gauge>, other: Option<Gauge>) -> Option<Gauge> {
    one.into_iter().chain(other).min_by_key(Gauge::left)
}

fn tightest_of(of: [(Limit, Option<Gauge>); 2], gauge: Option<Gauge>) -> Option<Gauge> {
    of.into_iter().filter_map(known).chain(gauge).min_by_key(Gauge::left)
}

/// Rates of some accounts.
pub(crate) fn of_accounts(accounts: &AccountSet, clock: &Clock) -> Rates {
    let rate = |gauge: Gauge| Rate {
        limit: gauge.limit,
        remaining: gauge.left(),
        reset: gauge.resets.map_or(Duration::ZERO, |resets| clock.boot.until(resets)),
    };
    let (requests, tokens) = tightest(accounts);
    Rates { requests: requests.map(rate), tokens: tokens.map(rate) }
}

/// The limits of requests and of tokens that a client reaches first.
fn tightest(accounts: &AccountSet) -> (Option<Gauge>, Option<Gauge>) {
    let mut tightest = (None, None);
    for of in accounts.accounts() {
        let limits = of.limits.by_kind.zip(of.account.view().gauges);
        tightest.0 = tightest_of([limits.rpm, limits.rpd], tightest.0);
        tightest.1 = tightest_of([limits.tpm, limits.tpd], tightest.1);
    }
    tightest
}

/// Returns the used part of a limit; nothing is used before it was looked at for the first time.
fn known((limit, gauge): (Limit, Option<Gauge>)) -> Option<Gauge> {
    let Limit::AtMost(limit) = limit else { return None };
    Some(gauge.map_or(Gauge { limit, used: 0, resets: None }, |gauge| Gauge { limit, ..gauge }))
}
