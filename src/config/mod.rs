//! The configuration: from a file's text to checked values, or to the list of everything wrong with
//! it.
//!
//! A text goes through these stages:
//! 1. `schema_check` parses it, fills in environment variables and holds every value against the schema;
//! 2. `file` is what was typed;
//! 3. `checked` is what is meant: [`Config`] with its [`Server`] and [`Endpoint`]s.
//!
//! [`schema()`] and [`schema_markdown`] write the reference from the types of `file`.

mod affinity;
mod auth_header;
mod base_url;
mod budgets;
mod calls;
mod checked;
mod cidr;
mod client_keys;
mod connections;
mod diff;
mod endpoint;
mod environment;
mod errors;
mod file;
mod foreign;
mod header_pattern;
mod import;
mod key_strength;
mod keys_file;
mod lanes;
mod limits;
mod masks;
mod memory;
mod places;
mod prices;
mod problem;
mod proxy;
mod reference;
mod request_log;
mod schema;
mod schema_check;
mod secret;
mod server;
mod shared_ledger;
mod spelling;
mod status_set;
mod switches;
mod syntax;
mod versions;
mod watch;
mod webhook;

#[cfg(test)]
pub(crate) mod test_support;
#[cfg(test)]
mod tests;

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

pub use affinity::AffinityRules;
pub use auth_header::AuthHeader;
pub use base_url::{BaseUrl, BaseUrlError};
pub use budgets::{Budget, BudgetPeriod, BudgetUnit, OnOverrun, Raise};
pub use calls::{CallKind, CallSet};
pub use checked::Config;
pub use cidr::{Cidr, CidrError};
pub use client_keys::{ClientKey, KeyDigest, KeyHash};
pub use connections::ConnectionLimits;
pub use diff::{changes, needs_upgrade};
pub use endpoint::{Door, Endpoint, EndpointTls, ModelLimits, StreamUsage, Timeouts, VersionPath, WebSocketPermits};
pub use environment::{Environment, Flags};
pub use errors::{ErrorRule, MessagePattern, Trouble, matches_glob};
pub use header_pattern::{HeaderPattern, HeaderPatternError};
pub use import::Imported;
pub use keys_file::{KeysChange, KeysFile};
pub(crate) use lanes::lane_digest;
pub use lanes::{EndpointKeys, Lane};
pub use limits::{Limit, LimitKind, PerLimit};
pub use masks::{UnmaskError, differs_by_hand, mask, unmask};
pub use prices::{PriceEntry, Rates};
pub use problem::{Problem, ProblemKind, Problems};
pub use proxy::{Proxy, ProxyScheme};
pub use reference::{Language, schema_markdown};
pub use request_log::RequestLog;
pub use schema::schema;
pub(crate) use schema_check::likeliest;
pub(crate) use secret::{Secret, without_keys};
pub use server::{Breaker, Cors, LedgerOnError, LedgerSync, LogFormat, Queue, Retry, Server, ServerTls, Strategy};
pub use shared_ledger::{RedisAddress, RedisKind, SharedLedger};
pub use status_set::StatusSet;
pub use switches::{SwitchedOff, Switches, switches_file};
pub use versions::{KeptVersion, Versions};
pub use watch::Watch;
pub use webhook::{AlertEvent, Webhook, WebhookFormat, is_link_local};

use checked::Check;
use problem::Report;

/// Longer files are refused: no configuration has this size.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// A usable configuration and its warnings.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The configuration, ready for use.
    pub config: Config,
    /// Warnings, in the order of their places. Unknown keys are among them.
    pub warnings: Vec<Problem>,
}

/// Syntax of a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// JSON according to RFC 8259, without comments.
    Json,
    /// YAML without merge keys.
    Yaml,
}

impl Format {
    /// YAML for `.yaml` and `.yml`, JSON for everything else.
    pub fn from_path(path: &Path) -> Self {
        let ending = path.extension().unwrap_or_default();
        if ending.eq_ignore_ascii_case("yaml") || ending.eq_ignore_ascii_case("yml") { Self::Yaml } else { Self::Json }
    }
}

