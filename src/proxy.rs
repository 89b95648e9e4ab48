//! The only `ProxyHttp` implementation. Its hooks know the order of the stages and nothing else.
//!
//! ```text
//! request_filter            arrival → auth → own answers → body → route → first pick
//! ┌ upstream_peer           pick → attempt → address
//! │ upstream_request_filter path, headers, key
//! │ request_body_filter     model
//! │ (endpoint answers; the wrapped session holds or commits)
//! │ response_filter         headers for the client
//! └ error_while_proxy, fail_to_connect      outcome → next attempt, or
//! fail_to_proxy             the last error, for the client
//! logging                   record
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Version, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::HttpTask;
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorSource, ErrorType, Result};
use pingora_proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};

use crate::admin::{Answer, Resource};
use crate::auth::{self, Auth};
use crate::balance::{self, Choice, Pick};
use crate::config::Cors;
use crate::context::{Ask, Attempt, Context, Kept, OpenRequests};
use crate::error::{Fault, excerpt};
use crate::pool::Pool;
use crate::record::Record;
use crate::replay::{Plan, Wrapped};
use crate::request::{self, Call, Collector};
use crate::respond::Terms;
use crate::retry::{self, Outcome};
use crate::rewrite;
use crate::server::Draining;

/// How often an attempt begins anew because its pooled connection turns out to be closed.
const STALE_MAX: u32 = 2;
/// A body that nobody wants is read up to this size and time before an early answer, since a client that is still sending
/// may otherwise never see the answer.
const DRAIN_BYTES_MAX: usize = 1024 * 1024;
const DRAIN_TIME_MAX: Duration = Duration::from_secs(2);
/// On HTTP/2 a stream that is dropped takes its last unsent bytes with it; this is long enough for them to leave.
const H2_FLUSH: Duration = Duration::from_millis(10);

/// The proxy.
#[derive(Debug)]
pub struct Gateway {
    pool: Arc<ArcSwap<Pool>>,
    auth: Auth,
    open: OpenRequests,
    draining: Draining,
}

/// What becomes of a request once its header and body are in.
enum Next {
    /// It is answered here.
    Answer(Answer),
    /// It goes to an endpoint.
    Proxy(Box<Ask>, Option<Choice>),
}

/// Why a request stops before it goes to an endpoint.
enum Stop {
    /// The client gets told.
    Fault(Fault),
    /// The client is gone.
    Gone(Box<Error>),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl Gateway {
    /// A proxy over whatever pool is current.
    pub fn new(pool: Arc<ArcSwap<Pool>>, open: OpenRequests, draining: Draining) -> Self {
        Self { pool, auth: Auth::default(), open, draining }
    }

    async fn prepare(&self, session: &mut Session, context: &mut Context) -> Result<Next, Stop> {
        let pool = self.pool.load_full();
        arrive(session, context, &pool);
        let header = session.req_header();
        let path = header.uri.path();
        if is_preflight(header) {
            let requested = header.headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS);
            return Ok(Next::Answer(Answer::preflight(requested)));
        }
        let resource = Resource::of(path, &header.method);
        if resource != Some(Resource::Health) {
            self.auth.check(&pool.server, &header.headers, context.arrival.address)?;
        }
        if let Some(resource) = resource {
            return Ok(Next::Answer(resource.answer(&header.method, &pool, &self.open)?));
        }
        check_target(header)?;
        let mut ask = ask(session, pool).await?;
        let choice = first_pick(&mut ask)?;
        Ok(Next::Proxy(Box::new(ask), choice))
    }

    /// The next attempt: which endpoint, and that it may begin at all.
    fn choose(context: &mut Context) -> Result<Choice, Fault> {
        let Some(ask) = &context.ask else { return Err(Fault::Internal) };
        if let Some(choice) = context.tries.next.take() {
            return Ok(choice);
        }
        match balance::pick(&ask.pool, &ask.candidates, &context.tries.tried, Instant::now()) {
            Pick::Take(choice) => Ok(choice),
            Pick::AllResting(wait) => Err(Fault::AllResting { wait }),
            Pick::None => Err(Fault::NoneAvailable),
        }
    }

