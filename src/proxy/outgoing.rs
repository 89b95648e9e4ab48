//! Outgoing messages: requests as endpoints get them, and answers as clients get them.

use std::borrow::Cow;
use std::mem;
use std::os::fd::RawFd;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header, response};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::ALPN;
use pingora::protocols::http::HttpTask;
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorType, Result};
use pingora_proxy::Session;

use super::context::Context;
use super::{attempts, is_final, web_socket};
use crate::admin::Answer;
use crate::exchange::{Ask, Attempt};
use crate::fault::ErrorShape;
use crate::request::fields::ModelPlace;
use crate::request::id::REQUEST_ID;
use crate::request::rewrite::{self, Edit};
use crate::request::trace::{TRACEPARENT, TRACESTATE};
use crate::request::{content_type, forward};
use crate::response::decode::Encoding;
use crate::response::redact::Redactor;
use crate::response::wait;
use crate::routing::rate_headers;
use crate::routing::retry::Outcome;
use crate::routing::router::Tried;
use crate::telemetry::metrics::metrics;
use crate::upstream::cork::Cork;

const ENDPOINT: HeaderName = HeaderName::from_static("x-api-together-endpoint");
const AFFINITY: HeaderName = HeaderName::from_static("x-api-together-affinity");
/// The model that served in the place of the one that was asked for.
const MODEL: HeaderName = HeaderName::from_static("x-api-together-model");
const ATTEMPTS: HeaderName = HeaderName::from_static("x-api-together-attempts");
/// Time for the last bytes of an HTTP/2 stream to leave: a stream that is dropped takes its unsent bytes with it. Long
/// enough for a machine that is busy elsewhere.
const H2_FLUSH: Duration = Duration::from_millis(100);

/// Longest silence of a WebSocket in both directions.
const WEBSOCKET_SILENCE_MAX: Duration = Duration::from_hours(1);

/// Gives the client this long to take something of what is sent to it.
pub(super) fn takes_within(session: &mut Session, context: &Context, longest: Duration) {
    if session.req_header().version == Version::HTTP_2 {
        // Its window may be shut while others go on, which their connection knows nothing of.
        session.set_write_timeout(Some(longest));
    }
    if let Some(connection) = &context.arrival.connection {
        connection.takes_within(longest);
    }
}

/// Prepares an attempt's request, and draws a fresh permit if the one it has is too old by now.
pub(super) async fn upstream_request_filter(
    session: &Session,
    request: &mut RequestHeader,
    context: &mut Context,
) -> Result<()> {
    let begun = Instant::now();
    rewrite_header(request, context)?;
    if !context.ask.as_ref().is_some_and(|ask| ask.switches_protocol) {
        let body = rewrite_body(context);
        set_length(request, &session.req_header().method, body.iter().map(Bytes::len).sum())?;
        context.exchange.state().body = body.into();
    }
    let Some(clock) = context.ask.as_ref().map(|ask| ask.pool.clock()) else {
        return Error::err_in(ErrorType::InternalError);
    };
    // Of the first attempt only; later ones include the wait for other endpoints.
    if let (Some(own), Some(metrics)) = (context.tries.own.take(), metrics()) {
        metrics.own(own + clock.now.saturating_duration_since(begun));
    }
    if attempts::send(context, &clock).await {
        if let Some(cork) = handshake_cork(context) {
            // It runs when this task waits for the first time, with the header written and the request's end seen.
            tokio::spawn(async move { cork.pull() });
        }
        return Ok(());
    }
    context.exchange.state().ended = Some(Outcome::LimitReached);
    Error::err_in(ErrorType::Custom("the limit was reached meanwhile"))
}

/// The cork of a request that opens a `WebSocket`.
fn handshake_cork(context: &Context) -> Option<Cork> {
    context.ask.as_ref().filter(|ask| ask.switches_protocol)?;
    context.exchange.state().cork.take()
}

