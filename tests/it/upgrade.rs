//! The running process is replaced under load, and serves on whatever goes wrong.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use api_together::server::runtime_folder;
use api_together::simulator::Behaviour;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::{JoinSet, spawn_blocking};

use crate::harness::{
    KEY, Reply, behaving, chat, chat_stream, client, config_text, endpoint_with, h2c, simulator, until, within,
};
use crate::program::{Running, folder_with, program, setting, texts};

/// How many upgrades there are in a row: `UPGRADES=20` for all that are promised.
const UPGRADES: usize = 2;
/// How long the streams last that are in flight meanwhile, in seconds: `STREAM_SECONDS=30`.
const STREAM_SECONDS: u64 = 8;

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A program in a folder of its own, which a file beside its config may replace.
struct Served {
    /// The first process; those after it are told by the runtime folder.
    first: Running,
    folder: PathBuf,
    binary: PathBuf,
}

impl Served {
    async fn start(config: &str) -> Self {
        let folder = folder_with("apis.json", config);
        let binary = folder.path().join("api-together");
        std::fs::copy(env!("CARGO_BIN_EXE_api-together"), &binary).unwrap();
        Self::of(folder, binary, None).await
    }

    async fn of(folder: TempDir, binary: PathBuf, notify: Option<&Path>) -> Self {
        let mut command = Command::new(&binary);
        command.current_dir(folder.path()).args(["--config", "apis.json"]).env("RUST_LOG", "info");
        for name in ["PORT", "RUNTIME_DIRECTORY", "NOTIFY_SOCKET"] {
            command.env_remove(name);
        }
        if folder.path().join("pingora.yaml").exists() {
            command.args(["--conf", "pingora.yaml"]);
        }
        if let Some(notify) = notify {
            command.env("NOTIFY_SOCKET", notify);
        }
        let path = folder.path().to_owned();
        let first = Running::of(command, folder);
        first.ready().await;
        until("it tells of itself", || runtime_folder::Running::read(&path.join("run")).is_some()).await;
        Self { first, folder: path, binary }
    }

    fn running(&self) -> runtime_folder::Running {
        runtime_folder::Running::read(&self.folder.join("run")).unwrap()
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.running().address)
    }

    /// What `api-together upgrade` says: its exit code, and its words.
    async fn upgrade(&self) -> (i32, String) {
        let mut command = program(&self.folder);
        command.args(["upgrade", "--config", "apis.json"]);
        let (code, out, err) = texts(&spawn_blocking(move || command.output().unwrap()).await.unwrap());
        (code, out + &err)
    }

    /// Puts another program where this one lay, as an installation does.
    fn install(&self, text: &str) {
        let fresh = self.folder.join("fresh");
        std::fs::write(&fresh, text).unwrap();
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(&fresh, &self.binary).unwrap();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // The last successor is nobody's child here.
        if let Some(running) = runtime_folder::Running::read(&self.folder.join("run")) {
            Command::new("kill").args(["-KILL", &running.pid.to_string()]).status().map(drop).unwrap_or_default();
        }
    }
}

