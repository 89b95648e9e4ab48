//! `GET /health` and `GET /v1/status`.

use std::time::{Duration, Instant, SystemTime};

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::context::OpenRequests;
use crate::health::Gate;
use crate::limit::Clock;
use crate::pool::{Endpoint, Pool};

const SERVICE: &str = "api-together";

pub fn health() -> String {
    json!({ "status": "ok", "timestamp": iso(SystemTime::now()), "service": SERVICE }).to_string()
}

pub fn status(pool: &Pool, open: &OpenRequests) -> String {
    let apis: Vec<Value> = pool.endpoints.iter().map(|endpoint| api(endpoint, &pool.clock())).collect();
    json!({
        "service": SERVICE,
        "timestamp": iso(SystemTime::now()),
        "version": env!("CARGO_PKG_VERSION"),
        "openRequests": open.count(),
        "strategy": pool.server.strategy,
        "apis": apis,
    })
    .to_string()
}

fn api(endpoint: &Endpoint, clock: &Clock) -> Value {
    let now = clock.now;
    let config = &endpoint.config;
    let live = &endpoint.live;
    let gate = live.gate(now);
    let (minute, day) = live.used(clock);
    let full_for = endpoint.full_for(clock);
    let health = live.health();
    json!({
        "id": config.id.as_ref(),
        "name": config.name.as_ref(),
        "enabled": config.enabled,
        "available": config.usable() && full_for.is_none() && matches!(gate, Gate::Open | Gate::TrialDue),
        "temporarilyDisabled": matches!(gate, Gate::Cooling { .. } | Gate::OnTrial),
        "errorCount": health.errors_in_row(),
        "limits": { "rpm": config.rpm.as_number(), "rpd": config.rpd.as_number() },
        "usage": { "rpm": minute, "rpd": day },
        "limitFrees": full_for.and_then(|wait| now.checked_add(wait)).map(|until| iso(wall_clock(until, now))),
        "baseUrl": config.base_url.to_string(),
        "models": config.models,
        "modelMapping": config.model_mapping,
        "weight": config.weight,
        "priority": config.priority,
        "inFlight": live.in_flight(),
        "attempts": live.attempts(),
        "meanFirstByteMs": live.first_byte_mean().map(|mean| mean.as_secs_f64() * 1e3),
        "coolDownEnds": health.cooling_until().filter(|until| *until > now).map(|until| iso(wall_clock(until, now))),
        "restEnds": health.resting_until().filter(|until| *until > now).map(|until| iso(wall_clock(until, now))),
        "lastError": live.last_error().map(|error| json!({ "at": iso(error.at), "what": error.what })),
    })
}

/// The wall clock's time at a moment to come.
fn wall_clock(moment: Instant, now: Instant) -> SystemTime {
    let ahead = moment.saturating_duration_since(now);
    SystemTime::now().checked_add(ahead).unwrap_or(SystemTime::UNIX_EPOCH + Duration::ZERO)
}

/// ISO 8601 in UTC with milliseconds, as JavaScript writes it.
fn iso(time: SystemTime) -> String {
    Timestamp::try_from(time).map_or_else(|_| String::new(), |timestamp| format!("{timestamp:.3}"))
}
