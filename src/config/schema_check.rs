//! From text to [`ConfigFile`]: syntax, then every value against the schema, so that all unknown keys and all wrong
//! types are reported at once. Serde alone would stop at the first.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::Format;
use super::endpoint::ID_CHARS_MAX;
use super::environment::Environment;
use super::file::ConfigFile;
use super::foreign::Foreign;
use super::problem::{EndpointNote, Problem, ProblemKind, Problems, Report, join};
use super::schema::{bound, expected, is_secret, map_values, properties, schema};
use super::syntax;

/// Similarity of an unknown and a known key that is needed for a suggestion, from 0 to 1.
const ALIKE_MIN: f64 = 0.8;
/// Longer texts are not quoted in a message.
const QUOTED_CHARS_MAX: usize = 40;

/// Reads the text as far as it can be read. What cannot is in the report and left out of the result.
pub(super) fn read(text: &str, format: Format, environment: &Environment, report: &mut Report) -> ConfigFile {
    let Some(mut value) = parse(text, format, report) else {
        return ConfigFile::default();
    };
    if let Some(foreign) = Foreign::recognise(&value) {
        let (what, way_out) = foreign.told();
        report.add_broken(Problem::error("", what).hint(way_out));
        return ConfigFile::default();
    }
    report.note_endpoints(endpoint_notes(&value));
    let mut shape = SchemaCheck { environment, report };
    if !shape.keep(&mut value, &schema(), "") {
        return ConfigFile::default();
    }
    serde_json::from_value(value).unwrap_or_else(|error| {
        // Only if the schema allows what the types do not; a test looks for such a case.
        report.add_broken(Problem::error("", format!("cannot be read: {error}")));
        ConfigFile::default()
    })
}

fn endpoint_notes(value: &Value) -> Vec<EndpointNote> {
    let note = |endpoint: &Value| EndpointNote {
        id: endpoint
            .get("id")
            .and_then(Value::as_str)
            .filter(|id| !id.trim().is_empty() && !id.contains("${"))
            .map(|id| id.chars().take(ID_CHARS_MAX).collect()),
        is_off: endpoint.get("enabled") == Some(&Value::Bool(false)),
    };
    value.get("apis").and_then(Value::as_array).into_iter().flatten().map(note).collect()
}

/// Reads any text of this syntax.
pub(super) fn parse_any(text: &str, format: Format) -> Result<Value, Problems> {
    let mut report = Report::default();
    parse(text, format, &mut report)
        .ok_or_else(|| report.first().unwrap_or_else(|| Problem::error("", "cannot be read")).into())
}

/// The same; none also if a key is given twice.
pub(super) fn parse_strict(text: &str, format: Format) -> Option<Value> {
    let mut report = Report::default();
    parse(text, format, &mut report).filter(|_| report.is_empty())
}

fn parse(text: &str, format: Format, report: &mut Report) -> Option<Value> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let repeated = RefCell::default();
    let node = Node { path: String::new(), format, repeated: &repeated };
    let parsed = match format {
        Format::Json => parse_json(text, node).map_err(|error| ((error.line(), error.column()), error.to_string())),
        Format::Yaml => node.deserialize(serde_yaml::Deserializer::from_str(text)).map_err(|error| {
            (error.location().map_or((0, 0), |location| (location.line(), location.column())), error.to_string())
        }),
    };
    for path in repeated.take() {
        report.warning(&path, "is given twice", "the last one counts; remove the other");
    }
    parsed.map_err(|(at, message)| report.add_broken(syntax::problem(text, format, at, &message))).ok()
}

fn parse_json(text: &str, node: Node<'_>) -> serde_json::Result<Value> {
    let mut json = serde_json::Deserializer::from_str(text);
    let value = node.deserialize(&mut json)?;
    json.end().map(|()| value)
}

