//! LiteLLM's `config.yaml`. Deployments with one address and one key are one endpoint.

use serde_json::{Map, Value, json};

use super::{Draft, Endpoint, base_url, number, spelt, text, vendors};

/// Providers that do not speak OpenAI's format.
const OTHER_FORMATS: [&str; 8] =
    ["bedrock", "vertex_ai", "sagemaker", "cohere", "replicate", "huggingface", "watsonx", "azure_ai"];
/// Settings of a deployment that are read.
const READ: [&str; 16] = [
    "model",
    "api_base",
    "base_url",
    "api_key",
    "api_version",
    "rpm",
    "tpm",
    "max_parallel_requests",
    "weight",
    "order",
    "timeout",
    "stream_timeout",
    "organization",
    "extra_headers",
    "custom_llm_provider",
    "tags",
];

pub(super) fn read(file: &Value, draft: &mut Draft) {
    for (index, deployment) in file.get("model_list").and_then(Value::as_array).into_iter().flatten().enumerate() {
        if let Err(why) = deployment_of(deployment, draft) {
            let name = text(deployment, "model_name").unwrap_or("?");
            draft.note(format!("model_list[{index}] ({name}) is left out: {why}"));
        }
    }
    settings(file, draft);
}

fn deployment_of(deployment: &Value, draft: &mut Draft) -> Result<(), String> {
    let asked = text(deployment, "model_name").ok_or("it has no model_name")?;
    let empty = Value::Null;
    let params = deployment.get("litellm_params").unwrap_or(&empty);
    let Target { provider, sent, url, variable } = Target::of(params)?;
    let mut more = settings_of(params);
    let url = if provider == "azure" { azure(&url, sent, params, &mut more) } else { url };
    if vendors::is_without_version(&url) {
        more.insert("versionPath".to_owned(), "none".into());
    }
    let theirs = text(params, "api_key").map(str::to_owned);
    let theirs = theirs.or_else(|| variable.map(|name| format!("os.environ/{name}"))).unwrap_or_default();
    // One endpoint for all deployments of the same address, key and settings, but each name once.
    let group = format!("{url}\n{theirs}\n{}", Value::from(more.clone()));
    let known = draft.endpoints.iter().position(|endpoint| endpoint.group == group && !endpoint.serves(asked));
    let place = known.unwrap_or_else(|| {
        let id = draft.id(provider);
        let key = draft.key(&theirs, &id);
        if provider == "azure" {
            let headers = more.entry("headers").or_insert_with(|| json!({}));
            headers.as_object_mut().map(|headers| headers.insert("api-key".to_owned(), key.clone().into()));
        }
        draft.endpoints.push(Endpoint { id, base_url: url, key, group, more, ..Endpoint::default() });
        draft.endpoints.len() - 1
    });
    let endpoint = draft.endpoints.get_mut(place).ok_or("it has no place")?;
    endpoint.serve(asked, sent);
    let limits = numbers(params, &[("rpm", "rpm"), ("tpm", "tpm"), ("max_parallel_requests", "maxConcurrent")]);
    if !limits.is_empty() {
        endpoint.limits.insert(sent.to_owned(), limits);
    }
    if let Some(Value::Object(_)) = params.get("extra_headers") {
        draft.note(format!("{asked}: extra_headers are left out, since they may hold keys; write them into `headers`"));
    }
    let keys = params.as_object().into_iter().flat_map(Map::keys).map(String::as_str);
    let others: Vec<&str> = keys.filter(|key| !READ.contains(key)).collect();
    if !others.is_empty() {
        draft.note(format!("{asked}: {} of litellm_params are left out", others.join(", ")));
    }
    Ok(())
}

/// Where a deployment is, and the model it is asked for there.
struct Target<'a> {
    provider: &'a str,
    sent: &'a str,
    url: String,
    /// Variable of the key, unless it is named.
    variable: Option<&'static str>,
}

impl<'a> Target<'a> {
    fn of(params: &'a Value) -> Result<Self, String> {
        let model = text(params, "model").ok_or("it has no litellm_params.model")?;
        let (provider, sent) = match (text(params, "custom_llm_provider"), model.split_once('/')) {
            (Some(provider), _) => (provider, model),
            // Otherwise the slash is a part of the model's name.
            (None, Some((provider, sent))) if is_provider(provider) => (provider, sent),
            (None, _) => ("openai", model),
        };
        if OTHER_FORMATS.contains(&provider) {
            return Err(format!("{provider} does not speak OpenAI's format"));
        }
        let known = vendors::of_name(provider);
        match (text(params, "api_base").or(text(params, "base_url")), known) {
            (Some(theirs), known) => Ok(Self {
                provider,
                sent,
                url: base_url(&spelt(theirs)),
                variable: known.map(|(_, variable)| variable),
            }),
            (None, Some((url, variable))) => Ok(Self { provider, sent, url: url.to_owned(), variable: Some(variable) }),
            (None, None) => Err(format!("it names no api_base, and {provider} is not known here")),
        }
    }
}

