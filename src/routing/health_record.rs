//! A record of health that many requests read and few write: of an endpoint, or of one of its keys.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::config::Breaker;
use crate::routing::health::{Closing, Effect, EndpointHealth, Gate, Health, Scope, Seen};

/// The record.
#[derive(Debug, Default)]
pub struct HealthRecord {
    health: Mutex<EndpointHealth>,
    /// Set while `health` has anything to say, so that the common case takes no lock.
    troubled: AtomicBool,
    /// Number of times that the record began anew: what an attempt of before shows says nothing.
    number: AtomicU32,
}

impl HealthRecord {
    /// Returns whether a request for a model may go there now. `model` is asked only if there is trouble.
    pub fn gate<'a>(&self, model: impl FnOnce() -> &'a str, now: Instant) -> Gate {
        if self.is_troubled() { self.read().gate(model(), now) } else { Gate::Open }
    }

    /// True while anything is held against it.
    pub fn is_troubled(&self) -> bool {
        self.troubled.load(Ordering::Acquire)
    }

    /// Lets one request through to what is cooling down; none if another one was faster.
    pub fn begin_trial(self: &Arc<Self>, model: &str) -> Option<Trial> {
        let scope = self.read().begin_trial(model)?;
        Some(Trial { record: Arc::clone(self), scope, model: model.into() })
    }

    /// The number of the current record, for [`HealthRecord::learn`].
    pub fn number(&self) -> u32 {
        self.number.load(Ordering::Relaxed)
    }

    /// True if nothing can change by what an attempt showed that began under the record of this number: all is well, or the attempt is of
    /// the past.
    pub fn has_nothing_to_learn(&self, seen: &Seen, number: u32) -> bool {
        let is_well = matches!(seen.effect, Effect::Answers | Effect::Success | Effect::Neutral);
        is_well && seen.trial.is_none() && !self.is_troubled() || number != self.number()
    }

    /// Takes in what an attempt for a model showed. `also`: the model's own name, if it had another one here until now. Returns what
    /// begins to cool down by it.
    pub fn learn(
        &self,
        model: &str,
        also: Option<&str>,
        seen: &Seen,
        now: Instant,
        breaker: &Breaker,
    ) -> Option<Scope> {
        let mut health = self.read();
        let cools = health.learn(model, seen, now, breaker);
        if let Some(name) = also {
            health.inherit(name, model);
        }
        let is_spotless = health.is_spotless();
        if is_spotless {
            health.forget_uses();
        }
        self.troubled.store(!is_spotless, Ordering::Release);
        cools
    }

    /// Forgets what is held against it.
    pub fn begin_anew(&self) {
        let mut health = self.read();
        *health = EndpointHealth::default();
        self.number.fetch_add(1, Ordering::Relaxed);
        self.troubled.store(false, Ordering::Release);
    }

    /// Puts back what was held against it as a whole before.
    pub fn put_back_whole(&self, before: Health) {
        let mut health = self.read();
        health.put_back_whole(before);
        self.troubled.store(!health.is_spotless(), Ordering::Release);
    }

    /// Takes in what another process has found out of a model, or of the whole if it names none.
    pub fn take_over(&self, model: &str, closing: &Closing, now: Instant) {
        let mut health = self.read();
        health.take_over(model, closing, now);
        self.troubled.store(!health.is_spotless(), Ordering::Release);
    }

    /// Reads it.
    pub fn read(&self) -> MutexGuard<'_, EndpointHealth> {
        // Plain values that are never left half written.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to try out what is cooling down; dropped, it is free for the next.
#[derive(Debug)]
pub struct Trial {
    record: Arc<HealthRecord>,
    scope: Scope,
    model: Box<str>,
}

impl Trial {
    /// What is tried out.
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// The same, if it is of this record.
    pub fn scope_in(&self, record: &Arc<HealthRecord>) -> Option<Scope> {
        Arc::ptr_eq(&self.record, record).then_some(self.scope)
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.record.read().end_trial(self.scope, &self.model);
    }
}