/// Has the request's header wait for the body, so that both are one packet.
///
/// That of a `WebSocket` waits until Pingora has seen that the request has no body: if the 101 comes first, it takes that end for the
/// end of the session.
pub(super) fn connected_to_upstream(session: &Session, peer: &HttpPeer, socket: RawFd, context: &Context) {
    if context.ask.as_ref().is_some_and(|ask| ask.switches_protocol) {
        context.exchange.state().cork = Cork::put_in(socket, true);
        return;
    }
    // An HTTP/2 connection is shared, and one in TLS may be one.
    if !peer.is_tls() && peer.options.alpn == ALPN::H1 && session.downstream_session.is_custom() {
        let has_body = context.ask.as_ref().is_some_and(|ask| !ask.body.is_empty());
        context.exchange.state().cork = Cork::put_in(socket, has_body);
    }
}

/// Notes how an answer is framed and compressed, before Pingora frames it for the client.
pub(super) fn upstream_response_filter(header: &mut ResponseHeader, context: &Context) -> Result<()> {
    let mut state = context.exchange.state();
    let Some(attempt) = &mut state.attempt else { return Ok(()) };
    attempt.ends_with_connection = header.version <= Version::HTTP_11
        && !header.headers.contains_key(header::CONTENT_LENGTH)
        && !header.headers.contains_key(header::TRANSFER_ENCODING);
    attempt.encoding = Encoding::from_headers(&header.headers);
    let is_error = header.status.as_u16() >= 400;
    if let (Some(objects), Some(location), false) = (&attempt.objects, header.headers.get(header::LOCATION), is_error) {
        // A call of the realtime API is named here only.
        objects.made_at(location.to_str().unwrap_or_default(), &attempt.asked);
    }
    // Here, since not all of these headers go on.
    let status = header.status.as_u16();
    attempt.wait = if is_error { wait::in_headers(&header.headers, status, SystemTime::now()) } else { None };
    if !is_error && attempt.asked.endpoint.config.learns_limits {
        attempt.until_room = wait::until_room(&header.headers, SystemTime::now());
    }
    if is_error && attempt.encoding.is_some_and(|encoding| encoding != Encoding::Unknown) {
        // A key quoted in it can be redacted in plain text only.
        header.remove_header(&header::CONTENT_ENCODING);
        header.remove_header(&header::CONTENT_LENGTH);
    }
    if attempt.terms.usage.injected && !is_error {
        // The usage that only we asked for is taken out, so the body gets shorter.
        header.remove_header(&header::CONTENT_LENGTH);
    }
    let is_accepted = context.web_socket.as_ref().is_some_and(|socket| socket.is_accepted());
    if let Some(ask) = context.ask.as_ref().filter(|ask| ask.switches_protocol)
        && is_final(header)
        && (attempt.terms.more || attempt.terms.more_keys || is_accepted)
    {
        // Its session is not held, so a refusal that another endpoint need not make ends the attempt here, as does any whose client
        // has been told that the protocol is switched.
        let outcome = match Outcome::of_status(status, attempt.wait) {
            Outcome::Answered { .. } if header.status != StatusCode::SWITCHING_PROTOCOLS => Outcome::Unrecognised,
            outcome => outcome,
        };
        let is_refused = is_accepted && header.status != StatusCode::SWITCHING_PROTOCOLS;
        let may_follow = attempt.terms.more || outcome.may_try_another_key();
        if is_refused || may_follow && (outcome.is_retryable(&ask.pool.server.retry) || refuses_switch(&outcome)) {
            attempt.header_came(outcome);
            state.ended = Some(outcome);
            return Error::err_up(ErrorType::Custom("the protocol was not switched"));
        }
    }
    Ok(())
}

/// True if an endpoint says that it does not switch protocols for such a call.
pub(super) fn refuses_switch(outcome: &Outcome) -> bool {
    outcome.meaning().is_some_and(|meaning| matches!(meaning.status, 404 | 405 | 426 | 501))
}

