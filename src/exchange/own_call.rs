//! Calls of our own to an endpoint: whole answers, read into memory, for what no client's request can be passed on for.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, header};
use pingora::connectors::http::Connector;
use pingora::protocols::http::client::HttpSession;
use serde_json::Value;
use tokio::time::timeout;

use crate::config::CallKind;
use crate::response::decode::{Decoder, Encoding};
use crate::response::redact::Redactor;
use crate::routing::pool::Endpoint;
use crate::upstream::{ConnectError, Upstream};

/// Longest time for one call to an endpoint, unless its timeouts are shorter.
pub(crate) const CALL_MAX: Duration = Duration::from_mins(1);
/// Longest answer that is read, in bytes: a list of some thousand models or files.
const ANSWER_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Interim answers (1xx) before the endpoint's own.
const INTERIM_MAX: u32 = 100;

/// What failed, and the way out.
pub(crate) type Why = (String, String);

/// Calls of one endpoint, each on a connection of its own.
pub(crate) struct OwnCalls<'a> {
    pub(crate) endpoint: &'a Endpoint,
    /// The key, by its place among the endpoint's.
    pub(crate) lane: usize,
    kind: CallKind,
    upstream: &'a Upstream,
    address: SocketAddr,
    connector: Connector,
}

/// An endpoint's answer, with its secrets redacted.
pub(crate) struct OwnAnswer {
    pub(crate) status: u16,
    pub(crate) body: Bytes,
}

/// A call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OwnCall<'a> {
    pub(crate) method: &'a Method,
    /// Path under `/v1`, and query.
    pub(crate) target: &'a str,
    pub(crate) body: Option<&'a Value>,
    /// Headers of a client that go on, if it is made for one.
    pub(crate) headers: Option<&'a HeaderMap>,
}

impl<'a> OwnCall<'a> {
    /// A `GET`.
    pub(crate) fn get(target: &'a str) -> Self {
        Self { method: &Method::GET, target, body: None, headers: None }
    }

    /// A `POST`.
    pub(crate) fn post(target: &'a str, body: &'a Value) -> Self {
        Self { method: &Method::POST, target, body: Some(body), headers: None }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it stands where an error is mapped")]
fn broken(error: Box<pingora::Error>) -> Why {
    (ConnectError::explain(&error).to_string(), String::new())
}

/// Reads as far as the answer's own header, and returns its status and how the body is compressed. Until then there is no body that
/// could be read.
async fn final_header(session: &mut HttpSession) -> Result<(u16, Option<Encoding>), Why> {
    for _ in 0..INTERIM_MAX {
        session.read_response_header().await.map_err(broken)?;
        let Some(header) = session.response_header() else { break };
        if !header.status.is_informational() {
            return Ok((header.status.as_u16(), Encoding::from_headers(&header.headers)));
        }
    }
    Err(("no answer".to_owned(), String::new()))
}

impl<'a> OwnCalls<'a> {
    /// Calls of an endpoint with one of its keys, at this address of its door for calls of a kind.
    pub(crate) fn new(endpoint: &'a Endpoint, (kind, lane): (CallKind, usize), address: SocketAddr) -> Self {
        let upstream = endpoint.upstream_of(kind);
        Self { endpoint, lane, kind, upstream, address, connector: Connector::new(None) }
    }

    /// Connects, and no more.
    pub(crate) async fn connect(&self) -> Result<HttpSession, ConnectError> {
        let peer = self.upstream.peer(self.address, false, true, CALL_MAX);
        let connected = self.connector.get_http_session(&*peer).await;
        connected.map(|(session, _)| session).map_err(|error| ConnectError::explain(&error))
    }

    /// Makes a call, within the endpoint's own time for a first byte.
    pub(crate) async fn ask(&self, call: OwnCall<'_>) -> Result<OwnAnswer, Why> {
        let longest = self.endpoint.config.timeouts.first_byte.min(CALL_MAX);
        let too_slow = || {
            let what = format!("no whole answer within {} s", longest.as_secs());
            (what, "try again; a model that is being loaded takes its time".to_owned())
        };
        timeout(longest, self.exchange(call)).await.unwrap_or_else(|_| Err(too_slow()))
    }

    async fn exchange(&self, call: OwnCall<'_>) -> Result<OwnAnswer, Why> {
        let mut session = self.connect().await.map_err(|error| (error.what, error.way_out.to_owned()))?;
        let body = call.body.map(|body| Bytes::from(body.to_string()));
        let mut request = Request::new(()).into_parts().0;
        request.method = call.method.clone();
        request.headers = call.headers.cloned().unwrap_or_default();
        request.headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        request.headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(body) = &body {
            request.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            request.headers.insert(header::CONTENT_LENGTH, body.len().into());
        }
        let credential = self.endpoint.credential(self.kind, self.lane);
        let credential = credential.ok_or_else(|| ("it has no such key any more".to_owned(), String::new()))?;
        let endpoint = (&self.endpoint.config, credential);
        let dressed = self.upstream.dress(request, endpoint, call.target, false).map_err(broken)?;
        session.write_request_header(Box::new(dressed)).await.map_err(broken)?;
        if let Some(body) = body {
            session.write_request_body(body, true).await.map_err(broken)?;
        }
        session.finish_request_body().await.map_err(broken)?;
        let (status, encoding) = final_header(&mut session).await?;
        let mut read = Vec::new();
        while let Some(piece) = session.read_response_body().await.map_err(broken)? {
            read.extend_from_slice(&piece);
            if read.len() > ANSWER_BYTES_MAX {
                return Err((format!("an answer of more than {ANSWER_BYTES_MAX} bytes"), String::new()));
            }
        }
        let mut plain = Vec::new();
        match encoding {
            Some(encoding) => Decoder::new(encoding).feed(&read, |piece| plain.extend_from_slice(&piece)),
            None => plain = read,
        }
        let secrets = self.endpoint.lanes.get(self.lane).map(|lane| lane.secrets.clone()).unwrap_or_default();
        let body = Redactor::new(secrets).piece(&plain, true);
        Ok(OwnAnswer { status, body })
    }
}
