//! What goes out: the request as the endpoint gets it, and answers as the client gets them.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::HttpTask;
use pingora::{Error, ErrorType, Result};
use pingora_proxy::Session;

use crate::admin::Answer;
use crate::context::Context;
use crate::error::Fault;
use crate::rates;
use crate::request::Call;
use crate::rewrite::{self, Edit};

/// The header that carries a request's id, both ways.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const ENDPOINT: HeaderName = HeaderName::from_static("x-api-together-endpoint");
const ATTEMPTS: HeaderName = HeaderName::from_static("x-api-together-attempts");
/// On HTTP/2 a stream that is dropped takes its last unsent bytes with it; this is long enough for them to leave.
const H2_FLUSH: Duration = Duration::from_millis(10);

/// The request's header as the endpoint gets it.
pub(super) fn rewrite_header(session: &Session, request: &mut RequestHeader, context: &Context) -> Result<()> {
    let Some(ask) = &context.ask else { return Error::err_in(ErrorType::InternalError) };
    let state = context.exchange.state();
    let Some(attempt) = &state.attempt else { return Error::err_in(ErrorType::InternalError) };
    let endpoint = &attempt.endpoint;
    remove_what_stays_behind(session, request, ask.switches_protocol);
    let target = session.req_header().uri.path_and_query().map_or("/", |target| target.as_str());
    let path = rewrite::path_and_query(&endpoint.config.base_url.path, target);
    request.set_uri(path.parse().map_err(|_| Error::new_in(ErrorType::InvalidHTTPHeader))?);
    request.insert_header(header::HOST, &endpoint.upstream.authority)?;
    request.insert_header(header::AUTHORIZATION, &endpoint.upstream.authorization)?;
    if let Some(id) = &context.arrival.id {
        request.insert_header(REQUEST_ID, id)?;
    }
    if !ask.switches_protocol {
        // Empty answers and usage can be read in plain text only.
        request.insert_header(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"))?;
    }
    for (name, value) in &endpoint.config.headers {
        request.insert_header(name, value)?;
    }
    Ok(())
}

fn remove_what_stays_behind(session: &Session, request: &mut RequestHeader, switches_protocol: bool) {
    let named = rewrite::named_in_connection(&session.req_header().headers);
    let keeps = |name: &HeaderName| switches_protocol && matches!(*name, header::CONNECTION | header::UPGRADE);
    let leaving: Vec<HeaderName> = request
        .headers
        .keys()
        .filter(|name| (rewrite::stays_behind(name) || named.contains(name)) && !keeps(name))
        .cloned()
        .collect();
    for name in &leaving {
        request.remove_header(name);
    }
}

/// The body as the endpoint gets it: one copy if the model's name changes or the usage is asked for, none otherwise.
pub(super) fn rewrite_body(context: &Context) -> Bytes {
    let Some(ask) = &context.ask else { return Bytes::new() };
    let mut state = context.exchange.state();
    let Some(attempt) = &mut state.attempt else { return ask.body.clone() };
    let asks = attempt.asks_usage(ask);
    let model = attempt.model.as_ref().zip(ask.model_range.as_ref());
    let model = model.map(|(model, range)| rewrite::model_edit(range, model));
    let usage = ask.ask_usage.as_ref().filter(|_| asks);
    let usage = usage.map(|usage| Edit { range: usage.range.clone(), with: usage.with.into() });
    match (model, usage) {
        (Some(model), Some(usage)) => rewrite::spliced(&ask.body, &mut [model, usage]),
        (Some(edit), None) | (None, Some(edit)) => rewrite::spliced(&ask.body, &mut [edit]),
        (None, None) => ask.body.clone(),
    }
}

/// Says how long the request's body is, where it has one or its method usually does.
pub(super) fn set_length(request: &mut RequestHeader, method: &Method, body: &Bytes) -> Result<()> {
    let is_usually_bare = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::DELETE);
    if !body.is_empty() || !is_usually_bare {
        request.insert_header(header::CONTENT_LENGTH, body.len())?;
    }
    Ok(())
}

