//! `GET /metrics`: what [`crate::telemetry::metrics`] has counted, and the values that are read at each scrape.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use super::status::{Views, is_available};
use super::{Sources, lanes, process_metrics};
use crate::config::{BudgetUnit, Limit, LimitKind, PerLimit};
use crate::ledger::LimitedAccount;
use crate::ledger::budgets::BudgetView;
use crate::limit::{Clock, Limits};
use crate::request::connections::Reason;
use crate::request_log::Tally;
use crate::routing::health::Gate;
use crate::routing::pool::Endpoint;
use crate::telemetry::key_metrics::KEYS_MAX;
use crate::telemetry::metrics::{Scrape, metrics, to_f64};

/// Endpoints that a scrape shows. Counters of endpoints that a reload has removed stay until the process ends.
const ENDPOINTS_MAX: usize = 2000;

/// Keys of one endpoint that are shown one by one.
const LANES_MAX: usize = 256;

/// All metrics in Prometheus's text format.
pub(crate) async fn text(from: Sources<'_>) -> Vec<u8> {
    let pool = from.pool;
    let views = Views::look(pool).await;
    let endpoints: Vec<&Endpoint> = pool.endpoints.iter().map(AsRef::as_ref).take(ENDPOINTS_MAX).collect();
    let Some(metrics) = metrics() else { return Vec::new() };
    let scrape = Scrape::default();
    add_gauges(&scrape, from);
    add_counters(&scrape, from);
    process_metrics::add(&scrape, from.process.started_at);
    add_closed_connections(&scrape, from);
    add_request_log(&scrape, from);
    add_traces(&scrape, from);
    add_endpoints(&scrape, from, &endpoints, &views);
    add_limits(&scrape, &endpoints, &views);
    add_model_limits(&scrape, &endpoints, &views);
    add_lanes(&scrape, &endpoints, &pool.clock());
    add_key_limits(&scrape, from).await;
    add_key_budgets(&scrape, from).await;
    metrics.text(&scrape)
}

fn add_gauges(scrape: &Scrape, from: Sources<'_>) {
    let Sources { pool, process, .. } = from;
    let file = process.config.file();
    let loaded = pool.loaded_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
    let connections = process.connections.counts();
    let by_kind = [(["known"], count(connections.known)), (["stranger"], count(connections.strangers))];
    scrape.gauges(
        "api_together_connections",
        "Connections of clients: those that have shown a right key, and strangers.",
        ["kind"],
        by_kind.into_iter(),
    );
    for (name, help, value) in [
        ("api_together_stranger_bytes", "Memory that strangers' connections hold, in bytes.", count(connections.held)),
        ("api_together_open_requests", "Requests that are open.", count(process.open.count())),
        ("api_together_queued_requests", "Requests that wait in the queue for a permit.", count(pool.ledger.queued())),
        ("api_together_draining", "1 while the process shuts down gracefully.", process.draining.is_on().into()),
        ("api_together_ledger_up", "1 if the ledger can be read and written.", process.ledger.fault().is_none().into()),
        (
            "api_together_estimates_waiting",
            "Answers that wait for an estimate of their tokens.",
            count(process.estimator.waiting()),
        ),
        (
            "api_together_body_bytes",
            "Memory that request bodies above 64 KiB take up, in bytes.",
            count(process.memory.bytes_used()),
        ),
        (
            "api_together_body_bytes_max",
            "Memory that they may take up, in bytes: server.memoryBytesMax.",
            count(process.memory.bytes_max()),
        ),
        ("api_together_bodies_waiting", "Request bodies that wait for memory.", count(process.memory.waiting())),
        ("api_together_config_version", "Configs loaded since the start.", pool.version),
        ("api_together_config_ok", "1 if the config file on disk is the one in use.", file.error.is_none().into()),
    ] {
        scrape.gauge(name, help, value);
    }
    scrape.gauge_f64(
        "api_together_config_loaded_timestamp_seconds",
        "When the config in use was loaded, in Unix time.",
        loaded.as_secs_f64(),
    );
    let version = [([env!("CARGO_PKG_VERSION")], 1)].into_iter();
    scrape.gauges("api_together_build_info", "Version of the program; always 1.", ["version"], version);
}

