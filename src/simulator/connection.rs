//! One connection: protocol, idle closing, breaking off, and the count of open requests.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

use super::behaviour::ResetHow;
use super::{Handle, answer};

/// HTTP/2 streams at once on one connection; benches of multiplexing need more than hyper's 200.
const MAX_STREAMS: u32 = 1_000;

/// Streams the peer may reset before they are answered. Tests of cancellation do that on
/// purpose, and hyper's 20 would take them for an attack.
const MAX_PENDING_RESETS: usize = 1_000;

/// Protocol of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/2 if the client begins with its preface, else HTTP/1.1.
    #[default]
    Auto,
    /// Only HTTP/1.1.
    Http1,
    /// Only HTTP/2.
    Http2,
}

/// Serves one already accepted stream, for instance a TLS one, in a task of its own. To be
/// called inside a tokio runtime. A scripted `rst` only drops the stream here: see
/// [`serve_with_abort`].
pub fn serve_stream<IO>(handle: &Handle, io: IO, protocol: Protocol)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    serve_with_abort(handle, io, protocol, |_| ());
}

/// Like [`serve_stream`]; `abort` is called before the stream is dropped for a scripted `rst`, to set a zero linger
/// time on the socket within.
pub fn serve_with_abort<IO>(handle: &Handle, io: IO, protocol: Protocol, abort: fn(&IO))
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    handle.spawn(serving(handle, io, protocol, abort));
}

/// The work of one connection; counts it at once.
pub(super) fn serving<IO>(
    handle: &Handle,
    io: IO,
    protocol: Protocol,
    abort: fn(&IO),
) -> impl Future<Output = ()> + Send + 'static
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let number = handle.0.connections.fetch_add(1, Ordering::SeqCst) + 1;
    let line = Arc::new(Line::new(number));
    let wire = Wire { io, line: Arc::clone(&line), abort };
    run(handle.clone(), line, wire, protocol)
}

async fn run<IO>(handle: Handle, line: Arc<Line>, wire: Wire<IO>, protocol: Protocol)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let builder = builder(&handle, protocol);
    let service = service_fn(|request| answer::answer(handle.clone(), Arc::clone(&line), request));
    let mut connection = pin!(builder.serve_connection(TokioIo::new(wire), service));
    tokio::select! {
        // First, so that what was written goes out before the cut.
        biased;
        result = connection.as_mut() => return log_end(line.number, result),
        () = line.cut.notified() => return,
        () = line.idle(handle.0.options.idle_close) => {}
    }
    connection.as_mut().graceful_shutdown();
    tokio::select! {
        biased;
        result = connection.as_mut() => log_end(line.number, result),
        () = line.cut.notified() => {}
    }
}

fn builder(handle: &Handle, protocol: Protocol) -> Builder<Spawner> {
    let mut builder = Builder::new(Spawner(handle.clone()));
    builder.http2().max_concurrent_streams(MAX_STREAMS).max_pending_accept_reset_streams(MAX_PENDING_RESETS);
    match protocol {
        Protocol::Auto => builder,
        Protocol::Http1 => builder.http1_only(),
        Protocol::Http2 => builder.http2_only(),
    }
}

fn log_end<E: std::fmt::Display>(number: u64, result: Result<(), E>) {
    if let Err(error) = result {
        log::debug!("simulator: connection {number} ended: {error}");
    }
}

/// Runs hyper's HTTP/2 tasks, so that they end with the simulator.
#[derive(Clone)]
struct Spawner(Handle);

impl<F> Executor<F> for Spawner
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

/// State that a connection and its requests share.
pub(super) struct Line {
    pub(super) number: u64,
    /// Requests being answered on it.
    open: AtomicUsize,
    since: Instant,
    /// Milliseconds from `since` to the last byte or the last request's end.
    active: AtomicU64,
    cut: Notify,
    rst: AtomicBool,
}

impl Line {
    fn new(number: u64) -> Self {
        Self {
            number,
            open: AtomicUsize::new(0),
            since: Instant::now(),
            active: AtomicU64::new(0),
            cut: Notify::new(),
            rst: AtomicBool::new(false),
        }
    }

    /// Has the connection dropped as it is, without the answer's end.
    pub(super) fn cut(&self, how: ResetHow) {
        self.rst.store(how == ResetHow::Rst, Ordering::SeqCst);
        self.cut.notify_one();
    }

    fn touch(&self) {
        let now = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.active.store(now, Ordering::Relaxed);
    }

    /// Ends once nothing happened for `limit` while no request was open.
    async fn idle(&self, limit: Option<Duration>) {
        let Some(limit) = limit else {
            return std::future::pending().await;
        };
        loop {
            let active = Duration::from_millis(self.active.load(Ordering::Relaxed));
            let silent = self.since.elapsed().saturating_sub(active);
            let open = self.open.load(Ordering::SeqCst) > 0;
            if !open && silent >= limit {
                return;
            }
            let left = if open { limit } else { limit.saturating_sub(silent) };
            // At least a millisecond, the resolution of tokio's clock.
            tokio::time::sleep(left.max(Duration::from_millis(1))).await;
        }
    }
}

/// Counts a request as open until dropped, and as cancelled if dropped before its end.
pub(super) struct Guard {
    handle: Handle,
    line: Arc<Line>,
    finished: bool,
}

impl Guard {
    pub(super) fn new(handle: &Handle, line: &Arc<Line>) -> Self {
        handle.0.open.fetch_add(1, Ordering::SeqCst);
        line.open.fetch_add(1, Ordering::SeqCst);
        Self { handle: handle.clone(), line: Arc::clone(line), finished: false }
    }

    /// The end has come, by completion or by a scripted break.
    pub(super) fn finish(&mut self) {
        self.finished = true;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.line.touch();
        self.line.open.fetch_sub(1, Ordering::SeqCst);
        if !self.finished {
            self.handle.0.cancelled.fetch_add(1, Ordering::SeqCst);
        }
        self.handle.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The stream under the connection: notes activity, and resets on demand.
struct Wire<IO> {
    io: IO,
    line: Arc<Line>,
    abort: fn(&IO),
}

impl<IO> Drop for Wire<IO> {
    fn drop(&mut self) {
        if self.line.rst.load(Ordering::SeqCst) {
            (self.abort)(&self.io);
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Wire<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        if polled.is_ready() {
            self.line.touch();
        }
        polled
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Wire<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.io).poll_write(cx, buf);
        if polled.is_ready() {
            self.line.touch();
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        if polled.is_ready() {
            self.line.touch();
        }
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
