//! Metrics that are counted as they happen: names, labels and help texts. Gauges that are read at each scrape are in
//! `admin/metrics`; no other module names a metric.
//!
//! Cardinality is bounded by construction: endpoints are those of the config, a model is an exact name of the config or `other`,
//! everything else is one of a fixed set.

use std::collections::HashMap;
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::proto::{LabelPair, Metric};
use prometheus::{
    Counter, CounterVec, Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    IntGauge, Opts, Registry, TextEncoder,
};

use super::key_metrics::{KeyCounters, KeyMetrics};
use crate::usage::prices::NanoUsd;
use crate::usage::{Cost, Money};

/// Label of a request without a model, or of an answer that came from no endpoint.
pub(crate) const NONE: &str = "none";
/// Label of a model that is not an exact name of the config.
pub(crate) const OTHER: &str = "other";
/// Buckets for times of endpoints, in seconds: from a fast cache to a long reasoning.
const ANSWER_BUCKETS: [f64; 15] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0];
/// Buckets for times of our own, in seconds.
const OWN_BUCKETS: [f64; 14] =
    [0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5];

/// The metrics of this process.
static METRICS: LazyLock<Option<Metrics>> = LazyLock::new(|| {
    let metrics = Metrics::new().inspect_err(|error| log::error!("there are no metrics: {error}"));
    metrics.ok()
});

/// This process's metrics; none if they could not be made, which a test rules out.
pub(crate) fn metrics() -> Option<&'static Metrics> {
    METRICS.as_ref()
}

/// Counters and histograms of what happens. Gauges are collected at each scrape: [`Scrape`].
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    attempts: IntCounterVec,
    errors: IntCounterVec,
    affinity: IntCounterVec,
    tokens: IntCounterVec,
    estimated: IntCounterVec,
    cost: CounterVec,
    unpriced: IntCounterVec,
    first_byte: HistogramVec,
    duration: HistogramVec,
    own: HistogramVec,
    permit: HistogramVec,
    by_key: KeyMetrics,
}

/// Outcome of a request or an attempt that went well.
pub(crate) const OK: &str = "ok";
/// Outcomes of attempts that say nothing about the endpoint.
const NEUTRAL: [&str; 4] = ["client_gone", "limit_reached", "ours", "usage_refused"];

/// Sums of an endpoint since the process started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Totals {
    /// Attempts that have ended, but for those that say nothing about it.
    pub(crate) attempts: u64,
    /// Those of them that failed.
    pub(crate) failed: u64,
}

/// The value of a metric's label.
fn label<'a>(metric: &'a Metric, name: &str) -> &'a str {
    metric.get_label().iter().find(|label| label.name() == name).map(LabelPair::value).unwrap_or_default()
}

/// Metrics of requests to one endpoint for one model, looked up by their labels once. A metric that was never counted
/// is not shown.
#[derive(Debug, Default)]
pub struct Counters {
    requests: OnceLock<IntCounter>,
    attempts: OnceLock<IntCounter>,
    prompt: OnceLock<IntCounter>,
    completion: OnceLock<IntCounter>,
    cost: OnceLock<Counter>,
    first_byte: OnceLock<Histogram>,
    duration: OnceLock<Histogram>,
}

/// A request that has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended<'a> {
    /// The endpoint that answered last, if one did.
    pub endpoint: Option<&'a str>,
    /// The model's label.
    pub model: &'a str,
    /// The status that the client got, if it got any.
    pub status: Option<u16>,
    /// [`OK`], a fault's label, or `client_gone`.
    pub outcome: &'a str,
    /// Time from the request's header to the first byte of the answer.
    pub first_byte: Option<Duration>,
    /// Time from the request's header to the last byte of the answer.
    pub total: Duration,
    /// Metrics of the endpoint and the model.
    pub counters: Option<&'a Counters>,
    /// Those of the caller's own key.
    pub key: Option<&'a KeyCounters>,
}

