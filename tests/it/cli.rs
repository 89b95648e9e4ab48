//! The program itself: exit codes, what it prints, what it never prints, how it stops.

use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use api_together::config::{self, Environment, Format};
use api_together::server::{Prepared, RunOptions};
use api_together::simulator::{Behaviour, ResetAt, StallAt};
use serde_json::{Value, json};
use tokio::task;

use crate::harness::{
    KEY, Reply, behaving, chat, chat_stream, client, closed_port, config_text, endpoint, endpoint_with, in_order,
    key_of, simulator, until, within,
};
use crate::program::{Running, folder_with, program, run, texts};

#[test]
fn check_passes_a_good_file() {
    let good = config_text(json!({}), &[endpoint("a", "https://api.example.com")]);
    let folder = folder_with("good.json", &good);
    assert_eq!(run(folder.path(), &["check", "good.json"]), (0, "good.json: ok\n".into(), String::new()));
}

#[test]
fn check_tells_every_error_at_once_with_its_place() {
    let server = json!({ "port": 70_000, "apiKey": "", "strategy": "rnd" });
    let api = json!({ "id": "a", "baseUrl": "ftp://x", "apiKey": "k", "modles": ["m"] });
    let text = json!({ "server": server, "apis": [endpoint("b", "https://x.example"), api, api] }).to_string();
    let folder = folder_with("bad.json", &text);
    let (code, out, errors) = run(folder.path(), &["check", "bad.json"]);
    assert_eq!((code, out.as_str()), (1, ""));
    for place in ["server.port: ", "server.apiKey: ", "server.strategy: ", "apis[1].baseUrl: ", "apis[2].baseUrl: "] {
        assert!(errors.contains(place), "{place}\n{errors}");
    }
    let misspelt = errors.lines().find(|line| line.contains("apis[1].modles")).unwrap();
    assert!(misspelt.contains("models"), "{misspelt}");
    assert!(errors.ends_with(" errors\n"), "{errors}");
}

#[test]
fn a_misspelt_key_is_an_error_for_check_and_a_warning_for_run() {
    let text = config_text(json!({}), &[endpoint_with("a", "https://x.example", json!({ "wieght": 2 }))]);
    let folder = folder_with("apis.json", &text);
    let (code, _, errors) = run(folder.path(), &["check", "apis.json"]);
    assert_eq!(code, 1);
    assert!(errors.contains("apis[0].wieght") && errors.contains("weight"), "{errors}");
    let (code, out, errors) = run(folder.path(), &["-t", "--config", "apis.json"]);
    assert_eq!((code, out.as_str()), (0, "apis.json: ok\nwould listen on 127.0.0.1:0\n"));
    assert!(errors.contains("WARN") && errors.contains("apis[0].wieght"), "{errors}");
}

#[test]
fn check_fails_on_files_that_are_none() {
    let folder = folder_with("bad.json", "{\"server\": {");
    for (name, says) in [("bad.json", "line 1"), ("none.json", "cannot be read"), (".", "cannot be read")] {
        let (code, out, errors) = run(folder.path(), &["check", name]);
        assert_eq!((code, out.as_str()), (1, ""));
        assert!(errors.contains(name) && errors.contains(says), "{errors}");
    }
}

#[test]
fn a_variable_that_is_missing_is_an_error_that_names_the_place() {
    let api = endpoint_with("a", "https://x.example", json!({ "apiKey": "${IT_ENDPOINT_KEY}" }));
    let folder = folder_with("apis.json", &config_text(json!({}), &[api]));
    let check = |key: Option<&str>| {
        let mut command = program(folder.path());
        command.args(["check", "apis.json"]).env_remove("IT_ENDPOINT_KEY");
        texts(&command.envs(key.map(|key| ("IT_ENDPOINT_KEY", key))).output().unwrap())
    };
    let (code, _, errors) = check(None);
    assert_eq!(code, 1);
    assert!(errors.contains("apis[0].apiKey") && errors.contains("IT_ENDPOINT_KEY"), "{errors}");
    assert_eq!(check(Some("")).0, 1, "an empty one is as good as none");
    assert_eq!(check(Some("sk-1234567890")).0, 0);
    std::fs::write(folder.path().join(".env"), "IT_ENDPOINT_KEY=sk-1234567890\n").unwrap();
    assert_eq!(check(None).0, 0, "from .env");
}

