//! `WebSocket`s whose model stands in their first message: the client's side is accepted before an endpoint is chosen. And what takes a
//! permit of a `WebSocket`.

use std::time::Duration;

use serde_json::{Value, json};

use crate::connections::websocket;
use crate::harness::{KEY, Proxy, endpoint_with, key_of, within};
use crate::wire::{ByHand, Wire};

const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
const MASK: [u8; 4] = [7, 0, 255, 129];

fn frame(first: u8, content: &[u8], mask: Option<[u8; 4]>) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap();
    let masked = if mask.is_some() { 0x80 } else { 0 };
    let mask = mask.unwrap_or_default();
    let content: Vec<u8> = content.iter().enumerate().map(|(at, byte)| byte ^ mask[at % 4]).collect();
    let key: &[u8] = if masked == 0 { &[] } else { &mask };
    [&[first, masked | 0x7e], &length.to_be_bytes()[..], key, &content].concat()
}

/// A client's message.
pub(crate) fn masked(text: &str) -> Vec<u8> {
    frame(0x81, text.as_bytes(), Some(MASK))
}

fn create(model: &str) -> String {
    format!(r#"{{"type":"response.create", "model":"{model}","input":"a \"response.create\" of words"}}"#)
}

/// Reads one frame: its first byte, and its content without a mask.
async fn read(wire: &mut Wire) -> (u8, Vec<u8>) {
    let head = wire.exactly(2).await.expect("a frame");
    let length = match head[1] & 0x7f {
        126 => {
            let bytes = wire.exactly(2).await.unwrap();
            usize::from(u16::from_be_bytes([bytes[0], bytes[1]]))
        }
        short => short.into(),
    };
    let mask = if head[1] & 0x80 == 0 { vec![0; 4] } else { wire.exactly(4).await.unwrap().to_vec() };
    let content = if length == 0 { Vec::new() } else { wire.exactly(length).await.unwrap().to_vec() };
    (head[0], content.iter().enumerate().map(|(at, byte)| byte ^ mask[at % 4]).collect())
}

async fn read_text(wire: &mut Wire) -> String {
    let (first, text) = read(wire).await;
    assert_eq!(first, 0x81, "{text:?}");
    String::from_utf8(text).unwrap()
}

/// The error that ends a `WebSocket`, and the number of its close.
async fn refusal(wire: &mut Wire) -> (Value, u16) {
    let event: Value = serde_json::from_str(&read_text(wire).await).unwrap();
    assert_eq!(event["type"], "error");
    let (first, content) = read(wire).await;
    assert_eq!((first, content.len()), (0x88, 2));
    assert_eq!(wire.rest().await, "", "and the connection ends");
    (event, u16::from_be_bytes([content[0], content[1]]))
}

async fn open(proxy: &Proxy, path: &str) -> Wire {
    let mut wire = proxy.wire().await;
    wire.send(websocket(path).replacen("\r\n", "\r\nsec-websocket-protocol: a.b, c\r\n", 1)).await;
    let head = wire.head().await.unwrap();
    assert_eq!((head.status(), head.header("upgrade").as_deref()), (101, Some("websocket")), "{head:?}");
    assert_eq!(head.header("sec-websocket-accept").as_deref(), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    assert_eq!(head.header("sec-websocket-protocol").as_deref(), Some("a.b"));
    assert!(head.header("x-request-id").is_some(), "{head:?}");
    wire
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_message_decides_where_a_websocket_goes() {
    within(async {
        let (first, second) = (ByHand::bind().await, ByHand::bind().await);
        for (path, say) in [
            ("/v1/responses", create as fn(&str) -> String),
            ("/v1/realtime?intent=transcription", |model| {
                format!(r#"{{"type":"session.update","session":{{"model":"{model}","voice":"x"}}}}"#)
            }),
        ] {
            let more = |models: Value, mapping: Value| json!({ "models": models, "modelMapping": mapping, "webSockets": ["responses", "realtime"] });
            let apis = [
                endpoint_with("other", &first.base_url(), more(json!(["else"]), json!({}))),
                endpoint_with("first-message", &second.base_url(), more(json!([]), json!({ "codex": "vendor/codex-2" }))),
            ];
            let proxy = Proxy::start(json!({}), &apis).await;
            let mut wire = open(&proxy, path).await;
            // A ping, and a message in two frames, in pieces.
            let text = say("codex");
            let (begun, rest) = text.split_at(10);
            wire.send(frame(0x89, b"hi", Some(MASK))).await;
            wire.send(frame(0x01, begun.as_bytes(), Some(MASK))).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
            let last = frame(0x80, rest.as_bytes(), Some([1, 2, 3, 4]));
            wire.send(&last[..7]).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
            wire.send(&last[7..]).await;
            let (mut endpoint, head, _) = second.call().await;
            assert_eq!(head.line, format!("GET {path} HTTP/1.1"));
            assert_eq!(head.header("authorization"), Some(format!("Bearer {}", key_of("first-message"))));
            assert_eq!(head.header("sec-websocket-protocol").as_deref(), Some("a.b, c"));
            // What the client says before the endpoint has answered waits.
            wire.send(masked(r#"{"type":"other"}"#)).await;
            endpoint.send(SWITCH).await;
            assert_eq!(read(&mut endpoint).await, (0x89, b"hi".to_vec()));
            assert_eq!(read_text(&mut endpoint).await, say("vendor/codex-2"));
            assert_eq!(read_text(&mut endpoint).await, r#"{"type":"other"}"#);
            // And so do later ones.
            endpoint.send(frame(0x81, b"{}", None)).await;
            assert_eq!(read_text(&mut wire).await, "{}");
            wire.send(masked(&say("codex"))).await;
            assert_eq!(read_text(&mut endpoint).await, say("vendor/codex-2"));
            wire.send(masked(&say("unheard-of"))).await;
            assert_eq!(read_text(&mut endpoint).await, say("unheard-of"), "what is not known passes as it is");
            wire.send(frame(0x88, &[3, 232], Some(MASK))).await;
            assert_eq!(read(&mut endpoint).await, (0x88, vec![3, 232]));
            drop(wire);
            assert_eq!(endpoint.rest().await, "");
            assert_eq!(proxy.status_of("first-message").await["errorCount"], 0);
            assert!(proxy.get("/metrics").await.text().contains(r#"api_together_attempts_total{endpoint="first-message",outcome="ok"}"#));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_behind_the_first_message_goes_to_another_endpoint_or_to_the_client() {
    within(async {
        let (first, second) = (ByHand::bind().await, ByHand::bind().await);
        for (refusal_text, status, code) in [
            ("HTTP/1.1 429 Too Many Requests\r\nretry-after: 9\r\ncontent-length: 0\r\n\r\n", 429, 1013),
            ("HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}", 404, 1008),
            ("HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}", 400, 1008),
            ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", 502, 1013),
            // Closed without a word.
            ("", 502, 1013),
        ] {
            let api = |id: &str, by_hand: &ByHand, priority: u32| {
                let more = json!({ "models": ["m"], "webSockets": ["responses"], "priority": priority });
                endpoint_with(id, &by_hand.base_url(), more)
            };
            let proxy = Proxy::start(json!({}), &[api("a", &first, 0), api("b", &second, 1)]).await;
            let is_final = status == 400;
            for answers in [true, false] {
                let mut wire = open(&proxy, "/v1/responses").await;
                wire.send(masked(&create("m"))).await;
                let (mut refuses, ..) = first.call().await;
                refuses.send(refusal_text).await;
                drop(refuses);
                if !is_final {
                    let (mut endpoint, ..) = second.call().await;
                    if answers {
                        endpoint.send(SWITCH).await;
                        assert_eq!(read_text(&mut endpoint).await, create("m"), "{refusal_text}");
                        break;
                    }
                    endpoint.send(refusal_text).await;
                }
                let (event, close) = refusal(&mut wire).await;
                assert_eq!((&event["status"], close), (&json!(status), code), "{refusal_text}: {event}");
                assert!(event["error"]["message"].is_string(), "{event}");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_message_that_leads_nowhere_is_answered_with_an_error() {
    within(async {
        let by_hand = ByHand::bind().await;
        let apis = [
            endpoint_with("a", &by_hand.base_url(), json!({ "models": ["m"], "webSockets": ["responses"] })),
            endpoint_with("b", &by_hand.base_url(), json!({ "models": ["posted"] })),
        ];
        let proxy = Proxy::start(json!({ "bodyBytesMax": 2000 }), &apis).await;
        for (said, status, code) in [
            (masked(&create("unheard-of")), 404, json!("model_not_found")),
            (masked(&create("posted")), 426, json!("websocket_unavailable")),
            (masked("{\"model\":"), 400, Value::Null),
            (masked(r#"{"model":7}"#), 400, Value::Null),
            (frame(0x81, b"not masked", None), 400, Value::Null),
            (masked(&"x".repeat(3000)), 413, json!("request_too_large")),
            (frame(0x81, &[b'x'; 3000], Some(MASK))[..8].to_vec(), 413, json!("request_too_large")),
        ] {
            let mut wire = open(&proxy, "/v1/responses").await;
            wire.send(&said).await;
            let (event, close) = refusal(&mut wire).await;
            assert_eq!((&event["status"], &event["error"]["code"], close), (&json!(status), &code, 1008), "{event}");
        }
        // Where no endpoint is known to take it, the client is sent to HTTP, as before.
        for path in ["/v1/realtime", "/v1/audio/speech"] {
            let mut wire = proxy.wire().await;
            wire.send(websocket(path)).await;
            let (head, body) = wire.message().await;
            assert_eq!(head.status(), 426, "{path}: {body:?}");
        }
        // A wrong key opens nothing.
        let mut wire = proxy.wire().await;
        wire.send(websocket("/v1/responses").replace(KEY, "sk-wrong")).await;
        assert_eq!(wire.message().await.0.status(), 401);
        // Clients that leave.
        for said in [Vec::new(), masked(&create("m"))[..9].to_vec(), frame(0x88, b"", Some(MASK))] {
            let mut wire = open(&proxy, "/v1/responses").await;
            wire.send(said).await;
            drop(wire);
        }
        assert_eq!(proxy.status_of("a").await["usage"]["rpm"], 0);
        proxy.until_open(1).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_response_of_a_websocket_takes_a_permit_or_the_session_does() {
    within(async {
        for (permits, path) in [
            (json!("response"), "/v1/responses"),
            (json!("response"), "/v1/responses?model=m"),
            (json!("session"), "/v1/responses"),
        ] {
            let by_hand = ByHand::bind().await;
            let more = json!({ "models": ["m"], "webSockets": ["responses"], "webSocketPermits": permits, "rpm": 3 });
            let proxy = Proxy::start(json!({}), &[endpoint_with("a", &by_hand.base_url(), more)]).await;
            let mut wire = proxy.wire().await;
            wire.send(websocket(path)).await;
            if !path.contains('?') {
                assert_eq!(wire.head().await.unwrap().status(), 101);
                wire.send(masked(&create("m"))).await;
            }
            let (mut endpoint, ..) = by_hand.call().await;
            endpoint.send(SWITCH).await;
            if path.contains('?') {
                assert_eq!(wire.head().await.unwrap().status(), 101);
                wire.send(masked(&create("m"))).await;
            }
            let created = frame(0x81, br#"{"type":"response.created","response":{}}"#, None);
            let (begun, rest) = created.split_at(9);
            for number in 1..=5 {
                if number > 1 {
                    wire.send(masked(&create("m"))).await;
                }
                if permits == "response" && number > 3 {
                    // Not within a frame of the endpoint's.
                    let event: Value = serde_json::from_str(&read_text(&mut wire).await).unwrap();
                    assert_eq!((&event["type"], &event["status"]), (&json!("error"), &json!(429)), "{event}");
                    assert_eq!(event["error"]["code"], "rate_limit_exceeded");
                    endpoint.send(begun).await;
                    wire.exactly(9).await.unwrap();
                    wire.send(masked(&create("m"))).await;
                    tokio::time::sleep(Duration::from_millis(30)).await;
                    endpoint.send(rest).await;
                    wire.exactly(rest.len()).await.unwrap();
                    let event: Value = serde_json::from_str(&read_text(&mut wire).await).unwrap();
                    assert_eq!(event["status"], 429, "{event}");
                } else {
                    assert_eq!(read_text(&mut endpoint).await, create("m"));
                    endpoint.send(&created).await;
                    read_text(&mut wire).await;
                }
            }
            // Two that began by themselves are counted as well.
            let used = if permits == "session" { 1 } else { 5 };
            let usage = json!({ "rpm": used, "rpd": used, "tpm": 0, "tpd": 0, "maxConcurrent": 1 });
            proxy.until_status("a", "usage", usage).await;
            assert_eq!(proxy.status_of("a").await["inFlight"], 1, "{path}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_for_some_models_asks_for_no_other_one_later_on() {
    within(async {
        const BOB: &str = "sk-bob-91c7aa02f4d86e35";
        for path in ["/v1/responses", "/v1/responses?model=m"] {
            let by_hand = ByHand::bind().await;
            // Nothing else would have the client's messages read, where the URL names the model.
            let more = json!({ "models": ["*"], "webSockets": ["responses"], "webSocketPermits": "session" });
            let server = json!({ "keys": [{ "name": "bob", "key": BOB, "models": ["m"] }] });
            let proxy = Proxy::start(server, &[endpoint_with("a", &by_hand.base_url(), more)]).await;
            let mut wire = proxy.wire().await;
            wire.send(websocket(path).replace(KEY, BOB)).await;
            if !path.contains('?') {
                assert_eq!(wire.head().await.unwrap().status(), 101);
                wire.send(masked(&create("m"))).await;
            }
            let (mut endpoint, ..) = by_hand.call().await;
            endpoint.send(SWITCH).await;
            if path.contains('?') {
                assert_eq!(wire.head().await.unwrap().status(), 101);
                wire.send(masked(&create("m"))).await;
            }
            assert_eq!(read_text(&mut endpoint).await, create("m"));
            wire.send(masked(&create("other"))).await;
            let event: Value = serde_json::from_str(&read_text(&mut wire).await).unwrap();
            assert_eq!(
                (&event["status"], &event["error"]["code"]),
                (&json!(404), &json!("model_not_found")),
                "{event}"
            );
            wire.send(masked(r#"{"type":"response.cancel"}"#)).await;
            assert_eq!(read_text(&mut endpoint).await, r#"{"type":"response.cancel"}"#, "the other one never came");
        }
        // Nor for one that it does not name.
        let by_hand = ByHand::bind().await;
        let server = json!({ "keys": [{ "name": "bob", "key": BOB, "models": ["m"] }] });
        let more = json!({ "models": ["*"], "webSockets": ["responses"] });
        let proxy = Proxy::start(server, &[endpoint_with("a", &by_hand.base_url(), more)]).await;
        let mut wire = proxy.wire().await;
        wire.send(websocket("/v1/responses").replace(KEY, BOB)).await;
        assert_eq!(wire.head().await.unwrap().status(), 101);
        wire.send(masked(r#"{"type":"response.create","prompt":{"id":"pmpt_1"}}"#)).await;
        let (event, _) = refusal(&mut wire).await;
        assert_eq!(event["status"], 400, "{event}");
    })
    .await;
}
