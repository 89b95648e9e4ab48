//! The configuration as a whole: fixtures, defaults, secrets, and any text at all.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::{Just, any, prop, prop_assert, prop_oneof, proptest};
use proptest::strategy::Strategy as _;
use serde_json::{Value, json};

use super::*;

/// The least that is complete.
fn minimal() -> Value {
    json!({
        "server": { "apiKey": "sk-c1a7e4f09b2d8356" },
        "apis": [{ "id": "a", "baseUrl": "https://api.example.com", "apiKey": "sk-abc", "models": ["*"] }]
    })
}

/// The minimal configuration with other keys in `server` and in the one endpoint.
fn with(server: &Value, endpoint: &Value) -> Value {
    let mut config = minimal();
    for (place, keys) in [("/server", server), ("/apis/0", endpoint)] {
        let place = config.pointer_mut(place).unwrap();
        for (key, value) in keys.as_object().unwrap() {
            place[key] = value.clone();
        }
    }
    config
}

fn checked(config: &Value, environment: &Environment) -> Result<Loaded, Problems> {
    check_str(&config.to_string(), Format::Json, environment, Path::new(""))
}

fn no_variables() -> Environment {
    Environment::fixed::<&str, &str>([])
}

/// Vendors and servers with an example each, in the order of their files.
const VENDORS: [&str; 18] = [
    "ark",
    "azure",
    "cerebras",
    "dashscope",
    "deepseek",
    "gemini",
    "groq",
    "llamacpp",
    "lmstudio",
    "mistral",
    "moonshot",
    "ollama",
    "openai",
    "openrouter",
    "siliconflow",
    "vllm",
    "xai",
    "zhipu",
];

/// The object at this place, which is made if it is not there, with the lists and objects around it.
fn place_of<'a>(config: &'a mut Value, place: &str) -> &'a mut Value {
    let steps: Vec<&str> = place.split('/').skip(1).collect();
    steps.iter().enumerate().fold(config, |at, (number, step)| {
        if *step == "0" {
            return &mut at[0];
        }
        let is_list = steps.get(number + 1) == Some(&"0");
        if at.get(*step).is_none() {
            at[*step] = if is_list { json!([{}]) } else { json!({}) };
        }
        &mut at[*step]
    })
}

/// The variables that the examples name.
fn of_the_examples() -> Environment {
    let names = ["API_TOGETHER_KEY", "OPENAI_API_KEY", "SECOND_OPENAI_API_KEY", "GEMINI_API_KEY", "ARK_API_KEY"];
    Environment::fixed(names.map(|name| (name, "sk-7d1f93a8c05e42b67d1f93a8")))
}

fn config_of(config: &Value) -> Config {
    checked(config, &no_variables()).unwrap().config
}

fn crate_folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The files of a folder that hold configurations, by name.
fn config_files(folder: &str) -> Vec<PathBuf> {
    let is_config = |path: &PathBuf| path.extension().is_some_and(|e| e == "json" || e == "yaml" || e == "yml");
    let mut files: Vec<_> =
        std::fs::read_dir(crate_folder(folder)).unwrap().map(|entry| entry.unwrap().path()).filter(is_config).collect();
    files.sort();
    files
}

mod fixtures {
    use super::*;

    /// One line for each problem, as in the `.expected` files.
    fn told(text: &str, format: Format) -> String {
        let environment =
            Environment::fixed([("WORD", "sk-word-from-the-environment"), ("NUMBER", "5"), ("EMPTY", "")]);
        let problems = match check_str(text, format, &environment, &crate_folder("tests/fixtures/config")) {
            Ok(loaded) => loaded.warnings,
            Err(problems) => problems.iter().cloned().collect(),
        };
        let lines = problems.iter().map(|problem| format!("{:?}: {problem}", problem.kind));
        lines.collect::<Vec<_>>().join("\n") + "\n"
    }

