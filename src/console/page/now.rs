//! *Now*: what is wrong, the endpoints with their keys, and the requests that are under way.

use maud::{Markup, html};
use serde_json::Value;

use super::endpoint::{self, State, fails_often, held_by, share_of_errors};
use super::live::{Region, Rows, View};
use super::parts::{Call, badge, count, fact, grouped, has, in_path, list, member, moment, nothing, or_dash, text};
use super::words::Language;

/// Endpoints in trouble that are named at the top, and requests that are listed.
const NAMED_MAX: usize = 8;
pub(super) const RUNNING_MAX: usize = 50;

/// The view as the stream of changes has it.
pub(super) fn view(w: Language, status: &Value, running: &Value, open: &[String]) -> View {
    let fixed = vec![
        Region::new("alerts", alerts(w, status)),
        Region::new("totals", totals(w, status)),
        Region::new("running", self::running(w, running)),
    ];
    let rows = list(status, "apis").iter().map(|api| endpoint::row(w, api, open)).collect();
    View { fixed, rows: Some(Rows { id: "endpoints", rows }) }
}

/// The same as a document.
pub(super) fn document(w: Language, view: &View) -> Markup {
    html! {
        h1 { (w.t("Now")) }
        (view.fixed("alerts"))
        (view.fixed("totals"))
        section aria-labelledby="endpoints-title" {
            h2 id="endpoints-title" { (w.t("Endpoints")) }
            (view.rows())
        }
        section aria-labelledby="running-title" {
            h2 id="running-title" { (w.t("Requests under way")) }
            (view.fixed("running"))
        }
    }
}

