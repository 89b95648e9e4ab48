//! Access log: one line a request.

use std::fmt::{self, Write as _};
use std::net::IpAddr;
use std::time::Duration;

use serde_json::json;

use crate::billing::Measured;
use crate::fault::HeldBy;
use crate::response::classify::Meaning;
use crate::usage::Tokens;

/// Data of a finished request.
#[derive(Debug)]
pub struct Record<'a> {
    /// The request's id.
    pub id: &'a str,
    /// The client's address.
    pub caller: Option<IpAddr>,
    /// Name of the client's key, if it is a caller's own.
    pub key: Option<&'a str>,
    /// Labels of that key.
    pub tags: &'a [String],
    /// The method.
    pub method: &'a str,
    /// The path, without its query, which may hold secrets.
    pub path: &'a str,
    /// The model the client named.
    pub model: Option<&'a str>,
    /// The model the endpoint was asked for, where that is another.
    pub endpoint_model: Option<&'a str>,
    /// The endpoint that the answer came from.
    pub endpoint: Option<&'a str>,
    /// What is shown of the key that it was sent, if it has several.
    pub endpoint_key: Option<&'a str>,
    /// Number of endpoints tried.
    pub attempts: usize,
    /// The status that the client got; none if it got nothing.
    pub status: Option<u16>,
    /// The body bytes that the client got.
    pub bytes: usize,
    /// The time until the first of the answer was let through.
    pub first_byte: Option<Duration>,
    /// The time until the last.
    pub total: Duration,
    /// Tokens and speed of the answer.
    pub measured: Measured,
    /// What the last endpoint's error meant, if it gave one.
    pub meaning: Option<Meaning>,
    /// Label of the fault, if there was one.
    pub fault: Option<&'static str>,
    /// Endpoints that could not be asked, each with the reason.
    pub held: Vec<HeldBy>,
    /// Why it failed.
    pub cause: Option<&'a str>,
}

/// Endpoints named in a line.
const HELD_MAX: usize = 10;

impl Record<'_> {
    /// The members of a JSON object, by the names that the text has. What is not known is left out.
    pub fn json_members(&self) -> String {
        let ms = |time: Duration| json!((time.as_secs_f64() * 1e4).round() / 10.0);
        let tokens = |of: fn(&Tokens) -> u64| self.measured.tokens.map(|tokens| json!(of(&tokens)));
        let members = [
            ("id", Some(json!(self.id))),
            ("caller", self.caller.map(|caller| json!(caller.to_string()))),
            ("key", self.key.map(|key| json!(key))),
            ("tags", (!self.tags.is_empty()).then(|| json!(self.tags))),
            ("method", Some(json!(self.method))),
            ("path", Some(json!(cut(self.path)))),
            ("model", self.model.map(|model| json!(cut(model)))),
            ("endpoint_model", self.endpoint_model.map(|model| json!(cut(model)))),
            ("endpoint", self.endpoint.map(|endpoint| json!(endpoint))),
            ("endpoint_key", self.endpoint_key.map(|key| json!(key))),
            ("attempts", Some(json!(self.attempts))),
            ("status", self.status.map(|status| json!(status))),
            ("bytes", Some(json!(self.bytes))),
            ("first_byte_ms", self.first_byte.map(ms)),
            ("total_ms", Some(ms(self.total))),
            ("first_token_ms", self.measured.first_token.map(ms)),
            ("prompt_tokens", tokens(|tokens| tokens.prompt)),
            ("completion_tokens", tokens(|tokens| tokens.completion)),
            ("total_tokens", tokens(|tokens| tokens.total)),
            ("cached_tokens", tokens(|tokens| tokens.cached)),
            ("reasoning_tokens", tokens(|tokens| tokens.reasoning)),
            ("cost_usd", self.measured.price.map(|price| json!(price.dollars()))),
            ("tokens_per_second", self.measured.tokens_per_second().map(|rate| json!((rate * 10.0).round() / 10.0))),
            ("trouble", self.meaning.map(|meaning| json!(meaning.trouble.name()))),
            ("rule", self.meaning.map(|meaning| json!(meaning.rule))),
            ("fault", self.fault.map(|fault| json!(fault))),
            ("held", (!self.held.is_empty()).then(|| json!(self.held().collect::<Vec<_>>()))),
            ("cause", self.cause.map(|cause| json!(cut(cause)))),
        ];
        let known: Vec<String> =
            members.into_iter().filter_map(|(name, value)| Some(format!("\"{name}\":{}", value?))).collect();
        known.join(",")
    }

    fn held(&self) -> impl Iterator<Item = String> {
        let more = self.held.len().saturating_sub(HELD_MAX);
        let more = (more > 0).then(|| format!("and {more} others"));
        self.held.iter().take(HELD_MAX).map(HeldBy::text).chain(more)
    }
}