    /// An attempt came to its end without an answer for the client. Returns whether another one follows.
    fn attempt_over(context: &mut Context, outcome: &Outcome) -> bool {
        let Some(ask) = &context.ask else { return false };
        let mut state = context.exchange.state();
        let endpoint = state.attempt.take().map(|mut attempt| {
            attempt.settle(outcome);
            Arc::clone(&attempt.endpoint)
        });
        if !matches!(outcome, Outcome::Status { .. }) {
            state.kept = None;
        }
        let retry = &ask.pool.server.retry;
        let tried = &context.tries.tried;
        let more = outcome.is_retryable(retry) && has_more(ask, tried, context.arrival.at);
        if let (Some(endpoint), false) = (endpoint, *outcome == Outcome::ClientGone) {
            let (id, endpoint) = (context.arrival.id(), &endpoint.config.id);
            let next = if more { "trying another" } else { "no other is left to try" };
            log::info!("request {id}: endpoint {endpoint} {outcome}; {next}");
        }
        context.fault = match outcome {
            Outcome::ClientGone => None,
            Outcome::TooSlow => Some(Fault::EndpointTimeout),
            Outcome::Empty => Some(Fault::EndpointEmpty),
            Outcome::Status { status, .. } => Some(Fault::EndpointError { status: *status }),
            Outcome::ConnectFailed | Outcome::Broken | Outcome::ErrorEvent => Some(Fault::EndpointUnreachable),
        };
        more
    }
}

impl crate::context::Arrival {
    fn id(&self) -> &str {
        self.id.as_ref().and_then(|id| id.to_str().ok()).unwrap_or("-")
    }
}

/// Notes who calls, and what every answer to them has to carry.
fn arrive(session: &Session, context: &mut Context, pool: &Pool) {
    let header = session.req_header();
    let peer = session.client_addr().and_then(|address| address.as_inet()).map(std::net::SocketAddr::ip);
    let arrival = &mut context.arrival;
    arrival.address = auth::client_address(&pool.server, &header.headers, peer);
    arrival.id = Some(request_id(header.headers.get("x-request-id")));
    arrival.endpoint_headers = pool.server.endpoint_headers;
    arrival.origin = allowed_origin(&pool.server.cors, header.headers.get(header::ORIGIN));
}

/// What `Access-Control-Allow-Origin` says to a page of this origin, if it may read the answer.
fn allowed_origin(cors: &Cors, origin: Option<&HeaderValue>) -> Option<HeaderValue> {
    if cors.any() {
        return Some(HeaderValue::from_static("*"));
    }
    origin.filter(|origin| origin.to_str().is_ok_and(|origin| cors.allows(origin))).cloned()
}

/// The client's own request id if it is a sane one, else a new one.
fn request_id(given: Option<&HeaderValue>) -> HeaderValue {
    const BYTES_MAX: usize = 128;
    let sane = |id: &&HeaderValue| {
        let bytes = id.as_bytes();
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(byte);
        !bytes.is_empty() && bytes.len() <= BYTES_MAX && bytes.iter().all(plain)
    };
    given.filter(sane).cloned().unwrap_or_else(|| {
        let id = format!("req_{:024x}", fastrand::u128(..) >> 32);
        HeaderValue::from_str(&id).unwrap_or_else(|_| HeaderValue::from_static("req_0"))
    })
}

/// Whether this is a browser's question before its request (Fetch standard, 3.3.2).
fn is_preflight(header: &RequestHeader) -> bool {
    header.method == Method::OPTIONS
        && header.headers.contains_key(header::ORIGIN)
        && header.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// Only calls of the API go on, and none that would step out of it.
fn check_target(header: &RequestHeader) -> Result<(), Fault> {
    let path = header.uri.path();
    if !path.starts_with("/v1/") || rewrite::steps_out(path) {
        return Err(Fault::PathUnknown { path: excerpt(path) });
    }
    // A TRACE would send our credentials back.
    let known = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS];
    if !known.contains(&header.method) {
        return Err(Fault::MethodNotAllowed { allowed: "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS" });
    }
    Ok(())
}

