//! One endpoint.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use jiff::tz::TimeZone;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::auth_header::AuthHeader;
use super::base_url::BaseUrl;
use super::calls::{CallKind, CallSet};
use super::checked::{Check, patterns_meet};
use super::errors::{ErrorRule, MessagePattern};
use super::file::{self, EndpointFile, EndpointTlsFile, ErrorRuleFile, FormatFile, ModelLimitsFile, TimeoutsFile};
use super::lanes::{self, EndpointKeys};
use super::limits::{Limit, PerLimit};
use super::prices::{PriceEntry, prices, provider as price_provider};
use super::problem::join;
use super::proxy::Proxy;
use super::switches::SwitchedOff;
use crate::config::secret::Secret;

/// Ids are headers' and metrics' labels, so they are short.
pub(super) const ID_CHARS_MAX: usize = 64;
/// Names are shown in tables.
pub(super) const NAME_CHARS_MAX: usize = 200;

/// Patterns of models with limits of their own: an endpoint has a few families of models.
pub(super) const MODEL_LIMITS_MAX: usize = 256;

/// An upstream endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// No other endpoint has it. At most 64 characters, none of them a control character.
    pub id: Arc<str>,
    /// Display name; the id if none was given.
    pub name: Arc<str>,
    /// Base URL.
    pub base_url: BaseUrl,
    /// The keys it is sent, of which each request has one.
    pub keys: EndpointKeys,
    /// Where it wants its key.
    pub auth_header: AuthHeader,
    /// Calls that it has.
    pub calls: CallSet,
    /// Calls that it takes over a WebSocket whose model stands in its first message.
    pub web_sockets: CallSet,
    /// What takes a permit of a WebSocket.
    pub web_socket_permits: WebSocketPermits,
    /// Other addresses for some of them.
    pub formats: Vec<Door>,
    /// Limits.
    pub limits: PerLimit<Limit>,
    /// Limits of models, by exact name or beginning that ends in `*`, of names as the endpoint is sent them.
    pub model_limits: BTreeMap<String, ModelLimits>,
    /// Prices of its models, the closest one first.
    pub prices: Vec<PriceEntry>,
    /// The provider whose prices count otherwise; the one whose address it has if none is named.
    pub price_provider: Option<String>,
    /// Time zone whose midnight ends its day; the server's if `None`.
    pub timezone: Option<TimeZone>,
    /// The organisation whose objects it has; its id, if it was not said.
    pub organization: Arc<str>,
    /// `false`: it takes nothing.
    pub enabled: bool,
    /// Set if that is so since it was switched off beside the config.
    pub switched_off: Option<SwitchedOff>,
    /// Exact names, and beginnings that end in `*`, as typed.
    pub models: Vec<String>,
    /// From the name that clients ask for to the name that is sent.
    pub model_mapping: BTreeMap<String, String>,
    /// Share among endpoints of the same priority, from 1 to 65535.
    pub weight: u32,
    /// Lower ones first.
    pub priority: u32,
    /// Values are marked sensitive and print as such.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Timeouts.
    pub timeouts: Timeouts,
    /// Policy for `stream_options` that the client did not send.
    pub stream_usage: StreamUsage,
    /// Outbound proxy.
    pub proxy: Option<Proxy>,
    /// Only HTTP/2, only HTTP/1.1, or what the endpoint offers.
    pub http2: Option<bool>,
    /// Certificate checks.
    pub tls: EndpointTls,
    /// What becomes of the client's `/v1`.
    pub version_path: VersionPath,
    /// Parameters of each request's query, percent-encoded.
    pub query: Vec<(String, Secret)>,
    /// Time between two questions for its models; none if it is not asked.
    pub discovery: Option<Duration>,
    /// True if what it says of its limits is believed before it refuses.
    pub learns_limits: bool,
    /// Meaning of its errors, before what is known of vendors.
    pub errors: Vec<ErrorRule>,
}

impl Endpoint {
    /// True if the configuration lets it take requests at all.
    pub fn usable(&self) -> bool {
        self.enabled && self.limits.each().all(|(_, limit)| limit != Limit::Off)
    }
}

