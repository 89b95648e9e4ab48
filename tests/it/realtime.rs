//! Realtime sessions: `WebSocket`s, to us and from us over plain text and TLS, whose endpoint says its first word in every way it can.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::authority::{Authority, acceptor};
use crate::connections::websocket;
use crate::harness::{KEY, Proxy, Reply, client, endpoint_with};
use crate::program::setting;
use crate::tls::write;
use crate::wire::Wire;

/// Sessions in each of the four ways, by plain text and by TLS: `SESSIONS=1000` for as many as are promised.
const SESSIONS: usize = 25;
/// Sessions that are open at once.
const AT_ONCE: usize = 16;
const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
const BYE: &str = "response.done";

/// How an endpoint says its first word.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// In one segment with its 101.
    InOneSegment,
    /// At once behind it.
    InTwoSegments,
    /// Begun in the segment of its 101, and ended a moment later.
    Broken,
    /// In small pieces, each a moment after the one before.
    Slowly,
}

const WAYS: [Way; 4] = [Way::InOneSegment, Way::InTwoSegments, Way::Broken, Way::Slowly];
/// Lengths of the first word: shorter and longer than what a reader of secrets would hold back, than a TLS record, than a pipe.
const LENGTHS: [usize; 8] = [1, 40, 511, 512, 513, 5000, 20_000, 100_000];

/// A text that is nowhere the same, so that a byte lost or twice is seen.
fn first_word(length: usize) -> String {
    let mut text = String::new();
    for number in 0_u32.. {
        if text.len() >= length {
            break;
        }
        write!(text, "{number:x},").unwrap();
    }
    text.truncate(length);
    text
}

/// Plays the endpoint's side of one session: first word, an echo, and an end without a word.
async fn play(mut endpoint: Wire, way: Way, first: &str) {
    let head = endpoint.head().await.unwrap();
    assert_eq!(head.header("upgrade").as_deref(), Some("websocket"));
    match way {
        Way::InOneSegment => endpoint.send(format!("{SWITCH}{first}")).await,
        Way::InTwoSegments => {
            endpoint.send(SWITCH).await;
            endpoint.send(first).await;
        }
        Way::Broken => {
            let (begun, rest) = first.split_at(first.len() / 2);
            endpoint.send(format!("{SWITCH}{begun}")).await;
            tokio::time::sleep(Duration::from_millis(2)).await;
            endpoint.send(rest).await;
        }
        Way::Slowly => {
            endpoint.send(SWITCH).await;
            for piece in first.as_bytes().chunks(first.len().div_ceil(4)) {
                tokio::time::sleep(Duration::from_millis(2)).await;
                endpoint.send(piece).await;
            }
        }
    }
    assert!(endpoint.exactly(first.len()).await.unwrap() == first.as_bytes(), "the echo is not what was said");
    endpoint.send(BYE).await;
}

/// The client's side.
async fn talk(mut client: Wire, way: Way, first: &str) {
    client.send(websocket("/v1/realtime?model=talk")).await;
    let head = client.head().await.unwrap_or_else(|| panic!("{way:?}: closed without a word"));
    assert_eq!(head.status(), 101, "{way:?}: {head:?}");
    let said =
        client.exactly(first.len()).await.unwrap_or_else(|| panic!("{way:?}: {} bytes did not come", first.len()));
    assert!(said == first.as_bytes(), "{way:?}: {} bytes are not as they were sent", first.len());
    client.send(first).await;
    assert_eq!(client.rest().await, BYE, "{way:?}");
}

async fn connect(address: SocketAddr, tls: Option<TlsConnector>) -> Wire {
    let tcp = TcpStream::connect(address).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    match tls {
        Some(tls) => Wire::of(tls.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap()),
        None => Wire::of(tcp),
    }
}

async fn accept(tcp: TcpStream, tls: Option<TlsAcceptor>) -> Wire {
    tcp.set_nodelay(true).unwrap();
    match tls {
        Some(tls) => Wire::of(tls.accept(tcp).await.unwrap()),
        None => Wire::of(tcp),
    }
}

fn trusting(authority: &Authority) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).unwrap()).unwrap();
    TlsConnector::from(Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()))
}

