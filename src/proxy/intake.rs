//! Intake of a request: its client, its key, and our own answers; any other request goes on to `asking`.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, Uri, Version, header};
use jiff::Timestamp;
use percent_encoding::percent_decode_str;
use pingora::http::RequestHeader;
use pingora::protocols::http::ServerSession;
use pingora::{Error, ErrorType, Result as PingoraResult};
use pingora_proxy::Session;

use super::asking::{self, Origin};
use super::{Door, Gateway, admin_calls, outgoing, receive};
use crate::admin::lists::{self, Asker, ListCall};
use crate::admin::{Answer, Resource, Sources};
use crate::config::{CallKind, Cors};
use crate::console;
use crate::exchange::running::RunningRequest;
use crate::exchange::session::{Framing, Plan, Wrapped};
use crate::exchange::{Ask, Exchange};
use crate::fault::{ErrorShape, Fault, excerpt};
use crate::ledger::budgets::Spends;
use crate::ledger::{Drawn, Otherwise, Permit, Wanted};
use crate::limit::Clock;
use crate::proxy::context::{Arrival, Context, Logged};
use crate::request::auth::{self, Admitted};
use crate::request::connections::{Connection, OnConnection, WRITE_MAX};
use crate::request::trace::Trace;
use crate::request::{forward, id, path, plain_spelling, rewrite};
use crate::routing::admission::{self, Choice, Undecided};
use crate::routing::callers::{Keyring, Named};
use crate::routing::objects::Owner;
use crate::routing::pool::Pool;
use crate::routing::rates;

/// The body of a call to our own resources is a few words.
const OWN_BODY_BYTES_MAX: usize = 64 * 1024;

/// Longest path and query. No call's is longer, and an endpoint's own path has yet to fit before it.
const TARGET_BYTES_MAX: usize = 16 * 1024;

/// Next step of a request once its header and body have been read.
enum Next {
    /// It is answered here.
    Answer(Answer),
    /// It has been answered already, with a stream.
    Answered,
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
        Ok(Next::Answered) => return Ok(true),
        Ok(Next::Answer(answer)) => Ok(answer),
        Err(stop) => Err(stop),
    };
    // Boxed, since it would make every request's future larger.
    Box::pin(answer(session, context, own)).await.map(|()| true)
}

/// Checks the request's key. Returns the caller, if it has a key of its own.
async fn authenticate(
    gateway: &Gateway,
    context: &Context,
    header: &RequestHeader,
    pool: &Pool,
) -> Result<Option<Arc<Named>>, Fault> {
    let Arrival { connection, address, .. } = &context.arrival;
    // A reverse proxy's connection is many clients'.
    let vouched = connection.as_ref().is_some_and(OnConnection::is_known) && pool.server.trusted_proxies.is_empty();
    let find = |key: &[u8]| {
        let callers = gateway.process.keyring.load();
        if callers.is_empty() { None } else { callers.find(key, *address, Timestamp::now()) }
    };
    let checked = gateway.auth.check(&pool.server, &header.headers, header.uri.query(), (*address, vouched), find);
    if matches!(checked, Err(Fault::KeysFailedTooOften)) {
        // Boxed, since it is rare and would make every request's future larger.
        Box::pin(gateway.auth.guesses.keep_waiting()).await;
    }
    let admitted = checked?;
    if let Some(connection) = connection {
        connection.shows_key();
    }
    Ok(match admitted {
        Admitted::Shared => None,
        Admitted::Caller(caller, key) => Some(Arc::new(Named { caller, key })),
    })
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
            ending: context.arrival.named.as_ref().map(|named| Arc::clone(&named.caller.ending)),
            own_headers: context.arrival.own.clone(),
            header: outgoing::forwarded(session.req_header(), &ask, context.arrival.own.id.as_ref()),
        };
        if ask.logged.is_some() && context.arrival.logged == Logged::Yes {
            context.exchange.state().answer = Some(Box::default());
        }
        context.wrapped = Wrapped::wrap(session, plan, &context.exchange);
    } else if let ServerSession::H1(session) = &mut *session.downstream_session {
        if let (Some(named), Some(socket), Some(connection)) =
            (&context.arrival.named, &mut context.web_socket, &context.arrival.connection)
        {
            socket.ends_with(Arc::clone(&named.caller.ending), connection);
        }
        // An endpoint's 103 says nothing about its answer, and may hold anything.
        session.set_ignore_info_resp(true);
    }
    context.ask = Some(ask);
}

