//! Calls of the admin API, which are answered here. No page of another origin may read them.

use bytes::Bytes;
use http::header;
use pingora_proxy::Session;

use super::context::{Context, Logged};
use super::intake::Stop;
use super::{Gateway, receive};
use crate::admin::{Answer, Sources};
use crate::console::Call;
use crate::request::auth;
use crate::routing::pool::Pool;

/// Answers a call.
pub(super) async fn answer(
    gateway: &Gateway,
    session: &mut Session,
    context: &mut Context,
    pool: &Pool,
) -> Result<Answer, Stop> {
    context.arrival.own.origin = None;
    // The audit log has what it changes.
    context.arrival.logged = Logged::No;
    let header = session.req_header().clone();
    let host = header.headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let authority = header.uri.authority().map(http::uri::Authority::as_str).or(host);
    let call = Call {
        method: &header.method,
        path: header.uri.path(),
        query: header.uri.query(),
        headers: &header.headers,
        authority: authority.unwrap_or_default(),
        address: context.arrival.address,
        is_secure: is_secure(session, pool),
    };
    let sources = Sources { authority, ..Sources::new(pool, &gateway.process) };
    let console = &gateway.console;
    let admitted = console.admit(&gateway.auth, sources, &call).await?;
    let body = if call.takes_body() {
        receive::body(gateway, session, admitted.body_bytes_max()).await?
    } else {
        Bytes::new()
    };
    Ok(console.answer(&gateway.auth, sources, (&call, &body), admitted).await?)
}

/// True if the client speaks TLS: with us, or with a reverse proxy that is trusted and says so.
fn is_secure(session: &Session, pool: &Pool) -> bool {
    let is_own = session.digest().is_some_and(|digest| digest.ssl_digest.is_some());
    let peer = session.client_addr().and_then(|address| address.as_inet()).map(std::net::SocketAddr::ip);
    let said = session.req_header().headers.get("x-forwarded-proto");
    is_own
        || peer.is_some_and(|peer| auth::is_trusted(&pool.server, peer))
            && said.is_some_and(|protocol| protocol == "https")
}
