//! The process: from a checked config to Pingora's server, its listeners, and the services beside the proxy.

mod certificate;
mod commands;
pub mod control;
mod discovery;
mod drain;
pub mod endpoint_test;
mod guard;
pub mod handover;
pub mod keys;
mod listen;
mod log_file;
mod pid_file;
mod pingora_conf;
mod reload;
pub mod runtime_folder;
mod services;
mod systemd;
mod webhook;

use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use pingora::apps::HttpServerOptions;
use pingora::apps::http_app::HttpServer;
use pingora::protocols::http::v2::server::{H2Options, default_h2_options};
use pingora::server::configuration::{Opt, ServerConf};
use pingora::server::{RunArgs, Server};
use pingora::services::background::background_service;
use pingora::services::listening::Service;
use pingora_proxy::{HttpProxy, http_proxy};

use crate::billing::estimate::Estimator;
use crate::config::{self, Config, Flags, Switches, switches_file};
use crate::console::Console;
use crate::exchange::running::RunningRequests;
use crate::ledger::Keeper;
use crate::process::{ActionsSlot, ConfigSource, ConfigState, Draining, OpenRequests, Process};
use crate::proxy::{Door, Gateway};
use crate::request::auth::Auth;
use crate::request::body_memory::Memory;
use crate::request::connections::Connections;
use crate::request_log::{RequestLog, Traces};
use crate::routing::callers::Keyring;
use crate::routing::pool::Pool;
use crate::server::certificate::Certificate;
use crate::server::commands::Commands;
use crate::server::control::Control;
use crate::server::handover::{Successor, do_without_a_predecessor, take_callers_over};
use crate::server::keys::KeysReader;
use crate::server::reload::{Reloader, hear_hangups};
use crate::server::runtime_folder::Running;
use crate::telemetry::audit::Audit;
use crate::telemetry::trends::Trends;
use discovery::Discovery;
use drain::{Drain, FinalWrites};
use guard::Guard;
use listen::Listening;
pub use listen::callable;
use log_file::ReopenLog;
use pid_file::PidFile;
use services::{Announce, MetricsService, Minutes, Resolve, ShareHealth, StartThreads, Sweep};
use webhook::Webhooks;

/// Flow-control window of an HTTP/2 stream. Over a distance, each of these takes a round trip: HTTP's own 64 KiB made
/// 20 MB over 50 ms take 18 s.
const HTTP2_STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// Flow-control window of an HTTP/2 connection, which bounds the memory of one that is read too slowly.
const HTTP2_CONNECTION_WINDOW_BYTES: u32 = 2 * HTTP2_STREAM_WINDOW_BYTES;

/// Options of the process, beside its config.
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
    /// Flags that win over the config file.
    pub flags: Flags,
    /// Folder that the process was started in: a daemon is in another one.
    pub start_folder: PathBuf,
    /// Arguments of a successor of this process, if there may be one.
    pub arguments: Option<Vec<OsString>>,
    /// Folder of the upgrade socket and the pid file, unless the server conf file names others.
    pub runtime_folder: PathBuf,
}

/// Error at the start, with the way out.
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
    /// Listening address.
    pub address: SocketAddr,
    /// The pool it serves; a new one may be stored at any time.
    pub pool: Arc<ArcSwap<Pool>>,
    /// True if it listens with TLS.
    tls: bool,
    /// File that it counts in.
    ledger: PathBuf,
    /// Authentication of clients.
    auth: Auth,
    /// The admin API.
    console: Arc<Console>,
    /// True if it takes its sockets from a running process.
    takes_over: bool,
    /// Runtime folder, if the process may be replaced.
    runtime_folder: Option<PathBuf>,
    writes: FinalWrites,
    /// Longest wait of a stopping process for its open requests.
    grace: Duration,
    /// Keeps a free port ours until Pingora has bound it.
    _reserved: Option<Arc<socket2::Socket>>,
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Prepared({})", self.address)
    }
}

