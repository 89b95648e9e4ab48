//! The session to the client, wrapped for the time of a proxied request: its body is replayed for every attempt, and its
//! response is held back until it may be committed.
//!
//! Pingora replays at most 64 KiB of a body and hangs on more, and writes a response through as it comes. Both are
//! decided by the downstream session, and Pingora lets a session of one's own stand in (`HttpSession::Custom`). So this
//! one passes everything on to the real session, except that
//! - the body, as it is sent to the endpoint, seems to come from the client whenever an attempt begins;
//! - responses go through a `HeldResponse` first; an answer that is dropped ends the attempt with an error, which the retry
//!   hooks take up;
//! - deadlines that Pingora does not know are kept while it waits for either side: first byte, and idle.

use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use http::HeaderMap;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::Digest;
use pingora::protocols::http::custom::CustomMessageWrite;
use pingora::protocols::http::custom::server::Session as CustomSession;
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora::protocols::l4::socket::SocketAddr;
use pingora::{Error, ErrorType, Result};
use pingora_proxy::Session;
use tokio::time::{Sleep, sleep_until};

use super::hold::{DueAction, HeldResponse};
use super::judge::Verdict;
use super::own_headers::OwnHeaders;
use super::scheduling::step_aside;
use super::{CutBy, Exchange};
use crate::routing::callers::Ending;
use crate::routing::pool::Pool;

/// The error that ends an attempt whose answer is dropped. The exchange has the reason.
fn give_up<T>() -> Result<T> {
    Error::err_up(ErrorType::Custom("the answer is not good enough"))
}

/// Framing of an answer of unknown length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// HTTP/1.0: it ends with the connection.
    Connection,
    /// HTTP/1.1: it comes in chunks, and its header says so.
    Chunks,
    /// HTTP/2.
    Frames,
}

/// Plan of a request: its body is replayed by it, its response held.
#[derive(Debug)]
pub struct Plan {
    /// True if there is a body to send.
    pub has_body: bool,
    /// The config the request runs under, which says what outcomes may be tried elsewhere.
    pub pool: Arc<Pool>,
    /// After this moment no other attempt begins.
    pub budget_ends: Instant,
    /// How the client's answer is framed.
    pub framing: Framing,
    /// True if the client asked for a stream, so that it may be sent comments.
    pub streams: bool,
    /// Longest silence of a stream before its client is sent a ping.
    pub ping: Option<Duration>,
    /// The end of the caller's own key, which may cut its requests off.
    pub ending: Option<Arc<Ending>>,
    /// Headers of our own.
    pub own_headers: OwnHeaders,
    /// Header that is forwarded to any endpoint; Pingora makes each attempt's out of it.
    pub header: RequestHeader,
}

/// Place that the real session returns to when the wrapped one is dropped.
type SessionSlot = Arc<Mutex<Option<Box<ServerSession>>>>;

/// The way back to the real session.
#[derive(Default)]
pub struct Wrapped(Option<SessionSlot>);

impl std::fmt::Debug for Wrapped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Wrapped({})", self.0.is_some())
    }
}

impl Wrapped {
    /// Wraps the session until [`Wrapped::unwrap_session`].
    pub fn wrap(session: &mut Session, plan: Plan, exchange: &Arc<Exchange>) -> Self {
        let slot = SessionSlot::default();
        let inner = mem::replace(&mut session.downstream_session, placeholder());
        let has_body = plan.has_body;
        let hold = HeldResponse::new(plan, exchange);
        let replay = Replay { inner, slot: Arc::clone(&slot), has_body, hold, flushing: false, alarm: None };
        *session.downstream_session = ServerSession::Custom(Box::new(replay));
        Self(Some(slot))
    }

    /// Gives the session its real self back.
    pub fn unwrap_session(&mut self, session: &mut Session) {
        let Some(slot) = self.0.take() else { return };
        // The wrapping one is dropped where it is, and hands the real one over.
        *session.downstream_session = ServerSession::Custom(Box::new(()));
        if let Some(inner) = slot.lock().unwrap_or_else(PoisonError::into_inner).take() {
            session.downstream_session = inner;
        }
    }
}

fn placeholder() -> Box<ServerSession> {
    Box::new(ServerSession::Custom(Box::new(())))
}

/// The wrapped session.
struct Replay {
    inner: Box<ServerSession>,
    slot: SessionSlot,
    has_body: bool,
    hold: HeldResponse,
    /// Set while held tasks are written out because their time is up; still set afterwards, the write was cut.
    flushing: bool,
    /// Rings when something is due, or before: what is due moves with every piece of an answer, and it is moved along only once it
    /// has rung.
    alarm: Option<Pin<Box<Sleep>>>,
}

impl Drop for Replay {
    fn drop(&mut self) {
        let inner = mem::replace(&mut self.inner, placeholder());
        *self.slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(inner);
    }
}

