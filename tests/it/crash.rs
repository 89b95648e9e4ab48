//! Killed again and again, alone and beside another process: no limit is passed, and nothing that was sent is uncounted.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use api_together::simulator::Simulator;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;

use crate::harness::{KEY, chat, client, config_text, endpoint_with, port, simulator, until};
use crate::program::{Running, program};

const KILLS: usize = 20;
/// Requests that are under way at once, for each process.
const TASKS: usize = 16;
const RPM: u64 = 900;
const RPD: u64 = 600;
/// All of it, within one sliding minute.
const BOUND: Duration = Duration::from_secs(55);

/// Clients that ask without end, and go on when nobody listens.
fn load(port: u16, stop: &Arc<AtomicBool>, answered: &Arc<AtomicUsize>) -> Vec<JoinHandle<()>> {
    load_with(KEY, &chat("m"), port, stop, answered)
}

fn load_with(
    key: &'static str,
    body: &Value,
    port: u16,
    stop: &Arc<AtomicBool>,
    answered: &Arc<AtomicUsize>,
) -> Vec<JoinHandle<()>> {
    let url = format!("http://127.0.0.1:{port}/v1/chat/completions");
    let one = |_| {
        let (url, body, stop, answered) = (url.clone(), body.clone(), Arc::clone(stop), Arc::clone(answered));
        let client = client(|builder| builder.timeout(Duration::from_secs(5)));
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let call = client.post(&url).bearer_auth(key).json(&body).send().await;
                let is_good = call.is_ok_and(|response| response.status() == 200);
                answered.fetch_add(usize::from(is_good), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(fastrand::u64(5..60))).await;
            }
        })
    };
    (0..TASKS).map(one).collect()
}

/// One endpoint with a limit by the minute and one by the day, on a ledger that several processes may share.
fn config(folder: &Path, port: u16, a: &Simulator, b: &Simulator) -> String {
    let apis = [
        endpoint_with("a", &a.base_url(), json!({ "rpm": RPM, "modelLimits": { "m": { "rpm": 2 * RPM } } })),
        endpoint_with("b", &b.base_url(), json!({ "rpd": RPD, "timezone": "UTC" })),
    ];
    config_text(json!({ "port": port, "ledger": folder.join("ledger.db") }), &apis)
}

fn start(folder: &Path, name: &str, text: &str) -> Running {
    std::fs::write(folder.join(name), text).unwrap();
    let mut command = program(folder);
    command.args(["--config", name]).env("RUST_LOG", "error");
    Running::of(command, tempfile::tempdir().unwrap())
}

/// What the ledger counts at one moment, for the endpoints in this order: attempts of the minute, and of all days. A request
/// counts for the model that all of them ask for and for its endpoint, or for neither.
fn counted(folder: &Path) -> [(u64, u64); 2] {
    let mut ledger = rusqlite::Connection::open(folder.join("ledger.db")).unwrap();
    let ledger = ledger.transaction().unwrap();
    let sum = |table: &str, condition: &str| {
        let sql = format!("SELECT coalesce(sum(attempts), 0) FROM {table} WHERE {condition}");
        ledger.query_row(&sql, [], |row| row.get(0)).unwrap()
    };
    let counted = ["endpoint = 'a'", "endpoint = 'b'"].map(|id| (sum("minute", id), sum("day", id)));
    let of_model = "owner = 'a' AND part = 'm'";
    assert_eq!((sum("account_minute", of_model), sum("account_day", of_model)), counted[0]);
    counted
}

/// What was sent is within the limits and counted, and no more is counted than was sent or in flight at a kill.
fn check(folder: &Path, a: &Simulator, b: &Simulator, kills: usize, limits_are_reached: bool) {
    let received = || [a, b].map(|simulator| simulator.requests().len() as u64);
    let before = received();
    let [(a_minute, a_day), (_, b_day)] = counted(folder);
    let after = received();
    assert!(after[0] <= RPM, "{} in a minute", after[0]);
    assert!(after[1] <= RPD, "{} on a day", after[1]);
    // Beside those that kills cut off, another process has its own on their way.
    let in_flight = ((kills + 1) * TASKS) as u64;
    for (what, at, counted) in [("a", 0, a_minute), ("a", 0, a_day), ("b", 1, b_day)] {
        let (before, after) = (before[at], after[at]);
        let what = format!("{what}: {counted} counted, {before} to {after} received, {in_flight} in flight");
        assert!((before..=after + in_flight).contains(&counted), "{what}");
    }
    if limits_are_reached {
        assert_eq!((a_minute, b_day), (RPM, RPD));
    }
    eprintln!("{kills} kills: received {before:?} to {after:?}, counted {:?}", counted(folder));
}

