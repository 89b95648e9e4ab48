//! The admin API: who may call it, and what it shows and does.

use std::path::Path;
use std::time::Duration;

use api_together::simulator::{Behaviour, StallAt};
use http::Method;
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::commands::controlled;
use crate::harness::{
    KEY, Proxy, Reply, behaving, chat, chat_stream, client, config_text, endpoint, endpoint_with, merged, simulator,
    until, within,
};
use crate::program::{Running, folder_with, program, run};

const ADMIN: &str = "sk-admin-9b1e7c40d2f8a653aa";
const ADA: &str = "sk-ada-51c0f3d9a4b7e862aa";

/// A running program, and calls of its admin API.
struct Admin {
    running: Running,
}

impl Admin {
    async fn start(server: Value, apis: &[Value]) -> Self {
        let running = Running::start(&config_text(merged(json!({ "adminKey": ADMIN }), server), apis), "info");
        running.ready().await;
        controlled(running.folder.path()).await;
        Self { running }
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        client(|builder| builder).request(method, self.running.url(&format!("/v1/admin{path}")))
    }

    async fn call(&self, method: Method, path: &str, body: Value) -> Reply {
        let request = self.request(method, path).bearer_auth(ADMIN);
        Reply::of(if body.is_null() { request } else { request.json(&body) }).await
    }

    async fn get(&self, path: &str) -> Value {
        let reply = self.call(Method::GET, path, Value::Null).await;
        assert_eq!(reply.status, 200, "{path}: {reply:?}");
        reply.json()
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        let reply = self.call(Method::POST, path, body).await;
        assert_eq!(reply.status, 200, "{path}: {reply:?}");
        reply.json()
    }

    async fn chat(&self, key: &str) -> Reply {
        let call = client(|builder| builder).post(self.running.url("/v1/chat/completions")).bearer_auth(key);
        Reply::of(call.json(&chat("m"))).await
    }

    /// The status of an endpoint.
    async fn endpoint(&self, id: &str) -> Value {
        let all = self.get("/endpoints").await;
        all["apis"].as_array().unwrap().iter().find(|api| api["id"] == id).unwrap().clone()
    }

