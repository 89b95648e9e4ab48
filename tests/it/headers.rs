//! Which headers go on, in either direction.

use api_together::simulator::Behaviour;
use http::Method;
use serde_json::json;

use crate::harness::{KEY, Proxy, Reply, behaving, chat, endpoint_with, in_order, key_of, simulator, until, within};
use crate::wire::{ByHand, request};

#[tokio::test(flavor = "multi_thread")]
async fn the_endpoint_gets_its_own_key_and_none_of_the_clients_secrets() {
    within(async {
        let simulator = simulator().await;
        for http2 in [false, true] {
            simulator.clear();
            let api = endpoint_with("a", &simulator.base_url(), json!({ "http2": http2 }));
            let proxy = Proxy::start(json!({}), &[api]).await;
            let call = proxy.request(Method::POST, "/v1/chat/completions").json(&chat("m"));
            let call = call.header("x-api-key", KEY).header("api-key", KEY).header("cookie", "session=secret");
            let call = call.header("proxy-authorization", "Basic secret").header("x-forwarded-for", "192.0.2.1");
            let call = call.header("x-forwarded-host", "inside.example").header("forwarded", "for=192.0.2.1");
            let call = call.header("x-real-ip", "192.0.2.1").header("via", "1.1 inside");
            let call = call.header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
            let call = call.header("tracestate", "vendor=x").header("openai-beta", "assistants=v2");
            let call = call.header("user-agent", "client/1.0").header("accept-encoding", "gzip, br");
            Reply::of(call).await.assert_from("a", 1);
            let arrived = &simulator.requests()[0];
            assert_eq!(arrived.headers.get_all("authorization").iter().count(), 1);
            assert_eq!(arrived.header("authorization"), Some(format!("Bearer {}", key_of("a")).as_str()));
            for gone in [
                "x-api-key",
                "api-key",
                "cookie",
                "proxy-authorization",
                "x-forwarded-for",
                "x-forwarded-host",
                "forwarded",
                "x-real-ip",
                "via",
            ] {
                assert_eq!(arrived.header(gone), None, "{gone}");
            }
            let all =
                format!("{:?}", arrived.headers.iter().map(|(_, value)| value.as_bytes()).collect::<Vec<_>>().concat());
            let key = format!("{:?}", KEY.as_bytes());
            assert!(!all.contains(key.trim_matches(['[', ']'])), "the client's key goes nowhere");
            for (name, value) in [
                ("tracestate", "vendor=x"),
                ("openai-beta", "assistants=v2"),
                ("user-agent", "client/1.0"),
                ("content-type", "application/json"),
                ("accept-encoding", "identity"),
            ] {
                assert_eq!(arrived.header(name), Some(value), "{name}");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hop_by_hop_headers_of_the_client_stay_behind() {
    within(async {
        let by_hand = ByHand::bind().await;
        let forward = json!({ "forwardHeaders": ["x-*"] });
        let proxy = Proxy::start(forward, &in_order([by_hand.base_url().as_str()])).await;
        let mut wire = proxy.wire().await;
        let headers = [
            "connection: keep-alive, X-Private, close",
            "keep-alive: timeout=5",
            "te: trailers",
            "x-private: 1",
            "proxy-connection: keep-alive",
            "x-public: 2",
            "content-type: application/json",
            "X-Upper-Case: 3",
        ];
        wire.send(request("POST", "/v1/chat/completions", &headers, r#"{"model":"m"}"#)).await;
        let (mut endpoint, head, _) = by_hand.call().await;
        for gone in ["keep-alive", "te", "x-private", "proxy-connection", "transfer-encoding", "upgrade"] {
            assert_eq!(head.header(gone), None, "{gone}: {head:?}");
        }
        assert!(!head.header("connection").unwrap_or_default().to_lowercase().contains("private"), "{head:?}");
        assert_eq!(
            (head.header("x-public").as_deref(), head.header("x-upper-case").as_deref()),
            (Some("2"), Some("3"))
        );
        let answer = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 26\r\nkeep-alive: timeout=5\r\n\
                      connection: X-Theirs\r\nx-theirs: 1\r\nproxy-authenticate: Basic\r\nx-public: 2\r\n\r\n{\"choices\":[{\"text\":\"1\"}]}";
        endpoint.send(answer).await;
        let (head, body) = wire.message().await;
        assert_eq!((head.status(), body.len()), (200, 26));
        assert_eq!(head.header("x-public").as_deref(), Some("2"));
        for gone in ["keep-alive", "proxy-authenticate", "x-theirs"] {
            assert_eq!(head.header(gone), None, "{gone}: {head:?}");
        }
    })
    .await;
}

/// Headers that browsers, proxies, content networks and SDKs put in, none of which an endpoint is to see.
const OF_THE_WAY: [(&str, &str); 24] = [
    ("origin", "https://page.example"),
    ("referer", "https://page.example/chat"),
    ("sec-fetch-mode", "cors"),
    ("sec-fetch-site", "cross-site"),
    ("sec-ch-ua", "\"Chromium\";v=\"140\""),
    ("sec-ch-ua-platform", "\"Linux\""),
    ("dnt", "1"),
    ("cache-control", "no-cache"),
    ("accept-language", "de"),
    ("cookie", "session=1"),
    ("cf-connecting-ip", "192.0.2.1"),
    ("cf-ray", "8f1"),
    ("cf-visitor", "{}"),
    ("cdn-loop", "cloudflare"),
    ("true-client-ip", "192.0.2.1"),
    ("x-forwarded-for", "192.0.2.1"),
    ("x-forwarded-proto", "https"),
    ("x-real-ip", "192.0.2.1"),
    ("forwarded", "for=192.0.2.1"),
    ("via", "1.1 inside"),
    ("openai-organization", "org-1"),
    ("openai-project", "proj-1"),
    ("x-csrf-token", "t"),
    ("authorization", "Bearer of-somebody-else"),
];

#[tokio::test(flavor = "multi_thread")]
async fn what_belongs_to_the_way_to_us_stays_with_us() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        // The key stands elsewhere, and opens nevertheless.
        let mut call = proxy.request_without_key(Method::POST, "/v1/chat/completions").header("x-goog-api-key", KEY);
        for (name, value) in OF_THE_WAY {
            call = call.header(name, value);
        }
        let call = call.header("anthropic-version", "2023-06-01").header("http-referer", "https://app.example");
        Reply::of(call.json(&chat("m"))).await.assert_from("a", 1);
        let arrived = &simulator.requests()[0];
        for (name, _) in OF_THE_WAY {
            let own = if name == "authorization" { Some(format!("Bearer {}", key_of("a"))) } else { None };
            assert_eq!(arrived.header(name), own.as_deref(), "{name}");
        }
        assert_eq!(arrived.header("anthropic-version"), Some("2023-06-01"));
        assert_eq!(arrived.header("http-referer"), Some("https://app.example"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_opens_wherever_it_stands_and_goes_nowhere() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        let quoted = format!("mine is {KEY}");
        for (name, query) in [
            ("authorization", ""),
            ("x-api-key", ""),
            ("api-key", ""),
            ("x-goog-api-key", ""),
            ("sec-websocket-protocol", ""),
            ("x-title", &format!("?key={KEY}&beta=true")),
        ] {
            simulator.clear();
            let path = format!("/v1/chat/completions{query}");
            let mut call = proxy.request_without_key(Method::POST, &path);
            for other in ["authorization", "x-api-key", "api-key", "x-goog-api-key"] {
                if other != name {
                    call = call.header(other, "wrong");
                }
            }
            let value = match name {
                "sec-websocket-protocol" => format!("openai-insecure-api-key.{KEY}"),
                _ => KEY.to_owned(),
            };
            Reply::of(call.header(name, value).header("user-agent", &quoted).json(&chat("m")))
                .await
                .assert_from("a", 1);
            let arrived = &simulator.requests()[0];
            let expected = if query.is_empty() { "/v1/chat/completions" } else { "/v1/chat/completions?beta=true" };
            assert_eq!(arrived.path_and_query, expected);
            for (header, value) in &arrived.headers {
                assert!(!value.to_str().unwrap().contains(KEY), "{name}: {header}");
            }
        }
        let wrong = proxy.request_without_key(Method::POST, "/v1/chat/completions?key=wrong").json(&chat("m"));
        Reply::of(wrong).await.assert_error(401, "invalid_request_error", "invalid_api_key");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_belongs_to_a_vendors_site_stays_with_it() {
    within(async {
        let gone = [
            "strict-transport-security",
            "report-to",
            "nel",
            "set-cookie",
            "cf-ray",
            "server",
            "openai-organization",
            "anthropic-organization-id",
            "clear-site-data",
            "content-security-policy",
            "www-authenticate",
        ];
        let kept = ["openai-processing-ms", "openai-version", "retry-after", "x-should-retry", "request-id"];
        for status in [200, 400, 503] {
            let behaviour = gone.iter().chain(&kept).fold(Behaviour::status(status), |b, name| b.header(name, "1"));
            let simulator = behaving(behaviour).await;
            let proxy = Proxy::before([&simulator]).await;
            let reply = proxy.chat("m").await;
            assert_eq!(reply.status, status);
            for name in gone {
                assert_eq!(reply.header(name), None, "{name}");
            }
            for name in kept {
                assert_eq!(reply.header(name), Some("1"), "{name}");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoints_extra_headers_stand_in_place_of_the_clients() {
    within(async {
        let simulator = simulator().await;
        let headers =
            json!({ "headers": { "X-Title": "ours", "OpenAI-Organization": "org-2", "Authorization": "Token t" } });
        let proxy = Proxy::start(json!({}), &[endpoint_with("a", &simulator.base_url(), headers)]).await;
        let call = proxy.request(Method::POST, "/v1/chat/completions").header("x-title", "theirs");
        Reply::of(call.json(&chat("m"))).await.assert_from("a", 1);
        let arrived = &simulator.requests()[0];
        assert_eq!(arrived.headers.get_all("openai-organization").iter().count(), 1);
        assert_eq!(arrived.header("openai-organization"), Some("org-2"));
        assert_eq!((arrived.header("x-title"), arrived.header("authorization")), (Some("ours"), Some("Token t")));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_sets_no_cookies_and_speaks_for_no_origin() {
    within(async {
        for status in [200, 400, 503] {
            let behaviour = Behaviour::status(status)
                .header("set-cookie", "a=1")
                .header("set-cookie", "b=2")
                .header("access-control-allow-origin", "https://theirs.example")
                .header("access-control-allow-credentials", "true")
                .header("alt-svc", "h3=\":443\"")
                .header("x-ratelimit-remaining-requests", "9")
                .header("openai-processing-ms", "7");
            let simulator = behaving(behaviour).await;
            let proxy = Proxy::before([&simulator]).await;
            let reply = proxy.chat("m").await;
            assert_eq!(reply.status, status);
            let gone = ["set-cookie", "access-control-allow-credentials", "alt-svc", "x-ratelimit-remaining-requests"];
            for gone in gone {
                assert_eq!(reply.header(gone), None, "{gone}");
            }
            assert_eq!(reply.header("access-control-allow-origin"), Some("*"));
            assert_eq!(reply.header("openai-processing-ms"), Some("7"));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_has_a_request_id() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        let long = "x".repeat(129);
        for (method, path) in [
            (Method::GET, "/health"),
            (Method::GET, "/v1/models"),
            (Method::GET, "/nowhere"),
            (Method::POST, "/v1/embeddings"),
        ] {
            for (given, kept) in [
                (None, false),
                (Some("mine-1.2:3_4"), true),
                (Some("no spaces"), false),
                (Some("\u{e9}"), false),
                (Some(long.as_str()), false),
                (Some(""), false),
            ] {
                simulator.clear();
                let mut call = proxy.request(method.clone(), path).json(&json!({ "model": "m", "input": "x" }));
                if let Some(id) = given {
                    call = call.header("x-request-id", http::HeaderValue::from_bytes(id.as_bytes()).unwrap());
                }
                let reply = Reply::of(call).await;
                assert_eq!(reply.headers.get_all("x-request-id").iter().count(), 1, "{path}");
                let id = reply.header("x-request-id").unwrap();
                if kept {
                    assert_eq!(Some(id), given, "{path}");
                } else {
                    assert!(id.len() >= 28 && Some(id) != given, "{path}: {id}");
                }
                if let Some(arrived) = simulator.requests().first() {
                    assert_eq!(arrived.header("x-request-id"), Some(id), "the endpoint can be asked about it");
                }
            }
        }
        let refused = Reply::of(proxy.request_without_key(Method::GET, "/v1/models")).await;
        assert!(refused.header("x-request-id").is_some());
        let first = proxy.get("/health").await;
        assert_ne!(first.header("x-request-id"), proxy.get("/health").await.header("x-request-id"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_answered_is_told_unless_that_is_switched_off() {
    within(async {
        let (bad, good) = (behaving(Behaviour::status(503)).await, simulator().await);
        let apis = in_order([bad.base_url().as_str(), &good.base_url()].into_iter()).into_iter().collect::<Vec<_>>();
        let told = Proxy::start(json!({}), &apis).await;
        told.chat("m").await.assert_from("b", 2);
        assert_eq!(told.get("/v1/models").await.endpoint(), None, "our own answers come from no endpoint");
        let silent = Proxy::start(json!({ "endpointHeaders": false }), &apis).await;
        let reply = silent.chat("m").await;
        assert_eq!((reply.status, reply.endpoint(), reply.attempts()), (200, None, None));
        assert!(reply.header("x-request-id").is_some());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_that_step_out_and_methods_that_echo_keys_are_refused() {
    within(async {
        let simulator = simulator().await;
        let apis = [endpoint_with("a", &format!("{}/api/v3", simulator.base_url()), json!({}))];
        let proxy = Proxy::start(json!({}), &apis).await;
        for path in [
            "/v1/../admin",
            "/v1/%2e%2e/admin",
            "/v1/x/..%2f..%2fadmin",
            "/v1/./x",
            "/v2/chat",
            "/v1x/chat",
            "//v2/chat",
            "/v1/v1/../admin",
            "//v1/status",
            "/v1/v1/token/reset",
            "//metrics",
            "//",
        ] {
            let mut wire = proxy.wire().await;
            wire.send(request("POST", path, &["content-type: application/json"], r#"{"model":"m"}"#)).await;
            let (head, body) = wire.message().await;
            assert_eq!(head.status(), 404, "{path}");
            let error: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(error["error"]["code"], "unknown_url", "{path}");
        }
        for method in ["TRACE", "CONNECT", "FOO"] {
            let mut wire = proxy.wire().await;
            wire.send(request(method, "/v1/chat/completions", &[], "")).await;
            let head = wire.head().await.unwrap();
            assert!([400, 404, 405].contains(&head.status()), "{method}: {head:?}");
            if method == "TRACE" {
                assert_eq!(head.status(), 405);
                assert!(head.header("allow").unwrap().contains("POST"));
            }
        }
        until("nothing is open", || simulator.open_requests() == 0).await;
        assert!(simulator.requests().is_empty());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_that_are_typed_wrongly_are_served_as_they_are_meant() {
    within(async {
        let simulator = simulator().await;
        for (base, root) in [("", "/v1"), ("/api/v3", "/api/v3")] {
            let api = endpoint_with("a", &format!("{}{base}", simulator.base_url()), json!({ "models": ["m"] }));
            let proxy = Proxy::start(json!({}), &[api]).await;
            for call in ["chat/completions", "completions", "embeddings", "responses", "moderations"] {
                for typed in [
                    format!("/v1/{call}"),
                    format!("/v1/v1/{call}"),
                    format!("//v1/{call}"),
                    format!("/v1//{call}"),
                    format!("/{call}"),
                    format!("//{call}/"),
                    format!("/v1/{call}/"),
                    format!("/v1/v1//v1/{call}?x=1"),
                ] {
                    simulator.clear();
                    let body = json!({ "model": "m", "input": "x", "messages": [], "prompt": "x" });
                    let mut wire = proxy.wire().await;
                    wire.send(request("POST", &typed, &["content-type: application/json"], &body.to_string())).await;
                    let (head, _) = wire.message().await;
                    assert_eq!(head.status(), 200, "{typed}: {head:?}");
                    let query = if typed.contains('?') { "?x=1" } else { "" };
                    assert_eq!(simulator.requests()[0].path_and_query, format!("{root}/{call}{query}"), "{typed}");
                }
            }
            for typed in ["/models", "/v1/v1/models", "//v1/models/", "/models/m", "/v1//models/m"] {
                let mut wire = proxy.wire().await;
                wire.send(request("GET", typed, &[], "")).await;
                assert_eq!(wire.message().await.0.status(), 200, "{typed}");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_goes_on_at_each_endpoint_with_a_span_of_its_own() {
    within(async {
        let (a, b) = (behaving(Behaviour { status: 503, ..Behaviour::default() }).await, simulator().await);
        let proxy = Proxy::before([&a, &b]).await;
        let given = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let call = proxy.request(Method::POST, "/v1/chat/completions").json(&chat("m")).header("traceparent", given);
        Reply::of(call.header("tracestate", "vendor=x")).await.assert_from("b", 2);
        let call =
            proxy.request(Method::POST, "/v1/chat/completions").json(&chat("m")).header("traceparent", "00-1-2-01");
        Reply::of(call.header("tracestate", "vendor=x")).await.assert_from("b", 2);
        let arrived: Vec<_> = [&a, &b].iter().flat_map(|simulator| simulator.requests()).collect();
        let parent = |place: usize| arrived[place].header("traceparent").unwrap().to_owned();
        let [first_a, second_a, first_b, second_b] = [parent(0), parent(1), parent(2), parent(3)];
        for one in [&first_a, &first_b] {
            assert!(
                one.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && one.ends_with("-01") && one != given,
                "{one}"
            );
        }
        assert_ne!(first_a, first_b, "each attempt is a span");
        assert_eq!(arrived[0].header("tracestate"), Some("vendor=x"));
        // What is no trace begins one, which both attempts are in.
        assert_eq!((second_a.len(), &second_a[..36]), (55, &second_b[..36]));
        assert!(second_a.ends_with("-00") && arrived[1].header("tracestate").is_none(), "{second_a}");
    })
    .await;
}
