//! From a checked config to a serving process: Pingora's server, its listeners, and the services beside the proxy.

use std::ffi::OsString;
use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use http::{HeaderValue, Response, StatusCode, header};
use pingora::apps::HttpServerOptions;
use pingora::apps::http_app::{HttpServer, ServeHttp};
use pingora::listeners::tls::TlsSettings;
use pingora::listeners::{ListenerConfig, TcpSocketOptions};
use pingora::protocols::http::ServerSession;
use pingora::server::configuration::{Opt, ServerConf};
use pingora::server::{ExecutionPhase, RunArgs, Server, ShutdownWatch};
use pingora::services::background::{BackgroundService, background_service};
use pingora::services::listening::Service;
use pingora_proxy::ProxyServiceBuilder;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::broadcast;

use crate::admin::{self, Process, Sources};
use crate::auth::Auth;
use crate::certificate::Certificate;
use crate::config::Config;
use crate::context::OpenRequests;
use crate::estimate::Estimator;
use crate::ledger::Keeper;
use crate::metrics;
use crate::notify;
use crate::pool::Pool;
use crate::proxy::Gateway;
use crate::reload::{ConfigState, Reloader, hear_hangups};
use crate::upgrade::{Running, Successor, make_private};
use crate::upstream::RESOLVE_INTERVAL;

/// Pingora counts tries over all requests alike; ours are bounded request by request, so this only has to be larger than
/// any of those: a hundred attempts, each at sixteen addresses, begun anew twice, and once more without `stream_options`.
const PINGORA_TRIES_MAX: usize = 100 * (16 + 2 + 1);
/// A stopping process waits this long for its open requests, unless the server conf says otherwise.
const GRACE_PERIOD_SECONDS: u64 = 600;
/// How often a stopping process looks whether its last request has ended.
const DRAIN_POLL: Duration = Duration::from_millis(50);

/// After the last request has ended, time for its last bytes to leave.
const LAST_FLUSH: Duration = Duration::from_millis(200);
/// How often, and how often at most, a starting process looks whether it listens yet.
const LISTEN_POLL: Duration = Duration::from_millis(5);
const LISTEN_POLLS_MAX: u32 = 2000;

/// How the process is to run, beside its config.
#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// `-u`: take the sockets over from a running process.
    pub upgrade: bool,
    /// `-d`: run in the background.
    pub daemon: bool,
    /// `-t`: leave after everything was checked.
    pub test: bool,
    /// Pingora's own server conf file, if there is one.
    pub server_conf: Option<PathBuf>,
    /// The config file, if it is to be read again when it changes.
    pub config_file: Option<PathBuf>,
    /// What a successor of this process is started with, if one may be.
    pub arguments: Option<Vec<OsString>>,
    /// Where the upgrade socket and the pid file go unless the server conf file says so.
    pub runtime_folder: PathBuf,
}

/// Why the server could not start. Each says what to do about it.
#[derive(Debug)]
pub struct StartError(String);

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StartError {}

/// A server that is ready to run.
pub struct Prepared {
    server: Server,
    /// Where it will listen.
    pub address: SocketAddr,
    /// The pool it serves; a new one may be stored at any time.
    pub pool: Arc<ArcSwap<Pool>>,
    /// Whether it will listen with TLS.
    tls: bool,
    /// Where it tells of itself, if it may be replaced.
    runtime_folder: Option<PathBuf>,
    counts: Counts,
    /// Keeps a free port ours until Pingora has bound it.
    _reserved: Option<socket2::Socket>,
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Prepared({})", self.address)
    }
}

