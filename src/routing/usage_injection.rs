//! `stream_options`: they are added to requests for streams whose clients did not ask for the usage, unless the config says never,
//! the endpoint refused them, or its streams report their usage anyway.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::limit::Stamp;

/// Time for which an endpoint that refused `stream_options` is not sent any; then it is tried again: it may support them by then,
/// or it was one of its models alone that did not know them.
const REFUSED: Duration = Duration::from_hours(1);

/// State of one endpoint as to `stream_options` that the gateway adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageInjection {
    /// They are added.
    Wanted,
    /// The endpoint refused them, so they are not added until then.
    Refused(Stamp),
    /// Streams of the endpoint report their usage without being asked.
    Unneeded,
}

/// Time for which it is proven that an endpoint takes them.
const ACCEPTED: Duration = Duration::from_hours(1);
/// Time between two notes of that.
const NOTE_AGAIN: Duration = Duration::from_mins(1);

/// Memory of one endpoint.
#[derive(Debug, Default)]
pub struct InjectionMemory {
    refused_until: AtomicU64,
    accepted_until: AtomicU64,
}

impl InjectionMemory {
    /// State at this moment.
    pub fn state(&self, now: Stamp) -> UsageInjection {
        match Stamp(self.refused_until.load(Ordering::Relaxed)) {
            Stamp::NEVER => UsageInjection::Unneeded,
            until if until > now => UsageInjection::Refused(until),
            _ => UsageInjection::Wanted,
        }
    }

    /// Forgets everything: the endpoint may be another one.
    pub fn forget(&self) {
        self.refused_until.store(0, Ordering::Relaxed);
        self.accepted_until.store(0, Ordering::Relaxed);
    }

    /// Notes that the endpoint refused them.
    pub fn note_refused(&self, now: Stamp) {
        self.refused_until.store((now + REFUSED).0, Ordering::Relaxed);
    }

    /// Notes that the endpoint answered a stream that had them.
    pub fn note_accepted(&self, now: Stamp) {
        let until = now + ACCEPTED;
        // Not for every answer, since other threads read it.
        if until - Stamp(self.accepted_until.load(Ordering::Relaxed)) > NOTE_AGAIN {
            self.accepted_until.store(until.0, Ordering::Relaxed);
        }
    }

    /// True if it answered such a stream within the last hour, so that a refusal is likely to be about something else.
    pub fn has_accepted(&self, now: Stamp) -> bool {
        Stamp(self.accepted_until.load(Ordering::Relaxed)) > now
    }

    /// Notes that the endpoint's streams report their usage anyway.
    pub fn note_unneeded(&self) {
        self.refused_until.store(Stamp::NEVER.0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_forgotten_after_an_hour() {
        let memory = InjectionMemory::default();
        assert_eq!(memory.state(Stamp(5)), UsageInjection::Wanted);
        memory.note_refused(Stamp(5));
        assert_eq!(memory.state(Stamp(6)), UsageInjection::Refused(Stamp(3_600_005)));
        assert_eq!(memory.state(Stamp(3_600_005)), UsageInjection::Wanted);
        memory.note_unneeded();
        assert_eq!(memory.state(Stamp(u64::MAX / 2)), UsageInjection::Unneeded);
    }

    #[test]
    fn an_acceptance_counts_for_an_hour() {
        let memory = InjectionMemory::default();
        assert!(!memory.has_accepted(Stamp(5)));
        memory.note_accepted(Stamp(5));
        assert!(memory.has_accepted(Stamp(3_600_004)) && !memory.has_accepted(Stamp(3_600_005)));
        memory.note_accepted(Stamp(10));
        assert!(!memory.has_accepted(Stamp(3_600_005)), "it is noted once a minute");
        memory.note_accepted(Stamp(60_006));
        assert!(memory.has_accepted(Stamp(3_660_005)));
    }
}
