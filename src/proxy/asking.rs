//! Asking: a request's body, and what it says of the request's way, become an [`Ask`].

use std::cell::OnceCell;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{Method, header};
use pingora::http::RequestHeader;
use pingora_proxy::Session;

use super::context::Context;
use super::intake::Stop;
use super::web_socket::{self, WebSocket};
use super::{Gateway, drawing, receive};
use crate::config::CallKind;
use crate::exchange::{Ask, AskedObjects, BodyModel, Sealed};
use crate::fault::{Fault, excerpt};
use crate::json::{members, part};
use crate::ledger::CallerId;
use crate::request::call::Call;
use crate::request::fields::{Fields, ModelPlace};
use crate::request::references::{self, References};
use crate::request::session_name::{SessionFields, SessionName};
use crate::request::shape::CallShape;
use crate::request::{content_type, fields, form, path, plain_spelling, sealed};
use crate::request_log::KeptBody;
use crate::response::objects::Wanted;
use crate::routing::callers::{Caller, Named};
use crate::routing::objects::{Named as NamedObjects, Owner};
use crate::routing::pool::Pool;
use crate::routing::router::{Candidate, Candidates};

/// Where a request comes from, and what it runs under.
pub(super) struct Origin {
    pub(super) pool: Arc<Pool>,
    pub(super) address: Option<IpAddr>,
    pub(super) named: Option<Arc<Named>>,
    /// True if callers have objects of their own.
    pub(super) is_one_of_several: bool,
}

impl Origin {
    fn caller(&self) -> Option<&Caller> {
        self.named.as_ref().map(|named| &*named.caller)
    }
}

/// What a request says, once all of it has come.
pub(super) struct Whole {
    /// The body, or the first message of a WebSocket.
    text: Bytes,
    opens: Opens,
    read_at: Instant,
}

/// What a request opens.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Opens {
    /// An exchange.
    Exchange,
    /// A WebSocket.
    WebSocket,
    /// A WebSocket that was accepted, since its first message says where it goes.
    AcceptedWebSocket,
}

impl Opens {
    fn switches_protocol(self) -> bool {
        self != Self::Exchange
    }
}

/// Reads a request to its end.
pub(super) async fn receive(
    gateway: &Gateway,
    session: &mut Session,
    context: &mut Context,
    (pool, target): (&Pool, &PathAndQuery),
) -> Result<Whole, Stop> {
    let (text, opens) = if opens_websocket(session) {
        // Boxed, since it is rare and would make every request's future larger.
        match Box::pin(open_web_socket(gateway, session, context, (pool, target))).await? {
            Some(message) => (message, Opens::AcceptedWebSocket),
            None => (Bytes::new(), Opens::WebSocket),
        }
    } else {
        (receive::body(gateway, session, pool.server.body_bytes_max).await?, Opens::Exchange)
    };
    Ok(Whole { text, opens, read_at: Instant::now() })
}

/// Finds a request's call, model and endpoints.
pub(super) async fn ask(
    header: &RequestHeader,
    origin: Origin,
    target: PathAndQuery,
    Whole { text, opens, read_at }: Whole,
) -> Result<Box<Ask>, Stop> {
    let content_type = header.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let (body, mut fields, is_json) = read(text, content_type)?;
    if origin.named.is_some() && is_json {
        plain_spelling::check_json(&body)?;
        plain_spelling::check_names(&fields)?;
    }
    let kind = CallKind::of_path(target.path());
    let (model, body_model) = model(header, (&target, kind, opens), &mut fields, (&body, is_json))?;
    let call = Call::new(&header.method, target.path());
    if let Some(caller) = origin.caller() {
        check_other_models(caller, target.query(), &body)?;
    }
    let asks_a_model = header.method == Method::POST && asks_a_model(call, kind);
    let candidates = candidates(&origin, model.as_deref(), (kind, opens, asks_a_model))?;
    let (pool, caller) = (&origin.pool, origin.caller());
    let objects = if pool.has_several_organizations || origin.is_one_of_several {
        let owner = Owner::new(caller, pool.server.share_ids);
        objects((owner, caller.is_some()), &header.method, call, &target, (is_json, &body, &fields))?
    } else {
        None
    };
    let (objects, candidates) = match objects {
        // Boxed, since it is rare and would make every request's future larger.
        Some(asked) => Box::pin(resolve(&origin, asked, candidates, (call, &body))).await?,
        None => (None, candidates),
    };
    let of = (caller.map_or("", |caller| caller.name()), model.as_deref());
    let session = match session_name(pool, header, &body, &fields.session, (of, &candidates)) {
        Some(name) => Some(pool.sessions.find(name, &pool.ledger).await),
        None => None,
    };
    let switches_protocol = opens.switches_protocol();
    let asked = drawing::Asked {
        call,
        kind,
        path: target.path(),
        opens_socket: switches_protocol,
        model: model.as_deref(),
        body: &body,
        is_json,
        tier: fields.tier,
        payment: OnceCell::new(),
    };
    let own = caller.and_then(|caller| drawing::own_draw((pool, caller), &asked));
    let own_fallbacks =
        caller.map_or_else(Vec::new, |caller| drawing::fallback_draws((pool, caller), &asked, &candidates));
    let (budget, candidates) = match caller.and_then(|caller| Some((caller, caller.budgets.as_ref()?))) {
        Some((caller, set)) => drawing::budget_of((pool, caller, set), &asked, candidates)?,
        None => (None, candidates),
    };
    let preferred = session.as_ref().and_then(|session| candidates.place_of(pool, session.at()?));
    Ok(Box::new(Ask {
        candidates,
        call,
        kind,
        shape: CallShape::new(&header.method, target.path()).filter(|_| !switches_protocol),
        target,
        caller: caller_id(origin.address, caller),
        is_json,
        stream: fields.stream && !switches_protocol,
        tier: fields.tier,
        usage_edit: fields.usage_edit,
        prompt: Bytes::new(),
        read_at,
        model,
        body_model,
        body_bytes: body.len(),
        logged: caller.filter(|caller| caller.key.log_bodies && !switches_protocol).map(|_| {
            let mut kept = Box::<KeptBody>::default();
            kept.add(&body);
            kept
        }),
        // What a WebSocket has said goes on as it came.
        body: if switches_protocol { Bytes::new() } else { body },
        objects,
        session,
        preferred,
        switches_protocol,
        named: origin.named,
        fallback: None,
        own,
        own_fallbacks,
        budget,
        own_permit: None,
        pool: origin.pool,
    }))
}

