//! The calls by which other programs script the simulator.

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};

use super::behaviour::Behaviour;
use super::body::{BrokenOff, ScriptedBody};
use super::{Handle, lock, shapes};

/// Bytes of a script; far more than one written by hand or by a test.
const MAX_SCRIPT_BODY: usize = 16 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Script {
    model: String,
    behaviours: Vec<Behaviour>,
}

pub(super) fn is_control(path: &str) -> bool {
    path == "/control" || path.starts_with("/control/")
}

pub(super) async fn answer(handle: &Handle, request: Request<Incoming>) -> Result<Response<ScriptedBody>, BrokenOff> {
    let (head, body) = request.into_parts();
    let body = match Limited::new(body, MAX_SCRIPT_BODY).collect().await {
        Ok(whole) => whole.to_bytes(),
        Err(error) => return Ok(refuse(413, &error.to_string())),
    };
    Ok(match (head.method, head.uri.path()) {
        (Method::PUT, "/control/script") => put_script(handle, &body),
        (Method::GET, "/control/requests") => respond(200, list(handle).to_string()),
        (Method::DELETE, "/control") => {
            handle.clear();
            respond(200, "{}".into())
        }
        (method, path) => refuse(404, &format!("Invalid URL ({method} {path})")),
    })
}

fn put_script(handle: &Handle, body: &Bytes) -> Response<ScriptedBody> {
    match serde_json::from_slice::<Script>(body) {
        Ok(script) => {
            handle.script(&script.model, script.behaviours);
            respond(200, "{}".into())
        }
        Err(error) => refuse(400, &error.to_string()),
    }
}

fn list(handle: &Handle) -> Value {
    let started = handle.0.started;
    // Cloned out of the lock first: making JSON of large bodies takes time.
    let records = lock(&handle.0.records).list();
    let with_time = records.iter().map(|arrived| {
        let mut value = arrived.to_json();
        if let Some(fields) = value.as_object_mut() {
            let millis = arrived.at.saturating_duration_since(started).as_secs_f64() * 1000.0;
            fields.insert("atMs".into(), json!(millis));
        }
        value
    });
    with_time.collect()
}

fn refuse(status: u16, message: &str) -> Response<ScriptedBody> {
    respond(status, shapes::error(status, message, None))
}

fn respond(status: u16, body: String) -> Response<ScriptedBody> {
    let length = body.len();
    let mut response = Response::new(ScriptedBody::plain(body.into()));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or_default();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CONTENT_LENGTH, length.into());
    response
}
