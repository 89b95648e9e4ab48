//! The ledger beneath the running program: what it keeps, and what happens when it cannot be written.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rusqlite::Connection;
use serde_json::{Value, json};

use crate::harness::{
    KEY, Proxy, Reply, behaving, chat, client, config_text, endpoint, endpoint_with, simulator, within,
};
use crate::program::{Running, folder_with, program, run};
use api_together::simulator::Behaviour;

/// The program over one endpoint `a` with limits and, if wanted, one `b` without.
fn text(url: &str, server: Value, with_unlimited: bool) -> String {
    let mut apis = vec![endpoint_with("a", url, json!({ "rpm": 50, "rpd": 60 }))];
    if with_unlimited {
        apis.push(endpoint_with("b", url, json!({ "priority": 1 })));
    }
    config_text(server, &apis)
}

async fn ask(running: &Running) -> Reply {
    let call = client(|builder| builder).post(running.url("/v1/chat/completions")).bearer_auth(KEY);
    Reply::of(call.json(&chat("m"))).await
}

async fn get(running: &Running, path: &str) -> Value {
    Reply::of(client(|builder| builder).get(running.url(path)).bearer_auth(KEY)).await.json()
}

async fn ledger_state(running: &Running) -> Value {
    get(running, "/v1/status").await["ledger"].clone()
}

