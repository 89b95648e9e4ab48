//! The only `ProxyHttp` implementation. Its hooks know the order of the stages and nothing else.
//!
//! ```text
//! request_filter            arrival → auth → own answers → body → route → first pick       (intake)
//! ┌ upstream_peer           pick → attempt → address                                        (attempts)
//! │ connected_to_upstream   the header waits for the body                                   (cork)
//! │ upstream_request_filter path, headers, key, body                                       (outgoing)
//! │                         the wrapped session hands out the body; the endpoint answers;
//! │                         the wrapped session holds or commits                            (replay)
//! │ response_filter         headers for the client                                         (outgoing)
//! └ error_while_proxy, fail_to_connect      outcome → next attempt, or                     (attempts)
//! fail_to_proxy             the last error, for the client                                 (outgoing)
//! logging                   record
//! ```

pub mod access_log;
mod attempts;
mod context;
mod intake;
mod outgoing;

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use http::{StatusCode, Version, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::protocols::{ALPN, Digest};
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorSource, ErrorType, Result};
use pingora_proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};

use crate::admin::Answer;
use crate::billing::{self, Measured};
use crate::exchange::scheduling::{keep_heartbeat, step_aside};
use crate::exchange::session::{Plan, Wrapped};
use crate::exchange::{Ask, Kept};
use crate::fault::Fault;
use crate::process::Process;
use crate::proxy::access_log::Record;
use crate::proxy::context::Context;
use crate::request::auth::Auth;
use crate::request::content_type;
use crate::response::decode::Encoding;
use crate::response::redact::Blotter;
use crate::routing::admission::Choice;
use crate::routing::health;
use crate::routing::retry::Outcome;
use crate::telemetry::logger::{self, REQUEST_TARGET};
use crate::telemetry::metrics::{self, Ended, metrics};
use crate::upstream::cork::Cork;
use attempts::{Stale, address, attempt_over, begin_anew, may_begin_anew, next_attempt};
use intake::{Next, Stop};

/// The proxy.
#[derive(Debug)]
pub struct Gateway {
    /// Who may call.
    pub auth: Auth,
    /// What our own answers tell of.
    pub process: Process,
}

#[async_trait]
impl ProxyHttp for Gateway {
    /// Boxed, since Pingora moves it from future to future.
    type CTX = Box<Context>;

    fn new_ctx(&self) -> Box<Context> {
        keep_heartbeat();
        Box::new(Context::new(&self.process.open))
    }

    // Compression is the endpoint's matter; a module of ours would see answers that are dropped.
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    async fn request_filter(&self, session: &mut Session, context: &mut Self::CTX) -> Result<bool> {
        if self.process.draining.is_on() {
            session.set_keepalive(None);
        }
        let own = match intake::take_in(self, session, context).await {
            Ok(Next::Proxy(ask, choice)) => {
                begin(session, context, ask, choice);
                return Ok(false);
            }
            Ok(Next::Answer(answer)) => Ok(answer),
            Err(stop) => Err(stop),
        };
        // Boxed, since it would make every request's future larger.
        Box::pin(answer(session, context, own)).await.map(|()| true)
    }

    async fn upstream_peer(&self, session: &mut Session, context: &mut Self::CTX) -> Result<Box<HttpPeer>> {
        // The attempt under way, at its next address or on a fresh connection?
        let again = std::mem::take(&mut context.tries.again);
        let begun = match if again { Box::pin(begin_anew(context)).await } else { Ok(false) } {
            Ok(false) => next_attempt(context, &session.req_header().method).await,
            Ok(true) => Ok(()),
            Err(fault) => Err(fault),
        };
        if let Err(fault) = begun {
            // An endpoint's own error says more than that nobody else is left.
            context.fault.get_or_insert(fault);
            return Error::err_in(ErrorType::InternalError);
        }
        let Some((endpoint, address)) = address(context).await else {
            let mut error = Error::new_up(ErrorType::ConnectError);
            error.set_retry(attempt_over(context, &Outcome::ConnectFailed));
            return Err(error);
        };
        let switches_protocol = context.ask.as_ref().is_some_and(|ask| ask.switches_protocol);
        let first_byte = context.exchange.state().attempt.as_ref().map(|attempt| attempt.first_byte_timeout);
        let fresh = context.tries.stale > 0;
        Ok(endpoint.upstream.peer(address, switches_protocol, fresh, first_byte.unwrap_or(Duration::MAX)))
    }

