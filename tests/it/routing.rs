//! Which endpoint a request goes to.

use std::collections::BTreeMap;

use api_together::simulator::{Behaviour, StallAt};
use http::Method;
use serde_json::{Value, json};

use crate::harness::{
    Proxy, Reply, behaving, chat, closed_port, endpoint, endpoint_with, simulator, tally, until, within,
};

async fn chats(proxy: &Proxy, count: usize) -> BTreeMap<String, usize> {
    let mut replies = Vec::new();
    for _ in 0..count {
        replies.push(proxy.chat("m").await);
    }
    tally(&replies)
}

fn counts<const N: usize>(counts: [(&str, usize); N]) -> BTreeMap<String, usize> {
    counts.into_iter().map(|(id, count)| (id.to_owned(), count)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exact_name_beats_a_pattern_and_a_long_pattern_a_short_one() {
    within(async {
        let simulator = simulator().await;
        let api = |id: &str, models: Value| endpoint_with(id, &simulator.base_url(), json!({ "models": models }));
        let proxy = Proxy::start(
            json!({}),
            &[
                api("rest", json!(["*"])),
                api("short", json!(["gpt-*"])),
                api("long", json!(["gpt-4*"])),
                api("exact", json!(["gpt-4o"])),
            ],
        )
        .await;
        for (model, id) in
            [("gpt-4o", "exact"), ("gpt-4o-mini", "long"), ("gpt-4", "long"), ("gpt-3.5", "short"), ("llama", "rest")]
        {
            for _ in 0..4 {
                proxy.chat(model).await.assert_from(id, 1);
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mapped_name_is_translated_for_each_attempt_afresh() {
    within(async {
        let first = behaving(Behaviour::status(503)).await;
        let second = simulator().await;
        let api = |id: &str, url: &str, name: &str, priority: u32| {
            let mapping = json!({ "models": [], "modelMapping": { "fast": name }, "priority": priority });
            endpoint_with(id, url, mapping)
        };
        let proxy = Proxy::start(
            json!({}),
            &[api("a", &first.base_url(), "first-model", 0), api("b", &second.base_url(), "second \"model\"", 1)],
        )
        .await;
        proxy.chat("fast").await.assert_from("b", 2);
        let sent = |body: &[u8]| serde_json::from_slice::<Value>(body).unwrap();
        assert_eq!(sent(&first.requests()[0].body)["model"], "first-model");
        let mut expected = chat("fast");
        expected["model"] = "second \"model\"".into();
        assert_eq!(sent(&second.requests()[0].body), expected);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_model_is_told_so() {
    within(async {
        let simulator = simulator().await;
        let api = endpoint_with("a", &simulator.base_url(), json!({ "models": ["known"] }));
        let off = endpoint_with("b", &simulator.base_url(), json!({ "models": ["off"], "enabled": false }));
        let none = endpoint_with("c", &simulator.base_url(), json!({ "models": ["none"], "rpm": 0 }));
        let proxy = Proxy::start(json!({}), &[api, off, none]).await;
        for model in ["unknown", "off", "none", "known2", "kno", " "] {
            let reply = proxy.chat(model).await;
            let message = reply.assert_error(404, "invalid_request_error", "model_not_found");
            assert!(message.contains(&format!("`{model}`")), "{message}");
            assert_eq!(reply.json()["error"]["param"], "model");
        }
        assert!(simulator.requests().is_empty());
        proxy.chat("known").await.assert_from("a", 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_a_model_may_go_to_any() {
    within(async {
        let simulator = behaving(Behaviour { echo: true, ..Behaviour::default() }).await;
        let api = |id: &str| endpoint_with(id, &simulator.base_url(), json!({ "models": [id] }));
        let proxy = Proxy::start(json!({ "strategy": "round_robin" }), &[api("a"), api("b")]).await;
        let mut replies = Vec::new();
        for _ in 0..2 {
            replies.push(proxy.get("/v1/any/list").await);
            replies.push(proxy.post("/v1/moderations", &json!({ "input": "text" })).await);
        }
        assert_eq!(tally(&replies), counts([("a", 2), ("b", 2)]));
        // A path of another endpoint's own, and a method that only some calls know.
        for method in [Method::GET, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS] {
            let reply = Reply::of(proxy.request(method.clone(), "/v1/any/path")).await;
            assert_eq!(reply.json()["echo"]["method"], method.as_str());
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lower_tier_is_for_when_nothing_above_can_take_it() {
    within(async {
        let (above, below) = (simulator().await, simulator().await);
        let api = |id: &str, url: &str, priority: u32| endpoint_with(id, url, json!({ "priority": priority }));
        let proxy = Proxy::start(
            json!({}),
            &[api("below", &below.base_url(), 7), api("a", &above.base_url(), 1), api("b", &above.base_url(), 1)],
        )
        .await;
        let above_only = chats(&proxy, 12).await;
        assert!(!above_only.contains_key("below"), "{above_only:?}");
        above.set_default(Behaviour::status(503));
        proxy.chat("m").await.assert_from("below", 3);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn turns_are_taken_in_order_and_by_weight() {
    within(async {
        let simulator = simulator().await;
        let api = |id: &str, weight: u32| endpoint_with(id, &simulator.base_url(), json!({ "weight": weight }));
        let proxy = Proxy::start(json!({ "strategy": "round_robin" }), &[api("a", 1), api("b", 1), api("c", 1)]).await;
        let mut order = String::new();
        for _ in 0..6 {
            order += proxy.chat("m").await.endpoint().unwrap();
        }
        assert_eq!(order, "abcabc");
        let proxy = Proxy::start(json!({ "strategy": "round_robin" }), &[api("a", 3), api("b", 1)]).await;
        let mut order = String::new();
        for _ in 0..8 {
            order += proxy.chat("m").await.endpoint().unwrap();
        }
        assert_eq!(order, "aabaaaba", "smooth: no endpoint gets its share in one go");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_follows_the_weights() {
    within(async {
        let simulator = simulator().await;
        let api = |id: &str, weight: u32| endpoint_with(id, &simulator.base_url(), json!({ "weight": weight }));
        let proxy = Proxy::start(json!({}), &[api("a", 9), api("b", 1)]).await;
        let counts = chats(&proxy, 200).await;
        // 20 are expected, with a deviation of 4.2; seven of those are never seen.
        let few = counts.get("b").copied().unwrap_or(0);
        assert!((1..50).contains(&few), "{counts:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn least_busy_avoids_the_one_with_a_stream_in_flight() {
    within(async {
        let (a, b) = (simulator().await, simulator().await);
        let apis = [endpoint("a", &a.base_url()), endpoint("b", &b.base_url())];
        let proxy = Proxy::start(json!({ "strategy": "least_busy" }), &apis).await;
        let stalled = Behaviour { stall: Some(StallAt::AfterEvents(3)), ..Behaviour::default() };
        for simulator in [&a, &b] {
            simulator.script("stalled", vec![stalled.clone()]);
        }
        let stream = proxy.open_stream("stalled").await;
        let busy = stream.headers()["x-api-together-endpoint"].to_str().unwrap().to_owned();
        let idle = if busy == "a" { "b" } else { "a" };
        proxy.until_status(&busy, "inFlight", json!(1)).await;
        assert_eq!(chats(&proxy, 10).await, counts([(idle, 10)]));
        drop(stream);
        proxy.until_status(&busy, "inFlight", json!(0)).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fastest_goes_where_the_first_byte_comes_soonest() {
    within(async {
        let quick = simulator().await;
        let slow = behaving(Behaviour { header_delay_ms: 300, ..Behaviour::default() }).await;
        let apis = [endpoint("slow", &slow.base_url()), endpoint("quick", &quick.base_url())];
        let proxy = Proxy::start(json!({ "strategy": "fastest" }), &apis).await;
        let counts = chats(&proxy, 12).await;
        assert_eq!(counts, self::counts([("quick", 11), ("slow", 1)]), "a new one is tried once");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_flight_counts_last_to_the_last_byte_and_no_longer() {
    within(async {
        let simulator = simulator().await;
        let apis = [
            endpoint_with("dead", &closed_port(), json!({})),
            endpoint_with("a", &simulator.base_url(), json!({ "priority": 1 })),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        let slow = Behaviour { chunk_delay_ms: 20, events: 10, ..Behaviour::default() };
        simulator.script("slow", vec![slow]);
        let stream = proxy.open_stream("slow").await;
        assert_eq!(proxy.status_of("a").await["inFlight"], 1, "the header has come, the rest has not");
        assert_eq!(proxy.status_of("dead").await["inFlight"], 0, "a failed attempt is over");
        assert!(stream.text().await.unwrap().ends_with("data: [DONE]\n\n"));
        proxy.until_status("a", "inFlight", json!(0)).await;

        simulator.script("stalled", vec![Behaviour { stall: Some(StallAt::AfterEvents(3)), ..Behaviour::default() }]);
        let stream = proxy.open_stream("stalled").await;
        assert_eq!(proxy.status_of("a").await["inFlight"], 1);
        drop(stream);
        proxy.until_status("a", "inFlight", json!(0)).await;
        until("the endpoint's request ends", || simulator.open_requests() == 0).await;
    })
    .await;
}

/// Simulated endpoints `a`, `b`, `c` that answer any call but chat with 404, ten times a minute at most.
async fn without_other_calls() -> (Vec<api_together::simulator::Simulator>, Vec<serde_json::Value>) {
    let mut simulators = Vec::new();
    for _ in 0..3 {
        simulators.push(simulator().await);
    }
    let api = |(id, simulator): (&str, &api_together::simulator::Simulator)| {
        endpoint_with(id, &simulator.base_url(), json!({ "rpm": 10 }))
    };
    let apis = ["a", "b", "c"].into_iter().zip(&simulators).map(api).collect();
    (simulators, apis)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_no_endpoint_has_is_asked_of_each_once() {
    within(async {
        for (path, kind) in [
            ("/v1/messages/count_tokens", "not_found_error"),
            ("/v1/responses/input_tokens", "invalid_request_error"),
            ("/v1/rerank", "invalid_request_error"),
            ("/v1/unheard_of", "invalid_request_error"),
            ("/v1/realtime/sessions", "invalid_request_error"),
        ] {
            let (simulators, apis) = without_other_calls().await;
            let proxy = Proxy::start(json!({}), &apis).await;
            for call in 1..=12 {
                let reply = proxy.post(path, &chat("m")).await;
                assert_eq!(reply.status, 404, "{path}");
                if call > 3 {
                    reply.assert_error(404, kind, "call_not_found");
                } else {
                    assert_eq!(reply.attempts(), Some("1"), "it is not sent to the others at once");
                }
            }
            let asked: Vec<usize> = simulators.iter().map(|simulator| simulator.requests().len()).collect();
            assert_eq!(asked, [1, 1, 1], "{path}");
            // Chat is not touched by it.
            for _ in 0..27 {
                assert_eq!(proxy.chat("m").await.status, 200, "{path}");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_has_the_call_is_found_and_others_are_left_alone() {
    within(async {
        let (simulators, apis) = without_other_calls().await;
        let answer = Behaviour { body: Some(r#"{"input_tokens":3}"#.into()), ..Behaviour::default() };
        simulators[1].set_default(answer);
        let proxy = Proxy::start(json!({ "strategy": "round_robin" }), &apis).await;
        let mut found = 0;
        for _ in 0..10 {
            found += usize::from(proxy.post("/v1/messages/count_tokens", &chat("m")).await.status == 200);
        }
        assert!(found >= 8, "{found}");
        assert!(simulators[0].requests().len() <= 1 && simulators[2].requests().len() <= 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_404_of_an_id_or_of_a_call_that_has_worked_is_not_remembered() {
    within(async {
        let (simulators, apis) = without_other_calls().await;
        let proxy = Proxy::start(json!({}), &apis[..1]).await;
        for path in ["/v1/files/file-abc", "/v1/responses/resp_1", "/v1/containers/mine"] {
            for _ in 0..2 {
                let asked = simulators[0].requests().len();
                assert_eq!(proxy.get(path).await.status, 404);
                assert_eq!(simulators[0].requests().len(), asked + 1, "{path}");
            }
        }
        proxy.chat("m").await.assert_from("a", 1);
        simulators[0].script("gone", vec![Behaviour::status(404)]);
        assert_eq!(proxy.chat("gone").await.status, 404);
        proxy.chat("m").await.assert_from("a", 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn most_left_empties_quotas_of_different_size_evenly() {
    within(async {
        let simulator = simulator().await;
        let api = |id: &str, rpd: u32| endpoint_with(id, &simulator.base_url(), json!({ "rpd": rpd }));
        let apis = [api("a", 10), api("b", 20), api("c", 40)];
        let proxy = Proxy::start(json!({ "strategy": "most_left" }), &apis).await;
        // Half of all.
        let half = chats(&proxy, 35).await;
        for (id, expected) in [("a", 5_usize), ("b", 10), ("c", 20)] {
            assert!(half[id].abs_diff(expected) <= 1, "{half:?}");
        }
        // And the rest, to the last one.
        chats(&proxy, 35).await;
        assert_eq!(proxy.chat("m").await.status, 429);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fill_first_uses_one_after_the_other() {
    within(async {
        let simulator = simulator().await;
        let api = |id: &str, rpm: u32| endpoint_with(id, &simulator.base_url(), json!({ "rpm": rpm }));
        let proxy = Proxy::start(json!({ "strategy": "fill_first" }), &[api("a", 5), api("b", 7), api("c", 9)]).await;
        for (id, count) in [("a", 5), ("b", 7), ("c", 9)] {
            assert_eq!(chats(&proxy, count).await, counts([(id, count)]));
        }
    })
    .await;
}
