#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::let_underscore_must_use
)]

use std::io::ErrorKind;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::*;

/// Longest time of one test: all of them end within a second on an idle machine.
const BOUND: Duration = Duration::from_secs(20);

/// Long enough to show that nothing more comes.
const SILENCE: Duration = Duration::from_millis(150);

async fn within<T>(test: impl Future<Output = T>) -> T {
    timeout(BOUND, test).await.expect("the test takes too long")
}

async fn simulator() -> Simulator {
    Simulator::bind_local(Options::default()).await.unwrap()
}

fn post(path: &str, body: &str) -> String {
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nhost: sim\r\ncontent-length: {length}\r\n\r\n{body}")
}

fn chat(body: &Value) -> String {
    post("/v1/chat/completions", &body.to_string())
}

fn ask(model: &str) -> String {
    let messages = json!([{ "role": "user", "content": "one two three" }]);
    chat(&json!({ "model": model, "messages": messages }))
}

fn ask_stream(model: &str) -> String {
    chat(&json!({ "model": model, "stream": true, "messages": [] }))
}

async fn send(sim: &Handle, request: &str) -> TcpStream {
    let mut stream = TcpStream::connect(sim.addr()).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

/// Everything up to the connection's end, and how it ended.
async fn read_all(stream: &mut TcpStream) -> (String, Option<ErrorKind>) {
    let mut bytes = Vec::new();
    let end = stream.read_to_end(&mut bytes).await;
    (String::from_utf8(bytes).unwrap(), end.err().map(|error| error.kind()))
}

/// Returns the bytes that have come once no more come.
async fn read_until_silent(stream: &mut TcpStream) -> String {
    let mut bytes = vec![0; 1 << 20];
    let mut filled = 0;
    while let Ok(read) = timeout(SILENCE, stream.read(&mut bytes[filled..])).await {
        match read.unwrap() {
            0 => break,
            count => filled += count,
        }
    }
    String::from_utf8(bytes[..filled].to_vec()).unwrap()
}

/// One request on a connection of its own.
async fn exchange(sim: &Handle, request: &str) -> String {
    let request = request.replacen("\r\n", "\r\nconnection: close\r\n", 1);
    read_all(&mut send(sim, &request).await).await.0
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

fn json_body(answer: &str) -> Value {
    serde_json::from_str(body(answer)).unwrap_or_else(|error| panic!("{error}: {answer}"))
}

/// The chunks of a chunked body: one per event.
fn chunks(answer: &str) -> Vec<String> {
    let mut rest = body(answer);
    let mut chunks = Vec::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            break;
        }
        chunks.push(after[..size].to_owned());
        rest = &after[size + 2..];
    }
    chunks
}

fn data(chunk: &str) -> Value {
    serde_json::from_str(chunk.strip_prefix("data: ").unwrap()).unwrap()
}