impl Metrics {
    fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            keep(&registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let histogram = |name: &str, help: &str, labels: &[&str], buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            keep(&registry, HistogramVec::new(options, labels))
        };
        let of_model = ["endpoint", "model", "kind"];
        Ok(Self {
            requests: counter(
                "api_together_requests_total",
                "Requests that have ended, by the endpoint that answered last, the class of the status, and the outcome.",
                &["endpoint", "model", "status", "outcome"],
            )?,
            attempts: counter(
                "api_together_attempts_total",
                "Attempts that have ended, by outcome; all but ok are retried if the config and the time allow it.",
                &["endpoint", "outcome"],
            )?,
            errors: counter(
                "api_together_endpoint_errors_total",
                "Errors that endpoints answered or streamed, by whose trouble they are and the rule that says so.",
                &["endpoint", "trouble", "rule"],
            )?,
            affinity: counter(
                "api_together_affinity_total",
                "Requests of a session that have ended, by how their session was followed.",
                &["result"],
            )?,
            tokens: counter("api_together_tokens_total", "Tokens that endpoints reported.", &of_model)?,
            estimated: counter(
                "api_together_estimated_tokens_total",
                "Tokens estimated where endpoints reported none.",
                &of_model,
            )?,
            cost: keep(
                &registry,
                CounterVec::new(
                    Opts::new("api_together_cost_usd_total", "What answers cost, in US dollars, estimates included."),
                    &["endpoint", "model"],
                ),
            )?,
            unpriced: counter(
                "api_together_unpriced_answers_total",
                "Answers whose model has no price.",
                &["endpoint", "model"],
            )?,
            first_byte: histogram(
                "api_together_time_to_first_byte_seconds",
                "From a request's header to the first byte of its answer; of a stream, to its first event with content.",
                &["endpoint"],
                &ANSWER_BUCKETS,
            )?,
            duration: histogram(
                "api_together_request_duration_seconds",
                "From a request's header to the end of its answer.",
                &["endpoint"],
                &ANSWER_BUCKETS,
            )?,
            own: histogram(
                "api_together_own_seconds",
                "The gateway's own share of the time before a request is sent on: reading the body, choice, permit, rewriting.",
                &[],
                &OWN_BUCKETS,
            )?,
            permit: histogram(
                "api_together_permit_seconds",
                "From asking the ledger for a permit to its answer, without waits in the queue.",
                &[],
                &OWN_BUCKETS,
            )?,
            by_key: KeyMetrics::new(&registry)?,
            registry,
        })
    }

    /// Counts a request that has ended.
    pub(crate) fn request(&self, ended: &Ended<'_>) {
        let status = match ended.status {
            None => NONE,
            Some(..=199) => "1xx",
            Some(200..=299) => "2xx",
            Some(300..=399) => "3xx",
            Some(400..=499) => "4xx",
            Some(500..) => "5xx",
        };
        if let Some(key) = ended.key {
            self.by_key.request(key, ended.outcome);
        }
        let endpoint = ended.endpoint.unwrap_or(NONE);
        let counters = ended.counters;
        let is_usual = (200..300).contains(&ended.status.unwrap_or_default()) && ended.outcome == OK;
        once(counters.filter(|_| is_usual).map(|counters| &counters.requests), IntCounter::inc, || {
            self.requests.with_label_values(&[endpoint, ended.model, status, ended.outcome])
        });
        let observe = |time: Duration| move |histogram: &Histogram| histogram.observe(time.as_secs_f64());
        once(counters.map(|counters| &counters.duration), observe(ended.total), || {
            self.duration.with_label_values(&[endpoint])
        });
        if let Some(first_byte) = ended.first_byte {
            once(counters.map(|counters| &counters.first_byte), observe(first_byte), || {
                self.first_byte.with_label_values(&[endpoint])
            });
        }
    }

    /// Counts an attempt that has ended.
    pub(crate) fn attempt(&self, endpoint: &str, outcome: &str, counters: Option<&Counters>) {
        let counter = counters.filter(|_| outcome == OK).map(|counters| &counters.attempts);
        once(counter, IntCounter::inc, || self.attempts.with_label_values(&[endpoint, outcome]));
    }

    /// Counts an error of an endpoint.
    pub(crate) fn error(&self, endpoint: &str, trouble: &str, rule: &str) {
        self.errors.with_label_values(&[endpoint, trouble, rule]).inc();
    }

    /// Counts how a request's session was followed.
    pub(crate) fn affinity(&self, result: &str) {
        self.affinity.with_label_values(&[result]).inc();
    }

    /// Counts the tokens of an answer for the caller's own key.
    pub(crate) fn spent_with(&self, key: &KeyCounters, cost: &Cost) {
        self.by_key.spent(key, cost);
    }

    /// Counts the tokens of an answer.
    pub(crate) fn spent(&self, endpoint: &str, model: &str, cost: &Cost, counters: Option<&Counters>) {
        let exact = cost.exact.tokens;
        let reported = [
            ("prompt", exact.prompt, counters.map(|counters| &counters.prompt)),
            ("completion", exact.completion, counters.map(|counters| &counters.completion)),
        ];
        for (kind, tokens, counter) in reported.into_iter().filter(|(_, tokens, _)| *tokens > 0) {
            let add = |counter: &IntCounter| counter.inc_by(tokens);
            once(counter, add, || self.tokens.with_label_values(&[endpoint, model, kind]));
        }
        let kinds = [("cached", exact.cached), ("reasoning", exact.reasoning), ("audio", exact.audio)];
        let estimated = [("prompt", cost.estimated.tokens.prompt), ("completion", cost.estimated.tokens.completion)];
        for (counter, kinds) in [(&self.tokens, kinds.as_slice()), (&self.estimated, estimated.as_slice())] {
            for (kind, tokens) in kinds.iter().filter(|(_, tokens)| *tokens > 0) {
                counter.with_label_values(&[endpoint, model, kind]).inc_by(*tokens);
            }
        }
        let Money { spent, unpriced } = cost.money;
        if spent > NanoUsd(0) {
            let add = |counter: &Counter| counter.inc_by(spent.dollars());
            let kept = counters.map(|counters| &counters.cost);
            once(kept, add, || self.cost.with_label_values(&[endpoint, model]));
        }
        if unpriced > 0 {
            self.unpriced.with_label_values(&[endpoint, model]).inc_by(unpriced);
        }
    }

    /// The proxy's own share of a request's time.
    pub(crate) fn own(&self, took: Duration) {
        self.own.with_label_values::<&str>(&[]).observe(took.as_secs_f64());
    }

    /// Counts a draw of a permit, with the time until it was answered.
    pub(crate) fn permit(&self, took: Duration) {
        self.permit.with_label_values::<&str>(&[]).observe(took.as_secs_f64());
    }

    /// What was counted of each endpoint since the process started.
    pub(crate) fn totals(&self) -> HashMap<String, Totals> {
        let mut totals: HashMap<String, Totals> = HashMap::new();
        for family in self.attempts.collect() {
            for metric in family.get_metric() {
                let [endpoint, outcome] = ["endpoint", "outcome"].map(|name| label(metric, name));
                if NEUTRAL.contains(&outcome) {
                    continue;
                }
                let count = metric.get_counter().get_value();
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it counts attempts")]
                let count = count as u64;
                let total = totals.entry(endpoint.to_owned()).or_default();
                total.attempts += count;
                total.failed += if outcome == OK { 0 } else { count };
            }
        }
        totals
    }

    /// All metrics in Prometheus's text format (0.0.4), together with the values read at this scrape.
    pub(crate) fn text(&self, scrape: &Scrape) -> Vec<u8> {
        let mut families = self.registry.gather();
        families.extend(scrape.0.gather());
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&families, &mut text) {
            log::error!("metrics cannot be written: {error}");
        }
        text
    }
}

