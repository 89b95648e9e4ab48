//! Intake of a request: its client, its body, its call and model.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, Uri, Version, header};
use pingora::http::RequestHeader;
use pingora::protocols::http::ServerSession;
use pingora::{Error, ErrorType, Result as PingoraResult};
use pingora_proxy::Session;

use super::web_socket::{self, WebSocket};
use super::{Gateway, outgoing, receive};
use crate::admin::lists::{self, ListCall};
use crate::admin::{Answer, Resource, Sources};
use crate::config::{CallKind, Cors};
use crate::exchange::session::{Framing, Plan, Wrapped};
use crate::exchange::{Ask, AskedObjects, BodyModel, Sealed};
use crate::fault::{ErrorShape, Fault, excerpt};
use crate::ledger::CallerId;
use crate::proxy::context::{Arrival, Context};
use crate::request::auth;
use crate::request::call::Call;
use crate::request::connections::{Connection, OnConnection, WRITE_MAX};
use crate::request::fields::{Fields, ModelPlace};
use crate::request::references::{self, References};
use crate::request::session_name::{SessionFields, SessionName};
use crate::request::shape::CallShape;
use crate::request::{content_type, fields, form, forward, id, path, rewrite, sealed};
use crate::response::objects::Wanted;
use crate::routing::admission::{self, Choice, Undecided};
use crate::routing::objects::Named;
use crate::routing::pool::Pool;
use crate::routing::rates;
use crate::routing::router::Candidates;

/// The body of a call to our own resources is a few words.
const OWN_BODY_BYTES_MAX: usize = 64 * 1024;

/// Longest path and query. No call's is longer, and an endpoint's own path has yet to fit before it.
const TARGET_BYTES_MAX: usize = 16 * 1024;

/// Next step of a request once its header and body have been read.
enum Next {
    /// It is answered here.
    Answer(Answer),
    /// It goes to an endpoint, this one first.
    Proxy(Box<Ask>, Choice),
}

