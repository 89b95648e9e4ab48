//! The request log of the program, and `api-together log`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use api_together::simulator::Behaviour;
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::commands::controlled;
use crate::harness::{
    KEY, Reply, behaving, chat, chat_stream, client, closed_port, config_text, endpoint, endpoint_with, in_order,
    merged, simulator, until, within,
};
use crate::program::{Running, folder_with, program, run};

const ADA: &str = "sk-ada-51c0f3d9a4b7e862aa";

/// `api-together log` with these arguments, beside a process of this folder or without one.
async fn log(folder: &Path, arguments: &[&str]) -> (i32, String, String) {
    let folder = folder.to_owned();
    let arguments: Vec<String> =
        ["--config", "apis.json", "log"].iter().chain(arguments).map(|argument| (*argument).to_owned()).collect();
    spawn_blocking(move || run(&folder, &arguments.iter().map(String::as_str).collect::<Vec<_>>())).await.unwrap()
}

/// The requests that `log --json` prints, once there are so many.
async fn logged(folder: &Path, arguments: &[&str], count: usize) -> Vec<Value> {
    let arguments: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
    for _ in 0..200 {
        let (code, out, errors) = log(folder, &arguments).await;
        let requests: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        if code == 0 && requests.len() >= count {
            assert_eq!(requests.len(), count, "{out}{errors}");
            return requests;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the log never has {count} requests: {:?}", log(folder, &arguments).await)
}

async fn started(server: Value, apis: &[Value]) -> (Running, PathBuf) {
    let running = Running::start(&config_text(server, apis), "info");
    running.ready().await;
    let folder = running.folder.path().to_owned();
    controlled(&folder).await;
    (running, folder)
}

async fn post(running: &Running, key: &str, body: &Value) -> Reply {
    Reply::of(client(|builder| builder).post(running.url("/v1/chat/completions")).bearer_auth(key).json(body)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_and_every_attempt_is_logged_with_its_reasons() {
    within(async {
        let (a, b) = (behaving(Behaviour { status: 503, ..Behaviour::default() }).await, simulator().await);
        let mut apis = in_order([a.base_url().as_str(), b.base_url().as_str()]);
        apis[0] = merged(apis[0].clone(), json!({ "models": ["m"] }));
        apis[1] = merged(apis[1].clone(), json!({ "models": ["m"], "rpm": 2, "modelMapping": { "m": "vendor/m" } }));
        apis.push(endpoint_with("off", &closed_port(), json!({ "enabled": false })));
        apis.push(endpoint_with("else", &closed_port(), json!({ "models": ["x"] })));
        let keys = json!([{ "name": "ada", "key": ADA }]);
        let (running, folder) = started(json!({ "keys": keys, "breaker": { "failures": 2 } }), &apis).await;
        assert_eq!(post(&running, ADA, &chat("m")).await.attempts(), Some("2"));
        post(&running, KEY, &chat_stream("m")).await;
        // Both are of no use now: one cools down, one is full.
        assert_eq!(post(&running, ADA, &chat("m")).await.status, 503);
        post(&running, "sk-wrong", &chat("m")).await;
        post(&running, KEY, &chat("nope\u{1b}[2J")).await;
        let requests = logged(&folder, &[], 5).await;
        let [first, stream, refused, stranger, unknown] = &requests[..] else { panic!("{requests:?}") };
        assert_eq!((&first["key"], &first["endpoint"], &first["status"]), (&json!("ada"), &json!("b"), &json!(200)));
        assert_eq!((&first["endpointModel"], &first["model"]), (&json!("vendor/m"), &json!("m")), "{first}");
        let [failed, answered] = &first["attempts"].as_array().unwrap()[..] else { panic!("{first}") };
        assert_eq!((&failed["endpoint"], &failed["status"]), (&json!("a"), &json!(503)), "{first}");
        assert_eq!((&failed["outcome"], &failed["trouble"]), (&json!("status_5xx"), &json!("model_failure")));
        assert_eq!((&answered["outcome"], &answered["model"]), (&json!("ok"), &json!("vendor/m")), "{first}");
        assert!(first["totalTokens"].as_u64().unwrap() > 0 && first["firstByteMs"].as_f64().unwrap() > 0.0, "{first}");
        let outside =
            json!([{ "endpoint": "off", "reason": "disabled" }, { "endpoint": "else", "reason": "not_this_model" }]);
        assert_eq!(first["outside"], outside);
        assert_eq!((&stream["stream"], &stream["key"]), (&json!(true), &Value::Null));
        assert!(stream["firstTokenMs"].is_number(), "{stream}");
        // The last of those that cool down is asked all the same, and who was passed over stands beside it.
        let [last] = &refused["attempts"].as_array().unwrap()[..] else { panic!("{refused}") };
        assert_eq!((&last["endpoint"], &refused["status"]), (&json!("a"), &json!(503)), "{refused}");
        let [full] = &last["passedOver"].as_array().unwrap()[..] else { panic!("{refused}") };
        assert_eq!(
            (&full["endpoint"], &full["reason"], &full["words"]),
            (&json!("b"), &json!("rpm"), &json!("2 requests a minute"))
        );
        assert!(full["until"].as_str().unwrap().ends_with('Z'), "{full}");
        assert_eq!(
            (&stranger["status"], &stranger["fault"], &stranger["key"]),
            (&json!(401), &json!("key_wrong"), &Value::Null)
        );
        assert_eq!((&unknown["status"], &unknown["fault"]), (&json!(404), &json!("model_unknown")));
        // As its operator reads it.
        let id = first["id"].as_str().unwrap();
        let (code, out, errors) = log(&folder, &[id]).await;
        for part in [
            "model      m",
            "from       ada 127.0.0.1",
            "1. a for m, after ",
            ": status_5xx 503 (model_failure by status), took ",
            "2. b for vendor/m, after ",
            "no candidate: else (not_this_model)",
        ] {
            assert!(code == 0 && out.contains(part), "{part}: {out}{errors}");
        }
        let (_, out, _) = log(&folder, &[refused["id"].as_str().unwrap()]).await;
        assert!(out.contains("passed over b: 2 requests a minute, until "), "{out}");
        let (_, out, _) = log(&folder, &[unknown["id"].as_str().unwrap()]).await;
        assert!(!out.contains('\u{1b}'), "a client does not steer the terminal: {out:?}");
        let all = log(&folder, &[]).await.1;
        assert!(!all.contains('\u{1b}') && all.lines().count() == 6, "{all:?}");
        let texts = format!("{requests:?}{all}");
        assert!(!texts.contains(KEY) && !texts.contains(ADA) && !texts.contains("sk-wrong"), "{texts}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_looked_for_and_followed() {
    within(async {
        let (a, b) = (behaving(Behaviour { status: 500, ..Behaviour::default() }).await, simulator().await);
        let apis = [
            endpoint_with("a", &a.base_url(), json!({ "models": ["bad"] })),
            endpoint_with("b", &b.base_url(), json!({ "models": ["good", "=good"] })),
        ];
        let keys = json!([{ "name": "ada", "key": ADA }]);
        let (running, folder) = started(json!({ "keys": keys }), &apis).await;
        for (key, model) in [(ADA, "good"), (KEY, "bad"), (ADA, "bad"), (KEY, "=good")] {
            post(&running, key, &chat(model)).await;
        }
        logged(&folder, &[], 4).await;
        for (arguments, count) in [
            (&["--key", "ada"][..], 2),
            (&["--endpoint", "a"], 2),
            (&["--endpoint", "a", "--key", "ada", "--failed"], 1),
            (&["--failed"], 2),
            (&["--status", "5xx"], 2),
            (&["--status", "200"], 2),
            (&["--model", "good"], 1),
            (&["--since", "1h"], 4),
            (&["--until", "1h"], 0),
            (&["-n", "3"], 3),
            (&["-n", "0"], 4),
        ] {
            logged(&folder, arguments, count).await;
        }
        let (code, csv, _) = log(&folder, &["--csv"]).await;
        let lines: Vec<&str> = csv.lines().collect();
        assert!(code == 0 && lines.len() == 5 && lines[0].starts_with("time,id,key,address,"), "{csv}");
        assert!(lines[4].contains(",'=good,"), "no formula: {csv}");
        assert!(lines.iter().all(|line| line.split(',').count() == lines[0].split(',').count()), "{csv}");
        let (code, out, _) = log(&folder, &["--key", "nobody"]).await;
        assert_eq!((code, out.as_str()), (0, "no requests were found\n"));
        let (code, _, errors) = log(&folder, &["no-such-id"]).await;
        assert!(code == 1 && errors.contains("the log has no request no-such-id"), "{errors}");
        for (arguments, why) in [
            (&["--status", "999"][..], "is no status such as 429"),
            (&["--since", "soon"], "is no time ago such as 1h"),
            (&["--session", "xyz"], "is no session"),
            (&["--json", "--csv"], "cannot be used with"),
        ] {
            let (code, _, errors) = log(&folder, arguments).await;
            assert!(code == 2 && errors.contains(why), "{errors}");
        }
        let mut follow = program(&folder);
        follow.args(["--config", "apis.json", "log", "--follow", "--failed", "--json", "-n", "1"]);
        let mut follow = Following(follow.stdout(std::process::Stdio::piped()).spawn().unwrap());
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(follow.0.stdout.take().unwrap()));
        let mut next = || serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).unwrap()["key"].clone();
        assert_eq!(next(), "ada", "the last one before");
        post(&running, ADA, &chat("good")).await;
        post(&running, KEY, &chat("bad")).await;
        assert_eq!(next(), Value::Null);
    })
    .await;
}

/// A command that goes on until it is dropped.
struct Following(std::process::Child);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.kill().unwrap_or_default();
        self.0.wait().map(drop).unwrap_or_default();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_outlives_its_process() {
    within(async {
        let a = simulator().await;
        let text = config_text(json!({}), &[endpoint("a", &a.base_url())]);
        let folder = folder_with("apis.json", &text);
        let path = folder.path().to_owned();
        let (code, _, errors) = log(&path, &[]).await;
        assert!(code == 1 && errors.contains("there is no request log at"), "{errors}");
        let start = |folder| {
            let mut command = program(&path);
            command.args(["--config", "apis.json"]);
            Running::of(command, folder)
        };
        let first = start(folder);
        first.ready().await;
        for _ in 0..3 {
            post(&first, KEY, &chat("m")).await;
        }
        logged(&path, &[], 3).await;
        first.signal("KILL");
        let mut first = first;
        first.exit().await;
        let killed = std::mem::replace(&mut first.folder, tempfile::tempdir().unwrap());
        logged(&path, &[], 3).await;
        let mut second = start(killed);
        second.ready().await;
        post(&second, KEY, &chat("m")).await;
        // What has ended when it stops is written before it is gone.
        second.signal("TERM");
        second.exit().await;
        let requests = logged(&path, &[], 4).await;
        assert_eq!(requests[3]["row"], 4);
        let names: Vec<_> = std::fs::read_dir(path.join("data"))
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        assert!(!names.iter().any(|name| name.contains("corrupt")), "{names:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_kept_for_keys_that_ask_for_it() {
    within(async {
        let a = simulator().await;
        let keys = json!([
            { "name": "ada", "key": ADA, "logBodies": true },
            { "name": "bob", "key": "sk-bob-51c0f3d9a4b7e862aa" },
        ]);
        let (running, folder) = started(json!({ "keys": keys }), &[endpoint("a", &a.base_url())]).await;
        let body = json!({ "model": "m", "stream": true, "messages": [{ "role": "user", "content": "use sk-abcdefghijklmnop1234" }] });
        post(&running, ADA, &body).await;
        post(&running, ADA, &json!({ "model": "m", "messages": [{ "role": "user", "content": "x".repeat(100_000) }] })).await;
        post(&running, "sk-bob-51c0f3d9a4b7e862aa", &body).await;
        let requests = logged(&folder, &[], 3).await;
        let mut bodies = Vec::new();
        for request in &requests {
            let (_, out, _) = log(&folder, &[request["id"].as_str().unwrap(), "--json"]).await;
            let request: Value = serde_json::from_str(&out).unwrap();
            bodies.push((request["requestBody"].clone(), request["answerBody"].clone()));
        }
        let (asked, answered) = (bodies[0].0.as_str().unwrap(), bodies[0].1.as_str().unwrap());
        assert!(asked.contains("sk-…1234") && !asked.contains("abcdefghijklmnop"), "{asked}");
        assert!(answered.starts_with("data: {") && answered.ends_with("data: [DONE]\n\n"), "{answered}");
        assert!(bodies[1].0.as_str().unwrap().ends_with("more bytes are not kept)"));
        assert!(bodies[1].1.as_str().unwrap().contains("\"usage\""));
        assert_eq!(bodies[2], (Value::Null, Value::Null));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_cannot_be_written_reaches_neither_request_nor_ledger() {
    within(async {
        let a = simulator().await;
        let apis = [endpoint_with("a", &a.base_url(), json!({ "rpm": 1000 }))];
        // A folder stands where the file would be; not even root can write it.
        let text = config_text(json!({ "requestLog": { "path": "log" } }), &apis);
        let folder = folder_with("apis.json", &text);
        std::fs::create_dir(folder.path().join("log")).unwrap();
        let mut command = program(folder.path());
        command.args(["--config", "apis.json"]);
        let running = Running::of(command, folder);
        running.ready().await;
        for _ in 0..3 {
            assert_eq!(post(&running, KEY, &chat("m")).await.status, 200);
        }
        running.logs("requests go on, and are not in the request log meanwhile").await;
        let mut status = Value::Null;
        for _ in 0..200 {
            let asked = client(|builder| builder).get(running.url("/v1/status")).bearer_auth(KEY);
            status = Reply::of(asked).await.json();
            if status["requestLog"]["dropped"]["failing"].as_u64().unwrap() > 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        assert_eq!((&status["requestLog"]["state"], &status["ledger"]["state"]), (&json!("failing"), &json!("ok")));
        assert_eq!(status["apis"][0]["usage"]["rpm"], 3, "{status}");
        assert_eq!(status["requestLog"]["dropped"]["failing"], 3, "{status}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_without_room_is_left_to_the_ledger() {
    within(async {
        let a = simulator().await;
        let apis = [endpoint_with("a", &a.base_url(), json!({ "rpm": 1000 }))];
        let text = config_text(json!({ "requestLog": { "path": "small/requests.db" } }), &apis);
        let folder = folder_with("apis.json", &text);
        std::fs::create_dir(folder.path().join("small")).unwrap();
        // A disk of its own, which nobody else sees.
        let mut command = Command::new("unshare");
        let start = "mount -t tmpfs -o size=64m tmpfs small && exec \"$0\" --config apis.json";
        command.args(["--mount", "--map-root-user", "sh", "-c", start, env!("CARGO_BIN_EXE_api-together")]);
        command.current_dir(folder.path()).env("RUST_LOG", "info");
        let running = Running::of(command, folder);
        running.ready().await;
        assert_eq!(post(&running, KEY, &chat("m")).await.status, 200);
        let line = running.logs("its disk has").await;
        assert!(line.contains("it stops below 1024 MiB (5 % or 1 GiB), so that the ledger has room"), "{line}");
        let status = Reply::of(client(|builder| builder).get(running.url("/v1/status")).bearer_auth(KEY)).await.json();
        assert_eq!((&status["ledger"]["state"], &status["requestLog"]["state"]), (&json!("ok"), &json!("failing")));
        assert_eq!(status["apis"][0]["usage"]["rpm"], 1, "{status}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_off_makes_no_file() {
    within(async {
        let a = simulator().await;
        let server = json!({ "requestLog": { "enabled": false } });
        let (running, folder) = started(server, &[endpoint("a", &a.base_url())]).await;
        assert_eq!(post(&running, KEY, &chat("m")).await.status, 200);
        let (code, _, errors) = log(&folder, &[]).await;
        assert!(code == 1 && errors.contains("logs no requests (server.requestLog)"), "{errors}");
        assert!(!folder.join("data/requests.db").exists());
        // What is kept changes while it serves; the file and the switch do not.
        let text = config_text(json!({ "requestLog": { "days": 7 } }), &[endpoint("a", &a.base_url())]);
        std::fs::write(folder.join("apis.json"), text).unwrap();
        let reloaded = spawn_blocking(move || run(&folder, &["--config", "apis.json", "reload"])).await.unwrap();
        assert!(reloaded.1.contains("server.requestLog.path not set → "), "{reloaded:?}");
        drop(running);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_log_is_begun_anew_while_requests_go_on() {
    within(async {
        let a = simulator().await;
        let text = config_text(json!({}), &[endpoint("a", &a.base_url())]);
        let folder = folder_with("apis.json", &text);
        let path = folder.path().to_owned();
        std::fs::create_dir(path.join("data")).unwrap();
        std::fs::write(path.join("data/requests.db"), vec![0xA5; 65_536]).unwrap();
        let mut command = program(&path);
        command.args(["--config", "apis.json"]);
        let running = Running::of(command, folder);
        running.ready().await;
        assert_eq!(post(&running, KEY, &chat("m")).await.status, 200);
        running.logs("the file is corrupt; it was moved to").await;
        post(&running, KEY, &chat("m")).await;
        until("the next one is logged", || {
            run(&path, &["--config", "apis.json", "log", "--json"]).1.contains("\"row\":1")
        })
        .await;
    })
    .await;
}