/// The content type of [`Metrics::text`].
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Values that are read at a scrape. Collected for each scrape, so that no endpoint that is gone is shown.
#[derive(Debug, Default)]
pub(crate) struct Scrape(Registry);

impl Scrape {
    /// Adds a gauge.
    pub(crate) fn gauge(&self, name: &str, help: &str, value: u64) {
        self.keep(name, IntGauge::new(name, help), |gauge| gauge.set(to_i64(value)));
    }

    /// Adds a gauge with a fraction.
    pub(crate) fn gauge_f64(&self, name: &str, help: &str, value: f64) {
        self.keep(name, Gauge::new(name, help), |gauge| gauge.set(value));
    }

    /// Adds a counter that something else has counted.
    pub(crate) fn counter(&self, name: &str, help: &str, value: u64) {
        self.keep(name, IntCounter::new(name, help), |counter| counter.inc_by(value));
    }

    /// Adds a counter with a fraction.
    pub(crate) fn counter_f64(&self, name: &str, help: &str, value: f64) {
        self.keep(name, Counter::new(name, help), |counter| counter.inc_by(value));
    }

    /// Adds a gauge with labels: a value for each set of label values.
    pub(crate) fn gauges<'a, const LABELS: usize>(
        &self,
        name: &str,
        help: &str,
        labels: [&str; LABELS],
        values: impl Iterator<Item = ([&'a str; LABELS], u64)>,
    ) {
        self.gauges_f64(name, help, labels, values.map(|(labels, value)| (labels, to_f64(value))));
    }

    /// The same of values that need not be whole.
    pub(crate) fn gauges_f64<'a, const LABELS: usize>(
        &self,
        name: &str,
        help: &str,
        labels: [&str; LABELS],
        values: impl Iterator<Item = ([&'a str; LABELS], f64)>,
    ) {
        self.keep(name, GaugeVec::new(Opts::new(name, help), &labels), |gauges| {
            for (labels, value) in values {
                gauges.with_label_values(&labels).set(value);
            }
        });
    }

    /// Adds a counter with labels that something else has counted.
    pub(crate) fn counters<'a, const LABELS: usize>(
        &self,
        name: &str,
        help: &str,
        labels: [&str; LABELS],
        values: impl Iterator<Item = ([&'a str; LABELS], u64)>,
    ) {
        self.keep(name, IntCounterVec::new(Opts::new(name, help), &labels), |counters| {
            for (labels, value) in values {
                counters.with_label_values(&labels).inc_by(value);
            }
        });
    }

    fn keep<T: Collector + Clone + 'static>(&self, name: &str, made: prometheus::Result<T>, set: impl FnOnce(T)) {
        match keep(&self.0, made) {
            Ok(metric) => set(metric),
            // A test rules it out.
            Err(error) => log::error!("metric {name} cannot be made: {error}"),
        }
    }
}

/// Does something to a metric that is looked up the first time, or every time if there is nowhere to keep it.
pub(super) fn once<T>(kept: Option<&OnceLock<T>>, use_it: impl FnOnce(&T), look_up: impl FnOnce() -> T) {
    match kept {
        Some(kept) => use_it(kept.get_or_init(look_up)),
        None => use_it(&look_up()),
    }
}

/// Registers a metric. It fails only for an invalid name or one that is used twice.
pub(super) fn keep<T: Collector + Clone + 'static>(
    registry: &Registry,
    made: prometheus::Result<T>,
) -> prometheus::Result<T> {
    let metric = made?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn to_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(crate) fn to_f64(value: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "limits end at 2^53")]
    {
        value as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::{Speed, Tokens};

    #[test]
    fn every_metric_has_a_name_of_its_own() {
        let metrics = Metrics::new().unwrap();
        metrics.request(&Ended {
            endpoint: Some("a"),
            model: "m",
            status: Some(200),
            outcome: "ok",
            first_byte: Some(Duration::from_millis(5)),
            total: Duration::from_millis(9),
            counters: None,
            key: None,
        });
        metrics.attempt("a", "ok", None);
        metrics.spent("a", "m", &Cost::estimated(3, 4), None);
        metrics.own(Duration::from_micros(30));
        metrics.permit(Duration::from_micros(30));
        let scrape = Scrape::default();
        scrape.gauge("api_together_open_requests", "Open requests.", 3);
        let values = [(["a", "rpm"], 70)].into_iter();
        scrape.gauges("api_together_limit_used", "Used.", ["endpoint", "limit"], values);
        let text = String::from_utf8(metrics.text(&scrape)).unwrap();
        for line in [
            r#"api_together_requests_total{endpoint="a",model="m",outcome="ok",status="2xx"} 1"#,
            r#"api_together_attempts_total{endpoint="a",outcome="ok"} 1"#,
            r#"api_together_estimated_tokens_total{endpoint="a",kind="completion",model="m"} 4"#,
            r#"api_together_request_duration_seconds_bucket{endpoint="a",le="0.01"} 1"#,
            r#"api_together_limit_used{endpoint="a",limit="rpm"} 70"#,
            "api_together_open_requests 3",
            "api_together_own_seconds_count 1",
        ] {
            assert!(text.lines().any(|told| told == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("api_together_tokens_total{"), "what was estimated is not among what was told");
    }

    #[test]
    fn what_is_looked_up_once_counts_the_same() {
        let metrics = Metrics::new().unwrap();
        let counters = Counters::default();
        let tokens = Tokens { prompt: 5, completion: 2, cached: 1, ..Tokens::default() };
        let mut ended = Ended {
            endpoint: Some("a"),
            model: "m",
            status: Some(200),
            outcome: OK,
            first_byte: Some(Duration::from_millis(5)),
            total: Duration::from_millis(9),
            counters: None,
            key: None,
        };
        for kept in [None, Some(&counters), Some(&counters)] {
            ended.counters = kept;
            metrics.request(&ended);
            metrics.attempt("a", OK, kept);
            metrics.spent("a", "m", &Cost::exact(tokens, Speed::default()), kept);
        }
        metrics.request(&Ended { status: Some(404), ..ended });
        metrics.request(&Ended { outcome: "client_gone", ..ended });
        metrics.attempt("a", "broken", Some(&counters));
        let text = String::from_utf8(metrics.text(&Scrape::default())).unwrap();
        for line in [
            r#"api_together_requests_total{endpoint="a",model="m",outcome="ok",status="2xx"} 3"#,
            r#"api_together_requests_total{endpoint="a",model="m",outcome="ok",status="4xx"} 1"#,
            r#"api_together_requests_total{endpoint="a",model="m",outcome="client_gone",status="2xx"} 1"#,
            r#"api_together_attempts_total{endpoint="a",outcome="ok"} 3"#,
            r#"api_together_attempts_total{endpoint="a",outcome="broken"} 1"#,
            r#"api_together_tokens_total{endpoint="a",kind="prompt",model="m"} 15"#,
            r#"api_together_tokens_total{endpoint="a",kind="cached",model="m"} 3"#,
            r#"api_together_request_duration_seconds_count{endpoint="a"} 5"#,
            r#"api_together_time_to_first_byte_seconds_count{endpoint="a"} 5"#,
        ] {
            assert!(text.lines().any(|told| told == line), "{line} is not in\n{text}");
        }
    }
}
