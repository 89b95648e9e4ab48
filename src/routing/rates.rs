//! Rates of a model: the remaining parts of its endpoints' limits, added up.

use std::sync::PoisonError;
use std::time::Duration;

use crate::config::Limit;
use crate::ledger::AccountSet;
use crate::limit::{Clock, Gauge};
use crate::routing::balance::Options;
use crate::routing::health::Gate;
use crate::routing::rate_headers::{Rate, Rates};

/// Rates of a model, as its endpoints were seen last, at most about a second ago.
pub(crate) fn of_model(options: &Options<'_>, clock: &Clock) -> Rates {
    /// Number of endpoints that are added up for every request; more are added up only now and then.
    const ADDED_UP_MAX: usize = 16;
    const NOW_AND_THEN: Duration = Duration::from_millis(100);
    let candidates = options.candidates;
    // Names that match one pattern have the same candidates, but may have limits of their own.
    let may_differ = options.pool.has_model_limits && !candidates.is_exact();
    if candidates.list().len() <= ADDED_UP_MAX || may_differ {
        return add_up(options, clock);
    }
    let mut told = candidates.rates.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((at, rates)) = *told
        && clock.boot - at < NOW_AND_THEN
    {
        return rates;
    }
    let rates = add_up(options, clock);
    *told = Some((clock.boot, rates));
    rates
}

fn add_up(options: &Options<'_>, clock: &Clock) -> Rates {
    let nothing = Rate { limit: 0, remaining: 0, reset: Duration::ZERO };
    let mut rates = Rates { requests: Some(nothing), tokens: Some(nothing) };
    for index in 0..options.candidates.list().len() {
        let Some(accounts) = options.accounts(index) else { continue };
        if !accounts.in_ledger() {
            return Rates::default();
        }
        let is_open = options.gate(index, clock.now) == Some(Gate::Open);
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
        rates.requests = add(rates.requests, requests);
        rates.tokens = add(rates.tokens, tokens);
    }
    rates
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
    let tighter = |gauge: Option<Gauge>, of: [(Limit, Option<Gauge>); 2]| {
        of.into_iter().filter_map(known).chain(gauge).min_by_key(Gauge::left)
    };
    let mut tightest = (None, None);
    for of in accounts.accounts() {
        let limits = of.limits.by_kind.zip(of.account.view().gauges);
        tightest.0 = tighter(tightest.0, [limits.rpm, limits.rpd]);
        tightest.1 = tighter(tightest.1, [limits.tpm, limits.tpd]);
    }
    tightest
}

/// Returns the used part of a limit; nothing is used before it was looked at for the first time.
fn known((limit, gauge): (Limit, Option<Gauge>)) -> Option<Gauge> {
    let Limit::AtMost(limit) = limit else { return None };
    Some(gauge.map_or(Gauge { limit, used: 0, resets: None }, |gauge| Gauge { limit, ..gauge }))
}
