//! What Prometheus is told of this process: every name, its labels and its meaning. Nothing else in the program names a metric.
//!
//! Cardinality is bounded by construction: endpoints are those of the config, a model is an exact name of the config or `other`,
//! everything else is one of a fixed set.

use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

use crate::config::LimitKind;
use crate::usage::Cost;

/// A request without a model, or an answer that came from no endpoint.
pub const NONE: &str = "none";
/// A model that no exact name of the config is.
pub const OTHER: &str = "other";
/// Endpoints that are told of at a scrape. What was counted of those that have gone by a reload stays until the process ends.
const ENDPOINTS_MAX: usize = 2000;

/// Times of endpoints, in seconds: a fast cache to a long thought.
const ANSWER_BUCKETS: [f64; 15] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0];
/// Times of our own, in seconds.
const OWN_BUCKETS: [f64; 14] =
    [0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5];

/// There is one process, and one set of them.
static METRICS: LazyLock<Option<Metrics>> = LazyLock::new(|| {
    let metrics = Metrics::new().inspect_err(|error| log::error!("there are no metrics: {error}"));
    metrics.ok()
});

/// This process's metrics; none if they could not be made, which a test rules out.
pub fn metrics() -> Option<&'static Metrics> {
    METRICS.as_ref()
}

/// What is counted as it happens. What is the case at a moment is asked when somebody wants to know: [`Moment`].
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    attempts: IntCounterVec,
    tokens: IntCounterVec,
    estimated: IntCounterVec,
    first_byte: HistogramVec,
    duration: HistogramVec,
    own: HistogramVec,
    permit: HistogramVec,
}

/// What came of a request or an attempt that went well.
pub const OK: &str = "ok";

/// What nearly every request to one endpoint for one model counts up, so that it is looked up by its labels once. What was never
/// counted is not told of.
#[derive(Debug, Default)]
pub struct Counters {
    requests: OnceLock<IntCounter>,
    attempts: OnceLock<IntCounter>,
    prompt: OnceLock<IntCounter>,
    completion: OnceLock<IntCounter>,
    first_byte: OnceLock<Histogram>,
    duration: OnceLock<Histogram>,
}

/// A request that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended<'a> {
    /// The endpoint that answered last, if one did.
    pub endpoint: Option<&'a str>,
    /// The model's label.
    pub model: &'a str,
    /// The status that the client got, if it got any.
    pub status: Option<u16>,
    /// [`OK`], a fault's label, or `client_gone`.
    pub outcome: &'a str,
    /// From the request's header to the first of the answer.
    pub first_byte: Option<Duration>,
    /// To the last.
    pub total: Duration,
    /// Those of the endpoint and the model.
    pub counters: Option<&'a Counters>,
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
                "Requests that have ended, by the endpoint that answered last, the status's class, and what came of them.",
                &["endpoint", "model", "status", "outcome"],
            )?,
            attempts: counter(
                "api_together_attempts_total",
                "Attempts that have ended, by what came of them; all but ok are tried again if the config and the time allow it.",
                &["endpoint", "outcome"],
            )?,
            tokens: counter("api_together_tokens_total", "Tokens that endpoints told.", &of_model)?,
            estimated: counter(
                "api_together_estimated_tokens_total",
                "Tokens that were estimated where endpoints told none.",
                &of_model,
            )?,
            first_byte: histogram(
                "api_together_time_to_first_byte_seconds",
                "From a request's header to the first of its answer: of a stream, to its first word.",
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
                "The proxy's own share before a request is sent on: reading what it asks for, the choice, the permit, the rewrite.",
                &[],
                &OWN_BUCKETS,
            )?,
            permit: histogram(
                "api_together_permit_seconds",
                "From asking the ledger for a permit to its answer, waits in the queue left out.",
                &[],
                &OWN_BUCKETS,
            )?,
            registry,
        })
    }

    /// A request has ended.
    pub fn request(&self, ended: &Ended<'_>) {
        let status = match ended.status {
            None => NONE,
            Some(..=199) => "1xx",
            Some(200..=299) => "2xx",
            Some(300..=399) => "3xx",
            Some(400..=499) => "4xx",
            Some(500..) => "5xx",
        };
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

    /// An attempt has ended so.
    pub fn attempt(&self, endpoint: &str, outcome: &str, counters: Option<&Counters>) {
        let counter = counters.filter(|_| outcome == OK).map(|counters| &counters.attempts);
        once(counter, IntCounter::inc, || self.attempts.with_label_values(&[endpoint, outcome]));
    }

    /// An answer has cost so much.
    pub fn spent(&self, endpoint: &str, model: &str, cost: &Cost, counters: Option<&Counters>) {
        let exact = cost.exact.tokens;
        let told = [
            ("prompt", exact.prompt, counters.map(|counters| &counters.prompt)),
            ("completion", exact.completion, counters.map(|counters| &counters.completion)),
        ];
        for (kind, tokens, counter) in told.into_iter().filter(|(_, tokens, _)| *tokens > 0) {
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
    }

    /// The proxy's own share of a request's time.
    pub fn own(&self, took: Duration) {
        self.own.with_label_values::<&str>(&[]).observe(took.as_secs_f64());
    }

    /// A permit was asked for, and the answer took so long.
    pub fn permit(&self, took: Duration) {
        self.permit.with_label_values::<&str>(&[]).observe(took.as_secs_f64());
    }

    /// Everything, in Prometheus's text format (0.0.4), with what is the case at the moment.
    pub fn text(&self, moment: &Moment) -> Vec<u8> {
        let mut families = self.registry.gather();
        families.extend(moment.0.gather());
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&families, &mut text) {
            log::error!("metrics cannot be written: {error}");
        }
        text
    }
}

