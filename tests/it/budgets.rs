//! Budgets of callers' keys: what a request may cost is reserved before it is sent, and settled at what it did cost.

use std::time::Duration;

use api_together::simulator::{Behaviour, Simulator};
use http::Method;
use serde_json::{Value, json};

use crate::callers::futures_of;
use crate::connections::websocket;
use crate::first_message::masked;
use crate::harness::{KEY, Proxy, Reply, behaving, chat, endpoint_with, simulator, within};
use crate::realtime::text_frame;
use crate::wire::ByHand;

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
        for part in ["ada", "$0.05 (day)", "$0 are spent", "max_tokens", "Even the whole budget"] {
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
        let listed = Reply::of(proxy.request_without_key(Method::GET, "/v1/models").bearer_auth(ADA)).await.json();
        let names: Vec<&str> =
            listed["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
        assert_eq!(names, ["m", "n"], "what it cannot ask for is not listed");
        // The key that all have is bounded by nothing.
        assert_eq!(proxy.chat("m").await.status, 200);
    })
    .await;
}

/// Calls whose cost is never seen here, or not until much later.
fn paid_elsewhere() -> Vec<(&'static str, Value)> {
    vec![
        ("/v1/batches", json!({ "input_file_id": "file-1" })),
        ("/v1/batch/jobs", json!({ "model": "m", "input_files": ["file-1"] })),
        ("/v1/messages/batches", json!({ "requests": [] })),
        ("/v1/fine_tuning/jobs", json!({ "model": "m" })),
        ("/v1/responses", json!({ "model": "m", "input": "x", "background": true })),
        ("/v1/realtime/client_secrets", json!({ "session": { "type": "realtime", "model": "m" } })),
        ("/v1/realtime/sessions", json!({ "model": "m" })),
        ("/v1/realtime/calls", json!({ "session": { "model": "m" } })),
        ("/v1/threads/runs", json!({ "assistant_id": "asst_1", "model": "m" })),
        ("/v1/threads/t/runs/r/submit_tool_outputs", json!({ "tool_outputs": [] })),
        ("/v1/evals/e/runs", json!({ "model": "m" })),
        ("/v1/containers", json!({ "name": "c" })),
        ("/v1/vector_stores/v/search", json!({ "query": "q" })),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_paid_later_or_elsewhere_needs_to_be_named() {
    within(async {
        let simulator = behaving(Behaviour { body: Some("{}".into()), ..Behaviour::default() }).await;
        for unit in ["usd", "tokens"] {
            let budget = json!({ "budget": [{ unit: 1000, "per": "day" }] });
            let proxy = with_budget(&simulator, budget.clone()).await;
            for (path, body) in paid_elsewhere() {
                let reply = ask(&proxy, path, body).await;
                // Anthropic's calls are answered as Anthropic does.
                let kind = if path.contains("messages") { "permission_error" } else { "invalid_request_error" };
                reply.assert_error(403, kind, "call_not_allowed");
            }
            // What costs nothing, or is paid with another call, is open.
            for path in ["/v1/files", "/v1/moderations", "/v1/threads", "/v1/threads/t/messages", "/v1/conversations"] {
                assert_eq!(ask(&proxy, path, json!({ "input": "x" })).await.status, 200, "{path}");
            }
            assert_eq!(ask(&proxy, "/v1/messages/count_tokens", chat("m")).await.status, 200);
            assert_eq!(taken(&proxy).await, (Some(0.0), Some(0.0)), "{unit}");
            let mut named = budget;
            named["calls"] = json!(["batches", "responses", "messages", "realtime"]);
            let proxy = with_budget(&simulator, named).await;
            assert_eq!(ask(&proxy, "/v1/batches", json!({ "input_file_id": "file-1" })).await.status, 200);
            for (path, body) in paid_elsewhere().into_iter().skip(2) {
                assert_eq!(
                    ask(&proxy, path, body).await.status,
                    403,
                    "{path}: to name others of its kind says nothing of it"
                );
            }
            // However it is written.
            let body = r#"{"a\n":1,"model":"m","input":"x","background":true}"#;
            let request = proxy.request_without_key(Method::POST, "/v1/responses").bearer_auth(ADA);
            let request = request.header("content-type", "application/json").body(body);
            Reply::of(request).await.assert_error(400, "invalid_request_error", None);
        }
    })
    .await;
}

/// What is spent and reserved of the key's only budget.
async fn taken(proxy: &Proxy) -> (Option<f64>, Option<f64>) {
    let state = budget(proxy).await;
    (state["spent"].as_f64(), state["reserved"].as_f64())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_names_no_model_has_no_price_and_takes_tokens() {
    within(async {
        let usage = r#"{"data":[],"usage":{"input_tokens":1000,"output_tokens":5000,"total_tokens":6000}}"#;
        let simulator = behaving(Behaviour { body: Some(usage.into()), ..Behaviour::default() }).await;
        let picture = || json!({ "prompt": "x" });
        let proxy = with_budget(&simulator, json!({ "budget": [{ "usd": 10, "per": "day" }] })).await;
        for path in ["/v1/images/generations", "/v1/videos", "/v1/responses/compact"] {
            ask(&proxy, path, picture()).await.assert_error(403, "invalid_request_error", "call_not_allowed");
        }
        let proxy = with_budget(&simulator, json!({ "budget": [{ "tokens": 10_000, "per": "day" }] })).await;
        assert_eq!(ask(&proxy, "/v1/images/generations", picture()).await.status, 200);
        assert_eq!(taken(&proxy).await, (Some(6000.0), Some(0.0)));
        assert_exhausted(&ask(&proxy, "/v1/images/generations", picture()).await);
        // What its answer does not tell is taken as foreseen.
        let silent = behaving(Behaviour { body: Some("sound".into()), ..Behaviour::default() }).await;
        let proxy = with_budget(&silent, json!({ "budget": [{ "tokens": 10_000, "per": "day" }] })).await;
        let speech = json!({ "model": "m", "input": "Hello", "voice": "alloy" });
        let bound = speech.to_string().len().div_ceil(3) + 4096;
        assert_eq!(ask(&proxy, "/v1/audio/speech", speech).await.status, 200);
        assert_eq!(taken(&proxy).await.0, json!(bound).as_f64());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_takes_of_a_budget_and_ends_with_it() {
    within(async {
        let by_hand = ByHand::bind().await;
        let keys = json!([{ "name": "ada", "key": ADA, "budget": [{ "tokens": 12_000, "per": "day" }] }]);
        let api = endpoint_with("a", &by_hand.base_url(), json!({ "models": ["talk"] }));
        let proxy = Proxy::start(json!({ "keys": keys }), &[api]).await;
        let open = || websocket("/v1/realtime?model=talk").replace(KEY, ADA);
        let mut client = proxy.wire().await;
        client.send(open()).await;
        let (mut endpoint, ..) = by_hand.call().await;
        endpoint.send("HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n").await;
        assert_eq!(client.head().await.unwrap().status(), 101);
        assert_eq!(taken(&proxy).await, (Some(0.0), Some(4096.0)), "its first response is reserved for");
        let create = masked(r#"{"type":"response.create"}"#);
        // What was said is written down by another model, and ends no response.
        let written = r#"{"type":"conversation.item.input_audio_transcription.completed","usage":{"type":"tokens","total_tokens":30,"input_tokens":20,"output_tokens":10}}"#;
        let done = r#"{"type":"response.done","response":{"usage":{"total_tokens":4000,"input_tokens":3000,"output_tokens":1000}}}"#;
        for (spent, event) in [(30.0, written), (4030.0, done)] {
            client.send(&create).await;
            assert_eq!(endpoint.exactly(create.len()).await.unwrap().len(), create.len());
            let frame = text_frame(event);
            endpoint.send(&frame).await;
            client.exactly(frame.len()).await.unwrap();
            let reserved = if event == written { 4096.0 } else { 0.0 };
            wait_for(&proxy, (spent, reserved)).await;
        }
        // The next one has room for another, and the one after it none.
        for (room, spent) in [(true, 8030.0), (false, 8030.0)] {
            client.send(&create).await;
            if !room {
                break;
            }
            endpoint.exactly(create.len()).await.unwrap();
            endpoint.send(&text_frame(done)).await;
            client.exactly(text_frame(done).len()).await.unwrap();
            wait_for(&proxy, (spent, 0.0)).await;
        }
        let mut refused = String::new();
        while !refused.contains("insufficient_quota") {
            refused += &String::from_utf8_lossy(&client.one_read().await);
        }
        assert!(refused.contains("This API key (ada) has a budget of 12000 tokens"), "{refused}");
        let mut another = proxy.wire().await;
        another.send(open()).await;
        assert_eq!(another.message().await.0.status(), 429);
    })
    .await;
}

async fn wait_for(proxy: &Proxy, (spent, reserved): (f64, f64)) {
    for tries in 0.. {
        let seen = taken(proxy).await;
        if seen == (Some(spent), Some(reserved)) {
            return;
        }
        assert!(tries < 150, "{seen:?} is not {spent} and {reserved}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
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
        assert_eq!(budget(&proxy).await["resets"], Value::Null, "it begins with the first request");
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
        assert!(state["resets"].is_string(), "{state}");
        assert!(state["reserved"].as_u64().unwrap() > 8000 && state["spent"] == 0, "{state}");
        // It has room once these have ended, and a client that tries again is served.
        let refused = ask(&proxy, "/v1/chat/completions", body.clone()).await;
        let message = refused.assert_error(429, "tokens", "key_rate_limited");
        assert!(message.contains("once some of those have ended"), "{message}");
        assert_eq!((refused.header("retry-after"), refused.header("x-should-retry")), (Some("1"), None));
        // What the whole budget has no room for never is.
        let mut huge = body.clone();
        huge["n"] = json!(100);
        let message = assert_exhausted(&ask(&proxy, "/v1/chat/completions", huge).await);
        assert!(message.contains("Even the whole budget"), "{message}");
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

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_in_one_piece_is_not_cut_for_its_length() {
    within(async {
        let much = json!({ "id": "x", "object": "chat.completion", "choices": [{ "index": 0, "finish_reason": "stop",
            "message": { "role": "assistant", "content": "Hello" }, "logprobs": { "content": "y".repeat(300_000) } }],
            "usage": { "prompt_tokens": 5, "completion_tokens": 10, "total_tokens": 15 } });
        let simulator = behaving(Behaviour { body: Some(much.to_string()), ..Behaviour::default() }).await;
        let key = json!({ "onOverrun": "cut", "budget": [{ "tokens": 10_000, "per": "total" }] });
        let proxy = with_budget(&simulator, key).await;
        let reply = ask(&proxy, "/v1/chat/completions", chat("m")).await;
        assert_eq!((reply.status, reply.text().len()), (200, much.to_string().len()));
        assert_eq!(until_settled(&proxy).await["spent"], 15);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_stay_where_they_are_though_some_endpoints_have_no_price() {
    within(async {
        let simulator = simulator().await;
        let priced = || json!({ "models": ["m"], "prices": { "m": { "input": 1, "output": 1 } } });
        let apis = [
            endpoint_with("a", &simulator.base_url(), json!({ "models": ["m"] })),
            endpoint_with("b", &simulator.base_url(), priced()),
            endpoint_with("c", &simulator.base_url(), priced()),
        ];
        let keys = json!([{ "name": "ada", "key": ADA, "budget": [{ "usd": 100, "per": "total" }] }]);
        let proxy = Proxy::start(json!({ "keys": keys, "strategy": "round_robin" }), &apis).await;
        let mut first = Vec::new();
        for round in 0..4 {
            for session in 0..6 {
                let request = proxy.request_without_key(Method::POST, "/v1/chat/completions").bearer_auth(ADA);
                let request = request.header("x-session-id", format!("s{session}")).json(&chat("m"));
                let reply = Reply::of(request).await;
                let at = reply.header("x-api-together-endpoint").unwrap().to_owned();
                if round == 0 {
                    first.push(at);
                } else {
                    assert_eq!(at, first[session], "session {session} in round {round} of {first:?}");
                }
            }
        }
        assert_eq!(["b", "c"].map(|id| first.iter().filter(|at| *at == id).count()), [3, 3], "they take turns");
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
