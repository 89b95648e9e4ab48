//! `api-together status` and `api-together models`: tables of what the running process says of itself.

use std::collections::BTreeMap;
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use anstream::{print, println, stdout};
use anstyle::{AnsiColor, Style};
use jiff::{Timestamp, ZonedDateTime};
use serde::Deserialize;

use super::table::Table;
use super::times::moment;
use crate::config::PerLimit;
use crate::server::callable;
use crate::server::control::{self, Request};
use crate::server::runtime_folder::{Found, Running};

/// Time between two looks of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);
/// Clears the screen and goes to its beginning.
const CLEAR: &str = "\x1b[H\x1b[2J";

const PLAIN: Style = Style::new();
const GOOD: Style = AnsiColor::Green.on_default();
const BUSY: Style = AnsiColor::Yellow.on_default();
const BAD: Style = AnsiColor::Red.on_default();

/// Output of a command.
#[derive(Clone, Copy, Debug)]
pub(super) enum Output {
    Table,
    Json,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        if json { Self::Json } else { Self::Table }
    }
}

/// Shows the process's status, once or again and again.
pub(super) fn show(folders: &[PathBuf], output: Output, watch: bool) -> Result<(), String> {
    loop {
        let (running, text) = ask(folders)?;
        let shown = match output {
            Output::Json => format!("{text}\n"),
            Output::Table => status_text(&running, &read(&text)?, &ZonedDateTime::now()),
        };
        let clear =
            if watch && matches!(output, Output::Table) && std::io::stdout().is_terminal() { CLEAR } else { "" };
        match write!(stdout(), "{clear}{shown}").and_then(|()| stdout().flush()) {
            Ok(()) if watch => std::thread::sleep(WATCH_INTERVAL),
            Ok(()) => return Ok(()),
            // Nobody reads any more, as behind `| head`.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(format!("the status cannot be written: {error}")),
        }
    }
}

/// Shows the names that clients may ask for, and who serves them.
pub(super) fn show_models(folders: &[PathBuf], output: Output) -> Result<(), String> {
    let (_, text) = ask(folders)?;
    let status: Status = read(&text)?;
    match output {
        Output::Table => print!("{}", models_text(&status, &ZonedDateTime::now())),
        Output::Json => {
            let list: Vec<_> = served(&status)
                .map(|(name, api, sent)| serde_json::json!({ "model": name, "endpoint": api.id, "sentAs": sent }))
                .collect();
            println!("{}", serde_json::Value::from(list));
        }
    }
    Ok(())
}

fn ask(folders: &[PathBuf]) -> Result<(Running, String), String> {
    let found = Found::in_one_of(folders)?;
    let text = control::ask_found(&found, &Request::Status)?;
    Ok((found.running, text))
}

fn read(text: &str) -> Result<Status, String> {
    serde_json::from_str(text).map_err(|error| format!("the running process answered something else: {error}"))
}

/// The status, as far as it is shown. Fields that another version may not have are optional.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    started_at: Option<Timestamp>,
    open_requests: u64,
    config: Config,
    ledger: Ledger,
    request_log: Option<RequestLog>,
    apis: Vec<Api>,
}

