//! Holds many streams open at once and measures the delay of their events: `streams PORT STREAMS EVENTS PACE_MS KEY`.
//!
//! The endpoint (`benches/endpoint.rs`) writes into each event the moment at which it was sent, by the clock that all processes
//! of a machine share. The delay is the time from then until the event is read here. Only events that arrive while all streams
//! are open count. A line `open` is printed as soon as all are open, and the figures, as JSON, at the end.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a bench that cannot be set up must stop, and its figures go to standard output"
)]

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use memchr::memmem;
use rustix::time::{ClockId, clock_gettime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// New streams a second, so that no backlog overflows.
const STREAMS_PER_SECOND: u32 = 2000;
const SENT: &[u8] = b"\"sent_ns\":";
const READ_BYTES: usize = 16 * 1024;

struct Load {
    port: u16,
    streams: usize,
    request: Vec<u8>,
    open: AtomicUsize,
    cut: AtomicUsize,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [port, streams, events, pace, key] = arguments.as_slice() else {
        eprintln!("usage: streams PORT STREAMS EVENTS PACE_MS KEY");
        std::process::exit(2);
    };
    let body = r#"{"stream":true,"model":"bench","messages":[{"role":"user","content":"Count for a while."}]}"#;
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n\
         x-pace-ms: {pace}\r\nx-events: {events}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let number = |text: &String| text.parse::<usize>().expect("a number");
    let load = Arc::new(Load {
        port: port.parse().expect("a port"),
        streams: number(streams),
        request: request.into_bytes(),
        open: AtomicUsize::new(0),
        cut: AtomicUsize::new(0),
    });
    let mut tasks = JoinSet::new();
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / STREAMS_PER_SECOND);
    for _ in 0..load.streams {
        ticks.tick().await;
        let load = Arc::clone(&load);
        tasks.spawn(async move {
            let mut delays = Vec::new();
            if stream(&load, &mut delays).await.is_err() {
                load.cut.fetch_add(1, Ordering::Relaxed);
            }
            // From now on not all streams are open.
            load.open.fetch_sub(1, Ordering::Relaxed);
            delays
        });
    }
    let mut delays: Vec<u32> = tasks.join_all().await.concat();
    delays.sort_unstable();
    let at = |per_mille: usize| {
        let rank = (delays.len() * per_mille / 1000).min(delays.len().saturating_sub(1));
        delays.get(rank).copied().unwrap_or_default()
    };
    println!(
        r#"{{"events":{},"cut":{},"p50_us":{},"p99_us":{},"p999_us":{},"max_us":{}}}"#,
        delays.len(),
        load.cut.load(Ordering::Relaxed),
        at(500),
        at(990),
        at(999),
        at(1000),
    );
}

/// Reads one stream to its end, and notes how many microseconds late each event is.
async fn stream(load: &Load, delays: &mut Vec<u32>) -> io::Result<()> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, load.port)).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&load.request).await?;
    let mut buffer = Vec::new();
    let mut is_open = false;
    loop {
        stream.readable().await?;
        buffer.reserve(READ_BYTES);
        if stream.read_buf(&mut buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let now = monotonic_ns();
        if !is_open {
            is_open = true;
            if load.open.fetch_add(1, Ordering::Relaxed) + 1 == load.streams {
                println!("open");
            }
        }
        let counts = load.open.load(Ordering::Relaxed) == load.streams;
        let mut seen = 0;
        for place in memmem::find_iter(&buffer, SENT) {
            let rest = buffer.get(place + SENT.len()..).unwrap_or_default();
            // Digits that are cut off are read again with the rest.
            let Some(digits) = memchr::memchr(b'}', rest) else { break };
            let sent: i128 = std::str::from_utf8(rest.get(..digits).unwrap_or_default())
                .ok()
                .and_then(|digits| digits.parse().ok())
                .unwrap_or(now);
            if counts {
                delays.push(u32::try_from((now - sent) / 1000).unwrap_or(u32::MAX));
            }
            seen = place + SENT.len() + digits;
        }
        if memmem::find(&buffer, b"data: [DONE]").is_some() {
            return Ok(());
        }
        let kept = buffer.len() - seen.max(buffer.len().saturating_sub(64));
        buffer = if kept == 0 { Vec::new() } else { buffer.split_off(buffer.len() - kept) };
    }
}

/// The clock that every process of a machine shares.
fn monotonic_ns() -> i128 {
    let now = clock_gettime(ClockId::Monotonic);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}
