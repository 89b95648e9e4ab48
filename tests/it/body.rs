//! What a request's body has to be, and how it reaches the endpoint.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use api_together::simulator::Behaviour;
use bytes::Bytes;
use futures_core::Stream;
use http::{Method, Version};
use serde_json::json;

use crate::harness::{Proxy, Reply, behaving, chat, client, endpoint, endpoint_with, h2c, simulator, within};
use crate::wire::{ByHand, post_chat, request};

/// A body whose length nobody knows beforehand.
struct Pieces(VecDeque<Bytes>);

impl Pieces {
    fn of(body: &Bytes) -> reqwest::Body {
        let piece = 40_000;
        let pieces = (0..body.len()).step_by(piece).map(|at| body.slice(at..body.len().min(at + piece)));
        reqwest::Body::wrap_stream(Self(pieces.collect()))
    }
}

impl Stream for Pieces {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(self.0.pop_front().map(Ok))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_request_reaches_its_endpoint_in_one_piece_and_at_once() {
    within(async {
        // The system itself lets go of what is kept back after 200 ms.
        const AT_ONCE: Duration = Duration::from_millis(150);
        let by_hand = ByHand::bind().await;
        let proxy = Proxy::start(json!({}), &[endpoint("a", &by_hand.base_url())]).await;
        let mut wire = proxy.wire().await;
        let sent = post_chat(&chat("m"));
        let mut endpoint = None;
        let mut waits = Vec::new();
        // The first one on a fresh connection, the others on the same one.
        for _ in 0..6 {
            let begun = Instant::now();
            wire.send(&sent).await;
            if endpoint.is_none() {
                endpoint = Some(by_hand.accept().await);
            }
            let endpoint = endpoint.as_mut().unwrap();
            let arrived = String::from_utf8(endpoint.one_read().await).unwrap();
            waits.push(begun.elapsed());
            let body = sent.split("\r\n\r\n").last().unwrap();
            assert!(arrived.starts_with("POST ") && arrived.ends_with(body), "{arrived}");
            endpoint
                .send("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 26\r\n\r\n{\"choices\":[{\"text\":\"1\"}]}")
                .await;
            assert_eq!(wire.message().await.0.status(), 200);
        }
        assert!(waits.iter().any(|wait| *wait < AT_ONCE), "{waits:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_but_the_models_name_changes() {
    within(async {
        let simulator = simulator().await;
        let mapping = json!({ "modelMapping": { "mine": "theirs", "m\u{e9}": "other" } });
        let proxy = Proxy::start(json!({}), &[endpoint_with("a", &simulator.base_url(), mapping)]).await;
        for (sent, arrives) in [
            // Key order, spelling of numbers, white space, unknown fields, a deeper `model`.
            (
                "{ \"z\" : 1.0,\n\t\"model\":\"mine\" , \"a\":1,\"n\":1e5,\"big\":12345678901234567890123,\"x\":{\"model\":\"mine\"} }\r\n",
                "{ \"z\" : 1.0,\n\t\"model\":\"theirs\" , \"a\":1,\"n\":1e5,\"big\":12345678901234567890123,\"x\":{\"model\":\"mine\"} }\r\n",
            ),
            // Escapes, in the name as well.
            (
                r#"{"t":"\u00e9\/\ud83d\ude00é😀\n","model":"m\u0069ne","dup":1,"dup":2}"#,
                r#"{"t":"\u00e9\/\ud83d\ude00é😀\n","model":"theirs","dup":1,"dup":2}"#,
            ),
            (r#"{"model":"mé"}"#, r#"{"model":"other"}"#),
            // The key itself in escapes.
            (r#"{"\u006dodel":"mine","messages":[]}"#, r#"{"\u006dodel":"theirs","messages":[]}"#),
            // Names that are not mapped, and bodies without one.
            (r#"{"model": "pl\u0061in" ,"stream":false}"#, r#"{"model": "pl\u0061in" ,"stream":false}"#),
            (r#"{ "input" : "no model" }"#, r#"{ "input" : "no model" }"#),
        ] {
            simulator.clear();
            let reply = proxy.post_text("/v1/chat/completions", sent).await;
            let arrived = simulator.requests();
            assert_eq!(arrived.len(), 1, "{sent}: {reply:?}");
            assert_eq!(std::str::from_utf8(&arrived[0].body).unwrap(), arrives);
            assert_eq!(arrived[0].header("content-length"), Some(arrives.len().to_string().as_str()));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_no_endpoint_could_understand_are_refused_with_the_place() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        for (body, says) in [
            ("{\"model\":\"m\",", "not valid JSON"),
            ("{\"model\":\"m\"", "line 1 column 12"),
            ("{'model':'m'}", "not valid JSON"),
            ("{\"model\":\"m\"} trailing", "not valid JSON"),
            ("{\"model\":\"m\",}", "not valid JSON"),
            ("hello", "not valid JSON"),
            ("   ", "not valid JSON"),
            ("[{\"model\":\"m\"}]", "must be a JSON object"),
            ("\"m\"", "must be a JSON object"),
            ("null", "must be a JSON object"),
            ("{\"model\":\"a\",\n \"model\":\"b\"}", "two `model` keys; the second value is at line 2 column 10"),
            ("{\"model\":\"a\",\"\\u006dodel\":\"b\"}", "two `model` keys"),
            ("{\"model\":7}", "`model` must be a string, at line 1 column 10"),
            ("{\"model\":[\"m\"]}", "`model` must be a string"),
            ("{\"model\":{}}", "`model` must be a string"),
        ] {
            let reply = proxy.post_text("/v1/chat/completions", body).await;
            let message = reply.assert_error(400, "invalid_request_error", None);
            assert!(message.contains(says), "{body}: {message}");
        }
        assert!(simulator.requests().is_empty());
        assert_eq!(proxy.status_of("a").await["errorCount"], 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_content_types_and_empty_bodies_pass_as_they_are() {
    within(async {
        let simulator = behaving(Behaviour { echo: true, ..Behaviour::default() }).await;
        let proxy = Proxy::before([&simulator]).await;
        let form = "--b\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nwhisper-1\r\n--b--\r\n";
        for (method, content_type, body, length) in [
            (Method::POST, Some("multipart/form-data; boundary=b"), form, Some("73")),
            (Method::POST, Some("text/plain"), "not json", Some("8")),
            (Method::POST, Some("application/octet-stream"), "{ not json", Some("10")),
            (Method::POST, Some("application/octet-stream"), "\u{0}\u{1}", Some("2")),
            (Method::POST, Some("application/json"), "", Some("0")),
            (Method::POST, None, "", Some("0")),
            (Method::GET, None, "", None),
            (Method::DELETE, None, "", None),
        ] {
            simulator.clear();
            let mut call = proxy.request(method, "/v1/audio/transcriptions").body(body);
            if let Some(value) = content_type {
                call = call.header("content-type", value);
            }
            assert_eq!(Reply::of(call).await.status, 200);
            let arrived = &simulator.requests()[0];
            assert_eq!(arrived.body, body.as_bytes());
            let length = length.map(|_| body.len().to_string());
            assert_eq!(arrived.header("content-length"), length.as_deref(), "{content_type:?} {body}");
            assert_eq!(arrived.header("content-type"), content_type);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn json_is_json_whatever_its_label_says() {
    within(async {
        let simulator = simulator().await;
        let mapping = json!({ "modelMapping": { "mine": "theirs" }, "models": [] });
        let proxy = Proxy::start(json!({}), &[endpoint_with("a", &simulator.base_url(), mapping)]).await;
        let (sent, expected) = (r#" {"model":"mine","messages":[]}"#, r#" {"model":"theirs","messages":[]}"#);
        for label in [
            None,
            Some("application/json"),
            Some("application/x-www-form-urlencoded"),
            Some("text/plain;charset=UTF-8"),
            Some("application/octet-stream"),
            Some("json"),
        ] {
            for mark in ["", "\u{feff}"] {
                simulator.clear();
                let mut call = proxy.request(Method::POST, "/v1/chat/completions").body(format!("{mark}{sent}"));
                if let Some(label) = label {
                    call = call.header("content-type", label);
                }
                Reply::of(call).await.assert_from("a", 1);
                let arrived = &simulator.requests()[0];
                assert_eq!(std::str::from_utf8(&arrived.body).unwrap(), expected, "{label:?}");
                assert!(arrived.header("content-type").is_none_or(|label| label == "application/json"), "{label:?}");
            }
        }
        let broken = proxy.request(Method::POST, "/v1/chat/completions").header("content-type", "text/plain");
        let message = Reply::of(broken.body("{'model':'mine'}")).await.assert_error(400, "invalid_request_error", None);
        assert!(message.contains("not valid JSON"), "{message}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_null_or_empty_is_none() {
    within(async {
        let simulator = behaving(Behaviour { echo: true, ..Behaviour::default() }).await;
        let proxy =
            Proxy::start(json!({}), &[endpoint_with("a", &simulator.base_url(), json!({ "models": ["m"] }))]).await;
        for body in [r#"{"model":null}"#, r#"{"model":""}"#, "{}"] {
            simulator.clear();
            assert_eq!(proxy.post_text("/v1/files/x", body).await.status, 200, "{body}");
            assert_eq!(simulator.requests()[0].body, body);
        }
    })
    .await;
}

/// A body as a client compresses it.
fn compressed(encoding: &str, body: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    match encoding {
        "gzip" => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(body).unwrap();
            encoder.finish().unwrap()
        }
        "deflate" => {
            let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(body).unwrap();
            encoder.finish().unwrap()
        }
        "br" => {
            let mut encoded = Vec::new();
            brotli::CompressorWriter::new(&mut encoded, 4096, 5, 20).write_all(body).unwrap();
            encoded
        }
        "zstd" => zstd::encode_all(body, 3).unwrap(),
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_body_is_read_within_bounds_and_sent_on_plain() {
    within(async {
        let simulator = simulator().await;
        let mapping = json!({ "modelMapping": { "mine": "theirs" }, "models": [] });
        let limit = json!({ "bodyBytesMax": 200_000 });
        let proxy = Proxy::start(limit, &[endpoint_with("a", &simulator.base_url(), mapping)]).await;
        let body = |length: usize| format!(r#"{{"model":"mine","x":"{}"}}"#, "x".repeat(length));
        let call = |encoding: &str, bytes: Vec<u8>| {
            let call = proxy.request(Method::POST, "/v1/chat/completions").header("content-type", "application/json");
            Reply::of(call.header("content-encoding", encoding).body(bytes))
        };
        for encoding in ["gzip", "deflate", "br", "zstd"] {
            for length in [10, 150_000] {
                simulator.clear();
                call(encoding, compressed(encoding, body(length).as_bytes())).await.assert_from("a", 1);
                let arrived = &simulator.requests()[0];
                assert_eq!(arrived.body, body(length).replace("mine", "theirs"), "{encoding}");
                assert_eq!(arrived.header("content-encoding"), None);
            }
            simulator.clear();
            // A bomb: small to send, large to hold.
            let bomb = call(encoding, compressed(encoding, body(50_000_000).as_bytes())).await;
            assert!(matches!(bomb.status, 400 | 413), "{encoding}: {bomb:?}");
            let broken = call(encoding, b"no such thing".to_vec()).await;
            let message = broken.assert_error(400, "invalid_request_error", None);
            assert!(message.contains("Content-Encoding") || message.contains("JSON"), "{encoding}: {message}");
            assert!(simulator.requests().is_empty());
        }
        for unknown in ["compress", "gzip, br", "aws-chunked"] {
            let reply = call(unknown, body(10).into_bytes()).await;
            let message = reply.assert_error(415, "invalid_request_error", "unsupported_encoding");
            assert!(message.contains("gzip"), "{message}");
        }
        call("identity", body(10).into_bytes()).await.assert_from("a", 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_over_the_limit_is_refused_however_it_is_framed() {
    within(async {
        let simulator = simulator().await;
        let limit = json!({ "bodyBytesMax": 2048 });
        let proxy = Proxy::start(limit, &[endpoint_with("a", &simulator.base_url(), json!({}))]).await;
        let body = |bytes: usize| Bytes::from(format!("{{\"model\":\"m\",\"x\":\"{}\"}}", "x".repeat(bytes - 20)));
        let h1 = client(reqwest::ClientBuilder::http1_only);
        for (client, version) in [(&h1, Version::HTTP_11), (&h2c(), Version::HTTP_2)] {
            for chunked in [false, true] {
                for (bytes, status) in [(2048, 200), (2049, 413), (300_000, 413)] {
                    let body = body(bytes);
                    assert_eq!(body.len(), bytes);
                    let body = if chunked { Pieces::of(&body) } else { body.into() };
                    let call = client.post(proxy.url("/v1/chat/completions")).bearer_auth(crate::harness::KEY);
                    let reply = Reply::of(call.header("content-type", "application/json").body(body)).await;
                    assert_eq!((reply.status, reply.version), (status, version), "{bytes} {chunked}");
                    if status == 413 {
                        let message = reply.assert_error(413, "invalid_request_error", "request_too_large");
                        assert!(message.contains("2048 bytes"), "{message}");
                    }
                }
            }
        }
        assert_eq!(simulator.requests().len(), 4);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_asks_first_is_told_to_go_on_or_that_it_need_not() {
    within(async {
        let simulator = simulator().await;
        let limit = json!({ "bodyBytesMax": 2048 });
        let proxy = Proxy::start(limit, &[endpoint_with("a", &simulator.base_url(), json!({}))]).await;
        let body = r#"{"model":"m"}"#;
        let ask = |length: usize| {
            let length = format!("content-length: {length}");
            request(
                "POST",
                "/v1/chat/completions",
                &["content-type: application/json", "expect: 100-continue", &length],
                "",
            )
        };
        let mut wire = proxy.wire().await;
        wire.send(ask(body.len())).await;
        assert_eq!(wire.head().await.unwrap().status(), 100);
        wire.send(body).await;
        let (head, _) = wire.message().await;
        assert_eq!((head.status(), head.header("x-api-together-attempts").as_deref()), (200, Some("1")));
        assert_eq!(simulator.requests()[0].body, body);
        assert_eq!(simulator.requests()[0].header("expect"), None);

        let mut wire = proxy.wire().await;
        wire.send(ask(1_000_000)).await;
        assert_eq!(wire.head().await.unwrap().status(), 413);
        let mut wire = proxy.wire().await;
        wire.send(ask(10).replace(crate::harness::KEY, "wrong")).await;
        assert_eq!(wire.head().await.unwrap().status(), 401);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_asked_first_is_retried_like_any_other() {
    within(async {
        let (bad, good) = (behaving(Behaviour::status(503)).await, simulator().await);
        let proxy = Proxy::before([&bad, &good]).await;
        let headers = ["content-type: application/json", "expect: 100-continue", "content-length: 13"];
        let mut wire = proxy.wire().await;
        wire.send(request("POST", "/v1/chat/completions", &headers, "")).await;
        assert_eq!(wire.head().await.unwrap().status(), 100);
        wire.send(r#"{"model":"m"}"#).await;
        let (head, _) = wire.message().await;
        assert_eq!((head.status(), head.header("x-api-together-attempts").as_deref()), (200, Some("2")));
    })
    .await;
}

/// Sends the body through an endpoint that answers 503, and looks at what the next one gets.
async fn retried(size: usize, http2: bool, known_length: bool, upstream_http2: bool) {
    let (bad, good) = (behaving(Behaviour::status(503)).await, simulator().await);
    let api = |id: &str, url: &str, name: &str, priority: u32| {
        let more = json!({ "modelMapping": { "m": name }, "priority": priority, "http2": upstream_http2 });
        endpoint_with(id, url, more)
    };
    let apis = [api("a", &bad.base_url(), "a-long-name-of-a-model", 0), api("b", &good.base_url(), "n", 1)];
    let proxy = Proxy::start(json!({}), &apis).await;
    let mut filler = String::with_capacity(size);
    for number in 0..size / 8 {
        write!(filler, "{number:08x}").unwrap();
    }
    let body = |model: &str| Bytes::from(format!("{{\"model\":\"{model}\",\"messages\":[],\"x\":\"{filler}\"}}"));
    let sent = body("m");
    let client = if http2 { h2c() } else { client(reqwest::ClientBuilder::http1_only) };
    let call = client.post(proxy.url("/v1/chat/completions")).bearer_auth(crate::harness::KEY);
    let call = call.header("content-type", "application/json");
    let call = call.body(if known_length { sent.into() } else { Pieces::of(&sent) });
    let what = format!("{size} bytes, http2 {http2}, length {known_length}, endpoint's http2 {upstream_http2}");
    let reply = Reply::of(call).await;
    assert_eq!(reply.status, 200, "{what}: {reply:?}");
    reply.assert_from("b", 2);
    for (endpoint, model) in [(&bad, "a-long-name-of-a-model"), (&good, "n")] {
        let arrived = endpoint.requests();
        assert_eq!(arrived.len(), 1, "{what}");
        let expected = body(model);
        // Not by assert_eq, which would print megabytes.
        assert!(arrived[0].body == expected, "{what}: {} bytes came", arrived[0].body.len());
        assert_eq!(arrived[0].header("content-length"), Some(expected.len().to_string().as_str()), "{what}");
        assert_eq!(arrived[0].version == Version::HTTP_2, upstream_http2, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_of_every_size_and_framing_are_retried() {
    within(async {
        for size in [16, 100_000] {
            for http2 in [false, true] {
                for known_length in [false, true] {
                    for upstream_http2 in [false, true] {
                        retried(size, http2, known_length, upstream_http2).await;
                    }
                }
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_of_megabytes_are_retried() {
    within(async {
        for (http2, known_length) in [(false, false), (false, true), (true, false), (true, true)] {
            retried(5_000_000, http2, known_length, http2).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_in_the_middle_of_its_body_reaches_no_endpoint() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        let mut wire = proxy.wire().await;
        wire.send(request("POST", "/v1/chat/completions", &["content-length: 1000"], "")).await;
        wire.send("{\"model\":").await;
        // The one that asks for the status is open as well.
        proxy.until_open(2).await;
        drop(wire);
        proxy.until_open(1).await;
        assert_eq!(simulator.connections(), 0);
    })
    .await;
}