impl Prepared {
    /// Sets everything up. Nothing serves yet, but whatever can be wrong has been found.
    pub fn new(config: Config, options: &RunOptions) -> Result<Self, StartError> {
        let conf = server_conf(&config, options)?;
        let certificate = config.server.tls.as_ref().map(Certificate::new).transpose().map_err(StartError)?;
        let tls = certificate.clone().map(tls_settings).transpose()?;
        let has_tls = tls.is_some();
        let started = config.server.clone();
        let metrics_address = started.metrics_listen;
        if let Some(address) = metrics_address.filter(|_| !options.upgrade && !options.test) {
            TcpListener::bind(address)
                .map_err(|error| StartError(format!("server.metricsListen: {}", explain_bind(address, &error))))?;
        }
        let wanted = SocketAddr::new(config.server.host, config.server.port);
        let (address, reserved) = if options.upgrade || options.test { (wanted, None) } else { free_address(wanted)? };
        let ledger = Arc::new(Keeper::new(&config.server));
        if options.test {
            ledger.try_out().map_err(|error| StartError(error.to_string()))?;
        }
        let pool = Pool::new(config, ledger.client().clone(), None)
            .map_err(|error| StartError(format!("an endpoint cannot be set up: {error}")))?;
        let pool = Arc::new(ArcSwap::from_pointee(pool));
        let opt = Opt { upgrade: options.upgrade, daemon: options.daemon, test: options.test, ..Opt::default() };
        let mut server = Server::new_with_opt_and_conf(opt, conf);
        let open = OpenRequests::default();
        let draining = Draining::default();
        let estimator = Estimator::default();
        let state = ConfigState::default();
        let process = Process {
            pool: Arc::clone(&pool),
            open: open.clone(),
            draining: draining.clone(),
            ledger: ledger.state().clone(),
            estimator: estimator.clone(),
            config: state.clone(),
        };
        let gateway = Gateway { auth: Auth::default(), process: process.clone() };
        let mut http = HttpServerOptions::default();
        // On the plain port HTTP/2 is told by its preface; HTTP/1.1 works beside it.
        http.h2c = tls.is_none();
        let mut service =
            ProxyServiceBuilder::new(&server.configuration, gateway).name("api-together").server_options(http).build();
        let mut socket = TcpSocketOptions::default();
        socket.so_reuseport = reserved.as_ref().map(|_| true);
        let mut listener = ListenerConfig::tcp(address.to_string()).tcp_socket_options(socket);
        if let Some(tls) = tls {
            listener = listener.tls(tls);
        }
        service.add_listener(listener);
        let phases = server.watch_execution_phase();
        server.add_service(background_service("ledger", KeepLedger(Arc::clone(&ledger))));
        let counts = Counts { estimator, ledger };
        let drain = Drain { phases, open, draining, counts: counts.clone() };
        server.add_service(background_service("drain", drain));
        server.add_service(background_service("resolve", Resolve(Arc::clone(&pool))));
        if let Some(arguments) = options.arguments.clone() {
            let successor = Successor {
                program: std::env::current_exe().map_err(|error| StartError(format!("this program: {error}")))?,
                arguments,
                upgrade_sock: PathBuf::from(&server.configuration.upgrade_sock),
                runtime_folder: options.runtime_folder.clone(),
                address,
            };
            server.add_service(background_service("upgrade", successor));
        }
        if let Some(path) = options.config_file.clone() {
            let hung_up = hear_hangups();
            let reloader = Reloader { path, pool: Arc::clone(&pool), started, certificate, state, hung_up };
            server.add_service(background_service("reload", reloader));
        }
        server.add_service(service);
        if let Some(address) = metrics_address {
            let mut scrapes = Service::new("metrics".to_owned(), HttpServer::new_app(Scrape(process)));
            scrapes.add_tcp(&address.to_string());
            scrapes.threads = Some(1);
            server.add_service(scrapes);
        }
        let runtime_folder = options.arguments.is_some().then(|| options.runtime_folder.clone());
        Ok(Self { server, address, pool, tls: has_tls, runtime_folder, counts, _reserved: reserved })
    }

    /// Prints a text once the server listens.
    pub fn announce(&mut self, text: String) {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let running = Running { pid: std::process::id(), address: self.address, version, tls: self.tls };
        let announce = Announce { running, runtime_folder: self.runtime_folder.clone(), text };
        self.server.add_service(background_service("announce", announce));
    }

    /// Takes the sockets of a running process over if asked to, and leaves here if only a test was wanted.
    pub fn bootstrap(&mut self) {
        self.server.bootstrap();
    }

    /// Serves until a signal ends it.
    pub fn serve(self) {
        self.run(RunArgs::default());
    }

    /// Serves until told to stop in another way.
    pub fn run(self, args: RunArgs) {
        let Self { server, counts, .. } = self;
        server.run(args);
        counts.close();
    }
}

