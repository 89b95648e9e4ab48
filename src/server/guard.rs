//! Stands between the listener and Pingora: takes a connection in, or not, waits for its first bytes, and watches what it reads until it
//! has shown a right key ([`crate::request::connections`]).
//!
//! Pingora has no hook between accepting a connection and a whole header, so its stream is wrapped. The wrapper is handed to every
//! request as the digest of an outbound proxy, which a listener never has.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use pingora::apps::ServerApp;
use pingora::http::ResponseHeader;
use pingora::listeners::tls::Acceptor;
use pingora::protocols::l4::stream::Stream as TcpConnection;
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::tls::{SslDigest, TlsStream};
use pingora::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream, TimingDigest,
    UniqueID, UniqueIDType,
};
use pingora::server::ShutdownWatch;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use crate::fault::{ErrorShape, Fault};
use crate::request::auth;
use crate::request::connections::{Connection, Connections, Reason};
use crate::routing::pool::Pool;

/// How a connection over HTTP/2 in plain text begins (RFC 9113, 3.4).
const HTTP2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What is read at once when a connection begins; nearly every header fits.
const FIRST_BYTES: usize = 2048;

/// The app that Pingora hands connections to.
pub(super) struct Guard<A> {
    pub(super) app: Arc<A>,
    pub(super) connections: Connections,
    pub(super) pool: Arc<ArcSwap<Pool>>,
    pub(super) tls: Option<Acceptor>,
}

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> ServerApp for Guard<A> {
    async fn process_new(self: &Arc<Self>, stream: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        let place = {
            let server = &self.pool.load().server;
            let peer = stream.get_socket_digest().and_then(|digest| Some(digest.peer_addr()?.as_inet()?.ip()));
            self.connections.arrive(peer.filter(|peer| !auth::is_trusted(server, *peer)), &server.connections)?
        };
        let stream = stream.into_any().downcast::<TcpConnection>().ok()?;
        let ready: Stream = if let Some(acceptor) = &self.tls {
            // Boxed, since it would make the future of every connection larger, those in plain text included.
            Box::new(Box::pin(shake_hands(*stream, acceptor, &place.connection)).await?)
        } else {
            let mut guarded = Guarded::new(*stream, Arc::clone(&place.connection));
            guarded.look().await.ok()?;
            Box::new(guarded)
        };
        self.app.process_new(ready, shutdown).await
    }

    async fn cleanup(&self) {
        self.app.cleanup().await;
    }
}

/// Makes TLS of a connection, within its time.
async fn shake_hands(
    mut stream: TcpConnection,
    acceptor: &Acceptor,
    connection: &Arc<Connection>,
) -> Option<Guarded<TlsStream<TcpConnection>>> {
    let handshake = async {
        // Until a byte has come there is no handshake, which takes memory.
        stream.try_peek(&mut [0]).await.ok()?;
        // A part of no header, whose bytes are counted when they are decrypted.
        connection.came(0);
        acceptor.tls_handshake(stream).await.inspect_err(|error| log::debug!("TLS: {error}")).ok()
    };
    tokio::select! {
        stream = handshake => Some(Guarded::new(stream?, Arc::clone(connection))),
        _ = ended(connection) => None,
    }
}

/// Waits until a connection is to be closed.
async fn ended(connection: &Connection) -> io::ErrorKind {
    std::future::poll_fn(|context| {
        connection.wait(context.waker());
        connection.told().map_or(Poll::Pending, Poll::Ready)
    })
    .await
}

/// A connection's stream.
#[derive(Debug)]
struct Guarded<S> {
    inner: S,
    connection: Arc<Connection>,
    digest: Option<Arc<ProxyDigest>>,
    /// What was looked at before anybody has read it.
    seen: Seen,
    is_http2: bool,
    /// True while a write waits for the client.
    is_write_waiting: bool,
}

/// What has come before anybody read it, and how much of it was read since. Nothing is kept once all of it was.
#[derive(Debug, Default)]
struct Seen {
    bytes: Vec<u8>,
    read: usize,
}

impl Seen {
    fn unread(&self) -> &[u8] {
        self.bytes.get(self.read..).unwrap_or_default()
    }

    /// True as long as it may be how HTTP/2 begins.
    fn may_be_http2(&self) -> bool {
        let count = self.bytes.len().min(HTTP2_PREFACE.len());
        self.bytes.get(..count) == HTTP2_PREFACE.get(..count)
    }

