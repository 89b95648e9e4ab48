//! `GET /v1/models`: every name that an enabled endpoint serves or maps, whatever its limits and cool-downs just now, so
//! that the list does not flap.

use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use crate::fault::{Fault, excerpt};
use crate::routing::pool::Pool;

/// Creation time of every model. It is not known here, and the field must be a number.
const CREATED: u64 = 0;

pub(super) fn list(pool: &Pool) -> String {
    let models: Vec<Value> = pool.router.names().map(|name| model(pool, name)).collect();
    json!({ "object": "list", "data": models }).to_string()
}

pub(super) fn one(pool: &Pool, name: &str) -> Result<String, Fault> {
    let name = percent_decode_str(name).decode_utf8_lossy();
    match pool.router.find(&name) {
        Some(_) => Ok(model(pool, &name).to_string()),
        None => Err(Fault::ModelUnknown { model: excerpt(&name) }),
    }
}

/// A model in OpenAI's format. Its owner is the endpoint that is asked first.
fn model(pool: &Pool, name: &str) -> Value {
    let first = pool.router.find(name).and_then(|found| found.list().first());
    let owner = first.and_then(|candidate| pool.endpoints.get(candidate.endpoint)).map(|e| e.config.id.as_ref());
    json!({ "id": name, "object": "model", "created": CREATED, "owned_by": owner })
}
