//! From a request to its answer.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::{Method, Request, Response, Version};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::json;

use super::behaviour::{AnswerAs, Behaviour, Empty, ResetAt, StallAt};
use super::body::{BrokenOff, Cutter, ScriptedBody};
use super::connection::{Guard, Line};
use super::record::Arrived;
use super::reply::{Events, Reply};
use super::script::Chosen;
use super::shapes::{self, AskedFor, Text};
use super::{Handle, control, embeddings, lock, responses};

/// Bytes of a request body that are read; beyond any model's context, within any test machine.
const MAX_REQUEST_BODY: usize = 256 << 20;

/// The error a generated 5xx, and a stream with `first_event_error`, carries.
const SERVER_ERROR: &str = "The server had an error while processing your request.";

/// Answers one request of a connection.
pub(super) async fn answer(
    handle: Handle,
    line: Arc<Line>,
    request: Request<Incoming>,
) -> Result<Response<ScriptedBody>, BrokenOff> {
    if control::is_control(request.uri().path()) {
        return control::answer(&handle, request).await;
    }
    let number = handle.0.numbered.fetch_add(1, Ordering::SeqCst) + 1;
    let guard = Guard::new(&handle, &line);
    let http2 = request.version() == Version::HTTP_2;
    let mut cutter = Cutter { guard, line, http2 };
    let early = lock(&handle.0.scripts).take_early();
    let (reply, behaviour) = match read(request, cutter.line.number, early.is_some()).await? {
        Some(arrived) => reply(&handle, &arrived, early, number),
        None => (Reply::error(413, "The request body is too large.", None), None),
    };
    let behaviour = behaviour.unwrap_or_default();
    before_header(&behaviour, &mut cutter).await?;
    Ok(reply.into_response(&handle, &behaviour, number, cutter))
}

/// Reads the body unless the answer is early. None if it is too large, an error if the client
/// breaks it off.
async fn read(request: Request<Incoming>, connection: u64, early: bool) -> Result<Option<Arrived>, BrokenOff> {
    let (head, body) = request.into_parts();
    let body = if early {
        Bytes::new()
    } else {
        match Limited::new(body, MAX_REQUEST_BODY).collect().await {
            Ok(whole) => whole.to_bytes(),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => {
                return Ok(None);
            }
            Err(_) => return Err(BrokenOff),
        }
    };
    let path = head.uri.path_and_query().map_or("*", |path| path.as_str());
    Ok(Some(Arrived {
        method: head.method,
        path_and_query: path.into(),
        version: head.version,
        headers: head.headers,
        body,
        connection,
        at: Instant::now(),
    }))
}

/// Waits, stalls or breaks off before the header, as scripted.
async fn before_header(behaviour: &Behaviour, cutter: &mut Cutter) -> Result<(), BrokenOff> {
    if behaviour.header_delay_ms > 0 {
        tokio::time::sleep(behaviour.header_delay()).await;
    }
    if behaviour.reset == Some(ResetAt::BeforeHeader) {
        cutter.cut(behaviour.reset_how)?;
        return std::future::pending().await;
    }
    if behaviour.stall == Some(StallAt::Header) {
        return std::future::pending().await;
    }
    Ok(())
}

/// Records the request and decides what answers it.
fn reply(handle: &Handle, arrived: &Arrived, early: Option<Chosen>, number: u64) -> (Reply, Option<Arc<Behaviour>>) {
    if handle.0.options.record {
        lock(&handle.0.records).push(arrived.clone());
    }
    if !has_key(handle, arrived) {
        let message = "Incorrect API key provided.";
        return (Reply::error(401, message, Some("invalid_api_key")), None);
    }
    let path = arrived.path_and_query.split('?').next().unwrap_or_default();
    let call = ApiCall::from_path(path);
    let ask = AskedFor::parse(&arrived.body);
    let model = ask.as_ref().ok().and_then(|ask| ask.model.as_deref());
    let chosen = match early {
        Some(chosen) => Ok(chosen),
        None => match ask.as_ref().ok().and_then(|ask| ask.sim.clone()) {
            Some(behaviour) => Ok(Chosen { behaviour: Arc::new(behaviour), scripted: true }),
            None => lock(&handle.0.scripts).take(model, key_of(arrived)),
        },
    };
    match chosen {
        Err(message) => (Reply::error(400, &message, Some("invalid_sim_model")), None),
        Ok(chosen) if fails(handle, arrived, &chosen) => (Reply::error(503, SERVER_ERROR, None), None),
        Ok(Chosen { behaviour, .. }) => {
            let reply = if behaviour.answers_any_path() {
                scripted_reply(&behaviour, arrived)
            } else if handle.0.options.objects {
                object_reply(handle, arrived, number)
                    .unwrap_or_else(|| call_reply(handle, &call, arrived, ask, &behaviour, number))
            } else {
                call_reply(handle, &call, arrived, ask, &behaviour, number)
            };
            (reply, Some(behaviour))
        }
    }
}

