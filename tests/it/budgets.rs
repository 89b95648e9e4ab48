//! Budgets of callers' keys: what a request may cost is reserved before it is sent, and settled at what it did cost.

use std::time::Duration;

use api_together::simulator::{Behaviour, Simulator};
use http::Method;
use serde_json::{Value, json};

use crate::callers::futures_of;
use crate::harness::{Proxy, Reply, behaving, chat, endpoint_with, simulator, within};

const ADA: &str = "sk-ada-0f6c1d93be5a7724";

/// A proxy in front of an endpoint whose models cost 100 dollars for a million tokens of the prompt, and 1,000 of the answer. Ada has
/// these budgets.
async fn with_budget(simulator: &Simulator, key: Value) -> Proxy {
    let mut ada = json!({ "name": "ada", "key": ADA });
    ada.as_object_mut().unwrap().extend(key.as_object().unwrap().clone());
    let price = json!({ "input": 100, "output": 1000 });
    let prices = json!({ "m": price, "n": { "input": 0, "output": 0 } });
    let apis = [endpoint_with("a", &simulator.base_url(), json!({ "models": ["m", "n", "odd"] }))];
    Proxy::start(json!({ "keys": [ada], "prices": prices }), &apis).await
}

async fn ask(proxy: &Proxy, path: &str, body: Value) -> Reply {
    Reply::of(proxy.request_without_key(Method::POST, path).bearer_auth(ADA).json(&body)).await
}

fn short(model: &str, max_tokens: u32) -> Value {
    let mut body = chat(model);
    body["max_tokens"] = json!(max_tokens);
    body
}

/// The state of the key's only budget.
async fn budget(proxy: &Proxy) -> Value {
    Reply::of(proxy.request_without_key(Method::GET, "/v1/key").bearer_auth(ADA)).await.json()["budget"][0].clone()
}

