//! Connections that keep us waiting, and who has no key: each has a time, a place and memory within bounds, and callers are served.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use http::Version;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::authority::Authority;
use crate::connections::websocket;
use crate::harness::{
    KEY, Proxy, Reply, behaving, chat, chat_stream, client, endpoint, endpoint_with, h2c, in_order, simulator, within,
};
use crate::tls::write;
use crate::wire::{ByHand, Wire, post_chat, request};
use api_together::simulator::Behaviour;

/// Deadlines of a second are looked at twice a second; this allows for a busy machine.
const CLOSE_BOUND: Duration = Duration::from_secs(8);

async fn with_connections(connections: Value) -> Proxy {
    // It never answers, and is not asked.
    Proxy::start(json!({ "connections": connections }), &[endpoint("a", "http://127.0.0.1:9")]).await
}

/// A proxy that listens with TLS.
async fn with_tls(folder: &Path, connections: Value) -> Proxy {
    let authority = Authority::new();
    let (certificate, key) = authority.issue("localhost");
    let tls = json!({
        "certFile": write(folder, "cert.pem", &certificate.pem()),
        "keyFile": write(folder, "key.pem", &key.serialize_pem()),
    });
    let server = json!({ "connections": connections, "tls": tls });
    Proxy::start(server, &[endpoint("a", "http://127.0.0.1:9")]).await
}

/// Waits until the other side closes. Returns how long that took.
async fn until_closed(stream: &mut TcpStream) -> Duration {
    let begun = Instant::now();
    let mut bytes = [0; 1024];
    let closed = async { while stream.read(&mut bytes).await.is_ok_and(|count| count > 0) {} };
    tokio::time::timeout(CLOSE_BOUND, closed).await.expect("it is never closed");
    begun.elapsed()
}

/// A connection from another address of this machine.
async fn connect_from(last: u8, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 9, last], 0))).unwrap();
    socket.connect(to).await.unwrap()
}

/// The value of a metric without labels, or of one with the labels that are named.
async fn metric(proxy: &Proxy, name: &str) -> u64 {
    let text = proxy.get("/metrics").await.text().to_owned();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("{name}: {text}")).parse().unwrap()
}

async fn is_open(stream: &mut TcpStream) -> bool {
    tokio::time::timeout(Duration::from_millis(1), stream.read(&mut [0])).await.is_err()
}

