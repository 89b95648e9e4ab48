//! A WebSocket whose model stands in its first message: the client's side is accepted, and the message read, before an endpoint is chosen.

use std::mem;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use pingora::protocols::Stream;
use pingora::protocols::http::ServerSession;
use pingora::protocols::http::v1::server::HttpSession;
use pingora::{Error, ErrorType};
use pingora_proxy::Session;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::stream::AcceptedStream;
use crate::exchange::OwnHeaders;
use crate::fault::Fault;
use crate::proxy::intake::Stop;
use crate::request::body_memory::{Memory, Reserved};
use crate::request::forward;
use crate::request::websocket::{self, MessageError, MessageReader};

/// Longest wait for the first message.
const FIRST_MESSAGE_MAX: Duration = Duration::from_secs(30);
/// What is read at once.
const PIECE_BYTES: usize = 16 * 1024;

/// Accepts the client's side, and returns its first message.
pub(in crate::proxy) async fn accept(
    session: &mut Session,
    own: &OwnHeaders,
    bytes_max: usize,
    memory: &Memory,
) -> Result<Bytes, Stop> {
    let taken = mem::replace(&mut *session.downstream_session, ServerSession::Custom(Box::new(())));
    let http1 = match taken {
        ServerSession::H1(http1) => http1,
        other => {
            *session.downstream_session = other;
            return Err(Fault::Internal.into());
        }
    };
    let handshake = http1.get_headers_raw_bytes();
    let answer = answer(&http1.req_header().headers, own);
    let mut stream = http1.into_inner();
    let mut said = BytesMut::new();
    let mut room = memory.room(0).await.ok_or(Fault::NoRoom)?;
    let first = async {
        stream.write_all(answer.as_bytes()).await.map_err(gone)?;
        stream.flush().await.map_err(gone)?;
        first_message(&mut stream, &mut said, bytes_max, &mut room).await
    };
    let first = tokio::time::timeout(FIRST_MESSAGE_MAX, first).await.unwrap_or(Err(Fault::BodyTimeout.into()));
    let mut http1 = HttpSession::new(Box::new(AcceptedStream::new(stream, handshake, &said, room)));
    let read = http1.read_request().await;
    *session.downstream_session = ServerSession::H1(http1);
    read.map_err(Stop::Gone)?;
    Ok(first?.into())
}

/// The answer to the handshake.
fn answer(headers: &HeaderMap, own: &OwnHeaders) -> String {
    let accept = headers.get(header::SEC_WEBSOCKET_KEY).map(|key| websocket::accept(key.as_bytes()));
    let mut ours = HeaderMap::new();
    own.add_to(&mut ours);
    if let Some(protocol) = headers.get(header::SEC_WEBSOCKET_PROTOCOL).and_then(forward::first_subprotocol) {
        ours.insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
    }
    let mut answer = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n".to_owned();
    let accept = accept.iter().map(|accept| ("sec-websocket-accept", accept.as_str()));
    let ours = ours.iter().filter_map(|(name, value)| Some((name.as_str(), value.to_str().ok()?)));
    for (name, value) in accept.chain(ours) {
        answer.extend([name, ": ", value, "\r\n"]);
    }
    answer.push_str("\r\n");
    answer
}

/// Reads until a message of text is whole. Everything that comes is kept in `said`.
async fn first_message(
    stream: &mut Stream,
    said: &mut BytesMut,
    bytes_max: usize,
    room: &mut Reserved,
) -> Result<Vec<u8>, Stop> {
    let mut reader = MessageReader::new(bytes_max);
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let count = stream.read(&mut piece).await.map_err(gone)?;
        let piece = piece.get(..count).filter(|piece| !piece.is_empty());
        let piece = piece.ok_or_else(|| gone(std::io::ErrorKind::UnexpectedEof.into()))?;
        said.extend_from_slice(piece);
        if said.len() > bytes_max {
            return Err(Fault::BodyTooLarge { bytes_max }.into());
        }
        // It is kept twice: as it came, and without its mask.
        if !room.reach(2 * said.len()).await {
            return Err(Fault::NoRoom.into());
        }
        reader.push(piece);
        while let Some(message) = reader.next().map_err(|error| fault_of(error, bytes_max))? {
            if message.is_close() {
                return Err(gone(std::io::ErrorKind::ConnectionAborted.into()));
            }
            if let Some(text) = message.text {
                return Ok(text);
            }
        }
    }
}

fn fault_of(error: MessageError, bytes_max: usize) -> Fault {
    match error {
        MessageError::TooLong => Fault::BodyTooLarge { bytes_max },
        MessageError::Unframed => Fault::RequestInvalid {
            problem: "The client's frames are not those of a WebSocket (RFC 6455, 5.2).".into(),
        },
    }
}

fn gone(error: std::io::Error) -> Stop {
    Stop::Gone(
        Error::because(ErrorType::ConnectionClosed, "before the first message of a WebSocket", error).into_down(),
    )
}
