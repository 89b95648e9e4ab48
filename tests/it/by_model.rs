//! One model's trouble, one caller's trouble: whom it leaves alone.

use std::time::Duration;

use api_together::simulator::{Behaviour, Simulator, StallAt};
use serde_json::{Value, json};

use crate::harness::{Proxy, behaving, chat, chat_stream, endpoint_with, simulator, until, within};

fn status(status: u16) -> Behaviour {
    Behaviour::status(status)
}

/// A 200 with this body.
fn answer(content_type: &str, body: &str) -> Behaviour {
    Behaviour { body: Some(body.into()), ..status(200).header("content-type", content_type) }
}

/// An error answer with this body.
fn error(code: u16, body: &str) -> Behaviour {
    Behaviour { body: Some(body.into()), ..status(code) }
}

/// Endpoints that serve these models by name.
fn named(simulators: &[&Simulator], models: &[&str]) -> Vec<Value> {
    let ids = ["a", "b", "c"];
    let numbered = simulators.iter().zip(ids).enumerate();
    let api = |(priority, (simulator, id)): (usize, (&&Simulator, &str))| {
        endpoint_with(id, &simulator.base_url(), json!({ "models": models, "priority": priority }))
    };
    numbered.map(api).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_or_a_failure_of_one_model_leaves_the_others_alone() {
    within(async {
        for (trouble, times) in [
            (status(429).header("retry-after", "3600"), 1),
            (status(429), 1),
            (status(503), 3),
            (status(503).header("retry-after", "60"), 1),
            (status(529).header("retry-after", "60"), 1),
            (error(404, r#"{"error":{"code":"model_not_found","message":"x"}}"#), 1),
            (error(200, r#"{"error":{"code":429,"message":"x"}}"#), 1),
            (error(200, "<html>"), 3),
        ] {
            let (bad, spare) = (simulator().await, simulator().await);
            bad.script("sick", vec![trouble.clone()]);
            let proxy = Proxy::start(json!({}), &named(&[&bad, &spare], &["sick", "well", "new"])).await;
            proxy.chat("well").await.assert_from("a", 1);
            for _ in 0..times {
                proxy.chat("sick").await.assert_from("b", 2);
            }
            let what = format!("{trouble:?}");
            proxy.chat("sick").await.assert_from("b", 1);
            for model in ["well", "new"] {
                proxy.chat(model).await.assert_from("a", 1);
            }
            let status = proxy.status_of("a").await;
            assert_eq!(status["available"], true, "{what}");
            assert_eq!(status["temporarilyDisabled"], false, "{what}");
            assert_eq!(status["models"]["sick"]["available"], false, "{what}: {status}");
            assert_eq!(status["models"]["well"]["available"], true, "{what}: {status}");
            let metrics = proxy.get("/metrics").await;
            let line = r#"api_together_model_available{endpoint="a",model="sick"} 0"#;
            assert!(metrics.text().contains(line), "{what}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_prompt_that_every_endpoint_answers_with_nothing_is_charged_to_none() {
    within(async {
        let empty = answer("application/json", r#"{"choices":[{"message":{"content":""},"finish_reason":"stop"}]}"#);
        let silent = answer(
            "text/event-stream",
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n\
             data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n",
        );
        let deferred = answer("application/json", r#"{"request_id":"later"}"#);
        for (behaviour, stream) in [(&empty, false), (&silent, true), (&deferred, false)] {
            for endpoints in [2, 3] {
                let mut simulators = Vec::new();
                for _ in 0..endpoints {
                    let simulator = simulator().await;
                    simulator
                        .script("m", vec![behaviour.clone(); 5].into_iter().chain([Behaviour::default()]).collect());
                    simulators.push(simulator);
                }
                let proxy = Proxy::start(json!({}), &named(&simulators.iter().collect::<Vec<_>>(), &["m"])).await;
                for _ in 0..5 {
                    let body = if stream { chat_stream("m") } else { chat("m") };
                    proxy.post("/v1/chat/completions", &body).await;
                }
                for id in ["a", "b", "c"].into_iter().take(endpoints) {
                    let status = proxy.status_of(id).await;
                    assert_eq!(status["errorCount"], 0, "{behaviour:?}, {endpoints} endpoints: {status}");
                }
                proxy.chat("m").await.assert_from("a", 1);
            }
            // One that another did better than is at fault, as soon as that is known.
            let (bad, good) = (behaving(behaviour.clone()).await, simulator().await);
            let proxy = Proxy::start(json!({}), &named(&[&bad, &good], &["m"])).await;
            let body = if stream { chat_stream("m") } else { chat("m") };
            proxy.post("/v1/chat/completions", &body).await.assert_from("b", 2);
            while proxy.status_of("a").await["errorCount"] != 1 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_header_of_a_stream_is_no_better_answer() {
    within(async {
        // A prompt that makes servers fail, the last of them behind the header of a stream.
        let error = "data: {\"error\":{\"message\":\"x\",\"code\":500}}\n\n";
        let (first, last) = (behaving(status(500)).await, behaving(answer("text/event-stream", error)).await);
        let proxy = Proxy::start(json!({}), &named(&[&first, &last], &["m"])).await;
        for _ in 0..4 {
            proxy.post("/v1/chat/completions", &chat_stream("m")).await;
        }
        proxy.until_open(1).await;
        for id in ["a", "b"] {
            assert_eq!(proxy.status_of(id).await["errorCount"], 0, "{id}");
        }
        // What is no stream has content at once; a stream has it long before its end.
        let empty = answer("application/json", r#"{"choices":[{"message":{"content":""},"finish_reason":"stop"}]}"#);
        let json = answer("application/json", r#"{"choices":[{"message":{"content":"x"},"finish_reason":"stop"}]}"#);
        let endless = Behaviour { stall: Some(StallAt::AfterEvents(3)), ..Behaviour::default() };
        for good in [json, endless] {
            let (bad, good) = (behaving(empty.clone()).await, behaving(good).await);
            let proxy = Proxy::start(json!({}), &named(&[&bad, &good], &["m"])).await;
            let mut reply = proxy.open_stream("m").await;
            assert!(reply.chunk().await.unwrap().is_some());
            while proxy.status_of("a").await["errorCount"] != 1 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn trouble_of_the_key_the_account_or_the_connection_is_all_models() {
    within(async {
        for (trouble, times) in [
            (error(401, r#"{"error":{"code":"invalid_api_key","message":"x"}}"#), 1),
            (error(429, r#"{"error":{"code":"insufficient_quota","type":"insufficient_quota","message":"x"}}"#), 1),
            (error(429, r#"{"error":{"type":"rate_limit_reached_error","message":"try again after 60 seconds"}}"#), 1),
            (error(403, "<html>blocked</html>"), 3),
            (status(402), 3),
        ] {
            let (bad, spare) = (simulator().await, simulator().await);
            bad.script("sick", vec![trouble.clone()]);
            let proxy = Proxy::start(json!({}), &named(&[&bad, &spare], &["sick", "well"])).await;
            for _ in 0..times {
                proxy.chat("sick").await.assert_from("b", 2);
            }
            proxy.chat("well").await.assert_from("b", 1);
            assert_eq!(proxy.status_of("a").await["available"], false, "{trouble:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn trouble_that_most_models_show_is_the_endpoints() {
    within(async {
        let (bad, spare) = (behaving(status(503)).await, simulator().await);
        let proxy = Proxy::start(json!({}), &named(&[&bad, &spare], &["m1", "m2", "m3"])).await;
        for model in ["m1", "m2"] {
            for _ in 0..3 {
                proxy.chat(model).await.assert_from("b", 2);
            }
        }
        // The third was never asked for, and is not tried out by its first caller.
        proxy.chat("m3").await.assert_from("b", 1);
        assert_eq!(bad.requests().len(), 6);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_a_caller_makes_up_close_nothing_for_others() {
    within(async {
        let (endpoint_a, spare) = (simulator().await, simulator().await);
        let missing = error(404, r#"{"error":{"code":"model_not_found","message":"no such model"}}"#);
        endpoint_a.set_default(missing);
        endpoint_a.script("real", vec![Behaviour::default()]);
        let proxy = Proxy::before([&endpoint_a, &spare]).await;
        proxy.chat("real").await.assert_from("a", 1);
        for number in 0..300 {
            assert_eq!(proxy.chat(&format!("invented-{number}")).await.status, 200);
        }
        proxy.chat("real").await.assert_from("a", 1);
        assert!(proxy.status_of("a").await["models"].as_object().unwrap().len() < 10);
        assert!(endpoint_a.requests().len() < 20, "it is not asked for each of them");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_prompt_that_makes_servers_fail_is_charged_to_none() {
    within(async {
        for code in [500, 408, 425] {
            let (first, second) = (simulator().await, simulator().await);
            for simulator in [&first, &second] {
                simulator.script("m", vec![status(code); 10].into_iter().chain([Behaviour::default()]).collect());
            }
            let proxy = Proxy::start(json!({}), &named(&[&first, &second], &["m"])).await;
            for _ in 0..10 {
                let reply = proxy.chat("m").await;
                assert_eq!((reply.status, reply.attempts()), (code, Some("2")));
            }
            for id in ["a", "b"] {
                assert_eq!(proxy.status_of(id).await["errorCount"], 0, "{code}");
            }
            for _ in 0..12 {
                assert_eq!(proxy.chat("m").await.status, 200, "an ordinary request");
            }
        }
        // What says something about an endpoint is charged, however many say it.
        for code in [502, 503, 504, 529, 401] {
            let (first, second) = (behaving(status(code)).await, behaving(status(code)).await);
            let proxy = Proxy::start(json!({}), &named(&[&first, &second], &["m"])).await;
            proxy.chat("m").await;
            assert_eq!(proxy.status_of("a").await["errorCount"], 1, "{code}");
        }
        // One alone counts as ever.
        let alone = behaving(status(500)).await;
        let proxy = Proxy::before([&alone]).await;
        proxy.chat("m").await;
        assert_eq!(proxy.status_of("a").await["errorCount"], 1);
        // And so does one that another did better than.
        let (bad, good) = (behaving(status(500)).await, simulator().await);
        let proxy = Proxy::before([&bad, &good]).await;
        proxy.chat("m").await.assert_from("b", 2);
        assert_eq!(proxy.status_of("a").await["errorCount"], 1);
        // Two that fail alike at what a third answers are at fault.
        let (first, second) = (behaving(status(500)).await, behaving(status(500)).await);
        let proxy = Proxy::before([&first, &second, &good]).await;
        proxy.chat("m").await.assert_from("c", 3);
        for id in ["a", "b"] {
            assert_eq!(proxy.status_of(id).await["errorCount"], 1);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_endpoints_are_never_refused() {
    within(async {
        for count in [1, 2, 3] {
            let mut simulators = Vec::new();
            for _ in 0..count {
                simulators.push(behaving(status(503)).await);
            }
            let proxy = Proxy::before(&simulators).await;
            for _ in 0..5 {
                assert_eq!(proxy.chat("m").await.status, 503);
            }
            for id in ["a", "b", "c"].iter().take(count) {
                assert_eq!(proxy.status_of(id).await["temporarilyDisabled"], true, "{count} {id}");
                assert_eq!(proxy.status_of(id).await["available"], false);
            }
            for simulator in &simulators {
                simulator.set_default(Behaviour { header_delay_ms: 50, ..Behaviour::default() });
            }
            // Many at once, while nobody has shown that it works.
            let calls = (0..12).map(|_| async { proxy.chat("m").await.status });
            let answers = futures_join(calls).await;
            assert!(answers.iter().all(|status| *status == 200), "{count}: {answers:?}");
        }
    })
    .await;
}

/// All of them at once.
async fn futures_join<T>(calls: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut calls: Vec<_> = calls.map(Box::pin).collect();
    let mut results: Vec<Option<T>> = calls.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        for (call, result) in calls.iter_mut().zip(&mut results) {
            if result.is_none()
                && let std::task::Poll::Ready(value) = call.as_mut().poll(context)
            {
                *result = Some(value);
            }
        }
        if results.iter().all(Option::is_some) { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    results.into_iter().flatten().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guessed_rest_lets_one_through_and_a_stated_one_nobody() {
    within(async {
        let simulator = behaving(status(429)).await;
        let proxy = Proxy::before([&simulator]).await;
        for asked in 1..=3 {
            assert_eq!(proxy.chat("m").await.status, 429);
            assert_eq!(simulator.requests().len(), asked, "nobody else is left, and it did not say for how long");
        }
        simulator.set_default(Behaviour { header_delay_ms: 300, ..Behaviour::default() });
        let asked = simulator.requests().len();
        let meanwhile = async {
            until("one is there", || simulator.requests().len() > asked).await;
            let refused = proxy.chat("m").await;
            refused.assert_error(429, "requests", "rate_limit_exceeded");
        };
        let body = chat("m");
        let (one, ()) = tokio::join!(proxy.post("/v1/chat/completions", &body), meanwhile);
        one.assert_from("a", 1);
        proxy.chat("m").await.assert_from("a", 1);

        for stated in [
            status(429).header("retry-after", "30"),
            status(429).header("x-ratelimit-reset-requests", "30s"),
            error(429, r#"{"error":{"message":"Rate limit reached. Please try again in 30s. Visit us."}}"#),
            error(429, r#"[{"error":{"code":429,"details":[{"retryDelay":"30s"}]}}]"#),
        ] {
            let simulator = behaving(stated.clone()).await;
            let proxy = Proxy::before([&simulator]).await;
            assert_eq!(proxy.chat("m").await.status, 429);
            let refused = proxy.chat("m").await;
            refused.assert_error(429, "requests", "rate_limit_exceeded");
            let seconds: u64 = refused.header("retry-after").unwrap().parse().unwrap();
            assert!((25..=30).contains(&seconds), "{stated:?}: {seconds}");
            assert_eq!(simulator.requests().len(), 1, "{stated:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daily_quota_that_is_gone_is_not_asked_for_again_at_once() {
    within(async {
        let body = r#"[{"error":{"code":429,"status":"RESOURCE_EXHAUSTED","message":"x","details":[
            {"violations":[{"quotaId":"GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]},{"retryDelay":"2s"}]}}]"#;
        let simulator = behaving(error(429, body)).await;
        let proxy = Proxy::before([&simulator]).await;
        proxy.chat("m").await;
        let refused = proxy.chat("m").await;
        let seconds: u64 = refused.header("retry-after").unwrap().parse().unwrap();
        assert!(seconds > 2 && seconds <= 3600, "{seconds}");
        assert_eq!(simulator.requests().len(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shorter_rest_does_not_shorten_a_longer_one() {
    within(async {
        let (resting, spare) = (simulator().await, simulator().await);
        let after =
            |header_delay_ms, seconds| Behaviour { header_delay_ms, ..status(429).header("retry-after", seconds) };
        resting.script("m", vec![after(300, "600"), after(600, "1")]);
        let proxy = Proxy::before([&resting, &spare]).await;
        // Two at once: the longer rest is told first.
        let body = chat("m");
        let (first, second) =
            tokio::join!(proxy.post("/v1/chat/completions", &body), proxy.post("/v1/chat/completions", &body));
        assert_eq!((first.status, second.status), (200, 200));
        assert_eq!(resting.requests().len(), 2);
        tokio::time::sleep(Duration::from_millis(1200)).await;
        proxy.chat("m").await.assert_from("b", 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_began_before_a_rest_does_not_end_it() {
    within(async {
        let (resting, spare) = (simulator().await, simulator().await);
        let long = Behaviour { chunk_delay_ms: 100, events: 6, ..Behaviour::default() };
        resting.script("m", vec![long, status(429).header("retry-after", "600")]);
        let proxy = Proxy::before([&resting, &spare]).await;
        let mut stream = proxy.open_stream("m").await;
        assert!(stream.chunk().await.unwrap().is_some());
        proxy.chat("m").await.assert_from("b", 2);
        while stream.chunk().await.unwrap().is_some() {}
        proxy.chat("m").await.assert_from("b", 1);
        assert_eq!(proxy.status_of("a").await["available"], false);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_429_that_names_who_is_full_names_everybody() {
    within(async {
        let (full, resting, cooling) =
            (simulator().await, behaving(status(429).header("retry-after", "40")).await, behaving(status(503)).await);
        let api = |id: &str, simulator: &Simulator, more: Value| endpoint_with(id, &simulator.base_url(), more);
        let apis = [
            api("full", &full, json!({ "rpm": 1, "priority": 2 })),
            api("resting", &resting, json!({ "priority": 1 })),
            api("cooling", &cooling, json!({ "rpm": 1 })),
        ];
        let proxy = Proxy::start(json!({ "breaker": { "failures": 1 } }), &apis).await;
        proxy.chat("m").await.assert_from("full", 3);
        let refused = proxy.chat("m").await;
        let message = refused.assert_error(429, "requests", "rate_limit_exceeded");
        for said in [
            "full: 1 request a minute, for 6",
            "resting: it asked for a pause, for 40 s",
            "cooling: it failed and is cooling down, for 600 s",
        ] {
            assert!(message.contains(said), "{said}: {message}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stall_of_one_model_is_that_models() {
    within(async {
        let (bad, spare) = (simulator().await, simulator().await);
        bad.script("slow", vec![Behaviour { stall: Some(StallAt::Header), ..Behaviour::default() }]);
        let timeouts = json!({ "timeouts": { "firstByteMs": 150 }, "models": ["slow", "well"] });
        let apis = [
            endpoint_with("a", &bad.base_url(), timeouts),
            endpoint_with("b", &spare.base_url(), json!({ "priority": 1 })),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        for _ in 0..3 {
            let reply = proxy.post("/v1/chat/completions", &chat_stream("slow")).await;
            reply.assert_from("b", 2);
        }
        let reply = proxy.post("/v1/chat/completions", &chat_stream("slow")).await;
        reply.assert_from("b", 1);
        proxy.chat("well").await.assert_from("a", 1);
    })
    .await;
}
