//! Which calls an endpoint does not have, so that it is asked for each of them once.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::request::shape::CallShape;

/// Time for which it is remembered that an endpoint does not have a call.
const REMEMBERED: Duration = Duration::from_mins(5);
/// Calls that are remembered for an endpoint, the latest.
const CALLS_MAX: usize = 64;

/// Memory of one endpoint.
#[derive(Debug, Default)]
pub struct PathMemory {
    /// Shapes that it has answered well, by their bits: nothing is remembered against them.
    served: AtomicU64,
    /// Set while `missing` has an entry, so that the common case takes no lock.
    is_missing_any: AtomicBool,
    missing: Mutex<Vec<(CallShape, Instant)>>,
}

impl PathMemory {
    /// Notes that the endpoint answered such a call well.
    pub fn note_served(&self, shape: CallShape) {
        if self.served.load(Ordering::Relaxed) & shape.bit() == 0 {
            self.served.fetch_or(shape.bit(), Ordering::Relaxed);
            self.lock().retain(|(missing, _)| *missing != shape);
        }
    }

    /// Notes that the endpoint does not have such a call, or not for this model.
    pub fn note_missing(&self, shape: CallShape, of_model: Option<&str>, now: Instant) {
        if self.served.load(Ordering::Relaxed) & shape.bit() != 0 {
            return;
        }
        let shape = of_model.map_or(shape, |model| shape.of_model(model));
        let Some(until) = now.checked_add(REMEMBERED) else { return };
        let mut missing = self.lock();
        missing.retain(|(known, until)| *known != shape && *until > now);
        if missing.len() >= CALLS_MAX {
            missing.remove(0);
        }
        missing.push((shape, until));
        self.is_missing_any.store(true, Ordering::Relaxed);
    }

    /// True if the endpoint is known not to have such a call for a model.
    #[inline]
    pub fn lacks(&self, shape: Option<CallShape>, model: &str, now: Instant) -> bool {
        self.is_missing_any.load(Ordering::Relaxed) && shape.is_some_and(|shape| self.lacks_one(shape, model, now))
    }

    fn lacks_one(&self, shape: CallShape, model: &str, now: Instant) -> bool {
        if self.served.load(Ordering::Relaxed) & shape.bit() != 0 {
            return false;
        }
        let shapes = [shape, shape.of_model(model)];
        self.lock().iter().any(|(known, until)| shapes.contains(known) && *until > now)
    }

    /// Forgets everything: the endpoint may be another one.
    pub fn forget(&self) {
        self.served.store(0, Ordering::Relaxed);
        self.is_missing_any.store(false, Ordering::Relaxed);
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(CallShape, Instant)>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Method;

    #[test]
    fn what_is_missing_is_remembered_for_a_while_unless_it_was_ever_there() {
        let (memory, now) = (PathMemory::default(), Instant::now());
        let shape = |path: &str| CallShape::new(&Method::POST, path);
        let chat = shape("/v1/chat/completions");
        // One of many calls shares the other's bit, and is then never taken for missing.
        let mut others = (0..).map(|number| shape(&format!("/v1/calls{}", "x".repeat(number))));
        let count = others.find(|other| other.unwrap().bit() != chat.unwrap().bit()).unwrap();
        let lacks = |shape, now| memory.lacks(shape, "m", now);
        assert!(!lacks(count, now) && !lacks(None, now));
        memory.note_served(chat.unwrap());
        for missing in [count, chat] {
            memory.note_missing(missing.unwrap(), None, now);
        }
        assert!(lacks(count, now) && !lacks(chat, now) && !lacks(None, now));
        assert!(!lacks(count, now + REMEMBERED));
        memory.note_served(count.unwrap());
        assert!(!lacks(count, now), "it was there after all");
        memory.forget();
        memory.note_missing(chat.unwrap(), Some("made-up"), now);
        assert!(memory.lacks(chat, "made-up", now) && !lacks(chat, now));
        memory.note_missing(chat.unwrap(), None, now);
        assert!(lacks(chat, now));
        for number in 0..200 {
            let path = format!("/v1/{}", "y".repeat(number + 1));
            memory.note_missing(CallShape::new(&Method::POST, &path).unwrap(), None, now);
        }
        assert_eq!(memory.lock().len(), CALLS_MAX);
        memory.note_missing(count.unwrap(), None, now);
        assert!(lacks(count, now), "made-up calls keep no room from real ones");
    }
}
