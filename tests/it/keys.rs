//! `api-together keys`, by the real program: keys are made, listed, rotated and revoked, with a process and without one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use api_together::simulator::Behaviour;
use serde_json::{Value, json};

use crate::commands::controlled;
use crate::connections::websocket;
use crate::harness::{
    KEY, Reply, behaving, chat, chat_stream, client, config_text, endpoint_with, simulator, until, within,
};
use crate::program::{Running, folder_with, program, run};
use crate::wire::ByHand;

/// A process, and commands for it.
struct Keyed {
    process: Running,
    config: PathBuf,
    client: reqwest::Client,
}

impl Keyed {
    async fn start(server: Value, apis: &[Value]) -> Self {
        let folder = folder_with("apis.json", &config_text(server, apis));
        let config = folder.path().join("apis.json");
        let mut command = program(folder.path());
        command.args(["--config", "apis.json"]);
        let process = Running::of(command, folder);
        process.ready().await;
        controlled(process.folder.path()).await;
        Self { process, config, client: client(reqwest::ClientBuilder::http1_only) }
    }

    fn folder(&self) -> &Path {
        self.config.parent().unwrap()
    }

    /// What a command prints, which succeeds.
    async fn keys(&self, arguments: &[&str]) -> String {
        let (code, output, errors) = self.try_keys(arguments).await;
        assert_eq!(code, 0, "{errors}");
        output.trim().to_owned()
    }

    async fn try_keys(&self, arguments: &[&str]) -> (i32, String, String) {
        keys(self.folder(), arguments).await
    }

    async fn chat(&self, key: &str) -> u16 {
        let request = self.client.post(self.process.url("/v1/chat/completions")).bearer_auth(key).json(&chat("m"));
        Reply::of(request).await.status
    }
}

