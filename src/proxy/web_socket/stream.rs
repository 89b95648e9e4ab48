//! A client's connection whose WebSocket was accepted before an endpoint was chosen. Pingora finds the handshake on it as if it had just
//! come, then what the client has said since, and what it answers to the handshake is left off.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use memchr::memmem;
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::tls::SslDigest;
use pingora::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream, TimingDigest,
    UniqueID, UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use crate::request::body_memory::Reserved;
use crate::request::connections::Connection;

/// What a client may say before its endpoint has switched protocols, beside its first message. The rest waits in the socket.
const WAITING_BYTES_MAX: usize = 64 * 1024;
/// End of a header.
const HEADER_END: &[u8] = b"\r\n\r\n";

/// The connection.
#[derive(Debug)]
pub(super) struct AcceptedStream {
    inner: Stream,
    /// The handshake, as far as it is unread.
    handshake: Bytes,
    /// What the client has said and nobody has read yet.
    said: BytesMut,
    /// Length of that at which nothing more is read before the endpoint has answered.
    said_max: usize,
    /// The last bytes of the answer to the handshake, until it is over.
    answer_tail: Option<Vec<u8>>,
    has_ended: bool,
    /// Room for what the client has said.
    room: Option<Reserved>,
}

impl AcceptedStream {
    pub(super) fn new(inner: Stream, handshake: Bytes, said: &[u8], room: Reserved) -> Self {
        let said_max = said.len() + WAITING_BYTES_MAX;
        Self {
            inner,
            handshake,
            said: said.into(),
            said_max,
            answer_tail: Some(Vec::new()),
            has_ended: false,
            room: Some(room),
        }
    }

    /// Reads ahead while the endpoint is asked, so that a client that disconnects is noticed.
    fn poll_ahead(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.has_ended && self.said.len() < self.said_max {
            let mut bytes = [0; 4096];
            let mut piece = ReadBuf::new(&mut bytes);
            std::task::ready!(Pin::new(&mut self.inner).poll_read(context, &mut piece))?;
            self.has_ended = piece.filled().is_empty();
            self.said.extend_from_slice(piece.filled());
        }
        if self.has_ended {
            return Poll::Ready(Ok(()));
        }
        // Nothing more is read, but what its guard would say to a reader is heard.
        let digest = self.inner.get_proxy_digest();
        let connection =
            digest.as_ref().and_then(|digest| digest.user_data.as_ref()?.downcast_ref::<Arc<Connection>>());
        if let Some(connection) = connection {
            connection.wait(context.waker());
            if let Some(told) = connection.told() {
                return Poll::Ready(Err(told.into()));
            }
        }
        Poll::Pending
    }
}

impl AsyncRead for AcceptedStream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.handshake.is_empty() {
            let count = this.handshake.len().min(buffer.remaining());
            buffer.put_slice(&this.handshake.split_to(count));
            return Poll::Ready(Ok(()));
        }
        if this.answer_tail.is_some() {
            return this.poll_ahead(context);
        }
        if !this.said.is_empty() {
            let count = this.said.len().min(buffer.remaining());
            buffer.put_slice(&this.said.split_to(count));
            return Poll::Ready(Ok(()));
        }
        this.room = None;
        if this.has_ended {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut this.inner).poll_read(context, buffer)
    }
}

impl AsyncWrite for AcceptedStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let Some(tail) = &mut this.answer_tail else { return Pin::new(&mut this.inner).poll_write(context, bytes) };
        let before = tail.len();
        tail.extend_from_slice(bytes);
        let Some(end) = memmem::find(tail, HEADER_END) else {
            tail.drain(..tail.len().saturating_sub(HEADER_END.len() - 1));
            return Poll::Ready(Ok(bytes.len()));
        };
        this.answer_tail = None;
        Poll::Ready(Ok(end + HEADER_END.len() - before))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(context)
    }
}

#[async_trait]
impl Shutdown for AcceptedStream {
    async fn shutdown(&mut self) {
        if let Err(error) = AsyncWriteExt::shutdown(self).await {
            log::debug!("a connection cannot be shut down: {error}");
        }
    }
}

impl UniqueID for AcceptedStream {
    fn id(&self) -> UniqueIDType {
        self.inner.id()
    }
}

impl Ssl for AcceptedStream {
    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        self.inner.get_ssl_digest()
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        self.inner.selected_alpn_proto()
    }
}

impl GetTimingDigest for AcceptedStream {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        self.inner.get_timing_digest()
    }

    fn get_read_pending_time(&self) -> Duration {
        self.inner.get_read_pending_time()
    }

    fn get_write_pending_time(&self) -> Duration {
        self.inner.get_write_pending_time()
    }
}

impl GetProxyDigest for AcceptedStream {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        self.inner.get_proxy_digest()
    }
}

impl GetSocketDigest for AcceptedStream {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.inner.get_socket_digest()
    }
}

#[async_trait]
impl Peek for AcceptedStream {}