/// Sessions of every way and length, through a proxy with one endpoint. `secure`: TLS on both sides.
async fn sessions(id: &str, secure: bool) {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let ca = write(folder.path(), "ca.pem", &authority.pem());
    let (certificate, key) = authority.issue("localhost");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (server, url, tls) = if secure {
        let certificate_file = write(folder.path(), "cert.pem", &certificate.pem());
        let key_file = write(folder.path(), "key.pem", &key.serialize_pem());
        let server = json!({ "tls": { "certFile": certificate_file, "keyFile": key_file } });
        (server, format!("https://localhost:{port}"), json!({ "caFile": ca }))
    } else {
        (json!({}), format!("http://localhost:{port}"), json!({}))
    };
    let proxy = Proxy::start(server, &[endpoint_with(id, &url, json!({ "models": ["talk"], "tls": tls }))]).await;
    let acceptor = secure.then(|| acceptor(&certificate, &key, &[b"http/1.1"]));
    let connector = secure.then(|| trusting(&authority));
    let rounds = setting("SESSIONS", SESSIONS) * WAYS.len();
    let mut running = JoinSet::new();
    for round in 0..rounds {
        if running.len() == AT_ONCE {
            running.join_next().await.unwrap().unwrap();
        }
        let way = WAYS[round % WAYS.len()];
        let first: Arc<str> = first_word(LENGTHS[round / WAYS.len() % LENGTHS.len()]).into();
        let client = connect(proxy.address, connector.clone()).await;
        let talking = tokio::spawn({
            let first = Arc::clone(&first);
            async move { talk(client, way, &first).await }
        });
        let (tcp, _) = listener.accept().await.unwrap();
        let acceptor = acceptor.clone();
        running.spawn(async move {
            play(accept(tcp, acceptor).await, way, &first).await;
            talking.await.unwrap();
        });
    }
    while let Some(ended) = running.join_next().await {
        ended.unwrap();
    }
    // Every one of them was a success, whose end says nothing of the endpoint.
    let reqwest = client(|builder| builder.danger_accept_invalid_certs(true));
    let line = format!(r#"api_together_attempts_total{{endpoint="{id}",outcome="ok"}} {rounds}"#);
    let scheme = if secure { "https" } else { "http" };
    let metrics = format!("{scheme}://localhost:{}/metrics", proxy.address.port());
    for tries in 0.. {
        let text = Reply::of(reqwest.get(&metrics).bearer_auth(KEY)).await.text().to_owned();
        if text.contains(&line) {
            break;
        }
        let found =
            text.lines().filter(|line| line.contains(id) && line.contains("attempts_total")).collect::<Vec<_>>();
        assert!(tries < 100, "not {line}, but {found:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Fails a run that hangs; a session takes some milliseconds.
async fn in_time(sessions: impl Future<Output = ()>) {
    let longest =
        Duration::from_mins(1) + Duration::from_millis(100) * setting("SESSIONS", SESSIONS).try_into().unwrap();
    tokio::time::timeout(longest, sessions).await.expect("a session hangs");
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_over_plain_text_lose_no_byte() {
    in_time(sessions("realtime-plain", false)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_over_tls_lose_no_byte() {
    in_time(sessions("realtime-tls", true)).await;
}

/// A frame of a server with a text in it.
pub(crate) fn text_frame(text: &str) -> Vec<u8> {
    let length = u16::try_from(text.len()).unwrap();
    [&[0x81, 126], &length.to_be_bytes()[..], text.as_bytes()].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tokens_of_each_response_are_counted_while_the_session_lasts() {
    in_time(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let api = endpoint_with("a", &url, json!({ "models": [], "modelMapping": { "talk": "gpt-realtime" } }));
        let proxy = Proxy::start(json!({}), &[api]).await;
        let mut client = connect(proxy.address, None).await;
        let offer = websocket("/v1/realtime?model=talk");
        let offer = offer.replacen("\r\n", "\r\nsec-websocket-extensions: permessage-deflate\r\n", 1);
        client.send(offer).await;
        let mut endpoint = accept(listener.accept().await.unwrap().0, None).await;
        let head = endpoint.head().await.unwrap();
        assert_eq!(head.header("sec-websocket-extensions"), None, "what is compressed could not be read");
        endpoint.send(SWITCH).await;
        assert_eq!(client.head().await.unwrap().status(), 101);
        let usage = json!({ "total_tokens": 30, "input_tokens": 20, "output_tokens": 10,
            "input_token_details": { "cached_tokens": 5, "text_tokens": 12, "audio_tokens": 8 },
            "output_token_details": { "text_tokens": 4, "audio_tokens": 6 } });
        let done = json!({ "type": "response.done", "response": { "id": "resp_1", "usage": usage } }).to_string();
        let delta = json!({ "type": "response.output_text.delta", "delta": "a \"usage\" of words" }).to_string();
        for number in 1..=3 {
            for text in [&delta, &done] {
                let frame = text_frame(text);
                // In two pieces, the first of which ends within its header.
                endpoint.send(&frame[..3]).await;
                tokio::time::sleep(Duration::from_millis(2)).await;
                endpoint.send(&frame[3..]).await;
                assert!(client.exactly(frame.len()).await.unwrap() == frame, "a frame passes as it is");
            }
            for tries in 0.. {
                let stats = proxy.get("/v1/token/stats").await.json()["detailedStats"]["a"].clone();
                if stats["requests"] == number {
                    assert_eq!(
                        (&stats["totalTokens"], &stats["promptTokens"]),
                        (&json!(30 * number), &json!(20 * number))
                    );
                    assert_eq!(stats["cachedTokens"], json!(5 * number), "{stats}");
                    assert_eq!(stats["audioTokens"], json!(14 * number), "{stats}");
                    break;
                }
                assert!(tries < 200, "{stats}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        assert_eq!(proxy.status_of("a").await["inFlight"], 1, "it lasts");
    })
    .await;
}

/// Sessions that are opened one after the other by each of several clients: enough for an endpoint's 101 to overtake the end of the
/// request within the gateway, if anything lets it.
const CALLS_OF_EACH: usize = 200;
const CLIENTS_AT_ONCE: usize = 8;

/// Endpoints' sides of so many sessions, each of which says a word, and then one back. It never sleeps, so that it answers before the
/// gateway's thread has done anything else.
fn answer_at_once(listener: &std::net::TcpListener, mut sessions: usize) {
    use std::io::{Read as _, Write as _};
    listener.set_nonblocking(true).unwrap();
    let mut open: Vec<(std::net::TcpStream, Vec<u8>)> = Vec::new();
    while sessions > 0 {
        if let Ok((tcp, _)) = listener.accept() {
            tcp.set_nonblocking(true).unwrap();
            open.push((tcp, Vec::new()));
        }
        open.retain_mut(|(tcp, head)| {
            let mut piece = [0; 4096];
            let Ok(length) = tcp.read(&mut piece) else { return true };
            let has_begun = head.ends_with(b"\r\n\r\n");
            let said = if has_begun { piece[..length].to_vec() } else { [SWITCH, "ready"].concat().into_bytes() };
            head.extend_from_slice(&piece[..length]);
            if head.ends_with(b"\r\n\r\n") || has_begun {
                tcp.write_all(&said).unwrap();
            }
            sessions -= usize::from(length == 0);
            length > 0
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_answers_at_once_ends_no_session() {
    in_time(async {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        // With one thread nobody else could see the answer before the request has been looked after.
        let api = endpoint_with("a", &url, json!({ "models": ["talk"] }));
        let proxy = Proxy::start(json!({ "threads": 4 }), &[api]).await;
        std::thread::spawn(move || answer_at_once(&listener, CLIENTS_AT_ONCE * CALLS_OF_EACH));
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS_AT_ONCE {
            let address = proxy.address;
            clients.spawn(async move {
                for number in 0..CALLS_OF_EACH {
                    let mut client = connect(address, None).await;
                    client.send(websocket("/v1/realtime?model=talk")).await;
                    assert_eq!(client.head().await.unwrap().status(), 101);
                    assert_eq!(client.exactly(5).await.as_deref(), Some(&b"ready"[..]), "session {number}");
                    client.send("ping").await;
                    assert_eq!(client.exactly(4).await.as_deref(), Some(&b"ping"[..]), "session {number}");
                }
            });
        }
        clients.join_all().await;
    })
    .await;
}
