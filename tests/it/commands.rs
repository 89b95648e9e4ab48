//! The command line: the config that is meant, and commands that reach the running process.

use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;

use api_together::simulator::{Behaviour, StallAt};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::harness::{
    KEY, Reply, behaving, chat, chat_stream, client, config_text, endpoint, endpoint_with, simulator, until, within,
};
use crate::program::{Running, folder_with, program, run, texts};

/// Runs a command while this test's own endpoints go on.
async fn command(folder: &Path, arguments: &[&str]) -> (i32, String, String) {
    let folder = folder.to_owned();
    let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    spawn_blocking(move || run(&folder, &arguments.iter().map(String::as_str).collect::<Vec<_>>())).await.unwrap()
}

pub(crate) async fn controlled(folder: &Path) {
    let socket: PathBuf = folder.join("run/control.sock");
    until("it listens for commands", || socket.exists()).await;
}

/// A process's folder, and a stream that it has begun.
async fn streaming(running: &Running) -> (PathBuf, reqwest::Response) {
    running.ready().await;
    let folder = running.folder.path().to_owned();
    controlled(&folder).await;
    let call = client(|builder| builder).post(running.url("/v1/chat/completions")).bearer_auth(KEY);
    let mut stream = call.json(&chat_stream("m")).send().await.unwrap();
    stream.chunk().await.unwrap().unwrap();
    (folder, stream)
}

#[test]
fn every_command_means_the_same_config() {
    let good = config_text(json!({}), &[endpoint("a", "https://api.example.com")]);
    let folder = tempfile::tempdir().unwrap();
    let conf = folder.path().join("conf");
    std::fs::create_dir(&conf).unwrap();
    std::fs::write(conf.join("apis.yml"), &good).unwrap();
    assert_eq!(run(folder.path(), &["check"]), (0, "conf/apis.yml: ok\n".into(), String::new()));
    let (code, out, _) = run(folder.path(), &["-t"]);
    assert_eq!((code, out.as_str()), (0, "conf/apis.yml: ok\nwould listen on 127.0.0.1:0\n"));

    std::fs::write(conf.join("apis.json"), &good).unwrap();
    let warning = "conf/apis.yml is not read, since conf/apis.json is there too; remove one, or name one with --config";
    let (code, out, errors) = run(folder.path(), &["check"]);
    assert_eq!((code, out.as_str(), errors), (0, "conf/apis.json: ok\n", format!("warning: {warning}\n")));
    let (code, out, errors) = run(folder.path(), &["-t"]);
    assert!(code == 0 && out.starts_with("conf/apis.json: ok\n") && errors.contains(warning), "{out}{errors}");

    std::fs::write(folder.path().join("mine.json"), &good).unwrap();
    for arguments in [
        &["check", "mine.json"][..],
        &["check", "-c", "mine.json"],
        &["-c", "mine.json", "check"],
        &["--config=mine.json", "check"],
        &["-c", "mine.json", "-t"],
        &["run", "-t", "-c", "mine.json"],
    ] {
        let (code, out, errors) = run(folder.path(), arguments);
        assert!(code == 0 && out.starts_with("mine.json: ok\n"), "{arguments:?}: {out}{errors}");
    }
    let by_variable = |arguments: &[&str]| {
        texts(&program(folder.path()).args(arguments).env("API_TOGETHER_CONFIG", "mine.json").output().unwrap())
    };
    assert_eq!(by_variable(&["check"]).1, "mine.json: ok\n");
    assert_eq!(by_variable(&["check", "conf/apis.yml"]).1, "conf/apis.yml: ok\n", "what is named wins");
    for command in ["status", "models", "reload", "stop", "upgrade"] {
        let (code, _, errors) = run(folder.path(), &[command, "-c", "elsewhere/apis.json"]);
        assert!(code == 1 && errors.contains("elsewhere/run; "), "not the packaged service's: {command}: {errors}");
    }
}