/// Makes an endpoint's answer ready for the client.
pub(super) fn response_filter(session: &Session, header: &mut ResponseHeader, context: &mut Context) -> Result<()> {
    let is_wrapped = session.downstream_session.is_custom();
    if !is_final(header) {
        // Before a switch of protocols; others are counted where they are held. Its client is not sent it.
        if is_wrapped {
            return Ok(());
        }
        let is_flood = context.exchange.state().attempt.as_mut().is_some_and(Attempt::interim_came);
        return if is_flood { Error::err_up(ErrorType::InvalidHTTPHeader) } else { Ok(()) };
    }
    if let (Some(attempt), false) = (&mut context.exchange.state().attempt, is_wrapped) {
        // A request that switches protocols is not held, so this is its answer. By its status, since what follows it may
        // come before the session has written it.
        context.switched = header.status == StatusCode::SWITCHING_PROTOCOLS;
        if let Some(connection) = &context.arrival.connection {
            connection.flows(if context.switched {
                WEBSOCKET_SILENCE_MAX
            } else {
                attempt.asked.endpoint.config.timeouts.idle
            });
        }
        context.refusal = (!context.switched).then(|| Redactor::new(attempt.secrets()));
        attempt.header_came(Outcome::of_status(header.status.as_u16(), attempt.wait));
        if let Some(ask) = &context.ask {
            attempt.committed(&ask.pool, Instant::now());
        }
    }
    rewrite_answer(header, context)
}

/// Reads what passes over a WebSocket, redacts secrets in the refusal of a protocol switch, and frees a request body that is no longer needed.
pub(super) fn response_body_filter(body: &mut Option<Bytes>, end: bool, context: &mut Context) {
    if context.switched {
        web_socket::from_endpoint(body, context);
    }
    // A refusal to switch protocols passes here and nowhere else.
    if let Some(redactor) = &mut context.refusal {
        let piece = redactor.piece(body.as_deref().unwrap_or_default(), end);
        // An empty piece would count as the last chunk.
        *body = Some(piece).filter(|piece| !piece.is_empty());
    }
    // Once committed there is no other attempt, and nothing more to replay.
    if let Some(ask) = context.ask.as_mut().filter(|ask| !ask.body.is_empty())
        && context.exchange.state().committed.is_some()
    {
        ask.keep_for_estimate();
    }
}

