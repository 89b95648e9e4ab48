//! The checked `server.requestLog` part: the file that requests are logged in, and what of them is kept.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::checked::Check;
use super::file::{self, RequestLogFile};

/// The log of requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestLog {
    /// Its file, as an absolute path.
    pub path: PathBuf,
    /// Age of the oldest requests that are kept.
    pub age: Duration,
    /// Largest size of the file, in bytes.
    pub bytes_max: u64,
}

/// Every key has a default; the file's is beside the ledger.
pub(super) fn request_log(typed: RequestLogFile, ledger: &Path, check: &mut Check<'_>) -> Option<RequestLog> {
    const PATH: &str = "server.requestLog.path";
    let RequestLogFile { enabled, path, days, bytes_max } = typed;
    if enabled == Some(false) {
        return None;
    }
    let path = match path.filter(|path| !path.trim().is_empty()) {
        Some(path) => check.base_dir.join(path),
        None => ledger.with_file_name(file::REQUEST_LOG_DEFAULT),
    };
    if path.to_string_lossy().ends_with('/') {
        check.report.error(PATH, "is not the name of a file", "name a file such as data/requests.db");
    }
    let path = std::path::absolute(&path).unwrap_or(path);
    if path == ledger {
        check.report.error(PATH, "is the ledger's file", "name a file of its own");
    }
    let days = days.unwrap_or(file::REQUEST_LOG_DAYS_DEFAULT);
    Some(RequestLog {
        path,
        age: Duration::from_hours(24 * u64::from(days)),
        bytes_max: bytes_max.unwrap_or(file::REQUEST_LOG_BYTES_DEFAULT),
    })
}