    #[test]
    fn each_bad_file_is_told_in_exactly_the_expected_words() {
        let files = config_files("tests/fixtures/config/bad");
        assert!(files.len() >= 40, "only {} fixtures found", files.len());
        let mut different = Vec::new();
        for file in files {
            let name = file.file_name().unwrap().to_str().unwrap();
            let expected = std::fs::read_to_string(file.with_file_name(format!("{name}.expected"))).unwrap_or_default();
            let found = told(&std::fs::read_to_string(&file).unwrap(), Format::from_path(&file));
            assert!(found.contains(": "), "{name} is not bad");
            // To look through with git diff, after messages have changed on purpose.
            if std::env::var_os("UPDATE_EXPECTED").is_some() {
                std::fs::write(file.with_file_name(format!("{name}.expected")), &found).unwrap();
            } else if found != expected {
                different.push(format!("== {name}: expected\n{expected}== found\n{found}"));
            }
        }
        assert!(different.is_empty(), "{}", different.concat());
    }

    #[test]
    fn no_message_quotes_a_key() {
        for file in config_files("tests/fixtures/config/bad") {
            let found = told(&std::fs::read_to_string(&file).unwrap(), Format::from_path(&file));
            for key in ["sk-", "12345678", "123456", "put-it-here", "ключ"] {
                assert!(!found.contains(key), "{}: {found}", file.display());
            }
        }
    }

    #[test]
    fn files_of_the_old_program_load() {
        let files = config_files("tests/fixtures/config/legacy");
        assert!(files.len() >= 3, "only {} fixtures found", files.len());
        for file in files {
            let loaded = load(&file, &no_variables()).unwrap_or_else(|problems| panic!("{problems}"));
            let [first, second, ..] = loaded.config.endpoints.as_slice() else { panic!("too few") };
            assert_eq!(&*first.name, "OpenAI官方API");
            assert_eq!(&*second.name, "备用API端点");
            assert_eq!((first.limits.rpm, first.limits.rpd), (Limit::AtMost(60), Limit::AtMost(1000)));
            assert_eq!(first.model_mapping["gpt-3.5"], "gpt-3.5-turbo");
            assert_eq!(second.limits.rpd, Limit::AtMost(500));
            assert_eq!(second.base_url.to_string(), "https://your-backup-api.com");
            assert_eq!(second.models, ["claude-2", "claude-instant-1"]);
            assert!(loaded.config.server.api_key.unwrap().matches(b"sk-123"));
        }
    }

    #[test]
    fn odd_spellings_of_the_old_program_mean_the_same() {
        let file = crate_folder("tests/fixtures/config/legacy/variants.json");
        let config = load(&file, &no_variables()).unwrap().config;
        let [_, second, third, fourth] = config.endpoints.as_slice() else { panic!("not four") };
        assert!(!second.usable() && second.limits.rpm == Limit::Off);
        assert_eq!((third.limits.rpm, third.limits.rpd), (Limit::AtMost(100), Limit::Unlimited));
        assert_eq!((&*fourth.name, fourth.limits.rpm), ("api4", Limit::AtMost(1000)));
    }

    #[test]
    fn the_examples_pass_check() {
        let files = config_files("conf");
        let files: Vec<_> = files.iter().filter(|f| f.to_string_lossy().contains("example")).collect();
        assert!(files.len() >= 2, "only {} examples found", files.len());
        for file in files {
            let loaded = load(file, &of_the_examples()).unwrap_or_else(|problems| panic!("{problems}"));
            assert_eq!(loaded.warnings, Vec::new(), "{}", file.display());
        }
    }
}

