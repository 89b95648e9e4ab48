//! How often an endpoint is asked.

use api_together::simulator::Behaviour;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::harness::{KEY, Proxy, Reply, behaving, chat, client, closed_port, endpoint_with, simulator, tally, within};
use crate::wire::ByHand;

/// Waits beyond this are no client's to sit out.
const WAIT_MAX_MS: u64 = 60_000;

/// Checks that this says that every limit is reached, and returns for how many milliseconds.
fn assert_full(reply: &Reply) -> u64 {
    let message = reply.assert_error(429, "requests", "rate_limit_exceeded");
    assert!(message.contains("rate limit"), "{message}");
    let number = |name: &str| reply.header(name).unwrap_or_else(|| panic!("no {name}: {reply:?}")).parse().unwrap();
    let (millis, seconds): (u64, u64) = (number("retry-after-ms"), number("retry-after"));
    assert_eq!(seconds, millis.div_ceil(1000));
    let is_long = millis > WAIT_MAX_MS;
    assert_eq!(reply.header("x-should-retry"), is_long.then_some("false"), "{millis} ms");
    millis
}

async fn usage(proxy: &Proxy, id: &str) -> Value {
    proxy.status_of(id).await["usage"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_endpoint_may_not_take_goes_to_the_next() {
    within(async {
        let (a, b) = (simulator().await, simulator().await);
        let apis = [
            endpoint_with("a", &a.base_url(), json!({ "rpm": 2 })),
            endpoint_with("b", &b.base_url(), json!({ "rpm": 3, "priority": 1 })),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        for id in ["a", "a", "b", "b", "b"] {
            proxy.chat("m").await.assert_from(id, 1);
        }
        let status = proxy.status_of("a").await;
        assert_eq!((&status["available"], &status["usage"]["rpm"]), (&json!(false), &json!(2)));
        assert_eq!(status["usage"]["rpd"], 2);
        assert!(status["limitFrees"].is_string(), "{status}");
        let wait = assert_full(&proxy.chat("m").await);
        assert!((54_000..=61_000).contains(&wait), "{wait}");
        assert_eq!((a.requests().len(), b.requests().len()), (2, 3));
        assert_eq!(usage(&proxy, "a").await["rpm"], 2, "what is refused is not counted");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_that_is_used_up_is_not_to_be_waited_for() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::start(json!({}), &[endpoint_with("a", &simulator.base_url(), json!({ "rpd": 1 }))]).await;
        proxy.chat("m").await.assert_from("a", 1);
        // Until midnight, which is more than a minute away but for the day's last one.
        let wait = assert_full(&proxy.chat("m").await);
        assert!(wait <= 25 * 60 * WAIT_MAX_MS, "{wait}");
        assert_eq!(simulator.requests().len(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_was_never_sent_does_not_count() {
    within(async {
        let good = simulator().await;
        let apis = [
            endpoint_with("a", &closed_port(), json!({ "rpm": 1, "rpd": 1 })),
            endpoint_with("b", &good.base_url(), json!({ "priority": 1 })),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        for _ in 0..2 {
            proxy.chat("m").await.assert_from("b", 2);
            let usage = usage(&proxy, "a").await;
            assert_eq!((&usage["rpm"], &usage["rpd"]), (&json!(0), &json!(0)));
        }
        assert_eq!(proxy.status_of("a").await["attempts"], 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_reaches_the_endpoint_as_often_as_its_limit_says() {
    within(async {
        let simulator = behaving(Behaviour { header_delay_ms: 50, ..Behaviour::default() }).await;
        let api = endpoint_with("a", &simulator.base_url(), json!({ "rpm": 10 }));
        let proxy = Proxy::start(json!({ "threads": 4 }), &[api]).await;
        let client = client(reqwest::ClientBuilder::http1_only);
        let mut calls = JoinSet::new();
        for _ in 0..50 {
            let call = client.post(proxy.url("/v1/chat/completions")).bearer_auth(KEY).json(&chat("m"));
            calls.spawn(Reply::of(call));
        }
        let replies = calls.join_all().await;
        let counts = tally(&replies);
        assert_eq!((counts.get("a"), counts.get("-")), (Some(&10), Some(&40)), "{counts:?}");
        for refused in replies.iter().filter(|reply| reply.endpoint().is_none()) {
            assert_full(refused);
        }
        assert_eq!(simulator.requests().len(), 10);
        assert_eq!(usage(&proxy, "a").await["rpm"], 10);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_sent_once_more_counts_once_more() {
    within(async {
        let by_hand = ByHand::bind().await;
        let api = endpoint_with("a", &by_hand.base_url(), json!({ "rpm": 3 }));
        let proxy = Proxy::start(json!({}), &[api]).await;
        let answer = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 7\r\n\r\n{\"n\":1}";
        let endpoint = async {
            let (mut first, ..) = by_hand.call().await;
            first.send(answer).await;
            // The second request comes on the same connection, which closes instead of an answer.
            first.message().await;
            drop(first);
            let (mut second, ..) = by_hand.call().await;
            second.send(answer).await;
            second
        };
        let client = async {
            proxy.chat("m").await.assert_from("a", 1);
            assert_eq!(usage(&proxy, "a").await["rpm"], 1);
            proxy.chat("m").await.assert_from("a", 1);
        };
        tokio::join!(endpoint, client);
        let status = proxy.status_of("a").await;
        assert_eq!((&status["usage"]["rpm"], &status["errorCount"]), (&json!(3), &json!(0)), "{status}");
        assert_full(&proxy.chat("m").await);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_may_not_be_sent_once_more_is_not_the_endpoints_fault() {
    within(async {
        let by_hand = ByHand::bind().await;
        let api = endpoint_with("a", &by_hand.base_url(), json!({ "rpm": 2 }));
        let proxy = Proxy::start(json!({}), &[api]).await;
        let endpoint = async {
            let (mut first, ..) = by_hand.call().await;
            first.send("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 7\r\n\r\n{\"n\":1}").await;
            first.message().await;
        };
        let client = async {
            proxy.chat("m").await.assert_from("a", 1);
            // The connection closes under the second request, whose permit was the last one.
            let wait = assert_full(&proxy.chat("m").await);
            assert!((59_000..=60_500).contains(&wait), "{wait}");
        };
        tokio::join!(endpoint, client);
        assert_eq!(proxy.status_of("a").await["errorCount"], 0);
    })
    .await;
}
