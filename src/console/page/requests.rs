//! *Requests*: those of the log by filters that stand in the address, and one with the decision behind it.

use jiff::{SignedDuration, Timestamp};
use maud::{Markup, html};
use serde_json::Value;

use super::live::{Region, Rows, View};
use super::now::running;
use super::parts::{
    badge, count, dollars, duration, fact, grouped, has, in_path, list, member, moment, nothing, number, or_dash,
    query, text,
};
use super::words::Language;

/// Filters of the view, as its address has them; those of the API, but for `within`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Filters(Vec<(String, String)>);

const NAMES: [&str; 9] = ["key", "endpoint", "model", "status", "failed", "session", "id", "within", "before"];

impl Filters {
    /// Those of an address.
    pub(super) fn of(query: Option<&str>) -> Self {
        let given = url::form_urlencoded::parse(query.unwrap_or_default().as_bytes());
        let known = given.filter(|(name, value)| NAMES.contains(&name.as_ref()) && !value.is_empty());
        Self(known.map(|(name, value)| (name.into_owned(), value.into_owned())).collect())
    }

    fn get(&self, name: &str) -> &str {
        self.0.iter().find(|(one, _)| one == name).map_or("", |(_, value)| value)
    }

    /// True if the newest requests are shown, so that new ones belong to them.
    pub(super) fn is_live(&self) -> bool {
        self.get("before").is_empty()
    }

    /// The query of the API.
    pub(super) fn for_api(&self) -> String {
        let hours = match self.get("within") {
            "1h" => Some(1),
            "24h" => Some(24),
            "7d" => Some(7 * 24),
            _ => None,
        };
        let since = hours.and_then(|hours| Timestamp::now().checked_sub(SignedDuration::from_hours(hours)).ok());
        let since = since.map(|since| since.to_string()).unwrap_or_default();
        let others =
            self.0.iter().filter(|(name, _)| name != "within").map(|(name, value)| (name.as_str(), value.as_str()));
        query(&others.chain([("since", since.as_str())]).collect::<Vec<_>>()).trim_start_matches('?').to_owned()
    }

    /// The address of the same view with another start.
    fn before(&self, row: i64) -> String {
        let row = row.to_string();
        let others =
            self.0.iter().filter(|(name, _)| name != "before").map(|(name, value)| (name.as_str(), value.as_str()));
        format!("/dashboard/requests{}", query(&others.chain([("before", row.as_str())]).collect::<Vec<_>>()))
    }
}

/// The view as the stream of changes has it. Without a page, the rows stay as they are.
pub(super) fn view(w: Language, page: Option<&Value>, under_way: &Value, filters: &Filters) -> View {
    let mut fixed = vec![Region::new("running", running(w, under_way))];
    let rows = page.map(|page| {
        fixed.push(Region::new("older", older(w, page, filters)));
        Rows { id: "requests", rows: list(page, "data").iter().map(|request| row(w, request)).collect() }
    });
    View { fixed, rows }
}

/// What comes before those of a page, or that there is nothing.
fn older(w: Language, page: &Value, filters: &Filters) -> Markup {
    html! {
        div id="older" {
            @if list(page, "data").is_empty() { (nothing(w.t("The log has no such request."))) }
            @if let Some(next) = member(page, "next").as_i64() { a href=(filters.before(next)) { (w.t("Older ones")) } }
        }
    }
}

/// The same as a document.
pub(super) fn document(w: Language, view: &View, filters: &Filters, known: &Known) -> Markup {
    html! {
        h1 { (w.t("Requests")) }
        @if filters.is_live() {
            details class="under-way" { summary { (w.t("Requests under way")) } (view.fixed("running")) }
        }
        (form(w, filters, known))
        (view.rows())
        (view.fixed("older"))
    }
}

/// Names that can be filtered by.
pub(super) struct Known {
    pub(super) endpoints: Vec<String>,
    pub(super) keys: Vec<String>,
    pub(super) models: Vec<String>,
}

/// Names that are suggested in one field.
const SUGGESTED_MAX: usize = 200;