/// A value at a place of the text. Like `Value`'s own deserialization, but it notes repeated keys.
struct Node<'a> {
    path: String,
    format: Format,
    repeated: &'a RefCell<Vec<String>>,
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        loop {
            let path = format!("{}[{}]", self.path, values.len());
            let node = Node { path, format: self.format, repeated: self.repeated };
            match items.next_element_seed(node)? {
                Some(value) => values.push(value),
                None => return Ok(Value::Array(values)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let path = join(&self.path, &key);
            if values.contains_key(&key) {
                self.repeated.borrow_mut().push(path.clone());
            }
            if key == "<<" && self.format == Format::Yaml {
                return Err(A::Error::custom("merge keys (`<<`) are not supported; write the keys out"));
            }
            let node = Node { path, format: self.format, repeated: self.repeated };
            let value = entries.next_value_seed(node)?;
            values.insert(key, value);
        }
        Ok(Value::Object(values))
    }
}

/// The walk along the schema.
struct SchemaCheck<'a> {
    environment: &'a Environment,
    report: &'a mut Report,
}

impl SchemaCheck<'_> {
    /// Checks a value against its schema. Variables in it are replaced, and parts that do not fit are reported and
    /// taken out.
    fn keep(&mut self, value: &mut Value, schema: &Value, path: &str) -> bool {
        let mut is_plain = !is_secret(schema);
        if let Value::String(text) = value
            && text.contains("${")
        {
            is_plain = false;
            match self.environment.expand(text) {
                Ok(expanded) => *value = typed(expanded, schema),
                Err(unexpanded) => {
                    self.report.add_broken(unexpanded.at(path));
                    return false;
                }
            }
        }
        drop_fraction(value);
        if !fits(value, schema) {
            self.report.add_broken(misfit(value, schema, path, is_plain));
            return false;
        }
        match value {
            Value::Object(entries) => self.keep_entries(entries, schema, path),
            Value::Array(items) => self.keep_items(items, schema, path),
            _ => {}
        }
        true
    }

    fn keep_entries(&mut self, entries: &mut Map<String, Value>, schema: &Value, path: &str) {
        entries.retain(|key, value| {
            let place = join(path, key);
            let known = properties(schema).and_then(|known| known.get(key)).or_else(|| map_values(schema));
            match known {
                // `models:` with nothing after it: as if the key were not there. In a free map it is an
                // entry without a value, so a mistake.
                Some(_) if value.is_null() && map_values(schema).is_none() => false,
                Some(inner) => self.keep(value, inner, &place),
                None => {
                    self.report.add(unknown_key(key, schema, place));
                    false
                }
            }
        });
    }

    /// An item that does not fit is replaced by an empty one, so that the others keep their numbers.
    fn keep_items(&mut self, items: &mut [Value], schema: &Value, path: &str) {
        let Some(item_schema) = schema.get("items") else {
            return;
        };
        for (index, item) in items.iter_mut().enumerate() {
            if !self.keep(item, item_schema, &format!("{path}[{index}]")) {
                *item = empty(item_schema);
            }
        }
    }
}

/// A value that came from a variable is text; where a number or a truth value is wanted it is read as one.
fn typed(text: String, schema: &Value) -> Value {
    match serde_json::from_str(text.trim()) {
        Ok(value @ (Value::Number(_) | Value::Bool(_))) if fits(&value, schema) => value,
        _ => Value::String(text),
    }
}

/// The old program knew no difference between 60.0 and 60.
fn drop_fraction(value: &mut Value) {
    if let Value::Number(number) = value
        && number.is_f64()
        && let Some(float) = number.as_f64()
        && float.fract() == 0.0
        && let Ok(whole) = format!("{float:.0}").parse::<i64>()
    {
        *value = whole.into();
    }
}

fn fits(value: &Value, schema: &Value) -> bool {
    if let Some(Value::Array(choices)) = schema.get("anyOf") {
        return choices.iter().any(|choice| fits(value, choice));
    }
    if let Some(Value::Array(values)) = schema.get("enum") {
        return values.contains(value);
    }
    match schema.get("type").and_then(Value::as_str) {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("boolean") => value.is_boolean(),
        Some("string") => value.is_string(),
        Some("integer") => value.as_i64().is_some_and(|number| {
            bound(schema, "minimum").is_none_or(|min| number >= min)
                && bound(schema, "maximum").is_none_or(|max| number <= max)
        }),
        Some("number") => value.as_f64().is_some_and(|number| {
            bound(schema, "minimum").and_then(real).is_none_or(|min| number >= min)
                && bound(schema, "maximum").and_then(real).is_none_or(|max| number <= max)
        }),
        _ => false,
    }
}

