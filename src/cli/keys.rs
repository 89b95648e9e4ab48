//! `api-together keys`: keys of clients are made, listed, rotated and revoked, by the running process or in its file.

use std::time::Duration;

use anstream::{eprintln, println};
use anstyle::{AnsiColor, Style};
use clap::{Args, Subcommand};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value, json};

use super::files::ConfigFile;
use super::status::Output;
use super::table::Table;
use super::times::parse_time;
use crate::config::{self, BudgetPeriod, Config, Environment, Flags, KeysChange, PerLimit};
use crate::routing::generated_key::GeneratedKey;
use crate::server::control::{self, Request};
use crate::server::keys::{ListedBudget, ListedKey};
use crate::server::runtime_folder::Found;

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
    /// Give a key more of one of its budgets, for a while.
    Raise {
        /// Name of the key.
        name: String,
        /// How much more, such as 5usd or 100000tokens; the unit may be left out.
        #[arg(long, value_parser = parse_amount)]
        by: AmountGiven,
        /// Period of the budget: hour, 5h, day, week, month or total; may be left out where there is one budget.
        #[arg(long)]
        per: Option<String>,
        /// Until when, such as 2027-03-31 (to the end of that day) or 2027-03-31T18:00:00Z.
        #[arg(long)]
        until: String,
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
    /// Requests in any 60 seconds; -1 is no limit [default: no limit].
    #[arg(long, allow_negative_numbers = true)]
    rpm: Option<i64>,
    /// Requests a day [default: no limit].
    #[arg(long, allow_negative_numbers = true)]
    rpd: Option<i64>,
    /// Tokens in any 60 seconds [default: no limit].
    #[arg(long, allow_negative_numbers = true)]
    tpm: Option<i64>,
    /// Tokens a day [default: no limit].
    #[arg(long, allow_negative_numbers = true)]
    tpd: Option<i64>,
    /// Requests at once [default: no limit].
    #[arg(long, allow_negative_numbers = true)]
    max_concurrent: Option<i64>,
    /// What it may take, such as 10usd/month or 2000000tokens/day (hour, 5h, day, week, month or total); may be given several times.
    #[arg(long, value_parser = parse_budget)]
    budget: Vec<BudgetGiven>,
    /// Share of its budgets that a warning is logged at, such as 0.8.
    #[arg(long, requires = "budget")]
    warn_at: Option<f64>,
    /// Cut a stream off that takes more than could be foreseen, if a budget has no room for that.
    #[arg(long, requires = "budget")]
    cut_overrun: bool,
    /// When it stops opening, such as 2027-03-31 or 2027-03-31T18:00:00Z [default: never].
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
            let key = GeneratedKey::new()?;
            let done = change(file, key.add(entry(*add)))?;
            show_key(key.expose(), &done);
            Ok(())
        }
        KeysCommand::List { json } => list(file, Output::new(json)),
        KeysCommand::Rotate { name, overlap } => {
            let key = GeneratedKey::new()?;
            let overlap = SignedDuration::try_from(overlap).map_err(|error| error.to_string())?;
            let until = Timestamp::now().checked_add(overlap).map_err(|error| error.to_string())?;
            let done = change(file, key.rotate(name, until))?;
            show_key(key.expose(), &done);
            Ok(())
        }
        KeysCommand::Raise { name, by: AmountGiven { number: by, unit }, per, until } => {
            println!("{}", change(file, KeysChange::Raise { name, by, unit, per, until })?);
            Ok(())
        }
        KeysCommand::Revoke { name, now } => {
            println!("{}", change(file, KeysChange::Revoke { name, now })?);
            Ok(())
        }
    }
}

/// An amount of a budget, as it is typed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct AmountGiven {
    number: f64,
    /// `usd` or `tokens`.
    unit: Option<String>,
}

/// A budget, as it is typed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct BudgetGiven {
    amount: AmountGiven,
    per: String,
}

fn parse_amount(text: &str) -> Result<AmountGiven, String> {
    let wrong = || format!("{text:?} is no amount such as 5usd, $5 or 100000tokens");
    let text = text.to_ascii_lowercase();
    let dollars = text.strip_prefix('$').map(|number| format!("{number}usd"));
    let text = dollars.as_ref().unwrap_or(&text);
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number = number.parse().map_err(|_| wrong())?;
    let unit = match unit {
        "" => None,
        "usd" | "tokens" => Some(unit.to_owned()),
        _ => return Err(wrong()),
    };
    Ok(AmountGiven { number, unit })
}

fn parse_budget(text: &str) -> Result<BudgetGiven, String> {
    let wrong = || format!("{text:?} is no budget such as 10usd/month or 2000000tokens/day");
    let lower = text.to_ascii_lowercase();
    let (amount, per) = lower.split_once('/').ok_or_else(wrong)?;
    let amount = parse_amount(amount)?;
    if amount.unit.is_none() || BudgetPeriod::named(per).is_none() {
        return Err(wrong());
    }
    Ok(BudgetGiven { amount, per: per.to_owned() })
}

