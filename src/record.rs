//! One log line a request.

use std::fmt::{self, Write as _};
use std::time::Duration;

use serde_json::json;

use crate::billing::Measured;
use crate::ledger::Tokens;

/// What a finished request left behind.
#[derive(Debug)]
pub struct Record<'a> {
    /// The request's id.
    pub id: &'a str,
    /// The client's address.
    pub caller: Option<std::net::IpAddr>,
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
    /// How many endpoints were tried.
    pub attempts: usize,
    /// The status that the client got; none if it got nothing.
    pub status: Option<u16>,
    /// The body bytes that the client got.
    pub bytes: usize,
    /// The time until the first of the answer was let through.
    pub first_byte: Option<Duration>,
    /// The time until the last.
    pub total: Duration,
    /// What the answer cost, and how fast it was.
    pub measured: Measured,
    /// What was wrong, if something was.
    pub fault: Option<&'static str>,
}

impl Record<'_> {
    /// The members of a JSON object, by the names that the text has. What is not known is left out.
    pub fn json_members(&self) -> String {
        let ms = |time: Duration| json!((time.as_secs_f64() * 1e4).round() / 10.0);
        let tokens = |of: fn(&Tokens) -> u64| self.measured.tokens.map(|tokens| json!(of(&tokens)));
        let members = [
            ("id", Some(json!(self.id))),
            ("caller", self.caller.map(|caller| json!(caller.to_string()))),
            ("method", Some(json!(self.method))),
            ("path", Some(json!(cut(self.path)))),
            ("model", self.model.map(|model| json!(cut(model)))),
            ("endpoint_model", self.endpoint_model.map(|model| json!(cut(model)))),
            ("endpoint", self.endpoint.map(|endpoint| json!(endpoint))),
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
            ("tokens_per_second", self.measured.tokens_per_second().map(|rate| json!((rate * 10.0).round() / 10.0))),
            ("fault", self.fault.map(|fault| json!(fault))),
        ];
        let known: Vec<String> =
            members.into_iter().filter_map(|(name, value)| Some(format!("\"{name}\":{}", value?))).collect();
        known.join(",")
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

impl fmt::Display for Record<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request id={}", self.id)?;
        if let Some(caller) = self.caller {
            write!(f, " caller={caller}")?;
        }
        write!(f, " method={} path={}", self.method, Word(self.path))?;
        for (name, value) in
            [("model", self.model), ("endpoint_model", self.endpoint_model), ("endpoint", self.endpoint)]
        {
            if let Some(value) = value {
                write!(f, " {name}={}", Word(value))?;
            }
        }
        write!(f, " attempts={}", self.attempts)?;
        match self.status {
            Some(status) => write!(f, " status={status}")?,
            None => f.write_str(" status=-")?,
        }
        write!(f, " bytes={}", self.bytes)?;
        if let Some(first_byte) = self.first_byte {
            write!(f, " first_byte_ms={}", Millis(first_byte))?;
        }
        write!(f, " total_ms={}", Millis(self.total))?;
        if let Some(first_token) = self.measured.first_token {
            write!(f, " first_token_ms={}", Millis(first_token))?;
        }
        if let Some(tokens) = self.measured.tokens {
            let Tokens { prompt, completion, total, cached, reasoning, audio: _ } = tokens;
            write!(f, " prompt_tokens={prompt} completion_tokens={completion} total_tokens={total}")?;
            write!(f, " cached_tokens={cached} reasoning_tokens={reasoning}")?;
        }
        if let Some(rate) = self.measured.tokens_per_second() {
            write!(f, " tokens_per_second={rate:.1}")?;
        }
        match self.fault {
            Some(fault) => write!(f, " fault={fault}"),
            None => Ok(()),
        }
    }
}

/// Milliseconds with one decimal, without a way through floating point.
struct Millis(Duration);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tenths = (self.0.as_micros() + 50) / 100;
        write!(f, "{}.{}", tenths / 10, tenths % 10)
    }
}

/// A value from outside: cut, and quoted wherever it could be taken for more than one word, so that no client can write
/// log lines of its own.
struct Word<'a>(&'a str);

impl fmt::Display for Word<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |c: char| match c {
            '-' | '_' | '.' | '/' | ':' | '@' | '*' | '+' | ',' | '~' | '%' => true,
            _ => c.is_alphanumeric(),
        };
        let text = cut(self.0);
        if !text.is_empty() && text.chars().all(plain) {
            f.write_str(text)?;
        } else {
            write!(f, "{text:?}")?;
        }
        if text.len() < self.0.len() { f.write_char('…') } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line() {
        let record = Record {
            id: "req_1",
            caller: Some("127.0.0.1".parse().unwrap()),
            method: "POST",
            path: "/v1/chat/completions",
            model: Some("gpt-4\nfake line"),
            endpoint_model: None,
            endpoint: Some("api1"),
            attempts: 2,
            status: Some(200),
            bytes: 10,
            first_byte: Some(Duration::from_micros(1500)),
            total: Duration::from_millis(20),
            measured: Measured::default(),
            fault: None,
        };
        assert_eq!(
            record.to_string(),
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
        let measured = Measured { tokens: Some(tokens), first_token: seconds(1), generation: seconds(2) };
        assert!(Record { measured, ..record }.to_string().ends_with(
            " total_ms=20.0 first_token_ms=1000.0 prompt_tokens=5 completion_tokens=9 total_tokens=14 \
                 cached_tokens=2 reasoning_tokens=3 tokens_per_second=4.5"
        ),);
        assert_eq!(
            [49, 50, 1950, 9_999_949, 9_999_950].map(|micros| Millis(Duration::from_micros(micros)).to_string()),
            ["0.0", "0.1", "2.0", "9999.9", "10000.0"]
        );
        assert_eq!(Word(&"x".repeat(300)).to_string().chars().count(), 201);
    }
}
