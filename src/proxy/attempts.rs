//! From one attempt to the next: endpoint, address, permit.

use std::mem;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Method;
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorType, Result as PingoraResult};
use pingora_proxy::Session;

use super::context::{Context, Logged};
use super::failure::{self, Follow};
use super::outgoing;
use crate::exchange::judge::{Terms, UsageTerms};
use crate::exchange::{Ask, Attempt, AttemptBudget, AttemptObjects};
use crate::fault::Fault;
use crate::ledger::Drawn;
use crate::limit::Clock;
use crate::routing::admission;
use crate::routing::objects::SEARCHED_MAX;
use crate::routing::pool::Endpoint;
use crate::routing::retry::Outcome;
use crate::routing::router::Tried;
use crate::routing::survey;

/// Attempts of a request of which is found out who was passed over: each looks at every candidate.
const SURVEYED_MAX: usize = 10;

/// Chooses the next peer, by what was decided to follow.
pub(super) async fn upstream_peer(session: &mut Session, context: &mut Context) -> PingoraResult<Box<HttpPeer>> {
    let method = session.req_header().method.clone();
    let begun = match mem::take(&mut context.tries.follow) {
        Follow::NextEndpoint { otherwise } => next_attempt(context, &method, otherwise).await,
        // Boxed, since it is rare and would make every attempt's future larger.
        Follow::FreshConnection | Follow::NextAddress | Follow::WithoutUsage => {
            Box::pin(repeat_attempt(context, &method)).await
        }
        // After these Pingora asks for no peer.
        Follow::Fail(fault) => Err(fault),
        Follow::ClientGone => Err(Fault::Internal),
    };
    if let Err(fault) = begun {
        context.fault = Some(fault);
        return Error::err_in(ErrorType::InternalError);
    }
    let Some((endpoint, address)) = address(context).await else {
        let follow = failure::after(context, &Outcome::ConnectFailed);
        let mut error = Error::new_up(ErrorType::ConnectError);
        error.set_retry(failure::take_up(context, follow));
        return Err(error);
    };
    let Some(ask) = &context.ask else { return Error::err_in(ErrorType::InternalError) };
    let (switches_protocol, kind) = (ask.switches_protocol, ask.kind);
    let first_byte = context.exchange.state().attempt.as_ref().map(|attempt| attempt.first_byte_timeout);
    // A client that stops reading must not keep the endpoint busy for ever.
    outgoing::takes_within(session, context, endpoint.config.timeouts.idle);
    if let (true, Some(connection), Some(longest)) = (switches_protocol, &context.arrival.connection, first_byte) {
        connection.awaits_switch(longest);
    }
    let fresh = context.tries.reconnected > 0;
    Ok(endpoint.upstream_of(kind).peer(address, switches_protocol, fresh, first_byte.unwrap_or(Duration::MAX)))
}

/// Begins the next attempt, at an endpoint that was not tried yet. If none takes the request, the client gets `otherwise`, an
/// endpoint's own failure, since that says more.
async fn next_attempt(context: &mut Context, method: &Method, otherwise: Option<Fault>) -> Result<(), Fault> {
    match begin_attempt(context, method).await {
        Err(fault) => Err(otherwise.unwrap_or(fault)),
        Ok(()) => Ok(()),
    }
}

async fn begin_attempt(context: &mut Context, method: &Method) -> Result<(), Fault> {
    let Some(ask) = &mut context.ask else { return Err(Fault::Internal) };
    let tries = &mut context.tries;
    let mut choice = match tries.first.take() {
        Some(choice) => choice,
        None => admission::admit(admission_of(ask, &tries.tried)).await?,
    };
    if let Some(own) = choice.permit.take_caller() {
        ask.own_permit = Some(own);
    }
    let hold = choice.permit.take_budgets();
    let candidate_index = choice.candidate;
    let candidate = ask.candidates.list().get(candidate_index).ok_or(Fault::Internal)?;
    let endpoint = ask.pool.endpoints.get(candidate.endpoint).ok_or(Fault::Internal)?;
    ask.fallback.clone_from(&candidate.fallback);
    let counters = ask.candidates.counters(candidate_index).cloned();
    let chosen_at = choice.at;
    tries.tried.push(candidate.tried(choice.lane, true));
    tries.addresses_failed = 0;
    tries.reconnected = 0;
    let search_goes_on = !ask.is_search() || tries.absences + 1 < SEARCHED_MAX;
    let has_more = |tried: &[Tried]| search_goes_on && failure::has_more(ask, tried, context.arrival.at, &chosen_at);
    let more = has_more(&tries.tried);
    let mut more_keys = false;
    if let Some(last) = tries.tried.last_mut().filter(|_| endpoint.lanes.is_pool()) {
        last.is_over = false;
        more_keys = more || has_more(&tries.tried);
    }
    let terms = Terms {
        call: ask.call,
        streams: ask.stream,
        expects_body: *method != Method::HEAD,
        more,
        more_keys,
        more_if_empty: tries.empties < failure::EMPTIES_MAX,
        searches: ask.is_search(),
        usage: UsageTerms::default(),
    };
    let now = Instant::now();
    let mut attempt = Attempt::new(endpoint, ask.model_for(candidate), terms, choice, &ask.pool.server, now);
    if let (Some(hold), Some(budget)) = (hold, &ask.budget) {
        let (model, wall) = (attempt.model.name().name, chosen_at.wall);
        let prompt = budget.spends(endpoint, model, wall).unwrap_or_default().known;
        let step = budget.step(endpoint, model, wall);
        attempt.budget = Some(Box::new(AttemptBudget::new(hold, prompt, step, budget.on_overrun)));
        attempt.meter.count_text();
    }
    attempt.counters = counters;
    if context.arrival.logged == Logged::Yes && tries.tried.len() <= SURVEYED_MAX {
        let before = tries.tried.split_last().map_or(&[][..], |(_, before)| before);
        attempt.passed_over = survey::passed_over(&ask.options(before), candidate_index, &chosen_at);
    }
    attempt.tier = ask.tier;
    attempt.shape = ask.shape;
    attempt.affinity = ask.affinity(candidate);
    attempt.session.clone_from(&ask.session);
    attempt.objects = ask.objects.as_ref().map(|objects| Box::new(AttemptObjects::new(objects, &ask.pool, &chosen_at)));
    if ask.stream {
        attempt.first_byte_timeout = endpoint.config.timeouts.first_byte_stream;
    }
    context.exchange.state().attempt = Some(attempt);
    if tries.tried.len() == 1 {
        tries.own = Some(now.saturating_duration_since(ask.read_at));
    }
    Ok(())
}

