//! Starts the real proxy and the simulated endpoints behind it, and asks it things.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api_together::config::{self, Environment, Format};
use api_together::server::{Prepared, RunOptions};
use api_together::simulator::{Behaviour, Options, Simulator};
use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Version};
use pingora::server::{RunArgs, ShutdownSignal, ShutdownSignalWatch};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::oneshot;

use crate::wire::Wire;

/// A port that is free at this moment, to be listened on again and again.
pub(crate) fn port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The key that clients send.
pub(crate) const KEY: &str = "sk-client-7d1f93a8c05e42b6";
/// Longest time of one test; all of them end within seconds on an idle machine.
const TEST_BOUND: Duration = Duration::from_secs(40);
/// Longest wait for a state that is about to come.
const STATE_BOUND: Duration = Duration::from_secs(10);
/// How often it is looked for.
const POLL: Duration = Duration::from_millis(2);

/// Runs a test, and fails it if it hangs.
pub(crate) async fn within<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(TEST_BOUND, test).await.expect("the test takes too long")
}

/// Waits for a state that is about to come. Returns how long it took.
pub(crate) async fn until(what: &str, holds: impl Fn() -> bool) -> Duration {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < STATE_BOUND, "this never came: {what}");
        tokio::time::sleep(POLL).await;
    }
    begun.elapsed()
}

/// A simulated endpoint that answers as it should.
pub(crate) async fn simulator() -> Simulator {
    simulator_with(Options::default()).await
}

/// A simulated endpoint that always answers so.
pub(crate) async fn behaving(default: Behaviour) -> Simulator {
    simulator_with(Options { default, ..Options::default() }).await
}

pub(crate) async fn simulator_with(options: Options) -> Simulator {
    Simulator::bind_local(options).await.unwrap()
}

/// The key of an endpoint in these tests.
pub(crate) fn key_of(id: &str) -> String {
    format!("sk-endpoint-{id}-fedcba9876543210")
}

/// An endpoint's entry in the config: it serves every model.
pub(crate) fn endpoint(id: &str, base_url: &str) -> Value {
    json!({ "id": id, "name": id, "baseUrl": base_url, "apiKey": key_of(id), "models": ["*"] })
}

/// The same, with more keys or other values.
pub(crate) fn endpoint_with(id: &str, base_url: &str, more: Value) -> Value {
    merged(endpoint(id, base_url), more)
}

/// Endpoints `a`, `b`, … over these base URLs, asked strictly in that order.
pub(crate) fn in_order<'a>(base_urls: impl IntoIterator<Item = &'a str>) -> Vec<Value> {
    let ids = ["a", "b", "c", "d", "e", "f"];
    let numbered = base_urls.into_iter().zip(ids).enumerate();
    numbered.map(|(priority, (url, id))| endpoint_with(id, url, json!({ "priority": priority }))).collect()
}

pub(crate) fn merged(mut base: Value, more: Value) -> Value {
    let (Value::Object(fields), Value::Object(more)) = (&mut base, more) else { panic!("not objects") };
    fields.extend(more);
    base
}

/// A config's text, for a free port of this machine.
pub(crate) fn config_text(server: Value, apis: &[Value]) -> String {
    let defaults = json!({ "host": "127.0.0.1", "port": 0, "apiKey": KEY, "threads": 1 });
    json!({ "server": merged(defaults, server), "apis": apis }).to_string()
}

/// A port that nobody listens on.
pub(crate) fn closed_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// The body of a chat request.
pub(crate) fn chat(model: &str) -> Value {
    json!({ "model": model, "messages": [{ "role": "user", "content": "one two three" }] })
}

/// The body of a chat request whose answer is to be streamed.
pub(crate) fn chat_stream(model: &str) -> Value {
    merged(chat(model), json!({ "stream": true }))
}

/// A proxy that serves until it is dropped.
pub(crate) struct Proxy {
    pub address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    client: reqwest::Client,
    _folder: TempDir,
}

/// Stops the server at once when the harness says so, or is gone.
struct StopWith(Mutex<Option<oneshot::Receiver<()>>>);

#[async_trait]
impl ShutdownSignalWatch for StopWith {
    async fn recv(&self) -> ShutdownSignal {
        let stop = self.0.lock().unwrap().take();
        if let Some(stop) = stop {
            // An error is the harness being gone, which means the same.
            stop.await.unwrap_or_default();
        }
        ShutdownSignal::FastShutdown
    }
}

impl Proxy {
    /// Over these endpoints, with these settings under `server`.
    pub(crate) async fn start(server: Value, apis: &[Value]) -> Self {
        Self::of_text(&config_text(server, apis), &[]).await
    }