/// True if LiteLLM takes the word before the first slash of a model for the provider.
fn is_provider(name: &str) -> bool {
    const WITHOUT_ADDRESS: [&str; 6] =
        ["azure", "hosted_vllm", "vllm", "openai_like", "custom_openai", "litellm_proxy"];
    vendors::of_name(name).is_some() || WITHOUT_ADDRESS.contains(&name) || OTHER_FORMATS.contains(&name)
}

/// Settings of a deployment that belong to the whole endpoint here.
fn settings_of(params: &Value) -> Map<String, Value> {
    let mut more = numbers(params, &[("order", "priority")]);
    // Theirs may be fractions; ours are whole, so all are taken a hundred times.
    if let Some(weight) = params.get("weight").and_then(Value::as_f64).filter(|weight| *weight > 0.0) {
        let hundredfold = format!("{:.0}", weight * 100.0).parse().unwrap_or(1_i64).clamp(1, 65_535);
        more.insert("weight".to_owned(), hundredfold.into());
    }
    if let Some(organization) = text(params, "organization") {
        more.insert("headers".to_owned(), json!({ "OpenAI-Organization": spelt(organization) }));
    }
    if let Some(seconds) = number(params.get("timeout")).filter(|seconds| (1..=86_400).contains(seconds)) {
        more.insert("timeouts".to_owned(), json!({ "firstByteMs": seconds * 1000 }));
    }
    more
}

/// Positive numbers, under our names.
fn numbers(from: &Value, names: &[(&str, &str)]) -> Map<String, Value> {
    let positive = |name: &str| number(from.get(name)).filter(|number| *number > 0);
    names.iter().filter_map(|(theirs, ours)| Some(((*ours).to_owned(), positive(theirs)?.into()))).collect()
}

/// Azure has a path for each deployment, and wants its version in the query and the key in a header of its own.
fn azure(url: &str, sent: &str, params: &Value, more: &mut Map<String, Value>) -> String {
    let version = spelt(text(params, "api_version").unwrap_or("2024-10-21"));
    more.insert("query".to_owned(), json!({ "api-version": version }));
    if url.contains("/openai/") { url.to_owned() } else { format!("{url}/openai/deployments/{sent}") }
}

fn settings(file: &Value, draft: &mut Draft) {
    let empty = Value::Null;
    let general = file.get("general_settings").unwrap_or(&empty);
    if let Some(key) = text(general, "master_key") {
        let spelt = draft.key(key, "client");
        draft.server.insert("apiKey".to_owned(), spelt.into());
    }
    let router = file.get("router_settings").unwrap_or(&empty);
    match text(router, "routing_strategy") {
        Some("least-busy") => drop(draft.server.insert("strategy".to_owned(), "least_busy".into())),
        Some("latency-based-routing") => drop(draft.server.insert("strategy".to_owned(), "fastest".into())),
        Some("simple-shuffle") | None => {}
        Some(other) => {
            draft.note(format!("router_settings.routing_strategy {other} has no counterpart; `random` is used"));
        }
    }
    let breaker = numbers(router, &[("allowed_fails", "failures"), ("cooldown_time", "coolDownSeconds")]);
    if !breaker.is_empty() {
        draft.server.insert("breaker".to_owned(), breaker.into());
    }
    let lite = file.get("litellm_settings").unwrap_or(&empty);
    let retries = number(router.get("num_retries")).or_else(|| number(lite.get("num_retries")));
    if let Some(retries) = retries.filter(|retries| (0..100).contains(retries)) {
        draft.server.insert("retry".to_owned(), json!({ "attempts": retries + 1 }));
    }
    for (part, read) in [
        ("general_settings", &["master_key"][..]),
        ("router_settings", &["routing_strategy", "allowed_fails", "cooldown_time", "num_retries"]),
        ("litellm_settings", &["num_retries", "drop_params", "set_verbose"]),
    ] {
        let keys = file.get(part).and_then(Value::as_object).into_iter().flat_map(Map::keys).map(String::as_str);
        let others: Vec<&str> = keys.filter(|key| !read.contains(key)).collect();
        if !others.is_empty() {
            draft.note(format!("{part}: {} left out", others.join(", ")));
        }
    }
}
