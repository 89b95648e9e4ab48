//! Requests as lines: a table, JSON, or comma-separated values.

use std::io::Write as _;
use std::sync::Arc;

use anstream::stdout;
use anstyle::{AnsiColor, Style};
use jiff::ZonedDateTime;

use super::words::why;
use super::{LogError, ShowLog};
use crate::cli::table::Table;
use crate::cli::times::{millis, moment};
use crate::request_log::logged::Logged;
use crate::telemetry::plain_text::{csv_field, on_one_line};

const PLAIN: Style = Style::new();
const BAD: Style = AnsiColor::Red.on_default();

/// Prints requests as they come.
pub(super) struct Printer {
    form: Form,
    has_head: bool,
    widths: Vec<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Table,
    Json,
    Csv,
}

impl Printer {
    pub(super) fn new(asked: &ShowLog) -> Self {
        let form = match (asked.json, asked.csv) {
            (true, _) => Form::Json,
            (_, true) => Form::Csv,
            _ => Form::Table,
        };
        Self { form, has_head: false, widths: Vec::new() }
    }

    pub(super) fn print(&mut self, requests: &[Logged]) -> Result<(), LogError> {
        let mut text = String::new();
        match self.form {
            Form::Json => {
                for request in requests {
                    text.push_str(&json(request)?);
                    text.push('\n');
                }
            }
            Form::Csv => {
                if !self.has_head {
                    text.push_str(&CSV_COLUMNS.join(","));
                    text.push('\n');
                }
                requests.iter().try_for_each(|request| csv_line(&mut text, request))?;
            }
            Form::Table if requests.is_empty() => {}
            Form::Table => text = self.table(requests),
        }
        self.has_head = true;
        write!(stdout(), "{text}").and_then(|()| stdout().flush())?;
        Ok(())
    }

    pub(super) fn print_none(&mut self) -> Result<(), LogError> {
        if self.form == Form::Table {
            writeln!(stdout(), "no requests were found")?;
            return Ok(());
        }
        self.print(&[])
    }

    /// Lines as wide as those before them, so that a log that goes on stays a table.
    fn table(&mut self, requests: &[Logged]) -> String {
        let now = ZonedDateTime::now();
        let mut table = Table::new(&[
            "TIME",
            "KEY",
            "MODEL",
            "ENDPOINT",
            "STATUS",
            "TRIES",
            "FIRST BYTE",
            "TOTAL",
            "TOKENS",
            "USD",
            "ID",
            "WHY",
        ]);
        for request in requests {
            let cells = cells(request, &now).into_iter().map(|(text, style)| (on_one_line(&text), style));
            table.row(cells.collect());
        }
        table.widen(&self.widths);
        self.widths = table.widths();
        let text = table.text();
        if self.has_head { text.split_once('\n').map_or(String::new(), |(_, rest)| rest.to_owned()) } else { text }
    }
}

fn cells(request: &Logged, now: &ZonedDateTime) -> Vec<(String, Style)> {
    let style = if request.is_failed() { BAD } else { PLAIN };
    let text = |text: &Option<Arc<str>>| (text.as_deref().unwrap_or("-").to_owned(), PLAIN);
    let number = |number: Option<String>| (number.unwrap_or_else(|| "-".to_owned()), PLAIN);
    vec![
        (moment(request.time, now), PLAIN),
        text(&request.key),
        text(&request.model),
        text(&request.endpoint),
        (request.status.map_or_else(|| "-".to_owned(), |status| status.to_string()), style),
        (request.attempts.len().to_string(), PLAIN),
        number(request.first_byte_ms.map(|ms| millis(ms.number()))),
        (millis(request.total_ms.number()), PLAIN),
        number(request.total_tokens.map(|tokens| tokens.to_string())),
        number(request.cost_usd.map(|usd| format!("{usd:.6}"))),
        (request.id.clone(), PLAIN),
        (why(request), style),
    ]
}

/// JSON on one line, without the signs that it may have as they are and that steer some terminals.
fn json(value: &impl serde::Serialize) -> Result<String, String> {
    let text = serde_json::to_string(value).map_err(|error| error.to_string())?;
    Ok(escaped(&text))
}

/// JSON without the signs that it may have as they are, and that steer some terminals. Its lines stay.
pub(super) fn escaped(text: &str) -> String {
    let steers = |c: char| c.is_control() && c != '\n';
    let escaped = |c: char| if steers(c) { format!("\\u{:04x}", u32::from(c)) } else { c.to_string() };
    if text.chars().any(steers) { text.chars().map(escaped).collect() } else { text.to_owned() }
}

/// Columns of CSV, by their names in JSON.
const CSV_COLUMNS: [&str; 35] = [
    "time",
    "id",
    "key",
    "address",
    "session",
    "method",
    "path",
    "model",
    "fallback",
    "endpoint",
    "endpointKey",
    "endpointModel",
    "affinity",
    "stream",
    "status",
    "fault",
    "trouble",
    "rule",
    "queuedMs",
    "firstByteMs",
    "firstTokenMs",
    "totalMs",
    "tokensPerSecond",
    "promptTokens",
    "completionTokens",
    "totalTokens",
    "cachedTokens",
    "reasoningTokens",
    "audioTokens",
    "costUsd",
    "requestBytes",
    "bytes",
    "config",
    "trace",
    "cause",
];

fn csv_line(text: &mut String, request: &Logged) -> Result<(), String> {
    let value = serde_json::to_value(request).map_err(|error| error.to_string())?;
    for (place, column) in CSV_COLUMNS.iter().enumerate() {
        if place > 0 {
            text.push(',');
        }
        match value.get(column) {
            None | Some(serde_json::Value::Null) => {}
            Some(serde_json::Value::String(field)) => text.push_str(&csv_field(field)),
            Some(other) => text.push_str(&other.to_string()),
        }
    }
    text.push('\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_send_steers_no_terminal_in_json_either() {
        let evil = "a\u{1b}[2J\nb\u{9b}c\u{202e}d";
        let text = json(&serde_json::json!({ "model": evil })).unwrap();
        assert!(!text.chars().any(char::is_control), "{text:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["model"], evil);
    }
}