/// Reads the request to its end and finds what it asks for.
async fn ask(session: &mut Session, pool: Arc<Pool>) -> Result<Ask, Stop> {
    let switches_protocol = session.is_upgrade_req();
    let body = if switches_protocol { Bytes::new() } else { read_body(session, pool.server.body_bytes_max).await? };
    let header = session.req_header();
    let content_type = header.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let is_json = !body.is_empty() && request::is_json(content_type);
    let fields = if is_json { request::scan(&body)? } else { request::Fields::default() };
    let (model, model_range) = match fields.model {
        Some(field) => (Some(field.value), Some(field.range)),
        None if switches_protocol => (header.uri.query().and_then(request::query_model), None),
        None => (None, None),
    };
    let candidates = match &model {
        None => pool.router.any(),
        Some(model) => pool.router.find(model).ok_or_else(|| Fault::ModelUnknown { model: excerpt(model) })?,
    };
    if candidates.list().is_empty() {
        return Err(Fault::NoEndpoint.into());
    }
    Ok(Ask {
        candidates: Arc::clone(candidates),
        call: Call::of(header.uri.path()),
        stream: fields.stream,
        model,
        model_range,
        body,
        switches_protocol,
        pool,
    })
}

/// The first endpoint is chosen before anything is set in motion, so that a refusal is an ordinary answer.
fn first_pick(ask: &mut Ask) -> Result<Option<Choice>, Fault> {
    match balance::pick(&ask.pool, &ask.candidates, &[], Instant::now()) {
        Pick::Take(choice) => Ok(Some(choice)),
        Pick::AllResting(wait) => Err(Fault::AllResting { wait }),
        Pick::None => Err(Fault::NoneAvailable),
    }
}

/// Whether another attempt may begin and any endpoint is left for it.
fn has_more(ask: &Ask, tried: &[usize], at: Instant) -> bool {
    let attempts = u32::try_from(tried.len()).unwrap_or(u32::MAX);
    retry::may_begin(&ask.pool.server.retry, attempts, at.elapsed())
        && balance::any_left(&ask.pool, &ask.candidates, tried, Instant::now())
}

async fn read_body(session: &mut Session, bytes_max: usize) -> Result<Bytes, Stop> {
    let headers = &session.req_header().headers;
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    let mut collector = Collector::new(declared, bytes_max)?;
    if expects_continue(session) {
        session.downstream_session.write_continue_response().await.map_err(Stop::Gone)?;
    }
    let whole = async {
        while let Some(chunk) = next_chunk(session).await? {
            collector.push(chunk)?;
        }
        Ok(collector.finish())
    };
    tokio::time::timeout(request::BODY_TOTAL_TIMEOUT, whole).await.unwrap_or(Err(Fault::BodyTimeout.into()))
}

async fn next_chunk(session: &mut Session) -> Result<Option<Bytes>, Stop> {
    match tokio::time::timeout(request::BODY_IDLE_TIMEOUT, session.downstream_session.read_request_body()).await {
        Ok(chunk) => chunk.map_err(Stop::Gone),
        Err(_) => Err(Fault::BodyTimeout.into()),
    }
}