impl Endpoint {
    /// Names and patterns of models as the endpoint is sent them: those it serves unmapped, and those that others are mapped to.
    pub fn sent_models(&self) -> impl Iterator<Item = &str> {
        sent_models(&self.models, &self.model_mapping)
    }
}

fn sent_models<'a>(models: &'a [String], mapping: &'a BTreeMap<String, String>) -> impl Iterator<Item = &'a str> {
    let unmapped = models.iter().filter(|model| !mapping.contains_key(*model));
    unmapped.chain(mapping.values()).map(String::as_str)
}

/// Another address of an endpoint, for calls of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Door {
    /// Kind of calls.
    pub calls: CallKind,
    /// Base URL.
    pub base_url: BaseUrl,
    /// Where it wants the endpoint's key.
    pub auth_header: AuthHeader,
}

/// Limits of the models that match a pattern; none of them is [`Limit::Off`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelLimits {
    /// Limits.
    pub limits: PerLimit<Limit>,
    /// True if each model has them for itself, false if all share them.
    pub each: bool,
}

/// What becomes of the client's `/v1` where a base URL has no path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VersionPath {
    /// It is kept.
    #[default]
    Keep,
    /// It is left out.
    None,
}

/// Policy for `stream_options` that the client did not send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StreamUsage {
    /// Added unless the endpoint refuses it.
    #[default]
    Auto,
    /// Never added.
    Never,
}

/// What takes a permit of a WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WebSocketPermits {
    /// Each response.
    #[default]
    Response,
    /// The whole session, once.
    Session,
}

/// Timeouts towards an endpoint; all are non-zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Until the connection is established.
    pub connect: Duration,
    /// Until the first byte of a streamed answer.
    pub first_byte_stream: Duration,
    /// Until the first byte of any other answer.
    pub first_byte: Duration,
    /// Until an answer that has begun says something.
    pub thinking: Duration,
    /// Between two pieces of the answer.
    pub idle: Duration,
}

/// Certificate checks of an endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndpointTls {
    /// Trusted in place of the system's authorities. It could be read when the configuration was checked.
    pub ca_file: Option<PathBuf>,
    /// No certificate is checked.
    pub insecure: bool,
}

