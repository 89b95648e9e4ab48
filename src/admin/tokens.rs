//! `GET /v1/token/stats` and `POST /v1/token/reset`.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Sources;
use super::status::{SERVICE, iso};
use crate::fault::{Fault, excerpt};
use crate::ledger::stats::{self, Begins, ModelStats, Stats};
use crate::usage::{Cost, Sum};

/// Counts of every endpoint that ever answered, in any process that shares the ledger.
pub(super) async fn stats(from: Sources<'_>) -> Result<String, Fault> {
    // Writes the counts of this process first; if that fails, the written ones are shown.
    from.pool.ledger.flush().await;
    let path = from.process.ledger.path().to_owned();
    let now = SystemTime::now();
    let read = tokio::task::spawn_blocking(move || stats::read(&path, now)).await;
    let stats = match read {
        Ok(Ok(stats)) => stats,
        Ok(Err(error)) => {
            log::error!("token statistics: {error}");
            return Err(Fault::StatsUnavailable);
        }
        Err(_) => return Err(Fault::Internal),
    };
    let begins = Begins::new(now, &from.pool.server.timezone);
    let detailed: Map<String, Value> = stats.iter().map(|(id, models)| (id.clone(), endpoint(models))).collect();
    Ok(json!({
        "service": SERVICE,
        "timestamp": iso(now),
        "summary": summary(&stats, begins),
        "detailedStats": detailed,
    })
    .to_string())
}

fn summary(stats: &Stats, begins: Begins) -> Value {
    let models = || stats.values().flat_map(BTreeMap::values);
    let cost = total(models());
    let Sum { requests, tokens } = cost.exact;
    let sum = |parts: fn(&ModelStats) -> &BTreeMap<i64, u64>, begin: i64| -> u64 {
        models().filter_map(|model| parts(model).get(&begin)).sum()
    };
    let summary = json!({
        "totalTokens": tokens.total,
        "totalRequests": requests,
        "totalPromptTokens": tokens.prompt,
        "totalCompletionTokens": tokens.completion,
        "currentHourTokens": sum(|model| &model.hours, begins.hour),
        "currentDayTokens": sum(|model| &model.days, begins.day),
        "averageTokensPerRequest": (tokens.total + requests / 2).checked_div(requests).unwrap_or(0),
        "activeApis": stats.len(),
    });
    with_details(summary, &cost)
}

fn total<'a>(models: impl Iterator<Item = &'a ModelStats>) -> Cost {
    let mut cost = Cost::default();
    models.for_each(|model| cost.merge(&model.cost));
    cost
}

/// Additional members of every level of the statistics. Estimates are kept apart from reported tokens.
fn with_details(mut level: Value, cost: &Cost) -> Value {
    let Cost { exact, estimated, speed } = cost;
    let average = |sum: u64, count: u64| (count > 0).then(|| sum / count);
    let details = json!({
        "cachedTokens": exact.tokens.cached,
        "reasoningTokens": exact.tokens.reasoning,
        "audioTokens": exact.tokens.audio,
        "estimated": {
            "requests": estimated.requests,
            "promptTokens": estimated.tokens.prompt,
            "completionTokens": estimated.tokens.completion,
            "totalTokens": estimated.tokens.total,
        },
        "streams": {
            "requests": speed.streams,
            "averageFirstTokenMs": average(speed.first_token_ms, speed.streams),
            "averageTokensPerSecond": average(speed.tokens.saturating_mul(1000), speed.ms),
        },
    });
    if let (Value::Object(level), Value::Object(details)) = (&mut level, details) {
        level.extend(details);
    }
    level
}

fn endpoint(models: &BTreeMap<String, ModelStats>) -> Value {
    let cost = total(models.values());
    let last_used = models.values().map(|model| model.last_used_ms).max().unwrap_or_default();
    let merged = |parts: fn(&ModelStats) -> &BTreeMap<i64, u64>| {
        let mut merged: BTreeMap<i64, u64> = BTreeMap::new();
        for (begin, tokens) in models.values().flat_map(parts) {
            *merged.entry(*begin).or_default() += tokens;
        }
        merged
    };
    let (hours, days) = (merged(|model| &model.hours), merged(|model| &model.days));
    let by_model: Map<String, Value> =
        models.iter().map(|(name, stats)| (name.clone(), counts(&stats.cost, stats.last_used_ms))).collect();
    let mut endpoint = counts(&cost, last_used);
    if let Value::Object(fields) = &mut endpoint {
        fields.insert("hourlyTotal".into(), hours.values().sum::<u64>().into());
        fields.insert("dailyTotal".into(), days.values().sum::<u64>().into());
        fields.insert("hourlyStats".into(), by_moment(&hours).into());
        fields.insert("dailyStats".into(), by_moment(&days).into());
        fields.insert("models".into(), by_model.into());
    }
    endpoint
}

fn counts(cost: &Cost, last_used_ms: i64) -> Value {
    let Sum { requests, tokens } = cost.exact;
    let counts = json!({
        "totalTokens": tokens.total,
        "promptTokens": tokens.prompt,
        "completionTokens": tokens.completion,
        "requests": requests,
        "lastUsed": iso(at(Duration::from_millis(last_used_ms.unsigned_abs()))),
    });
    with_details(counts, cost)
}

fn by_moment(parts: &BTreeMap<i64, u64>) -> Map<String, Value> {
    parts.iter().map(|(begin, tokens)| (iso(at(Duration::from_secs(begin.unsigned_abs()))), json!(tokens))).collect()
}

fn at(since_1970: Duration) -> SystemTime {
    SystemTime::UNIX_EPOCH + since_1970
}

/// Forgets the statistics of the endpoint that the body names, or of all. What limits go by is not touched.
pub(super) async fn reset(from: Sources<'_>, body: &[u8]) -> Result<String, Fault> {
    #[derive(Deserialize, Default)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    struct Asked {
        api_id: Option<String>,
    }
    let asked = match body.trim_ascii() {
        [] => Asked::default(),
        body => serde_json::from_slice(body).map_err(|error| Fault::RequestInvalid {
            problem: format!("The body is neither empty nor {{\"apiId\":\"…\"}}: {error}."),
        })?,
    };
    let endpoint = match &asked.api_id {
        None => None,
        Some(id) => {
            let known = from.pool.endpoints.iter().find(|endpoint| endpoint.config.id.as_ref() == id);
            let known = known.ok_or_else(|| Fault::EndpointUnknown { id: excerpt(id) })?;
            Some(known.config.id.clone())
        }
    };
    if !from.pool.ledger.reset_tokens(endpoint.clone()).await {
        return Err(Fault::StatsUnavailable);
    }
    let whose = endpoint.as_deref().map_or_else(|| "all endpoints".to_owned(), |id| format!("endpoint {id}"));
    log::info!("the token statistics of {whose} were reset");
    Ok(json!({
        "success": true,
        "message": format!("The token statistics of {whose} were reset."),
        "apiId": endpoint.as_deref(),
        "timestamp": iso(SystemTime::now()),
    })
    .to_string())
}
