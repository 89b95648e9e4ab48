//! The step after a failed attempt: one decision, which the next call of `upstream_peer` reads.

use std::time::Instant;

use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorSource, ErrorType, RetryType};
use pingora_proxy::{FailToProxy, Session};

use super::context::{Arrival, Context, Logged};
use super::{is_final, outgoing};
use crate::admin::Answer;
use crate::billing;
use crate::config::CallKind;
use crate::exchange::{Ask, Attempt, CutBy, Kept, is_object_missing};
use crate::fault::Fault;
use crate::limit::Clock;
use crate::request::connections::OnConnection;
use crate::request_log::ATTEMPTS_MAX;
use crate::routing::balance;
use crate::routing::objects::SEARCHED_MAX;
use crate::routing::retry::{self, Outcome};
use crate::routing::router::Tried;
use crate::upstream::ConnectError;

/// Number of times that another endpoint takes over from an answer that was merely empty: it may be what the request gets.
pub(super) const EMPTIES_MAX: u32 = 2;
/// Number of times that an attempt is repeated because its pooled connection turns out to be closed.
const FRESH_CONNECTIONS_MAX: u32 = 2;

/// Step that follows an attempt, or the beginning.
#[derive(Debug)]
pub enum Follow {
    /// The same attempt, on a fresh connection: its pooled one had been closed.
    FreshConnection,
    /// The same attempt, at the endpoint's next address.
    NextAddress,
    /// The same attempt, without asking for its usage, which the endpoint refused.
    WithoutUsage,
    /// An attempt at another endpoint. If none takes the request, the client gets this fault, or else the reason why
    /// none does.
    NextEndpoint { otherwise: Option<Fault> },
    /// No step: the client gets this fault.
    Fail(Fault),
    /// No step: the client has disconnected.
    ClientGone,
}

impl Default for Follow {
    fn default() -> Self {
        Self::NextEndpoint { otherwise: None }
    }
}

impl Follow {
    /// True if Pingora is to ask for another peer.
    fn goes_on(&self) -> bool {
        !matches!(self, Self::Fail(_) | Self::ClientGone)
    }
}

/// Notes what follows, for `upstream_peer` or the answer to the client. True if Pingora is to ask for another peer.
pub(super) fn take_up(context: &mut Context, follow: Follow) -> bool {
    let goes_on = follow.goes_on();
    match follow {
        Follow::Fail(fault) => context.fault = Some(fault),
        other => context.tries.follow = other,
    }
    goes_on
}

/// An exchange with an endpoint ended with an error. True if Pingora is to ask for another peer.
pub(super) fn error_while_proxy(session: &Session, context: &mut Context, error: &Error, reused: bool) -> bool {
    let is_committed = context.exchange.state().committed.is_some();
    if is_committed || session.response_written().is_some_and(is_final) {
        conclude_committed(context, error);
        return false;
    }
    log::debug!("request {}: {error}", context.arrival.id_text());
    let cut = context.exchange.state().cut;
    if let Some(cut) = cut {
        after(context, &Outcome::ClientGone);
        context.fault = Some(cut_fault(cut, &context.arrival));
        return false;
    }
    let follow = decide(context, error, reused);
    take_up(context, follow)
}

/// Says why the gateway cut an answer off.
fn cut_fault(cut: CutBy, arrival: &Arrival) -> Fault {
    let name = arrival.named.as_ref().map(|named| named.caller.name().to_string()).unwrap_or_default();
    match cut {
        CutBy::Budget => Fault::BudgetOverrun { name },
        CutBy::Key => Fault::KeyEnded { name, why: "was revoked" },
        CutBy::Operator => Fault::Cancelled,
    }
}

/// The client has been sent a part of the answer, so nothing can follow. It breaks, unless it is whole.
fn conclude_committed(context: &mut Context, error: &Error) {
    let mut state = context.exchange.state();
    let ended = state.ended.take();
    let from_client = is_from_client(error, ended.as_ref());
    let is_complete = state.committed.is_some_and(|committed| committed.complete.is_some());
    match &mut state.attempt {
        // A WebSocket has an end of its own; how its connection is closed then says nothing of the endpoint.
        Some(attempt) if is_complete || context.switched => attempt.request_ended(),
        Some(attempt) if !from_client => {
            let outcome = ended.unwrap_or(Outcome::Broken);
            attempt.conclude(&outcome);
            state.settle_charges(false);
            if let Some(cut) = state.cut {
                context.fault = Some(cut_fault(cut, &context.arrival));
                return;
            }
            context.fault = Some(Fault::StreamBroken);
            context.tries.cause = Some(match outcome {
                Outcome::Broken => "broke off in its answer".to_owned(),
                other => other.to_string(),
            });
        }
        _ => {}
    }
}

