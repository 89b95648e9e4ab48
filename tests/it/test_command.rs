//! `api-together test`, against endpoints that fail at every step.

use std::path::Path;

use api_together::simulator::Behaviour;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, date_time_ymd};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::spawn_blocking;
use tokio_rustls::TlsAcceptor;

use crate::authority::{Authority, acceptor};
use crate::harness::{KEY, behaving, closed_port, config_text, endpoint_with, key_of, simulator, within};
use crate::program::{Running, folder_with, run};

/// Runs the command; its exit code, and what came of each endpoint.
async fn test(folder: &Path, arguments: &[&str]) -> (i32, Value) {
    let folder = folder.to_owned();
    let arguments: Vec<String> =
        ["test", "--json", "-c", "apis.json"].iter().chain(arguments).map(ToString::to_string).collect();
    let arguments = move || run(&folder, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let (code, out, errors) = spawn_blocking(arguments).await.unwrap();
    (code, serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{errors}")))
}

/// The last step of an endpoint's test: its name, its result, what was seen, and the way out.
fn last(tested: &Value, endpoint: &str) -> (String, String, String) {
    let all = tested.as_array().unwrap();
    let of = all.iter().find(|one| one["endpoint"] == endpoint).unwrap();
    let step = of["steps"].as_array().unwrap().last().unwrap();
    let text = |key: &str| step[key].as_str().unwrap().to_owned();
    (text("name"), text("result"), format!("{} ({})", text("what"), text("way_out")))
}

/// A port where a certificate is shown.
async fn showing(acceptor: TlsAcceptor) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            // The client may not like it.
            tokio::spawn(acceptor.accept(tcp));
        }
    });
    format!("https://localhost:{port}/v1")
}

