//! What the client sees when nobody could answer.

use api_together::simulator::{Behaviour, Empty, Options, ResetAt, ResetHow, StallAt};
use serde_json::json;

use crate::harness::{
    KEY, Proxy, Reply, behaving, chat, chat_stream, client, closed_port, config_text, endpoint_with, in_order, key_of,
    simulator, simulator_with, within,
};
use crate::program::Running;
use crate::wire::{ByHand, chunked, post_chat};

#[tokio::test(flavor = "multi_thread")]
async fn the_last_endpoints_own_error_is_shown_as_it_came() {
    within(async {
        let html = "<html><body><h1>502 Bad Gateway</h1></body></html>";
        let json = r#"{ "error": {"message":"no more","type":"x","code":null}, "n": 1.0 }"#;
        for (body, content_type) in [(json, "application/json"), (html, "text/html; charset=utf-8"), ("", "text/plain")]
        {
            for (chunked, stream) in [(false, false), (true, false), (false, true)] {
                let last = Behaviour { body: Some(body.into()), chunked, ..Behaviour::status(529) };
                let last = Behaviour { content_type: Some(content_type.into()), ..last };
                let last = behaving(last.header("x-theirs", "kept").header("retry-after", "7")).await;
                let first = behaving(Behaviour::status(500)).await;
                let proxy = Proxy::before([&first, &last]).await;
                let reply = if stream {
                    proxy.post("/v1/chat/completions", &chat_stream("m")).await
                } else {
                    proxy.chat("m").await
                };
                assert_eq!((reply.status, reply.text()), (529, body));
                assert_eq!(reply.header("content-type"), Some(content_type));
                assert_eq!((reply.header("x-theirs"), reply.header("retry-after")), (Some("kept"), Some("7")));
                assert_eq!((reply.endpoint(), reply.attempts()), (Some("b"), Some("2")));
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_error_of_the_last_endpoint_is_shown_whole() {
    within(async {
        let body = "e".repeat(200_000);
        let last = behaving(Behaviour { body: Some(body.clone()), ..Behaviour::status(500) }).await;
        let proxy = Proxy::before([&last]).await;
        let reply = proxy.chat("m").await;
        assert_eq!(reply.status, 500);
        assert!(reply.text() == body);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_we_say_when_there_is_nothing_to_show() {
    within(async {
        let stalls = Behaviour { stall: Some(StallAt::Header), ..Behaviour::default() };
        let breaks = |how| Behaviour { reset: Some(ResetAt::BeforeHeader), reset_how: how, ..Behaviour::default() };
        let empty = Behaviour { empty: Some(Empty::Body), ..Behaviour::default() };
        for (last, status, code) in [
            (None, 502, "endpoint_unreachable"),
            (Some(breaks(ResetHow::Fin)), 502, "endpoint_unreachable"),
            (Some(breaks(ResetHow::Rst)), 502, "endpoint_unreachable"),
            (Some(stalls), 504, "endpoint_timeout"),
        ] {
            let first = behaving(Behaviour::status(500)).await;
            let last = match last {
                Some(behaviour) => Some(behaving(behaviour).await),
                None => None,
            };
            let url = last.as_ref().map_or_else(closed_port, |simulator| simulator.base_url());
            let first_byte_ms = if status == 504 { 200 } else { 60_000 };
            let timeouts = json!({ "timeouts": { "firstByteMs": first_byte_ms }, "priority": 1 });
            let apis = [endpoint_with("a", &first.base_url(), json!({})), endpoint_with("b", &url, timeouts)];
            let proxy = Proxy::start(json!({}), &apis).await;
            let reply = proxy.chat("m").await;
            reply.assert_error(status, "server_error", code);
            assert_eq!(reply.attempts(), Some("2"));
        }
        // A 200 with nothing in it is no answer, whoever is left.
        let empty = behaving(empty).await;
        let proxy = Proxy::before([&empty]).await;
        proxy.chat("m").await.assert_error(502, "server_error", "endpoint_empty_answer");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_endpoint_says_of_its_key_is_in_the_log() {
    within(async {
        let body = json!({ "error": {
            "message": format!("Incorrect API key provided:\n{}.", key_of("a")), "code": "invalid_api_key",
        } });
        let refuses = Behaviour { body: Some(body.to_string()), ..Behaviour::status(401) };
        let refuses = behaving(refuses).await;
        let api = endpoint_with("a", &refuses.base_url(), json!({}));
        let program = Running::start(&config_text(json!({}), &[api]), "info");
        program.ready().await;
        let call = client(reqwest::ClientBuilder::http1_only).post(program.url("/v1/chat/completions"));
        let reply = Reply::of(call.bearer_auth(KEY).json(&chat("m"))).await;
        reply.assert_error(502, "server_error", "endpoint_key_refused");
        let line = program.logs("with the words").await;
        assert!(
            line.contains("key by openai/invalid_api_key") && line.contains("Incorrect API key provided: "),
            "{line}"
        );
        assert!(!line.contains(&key_of("a")), "{line}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_endpoints_too_slow_is_504() {
    within(async {
        let stalls = behaving(Behaviour { stall: Some(StallAt::Header), ..Behaviour::default() }).await;
        let timeouts = json!({ "timeouts": { "firstByteMs": 150 } });
        let apis = ["a", "b"].map(|id| endpoint_with(id, &stalls.base_url(), timeouts.clone()));
        let proxy = Proxy::start(json!({}), &apis).await;
        for body in [crate::harness::chat("m"), chat_stream("m")] {
            let reply = proxy.post("/v1/chat/completions", &body).await;
            reply.assert_error(504, "server_error", "endpoint_timeout");
            assert_eq!(reply.attempts(), Some("2"));
        }
        crate::harness::until("the endpoint's requests are cancelled", || stalls.open_requests() == 0).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_of_ours_says_that_the_connection_closes() {
    within(async {
        let proxy = Proxy::start(json!({}), &in_order([closed_port().as_str()])).await;
        let mut wire = proxy.wire().await;
        wire.send(crate::wire::post_chat(&crate::harness::chat("m"))).await;
        let (head, _) = wire.message().await;
        assert_eq!(head.status(), 502);
        let stays = head.header("connection").as_deref() != Some("close");
        // Either way will do, but what is said must hold.
        if stays {
            wire.send(crate::wire::request("GET", "/health", &[], "")).await;
            assert_eq!(wire.message().await.0.status(), 200);
        } else {
            assert_eq!(wire.rest().await, "");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_are_passed_on_and_never_followed() {
    within(async {
        let target = simulator().await;
        for status in [301, 302, 303, 307, 308] {
            let location = format!("{}/v1/chat/completions", target.base_url());
            let from = behaving(Behaviour::status(status).header("location", &location)).await;
            let proxy = Proxy::before([&from, &target]).await;
            let reply = proxy.chat("m").await;
            assert_eq!((reply.status, reply.header("location")), (status, Some(location.as_str())));
            assert_eq!(reply.attempts(), Some("1"));
        }
        assert!(target.requests().is_empty());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_quoted_in_an_error_is_blotted_out() {
    within(async {
        let key = key_of("a");
        let masked = format!("{}****{}", &key[..8], &key[key.len() - 4..]);
        let dotted = format!("{}...{}", &key[..3], &key[key.len() - 4..]);
        let client_key = crate::harness::KEY;
        for (status, quoted) in [(401, &key), (400, &key), (401, &masked), (403, &dotted), (500, &key)] {
            let body =
                format!(r#"{{"error":{{"message":"Incorrect API key provided: {quoted}. See {client_key}."}}}}"#);
            for chunked in [false, true] {
                let behaviour =
                    Behaviour { body: Some(body.clone()), chunked, drip: Some(7), ..Behaviour::status(status) };
                let simulator = behaving(behaviour.header("x-debug", &format!("key={key}"))).await;
                let shown = json!({ "retry": { "showEndpointKeyErrors": true } });
                let proxy = Proxy::start(shown, &in_order([simulator.base_url().as_str()])).await;
                let reply = proxy.chat("m").await;
                assert_eq!(reply.status, status);
                assert!(!reply.text().contains(quoted.as_str()), "{}", reply.text());
                let stars = "*".repeat(quoted.len());
                assert_eq!(reply.text(), body.replace(quoted.as_str(), &stars), "nothing else changes");
                assert_eq!(reply.header("x-debug"), None, "nor in a header");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_quoted_in_an_error_that_was_kept_is_blotted_out_too() {
    within(async {
        // The second endpoint rests, so the first one's error is the last word.
        let key = key_of("a");
        let body = format!(r#"{{"error":{{"message":"bad key {key}"}}}}"#);
        let first = behaving(Behaviour { body: Some(body.clone()), ..Behaviour::status(500) }).await;
        let resting = simulator_with(Options {
            default: Behaviour::status(429).header("retry-after", "60"),
            ..Options::default()
        })
        .await;
        let proxy = Proxy::start(json!({}), &in_order([first.base_url().as_str(), &resting.base_url()])).await;
        assert_eq!(proxy.chat("m").await.status, 429);
        let reply = proxy.chat("m").await;
        assert_eq!((reply.status, reply.endpoint()), (500, Some("a")));
        assert_eq!(reply.text(), body.replace(&key, &"*".repeat(key.len())));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_header_that_an_endpoint_quotes_is_blotted_out() {
    within(async {
        let secret = "a-secret-of-the-header";
        let body = format!(r#"{{"error":{{"message":"x-secret {secret} is unknown"}}}}"#);
        let quotes = Behaviour { body: Some(body.clone()), ..Behaviour::status(400) };
        let simulator = behaving(quotes.header("x-debug", &format!("x-secret={secret}"))).await;
        let api = endpoint_with("a", &simulator.base_url(), json!({ "headers": { "x-secret": secret } }));
        let proxy = Proxy::start(json!({}), &[api]).await;
        let reply = proxy.chat("m").await;
        assert_eq!(simulator.requests()[0].header("x-secret"), Some(secret));
        assert_eq!((reply.status, reply.header("x-debug")), (400, None), "{reply:?}");
        assert_eq!(reply.text(), body.replace(secret, &"*".repeat(secret.len())));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_found_in_an_error_too_long_to_be_held() {
    const BYTES: usize = 200_000;
    const AT: usize = 70_000;
    within(async {
        let key = key_of("a");
        let mut error = "x".repeat(AT) + &key;
        error += &"y".repeat(BYTES - error.len());
        let expected = error.replace(&key, &"*".repeat(key.len()));
        let by_hand = ByHand::bind().await;
        let proxy = Proxy::start(json!({}), &in_order([by_hand.base_url().as_str()])).await;
        // Whole, and cut at its first byte, in the middle, and at its last one.
        for cut in [AT, AT + 1, AT + key.len() / 2, AT + key.len() - 1, AT + key.len()] {
            for is_chunked in [false, true] {
                let mut wire = proxy.wire().await;
                wire.send(post_chat(&chat("m"))).await;
                let (mut endpoint, ..) = by_hand.call().await;
                let (first, second) = error.split_at(cut);
                let (framing, first, second) = if is_chunked {
                    ("transfer-encoding: chunked".into(), chunked(first), chunked(second) + "0\r\n\r\n")
                } else {
                    (format!("content-length: {BYTES}"), first.into(), second.into())
                };
                let head = format!(
                    "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: text/plain\r\n{framing}\r\n\r\n"
                );
                endpoint.send(head + &first).await;
                // The client has the beginning before the endpoint sends the rest.
                let head = wire.head().await.unwrap();
                assert_eq!(head.status(), 400);
                endpoint.send(second).await;
                let body = wire.body(&head).await;
                assert!(body == expected, "cut at {cut}, chunked {is_chunked}: {} bytes came", body.len());
            }
        }
    })
    .await;
}
