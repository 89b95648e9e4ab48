//! Fallback models: another model serves when nobody can take a request for the one that was asked for.

use api_together::simulator::Behaviour;
use http::Method;
use serde_json::{Value, json};

use crate::harness::{Proxy, Reply, behaving, chat, chat_stream, endpoint_with, simulator, within};

const ADA: &str = "sk-ada-0f6c1d93be5a7724";

fn fallbacks() -> Value {
    json!({ "big": ["small", "tiny"], "gone": ["small"] })
}

/// The model that an answer was asked of its endpoint, and the header that says so.
fn served(reply: &Reply) -> (Value, Option<&str>) {
    assert_eq!(reply.status, 200, "{reply:?}");
    (reply.json()["model"].clone(), reply.header("x-api-together-model"))
}

#[tokio::test(flavor = "multi_thread")]
async fn another_model_serves_once_the_limits_of_one_are_reached() {
    within(async {
        let (first, second) = (simulator().await, simulator().await);
        let limits = json!({ "big": { "rpm": 2 }, "mini": { "rpm": 1 } });
        let mapping = json!({ "small": "mini" });
        let apis = [
            endpoint_with(
                "a",
                &first.base_url(),
                json!({ "models": ["big"], "modelMapping": mapping, "modelLimits": limits }),
            ),
            endpoint_with("b", &second.base_url(), json!({ "models": ["tiny"] })),
        ];
        let proxy = Proxy::start(json!({ "fallbacks": fallbacks() }), &apis).await;
        for _ in 0..2 {
            assert_eq!(served(&proxy.chat("big").await), (json!("big"), None));
        }
        // The same endpoint has another model, by the name that it has there, with limits of its own.
        let reply = proxy.chat("big").await;
        assert_eq!(served(&reply), (json!("mini"), Some("small")));
        reply.assert_from("a", 1);
        let reply = proxy.chat("big").await;
        assert_eq!(served(&reply), (json!("tiny"), Some("tiny")));
        reply.assert_from("b", 1);
        // Who asks for a model that has none gets that model or nothing.
        proxy.chat("small").await.assert_error(429, "requests", "rate_limit_exceeded");
        // What is spent is that model's.
        let stats = proxy.get("/v1/token/stats").await.json();
        let requests =
            |endpoint: &str, model: &str| stats["detailedStats"][endpoint]["models"][model]["requests"].clone();
        assert_eq!(
            (requests("a", "big"), requests("a", "mini"), requests("b", "tiny")),
            (json!(2), json!(1), json!(1))
        );
        proxy.chat("nowhere").await.assert_error(404, "invalid_request_error", "model_not_found");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_model_serves_where_one_fails_or_is_gone_even_at_the_same_endpoint() {
    within(async {
        let failing = behaving(Behaviour { status: 500, ..Behaviour::default() }).await;
        let working = simulator().await;
        working.script("big", vec![Behaviour { status: 503, ..Behaviour::default() }; 20]);
        let apis = [
            endpoint_with("a", &failing.base_url(), json!({ "models": ["big"] })),
            endpoint_with("b", &working.base_url(), json!({ "models": ["big", "small"], "priority": 1 })),
        ];
        let settings = json!({ "fallbacks": fallbacks(), "breaker": { "failures": 1000 } });
        let proxy = Proxy::start(settings, &apis).await;
        let reply = proxy.chat("big").await;
        assert_eq!(served(&reply), (json!("small"), Some("small")));
        reply.assert_from("b", 3);
        let stream = proxy.post("/v1/chat/completions", &chat_stream("big")).await;
        assert_eq!((stream.status, stream.header("x-api-together-model")), (200, Some("small")));
        assert!(stream.text().ends_with("data: [DONE]\n\n"), "{}", stream.text());
        // A model that nobody serves any more.
        assert_eq!(served(&proxy.chat("gone").await), (json!("small"), Some("small")));
        // What is the request's own fault is so with every model.
        let broken = proxy.post("/v1/chat/completions", &json!({ "model": "big" })).await;
        assert!(broken.status < 500, "{broken:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keys_limits_are_those_of_the_model_that_serves() {
    within(async {
        let (first, second) = (simulator().await, simulator().await);
        let apis = [
            endpoint_with(
                "a",
                &first.base_url(),
                json!({ "models": ["big", "small"], "modelLimits": { "big": { "rpm": 1 } } }),
            ),
            endpoint_with("b", &second.base_url(), json!({ "models": ["tiny"] })),
        ];
        let key = json!({ "name": "ada", "key": ADA, "modelLimits": { "small": { "rpm": 2 }, "big": { "rpm": 9 } } });
        let proxy = Proxy::start(json!({ "fallbacks": fallbacks(), "keys": [key] }), &apis).await;
        let ask = |model: &'static str| {
            let request = proxy.request_without_key(Method::POST, "/v1/chat/completions").bearer_auth(ADA);
            Reply::of(request.json(&chat(model)))
        };
        let mut models = Vec::new();
        for _ in 0..5 {
            models.push(served(&ask("big").await).0);
        }
        assert_eq!(models, ["big", "small", "small", "tiny", "tiny"].map(|model| json!(model)));
        let refused = ask("small").await.assert_error(429, "requests", "key_rate_limited");
        assert!(refused.contains("small"), "{refused}");
        let state = Reply::of(proxy.request_without_key(Method::GET, "/v1/key").bearer_auth(ADA)).await.json();
        assert_eq!(state["modelLimits"]["small"]["limits"]["rpm"]["used"], 2, "{state}");
        let big = &state["modelLimits"]["big"]["limits"];
        assert_eq!((&big["rpm"]["used"], &big["tpm"]["used"]), (&json!(1), &json!(8)), "{state}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_gets_no_model_that_it_may_not_ask_for() {
    within(async {
        let simulator = simulator().await;
        let models = json!({ "models": ["big", "small", "tiny"], "modelLimits": { "big": { "rpm": 1 } } });
        let keys = json!([{ "name": "ada", "key": ADA, "models": ["big", "tiny"] }]);
        let settings = json!({ "fallbacks": fallbacks(), "keys": keys });
        let proxy = Proxy::start(settings, &[endpoint_with("a", &simulator.base_url(), models)]).await;
        let ask = |model: &'static str| {
            let request = proxy.request_without_key(Method::POST, "/v1/chat/completions").bearer_auth(ADA);
            Reply::of(request.json(&chat(model)))
        };
        assert_eq!(served(&ask("big").await), (json!("big"), None));
        assert_eq!(served(&ask("big").await), (json!("tiny"), Some("tiny")), "not small, which goes before it");
        ask("small").await.assert_error(404, "invalid_request_error", "model_not_found");
    })
    .await;
}
