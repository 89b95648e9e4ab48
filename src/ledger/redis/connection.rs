//! The way to the server: one machine, one that sentinels name, or a cluster; with TLS or without.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::cluster_async::ClusterConnection;
use redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, IntoConnectionInfo as _, RedisConnectionInfo,
    RedisError, RedisResult, ServerErrorKind, TlsCertificates, TlsMode, Value,
};
use tokio::runtime::Runtime;

use super::wire::{Arguments, Reply};
use super::{Server, unusable};
use crate::config::{RedisAddress, RedisKind};
use crate::ledger::LedgerError;

/// The script. Its name has a digest of it, so that processes of two versions can use one server.
const SCRIPT: &str = include_str!("batch.lua");
/// Pause before the next attempt to connect, doubled with each that fails.
const PAUSE_MIN: Duration = Duration::from_millis(50);
pub(super) const PAUSE_MAX: Duration = Duration::from_millis(500);
/// Time within which replicas have to confirm a batch, if they have to.
const REPLICAS_WAIT_MAX: Duration = Duration::from_millis(500);

/// How a server is reached.
#[derive(Clone, Debug)]
pub struct ConnectionOptions {
    /// Its address.
    pub address: RedisAddress,
    /// Certificates of authorities (PEM) that its own is checked by; `None` for those of the system.
    pub ca_file: Option<PathBuf>,
    /// Longest wait for a reply, and for a connection.
    pub wait: Duration,
    /// Replicas that must have a batch before it counts.
    pub replicas: u32,
}

/// A connection, which is made again when it is lost.
pub struct Connection {
    options: ConnectionOptions,
    authorities: Option<Vec<u8>>,
    name: String,
    runtime: Runtime,
    target: Target,
    open: Option<Open>,
    script: Script,
    /// Pause after the next failure, and its end.
    pause: Duration,
    retry_at: Option<Instant>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("name", &self.name).finish_non_exhaustive()
    }
}

enum Target {
    One(Box<Client>),
    Sentinels(Box<SentinelClient>),
    Cluster(Box<redis::cluster::ClusterClient>),
}

enum Open {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

/// How the script is called.
struct Script {
    /// Name of the function, and its library.
    function: String,
    library: String,
    /// Digest by which servers without functions call it; known once it is loaded there.
    digest: Option<String>,
}

impl Script {
    fn new() -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, SCRIPT.as_bytes());
        let version = digest.as_ref().iter().take(6).fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
        let function = format!("api_together_{version:012x}");
        let library = format!(
            "#!lua name={function}\nredis.register_function('{function}', function(KEYS, ARGV)\n{SCRIPT}\nend)\n"
        );
        Self { function, library, digest: None }
    }

    fn call(&self, arguments: &Arguments) -> Cmd {
        let mut command = match &self.digest {
            None => redis::cmd("FCALL"),
            Some(_) => redis::cmd("EVALSHA"),
        };
        command.arg(self.digest.as_ref().unwrap_or(&self.function)).arg(1);
        for argument in &arguments.0 {
            command.arg(argument);
        }
        command
    }
}

impl Connection {
    /// Prepares a connection. Nothing is sent yet.
    pub fn new(options: ConnectionOptions) -> Result<Self, LedgerError> {
        // It has to be chosen before the first connection; an error says that it has been.
        rustls::crypto::ring::default_provider().install_default().unwrap_or_default();
        let name = options.address.to_string();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| unusable(&name, &error.to_string()))?;
        let cannot_read = |path: &PathBuf, error: std::io::Error| {
            unusable(&name, &format!("{} (server.redis.caFile) cannot be read: {error}", path.display()))
        };
        let authorities = options.ca_file.as_ref();
        let authorities = authorities.map(|path| std::fs::read(path).map_err(|error| cannot_read(path, error)));
        let authorities = authorities.transpose()?;
        let target =
            target_of(&options, authorities.as_deref()).map_err(|error| unusable(&name, &error.to_string()))?;
        let script = Script::new();
        Ok(Self { options, authorities, name, runtime, target, open: None, script, pause: PAUSE_MIN, retry_at: None })
    }

    /// Does something with an open connection, within the time that there is for it. A connection that turns out to be closed, since
    /// it was idle, is made anew once.
    #[expect(clippy::needless_pass_by_value, reason = "closures are passed like this")]
    fn within<T>(&mut self, work: impl AsyncFn(&mut Open, &mut Script) -> RedisResult<T>) -> Result<T, LedgerError> {
        if self.retry_at.is_some_and(|retry_at| Instant::now() < retry_at) {
            return Err(unusable(&self.name, "cannot be reached"));
        }
        let (open, script, target, options) = (&mut self.open, &mut self.script, &mut self.target, &self.options);
        let attempt = async {
            let was_open = open.is_some();
            let mut connection = match open.take() {
                Some(connection) => connection,
                None => connect(target, options).await?,
            };
            let mut done = work(&mut connection, script).await;
            if was_open && done.as_ref().is_err_and(RedisError::is_connection_dropped) {
                connection = connect(target, options).await?;
                done = work(&mut connection, script).await;
            }
            if done.as_ref().err().is_none_or(keeps_connection) {
                *open = Some(connection);
            }
            done
        };
        let done = self.runtime.block_on(async { tokio::time::timeout(options.wait, attempt).await });
        let why = match done {
            Ok(Ok(done)) => {
                (self.pause, self.retry_at) = (PAUSE_MIN, None);
                return Ok(done);
            }
            Ok(Err(error)) => explain(&error),
            Err(_) => format!("did not answer within {} ms (server.ledgerWaitMs)", self.options.wait.as_millis()),
        };
        // The next one asks other sentinels first: the first ones may be on the machine that is gone.
        if let RedisKind::Sentinels(_) = &self.options.address.kind {
            self.options.address.hosts.rotate_left(1);
            let again = target_of(&self.options, self.authorities.as_deref());
            self.target = again.map_err(|error| unusable(&self.name, &error.to_string()))?;
        }
        // Between half of it and all of it, so that not all processes come back at once.
        self.retry_at = Some(Instant::now() + self.pause.mul_f64(0.5 + fastrand::f64() / 2.0));
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        Err(unusable(&self.name, &why))
    }
}

