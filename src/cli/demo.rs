//! `api-together demo`: three simulated endpoints on loopback and the proxy before them.

use std::path::{Path, PathBuf};
use std::sync::mpsc;

use serde_json::json;

use crate::cli::banner::Banner;
use crate::config::{self, Environment, Flags, Format, Loaded};
use crate::server::{Prepared, RunOptions};
use crate::simulator::{Behaviour, Options, Simulator};
use crate::telemetry::logger;

/// The key that the demo's clients send. It opens nothing but the simulated endpoints.
const CLIENT_KEY: &str = "sk-demo";
/// The same of the page.
const ADMIN_KEY: &str = "sk-demo-admin";
const PORT: u16 = 3001;

/// Serves the demo until it is stopped. The error says why it cannot start.
pub(super) fn run() -> Result<(), String> {
    logger::start(&Environment::from_process(Path::new(""), &Flags::default()), false);
    let bases = start_endpoints().map_err(|error| format!("the simulated endpoints cannot start: {error}"))?;
    let (banner, mut prepared) = prepare(&bases, PORT).or_else(|busy| {
        log::warn!("{busy}; using a free port instead");
        prepare(&bases, 0)
    })?;
    let address = prepared.address;
    prepared.announce(format!("{}{}", banner.text(address), samples(address.port())));
    prepared.bootstrap();
    prepared.serve();
    // Left behind if another signal than Ctrl-C ends it; it is a temporary file.
    std::fs::remove_dir_all(ledger_folder()).unwrap_or_default();
    Ok(())
}

/// The base URLs of three endpoints, which live as long as the process.
fn start_endpoints() -> std::io::Result<Vec<String>> {
    let (tell, told) = mpsc::channel();
    let serve = async move {
        let mut running = Vec::new();
        for options in endpoints() {
            match Simulator::bind_local(options).await {
                Ok(simulator) => running.push(simulator),
                Err(error) => return tell.send(Err(error)),
            }
        }
        tell.send(Ok(running.iter().map(|simulator| simulator.base_url()).collect()))?;
        std::future::pending().await
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("demo-endpoints".into()).spawn(move || runtime.block_on(serve))?;
    told.recv().unwrap_or_else(|_| Err(std::io::Error::other("their thread ended")))
}

fn endpoints() -> [Options; 3] {
    let words = Behaviour { events: 12, ..Behaviour::default() };
    let named = |name: &str, default| Options {
        name: name.into(),
        models: vec!["demo-model".into()],
        default,
        ..Options::default()
    };
    [
        named("steady", Behaviour { chunk_delay_ms: 20, ..words.clone() }),
        named("slow", Behaviour { header_delay_ms: 400, chunk_delay_ms: 150, ..words.clone() }),
        Options { failure_rate_percent: 60, ..named("flaky", words) },
    ]
}

fn prepare(bases: &[String], port: u16) -> Result<(Banner, Prepared), String> {
    let names = ["Healthy", "Slow, streams", "Fails often"];
    let apis: Vec<_> = bases
        .iter()
        .zip(["steady", "slow", "flaky"])
        .zip(names)
        .map(|((base, id), name)| {
            json!({
                "id": id, "name": name, "baseUrl": base, "apiKey": format!("sk-demo-{id}"),
                "models": ["demo-model"], "modelMapping": { "gpt-4o-mini": "demo-model" },
            })
        })
        .collect();
    // Ten minutes of cool-down would make a dull demo.
    let server = json!({
        "host": "127.0.0.1", "port": port, "apiKey": CLIENT_KEY, "adminKey": ADMIN_KEY, "breaker": { "coolDownSeconds": 10 },
        "ledger": ledger_folder().join("ledger.db"),
    });
    let text = json!({ "server": server, "apis": apis }).to_string();
    let environment =
        if port == 0 { Environment::default() } else { Environment::from_process(Path::new(""), &Flags::default()) };
    let Loaded { config, .. } =
        config::check_str(&text, Format::Json, &environment, Path::new("")).map_err(|problems| problems.to_string())?;
    let banner = Banner::new(&config).with_keys_shown(CLIENT_KEY, ADMIN_KEY);
    let options = RunOptions { runtime_folder: PathBuf::from("run"), ..RunOptions::default() };
    let prepared = Prepared::new(config, &options).map_err(|error| error.to_string())?;
    Ok((banner, prepared))
}

/// A demo leaves nothing where it is started; its counts go with the machine's temporary files.
fn ledger_folder() -> PathBuf {
    std::env::temp_dir().join(format!("api-together-demo-{}", std::process::id()))
}

fn samples(port: u16) -> String {
    let call = |extra: &str| {
        format!(
            "curl -{extra}s http://127.0.0.1:{port}/v1/chat/completions -H 'Authorization: Bearer {CLIENT_KEY}' \
             -H 'Content-Type: application/json' -d '{{\"model\":\"gpt-4o-mini\",{stream}\
             \"messages\":[{{\"role\":\"user\",\"content\":\"Hello\"}}]}}'",
            stream = if extra.is_empty() { "" } else { "\"stream\":true," },
        )
    };
    format!(
        "\nTry it. Failover hides the failures of an endpoint; the log shows them:\n\n{}\n\n{}\n\n\
         curl -s http://127.0.0.1:{port}/v1/status -H 'Authorization: Bearer {CLIENT_KEY}'\n",
        call(""),
        call("N"),
    )
}
