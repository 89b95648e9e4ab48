//! The load of profile-guided optimisation (PGO), for a program that is built with instrumentation: `train api-together PROGRAM`
//! or `train bare PROGRAM`. `make release` runs it.
//!
//! Code that never runs here is later compiled as if it never ran at all. So the load contains some of everything: HTTP/1.1 and
//! HTTP/2, with TLS and without, on both sides; streams, long bodies, endpoints that fail and limits that are reached.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a training that cannot be done must stop, and what was done goes to standard output"
)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use api_together::simulator::{Behaviour, Options, Simulator};
use reqwest::{ClientBuilder, Version};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use authority::{Authority, acceptor, serve_tls};

#[path = "../tests/it/authority.rs"]
mod authority;

const KEY: &str = "sk-training-client";
/// Longest wait for the program to listen, for one answer, and for it to end.
const PATIENCE: Duration = Duration::from_mins(1);
const POLL: Duration = Duration::from_millis(20);
/// Lines of the program's log that are shown if the training fails.
const LAST_WORDS: usize = 15;
/// Requests at once. Their order does not matter here, only how often each step runs.
const AT_ONCE: usize = 16;

#[tokio::main]
async fn main() {
    pingora::tls::install_default_crypto_provider();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["api-together", program] => train_api_together(program).await,
        ["bare", program] => train_bare(program).await,
        _ => {
            eprintln!("usage: train api-together|bare PROGRAM");
            std::process::exit(2);
        }
    }
}

/// Trains the yardstick with the load that `make bench` measures and nothing else, so that it is as fast as possible.
async fn train_bare(program: &str) {
    let endpoint = endpoint(0).await;
    let port = free_port().await;
    let (program, folder) = (found(program), tempfile::tempdir().unwrap());
    let ports = [port.to_string(), endpoint.addr().port().to_string()];
    let running = Running::start(Command::new(&program).args(ports), port, folder.path()).await;
    let clients = Clients::new(&format!("http://localhost:{port}"), Version::HTTP_11, ClientBuilder::http1_only);
    clients.send("JSON", 10_000, &chat("bench", 1024, false)).await;
    clients.send("streams", 1_000, &chat("bench", 1024, true)).await;
    clients.send("JSON of 64 KB", 200, &chat("bench", 64 * 1024, false)).await;
    running.end();
}

async fn train_api_together(program: &str) {
    let (program, folder) = (found(program), tempfile::tempdir().unwrap());
    let authority = Authority::new();
    let file = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let ca_file = file("ca.pem", authority.pem());
    let (steady, flaky) = (endpoint(0).await, endpoint(10).await);
    let old_tls = secure(&authority, &steady, &[b"http/1.1"]).await;
    let new_tls = secure(&authority, &steady, &[b"h2", b"http/1.1"]).await;
    let api = |id: &str, url: &str, model: &str, more: Value| {
        let mut api = json!({ "id": id, "baseUrl": url, "apiKey": "sk-training-endpoint", "models": [model] });
        api.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        api
    };
    let limits = json!({ "rpm": 1_000_000, "rpd": 100_000_000, "tpm": 1_000_000_000, "modelMapping": { "bench": "bench-large" } });
    let mut apis: Vec<_> =
        (1..=5).map(|number| api(&format!("plain-{number}"), &steady.base_url(), "bench-*", limits.clone())).collect();
    let tls = json!({ "tls": { "caFile": ca_file } });
    let after = json!({ "priority": 1 });
    apis.extend([
        api("old-tls", &old_tls, "old-tls", tls.clone()),
        api("new-tls", &new_tls, "new-tls", tls),
        api("flaky", &flaky.base_url(), "flaky", json!({})),
        api("instead", &steady.base_url(), "flaky", after.clone()),
        api("narrow", &steady.base_url(), "narrow", json!({ "rpm": 100 })),
        api("beside", &steady.base_url(), "narrow", after),
    ]);

    for secure in [false, true] {
        let port = free_port().await;
        let mut server = json!({ "host": "127.0.0.1", "port": port, "apiKey": KEY });
        if secure {
            let (certificate, key) = authority.issue("localhost");
            let cert_file = file("cert.pem", certificate.pem());
            server["tls"] = json!({ "certFile": cert_file, "keyFile": file("key.pem", key.serialize_pem()) });
        }
        let config = file("apis.json", json!({ "server": server, "apis": apis }).to_string());
        let running = Running::start(Command::new(&program).arg("--config").arg(config), port, folder.path()).await;
        let root = reqwest::Certificate::from_pem(authority.pem().as_bytes()).unwrap();
        if secure {
            let url = format!("https://localhost:{port}");
            for version in [Version::HTTP_11, Version::HTTP_2] {
                let clients = Clients::new(&url, version, |builder| {
                    let builder = builder.tls_certs_only([root.clone()]);
                    if version == Version::HTTP_11 { builder.http1_only() } else { builder }
                });
                clients.send("JSON over TLS", 300, &chat("bench", 1024, false)).await;
                clients.send("streams over TLS", 50, &chat("bench", 1024, true)).await;
            }
        } else {
            let url = format!("http://localhost:{port}");
            let http1 = Clients::new(&url, Version::HTTP_11, ClientBuilder::http1_only);
            http1.send("JSON", 10_000, &chat("bench", 1024, false)).await;
            http1.send("streams", 1_000, &chat("bench", 1024, true)).await;
            http1.send("JSON of 64 KB", 200, &chat("bench", 64 * 1024, false)).await;
            http1.send("JSON of 2 MB", 8, &chat("bench", 2 << 20, false)).await;
            for model in ["old-tls", "new-tls", "flaky", "narrow"] {
                http1.send(model, 500, &chat(model, 1024, false)).await;
                http1.send(&format!("{model}, streams"), 50, &chat(model, 1024, true)).await;
            }
            let http2 = Clients::new(&url, Version::HTTP_2, ClientBuilder::http2_prior_knowledge);
            http2.send("JSON over HTTP/2", 500, &chat("bench", 1024, false)).await;
            http2.send("streams over HTTP/2", 100, &chat("bench", 1024, true)).await;
        }
        running.end();
    }
}

