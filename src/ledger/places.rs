//! Where things are: the endpoint at which a caller made an object, and the one that has the cache of a session.

use std::sync::Arc;

/// Owner of what is made with the server's one key.
pub const SOLE_CALLER: &str = "";
/// Rows of one kind that are kept; of more those that were used longest ago are forgotten, from within an hour on. An object's row takes some
/// 150 bytes, so this is 150 MB at most.
pub const PLACES_MAX: u32 = 1_000_000;
/// Rows that are deleted in one batch, since permits wait meanwhile.
pub(super) const DELETED_AT_ONCE: u32 = 2_000;
/// Changes that wait while the ledger cannot be written; more are lost, which is logged.
pub(super) const CHANGES_MAX: usize = 10_000;

/// Kind of a thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ThingKind {
    /// An object that a caller made and may name again: a file, a batch, a stored response.
    Object,
    /// A session, whose requests share a prefix that its endpoint has in its cache.
    Session,
    /// A text that only the organisation that wrote it can read.
    Sealed,
}

impl ThingKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Object, Self::Session, Self::Sealed];

    /// Its name in the ledger.
    pub fn name(self) -> &'static str {
        match self {
            Self::Object => "object",
            Self::Session => "session",
            Self::Sealed => "sealed",
        }
    }
}

/// A thing, without its owner.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Thing {
    /// Kind.
    pub kind: ThingKind,
    /// An object's id, or a hash.
    pub name: Arc<str>,
}

/// Place of a thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The caller that it belongs to.
    pub owner: Arc<str>,
    /// Id of the endpoint.
    pub endpoint: Arc<str>,
    /// The organisation that the endpoint belonged to.
    pub organization: Arc<str>,
    /// When it is forgotten, in seconds of Unix time.
    pub until: i64,
}

/// A change of what is known of places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlaceChange {
    /// A thing is at a place. A session is at one only, and leaves the one before.
    Note(Thing, Place),
    /// A thing that belongs to this caller is nowhere any more.
    Forget(Thing, Arc<str>),
}
