//! What is passed over to another endpoint, unseen by the client, and what is not.

use api_together::simulator::{Behaviour, Empty, Options, ResetAt, ResetHow, StallAt};
use http::Method;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::harness::{
    Proxy, Reply, behaving, chat, chat_stream, client, closed_port, endpoint_with, in_order, merged, simulator,
    simulator_with, within,
};
use crate::wire::ByHand;

fn normal() -> Behaviour {
    Behaviour::default()
}

fn stall(at: StallAt) -> Behaviour {
    Behaviour { stall: Some(at), ..normal() }
}

fn reset(at: ResetAt, how: ResetHow) -> Behaviour {
    Behaviour { reset: Some(at), reset_how: how, ..normal() }
}

fn empty(kind: Empty) -> Behaviour {
    Behaviour { empty: Some(kind), ..normal() }
}

/// Answers that another endpoint takes over from, streamed or not.
fn bad_answers() -> Vec<(String, Behaviour)> {
    let mut list: Vec<_> = [401, 402, 403, 408, 425, 429, 500, 502, 503, 504, 529]
        .into_iter()
        .map(|status| (format!("status {status}"), Behaviour::status(status)))
        .collect();
    let mut add = |name: &str, behaviour| list.push((name.into(), behaviour));
    add("a large error", Behaviour { body: Some("x".repeat(300_000)), ..Behaviour::status(500) });
    add("an error that stalls", Behaviour { stall: Some(StallAt::AfterEvents(1)), ..Behaviour::status(500) });
    add("an error that is cut", Behaviour { reset: Some(ResetAt::AfterEvents(1)), ..Behaviour::status(500) });
    add("no header", stall(StallAt::Header));
    add("header only", stall(StallAt::AfterHeader));
    add("half of it", stall(StallAt::AfterEvents(1)));
    for how in [ResetHow::Fin, ResetHow::Rst] {
        add(&format!("{how:?} before the header"), reset(ResetAt::BeforeHeader, how));
        add(&format!("{how:?} after the header"), reset(ResetAt::AfterHeader, how));
        add(&format!("{how:?} after half or the role"), reset(ResetAt::AfterEvents(1), how));
    }
    add("empty body", empty(Empty::Body));
    add("empty object", empty(Empty::Object));
    add("no events", empty(Empty::NoEvents));
    add("done only", empty(Empty::DoneOnly));
    list
}

/// Each case with a proxy of its own, several at once.
async fn are_passed_over(cases: Vec<(String, Behaviour)>, body: &Value, http2: bool) {
    const AT_ONCE: usize = 8;
    let mut under_way = JoinSet::new();
    for (name, bad) in cases {
        if under_way.len() == AT_ONCE {
            under_way.join_next().await.unwrap().unwrap();
        }
        let body = body.clone();
        under_way.spawn(async move { is_passed_over(&name, bad, &body, http2).await });
    }
    under_way.join_all().await;
}

