//! A request in words, for people.

use std::sync::Arc;

use jiff::ZonedDateTime;

use crate::cli::times::{millis, moment};
use crate::request_log::logged::{Logged, LoggedAttempt, Millis};
use crate::telemetry::plain_text::on_one_line;

/// Why a request failed, in few words.
pub(super) fn why(request: &Logged) -> String {
    let trouble =
        request.trouble.as_ref().zip(request.rule.as_ref()).map(|(trouble, rule)| format!("{trouble} by {rule}"));
    let fault = request.fault.as_deref().map(ToOwned::to_owned);
    [fault, trouble].into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// A text without what would steer the terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// A request in words.
pub(super) fn described(request: &Logged, now: &ZonedDateTime) -> String {
    let mut lines = vec![format!("request {}, {}", request.id, moment(request.time, now))];
    let mut line = |name: &str, text: String| {
        if !text.is_empty() {
            lines.push(format!("  {name:<10} {}", on_one_line(&text)));
        }
    };
    let or = |text: &Option<Arc<str>>| text.as_deref().unwrap_or_default().to_owned();
    line("call", format!("{} {}", request.method, request.path));
    line("from", [or(&request.key), request.address.clone().unwrap_or_default()].join(" ").trim().to_owned());
    let served = request.fallback.as_ref().map(|model| format!(", served by {model}")).unwrap_or_default();
    line("model", format!("{}{served}", or(&request.model)));
    line("session", request.session.clone().unwrap_or_default());
    let status = request.status.map_or_else(|| "no answer".to_owned(), |status| status.to_string());
    let why = why(request);
    line("status", if why.is_empty() { status } else { format!("{status}, {why}") });
    line("cause", request.cause.clone().unwrap_or_default());
    let time = |name: &str, ms: Option<f64>| ms.map(|ms| format!("{name} {}", millis(ms)));
    let times = [
        time("queued", Some(request.queued_ms.number()).filter(|ms| *ms > 0.0)),
        time("first byte", request.first_byte_ms.map(Millis::number)),
        time("first token", request.first_token_ms.map(Millis::number)),
        time("total", Some(request.total_ms.number())),
    ];
    line("times", times.into_iter().flatten().collect::<Vec<_>>().join(", "));
    let count = |name: &str, tokens: Option<u64>| tokens.filter(|tokens| *tokens > 0).map(|n| format!("{n} {name}"));
    let tokens = [
        count("prompt", request.prompt_tokens),
        count("completion", request.completion_tokens),
        count("cached", request.cached_tokens),
        count("reasoning", request.reasoning_tokens),
    ];
    line("tokens", tokens.into_iter().flatten().collect::<Vec<_>>().join(", "));
    line("cost", request.cost_usd.map(|usd| format!("{usd} USD")).unwrap_or_default());
    for (place, attempt) in request.attempts.iter().enumerate() {
        lines.push(on_one_line(&described_attempt(place + 1, attempt)));
        lines.extend(
            attempt.passed_over.iter().map(|passed| format!("     passed over {}", passed.shown(|at| moment(at, now)))),
        );
    }
    lines.extend(request.held.iter().map(|held| format!("  could not be asked: {}", held.shown(|at| moment(at, now)))));
    lines.extend(request.outside.iter().map(|one| format!("  no candidate: {} ({})", one.endpoint, one.reason)));
    let text = lines.join("\n") + "\n";
    printable(&text)
}

fn described_attempt(place: usize, attempt: &LoggedAttempt) -> String {
    let key = attempt.endpoint_key.as_ref().map(|key| format!(", key {key}")).unwrap_or_default();
    let model = attempt.model.as_ref().map(|model| format!(" for {model}")).unwrap_or_default();
    let status = attempt.status.map(|status| format!(" {status}")).unwrap_or_default();
    let trouble = attempt.trouble.as_ref().zip(attempt.rule.as_ref());
    let trouble = trouble.map(|(trouble, rule)| format!(" ({trouble} by {rule})")).unwrap_or_default();
    format!(
        "  {place}. {}{key}{model}, after {}: {}{status}{trouble}, took {}",
        attempt.endpoint,
        millis(attempt.began_ms.number()),
        attempt.outcome,
        millis(attempt.took_ms.number())
    )
}
