//! One request's state, grouped by stage. Guards release what they hold when they are dropped, however the request ends.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::failure::Follow;
use super::web_socket::WebSocket;
use crate::exchange::running::RunningGuard;
use crate::exchange::session::Wrapped;
use crate::exchange::{Ask, Asked, Exchange, OwnHeaders};
use crate::fault::{ErrorShape, Fault};
use crate::process::{OpenRequest, OpenRequests};
use crate::request::connections::OnConnection;
use crate::request::trace::Trace;
use crate::request_log::Attempted;
use crate::response::classify::Meaning;
use crate::response::redact::Redactor;
use crate::routing::admission::Choice;
use crate::routing::callers::Named;
use crate::routing::router::Tried;

/// One request, from its header to its last byte.
#[derive(Debug)]
pub struct Context {
    /// Arrival.
    pub arrival: Arrival,
    /// Request for an endpoint; `None` for resources of our own.
    pub ask: Option<Box<Ask>>,
    /// Attempts so far.
    pub tries: Tries,
    /// State that the hooks share with the session that holds the response back.
    pub exchange: Arc<Exchange>,
    /// The fault that we answered or that ended it.
    pub fault: Option<Fault>,
    /// The way back to the real session while it is wrapped.
    pub wrapped: Wrapped,
    /// True once the endpoint has switched protocols.
    pub switched: bool,
    /// State of a WebSocket.
    pub web_socket: Option<Box<WebSocket>>,
    /// Redacts the body of a refusal to switch protocols.
    pub refusal: Option<Redactor>,
    /// Its place among the requests that are under way, if they are listed.
    pub(crate) running: Option<RunningGuard>,
}

/// Whether a request is to be in the request log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logged {
    /// No: there is no log, or it has another.
    No,
    /// Only if something is wrong with it: it is answered here.
    IfWrong,
    /// Yes.
    Yes,
}

/// Arrival of a request.
#[derive(Debug)]
pub struct Arrival {
    /// When the header was read.
    pub at: Instant,
    /// Headers of our own for its answer, the request's id among them.
    pub own: OwnHeaders,
    /// The client's address, behind trusted proxies.
    pub address: Option<IpAddr>,
    /// The trace that it belongs to, if it is for an endpoint.
    pub trace: Option<Trace>,
    /// The caller, if it has a key of its own.
    pub named: Option<Arc<Named>>,
    /// The connection that it came on.
    pub(crate) connection: Option<OnConnection>,
    /// True if our own `x-api-together-*` headers are sent.
    pub endpoint_headers: bool,
    /// Shape of errors that the client reads.
    pub error_shape: ErrorShape,
    /// True for what process managers, load balancers and Prometheus ask for again and again.
    pub is_probe: bool,
    /// True once it has shown a right key.
    pub has_key: bool,
    /// Whether it is to be in the request log.
    pub logged: Logged,
    _open: OpenRequest,
}

impl Arrival {
    /// The request's id, for the log.
    pub fn id_text(&self) -> &str {
        self.own.id.as_ref().and_then(|id| id.to_str().ok()).unwrap_or("-")
    }
}

/// Attempts of a request.
#[derive(Debug, Default)]
pub struct Tries {
    /// The candidates tried; at most `retry.attempts`, a hundred.
    pub tried: Vec<Tried>,
    /// The proxy's own share of the time so far, until the first attempt is on its way.
    pub own: Option<Duration>,
    /// The choice that the first attempt goes to, until it begins.
    pub first: Option<Choice>,
    /// Step that follows the last attempt, or the beginning.
    pub follow: Follow,
    /// The endpoint's addresses that the current attempt failed to connect to.
    pub addresses_failed: usize,
    /// Number of times that the current attempt was repeated on a fresh connection, because its pooled one had been
    /// closed.
    pub reconnected: u32,
    /// What the error of the last attempt meant, if it was one.
    pub meaning: Option<Meaning>,
    /// Number of answers that were merely empty.
    pub empties: u32,
    /// Number of endpoints that did not have an object which nobody knows.
    pub absences: usize,
    /// Fault of a limit that was reached on the way, for the client if no other endpoint takes the request.
    pub limit: Option<Fault>,
    /// The endpoint of the last attempt that ended without an answer.
    pub last: Option<Asked>,
    /// Why the request failed, in words for the log.
    pub cause: Option<String>,
    /// Time for which it waited for a permit before its first attempt.
    pub queued: Duration,
    /// Those of the attempts that are over, if requests are logged.
    pub(crate) over: Vec<Attempted>,
}

impl Context {
    /// A request that has just come.
    pub fn new(open: &OpenRequests) -> Self {
        Self {
            arrival: Arrival {
                at: Instant::now(),
                own: OwnHeaders::default(),
                address: None,
                trace: None,
                named: None,
                connection: None,
                endpoint_headers: true,
                error_shape: ErrorShape::default(),
                is_probe: false,
                has_key: false,
                logged: Logged::No,
                _open: open.enter(),
            },
            ask: None,
            tries: Tries::default(),
            exchange: Arc::default(),
            fault: None,
            wrapped: Wrapped::default(),
            switched: false,
            web_socket: None,
            refusal: None,
            running: None,
        }
    }
}
