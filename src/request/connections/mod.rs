//! Connections of clients: how many there are and from where, which of them have shown a right key, and how long each keeps us waiting.
//!
//! A connection that has not yet shown a right key is a stranger's. Strangers may take a part of the places and of the memory only, and
//! the oldest of them make room for others: a caller sends its request at once, so it is never the oldest for long.
//!
//! Deadlines are looked at twice a second ([`Connections::sweep`]) instead of by a timer for each, and a connection whose time is up is
//! told by its waker, so a request costs no timer.

mod connection;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::config::ConnectionLimits;
pub(crate) use connection::{Connection, OnConnection, WRITE_MAX};
use connection::{Due, Overdue};

/// Interval of [`Connections::sweep`].
pub(crate) const SWEEP_INTERVAL: Duration = Duration::from_millis(500);
/// Age from which a stranger makes room for others: its request has had time to come.
const GRACE_MS: u64 = 1000;
/// Part of the memory for bodies that all strangers may hold together, beside it, and the least and most that this may be, in bytes.
const PART_OF_MEMORY: usize = 4;
const STRANGERS_BYTES_LEAST: usize = 16 * 1024 * 1024;
const STRANGERS_BYTES_MOST: usize = 256 * 1024 * 1024;
/// What a connection holds that has said nothing, and what it holds more when it has begun, beside the bytes of its header: measured
/// as resident memory of a thousand each.
const SILENT_BYTES: usize = 14 * 1024;
const BEGUN_BYTES: usize = 26 * 1024;

/// Reason why a connection is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Reason {
    /// No byte came in time.
    FirstByte = 1,
    /// The header did not come whole in time.
    Header,
    /// The next request did not come in time.
    KeepAlive,
    /// There are as many connections as there may be.
    Max,
    /// There are as many strangers of one address as there may be.
    Address,
    /// Strangers hold as much memory as they may.
    Memory,
    /// The header is too long.
    HeaderBytes,
    /// A WebSocket, or the refusal of one, was silent for too long.
    Silent,
    /// The client took nothing of its answer for too long.
    Write,
    /// A stranger's requests were not over in time.
    Request,
    /// The key of what it serves was revoked, with all that runs.
    Revoked,
}

impl Reason {
    /// All of them.
    pub(crate) const ALL: [Self; 11] = [
        Self::FirstByte,
        Self::Header,
        Self::KeepAlive,
        Self::Max,
        Self::Address,
        Self::Memory,
        Self::HeaderBytes,
        Self::Silent,
        Self::Write,
        Self::Request,
        Self::Revoked,
    ];

    /// Label value in metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::FirstByte => "first_byte",
            Self::Header => "header",
            Self::KeepAlive => "keep_alive",
            Self::Max => "max",
            Self::Address => "address",
            Self::Memory => "memory",
            Self::HeaderBytes => "header_bytes",
            Self::Silent => "silent",
            Self::Write => "write",
            Self::Request => "request",
            Self::Revoked => "revoked",
        }
    }
}

/// All connections of the process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Connections(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    begun: Instant,
    /// Milliseconds since then at the last sweep: near enough for deadlines, and costs no look at a clock.
    swept_ms: AtomicU64,
    /// Memory that strangers hold, in bytes, and may hold.
    held: AtomicUsize,
    held_max: usize,
    closed: [AtomicU64; Reason::ALL.len()],
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    /// By their order of arrival.
    strangers: BTreeMap<u64, Arc<Connection>>,
    known: HashMap<u64, Arc<Connection>>,
    by_origin: HashMap<IpAddr, u32>,
}

/// The place of a connection among all; it is given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    /// The connection.
    pub connection: Arc<Connection>,
    all: Connections,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.all.leave(&self.connection);
    }
}

/// Numbers for the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) strangers: usize,
    pub(crate) known: usize,
    /// Memory that strangers hold, in bytes.
    pub(crate) held: usize,
}

impl Connections {
    /// `memory_bytes_max`: memory that bodies may take up, in bytes.
    pub(crate) fn new(memory_bytes_max: usize) -> Self {
        let held_max = (memory_bytes_max / PART_OF_MEMORY).clamp(STRANGERS_BYTES_LEAST, STRANGERS_BYTES_MOST);
        let closed = Default::default();
        Self(Arc::new(Shared {
            table: Mutex::default(),
            begun: Instant::now(),
            swept_ms: AtomicU64::new(0),
            held: AtomicUsize::new(0),
            held_max,
            closed,
        }))
    }

    /// Takes a connection in, or none if there is no place for it. `address`: the client's, if it is counted.
    pub fn arrive(&self, address: Option<IpAddr>, limits: &ConnectionLimits) -> Option<Place> {
        let now = self.now_ms();
        self.0.swept_ms.fetch_max(now, Ordering::Relaxed);
        let mut table = self.table();
        if table.strangers.len() + table.known.len() >= usize::try_from(limits.max).unwrap_or(usize::MAX) {
            let oldest = table.strangers.values().find(|stranger| stranger.may_go(now)).cloned();
            let Some(oldest) = oldest else {
                self.count(Reason::Max);
                return None;
            };
            self.close(&mut table, &oldest, Reason::Max);
        }
        let id = table.next;
        table.next += 1;
        let connection = Arc::new(Connection::new(self, id, address.map(network), limits, now));
        table.enter(&connection);
        drop(table);
        connection.holds_more(SILENT_BYTES);
        Some(Place { connection, all: self.clone() })
    }