/// Takes a request in, as far as the choice of its first endpoint.
async fn take_in(gateway: &Gateway, session: &mut Session, context: &mut Context) -> Result<Next, Stop> {
    let pool = gateway.process.pool.load_full();
    arrive(session, context, &pool);
    if gateway.process.request_log.is_on() {
        context.arrival.logged = Logged::Yes;
    }
    let header = session.req_header();
    let (uri, method) = (header.uri.clone(), header.method.clone());
    if uri.path() == "/"
        && let Some(answer) = admin_calls::root(gateway, session, context, &pool)
    {
        return Ok(Next::Answer(answer));
    }
    if console::is_ours(uri.path()) != (gateway.door == Door::Admins) && gateway.door != Door::All {
        return Err(Fault::PathUnknown { path: excerpt(uri.path()) }.into());
    }
    if console::is_ours(uri.path()) {
        // Boxed, since it is rare and would make every request's future larger.
        let answer = Box::pin(admin_calls::answer(gateway, session, context, &pool)).await?;
        return Ok(answer.map_or(Next::Answered, Next::Answer));
    }
    if is_preflight(header) {
        context.arrival.logged = Logged::No;
        let requested = header.headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS);
        return Ok(Next::Answer(Answer::preflight(requested)));
    }
    let path = path::as_meant(uri.path());
    context.arrival.error_shape = ErrorShape::of_path(&path);
    let resource = Resource::from_path(uri.path(), &path, &method);
    if resource.is_some() && context.arrival.logged == Logged::Yes {
        context.arrival.logged = Logged::IfWrong;
    }
    context.arrival.is_probe = resource.as_ref().is_some_and(|resource| resource.is_probe(&method));
    if !resource.as_ref().is_some_and(Resource::is_open_to_all) {
        context.arrival.named = authenticate(gateway, context, header, &pool).await?;
        context.arrival.has_key = true;
    }
    let named = context.arrival.named.clone();
    if let Some(resource) = resource {
        if named.is_some() && resource.is_for_operators() {
            return Err(Fault::PathNotAllowed.into());
        }
        resource.check_method(&method)?;
        let takes_body = resource.takes_body();
        let body = if takes_body { receive::body(gateway, session, OWN_BODY_BYTES_MAX).await? } else { Bytes::new() };
        let host = session.req_header().headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let authority = uri.authority().map(http::uri::Authority::as_str).or(host);
        let caller = named.as_ref().map(|named| &*named.caller);
        let sources = Sources { pool: &pool, process: &gateway.process, authority, caller };
        return Ok(Next::Answer(resource.answer(sources, &body).await?));
    }
    check_target(&method, &uri, &path)?;
    let target = target(&pool, &uri, &path, named.as_deref())?;
    let kind = CallKind::of_path(target.path());
    if let Some(named) = &named {
        plain_spelling::check_path(target.path())?;
        target.query().map_or(Ok(()), plain_spelling::check_query)?;
        named.caller.check_call(kind, target.path())?;
        if let Some(model) = target.path().strip_prefix("/v1/models/") {
            named.caller.check_model(&percent_decode_str(model).decode_utf8_lossy())?;
        }
    }
    let is_one_of_several = !pool.server.share_ids && !gateway.process.keyring.load().is_empty();
    if (pool.has_several_organizations || is_one_of_several)
        && let Some(list) = ListCall::new(&method, target.path(), target.query())
    {
        let owner = Owner::new(named.as_ref().map(|named| &*named.caller), pool.server.share_ids);
        let asker = Asker { named: named.as_deref(), owner, is_one_of_several };
        if lists::is_divided(&pool, &list, &asker) {
            let clock = pool.clock();
            // It counts as a request, and takes no tokens.
            let _own = draw_for_list(&pool, named.as_deref(), &clock).await?;
            // Boxed, since it is rare and would make every request's future larger.
            let answer = Box::pin(lists::answer(&pool, &gateway.cursors, (&list, &asker), &header.headers)).await?;
            return Ok(Next::Answer(answer));
        }
    }
    context.arrival.trace = Some(Trace::of(&session.req_header().headers, |id| gateway.process.traces.samples(id)));
    let whole = asking::receive(gateway, session, context, (&pool, &target)).await?;
    let origin = Origin { pool, address: context.arrival.address, named, is_one_of_several };
    let ask = asking::ask(session.req_header(), origin, target, whole).await?;
    if ask.pool.server.admin_key.is_some() {
        let request = running(&context.arrival, &ask, &method, &context.exchange);
        context.running = Some(gateway.process.running.enter(request));
    }
    // The first endpoint is chosen before anything is set in motion, so that a refusal is an ordinary answer.
    let choice = first_choice(session, context, &ask, &gateway.process.keyring).await;
    let clock = choice.as_ref().map_or_else(|_| ask.pool.clock(), |choice| choice.at);
    let rates = rates::of_model(&ask.options(&[]), &clock);
    context.arrival.own.rates = match &ask.own {
        None => rates,
        Some(own) => rates.tighter(rates::of_accounts(&own.accounts, &clock)),
    };
    match choice {
        Ok(choice) => Ok(Next::Proxy(ask, choice)),
        Err(stop) => {
            // The log and the metrics name the model of a request that is refused, too.
            context.ask = Some(ask);
            Err(stop)
        }
    }
}