/// The session says in `ended` why it gave an attempt up, which Pingora takes for an error of the client's side.
fn is_from_client(error: &Error, ended: Option<&Outcome>) -> bool {
    *error.esource() == ErrorSource::Downstream && ended.is_none()
}

/// Decides what follows an exchange that ended with an error before the client was sent anything.
fn decide(context: &mut Context, error: &Error, reused: bool) -> Follow {
    let (ended, has_header) = {
        let mut state = context.exchange.state();
        if context.arrival.connection.as_ref().is_some_and(OnConnection::switch_is_late) {
            state.ended = Some(Outcome::TooSlow);
        }
        (state.ended.take(), state.attempt.as_ref().is_some_and(Attempt::has_header))
    };
    let from_client = is_from_client(error, ended.as_ref());
    if ended.is_none() && !from_client && !has_header && may_reconnect(context, PooledClose::new(error, reused)) {
        return Follow::FreshConnection;
    }
    let outcome = ended.unwrap_or(match error.esource() {
        // Pingora refuses some requests only when it makes the endpoint's out of them.
        ErrorSource::Downstream if *error.etype() == ErrorType::InvalidHTTPHeader => Outcome::Ours,
        ErrorSource::Downstream => Outcome::ClientGone,
        ErrorSource::Internal => Outcome::Ours,
        ErrorSource::Upstream | ErrorSource::Unset => Outcome::Broken,
    });
    if outcome == Outcome::UsageRefused && asks_without_usage(context) {
        return Follow::WithoutUsage;
    }
    let follow = after(context, &outcome);
    if outcome == Outcome::Ours && from_client {
        let problem = "A header of the request is not what HTTP allows; look at its Connection header.".into();
        return Follow::Fail(Fault::RequestInvalid { problem });
    }
    follow
}

/// No connection could be made to the attempt's address. True if Pingora is to ask for another peer.
pub(super) fn fail_to_connect(context: &mut Context, peer: &HttpPeer, error: &Error) -> bool {
    let Some(endpoint) = context.exchange.state().attempt.as_ref().map(|attempt| attempt.asked.endpoint.clone()) else {
        return false;
    };
    let Some(kind) = context.ask.as_ref().map(|ask| ask.kind) else { return false };
    let upstream = endpoint.upstream_of(kind);
    let (id, address) = (&endpoint.config.id, &peer._address);
    let why = ConnectError::explain(error);
    log::warn!("endpoint {id}: no connection to {} ({address}): {why}", upstream.name());
    context.tries.addresses_failed += 1;
    let follow = if context.tries.addresses_failed < upstream.addresses_known() {
        Follow::NextAddress
    } else {
        after(context, &Outcome::ConnectFailed)
    };
    take_up(context, follow)
}

/// State of an attempt's pooled connection, if that is why it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PooledClose {
    /// It did not, for all that is known.
    No,
    /// It had been closed; the endpoint may have taken the request nevertheless.
    Closed,
    /// It had been closed, and the endpoint says that it never took the request.
    NeverTaken,
}

impl PooledClose {
    fn new(error: &Error, reused: bool) -> Self {
        use ErrorType::{ConnectionClosed, InvalidH2, ReadError, WriteError};
        match error.retry {
            RetryType::Decided(true) if *error.etype() != InvalidH2 => Self::NeverTaken,
            RetryType::ReusedOnly if reused => Self::Closed,
            _ if reused && matches!(error.etype(), ConnectionClosed | ReadError | WriteError) => Self::Closed,
            _ => Self::No,
        }
    }
}

/// True if the attempt may be repeated on a fresh connection.
fn may_reconnect(context: &mut Context, closed: PooledClose) -> bool {
    let Some(ask) = &context.ask else { return false };
    if closed == PooledClose::No
        || context.tries.reconnected >= FRESH_CONNECTIONS_MAX
        || context.arrival.at.elapsed() >= ask.pool.server.retry.budget
    {
        return false;
    }
    let mut state = context.exchange.state();
    let Some(attempt) = &mut state.attempt else { return false };
    if closed == PooledClose::NeverTaken {
        attempt.never_sent();
    }
    context.tries.reconnected += 1;
    true
}