/// A request that was sent once does not queue again: its client has waited long enough.
fn admission_of<'a>(ask: &'a Ask, tried: &'a [Tried]) -> admission::Request<'a> {
    // Its caller's own limits count requests, and this one has been counted.
    let own = ask.own.as_ref().filter(|_| ask.own_permit.is_none());
    let fallbacks = if ask.own_permit.is_none() { &ask.own_fallbacks[..] } else { &[] };
    let (options, queued_by, budget) = (ask.options(tried), ask.queued_by(), ask.budget.as_ref());
    admission::Request { options, queue: None, queued_by, caller: ask.caller, own, fallbacks, budget }
}

/// Repeats the attempt under way. If its endpoint's limit does not allow that, another endpoint is tried.
async fn repeat_attempt(context: &mut Context, method: &Method) -> Result<(), Fault> {
    let ledger = context.ask.as_ref().ok_or(Fault::Internal)?.pool.ledger.clone();
    let mut attempt = context.exchange.state().attempt.take().ok_or(Fault::Internal)?;
    let begun = attempt.begin_anew(&ledger).await;
    let endpoint = Arc::clone(&attempt.asked.endpoint);
    context.exchange.state().attempt = Some(attempt);
    let Err(drawn) = begun else { return Ok(()) };
    context.tries.limit = Some(limit_reached(context, &endpoint, drawn));
    match failure::after(context, &Outcome::LimitReached) {
        Follow::NextEndpoint { otherwise } => next_attempt(context, method, otherwise).await,
        Follow::Fail(fault) => Err(fault),
        _ => Err(Fault::NoneAvailable),
    }
}

/// Spends the permit as the request's header goes out. False if it has expired and there is no other.
pub(super) async fn send(context: &mut Context, clock: &Clock) -> bool {
    let is_sent = context.exchange.state().attempt.as_mut().is_some_and(|attempt| attempt.send_now(clock))
        // Boxed, since it is rare and would make every attempt's future larger.
        || Box::pin(send_with_another_permit(context)).await;
    if let Some(own) = context.ask.as_mut().and_then(|ask| ask.own_permit.as_mut()).filter(|_| is_sent) {
        own.spend();
    }
    is_sent
}

async fn send_with_another_permit(context: &mut Context) -> bool {
    let Some(ask) = &context.ask else { return false };
    let Some(mut attempt) = context.exchange.state().attempt.take() else { return false };
    let sent = attempt.send(&ask.pool.ledger).await;
    let endpoint = Arc::clone(&attempt.asked.endpoint);
    context.exchange.state().attempt = Some(attempt);
    let Err(drawn) = sent else { return true };
    context.tries.limit = Some(limit_reached(context, &endpoint, drawn));
    false
}

/// Returns the fault for the client if no other endpoint takes the request either.
pub(super) fn limit_reached(context: &Context, endpoint: &Endpoint, drawn: Drawn) -> Fault {
    let Drawn::Refused(refusal) = drawn else { return Fault::LedgerUnavailable };
    let id = || Arc::clone(&endpoint.config.id);
    let is_public = context.arrival.endpoint_headers;
    let now = context.ask.as_ref().map(|ask| ask.pool.clock().boot).unwrap_or_default();
    let held = refusal.held.iter().map(|held| held.held_by(id(), is_public, now));
    Fault::LimitsReached { wait: refusal.wait, held: held.collect() }
}

/// Returns the address of the current attempt: the endpoint's first one that has not failed it yet.
pub(super) async fn address(context: &Context) -> Option<(Arc<Endpoint>, SocketAddr)> {
    let endpoint = context.exchange.state().attempt.as_ref()?.asked.endpoint.clone();
    let upstream = endpoint.upstream_of(context.ask.as_ref()?.kind);
    match upstream.addresses().await {
        Ok(addresses) => {
            let address = *addresses.get(context.tries.addresses_failed).or(addresses.first())?;
            Some((endpoint, address))
        }
        Err(error) => {
            let (id, host) = (&endpoint.config.id, upstream.name());
            log::warn!("endpoint {id}: {host} cannot be resolved: {error}");
            None
        }
    }
}
