//! The operator's view: metrics and the log.

pub(crate) mod alerts;
pub(crate) mod audit;
pub(crate) mod key_metrics;
pub(crate) mod log_writer;
pub(crate) mod logger;
pub(crate) mod metrics;
pub(crate) mod plain_text;
pub(crate) mod trends;
