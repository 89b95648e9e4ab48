//! Usage: what answers took by hour or day, from the same counts as `GET /v1/token/stats`.

use std::collections::BTreeMap;
use std::time::SystemTime;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Request, invalid};
use crate::fault::Fault;
use crate::ledger::stats::{self, Per, UsageRow};
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
    let data: Vec<Value> = sums.iter().map(|((begins, name), cost)| shown(*begins, name, cost)).collect();
    Ok(json!({ "per": per.name(), "data": data }))
}

async fn rows(request: &Request<'_>, (per, by_key): (Per, bool)) -> Result<Vec<UsageRow>, Fault> {
    // Writes the counts of this process first; if that fails, the written ones are shown.
    request.from.pool.ledger.flush().await;
    let path = request.from.process.ledger.path().to_owned();
    let read = tokio::task::spawn_blocking(move || stats::usage(&path, (per, by_key), SystemTime::now())).await;
    read.map_err(|_| Fault::Internal)?.map_err(|error| {
        log::error!("usage: {error}");
        Fault::StatsUnavailable
    })
}

fn shown(begins: i64, name: &str, cost: &Cost) -> Value {
    let Cost { exact, estimated, money, .. } = cost;
    json!({
        "begins": Timestamp::from_second(begins).unwrap_or_default(),
        "name": name,
        "requests": exact.requests,
        "promptTokens": exact.tokens.prompt,
        "completionTokens": exact.tokens.completion,
        "totalTokens": exact.tokens.total,
        "cachedTokens": exact.tokens.cached,
        "reasoningTokens": exact.tokens.reasoning,
        "audioTokens": exact.tokens.audio,
        "usd": money.spent.dollars(),
        "unpricedRequests": money.unpriced,
        "estimatedTokens": estimated.tokens.total,
    })
}