    async fn connected_to_upstream(
        &self,
        session: &mut Session,
        _reused: bool,
        peer: &HttpPeer,
        socket: RawFd,
        _digest: Option<&Digest>,
        context: &mut Self::CTX,
    ) -> Result<()> {
        // An HTTP/2 connection is shared, and one in TLS may be one.
        if !peer.is_tls() && peer.options.alpn == ALPN::H1 && session.downstream_session.is_custom() {
            let has_body = context.ask.as_ref().is_some_and(|ask| !ask.body.is_empty());
            context.exchange.state().cork = Cork::put_in(socket, has_body);
        }
        Ok(())
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        context: &mut Self::CTX,
    ) -> Result<()> {
        let begun = Instant::now();
        outgoing::rewrite_header(session, request, context)?;
        if !context.ask.as_ref().is_some_and(|ask| ask.switches_protocol) {
            let body = outgoing::rewrite_body(context);
            outgoing::set_length(request, &session.req_header().method, body.iter().map(Bytes::len).sum())?;
            context.exchange.state().body = body.into();
        }
        let Some(clock) = context.ask.as_ref().map(|ask| ask.pool.clock()) else {
            return Error::err_in(ErrorType::InternalError);
        };
        // Of the first attempt only; what follows is waited for others.
        if let (Some(own), Some(metrics)) = (context.tries.own.take(), metrics()) {
            metrics.own(own + clock.now.saturating_duration_since(begun));
        }
        if attempts::send(context, &clock).await {
            return Ok(());
        }
        context.exchange.state().ended = Some(Outcome::LimitReached);
        Error::err_in(ErrorType::Custom("the limit was reached meanwhile"))
    }

    async fn upstream_response_filter(
        &self,
        _session: &mut Session,
        header: &mut ResponseHeader,
        context: &mut Self::CTX,
    ) -> Result<()> {
        // Before Pingora frames the answer for the client.
        if let Some(attempt) = &mut context.exchange.state().attempt {
            attempt.ends_with_connection = header.version <= Version::HTTP_11
                && !header.headers.contains_key(header::CONTENT_LENGTH)
                && !header.headers.contains_key(header::TRANSFER_ENCODING);
            attempt.encoding = Encoding::of(&header.headers);
            let is_error = header.status.as_u16() >= 400;
            if is_error && attempt.encoding.is_some_and(|encoding| encoding != Encoding::Unknown) {
                // A key quoted in it can be blotted out in plain text only.
                header.remove_header(&header::CONTENT_ENCODING);
                header.remove_header(&header::CONTENT_LENGTH);
            }
            if attempt.terms.asks_usage && is_event_stream(header) {
                // What only we asked for is taken out, so it will not be as long.
                header.remove_header(&header::CONTENT_LENGTH);
            }
        }
        Ok(())
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        header: &mut ResponseHeader,
        context: &mut Self::CTX,
    ) -> Result<()> {
        if !is_final(header) {
            return Ok(());
        }
        let is_wrapped = session.downstream_session.is_custom();
        if let (Some(attempt), false) = (&mut context.exchange.state().attempt, is_wrapped) {
            // A request that switches protocols is not held, so this is its answer.
            let rest = health::rest_asked(&header.headers, SystemTime::now());
            attempt.answer = Some(Outcome::Status { status: header.status.as_u16(), rest });
            if let Some(ask) = &context.ask {
                attempt.begins_to_answer(&ask.pool, Instant::now());
            }
        }
        outgoing::rewrite_answer(header, context)
    }

