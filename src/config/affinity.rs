//! The checked `server.affinity` part: which requests go where earlier ones went.

use std::time::Duration;

use super::file::{self, AffinityFile};

/// Which requests go where earlier ones went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AffinityRules {
    /// True if the requests of one session prefer one endpoint.
    pub sessions: bool,
    /// True if requests that name no session are told apart by how their prompt begins.
    pub prefix: bool,
    /// True if sealed reasoning is left out where its organisation cannot answer.
    pub drop_sealed: bool,
    /// Time for which it is remembered where an object was made, from its last use on.
    pub id_time: Duration,
}

/// Every key has a default, and its bounds were checked with its shape.
pub(super) fn affinity(typed: &AffinityFile) -> AffinityRules {
    let days = typed.id_days.unwrap_or(file::ID_DAYS_DEFAULT);
    AffinityRules {
        sessions: typed.sessions.unwrap_or(file::SESSIONS_DEFAULT),
        prefix: typed.prefix.unwrap_or(file::PREFIX_DEFAULT),
        drop_sealed: typed.drop_sealed.unwrap_or(file::DROP_SEALED_DEFAULT),
        id_time: Duration::from_hours(24 * u64::from(days)),
    }
}
