//! The checked `server` part: the client's side, and everything that applies to all endpoints.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::tz::TimeZone;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::affinity::{AffinityRules, affinity};
use super::checked::Check;
use super::cidr::Cidr;
use super::client_keys::{Around, ClientKey, client_keys};
use super::connections::{ConnectionLimits, connections};
use super::environment::{self, Environment};
use super::file::{
    self, BreakerFile, CorsFile, QueueFile, RedisFile, RetryFile, ServerFile, ServerTlsFile, StatusFile,
};
use super::header_pattern::HeaderPattern;
use super::key_strength::warn_of_a_weak_key;
use super::keys_file::KeysFile;
use super::memory::memory_bytes;
use super::prices::{PriceEntry, prices};
use super::problem::join;
use super::request_log::{RequestLog, request_log};
use super::shared_ledger::{SharedLedger, is_redis, shared_ledger};
use super::status_set::StatusSet;
use super::webhook::{Webhook, webhook};
use crate::config::secret::Secret;

/// Models that others take the place of, and how many of one.
pub(super) const FALLBACKS_MAX: usize = 256;
const FALLBACKS_OF_ONE_MAX: usize = 8;

/// The client's side, and everything that applies to all endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "switches of the config, each of its own")]
pub struct Server {
    /// The address to listen on.
    pub host: IpAddr,
    /// The port to listen on; 0 for any free one.
    pub port: u16,
    /// The key that opens every call; none where each caller has one.
    pub api_key: Option<Secret>,
    /// The key of those who run the gateway, if the page and the admin API are on.
    pub admin_key: Option<Secret>,
    /// Address of their own for these, if they have one.
    pub admin_listen: Option<SocketAddr>,
    /// Keys of single callers.
    pub keys: Vec<ClientKey>,
    /// File of more of them.
    pub keys_file: KeysFile,
    /// Tokens of an answer that are reserved before a request is sent.
    pub budget_reserve_tokens: u32,
    /// True if answers say what they cost.
    pub cost_header: bool,
    /// Where alerts are sent: refused keys, budgets at their end, a failing ledger, refused configs.
    pub webhook: Option<Webhook>,
    /// Models that others take the place of when no endpoint can take a request for them.
    pub fallbacks: BTreeMap<String, Vec<String>>,
    /// Prices of models, the closest one first.
    pub prices: Vec<PriceEntry>,
    /// True if what one key made may be used with every other one.
    pub share_ids: bool,
    /// HTTPS with this certificate, or plain HTTP.
    pub tls: Option<ServerTls>,
    /// Web pages that may call.
    pub cors: Cors,
    /// The longest request body taken.
    pub body_bytes_max: usize,
    /// Memory that request bodies above 64 KiB may take up together, in bytes.
    pub memory_bytes_max: usize,
    /// Load balancing among several usable endpoints.
    pub strategy: Strategy,
    /// Retries.
    pub retry: Retry,
    /// Circuit breaker.
    pub breaker: Breaker,
    /// Worker threads, from 1 to 1024.
    pub threads: usize,
    /// Bounds of clients' connections.
    pub connections: ConnectionLimits,
    /// Reverse proxies whose forwarding headers are trusted.
    pub trusted_proxies: Vec<Cidr>,
    /// Wrong keys one address may send in a minute; 0 for any number.
    pub failed_keys_per_minute: u32,
    /// Longest silence of a stream before its client is sent a comment; none if it is sent none.
    pub stream_ping: Option<Duration>,
    /// True if responses carry `x-api-together-*` headers.
    pub endpoint_headers: bool,
    /// Headers of requests that are forwarded besides those of the API.
    pub forward_headers: Vec<HeaderPattern>,
    /// The file that holds every count, as an absolute path. With a ledger on a server it does not exist, and tells only where this
    /// machine's own files are.
    pub ledger: PathBuf,
    /// The server that holds every count, if one does.
    pub shared_ledger: Option<SharedLedger>,
    /// Longest wait for the ledger.
    pub ledger_wait: Duration,
    /// Behaviour of endpoints with limits while the ledger cannot be written.
    pub ledger_on_error: LedgerOnError,
    /// Durability of counts across a loss of power.
    pub ledger_sync: LedgerSync,
    /// Time zone whose midnight ends a day.
    pub timezone: TimeZone,
    /// Queue for requests without a permit.
    pub queue: Option<Queue>,
    /// Which requests go where earlier ones went.
    pub affinity: AffinityRules,
    /// Log of requests in a file of its own, if there is one.
    pub request_log: Option<RequestLog>,
    /// Format of log lines.
    pub log_format: LogFormat,
    /// Address that serves `/metrics` without a key.
    pub metrics_listen: Option<SocketAddr>,
    /// True if tokens are estimated when endpoints report none.
    pub estimate_tokens: bool,
}

