//! The checked `server.connections` part: how many connections there may be, and how long each may keep us waiting.

use std::time::Duration;

use super::file::{self, ConnectionsFile};

/// Descriptors that are left for everything but connections: the ledger, the log, files.
const OTHER_DESCRIPTORS: u64 = 64;
/// Connections where the number of descriptors is not limited.
const UNLIMITED: u32 = 100_000;

/// Bounds of clients' connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Connections in all.
    pub max: u32,
    /// Connections of one address that have not yet shown a right key.
    pub strangers_per_address: u32,
    /// Longest header of a request, in bytes.
    pub header_bytes_max: u32,
    /// Longest time for a whole header.
    pub header: Duration,
    /// Longest time until the first byte of a connection.
    pub first_byte: Duration,
    /// Longest time between two requests of an HTTP/1 connection.
    pub keep_alive: Duration,
    /// Longest time that an HTTP/2 connection stays without a request.
    pub h2_idle: Duration,
}

/// Every key has a default, and its bounds were checked with its shape.
pub(super) fn connections(typed: &ConnectionsFile) -> ConnectionLimits {
    let seconds = |typed: Option<u32>, default: u32| Duration::from_secs(typed.unwrap_or(default).into());
    ConnectionLimits {
        max: typed.max.unwrap_or_else(half_of_the_descriptors),
        strangers_per_address: typed.strangers_per_address.unwrap_or(file::STRANGERS_PER_ADDRESS_DEFAULT),
        header_bytes_max: typed.header_bytes_max.unwrap_or(file::HEADER_BYTES_DEFAULT),
        header: seconds(typed.header_seconds, file::HEADER_SECONDS_DEFAULT),
        first_byte: seconds(typed.first_byte_seconds, file::FIRST_BYTE_SECONDS_DEFAULT),
        keep_alive: seconds(typed.keep_alive_seconds, file::KEEP_ALIVE_SECONDS_DEFAULT),
        h2_idle: seconds(typed.h2_idle_seconds, file::KEEP_ALIVE_SECONDS_DEFAULT),
    }
}

/// A request needs two: one to its client, one to its endpoint.
fn half_of_the_descriptors() -> u32 {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit
        .map_or(UNLIMITED, |all| u32::try_from(all.saturating_sub(OTHER_DESCRIPTORS) / 2).unwrap_or(UNLIMITED))
        .max(file::CONNECTIONS_LEAST)
}
