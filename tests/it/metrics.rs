//! What Prometheus is told.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use api_together::simulator::Behaviour;
use http::Method;
use serde_json::json;

use crate::harness::{KEY, Reply, behaving, chat, chat_stream, client, config_text, endpoint_with, within};
use crate::program::Running;

/// The value of a metric, by its name and labels as they stand in the text.
fn value(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} is not in\n{text}")).parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_attempts_tokens_and_limits_are_told() {
    within(async {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (fails, good) = (behaving(Behaviour::status(503)).await, behaving(Behaviour::default()).await);
        let apis = [
            endpoint_with("fails", &fails.base_url(), json!({ "models": ["m"] })),
            endpoint_with("good", &good.base_url(), json!({ "models": ["m", "any-*"], "priority": 1, "rpm": 60 })),
        ];
        let settings = json!({ "metricsListen": free.to_string(), "breaker": { "failures": 2 } });
        let program = Running::start(&config_text(settings, &apis), "info");
        program.ready().await;
        let client = client(reqwest::ClientBuilder::http1_only);
        let ask = |body| client.post(program.url("/v1/chat/completions")).bearer_auth(KEY).json(&body).send();
        for body in [chat("m"), chat_stream("m"), chat("m"), chat("any-thing"), chat("nobody-has-it")] {
            ask(body).await.unwrap().bytes().await.unwrap();
        }
        let unknown = client.request(Method::GET, program.url("/metrics")).send().await.unwrap();
        assert_eq!(unknown.status(), 401, "the main port wants the key");
        let reply = Reply::of(client.get(program.url("/metrics")).bearer_auth(KEY)).await;
        assert_eq!(reply.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
        let text = reply.text();
        let told = |name: &str| value(text, name);
        let requests = |endpoint: &str, model: &str, outcome: &str, status: &str| {
            told(&format!(
                "api_together_requests_total{{endpoint=\"{endpoint}\",model=\"{model}\",outcome=\"{outcome}\",status=\"{status}\"}}"
            ))
        };
        assert!((requests("good", "m", "ok", "2xx") - 3.0).abs() < 0.1);
        assert!((requests("good", "other", "ok", "2xx") - 1.0).abs() < 0.1, "a pattern's names are not told apart");
        assert!((requests("none", "none", "model_unknown", "4xx") - 1.0).abs() < 0.1);
        // It cools down after two.
        assert!((told(r#"api_together_attempts_total{endpoint="fails",outcome="status_5xx"}"#) - 2.0).abs() < 0.1);
        assert!((told(r#"api_together_attempts_total{endpoint="good",outcome="ok"}"#) - 4.0).abs() < 0.1);
        assert!((told(r#"api_together_endpoint_cooling_down{endpoint="fails"}"#) - 1.0).abs() < 0.1);
        assert!((told(r#"api_together_endpoint_available{endpoint="good"}"#) - 1.0).abs() < 0.1);
        assert!((told(r#"api_together_limit_used{endpoint="good",limit="rpm"}"#) - 4.0).abs() < 0.1);
        assert!((told(r#"api_together_limit_left{endpoint="good",limit="rpm"}"#) - 56.0).abs() < 0.1);
        assert!(told(r#"api_together_tokens_total{endpoint="good",kind="completion",model="m"}"#) > 10.0);
        assert!((told(r#"api_together_request_duration_seconds_count{endpoint="good"}"#) - 4.0).abs() < 0.1);
        assert!((told("api_together_own_seconds_count") - 4.0).abs() < 0.1);
        assert!((told("api_together_permit_seconds_count") - 4.0).abs() < 0.1);
        assert!((told("api_together_config_ok") - 1.0).abs() < 0.1);
        assert!(told("process_resident_memory_bytes") > 1e6 && told("process_open_fds") > 5.0);
        assert!(told("process_cpu_seconds_total") > 0.0 && told("process_threads") > 2.0);
        assert!(told("process_max_fds") >= told("process_open_fds"));
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        assert!((now - told("process_start_time_seconds")) < 60.0);
        assert!((told(r#"api_together_build_info{version="0.1.0"}"#) - 1.0).abs() < 0.1);

        let scraped = Reply::of(client.get(format!("http://{free}/metrics"))).await;
        assert_eq!(scraped.status, 200);
        assert!((value(scraped.text(), "api_together_ledger_up") - 1.0).abs() < 0.1);
        assert_eq!(Reply::of(client.get(format!("http://{free}/v1/status"))).await.status, 404);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_keys_are_counted_by_their_names() {
    within(async {
        const ADA: &str = "sk-ada-0f6c1d93be5a7724";
        const BOB: &str = "sk-bob-91c7aa02f4d86e35";
        let reports = behaving(Behaviour::default()).await;
        let reports_not = behaving(Behaviour { usage: Some(false), ..Behaviour::default() }).await;
        let apis = [
            endpoint_with("a", &reports.base_url(), json!({ "models": ["m"] })),
            endpoint_with("b", &reports_not.base_url(), json!({ "models": ["silent"] })),
        ];
        let keys = json!([{ "name": "ada", "key": ADA, "rpm": 3 }, { "name": "bob", "key": BOB }]);
        let program = Running::start(&config_text(json!({ "keys": keys }), &apis), "info");
        program.ready().await;
        let client = client(reqwest::ClientBuilder::http1_only);
        let ask =
            |key, model| client.post(program.url("/v1/chat/completions")).bearer_auth(key).json(&chat(model)).send();
        let calls = [(ADA, "m"), (ADA, "m"), (ADA, "silent"), (ADA, "m"), (BOB, "m"), (BOB, "none"), (KEY, "m")];
        for (key, model) in calls {
            ask(key, model).await.unwrap().bytes().await.unwrap();
        }
        let scrape = async || Reply::of(client.get(program.url("/metrics")).bearer_auth(KEY)).await.text().to_owned();
        let estimated = r#"api_together_key_estimated_tokens_total{key="ada",kind="completion"}"#;
        let begun = Instant::now();
        while !scrape().await.contains(estimated) {
            assert!(begun.elapsed() < Duration::from_secs(10), "an estimate is never counted");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let text = scrape().await;
        let told = |name: &str| value(&text, &format!("api_together_key_{name}"));
        for (name, expected) in [
            (r#"requests_total{key="ada",outcome="ok"}"#, 3.0),
            (r#"requests_total{key="ada",outcome="key_limits_reached"}"#, 1.0),
            (r#"requests_total{key="bob",outcome="ok"}"#, 1.0),
            (r#"requests_total{key="bob",outcome="model_unknown"}"#, 1.0),
            (r#"limit{key="ada",limit="rpm"}"#, 3.0),
            (r#"limit_used{key="ada",limit="rpm"}"#, 3.0),
            (r#"limit_left{key="ada",limit="rpm"}"#, 0.0),
        ] {
            assert!((told(name) - expected).abs() < 0.1, "{name} is not {expected}:\n{text}");
        }
        let tokens = |key: &str| told(&format!(r#"tokens_total{{key="{key}",kind="completion"}}"#));
        let all = value(&text, r#"api_together_tokens_total{endpoint="a",kind="completion",model="m"}"#);
        assert!(tokens("bob") > 0.0 && (tokens("ada") - 2.0 * tokens("bob")).abs() < 0.1, "{text}");
        assert!((all - 4.0 * tokens("bob")).abs() < 0.1, "those of the one key count as well:\n{text}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_tells_why_not() {
    within(async {
        let fails = behaving(Behaviour::status(503)).await;
        let api = endpoint_with("a", &fails.base_url(), json!({ "models": ["m"] }));
        let program = Running::start(&config_text(json!({ "breaker": { "failures": 1 } }), &[api]), "info");
        program.ready().await;
        let client = client(reqwest::ClientBuilder::http1_only);
        let ready = async || Reply::of(client.get(program.url("/health/ready"))).await;
        let reply = ready().await;
        assert_eq!((reply.status, &reply.json()["status"]), (200, &json!("ready")));
        client.post(program.url("/v1/chat/completions")).bearer_auth(KEY).json(&chat("m")).send().await.unwrap();
        let reply = ready().await;
        assert_eq!((reply.status, &reply.json()["status"]), (503, &json!("not_ready")));
        assert_eq!(reply.json()["reason"], "every endpoint is at a limit or cooling down");
        assert_eq!(Reply::of(client.get(program.url("/health"))).await.status, 200);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_refused_is_logged_and_counted_with_its_model() {
    within(async {
        let good = behaving(Behaviour::default()).await;
        let api = endpoint_with("a", &good.base_url(), json!({ "models": ["m"], "rpm": 1 }));
        let program = Running::start(&config_text(json!({}), &[api]), "info");
        program.ready().await;
        let client = client(reqwest::ClientBuilder::http1_only);
        for status in [200, 429] {
            let call = client.post(program.url("/v1/chat/completions")).bearer_auth(KEY).json(&chat("m"));
            assert_eq!(Reply::of(call).await.status, status);
        }
        let line = program.logs("status=429").await;
        assert!(line.contains(" model=m "), "{line}");
        let metrics = Reply::of(client.get(program.url("/metrics")).bearer_auth(KEY)).await;
        let refused = |line: &&str| line.contains("requests_total") && line.contains("4xx");
        assert!(
            metrics.text().lines().any(|line| refused(&line) && line.contains("model=\"m\"")),
            "{}",
            metrics.text()
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_are_json_if_the_config_says_so_and_text_again_after_a_reload() {
    within(async {
        let good = behaving(Behaviour::default()).await;
        let api = endpoint_with("a", &good.base_url(), json!({ "models": ["m"] }));
        let text = |format: &str| config_text(json!({ "logFormat": format }), std::slice::from_ref(&api));
        let program = Running::start(&text("json"), "info");
        program.ready().await;
        let client = client(reqwest::ClientBuilder::http1_only);
        let ask = client.post(program.url("/v1/chat/completions")).bearer_auth(KEY).json(&chat("m"));
        ask.header("x-request-id", "mine-1").send().await.unwrap().bytes().await.unwrap();
        let line: serde_json::Value = serde_json::from_str(&program.logs("mine-1").await).unwrap();
        assert_eq!((&line["event"], &line["endpoint"], &line["status"]), (&json!("request"), &json!("a"), &json!(200)));
        assert!(line["prompt_tokens"].is_u64() && line["time"].is_string(), "{line}");
        std::fs::write(program.folder.path().join("apis.json"), text("text")).unwrap();
        program.logs("server.logFormat json → text").await;
        let ask = client.post(program.url("/v1/chat/completions")).bearer_auth(KEY).json(&chat("m"));
        ask.header("x-request-id", "mine-2").send().await.unwrap().bytes().await.unwrap();
        assert!(program.logs("id=mine-2").await.contains(" INFO "));
    })
    .await;
}
