//! An agent's day: many sessions of many turns over endpoints with limits and failures. What counts is how often a turn finds the one
//! before it in the cache of its endpoint, and that nobody is refused while any endpoint has room.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use api_together::simulator::{Options, Simulator};
use http::Method;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::harness::{Proxy, Reply, endpoint_with, simulator_with};
use crate::program::setting;

const ENDPOINTS: usize = 5;
/// Sessions of a short run: `AGENT_SESSIONS=200` for as many as are promised.
const SESSIONS: usize = 50;
const TURNS: usize = 30;
/// Sessions that go on at once.
const AT_ONCE: usize = 20;

/// Runs the day, and returns the share of turns that found the one before at their endpoint. `room`: what all endpoints together may
/// take, over what is asked of them.
async fn share_of_hits(affinity: Value, sessions: usize, room: f64) -> f64 {
    let mut simulators = Vec::new();
    for seed in 0..ENDPOINTS {
        let options = Options { failure_rate_percent: 2, seed: seed as u64 * 13, ..Options::default() };
        simulators.push(simulator_with(options).await);
    }
    let turns = sessions * TURNS;
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "some thousands"
    )]
    let rpm = (turns as f64 * room / ENDPOINTS as f64) as u64;
    let apis: Vec<_> = simulators
        .iter()
        .zip('a'..)
        .map(|(simulator, id)| endpoint_with(&id.to_string(), &simulator.base_url(), json!({ "rpd": rpm })))
        .collect();
    let proxy = Arc::new(Proxy::start(json!({ "affinity": affinity, "breaker": { "failures": 20 } }), &apis).await);
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut running = JoinSet::new();
    for session in 0..sessions {
        let (proxy, places) = (Arc::clone(&proxy), Arc::clone(&places));
        running.spawn(async move {
            let _place = places.acquire().await.unwrap();
            let mut messages = vec![json!({ "role": "user", "content": format!("task {session}") })];
            for turn in 0..TURNS {
                let body = json!({ "model": "m", "messages": messages });
                let request = proxy.request(Method::POST, "/v1/chat/completions").json(&body);
                let reply = Reply::of(request.header("session_id", format!("s{session}"))).await;
                assert_eq!(reply.status, 200, "session {session}, turn {turn}: {reply:?}");
                messages.push(reply.json()["choices"][0]["message"].clone());
                messages.push(json!({ "role": "user", "content": format!("step {turn}") }));
            }
        });
    }
    running.join_all().await;
    hits(&simulators, turns)
}

/// The share of turns but the first ones whose endpoint had the turn before.
#[expect(clippy::cast_precision_loss, reason = "some thousands")]
fn hits(simulators: &[Simulator], turns: usize) -> f64 {
    let (mut hits, mut served) = (0, 0);
    for simulator in simulators {
        let mut longest: HashMap<String, usize> = HashMap::new();
        for arrived in simulator.requests() {
            let body: Value = serde_json::from_slice(&arrived.body).unwrap();
            let messages = body["messages"].as_array().unwrap();
            let before = longest.insert(messages[0]["content"].as_str().unwrap().to_owned(), messages.len());
            served += 1;
            hits += usize::from(before.map(|before| before + 2) == Some(messages.len()));
        }
    }
    assert!(served >= turns, "{served} of {turns}");
    hits as f64 / (turns - turns / TURNS) as f64
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_find_their_cache_and_nobody_is_refused_while_there_is_room() {
    let sessions = setting("AGENT_SESSIONS", SESSIONS);
    let longest = Duration::from_mins(1) + Duration::from_millis(500) * u32::try_from(sessions).unwrap();
    let day = async {
        // Endpoints have their share of few sessions only roughly, and what is above an endpoint's limit has to be spilled: 50 sessions
        // that had room for a fifth more found the turn before in 0.90 to 0.99 of their turns, by chance.
        let room = if sessions < 200 { 1.6 } else { 1.2 };
        let with = share_of_hits(json!({}), sessions, room).await;
        let without = share_of_hits(json!({ "sessions": false }), sessions, room).await;
        assert!(with >= 0.9, "{with:.3} of the turns found the one before");
        assert!(without < 0.35, "without affinity {without:.3} did");
        eprintln!("turns that found the one before: {with:.3} with affinity, {without:.3} without");
    };
    tokio::time::timeout(longest, day).await.expect("the day is too long");
}
