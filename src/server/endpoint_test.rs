//! `api-together test`: asks an endpoint step by step, on the way that requests take, until one step fails.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::config::{CallKind, Config, Trouble};
use crate::exchange::own_call::{OwnAnswer, OwnCall, OwnCalls, Why};
use crate::fault::excerpt;
use crate::ledger::{AccountSet, Drawn, Keeper, Permit, Spent};
use crate::response::classify;
use crate::response::vendor_error::VendorError;
use crate::routing::pool::{Endpoint, Pool};
use crate::routing::router::ModelName;
use crate::upstream::ConnectStage;
use crate::usage::prices::PricedTokens;
use crate::usage::{Cost, Reported, Speed, Tokens};

/// Endpoints that are tested at once.
const AT_ONCE: usize = 8;
/// Keys of one endpoint that are tried.
const KEYS_MAX: usize = 20;
/// Names of models that are missing at an endpoint, and shown.
const SHOWN_MAX: usize = 5;

/// What came of a test.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tested {
    /// The endpoint's id.
    pub endpoint: String,
    /// Its base URL.
    pub base_url: String,
    /// Each step that was taken, the last of which may have failed.
    pub steps: Vec<Step>,
}

/// One step of a test.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Name.
    pub name: String,
    /// Result.
    pub result: StepResult,
    /// What was seen.
    pub what: String,
    /// The way out, if it failed.
    pub way_out: String,
}

/// Result of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum StepResult {
    /// As it should be.
    Ok,
    /// It says nothing.
    Unknown,
    /// It failed.
    Failed,
}

impl Tested {
    /// True if every step went well.
    pub fn is_well(&self) -> bool {
        self.steps.iter().all(|step| step.result != StepResult::Failed)
    }

    /// True if its last step went well: it answers, whichever of its keys do not.
    pub fn has_answered(&self) -> bool {
        self.steps.last().is_some_and(|step| step.result != StepResult::Failed)
    }

    fn note(&mut self, name: &str, result: StepResult, what: impl Into<String>, way_out: impl Into<String>) {
        self.steps.push(Step { name: name.to_owned(), result, what: what.into(), way_out: way_out.into() });
    }

    fn failed(mut self, name: &str, why: Why) -> Self {
        self.note(name, StepResult::Failed, why.0, why.1);
        self
    }
}

/// Tests an endpoint of the config, or all that are switched on. `counted`: each takes a permit.
pub(super) async fn of_pool(pool: &Arc<Pool>, named: Option<&str>, counted: bool) -> Result<Vec<Tested>, String> {
    let wanted = |endpoint: &&Arc<Endpoint>| match named {
        Some(id) => endpoint.config.id.as_ref() == id,
        None => endpoint.config.enabled,
    };
    let endpoints: Vec<_> = pool.endpoints.iter().filter(wanted).map(Arc::clone).collect();
    if let (true, Some(id)) = (endpoints.is_empty(), named) {
        let ids: Vec<_> = pool.endpoints.iter().map(|endpoint| endpoint.config.id.as_ref()).collect();
        return Err(format!("no endpoint of the config has the id {id:?}; there are {}", ids.join(", ")));
    }
    let (places, mut tests) = (Arc::new(Semaphore::new(AT_ONCE)), JoinSet::new());
    for (index, endpoint) in endpoints.into_iter().enumerate() {
        let (pool, places) = (Arc::clone(pool), Arc::clone(&places));
        tests.spawn(async move {
            // Never closed.
            let _place = places.acquire_owned().await;
            (index, one(&pool, &endpoint, counted).await)
        });
    }
    let mut tested = tests.join_all().await;
    tested.sort_by_key(|(index, _)| *index);
    Ok(tested.into_iter().map(|(_, tested)| tested).collect())
}