/// Behaviour of endpoints with limits while the ledger cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LedgerOnError {
    /// They take no requests.
    #[default]
    Deny,
    /// They go on without permits.
    Allow,
}

/// Moment at which a commit of the ledger reaches the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LedgerSync {
    /// Within about a second.
    #[default]
    Normal,
    /// Before the request is sent.
    Full,
}

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// Time, level, message.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Requests that wait for a permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// Longest wait of a request.
    pub wait_max: Duration,
    /// Largest number of waiting requests.
    pub requests_max: usize,
    /// Largest number of them with one key, where there are several.
    pub requests_per_key_max: usize,
}

/// Files that could be read when the configuration was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerTls {
    /// The certificate chain, PEM.
    pub cert_file: PathBuf,
    /// Its private key, PEM.
    pub key_file: PathBuf,
}

/// The origins whose pages may call from a browser. Empty: none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cors {
    /// Origins in lower case; `*` for any.
    pub origins: Vec<String>,
}

impl Cors {
    /// True if any origin may call.
    pub fn any(&self) -> bool {
        self.origins.iter().any(|origin| origin == "*")
    }

    /// True if a page of this origin may call. Browsers send origins in lower case.
    pub fn allows(&self, origin: &str) -> bool {
        self.any() || self.origins.iter().any(|allowed| allowed == origin)
    }
}

/// Load balancing among several usable endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// At random, by weight.
    #[default]
    Random,
    /// Round robin, by weight.
    RoundRobin,
    /// The one with the fewest requests in flight.
    LeastBusy,
    /// The one that has answered fastest of late.
    Fastest,
    /// The one with the largest share of its limits left.
    MostLeft,
    /// The first of the config file that can take it.
    FillFirst,
}

/// Retries of a failed request on another endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retry {
    /// Attempts at most, from 1 to 100; the first one counts.
    pub attempts: u32,
    /// Statuses that another endpoint is tried after.
    pub statuses: StatusSet,
    /// Fewest tokens a second of a stream before it is let through, if any.
    pub tokens_per_second_min: Option<u32>,
    /// True if an endpoint's complaint about its own key is shown to the client.
    pub show_endpoint_key_errors: bool,
    /// No new attempt begins later than this after the request came.
    pub budget: Duration,
}

/// Circuit breaker: when an endpoint that keeps failing cools down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Breaker {
    /// After so many failures in a row, at least 1.
    pub failures: u32,
    /// Length of the cool-down.
    pub cool_down: Duration,
}

