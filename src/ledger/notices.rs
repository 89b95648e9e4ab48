//! What one process says to all others that share its ledger, such as that an endpoint cools down. The last word on a subject counts.

use std::sync::Arc;

/// Notices that wait while the ledger cannot be written, and those of others that nobody has looked at; of more the oldest are lost.
pub(super) const NOTICES_MAX: usize = 10_000;

/// The last word on a subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// What it is about. A later one of the same subject takes its place.
    pub subject: Arc<str>,
    /// What is said.
    pub text: Arc<str>,
    /// When it is forgotten, in seconds of Unix time.
    pub until: i64,
}
