//! `api-together import`: a config of ours from another program's. Keys are never copied: they become `${NAME}`.

mod lite_llm;
mod one_api;
mod uni_api;
mod vendors;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::foreign::Foreign;
use super::problem::{Problem, Problems};
use super::{Format, schema_check};

/// Variable of the client key, if the file has none of its own.
const CLIENT_KEY: &str = "API_TOGETHER_KEY";

/// A config that was written from another program's.
#[derive(Debug)]
pub struct Imported {
    /// The config.
    pub config: Value,
    /// What could not be taken over, and what is to be done.
    pub notes: Vec<String>,
}

/// Writes a config from a file's text.
pub(super) fn import(text: &str, format: Format) -> Result<Imported, Problems> {
    let file = schema_check::parse_any(text, format)?;
    let mut draft = Draft { variables: named_variables(text), ..Draft::default() };
    match Foreign::recognise(&file) {
        Some(Foreign::LiteLlm) => lite_llm::read(&file, &mut draft),
        Some(Foreign::UniApi) => uni_api::read(&file, &mut draft),
        Some(Foreign::OneApi) => one_api::read(&file, &mut draft),
        Some(Foreign::Pingora) | None => {
            let known = "LiteLLM's config.yaml, uni-api's api.yaml, and lists of one-api's channels are";
            return Err(Problem::error("", "is no file of a program that is known here").hint(known).into());
        }
    }
    Ok(draft.finish())
}

/// The config as it is being put together.
#[derive(Default)]
struct Draft {
    server: Map<String, Value>,
    endpoints: Vec<Endpoint>,
    notes: Vec<String>,
    ids: BTreeSet<String>,
    /// Names of variables that are taken: those that the file names, and those that were made up.
    variables: BTreeSet<String>,
    /// Keys that stand in the file, and the variables that were made up for them.
    literals: BTreeMap<String, String>,
}

/// An endpoint as it is being put together.
#[derive(Default)]
struct Endpoint {
    id: String,
    base_url: String,
    key: String,
    models: Vec<String>,
    mapping: BTreeMap<String, String>,
    /// By the model that is sent, or of the whole endpoint if the name is empty.
    limits: BTreeMap<String, Map<String, Value>>,
    /// What deployments have in common that belong to it.
    group: String,
    /// Further keys, as the config has them.
    more: Map<String, Value>,
}

impl Endpoint {
    /// Adds a model that clients ask for, and the name it is sent under.
    fn serve(&mut self, asked: &str, sent: &str) {
        if asked == sent {
            self.models.push(asked.to_owned());
        } else {
            self.mapping.insert(asked.to_owned(), sent.to_owned());
        }
    }

    /// True if the name is served under another one already.
    fn serves(&self, asked: &str) -> bool {
        self.mapping.contains_key(asked) || self.models.iter().any(|model| model == asked)
    }

    fn value(self) -> Value {
        let Self { id, base_url, key, models, mapping, mut limits, group: _, more } = self;
        let mut value = Map::new();
        value.insert("id".to_owned(), id.into());
        value.insert("baseUrl".to_owned(), base_url.into());
        value.insert("apiKey".to_owned(), key.into());
        let names = models.len() + mapping.len();
        let own = limits.remove("").or_else(|| (names == 1).then(|| limits.pop_first()).flatten().map(|(_, own)| own));
        value.extend(own.into_iter().flatten());
        if !models.is_empty() {
            value.insert("models".to_owned(), json!(models));
        }
        if !mapping.is_empty() {
            value.insert("modelMapping".to_owned(), json!(mapping));
        }
        if !limits.is_empty() {
            value.insert("modelLimits".to_owned(), json!(limits));
        }
        value.extend(more);
        value.into()
    }
}

impl Draft {
    fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// An id that no other endpoint has, from a name.
    fn id(&mut self, name: &str) -> String {
        let plain: String =
            name.chars().map(|c| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '-' }).collect();
        let plain = plain.trim_matches('-');
        let plain = if plain.is_empty() { "endpoint" } else { plain };
        let mut id = plain.to_owned();
        let mut number = 2;
        while !self.ids.insert(id.clone()) {
            id = format!("{plain}-{number}");
            number += 1;
        }
        id
    }

    /// How our config spells a key of theirs: a variable by its name, and any other by a new variable's, which is noted.
    fn key(&mut self, theirs: &str, id: &str) -> String {
        let spelt = spelt(theirs);
        if spelt != theirs || theirs.starts_with("${") {
            return spelt;
        }
        if let Some(name) = self.literals.get(theirs).filter(|_| !theirs.is_empty()) {
            return format!("${{{name}}}");
        }
        let plain: String =
            id.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect();
        let plain = plain.trim_matches('_');
        let begins_well = plain.starts_with(|c: char| c.is_ascii_alphabetic());
        let plain = if begins_well { format!("{plain}_API_KEY") } else { format!("ENDPOINT_{plain}_API_KEY") };
        let plain = plain.replace("__", "_");
        let mut name = plain.clone();
        let mut number = 2;
        // Two keys never share a variable: one vendor would be sent another's.
        while !self.variables.insert(name.clone()) {
            name = format!("{plain}_{number}");
            number += 1;
        }
        self.literals.insert(theirs.to_owned(), name.clone());
        self.note(format!("put the key of {id} into .env: {name}=…"));
        format!("${{{name}}}")
    }

    fn finish(mut self) -> Imported {
        if !self.server.contains_key("apiKey") {
            self.server.insert("apiKey".to_owned(), format!("${{{CLIENT_KEY}}}").into());
            self.notes.push(format!("make up a key for your clients, and put it into .env: {CLIENT_KEY}=…"));
        }
        if self.endpoints.is_empty() {
            self.notes.push("no endpoint could be taken over".to_owned());
        }
        let apis: Vec<Value> = self.endpoints.into_iter().map(Endpoint::value).collect();
        Imported { config: json!({ "server": self.server, "apis": apis }), notes: self.notes }
    }
}

/// A text of theirs, in which a variable is ours.
fn spelt(theirs: &str) -> String {
    theirs.strip_prefix("os.environ/").map_or_else(|| theirs.to_owned(), |name| format!("${{{name}}}"))
}

/// Names of variables that a file names, in either spelling.
fn named_variables(text: &str) -> BTreeSet<String> {
    let names = text.split("os.environ/").skip(1).chain(text.split("${").skip(1));
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    names.map(|rest| rest.chars().take_while(|c| is_of_name(*c)).collect()).collect()
}

/// A whole number, also if it is written as text.
fn number(value: Option<&Value>) -> Option<i64> {
    let value = value?;
    value
        .as_i64()
        .or_else(|| value.as_f64().and_then(|number| format!("{number:.0}").parse().ok()))
        .or_else(|| value.as_str()?.trim().parse().ok())
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key)?.as_str().map(str::trim).filter(|text| !text.is_empty())
}

/// A base URL without the path of a call, which some programs write into theirs.
fn base_url(theirs: &str) -> String {
    let theirs = theirs.trim_end_matches('/');
    let calls = ["/chat/completions", "/completions", "/embeddings", "/responses", "/messages"];
    calls.iter().find_map(|call| theirs.strip_suffix(call)).unwrap_or(theirs).to_owned()
}

#[cfg(test)]
mod tests;
