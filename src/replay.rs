//! The session to the client, wrapped for the time of a proxied request: its body is replayed for every attempt, and its
//! response is held back until it may be committed.
//!
//! Pingora replays at most 64 KiB of a body and hangs on more, and writes a response through as it comes. Both are
//! decided by the downstream session, and Pingora lets a session of one's own stand in (`HttpSession::Custom`). So this
//! one passes everything on to the real session, except that
//! - a body seems to lie ready whenever an attempt begins; the request body filter puts the real one in its place;
//! - responses go through a [`Judge`] first; an answer that is dropped ends the attempt with an error, which the retry
//!   hooks take up;
//! - deadlines that Pingora does not know are kept while it waits for either side: first byte, and idle.

use std::mem;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use http::HeaderMap;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER, TRANSFER_ENCODING};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::Digest;
use pingora::protocols::http::custom::CustomMessageWrite;
use pingora::protocols::http::custom::server::Session as CustomSession;
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora::protocols::l4::socket::SocketAddr;
use pingora::{Error, ErrorType, Result};
use pingora_proxy::Session;

use crate::context::{Committed, Exchange, Kept};
use crate::health;
use crate::pool::Pool;
use crate::request::Call;
use crate::respond::{self, HOLD_TIME_MAX, Head, Judge, Terms, Verdict};
use crate::retry::Outcome;

/// Stands for the body until the request body filter puts the real one in its place.
const BODY_MARKER: Bytes = Bytes::from_static(b"?");

/// The error that ends an attempt whose answer is dropped. Why it is, is in the exchange.
fn give_up<T>() -> Result<T> {
    Error::err_up(ErrorType::Custom("the answer is not good enough"))
}

/// How a request is to be replayed and its response held.
#[derive(Debug)]
pub struct Plan {
    /// Whether there is a body to send.
    pub has_body: bool,
    /// The config the request runs under, which says what outcomes may be tried elsewhere.
    pub pool: Arc<Pool>,
    /// Whether the client speaks HTTP/1.0, which knows no chunks.
    pub http_10: bool,
}

/// Where the real session comes back to when the wrapped one is dropped.
type Slot = Arc<Mutex<Option<Box<ServerSession>>>>;

/// The way back to the real session.
#[derive(Default)]
pub struct Wrapped(Option<Slot>);

impl std::fmt::Debug for Wrapped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Wrapped({})", self.0.is_some())
    }
}

impl Wrapped {
    /// Wraps the session until [`Wrapped::unwrap_session`].
    pub fn wrap(session: &mut Session, plan: Plan, exchange: &Arc<Exchange>) -> Self {
        let slot = Slot::default();
        let inner = mem::replace(&mut session.downstream_session, placeholder());
        let replay = Replay {
            inner,
            slot: Arc::clone(&slot),
            exchange: Arc::clone(exchange),
            plan,
            judge: Judge::new(Terms { call: Call::Other, expects_body: true, more: false }),
            held: Vec::new(),
            status: 0,
            deadline: None,
            held_until: None,
            idle: Duration::MAX,
            committed: false,
            flushing: false,
            tail: [0; 4],
        };
        *session.downstream_session = ServerSession::Custom(Box::new(replay));
        Self(Some(slot))
    }

