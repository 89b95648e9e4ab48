//! Several processes on one Redis server: what they share, and what becomes of it when one of them, or the server, fails.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use api_together::simulator::{Behaviour, Simulator};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;

use crate::harness::{KEY, chat, client, config_text, endpoint_with, port, simulator};
use crate::program::{Running, program, setting};
use crate::redis::{RedisServer, Sentinels};

/// Requests that are under way at once, for each process.
const TASKS: usize = 8;
const RPM: u64 = 600;
const RPD: u64 = 400;
/// Keys of what the ledger counts of each.
const ENDPOINT_A: &str = "{api-together}:minute:endpoint:a";
const ENDPOINT_B: &str = "{api-together}:day:endpoint:b";

/// Clients that ask without end, and go on when nobody listens.
fn load(ports: &[u16], stop: &Arc<AtomicBool>, answered: &Arc<AtomicUsize>) -> Vec<JoinHandle<()>> {
    let one = |port: u16| {
        let url = format!("http://127.0.0.1:{port}/v1/chat/completions");
        let (stop, answered) = (Arc::clone(stop), Arc::clone(answered));
        let client = client(|builder| builder.timeout(Duration::from_secs(5)));
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let call = client.post(&url).bearer_auth(KEY).json(&chat("m")).send().await;
                let is_good = call.is_ok_and(|response| response.status() == 200);
                answered.fetch_add(usize::from(is_good), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(fastrand::u64(5..60))).await;
            }
        })
    };
    ports.iter().flat_map(|port| [*port; TASKS]).map(one).collect()
}

/// One endpoint with a limit by the minute and one by the day.
fn config(port: u16, redis: &str, server: &Value, a: &Simulator, b: &Simulator) -> String {
    let apis = [
        endpoint_with("a", &a.base_url(), json!({ "rpm": RPM, "modelLimits": { "m": { "rpm": 2 * RPM } } })),
        endpoint_with("b", &b.base_url(), json!({ "rpd": RPD, "timezone": "UTC" })),
    ];
    let mut of_server = json!({ "port": port, "ledger": redis });
    of_server.as_object_mut().unwrap().extend(server.as_object().unwrap().clone());
    config_text(of_server, &apis)
}

fn start(folder: &Path, name: &str, text: &str) -> Running {
    std::fs::write(folder.join(name), text).unwrap();
    let mut command = program(folder);
    command.args(["--config", name]).env("RUST_LOG", "warn");
    Running::of(command, tempfile::tempdir().unwrap())
}

fn received(simulators: &[Simulator; 2]) -> [u64; 2] {
    simulators.each_ref().map(|simulator| simulator.requests().len() as u64)
}

