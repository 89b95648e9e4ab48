//! Traces sent to a collector by OTLP, and what a build without them says.

use serde_json::{Value, json};

use crate::harness::{KEY, Reply, chat, client, config_text, endpoint_with, merged, simulator, within};
use crate::program::{Running, folder_with, program};

/// The program before these endpoints, with a collector.
async fn traced(collector: &str, apis: &[Value]) -> Running {
    let folder = folder_with("apis.json", &config_text(json!({ "requestLog": { "enabled": false } }), apis));
    let mut command = program(folder.path());
    command.args(["--config", "apis.json"]).env("RUST_LOG", "info");
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector).env("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json");
    let running = Running::of(command, folder);
    running.ready().await;
    running
}

async fn ask(running: &Running, traceparent: Option<&str>) -> Reply {
    let mut call = client(|builder| builder).post(running.url("/v1/chat/completions")).bearer_auth(KEY);
    if let Some(traceparent) = traceparent {
        call = call.header("traceparent", traceparent);
    }
    let content = json!({ "messages": [{ "role": "user", "content": "a-secret-prompt" }] });
    Reply::of(call.json(&merged(chat("m"), content))).await
}

#[cfg(not(feature = "otlp"))]
#[tokio::test(flavor = "multi_thread")]
async fn a_build_without_them_says_so() {
    within(async {
        let a = simulator().await;
        let running = traced("http://127.0.0.1:9", &[endpoint_with("a", &a.base_url(), json!({}))]).await;
        running.logs("this program was built without the feature otlp: no traces are sent").await;
        assert_eq!(ask(&running, None).await.status, 200);
    })
    .await;
}

#[cfg(feature = "otlp")]
mod otlp {
    use api_together::simulator::{Behaviour, Simulator};

    use super::*;
    use crate::harness::{behaving, until};

    /// Spans that have arrived at a collector.
    fn spans(collector: &Simulator) -> Vec<Value> {
        let mut spans = Vec::new();
        for request in collector.requests() {
            assert_eq!(request.path_and_query, "/v1/traces");
            let body: Value = serde_json::from_slice(&request.body).unwrap();
            assert!(!String::from_utf8_lossy(&request.body).contains("a-secret-prompt"), "prompts are never sent");
            let resource = &body["resourceSpans"][0];
            let service = json!({ "key": "service.name", "value": { "stringValue": "api-together" } });
            assert!(resource["resource"]["attributes"].as_array().unwrap().contains(&service), "{resource}");
            assert_eq!(resource["scopeSpans"][0]["schemaUrl"], "https://opentelemetry.io/schemas/1.42.0");
            spans.extend(resource["scopeSpans"][0]["spans"].as_array().unwrap().clone());
        }
        spans
    }

    /// An attribute of a span.
    fn attribute<'a>(span: &'a Value, name: &str) -> Option<&'a Value> {
        let all = span["attributes"].as_array().unwrap();
        all.iter().find(|one| one["key"] == name)?["value"].as_object()?.values().next()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_request_is_a_server_span_with_a_client_span_for_each_attempt() {
        within(async {
            let collector = behaving(Behaviour { body: Some("{}".into()), ..Behaviour::default() }).await;
            let (failing, working) = (behaving(Behaviour::status(503)).await, simulator().await);
            let apis = [
                endpoint_with(
                    "failing",
                    &failing.base_url(),
                    json!({ "priority": 0, "modelMapping": { "m": "its-m" } }),
                ),
                endpoint_with(
                    "working",
                    &working.base_url(),
                    json!({ "priority": 1, "modelMapping": { "m": "its-m" } }),
                ),
            ];
            let running = traced(&collector.base_url(), &apis).await;
            // One that the client's program records, and one that it does not.
            assert_eq!(
                ask(&running, Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")).await.status,
                200
            );
            assert_eq!(
                ask(&running, Some("00-11111111111111111111111111111111-00f067aa0ba902b7-00")).await.status,
                200
            );
            until("the spans arrive", || spans(&collector).len() >= 3).await;
            let spans = spans(&collector);
            assert_eq!(spans.len(), 3, "{spans:?}");
            assert!(spans.iter().all(|span| span["traceId"] == "4bf92f3577b34da6a3ce929d0e0e4736"));
            let server = spans.iter().find(|span| span["kind"] == 2).unwrap();
            assert_eq!(
                (&server["name"], &server["parentSpanId"]),
                (&json!("POST /v1/chat/completions"), &json!("00f067aa0ba902b7"))
            );
            assert_eq!(attribute(server, "http.response.status_code"), Some(&json!("200")));
            let of = |endpoint: &str| {
                spans.iter().find(|span| attribute(span, "api_together.endpoint") == Some(&json!(endpoint))).unwrap()
            };
            let (first, second) = (of("failing"), of("working"));
            for span in [first, second] {
                assert_eq!((&span["kind"], &span["parentSpanId"]), (&json!(3), &server["spanId"]));
                assert_eq!(attribute(span, "gen_ai.operation.name"), Some(&json!("chat")));
            }
            assert_eq!(attribute(first, "error.type"), Some(&json!("status_5xx")));
            assert_eq!(first["status"]["code"], 2);
            assert_eq!(second["name"], "chat its-m");
            assert_eq!(attribute(second, "gen_ai.request.model"), Some(&json!("its-m")));
            assert_eq!(attribute(second, "gen_ai.usage.output_tokens"), Some(&json!("5")));
            assert_eq!(attribute(second, "http.request.resend_count"), Some(&json!("1")));
            // The endpoint was sent the very span.
            let arrived = working.requests();
            let span = second["spanId"].as_str().unwrap();
            let sent = arrived[0].header("traceparent").unwrap();
            assert!(sent.contains(span), "{sent} has not {span}");
            // One that begins here is recorded, and others are asked to.
            assert_eq!(ask(&running, None).await.status, 200);
            assert!(working.requests().last().unwrap().header("traceparent").unwrap().ends_with("-01"));
            until("it arrives", || self::spans(&collector).len() >= 5).await;
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_collector_that_is_gone_is_nobodys_trouble() {
        within(async {
            let a = simulator().await;
            let mut running = traced("http://127.0.0.1:9", &[endpoint_with("a", &a.base_url(), json!({}))]).await;
            assert_eq!(ask(&running, None).await.status, 200);
            running.logs("traces cannot be sent").await;
            let metrics = client(|builder| builder).get(running.url("/metrics")).bearer_auth(KEY);
            let scraped = Reply::of(metrics).await;
            let text = scraped.text();
            assert!(text.contains(r#"api_together_spans_total{result="failed"} 2"#), "{text}");
            running.signal("TERM");
            assert!(running.exit().await.success());
        })
        .await;
    }
}
