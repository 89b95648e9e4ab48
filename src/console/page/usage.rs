//! *Usage*: tokens, requests and cost over time, from the counts of `GET /v1/token/stats`.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Span, Timestamp, ZonedDateTime};
use maud::{Markup, html};
use serde_json::Value;

use super::chart::{Column, columns};
use super::parts::{count, dollars, grouped, list, nothing, number, percent, query, text};
use super::words::Language;

/// Series that have a color of their own; what else there is shares one.
const SERIES_MAX: usize = 7;

/// What is shown: of which time, by what, and which number the chart has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    range: &'static str,
    by: &'static str,
    of: &'static str,
}

/// Ranges with their hours. Up to two days usage is known by the hour.
const RANGES: [(&str, i64); 7] =
    [("1h", 1), ("6h", 6), ("24h", 24), ("48h", 48), ("7d", 7 * 24), ("30d", 30 * 24), ("90d", 90 * 24)];
const BY: [&str; 3] = ["endpoint", "model", "key"];
const OF: [&str; 4] = ["tokens", "requests", "cost", "cached"];

impl Shown {
    /// What an address asks for.
    pub(super) fn of(query: Option<&str>) -> Self {
        let mut shown = Self { range: "7d", by: "endpoint", of: "tokens" };
        for (name, value) in url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
            let one_of = |all: &[&'static str]| all.iter().copied().find(|one| *one == value);
            match name.as_ref() {
                "range" => shown.range = one_of(&RANGES.map(|(range, _)| range)).unwrap_or(shown.range),
                "by" => shown.by = one_of(&BY).unwrap_or(shown.by),
                "of" => shown.of = one_of(&OF).unwrap_or(shown.of),
                _ => {}
            }
        }
        shown
    }

    fn hours(self) -> i64 {
        RANGES.iter().find(|(range, _)| *range == self.range).map_or(24, |(_, hours)| *hours)
    }

    /// By hours or days. Keys are counted by the day.
    fn per(self) -> &'static str {
        if self.hours() <= 48 && self.by != "key" { "hour" } else { "day" }
    }

    /// The query of the API: the hours, or days, that begin within the range.
    pub(super) fn for_api(self, now: Timestamp) -> String {
        // A day is shown as a whole.
        let hours = if self.per() == "day" { self.hours().max(24) } else { self.hours() };
        let since = now.checked_sub(SignedDuration::from_hours(hours)).unwrap_or(now);
        let since = Timestamp::from_second(since.as_second()).unwrap_or(since).to_string();
        query(&[("by", self.by), ("per", self.per()), ("since", &since)]).trim_start_matches('?').to_owned()
    }
}

/// Sums of a series.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    requests: u64,
    prompt: u64,
    completion: u64,
    total: u64,
    cached: u64,
    estimated: u64,
    unpriced: u64,
    usd: f64,
}

impl Sums {
    fn add(&mut self, part: &Value) {
        self.requests += count(part, "requests");
        self.prompt += count(part, "promptTokens");
        self.completion += count(part, "completionTokens");
        self.total += count(part, "totalTokens");
        self.cached += count(part, "cachedTokens");
        self.estimated += count(part, "estimatedTokens");
        self.unpriced += count(part, "unpricedRequests");
        self.usd += number(part, "usd").unwrap_or_default();
    }
}

fn value(of: &str, part: &Value) -> f64 {
    let key = match of {
        "requests" => "requests",
        "cost" => "usd",
        "cached" => "cachedTokens",
        _ => "totalTokens",
    };
    number(part, key).unwrap_or_default()
}

