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
const SILENCE_MS: u64 = 1000;
/// For those that do not wait for it.
const PATIENCE_MS: u64 = 20_000;
/// Requests at once.
const CONCURRENCY: usize = 100;

const CHAT: &str = "/v1/chat/completions";
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

async fn call(address: SocketAddr, path: &str, body: &Value, cut: &str) -> Got {
    let mut wire = Wire::connect(address).await;
    let cut = format!("{CUT}: {cut}");
    let headers = ["content-type: application/json", cut.as_str()];
    wire.send(request("POST", path, &headers, &body.to_string())).await;
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

async fn call_h2(address: SocketAddr, path: &str, body: &Value, cut: &str) -> Got {
    let url = format!("http://{address}{path}");
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
    path: &'static str,
    bytes: Vec<u8>,
    /// From where in the bytes on each event is whole, and its text.
    events: Vec<(usize, String)>,
    /// The first event that says something.
    first_word: usize,
    framing: Framing,
}

/// How a stream's end is told.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Framing {
    Chunks,
    Connection,
}

impl Recorded {
    fn of(path: &'static str, framing: Framing, first_word: usize, events: &[String]) -> Self {
        let head = match framing {
            Framing::Chunks => STREAM_HEAD,
            Framing::Connection => "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n",
        };
        let mut bytes = head.as_bytes().to_vec();
        let mut places = Vec::new();
        for event in events {
            let framed = if framing == Framing::Chunks { chunked(event) } else { event.clone() };
            bytes.extend_from_slice(framed.as_bytes());
            // The line's end after a chunk is not the event's.
            let end = bytes.len() - if framing == Framing::Chunks { 2 } else { 0 };
            // A chat is whole with the line that says so.
            places.push((if event.contains("[DONE]") { end - 1 } else { end }, event.clone()));
        }
        if framing == Framing::Chunks {
            bytes.extend_from_slice(b"0\r\n\r\n");
        }
        Self { path, bytes, events: places, first_word, framing }
    }

    fn chat(framing: Framing) -> Self {
        let role =
            "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n".to_owned();
        let events =
            [": hello\n\n".to_owned(), role, event("one"), event("two"), event("three"), "data: [DONE]\n\n".to_owned()];
        Self::of(CHAT, framing, 2, &events)
    }

    fn responses(framing: Framing) -> Self {
        let event = |kind: &str, more: &str| format!("event: {kind}\ndata: {{\"type\":\"{kind}\"{more}}}\n\n");
        let delta = |text: &str| event("response.output_text.delta", &format!(",\"delta\":\"{text}\""));
        let events = [event("response.created", ""), delta("one"), delta("two"), event("response.completed", "")];
        Self::of("/v1/responses", framing, 1, &events)
    }

    fn messages(framing: Framing) -> Self {
        let event = |kind: &str, more: &str| format!("event: {kind}\ndata: {{\"type\":\"{kind}\"{more}}}\n\n");
        let delta = |text: &str| event("content_block_delta", &format!(",\"delta\":{{\"text\":\"{text}\"}}"));
        let events = [event("message_start", ""), delta("one"), delta("two"), event("message_stop", "")];
        Self::of("/v1/messages", framing, 1, &events)
    }

    /// The whole events of its first bytes. Where the connection's end is the stream's, the last one needs no line's end.
    fn events_until(&self, at: usize, how: &str) -> Vec<&str> {
        let needs_none = |text: &str| {
            let is_last = self.events.last().is_some_and(|(_, last)| last == text);
            if is_last && self.framing == Framing::Connection && how == "close" {
                text.len() - text.trim_end().len() - usize::from(text.contains("[DONE]"))
            } else {
                0
            }
        };
        let is_whole = |(end, text): &&(usize, String)| end - needs_none(text) <= at;
        self.events.iter().filter(is_whole).map(|(_, text)| text.as_str()).collect()
    }

    fn check(&self, what: &str, (at, how): (usize, &str), got: &Got, good: &str) {
        let whole = self.events_until(at, how);
        if whole.len() <= self.first_word {
            assert_eq!((got.status, got.endpoint.as_deref()), (200, Some("b")), "{what}: {got:?}");
            assert!(got.is_clean && got.text == good, "{what}: {got:?}");
        } else {
            assert_eq!((got.status, got.endpoint.as_deref()), (200, Some("a")), "{what}: {got:?}");
            self.check_committed(what, &whole, got);
        }
    }

    fn check_committed(&self, what: &str, whole: &[&str], got: &Got) {
        let seen = whole.concat();
        if whole.len() == self.events.len() {
            // The empty line after `[DONE]` may be missing.
            assert!(got.is_clean && got.text.trim_end() == seen.trim_end(), "{what}: {got:?}");
            return;
        }
        assert!(!got.is_clean, "{what}: a cut stream looks whole: {got:?}");
        let error = got.text.strip_prefix(&seen).unwrap_or_else(|| panic!("{what}: {got:?}"));
        // A comment is part of no event, so its line goes on before the block is complete.
        let error = error.strip_prefix(": hello\n").unwrap_or(error);
        let error = error.strip_prefix("event: error\n").unwrap_or(error);
        let error = error.strip_prefix("data: ").and_then(|rest| rest.strip_suffix("\n\n"));
        let error: Value = serde_json::from_str(error.unwrap_or_else(|| panic!("{what}: {got:?}"))).unwrap();
        assert_eq!(error["error"]["code"], "stream_broken", "{what}: {got:?}");
    }
}

