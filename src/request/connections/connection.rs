//! One connection: the part of its life that it is in, when that ends, and how its reader hears of it.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;
use std::time::Duration;

use super::{BEGUN_BYTES, Connections, GRACE_MS, Reason, milliseconds};
use crate::config::ConnectionLimits;

/// The part of a connection's life that it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    FirstByte,
    Header,
    /// A request is served, or several over HTTP/2.
    Request,
    Idle,
    /// An endpoint is to say whether it switches protocols.
    Switch,
    /// It has said so, and bytes go to and fro.
    Flow,
}

/// A connection that has been in a phase for too long, or whose client takes nothing.
pub(super) struct Overdue {
    pub(super) what: Due,
    /// The phase as it was seen.
    pub(super) phase: u64,
}

/// What follows.
pub(super) enum Due {
    Close(Reason),
    /// Its reader hears of it, and gives the endpoint up.
    Ring,
}

/// Longest time for a stranger's requests: they are refused, or ask for our health.
const STRANGERS_REQUEST_MAX: Duration = Duration::from_secs(10);
/// Longest time for a client to take something of an answer of our own; of an endpoint's, its `timeouts.idleMs`.
pub(crate) const WRITE_MAX: Duration = Duration::from_mins(1);

/// One connection.
#[derive(Debug)]
pub struct Connection {
    all: Connections,
    id: u64,
    /// The address, of IPv6 its network; none if it is not counted.
    origin: Option<IpAddr>,
    limits: ConnectionLimits,
    came_ms: u64,
    /// The phase in the lowest byte, above it the moment when it is to end, in milliseconds; 0 for none.
    phase: AtomicU64,
    /// Reason why it is closed; 0 while it is not.
    end: AtomicU8,
    is_known: AtomicBool,
    /// True while it is read without a look at anything else: it is known, and a request is served.
    runs: AtomicBool,
    requests: AtomicU32,
    header_bytes: AtomicU32,
    /// Longest silence of a flow, in milliseconds.
    silence_ms: AtomicU64,
    /// Set when no endpoint has said in time whether it switches protocols.
    has_rung: AtomicBool,
    /// Memory that it holds as a stranger.
    held: AtomicUsize,
    /// The part of it that is for the header that comes.
    held_for_header: AtomicUsize,
    waker: Mutex<Option<Waker>>,
    /// Longest time for the client to take something of an answer, in milliseconds.
    write_ms: AtomicU64,
    /// When a write that waits for the client is given up; 0 while none waits.
    write_until: AtomicU64,
    writer: Mutex<Option<Waker>>,
}

/// A request that is served on a connection.
#[derive(Debug)]
pub(crate) struct OnConnection {
    connection: Arc<Connection>,
    is_http2: bool,
}

impl Drop for OnConnection {
    fn drop(&mut self) {
        self.connection.request_ended(self.is_http2);
    }
}

