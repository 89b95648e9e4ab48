//! What passes between a client and an endpoint besides the body: of a request's headers those that an API call needs, of
//! an answer's all but those that belong to the endpoint's own transport and site. A client's key passes in neither a
//! header nor the query.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, HeaderValue, header};
use memchr::memmem;
use percent_encoding::percent_decode;

use super::auth::{KEY_PARAMETER, SUBPROTOCOL_KEY};
use crate::config::{HeaderPattern, Secret, Server};

/// Request headers that are forwarded. Whatever else a client, its browser or a proxy before us sends belongs to the way to
/// us; `server.forwardHeaders` adds to these.
fn is_api_header(name: &str) -> bool {
    /// Families, by the beginning of their names.
    const PREFIXES: [&str; 10] = [
        "x-stainless-",
        "anthropic-",
        "x-openrouter-",
        "x-dashscope-",
        // Agents name their session, which prompt caches go by.
        "x-session-",
        "x-codex-",
        "x-claude-code-",
        // Tracing.
        "x-b3-",
        "x-datadog-",
        // Conditional requests for files.
        "if-",
    ];
    matches!(
        name,
        "content-type"
            | "accept"
            | "user-agent"
            | "idempotency-key"
            | "x-idempotency-key"
            | "openai-beta"
            | "prefer"
            | "range"
            | "http-referer"
            | "x-title"
            | "x-app"
            | "x-wait-for-model"
            | "x-use-cache"
            | "originator"
            | "version"
            | "session_id"
            | "session-id"
            | "thread-id"
            | "conversation_id"
            | "conversation-id"
            | "x-goog-api-client"
            | "x-client-request-id"
            | "x-ms-client-request-id"
            | "x-correlation-id"
            | "traceparent"
            | "tracestate"
            | "baggage"
            | "sentry-trace"
            | "b3"
            | "uber-trace-id"
            | "x-amzn-trace-id"
            | "x-cloud-trace-context"
    ) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Request headers that are never forwarded, whatever `server.forwardHeaders` says: hop-by-hop headers (RFC 9110, 7.6.1),
/// framing, and credentials for the gateway.
fn is_ours_alone(name: &str) -> bool {
    matches!(
        name,
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authorization"
            | "proxy-authenticate"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "http2-settings"
            | "expect"
            | "host"
            | "content-length"
            | "content-encoding"
            | "accept-encoding"
            | "authorization"
            | "api-key"
            | "x-api-key"
            | "x-goog-api-key"
            | "x-request-id"
    )
}

/// Returns the part of a request's headers that is forwarded to any endpoint.
///
/// `own` is the key of the request itself, if that is a single caller's.
pub fn forwarded(headers: &HeaderMap, server: &Server, own: Option<&Secret>, switches_protocol: bool) -> HeaderMap {
    let named = named_in_connection(headers);
    let added = |name: &str| server.forward_headers.iter().any(|pattern: &HeaderPattern| pattern.matches(name));
    let goes_on = |name: &HeaderName| {
        let text = name.as_str();
        if switches_protocol && is_of_handshake(text) {
            return true;
        }
        (is_api_header(text) || added(text)) && !is_ours_alone(text) && !named.contains(name)
    };
    // Room for those that are put in.
    let mut forwarded = HeaderMap::with_capacity(headers.len() + 6);
    for (name, value) in headers.iter().filter(|(name, _)| goes_on(name)) {
        if *name == header::SEC_WEBSOCKET_PROTOCOL {
            if let Some(value) = without_key_subprotocol(value) {
                forwarded.append(name.clone(), value);
            }
        } else if !quotes_any_key(value.as_bytes(), [server.api_key.as_ref(), own]) {
            forwarded.append(name.clone(), value.clone());
        }
    }
    forwarded
}

/// True for the headers of a WebSocket's handshake (RFC 6455, 4.1), which the endpoint answers.
fn is_of_handshake(name: &str) -> bool {
    // Without its extensions nothing is compressed, and the tokens of its responses can be counted.
    matches!(name, "connection" | "upgrade") || name.starts_with("sec-websocket-") && name != "sec-websocket-extensions"
}

/// The first of the offered subprotocols that carries no key.
pub fn first_subprotocol(offered: &HeaderValue) -> Option<HeaderValue> {
    let kept = without_key_subprotocol(offered)?;
    HeaderValue::from_str(kept.to_str().ok()?.split(',').next()?.trim()).ok()
}

/// The offered subprotocols without the one that carries a key; `None` if there is no other.
fn without_key_subprotocol(offered: &HeaderValue) -> Option<HeaderValue> {
    let Ok(text) = offered.to_str() else { return None };
    let kept: Vec<&str> =
        text.split(',').map(str::trim).filter(|one| !one.is_empty() && !one.starts_with(SUBPROTOCOL_KEY)).collect();
    if kept.is_empty() { None } else { HeaderValue::from_str(&kept.join(", ")).ok() }
}

/// Shorter keys are looked for as the whole value only: they would be found in ordinary words.
const QUOTED_BYTES_MIN: usize = 8;

/// The keys that a client may have put into a value: the server's one key, and its own.
type ClientKeys<'a> = [Option<&'a Secret>; 2];

