//! The JSON Schema of the configuration file, and the reference table written from it.

use std::fmt::Write as _;

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

use super::file::ConfigFile;

/// The JSON Schema (2020-12) of the configuration file. The same on every call.
pub fn schema() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<ConfigFile>().to_value();
    tidy(&mut schema);
    schema
}

/// Drops what is Rust's rather than the file's: `null` as a value, integer widths, line breaks of the
/// source.
fn tidy(schema: &mut Value) {
    let Value::Object(keywords) = schema else {
        return;
    };
    if keywords.get("format").and_then(Value::as_str).is_some_and(is_integer_width) {
        keywords.remove("format");
    }
    merge_optional(keywords);
    merge_constants(keywords);
    if let Some(kind) = keywords.get_mut("type") {
        drop_null(kind);
    }
    if let Some(Value::Array(values)) = keywords.get_mut("enum") {
        values.retain(|value| !value.is_null());
    }
    if let Some(Value::String(description)) = keywords.get_mut("description") {
        *description = description.split_whitespace().collect::<Vec<_>>().join(" ");
    }
    for (keyword, value) in keywords.iter_mut() {
        match (keyword.as_str(), value) {
            ("properties", Value::Object(properties)) => properties.values_mut().for_each(tidy),
            ("items" | "additionalProperties", inner) => tidy(inner),
            ("anyOf", Value::Array(choices)) => choices.iter_mut().for_each(tidy),
            _ => {}
        }
    }
}

/// `anyOf` with one choice beside `null` is that choice; what stands beside it wins.
fn merge_optional(keywords: &mut Map<String, Value>) {
    let Some(Value::Array(choices)) = keywords.get_mut("anyOf") else {
        return;
    };
    choices.retain(|choice| choice.get("type").is_none_or(|kind| kind != "null"));
    if let [Value::Object(only)] = choices.as_mut_slice() {
        let only = std::mem::take(only);
        keywords.remove("anyOf");
        for (keyword, value) in only {
            keywords.entry(keyword).or_insert(value);
        }
    }
}

/// `oneOf` constants is what documented variants become; `enum` says the same.
fn merge_constants(keywords: &mut Map<String, Value>) {
    if let Some(Value::Array(mut choices)) = keywords.remove("oneOf") {
        let values = choices.iter_mut().filter_map(|choice| choice.get_mut("const")).map(Value::take);
        let values = Value::Array(values.collect());
        keywords.insert("enum".to_owned(), values);
        keywords.insert("type".to_owned(), "string".into());
    }
}

fn is_integer_width(format: &str) -> bool {
    format.starts_with("int") || format.starts_with("uint")
}

fn drop_null(kind: &mut Value) {
    let Value::Array(kinds) = kind else { return };
    kinds.retain(|kind| kind != "null");
    if let [only] = kinds.as_mut_slice() {
        *kind = only.take();
    }
}

/// Returns what a schema expects, in words: `a whole number from 1 to 100`.
pub(super) fn expected(schema: &Value) -> String {
    if let Some(Value::Array(choices)) = schema.get("anyOf") {
        return choices.iter().map(expected).collect::<Vec<_>>().join(" or ");
    }
    if let Some(Value::Array(values)) = schema.get("enum") {
        let values: Vec<_> = values.iter().filter_map(Value::as_str).map(|v| format!("`{v}`")).collect();
        return format!("one of {}", values.join(", "));
    }
    match schema.get("type").and_then(Value::as_str) {
        Some("object") => "an object".to_owned(),
        Some("array") => "a list".to_owned(),
        Some("boolean") => "true or false".to_owned(),
        Some("integer") => match (bound(schema, "minimum"), bound(schema, "maximum")) {
            (Some(min), Some(max)) => format!("a whole number from {min} to {max}"),
            _ => "a whole number".to_owned(),
        },
        _ => "text".to_owned(),
    }
}

pub(super) fn bound(schema: &Value, keyword: &str) -> Option<i64> {
    schema.get(keyword).and_then(Value::as_i64)
}

pub(super) fn properties(schema: &Value) -> Option<&Map<String, Value>> {
    schema.get("properties").and_then(Value::as_object)
}

/// The schema of a map's values, for an object whose keys are free.
pub(super) fn map_values(schema: &Value) -> Option<&Value> {
    schema.get("additionalProperties").filter(|values| values.is_object())
}

/// A reference of every key in Markdown: one section for each object, required keys first.
pub fn schema_markdown() -> String {
    let mut out = String::new();
    section(&schema(), "", &mut out);
    out
}

/// One key of an object, as its row needs it.
struct TableRow<'a> {
    key: &'a str,
    schema: &'a Value,
    required: bool,
}

fn section(schema: &Value, path: &str, out: &mut String) {
    let title = match path {
        "" => "The whole file".to_owned(),
        _ => format!("`{path}`"),
    };
    // Writing to a String cannot fail, here and below.
    write!(out, "{}## {title}\n\n", if out.is_empty() { "" } else { "\n" }).ok();
    if let Some(description) = schema.get("description").and_then(Value::as_str) {
        write!(out, "{description}\n\n").ok();
    }
    out.push_str("| key | type | default | meaning |\n|---|---|---|---|\n");
    let rows = rows(schema);
    for row in &rows {
        row.write(out);
    }
    for row in &rows {
        let path = super::problem::join(path, row.key);
        if properties(row.schema).is_some() {
            section(row.schema, &path, out);
        }
        // An array's own description says more than its items', which have none.
        if let Some(items) = row.schema.get("items").filter(|items| properties(items).is_some()) {
            section(items, &format!("{path}[]"), out);
        }
        if let Some(values) = map_values(row.schema).filter(|values| properties(values).is_some()) {
            section(values, &format!("{path}.*"), out);
        }
    }
}

