//! The file of clients' keys: read when the process starts, when it changes, and when a command asks for it, whatever the state of the config.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use jiff::Timestamp;
use pingora::server::ShutdownWatch;
use pingora::services::background::BackgroundService;
use serde::{Deserialize, Serialize};

use crate::config::{self, AlertEvent, KeysChange, Watch};
use crate::ledger::budgets::BudgetView;
use crate::process::{ConfigState, Process};
use crate::routing::callers::Keyring;
use crate::routing::pool::Pool;
use crate::telemetry::alerts;
use crate::usage::prices::NanoUsd;

/// Reads the file of keys. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct KeysReader {
    pool: Arc<ArcSwap<Pool>>,
    keyring: Keyring,
    config: ConfigState,
    /// The file that was read the last time.
    seen: Arc<Mutex<Option<Seen>>>,
}

/// A file, and what is another whenever it is changed: its number, and when it was written.
type Seen = (PathBuf, Option<(u64, SystemTime)>);

/// A key as lists show it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ListedKey {
    /// Name.
    pub name: String,
    /// The last characters of the key, if they are known.
    pub last_four: Option<String>,
    /// `open`, `revoked`, `off` or `expired`.
    pub state: String,
    /// Where it stands: `config` or `file`.
    pub source: String,
    /// Its limits, such as `60 requests a minute`, and its budgets.
    pub limits: Vec<String>,
    /// What is spent of each budget, where the process that counts it runs.
    #[serde(default)]
    pub budgets: Vec<ListedBudget>,
    /// When it stops to open.
    pub expires: Option<String>,
    /// Models that it may ask for; all if none are named.
    pub models: Option<Vec<String>>,
    /// Calls that it may make; all if none are named.
    pub calls: Option<Vec<String>>,
    /// Endpoints that its requests may go to; all if none are named.
    pub endpoints: Option<Vec<String>>,
    /// Labels.
    pub tags: Vec<String>,
}

/// A budget as lists show it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ListedBudget {
    /// Its period, as the config has it.
    pub per: String,
    /// What there is of it, raises included.
    pub limit: String,
    /// What is spent of it in its period.
    pub spent: String,
    /// What is reserved of it for requests under way.
    pub reserved: String,
    /// When its period ends; none for all time.
    pub ends: Option<String>,
}

impl ListedBudget {
    fn new(view: &BudgetView) -> Self {
        let BudgetView { kind, limit, totals, ends } = view;
        Self {
            per: kind.period.word().to_owned(),
            limit: kind.amount(*limit),
            spent: kind.amount(totals.spent),
            reserved: kind.amount(totals.reserved),
            ends: ends.and_then(|ends| Timestamp::try_from(ends).ok()).map(|ends| ends.to_string()),
        }
    }
}

impl ListedKey {
    /// A key as it is at this moment.
    pub fn new(key: &config::ClientKey, is_of_config: bool, now: Timestamp) -> Self {
        let state = match () {
            () if key.revoked => "revoked",
            () if !key.enabled => "off",
            () if key.expires.is_some_and(|expires| expires <= now) => "expired",
            () => "open",
        };
        let calls = || key.calls.kinds().map(|kind| kind.name().to_owned()).collect();
        Self {
            name: key.name.to_string(),
            last_four: key.last_four.clone(),
            state: state.to_owned(),
            source: if is_of_config { "config" } else { "file" }.to_owned(),
            limits: limits_of(key),
            budgets: Vec::new(),
            expires: key.expires.map(|expires| expires.to_string()),
            models: key.models.clone(),
            calls: (key.calls != config::CallSet::ALL).then(calls),
            endpoints: key.endpoints.clone(),
            tags: key.tags.clone(),
        }
    }
}

fn limits_of(key: &config::ClientKey) -> Vec<String> {
    let shown = |(kind, limit): (config::LimitKind, config::Limit)| match limit {
        config::Limit::AtMost(limit) => Some(kind.words(limit)),
        config::Limit::Unlimited | config::Limit::Off => None,
    };
    let of_models = key.model_limits.iter().flat_map(|(models, limits)| {
        limits.each().filter_map(move |limit| Some(format!("{} for {models}", shown(limit)?)))
    });
    let of_budget = |budget: &config::Budget| {
        let amount = match budget.unit {
            config::BudgetUnit::NanoUsd => format!("${}", NanoUsd(budget.limit)),
            config::BudgetUnit::Tokens => format!("{} tokens", budget.limit),
        };
        format!("{amount} ({})", budget.period.word())
    };
    key.limits.each().filter_map(shown).chain(of_models).chain(key.budgets.iter().map(of_budget)).collect()
}