async fn crash(processes: usize) {
    let begun = Instant::now();
    let folder = TempDir::new().unwrap();
    let (a, b) = (simulator().await, simulator().await);
    let ports: Vec<u16> = (0..processes).map(|_| port()).collect();
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let load: Vec<_> = ports.iter().flat_map(|port| load(*port, &stop, &answered)).collect();
    let spawn = |at: usize| start(folder.path(), &format!("{at}.json"), &config(folder.path(), ports[at], &a, &b));
    let mut running: Vec<Running> = (0..processes).map(&spawn).collect();
    for kill in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(50..400))).await;
        let at = kill % processes;
        drop(running.remove(at));
        check(folder.path(), &a, &b, kill + 1, false);
        running.insert(at, spawn(at));
    }
    // Those that are left take what is left.
    let total = || [&a, &b].map(|simulator| simulator.requests().len() as u64);
    let counted_all = || counted(folder.path()).map(|(_, day)| day) == [RPM, RPD];
    until("everything is used up", counted_all).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    stop.store(true, Ordering::Relaxed);
    for task in load {
        task.await.unwrap();
    }
    assert!(begun.elapsed() < BOUND, "the minute slid on: {:?}", begun.elapsed());
    check(folder.path(), &a, &b, KILLS, true);
    assert!(total().iter().sum::<u64>() > 700, "too little went through to prove anything: {:?}", total());
    assert!(answered.load(Ordering::Relaxed) > 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_kills_pass_no_limit_and_lose_no_count() {
    crash(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_on_one_ledger_pass_no_limit_while_either_is_killed() {
    crash(2).await;
}

/// Keys of callers in the test of them: one with a limit by the minute, one by the day, one of tokens.
const KEYS: [(&str, &str); 3] =
    [("ada", "sk-ada-0f6c1d93be5a7724"), ("bob", "sk-bob-91c7aa02f4d86e35"), ("eve", "sk-eve-7d3f1a90bb2c4e58")];
const KEY_RPM: u64 = 900;
const KEY_RPD: u64 = 700;
const KEY_TPD: u64 = 30_000;
/// More than a request of the test may take of a key's tokens.
const TOKENS_MAX: u64 = 300;

/// What a caller of the test sends, which says whose it is.
fn said_by(name: &str) -> Value {
    json!({ "model": "m", "messages": [{ "role": "user", "content": "hi" }], "user": name, "max_tokens": 200 })
}

/// The tokens of an answer to it, which are the same each time.
async fn tokens_of_an_answer(name: &str) -> u64 {
    let endpoint = simulator().await;
    let url = format!("{}/chat/completions", endpoint.base_url());
    let answer = client(|builder| builder).post(url).json(&said_by(name)).send().await.unwrap();
    let answer: Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
    answer["usage"]["total_tokens"].as_u64().unwrap()
}

/// What the endpoint has got of each caller, in the order of the keys.
fn received_of_keys(endpoint: &Simulator) -> [u64; 3] {
    let mut received = [0; 3];
    for request in endpoint.requests() {
        let body: Value = serde_json::from_slice(&request.body).unwrap();
        let at = KEYS.iter().position(|(name, _)| body["user"] == *name).unwrap();
        received[at] += 1;
    }
    received
}

/// What the ledger counts at one moment: requests of the first key in the minute, of the second on the day, tokens of the third.
fn counted_of_keys(folder: &Path) -> [u64; 3] {
    let mut ledger = rusqlite::Connection::open(folder.join("ledger.db")).unwrap();
    let ledger = ledger.transaction().unwrap();
    let sum = |what: &str, table: &str, condition: &str| {
        let sql = format!("SELECT coalesce(sum({what}), 0) FROM {table} WHERE {condition}");
        ledger.query_row(&sql, [], |row| row.get(0)).unwrap()
    };
    let ada = sum("attempts", "account_minute", "kind = 'key' AND owner = 'ada'");
    assert_eq!(ada, sum("attempts", "account_minute", "kind = 'key_models' AND owner = 'ada'"), "both or neither");
    [
        ada,
        sum("attempts", "account_day", "kind = 'key' AND owner = 'bob'"),
        sum("tokens", "account_day", "kind = 'key' AND owner = 'eve'"),
    ]
}

/// No key has got more than its limit, and nothing that was sent is uncounted. What is received is looked at before and after
/// what is counted: the other process goes on meanwhile, and has requests on their way.
fn check_keys(folder: &Path, endpoint: &Simulator, tokens: u64, kills: usize) {
    let received = || {
        let [ada, bob, eve] = received_of_keys(endpoint);
        [ada, bob, eve * tokens]
    };
    let before = received();
    let counted = counted_of_keys(folder);
    let after = received();
    let in_flight = ((kills + 1) * TASKS) as u64;
    let limits = [KEY_RPM, KEY_RPD, KEY_TPD];
    let uncertain = [in_flight, in_flight, (in_flight + TASKS as u64) * TOKENS_MAX];
    for at in 0..KEYS.len() {
        let what = format!("{}: {} counted of {} to {} received", KEYS[at].0, counted[at], before[at], after[at]);
        assert!(after[at] <= limits[at] && counted[at] <= limits[at], "{what}");
        assert!((before[at]..=after[at] + uncertain[at]).contains(&counted[at]), "{what}");
    }
    eprintln!("{kills} kills: received {before:?} to {after:?}, counted {counted:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_of_two_processes_pass_no_limit_of_a_key_and_lose_no_count() {
    let begun = Instant::now();
    let folder = TempDir::new().unwrap();
    let endpoint = simulator().await;
    let tokens = tokens_of_an_answer("eve").await;
    let ports = [port(), port()];
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let load: Vec<_> = ports
        .iter()
        .flat_map(|port| KEYS.map(|(name, key)| load_with(key, &said_by(name), *port, &stop, &answered)))
        .flatten()
        .collect();
    let spawn = |at: usize| {
        let keys = json!([
            { "name": "ada", "key": KEYS[0].1, "rpm": KEY_RPM, "modelLimits": { "m*": { "rpm": KEY_RPM } } },
            { "name": "bob", "key": KEYS[1].1, "rpd": KEY_RPD },
            { "name": "eve", "key": KEYS[2].1, "tpd": KEY_TPD },
        ]);
        let server = json!({ "port": ports[at], "ledger": folder.path().join("ledger.db"), "keys": keys });
        let apis = [endpoint_with("a", &endpoint.base_url(), json!({ "rpm": 1_000_000 }))];
        start(folder.path(), &format!("{at}.json"), &config_text(server, &apis))
    };
    let mut running: Vec<Running> = (0..ports.len()).map(spawn).collect();
    for kill in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(50..400))).await;
        let at = kill % ports.len();
        drop(running.remove(at));
        check_keys(folder.path(), &endpoint, tokens, kill + 1);
        running.insert(at, spawn(at));
    }
    let all_is_used = || {
        let [ada, bob, eve] = counted_of_keys(folder.path());
        (ada, bob) == (KEY_RPM, KEY_RPD) && eve + TOKENS_MAX > KEY_TPD
    };
    until("everything is used up", all_is_used).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    stop.store(true, Ordering::Relaxed);
    for task in load {
        task.await.unwrap();
    }
    assert!(begun.elapsed() < BOUND, "the minute slid on: {:?}", begun.elapsed());
    check_keys(folder.path(), &endpoint, tokens, KILLS);
    assert!(answered.load(Ordering::Relaxed) > 300, "too little went through to prove anything");
}

/// A budget in 1e-9 dollars, and the prices by which its requests take of it: in dollars for a million tokens.
const BUDGET: u64 = 2_000_000_000;
const PRICE: u64 = 100;

/// What the ledger has of the budget: spent and reserved.
fn budget_of(folder: &Path) -> (u64, u64) {
    let ledger = rusqlite::Connection::open(folder.join("ledger.db")).unwrap();
    let sql = "SELECT coalesce(sum(spent), 0), coalesce(sum(reserved), 0) FROM budget";
    ledger.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap()
}

/// The budget is not passed, and what was received is spent or reserved, but for what was under way when its process was killed: that
/// is spent as far as it was known.
fn check_budget(folder: &Path, endpoint: &Simulator, cost: u64, kills: usize) {
    // What is received after this line is not looked for in the ledger.
    let received = endpoint.requests().len() as u64;
    let (spent, reserved) = budget_of(folder);
    let killed = (kills * TASKS) as u64;
    let what = format!("{kills} kills: {received} received at {cost}, {spent} spent, {reserved} reserved");
    assert!(spent + reserved <= BUDGET && received * cost <= BUDGET, "{what}");
    assert!(spent + reserved + killed * cost >= received * cost, "{what}");
    eprintln!("{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_of_two_processes_neither_leak_a_budget_nor_leave_a_gap_in_it() {
    let folder = TempDir::new().unwrap();
    let endpoint = simulator().await;
    let cost = tokens_of_an_answer("ada").await * PRICE * 1000;
    let ports = [port(), port()];
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (_, key) = KEYS[0];
    let load: Vec<_> = ports.iter().flat_map(|port| load_with(key, &said_by("ada"), *port, &stop, &answered)).collect();
    let spawn = |at: usize| {
        let keys = json!([{ "name": "ada", "key": key, "budget": [{ "usd": 2, "per": "total" }] }]);
        let prices = json!({ "m": { "input": PRICE, "output": PRICE } });
        let server =
            json!({ "port": ports[at], "ledger": folder.path().join("ledger.db"), "keys": keys, "prices": prices });
        start(
            folder.path(),
            &format!("{at}.json"),
            &config_text(server, &[endpoint_with("a", &endpoint.base_url(), json!({}))]),
        )
    };
    let mut running: Vec<Running> = (0..ports.len()).map(spawn).collect();
    for kill in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(50..400))).await;
        let at = kill % ports.len();
        drop(running.remove(at));
        check_budget(folder.path(), &endpoint, cost, kill + 1);
        running.insert(at, spawn(at));
    }
    stop.store(true, Ordering::Relaxed);
    for task in load {
        task.await.unwrap();
    }
    // A process that says nothing for half a minute is dead, and is settled.
    let begun = Instant::now();
    while budget_of(folder.path()).1 > 0 {
        assert!(begun.elapsed() < Duration::from_mins(1), "a reservation is left: {:?}", budget_of(folder.path()));
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    check_budget(folder.path(), &endpoint, cost, KILLS);
    let received = endpoint.requests().len() as u64;
    let (spent, _) = budget_of(folder.path());
    // Of those that were killed before they were sent, the prompt counts.
    let unsent = (KILLS * TASKS) as u64 * 60 * PRICE * 1000;
    assert!(spent <= received * cost + unsent, "{spent} spent of {received} requests at {cost}");
    assert!(answered.load(Ordering::Relaxed) > 100, "too little went through to prove anything");
}