/// Returns the part of a request's header that is forwarded to any endpoint. It is kept without the case of its names,
/// which makes it cheap to copy for each attempt.
pub(super) fn forwarded(header: &RequestHeader, ask: &Ask, id: Option<&HeaderValue>) -> RequestHeader {
    let mut parts = Request::new(()).into_parts().0;
    parts.method = header.method.clone();
    parts.uri = ask.target.clone().into();
    parts.version = header.version;
    let own = ask.named.as_ref().map(|named| &named.key);
    parts.headers = forward::forwarded(&header.headers, &ask.pool.server, own, ask.switches_protocol);
    if ask.is_json && !content_type::is_json_request(text(parts.headers.get(header::CONTENT_TYPE))) {
        // It was sent as text, to avoid a preflight or out of habit, and endpoints go by the label.
        parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    // Empty answers and usage can be read in plain text only.
    parts.headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    if let Some(id) = id {
        parts.headers.insert(REQUEST_ID, id.clone());
    }
    parts.into()
}

fn text(value: Option<&HeaderValue>) -> Option<&str> {
    value.and_then(|value| value.to_str().ok())
}

/// The request's header as the endpoint gets it.
fn rewrite_header(request: &mut RequestHeader, context: &Context) -> Result<()> {
    let Some(ask) = &context.ask else { return Error::err_in(ErrorType::InternalError) };
    let state = context.exchange.state();
    let Some(attempt) = &state.attempt else { return Error::err_in(ErrorType::InternalError) };
    let endpoint = &attempt.asked.endpoint;
    let taken = mem::replace(request, RequestHeader::build_no_case(Method::GET, b"/", Some(0))?);
    // The session of a request that switches protocols is not wrapped, so nothing has been left out yet.
    let whole = if ask.switches_protocol { forwarded(&taken, ask, context.arrival.own.id.as_ref()) } else { taken };
    let parts: Parts = whole.into();
    let in_query = ask.body_model.as_ref().is_some_and(|body| body.place == ModelPlace::Query);
    let other = other_model(ask, attempt).filter(|_| in_query);
    let target = other
        .map_or(Cow::Borrowed(ask.target.as_str()), |other| rewrite::with_model(ask.target.as_str(), other).into());
    let credential = endpoint.credential(ask.kind, attempt.asked.lane);
    let credential = credential.ok_or_else(|| Error::new_in(ErrorType::InternalError))?;
    let mut parts = parts;
    if let Some(trace) = &context.arrival.trace {
        parts.headers.insert(TRACEPARENT, trace.header(attempt.span));
        if trace.parent.is_none() {
            parts.headers.remove(TRACESTATE);
        }
    }
    let upstream = endpoint.upstream_of(ask.kind);
    *request = upstream.dress(parts, (&endpoint.config, credential), &target, ask.switches_protocol)?;
    Ok(())
}

/// The name that is written in place of the client's, if another one is.
pub(super) fn other_model<'a>(ask: &'a Ask, attempt: &'a Attempt) -> Option<&'a str> {
    let own = ask.model.as_deref().filter(|_| ask.body_model.as_ref().is_some_and(|body| body.is_other));
    attempt.model.mapped.as_deref().or(own)
}

/// The body as the endpoint gets it: in one piece if it is small, else in the pieces that it came in, without a copy.
fn rewrite_body(context: &Context) -> Vec<Bytes> {
    let Some(ask) = &context.ask else { return Vec::new() };
    let mut state = context.exchange.state();
    let Some(attempt) = &mut state.attempt else { return Vec::new() };
    let asks = attempt.inject_usage(ask);
    let place = ask.body_model.as_ref().map(|body| &body.place).filter(|place| **place != ModelPlace::Query);
    let model = place.and_then(|place| Some(rewrite::model_edit(place, other_model(ask, attempt)?)));
    let usage = ask.usage_edit.as_ref().filter(|_| asks);
    let usage = usage.map(|usage| Edit { range: usage.range.clone(), with: usage.with.into() });
    let left_out = ask.left_out(context.tries.tried.last());
    if !left_out.is_empty() {
        let cuts = left_out.iter().map(|range| Edit { range: range.clone(), with: "".into() });
        let mut edits: Vec<Edit<'_>> = cuts.chain(model).chain(usage).collect();
        return rewrite::spliced(&ask.body, &mut edits);
    }
    match (model, usage) {
        (Some(model), Some(usage)) => rewrite::spliced(&ask.body, &mut [model, usage]),
        (Some(edit), None) | (None, Some(edit)) => rewrite::spliced(&ask.body, &mut [edit]),
        (None, None) => rewrite::spliced(&ask.body, &mut []),
    }
}

/// Sets the request's `Content-Length`, where it has a body or its method usually does.
fn set_length(request: &mut RequestHeader, method: &Method, bytes: usize) -> Result<()> {
    let is_usually_bare = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::DELETE);
    if bytes > 0 || !is_usually_bare {
        request.insert_header(header::CONTENT_LENGTH, bytes)?;
    }
    Ok(())
}

/// Removes the headers of an endpoint's answer that are not for clients, and adds those that every answer carries.
fn rewrite_answer(header: &mut ResponseHeader, context: &Context) -> Result<()> {
    let own_words = header.get_reason_phrase().filter(|words| Some(*words) != header.status.canonical_reason());
    let own_words = own_words.map(ToOwned::to_owned);
    // Names lose their case, which carries no meaning, and changes are much cheaper.
    let mut parts: response::Parts = mem::replace(header, ResponseHeader::build_no_case(200_u16, Some(0))?).into();
    let leaving = leaving(&parts, context);
    for name in &leaving {
        parts.headers.remove(name);
    }
    add_our_headers(&mut parts.headers, context);
    *header = parts.into();
    header.set_reason_phrase(own_words.as_deref())
}