/// The content type of [`Metrics::text`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What is the case at one moment, gathered for one who asks, so that nothing of an endpoint that is gone is told.
#[derive(Debug)]
pub struct Moment(Registry);

/// What is the case for one endpoint.
#[derive(Clone, Debug, Default)]
pub struct EndpointMoment {
    /// Its id.
    pub id: String,
    /// Whether a request could go there.
    pub available: bool,
    /// Whether it is cooling down.
    pub cooling: bool,
    /// Requests that it is answering.
    pub in_flight: u64,
    /// For each limit that it has: its kind, the limit, and what is used of it.
    pub limits: Vec<(LimitKind, u64, u64)>,
}

/// What is the case for the process.
#[derive(Clone, Debug, Default)]
pub struct ProcessMoment {
    /// Requests that are open.
    pub open: u64,
    /// Requests that wait for a permit.
    pub queued: u64,
    /// Whether it is on its way out.
    pub draining: bool,
    /// Whether the ledger can be used.
    pub ledger_up: bool,
    /// Requests refused because it could not be.
    pub ledger_denied: u64,
    /// Attempts that went on without it.
    pub ledger_uncounted: u64,
    /// Answers whose tokens were lost.
    pub ledger_lost: u64,
    /// Answers that wait for an estimate.
    pub estimates_waiting: u64,
    /// Those that got none.
    pub estimates_dropped: u64,
    /// What the bodies of requests take up, in bytes, as far as they are large.
    pub body_bytes: u64,
    /// What they may take up.
    pub body_bytes_max: u64,
    /// How many wait for room.
    pub bodies_waiting: u64,
    /// How many configs were loaded.
    pub config_version: u64,
    /// How many could not be.
    pub config_failures: u64,
    /// Whether the file as it is now is the one that is current.
    pub config_ok: bool,
    /// When it was loaded, in seconds of Unix time.
    pub config_loaded: f64,
}

impl Moment {
    /// Of this process and these endpoints.
    pub fn new(process: &ProcessMoment, endpoints: &[EndpointMoment]) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let by_endpoint =
            |name: &str, help: &str| keep(&registry, IntGaugeVec::new(Opts::new(name, help), &["endpoint"]));
        let available = by_endpoint("api_together_endpoint_available", "1 if a request could go to the endpoint now.")?;
        let cooling = by_endpoint("api_together_endpoint_cooling_down", "1 while the endpoint is cooling down.")?;
        let in_flight = by_endpoint("api_together_endpoint_in_flight", "Requests that the endpoint is answering.")?;
        let by_limit =
            |name: &str, help: &str| keep(&registry, GaugeVec::new(Opts::new(name, help), &["endpoint", "limit"]));
        let limits = by_limit("api_together_limit", "An endpoint's limits, as the config has them.")?;
        let used = by_limit(
            "api_together_limit_used",
            "What is used of them, by all processes that share the ledger; max_concurrent by this one.",
        )?;
        let left = by_limit("api_together_limit_left", "What is left of them.")?;
        for endpoint in endpoints.iter().take(ENDPOINTS_MAX) {
            let id = endpoint.id.as_str();
            available.with_label_values(&[id]).set(endpoint.available.into());
            cooling.with_label_values(&[id]).set(endpoint.cooling.into());
            in_flight.with_label_values(&[id]).set(to_i64(endpoint.in_flight));
            for (kind, most, count) in &endpoint.limits {
                let limit = kind.label();
                limits.with_label_values(&[id, limit]).set(to_f64(*most));
                used.with_label_values(&[id, limit]).set(to_f64(*count));
                left.with_label_values(&[id, limit]).set(to_f64(most.saturating_sub(*count)));
            }
        }
        process.gather_into(&registry)?;
        Ok(Self(registry))
    }
}