fn add_counters(scrape: &Scrape, from: Sources<'_>) {
    let process = from.process;
    let tally = process.ledger.tally();
    for (name, help, value) in [
        (
            "api_together_ledger_denied_total",
            "Requests refused because the ledger could not be used.",
            tally.denied.load(Ordering::Relaxed),
        ),
        (
            "api_together_ledger_uncounted_total",
            "Attempts made without a permit because the ledger could not be used.",
            tally.uncounted.load(Ordering::Relaxed),
        ),
        (
            "api_together_ledger_tokens_lost_total",
            "Answers whose tokens were lost because the ledger could not be written.",
            tally.lost.load(Ordering::Relaxed),
        ),
        (
            "api_together_estimates_dropped_total",
            "Answers whose tokens were not estimated, or not completely.",
            process.estimator.dropped(),
        ),
        (
            "api_together_config_failures_total",
            "Changed configs that could not be applied.",
            process.config.file().failures,
        ),
    ] {
        scrape.counter(name, help, value);
    }
}

fn add_traces(scrape: &Scrape, from: Sources<'_>) {
    let Some(Tally { sent, dropped, failed }) = from.process.traces.tally() else { return };
    let spans =
        [("sent", sent), ("dropped", dropped), ("failed", failed)].map(|(result, count)| ([result], count)).into_iter();
    scrape.counters(
        "api_together_spans_total",
        "Spans for a collector of traces, by what came of them.",
        ["result"],
        spans,
    );
}

fn add_request_log(scrape: &Scrape, from: Sources<'_>) {
    let Some(log) = from.process.request_log.state() else { return };
    let up = "1 if the request log can be written.";
    scrape.gauge("api_together_request_log_up", up, log.error.is_none().into());
    scrape.gauge("api_together_request_log_bytes", "Size of the request log's file in bytes.", log.bytes);
    scrape.counter("api_together_request_log_written_total", "Requests written to the request log.", log.written);
    scrape.counters(
        "api_together_request_log_dropped_total",
        "Requests that are not in the request log, by reason.",
        ["reason"],
        log.dropped.by_reason().map(|(reason, count)| ([reason.name()], count)),
    );
}

fn add_closed_connections(scrape: &Scrape, from: Sources<'_>) {
    let closed = Reason::ALL.into_iter().map(|reason| ([reason.label()], from.process.connections.closed(reason)));
    scrape.counters(
        "api_together_connections_closed_total",
        "Connections of clients that were closed or not taken, by reason.",
        ["reason"],
        closed,
    );
}

fn add_endpoints(scrape: &Scrape, from: Sources<'_>, endpoints: &[&Endpoint], views: &Views) {
    let clock = from.pool.clock();
    let each = |value: &dyn Fn(&Endpoint) -> u64| -> Vec<([&str; 1], u64)> {
        endpoints.iter().map(|endpoint| ([endpoint.config.id.as_ref()], value(endpoint))).collect()
    };
    let add = |name, help, values: Vec<_>| scrape.gauges(name, help, ["endpoint"], values.into_iter());
    add(
        "api_together_endpoint_available",
        "1 if the endpoint would be sent a request now.",
        each(&|endpoint| is_available(from.pool, endpoint, views, &clock).into()),
    );
    add(
        "api_together_endpoint_cooling_down",
        "1 while the circuit breaker keeps the endpoint out.",
        each(&|endpoint| matches!(endpoint.gate(clock.now), Gate::Cooling { .. } | Gate::OnTrial).into()),
    );
    scrape.gauges(
        "api_together_model_available",
        "0 for a model that rests or cools down at an endpoint, while it does.",
        ["endpoint", "model"],
        models_in_trouble(endpoints, &clock).iter().map(|(endpoint, model)| ([endpoint.as_ref(), model.as_str()], 0)),
    );
    add(
        "api_together_endpoint_in_flight",
        "Requests that the endpoint is answering.",
        each(&|endpoint| endpoint.live.in_flight().into()),
    );
}

/// Models that take no requests at an endpoint, though others may. Bounded by the health that is kept.
fn models_in_trouble(endpoints: &[&Endpoint], clock: &Clock) -> Vec<(Arc<str>, String)> {
    let mut all = Vec::new();
    for endpoint in endpoints {
        let health = endpoint.live.health();
        let closed =
            health.models().filter(|(_, health)| !matches!(health.gate(clock.now), Gate::Open | Gate::TrialDue));
        all.extend(closed.map(|(model, _)| (Arc::clone(&endpoint.config.id), model.to_owned())));
    }
    all
}

