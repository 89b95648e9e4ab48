//! Spans of finished requests, in the words of OpenTelemetry's semantic conventions 1.42, and the thread that sends them.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue, Value};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::WithHttpConfig as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanEvents, SpanExporter, SpanLinks, SpanProcessor,
};

use super::entry::{Attempted, Entry, Name};
use super::traces::{COLLECTORS, Tally};
use crate::fault::reference::CLIENT_GONE;
use crate::request::trace::{self, Trace};
use crate::telemetry::metrics::OK;

/// Spans that wait to be sent, and those of one message.
const WAITING_MAX: usize = 4096;
const BATCH_MAX: usize = 512;
/// Time after which those that wait are sent.
const INTERVAL: Duration = Duration::from_secs(2);
/// Longest wait for a collector, and for it at the end of the process.
const SEND_MAX: Duration = Duration::from_secs(10);
const CLOSE_WAIT_MAX: Duration = Duration::from_secs(2);
/// Longest answer of a collector that is read.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// The version of the conventions whose names are used.
const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.42.0";

/// Names of attributes, as that version has them.
mod attribute {
    pub(super) const CLIENT_ADDRESS: &str = "client.address";
    pub(super) const ERROR_TYPE: &str = "error.type";
    pub(super) const GEN_AI_OPERATION_NAME: &str = "gen_ai.operation.name";
    pub(super) const GEN_AI_PROVIDER_NAME: &str = "gen_ai.provider.name";
    pub(super) const GEN_AI_REQUEST_MODEL: &str = "gen_ai.request.model";
    pub(super) const GEN_AI_REQUEST_STREAM: &str = "gen_ai.request.stream";
    pub(super) const GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK: &str = "gen_ai.response.time_to_first_chunk";
    pub(super) const GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: &str = "gen_ai.usage.cache_read.input_tokens";
    pub(super) const GEN_AI_USAGE_INPUT_TOKENS: &str = "gen_ai.usage.input_tokens";
    pub(super) const GEN_AI_USAGE_OUTPUT_TOKENS: &str = "gen_ai.usage.output_tokens";
    pub(super) const GEN_AI_USAGE_REASONING_OUTPUT_TOKENS: &str = "gen_ai.usage.reasoning.output_tokens";
    pub(super) const HTTP_REQUEST_METHOD: &str = "http.request.method";
    pub(super) const HTTP_REQUEST_RESEND_COUNT: &str = "http.request.resend_count";
    pub(super) const HTTP_RESPONSE_STATUS_CODE: &str = "http.response.status_code";
    pub(super) const SERVICE_VERSION: &str = "service.version";
    pub(super) const URL_PATH: &str = "url.path";
}

/// Sends spans to a collector.
#[derive(Debug)]
pub(super) struct Exporter {
    /// Share of the traces that begin here which is recorded.
    share: f64,
    processor: OnceLock<BatchSpanProcessor>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    waiting: AtomicUsize,
    sent: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
    is_failing: AtomicBool,
    /// Why the last message could not be sent, which the exporter's own error leaves out.
    cause: Mutex<String>,
}

impl Exporter {
    pub(super) fn from_environment() -> Option<Self> {
        let set = |name: &str| std::env::var(name).is_ok_and(|value| !value.trim().is_empty());
        let is_off = std::env::var("OTEL_SDK_DISABLED").is_ok_and(|value| value.eq_ignore_ascii_case("true"));
        if is_off || !COLLECTORS.into_iter().any(set) {
            return None;
        }
        Some(Self { share: share(), processor: OnceLock::new(), counts: Arc::default() })
    }