fn form(w: Language, filters: &Filters, known: &Known) -> Markup {
    let lists = [("endpoint", &known.endpoints), ("key", &known.keys), ("model", &known.models)];
    let input = |name: &str, label: &str| {
        let list = lists.iter().any(|(one, _)| *one == name).then(|| format!("of-{name}"));
        html! {
            label class="field" {
                span { (label) }
                input type="text" name=(name) value=(filters.get(name)) list=[list] autocomplete="off" spellcheck="false";
            }
        }
    };
    let select = |name: &str, label: &str, choices: &[(&str, &str)]| {
        html! {
            label class="field" {
                span { (label) }
                select name=(name) { @for (value, said) in choices { option value=(value) selected[filters.get(name) == *value] { (said) } } }
            }
        }
    };
    html! {
        form class="filters" method="get" action="/dashboard/requests" {
            (input("key", w.t("Key")))
            (input("endpoint", w.t("Endpoint")))
            (input("model", w.t("Model")))
            (select("failed", w.t("Outcome"), &[("", w.t("any")), ("true", w.t("failed"))]))
            (select("status", w.t("Status"), &[("", w.t("any")), ("2xx", "2xx"), ("4xx", "4xx"), ("429", "429"), ("5xx", "5xx")]))
            (select("within", w.t("Time"), &[("", w.t("any")), ("1h", w.t("an hour")), ("24h", w.t("a day")), ("7d", w.t("a week"))]))
            (input("session", w.t("Session")))
            (input("id", w.t("Request id")))
            button type="submit" { (w.t("Search")) }
            a href="/dashboard/requests" { (w.t("All")) }
            @for (name, all) in lists { datalist id={ "of-" (name) } { @for one in all.iter().take(SUGGESTED_MAX) { option value=(one) {} } } }
        }
    }
}

fn outcome(w: Language, request: &Value) -> Markup {
    let status = member(request, "status").as_u64();
    let shown = status.map_or_else(|| w.t("no answer").to_owned(), |status| status.to_string());
    let color = match status {
        Some(200..400) if !has(request, "fault") => "good",
        Some(400..500) => "near",
        _ => "bad",
    };
    html! { (badge(color, &shown)) @if has(request, "fault") { " " code { (text(request, "fault")) } } }
}

/// Where a request went: the model that it asked for, and what it was sent to.
fn way(request: &Value) -> Markup {
    html! {
        strong { (or_dash(text(request, "model"))) }
        @if has(request, "fallback") { " ⇒ " (text(request, "fallback")) }
        @if has(request, "endpoint") { " → " (text(request, "endpoint")) }
        @if has(request, "endpointKey") { " " code { (text(request, "endpointKey")) } }
    }
}

fn row(w: Language, request: &Value) -> (String, Markup) {
    let id = format!("q-{}", member(request, "row"));
    let attempts = list(request, "attempts").len();
    let markup = html! {
        li id=(id) class="request" {
            a id={ (id) "-a" } href={ "/dashboard/requests/" (in_path(text(request, "id"))) "?row=" (member(request, "row")) } { (moment(text(request, "time"))) }
            span { (outcome(w, request)) }
            span { (way(request)) }
            span class="label" {
                @if has(request, "key") { (text(request, "key")) " · " }
                (duration(number(request, "totalMs").unwrap_or_default()))
                @if attempts > 1 { " · " (w.with("{} attempts", &[&attempts.to_string()])) }
                @if has(request, "totalTokens") { " · " (w.with("{} tokens", &[&grouped(count(request, "totalTokens"))])) }
                @if let Some(usd) = number(request, "costUsd") { " · " (dollars(usd)) }
            }
        }
    };
    (id, markup)
}

