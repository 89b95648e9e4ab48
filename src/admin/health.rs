//! `GET /`, `GET /health` and `GET /health/ready`, for people, process managers and load balancers. None needs the key.

use std::sync::Arc;
use std::time::SystemTime;

use serde_json::json;

use super::Sources;
use super::status::{SERVICE, iso};
use crate::ledger::AccountSet;
use crate::routing::health::Gate;
use crate::routing::pool::Endpoint;

/// Says to a browser, or a person with curl, that this is the right address and what to put into a client.
pub(crate) fn welcome(from: Sources<'_>) -> String {
    let is_name =
        |text: &&str| !text.is_empty() && text.bytes().all(|c| c.is_ascii_alphanumeric() || b".-_:[]".contains(&c));
    let scheme = if from.pool.server.tls.is_some() { "https" } else { "http" };
    match from.authority.filter(is_name) {
        Some(authority) => format!("{SERVICE} is running; base URL {scheme}://{authority}/v1\n"),
        None => format!("{SERVICE} is running; base URL: this address with /v1\n"),
    }
}

/// The process is alive.
pub(super) fn health() -> String {
    json!({ "status": "ok", "timestamp": iso(SystemTime::now()), "service": SERVICE }).to_string()
}

/// Readiness: 503 with the reason while the process should not be sent requests.
pub(super) fn ready(from: Sources<'_>) -> (u16, String) {
    let reason = if from.process.draining.is_on() {
        Some("it is on its way out and finishes what it has")
    } else {
        no_endpoint(from)
    };
    let status = if reason.is_none() { "ready" } else { "not_ready" };
    let body = json!({ "status": status, "reason": reason, "timestamp": iso(SystemTime::now()), "service": SERVICE });
    (if reason.is_none() { 200 } else { 503 }, body.to_string())
}

fn no_endpoint(from: Sources<'_>) -> Option<&'static str> {
    let pool = from.pool;
    let clock = pool.clock();
    let usable = || pool.endpoints.iter().filter(|endpoint| endpoint.config.usable());
    let denies = pool.ledger.is_down();
    // What is at its limit here is so on all machines that share the ledger: without any of them clients would be refused the connection.
    let is_shared = pool.server.shared_ledger.is_some();
    let is_open = |endpoint: &Endpoint| {
        let is_full = |accounts: &Arc<AccountSet>| accounts.seems_full(clock.boot) || denies && accounts.in_ledger();
        let has_room = || !endpoint.accounts.in_use().all(is_full) && endpoint.has_key_to_serve(&clock, denies);
        matches!(endpoint.gate(clock.now), Gate::Open | Gate::TrialDue) && (is_shared || has_room())
    };
    if usable().any(|endpoint| is_open(endpoint)) {
        None
    } else if usable().next().is_none() {
        Some("no endpoint is enabled")
    } else if denies && !is_shared {
        Some("the ledger cannot be written, so endpoints with limits take no requests, and no other one can")
    } else {
        Some("every endpoint is at a limit or cooling down")
    }
}
