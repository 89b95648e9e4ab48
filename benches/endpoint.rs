//! A very cheap endpoint for benchmarks, so that it is not the bottleneck: `endpoint PORT [THREADS]`.
//!
//! It answers every request with the same chat completion. A request with `"stream":true` in the first [`LOOK_BYTES`] bytes of
//! its body gets [`EVENTS`] events instead: all at once, or `x-pace-ms` milliseconds apart, and then each with the moment at
//! which it was sent. Like `OpenAI`'s endpoint, it reports a stream's usage only if the request asks for it.

#![allow(clippy::expect_used, reason = "a bench that cannot be set up must stop")]

use std::fmt::Write as _;
use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use memchr::memmem;
use rustix::time::{ClockId, clock_gettime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Part of a body that is searched for `"stream":true` and `include_usage`, so that bodies of megabytes are not searched.
const LOOK_BYTES: usize = 512;
/// Events of a stream, unless `x-events` says otherwise.
const EVENTS: usize = 200;
/// Largest number of bytes in one read.
const READ_BYTES: usize = 256 * 1024;
const HEADER_BYTES_MAX: usize = 64 * 1024;

fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let port = arguments.next().and_then(|port| port.parse().ok()).unwrap_or(9100);
    let threads = arguments.next().and_then(|threads| threads.parse().ok()).unwrap_or(1);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    runtime.block_on(serve(port))
}

async fn serve(port: u16) -> io::Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind((Ipv4Addr::LOCALHOST, port).into())?;
    let listener: TcpListener = socket.listen(16_384)?;
    let answers = Arc::new(Answers::new());
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let answers = Arc::clone(&answers);
        tokio::spawn(async move {
            // A client that disconnects is not an error.
            connection(stream, &answers).await.unwrap_or_default();
        });
    }
}

/// The answers, made once.
struct Answers {
    json: Vec<u8>,
    /// Without the usage, and with it.
    streams: [Vec<u8>; 2],
}

const STREAM_HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\
                           cache-control: no-cache\r\nx-request-id: req_bench\r\n\r\n";
const STREAM_END: &str = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
const USAGE: &str = r#"{"prompt_tokens":21,"completion_tokens":200,"total_tokens":221,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0}}"#;

impl Answers {
    fn new() -> Self {
        let content = "All work and no play makes Jack a dull boy. ".repeat(10);
        let body = format!(
            r#"{{"id":"chatcmpl-bench","object":"chat.completion","created":1795608000,"model":"bench","choices":[{{"index":0,"message":{{"role":"assistant","content":"{content}","refusal":null}},"logprobs":null,"finish_reason":"stop"}}],"usage":{USAGE},"system_fingerprint":"fp_bench"}}"#
        );
        let json = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nx-request-id: req_bench\r\n\r\n{body}",
            body.len()
        );
        let stream = |usage: bool| {
            let mut text = String::from(STREAM_HEAD);
            for number in 0..EVENTS {
                add_chunk(&mut text, &event(number, EVENTS, usage, None));
            }
            if usage {
                add_chunk(&mut text, &usage_event());
            }
            text + STREAM_END
        };
        Self { json: json.into_bytes(), streams: [stream(false).into_bytes(), stream(true).into_bytes()] }
    }
}

fn add_chunk(text: &mut String, event: &str) {
    write!(text, "{:x}\r\n{event}\r\n", event.len()).expect("a String takes everything");
}

/// One chunk of a chat, as long as `OpenAI`'s are.
fn event(number: usize, events: usize, usage: bool, sent_ns: Option<i128>) -> String {
    let (content, reason) = if number + 1 == events { ("", r#""stop""#) } else { (" word", "null") };
    let usage = if usage { r#","usage":null"# } else { "" };
    let sent = sent_ns.map_or(String::new(), |sent| format!(r#","sent_ns":{sent}"#));
    format!(
        "data: {{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1795608000,\"model\":\"bench\",\
         \"system_fingerprint\":\"fp_bench\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{content}\"}},\"logprobs\":null,\
         \"finish_reason\":{reason}}}]{usage}{sent}}}\n\n"
    )
}

fn usage_event() -> String {
    format!(
        "data: {{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1795608000,\"model\":\"bench\",\
         \"choices\":[],\"usage\":{USAGE}}}\n\n"
    )
}

/// The clock that every process of a machine shares.
fn monotonic_ns() -> i128 {
    let now = clock_gettime(ClockId::Monotonic);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

async fn connection(mut stream: TcpStream, answers: &Answers) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        let Some(request) = read_request(&mut stream, &mut buffer).await? else { return Ok(()) };
        match request {
            Request { stream: false, .. } => stream.write_all(&answers.json).await?,
            Request { usage, pace: None, events: EVENTS, .. } => {
                stream.write_all(answers.streams.get(usize::from(usage)).expect("there are two")).await?;
            }
            request => paced(&mut stream, &request).await?,
        }
    }
}

/// The parts of a request that decide its answer.
struct Request {
    stream: bool,
    usage: bool,
    pace: Option<Duration>,
    events: usize,
}

/// Reads a request to the end of its body, which is discarded. Returns `None` if the client has disconnected.
async fn read_request(stream: &mut TcpStream, buffer: &mut BytesMut) -> io::Result<Option<Request>> {
    let head_bytes = loop {
        if let Some(end) = memmem::find(buffer, b"\r\n\r\n") {
            break end + 4;
        }
        if buffer.len() > HEADER_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if buffer.is_empty() {
            // Idle connections hold no memory, so that thousands of them do not affect the figures.
            stream.readable().await?;
        }
        buffer.reserve(4096);
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    };
    let head = String::from_utf8_lossy(buffer.get(..head_bytes).unwrap_or_default()).to_ascii_lowercase();
    let number = |name: &str| {
        let value = head.split("\r\n").find_map(|line| line.strip_prefix(name));
        value.and_then(|value| value.trim().parse::<usize>().ok())
    };
    let mut rest = number("content-length:").unwrap_or(0);
    buffer.advance(head_bytes);
    let mut begin = Vec::new();
    while rest > 0 {
        if buffer.is_empty() {
            buffer.reserve(rest.min(READ_BYTES));
            if stream.read_buf(buffer).await? == 0 {
                return Ok(None);
            }
        }
        let piece = buffer.split_to(rest.min(buffer.len()));
        rest -= piece.len();
        begin.extend_from_slice(
            piece.get(..LOOK_BYTES.saturating_sub(begin.len()).min(piece.len())).unwrap_or_default(),
        );
    }
    if buffer.is_empty() {
        *buffer = BytesMut::new();
    }
    Ok(Some(Request {
        stream: memmem::find(&begin, br#""stream":true"#).is_some(),
        usage: memmem::find(&begin, br#""include_usage":true"#).is_some(),
        pace: number("x-pace-ms:").map(|pace| Duration::from_millis(pace as u64)),
        events: number("x-events:").unwrap_or(EVENTS),
    }))
}

async fn paced(stream: &mut TcpStream, request: &Request) -> io::Result<()> {
    let mut text = String::from(STREAM_HEAD);
    let mut ticks = request.pace.map(tokio::time::interval);
    for number in 0..request.events {
        if let Some(ticks) = &mut ticks {
            ticks.tick().await;
        }
        add_chunk(&mut text, &event(number, request.events, request.usage, Some(monotonic_ns())));
        stream.write_all(text.as_bytes()).await?;
        text.clear();
    }
    if request.usage {
        add_chunk(&mut text, &usage_event());
    }
    text.push_str(STREAM_END);
    stream.write_all(text.as_bytes()).await
}