/// A request as those who run the gateway see it while it is under way.
fn running(arrival: &Arrival, ask: &Ask, method: &Method, exchange: &Arc<Exchange>) -> RunningRequest {
    RunningRequest {
        id: arrival.own.id.clone(),
        came: arrival.at,
        key: ask.named.as_ref().map(|named| Arc::clone(named.caller.name())),
        address: arrival.address,
        method: method.clone(),
        path: ask.target.path().into(),
        model: ask.model.clone(),
        stream: ask.stream,
        exchange: Arc::clone(exchange),
    }
}

/// Draws of the limits of the caller's key for a list, which is put together here.
async fn draw_for_list(pool: &Pool, named: Option<&Named>, clock: &Clock) -> Result<Option<Permit>, Fault> {
    let accounts =
        named.and_then(|named| named.caller.accounts.of_model(None)).filter(|accounts| accounts.is_limited());
    let Some(accounts) = accounts else { return Ok(None) };
    let wanted = Wanted { accounts: Arc::clone(accounts), not_before: clock.boot, spends: Spends::default() };
    match pool.ledger.draw(pool.ledger.ticket(), vec![wanted], Otherwise::LookElsewhere).await {
        Drawn::Granted(_, mut permit) => {
            permit.spend();
            Ok(Some(permit))
        }
        Drawn::Refused(refusal) => Err(admission::own_limits_reached(refusal)),
        Drawn::Unavailable => Err(Fault::LedgerUnavailable),
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
fn target(pool: &Pool, uri: &Uri, path: &str, named: Option<&Named>) -> Result<PathAndQuery, Fault> {
    if let (None, Some(target)) = (uri.query(), uri.path_and_query())
        && path == uri.path()
    {
        return Ok(target.clone());
    }
    let keys = [pool.server.api_key.as_ref(), named.map(|named| &named.key)];
    let query = uri.query().and_then(|query| forward::forwarded_query(query, keys));
    // An endpoint that is Azure's has a version of its own in its config.
    let query = if path::is_azure(uri.path()) { query.and_then(forward::without_version) } else { query };
    let target = query.map_or_else(|| path.to_owned(), |query| format!("{path}?{query}"));
    target.parse().map_err(|_| Fault::PathUnknown { path: excerpt(uri.path()) })
}

/// The first endpoint.
async fn first_choice(
    session: &mut Session,
    context: &mut Context,
    ask: &Ask,
    keyring: &Keyring,
) -> Result<Choice, Stop> {
    let queue = ask.pool.server.queue.filter(|_| !ask.switches_protocol);
    let request = admission::Request {
        options: ask.options(&[]),
        queue,
        queued_by: ask.queued_by(),
        caller: ask.caller,
        own: ask.own.as_ref(),
        fallbacks: &ask.own_fallbacks,
        budget: ask.budget.as_ref(),
    };
    match admission::at_once(&request) {
        Ok(choice) => Ok(choice),
        // Boxed, since it is rare and would make every request's future larger.
        Err(undecided) => {
            let began = Instant::now();
            let choice = Box::pin(wait_for_choice(session, ask, keyring, (request, undecided)));
            let choice = context.exchange.cancel.or(choice).await;
            context.tries.queued = began.elapsed();
            choice.unwrap_or(Err(Stop::Fault(Fault::Cancelled)))
        }
    }
}

/// Waits until the request's key opens nothing any more; for ever if it is the server's one key.
async fn ended(ask: &Ask) -> Fault {
    match &ask.named {
        None => std::future::pending().await,
        Some(named) => {
            named.caller.ending.ended().await;
            Fault::KeyEnded { name: named.caller.name().to_string(), why: "was revoked" }
        }
    }
}

/// Queues for a permit; a client that disconnects meanwhile gives its place to the next.
async fn wait_for_choice(
    session: &mut Session,
    ask: &Ask,
    keyring: &Keyring,
    (mut request, undecided): (admission::Request<'_>, Undecided),
) -> Result<Choice, Stop> {
    if let Some(queue) = &mut request.queue
        && !keyring.load().are_several(ask.pool.server.api_key.is_some())
    {
        // Nobody else has a key, so the queue is all its own.
        queue.requests_per_key_max = queue.requests_max;
    }
    let admission = admission::decide(request, undecided);
    if request.queue.is_none() {
        return Ok(admission.await?);
    }
    tokio::select! {
        biased;
        choice = admission => Ok(choice?),
        why = ended(ask) => Err(Stop::Fault(why)),
        gone = session.downstream_session.read_body_or_idle(true) => Err(match gone {
            Err(error) => Stop::Gone(error),
            Ok(_) => Stop::Gone(Error::new_down(ErrorType::ConnectionClosed)),
        }),
    }
}