#[test]
fn the_vendors_examples_pass_check_and_each_has_its_sources() {
    let files = config_files("conf/examples");
    let sources = std::fs::read_dir(crate_folder("conf/examples")).unwrap().count() - files.len();
    assert_eq!((files.len(), sources), (VENDORS.len(), VENDORS.len()));
    for (file, vendor) in files.iter().zip(VENDORS) {
        assert!(file.ends_with(format!("{vendor}.json")), "{}", file.display());
        let text = std::fs::read_to_string(file).unwrap();
        let names = text.match_indices("${").filter_map(|(at, _)| text[at + 2..].split('}').next());
        let environment = Environment::fixed(names.map(|name| (name, "sk-7d1f93a8c05e42b67d1f93a8")));
        let loaded = load(file, &environment).unwrap_or_else(|problems| panic!("{vendor}: {problems}"));
        assert_eq!(loaded.warnings, Vec::new(), "{vendor}");
        let sources = std::fs::read_to_string(file.with_extension("md")).unwrap();
        for endpoint in &loaded.config.endpoints {
            let host = &endpoint.base_url.host;
            assert!(host == "127.0.0.1" || sources.contains(host), "{vendor}: its page does not name {host}");
            let has_limits = endpoint.limits.each().any(|(_, limit)| limit != Limit::Unlimited);
            for (kind, _) in endpoint.limits.each().filter(|(_, limit)| *limit != Limit::Unlimited) {
                assert!(sources.contains(kind.key()), "{vendor}: its page does not say where {} is from", kind.key());
            }
            assert!(!has_limits || sources.contains("https://"), "{vendor}: its limits have no source");
        }
    }
}

#[test]
fn what_is_left_out_has_its_default() {
    let Config { server, endpoints } = config_of(&minimal());
    assert_eq!((server.host, server.port), (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 3001));
    assert_eq!((server.tls, server.cors.origins), (None, vec!["*".to_owned()]));
    assert_eq!((server.body_bytes_max, server.strategy), (64 << 20, Strategy::Random));
    assert_eq!((server.retry.attempts, server.retry.budget), (10, Duration::from_mins(2)));
    assert_eq!(server.retry.statuses, StatusSet::default());
    assert_eq!((server.breaker.failures, server.breaker.cool_down), (3, Duration::from_mins(10)));
    assert_eq!(server.threads, std::thread::available_parallelism().unwrap().get());
    assert_eq!((server.trusted_proxies, server.failed_keys_per_minute), (vec![], 30));
    assert!(server.endpoint_headers);

    let [endpoint] = endpoints.as_slice() else { panic!("not one") };
    assert_eq!((&*endpoint.id, &*endpoint.name), ("a", "a"));
    assert_eq!((endpoint.limits.rpm, endpoint.limits.rpd), (Limit::Unlimited, Limit::Unlimited));
    assert!(endpoint.enabled && endpoint.usable());
    assert_eq!((endpoint.weight, endpoint.priority, endpoint.http2), (1, 0, None));
    assert!(endpoint.model_mapping.is_empty() && endpoint.headers.is_empty());
    assert_eq!(endpoint.tls, EndpointTls::default());
    let seconds = |seconds| Duration::from_secs(seconds);
    let Timeouts { connect, first_byte_stream, first_byte, thinking, idle } = endpoint.timeouts;
    assert_eq!((connect, first_byte_stream), (seconds(5), seconds(60)));
    assert_eq!((first_byte, thinking, idle), (seconds(600), seconds(600), seconds(120)));
}

#[test]
fn what_the_schema_calls_a_default_is_one() {
    let defaults = |schema: &Value| -> Value {
        let keys = schema.as_object().unwrap().iter();
        keys.filter_map(|(key, inner)| Some((key.clone(), inner.get("default")?.clone()))).collect()
    };
    let schema = schema();
    let at = |place: &str| defaults(schema.pointer(place).unwrap());
    let mut server = at("/properties/server/properties");
    let mut endpoint = at("/properties/apis/items/properties");
    for (key, inner) in [("retry", true), ("breaker", true), ("cors", true), ("timeouts", false), ("tls", false)] {
        let (outer, place) = if inner {
            (&mut server, format!("/properties/server/properties/{key}/properties"))
        } else {
            (&mut endpoint, format!("/properties/apis/items/properties/{key}/properties"))
        };
        outer[key] = at(&place);
    }
    assert_eq!(server["retry"]["attempts"], 10);
    assert_eq!(endpoint["timeouts"]["connectMs"], 5000);
    assert_eq!(config_of(&with(&server, &endpoint)), config_of(&minimal()));
}