/// Waits until the endpoints have been asked nothing new for so long.
async fn until_quiet(simulators: &[Simulator; 2], quiet: Duration) {
    let (mut last, mut since) = (received(simulators), Instant::now());
    while since.elapsed() < quiet {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = received(simulators);
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
}

/// Several processes under load, on one server.
struct Cluster {
    folder: TempDir,
    ports: Vec<u16>,
    running: Vec<Running>,
    simulators: [Simulator; 2],
    load: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    begun: Instant,
    /// The ledger's address, and other settings of the server.
    settings: (String, Value),
}

impl Cluster {
    async fn start(processes: usize, redis: &str, server: Value) -> Self {
        let simulators = [simulator().await, simulator().await];
        let ports: Vec<u16> = (0..processes).map(|_| port()).collect();
        let (stop, answered) = (Arc::default(), Arc::default());
        let load = load(&ports, &stop, &answered);
        let mut cluster = Self {
            folder: TempDir::new().unwrap(),
            ports,
            running: Vec::new(),
            simulators,
            load,
            stop,
            answered,
            begun: Instant::now(),
            settings: (redis.to_owned(), server),
        };
        cluster.running = (0..processes).map(|at| cluster.spawn(at)).collect();
        cluster
    }

    fn spawn(&self, at: usize) -> Running {
        let ((redis, server), [a, b]) = (&self.settings, &self.simulators);
        start(self.folder.path(), &format!("{at}.json"), &config(self.ports[at], redis, server, a, b))
    }

    fn received(&self) -> [u64; 2] {
        received(&self.simulators)
    }

    /// Waits until so much was received in all, or long enough for that.
    async fn until_received(&self, count: u64) {
        let begun = Instant::now();
        while self.received().iter().sum::<u64>() < count && begun.elapsed() < Duration::from_secs(10) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until everything is given out, and ends the load. `wasted`: permits that nobody may have got.
    async fn end(self, wasted: u64) -> [u64; 2] {
        until_quiet(&self.simulators, Duration::from_secs(4)).await;
        self.stop.store(true, Ordering::Relaxed);
        for task in self.load {
            task.await.unwrap();
        }
        let received = received(&self.simulators);
        eprintln!("received {received:?} in {:?}, answered {:?}", self.begun.elapsed(), self.answered);
        assert!(self.begun.elapsed() < Duration::from_secs(58), "the minute slid on: {:?}", self.begun.elapsed());
        for (received, limit) in received.iter().zip([RPM, RPD]) {
            assert!(*received <= limit, "{received} of {limit}");
            assert!(*received + wasted >= limit, "{received} of {limit}, of which {wasted} may be wasted");
        }
        received
    }
}

/// Permits that a process may have had in its hands when it was killed.
const OF_A_KILL: u64 = TASKS as u64;

#[tokio::test(flavor = "multi_thread")]
async fn kills_of_processes_pass_no_limit() {
    let (redis, kills) = (RedisServer::start(&[]), setting("KILLS", 2));
    let mut cluster = Cluster::start(3, &redis.url(), json!({})).await;
    for kill in 0..kills {
        cluster.until_received(100 + 40 * kill).await;
        let at = usize::try_from(kill).unwrap() % 3;
        drop(cluster.running.remove(at));
        let again = cluster.spawn(at);
        cluster.running.insert(at, again);
    }
    cluster.end(kills * OF_A_KILL).await;
}

/// What is written at once is there after a kill.
const ALWAYS: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "always"];
/// A second of it may be lost, by a loss of power; a kill of the server alone leaves what the system has taken.
const EVERY_SECOND: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "everysec"];

