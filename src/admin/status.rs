//! `GET /v1/status`.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{Sources, lanes};
use crate::config::{Limit, PerLimit, StreamUsage};
use crate::ledger::{self, AccountId, AccountSet, LimitedAccount};
use crate::limit::{Clock, Gauge, Limits, Stamp, View};
use crate::process::{ConfigState, FileState, Process};
use crate::request_log::LogState;
use crate::routing::health::{EndpointHealth, Gate, Health};
use crate::routing::pool::{Endpoint, Pool};
use crate::routing::usage_injection::UsageInjection;

pub(super) const SERVICE: &str = "api-together";

/// The status, as JSON.
pub(crate) async fn status(from: Sources<'_>) -> String {
    let views = Views::look(from.pool).await;
    value(from.pool, from.process, &views, |_| true).to_string()
}

/// The same as a value. Of other endpoints than these the keys are counted, and not listed.
pub(crate) fn value(pool: &Pool, process: &Process, views: &Views, lists_keys: impl Fn(&Endpoint) -> bool) -> Value {
    let Process { open, ledger, request_log, estimator, config, started_at, .. } = process;
    let clock = pool.clock();
    let one = |endpoint: &Arc<Endpoint>| api((pool, endpoint, lists_keys(endpoint)), views, &clock);
    let apis: Vec<Value> = pool.endpoints.iter().map(one).collect();
    json!({
        "service": SERVICE,
        "timestamp": iso(SystemTime::now()),
        "version": env!("CARGO_PKG_VERSION"),
        "startedAt": iso(*started_at),
        "openRequests": open.count(),
        "strategy": pool.server.strategy,
        "config": config_state(config, pool),
        "ledger": ledger_state(ledger, pool),
        "requestLog": request_log.state().as_ref().map(request_log_state),
        "estimates": { "waiting": estimator.waiting(), "dropped": estimator.dropped() },
        "apis": apis,
    })
}

fn config_state(config: &ConfigState, pool: &Pool) -> Value {
    let FileState { error, needs_upgrade, failures: _, keys_error } = config.file();
    json!({
        "loadedAt": iso(pool.loaded_at),
        "version": pool.version,
        "error": error,
        "needsUpgrade": needs_upgrade,
        "keysError": keys_error,
    })
}

fn request_log_state(log: &LogState) -> Value {
    let dropped: Map<String, Value> =
        log.dropped.by_reason().map(|(reason, count)| (reason.name().to_owned(), count.into())).collect();
    json!({
        "state": if log.error.is_some() { "failing" } else { "ok" },
        "path": log.path.display().to_string(),
        "error": log.error,
        "written": log.written,
        "waiting": log.waiting,
        "dropped": dropped,
        "bytes": log.bytes,
    })
}

fn ledger_state(ledger: &ledger::LedgerState, pool: &Pool) -> Value {
    let fault = ledger.fault();
    let tally = ledger.tally();
    json!({
        "state": if fault.is_some() { "failing" } else { "ok" },
        "path": ledger.name(),
        "onError": ledger.on_error(),
        "failingSince": fault.as_ref().map(|fault| iso(fault.since)),
        "error": fault.map(|fault| fault.message),
        "queued": pool.ledger.queued(),
        "denied": tally.denied.load(Ordering::Relaxed),
        "uncounted": tally.uncounted.load(Ordering::Relaxed),
        "tokensLost": tally.lost.load(Ordering::Relaxed),
    })
}

/// What is left of every limit, asked of the ledger, since other processes may count as well.
#[derive(Debug)]
pub(crate) struct Views(HashMap<AccountId, View>);

impl Views {
    pub(super) async fn look(pool: &Pool) -> Self {
        Self::look_at(pool, |_| true).await
    }

