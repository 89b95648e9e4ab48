//! Prefetched permits: of many requests in a short time, only the first waits for the ledger.
//!
//! Permits are prefetched in the same step as a request's own permit and have the same age, so the rules for a permit's
//! age apply to them. They are prefetched only for accounts that get requests continuously and have plenty left.
//! Unused ones are given back after [`USABLE`]; a process that is killed wastes them.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::limit::{Clock, CountedAt, Gauge, PERMIT_AGE_MAX, Stamp, View};

/// Time within which a prefetched permit can be taken. The rest of [`PERMIT_AGE_MAX`] is for the way to the endpoint.
pub(super) const USABLE: Duration = Duration::from_millis(100);
/// Shortest time over which the demand for permits is measured.
const WATCHED: Duration = Duration::from_millis(10);
/// Smallest number of permits worth prefetching.
const PERMITS_MIN: u64 = 8;
/// Largest number of permits to prefetch: this many in each [`USABLE`] are about 40,000 a second.
const PERMITS_MAX: u64 = 4096;
/// At most this part (1/256) of the permits left is prefetched. It bounds the permits that other processes miss or that
/// a kill wastes. Permits of small limits, and of limits that are nearly used up, are drawn one by one. At the rate
/// that uses up `rpm` in exactly a minute, a full buffer is a 600th of the limit; this bound makes it smaller only
/// while less than 43 % (256/600) of the limit is left.
pub(super) const PART_OF_LEFT: u64 = 256;
/// Token limits count as nearly reached when less than this part (1/8) is left.
const PART_OF_TOKENS: u64 = 8;

/// The prefetched permits of one set of accounts.
#[derive(Debug, Default)]
pub(super) struct PrefetchBuffer(Mutex<BufferState>);

#[derive(Debug, Default)]
struct BufferState {
    /// The permits; `None` if there are none.
    ahead: Option<PrefetchedPermits>,
    /// Permits taken since the last [`PrefetchBuffer::count_taken`].
    taken: u64,
}

/// Permits that were drawn at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct PrefetchedPermits {
    /// When each of them was counted.
    pub(super) counted: CountedAt,
    /// Number of permits.
    pub(super) permits: u64,
}

impl PrefetchBuffer {
    /// Takes out one permit, if there is one that is young enough. `days_last` tells whether permits that were counted at
    /// a moment count in today's days.
    pub(super) fn take(&self, clock: &Clock, days_last: impl FnOnce(CountedAt) -> bool) -> Option<CountedAt> {
        let mut content = self.lock();
        let ahead = content.ahead.as_mut()?;
        let counted = ahead.counted;
        if clock.boot - counted.boot >= USABLE || !days_last(counted) {
            return None;
        }
        ahead.permits -= 1;
        if ahead.permits == 0 {
            content.ahead = None;
        }
        content.taken += 1;
        Some(counted)
    }

    /// True if there is a permit that is young enough.
    pub(super) fn has(&self, clock: &Clock) -> bool {
        self.lock().ahead.is_some_and(|ahead| clock.boot - ahead.counted.boot < USABLE)
    }

    /// Puts permits into an empty buffer.
    pub(super) fn put(&self, counted: CountedAt, permits: u64) {
        self.lock().ahead = Some(PrefetchedPermits { counted, permits });
    }

    /// Takes out all permits.
    pub(super) fn take_all(&self) -> Option<PrefetchedPermits> {
        self.lock().ahead.take()
    }

    /// Returns the number of permits taken since the last call.
    fn count_taken(&self) -> u64 {
        std::mem::take(&mut self.lock().taken)
    }

