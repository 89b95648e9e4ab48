//! A config's text as it may be shown: with a mask in place of each secret, and back.
//!
//! Nothing is trusted that was not seen: a text is shown, or put back, only if it reads as it should with every secret masked, or with
//! every mask replaced, and with nothing else changed. What cannot be told for sure is refused.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher as _, RandomState};
use std::ops::Range;
use std::sync::LazyLock;

use serde_json::Value;

use super::Format;
use super::places::{Stop, walk};
use super::problem::join;
use super::schema::{is_secret, map_values, properties, schema};
use super::schema_check::{parse_any, parse_strict};
use super::secret::without_keys;

/// How a mask begins. No vendor's key does.
const MASK: &str = "********";
/// A secret with so many characters shows its last four.
const SHOWN_CHARS_MIN: usize = 20;
const SHOWN_CHARS: usize = 4;
/// Shorter secrets are not looked for in the rest of the text.
const SOUGHT_BYTES_MIN: usize = 8;
/// Keys of an endpoint that say where its secrets are sent, and how.
const WHERE: [&str; 8] = ["baseUrl", "formats", "proxy", "tls", "headers", "query", "authHeader", "versionPath"];
/// Settings that open other doors, and are changed in the file itself.
const BY_HAND: [&str; 7] = [
    "server.adminKey",
    "server.adminListen",
    "server.keysFile",
    "server.ledger",
    "server.redis",
    "server.tls",
    "server.requestLog",
];
/// Places that read secrets from elsewhere.
const SOURCES: [&str; 2] = ["apis[].apiKeys[].file", "apis[].apiKeys[].env"];

/// Why a text could not be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UnmaskError {
    /// It cannot be read at all, which a check of it says better.
    Syntax,
    /// It would do something that only those who may write the file do.
    Refused(String),
}

/// Masks the secrets of a text. An error says why it cannot be shown.
pub fn mask(text: &str, format: Format) -> Result<String, String> {
    let syntax = || "It has an error of syntax, or a key that is given twice; mend it in the file itself.".to_owned();
    let value = parse_strict(text, format).ok_or_else(syntax)?;
    let spans = spans(text)?;
    let places = secret_places(&value)?;
    let secrets: Vec<_> = leaves(&value).into_iter().filter(|(path, _)| places.contains(path)).collect();
    let mask_at = |path: &str, secret: &str| mask_of(&entry_name(&value, path), path, secret);
    let masked_value = mapped(&value, "", &|path, text| places.contains(path).then(|| mask_at(path, text)));
    let edits =
        secrets.iter().map(|(path, secret)| Some((spans.get(path)?.clone(), json_text(&mask_at(path, secret)))));
    let unsure = || "It is written in a way in which its secrets cannot be told for sure.".to_owned();
    let masked = edited(text, edits.collect::<Option<Vec<_>>>().ok_or_else(unsure)?);
    if parse_any(&masked, format).ok().as_ref() != Some(&masked_value) {
        return Err(unsure());
    }
    let is_left =
        secrets.iter().any(|(_, secret)| secret.len() >= SOUGHT_BYTES_MIN && masked.contains(secret.as_str()));
    let in_comment = format == Format::Yaml && masked.lines().any(|line| comment(line).is_some_and(may_hold_key));
    if is_left || in_comment || without_keys(&masked) != masked {
        return Err(
            "A key, or what looks like one, stands in a comment or at a place where keys do not belong.".to_owned()
        );
    }
    Ok(masked)
}