impl BudgetGiven {
    /// The budget as the file of keys has it.
    fn entry(&self, warn_at: Option<f64>) -> Value {
        let Self { amount: AmountGiven { number, unit }, per } = self;
        let mut entry = Map::new();
        let is_usd = unit.as_deref() == Some("usd");
        #[expect(clippy::cast_possible_truncation, reason = "what is too large is refused where it is read")]
        let number = if is_usd { json!(number) } else { json!(number.round() as i64) };
        entry.insert(if is_usd { "usd" } else { "tokens" }.to_owned(), number);
        entry.insert("per".to_owned(), json!(per));
        entry.extend(warn_at.map(|share| ("warnAt".to_owned(), json!(share))));
        entry.into()
    }
}

/// Prints a key, and nothing else, on standard output.
fn show_key(key: &str, done: &str) {
    eprintln!("{done}; this is the only time that the key is shown:");
    println!("{key}");
}

fn entry(add: AddKey) -> Map<String, Value> {
    let AddKey { name, models, calls, endpoints, expires, allow_from, weight, tags, .. } = add;
    let AddKey { rpm, rpd, tpm, tpd, max_concurrent, budget, warn_at, cut_overrun, .. } = add;
    let mut entry = Map::new();
    entry.insert("name".into(), name.into());
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
    if !budget.is_empty() {
        entry.insert("budget".into(), budget.iter().map(|budget| budget.entry(warn_at)).collect());
    }
    if cut_overrun {
        entry.insert("onOverrun".into(), "cut".into());
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
    if let Some(found) = Found::look(&folders)? {
        return control::ask_found(&found, &Request::ChangeKeys(change));
    }
    let Config { server, endpoints } = load(file)?;
    let endpoints: Vec<_> = endpoints.into_iter().map(|endpoint| endpoint.id).collect();
    config::change_keys(&server, &endpoints, change)
}

/// The config, with the place that its file of keys has for a service, where no process runs.
fn load(file: &ConfigFile) -> Result<Config, String> {
    let environment = Environment::from_process(&file.path, &Flags::default());
    let loaded = config::load(&file.path, &environment).map_err(|problems| problems.to_string())?;
    let mut config = loaded.config;
    let server = &mut config.server;
    if let (Some(state), false) = (file.state_folder(), server.keys_file.is_named)
        && let Some(name) = server.keys_file.path.file_name()
    {
        server.keys_file.path = state.join(name);
    }
    Ok(config)
}

fn list(file: &ConfigFile, output: Output) -> Result<(), String> {
    let folders = file.runtime_folders();
    let mut keys: Vec<ListedKey> = if let Some(found) = Found::look(&folders)? {
        let told = control::ask_found(&found, &Request::Keys)?;
        serde_json::from_str(&told).map_err(|error| error.to_string())?
    } else {
        let server = load(file)?.server;
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
    let has_budgets = keys.iter().any(|key| !key.budgets.is_empty());
    let mut head = vec!["NAME", "KEY", "STATE", "EXPIRES", "LIMITS", "MODELS", "CALLS", "ENDPOINTS", "FROM"];
    if has_budgets {
        head.insert(5, "SPENT");
    }
    let mut table = Table::new(&head);
    let plain = |text: String| (text, Style::new());
    let all = |list: &Option<Vec<String>>| plain(list.as_ref().map_or_else(|| "all".to_owned(), |list| list.join(",")));
    for key in keys {
        let style = if key.state == "open" { Style::new() } else { BAD };
        let mut row = vec![
            plain(key.name.clone()),
            plain(key.last_four.as_ref().map_or_else(|| "-".to_owned(), |four| format!("…{four}"))),
            (key.state.clone(), style),
            plain(key.expires.clone().unwrap_or_else(|| "never".to_owned())),
            plain(if key.limits.is_empty() { "none".to_owned() } else { key.limits.join(", ") }),
            all(&key.models),
            all(&key.calls),
            all(&key.endpoints),
            plain(key.source.clone()),
        ];
        if has_budgets {
            let spent = |budget: &ListedBudget| format!("{} of {} ({})", budget.spent, budget.limit, budget.per);
            row.insert(5, plain(key.budgets.iter().map(spent).collect::<Vec<_>>().join(", ")));
        }
        table.row(row);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_typed_as_an_amount_and_a_period() {
        let amount = |number, unit: &str| AmountGiven { number, unit: Some(unit.to_owned()) };
        let budget = |text: &str| parse_budget(text).unwrap();
        assert_eq!(budget("10usd/month"), BudgetGiven { amount: amount(10.0, "usd"), per: "month".into() });
        assert_eq!(budget("0.5usd/5h").entry(Some(0.8)), json!({ "usd": 0.5, "per": "5h", "warnAt": 0.8 }));
        assert_eq!(budget("2000000tokens/day").entry(None), json!({ "tokens": 2_000_000, "per": "day" }));
        assert_eq!(parse_amount("7").unwrap(), AmountGiven { number: 7.0, unit: None });
        assert_eq!(budget("$2.50/Week"), BudgetGiven { amount: amount(2.5, "usd"), per: "week".into() });
        for wrong in ["", "$", "$5usd/day", "10", "10usd", "10/day", "10eur/day", "usd/day", "10usd/year", "-1usd/day"]
        {
            assert!(parse_budget(wrong).is_err(), "{wrong}");
        }
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
