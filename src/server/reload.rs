//! Loads a changed configuration while the process serves: as a whole, or not at all. Requests in flight keep the one that they
//! began with.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use jiff::Timestamp;
use pingora::server::ShutdownWatch;
use pingora::services::background::BackgroundService;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::{
    self, AlertEvent, Config, Environment, Flags, Format, Loaded, Server, Switches, Versions, Watch, changes,
    needs_upgrade, switches_file,
};
use crate::process::{Applied, ConfigState};
use crate::request_log::RequestLog;
use crate::routing::callers::Keyring;
use crate::routing::pool::Pool;
use crate::server::certificate::Certificate;
use crate::server::commands::Reloads;
use crate::server::keys;
use crate::telemetry::alerts;
use crate::telemetry::logger;

/// Reloads the configuration when its files change, at SIGHUP, and when a command asks for it.
#[derive(Debug)]
pub(super) struct Reloader {
    /// The config file.
    pub path: PathBuf,
    /// Flags that win over it.
    pub flags: Flags,
    /// Pool that a good config replaces.
    pub pool: Arc<ArcSwap<Pool>>,
    /// Callers, whose keys stand in it.
    pub keyring: Keyring,
    /// Log of requests, of which less may be kept from now on.
    pub(crate) request_log: RequestLog,
    /// The server's part as the process was started with, some of which stays.
    pub started: Server,
    /// The certificate that clients are shown.
    pub certificate: Option<Certificate>,
    /// State for the status page.
    pub state: ConfigState,
    /// Set by a SIGHUP.
    pub hung_up: Arc<AtomicBool>,
    /// Reloads that commands ask for.
    pub asked: Reloads,
}

/// Keeps a SIGHUP from ending the process before the reloader hears it.
pub(super) fn hear_hangups() -> Arc<AtomicBool> {
    let hung_up = Arc::default();
    if let Err(error) = signal_hook::flag::register(signal_hook::consts::SIGHUP, Arc::clone(&hung_up)) {
        log::error!("SIGHUP would end the process: {error}");
    }
    hung_up
}

/// The contents of all files that a configuration depends on, as a number for each; none for a file that is not there.
type Contents = BTreeMap<PathBuf, Option<u64>>;

#[async_trait]
impl BackgroundService for Reloader {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        let mut watch = Watch::new(self.files());
        let mut hangups =
            signal(SignalKind::hangup()).inspect_err(|error| log::error!("SIGHUP cannot be heard: {error}")).ok();
        // A SIGHUP that came before the handler was set.
        if self.hung_up.load(Ordering::Relaxed) {
            self.take_in(true).map(drop).unwrap_or_default();
        }
        // Notices changes since the process read the file, too.
        let mut seen = Contents::new();
        if self.started.admin_key.is_some() {
            self.keep_version();
        }
        loop {
            let (asked, reply_to) = tokio::select! {
                () = watch.changed() => (false, None),
                () = hangup(hangups.as_mut()) => (true, None),
                reply_to = self.asked.next() => (true, Some(reply_to)),
                () = self.switch_due() => (true, None),
                _ = shutdown.changed() => return,
            };
            // Before they are read, so that what is written meanwhile is found the next time.
            let found = contents(&self.files());
            // What was wrong may have been mended in a file that only the refused config names.
            if asked || found != seen || self.state.file().error.is_some() {
                let result = self.take_in(asked);
                seen = found;
                // The new config may name other files.
                watch.set_files(self.files());
                if let Some(reply_to) = reply_to {
                    // It may have gone.
                    reply_to.send(result).unwrap_or_default();
                }
            }
        }
    }
}

async fn hangup(hangups: Option<&mut Signal>) {
    if let Some(hangups) = hangups
        && hangups.recv().await.is_some()
    {
        return;
    }
    std::future::pending::<()>().await;
}

/// Time after which a switch that is over is tried again, while the config cannot be read.
const SWITCH_AGAIN: Duration = Duration::from_mins(1);

impl Reloader {
    /// Waits until an endpoint that is switched off for a while is to be switched on again.
    async fn switch_due(&self) {
        let pool = self.pool.load_full();
        let ends = pool.endpoints.iter().filter_map(|endpoint| endpoint.config.switched_off?.until).min();
        let Some(end) = ends else { return std::future::pending().await };
        let wait = Duration::try_from(end.duration_since(Timestamp::now())).ok().filter(|wait| !wait.is_zero());
        // It is over already if the config could not be read then.
        tokio::time::sleep(wait.unwrap_or(SWITCH_AGAIN)).await;
    }

    fn files(&self) -> Vec<PathBuf> {
        let pool = self.pool.load();
        let mut files = vec![self.path.clone()];
        files.extend(Environment::files(&self.path));
        if let Some(tls) = &pool.server.tls {
            files.extend([tls.cert_file.clone(), tls.key_file.clone()]);
        }
        files.extend(pool.endpoints.iter().filter_map(|endpoint| endpoint.config.tls.ca_file.clone()));
        files.extend(pool.endpoints.iter().flat_map(|endpoint| endpoint.config.keys.files.iter().cloned()));
        files
    }

    /// Reads everything again, and says what came of it. `asked`: it is logged even if nothing has changed.
    fn take_in(&self, asked: bool) -> Result<String, String> {
        self.read(asked).map_err(|refused| match self.switch_only() {
            Ok(()) => refused,
            Err(why) => format!("{refused}; {why}"),
        })
    }

