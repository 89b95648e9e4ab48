//! Our own answers: health, status, models, and every fault. Each is built here as a value; the proxy sends it.

pub(crate) mod health;
mod key;
mod lanes;
pub(crate) mod lists;
pub(crate) mod metrics;
pub(crate) mod models;
mod process_metrics;
pub(crate) mod status;
mod tokens;

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, header};

use crate::fault::{ErrorShape, Fault};
use crate::process::Process;
use crate::routing::callers::Caller;
use crate::routing::pool::Pool;

/// Longest wait after which SDKs should retry by themselves: OpenAI's Node SDK would sleep through any `Retry-After`, even until
/// the next day. A minute that has just filled up frees within 60.3 s.
const SDK_WAIT_MAX: Duration = Duration::from_secs(65);

/// An answer of our own.
#[derive(Debug)]
pub(crate) struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Headers, without length, request id and CORS, which every answer gets when it is sent.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Body.
    pub body: Bytes,
}

/// Sources of our own answers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sources<'a> {
    /// The endpoints that the request came to.
    pub pool: &'a Pool,
    /// The process.
    pub process: &'a Process,
    /// Host and port that the client called, if it said so.
    pub authority: Option<&'a str>,
    /// The caller, if it has a key of its own.
    pub caller: Option<&'a Caller>,
}

impl<'a> Sources<'a> {
    /// Sources of an answer that does not depend on the request.
    pub(crate) fn new(pool: &'a Pool, process: &'a Process) -> Self {
        Self { pool, process, authority: None, caller: None }
    }
}

/// One of our own resources.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Resource<'a> {
    /// `GET /`.
    Root,
    /// `GET /health`.
    Health,
    /// `GET /health/ready`.
    Ready,
    /// `GET /metrics`.
    Metrics,
    /// `GET /v1/status`.
    Status,
    /// `GET /v1/key`.
    Key,
    /// `GET /v1/models`.
    Models,
    /// `GET /v1/models/{model}`; the name as it stands in the path.
    Model(&'a str),
    /// `GET /v1/token/stats`.
    TokenStats,
    /// `POST /v1/token/reset`.
    TokenReset,
}

impl<'a> Resource<'a> {
    /// The resource that a path names, if it is one of ours: by the path as it came, or, for what is the API's, as it is
    /// `meant`. Only reading a model is ours; deleting one is an endpoint's.
    pub(crate) fn from_path(path: &str, meant: &'a str, method: &Method) -> Option<Self> {
        let reads = matches!(*method, Method::GET | Method::HEAD);
        // The program before this one took a slash at their end as well.
        match path.strip_suffix('/').unwrap_or(path) {
            "" => return Some(Self::Root),
            "/health" => return Some(Self::Health),
            "/health/ready" => return Some(Self::Ready),
            "/metrics" => return Some(Self::Metrics),
            "/v1/status" => return Some(Self::Status),
            "/v1/key" => return Some(Self::Key),
            "/v1/token/stats" => return Some(Self::TokenStats),
            "/v1/token/reset" => return Some(Self::TokenReset),
            _ => {}
        }
        match meant {
            "/v1/models" => Some(Self::Models),
            other if reads => other.strip_prefix("/v1/models/").map(Self::Model),
            _ => None,
        }
    }

    /// True for paths that are ours to answer and no endpoint's, however they were typed.
    pub(crate) fn is_reserved(meant: &str) -> bool {
        meant == "/v1/status"
            || meant == "/v1/key"
            || meant.starts_with("/v1/token/")
            || meant.strip_prefix("/v1/admin").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// True for what only the server's one key opens: it shows the whole gateway.
    pub(crate) fn is_for_operators(&self) -> bool {
        matches!(self, Self::Metrics | Self::Status | Self::TokenStats | Self::TokenReset)
    }

    /// Checks that it takes the method.
    pub(crate) fn check_method(&self, method: &Method) -> Result<(), Fault> {
        let allowed = if self.takes_body() { "POST" } else { "GET, HEAD" };
        let known = match *method {
            Method::POST => self.takes_body(),
            Method::GET | Method::HEAD => !self.takes_body(),
            _ => false,
        };
        if known { Ok(()) } else { Err(Fault::MethodNotAllowed { allowed }) }
    }

    /// True if no key is needed: process managers and load balancers have none.
    pub(crate) fn is_open_to_all(&self) -> bool {
        matches!(self, Self::Root | Self::Health | Self::Ready)
    }

    /// True for what is asked for again and again by programs that watch the process.
    pub(crate) fn is_probe(&self, method: &Method) -> bool {
        matches!(self, Self::Health | Self::Ready | Self::Metrics) || *self == Self::Root && *method == Method::HEAD
    }

    /// True if a request for it has a body with a meaning.
    pub(crate) fn takes_body(&self) -> bool {
        *self == Self::TokenReset
    }

    /// The answer to a request for it.
    pub(crate) async fn answer(&self, from: Sources<'_>, body: &[u8]) -> Result<Answer, Fault> {
        let (status, body) = match self {
            Self::Root => return Ok(Answer::text(health::welcome(from))),
            Self::Health => (200, health::health()),
            Self::Ready => health::ready(from),
            Self::Metrics => return Ok(Answer::metrics(metrics::text(from).await)),
            Self::Status => (200, status::status(from).await),
            Self::Key => (200, key::key(from).await),
            Self::Models => (200, models::list(from.pool, from.caller)),
            Self::Model(name) => (200, models::one(from.pool, name, from.caller)?),
            Self::TokenStats => (200, tokens::stats(from).await?),
            Self::TokenReset => (200, tokens::reset(from, body).await?),
        };
        Ok(Answer::json(status, body))
    }
}

impl Answer {
    /// An answer that is JSON.
    pub(crate) fn json(status: u16, body: impl Into<Bytes>) -> Self {
        let content_type = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Self { status, headers: vec![content_type], body: body.into() }
    }

