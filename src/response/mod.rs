//! Readers of answers on their way to the client. Pure: bytes in, bytes, events or verdicts out.

pub(crate) mod answer;
pub mod classify;
pub(crate) mod decode;
pub(crate) mod event_template;
pub mod objects;
pub mod redact;
pub mod relay;
pub mod sse;
pub(crate) mod vendor_error;
mod vendors;
pub(crate) mod wait;
pub mod websocket;
