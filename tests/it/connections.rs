//! Connections of clients: kept, closed, old, and misused.

use api_together::simulator::Behaviour;
use http::{Method, Version};
use serde_json::json;

use crate::harness::{
    KEY, Proxy, Reply, behaving, chat, chat_stream, endpoint, endpoint_with, h2c, in_order, simulator, within,
};
use crate::wire::{post_chat, request};

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_serves_requests_of_every_kind_in_turn() {
    within(async {
        let (bad, good) = (behaving(Behaviour::status(404)).await, simulator().await);
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
                assert_eq!(head.status(), 400);
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
