//! Configs for the tests of other modules, written as their files are, with what a test does not care about filled in.

use std::path::Path;

use serde_json::{Value, json};

use super::{Config, Environment, Format, Server, check_str};

/// A config of these endpoints; id, key and address are made up where they are left out.
pub(crate) fn config(apis: &str) -> Config {
    let mut apis: Value = serde_json::from_str(apis).unwrap();
    for (index, api) in apis.as_array_mut().unwrap().iter_mut().enumerate() {
        let api = api.as_object_mut().unwrap();
        api.entry("id").or_insert_with(|| json!(format!("api{index}")));
        api.entry("baseUrl").or_insert_with(|| json!("http://127.0.0.1:9"));
        if !api.contains_key("apiKeys") {
            api.entry("apiKey").or_insert_with(|| json!("sk-endpoint-key"));
        }
    }
    if apis.as_array().unwrap().is_empty() {
        apis = json!([{ "id": "only", "baseUrl": "http://127.0.0.1:9", "apiKey": "sk-endpoint-key" }]);
    }
    load(&json!({ "server": { "apiKey": "sk-client-key" }, "apis": apis }))
}

/// A config of these endpoints, as [`config`], with these settings of the server.
pub(crate) fn config_of(settings: &Value, apis: &str) -> Config {
    Config { server: server(&settings.to_string()), ..config(apis) }
}

/// The server part of a config with these settings.
pub(crate) fn server(settings: &str) -> Server {
    let mut server: Value = serde_json::from_str(settings).unwrap();
    server.as_object_mut().unwrap().entry("apiKey").or_insert_with(|| json!("sk-client-key"));
    load(&json!({ "server": server, "apis": [{ "id": "a", "baseUrl": "http://127.0.0.1:9", "apiKey": "sk-endpoint-key" }] }))
        .server
}

/// What is wrong with such a config.
pub(crate) fn problems_of(settings: &Value) -> String {
    let mut server = settings.clone();
    server.as_object_mut().unwrap().entry("apiKey").or_insert_with(|| json!("sk-client-key"));
    let api = json!({ "id": "a", "baseUrl": "http://127.0.0.1:9", "apiKey": "sk-endpoint-key" });
    let file = json!({ "server": server, "apis": [api] });
    let environment = Environment::fixed::<&str, &str>([]);
    check_str(&file.to_string(), Format::Json, &environment, Path::new("")).unwrap_err().to_string()
}

fn load(file: &Value) -> Config {
    let environment = Environment::fixed::<&str, &str>([]);
    check_str(&file.to_string(), Format::Json, &environment, Path::new("")).unwrap().config
}
