//! The end of a process: it takes no more, finishes what it has, and writes every count.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pingora::server::{ExecutionPhase, ShutdownWatch};
use pingora::services::background::BackgroundService;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::broadcast;

use super::pid_file::PidFile;
use super::systemd;
use crate::billing::estimate::Estimator;
use crate::ledger::Keeper;
use crate::process::{Draining, OpenRequests};
use crate::request_log::{RequestLog, Traces};

/// Time between two checks of a stopping process for open requests.
const DRAIN_POLL: Duration = Duration::from_millis(50);
/// Time for the last bytes to leave after the last request has ended.
const LAST_FLUSH: Duration = Duration::from_millis(200);

/// Longest time for which a process that has handed over goes on with what it has. Its successor serves, so nobody waits for its end;
/// a session may be as long as its client likes.
const HANDED_OVER_MAX: Duration = Duration::from_hours(24);

/// Signals that a process which has handed over gets without a second meaning when its service is stopped: systemd signals all
/// processes of the service, and those that are left once more when the main process has ended.
const SIGNALS_TO_A_SERVICE: u32 = 2;

/// Ends the process as soon as its last request has ended; Pingora would sleep the whole grace period.
pub(super) struct Drain {
    pub(super) phases: broadcast::Receiver<ExecutionPhase>,
    pub(super) open: OpenRequests,
    pub(super) draining: Draining,
    pub(super) writes: FinalWrites,
    /// Longest time until the end of a process that has no successor.
    pub(super) grace: Duration,
}

/// What has to be done before the end of the process; every way out waits for it.
#[derive(Clone)]
pub(super) struct FinalWrites {
    pub(super) estimator: Estimator,
    pub(super) ledger: Arc<Keeper>,
    pub(super) request_log: RequestLog,
    pub(super) traces: Traces,
    pub(super) pid_file: PidFile,
}

impl FinalWrites {
    pub(super) fn close(&self) {
        self.estimator.close();
        self.ledger.close();
        self.request_log.close();
        self.traces.close();
        self.pid_file.remove();
    }
}

#[async_trait]
impl BackgroundService for Drain {
    async fn start(&self, _shutdown: ShutdownWatch) {
        let mut phases = self.phases.resubscribe();
        let mut hands_over = false;
        while let Ok(phase) = phases.recv().await {
            match phase {
                ExecutionPhase::GracefulUpgradeTransferringFds => {
                    hands_over = true;
                    self.draining.begin();
                }
                ExecutionPhase::GracefulTerminate => {
                    self.draining.begin();
                    systemd::stopping();
                }
                ExecutionPhase::ShutdownGracePeriod => self.wait_and_leave(hands_over).await,
                _ => {}
            }
        }
    }
}

impl Drain {
    /// `hands_over`: a successor serves, and is the service from now on.
    async fn wait_and_leave(&self, hands_over: bool) {
        self.draining.begin();
        log::info!("shutting down gracefully: {} requests are open", self.open.count());
        // A second signal ends the process at once.
        let mut patience = if hands_over { SIGNALS_TO_A_SERVICE } else { 0 };
        let mut asked_again = [SignalKind::terminate(), SignalKind::interrupt()].map(|kind| signal(kind).ok());
        let [terminated, interrupted] = &mut asked_again;
        let longest = if hands_over { HANDED_OVER_MAX } else { self.grace };
        let over = tokio::time::sleep(longest);
        tokio::pin!(over);
        let mut why = String::new();
        while self.open.count() > 0 && why.is_empty() {
            tokio::select! {
                () = tokio::time::sleep(DRAIN_POLL) => {}
                () = heard(terminated.as_mut()) => match patience.checked_sub(1) {
                    Some(left) => patience = left,
                    None => "at once, on a second signal".clone_into(&mut why),
                },
                () = heard(interrupted.as_mut()) => "at once, on a second signal".clone_into(&mut why),
                () = &mut over => why = format!("after {} s", longest.as_secs()),
            }
        }
        if self.open.count() > 0 {
            log::warn!("stopping {why}: {} requests are cut off", self.open.count());
        }
        // The last bytes of an HTTP/2 answer may still be on their way out.
        tokio::time::sleep(LAST_FLUSH).await;
        let writes = self.writes.clone();
        if tokio::task::spawn_blocking(move || writes.close()).await.is_err() {
            log::error!("the ledger could not be closed");
        }
        log::info!("stopped");
        log::logger().flush();
        std::process::exit(0);
    }
}

async fn heard(signals: Option<&mut Signal>) {
    if let Some(signals) = signals
        && signals.recv().await.is_some()
    {
        return;
    }
    std::future::pending::<()>().await;
}
