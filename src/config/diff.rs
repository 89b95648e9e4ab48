//! Differences between two configurations, in words. Keys are never among them.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::affinity::AffinityRules;
use super::calls::{CallKind, CallSet};
use super::client_keys::ClientKey;
use super::connections::ConnectionLimits;
use super::endpoint::{Door, Endpoint, EndpointTls, ModelLimits, Timeouts};
use super::lanes::{EndpointKeys, Lane};
use super::proxy::Proxy;
use super::request_log::RequestLog;
use super::server::{Breaker, Queue, Retry, Server, ServerTls};
use super::shared_ledger::SharedLedger;
use super::spelling::{self, millis, optional, path, plain, seconds, word};

/// Lines about a change; a change of a thousand endpoints is shown by its first ones.
const LINES_MAX: usize = 50;
/// Characters of a value that is shown; of a longer list, only additions and removals are.
const VALUE_CHARS_MAX: usize = 120;

/// Returns a line for each difference, at most fifty, and a last one with the number of the others.
pub fn changes(before: (&Server, &[&Endpoint]), after: (&Server, &[&Endpoint])) -> Vec<String> {
    let mut lines = ChangeLines::default();
    server(&mut lines, before.0, after.0);
    let known: HashMap<&str, &Endpoint> = before.1.iter().map(|endpoint| (endpoint.id.as_ref(), *endpoint)).collect();
    let wanted: HashMap<&str, &Endpoint> = after.1.iter().map(|endpoint| (endpoint.id.as_ref(), *endpoint)).collect();
    for id in before.1.iter().map(|endpoint| &endpoint.id).filter(|id| !wanted.contains_key(id.as_ref())) {
        lines.add(format!("endpoint {id} removed"));
    }
    for after in after.1 {
        match known.get(after.id.as_ref()) {
            None => lines.add(format!("endpoint {} added", after.id)),
            Some(before) => endpoint(&mut lines, before, after),
        }
    }
    lines.finish()
}

/// Returns the changes of the server's part that do not take effect while the process serves, each with what they wait for.
pub fn needs_upgrade(running: &Server, wanted: &Server) -> Vec<String> {
    // Every key stands here or in `server`, by the compiler's word.
    let Server {
        host,
        port,
        tls,
        memory_bytes_max,
        threads,
        ledger,
        shared_ledger,
        ledger_wait,
        ledger_on_error,
        ledger_sync,
        metrics_listen,
        admin_listen,
        connections,
        admin_key: _,
        api_key: _,
        keys: _,
        keys_file: _,
        budget_reserve_tokens: _,
        prices: _,
        fallbacks: _,
        webhook: _,
        cost_header: _,
        share_ids: _,
        cors: _,
        body_bytes_max: _,
        strategy: _,
        retry: _,
        breaker: _,
        trusted_proxies: _,
        failed_keys_per_minute: _,
        endpoint_headers: _,
        forward_headers: _,
        stream_ping: _,
        timezone: _,
        queue: _,
        affinity: _,
        request_log,
        log_format: _,
        estimate_tokens: _,
    } = running;
    let mut lines = ChangeLines::default();
    let at = |key: &str| format!("server.{key}");
    lines.compare(&at("host"), plain, host, &wanted.host);
    lines.compare(&at("port"), plain, port, &wanted.port);
    // An upgrade hands the listening sockets over as they are.
    let mut waiting: Vec<String> = lines.0.drain(..).map(|line| format!("{line} (with a restart)")).collect();
    lines.compare(&at("threads"), plain, threads, &wanted.threads);
    lines.compare(&at("memoryBytesMax"), plain, memory_bytes_max, &wanted.memory_bytes_max);
    lines.compare(&at("metricsListen"), |at| optional(at.as_ref(), plain), metrics_listen, &wanted.metrics_listen);
    lines.compare(&at("adminListen"), |at| optional(at.as_ref(), plain), admin_listen, &wanted.admin_listen);
    lines.compare(&at("connections.h2IdleSeconds"), seconds, &connections.h2_idle, &wanted.connections.h2_idle);
    let place = |shared: &Option<SharedLedger>, file: &Path| match shared {
        Some(SharedLedger { address, .. }) => address.to_string(),
        None => path(&file),
    };
    let places = (place(shared_ledger, ledger), place(&wanted.shared_ledger, &wanted.ledger));
    lines.compare(&at("ledger"), plain, &places.0, &places.1);
    if shared_ledger != &wanted.shared_ledger && places.0 == places.1 {
        lines.add(at("redis changed"));
    }
    lines.compare(&at("ledgerWaitMs"), millis, ledger_wait, &wanted.ledger_wait);
    let log_path = |log: &Option<RequestLog>| log.as_ref().map(|log| log.path.clone());
    let log_paths = (log_path(request_log), log_path(&wanted.request_log));
    lines.compare(&at("requestLog.path"), |log| optional(log.as_ref(), path), &log_paths.0, &log_paths.1);
    lines.compare(&at("ledgerSync"), word, ledger_sync, &wanted.ledger_sync);
    lines.compare(&at("ledgerOnError"), word, ledger_on_error, &wanted.ledger_on_error);
    match (tls, &wanted.tls) {
        (None, Some(_)) => lines.add("server.tls switched on".into()),
        (Some(_), None) => lines.add("server.tls switched off".into()),
        _ => {}
    }
    waiting.extend(lines.finish().into_iter().map(|line| format!("{line} (with an upgrade or a restart)")));
    waiting
}