fn expects_continue(session: &Session) -> bool {
    let header = session.req_header();
    let expect = header.headers.get(header::EXPECT);
    header.version == Version::HTTP_11
        && expect.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Reads what is left of a body that nobody wants, within bounds.
async fn drain(session: &mut Session) {
    if expects_continue(session) {
        return;
    }
    let rest = async {
        let mut read = 0;
        while let Ok(Some(chunk)) = session.downstream_session.read_request_body().await {
            read += chunk.len();
            if read > DRAIN_BYTES_MAX {
                break;
            }
        }
    };
    // Out of time: the answer is sent all the same.
    tokio::time::timeout(DRAIN_TIME_MAX, rest).await.unwrap_or_default();
}

/// Sends an answer of our own.
async fn send(session: &mut Session, context: &Context, answer: Answer) -> Result<()> {
    let mut header = ResponseHeader::build(answer.status, Some(answer.headers.len() + 6))?;
    for (name, value) in answer.headers {
        header.insert_header(name, value)?;
    }
    if answer.status != 204 {
        header.insert_header(header::CONTENT_LENGTH, answer.body.len())?;
    }
    add_our_headers(&mut header, context)?;
    let no_body = session.req_header().method == Method::HEAD || answer.body.is_empty();
    session.write_response_header(Box::new(header), no_body).await?;
    if no_body { Ok(()) } else { session.write_response_body(Some(answer.body), true).await }
}

/// What every answer carries, ours and the endpoints'.
fn add_our_headers(header: &mut ResponseHeader, context: &Context) -> Result<()> {
    const EXPOSED: HeaderValue = HeaderValue::from_static("*");
    const ENDPOINT: HeaderName = HeaderName::from_static("x-api-together-endpoint");
    const ATTEMPTS: HeaderName = HeaderName::from_static("x-api-together-attempts");
    let arrival = &context.arrival;
    if let Some(id) = &arrival.id {
        header.insert_header(HeaderName::from_static("x-request-id"), id)?;
    }
    if let Some(origin) = &arrival.origin {
        header.insert_header(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin)?;
        header.insert_header(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED)?;
        if origin != "*" {
            header.append_header(header::VARY, "origin")?;
        }
    }
    let attempts = context.tries.tried.len();
    if arrival.endpoint_headers && attempts > 0 {
        let state = context.exchange.state();
        if let Some(attempt) = &state.attempt {
            header.insert_header(ENDPOINT, attempt.endpoint.config.id.as_ref()).or_else(|_| {
                // An id outside ASCII cannot stand in a header.
                header.insert_header(ENDPOINT, attempt.endpoint.config.id.escape_default().to_string())
            })?;
        }
        header.insert_header(ATTEMPTS, attempts)?;
    }
    Ok(())
}

/// The request's header as the endpoint gets it.
fn rewrite_header(session: &Session, request: &mut RequestHeader, context: &Context) -> Result<()> {
    let Some(ask) = &context.ask else { return Err(Error::new_in(ErrorType::InternalError)) };
    let state = context.exchange.state();
    let Some(attempt) = &state.attempt else { return Err(Error::new_in(ErrorType::InternalError)) };
    let endpoint = &attempt.endpoint;
    let named = rewrite::named_in_connection(&session.req_header().headers);
    let keeps = |name: &HeaderName| ask.switches_protocol && matches!(*name, header::CONNECTION | header::UPGRADE);
    let leaving: Vec<HeaderName> = request
        .headers
        .keys()
        .filter(|name| (rewrite::stays_behind(name) || named.contains(name)) && !keeps(name))
        .cloned()
        .collect();
    for name in &leaving {
        request.remove_header(name);
    }
    let target = session.req_header().uri.path_and_query().map_or("/", |target| target.as_str());
    let path = rewrite::path_and_query(&endpoint.config.base_url.path, target);
    request.set_uri(path.parse().map_err(|_| Error::new_in(ErrorType::InvalidHTTPHeader))?);
    request.insert_header(header::HOST, &endpoint.upstream.authority)?;
    request.insert_header(header::AUTHORIZATION, &endpoint.upstream.authorization)?;
    if let Some(id) = &context.arrival.id {
        request.insert_header(HeaderName::from_static("x-request-id"), id)?;
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

/// The body as the endpoint gets it: one copy if the model's name changes, none otherwise.
fn rewrite_body(context: &Context) -> Bytes {
    let Some(ask) = &context.ask else { return Bytes::new() };
    let model = context.exchange.state().attempt.as_ref().and_then(|attempt| attempt.model.clone());
    match (model, &ask.model_range) {
        (Some(model), Some(range)) => rewrite::with_model(&ask.body, range, &model),
        _ => ask.body.clone(),
    }
}

#[async_trait]
impl ProxyHttp for Gateway {
    type CTX = Context;

    fn new_ctx(&self) -> Context {
        Context::new(&self.open)
    }

    // Compression is the endpoint's matter; a module of ours would see answers that are dropped.
    fn init_downstream_modules(&self, _modules: &mut pingora::modules::http::HttpModules) {}

    async fn request_filter(&self, session: &mut Session, context: &mut Context) -> Result<bool> {
        if self.draining.is_on() {
            session.set_keepalive(None);
        }
        match self.prepare(session, context).await {
            Ok(Next::Answer(answer)) => {
                drain(session).await;
                send(session, context, answer).await?;
                Ok(true)
            }
            Ok(Next::Proxy(ask, choice)) => {
                context.tries.next = choice;
                if !ask.switches_protocol {
                    let plan = Plan {
                        has_body: !ask.body.is_empty(),
                        pool: Arc::clone(&ask.pool),
                        http_10: session.req_header().version <= Version::HTTP_10,
                    };
                    context.wrapped = Wrapped::wrap(session, plan, &context.exchange);
                }
                context.ask = Some(*ask);
                Ok(false)
            }
            Err(Stop::Fault(fault)) => {
                drain(session).await;
                let answer = Answer::from(&fault);
                context.fault = Some(fault);
                send(session, context, answer).await?;
                Ok(true)
            }
            Err(Stop::Gone(error)) => Err(error),
        }
    }

    async fn upstream_peer(&self, _session: &mut Session, context: &mut Context) -> Result<Box<HttpPeer>> {
        let refused = |context: &mut Context, fault| {
            // An endpoint's own error says more than that nobody else is left.
            context.fault.get_or_insert(fault);
            Err(Error::new_in(ErrorType::InternalError))
        };
        let choice = match Self::choose(context) {
            Ok(choice) => choice,
            Err(fault) => return refused(context, fault),
        };
        let Some(ask) = &context.ask else { return refused(context, Fault::Internal) };
        let found = ask.candidates.list().get(choice.candidate);
        let Some((candidate, endpoint)) = found.and_then(|c| Some((c, ask.pool.endpoints.get(c.endpoint)?))) else {
            return refused(context, Fault::Internal);
        };
        // What an earlier attempt came to is no fault of a request that another one answers.
        context.fault = None;
        let tries = &mut context.tries;
        if !tries.tried.contains(&candidate.endpoint) {
            tries.tried.push(candidate.endpoint);
            tries.addresses_failed = 0;
            tries.stale = 0;
        }
        tries.current = Some(Choice { trial: false, ..choice.clone() });
        let method = &_session.req_header().method;
        let terms = Terms {
            call: ask.call,
            expects_body: *method != Method::HEAD,
            more: has_more(ask, &tries.tried, context.arrival.at),
        };
        let mut attempt =
            Attempt::new(endpoint, candidate.model.clone(), terms, choice.trial, ask.pool.server.breaker.clone());
        if ask.stream {
            attempt.first_byte_timeout = endpoint.config.timeouts.first_byte_stream;
        }
        context.exchange.state().attempt = Some(attempt);
        let address = match endpoint.upstream.addresses().await {
            Ok(addresses) => addresses.get(tries.addresses_failed % addresses.len().max(1)).copied(),
            Err(error) => {
                log::warn!("endpoint {}: {} cannot be resolved: {error}", endpoint.config.id, endpoint.upstream.host());
                None
            }
        };
        let Some(address) = address else {
            let more = Self::attempt_over(context, &Outcome::ConnectFailed);
            let mut error = Error::new_up(ErrorType::ConnectError);
            error.set_retry(more);
            return Err(error);
        };
        Ok(endpoint.upstream.peer(address, ask.switches_protocol, tries.stale > 0))
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        context: &mut Context,
    ) -> Result<()> {
        rewrite_header(session, request, context)?;
        let body = rewrite_body(context);
        let may_be_bare =
            matches!(session.req_header().method, Method::GET | Method::HEAD | Method::OPTIONS | Method::DELETE);
        if !body.is_empty() || !may_be_bare {
            request.insert_header(header::CONTENT_LENGTH, body.len())?;
        }
        context.tries.body = body;
        if let Some(attempt) = &context.exchange.state().attempt {
            attempt.endpoint.live.count_attempt();
        }
        Ok(())
    }

    async fn request_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        end: bool,
        context: &mut Context,
    ) -> Result<()> {
        if context.ask.as_ref().is_some_and(|ask| ask.switches_protocol) {
            // An HTTP/2 client's empty last frame would otherwise be written as two last chunks.
            if end && body.as_ref().is_some_and(Bytes::is_empty) {
                *body = None;
            }
        } else if body.is_some() {
            *body = Some(std::mem::take(&mut context.tries.body));
        }
        Ok(())
    }

    async fn response_filter(
        &self,
        _session: &mut Session,
        header: &mut ResponseHeader,
        context: &mut Context,
    ) -> Result<()> {
        if header.status.is_informational() && header.status != http::StatusCode::SWITCHING_PROTOCOLS {
            return Ok(());
        }
        let key = {
            let state = context.exchange.state();
            state.attempt.as_ref().map(|attempt| attempt.endpoint.config.api_key.clone())
        };
        let quotes_key = |value: &HeaderValue| {
            key.as_ref()
                .is_some_and(|key| !key.expose().is_empty() && contains(value.as_bytes(), key.expose().as_bytes()))
        };
        let switches_protocol = header.status == http::StatusCode::SWITCHING_PROTOCOLS;
        let is_hop_by_hop = rewrite::hop_by_hop(&header.headers);
        let leaving: Vec<HeaderName> = header
            .headers
            .iter()
            .filter(|(name, value)| {
                rewrite::is_kept_from_client(name) || quotes_key(value) || !switches_protocol && is_hop_by_hop(name)
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in &leaving {
            header.remove_header(name);
        }
        add_our_headers(header, context)
    }

    fn upstream_response_body_filter(
        &self,
        _session: &mut Session,
        _body: &mut Option<Bytes>,
        _end: bool,
        context: &mut Context,
    ) -> Result<Option<Duration>> {
        // Once committed there is no other attempt, and nothing more to replay.
        if let Some(ask) = context.ask.as_mut().filter(|ask| !ask.body.is_empty())
            && context.exchange.state().committed.is_some()
        {
            ask.body = Bytes::new();
        }
        Ok(None)
    }

    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        _session: &mut Session,
        mut error: Box<Error>,
        context: &mut Context,
        reused: bool,
    ) -> Box<Error> {
        // Some errors are left undecided by Pingora until it is known whether the connection was a pooled one.
        error.retry.decide_reuse(reused);
        let pingora_says_again = error.retry();
        error.set_retry(false);
        let mut state = context.exchange.state();
        let ended = state.ended.take();
        let from_client = *error.esource() == ErrorSource::Downstream && ended.is_none();
        if state.committed.is_some() {
            if let (Some(attempt), false) = (&mut state.attempt, from_client) {
                attempt.settle(&ended.unwrap_or(Outcome::Broken));
                context.fault = Some(Fault::StreamBroken);
            }
            return error;
        }
        let header_seen = state.attempt.as_ref().is_some_and(|attempt| attempt.header_seen);
        drop(state);
        let timed_out = matches!(error.etype(), ErrorType::ReadTimedout | ErrorType::WriteTimedout);
        let closed_before_use =
            (reused && !timed_out || pingora_says_again) && ended.is_none() && !from_client && !header_seen;
        if closed_before_use && context.tries.stale < STALE_MAX {
            context.tries.stale += 1;
            context.tries.again();
            error.set_retry(true);
            return error;
        }
        let outcome = ended.unwrap_or(if from_client { Outcome::ClientGone } else { Outcome::Broken });
        log::debug!("request {}: {error}", context.arrival.id());
        error.set_retry(Self::attempt_over(context, &outcome));
        error
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        peer: &HttpPeer,
        context: &mut Context,
        mut error: Box<Error>,
    ) -> Box<Error> {
        log::debug!("request {}: {peer}: {error}", context.arrival.id());
        context.tries.addresses_failed += 1;
        let addresses = {
            let state = context.exchange.state();
            state.attempt.as_ref().map_or(0, |attempt| attempt.endpoint.upstream.addresses_known())
        };
        if context.tries.addresses_failed < addresses {
            context.tries.again();
            error.set_retry(true);
            return error;
        }
        if let Some(attempt) = &context.exchange.state().attempt {
            log::warn!(
                "endpoint {}: no connection to {}: {error}",
                attempt.endpoint.config.id,
                attempt.endpoint.upstream.host()
            );
        }
        error.set_retry(Self::attempt_over(context, &Outcome::ConnectFailed));
        error
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, context: &mut Context) -> FailToProxy {
        context.wrapped.unwrap_session(session);
        let (committed, kept) = {
            let mut state = context.exchange.state();
            (state.committed, state.kept.take())
        };
        let closed = |error_code| FailToProxy { error_code, can_reuse_downstream: false };
        let written = session.response_written().is_some_and(|header| !header.status.is_informational());
        if committed.is_some() || written {
            if let (Some(fault), Some(committed)) = (&context.fault, committed)
                && committed.event_stream
            {
                send_error_event(session, fault, committed.between_events).await;
            }
            return closed(0);
        }
        if *error.esource() == ErrorSource::Downstream && context.fault.is_none() {
            return closed(0);
        }
        // Pingora closes the connection after a failure, whatever became of it; a client that is not told so may lose its
        // next request to it.
        session.set_keepalive(None);
        let fault = context.fault.get_or_insert(Fault::Internal).clone();
        if fault == Fault::Internal {
            log::error!("request {}: {error}", context.arrival.id());
        }
        let sent = match kept {
            Some(Kept { header, body: Some(body) }) => {
                let status = header.status.as_u16();
                send_kept(session, context, header, body).await.map(|()| status)
            }
            _ => send(session, context, Answer::from(&fault)).await.map(|()| fault.status()),
        };
        sent.map_or(closed(0), closed)
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, context: &mut Context) {
        context.wrapped.unwrap_session(session);
        let state = context.exchange.state();
        let attempt = state.attempt.as_ref();
        let header = session.req_header();
        let endpoint = attempt.map(|attempt| attempt.endpoint.config.id.as_ref());
        let status = session.response_written().map(|header| header.status.as_u16()).filter(|status| *status >= 101);
        let ask = context.ask.as_ref();
        let record = Record {
            id: context.arrival.id(),
            caller: context.arrival.address,
            method: header.method.as_str(),
            path: header.uri.path(),
            model: ask.and_then(|ask| ask.model.as_deref()),
            endpoint_model: attempt.and_then(|attempt| attempt.model.as_deref()),
            endpoint,
            attempts: context.tries.tried.len(),
            status,
            bytes: session.body_bytes_sent(),
            first_byte: state.committed.map(|committed| committed.at.saturating_duration_since(context.arrival.at)),
            total: context.arrival.at.elapsed(),
            fault: context.fault.as_ref().map(Fault::label),
        };
        let gone = error.is_some_and(|error| *error.esource() == ErrorSource::Downstream) && context.fault.is_none();
        let level = if gone { log::Level::Debug } else { log::Level::Info };
        log::log!(level, "{record}{}", if gone { " client_gone" } else { "" });
    }

    // The record and the notes of each attempt say all that Pingora would, without its request headers.
    fn suppress_error_log(&self, _session: &Session, _context: &Context, _error: &Error) -> bool {
        true
    }

    fn suppress_proxy_warn_log(&self, _s: &Session, _c: &Context, _e: &Error, _w: ProxyWarnLogContext) -> bool {
        true
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    memchr::memmem::find(text, part).is_some()
}

/// Tells the reader of a stream that broke that it is not whole. Without `[DONE]`, and with the connection closed after it,
/// no client takes it for a whole one.
async fn send_error_event(session: &mut Session, fault: &Fault, between_events: bool) {
    let ends_event = if between_events { "" } else { "\n\n" };
    let event = Bytes::from(format!("{ends_event}data: {}\n\n", fault.json()));
    let is_h2 = session.downstream_session.is_http2();
    let sent = session.downstream_session.response_duplex_vec(vec![HttpTask::Body(Some(event), false)]).await;
    if sent.is_ok() && is_h2 {
        tokio::time::sleep(H2_FLUSH).await;
    }
}

/// Shows the client the last endpoint's own error.
async fn send_kept(
    session: &mut Session,
    context: &Context,
    mut header: Box<ResponseHeader>,
    body: Bytes,
) -> Result<()> {
    add_our_headers(&mut header, context)?;
    let no_body = body.is_empty();
    session.write_response_header(header, no_body).await?;
    if no_body { Ok(()) } else { session.write_response_body(Some(body), true).await }
}