/// Reads and checks a file, which may be a pipe. Problems carry the file's path.
pub fn load(path: &Path, environment: &Environment) -> Result<Loaded, Problems> {
    let shown = path.display().to_string();
    let way_out = format!("copy conf/apis.example.json to {}, or name another file with --config", path.display());
    let text = read(path, &way_out).map_err(|problems| problems.in_file(&shown))?;
    // So that the same files have the same names however this one is named.
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let base_dir = absolute.parent().unwrap_or(Path::new(""));
    check_str(&text, Format::from_path(path), environment, base_dir)
        .map(|Loaded { config, warnings }| {
            let warnings = warnings.into_iter().map(|warning| warning.in_file(&shown)).collect();
            Loaded { config, warnings }
        })
        .map_err(|problems| problems.in_file(&shown))
}

/// The keys of a config's file of keys. Problems carry the file's path.
pub fn load_keys(server: &Server) -> Result<Vec<ClientKey>, Problems> {
    let around = client_keys::Around {
        timezone: &server.timezone,
        shared: server.api_key.as_ref(),
        admin: server.admin_key.as_ref(),
    };
    server.keys_file.load(&around)
}

/// Changes the keys of a server that stand in its file for them. Returns what was done, in words.
pub fn change_keys(server: &Server, endpoints: &[Arc<str>], change: KeysChange) -> Result<String, String> {
    let name = change.name();
    if server.keys.iter().any(|key| *key.name == *name) {
        let way_out = match change {
            KeysChange::Add { .. } => "name another one",
            _ => "it wins over one of the file, so change it in the config, and reload",
        };
        return Err(format!("server.keys has a key {name}; {way_out}"));
    }
    if let Some(id) = change.endpoints().find(|id| !endpoints.iter().any(|known| **known == **id)) {
        let known = endpoints.join(", ");
        return Err(format!(
            "no endpoint of the config has the id {id:?}, so the key could not use it; there are {known}"
        ));
    }
    server.keys_file.change(change)
}

/// Reads what can be kept of a file: no more than one byte above 16 MiB.
pub fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Fails for what is neither a file nor a folder: opening a FIFO, or reading a device, may never end.
pub fn check_ordinary(path: &Path) -> io::Result<()> {
    let found = std::fs::metadata(path)?;
    if found.is_file() || found.is_dir() { Ok(()) } else { Err(io::Error::other("it is no ordinary file")) }
}

/// Writes a config from a file of another program.
pub fn import(path: &Path) -> Result<Imported, Problems> {
    let shown = path.display().to_string();
    let imported = read(path, "name the file that another program reads")
        .and_then(|text| import::import(&text, Format::from_path(path)));
    imported.map_err(|problems| problems.in_file(&shown))
}

fn read(path: &Path, way_out: &str) -> Result<String, Problems> {
    let unreadable = |error: io::Error| Problem::error("", format!("cannot be read: {error}")).hint(way_out);
    let bytes = read_bounded(path).map_err(unreadable)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(Problem::error("", format!("is longer than {FILE_BYTES_MAX} bytes")).into());
    }
    String::from_utf8(bytes)
        .map_err(|_| Problem::error("", "is not UTF-8 text").hint("save it as UTF-8 in your editor").into())
}

/// Checks a configuration's text. Relative paths in it start from `base_dir`.
pub fn check_str(text: &str, format: Format, environment: &Environment, base_dir: &Path) -> Result<Loaded, Problems> {
    let mut report = Report::default();
    for problem in environment.problems() {
        report.add(problem.clone());
    }
    let typed = schema_check::read(text, format, environment, &mut report);
    let mut check = Check { report: &mut report, environment, base_dir };
    let config = Config::from_file(typed, &mut check);
    let warnings = report.finish(text)?;
    match config {
        Some(config) => Ok(Loaded { config, warnings }),
        // Unreachable: a text without a config has reported the reason. Still better than an empty answer.
        None => Err(Problem::error("", "cannot be used").into()),
    }
}