/// Returns the program's absolute path.
fn found(program: &str) -> PathBuf {
    std::fs::canonicalize(program).unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// Returns a chat request of about this size. Like SDKs, it asks streams for their usage.
fn chat(model: &str, size: usize, stream: bool) -> Value {
    let content = "All work and no play makes Jack a dull boy. ".repeat(size / 44);
    let mut body = json!({ "messages": [{ "role": "user", "content": content }], "temperature": 0.7, "model": model });
    if stream {
        body["stream"] = json!(true);
        body["stream_options"] = json!({ "include_usage": true });
    }
    body
}

/// Starts an endpoint that answers this percentage of its requests with 503.
async fn endpoint(failure_rate_percent: u8) -> Simulator {
    let default = Behaviour { events: 100, ..Behaviour::default() };
    Simulator::bind_local(Options { default, failure_rate_percent, record: false, ..Options::default() }).await.unwrap()
}

async fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

/// The program in training, and its log.
struct Running {
    process: Child,
    log: PathBuf,
}

impl Running {
    async fn start(command: &mut Command, port: u16, folder: &Path) -> Self {
        let log = folder.join("log");
        let file = File::create(&log).unwrap();
        // The profile must not depend on the environment in which this is started.
        for name in ["PORT", "RUST_LOG", "LOG_LEVEL", "RUNTIME_DIRECTORY"] {
            command.env_remove(name);
        }
        let command = command.current_dir(folder).stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let mut running = Self { process: command.spawn().expect("the program"), log };
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            let ended = running.process.try_wait().unwrap();
            assert!(ended.is_none() && begun.elapsed() < PATIENCE, "the program does not listen: {ended:?}");
            tokio::time::sleep(POLL).await;
        }
        running
    }

    /// Ends the program gracefully, since it writes its profile at exit.
    fn end(mut self) {
        kill_process(Pid::from_child(&self.process), Signal::INT).unwrap();
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                break status;
            }
            assert!(begun.elapsed() < PATIENCE, "the program does not end");
            std::thread::sleep(POLL);
        };
        assert!(status.success(), "the program ended with {status}");
    }
}

impl Drop for Running {
    /// If the training failed, prints the end of the log. Leaves no process behind.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("the program's last words:\n{}", lines[lines.len().saturating_sub(LAST_WORDS)..].join("\n"));
        }
        self.process.kill().unwrap_or_default();
    }
}

struct Clients {
    url: String,
    /// The version that answers must have. In TLS a client may negotiate another one, which would leave code untrained.
    version: Version,
    client: reqwest::Client,
}

impl Clients {
    fn new(base: &str, version: Version, settings: impl FnOnce(ClientBuilder) -> ClientBuilder) -> Self {
        let client = settings(reqwest::Client::builder().no_proxy().timeout(PATIENCE)).build().unwrap();
        Self { url: format!("{base}/v1/chat/completions"), version, client }
    }

    /// Sends a body this many times, and reads and checks every answer.
    async fn send(&self, what: &str, times: usize, body: &Value) {
        let begun = Instant::now();
        let body = Arc::<str>::from(body.to_string());
        let mut tasks = JoinSet::new();
        for task in 0..AT_ONCE {
            let (client, url, version, body) = (self.client.clone(), self.url.clone(), self.version, Arc::clone(&body));
            let share = times / AT_ONCE + usize::from(task < times % AT_ONCE);
            tasks.spawn(async move {
                for _ in 0..share {
                    let request = client.post(&url).bearer_auth(KEY).header("content-type", "application/json");
                    let answer = request.body(body.to_string()).send().await.expect("an answer");
                    assert!(answer.status().is_success() && answer.version() == version, "{answer:?}");
                    let text = answer.bytes().await.expect("a whole answer");
                    assert!(text.ends_with(b"}") || text.ends_with(b"data: [DONE]\n\n"), "{text:?}");
                }
            });
        }
        tasks.join_all().await;
        println!("{times:>6} × {what} in {:.1} s", begun.elapsed().as_secs_f64());
    }
}

/// Serves an endpoint over TLS. Returns its base URL.
async fn secure(authority: &Authority, endpoint: &Simulator, protocols: &[&[u8]]) -> String {
    let (certificate, key) = authority.issue("localhost");
    let port = serve_tls(endpoint.handle(), acceptor(&certificate, &key, protocols)).await;
    format!("https://localhost:{port}")
}