/// The view as a document.
pub(super) fn document(w: Language, usage: &Value, shown: Shown, now: &ZonedDateTime) -> Markup {
    let parts = list(usage, "data");
    let mut by_name: BTreeMap<&str, Sums> = BTreeMap::new();
    let mut all = Sums::default();
    for part in parts {
        by_name.entry(text(part, "name")).or_default().add(part);
        all.add(part);
    }
    let mut names: Vec<(&str, Sums)> = by_name.into_iter().collect();
    names.sort_by_key(|(_, sums)| std::cmp::Reverse(sums.total));
    let csv = format!("/v1/admin/usage?{}&format=csv", shown.for_api(now.timestamp()));
    html! {
        h1 { (w.t("Usage")) }
        (form(w, shown))
        @if shown.by == "key" && shown.hours() <= 48 { p class="label" { (w.t("Usage by key is counted by the day.")) } }
        @if names.is_empty() { (nothing(w.t("Nothing was counted in this time."))) } @else {
            (chart(w, parts, &names, shown, now))
            div class="scroll" tabindex="0" role="region" aria-label=(w.t("Usage")) { (table(w, &names, all)) }
        }
        p { a href=(csv) download="usage.csv" { (w.t("Download as CSV")) } }
    }
}

fn form(w: Language, shown: Shown) -> Markup {
    let select = |name: &str, label: &str, now: &str, choices: &[(&str, &str)]| {
        html! {
            label class="field" {
                span { (label) }
                select name=(name) { @for (value, said) in choices { option value=(value) selected[now == *value] { (said) } } }
            }
        }
    };
    html! {
        form class="filters" method="get" action="/dashboard/usage" {
            (select("range", w.t("Time"), shown.range, &[
                ("1h", w.t("this hour")), ("6h", w.t("6 hours")), ("24h", w.t("24 hours")), ("48h", w.t("2 days")),
                ("7d", w.t("7 days")), ("30d", w.t("30 days")), ("90d", w.t("90 days")),
            ]))
            (select("by", w.t("By"), shown.by, &[("endpoint", w.t("endpoint")), ("model", w.t("model")), ("key", w.t("key"))]))
            (select("of", w.t("Chart"), shown.of, &[
                ("tokens", w.t("tokens")), ("requests", w.t("requests")), ("cost", w.t("cost")), ("cached", w.t("cached tokens")),
            ]))
            button type="submit" { (w.t("Show")) }
        }
    }
}

/// The hours or days of a range, by their labels, the oldest first. What nothing was used in has a column as well.
fn labels(shown: Shown, now: &ZonedDateTime) -> Vec<String> {
    let count = if shown.per() == "hour" { shown.hours() } else { (shown.hours() / 24).max(1) };
    let before = |back: i64| {
        let span = if shown.per() == "hour" { Span::new().hours(back) } else { Span::new().days(back) };
        now.checked_sub(span).ok().map(|at| label(&at, shown))
    };
    (0..count).rev().filter_map(before).collect()
}

fn label(at: &ZonedDateTime, shown: Shown) -> String {
    at.strftime(if shown.per() == "hour" { "%Y-%m-%d %H:00" } else { "%Y-%m-%d" }).to_string()
}

fn chart(w: Language, parts: &[Value], names: &[(&str, Sums)], shown: Shown, now: &ZonedDateTime) -> Markup {
    let mut series: Vec<String> = names.iter().take(SERIES_MAX).map(|(name, _)| (*name).to_owned()).collect();
    let mut by_label: BTreeMap<String, BTreeMap<usize, f64>> =
        labels(shown, now).into_iter().map(|label| (label, BTreeMap::new())).collect();
    for part in parts {
        let Ok(begins) = text(part, "begins").parse::<Timestamp>() else { continue };
        let place = series.iter().position(|name| name == text(part, "name")).unwrap_or(SERIES_MAX);
        let column = by_label.entry(label(&begins.to_zoned_datetime(now.time_zone().clone()), shown)).or_default();
        *column.entry(place).or_default() += value(shown.of, part);
    }
    if names.len() > SERIES_MAX {
        series.push(w.t("others").to_owned());
    }
    let drawn: Vec<Column> =
        by_label.into_iter().map(|(label, parts)| Column { label, parts: parts.into_iter().collect() }).collect();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counts")]
    let said = |value: f64| if shown.of == "cost" { dollars(value) } else { grouped(value as u64) };
    let largest = drawn.iter().map(Column::sum).fold(0.0, f64::max);
    let zone = now.time_zone().iana_name().unwrap_or_default();
    html! {
        figure {
            (columns(&drawn, &series, said, w.t("Usage")))
            figcaption {
                @if let (Some(first), Some(last)) = (drawn.first(), drawn.last()) {
                    span { (w.with("at most {}", &[&said(largest)])) " · " (first.label) @if first.label != last.label { " – " (last.label) } " " (zone) }
                }
                ul class="legend" { @for (place, name) in series.iter().enumerate() { li class={ "s" (place) } { (name) } } }
            }
        }
    }
}

