//! What an answer means: by its body where that says more than its status.

use api_together::simulator::Behaviour;
use serde_json::{Value, json};

use crate::harness::{Proxy, behaving, chat, chat_stream, endpoint_with, in_order, simulator, within};

const JSON: &str = "application/json";
const SSE: &str = "text/event-stream";

/// An answer of this status, type and body.
fn raw(status: u16, content_type: &str, body: &str) -> Behaviour {
    Behaviour { body: Some(body.into()), content_type: Some(content_type.into()), ..Behaviour::status(status) }
}

fn event(data: &str) -> String {
    format!("data: {data}\n\n")
}

/// What came of a request, with the bad endpoint before a good one, and with nobody else.
struct Outcomes {
    with_another: (u16, Option<String>),
    alone: (u16, Value),
    status: Value,
}

async fn outcomes(bad: &Behaviour, body: &Value) -> Outcomes {
    outcomes_of("/v1/chat/completions", bad, body).await
}

async fn outcomes_of(path: &str, bad: &Behaviour, body: &Value) -> Outcomes {
    let (bad, good) = (behaving(bad.clone()).await, simulator().await);
    let proxy = Proxy::before([&bad, &good]).await;
    let reply = proxy.post(path, body).await;
    let status = proxy.status_of("a").await;
    let alone = Proxy::before([&bad]).await.post(path, body).await;
    let text = serde_json::from_slice(&alone.body).unwrap_or_else(|_| Value::from(alone.text()));
    Outcomes { with_another: (reply.status, reply.endpoint().map(str::to_owned)), alone: (alone.status, text), status }
}