async fn keys(folder: &Path, arguments: &[&str]) -> (i32, String, String) {
    let folder = folder.to_owned();
    let arguments: Vec<String> =
        ["keys"].iter().chain(arguments).chain(&["--config", "apis.json"]).map(|one| (*one).to_owned()).collect();
    let ran =
        tokio::task::spawn_blocking(move || run(&folder, &arguments.iter().map(String::as_str).collect::<Vec<_>>()));
    ran.await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_made_rotated_and_revoked_while_the_process_serves() {
    within(async {
        let simulator = simulator().await;
        let keyed =
            Keyed::start(json!({}), &[endpoint_with("a", &simulator.base_url(), json!({ "models": ["m"] }))]).await;
        let ada = keyed.keys(&["add", "ada", "--calls", "chat"]).await;
        assert!(ada.starts_with("sk-at-") && ada.len() == 49, "{ada}");
        assert_eq!(keyed.chat(&ada).await, 200, "at once");
        let again = keyed.try_keys(&["add", "ada"]).await;
        assert!(again.0 == 1 && again.1.is_empty() && again.2.contains("ada is there already"), "{again:?}");
        let wrong = keyed.try_keys(&["add", "bob", "--expires", "soon"]).await;
        assert!(wrong.0 == 1 && wrong.2.contains("no moment"), "{wrong:?}");
        let wrong = keyed.try_keys(&["add", "bob", "--endpoints", "a,nope"]).await;
        assert!(wrong.0 == 1 && wrong.2.contains("no endpoint of the config has the id \"nope\""), "{wrong:?}");

        let newer = keyed.keys(&["rotate", "ada", "--overlap", "1h"]).await;
        assert_eq!((keyed.chat(&ada).await, keyed.chat(&newer).await), (200, 200), "both, for an hour");
        let newest = keyed.keys(&["rotate", "ada", "--overlap", "0s"]).await;
        assert_eq!((keyed.chat(&ada).await, keyed.chat(&newer).await, keyed.chat(&newest).await), (401, 401, 200));

        let list: Value = serde_json::from_str(&keyed.keys(&["list", "--json"]).await).unwrap();
        assert_eq!(list[0]["name"], "ada");
        assert_eq!(list[0]["lastFour"], newest[newest.len() - 4..]);
        assert_eq!((&list[0]["state"], &list[0]["calls"]), (&json!("open"), &json!(["chat"])));
        keyed.keys(&["revoke", "ada"]).await;
        assert_eq!(keyed.chat(&newest).await, 401);
        assert!(keyed.keys(&["list"]).await.contains("revoked"));
        assert_eq!(keyed.try_keys(&["revoke", "nobody"]).await.0, 1);
        // No key stands anywhere but on the screen of the one that made it.
        let file = std::fs::read_to_string(keyed.folder().join("keys.json")).unwrap();
        let log = keyed.process.killed();
        for key in [&ada, &newer, &newest] {
            assert!(!file.contains(key.as_str()) && !log.contains(key.as_str()), "{key}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_given_a_budget_and_more_of_it() {
    within(async {
        let simulator = simulator().await;
        let prices = json!({ "m": { "input": 100, "output": 1000 } });
        let apis = [endpoint_with("a", &simulator.base_url(), json!({ "models": ["m"] }))];
        let keyed = Keyed::start(json!({ "prices": prices, "budgetReserveTokens": 20 }), &apis).await;
        let budgets =
            ["--budget", "0.01usd/day", "--budget", "100000tokens/total", "--warn-at", "0.5", "--cut-overrun"];
        let ada = keyed.keys(&[&["add", "ada"], &budgets[..]].concat()).await;
        assert_eq!(keyed.chat(&ada).await, 429, "20 tokens of an answer may cost 2 cents");
        let until = "2999-01-01T00:00:00Z";
        let raised = keyed.keys(&["raise", "ada", "--by", "0.05usd", "--until", until]).await;
        assert_eq!(raised, format!("ada may take 0.05 usd more a day, until {until}"));
        assert_eq!(keyed.chat(&ada).await, 200, "at once");
        let listed = keyed.keys(&["list"]).await;
        assert!(listed.contains("$0.01 (day), 100000 tokens (total)"), "{listed}");
        // A request was counted a moment ago, and what it took.
        assert!(listed.contains("SPENT") && listed.contains(" of $0.06 (day)"), "{listed}");
        assert!(listed.contains(" of 100000 tokens (total)"), "{listed}");
        for (wrong, why) in [
            (&["raise", "ada", "--by", "1", "--until", until][..], "several such budgets"),
            (&["raise", "ada", "--by", "1", "--per", "week", "--until", until], "no such budget"),
            (&["raise", "ada", "--by", "1", "--per", "day", "--until", "soon"], "no moment"),
            (&["raise", "bob", "--by", "1", "--until", until], "has no key bob"),
            (&["raise", "ada", "--by", "1eur", "--until", until], "no amount"),
            (&["add", "bob", "--budget", "10/day"], "no budget"),
        ] {
            let (code, _, errors) = keyed.try_keys(wrong).await;
            assert!(code != 0 && errors.contains(why), "{wrong:?}: {errors}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_file_of_keys_is_read_when_it_changes_and_a_broken_one_changes_nothing() {
    within(async {
        let simulator = simulator().await;
        let keyed =
            Keyed::start(json!({}), &[endpoint_with("a", &simulator.base_url(), json!({ "models": ["m"] }))]).await;
        let ada = keyed.keys(&["add", "ada"]).await;
        // Another program writes it, such as a copy from another machine, while the config is broken.
        let path = keyed.folder().join("keys.json");
        let before = std::fs::read_to_string(&path).unwrap();
        std::fs::write(keyed.folder().join("apis.json"), "{").unwrap();
        keyed.process.logs("not applied, version").await;
        std::fs::write(&path, "{").unwrap();
        keyed.process.logs("the keys before stay").await;
        assert_eq!(keyed.chat(&ada).await, 200);
        std::fs::write(&path, before.replace("\"ada\"", "\"eve\"")).unwrap();
        keyed.process.logs("keys.json: loaded, 1 in all").await;
        assert_eq!(keyed.chat(&ada).await, 200);
        assert!(keyed.keys(&["list"]).await.contains("eve"));
        std::fs::remove_file(&path).unwrap();
        let mut status = 200;
        for _ in 0..300 {
            status = keyed.chat(&ada).await;
            if status == 401 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(status, 401);
        keyed.process.logs("the file is gone, and its keys open nothing any more").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_the_config_is_changed_there_and_nowhere_else() {
    within(async {
        let simulator = simulator().await;
        let apis = [endpoint_with("a", &simulator.base_url(), json!({ "models": ["m"] }))];
        let mut keyed = Keyed::start(json!({}), &apis).await;
        let ada = keyed.keys(&["add", "ada", "--budget", "5usd/day"]).await;
        let file = std::fs::read_to_string(keyed.folder().join("keys.json")).unwrap();
        let config = config_text(json!({ "keys": [{ "name": "ada", "key": ada }] }), &apis);
        std::fs::write(keyed.folder().join("apis.json"), config).unwrap();
        keyed.process.logs("ada is overlooked").await;
        for runs in [true, false] {
            if !runs {
                keyed.process.signal("TERM");
                keyed.process.exit().await;
            }
            for change in [
                &["revoke", "ada"][..],
                &["rotate", "ada"],
                &["raise", "ada", "--by", "1usd", "--until", "2099-01-01"],
                &["add", "ada"],
                &["add", "ada", "--endpoints", "a"],
            ] {
                let (code, output, errors) = keyed.try_keys(change).await;
                assert!(code == 1 && output.is_empty(), "{change:?}: {output}");
                assert!(errors.contains("server.keys has a key ada; "), "{change:?}: {errors}");
            }
            let (_, _, errors) = keyed.try_keys(&["add", "bob", "--endpoints", "nope"]).await;
            assert!(errors.contains("has the id \"nope\", so the key could not use it; there are a"), "{errors}");
        }
        assert_eq!(std::fs::read_to_string(keyed.folder().join("keys.json")).unwrap(), file);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_made_before_the_process_starts_and_without_one_for_all() {
    within(async {
        let simulator = simulator().await;
        let apis = [endpoint_with("a", &simulator.base_url(), json!({ "models": ["m"] }))];
        let mut config: Value =
            serde_json::from_str(&config_text(json!({ "keysFile": "secret/keys.json" }), &apis)).unwrap();
        config["server"].as_object_mut().unwrap().remove("apiKey");
        let folder = folder_with("apis.json", &config.to_string());
        // It is named, and has to be there.
        let (code, _, errors) = run(folder.path(), &["--config", "apis.json"]);
        assert!(code == 1 && errors.contains("secret/keys.json") && errors.contains("keys add"), "{errors}");
        let (code, _, errors) = run(folder.path(), &["check", "apis.json"]);
        assert!(code == 1 && errors.contains("keys add"), "{errors}");
        let (code, ada, _) = keys(folder.path(), &["add", "ada"]).await;
        assert_eq!(code, 0);
        assert_eq!(run(folder.path(), &["check", "apis.json"]).0, 0);
        let mut command = program(folder.path());
        command.args(["--config", "apis.json"]);
        let process = Running::of(command, folder);
        process.ready().await;
        let keyed = Keyed { process, config: PathBuf::new(), client: client(reqwest::ClientBuilder::http1_only) };
        assert_eq!((keyed.chat(ada.trim()).await, keyed.chat(KEY).await), (200, 401));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_ends_who_waits_and_with_now_what_runs() {
    within(async {
        let slow = Behaviour { chunk_delay_ms: 50, events: 2000, ..Behaviour::default() };
        let (simulator, by_hand) = (behaving(slow).await, ByHand::bind().await);
        let apis = [
            endpoint_with("a", &simulator.base_url(), json!({ "models": ["m"], "maxConcurrent": 1 })),
            endpoint_with("b", &by_hand.base_url(), json!({ "models": ["talk"] })),
        ];
        let server = json!({ "queue": { "maxWaitMs": 60_000 } });
        let keyed = Keyed::start(server, &apis).await;
        let ada = keyed.keys(&["add", "ada"]).await;
        let bob = keyed.keys(&["add", "bob"]).await;
        let post = |key: &str| {
            keyed.client.post(keyed.process.url("/v1/chat/completions")).bearer_auth(key).json(&chat_stream("m")).send()
        };
        let mut running = post(&ada).await.unwrap();
        assert!(running.chunk().await.unwrap().is_some());
        let mut socket = crate::wire::Wire::connect(keyed.process.address).await;
        socket.send(websocket("/v1/realtime?model=talk").replace(KEY, &ada)).await;
        let (mut endpoint, ..) = by_hand.call().await;
        endpoint.send("HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\nhi").await;
        assert_eq!(socket.head().await.unwrap().status(), 101);
        // One of each waits for the place that is taken.
        let (waiting, other) = (tokio::spawn(post(&ada)), tokio::spawn(post(&bob)));
        tokio::time::sleep(Duration::from_millis(300)).await;
        keyed.keys(&["revoke", "ada"]).await;
        let refused: reqwest::Response = waiting.await.unwrap().unwrap();
        assert_eq!(refused.status(), 401);
        assert!(refused.text().await.unwrap().contains("was revoked"));
        assert!(running.chunk().await.unwrap().is_some(), "what runs goes on");
        assert_eq!(socket.exactly(2).await.unwrap(), "hi");
        assert!(!other.is_finished());
        keyed.keys(&["revoke", "ada", "--now"]).await;
        let cut = async {
            let mut last = String::new();
            while let Ok(Some(piece)) = running.chunk().await {
                last = String::from_utf8_lossy(&piece).into_owned();
            }
            last
        };
        let last = tokio::time::timeout(Duration::from_secs(5), cut).await.expect("it is cut off");
        assert!(last.contains("invalid_api_key") && last.contains("(ada) was revoked"), "{last}");
        assert_eq!(socket.rest().await, "", "and so is a WebSocket");
        // Its place goes to the other caller, which is not touched.
        let mut other = other.await.unwrap().unwrap();
        assert_eq!(other.status(), 200);
        for _ in 0..3 {
            assert!(other.chunk().await.unwrap().is_some());
        }
        until("the endpoint is left", || simulator.cancelled() == 1).await;
    })
    .await;
}