/// Bounds were checked with the shape, so here only what a schema cannot say.
pub(super) fn check(typed: Option<ServerFile>, check: &mut Check<'_>) -> Option<Server> {
    let typed = typed.unwrap_or_default();
    let keys_file = keys_file(typed.keys_file.as_deref(), check);
    let has_keys_file = keys_file.is_named || keys_file.path.exists();
    let api_key = match typed.api_key {
        // Callers have keys of their own.
        None if typed.keys.as_ref().is_some_and(|keys| !keys.is_empty()) || has_keys_file => Some(None),
        key => check
            .key(
                key,
                "server.apiKey",
                "it is the key your clients send; make one up, such as with `openssl rand -hex 24`",
            )
            .map(Some),
    };
    warn_of_a_weak_key(api_key.as_ref().and_then(Option::as_ref), "server.apiKey", check);
    let admin_key = admin_key(typed.admin_key, api_key.as_ref().and_then(Option::as_ref), check);
    let admin_listen = listen(typed.admin_listen.as_deref(), "server.adminListen", "127.0.0.1:3002", check);
    let host = host(typed.host.as_deref(), check);
    let port = port(typed.port, check);
    let tls = typed.tls.map(|tls| server_tls(&tls, check));
    let cors = cors(typed.cors, check);
    let trusted_proxies = trusted_proxies(typed.trusted_proxies, check);
    let forward_headers = forward_headers(typed.forward_headers, check);
    let (ledger, shared_ledger) = ledger(typed.ledger.as_deref(), typed.redis, check).unzip();
    let timezone = timezone(typed.timezone.as_deref(), "server.timezone", check);
    let zone = timezone.clone().flatten().unwrap_or_else(TimeZone::system);
    let shared = api_key.as_ref().and_then(Option::as_ref);
    let around = Around { timezone: &zone, shared, admin: admin_key.as_ref() };
    let keys = client_keys(typed.keys.unwrap_or_default(), "server.keys", &around, check);
    let webhook = webhook(typed.webhook, check);
    let fallbacks = fallbacks(typed.fallbacks.unwrap_or_default(), check);
    let prices = prices(typed.prices, "server.prices", check);
    let metrics_listen = listen(typed.metrics_listen.as_deref(), "server.metricsListen", "127.0.0.1:9464", check);
    let queue = typed.queue.and_then(|queue| queue_of(&queue, check));
    let body_bytes_max = typed.body_bytes_max.unwrap_or(file::BODY_BYTES_DEFAULT);
    let memory_bytes_max = memory_bytes_max(typed.memory_bytes_max, body_bytes_max, check);
    Some(Server {
        host: host?,
        port: port?,
        admin_key,
        admin_listen: admin_listen?,
        keys,
        keys_file,
        cost_header: typed.cost_header.unwrap_or(file::COST_HEADER_DEFAULT),
        webhook: webhook?,
        fallbacks,
        prices,
        budget_reserve_tokens: typed.budget_reserve_tokens.unwrap_or(file::RESERVE_TOKENS_DEFAULT),
        share_ids: typed.share_ids.unwrap_or(file::SHARE_IDS_DEFAULT),
        api_key: api_key?,
        tls: match tls {
            Some(tls) => Some(tls?),
            None => None,
        },
        cors,
        body_bytes_max: usize::try_from(body_bytes_max).ok()?,
        memory_bytes_max: usize::try_from(memory_bytes_max?).unwrap_or(usize::MAX),
        strategy: typed.strategy.unwrap_or_default(),
        retry: retry(typed.retry.unwrap_or_default()),
        breaker: breaker(&typed.breaker.unwrap_or_default()),
        threads: typed.threads.map_or_else(cores, usize::from),
        connections: connections(&typed.connections.unwrap_or_default()),
        trusted_proxies,
        failed_keys_per_minute: typed.failed_keys_per_minute.unwrap_or(file::FAILED_KEYS_PER_MINUTE_DEFAULT),
        endpoint_headers: typed.endpoint_headers.unwrap_or(file::ENDPOINT_HEADERS_DEFAULT),
        stream_ping: Some(typed.stream_ping_seconds.unwrap_or(file::STREAM_PING_SECONDS_DEFAULT))
            .filter(|seconds| *seconds > 0)
            .map(|seconds| Duration::from_secs(seconds.into())),
        forward_headers,
        request_log: request_log(typed.request_log.unwrap_or_default(), ledger.as_deref()?, check),
        ledger: ledger?,
        ledger_wait: ledger_wait(typed.ledger_wait_ms, shared_ledger.as_ref()?.is_some()),
        shared_ledger: shared_ledger?,
        ledger_on_error: typed.ledger_on_error.unwrap_or_default(),
        ledger_sync: typed.ledger_sync.unwrap_or_default(),
        timezone: timezone?.unwrap_or_else(TimeZone::system),
        queue,
        affinity: affinity(&typed.affinity.unwrap_or_default()),
        log_format: typed.log_format.unwrap_or_default(),
        metrics_listen: metrics_listen?,
        estimate_tokens: typed.estimate_tokens.unwrap_or(file::ESTIMATE_TOKENS_DEFAULT),
    })
}

/// The key of those who run the gateway, which nobody else may have.
fn admin_key(typed: Option<Secret>, shared: Option<&Secret>, check: &mut Check<'_>) -> Option<Secret> {
    const PATH: &str = "server.adminKey";
    const HINT: &str = "make one up that nobody else has, such as with `openssl rand -hex 24`";
    let key = check.key(Some(typed?), PATH, HINT)?;
    warn_of_a_weak_key(Some(&key), PATH, check);
    if shared == Some(&key) {
        check.report.error(PATH, "is server.apiKey, which every client has", HINT);
    }
    Some(key)
}