    fn response_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        end: bool,
        context: &mut Self::CTX,
    ) -> Result<Option<Duration>> {
        // A refusal to switch protocols passes here and nowhere else.
        if !session.was_upgraded()
            && !session.downstream_session.is_custom()
            && let Some(attempt) = &context.exchange.state().attempt
        {
            let blotter = context.refusal.get_or_insert_with(|| Blotter::new(attempt.endpoint.secrets.clone()));
            let piece = blotter.piece(body.as_deref().unwrap_or_default(), end);
            // An empty piece would be taken for the last chunk.
            *body = Some(piece).filter(|piece| !piece.is_empty());
        }
        // Once committed there is no other attempt, and nothing more to replay.
        if let Some(ask) = context.ask.as_mut().filter(|ask| !ask.body.is_empty())
            && context.exchange.state().committed.is_some()
        {
            ask.keep_for_estimate();
        }
        Ok(None)
    }

    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        mut error: Box<Error>,
        context: &mut Self::CTX,
        reused: bool,
    ) -> Box<Error> {
        let pooled = Stale::of(&error, reused);
        error.set_retry(false);
        let mut state = context.exchange.state();
        let ended = state.ended.take();
        let from_client = *error.esource() == ErrorSource::Downstream && ended.is_none();
        if state.committed.is_some() || session.response_written().is_some_and(is_final) {
            let is_complete = state.committed.is_some_and(|committed| committed.complete.is_some());
            match &mut state.attempt {
                Some(attempt) if is_complete => attempt.finish(),
                Some(attempt) if !from_client => {
                    attempt.settle(&ended.unwrap_or(Outcome::Broken));
                    context.fault = Some(Fault::StreamBroken);
                }
                _ => {}
            }
            return error;
        }
        let header_seen = state.attempt.as_ref().is_some_and(|attempt| attempt.answer.is_some());
        drop(state);
        log::debug!("request {}: {error}", context.arrival.id_text());
        if ended.is_none() && !from_client && !header_seen && may_begin_anew(context, pooled) {
            error.set_retry(true);
            return error;
        }
        let ended = ended.or_else(|| context.exchange.state().ended.take());
        if ended == Some(Outcome::UsageRefused) {
            attempts::begin_without_usage(context);
            error.set_retry(context.tries.again);
            return error;
        }
        let outcome = ended.unwrap_or(match error.esource() {
            // Pingora refuses some requests only when it makes the endpoint's out of them.
            ErrorSource::Downstream if *error.etype() == ErrorType::InvalidHTTPHeader => Outcome::Ours,
            ErrorSource::Downstream => Outcome::ClientGone,
            ErrorSource::Internal => Outcome::Ours,
            ErrorSource::Upstream | ErrorSource::Unset => Outcome::Broken,
        });
        error.set_retry(attempt_over(context, &outcome));
        if outcome == Outcome::Ours && from_client {
            let problem = "A header of the request is not what HTTP allows; look at its Connection header.".into();
            context.fault = Some(Fault::RequestInvalid { problem });
        }
        error
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        peer: &HttpPeer,
        context: &mut Self::CTX,
        mut error: Box<Error>,
    ) -> Box<Error> {
        let Some(endpoint) = context.exchange.state().attempt.as_ref().map(|attempt| attempt.endpoint.clone()) else {
            return error;
        };
        context.tries.addresses_failed += 1;
        context.tries.again = context.tries.addresses_failed < endpoint.upstream.addresses_known();
        let (id, address) = (&endpoint.config.id, &peer._address);
        log::warn!("endpoint {id}: no connection to {} ({address}): {error}", endpoint.upstream.name());
        let again = context.tries.again || attempt_over(context, &Outcome::ConnectFailed);
        error.set_retry(again);
        error
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, context: &mut Self::CTX) -> FailToProxy {
        context.wrapped.unwrap_session(session);
        let (committed, kept) = {
            let mut state = context.exchange.state();
            (state.committed, state.kept.take())
        };
        let closed = |error_code| FailToProxy { error_code, can_reuse_downstream: false };
        if committed.is_some() || session.response_written().is_some_and(is_final) {
            if let (Some(fault), Some(committed)) = (&context.fault, committed)
                && committed.event_stream
            {
                let call = context.ask.as_ref().map(|ask| ask.call);
                outgoing::send_error_event(session, fault, call, committed.between_events).await;
            }
            return closed(0);
        }
        if *error.esource() == ErrorSource::Downstream && context.fault.is_none() {
            return closed(0);
        }
        let fault = context.fault.get_or_insert(Fault::Internal).clone();
        if fault == Fault::Internal {
            log::error!("request {}: {error}", context.arrival.id_text());
        }
        // Pingora closes the connection after a failure, whatever became of it; a client that is not told so may lose its
        // next request to it.
        session.set_keepalive(None);
        let sent = match kept {
            Some(Kept { header, body: Some(body) }) => {
                let status = header.status.as_u16();
                outgoing::send_kept(session, context, header, body).await.map(|()| status)
            }
            _ => outgoing::send(session, context, Answer::from(&fault)).await.map(|()| fault.status()),
        };
        sent.map_or(closed(0), closed)
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, context: &mut Self::CTX) {
        // The client has its answer; those of others come before the bookkeeping. Until that is done the request counts as open, so
        // a process that ends waits for it.
        step_aside().await;
        context.wrapped.unwrap_session(session);
        let complete = context.exchange.state().committed.and_then(|committed| committed.complete);
        let mut measured = Measured::default();
        if let Some(attempt) = &mut context.exchange.state().attempt {
            if error.is_none() {
                attempt.finish();
            }
            if let Some(ask) = &mut context.ask {
                ask.keep_for_estimate();
                let ended = complete.unwrap_or_else(Instant::now);
                let (id, times) = (context.arrival.id_text(), (context.arrival.at, ended));
                measured = billing::bill(attempt, ask, id, times, &self.process.estimator);
            }
        }
        let gone = context.fault.is_none()
            && complete.is_none()
            && error.is_some_and(|error| *error.esource() == ErrorSource::Downstream);
        let level = if gone { log::Level::Debug } else { log::Level::Info };
        let state = context.exchange.state();
        let attempt = state.attempt.as_ref();
        let endpoint = attempt.map(|attempt| &attempt.endpoint).or(context.tries.last.as_ref());
        let ask = context.ask.as_ref();
        let record = {
            let header = session.req_header();
            Record {
                id: context.arrival.id_text(),
                caller: context.arrival.address,
                method: header.method.as_str(),
                path: header.uri.path(),
                model: ask.and_then(|ask| ask.model.as_deref()).or(context.fault.as_ref().and_then(Fault::model)),
                endpoint_model: attempt.and_then(|attempt| attempt.model.as_deref()),
                endpoint: endpoint.map(|endpoint| endpoint.config.id.as_ref()),
                attempts: context.tries.tried.len(),
                status: session.response_written().filter(|header| is_final(header)).map(|h| h.status.as_u16()),
                bytes: session.body_bytes_sent(),
                first_byte: state.committed.map(|committed| committed.at.saturating_duration_since(context.arrival.at)),
                total: context.arrival.at.elapsed(),
                measured,
                fault: if gone { Some("client_gone") } else { context.fault.as_ref().map(Fault::label) },
            }
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
        if !log::log_enabled!(target: REQUEST_TARGET, level) {
            return;
        }
        if logger::is_json() {
            log::log!(target: REQUEST_TARGET, level, "{}", record.json_members());
        } else {
            log::log!(target: REQUEST_TARGET, level, "{}", record.text());
        }
    }

    // The record and the notes of each attempt say all that Pingora would, without its request headers.
    fn suppress_error_log(&self, _session: &Session, _context: &Self::CTX, _error: &Error) -> bool {
        true
    }

    fn suppress_proxy_warn_log(&self, _s: &Session, _c: &Self::CTX, _e: &Error, _w: ProxyWarnLogContext) -> bool {
        true
    }
}

