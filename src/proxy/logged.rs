//! A finished request as the request log keeps it.

use std::mem;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::Method;

use super::access_log::Record;
use super::context::{Arrival, Context, Logged};
use crate::exchange::{Ask, Attempt};
use crate::request::call::Call;
use crate::request_log::{ATTEMPTS_MAX, Bodies, Entry, Name, RequestLog};
use crate::routing::sessions::{Affinity, Session};
use crate::telemetry::metrics;

/// Longest path that is a usual call's.
const PATH_BYTES_MAX: usize = 64;

/// True if the log takes a request. What is answered here is not in it, unless something is wrong with the request.
pub(super) fn is_taken(context: &Context, record: &Record<'_>, log: &RequestLog) -> bool {
    let is_wanted = match context.arrival.logged {
        Logged::No => false,
        Logged::IfWrong => record.fault.is_some(),
        Logged::Yes => true,
    };
    is_wanted && log.takes(!context.arrival.has_key)
}

/// The entry of a request, but for what is only taken out of its context.
pub(super) fn entry(context: &Context, method: &Method, record: &Record<'_>, attempt: Option<&Attempt>) -> Entry {
    let Arrival { own, named, at, .. } = &context.arrival;
    let ask = context.ask.as_deref();
    let asked = attempt.map(|attempt| &attempt.asked).or(context.tries.last.as_ref());
    let lane = asked.and_then(|asked| asked.lane()).filter(|lane| lane.live().is_some());
    let meaning = record.meaning.as_ref();
    let caller = named.as_ref().map(|named| &*named.caller);
    let outside = ask.and_then(|ask| {
        let asked_for = (ask.model.as_deref(), ask.kind);
        ask.candidates.outside(&ask.pool, asked_for, caller)
    });
    Entry {
        ended: SystemTime::now(),
        id: own.id.clone(),
        trace: context.arrival.trace.map(|trace| trace.id),
        key: caller.map(|caller| Arc::clone(caller.name())),
        tags: if record.tags.is_empty() { None } else { serde_json::to_string(record.tags).ok().map(Arc::from) },
        address: record.caller,
        session: ask.and_then(|ask| ask.session.as_ref()).map(Session::number),
        method: method_name(method),
        path: path(record.path, ask),
        model: model(record.model, ask),
        fallback: context.tries.tried.last().and_then(|tried| tried.fallback.clone()),
        endpoint_model: attempt.and_then(|attempt| attempt.model.mapped.clone()),
        endpoint: asked.map(|asked| Arc::clone(&asked.endpoint.config.id)),
        lane: lane.map(|lane| Arc::clone(&lane.config.label)),
        affinity: attempt.and_then(|attempt| attempt.affinity).map(Affinity::name),
        stream: ask.is_some_and(|ask| ask.stream),
        status: record.status,
        fault: record.fault,
        trouble: meaning.map(|meaning| (meaning.trouble.name(), meaning.rule)),
        queued: context.tries.queued,
        first_byte: record.first_byte,
        first_token: record.measured.first_token,
        generation: record.measured.generation,
        total: record.total,
        tokens: record.measured.tokens,
        cost: record.measured.price,
        request_bytes: ask.map_or(0, |ask| ask.body_bytes as u64),
        bytes: record.bytes as u64,
        held: record.held.clone(),
        outside,
        cause: record.cause.map(ToOwned::to_owned),
        config: ask.map_or(0, |ask| ask.pool.version),
        attempts: attempt.map(|attempt| attempt.entry(*at, Instant::now())).into_iter().collect(),
        bodies: None,
    }
}

/// Adds what is taken out of the context: earlier attempts, and bodies.
pub(super) fn complete(entry: &mut Entry, context: &mut Context) {
    let last = mem::replace(&mut entry.attempts, mem::take(&mut context.tries.over));
    entry.attempts.extend(last);
    entry.attempts.truncate(ATTEMPTS_MAX);
    let mut state = context.exchange.state();
    let Some(request) = context.ask.as_mut().and_then(|ask| ask.logged.take()) else { return };
    let mut bodies = Bodies { request: *request, ..Bodies::default() };
    if let Some(answer) = state.answer.take() {
        bodies.answer = *answer;
    }
    if let Some(attempt) = &state.attempt {
        bodies.secrets = attempt.secrets();
        if attempt.encoding.is_some() {
            // Keys in it could not be found.
            bodies.answer.bytes.clear();
        }
    }
    entry.bodies = Some(Box::new(bodies));
}

/// Clients can make up methods.
fn method_name(method: &Method) -> Name {
    const USUAL: [Method; 7] =
        [Method::POST, Method::GET, Method::DELETE, Method::PUT, Method::PATCH, Method::HEAD, Method::OPTIONS];
    if USUAL.contains(method) { Name::Known(method.as_str().into()) } else { Name::any(method.as_str()) }
}

/// Clients can make up ids in paths, and paths of nothing.
fn path(path: &str, ask: Option<&Ask>) -> Name {
    let is_usual = ask.is_some_and(|ask| ask.call.is_text() || ask.call == Call::Embeddings);
    if is_usual && path.len() <= PATH_BYTES_MAX { Name::Known(path.into()) } else { Name::any(path) }
}

/// Clients can make up models.
fn model(asked_for: Option<&str>, ask: Option<&Ask>) -> Option<Name> {
    match ask {
        Some(ask) if ask.candidates.label() != metrics::OTHER => ask.model.clone().map(Name::Known),
        Some(ask) => ask.model.as_deref().map(Name::any),
        None => asked_for.map(Name::any),
    }
}
