//! uni-api's `api.yaml`. A provider with several keys is an endpoint for each.

use serde_json::{Map, Value};

use super::{Draft, Endpoint, base_url, text};

/// Settings of a provider that are read.
const READ: [&str; 6] = ["provider", "base_url", "api", "model", "tools", "preferences"];

pub(super) fn read(file: &Value, draft: &mut Draft) {
    for (index, provider) in file.get("providers").and_then(Value::as_array).into_iter().flatten().enumerate() {
        if let Err(why) = provider_of(provider, draft) {
            let name = text(provider, "provider").unwrap_or("?");
            draft.note(format!("providers[{index}] ({name}) is left out: {why}"));
        }
    }
    let callers: Vec<&Value> = file.get("api_keys").and_then(Value::as_array).into_iter().flatten().collect();
    if let Some(key) = callers.first().and_then(|caller| text(caller, "api")) {
        let spelt = draft.key(key, "client");
        draft.server.insert("apiKey".to_owned(), spelt.into());
    }
    if callers.len() > 1 {
        draft.note(format!("{} of the api_keys are left out: there is one client key", callers.len() - 1));
    }
    if callers.iter().any(|caller| caller.get("model").is_some() || caller.get("preferences").is_some()) {
        draft.note("models and preferences of api_keys are left out: a client key opens all models");
    }
}

fn provider_of(provider: &Value, draft: &mut Draft) -> Result<(), String> {
    let name = text(provider, "provider").unwrap_or("endpoint");
    let url = text(provider, "base_url").ok_or("it has no base_url")?;
    let keys: Vec<&str> = match provider.get("api") {
        Some(Value::String(key)) => vec![key],
        Some(Value::Array(keys)) => keys.iter().filter_map(Value::as_str).collect(),
        _ => return Err("it has no `api`, the key".to_owned()),
    };
    for key in &keys {
        let id = draft.id(name);
        let key = draft.key(key, &id);
        let mut endpoint = Endpoint { id, base_url: with_openai(base_url(url)), key, ..Endpoint::default() };
        match provider.get("model").and_then(Value::as_array) {
            Some(models) => models.iter().for_each(|model| serve(&mut endpoint, model)),
            None => endpoint.models.push("*".to_owned()),
        }
        draft.endpoints.push(endpoint);
    }
    if provider.get("model").is_none() {
        draft.note(format!("{name}: it names no models, so it serves every name"));
    }
    if provider.get("preferences").is_some() {
        draft.note(format!("{name}: preferences are left out; limits are `rpm` and `rpd` here"));
    }
    let others: Vec<&str> = provider
        .as_object()
        .into_iter()
        .flat_map(Map::keys)
        .map(String::as_str)
        .filter(|key| !READ.contains(key))
        .collect();
    if !others.is_empty() {
        draft.note(format!("{name}: {} left out", others.join(", ")));
    }
    Ok(())
}

/// Gemini's API has OpenAI's format in a part of its own.
fn with_openai(url: String) -> String {
    let is_gemini = url.contains("generativelanguage.googleapis.com") && !url.ends_with("/openai");
    if is_gemini { format!("{url}/openai") } else { url }
}

/// A name, or `{sent: asked}`.
fn serve(endpoint: &mut Endpoint, model: &Value) {
    match model {
        Value::String(name) => endpoint.serve(name, name),
        Value::Object(renamed) => {
            for (sent, asked) in renamed {
                endpoint.serve(asked.as_str().unwrap_or(sent), sent);
            }
        }
        _ => {}
    }
}