/// Puts the secrets of a text back into one that was made out of its masked form.
pub fn unmask(text: &str, before: &str, format: Format) -> Result<String, UnmaskError> {
    let refused = |why: &str| UnmaskError::Refused(why.to_owned());
    let new = parse_any(text, format).map_err(|_| UnmaskError::Syntax)?;
    parse_strict(text, format).ok_or_else(|| refused("A key is given twice"))?;
    let old = parse_strict(before, format)
        .ok_or_else(|| refused("The file has an error of syntax, or a key that is given twice; mend it there"))?;
    let (of_new, of_old) = (secret_places(&new), secret_places(&old));
    let (of_new, of_old) = (of_new.map_err(UnmaskError::Refused)?, of_old.map_err(UnmaskError::Refused)?);
    let pair = Pair { new: &new, old: &old, secrets_of_new: &of_new, secrets_of_old: &of_old };
    let spans = spans(text).map_err(UnmaskError::Refused)?;
    let mut known = HashMap::new();
    for (path, leaf) in leaves(&new) {
        pair.check_leaf(&path, &leaf).map_err(UnmaskError::Refused)?;
        if leaf.starts_with(MASK) {
            let secret = pair.secret(&path, &leaf);
            let unknown = || {
                UnmaskError::Refused(format!(
                    "{path}: nothing is known that this mask stands for; write the key itself"
                ))
            };
            known.insert(path.clone(), secret.ok_or_else(unknown)?);
        }
    }
    let unmasked = mapped(&new, "", &|path, _| known.get(path).cloned());
    Pair { new: &unmasked, ..pair }.check_destinations(&new).map_err(UnmaskError::Refused)?;
    let edits = known.iter().map(|(path, secret)| Some((spans.get(path)?.clone(), json_text(secret))));
    let mut edits =
        edits.collect::<Option<Vec<_>>>().ok_or_else(|| refused("It is written in a way that cannot be followed"))?;
    edits.sort_by_key(|(range, _)| range.start);
    let back = edited(text, edits);
    if parse_any(&back, format).ok().as_ref() != Some(&unmasked) {
        return Err(refused("It is written in a way that cannot be followed"));
    }
    Ok(back)
}

/// Another config, and the one before it.
#[derive(Clone, Copy)]
struct Pair<'a> {
    new: &'a Value,
    old: &'a Value,
    secrets_of_new: &'a HashSet<String>,
    secrets_of_old: &'a HashSet<String>,
}