/// True if a `POST` asks a model for something, even if it names none.
fn asks_a_model(call: Call, kind: CallKind) -> bool {
    let has_default = matches!(
        kind,
        CallKind::Images | CallKind::Audio | CallKind::Videos | CallKind::Moderations | CallKind::Rerank
    );
    call.is_text() || call == Call::Embeddings || call == Call::Other && has_default
}

/// Checks the models that stand beside the one that decides where a request goes: in the query, and in a list of such that some endpoints
/// take (`models`).
fn check_other_models(caller: &Caller, query: Option<&str>, body: &[u8]) -> Result<(), Fault> {
    if caller.key.models.is_none() {
        return Ok(());
    }
    if let Some(model) = query.and_then(fields::query_model) {
        caller.check_model(&model)?;
    }
    let mut others = Vec::new();
    // What is not JSON has no such list.
    let _whole = members::members(body, |key, range| {
        if key == b"models" {
            others = serde_json::from_slice(part(body, range)).unwrap_or_default();
        }
    });
    others.iter().try_for_each(|model: &String| caller.check_model(model))
}

/// The model that a request asks for, and its place.
type AskedModel = (Option<Arc<str>>, Option<BodyModel>);

/// Finds the model: in the path of Azure, in the body, or in the query.
fn model(
    header: &RequestHeader,
    (target, kind, opens): (&PathAndQuery, CallKind, Opens),
    fields: &mut Fields,
    (body, is_json): (&[u8], bool),
) -> Result<AskedModel, Fault> {
    let in_body = fields.model.take();
    // Azure's deployment counts, whatever the body says.
    if let Some(name) = path::deployment(header.uri.path()) {
        let content_type = header.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let place = in_body.map(|model| model.place).or(fields.unnamed.take());
        let place = place.or_else(|| new_place(body, is_json, content_type));
        return Ok((Some(name.into()), place.map(|place| BodyModel { place, is_other: true })));
    }
    if let Some(model) = in_body {
        return Ok((Some(model.name), Some(BodyModel { place: model.place, is_other: false })));
    }
    if !opens.switches_protocol() && kind != CallKind::Realtime {
        return Ok((None, None));
    }
    let name = target.query().and_then(fields::query_model);
    if opens == Opens::WebSocket && name.is_none() && !target.query().is_some_and(joins_call) {
        return Err(Fault::WebSocketModelUnknown);
    }
    let is_other = target.query().is_some_and(|query| query.contains("deployment="));
    Ok((name, Some(BodyModel { place: ModelPlace::Query, is_other })))
}

