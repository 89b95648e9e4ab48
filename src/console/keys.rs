//! Keys of clients: listing, adding, rotating, raising and revoking them, as `api-together keys` does.

use std::collections::BTreeMap;
use std::time::SystemTime;

use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Request, invalid};
use crate::config::KeysChange;
use crate::fault::Fault;
use crate::ledger::stats;
use crate::routing::generated_key::GeneratedKey;

/// Hours for which the key before another one opens beside it, unless said otherwise.
const OVERLAP_HOURS_DEFAULT: u32 = 24;

/// How a key is put in place of another one.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rotate {
    overlap_hours: Option<u32>,
}

/// More of a budget, for a while.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Raise {
    by: f64,
    unit: Option<String>,
    per: Option<String>,
    until: String,
}

pub(super) async fn list(request: &Request<'_>) -> Result<Value, Fault> {
    let keys = request.actions()?.keys().await.map_err(|_| Fault::Internal)?;
    let mut keys: Vec<Map<String, Value>> = serde_json::from_str(&keys).map_err(|_| Fault::Internal)?;
    let used = last_used(request).await;
    for key in &mut keys {
        let name = key.get("name").and_then(Value::as_str).unwrap_or_default();
        let used = used.get(name).and_then(|used| Timestamp::from_millisecond(*used).ok());
        key.insert("lastUsed".to_owned(), used.map_or(Value::Null, |used| used.to_string().into()));
    }
    Ok(json!({ "data": keys }))
}

/// When each key was used last, in milliseconds of Unix time; empty if the ledger cannot be read.
async fn last_used(request: &Request<'_>) -> BTreeMap<String, i64> {
    let path = request.from.process.ledger.path().to_owned();
    let read = tokio::task::spawn_blocking(move || stats::read(&path, SystemTime::now())).await;
    let Ok(Ok((_, keys))) = read else { return BTreeMap::new() };
    let last = |of_key: &stats::Stats| {
        of_key.values().flat_map(BTreeMap::values).map(|model| model.last_used_ms).max().unwrap_or_default()
    };
    keys.iter().map(|(name, of_key)| (name.clone(), last(of_key))).collect()
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
    answer.as_object_mut().ok_or(Fault::Internal)?.insert("key".to_owned(), key.expose().into());
    Ok(answer)
}
