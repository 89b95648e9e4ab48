//! `GET /v1/token/stats` and `POST /v1/token/reset`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Sources;
use super::status::{SERVICE, iso};
use crate::config::Rates;
use crate::fault::{Fault, excerpt};
use crate::ledger::stats::{Begins, ModelStats, Part, Stats};
use crate::routing::pool::Pool;
use crate::usage::prices::{NanoUsd, Priced};
use crate::usage::{Cost, Money, Sum};

/// Counts of every endpoint that ever answered, in any process that shares the ledger.
pub(super) async fn stats(from: Sources<'_>) -> Result<String, Fault> {
    // Writes the counts of this process first; if that fails, the written ones are shown.
    from.pool.ledger.flush().await;
    let statistics = Arc::clone(from.process.ledger.statistics());
    let now = SystemTime::now();
    let read = tokio::task::spawn_blocking(move || statistics.read(now)).await;
    let (stats, keys) = match read {
        Ok(Ok(read)) => read,
        Ok(Err(error)) => {
            log::error!("token statistics: {error}");
            return Err(Fault::StatsUnavailable);
        }
        Err(_) => return Err(Fault::Internal),
    };
    let begins = Begins::new(now, &from.pool.server.timezone);
    let shown = Shown { pool: from.pool, now };
    let detailed: Map<String, Value> =
        stats.iter().map(|(id, models)| (id.clone(), shown.endpoint(id, models))).collect();
    let by_key: Map<String, Value> = keys.iter().map(|(name, stats)| (name.clone(), shown.key(stats))).collect();
    Ok(json!({
        "service": SERVICE,
        "timestamp": iso(now),
        "summary": summary(&stats, begins),
        "detailedStats": detailed,
        "keys": by_key,
    })
    .to_string())
}

fn summary(stats: &Stats, begins: Begins) -> Value {
    let models = || stats.values().flat_map(BTreeMap::values);
    let cost = total(models());
    let Sum { requests, tokens } = cost.exact;
    let sum = |parts: fn(&ModelStats) -> &BTreeMap<i64, Part>, begin: i64| {
        let parts = models().filter_map(|model| parts(model).get(&begin));
        parts.fold(Part::default(), Part::plus)
    };
    let (hour, day) = (sum(|model| &model.hours, begins.hour), sum(|model| &model.days, begins.day));
    let summary = json!({
        "totalTokens": tokens.total,
        "totalRequests": requests,
        "totalPromptTokens": tokens.prompt,
        "totalCompletionTokens": tokens.completion,
        "currentHourTokens": hour.tokens,
        "currentDayTokens": day.tokens,
        "currentHourUsd": hour.spent.dollars(),
        "currentDayUsd": day.spent.dollars(),
        "averageTokensPerRequest": (tokens.total + requests / 2).checked_div(requests).unwrap_or(0),
        "activeApis": stats.len(),
    });
    with_details(summary, &cost)
}

/// Dollars; nothing, rather than 0, where no answer had a price.
pub(super) fn dollars(money: Money) -> Option<f64> {
    let is_known = money.spent > NanoUsd(0) || money.unpriced == 0;
    is_known.then(|| money.spent.dollars())
}

pub(super) fn total<'a>(models: impl Iterator<Item = &'a ModelStats>) -> Cost {
    let mut cost = Cost::default();
    models.for_each(|model| cost.merge(&model.cost));
    cost
}

