//! Receiving a request's body: read within bounds of size, time and memory, and decoded if the client compressed it.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Version, header};
use pingora::ErrorType;
use pingora_proxy::Session;

use super::Gateway;
use super::intake::Stop;
use crate::fault::Fault;
use crate::request::body::{self, Collector};
use crate::request::body_memory::Reserved;
use crate::response::decode::{Decoder, Encoding};

/// Size and time up to which the rest of a body is read before an early answer, since a client that is still sending may
/// otherwise never see the answer.
const DRAIN_BYTES_MAX: usize = 1024 * 1024;
const DRAIN_TIME_MAX: Duration = Duration::from_secs(2);

/// Reads the body to its end, and decodes it.
pub(super) async fn body(gateway: &Gateway, session: &mut Session, bytes_max: usize) -> Result<Bytes, Stop> {
    let headers = &session.req_header().headers;
    let encoding = encoding(headers)?;
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    let mut collector = Collector::new(declared, bytes_max)?;
    // Before it is asked for.
    let mut room = gateway.process.memory.room(collector.declared()).await.ok_or(Fault::NoRoom)?;
    if expects_continue(session) {
        session.downstream_session.write_continue_response().await.map_err(Stop::Gone)?;
    }
    let whole = async {
        while let Some(chunk) = next_chunk(session).await? {
            if !room.reach((collector.bytes() + chunk.len()).min(bytes_max)).await {
                return Err(Fault::NoRoom.into());
            }
            collector.push(chunk)?;
        }
        let body = collector.finish();
        match encoding {
            Some(encoding) if !body.is_empty() => {
                let plain = decoded(&body, encoding, bytes_max, &mut room).await?;
                Ok(room.hold(plain))
            }
            _ => Ok(room.hold(body)),
        }
    };
    within(body::BODY_TOTAL_TIMEOUT, pin!(whole)).await.unwrap_or(Err(Stop::Unframed(Fault::BodyTimeout)))
}

/// Returns the compression of a body; `None` if it is plain.
fn encoding(headers: &HeaderMap) -> Result<Option<Encoding>, Fault> {
    match Encoding::from_headers(headers) {
        Some(Encoding::Unknown) => Err(Fault::EncodingUnknown),
        known => Ok(known),
    }
}

/// Decodes a body, which may expand to as many bytes as a plain one may have.
async fn decoded(body: &[u8], encoding: Encoding, bytes_max: usize, room: &mut Reserved) -> Result<Bytes, Fault> {
    /// Bytes that are decoded before room is made for what they expand to.
    const STEP_BYTES: usize = 4 * 1024;
    let mut decoder = Decoder::new(encoding);
    let mut plain = BytesMut::new();
    for step in body.chunks(STEP_BYTES) {
        decoder.feed(step, |part| plain.extend_from_slice(&part));
        if plain.len() > bytes_max {
            return Err(Fault::BodyTooLarge { bytes_max });
        }
        if !room.reach(plain.len()).await {
            return Err(Fault::NoRoom);
        }
    }
    if decoder.is_broken() {
        let problem = "The request body is not what its Content-Encoding says.".into();
        return Err(Fault::RequestInvalid { problem });
    }
    Ok(plain.freeze())
}

/// Runs a future for at most this time. Most bodies have come with their header, and need no timer.
async fn within<F: Future>(time: Duration, mut future: Pin<&mut F>) -> Option<F::Output> {
    match poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await {
        Poll::Ready(output) => Some(output),
        Poll::Pending => Box::pin(tokio::time::timeout(time, future)).await.ok(),
    }
}

async fn next_chunk(session: &mut Session) -> Result<Option<Bytes>, Stop> {
    let read = session.downstream_session.read_request_body();
    let Some(chunk) = within(body::BODY_IDLE_TIMEOUT, pin!(read)).await else {
        return Err(Stop::Unframed(Fault::BodyTimeout));
    };
    chunk.map_err(|error| {
        use ErrorType::{ConnectionClosed, H2Error, ReadError, ReadTimedout, WriteError};
        if matches!(error.etype(), ConnectionClosed | H2Error | ReadError | ReadTimedout | WriteError) {
            return Stop::Gone(error);
        }
        let problem = format!("The request body is not framed as HTTP says: {}.", error.etype().as_str());
        Stop::Unframed(Fault::RequestInvalid { problem })
    })
}

fn expects_continue(session: &Session) -> bool {
    let header = session.req_header();
    let expect = header.headers.get(header::EXPECT);
    header.version == Version::HTTP_11
        && expect.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Reads the rest of a body that is not needed, within bounds.
pub(super) async fn drain(session: &mut Session) {
    if expects_continue(session) || session.is_upgrade_req() {
        return;
    }
    let rest = async {
        let mut read = 0;
        while let Ok(Some(chunk)) = session.downstream_session.read_request_body().await {
            read += chunk.len();
            if read > DRAIN_BYTES_MAX {
                break;
            }
        }
    };
    // Out of time: the answer is sent anyway.
    tokio::time::timeout(DRAIN_TIME_MAX, rest).await.unwrap_or_default();
}