fn from_b() -> (u16, Option<String>) {
    (200, Some("b".into()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_200_is_read_before_it_is_believed() {
    within(async {
        for (body, alone, code) in [
            (r#"{"error":{"message":"Provider returned error","code":429}}"#, 429, json!(429)),
            (r#"{"error":{"message":"x","code":"server_error","type":"server_error"}}"#, 500, json!("server_error")),
            (r#"{"error":"something went wrong"}"#, 502, Value::Null),
            (r#"{"object":"error","message":"x","type":"InternalServerError","code":500}"#, 500, Value::Null),
            (r#"{"choices":null,"base_resp":{"status_code":1002,"status_msg":"rate limit"}}"#, 502, Value::Null),
            (r#"{"success":false,"errors":[{"code":10000,"message":"x"}]}"#, 502, Value::Null),
            (r#"{"code":500,"msg":"上游错误","data":null}"#, 500, Value::Null),
            (r#"{"detail":"Not Found"}"#, 502, Value::Null),
            // Envelopes and pages without an answer in them.
            (r#"{"code":0,"data":{"text":"hi"}}"#, 502, json!("endpoint_unrecognised_answer")),
            (r#"{"choices":"none"}"#, 502, json!("endpoint_unrecognised_answer")),
            ("<!DOCTYPE html><html><body>Welcome</body></html>", 502, json!("endpoint_unrecognised_answer")),
            ("OK", 502, json!("endpoint_unrecognised_answer")),
            ("{}", 502, json!("endpoint_empty_answer")),
        ] {
            for label in [JSON, "text/html; charset=utf-8"] {
                for asked in [chat("m"), chat_stream("m")] {
                    let outcomes = outcomes(&raw(200, label, body), &asked).await;
                    assert_eq!(outcomes.with_another, from_b(), "{body} {label}");
                    assert_eq!(outcomes.alone.0, alone, "{body} {label}: {}", outcomes.alone.1);
                    assert_eq!(outcomes.alone.1["error"]["code"], code, "{body}: {}", outcomes.alone.1);
                }
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_call_knows_its_answers() {
    within(async {
        let (error, page) = (r#"{"error":{"message":"x","code":503}}"#, "<html></html>");
        let body = json!({ "model": "m", "input": "x", "messages": [], "prompt": "x", "max_tokens": 1 });
        for path in ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"] {
            for bad in [error, page, "{}", r#"{"result":"x"}"#] {
                let outcomes = outcomes_of(path, &raw(200, JSON, bad), &body).await;
                assert_eq!(outcomes.with_another, from_b(), "{path} {bad}");
                assert!(outcomes.alone.0 >= 500, "{path} {bad}: {:?}", outcomes.alone);
            }
        }
        // Of other calls nothing is known, and everything passes.
        for answer in [error, r#"{"text":"hello"}"#, page] {
            let outcomes = outcomes_of("/v1/audio/speech", &raw(200, JSON, answer), &body).await;
            assert_eq!(outcomes.with_another, (200, Some("a".into())), "{answer}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_good_is_not_doubted() {
    within(async {
        for good in [
            r#"{"choices":[{"message":{"content":"Hi"},"finish_reason":"stop"}],"error":null}"#,
            // Text is never empty, whatever its usage says.
            r#"{"choices":[{"message":{"content":"Hi"}}],"usage":{"prompt_tokens":3,"completion_tokens":0,"total_tokens":3}}"#,
            r#"{"choices":[{"message":{"content":""},"finish_reason":"length"}]}"#,
            r#"{"choices":[{"message":{"content":""},"finish_reason":"content_filter"}]}"#,
            r#"{"choices":[{"message":{"content":null,"tool_calls":[{"id":"1"}]},"finish_reason":"tool_calls"}]}"#,
            r#"{"choices":[{"message":{"content":"","reasoning_content":"hm"},"finish_reason":"stop"}]}"#,
            r#"{"choices":[{"message":{"content":"The \"error\":{\"code\":500} you saw"}}]}"#,
            "\n\n\n {\"choices\":[{\"message\":{\"content\":\"after blank lines\"}}]}",
        ] {
            let outcomes = outcomes(&raw(200, JSON, good), &chat("m")).await;
            assert_eq!(outcomes.with_another, (200, Some("a".into())), "{good}");
            assert_eq!(outcomes.alone, (200, serde_json::from_str(good).unwrap()), "{good}");
            assert_eq!(outcomes.status["errorCount"], 0);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_stream_is_as_empty_as_the_same_answer_in_json() {
    within(async {
        let role = event(r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#);
        let stop = event(r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#);
        let length = event(r#"{"choices":[{"delta":{},"finish_reason":"length"}]}"#);
        let done = event("[DONE]");
        let usage = event(r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":0,"total_tokens":3}}"#);
        for (stream, endpoint) in [
            (stop.clone(), "b"),
            (format!("{role}{stop}{done}"), "b"),
            (format!("{role}{stop}{usage}{done}"), "b"),
            (format!("{role}{done}"), "b"),
            (format!(": ping\n\n{done}"), "b"),
            (role.clone(), "b"),
            (format!("{role}{length}{done}"), "a"),
        ] {
            let outcomes = outcomes(&raw(200, SSE, &stream), &chat_stream("m")).await;
            assert_eq!(outcomes.with_another, (200, Some(endpoint.into())), "{stream}");
            assert_eq!(outcomes.alone.0, 200, "nobody else is left: {stream}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn at_most_two_take_over_from_what_is_merely_empty() {
    within(async {
        let empty = raw(200, JSON, r#"{"choices":[{"message":{"content":""},"finish_reason":"stop"}]}"#);
        let mut simulators = Vec::new();
        for _ in 0..5 {
            simulators.push(behaving(empty.clone()).await);
        }
        let proxy = Proxy::before(&simulators).await;
        proxy.chat("m").await.assert_from("c", 3);
        let asked: Vec<usize> = simulators.iter().map(|simulator| simulator.requests().len()).collect();
        assert_eq!(asked, [1, 1, 1, 0, 0]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_event_that_is_an_error_goes_elsewhere_in_any_shape() {
    within(async {
        let role = event(r#"{"choices":[{"delta":{"role":"assistant"}}]}"#);
        for error in [
            r#"{"error":{"message":"x","code":502}}"#,
            r#"{"error":"x"}"#,
            r#"{"object":"error","message":"x","type":"InternalServerError","code":500}"#,
            r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#,
            r#"{"code":503,"message":"busy"}"#,
            r#"{"choices":[{"delta":{},"finish_reason":"error"}],"error":{"code":502,"message":"x"}}"#,
            r#"{"detail":"x"}"#,
            r#"{"base_resp":{"status_code":1002,"status_msg":"rate limit"}}"#,
            "upstream went away",
        ] {
            for before in ["", role.as_str(), ": ping\n\n"] {
                let stream = format!("{before}{}{}", event(error), event("[DONE]"));
                let outcomes = outcomes(&raw(200, SSE, &stream), &chat_stream("m")).await;
                assert_eq!(outcomes.with_another, from_b(), "{stream}");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_after_the_first_text_is_the_endpoints_to_answer_for() {
    within(async {
        let text = event(r#"{"choices":[{"delta":{"content":"Hi"}}]}"#);
        for (error, errors) in [
            (r#"{"error":{"message":"x","code":502}}"#, 1),
            (r#"{"object":"error","message":"x","code":500}"#, 1),
            (r#"{"choices":[{"delta":{},"finish_reason":"error"}],"error":{"code":502,"message":"x"}}"#, 1),
            // The client's own fault, and no fault.
            (r#"{"error":{"message":"x","code":400}}"#, 0),
            (r#"{"choices":[{"delta":{"content":"an \"error\": null"}}],"error":null}"#, 0),
        ] {
            let stream = format!("{text}{}{}", event(error), event("[DONE]"));
            let (bad, other) = (behaving(raw(200, SSE, &stream)).await, simulator().await);
            let proxy = Proxy::before([&bad, &other]).await;
            let reply = proxy.post("/v1/chat/completions", &chat_stream("m")).await;
            assert_eq!((reply.status, reply.text()), (200, stream.as_str()), "the client sees it as it came");
            proxy.until_status("a", "errorCount", json!(errors)).await;
            assert!(other.requests().is_empty());
        }
    })
    .await;
}

/// An error answer, who answers if another endpoint is there, what a client sees if none is, and whether the endpoint is left
/// alone from then on.
type Case = (&'static str, u16, &'static str, &'static str, u16, bool);

#[rustfmt::skip]
const ERRORS: [Case; 24] = [
    ("Gemini's dead key", 400, r#"[{"error":{"code":400,"message":"API key not valid. Please pass a valid API key.","status":"INVALID_ARGUMENT","details":[{"reason":"API_KEY_INVALID"}]}}]"#, "b", 502, true),
    ("Gemini's expired key", 400, r#"[{"error":{"code":400,"message":"API key expired. Please renew the API key.","status":"INVALID_ARGUMENT"}}]"#, "b", 502, true),
    ("Anthropic's credit", 400, r#"{"type":"error","error":{"type":"invalid_request_error","message":"Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing."}}"#, "b", 502, true),
    ("DashScope's arrears", 400, r#"{"code":"Arrearage","message":"Access denied, please make sure your account is in good standing."}"#, "b", 502, true),
    ("OpenAI's quota", 429, r#"{"error":{"message":"You exceeded your current quota, please check your plan and billing details. For more information","type":"insufficient_quota","code":"insufficient_quota"}}"#, "b", 502, true),
    ("OpenAI's key", 401, r#"{"error":{"message":"Incorrect API key provided: sk-x.","type":"invalid_request_error","code":"invalid_api_key"}}"#, "b", 502, true),
    ("Zhipu's balance", 429, r#"{"error":{"code":"1113","message":"您的账户已欠费，请充值后重试"}}"#, "b", 502, true),
    ("MiniMax's balance", 500, r#"{"type":"error","error":{"type":"api_error","message":"insufficient balance (1008)"}}"#, "b", 502, true),
    ("Groq's tokens a minute", 413, r#"{"error":{"message":"Request too large for model `m` in organization `o` on tokens per minute (TPM): Limit 6000, Requested 14810","type":"tokens","code":"rate_limit_exceeded"}}"#, "b", 413, false),
    ("DashScope's minute", 429, r#"{"error":{"code":"insufficient_quota","message":"You exceeded your current quota, please check your plan and billing details."}}"#, "b", 429, true),
    ("Gemini's day", 429, r#"[{"error":{"code":429,"status":"RESOURCE_EXHAUSTED","message":"You exceeded your current quota","details":[{"violations":[{"quotaId":"GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]},{"retryDelay":"25s"}]}}]"#, "b", 429, true),
    ("OpenRouter's day", 429, r#"{"error":{"code":429,"message":"Rate limit exceeded: free-models-per-day. Add 10 credits"}}"#, "b", 429, true),
    ("Mistral's capacity", 429, r#"{"object":"error","message":"Service tier capacity exceeded for this model.","type":"invalid_request_error","code":null}"#, "b", 429, false),
    ("a missing model", 404, r#"{"error":{"message":"The model `m` does not exist or you do not have access to it.","type":"invalid_request_error","code":"model_not_found"}}"#, "b", 404, true),
    ("Ollama's missing model", 404, r#"{"error":"model 'm' not found, try pulling it first"}"#, "b", 404, true),
    ("Google's missing model", 404, r#"[{"error":{"code":404,"message":"models/m is not found for API version v1main, or is not supported","status":"NOT_FOUND"}}]"#, "b", 404, true),
    ("a relay's missing model", 503, r#"{"error":{"message":"当前分组 default 下对于模型 m 无可用渠道","type":"one_api_error"}}"#, "b", 503, true),
    ("llama.cpp without embeddings", 501, r#"{"error":{"code":501,"message":"This server does not support this","type":"not_supported_error"}}"#, "b", 501, false),
    ("OpenRouter's flagged prompt", 403, r#"{"error":{"code":403,"message":"Your chosen model requires moderation and your input was flagged","metadata":{"reasons":["violence"],"flagged_input":"…"}}}"#, "a", 403, false),
    ("Together's long prompt", 403, r#"{"error":{"message":"Input token count + max_tokens parameter must be less than the context length of the model being queried."}}"#, "a", 403, false),
    ("a long prompt called a failure", 500, r#"{"error":{"message":"too long","code":"context_length_exceeded"}}"#, "a", 500, false),
    ("an unknown 400", 400, r#"{"error":{"message":"You said: API key not valid. Please pass a valid API key."}}"#, "a", 400, false),
    ("an unknown 404", 404, r#"{"error":{"message":"Invalid URL (POST /v1/chat/completions)"}}"#, "a", 404, false),
    ("an unknown 418", 418, r#"{"error":{"message":"short and stout"}}"#, "a", 418, false),
];

#[tokio::test(flavor = "multi_thread")]
async fn an_error_means_what_its_body_says() {
    within(async {
        for (name, status, body, answered_by, seen, is_closed) in ERRORS {
            let outcomes = outcomes(&raw(status, JSON, body), &chat("m")).await;
            let (got, endpoint) = &outcomes.with_another;
            let expected = if answered_by == "b" { 200 } else { status };
            assert_eq!((*got, endpoint.as_deref()), (expected, Some(answered_by)), "{name}");
            assert_eq!(outcomes.alone.0, seen, "{name}: {}", outcomes.alone.1);
            assert_eq!(outcomes.status["available"], !is_closed, "{name}: {}", outcomes.status);
            if seen == 502 {
                assert_eq!(outcomes.alone.1["error"]["code"], "endpoint_key_refused", "{name}");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_error_means_the_same_in_a_stream() {
    within(async {
        // Those that are known by a name, since there is no status to go by.
        let named = ["key", "quota", "balance", "arrears", "missing", "credit", "capacity", "day"];
        for (name, _, body, answered_by, ..) in ERRORS {
            if answered_by == "b" && named.iter().any(|word| name.contains(word)) {
                let outcomes = outcomes(&raw(200, SSE, &event(body)), &chat_stream("m")).await;
                assert_eq!(outcomes.with_another, from_b(), "{name}");
            }
        }
        // SGLang says in a 200 what other servers say with a 400.
        let fault =
            r#"{"error":{"object":"error","message":"The input is too long.","type":"BadRequestError","code":400}}"#;
        let outcomes = outcomes(&raw(200, SSE, &event(fault)), &chat_stream("m")).await;
        assert_eq!(outcomes.with_another.0, 400, "it is sent to nobody else");
        assert_eq!(outcomes.status["errorCount"], 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_config_says_what_an_error_means() {
    within(async {
        let body = r#"{"error":{"message":"Quota for team 7 is gone","type":"custom","code":"E17"}}"#;
        let (bad, good) = (behaving(raw(400, JSON, body)).await, simulator().await);
        for (rule, means, attempts) in [
            (json!({ "code": "E17" }), "model_limit", "2"),
            (json!({ "type": "custom", "status": 400 }), "key", "2"),
            (json!({ "message": "Quota for team * is gone" }), "account_limit", "2"),
            (json!({ "message": "Quota" }), "model_limit", "1"),
            (json!({ "code": "E17", "status": 500 }), "model_limit", "1"),
            (json!({ "code": "E17" }), "request", "1"),
        ] {
            let mut rule = rule;
            rule["means"] = json!(means);
            let errors = json!({ "errors": [rule] });
            let apis = [
                endpoint_with("a", &bad.base_url(), errors.clone()),
                endpoint_with("b", &good.base_url(), json!({ "priority": 1 })),
            ];
            let proxy = Proxy::start(json!({}), &apis).await;
            assert_eq!(proxy.chat("m").await.attempts(), Some(attempts), "{errors}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_decided_is_counted() {
    within(async {
        let bad = behaving(raw(400, JSON, ERRORS[0].2)).await;
        let proxy = Proxy::before([&bad]).await;
        proxy.chat("m").await;
        let metrics = proxy.get("/metrics").await;
        let line = r#"api_together_endpoint_errors_total{endpoint="a",rule="google/api_key_invalid",trouble="key"}"#;
        assert!(metrics.text().contains(line), "{}", metrics.text());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoints_complaint_about_its_key_reaches_the_client_only_if_it_is_wanted() {
    within(async {
        let bad = behaving(Behaviour::status(401)).await;
        let proxy = Proxy::before([&bad]).await;
        for body in [chat("m"), chat_stream("m")] {
            let reply = proxy.post("/v1/chat/completions", &body).await;
            let message = reply.assert_error(502, "server_error", "endpoint_key_refused");
            assert!(message.contains("Your own key is right"), "{message}");
            assert_eq!(reply.header("x-should-retry"), Some("false"), "no client's patience makes the key better");
        }
        let shown = json!({ "retry": { "showEndpointKeyErrors": true } });
        let proxy = Proxy::start(shown, &in_order([bad.base_url().as_str()])).await;
        assert_eq!(proxy.chat("m").await.status, 401);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_known_by_what_it_is() {
    within(async {
        let text = event(r#"{"choices":[{"delta":{"content":"Hi"}}],"usage":null}"#);
        let usage = event(r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}"#);
        let (whole, done) = (format!("{text}{usage}"), event("[DONE]"));
        let error = event(r#"{"error":{"message":"x","code":503}}"#);
        for label in [JSON, "text/plain", "application/octet-stream", SSE] {
            for asked in [chat_stream("m"), chat("m")] {
                let good = behaving(raw(200, label, &format!("{whole}{done}"))).await;
                let proxy = Proxy::before([&good]).await;
                let reply = proxy.post("/v1/chat/completions", &asked).await;
                assert_eq!(reply.status, 200, "{label}");
                assert_eq!(reply.header("content-type"), Some(SSE), "{label}: it is called what it is");
                assert!(reply.text().ends_with(&done) && reply.text().starts_with("data: {\"choices\""), "{label}");
                let asked_usage = asked["stream"] == true;
                assert_eq!(
                    reply.text().contains("total_tokens"),
                    !asked_usage,
                    "{label}: what we asked for is taken out"
                );
                let outcomes = outcomes(&raw(200, label, &error), &asked).await;
                assert_eq!(outcomes.with_another, from_b(), "{label}");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_stream_is_asked_once_more_without_our_stream_options() {
    within(async {
        for (status, body) in [
            (422, r#"{"detail":[{"loc":["body","stream_options"],"msg":"Extra inputs are not permitted"}]}"#),
            (400, r#"{"error":{"message":"Unrecognized request argument supplied"}}"#),
            (400, r#"{"error":"bad request"}"#),
            (422, ""),
            (400, "<html>Bad Request</html>"),
        ] {
            let picky = simulator().await;
            picky.script("m", vec![raw(status, JSON, body), Behaviour::default()]);
            let other = simulator().await;
            let proxy = Proxy::before([&picky, &other]).await;
            let reply = proxy.post("/v1/chat/completions", &chat_stream("m")).await;
            reply.assert_from("a", 1);
            let bodies: Vec<Value> =
                picky.requests().iter().map(|request| serde_json::from_slice(&request.body).unwrap()).collect();
            assert_eq!(bodies.len(), 2, "{body}");
            assert!(bodies[0]["stream_options"].is_object() && bodies[1]["stream_options"].is_null());
            assert_eq!(proxy.status_of("a").await["streamUsage"], "refused", "{body}");
        }
        // A request that is wrong itself is told so, and nothing is remembered.
        let wrong = behaving(raw(400, JSON, r#"{"error":{"message":"messages is empty"}}"#)).await;
        let proxy = Proxy::before([&wrong]).await;
        assert_eq!(proxy.post("/v1/chat/completions", &chat_stream("m")).await.status, 400);
        assert_eq!(wrong.requests().len(), 2);
        assert_eq!(proxy.status_of("a").await["streamUsage"], "auto");
    })
    .await;
}
