//! *Now*: what is wrong, the endpoints with their keys, and the requests that are under way.

use maud::{Markup, html};
use serde_json::Value;

use super::live::{Region, Rows, View};
use super::parts::{
    Call, badge, bar, count, duration, fact, field, grouped, has, in_path, list, member, moment, nothing, number,
    or_dash, query, text,
};
use super::words::Language;

/// Endpoints in trouble that are named at the top, and requests that are listed.
const NAMED_MAX: usize = 8;
pub(super) const RUNNING_MAX: usize = 50;

/// What an endpoint, or one of its keys, can do now.
struct State<'a> {
    color: &'static str,
    word: &'static str,
    /// Until when, if that is known.
    until: &'a str,
}

impl<'a> State<'a> {
    fn of_endpoint(w: Language, api: &'a Value) -> Self {
        let state = |color, word, until| Self { color, word, until };
        let off = member(api, "switchedOff");
        let is_true = |key| member(api, key) == &Value::Bool(true);
        let is_partly_held = || {
            let models = member(api, "models").as_object().into_iter().flatten();
            let limits = member(api, "modelLimits").as_object().into_iter().flatten();
            let by_state = member(member(api, "keys"), "byState").as_object().into_iter().flatten();
            models.into_iter().any(|(_, model)| member(model, "available") == &Value::Bool(false))
                || limits.into_iter().any(|(_, limit)| has(limit, "heldBy"))
                || by_state.into_iter().any(|(state, keys)| state != "open" && keys.as_u64() > Some(0))
        };
        if !off.is_null() {
            state("off", w.t("switched off"), text(off, "until"))
        } else if !is_true("enabled") {
            state("off", w.t("off in the config"), "")
        } else if has(api, "restEnds") {
            state("bad", w.t("resting"), text(api, "restEnds"))
        } else if has(api, "coolDownEnds") {
            state("bad", w.t("cooling down"), text(api, "coolDownEnds"))
        } else if is_true("temporarilyDisabled") {
            state("bad", w.t("being tried again"), "")
        } else if has(api, "heldBy") {
            state("near", w.t("full"), text(api, "limitFrees"))
        } else if !is_true("available") {
            state("bad", w.t("not available"), "")
        } else if is_partly_held() {
            state("near", w.t("open in part"), "")
        } else {
            state("good", w.t("open"), "")
        }
    }

    fn of_key(w: Language, key: &'a Value) -> Self {
        let (color, word, until) = match text(key, "state") {
            "cooling_down" => ("bad", w.t("cooling down"), text(key, "coolDownEnds")),
            "resting" => ("bad", w.t("resting"), text(key, "restEnds")),
            "full" => ("near", w.t("full"), text(key, "limitFrees")),
            _ => ("good", w.t("open"), ""),
        };
        Self { color, word, until }
    }

    fn shown(&self, w: Language) -> Markup {
        html! {
            (badge(self.color, self.word))
            @if !self.until.is_empty() { " " (w.t("until")) " " (moment(self.until)) }
        }
    }
}