/// The memory must have room for the longest body.
fn memory_bytes_max(typed: Option<u64>, body_bytes_max: u32, check: &mut Check<'_>) -> Option<u64> {
    let least = u64::from(body_bytes_max);
    match typed {
        None => Some((memory_bytes() / 2).min(file::MEMORY_BYTES_DEFAULT_MAX).max(least)),
        Some(bytes) if bytes >= least => Some(bytes),
        Some(bytes) => {
            check.report.error(
                "server.memoryBytesMax",
                format!("{bytes} bytes are less than one body may have ({least}, server.bodyBytesMax)"),
                "raise it, or lower server.bodyBytesMax",
            );
            None
        }
    }
}

fn host(typed: Option<&str>, check: &mut Check<'_>) -> Option<IpAddr> {
    let variable = check.environment.value(environment::HOST);
    let source = variable.and_then(|_| named(environment::HOST, check.environment));
    let typed = variable.or(typed).unwrap_or(file::HOST_DEFAULT).trim();
    if typed.eq_ignore_ascii_case("localhost") {
        return Some(Ipv4Addr::LOCALHOST.into());
    }
    let bare = typed.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(typed);
    let host = bare.parse().ok();
    if host.is_none() {
        check.report.error(
            "server.host",
            match source {
                Some(source) => format!("{source} is {typed:?}, not an IP address"),
                None => format!("{typed:?} is not an IP address"),
            },
            "use 0.0.0.0 for every address of this machine, 127.0.0.1 for this machine only",
        );
    }
    host
}

fn port(typed: Option<u16>, check: &mut Check<'_>) -> Option<u16> {
    let variable = environment::PORTS.iter().find_map(|name| Some((*name, check.environment.value(name)?)));
    let Some((name, text)) = variable else {
        return Some(typed.unwrap_or(file::PORT_DEFAULT));
    };
    let port = text.trim().parse().ok();
    if port.is_none() {
        let source = named(name, check.environment).unwrap_or_default();
        check.report.error(
            "server.port",
            format!("{source} is {text:?}, not a port from 0 to 65535"),
            &format!("{name} wins over server.port; correct it or unset it"),
        );
    }
    port
}

/// A variable with its source, or the flag that stands for it.
fn named(variable: &str, environment: &Environment) -> Option<String> {
    let source = environment.source(variable)?;
    Some(if source.starts_with("--") { source.to_owned() } else { format!("{variable} from {source}") })
}

fn server_tls(typed: &ServerTlsFile, check: &mut Check<'_>) -> Option<ServerTls> {
    let cert_file = check.required_file(typed.cert_file.as_deref(), "server.tls.certFile");
    let key_file = check.required_file(typed.key_file.as_deref(), "server.tls.keyFile");
    Some(ServerTls { cert_file: cert_file?, key_file: key_file? })
}

fn cors(typed: Option<CorsFile>, check: &mut Check<'_>) -> Cors {
    let typed = typed.and_then(|cors| cors.origins);
    let typed = typed.unwrap_or_else(|| vec![file::CORS_ORIGIN_DEFAULT.to_owned()]);
    for (index, origin) in typed.iter().enumerate() {
        if !is_origin(origin) {
            check.report.error(
                &format!("server.cors.origins[{index}]"),
                format!("{origin:?} is not an origin"),
                "write scheme, host and port only, such as https://chat.example.com, or * for any",
            );
        }
    }
    Cors { origins: typed.iter().map(|origin| origin.to_ascii_lowercase()).collect() }
}

/// `null` is what browsers send for a page from a local file.
fn is_origin(text: &str) -> bool {
    match text.split_once("://") {
        Some((scheme, host)) => {
            scheme.starts_with(|c: char| c.is_ascii_alphabetic())
                && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
                && !host.is_empty()
                && host.chars().all(|c| c.is_ascii_alphanumeric() || "-._:[]".contains(c))
        }
        None => matches!(text, "*" | "null"),
    }
}