/// The candidates for a model that have the call, and that the caller's requests may go to.
fn candidates(
    origin: &Origin,
    model: Option<&str>,
    (kind, opens, asks_a_model): (CallKind, Opens, bool),
) -> Result<Arc<Candidates>, Fault> {
    let pool = &*origin.pool;
    match (origin.caller(), model) {
        (Some(caller), Some(model)) => caller.check_model(model)?,
        (Some(caller), None) if asks_a_model || opens == Opens::AcceptedWebSocket => caller.check_without_model()?,
        (_, _) => {}
    }
    let all = match model {
        None => pool.router.any(),
        Some(model) => pool.router.find(model).ok_or_else(|| Fault::ModelUnknown { model: excerpt(model) })?,
    };
    if all.list().is_empty() {
        return Err(Fault::NoEndpoint);
    }
    let is_narrowed =
        |caller: &&Caller| caller.key.endpoints.is_some() || caller.key.models.is_some() && all.have_fallbacks();
    let having = match origin.caller().filter(is_narrowed) {
        None => pool.having_call(all, kind),
        Some(caller) => {
            let open = pool.open_to(all, caller);
            if open.list().is_empty() {
                return Err(model.map_or(Fault::NoEndpoint, |model| caller.no_model(model)));
            }
            pool.having_call(&open, kind)
        }
    };
    if having.list().is_empty() {
        return Err(Fault::CallUnknown);
    }
    if opens != Opens::AcceptedWebSocket {
        return Ok(having);
    }
    let takes =
        |candidate: &Candidate| pool.endpoints.get(candidate.endpoint).is_some_and(|one| one.takes_web_socket(kind));
    let taking = having.narrowed(takes);
    if taking.list().is_empty() {
        return Err(Fault::WebSocketUnavailable { model: excerpt(model.unwrap_or_default()) });
    }
    Ok(Arc::new(taking))
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

/// The objects that a request names, and what its answer may make. None if it has to do with none.
fn objects(
    (owner, is_named): (Owner, bool),
    method: &Method,
    call: Call,
    target: &PathAndQuery,
    (is_json, body, fields): (bool, &[u8], &Fields),
) -> Result<Option<(References, AskedObjects)>, Fault> {
    let json = Some(body).filter(|_| is_json);
    let mut references = References::find(call, target.path(), target.query(), json);
    references.add_fields(body, &fields.objects);
    let wanted = Wanted {
        objects: references::shows_objects(call, target.path(), fields.store),
        sealed: matches!(call, Call::Responses | Call::Messages),
        audio: call == Call::Completion && (fields.store == Some(true) || references.has_audio),
    };
    if references.is_empty() && wanted == Wanted::default() {
        return Ok(None);
    }
    if references.is_cut && is_named {
        let problem = "The request names more objects (files, responses, …) than are looked for.".to_owned();
        return Err(Fault::RequestInvalid { problem });
    }
    let names_any = !references.is_empty();
    let (deletes, looks) = (*method == Method::DELETE, *method == Method::GET);
    let named = NamedObjects::default();
    Ok(Some((
        references,
        AskedObjects { owner, names_any, named, wanted, deletes, looks, sealed: None, organizations: Vec::new() },
    )))
}

/// Finds the endpoints that have the objects of a request, among the candidates of its model.
async fn resolve(
    Origin { pool, is_one_of_several, .. }: &Origin,
    (references, mut asked): (References, AskedObjects),
    candidates: Arc<Candidates>,
    (call, body): (Call, &[u8]),
) -> Result<(Option<Box<AskedObjects>>, Arc<Candidates>), Fault> {
    if references.is_empty() {
        return Ok((Some(Box::new(asked)), candidates));
    }
    let resolved =
        pool.objects.resolve(pool, (references, asked.owner.clone(), *is_one_of_several), &candidates).await?;
    asked.named = resolved.named;
    asked.organizations = resolved.organizations;
    asked.sealed = resolved.readers.map(|readers| Sealed { readers, ranges: sealed::ranges(call, body) });
    Ok((Some(Box::new(asked)), resolved.candidates.unwrap_or(candidates)))
}

/// The session of a request. There is none where only one endpoint could take it, with one key.
fn session_name(
    pool: &Pool,
    header: &RequestHeader,
    body: &[u8],
    fields: &SessionFields,
    (of, candidates): ((&str, Option<&str>), &Candidates),
) -> Option<SessionName> {
    let rules = &pool.server.affinity;
    let has_choice = || match candidates.list() {
        [] => false,
        [only] => pool.endpoints.get(only.endpoint).is_some_and(|endpoint| endpoint.lanes.is_pool()),
        _ => true,
    };
    if !rules.sessions || !has_choice() {
        return None;
    }
    SessionName::find(&header.headers, body, fields, of, rules.prefix)
}

/// Callers are distinguished by their keys, and those who have one key by their addresses.
fn caller_id(address: Option<IpAddr>, caller: Option<&Caller>) -> CallerId {
    let bits = match address {
        None => 0,
        Some(IpAddr::V4(address)) => u128::from(address.to_bits()),
        Some(IpAddr::V6(address)) => address.to_bits(),
    };
    let [high, low] = [bits >> 64, bits].map(|half| u64::try_from(half & u128::from(u64::MAX)).unwrap_or_default());
    let of_key = caller.map_or(0, |caller| {
        let mut hasher = DefaultHasher::new();
        caller.name().hash(&mut hasher);
        hasher.finish()
    });
    CallerId(high.rotate_left(32) ^ low ^ of_key)
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