impl Pair<'_> {
    /// The entry before that a path of the new config is in: its path there, and what follows it.
    fn entry_before<'p>(&self, path: &'p str) -> Option<(String, &'p str)> {
        for (list, id) in [("apis", "id"), ("server.keys", "name")] {
            let Some((number, rest)) = path.strip_prefix(list).and_then(|rest| rest.strip_prefix('[')?.split_once(']'))
            else {
                continue;
            };
            let of = |config: &Value| at(config, list).and_then(Value::as_array).cloned().unwrap_or_default();
            let (now, before) = (of(self.new), of(self.old));
            let name = now.get(number.parse::<usize>().ok()?)?.get(id)?.clone();
            let places = |entries: &[Value]| -> Vec<usize> {
                (0..entries.len())
                    .filter(|place| entries.get(*place).and_then(|entry| entry.get(id)) == Some(&name))
                    .collect()
            };
            // One with the same name twice is none.
            let ([_], [place]) = (&places(&now)[..], &places(&before)[..]) else { return None };
            return Some((format!("{list}[{place}]"), rest));
        }
        Some((String::new(), path))
    }

    /// Texts of the config before, with their places, at those that match one of the new config, whatever its number in a list of keys.
    fn texts_before(&self, path: &str) -> Vec<(String, String)> {
        let Some((entry, rest)) = self.entry_before(path) else { return Vec::new() };
        let rest = without_numbers(rest);
        let is_there = |place: &str| place.strip_prefix(&entry).is_some_and(|place| without_numbers(place) == rest);
        leaves(self.old).into_iter().filter(|(place, _)| is_there(place)).collect()
    }

    /// The secret that a mask stands for.
    fn secret(&self, path: &str, mask: &str) -> Option<String> {
        let is_it = |(place, secret): &(String, String)| {
            self.secrets_of_old.contains(place) && mask_of(&entry_name(self.old, place), place, secret) == mask
        };
        self.texts_before(path).into_iter().find(is_it).map(|(_, secret)| secret)
    }

    /// Refuses a text that would reach for a secret in another way.
    fn check_leaf(&self, path: &str, text: &str) -> Result<(), String> {
        let place = without_numbers(path);
        if text.contains(MASK) && !(text.starts_with(MASK) && self.secrets_of_new.contains(path)) {
            return Err(format!("{path}: a mask does not belong there"));
        }
        let reads = text.contains("${") || SOURCES.contains(&place.as_str());
        if reads && !self.texts_before(path).iter().any(|(_, before)| before == text) {
            return Err(format!("{path}: variables and files of keys are written into the file itself"));
        }
        Ok(())
    }

    /// Refuses what would send a kept secret elsewhere. `masked`: the new config, with its masks.
    fn check_destinations(&self, masked: &Value) -> Result<(), String> {
        if let Some(path) = changed_by_hand(self.new, self.old) {
            return Err(format!("{path}: is changed in the file itself"));
        }
        let keeps_secret = at(masked, "server.webhook.secret")
            .and_then(Value::as_str)
            .is_some_and(|secret| secret.starts_with(MASK) || secret.contains("${"));
        if keeps_secret && at(self.new, "server.webhook.url") != at(self.old, "server.webhook.url") {
            return Err("server.webhook.url: is another one, so its secret has to be written anew".to_owned());
        }
        let count = at(self.new, "apis").and_then(Value::as_array).map_or(0, Vec::len);
        for number in 0..count {
            let path = format!("apis[{number}]");
            let begins = format!("{path}.");
            let keeps = |place: &str, text: &str| {
                place.starts_with(&begins)
                    && (text.starts_with(MASK)
                        || text.contains("${")
                        || SOURCES.contains(&without_numbers(place).as_str()))
            };
            if !leaves(masked).iter().any(|(place, text)| keeps(place, text)) {
                continue;
            }
            let unknown = || format!("{path}: an entry with another id cannot keep a secret; write it anew");
            let (before, _) = self.entry_before(&path).ok_or_else(unknown)?;
            let (now, then) = (at(self.new, &path), at(self.old, &before));
            let of = |entry: Option<&Value>, key: &str| entry.and_then(|entry| entry.get(key)).cloned();
            for key in WHERE {
                // Another path may be another tenant's at the same host.
                if of(now, key) != of(then, key) {
                    return Err(format!(
                        "{path}.{key}: is another one, so the endpoint's secrets have to be written anew"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// A setting that is changed in the file itself, and that differs.
fn changed_by_hand(new: &Value, old: &Value) -> Option<&'static str> {
    BY_HAND.into_iter().find(|path| at(new, path) != at(old, path))
}

/// The same of two texts, of which the first is to take the place of the second.
pub fn differs_by_hand((new, format): (&str, Format), (old, format_of_old): (&str, Format)) -> Option<&'static str> {
    match (parse_any(new, format), parse_any(old, format_of_old)) {
        (Ok(new), Ok(old)) => changed_by_hand(&new, &old),
        // What cannot be read has no settings to keep.
        _ => None,
    }
}

/// The value at a path such as `server.tls` or `apis[2]`.
fn at<'a>(config: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(config, |value, part| match part.split_once('[') {
        None => value.get(part),
        Some((list, number)) => value.get(list)?.get(number.trim_end_matches(']').parse::<usize>().ok()?),
    })
}

/// Every text of a config, with its path.
fn leaves(config: &Value) -> Vec<(String, String)> {
    fn add(value: &Value, path: String, all: &mut Vec<(String, String)>) {
        match value {
            Value::String(text) => all.push((path, text.clone())),
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(number, item)| add(item, format!("{path}[{number}]"), all));
            }
            Value::Object(members) => members.iter().for_each(|(key, value)| add(value, join(&path, key), all)),
            _ => {}
        }
    }
    let mut all = Vec::new();
    add(config, String::new(), &mut all);
    all
}

/// Places of a config whose texts are secrets: those of which the schema says so, and all at which it knows no text.
fn secret_places(config: &Value) -> Result<HashSet<String>, String> {
    let mut places = HashSet::new();
    note_secrets(config, Some(&schema()), "", &mut places)?;
    Ok(places)
}

