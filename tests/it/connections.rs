//! Connections of clients: kept, closed, old, and misused.

use api_together::simulator::Behaviour;
use http::{Method, Version};
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::harness::{
    KEY, Proxy, Reply, behaving, chat, chat_stream, client, closed_port, endpoint, endpoint_with, h2c, in_order,
    key_of, merged, simulator, within,
};
use crate::wire::{ByHand, chunked, post_chat, request};

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_serves_requests_of_every_kind_in_turn() {
    within(async {
        let missing = r#"{"error":{"message":"no such model","code":"model_not_found"}}"#;
        let missing = Behaviour { body: Some(missing.into()), ..Behaviour::status(404) };
        let (bad, good) = (behaving(missing).await, simulator().await);
        good.script("refused", vec![Behaviour::status(400)]);
        good.script("chunks", vec![Behaviour { chunked: true, ..Behaviour::default() }]);
        good.script("moved", vec![Behaviour::status(307).header("location", "/x")]);
        let api = |id: &str, url: &str, priority: u32| {
            endpoint_with(id, url, json!({ "models": ["m*", "refused", "chunks"], "priority": priority }))
        };
        let apis = [api("a", &bad.base_url(), 0), api("b", &good.base_url(), 1)];
        let proxy = Proxy::start(json!({ "bodyBytesMax": 4096 }), &apis).await;
        let json = ["content-type: application/json"];
        let too_long = "x".repeat(5000);
        let mut wire = proxy.wire().await;
        for round in 0..3 {
            for (sent, status) in [
                (request("GET", "/health", &[], ""), 200),
                (post_chat(&chat("m")), 200),
                (request("GET", "/v1/models", &[], ""), 200),
                (post_chat(&chat_stream("m")), 200),
                (post_chat(&chat("unknown")), 404),
                (request("POST", "/v1/chat/completions", &json, "{broken"), 400),
                (post_chat(&chat("refused")), 400),
                (post_chat(&chat("chunks")), 200),
                (request("POST", "/v1/chat/completions", &json, &too_long), 413),
                (request("GET", "/v1/models/m", &[], ""), 200),
                (request("GET", "/v1/nothing?x=/v1", &[], ""), 404),
                (request("GET", "/nowhere", &[], ""), 404),
                (request("DELETE", "/v1/status", &[], ""), 405),
                (post_chat(&chat("moved")), 307),
                (post_chat(&chat("m")).replace(KEY, "wrong"), 401),
                (request("POST", "/v1/embeddings", &json, r#"{"model":"m","input":"a"}"#), 200),
            ] {
                wire.send(&sent).await;
                let (head, body) = wire.message().await;
                assert_eq!(head.status(), status, "round {round}: {sent}: {head:?} {body:?}");
                assert_ne!(head.header("connection").as_deref(), Some("close"), "{sent}");
            }
        }
        // A HEAD's answer names a length and has no body.
        wire.send(request("HEAD", "/v1/models", &[], "")).await;
        assert_eq!(wire.head().await.unwrap().status(), 200);
        wire.send(request("GET", "/health", &[], "")).await;
        assert_eq!(wire.message().await.0.status(), 200);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_may_ask_for_its_connection_to_be_closed() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        for path in ["/health", "/v1/models"] {
            let mut wire = proxy.wire().await;
            wire.send(request("GET", path, &["connection: close"], "")).await;
            wire.message().await;
            assert_eq!(wire.rest().await, "");
        }
        let mut wire = proxy.wire().await;
        wire.send(post_chat(&chat("m")).replacen("\r\n", "\r\nconnection: close\r\n", 1)).await;
        wire.message().await;
        assert_eq!(wire.rest().await, "");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http_10_client_gets_an_answer_that_the_close_ends() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::start(json!({}), &in_order([simulator.base_url().as_str(), &simulator.base_url()])).await;
        let chunked = Behaviour { chunked: true, ..Behaviour::default() };
        simulator.script("chunks", vec![chunked]);
        for (body, end) in [(chat_stream("m"), "data: [DONE]\n\n"), (chat("chunks"), "\"}"), (chat("m"), "\"}")] {
            let mut wire = proxy.wire().await;
            wire.send(post_chat(&body).replacen("HTTP/1.1", "HTTP/1.0", 1)).await;
            let head = wire.head().await.unwrap();
            assert_eq!(head.status(), 200, "{head:?}");
            assert_eq!(head.header("transfer-encoding"), None, "{head:?}");
            let text = wire.rest().await;
            assert!(text.starts_with("data: {") || text.starts_with('{'), "no chunk sizes: {text}");
            assert!(text.ends_with(end), "{text}");
        }
        let mut wire = proxy.wire().await;
        wire.send("GET /health HTTP/1.0\r\n\r\n").await;
        let (head, body) = wire.message().await;
        assert_eq!(head.status(), 200);
        assert!(body.starts_with(b"{"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_beyond_all_measure_are_refused_and_not_waited_for() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        let many = "x-many: 1\r\n".repeat(2000);
        let long = format!("x-long: {}\r\n", "y".repeat(2_000_000));
        for headers in [many, long] {
            let mut wire = proxy.wire().await;
            let sent =
                format!("GET /v1/models HTTP/1.1\r\nhost: proxy\r\nauthorization: Bearer {KEY}\r\n{headers}\r\n");
            // The proxy may close before all is sent.
            wire.try_send(sent).await.unwrap_or_default();
            if let Some(head) = wire.head().await {
                assert!(matches!(head.status(), 400 | 431), "{head:?}");
            }
        }
        proxy.chat("m").await.assert_from("a", 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_could_be_read_in_two_ways_is_refused() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        let start = format!("POST /v1/chat/completions HTTP/1.1\r\nhost: proxy\r\nauthorization: Bearer {KEY}\r\n");
        for framing in [
            "content-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
            "content-length: x\r\n\r\n",
            "content-length: -1\r\n\r\n",
            "transfer-encoding: gzip, chunked, identity\r\n\r\n0\r\n\r\n",
        ] {
            let mut wire = proxy.wire().await;
            wire.send(format!("{start}{framing}")).await;
            if let Some(head) = wire.head().await {
                assert_eq!(head.status(), 400, "{framing}");
            }
        }
        // Both framings at once: the chunks count (RFC 9112, 6.3), and nothing after them is a second request.
        let mut wire = proxy.wire().await;
        let smuggled = "GET /v1/models HTTP/1.1\r\n\r\n";
        wire.send(format!("{start}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}")).await;
        let text = wire.rest().await;
        assert!(text.matches("HTTP/1.1 ").count() <= 1, "{text}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_plain_port_speaks_http1_and_http2() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        let chat = Reply::of(h2c().post(proxy.url("/v1/chat/completions")).bearer_auth(KEY).json(&chat("m"))).await;
        chat.assert_from("a", 1);
        assert_eq!(chat.version, Version::HTTP_2);
        assert_eq!(proxy.get("/v1/models").await.version, Version::HTTP_11);
        let client = h2c();
        for (method, path, status) in [
            (Method::GET, "/health", 200),
            (Method::HEAD, "/v1/models", 200),
            (Method::GET, "/v1/status", 200),
            (Method::GET, "/nowhere", 404),
            (Method::DELETE, "/v1/status", 405),
        ] {
            let reply = Reply::of(client.request(method, proxy.url(path)).bearer_auth(KEY)).await;
            assert_eq!((reply.status, reply.version), (status, Version::HTTP_2), "{path}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_over_http2_may_be_sent_without_waiting_for_each_piece_to_be_read() {
    const BYTES: usize = 1024 * 1024;
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        let stream = TcpStream::connect(proxy.address).await.unwrap();
        let mut settings = h2::client::Builder::new();
        settings.max_send_buffer_size(BYTES);
        let (sender, connection) = settings.handshake::<_, &[u8]>(stream).await.unwrap();
        tokio::spawn(connection);
        let mut sender = sender.ready().await.unwrap();
        let request =
            http::Request::post(proxy.url("/v1/chat/completions")).header("authorization", format!("Bearer {KEY}"));
        let request = request.body(()).unwrap();
        let (_answer, mut body) = sender.send_request(request, false).unwrap();
        body.reserve_capacity(BYTES);
        while body.capacity() < BYTES {
            std::future::poll_fn(|context| body.poll_capacity(context)).await.expect("room").unwrap();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_once_each_get_their_own_answer() {
    within(async {
        let (a, b) = (simulator().await, simulator().await);
        a.set_default(Behaviour::status(503));
        let server = json!({ "breaker": { "failures": 1_000_000 } });
        let b_api = endpoint_with("b", &b.base_url(), json!({ "http2": true, "priority": 1 }));
        let proxy = Proxy::start(server, &[endpoint("a", &a.base_url()), b_api]).await;
        let mut calls = tokio::task::JoinSet::new();
        for (index, client) in
            [h2c(), crate::harness::client(reqwest::ClientBuilder::http1_only)].into_iter().enumerate()
        {
            for number in 0..60 {
                let model = format!("model-{index}-{number}");
                let body = if number % 2 == 0 { chat(&model) } else { chat_stream(&model) };
                let call = client.post(proxy.url("/v1/chat/completions")).bearer_auth(KEY).json(&body);
                calls.spawn(async move { (model, Reply::of(call).await) });
            }
        }
        for (model, reply) in calls.join_all().await {
            reply.assert_from("b", 2);
            assert!(reply.text().contains(&format!("\"{model}\"")), "{model}: {}", reply.text());
        }
        assert_eq!((a.requests().len(), b.requests().len()), (120, 120));
        assert!(b.connections() < 60, "streams share the endpoint's HTTP/2 connections");
        for id in ["a", "b"] {
            proxy.until_status(id, "inFlight", json!(0)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offer_to_upgrade_to_http2_is_left_alone() {
    within(async {
        let (bad, good) = (behaving(Behaviour::status(503)).await, simulator().await);
        let api = |id: &str, url: &str, name: &str, priority: u32| {
            endpoint_with(id, url, json!({ "modelMapping": { "m": name }, "priority": priority }))
        };
        let apis = [api("a", &bad.base_url(), "theirs-a", 0), api("b", &good.base_url(), "theirs-b", 1)];
        let proxy = Proxy::start(json!({ "bodyBytesMax": 2048 }), &apis).await;
        // As `curl --http2` sends it.
        let headers = [
            "connection: Upgrade, HTTP2-Settings",
            "upgrade: h2c",
            "http2-settings: AAMAAABkAAQAoAAAAAIAAAAA",
            "content-type: application/json",
        ];
        let post = |body: &str| request("POST", "/v1/chat/completions", &headers, body);
        let mut wire = proxy.wire().await;
        for round in 1..=2 {
            wire.send(post(r#"{"model":"m","n":1}"#)).await;
            let (head, body) = wire.message().await;
            let attempts = head.header("x-api-together-attempts");
            assert_eq!((head.status(), attempts.as_deref()), (200, Some("2")), "{head:?} {body:?}");
            assert_eq!(head.header("upgrade"), None);
            for (endpoint, name) in [(&bad, "theirs-a"), (&good, "theirs-b")] {
                let arrived = endpoint.requests();
                assert_eq!(arrived.len(), round);
                let last = &arrived[round - 1];
                assert_eq!(last.body, format!(r#"{{"model":"{name}","n":1}}"#));
                for gone in ["upgrade", "http2-settings"] {
                    assert_eq!(last.header(gone), None, "{last:?}");
                }
                let connection = last.header("connection").unwrap_or_default().to_lowercase();
                assert!(!connection.contains("upgrade") && !connection.contains("http2"), "{connection}");
            }
        }
        wire.send(post(&format!(r#"{{"model":"m","x":"{}"}}"#, "x".repeat(4096)))).await;
        assert_eq!(wire.message().await.0.status(), 413);
        assert_eq!(bad.requests().len(), 2);
    })
    .await;
}

/// A request to open a WebSocket.
pub(crate) fn websocket(path: &str) -> String {
    let headers = [
        "connection: Upgrade",
        "upgrade: websocket",
        "sec-websocket-version: 13",
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
    ];
    request("GET", path, &headers, "")
}

/// An endpoint that plays the WebSocket's other side, behind a proxy that would ask another one first.
async fn before_by_hand(by_hand: &ByHand) -> Proxy {
    let apis = [
        endpoint_with("other", &closed_port(), json!({ "models": ["else"] })),
        endpoint_with("a", &by_hand.base_url(), json!({ "models": ["vendor/talk"], "priority": 1 })),
    ];
    Proxy::start(json!({}), &apis).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_goes_to_its_models_endpoint_and_both_ways() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = before_by_hand(&by_hand).await;
        let mut wire = proxy.wire().await;
        wire.send(websocket("/v1/realtime?model=vendor%2Ftalk&x=1")).await;
        let (mut endpoint, head, _) = by_hand.call().await;
        assert_eq!(head.line, "GET /v1/realtime?model=vendor%2Ftalk&x=1 HTTP/1.1");
        for (name, value) in [
            ("authorization", format!("Bearer {}", key_of("a")).as_str()),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ] {
            assert_eq!(head.header(name).as_deref(), Some(value), "{name}: {head:?}");
        }
        assert!(head.header("connection").unwrap().eq_ignore_ascii_case("upgrade"), "{head:?}");
        let accept = "sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";
        endpoint
            .send(format!(
                "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n{accept}\r\n\r\n"
            ))
            .await;
        let head = wire.head().await.unwrap();
        assert_eq!((head.status(), head.header("upgrade").as_deref()), (101, Some("websocket")), "{head:?}");
        assert_eq!(head.header("sec-websocket-accept").as_deref(), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
        assert_eq!(head.header("x-api-together-endpoint").as_deref(), Some("a"));
        assert_eq!(head.header("x-api-together-attempts").as_deref(), Some("1"));
        // Bytes that look like HTTP are none of the proxy's business any more.
        for sent in [b"\x81\x85\0\0\0\0hello".as_slice(), b"GET / HTTP/1.1\r\n\r\n", &vec![0xff; 100_000]] {
            wire.send(sent).await;
            let arrived = endpoint.exactly(sent.len()).await.unwrap();
            assert!(arrived == sent, "{} bytes to the endpoint", sent.len());
            endpoint.send(&arrived).await;
            assert!(wire.exactly(sent.len()).await.unwrap() == sent, "{} bytes to the client", sent.len());
        }
        // The endpoint may speak first as well.
        endpoint.send("unasked").await;
        assert_eq!(wire.exactly(7).await.unwrap(), "unasked");
        assert_eq!(proxy.status_of("a").await["inFlight"], 1);
        drop(endpoint);
        assert_eq!(wire.rest().await, "");
        proxy.until_status("a", "inFlight", json!(0)).await;
        assert_eq!(proxy.status_of("a").await["errorCount"], 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_without_a_model_is_sent_to_http() {
    within(async {
        let by_hand = ByHand::bind().await;
        let apis = [endpoint_with("a", &by_hand.base_url(), json!({ "models": ["*"] }))];
        let proxy = Proxy::start(json!({}), &apis).await;
        for path in ["/v1/responses", "/responses", "/v1/realtime", "/v1/realtime?model=", "/v1/realtime?call_id="] {
            let mut wire = proxy.wire().await;
            wire.send(websocket(path)).await;
            let (head, body) = wire.message().await;
            assert_eq!(head.status(), 426, "{path}: {head:?}");
            let error: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(error["error"]["code"], "websocket_model_unknown", "{path}");
        }
        assert_eq!(proxy.status_of("a").await["usage"]["rpd"], 0);
        // A call that is going on has its model.
        let mut wire = proxy.wire().await;
        wire.send(websocket("/v1/realtime?call_id=rtc_1")).await;
        let (_endpoint, head, _) = by_hand.call().await;
        assert_eq!(head.line, "GET /v1/realtime?call_id=rtc_1 HTTP/1.1");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browsers_websocket_carries_its_key_in_a_subprotocol() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = before_by_hand(&by_hand).await;
        let offered = format!("realtime, openai-insecure-api-key.{KEY}, openai-beta.realtime-v1");
        let request = websocket("/v1/realtime?model=vendor%2Ftalk");
        let (line, rest) = request.split_once("\r\n").unwrap();
        let rest: Vec<&str> = rest.split("\r\n").filter(|line| !line.starts_with("authorization")).collect();
        let request = format!(
            "{line}\r\norigin: https://page.example\r\nsec-websocket-protocol: {offered}\r\n{}",
            rest.join("\r\n")
        );
        let mut wire = proxy.wire().await;
        wire.send(request).await;
        let (mut endpoint, head, _) = by_hand.call().await;
        assert_eq!(head.header("sec-websocket-protocol").as_deref(), Some("realtime, openai-beta.realtime-v1"));
        assert_eq!(head.header("authorization"), Some(format!("Bearer {}", key_of("a"))));
        assert_eq!(head.header("origin"), None);
        let answer = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
                      sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nsec-websocket-protocol: realtime\r\n\r\n";
        endpoint.send(answer).await;
        let head = wire.head().await.unwrap();
        assert_eq!((head.status(), head.header("sec-websocket-protocol").as_deref()), (101, Some("realtime")));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_that_is_refused_tells_no_key() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = before_by_hand(&by_hand).await;
        let key = key_of("a");
        let refusal = format!(r#"{{"error":{{"message":"Incorrect API key provided: {key}."}}}}"#);
        let cut = refusal.find(&key).unwrap() + key.len() / 2;
        let (first, second) = refusal.split_at(cut);
        for (framing, body) in [
            (format!("content-length: {}", refusal.len()), refusal.clone()),
            ("transfer-encoding: chunked".into(), format!("{}0\r\n\r\n", chunked(&refusal))),
            ("transfer-encoding: chunked".into(), format!("{}{}0\r\n\r\n", chunked(first), chunked(second))),
        ] {
            let mut wire = proxy.wire().await;
            wire.send(websocket("/v1/realtime?model=vendor%2Ftalk")).await;
            let (mut endpoint, ..) = by_hand.call().await;
            let head = "HTTP/1.1 401 Unauthorized\r\nconnection: close\r\ncontent-type: application/json";
            endpoint.send(format!("{head}\r\nx-debug: {key}\r\n{framing}\r\n\r\n{body}")).await;
            let (head, body) = wire.message().await;
            assert_eq!((head.status(), head.header("x-debug")), (401, None), "{head:?}");
            assert_eq!(body, refusal.replace(&key, &"*".repeat(key.len())), "{framing}");
        }
        proxy.until_status("a", "errorCount", json!(3)).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_redacted_in_every_form_in_which_an_endpoint_may_write_it() {
    within(async {
        let key = "sk/with+signs=0123";
        let by_hand = ByHand::bind().await;
        let api = merged(endpoint_with("a", &by_hand.base_url(), json!({})), json!({ "apiKey": key }));
        let proxy = Proxy::start(json!({}), &[api]).await;
        for form in [r"sk\/with+signs=0123", r"sk\u002fwith\u002Bsigns\u003d0123", "sk%2Fwith%2Bsigns%3D0123", key] {
            for asks in ["an answer", "a websocket"] {
                let refusal = format!(r#"{{"error":{{"message":"Incorrect API key: {form}."}}}}"#);
                let mut wire = proxy.wire().await;
                let request = match asks {
                    "an answer" => request("GET", "/v1/files", &[], ""),
                    _ => websocket("/v1/realtime?model=m"),
                };
                wire.send(request).await;
                let (mut endpoint, ..) = by_hand.call().await;
                let head = "HTTP/1.1 418 I'm a teapot\r\nconnection: close\r\ncontent-type: application/json";
                let length = refusal.len();
                endpoint.send(format!("{head}\r\nx-debug: {form}\r\ncontent-length: {length}\r\n\r\n{refusal}")).await;
                let (head, body) = wire.message().await;
                assert_eq!((head.status(), head.header("x-debug")), (418, None), "{asks} {form}: {head:?}");
                assert_eq!(body, refusal.replace(form, &"*".repeat(form.len())), "{asks}");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn interim_answers_are_not_sent_on_and_a_flood_of_them_is_given_up() {
    within(async {
        let by_hand = ByHand::bind().await;
        let spare = simulator().await;
        let apis = [
            endpoint_with("a", &by_hand.base_url(), json!({})),
            endpoint_with("b", &spare.base_url(), json!({ "priority": 1 })),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        let key = key_of("a");
        let hint = format!("HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\nx-debug: {key}\r\n\r\n");
        let ok = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n[]";
        let switch = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\nhello";
        // A few are read past, before an answer and before a switch of protocols.
        let mut wire = proxy.wire().await;
        wire.send(request("GET", "/v1/anything", &[], "")).await;
        let (mut endpoint, ..) = by_hand.call().await;
        endpoint.send(hint.repeat(20) + ok).await;
        let (head, body) = wire.message().await;
        assert_eq!((head.status(), &body[..]), (200, &b"[]"[..]));
        let mut wire = proxy.wire().await;
        wire.send(websocket("/v1/realtime?model=m")).await;
        endpoint.message().await;
        endpoint.send(hint.repeat(20) + switch).await;
        let head = wire.head().await.unwrap();
        assert_eq!((head.status(), head.header("x-debug")), (101, None), "{head:?}");
        assert_eq!(wire.exactly(5).await.unwrap(), "hello");
        drop(endpoint);
        // An endpoint that sends nothing else is given up, for another.
        let mut wire = proxy.wire().await;
        wire.send(post_chat(&chat("m"))).await;
        let (mut endpoint, ..) = by_hand.call().await;
        endpoint.try_send(hint.repeat(5000)).await.unwrap_or_default();
        let (head, _) = wire.message().await;
        assert_eq!((head.status(), head.header("x-api-together-endpoint").as_deref()), (200, Some("b")));
        let mut wire = proxy.wire().await;
        wire.send(websocket("/v1/realtime?model=m")).await;
        let (mut endpoint, ..) = by_hand.call().await;
        endpoint.try_send(hint.repeat(5000)).await.unwrap_or_default();
        let (head, _) = wire.message().await;
        assert_ne!(head.header("x-api-together-endpoint").as_deref(), Some("a"), "{head:?}");
        assert_eq!(proxy.status_of("a").await["errorCount"], 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_without_a_size_is_refused_and_nothing_after_it_is_served() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        let headers = ["content-type: application/json", "transfer-encoding: chunked"];
        let post = request("POST", "/v1/chat/completions", &headers, "");
        let smuggled = request("GET", "/v1/models", &[], "");
        for broken in ["zz\r\n", "5\r\n{\"mod\r\nzz\r\n", "-1\r\n"] {
            let mut wire = proxy.wire().await;
            wire.send(format!("{post}{broken}{smuggled}")).await;
            let (head, body) = wire.message().await;
            assert_eq!((head.status(), head.header("connection").as_deref()), (400, Some("close")), "{broken:?}");
            let error: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(error["error"]["type"], "invalid_request_error", "{error}");
            assert_eq!(wire.rest().await, "", "{broken:?}");
        }
        assert_eq!(simulator.connections(), 0);
        assert_eq!(proxy.status_of("a").await["errorCount"], 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_no_endpoint_would_take_is_refused() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        let path = format!("/v1/files/{}", "x".repeat(20_000));
        let query = format!("/v1/files?after={}", "x".repeat(20_000));
        for client in [client(reqwest::ClientBuilder::http1_only), h2c()] {
            for path in [&path, &query] {
                let reply = Reply::of(client.get(proxy.url(path)).bearer_auth(KEY)).await;
                let message = reply.assert_error(414, "invalid_request_error", "uri_too_long");
                assert!(message.contains("16384 bytes"), "{message}");
            }
        }
        assert_eq!(simulator.connections(), 0);
        assert_eq!(proxy.status_of("a").await["errorCount"], 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_strange_connection_header_is_served_or_refused_with_a_word() {
    within(async {
        let (first, second) = (simulator().await, simulator().await);
        let proxy = Proxy::before([&first, &second]).await;
        for value in ["x-forwarded-for", "\"a b\"", "a b", "authorization", "content-length", "host", ",,", "x-none"] {
            let connection = format!("connection: {value}");
            let headers = ["content-type: application/json", "x-forwarded-for: 192.0.2.1", &connection];
            let mut wire = proxy.wire().await;
            wire.send(request("POST", "/v1/chat/completions", &headers, r#"{"model":"m"}"#)).await;
            let head = wire.head().await.unwrap_or_else(|| panic!("{value}: closed without a word"));
            let body = wire.body(&head).await;
            let answer: Value = serde_json::from_slice(&body).unwrap();
            match head.status() {
                200 => assert!(answer["choices"].is_array(), "{value}: {answer}"),
                400 => assert_eq!(answer["error"]["type"], "invalid_request_error", "{value}: {answer}"),
                status => panic!("{value}: {status} {answer}"),
            }
            for id in ["a", "b"] {
                assert_eq!(proxy.status_of(id).await["errorCount"], 0, "{value}");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_websocket_goes_to_another_endpoint_under_its_name_there() {
    within(async {
        let (first, second) = (ByHand::bind().await, ByHand::bind().await);
        for refusal in [
            "HTTP/1.1 429 Too Many Requests\r\nretry-after: 9\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}",
            "HTTP/1.1 426 Upgrade Required\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 503 Service Unavailable\r\ntransfer-encoding: chunked\r\n\r\n3\r\nbad\r\n0\r\n\r\n",
            // Closed without a word.
            "",
        ] {
            let api = |id: &str, by_hand: &ByHand, priority: u32, name: &str| {
                let mapping = json!({ "models": [], "modelMapping": { "talk": name }, "priority": priority });
                endpoint_with(id, &by_hand.base_url(), mapping)
            };
            let apis = [api("a", &first, 0, "a/realtime 1"), api("b", &second, 1, "b-realtime")];
            let proxy = Proxy::start(json!({}), &apis).await;
            let mut wire = proxy.wire().await;
            wire.send(websocket("/v1/realtime?x=1&model=talk")).await;
            let (mut refuses, head, _) = first.call().await;
            assert_eq!(head.line, "GET /v1/realtime?model=a%2Frealtime%201&x=1 HTTP/1.1");
            refuses.send(refusal).await;
            drop(refuses);
            let (mut endpoint, head, _) = second.call().await;
            assert_eq!(head.line, "GET /v1/realtime?model=b-realtime&x=1 HTTP/1.1");
            assert_eq!(head.header("authorization"), Some(format!("Bearer {}", key_of("b"))));
            endpoint
                .send("HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\nhello")
                .await;
            let head = wire.head().await.unwrap();
            assert_eq!(
                (head.status(), head.header("x-api-together-attempts").as_deref()),
                (101, Some("2")),
                "{refusal}"
            );
            assert_eq!(wire.exactly(5).await.unwrap(), "hello");
            wire.send("and back").await;
            assert_eq!(endpoint.exactly(8).await.unwrap(), "and back");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_http_calls_of_realtime_go_to_their_models_endpoint() {
    within(async {
        let simulator = behaving(Behaviour { body: Some(r#"{"value":"ek_1"}"#.into()), ..Behaviour::default() }).await;
        let mapping = json!({ "models": [], "modelMapping": { "talk": "gpt-realtime" } });
        let apis = [
            endpoint_with("other", &closed_port(), json!({ "models": ["else"] })),
            endpoint_with("a", &simulator.base_url(), mapping),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        let settings = |model: &str| format!(r#"{{"session":{{"type":"realtime","model":"{model}"}}}}"#);
        proxy.post_text("/v1/realtime/client_secrets", settings("talk")).await.assert_from("a", 1);
        assert_eq!(simulator.requests()[0].body, settings("gpt-realtime"));
        proxy.post("/v1/realtime/sessions", &json!({ "model": "talk" })).await.assert_from("a", 1);
        assert_eq!(simulator.requests()[1].body, r#"{"model":"gpt-realtime"}"#);
        let call =
            proxy.request(Method::POST, "/v1/realtime/calls?model=talk").header("content-type", "application/sdp");
        Reply::of(call.body("v=0")).await.assert_from("a", 1);
        let arrived = simulator.requests().pop().unwrap();
        assert_eq!(
            (arrived.path_and_query.as_str(), &arrived.body[..]),
            ("/v1/realtime/calls?model=gpt-realtime", &b"v=0"[..])
        );
    })
    .await;
}