#[derive(Debug, Deserialize)]
struct RequestLog {
    error: Option<String>,
    dropped: BTreeMap<String, u64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    loaded_at: Timestamp,
    version: u64,
    error: Option<String>,
    needs_upgrade: Vec<String>,
    keys_error: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ledger {
    state: String,
    path: String,
    error: Option<String>,
    queued: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Api {
    id: String,
    enabled: bool,
    available: bool,
    #[serde(flatten)]
    health: Health,
    held_by: Option<String>,
    limit_frees: Option<Timestamp>,
    in_flight: u64,
    quota: BTreeMap<String, Quota>,
    #[serde(default)]
    models: BTreeMap<String, Health>,
    #[serde(default)]
    model_limits: BTreeMap<String, ModelLimit>,
    keys: Option<Keys>,
    #[serde(default)]
    serves: Vec<String>,
    model_mapping: BTreeMap<String, String>,
    last_error: Option<LastError>,
}

/// The keys of an endpoint that has several.
#[derive(Debug, Deserialize)]
struct Keys {
    count: u64,
    list: Vec<Key>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Key {
    #[serde(rename = "key")]
    shown: String,
    state: String,
    in_flight: u64,
    error_count: u64,
    cool_down_ends: Option<Timestamp>,
    rest_ends: Option<Timestamp>,
    held_by: Option<String>,
    limit_frees: Option<Timestamp>,
    quota: Option<BTreeMap<String, Quota>>,
    last_error: Option<LastError>,
}

impl Key {
    fn state(&self, now: &ZonedDateTime) -> Shown {
        match (self.cool_down_ends, self.rest_ends, &self.held_by) {
            (Some(until), ..) => (format!("cooling down until {}", moment(until, now)), BAD),
            (_, Some(until), _) => (format!("resting until {}", moment(until, now)), BUSY),
            (_, _, Some(by)) => (full(by, self.limit_frees, now), BUSY),
            _ if self.state == "cooling_down" => ("on trial after a cool-down".to_owned(), BAD),
            _ => ("ok".to_owned(), GOOD),
        }
    }
}

/// State of an endpoint or of one of its models.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Health {
    temporarily_disabled: bool,
    error_count: u64,
    cool_down_ends: Option<Timestamp>,
    rest_ends: Option<Timestamp>,
}

#[derive(Debug, Deserialize)]
struct Quota {
    limit: i64,
    used: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ModelLimit {
    held_by: Option<String>,
    limit_frees: Option<Timestamp>,
    quota: BTreeMap<String, Quota>,
}

#[derive(Debug, Deserialize)]
struct LastError {
    at: Timestamp,
    what: String,
}

/// A word for a state, in its colour.
type Shown = (String, Style);

impl Health {
    /// Trouble of this endpoint or model, if it has any.
    fn trouble(&self, now: &ZonedDateTime) -> Option<Shown> {
        match (self.cool_down_ends, self.rest_ends) {
            (Some(until), _) => Some((format!("cooling down until {}", moment(until, now)), BAD)),
            (_, Some(until)) => Some((format!("resting until {}", moment(until, now)), BUSY)),
            _ if self.temporarily_disabled => Some(("on trial after a cool-down".to_owned(), BAD)),
            _ => None,
        }
    }
}

impl Api {
    fn state(&self, now: &ZonedDateTime) -> Shown {
        if !self.enabled {
            return ("off".to_owned(), BUSY);
        }
        if let Some(trouble) = self.health.trouble(now) {
            return trouble;
        }
        if let Some(by) = &self.held_by {
            return (full(by, self.limit_frees, now), BUSY);
        }
        if self.available { ("ok".to_owned(), GOOD) } else { ("not available".to_owned(), BAD) }
    }

    /// Models in another state than their endpoint, each with it.
    fn troubled_models(&self, now: &ZonedDateTime) -> Vec<(String, Shown)> {
        let name = |name: &String| if name.is_empty() { "(no model)".to_owned() } else { name.clone() };
        let mut models: Vec<_> =
            self.models.iter().filter_map(|(model, health)| Some((name(model), health.trouble(now)?))).collect();
        models.extend(self.model_limits.iter().filter_map(|(pattern, limit)| {
            let by = limit.held_by.as_ref()?;
            Some((pattern.clone(), (full(by, limit.limit_frees, now), BUSY)))
        }));
        models
    }
}

fn full(by: &str, frees: Option<Timestamp>, now: &ZonedDateTime) -> String {
    match frees {
        Some(frees) => format!("full ({by}) until {}", moment(frees, now)),
        None => format!("full ({by})"),
    }
}

fn status_text(running: &Running, status: &Status, now: &ZonedDateTime) -> String {
    let Status { started_at, open_requests, config, ledger, request_log, apis } = status;
    let scheme = if running.tls { "https" } else { "http" };
    let since = started_at.map_or_else(String::new, |at| format!(", up {}", age(at, now)));
    let mut lines = vec![format!(
        "api-together {}, process {}{since}, {scheme}://{}/v1",
        running.version,
        running.pid,
        callable(running.address)
    )];
    lines.push(format!("config    version {}, loaded {}", config.version, moment(config.loaded_at, now)));
    if let Some(error) = &config.error {
        lines.push(format!("          {BAD}the file is not applied{BAD:#}: {error}"));
    }
    if let Some(error) = &config.keys_error {
        lines.push(format!("          {BAD}the file of keys is not applied{BAD:#}: {error}"));
    }
    for change in &config.needs_upgrade {
        lines.push(format!("          {BUSY}not in use yet{BUSY:#}: {change}"));
    }
    lines.push(match &ledger.error {
        None => format!("ledger    {GOOD}{}{GOOD:#}, {}", ledger.state, ledger.path),
        Some(error) => {
            // It begins as it does in the log, with the path.
            let error = error.strip_prefix(&format!("ledger {}: ", ledger.path)).unwrap_or(error);
            format!("ledger    {BAD}{}{BAD:#}, {}: {error}", ledger.state, ledger.path)
        }
    });
    if let Some(RequestLog { error, dropped }) = request_log {
        if let Some(error) = error {
            lines.push(format!("log       {BAD}requests are not logged{BAD:#}: {error}"));
        }
        let dropped: u64 = dropped.values().sum();
        if dropped > 0 {
            lines.push(format!("log       {BUSY}{dropped} requests are not in the request log{BUSY:#}"));
        }
    }
    lines.push(format!("requests  {open_requests} open, {} queued\n", ledger.queued));
    lines.push(endpoints(apis, now).text());
    let mut errors = Table::new(&["ENDPOINT", "AT", "LAST ERROR"]);
    for (api, error) in apis.iter().filter_map(|api| Some((api, api.last_error.as_ref()?))) {
        let cells = [api.id.clone(), moment(error.at, now), error.what.clone()];
        errors.row(cells.map(|cell| (cell, PLAIN)).into());
    }
    for (api, keys) in apis.iter().filter_map(|api| Some((api, api.keys.as_ref()?))) {
        for (key, error) in keys.list.iter().filter_map(|key| Some((key, key.last_error.as_ref()?))) {
            let cells = [format!("{}, {}", api.id, key.shown), moment(error.at, now), error.what.clone()];
            errors.row(cells.map(|cell| (cell, PLAIN)).into());
        }
    }
    if !errors.is_empty() {
        lines.push(errors.text());
    }
    lines.join("\n")
}

fn endpoints(apis: &[Api], now: &ZonedDateTime) -> Table {
    // Limits that nobody has are not worth a column.
    fn of_keys(api: &Api) -> impl Iterator<Item = &BTreeMap<String, Quota>> {
        api.keys.iter().flat_map(|keys| &keys.list).filter_map(|key| key.quota.as_ref())
    }
    let quotas = || {
        apis.iter()
            .flat_map(|api| api.model_limits.values().map(|of| &of.quota).chain([&api.quota]).chain(of_keys(api)))
    };
    let is_set = |kind: &&str| quotas().any(|quotas| quotas.get(*kind).is_some_and(|quota| quota.limit >= 0));
    let kinds: Vec<&str> = PerLimit::<()>::default().each().map(|(kind, ())| kind.key()).filter(is_set).collect();
    let heads: Vec<String> = kinds.iter().map(|kind| kind.to_uppercase()).collect();
    let mut head = vec!["ENDPOINT", "STATE", "OPEN", "ERRORS"];
    head.extend(heads.iter().map(String::as_str));
    let mut table = Table::new(&head);
    let limits = |quotas: &BTreeMap<String, Quota>| -> Vec<Shown> {
        kinds.iter().map(|kind| (quotas.get(*kind).map_or_else(String::new, used), PLAIN)).collect()
    };
    for api in apis {
        let mut row = vec![(api.id.clone(), PLAIN), api.state(now), (api.in_flight.to_string(), PLAIN)];
        row.push((api.health.error_count.to_string(), PLAIN));
        row.extend(limits(&api.quota));
        table.row(row);
        for key in api.keys.iter().flat_map(|keys| &keys.list) {
            let mut row = vec![(format!("  {}", key.shown), PLAIN), key.state(now), (key.in_flight.to_string(), PLAIN)];
            row.push((key.error_count.to_string(), PLAIN));
            row.extend(key.quota.as_ref().map_or_else(Vec::new, limits));
            table.row(row);
        }
        if let Some(keys) = &api.keys
            && let Some(more) = keys.count.checked_sub(keys.list.len() as u64).filter(|more| *more > 0)
        {
            table.row(vec![(format!("  and {more} more"), PLAIN)]);
        }
        for (model, state) in api.troubled_models(now) {
            let empty = || (String::new(), PLAIN);
            let mut row = vec![(format!("  {model}"), PLAIN), state, empty(), empty()];
            row.extend(api.model_limits.get(&model).map_or_else(Vec::new, |of| limits(&of.quota)));
            table.row(row);
        }
    }
    table
}

fn used(quota: &Quota) -> String {
    if quota.limit < 0 { String::new() } else { format!("{}/{}", quota.used, quota.limit) }
}

/// Each name that clients may ask for, with an endpoint that serves it and the name sent there.
fn served(status: &Status) -> impl Iterator<Item = (&str, &Api, &str)> {
    let mut served: Vec<_> = status
        .apis
        .iter()
        .flat_map(|api| api.serves.iter().map(move |name| (name.as_str(), api)))
        .map(|(name, api)| (name, api, api.model_mapping.get(name).map_or(name, String::as_str)))
        .collect();
    served.sort_by_key(|(name, ..)| *name);
    served.into_iter()
}

fn models_text(status: &Status, now: &ZonedDateTime) -> String {
    let mut table = Table::new(&["MODEL", "ENDPOINT", "SENT AS", "STATE"]);
    for (name, api, sent) in served(status) {
        let of_model = api.models.get(sent).and_then(|health| health.trouble(now));
        let state = match api.state(now) {
            (_, GOOD) => of_model.unwrap_or(("ok".to_owned(), GOOD)),
            state => state,
        };
        table.row(vec![(name.to_owned(), PLAIN), (api.id.clone(), PLAIN), (sent.to_owned(), PLAIN), state]);
    }
    table.text()
}

fn age(since: Timestamp, now: &ZonedDateTime) -> String {
    let seconds = now.timestamp().duration_since(since).as_secs().max(0);
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min"),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}