#[test]
fn a_file_in_the_place_of_another_is_refused_by_name() {
    let folder = folder_with("apis.json", &config_text(json!({}), &[endpoint("a", "https://api.example.com")]));
    std::fs::write(folder.path().join("pingora.yaml"), "version: 1\ngrace_period_seconds: 5\n").unwrap();
    let refused = |arguments: &[&str]| {
        let (code, out, errors) = run(folder.path(), arguments);
        assert_eq!((code, out.as_str()), (1, ""), "{arguments:?}");
        errors
    };
    let errors = refused(&["-t", "-c", "apis.json", "--conf", "apis.json"]);
    assert!(
        errors.contains("apis.json: this is the config of api-together") && errors.contains("--config"),
        "{errors}"
    );
    for arguments in [&["-t", "-c", "pingora.yaml"][..], &["check", "pingora.yaml"]] {
        let errors = refused(arguments);
        assert!(errors.contains("pingora.yaml: is a server conf of Pingora") && errors.contains("--conf "), "{errors}");
    }
    std::fs::write(folder.path().join("typo.yaml"), "grace_period_second: 5\n").unwrap();
    let errors = refused(&["-t", "-c", "apis.json", "--conf", "typo.yaml"]);
    assert!(errors.contains("typo.yaml") && errors.contains("did you mean `grace_period_seconds`?"), "{errors}");
    let (code, ..) = run(folder.path(), &["-t", "-c", "apis.json", "--conf", "pingora.yaml"]);
    assert_eq!(code, 0);
}

#[test]
fn flags_that_make_no_sense_are_usage_errors() {
    let folder = tempfile::tempdir().unwrap();
    for (arguments, says) in [
        (&["-d", "check"][..], "api-together run --daemon"),
        (&["--port", "1", "status"], "stand behind it"),
        (&["check", "-c", "a", "b"], "named twice"),
        (&["--port", "70000"], "70000"),
    ] {
        let (code, out, errors) = run(folder.path(), arguments);
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}");
        assert!(errors.contains(says), "{errors}");
    }
}

