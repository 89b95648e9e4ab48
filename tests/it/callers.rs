//! Callers with keys of their own: what each key opens, and whose what is made with it is.

use api_together::simulator::{Behaviour, Options, Simulator};
use http::Method;
use serde_json::{Value, json};

use crate::connections::websocket;
use crate::harness::{KEY, Proxy, Reply, chat, config_text, endpoint_with, simulator, simulator_with, within};

const ADA: &str = "sk-ada-0f6c1d93be5a7724";
const BOB: &str = "sk-bob-91c7aa02f4d86e35";
const OLD: &str = "sk-old-55e0b1c29d7f3a68";

fn keys() -> Value {
    json!([
        { "name": "ada", "key": ADA, "tags": ["team a"] },
        { "name": "bob", "key": BOB, "models": ["gpt-4o*", "small"], "calls": ["chat", "files"], "endpoints": ["b"] },
        { "name": "eve", "key": "sk-eve-7d3f1a90bb2c4e58", "models": ["gpt-4o"] },
        { "name": "old", "key": OLD, "expires": "2020-01-01" },
        { "name": "far", "key": "sk-far-55e0b1c29d7f3a68", "allowFrom": ["192.0.2.0/24"] },
    ])
}

async fn with_key(proxy: &Proxy, key: &str, method: Method, path: &str, body: Option<Value>) -> Reply {
    let mut request = proxy.request_without_key(method, path).bearer_auth(key);
    if let Some(body) = body {
        request = request.json(&body);
    }
    Reply::of(request).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_opens_what_it_is_for_and_nothing_else() {
    within(async {
        let (first, second) = (simulator().await, simulator().await);
        let apis = [
            endpoint_with("a", &first.base_url(), json!({ "models": ["gpt-4o", "gpt-4o-mini", "o9", "small"] })),
            endpoint_with("b", &second.base_url(), json!({ "models": ["gpt-4o", "o9", "small"] })),
        ];
        let proxy = Proxy::start(json!({ "keys": keys() }), &apis).await;
        let post = |key: &'static str, model: &'static str| {
            with_key(&proxy, key, Method::POST, "/v1/chat/completions", Some(chat(model)))
        };
        // All its requests go where they may.
        for _ in 0..8 {
            post(BOB, "gpt-4o").await.assert_from("b", 1);
        }
        post(ADA, "o9").await;
        for (model, name) in [("gpt-4o-mini", "gpt-4o-mini"), ("o9", "o9"), ("nowhere", "nowhere")] {
            let message = post(BOB, model).await.assert_error(404, "invalid_request_error", "model_not_found");
            assert!(message.contains(name), "{message}");
        }
        let body = json!({ "model": "gpt-4o", "input": "x" });
        let refused = with_key(&proxy, BOB, Method::POST, "/v1/embeddings", Some(body)).await;
        let message = refused.assert_error(403, "invalid_request_error", "call_not_allowed");
        assert!(message.contains("bob") && message.contains("embeddings"), "{message}");
        // A model that stands elsewhere, in what an endpoint keeps, is none that it may ask for.
        let stored = json!({ "messages": [], "prompt": { "id": "pmpt_1" } });
        let refused = with_key(&proxy, BOB, Method::POST, "/v1/chat/completions", Some(stored)).await;
        let message = refused.assert_error(400, "invalid_request_error", None);
        assert!(message.contains("some models only"), "{message}");
        // An expired one, one from elsewhere, one that is switched off by being unknown.
        for (key, status, code) in [
            (OLD, 401, "invalid_api_key"),
            ("sk-far-55e0b1c29d7f3a68", 403, "address_not_allowed"),
            ("sk-nobody", 401, "invalid_api_key"),
        ] {
            let refused = with_key(&proxy, key, Method::POST, "/v1/chat/completions", Some(chat("gpt-4o"))).await;
            let message = refused.assert_error(status, "invalid_request_error", code);
            assert!(!message.contains(key), "{message}");
        }
        // The models of a batch stand in a file.
        with_key(&proxy, "sk-eve-7d3f1a90bb2c4e58", Method::POST, "/v1/batches", Some(json!({}))).await.assert_error(
            403,
            "invalid_request_error",
            "call_not_allowed",
        );
        // What shows the whole gateway is for its own key.
        for path in ["/v1/status", "/v1/token/stats", "/metrics"] {
            assert_eq!(proxy.get(path).await.status, 200, "{path}");
            with_key(&proxy, ADA, Method::GET, path, None).await.assert_error(
                403,
                "invalid_request_error",
                "call_not_allowed",
            );
        }
        with_key(&proxy, ADA, Method::POST, "/v1/token/reset", None).await.assert_error(
            403,
            "invalid_request_error",
            "call_not_allowed",
        );
        // Wherever it stands.
        for (name, value) in [("x-api-key", ADA.to_owned()), ("authorization", ADA.to_owned())] {
            let request = proxy.request_without_key(Method::GET, "/v1/models").header(name, value);
            assert_eq!(Reply::of(request).await.status, 200, "{name}");
        }
        let request = proxy.request_without_key(Method::GET, &format!("/v1/models?key={ADA}"));
        assert_eq!(Reply::of(request).await.status, 200);
        // No key of a client reaches an endpoint, in whatever place it stands.
        let request = proxy.request_without_key(Method::POST, &format!("/v1/chat/completions?key={ADA}&x={ADA}"));
        let request = request.header("x-title", format!("by {ADA}")).bearer_auth(ADA).json(&chat("gpt-4o"));
        assert_eq!(Reply::of(request).await.status, 200);
        for simulator in [&first, &second] {
            assert!(!format!("{:?}", simulator.requests()).contains(ADA), "{:?}", simulator.requests());
        }
        let mut wire = proxy.wire().await;
        wire.send(websocket("/v1/realtime?model=gpt-4o").replace(KEY, BOB)).await;
        assert_eq!(wire.message().await.0.status(), 403, "its calls are chat and files");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_shown_the_models_that_it_may_ask_for() {
    within(async {
        let simulator = simulator().await;
        let apis = [
            endpoint_with("a", &simulator.base_url(), json!({ "models": ["gpt-4o-mini", "o9"] })),
            endpoint_with("b", &simulator.base_url(), json!({ "models": ["gpt-4o", "o9"] })),
        ];
        // Without a key that opens everything.
        let mut config: Value = serde_json::from_str(&config_text(json!({ "keys": keys() }), &apis)).unwrap();
        config["server"].as_object_mut().unwrap().remove("apiKey");
        let proxy = Proxy::of_text(&config.to_string(), &[]).await;
        for (key, models) in [(ADA, vec!["gpt-4o", "gpt-4o-mini", "o9"]), (BOB, vec!["gpt-4o"])] {
            let list = with_key(&proxy, key, Method::GET, "/v1/models", None).await.json();
            let names: Vec<_> = list["data"].as_array().unwrap().iter().map(|model| &model["id"]).collect();
            assert_eq!(names, models);
        }
        assert_eq!(with_key(&proxy, BOB, Method::GET, "/v1/models/gpt-4o", None).await.status, 200);
        for hidden in ["o9", "gpt-4o-mini"] {
            with_key(&proxy, BOB, Method::GET, &format!("/v1/models/{hidden}"), None).await.assert_error(
                404,
                "invalid_request_error",
                "model_not_found",
            );
        }
        assert_eq!(with_key(&proxy, KEY, Method::GET, "/v1/models", None).await.status, 401);
    })
    .await;
}

async fn keeping(name: &str) -> Simulator {
    simulator_with(Options { name: name.to_owned(), objects: true, ..Options::default() }).await
}

/// Endpoints that keep what is made there, and know nothing of one another's.
fn over(simulators: &[Simulator]) -> Vec<Value> {
    simulators.iter().zip('a'..).map(|(one, id)| endpoint_with(&id.to_string(), &one.base_url(), json!({}))).collect()
}

async fn make_file(proxy: &Proxy, key: &str) -> String {
    let reply = with_key(proxy, key, Method::POST, "/v1/files", Some(json!({}))).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()["id"].as_str().unwrap().to_owned()
}

async fn listed(proxy: &Proxy, key: &str, limit: usize) -> Vec<String> {
    let (mut ids, mut after) = (Vec::new(), String::new());
    loop {
        let path = format!("/v1/files?limit={limit}{after}");
        let page = with_key(proxy, key, Method::GET, &path, None).await.json();
        let page_ids = page["data"].as_array().unwrap_or_else(|| panic!("{page}")).iter();
        ids.extend(page_ids.map(|file| file["id"].as_str().unwrap().to_owned()));
        if page["has_more"] != true {
            ids.sort();
            return ids;
        }
        after = format!("&after={}", page["last_id"].as_str().unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_caller_makes_another_neither_finds_nor_lists() {
    within(async {
        for endpoints in [1, 2] {
            let simulators = [keeping("a").await, keeping("b").await];
            let apis = over(&simulators[..endpoints]);
            let keys = json!([{ "name": "ada", "key": ADA }, { "name": "bob", "key": BOB }]);
            let proxy = Proxy::start(json!({ "keys": keys, "strategy": "round_robin" }), &apis).await;
            let mut made: [Vec<String>; 3] = Default::default();
            for _ in 0..5 {
                for (key, made) in [ADA, BOB, KEY].into_iter().zip(&mut made) {
                    made.push(make_file(&proxy, key).await);
                }
            }
            for (key, made) in [ADA, BOB, KEY].into_iter().zip(&made) {
                let mut own = made.clone();
                own.sort();
                for limit in [1, 2, 100] {
                    assert_eq!(listed(&proxy, key, limit).await, own, "{endpoints} endpoints, {limit} a page");
                }
                assert_eq!(with_key(&proxy, key, Method::GET, &format!("/v1/files/{}", made[0]), None).await.status, 200);
            }
            let asked = simulators.iter().map(|one| one.requests().len()).sum::<usize>();
            let [adas, bobs, shared] = &made;
            for (key, others) in [(ADA, bobs), (ADA, shared), (BOB, adas), (KEY, adas), (KEY, bobs)] {
                for method in [Method::GET, Method::DELETE] {
                    with_key(&proxy, key, method, &format!("/v1/files/{}", others[0]), None)
                        .await
                        .assert_error(404, "invalid_request_error", "object_not_found");
                }
                let batch = json!({ "input_file_id": others[1], "endpoint": "/v1/chat/completions", "completion_window": "24h" });
                with_key(&proxy, key, Method::POST, "/v1/batches", Some(batch))
                    .await
                    .assert_error(404, "invalid_request_error", "object_not_found");
            }
            let asked_now = simulators.iter().map(|one| one.requests().len()).sum::<usize>();
            assert_eq!(asked, asked_now, "no endpoint is asked for what is another's");
            let deleted = with_key(&proxy, ADA, Method::DELETE, &format!("/v1/files/{}", adas[0]), None).await;
            assert_eq!(deleted.status, 200);
            assert_eq!(listed(&proxy, ADA, 100).await.len(), 4);
            assert_eq!(listed(&proxy, BOB, 100).await.len(), 5);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_may_share_what_they_make() {
    within(async {
        let simulators = [keeping("a").await, keeping("b").await];
        let apis = over(&simulators);
        let keys = json!([{ "name": "ada", "key": ADA }, { "name": "bob", "key": BOB }]);
        let proxy = Proxy::start(json!({ "keys": keys, "shareIds": true, "strategy": "round_robin" }), &apis).await;
        let (one, other) = (make_file(&proxy, ADA).await, make_file(&proxy, BOB).await);
        for key in [ADA, BOB, KEY] {
            for id in [&one, &other] {
                assert_eq!(with_key(&proxy, key, Method::GET, &format!("/v1/files/{id}"), None).await.status, 200);
            }
            assert_eq!(listed(&proxy, key, 1).await.len(), 2);
        }
    })
    .await;
}

/// Checks that a key is at its own limit, and returns for how many milliseconds.
fn assert_key_full(reply: &Reply, kind: &str) -> u64 {
    let message = reply.assert_error(429, kind, "key_rate_limited");
    assert!(message.contains("(ada)") && message.contains("own limit"), "{message}");
    assert_eq!(reply.header("x-api-together-attempts"), None);
    reply.header("retry-after-ms").unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keys_own_limits_hold_whatever_the_endpoints_have_left() {
    within(async {
        let simulator = simulator().await;
        let keys = json!([
            { "name": "ada", "key": ADA, "rpm": 5, "modelLimits": { "o9*": { "rpd": 1 } } },
            { "name": "bob", "key": BOB },
        ]);
        let apis = [endpoint_with("a", &simulator.base_url(), json!({ "rpm": 100, "models": ["m", "o9-mini"] }))];
        let proxy = Proxy::start(json!({ "keys": keys }), &apis).await;
        let post = |key: &'static str, model: &'static str| {
            with_key(&proxy, key, Method::POST, "/v1/chat/completions", Some(chat(model)))
        };
        assert_eq!(post(ADA, "o9-mini").await.status, 200);
        let full = post(ADA, "o9-mini").await;
        assert!(full.assert_error(429, "requests", "key_rate_limited").contains("o9*"));
        assert_eq!(full.header("x-should-retry"), Some("false"), "until tomorrow");
        // At once, by many.
        let replies = futures_of(20, || post(ADA, "m")).await;
        let good = replies.iter().filter(|reply| reply.status == 200).count();
        assert_eq!(good, 4, "5 a minute");
        let wait = assert_key_full(replies.iter().find(|reply| reply.status == 429).unwrap(), "requests");
        assert!((50_000..=61_000).contains(&wait), "{wait}");
        let reply = post(BOB, "m").await;
        assert_eq!((reply.status, reply.header("x-ratelimit-limit-requests")), (200, Some("100")));
        assert_eq!(simulator.requests().len(), 6, "no endpoint is asked for what is refused");
        assert_eq!(proxy.status_of("a").await["usage"]["rpm"], 6);

        let key = with_key(&proxy, ADA, Method::GET, "/v1/key", None).await.json();
        assert_eq!(
            (&key["name"], &key["limits"]["rpm"]["used"], &key["limits"]["rpm"]["left"]),
            (&json!("ada"), &json!(5), &json!(0))
        );
        assert_eq!(key["heldBy"], "5 requests a minute");
        assert!(key["frees"].is_string() && key["modelLimits"]["o9*"]["limits"]["rpd"]["used"] == 1, "{key}");
        assert_eq!(with_key(&proxy, BOB, Method::GET, "/v1/key", None).await.json()["limits"], json!({}));
        assert_eq!(proxy.get("/v1/key").await.json()["name"], Value::Null);
    })
    .await;
}

pub(crate) async fn futures_of<F: Future<Output = Reply>>(count: usize, make: impl Fn() -> F) -> Vec<Reply> {
    let mut all: Vec<_> = (0..count).map(|_| Box::pin(make())).collect();
    let mut done: Vec<Option<Reply>> = (0..count).map(|_| None).collect();
    std::future::poll_fn(|context| {
        for (one, done) in all.iter_mut().zip(&mut done).filter(|(_, done)| done.is_none()) {
            if let std::task::Poll::Ready(reply) = one.as_mut().poll(context) {
                *done = Some(reply);
            }
        }
        if done.iter().all(Option::is_some) { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    done.into_iter().flatten().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_counts_once_for_its_key_however_often_it_is_tried() {
    within(async {
        let failing = crate::harness::behaving(Behaviour::status(500)).await;
        let good = simulator().await;
        let keys = json!([{ "name": "ada", "key": ADA, "rpm": 100, "maxConcurrent": 2 }]);
        let apis = [
            endpoint_with("a", &failing.base_url(), json!({ "models": ["m"] })),
            endpoint_with("b", &good.base_url(), json!({ "models": ["m"], "priority": 1 })),
            endpoint_with("full", &good.base_url(), json!({ "models": ["full"], "rpm": 1 })),
        ];
        let proxy = Proxy::start(json!({ "keys": keys }), &apis).await;
        let used = async |kind: &str| {
            with_key(&proxy, ADA, Method::GET, "/v1/key", None).await.json()["limits"][kind]["used"].clone()
        };
        let post = |model: &str| with_key(&proxy, ADA, Method::POST, "/v1/chat/completions", Some(chat(model)));
        post("m").await.assert_from("b", 2);
        assert_eq!(used("rpm").await, 1, "two attempts, one request");
        post("full").await.assert_from("full", 1);
        post("full").await.assert_error(429, "requests", "rate_limit_exceeded");
        assert_eq!(used("rpm").await, 2, "what the endpoints refuse costs the key nothing");
        for _ in 0..100 {
            if used("maxConcurrent").await == 0 {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        assert_eq!(used("maxConcurrent").await, 0, "nothing is in flight");
        // Two at once, and no more.
        failing.set_default(Behaviour { chunk_delay_ms: 30, events: 1000, ..Behaviour::default() });
        let open = |key: &'static str| {
            let request = proxy.request_without_key(Method::POST, "/v1/chat/completions").bearer_auth(key);
            request.json(&crate::harness::chat_stream("m")).send()
        };
        let (one, other) = (open(ADA).await.unwrap(), open(ADA).await.unwrap());
        assert_eq!((one.status().as_u16(), other.status().as_u16()), (200, 200));
        let message = post("m").await.assert_error(429, "requests", "key_rate_limited");
        assert!(message.contains("2 requests at once"), "{message}");
        drop(one);
        for _ in 0..300 {
            if used("maxConcurrent").await == 1 {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        assert_eq!(used("maxConcurrent").await, 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keys_tokens_are_reserved_before_a_request_and_settled_after_it() {
    within(async {
        let slow = crate::harness::behaving(Behaviour { header_delay_ms: 400, ..Behaviour::default() }).await;
        let keys = json!([{ "name": "ada", "key": ADA, "tpm": 1000 }]);
        let apis = [endpoint_with("a", &slow.base_url(), json!({}))];
        let proxy = Proxy::start(json!({ "keys": keys, "budgetReserveTokens": 500 }), &apis).await;
        let tpm = async || {
            with_key(&proxy, ADA, Method::GET, "/v1/key", None).await.json()["limits"]["tpm"]["used"].as_u64().unwrap()
        };
        let body = |tokens: u32| json!({ "model": "m", "messages": [], "max_tokens": tokens });
        let post = |tokens: u32| with_key(&proxy, ADA, Method::POST, "/v1/chat/completions", Some(body(tokens)));
        // Each may take 400 and its prompt, so two fit, whoever they are.
        let replies = futures_of(5, || post(400)).await;
        let good: Vec<_> = replies.iter().filter(|reply| reply.status == 200).collect();
        assert_eq!(good.len(), 2, "{replies:?}");
        assert_key_full(replies.iter().find(|reply| reply.status == 429).unwrap(), "tokens");
        let spent: u64 = good.iter().map(|reply| reply.json()["usage"]["total_tokens"].as_u64().unwrap()).sum();
        for _ in 0..100 {
            if tpm().await == spent {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        assert_eq!(tpm().await, spent, "what was reserved is free again");
        assert_eq!(post(400).await.status, 200);
        // A client that leaves before anything was sent to it gives its reservation back too.
        let left = proxy.request_without_key(Method::POST, "/v1/chat/completions").bearer_auth(ADA).json(&body(400));
        drop(tokio::time::timeout(std::time::Duration::from_millis(100), left.send()).await);
        for _ in 0..100 {
            if tpm().await < 400 {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        assert!(tpm().await < 400, "{}", tpm().await);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_take_turns_in_the_queue_and_none_fills_it_alone() {
    within(async {
        let slow = crate::harness::behaving(Behaviour { header_delay_ms: 200, ..Behaviour::default() }).await;
        let keys = json!([{ "name": "agent", "key": ADA }, { "name": "bob", "key": BOB }]);
        let apis = [endpoint_with("a", &slow.base_url(), json!({ "maxConcurrent": 1 }))];
        let queue = json!({ "maxWaitMs": 20_000, "maxRequests": 12, "maxRequestsPerKey": 8 });
        let proxy = Proxy::start(json!({ "keys": keys, "queue": queue }), &apis).await;
        let body = |user: &str| json!({ "model": "m", "messages": [], "user": user });
        let post = |key: &'static str, user: &'static str| {
            let request = proxy.request_without_key(Method::POST, "/v1/chat/completions").bearer_auth(key);
            tokio::spawn(Reply::of(request.json(&body(user))))
        };
        let agent: Vec<_> = (0..12).map(|_| post(ADA, "agent")).collect();
        crate::harness::until("the agent waits", || slow.requests().len() == 1).await;
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        let bob: Vec<_> = (0..2).map(|_| post(BOB, "bob")).collect();
        for reply in bob {
            assert_eq!(reply.await.unwrap().status, 200);
        }
        let mut refused = 0;
        for reply in agent {
            let reply = reply.await.unwrap();
            if reply.status == 429 {
                refused += 1;
            } else {
                assert_eq!(reply.status, 200);
            }
        }
        assert_eq!(refused, 3, "one was on its way, and eight may wait");
        let order: Vec<String> = slow
            .requests()
            .iter()
            .map(|request| serde_json::from_slice::<Value>(&request.body).unwrap()["user"].as_str().unwrap().to_owned())
            .collect();
        let last_of_bob = order.iter().rposition(|user| user == "bob").unwrap();
        assert!(last_of_bob <= 5, "it waited behind the agent: {order:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_spelled_plainly_opens_nothing_of_others() {
    within(async {
        let simulators = [keeping("a").await];
        let keys = json!([{ "name": "ada", "key": ADA, "rpm": 60 }, { "name": "bob", "key": BOB, "models": ["m"] }]);
        let proxy = Proxy::start(json!({ "keys": keys }), &over(&simulators)).await;
        let adas = make_file(&proxy, ADA).await;
        // Decoded here as at the endpoint, it is nobody else's still.
        for path in [format!("/v1/%66iles/{adas}"), format!("/v1/files/{}", adas.replacen('-', "%2D", 1))] {
            with_key(&proxy, BOB, Method::GET, &path, None).await.assert_error(
                404,
                "invalid_request_error",
                "object_not_found",
            );
            assert_eq!(with_key(&proxy, ADA, Method::GET, &path, None).await.status, 200, "{path}");
        }
        assert_eq!(with_key(&proxy, BOB, Method::GET, "/v1/%66iles", None).await.json()["data"], json!([]));
        for path in
            [format!("/v1/Files/{adas}"), format!("/v1/files;x/{adas}"), "/v1/batches?model=m&%6dodel=o9".into()]
        {
            let refused = with_key(&proxy, BOB, Method::GET, &path, None).await;
            assert_eq!(refused.status, 400, "{path}: {refused:?}");
        }
        let asked = simulators[0].requests().len();
        for body in [
            format!(r#"{{"model":"m","input":"x","previous\u005fresponse_id":"{adas}"}}"#),
            r#"{"\u006dodel":"o9","model":"m","messages":[]}"#.to_owned(),
            r#"{"model":"m","models":["m","o9"],"messages":[]}"#.to_owned(),
        ] {
            let request = proxy.request_without_key(Method::POST, "/v1/responses").bearer_auth(BOB);
            let reply = Reply::of(request.header("content-type", "application/json").body(body.clone())).await;
            assert!(matches!(reply.status, 400 | 404), "{body}: {reply:?}");
        }
        assert_eq!(simulators[0].requests().len(), asked, "no endpoint is asked");
        // Lists count as requests of the key.
        let used = with_key(&proxy, ADA, Method::GET, "/v1/key", None).await.json()["limits"]["rpm"]["used"].clone();
        assert_eq!(listed(&proxy, ADA, 1).await, [adas]);
        let now = with_key(&proxy, ADA, Method::GET, "/v1/key", None).await.json()["limits"]["rpm"]["used"].clone();
        assert!(now.as_u64() > used.as_u64(), "{used} {now}");
    })
    .await;
}