/// Additional members of every level of the statistics. Estimates are kept apart from reported tokens.
fn with_details(mut level: Value, cost: &Cost) -> Value {
    let Cost { exact, estimated, speed, money } = cost;
    let average = |sum: u64, count: u64| (count > 0).then(|| sum / count);
    let details = json!({
        "cachedTokens": exact.tokens.cached,
        "reasoningTokens": exact.tokens.reasoning,
        "audioTokens": exact.tokens.audio,
        "usd": dollars(*money),
        "unpricedRequests": money.unpriced,
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

/// What statistics are shown with: the prices of the config that is loaded.
struct Shown<'a> {
    pool: &'a Pool,
    now: SystemTime,
}

impl Shown<'_> {
    /// Those of an endpoint.
    fn endpoint(&self, id: &str, models: &BTreeMap<String, ModelStats>) -> Value {
        let prices = self.pool.endpoints.iter().find(|endpoint| *endpoint.config.id == *id).map(|one| &one.prices);
        let by_model = models.iter().map(|(name, stats)| {
            let mut counts = counts(&stats.cost, stats.last_used_ms);
            let price = prices.and_then(|prices| prices.of(name, self.now));
            if let Value::Object(fields) = &mut counts {
                fields.insert("price".into(), price.map_or(Value::Null, |price| price_of(&price)));
            }
            (name.clone(), counts)
        });
        let by_model: Map<String, Value> = by_model.collect();
        let mut endpoint = counts(&total(models.values()), last_used(models.values()));
        if let Value::Object(fields) = &mut endpoint {
            fields.extend(parts(models.values()));
            fields.insert("models".into(), by_model.into());
        }
        endpoint
    }

    /// Those of a caller's key.
    fn key(&self, stats: &Stats) -> Value {
        let models = || stats.values().flat_map(BTreeMap::values);
        let mut key = counts(&total(models()), last_used(models()));
        if let Value::Object(fields) = &mut key {
            let days = merged(models(), |model| &model.days);
            fields.insert("dailyStats".into(), by_moment(&days, |part| json!(part.tokens)).into());
            fields.insert("dailyUsd".into(), by_moment(&days, |part| json!(part.spent.dollars())).into());
            let endpoints = stats.iter().map(|(id, models)| (id.clone(), self.endpoint(id, models)));
            fields.insert("endpoints".into(), endpoints.collect::<Map<_, _>>().into());
        }
        key
    }
}

/// A price as it is shown, in US dollars for a million tokens.
fn price_of(price: &Priced) -> Value {
    let Rates { input, cached, cache_written, audio_input, output, reasoning, audio_output } = price.rates;
    let dollars = |rate: u64| NanoUsd(rate).dollars();
    json!({
        "input": dollars(input),
        "cachedInput": dollars(cached),
        "cacheWrite": dollars(cache_written),
        "audioInput": dollars(audio_input),
        "output": dollars(output),
        "reasoning": dollars(reasoning),
        "audioOutput": dollars(audio_output),
        "longPromptsDiffer": price.is_tiered,
        "source": price.source,
    })
}

fn last_used<'a>(models: impl Iterator<Item = &'a ModelStats>) -> i64 {
    models.map(|model| model.last_used_ms).max().unwrap_or_default()
}

fn merged<'a>(
    models: impl Iterator<Item = &'a ModelStats>,
    parts: fn(&ModelStats) -> &BTreeMap<i64, Part>,
) -> BTreeMap<i64, Part> {
    let mut merged: BTreeMap<i64, Part> = BTreeMap::new();
    for (begin, part) in models.flat_map(parts) {
        let sum = merged.entry(*begin).or_default();
        *sum = sum.plus(part);
    }
    merged
}

/// What hours and days took.
fn parts<'a>(models: impl Iterator<Item = &'a ModelStats> + Clone) -> Map<String, Value> {
    let hours = merged(models.clone(), |model| &model.hours);
    let days = merged(models, |model| &model.days);
    let tokens = |parts: &BTreeMap<i64, Part>| by_moment(parts, |part| json!(part.tokens));
    let usd = |parts: &BTreeMap<i64, Part>| by_moment(parts, |part| json!(part.spent.dollars()));
    let sum = |parts: &BTreeMap<i64, Part>| parts.values().map(|part| part.tokens).sum::<u64>();
    let members = [
        ("hourlyTotal", json!(sum(&hours))),
        ("dailyTotal", json!(sum(&days))),
        ("hourlyStats", tokens(&hours).into()),
        ("dailyStats", tokens(&days).into()),
        ("hourlyUsd", usd(&hours).into()),
        ("dailyUsd", usd(&days).into()),
    ];
    members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
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

fn by_moment(parts: &BTreeMap<i64, Part>, shown: impl Fn(&Part) -> Value) -> Map<String, Value> {
    parts.iter().map(|(begin, part)| (iso(at(Duration::from_secs(begin.unsigned_abs()))), shown(part))).collect()
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