fn add_limits(scrape: &Scrape, endpoints: &[&Endpoint], views: &Views) {
    let mut all = Vec::new();
    for endpoint in endpoints {
        let whole = endpoint.accounts.whole();
        let used = PerLimit { max_concurrent: u64::from(endpoint.live.in_flight()), ..views.of(whole).used };
        let labels = |kind: LimitKind| [endpoint.config.id.as_ref(), kind.label()];
        all.extend(known(&whole.limits, used).map(|(kind, limit, used)| (labels(kind), limit, used)));
    }
    let add = |name, help, value: fn(u64, u64) -> u64| {
        let values = all.iter().map(|(labels, limit, used)| (*labels, value(*limit, *used)));
        scrape.gauges(name, help, ["endpoint", "limit"], values);
    };
    add("api_together_limit", "Limits of the endpoint, as configured.", |limit, _| limit);
    add(
        "api_together_limit_used",
        "Used part of each limit, by all processes that share the ledger; max_concurrent by this process.",
        |_, used| used,
    );
    add("api_together_limit_left", "Remaining part of each limit.", u64::saturating_sub);
}

/// Bounded by the accounts that an endpoint has for its models.
fn add_model_limits(scrape: &Scrape, endpoints: &[&Endpoint], views: &Views) {
    let mut all = Vec::new();
    for of in endpoints.iter().flat_map(|endpoint| endpoint.accounts.models()) {
        let Some(models) = of.account.id().models() else { continue };
        let labels = |kind: LimitKind| [of.account.id().owner().as_ref(), models.as_ref(), kind.label()];
        all.extend(known(&of.limits, views.of(of).used).map(|(kind, limit, used)| (labels(kind), limit, used)));
    }
    let add = |name, help, value: fn(u64, u64) -> u64| {
        let values = all.iter().map(|(labels, limit, used)| (*labels, value(*limit, *used)));
        scrape.gauges(name, help, ["endpoint", "model", "limit"], values);
    };
    add("api_together_model_limit", "Limits of models at the endpoint, as configured in modelLimits.", |limit, _| {
        limit
    });
    add(
        "api_together_model_limit_used",
        "Used part of each limit of models; as api_together_limit_used.",
        |_, used| used,
    );
    add("api_together_model_limit_left", "Remaining part of each limit of models.", u64::saturating_sub);
}

/// The keys of endpoints that have several.
fn add_lanes(scrape: &Scrape, endpoints: &[&Endpoint], clock: &Clock) {
    let pools = || endpoints.iter().filter(|endpoint| endpoint.lanes.is_pool());
    let by_state = pools().flat_map(|endpoint| {
        let counts = lanes::counts(endpoint, clock);
        counts.map(|(state, count)| ([endpoint.config.id.as_ref(), state.word()], count))
    });
    scrape.gauges(
        "api_together_endpoint_keys",
        "Keys of an endpoint that has several, by what they can do now: open, full, resting or cooling_down.",
        ["endpoint", "state"],
        by_state,
    );
    let keys = pools().flat_map(|endpoint| {
        let lanes = endpoint.lanes.list().iter().take(LANES_MAX);
        lanes.filter_map(|lane| {
            Some(([endpoint.config.id.as_ref(), lane.config.label.as_ref()], lane.live()?.requests()))
        })
    });
    scrape.counters(
        "api_together_endpoint_key_attempts_total",
        "Attempts with each key of an endpoint that has several; of the first 256 keys.",
        ["endpoint", "key"],
        keys,
    );
}