fn note_secrets(value: &Value, schema: Option<&Value>, path: &str, places: &mut HashSet<String>) -> Result<(), String> {
    match value {
        Value::String(text)
            if !is_variable_or_empty(text)
                && (schema.is_none_or(|schema| !is_plain_text(schema)) || sends(path, text)) =>
        {
            places.insert(path.to_owned());
        }
        Value::Number(_) if schema.is_none_or(is_secret) && value.to_string().len() >= SOUGHT_BYTES_MIN => {
            return Err(format!("{path} is a number, and may be a secret; write it as a text, or remove it."));
        }
        Value::Array(items) => {
            let of_items = schema.and_then(items_of);
            for (number, item) in items.iter().enumerate() {
                note_secrets(item, of_items, &format!("{path}[{number}]"), places)?;
            }
        }
        Value::Object(members) => {
            for (key, value) in members {
                let known = |schema| properties(schema).and_then(|known| known.get(key)).or_else(|| map_values(schema));
                note_secrets(value, schema.and_then(known), &join(path, key), places)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// The schema of a list's items, or of those of the choice that is one.
fn items_of(schema: &Value) -> Option<&Value> {
    let of_choice = || schema.get("anyOf").and_then(Value::as_array)?.iter().find_map(items_of);
    schema.get("items").or_else(of_choice)
}

/// True if a place takes a text that is no secret.
fn is_plain_text(schema: &Value) -> bool {
    if is_secret(schema) {
        return false;
    }
    match schema.get("anyOf").and_then(Value::as_array) {
        Some(choices) => choices.iter().any(is_plain_text),
        None => {
            schema.get("enum").is_some() || schema.get("type").and_then(Value::as_str).is_none_or(|of| of == "string")
        }
    }
}

/// Secrets of which the schema does not say so, since their places hold other things as well.
fn sends(path: &str, text: &str) -> bool {
    let path = without_numbers(path);
    path.starts_with("apis[].headers")
        || path.starts_with("apis[].query")
        || path.starts_with("server.webhook.url")
        || path == "server.ledger" && (text.contains('@') || text.starts_with(MASK))
        || path == "apis[].proxy" && (text.contains('@') || text.starts_with(MASK))
}

fn is_variable_or_empty(text: &str) -> bool {
    text.is_empty() || text.starts_with("${") && text.ends_with('}') && text.matches("${").count() == 1
}

/// The comment of a line, or what may be one.
fn comment(line: &str) -> Option<&str> {
    let at = line
        .find('#')
        .filter(|at| line.get(..*at).is_some_and(|before| before.is_empty() || before.ends_with([' ', '\t'])));
    at.and_then(|at| line.get(at..))
}

/// True if a text may have a key in it: letters and digits in a row, or what looks like a UUID or another number in hexadecimal.
fn may_hold_key(text: &str) -> bool {
    let mixes =
        |word: &str| word.contains(|c: char| c.is_ascii_digit()) && word.contains(|c: char| c.is_ascii_alphabetic());
    let words = |is_in: fn(char) -> bool, least: usize| {
        text.split(move |c| !is_in(c)).any(|word| word.len() >= least && mixes(word))
    };
    words(|c| c.is_ascii_alphanumeric(), 16) || words(|c| c.is_ascii_hexdigit() || c == '-', 20)
}

/// What a place's entry is called, so that secrets of two entries have different masks.
fn entry_name(config: &Value, path: &str) -> String {
    let of = |list: &str, id: &str| {
        let (number, _) = path.strip_prefix(list)?.strip_prefix('[')?.split_once(']')?;
        at(config, &format!("{list}[{number}]"))?.get(id)?.as_str().map(ToOwned::to_owned)
    };
    of("apis", "id").or_else(|| of("server.keys", "name")).unwrap_or_default()
}

/// A config with other texts at some places.
fn mapped(value: &Value, path: &str, other: &impl Fn(&str, &str) -> Option<String>) -> Value {
    match value {
        Value::String(text) => Value::String(other(path, text).unwrap_or_else(|| text.clone())),
        Value::Array(items) => {
            let item = |(number, item)| mapped(item, &format!("{path}[{number}]"), other);
            items.iter().enumerate().map(item).collect()
        }
        Value::Object(members) => Value::Object(
            members.iter().map(|(key, value)| (key.clone(), mapped(value, &join(path, key), other))).collect(),
        ),
        plain => plain.clone(),
    }
}

/// Where each text of a config stands, in bytes. An error says that it cannot be told.
fn spans(text: &str) -> Result<HashMap<String, Range<usize>>, String> {
    // The parser counts characters.
    let offsets: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let byte = |at: usize| offsets.get(at).copied().unwrap_or(text.len());
    let mut found = HashMap::new();
    let is_plain = walk(text, |stop| {
        if let Stop::Scalar { path, chars } = stop {
            let (start, end) = (byte(chars.start), byte(chars.end));
            found.insert(path.to_owned(), start..start + length(text.get(start..end).unwrap_or_default()));
        }
    });
    if is_plain { Ok(found) } else { Err("It has anchors, or escapes that are not understood here.".to_owned()) }
}

/// Bytes of a scalar. The parser counts a comment and line breaks behind it in.
fn length(scalar: &str) -> usize {
    let mut signs = scalar.char_indices();
    match signs.next() {
        Some((_, '"')) => {
            let mut is_escaped = false;
            let end = signs.find(|(_, sign)| {
                let ends = *sign == '"' && !is_escaped;
                is_escaped = *sign == '\\' && !is_escaped;
                ends
            });
            end.map_or(scalar.len(), |(at, _)| at + 1)
        }
        Some((_, '\'')) => {
            // Two of them are one of the text.
            let pairs = scalar.get(1..).unwrap_or_default().replace("''", "--");
            pairs.find('\'').map_or(scalar.len(), |at| at + 2)
        }
        _ => {
            let line = scalar.lines().next().unwrap_or_default();
            line.split(" #").next().unwrap_or_default().trim_end().len()
        }
    }
}

/// A path with its numbers left out: `apis[2].apiKey` is `apis[].apiKey`.
fn without_numbers(path: &str) -> String {
    let mut text = String::with_capacity(path.len());
    let mut is_number = false;
    for sign in path.chars() {
        match sign {
            '[' => is_number = true,
            ']' => is_number = false,
            _ if is_number && sign.is_ascii_digit() => continue,
            _ => {}
        }
        text.push(sign);
    }
    text
}

/// The mask of a secret: another one for each, at each kind of place of each entry, and in each process.
fn mask_of(entry: &str, path: &str, secret: &str) -> String {
    static SEED: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    let digest = SEED.hash_one((entry, without_numbers(path), secret)) >> 32;
    let count = secret.chars().count();
    let shown = if count < SHOWN_CHARS_MIN { count } else { count - SHOWN_CHARS };
    format!("{MASK}{digest:08x}{}", secret.chars().skip(shown).collect::<String>())
}

/// A text as JSON and YAML both have it.
fn json_text(text: &str) -> String {
    Value::from(text).to_string()
}

/// The text with other words in these places, which follow each other.
fn edited(text: &str, edits: Vec<(Range<usize>, String)>) -> String {
    let (mut out, mut at) = (String::with_capacity(text.len()), 0);
    for (range, with) in edits {
        let between = text.get(at..range.start).unwrap_or_default();
        out.push_str(between);
        out.push_str(&with);
        at = range.end;
    }
    out.push_str(text.get(at..).unwrap_or_default());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = r#"{ "server": { "apiKey": "sk-client-0123456789abcdef", "adminKey": "${ADMIN}", "port": 3001,
        "keys": [{ "name": "ada", "key": "short" }], "webhook": { "url": "https://hooks.example/T0/B1", "secret": "s" } },
      "apis": [
        { "id": "é", "baseUrl": "https://a.example/v1", "apiKey": "sk-one-0123456789abcdef", "headers": { "x-org": "org-secret" } },
        { "id": "b", "baseUrl": "https://b.example", "apiKeys": ["sk-two-0123456789abcdef", { "key": "sk-three-0123456789abcd", "rpm": 5 }],
          "query": { "sig": "q" }, "proxy": "http://user:pass@proxy.example:8080", "models": ["m"] },
        { "id": "v", "baseUrl": "https://v.example", "apiKey": "${VENDOR_KEY}" } ] }"#;

    fn masked(text: &str) -> Value {
        serde_json::from_str(&mask(text, Format::Json).unwrap()).unwrap()
    }

    /// What comes of a change to the masked form of [`JSON`].
    fn changed(change: impl Fn(&mut Value)) -> Result<Value, UnmaskError> {
        let mut value = masked(JSON);
        change(&mut value);
        unmask(&value.to_string(), JSON, Format::Json).map(|text| serde_json::from_str(&text).unwrap())
    }

    #[test]
    fn no_secret_is_shown_and_each_comes_back() {
        let text = mask(JSON, Format::Json).unwrap();
        for secret in ["0123456789", "short", "hooks.example", "org-secret", "user:pass", "\"q\"", "\"s\""] {
            assert!(!text.contains(secret), "{secret}: {text}");
        }
        for shown in ["cdef\"", "${ADMIN}", "https://a.example/v1", "\"m\""] {
            assert!(text.contains(shown), "{shown}: {text}");
        }
        assert_eq!(unmask(&text, JSON, Format::Json).unwrap(), JSON);
    }

    #[test]
    fn what_no_setting_is_known_for_is_masked_and_comes_back() {
        for text in [
            r#"{"_apiKey":"0123456789abcdef","apis":[{"id":"a","oldKey":["0123456789abcdef"],"models":["m"]}]}"#,
            r#"{"apis":[{"id":"a","apiKeys":"0123456789abcdef"},{"id":"b","apiKey":["0123456789abcdef"]}]}"#,
            r#"{"apis":[{"id":"a","apiKeys":[["0123456789abcdef"],{"kee":"0123456789abcdef"}],"rpm":"0123456789abcdef"}]}"#,
        ] {
            let masked = mask(text, Format::Json).unwrap();
            assert!(!masked.contains("0123456789") && masked.contains("\"id\":\"a\""), "{masked}");
            assert_eq!(unmask(&masked, text, Format::Json).unwrap(), text);
        }
    }

    #[test]
    fn a_guess_in_another_entry_has_another_mask() {
        let text = r#"{"server":{"keys":[{"name":"ada","key":"weak-key"}]},"apis":[{"id":"a","apiKey":"weak-key"},{"id":"b","apiKey":"weak-key"}]}"#;
        let masked = masked(text);
        let keys = [&masked["server"]["keys"][0]["key"], &masked["apis"][0]["apiKey"], &masked["apis"][1]["apiKey"]];
        assert!(keys[0] != keys[1] && keys[1] != keys[2] && keys[0] != keys[2], "{keys:?}");
    }

    #[test]
    fn yaml_keeps_its_comments_and_order() {
        let yaml = "# mine\nserver:\n  apiKey: 'it''s-a-secret-0123456789' # not this\napis:\n  - id: a\n    baseUrl: https://a.example\n    \
                    apiKeys:\n      - sk-two-0123456789abcdef\n    headers: {x-key: \"h\\t\"}\n    rpm: 5\n";
        let text = mask(yaml, Format::Yaml).unwrap();
        assert!(
            text.starts_with("# mine\n") && text.contains(" # not this\n") && text.contains("    rpm: 5\n"),
            "{text}"
        );
        assert!(!text.contains("secret-0") && !text.contains("0123456789abcdef"), "{text}");
        let back = unmask(&text, yaml, Format::Yaml).unwrap();
        let values = |text: &str| serde_yaml::from_str::<Value>(text).unwrap();
        assert_eq!(values(&back), values(yaml), "{back}");
    }

    #[test]
    fn a_mask_is_of_its_entry_wherever_that_stands() {
        let back = changed(|value| {
            value["apis"].as_array_mut().unwrap().reverse();
            value["apis"][1]["apiKeys"].as_array_mut().unwrap().remove(0);
            value["apis"][2]["rpm"] = 7.into();
        });
        let back = back.unwrap();
        assert_eq!(
            (&back["apis"][2]["apiKey"], &back["apis"][0]["apiKey"]),
            (&"sk-one-0123456789abcdef".into(), &"${VENDOR_KEY}".into())
        );
        assert_eq!(
            back["apis"][1]["apiKeys"][0]["key"], "sk-three-0123456789abcd",
            "the one that was left, not the one that was there"
        );
        assert!(changed(|value| value["apis"][0]["apiKey"] = "sk-new-0123456789abcdef".into()).is_ok());
        assert!(changed(|value| value["apis"][0]["rpm"] = 9.into()).is_ok());
    }

    #[test]
    fn no_secret_goes_elsewhere() {
        type Change = Box<dyn Fn(&mut Value)>;
        let mask_of_a = masked(JSON)["apis"][0]["apiKey"].clone();
        let evil = |id: &str| serde_json::json!({ "id": id, "baseUrl": "https://evil.example", "apiKey": mask_of_a });
        let with_variable =
            serde_json::json!({ "id": "e", "baseUrl": "https://evil.example", "apiKey": "${VENDOR_KEY}" });
        let from_file =
            serde_json::json!({ "id": "e", "baseUrl": "https://evil.example", "apiKeys": [{ "file": "/etc/passwd" }] });
        let push = |entry: Value| move |value: &mut Value| value["apis"].as_array_mut().unwrap().push(entry.clone());
        let set = |place: usize, key: &'static str, with: Value| -> Change {
            Box::new(move |value: &mut Value| value["apis"][place][key] = with.clone())
        };
        let at_server = |key: &'static str, with: &'static str| -> Change {
            Box::new(move |value| value["server"][key] = with.into())
        };
        let changes: Vec<Change> = vec![
            set(0, "baseUrl", "https://evil.example/v1".into()),
            set(0, "baseUrl", "https://a.example/other-tenant/v1".into()),
            Box::new(|value| value["server"]["webhook"]["url"] = "https://evil.example".into()),
            set(0, "baseUrl", "http://a.example/v1".into()),
            set(0, "baseUrl", "https://a.example:8443/v1".into()),
            set(0, "proxy", "http://evil.example".into()),
            set(1, "proxy", "http://evil.example".into()),
            set(0, "formats", serde_json::json!({ "messages": { "baseUrl": "https://evil.example" } })),
            set(0, "tls", serde_json::json!({ "insecure": true })),
            set(0, "query", serde_json::json!({ "host": "evil.example" })),
            set(0, "id", "c".into()),
            set(0, "id", "b".into()),
            set(0, "name", mask_of_a.clone()),
            set(0, "name", "${API_TOGETHER_ADMIN_KEY}".into()),
            set(0, "timezone", "${VENDOR_KEY}".into()),
            set(1, "apiKeys", serde_json::json!([mask_of_a])),
            set(2, "baseUrl", "https://evil.example".into()),
            Box::new(push(evil("["))),
            Box::new(push(evil("é ["))),
            Box::new(push(evil("é"))),
            Box::new(push(with_variable)),
            Box::new(push(from_file)),
            at_server("apiKey", "********zzzz"),
            at_server("adminKey", "sk-admin-of-a-thief"),
            at_server("keysFile", "/tmp/keys.json"),
        ];
        for (number, change) in changes.iter().enumerate() {
            let result = changed(change);
            assert!(matches!(result, Err(UnmaskError::Refused(_))), "{number}: {result:?}");
        }
        assert_eq!(unmask("{", JSON, Format::Json), Err(UnmaskError::Syntax));
    }

    #[test]
    fn what_cannot_be_told_for_sure_is_not_shown() {
        for (text, format) in [
            (
                "server:\n  apiKey: sk-client-0123456789abcdef # before: sk-older-0123456789abcdef\napis: []\n",
                Format::Yaml,
            ),
            ("x-common: &k 0123456789abcdef0123\nserver:\n  apiKey: *k\n", Format::Yaml),
            (
                "apis:\n  - &a {id: a, baseUrl: https://a.example, apiKey: hex0123456789}\n  - id: b\n    headers: *a\n",
                Format::Yaml,
            ),
            ("apis:\n  - id: a\n    apiKey: |\n      block-secret-0123\n    rpm: 5\n", Format::Yaml),
            ("server:\n  apiKey: two\n    lines-of-a-key\n", Format::Yaml),
            (r#"{"name":"\ud83d\ude80","apis":[{"id":"a","apiKey":"0123456789abcdef0123"}]}"#, Format::Json),
            (r#"{"server":{"apiKey":"0123456789abcdef0123"},"apis":[{"id":"0123456789abcdef0123"}]}"#, Format::Json),
            (r#"{"apis":[{"id":"a","apiKey":"0123456789abcdef","apiKey":"fedcba9876543210"}]}"#, Format::Json),
            ("server:\n  apiKey: 0123456789abcdef\n  apiKey: fedcba9876543210\n", Format::Yaml),
            ("# apiKey: 0123456789abcdef0123456789abcdef\napis: []\n", Format::Yaml),
            ("apis: [] # 3f2504e0-4f89-41d3-9a0c-0305e82c3301\n", Format::Yaml),
            (r#"{"apis":[{"id":"a","apiKey":123456789012}]}"#, Format::Json),
            ("{", Format::Json),
            ("server: [", Format::Yaml),
        ] {
            let result = mask(text, format);
            assert!(result.is_err(), "{result:?}");
        }
        // A mark of the byte order changes nothing.
        let marked = format!("\u{feff}{JSON}");
        if let Ok(text) = mask(&marked, Format::Json) {
            assert!(!text.contains("0123456789"), "{text}");
            let stolen = text.replace("https://a.example", "https://evil.example");
            assert!(matches!(unmask(&stolen, &marked, Format::Json), Err(UnmaskError::Refused(_))));
        }
    }
}