fn retry(typed: RetryFile) -> Retry {
    Retry {
        attempts: typed.attempts.unwrap_or(file::ATTEMPTS_DEFAULT),
        statuses: typed.statuses.unwrap_or_else(StatusFile::defaults).into_iter().collect(),
        tokens_per_second_min: typed.min_tokens_per_second.filter(|least| *least > 0),
        show_endpoint_key_errors: typed.show_endpoint_key_errors.unwrap_or_default(),
        budget: Duration::from_millis(typed.budget_ms.unwrap_or(file::BUDGET_MS_DEFAULT).into()),
    }
}

fn breaker(typed: &BreakerFile) -> Breaker {
    let cool_down_seconds = typed.cool_down_seconds.unwrap_or(file::COOL_DOWN_SECONDS_DEFAULT);
    Breaker {
        failures: typed.failures.unwrap_or(file::FAILURES_DEFAULT),
        cool_down: Duration::from_secs(cool_down_seconds.into()),
    }
}

/// Resolves the path. It turns out when the file is opened if it can be written.
fn ledger(
    typed: Option<&str>,
    redis: Option<RedisFile>,
    check: &mut Check<'_>,
) -> Option<(PathBuf, Option<SharedLedger>)> {
    if let Some(typed) = typed.filter(|typed| is_redis(typed)) {
        let shared = shared_ledger(typed, redis.unwrap_or_default(), check)?;
        let beside = check.base_dir.join(file::LEDGER_DEFAULT);
        let folders = check.environment.value("STATE_DIRECTORY").filter(|folders| !folders.is_empty());
        let state = folders.and_then(|folders| folders.split(':').next());
        let path = state.map_or(beside, |state| Path::new(state).join(file::LEDGER_IN_STATE_DIRECTORY));
        return Some((std::path::absolute(&path).unwrap_or(path), Some(shared)));
    }
    if redis.is_some() {
        let hint = "name the server in server.ledger, as in redis://localhost:6379";
        check.report.error("server.redis", "is for a ledger on a server, and the ledger is a file", hint);
        return None;
    }
    let path = match typed {
        None => default_ledger(check),
        Some(typed) if typed.trim().is_empty() || typed.ends_with('/') => {
            let hint = "name a file such as data/ledger.db, or leave the key off for the default";
            check.report.error("server.ledger", format!("{typed:?} is not the name of a file"), hint);
            return None;
        }
        Some(typed) => check.base_dir.join(typed),
    };
    // In the background the working directory is another, and in an upgrade from another folder as well.
    Some((std::path::absolute(&path).unwrap_or(path), None))
}

/// A server that does not answer is given up earlier than a disk: another one may have taken its place.
fn ledger_wait(typed: Option<u32>, is_shared: bool) -> Duration {
    let default = if is_shared { file::REDIS_WAIT_MS_DEFAULT } else { file::LEDGER_WAIT_MS_DEFAULT };
    Duration::from_millis(typed.unwrap_or(default).into())
}

/// The file of keys that is named, or the one beside the config, or in the folder for its state that systemd gives a service.
fn keys_file(typed: Option<&str>, check: &Check<'_>) -> KeysFile {
    let folders = check.environment.value("STATE_DIRECTORY").filter(|folders| !folders.is_empty());
    let state = folders.and_then(|folders| folders.split(':').next()).map(Path::new);
    let path = match typed.filter(|typed| !typed.trim().is_empty()) {
        Some(typed) => check.base_dir.join(typed),
        None => state.unwrap_or(check.base_dir).join(file::KEYS_FILE_DEFAULT),
    };
    KeysFile { path: std::path::absolute(&path).unwrap_or(path), is_named: typed.is_some() }
}

/// Beside the config, or in the folder for its state that systemd gives a service, whose config nobody may write beside. One
/// that is in use already stays so.
fn default_ledger(check: &mut Check<'_>) -> PathBuf {
    let beside = check.base_dir.join(file::LEDGER_DEFAULT);
    let folders = check.environment.value("STATE_DIRECTORY").filter(|folders| !folders.is_empty());
    let Some(state) = folders.and_then(|folders| folders.split(':').next()) else { return beside };
    let of_service = Path::new(state).join(file::LEDGER_IN_STATE_DIRECTORY);
    // Not opened to find out: closing it would release the locks of this process's own ledger.
    if rustix::fs::access(&beside, rustix::fs::Access::WRITE_OK).is_err() {
        return of_service;
    }
    check.report.warning(
        "server.ledger",
        format!("is not set, and {} goes on being used", beside.display()),
        &format!("name it to say so, or move it to {} while the service is stopped", of_service.display()),
    );
    beside
}

