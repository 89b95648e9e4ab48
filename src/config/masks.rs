//! A config's text as it may be shown: with a mask in place of each secret, and back.

use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::Value;

use super::Format;
use super::places::{Stop, walk};
use super::secret::without_keys;

/// How a mask begins. No vendor's key does.
const MASK: &str = "********";
/// A secret with so many characters shows its last four.
const SHOWN_CHARS_MIN: usize = 20;
const SHOWN_CHARS: usize = 4;
/// Keys of an endpoint that say where its secrets are sent.
const WHERE: [&str; 4] = ["baseUrl", "formats", "proxy", "tls"];

/// A text in which every secret is masked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MaskedText {
    /// The text.
    pub text: String,
    /// Why it cannot be put back by us, if something in it would be lost.
    pub not_editable: Option<&'static str>,
}

/// A secret of a text.
#[derive(Debug)]
struct Found {
    path: String,
    value: String,
    bytes: Range<usize>,
    /// True if it is a block of lines, which is not put back.
    is_block: bool,
}

/// Masks the secrets of a text.
pub fn mask(text: &str) -> MaskedText {
    let found = secrets(text);
    let edits = found.iter().map(|one| (one.bytes.clone(), json_text(&mask_of(&one.value))));
    let masked = edited(text, edits.collect());
    let is_left = found.iter().any(|one| one.is_block || one.value.len() >= MASK.len() && masked.contains(&one.value));
    let cover = |text: String, one: &Found| {
        let lines = one.value.lines().filter(|line| line.len() >= MASK.len());
        lines.fold(text, |text, line| text.replace(line, MASK))
    };
    let shown = found.iter().fold(masked.clone(), cover);
    // A comment, or a place that has none.
    let covered = without_keys(&shown);
    let not_editable = (is_left || covered != masked).then_some(
        "A key, or what looks like one, stands in a comment or at a place where keys do not belong. Take it out of the file by hand.",
    );
    MaskedText { text: if not_editable.is_some() { covered } else { masked }, not_editable }
}

/// Puts the secrets of a text back into one that was made out of its masked form. An error says which one cannot be, and why.
pub fn unmask(text: &str, before: &str, format: Format) -> Result<String, String> {
    let (new, old) = (value_of(text, format), value_of(before, format));
    let known: BTreeMap<String, String> =
        secrets(before).into_iter().map(|one| (named(&one.path, &old), one.value)).collect();
    let mut edits = Vec::new();
    for one in secrets(text).into_iter().filter(|one| one.value.starts_with(MASK)) {
        let name = named(&one.path, &new);
        // Keys of one endpoint may have changed places.
        let moved = || {
            let beside = name.rsplit_once('[').map(|(list, _)| list.to_owned())?;
            known.iter().find(|(other, value)| other.starts_with(&beside) && mask_of(value) == one.value)
        };
        let found = known.get_key_value(&name).filter(|(_, value)| mask_of(value) == one.value).or_else(moved);
        let Some((_, value)) = found else {
            return Err(format!("{}: nothing is known that this mask stands for; write the key itself", one.path));
        };
        if let Some(key) = goes_elsewhere(&one.path, &new, &old) {
            let path = &one.path;
            return Err(format!("{path}: the endpoint's {key} is another one, so its key has to be written anew"));
        }
        edits.push((one.bytes, json_text(value)));
    }
    Ok(edited(text, edits))
}