    /// Gives the session its real self back.
    pub fn unwrap_session(&mut self, session: &mut Session) {
        let Some(slot) = self.0.take() else { return };
        drop(mem::replace(&mut session.downstream_session, placeholder()));
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
    slot: Slot,
    exchange: Arc<Exchange>,
    plan: Plan,
    judge: Judge,
    /// What is held back; bounded by the judge.
    held: Vec<HttpTask>,
    status: u16,
    deadline: Option<Instant>,
    /// When a stream that has begun with data, but has not said anything yet, is let through all the same.
    held_until: Option<Instant>,
    idle: Duration,
    committed: bool,
    /// Set while held tasks are written out because their time is up; still set afterwards, the write was cut.
    flushing: bool,
    /// The last bytes sent of an event stream.
    tail: [u8; 4],
}

impl Drop for Replay {
    fn drop(&mut self) {
        let inner = mem::replace(&mut self.inner, placeholder());
        *self.slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(inner);
    }
}

impl Replay {
    /// An attempt begins: whatever the last one left is forgotten.
    fn begin_attempt(&mut self) {
        self.held.clear();
        self.held_until = None;
        let state = self.exchange.state();
        if let Some(attempt) = &state.attempt {
            self.judge = Judge::new(attempt.terms);
            self.deadline = Instant::now().checked_add(attempt.first_byte_timeout);
            self.idle = attempt.endpoint.config.timeouts.idle;
        }
    }

    /// Takes a task of the response in while it is held back.
    fn take_in(&mut self, task: HttpTask) -> Result<Verdict> {
        let verdict = match &task {
            // An endpoint's 100 or 103 says nothing about its answer, and the attempt may yet be dropped.
            HttpTask::Header(header, _) if header.status.is_informational() => return Ok(Verdict::Hold),
            HttpTask::Header(header, end) => self.take_in_header(header, *end),
            HttpTask::Body(Some(piece), end) | HttpTask::UpgradedBody(Some(piece), end) if !piece.is_empty() => {
                self.note_byte();
                self.judge.body(piece, *end)
            }
            HttpTask::Body(_, false) | HttpTask::UpgradedBody(_, false) => return Ok(Verdict::Hold),
            HttpTask::Body(_, true) | HttpTask::UpgradedBody(_, true) | HttpTask::Trailer(_) | HttpTask::Done => {
                self.judge.end()
            }
            HttpTask::Failed(_) => {
                let HttpTask::Failed(error) = task else { return Ok(Verdict::Hold) };
                let mut state = self.exchange.state();
                state.ended = self.judge.outcome_if_cut();
                state.kept = None;
                return Err(error);
            }
        };
        self.held.push(task);
        self.move_deadline();
        Ok(verdict)
    }

    fn take_in_header(&mut self, header: &ResponseHeader, end: bool) -> Verdict {
        let text = |name| header.headers.get(name).and_then(|value: &http::HeaderValue| value.to_str().ok());
        self.status = header.status.as_u16();
        let rest = match self.status {
            429 => {
                let millis = header.headers.get("retry-after-ms").and_then(|value| value.to_str().ok());
                health::rest_asked(millis, text(RETRY_AFTER), SystemTime::now())
            }
            _ => Duration::ZERO,
        };
        if let Some(attempt) = &mut self.exchange.state().attempt {
            attempt.header_seen = true;
        }
        let head = Head { status: self.status, content_type: text(CONTENT_TYPE), rest, end };
        let retry = &self.plan.pool.server.retry;
        self.judge.header(head, |outcome| outcome.is_retryable(retry))
    }

    fn note_byte(&self) {
        if let Some(attempt) = &mut self.exchange.state().attempt {
            attempt.first_byte_came();
        }
    }

    fn move_deadline(&mut self) {
        if self.judge.waits_for_word() {
            self.held_until = self.held_until.or_else(|| Instant::now().checked_add(HOLD_TIME_MAX));
        } else if let Some(wait) = self.judge.patience(self.idle) {
            self.deadline = Instant::now().checked_add(wait);
        }
    }

    /// What was held, ready to go out, now that the answer is the client's.
    fn commit(&mut self) -> Vec<HttpTask> {
        self.committed = true;
        self.judge.commit();
        let tasks = mem::take(&mut self.held);
        let event_stream =
            tasks.iter().any(|task| matches!(task, HttpTask::Header(header, _) if is_event_stream(header)));
        let mut state = self.exchange.state();
        state.committed = Some(Committed { at: Instant::now(), event_stream, between_events: true });
        state.kept = None;
        if let Some(attempt) = &mut state.attempt {
            attempt.settle(&Outcome::Status { status: self.status, rest: rest_of(&tasks) });
        }
        drop(state);
        if self.status >= 400 { self.without_key(tasks) } else { tasks }
    }

