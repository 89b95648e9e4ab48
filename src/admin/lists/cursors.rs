//! Where the pages of lists end: clients name the last object that they have seen, and an endpoint knows only its own.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lru::LruCache;

use crate::fault::{Fault, excerpt};

/// Pages that are remembered; of more those that were asked for longest ago are forgotten.
const CURSORS_MAX: usize = 10_000;
/// Time for which it is remembered that a cursor is nowhere.
const ABSENT: Duration = Duration::from_mins(1);

/// Where pages end, as far as is remembered. It outlives every reload.
#[derive(Debug)]
pub(crate) struct Cursors(Mutex<LruCache<String, PageEnd>>);

/// Where a page ends.
#[derive(Clone, Debug)]
pub(super) enum PageEnd {
    /// So far at each organisation.
    At(Arc<[Cursor]>),
    /// No endpoint had that object at this moment.
    Nowhere(Instant),
}

/// How far a list has been read at an organisation.
#[derive(Clone, Debug)]
pub(super) struct Cursor {
    /// The organisation.
    pub organization: Arc<str>,
    /// The last object that the client has seen of it; none if it has seen none.
    pub after: Option<Box<str>>,
}

impl Default for Cursors {
    fn default() -> Self {
        // Bounded where it grows; a bounded one would take its room at once.
        Self(Mutex::new(LruCache::unbounded()))
    }
}

impl Cursors {
    fn lock(&self) -> MutexGuard<'_, LruCache<String, PageEnd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the list of this key has been read to; none if that is not known. A fault if it is nowhere.
    pub(super) fn find(&self, key: &str, after: &str, now: Instant) -> Result<Option<Arc<[Cursor]>>, Fault> {
        match self.lock().get(key) {
            Some(PageEnd::At(cursors)) => Ok(Some(Arc::clone(cursors))),
            Some(PageEnd::Nowhere(since)) if now.saturating_duration_since(*since) < ABSENT => {
                Err(Fault::ObjectUnknown { id: excerpt(after) })
            }
            Some(PageEnd::Nowhere(_)) | None => Ok(None),
        }
    }

    pub(super) fn put(&self, key: String, end: PageEnd) {
        let mut cursors = self.lock();
        cursors.put(key, end);
        if cursors.len() > CURSORS_MAX {
            cursors.pop_lru();
        }
    }
}