async fn open_ones(streams: &mut [TcpStream]) -> usize {
    let mut open = 0;
    for stream in streams {
        open += usize::from(is_open(stream).await);
    }
    open
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_nothing_is_not_waited_for() {
    within(async {
        let folder = tempfile::tempdir().unwrap();
        let bounds = json!({ "firstByteSeconds": 1, "headerSeconds": 60 });
        for proxy in [with_connections(bounds.clone()).await, with_tls(folder.path(), bounds).await] {
            let mut silent = TcpStream::connect(proxy.address).await.unwrap();
            let took = until_closed(&mut silent).await;
            assert!(took > Duration::from_millis(800), "{took:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_that_does_not_end_is_cut_however_it_comes() {
    within(async {
        let folder = tempfile::tempdir().unwrap();
        let bounds = json!({ "firstByteSeconds": 60, "headerSeconds": 2, "keepAliveSeconds": 60 });
        let plain = with_connections(bounds.clone()).await;
        let secure = with_tls(folder.path(), bounds).await;
        let endless = |begin: &str| format!("{begin}{}", "x-a: b\r\n".repeat(1000));
        let http1 = endless("GET /health HTTP/1.1\r\nhost: a\r\n");
        // A frame of headers (type 1) that says it is longer than what comes.
        let http2 = format!(
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\u{4}\0\0\0\0\0\0\0\u{40}\u{1}\u{4}\0\0\0\u{1}{}",
            "x".repeat(60)
        );
        let hello = "\u{16}\u{3}\u{1}\u{1}\0\u{1}\0\0\u{60}\u{3}\u{3}".to_owned() + &"h".repeat(90);
        for (what, proxy, text, at_once) in [
            ("a byte", &plain, "G".to_owned(), true),
            ("a part of a header", &plain, http1[..200].to_owned(), true),
            ("a byte at a time", &plain, http1.clone(), false),
            ("a part of HTTP/2's preface", &plain, http2[..20].to_owned(), true),
            ("a part of HTTP/2's headers", &plain, http2.clone(), true),
            ("HTTP/2 a byte at a time", &plain, http2, false),
            ("a part of a TLS hello", &secure, hello.clone(), true),
            ("a TLS hello a byte at a time", &secure, hello, false),
        ] {
            let mut stream = TcpStream::connect(proxy.address).await.unwrap();
            let begun = Instant::now();
            if at_once {
                stream.write_all(text.as_bytes()).await.unwrap();
            } else {
                let (mut reading, mut writing) = stream.split();
                let write = async {
                    for byte in text.as_bytes() {
                        if writing.write_all(&[*byte]).await.is_err() {
                            return;
                        }
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                };
                let mut bytes = [0; 1024];
                let closed = async { while reading.read(&mut bytes).await.is_ok_and(|count| count > 0) {} };
                tokio::select! {
                    () = write => {}
                    () = closed => {}
                    () = tokio::time::sleep(CLOSE_BOUND) => panic!("{what} is never cut"),
                }
            }
            until_closed(&mut stream).await;
            let took = begun.elapsed();
            assert!(took > Duration::from_millis(1500) && took < CLOSE_BOUND, "{what}: {took:?}");
        }
        assert_eq!(plain.get("/health").await.status, 200);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_kept_for_a_time_and_no_longer() {
    within(async {
        let proxy = with_connections(json!({ "keepAliveSeconds": 1, "headerSeconds": 60, "h2IdleSeconds": 1 })).await;
        let own = |headers: &[&str]| request("GET", "/v1/models", headers, "");
        let stranger = "GET /health HTTP/1.1\r\nhost: a\r\n\r\n".to_owned();
        for (what, text) in [
            ("a caller", own(&[])),
            ("one that wants it longer", own(&["connection: keep-alive", "keep-alive: timeout=1000"])),
            ("a stranger", stranger),
        ] {
            let mut wire = proxy.wire().await;
            // Each request begins the time anew.
            for _ in 0..3 {
                wire.send(&text).await;
                assert_eq!(wire.message().await.0.status(), 200, "{what}");
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            let begun = Instant::now();
            assert_eq!(tokio::time::timeout(CLOSE_BOUND, wire.rest()).await.expect(what), "");
            assert!(begun.elapsed() > Duration::from_millis(500), "{what}: {:?}", begun.elapsed());
        }
        let mut http2 = TcpStream::connect(proxy.address).await.unwrap();
        let (mut sender, connection) = h2::client::handshake(&mut http2).await.unwrap();
        let get = http::Request::get("http://a/health").body(()).unwrap();
        let (answer, _) = sender.send_request(get, true).unwrap();
        let closed = async {
            let (answer, ended) = tokio::join!(answer, tokio::time::timeout(CLOSE_BOUND, connection));
            assert_eq!(answer.unwrap().status(), 200);
            ended.expect("an idle HTTP/2 connection is never closed").unwrap_or_default();
        };
        closed.await;
        drop(sender);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_is_as_long_as_it_may_be_and_no_longer() {
    within(async {
        let simulator = simulator().await;
        let bound = 10_000;
        let proxy = Proxy::start(
            json!({ "connections": { "headerBytesMax": bound } }),
            &in_order([simulator.base_url().as_str()]),
        )
        .await;
        let body = chat("m").to_string();
        let of_length = |length: usize| {
            let filled = |fill: usize| {
                let header = format!("x-fill: {}", "f".repeat(fill));
                request("POST", "/v1/chat/completions", &["content-type: application/json", &header], &body)
            };
            let least = filled(0).len() - body.len();
            filled(length - least)
        };
        let mut wire = proxy.wire().await;
        // On one connection, since each header is counted by itself. What follows it is none of it.
        for length in [bound, 5000, bound - 1, bound] {
            wire.send(of_length(length)).await;
            assert_eq!(wire.message().await.0.status(), 200, "{length}");
        }
        for length in [bound + 1, bound + 5000, 900_000] {
            let mut wire = proxy.wire().await;
            // It may be closed before all is sent.
            wire.try_send(of_length(length)).await.unwrap_or_default();
            if length == bound + 1 {
                let (head, body) = wire.message().await;
                assert_eq!(head.status(), 431);
                let error: Value = serde_json::from_slice(&body).unwrap();
                assert_eq!(error["error"]["code"], "header_too_large", "{error}");
                assert!(error["error"]["message"].as_str().unwrap().contains("headerBytesMax"), "{error}");
            }
            wire.rest().await;
        }
        let call = h2c().post(proxy.url("/v1/chat/completions")).bearer_auth(KEY).json(&chat("m"));
        let answer = call.header("x-fill", "f".repeat(bound)).send().await;
        assert!(answer.is_err() || answer.is_ok_and(|answer| answer.status() == 431), "HTTP/2 is bounded, too");
        assert_eq!(simulator.requests().len(), 4);
        assert_eq!(metric(&proxy, "api_together_connections_closed_total{reason=\"header_bytes\"}").await, 3);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_places_for_strangers_and_callers_take_none_of_them() {
    within(async {
        let bounds = json!({ "strangersPerAddress": 8, "firstByteSeconds": 60, "keepAliveSeconds": 60 });
        let proxy = with_connections(bounds).await;
        // Callers of the same address, more of them than strangers may be.
        let mut callers = Vec::new();
        for _ in 0..20 {
            let mut wire = proxy.wire().await;
            wire.send(request("GET", "/v1/models", &[], "")).await;
            assert_eq!(wire.message().await.0.status(), 200);
            callers.push(wire);
        }
        let mut strangers = Vec::new();
        for _ in 0..50 {
            strangers.push(TcpStream::connect(proxy.address).await.unwrap());
        }
        let mut other = connect_from(1, proxy.address).await;
        let begun = Instant::now();
        while open_ones(&mut strangers).await > 8 {
            assert!(begun.elapsed() < CLOSE_BOUND, "{} are open", open_ones(&mut strangers).await);
            // A caller's request is served meanwhile.
            assert_eq!(proxy.get("/v1/models").await.status, 200);
        }
        // Those that came last are left; another address has places of its own.
        assert!(is_open(&mut other).await);
        assert!(open_ones(&mut strangers[..40]).await <= 1, "the oldest go first");
        for wire in &mut callers {
            wire.send(request("GET", "/v1/models", &[], "")).await;
            assert_eq!(wire.message().await.0.status(), 200, "a caller's connection was taken for a stranger's");
        }
        assert!(metric(&proxy, "api_together_connections_closed_total{reason=\"address\"}").await >= 42);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trusted_reverse_proxy_is_many_addresses() {
    within(async {
        let server = json!({
            "connections": { "strangersPerAddress": 2, "firstByteSeconds": 60 }, "trustedProxies": ["127.0.0.0/8"]
        });
        let proxy = Proxy::start(server, &[endpoint("a", "http://127.0.0.1:9")]).await;
        let mut waiting = Vec::new();
        for _ in 0..20 {
            waiting.push(TcpStream::connect(proxy.address).await.unwrap());
        }
        tokio::time::sleep(Duration::from_millis(2500)).await;
        assert_eq!(open_ones(&mut waiting).await, 20);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_all_places_are_taken_the_oldest_stranger_gives_up_its_own() {
    within(async {
        let bounds = json!({ "max": 16, "strangersPerAddress": 1000, "firstByteSeconds": 60, "keepAliveSeconds": 60 });
        let proxy = with_connections(bounds).await;
        let mut strangers = Vec::new();
        for _ in 0..15 {
            strangers.push(TcpStream::connect(proxy.address).await.unwrap());
        }
        tokio::time::sleep(Duration::from_millis(1200)).await;
        let mut callers = Vec::new();
        for number in 0..14 {
            let mut wire = proxy.wire().await;
            wire.send(request("GET", "/v1/models", &[], "")).await;
            let head = wire.head().await.unwrap_or_else(|| panic!("caller {number} finds no place"));
            wire.body(&head).await;
            callers.push(wire);
        }
        assert!(open_ones(&mut strangers).await <= 2);
        // Nobody but callers is left: who comes now finds no place, and callers keep theirs.
        for _ in 0..4 {
            let mut late = TcpStream::connect(proxy.address).await.unwrap();
            late.write_all(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap_or_default();
            callers.push(Wire::of(late));
        }
        for wire in &mut callers[..14] {
            wire.send(request("GET", "/v1/models", &[], "")).await;
            assert_eq!(wire.message().await.0.status(), 200);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unfinished_headers_take_memory_within_a_bound() {
    within(async {
        const BOUND: u64 = 64 * 1024 * 1024;
        let bounds = json!({ "headerBytesMax": 1_000_000, "headerSeconds": 60, "keepAliveSeconds": 60 });
        let server = json!({ "connections": bounds, "memoryBytesMax": 4 * BOUND });
        let proxy = Proxy::start(server, &[endpoint("a", "http://127.0.0.1:9")]).await;
        let header = "GET /health HTTP/1.1\r\nhost: a\r\nx-long: ".to_owned() + &"y".repeat(900_000);
        let mut strangers = Vec::new();
        let mut most = 0;
        for number in 0..120 {
            let mut stranger = connect_from(number, proxy.address).await;
            // It may be closed meanwhile.
            stranger.write_all(header.as_bytes()).await.unwrap_or_default();
            strangers.push(stranger);
            most = most.max(metric(&proxy, "api_together_stranger_bytes").await);
        }
        assert!(most > BOUND / 4, "{most} bytes are not what was sent");
        assert!(most <= BOUND, "{most} bytes");
        // Callers are served, and the oldest had to go.
        assert_eq!(proxy.get("/v1/models").await.status, 200);
        drop(strangers);
        let begun = Instant::now();
        while metric(&proxy, "api_together_stranger_bytes").await > 100_000 {
            assert!(begun.elapsed() < CLOSE_BOUND, "it is never given back");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// Reads a stream's header and a little of its body, and then nothing.
async fn stops_reading(proxy: &Proxy, model: &str) -> Wire {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut wire = Wire::of(socket.connect(proxy.address).await.unwrap());
    wire.send(post_chat(&chat_stream(model))).await;
    assert_eq!(wire.head().await.unwrap().status(), 200);
    wire
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_reading_does_not_keep_its_endpoint_busy() {
    within(async {
        // More than all buffers on the way hold.
        let endless = Behaviour { events: 100_000, event_bytes: Some(2000), ..Behaviour::default() };
        let simulator = behaving(endless).await;
        let api =
            endpoint_with("a", &simulator.base_url(), json!({ "maxConcurrent": 2, "timeouts": { "idleMs": 1500 } }));
        let proxy = Proxy::start(json!({}), &[api]).await;
        let stalled = stops_reading(&proxy, "m").await;
        let http2 = client(|builder| builder.http2_prior_knowledge().http2_initial_stream_window_size(20_000));
        let mut over_http2 = http2
            .post(proxy.url("/v1/chat/completions"))
            .bearer_auth(KEY)
            .json(&chat_stream("m"))
            .send()
            .await
            .unwrap();
        assert_eq!(over_http2.version(), Version::HTTP_2);
        over_http2.chunk().await.unwrap();
        assert_eq!(proxy.status_of("a").await["inFlight"], 2);
        proxy.until_status("a", "inFlight", json!(0)).await;
        assert_eq!(proxy.status_of("a").await["errorCount"], 0, "the endpoint has no part in that");
        drop((stalled, over_http2));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_is_served_as_long_as_it_reads() {
    within(async {
        let simulator = behaving(Behaviour { events: 400, event_bytes: Some(2000), ..Behaviour::default() }).await;
        let api = endpoint_with("a", &simulator.base_url(), json!({ "timeouts": { "idleMs": 1000 } }));
        let proxy = Proxy::start(json!({}), &[api]).await;
        let mut wire = stops_reading(&proxy, "m").await;
        let mut text = Vec::new();
        while let Some(chunk) = wire.chunk().await.filter(|chunk| !chunk.is_empty()) {
            text.extend_from_slice(&chunk);
            if text.len() % 5 == 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        assert!(text.ends_with(b"data: [DONE]\n\n"), "it is cut after {} bytes", text.len());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_says_nothing_to_a_websocket_is_given_up() {
    within(async {
        let (silent, other) = (ByHand::bind().await, ByHand::bind().await);
        let timeouts = json!({ "firstByteMs": 1000, "idleMs": 60_000 });
        let apis = [
            endpoint_with("silent", &silent.base_url(), json!({ "timeouts": timeouts })),
            endpoint_with("other", &other.base_url(), json!({ "priority": 1 })),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        let mut wire = proxy.wire().await;
        wire.send(websocket("/v1/realtime?model=m")).await;
        let (kept, ..) = silent.call().await;
        let (mut endpoint, ..) = other.call().await;
        endpoint
            .send("HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\nhello")
            .await;
        let head = wire.head().await.unwrap();
        assert_eq!((head.status(), head.header("x-api-together-endpoint").as_deref()), (101, Some("other")));
        assert_eq!(wire.exactly(5).await.unwrap(), "hello");
        wire.send("answer").await;
        assert_eq!(endpoint.exactly(6).await.unwrap(), "answer");
        assert_eq!(proxy.status_of("silent").await["errorCount"], 1);
        drop(kept);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_may_be_silent_for_longer_than_an_answer() {
    within(async {
        let by_hand = ByHand::bind().await;
        let api =
            endpoint_with("a", &by_hand.base_url(), json!({ "timeouts": { "idleMs": 500, "firstByteMs": 1000 } }));
        let proxy = Proxy::start(json!({}), &[api]).await;
        let mut wire = proxy.wire().await;
        wire.send(websocket("/v1/realtime?model=m")).await;
        let (mut endpoint, ..) = by_hand.call().await;
        endpoint.send("HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n").await;
        assert_eq!(wire.head().await.unwrap().status(), 101);
        tokio::time::sleep(Duration::from_millis(2500)).await;
        endpoint.send("still here").await;
        assert_eq!(wire.exactly(10).await.unwrap(), "still here");
        // A refusal, though, is an answer like others.
        let mut refused = proxy.wire().await;
        refused.send(websocket("/v1/realtime?model=m")).await;
        let (mut endpoint, ..) = by_hand.call().await;
        endpoint.send("HTTP/1.1 403 Forbidden\r\ncontent-length: 100\r\n\r\nnever whole").await;
        assert_eq!(refused.head().await.unwrap().status(), 403);
        tokio::time::timeout(CLOSE_BOUND, refused.rest()).await.expect("it hangs");
        Reply::of(client(|builder| builder).get(proxy.url("/health"))).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_that_takes_no_answer_has_no_more_time_over_http2() {
    within(async {
        let proxy = with_connections(json!({ "h2IdleSeconds": 60, "headerSeconds": 60 })).await;
        let stream = TcpStream::connect(proxy.address).await.unwrap();
        // Nothing of an answer's body fits, so each request stays open.
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(0);
        let (mut sender, connection) = builder.handshake::<_, bytes::Bytes>(stream).await.unwrap();
        let begun = Instant::now();
        let ask = async {
            loop {
                let get = http::Request::get("http://a/v1/models").body(()).unwrap();
                let Ok(mut ready) = sender.clone().ready().await else { return };
                let Ok((answer, _)) = ready.send_request(get, true) else { return };
                sender = ready;
                // The next one comes while this one is open.
                tokio::spawn(async move {
                    let answer = answer.await;
                    tokio::time::sleep(Duration::from_mins(1)).await;
                    drop(answer);
                });
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        };
        tokio::select! {
            ended = connection => ended.unwrap_or_default(),
            () = ask => {}
            () = tokio::time::sleep(Duration::from_secs(20)) => panic!("it stays for ever"),
        }
        assert!(begun.elapsed() > Duration::from_secs(9), "{:?}", begun.elapsed());
        assert_eq!(metric(&proxy, "api_together_connections_closed_total{reason=\"request\"}").await, 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_stranger_holds_does_not_grow_with_its_requests() {
    within(async {
        let proxy = with_connections(json!({})).await;
        let mut wire = proxy.wire().await;
        let header = format!("GET /health HTTP/1.1\r\nhost: a\r\nx-long: {}\r\n\r\n", "y".repeat(20_000));
        for _ in 0..50 {
            wire.send(&header).await;
            assert_eq!(wire.message().await.0.status(), 200);
        }
        let held = metric(&proxy, "api_together_stranger_bytes").await;
        assert!(held < 100_000, "{held} bytes");
    })
    .await;
}