#[test]
fn the_full_example_is_read_as_written() {
    let config = load(&crate_folder("conf/apis.example.yaml"), &of_the_examples()).unwrap().config;
    let server = &config.server;
    assert_eq!((server.strategy, server.retry.attempts), (Strategy::LeastBusy, 5));
    assert!(server.retry.statuses.contains(599) && !server.retry.statuses.contains(400));
    assert!(server.trusted_proxies.iter().any(|range| range.contains("10.9.9.9".parse().unwrap())));
    assert!(server.cors.allows("https://chat.example.com") && !server.cors.allows("https://evil.example.com"));
    let [main, _, ark, local] = config.endpoints.as_slice() else { panic!("not four") };
    assert_eq!((main.weight, main.models[0].as_str()), (3, "gpt-4*"));
    assert_eq!(main.headers[0].0, "openai-organization");
    assert_eq!(main.headers[0].1, "org-example");
    assert_eq!((ark.priority, ark.base_url.path.as_str()), (1, "/api/v3"));
    assert_eq!(ark.timeouts.first_byte, Duration::from_secs(90));
    assert_eq!(ark.timeouts.first_byte_stream, Duration::from_secs(90));
    assert_eq!((ark.timeouts.connect, ark.timeouts.idle), (Duration::from_secs(3), Duration::from_mins(1)));
    assert_eq!((local.http2, local.base_url.port), (Some(false), 11434));
}

#[test]
fn hosts_are_addresses_or_localhost() {
    let host = |host: &str| config_of(&with(&json!({ "host": host }), &json!({}))).server.host;
    assert_eq!(host("localhost"), IpAddr::V4(Ipv4Addr::LOCALHOST));
    assert_eq!(host("[::]"), IpAddr::V6(Ipv6Addr::UNSPECIFIED));
    assert_eq!(host("::1"), IpAddr::V6(Ipv6Addr::LOCALHOST));
}

#[test]
fn limits_say_what_they_were() {
    for (typed, limit, usable) in [(-1, Limit::Unlimited, true), (0, Limit::Off, false), (7, Limit::AtMost(7), true)] {
        for key in ["rpm", "rpd"] {
            let config = config_of(&with(&json!({}), &json!({ key: typed })));
            let endpoint = &config.endpoints[0];
            let found = if key == "rpm" { endpoint.limits.rpm } else { endpoint.limits.rpd };
            assert_eq!((found, found.as_number(), endpoint.usable()), (limit, typed, usable));
        }
    }
    assert_eq!(Limit::AtMost(u64::MAX).as_number(), i64::MAX);
    assert!(!config_of(&with(&json!({}), &json!({ "enabled": false }))).endpoints[0].usable());
}

#[test]
fn cors_can_be_switched_off() {
    let config = config_of(&with(&json!({ "cors": { "origins": [] } }), &json!({})));
    assert!(!config.server.cors.any() && !config.server.cors.allows("https://a.example"));
    assert!(config_of(&minimal()).server.cors.allows("https://a.example"));
    let config = config_of(&with(&json!({ "cors": { "origins": ["https://A.example:8080"] } }), &json!({})));
    assert!(config.server.cors.allows("https://a.example:8080"));
}