    /// Ends the attempt; an error answer is kept in case that nothing better comes.
    fn drop_answer(&mut self, outcome: Outcome) {
        let held = mem::take(&mut self.held);
        let kept = (self.status >= 400).then(|| keep(self.without_key(held))).flatten();
        let mut state = self.exchange.state();
        state.kept = kept;
        state.ended = Some(outcome);
    }

    /// An error's tasks with its body in one piece, in which the endpoint's key is blotted out.
    fn without_key(&self, tasks: Vec<HttpTask>) -> Vec<HttpTask> {
        let endpoint = self.exchange.state().attempt.as_ref().map(|attempt| Arc::clone(&attempt.endpoint));
        let Some(endpoint) = endpoint else { return tasks };
        let mut whole = Vec::new();
        let mut others = Vec::with_capacity(tasks.len());
        let mut ended = false;
        for task in tasks {
            match task {
                HttpTask::Body(piece, end) => {
                    whole.extend_from_slice(&piece.unwrap_or_default());
                    ended |= end;
                }
                other => others.push(other),
            }
        }
        if !whole.is_empty() || ended {
            let body = respond::blot(&Bytes::from(whole), endpoint.config.api_key.expose());
            let after_header =
                others.iter().position(|task| matches!(task, HttpTask::Header(..))).map_or(0, |at| at + 1);
            others.insert(after_header, HttpTask::Body(Some(body), ended));
        }
        others
    }

    /// Writes committed tasks through.
    async fn forward(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        let mut out = Vec::with_capacity(tasks.len());
        let mut failed = None;
        for task in tasks {
            match task {
                HttpTask::Failed(error) => {
                    failed = Some(error);
                    break;
                }
                // An empty piece that ends nothing would be taken for the last chunk.
                HttpTask::Body(piece, false) if piece.as_ref().is_none_or(Bytes::is_empty) => {}
                HttpTask::Header(mut header, end) => {
                    if self.plan.http_10 {
                        header.remove_header(&TRANSFER_ENCODING);
                    }
                    out.push(HttpTask::Header(header, end));
                }
                task => out.push(task),
            }
        }
        self.remember_tail(&out);
        self.deadline = Instant::now().checked_add(self.idle);
        // Writing nothing at all would end the response.
        let ended = if out.is_empty() { false } else { self.inner.response_duplex_vec(out).await? };
        match failed {
            Some(error) => Err(error),
            None => Ok(ended),
        }
    }

    fn remember_tail(&mut self, tasks: &[HttpTask]) {
        let mut state = self.exchange.state();
        for task in tasks {
            let HttpTask::Body(Some(piece), _) = task else { continue };
            if let Some(attempt) = &mut state.attempt {
                attempt.first_byte_came();
            }
            for byte in piece.iter().skip(piece.len().saturating_sub(self.tail.len())) {
                self.tail.rotate_left(1);
                self.tail[3] = *byte;
            }
        }
        if let Some(committed) = &mut state.committed {
            let tail = &self.tail;
            committed.between_events =
                tail == &[0; 4] || tail.ends_with(b"\n\n") || tail.ends_with(b"\r\r") || tail == b"\r\n\r\n";
        }
    }

    /// The deadline has passed: either what is held goes out, or the attempt is over.
    async fn deadline_passed(&mut self) -> Result<()> {
        let held_enough = self.held_until.is_some_and(|until| until <= Instant::now());
        if !self.committed && self.judge.waits_for_word() && (held_enough || !self.judge.may_drop()) {
            // Pingora drops this future when the endpoint sends more meanwhile. What is held fits any socket buffer, so the
            // write does not wait; if it was cut all the same, the flag stays and the answer is given up, not garbled.
            self.flushing = true;
            let tasks = self.commit();
            self.forward(tasks).await?;
            self.flushing = false;
            return Ok(());
        }
        if self.committed {
            self.exchange.state().ended = Some(Outcome::TooSlow);
            return give_up();
        }
        let outcome = self.judge.outcome_if_cut().unwrap_or(Outcome::TooSlow);
        self.drop_answer(outcome);
        give_up()
    }
}

fn is_event_stream(header: &ResponseHeader) -> bool {
    respond::is_event_stream(header.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()))
}

