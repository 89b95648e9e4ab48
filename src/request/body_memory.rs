//! Memory of all request bodies together, bounded so that many large ones cannot have the process killed.
//!
//! Small bodies are let in as they come: there is at most one for each connection. A larger one is let in when there is room for all of
//! it; until then it is not read, which its client notices as a slow connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bodies up to this size are not counted.
pub(crate) const FREE_BYTES: usize = 64 * 1024;
/// First reservation of a body of unknown length; it doubles each time it is used up.
const FIRST_STEP_BYTES: usize = 1024 * 1024;
/// Longest wait of a body for room.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(10);
/// Unit in which memory is counted.
const UNIT_BYTES: usize = 1024;

/// The room for the bodies of a process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Room>);

#[derive(Debug)]
struct Room {
    free: Arc<Semaphore>,
    units: usize,
    waiting: AtomicUsize,
}

impl Memory {
    /// Returns the room for this many bytes of bodies.
    pub fn new(bytes_max: usize) -> Self {
        // Rounded up, so that the longest allowed body fits.
        let units = bytes_max.div_ceil(UNIT_BYTES).min(Semaphore::MAX_PERMITS);
        Self(Arc::new(Room { free: Arc::new(Semaphore::new(units)), units, waiting: AtomicUsize::new(0) }))
    }

    /// Total memory in bytes.
    pub fn bytes_max(&self) -> usize {
        self.0.units * UNIT_BYTES
    }

    /// Returns the memory in use in bytes.
    pub fn bytes_used(&self) -> usize {
        (self.0.units - self.0.free.available_permits().min(self.0.units)) * UNIT_BYTES
    }

    /// Bodies that wait for room.
    pub fn waiting(&self) -> usize {
        self.0.waiting.load(Ordering::Relaxed)
    }

    /// Room for one body of the length that its client says, which may be none.
    pub async fn room(&self, declared: usize) -> Option<Reserved> {
        let mut reserved = Reserved { memory: self.clone(), permit: None };
        let has_room = declared <= FREE_BYTES || reserved.add(declared).await;
        has_room.then_some(reserved)
    }
}

/// Room for one body.
#[derive(Debug)]
pub struct Reserved {
    memory: Memory,
    permit: Option<OwnedSemaphorePermit>,
}

impl Reserved {
    /// Reserves this many bytes. False if there is no room in time.
    pub async fn reach(&mut self, bytes: usize) -> bool {
        let has = self.bytes();
        if bytes <= has.max(FREE_BYTES) {
            return true;
        }
        // A request for more than the total would wait in vain.
        let step = (2 * has).max(FIRST_STEP_BYTES).min(self.memory.bytes_max());
        self.add(bytes.max(step) - has).await
    }

    async fn add(&mut self, bytes: usize) -> bool {
        let room = &self.memory.0;
        let Ok(units) = u32::try_from(bytes.div_ceil(UNIT_BYTES)) else { return false };
        let permit = if let Ok(permit) = Arc::clone(&room.free).try_acquire_many_owned(units) {
            permit
        } else {
            room.waiting.fetch_add(1, Ordering::Relaxed);
            let _waiting = WaitingBody(room);
            // It is never closed.
            let waited = tokio::time::timeout(WAIT_MAX, Arc::clone(&room.free).acquire_many_owned(units)).await;
            let Ok(Ok(permit)) = waited else { return false };
            permit
        };
        match &mut self.permit {
            Some(held) => held.merge(permit),
            none => *none = Some(permit),
        }
        true
    }

    fn bytes(&self) -> usize {
        self.permit.as_ref().map_or(0, |permit| permit.num_permits() * UNIT_BYTES)
    }

    /// The body, which keeps its room until the last of its bytes is dropped.
    pub fn hold(mut self, body: Bytes) -> Bytes {
        let Some(permit) = &mut self.permit else { return body };
        // The unused part is given back.
        drop(permit.split(permit.num_permits().saturating_sub(body.len().div_ceil(UNIT_BYTES))));
        Bytes::from_owner(HeldBody { body, _reserved: self })
    }
}

struct HeldBody {
    body: Bytes,
    _reserved: Reserved,
}

impl AsRef<[u8]> for HeldBody {
    fn as_ref(&self) -> &[u8] {
        &self.body
    }
}

struct WaitingBody<'a>(&'a Room);

impl Drop for WaitingBody<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1024 * 1024;

    #[tokio::test(start_paused = true)]
    async fn what_has_no_room_waits_and_gives_up() {
        let memory = Memory::new(10 * MIB);
        let first = memory.room(6 * MIB).await.unwrap();
        assert_eq!((memory.bytes_used(), memory.bytes_max()), (6 * MIB, 10 * MIB));
        let second = tokio::spawn({
            let memory = memory.clone();
            async move { memory.room(6 * MIB).await.is_some() }
        });
        tokio::task::yield_now().await;
        assert_eq!(memory.waiting(), 1);
        assert!(memory.room(FREE_BYTES).await.is_some(), "a small one does not wait behind it");
        drop(first);
        assert!(second.await.unwrap());
        assert_eq!((memory.bytes_used(), memory.waiting()), (0, 0));
        let _all = memory.room(10 * MIB).await.unwrap();
        let begun = tokio::time::Instant::now();
        assert!(memory.room(MIB).await.is_none());
        assert_eq!(begun.elapsed(), WAIT_MAX);
        assert!(memory.room(usize::MAX).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_may_fill_all_of_it() {
        let memory = Memory::new(3 * MIB + 1);
        assert!(memory.room(3 * MIB + 1).await.is_some());
        let mut reserved = memory.room(0).await.unwrap();
        for bytes in [MIB, 2 * MIB, 2 * MIB + 1, 3 * MIB + 1] {
            assert!(reserved.reach(bytes).await, "{bytes}");
        }
    }

    #[tokio::test]
    async fn a_body_of_unknown_length_grows_into_its_room_and_keeps_what_it_needs() {
        let memory = Memory::new(10 * MIB);
        let mut reserved = memory.room(0).await.unwrap();
        assert!(reserved.reach(FREE_BYTES).await);
        assert_eq!(memory.bytes_used(), 0);
        assert!(reserved.reach(FREE_BYTES + 1).await);
        assert_eq!(memory.bytes_used(), MIB);
        assert!(reserved.reach(MIB + 1).await);
        assert_eq!(memory.bytes_used(), 2 * MIB);
        let body = reserved.hold(Bytes::from(vec![7; MIB + 1]));
        assert_eq!(memory.bytes_used(), MIB + 1024);
        let last = body.slice(MIB..);
        drop(body);
        assert_eq!(memory.bytes_used(), MIB + 1024, "a part of it is still there");
        assert_eq!(last, [7_u8][..]);
        drop(last);
        assert_eq!(memory.bytes_used(), 0);
    }
}