impl Prepared {
    /// Sets everything up. Nothing serves yet, but whatever can be wrong has been found.
    pub fn new(config: Config, options: &RunOptions) -> Result<Self, StartError> {
        let options = &in_its_folder(options)?;
        let (conf, grace) = pingora_conf::for_process(&config, options)?;
        let listening = Listening::new(&config.server, options)?;
        let ledger = Arc::new(Keeper::new(&config.server));
        if options.test {
            ledger.examine().map_err(|error| StartError(error.to_string()))?;
        }
        let started = config.server.clone();
        let mut config = config;
        Switches::read(&switches_file(&started.ledger)).map_err(StartError)?.apply(&mut config, Timestamp::now());
        let pool = Pool::new(config, ledger.client().clone(), None)
            .map_err(|error| StartError(format!("an endpoint cannot be set up: {error}")))?;
        let process = Process {
            pool: Arc::new(ArcSwap::from_pointee(pool)),
            keyring: Keyring::new(ledger.client().clone()),
            open: OpenRequests::default(),
            running: RunningRequests::default(),
            actions: ActionsSlot::default(),
            audit: Audit::new(&started.ledger),
            trends: Trends::default(),
            draining: Draining::default(),
            ledger: ledger.state().clone(),
            request_log: RequestLog::new(&started),
            traces: Traces::from_environment(),
            estimator: Estimator::default(),
            config: ConfigState::default(),
            memory: Memory::new(started.memory_bytes_max),
            connections: Connections::new(started.memory_bytes_max),
            started_at: SystemTime::now(),
        };
        // The file's are read below, which says which of them are overlooked.
        let _none = process.keyring.set_config(&started);
        // One that is missing or broken is an error now, and later none that stops anything.
        KeysReader::new(&process).begin().map_err(StartError)?;
        let pid_file = PidFile::new(&conf.pid_file, options);
        let opt = Opt { upgrade: options.upgrade, daemon: options.daemon, test: options.test, ..Opt::default() };
        let prepared = Self {
            server: Server::new_with_opt_and_conf(opt, conf),
            address: listening.address,
            pool: Arc::clone(&process.pool),
            tls: listening.certificate.is_some(),
            ledger: started.ledger.clone(),
            auth: Auth::default(),
            console: Arc::default(),
            takes_over: options.upgrade && !options.test,
            runtime_folder: options.arguments.is_some().then(|| options.runtime_folder.clone()),
            writes: FinalWrites {
                estimator: process.estimator.clone(),
                ledger,
                request_log: process.request_log.clone(),
                traces: process.traces.clone(),
                pid_file,
            },
            grace,
            _reserved: listening.reserved.clone(),
        };
        prepared.with_services(started, &listening, options, process)
    }

    fn with_services(
        mut self,
        started: config::Server,
        listening: &Listening,
        options: &RunOptions,
        process: Process,
    ) -> Result<Self, StartError> {
        let server = &mut self.server;
        let door = if started.admin_listen.is_some() { Door::Clients } else { Door::All };
        let gateway = Gateway {
            auth: self.auth.clone(),
            process: process.clone(),
            cursors: Arc::default(),
            console: Arc::clone(&self.console),
            door,
        };
        let clients = guarded((gateway.clone(), &server.configuration), listening, &started)?;
        let mut service = Service::new("api-together".to_owned(), clients);
        service.add_listener(listening.config());
        let admins = match started.admin_listen {
            None => None,
            Some(address) => {
                let gateway = Gateway { door: Door::Admins, ..gateway };
                let app = guarded((gateway, &server.configuration), listening, &started)?;
                let mut admins = Service::new("admin".to_owned(), app);
                admins.add_listener(listening.config_for(address));
                admins.threads = Some(1);
                Some(admins)
            }
        };
        server.add_service(background_service("connections", Sweep(process.connections.clone())));
        server.add_service(background_service("log", ReopenLog::new()));
        server.add_service(background_service("threads", StartThreads(self.writes.clone())));
        let drain = Drain {
            phases: server.watch_execution_phase(),
            open: process.open.clone(),
            draining: process.draining.clone(),
            writes: self.writes.clone(),
            grace: self.grace,
        };
        server.add_service(background_service("drain", drain));
        server.add_service(background_service("webhook", Webhooks { pool: Arc::clone(&process.pool) }));
        server.add_service(background_service("trends", Minutes(process.clone())));
        server.add_service(background_service("resolve", Resolve(Arc::clone(&process.pool))));
        server.add_service(background_service("share", ShareHealth(Arc::clone(&process.pool))));
        server.add_service(background_service("discovery", Discovery(Arc::clone(&process.pool))));
        if let Some(arguments) = options.arguments.clone() {
            let successor = Successor {
                program: std::env::current_exe().map_err(|error| StartError(format!("this program: {error}")))?,
                arguments,
                upgrade_sock: PathBuf::from(&server.configuration.upgrade_sock),
                runtime_folder: options.runtime_folder.clone(),
                address: listening.address,
                start_folder: options.start_folder.clone(),
                metrics_listen: started.metrics_listen,
                admin_listen: started.admin_listen,
                auth: self.auth.clone(),
                console: Arc::clone(&self.console),
            };
            server.add_service(background_service("upgrade", successor));
        }
        let metrics_listen = started.metrics_listen;
        if let Some(path) = options.config_file.clone() {
            let (pool, state) = (Arc::clone(&process.pool), process.config.clone());
            let (flags, certificate) = (options.flags.clone(), listening.certificate.clone());
            let source = ConfigSource { path: path.clone(), flags: flags.clone() };
            let (reload, reloads) = commands::reloads();
            let reloader = Reloader {
                path,
                flags,
                pool,
                keyring: process.keyring.clone(),
                request_log: process.request_log.clone(),
                started,
                certificate,
                state,
                hung_up: hear_hangups(),
                asked: reloads,
            };
            server.add_service(background_service("reload", reloader));
            let keys = KeysReader::new(&process);
            server.add_service(background_service("keys", keys.clone()));
            let commands = Commands::new(Some((source, reload)), keys, process.clone());
            process.actions.set(Arc::new(commands.clone()));
            if options.arguments.is_some() {
                let control = Control { runtime_folder: options.runtime_folder.clone(), commands };
                server.add_service(background_service("control", control));
            }
        } else {
            let commands = Commands::new(None, KeysReader::new(&process), process.clone());
            process.actions.set(Arc::new(commands));
        }
        server.add_service(service);
        if let Some(admins) = admins {
            server.add_service(admins);
        }
        if let Some(address) = metrics_listen {
            let mut scrapes = Service::new("metrics".to_owned(), HttpServer::new_app(MetricsService(process)));
            scrapes.add_tcp(&address.to_string());
            scrapes.threads = Some(1);
            server.add_service(scrapes);
        }
        Ok(self)
    }

