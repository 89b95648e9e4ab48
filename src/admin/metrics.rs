//! `GET /metrics`: what [`crate::telemetry::metrics`] has counted, and what is the case.

use std::sync::atomic::Ordering;
use std::time::SystemTime;

use super::Sources;
use super::status::is_available;
use crate::config::{Limit, LimitKind, PerLimit};
use crate::limit::View;
use crate::routing::health::Gate;
use crate::routing::pool::Endpoint;
use crate::telemetry::metrics::{EndpointMoment, Moment, ProcessMoment, metrics};

/// In Prometheus's text format.
pub async fn text(from: Sources<'_>) -> Vec<u8> {
    let pool = from.pool;
    let accounts = pool.endpoints.iter().map(|endpoint| endpoint.account()).collect();
    let views = pool.ledger.look(accounts).await.unwrap_or_default();
    let views = views.into_iter().chain(std::iter::repeat_with(View::default));
    let endpoints: Vec<_> = pool.endpoints.iter().zip(views).map(|(e, view)| endpoint(from, e, &view)).collect();
    let Some(metrics) = metrics() else { return Vec::new() };
    match Moment::new(&process(from), &endpoints) {
        Ok(moment) => metrics.text(&moment),
        Err(error) => {
            log::error!("metrics of this moment cannot be made: {error}");
            Vec::new()
        }
    }
}

fn endpoint(from: Sources<'_>, endpoint: &Endpoint, view: &View) -> EndpointMoment {
    let clock = from.pool.clock();
    let in_flight = u64::from(endpoint.live.in_flight());
    let used = PerLimit { max_concurrent: in_flight, ..view.used };
    let set = |(kind, (limit, used)): (LimitKind, _)| match limit {
        Limit::AtMost(most) => Some((kind, most, used)),
        Limit::Unlimited | Limit::Off => None,
    };
    EndpointMoment {
        id: endpoint.config.id.to_string(),
        available: is_available(from.pool, endpoint, view, &clock),
        cooling: matches!(endpoint.live.gate(clock.now), Gate::Cooling { .. } | Gate::OnTrial),
        in_flight,
        limits: endpoint.limits.by_kind.zip(used).each().filter_map(set).collect(),
    }
}

fn process(from: Sources<'_>) -> ProcessMoment {
    let process = from.process;
    let tally = process.ledger.tally();
    let file = process.config.file();
    let loaded = from.pool.loaded_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
    ProcessMoment {
        open: count(process.open.count()),
        queued: count(from.pool.ledger.queued()),
        draining: process.draining.is_on(),
        ledger_up: process.ledger.fault().is_none(),
        ledger_denied: tally.denied.load(Ordering::Relaxed),
        ledger_uncounted: tally.uncounted.load(Ordering::Relaxed),
        ledger_lost: tally.lost.load(Ordering::Relaxed),
        estimates_waiting: count(process.estimator.waiting()),
        estimates_dropped: process.estimator.dropped(),
        body_bytes: count(process.memory.bytes_used()),
        body_bytes_max: count(process.memory.bytes_max()),
        bodies_waiting: count(process.memory.waiting()),
        config_version: from.pool.version,
        config_failures: file.failures,
        config_ok: file.error.is_none(),
        config_loaded: loaded.as_secs_f64(),
    }
}
