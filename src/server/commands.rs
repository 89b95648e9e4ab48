//! What those who run the gateway can have done: by a command, which asks at the control socket, or by the admin API.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use rustix::process::{Signal, getpid, kill_process};
use tokio::sync::{Mutex, Semaphore, mpsc, oneshot};

use super::control::{CONNECTIONS_MAX, Request};
use super::endpoint_test;
use super::keys::KeysReader;
use crate::admin::{self, Sources};
use crate::config::{self, KeysChange, SwitchedOff, Switches, switches_file};
use crate::process::{Actions, ConfigSource, Process};

/// Author of what is asked for at the control socket, which only the process's own user and root can open.
const COMMAND: &str = "the command line";
/// Pause before the process ends, so that what is said of it is out first.
const PAUSE: Duration = Duration::from_millis(100);
/// Pause between two signals to end; the process must have taken note of the first.
const SECOND_SIGNAL_AFTER: Duration = Duration::from_millis(300);
/// Most signals to a process that is to end at once.
const SIGNALS_MAX: usize = 20;

/// Where somebody waits to hear what came of a reload.
pub(super) type Asked = oneshot::Sender<Result<String, String>>;

/// Reloads that were asked for, and are not done yet.
#[derive(Debug)]
pub(super) struct Reloads(Mutex<mpsc::Receiver<Asked>>);

/// A way to ask for reloads, and what hears of them. As many can wait as there are commands at once.
pub(super) fn reloads() -> (mpsc::Sender<Asked>, Reloads) {
    let (reload, asked) = mpsc::channel(CONNECTIONS_MAX);
    (reload, Reloads(Mutex::new(asked)))
}

impl Reloads {
    /// Waits until one is asked for.
    pub(super) async fn next(&self) -> Asked {
        match self.0.lock().await.recv().await {
            Some(asked) => asked,
            None => std::future::pending().await,
        }
    }
}

/// What commands reach in the process. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Commands {
    /// Asks for a reload; none where no config file is read.
    reload: Option<mpsc::Sender<Asked>>,
    keys: KeysReader,
    process: Process,
    /// Place of the one test that may run.
    tests: Arc<Semaphore>,
    /// The config file, if one is read.
    source: Option<ConfigSource>,
    /// Held while the file of switches is changed.
    switching: Arc<Mutex<()>>,
}

impl Commands {
    /// `config`: the file that is read, and a way to have that done.
    pub(super) fn new(config: Option<(ConfigSource, mpsc::Sender<Asked>)>, keys: KeysReader, process: Process) -> Self {
        let (source, reload) = config.unzip();
        Self { reload, keys, process, tests: Arc::new(Semaphore::new(1)), source, switching: Arc::default() }
    }

    pub(super) async fn answer(&self, request: Request) -> Result<String, String> {
        match request {
            Request::Reload => self.audited("reload", "", self.read_config().await).await,
            Request::Status => Ok(self.status().await),
            Request::Test { endpoint } => self.run_test(endpoint.as_deref()).await,
            Request::Keys => self.keys().await,
            Request::ChangeKeys(change) => {
                let (action, name) = (change.action(), change.name().to_owned());
                self.audited(action, &name, self.change_keys(change).await).await
            }
            Request::Stop { now } => self.audited("stop", "", Ok(self.stop(now))).await,
        }
    }

    /// Notes a change in the audit log.
    async fn audited(&self, action: &str, subject: &str, result: Result<String, String>) -> Result<String, String> {
        self.process.audit.add(COMMAND, action, subject, &result).await;
        result
    }

    async fn read_config(&self) -> Result<String, String> {
        let (tell, told) = oneshot::channel();
        let gone = || "the process is on its way out".to_owned();
        let reload = self.reload.as_ref().ok_or("this process reads no config file")?;
        reload.send(tell).await.map_err(|_| gone())?;
        told.await.unwrap_or_else(|_| Err(gone()))
    }

    async fn status(&self) -> String {
        let pool = self.process.pool.load_full();
        admin::status::status(Sources::new(&pool, &self.process)).await
    }

    async fn run_test(&self, endpoint: Option<&str>) -> Result<String, String> {
        // They may last, and others wait for their places.
        let Ok(_place) = self.tests.try_acquire() else {
            return Err("another test is running; wait for its end".to_owned());
        };
        let tested = endpoint_test::of_pool(&self.process.pool.load_full(), endpoint, true).await?;
        serde_json::to_string(&tested).map_err(|error| error.to_string())
    }

    /// Does what a signal to end does: Pingora hears of nothing else.
    fn stop(&self, now: bool) -> String {
        let open = self.process.open.count();
        let ends_already = self.process.draining.is_on();
        tokio::spawn(async move {
            // So that the reply is out first.
            tokio::time::sleep(PAUSE).await;
            // A second signal means at once, as soon as the process waits for its requests. It does not outlive the last.
            let signals = if now { SIGNALS_MAX } else { usize::from(!ends_already) };
            for _ in 0..signals {
                if let Err(error) = kill_process(getpid(), Signal::TERM) {
                    log::error!("this process cannot signal itself: {error}");
                }
                tokio::time::sleep(SECOND_SIGNAL_AFTER).await;
            }
        });
        match (open, now) {
            (0, _) => "stopping".to_owned(),
            (1, false) => "stopping; waiting for the end of one open request".to_owned(),
            (open, false) => format!("stopping; waiting for the end of {open} open requests"),
            (open, true) => format!("stopping at once; open requests, of which there are {open}, are cut off"),
        }
    }
}

#[async_trait]
impl Actions for Commands {
    async fn reload(&self) -> Result<String, String> {
        self.read_config().await
    }

    async fn test(&self, endpoint: &str) -> Result<String, String> {
        self.run_test(Some(endpoint)).await
    }

    async fn keys(&self) -> Result<String, String> {
        serde_json::to_string(&self.keys.list().await).map_err(|error| error.to_string())
    }

    async fn change_keys(&self, change: KeysChange) -> Result<String, String> {
        let keys = self.keys.clone();
        let changed = tokio::task::spawn_blocking(move || keys.change(change)).await;
        changed.map_err(|error| error.to_string())?
    }

    fn config_source(&self) -> Option<ConfigSource> {
        self.source.clone()
    }

    async fn switch(&self, endpoint: &str, off: Option<SwitchedOff>) -> Result<String, String> {
        let _switching = self.switching.lock().await;
        let path: PathBuf = switches_file(self.process.ledger.path());
        if self.reload.is_none() {
            return Err("this process reads no config file".to_owned());
        }
        let former = Switches::read(&path)?;
        let mut switches = former.clone();
        switches.forget(Timestamp::now());
        match off {
            Some(off) => switches.switch_off(endpoint, off),
            None => drop(switches.switch_on(endpoint)),
        }
        switches.write(&path)?;
        let reloaded = self.read_config().await;
        let pool = self.process.pool.load();
        let is_switched = |config: &config::Endpoint| *config.id == *endpoint && config.switched_off == off;
        // It holds even while the config file is refused.
        if pool.endpoints.iter().any(|endpoint| is_switched(&endpoint.config)) {
            return Ok(reloaded.unwrap_or_else(|why| why));
        }
        // What was not done is not to come true at another time.
        former.write(&path)?;
        reloaded
    }
}