    /// Waits until the list of a path has so many rows.
    async fn rows(&self, path: &str, count: usize) -> Vec<Value> {
        for _ in 0..200 {
            let rows = self.get(path).await["data"].as_array().unwrap().clone();
            if rows.len() == count {
                return rows;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("{path} never has {count} rows: {}", self.get(path).await)
    }
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

async fn command(folder: &Path, arguments: &[&str]) -> (i32, String, String) {
    let folder = folder.to_owned();
    let all = ["--config", "apis.json"].iter().chain(arguments).map(|argument| (*argument).to_owned());
    let all: Vec<String> = all.collect();
    spawn_blocking(move || run(&folder, &all.iter().map(String::as_str).collect::<Vec<_>>())).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_key_of_its_own_it_is_off() {
    within(async {
        let a = simulator().await;
        let proxy = Proxy::start(json!({}), &[endpoint("a", &a.base_url())]).await;
        for path in ["/v1/admin", "/v1/admin/endpoints", "/v1/admin/nothing"] {
            let off = proxy.get(path).await;
            let message = off.assert_error(404, "invalid_request_error", "admin_off");
            assert!(message.contains("server.adminKey"), "{message}");
        }
        // However the path is typed, no endpoint gets it.
        for path in ["//v1/admin/keys", "/v1/v1/admin/keys", "/admin/keys", "/v1/admin/../admin/keys"] {
            let reply = proxy.wire().await;
            drop(reply);
            assert!(proxy.get(path).await.status >= 400, "{path}");
        }
        assert_eq!(a.requests().len(), 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_takes_the_admin_key_and_no_other() {
    within(async {
        let a = simulator().await;
        let server = json!({ "failedKeysPerMinute": 3, "keys": [{ "name": "ada", "key": ADA }] });
        let admin = Admin::start(server, &[endpoint("a", &a.base_url())]).await;
        // Its address is right with a client's key, which does not let it guess this one.
        assert_eq!(admin.chat(KEY).await.status, 200);
        let none = Reply::of(admin.request(Method::GET, "/endpoints")).await;
        none.assert_error(401, "invalid_request_error", "invalid_admin_key");
        for key in [KEY, ADA, "sk-endpoint-a-fedcba9876543210"] {
            let refused = Reply::of(admin.request(Method::GET, "/nothing").bearer_auth(key)).await;
            refused.assert_error(401, "invalid_request_error", "invalid_admin_key");
        }
        // In the query it would stand in the logs of proxies.
        let in_query = Reply::of(admin.request(Method::GET, &format!("/endpoints?key={ADMIN}"))).await;
        in_query.assert_error(401, "invalid_request_error", "invalid_admin_key");
        let begun = std::time::Instant::now();
        let guess = Reply::of(admin.request(Method::GET, "/endpoints").bearer_auth("sk-another-guess")).await;
        guess.assert_error(429, "requests", "rate_limit_exceeded");
        let right = Reply::of(admin.request(Method::GET, "/endpoints").header("x-api-key", ADMIN)).await;
        right.assert_error(429, "requests", "rate_limit_exceeded");
        assert!(begun.elapsed() > Duration::from_secs(2), "both are late");
        assert_eq!(admin.chat(KEY).await.status, 200, "clients notice nothing");
        assert_eq!(admin.chat(ADMIN).await.status, 401, "it opens nothing else");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_neither_guess_at_the_sign_in_nor_fill_the_audit_log() {
    within(async {
        let a = simulator().await;
        let admin = Admin::start(json!({ "failedKeysPerMinute": 0 }), &[endpoint("a", &a.base_url())]).await;
        let sign_in = |body: Value| Reply::of(admin.request(Method::POST, "/session").json(&body));
        let long = sign_in(json!({ "key": "x".repeat(8 * 1024) })).await;
        assert_eq!(long.status, 413, "{long:?}");
        // It has a limit of its own where clients' keys have none.
        let mut statuses = Vec::new();
        for number in 0..12 {
            statuses.push(sign_in(json!({ "key": format!("sk-guess-{number}") })).await.status);
        }
        assert_eq!((statuses[0], statuses.last()), (401, Some(&429)), "{statuses:?}");
        let file = admin.running.folder.path().join("audit.jsonl");
        assert!(!file.exists(), "{}", std::fs::read_to_string(&file).unwrap());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_are_switched_cleared_and_tested() {
    within(async {
        let a = simulator().await;
        let b = behaving(Behaviour { status: 500, ..Behaviour::default() }).await;
        let apis = [
            endpoint("a", &a.base_url()),
            endpoint_with("b", &b.base_url(), json!({ "models": ["bad"] })),
            endpoint_with("off", &b.base_url(), json!({ "enabled": false })),
        ];
        let admin = Admin::start(json!({ "breaker": { "failures": 1 } }), &apis).await;
        let soon = "2999-01-01T00:00:00Z";
        admin.post("/endpoints/a/disable", json!({ "until": soon })).await;
        assert_eq!(admin.chat(KEY).await.status, 404, "nobody else serves the model");
        let status = admin.endpoint("a").await;
        assert_eq!((&status["enabled"], &status["switchedOff"]["until"]), (&json!(false), &json!(soon)), "{status}");
        // A restart forgets nothing.
        let Admin { mut running } = admin;
        running.signal("TERM");
        running.exit().await;
        let folder = std::mem::replace(&mut running.folder, tempfile::tempdir().unwrap());
        let mut again = program(folder.path());
        again.args(["--config", "apis.json"]).env("RUST_LOG", "info");
        let admin = Admin { running: Running::of(again, folder) };
        admin.running.ready().await;
        controlled(admin.running.folder.path()).await;
        assert_eq!(admin.endpoint("a").await["switchedOff"]["until"], soon);
        admin.post("/endpoints/a/enable", Value::Null).await;
        assert_eq!(admin.chat(KEY).await.status, 200);
        // Also while somebody has broken the config file.
        let file = admin.running.folder.path().join("apis.json");
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, "{").unwrap();
        admin.post("/endpoints/a/disable", Value::Null).await;
        assert_eq!(admin.chat(KEY).await.status, 404);
        admin.post("/endpoints/a/enable", Value::Null).await;
        assert_eq!(admin.chat(KEY).await.status, 200);
        std::fs::write(&file, text).unwrap();
        // For a moment.
        let moment = jiff::Timestamp::now() + jiff::SignedDuration::from_millis(1500);
        admin.post("/endpoints/a/disable", json!({ "until": moment.to_string() })).await;
        assert_eq!(admin.endpoint("a").await["enabled"], false);
        until("it is switched on again", || {
            let status = ureq(&admin.running.url("/v1/status"));
            status.contains("\"id\":\"a\",\"name\":\"a\",\"enabled\":true")
        })
        .await;
        // Cleared, it is asked again.
        let call = client(|builder| builder).post(admin.running.url("/v1/chat/completions")).bearer_auth(KEY);
        Reply::of(call.json(&chat("bad"))).await;
        assert_eq!(admin.endpoint("b").await["temporarilyDisabled"], true);
        admin.post("/endpoints/b/clear", Value::Null).await;
        let status = admin.endpoint("b").await;
        assert_eq!((&status["temporarilyDisabled"], &status["errorCount"]), (&json!(false), &json!(0)), "{status}");
        let tested = admin.post("/endpoints/a/test", Value::Null).await;
        assert_eq!((&tested["endpoint"], &tested["steps"][1]["result"]), (&json!("a"), &json!("ok")), "{tested}");
        for (path, body, status, code) in [
            ("/endpoints/nope/disable", Value::Null, 404, Some("not_found")),
            ("/endpoints/a/disable", json!({ "until": "2020-01-01T00:00:00Z" }), 400, None),
            ("/endpoints/a/disable", json!({ "untill": soon }), 400, None),
            ("/endpoints/off/enable", Value::Null, 409, Some("endpoint_off_in_config")),
            ("/endpoints/off/disable", Value::Null, 409, Some("endpoint_off_in_config")),
            ("/endpoints/a/clear", json!({ "key": "…none" }), 404, Some("not_found")),
        ] {
            let refused = admin.call(Method::POST, path, body).await;
            refused.assert_error(status, "invalid_request_error", code);
        }
    })
    .await;
}

/// The answer to a request with the clients' key, from a thread that may wait.
fn ureq(url: &str) -> String {
    let output =
        std::process::Command::new("curl").args(["-s", "-H", &format!("authorization: Bearer {KEY}"), url]).output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_made_rotated_raised_and_revoked() {
    within(async {
        let a = simulator().await;
        let admin = Admin::start(json!({}), &[endpoint("a", &a.base_url())]).await;
        let entry = json!({ "name": "bob", "rpm": 100, "budget": [{ "tokens": 100_000, "per": "day" }] });
        let added = admin.post("/keys", entry).await;
        let key = added["key"].as_str().unwrap();
        assert!(key.starts_with("sk-at-") && admin.chat(key).await.status == 200, "{added}");
        let rotated = admin.post("/keys/bob/rotate", json!({ "overlapHours": 0 })).await;
        let second = rotated["key"].as_str().unwrap();
        assert_eq!((admin.chat(key).await.status, admin.chat(second).await.status), (401, 200));
        admin.post("/keys/bob/raise", json!({ "by": 500, "until": "2999-01-01" })).await;
        let listed = admin.get("/keys").await;
        let bob = &listed["data"][0];
        assert_eq!((&bob["name"], &bob["state"], &bob["source"]), (&json!("bob"), &json!("open"), &json!("file")));
        assert_eq!(bob["budgets"][0]["limit"], "100500 tokens", "{bob}");
        assert!(bob["lastUsed"].is_string() && !listed.to_string().contains(second), "{bob}");
        let revoked = admin.call(Method::DELETE, "/keys/bob?now=true", Value::Null).await;
        assert_eq!((revoked.status, admin.chat(second).await.status), (200, 401));
        for (method, path, body, status) in [
            (Method::POST, "/keys", json!({}), 409),
            (Method::POST, "/keys", json!({ "name": "eve", "key": "sk-mine-0123456789abcdef" }), 400),
            (Method::POST, "/keys", json!({ "name": "eve", "rpmm": 5 }), 409),
            (Method::POST, "/keys/nobody/rotate", Value::Null, 409),
            (Method::DELETE, "/keys/bob?now=perhaps", Value::Null, 400),
        ] {
            let refused = admin.call(method, path, body).await;
            assert_eq!(refused.status, status, "{path}: {refused:?}");
            assert!(!refused.text().contains("sk-mine-0123456789abcdef"), "{refused:?}");
        }
        // What was done stands in the audit log with its author, from wherever it came.
        let folder = admin.running.folder.path().to_owned();
        assert_eq!(command(&folder, &["keys", "add", "carol"]).await.0, 0);
        let lines = admin.get("/audit").await;
        let told = |place: usize| {
            let line = &lines["data"][place];
            let text = |name: &str| line[name].as_str().unwrap_or_default().to_owned();
            (text("author"), text("action"), text("subject"), line["ok"].as_bool().unwrap())
        };
        assert_eq!(told(0), ("the command line".into(), "keys.add".into(), "carol".into(), true), "{lines}");
        assert_eq!(told(1), ("the admin key, from 127.0.0.1".into(), "keys.rotate".into(), "nobody".into(), false));
        let text = std::fs::read_to_string(folder.join("data/audit.jsonl")).unwrap();
        assert!(!text.contains("sk-at-") && text.lines().count() >= 7, "{text}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_found_watched_and_cancelled() {
    within(async {
        let a = simulator().await;
        let slow =
            behaving(Behaviour { events: 3, stall: Some(StallAt::AfterEvents(2)), ..Behaviour::default() }).await;
        let apis = [
            endpoint_with(
                "a",
                &a.base_url(),
                json!({ "models": ["m", "queued"], "modelLimits": { "queued": { "rpm": 1 } } }),
            ),
            endpoint_with("slow", &slow.base_url(), json!({ "models": ["slow"] })),
        ];
        let keys = json!([{ "name": "ada", "key": ADA }]);
        let server = json!({ "keys": keys, "queue": { "maxWaitMs": 90_000 } });
        let admin = Admin::start(server, &apis).await;
        admin.chat(ADA).await;
        admin.chat(KEY).await;
        let rows = admin.rows("/requests?key=ada", 1).await;
        let one = admin.get(&format!("/requests/{}", rows[0]["id"].as_str().unwrap())).await;
        assert_eq!((&one["endpoint"], &one["attempts"][0]["outcome"]), (&json!("a"), &json!("ok")), "{one}");
        assert_eq!(one["requestBody"], Value::Null);
        admin.rows("/requests", 2).await;
        let first = admin.get("/requests?limit=1").await;
        let second = admin.get(&format!("/requests?limit=1&before={}", first["next"])).await;
        assert_eq!(second["data"][0]["key"], "ada", "{second}");
        for (path, status) in [("/requests/nope", 404), ("/requests?status=999", 400), ("/requests?since=soon", 400)] {
            assert_eq!(admin.call(Method::GET, path, Value::Null).await.status, status, "{path}");
        }
        // One streams, one waits for a permit.
        let post = |model: &str, id: &str| {
            let call = client(|builder| builder).post(admin.running.url("/v1/chat/completions")).bearer_auth(KEY);
            call.header("x-request-id", id).json(&chat_stream(model))
        };
        let mut stream = post("slow", "streaming-1").send().await.unwrap();
        stream.chunk().await.unwrap().unwrap();
        Reply::of(post("queued", "first-1")).await;
        let waiting = tokio::spawn(Reply::of(post("queued", "waiting-1")));
        let running = admin.rows("/running", 2).await;
        let of = |id: &str| running.iter().find(|one| one["id"] == id).unwrap();
        let (streams, waits) = (of("streaming-1"), of("waiting-1"));
        assert_eq!((&streams["state"], &streams["endpoint"]), (&json!("answered"), &json!("slow")), "{streams}");
        assert_eq!((&waits["state"], &waits["model"]), (&json!("queued"), &json!("queued")), "{waits}");
        for id in ["streaming-1", "waiting-1"] {
            assert_eq!(admin.call(Method::DELETE, &format!("/running/{id}"), Value::Null).await.status, 200);
        }
        let refused = waiting.await.unwrap();
        refused.assert_error(403, "invalid_request_error", "request_cancelled");
        let mut rest = String::new();
        while let Ok(Some(piece)) = stream.chunk().await {
            rest.push_str(std::str::from_utf8(&piece).unwrap());
        }
        assert!(rest.contains("request_cancelled") && !rest.contains("[DONE]"), "{rest}");
        admin.rows("/running", 0).await;
        assert_eq!(admin.call(Method::DELETE, "/running/waiting-1", Value::Null).await.status, 404);
        let logged = admin.rows("/requests?failed=true", 2).await;
        assert!(logged.iter().all(|one| one["fault"] == "cancelled"), "{logged:?}");
        assert_eq!(admin.endpoint("slow").await["errorCount"], 0, "it is not to blame");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_is_what_the_token_statistics_say() {
    within(async {
        let (a, b) = (simulator().await, simulator().await);
        let apis = [endpoint_with("a", &a.base_url(), json!({ "models": ["m"] })), endpoint("b", &b.base_url())];
        let admin = Admin::start(json!({ "keys": [{ "name": "ada", "key": ADA }] }), &apis).await;
        for _ in 0..5 {
            admin.chat(ADA).await;
            admin.chat(KEY).await;
        }
        let stats = Reply::of(client(|builder| builder).get(admin.running.url("/v1/token/stats")).bearer_auth(KEY))
            .await
            .json();
        let sum = |rows: &Value, name: &str| -> u64 {
            rows["data"].as_array().unwrap().iter().map(|row| row[name].as_u64().unwrap()).sum()
        };
        for path in ["/usage", "/usage?per=hour", "/usage?by=model", "/usage?by=model&per=hour"] {
            let usage = admin.get(path).await;
            assert_eq!(sum(&usage, "totalTokens"), stats["summary"]["totalTokens"].as_u64().unwrap(), "{path}");
            assert_eq!(sum(&usage, "requests"), stats["summary"]["totalRequests"].as_u64().unwrap(), "{path}");
        }
        let by_key = admin.get("/usage?by=key").await;
        assert_eq!(by_key["data"][0]["name"], "ada");
        assert_eq!(sum(&by_key, "totalTokens"), stats["keys"]["ada"]["totalTokens"].as_u64().unwrap(), "{by_key}");
        let none = admin.get("/usage?since=2999-01-01T00:00:00Z").await;
        assert_eq!(none["data"], json!([]));
        for path in ["/usage?by=key&per=hour", "/usage?by=colour", "/usage?per=week"] {
            assert_eq!(admin.call(Method::GET, path, Value::Null).await.status, 400, "{path}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_has_a_session_in_place_of_the_key() {
    within(async {
        let a = simulator().await;
        let apis = [endpoint("a", &a.base_url())];
        let admin = Admin::start(json!({ "cors": { "origins": ["*"] }, "port": free_port() }), &apis).await;
        let wrong = Reply::of(admin.request(Method::POST, "/session").json(&json!({ "key": KEY }))).await;
        wrong.assert_error(401, "invalid_request_error", "invalid_admin_key");
        let opened = Reply::of(admin.request(Method::POST, "/session").json(&json!({ "key": ADMIN }))).await;
        assert_eq!(opened.status, 200, "{opened:?}");
        let set = opened.header("set-cookie").unwrap().to_owned();
        for part in ["; HttpOnly", "; SameSite=Strict", "; Path=/", "; Max-Age=1800"] {
            assert!(set.contains(part), "{set}");
        }
        assert!(!set.contains("Secure") && !opened.text().contains(ADMIN), "{opened:?}");
        assert_eq!(opened.header("access-control-allow-origin"), None, "no other page may read it");
        let cookie = set.split(';').next().unwrap().to_owned();
        let token = opened.json()["csrfToken"].as_str().unwrap().to_owned();
        let with = |method, path: &str| admin.request(method, path).header("cookie", &cookie);
        let origin = admin.running.url("");
        assert_eq!(Reply::of(with(Method::GET, "/endpoints").header("origin", &origin)).await.status, 200);
        assert_eq!(Reply::of(with(Method::GET, "/session")).await.json()["csrfToken"], token);
        let reload = || with(Method::POST, "/reload");
        assert_eq!(Reply::of(reload().header("x-csrf-token", &token)).await.status, 200);
        for request in [
            reload(),
            reload().header("x-csrf-token", "x"),
            reload().header("x-csrf-token", &token).header("origin", "https://evil.example"),
            reload().header("x-csrf-token", &token).header("sec-fetch-site", "cross-site"),
            with(Method::GET, "/endpoints").header("origin", "null"),
        ] {
            Reply::of(request).await.assert_error(403, "invalid_request_error", "request_not_trusted");
        }
        // A name that leads here by another's doing is another host.
        let rebound = Reply::of(with(Method::GET, "/endpoints").header("host", "evil.example")).await;
        rebound.assert_error(401, "invalid_request_error", "invalid_admin_key");
        // A successor knows it.
        let folder = admin.running.folder.path().to_owned();
        let (code, out, errors) = command(&folder, &["upgrade"]).await;
        assert_eq!(code, 0, "{out}{errors}");
        assert_eq!(Reply::of(with(Method::GET, "/keys")).await.status, 200);
        let lines = Reply::of(with(Method::GET, "/audit")).await.json();
        assert!(
            lines["data"].as_array().unwrap().iter().any(|line| line["author"] == "the page, from 127.0.0.1"),
            "{lines}"
        );
        // Another admin key ends it.
        let port = admin.running.address.port();
        let other = config_text(json!({ "adminKey": "sk-admin-another-9b1e7c40d2", "port": port }), &apis);
        std::fs::write(folder.join("apis.json"), other).unwrap();
        let reloaded = command(&folder, &["reload"]).await;
        assert_eq!(reloaded.0, 0, "{reloaded:?}");
        // The process before may still take connections for a moment.
        let begun = std::time::Instant::now();
        while Reply::of(with(Method::GET, "/keys")).await.status != 401 {
            assert!(begun.elapsed() < Duration::from_secs(15), "the session never ends");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        command(&folder, &["stop", "--now"]).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_can_have_a_listener_of_its_own() {
    within(async {
        let a = simulator().await;
        let port = format!("127.0.0.1:{}", free_port());
        let server = json!({ "adminListen": port, "port": free_port() });
        let admin = Admin::start(server, &[endpoint("a", &a.base_url())]).await;
        let call = |url: String| Reply::of(client(|builder| builder).get(url).bearer_auth(ADMIN));
        assert_eq!(call(format!("http://{port}/v1/admin/endpoints")).await.status, 200);
        for path in ["/v1/status", "/v1/models", "/metrics", "/v1/files"] {
            assert_eq!(call(format!("http://{port}{path}")).await.status, 404, "{path}");
        }
        assert_eq!(admin.call(Method::GET, "/endpoints", Value::Null).await.status, 404, "not on the clients' port");
        assert_eq!(admin.chat(KEY).await.status, 200);
        assert_eq!(a.requests().len(), 1);
        let folder = admin.running.folder.path();
        let (code, out, errors) = command(folder, &["upgrade"]).await;
        assert_eq!(code, 0, "{out}{errors}");
        assert_eq!(call(format!("http://{port}/v1/admin/endpoints")).await.status, 200);
        command(folder, &["stop", "--now"]).await;
        let text = config_text(json!({ "adminKey": KEY }), &[endpoint("a", &a.base_url())]);
        let folder = folder_with("apis.json", &text);
        let (code, _, errors) = run(folder.path(), &["check", "apis.json"]);
        assert!(code == 1 && errors.contains("is server.apiKey, which every client has"), "{errors}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_config_is_shown_without_secrets_checked_applied_and_put_back() {
    within(async {
        use std::os::unix::fs::PermissionsExt as _;
        let (a, b) = (simulator().await, simulator().await);
        let admin = Admin::start(json!({}), &[endpoint("a", &a.base_url())]).await;
        let file = admin.running.folder.path().join("apis.json");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        let before = std::fs::read_to_string(&file).unwrap();
        let shown = admin.get("/config").await;
        let text = shown["text"].as_str().unwrap().to_owned();
        for secret in [KEY, ADMIN, "sk-endpoint-a"] {
            assert!(!shown.to_string().contains(secret), "{shown}");
        }
        assert_eq!((&shown["notEditable"], &shown["format"]), (&Value::Null, &json!("json")), "{shown}");
        let body = |text: &str, tag: &Value| json!({ "text": text, "tag": tag });
        // What is wrong is said with its place, and what would change.
        let wrong = text.replace("\"models\":[\"*\"]", "\"models\":[\"*\"],\"rpmm\":5,\"rpd\":\"x\"");
        let checked = admin.post("/config/check", json!({ "text": wrong })).await;
        let problems = checked["problems"].as_array().unwrap();
        assert!(checked["ok"] == false && problems.iter().any(|one| one["path"] == "apis[0].rpd"), "{checked}");
        let better = text.replace("\"models\":[\"*\"]", "\"models\":[\"*\"],\"rpm\":7");
        let checked = admin.post("/config/check", json!({ "text": better })).await;
        assert_eq!(
            (&checked["ok"], &checked["changes"]),
            (&json!(true), &json!(["endpoint a: rpm -1 → 7"])),
            "{checked}"
        );
        let refused = admin.call(Method::PUT, "/config", body(&wrong, &shown["tag"])).await;
        let message = refused.assert_error(409, "invalid_request_error", "config_invalid");
        assert!(message.contains("apis[0].rpd") && std::fs::read_to_string(&file).unwrap() == before, "{message}");
        // A key never goes to another host.
        let stolen = text.replace(&a.base_url(), &b.base_url());
        let refused = admin.call(Method::PUT, "/config", body(&stolen, &shown["tag"])).await;
        refused.assert_error(409, "invalid_request_error", "secret_needed");
        let without_tag = admin.call(Method::PUT, "/config", body(&better, &Value::Null)).await;
        without_tag.assert_error(409, "invalid_request_error", "config_changed");
        assert_eq!(admin.post("/config/check", json!({ "text": stolen })).await["ok"], false);
        let applied = admin.call(Method::PUT, "/config", body(&better, &shown["tag"])).await;
        assert_eq!(applied.status, 200, "{applied:?}");
        assert_eq!(admin.endpoint("a").await["limits"]["rpm"], 7);
        assert_eq!(admin.chat(KEY).await.status, 200, "its secrets stayed");
        let now = std::fs::read_to_string(&file).unwrap();
        assert!(now.contains(KEY) && now.contains("\"rpm\":7") && !now.contains("****"), "{now}");
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
        // Somebody else was faster.
        let late = admin.call(Method::PUT, "/config", body(&better, &shown["tag"])).await;
        late.assert_error(409, "invalid_request_error", "config_changed");
        let versions = admin.rows("/config/versions", 2).await;
        let oldest = versions[1]["name"].as_str().unwrap();
        let version = admin.get(&format!("/config/versions/{oldest}")).await;
        assert!(!version.to_string().contains(KEY) && !version.to_string().contains("\\\"rpm\\\":7"), "{version}");
        admin.post(&format!("/config/versions/{oldest}/restore"), Value::Null).await;
        assert_eq!(std::fs::read_to_string(&file).unwrap(), before);
        assert_eq!(admin.endpoint("a").await["limits"]["rpm"], -1);
        for name in ["nope", "..%2Fledger.db", "1.json"] {
            let none = admin.call(Method::POST, &format!("/config/versions/{name}/restore"), Value::Null).await;
            assert_eq!(none.status, 404, "{name}: {none:?}");
        }
        let lines = admin.get("/audit").await;
        assert!(!lines.to_string().contains(KEY) && lines["data"][0]["action"] == "config.restore", "{lines}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_that_is_not_ours_to_write_is_left_alone() {
    within(async {
        let a = simulator().await;
        let text = config_text(json!({ "adminKey": ADMIN }), &[endpoint("a", &a.base_url())]);
        // As a ConfigMap is mounted.
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("..data")).unwrap();
        std::fs::write(folder.path().join("..data/apis.json"), &text).unwrap();
        std::os::unix::fs::symlink("..data/apis.json", folder.path().join("apis.json")).unwrap();
        let mut command = program(folder.path());
        command.args(["--config", "apis.json"]);
        let admin = Admin { running: Running::of(command, folder) };
        admin.running.ready().await;
        controlled(admin.running.folder.path()).await;
        let shown = admin.get("/config").await;
        assert!(shown["notEditable"].as_str().unwrap().contains("ConfigMap"), "{shown}");
        let unchanged = json!({ "text": shown["text"], "tag": shown["tag"] });
        let refused = admin.call(Method::PUT, "/config", unchanged).await;
        refused.assert_error(409, "invalid_request_error", "config_read_only");
        assert!(admin.running.folder.path().join("apis.json").is_symlink());
    })
    .await;
}

/// The events of a stream so far, by their names, and whether it has ended.
async fn events(mut reply: reqwest::Response, longest: Duration) -> (String, bool) {
    let mut text = String::new();
    let read = async {
        while let Ok(Some(piece)) = reply.chunk().await {
            text.push_str(&String::from_utf8_lossy(&piece));
        }
    };
    let has_ended = tokio::time::timeout(longest, read).await.is_ok();
    (text, has_ended)
}

#[tokio::test(flavor = "multi_thread")]
async fn views_are_watched_by_few_and_only_as_long_as_they_may_be() {
    within(async {
        let a = simulator().await;
        let admin = Admin::start(json!({}), &[endpoint("a", &a.base_url())]).await;
        let live = |query: &str| admin.request(Method::GET, &format!("/live{query}"));
        Reply::of(live("?view=now")).await.assert_error(401, "invalid_request_error", "invalid_admin_key");
        assert_eq!(Reply::of(live("?view=now").bearer_auth(KEY)).await.status, 401, "no client's key opens it");
        assert_eq!(Reply::of(live("?view=all").bearer_auth(ADMIN)).await.status, 400);

        let mut watching = Vec::new();
        for _ in 0..16 {
            let reply = live("?view=now").bearer_auth(ADMIN).send().await.unwrap();
            assert_eq!(reply.headers()["content-type"], "text/event-stream");
            watching.push(reply);
        }
        let one_more = Reply::of(live("?view=now").bearer_auth(ADMIN)).await;
        assert_eq!((one_more.status, &one_more.json()["error"]["code"]), (409, &json!("too_many_viewers")));
        let (text, has_ended) = events(watching.pop().unwrap(), Duration::from_millis(500)).await;
        assert!(text.contains("event: hello\n") && text.contains("event: change") && !has_ended, "{text}");
        drop(watching);
        // Their places are free as soon as they have left.
        let mut freed = live("?view=now").bearer_auth(ADMIN).send().await.unwrap();
        for _ in 0..100 {
            if freed.status() == 200 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            freed = live("?view=now").bearer_auth(ADMIN).send().await.unwrap();
        }
        assert_eq!(freed.status(), 200);

        // A session that is signed out, and a process that goes, end what is watched.
        let signed_in = admin.request(Method::POST, "/session").json(&json!({ "key": ADMIN })).send().await.unwrap();
        let cookie = signed_in.headers()["set-cookie"].to_str().unwrap().split(';').next().unwrap().to_owned();
        let csrf = signed_in.json::<Value>().await.unwrap()["csrfToken"].as_str().unwrap().to_owned();
        let by_session = live("?view=keys").header("cookie", &cookie).send().await.unwrap();
        let out = admin.request(Method::DELETE, "/session").header("cookie", &cookie).header("x-csrf-token", csrf);
        assert_eq!(Reply::of(out).await.status, 200);
        let (text, has_ended) = events(by_session, Duration::from_secs(8)).await;
        assert!(has_ended && text.contains("event: over\ndata: \"signed_out\""), "{text}");
        admin.running.signal("TERM");
        let (text, has_ended) = events(freed, Duration::from_secs(8)).await;
        assert!(has_ended && text.contains("event: over\ndata: \"restart\""), "{text}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_where_its_api_is_and_shows_nothing_to_strangers() {
    within(async {
        let a = simulator().await;
        let own = free_port();
        let listen = json!({ "adminListen": format!("127.0.0.1:{own}") });
        let admin = Admin::start(listen, &[endpoint("a", &a.base_url())]).await;
        let get = |url: String| client(|builder| builder).get(url).header("accept", "text/html");
        // The clients' port knows nothing of it.
        let elsewhere = Reply::of(get(admin.running.url("/dashboard"))).await;
        assert_eq!(elsewhere.status, 404);
        let plain = Reply::of(get(admin.running.url("/"))).await;
        assert!(!plain.text().contains("dashboard"), "{}", plain.text());
        let here = |path: &str| get(format!("http://127.0.0.1:{own}{path}"));
        let root = Reply::of(here("/")).await;
        assert!(
            root.text().contains("href=\"/dashboard\"") && !root.text().contains(&own.to_string()),
            "{}",
            root.text()
        );
        for path in ["/dashboard", "/dashboard/", "/dashboard/keys", "/dashboard/endpoints/a", "/dashboard/requests/x"]
        {
            let page = Reply::of(here(path)).await;
            assert_eq!(page.status, 200, "{path}");
            assert!(page.text().contains("Admin key") && !page.text().contains("<nav"), "{path}: {}", page.text());
            assert!(page.header("content-security-policy").unwrap().starts_with("default-src 'none'"));
            assert_eq!(page.header("access-control-allow-origin"), None);
        }
        // The key itself opens the API, not the page, which has sessions.
        let by_key = Reply::of(here("/dashboard/keys").bearer_auth(ADMIN)).await;
        assert!(by_key.text().contains("Admin key"));
        assert_eq!(Reply::of(here("/dashboard/nothing")).await.status, 404);
        let post = client(|builder| builder).post(format!("http://127.0.0.1:{own}/dashboard"));
        assert_eq!(Reply::of(post).await.status, 405);
        let script = Reply::of(here("/dashboard/page.js?of-another-build").header("accept-encoding", "gzip")).await;
        assert_eq!(
            (script.header("cache-control"), script.header("content-encoding")),
            (Some("no-cache"), Some("gzip"))
        );
    })
    .await;
}