/// Reason why a request stops before it goes to an endpoint.
pub(super) enum Stop {
    /// The client gets this fault.
    Fault(Fault),
    /// The client gets this fault, and what else it sends cannot be trusted to be a request.
    Unframed(Fault),
    /// The client is gone.
    Gone(Box<Error>),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Takes a request in. False if it goes to an endpoint; otherwise it is answered.
pub(super) async fn request_filter(
    gateway: &Gateway,
    session: &mut Session,
    context: &mut Context,
) -> PingoraResult<bool> {
    if gateway.process.draining.is_on() {
        session.set_keepalive(None);
    }
    let own = match take_in(gateway, session, context).await {
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

/// Checks the request's key.
async fn authenticate(gateway: &Gateway, context: &Context, header: &RequestHeader, pool: &Pool) -> Result<(), Fault> {
    let Arrival { connection, address, .. } = &context.arrival;
    // A reverse proxy's connection is many clients'.
    let vouched = connection.as_ref().is_some_and(OnConnection::is_known) && pool.server.trusted_proxies.is_empty();
    let checked = gateway.auth.check(&pool.server, &header.headers, header.uri.query(), *address, vouched);
    if checked == Err(Fault::KeysFailedTooOften) {
        // Boxed, since it is rare and would make every request's future larger.
        Box::pin(gateway.auth.guesses.keep_waiting()).await;
    }
    checked?;
    if let Some(connection) = connection {
        connection.shows_key();
    }
    Ok(())
}

/// Answers a request that goes to no endpoint.
async fn answer(session: &mut Session, context: &mut Context, own: Result<Answer, Stop>) -> PingoraResult<()> {
    outgoing::takes_within(session, context, WRITE_MAX);
    let answer = match own {
        Ok(answer) => answer,
        Err(Stop::Fault(fault)) => Answer::of_fault(context.fault.insert(fault), context.arrival.error_shape),
        Err(Stop::Unframed(fault)) => {
            session.set_keepalive(None);
            let answer = Answer::of_fault(context.fault.insert(fault), context.arrival.error_shape);
            return outgoing::send(session, context, answer).await;
        }
        Err(Stop::Gone(error)) => return Err(error),
    };
    receive::drain(session).await;
    outgoing::send(session, context, answer).await
}

/// Sets a request on its way to an endpoint.
fn begin(session: &mut Session, context: &mut Context, ask: Box<Ask>, choice: Choice) {
    context.tries.first = Some(choice);
    if !ask.switches_protocol {
        let framing = match session.req_header().version {
            Version::HTTP_2 => Framing::Frames,
            Version::HTTP_11 => Framing::Chunks,
            _ => Framing::Connection,
        };
        let plan = Plan {
            has_body: !ask.body.is_empty(),
            pool: Arc::clone(&ask.pool),
            budget_ends: context.arrival.at + ask.pool.server.retry.budget,
            framing,
            streams: ask.stream,
            // What else says `stream` may be answered with anything.
            ping: ask.pool.server.stream_ping.filter(|_| ask.stream && ask.call.is_text()),
            own_headers: context.arrival.own.clone(),
            header: outgoing::forwarded(session.req_header(), &ask, context.arrival.own.id.as_ref()),
        };
        context.wrapped = Wrapped::wrap(session, plan, &context.exchange);
    } else if let ServerSession::H1(session) = &mut *session.downstream_session {
        // An endpoint's 103 says nothing about its answer, and may hold anything.
        session.set_ignore_info_resp(true);
    }
    context.ask = Some(ask);
}

/// Takes a request in, as far as the choice of its first endpoint.
async fn take_in(gateway: &Gateway, session: &mut Session, context: &mut Context) -> Result<Next, Stop> {
    let pool = gateway.process.pool.load_full();
    arrive(session, context, &pool);
    let header = session.req_header();
    let (uri, method) = (header.uri.clone(), header.method.clone());
    if is_preflight(header) {
        let requested = header.headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS);
        return Ok(Next::Answer(Answer::preflight(requested)));
    }
    let path = path::as_meant(uri.path());
    context.arrival.error_shape = ErrorShape::of_path(&path);
    let resource = Resource::from_path(uri.path(), &path, &method);
    context.arrival.is_probe = resource.as_ref().is_some_and(|resource| resource.is_probe(&method));
    if !resource.as_ref().is_some_and(Resource::is_open_to_all) {
        authenticate(gateway, context, header, &pool).await?;
    }
    if let Some(resource) = resource {
        resource.check_method(&method)?;
        let takes_body = resource.takes_body();
        let body = if takes_body { receive::body(gateway, session, OWN_BODY_BYTES_MAX).await? } else { Bytes::new() };
        let host = session.req_header().headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let authority = uri.authority().map(http::uri::Authority::as_str).or(host);
        let sources = Sources { pool: &pool, process: &gateway.process, authority };
        return Ok(Next::Answer(resource.answer(sources, &body).await?));
    }
    check_target(&method, &uri, &path)?;
    let target = target(&pool, &uri, &path)?;
    if pool.has_several_organizations
        && let Some(list) = ListCall::new(&method, target.path(), target.query())
        && lists::is_divided(&pool, &list)
    {
        // Boxed, since it is rare and would make every request's future larger.
        let answer = Box::pin(lists::answer(&pool, &gateway.cursors, &list, &header.headers)).await?;
        return Ok(Next::Answer(answer));
    }
    let first_message = if opens_websocket(session) {
        // Boxed, since it is rare and would make every request's future larger.
        Box::pin(open_web_socket(gateway, session, context, (&pool, &target))).await?
    } else {
        None
    };
    let caller = caller_id(context.arrival.address);
    let ask = ask(gateway, session, (pool, caller), target, first_message).await?;
    // The first endpoint is chosen before anything is set in motion, so that a refusal is an ordinary answer.
    let choice = first_choice(session, &ask).await;
    let clock = choice.as_ref().map_or_else(|_| ask.pool.clock(), |choice| choice.at);
    context.arrival.own.rates = rates::of_model(&ask.options(&[]), &clock);
    match choice {
        Ok(choice) => Ok(Next::Proxy(ask, choice)),
        Err(stop) => {
            // The log and the metrics name the model of a request that is refused, too.
            context.ask = Some(ask);
            Err(stop)
        }
    }
}

/// Notes the client, and the headers that every answer to it carries.
fn arrive(session: &Session, context: &mut Context, pool: &Pool) {
    let header = session.req_header();
    let peer = session.client_addr().and_then(|address| address.as_inet()).map(std::net::SocketAddr::ip);
    let arrival = &mut context.arrival;
    arrival.connection = connection(session).map(|one| one.request_came(header.version == Version::HTTP_2));
    arrival.address = auth::client_address(&pool.server, &header.headers, peer);
    arrival.own.id = Some(id::request_id(header.headers.get(id::REQUEST_ID)));
    arrival.endpoint_headers = pool.server.endpoint_headers;
    arrival.own.origin = allowed_origin(&pool.server.cors, header.headers.get(header::ORIGIN));
}

/// The connection of a request, which the listener's guard has put into its digest.
fn connection(session: &Session) -> Option<&Arc<Connection>> {
    session.digest()?.proxy_digest.as_ref()?.user_data.as_ref()?.downcast_ref()
}

/// Returns `Access-Control-Allow-Origin` for a page of this origin, if it may read the answer.
fn allowed_origin(cors: &Cors, origin: Option<&HeaderValue>) -> Option<HeaderValue> {
    if cors.any() {
        return Some(HeaderValue::from_static("*"));
    }
    origin.filter(|origin| origin.to_str().is_ok_and(|origin| cors.allows(origin))).cloned()
}

/// True for a CORS preflight (Fetch standard, 3.3.2).
fn is_preflight(header: &RequestHeader) -> bool {
    header.method == Method::OPTIONS
        && header.headers.contains_key(header::ORIGIN)
        && header.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// Refuses methods and paths that are not the API's, and paths with steps that lead out of it.
fn check_target(method: &Method, uri: &Uri, path: &str) -> Result<(), Fault> {
    let target_bytes = uri.path_and_query().map_or(0, |target| target.as_str().len());
    if target_bytes > TARGET_BYTES_MAX {
        return Err(Fault::PathTooLong { bytes_max: TARGET_BYTES_MAX });
    }
    if !path.starts_with("/v1/") || Resource::is_reserved(path) || rewrite::steps_out(path) {
        return Err(Fault::PathUnknown { path: excerpt(uri.path()) });
    }
    // A TRACE would send our credentials back.
    let known = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS];
    if !known.contains(method) {
        return Err(Fault::MethodNotAllowed { allowed: "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS" });
    }
    Ok(())
}

/// Returns the path as it is meant, with the part of the query that is forwarded.
fn target(pool: &Pool, uri: &Uri, path: &str) -> Result<PathAndQuery, Fault> {
    if let (None, Some(target)) = (uri.query(), uri.path_and_query())
        && path == uri.path()
    {
        return Ok(target.clone());
    }
    let query = uri.query().and_then(|query| forward::forwarded_query(query, &pool.server.api_key));
    // An endpoint that is Azure's has a version of its own in its config.
    let query = if path::is_azure(uri.path()) { query.and_then(forward::without_version) } else { query };
    let target = query.map_or_else(|| path.to_owned(), |query| format!("{path}?{query}"));
    target.parse().map_err(|_| Fault::PathUnknown { path: excerpt(uri.path()) })
}

/// True if the request opens a WebSocket (RFC 6455, 4.1). Any other `Upgrade`, such as curl's h2c, may be ignored, and
/// is.
fn opens_websocket(session: &Session) -> bool {
    let header = session.req_header();
    let upgrade = header.headers.get(header::UPGRADE);
    session.is_upgrade_req()
        && header.method == Method::GET
        && upgrade.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// Reads the first message of a WebSocket that names its model nowhere else, if an endpoint is known to take such ones.
async fn open_web_socket(
    gateway: &Gateway,
    session: &mut Session,
    context: &mut Context,
    (pool, target): (&Pool, &PathAndQuery),
) -> Result<Option<Bytes>, Stop> {
    let bytes_max = pool.server.body_bytes_max;
    let kind = CallKind::of_path(target.path());
    let is_routed = target.query().is_some_and(|query| fields::query_model(query).is_some() || joins_call(query));
    let is_taken = !is_routed && pool.endpoints.iter().any(|one| one.config.enabled && one.takes_web_socket(kind));
    context.web_socket = Some(Box::new(WebSocket::new(is_taken, bytes_max)));
    if !is_taken {
        return Ok(None);
    }
    web_socket::accept(session, &context.arrival.own, bytes_max, &gateway.process.memory).await.map(Some)
}

/// True if a WebSocket joins a call that is going on, which has its model already.
fn joins_call(query: &str) -> bool {
    query.split('&').any(|pair| pair.len() > "call_id=".len() && pair.starts_with("call_id="))
}

/// Reads the request to its end and finds its call, model and endpoints.
async fn ask(
    gateway: &Gateway,
    session: &mut Session,
    (pool, caller): (Arc<Pool>, CallerId),
    target: PathAndQuery,
    first_message: Option<Bytes>,
) -> Result<Box<Ask>, Stop> {
    let switches_protocol = opens_websocket(session);
    let is_accepted = first_message.is_some();
    let bytes_max = pool.server.body_bytes_max;
    let body = match first_message {
        Some(message) => message,
        None if switches_protocol => Bytes::new(),
        None => receive::body(gateway, session, bytes_max).await?,
    };
    let read_at = Instant::now();
    let header = session.req_header();
    let content_type = header.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let (body, fields, is_json) = read(body, content_type)?;
    let kind = CallKind::of_path(target.path());
    // Azure's deployment counts, whatever the body says.
    let deployment = path::deployment(header.uri.path());
    let (model, body_model) = match fields.model {
        place if let Some(name) = deployment => {
            let place =
                place.map(|model| model.place).or(fields.unnamed).or_else(|| new_place(&body, is_json, content_type));
            (Some(name.into()), place.map(|place| BodyModel { place, is_other: true }))
        }
        Some(model) => (Some(model.name), Some(BodyModel { place: model.place, is_other: false })),
        None if switches_protocol || kind == CallKind::Realtime => {
            let name = target.query().and_then(fields::query_model);
            let is_other = target.query().is_some_and(|query| query.contains("deployment="));
            (name, Some(BodyModel { place: ModelPlace::Query, is_other }))
        }
        None => (None, None),
    };
    if switches_protocol && model.is_none() && !is_accepted && !target.query().is_some_and(joins_call) {
        return Err(Fault::WebSocketModelUnknown.into());
    }
    let call = Call::new(&header.method, target.path());
    let candidates = match &model {
        None => pool.router.any(),
        Some(model) => pool.router.find(model).ok_or_else(|| Fault::ModelUnknown { model: excerpt(model) })?,
    };
    if candidates.list().is_empty() {
        return Err(Fault::NoEndpoint.into());
    }
    let candidates = &pool.having_call(candidates, kind);
    if candidates.list().is_empty() {
        return Err(Fault::CallUnknown.into());
    }
    let taking;
    let candidates = if is_accepted {
        let takes = |index: usize| pool.endpoints.get(index).is_some_and(|one| one.takes_web_socket(kind));
        taking = Arc::new(candidates.narrowed(takes));
        if taking.list().is_empty() {
            return Err(Fault::WebSocketUnavailable { model: excerpt(model.as_deref().unwrap_or_default()) }.into());
        }
        &taking
    } else {
        candidates
    };
    let objects = objects(&pool, &header.method, call, &target, (is_json, &body), fields.store);
    let candidates = Arc::clone(candidates);
    let (objects, candidates) = match objects {
        // Boxed, since it is rare and would make every request's future larger.
        Some(asked) => Box::pin(resolve(&pool, asked, candidates, (call, &body))).await?,
        None => (None, candidates),
    };
    let name = session_name(&pool, header, &body, &fields.session, (model.as_deref(), &candidates));
    let session = match name {
        Some(name) => Some(pool.sessions.find(name, &pool.ledger).await),
        None => None,
    };
    let preferred = session.as_ref().and_then(|session| candidates.place_of(&pool, session.at()?));
    Ok(Box::new(Ask {
        candidates,
        call,
        kind,
        shape: CallShape::new(&header.method, target.path()).filter(|_| !switches_protocol),
        target,
        caller,
        is_json,
        stream: fields.stream && !switches_protocol,
        usage_edit: fields.usage_edit,
        prompt: Bytes::new(),
        read_at,
        model,
        body_model,
        // What a WebSocket has said goes on as it came.
        body: if switches_protocol { Bytes::new() } else { body },
        objects,
        session,
        preferred,
        switches_protocol,
        pool,
    }))
}

/// The objects that a request names, and what its answer may make. None if it has to do with none, or if they are everywhere.
fn objects(
    pool: &Pool,
    method: &Method,
    call: Call,
    target: &PathAndQuery,
    (is_json, body): (bool, &[u8]),
    store: Option<bool>,
) -> Option<(References, AskedObjects)> {
    if !pool.has_several_organizations {
        return None;
    }
    let json = Some(body).filter(|_| is_json);
    let references = References::find(call, target.path(), target.query(), json);
    let wanted = Wanted {
        objects: references::shows_objects(call, target.path(), store),
        sealed: matches!(call, Call::Responses | Call::Messages),
    };
    if references.is_empty() && wanted == Wanted::default() {
        return None;
    }
    let names_any = !references.is_empty();
    let (deletes, looks) = (*method == Method::DELETE, *method == Method::GET);
    Some((references, AskedObjects { names_any, named: Named::default(), wanted, deletes, looks, sealed: None }))
}

/// Finds the endpoints that have the objects of a request, among the candidates of its model.
async fn resolve(
    pool: &Pool,
    (references, mut asked): (References, AskedObjects),
    candidates: Arc<Candidates>,
    (call, body): (Call, &[u8]),
) -> Result<(Option<Box<AskedObjects>>, Arc<Candidates>), Fault> {
    if references.is_empty() {
        return Ok((Some(Box::new(asked)), candidates));
    }
    let resolved = pool.objects.resolve(pool, references, &candidates).await?;
    asked.named = resolved.named;
    asked.sealed = resolved.readers.map(|readers| Sealed { readers, ranges: sealed::ranges(call, body) });
    Ok((Some(Box::new(asked)), resolved.candidates.unwrap_or(candidates)))
}

/// The session of a request. There is none where only one endpoint could take it.
fn session_name(
    pool: &Pool,
    header: &RequestHeader,
    body: &[u8],
    fields: &SessionFields,
    (model, candidates): (Option<&str>, &Candidates),
) -> Option<SessionName> {
    let rules = &pool.server.affinity;
    if !rules.sessions || candidates.list().len() < 2 {
        return None;
    }
    SessionName::find(&header.headers, body, fields, model, rules.prefix)
}

/// Callers are distinguished by their addresses, as long as all have one key.
fn caller_id(address: Option<IpAddr>) -> CallerId {
    let bits = match address {
        None => 0,
        Some(IpAddr::V4(address)) => u128::from(address.to_bits()),
        Some(IpAddr::V6(address)) => address.to_bits(),
    };
    let [high, low] = [bits >> 64, bits].map(|half| u64::try_from(half & u128::from(u64::MAX)).unwrap_or_default());
    CallerId(high.rotate_left(32) ^ low)
}

/// The place of the model in a body that names none.
fn new_place(body: &[u8], is_json: bool, content_type: Option<&str>) -> Option<ModelPlace> {
    if is_json {
        return ModelPlace::new_member(body);
    }
    let boundary = form::boundary(content_type.filter(|value| content_type::is_form(value))?)?;
    Some(ModelPlace::NewPart(String::from_utf8(boundary).ok()?.into()))
}

/// Finds the fields of a body, and whether it is JSON: it says so, says nothing, or begins like it, whatever it says. A
/// byte-order mark is left off, since no endpoint could read it.
fn read(body: Bytes, content_type: Option<&str>) -> Result<(Bytes, Fields, bool), Fault> {
    const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";
    if body.is_empty() {
        return Ok((body, Fields::default(), false));
    }
    if let Some(form) = content_type.filter(|value| content_type::is_form(value)) {
        let fields = form::scan(form, &body)?;
        return Ok((body, fields, false));
    }
    let declared = content_type::is_json_request(content_type);
    let marked = body.starts_with(BYTE_ORDER_MARK);
    let text = if marked { body.slice(BYTE_ORDER_MARK.len()..) } else { body.clone() };
    if declared || content_type::is_text(content_type) && text.trim_ascii_start().starts_with(b"{") {
        let fields = fields::scan(&text)?;
        return Ok((text, fields, true));
    }
    // A file may begin so, too.
    if text.trim_ascii_start().starts_with(b"{")
        && let Ok(fields) = fields::scan(&text)
    {
        return Ok((text, fields, true));
    }
    Ok((body, Fields::default(), false))
}

/// The first endpoint.
async fn first_choice(session: &mut Session, ask: &Ask) -> Result<Choice, Stop> {
    let queue = ask.pool.server.queue.filter(|_| !ask.switches_protocol);
    let request = admission::Request { options: ask.options(&[]), queue, caller: ask.caller };
    match admission::at_once(&request) {
        Ok(choice) => Ok(choice),
        // Boxed, since it is rare and would make every request's future larger.
        Err(undecided) => Box::pin(wait_for_choice(session, request, undecided)).await,
    }
}

/// Queues for a permit; a client that disconnects meanwhile gives its place to the next.
async fn wait_for_choice(
    session: &mut Session,
    request: admission::Request<'_>,
    undecided: Undecided,
) -> Result<Choice, Stop> {
    let admission = admission::decide(request, undecided);
    if request.queue.is_none() {
        return Ok(admission.await?);
    }
    tokio::select! {
        biased;
        choice = admission => Ok(choice?),
        gone = session.downstream_session.read_body_or_idle(true) => Err(match gone {
            Err(error) => Stop::Gone(error),
            Ok(_) => Stop::Gone(Error::new_down(ErrorType::ConnectionClosed)),
        }),
    }
}