impl Replay {
    /// Writes committed tasks through.
    async fn forward(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        // A write that was cut is finished first.
        self.inner_writes().await?;
        let gathers = self.inner.as_http1().is_some() && self.hold.is_body_sent();
        let (out, failed) = self.hold.outgoing(tasks, gathers);
        // Writing nothing at all would end the response.
        let mut ended = false;
        if !out.is_empty() {
            self.hold.timers.pause();
            ended = match &mut *self.inner {
                ServerSession::H1(session) => session.response_duplex_vec(out).await?,
                // Boxed, since it would make every write's future larger.
                other => Box::pin(other.response_duplex_vec(out)).await?,
            };
        }
        if !ended {
            self.hold.resume();
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(ended),
        }
    }

    /// Writes what was gathered of a burst, unless the endpoint's next tasks come first. May be dropped at any moment: Pingora's
    /// session keeps what is being written.
    async fn write_gathered(&mut self) -> Result<()> {
        /// After the first look the half of this task that reads from the endpoint has room again, after the second one it has
        /// filled it, and since it is left to chance whether that is seen before this, there is a third one.
        const LOOKS: usize = 3;
        for _ in 0..LOOKS {
            step_aside().await;
        }
        for task in self.hold.outlet.take_gathered() {
            self.inner.send_downstream_proxy_task(task);
        }
        self.inner_writes().await
    }

    /// Finishes a write of the real session that was interrupted.
    async fn inner_writes(&mut self) -> Result<()> {
        if self.inner.has_pending_downstream_proxy_tasks() {
            self.inner.write_downstream_proxy_tasks().await?;
        }
        Ok(())
    }

    /// Writes a header of our own, or comments, which commit nothing. A write that is cut leaves the flag, as below.
    async fn write_raw(&mut self, tasks: Vec<HttpTask>) -> Result<()> {
        if tasks.is_empty() {
            return Ok(());
        }
        self.flushing = true;
        self.inner_writes().await?;
        self.inner.response_duplex_vec(tasks).await?;
        self.flushing = false;
        self.hold.pinged();
        Ok(())
    }

    /// Waits for the client to go, and sees to what is due meanwhile.
    async fn wait(&mut self) -> Result<Option<Bytes>> {
        loop {
            let Some(due_at) = self.hold.timers.due_at() else { return self.inner.read_body_or_idle(true).await };
            let due_at = due_at.into();
            let alarm = self.alarm.get_or_insert_with(|| Box::pin(sleep_until(due_at)));
            if alarm.deadline() > due_at {
                alarm.as_mut().reset(due_at);
            }
            tokio::select! {
                gone = self.inner.read_body_or_idle(true) => {
                    if gone.is_err() {
                        self.hold.measure_held();
                    }
                    return gone;
                }
                () = alarm => self.alarm = None,
            }
            if due_at <= tokio::time::Instant::now() {
                // Boxed, since it is rare and would make every wait's future larger.
                Box::pin(self.deadline_passed()).await?;
            }
        }
    }

    /// A deadline has passed: either what is held goes out, or the attempt is over.
    async fn deadline_passed(&mut self) -> Result<()> {
        match self.hold.due() {
            DueAction::Wait => Ok(()),
            DueAction::GiveUp => give_up(),
            DueAction::Raw(tasks) => self.write_raw(tasks).await,
            DueAction::End(tasks) => {
                self.flushing = true;
                self.inner.response_duplex_vec(tasks).await?;
                self.flushing = false;
                give_up()
            }
            DueAction::Flush(tasks) => {
                // Pingora drops this future when the endpoint sends more meanwhile. The held part fits any socket buffer, so the
                // write waits only for a client whose HTTP/2 window is shut. The flag stays then, and the answer is given up instead
                // of garbled.
                self.flushing = true;
                self.forward(tasks).await?;
                self.flushing = false;
                Ok(())
            }
        }
    }
}

#[async_trait]
impl CustomSession for Replay {
    // Replay of the body.

    fn enable_retry_buffering(&mut self) {
        // Pingora calls this once for each attempt, when its request header is on its way.
        self.hold.begin_attempt();
    }

    fn get_retry_buffer(&self) -> Option<Bytes> {
        // The body comes as if it were read just now: Pingora then reads the answer even if writing fails, and an endpoint that
        // answers 413 without reading is heard.
        None
    }

    fn retry_buffer_truncated(&self) -> bool {
        false
    }

    fn is_body_done(&mut self) -> bool {
        self.hold.is_body_sent()
    }

    fn is_body_empty(&mut self) -> bool {
        !self.has_body
    }

    // Hold of the response.

    async fn response_duplex_vec(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        if self.flushing {
            // The client takes nothing: no endpoint has a part in that.
            return Err(Error::explain(ErrorType::WriteTimedout, "the client takes no more").into_down());
        }
        if self.hold.is_committed() {
            return self.forward(tasks).await;
        }
        let now = Instant::now();
        let mut tasks = tasks.into_iter();
        while let Some(task) = tasks.next() {
            match self.hold.take_in(task, now)? {
                Verdict::Hold => {}
                Verdict::Drop(outcome) => {
                    self.hold.drop_answer(outcome);
                    return give_up();
                }
                Verdict::Commit => {
                    let mut out = self.hold.commit(now);
                    out.extend(tasks);
                    return self.forward(out).await;
                }
            }
        }
        if self.hold.is_merely_opened()
            && let Some(comments) = self.hold.take_comments()
        {
            Box::pin(self.write_raw(vec![comments])).await?;
        }
        Ok(false)
    }