/// Bounds were checked with the shape, so here only what a schema cannot say.
pub(super) fn check(typed: EndpointFile, path: &str, check: &mut Check<'_>) -> Option<Endpoint> {
    let at = |key: &str| join(path, key);
    let id = id(typed.id, &at("id"), check);
    let name = name(typed.name, &at("name"), check);
    let base_url = base_url(typed.base_url.as_deref(), &at("baseUrl"), check);
    let enabled = typed.enabled.unwrap_or(file::ENABLED_DEFAULT);
    let models = models(typed.models, &at("models"), check);
    let model_mapping = typed.model_mapping.unwrap_or_default();
    check_mapping(&model_mapping, &at("modelMapping"), check);
    if enabled && models.is_empty() && model_mapping.is_empty() {
        check.report.warning(
            &at("models"),
            "names no model, so the endpoint takes requests without a model only",
            "list the models it serves, or [\"*\"] for all",
        );
    }
    let headers = headers(typed.headers, &at("headers"), check);
    let query = query(typed.query, &at("query"), check);
    let version_path = typed.version_path.unwrap_or_default();
    if version_path == VersionPath::None && base_url.as_ref().is_some_and(|base| !base.path.is_empty()) {
        let hint = "leave one of them out: a path of baseUrl replaces the client's /v1 by itself";
        check.report.warning(&at("versionPath"), "has no effect, since baseUrl has a path", hint);
    }
    let tls = endpoint_tls(typed.tls.unwrap_or_default(), &at("tls"), check);
    let errors = errors(typed.errors, &at("errors"), check);
    let proxy = proxy(typed.proxy.as_ref(), base_url.as_ref(), &at("proxy"), check);
    let timezone = super::server::timezone(typed.timezone.as_deref(), &at("timezone"), check);
    let model_limits = model_limits(typed.model_limits, (&models, &model_mapping), &at("modelLimits"), check);
    let prices = prices(typed.prices, &at("prices"), check);
    let price_provider = price_provider(typed.price_provider, &at("priceProvider"), check);
    let organization = organization(typed.organization, &at("organization"), check);
    let of = lanes::Of { id: id.as_deref().unwrap_or_default(), organization: organization.as_deref(), path };
    let keys = lanes::check((typed.api_key, typed.api_keys), of, check);
    if let Some(keys) = keys.as_ref().filter(|keys| keys.is_pool) {
        warn_of_models_without_key(keys, (&models, &model_mapping), &at("apiKeys"), check);
    }
    let auth_header = auth_header(typed.auth_header.as_deref(), &at("authHeader"), check);
    // A word that is none of them has been reported with the shape.
    let calls =
        typed.calls.map_or(CallSet::ALL, |calls| calls.iter().filter_map(|name| CallKind::named(name)).collect());
    let web_sockets = typed.web_sockets.unwrap_or_default();
    let web_sockets = web_sockets.iter().filter_map(|name| CallKind::named(name)).collect();
    let formats = formats(typed.formats, auth_header.as_ref(), &at("formats"), check);
    let limits = PerLimit {
        rpm: typed.rpm,
        rpd: typed.rpd,
        tpm: typed.tpm,
        tpd: typed.tpd,
        max_concurrent: typed.max_concurrent,
    };
    let id: Arc<str> = id?.into();
    Some(Endpoint {
        name: name.map_or_else(|| id.clone(), Arc::from),
        organization: organization.map_or_else(|| id.clone(), Arc::from),
        id,
        base_url: base_url?,
        version_path,
        query,
        keys: keys?,
        auth_header: auth_header?,
        calls,
        formats,
        web_sockets,
        web_socket_permits: typed.web_socket_permits.unwrap_or_default(),
        limits: limits.map(limit),
        model_limits,
        prices,
        price_provider,
        timezone: timezone?,
        enabled,
        switched_off: None,
        models,
        model_mapping,
        weight: typed.weight.unwrap_or(file::WEIGHT_DEFAULT).into(),
        priority: typed.priority.unwrap_or(file::PRIORITY_DEFAULT),
        headers,
        timeouts: timeouts(&typed.timeouts.unwrap_or_default()),
        stream_usage: typed.stream_usage.unwrap_or_default(),
        proxy: proxy?,
        http2: typed.http2,
        tls,
        discovery: typed.discover.unwrap_or(file::DISCOVER_DEFAULT).then(|| {
            let minutes = typed.discovery_minutes.unwrap_or(file::DISCOVERY_MINUTES_DEFAULT);
            Duration::from_mins(minutes.into())
        }),
        learns_limits: typed.learn_limits.unwrap_or(file::LEARN_LIMITS_DEFAULT),
        errors,
    })
}

pub(super) fn limit(typed: Option<i64>) -> Limit {
    Limit::from_number(typed.unwrap_or(file::LIMIT_DEFAULT))
}

/// Models that an endpoint has, as clients ask for them, and the names that some of them are sent under.
type Served<'a> = (&'a [String], &'a BTreeMap<String, String>);

fn model_limits(
    typed: Option<BTreeMap<String, ModelLimitsFile>>,
    served: Served<'_>,
    path: &str,
    check: &mut Check<'_>,
) -> BTreeMap<String, ModelLimits> {
    let typed = typed.unwrap_or_default();
    if typed.len() > MODEL_LIMITS_MAX {
        let message = format!("has {} entries", typed.len());
        check.report.error(path, message, &format!("use {MODEL_LIMITS_MAX} at most; a prefix covers many models"));
    }
    let mut all = BTreeMap::new();
    for (pattern, typed) in typed {
        let path = join(path, &pattern);
        let ModelLimitsFile { rpm, rpd, tpm, tpd, max_concurrent, each } = typed;
        let limits = PerLimit { rpm, rpd, tpm, tpd, max_concurrent }.map(limit);
        for (kind, limit) in limits.each() {
            if limit == Limit::Off {
                let hint = "leave the model out of models, or write -1 for no limit";
                check.report.error(&join(&path, kind.key()), "is 0, but a model cannot be switched off here", hint);
            }
        }
        if pattern.trim().is_empty() {
            check.report.error(&path, "names no model", "name a model that the endpoint is sent, or * for all");
        } else if pattern.trim() != pattern {
            check.report.error(&path, "has blanks around it", "leave them off: names are compared as they are");
        } else if check_pattern(&pattern, &path, check) {
            warn_of_no_match(&pattern, served, &path, check);
        }
        let each = each.unwrap_or(file::EACH_DEFAULT);
        if each && !pattern.ends_with('*') {
            check.report.warning(
                &join(&path, "each"),
                "has no effect on an exact name",
                "it is for prefixes, such as gpt-4o*",
            );
        }
        all.insert(pattern, ModelLimits { limits, each });
    }
    all
}

