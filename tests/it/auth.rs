//! Who may call.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use http::Method;
use serde_json::json;

use crate::harness::{KEY, Proxy, Reply, chat, client, endpoint, simulator, within};

#[tokio::test(flavor = "multi_thread")]
async fn the_key_opens_and_nothing_else_does() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        let bearer = format!("Bearer {KEY}");
        let lower = format!("bearer {KEY}");
        let longer = format!("Bearer {KEY}x");
        let shorter = format!("Bearer {}", &KEY[..KEY.len() - 1]);
        let basic = format!("Basic {KEY}");
        for (header, value, opens) in [
            ("authorization", bearer.as_str(), true),
            ("authorization", KEY, true),
            ("authorization", &lower, true),
            ("x-api-key", KEY, true),
            ("api-key", KEY, true),
            ("authorization", &longer, false),
            ("authorization", &shorter, false),
            ("authorization", &basic, false),
            ("authorization", "Bearer wrong", false),
            ("authorization", "wrong", false),
            ("x-api-key", "wrong", false),
        ] {
            let request = proxy.request_without_key(Method::POST, "/v1/chat/completions").header(header, value);
            let reply = Reply::of(request.json(&chat("m"))).await;
            if opens {
                reply.assert_from("a", 1);
            } else {
                let message = reply.assert_error(401, "invalid_request_error", "invalid_api_key");
                assert_eq!(reply.header("x-should-retry"), Some("false"), "clients must not try it for minutes");
                assert!(message.starts_with("Incorrect API key"), "{header}: {value}: {message}");
            }
        }
        assert_eq!(simulator.requests().len(), 5, "only the right keys went on");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_key_every_path_but_health_is_shut() {
    within(async {
        let simulator = simulator().await;
        let server = json!({ "failedKeysPerMinute": 0 });
        let proxy = Proxy::start(server, &[endpoint("a", &simulator.base_url())]).await;
        for (method, path) in [
            (Method::GET, "/v1/models"),
            (Method::GET, "/v1/models/m"),
            (Method::GET, "/v1/status"),
            (Method::POST, "/v1/chat/completions"),
            (Method::OPTIONS, "/v1/chat/completions"),
            (Method::POST, "/index.html"),
            (Method::GET, "/nowhere"),
            (Method::TRACE, "/v1/models"),
        ] {
            for authorization in [None, Some(""), Some("Bearer"), Some("Bearer ")] {
                let mut request = proxy.request_without_key(method.clone(), path);
                if let Some(value) = authorization {
                    request = request.header("authorization", value);
                }
                let reply = Reply::of(request).await;
                let message = reply.assert_error(401, "invalid_request_error", "invalid_api_key");
                assert!(message.starts_with("No API key"), "{method} {path} {authorization:?}: {message}");
            }
        }
        let health = Reply::of(proxy.request_without_key(Method::GET, "/health")).await;
        assert_eq!(health.status, 200);
        assert!(simulator.requests().is_empty());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_to_switch_protocols_needs_the_key() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        for key in ["", "authorization: Bearer wrong\r\n"] {
            let mut wire = proxy.wire().await;
            wire.send(format!(
                "GET /v1/realtime?model=m HTTP/1.1\r\nhost: proxy\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                 sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n{key}\r\n"
            ))
            .await;
            assert_eq!(wire.head().await.unwrap().status(), 401, "{key}");
        }
        assert_eq!(simulator.connections(), 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn browsers_may_ask_before_they_send_the_key() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        let preflight = |proxy: &Proxy, origin: &str| {
            proxy
                .request_without_key(Method::OPTIONS, "/v1/chat/completions")
                .header("origin", origin)
                .header("access-control-request-method", "POST")
                .header("access-control-request-headers", "authorization,content-type")
        };
        let reply = Reply::of(preflight(&proxy, "https://chat.example.com")).await;
        assert_eq!((reply.status, reply.body.len()), (204, 0));
        assert_eq!(reply.header("access-control-allow-origin"), Some("*"));
        assert_eq!(reply.header("access-control-allow-headers"), Some("authorization,content-type"));
        assert!(reply.header("access-control-allow-methods").unwrap().contains("POST"));
        assert!(simulator.requests().is_empty());
        let answer = proxy.request(Method::POST, "/v1/chat/completions").header("origin", "https://any.example");
        let answer = Reply::of(answer.json(&chat("m"))).await;
        assert_eq!(answer.header("access-control-allow-origin"), Some("*"));

        let narrow = json!({ "cors": { "origins": ["https://chat.example.com"] } });
        let narrow = Proxy::start(narrow, &[endpoint("a", &simulator.base_url())]).await;
        let reply = Reply::of(preflight(&narrow, "https://chat.example.com")).await;
        assert_eq!(reply.header("access-control-allow-origin"), Some("https://chat.example.com"));
        assert_eq!(reply.header("vary"), Some("origin"));
        let reply = Reply::of(preflight(&narrow, "https://evil.example")).await;
        assert_eq!(reply.header("access-control-allow-origin"), None);
    })
    .await;
}

/// One request on a connection of its own, from an address of this machine, and how long its answer took.
async fn ask_from(proxy: &Proxy, last: u8, key: &str) -> (u16, String, Duration) {
    let begun = Instant::now();
    let client = client(|builder| builder.http1_only().local_address(IpAddr::from([127, 0, 8, last])));
    let reply = Reply::of(client.get(proxy.url("/v1/models")).bearer_auth(key)).await;
    let mut headers = reply.headers.clone();
    for own in ["x-request-id", "date"] {
        headers.remove(own);
    }
    (reply.status, format!("{headers:?} {}", reply.text()), begun.elapsed())
}

/// The status of some requests, which is the same for all, and the shortest time that one took: a busy machine makes
/// one answer late, and only the proxy makes all of them late.
async fn fastest_from(proxy: &Proxy, last: u8, key: &str) -> (u16, Duration) {
    let (status, _, mut fastest) = ask_from(proxy, last, key).await;
    for _ in 0..4 {
        let (again, _, took) = ask_from(proxy, last, key).await;
        assert_eq!(again, status, "the same key, and another answer");
        fastest = fastest.min(took);
    }
    (status, fastest)
}

#[tokio::test(flavor = "multi_thread")]
async fn guessing_on_tells_nothing_and_callers_are_let_in() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::start(json!({ "failedKeysPerMinute": 3 }), &[endpoint("a", &simulator.base_url())]).await;
        // An office that has a caller, and somebody elsewhere.
        let (office, elsewhere) = (1, 2);
        assert_eq!(ask_from(&proxy, office, KEY).await.0, 200);
        for from in [office, elsewhere] {
            for number in 0..3 {
                // An old key that is used again and again is no guess.
                let (status, took) = fastest_from(&proxy, from, &format!("wrong{number}")).await;
                assert!(status == 401 && took < Duration::from_millis(900), "{status} after {took:?}");
            }
        }
        let (status, wrong, took) = ask_from(&proxy, elsewhere, "wrong3").await;
        assert!(status == 429 && took >= Duration::from_secs(1), "{status} after {took:?}");
        assert!(wrong.contains("rate_limit_exceeded") && wrong.contains("\"retry-after\": \"60\""), "{wrong}");
        let (status, right, took) = ask_from(&proxy, elsewhere, KEY).await;
        assert!(status == 429 && took >= Duration::from_secs(1), "{status} after {took:?}");
        assert_eq!(right, wrong, "the answer tells whether the guess is right");
        assert_eq!(ask_from(&proxy, office, "wrong3").await.0, 429);
        let (status, took) = fastest_from(&proxy, office, KEY).await;
        assert!(status == 200 && took < Duration::from_millis(900), "{status} after {took:?}");
        assert_eq!(ask_from(&proxy, 3, KEY).await.0, 200, "other addresses have no part in it");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_trusted_proxy_each_client_is_slowed_on_its_own() {
    within(async {
        let simulator = simulator().await;
        let server = |trusted: &[&str]| json!({ "failedKeysPerMinute": 1, "trustedProxies": trusted });
        let apis = [endpoint("a", &simulator.base_url())];
        let trusting = Proxy::start(server(&["127.0.0.0/8"]), &apis).await;
        let mut wrong = 0;
        let trusting_nobody = Proxy::start(server(&[]), &apis).await;
        for (proxy, forwarded, status) in [
            (&trusting, "192.0.2.1", 401),
            (&trusting, "192.0.2.1", 429),
            (&trusting, "192.0.2.2", 401),
            (&trusting, "192.0.2.9, 192.0.2.3", 401),
            (&trusting, "192.0.2.8, 192.0.2.3", 429),
            (&trusting_nobody, "192.0.2.1", 401),
            (&trusting_nobody, "192.0.2.2", 429),
        ] {
            wrong += 1;
            let key = format!("wrong{wrong}");
            let request = proxy.request_without_key(Method::GET, "/v1/models").bearer_auth(key);
            let reply = Reply::of(request.header("x-forwarded-for", forwarded)).await;
            assert_eq!(reply.status, status, "{forwarded}");
        }
    })
    .await;
}
