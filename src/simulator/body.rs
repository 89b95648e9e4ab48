//! A response body that follows a schedule.

use std::fmt;
use std::iter::{self, Peekable};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame};
use tokio::time::Sleep;

use super::behaviour::{Behaviour, ResetAt, ResetHow, StallAt};
use super::connection::{Guard, Line};

/// Pause before a break, so that what was written before it has left: RST discards what the
/// kernel still holds.
const SETTLE: Duration = Duration::from_millis(20);

/// Shortest interval of pings; zero would spin.
const MIN_PING: Duration = Duration::from_millis(1);

/// One thing a body does.
pub(super) enum BodyStep {
    Wait(Duration),
    Send(Bytes),
    Stall,
    Reset(ResetHow),
}

/// Lazily made, so that a long stream costs no memory.
pub(super) type Steps = Box<dyn Iterator<Item = BodyStep> + Send>;

/// The schedule of a whole answer's events under a behaviour.
pub(super) fn schedule<E>(events: E, behaviour: &Arc<Behaviour>) -> Steps
where
    E: Iterator<Item = Bytes> + Send + 'static,
{
    if let Some(ping) = behaviour.ping_ms {
        return pings(Duration::from_millis(ping).max(MIN_PING));
    }
    let behaviour = Arc::clone(behaviour);
    let ended = events.map(Some).chain(iter::once(None)).enumerate();
    Box::new(ended.flat_map(move |(index, event)| steps_at(index, event, &behaviour)))
}

fn pings(interval: Duration) -> Steps {
    let step = move |send| {
        if send { BodyStep::Send(Bytes::from_static(b": ping\n\n")) } else { BodyStep::Wait(interval) }
    };
    Box::new([false, true].into_iter().cycle().map(step))
}

/// Steps after `index` events; without an event, at the end of all.
fn steps_at(index: usize, event: Option<Bytes>, behaviour: &Behaviour) -> Vec<BodyStep> {
    let mut steps = Vec::new();
    let delay = if index == 0 { behaviour.first_chunk_delay_ms } else { behaviour.chunk_delay_ms };
    if delay > 0 && (event.is_some() || index == 0) {
        steps.push(BodyStep::Wait(Duration::from_millis(delay)));
    }
    // A number beyond the last event means: at the end.
    let here = |count| count == index || (event.is_none() && count > index);
    match behaviour.stall {
        Some(StallAt::AfterHeader) if index == 0 => steps.push(BodyStep::Stall),
        Some(StallAt::AfterEvents(count)) if here(count) => steps.push(BodyStep::Stall),
        _ => {}
    }
    match behaviour.reset {
        Some(ResetAt::AfterHeader) if index == 0 => steps.extend(reset(behaviour)),
        Some(ResetAt::AfterEvents(count)) if here(count) => steps.extend(reset(behaviour)),
        Some(ResetAt::MidEvent(count)) if here(count) => {
            let event = event.clone().unwrap_or_default();
            steps.push(BodyStep::Send(event.slice(..event.len() / 2)));
            steps.extend(reset(behaviour));
        }
        _ => {}
    }
    if let Some(event) = event {
        pieces(event, behaviour, &mut steps);
    }
    steps
}

fn reset(behaviour: &Behaviour) -> [BodyStep; 2] {
    [BodyStep::Wait(SETTLE), BodyStep::Reset(behaviour.reset_how)]
}

fn pieces(mut event: Bytes, behaviour: &Behaviour, steps: &mut Vec<BodyStep>) {
    let size = behaviour.drip.unwrap_or(usize::MAX).max(1);
    while event.len() > size {
        steps.push(BodyStep::Send(event.split_to(size)));
        if behaviour.chunk_delay_ms > 0 {
            steps.push(BodyStep::Wait(Duration::from_millis(behaviour.chunk_delay_ms)));
        }
    }
    steps.push(BodyStep::Send(event));
}

/// The body hyper polls.
pub(super) struct ScriptedBody {
    steps: Peekable<Steps>,
    waiting: Option<Pin<Box<Sleep>>>,
    /// A frame was handed out; the next poll gives way once, so that hyper writes it alone.
    handed: bool,
    ended: bool,
    cutter: Option<Cutter>,
}

/// Breaks the answer off, and counts it.
pub(super) struct Cutter {
    pub(super) guard: Guard,
    pub(super) line: Arc<Line>,
    pub(super) http2: bool,
}

impl Cutter {
    /// Breaks off; an error if that is the way to do it, else the connection will be dropped.
    pub(super) fn cut(&mut self, how: ResetHow) -> Result<(), BrokenOff> {
        self.guard.finish();
        if self.http2 && how == ResetHow::Rst {
            // hyper turns an error into RST_STREAM.
            return Err(BrokenOff);
        }
        self.line.cut(how);
        Ok(())
    }
}

impl ScriptedBody {
    /// `length` is that of the whole body, if it is announced.
    pub(super) fn new(steps: Steps, length: Option<usize>, cutter: Cutter) -> Self {
        Self::build(steps, length == Some(0), Some(cutter))
    }

    /// A body that counts for nothing, for control calls.
    pub(super) fn plain(bytes: Bytes) -> Self {
        let empty = bytes.is_empty();
        Self::build(Box::new(iter::once(BodyStep::Send(bytes))), empty, None)
    }

    fn build(steps: Steps, empty: bool, cutter: Option<Cutter>) -> Self {
        let steps = steps.peekable();
        let mut body = Self { steps, waiting: None, handed: false, ended: false, cutter };
        if empty {
            body.end();
        }
        body
    }

    fn end(&mut self) {
        self.ended = true;
        if let Some(cutter) = &mut self.cutter {
            cutter.guard.finish();
        }
    }

    /// hyper may not ask again after the last byte, so the end is noted with it.
    fn send(&mut self, bytes: Bytes) -> Frame<Bytes> {
        self.handed = true;
        if self.steps.peek().is_none() {
            self.end();
        }
        Frame::data(bytes)
    }

    fn reset(&mut self, how: ResetHow) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        // The connection's task may poll once more before it sees the cut.
        self.steps = forever_stalled();
        match self.cutter.as_mut().map_or(Ok(()), |cutter| cutter.cut(how)) {
            Ok(()) => Poll::Pending,
            Err(broken) => Poll::Ready(Some(Err(broken))),
        }
    }
}

impl Body for ScriptedBody {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        if std::mem::take(&mut self.handed) && !self.ended {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        loop {
            if let Some(sleep) = &mut self.waiting {
                ready!(sleep.as_mut().poll(cx));
                self.waiting = None;
            }
            match self.steps.next() {
                Some(BodyStep::Wait(time)) => {
                    self.waiting = Some(Box::pin(tokio::time::sleep(time)));
                }
                Some(BodyStep::Send(bytes)) => return Poll::Ready(Some(Ok(self.send(bytes)))),
                Some(BodyStep::Stall) => {
                    // Nothing wakes it; hyper drops the body when the peer goes.
                    self.steps = forever_stalled();
                    return Poll::Pending;
                }
                Some(BodyStep::Reset(how)) => return self.reset(how),
                None => {
                    self.end();
                    return Poll::Ready(None);
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

/// hyper may poll a stalled body again for other reasons; it must stay stalled.
fn forever_stalled() -> Peekable<Steps> {
    let steps: Steps = Box::new(iter::repeat_with(|| BodyStep::Stall));
    steps.peekable()
}

/// The error by which hyper breaks an answer off.
#[derive(Debug)]
pub(super) struct BrokenOff;

impl fmt::Display for BrokenOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("broken off as scripted")
    }
}

impl std::error::Error for BrokenOff {}
