//! Measures the time of each stage of a request.

#![allow(
    clippy::expect_used,
    missing_docs,
    reason = "a bench that cannot be set up must stop, and has no readers of its docs"
)]

use std::future::Future as _;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use api_together::config::{Config, Environment, Format, LedgerOnError, LedgerSync, Limit, check_str};
use api_together::ledger::sqlite::{Opening, SqliteLedger};
use api_together::ledger::{Allocator, Client, Drawn, Otherwise};
use api_together::limit::{Clock, Stamp};
use api_together::request::call::Call;
use api_together::request::{fields, rewrite};
use api_together::response::redact::Secrets;
use api_together::response::relay::Relay;
use api_together::response::sse::Splitter;
use api_together::routing::balance::{self, KeyWish, Options};
use api_together::routing::pool::Pool;
use api_together::routing::router::ModelName;
use api_together::usage::Meter;
use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// A chat request of about this many bytes, with the model at its end, where finding it costs most.
fn chat(bytes: usize) -> Bytes {
    let content = "All work and no play makes Jack a dull boy. ".repeat(bytes / 44);
    format!(r#"{{"messages":[{{"role":"user","content":"{content}"}}],"temperature":0.7,"model":"model-7"}}"#).into()
}

fn config(endpoints: usize) -> Config {
    let apis: Vec<_> = (0..endpoints)
        .map(|index| {
            serde_json::json!({
                "id": format!("api{index}"), "baseUrl": "http://127.0.0.1:9", "apiKey": "sk-endpoint-key",
                "models": [format!("model-{index}"), format!("family-{index}-*")],
            })
        })
        .collect();
    let text = serde_json::json!({ "server": { "apiKey": "sk-client-key" }, "apis": apis }).to_string();
    check_str(&text, Format::Json, &Environment::default(), Path::new("")).expect("the config is good").config
}

fn body(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("body");
    for bytes in [1024, 64 * 1024, 5 * 1024 * 1024] {
        let body = chat(bytes);
        let place = fields::scan(&body).expect("it is JSON").model.expect("it names a model").place;
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function(BenchmarkId::new("scan", bytes), |b| b.iter(|| fields::scan(black_box(&body))));
        group.bench_function(BenchmarkId::new("splice", bytes), |b| {
            b.iter(|| rewrite::spliced(black_box(&body), &mut [rewrite::model_edit(&place, "another-model")]));
        });
    }
    group.finish();
}

fn choice(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("choice");
    for endpoints in [1, 10, 1000] {
        let pool = Pool::new(config(endpoints), Client::new(Clock::read), None).expect("the pool is good");
        group.bench_function(BenchmarkId::new("route exact", endpoints), |b| {
            b.iter(|| pool.router.find(black_box("model-0")).is_some());
        });
        group.bench_function(BenchmarkId::new("route pattern", endpoints), |b| {
            b.iter(|| pool.router.find(black_box("family-0-large")).is_some());
        });
        group.bench_function(BenchmarkId::new("pick", endpoints), |b| {
            let candidates = pool.router.find("model-0").expect("it is served");
            b.iter(|| {
                balance::pick(
                    &Options {
                        pool: &pool,
                        candidates,
                        model: Some("model-0"),
                        shape: None,
                        tried: &[],
                        preferred: None,
                        keys: KeyWish::default(),
                    },
                    &pool.clock(),
                )
                .is_some()
            });
        });
    }
    group.finish();
}

fn events(criterion: &mut Criterion) {
    let event = r#"{"id":"chatcmpl-9","object":"chat.completion.chunk","created":1795608000,"model":"gpt-4o-mini","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}],"usage":null}"#;
    let stream = Bytes::from(format!("data: {event}\n\n").repeat(200));
    let mut group = criterion.benchmark_group("events");
    group.throughput(Throughput::Elements(200));
    group.bench_function("split 200", |b| {
        b.iter(|| {
            let mut bytes = 0;
            Splitter::default().feed(black_box(&stream), |data| bytes += data.map_or(0, <[u8]>::len));
            bytes
        });
    });
    for (name, strips, estimates) in
        [("relay and measure 200", false, false), ("and keep a sample", false, true), ("and strip", true, true)]
    {
        group.bench_function(name, |b| {
            b.iter(|| {
                let (mut relay, mut meter) =
                    (Relay::new(strips, Secrets::default()), Meter::new(Call::Completion, estimates));
                let mut out = Vec::new();
                relay.piece(black_box(&stream), &mut meter, &mut out);
                out.len()
            });
        });
    }
    group.finish();
}

/// Draws from the ledger, without the way to its thread: several at once from five endpoints, served as one batch.
fn permits(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let _entered = runtime.enter();
    let folder = tempfile::tempdir().expect("a folder");
    let client = Client::new(Clock::read);
    let opening = Opening { boot_id: None, now: client.clock().boot, minute_unknown: false };
    let mut ledger =
        SqliteLedger::open(&folder.path().join("ledger.db"), LedgerSync::Normal, &opening).expect("a ledger");
    let mut desk = Allocator::new(client.clone(), LedgerOnError::Deny, Arc::default());
    let mut config = config(5);
    for endpoint in &mut config.endpoints {
        endpoint.limits.rpm = Limit::AtMost(1 << 40);
        endpoint.limits.rpd = Limit::AtMost(1 << 40);
    }
    let pool = Pool::new(config, client.clone(), None).expect("the pool is good");
    let mut group = criterion.benchmark_group("permits");
    for count in [1_usize, 8, 32] {
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::new("draw", count), |b| {
            b.iter(|| {
                let mut draws: Vec<_> = (pool.endpoints.iter().cycle().take(count))
                    .map(|endpoint| {
                        let model = ModelName { name: "m", in_config: true };
                        let wanted = vec![endpoint.wanted(model, 0, Stamp::default())];
                        Box::pin(client.draw(client.ticket(), wanted, Otherwise::LookElsewhere))
                    })
                    .collect();
                let mut context = Context::from_waker(Waker::noop());
                for draw in &mut draws {
                    assert!(draw.as_mut().poll(&mut context).is_pending(), "it is asked, not answered");
                }
                desk.serve(Some(&mut ledger)).expect("it can be written");
                for draw in &mut draws {
                    let Poll::Ready(Drawn::Granted(_, mut permit)) = draw.as_mut().poll(&mut context) else {
                        unreachable!("nobody is at a limit");
                    };
                    permit.spend();
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, body, choice, permits, events);
criterion_main!(benches);
