//! Key → caller: who may call, and how those who guess are slowed.

use std::net::IpAddr;
use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use pingora_limits::rate::Rate;

use crate::config;
use crate::fault::Fault;

/// Checks the key of every request.
pub struct Auth {
    /// Wrong keys by address. An estimate that can only err upwards, and whose memory does not grow with the number of
    /// addresses: right for this, wrong for limits that must be exact.
    failed: Rate,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Auth")
    }
}

impl Default for Auth {
    fn default() -> Self {
        Self { failed: Rate::new(Duration::from_mins(1)) }
    }
}

impl Auth {
    /// Lets a request with the right key pass, at once and whatever went before. Wrong ones are refused, and counted
    /// against the address that they come from.
    pub fn check(&self, server: &config::Server, headers: &HeaderMap, address: Option<IpAddr>) -> Result<(), Fault> {
        let given = key_given(headers);
        if given.is_some_and(|key| server.api_key.matches(key)) {
            return Ok(());
        }
        let limit = isize::try_from(server.failed_keys_per_minute).unwrap_or(isize::MAX);
        if limit > 0 && self.failed.observe(&address, 1) > limit {
            return Err(Fault::KeysFailedTooOften);
        }
        Err(if given.is_some() { Fault::KeyWrong } else { Fault::KeyMissing })
    }
}

/// The key a request carries: `Authorization: Bearer KEY` or the bare key, else the headers that other SDKs use.
fn key_given(headers: &HeaderMap) -> Option<&[u8]> {
    let authorization = headers.get(http::header::AUTHORIZATION).map(|value| value.as_bytes().trim_ascii());
    let other = || ["x-api-key", "api-key"].iter().find_map(|name| headers.get(*name)).map(HeaderValue::as_bytes);
    let value = authorization.or_else(other)?;
    let key = match value.split_at_checked(7) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => key.trim_ascii(),
        _ => value,
    };
    (!key.is_empty() && !key.eq_ignore_ascii_case(b"bearer")).then_some(key)
}

/// The client's address: the peer's, or, where the peer is a trusted proxy, the last hop of `X-Forwarded-For` that is
/// not one.
pub fn client_address(server: &config::Server, headers: &HeaderMap, peer: Option<IpAddr>) -> Option<IpAddr> {
    let trusted = |address: &IpAddr| server.trusted_proxies.iter().any(|network| network.contains(*address));
    let peer = peer.map(|address| address.to_canonical());
    if server.trusted_proxies.is_empty() || !peer.as_ref().is_some_and(trusted) {
        return peer;
    }
    let mut last = peer;
    let hops = headers.get_all("x-forwarded-for").iter().rev().filter_map(|value| value.to_str().ok());
    for hop in hops.flat_map(|value| value.rsplit(',')) {
        let Some(address) = parse_hop(hop.trim()) else { break };
        last = Some(address);
        if !trusted(&address) {
            break;
        }
    }
    last
}

/// An address as proxies write it: bare, or with a port.
fn parse_hop(hop: &str) -> Option<IpAddr> {
    let bare = hop.parse::<IpAddr>().or_else(|_| hop.trim_start_matches('[').trim_end_matches(']').parse());
    let address = bare.or_else(|_| hop.parse::<std::net::SocketAddr>().map(|address| address.ip()));
    address.ok().map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::{config, server};

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn every_usual_way_to_send_the_key() {
        let server = config("[]").server;
        let key = server.api_key.expose().to_owned();
        let auth = Auth::default();
        for (name, value) in [
            ("authorization", format!("Bearer {key}")),
            ("authorization", format!("bearer  {key}")),
            ("authorization", key.clone()),
            ("x-api-key", key.clone()),
            ("api-key", key.clone()),
        ] {
            assert_eq!(auth.check(&server, &headers(&[(name, &value)]), None), Ok(()), "{name}: {value}");
        }
        for value in ["", "Bearer", "Bearer ", "Bearer"] {
            assert_eq!(auth.check(&server, &headers(&[("authorization", value)]), None), Err(Fault::KeyMissing));
        }
        for value in ["Bearer wrong", "Basic abc", &key[1..], &format!("{key}x")] {
            assert_eq!(auth.check(&server, &headers(&[("authorization", value)]), None), Err(Fault::KeyWrong));
        }
    }

    #[test]
    fn guessing_is_slowed_by_address_and_a_right_key_is_not() {
        let server = server(r#"{"failedKeysPerMinute": 3}"#);
        let auth = Auth::default();
        let address = Some("192.0.2.1".parse().unwrap());
        let wrong = headers(&[("authorization", "Bearer wrong")]);
        for _ in 0..3 {
            assert_eq!(auth.check(&server, &wrong, address), Err(Fault::KeyWrong));
        }
        assert_eq!(auth.check(&server, &wrong, address), Err(Fault::KeysFailedTooOften));
        assert_eq!(auth.check(&server, &wrong, Some("192.0.2.2".parse().unwrap())), Err(Fault::KeyWrong));
        let right = headers(&[("authorization", &format!("Bearer {}", server.api_key.expose()))]);
        assert_eq!(auth.check(&server, &right, address), Ok(()));
    }

    #[test]
    fn the_address_is_the_last_untrusted_hop() {
        let server = server(r#"{"trustedProxies": ["10.0.0.0/8", "::1"]}"#);
        let address = |peer: &str, forwarded: &[&str]| {
            let pairs: Vec<_> = forwarded.iter().map(|value| ("x-forwarded-for", *value)).collect();
            client_address(&server, &headers(&pairs), Some(peer.parse().unwrap())).unwrap().to_string()
        };
        assert_eq!(address("192.0.2.9", &["1.1.1.1"]), "192.0.2.9", "an untrusted peer may say what it likes");
        assert_eq!(address("10.0.0.1", &["1.1.1.1, 2.2.2.2, 10.9.9.9"]), "2.2.2.2");
        assert_eq!(address("10.0.0.1", &["1.1.1.1", "2.2.2.2"]), "2.2.2.2");
        assert_eq!(address("10.0.0.1", &["2.2.2.2:4711"]), "2.2.2.2");
        assert_eq!(address("::1", &["[2001:db8::1]:4711"]), "2001:db8::1");
        assert_eq!(address("10.0.0.1", &[]), "10.0.0.1");
        assert_eq!(address("10.0.0.1", &["garbage"]), "10.0.0.1");
        assert_eq!(address("::ffff:10.0.0.1", &["2.2.2.2"]), "2.2.2.2");
    }
}
