//! A config's text as it may be shown: with a mask in place of each secret, and back.
//!
//! Nothing is trusted that was not seen: a text is shown, or put back, only if it reads as it should with every secret masked, or with
//! every mask replaced, and with nothing else changed. What cannot be told for sure is refused.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::ops::Range;
use std::sync::LazyLock;

use serde_json::Value;

use super::Format;
use super::places::{Stop, walk};
use super::problem::join;
use super::schema_check::parse_any;
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
const BY_HAND: [&str; 6] =
    ["server.adminKey", "server.adminListen", "server.keysFile", "server.ledger", "server.tls", "server.requestLog"];
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
    let value =
        parse_any(text, format).map_err(|_| "It has an error of syntax; mend it in the file itself.".to_owned())?;
    let spans = spans(text)?;
    let secrets = secrets(&value);
    let masked_value = mapped(&value, "", &|path, text| is_secret(path, text).then(|| mask_of(text)));
    let edits = secrets.iter().map(|(path, secret)| Some((spans.get(path)?.clone(), json_text(&mask_of(secret)))));
    let unsure = || "It is written in a way in which its secrets cannot be told for sure.".to_owned();
    let masked = edited(text, edits.collect::<Option<Vec<_>>>().ok_or_else(unsure)?);
    if parse_any(&masked, format).ok().as_ref() != Some(&masked_value) {
        return Err(unsure());
    }
    let is_left =
        secrets.iter().any(|(_, secret)| secret.len() >= SOUGHT_BYTES_MIN && masked.contains(secret.as_str()));
    if is_left || without_keys(&masked) != masked {
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
    let old = parse_any(before, format).map_err(|_| refused("The file has an error of syntax; mend it there"))?;
    let pair = Pair { new: &new, old: &old };
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
    Pair { new: &unmasked, old: &old }.check_destinations(&new).map_err(UnmaskError::Refused)?;
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

    /// Texts of the config before at the places that match one of the new config, whatever its number in a list of keys.
    fn texts_before(&self, path: &str) -> Vec<String> {
        let Some((entry, rest)) = self.entry_before(path) else { return Vec::new() };
        let rest = without_numbers(rest);
        let is_there = |place: &str| place.strip_prefix(&entry).is_some_and(|place| without_numbers(place) == rest);
        leaves(self.old).into_iter().filter(|(place, _)| is_there(place)).map(|(_, text)| text).collect()
    }

    /// The secret that a mask stands for.
    fn secret(&self, path: &str, mask: &str) -> Option<String> {
        let mut found =
            self.texts_before(path).into_iter().filter(|secret| is_secret(path, secret) && mask_of(secret) == mask);
        found.next()
    }

    /// Refuses a text that would reach for a secret in another way.
    fn check_leaf(&self, path: &str, text: &str) -> Result<(), String> {
        let place = without_numbers(path);
        if text.contains(MASK) && !(text.starts_with(MASK) && is_secret(path, text)) {
            return Err(format!("{path}: a mask does not belong there"));
        }
        let reads = text.contains("${") || SOURCES.contains(&place.as_str());
        if reads && !self.texts_before(path).iter().any(|before| before == text) {
            return Err(format!("{path}: variables and files of keys are written into the file itself"));
        }
        Ok(())
    }

    /// Refuses what would send a kept secret elsewhere. `masked`: the new config, with its masks.
    fn check_destinations(&self, masked: &Value) -> Result<(), String> {
        for path in BY_HAND {
            if at(self.new, path) != at(self.old, path) {
                return Err(format!("{path}: is changed in the file itself"));
            }
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
                let is_same = match key {
                    // Another path is no other host.
                    "baseUrl" => host(of(now, key).as_ref()) == host(of(then, key).as_ref()),
                    _ => of(now, key) == of(then, key),
                };
                if !is_same {
                    return Err(format!(
                        "{path}.{key}: is another one, so the endpoint's secrets have to be written anew"
                    ));
                }
            }
        }
        Ok(())
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

fn secrets(config: &Value) -> Vec<(String, String)> {
    leaves(config).into_iter().filter(|(path, text)| is_secret(path, text)).collect()
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

fn is_secret(path: &str, value: &str) -> bool {
    let is_variable = value.starts_with("${") && value.ends_with('}') && value.matches("${").count() == 1;
    if value.is_empty() || is_variable {
        return false;
    }
    let path = without_numbers(path);
    matches!(
        path.as_str(),
        "server.apiKey"
            | "server.adminKey"
            | "server.keys[].key"
            | "server.webhook.url"
            | "server.webhook.secret"
            | "apis[].apiKey"
            | "apis[].apiKeys[]"
            | "apis[].apiKeys[].key"
    ) || path.starts_with("apis[].headers")
        || path.starts_with("apis[].query")
        || path == "apis[].proxy" && (value.contains('@') || value.starts_with(MASK))
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

/// Scheme, host and port of an address.
fn host(address: Option<&Value>) -> Option<String> {
    let text = address?.as_str()?;
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let host = rest.split(['/', '?', '#', '\\']).next().unwrap_or_default();
    Some(format!("{scheme}://{host}").to_ascii_lowercase())
}

/// The mask of a secret: another one for each, and in each process.
fn mask_of(secret: &str) -> String {
    static SEED: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    let digest = SEED.hash_one(secret) >> 32;
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
        assert!(changed(|value| value["apis"][0]["baseUrl"] = "https://a.example/v2".into()).is_ok());
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
