//! *Keys*: those of callers with their limits, what is spent of their budgets, and what can be done with each.

use maud::{Markup, html};
use serde_json::Value;

use super::live::{Region, Rows, View};
use super::parts::{Call, badge, bar, fact, field, has, in_path, list, moment, needed, nothing, or_dash, query, text};
use super::words::Language;

/// The view as the stream of changes has it.
pub(super) fn view(w: Language, keys: &Value) -> View {
    let rows = list(keys, "data").iter().map(|key| row(w, key)).collect();
    let none = html! {
        div id="none" {
            @if list(keys, "data").is_empty() { (nothing(w.t("There are no keys of callers: the server's own key opens everything."))) }
        }
    };
    View { fixed: vec![Region::new("none", none)], rows: Some(Rows { id: "keys", rows }) }
}

/// The same as a document.
pub(super) fn document(w: Language, view: &View) -> Markup {
    html! {
        h1 { (w.t("Keys")) }
        details class="add" {
            summary { (w.t("Add a key")) }
            (Call { method: "POST", path: "/v1/admin/keys".to_owned(), button: w.t("Add"), confirm: None }.form(&html! {
                (needed(w.t("Name"), "name", "text", "ada"))
                (field(w.t("Requests a minute"), "rpm", "number", ""))
                (field(w.t("Requests a day"), "rpd", "number", ""))
                (field(w.t("Tokens a minute"), "tpm", "number", ""))
                (field(w.t("Tokens a day"), "tpd", "number", ""))
                (field(w.t("At once"), "maxConcurrent", "number", ""))
                (field(w.t("Dollars a month"), "budget.0.usd", "number", ""))
                input type="hidden" name="budget.0.per" value="month" data-kind="text" data-with="budget.0.usd";
                (field(w.t("Models"), "models", "list", "gpt-4o*, claude-*"))
                (field(w.t("Ends"), "expires", "moment", ""))
            }))
        }
        (view.fixed("none"))
        (view.rows())
    }
}

fn row(w: Language, key: &Value) -> (String, Markup) {
    let name = text(key, "name");
    let id = format!("k-{}", in_path(name));
    let (state, color) = match text(key, "state") {
        "open" => (w.t("open"), "good"),
        "off" => (w.t("off"), "off"),
        "expired" => (w.t("expired"), "bad"),
        "revoked" => (w.t("revoked"), "off"),
        other => (other, "near"),
    };
    let is_of_file = text(key, "source") == "file";
    let names = |of: &str| list(key, of).iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ");
    let markup = html! {
        li id=(id) class="key" {
            div class="who" {
                strong { (name) } " " code { "…" (text(key, "lastFour")) } " " (badge(color, state))
            }
            dl class="facts" {
                (fact(w.t("Last used"), &html! { @if has(key, "lastUsed") { (moment(text(key, "lastUsed"))) } @else { (w.t("never")) } }))
                (fact(w.t("Limits"), &html! { (or_dash(&names("limits"))) }))
                @if has(key, "models") { (fact(w.t("Models"), &html! { (names("models")) })) }
                @if has(key, "calls") { (fact(w.t("Calls"), &html! { (names("calls")) })) }
                @if has(key, "endpoints") { (fact(w.t("Endpoints"), &html! { (names("endpoints")) })) }
                @if !list(key, "tags").is_empty() { (fact(w.t("Labels"), &html! { (names("tags")) })) }
                @if has(key, "expires") { (fact(w.t("Ends"), &moment(text(key, "expires")))) }
            }
            @for budget in list(key, "budgets") { (self::budget(w, budget)) }
            p { a href={ "/dashboard/requests" (query(&[("key", name)])) } { (w.t("Its requests")) } }
            @if is_of_file && text(key, "state") != "revoked" { (actions(w, name, list(key, "budgets"))) }
            @else if !is_of_file { p class="label" { (w.t("It stands in the config, and is changed there.")) } }
        }
    };
    (id, markup)
}

/// The figures of an amount as it is said, such as `$1,234.50`.
fn amount(said: &str) -> f64 {
    said.chars().filter(|c| c.is_ascii_digit() || *c == '.').collect::<String>().parse().unwrap_or_default()
}

fn budget(w: Language, budget: &Value) -> Markup {
    let (spent, limit) = (text(budget, "spent"), text(budget, "limit"));
    let label = w.with("{} of {} spent", &[spent, limit]);
    html! {
        div class="limit budget" {
            span class="label" { (text(budget, "per")) }
            (bar(amount(spent), amount(limit), &label))
            span class="figures" { (label) @if amount(text(budget, "reserved")) > 0.0 { ", " (w.with("{} reserved", &[text(budget, "reserved")])) } }
            @if has(budget, "ends") { span class="frees" { (w.t("frees")) " " (moment(text(budget, "ends"))) } }
        }
    }
}

fn actions(w: Language, name: &str, budgets: &[Value]) -> Markup {
    let path = |action: &str| format!("/v1/admin/keys/{}{action}", in_path(name));
    html! {
        details class="actions" {
            summary { (w.t("Change")) }
            (Call { method: "POST", path: path("/rotate"), button: w.t("Rotate"), confirm: Some(w.with("Make another key in place of {}?", &[name])) }
                .form(&field(w.t("hours for which the old one opens, too"), "overlapHours", "number", "24")))
            @if !budgets.is_empty() {
                (Call { method: "POST", path: path("/raise"), button: w.t("Raise"), confirm: None }.form(&html! {
                    (needed(w.t("more of the budget"), "by", "number", "5"))
                    label class="field" {
                        span { (w.t("budget")) }
                        select name="budget" data-kind="budget" {
                            @for budget in budgets {
                                @let unit = if text(budget, "limit").starts_with('$') { "usd" } else { "tokens" };
                                option value={ (unit) " " (text(budget, "per")) } { (text(budget, "limit")) " (" (text(budget, "per")) ")" }
                            }
                        }
                    }
                    (needed(w.t("until"), "until", "moment", ""))
                }))
            }
            (Call { method: "DELETE", path: path(""), button: w.t("Revoke"), confirm: Some(w.with("Revoke {}? This cannot be undone.", &[name])) }.button())
            (Call { method: "DELETE", path: path("?now=true"), button: w.t("Revoke, and cut its requests off"), confirm: Some(w.with("Revoke {}? This cannot be undone.", &[name])) }.button())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_as_they_are_said() {
        let read = ["$0", "$10", "1,500 tokens", "$1,234.50", ""].map(|said| format!("{}", amount(said)));
        assert_eq!(read, ["0", "10", "1500", "1234.5", "0"]);
    }
}