    pub(super) fn samples(&self, trace: u128) -> bool {
        // As OpenTelemetry's TraceIdRatioBased decides, so that all programs of a trace agree: by the lower 63 bits of its id.
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "a share")]
        let place = ((trace as u64) >> 1) as f64 / (1_u64 << 63) as f64;
        place < self.share
    }

    pub(super) fn start(&self) {
        match processor(&self.counts) {
            Ok(processor) => self.processor.set(processor).unwrap_or_default(),
            Err(error) => log::error!("no traces are sent: {error}"),
        }
    }

    pub(super) fn add(&self, trace: Trace, entry: &Entry) {
        let Some(processor) = self.processor.get() else { return };
        let spans = entry.attempts.len() + 1;
        if self.counts.waiting.fetch_add(spans, Ordering::Relaxed) + spans > WAITING_MAX {
            self.counts.waiting.fetch_sub(spans, Ordering::Relaxed);
            self.counts.dropped.fetch_add(spans as u64, Ordering::Relaxed);
            return;
        }
        let own = trace::span();
        let came = entry.ended.checked_sub(entry.total).unwrap_or(entry.ended);
        let last = entry.attempts.len().saturating_sub(1);
        for (place, attempt) in entry.attempts.iter().enumerate() {
            processor.on_end(client(trace, own, came, (entry, attempt), (place, place == last)));
        }
        processor.on_end(server(trace, own, came, entry));
    }

    pub(super) fn close(&self) {
        if let Some(processor) = self.processor.get()
            && let Err(error) = processor.shutdown_with_timeout(CLOSE_WAIT_MAX)
        {
            log::warn!("the last traces may not have been sent: {error}");
        }
    }

    pub(super) fn tally(&self) -> Tally {
        let Counts { sent, dropped, failed, .. } = &*self.counts;
        let [sent, dropped, failed] = [sent, dropped, failed].map(|count| count.load(Ordering::Relaxed));
        Tally { sent, dropped, failed }
    }
}

/// The share that the standard variables ask for: all, unless they say otherwise.
fn share() -> f64 {
    let sampler = std::env::var("OTEL_TRACES_SAMPLER").unwrap_or_default();
    match sampler.as_str() {
        "always_off" | "parentbased_always_off" => 0.0,
        "traceidratio" | "parentbased_traceidratio" => {
            std::env::var("OTEL_TRACES_SAMPLER_ARG").ok().and_then(|share| share.trim().parse().ok()).unwrap_or(1.0)
        }
        _ => 1.0,
    }
}

