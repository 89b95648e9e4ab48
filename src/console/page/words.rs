//! The languages of the page. Its texts stand in English where they are used; the table has the Chinese ones.

use std::collections::HashMap;
use std::sync::LazyLock;

use http::{HeaderMap, header};

use super::cookie;

/// Cookie with the language that somebody chose.
const COOKIE: &str = "api-together-language";

/// A language of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::console) enum Language {
    English,
    Chinese,
}

/// Texts by their English form.
static CHINESE: LazyLock<HashMap<String, String>> =
    LazyLock::new(|| serde_json::from_str(include_str!("zh_cn.json")).unwrap_or_default());

impl Language {
    /// The language that a browser asks for: the one chosen here, else the one that it prefers of the two.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        match cookie(headers, COOKIE) {
            Some("zh") => return Self::Chinese,
            Some("en") => return Self::English,
            _ => {}
        }
        let accepted = headers.get(header::ACCEPT_LANGUAGE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        // Browsers name the preferred one first.
        let mut known = accepted.split(',').map(str::trim).filter_map(|tag| match tag.get(..2) {
            Some("zh") => Some(Self::Chinese),
            Some("en") => Some(Self::English),
            _ => None,
        });
        known.next().unwrap_or(Self::English)
    }

    /// Its tag (BCP 47).
    pub(super) fn tag(self) -> &'static str {
        match self {
            Self::English => "en",
            Self::Chinese => "zh-CN",
        }
    }

    /// A text in it.
    pub(super) fn t(self, english: &'static str) -> &'static str {
        match self {
            Self::English => english,
            Self::Chinese => CHINESE.get(english).map_or(english, String::as_str),
        }
    }

    /// A text with values in place of `{}`.
    pub(super) fn with(self, english: &'static str, values: &[&str]) -> String {
        let mut text = String::new();
        let mut values = values.iter();
        for (place, part) in self.t(english).split("{}").enumerate() {
            if place > 0 {
                text.push_str(values.next().unwrap_or(&""));
            }
            text.push_str(part);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Texts in the source of the page, by the calls that translate them.
    fn used() -> BTreeSet<String> {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/console/page");
        let mut used = BTreeSet::new();
        for file in std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()) {
            if file.extension().is_none_or(|extension| extension != "rs") || file.ends_with("words.rs") {
                continue;
            }
            let source = std::fs::read_to_string(&file).unwrap();
            for call in [".t(\"", ".with(\""] {
                for (at, _) in source.match_indices(call) {
                    let text = &source[at + call.len()..];
                    used.insert(text[..text.find('"').unwrap()].to_owned());
                }
            }
        }
        used
    }

    #[test]
    fn every_text_is_there_in_chinese_and_none_is_left_over() {
        let used = used();
        assert!(used.len() > 100, "{}", used.len());
        let missing: Vec<_> = used.iter().filter(|text| !CHINESE.contains_key(*text)).collect();
        assert!(missing.is_empty(), "in zh_cn.json is no {missing:#?}");
        let dead: Vec<_> = CHINESE.keys().filter(|text| !used.contains(*text)).collect();
        assert!(dead.is_empty(), "nothing says {dead:#?}");
        for (english, chinese) in CHINESE.iter() {
            assert_eq!(english.matches("{}").count(), chinese.matches("{}").count(), "{english}");
        }
    }

    #[test]
    fn the_language_is_the_chosen_one_or_the_browsers() {
        let of = |cookie: &str, accepted: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::COOKIE, cookie.parse().unwrap());
            headers.insert(header::ACCEPT_LANGUAGE, accepted.parse().unwrap());
            Language::of(&headers)
        };
        assert_eq!(of("a=b", "zh-CN,zh;q=0.9,en;q=0.8"), Language::Chinese);
        assert_eq!(of("", "de,en;q=0.5,zh;q=0.2"), Language::English);
        assert_eq!(of("", "de"), Language::English);
        assert_eq!(of("a=b; api-together-language=zh", "en"), Language::Chinese);
        assert_eq!(Language::Chinese.with("{} of {} endpoints can take requests", &["2", "3"]).matches('2').count(), 1);
    }
}