/// The secrets of a text. What comes from a variable is none.
fn secrets(text: &str) -> Vec<Found> {
    let mut found = Vec::new();
    walk(text, |stop| {
        if let Stop::Scalar { path, value, chars, is_block } = stop
            && is_secret(path, value)
        {
            found.push((path.to_owned(), value.to_owned(), chars, is_block));
        }
    });
    // The parser counts characters.
    let offsets: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let byte = |at: usize| offsets.get(at).copied().unwrap_or(text.len());
    let place = |chars: Range<usize>| {
        let (start, end) = (byte(chars.start), byte(chars.end));
        start..start + length(text.get(start..end).unwrap_or_default())
    };
    let with_place = |(path, value, chars, is_block)| Found { path, value, bytes: place(chars), is_block };
    found.into_iter().map(with_place).collect()
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

/// A path in which entries have their ids or names in place of their numbers, which order must not change.
fn named(path: &str, config: &Value) -> String {
    for (list, id) in [("apis", "id"), ("server.keys", "name")] {
        let Some((number, rest)) = path.strip_prefix(list).and_then(|rest| rest.strip_prefix('[')?.split_once(']'))
        else {
            continue;
        };
        let name = entry(config, list, number).and_then(|entry| entry.get(id)?.as_str());
        return format!("{list} {} {rest}", name.unwrap_or(number));
    }
    path.to_owned()
}

fn entry<'a>(config: &'a Value, list: &str, number: &str) -> Option<&'a Value> {
    let list = list.split('.').try_fold(config, |value, key| value.get(key))?;
    list.get(number.parse::<usize>().ok()?)
}

/// The key of an endpoint that has a secret of it go somewhere else than before.
fn goes_elsewhere(path: &str, new: &Value, old: &Value) -> Option<&'static str> {
    let (number, _) = path.strip_prefix("apis[")?.split_once(']')?;
    let now = entry(new, "apis", number)?;
    let before = old.get("apis")?.as_array()?.iter().find(|entry| entry.get("id") == now.get("id"))?;
    WHERE.into_iter().find(|key| match *key {
        // Another path is no other host.
        "baseUrl" => host(now.get(key)) != host(before.get(key)),
        "proxy" => now.get(key) != before.get(key) && !is_mask(now.get(key)),
        _ => now.get(key) != before.get(key),
    })
}

fn is_mask(value: Option<&Value>) -> bool {
    value.and_then(Value::as_str).is_some_and(|text| text.starts_with(MASK))
}

/// Scheme, host and port of an address.
fn host(address: Option<&Value>) -> Option<String> {
    let text = address?.as_str()?;
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let host = rest.split(['/', '?', '#', '\\']).next().unwrap_or_default();
    Some(format!("{scheme}://{host}").to_ascii_lowercase())
}

fn value_of(text: &str, format: Format) -> Value {
    match format {
        Format::Json => serde_json::from_str(text).unwrap_or_default(),
        Format::Yaml => serde_yaml::from_str(text).unwrap_or_default(),
    }
}

