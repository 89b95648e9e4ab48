//! `GET /v1/models`: every name that an enabled endpoint serves or maps, whatever its limits and cool-downs just now, so
//! that the list does not flap. Where endpoints list their models themselves, patterns show what they match of them.

use std::collections::BTreeSet;

use percent_encoding::percent_decode_str;
use serde_json::{Map, Value, json};

use crate::fault::{Fault, excerpt};
use crate::routing::callers::Caller;
use crate::routing::pool::{Endpoint, Pool};
use crate::routing::router::{Candidate, Candidates};

/// Creation time of a model whose endpoint does not say one; the field must be a number.
const CREATED: u64 = 0;
/// Owner of all models where clients may not know the endpoints.
const OWNER: &str = "api-together";

/// The models that a caller may ask for; of one without a key of its own, all.
pub(crate) fn list(pool: &Pool, caller: Option<&Caller>) -> String {
    let mut names: BTreeSet<&str> = pool.router.names().collect();
    let lists: Vec<_> = pool.endpoints.iter().map(|endpoint| (endpoint, endpoint.live.discovered.list())).collect();
    for (endpoint, list) in &lists {
        let listed = list.iter().flat_map(|list| list.keys()).map(AsRef::as_ref);
        names.extend(listed.filter(|name| is_served_by_pattern(endpoint, name)));
    }
    names.retain(|name| is_open(pool, caller, name));
    let models: Vec<Value> = names.into_iter().map(|name| model(pool, name)).collect();
    json!({ "object": "list", "data": models }).to_string()
}

/// True if a caller may ask for a model, at an endpoint that it may use, and where it has a price if that has to fit into a budget.
fn is_open(pool: &Pool, caller: Option<&Caller>, name: &str) -> bool {
    let Some(caller) = caller else { return true };
    let counts_money = caller.budgets.as_ref().is_some_and(|budgets| budgets.counts_money());
    let wall = pool.clock().wall;
    let may_take = |candidates: &Candidates, candidate: &Candidate| {
        let has_price = |endpoint: &Endpoint| {
            let model = candidates.model_of(candidate, Some(name));
            endpoint.prices.of(model.name, wall).is_some()
        };
        pool.endpoints.get(candidate.endpoint).is_some_and(|endpoint| {
            caller.key.allows_endpoint(&endpoint.config.id) && (!counts_money || has_price(endpoint))
        })
    };
    let can_be_served =
        || pool.router.find(name).is_some_and(|found| found.list().iter().any(|candidate| may_take(found, candidate)));
    caller.key.allows_model(name) && (caller.key.endpoints.is_none() && !counts_money || can_be_served())
}

pub(super) fn one(pool: &Pool, name: &str, caller: Option<&Caller>) -> Result<String, Fault> {
    let name = percent_decode_str(name).decode_utf8_lossy();
    if let Some(caller) = caller.filter(|_| !is_open(pool, caller, &name)) {
        return Err(caller.no_model(&name));
    }
    match pool.router.find(&name) {
        Some(_) => Ok(model(pool, &name).to_string()),
        None => Err(Fault::ModelUnknown { model: excerpt(&name) }),
    }
}

/// True if an endpoint is asked for a model under its own name because a pattern of its matches it.
fn is_served_by_pattern(endpoint: &Endpoint, name: &str) -> bool {
    let config = &endpoint.config;
    let patterns = config.models.iter().filter_map(|pattern| pattern.strip_suffix('*'));
    let is_mapped = config.model_mapping.keys().any(|asked| match asked.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => asked == name,
    });
    config.usable() && config.discovery.is_some() && !is_mapped && patterns.into_iter().any(|one| name.starts_with(one))
}

/// A model in OpenAI's format, with what its endpoint says of it. Its owner is the endpoint that is asked first.
fn model(pool: &Pool, name: &str) -> Value {
    let first = pool.router.find(name).and_then(|found| found.list().first());
    let endpoint = first.and_then(|candidate| pool.endpoints.get(candidate.endpoint));
    let sent = first.and_then(|candidate| candidate.model.as_deref()).unwrap_or(name);
    let list = endpoint.and_then(|endpoint| endpoint.live.discovered.list());
    let said = list.as_ref().and_then(|list| list.get(sent));
    let created = said.and_then(|said| said.get("created")).filter(|created| created.is_number()).cloned();
    let owner = endpoint.map(|endpoint| if pool.server.endpoint_headers { &*endpoint.config.id } else { OWNER });
    let mut model = Map::new();
    model.insert("id".into(), name.into());
    model.insert("object".into(), "model".into());
    model.insert("created".into(), created.unwrap_or_else(|| CREATED.into()));
    model.insert("owned_by".into(), owner.into());
    for (key, value) in said.into_iter().flatten() {
        if !model.contains_key(key) {
            model.insert(key.clone(), value.clone());
        }
    }
    Value::Object(model)
}
