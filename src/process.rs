//! The running process as other modules may ask for it: endpoints, open requests, state of config and ledger.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use async_trait::async_trait;

use crate::billing::estimate::Estimator;
use crate::config::{Flags, KeysChange, SwitchedOff};
use crate::exchange::running::RunningRequests;
use crate::ledger;
use crate::request::body_memory::Memory;
use crate::request::connections::Connections;
use crate::request_log::{RequestLog, Traces};
use crate::routing::callers::Keyring;
use crate::routing::pool::Pool;
use crate::telemetry::audit::Audit;
use crate::telemetry::trends::Trends;

/// The running process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Process {
    /// The endpoints, whichever are current.
    pub pool: Arc<ArcSwap<Pool>>,
    /// Callers with keys of their own.
    pub keyring: Keyring,
    /// The requests that are open.
    pub open: OpenRequests,
    /// Those of them that are for endpoints, where somebody may ask for them.
    pub(crate) running: RunningRequests,
    /// Set once the process is on its way out.
    pub draining: Draining,
    /// State of the ledger.
    pub ledger: ledger::LedgerState,
    /// Log of requests.
    pub(crate) request_log: RequestLog,
    /// Traces of them, if they are sent anywhere.
    pub(crate) traces: Traces,
    /// Estimates the tokens that no endpoint reports.
    pub estimator: Estimator,
    /// State of the config file.
    pub config: ConfigState,
    /// What those who run the gateway can have done.
    pub(crate) actions: ActionsSlot,
    /// Log of what they did.
    pub(crate) audit: Audit,
    /// The last hour of the endpoints.
    pub(crate) trends: Trends,
    /// Room for the bodies of requests.
    pub memory: Memory,
    /// The connections of clients.
    pub connections: Connections,
    /// When it was started.
    pub started_at: SystemTime,
}

/// What those who run the gateway can have done. Each returns what came of it, in words or as JSON, or why it did not.
#[async_trait]
pub(crate) trait Actions: Send + Sync {
    /// Reads the config again.
    async fn reload(&self) -> Result<String, String>;
    /// Asks an endpoint step by step; JSON.
    async fn test(&self, endpoint: &str) -> Result<String, String>;
    /// Lists the keys of clients; JSON.
    async fn keys(&self) -> Result<String, String>;
    /// Changes the file of these.
    async fn change_keys(&self, change: KeysChange) -> Result<String, String>;
    /// The config file, if one is read.
    fn config_source(&self) -> Option<ConfigSource>;
    /// Switches an endpoint off, or on.
    async fn switch(&self, endpoint: &str, off: Option<SwitchedOff>) -> Result<String, String>;
}

/// Where a config comes from.
#[derive(Clone, Debug)]
pub(crate) struct ConfigSource {
    /// The file.
    pub(crate) path: PathBuf,
    /// Flags that win over it.
    pub(crate) flags: Flags,
}

/// Place of these, which are there once the process is set up. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct ActionsSlot(Arc<OnceLock<Arc<dyn Actions>>>);

impl std::fmt::Debug for ActionsSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ActionsSlot")
    }
}

impl ActionsSlot {
    pub(crate) fn set(&self, actions: Arc<dyn Actions>) {
        // It is set once.
        self.0.set(actions).unwrap_or_default();
    }

    pub(crate) fn get(&self) -> Option<&Arc<dyn Actions>> {
        self.0.get()
    }
}

/// All the requests that are open, for the drain and the status page.
#[derive(Clone, Debug, Default)]
pub struct OpenRequests(Arc<AtomicUsize>);

impl OpenRequests {
    /// Number of requests that are open.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts a request as open until the guard is dropped.
    pub(crate) fn enter(&self) -> OpenRequest {
        self.0.fetch_add(1, Ordering::Relaxed);
        OpenRequest(self.clone())
    }
}

/// One open request.
#[derive(Debug)]
pub(crate) struct OpenRequest(OpenRequests);

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Set once the process shuts down, so that busy connections are asked to close.
#[derive(Clone, Debug, Default)]
pub struct Draining(Arc<AtomicBool>);

impl Draining {
    /// True once the process is on its way out.
    pub fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn begin(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// State of the config file, for the status page and the metrics. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct ConfigState(Arc<Mutex<FileState>>);

/// Difference between the file on disk and the config in use.
#[derive(Clone, Debug, Default)]
pub struct FileState {
    /// Reason why the file is not applied.
    pub error: Option<String>,
    /// Changes in it that are not in use yet, each with what it waits for.
    pub needs_upgrade: Vec<String>,
    /// Number of times that a changed file could not be applied.
    pub failures: u64,
    /// Reason why the file of callers' keys is not applied.
    pub keys_error: Option<String>,
}

/// State before a file was applied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Applied {
    /// The file before it was refused.
    pub(crate) had_error: bool,
    /// Other changes than before are not in use yet.
    pub(crate) needs_other_upgrade: bool,
}

impl ConfigState {
    /// A copy of the state as it is now.
    pub fn file(&self) -> FileState {
        self.lock().clone()
    }

    /// Notes that the file is in use, but for these changes.
    pub(crate) fn applied(&self, needs_upgrade: &[String]) -> Applied {
        let mut file = self.lock();
        let had_error = file.error.take().is_some();
        let needs_other_upgrade = file.needs_upgrade != needs_upgrade;
        file.needs_upgrade = needs_upgrade.to_vec();
        Applied { had_error, needs_other_upgrade }
    }

    /// Notes why the file is not in use. False if that is known already.
    pub(crate) fn refused(&self, why: &str) -> bool {
        let mut file = self.lock();
        let is_news = file.error.as_deref() != Some(why);
        if is_news {
            file.failures += 1;
            file.error = Some(why.to_owned());
        }
        is_news
    }

    /// Notes why the file of callers' keys is not in use, or that it is. False if that is known already.
    pub(crate) fn set_keys_error(&self, error: Option<String>) -> bool {
        let mut file = self.lock();
        let is_news = file.keys_error != error;
        file.keys_error = error;
        is_news
    }

    fn lock(&self) -> MutexGuard<'_, FileState> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