fn mask_of(secret: &str) -> String {
    let count = secret.chars().count();
    let shown = if count < SHOWN_CHARS_MIN { count } else { count - SHOWN_CHARS };
    format!("{MASK}{}", secret.chars().skip(shown).collect::<String>())
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
          "query": { "sig": "q" }, "proxy": "http://user:pass@proxy.example:8080", "models": ["m"] } ] }"#;

    #[test]
    fn no_secret_is_shown_and_each_comes_back() {
        let MaskedText { text, not_editable } = mask(JSON);
        assert_eq!(not_editable, None);
        for secret in ["0123456789", "short", "hooks.example", "org-secret", "user:pass", "\"q\"", "\"s\""] {
            assert!(!text.contains(secret), "{secret}: {text}");
        }
        for shown in ["\"********cdef\"", "${ADMIN}", "https://a.example/v1", "\"m\""] {
            assert!(text.contains(shown), "{shown}: {text}");
        }
        assert_eq!(unmask(&text, JSON, Format::Json).unwrap(), JSON);
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["server"]["port"], 3001);
    }

    #[test]
    fn yaml_keeps_its_comments_and_order() {
        let yaml = "# mine\nserver:\n  apiKey: 'it''s-a-secret-0123456789' # not this\napis:\n  - id: a\n    baseUrl: https://a.example\n    \
                    apiKey: sk-one-0123456789abcdef\n    apiKeys:\n      - sk-two-0123456789abcdef\n    headers:\n      x-key: h\n    rpm: 5\n";
        let MaskedText { text, not_editable } = mask(yaml);
        assert_eq!(not_editable, None, "{text}");
        assert!(
            text.starts_with("# mine\n") && text.contains(" # not this\n") && text.contains("    rpm: 5\n"),
            "{text}"
        );
        assert!(!text.contains("secret-0") && !text.contains("0123456789abcdef") && !text.contains(": h\n"), "{text}");
        let back = unmask(&text, yaml, Format::Yaml).unwrap();
        let values = |text: &str| serde_yaml::from_str::<Value>(text).unwrap();
        assert_eq!(values(&back), values(yaml), "{back}");
    }

    #[test]
    fn a_mask_is_of_its_entry_wherever_that_stands() {
        let masked = mask(JSON).text;
        let mut value: Value = serde_json::from_str(&masked).unwrap();
        value["apis"].as_array_mut().unwrap().reverse();
        value["apis"][0]["apiKeys"].as_array_mut().unwrap().reverse();
        value["apis"][1]["rpm"] = 7.into();
        let back: Value = serde_json::from_str(&unmask(&value.to_string(), JSON, Format::Json).unwrap()).unwrap();
        assert_eq!(back["apis"][1]["apiKey"], "sk-one-0123456789abcdef");
        assert_eq!(back["apis"][0]["apiKeys"][1], "sk-two-0123456789abcdef");
        assert_eq!(back["apis"][0]["apiKeys"][0]["key"], "sk-three-0123456789abcd");
    }

    #[test]
    fn no_key_goes_to_another_host() {
        let changed = |change: &dyn Fn(&mut Value)| {
            let mut value: Value = serde_json::from_str(&mask(JSON).text).unwrap();
            change(&mut value);
            unmask(&value.to_string(), JSON, Format::Json)
        };
        assert!(changed(&|value| value["apis"][0]["baseUrl"] = "https://a.example/v2".into()).is_ok());
        for (place, key, with) in [
            (0, "baseUrl", "https://evil.example/v1"),
            (0, "baseUrl", "http://a.example/v1"),
            (0, "baseUrl", "https://a.example:8443/v1"),
            (0, "proxy", "http://evil.example"),
            (1, "proxy", "http://evil.example"),
        ] {
            let error = changed(&|value| value["apis"][place][key] = with.into()).unwrap_err();
            assert!(error.contains("has to be written anew"), "{error}");
        }
        let formats = serde_json::json!({ "messages": { "baseUrl": "https://evil.example" } });
        assert!(changed(&|value| value["apis"][0]["formats"] = formats.clone()).is_err());
        // Nor to another entry.
        assert!(changed(&|value| value["apis"][0]["id"] = "c".into()).unwrap_err().contains("nothing is known"));
        assert!(changed(&|value| value["server"]["apiKey"] = "********zzzz".into()).is_err());
        assert!(changed(&|value| value["apis"][0]["apiKey"] = "sk-new-0123456789abcdef".into()).is_ok());
    }

    #[test]
    fn a_key_at_another_place_is_covered_and_the_text_not_editable() {
        let yaml = "server:\n  apiKey: sk-client-0123456789abcdef # before: sk-older-0123456789abcdef\napis: []\n";
        let MaskedText { text, not_editable } = mask(yaml);
        assert!(not_editable.is_some() && !text.contains("older-0123456789"), "{text}");
        let twice = "x-common: &k sk-client-0123456789abcdef\nserver:\n  apiKey: sk-client-0123456789abcdef\n";
        let MaskedText { text, not_editable } = mask(twice);
        assert!(not_editable.is_some() && !text.contains("client-0123456789"), "{text}");
        let block = "apis:\n  - id: a\n    apiKey: |\n      block-secret-0123\n    rpm: 5\n";
        let MaskedText { text, not_editable } = mask(block);
        assert!(not_editable.is_some() && !text.contains("block-secret"), "{text}");
        for broken in ["", "{", "server: [", "\u{0}"] {
            mask(broken);
        }
    }
}
