//! Tokens: counted in every dialect, asked for unseen, estimated where nobody tells them.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use api_together::simulator::{AnswerAs, Behaviour, Empty, Options, ResetAt, Simulator, StallAt};
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::harness::{
    KEY, Proxy, behaving, chat, chat_stream, client, endpoint_with, h2c, in_order, key_of, merged, simulator, within,
};
use crate::wire::{ByHand, STREAM_HEAD, Wire, chunked, event, post_chat, request};

/// One answer of the collection in `tests/fixtures/answers`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Golden {
    name: String,
    about: String,
    path: String,
    content_type: String,
    /// Prompt, completion, total, cached, reasoning, audio.
    tokens: Option<[u64; 6]>,
    #[serde(default)]
    estimated: bool,
    /// Whether it tells without being asked, and is not asked again once that is known.
    #[serde(default)]
    tells_unasked: bool,
}

impl Golden {
    fn all() -> Vec<Self> {
        serde_json::from_str(&std::fs::read_to_string(folder().join("index.json")).unwrap()).unwrap()
    }

    fn ending(&self) -> &'static str {
        if self.is_stream() { "sse" } else { "json" }
    }

    fn is_stream(&self) -> bool {
        self.content_type == "text/event-stream"
    }

    /// Whether it is a call whose streams tell their usage only when they are asked to.
    fn is_asked(&self) -> bool {
        self.is_stream() && self.path.ends_with("/completions")
    }

    fn answer(&self) -> String {
        std::fs::read_to_string(folder().join(format!("{}.{}", self.name, self.ending()))).unwrap()
    }

    /// What a client sees that did not ask for the usage.
    fn seen(&self) -> String {
        let path = folder().join(format!("{}.seen.{}", self.name, self.ending()));
        if path.exists() { std::fs::read_to_string(path).unwrap() } else { self.answer() }
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/answers")
}