fn is_event_stream(header: &ResponseHeader) -> bool {
    content_type::is_event_stream(header.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()))
}

/// Answers a request that goes to no endpoint.
async fn answer(session: &mut Session, context: &mut Context, own: Result<Answer, Stop>) -> Result<()> {
    let answer = match own {
        Ok(answer) => answer,
        Err(Stop::Fault(fault)) => Answer::from(&*context.fault.insert(fault)),
        Err(Stop::Unframed(fault)) => {
            session.set_keepalive(None);
            let answer = Answer::from(&*context.fault.insert(fault));
            return outgoing::send(session, context, answer).await;
        }
        Err(Stop::Gone(error)) => return Err(error),
    };
    intake::drain(session).await;
    outgoing::send(session, context, answer).await
}

/// Sets a request on its way to an endpoint.
fn begin(session: &mut Session, context: &mut Context, ask: Box<Ask>, choice: Choice) {
    context.tries.next = Some(choice);
    if !ask.switches_protocol {
        let plan = Plan {
            has_body: !ask.body.is_empty(),
            pool: Arc::clone(&ask.pool),
            budget_ends: context.arrival.at + ask.pool.server.retry.budget,
            http_10: session.req_header().version <= Version::HTTP_10,
            header: outgoing::forwarded(session.req_header(), context.arrival.id.as_ref()),
        };
        context.wrapped = Wrapped::wrap(session, plan, &context.exchange);
    }
    context.ask = Some(ask);
}

/// Whether a response header is the answer: all but 1xx, and of those the one that switches protocols.
fn is_final(header: &ResponseHeader) -> bool {
    !header.status.is_informational() || header.status == StatusCode::SWITCHING_PROTOCOLS
}
