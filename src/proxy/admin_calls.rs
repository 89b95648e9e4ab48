//! Calls of the admin API and of its page, which are answered here. No page of another origin may read them.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Method, Response, Version, header};
use pingora::http::RequestHeader;
use pingora::{Error, ErrorType, Result as PingoraResult};
use pingora_proxy::Session;

use super::context::{Context, Logged};
use super::intake::Stop;
use super::{Door, Gateway, outgoing, receive};
use crate::admin::{Answer, Sources, health};
use crate::console::{self, Author, Call, Live, Next};
use crate::request::auth;
use crate::request::connections::WRITE_MAX;
use crate::routing::pool::Pool;

/// Time within which a stream notices that the process is to go.
const DRAINING_SEEN_WITHIN: Duration = Duration::from_secs(1);

/// Answers a call. None if it was answered with a stream.
pub(super) async fn answer(
    gateway: &Gateway,
    session: &mut Session,
    context: &mut Context,
    pool: &Pool,
) -> Result<Option<Answer>, Stop> {
    context.arrival.own.origin = None;
    // The audit log has what it changes.
    context.arrival.logged = Logged::No;
    let header = session.req_header().clone();
    let authority = authority(&header);
    let call = call(session, &header, context, pool);
    let sources = Sources { authority, ..Sources::new(pool, &gateway.process) };
    let console = &gateway.console;
    if console::is_page(call.path) {
        if console.is_signed_in(pool, &call) {
            shows_key(context);
        }
        // Where the page has a listener of its own, clients have another address.
        let scheme = if call.is_secure { "https" } else { "http" };
        let base = (gateway.door == Door::All).then(|| format!("{scheme}://{}", call.authority));
        return Ok(Some(console.page(sources, &call, base.as_deref()).await?));
    }
    let admitted = console.admit(&gateway.auth, sources, &call).await?;
    if admitted.is_by_key() {
        shows_key(context);
    }
    let admitted = match admitted.watcher() {
        Ok(_) if header.method == Method::HEAD => {
            return Ok(Some(Answer { status: 200, ..Answer::text(String::new()) }));
        }
        Ok(watcher) => return stream(gateway, session, context, (sources, &call, watcher)).await.map(|()| None),
        Err(admitted) => admitted,
    };
    let body = if call.takes_body() {
        receive::body(gateway, session, admitted.body_bytes_max()).await?
    } else {
        Bytes::new()
    };
    Ok(Some(console.answer(&gateway.auth, sources, (&call, &body), admitted).await?))
}

/// Notes that a connection is no stranger's, which would be closed after a while.
fn shows_key(context: &Context) {
    if let Some(connection) = &context.arrival.connection {
        connection.shows_key();
    }
}

/// The document at `/`, if a browser asks for it and the page is here.
pub(super) fn root(gateway: &Gateway, session: &Session, context: &mut Context, pool: &Pool) -> Option<Answer> {
    if gateway.door == Door::Clients {
        return None;
    }
    let header = session.req_header();
    // Where the page has a listener of its own, clients have another address.
    let authority = authority(header).filter(|_| gateway.door == Door::All);
    let sources = Sources { authority, ..Sources::new(pool, &gateway.process) };
    let answer = console::root(pool, &call(session, header, context, pool), &health::welcome(sources))?;
    context.arrival.own.origin = None;
    context.arrival.logged = Logged::No;
    Some(answer)
}

/// Host and port that the client called, if it said so.
fn authority(header: &RequestHeader) -> Option<&str> {
    let host = header.headers.get(header::HOST).and_then(|host| host.to_str().ok());
    header.uri.authority().map(http::uri::Authority::as_str).or(host)
}

/// A request as the console has it.
fn call<'a>(session: &Session, header: &'a RequestHeader, context: &Context, pool: &Pool) -> Call<'a> {
    Call {
        method: &header.method,
        path: header.uri.path(),
        query: header.uri.query(),
        headers: &header.headers,
        authority: authority(header).unwrap_or_default(),
        address: context.arrival.address,
        is_secure: is_secure(session, pool),
    }
}

/// Sends the changes of a view, until its client leaves, may not see them any more, or the process goes.
async fn stream(
    gateway: &Gateway,
    session: &mut Session,
    context: &Context,
    (sources, call, watcher): (Sources<'_>, &Call<'_>, Author),
) -> Result<(), Stop> {
    let mut live = gateway.console.live(sources, call, watcher)?;
    outgoing::takes_within(session, context, WRITE_MAX);
    let mut parts = Response::new(()).into_parts().0;
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
        // nginx would keep events back.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    parts.headers.extend(headers.map(|(name, value)| (name, HeaderValue::from_static(value))));
    if session.req_header().version == Version::HTTP_11 {
        parts.headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    context.arrival.own.add_to(&mut parts.headers);
    session.write_response_header(Box::new(parts.into()), false).await.map_err(Stop::Gone)?;
    loop {
        let began = Instant::now();
        let piece = tokio::select! {
            left = session.downstream_session.read_body_or_idle(true) => return Err(gone(left)),
            piece = next(gateway, &mut live) => piece,
        };
        match piece {
            Next::Piece(piece) if piece.is_empty() => {}
            Next::Piece(piece) => session.write_response_body(Some(piece), false).await.map_err(Stop::Gone)?,
            Next::Last(piece) => return session.write_response_body(Some(piece), true).await.map_err(Stop::Gone),
        }
        let until = Instant::now() + live.pause(began.elapsed());
        while Instant::now() < until && !gateway.process.draining.is_on() {
            let pause = until.saturating_duration_since(Instant::now()).min(DRAINING_SEEN_WITHIN);
            tokio::select! {
                left = session.downstream_session.read_body_or_idle(true) => return Err(gone(left)),
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
}

/// The end of a stream whose client left. What else it sends on the connection is of no use to anybody.
fn gone(left: PingoraResult<Option<Bytes>>) -> Stop {
    Stop::Gone(left.err().unwrap_or_else(|| Error::new_down(ErrorType::ConnectionClosed)))
}

/// The next piece, of the config that is in use now.
async fn next(gateway: &Gateway, live: &mut Live) -> Next {
    let pool = gateway.process.pool.load_full();
    live.next(&gateway.console, Sources::new(&pool, &gateway.process)).await
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