/// How long a 429 that is shown to the client asked us to wait.
fn rest_of(tasks: &[HttpTask]) -> Duration {
    let header = tasks.iter().find_map(|task| match task {
        HttpTask::Header(header, _) => Some(header),
        _ => None,
    });
    let text = |name: &str| header.and_then(|header| header.headers.get(name)).and_then(|value| value.to_str().ok());
    health::rest_asked(text("retry-after-ms"), text("retry-after"), SystemTime::now())
}

/// The header and body of an error answer, framed anew.
fn keep(tasks: Vec<HttpTask>) -> Option<Kept> {
    let mut kept: Option<Kept> = None;
    for task in tasks {
        match (task, &mut kept) {
            (HttpTask::Header(mut header, end), None) => {
                header.remove_header(&TRANSFER_ENCODING);
                kept = Some(Kept { header, body: end.then(Bytes::new) });
            }
            (HttpTask::Body(piece, true), Some(kept)) => kept.body = Some(piece.unwrap_or_default()),
            _ => {}
        }
    }
    let mut kept = kept?;
    if let Some(body) = &kept.body {
        kept.header.insert_header(CONTENT_LENGTH, body.len()).ok()?;
    }
    Some(kept)
}

#[async_trait]
impl CustomSession for Replay {
    // What replays the body.

    fn enable_retry_buffering(&mut self) {
        // Pingora calls this once for each attempt, when its request header is on its way.
        self.begin_attempt();
    }

    fn get_retry_buffer(&self) -> Option<Bytes> {
        self.plan.has_body.then_some(BODY_MARKER)
    }

    fn retry_buffer_truncated(&self) -> bool {
        false
    }

    fn is_body_done(&mut self) -> bool {
        true
    }

    fn is_body_empty(&mut self) -> bool {
        !self.plan.has_body
    }

    // What holds the response back.

    async fn response_duplex_vec(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        if self.flushing {
            return Err(Error::explain(ErrorType::InternalError, "a write was cut"));
        }
        if self.committed {
            return self.forward(tasks).await;
        }
        let mut tasks = tasks.into_iter();
        while let Some(task) = tasks.next() {
            match self.take_in(task)? {
                Verdict::Hold => {}
                Verdict::Drop(outcome) => {
                    self.drop_answer(outcome);
                    return give_up();
                }
                Verdict::Commit => {
                    let mut out = self.commit();
                    out.extend(tasks);
                    return self.forward(out).await;
                }
            }
        }
        Ok(false)
    }

    fn response_written(&self) -> Option<&ResponseHeader> {
        // A 100 (Continue) of ours is not yet a response.
        self.inner.response_written().filter(|header| !header.status.is_informational())
    }

    async fn read_body_or_idle(&mut self, _no_body_expected: bool) -> Result<Option<Bytes>> {
        loop {
            let held_until = self.held_until.filter(|_| !self.committed);
            let Some(deadline) = held_until.into_iter().chain(self.deadline).min() else {
                return self.inner.read_body_or_idle(true).await;
            };
            tokio::select! {
                gone = self.inner.read_body_or_idle(true) => return gone,
                () = tokio::time::sleep_until(deadline.into()) => {}
            }
            self.deadline_passed().await?;
        }
    }

    // Everything else is the real session's.

    fn req_header(&self) -> &RequestHeader {
        self.inner.req_header()
    }

    fn req_header_mut(&mut self) -> &mut RequestHeader {
        self.inner.req_header_mut()
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