/// Prepares to repeat the attempt without `stream_options`, which the gateway added and the endpoint refused.
fn asks_without_usage(context: &Context) -> bool {
    let mut state = context.exchange.state();
    state.kept = None;
    let Some(attempt) = &mut state.attempt else { return false };
    attempt.usage_refused = true;
    true
}

/// Concludes an attempt that is over and gave no answer for the client.
fn conclude_failed(context: &mut Context, outcome: &Outcome) {
    let Some(ask) = &mut context.ask else { return };
    let mut state = context.exchange.state();
    if let Some(mut attempt) = state.attempt.take() {
        billing::bill_dropped(&mut attempt, ask, outcome);
        attempt.conclude(outcome);
        let is_traced = context.arrival.trace.is_some_and(|trace| trace.is_recorded());
        if (context.arrival.logged == Logged::Yes || is_traced) && context.tries.over.len() < ATTEMPTS_MAX {
            context.tries.over.push(attempt.entry(context.arrival.at, Instant::now()));
        }
        state.charges.extend(attempt.take_charge());
        context.tries.last = Some(attempt.asked.clone());
        context.tries.meaning = attempt.meaning();
        ask.leave_if_refused(&attempt.asked.endpoint, outcome);
    }
}

/// Decides what follows an attempt that came to this end without an answer for the client.
pub(super) fn after(context: &mut Context, outcome: &Outcome) -> Follow {
    if *outcome == Outcome::ClientGone {
        // What was seen of its answer is billed with the request's end.
        if let Some(attempt) = &mut context.exchange.state().attempt {
            attempt.conclude(outcome);
        }
        return Follow::ClientGone;
    }
    conclude_failed(context, outcome);
    let Some(ask) = &context.ask else { return Follow::Fail(Fault::Internal) };
    let mut state = context.exchange.state();
    context.tries.empties += u32::from(*outcome == Outcome::Empty);
    let is_sought_elsewhere = ask.is_search() && is_object_missing(outcome);
    // Another key may do better where it was this one's trouble.
    if let Some(last) = context.tries.tried.last_mut() {
        let endpoint = ask.pool.endpoints.get(last.endpoint);
        let is_sought_by_key = || endpoint.is_some_and(|one| one.lanes.have_several_organizations());
        let is_keys = outcome.may_try_another_key() || *outcome == Outcome::LimitReached;
        last.is_over |= !(is_keys || is_sought_elsewhere && is_sought_by_key());
    }
    context.tries.absences += usize::from(is_sought_elsewhere);
    // An error of another endpoint says more than that this one could not be asked.
    let kept = state.kept.as_ref().map(|kept| kept.header.status.as_u16());
    if !matches!(outcome, Outcome::Error { .. } | Outcome::LimitReached) {
        state.kept = None;
    }
    let retry = &ask.pool.server.retry;
    let is_switch_refused = ask.switches_protocol && outgoing::refuses_switch(outcome);
    let may_follow = (outcome.is_retryable(retry) || is_sought_elsewhere || is_switch_refused)
        && context.tries.absences < SEARCHED_MAX
        && (*outcome != Outcome::Empty || context.tries.empties <= EMPTIES_MAX);
    let more = may_follow && has_more(ask, &context.tries.tried, context.arrival.at, &ask.pool.clock());
    if !more {
        state.settle_charges(true);
        context.tries.cause = Some(outcome.to_string());
    }
    // A complaint about our key is not the client's to see, but the log has it.
    let hidden = state.kept.take_if(|_| outcome.is_hidden(retry)).and_then(|kept| kept.words());
    drop(state);
    log_end(context, outcome, hidden, more);
    let fault = match outcome {
        // If no other endpoint has room either, the next choice says until when.
        Outcome::LimitReached if more => return Follow::default(),
        Outcome::LimitReached => match kept {
            Some(status) => Fault::EndpointError { status },
            None => context.tries.limit.take().unwrap_or(Fault::NoneAvailable),
        },
        Outcome::Error { .. } if outcome.is_hidden(retry) => Fault::EndpointKeyRefused,
        _ => fault_of(outcome),
    };
    if more { Follow::NextEndpoint { otherwise: Some(fault) } } else { Follow::Fail(fault) }
}

