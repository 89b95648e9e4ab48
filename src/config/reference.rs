//! The reference of the config, as Markdown, in two languages.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Value;

use super::schema::{bound, expected, is_secret, map_values, properties, schema};

/// A reference of every key in Markdown: one section for each object, required keys first.
pub fn schema_markdown(language: Language) -> String {
    let mut out = String::new();
    Reference { words: language.words() }.section(&schema(), "", &mut out);
    out
}

/// Language of the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    /// English, as the doc comments of the types are.
    English,
    /// Simplified Chinese.
    Chinese,
}

impl Language {
    fn words(self) -> Words {
        match self {
            Self::English => Words { meanings: None, ..ENGLISH },
            Self::Chinese => Words { meanings: serde_json::from_str(MEANINGS_IN_CHINESE).ok(), ..CHINESE },
        }
    }
}

/// Chinese of every description. One whose English has changed is missing, which a test finds.
const MEANINGS_IN_CHINESE: &str = include_str!("zh_cn.json");

/// Words of the tables.
struct Words {
    whole_file: &'static str,
    head: &'static str,
    required: &'static str,
    meanings: Option<BTreeMap<String, String>>,
}

const ENGLISH: Words = Words {
    whole_file: "The whole file",
    head: "| key | type | default | meaning |",
    required: "required",
    meanings: None,
};
const CHINESE: Words =
    Words {
        whole_file: "整个文件", head: "| 配置项 | 类型 | 默认值 | 含义 |", required: "必填", meanings: None
    };

struct Reference {
    words: Words,
}

/// One key of an object, as its row needs it.
struct TableRow<'a> {
    key: &'a str,
    schema: &'a Value,
    required: bool,
}

impl Reference {
    fn section(&self, schema: &Value, path: &str, out: &mut String) {
        let title = match path {
            "" => self.words.whole_file.to_owned(),
            _ => format!("`{path}`"),
        };
        // Writing to a String cannot fail, here and below.
        write!(out, "{}## {title}\n\n", if out.is_empty() { "" } else { "\n" }).ok();
        if let Some(description) = self.meaning(schema) {
            write!(out, "{description}\n\n").ok();
        }
        writeln!(out, "{}\n|---|---|---|---|", self.words.head).ok();
        let rows = rows(schema);
        for row in &rows {
            self.row(row, out);
        }
        for row in &rows {
            let path = super::problem::join(path, row.key);
            if properties(row.schema).is_some() {
                self.section(row.schema, &path, out);
            }
            // An array's own description says more than its items', which have none.
            if let Some(items) = row.schema.get("items").filter(|items| properties(items).is_some()) {
                self.section(items, &format!("{path}[]"), out);
            }
            if let Some(values) = map_values(row.schema).filter(|values| properties(values).is_some()) {
                self.section(values, &format!("{path}.*"), out);
            }
        }
    }

    fn row(&self, row: &TableRow<'_>, out: &mut String) {
        let default = match row.schema.get("default") {
            _ if row.required => self.words.required.to_owned(),
            Some(default) => format!("`{default}`"),
            None => String::new(),
        };
        let kind = if self.words.meanings.is_some() { type_in_chinese(row.schema) } else { type_name(row.schema) };
        let cells = [format!("`{}`", row.key), kind, default, self.meaning(row.schema).unwrap_or_default().to_owned()];
        let cells = cells.map(|cell| cell.replace('|', "\\|"));
        writeln!(out, "| {} |", cells.join(" | ")).ok();
    }

    fn meaning<'a>(&'a self, schema: &'a Value) -> Option<&'a str> {
        let english = schema.get("description").and_then(Value::as_str)?;
        Some(self.words.meanings.as_ref().and_then(|meanings| meanings.get(english)).map_or(english, String::as_str))
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

fn type_in_chinese(schema: &Value) -> String {
    if let Some(items) = schema.get("items") {
        return format!("{}的列表", type_in_chinese(items));
    }
    if let Some(values) = map_values(schema) {
        return format!("值为{}的对象", type_in_chinese(values));
    }
    if let Some(choices) = schema.get("anyOf").and_then(Value::as_array) {
        return choices.iter().map(type_in_chinese).collect::<Vec<_>>().join("或");
    }
    if let Some(values) = schema.get("enum").and_then(Value::as_array) {
        let words: Vec<String> = values.iter().filter_map(Value::as_str).map(|word| format!("`{word}`")).collect();
        return format!("{} 之一", words.join("、"));
    }
    let name = match schema.get("type").and_then(Value::as_str) {
        Some("object") => "对象".to_owned(),
        Some("boolean") => "true 或 false".to_owned(),
        Some("integer") => match (bound(schema, "minimum"), bound(schema, "maximum")) {
            (Some(min), Some(max)) => format!("{min} 到 {max} 的整数"),
            _ => "整数".to_owned(),
        },
        Some("number") => match (bound(schema, "minimum"), bound(schema, "maximum")) {
            (Some(min), Some(max)) => format!("{min} 到 {max} 的数"),
            _ => "数".to_owned(),
        },
        _ => "文本".to_owned(),
    };
    if is_secret(schema) { format!("{name}（机密）") } else { name }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::schema::tests::each_property;
    use super::*;

    #[test]
    fn the_table_shows_every_key() {
        let table = schema_markdown(Language::English);
        assert_eq!(table, schema_markdown(Language::English));
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

    #[test]
    fn every_description_has_its_chinese_and_no_other_is_kept() {
        let meanings: BTreeMap<String, String> = serde_json::from_str(MEANINGS_IN_CHINESE).unwrap();
        let mut used = BTreeSet::new();
        collect(&schema(), &mut used);
        for english in &used {
            assert!(meanings.contains_key(english), "src/config/zh_cn.json has no Chinese of: {english}");
        }
        for english in meanings.keys() {
            assert!(used.contains(english), "src/config/zh_cn.json has what is not used: {english}");
        }
        let chinese = schema_markdown(Language::Chinese);
        assert_eq!(chinese.matches("\n| `").count(), schema_markdown(Language::English).matches("\n| `").count());
        assert!(chinese.contains("| `port` | 0 到 65535 的整数 | `3001` |"), "{chinese}");
    }

    /// The descriptions that the tables show.
    fn collect(schema: &Value, into: &mut BTreeSet<String>) {
        if let Some(text) = schema.get("description").and_then(Value::as_str) {
            into.insert(text.to_owned());
        }
        for (_, inner) in properties(schema).into_iter().flatten() {
            collect(inner, into);
        }
        for inner in schema.get("items").into_iter().chain(map_values(schema)) {
            collect(inner, into);
        }
    }
}
