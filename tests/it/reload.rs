//! A changed configuration is taken in while requests go on: whole or not at all.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use api_together::simulator::Behaviour;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::spawn_blocking;

use crate::harness::{
    KEY, Reply, behaving, chat, client, config_text, endpoint_with, key_of, simulator, until, within,
};
use crate::program::{Running, folder_with, program, setting};

/// A change is to be noticed within a second; this allows for a busy machine.
const NOTICE_BOUND: Duration = Duration::from_secs(8);
/// How many reloads there are under load: `RELOADS=200` for all that are promised.
const RELOADS: usize = 24;

async fn status(program: &Running) -> Value {
    let request = reqwest_client().get(program.url("/v1/status")).bearer_auth(KEY);
    Reply::of(request).await.json()
}

fn reqwest_client() -> reqwest::Client {
    client(reqwest::ClientBuilder::http1_only)
}

/// Waits until the status page says this of the config.
async fn until_config(program: &Running, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let status = status(program).await;
        if holds(&status["config"]) {
            return status;
        }
        assert!(begun.elapsed() < NOTICE_BOUND, "{what} is never noticed: {}", status["config"]);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn until_version(program: &Running, what: &str, version: u64) -> Value {
    until_config(program, what, |config| config["version"] == version && config["error"].is_null()).await
}

fn write(folder: &TempDir, text: &str) {
    std::fs::write(folder.path().join("apis.json"), text).unwrap();
}

fn api_of<'a>(status: &'a Value, id: &str) -> &'a Value {
    status["apis"].as_array().unwrap().iter().find(|api| api["id"] == id).unwrap_or(&Value::Null)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_file_is_applied_and_a_bad_one_changes_nothing() {
    within(async {
        let simulator = simulator().await;
        let api = |id: &str, more: Value| endpoint_with(id, &simulator.base_url(), more);
        let program = Running::start(&config_text(json!({}), &[api("a", json!({ "rpm": 60 }))]), "info");
        program.ready().await;
        let ask =
            || Reply::of(reqwest_client().post(program.url("/v1/chat/completions")).bearer_auth(KEY).json(&chat("m")));
        ask().await.assert_from("a", 1);
        let first = until_version(&program, "the start", 1).await;
        assert_eq!(first["config"]["needsUpgrade"], json!([]));

        write(&program.folder, &config_text(json!({}), &[api("a", json!({ "rpm": 120 })), api("b", json!({}))]));
        let second = until_version(&program, "a write in place", 2).await;
        assert_eq!(api_of(&second, "a")["limits"]["rpm"], 120);
        assert_eq!(api_of(&second, "a")["usage"]["rpm"], 1, "what was counted stays counted");
        assert_eq!(api_of(&second, "a")["attempts"], 1);
        program.logs("version 2: endpoint a: rpm 60 → 120; endpoint b added").await;

        for (text, place) in [
            (r#"{"server":"#.to_owned(), "apis.json"),
            (config_text(json!({}), &[api("a", json!({ "rpm": -7 }))]), "apis[0].rpm"),
        ] {
            write(&program.folder, &text);
            let status = until_config(&program, "a bad file", |config| {
                config["error"].as_str().is_some_and(|error| error.contains(place))
            })
            .await;
            assert_eq!(status["config"]["version"], 2);
            assert_eq!(api_of(&status, "a")["limits"]["rpm"], 120);
            ask().await;
        }
        program.logs("not applied, version 2 stays").await;

        // Back to what is there already: the error is over, and nothing else has changed.
        write(&program.folder, &config_text(json!({}), &[api("a", json!({ "rpm": 120 })), api("b", json!({}))]));
        until_version(&program, "a good file again", 2).await;
        // By a rename, as editors write.
        std::fs::write(program.folder.path().join("new"), config_text(json!({}), &[api("b", json!({}))])).unwrap();
        std::fs::rename(program.folder.path().join("new"), program.folder.path().join("apis.json")).unwrap();
        let third = until_version(&program, "a rename", 3).await;
        assert!(api_of(&third, "a").is_null());
        ask().await.assert_from("b", 1);
        let log = program.killed();
        assert!(log.contains("endpoint a removed"), "{log}");
        assert!(!log.contains(KEY) && !log.contains(&key_of("a")), "{log}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_swapped_is_named_and_the_rest_is_applied() {
    within(async {
        let simulator = simulator().await;
        let api = endpoint_with("a", &simulator.base_url(), json!({}));
        let program = Running::start(&config_text(json!({}), std::slice::from_ref(&api)), "info");
        program.ready().await;
        let changed = json!({ "port": 1, "threads": 3, "apiKey": "sk-client-another-key", "strategy": "fastest" });
        write(&program.folder, &config_text(changed, &[api]));
        program.logs("not in use yet: server.port 0 → 1 (with a restart); server.threads 1 → 3 (with an upgrade or a restart)").await;
        let request = reqwest_client().get(program.url("/v1/status")).bearer_auth("sk-client-another-key");
        let status = Reply::of(request).await.json();
        assert_eq!(status["strategy"], "fastest");
        assert_eq!(status["config"]["needsUpgrade"], json!(["server.port 0 → 1 (with a restart)", "server.threads 1 → 3 (with an upgrade or a restart)"]));
        assert_eq!(Reply::of(reqwest_client().get(program.url("/v1/status")).bearer_auth(KEY)).await.status, 401);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_reads_everything_anew_and_says_so() {
    within(async {
        let simulator = simulator().await;
        let api = endpoint_with("a", &simulator.base_url(), json!({ "name": "${NAME_OF_IT}" }));
        let folder = folder_with("apis.json", &config_text(json!({}), &[api]));
        std::fs::write(folder.path().join(".env"), "NAME_OF_IT=one\n").unwrap();
        let mut command = program(folder.path());
        command.args(["--config", "apis.json"]).env("RUST_LOG", "info");
        let program = Running::of(command, folder);
        program.ready().await;
        program.signal("HUP");
        program.logs("nothing has changed, version 1").await;
        std::fs::write(program.folder.path().join(".env"), "NAME_OF_IT=two\n").unwrap();
        let status = until_version(&program, "a changed .env", 2).await;
        assert_eq!(api_of(&status, "a")["name"], "two");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swapped_link_is_noticed_as_kubernetes_makes_it() {
    within(async {
        use std::os::unix::fs::symlink;
        let simulator = simulator().await;
        let text =
            |rpm: u64| config_text(json!({}), &[endpoint_with("a", &simulator.base_url(), json!({ "rpm": rpm }))]);
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let version = |name: &str, rpm: u64| {
            std::fs::create_dir(at(name)).unwrap();
            std::fs::write(at(name).join("apis.json"), text(rpm)).unwrap();
        };
        version("..1", 10);
        symlink("..1", at("..data")).unwrap();
        symlink("..data/apis.json", at("apis.json")).unwrap();
        version("..2", 20);
        symlink("..2", at("..tmp")).unwrap();
        let mut command = program(folder.path());
        command.args(["--config", "apis.json"]).env("RUST_LOG", "info");
        let program = Running::of(command, folder);
        program.ready().await;
        until_version(&program, "the start", 1).await;
        std::fs::rename(program.folder.path().join("..tmp"), program.folder.path().join("..data")).unwrap();
        let status = until_version(&program, "a swapped link", 2).await;
        assert_eq!(api_of(&status, "a")["limits"]["rpm"], 20);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_shown_without_a_restart() {
    within(async {
        let simulator = simulator().await;
        let folder = tempfile::tempdir().unwrap();
        let first = certificate(folder.path());
        let tls = json!({ "tls": { "certFile": "cert.pem", "keyFile": "key.pem" } });
        let api = endpoint_with("a", &simulator.base_url(), json!({}));
        std::fs::write(folder.path().join("apis.json"), config_text(tls, &[api])).unwrap();
        let mut command = program(folder.path());
        command.args(["--config", "apis.json"]).env("RUST_LOG", "info");
        let program = Running::of(command, folder);
        program.ready().await;
        let trusts = async |pem: &str| {
            let root = reqwest::Certificate::from_pem(pem.as_bytes()).unwrap();
            let client = client(|builder| builder.tls_certs_only([root]));
            let url = format!("https://localhost:{}/health", program.address.port());
            client.get(url).send().await.is_ok_and(|answer| answer.status() == 200)
        };
        assert!(trusts(&first).await);
        // A key that does not belong to the certificate changes nothing.
        let key = std::fs::read(program.folder.path().join("key.pem")).unwrap();
        let second = certificate(program.folder.path());
        let other_key = std::fs::read(program.folder.path().join("key.pem")).unwrap();
        program.logs("a new certificate is in use").await;
        assert!(trusts(&second).await && !trusts(&first).await);
        std::fs::write(program.folder.path().join("key.pem"), key).unwrap();
        program.logs("does the key in").await;
        assert!(trusts(&second).await);
        std::fs::write(program.folder.path().join("key.pem"), other_key).unwrap();
    })
    .await;
}

/// Writes a certificate for `localhost` and its key; returns the certificate.
fn certificate(folder: &Path) -> String {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(folder.join("key.new"), made.signing_key.serialize_pem()).unwrap();
    std::fs::write(folder.join("cert.pem"), made.cert.pem()).unwrap();
    std::fs::rename(folder.join("key.new"), folder.join("key.pem")).unwrap();
    made.cert.pem()
}

#[tokio::test(flavor = "multi_thread")]
async fn reloads_under_load_fail_no_request_and_lose_no_count() {
    let reloads = setting("RELOADS", RELOADS);
    let simulator = behaving(Behaviour { events: 3, ..Behaviour::default() }).await;
    let text = |rpd: usize| {
        let limits = json!({ "rpd": 1_000_000 + rpd, "rpm": 1_000_000 });
        config_text(json!({}), &[endpoint_with("a", &simulator.base_url(), limits)])
    };
    let program = Arc::new(Running::start(&text(0), "warn"));
    program.ready().await;
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (program, stop, sent) = (Arc::clone(&program), Arc::clone(&stop), Arc::clone(&sent));
        callers.spawn(async move {
            let client = reqwest_client();
            while !stop.load(Ordering::Relaxed) {
                let request = client.post(program.url("/v1/chat/completions")).bearer_auth(KEY).json(&chat("m"));
                Reply::of(request).await.assert_from("a", 1);
                sent.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let (mut used, mut version) = (0, 1);
    let at = |name: &str| program.folder.path().join(name);
    for number in 1..=reloads {
        match number % 4 {
            0 => {
                std::fs::write(at("apis.json"), "{ broken").unwrap();
                until_config(&program, "a broken file", |config| config["error"].is_string()).await;
                continue;
            }
            1 => std::fs::write(at("apis.json"), text(number)).unwrap(),
            2 => {
                std::fs::write(at("new"), text(number)).unwrap();
                std::fs::rename(at("new"), at("apis.json")).unwrap();
            }
            _ => {
                // Two writes in a row, the first of them broken.
                std::fs::write(at("apis.json"), "{ bro").unwrap();
                std::fs::write(at("apis.json"), text(number)).unwrap();
            }
        }
        version += 1;
        let status = until_version(&program, "a reload under load", version).await;
        let api = api_of(&status, "a");
        assert_eq!(api["limits"]["rpd"], 1_000_000 + number);
        let now = api["usage"]["rpd"].as_u64().unwrap();
        assert!(now >= used, "{now} after {used}");
        used = now;
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(caller) = callers.join_next().await {
        caller.unwrap();
    }
    let sent = sent.load(Ordering::Relaxed);
    let status = status(&program).await;
    assert_eq!(api_of(&status, "a")["usage"]["rpd"], sent, "each request is counted once");
    assert!(sent > 100, "{sent}");
    assert_eq!(api_of(&status, "a")["errorCount"], 0);
}

/// Puts something else in a file's place, as a change of name does.
fn put(folder: &TempDir, name: &str, make: impl FnOnce(&Path)) {
    let fresh = folder.path().join("fresh");
    make(&fresh);
    std::fs::rename(&fresh, folder.path().join(name)).unwrap();
}

fn fifo(path: &Path) {
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_file_holds_no_reload_up_and_ends_none() {
    within(async {
        let simulator = simulator().await;
        let text = |more: Value| config_text(json!({}), &[endpoint_with("a", &simulator.base_url(), more)]);
        let program = Running::start(&text(json!({ "rpm": 1 })), "info");
        program.ready().await;
        let folder = &program.folder;
        let until_refused = |why: &'static str| {
            until_config(&program, why, move |config| config["error"].as_str().is_some_and(|error| error.contains(why)))
        };
        put(folder, "apis.json", fifo);
        until_refused("it is no ordinary file").await;
        // A device that never ends, and a file that fits into no memory.
        put(folder, "apis.json", |path| std::os::unix::fs::symlink("/dev/zero", path).unwrap());
        program.signal("HUP");
        until_refused("it is no ordinary file").await;
        put(folder, "apis.json", |path| std::fs::File::create(path).unwrap().set_len(1 << 40).unwrap());
        until_refused("is longer than 16777216 bytes").await;
        put(folder, ".env", fifo);
        let ca = folder.path().join("ca.pem");
        fifo(&ca);
        write(folder, &text(json!({ "rpm": 2, "tls": { "caFile": "ca.pem" } })));
        until_refused("cannot read \"ca.pem\": it is no ordinary file").await;
        write(folder, &text(json!({ "rpm": 3 })));
        let status = until_version(&program, "a good file at last", 2).await;
        assert_eq!(api_of(&status, "a")["limits"]["rpm"], 3);
        program.logs(".env: cannot be read: it is no ordinary file").await;
    })
    .await;
}

fn reload(folder: &Path) -> (i32, String, String) {
    crate::program::run(folder, &["reload", "--config", "apis.json"])
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_says_what_came_of_a_reload() {
    within(async {
        let simulator = simulator().await;
        let api = |more: Value| endpoint_with("a", &simulator.base_url(), more);
        let mut program = Running::start(&config_text(json!({}), &[api(json!({ "rpm": 60 }))]), "info");
        program.ready().await;
        let folder = program.folder.path().to_owned();
        let socket = folder.join("run/control.sock");
        until("it listens for commands", || socket.exists()).await;
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        let ask = || {
            let folder = folder.clone();
            async move { spawn_blocking(move || reload(&folder)).await.unwrap() }
        };

        let (code, out, err) = ask().await;
        assert!(code == 0 && out.contains("nothing has changed, version 1"), "{code} {out} {err}");
        write(&program.folder, &config_text(json!({ "port": 1 }), &[api(json!({ "rpm": 120 }))]));
        let (code, out, err) = ask().await;
        // The file watch may have been quicker than the command.
        assert!(
            code == 0
                && out.contains("version 2")
                && out.contains("not in use yet: server.port")
                && out.contains("(with a restart)"),
            "{out} {err}"
        );
        write(&program.folder, r#"{"server":"#);
        let (code, out, err) = ask().await;
        assert!(
            code == 1 && out.is_empty() && err.contains("not applied, version 2 stays") && err.contains("apis.json"),
            "{out} {err}"
        );
        let (code, _, again) = ask().await;
        assert!(code == 1 && again == err, "an error is shown each time: {again}");
        std::fs::remove_file(folder.join("apis.json")).unwrap();
        let (code, _, err) = ask().await;
        assert!(code == 1 && err.contains("No such file"), "{err}");
        assert!(!out.contains(KEY) && !err.contains(KEY));

        program.signal("KILL");
        program.exit().await;
        let (code, _, err) = ask().await;
        assert!(code == 1 && err.contains("no process runs from"), "{err}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_command_is_refused_and_holds_nothing_up() {
    within(async {
        let simulator = simulator().await;
        let program =
            Running::start(&config_text(json!({}), &[endpoint_with("a", &simulator.base_url(), json!({}))]), "info");
        program.ready().await;
        let socket = program.folder.path().join("run/control.sock");
        until("it listens for commands", || socket.exists()).await;
        let long = format!("{{\"command\":\"{}\"}}\n", "x".repeat(10_000));
        for text in ["\n", "reload\n", "{\"command\":\"eat\"}\n", "[]\n", "\u{0}\n", long.as_str()] {
            let mut stream = UnixStream::connect(&socket).unwrap();
            // It may have closed before it has read all of it.
            stream.write_all(text.as_bytes()).unwrap_or_default();
            let mut reply = String::new();
            stream.read_to_string(&mut reply).unwrap_or_default();
            assert!(
                reply.is_empty() && text.len() > 4096
                    || reply.starts_with(r#"{"ok":false,"message":"the running process does not know"#),
                "{text:.40}: {reply}"
            );
        }
        // Seven that say nothing leave room for one that does.
        let silent: Vec<_> = (0..7).map(|_| UnixStream::connect(&socket).unwrap()).collect();
        let folder = program.folder.path().to_owned();
        let (code, out, err) = spawn_blocking(move || reload(&folder)).await.unwrap();
        assert_eq!(code, 0, "{out} {err}");
        drop(silent);
    })
    .await;
}
