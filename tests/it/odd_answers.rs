//! Answers that are no JSON and no stream: sound, parts of files, heads, and nothing at all.

use http::Method;
use serde_json::json;

use crate::harness::{Proxy, Reply, chat, endpoint, in_order, simulator, within};
use crate::wire::{ByHand, request};
use api_together::simulator::Behaviour;

#[tokio::test(flavor = "multi_thread")]
async fn parts_and_heads_of_files_and_answers_without_a_body_pass_as_they_are() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = Proxy::start(json!({}), &[endpoint("a", &by_hand.base_url())]).await;
        let mut wire = proxy.wire().await;
        for (method, header, answer, status, body) in [
            (
                "GET",
                "range: bytes=2-4",
                "206 Partial Content\r\ncontent-type: audio/mpeg\r\ncontent-range: bytes 2-4/9\r\ncontent-length: 3\r\n\r\n\u{1}\u{0}\u{2}",
                206,
                &b"\x01\x00\x02"[..],
            ),
            ("GET", "if-none-match: \"e\"", "304 Not Modified\r\netag: \"e\"\r\n\r\n", 304, b""),
            ("GET", "range: bytes=99-", "416 Range Not Satisfiable\r\ncontent-range: bytes */9\r\ncontent-length: 0\r\n\r\n", 416, b""),
            ("HEAD", "accept: */*", "200 OK\r\ncontent-type: video/mp4\r\ncontent-length: 123456\r\n\r\n", 200, b""),
            ("DELETE", "accept: */*", "204 No Content\r\nx-deleted: yes\r\n\r\n", 204, b""),
        ] {
            wire.send(request(method, "/v1/files/f/content", &[header], "")).await;
            let (mut endpoint, head, _) = by_hand.call().await;
            assert_eq!(head.line, format!("{method} /v1/files/f/content HTTP/1.1"));
            let (name, value) = header.split_once(": ").unwrap();
            assert_eq!(head.header(name).as_deref(), Some(value));
            endpoint.send(format!("HTTP/1.1 {answer}")).await;
            let head = wire.head().await.unwrap();
            assert_eq!(head.status(), status, "{method}: {head:?}");
            for line in answer.split("\r\n").filter(|line| line.starts_with("content-range") || line.starts_with("x-")) {
                let (name, value) = line.split_once(": ").unwrap();
                assert_eq!(head.header(name).as_deref(), Some(value), "{head:?}");
            }
            if method == "HEAD" {
                assert_eq!(head.header("content-length").as_deref(), Some("123456"));
            }
            assert_eq!(wire.exactly(body.len()).await.unwrap(), body, "{method}");
            drop(endpoint);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_attempt_has_the_same_idempotency_key() {
    within(async {
        let [first, second] = [simulator().await, simulator().await];
        first.script("*", vec![Behaviour::status(503)]);
        let urls = [first.base_url(), second.base_url()];
        let proxy = Proxy::start(json!({}), &in_order(urls.iter().map(String::as_str))).await;
        let request = proxy.request(Method::POST, "/v1/chat/completions").json(&chat("m"));
        let keys = [("idempotency-key", "stainless-python-retry-1"), ("x-idempotency-key", "mine")];
        let request = keys.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        Reply::of(request).await.assert_from("b", 2);
        for simulator in [&first, &second] {
            for (name, value) in keys {
                assert_eq!(simulator.requests()[0].header(name), Some(value));
            }
        }
    })
    .await;
}