#[test]
fn the_examples_pass_and_the_schema_is_the_one_beside_them() {
    let conf = Path::new(env!("CARGO_MANIFEST_DIR")).join("conf");
    let folder = tempfile::tempdir().unwrap();
    let mut checked = 0;
    for entry in std::fs::read_dir(&conf).unwrap() {
        let file = entry.unwrap().path();
        if file.file_name().unwrap().to_str().unwrap().starts_with("apis.example.") {
            // Keys come from the environment there.
            let mut command = program(folder.path());
            command.arg("check").arg(&file);
            for name in ["API_TOGETHER_KEY", "OPENAI_API_KEY", "SECOND_OPENAI_API_KEY", "GEMINI_API_KEY", "ARK_API_KEY"]
            {
                command.env(name, "sk-7d1f93a8c05e42b67d1f93a8");
            }
            let (code, _, errors) = texts(&command.output().unwrap());
            assert_eq!(code, 0, "{}: {errors}", file.display());
            checked += 1;
        }
    }
    assert_eq!(checked, 2);
    let (code, schema, _) = run(folder.path(), &["schema"]);
    assert_eq!(code, 0);
    let kept = std::fs::read_to_string(conf.join("apis.schema.json")).unwrap();
    assert_eq!(schema, kept, "run `api-together schema > conf/apis.schema.json`");
    serde_json::from_str::<Value>(&schema).unwrap();
}

#[test]
fn a_config_that_is_missing_is_told_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [vec![], vec!["run"], vec!["-t"]] {
        let (code, out, errors) = run(folder.path(), &arguments);
        assert_eq!((code, out.as_str()), (1, ""));
        assert!(errors.contains("conf/apis.json") && errors.contains("apis.example.json"), "{errors}");
    }
    let (code, _, errors) = run(folder.path(), &["--config", "mine.yaml"]);
    assert_eq!(code, 1);
    assert!(errors.contains("mine.yaml"), "{errors}");
}

#[test]
fn a_port_that_is_taken_is_told_so() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let text = config_text(json!({ "port": address.port() }), &[endpoint("a", "https://x.example")]);
    let folder = folder_with("apis.json", &text);
    let (code, out, errors) = run(folder.path(), &["--config", "apis.json"]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(errors.contains(&format!("cannot listen on {address}")), "{errors}");
    assert!(errors.contains("another program listens there"), "{errors}");

    let loaded = config::check_str(&text, Format::Json, &Environment::default(), Path::new("")).unwrap();
    let error = Prepared::new(loaded.config, &RunOptions::default()).unwrap_err().to_string();
    assert!(error.contains("choose another server.port"), "{error}");
}

#[test]
fn bad_certificate_files_are_told_before_the_start() {
    let folder = folder_with("key.pem", &rcgen::KeyPair::generate().unwrap().serialize_pem());
    let certificate = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(folder.path().join("cert.pem"), certificate.cert.pem()).unwrap();
    std::fs::write(folder.path().join("none.pem"), "nothing").unwrap();
    for (cert_file, key_file, says) in [
        ("cert.pem", "key.pem", "does the key in"),
        ("none.pem", "key.pem", "none.pem"),
        ("cert.pem", "none.pem", "none.pem"),
        ("missing.pem", "key.pem", "server.tls.certFile"),
    ] {
        let server = json!({ "tls": { "certFile": cert_file, "keyFile": key_file } });
        let text = config_text(server, &[endpoint("a", "https://x.example")]);
        std::fs::write(folder.path().join("apis.json"), text).unwrap();
        let (code, _, errors) = run(folder.path(), &["--config", "apis.json"]);
        assert_eq!(code, 1, "{cert_file} {key_file}");
        assert!(errors.contains(says) && !errors.contains("panicked"), "{errors}");
    }
}