    fn lock(&self) -> MutexGuard<'_, BufferState> {
        // The code that holds the lock does not panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Demand for the permits of one set of accounts.
#[derive(Debug, Default)]
pub(super) struct Demand {
    since: Stamp,
    draws: u64,
}

impl Demand {
    /// Counts a drawn permit, and returns how many more to prefetch with it. `spare` returns how many may be, for which
    /// [`spare`] is asked about each account.
    pub(super) fn drawn(&mut self, buffer: &PrefetchBuffer, spare: impl FnOnce() -> u64, now: Stamp) -> u64 {
        self.draws += 1;
        let watched = now - self.since;
        if watched < WATCHED {
            return 0;
        }
        let gone = self.draws + buffer.count_taken();
        *self = Self { since: now, draws: 0 };
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let expected = gone.saturating_mul(millis(USABLE)) / millis(watched).max(1);
        if expected < PERMITS_MIN {
            return 0;
        }
        let permits = expected.min(PERMITS_MAX).min(spare());
        if permits < PERMITS_MIN { 0 } else { permits }
    }
}

/// Returns how many permits of an account may be prefetched, given what it has left; `None` if that does not matter, since it
/// has no limit.
pub(super) fn spare(view: &View) -> Option<u64> {
    // The tokens of a request are known only afterwards, so near a token limit each request is checked on its own.
    let is_near = |gauge: Option<Gauge>| gauge.is_some_and(|gauge| gauge.left() < gauge.limit / PART_OF_TOKENS);
    if is_near(view.gauges.tpm) || is_near(view.gauges.tpd) {
        return Some(0);
    }
    let left = [view.gauges.rpm, view.gauges.rpd].into_iter().flatten().map(|gauge| gauge.left()).min();
    left.map(|left| left / PART_OF_LEFT)
}

const _: () =
    assert!(USABLE.as_millis() < PERMIT_AGE_MAX.as_millis(), "what is taken out must still reach the endpoint");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PerLimit;

    fn left(rpm: u64, tpm: Option<u64>) -> View {
        let gauge = |left: u64| Gauge { limit: 1_000_000, used: 1_000_000 - left, resets: None };
        View {
            gauges: PerLimit { rpm: Some(gauge(rpm)), tpm: tpm.map(gauge), ..PerLimit::default() },
            ..View::default()
        }
    }

    fn at(clock: &Clock) -> CountedAt {
        CountedAt::now(clock)
    }

    #[test]
    fn permits_are_taken_while_they_are_young() {
        let (buffer, clock) = (PrefetchBuffer::default(), Clock::read());
        assert!(buffer.take(&clock, |_| true).is_none());
        buffer.put(at(&clock), 3);
        assert_eq!(buffer.take(&clock, |_| true), Some(at(&clock)));
        let later = |millis| Clock { boot: clock.boot + Duration::from_millis(millis), ..clock };
        assert_eq!(buffer.take(&later(99), |_| true), Some(at(&clock)));
        assert!(buffer.take(&later(100), |_| true).is_none());
        assert!(buffer.take(&clock, |_| false).is_none(), "the day has turned");
        assert_eq!(buffer.take_all().map(|ahead| ahead.permits), Some(1));
        assert!(buffer.take_all().is_none());
    }

    #[test]
    fn as_many_are_drawn_ahead_as_will_be_wanted() {
        let ahead = |draws: u64, taken: u64, millis: u64, view: View| {
            let (buffer, clock) = (PrefetchBuffer::default(), Clock::read());
            let mut demand = Demand { since: clock.boot, draws: draws - 1 };
            buffer.put(at(&clock), 5000);
            assert!((0..taken).all(|_| buffer.take(&clock, |_| true).is_some()));
            demand.drawn(&buffer, || spare(&view).unwrap(), clock.boot + Duration::from_millis(millis))
        };
        let plenty = left(900_000, None);
        assert_eq!(ahead(10, 0, 10, plenty), 100);
        assert_eq!(ahead(1, 99, 100, plenty), 100, "those taken out of the last buffer count as well");
        assert_eq!(ahead(10, 0, 9, plenty), 0, "too short a time tells nothing");
        assert_eq!(ahead(7, 0, 100, plenty), 0, "who comes now and then is served one by one");
        assert_eq!(ahead(100, 0, 10, left(25_600, None)), 100, "a part of what is left");
        assert_eq!(ahead(100, 0, 10, left(2000, None)), 0);
        assert_eq!(ahead(100, 0, 10, left(900_000, Some(100_000))), 0, "few tokens are left");
        assert_eq!(ahead(100, 0, 10, left(900_000, Some(200_000))), 1000);
    }
}