fn processor(counts: &Arc<Counts>) -> Result<BatchSpanProcessor, String> {
    let client = reqwest::Client::builder()
        .timeout(SEND_MAX)
        // What a collector answers is not followed: it could lead anywhere.
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .map_err(|error| error.without_url().to_string())?;
    let sender = Sender { client, runtime: tokio::runtime::Handle::current(), counts: Arc::clone(counts) };
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_http_client(sender)
        .build()
        .map_err(|error| error.to_string())?;
    let config = BatchConfigBuilder::default()
        .with_max_queue_size(WAITING_MAX)
        .with_max_export_batch_size(BATCH_MAX)
        .with_scheduled_delay(INTERVAL)
        .build();
    let counted = Counted { exporter, counts: Arc::clone(counts) };
    let mut processor = BatchSpanProcessor::new(counted, config);
    // OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win.
    let name = std::env::var("OTEL_SERVICE_NAME").unwrap_or_else(|_| "api-together".to_owned());
    let version = KeyValue::new(attribute::SERVICE_VERSION, env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder().with_schema_url([version], SCHEMA_URL).with_service_name(name).build();
    processor.set_resource(&resource);
    Ok(processor)
}

/// Counts what was sent, and says once when a collector fails and when it takes spans again.
#[derive(Debug)]
struct Counted {
    exporter: opentelemetry_otlp::SpanExporter,
    counts: Arc<Counts>,
}

impl SpanExporter for Counted {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let Counts { waiting, sent, failed, is_failing, .. } = &*self.counts;
        let count = batch.len();
        let result = self.exporter.export(batch).await;
        waiting.fetch_sub(count, Ordering::Relaxed);
        match &result {
            Ok(()) => {
                sent.fetch_add(count as u64, Ordering::Relaxed);
                if is_failing.swap(false, Ordering::Relaxed) {
                    log::info!("traces are sent again");
                }
            }
            Err(error) => {
                failed.fetch_add(count as u64, Ordering::Relaxed);
                if !is_failing.swap(true, Ordering::Relaxed) {
                    let cause = self.counts.cause.lock().unwrap_or_else(PoisonError::into_inner);
                    log::warn!("traces cannot be sent: {error}{cause}");
                }
            }
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// Sends messages with the HTTP client that the webhook has as well. The thread that makes them has no runtime of its own.
#[derive(Clone, Debug)]
struct Sender {
    client: reqwest::Client,
    runtime: tokio::runtime::Handle,
    counts: Arc<Counts>,
}

#[async_trait]
impl HttpClient for Sender {
    async fn send_bytes(&self, request: http::Request<Bytes>) -> Result<http::Response<Bytes>, HttpError> {
        let request = reqwest::Request::try_from(request)?;
        let client = self.client.clone();
        let exchange = async move {
            let mut answer = client.execute(request).await.map_err(reqwest::Error::without_url)?;
            let (status, mut body) = (answer.status(), Vec::new());
            while let Some(piece) = answer.chunk().await.map_err(reqwest::Error::without_url)? {
                if body.len() + piece.len() > ANSWER_BYTES_MAX {
                    break;
                }
                body.extend_from_slice(&piece);
            }
            Ok::<_, reqwest::Error>((status, Bytes::from(body)))
        };
        let sent =
            self.runtime.spawn(exchange).await.map_err(HttpError::from).and_then(|sent| sent.map_err(HttpError::from));
        let cause = sent.as_ref().err().map(|error| format!(" ({})", with_sources(error.as_ref()))).unwrap_or_default();
        *self.counts.cause.lock().unwrap_or_else(PoisonError::into_inner) = cause;
        let (status, body) = sent?;
        let mut answer = http::Response::new(body);
        *answer.status_mut() = status;
        Ok(answer)
    }
}

/// An error with what it comes from.
fn with_sources(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn named(name: &Name) -> &Arc<str> {
    match name {
        Name::Known(name) | Name::Any(name) => name,
    }
}

/// Attributes that are there.
#[derive(Default)]
struct Attributes(Vec<KeyValue>);

impl Attributes {
    fn add(&mut self, name: &'static str, value: Option<impl Into<Value>>) {
        self.0.extend(value.map(|value| KeyValue::new(name, value)));
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The span of a request.
fn server(trace: Trace, own: u64, came: SystemTime, entry: &Entry) -> SpanData {
    let mut attributes = Attributes::default();
    let path = named(&entry.path);
    attributes.add(attribute::HTTP_REQUEST_METHOD, Some(Arc::clone(named(&entry.method))));
    attributes.add(attribute::URL_PATH, Some(Arc::clone(path)));
    attributes.add(attribute::HTTP_RESPONSE_STATUS_CODE, entry.status.map(i64::from));
    attributes.add(attribute::CLIENT_ADDRESS, entry.address.map(|address| address.to_string()));
    attributes.add(attribute::ERROR_TYPE, entry.fault);
    attributes.add(attribute::GEN_AI_REQUEST_MODEL, entry.model.as_ref().map(|model| Arc::clone(named(model))));
    attributes.add("api_together.request_id", entry.id.as_ref().and_then(|id| id.to_str().ok()).map(ToOwned::to_owned));
    attributes.add("api_together.key", entry.key.clone());
    attributes.add("api_together.affinity", entry.affinity);
    attributes.add("api_together.queued_ms", Some(entry.queued.as_secs_f64() * 1e3));
    attributes.add("api_together.cost_usd", entry.cost.map(crate::usage::prices::NanoUsd::dollars));
    let is_wrong =
        entry.fault.is_some_and(|fault| fault != CLIENT_GONE) && entry.status.is_none_or(|status| status >= 500);
    // Paths that clients make up would be as many names.
    let name = match &entry.path {
        Name::Known(path) => format!("{} {path}", named(&entry.method)),
        Name::Any(_) => named(&entry.method).to_string(),
    };
    span((trace, own, trace.parent), SpanKind::Server, name, (came, entry.ended), attributes, is_wrong)
}

/// The span of an attempt of it.
fn client(
    trace: Trace,
    of: u64,
    came: SystemTime,
    (entry, attempt): (&Entry, &Attempted),
    (place, is_last): (usize, bool),
) -> SpanData {
    let path = named(&entry.path);
    let operation = operation(path);
    let model = attempt.model.as_ref().map(|model| Arc::clone(named(model)));
    let mut attributes = Attributes::default();
    attributes.add(attribute::GEN_AI_OPERATION_NAME, operation);
    attributes
        .add(attribute::GEN_AI_PROVIDER_NAME, Some(if path.contains("/messages") { "anthropic" } else { "openai" }));
    attributes.add(attribute::GEN_AI_REQUEST_MODEL, model.clone());
    attributes.add(attribute::GEN_AI_REQUEST_STREAM, entry.stream.then_some(true));
    attributes.add(attribute::HTTP_RESPONSE_STATUS_CODE, attempt.status.map(i64::from));
    attributes.add(attribute::HTTP_REQUEST_RESEND_COUNT, (place > 0).then(|| signed(place as u64)));
    attributes.add("api_together.endpoint", Some(Arc::clone(&attempt.endpoint)));
    attributes.add("api_together.endpoint_key", attempt.lane.clone());
    attributes.add("api_together.trouble", attempt.trouble.map(|(trouble, _)| trouble));
    attributes.add("api_together.rule", attempt.trouble.map(|(_, rule)| rule));
    let is_good = attempt.outcome == OK;
    attributes.add(attribute::ERROR_TYPE, (!is_good).then_some(attempt.outcome));
    if is_last && is_good {
        let first = entry.first_token.or(entry.first_byte).filter(|_| entry.stream);
        let first = first.and_then(|first| first.checked_sub(attempt.began));
        attributes.add(attribute::GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK, first.map(|first| first.as_secs_f64()));
        if let Some(tokens) = &entry.tokens {
            let kinds = [
                (attribute::GEN_AI_USAGE_INPUT_TOKENS, tokens.prompt),
                (attribute::GEN_AI_USAGE_OUTPUT_TOKENS, tokens.completion),
                (attribute::GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS, tokens.cached),
                (attribute::GEN_AI_USAGE_REASONING_OUTPUT_TOKENS, tokens.reasoning),
            ];
            for (name, count) in kinds {
                attributes.add(name, Some(signed(count)));
            }
        }
    }
    let name = [operation.unwrap_or("request"), model.as_deref().unwrap_or_default()].join(" ");
    let began = came + attempt.began;
    let span_of = (trace, attempt.span, Some(of));
    let is_wrong = !is_good && attempt.outcome != CLIENT_GONE;
    span(span_of, SpanKind::Client, name.trim_end().to_owned(), (began, began + attempt.took), attributes, is_wrong)
}

/// The operation of a call, as the conventions name it.
fn operation(path: &str) -> Option<&'static str> {
    let ends = |end: &str| path.ends_with(end);
    if ends("/chat/completions") || ends("/responses") || ends("/messages") {
        Some("chat")
    } else if ends("/completions") {
        Some("text_completion")
    } else if ends("/embeddings") {
        Some("embeddings")
    } else {
        None
    }
}

fn span(
    (trace, own, parent): (Trace, u64, Option<u64>),
    span_kind: SpanKind,
    name: String,
    (start_time, end_time): (SystemTime, SystemTime),
    attributes: Attributes,
    is_wrong: bool,
) -> SpanData {
    let span_id = |id: u64| SpanId::from_bytes(id.to_be_bytes());
    let is_remote = span_kind == SpanKind::Server && parent.is_some();
    SpanData {
        span_context: SpanContext::new(
            TraceId::from_bytes(trace.id.to_be_bytes()),
            span_id(own),
            TraceFlags::SAMPLED,
            false,
            TraceState::default(),
        ),
        parent_span_id: parent.map_or(SpanId::INVALID, span_id),
        parent_span_is_remote: is_remote,
        span_kind,
        name: name.into(),
        start_time,
        end_time,
        attributes: attributes.0,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: if is_wrong { Status::error("") } else { Status::Unset },
        instrumentation_scope: InstrumentationScope::builder("api-together")
            .with_version(env!("CARGO_PKG_VERSION"))
            .with_schema_url(SCHEMA_URL)
            .build(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exporter(share: f64) -> Exporter {
        Exporter { share, processor: OnceLock::new(), counts: Arc::default() }
    }

    #[test]
    fn a_share_of_traces_is_recorded() {
        let taken = |share: f64| (0..10_000).filter(|_| exporter(share).samples(fastrand::u128(..))).count();
        assert_eq!((taken(0.0), taken(1.0)), (0, 10_000));
        assert!((2_000..3_000).contains(&taken(0.25)), "{}", taken(0.25));
    }

    #[test]
    fn operations_have_the_names_of_the_conventions() {
        let of = |path| operation(path);
        assert_eq!(of("/v1/chat/completions"), Some("chat"));
        assert_eq!(of("/v1/completions"), Some("text_completion"));
        assert_eq!(of("/v1/messages"), Some("chat"));
        assert_eq!(of("/v1/files"), None);
    }
}
