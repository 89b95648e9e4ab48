//! Key pools: an endpoint with several keys, each with limits and a health of its own.

use std::collections::BTreeMap;
use std::time::Duration;

use api_together::simulator::{Behaviour, Options, Simulator};
use http::Method;
use serde_json::{Value, json};

use crate::connections::websocket;
use crate::harness::{
    KEY, Proxy, Reply, chat, chat_stream, client, config_text, endpoint_with, merged, simulator, simulator_with, within,
};
use crate::program::{Running, folder_with, program};
use crate::wire::ByHand;

const KEYS: [&str; 5] = [
    "sk-pool-0-4be2a90c7d115f38",
    "sk-pool-1-9c07e52ba8836d41",
    "sk-pool-2-e1f34d6078ba9c25",
    "sk-pool-3-70a8cd9be4f2615d",
    "sk-pool-4-2f5d81c96ae07b34",
];

/// An endpoint with these keys in place of one.
fn pool_with(id: &str, base_url: &str, keys: &Value, more: Value) -> Value {
    let mut endpoint = endpoint_with(id, base_url, merged(json!({ "apiKeys": keys }), more));
    endpoint.as_object_mut().unwrap().remove("apiKey");
    endpoint
}

fn refusal() -> Behaviour {
    let message =
        r#"{"error":{"message":"Incorrect API key provided","type":"invalid_request_error","code":"invalid_api_key"}}"#;
    Behaviour { body: Some(message.into()), ..Behaviour::status(401) }
}

fn without_money() -> Behaviour {
    let message = r#"{"error":{"message":"You exceeded your current quota","type":"insufficient_quota","code":"insufficient_quota"}}"#;
    Behaviour { body: Some(message.into()), ..Behaviour::status(429) }
}

/// How often each key was sent.
fn sent(endpoint: &Simulator) -> BTreeMap<String, usize> {
    let mut sent = BTreeMap::new();
    for request in endpoint.requests() {
        let key = request.headers["authorization"].to_str().unwrap().trim_start_matches("Bearer ").to_owned();
        *sent.entry(key).or_default() += 1;
    }
    sent
}

/// The keys of an endpoint as the status shows them.
async fn keys_of(proxy: &Proxy, endpoint: &str) -> Value {
    let status = proxy.get("/v1/status").await.json();
    let apis = status["apis"].as_array().unwrap().clone();
    apis.into_iter().find(|api| api["id"] == endpoint).unwrap()["keys"].take()
}