impl Connection {
    /// Checks that the server answers, without changing anything there.
    pub fn examine(&mut self) -> Result<(), LedgerError> {
        self.within(async |connection, _| connection.send(&redis::cmd("PING")).await).map(drop)
    }
}

impl Server for Connection {
    fn batch(&mut self, arguments: Arguments) -> Result<Reply, LedgerError> {
        let replicas = self.options.replicas;
        let value = self.within(async |connection, script| {
            let value = call(connection, script, &arguments).await?;
            if replicas > 0 {
                confirm(connection, replicas).await?;
            }
            Ok(value)
        })?;
        Reply::parse(value).ok_or_else(|| unusable(&self.name, "answers what it was not asked"))
    }

    fn run(&mut self, commands: Vec<Arguments>) -> Result<Vec<Value>, LedgerError> {
        let commands: Vec<Cmd> = commands.iter().map(command).collect();
        self.within(async |connection, _| match connection {
            Open::One(one) => {
                let mut pipeline = redis::pipe();
                for command in &commands {
                    pipeline.add_command(command.clone());
                }
                let replies = one.req_packed_commands(&pipeline, 0, commands.len()).await?;
                replies.into_iter().map(Value::extract_error).collect()
            }
            Open::Cluster(cluster) => {
                let mut replies = Vec::with_capacity(commands.len());
                for command in &commands {
                    replies.push(cluster.req_packed_command(command).await?.extract_error()?);
                }
                Ok(replies)
            }
        })
    }

    fn name(&self) -> &str {
        &self.name
    }
}

impl Open {
    async fn send(&mut self, command: &Cmd) -> RedisResult<Value> {
        let reply = match self {
            Self::One(one) => one.req_packed_command(command).await,
            Self::Cluster(cluster) => cluster.req_packed_command(command).await,
        };
        reply?.extract_error()
    }
}

/// Calls the script, which is loaded if the server does not have it.
async fn call(connection: &mut Open, script: &mut Script, arguments: &Arguments) -> RedisResult<Value> {
    let first = connection.send(&script.call(arguments)).await;
    match first {
        Err(error) if is_missing(&error) => {}
        answered => return answered,
    }
    if script.digest.is_none() {
        let mut load = redis::cmd("FUNCTION");
        load.arg("LOAD").arg("REPLACE").arg(&script.library);
        if let Err(error) = connection.send(&load).await {
            if error.is_io_error() {
                return Err(error);
            }
            // Servers before version 7 have no functions, and a user may not be permitted to load them.
            log::debug!("the ledger's script is called by its digest: {error}");
            script.digest = Some(String::new());
        }
    }
    if script.digest.is_some() {
        let mut load = redis::cmd("SCRIPT");
        let loaded = connection.send(load.arg("LOAD").arg(SCRIPT)).await?;
        script.digest = super::wire::text(loaded);
    }
    connection.send(&script.call(arguments)).await
}

/// True if the server does not have the script yet.
fn is_missing(error: &RedisError) -> bool {
    let text = error.to_string();
    error.kind() == ServerErrorKind::NoScript.into()
        || text.contains("Function not found")
        || text.contains("unknown command")
        || text.to_ascii_lowercase().contains("no permissions to run the 'fcall'")
}

/// Waits until so many replicas have what was written.
async fn confirm(connection: &mut Open, replicas: u32) -> RedisResult<()> {
    let mut wait = redis::cmd("WAIT");
    let confirmed = connection.send(wait.arg(replicas).arg(REPLICAS_WAIT_MAX.as_millis().to_string())).await?;
    let confirmed = super::wire::text(confirmed).and_then(|number| number.parse::<u32>().ok()).unwrap_or_default();
    if confirmed >= replicas {
        return Ok(());
    }
    let what = format!("{confirmed} of {replicas} replicas have confirmed a batch in time");
    Err((redis::ErrorKind::Client, "too few replicas", what).into())
}

