//! The server's time, by which a ledger on it goes.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

use crate::limit::{Clock, Stamp};

/// Difference between the server's clock and this machine's time since boot, in milliseconds.
#[derive(Debug)]
pub struct ServerClock(AtomicI64);

/// What the difference is while it is not known.
const UNKNOWN: i64 = i64::MIN;

impl Default for ServerClock {
    fn default() -> Self {
        Self(AtomicI64::new(UNKNOWN))
    }
}

impl ServerClock {
    /// Sets the difference, in milliseconds.
    pub(super) fn set(&self, ahead: i64) {
        self.0.store(ahead, Ordering::Relaxed);
    }

    /// Returns the clocks with the time of day as the server has it, once that is known.
    pub fn read(&self) -> Clock {
        let clock = Clock::read();
        match self.0.load(Ordering::Relaxed) {
            UNKNOWN => clock,
            ahead => {
                let since = i64::try_from(clock.boot.0).unwrap_or(i64::MAX).saturating_add(ahead);
                let since = Duration::from_millis(u64::try_from(since).unwrap_or_default());
                Clock { wall: SystemTime::UNIX_EPOCH + since, ..clock }
            }
        }
    }
}

/// Whose time a ledger goes by.
#[derive(Clone)]
pub enum Time {
    /// The server's.
    Server(Arc<ServerClock>),
    /// One that a test sets.
    Given(Arc<dyn Fn() -> Clock + Send + Sync>),
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Server(_) => "Server",
            Self::Given(_) => "Given",
        })
    }
}

impl Time {
    pub(super) fn boot(&self) -> Stamp {
        match self {
            Self::Server(_) => Clock::read().boot,
            Self::Given(clock) => clock().boot,
        }
    }
}