/// A model that no key is for is never asked for there.
fn warn_of_models_without_key(keys: &EndpointKeys, (models, mapping): Served<'_>, path: &str, check: &mut Check<'_>) {
    let has_key = |model: &str| keys.lanes.iter().any(|lane| lane.has_model(model));
    for model in sent_models(models, mapping).filter(|model| !model.ends_with('*') && !has_key(model)) {
        let hint = "add it to the `models` of a key, or take it out of the endpoint's";
        check.report.warning(path, format!("no key is for the model {model:?}"), hint);
    }
}

/// Limits of a model that the endpoint is never sent hold nothing: most likely the name is the one that clients ask for.
fn warn_of_no_match(pattern: &str, (models, mapping): Served<'_>, path: &str, check: &mut Check<'_>) {
    let meet = patterns_meet;
    // An exact name that is mapped to another is never sent, whatever patterns the endpoint serves.
    let is_mapped_away = mapping.contains_key(pattern) && !mapping.values().any(|sent| sent == pattern);
    if !is_mapped_away && sent_models(models, mapping).any(|sent| meet(pattern, sent)) {
        return;
    }
    let hint = match mapping.iter().find(|(asked, _)| meet(pattern, asked)) {
        Some((asked, sent)) => format!("modelMapping sends {asked} as {sent}: name that one"),
        None => "name a model of models, or one that modelMapping sends".to_owned(),
    };
    check.report.warning(path, "matches no model that the endpoint is sent, so it limits nothing", &hint);
}

fn id(typed: Option<String>, path: &str, check: &mut Check<'_>) -> Option<String> {
    let hint = "any short name that no other endpoint has";
    let id = check.required(typed, path, hint)?;
    check_label(&id, ID_CHARS_MAX, path, check).then_some(id)
}

/// An empty name is as good as none.
fn name(typed: Option<String>, path: &str, check: &mut Check<'_>) -> Option<String> {
    let name = typed.filter(|name| !name.trim().is_empty())?;
    check_label(&name, NAME_CHARS_MAX, path, check).then_some(name)
}

/// An empty organisation is as good as none.
fn organization(typed: Option<String>, path: &str, check: &mut Check<'_>) -> Option<String> {
    let organization = typed.filter(|organization| !organization.trim().is_empty())?;
    check_label(&organization, NAME_CHARS_MAX, path, check).then_some(organization)
}

/// Ids and names go into logs and headers, where a control character would break a line.
pub(super) fn check_label(text: &str, chars_max: usize, path: &str, check: &mut Check<'_>) -> bool {
    if text.chars().any(char::is_control) {
        check.report.error(path, "has a control character", "leave off line breaks and tabs");
        return false;
    }
    let chars = text.chars().count();
    if chars > chars_max {
        let message = format!("is {chars} characters long");
        check.report.error(path, message, &format!("use {chars_max} at most"));
        return false;
    }
    true
}

fn base_url(typed: Option<&str>, path: &str, check: &mut Check<'_>) -> Option<BaseUrl> {
    let typed = check.required(typed.map(str::to_owned), path, "such as https://api.openai.com")?;
    let base_url = BaseUrl::parse(&typed).map_err(|no| check.report.error(path, no.message, no.hint)).ok()?;
    if !base_url.tls && !base_url.is_private() {
        check.report.warning(
            path,
            "is plain http to a public host, so the key travels in the clear",
            "use https:// if the endpoint has it",
        );
    }
    Some(base_url)
}

