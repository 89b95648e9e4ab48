use std::path::Path;

use super::*;
use crate::config::{Environment, check_str};

/// The config that a fixture becomes, which has to be a good one once its variables are set.
fn imported(name: &str) -> (Value, Vec<String>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/config/foreign").join(name);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(!text.contains("${"), "the fixture has keys");
    let Imported { config, notes } = import(&text, Format::from_path(&path)).unwrap();
    let shown = config.to_string();
    assert!(!shown.contains("sk-secret") && !notes.concat().contains("sk-secret"), "{shown} {notes:?}");
    let names: Vec<String> =
        shown.split("${").skip(1).filter_map(|rest| rest.split_once('}')).map(|(name, _)| name.to_owned()).collect();
    let environment = Environment::fixed(names.into_iter().map(|name| (name, "sk-0123456789abcdefghij")));
    check_str(&shown, Format::Json, &environment, Path::new(""))
        .unwrap_or_else(|problems| panic!("{problems}\n{config:#}"));
    // What it is recognised as is said by `check` as well.
    let problems = check_str(&text, Format::from_path(&path), &environment, Path::new("")).unwrap_err().to_string();
    assert!(problems.contains("api-together import FILE"), "{problems}");
    (config, notes)
}

fn api<'a>(config: &'a Value, id: &str) -> &'a Value {
    let apis = config["apis"].as_array().unwrap();
    apis.iter().find(|api| api["id"] == id).unwrap_or_else(|| panic!("{id} is not in {config:#}"))
}

#[test]
fn a_config_of_lite_llm() {
    let (config, notes) = imported("litellm.yaml");
    assert_eq!(
        config["server"],
        json!({ "apiKey": "${CLIENT_API_KEY}", "strategy": "least_busy", "breaker": { "failures": 2, "coolDownSeconds": 30 }, "retry": { "attempts": 4 } })
    );
    let openai = api(&config, "openai");
    assert_eq!(
        (&openai["baseUrl"], &openai["apiKey"]),
        (&json!("https://api.openai.com"), &json!("${OPENAI_API_KEY}"))
    );
    assert_eq!((&openai["models"], &openai["modelMapping"]), (&json!(["gpt-4o"]), &json!({ "fast": "gpt-4o-mini" })));
    assert_eq!(openai["modelLimits"], json!({ "gpt-4o": { "rpm": 60, "tpm": 100_000 } }));
    let second = api(&config, "openai-2");
    assert_eq!((&second["apiKey"], &second["rpm"]), (&json!("${OPENAI_2_API_KEY}"), &json!(10)));
    let azure = api(&config, "azure");
    assert_eq!(azure["baseUrl"], "https://me.openai.azure.com/openai/deployments/gpt-4o-eu");
    assert_eq!(
        (&azure["query"], &azure["headers"]),
        (&json!({ "api-version": "2024-10-21" }), &json!({ "api-key": "${AZURE_API_KEY}" }))
    );
    assert_eq!(api(&config, "perplexity")["versionPath"], "none");
    let llama = api(&config, "openai-3");
    assert_eq!(
        llama["modelMapping"],
        json!({ "llama": "meta-llama/Llama-3-70b" }),
        "a slash may be a part of the name"
    );
    assert_eq!(llama["headers"], json!({ "OpenAI-Organization": "${ORGANIZATION}" }));
    let notes = notes.join("\n");
    for says in [
        "OPENAI_2_API_KEY=",
        "claude-bedrock",
        "does not speak OpenAI's format",
        "database_url",
        "callbacks",
        "mock_response",
    ] {
        assert!(notes.contains(says), "{says} is not in {notes}");
    }
}

#[test]
fn a_config_of_uni_api() {
    let (config, notes) = imported("uni-api.yaml");
    assert_eq!(config["server"]["apiKey"], "${CLIENT_API_KEY}");
    let first = api(&config, "relay");
    assert_eq!((&first["baseUrl"], &first["models"]), (&json!("https://api.relay.example/v1"), &json!(["gpt-4o"])));
    assert_eq!(first["modelMapping"], json!({ "claude": "claude-3-5-sonnet-20240620" }));
    assert_eq!(api(&config, "relay-2")["apiKey"], "${RELAY_2_API_KEY}");
    assert_eq!(api(&config, "all")["models"], json!(["*"]));
    let notes = notes.join("\n");
    for says in ["2 of the api_keys", "names no models", "preferences are left out", "providers[2]"] {
        assert!(notes.contains(says), "{says} is not in {notes}");
    }
}

#[test]
fn channels_of_one_api() {
    let (config, notes) = imported("one-api.json");
    let main = api(&config, "OpenAI-主");
    assert_eq!(
        (&main["baseUrl"], &main["models"], &main["modelMapping"]),
        (&json!("https://api.openai.com"), &json!(["gpt-4o"]), &json!({ "gpt-3.5-turbo": "gpt-4o-mini" }))
    );
    assert_eq!((&main["priority"], &main["weight"]), (&json!(990), &json!(3)));
    assert_eq!(api(&config, "OpenAI-主-2")["baseUrl"], "https://api.openai.com");
    let off = api(&config, "relay");
    assert_eq!((&off["enabled"], &off["baseUrl"]), (&json!(false), &json!("https://relay.example")));
    assert!(notes.join("\n").contains("Azure needs a baseUrl for each deployment"), "{notes:?}");
}

#[test]
fn two_keys_never_share_a_variable() {
    let (config, _) = imported("one-api.json");
    let keys = ["主力", "备用", "再备"].map(|id| api(&config, id)["apiKey"].as_str().unwrap());
    assert_eq!(keys, ["${ENDPOINT_API_KEY}", "${ENDPOINT_API_KEY_2}", "${ENDPOINT_API_KEY_2}"], "the last two are one");
    // A name that the file means already is not made up again.
    let taken = r#"{"model_list":[
        {"model_name":"a","litellm_params":{"model":"openai/a","api_key":"sk-secret-literal"}},
        {"model_name":"b","litellm_params":{"model":"groq/b","api_key":"os.environ/OPENAI_API_KEY"}}]}"#;
    let Imported { config, .. } = import(taken, Format::Json).unwrap();
    assert_eq!(api(&config, "openai")["apiKey"], "${OPENAI_API_KEY_2}");
    assert_eq!(api(&config, "groq")["apiKey"], "${OPENAI_API_KEY}");
}

#[test]
fn a_channels_address_is_what_stands_before_the_version() {
    let (config, _) = imported("one-api.json");
    let urls = ["主力", "备用", "再备"].map(|id| api(&config, id)["baseUrl"].as_str().unwrap());
    assert!(urls[0].starts_with("https://generativelanguage.googleapis.com/v1beta/openai"), "{urls:?}");
    assert_eq!(urls[1..], ["https://relay.example/openai/v1", "https://relay.example/api/v4"]);
}

#[test]
fn what_is_no_such_file_is_refused() {
    for (text, says) in
        [("{\"a\":1}", "is no file of a program"), ("version: 1\n", "is no file of a program"), ("[", "is not valid")]
    {
        let format = if text.starts_with('v') { Format::Yaml } else { Format::Json };
        assert!(import(text, format).unwrap_err().to_string().contains(says), "{text}");
    }
}
