//! What the proxy says itself.

use http::Method;
use serde_json::{Value, json};

use api_together::simulator::Behaviour;

use crate::harness::{Proxy, Reply, behaving, endpoint_with, simulator, within};

/// The keys of an object, sorted.
fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

fn is_time(value: &Value) -> bool {
    let text = value.as_str().unwrap_or_default();
    text.len() == 24 && text.ends_with('Z') && text.parse::<jiff::Timestamp>().is_ok()
}

/// Three endpoints: one with limits, one switched off, one with nothing set.
async fn proxy(url: &str) -> Proxy {
    let limits = json!({
        "name": "备用", "rpm": 60, "rpd": 1000, "models": ["gpt-4", "meta/llama-3", "pat-*"],
        "modelMapping": { "mapped": "gpt-4" },
    });
    let off = json!({ "enabled": false, "models": ["hidden"] });
    let zero = json!({ "rpm": 0, "models": ["zero"] });
    let apis = [
        endpoint_with("limited", url, limits),
        endpoint_with("off", url, off),
        endpoint_with("zero", url, zero),
        endpoint_with("plain", url, json!({ "models": ["gpt-4", "other"] })),
    ];
    Proxy::start(json!({}), &apis).await
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_as_it_was() {
    within(async {
        let proxy = proxy(&simulator().await.base_url()).await;
        for path in ["/health", "/health/", "/health?x=1"] {
            let reply = Reply::of(proxy.request_without_key(Method::GET, path)).await;
            assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")), "{path}");
            let health = reply.json();
            assert_eq!(keys(&health), ["service", "status", "timestamp"]);
            assert_eq!((&health["status"], &health["service"]), (&json!("ok"), &json!("api-together")));
            assert!(is_time(&health["timestamp"]), "{health}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_page_has_the_keys_it_had() {
    within(async {
        let proxy = proxy(&simulator().await.base_url()).await;
        let status = proxy.get("/v1/status").await.json();
        assert!(status["service"].is_string() && is_time(&status["timestamp"]), "{status}");
        let apis = status["apis"].as_array().unwrap();
        assert_eq!(apis.len(), 4);
        for (api, (id, enabled, available, rpm, rpd)) in apis.iter().zip([
            ("limited", true, true, 60, 1000),
            ("off", false, false, -1, -1),
            ("zero", true, false, 0, -1),
            ("plain", true, true, -1, -1),
        ]) {
            assert_eq!(api["id"], id);
            assert!(api["name"].is_string());
            assert_eq!((&api["enabled"], &api["available"]), (&json!(enabled), &json!(available)), "{api}");
            assert_eq!((&api["temporarilyDisabled"], &api["errorCount"]), (&json!(false), &json!(0)));
            assert_eq!((&api["limits"]["rpm"], &api["limits"]["rpd"]), (&json!(rpm), &json!(rpd)));
        }
        assert_eq!(apis[0]["name"], "备用");
        let text = status.to_string();
        assert!(!text.contains("sk-endpoint") && !text.contains(crate::harness::KEY), "{text}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_whatever_their_endpoints_do_just_now() {
    within(async {
        let proxy = proxy(&simulator().await.base_url()).await;
        let list = proxy.get("/v1/models").await.json();
        assert_eq!(list["object"], "list");
        let models = list["data"].as_array().unwrap();
        let mut ids: Vec<_> = models.iter().map(|model| model["id"].as_str().unwrap()).collect();
        ids.sort_unstable();
        assert_eq!(ids, ["gpt-4", "mapped", "meta/llama-3", "other"], "no pattern, nothing of those that are off");
        for model in models {
            assert_eq!(model["object"], "model");
            assert!(model["created"].is_u64() && model["owned_by"].is_string(), "{model}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_model_is_found_by_its_name() {
    within(async {
        let proxy = proxy(&simulator().await.base_url()).await;
        for (path, id) in [
            ("gpt-4", "gpt-4"),
            ("mapped", "mapped"),
            ("meta/llama-3", "meta/llama-3"),
            ("meta%2Fllama-3", "meta/llama-3"),
            ("pat-tern", "pat-tern"),
        ] {
            let reply = proxy.get(&format!("/v1/models/{path}")).await;
            assert_eq!((reply.status, &reply.json()["id"]), (200, &json!(id)), "{path}");
            assert_eq!(reply.json()["object"], "model");
        }
        for path in ["hidden", "zero", "gpt-5"] {
            let reply = proxy.get(&format!("/v1/models/{path}")).await;
            reply.assert_error(404, "invalid_request_error", "model_not_found");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_paths_and_wrong_methods() {
    within(async {
        let proxy = proxy(&simulator().await.base_url()).await;
        for path in ["//", "/chatter", "/v2/models", "/v1", "/healthy"] {
            let message = proxy.get(path).await.assert_error(404, "invalid_request_error", "unknown_url");
            assert!(message.contains(path) && message.contains("/v1"), "{message}");
        }
        for (method, path) in [
            (Method::POST, "/"),
            (Method::POST, "/health"),
            (Method::POST, "/v1/status"),
            (Method::DELETE, "/v1/models"),
            (Method::PUT, "/v1/models"),
        ] {
            let reply = Reply::of(proxy.request(method, path)).await;
            reply.assert_error(405, "invalid_request_error", "method_not_supported");
            assert_eq!(reply.header("allow"), Some("GET, HEAD"));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn head_is_get_without_the_body() {
    within(async {
        let proxy = proxy(&simulator().await.base_url()).await;
        for path in ["/health", "/v1/models", "/v1/models/gpt-4", "/nowhere"] {
            let get = proxy.get(path).await;
            let head = Reply::of(proxy.request(Method::HEAD, path)).await;
            assert_eq!((head.status, head.body.len()), (get.status, 0), "{path}");
            assert_eq!(head.header("content-length"), get.header("content-length"), "{path}");
            assert_eq!(head.header("content-type"), get.header("content-type"), "{path}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn our_own_paths_reach_no_endpoint() {
    within(async {
        let simulator = simulator().await;
        let proxy = proxy(&simulator.base_url()).await;
        for path in ["/health", "/v1/models", "/v1/models/gpt-4", "/v1/status", "/nowhere"] {
            proxy.get(path).await;
        }
        assert_eq!(simulator.connections(), 0);
        // Deleting a model of one's own is an endpoint's matter.
        Reply::of(proxy.request(Method::DELETE, "/v1/models/ft:mine")).await;
        assert_eq!(simulator.requests()[0].path_and_query, "/v1/models/ft:mine");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn patterns_show_what_their_endpoint_lists() {
    within(async {
        let list = |models: Value| Behaviour {
            body: Some(json!({ "object": "list", "data": models }).to_string()),
            ..Behaviour::default()
        };
        let large = json!({ "id": "vendor/large", "object": "model", "created": 1_700_000_000, "owned_by": "vendor",
            "context_length": 128_000, "capabilities": ["tools"] });
        let vendor = behaving(list(json!([large, { "id": "vendor/small" }, { "id": "other/one" }]))).await;
        let plain = behaving(list(json!([{ "id": "plain" }, { "id": "unlisted" }]))).await;
        let folder = tempfile::tempdir().unwrap();
        let server = json!({ "ledger": folder.path().join("ledger.db") });
        let apis = |vendor: &str, models: Value| {
            [
                endpoint_with(
                    "vendor",
                    vendor,
                    json!({ "models": models, "discover": true, "rpd": 5,
                    "modelMapping": { "best": "vendor/large", "vendor/small": "vendor/large" } }),
                ),
                endpoint_with("plain", &plain.base_url(), json!({ "models": ["plain", "un*"] })),
            ]
        };
        let names = |answer: &Value| {
            let models = answer["data"].as_array().unwrap().iter();
            models.map(|model| model["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let expected = ["best", "plain", "vendor/large", "vendor/small"];
        let proxy = Proxy::start(server.clone(), &apis(&vendor.base_url(), json!(["vendor/*"]))).await;
        let begun = std::time::Instant::now();
        while names(&proxy.get("/v1/models").await.json()) != expected {
            assert!(begun.elapsed().as_secs() < 10, "{:?}", proxy.get("/v1/models").await);
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        assert_eq!(proxy.status_of("vendor").await["usage"]["rpd"], 1, "it takes a permit");
        assert_eq!(plain.requests().len(), 0, "it is not asked");
        let best = proxy.get("/v1/models/best").await.json();
        let said = json!({ "id": "best", "object": "model", "created": 1_700_000_000, "owned_by": "vendor",
            "context_length": 128_000, "capabilities": ["tools"] });
        assert_eq!(best, said, "what its endpoint says of the model that it is mapped to");
        // The next process shows it while the endpoint is down.
        proxy.get("/v1/files/file-0").await;
        let second = Proxy::start(server.clone(), &apis(&crate::harness::closed_port(), json!(["*"]))).await;
        let begun = std::time::Instant::now();
        let all = ["best", "other/one", "plain", "vendor/large", "vendor/small"];
        while names(&second.get("/v1/models").await.json()) != all {
            assert!(begun.elapsed().as_secs() < 10, "{:?}", second.get("/v1/models").await);
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        let hidden = crate::harness::merged(server, json!({ "endpointHeaders": false }));
        let third = Proxy::start(hidden, &apis(&vendor.base_url(), json!(["vendor/*"]))).await;
        assert_eq!(third.get("/v1/models/best").await.json()["owned_by"], "api-together");
    })
    .await;
}