/// True if a value quotes one of these keys.
fn quotes_any_key(value: &[u8], keys: ClientKeys<'_>) -> bool {
    keys.into_iter().flatten().any(|key| quotes_key(value, key))
}

/// True if a value quotes a client's key.
fn quotes_key(value: &[u8], key: &Secret) -> bool {
    let key = key.expose().as_bytes();
    if value.len() < key.len() {
        return false;
    }
    if key.len() < QUOTED_BYTES_MIN { value == key } else { memmem::find(value, key).is_some() }
}

/// Returns the query without the parameters that carry a client's key. `None` if nothing is left of it.
pub fn forwarded_query<'a>(query: &'a str, keys: [Option<&Secret>; 2]) -> Option<Cow<'a, str>> {
    let stays = |pair: &str| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        name == KEY_PARAMETER || quotes_any_key(&Cow::from(percent_decode(value.as_bytes())), keys)
    };
    if !query.split('&').any(stays) {
        return (!query.is_empty()).then_some(Cow::Borrowed(query));
    }
    let rest: Vec<&str> = query.split('&').filter(|pair| !stays(pair)).collect();
    (!rest.is_empty()).then(|| Cow::Owned(rest.join("&")))
}

/// Returns a query without the version of the API that Azure's SDKs ask for. `None` if nothing is left of it.
pub fn without_version(query: Cow<'_, str>) -> Option<Cow<'_, str>> {
    let is_version = |pair: &str| pair.split('=').next() == Some("api-version");
    if !query.split('&').any(is_version) {
        return Some(query);
    }
    let rest: Vec<&str> = query.split('&').filter(|pair| !is_version(pair)).collect();
    (!rest.is_empty()).then(|| rest.join("&").into())
}

/// The header names that a `Connection` header makes hop-by-hop.
pub fn named_in_connection(headers: &HeaderMap) -> Vec<HeaderName> {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect()
}

/// Response headers that an endpoint may not hand to our clients: its cookies, what it says of its own transport, site and
/// organisation, and what it says of other origins, which is ours to say. What SDKs read is not among them.
pub fn is_kept_from_client(name: &HeaderName) -> bool {
    const PREFIXES: [&str; 11] = [
        "access-control-",
        "content-security-policy",
        "cross-origin-",
        "public-key-pins",
        "cf-",
        "x-amz-cf-",
        "x-envoy-",
        "x-vercel-",
        "x-fastly-",
        "x-akamai-",
        "x-kong-",
    ];
    let name = name.as_str();
    matches!(
        name,
        "set-cookie"
            | "set-cookie2"
            | "alt-svc"
            | "strict-transport-security"
            | "expect-ct"
            | "report-to"
            | "reporting-endpoints"
            | "nel"
            | "permissions-policy"
            | "feature-policy"
            | "document-policy"
            | "referrer-policy"
            | "origin-trial"
            | "origin-agent-cluster"
            | "clear-site-data"
            | "refresh"
            | "service-worker-allowed"
            | "sourcemap"
            | "x-frame-options"
            | "x-xss-protection"
            | "x-robots-tag"
            | "www-authenticate"
            | "server"
            | "server-timing"
            | "timing-allow-origin"
            | "via"
            | "x-powered-by"
            | "x-served-by"
            | "x-cache"
            | "x-cache-hits"
            | "x-timer"
            | "x-azure-ref"
            | "openai-organization"
            | "openai-project"
            | "anthropic-organization-id"
    ) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Returns the response headers that belong to the endpoint's own connection (RFC 9110, 7.6.1). Those that frame the body
/// are Pingora's to replace.
pub fn hop_by_hop(headers: &HeaderMap) -> impl Fn(&HeaderName) -> bool + use<> {
    const OTHERS: [&str; 6] = ["keep-alive", "proxy-connection", "proxy-authenticate", "te", "trailer", "upgrade"];
    const FRAMING: [HeaderName; 3] = [header::CONNECTION, header::CONTENT_LENGTH, header::TRANSFER_ENCODING];
    let named = named_in_connection(headers);
    move |name| OTHERS.contains(&name.as_str()) || named.contains(name) && !FRAMING.contains(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::server;

    const KEY: &str = "sk-client-0123456789";

    fn forwarded_names(pairs: &[(&'static str, &str)], settings: &str, switches_protocol: bool) -> Vec<String> {
        let mut server = server(settings);
        server.api_key = Some(Secret::new(KEY));
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        let forwarded = forwarded(&headers, &server, None, switches_protocol);
        forwarded.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect()
    }

    #[test]
    fn api_headers_go_on_and_the_way_to_us_stays() {
        for name in [
            "content-type",
            "accept",
            "user-agent",
            "idempotency-key",
            "openai-beta",
            "anthropic-version",
            "anthropic-beta",
            "x-stainless-lang",
            "traceparent",
            "http-referer",
            "x-title",
            "session_id",
            "if-none-match",
            "range",
        ] {
            assert_eq!(forwarded_names(&[(name, "v")], "{}", false), [format!("{name}: v")]);
        }
        for name in [
            "origin",
            "referer",
            "sec-fetch-mode",
            "sec-ch-ua",
            "sec-websocket-key",
            "cookie",
            "openai-organization",
            "openai-project",
            "cf-connecting-ip",
            "cf-ray",
            "cdn-loop",
            "x-forwarded-for",
            "x-forwarded-proto",
            "x-real-ip",
            "true-client-ip",
            "forwarded",
            "via",
            "dnt",
            "x-unheard-of",
        ] {
            assert!(forwarded_names(&[(name, "v")], "{}", false).is_empty(), "{name}");
        }
    }

    #[test]
    fn the_config_adds_headers_but_never_credentials_or_framing() {
        let all = r#"{"forwardHeaders": ["X-Team*", "*"]}"#;
        assert_eq!(forwarded_names(&[("x-team-id", "v"), ("origin", "o")], all, false), ["x-team-id: v", "origin: o"]);
        for name in ["authorization", "x-api-key", "x-goog-api-key", "host", "te", "content-length", "x-request-id"] {
            assert!(forwarded_names(&[(name, "v")], all, false).is_empty(), "{name}");
        }
        assert!(forwarded_names(&[("connection", "x-team-id"), ("x-team-id", "v")], all, false).is_empty());
    }

    #[test]
    fn no_header_that_quotes_the_key_goes_on() {
        for value in [KEY.to_owned(), format!("Bearer {KEY}"), format!("a={KEY};b")] {
            assert!(forwarded_names(&[("x-title", &value)], "{}", false).is_empty(), "{value}");
        }
        assert_eq!(forwarded_names(&[("x-title", &KEY[1..])], "{}", false).len(), 1);
    }

    #[test]
    fn a_handshake_goes_on_without_the_key_in_its_subprotocol() {
        let handshake =
            [("connection", "Upgrade"), ("upgrade", "websocket"), ("sec-websocket-key", "k"), ("origin", "o")];
        let offered = format!("realtime, {SUBPROTOCOL_KEY}{KEY}, openai-beta.realtime-v1");
        let names = forwarded_names(&[&handshake[..], &[("sec-websocket-protocol", &offered)]].concat(), "{}", true);
        assert_eq!(
            names,
            [
                "connection: Upgrade",
                "upgrade: websocket",
                "sec-websocket-key: k",
                "sec-websocket-protocol: realtime, openai-beta.realtime-v1"
            ]
        );
        let key_only = format!("{SUBPROTOCOL_KEY}{KEY}");
        assert!(forwarded_names(&[("sec-websocket-protocol", &key_only)], "{}", true).is_empty());
    }

    #[test]
    fn a_query_goes_on_without_the_key() {
        let key = Secret::new(KEY);
        for (query, forwarded) in [
            ("beta=true&after=x", Some("beta=true&after=x")),
            ("", None),
            ("key=anything", None),
            ("a=1&key=x&b=2", Some("a=1&b=2")),
            (&format!("token=x{KEY}&a"), Some("a")),
            (&format!("token={}&a=1", KEY.replace('-', "%2D")), Some("a=1")),
        ] {
            assert_eq!(forwarded_query(query, [None, Some(&key)]).as_deref(), forwarded, "{query}");
        }
    }

    #[test]
    fn an_answer_loses_what_belongs_to_its_site() {
        for name in
            ["set-cookie", "strict-transport-security", "nel", "cf-ray", "openai-organization", "clear-site-data"]
        {
            assert!(is_kept_from_client(&HeaderName::from_static(name)), "{name}");
        }
        for name in
            ["content-type", "retry-after", "x-should-retry", "openai-processing-ms", "request-id", "x-request-id"]
        {
            assert!(!is_kept_from_client(&HeaderName::from_static(name)), "{name}");
        }
    }

    #[test]
    fn headers_named_in_connection_are_hop_by_hop() {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONNECTION, HeaderValue::from_static("close, X-Private, content-length"));
        assert_eq!(named_in_connection(&headers), ["close", "x-private", "content-length"]);
        let is_hop_by_hop = hop_by_hop(&headers);
        for (name, expected) in
            [("x-private", true), ("keep-alive", true), ("x-public", false), ("content-length", false)]
        {
            assert_eq!(is_hop_by_hop(&HeaderName::from_static(name)), expected, "{name}");
        }
    }
}
