//! Certificates of endpoints and of our own, and the protocols spoken over them.

use std::path::Path;

use api_together::simulator::{Behaviour, Simulator};
use http::Version;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::authority::{Authority, acceptor, serve_tls};
use crate::connections::websocket;
use crate::harness::{KEY, Proxy, Reply, chat, chat_stream, client, endpoint_with, simulator, within};

/// A simulated endpoint with a certificate for this name.
pub(crate) async fn secure(authority: &Authority, name: &str, protocols: &[&[u8]]) -> (Simulator, u16) {
    let simulator = simulator().await;
    let (certificate, key) = authority.issue(name);
    let port = serve_tls(simulator.handle(), acceptor(&certificate, &key, protocols)).await;
    (simulator, port)
}

pub(crate) fn write(folder: &Path, name: &str, text: &str) -> String {
    let file = folder.join(name);
    std::fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

async fn proxy_to(url: &str, tls: Value, http2: Value, spare: &Simulator) -> Proxy {
    let mut first = json!({ "tls": tls });
    if !http2.is_null() {
        first["http2"] = http2;
    }
    let apis = [endpoint_with("a", url, first), endpoint_with("b", &spare.base_url(), json!({ "priority": 1 }))];
    Proxy::start(json!({}), &apis).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_with_a_wrong_certificate_is_refused_and_passed_over() {
    within(async {
        let folder = tempfile::tempdir().unwrap();
        let (authority, stranger) = (Authority::new(), Authority::new());
        let ca = write(folder.path(), "ca.pem", &authority.pem());
        let spare = simulator().await;
        let (right, right_port) = secure(&authority, "localhost", &[b"http/1.1"]).await;
        let (strange, strange_port) = secure(&stranger, "localhost", &[b"http/1.1"]).await;
        let (other, other_port) = secure(&authority, "other.example", &[b"http/1.1"]).await;
        for (what, host, port, tls, accepted) in [
            ("right", "localhost", right_port, json!({ "caFile": ca }), true),
            ("unknown to the system", "localhost", right_port, json!({}), false),
            ("another authority", "localhost", strange_port, json!({ "caFile": ca }), false),
            ("another name", "localhost", other_port, json!({ "caFile": ca }), false),
            ("an address it is not for", "127.0.0.1", right_port, json!({ "caFile": ca }), false),
            ("unchecked", "localhost", strange_port, json!({ "insecure": true }), true),
            ("unchecked name", "localhost", other_port, json!({ "insecure": true }), true),
            ("unchecked address", "127.0.0.1", other_port, json!({ "insecure": true }), true),
        ] {
            for simulator in [&right, &strange, &other] {
                simulator.clear();
            }
            let proxy = proxy_to(&format!("https://{host}:{port}"), tls, Value::Null, &spare).await;
            let reply = proxy.chat("m").await;
            assert_eq!(reply.endpoint(), Some(if accepted { "a" } else { "b" }), "{what}: {reply:?}");
            let sent: usize = [&right, &strange, &other].iter().map(|simulator| simulator.requests().len()).sum();
            assert_eq!(sent, usize::from(accepted), "{what}: no request, and so no key, goes to a stranger");
            assert_eq!(proxy.status_of("a").await["errorCount"], u32::from(!accepted), "{what}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unchecked_connection_is_never_shared_with_a_checked_endpoint() {
    within(async {
        let (spare, stranger) = (simulator().await, Authority::new());
        let (strange, port) = secure(&stranger, "localhost", &[b"http/1.1"]).await;
        let url = format!("https://localhost:{port}");
        let apis = [
            endpoint_with("insecure", &url, json!({ "tls": { "insecure": true }, "models": ["insecure"] })),
            endpoint_with("checked", &url, json!({ "models": ["checked"] })),
            endpoint_with("b", &spare.base_url(), json!({ "priority": 1, "models": ["checked"] })),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        proxy.chat("insecure").await.assert_from("insecure", 1);
        proxy.chat("checked").await.assert_from("b", 2);
        assert_eq!(strange.requests().len(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_protocol_to_an_endpoint_is_agreed_on_or_set() {
    within(async {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let ca = write(folder.path(), "ca.pem", &authority.pem());
        let (both, both_port) = secure(&authority, "localhost", &[b"h2", b"http/1.1"]).await;
        let (old, old_port) = secure(&authority, "localhost", &[b"http/1.1"]).await;
        let (silent, silent_port) = secure(&authority, "localhost", &[]).await;
        let plain = simulator().await;
        let tls = |port: u16| format!("https://localhost:{port}");
        for (what, simulator, url, http2, version) in [
            ("offers both", &both, tls(both_port), Value::Null, Version::HTTP_2),
            ("offers both, set", &both, tls(both_port), json!(true), Version::HTTP_2),
            ("offers both, switched off", &both, tls(both_port), json!(false), Version::HTTP_11),
            ("offers one", &old, tls(old_port), Value::Null, Version::HTTP_11),
            ("offers nothing", &silent, tls(silent_port), Value::Null, Version::HTTP_11),
            ("plain", &plain, plain.base_url(), Value::Null, Version::HTTP_11),
            ("plain, set", &plain, plain.base_url(), json!(true), Version::HTTP_2),
        ] {
            simulator.clear();
            let tls = if url.starts_with("https") { json!({ "caFile": ca }) } else { json!({}) };
            let proxy = proxy_to(&url, tls, http2, &plain).await;
            proxy.chat("m").await.assert_from("a", 1);
            let text = proxy.open_stream("m").await.text().await.unwrap();
            assert!(text.ends_with("data: [DONE]\n\n"), "{what}: {text}");
            let versions: Vec<_> = simulator.requests().iter().map(|request| request.version).collect();
            assert_eq!(versions, [version, version], "{what}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_over_tls_are_passed_over() {
    within(async {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let ca = write(folder.path(), "ca.pem", &authority.pem());
        let spare = simulator().await;
        let (bad, port) = secure(&authority, "localhost", &[b"h2", b"http/1.1"]).await;
        bad.set_default(Behaviour::status(503));
        for http2 in [false, true] {
            let proxy =
                proxy_to(&format!("https://localhost:{port}"), json!({ "caFile": ca }), json!(http2), &spare).await;
            proxy.chat("m").await.assert_from("b", 2);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_may_be_served_over_tls() {
    within(async {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let (certificate, key) = authority.issue("localhost");
        let cert_file = write(folder.path(), "cert.pem", &certificate.pem());
        let key_file = write(folder.path(), "key.pem", &key.serialize_pem());
        let simulator = simulator().await;
        let server = json!({ "tls": { "certFile": cert_file, "keyFile": key_file } });
        let proxy = Proxy::start(server, &[endpoint_with("a", &simulator.base_url(), json!({}))]).await;
        let root = reqwest::Certificate::from_pem(authority.pem().as_bytes()).unwrap();
        let url = format!("https://localhost:{}/v1/chat/completions", proxy.address.port());
        let h1 = client(|builder| builder.tls_certs_only([root.clone()]).http1_only());
        let any = client(|builder| builder.tls_certs_only([root.clone()]));
        for (client, version) in [(h1, Version::HTTP_11), (any, Version::HTTP_2)] {
            let call = || client.post(&url).bearer_auth(KEY);
            let reply = Reply::of(call().json(&chat("m"))).await;
            reply.assert_from("a", 1);
            assert_eq!(reply.version, version);
            let stream = Reply::of(call().json(&chat_stream("m"))).await;
            assert!(stream.text().ends_with("data: [DONE]\n\n"));
            let refused = Reply::of(client.get(url.replace("chat/completions", "models"))).await;
            refused.assert_error(401, "invalid_request_error", "invalid_api_key");
        }
        // A certificate is shown, so a client that does not know the authority stays away.
        assert!(client(|builder| builder).post(&url).send().await.is_err());
    })
    .await;
}

/// Plays a realtime session's endpoint over TLS: it answers with 101 and a first message, takes one, and hangs up without a
/// word, as many do.
async fn hang_up_after_one_message(listener: &TcpListener, acceptor: &TlsAcceptor, first: &str) {
    let (tcp, _) = listener.accept().await.unwrap();
    let mut stream = acceptor.accept(tcp).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let switch = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
    stream.write_all(format!("{switch}{first}").as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    let mut answer = [0; 6];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"answer");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_that_ends_without_a_word_is_no_failure_of_its_endpoint() {
    within(async {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let ca = write(folder.path(), "ca.pem", &authority.pem());
        let (certificate, key) = authority.issue("localhost");
        let acceptor = acceptor(&certificate, &key, &[b"http/1.1"]);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
        let api = endpoint_with("hangs-up", &url, json!({ "models": ["talk"], "tls": { "caFile": ca } }));
        let proxy = Proxy::start(json!({}), &[api]).await;
        for round in 0..20 {
            let first = "s".repeat([1, 512, 5000, 40_000][round % 4]);
            let mut wire = proxy.wire().await;
            wire.send(websocket("/v1/realtime?model=talk")).await;
            let endpoint = hang_up_after_one_message(&listener, &acceptor, &first);
            let client = async {
                assert_eq!(wire.head().await.unwrap().status(), 101);
                assert!(wire.exactly(first.len()).await.unwrap() == first, "round {round}: not as it was sent");
                wire.send("answer").await;
                assert_eq!(wire.rest().await, "", "round {round}");
            };
            tokio::join!(endpoint, client);
        }
        proxy.until_open(1).await;
        let status = proxy.status_of("hangs-up").await;
        assert_eq!((&status["errorCount"], &status["available"]), (&json!(0), &json!(true)), "{status}");
        // The counters are the test program's, so the name is this test's alone.
        let metrics = proxy.get("/metrics").await;
        let line = r#"api_together_attempts_total{endpoint="hangs-up",outcome="ok"} 20"#;
        assert!(metrics.text().contains(line), "{line}");
    })
    .await;
}