fn server(lines: &mut ChangeLines, before: &Server, after: &Server) {
    // Every key stands here or in `needs_upgrade`, by the compiler's word.
    let Server {
        api_key,
        admin_key,
        keys,
        keys_file,
        budget_reserve_tokens,
        prices,
        fallbacks,
        webhook,
        cost_header,
        share_ids,
        tls,
        cors,
        body_bytes_max,
        strategy,
        retry,
        breaker,
        connections,
        trusted_proxies,
        failed_keys_per_minute,
        endpoint_headers,
        forward_headers,
        stream_ping,
        timezone,
        queue,
        affinity,
        request_log,
        log_format,
        estimate_tokens,
        host: _,
        port: _,
        memory_bytes_max: _,
        threads: _,
        ledger: _,
        shared_ledger: _,
        ledger_wait: _,
        ledger_on_error: _,
        ledger_sync: _,
        metrics_listen: _,
        admin_listen: _,
    } = before;
    let at = |key: &str| format!("server.{key}");
    if *api_key != after.api_key {
        lines.add("server.apiKey changed".into());
    }
    if *admin_key != after.admin_key {
        lines.add("server.adminKey changed".into());
    }
    compare_keys(lines, keys, &after.keys);
    lines.compare(&at("keysFile"), path, &keys_file.path, &after.keys_file.path);
    let reserve = (budget_reserve_tokens, &after.budget_reserve_tokens);
    lines.compare(&at("budgetReserveTokens"), plain, reserve.0, reserve.1);
    if *prices != after.prices {
        lines.add(at("prices changed"));
    }
    lines.compare(&at("costHeader"), plain, cost_header, &after.cost_header);
    // Its URL may be a secret.
    if *webhook != after.webhook {
        lines.add(at("webhook changed"));
    }
    let shown = |all: &BTreeMap<String, Vec<String>>| {
        all.iter().map(|(model, others)| format!("{model} → {}", others.join(", "))).collect::<Vec<_>>()
    };
    lines.compare_lists(&at("fallbacks"), &shown(fallbacks), &shown(&after.fallbacks));
    lines.compare(&at("shareIds"), plain, share_ids, &after.share_ids);
    if let (Some(before), Some(after)) = (tls, &after.tls) {
        let ServerTls { cert_file, key_file } = before;
        lines.compare(&at("tls.certFile"), path, cert_file, &after.cert_file);
        lines.compare(&at("tls.keyFile"), path, key_file, &after.key_file);
    }
    lines.compare(&at("cors.origins"), |list| spelling::list(list), &cors.origins, &after.cors.origins);
    lines.compare(&at("bodyBytesMax"), plain, body_bytes_max, &after.body_bytes_max);
    lines.compare(&at("strategy"), word, strategy, &after.strategy);
    retries(lines, retry, &after.retry);
    let Breaker { failures, cool_down } = breaker;
    lines.compare(&at("breaker.failures"), plain, failures, &after.breaker.failures);
    lines.compare(&at("breaker.coolDownSeconds"), seconds, cool_down, &after.breaker.cool_down);
    connection_limits(lines, connections, &after.connections);
    lines.compare(&at("trustedProxies"), |list| spelling::list(list), trusted_proxies, &after.trusted_proxies);
    lines.compare(&at("failedKeysPerMinute"), plain, failed_keys_per_minute, &after.failed_keys_per_minute);
    lines.compare(&at("endpointHeaders"), plain, endpoint_headers, &after.endpoint_headers);
    lines.compare(&at("forwardHeaders"), |list| spelling::list(list), forward_headers, &after.forward_headers);
    let ping = |ping: &Option<Duration>| ping.as_ref().map_or_else(|| "0".to_owned(), seconds);
    lines.compare(&at("streamPingSeconds"), ping, stream_ping, &after.stream_ping);
    lines.compare(&at("queue"), |queue| optional(queue.as_ref(), queue_words), queue, &after.queue);
    affinities(lines, affinity, &after.affinity);
    if let (Some(before), Some(after)) = (request_log, &after.request_log) {
        let days = |age: &Duration| (age.as_secs() / (24 * 60 * 60)).to_string();
        lines.compare(&at("requestLog.days"), days, &before.age, &after.age);
        lines.compare(&at("requestLog.bytesMax"), plain, &before.bytes_max, &after.bytes_max);
    }
    lines.compare(&at("logFormat"), word, log_format, &after.log_format);
    lines.compare(&at("estimateTokens"), plain, estimate_tokens, &after.estimate_tokens);
    if *timezone != after.timezone {
        lines.add("server.timezone changed".into());
    }
}

