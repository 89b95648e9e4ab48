//! Measures the request log: what its writer takes of a core at 2,000 requests a second, what a search in a full log takes, and how
//! many requests it writes at most. `ROWS` sets the size of the log that is searched (default: a million).

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a bench that cannot be set up must stop, and its figures go to standard output"
)]

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use api_together::config::{Environment, Format, check_str};
use api_together::request_log::reader::{Filter, From, Reader, StatusWanted};
use api_together::request_log::{Attempted, Entry, Name, RequestLog, Store};
use api_together::usage::Tokens;
use api_together::usage::prices::NanoUsd;
use http::HeaderValue;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Requests that are written in one transaction, as many as come in a fifth of a second at the rate of the mark.
const BATCH: usize = 400;
/// Rate of the mark, in requests a second, and for how long.
const RATE: u64 = 2000;
const SECONDS: u64 = 10;
/// Searches of which the median is shown.
const SEARCHES: usize = 21;

fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    writer_at_rate(&folder.path().join("rate.db"));
    let rows = std::env::var("ROWS").ok().and_then(|rows| rows.parse().ok()).unwrap_or(1_000_000);
    let path = folder.path().join("requests.db");
    fill(&path, rows);
    search(&path);
}

/// The writer's share of a core, beside a client that leaves [`RATE`] requests a second.
fn writer_at_rate(path: &Path) {
    let text = format!(
        r#"{{ "server": {{ "apiKey": "sk-client-7d1f93a8c05e42b6", "requestLog": {{ "path": "{}" }} }},
            "apis": [{{ "id": "a", "baseUrl": "http://127.0.0.1", "apiKey": "sk-endpoint-7d1f93a8", "models": ["m"] }}] }}"#,
        path.display()
    );
    let config = check_str(&text, Format::Json, &Environment::default(), Path::new("/")).expect("a config").config;
    let log = RequestLog::new(&config.server);
    log.start();
    let begun = Instant::now();
    for number in 0..RATE * SECONDS {
        let due = Duration::from_nanos(number * 1_000_000_000 / RATE);
        std::thread::sleep(due.saturating_sub(begun.elapsed()));
        if log.takes(false) {
            log.add(entry(number));
        }
    }
    std::thread::sleep(Duration::from_secs(1));
    let took = begun.elapsed();
    let busy = cpu_of_thread("request-log");
    let state = log.state().expect("a log");
    log.close();
    println!(
        "writer at {RATE} requests a second: {:.1} % of a core, {:.1} us a request, {} written, {} dropped",
        busy.as_secs_f64() / took.as_secs_f64() * 100.0,
        busy.as_secs_f64() / state.written as f64 * 1e6,
        state.written,
        state.dropped.total()
    );
}

/// Processor time of one of this process's threads.
fn cpu_of_thread(name: &str) -> Duration {
    let tasks = fs::read_dir("/proc/self/task").expect("tasks").map(|task| task.expect("a task").path());
    let is_it = |task: &std::path::PathBuf| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name);
    let task = tasks.into_iter().find(is_it).expect("the thread");
    // Its first field is the time on a processor in nanoseconds.
    let stat = fs::read_to_string(task.join("schedstat")).expect("its times");
    Duration::from_nanos(stat.split(' ').next().and_then(|time| time.parse().ok()).unwrap_or_default())
}

fn fill(path: &Path, rows: u64) {
    let mut store = Store::open(path).expect("a log");
    let begun = Instant::now();
    for first in (0..rows).step_by(BATCH) {
        let batch: Vec<_> = (first..rows.min(first + BATCH as u64)).map(entry).collect();
        store.write(&batch).expect("room");
    }
    let took = begun.elapsed();
    let bytes = fs::metadata(path).expect("the file").len();
    println!(
        "{rows} requests written in {:.1} s ({:.0} a second), {:.0} bytes each",
        took.as_secs_f64(),
        rows as f64 / took.as_secs_f64(),
        bytes as f64 / rows as f64
    );
}