#[test]
fn files_are_found_beside_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["cert.pem", "key.pem", "ca.pem"] {
        std::fs::write(folder.path().join(name), "PEM").unwrap();
    }
    let config = with(
        &json!({ "tls": { "certFile": "cert.pem", "keyFile": "key.pem" } }),
        &json!({ "tls": { "caFile": folder.path().join("ca.pem") } }),
    );
    let path = folder.path().join("apis.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let config = load(&path, &no_variables()).unwrap().config;
    let tls = config.server.tls.unwrap();
    assert_eq!(tls.cert_file, folder.path().join("cert.pem"));
    assert_eq!(tls.key_file, folder.path().join("key.pem"));
    assert_eq!(config.endpoints[0].tls.ca_file, Some(folder.path().join("ca.pem")));
}

mod variables {
    use super::*;

    #[test]
    fn they_are_filled_in_and_read_as_what_is_wanted() {
        let config = with(
            &json!({ "apiKey": "${KEY}", "endpointHeaders": "${NO}" }),
            &json!({ "rpm": "${COUNT}", "name": "${COUNT}", "headers": { "x-key": "a${KEY}" } }),
        );
        let environment = Environment::fixed([("KEY", "sk-1"), ("COUNT", "7"), ("NO", "false")]);
        let Config { server, endpoints } = checked(&config, &environment).unwrap().config;
        assert!(server.api_key.as_ref().unwrap().matches(b"sk-1") && !server.endpoint_headers);
        assert_eq!((endpoints[0].limits.rpm, &*endpoints[0].name), (Limit::AtMost(7), "7"));
        assert_eq!(endpoints[0].headers[0].1, "ask-1");
    }

    #[test]
    fn a_key_that_can_be_guessed_is_warned_of_and_taken() {
        let warnings = |key: &str| {
            let loaded = checked(&with(&json!({ "apiKey": key }), &json!({})), &no_variables()).unwrap();
            assert_eq!(loaded.config.server.api_key.unwrap().expose(), key);
            loaded.warnings.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        for (weak, why) in [
            ("sk-123", "only 3 long without its prefix"),
            ("hunter2", "only 7 long"),
            ("sk-PASSWORD-of-our-team-1", "common word"),
            ("changeme-changeme-changeme", "common word"),
            ("sk-12345678901234567890", "common word or sequence"),
            ("aaaaaaaaaaaaaaaaaaaaaaaa", "1 different characters"),
            ("sk-ababababababababcdcd", "different characters"),
        ] {
            let told = warnings(weak);
            assert_eq!(told.len(), 1, "{weak}: {told:?}");
            assert!(told[0].contains("server.apiKey: can be guessed: ") && told[0].contains(why), "{told:?}");
            assert!(!told[0].contains(weak), "it quotes the key: {told:?}");
        }
        for strong in [
            "sk-9f2c4b7e1a6d8305c4e1",
            "8a7c1f0e3b5d9264a1c3e5f7",
            "sk-at-Zk3vQ9mB2xT7nL5wR8yH",
            "correct horse battery",
        ] {
            assert_eq!(warnings(strong), Vec::<String>::new(), "{strong}");
        }
    }

    #[test]
    fn port_wins_over_the_file() {
        let config = with(&json!({ "port": 4000 }), &json!({}));
        let port = |value: &str| checked(&config, &Environment::fixed([("PORT", value)]));
        assert_eq!(port("5000").unwrap().config.server.port, 5000);
        assert_eq!(port("").unwrap().config.server.port, 4000);
        for bad in ["70000", "http", "-1"] {
            assert_eq!(
                port(bad).unwrap_err().to_string(),
                format!(
                    "line 1: server.port: PORT from the environment is \"{bad}\", not a port from 0 to 65535 \
                     (PORT wins over server.port; correct it or unset it)"
                )
            );
        }
    }

    #[test]
    fn a_bad_port_names_the_file_it_comes_from() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("apis.json");
        let env_file = folder.path().join(".env");
        std::fs::write(&path, minimal().to_string()).unwrap();
        std::fs::write(&env_file, "PORT=abc\nnot a line\n").unwrap();
        let problems = load(&path, &Environment::from_process(&path, &Flags::default())).unwrap_err();
        let told = problems.to_string();
        assert!(told.contains(&format!("PORT from {} is \"abc\"", env_file.display())), "{told}");
        assert!(told.contains(&format!("{}:2: is not", env_file.display())), "{told}");
        std::fs::write(&env_file, "PORT=5001\nnot a line\n").unwrap();
        let loaded = load(&path, &Environment::from_process(&path, &Flags::default())).unwrap();
        assert_eq!((loaded.config.server.port, loaded.warnings.len()), (5001, 1));
    }
}