/// Answers a call about objects, and keeps what a model's answer makes.
fn object_reply(handle: &Handle, arrived: &Arrived, number: u64) -> Option<Reply> {
    let mut objects = lock(&handle.0.objects);
    if let Some(reply) = objects.answer(arrived, number) {
        return Some(reply);
    }
    let missing = objects.missing(&arrived.body);
    if missing.is_none() && arrived.path_and_query.ends_with("/responses") {
        objects.keep(&format!("resp_sim{number}"), "response", number);
    }
    missing
}

fn has_key(handle: &Handle, arrived: &Arrived) -> bool {
    let Some(key) = &handle.0.options.require_key else {
        return true;
    };
    key_of(arrived) == Some(key)
}

fn key_of(arrived: &Arrived) -> Option<&str> {
    arrived.headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}

/// True if the failure rate hits this request: failures are spread evenly by a counter.
fn fails(handle: &Handle, arrived: &Arrived, chosen: &Chosen) -> bool {
    let rate = u64::from(handle.0.options.failure_rate_percent.min(100));
    if chosen.scripted || arrived.method != Method::POST || rate == 0 {
        return false;
    }
    let count = handle.0.unscripted.fetch_add(1, Ordering::Relaxed);
    let position = count.wrapping_add(handle.0.options.seed) % 100;
    (position + 1) * rate / 100 > position * rate / 100
}

/// Call by the end of a path.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ApiCall<'a> {
    Chat,
    Completions,
    Embeddings,
    Responses,
    Moderations,
    Models,
    Model(&'a str),
    Unknown,
}

impl<'a> ApiCall<'a> {
    fn from_path(path: &'a str) -> Self {
        let ends = [
            ("/chat/completions", Self::Chat),
            ("/completions", Self::Completions),
            ("/embeddings", Self::Embeddings),
            ("/responses", Self::Responses),
            ("/moderations", Self::Moderations),
            ("/models", Self::Models),
        ];
        if let Some((_, call)) = ends.into_iter().find(|(end, _)| path.ends_with(end)) {
            return call;
        }
        match path.split_once("/models/") {
            Some((_, id)) if !id.is_empty() => Self::Model(id),
            _ => Self::Unknown,
        }
    }

    fn method(self) -> Method {
        if matches!(self, Self::Models | Self::Model(_)) { Method::GET } else { Method::POST }
    }
}

/// Answers that are the same on every path.
fn scripted_reply(behaviour: &Behaviour, arrived: &Arrived) -> Reply {
    if let Some(body) = &behaviour.body {
        return raw_reply(behaviour, body);
    }
    if behaviour.echo {
        return Reply::json(behaviour.status, json!({ "echo": arrived.to_json() }).to_string());
    }
    if behaviour.empty == Some(Empty::Body) || matches!(behaviour.status, 204 | 304) {
        return Reply::json(behaviour.status, "");
    }
    if (200..300).contains(&behaviour.status) {
        return Reply::json(behaviour.status, "{}");
    }
    Reply::error(behaviour.status, &message_of(behaviour.status), None)
}

fn message_of(status: u16) -> String {
    match status {
        429 => "Rate limit reached for requests.".into(),
        500.. => SERVER_ERROR.into(),
        _ => format!("The simulator was told to answer {status}."),
    }
}