impl Connection {
    pub(super) fn new(
        all: &Connections,
        id: u64,
        origin: Option<IpAddr>,
        limits: &ConnectionLimits,
        came_ms: u64,
    ) -> Self {
        Self {
            all: all.clone(),
            id,
            origin,
            limits: *limits,
            came_ms,
            phase: AtomicU64::new(packed(Phase::FirstByte, came_ms + milliseconds(limits.first_byte))),
            end: AtomicU8::new(0),
            is_known: AtomicBool::new(false),
            runs: AtomicBool::new(false),
            requests: AtomicU32::new(0),
            header_bytes: AtomicU32::new(0),
            silence_ms: AtomicU64::new(0),
            has_rung: AtomicBool::new(false),
            held: AtomicUsize::new(0),
            held_for_header: AtomicUsize::new(0),
            waker: Mutex::default(),
            write_ms: AtomicU64::new(milliseconds(WRITE_MAX)),
            write_until: AtomicU64::new(0),
            writer: Mutex::default(),
        }
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn origin(&self) -> Option<IpAddr> {
        self.origin
    }

    pub(super) fn limits(&self) -> &ConnectionLimits {
        &self.limits
    }

    /// Memory that it held as a stranger, and holds no more, in bytes.
    pub(super) fn takes_held(&self) -> usize {
        self.held_for_header.store(0, Ordering::Relaxed);
        self.held.swap(0, Ordering::Relaxed)
    }

    /// True while it is read without a look at anything else.
    pub fn runs(&self) -> bool {
        self.runs.load(Ordering::Relaxed)
    }

    /// Notes who reads, so that its end is noticed.
    pub(crate) fn wait(&self, waker: &Waker) {
        note(&self.waker, waker);
    }

    /// Notes that a write waits for the client. True if it has waited for too long.
    pub(crate) fn write_waits(&self, waker: &Waker) -> bool {
        note(&self.writer, waker);
        if self.write_until.load(Ordering::Relaxed) == 0 {
            let longest = self.write_ms.load(Ordering::Relaxed);
            self.write_until.store(self.all.later(longest), Ordering::Relaxed);
        }
        self.end.load(Ordering::Acquire) != 0
    }

    /// Notes that the client has taken something.
    pub(crate) fn write_goes_on(&self) {
        self.write_until.store(0, Ordering::Relaxed);
    }

    /// Error that its reader gets: it is to be closed, or an endpoint is given up, after which it is read from again.
    pub(crate) fn told(&self) -> Option<ErrorKind> {
        if self.end.load(Ordering::Acquire) != 0 {
            Some(ErrorKind::TimedOut)
        } else if self.has_rung.load(Ordering::Relaxed) {
            Some(ErrorKind::Interrupted)
        } else {
            None
        }
    }

    /// Bytes that may still be read of a header.
    pub(crate) fn header_bytes_left(&self) -> usize {
        let left = self.limits.header_bytes_max.saturating_sub(self.header_bytes.load(Ordering::Relaxed));
        usize::try_from(left).unwrap_or(usize::MAX)
    }

    /// Longest header, in bytes.
    pub(crate) fn header_bytes_max(&self) -> usize {
        usize::try_from(self.limits.header_bytes_max).unwrap_or(usize::MAX)
    }

    /// Bytes came outside a request that is served: they are a part of a header, or of a handshake.
    pub(crate) fn came(&self, bytes: usize) {
        let phase = self.phase();
        match phase {
            Phase::Request | Phase::Switch => return,
            Phase::Flow => return self.flowed(),
            Phase::FirstByte | Phase::Header | Phase::Idle => {}
        }
        if phase != Phase::Header {
            self.set(Phase::Header, Some(self.limits.header));
        }
        self.header_bytes.fetch_add(u32::try_from(bytes).unwrap_or(u32::MAX), Ordering::Relaxed);
        if !self.is_known.load(Ordering::Relaxed) {
            // What has come of a header is kept, in a buffer that doubles. Over HTTP/2 other frames come as well, which are not kept.
            let most = 2 * self.header_bytes_max();
            let more = (2 * bytes).min(most.saturating_sub(self.held_for_header.load(Ordering::Relaxed)));
            self.held_for_header.fetch_add(more, Ordering::Relaxed);
            self.holds_more(more + if phase == Phase::FirstByte { BEGUN_BYTES } else { 0 });
        }
    }

    /// Bytes went to the client.
    pub(crate) fn went(&self) {
        if self.phase() == Phase::Flow {
            self.flowed();
        }
    }

    fn flowed(&self) {
        let until = self.all.later(self.silence_ms.load(Ordering::Relaxed));
        self.phase.store(packed(Phase::Flow, until), Ordering::Relaxed);
    }

    pub(super) fn ring(&self, seen: u64) {
        let (then, order) = (packed(Phase::Request, 0), Ordering::Relaxed);
        if self.phase.compare_exchange(seen, then, order, order).is_err() {
            return;
        }
        self.has_rung.store(true, Ordering::Relaxed);
        self.wake();
    }

    fn wake(&self) {
        for waiting in [&self.waker, &self.writer] {
            let waker = waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    fn phase(&self) -> Phase {
        unpacked(self.phase.load(Ordering::Relaxed)).0
    }

    /// A stranger takes this much memory more.
    pub(super) fn holds_more(&self, bytes: usize) {
        // First in all, since what is known of one is taken from all when it goes.
        self.all.hold(bytes, self.id);
        self.held.fetch_add(bytes, Ordering::Relaxed);
    }

    fn holds_less(&self, bytes: usize) {
        // It may have been let go meanwhile, with all that it held.
        let taken = self.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| held.checked_sub(bytes));
        if taken.is_ok() {
            self.all.hold_less(bytes);
        }
    }

    /// It is to be closed, for a reason that its reader has found.
    pub(crate) fn end(&self, reason: Reason) {
        if self.end.compare_exchange(0, reason as u8, Ordering::Release, Ordering::Relaxed).is_err() {
            return;
        }
        self.all.count(reason);
        self.runs.store(false, Ordering::Relaxed);
        self.wake();
    }

    /// The header of a request has come whole.
    pub(crate) fn request_came(self: &Arc<Self>, is_http2: bool) -> OnConnection {
        let is_first = self.requests.fetch_add(1, Ordering::Relaxed) == 0;
        self.header_bytes.store(0, Ordering::Relaxed);
        if self.is_known.load(Ordering::Relaxed) {
            self.set(Phase::Request, None);
            self.runs.store(true, Ordering::Relaxed);
        } else {
            self.holds_less(self.held_for_header.swap(0, Ordering::Relaxed));
            // Several over HTTP/2 have no more time than one.
            if is_first || self.phase() != Phase::Request {
                self.set(Phase::Request, Some(STRANGERS_REQUEST_MAX));
            }
        }
        OnConnection { connection: Arc::clone(self), is_http2 }
    }

    fn request_ended(&self, is_http2: bool) {
        if self.requests.fetch_sub(1, Ordering::Relaxed) != 1 {
            return;
        }
        if !is_http2 {
            self.set(Phase::Idle, Some(self.limits.keep_alive));
            self.runs.store(false, Ordering::Relaxed);
        } else if !self.is_known.load(Ordering::Relaxed) {
            self.set(Phase::Idle, Some(self.limits.h2_idle));
        }
        // Over HTTP/2 it is Pingora that closes a caller's connection without requests.
    }

    fn set(&self, phase: Phase, longest: Option<Duration>) {
        let until = longest.map_or(0, |longest| self.all.later(milliseconds(longest)));
        self.phase.store(packed(phase, until), Ordering::Relaxed);
    }

    /// Reason why its time is up.
    pub(super) fn overdue(&self, now: u64) -> Option<Overdue> {
        let seen = self.phase.load(Ordering::Relaxed);
        let write_until = self.write_until.load(Ordering::Relaxed);
        if write_until != 0 && write_until <= now {
            return Some(Overdue { what: Due::Close(Reason::Write), phase: seen });
        }
        let (phase, until) = unpacked(seen);
        let what = match phase {
            Phase::FirstByte => Due::Close(Reason::FirstByte),
            Phase::Header => Due::Close(Reason::Header),
            Phase::Request => Due::Close(Reason::Request),
            Phase::Idle => Due::Close(Reason::KeepAlive),
            Phase::Switch => Due::Ring,
            Phase::Flow => Due::Close(Reason::Silent),
        };
        (until != 0 && until <= now).then_some(Overdue { what, phase: seen })
    }

    /// True if it is in the phase that was seen.
    pub(super) fn is_still(&self, seen: u64) -> bool {
        self.phase.load(Ordering::Relaxed) == seen
    }

    /// True if it may make room for others: nothing of ours is done for it, or it has had time to show a key.
    pub(super) fn may_go(&self, now: u64) -> bool {
        self.requests.load(Ordering::Relaxed) == 0 || self.age_ms(now) >= GRACE_MS
    }

    pub(super) fn age_ms(&self, now: u64) -> u64 {
        now.saturating_sub(self.came_ms)
    }
}

impl OnConnection {
    /// The client has this long to take something of what is sent to it.
    pub(crate) fn takes_within(&self, longest: Duration) {
        self.connection.write_ms.store(milliseconds(longest), Ordering::Relaxed);
    }

    /// The connection, for what outlives this hook.
    pub(crate) fn handle(&self) -> Arc<Connection> {
        Arc::clone(&self.connection)
    }

    /// An endpoint is asked to switch protocols, and has this long to say whether it does.
    pub(crate) fn awaits_switch(&self, longest: Duration) {
        self.connection.runs.store(false, Ordering::Relaxed);
        self.connection.has_rung.store(false, Ordering::Relaxed);
        self.connection.set(Phase::Switch, Some(longest));
    }

    /// True if it has not said so in time.
    pub(crate) fn switch_is_late(&self) -> bool {
        self.connection.has_rung.load(Ordering::Relaxed)
    }

    /// From now on bytes go to and fro, with silences as long as this.
    pub(crate) fn flows(&self, silence: Duration) {
        self.connection.silence_ms.store(milliseconds(silence), Ordering::Relaxed);
        self.connection.has_rung.store(false, Ordering::Relaxed);
        self.connection.flowed();
    }

    /// True if a request on this connection has shown a right key before.
    pub(crate) fn is_known(&self) -> bool {
        self.connection.is_known.load(Ordering::Relaxed)
    }

    /// The request has shown a right key.
    pub(crate) fn shows_key(&self) {
        let connection = &self.connection;
        if connection.is_known.load(Ordering::Relaxed) {
            return;
        }
        connection.is_known.store(true, Ordering::Relaxed);
        connection.set(Phase::Request, None);
        connection.all.make_known(connection);
        if connection.told().is_none() {
            connection.runs.store(true, Ordering::Relaxed);
        }
    }
}

fn note(waiting: &Mutex<Option<Waker>>, waker: &Waker) {
    let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
    if !waiting.as_ref().is_some_and(|known| known.will_wake(waker)) {
        *waiting = Some(waker.clone());
    }
}

fn packed(phase: Phase, until: u64) -> u64 {
    until << 8 | u64::from(phase as u8)
}

fn unpacked(packed: u64) -> (Phase, u64) {
    let phase = match packed & 0xff {
        0 => Phase::FirstByte,
        1 => Phase::Header,
        2 => Phase::Request,
        3 => Phase::Idle,
        4 => Phase::Switch,
        _ => Phase::Flow,
    };
    (phase, packed >> 8)
}
