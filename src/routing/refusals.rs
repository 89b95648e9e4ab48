//! Refusals of an endpoint's keys that come together and alike. A vendor that bans an address, or a wall in front of it, refuses every key
//! with the same words: then the keys are not to blame, and the endpoint rests as a whole.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::routing::health::EndpointHealth;
use crate::routing::health_record::HealthRecord;

/// The rest of an endpoint that refuses every key. One request at a time may try it when nobody else is left.
pub const ADDRESS_REST: Duration = Duration::from_mins(1);
/// Keys that have to be refused alike.
const KEYS: usize = 3;
/// Time within which they are.
const WITHIN: Duration = Duration::from_secs(2);

/// Refusals since a key was last answered.
#[derive(Debug, Default)]
pub struct Refusals {
    /// Set while there are any, so that a success takes no lock.
    are_any: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// The latest, one of each key; fewer than [`KEYS`].
    recent: Vec<Refusal>,
    /// The words with which the address is refused.
    of_address: Option<u64>,
}

#[derive(Debug)]
struct Refusal {
    record: Arc<HealthRecord>,
    /// What was held against the key before.
    before: EndpointHealth,
    words: u64,
    at: Instant,
}

impl Refusals {
    /// Notes that the key with this record was refused, which nothing is held against yet. True if it is the address that is refused: then
    /// what the refusals before did to their keys is undone.
    pub fn are_of_address(&self, record: &Arc<HealthRecord>, words: u64, now: Instant) -> bool {
        let mut seen = self.lock();
        self.are_any.store(true, Ordering::Relaxed);
        if seen.of_address == Some(words) {
            return true;
        }
        seen.recent.retain(|refusal| now.saturating_duration_since(refusal.at) < WITHIN && refusal.words == words);
        if seen.recent.iter().any(|refusal| Arc::ptr_eq(&refusal.record, record)) {
            return false;
        }
        if seen.recent.len() + 1 < KEYS {
            let before = record.read().clone();
            seen.recent.push(Refusal { record: Arc::clone(record), before, words, at: now });
            return false;
        }
        for Refusal { record, before, .. } in seen.recent.drain(..) {
            record.put_back(before);
        }
        seen.of_address = Some(words);
        true
    }

    /// Notes that a key was answered: the address is not refused.
    pub fn succeeded(&self) {
        if self.are_any.load(Ordering::Relaxed) {
            *self.lock() = Seen::default();
            self.are_any.store(false, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Breaker;
    use crate::routing::health::{Effect, Seen};

    fn refused(record: &HealthRecord, now: Instant) {
        let seen = Seen { effect: Effect::KeyRefused { at_most: Duration::MAX }, began: now, trial: None };
        record.learn("m", None, &seen, now, &Breaker { failures: 3, cool_down: Duration::from_mins(1) });
    }

    fn keys() -> [Arc<HealthRecord>; 4] {
        std::array::from_fn(|_| Arc::default())
    }

    #[test]
    fn three_keys_that_are_refused_alike_at_once_are_not_to_blame() {
        let (refusals, [a, b, c, d], now) = (Refusals::default(), keys(), Instant::now());
        for key in [&a, &a, &b] {
            assert!(!refusals.are_of_address(key, 7, now));
            refused(key, now);
        }
        assert!(a.is_troubled() && b.is_troubled());
        assert!(refusals.are_of_address(&c, 7, now));
        assert!(!a.is_troubled() && !b.is_troubled() && !c.is_troubled());
        assert!(refusals.are_of_address(&d, 7, now + Duration::from_hours(1)), "as long as none is answered");
        refusals.succeeded();
        assert!(!refusals.are_of_address(&d, 7, now + Duration::from_hours(1)));
    }

    #[test]
    fn others_are_refused_for_themselves() {
        for (later, words, answered) in [(3, 7, false), (0, 8, false), (0, 7, true)] {
            let (refusals, [a, b, c, _], now) = (Refusals::default(), keys(), Instant::now());
            assert!(!refusals.are_of_address(&a, 7, now));
            assert!(!refusals.are_of_address(&b, 7, now));
            if answered {
                refusals.succeeded();
            }
            assert!(
                !refusals.are_of_address(&c, words, now + Duration::from_secs(later)),
                "{later} {words} {answered}"
            );
        }
    }
}