fn is_gone(pid: u32) -> bool {
    // A zombie is gone, too: nobody but this test is there to bury it.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

#[tokio::test(flavor = "multi_thread")]
async fn upgrades_under_load_lose_no_request_and_cut_no_stream() {
    let (upgrades, stream_seconds) = (setting("UPGRADES", UPGRADES), setting("STREAM_SECONDS", STREAM_SECONDS));
    let quick = simulator().await;
    let events = usize::try_from(stream_seconds * 10).unwrap();
    let slow = behaving(Behaviour { chunk_delay_ms: 100, events, ..Behaviour::default() }).await;
    let apis = [
        endpoint_with("quick", &quick.base_url(), json!({ "models": ["quick"], "rpd": 100_000_000 })),
        endpoint_with("slow", &slow.base_url(), json!({ "models": ["slow"] })),
    ];
    let served = Arc::new(Served::start(&config_text(json!({ "port": free_port() }), &apis)).await);
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut callers = JoinSet::new();
    let url = served.url("/v1/chat/completions");
    for number in 0..6 {
        let (stop, sent, url) = (Arc::clone(&stop), Arc::clone(&sent), url.clone());
        callers.spawn(async move {
            let client = if number % 3 == 0 { h2c() } else { client(reqwest::ClientBuilder::http1_only) };
            while !stop.load(Ordering::Relaxed) {
                let reply = Reply::of(client.post(&url).bearer_auth(KEY).json(&chat("quick"))).await;
                reply.assert_from("quick", 1);
                sent.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let mut old = Vec::new();
    for number in 0..upgrades {
        let mut streams = JoinSet::new();
        for over_h2 in [false, true] {
            let url = url.clone();
            streams.spawn(async move {
                let client = if over_h2 { h2c() } else { client(reqwest::ClientBuilder::http1_only) };
                let stream = client.post(&url).bearer_auth(KEY).json(&chat_stream("slow")).send().await.unwrap();
                let text = stream.text().await.expect("the stream is cut");
                assert!(text.ends_with("data: [DONE]\n\n") && !text.contains("error"), "{text}");
                Instant::now()
            });
        }
        until("the streams are in flight", || slow.open_requests() == 2).await;
        let pid = served.running().pid;
        let (code, said) = served.upgrade().await;
        assert!(code == 0 && said.contains(&format!("has taken over from {pid}")), "upgrade {number}: {code}: {said}");
        assert_ne!(served.running().pid, pid);
        old.push(pid);
        let mut last = Instant::now();
        while let Some(ended) = streams.join_next().await {
            last = last.max(ended.unwrap());
        }
        // It hands over for five seconds at least, whatever it has in flight.
        until("the old process leaves", || is_gone(pid)).await;
        assert!(last.elapsed() < Duration::from_secs(2), "the old process lingers for {:?}", last.elapsed());
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(caller) = callers.join_next().await {
        caller.unwrap();
    }
    let sent = sent.load(Ordering::Relaxed);
    assert!(sent > 100, "{sent}");
    let status = Reply::of(client(|builder| builder).get(served.url("/v1/status")).bearer_auth(KEY)).await.json();
    let quick = status["apis"].as_array().unwrap().iter().find(|api| api["id"] == "quick").unwrap();
    assert_eq!(quick["usage"]["rpd"], sent, "all processes together count each request once");
    assert!(old.iter().all(|pid| is_gone(*pid)));
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_wrong_with_the_new_one_the_old_one_serves_on() {
    within(async {
        let simulator = simulator().await;
        let api = endpoint_with("a", &simulator.base_url(), json!({}));
        let port = free_port();
        let config = |server: Value| config_text(server, std::slice::from_ref(&api));
        let good = config(json!({ "port": port }));
        let served = Served::start(&good).await;
        let pid = served.running().pid;
        let write = |text: &str| std::fs::write(served.folder.join("apis.json"), text).unwrap();
        let real = env!("CARGO_BIN_EXE_api-together");
        let crashes_late = format!("#!/bin/sh\ncase \" $* \" in *' --test '*) exec {real} \"$@\";; esac\nexit 7\n");
        let expectations: [(&str, &str, &str); 4] = [
            ("#!/bin/sh\necho it is broken >&2\nexit 3\n", good.as_str(), "it is broken"),
            (crashes_late.as_str(), good.as_str(), "ended at its start"),
            ("", "{ broken", "check failed"),
            ("", &config(json!({ "port": free_port() })), "sockets can be handed over, but not changed"),
        ];
        for (script, text, reason) in expectations {
            if script.is_empty() {
                std::fs::copy(real, served.folder.join("copy")).unwrap();
                std::fs::rename(served.folder.join("copy"), &served.binary).unwrap();
            } else {
                served.install(script);
            }
            write(text);
            let (code, said) = served.upgrade().await;
            assert_eq!(code, 1, "{said}");
            assert!(
                said.contains(&format!("process {pid} keeps serving")) && said.contains(reason),
                "{reason}: {said}"
            );
            let call = client(|builder| builder).post(served.url("/v1/chat/completions")).bearer_auth(KEY);
            Reply::of(call.json(&chat("m"))).await.assert_from("a", 1);
            assert_eq!(served.running().pid, pid);
        }
        write(&good);
        let (code, said) = served.upgrade().await;
        assert!(code == 0 && said.contains("has taken over"), "and then a good one: {said}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_of_nothing_says_so() {
    let folder = folder_with("apis.json", "{}");
    let (code, _, said) = crate::program::run(folder.path(), &["upgrade", "--config", "apis.json"]);
    assert_eq!(code, 1);
    assert!(said.contains("no process runs from") && said.contains("--config"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn systemd_is_told_who_the_main_process_is() {
    within(async {
        let folder =
            folder_with("apis.json", &config_text(json!({}), &[endpoint_with("a", "http://127.0.0.1:9", json!({}))]));
        let path: &Path = &folder.path().join("notify");
        let socket = std::os::unix::net::UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut command = program(folder.path());
        command.args(["--config", "apis.json"]).env("NOTIFY_SOCKET", path);
        let mut running = Running::of(command, folder);
        let told = || {
            let mut bytes = [0; 200];
            let count = socket.recv(&mut bytes).unwrap();
            String::from_utf8(bytes[..count].to_vec()).unwrap()
        };
        assert_eq!(told(), format!("READY=1\nMAINPID={}\n", running.pid()));
        running.signal("TERM");
        assert_eq!(told(), "STOPPING=1\n");
        running.exit().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_hands_over_does_not_tell_systemd_that_the_service_stops() {
    within(async {
        let config =
            config_text(json!({ "port": free_port() }), &[endpoint_with("a", "http://127.0.0.1:9", json!({}))]);
        let folder = folder_with("apis.json", &config);
        let path = folder.path().join("notify");
        let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let binary = folder.path().join("api-together");
        std::fs::copy(env!("CARGO_BIN_EXE_api-together"), &binary).unwrap();
        let served = Served::of(folder, binary, Some(&path)).await;
        let told = || {
            let mut bytes = [0; 200];
            socket.recv(&mut bytes).ok().map(|count| String::from_utf8(bytes[..count].to_vec()).unwrap())
        };
        let ready = |pid: u32| Some(format!("READY=1\nMAINPID={pid}\n"));
        let old = served.running().pid;
        assert_eq!(told(), ready(old));
        let (code, said) = served.upgrade().await;
        assert_eq!(code, 0, "{said}");
        assert_eq!(told(), ready(served.running().pid));
        until("the old process leaves", || is_gone(old)).await;
        socket.set_nonblocking(true).unwrap();
        assert_eq!(told(), None);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_names_somebody_elses_process_is_not_believed() {
    let folder = folder_with("apis.json", "{}");
    let running = folder.path().join("run");
    runtime_folder::make_private(&running).unwrap();
    // A process that would not survive the signal, and is none of ours.
    let mut other = Command::new("sleep").arg("30").spawn().unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", other.id())).unwrap();
    let began: u64 = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
    for (began, reason) in [(1, "no process runs from"), (began, "is not signalled")] {
        let told = json!({ "pid": other.id(), "began": began, "address": "127.0.0.1:1", "version": "0", "tls": false });
        std::fs::write(running.join("running.json"), told.to_string()).unwrap();
        let (code, _, said) = crate::program::run(folder.path(), &["upgrade", "--config", "apis.json"]);
        assert!(code == 1 && said.contains(reason), "{said}");
        assert!(other.try_wait().unwrap().is_none(), "it was signalled");
    }
    other.kill().unwrap();
    other.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_is_no_child_of_its_predecessor_when_it_serves() {
    within(async {
        let api = endpoint_with("a", "http://127.0.0.1:9", json!({}));
        let served = Served::start(&config_text(json!({ "port": free_port() }), &[api])).await;
        let old = served.running().pid;
        let (code, said) = served.upgrade().await;
        assert_eq!(code, 0, "{said}");
        let status = std::fs::read_to_string(format!("/proc/{}/status", served.running().pid)).unwrap();
        let parent: u32 = status.lines().find_map(|line| line.strip_prefix("PPid:\t")).unwrap().parse().unwrap();
        assert_ne!(parent, old, "systemd would take it for somebody else's process");
        assert!(!is_gone(old), "it would have another parent in any case");
        let children = std::fs::read_to_string(format!("/proc/{old}/task/{old}/children")).unwrap();
        assert_eq!(children.trim(), "", "the starter has ended, and is buried");
    })
    .await;
}

/// A program that takes a second to come up as a successor, and says so beside it.
fn slow_successor() -> String {
    let real = env!("CARGO_BIN_EXE_api-together");
    format!("#!/bin/sh\ncase \" $* \" in *' --upgrade '*) touch coming; sleep 1;; esac\nexec {real} \"$@\"\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_whose_predecessor_is_killed_takes_the_address_itself() {
    within(async {
        let simulator = simulator().await;
        let api = endpoint_with("a", &simulator.base_url(), json!({}));
        let served = Served::start(&config_text(json!({ "port": free_port() }), &[api])).await;
        let (old, url) = (served.running().pid, served.url("/v1/chat/completions"));
        served.install(&slow_successor());
        let asked = served.upgrade();
        let kill = async {
            until("the successor is on its way", || served.folder.join("coming").exists()).await;
            Command::new("kill").args(["-KILL", &old.to_string()]).status().unwrap();
        };
        let ((code, said), ()) = tokio::join!(asked, kill);
        assert!(code == 1 && said.contains("has ended meanwhile"), "{said}");
        until("the successor serves", || {
            runtime_folder::Running::read(&served.folder.join("run")).is_some_and(|running| running.pid != old)
        })
        .await;
        Reply::of(client(|builder| builder).post(&url).bearer_auth(KEY).json(&chat("m"))).await.assert_from("a", 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_that_waits_takes_an_address_that_becomes_free() {
    within(async {
        let simulator = simulator().await;
        let api = endpoint_with("a", &simulator.base_url(), json!({}));
        // Somebody who listens, and never hands anything over.
        let holder = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = holder.local_addr().unwrap();
        let folder = folder_with("apis.json", &config_text(json!({ "port": address.port() }), &[api]));
        let path = folder.path().to_owned();
        let starting = spawn_blocking(move || {
            let mut command = program(folder.path());
            command.args(["--upgrade", "--config", "apis.json"]).env("RUST_LOG", "info");
            Running::of(command, folder)
        });
        until("it waits", || path.join("run/upgrade.sock").exists()).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(!path.join("run/running.json").exists(), "it goes on while somebody listens");
        drop(holder);
        let running = starting.await.unwrap();
        running.logs("nobody listens on").await;
        let url = running.url("/v1/chat/completions");
        Reply::of(client(|builder| builder).post(&url).bearer_auth(KEY).json(&chat("m"))).await.assert_from("a", 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_sigterm_ends_it_at_once() {
    within(async {
        let slow = behaving(Behaviour { chunk_delay_ms: 100, events: 300, ..Behaviour::default() }).await;
        let mut running =
            Running::start(&config_text(json!({}), &[endpoint_with("a", &slow.base_url(), json!({}))]), "info");
        running.ready().await;
        let call = client(|builder| builder).post(running.url("/v1/chat/completions")).bearer_auth(KEY);
        let mut stream = call.json(&chat_stream("m")).send().await.unwrap();
        stream.chunk().await.unwrap();
        running.signal("TERM");
        running.logs("shutting down gracefully: 1 requests are open").await;
        running.signal("TERM");
        assert_eq!(running.exit().await.code(), Some(0));
        while let Ok(Some(_)) = stream.chunk().await {}
    })
    .await;
}

/// A process that waits for a second at most, with a stream of nine seconds under way.
async fn with_a_short_patience() -> (Served, reqwest::Response, api_together::simulator::Simulator) {
    let slow = behaving(Behaviour { chunk_delay_ms: 100, events: 90, ..Behaviour::default() }).await;
    let config = config_text(json!({ "port": free_port() }), &[endpoint_with("a", &slow.base_url(), json!({}))]);
    let folder = folder_with("apis.json", &config);
    std::fs::write(folder.path().join("pingora.yaml"), "version: 1\ngrace_period_seconds: 1\n").unwrap();
    let binary = PathBuf::from(env!("CARGO_BIN_EXE_api-together"));
    let served = Served::of(folder, binary, None).await;
    let call = client(|builder| builder).post(served.url("/v1/chat/completions")).bearer_auth(KEY);
    let mut stream = call.json(&chat_stream("m")).send().await.unwrap();
    stream.chunk().await.unwrap();
    (served, stream, slow)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_cuts_off_what_lasts_too_long_and_says_so() {
    within(async {
        let (mut served, mut stream, _simulator) = with_a_short_patience().await;
        let running = &mut served.first;
        running.signal("TERM");
        running.logs("stopping after 1 s: 1 requests are cut off").await;
        assert_eq!(running.exit().await.code(), Some(0));
        running.logs("INFO  stopped").await;
        while let Ok(Some(_)) = stream.chunk().await {}
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_was_replaced_cuts_nothing_off() {
    within(async {
        let (mut served, mut stream, _simulator) = with_a_short_patience().await;
        let (code, said) = served.upgrade().await;
        assert_eq!(code, 0, "{said}");
        let running = &mut served.first;
        running.logs("shutting down gracefully: 1 requests are open").await;
        let mut text = String::new();
        while let Some(chunk) = stream.chunk().await.unwrap() {
            text += std::str::from_utf8(&chunk).unwrap();
        }
        assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
        assert_eq!(running.exit().await.code(), Some(0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_knows_who_has_been_right() {
    within(async {
        let api = endpoint_with("a", "http://127.0.0.1:9", json!({}));
        let config = config_text(json!({ "port": free_port(), "failedKeysPerMinute": 2 }), &[api]);
        let served = Served::start(&config).await;
        let url = served.url("/v1/models");
        // Each on a connection of its own.
        let ask = async |key: &str| Reply::of(client(|builder| builder).get(&url).bearer_auth(key)).await.status;
        assert_eq!(ask(KEY).await, 200);
        let (code, said) = served.upgrade().await;
        assert_eq!(code, 0, "{said}");
        let old = served.first.pid();
        until("the old process leaves", || is_gone(old)).await;
        for number in 0..4 {
            ask(&format!("wrong{number}")).await;
        }
        assert_eq!(ask("wrong4").await, 429);
        assert_eq!(ask(KEY).await, 200);
        assert!(!served.folder.join("run/callers.json").exists());
    })
    .await;
}
