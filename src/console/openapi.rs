//! The description of the admin API in the form of `OpenAPI` 3.1, made of the table of operations and the types of bodies and answers.

use schemars::generate::{SchemaGenerator, SchemaSettings};
use schemars::{JsonSchema, Schema};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::access::{SessionShown, SignIn};
use super::config_file::{Checked, ConfigShown, Text, VersionShown, VersionsList};
use super::endpoints::{Clear, Disable};
use super::keys::{KeyList, MadeKey, Raise, Rotate};
use super::operations::{OPERATIONS, Operation, Row};
use super::requests::{RequestWhole, RequestsPage, RunningList};
use super::usage::UsageSeries;
use super::{AuditList, Message};

/// Makes the schema of a type.
type SchemaOf = fn(&mut SchemaGenerator) -> Schema;
/// A parameter of the query: its name, and what it means.
type Parameter = (&'static str, &'static str);

/// What is said of an operation.
struct Described {
    summary: &'static str,
    parameters: &'static [Parameter],
    body: Option<SchemaOf>,
    answer: SchemaOf,
}

impl Described {
    const fn new(summary: &'static str, answer: SchemaOf) -> Self {
        Self { summary, parameters: &[], body: None, answer }
    }

    const fn with_body(self, body: SchemaOf) -> Self {
        Self { body: Some(body), ..self }
    }

    const fn with_parameters(self, parameters: &'static [Parameter]) -> Self {
        Self { parameters, ..self }
    }
}

/// Anything: it is described elsewhere.
#[derive(Serialize, JsonSchema)]
#[serde(transparent)]
struct Anything(Map<String, Value>);

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

const SEARCH: &[Parameter] = &[
    ("key", "Name of the client's key"),
    ("endpoint", "Id of an endpoint that was asked, last or before another one"),
    ("model", "Model as the client named it"),
    ("status", "A status such as 429, or a class such as 5xx"),
    ("failed", "true: only requests whose client got an error or a broken answer"),
    ("session", "Hash of a session, 16 hexadecimal digits"),
    ("id", "Request id"),
    ("since", "Only requests that ended at this moment or later"),
    ("until", "Only requests that ended before this moment"),
    ("before", "`next` of the page before"),
    ("limit", "Requests of a page: 50 unless said otherwise, 1,000 at most"),
];
const SERIES: &[Parameter] = &[
    ("by", "endpoint (the default), model or key"),
    ("per", "day (the default, 400 of them) or hour (48 of them, not by key)"),
    ("since", "Only parts that begin at this moment or later"),
    ("format", "json (the default) or csv"),
];
const WATCHED: &[Parameter] = &[
    ("view", "now, endpoint, requests or keys"),
    ("name", "Id of the endpoint"),
    ("open", "Ids of endpoints whose keys are listed, in view now"),
];

#[rustfmt::skip]
fn described(operation: Operation) -> Described {
    match operation {
        Operation::Session => Described::new("Shows the browser's session", of::<SessionShown>),
        Operation::SignIn => Described::new("Opens a session for a browser, which gets a cookie", of::<SessionShown>).with_body(of::<SignIn>),
        Operation::SignOut => Described::new("Ends the browser's session", of::<Message>),
        Operation::Endpoints => Described::new("Shows what GET /v1/status shows", of::<Anything>),
        Operation::EnableEndpoint => Described::new("Switches an endpoint on that was switched off here", of::<Message>),
        Operation::DisableEndpoint => Described::new("Switches an endpoint off, for good or until a moment", of::<Message>).with_body(of::<Disable>),
        Operation::ClearEndpoint => Described::new("Forgets what is held against an endpoint, or one of its keys", of::<Message>).with_body(of::<Clear>),
        Operation::TestEndpoint => Described::new("Asks an endpoint step by step; costs a permit and a token", of::<Anything>),
        Operation::Keys => Described::new("Lists the keys of callers", of::<KeyList>),
        Operation::AddKey => Described::new("Makes a key, which is shown this once; the body is an entry of the file of keys without a key", of::<MadeKey>).with_body(of::<Anything>),
        Operation::RotateKey => Described::new("Makes another key in place of one", of::<MadeKey>).with_body(of::<Rotate>),
        Operation::RaiseKey => Described::new("Gives more of a budget for a while", of::<Message>).with_body(of::<Raise>),
        Operation::RevokeKey => Described::new("Revokes a key", of::<Message>).with_parameters(&[("now", "true: its running requests are cut off")]),
        Operation::Requests => Described::new("Searches the request log, the newest first", of::<RequestsPage>).with_parameters(SEARCH),
        Operation::Request => Described::new("Shows one request with its attempts, who was passed over and why, and its bodies if they are kept", of::<RequestWhole>).with_parameters(&[("row", "Its `row`, where several requests have one id")]),
        Operation::Running => Described::new("Lists the requests for endpoints that are under way, the oldest first", of::<RunningList>),
        Operation::Cancel => Described::new("Ends a request that is under way", of::<Message>).with_parameters(&[("number", "Its `number`, where several requests have one id")]),
        Operation::Usage => Described::new("Sums up tokens and cost by day or hour", of::<UsageSeries>).with_parameters(SERIES),
        Operation::Config => Described::new("Shows the config file with its secrets masked", of::<ConfigShown>),
        Operation::ApplyConfig => Described::new("Puts another text in the place of the config file's, whole or not at all", of::<Message>).with_body(of::<Text>),
        Operation::CheckConfig => Described::new("Checks a text, and says what it would change", of::<Checked>).with_body(of::<Text>),
        Operation::Versions => Described::new("Lists the texts that were in use, the newest first", of::<VersionsList>),
        Operation::Version => Described::new("Shows one of them with its secrets masked", of::<VersionShown>),
        Operation::RestoreVersion => Described::new("Goes back to one of them", of::<Message>),
        Operation::Reload => Described::new("Reads the config again", of::<Message>),
        Operation::Audit => Described::new("Lists changes that were made, the newest first", of::<AuditList>).with_parameters(&[("limit", "Lines: 100 unless said otherwise, 1,000 at most")]),
        Operation::Live => Described::new("Streams the changes of a view of the page, as server-sent events", of::<Anything>).with_parameters(WATCHED),
        Operation::OpenApi => Described::new("Shows this description", of::<Anything>),
    }
}