/// What is wrong, in one look.
fn alerts(w: Language, status: &Value) -> Markup {
    let apis = list(status, "apis");
    let wrong: Vec<(&Value, State<'_>)> = apis
        .iter()
        .map(|api| (api, State::of_endpoint(w, api)))
        .filter(|(api, state)| match state.color {
            "good" => fails_often(api),
            "off" => has(api, "switchedOff"),
            _ => true,
        })
        .collect();
    let is_true = |api: &&Value, key| member(api, key) == &Value::Bool(true);
    let able = apis.iter().filter(|api| is_true(api, "available")).count();
    // Those that are off in the config are nobody's trouble.
    let meant = apis.iter().filter(|api| is_true(api, "enabled") || has(api, "switchedOff")).count();
    let config = member(status, "config");
    let of_process: Vec<(&'static str, &str)> = [
        (w.t("The config file is not in use:"), text(config, "error")),
        (w.t("The file of keys is not in use:"), text(config, "keysError")),
        (w.t("The ledger fails:"), text(member(status, "ledger"), "error")),
        (w.t("The request log fails:"), text(member(status, "requestLog"), "error")),
    ]
    .into_iter()
    .filter(|(_, why)| !why.is_empty())
    .collect();
    let waiting = list(config, "needsUpgrade");
    let color = match (able, wrong.is_empty(), of_process.is_empty()) {
        (0, ..) | (.., false) => "bad",
        (_, false, _) => "near",
        _ => "good",
    };
    let (able_shown, all_shown) = (able.to_string(), meant.to_string());
    html! {
        div id="alerts" class={ "alerts " (color) } {
            p class="verdict" role="status" { (w.with("{} of {} endpoints can take requests", &[&able_shown, &all_shown])) }
            ul {
                @for (what, why) in of_process { li class="bad" { strong { (what) } " " (why) } }
                @for (api, state) in wrong.iter().take(NAMED_MAX) {
                    li {
                        a href=(endpoint::path(text(api, "id"))) { (text(api, "name")) } " " (state.shown(w))
                        @if let Some(why) = held_by(api) { " · " (why) }
                        @if fails_often(api) { " · " (w.t("errors")) " " (share_of_errors(api)) }
                        @if (state.color == "bad" || fails_often(api)) && has(api, "lastError") { " · " (text(member(api, "lastError"), "what")) }
                    }
                }
                @if wrong.len() > NAMED_MAX { li { (w.with("and {} more", &[&(wrong.len() - NAMED_MAX).to_string()])) } }
                @if !waiting.is_empty() {
                    li {
                        (w.t("Waits for an upgrade or a restart:")) " "
                        @for (place, change) in waiting.iter().enumerate() {
                            @if place > 0 { ", " } (change.as_str().unwrap_or_default())
                        }
                    }
                }
            }
        }
    }
}

/// The process, its config, ledger and request log.
fn totals(w: Language, status: &Value) -> Markup {
    let (config, ledger, log) = (member(status, "config"), member(status, "ledger"), member(status, "requestLog"));
    let dropped: u64 = member(log, "dropped").as_object().into_iter().flatten().filter_map(|(_, n)| n.as_u64()).sum();
    let state = |value: &Value| {
        if text(value, "state") == "ok" { badge("good", w.t("ok")) } else { badge("bad", w.t("failing")) }
    };
    html! {
        dl id="totals" class="facts" {
            (fact(w.t("Open requests"), &html! { (grouped(count(status, "openRequests"))) }))
            (fact(w.t("Running since"), &moment(text(status, "startedAt"))))
            (fact(w.t("Config"), &html! {
                @if has(config, "error") { (badge("bad", w.t("refused"))) } @else { (badge("good", w.t("ok"))) }
                " " (w.with("version {}", &[&count(config, "version").to_string()])) ", " (moment(text(config, "loadedAt")))
            }))
            (fact(w.t("Ledger"), &html! {
                (state(ledger))
                @if count(ledger, "queued") > 0 { " " (w.with("{} waiting", &[&grouped(count(ledger, "queued"))])) }
                @if count(ledger, "denied") > 0 { " " (w.with("{} refused", &[&grouped(count(ledger, "denied"))])) }
                @if count(ledger, "uncounted") > 0 { " " (w.with("{} not counted", &[&grouped(count(ledger, "uncounted"))])) }
            }))
            (fact(w.t("Request log"), &html! {
                @if log.is_null() { (badge("off", w.t("off"))) } @else {
                    (state(log)) " " (w.with("{} written", &[&grouped(count(log, "written"))]))
                    @if dropped > 0 { ", " (w.with("{} dropped", &[&grouped(dropped)])) }
                }
            }))
        }
    }
}

/// Requests that are under way.
pub(super) fn running(w: Language, running: &Value) -> Markup {
    let all = list(running, "data");
    let more = count(running, "count").saturating_sub(all.len() as u64);
    html! {
        div id="running" {
            @if all.is_empty() { (nothing(w.t("No request is under way."))) } @else {
                ul class="rows" {
                    @for request in all {
                        @let (id, number) = (text(request, "id"), count(request, "number"));
                        li id={ "r-" (number) } {
                            @match text(request, "state") {
                                "queued" => (badge("near", w.t("waits for a permit"))),
                                "asked" => (badge("near", w.t("asked"))),
                                _ => (badge("good", w.t("being answered"))),
                            }
                            " " time data-since=(text(request, "began")) datetime=(text(request, "began")) { (text(request, "began")) }
                            " " strong { (or_dash(text(request, "model"))) }
                            @if has(request, "endpoint") { " → " (text(request, "endpoint")) }
                            @if has(request, "endpointKey") { " " code { (text(request, "endpointKey")) } }
                            " " span class="label" {
                                (text(request, "key")) " " (text(request, "address")) " " (text(request, "method")) " " (text(request, "path"))
                            }
                            (Call {
                                method: "DELETE",
                                path: format!("/v1/admin/running/{}?number={number}", in_path(id)),
                                button: w.t("Cancel"),
                                confirm: Some(w.with("Cancel the request of {} for {}?", &[Some(text(request, "key")).filter(|key| !key.is_empty()).unwrap_or(w.t("the server's own key")), or_dash(text(request, "model"))])),
                            }.button())
                        }
                    }
                    @if more > 0 { li { (w.with("and {} more", &[&grouped(more)])) } }
                }
            }
        }
    }
}