/// Logs how an attempt ended. `hidden` are the endpoint's words, if the client is not shown them.
fn log_end(context: &Context, outcome: &Outcome, hidden: Option<String>, more: bool) {
    let (Some(asked), false) = (&context.tries.last, *outcome == Outcome::Ours) else { return };
    let endpoint = &asked.endpoint;
    let id = context.arrival.id_text();
    let whom = match outcome {
        // The way matters more than where it leads.
        Outcome::ProxyRefused => {
            let kind = context.ask.as_ref().map_or(CallKind::Other, |ask| ask.kind);
            format!("endpoint {} ({})", endpoint.config.id, endpoint.upstream_of(kind).name())
        }
        _ => asked.words(),
    };
    let words = hidden.map(|words| format!(", with the words {words:?}")).unwrap_or_default();
    let is_over = context.tries.tried.last().is_none_or(|tried| tried.is_over);
    let next = match (more, is_over) {
        (true, true) => "another endpoint is tried",
        (true, false) => "another key or endpoint is tried",
        (false, _) => "no other endpoint is left",
    };
    log::info!("request {id}: {whom} {outcome}{words}; {next}");
}

/// The fault of an attempt that nothing follows.
fn fault_of(outcome: &Outcome) -> Fault {
    match outcome {
        Outcome::TooSlow => Fault::EndpointTimeout,
        Outcome::Empty => Fault::EndpointEmpty,
        Outcome::Unrecognised | Outcome::NotStreamed => Fault::EndpointUnrecognised,
        Outcome::Error { meaning, .. } => Fault::EndpointError { status: meaning.status },
        Outcome::ConnectFailed | Outcome::ProxyRefused | Outcome::Broken | Outcome::UsageRefused => {
            Fault::EndpointUnreachable
        }
        Outcome::LimitReached => Fault::NoneAvailable,
        Outcome::Ours | Outcome::ClientGone | Outcome::Answered { .. } => Fault::Internal,
    }
}

/// True if another attempt may begin and an endpoint is left for it.
pub(super) fn has_more(ask: &Ask, tried: &[Tried], came_at: Instant, clock: &Clock) -> bool {
    let attempts = u32::try_from(tried.len()).unwrap_or(u32::MAX);
    retry::may_begin(&ask.pool.server.retry, attempts, clock.now.saturating_duration_since(came_at))
        && balance::any_left(&ask.options(tried), clock)
}

/// Ends the request: the client gets the last endpoint's own error, or else the fault.
pub(super) async fn fail_to_proxy(session: &mut Session, context: &mut Context, error: &Error) -> FailToProxy {
    context.wrapped.unwrap_session(session);
    let (committed, opened, kept) = {
        let mut state = context.exchange.state();
        // One that we cut off has our own reason.
        let is_cut = state.cut.is_some();
        (state.committed, state.opened, state.kept.take().filter(|_| !is_cut))
    };
    let closed = |error_code| FailToProxy { error_code, can_reuse_downstream: false };
    let is_client_gone = *error.esource() == ErrorSource::Downstream && context.fault.is_none();
    if committed.is_some() || session.response_written().is_some_and(is_final) {
        if let (Some(fault), Some(committed)) = (&context.fault, committed)
            && committed.event_stream
        {
            let shape = context.arrival.error_shape;
            outgoing::send_error_event(session, &fault.json(shape), shape, committed.between_events).await;
        } else if opened && committed.is_none() && !is_client_gone {
            let shape = context.arrival.error_shape;
            let fault = context.fault.get_or_insert(Fault::Internal).json(shape);
            let error = kept.as_ref().and_then(|kept| kept.error_object(shape)).unwrap_or(fault);
            outgoing::send_error_event(session, &error, shape, true).await;
        }
        return closed(0);
    }
    if is_client_gone {
        return closed(0);
    }
    let fault = context.fault.get_or_insert(Fault::Internal).clone();
    if fault == Fault::Internal {
        context.tries.cause.get_or_insert_with(|| error.to_string());
        log::error!("request {}: {error}", context.arrival.id_text());
    }
    // Pingora closes the connection after a failure in any case; a client that does not know may lose its next request.
    session.set_keepalive(None);
    let sent = match kept {
        Some(Kept { header, body: Some(body) }) => {
            let status = header.status.as_u16();
            if let Some(kept) = &mut context.exchange.state().answer {
                kept.add(&body);
            }
            outgoing::send_kept(session, context, header, body).await.map(|()| status)
        }
        _ => outgoing::send(session, context, Answer::of_fault(&fault, context.arrival.error_shape))
            .await
            .map(|()| fault.status()),
    };
    sent.map_or(closed(0), closed)
}