/// Tests the endpoints of a config with which no process runs. Without a ledger nothing is counted, so that none is made here, which
/// might then belong to another user than the process's.
pub fn of_config(config: Config, named: Option<&str>) -> Result<Vec<Tested>, String> {
    let keeper = Keeper::new(&config.server);
    let counted = config.server.shared_ledger.is_some() || config.server.ledger.exists();
    if counted {
        keeper.start().map_err(|error| format!("the ledger's thread cannot be started: {error}"))?;
    }
    let pool = Pool::new(config, keeper.client().clone(), None)
        .map_err(|error| format!("an endpoint cannot be set up: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let tested = runtime.map_err(|error| error.to_string())?.block_on(of_pool(&Arc::new(pool), named, counted));
    if counted {
        keeper.close();
    }
    tested
}

async fn one(pool: &Pool, endpoint: &Endpoint, counted: bool) -> Tested {
    let base_url = endpoint.config.base_url.to_string();
    let mut tested = Tested { endpoint: endpoint.config.id.to_string(), base_url, steps: Vec::new() };
    let begun = Instant::now();
    let upstream = endpoint.upstream_of(CallKind::Other);
    let address = match upstream.resolve().await.map(|found| found.first().copied()) {
        Ok(Some(address)) => address,
        Ok(None) => return tested.failed("name", no_address("it has no address")),
        Err(error) => return tested.failed("name", no_address(&error.to_string())),
    };
    if upstream.has_name() {
        tested.note("name", StepResult::Ok, format!("{} is {}", upstream.name(), address.ip()), "");
    }
    let mut calls = OwnCalls::new(endpoint, (CallKind::Other, 0), address);
    if let Err(error) = calls.connect().await {
        let step = if error.stage == ConnectStage::Tls { "TLS" } else { "connect" };
        if error.stage == ConnectStage::Tls {
            tested.note("connect", StepResult::Ok, address.to_string(), "");
        }
        return tested.failed(step, (error.what, error.way_out.to_owned()));
    }
    let with_tls = if endpoint.config.base_url.tls { " with TLS" } else { "" };
    tested.note("connect", StepResult::Ok, format!("{address}{with_tls}, {} ms", begun.elapsed().as_millis()), "");
    let Some((names, accepted)) = keys(&mut tested, &mut calls).await else { return tested };
    let Some(model) = model_to_ask(endpoint, &names) else {
        let what = "not asked: the config names no model, only patterns, and the endpoint lists none that fits";
        tested.note("answer", StepResult::Unknown, what, "");
        return tested;
    };
    // One of those that are accepted, and for this model.
    let clock = pool.clock();
    let fits = |lane: &usize| {
        let lane = endpoint.lanes.get(*lane);
        lane.is_some_and(|lane| lane.config.has_model(&model) && !lane.seems_full(clock.boot))
    };
    if let Some(lane) = accepted.into_iter().find(fits) {
        calls.lane = lane;
    }
    match answer(&calls, pool, &model, counted).await {
        Ok(what) => tested.note("answer", StepResult::Ok, what, ""),
        Err(why) => return tested.failed("answer", why),
    }
    tested
}

/// Asks for the list of models with each key. Returns the names in the first list, and the keys that are accepted; none if the endpoint
/// cannot be used.
async fn keys(tested: &mut Tested, calls: &mut OwnCalls<'_>) -> Option<(BTreeSet<String>, Vec<usize>)> {
    let endpoint = calls.endpoint;
    let all = endpoint.lanes.list().len();
    let (mut first, mut accepted) = (None, Vec::new());
    for (lane, config) in endpoint.lanes.list().iter().map(|lane| &lane.config).enumerate().take(KEYS_MAX) {
        calls.lane = lane;
        match calls.ask(OwnCall::get("/v1/models")).await {
            Err(why) => {
                tested.note("models", StepResult::Failed, why.0, why.1);
                return None;
            }
            Ok(listed) if all > 1 && meaning_of(&listed, endpoint).0 == Trouble::Key && listed.status != 200 => {
                let (meaning, words) = meaning_of(&listed, endpoint);
                let what = format!("{} is refused with {}{words}", config.label, listed.status);
                tested.note("key", StepResult::Failed, what, way_out(meaning));
            }
            Ok(listed) => {
                accepted.push(lane);
                first.get_or_insert(listed);
            }
        }
    }
    let listed = first?;
    if all > KEYS_MAX {
        let what = format!("{KEYS_MAX} of {all} were tried");
        tested.note("keys", StepResult::Unknown, what, "`api-together status` says how the others do");
    }
    calls.lane = accepted.first().copied().unwrap_or_default();
    let what = match all {
        1 => "accepted".to_owned(),
        all => format!("{} of {} accepted", accepted.len(), all.min(KEYS_MAX)),
    };
    Some((models(tested, endpoint, &listed, &what)?, accepted))
}

fn no_address(why: &str) -> Why {
    (why.to_owned(), "is the host of baseUrl spelt right, and does this machine have a name server?".to_owned())
}

/// Takes in the list of models, which needs the key as well. None if it shows that the endpoint cannot be used.
fn models(tested: &mut Tested, endpoint: &Endpoint, listed: &OwnAnswer, accepted: &str) -> Option<BTreeSet<String>> {
    let list = || Some(serde_json::from_slice::<Value>(&listed.body).ok()?.get("data")?.as_array()?.clone());
    match (listed.status, list()) {
        (200, Some(list)) => {
            let id = |model: &Value| model.get("id").and_then(Value::as_str).map(str::to_owned);
            let names: BTreeSet<String> = list.iter().filter_map(id).collect();
            tested.note("key", StepResult::Ok, accepted, "");
            let exact = endpoint.config.sent_models().filter(|name| !name.ends_with('*'));
            let missing: BTreeSet<&str> = exact.filter(|name| !names.contains(*name)).collect();
            let count = names.len();
            if missing.is_empty() {
                tested.note("models", StepResult::Ok, format!("{count} listed"), "");
            } else {
                let shown = missing.iter().take(SHOWN_MAX).copied().collect::<Vec<_>>().join(", ");
                let what = format!("{count} listed, without {shown} ({} of the config's)", missing.len());
                tested.note(
                    "models",
                    StepResult::Unknown,
                    what,
                    "some vendors do not list all; the answer below says more",
                );
            }
            Some(names)
        }
        (status, _) => {
            let (meaning, words) = meaning_of(listed, endpoint);
            if meaning == Trouble::Key {
                let what = format!("refused with {status}{words}");
                tested.note("key", StepResult::Failed, what, way_out(meaning));
                return None;
            }
            tested.note("models", StepResult::Unknown, format!("no list: {status}{words}"), "");
            Some(BTreeSet::new())
        }
    }
}

/// The model that is asked: one that the config names, or else a listed one that fits a pattern.
fn model_to_ask(endpoint: &Endpoint, listed: &BTreeSet<String>) -> Option<String> {
    let config = &endpoint.config;
    let exact = || config.sent_models().filter(|name| !name.ends_with('*'));
    let fits = |name: &&String| {
        let patterns = config.models.iter().filter_map(|pattern| pattern.strip_suffix('*'));
        patterns.into_iter().any(|beginning| name.starts_with(beginning))
    };
    exact()
        .find(|name| listed.contains(*name))
        .or_else(|| exact().next())
        .map(str::to_owned)
        .or_else(|| listed.iter().filter(fits).max_by_key(|name| name.contains("chat")).cloned())
}

async fn draw(pool: &Pool, (endpoint, lane): (&Endpoint, usize), model: &str) -> Result<Permit, Why> {
    match pool.draw_for_own_call(&accounts(endpoint, lane, model)).await {
        Drawn::Granted(_, permit) => Ok(permit),
        Drawn::Refused(refusal) => {
            let limit = refusal.held.first().map(|held| held.held.by.to_string()).unwrap_or_default();
            let what = format!("not asked: the endpoint is full ({limit})");
            Err((what, format!("try again in {} s", refusal.wait.as_secs_f64().ceil())))
        }
        Drawn::Unavailable => Err((
            "not asked: the ledger cannot be used, so nothing can be counted".to_owned(),
            "`api-together status` and the log say why".to_owned(),
        )),
    }
}

fn accounts<'a>(endpoint: &'a Endpoint, lane: usize, model: &str) -> Cow<'a, Arc<AccountSet>> {
    endpoint.accounts_at(ModelName { name: model, in_config: true }, lane)
}