async fn wait_for(what: impl Fn() -> bool) {
    while !what() {
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn chat_json_has_the_wire_shape() {
    within(async {
        let sim = simulator().await;
        let answer = exchange(&sim, &ask("m")).await;
        assert_eq!(status(&answer), 200);
        assert!(answer.contains("x-request-id: req_sim_1\r\n"), "{answer}");
        assert!(answer.contains(&format!("content-length: {}\r\n", body(&answer).len())));
        let json = json_body(&answer);
        assert_eq!(json["object"], "chat.completion");
        assert_eq!(json["model"], "m");
        assert_eq!(json["choices"][0]["message"]["content"], "Hello from the simulator, word");
        assert_eq!(json["choices"][0]["finish_reason"], "stop");
        assert_eq!(json["usage"]["prompt_tokens"], 3);
        assert_eq!(json["usage"]["completion_tokens"], 5);
        assert_eq!(json["usage"]["total_tokens"], 8);
        assert_eq!(sim.requests().len(), 1);
        assert_eq!(sim.cancelled(), 0);
        assert_eq!(sim.connections(), 1);
    })
    .await;
}

#[tokio::test]
async fn stream_without_usage_sends_each_event_as_a_chunk() {
    within(async {
        let sim = simulator().await;
        let answer = exchange(&sim, &ask_stream("m")).await;
        assert!(answer.contains("content-type: text/event-stream; charset=utf-8\r\n"));
        let chunks = chunks(&answer);
        assert_eq!(chunks.len(), 8, "{answer}");
        assert_eq!(data(&chunks[0])["choices"][0]["delta"]["role"], "assistant");
        assert_eq!(data(&chunks[1])["choices"][0]["delta"]["content"], "Hello");
        assert_eq!(data(&chunks[6])["choices"][0]["finish_reason"], "stop");
        assert_eq!(chunks[7], "data: [DONE]\n\n");
        assert!(!answer.contains("usage"));
        wait_for(|| sim.open_requests() == 0).await;
        assert_eq!(sim.cancelled(), 0);
    })
    .await;
}

#[tokio::test]
async fn stream_with_usage_counts_in_a_last_chunk() {
    within(async {
        let sim = simulator().await;
        let options = json!({ "include_usage": true });
        let request = json!({ "model": "m", "stream": true, "stream_options": options });
        let chunks = chunks(&exchange(&sim, &chat(&request)).await);
        assert_eq!(chunks.len(), 9);
        assert!(chunks[..7].iter().all(|chunk| chunk.contains(r#""usage":null"#)));
        let last = data(&chunks[7]);
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"]["completion_tokens"], 5);

        sim.script("m", vec![Behaviour { usage: Some(false), ..Behaviour::default() }]);
        assert!(!exchange(&sim, &chat(&request)).await.contains("usage"));
        let always = exchange(&sim, &ask_stream("sim:usage=true")).await;
        assert!(always.contains(r#""choices":[],"usage":{"#), "{always}");
    })
    .await;
}

#[tokio::test]
async fn scripts_are_taken_in_order_and_the_last_stays() {
    within(async {
        let sim = simulator().await;
        sim.script("a", vec![Behaviour::status(500), Behaviour::status(429), Behaviour::status(201)]);
        sim.script("*", vec![Behaviour::status(503).header("retry-after", "2")]);
        let mut seen = Vec::new();
        for _ in 0..4 {
            seen.push(status(&exchange(&sim, &ask("a")).await));
        }
        assert_eq!(seen, [500, 429, 201, 201]);
        let other = exchange(&sim, &ask("b")).await;
        assert_eq!(status(&other), 503);
        assert!(other.contains("retry-after: 2\r\n"));
        assert_eq!(json_body(&other)["error"]["type"], "server_error");
        sim.clear();
        assert_eq!(status(&exchange(&sim, &ask("b")).await), 200);
        assert_eq!(sim.requests().len(), 1);
    })
    .await;
}

#[tokio::test]
async fn resets_come_where_and_how_they_are_told() {
    within(async {
        let sim = simulator().await;
        let cases = [
            ("sim:reset=beforeHeader", 0, None),
            ("sim:reset=beforeHeader,resetHow=rst", 0, Some(ErrorKind::ConnectionReset)),
            ("sim:reset=afterHeader", 0, None),
            ("sim:reset=2", 2, None),
            ("sim:reset=2,resetHow=rst", 2, Some(ErrorKind::ConnectionReset)),
            ("sim:reset=100,resetHow=rst", 8, Some(ErrorKind::ConnectionReset)),
        ];
        for (model, events, end) in cases {
            let (answer, ended) = read_all(&mut send(&sim, &ask_stream(model)).await).await;
            assert_eq!(ended, end, "{model}");
            assert_eq!(answer.is_empty(), model.contains("beforeHeader"), "{model}");
            assert_eq!(answer.matches("data: ").count(), events, "{model}: {answer}");
            assert!(!answer.ends_with("0\r\n\r\n"), "{model}");
        }
        let (answer, _) = read_all(&mut send(&sim, &ask_stream("sim:midEvent=1")).await).await;
        assert!(answer.matches("\n\n").count() == 1 && answer.matches("data: ").count() == 2);
        let (answer, _) = read_all(&mut send(&sim, &ask("sim:reset=1")).await).await;
        assert!(answer.contains("content-length") && !body(&answer).ends_with('}'), "{answer}");
        wait_for(|| sim.open_requests() == 0).await;
        assert_eq!(sim.cancelled(), 0);
    })
    .await;
}

#[tokio::test]
async fn stalls_last_until_the_client_leaves() {
    within(async {
        let sim = simulator().await;
        for (model, events) in [("sim:stall=header", 0), ("sim:stall=afterHeader", 0), ("sim:stall=3", 3)] {
            let before = sim.cancelled();
            let mut stream = send(&sim, &ask_stream(model)).await;
            let answer = read_until_silent(&mut stream).await;
            assert_eq!(answer.is_empty(), model == "sim:stall=header");
            assert_eq!(answer.matches("data: ").count(), events, "{answer}");
            assert_eq!(sim.open_requests(), 1);
            drop(stream);
            wait_for(|| sim.open_requests() == 0).await;
            assert_eq!(sim.cancelled(), before + 1);
        }
        let answer = read_until_silent(&mut send(&sim, &ask("sim:stall=1")).await).await;
        assert!(!body(&answer).is_empty() && !body(&answer).ends_with('}'), "{answer}");
    })
    .await;
}

#[tokio::test]
async fn a_client_that_leaves_mid_stream_is_counted() {
    within(async {
        let sim = simulator().await;
        let mut stream = send(&sim, &ask_stream("sim:events=100000,chunkDelayMs=5")).await;
        let mut some = [0; 64];
        stream.read_exact(&mut some).await.unwrap();
        assert_eq!(sim.open_requests(), 1);
        drop(stream);
        wait_for(|| sim.open_requests() == 0).await;
        assert_eq!(sim.cancelled(), 1);
    })
    .await;
}

#[tokio::test]
async fn idle_connections_are_closed_but_busy_ones_are_not() {
    within(async {
        let idle_close = Some(Duration::from_millis(100));
        let options = Options { idle_close, ..Options::default() };
        let sim = Simulator::bind_local(options).await.unwrap();
        let (answer, end) = read_all(&mut send(&sim, &ask("sim:headerDelayMs=300,drip=50")).await).await;
        assert_eq!((status(&answer), end), (200, None));
        assert!(answer.ends_with('}'));
        let (nothing, end) = read_all(&mut send(&sim, "").await).await;
        assert_eq!((nothing.as_str(), end), ("", None));
    })
    .await;
}

#[tokio::test]
async fn connections_are_kept_alive_and_numbered() {
    within(async {
        let sim = simulator().await;
        let mut stream = send(&sim, &ask("m")).await;
        read_until_silent(&mut stream).await;
        stream.write_all(ask_stream("m").as_bytes()).await.unwrap();
        read_until_silent(&mut stream).await;
        exchange(&sim, &ask("m")).await;
        let numbers: Vec<_> = sim.requests().iter().map(|arrived| arrived.connection).collect();
        assert_eq!(numbers, [1, 1, 2]);
        drop(sim);
        assert_eq!(read_all(&mut stream).await.0, "");
    })
    .await;
}

#[tokio::test]
async fn control_calls_script_and_show() {
    within(async {
        let sim = simulator().await;
        let behaviours = json!([{ "status": 500 }, { "stall": { "afterEvents": 2 } }]);
        let script = json!({ "model": "*", "behaviours": behaviours }).to_string();
        let put = post("/control/script", &script).replacen("POST", "PUT", 1);
        assert_eq!(status(&exchange(&sim, &put).await), 200);
        assert_eq!(status(&exchange(&sim, &ask("m")).await), 500);

        let list = exchange(&sim, "GET /control/requests HTTP/1.1\r\nhost: sim\r\n\r\n").await;
        let list = json_body(&list);
        assert_eq!(list.as_array().unwrap().len(), 1);
        assert_eq!(list[0]["headers"]["host"], "sim");
        assert_eq!(list[0]["path"], "/v1/chat/completions");
        assert!(list[0]["body"].as_str().unwrap().contains("one two three"));

        let delete = "DELETE /control HTTP/1.1\r\nhost: sim\r\n\r\n";
        assert_eq!(status(&exchange(&sim, delete).await), 200);
        assert!(sim.requests().is_empty());
        assert_eq!(status(&exchange(&sim, &ask("m")).await), 200);

        let wrong = post("/control/script", r#"{"model":"*","behaviours":[{"sta":1}]}"#);
        let wrong = wrong.replacen("POST", "PUT", 1);
        assert_eq!(status(&exchange(&sim, &wrong).await), 400);
    })
    .await;
}

#[tokio::test]
async fn other_calls_have_their_shapes() {
    within(async {
        let sim = simulator().await;
        let input = json!({ "model": "m", "input": ["a b", "c"], "dimensions": 3 });
        let floats = json_body(&exchange(&sim, &post("/v1/embeddings", &input.to_string())).await);
        assert_eq!(floats["data"][1]["embedding"].as_array().unwrap().len(), 3);
        assert_eq!(floats["usage"], json!({ "prompt_tokens": 3, "total_tokens": 3 }));
        let bytes: Vec<u8> = floats["data"][0]["embedding"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|number| serde_json::from_value::<f32>(number.clone()).unwrap().to_le_bytes())
            .collect();
        let mut input = input;
        input["encoding_format"] = "base64".into();
        let coded = json_body(&exchange(&sim, &post("/x/embeddings", &input.to_string())).await);
        assert_eq!(coded["data"][0]["embedding"], embeddings::base64(&bytes));

        let ask = json!({ "model": "m", "prompt": "a b", "input": "a b", "stream": true });
        let stream = exchange(&sim, &post("/v1/responses", &ask.to_string())).await;
        let events = chunks(&stream);
        assert_eq!(events.len(), 4 + 5 + 4);
        assert!(events[0].starts_with("event: response.created\n"));
        let (_, last) = events[12].split_once("\ndata: ").unwrap();
        let last: Value = serde_json::from_str(last).unwrap();
        assert_eq!(last["response"]["usage"]["output_tokens"], 5);
        assert_eq!(last["sequence_number"], 12);
        let stream = exchange(&sim, &post("/v1/completions", &ask.to_string())).await;
        assert_eq!(data(&chunks(&stream)[0])["choices"][0]["text"], "Hello");
        assert_eq!(chunks(&stream).len(), 7);

        let ask = json!({ "model": "m", "prompt": "a b", "input": "a b" }).to_string();
        let answer = json_body(&exchange(&sim, &post("/api/v3/responses", &ask)).await);
        assert_eq!(answer["output"][0]["content"][0]["text"], "Hello from the simulator, word");
        let answer = json_body(&exchange(&sim, &post("/v1/completions", &ask)).await);
        assert_eq!(answer["usage"]["total_tokens"], 9);
        let answer = json_body(&exchange(&sim, &post("/v1/moderations", &ask)).await);
        assert_eq!(answer["results"][0]["flagged"], false);

        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: sim\r\n\r\n");
        let models = json_body(&exchange(&sim, &get("/v1/models?limit=1")).await);
        assert_eq!(models["data"][0]["id"], "sim-model");
        let one = json_body(&exchange(&sim, &get("/v1/models/sim-model")).await);
        assert_eq!(one["object"], "model");
        let none = exchange(&sim, &get("/v1/models/none")).await;
        assert_eq!(json_body(&none)["error"]["code"], "model_not_found");
        assert_eq!(status(&exchange(&sim, &get("/v1/chat/completions")).await), 405);
        assert_eq!(status(&exchange(&sim, &get("/")).await), 404);
    })
    .await;
}

#[tokio::test]
async fn wrong_requests_are_refused() {
    within(async {
        let options = Options { require_key: Some("k".into()), ..Options::default() };
        let sim = Simulator::bind_local(options).await.unwrap();
        let answer = exchange(&sim, &ask("m")).await;
        assert_eq!(status(&answer), 401);
        assert_eq!(json_body(&answer)["error"]["code"], "invalid_api_key");
        let with_key = |request: String| request.replacen("\r\n", "\r\nauthorization: Bearer k\r\n", 1);
        assert_eq!(status(&exchange(&sim, &with_key(ask("m"))).await), 200);
        for wrong in ["{", "{}", r#"{"model":""}"#, r#"{"model":"sim:nope=1"}"#] {
            let request = with_key(post("/v1/chat/completions", wrong));
            let answer = exchange(&sim, &request).await;
            assert_eq!(status(&answer), 400, "{wrong}");
            assert!(json_body(&answer)["error"]["param"].is_null());
        }
    })
    .await;
}

#[tokio::test]
async fn faults_of_content() {
    within(async {
        let sim = simulator().await;
        let cases = [
            ("sim:empty=body", "content-length: 0\r\n"),
            ("sim:empty=object", "\r\n\r\n{}"),
            ("sim:empty=noEvents", "\r\n\r\n0\r\n\r\n"),
            ("sim:empty=doneOnly", "\r\n\r\nE\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"),
            ("sim:empty=zeroUsage,usage=true", r#""completion_tokens":0"#),
            ("sim:firstEventError=true", "data: {\"error\":{"),
            ("sim:answerAs=json", "\"chat.completion\""),
            ("sim:header=x-a: b,status=418", "x-a: b\r\n"),
        ];
        for (model, expected) in cases {
            let answer = exchange(&sim, &ask_stream(model)).await;
            assert!(answer.contains(expected), "{model}: {answer}");
        }
        let chunked = exchange(&sim, &ask("sim:chunked=true,drip=100")).await;
        assert!(chunked.contains("transfer-encoding: chunked"));
        assert!(chunks(&chunked).len() > 3);
        let echo = json_body(&exchange(&sim, &ask("sim:echo=true")).await);
        assert_eq!(echo["echo"]["headers"]["connection"], "close");
        let raw = r#"{"status":404,"body":"data: a\n\ndata: b\n\n","contentType":"text/event-stream"}"#;
        sim.set_default(serde_json::from_str(raw).unwrap());
        let raw = exchange(&sim, &ask("m")).await;
        assert_eq!((status(&raw), chunks(&raw).len()), (404, 2));
        let mut pinged = send(&sim, &ask_stream("sim:pingMs=20")).await;
        sleep(Duration::from_millis(200)).await;
        let mut bytes = [0; 4096];
        let count = pinged.read(&mut bytes).await.unwrap();
        assert!(String::from_utf8_lossy(&bytes[..count]).matches(": ping\n\n").count() >= 2);
    })
    .await;
}

#[tokio::test]
async fn early_answers_do_not_wait_for_the_body() {
    within(async {
        let sim = simulator().await;
        let early = Behaviour { early: true, ..Behaviour::status(413) };
        sim.script("*", vec![early]);
        let request = "POST /v1/chat/completions HTTP/1.1\r\nhost: sim\r\ncontent-length: 1000000\r\n\r\n";
        let (answer, _) = read_all(&mut send(&sim, request).await).await;
        assert_eq!(status(&answer), 413);
        assert!(answer.contains("connection: close\r\n"));
    })
    .await;
}

#[tokio::test]
async fn the_failure_rate_is_kept() {
    within(async {
        let options = Options { failure_rate_percent: 30, seed: 7, ..Options::default() };
        let sim = Simulator::bind_local(options).await.unwrap();
        let mut failed = 0;
        for _ in 0..100 {
            failed += usize::from(status(&exchange(&sim, &ask("m")).await) == 503);
        }
        assert_eq!(failed, 30);
    })
    .await;
}

/// One HTTP/2 request on stream 1, with literal headers so that no encoder is needed.
fn h2_get(path: &str) -> Vec<u8> {
    // Static table: 2 is `:method: GET`, 6 `:scheme: http`; 4 and 1 name path and authority.
    let mut headers = vec![0x82, 0x86, 0x04, u8::try_from(path.len()).unwrap()];
    headers.extend(path.as_bytes());
    headers.extend([0x01, 3]);
    headers.extend(b"sim");
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]);
    bytes.extend([0, 0, u8::try_from(headers.len()).unwrap(), 1, 5, 0, 0, 0, 1]);
    bytes.extend(headers);
    bytes
}

/// The frames' types and payloads, up to the first of type `until` or the connection's end.
async fn h2_frames(stream: &mut TcpStream, until: u8) -> Vec<(u8, Vec<u8>)> {
    let mut frames = Vec::new();
    let mut head = [0; 9];
    while stream.read_exact(&mut head).await.is_ok() {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        stream.read_exact(&mut payload).await.unwrap();
        frames.push((head[3], payload));
        if head[3] == until {
            break;
        }
    }
    frames
}

#[tokio::test]
async fn http2_is_spoken_on_the_same_port() {
    const DATA: u8 = 0;
    const RST_STREAM: u8 = 3;
    within(async {
        let sim = simulator().await;
        let mut stream = TcpStream::connect(sim.addr()).await.unwrap();
        stream.write_all(&h2_get("/v1/models")).await.unwrap();
        let frames = h2_frames(&mut stream, DATA).await;
        assert!(String::from_utf8_lossy(&frames.last().unwrap().1).contains("sim-model"));
        assert_eq!(sim.requests()[0].version, http::Version::HTTP_2);

        for at in [ResetAt::BeforeHeader, ResetAt::AfterHeader, ResetAt::AfterEvents(1)] {
            for how in [ResetHow::Rst, ResetHow::Fin] {
                let reset = Behaviour { reset: Some(at), reset_how: how, ..Behaviour::default() };
                sim.script("*", vec![reset]);
                let mut stream = TcpStream::connect(sim.addr()).await.unwrap();
                stream.write_all(&h2_get("/v1/models")).await.unwrap();
                let frames = h2_frames(&mut stream, RST_STREAM).await;
                let was_reset = frames.last().is_some_and(|(kind, _)| *kind == RST_STREAM);
                assert_eq!(was_reset, how == ResetHow::Rst, "{at:?} {how:?}: {frames:?}");
            }
        }
        sim.script("*", vec![Behaviour { stall: Some(StallAt::Header), ..Behaviour::default() }]);
        let mut stream = TcpStream::connect(sim.addr()).await.unwrap();
        stream.write_all(&h2_get("/v1/models")).await.unwrap();
        wait_for(|| sim.open_requests() == 1).await;
        // RST_STREAM with CANCEL.
        stream.write_all(&[0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 8]).await.unwrap();
        wait_for(|| sim.open_requests() == 0).await;
        assert_eq!(sim.cancelled(), 1);
    })
    .await;
}

#[tokio::test]
async fn any_stream_is_served() {
    within(async {
        let sim = simulator().await;
        let (mut near, far) = tokio::io::duplex(1 << 16);
        serve_stream(&sim.handle(), far, Protocol::Http1);
        let request = ask("m").replacen("\r\n", "\r\nconnection: close\r\n", 1);
        near.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        near.read_to_string(&mut answer).await.unwrap();
        assert_eq!(status(&answer), 200);
    })
    .await;
}
