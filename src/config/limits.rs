//! The kinds of limits that an endpoint can have, and a value for each of them.

/// The kinds of limits, in the order in which they are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LimitKind {
    /// Requests in any 60 seconds.
    Rpm,
    /// Requests in a calendar day.
    Rpd,
    /// Tokens in any 60 seconds.
    Tpm,
    /// Tokens in a calendar day.
    Tpd,
    /// Requests at once.
    MaxConcurrent,
}

impl LimitKind {
    /// Key in the config file and in JSON answers.
    pub fn key(self) -> &'static str {
        match self {
            Self::Rpm => "rpm",
            Self::Rpd => "rpd",
            Self::Tpm => "tpm",
            Self::Tpd => "tpd",
            Self::MaxConcurrent => "maxConcurrent",
        }
    }

    /// Label value in metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::MaxConcurrent => "max_concurrent",
            other => other.key(),
        }
    }

    /// A limit in words: "60 requests a minute", "1 request at once".
    pub fn words(self, limit: u64) -> String {
        let (one, of) = match self {
            Self::Rpm => ("request", "a minute"),
            Self::Rpd => ("request", "a day"),
            Self::Tpm => ("token", "a minute"),
            Self::Tpd => ("token", "a day"),
            Self::MaxConcurrent => ("request", "at once"),
        };
        format!("{limit} {one}{} {of}", if limit == 1 { "" } else { "s" })
    }
}

/// A value for each kind of limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PerLimit<T> {
    /// Value of [`LimitKind::Rpm`].
    pub rpm: T,
    /// Value of [`LimitKind::Rpd`].
    pub rpd: T,
    /// Value of [`LimitKind::Tpm`].
    pub tpm: T,
    /// Value of [`LimitKind::Tpd`].
    pub tpd: T,
    /// Value of [`LimitKind::MaxConcurrent`].
    pub max_concurrent: T,
}

impl<T: Copy> PerLimit<T> {
    /// Each value with its kind, in the order in which they are shown.
    pub fn each(&self) -> impl Iterator<Item = (LimitKind, T)> + use<T> {
        let Self { rpm, rpd, tpm, tpd, max_concurrent } = *self;
        [
            (LimitKind::Rpm, rpm),
            (LimitKind::Rpd, rpd),
            (LimitKind::Tpm, tpm),
            (LimitKind::Tpd, tpd),
            (LimitKind::MaxConcurrent, max_concurrent),
        ]
        .into_iter()
    }

    /// Each value together with another one of the same kind.
    pub fn zip<U: Copy>(&self, other: PerLimit<U>) -> PerLimit<(T, U)> {
        PerLimit {
            rpm: (self.rpm, other.rpm),
            rpd: (self.rpd, other.rpd),
            tpm: (self.tpm, other.tpm),
            tpd: (self.tpd, other.tpd),
            max_concurrent: (self.max_concurrent, other.max_concurrent),
        }
    }

    /// Values made out of these.
    pub fn map<U>(&self, make: impl Fn(T) -> U) -> PerLimit<U> {
        PerLimit {
            rpm: make(self.rpm),
            rpd: make(self.rpd),
            tpm: make(self.tpm),
            tpd: make(self.tpd),
            max_concurrent: make(self.max_concurrent),
        }
    }
}

/// A number of requests or tokens, in some time or at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Limit {
    /// -1 in the file, or nothing.
    #[default]
    Unlimited,
    /// 0 in the file: the endpoint takes nothing.
    Off,
    /// A limit, from 1 to 2^53 - 1.
    AtMost(u64),
}

impl Limit {
    /// Returns the number of the file: -1, 0, or the limit.
    pub fn as_number(self) -> i64 {
        match self {
            Self::Unlimited => -1,
            Self::Off => 0,
            Self::AtMost(count) => i64::try_from(count).unwrap_or(i64::MAX),
        }
    }

    pub(super) fn from_number(number: i64) -> Self {
        match u64::try_from(number) {
            Err(_) => Self::Unlimited,
            Ok(0) => Self::Off,
            Ok(count) => Self::AtMost(count),
        }
    }
}