/// Has the model answer with one token. Returns what was seen.
async fn answer(calls: &OwnCalls<'_>, pool: &Pool, model: &str, counted: bool) -> Result<String, Why> {
    let chat = |limit: &str| {
        let body = json!({ "model": model, "messages": [{ "role": "user", "content": "Hello" }], limit: 1 });
        ("/v1/chat/completions", body)
    };
    let (path, body) = if model.contains("embed") {
        ("/v1/embeddings", json!({ "model": model, "input": "Hello" }))
    } else {
        chat("max_tokens")
    };
    let mut begun = Instant::now();
    let mut answer = counted_ask(calls, pool, model, (path, &body), counted).await?;
    if answer.status == 400 && memchr::memmem::find(&answer.body, b"max_completion_tokens").is_some() {
        // Models that reason know the bound by another name.
        let (path, body) = chat("max_completion_tokens");
        begun = Instant::now();
        answer = counted_ask(calls, pool, model, (path, &body), counted).await?;
    }
    let took = begun.elapsed().as_millis();
    let error = serde_json::from_slice::<Value>(&answer.body).ok().map(|value| VendorError::in_answer(&value));
    if answer.status == 200 && error == Some(None) {
        let tokens = tokens_of(&answer).map_or(0, |tokens| tokens.total);
        let tokens = if tokens > 0 { format!(", {tokens} tokens") } else { String::new() };
        return Ok(format!("{model}, {took} ms{tokens}"));
    }
    let (meaning, words) = meaning_of(&answer, calls.endpoint);
    Err(match error {
        None if answer.status == 200 => {
            (format!("{model}: 200{words}, which is no answer"), "compare baseUrl with the vendor's page".to_owned())
        }
        _ => (format!("{model}: {}{words}", answer.status), way_out(meaning).to_owned()),
    })
}

