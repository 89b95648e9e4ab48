//! `api-together keys`: keys of clients are made, listed, rotated and revoked, by the running process or in its file.

use std::time::Duration;

use anstream::{eprintln, println};
use anstyle::{AnsiColor, Style};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use clap::{Args, Subcommand};
use jiff::{SignedDuration, Span, Timestamp};
use ring::rand::{SecureRandom as _, SystemRandom};
use serde_json::{Map, Value, json};

use super::files::ConfigFile;
use super::status::Output;
use super::table::Table;
use crate::config::{self, Environment, Flags, KeyDigest, KeysChange, PerLimit};
use crate::routing::callers::GENERATED_PREFIX;
use crate::server::control::{self, Request};
use crate::server::keys::ListedKey;
use crate::server::runtime_folder::Found;

/// Random bytes of a key: 256 bits.
const KEY_BYTES: usize = 32;
/// Characters of a key that lists show.
const SHOWN_CHARS: usize = 4;

/// What is done with keys.
#[derive(Debug, Subcommand)]
pub(super) enum KeysCommand {
    /// Make a key and print it, this once: the file of keys has its SHA-256 only.
    Add(Box<AddKey>),
    /// List the keys, those of the config among them. None is shown.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Make another key in place of one, and print it. The one before opens beside it for a while.
    Rotate {
        /// Name of the key.
        name: String,
        /// Time for which the one before still opens, such as 24h, 7d or 0s.
        #[arg(long, default_value = "24h", value_parser = parse_time)]
        overlap: Duration,
    },
    /// Have a key open nothing any more, at once. Requests that are running go on.
    Revoke {
        /// Name of the key.
        name: String,
        /// Cut its running requests off.
        #[arg(long)]
        now: bool,
    },
}

/// A key to make.
#[derive(Args, Debug)]
pub(super) struct AddKey {
    /// Who or what gets it.
    name: String,
    /// Models that it may ask for, such as gpt-4o*,o9 [default: all].
    #[arg(long, value_delimiter = ',')]
    models: Vec<String>,
    /// Calls that it may make, such as chat,embeddings [default: all].
    #[arg(long, value_delimiter = ',')]
    calls: Vec<String>,
    /// Endpoints that its requests may go to [default: all].
    #[arg(long, value_delimiter = ',')]
    endpoints: Vec<String>,
    /// Requests in any 60 seconds [default: no limit].
    #[arg(long)]
    rpm: Option<u64>,
    /// Requests a day [default: no limit].
    #[arg(long)]
    rpd: Option<u64>,
    /// Tokens in any 60 seconds [default: no limit].
    #[arg(long)]
    tpm: Option<u64>,
    /// Tokens a day [default: no limit].
    #[arg(long)]
    tpd: Option<u64>,
    /// Requests at once [default: no limit].
    #[arg(long)]
    max_concurrent: Option<u64>,
    /// When it stops to open, such as 2027-03-31 or 2027-03-31T18:00:00Z [default: never].
    #[arg(long)]
    expires: Option<String>,
    /// Addresses that it may be used from, such as 10.0.0.0/8 [default: all].
    #[arg(long, value_delimiter = ',')]
    allow_from: Vec<String>,
    /// Turns in the queue for each one of a key of weight 1 [default: 1].
    #[arg(long)]
    weight: Option<u16>,
    /// A label of its requests in the log; may be given several times.
    #[arg(long = "tag")]
    tags: Vec<String>,
}

/// Does it.
pub(super) fn run(file: &ConfigFile, command: KeysCommand) -> Result<(), String> {
    match command {
        KeysCommand::Add(add) => {
            let key = new_key()?;
            let done = change(file, KeysChange::Add { entry: entry(*add, &key) })?;
            show_key(&key, &done);
            Ok(())
        }
        KeysCommand::List { json } => list(file, Output::new(json)),
        KeysCommand::Rotate { name, overlap } => {
            let key = new_key()?;
            let overlap = SignedDuration::try_from(overlap).map_err(|error| error.to_string())?;
            let until = Timestamp::now().checked_add(overlap).map_err(|error| error.to_string())?;
            let until = seconds_of(until);
            let hash = KeyDigest::of(key.as_bytes()).text();
            let done = change(file, KeysChange::Rotate { name, hash, last_four: last_four(&key), until })?;
            show_key(&key, &done);
            Ok(())
        }
        KeysCommand::Revoke { name, now } => {
            println!("{}", change(file, KeysChange::Revoke { name, now })?);
            Ok(())
        }
    }
}

/// Prints a key, and nothing else, on standard output.
fn show_key(key: &str, done: &str) {
    eprintln!("{done}; this is the only time that the key is shown:");
    println!("{key}");
}