/// Of an endpoint that is asked all the time and has plenty left permits are drawn ahead. A process that ends gives them back; one
/// that is killed wastes what it has used up within a moment.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_drawn_ahead_is_given_back_or_wasted_but_never_sent_uncounted() {
    let folder = TempDir::new().unwrap();
    let endpoint = simulator().await;
    let port = port();
    let limits = json!({ "rpm": 10_000_000, "rpd": 10_000_000 });
    let apis = [endpoint_with(
        "a",
        &endpoint.base_url(),
        json!({ "rpm": 10_000_000, "rpd": 10_000_000, "modelLimits": { "m": limits } }),
    )];
    let text = config_text(json!({ "port": port, "ledger": folder.path().join("ledger.db") }), &apis);
    let received = || endpoint.requests().len() as u64;
    let mut wasted = 0;
    for kills in [false, true, false] {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut running = start(folder.path(), "a.json", &text);
        let url = format!("http://127.0.0.1:{port}/v1/chat/completions");
        let load: Vec<JoinHandle<()>> = (0..TASKS)
            .map(|_| {
                let (url, stop, answered) = (url.clone(), Arc::clone(&stop), Arc::clone(&answered));
                let client = client(|builder| builder.timeout(Duration::from_secs(5)));
                tokio::spawn(async move {
                    while !stop.load(Ordering::Relaxed) {
                        let call = client.post(&url).bearer_auth(KEY).json(&chat("m")).send().await;
                        answered.fetch_add(
                            usize::from(call.is_ok_and(|response| response.status() == 200)),
                            Ordering::Relaxed,
                        );
                    }
                })
            })
            .collect();
        until("much was asked", || answered.load(Ordering::Relaxed) > 1000).await;
        if kills {
            drop(running);
        } else {
            running.signal("TERM");
            running.exit().await;
        }
        stop.store(true, Ordering::Relaxed);
        for task in load {
            task.await.unwrap();
        }
        let [(_, counted), _] = counted(folder.path());
        let sent = received();
        assert!(counted >= sent + wasted, "{counted} counted of {sent} sent and {wasted} wasted before");
        if kills {
            wasted = counted - sent;
            assert!(wasted <= 4096 + TASKS as u64, "{wasted} were wasted");
        } else {
            assert_eq!(counted, sent + wasted, "nothing is wasted by an end in order");
        }
    }
}
