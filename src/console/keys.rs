//! Keys of clients: listing, adding, rotating, raising and revoking them, as `api-together keys` does.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Request, invalid, shown};
use crate::config::KeysChange;
use crate::fault::Fault;
use crate::routing::generated_key::GeneratedKey;

/// Hours for which the key before another one opens beside it, unless said otherwise.
const OVERLAP_HOURS_DEFAULT: u32 = 24;

/// How a key is put in place of another one.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Rotate {
    /// Hours for which the key before still opens; 24 unless said otherwise.
    overlap_hours: Option<u32>,
}

/// More of a budget, for a while.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Raise {
    /// How much more.
    by: f64,
    /// `usd` or `tokens`; may be left out where there is one budget.
    unit: Option<String>,
    /// Period of the budget; may be left out where there is one budget.
    per: Option<String>,
    /// Until when: a day, or a moment.
    until: String,
}

/// Keys of callers.
#[derive(Serialize, JsonSchema)]
pub(super) struct KeyList {
    data: Vec<KeyRow>,
}

/// A key.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct KeyRow {
    /// Its name.
    name: String,
    /// `open`, `off`, `expired` or `revoked`.
    state: String,
    /// When it was used last.
    #[serde(default)]
    last_used: Option<String>,
    /// Its limits, budgets, and what it opens, as `api-together keys list --json` shows them.
    #[serde(flatten)]
    more: Map<String, Value>,
}

/// A key that was made.
#[derive(Serialize, JsonSchema)]
pub(super) struct MadeKey {
    /// What was done.
    message: Value,
    /// The key, which is shown this once.
    key: String,
}

pub(super) async fn list(request: &Request<'_>) -> Result<Value, Fault> {
    let keys = request.actions()?.keys().await.map_err(|_| Fault::Internal)?;
    let mut data: Vec<KeyRow> = serde_json::from_str(&keys).map_err(|_| Fault::Internal)?;
    let used = last_used(request).await;
    for key in &mut data {
        let used = used.get(&key.name).and_then(|used| Timestamp::from_millisecond(*used).ok());
        key.last_used = used.map(|used| used.to_string());
    }
    shown(&KeyList { data })
}

/// When each key was used last, in milliseconds of Unix time; empty if the ledger cannot be read.
async fn last_used(request: &Request<'_>) -> BTreeMap<String, i64> {
    let statistics = Arc::clone(request.from.process.ledger.statistics());
    let read = tokio::task::spawn_blocking(move || statistics.last_used_of_keys()).await;
    read.ok().and_then(Result::ok).unwrap_or_default()
}

pub(super) async fn add(request: &Request<'_>) -> Result<Value, Fault> {
    let entry: Map<String, Value> = request.body()?;
    if let Some(own) = ["key", "keyHash", "hashes", "lastFour", "created"].iter().find(|own| entry.contains_key(**own))
    {
        return Err(invalid(&format!("`{own}` is not for you to say: the gateway makes the key, and shows it once.")));
    }
    let name = entry.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
    let key = new_key()?;
    let done = request.actions()?.change_keys(key.add(entry)).await;
    with_key(request.done("keys.add", &name, done).await?, &key)
}

pub(super) async fn rotate(request: &Request<'_>) -> Result<Value, Fault> {
    let Rotate { overlap_hours } = request.body()?;
    let overlap = SignedDuration::from_hours(overlap_hours.unwrap_or(OVERLAP_HOURS_DEFAULT).into());
    let until = Timestamp::now().checked_add(overlap).map_err(|_| invalid("`overlapHours` is too long."))?;
    let key = new_key()?;
    let done = request.actions()?.change_keys(key.rotate(request.name.to_owned(), until)).await;
    with_key(request.done("keys.rotate", request.name, done).await?, &key)
}

pub(super) async fn raise(request: &Request<'_>) -> Result<Value, Fault> {
    let Raise { by, unit, per, until } = request.body()?;
    let change = KeysChange::Raise { name: request.name.to_owned(), by, unit, per, until };
    let done = request.actions()?.change_keys(change).await;
    request.done("keys.raise", request.name, done).await
}

pub(super) async fn revoke(request: &Request<'_>) -> Result<Value, Fault> {
    let now = request.parsed::<bool>("now", "true or false")?.unwrap_or_default();
    let done = request.actions()?.change_keys(KeysChange::Revoke { name: request.name.to_owned(), now }).await;
    request.done("keys.revoke", request.name, done).await
}

fn new_key() -> Result<GeneratedKey, Fault> {
    GeneratedKey::new().map_err(|_| Fault::Internal)
}

/// The key goes to the one who asked for it, this once.
fn with_key(mut answer: Value, key: &GeneratedKey) -> Result<Value, Fault> {
    let message = answer.get_mut("message").map(Value::take).unwrap_or_default();
    shown(&MadeKey { message, key: key.expose().to_owned() })
}