fn rows(schema: &Value) -> Vec<TableRow<'_>> {
    let required = schema.get("required").and_then(Value::as_array);
    let mut rows: Vec<_> = properties(schema)
        .into_iter()
        .flatten()
        .map(|(key, schema)| {
            let required = required.is_some_and(|keys| keys.iter().any(|k| k == key));
            TableRow { key, schema, required }
        })
        .collect();
    rows.sort_by_key(|row| (!row.required, row.key));
    rows
}

impl TableRow<'_> {
    fn write(&self, out: &mut String) {
        let default = match self.schema.get("default") {
            _ if self.required => "required".to_owned(),
            Some(default) => format!("`{default}`"),
            None => String::new(),
        };
        let meaning = self.schema.get("description").and_then(Value::as_str).unwrap_or_default();
        let cells = [format!("`{}`", self.key), type_name(self.schema), default, meaning.to_owned()];
        let cells = cells.map(|cell| cell.replace('|', "\\|"));
        writeln!(out, "| {} |", cells.join(" | ")).ok();
    }
}

fn type_name(schema: &Value) -> String {
    if let Some(items) = schema.get("items") {
        return format!("list of {}", plural(items));
    }
    if let Some(values) = map_values(schema) {
        return format!("object of {}", plural(values));
    }
    let name = expected(schema);
    let name = name.strip_prefix("a ").or_else(|| name.strip_prefix("an ")).unwrap_or(&name);
    if is_secret(schema) { format!("{name}, secret") } else { name.to_owned() }
}

fn plural(schema: &Value) -> String {
    match schema.get("type").and_then(Value::as_str) {
        Some("object") => "objects".to_owned(),
        Some("string") => if is_secret(schema) { "texts, secret" } else { "texts" }.to_owned(),
        _ => expected(schema),
    }
}

/// True if a value may never be shown.
pub(super) fn is_secret(schema: &Value) -> bool {
    schema.get("writeOnly").and_then(Value::as_bool) == Some(true) || map_values(schema).is_some_and(is_secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each_property(schema: &Value, path: &str, visit: &mut dyn FnMut(&str, &Value)) {
        for (key, inner) in properties(schema).into_iter().flatten() {
            let path = format!("{path}.{key}");
            visit(&path, inner);
            each_property(inner, &path, visit);
            if let Some(inner) = inner.get("items").or_else(|| map_values(inner)) {
                each_property(inner, &path, visit);
            }
        }
    }

    #[test]
    fn every_key_is_described_and_every_number_bounded() {
        let mut seen = 0;
        each_property(&schema(), "", &mut |path, inner| {
            seen += 1;
            assert!(inner.get("description").is_some(), "{path} has no description");
            assert!(inner.get("type").is_none_or(Value::is_string), "{path}: {inner}");
            if inner["type"] == "integer" {
                assert!(bound(inner, "minimum").is_some(), "{path} has no minimum");
                assert!(bound(inner, "maximum").is_some(), "{path} has no maximum");
            }
        });
        assert!(seen >= 40, "{seen}");
    }

    #[test]
    fn the_schema_has_a_title_defaults_and_no_rust() {
        let schema = schema();
        assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
        assert_eq!(schema["title"], "api-together configuration");
        let server = &schema["properties"]["server"];
        assert_eq!(server["properties"]["port"]["default"], 3001);
        assert_eq!(server["required"], serde_json::json!(["apiKey"]));
        assert_eq!(server["additionalProperties"], false);
        let endpoint = &schema["properties"]["apis"]["items"];
        assert_eq!(endpoint["required"], serde_json::json!(["id", "baseUrl", "apiKey"]));
        let text = schema.to_string();
        for rust in ["uint", "int64", "null", "$ref", "\\n"] {
            assert!(!text.contains(rust), "{rust} in {text}");
        }
        assert_eq!(text, super::schema().to_string());
    }

    #[test]
    fn the_table_shows_every_key() {
        let table = schema_markdown();
        assert_eq!(table, schema_markdown());
        let mut keys = 0;
        each_property(&schema(), "", &mut |path, _| {
            keys += 1;
            let key = path.rsplit('.').next().unwrap();
            assert!(table.contains(&format!("| `{key}` |")), "{path}");
        });
        let rows = table.lines().filter(|line| line.starts_with("| `")).count();
        assert_eq!(rows, keys);
        for line in [
            "## The whole file",
            "## `server.tls`",
            "## `apis[].timeouts`",
            "| `baseUrl` | text | required | Address of the endpoint. Without a path (`https://api.openai.com`) \
             the client's `/v1/…` is kept; a path (`https://host/api/v3`) replaces `/v1`. |",
            "| `attempts` | whole number from 1 to 100 | `10` | Attempts for one request at most, the first \
             one counted, each on another endpoint. |",
        ] {
            assert!(table.lines().any(|l| l == line), "{line}\n{table}");
        }
    }
}
