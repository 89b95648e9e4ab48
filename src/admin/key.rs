//! `GET /v1/key`: what the key of a request opens, its limits, what is used of them, when they free, and what it has spent.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;

use super::Sources;
use super::status::{iso, quota, time_of};
use super::tokens;
use crate::config::{BudgetPeriod, BudgetUnit, CallKind, CallSet, ClientKey};
use crate::ledger::LimitedAccount;
use crate::ledger::budgets::BudgetView;
use crate::ledger::stats::{Begins, Part};
use crate::limit::{Clock, View};
use crate::usage::prices::NanoUsd;

pub(super) async fn key(from: Sources<'_>) -> String {
    let Some(caller) = from.caller else {
        // The server's one key, which opens everything.
        return json!({ "object": "key", "name": null, "limits": {}, "modelLimits": {} }).to_string();
    };
    let accounts: Vec<LimitedAccount> = caller.accounts.all().cloned().collect();
    let views = from.pool.ledger.look(accounts.clone()).await.unwrap_or_default();
    let clock = from.pool.clock();
    let mut of_models = Map::new();
    let mut whole = state(None, &clock);
    for (of, view) in accounts.iter().zip(&views) {
        let shown = state(Some((of, view)), &clock);
        match of.account.id().models() {
            None => whole = shown,
            Some(models) => drop(of_models.insert(models.to_string(), shown.into())),
        }
    }
    let ClientKey { name, models, calls, endpoints, expires, tags, .. } = &caller.key;
    let calls = (*calls != CallSet::ALL).then(|| calls.kinds().map(CallKind::name).collect::<Vec<_>>());
    let endpoints = endpoints.as_ref().filter(|_| from.pool.server.endpoint_headers);
    let mut key = Map::new();
    for (member, value) in [
        ("object", json!("key")),
        ("name", json!(&**name)),
        ("models", json!(models)),
        ("calls", json!(calls)),
        ("endpoints", json!(endpoints)),
        ("expires", json!(expires.map(|expires| expires.to_string()))),
        ("tags", json!(tags)),
    ] {
        key.insert(member.to_owned(), value);
    }
    key.extend(whole);
    key.insert("modelLimits".to_owned(), of_models.into());
    if let Some(set) = &caller.budgets {
        let views = from.pool.ledger.look_at_budgets(set).await;
        key.insert("budget".to_owned(), json!(views.map(|views| views.iter().map(budget).collect::<Vec<_>>())));
    }
    key.insert("spend".to_owned(), spend(&from, name).await);
    Value::Object(key).to_string()
}

/// A budget: what there is of it, what is taken, what is left, and when it begins anew.
fn budget(view: &BudgetView) -> Value {
    let BudgetView { kind, limit, totals, ends } = view;
    let amount = |number: u64| match kind.unit {
        BudgetUnit::NanoUsd => json!(NanoUsd(number).dollars()),
        BudgetUnit::Tokens => json!(number),
    };
    json!({
        "unit": match kind.unit {
            BudgetUnit::NanoUsd => "usd",
            BudgetUnit::Tokens => "tokens",
        },
        "per": kind.period.word(),
        "limit": amount(*limit),
        "spent": amount(totals.spent),
        "reserved": amount(totals.reserved),
        "left": amount(limit.saturating_sub(totals.taken())),
        // What nothing is taken of has not begun.
        "resets": ends.filter(|_| kind.period != BudgetPeriod::FiveHours || totals.taken() > 0).map(iso),
    })
}

/// Keys whose spend is read at once: each takes a thread and a connection to the ledger.
const READS_MAX: usize = 4;
static READS: Semaphore = Semaphore::const_new(READS_MAX);

/// What its requests took so far, since the statistics were reset; nothing while that cannot be read.
async fn spend(from: &Sources<'_>, name: &Arc<str>) -> Value {
    let Ok(_turn) = READS.acquire().await else { return Value::Null };
    // Writes the counts of this process first; if that fails, the written ones are shown.
    from.pool.ledger.flush().await;
    let (statistics, name, now) = (Arc::clone(from.process.ledger.statistics()), Arc::clone(name), SystemTime::now());
    let read = tokio::task::spawn_blocking(move || statistics.read_key(&name, now)).await;
    let Ok(Ok(stats)) = read else { return Value::Null };
    let models = || stats.values().flat_map(BTreeMap::values);
    let day = Begins::new(now, &from.pool.server.timezone).day;
    let today = models().filter_map(|model| model.days.get(&day)).fold(Part::default(), Part::plus);
    let cost = tokens::total(models());
    json!({
        "requests": cost.exact.requests.saturating_add(cost.estimated.requests),
        "tokens": cost.tokens(),
        "usd": tokens::dollars(cost.money),
        "unpricedRequests": cost.money.unpriced,
        "today": { "tokens": today.tokens, "usd": today.spent.dollars() },
    })
}

/// Each kind of limit of an account, and the one that holds requests up just now, until when.
fn state(account: Option<(&LimitedAccount, &View)>, clock: &Clock) -> Map<String, Value> {
    let limits = account.map_or_else(|| json!({}), |(of, view)| quota(&of.limits, view, view.used, clock));
    let held = account.and_then(|(_, view)| view.held);
    let mut state = Map::new();
    state.insert("limits".to_owned(), limits);
    state.insert("heldBy".to_owned(), json!(held.map(|held| held.by.to_string())));
    state.insert("frees".to_owned(), json!(held.map(|held| time_of(held.until, clock))));
    state
}