    /// The same without the keys of other endpoints than these.
    pub(crate) async fn look_at(pool: &Pool, lists_keys: impl Fn(&Endpoint) -> bool) -> Self {
        let clock = pool.clock();
        let of_endpoints = pool.endpoints.iter().flat_map(|endpoint| endpoint.accounts.all());
        let listed = pool.endpoints.iter().filter(|endpoint| lists_keys(endpoint));
        let of_keys = listed.flat_map(|endpoint| lanes::limited(endpoint, &clock));
        let accounts: Vec<LimitedAccount> = of_endpoints.chain(of_keys).cloned().collect();
        let ids: Vec<AccountId> = accounts.iter().map(|of| of.account.id().clone()).collect();
        let views = pool.ledger.look(accounts).await.unwrap_or_default();
        Self(ids.into_iter().zip(views).collect())
    }

    pub(super) fn of(&self, account: &LimitedAccount) -> View {
        self.0.get(account.account.id()).copied().unwrap_or_default()
    }
}

/// True if the endpoint would be sent a request now, for one of its models at least.
pub(super) fn is_available(pool: &Pool, endpoint: &Endpoint, views: &Views, clock: &Clock) -> bool {
    // Without the ledger, what has limits takes nothing, unless the config says otherwise.
    let is_denied = |accounts: &AccountSet| pool.ledger.is_down() && accounts.in_ledger();
    let has_room = |accounts: &Arc<AccountSet>| {
        !is_denied(accounts) && accounts.accounts().iter().all(|of| views.of(of).held.is_none())
    };
    endpoint.config.usable()
        && endpoint.accounts.in_use().any(has_room)
        && matches!(endpoint.gate(clock.now), Gate::Open | Gate::TrialDue)
        && endpoint.has_key_to_serve(clock, pool.ledger.is_down())
}

fn api((pool, endpoint, lists_keys): (&Pool, &Endpoint, bool), views: &Views, clock: &Clock) -> Value {
    let now = clock.now;
    let config = &endpoint.config;
    let live = &endpoint.live;
    let gate = endpoint.gate(now);
    let available = is_available(pool, endpoint, views, clock);
    let health = live.health();
    let whole = endpoint.accounts.whole();
    let (limits, view) = (&whole.limits, views.of(whole));
    let in_flight = u64::from(live.in_flight());
    let used = PerLimit { max_concurrent: in_flight, ..view.used };
    json!({
        "id": config.id.as_ref(),
        "name": config.name.as_ref(),
        "enabled": config.enabled,
        "switchedOff": config.switched_off,
        "available": available,
        "temporarilyDisabled": matches!(gate, Gate::Cooling { .. } | Gate::OnTrial),
        "errorCount": health.errors_in_row(),
        "limits": by_kind(&limits.by_kind.map(Limit::as_number)),
        "usage": by_kind(&used),
        "quota": quota(limits, &view, used, clock),
        "heldBy": view.held.map(|held| held.by.to_string()),
        "limitFrees": view.held.map(|held| time_of(held.until, clock)),
        "modelLimits": model_limits(endpoint, views, clock),
        "keys": lanes::status((endpoint, lists_keys), views, clock),
        "timezone": limits.calendar.zone_name(),
        "baseUrl": config.base_url.to_string(),
        "serves": config.models.iter().chain(config.model_mapping.keys()).collect::<BTreeSet<_>>(),
        "modelMapping": config.model_mapping,
        "weight": config.weight,
        "priority": config.priority,
        "streamUsage": stream_usage(endpoint, clock),
        "inFlight": in_flight,
        "attempts": live.account.attempts(),
        "meanFirstByteMs": live.first_byte_mean().map(|mean| mean.as_secs_f64() * 1e3),
        "coolDownEnds": cool_down_ends(gate, now),
        "restEnds": rest_ends(gate, now),
        "models": models(endpoint, &health, now),
        "lastError": live.last_error().map(|error| json!({ "at": iso(error.at), "what": error.what })),
    })
}

/// Limits of models and what is left of them, by the pattern of the config; where each model has its own, by its name as well,
/// once it was asked for.
fn model_limits(endpoint: &Endpoint, views: &Views, clock: &Clock) -> Value {
    let one = |of: &LimitedAccount| {
        let view = views.of(of);
        let limits = json!({
            "limits": by_kind(&of.limits.by_kind.map(Limit::as_number)),
            "usage": by_kind(&view.used),
            "quota": quota(&of.limits, &view, view.used, clock),
            "heldBy": view.held.map(|held| held.by.to_string()),
            "limitFrees": view.held.map(|held| time_of(held.until, clock)),
        });
        Some((of.account.id().models()?.to_string(), limits))
    };
    Value::Object(endpoint.accounts.models().filter_map(one).collect())
}

