//! Services beside the proxy.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use http::{HeaderValue, Response, StatusCode, header};
use pingora::apps::http_app::ServeHttp;
use pingora::protocols::http::ServerSession;
use pingora::server::ShutdownWatch;
use pingora::services::background::BackgroundService;

use super::callable;
use super::drain::FinalWrites;
use super::pid_file::PidFile;
use super::systemd;
use crate::admin::{self, Sources};
use crate::process::Process;
use crate::request::connections::{Connections, SWEEP_INTERVAL};
use crate::routing::pool::Pool;
use crate::routing::shared_health::SharedHealth;
use crate::server::runtime_folder::Running;
use crate::telemetry::log_writer;
use crate::telemetry::metrics;
use crate::upstream::RESOLVE_INTERVAL;
use crate::usage::prices;

/// Interval, and largest number, of a starting process's checks whether it listens.
const LISTEN_POLL: Duration = Duration::from_millis(5);
const LISTEN_POLLS_MAX: u32 = 2000;

/// Starts the threads of the ledger and the logs, which would be lost if they were started before the process goes into the
/// background.
pub(super) struct StartThreads(pub(super) FinalWrites);

#[async_trait]
impl BackgroundService for StartThreads {
    async fn start(&self, _shutdown: ShutdownWatch) {
        log_writer::start();
        self.0.request_log.start();
        self.0.traces.start();
        prices::read_table_ahead();
        // Requests that wait already are refused, too, if it cannot be started.
        if let Err(error) = self.0.ledger.start() {
            log::error!("the ledger's thread cannot be started, so no endpoint with limits takes requests: {error}");
        }
    }
}

/// Tells the other processes that share the ledger which endpoints and keys cool down or rest, and takes in what they tell.
pub(super) struct ShareHealth(pub(super) Arc<ArcSwap<Pool>>);

/// Time between two looks at what others have told, and at what has changed here.
const SHARE_INTERVAL: Duration = Duration::from_millis(200);

#[async_trait]
impl BackgroundService for ShareHealth {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        if !self.0.load().ledger.is_shared() {
            return;
        }
        let mut ticks = tokio::time::interval(SHARE_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut shared = SharedHealth::default();
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    let pool = self.0.load_full();
                    let heard = pool.ledger.take_heard();
                    for notice in shared.round(&pool, &heard, &pool.clock()) {
                        pool.ledger.tell(notice);
                    }
                }
                _ = shutdown.changed() => return,
            }
        }
    }
}

/// `GET /metrics` on an address of its own, without a key.
pub(super) struct MetricsService(pub(super) Process);

#[async_trait]
impl ServeHttp for MetricsService {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let (status, body) = if session.req_header().uri.path() == "/metrics" {
            let pool = self.0.pool.load_full();
            (StatusCode::OK, admin::metrics::text(Sources::new(&pool, &self.0)).await)
        } else {
            (StatusCode::NOT_FOUND, b"only /metrics is served here\n".to_vec())
        };
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let content_type = HeaderValue::from_static(metrics::CONTENT_TYPE);
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
        let length = HeaderValue::from(response.body().len());
        response.headers_mut().insert(header::CONTENT_LENGTH, length);
        response
    }
}

/// Prints the banner when the server listens, so that scripts that wait for it may call at once.
pub(super) struct Announce {
    pub(super) address: SocketAddr,
    pub(super) tls: bool,
    /// File that the process counts in.
    pub(super) ledger: PathBuf,
    /// File that it logs requests in, if it does.
    pub(super) request_log: Option<PathBuf>,
    /// Runtime folder, if the process may be replaced.
    pub(super) runtime_folder: Option<PathBuf>,
    pub(super) pid_file: PidFile,
    pub(super) text: String,
}

#[async_trait]
impl BackgroundService for Announce {
    async fn start(&self, _shutdown: ShutdownWatch) {
        let address = callable(self.address);
        for _ in 0..LISTEN_POLLS_MAX {
            if tokio::net::TcpStream::connect(address).await.is_ok() {
                break;
            }
            tokio::time::sleep(LISTEN_POLL).await;
        }
        // Only now: a process that goes into the background becomes another one on its way.
        let running = Running::this(self.address, self.tls, &self.ledger, self.request_log.as_deref());
        if let Some(folder) = &self.runtime_folder
            && let Err(error) = running.write(folder)
        {
            log::warn!("{}: {error}; `api-together upgrade` will not find this process", folder.display());
        }
        self.pid_file.write();
        anstream::print!("{}", self.text);
        // Output to a pipe is buffered, and its reader would wait.
        std::io::Write::flush(&mut std::io::stdout()).unwrap_or_default();
        systemd::ready();
    }
}

/// Ends the minutes of the endpoints' last hour, which those who run the gateway see.
pub(super) struct Minutes(pub(super) Process);

#[async_trait]
impl BackgroundService for Minutes {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        let mut ticks = tokio::time::interval(Duration::from_mins(1));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                _ = shutdown.changed() => return,
            }
            let pool = self.0.pool.load();
            if pool.server.admin_key.is_some() {
                self.0.trends.end_minute(pool.first_bytes());
            }
        }
    }
}

/// Closes connections whose time is up, and those of strangers that are too many.
pub(super) struct Sweep(pub(super) Connections);

#[async_trait]
impl BackgroundService for Sweep {
    async fn start(&self, _shutdown: ShutdownWatch) {
        // To the end of the process: a process that is being replaced still has connections.
        let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.0.sweep();
        }
    }
}

/// Resolves the endpoints' names regularly, so that no request has to wait for it.
pub(super) struct Resolve(pub(super) Arc<ArcSwap<Pool>>);

#[async_trait]
impl BackgroundService for Resolve {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        let mut ticks = tokio::time::interval(RESOLVE_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => self.round().await,
                _ = shutdown.changed() => return,
            }
        }
    }
}

impl Resolve {
    async fn round(&self) {
        let pool = self.0.load_full();
        let mut lookups = tokio::task::JoinSet::new();
        for endpoint in pool.endpoints.iter().filter(|endpoint| endpoint.config.usable()).map(Arc::clone) {
            lookups.spawn(async move {
                for upstream in endpoint.upstreams() {
                    if let Err(error) = upstream.resolve().await {
                        let (id, host) = (&endpoint.config.id, upstream.name());
                        log::warn!("endpoint {id}: {host} cannot be resolved: {error}");
                    }
                }
            });
        }
        lookups.join_all().await;
    }
}