#[tokio::test(flavor = "multi_thread")]
async fn kills_of_the_server_pass_no_limit() {
    for options in [&ALWAYS[..], &EVERY_SECOND, &[]] {
        let mut redis = RedisServer::start(options);
        let cluster = Cluster::start(3, &redis.url(), json!({})).await;
        for kill in 0..setting("KILLS", 1) {
            cluster.until_received(150 + 100 * kill).await;
            redis.kill();
            tokio::time::sleep(Duration::from_millis(300)).await;
            redis.restart();
        }
        eprintln!("{options:?}");
        cluster.end(0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_opens_no_limit_twice() {
    for _ in 0..setting("FAILOVERS", 1) {
        let mut leader = RedisServer::start(&[]);
        let replica = leader.replica();
        let sentinels = Sentinels::watch(&leader);
        let cluster = Cluster::start(3, &sentinels.url(), json!({})).await;
        cluster.until_received(200).await;
        // The replica does not get the last writes.
        replica.signal("STOP");
        let before: u64 = cluster.received().iter().sum();
        cluster.until_received(before + 200).await;
        let lost = cluster.received().iter().sum::<u64>() - before;
        leader.kill();
        replica.signal("CONT");
        let begun = Instant::now();
        let at_kill: u64 = cluster.received().iter().sum();
        cluster.until_received(at_kill + 1).await;
        eprintln!("{lost} permits were lost; the next one came after {:?}", begun.elapsed());
        assert!(lost > 100, "{lost}");
        cluster.end(0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_set_moves_no_window() {
    let redis = RedisServer::start(&[]);
    let cluster = Cluster::start(2, &redis.url(), json!({})).await;
    // The ledger's time is the server's and a shift, so another shift is another clock.
    for (received, millis) in [(150, 120_000), (300, -120_000), (400, -600_000), (500, 3000)] {
        cluster.until_received(received).await;
        let mut set = ::redis::cmd("HINCRBY");
        let _: i64 = set.arg("{api-together}:state").arg("shift").arg(millis).query(&mut redis.connection()).unwrap();
    }
    cluster.end(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_process_finds_out_of_an_endpoint_the_others_know_within_a_second() {
    let (redis, folder) = (RedisServer::start(&[]), TempDir::new().unwrap());
    let (bad, good) = (simulator().await, simulator().await);
    let refused = json!({ "error": { "message": "Incorrect API key provided", "code": "invalid_api_key" } });
    let (content_type, body) = (Some("application/json".into()), Some(refused.to_string()));
    bad.set_default(Behaviour { status: 401, body, content_type, ..Behaviour::default() });
    let ports = [port(), port()];
    let running = ports.map(|port| {
        let apis = [
            endpoint_with("bad", &bad.base_url(), json!({ "priority": 1 })),
            endpoint_with("good", &good.base_url(), json!({ "priority": 2 })),
        ];
        let text = config_text(json!({ "port": port, "ledger": redis.url() }), &apis);
        start(folder.path(), &format!("{port}.json"), &text)
    });
    let client = client(|builder| builder.timeout(Duration::from_secs(5)));
    let ask = async |at: usize| {
        let url = running[at].url("/v1/chat/completions");
        client.post(url).bearer_auth(KEY).json(&chat("m")).send().await.unwrap().status()
    };
    let cools = async |at: usize| {
        let answer = client.get(running[at].url("/v1/status")).bearer_auth(KEY).send().await.unwrap();
        let status: Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
        status["apis"][0]["temporarilyDisabled"] == true
    };
    assert!(!cools(1).await);
    assert_eq!(ask(0).await, 200, "the other one answers");
    let begun = Instant::now();
    while !cools(1).await {
        assert!(begun.elapsed() < Duration::from_secs(5), "the other process does not hear of it");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    eprintln!("heard of after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!(ask(1).await, 200);
    assert_eq!(bad.requests().len(), 1, "nobody asks it again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_has_lost_everything_opens_no_limit_twice() {
    let redis = RedisServer::start(&[]);
    let cluster = Cluster::start(3, &redis.url(), json!({})).await;
    cluster.until_received(300).await;
    let _: () = ::redis::cmd("FLUSHALL").query(&mut redis.connection()).unwrap();
    cluster.end(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_answering_keeps_nobody_waiting() {
    let redis = RedisServer::start(&[]);
    let cluster = Cluster::start(2, &redis.url(), json!({ "ledgerWaitMs": 500 })).await;
    cluster.until_received(100).await;
    redis.signal("STOP");
    let url = cluster.running[0].url("/v1/chat/completions");
    let client = client(|builder| builder.timeout(Duration::from_secs(5)));
    let mut longest = Duration::ZERO;
    let mut refused = 0;
    for _ in 0..20 {
        let begun = Instant::now();
        let answer = client.post(&url).bearer_auth(KEY).json(&chat("m")).send().await.unwrap();
        longest = longest.max(begun.elapsed());
        refused += usize::from(answer.status() == 503);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    redis.signal("CONT");
    assert!(refused >= 15, "{refused} of 20 were refused");
    // Twice, since a request may try again; and the time that the machine takes for it.
    assert!(longest < Duration::from_millis(1500), "{longest:?}");
    cluster.end(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_processes_give_out_exactly_what_there_is() {
    let redis = RedisServer::start(&[]);
    let cluster = Cluster::start(8, &redis.url(), json!({})).await;
    let answered = Arc::clone(&cluster.answered);
    assert_eq!(cluster.end(0).await, [RPM, RPD]);
    assert_eq!(answered.load(Ordering::Relaxed) as u64, RPM + RPD);
    // The fields of the slots and of their sum.
    assert_eq!((redis.sum(ENDPOINT_A, "a"), redis.sum(ENDPOINT_B, "a")), (2 * RPM, RPD));
}
