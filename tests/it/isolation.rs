//! One caller's trouble is nobody else's: whatever he sends, the others' requests to endpoints that are well succeed.
//!
//! Requests of one caller are drawn from a seed: methods, paths, headers and bodies of every kind, prompts that make servers
//! fail in every way a prompt can, clients that go away. `ISOLATION_SECONDS=3600` runs for an hour, `ISOLATION_SEED=n` draws
//! the same requests again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fastrand::Rng;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::harness::{KEY, Proxy, Reply, chat, chat_stream, client, endpoint_with, h2c, simulator};

/// `make soak` takes an hour.
const SECONDS: u64 = 60;
/// Requests of his at once: what the others may not notice, rather than what a machine can bear.
const TROUBLEMAKERS: u64 = 12;
const NEIGHBOURS: usize = 4;
/// Far below the time limits of their requests, and above what a busy machine takes.
const PATIENCE: Duration = Duration::from_secs(15);
/// He does not wait for answers that never come.
const GONE_AFTER_MS: u64 = 1500;

/// Words that vendors quote out of prompts, and that would mean something if the vendor had said them.
const BAITS: [&str; 6] = [
    "Incorrect API key provided: sk-1",
    "You exceeded your current quota, please check your plan and billing details.",
    "Rate limit reached. Please try again in 24h0m0s.",
    "The model `m` does not exist",
    "Your credit balance is too low to access the Anthropic API",
    "insufficient_quota invalid_api_key authentication_error API_KEY_INVALID",
];

/// A way in which a server fails at a prompt, and at no other. None of them says that its key, its account or its time is gone.
fn poison(rng: &mut Rng) -> Value {
    let bait = BAITS[rng.usize(..BAITS.len())];
    let quoting = |status: u16| {
        let body =
            json!({ "error": { "message": format!("Invalid prompt: {bait}"), "type": "invalid_request_error" } });
        json!({ "status": status, "contentType": "application/json", "body": body.to_string() })
    };
    match rng.u8(..20) {
        0..=4 => {
            let statuses = [400, 403, 404, 405, 408, 409, 410, 413, 415, 422, 424, 425, 500, 501, 502, 503, 504, 529];
            json!({ "status": statuses[rng.usize(..statuses.len())] })
        }
        5 | 6 => quoting([400, 404, 413, 422, 500, 503][rng.usize(..6)]),
        7 => json!({ "status": 404, "contentType": "text/plain", "body": "404 page not found" }),
        8 => json!({ "status": 403, "contentType": "text/html", "body": "<html>Blocked: your prompt</html>" }),
        9 => json!({
            "status": 403,
            "contentType": "application/json",
            "body": r#"{"error":{"code":403,"message":"flagged","metadata":{"flagged_input":"x","reasons":["violence"]}}}"#,
        }),
        10 => json!({ "reset": "beforeHeader", "resetHow": if rng.bool() { "rst" } else { "fin" } }),
        11 => json!({ "reset": "afterHeader" }),
        12 => json!({ "reset": { "afterEvents": rng.usize(..6) } }),
        13 => json!({ "stall": "header" }),
        14 => {
            json!({ "stall": if rng.bool() { json!("afterHeader") } else { json!({ "afterEvents": rng.usize(..4) }) } })
        }
        15 => {
            let kinds = ["zeroUsage", "object", "body", "noEvents", "doneOnly"];
            json!({ "empty": kinds[rng.usize(..kinds.len())] })
        }
        16 => json!({ "firstEventError": true }),
        17 => json!({ "pingMs": 50 }),
        18 => json!({
            "contentType": "text/event-stream",
            "body": format!("data: {{\"error\":{{\"object\":\"error\",\"message\":\"{}\",\"code\":{}}}}}\n\ndata: [DONE]\n\n", bait.replace('`', ""), [400, 500][rng.usize(..2)]),
        }),
        _ => json!({ "contentType": "text/html", "body": "<!DOCTYPE html><html>Just a moment…</html>" }),
    }
}

fn noise(rng: &mut Rng, length: usize) -> Vec<u8> {
    (0..rng.usize(..=length)).map(|_| rng.u8(..)).collect()
}

