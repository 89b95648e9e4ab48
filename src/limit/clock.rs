//! Clocks by which limits are measured.

use std::ops::{Add, Sub};
use std::time::{Duration, Instant, SystemTime};

/// A moment in milliseconds since the machine's boot, including time asleep (`CLOCK_BOOTTIME`). Setting the wall clock
/// therefore does not move a window, and all processes on the machine agree on the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp(pub u64);

impl Stamp {
    /// A moment that never comes.
    pub const NEVER: Self = Self(u64::MAX);

    /// Returns the time until a later moment; zero if it is not later.
    pub fn until(self, later: Self) -> Duration {
        Duration::from_millis(later.0.saturating_sub(self.0))
    }
}

impl Add<Duration> for Stamp {
    type Output = Self;

    /// Fractions of a millisecond are rounded up, so that no client comes back too early.
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

/// All clocks, read at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// For durations within one process, such as cool-downs; it never steps.
    pub now: Instant,
    /// For windows that processes share; it never steps.
    pub boot: Stamp,
    /// For calendar days; it steps when it is set.
    pub wall: SystemTime,
}

impl Clock {
    /// Reads the clocks.
    pub fn read() -> Self {
        Self { now: Instant::now(), boot: since_boot(), wall: SystemTime::now() }
    }

    /// Returns the moment after this time, in seconds of Unix time.
    pub fn seconds_after(&self, time: Duration) -> i64 {
        let since = self.wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.saturating_add(time).as_secs()).unwrap_or(i64::MAX)
    }

    /// Returns the clocks at a later moment, if they were not set meanwhile and the machine did not sleep. For uses
    /// that need not be exact, since it is cheaper than reading the clocks.
    #[must_use]
    pub fn at(&self, now: Instant) -> Self {
        let since = now.saturating_duration_since(self.now);
        Self { now, boot: self.boot + since, wall: self.wall.checked_add(since).unwrap_or(self.wall) }
    }
}

#[cfg(target_os = "linux")]
const SINCE_BOOT: rustix::time::ClockId = rustix::time::ClockId::Boottime;
// On other systems this clock includes time asleep.
#[cfg(not(target_os = "linux"))]
const SINCE_BOOT: rustix::time::ClockId = rustix::time::ClockId::Monotonic;

fn since_boot() -> Stamp {
    let time = rustix::time::clock_gettime(SINCE_BOOT);
    let part = |value: i64| u64::try_from(value).unwrap_or_default();
    Stamp(part(time.tv_sec) * 1000 + part(time.tv_nsec) / 1_000_000)
}
