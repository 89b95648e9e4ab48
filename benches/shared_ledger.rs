//! Measures draws from a ledger: how many a second, how long each takes, and what they take of the processor of a ledger's server, by
//! processes and endpoints. `LEDGER` names the server (`redis://127.0.0.1:6379`); without it, the ledger is a file.
//!
//! A process is a ledger's thread with its own connection, and 32 requests that draw one permit after the other.

#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a bench that cannot be set up must stop, and its figures go to standard output"
)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use api_together::config::{Config, Environment, Format, check_str};
use api_together::ledger::budgets::Spends;
use api_together::ledger::{AccountId, AccountSet, CallerId, Client, Drawn, Keeper, LimitedAccount, Otherwise, Wanted};
use api_together::limit::{Limits, Stamp};
use jiff::tz::TimeZone;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Requests of each process that draw at once.
const REQUESTS: usize = 32;
/// Time of one measurement, after as much of it again to warm up.
const TIME: Duration = Duration::from_secs(2);

fn main() {
    let server = std::env::var("LEDGER").ok();
    println!("ledger: {}; {REQUESTS} requests a process", server.as_deref().unwrap_or("a file"));
    println!("processes  endpoints  drawn      draws/s   p50 µs   p99 µs   draws a second of the server's processor");
    for processes in [1, 2, 4, 8] {
        for endpoints in [1, 10, 100, 1000] {
            for ahead in [false, true] {
                measure(server.as_deref(), processes, endpoints, ahead);
            }
        }
    }
}

/// Draws by one process, until it is stopped.
struct Process {
    keeper: Keeper,
    wanted: Arc<Vec<Wanted>>,
}

impl Process {
    fn new(config: &Config) -> Self {
        let keeper = Keeper::new(&config.server);
        keeper.start().expect("a thread");
        let endpoint = config.endpoints.first().expect("an endpoint");
        let wanted = |number: usize| {
            let account = keeper.client().account(&AccountId::Endpoint(format!("e{number}").into()));
            let of = LimitedAccount { account, limits: Arc::new(Limits::new(endpoint, &TimeZone::UTC)) };
            let accounts = Arc::new(AccountSet::new(vec![of]));
            Wanted { accounts, not_before: Stamp::default(), spends: Spends::default() }
        };
        let endpoints = config.endpoints.len();
        let wanted = Arc::new((0..endpoints).map(wanted).collect());
        Self { keeper, wanted }
    }
}

fn measure(server: Option<&str>, processes: usize, endpoints: usize, ahead: bool) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("ledger.db");
    let ledger = server.map_or_else(|| file.display().to_string(), str::to_owned);
    let redis = if server.is_some() {
        format!(r#", "redis": {{ "prefix": "bench-{}" }}"#, fastrand::u32(..))
    } else {
        String::new()
    };
    let apis: Vec<String> = (0..endpoints)
        .map(|number| {
            format!(
                r#"{{ "id": "e{number}", "baseUrl": "http://127.0.0.1", "apiKey": "sk-endpoint-7d1f93a8",
                    "models": ["m"], "rpm": 1000000000, "rpd": 1000000000000 }}"#
            )
        })
        .collect();
    let text = format!(
        r#"{{ "server": {{ "apiKey": "sk-client-7d1f93a8c05e42b6", "ledger": "{ledger}"{redis} }}, "apis": [{}] }}"#,
        apis.join(",")
    );
    let config = check_str(&text, Format::Json, &Environment::default(), Path::new("/")).expect("a config").config;
    let all: Vec<Process> = (0..processes).map(|_| Process::new(&config)).collect();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let (stop, counts) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let tasks: Vec<_> = all
        .iter()
        .flat_map(|process| std::iter::repeat_n(process, REQUESTS))
        .map(|process| {
            let (client, wanted) = (process.keeper.client().clone(), Arc::clone(&process.wanted));
            let (stop, counts) = (Arc::clone(&stop), Arc::clone(&counts));
            runtime.spawn(async move { draw(&client, &wanted, ahead, (&stop, &counts)).await })
        })
        .collect();
    // A server that has just begun gives nothing out for some seconds.
    std::thread::sleep(TIME + if server.is_some() { Duration::from_secs(3) } else { Duration::ZERO });
    let before = server.map(processor_time);
    counts.store(true, Ordering::Relaxed);
    let begun = Instant::now();
    std::thread::sleep(TIME);
    counts.store(false, Ordering::Relaxed);
    let seconds = begun.elapsed().as_secs_f64();
    let used = server.map(|server| processor_time(server) - before.unwrap_or_default());
    stop.store(true, Ordering::Relaxed);
    let mut waits: Vec<Duration> = Vec::new();
    for task in tasks {
        waits.extend(runtime.block_on(task).expect("it does not panic"));
    }
    for process in &all {
        process.keeper.close();
    }
    waits.sort_unstable();
    let at = |share: f64| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a position in the list")]
        let place = ((waits.len() as f64 * share) as usize).min(waits.len().saturating_sub(1));
        waits.get(place).copied().unwrap_or_default().as_secs_f64() * 1e6
    };
    let rate = waits.len() as f64 / seconds;
    let of_server = used.map_or_else(String::new, |used| format!("{:.0}", waits.len() as f64 / used));
    println!(
        "{processes:9}  {endpoints:9}  {:9}  {rate:8.0}  {:7.0}  {:7.0}   {of_server}",
        if ahead { "ahead" } else { "each" },
        at(0.5),
        at(0.99)
    );
}

/// Draws one permit after the other, each of any endpoint. Returns how long those took that count.
async fn draw(
    client: &Client,
    wanted: &[Wanted],
    ahead: bool,
    (stop, counts): (&AtomicBool, &AtomicBool),
) -> Vec<Duration> {
    let mut waits = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let one = fastrand::choice(wanted).expect("an endpoint");
        let at_once = if ahead { client.draw_at_once(&one.accounts, &client.clock()) } else { None };
        let mut permit = if let Some(permit) = at_once {
            permit
        } else {
            // What is refused is refused exactly, so nothing is drawn ahead for it.
            let otherwise = if ahead { Otherwise::LookElsewhere } else { Otherwise::Refuse(CallerId(1)) };
            let Drawn::Granted(_, permit) = client.draw(client.ticket(), vec![one.clone()], otherwise).await else {
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            permit
        };
        permit.spend();
        if counts.load(Ordering::Relaxed) {
            waits.push(begun.elapsed());
        }
        tokio::task::yield_now().await;
    }
    waits
}

/// What the server has used of its processor, in seconds.
fn processor_time(server: &str) -> f64 {
    let mut connection = redis::Client::open(server).and_then(|client| client.get_connection()).expect("a connection");
    let info: String = redis::cmd("INFO").arg("cpu").query(&mut connection).expect("an answer");
    let seconds = |name: &str| -> f64 {
        let line = info.lines().find_map(|line| line.strip_prefix(name)).expect("a line");
        line.trim_start_matches(':').trim().parse().expect("a number")
    };
    seconds("used_cpu_user") + seconds("used_cpu_sys")
}