    /// An answer in words.
    pub(crate) fn text(text: String) -> Self {
        let content_type = (header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        Self { status: 200, headers: vec![content_type], body: text.into() }
    }

    /// An answer that is Prometheus's.
    pub(crate) fn metrics(text: Vec<u8>) -> Self {
        let content_type = (header::CONTENT_TYPE, HeaderValue::from_static(crate::telemetry::metrics::CONTENT_TYPE));
        Self { status: 200, headers: vec![content_type], body: text.into() }
    }

    /// The answer to a CORS preflight (Fetch standard, 3.3.2): every method and header we know may be used.
    pub(crate) fn preflight(requested_headers: Option<&HeaderValue>) -> Self {
        let allow_headers = requested_headers.cloned().unwrap_or_else(|| HeaderValue::from_static("*"));
        let headers = vec![
            (
                header::ACCESS_CONTROL_ALLOW_METHODS,
                HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
            ),
            (header::ACCESS_CONTROL_ALLOW_HEADERS, allow_headers),
            (header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400")),
        ];
        Self { status: 204, headers, body: Bytes::new() }
    }
}

impl Answer {
    /// The answer that tells a fault, in the shape that its client reads.
    pub(crate) fn of_fault(fault: &Fault, shape: ErrorShape) -> Self {
        let mut answer = Self::json(fault.status(), fault.json(shape));
        if let Some(wait) = fault.retry_after() {
            let millis = wait.as_millis().max(1);
            // Whole seconds, rounded up: a client that waits that long must not come too early.
            let seconds = millis.div_ceil(1000);
            let number = |value: u128| HeaderValue::from(u64::try_from(value).unwrap_or(u64::MAX));
            answer.headers.push((header::RETRY_AFTER, number(seconds)));
            answer.headers.push((HeaderName::from_static("retry-after-ms"), number(millis)));
        }
        // OpenAI's SDKs would wait for so long; and some clients ask again and again, and say nothing of a key that is wrong.
        let waits_too_long = fault.retry_after().is_some_and(|wait| wait > SDK_WAIT_MAX);
        let never_helps = matches!(
            fault,
            Fault::KeyWrong | Fault::KeyEnded { .. } | Fault::EndpointKeyRefused | Fault::BudgetExhausted(_)
        );
        if waits_too_long || never_helps {
            let never = HeaderValue::from_static("false");
            answer.headers.push((HeaderName::from_static("x-should-retry"), never));
        }
        if let Some(allowed) = fault.allow() {
            answer.headers.push((header::ALLOW, HeaderValue::from_static(allowed)));
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_paths_are_ours() {
        let of = |path| Resource::from_path(path, path, &Method::GET);
        assert_eq!((of("/"), of("//"), of("/index.html")), (Some(Resource::Root), None, None));
        assert_eq!(of("/health"), Some(Resource::Health));
        assert_eq!(of("/health/ready"), Some(Resource::Ready));
        assert_eq!(of("/v1/models"), Some(Resource::Models));
        assert_eq!(Resource::from_path("//models/", "/v1/models", &Method::GET), Some(Resource::Models));
        assert_eq!(Resource::from_path("//v1/status", "/v1/status", &Method::GET), None, "to its exact path only");
        assert!(Resource::is_reserved("/v1/status") && Resource::is_reserved("/v1/key"));
        assert_eq!(of("/v1/key"), Some(Resource::Key));
        assert_eq!(of("/v1/models/meta/llama"), Some(Resource::Model("meta/llama")));
        assert_eq!(of("/v1/chat/completions"), None);
        assert_eq!(Resource::from_path("/v1/models/ft:mine", "/v1/models/ft:mine", &Method::DELETE), None);
        assert_eq!(of("/v1/token/reset"), Some(Resource::TokenReset));
        assert!(Resource::TokenReset.check_method(&Method::GET).is_err());
        assert!(Resource::TokenStats.check_method(&Method::HEAD).is_ok());
    }

    #[test]
    fn waits_are_rounded_up() {
        let answer = Answer::of_fault(
            &Fault::LimitsReached { wait: Duration::from_millis(1201), held: Vec::new() },
            ErrorShape::OpenAi,
        );
        let value = |name: &str| answer.headers.iter().find(|(n, _)| n.as_str() == name).unwrap().1.to_str().unwrap();
        assert_eq!(value("retry-after"), "2");
        assert_eq!(value("retry-after-ms"), "1201");
    }
}
