//! The only `ProxyHttp` implementation. Its hooks know the order of the stages and nothing else.
//!
//! ```text
//! request_filter            arrival → auth → own answers                                  (intake)
//!                           body → model → candidates → session                           (asking)
//!                           first pick                                                    (intake)
//! ┌ upstream_peer           what follows → attempt → address                               (attempts)
//! │ connected_to_upstream   the header waits for the body                                   (outgoing)
//! │ upstream_request_filter path, headers, key, body, permit                               (outgoing)
//! │                         the wrapped session hands out the body; the endpoint answers;
//! │                         the wrapped session holds or commits                            (exchange)
//! │ response_filter         headers for the client                                         (outgoing)
//! └ error_while_proxy, fail_to_connect      what follows                                   (failure)
//! fail_to_proxy             the last error, for the client                                 (failure)
//! logging                   billing, metrics, log line                                     (ending)
//! ```

pub mod access_log;
mod admin_calls;
mod asking;
mod attempts;
mod context;
mod drawing;
mod ending;
mod failure;
mod intake;
mod logged;
mod outgoing;
mod receive;
mod web_socket;

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::StatusCode;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::protocols::Digest;
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, Result};
use pingora_proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};

use crate::admin::lists::Cursors;
use crate::console::Console;
use crate::exchange::scheduling::keep_heartbeat;
use crate::process::Process;
use crate::request::auth::Auth;
use context::Context;

/// What a listener serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// Everything.
    All,
    /// All but the admin API, which has a listener of its own.
    Clients,
    /// The admin API only.
    Admins,
}

/// The proxy. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Gateway {
    /// Authentication of clients.
    pub auth: Auth,
    /// State of the process.
    pub process: Process,
    /// Where pages of lists end.
    pub(crate) cursors: Arc<Cursors>,
    /// The admin API.
    pub(crate) console: Arc<Console>,
    /// What is served here.
    pub door: Door,
}

#[async_trait]
impl ProxyHttp for Gateway {
    /// Boxed, since Pingora moves it from future to future.
    type CTX = Box<Context>;

    fn new_ctx(&self) -> Box<Context> {
        keep_heartbeat();
        Box::new(Context::new(&self.process.open))
    }

    // Compression is the endpoint's matter; a module of ours would see answers that are dropped.
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    async fn request_filter(&self, session: &mut Session, context: &mut Self::CTX) -> Result<bool> {
        intake::request_filter(self, session, context).await
    }

    async fn upstream_peer(&self, session: &mut Session, context: &mut Self::CTX) -> Result<Box<HttpPeer>> {
        attempts::upstream_peer(session, context).await
    }

    async fn connected_to_upstream(
        &self,
        session: &mut Session,
        _reused: bool,
        peer: &HttpPeer,
        socket: RawFd,
        _digest: Option<&Digest>,
        context: &mut Self::CTX,
    ) -> Result<()> {
        outgoing::connected_to_upstream(session, peer, socket, context);
        Ok(())
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        context: &mut Self::CTX,
    ) -> Result<()> {
        outgoing::upstream_request_filter(session, request, context).await
    }

    async fn upstream_response_filter(
        &self,
        _session: &mut Session,
        header: &mut ResponseHeader,
        context: &mut Self::CTX,
    ) -> Result<()> {
        outgoing::upstream_response_filter(header, context)
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        header: &mut ResponseHeader,
        context: &mut Self::CTX,
    ) -> Result<()> {
        outgoing::response_filter(session, header, context)
    }

    async fn request_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        _end: bool,
        context: &mut Self::CTX,
    ) -> Result<()> {
        if context.switched {
            // Boxed, since it would make every other request's future larger.
            return Box::pin(web_socket::from_client(session, body, context, &self.process.memory)).await;
        }
        Ok(())
    }

    fn response_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        end: bool,
        context: &mut Self::CTX,
    ) -> Result<Option<Duration>> {
        outgoing::response_body_filter(body, end, context);
        Ok(None)
    }

    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        mut error: Box<Error>,
        context: &mut Self::CTX,
        reused: bool,
    ) -> Box<Error> {
        error.set_retry(failure::error_while_proxy(session, context, &error, reused));
        error
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        peer: &HttpPeer,
        context: &mut Self::CTX,
        mut error: Box<Error>,
    ) -> Box<Error> {
        error.set_retry(failure::fail_to_connect(context, peer, &error));
        error
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, context: &mut Self::CTX) -> FailToProxy {
        failure::fail_to_proxy(session, context, error).await
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, context: &mut Self::CTX) {
        ending::logging(session, error, context, &self.process).await;
    }

    // The record and the notes of each attempt say all that Pingora would, without its request headers.
    fn suppress_error_log(&self, _session: &Session, _context: &Self::CTX, _error: &Error) -> bool {
        true
    }

    fn suppress_proxy_warn_log(&self, _s: &Session, _c: &Self::CTX, _e: &Error, _w: ProxyWarnLogContext) -> bool {
        true
    }
}

/// True for the answer's own header: all but 1xx, and of those the one that switches protocols.
fn is_final(header: &ResponseHeader) -> bool {
    !header.status.is_informational() || header.status == StatusCode::SWITCHING_PROTOCOLS
}
