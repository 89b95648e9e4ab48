//! The end of a request: its tokens are billed, its metrics counted, its log line written.

use std::time::Instant;

use log::Level;
use pingora::{Error, ErrorSource};
use pingora_proxy::Session;

use super::access_log::Record;
use super::context::Context;
use super::is_final;
use super::logged;
use crate::billing::estimate::Estimator;
use crate::billing::{self, Measured};
use crate::exchange::scheduling::step_aside;
use crate::exchange::{Asked, Attempt};
use crate::fault::Fault;
use crate::fault::reference::CLIENT_GONE;
use crate::process::Process;
use crate::request_log::Entry;
use crate::routing::admission;
use crate::routing::retry::{Outcome, Place};
use crate::telemetry::logger::{self, REQUEST_TARGET};
use crate::telemetry::metrics::{self, Ended, metrics};

pub(super) async fn logging(session: &mut Session, error: Option<&Error>, context: &mut Context, process: &Process) {
    // The client has its answer; those of others come before the bookkeeping. Until that is done the request counts as open, so
    // a process that ends waits for it.
    if let Some(own) = context.ask.as_mut().and_then(|ask| ask.own_permit.as_mut()) {
        // Nor is the caller's next request to find this one in flight.
        own.end();
    }
    step_aside().await;
    context.wrapped.unwrap_session(session);
    let complete = context.exchange.state().committed.and_then(|committed| committed.complete);
    let mut measured = conclude(context, error.is_none(), complete, &process.estimator);
    let of_socket = || context.web_socket.as_ref().and_then(|socket| socket.tokens);
    measured.tokens = measured.tokens.or_else(of_socket);
    let client_gone = context.fault.is_none()
        && complete.is_none()
        && error.is_some_and(|error| *error.esource() == ErrorSource::Downstream);
    if let Some((mut entry, is_logged)) = record(session, context, measured, client_gone, process) {
        logged::complete(&mut entry, context);
        if let Some(trace) = context.arrival.trace.filter(|trace| process.traces.takes(Some(trace))) {
            process.traces.add(trace, &entry);
        }
        if is_logged {
            process.request_log.add(entry);
        }
    }
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

/// Counts a request and writes its line. Returns what the request log is to keep of it, if it takes it.
fn record(
    session: &Session,
    context: &Context,
    measured: Measured,
    client_gone: bool,
    process: &Process,
) -> Option<(Entry, bool)> {
    let fault = context.fault.as_ref();
    let status = session.response_written().filter(|header| is_final(header)).map(|header| header.status.as_u16());
    let is_failed = !client_gone && (status.is_some_and(|status| status >= 500) || fault == Some(&Fault::StreamBroken));
    let level = match is_failed {
        true if !context.arrival.is_probe => Level::Warn,
        _ if client_gone || context.arrival.is_probe && fault.is_none() => Level::Debug,
        _ => Level::Info,
    };
    let ledger_fault = fault.filter(|fault| is_of_ledger(fault)).and_then(|_| process.ledger.fault());
    let state = context.exchange.state();
    let attempt = state.attempt.as_ref();
    let asked = attempt.map(|attempt| &attempt.asked).or(context.tries.last.as_ref());
    let lane = asked.and_then(Asked::lane).filter(|lane| lane.live().is_some());
    let ask = context.ask.as_ref();
    let header = session.req_header();
    let meaning = attempt.map_or(context.tries.meaning, Attempt::meaning);
    let answered = || meaning.map(|meaning| Outcome::Error { meaning, place: Place::Status }.to_string());
    let cause = match ledger_fault {
        Some(fault) => Some(fault.message),
        None if is_failed => context.tries.cause.clone().or_else(answered),
        None => None,
    };
    let record = Record {
        id: context.arrival.id_text(),
        caller: context.arrival.address,
        key: context.arrival.named.as_ref().map(|named| &**named.caller.name()),
        tags: context.arrival.named.as_ref().map_or(&[], |named| &named.caller.key.tags),
        method: header.method.as_str(),
        path: header.uri.path(),
        model: ask.and_then(|ask| ask.model.as_deref()).or(context.fault.as_ref().and_then(Fault::model)),
        endpoint_model: attempt.and_then(|attempt| attempt.model.mapped.as_deref()),
        endpoint: asked.map(|asked| asked.endpoint.config.id.as_ref()),
        endpoint_key: lane.map(|lane| lane.config.label.as_ref()),
        attempts: context.tries.tried.len(),
        status,
        bytes: session.body_bytes_sent(),
        first_byte: state.committed.map(|committed| committed.at.saturating_duration_since(context.arrival.at)),
        total: context.arrival.at.elapsed(),
        measured,
        meaning,
        fault: if client_gone { Some(CLIENT_GONE) } else { fault.map(Fault::label) },
        held: match fault {
            Some(Fault::NoneAvailable) => ask.map_or_else(Vec::new, |ask| admission::out_of_service(&ask.options(&[]))),
            Some(fault) => fault.held().to_vec(),
            None => Vec::new(),
        },
        cause: cause.as_deref(),
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
            key: context.arrival.named.as_ref().map(|named| &*named.caller.counters),
        });
        if let Some(affinity) = attempt.and_then(|attempt| attempt.affinity) {
            metrics.affinity(affinity.name());
        }
    }
    write(&record, level);
    let is_logged = logged::is_taken(context, &record, &process.request_log);
    let is_taken = is_logged || process.traces.takes(context.arrival.trace.as_ref());
    is_taken.then(|| (logged::entry(context, &header.method, &record, attempt), is_logged))
}

fn is_of_ledger(fault: &Fault) -> bool {
    matches!(fault, Fault::LedgerUnavailable | Fault::StatsUnavailable)
}

fn write(record: &Record<'_>, level: Level) {
    if !log::log_enabled!(target: REQUEST_TARGET, level) {
        return;
    }
    if logger::is_json() {
        log::log!(target: REQUEST_TARGET, level, "{}", record.json_members());
    } else {
        log::log!(target: REQUEST_TARGET, level, "{}", record.text());
    }
}