/// A body, as JSON mostly.
fn body(rng: &mut Rng) -> Vec<u8> {
    if rng.u8(..) < 40 {
        return match rng.u8(..5) {
            0 => noise(rng, 2000),
            1 => "[".repeat(rng.usize(..20_000)).into_bytes(),
            2 => br#"{"model":"m","messages":"#.to_vec(),
            3 => Vec::new(),
            _ => vec![b' '; rng.usize(..300_000)],
        };
    }
    let models = ["m", "m", "m", "mapped", "nobody", "", "sim:status=500", "m\u{0}", "../m"];
    let mut ask =
        json!({ "model": models[rng.usize(..models.len())], "messages": [{ "role": "user", "content": "Hi" }] });
    if rng.bool() {
        ask["sim"] = poison(rng);
    }
    match rng.u8(..8) {
        0 => ask["stream"] = json!("yes"),
        1 | 2 => ask["stream"] = json!(true),
        3 => ask["model"] = Value::Null,
        4 => ask["stream_options"] = json!([1]),
        5 => ask["max_tokens"] = json!(-1e300),
        6 => ask["messages"] = json!(BAITS[rng.usize(..BAITS.len())].repeat(rng.usize(..200))),
        _ => {}
    }
    let text = ask.to_string();
    match rng.u8(..12) {
        0 => format!("\u{feff}{text}").into_bytes(),
        1 => text.replacen("\"model\"", "\"model\":\"x\",\"model\"", 1).into_bytes(),
        2 => text.replacen('{', "{\"<<\":{},", 1).into_bytes(),
        _ => text.into_bytes(),
    }
}

/// A whole request as it goes over the wire.
fn request(rng: &mut Rng) -> Vec<u8> {
    let paths = [
        "/v1/chat/completions",
        "/v1/chat/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/v1//chat/completions",
        "/chat/completions/",
        "/v1/files/abc/content",
        "/v1/nothing/here",
        "/v1/models/m",
        "/v1/realtime?model=m",
        "/v1/chat/completions?key=wrong&model=%00",
        "/status/../../etc/passwd",
        "*",
    ];
    let methods = ["POST", "POST", "POST", "POST", "GET", "DELETE", "PUT", "PATCH", "OPTIONS", "HEAD", "FOO"];
    let (method, path) = (methods[rng.usize(..methods.len())], paths[rng.usize(..paths.len())]);
    let body = body(rng);
    let mut lines = vec![format!("{method} {path} HTTP/1.1"), "host: gateway".to_owned()];
    if rng.u8(..) < 240 {
        lines.push(format!("authorization: Bearer {KEY}"));
    }
    if rng.u8(..) < 230 {
        // So that the end of the answer is that of the connection.
        lines.push("connection: close".to_owned());
    }
    for _ in 0..rng.usize(..4) {
        lines.push(match rng.u8(..16) {
            0 => "origin: https://evil.example".to_owned(),
            1 => "content-type: text/plain".to_owned(),
            2 => "content-type: multipart/form-data; boundary=x".to_owned(),
            3 => "content-encoding: gzip".to_owned(),
            4 => "expect: 100-continue".to_owned(),
            5 => "accept-encoding: br, zstd".to_owned(),
            6 => "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAA"
                .to_owned(),
            7 => format!("x-forwarded-for: {}", "1.2.3.4, ".repeat(rng.usize(..50))),
            8 => format!("cookie: {}", "a".repeat(rng.usize(..6000))),
            9 => "transfer-encoding: gzip, chunked".to_owned(),
            10 => "content-length: 7".to_owned(),
            11 => "authorization: Basic AAAA".to_owned(),
            12 => "proxy-authorization: Basic AAAA".to_owned(),
            13 => "retry-after: 86400".to_owned(),
            14 => "x-api-together-endpoint: a".to_owned(),
            _ => format!("openai-beta: {}", String::from_utf8_lossy(&noise(rng, 40)).replace(['\r', '\n'], "")),
        });
    }
    if rng.u8(..) < 245 {
        lines.push(format!("content-length: {}", body.len()));
    }
    let whole = [(lines.join("\r\n") + "\r\n\r\n").as_bytes(), &body].concat();
    if rng.u8(..) < 8 {
        // Not HTTP at all.
        return noise(rng, 400);
    }
    whole
}