/// An endpoint's entry in the token statistics, once so many answers are in it, exact and estimated.
async fn stats_of(proxy: &Proxy, id: &str, exact: u64, estimated: u64) -> Value {
    let begun = Instant::now();
    loop {
        let stats = proxy.get("/v1/token/stats").await.json()["detailedStats"][id].clone();
        let count = |value: &Value| value.as_u64().unwrap_or(0);
        let found = (count(&stats["requests"]), count(&stats["estimated"]["requests"]));
        if found == (exact, estimated) {
            return stats;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(10) && found.0 <= exact && found.1 <= estimated,
            "{id}: never {exact} and {estimated}: {stats}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn six(stats: &Value) -> [u64; 6] {
    ["promptTokens", "completionTokens", "totalTokens", "cachedTokens", "reasoningTokens", "audioTokens"]
        .map(|key| stats[key].as_u64().unwrap())
}

fn estimate(stats: &Value) -> [u64; 2] {
    ["promptTokens", "completionTokens"].map(|key| stats["estimated"][key].as_u64().unwrap())
}

/// What an endpoint got for a body in its last request.
fn last_body(simulator: &Simulator) -> String {
    String::from_utf8(simulator.requests().last().unwrap().body.to_vec()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_dialect_is_counted_and_seen_as_without_us() {
    within(async {
        let goldens = Golden::all();
        assert!(goldens.len() > 25);
        let mut simulators = Vec::new();
        for golden in &goldens {
            let body = Some(golden.answer());
            let content_type = Some(golden.content_type.clone());
            simulators.push(behaving(Behaviour { body, content_type, ..Behaviour::default() }).await);
        }
        let apis: Vec<_> = goldens
            .iter()
            .zip(&simulators)
            .map(|(golden, simulator)| {
                endpoint_with(&golden.name, &simulator.base_url(), json!({ "models": [golden.name] }))
            })
            .collect();
        let proxy = Proxy::start(json!({}), &apis).await;
        for (golden, simulator) in goldens.iter().zip(&simulators) {
            check(golden, simulator, &proxy).await;
        }
    })
    .await;
}

async fn check(golden: &Golden, simulator: &Simulator, proxy: &Proxy) {
    let about = format!("{} ({})", golden.name, golden.about);
    let mut calls = 0;
    for drip in [None, Some(1), Some(7), Some(200)] {
        let behaviour = Behaviour {
            body: Some(golden.answer()),
            content_type: Some(golden.content_type.clone()),
            drip,
            ..Behaviour::default()
        };
        simulator.set_default(behaviour);
        let stream = if golden.is_stream() { r#""stream": true ,"# } else { "" };
        let unasked = format!(r#"{{ "model":"{}", {stream}"x":1.0}}"#, golden.name);
        let reply = proxy.post_text(&golden.path, unasked.clone()).await;
        assert_eq!(reply.text(), golden.seen(), "{about}, in pieces of {drip:?}");
        let expected = if golden.is_asked() && !(golden.tells_unasked && calls > 0) {
            unasked.replace(r#""stream": true"#, r#""stream": true,"stream_options":{"include_usage":true}"#)
        } else {
            unasked.clone()
        };
        assert_eq!(last_body(simulator), expected, "{about}");
        let asked = unasked.replace(r#""x":1.0"#, r#""stream_options": {"include_usage": true}"#);
        let reply = proxy.post_text(&golden.path, asked.clone()).await;
        assert_eq!(reply.text(), golden.answer(), "{about}, in pieces of {drip:?}, asked for");
        assert_eq!(last_body(simulator), asked, "{about}");
        calls += 2;
        if golden.tells_unasked {
            stats_of(proxy, &golden.name, calls, 0).await;
            assert_eq!(proxy.status_of(&golden.name).await["streamUsage"], "told");
        }
    }
    let (exact, estimated) = (u64::from(golden.tokens.is_some()), u64::from(golden.estimated));
    if exact + estimated == 0 {
        let stats = proxy.get("/v1/token/stats").await.json();
        assert_eq!(stats["detailedStats"][&golden.name], Value::Null, "{about}");
        return;
    }
    let stats = stats_of(proxy, &golden.name, calls * exact, calls * estimated).await;
    assert_eq!(six(&stats), golden.tokens.unwrap_or_default().map(|tokens| tokens * calls), "{about}");
    if golden.estimated {
        // "hello world", whatever the prompt.
        assert_eq!(estimate(&stats)[1], 2 * calls, "{about}");
    } else {
        assert_eq!(estimate(&stats), [0, 0], "{about}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_refuses_stream_options_is_asked_without_and_not_again() {
    within(async {
        let problem = r#"{"error":{"message":"Unrecognized request argument supplied: stream_options","code":7}}"#;
        let refuses = Behaviour { body: Some(problem.into()), ..Behaviour::status(400) };
        for status in [400, 422] {
            let simulator = simulator().await;
            // Nobody else is there, and a limit to be kept.
            let api = endpoint_with("a", &simulator.base_url(), json!({ "rpm": 3 }));
            let proxy = Proxy::start(json!({}), &[api]).await;
            simulator.script("m", vec![Behaviour { status, ..refuses.clone() }, Behaviour::default()]);
            let stream = proxy.open_stream("m").await;
            assert_eq!(stream.status(), 200);
            assert!(stream.text().await.unwrap().ends_with("data: [DONE]\n\n"));
            let bodies: Vec<Value> =
                simulator.requests().iter().map(|request| serde_json::from_slice(&request.body).unwrap()).collect();
            assert_eq!(bodies.len(), 2);
            assert_eq!(bodies[0]["stream_options"]["include_usage"], true);
            assert_eq!(bodies[1], chat_stream("m"), "the second time as the client sent it");
            proxy.until_status("a", "streamUsage", json!("refused")).await;
            proxy.open_stream("m").await.text().await.unwrap();
            assert_eq!(simulator.requests().len(), 3, "it is not asked again");
            assert_eq!(proxy.status_of("a").await["usage"]["rpm"], 3, "each time it was sent it was counted");
            assert_eq!(proxy.open_stream("m").await.status(), 429);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_that_is_not_about_our_addition_is_the_clients() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        // It has taken them before.
        proxy.open_stream("m").await.text().await.unwrap();
        simulator.clear();
        // An integer for a code is passed on as it came.
        let problem = r#"{"error":{"message":"messages is too long","code":400}}"#;
        let refuses = Behaviour { body: Some(problem.into()), ..Behaviour::status(400) };
        simulator.script("m", vec![refuses.clone()]);
        let reply = proxy.open_stream("m").await;
        assert_eq!((reply.status().as_u16(), reply.text().await.unwrap().as_str()), (400, problem));
        assert_eq!(simulator.requests().len(), 1);
        // Nor is one that the client has earned itself.
        let own = r#"{"error":{"message":"stream_options.include_usage must be a boolean"}}"#;
        simulator.script("m", vec![Behaviour { body: Some(own.into()), ..refuses }]);
        let asked = merged(chat_stream("m"), json!({ "stream_options": { "include_usage": true } }));
        let reply = proxy.post("/v1/chat/completions", &asked).await;
        assert_eq!((reply.status, reply.text()), (400, own));
        assert_eq!(simulator.requests().len(), 2);
        // And if the endpoint goes on complaining, that is what the client sees, and nothing is remembered.
        simulator.script("m", vec![Behaviour { body: Some(own.into()), ..Behaviour::status(400) }]);
        assert_eq!(proxy.open_stream("m").await.text().await.unwrap(), own);
        assert_eq!(simulator.requests().len(), 4);
        assert_eq!(proxy.status_of("a").await["streamUsage"], "auto");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_can_be_left_unasked() {
    within(async {
        let simulator = simulator().await;
        let api = endpoint_with("a", &simulator.base_url(), json!({ "streamUsage": "never" }));
        let proxy = Proxy::start(json!({}), &[api]).await;
        proxy.open_stream("m").await.text().await.unwrap();
        assert_eq!(serde_json::from_str::<Value>(&last_body(&simulator)).unwrap(), chat_stream("m"));
        assert_eq!(proxy.status_of("a").await["streamUsage"], "never");
        stats_of(&proxy, "a", 0, 1).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_compressed_all_the_same_is_read_beside_the_way() {
    within(async {
        let by_hand = ByHand::bind().await;
        let apis = in_order([by_hand.base_url().as_str(), "http://127.0.0.1:9"]);
        let proxy = Proxy::start(json!({}), &apis).await;
        let usage = r#""usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}"#;
        let stream = format!("{}data: {{\"choices\":[],{usage}}}\n\ndata: [DONE]\n\n", event("one"));
        let json = format!(r#"{{"choices":[{{"message":{{"content":"one"}}}}],{usage}}}"#);
        for (content_type, plain, body) in
            [("text/event-stream", stream, chat_stream("m")), ("application/json", json, chat("m"))]
        {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(plain.as_bytes()).unwrap();
            let gzip = gzip.finish().unwrap();
            let answer = async {
                let (mut wire, head, _) = by_hand.call().await;
                assert_eq!(head.header("accept-encoding").as_deref(), Some("identity"));
                let head = format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-encoding: gzip\r\ncontent-length: {}\r\n\r\n",
                    gzip.len()
                );
                wire.send(head).await;
                for piece in gzip.chunks(10) {
                    wire.send(piece).await;
                }
                wire
            };
            let (_wire, reply) = tokio::join!(answer, proxy.post("/v1/chat/completions", &body));
            assert_eq!(reply.header("content-encoding"), Some("gzip"));
            assert!(reply.body == gzip, "the client gets the bytes as they were sent");
        }
        let stats = stats_of(&proxy, "a", 2, 0).await;
        assert_eq!(six(&stats), [6, 8, 14, 0, 0, 0]);
    })
    .await;
}

/// A stream with its usage, asked for by nobody.
fn whole_stream() -> String {
    let usage = r#"data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}"#;
    format!("{}{}{usage}\n\ndata: [DONE]\n\n", event("one"), event("two"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_whose_length_was_told_loses_it_with_what_is_taken_out() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = Proxy::start(json!({}), &in_order([by_hand.base_url().as_str()])).await;
        let stream = whole_stream();
        let length = stream.len().to_string();
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {length}\r\n\r\n");
        for asks in [false, true] {
            let more = if asks { json!({ "stream_options": { "include_usage": true } }) } else { json!({}) };
            let body = merged(chat_stream("m"), more);
            let answer = async {
                let (mut endpoint, ..) = by_hand.call().await;
                endpoint.send(format!("{head}{stream}")).await;
                endpoint
            };
            let (_endpoint, reply) = tokio::join!(answer, proxy.post("/v1/chat/completions", &body));
            assert_eq!(reply.text().contains("usage"), asks, "{reply:?}");
            assert!(reply.text().ends_with("data: [DONE]\n\n"), "{reply:?}");
            assert_eq!(reply.header("content-length"), asks.then_some(length.as_str()));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_after_the_end_has_had_a_whole_answer() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = Proxy::start(json!({}), &in_order([by_hand.base_url().as_str()])).await;
        let mut wire = proxy.wire().await;
        wire.send(post_chat(&chat_stream("m"))).await;
        let (mut endpoint, ..) = by_hand.call().await;
        endpoint.send(format!("{STREAM_HEAD}{}", chunked(&whole_stream()))).await;
        wire.head().await.unwrap();
        let mut text = String::new();
        while !text.ends_with("data: [DONE]\n\n") {
            text += std::str::from_utf8(&wire.chunk().await.unwrap()).unwrap();
        }
        assert!(!text.contains("usage"), "{text}");
        drop(wire);
        let stats = stats_of(&proxy, "a", 1, 0).await;
        assert_eq!(six(&stats), [3, 4, 7, 0, 0, 0]);
        assert_eq!(stats["streams"]["requests"], 1);
        assert!(stats["streams"]["averageFirstTokenMs"].is_u64(), "{stats}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_whole_ends_even_if_its_endpoint_holds_it_open() {
    within(async {
        for break_off in [false, true] {
            for client in [client(reqwest::ClientBuilder::http1_only), h2c()] {
                let by_hand = ByHand::bind().await;
                let proxy = Proxy::start(json!({}), &in_order([by_hand.base_url().as_str()])).await;
                let call =
                    || client.post(proxy.url("/v1/chat/completions")).bearer_auth(KEY).json(&chat_stream("m")).send();
                // One error, which a success forgets.
                let refused = tokio::spawn(call());
                drop(by_hand.call().await);
                assert_eq!(refused.await.unwrap().unwrap().status(), 502);
                proxy.until_status("a", "errorCount", json!(1)).await;
                let answer = tokio::spawn(call());
                let (mut endpoint, ..) = by_hand.call().await;
                endpoint.send(format!("{STREAM_HEAD}{}", chunked(&whole_stream()))).await;
                let begun = Instant::now();
                let endpoint = if break_off { None } else { Some(endpoint) };
                let text = answer.await.unwrap().unwrap().text().await.expect("it ends cleanly");
                let took = begun.elapsed();
                assert!(text.ends_with("data: [DONE]\n\n") && !text.contains("error"), "{text}");
                // A tenth of a second, and what a busy machine takes.
                assert!(took < Duration::from_millis(600), "{took:?}");
                assert_eq!(six(&stats_of(&proxy, "a", 1, 0).await), [3, 4, 7, 0, 0, 0]);
                let status = proxy.status_of("a").await;
                assert_eq!((&status["errorCount"], &status["inFlight"]), (&json!(0), &json!(0)), "{status}");
                drop(endpoint);
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_seen_is_estimated_when_an_answer_breaks_off() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = Proxy::start(json!({}), &in_order([by_hand.base_url().as_str()])).await;
        for (number, client_leaves) in [(1, true), (2, false)] {
            let mut wire = proxy.wire().await;
            wire.send(post_chat(&chat_stream("gpt-4o"))).await;
            let (mut endpoint, ..) = by_hand.call().await;
            endpoint.send(format!("{STREAM_HEAD}{}", chunked(&event("hello")))).await;
            wire.head().await.unwrap();
            // One after the other, as they come from a model.
            assert_eq!(wire.chunk().await.unwrap(), event("hello"));
            endpoint.send(chunked(&event(" world"))).await;
            assert_eq!(wire.chunk().await.unwrap(), event(" world"));
            if client_leaves {
                drop(wire);
            } else {
                drop(endpoint);
                assert!(wire.rest().await.contains("stream_broken"));
            }
            let stats = stats_of(&proxy, "a", 0, number).await;
            // "one two three", its role, and what surrounds it.
            assert_eq!(estimate(&stats), [10 * number, 2 * number], "{stats}");
            assert_eq!(six(&stats), [0; 6], "nothing of it is among what was told");
            assert_eq!(stats["hourlyTotal"], 0);
        }
        let summary = &proxy.get("/v1/token/stats").await.json()["summary"];
        assert_eq!((&summary["totalTokens"], &summary["estimated"]["totalTokens"]), (&json!(0), &json!(24)));
        assert_eq!(proxy.status_of("a").await["usage"]["tpm"], 24, "a limit on tokens goes by them");
        assert_eq!(proxy.get("/v1/status").await.json()["estimates"], json!({ "waiting": 0, "dropped": 0 }));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_breaks_off_has_its_prompt_as_it_was_told() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = Proxy::start(json!({}), &in_order([by_hand.base_url().as_str()])).await;
        let mut wire = proxy.wire().await;
        let body = json!({ "model": "m", "stream": true, "messages": [] }).to_string();
        wire.send(request("POST", "/v1/messages", &["content-type: application/json"], &body)).await;
        let (mut endpoint, ..) = by_hand.call().await;
        let events = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":25,\
                      \"output_tokens\":1}}}\n\nevent: content_block_delta\ndata: {\"type\":\"content_block_delta\",\
                      \"delta\":{\"type\":\"text_delta\",\"text\":\"hello world\"}}\n\n";
        endpoint.send(format!("{STREAM_HEAD}{}", chunked(events))).await;
        wire.head().await.unwrap();
        assert_eq!(wire.chunk().await.unwrap(), events);
        drop(endpoint);
        let rest = wire.rest().await;
        assert!(rest.contains("event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\","), "{rest}");
        let stats = stats_of(&proxy, "a", 0, 1).await;
        assert_eq!(estimate(&stats), [25, 2], "{stats}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_estimated_if_it_is_not_wanted_or_nothing_came() {
    within(async {
        let silent = behaving(Behaviour { usage: Some(false), ..Behaviour::default() }).await;
        let proxy = Proxy::start(json!({ "estimateTokens": false }), &in_order([silent.base_url().as_str()])).await;
        proxy.open_stream("m").await.text().await.unwrap();
        proxy.chat("m").await.assert_from("a", 1);
        let stalls = behaving(Behaviour { stall: Some(StallAt::Header), ..Behaviour::default() }).await;
        let other = Proxy::before([&stalls]).await;
        let mut wire = other.wire().await;
        wire.send(post_chat(&chat_stream("m"))).await;
        crate::harness::until("the request is there", || stalls.open_requests() == 1).await;
        drop(wire);
        crate::harness::until("the request is gone", || stalls.open_requests() == 0).await;
        // Long enough for an estimate to be there.
        tokio::time::sleep(Duration::from_millis(500)).await;
        for proxy in [proxy, other] {
            assert_eq!(proxy.get("/v1/token/stats").await.json()["detailedStats"], json!({}));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_only_its_connection_ends_is_whole_if_it_says_so() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = Proxy::start(json!({}), &in_order([by_hand.base_url().as_str()])).await;
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
        let finish = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
        for (end, is_whole) in [("data: [DONE]\n\n", true), (finish, true), ("", false), ("data: {\"cho", false)] {
            let mut wire = proxy.wire().await;
            wire.send(post_chat(&chat_stream("m"))).await;
            let (mut endpoint, ..) = by_hand.call().await;
            endpoint.send(format!("{head}{}{end}", event("one"))).await;
            drop(endpoint);
            let header = wire.head().await.unwrap();
            if is_whole {
                assert_eq!(wire.body(&header).await, format!("{}{end}", event("one")));
                continue;
            }
            let mut text = String::new();
            while let Some(chunk) = wire.chunk().await {
                assert!(!chunk.is_empty(), "{end}: it ends cleanly: {text}");
                text += std::str::from_utf8(&chunk).unwrap();
            }
            let events: Vec<Value> = text
                .split_terminator("\n\n")
                .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
                .collect();
            assert_eq!(events.len(), 2, "{end}: {text}");
            assert_eq!(events[1]["error"]["code"], "stream_broken", "{end}: {text}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_answer_that_goes_unseen_costs_all_the_same() {
    within(async {
        let empty = behaving(Behaviour { empty: Some(Empty::ZeroUsage), ..Behaviour::default() }).await;
        let good = simulator().await;
        let proxy = Proxy::before([&empty, &good]).await;
        proxy.chat("m").await.assert_from("b", 2);
        let stats = stats_of(&proxy, "a", 1, 0).await;
        assert!(six(&stats)[0] > 0 && six(&stats)[1] == 0, "{stats}");
        stats_of(&proxy, "b", 1, 0).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_counts_by_what_it_is_not_by_what_was_asked() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        let as_stream = Behaviour { answer_as: Some(AnswerAs::Sse), usage: Some(true), ..Behaviour::default() };
        simulator.script("m", vec![as_stream]);
        let reply = proxy.chat("m").await;
        assert!(reply.text().ends_with("data: [DONE]\n\n"), "{}", reply.text());
        let stats = stats_of(&proxy, "a", 1, 0).await;
        simulator.script("m", vec![Behaviour { answer_as: Some(AnswerAs::Json), ..Behaviour::default() }]);
        let json: Value = proxy.open_stream("m").await.json().await.unwrap();
        let again = stats_of(&proxy, "a", 2, 0).await;
        let total = json["usage"]["total_tokens"].as_u64().unwrap();
        assert_eq!(six(&again)[2] - six(&stats)[2], total);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_a_stored_answer_costs_nothing() {
    within(async {
        let body = r#"{"object":"response","usage":{"input_tokens":3,"output_tokens":4,"total_tokens":7}}"#;
        let simulator = behaving(Behaviour { body: Some(body.into()), ..Behaviour::default() }).await;
        let proxy = Proxy::before([&simulator]).await;
        assert_eq!(proxy.get("/v1/responses/resp_1").await.text(), body);
        let cancel = proxy.request(Method::POST, "/v1/responses/resp_1/cancel").send().await.unwrap();
        assert_eq!(cancel.text().await.unwrap(), body);
        proxy.post("/v1/responses", &json!({ "model": "m" })).await;
        stats_of(&proxy, "a", 1, 0).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn long_answers_are_counted_too() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = Proxy::start(json!({}), &in_order([by_hand.base_url().as_str()])).await;
        let image = "A".repeat(3 * 1024 * 1024);
        let usage = r#""usage":{"input_tokens":3,"output_tokens":4,"total_tokens":7}"#;
        let json = format!(r#"{{"data":[{{"b64_json":"{image}"}}],{usage}}}"#);
        let completed = format!(
            "data: {{\"type\":\"response.output_text.delta\",\"delta\":\"x\"}}\n\ndata: {{\"type\":\"response.completed\",\
             \"response\":{{\"output\":\"{image}\",{usage}}}}}\n\n"
        );
        for (path, content_type, body) in
            [("/v1/images/generations", "application/json", json), ("/v1/responses", "text/event-stream", completed)]
        {
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            let answer = async {
                let (mut wire, ..) = by_hand.call().await;
                wire.send(format!("{head}{body}")).await;
                wire
            };
            let ask = json!({ "model": "m" });
            let (_wire, reply) = tokio::join!(answer, proxy.post(path, &ask));
            assert!(reply.text() == body, "{path}");
        }
        assert_eq!(six(&stats_of(&proxy, "a", 2, 0).await), [6, 8, 14, 0, 0, 0]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_json_answer_that_only_its_connection_ends_is_tried_elsewhere_if_it_is_cut() {
    within(async {
        let by_hand = ByHand::bind().await;
        let good = simulator().await;
        let proxy = Proxy::start(json!({}), &in_order([by_hand.base_url().as_str(), good.base_url().as_str()])).await;
        let cut = async {
            let (mut wire, ..) = by_hand.call().await;
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n";
            wire.send(format!("{head}{{\"choices\":[{{\"message\":")).await;
        };
        let (reply, ()) = tokio::join!(proxy.chat("m"), cut);
        reply.assert_from("b", 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn json_that_only_its_connection_ends_does_not_look_whole_if_it_is_cut() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = Proxy::start(json!({}), &in_order([by_hand.base_url().as_str()])).await;
        let body = r#"{"choices":[{"message":{"content":"one"}}]}"#;
        for (sent, is_whole) in [(body, true), (&body[..body.len() - 1], false)] {
            let mut wire = proxy.wire().await;
            wire.send(post_chat(&chat("m"))).await;
            let (mut endpoint, ..) = by_hand.call().await;
            endpoint
                .send(format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n{sent}"))
                .await;
            drop(endpoint);
            let (head, text) = wire.message().await;
            if is_whole {
                assert_eq!((head.status(), text.as_ref()), (200, sent.as_bytes()));
            } else {
                assert_eq!(head.status(), 502, "nothing of it is shown: {text:?}");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_told_before_a_word_was_said_counts() {
    within(async {
        let start = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":25,\
                     \"output_tokens\":1}}}\n\n";
        let (by_hand, good) = (ByHand::bind().await, simulator().await);
        let proxy = Proxy::start(json!({}), &in_order([by_hand.base_url().as_str(), good.base_url().as_str()])).await;
        let body = json!({ "model": "m", "stream": true, "messages": [] }).to_string();
        for (number, client_leaves) in [(1, true), (2, false)] {
            let mut wire = proxy.wire().await;
            wire.send(request("POST", "/v1/messages", &["content-type: application/json"], &body)).await;
            let (mut endpoint, ..) = by_hand.call().await;
            endpoint.send(format!("{STREAM_HEAD}{}", chunked(start))).await;
            // It is held, since nothing was said yet.
            tokio::time::sleep(Duration::from_millis(100)).await;
            if client_leaves {
                drop(wire);
            } else {
                drop(endpoint);
                wire.head().await.unwrap();
            }
            let stats = stats_of(&proxy, "a", 0, number).await;
            assert_eq!(estimate(&stats), [25 * number, 0], "{stats}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_error_is_shown_in_plain_text_and_without_the_key() {
    within(async {
        let by_hand = ByHand::bind().await;
        for ids in [1, 2] {
            // The last error, kept or passed on.
            let urls = [by_hand.base_url(), by_hand.base_url()];
            let proxy = Proxy::start(json!({}), &in_order(urls[..ids].iter().map(String::as_str))).await;
            let answer = async {
                for id in ["a", "b"].iter().take(ids) {
                    let (mut wire, ..) = by_hand.call().await;
                    let text = format!(r#"{{"error":{{"message":"bad key {}"}}}}"#, key_of(id));
                    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                    gzip.write_all(text.as_bytes()).unwrap();
                    let gzip = gzip.finish().unwrap();
                    let head = format!(
                        "HTTP/1.1 500 No\r\ncontent-type: application/json\r\ncontent-encoding: gzip\r\ncontent-length: \
                         {}\r\n\r\n",
                        gzip.len()
                    );
                    wire.send(head).await;
                    wire.send(gzip).await;
                }
            };
            let (reply, ()) = tokio::join!(proxy.chat("m"), answer);
            assert_eq!((reply.status, reply.header("content-encoding")), (500, None), "{reply:?}");
            let stars = "*".repeat(key_of("a").len());
            assert_eq!(reply.text(), format!(r#"{{"error":{{"message":"bad key {stars}"}}}}"#));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_booked_for_an_answer_that_is_none() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        let raw = |body: &str| Behaviour {
            body: Some(body.into()),
            content_type: Some("application/json".into()),
            ..Behaviour::default()
        };
        let error = r#"{"error":{"message":"no","type":"x"}}"#;
        let moved = Behaviour { status: 307, ..raw("") }.header("location", "http://127.0.0.1:9/");
        let script = vec![raw("{}"), raw(error), moved, Behaviour { first_event_error: true, ..Behaviour::default() }];
        let count = script.len();
        simulator.script("m", script);
        for _ in 0..count {
            proxy.open_stream("m").await.text().await.unwrap();
        }
        simulator.script("m", vec![Behaviour { usage: Some(false), ..Behaviour::default() }]);
        proxy.chat("m").await;
        // The last one's comes last.
        stats_of(&proxy, "a", 0, 1).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_json_answer_that_breaks_is_estimated_by_what_came() {
    within(async {
        let broken = Behaviour {
            reset: Some(ResetAt::AfterEvents(1)),
            chunked: true,
            body: Some(
                // Too long to be held.
                format!(
                    r#"{{"choices":[{{"message":{{"content":"hello world"}}}}],"padding":"{}"}}"#,
                    " ".repeat(200_000)
                ),
            ),
            content_type: Some("application/json".into()),
            ..Behaviour::default()
        };
        let simulator = crate::harness::simulator_with(Options { default: broken, ..Options::default() }).await;
        let proxy = Proxy::before([&simulator]).await;
        let mut wire: Wire = proxy.wire().await;
        wire.send(post_chat(&chat("gpt-4o"))).await;
        assert!(wire.rest().await.contains("hello world"));
        assert_eq!(estimate(&stats_of(&proxy, "a", 0, 1).await), [10, 2]);
    })
    .await;
}
