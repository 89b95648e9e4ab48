//! An endpoint that stalls or breaks off at every byte of its answer: before commit another one's full answer arrives, after it
//! the client is told, and never is a cut answer taken for a whole one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use api_together::simulator::Behaviour;
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::harness::{KEY, Proxy, behaving, chat, chat_stream, endpoint_with, h2c, simulator, within};
use crate::wire::{Head, STREAM_HEAD, Wire, chunked, event, request};

/// Says where the answer is cut and how.
const CUT: &str = "x-test-cut";
/// What is sent before a reset must have been read by then, or it may be lost with the connection.
const BEFORE_RESET: Duration = Duration::from_millis(50);
/// Far above what a good answer takes here, and all that a test of a silence has to wait.
const PATIENCE_MS: u64 = 500;
/// Requests at once.
const CONCURRENCY: usize = 64;

const HOWS: [&str; 3] = ["close", "reset", "stall"];

/// An endpoint that sends the beginning of a recorded answer.
struct Cutter {
    address: SocketAddr,
    _task: JoinSet<()>,
}

impl Cutter {
    async fn of(recorded: &[u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let recorded = Bytes::copy_from_slice(recorded);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut calls = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                calls.spawn(answer(stream, recorded.clone()));
            }
        });
        Self { address, _task: tasks }
    }

    fn base_url(&self) -> String {
        format!("http://{}", self.address)
    }
}

async fn answer(mut stream: TcpStream, recorded: Bytes) {
    let mut read = Vec::new();
    let cut = loop {
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => read.extend_from_slice(&buffer[..count]),
        }
        let text = String::from_utf8_lossy(&read);
        if text.contains("\r\n\r\n") && text.ends_with('}') {
            break text.lines().find_map(|line| line.strip_prefix(&format!("{CUT}: "))).unwrap().to_owned();
        }
    };
    let (at, how) = cut.split_once(' ').unwrap();
    stream.set_nodelay(true).unwrap();
    stream.write_all(&recorded[..at.parse().unwrap()]).await.unwrap();
    match how {
        "close" => {}
        "reset" => {
            tokio::time::sleep(BEFORE_RESET).await;
            // With a linger of zero a close is a reset.
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        }
        "stall" => {
            // Until the proxy has had enough.
            stream.read(&mut [0]).await.unwrap_or_default();
        }
        other => panic!("{other}"),
    }
}

/// What a client got.
#[derive(Debug)]
struct Got {
    status: u16,
    endpoint: Option<String>,
    text: String,
    is_clean: bool,
}

async fn call(address: SocketAddr, body: &Value, cut: &str) -> Got {
    let mut wire = Wire::connect(address).await;
    let cut = format!("{CUT}: {cut}");
    let headers = ["content-type: application/json", cut.as_str()];
    wire.send(request("POST", "/v1/chat/completions", &headers, &body.to_string())).await;
    let head = wire.head().await.expect("there is always an answer");
    let (status, endpoint) = (head.status(), head.header("x-api-together-endpoint"));
    let (text, is_clean) = read(&mut wire, &head).await;
    Got { status, endpoint, text, is_clean }
}

async fn read(wire: &mut Wire, head: &Head) -> (String, bool) {
    if head.header("content-length").is_some() {
        return (String::from_utf8(wire.body(head).await.to_vec()).unwrap(), true);
    }
    let mut text = Vec::new();
    loop {
        match wire.chunk().await {
            Some(chunk) if chunk.is_empty() => return (String::from_utf8(text).unwrap(), true),
            Some(chunk) => text.extend_from_slice(&chunk),
            None => return (String::from_utf8(text).unwrap(), false),
        }
    }
}

