//! SIGUSR1: the log's file is opened anew, so that it can be rotated.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use pingora::server::ShutdownWatch;
use pingora::services::background::BackgroundService;
use tokio::signal::unix::{SignalKind, signal};

use crate::telemetry::log_writer;

/// Opens the log's file anew at each SIGUSR1.
#[derive(Debug)]
pub(super) struct ReopenLog {
    /// Set by a signal that came before the service was started.
    came: Arc<AtomicBool>,
}

impl ReopenLog {
    /// From now on the signal does not end the process.
    pub(super) fn new() -> Self {
        let came = Arc::default();
        if let Err(error) = signal_hook::flag::register(signal_hook::consts::SIGUSR1, Arc::clone(&came)) {
            log::warn!("SIGUSR1 would end the process: {error}");
        }
        Self { came }
    }
}

#[async_trait]
impl BackgroundService for ReopenLog {
    async fn start(&self, _shutdown: ShutdownWatch) {
        // Its name now: when it has been renamed, that is no longer known.
        let file = log_writer::file();
        let mut signals = match signal(SignalKind::user_defined1()) {
            Ok(signals) => signals,
            Err(error) => return log::warn!("SIGUSR1 cannot be heard: {error}"),
        };
        if self.came.load(Ordering::Relaxed) {
            reopen(file.as_ref());
        }
        // To the end of the process: one that finishes its requests still logs.
        while signals.recv().await.is_some() {
            reopen(file.as_ref());
        }
    }
}

fn reopen(file: Option<&PathBuf>) {
    let Some(file) = file else {
        return log::info!("SIGUSR1: the log goes to no file, so there is none to open anew");
    };
    match log_writer::reopen(file) {
        Ok(()) => log::info!("SIGUSR1: the log goes on in {}", file.display()),
        Err(error) => {
            log::error!("SIGUSR1: {} cannot be opened, so the log stays where it is: {error}", file.display());
        }
    }
}