/// A port where these bytes are the answer to whatever comes.
async fn saying(bytes: &'static [u8]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut tcp, _) = listener.accept().await.unwrap();
            tcp.read(&mut [0; 4096]).await.map(drop).unwrap_or_default();
            tcp.write_all(bytes).await.unwrap_or_default();
            tcp.shutdown().await.unwrap_or_default();
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_to_an_endpoint_is_explained_where_it_ends() {
    within(async {
        let authority = Authority::new();
        let other = Authority::new();
        let key = KeyPair::generate().unwrap();
        let made = |change: &dyn Fn(&mut CertificateParams)| {
            let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            change(&mut params);
            authority.sign(&params, &key)
        };
        let expired = made(&|params| params.not_after = date_time_ymd(2020, 1, 1));
        let early = made(&|params| params.not_before = date_time_ymd(2120, 1, 1));
        let of_authority = made(&|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
        let elsewhere = authority.issue("elsewhere.example");
        let namesake = other.issue("localhost");
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "nobody");
        let unknown = params.self_signed(&key).unwrap();
        let show =
            async |certificate: &rcgen::Certificate, key: &KeyPair| showing(acceptor(certificate, key, &[])).await;
        let web =
            saying(b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\n\r\n<html>welcome</html>")
                .await;
        let silent = saying(b"").await;
        // An alert that ends the handshake: no protocol version in common (RFC 8446, 6).
        let alert = saying(&[21, 3, 3, 0, 2, 2, 70]).await;
        let cases = [
            ("closed", closed_port(), "connect", "connection refused"),
            ("nowhere", "http://nowhere.invalid/v1".to_owned(), "name", "spelt right"),
            ("expired", show(&expired, &key).await, "TLS", "has expired"),
            ("early", show(&early, &key).await, "TLS", "not valid yet"),
            ("of-authority", show(&of_authority, &key).await, "TLS", "CA:TRUE"),
            (
                "elsewhere",
                show(&elsewhere.0, &elsewhere.1).await,
                "TLS",
                "its certificate is for elsewhere.example, not for",
            ),
            ("namesake", show(&namesake.0, &namesake.1).await, "TLS", "not signed by the authority that it names"),
            ("unknown", show(&unknown, &key).await, "TLS", "not trusted here"),
            ("plain", format!("https://localhost:{web}/v1"), "TLS", "does not speak TLS"),
            (
                "silent",
                format!("https://localhost:{silent}/v1"),
                "TLS",
                "closed the connection during the TLS handshake",
            ),
            ("alert", format!("https://localhost:{alert}/v1"), "TLS", "no version of TLS or no cipher in common"),
            ("web", format!("http://127.0.0.1:{web}/v1"), "answer", "m: 200, with a web page"),
        ];
        let more = json!({ "tls": { "caFile": "ca.pem" }, "models": ["m"] });
        let apis: Vec<Value> = cases.iter().map(|(id, url, ..)| endpoint_with(id, url, more.clone())).collect();
        let folder = folder_with("apis.json", &config_text(json!({}), &apis));
        std::fs::write(folder.path().join("ca.pem"), authority.pem()).unwrap();
        let (code, tested) = test(folder.path(), &[]).await;
        assert_eq!(code, 1);
        for (id, _, step, says) in &cases {
            let (name, result, text) = last(&tested, id);
            assert_eq!((name.as_str(), result.as_str()), (*step, "failed"), "{id}: {text}");
            assert!(text.contains(says), "{id}: {text}");
            for rust in ["Other", "Error", "(\"", "::", "os error 111"] {
                assert!(!text.contains(rust), "{id}: {text}");
            }
        }
        assert!(!folder.path().join("data").exists(), "no ledger is made");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_endpoint_answers_is_explained_and_counted() {
    within(async {
        let good = simulator().await;
        let refuses = behaving(Behaviour {
            body: Some(format!("{{\"error\":{{\"message\":\"bad \\u001b[2Jkey {}\"}}}}", key_of("refuses"))),
            ..Behaviour::status(401)
        })
        .await;
        let fails = behaving(Behaviour::status(503)).await;
        let apis = [
            endpoint_with("good", &good.base_url(), json!({ "models": ["sim-model"], "rpd": 2, "tpd": 1000 })),
            endpoint_with("pattern", &good.base_url(), json!({ "models": ["sim-*"] })),
            endpoint_with("refuses", &refuses.base_url(), json!({ "models": ["m"] })),
            endpoint_with("fails", &fails.base_url(), json!({ "models": ["m"] })),
            endpoint_with("off", &closed_port(), json!({ "enabled": false })),
        ];
        let running = Running::start(&config_text(json!({}), &apis), "info");
        running.ready().await;
        let folder = running.folder.path();
        crate::commands::controlled(folder).await;
        let (code, tested) = test(folder, &[]).await;
        assert_eq!(code, 1);
        assert_eq!(tested.as_array().unwrap().len(), 4, "what is off is not asked");
        let of = |id: &str| last(&tested, id);
        let (name, result, text) = of("good");
        assert!(
            name == "answer" && result == "ok" && text.contains("sim-model, ") && text.contains(" tokens"),
            "{text}"
        );
        assert!(of("pattern").2.contains("sim-model"), "{:?}", of("pattern"));
        let (name, result, text) = of("refuses");
        assert!(name == "key" && result == "failed" && text.contains("401") && text.contains("apiKey"), "{text}");
        assert!(!text.contains(&key_of("refuses")) && text.contains("bad [2Jkey"), "nothing moves a terminal: {text}");
        assert!(of("fails").2.contains("503"), "{:?}", of("fails"));
        let status = reqwest::Client::new().get(running.url("/v1/status")).bearer_auth(KEY).send().await.unwrap();
        let status: Value = status.json().await.unwrap();
        assert_eq!(status["apis"][0]["usage"]["rpd"], 1, "one permit");
        assert!(status["apis"][0]["usage"]["tpd"].as_u64().unwrap() > 0, "and its tokens");

        let (code, tested) = test(folder, &["good"]).await;
        assert_eq!((code, tested.as_array().unwrap().len()), (0, 1));
        let (code, tested) = test(folder, &["good"]).await;
        assert!(code == 1 && last(&tested, "good").2.contains("full (2 requests a day)"), "{tested}");
        let (code, tested) = test(folder, &["off"]).await;
        assert!(code == 1 && last(&tested, "off").2.contains("refused"), "asked for by name: {tested}");
        let folder = folder.to_owned();
        let (code, _, errors) =
            spawn_blocking(move || run(&folder, &["test", "nobody", "-c", "apis.json"])).await.unwrap();
        assert!(code == 1 && errors.contains("good, pattern, refuses, fails, off"), "{errors}");
    })
    .await;
}
