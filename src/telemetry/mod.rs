//! What operators see of the process: metrics and the log.

pub mod log_writer;
pub mod logger;
pub mod metrics;