/// The document.
pub(super) fn document() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    settings.meta_schema = None;
    let mut generator = settings.for_serialize().into_generator();
    let mut paths: Map<String, Value> = Map::new();
    for row in &OPERATIONS {
        let path = format!("/v1/admin{}", row.path.replace("{}", "{name}"));
        let method = row.method.as_str().to_ascii_lowercase();
        let described = operation(row, &mut generator);
        let of_path = paths.entry(path).or_insert_with(|| json!({}));
        of_path.as_object_mut().into_iter().for_each(|of_path| drop(of_path.insert(method.clone(), described.clone())));
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "api-together, admin API",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "For those who run the gateway, with server.adminKey.",
        },
        "servers": [{ "url": "/" }],
        "security": [{ "adminKey": [] }, { "session": [], "csrfToken": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "adminKey": { "type": "http", "scheme": "bearer" },
                "session": { "type": "apiKey", "in": "cookie", "name": super::access::COOKIE },
                "csrfToken": { "type": "apiKey", "in": "header", "name": "x-csrf-token" },
            },
            "schemas": generator.take_definitions(true),
        },
    })
}

fn operation(row: &Row, generator: &mut SchemaGenerator) -> Value {
    let Described { summary, parameters, body, answer } = described(row.operation);
    let in_path = row.path.contains("{}").then(|| {
        json!({ "name": "name", "in": "path", "required": true, "schema": { "type": "string" },
            "description": "The id or the name that is meant" })
    });
    let in_query = parameters.iter().map(|(name, meaning)| {
        let is_required = row.operation == Operation::Live && *name == "view";
        json!({
            "name": name, "in": "query", "required": is_required, "schema": { "type": "string" }, "description": meaning,
        })
    });
    let json_content = json!({ "schema": answer(generator) });
    let content = match row.operation {
        Operation::Live => json!({ "text/event-stream": { "schema": { "type": "string" } } }),
        Operation::Usage => json!({ "application/json": json_content, "text/csv": { "schema": { "type": "string" } } }),
        _ => json!({ "application/json": json_content }),
    };
    let mut described = json!({
        "operationId": format!("{:?}", row.operation),
        "summary": summary,
        "parameters": in_path.into_iter().chain(in_query).collect::<Vec<_>>(),
        "responses": {
            "200": { "description": "Done", "content": content },
            "default": {
                "description": "An error",
                "content": { "application/json": { "schema": of::<ErrorShown>(generator) } },
            },
        },
    });
    if let (Some(body), Some(members)) = (body, described.as_object_mut()) {
        let content = json!({ "application/json": { "schema": body(generator) } });
        members.insert("requestBody".to_owned(), json!({ "content": content }));
    }
    if row.operation == Operation::SignIn
        && let Some(members) = described.as_object_mut()
    {
        members.insert("security".to_owned(), json!([]));
    }
    described
}

/// An error, as everywhere.
#[derive(Serialize, JsonSchema)]
#[serde(rename = "Error")]
struct ErrorShown {
    /// What is wrong.
    error: ErrorMembers,
}

#[derive(Serialize, JsonSchema)]
struct ErrorMembers {
    /// In words.
    message: String,
    /// Kind.
    r#type: String,
    /// The parameter that is wrong, if one is.
    param: Option<String>,
    /// A short stable name.
    code: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_is_described_once() {
        let document = document();
        let paths = document["paths"].as_object().unwrap();
        let ids: std::collections::BTreeSet<_> = paths
            .values()
            .flat_map(|path| path.as_object().unwrap().values())
            .map(|operation| operation["operationId"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(ids.len(), OPERATIONS.len());
        assert_eq!(paths["/v1/admin/endpoints/{name}/disable"]["post"]["parameters"][0]["in"], "path");
        let logged = &document["components"]["schemas"]["Logged"]["properties"];
        assert!(logged["attempts"].is_object() && logged["firstByteMs"].is_object(), "{logged}");
        // Each reference leads somewhere.
        let text = document.to_string();
        for (at, _) in text.match_indices("#/components/schemas/") {
            let name: String = text[at + 21..].chars().take_while(|c| *c != '"').collect();
            assert!(document["components"]["schemas"][&name].is_object(), "{name}");
        }
    }
}
