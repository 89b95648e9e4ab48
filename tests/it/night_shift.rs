//! What the log says when something is wrong, and the process as its operator handles it: log files, pid files, folders.

use std::net::TcpListener;
use std::time::Duration;

use api_together::simulator::{Behaviour, ResetAt};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::harness::{
    KEY, Reply, behaving, chat, chat_stream, client, config_text, endpoint, endpoint_with, simulator, until, within,
};
use crate::program::{Running, folder_with, program, run, texts};

/// Starts the program with JSON lines.
fn with_json_lines(server: &Value, apis: &[Value], log: &str) -> Running {
    let mut server = server.clone();
    server["logFormat"] = json!("json");
    Running::start(&config_text(server, apis), log)
}

fn of_line(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))
}

async fn ask(running: &Running, id: &str, body: Value) -> u16 {
    let call = client(|builder| builder).post(running.url("/v1/chat/completions")).bearer_auth(KEY);
    Reply::of(call.header("x-request-id", id).json(&body)).await.status
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_request_is_a_warning_with_its_cause() {
    within(async {
        let (fails, breaks) = (
            behaving(Behaviour::status(503)).await,
            behaving(Behaviour { reset: Some(ResetAt::AfterEvents(3)), ..Behaviour::default() }).await,
        );
        let apis = [
            endpoint_with("fails", &fails.base_url(), json!({ "models": ["f"] })),
            endpoint_with("breaks", &breaks.base_url(), json!({ "models": ["b"] })),
            endpoint_with("closed", "http://127.0.0.1:9/v1", json!({ "models": ["c"] })),
        ];
        let running = with_json_lines(&json!({ "breaker": { "failures": 2 } }), &apis, "info");
        running.ready().await;
        let line = async |id: &str| of_line(&running.logs(&format!("\"id\":\"{id}\"")).await);
        assert_eq!(ask(&running, "failed", chat("f")).await, 503);
        let failed = line("failed").await;
        assert_eq!((&failed["level"], &failed["endpoint"]), (&json!("WARN"), &json!("fails")));
        assert_eq!(failed["cause"], "answered 503 (model_failure by status)");
        assert_eq!(ask(&running, "unreached", chat("c")).await, 502);
        let unreached = line("unreached").await;
        assert_eq!((&unreached["level"], &unreached["fault"]), (&json!("WARN"), &json!("endpoint_unreachable")));
        assert_eq!(unreached["cause"], "could not be connected to");
        let call = client(|builder| builder).post(running.url("/v1/chat/completions")).bearer_auth(KEY);
        let mut stream = call.header("x-request-id", "broken").json(&chat_stream("b")).send().await.unwrap();
        while let Ok(Some(_)) = stream.chunk().await {}
        let broken = line("broken").await;
        assert_eq!((&broken["level"], &broken["fault"]), (&json!("WARN"), &json!("stream_broken")));
        assert_eq!(broken["cause"], "broke off in its answer");
        assert_eq!(ask(&running, "unknown", chat("nobody")).await, 404);
        assert_eq!(line("unknown").await["level"], "INFO", "a client's mistake is none of the operator's");
        // The cool-down says what it is for.
        ask(&running, "again", chat("f")).await;
        let cools = running.logs("cooling down").await;
        assert!(cools.contains("for 600 s; its last error: it answered 503 (model_failure by status)"), "{cools}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_request_names_who_could_not_be_asked_and_why() {
    within(async {
        let good = simulator().await;
        let limits = |retry_after: Option<&str>| {
            let limit = Behaviour::status(429);
            retry_after.map_or(limit.clone(), |seconds| limit.header("retry-after", seconds))
        };
        let (asks, guesses) = (behaving(limits(Some("40"))).await, behaving(limits(None)).await);
        let apis = [
            endpoint_with("full", &good.base_url(), json!({ "rpm": 1, "models": ["m"] })),
            endpoint_with("asks", &asks.base_url(), json!({ "models": ["m"], "priority": 1 })),
            endpoint_with("guesses", &guesses.base_url(), json!({ "models": ["g"] })),
        ];
        // Whatever its clients may know.
        let running = with_json_lines(&json!({ "endpointHeaders": false }), &apis, "info");
        running.ready().await;
        assert_eq!(ask(&running, "first", chat("m")).await, 200);
        assert_eq!(ask(&running, "second", chat("m")).await, 429);
        let rests = running.logs("endpoint asks").await;
        let rests = if rests.contains("rests") { rests } else { running.logs("endpoint asks, model").await };
        assert!(rests.contains("rests for 40.0 s, as it asked; it answered 429"), "{rests}");
        assert_eq!(ask(&running, "third", chat("m")).await, 429);
        let third = of_line(&running.logs("\"id\":\"third\"").await);
        assert_eq!(
            (&third["level"], &third["model"], &third["fault"]),
            (&json!("INFO"), &json!("m"), &json!("limits_reached"))
        );
        let held = third["held"].to_string();
        assert!(
            held.contains("full: 1 request a minute, for ") && held.contains("asks: it asked for a pause, for "),
            "{held}"
        );
        ask(&running, "guessed", chat("g")).await;
        let line = running.logs("rests for 5.0 s").await;
        assert!(line.contains("a guess, since it does not say for how long; it answered 429"), "{line}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_again_and_again_is_not_in_the_log() {
    within(async {
        let running = Running::start(&config_text(json!({}), &[endpoint("a", "http://127.0.0.1:9")]), "debug");
        running.ready().await;
        let client = client(|builder| builder);
        let root = client.get(running.url("/")).header("x-request-id", "root").send().await.unwrap();
        assert_eq!(
            (root.status(), root.headers()["content-type"].to_str().unwrap()),
            (reqwest::StatusCode::OK, "text/plain; charset=utf-8")
        );
        let text = root.text().await.unwrap();
        assert_eq!(text, format!("api-together is running; base URL http://{}/v1\n", running.address));
        let odd = client.get(running.url("/")).header("host", "a<b>").send().await.unwrap();
        let odd = (odd.status().as_u16(), odd.text().await.unwrap());
        assert!(odd.0 == 400 || !odd.1.contains('<'), "{odd:?}");
        for (method, path, status, level) in [
            ("HEAD", "/", 200, "DEBUG"),
            ("GET", "/health", 200, "DEBUG"),
            ("HEAD", "/health", 200, "DEBUG"),
            ("GET", "/health/ready", 200, "DEBUG"),
            ("GET", "/metrics", 200, "DEBUG"),
            ("GET", "/v1/status", 200, "INFO"),
            ("GET", "/nothing", 404, "INFO"),
        ] {
            let id = format!("{method}{}", path.replace('/', "_"));
            let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
            let call = client.request(method, running.url(path)).bearer_auth(KEY).header("x-request-id", &id);
            assert_eq!(Reply::of(call).await.status, status, "{id}");
            let line = running.logs(&format!("id={id} ")).await;
            assert!(line.contains(&format!(" {level} ")), "{line}");
        }
        let metrics = client.get(running.url("/metrics")).header("x-request-id", "no-key");
        assert_eq!(Reply::of(metrics).await.status, 401);
        assert!(running.logs("id=no-key ").await.contains(" INFO "), "a refusal is worth a line");
        assert!(running.logs("id=root ").await.contains(" INFO "));
    })
    .await;
}

#[test]
fn a_mistyped_level_is_told_and_means_info() {
    let folder = folder_with("apis.json", &config_text(json!({}), &[endpoint("a", "https://x.example")]));
    let said = |level: Option<&str>| {
        let mut command = program(folder.path());
        command.args(["-t", "-c", "apis.json"]).envs(level.map(|level| ("LOG_LEVEL", level)));
        texts(&command.output().unwrap()).2
    };
    assert!(said(Some("verbos")).contains("LOG_LEVEL is \"verbos\", which is none of error, warn, info"));
    assert_eq!(said(Some("warn")), "");
    std::fs::write(folder.path().join(".env"), "LOG_LEVEL=loud\n").unwrap();
    assert!(said(None).contains("LOG_LEVEL is \"loud\""), "from .env");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_goes_on_in_a_new_file_after_sigusr1() {
    within(async {
        let simulator = simulator().await;
        let folder = folder_with("apis.json", &config_text(json!({}), &[endpoint("a", &simulator.base_url())]));
        let (log, rotated) = (folder.path().join("log"), folder.path().join("log.1"));
        let file = std::fs::File::create(&log).unwrap();
        let mut command = std::process::Command::new("sh");
        // Its own standard error is the file; the test reads the banner on standard output.
        let binary = env!("CARGO_BIN_EXE_api-together");
        command
            .current_dir(folder.path())
            .args(["-c", &format!("exec '{binary}' -c apis.json 2>>log")])
            .env("RUST_LOG", "info");
        drop(file);
        let running = Running::of(command, folder);
        running.ready().await;
        let read = |path: &std::path::Path| std::fs::read_to_string(path).unwrap_or_default();
        assert_eq!(ask(&running, "before", chat("m")).await, 200);
        until("the line is there", || read(&log).contains("id=before ")).await;
        std::fs::rename(&log, &rotated).unwrap();
        running.signal("USR1");
        until("a new file", || read(&log).contains("SIGUSR1: the log goes on in ")).await;
        assert_eq!(ask(&running, "after", chat("m")).await, 200);
        until("the line is in the new file", || read(&log).contains("id=after ")).await;
        assert!(!read(&rotated).contains("id=after "));
        let plain = Running::start(&config_text(json!({}), &[endpoint("a", &simulator.base_url())]), "info");
        plain.ready().await;
        plain.signal("USR1");
        plain.logs("the log goes to no file").await;
        assert_eq!(ask(&plain, "alive", chat("m")).await, 200);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_in_the_background_has_a_pid_file_and_a_log() {
    within(async {
        let simulator = simulator().await;
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let text = config_text(json!({ "port": port }), &[endpoint("a", &simulator.base_url())]);
        let folder = folder_with("apis.json", &text);
        let path = folder.path().to_owned();
        let commanded = async |arguments: &[&str]| {
            let (path, arguments) = (path.clone(), arguments.iter().map(ToString::to_string).collect::<Vec<_>>());
            spawn_blocking(move || run(&path, &arguments.iter().map(String::as_str).collect::<Vec<_>>())).await.unwrap()
        };
        let (code, out, errors) = commanded(&["-d", "-c", "apis.json"]).await;
        assert_eq!(code, 0, "{errors}");
        let (pid_file, log) = (path.join("run/api-together.pid"), path.join("run/api-together.log"));
        let shown = format!("running in the background; log {}, pid file {}\n", log.display(), pid_file.display());
        assert_eq!(out, shown);
        let pid = || std::fs::read_to_string(&pid_file).unwrap_or_default().trim().to_owned();
        let runs = || std::fs::read_to_string(path.join("run/running.json")).unwrap_or_default();
        until("it serves", || runs().contains(&format!("\"pid\":{},", pid()))).await;
        let first = pid();
        let call =
            client(|builder| builder).post(format!("http://127.0.0.1:{port}/v1/chat/completions")).bearer_auth(KEY);
        assert_eq!(Reply::of(call.json(&chat("m"))).await.status, 200);
        until("its log", || std::fs::read_to_string(&log).unwrap_or_default().contains("request id=")).await;
        // Another in its folder is told whose that is.
        let (code, _, errors) = commanded(&["-d", "-c", "apis.json", "--port", "0"]).await;
        assert!(
            code == 1 && errors.contains("run is the folder of process ") && errors.contains("RUNTIME_DIRECTORY"),
            "{errors}"
        );
        let (code, _, errors) = commanded(&["-c", "apis.json"]).await;
        assert!(
            code == 1 && errors.contains(&format!("process {first} (api-together ")) && errors.contains("does already"),
            "{errors}"
        );

        let (code, out, errors) = commanded(&["upgrade", "-c", "apis.json"]).await;
        assert_eq!(code, 0, "{out}{errors}");
        assert_ne!(pid(), first, "the pid file names the successor");
        until("the first has left", || !std::path::Path::new(&format!("/proc/{first}")).exists()).await;
        assert_ne!(pid(), "", "and goes on to");
        let (code, _, errors) = commanded(&["stop", "-c", "apis.json"]).await;
        assert_eq!(code, 0, "{errors}");
        assert!(!pid_file.exists(), "at its end it removes it");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_of_one_folder_do_not_take_each_others_commands() {
    within(async {
        let text = config_text(json!({}), &[endpoint("a", "http://127.0.0.1:9")]);
        let first = Running::start(&text, "info");
        first.ready().await;
        crate::commands::controlled(first.folder.path()).await;
        let elsewhere = tempfile::tempdir().unwrap();
        let mut command = program(first.folder.path());
        command.args(["-c", "apis.json"]).env("RUST_LOG", "info");
        let second = Running::of(command, elsewhere);
        let line = second.logs("is the folder of process").await;
        assert!(line.contains("WARN") && line.contains(&format!("process {} ", first.pid())), "{line}");
        second.ready().await;
        let path = first.folder.path().to_owned();
        let (code, out, errors) = spawn_blocking(move || run(&path, &["status", "-c", "apis.json"])).await.unwrap();
        assert!(code == 0 && out.contains(&format!("process {}, up", first.pid())), "{out}{errors}");
        // A process of another folder, at the same port.
        let other = folder_with("apis.json", &text);
        let port = first.address.port().to_string();
        let path = other.path().to_owned();
        let (code, _, errors) =
            spawn_blocking(move || run(&path, &["-c", "apis.json", "--port", &port])).await.unwrap();
        assert!(code == 1 && errors.contains("another api-together does already"), "{errors}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_cannot_help_refuses_at_once() {
    within(async {
        let simulator = simulator().await;
        let apis = |more: Value| [endpoint_with("a", &simulator.base_url(), more)];
        let queue = json!({ "queue": { "maxWaitMs": 5000 } });
        let running = Running::start(&config_text(queue.clone(), &apis(json!({ "rpd": 1 }))), "info");
        running.ready().await;
        assert_eq!(ask(&running, "1", chat("m")).await, 200);
        let begun = std::time::Instant::now();
        assert_eq!(ask(&running, "2", chat("m")).await, 429);
        assert!(begun.elapsed() < Duration::from_millis(400), "tomorrow is too late: {:?}", begun.elapsed());
        // Requests in flight end at any time.
        let slow = behaving(Behaviour { header_delay_ms: 700, ..Behaviour::default() }).await;
        let apis = [endpoint_with("a", &slow.base_url(), json!({ "maxConcurrent": 1 }))];
        let running = Running::start(&config_text(queue, &apis), "info");
        running.ready().await;
        let (first, second) = tokio::join!(ask(&running, "3", chat("m")), ask(&running, "4", chat("m")));
        assert_eq!((first, second), (200, 200));
    })
    .await;
}