fn settings(cutter: &Cutter, how: &str) -> Value {
    let patience_ms = if how == "stall" { SILENCE_MS } else { PATIENCE_MS };
    let timeouts = json!({ "firstByteMs": patience_ms, "idleMs": patience_ms });
    endpoint_with("a", &cutter.base_url(), json!({ "timeouts": timeouts }))
}

/// Nobody cools down, however often it fails, and a machine that is busy elsewhere closes no connection whose request is late.
fn patient() -> Value {
    let connections = json!({ "strangersPerAddress": 2 * CONCURRENCY });
    json!({ "breaker": { "failures": 1_000_000 }, "threads": 2, "forwardHeaders": [CUT], "connections": connections })
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

fn all_cuts(length: usize, how: &'static str) -> Vec<(usize, &'static str)> {
    (0..=length).map(|at| (at, how)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_that_is_cut_at_any_byte_fails_over_unseen_or_is_told() {
    within(fails_over(Recorded::chat(Framing::Chunks), &HOWS, false)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn so_does_one_over_http2_and_one_without_a_framing_of_its_own() {
    within(async {
        fails_over(Recorded::chat(Framing::Chunks), &["close"], true).await;
        fails_over(Recorded::chat(Framing::Connection), &HOWS, false).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn so_do_responses_and_messages() {
    within(async {
        for framing in [Framing::Chunks, Framing::Connection] {
            fails_over(Recorded::responses(framing), &["close", "reset"], false).await;
            fails_over(Recorded::messages(framing), &["close", "reset"], false).await;
        }
    })
    .await;
}

async fn fails_over(recorded: Recorded, hows: &[&'static str], over_h2: bool) {
    let recorded = Arc::new(recorded);
    for how in hows {
        fails_over_however(&recorded, how, over_h2).await;
    }
}

async fn fails_over_however(recorded: &Arc<Recorded>, how: &'static str, over_h2: bool) {
    let good = format!("{}{}data: [DONE]\n\n", event("from the other"), event("endpoint"));
    let body = Some(good.clone());
    let content_type = Some("text/event-stream".into());
    let spare = behaving(Behaviour { body, content_type, ..Behaviour::default() }).await;
    let cutter = Cutter::of(&recorded.bytes).await;
    let apis = [settings(&cutter, how), endpoint_with("b", &spare.base_url(), json!({ "priority": 1 }))];
    let proxy = Proxy::start(patient(), &apis).await;
    let (address, body) = (proxy.address, chat_stream("m"));
    every_cut(all_cuts(recorded.bytes.len(), how), |at, how| {
        let (recorded, body, good) = (Arc::clone(recorded), body.clone(), good.clone());
        async move {
            let (cut, path) = (format!("{at} {how}"), recorded.path);
            let got = if over_h2 {
                call_h2(address, path, &body, &cut).await
            } else {
                call(address, path, &body, &cut).await
            };
            let before = String::from_utf8_lossy(&recorded.bytes[..at]).into_owned();
            let what = format!("{path}, {how} after {at} bytes (…{:?}), HTTP/2 {over_h2}", tail(&before));
            recorded.check(&what, (at, how), &got, &good);
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
        let recorded = Arc::new(Recorded::chat(Framing::Chunks));
        let cutter = Cutter::of(&recorded.bytes).await;
        for how in HOWS {
            let proxy = Proxy::start(patient(), &[settings(&cutter, how)]).await;
            let (address, body) = (proxy.address, chat_stream("m"));
            every_cut(all_cuts(recorded.bytes.len(), how), |at, how| {
                let (recorded, body) = (Arc::clone(&recorded), body.clone());
                async move {
                    let got = call(address, CHAT, &body, &format!("{at} {how}")).await;
                    let (what, whole) = (format!("{how} after {at} bytes"), recorded.events_until(at, how));
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
        }
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
            for how in HOWS {
                let apis = [settings(&cutter, how), endpoint_with("b", &spare.base_url(), json!({ "priority": 1 }))];
                let proxy = Proxy::start(patient(), &apis).await;
                let address = proxy.address;
                every_cut(all_cuts(recorded.len(), how), |at, how| {
                    let is_whole = at == recorded.len();
                    async move {
                        let got = call(address, CHAT, &chat("m"), &format!("{at} {how}")).await;
                        let expected = if is_whole { "a" } else { "b" };
                        assert_eq!((got.status, got.endpoint.as_deref()), (200, Some(expected)), "{how} {at}: {got:?}");
                        assert!(serde_json::from_str::<Value>(&got.text).is_ok(), "{how} {at}: {got:?}");
                    }
                })
                .await;
            }
        }
    })
    .await;
}