fn table(w: Language, names: &[(&str, Sums)], all: Sums) -> Markup {
    let cells = |sums: &Sums| {
        html! {
            td { (grouped(sums.requests)) }
            td { (grouped(sums.prompt)) }
            td { (grouped(sums.completion)) }
            td { (grouped(sums.total)) }
            td { (percent(sums.cached, sums.prompt)) }
            td { (grouped(sums.estimated)) }
            td { (dollars(sums.usd)) @if sums.unpriced > 0 { " *" } }
        }
    };
    html! {
        table {
            thead {
                tr {
                    th scope="col" { (w.t("Name")) }
                    th scope="col" { (w.t("Requests")) }
                    th scope="col" { (w.t("Prompt tokens")) }
                    th scope="col" { (w.t("Completion tokens")) }
                    th scope="col" { (w.t("Tokens")) }
                    th scope="col" { (w.t("Cached share")) }
                    th scope="col" { (w.t("Estimated tokens")) }
                    th scope="col" { (w.t("Cost")) }
                }
            }
            tbody { @for (name, sums) in names { tr { th scope="row" { (name) } (cells(sums)) } } }
            tfoot { tr { th scope="row" { (w.t("All")) } (cells(&all)) } }
        }
        @if all.unpriced > 0 { p class="label" { "* " (w.with("{} answers whose model has no price are not in it", &[&grouped(all.unpriced)])) } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_address_does_not_know_is_the_usual() {
        let usual = Shown { range: "7d", by: "endpoint", of: "tokens" };
        assert_eq!(Shown::of(None), usual);
        assert_eq!(Shown::of(Some("range=1y&by=%3Cb%3E&of=x")), usual);
        let hour = Shown::of(Some("range=1h&by=model&of=cost"));
        assert_eq!(hour, Shown { range: "1h", by: "model", of: "cost" });
        let now: Timestamp = "2027-03-31T18:20:00.5Z".parse().unwrap();
        assert_eq!(hour.for_api(now), "by=model&per=hour&since=2027-03-31T17%3A20%3A00Z");
        let by_key = Shown::of(Some("range=1h&by=key"));
        assert_eq!(by_key.for_api(now), "by=key&per=day&since=2027-03-30T18%3A20%3A00Z");
        let shanghai = now.to_zoned_datetime(jiff::tz::TimeZone::get("Asia/Shanghai").unwrap());
        assert_eq!(labels(by_key, &shanghai), ["2027-04-01"]);
        assert_eq!(labels(hour, &shanghai), ["2027-04-01 02:00"]);
        assert_eq!(labels(Shown::of(Some("range=48h")), &shanghai).len(), 48);
        assert_eq!(labels(usual, &shanghai).first().map(String::as_str), Some("2027-03-26"));
    }

    #[test]
    fn what_has_no_color_of_its_own_is_one_series() {
        let part = |n: usize| serde_json::json!({ "begins": "2027-03-31T00:00:00Z", "name": format!("e-{n}"), "requests": 1, "totalTokens": 100 - n });
        let usage = serde_json::json!({ "data": (0..50).map(part).collect::<Vec<_>>() });
        let now = "2027-03-31T18:20:00Z".parse::<Timestamp>().unwrap().to_zoned_datetime(jiff::tz::TimeZone::UTC);
        let page = document(Language::English, &usage, Shown::of(None), &now).into_string();
        assert_eq!(page.matches("<rect").count(), SERIES_MAX + 1, "{page}");
        assert!(page.contains("others: "), "{page}");
    }
}