/// A value from outside, cut to a sane length.
fn cut(text: &str) -> &str {
    const CHARS_MAX: usize = 200;
    if text.len() <= CHARS_MAX {
        return text;
    }
    text.char_indices().nth(CHARS_MAX).and_then(|(end, _)| text.get(..end)).unwrap_or(text)
}

impl Record<'_> {
    /// Returns the line as text: words and numbers by their names. It is written for every request, so it is put
    /// together by hand.
    pub fn text(&self) -> String {
        /// Most lines are no longer.
        const BYTES_USUAL: usize = 448;
        let mut line = LogLine(String::with_capacity(BYTES_USUAL));
        line.0.push_str("request id=");
        line.0.push_str(self.id);
        if let Some(caller) = self.caller {
            line.address("caller", caller);
        }
        if let Some(key) = self.key {
            line.word("key", key);
        }
        if !self.tags.is_empty() {
            line.word("tags", &self.tags.join(","));
        }
        line.plain("method", self.method);
        line.word("path", self.path);
        for (name, value) in [
            ("model", self.model),
            ("endpoint_model", self.endpoint_model),
            ("endpoint", self.endpoint),
            ("endpoint_key", self.endpoint_key),
        ] {
            if let Some(value) = value {
                line.word(name, value);
            }
        }
        line.number("attempts", self.attempts);
        match self.status {
            Some(status) => line.number("status", status),
            None => line.plain("status", "-"),
        }
        line.number("bytes", self.bytes);
        if let Some(first_byte) = self.first_byte {
            line.millis("first_byte_ms", first_byte);
        }
        line.millis("total_ms", self.total);
        if let Some(first_token) = self.measured.first_token {
            line.millis("first_token_ms", first_token);
        }
        if let Some(Tokens { prompt, completion, total, cached, reasoning, audio: _ }) = self.measured.tokens {
            line.number("prompt_tokens", prompt);
            line.number("completion_tokens", completion);
            line.number("total_tokens", total);
            line.number("cached_tokens", cached);
            line.number("reasoning_tokens", reasoning);
        }
        if let Some(price) = self.measured.price {
            line.shown("cost_usd", price);
        }
        if let Some(rate) = self.measured.tokens_per_second() {
            line.shown("tokens_per_second", format_args!("{rate:.1}"));
        }
        if let Some(Meaning { trouble, rule, .. }) = self.meaning {
            line.plain("trouble", trouble.name());
            line.plain("rule", rule);
        }
        if let Some(fault) = self.fault {
            line.plain("fault", fault);
        }
        if !self.held.is_empty() {
            // Ids are from the config; quoted, they are one value.
            line.shown("held", format_args!("{:?}", self.held().collect::<Vec<_>>().join("; ")));
        }
        if let Some(cause) = self.cause {
            line.word("cause", cause);
        }
        line.0
    }
}

/// Characters of an unquoted word beside letters and digits.
const PLAIN_SIGNS: &[u8] = b"-_./:@*+,~%";

/// True if a byte may stand in an unquoted word.
const fn is_plain(byte: u8) -> bool {
    /// A bit for each byte of ASCII.
    const PLAIN: u128 = {
        let mut plain = 0;
        let mut byte = 0_u8;
        while byte < 128 {
            if byte.is_ascii_alphanumeric() {
                plain |= 1 << byte;
            }
            byte += 1;
        }
        let mut signs = PLAIN_SIGNS;
        while let [sign, rest @ ..] = signs {
            plain |= 1 << *sign;
            signs = rest;
        }
        plain
    };
    byte < 128 && PLAIN >> byte & 1 == 1
}

struct LogLine(String);

impl LogLine {
    fn name(&mut self, name: &str) {
        self.0.push(' ');
        self.0.push_str(name);
        self.0.push('=');
    }

    /// A value of our own.
    fn plain(&mut self, name: &str, value: &str) {
        self.name(name);
        self.0.push_str(value);
    }

    fn shown(&mut self, name: &str, value: impl fmt::Display) {
        self.name(name);
        // A string takes everything.
        write!(self.0, "{value}").unwrap_or_default();
    }

    fn number(&mut self, name: &str, value: impl itoa::Integer) {
        self.plain(name, itoa::Buffer::new().format(value));
    }

    fn address(&mut self, name: &str, address: IpAddr) {
        let IpAddr::V4(address) = address else { return self.shown(name, address) };
        self.name(name);
        for (nth, part) in address.octets().into_iter().enumerate() {
            if nth > 0 {
                self.0.push('.');
            }
            self.0.push_str(itoa::Buffer::new().format(part));
        }
    }

    /// Milliseconds with one decimal.
    fn millis(&mut self, name: &str, time: Duration) {
        let tenths = time.as_secs().saturating_mul(10_000) + u64::from((time.subsec_micros() + 50) / 100);
        self.number(name, tenths / 10);
        self.0.push('.');
        self.0.push_str(itoa::Buffer::new().format(tenths % 10));
    }