fn queue_words(Queue { wait_max, requests_max, requests_per_key_max }: &Queue) -> String {
    let wait_max = millis(wait_max);
    format!("maxWaitMs {wait_max}, maxRequests {requests_max}, maxRequestsPerKey {requests_per_key_max}")
}

fn retries(lines: &mut ChangeLines, before: &Retry, after: &Retry) {
    let Retry { attempts, statuses, tokens_per_second_min, show_endpoint_key_errors, budget } = before;
    let at = |key: &str| format!("server.retry.{key}");
    lines.compare(&at("attempts"), plain, attempts, &after.attempts);
    lines.compare(&at("statuses"), plain, statuses, &after.statuses);
    let rate = |rate: &Option<u32>| rate.unwrap_or_default().to_string();
    lines.compare(&at("minTokensPerSecond"), rate, tokens_per_second_min, &after.tokens_per_second_min);
    lines.compare(&at("showEndpointKeyErrors"), plain, show_endpoint_key_errors, &after.show_endpoint_key_errors);
    lines.compare(&at("budgetMs"), millis, budget, &after.budget);
}

fn affinities(lines: &mut ChangeLines, before: &AffinityRules, after: &AffinityRules) {
    let AffinityRules { sessions, prefix, drop_sealed, id_time } = before;
    let at = |key: &str| format!("server.affinity.{key}");
    lines.compare(&at("sessions"), plain, sessions, &after.sessions);
    lines.compare(&at("prefix"), plain, prefix, &after.prefix);
    lines.compare(&at("dropSealed"), plain, drop_sealed, &after.drop_sealed);
    let days = |time: &Duration| (time.as_secs() / 86_400).to_string();
    lines.compare(&at("idDays"), days, id_time, &after.id_time);
}

/// All but `h2_idle`, which waits for an upgrade.
fn connection_limits(lines: &mut ChangeLines, before: &ConnectionLimits, after: &ConnectionLimits) {
    let ConnectionLimits { max, strangers_per_address, header_bytes_max, header, first_byte, keep_alive, h2_idle: _ } =
        before;
    let at = |key: &str| format!("server.connections.{key}");
    lines.compare(&at("max"), plain, max, &after.max);
    lines.compare(&at("strangersPerAddress"), plain, strangers_per_address, &after.strangers_per_address);
    lines.compare(&at("headerBytesMax"), plain, header_bytes_max, &after.header_bytes_max);
    lines.compare(&at("headerSeconds"), seconds, header, &after.header);
    lines.compare(&at("firstByteSeconds"), seconds, first_byte, &after.first_byte);
    lines.compare(&at("keepAliveSeconds"), seconds, keep_alive, &after.keep_alive);
}