pub(super) fn cool_down_ends(gate: Gate, now: Instant) -> Option<String> {
    match gate {
        Gate::Cooling { until } => Some(iso(wall_clock(until, now))),
        _ => None,
    }
}

pub(super) fn rest_ends(gate: Gate, now: Instant) -> Option<String> {
    match gate {
        Gate::Resting { until, .. } => Some(iso(wall_clock(until, now))),
        _ => None,
    }
}

/// State of each model, by the name that the endpoint is sent: those of the config, and others that anything is held against.
fn models(endpoint: &Endpoint, health: &EndpointHealth, now: Instant) -> Value {
    let state = |health: &Health| {
        let gate = health.gate(now);
        json!({
            "available": matches!(gate, Gate::Open | Gate::TrialDue),
            "temporarilyDisabled": matches!(gate, Gate::Cooling { .. } | Gate::OnTrial),
            "errorCount": health.errors_in_row(),
            "coolDownEnds": cool_down_ends(gate, now),
            "restEnds": rest_ends(gate, now),
        })
    };
    let spotless = state(&Health::default());
    let config = &endpoint.config;
    let names = config.models.iter().filter(|name| !config.model_mapping.contains_key(*name));
    let names = names.chain(config.model_mapping.values());
    let mut models: serde_json::Map<String, Value> = names.map(|name| (name.clone(), spotless.clone())).collect();
    models.extend(health.models().map(|(model, health)| (model.to_owned(), state(health))));
    Value::Object(models)
}

fn stream_usage(endpoint: &Endpoint, clock: &Clock) -> &'static str {
    match (endpoint.config.stream_usage, endpoint.live.usage_injection.state(clock.boot)) {
        (StreamUsage::Never, _) => "never",
        (StreamUsage::Auto, UsageInjection::Unneeded) => "told",
        (StreamUsage::Auto, UsageInjection::Wanted) => "auto",
        (StreamUsage::Auto, UsageInjection::Refused(_)) => "refused",
    }
}

/// Limit, used part, remaining part and reset time for each kind of limit.
pub(super) fn quota(limits: &Limits, view: &View, used: PerLimit<u64>, clock: &Clock) -> Value {
    let one = |((limit, gauge), used): ((Limit, Option<Gauge>), u64)| {
        json!({
            "limit": limit.as_number(),
            "used": used,
            "left": gauge.map(|gauge| gauge.left()),
            "resets": gauge.and_then(|gauge| gauge.resets).map(|resets| time_of(resets, clock)),
        })
    };
    let each = limits.by_kind.zip(view.gauges).zip(used).each();
    Value::Object(each.map(|(kind, values)| (kind.key().to_owned(), one(values))).collect())
}

/// A JSON object with a number for each kind of limit.
pub(super) fn by_kind<T: Copy + Into<Value>>(values: &PerLimit<T>) -> Value {
    Value::Object(values.each().map(|(kind, value)| (kind.key().to_owned(), value.into())).collect())
}

pub(super) fn time_of(stamp: Stamp, clock: &Clock) -> String {
    iso(clock.wall + (stamp - clock.boot))
}

/// The wall clock's time at a moment to come.
fn wall_clock(moment: Instant, now: Instant) -> SystemTime {
    let ahead = moment.saturating_duration_since(now);
    SystemTime::now().checked_add(ahead).unwrap_or(SystemTime::UNIX_EPOCH + Duration::ZERO)
}

/// ISO 8601 in UTC with milliseconds, as JavaScript writes it.
pub(super) fn iso(time: SystemTime) -> String {
    Timestamp::try_from(time).map_or_else(|_| String::new(), |timestamp| format!("{timestamp:.3}"))
}
