//! The request log: a row for every request and every attempt, in a file of its own.
//!
//! A request that has ended leaves its [`Entry`] in a bounded queue and goes on; one thread writes what waits there, many at once.
//! Whatever happens to the file or its disk, requests and the ledger do not notice: what cannot be kept is dropped and counted.
//!
//! | module | owns |
//! |---|---|
//! | `entry` | a finished request as the log keeps it |
//! | `queue` | entries that wait to be written |
//! | `writer` | the thread that writes them, and what keeps it from writing |
//! | `store` | the file: batches, names, retention |
//! | [`reader`], [`logged`] | pages of the log, one request with its attempts |
//! | `traces`, `spans` | the same as spans, sent by OTLP (feature `otlp`) |

mod entry;
pub mod logged;
mod queue;
pub mod reader;
#[cfg(feature = "otlp")]
mod spans;
mod store;
#[cfg(test)]
mod tests;
mod traces;
mod writer;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::config;
pub use entry::{ATTEMPTS_MAX, Attempted, Bodies, Entry, KeptBody, Name};
use queue::Queue;
pub use queue::{Dropped, Reason};
pub use store::{Retention, Store, StoreError};
pub use traces::{Tally, Traces};
use writer::Writer;

/// Longest wait for the last entries at the end of the process.
const CLOSE_WAIT_MAX: Duration = Duration::from_secs(2);

/// The log of one process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RequestLog(Option<Arc<Running>>);

#[derive(Debug)]
struct Running {
    path: Box<Path>,
    queue: Arc<Queue>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// State of the log, for the status page and the metrics.
#[derive(Clone, Debug)]
pub struct LogState {
    /// The file.
    pub path: Box<Path>,
    /// Reason why nothing is written; none if it works.
    pub error: Option<String>,
    /// Entries written since the start of the process.
    pub written: u64,
    /// Entries that wait.
    pub waiting: usize,
    /// Entries dropped since the start, by reason.
    pub dropped: Dropped,
    /// Size of the file in bytes, as it was when it was last looked at.
    pub bytes: u64,
}

impl RequestLog {
    /// The log that a config asks for. It opens nothing and starts no thread: threads do not survive the fork into the background.
    pub fn new(server: &config::Server) -> Self {
        Self(server.request_log.as_ref().map(|log| {
            let queue = Arc::new(Queue::new(retention(log)));
            Arc::new(Running { path: log.path.as_path().into(), queue, thread: Mutex::default() })
        }))
    }

    /// Takes over what another config says of it, as far as that applies while it runs.
    pub fn set(&self, server: &config::Server) {
        if let (Some(running), Some(log)) = (&self.0, &server.request_log) {
            running.queue.set_retention(retention(log));
        }
    }

    /// Starts the thread. Does nothing if it runs already, or nothing is logged.
    pub fn start(&self) {
        let Some(running) = &self.0 else { return };
        let mut thread = running.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_some() {
            return;
        }
        let mut writer = Writer::new(&running.path, Arc::clone(&running.queue));
        match std::thread::Builder::new().name("request-log".into()).spawn(move || writer.run()) {
            Ok(handle) => *thread = Some(handle),
            Err(error) => {
                log::error!("request log {}: its thread cannot be started: {error}", running.path.display());
            }
        }
    }

    /// Writes what waits and ends the thread. Blocks until then, but not for long.
    pub fn close(&self) {
        let Some(running) = &self.0 else { return };
        running.queue.close();
        if !running.queue.wait_until_ended(CLOSE_WAIT_MAX) {
            log::warn!("request log {}: its last entries could not be written in time", running.path.display());
            return;
        }
        let thread = running.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("request log {}: its thread panicked", running.path.display());
        }
    }

    /// True if requests are logged. What only the log needs is not looked for otherwise.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// True if there is room for another entry. If not, it counts as dropped.
    ///
    /// `is_stranger`: the request had no right key. Of such ones only a few are kept, or anybody could push all others out.
    pub fn takes(&self, is_stranger: bool) -> bool {
        self.0.as_ref().is_some_and(|running| running.queue.takes(is_stranger))
    }

    /// Leaves an entry to be written, without waiting.
    pub fn add(&self, entry: Entry) {
        if let Some(running) = &self.0 {
            running.queue.add(entry);
        }
    }

    /// The log's state; none if nothing is logged.
    pub fn state(&self) -> Option<LogState> {
        let running = self.0.as_ref()?;
        Some(running.queue.state(running.path.clone()))
    }
}

fn retention(log: &config::RequestLog) -> Retention {
    Retention { age: log.age, bytes_max: log.bytes_max }
}