fn new_key() -> Result<String, String> {
    let mut bytes = [0; KEY_BYTES];
    SystemRandom::new().fill(&mut bytes).map_err(|_| "the system gives no random bytes".to_owned())?;
    Ok(format!("{GENERATED_PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(bytes)))
}

fn last_four(key: &str) -> String {
    key.chars().skip(key.chars().count().saturating_sub(SHOWN_CHARS)).collect()
}

/// A moment in whole seconds, not later.
fn seconds_of(moment: Timestamp) -> String {
    Timestamp::from_second(moment.as_second()).unwrap_or(moment).to_string()
}

fn entry(add: AddKey, key: &str) -> Map<String, Value> {
    let AddKey { name, models, calls, endpoints, expires, allow_from, weight, tags, .. } = add;
    let AddKey { rpm, rpd, tpm, tpd, max_concurrent, .. } = add;
    let mut entry = Map::new();
    entry.insert("name".into(), name.into());
    entry.insert("keyHash".into(), KeyDigest::of(key.as_bytes()).text().into());
    entry.insert("lastFour".into(), last_four(key).into());
    entry.insert("created".into(), seconds_of(Timestamp::now()).into());
    for (name, list) in
        [("models", models), ("calls", calls), ("endpoints", endpoints), ("allowFrom", allow_from), ("tags", tags)]
    {
        if !list.is_empty() {
            entry.insert(name.into(), json!(list));
        }
    }
    for (kind, limit) in (PerLimit { rpm, rpd, tpm, tpd, max_concurrent }).each() {
        if let Some(limit) = limit {
            entry.insert(kind.key().into(), limit.into());
        }
    }
    if let Some(weight) = weight {
        entry.insert("weight".into(), weight.into());
    }
    if let Some(expires) = expires {
        entry.insert("expires".into(), expires.into());
    }
    entry
}

/// Changes the file of keys: by the running process, so that it is in use when this ends, or else by this one.
fn change(file: &ConfigFile, change: KeysChange) -> Result<String, String> {
    let folders = file.runtime_folders();
    match Found::look(&folders)? {
        Some(found) => control::ask_found(&found, &Request::ChangeKeys(change)),
        None => load(file)?.keys_file.change(change),
    }
}

/// The server's part of the config, where no process runs.
fn load(file: &ConfigFile) -> Result<config::Server, String> {
    let environment = Environment::from_process(&file.path, &Flags::default());
    let loaded = config::load(&file.path, &environment).map_err(|problems| problems.to_string())?;
    let mut server = loaded.config.server;
    if let (Some(state), false) = (file.state_folder(), server.keys_file.is_named)
        && let Some(name) = server.keys_file.path.file_name()
    {
        server.keys_file.path = state.join(name);
    }
    Ok(server)
}

fn list(file: &ConfigFile, output: Output) -> Result<(), String> {
    let folders = file.runtime_folders();
    let mut keys: Vec<ListedKey> = if let Some(found) = Found::look(&folders)? {
        let told = control::ask_found(&found, &Request::Keys)?;
        serde_json::from_str(&told).map_err(|error| error.to_string())?
    } else {
        let server = load(file)?;
        let of_file = config::load_keys(&server).map_err(|problems| problems.to_string())?;
        let now = Timestamp::now();
        let of_config = server.keys.iter().map(|key| ListedKey::new(key, true, now));
        of_config.chain(of_file.iter().map(|key| ListedKey::new(key, false, now))).collect()
    };
    keys.sort_by(|one, other| one.name.cmp(&other.name));
    if matches!(output, Output::Json) {
        println!("{}", serde_json::to_string_pretty(&keys).map_err(|error| error.to_string())?);
        return Ok(());
    }
    let table = table(&keys);
    if table.is_empty() {
        println!("there are no keys; make one with `api-together keys add NAME`");
    } else {
        anstream::print!("{}", table.text());
    }
    Ok(())
}

fn table(keys: &[ListedKey]) -> Table {
    const BAD: Style = AnsiColor::Yellow.on_default();
    let mut table = Table::new(&["NAME", "KEY", "STATE", "EXPIRES", "LIMITS", "MODELS", "CALLS", "ENDPOINTS", "FROM"]);
    let plain = |text: String| (text, Style::new());
    let all = |list: &Option<Vec<String>>| plain(list.as_ref().map_or_else(|| "all".to_owned(), |list| list.join(",")));
    for key in keys {
        let style = if key.state == "open" { Style::new() } else { BAD };
        table.row(vec![
            plain(key.name.clone()),
            plain(key.last_four.as_ref().map_or_else(|| "-".to_owned(), |four| format!("…{four}"))),
            (key.state.clone(), style),
            plain(key.expires.clone().unwrap_or_else(|| "never".to_owned())),
            plain(if key.limits.is_empty() { "none".to_owned() } else { key.limits.join(", ") }),
            all(&key.models),
            all(&key.calls),
            all(&key.endpoints),
            plain(key.source.clone()),
        ]);
    }
    table
}

/// A time such as 24h, 7d, 90m or 0s.
fn parse_time(text: &str) -> Result<Duration, String> {
    let span: Span = text.parse().map_err(|_| format!("{text:?} is no time such as 24h, 7d or 0s"))?;
    let seconds = span.total((jiff::Unit::Second, jiff::SpanRelativeTo::days_are_24_hours()));
    seconds
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| format!("{text:?} is no time such as 24h, 7d or 0s"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_256_bits_and_never_the_same() {
        let (one, other) = (new_key().unwrap(), new_key().unwrap());
        assert_ne!(one, other);
        assert!(one.starts_with("sk-at-") && one.len() == 6 + 43, "{one}");
        assert!(one.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)), "{one}");
        assert_eq!(last_four(&one), one[one.len() - 4..]);
    }

    #[test]
    fn times() {
        for (text, seconds) in [("24h", 86_400), ("7d", 604_800), ("90m", 5400), ("0s", 0), ("1h 30m", 5400)] {
            assert_eq!(parse_time(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for wrong in ["", "soon", "-1h", "24", "1y"] {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
    }
}