/// The endpoint's own, or the environment's. The outer `None` is an error that was reported.
#[expect(clippy::option_option, reason = "absent, and wrong, are two things")]
fn proxy(typed: Option<&Secret>, to: Option<&BaseUrl>, path: &str, check: &mut Check<'_>) -> Option<Option<Proxy>> {
    let (named_by, text) = match typed.map(Secret::expose) {
        Some("none" | "") => return Some(None),
        Some(text) => (None, text),
        None => match to.and_then(|to| Proxy::of_environment(check.environment, to)) {
            Some((name, text)) => (Some(name), text),
            None => return Some(None),
        },
    };
    match Proxy::parse(text) {
        Ok(proxy) => Some(Some(proxy)),
        Err(no) => {
            let whose = named_by.map_or_else(String::new, |name| format!("comes from {name}, which "));
            check.report.error(path, format!("{whose}{}", no.message), no.hint);
            None
        }
    }
}

/// What stands for itself nowhere in a query (RFC 3986, 2.3).
const NOT_PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Names and values as they stand in a query.
fn query(typed: Option<BTreeMap<String, Secret>>, path: &str, check: &mut Check<'_>) -> Vec<(String, Secret)> {
    let mut query = Vec::new();
    for (name, value) in typed.unwrap_or_default() {
        if name.trim().is_empty() {
            check.report.error(&join(path, &name), "has no name", "write it as \"name\": \"value\"");
            continue;
        }
        let encode = |text: &str| utf8_percent_encode(text, NOT_PLAIN).to_string();
        query.push((encode(&name), Secret::new(encode(value.expose()))));
    }
    query
}

fn auth_header(typed: Option<&str>, path: &str, check: &mut Check<'_>) -> Option<AuthHeader> {
    let Some(typed) = typed else { return Some(AuthHeader::default()) };
    let parsed = AuthHeader::parse(typed);
    if parsed.is_none() {
        let hint = "use authorization, api-key, x-api-key, x-goog-api-key, or query:NAME for a parameter of the query; headers can hold \
                    others";
        check.report.error(path, format!("{typed:?} is no place for a key that is known here"), hint);
    }
    parsed
}

fn formats(
    typed: Option<BTreeMap<String, FormatFile>>,
    default: Option<&AuthHeader>,
    path: &str,
    check: &mut Check<'_>,
) -> Vec<Door> {
    let mut formats = Vec::new();
    for (name, typed) in typed.unwrap_or_default() {
        let path = join(path, &name);
        let Some(calls) = CallKind::named(&name) else {
            let names: Vec<_> = CallKind::ALL.iter().map(|kind| kind.name()).collect();
            check.report.error(&path, "names no calls", &format!("use one of {}", names.join(", ")));
            continue;
        };
        let base_url = base_url(typed.base_url.as_deref(), &join(&path, "baseUrl"), check);
        let auth_header = match typed.auth_header.as_deref() {
            None => default.cloned(),
            Some(text) => auth_header(Some(text), &join(&path, "authHeader"), check),
        };
        if let (Some(base_url), Some(auth_header)) = (base_url, auth_header) {
            formats.push(Door { calls, base_url, auth_header });
        }
    }
    formats
}

fn errors(typed: Option<Vec<ErrorRuleFile>>, path: &str, check: &mut Check<'_>) -> Vec<ErrorRule> {
    let mut rules = Vec::new();
    for (index, ErrorRuleFile { status, code, kind, message, means }) in
        typed.unwrap_or_default().into_iter().enumerate()
    {
        let path = format!("{path}[{index}]");
        if status.is_none() && code.is_none() && kind.is_none() && message.is_none() {
            check.report.error(&path, "fits every error", "say which: set status, code, type or message");
        }
        let Some(means) = means else {
            check.report.error(&join(&path, "means"), "is missing", "say whose trouble it is, such as \"model_limit\"");
            continue;
        };
        rules.push(ErrorRule { status, code, kind, message: message.map(MessagePattern::new), means });
    }
    rules
}