/// Checks the models that take others' places. Which of them are served is known only with the endpoints.
fn fallbacks(typed: BTreeMap<String, Vec<String>>, check: &mut Check<'_>) -> BTreeMap<String, Vec<String>> {
    const PATH: &str = "server.fallbacks";
    if typed.len() > FALLBACKS_MAX {
        let message = format!("has {} entries", typed.len());
        check.report.error(PATH, message, &format!("use {FALLBACKS_MAX} at most"));
    }
    for (model, others) in &typed {
        let path = join(PATH, model);
        if model.contains('*') || others.iter().any(|other| other.contains('*')) {
            check.report.error(&path, "has a `*`", "name each model, as clients ask for it");
        }
        if others.contains(model) {
            check.report.error(&path, "names the model itself", "name those that are to take its place");
        }
        if others.is_empty() || others.len() > FALLBACKS_OF_ONE_MAX {
            let hint = format!("name 1 to {FALLBACKS_OF_ONE_MAX} models");
            check.report.error(&path, format!("names {} models", others.len()), &hint);
        }
    }
    typed
}

/// The time zone of an IANA name; an inner none if none is named.
#[expect(clippy::option_option, reason = "the outer one is an error that was reported")]
pub(super) fn timezone(typed: Option<&str>, path: &str, check: &mut Check<'_>) -> Option<Option<TimeZone>> {
    let Some(name) = typed else { return Some(None) };
    let zone = TimeZone::get(name.trim()).ok();
    if zone.is_none() {
        let hint = "use an IANA name such as Europe/Berlin, America/Los_Angeles or UTC";
        check.report.error(path, format!("{name:?} is not a time zone"), hint);
    }
    zone.map(Some)
}

/// The outer `None` is an error that was reported.
#[expect(clippy::option_option, reason = "absent, and wrong, are two things")]
fn listen(typed: Option<&str>, path: &str, example: &str, check: &mut Check<'_>) -> Option<Option<SocketAddr>> {
    let Some(typed) = typed else { return Some(None) };
    let address = typed.trim().parse();
    if address.is_err() {
        let message = format!("is no address and port: {typed:?}");
        check.report.error(path, &message, &format!("such as {example}"));
    }
    address.ok().map(Some)
}

fn queue_of(typed: &QueueFile, check: &mut Check<'_>) -> Option<Queue> {
    let Some(wait_max_ms) = typed.max_wait_ms else {
        let hint = "say how long a request may wait, in milliseconds; without `queue` none does";
        check.report.error("server.queue.maxWaitMs", "is missing", hint);
        return None;
    };
    let requests_max = typed.max_requests.unwrap_or(file::QUEUE_REQUESTS_DEFAULT);
    let requests_per_key_max = typed.max_requests_per_key.unwrap_or(requests_max.div_ceil(file::QUEUE_SHARE));
    Some(Queue {
        wait_max: Duration::from_millis(wait_max_ms.into()),
        requests_max: usize::try_from(requests_max).ok()?,
        requests_per_key_max: usize::try_from(requests_per_key_max).ok()?,
    })
}

fn cores() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    cores.min(file::THREADS_MAX.into())
}

fn trusted_proxies(typed: Option<Vec<String>>, check: &mut Check<'_>) -> Vec<Cidr> {
    let mut ranges = Vec::new();
    for (index, text) in typed.unwrap_or_default().iter().enumerate() {
        match text.trim().parse() {
            Ok(range) => ranges.push(range),
            Err(_) => check.report.error(
                &format!("server.trustedProxies[{index}]"),
                format!("{text:?} is not a range of IP addresses"),
                "write an address such as ::1, or a range such as 10.0.0.0/8",
            ),
        }
    }
    ranges
}

fn forward_headers(typed: Option<Vec<String>>, check: &mut Check<'_>) -> Vec<HeaderPattern> {
    let mut patterns = Vec::new();
    for (index, text) in typed.unwrap_or_default().iter().enumerate() {
        match text.parse() {
            Ok(pattern) => patterns.push(pattern),
            Err(_) => check.report.error(
                &format!("server.forwardHeaders[{index}]"),
                format!("{text:?} is not the name of a header"),
                "write a name such as x-team, or the beginning of names such as x-team-*",
            ),
        }
    }
    patterns
}
