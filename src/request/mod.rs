//! What a client asks for: its key, its body, the fields that decide where it goes, and how they are rewritten for an endpoint.

pub mod auth;
pub mod body;
pub mod body_memory;
pub mod call;
pub mod content_type;
pub mod fields;
pub mod id;
pub mod rewrite;