fn models(typed: Option<Vec<String>>, path: &str, check: &mut Check<'_>) -> Vec<String> {
    let models = typed.unwrap_or_default();
    for (index, model) in models.iter().enumerate() {
        let path = format!("{path}[{index}]");
        if model.trim().is_empty() {
            check.report.error(&path, "is empty", "name a model, or * for all");
        }
        check_pattern(model, &path, check);
    }
    models
}

fn check_mapping(mapping: &BTreeMap<String, String>, path: &str, check: &mut Check<'_>) {
    for (asked, sent) in mapping {
        let path = join(path, asked);
        if asked.trim().is_empty() {
            check.report.error(&path, "maps an empty name", "name the model that clients ask for");
        } else if sent.trim().is_empty() {
            check.report.error(&path, "maps to an empty name", "name the model that the endpoint serves");
        }
        check_pattern(asked, &path, check);
    }
}

pub(super) fn check_pattern(model: &str, path: &str, check: &mut Check<'_>) -> bool {
    let is_good = !model.strip_suffix('*').unwrap_or(model).contains('*');
    if !is_good {
        let message = format!("{model:?} has a `*` that is not at the end");
        check.report.error(path, message, "only a `*` at the end: gpt-4*, or * alone for all");
    }
    is_good
}

/// Headers that frame a message are the gateway's business: a configured value would break or smuggle requests.
const REFUSED_HEADERS: [&str; 10] = [
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

fn headers(
    typed: Option<BTreeMap<String, Secret>>,
    path: &str,
    check: &mut Check<'_>,
) -> Vec<(HeaderName, HeaderValue)> {
    let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
    for (name, value) in typed.unwrap_or_default() {
        let path = join(path, &name);
        let header = header(&name, &value, &path, check);
        let Some((name, value)) = header else {
            continue;
        };
        if headers.iter().any(|(known, _)| *known == name) {
            let hint = "upper and lower case do not matter; keep one";
            check.report.error(&path, "is the same header as another one here", hint);
        }
        headers.push((name, value));
    }
    headers
}

fn header(name: &str, value: &Secret, path: &str, check: &mut Check<'_>) -> Option<(HeaderName, HeaderValue)> {
    let Ok(name) = HeaderName::from_bytes(name.as_bytes()) else {
        check.report.error(path, "is not a header name", "use letters, digits and `-`");
        return None;
    };
    if REFUSED_HEADERS.contains(&name.as_str()) {
        check.report.error(path, "cannot be set", "the proxy sets this header itself; leave it off");
        return None;
    }
    let Ok(mut value) = HeaderValue::from_str(value.expose()) else {
        let hint = "use ASCII letters, digits and signs, without line breaks";
        check.report.error(path, "has a character that a header cannot carry", hint);
        return None;
    };
    value.set_sensitive(true);
    Some((name, value))
}

fn timeouts(typed: &TimeoutsFile) -> Timeouts {
    let duration = |typed: Option<u32>, default: u32| Duration::from_millis(typed.unwrap_or(default).into());
    Timeouts {
        connect: duration(typed.connect_ms, file::CONNECT_MS_DEFAULT),
        first_byte_stream: duration(typed.first_byte_ms, file::FIRST_BYTE_STREAM_MS_DEFAULT),
        first_byte: duration(typed.first_byte_ms, file::FIRST_BYTE_MS_DEFAULT),
        thinking: duration(typed.thinking_ms, file::THINKING_MS_DEFAULT),
        idle: duration(typed.idle_ms, file::IDLE_MS_DEFAULT),
    }
}

fn endpoint_tls(typed: EndpointTlsFile, path: &str, check: &mut Check<'_>) -> EndpointTls {
    let ca_file = typed.ca_file.and_then(|file| check.readable(&file, &join(path, "caFile")));
    let insecure = typed.insecure.unwrap_or(false);
    if insecure {
        check.report.warning(
            &join(path, "insecure"),
            "CERTIFICATES ARE NOT CHECKED: anyone on the way can read the key and change the answers",
            "name the endpoint's own authority in `caFile` instead",
        );
    }
    EndpointTls { ca_file, insecure }
}