fn states(keys: &Value) -> Vec<String> {
    keys["list"].as_array().unwrap().iter().map(|key| key["state"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_key_has_permits_of_its_own_and_all_of_them_are_used() {
    within(async {
        let endpoint = simulator().await;
        let keys = json!([
            { "key": KEYS[0], "rpm": 3, "name": "first" },
            { "key": KEYS[1], "rpm": 2 },
            { "key": KEYS[2], "rpd": 4, "weight": 9 },
        ]);
        let proxy = Proxy::start(json!({}), &[pool_with("a", &endpoint.base_url(), &keys, json!({}))]).await;
        for _ in 0..9 {
            proxy.chat("m").await.assert_from("a", 1);
        }
        let sent = sent(&endpoint);
        assert_eq!(sent.values().copied().collect::<Vec<_>>(), [3, 2, 4], "{sent:?}");
        let refused = proxy.chat("m").await;
        refused.assert_error(429, "requests", "rate_limit_exceeded");
        let text = refused.text();
        assert!(!text.contains("first") && !text.contains("5f38"), "keys are nothing to clients: {text}");
        let after: u64 = refused.header("retry-after").unwrap().parse().unwrap();
        assert!(after <= 62, "the first of them has room in a minute: {after}");
        let shown = keys_of(&proxy, "a").await;
        assert_eq!(shown["count"], 3);
        assert_eq!(shown["byState"]["full"], 3, "{shown}");
        let names: Vec<&str> =
            shown["list"].as_array().unwrap().iter().map(|key| key["key"].as_str().unwrap()).collect();
        assert_eq!(names, ["first (…5f38)", "…6d41", "…9c25"]);
        let metrics = proxy.get("/metrics").await.text().to_owned();
        assert!(metrics.contains(r#"api_together_endpoint_keys{endpoint="a",state="full"} 3"#), "{metrics}");
        assert!(
            metrics.contains(r#"api_together_endpoint_key_attempts_total{endpoint="a",key="…6d41"} 2"#),
            "{metrics}"
        );
        for key in KEYS {
            assert!(!metrics.contains(key) && !shown.to_string().contains(key));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_key_rests_and_the_others_serve() {
    within(async {
        let endpoint = simulator().await;
        endpoint.script(&format!("key:{}", KEYS[0]), vec![without_money()]);
        endpoint.script(&format!("key:{}", KEYS[1]), vec![refusal()]);
        endpoint.script(&format!("key:{}", KEYS[3]), vec![Behaviour::status(429).header("retry-after", "300")]);
        let api = pool_with("a", &endpoint.base_url(), &json!(KEYS), json!({}));
        let proxy = Proxy::start(json!({ "strategy": "round_robin" }), &[api]).await;
        for _ in 0..40 {
            let reply = proxy.chat("m").await;
            assert_eq!(reply.status, 200, "{reply:?}");
        }
        let sent = sent(&endpoint);
        for bad in [0, 1, 3] {
            assert_eq!(sent[KEYS[bad]], 1, "{sent:?}");
        }
        let keys = keys_of(&proxy, "a").await;
        // A vendor's limit is by model, and this is the only one that was asked for.
        assert_eq!(states(&keys), ["cooling_down", "cooling_down", "open", "resting", "open"], "{keys}");
        assert!(keys["list"][3]["models"]["m"]["restEnds"].is_string(), "{keys}");
        assert!(keys["list"][1]["lastError"]["what"].as_str().unwrap().contains("401"), "{keys}");
        let status = proxy.get("/v1/status").await.json();
        assert_eq!((&status["apis"][0]["available"], &status["apis"][0]["errorCount"]), (&json!(true), &json!(0)));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_tries_three_keys_of_an_endpoint_and_then_another_one() {
    within(async {
        let (pool, other) = (simulator().await, simulator().await);
        for (index, key) in KEYS.iter().enumerate() {
            let message =
                format!(r#"{{"error":{{"code":"invalid_api_key","message":"Incorrect API key: sk-*{index}*"}}}}"#);
            pool.script(&format!("key:{key}"), vec![Behaviour { body: Some(message), ..Behaviour::status(401) }]);
        }
        let apis = [
            pool_with("a", &pool.base_url(), &json!(KEYS), json!({})),
            endpoint_with("b", &other.base_url(), json!({ "priority": 1 })),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        proxy.chat("m").await.assert_from("b", 4);
        assert_eq!(sent(&pool).len(), 3);
        proxy.chat("m").await.assert_from("b", 3);
        proxy.chat("m").await.assert_from("b", 1);
        assert_eq!(sent(&pool).values().copied().collect::<Vec<_>>(), [1; 5]);
        let keys = keys_of(&proxy, "a").await;
        assert_eq!(keys["byState"]["cooling_down"], 5, "{keys}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_refuses_every_key_alike_refuses_the_address() {
    within(async {
        let endpoint = simulator().await;
        let other = simulator().await;
        for key in KEYS {
            endpoint.script(&format!("key:{key}"), vec![refusal()]);
        }
        let apis = [
            pool_with("a", &endpoint.base_url(), &json!(KEYS), json!({})),
            endpoint_with("b", &other.base_url(), json!({ "priority": 1 })),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        proxy.chat("m").await.assert_from("b", 4);
        proxy.chat("m").await.assert_from("b", 1);
        let status = proxy.get("/v1/status").await.json();
        assert!(status["apis"][0]["restEnds"].is_string(), "{}", status["apis"][0]);
        assert_eq!(states(&status["apis"][0]["keys"]), ["open"; 5], "{}", status["apis"][0]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_let_in_again_costs_no_key() {
    within(async {
        let endpoint = simulator().await;
        for key in KEYS {
            endpoint.script(&format!("key:{key}"), vec![refusal()]);
        }
        let proxy = Proxy::start(json!({}), &[pool_with("a", &endpoint.base_url(), &json!(KEYS), json!({}))]).await;
        for _ in 0..6 {
            assert_ne!(proxy.chat("m").await.status, 200);
        }
        for key in KEYS {
            endpoint.script(&format!("key:{key}"), Vec::new());
        }
        for _ in 0..20 {
            assert_eq!(proxy.chat("m").await.status, 200);
        }
        let keys = keys_of(&proxy, "a").await;
        assert_eq!(states(&keys), ["open"; 5], "{keys}");
        // One that is refused all the same is blamed for itself.
        endpoint.script(&format!("key:{}", KEYS[2]), vec![refusal()]);
        for _ in 0..60 {
            assert_eq!(proxy.chat("m").await.status, 200);
        }
        assert_eq!(states(&keys_of(&proxy, "a").await)[2], "cooling_down");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoints_own_trouble_is_not_its_keys() {
    within(async {
        let (failing, other) = (simulator().await, simulator().await);
        failing.script("m", vec![Behaviour::status(500)]);
        let apis = [
            pool_with("a", &failing.base_url(), &json!(KEYS), json!({})),
            endpoint_with("b", &other.base_url(), json!({ "priority": 1 })),
        ];
        let proxy = Proxy::start(json!({ "breaker": { "failures": 2 } }), &apis).await;
        proxy.chat("m").await.assert_from("b", 2);
        proxy.chat("m").await.assert_from("b", 2);
        proxy.chat("m").await.assert_from("b", 1);
        assert_eq!(failing.requests().len(), 2, "another key would fail as well");
        let keys = keys_of(&proxy, "a").await;
        assert_eq!(states(&keys), ["open"; 5], "{keys}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_endpoint_says_of_its_limits_rests_a_key_before_it_refuses() {
    within(async {
        let told = |remaining: &str, reset: &str| {
            Behaviour::default()
                .header("x-ratelimit-remaining-requests", remaining)
                .header("x-ratelimit-reset-requests", reset)
        };
        for (learns, expected) in [(true, [1, 5]), (false, [3, 3])] {
            let endpoint = simulator().await;
            endpoint.script(&format!("key:{}", KEYS[0]), vec![told("0", "5m0s")]);
            endpoint.script(&format!("key:{}", KEYS[1]), vec![told("1", "5m0s")]);
            let api = pool_with("a", &endpoint.base_url(), &json!(KEYS[..2]), json!({ "learnLimits": learns }));
            let proxy = Proxy::start(json!({ "strategy": "round_robin" }), &[api]).await;
            for _ in 0..6 {
                assert_eq!(proxy.chat("m").await.status, 200);
            }
            assert_eq!(sent(&endpoint).values().copied().collect::<Vec<_>>(), expected);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_strategy_chooses_among_the_keys_and_a_session_keeps_its_own() {
    within(async {
        for (strategy, expected) in [("round_robin", vec![6, 6]), ("fill_first", vec![12])] {
            let endpoint = simulator().await;
            let api = pool_with("a", &endpoint.base_url(), &json!(KEYS[..2]), json!({}));
            let proxy = Proxy::start(json!({ "strategy": strategy }), &[api]).await;
            for _ in 0..12 {
                assert_eq!(proxy.chat("m").await.status, 200);
            }
            assert_eq!(sent(&endpoint).values().copied().collect::<Vec<_>>(), expected, "{strategy}");
        }
        let endpoint = simulator().await;
        let weighted = json!([{ "key": KEYS[0], "weight": 3 }, { "key": KEYS[1], "weight": 1 }]);
        let api = pool_with("a", &endpoint.base_url(), &weighted, json!({}));
        let proxy = Proxy::start(json!({ "strategy": "round_robin" }), &[api]).await;
        for _ in 0..12 {
            assert_eq!(proxy.chat("m").await.status, 200);
        }
        assert_eq!(sent(&endpoint).values().copied().collect::<Vec<_>>(), [9, 3]);
        for session in ["one", "two", "three"] {
            let before = sent(&endpoint);
            for _ in 0..4 {
                let request = proxy.request(Method::POST, "/v1/chat/completions").header("x-session-id", session);
                let reply = Reply::of(request.json(&chat("m"))).await;
                assert_eq!(reply.status, 200);
            }
            let after = sent(&endpoint);
            let used: Vec<usize> =
                after.iter().map(|(key, count)| count - before[key]).filter(|more| *more > 0).collect();
            assert_eq!(used, [4], "{session}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_for_their_models() {
    within(async {
        let endpoint = simulator().await;
        let keys = json!([{ "key": KEYS[0], "models": ["big*"] }, { "key": KEYS[1], "models": ["small"] }]);
        let api = pool_with("a", &endpoint.base_url(), &keys, json!({ "modelMapping": { "asked": "big-1" } }));
        let proxy = Proxy::start(json!({}), &[api]).await;
        for (model, key) in [("big-2", 0), ("asked", 0), ("small", 1)] {
            let before = sent(&endpoint).get(KEYS[key]).copied().unwrap_or(0);
            for _ in 0..4 {
                assert_eq!(proxy.chat(model).await.status, 200);
            }
            assert_eq!(sent(&endpoint)[KEYS[key]], before + 4, "{model}");
        }
        assert_ne!(proxy.chat("other").await.status, 200, "no key is for it");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_made_with_a_key_is_asked_for_with_it() {
    within(async {
        let endpoint = simulator_with(Options { objects: true, ..Options::default() }).await;
        let api = pool_with("a", &endpoint.base_url(), &json!(KEYS), json!({}));
        let proxy = Proxy::start(json!({ "strategy": "round_robin" }), &[api]).await;
        for _ in 0..5 {
            let made = proxy.post("/v1/responses", &json!({ "model": "m", "input": "one", "store": true })).await;
            assert_eq!(made.status, 200, "{made:?}");
            let id = made.json()["id"].as_str().unwrap().to_owned();
            let maker = endpoint.requests().last().unwrap().headers["authorization"].clone();
            for _ in 0..3 {
                let got = proxy.get(&format!("/v1/responses/{id}")).await;
                assert_eq!(got.status, 200, "{got:?}");
                assert_eq!(endpoint.requests().last().unwrap().headers["authorization"], maker);
            }
        }
        // Keys of one organisation reach each other's.
        let endpoint = simulator_with(Options { objects: true, ..Options::default() }).await;
        let api = pool_with("a", &endpoint.base_url(), &json!(KEYS), json!({ "organization": "acme" }));
        let proxy = Proxy::start(json!({ "strategy": "round_robin" }), &[api]).await;
        let made = proxy.post("/v1/responses", &json!({ "model": "m", "input": "one", "store": true })).await;
        let id = made.json()["id"].as_str().unwrap().to_owned();
        for _ in 0..5 {
            assert_eq!(proxy.get(&format!("/v1/responses/{id}")).await.status, 200);
        }
        assert_eq!(sent(&endpoint).len(), 5);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_keys_are_watched_and_counts_stay_with_their_keys() {
    within(async {
        let endpoint = simulator().await;
        let keys = json!([{ "file": "keys.txt", "rpd": 2 }, { "env": "MORE_KEYS", "rpd": 1 }]);
        let text = config_text(json!({}), &[pool_with("a", &endpoint.base_url(), &keys, json!({}))]);
        let folder = folder_with("apis.json", &text);
        let file = folder.path().join("keys.txt");
        std::fs::write(&file, format!("# ours\n{}\n\n  {} # the second\n", KEYS[0], KEYS[1])).unwrap();
        std::fs::write(folder.path().join(".env"), format!("MORE_KEYS={},{}\n", KEYS[2], KEYS[3])).unwrap();
        let mut command = program(folder.path());
        command.args(["--config", "apis.json"]);
        let running = Running::of(command, folder);
        running.ready().await;
        let client = client(|builder| builder);
        let ask = || async {
            let request = client.post(running.url("/v1/chat/completions")).bearer_auth(KEY).json(&chat("m"));
            Reply::of(request).await
        };
        for _ in 0..6 {
            assert_eq!(ask().await.status, 200);
        }
        assert_eq!(sent(&endpoint).values().copied().collect::<Vec<_>>(), [2, 2, 1, 1]);
        assert_eq!(ask().await.status, 429);
        // Another order, one key less and one more.
        std::fs::write(&file, format!("{}\n{}\n", KEYS[4], KEYS[0])).unwrap();
        for _ in 0..250 {
            if ask().await.status == 200 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(ask().await.status, 200);
        assert_eq!(ask().await.status, 429);
        assert_eq!(sent(&endpoint)[KEYS[4]], 2);
        assert_eq!(sent(&endpoint)[KEYS[0]], 2, "its day goes on where it was");
        // A file that was emptied by mistake changes nothing.
        std::fs::write(&file, "# nothing\n").unwrap();
        running.logs("keys.txt has no key in it").await;
        assert_eq!(ask().await.status, 429);
        let log = running.killed();
        assert!(log.contains("apiKeys: 1 added, 1 removed"), "{log}");
        for key in KEYS {
            assert!(!log.contains(key), "{log}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_keys_in_front_do_not_hide_the_good_ones_behind_them() {
    within(async {
        for strategy in ["fill_first", "round_robin", "random"] {
            let endpoint = simulator().await;
            for key in &KEYS[..3] {
                endpoint.script(&format!("key:{key}"), vec![refusal()]);
            }
            let api = pool_with("a", &endpoint.base_url(), &json!(KEYS), json!({}));
            let proxy = Proxy::start(json!({ "strategy": strategy }), &[api]).await;
            let mut failed = 0;
            for _ in 0..60 {
                failed += usize::from(proxy.chat("m").await.status != 200);
            }
            // The first request may meet the three of them, which looks like a refused address until a key is answered.
            assert!(failed <= 8, "{strategy}: {failed}");
            for _ in 0..10 {
                assert_eq!(proxy.chat("m").await.status, 200, "{strategy}");
            }
            let keys = keys_of(&proxy, "a").await;
            assert_eq!(states(&keys)[3..], ["open", "open"], "{strategy}: {keys}");
            let sent = sent(&endpoint);
            assert!(KEYS[..3].iter().all(|key| sent.get(*key).is_none_or(|times| *times <= 8)), "{strategy}: {sent:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_no_other_endpoint_can_better_is_let_through_whatever_keys_are_left() {
    within(async {
        let endpoint = simulator().await;
        let api = pool_with("a", &endpoint.base_url(), &json!(KEYS), json!({}));
        let proxy = Proxy::start(json!({ "retry": { "minTokensPerSecond": 1000 } }), &[api]).await;
        let empty = r#"{"id":"x","object":"chat.completion","choices":[]}"#;
        endpoint.script("m", vec![Behaviour { body: Some(empty.into()), ..Behaviour::default() }]);
        let reply = proxy.chat("m").await;
        assert_eq!((reply.status, reply.text()), (200, empty));
        let odd = "data: {\"odd\":1}\n\ndata: [DONE]\n\n";
        let stream = Some("text/event-stream".into());
        endpoint.script("m", vec![Behaviour { body: Some(odd.into()), content_type: stream, ..Behaviour::default() }]);
        assert_eq!(proxy.post("/v1/chat/completions", &chat_stream("m")).await.text(), odd);
        endpoint.script("m", vec![Behaviour { chunk_delay_ms: 300, events: 12, ..Behaviour::default() }]);
        let slow = proxy.post("/v1/chat/completions", &chat_stream("m")).await;
        assert!(slow.status == 200 && slow.text().ends_with("data: [DONE]\n\n"), "{slow:?}");
        assert_eq!(endpoint.requests().len(), 3, "no other key was asked");
        // An error of a key in the first event is that key's all the same.
        let event = "data: {\"error\":{\"message\":\"Incorrect API key provided\",\"code\":\"invalid_api_key\"}}\n\n";
        let stream = Some("text/event-stream".into());
        endpoint.script("m", vec![Behaviour::default()]);
        for key in &KEYS[..2] {
            let refused = Behaviour { body: Some(event.into()), content_type: stream.clone(), ..Behaviour::default() };
            endpoint.script(&format!("key:{key}"), vec![refused]);
        }
        for _ in 0..6 {
            let reply = proxy.post("/v1/chat/completions", &chat_stream("m")).await;
            assert!(reply.status == 200 && !reply.text().contains("invalid_api_key"), "{reply:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_door_gets_the_key_in_its_own_place() {
    within(async {
        let (chats, messages) = (simulator().await, simulator().await);
        let doors = json!({ "messages": { "baseUrl": messages.base_url(), "authHeader": "x-api-key" } });
        let api = pool_with("a", &chats.base_url(), &json!(KEYS[..2]), json!({ "formats": doors }));
        let proxy = Proxy::start(json!({ "strategy": "round_robin" }), &[api]).await;
        for _ in 0..2 {
            assert_eq!(proxy.chat("m").await.status, 200);
            proxy.post("/v1/messages", &json!({ "model": "m", "max_tokens": 9, "messages": [] })).await;
        }
        assert_eq!(sent(&chats).len(), 1, "every second turn is the other door's");
        let at_door: Vec<String> = messages
            .requests()
            .iter()
            .map(|request| {
                assert!(request.headers.get("authorization").is_none());
                request.headers["x-api-key"].to_str().unwrap().to_owned()
            })
            .collect();
        assert!(!at_door.is_empty() && at_door.iter().all(|key| key == KEYS[1]), "{at_door:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_made_with_the_only_key_is_found_once_there_are_several() {
    within(async {
        let endpoint = simulator_with(Options { objects: true, ..Options::default() }).await;
        let other = simulator().await;
        let apis = |first: Value| config_text(json!({}), &[first, endpoint_with("b", &other.base_url(), json!({}))]);
        let text = apis(endpoint_with("a", &endpoint.base_url(), json!({ "apiKey": KEYS[0], "priority": 0 })));
        let folder = folder_with("apis.json", &text.replace("\"priority\":0", "\"models\":[\"m\"]"));
        let path = folder.path().join("apis.json");
        let mut command = program(folder.path());
        command.args(["--config", "apis.json"]);
        let running = Running::of(command, folder);
        running.ready().await;
        let client = client(|builder| builder);
        let call = |method: Method, path: &str| client.request(method, running.url(path)).bearer_auth(KEY);
        let body = json!({ "model": "m", "input": "one", "store": true });
        let mut id = None;
        for _ in 0..40 {
            let made = Reply::of(call(Method::POST, "/v1/responses").json(&body)).await;
            if made.endpoint() == Some("a") {
                id = made.json()["id"].as_str().map(str::to_owned);
                break;
            }
        }
        let id = id.unwrap();
        let several =
            apis(pool_with("a", &endpoint.base_url(), &json!([KEYS[1], KEYS[0]]), json!({ "models": ["m"] })));
        std::fs::write(&path, several).unwrap();
        running.logs("apiKeys in place of apiKey").await;
        let got = Reply::of(call(Method::GET, &format!("/v1/responses/{id}"))).await;
        assert_eq!((got.status, got.endpoint()), (200, Some("a")), "{got:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_is_refused_for_its_key_is_opened_with_another() {
    within(async {
        let by_hand = ByHand::bind().await;
        let api = pool_with("a", &by_hand.base_url(), &json!(KEYS[..2]), json!({}));
        let proxy = Proxy::start(json!({ "strategy": "round_robin" }), &[api]).await;
        let mut socket = proxy.wire().await;
        socket.send(websocket("/v1/realtime?model=m")).await;
        let body = r#"{"error":{"message":"Incorrect API key provided","code":"invalid_api_key"}}"#;
        let (mut first, head, _) = by_hand.call().await;
        assert_eq!(head.header("authorization"), Some(format!("Bearer {}", KEYS[0])));
        let length = body.len();
        first
            .send(format!(
                "HTTP/1.1 401 Unauthorized\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
            ))
            .await;
        let (mut second, head, _) = by_hand.call().await;
        assert_eq!(head.header("authorization"), Some(format!("Bearer {}", KEYS[1])));
        second.send("HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\nhi").await;
        assert_eq!(socket.head().await.unwrap().status(), 101);
        assert_eq!(socket.exactly(2).await.unwrap(), "hi");
    })
    .await;
}