/// A bound of a number that need not be whole. None is so large that it would have none.
fn real(bound: i64) -> Option<f64> {
    i32::try_from(bound).ok().map(f64::from)
}

/// An item that means nothing, of the shape that is wanted.
fn empty(schema: &Value) -> Value {
    if let Some(choices) = schema.get("anyOf").and_then(Value::as_array) {
        return choices.first().map_or(Value::Null, empty);
    }
    if let Some(choices) = schema.get("enum").and_then(Value::as_array) {
        return choices.first().cloned().unwrap_or_default();
    }
    match schema.get("type").and_then(Value::as_str) {
        Some("object") => Value::Object(Map::new()),
        Some("integer" | "number") => bound(schema, "minimum").unwrap_or_default().into(),
        _ => Value::String(String::new()),
    }
}

fn misfit(value: &Value, schema: &Value, path: &str, is_plain: bool) -> Problem {
    let message = format!("expected {}, found {}", expected(schema), found(value, schema, is_plain));
    let problem = Problem::error(path, message);
    match misfit_hint(value, schema, path) {
        Some(hint) => problem.hint(hint),
        None => problem,
    }
}

fn misfit_hint(value: &Value, schema: &Value, path: &str) -> Option<String> {
    match value {
        Value::String(text) if !typed(text.clone(), schema).is_string() => {
            return Some("leave the quotation marks off".to_owned());
        }
        Value::String(text) => {
            let choices = schema.get("enum").and_then(Value::as_array);
            let choices: Vec<_> = choices.into_iter().flatten().filter_map(Value::as_str).collect();
            if let Some(choice) = likeliest(text, &choices) {
                return Some(format!("did you mean `{choice}`?"));
            }
        }
        Value::Number(_) | Value::Bool(_) if schema.get("type").is_some_and(|kind| kind == "string") => {
            return Some("put it in quotation marks".to_owned());
        }
        _ => {}
    }
    let meaning = schema.get("description").and_then(Value::as_str).filter(|_| !path.is_empty())?;
    Some(meaning.trim_end_matches('.').to_owned())
}

/// Describes a value, quoted unless it may be a key.
fn found(value: &Value, schema: &Value, is_plain: bool) -> String {
    let scalar_wanted = !matches!(schema.get("type").and_then(Value::as_str), Some("object" | "array"));
    let quotable = is_plain && scalar_wanted;
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) if quotable => number.to_string(),
        Value::Number(_) => "a number".to_owned(),
        Value::String(text) if quotable && text.chars().count() <= QUOTED_CHARS_MAX => {
            format!("the string {text:?}")
        }
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

fn unknown_key(key: &str, schema: &Value, place: String) -> Problem {
    let mut known: Vec<_> = properties(schema).into_iter().flatten().map(|(known, _)| known.as_str()).collect();
    known.sort_unstable();
    let hint = match likeliest(key, &known) {
        Some(known) => format!("did you mean `{known}`?"),
        None => format!("known here: {}", known.join(", ")),
    };
    Problem::new(ProblemKind::UnknownKey, place, "unknown key, ignored").hint(hint)
}

/// Returns the known word that a mistyped one is most like, if any is like it.
pub(crate) fn likeliest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|known| (likeness(&folded(known), &folded(word)), *known))
        .filter(|(likeness, _)| *likeness >= ALIKE_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}

/// From 0 to 1. Two letters that changed places are enough of a likeness, also in a short word.
fn likeness(known: &str, word: &str) -> f64 {
    let is_swapped = strsim::osa_distance(known, word) == 1 && strsim::levenshtein(known, word) == 2;
    if is_swapped { 1.0 } else { strsim::jaro_winkler(known, word) }
}

/// `base_URL` and `baseUrl` are the same to a person.
fn folded(key: &str) -> String {
    key.chars().filter(|c| !"_-".contains(*c)).flat_map(char::to_lowercase).collect()
}
