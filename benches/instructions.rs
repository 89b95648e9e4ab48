//! Counts the instructions of each stage of a request. Unlike time, they do not depend on how busy the machine is.
//!
//! Each stage runs under valgrind, once and then many times, and the difference gives the cost of one run. The counts are
//! compared with the stored ones beside this file, with a tolerance for another compiler or processor; `--write` stores new
//! counts. Needs valgrind, which `make bench-instructions` installs.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a bench that cannot be set up must stop, and its figures go to standard output"
)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hint::black_box;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Instant;

use api_together::billing::Measured;
use api_together::config::{Config, Environment, Format, check_str};
use api_together::exchange::judge::{Head, Judge, Rules, Terms, UsageTerms};
use api_together::ledger::Client;
use api_together::limit::Clock;
use api_together::proxy::access_log::Record;
use api_together::request::auth::Auth;
use api_together::request::call::Call;
use api_together::request::fields;
use api_together::request::forward;
use api_together::request::id;
use api_together::request::rewrite;
use api_together::response::redact::Secrets;
use api_together::response::relay::Relay;
use api_together::routing::balance::{self, KeyWish, Options};
use api_together::routing::callers::Keyring;
use api_together::routing::pool::Pool;
use api_together::routing::router::Candidates;
use api_together::usage::Meter;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use jiff::Timestamp;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Per cent by which a count may differ from the stored one.
const TOLERANCE: f64 = 5.0;
/// Per cent by which a choice among a thousand endpoints may cost more than among one.
const GROWTH_MAX: f64 = 5.0;
const RUNS: u64 = 200;
/// A stage with fewer instructions is run more often: its set-up makes maps with random keys, so its cost varies. That of 10,000 keys
/// varies by a million, which is 5,000 for each of [`RUNS`].
const SHORT: u64 = 20_000;
const RUNS_SHORT: u64 = 50_000;
const STORED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/instructions.txt");
const EVENTS: usize = 200;

