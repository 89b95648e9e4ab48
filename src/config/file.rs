//! The configuration as typed: every key, its meaning, its bounds and its default, in one place. The
//! doc comments become the descriptions in the JSON Schema and in the reference table, and the bounds
//! there are the ones that are checked, so there is no second list to keep in step.
//!
//! The meaning of the values together is [`checked`](super::checked)'s business.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use super::budgets::{BudgetPeriod, OnOverrun};
use super::calls::{CallKind, WebSocketCall};
use super::endpoint::{StreamUsage, VersionPath, WebSocketPermits};
use super::errors::Trouble;
use super::server::{LedgerOnError, LedgerSync, LogFormat, Strategy};
use super::webhook::{AlertEvent, WebhookFormat};
use crate::config::secret::Secret;

pub(super) const HOST_DEFAULT: &str = "0.0.0.0";
pub(super) const PORT_DEFAULT: u16 = 3001;
pub(super) const BODY_BYTES_DEFAULT: u32 = 64 * 1024 * 1024;
pub(super) const BODY_BYTES_MIN: u32 = 1024;
pub(super) const BODY_BYTES_MAX: u32 = 1024 * 1024 * 1024;
pub(super) const FAILED_KEYS_PER_MINUTE_DEFAULT: u32 = 30;
pub(super) const ENDPOINT_HEADERS_DEFAULT: bool = true;
pub(super) const STREAM_PING_SECONDS_DEFAULT: u32 = 30;
pub(super) const STREAM_PING_SECONDS_MAX: u32 = 3600;
pub(super) const TOKENS_PER_SECOND_MAX: u32 = 10_000;
pub(super) const CORS_ORIGIN_DEFAULT: &str = "*";

pub(super) const LEDGER_DEFAULT: &str = "data/ledger.db";
/// Defaults of `server.ledgerWaitMs`, for a file and for a server.
pub(super) const LEDGER_WAIT_MS_DEFAULT: u32 = 3000;
pub(super) const REDIS_WAIT_MS_DEFAULT: u32 = 1000;
/// Default of `server.redis.prefix`.
pub(super) const REDIS_PREFIX_DEFAULT: &str = "api-together";
pub(super) const KEYS_FILE_DEFAULT: &str = "keys.json";
pub(super) const LEDGER_IN_STATE_DIRECTORY: &str = "ledger.db";
pub(super) const CONNECTIONS_LEAST: u32 = 16;
pub(super) const CONNECTIONS_MOST: u32 = 1_000_000;
pub(super) const STRANGERS_PER_ADDRESS_DEFAULT: u32 = 64;
pub(super) const HEADER_BYTES_DEFAULT: u32 = 64 * 1024;
pub(super) const HEADER_BYTES_LEAST: u32 = 8 * 1024;
/// Longer headers are not read by Pingora.
pub(super) const HEADER_BYTES_MOST: u32 = 1_000_000;
pub(super) const HEADER_SECONDS_DEFAULT: u32 = 30;
pub(super) const FIRST_BYTE_SECONDS_DEFAULT: u32 = 10;
pub(super) const KEEP_ALIVE_SECONDS_DEFAULT: u32 = 75;
pub(super) const CONNECTION_SECONDS_MOST: u32 = 86_400;
pub(super) const QUEUE_REQUESTS_DEFAULT: u32 = 1000;
/// One key's share of it, unless the config says otherwise: one part of so many.
pub(super) const QUEUE_SHARE: u32 = 4;
/// Each holds a connection and its whole request.
pub(super) const QUEUE_REQUESTS_MAX: u32 = 100_000;

pub(super) const ATTEMPTS_DEFAULT: u32 = 10;
pub(super) const ATTEMPTS_MAX: u32 = 100;
pub(super) const BUDGET_MS_DEFAULT: u32 = 120_000;
pub(super) const FAILURES_DEFAULT: u32 = 3;
pub(super) const COOL_DOWN_SECONDS_DEFAULT: u32 = 600;
pub(super) const COOL_DOWN_SECONDS_MAX: u32 = 7 * 86_400;
pub(super) const THREADS_MAX: u16 = 1024;
pub(super) const MEMORY_BYTES_MIN: u64 = 1024 * 1024;
pub(super) const MEMORY_BYTES_MAX: u64 = 1 << 40;
pub(super) const MEMORY_BYTES_DEFAULT_MAX: u64 = 1024 * 1024 * 1024;

/// The largest integer that a JavaScript number, and so the old program, holds exactly.
pub(super) const LIMIT_MAX: i64 = 9_007_199_254_740_991;
pub(super) const LIMIT_DEFAULT: i64 = -1;
pub(super) const EACH_DEFAULT: bool = false;
pub(super) const ENABLED_DEFAULT: bool = true;
pub(super) const LEARN_LIMITS_DEFAULT: bool = false;
/// US dollars for a million tokens.
pub(super) const PRICE_MAX: u32 = 1_000_000;
pub(super) const RESERVE_TOKENS_DEFAULT: u32 = 4096;
pub(super) const LOG_BODIES_DEFAULT: bool = false;
pub(super) const SHARE_IDS_DEFAULT: bool = false;
pub(super) const COST_HEADER_DEFAULT: bool = false;
pub(super) const ESTIMATE_TOKENS_DEFAULT: bool = true;
pub(super) const SESSIONS_DEFAULT: bool = true;
pub(super) const PREFIX_DEFAULT: bool = false;
pub(super) const DROP_SEALED_DEFAULT: bool = false;
pub(super) const ID_DAYS_DEFAULT: u32 = 30;
pub(super) const ID_DAYS_MAX: u32 = 3660;
pub(super) const SWITCHES_FILE: &str = "switches.json";
pub(super) const REQUEST_LOG_DEFAULT: &str = "requests.db";
pub(super) const REQUEST_LOG_DAYS_DEFAULT: u32 = 30;
pub(super) const REQUEST_LOG_DAYS_MAX: u32 = 3660;
pub(super) const REQUEST_LOG_BYTES_DEFAULT: u64 = 2 * 1024 * 1024 * 1024;
pub(super) const REQUEST_LOG_BYTES_MIN: u64 = 16 * 1024 * 1024;
pub(super) const REQUEST_LOG_BYTES_MAX: u64 = 1024 * 1024 * 1024 * 1024;
pub(super) const DISCOVER_DEFAULT: bool = false;
pub(super) const DISCOVERY_MINUTES_DEFAULT: u32 = 360;
pub(super) const DISCOVERY_MINUTES_MAX: u32 = 44_640;
pub(super) const WEIGHT_DEFAULT: u16 = 1;
/// Greatest weight of a caller's key.
pub(super) const KEY_WEIGHT_MAX: u16 = 100;
pub(super) const PRIORITY_DEFAULT: u32 = 0;
pub(super) const PRIORITY_MAX: u32 = 65_535;

