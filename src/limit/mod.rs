//! How much an endpoint may be asked: requests and tokens in any 60 seconds and in a calendar day, and requests at once.
//! Pure; the clock is passed in.
//!
//! [`Usage`] holds what counts for one endpoint and says what is still free. Where the counts are kept, and who may change
//! them, is [`ledger`](crate::ledger)'s business.

mod calendar;
mod clock;
mod promise;
mod usage;
mod window;

use jiff::tz::TimeZone;

use crate::config::{self, Limit};

pub use calendar::{Calendar, Days};
pub use clock::{Clock, Stamp};
pub use usage::{Counted, Counts, Gauge, Held, Usage, View};
pub use window::{Minute, PERMIT_AGE_MAX, SPAN, Slot};

/// What an endpoint may be asked.
#[derive(Debug)]
pub struct Limits {
    /// Attempts in any 60 seconds.
    pub rpm: Limit,
    /// Attempts in a calendar day.
    pub rpd: Limit,
    /// Tokens in any 60 seconds.
    pub tpm: Limit,
    /// Tokens in a calendar day.
    pub tpd: Limit,
    /// Requests at once, in this process.
    pub max_concurrent: Limit,
    /// When its day turns.
    pub calendar: Calendar,
}

/// What keeps an endpoint from being asked; each with its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// `rpm`.
    RequestsPerMinute(u64),
    /// `rpd`.
    RequestsPerDay(u64),
    /// `tpm`.
    TokensPerMinute(u64),
    /// `tpd`.
    TokensPerDay(u64),
    /// `maxConcurrent`.
    Concurrent(u64),
    /// The machine was started anew, or its ledger lost, and the last minute's counts may be gone.
    MinuteUnknown,
    /// The endpoint itself asked to be left alone.
    Rest,
}

impl std::fmt::Display for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::RequestsPerMinute(limit) => write!(f, "{limit} requests a minute"),
            Self::RequestsPerDay(limit) => write!(f, "{limit} requests a day"),
            Self::TokensPerMinute(limit) => write!(f, "{limit} tokens a minute"),
            Self::TokensPerDay(limit) => write!(f, "{limit} tokens a day"),
            Self::Concurrent(limit) => write!(f, "{limit} requests at once"),
            Self::MinuteUnknown => f.write_str("the last minute's requests are not known"),
            Self::Rest => f.write_str("it asked for a pause"),
        }
    }
}

impl Limits {
    /// The limits of an endpoint, whose day turns in its own time zone or the server's.
    pub fn of(endpoint: &config::Endpoint, server_zone: &TimeZone) -> Self {
        Self {
            rpm: endpoint.rpm,
            rpd: endpoint.rpd,
            tpm: endpoint.tpm,
            tpd: endpoint.tpd,
            max_concurrent: endpoint.max_concurrent,
            calendar: Calendar::new(endpoint.timezone.as_ref().unwrap_or(server_zone).clone()),
        }
    }

    /// Whether attempts need a permit from the ledger.
    pub fn in_ledger(&self) -> bool {
        [self.rpm, self.rpd, self.tpm, self.tpd].iter().any(|limit| matches!(limit, Limit::AtMost(_)))
    }

    /// Whether requests at once are limited.
    pub fn is_concurrency_limited(&self) -> bool {
        matches!(self.max_concurrent, Limit::AtMost(_))
    }

    /// Whether attempts need a permit at all.
    pub fn any(&self) -> bool {
        self.in_ledger() || self.is_concurrency_limited()
    }
}
