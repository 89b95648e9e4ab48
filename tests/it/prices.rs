//! What answers cost: by endpoint, model, caller's key and day.

use std::time::Duration;

use http::Method;
use serde_json::{Value, json};

use crate::harness::{Proxy, Reply, chat, chat_stream, endpoint_with, simulator, within};

const ADA: &str = "sk-ada-0f6c1d93be5a7724";

/// What these tokens cost at 100 dollars for a million of the prompt, and 1,000 of the answer.
fn dollars(counts: &Value) -> f64 {
    let of = |name: &str| counts[name].as_f64().unwrap();
    of("promptTokens") / 1e4 + of("completionTokens") / 1e3
}

fn near(value: &Value, dollars: f64) -> bool {
    value.as_f64().is_some_and(|found| (found - dollars).abs() < 1e-9)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_says_what_it_cost_if_the_config_wants_it_and_it_is_known() {
    within(async {
        let simulator = simulator().await;
        let apis = [endpoint_with("a", &simulator.base_url(), json!({ "models": ["dear", "odd"] }))];
        let prices = json!({ "dear": { "input": 100, "output": 1000 } });
        for says in [true, false] {
            let proxy = Proxy::start(json!({ "prices": prices, "costHeader": says }), &apis).await;
            let reply = proxy.chat("dear").await;
            let usage = &reply.json()["usage"];
            let of = |name: &str| usage[name].as_f64().unwrap();
            let cost = of("prompt_tokens") / 1e4 + of("completion_tokens") / 1e3;
            let said = reply.header("x-api-together-cost-usd").map(|text| text.parse::<f64>().unwrap());
            assert_eq!(said.map(|said| (said - cost).abs() < 1e-9), says.then_some(true), "{said:?} {cost}");
            assert_eq!(proxy.chat("odd").await.header("x-api-together-cost-usd"), None);
            let stream = proxy.post("/v1/chat/completions", &chat_stream("dear")).await;
            assert_eq!((stream.status, stream.header("x-api-together-cost-usd")), (200, None));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_answer_costs_is_kept_by_endpoint_model_key_and_day() {
    within(async {
        // Metrics are the process's: another test's endpoint and key must not be called like these.
        let simulator = simulator().await;
        let models = json!({ "models": ["dear", "cheap", "odd"], "prices": { "cheap": { "input": 0, "output": 0 } } });
        let apis = [endpoint_with("priced", &simulator.base_url(), models)];
        let prices = json!({ "dear": { "input": 100, "output": 1000, "asOf": "2026-11-30" }, "c*": { "input": 9, "output": 9 } });
        let keys = json!([{ "name": "payer", "key": ADA }]);
        let proxy = Proxy::start(json!({ "keys": keys, "prices": prices }), &apis).await;
        let stream = json!({ "model": "dear", "stream": true, "messages": [{ "role": "user", "content": "Hello" }] });
        for body in [chat("dear"), stream, chat("cheap"), chat("odd")] {
            let request = proxy.request_without_key(Method::POST, "/v1/chat/completions").bearer_auth(ADA);
            assert_eq!(Reply::of(request.json(&body)).await.status, 200);
        }
        proxy.chat("dear").await;
        // An answer is counted when it is over here too, which may be a moment later than its caller has it.
        let ended = |metrics: &str| {
            let lines = metrics.lines().filter(|line| line.starts_with(r#"api_together_requests_total{endpoint="priced""#));
            lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum::<u64>()
        };
        for _ in 0..100 {
            if ended(proxy.get("/metrics").await.text()) == 5 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let stats = proxy.get("/v1/token/stats").await.json();
        let models = &stats["detailedStats"]["priced"]["models"];
        let (dear, cost) = (&models["dear"], dollars(&models["dear"]));
        assert!(cost > 0.01 && dear["requests"] == 3, "{models}");
        assert!(near(&dear["usd"], cost) && near(&stats["summary"]["usd"], cost), "{stats}");
        assert!(near(&stats["summary"]["currentDayUsd"], cost), "{stats}");
        assert_eq!(stats["summary"]["unpricedRequests"], 1);
        assert_eq!(dear["price"]["source"], "config, of 2026-11-30");
        assert_eq!(dear["price"]["output"], 1000.0);
        assert!(near(&models["cheap"]["usd"], 0.0), "an endpoint's own price counts: {models}");
        assert_eq!((&models["odd"]["usd"], &models["odd"]["price"]), (&Value::Null, &Value::Null));
        // The two with the key, and none of the other one's.
        let ada = &stats["keys"]["payer"];
        let of_ada = dollars(&ada["endpoints"]["priced"]["models"]["dear"]);
        assert!(of_ada < cost && near(&ada["usd"], of_ada), "{ada}");
        assert!(near(&ada["endpoints"]["priced"]["models"]["dear"]["usd"], of_ada), "{ada}");
        assert_eq!(ada["dailyUsd"].as_object().unwrap().len(), 1);
        assert_eq!(stats["keys"].as_object().unwrap().len(), 1);
        let own = Reply::of(proxy.request_without_key(Method::GET, "/v1/key").bearer_auth(ADA)).await.json();
        let spend = &own["spend"];
        assert!(near(&spend["usd"], of_ada) && near(&spend["today"]["usd"], of_ada), "{own}");
        assert_eq!((&spend["requests"], &spend["unpricedRequests"]), (&json!(4), &json!(1)));
        assert_eq!(spend["tokens"], ada["totalTokens"]);
        let metrics = proxy.get("/metrics").await;
        let metrics = metrics.text();
        let value = |metric: &str| {
            let line = metrics.lines().find_map(|line| line.strip_prefix(metric));
            line.unwrap_or_else(|| panic!("{metric} is not in\n{metrics}")).trim().parse::<f64>().unwrap()
        };
        for (metric, expected) in [
            (r#"api_together_cost_usd_total{endpoint="priced",model="dear"}"#, cost),
            (r#"api_together_unpriced_answers_total{endpoint="priced",model="odd"}"#, 1.0),
            (r#"api_together_key_cost_usd_total{key="payer"}"#, of_ada),
        ] {
            assert!((value(metric) - expected).abs() < 1e-9, "{metric} {} is not {expected}\n{stats}\n{metrics}", value(metric));
        }
    })
    .await;
}