fn leaving(answer: &response::Parts, context: &Context) -> Vec<HeaderName> {
    let state = context.exchange.state();
    let secrets = state.attempt.as_ref().and_then(|attempt| attempt.asked.lane()).map(|lane| &lane.secrets);
    let quotes_key = |value: &HeaderValue| secrets.is_some_and(|secrets| secrets.are_in(value.as_bytes()));
    let switches_protocol = answer.status == StatusCode::SWITCHING_PROTOCOLS;
    let is_hop_by_hop = forward::hop_by_hop(&answer.headers);
    let leaves = |name: &HeaderName, value: &HeaderValue| {
        forward::is_kept_from_client(name)
            || name.as_str().starts_with(rate_headers::PREFIX)
            || quotes_key(value)
            || !switches_protocol && is_hop_by_hop(name)
    };
    answer.headers.iter().filter(|(name, value)| leaves(name, value)).map(|(name, _)| name.clone()).collect()
}

/// Adds the headers of every answer, ours and the endpoints'.
fn add_our_headers(headers: &mut HeaderMap, context: &Context) {
    let arrival = &context.arrival;
    arrival.own.add_to(headers);
    if arrival.endpoint_headers
        && let Some(attempt) = &context.exchange.state().attempt
    {
        headers.insert(ENDPOINT, attempt.asked.endpoint.id_header.clone());
        if let Some(affinity) = attempt.affinity {
            headers.insert(AFFINITY, affinity.header());
        }
    }
    if let Some(Tried { fallback: Some(model), .. }) = context.tries.tried.last()
        && let Ok(model) = HeaderValue::from_str(model)
    {
        headers.insert(MODEL, model);
    }
    add_attempts(headers, context);
}

fn add_attempts(headers: &mut HeaderMap, context: &Context) {
    let attempts = context.tries.tried.len();
    if context.arrival.endpoint_headers && attempts > 0 {
        headers.insert(ATTEMPTS, if attempts == 1 { HeaderValue::from_static("1") } else { attempts.into() });
    }
}

/// Sends an answer of our own.
pub(super) async fn send(session: &mut Session, context: &Context, answer: Answer) -> Result<()> {
    if context.web_socket.as_ref().is_some_and(|socket| socket.is_accepted()) {
        // Boxed, since it is rare and would make every answer's future larger.
        return Box::pin(web_socket::refuse(session, context)).await;
    }
    let mut parts = Response::new(()).into_parts().0;
    parts.status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    for (name, value) in answer.headers {
        parts.headers.insert(name, value);
    }
    if answer.status != 204 {
        parts.headers.insert(header::CONTENT_LENGTH, answer.body.len().into());
    }
    add_our_headers(&mut parts.headers, context);
    let no_body = session.req_header().method == Method::HEAD || answer.body.is_empty();
    write(session, Box::new(parts.into()), answer.body, no_body).await
}

/// Shows the client an endpoint's own error that was kept.
pub(super) async fn send_kept(
    session: &mut Session,
    context: &Context,
    header: Box<ResponseHeader>,
    body: Bytes,
) -> Result<()> {
    let mut parts: response::Parts = (*header).into();
    add_attempts(&mut parts.headers, context);
    let header = Box::new(parts.into());
    let no_body = body.is_empty();
    write(session, header, body, no_body).await
}

async fn write(session: &mut Session, header: Box<ResponseHeader>, body: Bytes, no_body: bool) -> Result<()> {
    session.write_response_header(header, no_body).await?;
    if no_body { Ok(()) } else { session.write_response_body(Some(body), true).await }
}

/// Adds an error event to a stream that broke. Without `[DONE]`, and with the connection closed after it,
/// no client takes it for a whole one. Readers of Anthropic's messages go by the event's name.
pub(super) async fn send_error_event(session: &mut Session, error: &str, shape: ErrorShape, between_events: bool) {
    let ends_event = if between_events { "" } else { "\n\n" };
    let event = match shape {
        ErrorShape::OpenAi => format!("data: {error}"),
        ErrorShape::Anthropic => format!("event: error\ndata: {error}"),
    };
    let event = Bytes::from(format!("{ends_event}{event}\n\n"));
    let is_h2 = session.downstream_session.is_http2();
    let sent = session.downstream_session.response_duplex_vec(vec![HttpTask::Body(Some(event), false)]).await;
    if sent.is_ok() && is_h2 {
        tokio::time::sleep(H2_FLUSH).await;
    }
}