fn search(path: &Path) {
    let all = Filter::default();
    let key = |key: &str| Some(key.to_owned());
    for (what, filter) in [
        ("the newest page", all.clone()),
        (
            "a key and a status that are often",
            Filter { key: key("key-3"), status: Some(StatusWanted::One(200)), ..all.clone() },
        ),
        (
            "a key and a status that are seldom",
            Filter { key: key("rare"), status: Some(StatusWanted::Class(5)), ..all.clone() },
        ),
        (
            "a key and a status that never were",
            Filter { key: key("key-3"), status: Some(StatusWanted::One(418)), ..all.clone() },
        ),
        ("an endpoint's failures", Filter { endpoint: key("endpoint-7"), failed: true, ..all.clone() }),
        ("a session that never was", Filter { session: Some(7), ..all.clone() }),
        ("a request by its id, the oldest", Filter { id: key(&id(1)), ..all }),
    ] {
        let (mut times, mut found, mut searched) = (Vec::new(), 0, String::new());
        for _ in 0..SEARCHES {
            let begun = Instant::now();
            let mut reader = Reader::open(path).expect("the log");
            let page = reader.page(&filter, From::Newest, 50).expect("a page");
            times.push(begun.elapsed());
            found = page.requests.len();
            searched =
                if page.next.is_some() && found < 50 { " in the newest million".to_owned() } else { String::new() };
        }
        times.sort();
        let median = times.get(SEARCHES / 2).copied().unwrap_or_default();
        println!("{what}: {:.1} ms, {found} found{searched}", median.as_secs_f64() * 1e3);
    }
}

fn id(number: u64) -> String {
    format!("{:08x}-0000-4000-8000-{:012x}", number.wrapping_mul(0x9e37_79b9) & 0xffff_ffff, number)
}

/// A request as they are: most are answered by the first endpoint, one in ten by the second.
fn entry(number: u64) -> Entry {
    let pick = |of: u64, salt: u64| (number ^ salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 & 0xffff_ffff & (of - 1);
    let name = |kind: &str, number: u64| -> Arc<str> { format!("{kind}-{number}").into() };
    let is_failed = pick(64, 5) == 0;
    let endpoint = name("endpoint", pick(16, 1));
    let attempt = |endpoint: Arc<str>, is_failed: bool| Attempted {
        began: Duration::from_micros(150),
        took: Duration::from_millis(830),
        first_byte: Some(Duration::from_millis(310)),
        endpoint,
        lane: None,
        model: Some(Name::Known("gpt-4o-mini".into())),
        span: number,
        outcome: if is_failed { "status_5xx" } else { "ok" },
        status: Some(if is_failed { 503 } else { 200 }),
        trouble: is_failed.then_some(("model_failure", "status")),
        passed_over: Vec::new(),
    };
    let retried = (pick(8, 2) == 0).then(|| attempt(name("endpoint", pick(16, 3)), true));
    let key = if number % 100_000 == 7 { "rare".into() } else { name("key", pick(16, 4)) };
    Entry {
        ended: SystemTime::now(),
        id: HeaderValue::from_str(&id(number)).ok(),
        trace: Some(u128::from(number)),
        key: Some(key),
        tags: None,
        address: Some(IpAddr::V4(Ipv4Addr::new(10, 0, 1, u8::try_from(number & 0xff).unwrap_or_default()))),
        session: Some(number / 8 * 0x9e37_79b9),
        method: Name::Known("POST".into()),
        path: Name::Known("/v1/chat/completions".into()),
        model: Some(Name::Known("gpt-4o-mini".into())),
        fallback: None,
        endpoint_model: None,
        endpoint: Some(Arc::clone(&endpoint)),
        lane: None,
        affinity: Some("followed"),
        stream: true,
        status: Some(if is_failed { 503 } else { 200 }),
        fault: is_failed.then_some("endpoint_error"),
        trouble: is_failed.then_some(("model_failure", "status")),
        queued: Duration::ZERO,
        first_byte: Some(Duration::from_millis(312)),
        first_token: Some(Duration::from_millis(313)),
        generation: Some(Duration::from_millis(517)),
        total: Duration::from_millis(830),
        tokens: Some(Tokens { prompt: 1200, completion: 300, total: 1500, cached: 1024, reasoning: 0, audio: 0 }),
        cost: Some(NanoUsd(360_000)),
        request_bytes: 4800,
        bytes: 61_000,
        held: Vec::new(),
        outside: None,
        cause: None,
        config: 1,
        attempts: retried.into_iter().chain([attempt(endpoint, is_failed)]).collect(),
        bodies: None,
    }
}