    /// Where the log and the pid of a process in the background are, if this will be one.
    pub fn background(&self) -> Option<(&str, &str)> {
        let conf = &self.server.configuration;
        conf.daemon.then(|| (conf.error_log.as_deref().unwrap_or_default(), conf.pid_file.as_str()))
    }

    /// Prints a text once the server listens.
    pub fn announce(&mut self, text: String) {
        let (address, tls) = (self.address, self.tls);
        let (ledger, runtime_folder) = (self.ledger.clone(), self.runtime_folder.clone());
        let request_log = self.writes.request_log.state().map(|state| state.path.into_path_buf());
        let pid_file = self.writes.pid_file.clone();
        let announce = Announce { address, tls, ledger, request_log, runtime_folder, pid_file, text };
        self.server.add_service(background_service("announce", announce));
    }

    /// Takes the sockets of a running process over if asked to, and leaves here if only a test was wanted.
    pub fn bootstrap(&mut self) {
        let upgrade_sock = PathBuf::from(&self.server.configuration.upgrade_sock);
        let has_sockets = self.takes_over.then(|| do_without_a_predecessor(self.address, upgrade_sock));
        self.server.bootstrap();
        if let Some(has_sockets) = has_sockets {
            has_sockets.store(true, Ordering::Relaxed);
            if let Some(folder) = &self.runtime_folder {
                take_callers_over(folder, &self.auth, &self.console);
            }
        }
    }

    /// Serves until a signal ends it.
    pub fn serve(self) {
        self.run(RunArgs::default());
    }

    /// Serves until stopped in another way.
    pub fn run(self, args: RunArgs) {
        let Self { server, writes, .. } = self;
        server.run(args);
        writes.close();
        log::logger().flush();
    }
}

/// The proxy, behind the guard of its connections.
fn guarded(
    (gateway, conf): (Gateway, &Arc<ServerConf>),
    listening: &Listening,
    started: &config::Server,
) -> Result<Guard<HttpProxy<Gateway>>, StartError> {
    let process = gateway.process.clone();
    let mut http = HttpServerOptions::default();
    // On the plain port HTTP/2 is recognised by its preface; HTTP/1.1 works beside it.
    http.h2c = listening.certificate.is_none();
    http.h2_idle_timeout = Some(started.connections.h2_idle);
    let mut proxy = http_proxy(conf, gateway);
    proxy.server_options = Some(http);
    proxy.h2_options = Some(http2_options(started));
    let (connections, pool) = (process.connections, process.pool);
    Ok(Guard { app: Arc::new(proxy), connections, pool, tls: listening.tls()? })
}

/// Reads the listener's certificate and key, if it has them, and finds out whether they go together.
pub fn check_certificate(server: &config::Server) -> Result<(), String> {
    server.tls.as_ref().map(Certificate::new).transpose().map(drop)
}

/// Leaves the runtime folder to a process that runs from it already, unless that is taken over from: commands reach one process
/// only, and sockets are handed over by one.
fn in_its_folder(options: &RunOptions) -> Result<RunOptions, StartError> {
    let mut options = options.clone();
    if options.arguments.is_none() || options.upgrade || options.test {
        return Ok(options);
    }
    let Some(other) = Running::read(&options.runtime_folder) else { return Ok(options) };
    let folder = options.runtime_folder.display();
    let whose = format!("{folder} is the folder of {}", other.shown());
    if options.daemon {
        return Err(StartError(format!(
            "{whose}, and a process in the background needs one of its own: set RUNTIME_DIRECTORY to another, or end that one \
             with `api-together stop`"
        )));
    }
    log::warn!(
        "{whose}: commands such as `api-together status` reach that process and not this one, which `kill {}` ends, unless \
         RUNTIME_DIRECTORY names another folder for this one",
        std::process::id()
    );
    options.arguments = None;
    Ok(options)
}

fn http2_options(server: &config::Server) -> H2Options {
    let mut options = default_h2_options();
    options.max_header_list_size(server.connections.header_bytes_max);
    options.initial_window_size(HTTP2_STREAM_WINDOW_BYTES);
    options.initial_connection_window_size(HTTP2_CONNECTION_WINDOW_BYTES);
    options
}
