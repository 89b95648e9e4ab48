//! How often an endpoint is asked.

use std::sync::Arc;
use std::time::Instant;

use api_together::simulator::Behaviour;
use http::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::harness::{
    KEY, Proxy, Reply, behaving, chat, client, closed_port, endpoint_with, h2c, simulator, tally, until, within,
};
use crate::wire::ByHand;

/// Waits beyond this are no client's to sit out.
const WAIT_MAX_MS: u64 = 65_000;

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
        let answer = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 26\r\n\r\n{\"choices\":[{\"text\":\"1\"}]}";
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
            first.send("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 26\r\n\r\n{\"choices\":[{\"text\":\"1\"}]}").await;
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

/// So many chats at once, each of another caller, over HTTP/2 so that each does not need a connection of its own.
async fn crowd(proxy: &Proxy, count: usize) -> Vec<Reply> {
    const ON_ONE_CONNECTION: usize = 100;
    let mut calls = JoinSet::new();
    for connection in 0..count.div_ceil(ON_ONE_CONNECTION) {
        let client = h2c();
        for caller in 0..ON_ONE_CONNECTION {
            let call = client.post(proxy.url("/v1/chat/completions")).bearer_auth(KEY).json(&chat("m"));
            let call = call.header("x-forwarded-for", format!("10.0.{connection}.{caller}"));
            calls.spawn(Reply::of(call));
        }
    }
    calls.join_all().await
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_thousand_at_once_as_many_are_served_as_the_limits_say() {
    within(async {
        let (a, b) = (simulator().await, simulator().await);
        let apis = [("a", &a), ("b", &b)].map(|(id, s)| endpoint_with(id, &s.base_url(), json!({ "rpm": 100 })));
        let proxy = Proxy::start(json!({ "threads": 2, "trustedProxies": ["127.0.0.1"] }), &apis).await;
        let replies = crowd(&proxy, 1000).await;
        let counts = tally(&replies);
        assert_eq!(
            (counts.get("a"), counts.get("b"), counts.get("-")),
            (Some(&100), Some(&100), Some(&800)),
            "{counts:?}"
        );
        assert_eq!((a.requests().len(), b.requests().len()), (100, 100));
        // 200 permits free in a minute: so many are told to come then, as many a minute later, and so on.
        let mut waits: Vec<_> = replies.iter().filter(|reply| reply.status == 429).map(assert_full).collect();
        waits.sort_unstable();
        let rounds: Vec<_> = waits.chunks(200).collect();
        assert_eq!(rounds.len(), 4);
        for (round, waits) in (1..).zip(rounds) {
            // All took their permits within a few seconds, and each frees 60 to 60.5 s after it was taken.
            let (first, last) = (waits[0], waits[199]);
            assert!((first..=last).contains(&first) && last <= round * 60_500, "{round}: {first} to {last}");
            assert!(first > round * 60_500 - 20_000, "{round}: {first} to {last}");
        }
        let refused = replies.iter().find(|reply| reply.status == 429).unwrap();
        let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
        for part in ["a: 100 requests a minute", "b: 100 requests a minute"] {
            assert!(message.contains(part), "{message}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_thousand_at_once_all_are_served_if_anybody_may() {
    within(async {
        let simulators = [simulator().await, simulator().await, simulator().await];
        let limits = [json!({ "rpm": 100 }), json!({ "rpm": 100 }), json!({})];
        let apis: Vec<_> = ["a", "b", "c"]
            .iter()
            .zip(&simulators)
            .zip(limits)
            .map(|((id, simulator), limits)| endpoint_with(id, &simulator.base_url(), limits))
            .collect();
        let proxy = Proxy::start(json!({ "threads": 2, "trustedProxies": ["127.0.0.1"] }), &apis).await;
        let replies = crowd(&proxy, 1000).await;
        assert!(replies.iter().all(|reply| reply.status == 200), "{:?}", tally(&replies));
        let counts = tally(&replies);
        assert!(counts["a"] <= 100 && counts["b"] <= 100, "{counts:?}");
        assert!(replies.iter().all(|reply| reply.header("x-ratelimit-limit-requests").is_none()), "there is no limit");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_say_what_is_left_for_the_model() {
    within(async {
        let behaviour =
            Behaviour::default().header("x-ratelimit-limit-requests", "9999").header("x-ratelimit-foo", "1");
        let simulator = behaving(behaviour).await;
        let apis = [
            endpoint_with("a", &simulator.base_url(), json!({ "rpm": 5, "rpd": 3, "tpm": 1000, "models": ["m"] })),
            endpoint_with("b", &simulator.base_url(), json!({ "rpm": 2, "models": ["m"], "priority": 1 })),
            endpoint_with("c", &simulator.base_url(), json!({ "models": ["free"] })),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        let rates = |reply: &Reply| {
            ["limit", "remaining"].map(|what| reply.header(&format!("x-ratelimit-{what}-requests")).map(str::to_owned))
        };
        let expect = |limit: &str, remaining: &str| [Some(limit.to_owned()), Some(remaining.to_owned())];
        // Three a day are the tighter limit of the one, two a minute of the other.
        assert_eq!(rates(&proxy.chat("m").await), expect("5", "4"));
        let reply = proxy.chat("m").await;
        assert_eq!(rates(&reply), expect("5", "3"));
        assert_eq!(reply.header("x-ratelimit-foo"), None);
        assert_eq!(reply.header("x-ratelimit-limit-tokens"), None, "the other endpoint has no such limit");
        for left in ["2", "1", "0"] {
            assert_eq!(rates(&proxy.chat("m").await), expect("5", left));
        }
        let refused = proxy.chat("m").await;
        assert_eq!(refused.status, 429);
        assert_eq!(rates(&refused), expect("5", "0"));
        let reset = refused.header("x-ratelimit-reset-requests").unwrap();
        assert!(reset.ends_with('s') && reset.contains(['h', 'm']), "the day's: {reset}");
        assert_eq!(rates(&proxy.chat("free").await), [None, None]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_over_its_tokens_takes_no_more() {
    within(async {
        let (a, b) = (simulator().await, simulator().await);
        let apis = [
            endpoint_with("a", &a.base_url(), json!({ "tpm": 10 })),
            endpoint_with("b", &b.base_url(), json!({ "tpd": 10, "priority": 1 })),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        // Each answer costs 8.
        for id in ["a", "a", "b", "b"] {
            let reply = proxy.chat("m").await;
            reply.assert_from(id, 1);
            assert_eq!(reply.json()["usage"]["total_tokens"], 8);
        }
        let refused = proxy.chat("m").await;
        let wait = assert_full(&refused);
        assert!((50_000..=60_500).contains(&wait), "the minute of the first ends before the day of the second: {wait}");
        let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
        for part in ["a: 10 tokens a minute", "b: 10 tokens a day"] {
            assert!(message.contains(part), "{message}");
        }
        let quota = proxy.status_of("a").await["quota"].clone();
        assert_eq!((&quota["tpm"]["used"], &quota["tpm"]["left"]), (&json!(16), &json!(0)), "{quota}");
        assert!(quota["tpm"]["resets"].is_string());
        assert_eq!(refused.header("x-ratelimit-remaining-tokens"), Some("0"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_at_once_are_limited_until_the_last_byte() {
    within(async {
        let (a, b) =
            (behaving(Behaviour { chunk_delay_ms: 20, events: 1000, ..Behaviour::default() }).await, simulator().await);
        let apis = [
            endpoint_with("a", &a.base_url(), json!({ "maxConcurrent": 1 })),
            endpoint_with("b", &b.base_url(), json!({ "priority": 1 })),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        let mut stream = proxy.open_stream("m").await;
        assert!(stream.chunk().await.unwrap().is_some());
        proxy.chat("m").await.assert_from("b", 1);
        assert_eq!(proxy.status_of("a").await["quota"]["maxConcurrent"]["left"], 0);
        drop(stream);
        proxy.until_status("a", "inFlight", json!(0)).await;
        a.set_default(Behaviour::default());
        let mut from = String::new();
        // The place is free as soon as the endpoint's side has ended too.
        for _ in 0..200 {
            from = proxy.chat("m").await.endpoint().unwrap().to_owned();
            if from == "a" {
                break;
            }
        }
        assert_eq!(from, "a");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_one_by_one_finds_the_place_free() {
    within(async {
        let (a, b) = (simulator().await, simulator().await);
        let apis = [
            endpoint_with("a", &a.base_url(), json!({ "maxConcurrent": 1, "models": ["one-by-one"] })),
            endpoint_with("b", &b.base_url(), json!({ "models": ["busy"] })),
        ];
        let proxy = Arc::new(Proxy::start(json!({}), &apis).await);
        // Others keep the proxy's threads so busy that its bookkeeping comes late.
        let others: Vec<_> = (0..32)
            .map(|_| {
                let proxy = Arc::clone(&proxy);
                tokio::spawn(async move {
                    loop {
                        proxy.chat("busy").await.assert_from("b", 1);
                    }
                })
            })
            .collect();
        for (status, times) in [(200, 300), (204, 100)] {
            a.set_default(Behaviour::status(status));
            for _ in 0..times {
                // Each on a connection of its own, as one waits for what follows its last answer.
                let request = proxy.request(Method::POST, "/v1/chat/completions").header("connection", "close");
                let reply = Reply::of(request.json(&chat("one-by-one"))).await;
                assert_eq!(
                    (reply.status, reply.endpoint(), reply.attempts()),
                    (status, Some("a"), Some("1")),
                    "{reply:?}"
                );
            }
        }
        for other in others {
            assert!(!other.is_finished());
            other.abort();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_queue_requests_wait_for_their_turn() {
    within(async {
        let simulator = behaving(Behaviour { header_delay_ms: 100, ..Behaviour::default() }).await;
        let api = endpoint_with("a", &simulator.base_url(), json!({ "maxConcurrent": 1 }));
        let queue = json!({ "maxWaitMs": 20_000, "maxRequests": 3 });
        let proxy = Proxy::start(json!({ "queue": queue }), &[api]).await;
        let first = proxy.request(Method::POST, "/v1/chat/completions").json(&chat("first"));
        let first = tokio::spawn(Reply::of(first));
        proxy.until_status("a", "inFlight", json!(1)).await;
        let mut waiting = Vec::new();
        for model in ["1", "2", "3"] {
            let call = proxy.request(Method::POST, "/v1/chat/completions").json(&chat(model));
            waiting.push(tokio::spawn(Reply::of(call)));
            // Each is in the queue before the next comes.
            for _ in 0..1000 {
                if proxy.get("/v1/status").await.json()["ledger"]["queued"] == waiting.len() {
                    break;
                }
            }
        }
        // The queue is full.
        let refused = proxy.chat("4").await;
        let message = refused.assert_error(429, "requests", "rate_limit_exceeded");
        assert!(message.contains("a: 1 request at once"), "{message}");
        // The second one's client goes away.
        waiting.remove(1).abort();
        first.await.unwrap().assert_from("a", 1);
        for waiting in waiting {
            waiting.await.unwrap().assert_from("a", 1);
        }
        let models: Vec<_> = simulator
            .requests()
            .iter()
            .map(|request| {
                serde_json::from_slice::<Value>(&request.body).unwrap()["model"].as_str().unwrap().to_owned()
            })
            .collect();
        assert_eq!(models, ["first", "1", "3"]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_in_the_queue_has_an_end() {
    within(async {
        let slow = behaving(Behaviour { header_delay_ms: 3000, ..Behaviour::default() }).await;
        let api = endpoint_with("a", &slow.base_url(), json!({ "maxConcurrent": 1 }));
        let proxy = Proxy::start(json!({ "queue": { "maxWaitMs": 700 } }), &[api]).await;
        let second = async {
            until("the first is at the endpoint", || !slow.requests().is_empty()).await;
            let begun = Instant::now();
            let reply = proxy.chat("m").await;
            (reply, begun.elapsed())
        };
        let (first, (second, waited)) = tokio::join!(proxy.chat("m"), second);
        first.assert_from("a", 1);
        assert_full(&second);
        assert!((700..2500).contains(&waited.as_millis()), "{waited:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_answered_429_is_waited_for_too() {
    within(async {
        let simulator = simulator().await;
        simulator.script("m", vec![Behaviour::status(429).header("retry-after-ms", "400"), Behaviour::default()]);
        let api = endpoint_with("a", &simulator.base_url(), json!({}));
        let proxy = Proxy::start(json!({ "queue": { "maxWaitMs": 10_000 } }), &[api]).await;
        assert_eq!(proxy.chat("m").await.status, 429, "its own: nobody else is there");
        proxy.chat("m").await.assert_from("a", 1);
        let sent: Vec<_> = simulator.requests().iter().map(|request| request.at).collect();
        assert!((sent[1] - sent[0]).as_millis() >= 390, "{sent:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_are_kept_from_clients_where_the_config_says_so() {
    within(async {
        let simulator = simulator().await;
        let apis = ["x1", "x2"].map(|id| endpoint_with(id, &simulator.base_url(), json!({ "rpm": 1 })));
        let proxy = Proxy::start(json!({ "endpointHeaders": false }), &apis).await;
        for _ in 0..2 {
            assert_eq!(proxy.chat("m").await.status, 200);
        }
        let refused = proxy.chat("m").await;
        assert_full(&refused);
        assert!(refused.text().contains("(1 request a minute, for 61 s)"), "{}", refused.text());
        assert!(!refused.text().contains("x1"), "{}", refused.text());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_page_says_all_about_limits() {
    within(async {
        let simulator = simulator().await;
        let limits = json!({ "rpm": 2, "rpd": 10, "tpm": 1000, "tpd": -1, "maxConcurrent": 5, "timezone": "America/Los_Angeles" });
        let proxy = Proxy::start(json!({}), &[endpoint_with("a", &simulator.base_url(), limits)]).await;
        for _ in 0..2 {
            proxy.chat("m").await.assert_from("a", 1);
        }
        let api = proxy.status_of("a").await;
        assert_eq!(
            api["limits"],
            json!({ "rpm": 2, "rpd": 10, "tpm": 1000, "tpd": -1, "maxConcurrent": 5 }),
            "{api}"
        );
        assert_eq!((&api["available"], &api["heldBy"]), (&json!(false), &json!("2 requests a minute")));
        assert_eq!(api["timezone"], "America/Los_Angeles");
        assert!(api["meanFirstByteMs"].as_f64().unwrap() > 0.0);
        let time = |value: &Value| value.as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
        let now = jiff::Timestamp::now();
        let wait = |value: &Value| time(value).duration_since(now).as_secs_f64();
        assert!((50.0..61.0).contains(&wait(&api["limitFrees"])), "{api}");
        for (limit, used, left) in [("rpm", 2, json!(0)), ("rpd", 2, json!(8)), ("tpm", 16, json!(984)), ("tpd", 16, json!(null))] {
            let quota = &api["quota"][limit];
            assert_eq!((&quota["used"], &quota["left"]), (&json!(used), &left), "{limit}: {api}");
        }
        assert!((50.0..61.0).contains(&wait(&api["quota"]["rpm"]["resets"])), "{api}");
        // Midnight in Los Angeles, and the second that counts in both days.
        let day_ends = time(&api["quota"]["rpd"]["resets"]).to_zoned_datetime(jiff::tz::TimeZone::get("America/Los_Angeles").unwrap());
        assert_eq!((day_ends.hour(), day_ends.minute()), (0, 0), "{api}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_again_and_again_is_not_sent_further_and_further_away() {
    within(async {
        let simulator = simulator().await;
        let apis = [endpoint_with("a", &simulator.base_url(), json!({ "rpm": 1 }))];
        let proxy = Proxy::start(json!({}), &apis).await;
        assert_eq!(proxy.chat("m").await.status, 200);
        let first = assert_full(&proxy.chat("m").await);
        for _ in 0..20 {
            let again = assert_full(&proxy.chat("m").await);
            assert!(again <= first, "{again} after {first}");
        }
    })
    .await;
}
