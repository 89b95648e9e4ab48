//! The JSON Schema of the configuration file, and the reference table written from it.

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
        Some("number") => match (bound(schema, "minimum"), bound(schema, "maximum")) {
            (Some(min), Some(max)) => format!("a number from {min} to {max}"),
            _ => "a number".to_owned(),
        },
        _ => "text".to_owned(),
    }
}

pub(super) fn bound(schema: &Value, keyword: &str) -> Option<i64> {
    schema.get(keyword).and_then(Value::as_i64)
}

/// Properties of an object, or of the choice that is one.
pub(super) fn properties(schema: &Value) -> Option<&Map<String, Value>> {
    let of_choice = || schema.get("anyOf").and_then(Value::as_array)?.iter().find_map(properties);
    schema.get("properties").and_then(Value::as_object).or_else(of_choice)
}

/// The schema of a map's values, for an object whose keys are free.
pub(super) fn map_values(schema: &Value) -> Option<&Value> {
    schema.get("additionalProperties").filter(|values| values.is_object())
}

/// True if a value may never be shown.
pub(super) fn is_secret(schema: &Value) -> bool {
    let is_choice =
        || schema.get("anyOf").and_then(Value::as_array).is_some_and(|choices| choices.iter().any(is_secret));
    schema.get("writeOnly").and_then(Value::as_bool) == Some(true)
        || map_values(schema).is_some_and(is_secret)
        || is_choice()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::config) fn each_property(schema: &Value, path: &str, visit: &mut dyn FnMut(&str, &Value)) {
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
            if inner["type"] == "integer" || inner["type"] == "number" {
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
        assert!(server["required"].is_null(), "a key, or keys: only the check can say so");
        assert_eq!(server["additionalProperties"], false);
        let endpoint = &schema["properties"]["apis"]["items"];
        assert_eq!(endpoint["required"], serde_json::json!(["id", "baseUrl"]), "a key, or keys");
        let text = schema.to_string();
        for rust in ["uint", "int64", "null", "$ref", "\\n"] {
            assert!(!text.contains(rust), "{rust} in {text}");
        }
        assert_eq!(text, super::schema().to_string());
    }
}