    fn response_written(&self) -> Option<&ResponseHeader> {
        // Our own 100 (Continue) is not yet a response, nor is a header that was sent to keep the client waiting.
        if self.hold.is_merely_opened() {
            return None;
        }
        self.inner.response_written().filter(|header| !header.status.is_informational())
    }

    async fn read_body_or_idle(&mut self, _no_body_expected: bool) -> Result<Option<Bytes>> {
        if let Some(piece) = self.hold.next_body_piece() {
            return Ok(Some(piece));
        }
        if let Some(cork) = self.hold.take_cork() {
            // The body is on its way to the other half of this task, which writes it as soon as this one waits.
            step_aside().await;
            cork.pull();
        }
        self.inner_writes().await?;
        if self.hold.outlet.has_gathered() {
            self.write_gathered().await?;
        }
        let exchange = self.hold.exchange();
        let ending = self.hold.plan.ending.clone();
        let read = exchange.cancel.or(async {
            let Some(ending) = ending else { return Ok(self.wait().await) };
            // Boxed, since it would make every other caller's future larger.
            Box::pin(async {
                tokio::select! {
                    read = self.wait() => Ok(read),
                    () = ending.cut() => Err(CutBy::Key),
                }
            })
            .await
        });
        match read.await.unwrap_or(Err(CutBy::Operator)) {
            Ok(read) => read,
            Err(by) => {
                self.hold.note_cut(by);
                Err(Error::explain(ErrorType::ConnectionClosed, "it was cut off").into_down())
            }
        }
    }

    // Everything else is passed on to the real session.

    fn req_header(&self) -> &RequestHeader {
        &self.hold.plan.header
    }

    fn req_header_mut(&mut self) -> &mut RequestHeader {
        &mut self.hold.plan.header
    }

    async fn read_body_bytes(&mut self) -> Result<Option<Bytes>> {
        self.inner.read_request_body().await
    }

    async fn drain_request_body(&mut self) -> Result<()> {
        self.inner.drain_request_body().await
    }

    async fn write_response_header(&mut self, header: Box<ResponseHeader>, _end: bool) -> Result<()> {
        self.inner.write_response_header(header).await
    }

    async fn write_response_header_ref(&mut self, header: &ResponseHeader, _end: bool) -> Result<()> {
        self.inner.write_response_header_ref(header).await
    }

    async fn write_body(&mut self, data: Bytes, end: bool) -> Result<()> {
        self.inner.write_response_body(data, end).await
    }

    async fn write_trailers(&mut self, trailers: HeaderMap) -> Result<()> {
        self.inner.write_response_trailers(trailers).await
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) {
        self.inner.set_read_timeout(timeout);
    }

    fn get_read_timeout(&self) -> Option<Duration> {
        self.inner.get_read_timeout()
    }

    fn set_write_timeout(&mut self, timeout: Option<Duration>) {
        self.inner.set_write_timeout(timeout);
    }

    fn get_write_timeout(&self) -> Option<Duration> {
        self.inner.get_write_timeout()
    }

    fn set_total_drain_timeout(&mut self, timeout: Option<Duration>) {
        self.inner.set_total_drain_timeout(timeout);
    }

    fn get_total_drain_timeout(&self) -> Option<Duration> {
        self.inner.get_total_drain_timeout()
    }

    fn request_summary(&self) -> String {
        self.inner.request_summary()
    }

    async fn shutdown(&mut self, _code: u32, _context: &str) {
        self.inner.shutdown().await;
    }

    async fn finish(&mut self) -> Result<()> {
        self.inner.finish_body().await
    }

    fn body_bytes_sent(&self) -> usize {
        self.inner.body_bytes_sent()
    }

    fn body_bytes_read(&self) -> usize {
        self.inner.body_bytes_read()
    }

    fn digest(&self) -> Option<&Digest> {
        self.inner.digest()
    }

    fn digest_mut(&mut self) -> Option<&mut Digest> {
        self.inner.digest_mut()
    }

    fn client_addr(&self) -> Option<&SocketAddr> {
        self.inner.client_addr()
    }

    fn server_addr(&self) -> Option<&SocketAddr> {
        self.inner.server_addr()
    }

    fn pseudo_raw_h1_request_header(&self) -> Bytes {
        self.inner.to_h1_raw()
    }

    async fn finish_custom(&mut self) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_reader(
        &mut self,
    ) -> Option<Box<dyn futures_core::Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>> {
        None
    }

    fn restore_custom_message_reader(
        &mut self,
        _reader: Box<dyn futures_core::Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>,
    ) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_writer(&mut self) -> Option<Box<dyn CustomMessageWrite>> {
        None
    }

    fn restore_custom_message_writer(&mut self, _writer: Box<dyn CustomMessageWrite>) -> Result<()> {
        Ok(())
    }
}
