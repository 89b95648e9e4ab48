//! The clocks that limits go by.

use std::ops::{Add, Sub};
use std::time::{Duration, Instant, SystemTime};

/// A moment in milliseconds since the machine was started, time asleep included (`CLOCK_BOOTTIME`), so that setting the
/// machine's clock neither opens nor closes a window, and all processes on it mean the same moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp(pub u64);

impl Stamp {
    /// No moment that ever comes.
    pub const NEVER: Self = Self(u64::MAX);

    /// Returns the time until a later moment; zero if it is not later.
    pub fn until(self, later: Self) -> Duration {
        Duration::from_millis(later.0.saturating_sub(self.0))
    }
}

impl Add<Duration> for Stamp {
    type Output = Self;

    /// Fractions of a millisecond are rounded up, so that no client comes too early.
    fn add(self, wait: Duration) -> Self {
        let millis = wait.as_nanos().div_ceil(1_000_000);
        Self(self.0.saturating_add(u64::try_from(millis).unwrap_or(u64::MAX)))
    }
}

impl Sub for Stamp {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        earlier.until(self)
    }
}

/// Every clock, read together.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// For measurements of one process, such as cool-downs; it never steps.
    pub now: Instant,
    /// For windows that processes share; it never steps either.
    pub boot: Stamp,
    /// For calendar days; it may be set.
    pub wall: SystemTime,
}

impl Clock {
    /// The clocks as they are now.
    pub fn read() -> Self {
        Self { now: Instant::now(), boot: since_boot(), wall: SystemTime::now() }
    }

    /// The clocks at a later moment, unless they were set meanwhile or the machine slept: for what need not be exact, since it costs
    /// less than to read them.
    #[must_use]
    pub fn at(&self, now: Instant) -> Self {
        let since = now.saturating_duration_since(self.now);
        Self { now, boot: self.boot + since, wall: self.wall.checked_add(since).unwrap_or(self.wall) }
    }
}

#[cfg(target_os = "linux")]
const SINCE_BOOT: rustix::time::ClockId = rustix::time::ClockId::Boottime;
// Elsewhere this clock runs on while the machine sleeps.
#[cfg(not(target_os = "linux"))]
const SINCE_BOOT: rustix::time::ClockId = rustix::time::ClockId::Monotonic;

fn since_boot() -> Stamp {
    let time = rustix::time::clock_gettime(SINCE_BOOT);
    let part = |value: i64| u64::try_from(value).unwrap_or_default();
    Stamp(part(time.tv_sec) * 1000 + part(time.tv_nsec) / 1_000_000)
}
