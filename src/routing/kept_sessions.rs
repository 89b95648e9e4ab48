//! Sessions that are known without a look into the ledger, with a bound for all of them and one for each caller, so that nobody's many
//! sessions push out another's few.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lru::LruCache;

/// Sessions in all; of more, those that were used longest ago are left out.
pub(super) const SESSIONS_MAX: usize = 100_000;
/// Sessions of a caller with a key of its own.
pub(super) const CALLER_SESSIONS_MAX: usize = 1000;
/// Sessions of the key that all have, which may be everybody.
const SHARED_SESSIONS_MAX: usize = SESSIONS_MAX / 2;
/// Caller of those.
const SHARED: u64 = 0;

/// Where a session is.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    /// Id of the endpoint.
    pub(super) endpoint: Arc<str>,
    /// Hash of the caller's name.
    pub(super) caller: u64,
    /// When it was used last.
    pub(super) used: Instant,
    /// When the ledger was told last.
    pub(super) written: Instant,
}

/// Sessions by the hashes of their names.
#[derive(Debug)]
pub(super) struct KeptSessions {
    all: LruCache<u64, Kept>,
    by_caller: HashMap<u64, LruCache<u64, ()>>,
}

impl Default for KeptSessions {
    fn default() -> Self {
        // Bounded where they grow; a bounded one would take its room at once.
        Self { all: LruCache::unbounded(), by_caller: HashMap::new() }
    }
}

impl KeptSessions {
    /// Number of sessions.
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Returns a session that is used now, unless it was used last longer than this ago: then it is forgotten.
    pub(super) fn used(&mut self, hash: u64, now: Instant, longest: Duration) -> Option<&Kept> {
        if now.saturating_duration_since(self.all.peek(&hash)?.used) >= longest {
            self.forget(hash);
            return None;
        }
        let kept = self.all.get_mut(&hash)?;
        kept.used = now;
        if let Some(of_caller) = self.by_caller.get_mut(&kept.caller) {
            of_caller.promote(&hash);
        }
        Some(kept)
    }

    /// Returns a session without using it.
    pub(super) fn peek_mut(&mut self, hash: u64) -> Option<&mut Kept> {
        self.all.peek_mut(&hash)
    }

    /// Adds a session, or puts it elsewhere.
    pub(super) fn keep(&mut self, hash: u64, kept: Kept) {
        let caller = kept.caller;
        self.all.put(hash, kept);
        let of_caller = self.by_caller.entry(caller).or_insert_with(LruCache::unbounded);
        of_caller.put(hash, ());
        let longest = if caller == SHARED { SHARED_SESSIONS_MAX } else { CALLER_SESSIONS_MAX };
        if of_caller.len() > longest
            && let Some((oldest, ())) = of_caller.pop_lru()
        {
            self.all.pop(&oldest);
        }
        if self.all.len() > SESSIONS_MAX
            && let Some((oldest, kept)) = self.all.pop_lru()
        {
            self.forget_of_caller(oldest, kept.caller);
        }
    }

    /// Forgets a session.
    pub(super) fn forget(&mut self, hash: u64) {
        if let Some(kept) = self.all.pop(&hash) {
            self.forget_of_caller(hash, kept.caller);
        }
    }

    fn forget_of_caller(&mut self, hash: u64, caller: u64) {
        if let Some(of_caller) = self.by_caller.get_mut(&caller) {
            of_caller.pop(&hash);
            if of_caller.is_empty() {
                self.by_caller.remove(&caller);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_hours(1);

    fn kept(caller: u64, used: Instant) -> Kept {
        Kept { endpoint: "a".into(), caller, used, written: used }
    }

    #[test]
    fn a_caller_with_many_sessions_pushes_out_its_own_only() {
        let (mut sessions, now) = (KeptSessions::default(), Instant::now());
        sessions.keep(1, kept(7, now));
        sessions.keep(10, kept(8, now));
        for hash in 11..11 + 2 * CALLER_SESSIONS_MAX as u64 {
            // One of its own is used all the time.
            assert!(sessions.used(10, now, HOUR).is_some(), "{hash}");
            sessions.keep(hash, kept(8, now));
        }
        assert_eq!(sessions.len(), CALLER_SESSIONS_MAX + 1);
        assert!(sessions.used(1, now, HOUR).is_some());
        assert!(sessions.used(11, now, HOUR).is_none());
    }

    #[test]
    fn all_together_have_a_bound_and_the_shared_key_one_of_half_of_it() {
        let (mut sessions, now) = (KeptSessions::default(), Instant::now());
        for hash in 0..SESSIONS_MAX as u64 {
            sessions.keep(hash, kept(SHARED, now));
        }
        assert_eq!(sessions.len(), SHARED_SESSIONS_MAX);
        for number in 1..=SESSIONS_MAX as u64 {
            sessions.keep(u64::MAX - number, kept(number, now));
        }
        assert_eq!((sessions.len(), sessions.by_caller.len()), (SESSIONS_MAX, SESSIONS_MAX), "none without a session");
    }

    #[test]
    fn what_is_forgotten_or_unused_is_gone() {
        let (mut sessions, now) = (KeptSessions::default(), Instant::now());
        sessions.keep(1, kept(7, now));
        sessions.keep(2, kept(7, now));
        sessions.forget(1);
        assert!(sessions.used(1, now, HOUR).is_none());
        assert!(sessions.used(2, now + HOUR / 2, HOUR).is_some());
        assert!(sessions.used(2, now + HOUR, HOUR).is_some(), "used meanwhile");
        assert!(sessions.used(2, now + 2 * HOUR, HOUR).is_none());
        assert!(sessions.by_caller.is_empty());
    }
}
