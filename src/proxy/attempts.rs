//! From one attempt to the next: which endpoint, which address, and what follows when it fails.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use http::Method;
use pingora::{Error, ErrorType, RetryType};

use crate::billing;
use crate::exchange::judge::Terms;
use crate::exchange::{Ask, Attempt};
use crate::fault::{Fault, HeldBy};
use crate::ledger::Drawn;
use crate::limit::Clock;
use crate::proxy::context::Context;
use crate::routing::admission;
use crate::routing::balance;
use crate::routing::pool::Endpoint;
use crate::routing::retry::{self, Outcome};

/// How often an attempt begins anew because its pooled connection turns out to be closed.
const STALE_MAX: u32 = 2;

/// Begins the next attempt, at an endpoint that was not tried yet.
pub(super) async fn next_attempt(context: &mut Context, method: &Method) -> Result<(), Fault> {
    let Some(ask) = &context.ask else { return Err(Fault::Internal) };
    let tries = &mut context.tries;
    let choice = match tries.next.take() {
        Some(choice) => choice,
        None => admission::admit(admission_of(ask, &tries.tried)).await?,
    };
    let candidate = ask.candidates.list().get(choice.candidate).ok_or(Fault::Internal)?;
    let endpoint = ask.pool.endpoints.get(candidate.endpoint).ok_or(Fault::Internal)?;
    let counters = ask.candidates.counters(choice.candidate).cloned();
    let chosen_at = choice.at;
    tries.tried.push(candidate.endpoint);
    tries.addresses_failed = 0;
    tries.stale = 0;
    let more = has_more(ask, &tries.tried, context.arrival.at, &chosen_at);
    let terms = Terms { call: ask.call, expects_body: *method != Method::HEAD, more, asks_usage: false };
    let now = Instant::now();
    let mut attempt = Attempt::new(endpoint, candidate.model.clone(), terms, choice, &ask.pool.server, now);
    attempt.counters = counters;
    if ask.stream {
        attempt.first_byte_timeout = endpoint.config.timeouts.first_byte_stream;
    }
    context.exchange.state().attempt = Some(attempt);
    context.fault = None;
    if tries.tried.len() == 1 {
        tries.own = Some(now.saturating_duration_since(ask.read_at));
    }
    Ok(())
}

/// A request that has been on its way once does not wait for its turn again: its client has waited long enough.
fn admission_of<'a>(ask: &'a Ask, tried: &'a [usize]) -> admission::Request<'a> {
    admission::Request { pool: &ask.pool, candidates: &ask.candidates, tried, queue: None }
}

/// Whether an attempt failed only because its pooled connection had been closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stale {
    /// It did not, for all that is known.
    No,
    /// It did; the endpoint may have taken the request all the same.
    Closed,
    /// It did, and the endpoint says that it never took the request.
    NeverTaken,
}

impl Stale {
    pub(super) fn of(error: &Error, reused: bool) -> Self {
        use ErrorType::{ConnectionClosed, InvalidH2, ReadError, WriteError};
        match error.retry {
            RetryType::Decided(true) if *error.etype() != InvalidH2 => Self::NeverTaken,
            RetryType::ReusedOnly if reused => Self::Closed,
            _ if reused && matches!(error.etype(), ConnectionClosed | ReadError | WriteError) => Self::Closed,
            _ => Self::No,
        }
    }
}

/// Whether the attempt may begin anew, on a fresh connection, because its pooled one had been closed.
pub(super) fn may_begin_anew(context: &mut Context, pooled: Stale) -> bool {
    let Some(ask) = context.ask.as_ref().filter(|_| context.tries.stale < STALE_MAX && pooled != Stale::No) else {
        return false;
    };
    if context.arrival.at.elapsed() >= ask.pool.server.retry.budget {
        return false;
    }
    let mut state = context.exchange.state();
    let Some(attempt) = &mut state.attempt else { return false };
    if pooled == Stale::NeverTaken {
        attempt.never_sent();
    }
    context.tries.stale += 1;
    context.tries.again = true;
    true
}

/// The endpoint refused what was added to the request, which its client has nothing to do with: the attempt begins anew without.
pub(super) fn begin_without_usage(context: &mut Context) {
    let mut state = context.exchange.state();
    state.kept = None;
    if let Some(attempt) = &mut state.attempt {
        attempt.refuses_usage = true;
        context.tries.again = true;
    }
}

/// Begins the attempt anew. False if its endpoint's limit does not allow it and another endpoint is to be tried.
pub(super) async fn begin_anew(context: &mut Context) -> Result<bool, Fault> {
    let ledger = context.ask.as_ref().ok_or(Fault::Internal)?.pool.ledger.clone();
    let mut attempt = context.exchange.state().attempt.take().ok_or(Fault::Internal)?;
    let begun = attempt.begin_anew(&ledger).await;
    let endpoint = Arc::clone(&attempt.endpoint);
    context.exchange.state().attempt = Some(attempt);
    let Err(drawn) = begun else { return Ok(true) };
    context.tries.limit = Some(limit_reached(context, &endpoint, drawn));
    if attempt_over(context, &Outcome::LimitReached) {
        return Ok(false);
    }
    Err(context.fault.take().unwrap_or(Fault::NoneAvailable))
}