#[test]
fn t_checks_all_that_a_start_needs_and_leaves() {
    let folder = folder_with("apis.json", &config_text(json!({}), &[endpoint("a", "https://x.example")]));
    let (code, out, errors) = run(folder.path(), &["-t", "--config", "apis.json"]);
    assert_eq!((code, out.as_str()), (0, "apis.json: ok\nwould listen on 127.0.0.1:0\n"), "{errors}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "it makes nothing");
    assert_eq!(run(folder.path(), &["check", "apis.json"]).0, 0);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nor does check");
    let bad = folder_with("apis.json", "{}");
    assert_eq!(run(bad.path(), &["-t", "--config", "apis.json"]).0, 1);
}

#[test]
fn usage_errors_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let (code, _, errors) = run(folder.path(), &["--confg", "x"]);
    assert_eq!(code, 2);
    assert!(errors.contains("--config"), "{errors}");
    let (code, out, _) = run(folder.path(), &["--help"]);
    assert_eq!(code, 0);
    for word in ["check", "schema", "demo", "--config", "--upgrade", "--daemon", "--test"] {
        assert!(out.contains(word), "{word}: {out}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn port_in_the_environment_wins() {
    within(async {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let simulator = simulator().await;
        let text =
            config_text(json!({ "port": taken.local_addr().unwrap().port() }), &[endpoint("a", &simulator.base_url())]);
        let folder = folder_with("apis.json", &text);
        let mut command = program(folder.path());
        command.args(["run", "--config", "apis.json"]).env("PORT", "0");
        let running = Running::of(command, folder);
        running.ready().await;
        let call = client(|builder| builder).post(running.url("/v1/chat/completions")).bearer_auth(KEY);
        Reply::of(call.json(&chat("m"))).await.assert_from("a", 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_start_tells_where_it_is_and_masks_the_key() {
    within(async {
        let apis = [
            endpoint("api-one", "https://one.example/v1"),
            endpoint_with("two", "https://two.example", json!({ "enabled": false })),
        ];
        let running = Running::start(&config_text(json!({}), &apis), "info");
        running.logs("https://two.example").await;
        let (status, health) = (running.url("/v1/status"), running.url("/health"));
        let output = running.killed();
        for text in [status.as_str(), &health, "api-one", "https://one.example/v1", "1 of 2 in use", "sk-…42b6"] {
            assert!(output.contains(text), "{text}\n{output}");
        }
        assert!(!output.contains(KEY) && !output.contains('\u{1b}'), "no key, and no colours without a terminal");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_key_is_ever_printed_however_much_is_logged() {
    within(async {
        let quotes = Behaviour {
            body: Some(format!("{{\"error\":{{\"message\":\"bad key {}\"}}}}", key_of("c"))),
            ..Behaviour::status(401)
        };
        let quotes = behaving(quotes.header("x-debug", &key_of("c"))).await;
        let (broken, good) = (simulator().await, simulator().await);
        broken.set_default(Behaviour { reset: Some(ResetAt::BeforeHeader), ..Behaviour::default() });
        let mut apis = in_order([closed_port().as_str(), &broken.base_url(), &quotes.base_url(), &good.base_url()]);
        apis[3]["http2"] = json!(true);
        apis[3]["headers"] = json!({ "x-secret": "a-secret-of-the-header" });
        let running = Running::start(&config_text(json!({}), &apis), "trace");
        running.ready().await;
        for client in [client(reqwest::ClientBuilder::http1_only), crate::harness::h2c()] {
            let post = |key: &str| client.post(running.url("/v1/chat/completions?key=query-secret")).bearer_auth(key);
            Reply::of(post(KEY).header("x-api-key", KEY).json(&chat("m"))).await.assert_from("d", 4);
            assert_eq!(Reply::of(post(KEY).json(&chat_stream("m"))).await.status, 200);
            assert_eq!(Reply::of(post("sk-a-wrong-guess").json(&chat("m"))).await.status, 401);
            assert_eq!(Reply::of(post(KEY).body("{broken")).await.status, 400);
            let status = client.get(running.url("/v1/status")).bearer_auth(KEY);
            assert_eq!(Reply::of(status).await.status, 200);
        }
        running.logs("fault=request_invalid").await;
        let output = running.killed();
        assert!(output.contains("DEBUG") && output.contains("endpoint=d"), "{output}");
        let keys = ["a", "b", "c", "d"].map(key_of);
        let secrets = [KEY, "sk-a-wrong-guess", "a-secret-of-the-header", "query-secret"];
        for secret in keys.iter().map(String::as_str).chain(secrets) {
            let line = output.lines().find(|line| line.contains(secret));
            assert_eq!(line, None, "{secret} is in the log");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_line_tells_of_each_request() {
    within(async {
        let (bad, good) = (behaving(Behaviour::status(503)).await, simulator().await);
        let mapping = |priority: u32| json!({ "modelMapping": { "asked": "sent" }, "priority": priority });
        let apis = [endpoint_with("a", &bad.base_url(), mapping(0)), endpoint_with("b", &good.base_url(), mapping(1))];
        let running = Running::start(&config_text(json!({}), &apis), "info");
        running.ready().await;
        let client = client(|builder| builder);
        let call =
            client.post(running.url("/v1/chat/completions?x=1")).bearer_auth(KEY).header("x-request-id", "mine-1");
        let reply = Reply::of(call.json(&chat("asked"))).await;
        let line = running.logs("request id=mine-1").await;
        let fields: Vec<_> =
            line.split_once(" request ").unwrap().1.split(' ').filter_map(|field| field.split_once('=')).collect();
        let value = |name: &str| fields.iter().find(|(n, _)| *n == name).map(|(_, value)| *value);
        let bytes = reply.body.len().to_string();
        for (name, expected) in [
            ("id", "mine-1"),
            ("caller", "127.0.0.1"),
            ("method", "POST"),
            ("path", "/v1/chat/completions"),
            ("model", "asked"),
            ("endpoint_model", "sent"),
            ("endpoint", "b"),
            ("attempts", "2"),
            ("status", "200"),
            ("bytes", bytes.as_str()),
        ] {
            assert_eq!(value(name), Some(expected), "{name} in {line}");
        }
        for name in ["first_byte_ms", "total_ms"] {
            assert!(value(name).unwrap().parse::<f64>().unwrap() > 0.0, "{name} in {line}");
        }
        assert!(line.contains(" INFO ") && !line.contains("fault="), "{line}");
        let retried = running.logs("request mine-1: endpoint a answered 503").await;
        assert!(retried.contains("another"), "{retried}");
        let call = client.get(running.url("/v1/models")).header("x-request-id", "mine-2");
        Reply::of(call).await;
        let line = running.logs("request id=mine-2").await;
        assert!(line.contains("status=401") && line.contains("fault=key_missing"), "{line}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_gone_is_no_error() {
    within(async {
        let (refuses, stalls) = (behaving(Behaviour::status(401)).await, simulator().await);
        stalls.set_default(Behaviour { stall: Some(StallAt::AfterEvents(3)), ..Behaviour::default() });
        let apis = in_order([refuses.base_url().as_str(), &stalls.base_url()]);
        let running = Running::start(&config_text(json!({}), &apis), "debug");
        running.ready().await;
        let client = client(|builder| builder);
        let call = client.post(running.url("/v1/chat/completions")).bearer_auth(KEY).header("x-request-id", "gone-1");
        let mut stream = call.json(&chat_stream("m")).send().await.unwrap();
        stream.chunk().await.unwrap().unwrap();
        let line = running.logs("its key is refused").await;
        assert!(line.contains("WARN") && line.contains("endpoint a"), "an endpoint's refusal is ours to know: {line}");
        drop(stream);
        drop(client);
        let line = running.logs("request id=gone-1").await;
        assert!(line.contains("DEBUG") && line.ends_with("client_gone"), "{line}");
        let output = running.killed();
        assert!(!output.contains("ERROR"), "{output}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_open_streams_and_then_leaves() {
    within(async {
        let slow = Behaviour { chunk_delay_ms: 60, events: 15, ..Behaviour::default() };
        let simulator = behaving(slow).await;
        for client in [client(reqwest::ClientBuilder::http1_only), crate::harness::h2c()] {
            let mut running = Running::start(&config_text(json!({}), &[endpoint("a", &simulator.base_url())]), "info");
            running.ready().await;
            let call = client.post(running.url("/v1/chat/completions")).bearer_auth(KEY);
            let mut stream = call.json(&chat_stream("m")).send().await.unwrap();
            let mut text = String::from_utf8(stream.chunk().await.unwrap().unwrap().to_vec()).unwrap();
            running.signal("TERM");
            running.logs("shutting down gracefully: 1 requests are open").await;
            let address = running.address;
            until("nobody new is let in", || std::net::TcpStream::connect(address).is_err()).await;
            while let Some(chunk) = stream.chunk().await.unwrap() {
                text += std::str::from_utf8(&chunk).unwrap();
            }
            assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
            assert_eq!(running.exit().await.code(), Some(0));
        }
    })
    .await;
}

/// Asks again and again until told to stop. Every request must be answered as it should.
fn steady(client: reqwest::Client, url: String, stop: Arc<AtomicBool>) -> (Arc<AtomicUsize>, task::JoinHandle<()>) {
    let answered = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&answered);
    let asking = tokio::spawn(async move {
        while !stop.load(Ordering::Relaxed) {
            let call = client.post(&url).bearer_auth(KEY).json(&chat("m"));
            Reply::of(call).await.assert_from("a", 1);
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    (answered, asking)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_process_takes_over_and_no_request_is_lost() {
    within(async {
        let simulator = simulator().await;
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = config_text(json!({ "port": port }), &[endpoint("a", &simulator.base_url())]);
        let mut old = Running::start(&config, "info");
        let stop = Arc::new(AtomicBool::new(false));
        // One that keeps its connection, and one that makes a new one for each request.
        let (kept, fresh) = (client(|builder| builder), client(|builder| builder.pool_max_idle_per_host(0)));
        let asking = [kept, fresh].map(|c| steady(c, old.url("/v1/chat/completions"), Arc::clone(&stop)));
        let go_on = async |what: &str| {
            for (answered, _) in &asking {
                let before = answered.load(Ordering::Relaxed);
                until(what, || answered.load(Ordering::Relaxed) > before + 20).await;
            }
        };
        go_on("the old process answers").await;

        let mut command = program(old.folder.path());
        command.args(["--upgrade", "--config", "apis.json"]).env("RUST_LOG", "info");
        let starting = task::spawn_blocking(|| Running::of(command, tempfile::tempdir().unwrap()));
        let socket = old.folder.path().join("run/upgrade.sock");
        until("the new process waits for the sockets", || socket.exists()).await;
        old.signal("QUIT");
        let new = starting.await.unwrap();
        assert_eq!(new.address, old.address);
        assert_eq!(old.exit().await.code(), Some(0), "it leaves by itself");
        go_on("the new process answers").await;
        stop.store(true, Ordering::Relaxed);
        for (_, asking) in asking {
            asking.await.unwrap();
        }
        let line = new.logs("request id=").await;
        assert!(line.contains("status=200"), "{line}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_banner_comes_once_the_port_accepts() {
    within(async {
        for _ in 0..10 {
            let running = Running::start(&config_text(json!({}), &[endpoint("a", "http://127.0.0.1:9")]), "info");
            // The address stands in the first of the banner's lines, so this is earlier than anybody could know it.
            let connected = std::net::TcpStream::connect(running.address);
            assert!(connected.is_ok(), "{connected:?}");
            let base_url = running.logs("base URL").await;
            assert!(base_url.ends_with(&running.url("/v1")), "{base_url}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_program_stops_at_once() {
    within(async {
        let mut running = Running::start(&config_text(json!({}), &[endpoint("a", "https://x.example")]), "info");
        running.ready().await;
        running.signal("TERM");
        assert_eq!(running.exit().await.code(), Some(0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_answers_as_it_says() {
    within(async {
        let folder = tempfile::tempdir().unwrap();
        let mut command = program(folder.path());
        command.arg("demo").env("PORT", "0");
        let running = Running::of(command, folder);
        running.ready().await;
        running.logs("curl -Ns ").await;
        let client = client(|builder| builder);
        for body in [chat("gpt-4o-mini"), chat_stream("gpt-4o-mini")] {
            let call = client.post(running.url("/v1/chat/completions")).bearer_auth("sk-demo");
            assert_eq!(Reply::of(call.json(&body)).await.status, 200);
        }
        let output = running.killed();
        assert!(output.contains("3 of 3 in use"), "{output}");
    })
    .await;
}

/// Pages of 2 MiB, which the allocator asks for, would take three times the memory for the same streams.
#[cfg(target_os = "linux")]
#[test]
fn the_process_does_without_huge_pages() {
    let running = Running::start(&config_text(json!({}), &[endpoint("a", "https://x.example")]), "info");
    let status = std::fs::read_to_string(format!("/proc/{}/status", running.pid())).unwrap();
    let huge = status.lines().find_map(|line| line.strip_prefix("THP_enabled:"));
    assert_eq!(huge.map(str::trim), Some("0"), "{status}");
}