/// By name: what a key opens is its own matter, and what opens it nobody's.
fn compare_keys(lines: &mut ChangeLines, before: &[ClientKey], after: &[ClientKey]) {
    let named = |keys: &[ClientKey]| -> BTreeMap<Arc<str>, ClientKey> {
        keys.iter().map(|key| (Arc::clone(&key.name), key.clone())).collect()
    };
    let (before, after) = (named(before), named(after));
    for (name, key) in &before {
        match after.get(name) {
            None => lines.add(format!("server.keys: {name} removed")),
            Some(now) if now != key => lines.add(format!("server.keys: {name} changed")),
            Some(_) => {}
        }
    }
    for name in after.keys().filter(|name| !before.contains_key(*name)) {
        lines.add(format!("server.keys: {name} added"));
    }
}

/// The keys of an endpoint, of which no more than how many there are is shown.
fn compare_lanes(lines: &mut ChangeLines, id: &str, before: &EndpointKeys, after: &EndpointKeys) {
    if before == after {
        return;
    }
    if !before.is_pool || !after.is_pool {
        let key = |keys: &EndpointKeys| if keys.is_pool { "apiKeys" } else { "apiKey" };
        return match (key(before), key(after)) {
            (was, now) if was == now => lines.add(format!("endpoint {id}: {now} changed")),
            (was, now) => lines.add(format!("endpoint {id}: {now} in place of {was}")),
        };
    }
    let by_id = |keys: &EndpointKeys| -> HashMap<Arc<str>, Lane> {
        keys.lanes.iter().map(|lane| (Arc::clone(&lane.id), lane.clone())).collect()
    };
    let (was, now) = (by_id(before), by_id(after));
    let count = |what: &str, number: usize| (number > 0).then(|| format!("{number} {what}"));
    let changed = was.iter().filter(|(id, lane)| now.get(*id).is_some_and(|after| after != *lane)).count();
    let parts = [
        count("added", now.keys().filter(|id| !was.contains_key(*id)).count()),
        count("removed", was.keys().filter(|id| !now.contains_key(*id)).count()),
        count("changed", changed),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    let what = if parts.is_empty() { "in another order".to_owned() } else { parts.join(", ") };
    lines.add(format!("endpoint {id}: apiKeys: {what}"));
}

fn endpoint(lines: &mut ChangeLines, before: &Endpoint, after: &Endpoint) {
    let Endpoint {
        id,
        name,
        base_url,
        keys,
        auth_header,
        calls,
        formats,
        web_sockets,
        web_socket_permits,
        limits,
        model_limits,
        prices,
        price_provider,
        timezone,
        organization,
        enabled,
        switched_off,
        models,
        model_mapping,
        weight,
        priority,
        headers,
        timeouts,
        stream_usage,
        proxy,
        http2,
        tls,
        discovery,
        errors,
        version_path,
        query,
        learns_limits,
    } = before;
    let at = |key: &str| format!("endpoint {id}: {key}");
    if *enabled != after.enabled {
        lines.add(format!("endpoint {id} {}", if after.enabled { "enabled" } else { "disabled" }));
    } else if *switched_off != after.switched_off && !after.enabled {
        lines.add(format!("endpoint {id} disabled for another time"));
    }
    compare_lanes(lines, id, keys, &after.keys);
    lines.compare(&at("learnLimits"), plain, learns_limits, &after.learns_limits);
    // Their values may be keys as well.
    if *headers != after.headers {
        lines.add(at("headers changed"));
    }
    if *query != after.query {
        lines.add(at("query changed"));
    }
    lines.compare(&at("versionPath"), word, version_path, &after.version_path);
    lines.compare_text(&at("name"), name, &after.name);
    lines.compare_text(&at("organization"), organization, &after.organization);
    lines.compare_text(&at("baseUrl"), &base_url.to_string(), &after.base_url.to_string());
    for (kind, (before, after)) in limits.zip(after.limits).each() {
        lines.compare(&at(kind.key()), plain, &before.as_number(), &after.as_number());
    }
    compare_model_limits(lines, id, model_limits, &after.model_limits);
    if *prices != after.prices {
        lines.add(at("prices changed"));
    }
    lines.compare(&at("priceProvider"), |id| optional(id.as_ref(), plain), price_provider, &after.price_provider);
    lines.compare_lists(&at("models"), models, &after.models);
    lines.compare_lists(&at("modelMapping"), &pairs(model_mapping), &pairs(&after.model_mapping));
    lines.compare(&at("authHeader"), plain, auth_header, &after.auth_header);
    let kinds = |calls: &CallSet| match *calls {
        CallSet::ALL => "all".to_owned(),
        calls => calls.kinds().map(CallKind::name).collect::<Vec<_>>().join(", "),
    };
    lines.compare(&at("calls"), kinds, calls, &after.calls);
    lines.compare(&at("webSockets"), kinds, web_sockets, &after.web_sockets);
    lines.compare(&at("webSocketPermits"), word, web_socket_permits, &after.web_socket_permits);
    lines.compare_lists(&at("formats"), &doors(formats), &doors(&after.formats));
    lines.compare(&at("weight"), plain, weight, &after.weight);
    lines.compare(&at("priority"), plain, priority, &after.priority);
    let Timeouts { connect, first_byte_stream, first_byte, thinking, idle } = timeouts;
    lines.compare(&at("timeouts.connectMs"), millis, connect, &after.timeouts.connect);
    lines.compare(&at("timeouts.firstByteMs of streams"), millis, first_byte_stream, &after.timeouts.first_byte_stream);
    lines.compare(&at("timeouts.firstByteMs"), millis, first_byte, &after.timeouts.first_byte);
    lines.compare(&at("timeouts.thinkingMs"), millis, thinking, &after.timeouts.thinking);
    lines.compare(&at("timeouts.idleMs"), millis, idle, &after.timeouts.idle);
    lines.compare(&at("streamUsage"), word, stream_usage, &after.stream_usage);
    proxies(lines, &at("proxy"), proxy.as_ref(), after.proxy.as_ref());
    lines.compare(&at("http2"), |http2| optional(http2.as_ref(), plain), http2, &after.http2);
    let EndpointTls { ca_file, insecure } = tls;
    lines.compare(&at("tls.caFile"), |file| optional(file.as_ref(), path), ca_file, &after.tls.ca_file);
    lines.compare(&at("tls.insecure"), plain, insecure, &after.tls.insecure);
    let minutes =
        |interval: &Option<Duration>| optional(interval.as_ref(), |interval| (interval.as_secs() / 60).to_string());
    lines.compare(&at("discoveryMinutes"), minutes, discovery, &after.discovery);
    if *errors != after.errors {
        lines.add(at("errors changed"));
    }
    if *timezone != after.timezone {
        lines.add(at("timezone changed"));
    }
}

fn compare_model_limits(
    lines: &mut ChangeLines,
    id: &str,
    before: &BTreeMap<String, ModelLimits>,
    after: &BTreeMap<String, ModelLimits>,
) {
    let names = |limits: &BTreeMap<String, ModelLimits>| limits.keys().cloned().collect::<Vec<_>>();
    lines.compare_lists(&format!("endpoint {id}: modelLimits"), &names(before), &names(after));
    for (model, before) in before {
        let Some(after) = after.get(model) else { continue };
        let at = |key: &str| format!("endpoint {id}: modelLimits {model} {key}");
        for (kind, (before, after)) in before.limits.zip(after.limits).each() {
            lines.compare(&at(kind.key()), plain, &before.as_number(), &after.as_number());
        }
        lines.compare(&at("each"), plain, &before.each, &after.each);
    }
}

fn proxies(lines: &mut ChangeLines, what: &str, before: Option<&Proxy>, after: Option<&Proxy>) {
    if before == after {
        return;
    }
    let shown = |proxy: Option<&Proxy>| proxy.map_or_else(|| "none".to_owned(), ToString::to_string);
    let (before, after) = (shown(before), shown(after));
    // Only the password may be another.
    lines.add(if before == after { format!("{what} changed") } else { format!("{what} {before} → {after}") });
}

fn doors(formats: &[Door]) -> Vec<String> {
    formats
        .iter()
        .map(|Door { calls, base_url, auth_header }| format!("{calls} at {base_url} by {auth_header}"))
        .collect()
}

fn pairs(mapping: &BTreeMap<String, String>) -> Vec<String> {
    mapping.iter().map(|(from, to)| format!("{from} → {to}")).collect()
}

#[derive(Default)]
struct ChangeLines(Vec<String>);

impl ChangeLines {
    fn add(&mut self, line: String) {
        self.0.push(line);
    }

    fn compare<T: PartialEq>(&mut self, what: &str, spell: impl Fn(&T) -> String, before: &T, after: &T) {
        if before != after {
            self.compare_text(what, &spell(before), &spell(after));
        }
    }

    fn compare_text(&mut self, what: &str, before: &str, after: &str) {
        if before == after {
            return;
        }
        if before.chars().count() + after.chars().count() > VALUE_CHARS_MAX {
            self.add(format!("{what} changed"));
        } else {
            self.add(format!("{what} {before} → {after}"));
        }
    }

    fn compare_lists(&mut self, what: &str, before: &[String], after: &[String]) {
        if before == after {
            return;
        }
        let differences = |some: &[String], others: &[String], sign: char| {
            some.iter().filter(|name| !others.contains(name)).map(|name| format!("{sign}{name}")).collect::<Vec<_>>()
        };
        let mut all = differences(before, after, '-');
        all.extend(differences(after, before, '+'));
        let text = all.join(" ");
        if all.is_empty() {
            self.add(format!("{what} in another order"));
        } else if text.chars().count() > VALUE_CHARS_MAX {
            self.add(format!("{what} changed in {} places", all.len()));
        } else {
            self.add(format!("{what} {text}"));
        }
    }

    fn finish(mut self) -> Vec<String> {
        if self.0.len() > LINES_MAX {
            let more = self.0.len() - LINES_MAX;
            self.0.truncate(LINES_MAX);
            self.0.push(format!("and {more} more"));
        }
        self.0
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::needless_pass_by_value, reason = "a json! stands in the call")]

    use super::super::{Config, Environment, Format, check_str};
    use super::*;
    use serde_json::{Value, json};

    fn config(server: Value, apis: Value) -> Config {
        let mut whole = json!({ "apiKey": "sk-client-0000000000" });
        whole.as_object_mut().unwrap().extend(server.as_object().unwrap().clone());
        let text = json!({ "server": whole, "apis": apis }).to_string();
        let environment = Environment::fixed([("", ""); 0]);
        check_str(&text, Format::Json, &environment, std::path::Path::new("/tmp")).unwrap().config
    }

    fn between(before: &Config, after: &Config) -> Vec<String> {
        let endpoints = |config: &'_ Config| config.endpoints.clone();
        let (old, new) = (endpoints(before), endpoints(after));
        changes((&before.server, &old.iter().collect::<Vec<_>>()), (&after.server, &new.iter().collect::<Vec<_>>()))
    }

    fn api(id: &str, more: Value) -> Value {
        let mut api =
            json!({ "id": id, "baseUrl": "https://a.example", "apiKey": "sk-secret-1111111111", "models": ["m", "n"] });
        api.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        api
    }

    #[test]
    fn each_change_is_told_in_words_and_no_key_is() {
        let before =
            config(json!({}), json!([api("a", json!({ "rpm": 60 })), api("b", json!({})), api("c", json!({}))]));
        assert!(between(&before, &before).is_empty());
        let after = config(
            json!({ "apiKey": "sk-client-2222222222", "strategy": "fastest", "port": 4000, "queue": { "maxWaitMs": 5 } }),
            json!([
                api(
                    "a",
                    json!({ "rpm": 120, "apiKey": "sk-secret-3333333333", "headers": { "x-key": "sk-secret-4444444444" },
                    "models": ["n", "o*"], "modelMapping": { "gpt": "m" }, "enabled": false })
                ),
                api("d", json!({})),
                api("c", json!({ "baseUrl": "https://b.example/v1", "priority": 2, "timeouts": { "idleMs": 5 } })),
            ]),
        );
        let lines = between(&before, &after);
        for line in [
            "server.apiKey changed",
            "server.strategy random → fastest",
            "server.queue not set → maxWaitMs 5, maxRequests 1000, maxRequestsPerKey 250",
            "endpoint c: timeouts.idleMs 120000 → 5",
            "endpoint b removed",
            "endpoint a disabled",
            "endpoint a: apiKey changed",
            "endpoint a: headers changed",
            "endpoint a: rpm 60 → 120",
            "endpoint a: models -m +o*",
            "endpoint a: modelMapping +gpt → m",
            "endpoint d added",
            "endpoint c: baseUrl https://a.example → https://b.example/v1",
            "endpoint c: priority 0 → 2",
        ] {
            assert!(lines.iter().any(|told| told == line), "{line} is not in {lines:#?}");
        }
        assert!(!lines.join("\n").contains("sk-"), "{lines:#?}");
        assert_eq!(needs_upgrade(&before.server, &after.server), ["server.port 3001 → 4000 (with a restart)"]);
    }

    #[test]
    fn values_are_spelt_as_in_the_file() {
        let before = config(json!({}), json!([api("a", json!({}))]));
        let after = config(
            json!({
                "trustedProxies": ["10.0.0.0/8", "::1"], "forwardHeaders": ["X-Team-*"], "streamPingSeconds": 0,
                "cors": { "origins": ["https://chat.example.com"] }, "logFormat": "json", "estimateTokens": false,
                "affinity": { "prefix": true, "idDays": 7 },
                "retry": { "statuses": [404, "5xx"], "minTokensPerSecond": 3, "budgetMs": 7 },
                "breaker": { "coolDownSeconds": 30 }, "connections": { "headerSeconds": 3, "max": 100 },
                "metricsListen": "127.0.0.1:9464", "ledgerSync": "full",
            }),
            json!([api(
                "a",
                json!({ "http2": true, "streamUsage": "never", "organization": "o", "tls": { "insecure": true } })
            )]),
        );
        let lines = between(&before, &after);
        for line in [
            "server.trustedProxies [] → [10.0.0.0/8, ::1/128]",
            "server.forwardHeaders [] → [x-team-*]",
            "server.streamPingSeconds 30 → 0",
            "server.cors.origins [*] → [https://chat.example.com]",
            "server.affinity.prefix false → true",
            "server.affinity.idDays 30 → 7",
            "server.logFormat text → json",
            "server.estimateTokens true → false",
            "server.retry.statuses [401, 402, 403, 408, 425, 429, 5xx] → [404, 5xx]",
            "server.retry.minTokensPerSecond 0 → 3",
            "server.retry.budgetMs 120000 → 7",
            "server.breaker.coolDownSeconds 600 → 30",
            "server.connections.headerSeconds 30 → 3",
            "endpoint a: http2 not set → true",
            "endpoint a: streamUsage auto → never",
            "endpoint a: organization a → o",
            "endpoint a: tls.insecure false → true",
        ] {
            assert!(lines.iter().any(|told| told == line), "{line} is not in {lines:#?}");
        }
        let waiting = needs_upgrade(&before.server, &after.server);
        let with = "(with an upgrade or a restart)";
        let told = [
            format!("server.metricsListen not set → 127.0.0.1:9464 {with}"),
            format!("server.ledgerSync normal → full {with}"),
        ];
        assert_eq!(waiting, told);
        let all = lines.iter().chain(&waiting);
        for line in all {
            assert!(!["Some", "None", "{", "\""].iter().any(|rust| line.contains(rust)), "{line}");
        }
    }

    #[test]
    fn what_needs_an_upgrade_is_named() {
        let before = config(json!({}), json!([api("a", json!({}))]));
        let after = config(
            json!({ "host": "127.0.0.1", "threads": 77, "ledger": "/tmp/other.db", "ledgerSync": "full", "ledgerOnError": "allow" }),
            json!([api("a", json!({}))]),
        );
        let lines = needs_upgrade(&before.server, &after.server).join("\n");
        for key in ["host", "threads", "ledger ", "ledgerSync", "ledgerOnError"] {
            assert!(lines.contains(&format!("server.{key}")), "{key}: {lines}");
        }
        assert!(between(&before, &after).is_empty());
    }

    #[test]
    fn many_changes_are_bounded() {
        let apis: Vec<Value> = (0..200).map(|n| api(&format!("e{n}"), json!({}))).collect();
        let (one, many) = (config(json!({}), json!([apis[0]])), config(json!({}), json!(apis)));
        let lines = between(&one, &many);
        assert_eq!((lines.len(), lines.last().unwrap().as_str()), (LINES_MAX + 1, "and 149 more"));
    }
}
