//! The end of a request: its tokens are billed, its metrics counted, its log line written.

use std::time::Instant;

use pingora::{Error, ErrorSource};
use pingora_proxy::Session;

use super::access_log::Record;
use super::context::Context;
use super::is_final;
use crate::billing::estimate::Estimator;
use crate::billing::{self, Measured};
use crate::exchange::Attempt;
use crate::exchange::scheduling::step_aside;
use crate::fault::Fault;
use crate::telemetry::logger::{self, REQUEST_TARGET};
use crate::telemetry::metrics::{self, Ended, metrics};

pub(super) async fn logging(
    session: &mut Session,
    error: Option<&Error>,
    context: &mut Context,
    estimator: &Estimator,
) {
    // The client has its answer; those of others come before the bookkeeping. Until that is done the request counts as open, so
    // a process that ends waits for it.
    step_aside().await;
    context.wrapped.unwrap_session(session);
    let complete = context.exchange.state().committed.and_then(|committed| committed.complete);
    let measured = conclude(context, error.is_none(), complete, estimator);
    let client_gone = context.fault.is_none()
        && complete.is_none()
        && error.is_some_and(|error| *error.esource() == ErrorSource::Downstream);
    record(session, context, measured, client_gone);
}

/// Concludes the last attempt, and bills what was measured of it.
fn conclude(context: &mut Context, went_well: bool, complete: Option<Instant>, estimator: &Estimator) -> Measured {
    let mut state = context.exchange.state();
    let Some(attempt) = &mut state.attempt else { return Measured::default() };
    if went_well {
        attempt.request_ended();
    }
    state.settle_charges(true);
    let Some(attempt) = &mut state.attempt else { return Measured::default() };
    let Some(ask) = &mut context.ask else { return Measured::default() };
    ask.keep_for_estimate();
    let ended = complete.unwrap_or_else(Instant::now);
    billing::bill(attempt, ask, context.arrival.id_text(), (context.arrival.at, ended), estimator)
}

fn record(session: &Session, context: &Context, measured: Measured, client_gone: bool) {
    let level = if client_gone { log::Level::Debug } else { log::Level::Info };
    let state = context.exchange.state();
    let attempt = state.attempt.as_ref();
    let endpoint = attempt.map(|attempt| &attempt.endpoint).or(context.tries.last.as_ref());
    let ask = context.ask.as_ref();
    let header = session.req_header();
    let record = Record {
        id: context.arrival.id_text(),
        caller: context.arrival.address,
        method: header.method.as_str(),
        path: header.uri.path(),
        model: ask.and_then(|ask| ask.model.as_deref()).or(context.fault.as_ref().and_then(Fault::model)),
        endpoint_model: attempt.and_then(|attempt| attempt.model.mapped.as_deref()),
        endpoint: endpoint.map(|endpoint| endpoint.config.id.as_ref()),
        attempts: context.tries.tried.len(),
        status: session.response_written().filter(|header| is_final(header)).map(|h| h.status.as_u16()),
        bytes: session.body_bytes_sent(),
        first_byte: state.committed.map(|committed| committed.at.saturating_duration_since(context.arrival.at)),
        total: context.arrival.at.elapsed(),
        measured,
        meaning: attempt.map_or(context.tries.meaning, Attempt::meaning),
        fault: if client_gone { Some("client_gone") } else { context.fault.as_ref().map(Fault::label) },
    };
    if let Some(metrics) = metrics() {
        metrics.request(&Ended {
            endpoint: record.endpoint,
            model: ask.map_or(metrics::NONE, |ask| ask.candidates.label()),
            status: record.status,
            outcome: record.fault.unwrap_or(metrics::OK),
            first_byte: record.first_byte,
            total: record.total,
            counters: attempt.and_then(|attempt| attempt.counters.as_deref()),
        });
    }
    write(&record, level);
}

fn write(record: &Record<'_>, level: log::Level) {
    if !log::log_enabled!(target: REQUEST_TARGET, level) {
        return;
    }
    if logger::is_json() {
        log::log!(target: REQUEST_TARGET, level, "{}", record.json_members());
    } else {
        log::log!(target: REQUEST_TARGET, level, "{}", record.text());
    }
}