/// A stage's name, and its set-up, which returns the code of one run.
type Stage = (&'static str, fn() -> Box<dyn FnMut()>);

const STAGES: &[Stage] = &[
    ("request id", request_id),
    ("check the key", check_key),
    ("check a caller's key, 1 caller", || check_callers_key(1)),
    ("check a caller's key, 10,000 callers", || check_callers_key(10_000)),
    ("find the model in 1 KB", || scan(1024)),
    ("find the model in 64 KB", || scan(64 * 1024)),
    ("splice 1 KB", splice),
    ("route an exact name, 1 endpoint", || route(1, "model-0")),
    ("route an exact name, 1,000 endpoints", || route(1000, "model-0")),
    ("route a pattern, 1 endpoint", || route(1, "family-000-large")),
    ("route a pattern, 1,000 endpoints", || route(1000, "family-000-large")),
    ("pick, 1 endpoint", || pick(1, "model-0")),
    ("pick, 1,000 endpoints", || pick(1000, "model-0")),
    ("pick, 3 endpoints of one model", || pick(3, "shared")),
    ("pick, 1,000 endpoints of one model", || pick(1000, "shared")),
    ("pick one of 3 keys", || pick_key(3)),
    ("pick one of 10,000 keys", || pick_key(10_000)),
    ("permit without limits", permit),
    ("headers to forward", forward_headers),
    ("judge a 1 KB answer", judge),
    ("tokens of a 1 KB answer", answer),
    ("200 events: relay and measure", || events(false)),
    ("200 events: and strip the usage", || events(true)),
    ("log line", line),
];

/// Pairs of stages of which the second, with many endpoints, must not cost more than the first.
const FLAT: [(&str, &str); 6] = [
    ("check a caller's key, 1 caller", "check a caller's key, 10,000 callers"),
    ("route an exact name, 1 endpoint", "route an exact name, 1,000 endpoints"),
    ("route a pattern, 1 endpoint", "route a pattern, 1,000 endpoints"),
    ("pick, 1 endpoint", "pick, 1,000 endpoints"),
    ("pick, 3 endpoints of one model", "pick, 1,000 endpoints of one model"),
    ("pick one of 3 keys", "pick one of 10,000 keys"),
];

fn chat(bytes: usize) -> Bytes {
    let content = "All work and no play makes Jack a dull boy. ".repeat(bytes / 44);
    format!(r#"{{"messages":[{{"role":"user","content":"{content}"}}],"temperature":0.7,"model":"model-7"}}"#).into()
}

fn config(endpoints: usize) -> Config {
    let apis: Vec<_> = (0..endpoints)
        .map(|index| {
            serde_json::json!({
                "id": format!("api{index}"), "baseUrl": "http://127.0.0.1:9", "apiKey": "sk-endpoint-key",
                "models": [format!("model-{index}"), format!("family-{index:03}-*"), "shared"],
            })
        })
        .collect();
    let text = serde_json::json!({ "server": { "apiKey": "sk-client-key" }, "apis": apis }).to_string();
    check_str(&text, Format::Json, &Environment::default(), Path::new("")).expect("the config is good").config
}

fn pool(endpoints: usize) -> Pool {
    Pool::new(config(endpoints), Client::new(Clock::read), None).expect("the pool is good")
}

fn request_id() -> Box<dyn FnMut()> {
    Box::new(|| drop(black_box(id::request_id(black_box(None)))))
}

fn check_key() -> Box<dyn FnMut()> {
    let (auth, server) = (Auth::default(), config(1).server);
    let mut headers = HeaderMap::new();
    headers.insert(header::AUTHORIZATION, HeaderValue::from_static("Bearer sk-client-key"));
    let nobody = |_: &[u8]| None;
    Box::new(move || {
        let checked = auth.check::<()>(&server, black_box(&headers), None, (None, true), nobody);
        black_box(checked.expect("it is the key"));
    })
}

/// The key of one of so many callers that have keys of their own.
fn check_callers_key(keys: usize) -> Box<dyn FnMut()> {
    let auth = Auth::default();
    let mut server = config(1).server;
    let text: Vec<_> = (0..keys).map(|index| format!("sk-at-{index:043}")).collect();
    let keys: Vec<_> = text
        .iter()
        .enumerate()
        .map(|(index, key)| serde_json::json!({ "name": format!("caller{index}"), "key": key }))
        .collect();
    let config = serde_json::json!({
        "server": { "keys": keys },
        "apis": [{ "id": "a", "baseUrl": "http://127.0.0.1:9", "apiKey": "sk-endpoint-key", "models": ["m"] }],
    });
    let loaded = check_str(&config.to_string(), Format::Json, &Environment::default(), Path::new(""));
    server.keys = loaded.expect("the config is good").config.server.keys;
    let keyring = Keyring::new(Client::new(Clock::read));
    keyring.set_config(&server);
    let mut headers = HeaderMap::new();
    let key = format!("Bearer {}", text.last().expect("there are keys"));
    headers.insert(header::AUTHORIZATION, HeaderValue::from_str(&key).expect("it is a header's value"));
    Box::new(move || {
        let find = |key: &[u8]| keyring.load().find(key, None, Timestamp::now());
        let checked = auth.check(&server, black_box(&headers), None, (None, true), find);
        black_box(checked.expect("it is a caller's key"));
    })
}

fn scan(bytes: usize) -> Box<dyn FnMut()> {
    let body = chat(bytes);
    Box::new(move || drop(black_box(fields::scan(black_box(&body)))))
}

fn splice() -> Box<dyn FnMut()> {
    let body = chat(1024);
    let place = fields::scan(&body).expect("it is JSON").model.expect("it names a model").place;
    Box::new(move || drop(black_box(rewrite::spliced(&body, &mut [rewrite::model_edit(&place, "another-model")]))))
}

fn route(endpoints: usize, model: &'static str) -> Box<dyn FnMut()> {
    let pool = pool(endpoints);
    Box::new(move || {
        black_box(pool.router.find(black_box(model)));
    })
}

fn pick(endpoints: usize, model: &'static str) -> Box<dyn FnMut()> {
    let pool = pool(endpoints);
    let (clock, candidates) = (pool.clock(), Arc::clone(pool.router.find(model).expect("it is served")));
    Box::new(move || drop(black_box(balance::pick(&options(&pool, black_box(&candidates), model), &clock))))
}

/// Picks one of many keys, each with a limit of its own, and finds the accounts that its requests count in.
fn pick_key(keys: usize) -> Box<dyn FnMut()> {
    let model = "shared";
    let key = |index| serde_json::json!({ "key": format!("sk-{index}-4be2a90c7d115f38"), "rpm": 60 });
    let keys: Vec<_> = (0..keys).map(key).collect();
    let api = serde_json::json!({ "id": "a", "baseUrl": "http://127.0.0.1:9", "models": [model], "apiKeys": keys });
    let text = serde_json::json!({ "server": { "apiKey": "sk-client-key" }, "apis": [api] }).to_string();
    let loaded = check_str(&text, Format::Json, &Environment::default(), Path::new("")).expect("the config is good");
    let pool = Pool::new(loaded.config, Client::new(Clock::read), None).expect("the pool is good");
    let (clock, candidates) = (pool.clock(), Arc::clone(pool.router.find(model).expect("it is served")));
    // A key's accounts are made when it is first used.
    for lane in 0..keys.len() {
        black_box(options(&pool, &candidates, model).accounts(0, lane));
    }
    Box::new(move || {
        let options = options(&pool, black_box(&candidates), model);
        let pick = balance::pick(&options, &clock).expect("one is open");
        black_box(options.accounts(pick.candidate, pick.lane));
    })
}

fn options<'a>(pool: &'a Pool, candidates: &'a Candidates, model: &'a str) -> Options<'a> {
    Options { pool, candidates, model: Some(model), shape: None, tried: &[], preferred: None, keys: KeyWish::default() }
}