async fn is_passed_over(name: &str, bad: Behaviour, body: &Value, http2: bool) {
    // Only one that falls silent is waited for so briefly: on a busy machine any other may need longer.
    let silent = bad.stall.is_some() || bad.ping_ms.is_some();
    let short = json!({ "timeouts": { "firstByteMs": 250, "idleMs": 250, "thinkingMs": 250 }, "http2": http2 });
    let short = if silent { short } else { json!({ "http2": http2 }) };
    let (bad, good) = (behaving(bad).await, simulator().await);
    let usual = json!({ "http2": http2, "priority": 1 });
    let apis = [endpoint_with("a", &bad.base_url(), short), endpoint_with("b", &good.base_url(), usual)];
    let proxy = Proxy::start(json!({}), &apis).await;
    let reply = proxy.post("/v1/chat/completions", body).await;
    let what = format!("{name}, stream {}, http2 {http2}", body["stream"]);
    assert_eq!((reply.status, reply.endpoint(), reply.attempts()), (200, Some("b"), Some("2")), "{what}: {reply:?}");
    assert_eq!(good.requests().len(), 1, "{what}");
    assert!(silent || bad.requests().len() == 1, "{what}");
    if body["stream"] == true {
        assert!(reply.text().starts_with("data: {") && reply.text().ends_with("data: [DONE]\n\n"), "{what}");
        assert!(!reply.text().contains("\"error\""), "{what}");
    } else {
        let text = reply.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
        assert_eq!(text, "Hello from the simulator, word", "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_passed_over() {
    within(async {
        let mut cases = bad_answers();
        let mut add = |name: &str, behaviour| cases.push((name.into(), behaviour));
        add("zero usage", empty(Empty::ZeroUsage));
        add("zero usage in chunks", Behaviour { chunked: true, ..empty(Empty::ZeroUsage) });
        add("an empty body in chunks", Behaviour { chunked: true, ..empty(Empty::Body) });
        add("an empty object with blanks", Behaviour { body: Some(" { } \n".into()), ..normal() });
        are_passed_over(cases, &chat("m"), false).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_of_an_http2_endpoint_are_passed_over() {
    within(async {
        are_passed_over(bad_answers(), &chat("m"), true).await;
    })
    .await;
}

/// Streams that stop before they say anything.
fn bad_streams() -> Vec<(String, Behaviour)> {
    let mut list = bad_answers();
    let mut add = |name: &str, behaviour| list.push((name.into(), behaviour));
    add("within the role event", reset(ResetAt::MidEvent(0), ResetHow::Fin));
    add("within the first text", reset(ResetAt::MidEvent(1), ResetHow::Rst));
    add("an error as first event", Behaviour { first_event_error: true, ..normal() });
    add("pings for ever", Behaviour { ping_ms: Some(20), ..normal() });
    let late =
        "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\ndata: {\"error\":{\"message\":\"late\"}}\n\n";
    let late = Behaviour { body: Some(late.into()), content_type: Some("text/event-stream".into()), ..normal() };
    add("an error after the role", late);
    list
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_say_nothing_are_passed_over() {
    within(async {
        are_passed_over(bad_streams(), &chat_stream("m"), false).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_an_http2_endpoint_that_say_nothing_are_passed_over() {
    within(async {
        are_passed_over(bad_streams(), &chat_stream("m"), true).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_that_cannot_be_reached_are_passed_over() {
    within(async {
        let good = simulator().await;
        let refused = closed_port();
        for bad in [refused.as_str(), "http://nowhere.invalid", "https://nowhere.invalid/v1"] {
            let proxy = Proxy::start(json!({}), &in_order([bad, &good.base_url()])).await;
            proxy.chat("m").await.assert_from("b", 2);
            assert_eq!(proxy.status_of("a").await["errorCount"], 1, "{bad}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_chain_of_failures_is_passed_over() {
    within(async {
        let bad = [Behaviour::status(429), reset(ResetAt::BeforeHeader, ResetHow::Rst), Behaviour::status(503)];
        let mut simulators = Vec::new();
        for behaviour in bad {
            simulators.push(behaving(behaviour).await);
        }
        let good = simulator().await;
        let mut urls: Vec<_> = simulators.iter().map(|simulator| simulator.base_url()).collect();
        urls.extend([closed_port(), good.base_url()]);
        let proxy = Proxy::start(json!({}), &in_order(urls.iter().map(String::as_str))).await;
        proxy.chat("m").await.assert_from("e", 5);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_the_request_are_not_passed_on_to_others() {
    within(async {
        for status in [400, 405, 409, 413, 415, 418, 422] {
            let (bad, other) = (behaving(Behaviour::status(status)).await, simulator().await);
            let proxy = Proxy::before([&bad, &other]).await;
            let reply = proxy.chat("m").await;
            assert_eq!((reply.status, reply.endpoint(), reply.attempts()), (status, Some("a"), Some("1")));
            let message = format!("The simulator was told to answer {status}.");
            assert_eq!(reply.json()["error"]["message"], message);
            assert!(other.requests().is_empty(), "{status}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn which_statuses_are_tried_again_is_a_setting() {
    within(async {
        for (statuses, status, attempts) in [
            (json!([418]), 418, "2"),
            (json!([418]), 503, "1"),
            (json!(["4xx"]), 400, "2"),
            (json!(["4xx"]), 500, "1"),
            (json!(["5xx", 400]), 599, "2"),
            (json!([]), 503, "1"),
        ] {
            let (bad, other) = (behaving(Behaviour::status(status)).await, simulator().await);
            let server = json!({ "retry": { "statuses": statuses } });
            let proxy = Proxy::start(server, &in_order([bad.base_url().as_str(), &other.base_url()])).await;
            let reply = proxy.chat("m").await;
            assert_eq!(reply.attempts(), Some(attempts), "{statuses} {status}");
            assert_eq!(reply.status, if attempts == "2" { 200 } else { status });
        }
        // Network errors are tried again whatever the list says.
        let good = simulator().await;
        let server = json!({ "retry": { "statuses": [] } });
        let proxy = Proxy::start(server, &in_order([closed_port().as_str(), &good.base_url()])).await;
        proxy.chat("m").await.assert_from("b", 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_and_time_are_bounded() {
    within(async {
        let bad = behaving(Behaviour::status(503)).await;
        let good = simulator().await;
        let url = bad.base_url();
        let server = json!({ "retry": { "attempts": 2 } });
        let proxy = Proxy::start(server, &in_order([url.as_str(), &url, &good.base_url()])).await;
        let reply = proxy.chat("m").await;
        assert_eq!((reply.status, reply.endpoint(), reply.attempts()), (503, Some("b"), Some("2")));

        let slow = behaving(Behaviour { header_delay_ms: 50, ..Behaviour::status(503) }).await;
        let server = json!({ "retry": { "budgetMs": 20 } });
        let proxy = Proxy::start(server, &in_order([slow.base_url().as_str(), &good.base_url()])).await;
        let reply = proxy.chat("m").await;
        assert_eq!((reply.status, reply.endpoint()), (503, Some("a")), "{reply:?}");
        assert!(good.requests().is_empty());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn by_default_ten_endpoints_are_tried() {
    within(async {
        let bad = behaving(Behaviour::status(503)).await;
        let apis: Vec<_> = (0..12).map(|n| endpoint_with(&format!("e{n}"), &bad.base_url(), json!({}))).collect();
        let proxy = Proxy::start(json!({}), &apis).await;
        let reply = proxy.chat("m").await;
        assert_eq!((reply.status, reply.attempts()), (503, Some("10")));
        assert_eq!(bad.requests().len(), 10);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooled_connection_that_was_closed_is_no_attempt() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = Proxy::start(json!({}), &in_order([by_hand.base_url().as_str(), &closed_port()])).await;
        let answer =
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 26\r\n\r\n{\"choices\":[{\"text\":\"";
        let endpoint = async {
            let (mut first, ..) = by_hand.call().await;
            first.send(format!("{answer}1\"}}]}}")).await;
            // The second request comes on the same connection, which closes instead of an answer.
            first.message().await;
            drop(first);
            let (mut second, head, body) = by_hand.call().await;
            second.send(format!("{answer}2\"}}]}}")).await;
            (head, body, second)
        };
        let client = async {
            proxy.chat("m").await.assert_from("a", 1);
            let again = proxy.chat("m").await;
            again.assert_from("a", 1);
            assert_eq!(again.text(), "{\"choices\":[{\"text\":\"2\"}]}");
        };
        let ((_, body, _second), ()) = tokio::join!(endpoint, client);
        let sent: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(sent["model"], "m", "the body went along once more");
        assert_eq!(proxy.status_of("a").await["errorCount"], 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_closes_idle_connections_loses_no_request() {
    within(async {
        let idle_close = Some(std::time::Duration::from_millis(20));
        let simulator = simulator_with(Options { idle_close, ..Options::default() }).await;
        for http2 in [false, true] {
            let api = endpoint_with("a", &simulator.base_url(), json!({ "http2": http2 }));
            let proxy = Proxy::start(json!({}), &[api]).await;
            for round in 0..24_u64 {
                proxy.chat("m").await.assert_from("a", 1);
                // Just before, at and after the moment at which the endpoint closes.
                tokio::time::sleep(std::time::Duration::from_millis(17 + round % 8)).await;
            }
            assert_eq!(proxy.status_of("a").await["errorCount"], 0);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_may_answer_before_it_has_read_the_body() {
    within(async {
        let good = simulator().await;
        let body = merged(chat("m"), json!({ "x": "x".repeat(5_000_000) }));
        for (status, endpoint, attempts) in [(503, "b", "2"), (413, "a", "1")] {
            let early = behaving(Behaviour { early: true, ..Behaviour::status(status) }).await;
            let proxy = Proxy::before([&early, &good]).await;
            let h1 = client(reqwest::ClientBuilder::http1_only);
            for client in [h1, crate::harness::h2c()] {
                let call = client.request(Method::POST, proxy.url("/v1/chat/completions"));
                let reply = Reply::of(call.bearer_auth(crate::harness::KEY).json(&body)).await;
                assert_eq!((reply.endpoint(), reply.attempts()), (Some(endpoint), Some(attempts)), "{reply:?}");
                assert_eq!(reply.status, if attempts == "2" { 200 } else { status });
            }
        }
    })
    .await;
}

/// An HTTP/2 endpoint that refuses every request at its header. Once the answer has gone out, h2 resets the stream whose
/// body nobody reads, with `NO_ERROR` (RFC 9113, 8.1).
async fn refuse_unread(listener: TcpListener, body: &'static str) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                drop(request);
                let header = http::Response::builder().status(413).header("content-type", "application/json");
                let mut sender = respond.send_response(header.body(()).unwrap(), false).unwrap();
                sender.send_data(body.into(), true).unwrap();
            }
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_endpoint_may_answer_before_it_has_read_the_body() {
    const REFUSAL: &str = r#"{"error":{"message":"too much","type":"invalid_request_error","code":null}}"#;
    within(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let refusing = tokio::spawn(refuse_unread(listener, REFUSAL));
        let good = simulator().await;
        let apis = [
            endpoint_with("a", &url, json!({ "http2": true })),
            endpoint_with("b", &good.base_url(), json!({ "priority": 1 })),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        let body = merged(chat("m"), json!({ "x": "x".repeat(1_000_000) }));
        for client in [client(reqwest::ClientBuilder::http1_only), crate::harness::h2c()] {
            for _ in 0..4 {
                let call = client.request(Method::POST, proxy.url("/v1/chat/completions"));
                let reply = Reply::of(call.bearer_auth(crate::harness::KEY).json(&body)).await;
                assert_eq!(
                    (reply.status, reply.endpoint(), reply.attempts()),
                    (413, Some("a"), Some("1")),
                    "{reply:?}"
                );
                assert_eq!(reply.text(), REFUSAL);
            }
        }
        assert_eq!(proxy.status_of("a").await["errorCount"], 0);
        assert!(good.requests().is_empty());
        refusing.abort();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_answer_that_comes_too_late_for_another_attempt_is_passed_on() {
    within(async {
        let late = behaving(Behaviour { header_delay_ms: 600, ..empty(Empty::ZeroUsage) }).await;
        let good = simulator().await;
        let server = json!({ "retry": { "budgetMs": 300 } });
        let proxy = Proxy::start(server, &in_order([late.base_url().as_str(), &good.base_url()])).await;
        let reply = proxy.chat("m").await;
        reply.assert_from("a", 1);
        assert_eq!(reply.json()["usage"]["completion_tokens"], 0, "{reply:?}");
        assert!(good.requests().is_empty());
    })
    .await;
}