mod files {
    use super::*;

    fn told(path: &Path) -> String {
        load(path, &no_variables()).unwrap_err().to_string()
    }

    #[test]
    fn a_missing_file_comes_with_the_way_out() {
        let path = Path::new("no/such/apis.json");
        assert_eq!(
            told(path),
            "no/such/apis.json: cannot be read: No such file or directory (os error 2) (copy \
             conf/apis.example.json to no/such/apis.json, or name another file with --config)"
        );
    }

    #[test]
    fn problems_of_the_whole_text_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("apis.json");
        let shown = path.display();
        std::fs::write(&path, "{\n  \"server\": }").unwrap();
        let expected = "is not valid JSON: expected value at line 2 column 13\n    \"server\": }\n              ^";
        assert_eq!(told(&path), format!("{shown}:2: {expected}"));
        std::fs::write(&path, b"{\"server\": \"\xff\"}").unwrap();
        assert_eq!(told(&path), format!("{shown}: is not UTF-8 text (save it as UTF-8 in your editor)"));
        std::fs::File::create(&path).unwrap().set_len(FILE_BYTES_MAX + 1).unwrap();
        assert_eq!(told(&path), format!("{shown}: is longer than 16777216 bytes"));
    }

    #[test]
    fn the_ending_tells_the_format() {
        for name in ["a.yaml", "a.yml", "a.YML"] {
            assert_eq!(Format::from_path(Path::new(name)), Format::Yaml);
        }
        for name in ["a.json", "a", "a.yaml.json", ".yaml"] {
            assert_eq!(Format::from_path(Path::new(name)), Format::Json);
        }
    }
}

#[test]
fn printing_a_configuration_shows_no_secret() {
    let config = with(
        &json!({ "apiKey": "server-0123456789-key" }),
        &json!({ "apiKey": "endpoint-0123456789-key", "headers": { "x-key": "header-0123456789", "authorization": "Basic abc" } }),
    );
    let loaded = checked(&config, &no_variables()).unwrap();
    assert_eq!(loaded.config.endpoints[0].headers.len(), 2);
    for printed in [format!("{loaded:?}"), format!("{loaded:#?}")] {
        assert!(printed.contains("x-key") && printed.contains("api.example.com"), "{printed}");
        for secret in ["0123456789", "Basic", "header-"] {
            assert!(!printed.contains(secret), "{printed}");
        }
    }
}

#[test]
fn two_configurations_can_be_told_apart() {
    let config = config_of(&minimal());
    assert_eq!(config, config_of(&minimal()));
    assert_ne!(config, config_of(&with(&json!({}), &json!({ "apiKey": "sk-other" }))));
    assert_ne!(config, config_of(&with(&json!({}), &json!({ "headers": { "x": "1" } }))));
}

/// A value that the schema accepts must be readable by the types; else a problem without a place would be reported.
fn assert_placed(result: &Result<Loaded, Problems>, config: &Value) {
    if let Err(problems) = result {
        assert!(problems.iter().all(|problem| !problem.path.is_empty()), "{problems}\n{config}");
    }
}

