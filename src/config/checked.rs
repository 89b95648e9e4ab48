//! The checked configuration: the typed one, converted to types that hold only usable values. All problems are collected
//! before any is reported.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use http::HeaderValue;

use super::check_ordinary;
use super::client_keys::ClientKey;
use super::endpoint::{self, Endpoint};
use super::environment::Environment;
use super::file::{ConfigFile, EndpointFile};
use super::key_strength;
use super::problem::{Problem, Report};
use super::server::{self, Server};
use crate::config::secret::Secret;

/// A configuration that can be used. Printing it shows no key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The checked configuration.
    pub server: Server,
    /// Endpoints in the order of the file; no two have the same id.
    pub endpoints: Vec<Endpoint>,
}

/// State of the conversion.
pub(super) struct Check<'a> {
    pub report: &'a mut Report,
    pub environment: &'a Environment,
    /// Folder that relative paths start from.
    pub base_dir: &'a Path,
}

impl Config {
    /// `None` only after an error was reported.
    pub(super) fn from_file(typed: ConfigFile, check: &mut Check<'_>) -> Option<Self> {
        let server = server::check(typed.server, check);
        let endpoints = endpoints(typed.apis, check);
        let (server, endpoints) = (server?, endpoints?);
        warn_of_what_keys_do_not_meet(&server.keys, &endpoints, "server.keys", check);
        warn_of_unserved_fallbacks(&server, &endpoints, check);
        Some(Self { server, endpoints })
    }
}

/// A model that nobody serves takes no other's place.
fn warn_of_unserved_fallbacks(server: &Server, endpoints: &[Endpoint], check: &mut Check<'_>) {
    let matches = |pattern: &str, model: &str| match pattern.strip_suffix('*') {
        Some(beginning) => model.starts_with(beginning),
        None => pattern == model,
    };
    let is_served = |model: &str| {
        let names = |one: &Endpoint| one.models.iter().chain(one.model_mapping.keys()).any(|name| matches(name, model));
        endpoints.iter().any(names)
    };
    for (model, others) in &server.fallbacks {
        for other in others.iter().filter(|other| !is_served(other)) {
            let hint = "correct the name, or add it to the `models` of an endpoint";
            let message = format!("no endpoint serves {other:?}");
            check.report.warning(&format!("server.fallbacks.{model}"), message, hint);
        }
    }
}

/// A key for endpoints or models that the config does not have opens less than was meant.
fn warn_of_what_keys_do_not_meet(keys: &[ClientKey], endpoints: &[Endpoint], path: &str, check: &mut Check<'_>) {
    let served = |pattern: &str| {
        let mut names = endpoints.iter().flat_map(|one| one.models.iter().chain(one.model_mapping.keys()));
        names.any(|name| patterns_meet(name, pattern))
    };
    for (index, key) in keys.iter().enumerate() {
        for id in key.endpoints.iter().flatten().filter(|id| !endpoints.iter().any(|one| *one.id == ***id)) {
            let hint = "correct the id, or leave it out";
            check.report.warning(&format!("{path}[{index}].endpoints"), format!("no endpoint has the id {id:?}"), hint);
        }
        for model in key.models.iter().flatten().filter(|model| !served(model)) {
            let hint = "correct the name, or add it to the `models` of an endpoint";
            check.report.warning(&format!("{path}[{index}].models"), format!("no endpoint serves {model:?}"), hint);
        }
    }
}

/// True if a name can fit both, each an exact name or a beginning that ends in `*`.
pub(super) fn patterns_meet(one: &str, other: &str) -> bool {
    match (one.strip_suffix('*'), other.strip_suffix('*')) {
        (None, None) => one == other,
        (Some(beginning), None) => other.starts_with(beginning),
        (None, Some(beginning)) => one.starts_with(beginning),
        (Some(one), Some(other)) => one.starts_with(other) || other.starts_with(one),
    }
}

fn endpoints(typed: Option<Vec<EndpointFile>>, check: &mut Check<'_>) -> Option<Vec<Endpoint>> {
    let hint = "list at least one endpoint with id, baseUrl and apiKey";
    let Some(typed) = typed else {
        check.report.error("apis", "is missing", hint);
        return None;
    };
    if typed.is_empty() {
        check.report.error("apis", "is empty", hint);
        return None;
    }
    let repeated = repeated_ids(&typed, check);
    let mut endpoints = Vec::with_capacity(typed.len());
    for (index, typed) in typed.into_iter().enumerate() {
        let endpoint = endpoint::check(typed, &format!("apis[{index}]"), check);
        // The old program skipped what was switched off, whatever was in it.
        if !check.report.is_off(index) || endpoint.is_some() && !repeated.contains(&index) {
            endpoints.push(endpoint);
        }
    }
    // Those that could not be read may well have been meant to be used.
    if endpoints.iter().all(|endpoint| endpoint.as_ref().is_some_and(|e| !e.usable())) {
        let hint = "set `enabled` to true and no limit to 0 for at least one";
        check.report.warning("apis", "has no endpoint that takes requests", hint);
    }
    endpoints.into_iter().collect()
}