    /// Closes those whose time is up, and those that are too many.
    pub fn sweep(&self) {
        let now = self.now_ms();
        self.0.swept_ms.store(now, Ordering::Relaxed);
        let mut table = self.table();
        let all = table.strangers.values().chain(table.known.values());
        let overdue: Vec<_> = all.filter_map(|one| Some((Arc::clone(one), one.overdue(now)?))).collect();
        for (connection, Overdue { what, phase }) in overdue {
            match what {
                Due::Ring => connection.ring(phase),
                // A request may have come meanwhile.
                Due::Close(reason) if connection.is_still(phase) => self.close(&mut table, &connection, reason),
                Due::Close(_) => {}
            }
        }
        self.thin_out(&mut table, now);
    }

    /// Closes the oldest strangers of addresses that have more than they may.
    fn thin_out(&self, table: &mut Table, now: u64) {
        let aged = |stranger: &&Arc<Connection>| stranger.age_ms(now) >= GRACE_MS && table.is_crowded(stranger);
        let aged: Vec<_> = table.strangers.values().filter(aged).cloned().collect();
        for stranger in aged {
            // Each that goes leaves its address one less.
            if table.is_crowded(&stranger) {
                self.close(table, &stranger, Reason::Address);
            }
        }
    }

    /// Numbers as they are now.
    pub(crate) fn counts(&self) -> Counts {
        let table = self.table();
        Counts { strangers: table.strangers.len(), known: table.known.len(), held: self.0.held.load(Ordering::Relaxed) }
    }

    /// Number of connections that were closed for a reason.
    pub(crate) fn closed(&self, reason: Reason) -> u64 {
        self.0.closed.get(usize::from(reason as u8 - 1)).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    fn count(&self, reason: Reason) {
        if let Some(count) = self.0.closed.get(usize::from(reason as u8 - 1)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Has a connection close, whose place is free at once.
    fn close(&self, table: &mut Table, connection: &Arc<Connection>, reason: Reason) {
        table.remove(connection);
        self.release(connection);
        connection.end(reason);
    }

    fn leave(&self, connection: &Arc<Connection>) {
        self.table().remove(connection);
        self.release(connection);
    }

    /// Strangers hold this much more. If that is too much, the oldest go, but not the one that asks: of a burst of callers none is among
    /// them, since their headers come whole at once.
    fn hold(&self, bytes: usize, asks: u64) {
        if self.0.held.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) <= self.0.held_max {
            return;
        }
        let now = self.now_ms();
        let mut table = self.table();
        while self.0.held.load(Ordering::Relaxed) > self.0.held_max / 8 * 7 {
            let mut oldest = table.strangers.values().filter(|stranger| stranger.id() != asks && stranger.may_go(now));
            let Some(oldest) = oldest.next().cloned() else { return };
            self.close(&mut table, &oldest, Reason::Memory);
        }
    }

    /// Strangers hold this much less.
    fn hold_less(&self, bytes: usize) {
        self.0.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// A stranger's memory is that of a caller, or gone.
    fn release(&self, connection: &Connection) {
        self.hold_less(connection.takes_held());
    }

    /// A stranger has shown a right key.
    fn make_known(&self, connection: &Arc<Connection>) {
        let mut table = self.table();
        if table.strangers.remove(&connection.id()).is_some() {
            table.forget_origin(connection);
            table.known.insert(connection.id(), Arc::clone(connection));
        }
        drop(table);
        self.release(connection);
    }

    /// The moment that is this much later than now, or half a second more: the last sweep is as long ago.
    fn later(&self, than_now_ms: u64) -> u64 {
        self.0.swept_ms.load(Ordering::Relaxed) + than_now_ms + milliseconds(SWEEP_INTERVAL)
    }

    fn now_ms(&self) -> u64 {
        milliseconds(self.0.begun.elapsed())
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing panics while it is held.
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn enter(&mut self, connection: &Arc<Connection>) {
        if let Some(origin) = connection.origin() {
            *self.by_origin.entry(origin).or_default() += 1;
        }
        self.strangers.insert(connection.id(), Arc::clone(connection));
    }

    fn remove(&mut self, connection: &Connection) {
        if self.strangers.remove(&connection.id()).is_some() {
            self.forget_origin(connection);
        } else {
            self.known.remove(&connection.id());
        }
    }

    /// True if the address of a connection has more strangers than it may.
    fn is_crowded(&self, connection: &Connection) -> bool {
        let count = connection.origin().and_then(|origin| self.by_origin.get(&origin));
        count.is_some_and(|count| *count > connection.limits().strangers_per_address)
    }

    fn forget_origin(&mut self, connection: &Connection) {
        let Some(origin) = connection.origin() else { return };
        if let Some(count) = self.by_origin.get_mut(&origin) {
            *count -= 1;
            if *count == 0 {
                self.by_origin.remove(&origin);
            }
        }
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Who has one IPv6 address has its whole /64.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        v4 @ IpAddr::V4(_) => v4,
    }
}
