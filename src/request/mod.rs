//! What a client asks for: its key, its body, the fields that decide where it goes, and how they are rewritten for an endpoint.

pub mod auth;
pub(crate) mod body;
pub(crate) mod body_memory;
pub mod call;
pub(crate) mod content_type;
pub mod fields;
pub mod id;
pub mod rewrite;