    /// Hands on what is unread, as far as there is room.
    fn hand_on(&mut self, buffer: &mut ReadBuf<'_>) {
        let count = self.unread().len().min(buffer.remaining());
        buffer.put_slice(self.unread().get(..count).unwrap_or_default());
        self.read += count;
        if self.unread().is_empty() {
            *self = Self::default();
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Ssl> Guarded<S> {
    fn new(inner: S, connection: Arc<Connection>) -> Self {
        let data = Box::new(Arc::clone(&connection));
        let header = ResponseHeader::build_no_case(200, Some(0)).ok();
        let digest = header.map(|header| Arc::new(ProxyDigest::new(Box::new(header), Some(data))));
        let is_http2 = matches!(inner.selected_alpn_proto(), Some(ALPN::H2));
        Self { inner, connection, digest, seen: Seen::default(), is_http2, is_write_waiting: false }
    }

    /// Reads what comes first, at least as much as it takes to tell HTTP/2 from HTTP/1. The request gets it all the same.
    async fn look(&mut self) -> io::Result<()> {
        while self.seen.bytes.len() < HTTP2_PREFACE.len() && self.seen.may_be_http2() {
            let count = self.seen.bytes.len();
            std::future::poll_fn(|context| self.poll_first(context)).await?;
            if self.seen.bytes.len() == count {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        self.is_http2 = self.seen.may_be_http2();
        Ok(())
    }

    fn poll_first(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // On the stack, since a connection that says nothing should have no buffer.
        let mut bytes = [0; FIRST_BYTES];
        let mut piece = ReadBuf::new(&mut bytes);
        let result = self.poll_read_watched(context, &mut piece);
        self.seen.bytes.extend_from_slice(piece.filled());
        result
    }

    /// Reads for a request that has not come yet, or for a stranger.
    fn poll_read_watched(&mut self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(told) = self.connection.told() {
            return Poll::Ready(Err(told.into()));
        }
        // HTTP/2 counts the bytes of a header by itself.
        let left = if self.is_http2 { usize::MAX } else { self.connection.header_bytes_left() };
        if left == 0 {
            self.refuse_header(context);
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        let before = buffer.filled().len();
        let result = if left >= buffer.remaining() {
            Pin::new(&mut self.inner).poll_read(context, buffer)
        } else {
            // No more than belongs to a header, so that what is counted is never a body.
            let mut piece = ReadBuf::new(buffer.initialize_unfilled_to(left));
            let result = Pin::new(&mut self.inner).poll_read(context, &mut piece);
            let came = piece.filled().len();
            buffer.advance(came);
            result
        };
        let came = buffer.filled().len() - before;
        if came > 0 {
            self.connection.came(came);
        } else if result.is_pending() {
            self.connection.wait(context.waker());
            // It may have been told something before it was known who waits.
            if let Some(told) = self.connection.told() {
                return Poll::Ready(Err(told.into()));
            }
        }
        result
    }

    /// Answers 431. What does not fit the socket at once is not sent.
    fn refuse_header(&mut self, context: &mut Context<'_>) {
        let fault = Fault::HeaderTooLong { bytes_max: self.connection.header_bytes_max() };
        let body = fault.json(ErrorShape::default());
        let answer = format!(
            "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
             connection: close\r\n\r\n{body}",
            body.len()
        );
        if Pin::new(&mut self.inner).poll_write(context, answer.as_bytes()).is_ready() {
            drop(Pin::new(&mut self.inner).poll_flush(context));
        }
        self.connection.end(Reason::HeaderBytes);
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Ssl> AsyncRead for Guarded<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.seen.unread().is_empty() {
            this.seen.hand_on(buffer);
            return Poll::Ready(Ok(()));
        }
        if this.connection.runs() {
            return Pin::new(&mut this.inner).poll_read(context, buffer);
        }
        this.poll_read_watched(context, buffer)
    }
}

impl<S> Guarded<S> {
    /// Watches a write, which costs something only while the client takes nothing.
    fn watch<T>(&mut self, result: Poll<io::Result<T>>, context: &Context<'_>) -> Poll<io::Result<T>> {
        if result.is_pending() {
            self.is_write_waiting = true;
            if self.connection.write_waits(context.waker()) {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        } else if self.is_write_waiting {
            self.is_write_waiting = false;
            self.connection.write_goes_on();
        }
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if !this.connection.runs() {
            this.connection.went();
        }
        let result = Pin::new(&mut this.inner).poll_write(context, bytes);
        this.watch(result, context)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.inner).poll_flush(context);
        this.watch(result, context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.connection.told().is_some() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        // It flushes first.
        let result = Pin::new(&mut this.inner).poll_shutdown(context);
        this.watch(result, context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if !this.connection.runs() {
            this.connection.went();
        }
        let result = Pin::new(&mut this.inner).poll_write_vectored(context, pieces);
        this.watch(result, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[async_trait]
impl<S: AsyncWrite + Unpin + Send> Shutdown for Guarded<S> {
    async fn shutdown(&mut self) {
        if let Err(error) = AsyncWriteExt::shutdown(self).await {
            log::debug!("a connection cannot be shut down: {error}");
        }
    }
}

impl<S: UniqueID> UniqueID for Guarded<S> {
    fn id(&self) -> UniqueIDType {
        self.inner.id()
    }
}

impl<S: Ssl> Ssl for Guarded<S> {
    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        self.inner.get_ssl_digest()
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        self.inner.selected_alpn_proto()
    }
}

impl<S: GetTimingDigest> GetTimingDigest for Guarded<S> {
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

impl<S> GetProxyDigest for Guarded<S> {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        self.digest.clone()
    }
}

impl<S: GetSocketDigest> GetSocketDigest for Guarded<S> {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.inner.get_socket_digest()
    }
}

#[async_trait]
impl<S: AsyncRead + AsyncWrite + Unpin + Ssl + Send> Peek for Guarded<S> {
    /// Pingora asks whether a connection in plain text begins like HTTP/2, which was looked at before.
    async fn try_peek(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        let unread = self.seen.unread();
        let count = buffer.len().min(unread.len());
        if let (Some(buffer), Some(unread)) = (buffer.get_mut(..count), unread.get(..count)) {
            buffer.copy_from_slice(unread);
        }
        Ok(true)
    }
}
