//! Refusals of an endpoint's keys that come together and alike. A vendor that bans an address, or a wall in front of it, refuses every key
//! with the same words: then the keys are not to blame, and the endpoint rests as a whole.
//!
//! It is a suspicion until a key is answered: then the address is in order, or in order again. A key that was refused meanwhile is not
//! blamed for that, but is the next time that it alone is refused.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::routing::health::Health;
use crate::routing::health_record::HealthRecord;

/// The rest of an endpoint that refuses every key. One request at a time may try it when nobody else is left.
pub const ADDRESS_REST: Duration = Duration::from_mins(1);
/// Keys that have to be refused alike.
const KEYS: usize = 3;
/// Time within which they are.
const WITHIN: Duration = Duration::from_secs(2);
/// Keys that are remembered to have been refused while the address was suspected, and for how long from its end on.
const SUSPECTS_MAX: usize = 64;
const SUSPECTED: Duration = Duration::from_mins(10);

/// Refusals since a key was last answered.
#[derive(Debug, Default)]
pub struct Refusals {
    /// Set while there are any, so that a success takes no lock.
    are_any: AtomicBool,
    seen: Mutex<Suspicion>,
}

#[derive(Debug, Default)]
struct Suspicion {
    /// The latest, one of each key; fewer than [`KEYS`].
    recent: Vec<Refusal>,
    /// The words with which the address is refused.
    of_address: Option<u64>,
    /// Keys that were refused while it was, and when that was last known.
    suspects: Vec<(Arc<HealthRecord>, Instant)>,
}

#[derive(Debug)]
struct Refusal {
    record: Arc<HealthRecord>,
    /// What was held against the key before.
    before: Health,
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
            seen.suspect(record, now);
            return true;
        }
        let is_fresh = |at: Instant, time| now.saturating_duration_since(at) < time;
        if seen.suspects.iter().any(|(known, at)| Arc::ptr_eq(known, record) && is_fresh(*at, SUSPECTED)) {
            return false;
        }
        seen.recent.retain(|refusal| is_fresh(refusal.at, WITHIN) && refusal.words == words);
        if seen.recent.iter().any(|refusal| Arc::ptr_eq(&refusal.record, record)) {
            return false;
        }
        if seen.recent.len() + 1 < KEYS {
            let before = record.read().whole().clone();
            seen.recent.push(Refusal { record: Arc::clone(record), before, words, at: now });
            return false;
        }
        for Refusal { record, before, .. } in std::mem::take(&mut seen.recent) {
            record.put_back_whole(before);
            seen.suspect(&record, now);
        }
        seen.suspect(record, now);
        seen.of_address = Some(words);
        true
    }

    /// Notes that the key with this record was answered. True if the address was taken to be refused until now.
    pub fn answered(&self, record: &Arc<HealthRecord>, now: Instant) -> bool {
        if !self.are_any.load(Ordering::Relaxed) {
            return false;
        }
        let mut seen = self.lock();
        seen.recent.clear();
        let was_refused = seen.of_address.take().is_some();
        if was_refused {
            seen.suspects.iter_mut().for_each(|(_, at)| *at = now);
        }
        let is_fresh = |at: Instant| now.saturating_duration_since(at) < SUSPECTED;
        seen.suspects.retain(|(known, at)| is_fresh(*at) && !Arc::ptr_eq(known, record));
        self.are_any.store(!seen.suspects.is_empty(), Ordering::Relaxed);
        was_refused
    }

    /// Forgets them: the endpoint is reached in another way now.
    pub fn forget(&self) {
        *self.lock() = Suspicion::default();
    }

    fn lock(&self) -> MutexGuard<'_, Suspicion> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Suspicion {
    fn suspect(&mut self, record: &Arc<HealthRecord>, now: Instant) {
        let is_known = self.suspects.iter().any(|(known, _)| Arc::ptr_eq(known, record));
        if !is_known && self.suspects.len() < SUSPECTS_MAX {
            self.suspects.push((Arc::clone(record), now));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Breaker;
    use crate::routing::health::{Effect, Gate, Scope, Seen};

    const REFUSED: Effect = Effect::KeyRefused { at_most: Duration::MAX };
    const BREAKER: Breaker = Breaker { failures: 3, cool_down: Duration::from_mins(1) };

    fn learn(record: &HealthRecord, trial: Option<Scope>, now: Instant) {
        record.learn("m", None, &Seen { effect: REFUSED, began: now, trial }, now, &BREAKER);
    }

    fn keys() -> [Arc<HealthRecord>; 4] {
        std::array::from_fn(|_| Arc::default())
    }

    #[test]
    fn three_keys_that_are_refused_alike_at_once_are_not_to_blame() {
        let (refusals, [a, b, c, d], now) = (Refusals::default(), keys(), Instant::now());
        let refused = |key: &Arc<HealthRecord>, at| refusals.are_of_address(key, 7, at);
        for key in [&a, &a, &b] {
            assert!(!refused(key, now));
            learn(key, None, now);
        }
        assert!(a.is_troubled() && b.is_troubled());
        assert!(refused(&c, now));
        assert!(!a.is_troubled() && !b.is_troubled() && !c.is_troubled());
        let later = now + Duration::from_hours(1);
        assert!(refused(&d, later), "as long as none is answered");
        assert!(refusals.answered(&a, later) && !refusals.answered(&a, later));
        for key in [&a, &b, &c, &d] {
            assert!(!key.is_troubled(), "nobody is blamed for an address that is in order again");
        }
        // Three that are refused all the same are so for themselves, and are not taken for the address once more.
        for key in [&b, &c, &d, &b] {
            assert!(!refused(key, later));
        }
        assert!(!refused(&a, later), "one that was answered counts anew");
    }

    #[test]
    fn others_are_refused_for_themselves() {
        for (later, words, answered) in [(3, 7, false), (0, 8, false), (0, 7, true)] {
            let (refusals, [a, b, c, _], now) = (Refusals::default(), keys(), Instant::now());
            assert!(!refusals.are_of_address(&a, 7, now));
            assert!(!refusals.are_of_address(&b, 7, now));
            if answered {
                refusals.answered(&a, now);
            }
            let at = now + Duration::from_secs(later);
            assert!(!refusals.are_of_address(&c, words, at), "{later} {words} {answered}");
        }
    }

    #[test]
    fn a_key_that_was_on_trial_can_be_tried_again() {
        let (refusals, keys, now) = (Refusals::default(), keys(), Instant::now());
        for key in &keys[..3] {
            learn(key, None, now);
        }
        let later = now + Duration::from_mins(11);
        for key in &keys[..3] {
            let trial = key.begin_trial("m").unwrap();
            if !refusals.are_of_address(key, 7, later) {
                learn(key, Some(trial.scope()), later);
            }
        }
        for key in &keys[..3] {
            assert_eq!(key.gate(|| "m", later), Gate::TrialDue);
            assert!(key.begin_trial("m").is_some());
        }
    }
}
