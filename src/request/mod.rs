//! A client's request: its key, its body, the fields that decide where it goes, and their rewriting for an endpoint.

pub mod auth;
pub(crate) mod body;
pub(crate) mod body_memory;
pub mod call;
pub(crate) mod connections;
pub(crate) mod content_type;
pub mod fields;
pub mod form;
pub mod forward;
pub(crate) mod guesses;
pub mod id;
pub(crate) mod path;
pub(crate) mod plain_spelling;
pub mod references;
pub mod rewrite;
pub mod sealed;
pub mod session_name;
pub mod shape;
pub(crate) mod token_bound;
pub(crate) mod trace;
pub(crate) mod websocket;