/// Says that a key of the file counts for nothing.
pub(super) fn overlooked(server: &config::Server, name: &str) -> String {
    let path = server.keys_file.path.display();
    format!("keys {path}: {name} is overlooked: server.keys has its name, or its key, and it opens what it says there")
}

impl KeysReader {
    pub(super) fn new(process: &Process) -> Self {
        let Process { pool, keyring, config, .. } = process;
        Self { pool: Arc::clone(pool), keyring: keyring.clone(), config: config.clone(), seen: Arc::default() }
    }

    /// Reads the file for the first time. Returns why it cannot be used.
    pub(super) fn begin(&self) -> Result<(), String> {
        let keys = config::load_keys(&self.pool.load().server).map_err(|problems| problems.to_string())?;
        if !keys.is_empty() {
            self.take_in(keys);
        }
        Ok(())
    }

    /// Reads the file. A broken one changes nothing, and is logged once.
    fn read(&self) -> Result<String, String> {
        // Held all the while, so that nobody who read the file earlier puts its keys in place of newer ones.
        let mut last = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let pool = self.pool.load_full();
        let file = &pool.server.keys_file;
        let shown = file.path.display().to_string();
        let seen = (file.path.clone(), changed_at(&file.path));
        if self.keyring.has_file_keys() && !file.path.exists() {
            log::error!("keys {shown}: the file is gone, and its keys open nothing any more; put it back to open them");
        }
        let keys = match config::load_keys(&pool.server) {
            Ok(keys) => keys,
            Err(problems) => {
                let why = format!("keys {shown}: not applied, the keys before stay: {problems}");
                *last = Some(seen);
                if self.config.set_keys_error(Some(why.clone())) {
                    log::error!("{why}");
                    alerts::raise(AlertEvent::ConfigRefused, &shown, why.clone());
                }
                return Err(why);
            }
        };
        let count = keys.len();
        self.take_in(keys);
        self.config.set_keys_error(None);
        *last = Some(seen);
        Ok(format!("keys {shown}: loaded, {count} in all"))
    }

    fn take_in(&self, keys: Vec<config::ClientKey>) {
        let pool = self.pool.load();
        let file = &pool.server.keys_file;
        for name in self.keyring.set_file(keys) {
            log::warn!("{}", overlooked(&pool.server, &name));
        }
        if let Some(why) = file.openness() {
            log::warn!("{why}");
        }
    }

    /// Changes the file, and reads it again.
    pub(super) fn change(&self, change: KeysChange) -> Result<String, String> {
        let pool = self.pool.load_full();
        let endpoints: Vec<_> = pool.endpoints.iter().map(|endpoint| Arc::clone(&endpoint.config.id)).collect();
        let done = config::change_keys(&pool.server, &endpoints, change)?;
        let told = self.read()?;
        log::info!("{told}: {done}");
        Ok(done)
    }

    /// All keys, those of the config among them.
    pub(super) async fn list(&self) -> Vec<ListedKey> {
        let now = Timestamp::now();
        let (ledger, callers) = (self.pool.load().ledger.clone(), Arc::clone(&self.keyring.load()));
        let mut all = Vec::new();
        for caller in callers.all() {
            let mut listed = ListedKey::new(&caller.key, caller.is_of_config, now);
            if let Some(set) = &caller.budgets
                && let Some(views) = ledger.look_at_budgets(set).await
            {
                listed.budgets = views.iter().map(ListedBudget::new).collect();
            }
            all.push(listed);
        }
        all
    }

    fn is_changed(&self) -> bool {
        let path = self.pool.load().server.keys_file.path.clone();
        let found = (path.clone(), changed_at(&path));
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).as_ref() != Some(&found)
    }
}

fn changed_at(path: &Path) -> Option<(u64, SystemTime)> {
    let found = std::fs::metadata(path).ok()?;
    Some((found.ino(), found.modified().ok()?))
}

#[async_trait]
impl BackgroundService for KeysReader {
    async fn start(&self, _shutdown: ShutdownWatch) {
        let path = || self.pool.load().server.keys_file.path.clone();
        let mut watch = Watch::new(vec![path()]);
        // To the end of the process: what still runs in one that drains can be cut off.
        loop {
            watch.changed().await;
            watch.set_files(vec![path()]);
            if self.is_changed() {
                // What is wrong is logged there.
                if let Ok(told) = self.read() {
                    log::info!("{told}");
                }
            }
        }
    }
}
