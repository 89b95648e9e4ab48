//! Silence is not life, and life is not silence: streams that think, and clients that are kept waiting.

use std::time::{Duration, Instant};

use http::Method;
use serde_json::{Value, json};

use crate::harness::{KEY, Proxy, chat, chat_stream, client, endpoint_with, h2c, simulator, within};
use crate::wire::{ByHand, STREAM_HEAD, Wire, chunked, event, post_chat};

const ROLE: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n";
const JSON_HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
const DONE: &str = "data: [DONE]\n\n";

/// Settings under which the test's endpoint is asked first, and a simulated one, if wanted, after it.
async fn proxy(server: Value, by_hand: &ByHand, timeouts: Value, spare: Option<&str>) -> Proxy {
    let mut apis = vec![endpoint_with("a", &by_hand.base_url(), json!({ "timeouts": timeouts }))];
    apis.extend(spare.map(|url| endpoint_with("b", url, json!({ "priority": 1 }))));
    Proxy::start(server, &apis).await
}

/// Sends a piece again and again, for that long.
async fn for_a_while(endpoint: &mut Wire, piece: &str, time: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        endpoint.send(chunked(piece)).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_thinks_aloud_is_waited_for() {
    within(async {
        let spare = simulator().await;
        let timeouts = json!({ "firstByteMs": 300, "idleMs": 300, "thinkingMs": 20_000 });
        for thought in [
            ": keep-alive\n\n",
            ": OPENROUTER PROCESSING\n",
            "\n",
            "data:\n\n",
            "event: ping\ndata: {\"type\":\"ping\"}\n\n",
        ] {
            let by_hand = ByHand::bind().await;
            let proxy = proxy(json!({}), &by_hand, timeouts.clone(), Some(&spare.base_url())).await;
            let asked = proxy.request(Method::POST, "/v1/chat/completions").json(&chat_stream("m")).send();
            let answer = async {
                let (mut endpoint, ..) = by_hand.call().await;
                endpoint.send(STREAM_HEAD).await;
                for_a_while(&mut endpoint, thought, Duration::from_millis(900)).await;
                endpoint.send(format!("{}{}0\r\n\r\n", chunked(&event("Hi")), chunked(DONE))).await;
            };
            let (reply, ()) = tokio::join!(asked, answer);
            let reply = reply.unwrap();
            assert_eq!(reply.headers()["x-api-together-endpoint"], "a", "{thought:?}");
            let text = reply.text().await.unwrap();
            assert!(text.contains("\"Hi\"") && text.ends_with(DONE), "{thought:?}: {text}");
        }
        assert!(spare.requests().is_empty(), "nothing is paid for twice");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thinking_has_an_end_and_silence_a_sooner_one() {
    within(async {
        let spare = simulator().await;
        // It thinks for ever; it falls silent.
        for (thinking_ms, idle_ms, thinks) in [(400, 20_000, true), (20_000, 300, false)] {
            let by_hand = ByHand::bind().await;
            let timeouts = json!({ "firstByteMs": 5000, "idleMs": idle_ms, "thinkingMs": thinking_ms });
            let proxy = proxy(json!({}), &by_hand, timeouts, Some(&spare.base_url())).await;
            let begun = Instant::now();
            let body = chat_stream("m");
            let asked = proxy.post("/v1/chat/completions", &body);
            let answer = async {
                let (mut endpoint, ..) = by_hand.call().await;
                endpoint.send(format!("{STREAM_HEAD}{}", chunked(": thinking\n\n"))).await;
                while thinks && endpoint.try_send(chunked(": thinking\n\n")).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(30)).await;
                }
                endpoint
            };
            let (reply, _endpoint) = tokio::join!(asked, answer);
            reply.assert_from("b", 2);
            assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blank_lines_before_json_are_life_too() {
    within(async {
        let by_hand = ByHand::bind().await;
        let timeouts = json!({ "firstByteMs": 300, "idleMs": 300 });
        let proxy = proxy(json!({}), &by_hand, timeouts, None).await;
        let body = chat("m");
        let asked = proxy.post("/v1/chat/completions", &body);
        let answer = async {
            let (mut endpoint, ..) = by_hand.call().await;
            endpoint.send(JSON_HEAD).await;
            for_a_while(&mut endpoint, "\n", Duration::from_millis(900)).await;
            endpoint.send(format!("{}0\r\n\r\n", chunked(r#"{"choices":[{"message":{"content":"Hi"}}]}"#))).await;
        };
        let (reply, ()) = tokio::join!(asked, answer);
        reply.assert_from("a", 1);
        assert_eq!(reply.json()["choices"][0]["message"]["content"], "Hi");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn json_that_has_begun_is_not_thought_about() {
    within(async {
        let by_hand = ByHand::bind().await;
        let timeouts = json!({ "firstByteMs": 5000, "idleMs": 5000, "thinkingMs": 200 });
        let proxy = proxy(json!({}), &by_hand, timeouts, None).await;
        let body = chat("m");
        let asked = proxy.post("/v1/chat/completions", &body);
        let answer = async {
            let (mut endpoint, ..) = by_hand.call().await;
            // It begins later than a stream may think, and takes longer than that.
            tokio::time::sleep(Duration::from_millis(400)).await;
            endpoint.send(format!("{JSON_HEAD}{}", chunked(r#"{"choices":[{"message":"#))).await;
            tokio::time::sleep(Duration::from_millis(400)).await;
            endpoint.send(format!("{}0\r\n\r\n", chunked(r#"{"content":"Hi"}}]}"#))).await;
        };
        let (reply, ()) = tokio::join!(asked, answer);
        reply.assert_from("a", 1);
        assert_eq!(reply.json()["choices"][0]["message"]["content"], "Hi");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nobody_could_take_over_a_stream_begins_with_its_header() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = proxy(json!({}), &by_hand, json!({}), None).await;
        let mut wire = proxy.wire().await;
        wire.send(post_chat(&chat_stream("m"))).await;
        let (mut endpoint, ..) = by_hand.call().await;
        endpoint.send(STREAM_HEAD).await;
        let head = wire.head().await.unwrap();
        assert_eq!((head.status(), head.header("x-api-together-endpoint").as_deref()), (200, Some("a")));
        // A comment goes on at once, also one that no empty line follows.
        for comment in [": one\n\n", ": two\n", "\n", ": three\r\n"] {
            endpoint.send(chunked(comment)).await;
            assert_eq!(wire.chunk().await.unwrap(), comment);
        }
        endpoint.send(chunked(ROLE)).await;
        assert_eq!(wire.chunk().await.unwrap(), ROLE);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn comments_go_on_after_the_holds_own_time_and_failover_behind_them() {
    within(async {
        let spare = simulator().await;
        for (fails, client) in [
            (false, client(reqwest::ClientBuilder::http1_only)),
            (true, client(reqwest::ClientBuilder::http1_only)),
            (true, h2c()),
        ] {
            let by_hand = ByHand::bind().await;
            let proxy = proxy(json!({}), &by_hand, json!({ "idleMs": 3000 }), Some(&spare.base_url())).await;
            let call = client.post(proxy.url("/v1/chat/completions")).bearer_auth(KEY).json(&chat_stream("m"));
            let asked = tokio::spawn(call.send());
            let (mut endpoint, ..) = by_hand.call().await;
            endpoint.send(format!("{STREAM_HEAD}{}", chunked(": PROCESSING 1\n\n"))).await;
            let begun = Instant::now();
            let sends = async {
                for_a_while(&mut endpoint, ": PROCESSING\n\n", Duration::from_millis(5600)).await;
                endpoint
            };
            let opens = async {
                let mut reply = asked.await.unwrap().unwrap();
                let first = reply.chunk().await.unwrap().unwrap();
                (reply, first, begun.elapsed())
            };
            let (mut endpoint, (mut reply, first, took)) = tokio::join!(sends, opens);
            assert!((Duration::from_secs(4)..Duration::from_secs(6)).contains(&took), "{took:?}");
            assert_eq!(reply.status(), 200);
            assert_eq!(reply.headers()["content-type"], "text/event-stream; charset=utf-8");
            assert_eq!(reply.headers().get("x-api-together-endpoint"), None, "nobody has answered yet");
            assert!(reply.headers().contains_key("x-request-id"));
            assert!(first.starts_with(b": PROCESSING 1\n\n"), "{first:?}");
            if fails {
                drop(endpoint);
            } else {
                endpoint.send(format!("{}{}0\r\n\r\n", chunked(&event("Hi")), chunked(DONE))).await;
            }
            let mut text = String::new();
            while let Some(piece) = reply.chunk().await.unwrap() {
                text += std::str::from_utf8(&piece).unwrap();
            }
            assert!(text.starts_with(": PROCESSING") && text.ends_with(DONE), "{fails}: {text}");
            assert!(!text.contains("error"), "{fails}: {text}");
            assert_eq!(text.contains("Hi"), !fails, "{fails}: {text}");
            assert_eq!(text.contains("Hello"), fails, "the other took over: {text}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_stream_is_pinged_and_fails_over_behind_the_pings() {
    within(async {
        let spare = simulator().await;
        let by_hand = ByHand::bind().await;
        let server = json!({ "streamPingSeconds": 1 });
        let timeouts = json!({ "firstByteMs": 2500 });
        let proxy = proxy(server, &by_hand, timeouts, Some(&spare.base_url())).await;
        for client in [client(reqwest::ClientBuilder::http1_only), h2c()] {
            let call = client.post(proxy.url("/v1/chat/completions")).bearer_auth(KEY).json(&chat_stream("m"));
            let begun = Instant::now();
            let asked = tokio::spawn(call.send());
            let (_silent, ..) = by_hand.call().await;
            let mut reply = asked.await.unwrap().unwrap();
            let took = begun.elapsed();
            assert!((Duration::from_millis(900)..Duration::from_secs(2)).contains(&took), "{took:?}");
            assert_eq!(reply.headers()["content-type"], "text/event-stream; charset=utf-8");
            assert_eq!(reply.headers().get("x-api-together-endpoint"), None);
            let mut text = String::new();
            while let Some(piece) = reply.chunk().await.unwrap() {
                text += std::str::from_utf8(&piece).unwrap();
            }
            assert!(text.starts_with(": ping\n\n: ping\n\ndata: {"), "{text}");
            assert!(text.ends_with(DONE) && !text.contains("error"), "{text}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_behind_a_ping_is_an_error_event() {
    within(async {
        let server = || json!({ "streamPingSeconds": 1 });
        let error = r#"{"error":{"message":"all busy","type":"server_error","code":"busy"}}"#;
        let answer = format!(
            "HTTP/1.1 503 No\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{error}",
            error.len()
        );
        for (answer, code) in [(Some(answer), "busy"), (None, "endpoint_timeout")] {
            for client in [client(reqwest::ClientBuilder::http1_only), h2c()] {
                let by_hand = ByHand::bind().await;
                let proxy = proxy(server(), &by_hand, json!({ "firstByteMs": 2500 }), None).await;
                let call = client.post(proxy.url("/v1/chat/completions")).bearer_auth(KEY).json(&chat_stream("m"));
                let asked = tokio::spawn(call.send());
                let (mut endpoint, ..) = by_hand.call().await;
                let mut reply = asked.await.unwrap().unwrap();
                assert_eq!(reply.status(), 200);
                if let Some(answer) = &answer {
                    endpoint.send(answer).await;
                }
                let mut text = String::new();
                let is_clean = loop {
                    match reply.chunk().await {
                        Ok(Some(piece)) => text += std::str::from_utf8(&piece).unwrap(),
                        Ok(None) => break true,
                        Err(_) => break false,
                    }
                };
                let events = text.trim_start_matches(": ping\n\n");
                let data = events.strip_prefix("data: ").and_then(|data| data.strip_suffix("\n\n"));
                let data: Value = serde_json::from_str(data.unwrap_or_else(|| panic!("{code}: {text}"))).unwrap();
                assert_eq!(data["error"]["code"], code, "{text}");
                assert!(!is_clean, "it does not look whole");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_falls_silent_in_its_middle_is_pinged_too() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = proxy(json!({ "streamPingSeconds": 1 }), &by_hand, json!({}), None).await;
        let mut wire = proxy.wire().await;
        wire.send(post_chat(&chat_stream("m"))).await;
        let (mut endpoint, ..) = by_hand.call().await;
        endpoint.send(format!("{STREAM_HEAD}{}", chunked(&event("one")))).await;
        assert_eq!(wire.head().await.unwrap().status(), 200);
        assert_eq!(wire.chunk().await.unwrap(), event("one"));
        assert_eq!(wire.chunk().await.unwrap(), ": ping\n\n");
        // Half an event waits with us, so a ping does not stand in its middle.
        endpoint.send(chunked("data: {\"choices\":")).await;
        assert_eq!(wire.chunk().await.unwrap(), ": ping\n\n");
        endpoint.send(format!("{}{}0\r\n\r\n", chunked("[]}\n\n"), chunked(DONE))).await;
        let mut text = String::new();
        while let Some(chunk) = wire.chunk().await {
            if chunk.is_empty() {
                break;
            }
            text += std::str::from_utf8(&chunk).unwrap();
        }
        assert_eq!(text, format!("data: {{\"choices\":[]}}\n\n{DONE}"));
    })
    .await;
}

/// All that comes of an answer that is cut after an error event.
async fn until_cut(mut response: reqwest::Response) -> String {
    let mut text = Vec::new();
    while let Ok(Some(piece)) = response.chunk().await {
        text.extend_from_slice(&piece);
    }
    String::from_utf8(text).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn pings_do_not_keep_a_dead_endpoint_alive() {
    within(async {
        let by_hand = ByHand::bind().await;
        let timeouts = json!({ "idleMs": 2500 });
        let proxy = proxy(json!({ "streamPingSeconds": 1 }), &by_hand, timeouts, None).await;
        let begun = Instant::now();
        let asked = proxy.open_stream("m");
        let answer = async {
            let (mut endpoint, ..) = by_hand.call().await;
            endpoint.send(format!("{STREAM_HEAD}{}", chunked(&event("one")))).await;
            endpoint
        };
        let (reply, _endpoint) = tokio::join!(asked, answer);
        let text = until_cut(reply).await;
        assert!(text.contains(": ping\n\n") && text.contains("stream_broken"), "{text}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_no_stream_behind_a_ping_is_nobodys_failure() {
    within(async {
        let (by_hand, spare) = (ByHand::bind().await, simulator().await);
        let server = json!({ "streamPingSeconds": 1 });
        let proxy = proxy(server, &by_hand, json!({}), Some(&spare.base_url())).await;
        let asked = proxy.open_stream("m");
        let answer = async {
            let (mut endpoint, ..) = by_hand.call().await;
            tokio::time::sleep(Duration::from_millis(1500)).await;
            let json = r#"{"choices":[{"message":{"content":"Hi"},"finish_reason":"stop"}]}"#;
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length:";
            endpoint.send(format!("{head} {}\r\n\r\n{json}", json.len())).await;
        };
        let (reply, ()) = tokio::join!(asked, answer);
        let text = until_cut(reply).await;
        assert!(text.contains("endpoint_unrecognised_answer"), "{text}");
        assert!(spare.requests().is_empty(), "it is not paid for twice");
        assert_eq!(proxy.status_of("a").await["errorCount"], 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn json_is_sent_no_pings_and_neither_is_anybody_where_they_are_off() {
    within(async {
        for (server, body) in
            [(json!({ "streamPingSeconds": 1 }), chat("m")), (json!({ "streamPingSeconds": 0 }), chat_stream("m"))]
        {
            let by_hand = ByHand::bind().await;
            let proxy = proxy(server, &by_hand, json!({}), None).await;
            let mut wire = proxy.wire().await;
            wire.send(post_chat(&body)).await;
            let (mut endpoint, ..) = by_hand.call().await;
            tokio::time::sleep(Duration::from_millis(2200)).await;
            endpoint.send(format!("{STREAM_HEAD}{}{}0\r\n\r\n", chunked(&event("Hi")), chunked(DONE))).await;
            assert!(wire.head().await.unwrap().header("x-api-together-endpoint").is_some());
            assert!(wire.chunk().await.unwrap().starts_with(event("Hi").as_bytes()));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_flows_too_slowly_goes_elsewhere() {
    within(async {
        let spare = simulator().await;
        for (millis, endpoint) in [(400, "b"), (20, "a")] {
            let by_hand = ByHand::bind().await;
            let server = json!({ "retry": { "minTokensPerSecond": 5 } });
            let proxy = proxy(server, &by_hand, json!({}), Some(&spare.base_url())).await;
            let body = chat_stream("m");
            let asked = proxy.post("/v1/chat/completions", &body);
            let answer = async {
                let (mut endpoint, ..) = by_hand.call().await;
                endpoint.send(STREAM_HEAD).await;
                for _ in 0..12 {
                    if endpoint.try_send(chunked(&event("word"))).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(millis)).await;
                }
                endpoint.try_send(format!("{}0\r\n\r\n", chunked(DONE))).await.unwrap_or_default();
            };
            let (reply, ()) = tokio::join!(asked, answer);
            assert_eq!((reply.status, reply.endpoint()), (200, Some(endpoint)), "{millis}");
            assert_eq!(reply.text().matches("word").count() == 12, endpoint == "a", "{}", reply.text());
        }
    })
    .await;
}