impl ProcessMoment {
    fn gather_into(&self, registry: &Registry) -> prometheus::Result<()> {
        let gauge = |name: &str, help: &str, value: u64| {
            keep(registry, IntGauge::new(name, help)).map(|gauge| gauge.set(to_i64(value)))
        };
        let counter = |name: &str, help: &str, value: u64| {
            keep(registry, IntCounter::new(name, help)).map(|counter| counter.inc_by(value))
        };
        gauge("api_together_open_requests", "Requests that are open.", self.open)?;
        gauge("api_together_queued_requests", "Requests that wait for a permit.", self.queued)?;
        gauge("api_together_draining", "1 while the process is on its way out.", self.draining.into())?;
        gauge("api_together_ledger_up", "1 if the ledger can be used.", self.ledger_up.into())?;
        counter("api_together_ledger_denied_total", "Requests refused since it could not be.", self.ledger_denied)?;
        counter("api_together_ledger_uncounted_total", "Attempts that went on without it.", self.ledger_uncounted)?;
        counter("api_together_ledger_tokens_lost_total", "Answers whose tokens were lost.", self.ledger_lost)?;
        gauge(
            "api_together_estimates_waiting",
            "Answers that wait for an estimate of their tokens.",
            self.estimates_waiting,
        )?;
        counter(
            "api_together_estimates_dropped_total",
            "Answers that got none, or not a whole one.",
            self.estimates_dropped,
        )?;
        gauge("api_together_body_bytes", "What request bodies above 64 KiB take up.", self.body_bytes)?;
        gauge("api_together_body_bytes_max", "What they may take up: server.memoryBytesMax.", self.body_bytes_max)?;
        gauge("api_together_bodies_waiting", "Request bodies that wait for room.", self.bodies_waiting)?;
        gauge("api_together_config_version", "How many configs were loaded since the start.", self.config_version)?;
        counter(
            "api_together_config_failures_total",
            "Changed configs that could not be applied.",
            self.config_failures,
        )?;
        gauge(
            "api_together_config_ok",
            "1 if the config file as it is now is the one that is current.",
            self.config_ok.into(),
        )?;
        let loaded = Gauge::new("api_together_config_loaded_timestamp_seconds", "When it was loaded, in Unix time.");
        keep(registry, loaded)?.set(self.config_loaded);
        let info = IntGaugeVec::new(Opts::new("api_together_build_info", "What is running; always 1."), &["version"]);
        keep(registry, info)?.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(())
    }
}

/// Does something to a metric that is looked up the first time, or every time if there is nowhere to keep it.
fn once<T>(kept: Option<&OnceLock<T>>, use_it: impl FnOnce(&T), look_up: impl FnOnce() -> T) {
    match kept {
        Some(kept) => use_it(kept.get_or_init(look_up)),
        None => use_it(&look_up()),
    }
}

/// Registers a metric. It fails only for a name that is none or is used twice.
fn keep<T: Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<T>) -> prometheus::Result<T> {
    let metric = made?;
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn to_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn to_f64(value: u64) -> f64 {
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
        });
        metrics.attempt("a", "ok", None);
        metrics.spent("a", "m", &Cost::estimated(3, 4), None);
        metrics.own(Duration::from_micros(30));
        metrics.permit(Duration::from_micros(30));
        let endpoint = EndpointMoment {
            id: "a".into(),
            available: true,
            limits: vec![(LimitKind::Rpm, 60, 70)],
            ..EndpointMoment::default()
        };
        let moment = Moment::new(&ProcessMoment::default(), &[endpoint]).unwrap();
        let text = String::from_utf8(metrics.text(&moment)).unwrap();
        for line in [
            r#"api_together_requests_total{endpoint="a",model="m",outcome="ok",status="2xx"} 1"#,
            r#"api_together_attempts_total{endpoint="a",outcome="ok"} 1"#,
            r#"api_together_estimated_tokens_total{endpoint="a",kind="completion",model="m"} 4"#,
            r#"api_together_request_duration_seconds_bucket{endpoint="a",le="0.01"} 1"#,
            r#"api_together_limit_used{endpoint="a",limit="rpm"} 70"#,
            r#"api_together_limit_left{endpoint="a",limit="rpm"} 0"#,
            r#"api_together_endpoint_available{endpoint="a"} 1"#,
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
        let text = String::from_utf8(metrics.text(&Moment(Registry::new()))).unwrap();
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

    #[test]
    fn the_dashboard_asks_for_what_is_told() {
        let names = |text: &'static str| {
            text.split(|c: char| !c.is_ascii_lowercase() && c != '_').filter(|word| word.starts_with("api_together_"))
        };
        let told: Vec<&str> = names(include_str!("metrics.rs")).collect();
        let asked: Vec<&str> = names(include_str!("../../packaging/grafana/api-together.json")).collect();
        assert!(asked.len() > 15);
        for name in asked {
            assert!(told.contains(&name.strip_suffix("_bucket").unwrap_or(name)), "{name}");
        }
    }
}