async fn call_h2(address: SocketAddr, body: &Value, cut: &str) -> Got {
    let url = format!("http://{address}/v1/chat/completions");
    let mut response = h2c().post(url).bearer_auth(KEY).header(CUT, cut).json(body).send().await.unwrap();
    let status = response.status().as_u16();
    let endpoint = response.headers().get("x-api-together-endpoint").map(|value| value.to_str().unwrap().to_owned());
    let mut text = Vec::new();
    let is_clean = loop {
        match response.chunk().await {
            Ok(Some(chunk)) => text.extend_from_slice(&chunk),
            Ok(None) => break true,
            Err(_) => break false,
        }
    };
    Got { status, endpoint, text: String::from_utf8(text).unwrap(), is_clean }
}

/// A recorded stream: its bytes, and the events that are whole after each of them.
struct Recorded {
    bytes: Vec<u8>,
    /// Where each event ends in the bytes, and its text.
    events: Vec<(usize, String)>,
    /// The first event that says something.
    first_word: usize,
}

impl Recorded {
    fn stream() -> Self {
        let role = "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n";
        let finish = "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
        let events = [": hello\n\n", role, &event("one"), &event("two"), &event("three"), finish, "data: [DONE]\n\n"];
        let mut bytes = STREAM_HEAD.as_bytes().to_vec();
        let mut places = Vec::new();
        for event in events {
            bytes.extend_from_slice(chunked(event).as_bytes());
            // The line's end after a chunk is not the event's.
            places.push((bytes.len() - 2, event.to_owned()));
        }
        bytes.extend_from_slice(b"0\r\n\r\n");
        Self { bytes, events: places, first_word: 2 }
    }

    /// The whole events of its first bytes.
    fn events_until(&self, at: usize) -> Vec<&str> {
        self.events.iter().filter(|(end, _)| *end <= at).map(|(_, text)| text.as_str()).collect()
    }

    fn check(&self, what: &str, at: usize, got: &Got, good: &str) {
        let whole = self.events_until(at);
        if whole.len() <= self.first_word {
            assert_eq!((got.status, got.endpoint.as_deref()), (200, Some("b")), "{what}: {got:?}");
            assert!(got.is_clean && got.text == good, "{what}: {got:?}");
        } else {
            assert_eq!((got.status, got.endpoint.as_deref()), (200, Some("a")), "{what}: {got:?}");
            self.check_committed(what, &whole, got);
        }
    }

    fn check_committed(&self, what: &str, whole: &[&str], got: &Got) {
        if whole.len() == self.events.len() {
            assert!(got.is_clean && got.text == whole.concat(), "{what}: {got:?}");
            return;
        }
        assert!(!got.is_clean, "{what}: a cut stream looks whole: {got:?}");
        let error = got.text.strip_prefix(&whole.concat()).unwrap_or_else(|| panic!("{what}: {got:?}"));
        let error = error.strip_prefix("data: ").and_then(|rest| rest.strip_suffix("\n\n"));
        let error: Value = serde_json::from_str(error.unwrap_or_else(|| panic!("{what}: {got:?}"))).unwrap();
        assert_eq!(error["error"]["code"], "stream_broken", "{what}: {got:?}");
    }
}

fn settings(cutter: &Cutter) -> Value {
    let timeouts = json!({ "firstByteMs": PATIENCE_MS, "idleMs": PATIENCE_MS });
    endpoint_with("a", &cutter.base_url(), json!({ "timeouts": timeouts }))
}

/// Nobody cools down, however often it fails.
fn patient() -> Value {
    json!({ "breaker": { "failures": 1_000_000 }, "threads": 2 })
}

/// Calls with every cut, so many at once.
async fn every_cut<F>(cuts: Vec<(usize, &'static str)>, call: impl Fn(usize, &'static str) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(CONCURRENCY));
    let mut calls = JoinSet::new();
    for (at, how) in cuts {
        let place = Arc::clone(&places).acquire_owned().await.unwrap();
        let call = call(at, how);
        calls.spawn(async move {
            call.await;
            drop(place);
        });
    }
    while let Some(call) = calls.join_next().await {
        call.unwrap();
    }
}