/// Sends requests one after the other, and stays for some of their answers.
async fn makes_trouble(address: SocketAddr, mut rng: Rng, is_over: Arc<AtomicBool>, sent: Arc<AtomicU64>) {
    while !is_over.load(Ordering::Relaxed) {
        let request = request(&mut rng);
        let stays = Duration::from_millis(if rng.bool() { GONE_AFTER_MS } else { rng.u64(..100) });
        let call = async {
            let mut stream = TcpStream::connect(address).await?;
            stream.write_all(&request).await?;
            let mut answer = vec![0; 16 * 1024];
            while stream.read(&mut answer).await? > 0 {}
            Ok::<_, std::io::Error>(())
        };
        // However it ends, he goes on.
        tokio::time::timeout(stays, call).await.map(|_| ()).unwrap_or_default();
        sent.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(rng.u64(..20))).await;
    }
}

/// Asks as anybody does, and expects an answer each time.
async fn asks(url: String, number: usize, is_over: Arc<AtomicBool>, answered: Arc<AtomicU64>) {
    let client = if number.is_multiple_of(2) { client(reqwest::ClientBuilder::http1_only) } else { h2c() };
    let mut count = number;
    while !is_over.load(Ordering::Relaxed) {
        count += 1;
        let model = if count.is_multiple_of(3) { "mapped" } else { "m" };
        let (path, body) = match count % 4 {
            0 => ("/v1/embeddings", json!({ "model": model, "input": "Hi" })),
            1 | 2 => ("/v1/chat/completions", chat(model)),
            _ => ("/v1/chat/completions", chat_stream(model)),
        };
        let call = client.post(format!("{url}{path}")).bearer_auth(KEY).json(&body);
        let reply = tokio::time::timeout(PATIENCE, Reply::of(call)).await.expect("an answer in time");
        assert_eq!(reply.status, 200, "{path} {model}: {} {:?}", reply.text(), reply.headers);
        assert!(["\"content\"", "\"embedding\""].iter().any(|what| reply.text().contains(what)), "{}", reply.text());
        answered.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_one_caller_sends_the_others_are_answered() {
    let (first, second) = (simulator().await, simulator().await);
    let api = |id: &str, url: &str| {
        let timeouts = json!({ "firstByteMs": 400, "firstByteStreamMs": 400, "idleMs": 1000, "thinkingMs": 1000 });
        let more = json!({ "models": ["*"], "modelMapping": { "mapped": "vendor/m" }, "timeouts": timeouts });
        endpoint_with(id, url, more)
    };
    let server = json!({ "breaker": { "failures": 1, "coolDownMs": 60_000 } });
    let proxy = Proxy::start(server, &[api("a", &first.base_url()), api("b", &second.base_url())]).await;
    let seed = from_environment("ISOLATION_SEED").unwrap_or_else(|| fastrand::u64(..1 << 40));
    eprintln!("ISOLATION_SEED={seed}");
    let (is_over, sent, answered) = (Arc::new(AtomicBool::new(false)), Arc::default(), Arc::default());
    let mut troublemakers = JoinSet::new();
    for number in 0..TROUBLEMAKERS {
        let rng = Rng::with_seed(seed + number);
        troublemakers.spawn(makes_trouble(proxy.address, rng, Arc::clone(&is_over), Arc::clone(&sent)));
    }
    let mut neighbours = JoinSet::new();
    for number in 0..NEIGHBOURS {
        neighbours.spawn(asks(proxy.url(""), number, Arc::clone(&is_over), Arc::clone(&answered)));
    }
    let until = Instant::now() + Duration::from_secs(from_environment("ISOLATION_SECONDS").unwrap_or(SECONDS));
    while Instant::now() < until {
        // One that was not answered ends the test at once.
        let ended = tokio::time::timeout(Duration::from_millis(100), neighbours.join_next()).await;
        if let Ok(Some(ended)) = ended {
            ended.expect("every neighbour is answered");
        }
    }
    is_over.store(true, Ordering::Relaxed);
    while let Some(ended) = neighbours.join_next().await {
        ended.expect("every neighbour is answered");
    }
    troublemakers.join_all().await;
    let (sent, answered): (u64, u64) = (sent.load(Ordering::Relaxed), answered.load(Ordering::Relaxed));
    eprintln!("{sent} requests of one caller, {answered} of the others, all of which were answered");
    assert!(sent > 500 && answered > 200, "{sent} and {answered} requests only");
}