fn raw_reply(behaviour: &Behaviour, body: &str) -> Reply {
    let is_stream = behaviour.content_type.as_ref().is_some_and(|kind| kind.starts_with("text/event-stream"));
    if !is_stream {
        return Reply::json(behaviour.status, body);
    }
    let events: Vec<_> = body.split_inclusive("\n\n").map(|event| Bytes::copy_from_slice(event.as_bytes())).collect();
    Reply::stream(behaviour.status, Box::new(events.into_iter()))
}

/// Answers a call as `OpenAI` would.
fn call_reply(
    handle: &Handle,
    call: &ApiCall<'_>,
    arrived: &Arrived,
    ask: Result<AskedFor, String>,
    behaviour: &Behaviour,
    number: u64,
) -> Reply {
    let (method, path) = (&arrived.method, &arrived.path_and_query);
    if *call == ApiCall::Unknown {
        return Reply::error(404, &format!("Invalid URL ({method} {path})"), None);
    }
    if *method != call.method() {
        return Reply::error(405, &format!("Not allowed to {method} on {path}."), None);
    }
    let options = &handle.0.options;
    match call {
        ApiCall::Models => return Reply::json(200, shapes::models(options)),
        ApiCall::Model(id) => {
            return shapes::model(options, id).map_or_else(|| model_not_found(id), |body| Reply::json(200, body));
        }
        _ => {}
    }
    let ask = match ask {
        Ok(ask) => ask,
        Err(message) => return Reply::error(400, &message, None),
    };
    let Some(model) = ask.model.as_deref().filter(|model| !model.is_empty()) else {
        return Reply::error(400, "you must provide a model parameter", None);
    };
    if options.strict_models && !options.models.iter().any(|known| known == model) {
        return model_not_found(model);
    }
    generated(*call, &ask, behaviour, number)
}

fn model_not_found(model: &str) -> Reply {
    let message = format!("The model `{model}` does not exist or you do not have access to it.");
    Reply::error(404, &message, Some("model_not_found"))
}

/// The generated answer of a POST call.
fn generated(call: ApiCall<'_>, ask: &AskedFor, behaviour: &Behaviour, number: u64) -> Reply {
    if behaviour.empty == Some(Empty::Object) {
        return Reply::json(200, "{}");
    }
    let streams = matches!(call, ApiCall::Chat | ApiCall::Completions | ApiCall::Responses);
    let asked = behaviour.answer_as.map_or(ask.stream, |form| form == AnswerAs::Sse);
    if streams && (asked || behaviour.ping_ms.is_some()) {
        return generated_stream(call, Text::new(ask, behaviour, number, true), behaviour);
    }
    if behaviour.first_event_error {
        return Reply::json(200, shapes::error(500, SERVER_ERROR, None));
    }
    if matches!(behaviour.empty, Some(Empty::NoEvents | Empty::DoneOnly)) {
        return Reply::json(200, "");
    }
    let text = Text::new(ask, behaviour, number, false);
    match call {
        ApiCall::Chat => Reply::json(200, shapes::chat(&text)),
        ApiCall::Completions => Reply::json(200, shapes::completion(&text)),
        ApiCall::Responses => Reply::json(200, responses::response(&text)),
        ApiCall::Embeddings => match embeddings::embeddings(ask, &text) {
            Ok(body) => Reply::json(200, body),
            Err(message) => Reply::error(400, &message, None),
        },
        _ => Reply::json(200, shapes::moderation(ask, &text)),
    }
}

fn generated_stream(call: ApiCall<'_>, text: Text, behaviour: &Behaviour) -> Reply {
    let one = |event: String| -> Events { Box::new(std::iter::once(Bytes::from(event))) };
    let events: Events = match behaviour.empty {
        _ if behaviour.first_event_error => one(format!("data: {}\n\n", shapes::error(500, SERVER_ERROR, None))),
        Some(Empty::NoEvents) => Box::new(std::iter::empty()),
        Some(Empty::DoneOnly) => one(shapes::DONE.into()),
        _ => match call {
            ApiCall::Chat => shapes::chat_events(text),
            ApiCall::Completions => shapes::completion_events(text),
            _ => responses::events(text),
        },
    };
    Reply::stream(200, events)
}