#[test]
fn host_and_port_come_from_flags_then_variables_then_the_file() {
    let text = config_text(json!({ "port": 1001 }), &[endpoint("a", "https://api.example.com")]);
    let folder = folder_with("apis.json", &text);
    let listens = |arguments: &[&str], variables: &[(&str, &str)]| {
        let mut command = program(folder.path());
        command.args(["-t", "-c", "apis.json"]).args(arguments).envs(variables.iter().copied());
        let (code, out, errors) = texts(&command.output().unwrap());
        assert_eq!(code, 0, "{errors}");
        out.lines().last().unwrap().strip_prefix("would listen on ").unwrap().to_owned()
    };
    let old = ("PORT", "1002");
    let ours = [old, ("API_TOGETHER_PORT", "1003"), ("API_TOGETHER_HOST", "127.0.0.2")];
    assert_eq!(listens(&[], &[]), "127.0.0.1:1001");
    assert_eq!(listens(&[], &[old]), "127.0.0.1:1002");
    assert_eq!(listens(&[], &ours), "127.0.0.2:1003");
    assert_eq!(listens(&["--port", "1004"], &ours), "127.0.0.2:1004");
    assert_eq!(listens(&["--host", "::1", "--port", "0"], &ours), "[::1]:0");
    std::fs::write(folder.path().join(".env"), "API_TOGETHER_HOST=127.0.0.3\nPORT=1005\n").unwrap();
    assert_eq!(listens(&[], &[]), "127.0.0.3:1005");
    let mut command = program(folder.path());
    let command = command.args(["-t", "-c", "apis.json", "--host", "nowhere"]).env("API_TOGETHER_PORT", "x");
    let (code, _, errors) = texts(&command.output().unwrap());
    assert_eq!(code, 1);
    assert!(errors.contains("--host is \"nowhere\", not an IP address"), "{errors}");
    assert!(errors.contains("API_TOGETHER_PORT from the environment is \"x\""), "{errors}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_of_the_command_line_stays_over_a_reload_and_an_upgrade() {
    within(async {
        let simulator = simulator().await;
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
        let text = config_text(json!({ "port": 1 }), &[endpoint("a", &simulator.base_url())]);
        let folder = folder_with("apis.json", &text);
        let mut start = program(folder.path());
        start.args(["-c", "apis.json", "--port", &free]).env("RUST_LOG", "info");
        let running = Running::of(start, folder);
        running.ready().await;
        let folder = running.folder.path();
        controlled(folder).await;
        let (code, out, errors) = command(folder, &["reload", "-c", "apis.json"]).await;
        assert!(code == 0 && out.contains("nothing has changed"), "{out}{errors}");
        let (code, out, errors) = command(folder, &["upgrade", "-c", "apis.json"]).await;
        assert_eq!(code, 0, "{out}{errors}");
        let call = client(|builder| builder).post(running.url("/v1/chat/completions")).bearer_auth(KEY);
        Reply::of(call.json(&chat("m"))).await.assert_from("a", 1);
        let (code, _, errors) = command(folder, &["stop", "-c", "apis.json"]).await;
        assert_eq!(code, 0, "{errors}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_of_the_running_process_is_a_table() {
    within(async {
        let simulator = simulator().await;
        let bad = behaving(Behaviour::status(500)).await;
        let apis = [
            endpoint_with("steady", &simulator.base_url(), json!({ "models": ["m"], "rpm": 60, "rpd": 7 })),
            endpoint_with("full", &simulator.base_url(), json!({ "models": ["f"], "rpm": 1 })),
            endpoint_with("broken", &bad.base_url(), json!({ "models": ["b"], "modelMapping": { "alias": "b" } })),
            endpoint_with("unused", &simulator.base_url(), json!({ "models": ["z"], "enabled": false })),
        ];
        let running = Running::start(&config_text(json!({ "breaker": { "failures": 1 } }), &apis), "info");
        running.ready().await;
        let client = client(|builder| builder);
        let call = async |model: &str| {
            let call = client.post(running.url("/v1/chat/completions")).bearer_auth(KEY);
            Reply::of(call.json(&chat(model))).await.status
        };
        assert_eq!((call("m").await, call("f").await, call("f").await, call("b").await), (200, 200, 429, 500));
        let folder = running.folder.path();
        controlled(folder).await;
        let (code, out, errors) = command(folder, &["status", "-c", "apis.json"]).await;
        assert_eq!(code, 0, "{errors}");
        assert!(out.contains(&format!("process {}, up ", running.pid())), "{out}");
        assert!(out.contains(&format!("http://{}/v1", running.address)), "{out}");
        let row = |name: &str| {
            out.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or_else(|| panic!("{out}"))
        };
        let cells =
            |name: &str| row(name).split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect::<Vec<_>>();
        assert_eq!(cells("ENDPOINT"), ["ENDPOINT", "STATE", "OPEN", "ERRORS", "RPM", "RPD"]);
        assert_eq!(cells("steady"), ["steady", "ok", "0", "0", "1/60", "1/7"]);
        assert!(row("full").contains("full (1 request a minute) until ") && row("full").ends_with("1/1"), "{out}");
        assert!(row("broken").contains("cooling down until "), "{out}");
        assert_eq!(cells("unused")[1], "off");
        let error = out.split_once("LAST ERROR").unwrap().1;
        assert!(error.contains("broken") && error.contains("answered 500"), "{out}");
        assert!(!out.contains('\u{1b}') && !out.contains(KEY), "{out}");

        let (_, json, _) = command(folder, &["status", "--json", "-c", "apis.json"]).await;
        let told: Value = serde_json::from_str(&json).unwrap();
        assert_eq!((&told["apis"][0]["id"], &told["apis"][0]["usage"]["rpd"]), (&json!("steady"), &json!(1)));

        let (code, out, _) = command(folder, &["models", "-c", "apis.json"]).await;
        assert_eq!(code, 0);
        let rows: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().take(3).collect()).collect();
        assert_eq!(rows[1..4], [["alias", "broken", "b"], ["b", "broken", "b"], ["f", "full", "f"]], "{out}");
        let (_, out, _) = command(folder, &["models", "--json", "-c", "apis.json"]).await;
        let list: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(list[0], json!({ "model": "alias", "endpoint": "broken", "sentAs": "b" }));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_open_requests_unless_it_is_to_be_at_once() {
    within(async {
        let slow = behaving(Behaviour { events: 10, chunk_delay_ms: 150, ..Behaviour::default() }).await;
        let stalls = behaving(Behaviour { stall: Some(StallAt::AfterEvents(2)), ..Behaviour::default() }).await;
        for (simulator, now) in [(&slow, false), (&stalls, true)] {
            let mut running = Running::start(&config_text(json!({}), &[endpoint("a", &simulator.base_url())]), "info");
            let (folder, mut stream) = streaming(&running).await;
            let arguments = if now { &["stop", "--now", "-c", "apis.json"][..] } else { &["stop", "-c", "apis.json"] };
            let (stopped, body) = tokio::join!(command(&folder, arguments), async {
                let mut body = Vec::new();
                while let Ok(Some(chunk)) = stream.chunk().await {
                    body.extend_from_slice(&chunk);
                }
                String::from_utf8(body).unwrap()
            });
            let (code, out, errors) = stopped;
            assert_eq!(code, 0, "{out}{errors}");
            assert!(out.ends_with("stopped\n"), "{out}");
            assert_eq!(body.ends_with("data: [DONE]\n\n"), !now, "{body}");
            assert!(running.exit().await.success());
            let (code, _, errors) = command(&folder, &["stop", "-c", "apis.json"]).await;
            assert!(code == 1 && errors.contains("no process runs from"), "{errors}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_ledger_that_fails_is_in_the_status_with_its_reason() {
    within(async {
        let server = json!({ "ledger": "/dev/null/ledger.db" });
        let running = Running::start(&config_text(server, &[endpoint("a", "http://127.0.0.1:9")]), "info");
        running.ready().await;
        let folder = running.folder.path();
        controlled(folder).await;
        let (code, out, errors) = command(folder, &["status", "-c", "apis.json"]).await;
        let line = out.lines().find(|line| line.starts_with("ledger")).unwrap_or_else(|| panic!("{out}{errors}"));
        assert!(code == 0 && line.starts_with("ledger    failing, /dev/null/ledger.db: "), "{line}");
        assert_eq!(line.matches("/dev/null/ledger.db").count(), 1, "{line}");
    })
    .await;
}

#[tokio::test]
async fn a_watch_that_nobody_reads_ends() {
    within(async {
        let running = Running::start(&config_text(json!({}), &[endpoint("a", "http://127.0.0.1:9")]), "info");
        running.ready().await;
        let folder = running.folder.path().to_owned();
        controlled(&folder).await;
        let mut watch = program(&folder);
        let mut watch = watch.args(["status", "--watch", "-c", "apis.json"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut first = [0; 12];
        watch.stdout.take().unwrap().read_exact(&mut first).unwrap();
        assert_eq!(&first, b"api-together");
        let watch = Mutex::new(watch);
        until("it ends", || watch.lock().unwrap().try_wait().unwrap().is_some()).await;
        assert!(watch.lock().unwrap().wait().unwrap().success());
    })
    .await;
}

#[tokio::test]
async fn a_process_that_waits_for_its_last_requests_can_be_looked_at_and_cut_short() {
    within(async {
        let stalls = behaving(Behaviour { stall: Some(StallAt::AfterEvents(2)), ..Behaviour::default() }).await;
        let mut running = Running::start(&config_text(json!({}), &[endpoint("a", &stalls.base_url())]), "info");
        let (folder, _stream) = streaming(&running).await;
        running.signal("TERM");
        running.logs("1 requests are open").await;
        let (code, status, errors) = command(&folder, &["status", "-c", "apis.json"]).await;
        assert!(code == 0 && status.contains("1 open"), "{status}{errors}");
        let (code, out, errors) = command(&folder, &["stop", "--now", "-c", "apis.json"]).await;
        assert!(code == 0 && out.ends_with("stopped\n"), "{out}{errors}");
        assert!(running.exit().await.success());
    })
    .await;
}

#[test]
fn a_file_of_another_program_becomes_a_config_that_can_be_checked() {
    let folder = tempfile::tempdir().unwrap();
    let foreign = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/config/foreign/litellm.yaml");
    std::fs::copy(foreign, folder.path().join("config.yaml")).unwrap();
    let (code, _, errors) = run(folder.path(), &["check", "config.yaml"]);
    assert!(code == 1 && errors.contains("is a config of LiteLLM (`api-together import FILE`"), "{errors}");
    let (code, config, notes) = run(folder.path(), &["import", "config.yaml"]);
    assert!(code == 0 && !config.contains("sk-secret") && !notes.contains("sk-secret"), "{config}{notes}");
    assert!(notes.contains("put the key of openai-2 into .env: OPENAI_2_API_KEY="), "{notes}");
    std::fs::write(folder.path().join("apis.json"), config).unwrap();
    let names = [
        "OPENAI_API_KEY",
        "OPENAI_2_API_KEY",
        "AZURE_API_KEY",
        "PERPLEXITYAI_API_KEY",
        "CLIENT_API_KEY",
        "OLLAMA_API_KEY",
        "OPENAI_3_API_KEY",
        "ORGANIZATION",
    ];
    let variables = names.map(|name| format!("{name}=sk-7d1f93a8c05e42b67d1f93a8"));
    std::fs::write(folder.path().join(".env"), variables.join("\n")).unwrap();
    let (code, out, errors) = run(folder.path(), &["check", "apis.json"]);
    assert_eq!((code, out.as_str(), errors.as_str()), (0, "apis.json: ok\n", ""));
    let (code, _, errors) = run(folder.path(), &["import", "apis.json"]);
    assert!(code == 1 && errors.contains("apis.json: is no file of a program that is known here"), "{errors}");
}

#[test]
fn check_finds_a_certificate_and_a_key_that_do_not_go_together() {
    let folder = folder_with("key.pem", &rcgen::KeyPair::generate().unwrap().serialize_pem());
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(folder.path().join("cert.pem"), made.cert.pem()).unwrap();
    let tls = json!({ "tls": { "certFile": "cert.pem", "keyFile": "key.pem" } });
    std::fs::write(folder.path().join("apis.json"), config_text(tls, &[endpoint("a", "https://a.example")])).unwrap();
    let (code, _, errors) = run(folder.path(), &["check", "apis.json"]);
    assert!(code == 1 && errors.contains("apis.json: server.tls: ") && errors.contains("does the key in"), "{errors}");
    std::fs::write(folder.path().join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    assert_eq!(run(folder.path(), &["check", "apis.json"]).0, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_may_have_no_version_in_its_path_and_want_a_query() {
    within(async {
        let simulator = simulator().await;
        let host = simulator.base_url().trim_end_matches("/v1").to_owned();
        let deployed = json!({ "query": { "api-version": "2024-10-21", "sig": "a b&c" }, "models": ["d"] });
        let apis = [
            endpoint_with("bare", &host, json!({ "versionPath": "none", "models": ["b"] })),
            endpoint_with("deployed", &format!("{host}/openai/deployments/x"), deployed),
        ];
        let running = Running::start(&config_text(json!({}), &apis), "trace");
        running.ready().await;
        let ask = async |model: &str, query: &str| {
            let call = client(|builder| builder).post(running.url(&format!("/v1/chat/completions{query}")));
            Reply::of(call.bearer_auth(KEY).json(&chat(model))).await
        };
        ask("b", "?x=1").await;
        ask("d", "?api-version=1&x=2").await;
        let paths: Vec<String> = simulator.requests().iter().map(|request| request.path_and_query.clone()).collect();
        let query = "x=2&api-version=2024-10-21&sig=a%20b%26c";
        assert_eq!(paths, ["/chat/completions?x=1", &format!("/openai/deployments/x/chat/completions?{query}")]);
        assert!(!running.killed().contains("a%20b%26c"), "what it says is a secret");
    })
    .await;
}