fn command(arguments: &Arguments) -> Cmd {
    let mut command = Cmd::new();
    for argument in &arguments.0 {
        command.arg(argument);
    }
    command
}

/// True if the server has answered and would answer the next call as well as this one.
fn keeps_connection(error: &RedisError) -> bool {
    !error.is_io_error()
        && !error.is_unrecoverable_error()
        && ![ServerErrorKind::ReadOnly, ServerErrorKind::MasterDown, ServerErrorKind::ClusterDown]
            .iter()
            .any(|kind| error.kind() == (*kind).into())
}

/// What went wrong, and what to do about it where that is known.
fn explain(error: &RedisError) -> String {
    let text = error.to_string();
    if error.is_connection_refusal() || error.is_connection_dropped() || error.is_io_error() {
        return format!(
            "{text}; see that it runs, and that server.ledger names its host, its port, and rediss if it wants TLS"
        );
    }
    let help = match error.code() {
        Some("NOAUTH" | "WRONGPASS") => "; its password stands in server.ledger, before the host",
        Some("NOPERM") => "; docs/scaling.md has what its user must be permitted",
        Some("OOM") => "; it has no memory left for what is to be counted (maxmemory)",
        Some("READONLY") => "; it is a replica: name the leading server, or the sentinels (redis+sentinel://)",
        Some("MOVED") => "; it is a part of a cluster: write redis+cluster://",
        Some("MISCONF") => "; it cannot write its own files, and refuses all else until it can",
        _ => "",
    };
    format!("{text}{help}")
}

async fn connect(target: &mut Target, options: &ConnectionOptions) -> RedisResult<Open> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(options.wait))
        .set_response_timeout(Some(options.wait));
    match target {
        Target::One(client) => client.get_multiplexed_async_connection_with_config(&config).await.map(Open::One),
        Target::Sentinels(client) => client.get_async_connection_with_config(&config).await.map(Open::One),
        Target::Cluster(client) => client.get_async_connection().await.map(Open::Cluster),
    }
}

fn target_of(options: &ConnectionOptions, authorities: Option<&[u8]>) -> RedisResult<Target> {
    let RedisAddress { kind, tls, username, password, hosts, database } = &options.address;
    let certificates = || TlsCertificates { client_tls: None, root_cert: authorities.map(<[u8]>::to_vec) };
    let address = |(host, port): &(String, u16)| {
        if *tls {
            ConnectionAddr::TcpTls { host: host.clone(), port: *port, insecure: false, tls_params: None }
        } else {
            ConnectionAddr::Tcp(host.clone(), *port)
        }
    };
    let password = password.as_ref().map(crate::config::Secret::expose);
    let mut login = RedisConnectionInfo::default().set_db(*database);
    if let Some(username) = username {
        login = login.set_username(username);
    }
    if let Some(password) = password {
        login = login.set_password(password);
    }
    let at = |host: &(String, u16)| -> RedisResult<ConnectionInfo> {
        Ok(address(host).into_connection_info()?.set_redis_settings(login.clone()))
    };
    match kind {
        RedisKind::One => {
            let Some(host) = hosts.first() else {
                return Err((redis::ErrorKind::InvalidClientConfig, "no host").into());
            };
            if *tls { Client::build_with_tls(at(host)?, certificates()) } else { Client::open(at(host)?) }
                .map(|client| Target::One(Box::new(client)))
        }
        RedisKind::Sentinels(name) => {
            let sentinels = hosts.iter().map(address);
            let mut builder = SentinelClientBuilder::new(sentinels, name, SentinelServerType::Master)?;
            builder = builder.set_client_to_redis_db(*database);
            if let Some(username) = username {
                builder = builder.set_client_to_redis_username(username);
            }
            if let Some(password) = password {
                builder = builder.set_client_to_redis_password(password);
            }
            if *tls {
                builder = builder
                    .set_client_to_redis_tls_mode(TlsMode::Secure)
                    .set_client_to_redis_certificates(certificates())
                    .set_client_to_sentinel_tls_mode(TlsMode::Secure)
                    .set_client_to_sentinel_certificates(certificates());
            }
            builder.build().map(|client| Target::Sentinels(Box::new(client)))
        }
        RedisKind::Cluster => {
            let nodes = hosts.iter().map(at).collect::<RedisResult<Vec<_>>>()?;
            let mut builder = redis::cluster::ClusterClient::builder(nodes)
                // All nodes are waited for, so one that is gone must leave time for the others.
                .connection_timeout(options.wait / 4)
                .response_timeout(options.wait)
                .retries(1);
            if *tls {
                builder = builder.tls(TlsMode::Secure).certs(certificates());
            }
            builder.build().map(|client| Target::Cluster(Box::new(client)))
        }
    }
}
