//! LiteLLM's `config.yaml`. Deployments with one address and one key are one endpoint.

use serde_json::{Map, Value, json};

use super::{Draft, Endpoint, base_url, number, text, vendors};

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
    let model = text(params, "model").ok_or("it has no litellm_params.model")?;
    let named = text(params, "custom_llm_provider");
    let (provider, sent) = match (named, model.split_once('/')) {
        (Some(provider), _) => (provider, model),
        (None, Some((provider, sent))) => (provider, sent),
        (None, None) => ("openai", model),
    };
    if OTHER_FORMATS.contains(&provider) {
        return Err(format!("{provider} does not speak OpenAI's format"));
    }
    let (url, variable) = match (text(params, "api_base").or(text(params, "base_url")), vendors::of_name(provider)) {
        (Some(theirs), known) => (base_url(theirs), known.map(|(_, variable)| variable)),
        (None, Some((url, variable))) => (url.to_owned(), Some(variable)),
        (None, None) => return Err(format!("it names no api_base, and {provider} is not known here")),
    };
    let mut more = Map::new();
    let url = if provider == "azure" { azure(&url, sent, params, &mut more) } else { url };
    if vendors::is_without_version(&url) {
        more.insert("versionPath".to_owned(), "none".into());
    }
    let mut headers = Map::new();
    if let Some(organization) = text(params, "organization") {
        headers.insert("OpenAI-Organization".to_owned(), organization.into());
    }
    if let Some(Value::Object(_)) = params.get("extra_headers") {
        draft.note(format!("{asked}: extra_headers are left out, since they may hold keys; write them into `headers`"));
    }
    if !headers.is_empty() {
        more.insert("headers".to_owned(), headers.into());
    }
    for (from, to) in [("weight", "weight"), ("order", "priority")] {
        if let Some(number) = number(params.get(from)).filter(|number| *number > 0) {
            more.insert(to.to_owned(), number.into());
        }
    }
    if let Some(seconds) = number(params.get("timeout")).filter(|seconds| *seconds > 0) {
        more.insert("timeouts".to_owned(), json!({ "firstByteMs": seconds * 1000 }));
    }
    let theirs =
        text(params, "api_key").map(str::to_owned).or_else(|| variable.map(|name| format!("os.environ/{name}")));
    let theirs = theirs.unwrap_or_default();
    // One endpoint for all deployments of the same address, key and settings, but each name once.
    let group = format!("{url}\n{theirs}\n{}", Value::from(more.clone()));
    let known = draft.endpoints.iter().position(|endpoint| endpoint.group == group && !endpoint.serves(asked));
    let place = known.unwrap_or_else(|| {
        let id = draft.id(provider);
        let key = draft.key(&theirs, &id);
        if provider == "azure" {
            more.insert("headers".to_owned(), json!({ "api-key": key }));
        }
        draft.endpoints.push(Endpoint { id, base_url: url, key, group, more, ..Endpoint::default() });
        draft.endpoints.len() - 1
    });
    let endpoint = draft.endpoints.get_mut(place).ok_or("it has no place")?;
    endpoint.serve(asked, sent);
    let mut limits = Map::new();
    for (from, to) in [("rpm", "rpm"), ("tpm", "tpm"), ("max_parallel_requests", "maxConcurrent")] {
        if let Some(number) = number(params.get(from)).filter(|number| *number > 0) {
            limits.insert(to.to_owned(), number.into());
        }
    }
    if !limits.is_empty() {
        endpoint.limits.insert(sent.to_owned(), limits);
    }
    let others: Vec<&str> = params
        .as_object()
        .into_iter()
        .flat_map(Map::keys)
        .map(String::as_str)
        .filter(|key| !READ.contains(key))
        .collect();
    if !others.is_empty() {
        draft.note(format!("{asked}: {} of litellm_params are left out", others.join(", ")));
    }
    Ok(())
}

/// Azure has a path for each deployment, and wants its version in the query and the key in a header of its own.
fn azure(url: &str, sent: &str, params: &Value, more: &mut Map<String, Value>) -> String {
    let version = text(params, "api_version").unwrap_or("2024-10-21");
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
    let mut breaker = Map::new();
    for (from, to) in [("allowed_fails", "failures"), ("cooldown_time", "coolDownSeconds")] {
        if let Some(number) = number(router.get(from)).filter(|number| *number > 0) {
            breaker.insert(to.to_owned(), number.into());
        }
    }
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
