//! Readers of JSON text that build no tree.

pub mod members;
pub mod scan;