    /// A value from outside: cut, and quoted wherever it could be taken for more than one word, so that no client can write
    /// log lines of its own.
    fn word(&mut self, name: &str, value: &str) {
        let text = cut(value);
        let is_word = |c: char| c.is_alphanumeric() || u8::try_from(c).is_ok_and(is_plain);
        if !text.is_empty() && (text.bytes().all(is_plain) || text.chars().all(is_word)) {
            self.plain(name, text);
        } else {
            self.shown(name, format_args!("{text:?}"));
        }
        if text.len() < value.len() {
            self.0.push('…');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LimitKind;
    use crate::limit::LimitReason;
    use crate::usage::prices::NanoUsd;

    #[test]
    fn a_line_is_one_line() {
        let record = Record {
            id: "req_1",
            caller: Some("127.0.0.1".parse().unwrap()),
            key: None,
            tags: &[],
            method: "POST",
            path: "/v1/chat/completions",
            model: Some("gpt-4\nfake line"),
            endpoint_model: None,
            endpoint: Some("api1"),
            endpoint_key: None,
            attempts: 2,
            status: Some(200),
            bytes: 10,
            first_byte: Some(Duration::from_micros(1500)),
            total: Duration::from_millis(20),
            measured: Measured::default(),
            meaning: None,
            fault: None,
            held: Vec::new(),
            cause: None,
        };
        assert_eq!(
            record.text(),
            "request id=req_1 caller=127.0.0.1 method=POST path=/v1/chat/completions model=\"gpt-4\\nfake line\" \
             endpoint=api1 attempts=2 status=200 bytes=10 first_byte_ms=1.5 total_ms=20.0"
        );
        let members: serde_json::Value = serde_json::from_str(&format!("{{{}}}", record.json_members())).unwrap();
        assert_eq!(
            (&members["model"], &members["status"], &members["total_ms"]),
            (&json!("gpt-4\nfake line"), &json!(200), &json!(20.0))
        );
        assert!(members.get("fault").is_none() && members.get("prompt_tokens").is_none());
        let tokens = Tokens { prompt: 5, completion: 9, total: 14, cached: 2, reasoning: 3, audio: 0 };
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let price = Some(NanoUsd(1_500_000));
        let measured = Measured { tokens: Some(tokens), first_token: seconds(1), generation: seconds(2), price };
        let record = Record { measured, meaning: None, fault: None, ..record };
        assert!(record.text().ends_with(
            " total_ms=20.0 first_token_ms=1000.0 prompt_tokens=5 completion_tokens=9 total_tokens=14 \
                 cached_tokens=2 reasoning_tokens=3 cost_usd=0.0015 tokens_per_second=4.5"
        ),);
        let held = HeldBy {
            endpoint: "a\"b".into(),
            is_public: false,
            models: Some("gpt-4*".into()),
            key: None,
            reason: LimitReason::Full(LimitKind::Rpm, 3),
            wait: Duration::from_millis(1500),
        };
        let tags = ["nightly".to_owned(), "team a".to_owned()];
        let of_key = Record { key: Some("ada"), tags: &tags, held: Vec::new(), ..record };
        assert!(of_key.text().contains(r#" caller=127.0.0.1 key=ada tags="nightly,team a" method=POST "#));
        assert!(of_key.json_members().contains(r#""key":"ada","tags":["nightly","team a"]"#));
        let record = Record { key: None, tags: &[], ..of_key };
        let full = Record { held: vec![held; 12], cause: Some("x y"), ..record };
        let shown = r#"a\"b: 3 requests a minute for gpt-4*, for 2 s; "#.repeat(10);
        assert!(full.text().ends_with(&format!(" held=\"{shown}and 2 others\" cause=\"x y\"")), "{}", full.text());
        let members: serde_json::Value = serde_json::from_str(&format!("{{{}}}", full.json_members())).unwrap();
        assert_eq!(members["held"].as_array().unwrap().len(), 11);
        let record = Record { held: Vec::new(), cause: None, ..full };
        let refused = Meaning::of_status(401, None);
        let refused = Record { meaning: Some(refused), fault: Some("endpoint_key_refused"), ..record };
        assert!(refused.text().ends_with(" trouble=key rule=status fault=endpoint_key_refused"));
        let line = |fill: &dyn Fn(&mut LogLine)| {
            let mut line = LogLine(String::new());
            fill(&mut line);
            line.0
        };
        for (micros, text) in [(49, "0.0"), (50, "0.1"), (1950, "2.0"), (9_999_949, "9999.9"), (9_999_950, "10000.0")] {
            assert_eq!(line(&|line| line.millis("t", Duration::from_micros(micros))), format!(" t={text}"));
        }
        assert_eq!(line(&|line| line.word("w", &"x".repeat(300))).chars().count(), 204);
        for (word, text) in [("gpt-4ö", "gpt-4ö"), ("", "\"\""), ("a b", "\"a b\""), ("a=b", "\"a=b\"")] {
            assert_eq!(line(&|line| line.word("w", word)), format!(" w={text}"));
        }
    }
}