pub(super) const CONNECT_MS_DEFAULT: u32 = 5_000;
pub(super) const FIRST_BYTE_STREAM_MS_DEFAULT: u32 = 60_000;
pub(super) const FIRST_BYTE_MS_DEFAULT: u32 = 600_000;
pub(super) const THINKING_MS_DEFAULT: u32 = 600_000;
pub(super) const IDLE_MS_DEFAULT: u32 = 120_000;
/// A day: no timeout is meant to be longer.
pub(super) const TIMEOUT_MS_MAX: u32 = 86_400_000;
/// Upper end of plain counts that need one.
pub(super) const COUNT_MAX: u32 = 1_000_000;

/// A self-hosted, OpenAI-compatible LLM gateway. JSON, or YAML if the file's name ends in `.yaml` or `.yml`. In any
/// text value `${NAME}` is replaced by an environment variable, taken from the process or from a `.env` file; `$${`
/// stands for a plain `${`.
#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(title = "api-together configuration")]
pub(super) struct ConfigFile {
    /// Location of this schema, for editors. The program does not read it.
    #[serde(rename = "$schema")]
    #[expect(dead_code, reason = "for editors, not for us")]
    pub schema: Option<String>,
    /// The client's side: address, key, and everything that applies to all endpoints.
    #[schemars(required)]
    pub server: Option<ServerFile>,
    /// Upstream endpoints; at least one.
    #[schemars(required, extend("minItems" = 1))]
    pub apis: Option<Vec<EndpointFile>>,
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ServerFile {
    /// The IP address to listen on: `0.0.0.0` for every IPv4 address, `::` for IPv6 too, `localhost` or
    /// `127.0.0.1` for this machine only.
    #[schemars(extend("default" = HOST_DEFAULT))]
    pub host: Option<String>,
    /// The port to listen on. The environment variable `PORT` wins over it; 0 takes any free port.
    #[schemars(extend("default" = PORT_DEFAULT))]
    pub port: Option<u16>,
    /// The key that clients must send as `Authorization: Bearer <key>`, or bare. It opens every call. It may be left out where there
    /// are `keys`.
    pub api_key: Option<Secret>,
    /// The key of those who run the gateway: it opens the page at `/dashboard` and the admin API under `/v1/admin/`, and nothing else
    /// does. Without it both are off.
    pub admin_key: Option<Secret>,
    /// Address and port of their own for the page and the admin API, such as `127.0.0.1:3002`. Default: the main port.
    pub admin_listen: Option<String>,
    /// Keys of single callers, each with what it opens.
    pub keys: Option<Vec<ClientKeyFile>>,
    /// A file of more such keys, which `api-together keys` changes while the process serves: digests only, for its owner alone. Default:
    /// `keys.json` beside this file, or in the folder that systemd gives a service for its state, if it is there.
    pub keys_file: Option<String>,
    /// Tokens of an answer that are reserved of a key's limits before a request is sent, if the request bounds its answer higher or not at all.
    #[schemars(range(min = 1, max = COUNT_MAX), extend("default" = RESERVE_TOKENS_DEFAULT))]
    pub budget_reserve_tokens: Option<u32>,
    /// Whether answers have the header `x-api-together-cost-usd`, where what they cost is known before they are sent: JSON answers up to
    /// 64 KiB that report their tokens.
    #[schemars(extend("default" = COST_HEADER_DEFAULT))]
    pub cost_header: Option<bool>,
    /// Where alerts are sent: refused keys, budgets at their end, a failing ledger, refused configs.
    pub webhook: Option<WebhookFile>,
    /// Models that others take the place of, the first one first, when no endpoint can take a request for them. Off where none are named.
    #[schemars(extend("maxProperties" = super::server::FALLBACKS_MAX))]
    pub fallbacks: Option<BTreeMap<String, Vec<String>>>,
    /// Prices of models, for endpoints that have none of their own: by the name that an endpoint is sent, or a prefix such as `gpt-4o*`;
    /// the closest one counts. They win over the price table that comes with this program.
    #[schemars(extend("maxProperties" = super::prices::PRICES_MAX))]
    pub prices: Option<BTreeMap<String, PriceFile>>,
    /// Whether what one key made (files, stored responses, conversations and others) may be used with every other one.
    #[schemars(extend("default" = SHARE_IDS_DEFAULT))]
    pub share_ids: Option<bool>,
    /// Serve HTTPS with this certificate. Absent: plain HTTP.
    pub tls: Option<ServerTlsFile>,
    /// Web pages that may call from a browser.
    pub cors: Option<CorsFile>,
    /// Longest request body in bytes; a longer one is answered 413. Default: 64 MiB.
    #[schemars(range(min = BODY_BYTES_MIN, max = BODY_BYTES_MAX), extend("default" = BODY_BYTES_DEFAULT))]
    pub body_bytes_max: Option<u32>,
    /// Memory that request bodies above 64 KiB may take up together, in bytes. Beyond it they wait for up to 10 s and
    /// are then answered 503. Default: half of the memory of the machine or its container, at most 1 GiB.
    #[schemars(range(min = MEMORY_BYTES_MIN, max = MEMORY_BYTES_MAX))]
    pub memory_bytes_max: Option<u64>,
    /// Load balancing among several usable endpoints: at random by weight, round robin, the one with the fewest requests in flight, the
    /// one with the lowest time to first byte, the one with the largest share of its limits left, or the first of this file that can take
    /// the request.
    #[schemars(extend("default" = Strategy::Random))]
    pub strategy: Option<Strategy>,
    /// Retries of a failed request on another endpoint.
    pub retry: Option<RetryFile>,
    /// Circuit breaker: an endpoint that keeps failing gets no requests for a while.
    pub breaker: Option<BreakerFile>,
    /// Worker threads. Default: one for each processor core.
    #[schemars(range(min = 1, max = THREADS_MAX))]
    pub threads: Option<u16>,
    /// Bounds of clients' connections, those above all that have not yet shown a right key.
    pub connections: Option<ConnectionsFile>,
    /// Addresses of reverse proxies in front, such as `10.0.0.0/8` or `::1`. Only their `X-Forwarded-For` is trusted.
    /// Default: none.
    pub trusted_proxies: Option<Vec<String>>,
    /// Different wrong keys that one address (of IPv6: one /64 network) may send in a minute. Behind it every key, the right one too,
    /// is answered 429 after a second, unless the address has sent the right one within the hour. 0: no limit.
    #[schemars(range(min = 0, max = COUNT_MAX), extend("default" = FAILED_KEYS_PER_MINUTE_DEFAULT))]
    pub failed_keys_per_minute: Option<u32>,
    /// Longest silence of a stream in seconds before its client is sent a comment (`: ping`), so that load balancers and content
    /// networks on the way do not cut it. Failover goes on behind it. 0: none.
    #[schemars(range(min = 0, max = STREAM_PING_SECONDS_MAX), extend("default" = STREAM_PING_SECONDS_DEFAULT))]
    pub stream_ping_seconds: Option<u32>,
    /// Headers `x-api-together-*` in responses, which name the endpoint, the number of attempts, and how a session was followed.
    #[schemars(extend("default" = ENDPOINT_HEADERS_DEFAULT))]
    pub endpoint_headers: Option<bool>,
    /// Headers of requests that are forwarded to endpoints besides those that every API call needs: exact names, or the
    /// beginning of names such as `x-team-*`. Credentials for this gateway are never forwarded. Default: none.
    pub forward_headers: Option<Vec<String>>,
    /// The file that holds every count: permits and tokens. It is created with its folder if it does not exist. A
    /// relative path starts from this file's folder. All processes that name one file share its limits. Default:
    /// `data/ledger.db` beside this file; of a systemd service that has none there yet, `ledger.db` in its folder for state
    /// (`$STATE_DIRECTORY`). Or a Redis or Valkey server that several machines share: `redis://user:password@host:6379/0`,
    /// `redis+sentinel://host1,host2/mymaster`, `redis+cluster://host1,host2`; `rediss` in place of `redis` for TLS.
    pub ledger: Option<String>,
    /// Settings of a ledger on a server.
    pub redis: Option<RedisFile>,
    /// Longest wait for the ledger, in milliseconds: a request that needs a permit and gets no answer by then does what
    /// `ledgerOnError` says. Default: 3000 for a file, 1000 for a server.
    #[schemars(range(min = 10, max = 60_000))]
    pub ledger_wait_ms: Option<u32>,
    /// Behaviour of endpoints with limits while the ledger cannot be written: take no requests, or work without
    /// permits, which are counted once it can be written again.
    #[schemars(extend("default" = LedgerOnError::Deny))]
    pub ledger_on_error: Option<LedgerOnError>,
    /// Durability of the counts of a file across a loss of power: the last second may be lost, or nothing, at the price of one
    /// disk write for each batch of requests. A crash of the process alone loses nothing either way.
    #[schemars(extend("default" = LedgerSync::Normal))]
    pub ledger_sync: Option<LedgerSync>,
    /// The time zone whose midnight ends a day, such as `Europe/Berlin`. Default: the system's.
    pub timezone: Option<String>,
    /// Queue for requests while every endpoint is at its limit. Absent: they are answered 429 at once.
    pub queue: Option<QueueFile>,
    /// Affinity: which requests go where earlier ones went.
    pub affinity: Option<AffinityFile>,
    /// Log of requests in a file of its own, which `api-together log` reads: a row for every request and every attempt.
    pub request_log: Option<RequestLogFile>,
    /// Format of log lines: text, or one JSON object a line.
    #[schemars(extend("default" = LogFormat::Text))]
    pub log_format: Option<LogFormat>,
    /// Address and port for `GET /metrics` without the key, such as `127.0.0.1:9464`. Default: only on the main port,
    /// with the key.
    pub metrics_listen: Option<String>,
    /// Estimates of tokens, kept apart from reported ones, for endpoints that report none and answers that break off.
    #[schemars(extend("default" = ESTIMATE_TOKENS_DEFAULT))]
    pub estimate_tokens: Option<bool>,
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ConnectionsFile {
    /// Connections in all. Beyond it a new one takes the place of the oldest that has not shown a right key, or is closed. Default:
    /// half of the file descriptors that the process may open, less 32.
    #[schemars(range(min = CONNECTIONS_LEAST, max = CONNECTIONS_MOST))]
    pub max: Option<u32>,
    /// Connections of one address (of IPv6: of one /64 network) that have not yet shown a right key. Of more, the oldest are closed
    /// when they are a second old. Connections of trustedProxies are not counted.
    #[schemars(range(min = 1, max = CONNECTIONS_MOST), extend("default" = STRANGERS_PER_ADDRESS_DEFAULT))]
    pub strangers_per_address: Option<u32>,
    /// Longest header of a request in bytes; a longer one is answered 431.
    #[schemars(range(min = HEADER_BYTES_LEAST, max = HEADER_BYTES_MOST), extend("default" = HEADER_BYTES_DEFAULT))]
    pub header_bytes_max: Option<u32>,
    /// Longest time for a whole header, in seconds.
    #[schemars(range(min = 1, max = CONNECTION_SECONDS_MOST), extend("default" = HEADER_SECONDS_DEFAULT))]
    pub header_seconds: Option<u32>,
    /// Longest time until the first byte of a connection, in seconds.
    #[schemars(range(min = 1, max = CONNECTION_SECONDS_MOST), extend("default" = FIRST_BYTE_SECONDS_DEFAULT))]
    pub first_byte_seconds: Option<u32>,
    /// Longest time between two requests of an HTTP/1 connection, in seconds.
    #[schemars(range(min = 1, max = CONNECTION_SECONDS_MOST), extend("default" = KEEP_ALIVE_SECONDS_DEFAULT))]
    pub keep_alive_seconds: Option<u32>,
    /// Longest time that an HTTP/2 connection stays open without a request, in seconds.
    #[schemars(range(min = 1, max = CONNECTION_SECONDS_MOST), extend("default" = KEEP_ALIVE_SECONDS_DEFAULT))]
    pub h2_idle_seconds: Option<u32>,
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RequestLogFile {
    /// `false`: requests are not logged there.
    #[schemars(extend("default" = ENABLED_DEFAULT))]
    pub enabled: Option<bool>,
    /// The file. It is created with its folder if it does not exist, for its owner alone. A relative path starts from the config's folder.
    /// Default: `requests.db` beside the ledger.
    pub path: Option<String>,
    /// Days for which requests are kept.
    #[schemars(range(min = 1, max = REQUEST_LOG_DAYS_MAX), extend("default" = REQUEST_LOG_DAYS_DEFAULT))]
    pub days: Option<u32>,
    /// Largest size of the file in bytes; of more the oldest requests are deleted. Default: 2 GiB.
    #[schemars(range(min = REQUEST_LOG_BYTES_MIN, max = REQUEST_LOG_BYTES_MAX), extend("default" = REQUEST_LOG_BYTES_DEFAULT))]
    pub bytes_max: Option<u64>,
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct AffinityFile {
    /// `true`: the requests of one session prefer the endpoint that has answered it, whose cache holds their common beginning, for an
    /// hour from the last one on. A session is named by the header `x-session-id`, `session_id`, `x-session-affinity` or
    /// `x-client-request-id`, or in the body by `prompt_cache_key`, `metadata.user_id` or `conversation`.
    #[schemars(extend("default" = SESSIONS_DEFAULT))]
    pub sessions: Option<bool>,
    /// `true`: requests that name no session are one if their system prompt, tools and first user message are the same in their first
    /// 16 KiB.
    #[schemars(extend("default" = PREFIX_DEFAULT))]
    pub prefix: Option<bool>,
    /// Days for which it is remembered at which endpoint a file, a stored response or another object was made, from its last use on.
    #[schemars(range(min = 1, max = ID_DAYS_MAX), extend("default" = ID_DAYS_DEFAULT))]
    pub id_days: Option<u32>,
    /// `true`: where the organisation that sealed a request's reasoning (`encrypted_content`, thinking) cannot answer it, another one is
    /// asked without that reasoning. `false`: the answer says so.
    #[schemars(extend("default" = DROP_SEALED_DEFAULT))]
    pub drop_sealed: Option<bool>,
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(clippy::struct_field_names, reason = "users write them so")]
pub(super) struct QueueFile {
    /// Longest wait of a request, in milliseconds.
    #[schemars(required, range(min = 1, max = TIMEOUT_MS_MAX))]
    pub max_wait_ms: Option<u32>,
    /// Largest number of waiting requests; more are answered 429.
    #[schemars(range(min = 1, max = QUEUE_REQUESTS_MAX), extend("default" = QUEUE_REQUESTS_DEFAULT))]
    pub max_requests: Option<u32>,
    /// Largest number of them with one key, where there are several. Default: a quarter of `maxRequests`.
    #[schemars(range(min = 1, max = QUEUE_REQUESTS_MAX))]
    pub max_requests_per_key: Option<u32>,
}

/// A key of a caller.
#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ClientKeyFile {
    /// Who or what has the key. What it has used and made is kept by this name, and logs and metrics have it.
    #[schemars(required)]
    pub name: Option<String>,
    /// The key.
    pub key: Option<Secret>,
    /// Its SHA-256 in place of the key: `sha256:` and 64 hexadecimal digits, as `printf %s KEY | sha256sum` prints them.
    pub key_hash: Option<String>,
    /// Several of them, each with its end: a key that takes the place of another one opens beside it for a while.
    pub hashes: Option<Vec<KeyHashFile>>,
    /// Models that it may ask for, by names and prefixes such as `gpt-4o*`. Default: all.
    pub models: Option<Vec<String>>,
    /// Calls that it may make. Default: all.
    #[schemars(with = "Option<Vec<CallKind>>")]
    pub calls: Option<Vec<String>>,
    /// Ids of the endpoints that its requests may go to. Default: all.
    pub endpoints: Option<Vec<String>>,
    /// Requests in any 60 seconds. -1: no limit.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub rpm: Option<i64>,
    /// Requests a day, by `server.timezone`. -1: no limit.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub rpd: Option<i64>,
    /// Tokens in any 60 seconds. What a request may take is reserved before it is sent. -1: no limit.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub tpm: Option<i64>,
    /// Tokens a day, likewise. -1: no limit.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub tpd: Option<i64>,
    /// Requests at once, counted by each process for itself unless the ledger is on a server. -1: no limit.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub max_concurrent: Option<i64>,
    /// Limits for some models beside these, by the name that is asked for, or a prefix such as `gpt-4o*`; the closest one counts.
    pub model_limits: Option<BTreeMap<String, CallerModelLimitsFile>>,
    /// What its requests may take in an hour, a day or longer, in US dollars or tokens. Every entry must have room for a request.
    #[schemars(extend("maxItems" = super::budgets::BUDGETS_MAX))]
    pub budget: Option<Vec<BudgetFile>>,
    /// `finish`: a stream that takes more than could be foreseen goes on to its end, even if a budget has no room for that. `cut`: it is
    /// cut off.
    #[schemars(extend("default" = OnOverrun::Finish))]
    pub on_overrun: Option<OnOverrun>,
    /// When it stops to open: a day, to whose end it goes, such as `2027-03-31`, or a moment such as `2027-03-31T18:00:00Z`.
    pub expires: Option<String>,
    /// Addresses that it may be used from, such as `10.0.0.0/8`. Default: all.
    pub allow_from: Option<Vec<String>>,
    /// Turns in the queue that its requests get for each one of a key of weight 1.
    #[schemars(range(min = 1, max = KEY_WEIGHT_MAX), extend("default" = WEIGHT_DEFAULT))]
    pub weight: Option<u16>,
    /// Labels of its requests in the log.
    pub tags: Option<Vec<String>>,
    /// `true`: the request log keeps the bodies of its requests and of their answers, up to 64 KiB of each, with keys in them redacted.
    #[schemars(extend("default" = LOG_BODIES_DEFAULT))]
    pub log_bodies: Option<bool>,
    /// `false`: it opens nothing.
    #[schemars(extend("default" = ENABLED_DEFAULT))]
    pub enabled: Option<bool>,
    /// `true`: it has been revoked, and opens nothing any more.
    pub revoked: Option<bool>,
    /// `true`: beside `revoked`, its requests that were running then are cut off.
    pub cut: Option<bool>,
    /// The last characters of the key, which lists of keys show.
    pub last_four: Option<String>,
    /// When it was made.
    #[expect(dead_code, reason = "for people, not for us")]
    pub created: Option<String>,
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct WebhookFile {
    /// URL that events are sent to, `http` or `https`. It is treated as a secret.
    #[schemars(required)]
    pub url: Option<Secret>,
    /// What events are signed with, as Standard Webhooks are (`webhook-signature`): a random text, or base64 behind `whsec_`. Required
    /// with the format `standard`.
    pub secret: Option<Secret>,
    /// The events that are sent. Default: all.
    pub events: Option<Vec<AlertEvent>>,
    /// `standard`: an object with `type`, `timestamp` and `data`. `slack`: a `text`, as Slack's incoming webhooks take it.
    #[schemars(extend("default" = WebhookFormat::Standard))]
    pub format: Option<WebhookFormat>,
}

/// A budget of a key.
#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct BudgetFile {
    /// US dollars.
    #[schemars(range(min = 0, max = super::budgets::USD_MAX))]
    pub usd: Option<f64>,
    /// Tokens, in place of dollars.
    #[schemars(range(min = 1, max = LIMIT_MAX))]
    pub tokens: Option<i64>,
    /// The time that it is for: a clock hour, a calendar day, a week from Monday on, a calendar month, five hours from the first request
    /// on, or all time.
    #[schemars(required, with = "BudgetPeriod")]
    pub per: Option<String>,
    /// The time zone of hours, days, weeks and months. Default: `server.timezone`.
    pub timezone: Option<String>,
    /// The share of it, such as 0.8, that a warning is logged at. Default: none.
    #[schemars(range(min = 0, max = 1))]
    pub warn_at: Option<f64>,
    /// More of it for a while, as `api-together keys raise` writes it.
    #[schemars(extend("maxItems" = super::budgets::RAISES_MAX))]
    pub raises: Option<Vec<RaiseFile>>,
}

/// More of a budget, for a while.
#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RaiseFile {
    /// How much more, in dollars or tokens as the budget is.
    #[schemars(required, range(min = 0, max = LIMIT_MAX))]
    pub by: Option<f64>,
    /// Until when: a day, to whose end it goes, or a moment.
    #[schemars(required)]
    pub until: Option<String>,
}

/// Limits of a key for some models.
#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct CallerModelLimitsFile {
    /// Requests in any 60 seconds. -1: no limit.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub rpm: Option<i64>,
    /// Requests a day, by `server.timezone`. -1: no limit.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub rpd: Option<i64>,
    /// Tokens in any 60 seconds. What a request may take is reserved before it is sent. -1: no limit.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub tpm: Option<i64>,
    /// Tokens a day, likewise. -1: no limit.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub tpd: Option<i64>,
    /// Requests at once, counted by each process for itself unless the ledger is on a server. -1: no limit.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub max_concurrent: Option<i64>,
}

/// What opens a key, and until when.
#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct KeyHashFile {
    /// `sha256:` and 64 hexadecimal digits.
    #[schemars(required)]
    pub hash: Option<String>,
    /// When it stops to open, as `expires`.
    pub until: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ServerTlsFile {
    /// The certificate chain in PEM form. A relative path starts from this file's folder.
    #[schemars(required)]
    pub cert_file: Option<String>,
    /// The certificate's private key in PEM form. A relative path starts from this file's folder.
    #[schemars(required)]
    pub key_file: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct CorsFile {
    /// Origins such as `https://chat.example.com`. `*` allows any; an empty list allows none.
    #[schemars(extend("default" = [CORS_ORIGIN_DEFAULT]))]
    pub origins: Option<Vec<String>>,
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RetryFile {
    /// Attempts for one request at most, the first one counted, each on another endpoint.
    #[schemars(range(min = 1, max = ATTEMPTS_MAX), extend("default" = ATTEMPTS_DEFAULT))]
    pub attempts: Option<u32>,
    /// Statuses that are retried on another endpoint: numbers from 400 to 599, or `"4xx"` and `"5xx"` for all of them.
    /// Network errors are always retried.
    #[schemars(extend("default" = StatusFile::defaults()))]
    pub statuses: Option<Vec<StatusFile>>,
    /// Fewest tokens a second of a stream, over its first two seconds, before it goes to another endpoint. 0: no limit.
    #[schemars(range(min = 0, max = TOKENS_PER_SECOND_MAX), extend("default" = 0))]
    pub min_tokens_per_second: Option<u32>,
    /// `true`: an endpoint's own complaint about its key reaches the client as it came. Otherwise it becomes a 502, since
    /// clients take a 401 for a complaint about theirs.
    #[schemars(extend("default" = false))]
    pub show_endpoint_key_errors: Option<bool>,
    /// No new attempt begins later than this many milliseconds after the request came.
    #[schemars(range(min = 1, max = TIMEOUT_MS_MAX), extend("default" = BUDGET_MS_DEFAULT))]
    pub budget_ms: Option<u32>,
}

#[derive(Deserialize, JsonSchema, serde::Serialize, Clone, Copy, Debug)]
#[serde(untagged)]
pub enum StatusFile {
    Status(#[schemars(range(min = 400, max = 599))] u16),
    Class(StatusClass),
}

#[derive(Deserialize, JsonSchema, serde::Serialize, Clone, Copy, Debug)]
pub enum StatusClass {
    #[serde(rename = "4xx")]
    Client,
    #[serde(rename = "5xx")]
    Server,
}

impl StatusFile {
    /// Statuses that another endpoint may not answer: keys, quotas, timeouts and failures of the endpoint.
    pub fn defaults() -> Vec<Self> {
        [401, 402, 403, 408, 425, 429].into_iter().map(Self::Status).chain([Self::Class(StatusClass::Server)]).collect()
    }
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct BreakerFile {
    /// Failures in a row after which an endpoint cools down.
    #[schemars(range(min = 1, max = COUNT_MAX), extend("default" = FAILURES_DEFAULT))]
    pub failures: Option<u32>,
    /// Cool-down in seconds, during which the endpoint takes no requests. Then one request tries it.
    #[schemars(range(min = 1, max = COOL_DOWN_SECONDS_MAX), extend("default" = COOL_DOWN_SECONDS_DEFAULT))]
    pub cool_down_seconds: Option<u32>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct EndpointFile {
    /// The endpoint's own name in counts, logs and headers, at most 64 characters. No two are the same.
    #[schemars(required, length(min = 1, max = super::endpoint::ID_CHARS_MAX))]
    pub id: Option<String>,
    /// Display name. Default: the id.
    pub name: Option<String>,
    /// Address of the endpoint. Without a path (`https://api.openai.com`) the client's `/v1/…` is kept; a path
    /// (`https://host/api/v3`) replaces `/v1`.
    #[schemars(required)]
    pub base_url: Option<String>,
    /// What becomes of the client's `/v1` where `baseUrl` has no path: `keep`, or `none` for APIs without a version in their paths
    /// (`https://host/chat/completions`).
    #[schemars(extend("default" = VersionPath::Keep))]
    pub version_path: Option<VersionPath>,
    /// Parameters added to the query of each request to the endpoint, such as `{"api-version": "2024-10-21"}`; they replace the
    /// client's of the same name. Their values are treated as secrets.
    pub query: Option<BTreeMap<String, Secret>>,
    /// The key sent to the endpoint. Either this or `apiKeys`.
    pub api_key: Option<Secret>,
    /// Several keys of the endpoint in place of `apiKey`, each with counts, limits and a health of its own: a text, or an object that says
    /// more. At most 20000.
    pub api_keys: Option<Vec<ApiKeyFile>>,
    /// `true`: what the endpoint says of its limits in the headers of good answers (`x-ratelimit-remaining-requests` and the like) is
    /// believed, so that a key or a model rests once nothing is left, before it is refused.
    #[schemars(extend("default" = LEARN_LIMITS_DEFAULT))]
    pub learn_limits: Option<bool>,
    /// Where the endpoint wants its key: `authorization` (as `Bearer <key>`), the header `api-key`, `x-api-key` or `x-goog-api-key`, or
    /// `query:NAME`, a parameter of the query.
    #[schemars(extend("default" = "authorization"))]
    pub auth_header: Option<String>,
    /// Calls that the endpoint has. Default: all but those that it answers 404 to.
    #[schemars(with = "Option<Vec<CallKind>>")]
    pub calls: Option<Vec<String>>,
    /// Other addresses of the endpoint for some calls, such as `{"messages": {"baseUrl": "https://host/anthropic/v1"}}`: one endpoint with
    /// one set of limits, and a door for each format.
    pub formats: Option<BTreeMap<String, FormatFile>>,
    /// Calls that the endpoint takes over a WebSocket whose model stands in its first message, as Codex opens one: `responses`,
    /// `realtime`. Default: none, and such a WebSocket is answered 426 where no endpoint takes it.
    #[schemars(with = "Option<Vec<WebSocketCall>>")]
    pub web_sockets: Option<Vec<String>>,
    /// What takes a permit of a WebSocket: each `response`, since vendors count so, or the whole `session`.
    #[schemars(extend("default" = WebSocketPermits::Response))]
    pub web_socket_permits: Option<WebSocketPermits>,
    /// Requests in any 60 seconds. -1: no limit. 0: the endpoint takes nothing.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub rpm: Option<i64>,
    /// Requests a day. -1: no limit. 0: the endpoint takes nothing.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub rpd: Option<i64>,
    /// Tokens in any 60 seconds. They are known only when an answer ends, so requests in flight may exceed the limit.
    /// -1: no limit. 0: the endpoint takes nothing.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub tpm: Option<i64>,
    /// Tokens a day; requests in flight may exceed the limit. -1: no limit. 0: the endpoint takes nothing.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub tpd: Option<i64>,
    /// Requests at once, each until the last byte of its answer, counted by each process for itself unless
    /// the ledger is on a server. -1: no limit. 0: the endpoint takes nothing.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub max_concurrent: Option<i64>,
    /// Limits of models, beside the endpoint's own: a request needs room in both. By the name that the endpoint is sent, after
    /// `modelMapping`: an exact name, a prefix such as `gpt-4o*`, or `*`; the closest one counts. At most 256.
    #[schemars(extend("maxProperties" = super::endpoint::MODEL_LIMITS_MAX))]
    pub model_limits: Option<BTreeMap<String, ModelLimitsFile>>,
    /// Prices of its models, in place of those of `server.prices` and of the price table that comes with this program.
    #[schemars(extend("maxProperties" = super::prices::PRICES_MAX))]
    pub prices: Option<BTreeMap<String, PriceFile>>,
    /// The provider whose prices in that table count, such as `openai` or `azure`. Default: the one whose address `baseUrl` is.
    pub price_provider: Option<String>,
    /// The time zone whose midnight ends this endpoint's day, such as `America/Los_Angeles`. Default:
    /// `server.timezone`.
    pub timezone: Option<String>,
    /// The organisation that the endpoint's key belongs to. Endpoints of one organisation have the same files, stored responses and other
    /// objects. Default: each endpoint is one of its own.
    pub organization: Option<String>,
    /// `false` switches the endpoint off.
    #[schemars(extend("default" = ENABLED_DEFAULT))]
    pub enabled: Option<bool>,
    /// Models the endpoint serves: exact names, prefixes such as `gpt-4*`, or `*` for all. Without any, it takes mapped
    /// names and requests without a model only.
    pub models: Option<Vec<String>>,
    /// Model names that clients ask for, each with the name that is sent to the endpoint. These names are served too,
    /// without being in `models`.
    pub model_mapping: Option<BTreeMap<String, String>>,
    /// The endpoint's share of the requests among those of the same priority.
    #[schemars(range(min = 1, max = u16::MAX), extend("default" = WEIGHT_DEFAULT))]
    pub weight: Option<u16>,
    /// Lower numbers go first; a higher one is used only when no endpoint with a lower one can take the request.
    #[schemars(range(min = 0, max = PRIORITY_MAX), extend("default" = PRIORITY_DEFAULT))]
    pub priority: Option<u32>,
    /// Headers added to each request to the endpoint; they replace the client's of the same name.
    pub headers: Option<BTreeMap<String, Secret>>,
    /// Timeouts towards the endpoint.
    pub timeouts: Option<TimeoutsFile>,
    /// `auto`: `stream_options` are added to a stream whose client does not ask for its usage, unless the endpoint
    /// refuses them; the client does not see that usage. `never`: they are not added.
    #[schemars(extend("default" = StreamUsage::Auto))]
    pub stream_usage: Option<StreamUsage>,
    /// Outbound proxy: `http://`, `https://` or `socks5://`, with `user:password@` if it needs a login; `none` connects
    /// directly. Default: the variables `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`.
    pub proxy: Option<Secret>,
    /// `true`: HTTP/2 only. `false`: HTTP/1.1 only. Absent: HTTP/2 if the endpoint offers it.
    pub http2: Option<bool>,
    /// Certificate checks of the endpoint.
    pub tls: Option<EndpointTlsFile>,
    /// `true`: the endpoint is asked for its models at the start, on a reload and now and then. `GET /v1/models` then shows what its
    /// patterns match, and what the endpoint says of its models.
    #[schemars(extend("default" = DISCOVER_DEFAULT))]
    pub discover: Option<bool>,
    /// Time between two such questions, in minutes; each takes a permit.
    #[schemars(range(min = 1, max = DISCOVERY_MINUTES_MAX), extend("default" = DISCOVERY_MINUTES_DEFAULT))]
    pub discovery_minutes: Option<u32>,
    /// Meaning of errors of this endpoint that are not known here, or known wrongly. The first rule that fits counts.
    pub errors: Option<Vec<ErrorRuleFile>>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum ApiKeyFile {
    Key(Secret),
    Lane(Box<LaneFile>),
}

/// A key of an endpoint, or several from a file or a variable that have the same settings.
#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct LaneFile {
    /// The key. Exactly one of `key`, `file` and `env` is needed.
    pub key: Option<Secret>,
    /// A file with one key a line; what follows a `#` is a comment. It is read again when it changes. A relative path starts from this
    /// file's folder.
    pub file: Option<String>,
    /// A variable of the environment or of `.env` with keys, separated by commas or line breaks.
    pub env: Option<String>,
    /// Name of the key in lists, logs and counts; counts stay with the name when the key behind it changes. Default: its last four
    /// characters are shown, and counts stay with the key.
    pub name: Option<String>,
    /// Requests with the key in any 60 seconds. -1: no limit. 0: the key is switched off.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub rpm: Option<i64>,
    /// Requests with the key a day. -1: no limit. 0: the key is switched off.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub rpd: Option<i64>,
    /// Tokens with the key in any 60 seconds; requests in flight may exceed the limit. -1: no limit. 0: the key is switched off.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub tpm: Option<i64>,
    /// Tokens with the key a day; requests in flight may exceed the limit. -1: no limit. 0: the key is switched off.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub tpd: Option<i64>,
    /// Requests with the key at once, counted by each process for itself unless the ledger is on a server. -1: no limit. 0: the key is switched off.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub max_concurrent: Option<i64>,
    /// The key's share of the requests among the keys of its endpoint.
    #[schemars(range(min = 1, max = u16::MAX), extend("default" = WEIGHT_DEFAULT))]
    pub weight: Option<u16>,
    /// Models that the key is for, as the endpoint is sent them: exact names, and beginnings that end in `*`. Default: all.
    pub models: Option<Vec<String>>,
    /// The organisation that the key belongs to; keys of one have the same files and other objects. Default: that of the endpoint, or
    /// else each key is one of its own.
    pub organization: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct FormatFile {
    /// Address for these calls, as `apis[].baseUrl`.
    #[schemars(required)]
    pub base_url: Option<String>,
    /// Where the key is wanted there. Default: as for the other calls.
    pub auth_header: Option<String>,
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ModelLimitsFile {
    /// Requests in any 60 seconds. -1: no limit.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub rpm: Option<i64>,
    /// Requests a day. -1: no limit.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub rpd: Option<i64>,
    /// Tokens in any 60 seconds; requests in flight may exceed the limit. -1: no limit.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub tpm: Option<i64>,
    /// Tokens a day; requests in flight may exceed the limit. -1: no limit.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub tpd: Option<i64>,
    /// Requests at once, counted by each process for itself unless the ledger is on a server. -1: no limit.
    #[schemars(range(min = -1, max = LIMIT_MAX), extend("default" = LIMIT_DEFAULT))]
    pub max_concurrent: Option<i64>,
    /// `true`: each model that a prefix matches has these limits for itself. `false`: all of them share these limits.
    #[schemars(extend("default" = EACH_DEFAULT))]
    pub each: Option<bool>,
}

/// Prices of a model, in US dollars for a million tokens.
#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct PriceFile {
    /// Tokens of the prompt.
    #[schemars(required, range(min = 0, max = PRICE_MAX))]
    pub input: Option<f64>,
    /// Those of them that come from a cache. Default: as `input`.
    #[schemars(range(min = 0, max = PRICE_MAX))]
    pub cached_input: Option<f64>,
    /// Those of them that are written to a cache. Default: as `input`.
    #[schemars(range(min = 0, max = PRICE_MAX))]
    pub cache_write: Option<f64>,
    /// Audio tokens of the prompt. Default: as `input`.
    #[schemars(range(min = 0, max = PRICE_MAX))]
    pub audio_input: Option<f64>,
    /// Tokens of the answer.
    #[schemars(required, range(min = 0, max = PRICE_MAX))]
    pub output: Option<f64>,
    /// Those of them that are reasoning. Default: as `output`.
    #[schemars(range(min = 0, max = PRICE_MAX))]
    pub reasoning: Option<f64>,
    /// Audio tokens of the answer. Default: as `output`.
    #[schemars(range(min = 0, max = PRICE_MAX))]
    pub audio_output: Option<f64>,
    /// Day of which the prices are, such as `2026-11-30`. It is shown beside what was calculated with them.
    pub as_of: Option<String>,
}

/// A rule fits an error that has everything that is set here.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ErrorRuleFile {
    /// Status of the answer, or the numeric code in the body of a 200.
    #[schemars(range(min = 400, max = 599))]
    pub status: Option<u16>,
    /// The error's `code`; in other dialects its `status` or `reason`.
    pub code: Option<String>,
    /// The error's `type`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// The whole message; `*` stands for any text.
    pub message: Option<String>,
    /// Whose trouble it is.
    #[schemars(required)]
    pub means: Option<Trouble>,
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(clippy::struct_field_names, reason = "the unit is part of each name")]
pub(super) struct TimeoutsFile {
    /// Until the connection is established, in milliseconds.
    #[schemars(range(min = 1, max = TIMEOUT_MS_MAX), extend("default" = CONNECT_MS_DEFAULT))]
    pub connect_ms: Option<u32>,
    /// Until the first byte of the answer, in milliseconds. Default: 60000 for a stream and 600000 for
    /// other answers, which send nothing before their end; a value given here holds for both.
    #[schemars(range(min = 1, max = TIMEOUT_MS_MAX))]
    pub first_byte_ms: Option<u32>,
    /// Until the first event with content of a stream that sends comments or empty events meanwhile, and until the first
    /// byte that is not blank of any other answer, in milliseconds.
    #[schemars(range(min = 1, max = TIMEOUT_MS_MAX), extend("default" = THINKING_MS_DEFAULT))]
    pub thinking_ms: Option<u32>,
    /// Between two pieces of the answer, and for the client to take one, in milliseconds.
    #[schemars(range(min = 1, max = TIMEOUT_MS_MAX), extend("default" = IDLE_MS_DEFAULT))]
    pub idle_ms: Option<u32>,
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RedisFile {
    /// What the names of all keys begin with. Gateways with the same prefix share their limits.
    #[schemars(length(min = 1, max = 64), extend("default" = REDIS_PREFIX_DEFAULT))]
    pub prefix: Option<String>,
    /// Certificates of authorities to trust in place of the system's, in PEM form. A relative path
    /// starts from this file's folder.
    pub ca_file: Option<String>,
    /// Replicas that must have confirmed a permit before it is used, so that no failover can lose it. While fewer are there, the ledger
    /// cannot be used.
    #[schemars(range(max = 16), extend("default" = 0))]
    pub replicas: Option<u32>,
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct EndpointTlsFile {
    /// Certificates of authorities to trust in place of the system's, in PEM form. A relative path
    /// starts from this file's folder.
    pub ca_file: Option<String>,
    /// `true` switches the check off: anyone on the way can read the key. For tests only.
    #[schemars(extend("default" = false))]
    pub insecure: Option<bool>,
}
