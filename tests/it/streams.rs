//! Streams: at once, to the end, and honest when they break.

use std::time::Duration;

use api_together::simulator::{Behaviour, Options, ResetAt, ResetHow, Simulator, StallAt};
use http::Version;
use serde_json::{Value, json};

use crate::harness::{
    KEY, Proxy, behaving, chat, chat_stream, client, config_text, endpoint_with, h2c, in_order, key_of, simulator,
    simulator_with, until, within,
};
use crate::program::Running;
use crate::wire::{ByHand, STREAM_HEAD, Wire, chunked, event, post_chat};

/// A client gone is to be noticed in milliseconds; this allows for a busy machine, and is far below every timeout.
const CANCEL_BOUND: Duration = Duration::from_secs(1);

fn clients() -> [(Version, reqwest::Client); 2] {
    [(Version::HTTP_11, client(reqwest::ClientBuilder::http1_only)), (Version::HTTP_2, h2c())]
}

async fn open(client: &reqwest::Client, proxy: &Proxy, body: &Value) -> reqwest::Response {
    client.post(proxy.url("/v1/chat/completions")).bearer_auth(KEY).json(body).send().await.unwrap()
}

/// What comes next; an HTTP/2 stream may end with an empty piece.
async fn next(stream: &mut reqwest::Response) -> Option<bytes::Bytes> {
    loop {
        let piece = stream.chunk().await.unwrap()?;
        if !piece.is_empty() {
            return Some(piece);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_arrives_before_the_next_is_sent() {
    within(async {
        for (version, client) in clients() {
            let by_hand = ByHand::bind().await;
            let proxy = Proxy::start(json!({}), &in_order([by_hand.base_url().as_str(), "http://127.0.0.1:9"])).await;
            let body = chat_stream("m");
            let answer = async {
                let mut call = by_hand.call().await;
                call.0.send(format!("{STREAM_HEAD}{}", chunked(&event("one")))).await;
                call.0
            };
            let (mut endpoint, mut stream) = tokio::join!(answer, open(&client, &proxy, &body));
            assert_eq!((stream.status().as_u16(), stream.version()), (200, version));
            assert_eq!(stream.headers()["content-type"], "text/event-stream");
            assert_eq!(stream.chunk().await.unwrap().unwrap(), event("one"));
            for text in ["two", "three", "four"] {
                endpoint.send(chunked(&event(text))).await;
                assert_eq!(stream.chunk().await.unwrap().unwrap(), event(text));
            }
            // Half an event waits for its other half.
            endpoint.send(chunked(&format!("{}data: {{\"half\":", event("five")))).await;
            assert_eq!(next(&mut stream).await.unwrap(), event("five"));
            endpoint.send(format!("{}0\r\n\r\n", chunked("1}\n\ndata: [DONE]\n\n: left"))).await;
            let mut rest = Vec::new();
            while let Some(piece) = next(&mut stream).await {
                rest.extend_from_slice(&piece);
            }
            assert_eq!(String::from_utf8(rest).unwrap(), "data: {\"half\":1}\n\ndata: [DONE]\n\n: left", "a clean end");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_back_comes_with_the_first_text() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = Proxy::start(json!({}), &in_order([by_hand.base_url().as_str(), "http://127.0.0.1:9"])).await;
        let mut wire = proxy.wire().await;
        wire.send(post_chat(&chat_stream("m"))).await;
        let (mut endpoint, ..) = by_hand.call().await;
        let role = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n";
        endpoint.send(format!("{STREAM_HEAD}{}{}", chunked(": ping\n\n"), chunked(role))).await;
        let early = tokio::time::timeout(Duration::from_millis(100), wire.head()).await;
        assert!(early.is_err(), "a role alone is not worth a commit: {early:?}");
        let mut wire = proxy.wire().await;
        drop(endpoint);
        wire.send(post_chat(&chat_stream("m"))).await;
        let (mut endpoint, ..) = by_hand.call().await;
        endpoint.send(format!("{STREAM_HEAD}{}{}", chunked(": ping\n\n"), chunked(role))).await;
        endpoint.send(format!("{}0\r\n\r\n", chunked(&event("text")))).await;
        let (head, body) = wire.message().await;
        assert_eq!((head.status(), body), (200, format!(": ping\n\n{role}{}", event("text")).into()));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_an_http2_endpoint_arrives_at_once_too() {
    within(async {
        for (_, client) in clients() {
            let stalls = Behaviour { stall: Some(StallAt::AfterEvents(4)), ..Behaviour::default() };
            let simulator = behaving(stalls).await;
            let api = endpoint_with("a", &simulator.base_url(), json!({ "http2": true }));
            let proxy = Proxy::start(json!({}), &[api]).await;
            let mut stream = open(&client, &proxy, &chat_stream("m")).await;
            let mut text = String::new();
            // The role and three words; the endpoint sends no more.
            while text.matches("\n\n").count() < 4 {
                text += std::str::from_utf8(&stream.chunk().await.unwrap().unwrap()).unwrap();
            }
            assert!(text.contains(" the"), "{text}");
            assert_eq!(simulator.requests()[0].version, Version::HTTP_2);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_stream_arrives_byte_for_byte() {
    within(async {
        let events: String = (0..500).map(|n| event(&format!("é{n}"))).collect::<String>() + "data: [DONE]\n\n";
        let raw = Behaviour {
            body: Some(events.clone()),
            content_type: Some("text/event-stream".into()),
            ..Behaviour::default()
        };
        for drip in [None, Some(7)] {
            let simulator = behaving(Behaviour { drip, ..raw.clone() }).await;
            for http2 in [false, true] {
                let api = endpoint_with("a", &simulator.base_url(), json!({ "http2": http2 }));
                let proxy = Proxy::start(json!({}), &[api]).await;
                for (version, client) in clients() {
                    let stream = open(&client, &proxy, &chat_stream("m")).await;
                    assert!(stream.text().await.unwrap() == events, "{drip:?} {http2} {version:?}");
                }
            }
        }
    })
    .await;
}

async fn leaves(what: &str, simulator: &Simulator, spare: &Simulator, proxy: &Proxy, body: &Value, read: usize) {
    for (version, client) in clients() {
        let what = format!("{what}, {version:?}");
        let (url, body) = (proxy.url("/v1/chat/completions"), body.clone());
        let (reached, mut progress) = tokio::sync::watch::channel(false);
        let call = tokio::spawn(async move {
            let mut stream = client.post(url).bearer_auth(KEY).json(&body).send().await.unwrap();
            for _ in 0..read {
                stream.chunk().await.unwrap().unwrap();
            }
            reached.send(true).unwrap();
            // The stream is kept open until the task is aborted.
            std::future::pending::<()>().await;
            drop(stream);
        });
        if read > 0 {
            progress.changed().await.unwrap();
        }
        until(&format!("{what}: the endpoint has the request"), || simulator.open_requests() == 1).await;
        call.abort();
        let took =
            until(&format!("{what}: the endpoint's request is cancelled"), || simulator.open_requests() == 0).await;
        assert!(took < CANCEL_BOUND, "{what}: {took:?}");
        proxy.until_status("a", "inFlight", json!(0)).await;
        let status = proxy.status_of("a").await;
        assert_eq!((&status["errorCount"], &status["available"]), (&json!(0), &json!(true)), "{what}");
        assert!(spare.requests().is_empty(), "{what}: nobody else is asked");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_cancels_the_endpoints_request() {
    within(async {
        for http2 in [false, true] {
            for (what, stall, body, read) in [
                ("before the header", StallAt::Header, chat_stream("m"), 0),
                ("before the header of JSON", StallAt::Header, chat("m"), 0),
                ("while a stream is held", StallAt::AfterEvents(1), chat_stream("m"), 0),
                ("while JSON is held", StallAt::AfterEvents(1), chat("m"), 0),
                ("in a stream", StallAt::AfterEvents(3), chat_stream("m"), 1),
            ] {
                let simulator = behaving(Behaviour { stall: Some(stall), ..Behaviour::default() }).await;
                let spare = simulator_with(Options::default()).await;
                let apis = [
                    endpoint_with("a", &simulator.base_url(), json!({ "http2": http2 })),
                    endpoint_with("b", &spare.base_url(), json!({ "priority": 1 })),
                ];
                let proxy = Proxy::start(json!({}), &apis).await;
                let what = format!("{what}, endpoint's http2 {http2}");
                leaves(&what, &simulator, &spare, &proxy, &body, read).await;
                assert_eq!(simulator.cancelled(), 2, "{what}");
            }
        }
    })
    .await;
}

/// Checks how a stream ended that the endpoint did not end well.
fn assert_told(what: &str, text: &str) {
    let events: Vec<_> = text.split_terminator("\n\n").collect();
    let last = events.last().unwrap().strip_prefix("data: ").unwrap_or_else(|| panic!("{what}: {text}"));
    let error: Value = serde_json::from_str(last).unwrap_or_else(|_| panic!("{what}: {text}"));
    assert_eq!(error["error"]["code"], "stream_broken", "{what}: {text}");
    assert_eq!(error["error"]["type"], "server_error", "{what}: {text}");
    assert!(events.len() > 2 && text.starts_with("data: {\"id\""), "{what}: {text}");
    assert!(!text.contains("[DONE]") && text.ends_with("\n\n"), "{what}: {text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_tells_so_and_does_not_end_cleanly() {
    within(async {
        let reset = |at, how| Behaviour { reset: Some(at), reset_how: how, ..Behaviour::default() };
        let cases = [
            ("close", reset(ResetAt::AfterEvents(3), ResetHow::Fin)),
            ("reset", reset(ResetAt::AfterEvents(3), ResetHow::Rst)),
            ("close within an event", reset(ResetAt::MidEvent(3), ResetHow::Fin)),
            ("reset within an event", reset(ResetAt::MidEvent(3), ResetHow::Rst)),
            ("silence", Behaviour { stall: Some(StallAt::AfterEvents(3)), ..Behaviour::default() }),
        ];
        for (name, behaviour) in cases {
            for http2 in [false, true] {
                let what = format!("{name}, endpoint's http2 {http2}");
                let (simulator, spare) = (behaving(behaviour.clone()).await, simulator().await);
                let idle_ms = if behaviour.stall.is_some() { 300 } else { 60_000 };
                let settings = json!({ "timeouts": { "idleMs": idle_ms }, "http2": http2 });
                let apis = [
                    endpoint_with("a", &simulator.base_url(), settings),
                    endpoint_with("b", &spare.base_url(), json!({ "priority": 1 })),
                ];
                let proxy = Proxy::start(json!({}), &apis).await;
                let mut wire = proxy.wire().await;
                wire.send(post_chat(&chat_stream("m"))).await;
                assert_eq!(wire.head().await.unwrap().status(), 200, "{what}");
                let mut text = String::new();
                while let Some(chunk) = wire.chunk().await {
                    assert!(!chunk.is_empty(), "{what}: the last chunk would make it look whole: {text}");
                    text += std::str::from_utf8(&chunk).unwrap();
                }
                assert_told(&what, &text);

                let mut stream = open(&h2c(), &proxy, &chat_stream("m")).await;
                let mut text = String::new();
                let end = loop {
                    match stream.chunk().await {
                        Ok(Some(chunk)) => text += std::str::from_utf8(&chunk).unwrap(),
                        end => break end,
                    }
                };
                assert!(end.is_err(), "{what}: the stream is reset");
                assert_told(&what, &text);
                assert!(spare.requests().is_empty(), "{what}: nothing is asked twice once it has begun");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn json_that_breaks_after_its_beginning_does_not_end_cleanly() {
    within(async {
        // It is too long to be held, and breaks off in its middle.
        let broken = Behaviour {
            reset: Some(ResetAt::AfterEvents(1)),
            chunked: true,
            event_bytes: Some(100_000),
            ..Behaviour::default()
        };
        let simulator = behaving(broken).await;
        let proxy = Proxy::before([&simulator]).await;
        let mut wire = proxy.wire().await;
        wire.send(post_chat(&chat("m"))).await;
        assert_eq!(wire.head().await.unwrap().status(), 200);
        let mut text = String::new();
        while let Some(chunk) = wire.chunk().await {
            assert!(!chunk.is_empty(), "{text}");
            text += std::str::from_utf8(&chunk).unwrap();
        }
        assert!(text.starts_with('{') && !text.contains("stream_broken"), "{text}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_stream_is_cut_by_no_total_time() {
    within(async {
        let slow = Behaviour { chunk_delay_ms: 100, events: 12, ..Behaviour::default() };
        let simulator = behaving(slow).await;
        let timeouts = json!({ "timeouts": { "firstByteMs": 1000, "idleMs": 1000 } });
        let proxy = Proxy::start(
            json!({ "retry": { "budgetMs": 100 } }),
            &[endpoint_with("a", &simulator.base_url(), timeouts)],
        )
        .await;
        let text = proxy.open_stream("m").await.text().await.unwrap();
        assert!(text.ends_with("data: [DONE]\n\n") && !text.contains("error"), "{text}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sound_and_files_are_never_held() {
    within(async {
        let by_hand = ByHand::bind().await;
        let proxy = Proxy::start(json!({}), &in_order([by_hand.base_url().as_str(), "http://127.0.0.1:9"])).await;
        let head = "HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ntransfer-encoding: chunked\r\n\r\n";
        let answer = async {
            let mut call = by_hand.call().await;
            call.0.send(format!("{head}{}", chunked("\u{1}\u{2}\u{3}"))).await;
            call.0
        };
        let call = proxy.request(http::Method::POST, "/v1/audio/speech").json(&json!({ "model": "m" })).send();
        let (mut endpoint, stream) = tokio::join!(answer, call);
        let mut stream = stream.unwrap();
        assert_eq!(stream.chunk().await.unwrap().unwrap(), "\u{1}\u{2}\u{3}");
        endpoint.send(format!("{}0\r\n\r\n", chunked("\u{4}\u{5}\u{6}"))).await;
        assert_eq!(stream.chunk().await.unwrap().unwrap(), "\u{4}\u{5}\u{6}");
        assert_eq!(next(&mut stream).await, None);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_slowly_gets_it_all() {
    const EVENTS: usize = 500;
    const EVENT_BYTES: usize = 64 * 1024;
    /// Most of the time for which the client may take nothing, and the endpoint be silent. Two of them are longer than that.
    const PAUSE: Duration = Duration::from_secs(1);
    within(async {
        let long = Behaviour { events: EVENTS, event_bytes: Some(EVENT_BYTES), ..Behaviour::default() };
        for (http2, (_, client)) in [false, true].into_iter().zip(clients()) {
            let (simulator, spare) = (behaving(long.clone()).await, simulator().await);
            let settings = json!({ "timeouts": { "idleMs": 1600 }, "http2": http2 });
            let apis = [
                endpoint_with("a", &simulator.base_url(), settings),
                endpoint_with("b", &spare.base_url(), json!({ "priority": 1 })),
            ];
            let proxy = Proxy::start(json!({}), &apis).await;
            let mut stream = open(&client, &proxy, &chat_stream("m")).await;
            let mut text = next(&mut stream).await.unwrap().to_vec();
            for pause in 0..2 {
                tokio::time::sleep(PAUSE).await;
                assert_eq!(simulator.open_requests(), 1, "http2 {http2}: it all went into buffers");
                while text.len() < (pause + 1) * 4 * 1024 * 1024 {
                    text.extend_from_slice(&next(&mut stream).await.unwrap());
                }
            }
            while let Some(piece) = next(&mut stream).await {
                text.extend_from_slice(&piece);
            }
            assert!(text.len() > EVENTS * EVENT_BYTES, "http2 {http2}: {} bytes came", text.len());
            assert!(text.ends_with(b"data: [DONE]\n\n"), "http2 {http2}");
            assert_eq!(proxy.status_of("a").await["errorCount"], 0, "http2 {http2}");
            assert!(spare.requests().is_empty());
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_quoted_in_the_middle_of_a_stream_is_blotted_out() {
    within(async {
        let secret = "a-secret-of-the-header";
        let by_hand = ByHand::bind().await;
        let api = endpoint_with("a", &by_hand.base_url(), json!({ "headers": { "x-secret": secret } }));
        let proxy = Proxy::start(json!({}), &[api]).await;
        let mut wire = proxy.wire().await;
        wire.send(post_chat(&chat_stream("m"))).await;
        let (mut endpoint, ..) = by_hand.call().await;
        endpoint.send(format!("{STREAM_HEAD}{}", chunked(&event("one")))).await;
        let head = wire.head().await.unwrap();
        assert_eq!((head.status(), wire.chunk().await.unwrap()), (200, event("one").into()));
        for quoted in [key_of("a").as_str(), secret] {
            let error = format!("data: {{\"error\":{{\"message\":\"{quoted} is over its quota\"}}}}\n\n");
            endpoint.send(chunked(&error)).await;
            assert_eq!(wire.chunk().await.unwrap(), error.replace(quoted, &"*".repeat(quoted.len())));
        }
        endpoint.send("0\r\n\r\n").await;
        assert!(wire.chunk().await.unwrap().is_empty());
    })
    .await;
}

/// How much of it is in memory, in bytes.
fn resident_bytes(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_a_gibibyte_passes_with_flat_memory() {
    const STREAM_BYTES: usize = 1024 * 1024 * 1024;
    // Buffers of sockets and pieces on their way, and nothing that grows with the stream.
    const GROWTH_MAX: usize = 24 * 1024 * 1024;
    // Events of a usual size, of some that a read cuts in two, and of some that are too long to be held whole.
    let batch = format!(
        "{}{}{}",
        event("word").repeat(500),
        event(&"x".repeat(10_000)).repeat(40),
        event(&"y".repeat(200_000)).repeat(3)
    );
    let batches = STREAM_BYTES / batch.len() + 1;
    let by_hand = ByHand::bind().await;
    let config = config_text(json!({}), &in_order([by_hand.base_url().as_str()]));
    let program = Running::start(&config, "info");
    program.ready().await;
    let mut wire = Wire::connect(program.address).await;
    wire.send(post_chat(&chat_stream("m"))).await;
    let (mut endpoint, ..) = by_hand.call().await;
    endpoint.send(STREAM_HEAD).await;
    let pid = program.pid();
    let sent = batch.clone();
    let writer = tokio::spawn(async move {
        for _ in 0..batches {
            endpoint.send(chunked(&sent)).await;
        }
        endpoint.send(format!("{}0\r\n\r\n", chunked("data: [DONE]\n\n"))).await;
    });
    wire.head().await.unwrap();
    let (mut read, mut early, mut most) = (0, 0, 0);
    loop {
        let chunk = wire.chunk().await.expect("the stream is cut");
        if chunk.is_empty() {
            break;
        }
        let offset = read % batch.len();
        let expected = &batch.as_bytes()[offset..];
        let compared = expected.len().min(chunk.len());
        assert!(chunk[..compared] == expected[..compared] || read + chunk.len() > batches * batch.len());
        // A look takes a while, so not at each of them.
        if (read + chunk.len()) >> 24 != read >> 24 {
            let resident = resident_bytes(pid);
            most = most.max(resident);
            early = if early == 0 { resident } else { early };
        }
        read += chunk.len();
    }
    writer.await.unwrap();
    assert_eq!(read, batches * batch.len() + "data: [DONE]\n\n".len());
    assert!(most < early + GROWTH_MAX, "{early} bytes at first, {most} later");
}
