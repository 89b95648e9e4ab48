//! Endpoints that are reached through a proxy.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::authority::{Authority, acceptor};
use crate::harness::{Proxy, config_text, endpoint_with, simulator, within};
use crate::program::{Running, folder_with, program};
use crate::tls::{secure, write};

/// `me:pa@ss`, as Basic has it.
const BASIC: &str = "Proxy-Authorization: Basic bWU6cGFAc3M=";

/// A proxy that connects everything to one address, whatever name it is asked for, and remembers those names.
struct Outbound {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Http,
    Socks,
}

impl Outbound {
    async fn start(kind: Kind, wants_login: bool, to: SocketAddr, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let names = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (names, tls) = (Arc::clone(&names), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        Some(tls) => {
                            let Ok(stream) = tls.accept(stream).await else { return };
                            http(stream, wants_login, to, &names).await;
                        }
                        None if kind == Kind::Http => http(stream, wants_login, to, &names).await,
                        None => socks(stream, wants_login, to, &names).await,
                    }
                });
            }
        });
        Self { address, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

/// Serves one connection as HTTP proxies do: sends on what it is asked for with a whole URL, and makes a tunnel of a CONNECT.
async fn http<S>(stream: S, wants_login: bool, to: SocketAddr, names: &Mutex<Vec<String>>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head).await.unwrap_or(0) == 0 {
                return;
            }
        }
        let (method, target) = (head.split(' ').next().unwrap(), head.split(' ').nth(1).unwrap());
        names.lock().unwrap().push(target.to_owned());
        let lower = head.to_ascii_lowercase();
        let length = lower.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        stream.read_exact(&mut body).await.unwrap();
        if wants_login && !lower.contains(&BASIC.to_ascii_lowercase()) {
            stream.write_all(b"HTTP/1.1 407 Who are you\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            continue;
        }
        let mut onward = TcpStream::connect(to).await.unwrap();
        if method == "CONNECT" {
            stream.write_all(b"HTTP/1.1 200 Connection established\r\nvia: test\r\n\r\n").await.unwrap();
            copy_bidirectional(&mut stream, &mut onward).await.map(drop).unwrap_or_default();
            return;
        }
        let path = target.strip_prefix("http://").and_then(|rest| rest.find('/').map(|at| &rest[at..])).unwrap();
        let lines =
            head.trim_end().split("\r\n").skip(1).filter(|line| !line.to_ascii_lowercase().starts_with("proxy-"));
        let first = format!("{method} {path} HTTP/1.1");
        let lines: Vec<&str> = [first.as_str(), "connection: close"].into_iter().chain(lines).collect();
        let head = lines.join("\r\n") + "\r\n\r\n";
        onward.write_all(&[head.as_bytes(), &body].concat()).await.unwrap();
        let mut answer = Vec::new();
        onward.read_to_end(&mut answer).await.unwrap();
        let answer = String::from_utf8(answer).unwrap().replace("connection: close\r\n", "");
        stream.write_all(answer.as_bytes()).await.unwrap();
    }
}

