//! Rate limits and quotas: requests and tokens in any 60 seconds and in a calendar day, and concurrent requests. Pure; the
//! clock is passed in.
//!
//! [`Quota`] holds the counts of one account (an endpoint, or models of it) and returns what is left. The [`ledger`](crate::ledger) stores the counts
//! and decides who may change them.

mod calendar;
mod clock;
mod period;
mod promise;
mod quota;
mod window;

use jiff::tz::TimeZone;

use crate::config::{self, Limit, LimitKind, PerLimit};

pub use calendar::{Calendar, Days};
pub use clock::{Clock, Stamp};
pub use period::Period;
pub use quota::{Counted, CountedAt, Counts, Gauge, Held, Quota, Unknown, View};
pub use window::{Minute, PERMIT_AGE_MAX, SLOT, SPAN, Slot};

/// Limits of an account.
#[derive(Debug)]
pub struct Limits {
    /// Limits by kind. Concurrent requests are counted in this process only, unless several machines share the ledger.
    pub by_kind: PerLimit<Limit>,
    /// Calendar that determines when its day changes.
    pub calendar: Calendar,
}

/// Reason why an endpoint takes no requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitReason {
    /// A limit is reached: kind and value.
    Full(LimitKind, u64),
    /// The machine was restarted, or its ledger lost, and the last minute's counts may be gone.
    MinuteUnknown,
    /// The server of the ledger is another one than a moment ago, and may not have all counts yet.
    LedgerBegins,
    /// The endpoint itself asked for a pause.
    Rest,
    /// It failed repeatedly, and is left alone.
    CoolingDown,
    /// It has answered of late that it does not have the call.
    CallMissing,
}

impl std::fmt::Display for LimitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full(kind, limit) => f.write_str(&kind.words(*limit)),
            Self::LedgerBegins => f.write_str("the ledger's server has just begun, and may not have all counts yet"),
            Self::MinuteUnknown => f.write_str("the last minute's requests are not known"),
            Self::Rest => f.write_str("it asked for a pause"),
            Self::CoolingDown => f.write_str("it failed and is cooling down"),
            Self::CallMissing => f.write_str("it does not have the call"),
        }
    }
}

impl Limits {
    /// Returns the limits of an endpoint. Its day changes in its own time zone, or the server's if it has none.
    pub fn new(endpoint: &config::Endpoint, server_zone: &TimeZone) -> Self {
        Self::in_days_of(endpoint, endpoint.limits, server_zone)
    }

    /// Returns limits of some of an endpoint's models, whose day is the endpoint's.
    pub fn in_days_of(endpoint: &config::Endpoint, by_kind: PerLimit<Limit>, server_zone: &TimeZone) -> Self {
        Self::in_days(by_kind, endpoint.timezone.as_ref().unwrap_or(server_zone))
    }

    /// Returns limits whose day changes in this time zone.
    pub fn in_days(by_kind: PerLimit<Limit>, zone: &TimeZone) -> Self {
        Self { by_kind, calendar: Calendar::new(zone.clone()) }
    }

    /// True if tokens are limited.
    pub fn counts_tokens(&self) -> bool {
        let PerLimit { tpm, tpd, .. } = self.by_kind;
        [tpm, tpd].iter().any(|limit| matches!(limit, Limit::AtMost(_)))
    }

    /// Returns the days that an attempt of this moment counts in by these limits' calendar.
    pub fn counted(&self, at: CountedAt) -> Counted {
        Counted { slot: at.slot, days: self.calendar.days(at.wall) }
    }

    /// True if attempts need a permit from the ledger: any limit except that of concurrent requests is set.
    pub fn in_ledger(&self) -> bool {
        let PerLimit { rpm, rpd, tpm, tpd, max_concurrent: _ } = self.by_kind;
        [rpm, rpd, tpm, tpd].iter().any(|limit| matches!(limit, Limit::AtMost(_)))
    }

    /// True if concurrent requests are limited.
    pub fn is_concurrency_limited(&self) -> bool {
        matches!(self.by_kind.max_concurrent, Limit::AtMost(_))
    }
}
