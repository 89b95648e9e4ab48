//! Cool-downs, trials, rests.

use std::time::{Duration, SystemTime};

use api_together::simulator::{Behaviour, Empty, ResetAt, StallAt};
use serde_json::{Value, json};

use crate::harness::{Proxy, behaving, chat, chat_stream, endpoint, endpoint_with, in_order, simulator, until, within};

fn status(status: u16) -> Behaviour {
    Behaviour::status(status)
}

#[tokio::test(flavor = "multi_thread")]
async fn three_failures_in_a_row_and_an_endpoint_cools_down() {
    within(async {
        let (bad, good) = (behaving(status(500)).await, simulator().await);
        let proxy = Proxy::before([&bad, &good]).await;
        for failures in 1..=3 {
            assert_eq!(proxy.status_of("a").await["temporarilyDisabled"], false);
            proxy.chat("m").await.assert_from("b", 2);
            assert_eq!(proxy.status_of("a").await["errorCount"], failures);
        }
        let status = proxy.status_of("a").await;
        assert_eq!((&status["temporarilyDisabled"], &status["available"]), (&json!(true), &json!(false)));
        assert!(
            status["coolDownEnds"].is_string()
                && status["lastError"]["what"] == "answered 500 (model_failure by status)",
            "{status}"
        );
        proxy.chat("m").await.assert_from("b", 1);
        assert_eq!(bad.requests().len(), 3);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_counts_as_a_failure() {
    within(async {
        let stall = Behaviour { stall: Some(StallAt::Header), ..Behaviour::default() };
        let broken = Behaviour { reset: Some(ResetAt::AfterHeader), ..Behaviour::default() };
        let empty = Behaviour { empty: Some(Empty::Object), ..Behaviour::default() };
        for (behaviour, counts) in [
            (status(401), true),
            (status(402), true),
            (status(403), true),
            (status(408), true),
            (status(425), true),
            (status(500), true),
            (status(529), true),
            (stall, true),
            (broken, true),
            (empty, true),
            (status(400), false),
            (status(404), false),
            (status(405), false),
            (status(409), false),
            (status(413), false),
            (status(415), false),
            (status(422), false),
            (status(429).header("retry-after", "0"), false),
        ] {
            let what = format!("{behaviour:?}");
            let (bad, good) = (behaving(behaviour.clone()).await, simulator().await);
            let first_byte_ms = if behaviour.stall.is_some() { 100 } else { 60_000 };
            let timeouts = json!({ "timeouts": { "firstByteMs": first_byte_ms } });
            let apis = [
                endpoint_with("a", &bad.base_url(), timeouts),
                endpoint_with("b", &good.base_url(), json!({ "priority": 1 })),
            ];
            let proxy = Proxy::start(json!({ "breaker": { "failures": 1 } }), &apis).await;
            proxy.chat("m").await;
            let status = proxy.status_of("a").await;
            assert_eq!(status["errorCount"], u32::from(counts), "{what}");
            assert_eq!(status["temporarilyDisabled"], counts, "{what}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_success_resets_the_count() {
    within(async {
        let (flaky, good) = (simulator().await, simulator().await);
        let answers = [500, 500, 200, 500, 500, 400, 200, 500];
        flaky.script("m", answers.map(status).to_vec());
        // A 200 from a scripted status is an ordinary answer.
        let proxy = Proxy::before([&flaky, &good]).await;
        for (answer, errors) in answers.into_iter().zip([1, 2, 0, 1, 2, 2, 0, 1]) {
            proxy.chat("m").await;
            let status = proxy.status_of("a").await;
            assert_eq!(
                (&status["errorCount"], &status["temporarilyDisabled"]),
                (&json!(errors), &json!(false)),
                "{answer}"
            );
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_after_its_beginning_counts_too() {
    within(async {
        let broken = Behaviour { reset: Some(ResetAt::AfterEvents(3)), ..Behaviour::default() };
        let simulator = behaving(broken).await;
        let proxy = Proxy::before([&simulator]).await;
        let mut stream = proxy.open_stream("m").await;
        while let Ok(Some(_)) = stream.chunk().await {}
        proxy.until_status("a", "errorCount", json!(1)).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_cool_down_one_request_tries_it_out() {
    within(async {
        let (first, second) = (behaving(status(500)).await, simulator().await);
        let server = json!({ "breaker": { "failures": 1, "coolDownSeconds": 1 } });
        let proxy = Proxy::start(server, &in_order([first.base_url().as_str(), &second.base_url()])).await;
        proxy.chat("m").await.assert_from("b", 2);
        proxy.chat("m").await.assert_from("b", 1);
        // The cool-down ends; the trial fails, and it cools down again.
        proxy.until_status("a", "available", json!(true)).await;
        proxy.chat("m").await.assert_from("b", 2);
        assert_eq!(proxy.status_of("a").await["temporarilyDisabled"], true);
        proxy.chat("m").await.assert_from("b", 1);
        // It ends again; while the trial is under way, nobody else is sent there.
        first.set_default(Behaviour { header_delay_ms: 400, ..Behaviour::default() });
        proxy.until_status("a", "available", json!(true)).await;
        let sent = first.requests().len();
        let (body, others) = (chat("m"), async {
            until("the trial is there", || first.requests().len() > sent).await;
            proxy.chat("m").await.assert_from("b", 1);
            assert_eq!(proxy.status_of("a").await["temporarilyDisabled"], true);
        });
        let (trial, ()) = tokio::join!(proxy.post("/v1/chat/completions", &body), others);
        trial.assert_from("a", 1);
        let status = proxy.status_of("a").await;
        assert_eq!((&status["errorCount"], &status["available"]), (&json!(0), &json!(true)));
        proxy.chat("m").await.assert_from("a", 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_all_cool_down_they_are_asked_all_the_same() {
    within(async {
        let simulator = behaving(status(500)).await;
        let server = json!({ "breaker": { "failures": 1 } });
        let proxy = Proxy::start(server, &[endpoint("a", &simulator.base_url())]).await;
        assert_eq!(proxy.chat("m").await.status, 500);
        simulator.set_default(Behaviour { header_delay_ms: 400, ..Behaviour::default() });
        let (body, others) = (chat("m"), async {
            until("the trial is there", || simulator.requests().len() == 2).await;
            // One tries it out, and the others are not refused meanwhile.
            proxy.chat("m").await.assert_from("a", 1);
        });
        let (trial, ()) = tokio::join!(proxy.post("/v1/chat/completions", &body), others);
        trial.assert_from("a", 1);
        proxy.chat("m").await.assert_from("a", 1);
        assert_eq!(simulator.requests().len(), 4);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trial_that_the_client_leaves_makes_room_for_the_next() {
    within(async {
        let simulator = behaving(status(500)).await;
        let server = json!({ "breaker": { "failures": 1 } });
        let proxy = Proxy::start(server, &[endpoint("a", &simulator.base_url())]).await;
        assert_eq!(proxy.chat("m").await.status, 500);
        simulator.set_default(Behaviour { stall: Some(StallAt::Header), ..Behaviour::default() });
        let mut wire = proxy.wire().await;
        wire.send(crate::wire::post_chat(&chat("m"))).await;
        until("the trial is there", || simulator.open_requests() == 1).await;
        drop(wire);
        until("the trial is cancelled", || simulator.open_requests() == 0).await;
        proxy.until_status("a", "inFlight", json!(0)).await;
        simulator.set_default(Behaviour::default());
        proxy.chat("m").await.assert_from("a", 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_429_rests_the_endpoint_for_as_long_as_it_asks() {
    within(async {
        let in_a_minute = httpdate::fmt_http_date(SystemTime::now() + Duration::from_mins(1));
        for (headers, least, most) in [
            (vec![("retry-after-ms", "1500")], 1_000, 1_500),
            (vec![("retry-after-ms", "1500"), ("retry-after", "60")], 1_000, 1_500),
            (vec![("retry-after", "30")], 25_000, 30_000),
            (vec![("retry-after", in_a_minute.as_str())], 50_000, 60_000),
        ] {
            let behaviour = headers.iter().fold(status(429), |reply, (name, value)| reply.header(name, value));
            let simulator = behaving(behaviour).await;
            let proxy = Proxy::before([&simulator]).await;
            let first = proxy.chat("m").await;
            assert_eq!((first.status, first.endpoint()), (429, Some("a")), "its own word first");
            let then = proxy.chat("m").await;
            let message = then.assert_error(429, "requests", "rate_limit_exceeded");
            assert!(message.contains("rate limit"), "{message}");
            let millis: u64 = then.header("retry-after-ms").unwrap().parse().unwrap();
            let seconds: u64 = then.header("retry-after").unwrap().parse().unwrap();
            assert!((least..=most).contains(&millis), "{headers:?}: {millis}");
            assert_eq!(seconds, millis.div_ceil(1000));
            assert_eq!(simulator.requests().len(), 1, "it is left alone");
            let status = proxy.status_of("a").await;
            assert_eq!((&status["errorCount"], &status["temporarilyDisabled"]), (&json!(0), &json!(false)));
            assert_eq!(status["available"], false);
            assert!(status["restEnds"].is_string());
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rest_ends() {
    within(async {
        let (resting, other) = (simulator().await, simulator().await);
        resting.script("m", vec![status(429).header("retry-after-ms", "300"), Behaviour::default()]);
        let proxy = Proxy::before([&resting, &other]).await;
        proxy.chat("m").await.assert_from("b", 2);
        proxy.chat("m").await.assert_from("b", 1);
        proxy.until_status("a", "available", json!(true)).await;
        proxy.chat("m").await.assert_from("a", 1);
        assert_eq!(proxy.status_of("a").await["restEnds"], Value::Null);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_all_rest_the_earliest_end_is_told() {
    within(async {
        let long = behaving(status(429).header("retry-after", "50")).await;
        let short = behaving(status(429).header("retry-after", "20")).await;
        let proxy = Proxy::before([&long, &short]).await;
        assert_eq!(proxy.chat("m").await.attempts(), Some("2"));
        let reply = proxy.post("/v1/chat/completions", &chat_stream("m")).await;
        reply.assert_error(429, "requests", "rate_limit_exceeded");
        let seconds: u64 = reply.header("retry-after").unwrap().parse().unwrap();
        assert!((15..=20).contains(&seconds), "{seconds}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn embeddings_have_no_completion_tokens_and_are_not_empty() {
    within(async {
        let usage = r#"{"object":"list","data":[{"embedding":[0.5],"index":0}],"usage":{"prompt_tokens":3,"completion_tokens":0,"total_tokens":3}}"#;
        let first = behaving(Behaviour { body: Some(usage.into()), ..Behaviour::default() }).await;
        let other = simulator().await;
        let proxy = Proxy::before([&first, &other]).await;
        let reply = proxy.post("/v1/embeddings", &json!({ "model": "m", "input": "text" })).await;
        reply.assert_from("a", 1);
        assert_eq!(reply.text(), usage);
        // The same on a completion is no answer.
        proxy.chat("m").await.assert_from("b", 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_whose_streams_all_break_cools_down() {
    within(async {
        let broken = Behaviour { reset: Some(ResetAt::AfterEvents(3)), ..Behaviour::default() };
        let simulator = behaving(broken.clone()).await;
        let twice_then_whole = vec![broken.clone(), broken.clone(), Behaviour::default(), broken];
        simulator.script("m", twice_then_whole);
        let proxy = Proxy::before([&simulator]).await;
        // The third one is whole, and the count begins anew.
        for (errors, disabled) in [(1, false), (2, false), (0, false), (1, false), (2, false), (3, true)] {
            let mut stream = proxy.open_stream("m").await;
            assert_eq!(stream.status(), 200, "it begins as it should");
            while let Ok(Some(_)) = stream.chunk().await {}
            proxy.until_status("a", "errorCount", json!(errors)).await;
            assert_eq!(proxy.status_of("a").await["temporarilyDisabled"], disabled, "after {errors}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trial_whose_stream_has_begun_lets_others_through() {
    within(async {
        let simulator = behaving(status(500)).await;
        let server = json!({ "breaker": { "failures": 1 } });
        let proxy = Proxy::start(server, &[endpoint("a", &simulator.base_url())]).await;
        assert_eq!(proxy.chat("m").await.status, 500);
        assert_eq!(proxy.status_of("a").await["temporarilyDisabled"], true);
        simulator.set_default(Behaviour::default());
        simulator.script("trial", vec![Behaviour { stall: Some(StallAt::AfterEvents(3)), ..Behaviour::default() }]);
        let mut trial = proxy.open_stream("trial").await;
        assert!(trial.chunk().await.unwrap().is_some());
        let status = proxy.status_of("a").await;
        assert_eq!(
            (&status["available"], &status["temporarilyDisabled"], &status["errorCount"]),
            (&json!(true), &json!(false), &json!(1)),
            "it is open again, and the error stands until an answer is whole: {status}"
        );
        proxy.chat("m").await.assert_from("a", 1);
        assert_eq!(simulator.open_requests(), 1, "the trial is still under way");
        assert_eq!(proxy.status_of("a").await["errorCount"], 0);
    })
    .await;
}
