//! Usage: what answers took by hour or day, from the same counts as `GET /v1/token/stats`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use http::{HeaderValue, header};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use super::{Request, invalid, shown};
use crate::admin::Answer;
use crate::fault::Fault;
use crate::ledger::stats::{Per, UsageRow};
use crate::telemetry::plain_text::csv_field;
use crate::usage::Cost;

/// What a series is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Endpoint,
    Model,
    Key,
}

impl std::str::FromStr for By {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "endpoint" => Ok(Self::Endpoint),
            "model" => Ok(Self::Model),
            "key" => Ok(Self::Key),
            _ => Err(()),
        }
    }
}

pub(super) async fn series(request: &Request<'_>) -> Result<Value, Fault> {
    let by = request.parsed::<By>("by", "endpoint, model or key")?.unwrap_or(By::Endpoint);
    let per = match request.parameter("per").as_deref() {
        None | Some("" | "day") => Per::Day,
        Some("hour") if by == By::Key => {
            return Err(invalid("Usage by key is counted by the day: leave `per` out, or set it to day."));
        }
        Some("hour") => Per::Hour,
        Some(_) => return Err(invalid("The parameter per has to be hour or day.")),
    };
    let since = request.parsed::<Timestamp>("since", "a moment such as 2027-03-31T18:00:00Z")?;
    let rows = rows(request, (per, by == By::Key)).await?;
    let mut sums: BTreeMap<(i64, String), Cost> = BTreeMap::new();
    for UsageRow { begins, endpoint, model, key, cost } in rows {
        if since.is_some_and(|since| begins < since.as_second()) {
            continue;
        }
        let name = match by {
            By::Endpoint => endpoint,
            By::Model => model,
            By::Key => key.unwrap_or_default(),
        };
        sums.entry((begins, name)).or_default().merge(&cost);
    }
    let data = sums.iter().map(|((begins, name), cost)| UsagePart::new(*begins, name, cost)).collect();
    shown(&UsageSeries { per: per.name(), data })
}

/// True if the series is asked for as comma-separated values.
pub(super) fn is_csv(request: &Request<'_>) -> bool {
    request.parameter("format").is_some_and(|format| format == "csv")
}

/// The series as comma-separated values.
pub(super) async fn csv(request: &Request<'_>) -> Result<Answer, Fault> {
    let series = series(request).await?;
    let mut text = COLUMNS.join(",");
    text.push('\n');
    for part in series.get("data").and_then(Value::as_array).into_iter().flatten() {
        let field = |column: &&str| match part.get(column) {
            Some(Value::String(field)) => csv_field(field),
            Some(other) => other.to_string(),
            None => String::new(),
        };
        text.push_str(&COLUMNS.iter().map(field).collect::<Vec<_>>().join(","));
        text.push('\n');
    }
    let mut answer = Answer::text(text);
    answer.headers = vec![
        (header::CONTENT_TYPE, HeaderValue::from_static("text/csv; charset=utf-8")),
        (header::CONTENT_DISPOSITION, HeaderValue::from_static("attachment; filename=\"usage.csv\"")),
    ];
    Ok(answer)
}

/// Columns of these, by their names in JSON.
const COLUMNS: [&str; 12] = [
    "begins",
    "name",
    "requests",
    "promptTokens",
    "completionTokens",
    "totalTokens",
    "cachedTokens",
    "reasoningTokens",
    "audioTokens",
    "usd",
    "unpricedRequests",
    "estimatedTokens",
];

async fn rows(request: &Request<'_>, (per, by_key): (Per, bool)) -> Result<Vec<UsageRow>, Fault> {
    // Writes the counts of this process first; if that fails, the written ones are shown.
    request.from.pool.ledger.flush().await;
    let statistics = Arc::clone(request.from.process.ledger.statistics());
    let read = tokio::task::spawn_blocking(move || statistics.usage((per, by_key), SystemTime::now())).await;
    read.map_err(|_| Fault::Internal)?.map_err(|error| {
        log::error!("usage: {error}");
        Fault::StatsUnavailable
    })
}

/// What was taken, by hour or day.
#[derive(Serialize, JsonSchema)]
pub(super) struct UsageSeries {
    /// `hour` or `day`.
    per: &'static str,
    data: Vec<UsagePart>,
}

/// What was taken in an hour or a day.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct UsagePart {
    /// Its beginning.
    #[schemars(with = "String")]
    begins: Timestamp,
    /// The endpoint, model or key.
    name: String,
    /// Answers whose tokens were reported.
    requests: u64,
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    /// Tokens of prompts that came from a cache.
    cached_tokens: u64,
    reasoning_tokens: u64,
    audio_tokens: u64,
    /// What they cost, estimates included.
    usd: f64,
    /// Answers whose model has no price.
    unpriced_requests: u64,
    /// Tokens that were estimated where endpoints reported none.
    estimated_tokens: u64,
}

impl UsagePart {
    fn new(begins: i64, name: &str, cost: &Cost) -> Self {
        let Cost { exact, estimated, money, .. } = cost;
        Self {
            begins: Timestamp::from_second(begins).unwrap_or_default(),
            name: name.to_owned(),
            requests: exact.requests,
            prompt_tokens: exact.tokens.prompt,
            completion_tokens: exact.tokens.completion,
            total_tokens: exact.tokens.total,
            cached_tokens: exact.tokens.cached,
            reasoning_tokens: exact.tokens.reasoning,
            audio_tokens: exact.tokens.audio,
            usd: money.spent.dollars(),
            unpriced_requests: money.unpriced,
            estimated_tokens: estimated.tokens.total,
        }
    }
}