    /// Over endpoints that are asked strictly in this order.
    pub(crate) async fn before<'a>(simulators: impl IntoIterator<Item = &'a Simulator>) -> Self {
        let urls: Vec<_> = simulators.into_iter().map(|simulator| simulator.base_url()).collect();
        Self::start(json!({}), &in_order(urls.iter().map(String::as_str))).await
    }

    /// From a config file's text, with these environment variables.
    pub(crate) async fn of_text(text: &str, variables: &[(&str, &str)]) -> Self {
        let environment = Environment::fixed(variables.iter().copied());
        let folder = tempfile::tempdir().unwrap();
        let loaded = config::check_str(text, Format::Json, &environment, folder.path())
            .unwrap_or_else(|problems| panic!("{problems}"));
        let options = RunOptions { runtime_folder: folder.path().to_owned(), ..RunOptions::default() };
        let secure = loaded.config.server.tls.is_some();
        let mut prepared = Prepared::new(loaded.config, &options).unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], prepared.address.port()));
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            prepared.bootstrap();
            prepared.run(RunArgs { shutdown_signal: Box::new(StopWith(Mutex::new(Some(stopped)))) });
        });
        let client = client(|builder| if secure { builder } else { builder.http1_only() });
        let proxy = Self { address, stop: Some(stop), thread: Some(thread), client, _folder: folder };
        proxy.ready().await;
        proxy
    }

    async fn ready(&self) {
        let begun = Instant::now();
        while tokio::net::TcpStream::connect(self.address).await.is_err() {
            assert!(begun.elapsed() < STATE_BOUND, "the proxy never listens");
            tokio::time::sleep(POLL).await;
        }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// A request with the right key, to be completed.
    pub(crate) fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, self.url(path)).bearer_auth(KEY)
    }

    /// A request without a key, to be completed.
    pub(crate) fn request_without_key(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, self.url(path))
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        Reply::of(self.request(Method::GET, path)).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        Reply::of(self.request(Method::POST, path).json(body)).await
    }

    pub(crate) async fn post_text(&self, path: &str, body: impl Into<String>) -> Reply {
        let request = self.request(Method::POST, path).header("content-type", "application/json");
        Reply::of(request.body(body.into())).await
    }

    /// A chat that is not streamed.
    pub(crate) async fn chat(&self, model: &str) -> Reply {
        self.post("/v1/chat/completions", &chat(model)).await
    }

    /// A chat whose answer is streamed, up to its header.
    pub(crate) async fn open_stream(&self, model: &str) -> reqwest::Response {
        self.request(Method::POST, "/v1/chat/completions").json(&chat_stream(model)).send().await.unwrap()
    }

    /// The entry of an endpoint in the status page.
    pub(crate) async fn status_of(&self, id: &str) -> Value {
        let status = self.get("/v1/status").await.json();
        let apis = status["apis"].as_array().unwrap();
        apis.iter().find(|api| api["id"] == id).unwrap_or_else(|| panic!("no {id} in {status}")).clone()
    }

    /// Waits until the status page has this value for an endpoint.
    pub(crate) async fn until_status(&self, id: &str, key: &str, value: Value) {
        let begun = Instant::now();
        loop {
            let status = self.status_of(id).await;
            if status[key] == value {
                return;
            }
            assert!(begun.elapsed() < STATE_BOUND, "{key} never becomes {value}: {status}");
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until so many requests are open, that for the status page included.
    pub(crate) async fn until_open(&self, count: usize) {
        let begun = Instant::now();
        while self.get("/v1/status").await.json()["openRequests"] != count {
            assert!(begun.elapsed() < STATE_BOUND, "there are never {count} open requests");
            tokio::time::sleep(POLL).await;
        }
    }

    /// A connection of one's own.
    pub(crate) async fn wire(&self) -> Wire {
        Wire::connect(self.address).await
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        drop(self.stop.take());
        let Some(thread) = self.thread.take() else { return };
        let begun = Instant::now();
        while !thread.is_finished() && begun.elapsed() < STATE_BOUND {
            std::thread::sleep(POLL);
        }
        // Left alone if it hangs: a second panic while a test fails would hide the first.
        if thread.is_finished() {
            thread.join().unwrap_or_else(|_| eprintln!("the proxy's thread panicked"));
        }
    }
}

/// A client that follows nothing and asks nobody on the way.
pub(crate) fn client(settings: impl FnOnce(reqwest::ClientBuilder) -> reqwest::ClientBuilder) -> reqwest::Client {
    pingora::tls::install_default_crypto_provider();
    let builder = reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none());
    settings(builder).build().unwrap()
}

/// A client that speaks HTTP/2 without TLS.
pub(crate) fn h2c() -> reqwest::Client {
    client(reqwest::ClientBuilder::http2_prior_knowledge)
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub status: u16,
    pub version: Version,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    pub(crate) async fn of(request: reqwest::RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        let (status, version) = (response.status().as_u16(), response.version());
        let headers = response.headers().clone();
        Self { status, version, headers, body: response.bytes().await.unwrap() }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The endpoint that answered.
    pub(crate) fn endpoint(&self) -> Option<&str> {
        self.header("x-api-together-endpoint")
    }

    pub(crate) fn attempts(&self) -> Option<&str> {
        self.header("x-api-together-attempts")
    }

    /// Checks that this endpoint gave a good answer after so many attempts.
    pub(crate) fn assert_from(&self, endpoint: &str, attempts: usize) {
        assert_eq!(self.status, StatusCode::OK, "{self:?}");
        assert_eq!(
            (self.endpoint(), self.attempts()),
            (Some(endpoint), Some(attempts.to_string().as_str())),
            "{self:?}"
        );
    }

    /// Checks that this is an error of our own in OpenAI's shape, and returns its message.
    pub(crate) fn assert_error<'a>(&self, status: u16, kind: &str, code: impl Into<Option<&'a str>>) -> String {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.header("content-type"), Some("application/json"));
        let error = &self.json()["error"];
        assert_eq!((&error["type"], &error["code"]), (&json!(kind), &json!(code.into())), "{error}");
        assert!(error["param"].is_string() || error["param"].is_null(), "{error}");
        error["message"].as_str().unwrap().to_owned()
    }
}

/// How often each endpoint answered.
pub(crate) fn tally(replies: &[Reply]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for reply in replies {
        *counts.entry(reply.endpoint().unwrap_or("-").to_owned()).or_default() += 1;
    }
    counts
}
