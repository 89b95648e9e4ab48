//! Endpoints: what `GET /v1/status` shows of them, and switching, clearing and testing one.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Request, invalid};
use crate::admin::status::{self, Views};
use crate::config::SwitchedOff;
use crate::fault::{Fault, excerpt};
use crate::routing::pool::Endpoint;
use crate::telemetry::trends::Trend;

/// How an endpoint is switched off.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Disable {
    /// When it is switched on again; only by hand without it.
    #[schemars(with = "Option<String>")]
    until: Option<Timestamp>,
}

/// What is forgotten of an endpoint.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Clear {
    /// The one of its keys that is meant, as the status shows it; the endpoint and all its keys without it.
    key: Option<String>,
}

impl Request<'_> {
    fn endpoint(&self) -> Result<&Endpoint, Fault> {
        let is_it = |endpoint: &&std::sync::Arc<Endpoint>| *endpoint.config.id == *self.name;
        let found = self.from.pool.endpoints.iter().find(is_it);
        found
            .map(AsRef::as_ref)
            .ok_or_else(|| Fault::AdminNotFound { what: format!("endpoint {}", excerpt(self.name)) })
    }
}

/// The status, with the last hour of each endpoint.
pub(super) async fn list(request: &Request<'_>) -> Result<Value, Fault> {
    shown(request, |_| true).await
}

/// The same. Of other endpoints than these the keys are counted, and not listed.
pub(super) async fn shown(
    request: &Request<'_>,
    lists_keys: impl Fn(&str) -> bool + Send + 'static,
) -> Result<Value, Fault> {
    let process = request.from.process.clone();
    let pool = process.pool.load_full();
    let views = Views::look_at(&pool, |endpoint| lists_keys(&endpoint.config.id)).await;
    // Aside from the threads that serve: there may be a thousand endpoints.
    let made = tokio::task::spawn_blocking(move || {
        let mut status = status::value(&pool, &process, &views, |endpoint| lists_keys(&endpoint.config.id));
        let trends = process.trends.of_all(pool.first_bytes());
        for api in status.get_mut("apis").and_then(Value::as_array_mut).into_iter().flatten() {
            let trend =
                api.get("id").and_then(Value::as_str).and_then(|id| trends.get(id)).cloned().unwrap_or_default();
            if let Some(api) = api.as_object_mut() {
                api.insert("lastHour".to_owned(), last_hour(&trend));
            }
        }
        status
    });
    made.await.map_err(|_| Fault::Internal)
}

fn last_hour(trend: &Trend) -> Value {
    json!({ "attempts": trend.attempts, "failed": trend.failed, "firstByteMs": trend.first_byte_ms })
}

pub(super) async fn switch_off(request: &Request<'_>) -> Result<Value, Fault> {
    let Disable { until } = request.body()?;
    let endpoint = request.endpoint()?;
    if until.is_some_and(|until| until <= Timestamp::now()) {
        return Err(invalid("`until` is past. Name a moment to come, such as 2027-03-31T18:00:00Z, or leave it out."));
    }
    check_config(endpoint, "It is off in the config already.")?;
    let done = request.actions()?.switch(request.name, Some(SwitchedOff { until })).await;
    let told = match until {
        Some(until) => format!("disabled until {until}"),
        None => "disabled until it is enabled".to_owned(),
    };
    request.done("endpoints.disable", request.name, done.map(|_| told)).await
}

pub(super) async fn switch_on(request: &Request<'_>) -> Result<Value, Fault> {
    check_config(request.endpoint()?, "It is off in the config: set its `enabled` to true there.")?;
    let done = request.actions()?.switch(request.name, None).await;
    request.done("endpoints.enable", request.name, done.map(|_| "enabled".to_owned())).await
}

fn check_config(endpoint: &Endpoint, problem: &str) -> Result<(), Fault> {
    if endpoint.config.enabled || endpoint.config.switched_off.is_some() {
        return Ok(());
    }
    Err(Fault::AdminConflict { code: "endpoint_off_in_config", problem: problem.to_owned() })
}

/// Forgets what is held against an endpoint: cool-downs, rests, what it lacks. It is asked again at once.
pub(super) async fn clear(request: &Request<'_>) -> Result<Value, Fault> {
    let Clear { key } = request.body()?;
    let endpoint = request.endpoint()?;
    let lanes = endpoint.lanes.list().iter().filter_map(|lane| Some((&lane.config.label, lane.live()?)));
    let meant = |label: &str| key.as_deref().is_none_or(|key| key == label);
    let mut cleared: usize = 0;
    for (_, live) in lanes.filter(|(label, _)| meant(label)) {
        live.start_anew();
        cleared += 1;
    }
    let told = match &key {
        None => {
            endpoint.live.start_anew();
            "what was held against it is forgotten".to_owned()
        }
        Some(key) if cleared == 0 => return Err(Fault::AdminNotFound { what: format!("key {}", excerpt(key)) }),
        Some(key) => format!("what was held against its key {key} is forgotten"),
    };
    request.done("endpoints.clear", request.name, Ok(told)).await
}

pub(super) async fn test(request: &Request<'_>) -> Result<Value, Fault> {
    request.endpoint()?;
    let tested = request.actions()?.test(request.name).await;
    let told = tested.as_ref().map(|_| "tested".to_owned()).map_err(Clone::clone);
    request.done("endpoints.test", request.name, told).await?;
    let tested: Value = tested.ok().and_then(|json| serde_json::from_str(&json).ok()).unwrap_or_default();
    Ok(tested.get(0).cloned().unwrap_or_default())
}