/// Headers as OpenAI's Python SDK sends them.
fn forward_headers() -> Box<dyn FnMut()> {
    let server = config(1).server;
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("host", "127.0.0.1:3001"),
        ("accept-encoding", "gzip, deflate"),
        ("connection", "keep-alive"),
        ("accept", "application/json"),
        ("content-type", "application/json"),
        ("user-agent", "OpenAI/Python 2.9.0"),
        ("x-stainless-lang", "python"),
        ("x-stainless-package-version", "2.9.0"),
        ("x-stainless-os", "Linux"),
        ("x-stainless-arch", "x64"),
        ("x-stainless-runtime", "CPython"),
        ("x-stainless-runtime-version", "3.13.0"),
        ("x-stainless-async", "false"),
        ("x-stainless-retry-count", "0"),
        ("x-stainless-read-timeout", "600"),
        ("authorization", "Bearer sk-client-key"),
        ("content-length", "1024"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    Box::new(move || drop(black_box(forward::forwarded(black_box(&headers), &server, None, false))))
}

fn judge() -> Box<dyn FnMut()> {
    let config = config(1);
    let content = "All work and no play makes Jack a dull boy. ".repeat(16);
    let body: Bytes = format!(
        r#"{{"id":"chatcmpl-9","object":"chat.completion","created":1795608000,"model":"gpt-4o-mini","choices":[{{"index":0,"message":{{"role":"assistant","content":"{content}","refusal":null}},"finish_reason":"stop"}}],"usage":{{"prompt_tokens":9,"completion_tokens":160,"total_tokens":169}}}}"#
    )
    .into();
    let (retry, now) = (config.server.retry, Instant::now());
    Box::new(move || {
        let terms = Terms {
            call: Call::Completion,
            streams: false,
            expects_body: true,
            more: true,
            more_keys: false,
            more_if_empty: true,
            searches: false,
            usage: UsageTerms::default(),
        };
        let rules = Rules { retry: &retry, errors: &[] };
        let content_type = Some("application/json");
        let head = Head { status: 200, content_type, wait: None, end: false, ends_with_connection: false };
        let mut judge = Judge::new(terms);
        judge.header(head, &rules);
        black_box(judge.body(black_box(&body), true, &rules, now));
    })
}

fn permit() -> Box<dyn FnMut()> {
    let pool = pool(1);
    Box::new(move || {
        let endpoint = pool.endpoints.first().expect("there is one");
        pool.ledger.unlimited(endpoint.accounts.without_model()).spend();
    })
}

fn answer() -> Box<dyn FnMut()> {
    let content = "All work and no play makes Jack a dull boy. ".repeat(20);
    let answer = Bytes::from(format!(
        r#"{{"id":"chatcmpl-9","object":"chat.completion","created":1795608000,"model":"gpt-4o","choices":[{{"index":0,"message":{{"role":"assistant","content":"{content}"}},"finish_reason":"stop"}}],"usage":{{"prompt_tokens":9,"completion_tokens":12,"total_tokens":21,"prompt_tokens_details":{{"cached_tokens":0}}}},"system_fingerprint":"fp_1"}}"#
    ));
    Box::new(move || {
        let mut meter = Meter::new(Call::Completion, true);
        meter.json(black_box(&answer));
        meter.json_ended();
        black_box(meter.reported().expect("it tells"));
    })
}

fn events(strips: bool) -> Box<dyn FnMut()> {
    let event = |nth: usize| {
        format!(
            "data: {{\"id\":\"chatcmpl-9\",\"object\":\"chat.completion.chunk\",\"created\":1795608000,\"model\":\"gpt-4o-mini\",\"choices\":[{{\"index\":0,\
             \"delta\":{{\"content\":\" word{nth}\"}},\"logprobs\":null,\"finish_reason\":null}}],\"usage\":null,\"obfuscation\":\"{}\"}}\n\n",
            "x".repeat(nth % 9)
        )
    };
    let stream = Bytes::from((0..EVENTS).map(event).collect::<String>());
    Box::new(move || {
        let (mut relay, mut meter) =
            (Relay::new(strips, Secrets::from_iter([&b"sk-endpoint-key"[..]])), Meter::new(Call::Completion, true));
        let mut out = Vec::new();
        relay.piece(black_box(&stream), &mut meter, &mut out);
        black_box(out.len());
    })
}

fn line() -> Box<dyn FnMut()> {
    Box::new(|| {
        let record = Record {
            id: "01234567-89ab-4def-8123-456789abcdef",
            caller: None,
            key: None,
            tags: &[],
            method: "POST",
            path: "/v1/chat/completions",
            model: Some(black_box("gpt-4o")),
            endpoint_model: None,
            endpoint: Some("endpoint-1"),
            endpoint_key: None,
            attempts: 1,
            status: Some(200),
            bytes: 1234,
            first_byte: None,
            total: std::time::Duration::from_millis(1234),
            measured: Measured::default(),
            meaning: None,
            fault: None,
            held: Vec::new(),
            cause: None,
        };
        black_box(record.text().len());
    })
}

/// Returns the instructions of one run of a stage.
fn count(stage: &str) -> u64 {
    let total = |runs: u64| {
        let program = std::env::current_exe().expect("this program has a path");
        let done = Command::new("valgrind")
            .args(["--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"])
            .arg(program)
            .args(["--stage", stage, &runs.to_string()])
            .output()
            .expect("valgrind is missing: install it, or run `make bench-instructions`");
        let text = String::from_utf8_lossy(&done.stderr).into_owned();
        let line = text.lines().find_map(|line| line.split_once("refs:")).map(|(_, count)| count.replace(',', ""));
        line.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or_else(|| {
            eprintln!("{stage}: valgrind says no count:\n{text}");
            std::process::exit(1);
        })
    };
    // The first run includes the work that is done only once.
    let once = total(1);
    let of = |runs: u64| total(runs + 1).saturating_sub(once) / runs;
    match of(RUNS) {
        long @ SHORT.. => long,
        _ => of(RUNS_SHORT),
    }
}

fn stored() -> BTreeMap<String, u64> {
    let text = std::fs::read_to_string(STORED).unwrap_or_default();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.rsplit_once('\t'))
        .filter_map(|(stage, count)| Some((stage.to_owned(), count.parse().ok()?)))
        .collect()
}