fn all_cuts(length: usize, hows: &'static [&'static str]) -> Vec<(usize, &'static str)> {
    (0..=length).flat_map(|at| hows.iter().map(move |how| (at, *how))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_cut_at_any_byte_fails_over_unseen_or_is_told() {
    within(async {
        let recorded = Arc::new(Recorded::stream());
        let good = format!("{}{}data: [DONE]\n\n", event("from the other"), event("endpoint"));
        let body = Some(good.clone());
        let content_type = Some("text/event-stream".into());
        let spare = behaving(Behaviour { body, content_type, ..Behaviour::default() }).await;
        let cutter = Cutter::of(&recorded.bytes).await;
        let apis = [settings(&cutter), endpoint_with("b", &spare.base_url(), json!({ "priority": 1 }))];
        let proxy = Proxy::start(patient(), &apis).await;
        let body = chat_stream("m");
        let address = proxy.address;
        for over_h2 in [false, true] {
            let hows: &[&str] = if over_h2 { &["close"] } else { &HOWS };
            every_cut(all_cuts(recorded.bytes.len(), hows), |at, how| {
                let (recorded, body, good) = (Arc::clone(&recorded), body.clone(), good.clone());
                async move {
                    let cut = format!("{at} {how}");
                    let got =
                        if over_h2 { call_h2(address, &body, &cut).await } else { call(address, &body, &cut).await };
                    let before = String::from_utf8_lossy(&recorded.bytes[..at]).into_owned();
                    let what = format!("{how} after {at} bytes (…{:?}), HTTP/2 {over_h2}", tail(&before));
                    recorded.check(&what, at, &got, &good);
                }
            })
            .await;
        }
    })
    .await;
}

fn tail(text: &str) -> String {
    text.chars().rev().take(20).collect::<Vec<_>>().into_iter().rev().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn if_nobody_can_take_over_no_cut_stream_looks_whole() {
    within(async {
        let recorded = Arc::new(Recorded::stream());
        let cutter = Cutter::of(&recorded.bytes).await;
        let proxy = Proxy::start(patient(), &[settings(&cutter)]).await;
        let (address, body) = (proxy.address, chat_stream("m"));
        every_cut(all_cuts(recorded.bytes.len(), &HOWS), |at, how| {
            let (recorded, body) = (Arc::clone(&recorded), body.clone());
            async move {
                let got = call(address, &body, &format!("{at} {how}")).await;
                let (what, whole) = (format!("{how} after {at} bytes"), recorded.events_until(at));
                if got.status == 200 {
                    recorded.check_committed(&what, &whole, &got);
                } else {
                    assert!(whole.len() <= recorded.first_word && got.is_clean, "{what}: {got:?}");
                    let error: Value = serde_json::from_str(&got.text).unwrap();
                    assert_eq!(error["error"]["type"], "server_error", "{what}: {got:?}");
                }
            }
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn json_that_is_cut_at_any_byte_fails_over_unseen() {
    within(async {
        let body =
            r#"{"choices":[{"index":0,"message":{"role":"assistant","content":"one two"},"finish_reason":"stop"}]}"#;
        let with_length = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let framed = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
        let in_chunks = format!("{framed}{}{}0\r\n\r\n", chunked(&body[..30]), chunked(&body[30..]));
        let spare = simulator().await;
        for recorded in [with_length, in_chunks] {
            let cutter = Cutter::of(recorded.as_bytes()).await;
            let apis = [settings(&cutter), endpoint_with("b", &spare.base_url(), json!({ "priority": 1 }))];
            let proxy = Proxy::start(patient(), &apis).await;
            let address = proxy.address;
            every_cut(all_cuts(recorded.len(), &HOWS), |at, how| {
                let is_whole = at == recorded.len();
                async move {
                    let got = call(address, &chat("m"), &format!("{at} {how}")).await;
                    let expected = if is_whole { "a" } else { "b" };
                    assert_eq!((got.status, got.endpoint.as_deref()), (200, Some(expected)), "{how} {at}: {got:?}");
                    assert!(serde_json::from_str::<Value>(&got.text).is_ok(), "{how} {at}: {got:?}");
                }
            })
            .await;
        }
    })
    .await;
}