/// Limits of callers' keys that open something, the first of them by name. Those for some models are left out.
async fn add_key_limits(scrape: &Scrape, from: Sources<'_>) {
    let callers = Arc::clone(&from.process.keyring.load());
    let opening = callers.all().filter(|caller| caller.key.opens());
    let is_limited = |of: &&LimitedAccount| known(&of.limits, PerLimit::default()).next().is_some();
    let whole = opening.filter_map(|caller| caller.accounts.all().next().filter(is_limited));
    let accounts: Vec<LimitedAccount> = whole.take(KEYS_MAX).cloned().collect();
    if accounts.is_empty() {
        return;
    }
    let Some(views) = from.pool.ledger.look(accounts.clone()).await else { return };
    let mut all = Vec::new();
    for (of, view) in accounts.iter().zip(&views) {
        let labels = |kind: LimitKind| [of.account.id().owner().as_ref(), kind.label()];
        all.extend(known(&of.limits, view.used).map(|(kind, limit, used)| (labels(kind), limit, used)));
    }
    let add = |name, help, value: fn(u64, u64) -> u64| {
        let values = all.iter().map(|(labels, limit, used)| (*labels, value(*limit, *used)));
        scrape.gauges(name, help, ["key", "limit"], values);
    };
    add("api_together_key_limit", "Limits of callers' keys, as configured.", |limit, _| limit);
    add("api_together_key_limit_used", "Used part of each limit of a key; as api_together_limit_used.", |_, used| used);
    add("api_together_key_limit_left", "Remaining part of each limit of a key.", u64::saturating_sub);
}

/// Budgets of callers' keys that open something, the first of them by name.
async fn add_key_budgets(scrape: &Scrape, from: Sources<'_>) {
    let callers = Arc::clone(&from.process.keyring.load());
    let sets: Vec<_> =
        callers.all().filter(|caller| caller.key.opens()).filter_map(|caller| caller.budgets.clone()).collect();
    let mut all = Vec::new();
    for set in sets.iter().take(KEYS_MAX) {
        let Some(views) = from.pool.ledger.look_at_budgets(set).await else { return };
        for view in views {
            let kind = view.kind;
            let (unit, scale) = match kind.unit {
                BudgetUnit::NanoUsd => ("usd", 1e9),
                BudgetUnit::Tokens => ("tokens", 1.0),
            };
            all.push(([&*set.key, kind.period.word(), unit], view, scale));
        }
    }
    let add = |name, help, value: fn(&BudgetView) -> u64| {
        let values = all.iter().map(|(labels, view, scale)| (*labels, to_f64(value(view)) / scale));
        scrape.gauges_f64(name, help, ["key", "per", "unit"], values);
    };
    add("api_together_key_budget", "Budgets of callers' keys, raises included.", |view| view.limit);
    add("api_together_key_budget_spent", "What is spent of each budget in its period.", |view| view.totals.spent);
    add("api_together_key_budget_reserved", "What is reserved of each budget for requests under way.", |view| {
        view.totals.reserved
    });
}

/// The kinds that are limited, each with its limit and the used part of it.
fn known(limits: &Limits, used: PerLimit<u64>) -> impl Iterator<Item = (LimitKind, u64, u64)> {
    limits.by_kind.zip(used).each().filter_map(|(kind, (limit, used))| match limit {
        Limit::AtMost(limit) => Some((kind, limit, used)),
        Limit::Unlimited | Limit::Off => None,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// Names of metrics in a text, without the endings that Prometheus adds to histograms.
    fn names(text: &str) -> BTreeSet<&str> {
        text.split(|c: char| !c.is_ascii_lowercase() && c != '_')
            .filter(|word| word.starts_with("api_together_"))
            .map(|word| word.strip_suffix("_bucket").unwrap_or(word))
            .collect()
    }

    /// Every metric, since no other files make any.
    fn known() -> BTreeSet<&'static str> {
        let files: [&'static str; 3] = [
            include_str!("metrics.rs"),
            include_str!("../telemetry/metrics.rs"),
            include_str!("../telemetry/key_metrics.rs"),
        ];
        files.into_iter().filter_map(|text| text.split("#[cfg(test)]").next()).flat_map(names).collect()
    }

    #[test]
    fn the_documentation_has_every_metric_and_no_other() {
        let documented = names(include_str!("../../docs/operations.md"));
        assert!(known().len() > 25, "{:?}", known());
        assert_eq!(documented, known());
    }

    #[test]
    fn the_dashboard_asks_for_metrics_that_exist() {
        let asked = names(include_str!("../../packaging/grafana/api-together.json"));
        assert!(asked.len() > 15);
        assert_eq!(asked.difference(&known()).collect::<Vec<_>>(), Vec::<&&str>::new());
    }
}