/// Reports ids that another entry has, and returns the numbers of the entries that are too many. One that is switched on goes before
/// one that is off, wherever they stand.
fn repeated_ids(typed: &[EndpointFile], check: &mut Check<'_>) -> BTreeSet<usize> {
    let (mut first_uses, mut repeated) = (BTreeMap::new(), BTreeSet::new());
    let ids = typed.iter().enumerate().filter_map(|(index, endpoint)| Some((index, endpoint.id.as_deref()?)));
    let (off, on): (Vec<_>, Vec<_>) =
        ids.filter(|(_, id)| !id.trim().is_empty()).partition(|(index, _)| check.report.is_off(*index));
    for (index, id) in on.into_iter().chain(off) {
        let first = *first_uses.entry(id).or_insert(index);
        if first != index {
            repeated.insert(index);
            check.report.error(
                &format!("apis[{index}].id"),
                format!("{id:?} is the id of apis[{first}] already"),
                "counts and limits are kept by id, so each endpoint needs its own",
            );
        }
    }
    repeated
}

impl Check<'_> {
    /// A text that must be there and not be blank.
    pub(super) fn required(&mut self, typed: Option<String>, path: &str, hint: &str) -> Option<String> {
        let message = match &typed {
            Some(text) if !text.trim().is_empty() => return typed,
            Some(_) => "is empty",
            None => "is missing",
        };
        self.report.error(path, message, hint);
        None
    }

    /// A key that must be there and that a header can carry.
    pub(super) fn key(&mut self, typed: Option<Secret>, path: &str, hint: &str) -> Option<Secret> {
        let typed = self.required(typed.map(|key| key.expose().to_owned()), path, hint)?;
        let key = typed.trim();
        if key.len() != typed.len() {
            self.report.warning(path, "has space around it, which is left out", "remove the space");
        }
        if !key.is_ascii() || HeaderValue::from_str(key).is_err() {
            let hint = "a key has ASCII letters, digits and signs only; was it copied whole?";
            self.report.error(path, "has a character that a header cannot carry", hint);
            return None;
        }
        if let Some((what, hint)) = key_strength::oddity(key) {
            self.report.warning(path, what, hint);
        }
        Some(Secret::new(key))
    }

    /// The path of a file that must be named and can be read now.
    pub(super) fn required_file(&mut self, typed: Option<&str>, path: &str) -> Option<PathBuf> {
        let hint = "certFile and keyFile go together; without `tls` the server speaks plain HTTP";
        let typed = self.required(typed.map(str::to_owned), path, hint)?;
        self.readable(&typed, path)
    }

    /// The path of a file that can be read now, by one byte of it.
    pub(super) fn readable(&mut self, typed: &str, path: &str) -> Option<PathBuf> {
        let file = self.base_dir.join(typed);
        let opened = check_ordinary(&file).and_then(|()| std::fs::File::open(&file));
        match opened.and_then(|mut file| file.read(&mut [0])) {
            Ok(_) => Some(file),
            Err(error) => {
                let message = format!("cannot read {typed:?}: {error}");
                let hint = "a relative path starts from the folder of the configuration file";
                self.report.add(Problem::error(path, message).hint(hint));
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::{Format, check_str};

    #[test]
    fn a_key_for_what_nobody_serves_is_told() {
        let keys = json!([
            { "name": "ada", "key": "sk-ada-0f6c1d93be5a7724", "models": ["gpt-4o*", "o9", "mini"], "endpoints": ["a", "b"] },
            { "name": "bob", "key": "sk-bob-77a1c0d5e2f98b34" },
        ]);
        let api = json!({ "id": "a", "baseUrl": "https://api.example.com", "apiKey": "sk-x", "models": ["gpt-*"],
            "modelMapping": { "mini": "gpt-4o-mini" } });
        let text = json!({ "server": { "apiKey": "sk-c1a7e4f09b2d8356", "keys": keys }, "apis": [api] }).to_string();
        let environment = Environment::fixed::<&str, &str>([]);
        let loaded = check_str(&text, Format::Json, &environment, Path::new("")).unwrap();
        let told: Vec<String> = loaded.warnings.iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].contains("server.keys[0].endpoints: no endpoint has the id \"b\""), "{told:?}");
        assert!(told[1].contains("server.keys[0].models: no endpoint serves \"o9\""), "{told:?}");
    }
}