/// Takes out of an endpoint's answer what is not for our clients, and puts in what every answer carries.
pub(super) fn rewrite_answer(header: &mut ResponseHeader, context: &Context) -> Result<()> {
    let secrets = context.exchange.state().attempt.as_ref().map(|attempt| attempt.endpoint.secrets.clone());
    let quotes_key = |value: &HeaderValue| secrets.as_ref().is_some_and(|secrets| secrets.are_in(value.as_bytes()));
    let switches_protocol = header.status == StatusCode::SWITCHING_PROTOCOLS;
    let is_hop_by_hop = rewrite::hop_by_hop(&header.headers);
    let leaving: Vec<HeaderName> = header
        .headers
        .iter()
        .filter(|(name, value)| {
            rewrite::is_kept_from_client(name)
                || name.as_str().starts_with(rates::PREFIX)
                || quotes_key(value)
                || !switches_protocol && is_hop_by_hop(name)
        })
        .map(|(name, _)| name.clone())
        .collect();
    for name in &leaving {
        header.remove_header(name);
    }
    add_our_headers(header, context)
}

/// What every answer carries, ours and the endpoints'.
fn add_our_headers(header: &mut ResponseHeader, context: &Context) -> Result<()> {
    let arrival = &context.arrival;
    if let Some(id) = &arrival.id {
        header.insert_header(REQUEST_ID, id)?;
    }
    if let Some(origin) = &arrival.origin {
        header.insert_header(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin)?;
        header.insert_header(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("*"))?;
        if origin != "*" {
            header.append_header(header::VARY, "origin")?;
        }
    }
    for (name, value) in arrival.rates.headers() {
        header.insert_header(name, value)?;
    }
    if arrival.endpoint_headers
        && let Some(attempt) = &context.exchange.state().attempt
    {
        let id = attempt.endpoint.config.id.as_ref();
        // An id outside ASCII cannot stand in a header as it is.
        let id = if id.is_ascii() { id.to_owned() } else { id.escape_unicode().to_string() };
        header.insert_header(ENDPOINT, id)?;
    }
    add_attempts(header, context)
}

fn add_attempts(header: &mut ResponseHeader, context: &Context) -> Result<()> {
    let attempts = context.tries.tried.len();
    if context.arrival.endpoint_headers && attempts > 0 {
        header.insert_header(ATTEMPTS, attempts)?;
    }
    Ok(())
}

/// Sends an answer of our own.
pub(super) async fn send(session: &mut Session, context: &Context, answer: Answer) -> Result<()> {
    let mut header = ResponseHeader::build(answer.status, Some(answer.headers.len() + 6))?;
    for (name, value) in answer.headers {
        header.insert_header(name, value)?;
    }
    if answer.status != 204 {
        header.insert_header(header::CONTENT_LENGTH, answer.body.len())?;
    }
    add_our_headers(&mut header, context)?;
    let no_body = session.req_header().method == Method::HEAD || answer.body.is_empty();
    write(session, Box::new(header), answer.body, no_body).await
}

/// Shows the client an endpoint's own error that was kept.
pub(super) async fn send_kept(
    session: &mut Session,
    context: &Context,
    mut header: Box<ResponseHeader>,
    body: Bytes,
) -> Result<()> {
    add_attempts(&mut header, context)?;
    let no_body = body.is_empty();
    write(session, header, body, no_body).await
}

async fn write(session: &mut Session, header: Box<ResponseHeader>, body: Bytes, no_body: bool) -> Result<()> {
    session.write_response_header(header, no_body).await?;
    if no_body { Ok(()) } else { session.write_response_body(Some(body), true).await }
}

/// Tells the reader of a stream that broke that it is not whole. Without `[DONE]`, and with the connection closed after it,
/// no client takes it for a whole one. Readers of Anthropic's messages go by the event's name.
pub(super) async fn send_error_event(session: &mut Session, fault: &Fault, call: Option<Call>, between_events: bool) {
    let ends_event = if between_events { "" } else { "\n\n" };
    let error = fault.json();
    let event = match (call, error.strip_prefix('{')) {
        (Some(Call::Messages), Some(members)) => format!("event: error\ndata: {{\"type\":\"error\",{members}"),
        _ => format!("data: {error}"),
    };
    let event = Bytes::from(format!("{ends_event}{event}\n\n"));
    let is_h2 = session.downstream_session.is_http2();
    let sent = session.downstream_session.response_duplex_vec(vec![HttpTask::Body(Some(event), false)]).await;
    if sent.is_ok() && is_h2 {
        tokio::time::sleep(H2_FLUSH).await;
    }
}