fn assert_exhausted(reply: &Reply) -> String {
    assert_eq!(reply.header("x-should-retry"), Some("false"));
    reply.assert_error(429, "insufficient_quota", "insufficient_quota")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_in_dollars_is_settled_at_what_an_answer_cost_and_then_refuses() {
    within(async {
        let simulator = simulator().await;
        let proxy = with_budget(&simulator, json!({ "budget": [{ "usd": 0.05, "per": "day" }] })).await;
        // Nobody knows how long an answer is that is not bounded: 4,096 tokens of it are four dollars.
        let message = assert_exhausted(&ask(&proxy, "/v1/chat/completions", chat("m")).await);
        for part in ["ada", "$0.05 (day)", "$0 are spent", "max_tokens", "begins anew at"] {
            assert!(message.contains(part), "{part}: {message}");
        }
        assert_eq!(simulator.requests().len(), 0, "no endpoint was asked");
        let mut answered = 0;
        let refused = loop {
            let reply = ask(&proxy, "/v1/chat/completions", short("m", 10)).await;
            if reply.status != 200 {
                break reply;
            }
            answered += 1;
            assert!(answered < 20, "it is never used up");
        };
        let message = assert_exhausted(&refused);
        assert!(message.contains("may take up to $0.01"), "{message}");
        let usage = proxy.get("/v1/token/stats").await.json()["keys"]["ada"].clone();
        let state = budget(&proxy).await;
        assert_eq!((&state["spent"], &state["reserved"]), (&usage["usd"], &json!(0.0)), "{state} {usage}");
        assert_eq!((&state["unit"], &state["per"], &state["limit"]), (&json!("usd"), &json!("day"), &json!(0.05)));
        assert!(state["spent"].as_f64().unwrap() <= 0.05 && answered > 3, "{state}");
        // What is free goes on, what has no price does not begin.
        assert_eq!(ask(&proxy, "/v1/chat/completions", chat("n")).await.status, 200);
        let refused = ask(&proxy, "/v1/chat/completions", chat("odd")).await;
        let message = refused.assert_error(403, "invalid_request_error", "model_has_no_price");
        assert!(message.contains("odd") && message.contains("prices"), "{message}");
        for (path, body) in [
            ("/v1/batches", json!({ "input_file_id": "file-1" })),
            ("/v1/fine_tuning/jobs", json!({ "model": "m" })),
            ("/v1/responses", json!({ "model": "m", "input": "x", "background": true })),
        ] {
            ask(&proxy, path, body).await.assert_error(403, "invalid_request_error", "call_not_allowed");
        }
        // The key that all have is bounded by nothing.
        assert_eq!(proxy.chat("m").await.status, 200);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_billed_is_not_spent() {
    within(async {
        let failing = behaving(Behaviour { status: 500, ..Behaviour::default() }).await;
        let working = simulator().await;
        let keys = json!([{ "name": "ada", "key": ADA, "budget": [{ "tokens": 1_000_000, "per": "total" }] }]);
        let apis = [
            endpoint_with("a", &failing.base_url(), json!({ "models": ["m"] })),
            endpoint_with("b", "http://127.0.0.1:9", json!({ "models": ["m"], "priority": 1 })),
            endpoint_with("c", &working.base_url(), json!({ "models": ["m"], "priority": 2 })),
        ];
        let proxy = Proxy::start(json!({ "keys": keys }), &apis).await;
        let reply = ask(&proxy, "/v1/chat/completions", chat("m")).await;
        reply.assert_from("c", 3);
        let tokens = reply.json()["usage"]["total_tokens"].clone();
        let state = budget(&proxy).await;
        assert_eq!((&state["spent"], &state["reserved"]), (&tokens, &json!(0)), "each attempt reserved anew: {state}");
        assert_eq!(
            ask(&proxy, "/v1/chat/completions", json!({ "model": "m", "messages": 1, "n": "x" })).await.status,
            200
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_is_reserved_and_what_a_client_leaves_is_spent() {
    within(async {
        let slow = behaving(Behaviour { chunk_delay_ms: 50, events: 200, ..Behaviour::default() }).await;
        let proxy = with_budget(&slow, json!({ "budget": [{ "tokens": 10_000, "per": "5h" }] })).await;
        let body = json!({ "model": "m", "stream": true, "max_tokens": 4000, "messages": [{ "role": "user", "content": "x" }] });
        let open = || async {
            let request = proxy.request_without_key(Method::POST, "/v1/chat/completions").bearer_auth(ADA).json(&body);
            let mut stream = request.send().await.unwrap();
            assert_eq!(stream.status(), 200);
            stream.chunk().await.unwrap();
            stream
        };
        let (first, second) = (open().await, open().await);
        let state = budget(&proxy).await;
        assert!(state["reserved"].as_u64().unwrap() > 8000 && state["spent"] == 0, "{state}");
        assert_exhausted(&ask(&proxy, "/v1/chat/completions", body.clone()).await);
        tokio::time::sleep(Duration::from_millis(500)).await;
        drop((first, second));
        // Their tokens are estimated, and the rest is free again.
        for _ in 0..100 {
            if budget(&proxy).await["reserved"] == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let state = budget(&proxy).await;
        let spent = state["spent"].as_u64().unwrap();
        assert!(state["reserved"] == 0 && spent > 5 && spent < 1000, "{state}");
        assert_eq!(ask(&proxy, "/v1/chat/completions", short("m", 5)).await.status, 200);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_takes_more_than_was_reserved_goes_on_or_is_cut_off() {
    within(async {
        let long = behaving(Behaviour { chunk_delay_ms: 10, events: 400, ..Behaviour::default() }).await;
        for (on_overrun, is_cut) in [("finish", false), ("cut", true)] {
            let keys = json!([{
                "name": "ada", "key": ADA, "onOverrun": on_overrun, "budget": [{ "tokens": 200, "per": "total" }],
            }]);
            let apis = [endpoint_with("a", &long.base_url(), json!({ "models": ["m"] }))];
            let settings = json!({ "keys": keys, "budgetReserveTokens": 100 });
            let proxy = Proxy::start(settings, &apis).await;
            let body = json!({ "model": "m", "stream": true, "messages": [{ "role": "user", "content": "x" }] });
            let request = proxy.request_without_key(Method::POST, "/v1/chat/completions").bearer_auth(ADA);
            let mut stream = request.json(&body).send().await.unwrap();
            let mut text = String::new();
            // One that is cut off does not look whole: its connection breaks.
            while let Ok(Some(piece)) = stream.chunk().await {
                text += std::str::from_utf8(&piece).unwrap();
            }
            assert_eq!(text.contains("insufficient_quota"), is_cut, "{on_overrun}: {text}");
            assert_eq!(text.contains("[DONE]"), !is_cut, "{on_overrun}: {text}");
            let state = until_settled(&proxy).await;
            let spent = state["spent"].as_u64().unwrap();
            assert!(spent > 50 && state["left"].as_u64().unwrap() <= 200, "{on_overrun}: {state}");
            assert_eq!(spent > 300, !is_cut, "{on_overrun}: {state}");
            assert_exhausted(&ask(&proxy, "/v1/chat/completions", body).await);
        }
    })
    .await;
}

/// The key's budget, once nothing is reserved of it any more.
async fn until_settled(proxy: &Proxy) -> Value {
    for _ in 0..200 {
        let state = budget(proxy).await;
        if state["reserved"] == 0 {
            return state;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("something stays reserved");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_pass_no_budget() {
    within(async {
        let simulator = simulator().await;
        let proxy = with_budget(&simulator, json!({ "budget": [{ "usd": 0.1, "per": "total" }] })).await;
        let replies = futures_of(60, || ask(&proxy, "/v1/chat/completions", short("m", 10))).await;
        let answered = replies.iter().filter(|reply| reply.status == 200).count();
        assert!(replies.iter().all(|reply| matches!(reply.status, 200 | 429)), "nothing else");
        assert!((5..60).contains(&answered), "{answered}");
        let state = budget(&proxy).await;
        assert!(state["spent"].as_f64().unwrap() <= 0.1 && state["reserved"] == 0.0, "{state}");
        assert_eq!(simulator.requests().len(), answered);
    })
    .await;
}