/// The view as the stream of changes has it.
pub(super) fn view(w: Language, status: &Value, running: &Value, open: &[String]) -> View {
    let fixed = vec![
        Region::new("alerts", alerts(w, status)),
        Region::new("totals", totals(w, status)),
        Region::new("running", self::running(w, running)),
    ];
    let rows = list(status, "apis").iter().map(|api| endpoint(w, api, open)).collect();
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
                        a href=(endpoint_path(text(api, "id"))) { (text(api, "name")) } " " (state.shown(w))
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

/// The limit that holds it back. One that is switched off is held back by nothing else.
fn held_by(api: &Value) -> Option<&str> {
    api.get("heldBy").and_then(Value::as_str).filter(|_| !has(api, "switchedOff"))
}

/// Attempts of the last hour from which on a share of errors says something.
const ATTEMPTS_TELLING: u64 = 4;

/// True if half of what it was asked in the last hour failed.
fn fails_often(api: &Value) -> bool {
    let hour = member(api, "lastHour");
    count(hour, "attempts") >= ATTEMPTS_TELLING && count(hour, "failed") * 2 >= count(hour, "attempts")
}

fn share_of_errors(api: &Value) -> String {
    let hour = member(api, "lastHour");
    percent(count(hour, "failed"), count(hour, "attempts"))
}

pub(super) fn endpoint_path(id: &str) -> String {
    format!("/dashboard/endpoints/{}", in_path(id))
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

/// An endpoint as a row: its id, and its markup.
fn endpoint(w: Language, api: &Value, open: &[String]) -> (String, Markup) {
    let id = text(api, "id");
    let row = row_id(id);
    let markup = html! {
        li id=(row) class="endpoint" {
            div class="who" {
                a id={ (row) "-a" } href=(endpoint_path(id)) { (text(api, "name")) }
                @if text(api, "name") != id { " " code { (id) } }
                div { (State::of_endpoint(w, api).shown(w)) }
            }
            div class="flight" {
                span class="label" { (w.t("in flight")) } " " strong { (grouped(count(api, "inFlight"))) }
            }
            div class="bars" { (bars(w, member(api, "quota"), &["rpm", "rpd", "tpm", "tpd", "maxConcurrent"])) }
            div class="trend" { (trend(w, member(api, "lastHour"))) }
            @if has(api, "keys") { div class="lanes" { (keys(w, id, member(api, "keys"), open)) } }
        }
    };
    (row, markup)
}

/// Id of an endpoint's row: its own id may have anything in it.
fn row_id(id: &str) -> String {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    format!("e-{:016x}", hasher.finish())
}

/// What is used of each limit, with the time at which it frees.
pub(super) fn bars(w: Language, quota: &Value, kinds: &[&str]) -> Markup {
    html! {
        @for kind in kinds {
            @let of_kind = member(quota, kind);
            @if let Some(limit) = number(of_kind, "limit").filter(|limit| *limit >= 0.0) {
                @let (used, whole) = (count(of_kind, "used"), grouped(of_kind["limit"].as_u64().unwrap_or_default()));
                @let name = limit_name(w, kind);
                div class="limit" data-limit=(kind) {
                    span class="label" { (name) }
                    (bar(number(of_kind, "used").unwrap_or_default(), limit, &format!("{name}: {used} / {whole}")))
                    span class="figures" { (grouped(used)) " / " (whole) }
                    @if has(of_kind, "resets") && used > 0 { span class="frees" { (w.t("frees")) " " (moment(text(of_kind, "resets"))) } }
                }
            }
        }
    }
}

fn limit_name(w: Language, kind: &str) -> &'static str {
    match kind {
        "rpm" => w.t("requests a minute"),
        "rpd" => w.t("requests a day"),
        "tpm" => w.t("tokens a minute"),
        "tpd" => w.t("tokens a day"),
        _ => w.t("at once"),
    }
}

/// The last hour: the share of errors, and times to the first byte as a line.
fn trend(w: Language, hour: &Value) -> Markup {
    let (attempts, failed) = (count(hour, "attempts"), count(hour, "failed"));
    let times: Vec<Option<f64>> = list(hour, "firstByteMs").iter().map(Value::as_f64).collect();
    let last = times.iter().rev().find_map(|time| *time);
    html! {
        @if attempts == 0 { span class="label" { (w.t("nothing asked in the last hour")) } } @else {
            span class="label" { (w.t("errors")) } " "
            strong class=[(failed > 0).then_some("bad")] { (percent(failed, attempts)) }
            span class="label" { " " (w.with("{} of {}, last hour", &[&grouped(failed), &grouped(attempts)])) }
        }
        @if let Some(last) = last {
            div { (super::chart::sparkline(&times, w.t("time to the first byte or event, last hour"))) span class="label" { (duration(last)) } }
        }
    }
}

pub(super) fn percent(part: u64, whole: u64) -> String {
    // Tenths of a percent.
    let tenths = (part.saturating_mul(1000) + whole / 2).checked_div(whole).unwrap_or_default();
    format!("{}.{} %", tenths / 10, tenths % 10)
}

/// The keys of an endpoint that has several: their number by state, and one by one if they are opened.
fn keys(w: Language, id: &str, keys: &Value, open: &[String]) -> Markup {
    let by_state = member(keys, "byState");
    let is_open = !list(keys, "list").is_empty();
    let others = open.iter().filter(|one| *one != id).map(String::as_str);
    let mut toggled: Vec<(&str, &str)> = others.map(|one| ("open", one)).collect();
    if !is_open {
        toggled.push(("open", id));
    }
    let toggled = if toggled.is_empty() { "?open=".to_owned() } else { query(&toggled) };
    let row = row_id(id);
    html! {
        a id={ (row) "-k" } class="toggle" href={ "/dashboard" (toggled) "#" (row) } aria-expanded=(is_open) {
            (w.with("{} keys", &[&grouped(count(keys, "count"))]))
        }
        @for (state, word, color) in [("open", w.t("open"), "good"), ("full", w.t("full"), "near"),
            ("resting", w.t("resting"), "bad"), ("cooling_down", w.t("cooling down"), "bad")]
        {
            @if count(by_state, state) > 0 { " " (badge(color, &format!("{} {word}", grouped(count(by_state, state))))) }
        }
        (key_rows(w, keys))
    }
}

/// Keys one by one.
pub(super) fn key_rows(w: Language, keys: &Value) -> Markup {
    let listed = list(keys, "list");
    html! {
        @if !listed.is_empty() {
            ul class="keys" {
                @for key in listed {
                    li {
                        code { (text(key, "key")) } " " (State::of_key(w, key).shown(w)) " "
                        span class="label" { (w.t("in flight")) " " (grouped(count(key, "inFlight"))) }
                        (bars(w, member(key, "quota"), &["rpm", "rpd", "tpm", "tpd", "maxConcurrent"]))
                        @if has(key, "lastError") { div class="label" { (text(member(key, "lastError"), "what")) } }
                    }
                }
                @if count(keys, "count") > listed.len() as u64 {
                    li { (w.with("and {} more", &[&grouped(count(keys, "count") - listed.len() as u64)])) }
                }
            }
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

/// One endpoint with all that is known of it, as the stream of changes has it.
pub(super) fn endpoint_view(w: Language, api: &Value) -> View {
    View { fixed: vec![Region::new("endpoint", endpoint_region(w, api))], rows: None }
}

fn endpoint_region(w: Language, api: &Value) -> Markup {
    let error = member(api, "lastError");
    let is_open = !matches!(State::of_endpoint(w, api).color, "bad" | "off");
    html! {
        div id="endpoint" {
            p { (State::of_endpoint(w, api).shown(w)) @if let Some(why) = held_by(api) { " · " (why) } }
            dl class="facts" {
                (fact(w.t("Address"), &html! { code { (text(api, "baseUrl")) } }))
                (fact(w.t("In flight"), &html! { (grouped(count(api, "inFlight"))) }))
                (fact(w.t("Attempts"), &html! { (grouped(count(api, "attempts"))) }))
                (fact(w.t("Errors in a row"), &html! { (grouped(count(api, "errorCount"))) }))
                (fact(w.t("Priority"), &html! { (count(api, "priority")) }))
                (fact(w.t("Weight"), &html! { (member(api, "weight").to_string()) }))
                (fact(w.t("Time to the first byte or event"), &html! { @match number(api, "meanFirstByteMs") { Some(ms) => (duration(ms)), None => "–" } }))
            }
            @if !error.is_null() { p { strong { (w.t("Last error:")) } " " (text(error, "what")) " · " (moment(text(error, "at"))) } }
            div class="bars" { (bars(w, member(api, "quota"), &["rpm", "rpd", "tpm", "tpd", "maxConcurrent"])) }
            div class="trend" { (trend(w, member(api, "lastHour"))) }
            h2 { (w.t("Models")) }
            ul class="rows" {
                @for (name, model) in member(api, "models").as_object().into_iter().flatten() {
                    li {
                        strong { (name) } " "
                        @if has(model, "restEnds") { (badge("bad", w.t("resting"))) " " (moment(text(model, "restEnds"))) }
                        @else if has(model, "coolDownEnds") { (badge("bad", w.t("cooling down"))) " " (moment(text(model, "coolDownEnds"))) }
                        @else if member(model, "available") != &Value::Bool(true) { (badge("bad", w.t("being tried again"))) }
                        // What is wrong with the endpoint is wrong with all of them.
                        @else if is_open { (badge("good", w.t("open"))) }
                    }
                }
            }
            @for (pattern, of_models) in member(api, "modelLimits").as_object().into_iter().flatten() {
                h3 { (w.with("Limits of {}", &[pattern])) }
                div class="bars" { (bars(w, member(of_models, "quota"), &["rpm", "rpd", "tpm", "tpd", "maxConcurrent"])) }
            }
            @if has(api, "keys") { h2 { (w.t("Keys of the endpoint")) } (key_rows(w, member(api, "keys"))) }
        }
    }
}

/// The same as a document, with what can be done.
pub(super) fn endpoint_document(w: Language, api: &Value, view: &View) -> Markup {
    let (id, name) = (text(api, "id"), text(api, "name"));
    let path = |action: &str| format!("/v1/admin/endpoints/{}/{action}", in_path(id));
    let call = |action, button| Call { method: "POST", path: path(action), button, confirm: None };
    let is_off = has(api, "switchedOff");
    html! {
        p { a href="/dashboard" { "← " (w.t("Now")) } }
        h1 { (name) @if name != id { " " code { (id) } } }
        div class="actions" {
            @if is_off { (call("enable", w.t("Switch on")).button()) }
            @else if member(api, "enabled") != &Value::Bool(true) { p class="label" { (w.t("It is off in the config, and is switched on there.")) } }
            @else {
                (Call { confirm: Some(w.with("Switch {} off?", &[name])), ..call("disable", w.t("Switch off")) }
                    .form(&field(w.t("until (empty: until it is switched on)"), "until", "moment", "")))
            }
            (call("clear", w.t("Forget cool-downs and rests")).button())
            (Call { confirm: Some(w.t("A test costs a permit and a token. Go on?").to_owned()), ..call("test", w.t("Test")) }.button())
            a href={ "/dashboard/requests" (query(&[("endpoint", id)])) } { (w.t("Its requests")) }
        }
        (view.fixed("endpoint"))
    }
}
