//! Channels of one-api, new-api and their kin. A channel with several keys is an endpoint for each.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Draft, Endpoint, base_url, number, text, vendors};
use crate::config::foreign::channels;

/// Azure's type.
const AZURE: i64 = 3;
/// State of a channel that is switched on.
const ENABLED: i64 = 1;

pub(super) fn read(file: &Value, draft: &mut Draft) {
    for (index, channel) in channels(file).into_iter().flatten().enumerate() {
        if let Err(why) = channel_of(channel, draft) {
            let name = text(channel, "name").unwrap_or("?");
            draft.note(format!("channel {} ({name}) is left out: {why}", index + 1));
        }
    }
    draft.note("users, tokens, groups and prices of one-api have no counterpart in this config");
}

fn channel_of(channel: &Value, draft: &mut Draft) -> Result<(), String> {
    let name = text(channel, "name").unwrap_or("channel");
    let kind = number(channel.get("type")).unwrap_or_default();
    if kind == AZURE {
        return Err(
            "Azure needs a baseUrl for each deployment, and `query` with its api-version; write it by hand".to_owned()
        );
    }
    let url = text(channel, "base_url").map(|theirs| vendors::of_channel(&base_url(theirs)));
    let url = url.or_else(|| vendors::of_channel_type(kind).map(str::to_owned));
    let url = url.ok_or_else(|| format!("it names no base_url, and its type {kind} is not known here"))?;
    let keys: Vec<&str> =
        text(channel, "key").unwrap_or_default().lines().map(str::trim).filter(|key| !key.is_empty()).collect();
    let keys = if keys.is_empty() { vec![""] } else { keys };
    let mapping: BTreeMap<String, String> =
        text(channel, "model_mapping").and_then(|mapping| serde_json::from_str(mapping).ok()).unwrap_or_default();
    let models: Vec<&str> = text(channel, "models")
        .unwrap_or_default()
        .split(',')
        .map(str::trim)
        .filter(|model| !model.is_empty())
        .collect();
    for key in keys {
        let id = draft.id(name);
        let key = draft.key(key, &id);
        let mut endpoint = Endpoint { id, base_url: url.clone(), key, ..Endpoint::default() };
        for model in &models {
            endpoint.serve(model, mapping.get(*model).map_or(*model, String::as_str));
        }
        if vendors::is_without_version(&url) {
            endpoint.more.insert("versionPath".to_owned(), "none".into());
        }
        if number(channel.get("status")).is_some_and(|status| status != ENABLED) {
            endpoint.more.insert("enabled".to_owned(), false.into());
        }
        // Theirs goes up with its importance, ours down.
        if let Some(priority) = number(channel.get("priority")).filter(|priority| *priority != 0) {
            endpoint.more.insert("priority".to_owned(), (1000 - priority).clamp(0, 65_535).into());
        } else {
            endpoint.more.insert("priority".to_owned(), 1000.into());
        }
        if let Some(weight) = number(channel.get("weight")).filter(|weight| (2..=65_535).contains(weight)) {
            endpoint.more.insert("weight".to_owned(), weight.into());
        }
        draft.endpoints.push(endpoint);
    }
    Ok(())
}