/// Asks with a permit, if they are counted, and bills the tokens that the answer reports.
async fn counted_ask(
    calls: &OwnCalls<'_>,
    pool: &Pool,
    model: &str,
    (path, body): (&str, &Value),
    counted: bool,
) -> Result<OwnAnswer, Why> {
    let mut permit = if counted { Some(draw(pool, (calls.endpoint, calls.lane), model).await?) } else { None };
    if let Some(permit) = &mut permit {
        permit.spend();
    }
    let answer =
        calls.ask(OwnCall::post(path, body)).await.map_err(|(what, way_out)| (format!("{model}: {what}"), way_out))?;
    if let (true, Some(tokens)) = (counted, tokens_of(&answer)) {
        let (zone, clock) = (&pool.server.timezone, pool.clock());
        let priced = PricedTokens::plain(tokens.prompt, tokens.completion);
        let price = calls.endpoint.prices.cost(model, &priced, None, clock.wall);
        let cost = Cost::exact(tokens, Speed::default()).priced(price);
        let spent = Spent::now(&calls.endpoint.config.id, model, cost, zone, clock.wall);
        pool.ledger.spend_tokens(&accounts(calls.endpoint, calls.lane, model), None, spent, clock.boot);
    }
    Ok(answer)
}

/// What to do about an error.
fn way_out(trouble: Trouble) -> &'static str {
    match trouble {
        Trouble::Key => {
            "compare apiKey with the vendor's page, and whether the account is paid up and may use this API"
        }
        Trouble::ModelLimit | Trouble::AccountLimit => "a limit of the vendor is reached; try again later",
        Trouble::ModelFailure | Trouble::Endpoint => "the vendor has trouble; try again later",
        Trouble::ModelMissing => "correct the name in models or modelMapping",
        Trouble::CallMissing => "compare baseUrl with the vendor's page; most end in /v1",
        Trouble::Request | Trouble::ObjectMissing => {
            "the request is a plain chat of one token; if others work, name another model first in models"
        }
    }
}

fn tokens_of(answer: &OwnAnswer) -> Option<Tokens> {
    Reported::from_json(&answer.body).map(|reported| reported.usage.tokens())
}

/// What an error means, and its words as the end of a sentence.
fn meaning_of(answer: &OwnAnswer, endpoint: &Endpoint) -> (Trouble, String) {
    let meaning = classify::of_answer(answer.status, &answer.body, None, &endpoint.config.errors);
    let words = VendorError::from_body(&answer.body).message;
    // It is shown on a terminal.
    let words: String = words.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
    let words = match words.chars().next() {
        None => String::new(),
        Some('<') => ", with a web page".to_owned(),
        Some(_) => format!(": {}", excerpt(&words)),
    };
    (meaning.trouble, words)
}