/// RFC 1928 and 1929, as far as a client needs them.
async fn socks(mut stream: TcpStream, wants_login: bool, to: SocketAddr, names: &Mutex<Vec<String>>) {
    let count = {
        stream.read_u8().await.unwrap();
        stream.read_u8().await.unwrap()
    };
    let mut methods = vec![0; count.into()];
    stream.read_exact(&mut methods).await.unwrap();
    stream.write_all(&[5, if wants_login { 2 } else { 0 }]).await.unwrap();
    if wants_login {
        stream.read_u8().await.unwrap();
        let mut login = Vec::new();
        for _ in 0..2 {
            let mut part = vec![0; stream.read_u8().await.unwrap().into()];
            stream.read_exact(&mut part).await.unwrap();
            login.push(String::from_utf8(part).unwrap());
        }
        let is_right = login == ["me", "pa@ss"];
        stream.write_all(&[1, u8::from(!is_right)]).await.unwrap();
        if !is_right {
            return;
        }
    }
    let mut head = [0; 4];
    stream.read_exact(&mut head).await.unwrap();
    assert_eq!(head, [5, 1, 0, 3], "the proxy resolves the name");
    let mut name = vec![0; stream.read_u8().await.unwrap().into()];
    stream.read_exact(&mut name).await.unwrap();
    let port = stream.read_u16().await.unwrap();
    names.lock().unwrap().push(format!("{}:{port}", String::from_utf8(name).unwrap()));
    stream.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await.unwrap();
    let mut onward = TcpStream::connect(to).await.unwrap();
    copy_bidirectional(&mut stream, &mut onward).await.map(drop).unwrap_or_default();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_is_reached_through_its_proxy_and_the_connection_kept() {
    within(async {
        for kind in [Kind::Http, Kind::Socks] {
            for wants_login in [false, true] {
                let simulator = simulator().await;
                let outbound = Outbound::start(kind, wants_login, simulator.addr(), None).await;
                let scheme = if kind == Kind::Http { "http" } else { "socks5" };
                let login = if wants_login { "me:pa%40ss@" } else { "" };
                let proxy = format!("{scheme}://{login}{}", outbound.address);
                // A name that only the proxy knows.
                let api = endpoint_with("a", "http://llm.internal:8080", json!({ "proxy": proxy }));
                let gateway = Proxy::start(json!({}), &[api]).await;
                for _ in 0..3 {
                    gateway.chat("m").await.assert_from("a", 1);
                }
                if kind == Kind::Http {
                    // Proxies refuse tunnels to ports other than 443.
                    assert_eq!(outbound.asked(), ["http://llm.internal:8080/v1/chat/completions"; 3]);
                } else {
                    assert_eq!(outbound.asked(), ["llm.internal:8080"], "one connection for all of them");
                }
                assert!(!simulator.requests()[0].headers.contains_key("proxy-authorization"));
                assert_eq!(simulator.requests()[0].headers["host"], "llm.internal:8080");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_spoken_with_the_endpoint_and_not_with_the_proxy() {
    within(async {
        let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
        let (simulator, port) = secure(&authority, "api.vendor.test", &[b"h2", b"http/1.1"]).await;
        let outbound = Outbound::start(Kind::Http, false, SocketAddr::from(([127, 0, 0, 1], port)), None).await;
        let ca = write(folder.path(), "ca.pem", &authority.pem());
        let proxy = format!("http://{}", outbound.address);
        let api = |name: &str| {
            endpoint_with("a", &format!("https://{name}"), json!({ "proxy": proxy, "tls": { "caFile": ca } }))
        };
        let gateway = Proxy::start(json!({}), &[api("api.vendor.test")]).await;
        gateway.chat("m").await.assert_from("a", 1);
        assert_eq!(
            (outbound.asked().as_slice(), simulator.requests().len()),
            (["api.vendor.test:443".to_owned()].as_slice(), 1)
        );
        // Whoever the proxy connects to must be who was asked for.
        let gateway = Proxy::start(json!({}), &[api("other.vendor.test")]).await;
        assert_eq!(gateway.chat("m").await.status, 502);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_may_itself_be_spoken_to_in_tls() {
    within(async {
        let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::new());
        let simulator = simulator().await;
        let (certificate, key) = authority.issue("localhost");
        let tls = acceptor(&certificate, &key, &[]);
        let outbound = Outbound::start(Kind::Http, true, simulator.addr(), Some(tls)).await;
        let proxy = format!("https://me:pa%40ss@localhost:{}", outbound.address.port());
        let api = endpoint_with("a", "http://llm.internal", json!({ "proxy": proxy }));
        let config = folder_with("apis.json", &config_text(json!({}), &[api]));
        let mut command = program(config.path());
        command.args(["--config", "apis.json"]).env("RUST_LOG", "info");
        // The system's authorities, as OpenSSL's variable names them.
        command.env("SSL_CERT_FILE", write(folder.path(), "ca.pem", &authority.pem()));
        let running = Running::of(command, config);
        running.ready().await;
        let call = crate::harness::client(|builder| builder).post(running.url("/v1/chat/completions"));
        let reply =
            crate::harness::Reply::of(call.bearer_auth(crate::harness::KEY).json(&crate::harness::chat("m"))).await;
        reply.assert_from("a", 1);
        assert_eq!(outbound.asked(), ["http://llm.internal/v1/chat/completions"]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_environment_names_the_proxy_unless_the_endpoint_does() {
    within(async {
        let simulator = simulator().await;
        let outbound = Outbound::start(Kind::Http, false, simulator.addr(), None).await;
        let url = format!("http://{}", outbound.address);
        let text = |more| config_text(json!({}), &[endpoint_with("a", "http://llm.internal", more)]);
        let gateway = Proxy::of_text(&text(json!({})), &[("HTTP_PROXY", &url)]).await;
        gateway.chat("m").await.assert_from("a", 1);
        assert_eq!(outbound.asked().len(), 1);
        for (more, variables) in [
            (json!({ "proxy": "none" }), vec![("HTTP_PROXY", url.as_str())]),
            (json!({}), vec![("HTTP_PROXY", url.as_str()), ("NO_PROXY", ".internal")]),
        ] {
            let gateway = Proxy::of_text(&text(more), &variables).await;
            assert_eq!(gateway.chat("m").await.status, 502, "nobody else knows the name");
            assert_eq!(outbound.asked().len(), 1);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxys_failure_names_the_proxy_and_shows_no_password() {
    within(async {
        let simulator = simulator().await;
        let outbound = Outbound::start(Kind::Http, true, simulator.addr(), None).await;
        let proxy = format!("http://me:wrong-password@{}", outbound.address);
        let api = endpoint_with("a", "http://llm.internal", json!({ "proxy": proxy }));
        let running = Running::start(&config_text(json!({}), &[api]), "info");
        running.ready().await;
        let call = crate::harness::client(|builder| builder).post(running.url("/v1/chat/completions"));
        let reply =
            crate::harness::Reply::of(call.bearer_auth(crate::harness::KEY).json(&crate::harness::chat("m"))).await;
        reply.assert_error(502, "server_error", "endpoint_unreachable");
        let line = running.logs("wants another user and password (407)").await;
        assert!(line.contains(&format!("llm.internal through the proxy http://{}", outbound.address)), "{line}");
        let log = running.killed();
        assert!(!log.contains("wrong-password"), "{log}");
    })
    .await;
}