/// Pingora's own settings: its conf file, with what we need of it.
fn server_conf(config: &Config, options: &RunOptions) -> Result<ServerConf, StartError> {
    let mut conf = match &options.server_conf {
        Some(path) => read_server_conf(path)?,
        None => ServerConf::default(),
    };
    let defaults = ServerConf::default();
    let folder = &options.runtime_folder;
    let private = |name: &str| folder.join(name).to_string_lossy().into_owned();
    // Pingora's defaults lie in the folder for temporary files, where anybody could put something in their place.
    if conf.upgrade_sock == defaults.upgrade_sock {
        conf.upgrade_sock = private("upgrade.sock");
    }
    if conf.pid_file == defaults.pid_file {
        conf.pid_file = private("api-together.pid");
    }
    let is_needed = options.upgrade || options.daemon;
    if (is_needed || options.arguments.is_some())
        && let Err(error) = make_private(folder)
    {
        let problem = format!("{}: {error}; upgrades need a folder of their own", folder.display());
        if is_needed {
            return Err(StartError(problem));
        }
        log::warn!("{problem}");
    }
    conf.grace_period_seconds.get_or_insert(GRACE_PERIOD_SECONDS);
    conf.threads = config.server.threads;
    conf.max_retries = PINGORA_TRIES_MAX;
    Ok(conf)
}

fn read_server_conf(path: &Path) -> Result<ServerConf, StartError> {
    let fail = |why: String| StartError(format!("{}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| fail(error.to_string()))?;
    let conf: ServerConf = serde_yaml::from_str(&text).map_err(|error| fail(error.to_string()))?;
    conf.validate().map_err(|error| fail(error.to_string()))
}

/// Finds out whether the address can be listened on before Pingora tries, which would go on without it. Port 0 becomes a
/// free one, kept until Pingora has it.
fn free_address(wanted: SocketAddr) -> Result<(SocketAddr, Option<socket2::Socket>), StartError> {
    let fail = |error: std::io::Error| StartError(explain_bind(wanted, &error));
    if wanted.port() != 0 {
        TcpListener::bind(wanted).map_err(fail)?;
        return Ok((wanted, None));
    }
    let socket =
        socket2::Socket::new(socket2::Domain::for_address(wanted), socket2::Type::STREAM, None).map_err(fail)?;
    socket.set_reuse_address(true).map_err(fail)?;
    socket.set_reuse_port(true).map_err(fail)?;
    socket.bind(&wanted.into()).map_err(fail)?;
    let bound = socket.local_addr().map_err(fail)?.as_socket().unwrap_or(wanted);
    Ok((bound, Some(socket)))
}

fn explain_bind(address: SocketAddr, error: &std::io::Error) -> String {
    let way_out = match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            "another program listens there; stop it, or choose another server.port (or PORT)"
        }
        std::io::ErrorKind::PermissionDenied => {
            "ports below 1024 need privileges; choose another server.port (or PORT)"
        }
        std::io::ErrorKind::AddrNotAvailable => "this machine has no such address; see server.host",
        _ => "see server.host and server.port",
    };
    format!("cannot listen on {address}: {error}: {way_out}")
}

fn tls_settings(certificate: Certificate) -> Result<TlsSettings, StartError> {
    let fail = |error: Box<pingora::Error>| StartError(format!("server.tls: {error}"));
    // With a resolver no paths are looked at.
    let mut settings = TlsSettings::intermediate("", "").map_err(fail)?;
    settings.set_cert_resolver(Arc::new(certificate));
    settings.enable_h2();
    Ok(settings)
}

/// Set once the process is on its way out, so that busy connections are told to close.
#[derive(Clone, Debug, Default)]
pub struct Draining(Arc<std::sync::atomic::AtomicBool>);

