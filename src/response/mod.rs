//! Readers of answers on their way to the client. Pure: bytes in, bytes or events out.

pub(crate) mod decode;
pub(crate) mod event_template;
pub mod redact;
pub mod relay;
pub mod sse;