/// The request's header goes out now. False if its permit is worth nothing any more and no other is to be had.
pub(super) async fn send(context: &mut Context, clock: &Clock) -> bool {
    if context.exchange.state().attempt.as_mut().is_some_and(|attempt| attempt.send_now(clock)) {
        return true;
    }
    // Boxed, since it is rare and would make every attempt's future larger.
    Box::pin(send_with_another_permit(context)).await
}

async fn send_with_another_permit(context: &mut Context) -> bool {
    let Some(ask) = &context.ask else { return false };
    let Some(mut attempt) = context.exchange.state().attempt.take() else { return false };
    let sent = attempt.send(&ask.pool.ledger).await;
    let endpoint = Arc::clone(&attempt.endpoint);
    context.exchange.state().attempt = Some(attempt);
    let Err(drawn) = sent else { return true };
    context.tries.limit = Some(limit_reached(context, &endpoint, drawn));
    false
}

/// What a client is told if nobody else takes the request either.
fn limit_reached(context: &Context, endpoint: &Endpoint, drawn: Drawn) -> Fault {
    let Drawn::Refused(refusal) = drawn else { return Fault::LedgerUnavailable };
    let shown = context.arrival.endpoint_headers.then(|| Arc::clone(&endpoint.config.id));
    let held = refusal.held.into_iter().map(|(_, hold)| HeldBy { endpoint: shown.clone(), hold });
    Fault::LimitsReached { wait: refusal.wait, held: held.collect() }
}

/// Whether another attempt may begin and any endpoint is left for it.
fn has_more(ask: &Ask, tried: &[usize], came_at: Instant, clock: &Clock) -> bool {
    let attempts = u32::try_from(tried.len()).unwrap_or(u32::MAX);
    retry::may_begin(&ask.pool.server.retry, attempts, clock.now.saturating_duration_since(came_at))
        && balance::any_left(&ask.pool, &ask.candidates, tried, clock)
}

/// The address that the attempt under way goes to: the endpoint's first one that has not failed it yet.
pub(super) async fn address(context: &Context) -> Option<(Arc<Endpoint>, SocketAddr)> {
    let endpoint = context.exchange.state().attempt.as_ref()?.endpoint.clone();
    match endpoint.upstream.addresses().await {
        Ok(addresses) => {
            let address = *addresses.get(context.tries.addresses_failed).or(addresses.first())?;
            Some((endpoint, address))
        }
        Err(error) => {
            let (id, host) = (&endpoint.config.id, endpoint.upstream.name());
            log::warn!("endpoint {id}: {host} cannot be resolved: {error}");
            None
        }
    }
}

/// An attempt came to its end without an answer for the client. Returns whether another one follows.
pub(super) fn attempt_over(context: &mut Context, outcome: &Outcome) -> bool {
    let Some(ask) = &context.ask else { return false };
    let mut state = context.exchange.state();
    if *outcome == Outcome::ClientGone {
        // What was seen of its answer is billed with the request's end.
        if let Some(attempt) = &mut state.attempt {
            attempt.settle(outcome);
        }
    } else if let Some(mut attempt) = state.attempt.take() {
        billing::bill_dropped(&attempt, ask);
        attempt.settle(outcome);
        context.tries.last = Some(Arc::clone(&attempt.endpoint));
    }
    // An error of another endpoint says more than that this one could not be asked.
    let kept = state.kept.as_ref().map(|kept| kept.header.status.as_u16());
    if !matches!(outcome, Outcome::Status { .. } | Outcome::LimitReached) {
        state.kept = None;
    }
    let retry = &ask.pool.server.retry;
    let more =
        outcome.is_retryable(retry) && has_more(ask, &context.tries.tried, context.arrival.at, &ask.pool.clock());
    if let (Some(endpoint), false) = (&context.tries.last, matches!(outcome, Outcome::ClientGone | Outcome::Ours)) {
        let (id, endpoint) = (context.arrival.id_text(), &endpoint.config.id);
        let next = if more { "another one is tried" } else { "no other one is left" };
        log::info!("request {id}: endpoint {endpoint} {outcome}; {next}");
    }
    context.fault = match outcome {
        Outcome::ClientGone => None,
        Outcome::Ours => Some(Fault::Internal),
        // If nobody else has room either, the next choice says until when.
        Outcome::LimitReached if more => None,
        Outcome::LimitReached => match kept {
            Some(status) => Some(Fault::EndpointError { status }),
            None => context.tries.limit.take().or(Some(Fault::NoneAvailable)),
        },
        Outcome::TooSlow => Some(Fault::EndpointTimeout),
        Outcome::Empty => Some(Fault::EndpointEmpty),
        Outcome::Status { status, .. } => Some(Fault::EndpointError { status: *status }),
        Outcome::ConnectFailed | Outcome::Broken | Outcome::ErrorEvent | Outcome::UsageRefused => {
            Some(Fault::EndpointUnreachable)
        }
    };
    more
}