#[test]
fn the_schema_and_the_types_agree_at_every_bound() {
    let mut values = vec![json!(null), json!(true), json!(1.5), json!(""), json!("text"), json!([]), json!({})];
    values.extend([json!([1]), json!([{}]), json!(["5xx"]), json!({ "a": "b" }), json!({ "a": 1 })]);
    for bound in [0, 1, 255, 65_535, 1 << 30, u64::from(u32::MAX), (1 << 53) - 1, u64::MAX] {
        values.extend([json!(bound), json!(bound.saturating_add(1))]);
    }
    values.extend([json!(-1), json!(-2), json!(i64::MIN), json!(1e300), json!(399), json!(600)]);
    let schema = schema();
    let mut tried = 0;
    let mut pending = vec![(schema.clone(), String::new())];
    while let Some((schema, place)) = pending.pop() {
        let Some(properties) = schema.get("properties").and_then(Value::as_object) else {
            continue;
        };
        for (key, inner) in properties {
            for value in &values {
                let mut config = minimal();
                place_of(&mut config, &place)[key] = value.clone();
                assert_placed(&checked(&config, &no_variables()), &config);
                tried += 1;
            }
            pending.push((inner.clone(), format!("{place}/{key}")));
            if let Some(items) = inner.get("items") {
                pending.push((items.clone(), format!("{place}/{key}/0")));
            }
        }
    }
    assert!(tried > 1000, "{tried}");
}

fn any_json() -> impl proptest::strategy::Strategy<Value = Value> {
    let key = prop_oneof!["server|apis|apiKey|id|baseUrl|models|tls|retry|statuses|headers|rpm", "\\PC{0,6}"];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
        "[$]{1,2}[{]?[A-Z]{0,3}[}]?".prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 40, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..6)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

#[test]
fn in_json_two_angles_are_a_key_like_any_other() {
    let config = json!({ "server": null, "apis": [{ "<<": null }] });
    assert_placed(&checked(&config, &no_variables()), &config);
}

proptest! {
    #[test]
    fn any_value_is_answered_with_places(server in any_json(), endpoint in any_json()) {
        let config = json!({ "server": server, "apis": [endpoint] });
        assert_placed(&checked(&config, &no_variables()), &config);
    }

    #[test]
    fn any_text_is_answered(text in "\\PC{0,60}|[-{}:,\"\\[\\]a \n]{0,40}") {
        for format in [Format::Json, Format::Yaml] {
            let result = check_str(&text, format, &no_variables(), Path::new(""));
            prop_assert!(result.is_err());
        }
    }
}

/// Where the counts are, of a config in this folder, for a service with this folder for its state; and what is said about it.
fn ledger_of(folder: &Path, state: &str) -> (std::path::PathBuf, Vec<String>) {
    let text = r#"{"server":{"apiKey":"sk-c1a7e4f09b2d8356"},"apis":[{"id":"a","baseUrl":"https://a.example","apiKey":"x","models":["m"]}]}"#;
    let environment = Environment::fixed([("STATE_DIRECTORY", state)]);
    let loaded = check_str(text, Format::Json, &environment, folder).unwrap();
    (loaded.config.server.ledger, loaded.warnings.iter().map(ToString::to_string).collect())
}

#[test]
fn the_counts_of_a_service_are_in_its_folder_for_state() {
    let folder = tempfile::tempdir().unwrap();
    let beside = folder.path().join("data/ledger.db");
    assert_eq!(ledger_of(folder.path(), ""), (beside.clone(), vec![]));
    let state = std::path::PathBuf::from("/var/lib/of-it/ledger.db");
    assert_eq!(ledger_of(folder.path(), "/var/lib/of-it:/var/lib/other"), (state, vec![]), "the first of them");
    // What was counted before goes on counting.
    std::fs::create_dir(folder.path().join("data")).unwrap();
    std::fs::write(&beside, "").unwrap();
    let (ledger, warnings) = ledger_of(folder.path(), "/var/lib/of-it");
    assert_eq!(ledger, beside);
    assert!(warnings[0].contains("server.ledger") && warnings[0].contains("/var/lib/of-it/ledger.db"), "{warnings:?}");
}
