//! From an answer's content to hyper's response: header, length, delays and faults.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderName, HeaderValue, Response, StatusCode};

use super::behaviour::Behaviour;
use super::body::{Cutter, ScriptedBody, schedule};
use super::{Handle, shapes};

const JSON: &str = "application/json";
const SSE: &str = "text/event-stream; charset=utf-8";

/// A stream's events, each with its empty line.
pub(super) type Events = Box<dyn Iterator<Item = Bytes> + Send>;

/// Content of the body.
enum Content {
    Json(Bytes),
    Stream(Events),
}

/// An answer before the behaviour's delays and faults are applied.
pub(super) struct Reply {
    status: u16,
    content: Content,
}

impl Reply {
    pub(super) fn json(status: u16, body: impl Into<String>) -> Self {
        Self { status, content: Content::Json(body.into().into()) }
    }

    pub(super) fn stream(status: u16, events: Events) -> Self {
        Self { status, content: Content::Stream(events) }
    }

    pub(super) fn error(status: u16, message: &str, code: Option<&str>) -> Self {
        Self::json(status, shapes::error(status, message, code))
    }

    pub(super) fn into_response(
        self,
        handle: &Handle,
        behaviour: &Arc<Behaviour>,
        number: u64,
        cutter: Cutter,
    ) -> Response<ScriptedBody> {
        let http2 = cutter.http2;
        let pings = behaviour.ping_ms.is_some();
        let (kind, length, steps) = match self.content {
            Content::Json(body) => {
                let length = (!behaviour.chunked && !pings).then_some(body.len());
                (JSON, length, schedule(json_parts(body, behaviour), behaviour))
            }
            Content::Stream(events) => (SSE, None, schedule(events, behaviour)),
        };
        let mut response = Response::new(ScriptedBody::new(steps, length, cutter));
        *response.status_mut() = status_code(self.status);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        if let Some(length) = length.filter(|_| self.status != 204) {
            headers.insert(CONTENT_LENGTH, length.into());
        }
        if behaviour.early && !http2 {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        set(&mut response, "x-request-id", &format!("req_sim_{number}"));
        set(&mut response, "x-sim-name", &handle.0.options.name);
        if let Some(kind) = &behaviour.content_type {
            set(&mut response, CONTENT_TYPE.as_str(), kind);
        }
        add_scripted(&mut response, &behaviour.headers);
        response
    }
}

/// A JSON body is one event, or two halves if a fault is to fall between them.
fn json_parts(mut body: Bytes, behaviour: &Behaviour) -> Events {
    if behaviour.stall.is_none() && behaviour.reset.is_none() {
        return Box::new((!body.is_empty()).then_some(body).into_iter());
    }
    let first = body.split_to(body.len() / 2);
    Box::new([first, body].into_iter())
}

/// hyper would refuse 1xx; they are not final answers.
fn status_code(status: u16) -> StatusCode {
    match StatusCode::from_u16(status) {
        Ok(code) if status >= 200 => code,
        _ => {
            log::warn!("simulator: {status} is no final status, answering 500");
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}

fn set(response: &mut Response<ScriptedBody>, name: &'static str, value: &str) {
    match HeaderValue::from_str(value) {
        Ok(value) => {
            response.headers_mut().insert(name, value);
        }
        Err(error) => log::warn!("simulator: header {name}: {error}"),
    }
}

/// The first of a name replaces the generated header, further ones are added to it.
fn add_scripted(response: &mut Response<ScriptedBody>, scripted: &[(String, String)]) {
    let mut seen = Vec::new();
    for (name, value) in scripted {
        let parsed = (HeaderName::try_from(name.as_str()), HeaderValue::from_str(value));
        let (Ok(name), Ok(value)) = parsed else {
            log::warn!("simulator: no valid header: {name}: {value}");
            continue;
        };
        if seen.contains(&name) {
            response.headers_mut().append(name, value);
        } else {
            response.headers_mut().insert(name.clone(), value);
            seen.push(name);
        }
    }
}