fn run(stage: &str, runs: u64) {
    let (_, set_up) = STAGES.iter().find(|(name, _)| *name == stage).expect("the stage is known");
    let mut run = set_up();
    (0..runs).for_each(|_| run());
}

#[expect(clippy::cast_precision_loss, reason = "no stage has that many")]
fn change(count: u64, than: u64) -> f64 {
    (count as f64 / than.max(1) as f64 - 1.0) * 100.0
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, stage, runs] = arguments.as_slice()
        && flag == "--stage"
    {
        run(stage, runs.parse().expect("a number of runs"));
        return ExitCode::SUCCESS;
    }
    let stored = stored();
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    let mut text = "# Instructions of one run of each stage, counted by `make bench-instructions`; `make bench-instructions-write` writes them.\n".to_owned();
    let mut failed = false;
    for (stage, _) in STAGES {
        let counted = count(stage);
        counts.insert(stage, counted);
        writeln!(text, "{stage}\t{counted}").expect("a String takes everything");
        let off = stored.get(*stage).map(|before| change(counted, *before));
        let is_off = off.is_none_or(|off| off.abs() > TOLERANCE);
        failed |= is_off;
        let told = off.map_or("not stored".to_owned(), |off| format!("{off:+.1} %"));
        println!("{stage:<38} {counted:>9} {told:>11}{}", if is_off { "  <-- not what is stored" } else { "" });
    }
    let mut grows = false;
    for (few, many) in FLAT {
        let growth = change(*counts.get(many).unwrap_or(&0), *counts.get(few).unwrap_or(&0));
        if growth > GROWTH_MAX {
            grows = true;
            println!("{many}: {growth:+.1} % against {few}; at most {GROWTH_MAX} % are allowed");
        }
    }
    if arguments.iter().any(|argument| argument == "--write") {
        std::fs::write(STORED, text).expect("the counts can be written");
    } else if failed {
        println!(
            "Faster or slower than stored by more than {TOLERANCE} %: if that is meant, run `make bench-instructions-write`."
        );
        return ExitCode::FAILURE;
    }
    if grows { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
