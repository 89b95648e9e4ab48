//! An endpoint and its keys: its row, and its own page.

use maud::{Markup, html};
use serde_json::Value;

use super::chart::sparkline;
use super::live::{Region, View};
use super::parts::{
    Call, badge, bar, count, duration, fact, field, grouped, has, in_path, list, member, moment, number, percent,
    query, text,
};
use super::words::Language;

/// What an endpoint, or one of its keys, can do now.
pub(super) struct State<'a> {
    pub(super) color: &'static str,
    word: &'static str,
    /// Until when, if that is known.
    until: &'a str,
}

impl<'a> State<'a> {
    pub(super) fn of_endpoint(w: Language, api: &'a Value) -> Self {
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

    pub(super) fn shown(&self, w: Language) -> Markup {
        html! {
            (badge(self.color, self.word))
            @if !self.until.is_empty() { " " (w.t("until")) " " (moment(self.until)) }
        }
    }
}

/// The limit that holds it back. One that is switched off is held back by nothing else.
pub(super) fn held_by(api: &Value) -> Option<&str> {
    api.get("heldBy").and_then(Value::as_str).filter(|_| !has(api, "switchedOff"))
}

/// Attempts of the last hour from which on a share of errors says something.
const ATTEMPTS_TELLING: u64 = 4;

/// True if half of what it was asked in the last hour failed.
pub(super) fn fails_often(api: &Value) -> bool {
    let hour = member(api, "lastHour");
    count(hour, "attempts") >= ATTEMPTS_TELLING && count(hour, "failed") * 2 >= count(hour, "attempts")
}

pub(super) fn share_of_errors(api: &Value) -> String {
    let hour = member(api, "lastHour");
    percent(count(hour, "failed"), count(hour, "attempts"))
}

pub(super) fn path(id: &str) -> String {
    format!("/dashboard/endpoints/{}", in_path(id))
}

/// An endpoint as a row: its id, and its markup.
pub(super) fn row(w: Language, api: &Value, open: &[String]) -> (String, Markup) {
    let id = text(api, "id");
    let row = row_id(id);
    let markup = html! {
        li id=(row) class="endpoint" {
            div class="who" {
                a id={ (row) "-a" } href=(path(id)) { (text(api, "name")) }
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
fn bars(w: Language, quota: &Value, kinds: &[&str]) -> Markup {
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
            div { (sparkline(&times, w.t("time to the first byte or event, last hour"))) span class="label" { (duration(last)) } }
        }
    }
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
fn key_rows(w: Language, keys: &Value) -> Markup {
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

/// One endpoint with all that is known of it, as the stream of changes has it.
pub(super) fn view(w: Language, api: &Value) -> View {
    View { fixed: vec![Region::new("endpoint", region(w, api))], rows: None }
}

fn region(w: Language, api: &Value) -> Markup {
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
pub(super) fn document(w: Language, api: &Value, view: &View) -> Markup {
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