/// One request: what was decided, and what came of it.
pub(super) fn one(w: Language, request: &Value) -> Markup {
    let attempts = list(request, "attempts");
    let total = number(request, "totalMs").unwrap_or_default();
    let optional = |key: &str| html! { @match number(request, key) { Some(ms) => (duration(ms)), None => "–" } };
    let tokens = |key: &str| html! { @if has(request, key) { (grouped(count(request, key))) } @else { "–" } };
    let plain = |key: &str| html! { (or_dash(text(request, key))) };
    html! {
        p { a id="back-to-requests" href="/dashboard/requests" { "← " (w.t("Requests")) } }
        h1 { (w.t("Request")) " " code { (text(request, "id")) } }
        p { (outcome(w, request)) " " (way(request)) }
        @if has(request, "cause") { p class="bad" { (text(request, "cause")) } }
        h2 { (w.t("The decision")) }
        ol class="attempts" {
            @for attempt in attempts { (self::attempt(w, attempt, total)) }
            @if attempts.is_empty() { li { (w.t("No endpoint was asked.")) } }
        }
        @if !list(request, "held").is_empty() {
            h3 { (w.t("Could not be asked in the end")) }
            (passed_over(w, list(request, "held")))
        }
        @if !list(request, "outside").is_empty() {
            h3 { (w.t("Could not have been asked at all")) }
            ul { @for outside in list(request, "outside") { li { strong { (text(outside, "endpoint")) } ": " (text(outside, "reason").replace('_', " ")) } } }
        }
        h2 { (w.t("What it was and took")) }
        dl class="facts" {
            (fact(w.t("Time"), &moment(text(request, "time"))))
            (fact(w.t("Key"), &plain("key")))
            (fact(w.t("Client"), &plain("address")))
            (fact(w.t("Call"), &html! { (text(request, "method")) " " (text(request, "path")) }))
            (fact(w.t("Model at the endpoint"), &plain("endpointModel")))
            (fact(w.t("Session"), &html! { @if has(request, "session") {
                a href={ "/dashboard/requests" (query(&[("session", text(request, "session"))])) } { (text(request, "session")) } } @else { "–" } }))
            (fact(w.t("Affinity"), &plain("affinity")))
            (fact(w.t("Waited for a permit"), &optional("queuedMs")))
            (fact(w.t("First byte after"), &optional("firstByteMs")))
            (fact(w.t("First token after"), &optional("firstTokenMs")))
            (fact(w.t("Whole time"), &optional("totalMs")))
            (fact(w.t("Tokens a second"), &html! { @match number(request, "tokensPerSecond") { Some(speed) => (format!("{speed:.1}")), None => "–" } }))
            (fact(w.t("Prompt tokens"), &tokens("promptTokens")))
            (fact(w.t("of these cached"), &tokens("cachedTokens")))
            (fact(w.t("Completion tokens"), &tokens("completionTokens")))
            (fact(w.t("of these reasoning"), &tokens("reasoningTokens")))
            (fact(w.t("Cost"), &html! { @match number(request, "costUsd") { Some(usd) => (dollars(usd)), None => "–" } }))
            (fact(w.t("Bytes in and out"), &html! { (grouped(count(request, "requestBytes"))) " / " (grouped(count(request, "bytes"))) }))
            (fact(w.t("Trace"), &html! { code { (or_dash(text(request, "trace"))) } }))
            (fact(w.t("Version of the config"), &html! { (count(request, "config")) }))
        }
        @for (title, key) in [(w.t("Its body"), "requestBody"), (w.t("The answer's body"), "answerBody")] {
            @if has(request, key) { h2 { (title) } pre tabindex="0" { (text(request, key)) } }
        }
    }
}

fn attempt(w: Language, attempt: &Value, total: f64) -> Markup {
    let (began, took) = (number(attempt, "beganMs").unwrap_or_default(), number(attempt, "tookMs").unwrap_or_default());
    let part = |ms: f64| if total > 0.0 { (100.0 * ms / total).clamp(0.0, 100.0) } else { 0.0 };
    let is_good = text(attempt, "outcome") == "ok";
    let width = part(took).max(0.5);
    html! {
        li {
            p {
                strong { (text(attempt, "endpoint")) }
                @if has(attempt, "endpointKey") { " " code { (text(attempt, "endpointKey")) } }
                @if has(attempt, "model") { " · " (text(attempt, "model")) }
                " " (badge(if is_good { "good" } else { "bad" }, &text(attempt, "outcome").replace('_', " ")))
                @if let Some(status) = member(attempt, "status").as_u64() { " " (status) }
                @if has(attempt, "rule") {
                    " " span class="label" { (w.with("trouble of: {} (rule {})", &[text(attempt, "trouble"), text(attempt, "rule")])) }
                }
            }
            svg class="span" viewBox="0 0 100 4" preserveAspectRatio="none" role="img"
                aria-label=(w.with("from {} on, for {}", &[&duration(began), &duration(took)]))
            { rect x=(format!("{:.2}", part(began).min(99.5))) width=(format!("{width:.2}")) height="4" class=(if is_good { "good" } else { "bad" }) {} }
            p class="label" { (w.with("from {} on, for {}", &[&duration(began), &duration(took)])) }
            @if !list(attempt, "passedOver").is_empty() {
                details open { summary { (w.t("Passed over")) } (passed_over(w, list(attempt, "passedOver"))) }
            }
        }
    }
}

fn passed_over(w: Language, all: &[Value]) -> Markup {
    html! {
        ul {
            @for one in all {
                li {
                    strong { (text(one, "endpoint")) }
                    @if has(one, "key") { " " code { (text(one, "key")) } }
                    ": " (text(one, "words"))
                    @if has(one, "models") { " " (w.with("for {}", &[text(one, "models")])) }
                    @if has(one, "until") { ", " (w.t("until")) " " (moment(text(one, "until"))) }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_stand_in_the_address() {
        let filters = Filters::of(Some("key=a%26b&failed=true&evil=1&model=&within=1h"));
        assert_eq!(filters.before(7), "/dashboard/requests?key=a%26b&failed=true&within=1h&before=7");
        assert!(filters.is_live() && !Filters::of(Some("before=3")).is_live());
        let api = filters.for_api();
        assert!(api.starts_with("key=a%26b&failed=true&since=2") && !api.contains("within"), "{api}");
    }
}