impl Draining {
    /// Whether the process is on its way out.
    pub fn is_on(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::Relaxed)
    }

    fn begin(&self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Ends the process as soon as its last request has ended; Pingora would sleep the whole grace period.
struct Drain {
    phases: broadcast::Receiver<ExecutionPhase>,
    open: OpenRequests,
    draining: Draining,
    counts: Counts,
}

/// Where counts wait to be written; every way out of the process waits for them.
#[derive(Clone)]
struct Counts {
    estimator: Estimator,
    ledger: Arc<Keeper>,
}

impl Counts {
    fn close(&self) {
        self.estimator.close();
        self.ledger.close();
    }
}

#[async_trait]
impl BackgroundService for Drain {
    async fn start(&self, _shutdown: ShutdownWatch) {
        let mut phases = self.phases.resubscribe();
        while let Ok(phase) = phases.recv().await {
            match phase {
                ExecutionPhase::GracefulUpgradeTransferringFds | ExecutionPhase::GracefulTerminate => {
                    self.draining.begin();
                }
                ExecutionPhase::ShutdownGracePeriod => self.wait_and_leave().await,
                _ => {}
            }
        }
    }
}

impl Drain {
    async fn wait_and_leave(&self) {
        self.draining.begin();
        notify::stopping();
        log::info!("stopping: {} requests are open", self.open.count());
        // Whoever asks a second time does not want to wait.
        let mut asked_again = [SignalKind::terminate(), SignalKind::interrupt()].map(|kind| signal(kind).ok());
        let [terminated, interrupted] = &mut asked_again;
        while self.open.count() > 0 {
            tokio::select! {
                () = tokio::time::sleep(DRAIN_POLL) => {}
                () = heard(terminated.as_mut()) => break,
                () = heard(interrupted.as_mut()) => break,
            }
        }
        if self.open.count() > 0 {
            log::warn!("stopping at once, as asked: {} requests are cut", self.open.count());
        }
        // The last bytes of an HTTP/2 answer may still be on their way out.
        tokio::time::sleep(LAST_FLUSH).await;
        let counts = self.counts.clone();
        if tokio::task::spawn_blocking(move || counts.close()).await.is_err() {
            log::error!("the ledger could not be closed");
        }
        log::info!("stopped");
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

/// Starts the ledger's thread, which would be lost if it were started before the process goes into the background.
struct KeepLedger(Arc<Keeper>);

#[async_trait]
impl BackgroundService for KeepLedger {
    async fn start(&self, _shutdown: ShutdownWatch) {
        // Whoever has asked already is told, too, if it cannot be.
        if let Err(error) = self.0.start() {
            log::error!("the ledger's thread cannot be started, so no endpoint with limits takes requests: {error}");
        }
    }
}

/// `GET /metrics` on an address of its own, without a key.
struct Scrape(Process);

#[async_trait]
impl ServeHttp for Scrape {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let (status, body) = if session.req_header().uri.path() == "/metrics" {
            let pool = self.0.pool.load_full();
            (StatusCode::OK, admin::metrics::text(Sources { pool: &pool, process: &self.0 }).await)
        } else {
            (StatusCode::NOT_FOUND, b"there is nothing here but /metrics\n".to_vec())
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

/// Says that the server listens when it does, so that whoever waits for it may call at once.
struct Announce {
    running: Running,
    runtime_folder: Option<PathBuf>,
    text: String,
}

#[async_trait]
impl BackgroundService for Announce {
    async fn start(&self, _shutdown: ShutdownWatch) {
        let address = crate::banner::local(self.running.address);
        for _ in 0..LISTEN_POLLS_MAX {
            if tokio::net::TcpStream::connect(address).await.is_ok() {
                break;
            }
            tokio::time::sleep(LISTEN_POLL).await;
        }
        if let Some(folder) = &self.runtime_folder
            && let Err(error) = self.running.write(folder)
        {
            log::warn!("{}: {error}; `api-together upgrade` will not find this process", folder.display());
        }
        anstream::print!("{}", self.text);
        // To a pipe the text would wait for more; whoever waits for it would wait as well.
        std::io::Write::flush(&mut std::io::stdout()).unwrap_or_default();
        notify::ready();
    }
}

/// Looks the endpoints' names up again and again, so that no request has to wait for it.
struct Resolve(Arc<ArcSwap<Pool>>);

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
                if let Err(error) = endpoint.upstream.resolve().await {
                    let (id, host) = (&endpoint.config.id, endpoint.upstream.name());
                    log::warn!("endpoint {id}: {host} cannot be resolved: {error}");
                }
            });
        }
        lookups.join_all().await;
    }
}