    /// Applies the switches to the config in use, since they hold whatever somebody has written into its file.
    fn switch_only(&self) -> Result<(), String> {
        let before = self.pool.load_full();
        let endpoints = before.endpoints.iter().map(|endpoint| endpoint.config.clone()).collect();
        let mut config = Config { server: before.server.clone(), endpoints };
        for endpoint in &mut config.endpoints {
            endpoint.enabled |= endpoint.switched_off.take().is_some();
        }
        Switches::read(&switches_file(&self.started.ledger))?.apply(&mut config, Timestamp::now());
        let lines = differences(&before, &config);
        if lines.is_empty() {
            return Ok(());
        }
        let pool = Pool::new(config, before.ledger.clone(), Some(&before))
            .map_err(|error| format!("an endpoint cannot be switched: {error}"))?;
        log::info!("switched, while the config file is refused: {}", lines.join("; "));
        self.pool.store(Arc::new(Pool { version: before.version + 1, ..pool }));
        Ok(())
    }

    fn read(&self, asked: bool) -> Result<String, String> {
        let shown = self.path.display();
        // At the start it may have been a pipe, which cannot be read again.
        match config::check_ordinary(&self.path) {
            Err(error) if self.path.exists() => return Err(self.refuse(&format!("it cannot be read again: {error}"))),
            _ => {}
        }
        let loaded = match config::load(&self.path, &Environment::from_process(&self.path, &self.flags)) {
            Ok(loaded) => loaded,
            Err(problems) => return Err(self.refuse(&problems.to_string())),
        };
        let Loaded { mut config, warnings } = loaded;
        match Switches::read(&switches_file(&self.started.ledger)) {
            Ok(switches) => switches.apply(&mut config, Timestamp::now()),
            Err(why) => return Err(self.refuse(&why)),
        }
        let needs_upgrade = needs_upgrade(&self.started, &config.server);
        let before = self.pool.load_full();
        let lines = differences(&before, &config);
        // Whatever can be wrong is found before anything is changed.
        let files = config.server.tls.as_ref().filter(|_| self.certificate.is_some());
        let certificate = match files.map(Certificate::read).transpose() {
            Ok(certificate) => certificate,
            Err(why) => return Err(self.refuse(&why)),
        };
        let version = before.version + u64::from(!lines.is_empty());
        match Pool::new(config, before.ledger.clone(), Some(&before)) {
            Ok(pool) if lines.is_empty() => {
                // A CA file may have changed, which no line shows.
                self.pool.store(Arc::new(Pool { version, loaded_at: before.loaded_at, ..pool }));
            }
            Ok(pool) => self.pool.store(Arc::new(Pool { version, ..pool })),
            Err(error) => return Err(self.refuse(&format!("an endpoint cannot be set up: {error}"))),
        }
        let pool = self.pool.load();
        let overlooked = self.keyring.set_config(&pool.server);
        self.request_log.set(&pool.server);
        logger::set_format(pool.server.log_format);
        let overlooked = overlooked.iter().map(|name| keys::overlooked(&pool.server, name));
        let mut told = Vec::new();
        for warning in warnings.iter().map(ToString::to_string).chain(overlooked) {
            log::warn!("{warning}");
            told.push(format!("warning: {warning}"));
        }
        let Applied { had_error, needs_other_upgrade } = self.state.applied(&needs_upgrade);
        let result = if lines.is_empty() {
            format!("config {shown}: nothing has changed, version {version}")
        } else {
            format!("config {shown}: loaded, version {version}: {}", lines.join("; "))
        };
        if !lines.is_empty() || asked || had_error {
            log::info!("{result}");
        }
        if pool.server.admin_key.is_some() {
            self.keep_version();
        }
        told.push(result);
        if !needs_upgrade.is_empty() {
            let waits = format!("config {shown}: not in use yet: {}", needs_upgrade.join("; "));
            if needs_other_upgrade {
                log::warn!("{waits}");
            }
            told.push(waits);
        }
        if let (Some(shown), Some(read)) = (&self.certificate, certificate)
            && shown.show(read)
        {
            log::info!("server.tls: a new certificate is in use");
            told.push("server.tls: a new certificate is in use".to_owned());
        }
        Ok(told.join("\n"))
    }

    /// Keeps the text that is in use, so that there is a way back to it.
    fn keep_version(&self) {
        let keep = || -> std::io::Result<()> {
            let text = String::from_utf8(config::read_bounded(&self.path)?).map_err(std::io::Error::other)?;
            Versions::new(&self.started.ledger).keep(&text, Format::from_path(&self.path))
        };
        if let Err(error) = keep() {
            log::warn!("config {}: this version cannot be kept: {error}", self.path.display());
        }
    }

    fn refuse(&self, why: &str) -> String {
        let version = self.pool.load().version;
        let refused = format!("config {}: not applied, version {version} stays: {why}", self.path.display());
        // The same error is logged once, however often it is found again.
        if self.state.refused(why) {
            log::error!("{refused}");
            alerts::raise(AlertEvent::ConfigRefused, &self.path.display().to_string(), refused.clone());
        }
        refused
    }
}

fn differences(before: &Pool, after: &Config) -> Vec<String> {
    let old: Vec<_> = before.endpoints.iter().map(|endpoint| &endpoint.config).collect();
    let new: Vec<_> = after.endpoints.iter().collect();
    changes((&before.server, &old), (&after.server, &new))
}

fn contents(files: &[PathBuf]) -> Contents {
    let number = |file: &Path| {
        config::check_ordinary(file).ok()?;
        let mut hasher = DefaultHasher::new();
        config::read_bounded(file).ok()?.hash(&mut hasher);
        Some(hasher.finish())
    };
    files.iter().map(|file| (file.clone(), number(file))).collect()
}
