//! Limits of models beside the endpoint's own.

use std::time::Duration;

use api_together::simulator::{Behaviour, StallAt};
use serde_json::{Value, json};

use crate::harness::{
    KEY, Proxy, Reply, behaving, chat, client, config_text, endpoint_with, merged, simulator, until, within,
};
use crate::program::{Running, folder_with, program};

/// An endpoint that takes every model, with these limits of models and whatever else.
fn limited(id: &str, url: &str, models: Value, more: Value) -> Value {
    let mut limited = json!({ "models": ["*"] });
    limited["modelLimits"] = models;
    endpoint_with(id, url, merged(limited, more))
}

async fn used(proxy: &Proxy, models: &str, kind: &str) -> Value {
    proxy.status_of("a").await["modelLimits"][models]["usage"][kind].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_model_goes_to_the_next_endpoint_and_leaves_the_others_alone() {
    within(async {
        let (a, b) = (simulator().await, simulator().await);
        let apis = [
            limited("a", &a.base_url(), json!({ "gpt-4o*": { "rpm": 2, "rpd": 50 } }), json!({ "rpm": 10 })),
            limited("b", &b.base_url(), json!({ "*": { "rpm": 1 } }), json!({ "priority": 1 })),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        for (model, id) in [("gpt-4o", "a"), ("gpt-4o-mini", "a"), ("gpt-4o", "b"), ("o1", "a"), ("o1", "a")] {
            proxy.chat(model).await.assert_from(id, 1);
        }
        let refused = proxy.chat("gpt-4o").await;
        let message = refused.assert_error(429, "requests", "rate_limit_exceeded");
        for part in ["a: 2 requests a minute for gpt-4o*, for ", "b: 1 request a minute for *, for "] {
            assert!(message.contains(part), "{message}");
        }
        let status = proxy.status_of("a").await;
        assert_eq!((&status["available"], &status["usage"]["rpm"]), (&json!(true), &json!(4)), "{status}");
        let models = &status["modelLimits"]["gpt-4o*"];
        assert_eq!(models["limits"], json!({ "rpm": 2, "rpd": 50, "tpm": -1, "tpd": -1, "maxConcurrent": -1 }));
        assert_eq!((&models["usage"]["rpm"], &models["quota"]["rpd"]["left"]), (&json!(2), &json!(48)), "{models}");
        assert_eq!(models["heldBy"], "2 requests a minute");
        assert!(models["limitFrees"].is_string(), "{models}");
        let metrics = proxy.get("/metrics").await;
        for line in [
            r#"api_together_model_limit{endpoint="a",limit="rpm",model="gpt-4o*"} 2"#,
            r#"api_together_model_limit_used{endpoint="a",limit="rpd",model="gpt-4o*"} 2"#,
            r#"api_together_model_limit_left{endpoint="b",limit="rpm",model="*"} 0"#,
            r#"api_together_limit_used{endpoint="a",limit="rpm"} 4"#,
        ] {
            assert!(metrics.text().contains(line), "{line}: {}", metrics.text());
        }
        assert_eq!((a.requests().len(), b.requests().len()), (4, 1));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_name_that_counts_is_the_one_that_is_sent() {
    within(async {
        let a = simulator().await;
        let more = json!({ "modelMapping": { "fast": "gpt-4o-mini", "gpt-4o": "o1" } });
        let api = limited("a", &a.base_url(), json!({ "gpt-4o*": { "rpm": 2 } }), more);
        let proxy = Proxy::start(json!({}), &[api]).await;
        proxy.chat("fast").await.assert_from("a", 1);
        proxy.chat("gpt-4o-mini").await.assert_from("a", 1);
        for model in ["fast", "gpt-4o-mini", "gpt-4o-2"] {
            proxy.chat(model).await.assert_error(429, "requests", "rate_limit_exceeded");
        }
        // This one is sent another name.
        proxy.chat("gpt-4o").await.assert_from("a", 1);
        assert_eq!(used(&proxy, "gpt-4o*", "rpm").await, 2);
        // A request without a model is none of any model.
        assert_eq!(proxy.get("/v1/files").await.endpoint(), Some("a"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_model_has_the_limits_for_itself_and_invented_names_share_them() {
    within(async {
        let a = simulator().await;
        for invented in ["no-1", "no-2", "no-3"] {
            let error = r#"{"error":{"code":"model_not_found","message":"x"}}"#;
            a.script(invented, vec![Behaviour { body: Some(error.into()), ..Behaviour::status(404) }]);
        }
        let more = json!({ "models": ["m", "n", "*"] });
        let api = limited("a", &a.base_url(), json!({ "*": { "rpm": 2, "each": true } }), more);
        let proxy = Proxy::start(json!({}), &[api]).await;
        for model in ["m", "n"] {
            for _ in 0..2 {
                proxy.chat(model).await.assert_from("a", 1);
            }
            proxy.chat(model).await.assert_error(429, "requests", "rate_limit_exceeded");
        }
        for (invented, status) in [("no-1", 404), ("no-2", 404), ("no-3", 429)] {
            assert_eq!(proxy.chat(invented).await.status, status, "{invented}");
        }
        assert_eq!(used(&proxy, "*", "rpm").await, 2);
        assert_eq!(used(&proxy, "m", "rpm").await, 2);
        assert!(proxy.status_of("a").await["modelLimits"]["no-1"].is_null());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_requests_at_once_are_limited_by_model_too() {
    within(async {
        let a = behaving(Behaviour { stall: Some(StallAt::AfterEvents(2)), ..Behaviour::default() }).await;
        let limits = json!({ "slow": { "maxConcurrent": 1 }, "dear": { "tpd": 1 } });
        let proxy = Proxy::start(json!({}), &[limited("a", &a.base_url(), limits, json!({}))]).await;
        for model in ["dear", "cheap"] {
            a.script(model, vec![Behaviour::default()]);
        }
        let stream = proxy.open_stream("slow").await;
        let message = proxy.chat("slow").await.assert_error(429, "requests", "rate_limit_exceeded");
        assert!(message.contains("1 request at once for slow"), "{message}");
        proxy.chat("cheap").await.assert_from("a", 1);
        assert_eq!(used(&proxy, "slow", "maxConcurrent").await, 1);
        drop(stream);
        let at_once = || async { used(&proxy, "slow", "maxConcurrent").await };
        while at_once().await != 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        proxy.chat("dear").await.assert_from("a", 1);
        while used(&proxy, "dear", "tpd").await == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let message = proxy.chat("dear").await.assert_error(429, "requests", "rate_limit_exceeded");
        assert!(message.contains("1 token a day for dear"), "{message}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rate_limit_headers_show_the_tighter_of_model_and_endpoint() {
    within(async {
        let a = simulator().await;
        let limits = json!({ "m": { "rpm": 5 }, "n": { "rpm": 500 } });
        let proxy = Proxy::start(json!({}), &[limited("a", &a.base_url(), limits, json!({ "rpm": 50 }))]).await;
        for (model, limit, left) in [("m", "5", "4"), ("n", "50", "48"), ("other", "50", "47")] {
            let reply = proxy.chat(model).await;
            assert_eq!(reply.header("x-ratelimit-limit-requests"), Some(limit), "{model}");
            assert_eq!(reply.header("x-ratelimit-remaining-requests"), Some(left), "{model}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_all_of_whose_models_are_full_is_not_available() {
    within(async {
        let a = simulator().await;
        for (models, limits, full) in [
            (json!(["m", "n"]), json!({ "m": { "rpm": 1 } }), false),
            (json!(["m", "n"]), json!({ "m": { "rpm": 1 }, "n": { "rpm": 1 } }), true),
            (json!(["*"]), json!({ "*": { "rpm": 1 } }), true),
            (json!(["*"]), json!({ "*": { "rpm": 1 }, "gpt*": { "rpm": 1 } }), false),
            (json!(["*"]), json!({ "m": { "rpm": 1 } }), false),
        ] {
            let more = json!({ "models": models });
            let proxy = Proxy::start(json!({}), &[limited("a", &a.base_url(), limits.clone(), more)]).await;
            for model in ["m", "n"] {
                proxy.chat(model).await;
            }
            let status = proxy.status_of("a").await;
            assert_eq!(status["available"], !full, "{limits}: {status}");
            let ready = proxy.get("/health/ready").await;
            assert_eq!(ready.status, if full { 503 } else { 200 }, "{limits}: {ready:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_models_stay_hidden_with_the_endpoints() {
    within(async {
        let a = simulator().await;
        let more = json!({ "modelMapping": { "m": "secret-deployment" } });
        let api = limited("a", &a.base_url(), json!({ "secret-deployment": { "rpm": 1 } }), more);
        let proxy = Proxy::start(json!({ "endpointHeaders": false }), &[api]).await;
        assert_eq!(proxy.chat("m").await.status, 200);
        let message = proxy.chat("m").await.assert_error(429, "requests", "rate_limit_exceeded");
        assert!(message.contains("1 request a minute") && !message.contains("secret"), "{message}");
    })
    .await;
}

async fn ask(running: &Running, model: &str) -> Reply {
    let call = client(|builder| builder).post(running.url("/v1/chat/completions")).bearer_auth(KEY);
    Reply::of(call.json(&chat(model))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_sets_limits_of_models_and_keeps_what_they_have_counted() {
    within(async {
        let a = simulator().await;
        let text = |limits: Value| config_text(json!({}), &[limited("a", &a.base_url(), limits, json!({}))]);
        let running = Running::start(&text(json!({ "m": { "rpm": 2 } })), "info");
        for status in [200, 200, 429] {
            assert_eq!(ask(&running, "m").await.status, status);
        }
        let reload = async |limits: Value, told: &str| {
            std::fs::write(running.folder.path().join("apis.json"), text(limits)).unwrap();
            running.logs(told).await;
        };
        reload(json!({ "m": { "rpm": 3 } }), "endpoint a: modelLimits m rpm 2 → 3").await;
        for status in [200, 429] {
            assert_eq!(ask(&running, "m").await.status, status, "two were counted before");
        }
        reload(json!({ "n": { "rpm": 1 } }), "endpoint a: modelLimits -m +n").await;
        for (model, status) in [("m", 200), ("n", 200), ("n", 429), ("m", 200)] {
            assert_eq!(ask(&running, model).await.status, status, "{model}");
        }
        // What a model's limit counted while it was there is still there.
        reload(json!({ "m": { "rpm": 3 }, "n": { "rpm": 1 } }), "endpoint a: modelLimits +m").await;
        assert_eq!(ask(&running, "m").await.status, 429);
        assert_eq!(a.requests().len(), 6);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_had_its_own_limit_has_it_after_a_restart() {
    within(async {
        let a = simulator().await;
        let limits = json!({ "*": { "rpm": 2, "each": true } });
        let text = config_text(json!({}), &[limited("a", &a.base_url(), limits, json!({}))]);
        let folder = folder_with("apis.json", &text);
        let start = || {
            let mut command = program(folder.path());
            command.args(["--config", "apis.json"]).env("RUST_LOG", "info");
            Running::of(command, tempfile::tempdir().unwrap())
        };
        let first = start();
        for model in ["m", "n"] {
            // The first answer shows that it is a model; the second counts for it.
            for _ in 0..2 {
                assert_eq!(ask(&first, model).await.status, 200);
            }
            first.logs(&format!("model={model}")).await;
        }
        drop(first);
        let second = start();
        for model in ["m", "n"] {
            for status in [200, 429] {
                assert_eq!(ask(&second, model).await.status, status, "{model}: one was counted before");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_waits_in_the_queue_for_its_model_and_others_pass() {
    within(async {
        let a = behaving(Behaviour { stall: Some(StallAt::AfterEvents(2)), ..Behaviour::default() }).await;
        a.script("n", vec![Behaviour::default()]);
        let server = json!({ "queue": { "maxWaitMs": 20_000 } });
        let api = limited("a", &a.base_url(), json!({ "m": { "maxConcurrent": 1 } }), json!({}));
        let proxy = Proxy::start(server, &[api]).await;
        let first = proxy.open_stream("m").await;
        let mut second =
            tokio::spawn(proxy.request(http::Method::POST, "/v1/chat/completions").json(&chat("n")).send());
        (&mut second).await.unwrap().unwrap();
        let waiting = tokio::spawn({
            let call = proxy.request(http::Method::POST, "/v1/chat/completions");
            call.json(&crate::harness::chat_stream("m")).send()
        });
        while proxy.get("/v1/status").await.json()["ledger"]["queued"] != 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        proxy.chat("n").await.assert_from("a", 1);
        assert_eq!(a.requests().len(), 3);
        drop(first);
        until("the next one is sent", || a.requests().len() == 4).await;
        assert_eq!(waiting.await.unwrap().unwrap().status(), 200);
    })
    .await;
}