async fn until_state(running: &Running, state: &str) -> Value {
    for _ in 0..2000 {
        let ledger = ledger_state(running).await;
        if ledger["state"] == state {
            return ledger;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the ledger is never {state}: {}", ledger_state(running).await);
}

fn ledger_of(running: &Running) -> std::path::PathBuf {
    running.folder.path().join("data/ledger.db")
}

#[tokio::test(flavor = "multi_thread")]
async fn counts_outlive_the_process_and_the_file_is_private() {
    within(async {
        let simulator = simulator().await;
        let folder = folder_with("apis.json", &text(&simulator.base_url(), json!({}), true));
        let start = || {
            let mut command = program(folder.path());
            command.args(["--config", "apis.json"]).env("RUST_LOG", "info");
            Running::of(command, tempfile::tempdir().unwrap())
        };
        let mut first = start();
        for _ in 0..3 {
            ask(&first).await.assert_from("a", 1);
        }
        let mode = |path: &str| folder.path().join(path).metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("data"), mode("data/ledger.db"), mode("data/ledger.db-wal")), (0o700, 0o600, 0o600));
        first.signal("TERM");
        assert!(first.exit().await.success());
        let second = start();
        ask(&second).await.assert_from("a", 1);
        let status = get(&second, "/v1/status").await;
        assert_eq!(status["apis"][0]["usage"]["rpm"], 4, "{status}");
        assert_eq!(status["apis"][0]["quota"]["rpd"]["left"], 56);
        assert_eq!(status["ledger"]["state"], "ok");
        let tokens = get(&second, "/v1/token/stats").await;
        assert_eq!(tokens["detailedStats"]["a"]["requests"], 4, "{tokens}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_behind_is_written_before_the_process_leaves() {
    within(async {
        let simulator = simulator().await;
        let text = config_text(json!({}), &[endpoint("a", &simulator.base_url())]);
        let mut running = Running::start(&text, "info");
        for _ in 0..5 {
            ask(&running).await.assert_from("a", 1);
        }
        running.signal("TERM");
        assert!(running.exit().await.success());
        let ledger = Connection::open(ledger_of(&running)).unwrap();
        let number = |sql: &str| ledger.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
        assert_eq!(number("SELECT attempts FROM day WHERE endpoint = 'a'"), 5);
        assert_eq!(number("SELECT requests FROM token_total WHERE endpoint = 'a'"), 5);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_file_is_moved_aside_and_loudly() {
    within(async {
        let simulator = simulator().await;
        for garbage in [&b"this is no database"[..], &[0xA5; 8192]] {
            let folder = folder_with("apis.json", &text(&simulator.base_url(), json!({}), true));
            std::fs::create_dir(folder.path().join("data")).unwrap();
            std::fs::write(folder.path().join("data/ledger.db"), garbage).unwrap();
            let mut command = program(folder.path());
            command.args(["--config", "apis.json"]).env("RUST_LOG", "info");
            let running = Running::of(command, tempfile::tempdir().unwrap());
            running.logs("THE FILE IS CORRUPT").await;
            // What was sent in the last minute is not known, so the endpoint with a limit by the minute waits.
            ask(&running).await.assert_from("b", 1);
            let status = get(&running, "/v1/status").await;
            assert_eq!(status["apis"][0]["heldBy"], "the last minute's requests are not known", "{status}");
            let files = std::fs::read_dir(folder.path().join("data")).unwrap();
            let names: Vec<_> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
            let aside =
                names.iter().find(|name| name.starts_with("ledger.db.corrupt-")).unwrap_or_else(|| panic!("{names:?}"));
            assert_eq!(std::fs::read(folder.path().join("data").join(aside)).unwrap(), garbage, "it is kept as it was");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_becomes_corrupt_while_in_use_is_moved_aside_too() {
    within(async {
        let simulator = simulator().await;
        let running = Running::start(&text(&simulator.base_url(), json!({}), true), "info");
        ask(&running).await.assert_from("a", 1);
        let path = ledger_of(&running);
        // Somebody else writes, so that what is cached counts no longer, and then both files are garbage.
        let other = Connection::open(&path).unwrap();
        other.execute("INSERT INTO meta VALUES ('test', NULL)", []).unwrap();
        for file in [path.clone(), path.with_file_name("ledger.db-wal")] {
            let bytes = std::fs::metadata(&file).unwrap().len();
            std::fs::write(&file, vec![0xA5; usize::try_from(bytes).unwrap()]).unwrap();
        }
        ask(&running).await.assert_from("b", 1);
        running.logs("THE FILE IS CORRUPT").await;
        ask(&running).await.assert_from("b", 1);
        assert_eq!(until_state(&running, "ok").await["error"], Value::Null);
    })
    .await;
}

/// Holds the ledger's lock as another program would.
fn hold(path: &Path) -> Connection {
    let holder = Connection::open(path).unwrap();
    holder.busy_timeout(Duration::from_secs(5)).unwrap();
    holder.execute_batch("BEGIN IMMEDIATE").unwrap();
    holder
}

#[tokio::test(flavor = "multi_thread")]
async fn while_another_program_holds_it_limited_endpoints_are_passed_over() {
    within(async {
        let simulator = simulator().await;
        let running = Running::start(&text(&simulator.base_url(), json!({}), true), "info");
        ask(&running).await.assert_from("a", 1);
        let holder = hold(&ledger_of(&running));
        ask(&running).await.assert_from("b", 1);
        let error = running.logs("endpoints with limits take no requests until it works again").await;
        assert!(error.contains("ERROR") && error.contains("another program holds it"), "{error}");
        let state = ledger_state(&running).await;
        assert_eq!((&state["state"], &state["onError"]), (&json!("failing"), &json!("deny")), "{state}");
        assert!(state["error"].as_str().unwrap().contains("ledger.db") && state["failingSince"].is_string(), "{state}");
        assert_eq!(get(&running, "/v1/status").await["apis"][0]["available"], false);
        holder.execute_batch("ROLLBACK").unwrap();
        until_state(&running, "ok").await;
        running.logs("works again after").await;
        ask(&running).await.assert_from("a", 1);
        assert_eq!(get(&running, "/v1/status").await["apis"][0]["usage"]["rpm"], 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_anybody_else_the_client_is_told_that_the_ledger_fails() {
    within(async {
        let simulator = simulator().await;
        let running = Running::start(&text(&simulator.base_url(), json!({}), false), "info");
        ask(&running).await.assert_from("a", 1);
        assert_eq!(get(&running, "/v1/token/stats").await["summary"]["totalRequests"], 1);
        let holder = hold(&ledger_of(&running));
        let reply = ask(&running).await;
        let message = reply.assert_error(503, "server_error", "ledger_unavailable");
        assert!(message.contains("/v1/status"), "{message}");
        assert_eq!(reply.header("retry-after"), Some("5"));
        assert_eq!(simulator.requests().len(), 1, "nothing was sent");
        // Reading goes on meanwhile.
        let stats = get(&running, "/v1/token/stats").await;
        assert_eq!(stats["summary"]["totalRequests"], 1, "{stats}");
        let reset = client(|builder| builder).post(running.url("/v1/token/reset")).bearer_auth(KEY);
        Reply::of(reset).await.assert_error(503, "server_error", "ledger_unavailable");
        drop(holder);
        until_state(&running, "ok").await;
        ask(&running).await.assert_from("a", 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_allow_attempts_go_on_and_are_counted_afterwards() {
    within(async {
        let simulator = simulator().await;
        let text = text(&simulator.base_url(), json!({ "ledgerOnError": "allow" }), true);
        let running = Running::start(&text, "info");
        ask(&running).await.assert_from("a", 1);
        let holder = hold(&ledger_of(&running));
        for _ in 0..3 {
            ask(&running).await.assert_from("a", 1);
        }
        running.logs("go on WITHOUT PERMITS").await;
        assert_eq!(ledger_state(&running).await["uncounted"], 3);
        drop(holder);
        until_state(&running, "ok").await;
        ask(&running).await.assert_from("a", 1);
        for _ in 0..1000 {
            if get(&running, "/v1/status").await["apis"][0]["usage"]["rpd"] == 5 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("not all are counted: {}", get(&running, "/v1/status").await);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_and_gone_as_soon_as_there_is_room() {
    within(async {
        let simulator = simulator().await;
        let folder = folder_with("apis.json", &text(&simulator.base_url(), json!({}), true));
        // A disk that is full for this process: no file of its may grow. The signal that says so is ignored, as systemd does.
        let mut command = Command::new("sh");
        let binary = env!("CARGO_BIN_EXE_api-together");
        command.args(["-c", &format!("trap '' XFSZ; exec '{binary}' --config apis.json")]);
        command.current_dir(folder.path()).env("RUST_LOG", "info").env_remove("PORT");
        let running = Running::of(command, tempfile::tempdir().unwrap());
        ask(&running).await.assert_from("a", 1);
        let limit = |bytes: &str| {
            let pid = running.pid().to_string();
            let done =
                Command::new("prlimit").args(["--pid", &pid, &format!("--fsize={bytes}:unlimited")]).status().unwrap();
            assert!(done.success());
        };
        limit("1024");
        ask(&running).await.assert_from("b", 1);
        running.logs("endpoints with limits take no requests until it works again").await;
        assert_eq!(ledger_state(&running).await["state"], "failing");
        limit("unlimited");
        until_state(&running, "ok").await;
        ask(&running).await.assert_from("a", 1);
        assert_eq!(get(&running, "/v1/status").await["apis"][0]["usage"]["rpm"], 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_cannot_be_written_is_told_at_the_start_and_the_rest_serves() {
    within(async {
        let simulator = simulator().await;
        // Not even root can make anything there.
        let text = text(&simulator.base_url(), json!({ "ledger": "/proc/api-together/ledger.db" }), true);
        let running = Running::start(&text, "info");
        let error = running.logs("/proc/api-together/ledger.db").await;
        assert!(error.contains("ERROR"), "{error}");
        ask(&running).await.assert_from("b", 1);
        assert_eq!(ledger_state(&running).await["state"], "failing");
        // Whoever only asks whether all is well is told that it is not.
        let (code, _, errors) = run(running.folder.path(), &["-t", "--config", "apis.json"]);
        assert!(code == 1 && errors.contains("/proc/api-together/ledger.db"), "{code}: {errors}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_deleted_under_it_is_missed() {
    within(async {
        let simulator = simulator().await;
        let running = Running::start(&text(&simulator.base_url(), json!({}), true), "info");
        ask(&running).await.assert_from("a", 1);
        let path = ledger_of(&running);
        std::fs::remove_file(&path).unwrap();
        for ending in ["-wal", "-shm"] {
            std::fs::remove_file(path.with_file_name(format!("ledger.db{ending}"))).unwrap();
        }
        tokio::time::sleep(Duration::from_millis(1100)).await;
        ask(&running).await.assert_from("b", 1);
        running.logs("THE FILE WAS DELETED OR REPLACED").await;
        assert!(path.exists(), "a new one was made");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_another_program_or_of_a_newer_version_is_left_alone() {
    within(async {
        let simulator = simulator().await;
        for (sql, told) in [
            ("CREATE TABLE songs (name TEXT)", "is another program's database"),
            (
                "PRAGMA application_id = 1634759783; PRAGMA user_version = 99; CREATE TABLE x (y)",
                "has schema version 99",
            ),
        ] {
            let folder = folder_with("apis.json", &text(&simulator.base_url(), json!({}), true));
            std::fs::create_dir(folder.path().join("data")).unwrap();
            let path = folder.path().join("data/ledger.db");
            Connection::open(&path).unwrap().execute_batch(sql).unwrap();
            let mut command = program(folder.path());
            command.args(["--config", "apis.json"]).env("RUST_LOG", "info");
            let running = Running::of(command, tempfile::tempdir().unwrap());
            running.logs(told).await;
            ask(&running).await.assert_from("b", 1);
            let tables = "SELECT count(*) FROM sqlite_schema WHERE name IN ('minute', 'day')";
            let ours: i64 = Connection::open(&path).unwrap().query_row(tables, [], |row| row.get(0)).unwrap();
            assert_eq!(ours, 0, "nothing was written to it");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn token_statistics_have_the_keys_they_had() {
    within(async {
        let simulator = simulator().await;
        let apis = [
            endpoint_with("a", &simulator.base_url(), json!({ "models": ["m"], "modelMapping": { "n": "m2" } })),
            endpoint_with("b", &simulator.base_url(), json!({ "models": ["only-b"] })),
        ];
        let proxy = Proxy::start(json!({ "timezone": "Asia/Kolkata" }), &apis).await;
        let empty = proxy.get("/v1/token/stats").await.json();
        assert_eq!((&empty["summary"]["totalTokens"], &empty["detailedStats"]), (&json!(0), &json!({})));
        let mut sum = 0;
        for model in ["m", "m", "n", "only-b"] {
            let usage = proxy.chat(model).await.json()["usage"].clone();
            sum += usage["total_tokens"].as_u64().unwrap();
        }
        // And one that is streamed and says its usage.
        let stream = json!({
            "model": "m", "stream": true, "stream_options": { "include_usage": true },
            "messages": [{ "role": "user", "content": "one two three" }],
        });
        let streamed = proxy.post("/v1/chat/completions", &stream).await;
        assert!(streamed.text().contains("[DONE]"));
        sum += sum / 4;
        let stats = proxy.get("/v1/token/stats").await.json();
        let summary = &stats["summary"];
        assert_eq!(summary["totalTokens"], sum, "{stats}");
        assert_eq!(summary["totalRequests"], 5);
        assert_eq!(summary["averageTokensPerRequest"], sum / 5);
        assert_eq!(summary["activeApis"], 2);
        assert_eq!((&summary["currentHourTokens"], &summary["currentDayTokens"]), (&json!(sum), &json!(sum)));
        let (prompt, completion) = (&summary["totalPromptTokens"], &summary["totalCompletionTokens"]);
        assert_eq!(prompt.as_u64().unwrap() + completion.as_u64().unwrap(), sum);
        let a = &stats["detailedStats"]["a"];
        assert_eq!((&a["requests"], &a["totalTokens"]), (&json!(4), &json!(sum / 5 * 4)));
        assert_eq!((&a["hourlyTotal"], &a["dailyTotal"]), (&a["totalTokens"], &a["totalTokens"]));
        assert_eq!(a["models"]["m"]["requests"], 3);
        assert_eq!(a["models"]["m2"]["requests"], 1, "by the name that the endpoint was asked for");
        let (hours, days) = (a["hourlyStats"].as_object().unwrap(), a["dailyStats"].as_object().unwrap());
        assert_eq!((hours.len(), days.len()), (1, 1), "{a}");
        let (hour, day) = (hours.keys().next().unwrap(), days.keys().next().unwrap());
        // Hours and days of Kolkata begin at half past by UTC.
        assert!(hour.ends_with(":30:00.000Z") && day.ends_with("T18:30:00.000Z"), "{hour} {day}");
        assert!(a["lastUsed"].as_str().unwrap().parse::<jiff::Timestamp>().is_ok());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn token_statistics_are_reset_for_one_or_for_all() {
    within(async {
        let simulator = simulator().await;
        let apis = ["a", "b"].map(|id| endpoint_with(id, &simulator.base_url(), json!({ "models": [id], "rpm": 9 })));
        let proxy = Proxy::start(json!({}), &apis).await;
        for model in ["a", "b"] {
            proxy.chat(model).await.assert_from(model, 1);
        }
        let counted = async || {
            let stats = proxy.get("/v1/token/stats").await.json();
            stats["detailedStats"].as_object().unwrap().keys().cloned().collect::<Vec<_>>()
        };
        assert_eq!(counted().await, ["a", "b"]);
        let unknown = proxy.post("/v1/token/reset", &json!({ "apiId": "nobody" })).await;
        let message = unknown.assert_error(404, "invalid_request_error", "api_not_found");
        assert!(message.contains("`nobody`"), "{message}");
        for bad in ["[]", "{\"apiId\":7}", "{\"api\":\"a\"}", "{"] {
            let reply = proxy.post_text("/v1/token/reset", bad).await;
            reply.assert_error(400, "invalid_request_error", None);
        }
        assert_eq!(counted().await, ["a", "b"], "nothing of that reset anything");
        let reply = proxy.post("/v1/token/reset", &json!({ "apiId": "a" })).await;
        assert_eq!((reply.status, &reply.json()["success"]), (200, &json!(true)));
        assert_eq!(counted().await, ["b"]);
        assert_eq!(proxy.post_text("/v1/token/reset", "").await.status, 200);
        assert_eq!(counted().await, [""; 0]);
        assert_eq!(proxy.status_of("a").await["usage"]["rpm"], 1, "limits go on");
        let wrong = proxy.get("/v1/token/reset").await;
        wrong.assert_error(405, "invalid_request_error", "method_not_supported");
        let without_key = Reply::of(proxy.request_without_key(http::Method::POST, "/v1/token/reset")).await;
        assert_eq!(without_key.status, 401);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_in_the_middle_of_a_stream_is_billed_for_what_was_said() {
    within(async {
        let usage = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":1}}\n\n";
        let body = usage.repeat(50);
        let behaviour = Behaviour {
            body: Some(body),
            content_type: Some("text/event-stream".into()),
            chunk_delay_ms: 50,
            ..Behaviour::default()
        };
        let simulator = behaving(behaviour).await;
        let proxy = Proxy::start(json!({}), &[endpoint("a", &simulator.base_url())]).await;
        let mut stream = proxy.open_stream("m").await;
        assert!(stream.chunk().await.unwrap().is_some());
        drop(stream);
        for _ in 0..200 {
            let stats = proxy.get("/v1/token/stats").await.json();
            if stats["summary"]["totalRequests"] == 1 {
                assert_eq!(stats["detailedStats"]["a"]["totalTokens"], 4, "{stats}");
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("its tokens are never counted");
    })
    .await;
}
