//! Key → caller: who may call, and how those who guess are slowed.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, header};
use percent_encoding::percent_decode;

use super::guesses::Guesses;
use crate::config::{self, Secret};
use crate::fault::Fault;

/// Headers in which SDKs send a key: OpenAI's and most others', Anthropic's, Azure's, Google's.
const KEY_HEADERS: [HeaderName; 4] = [
    header::AUTHORIZATION,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
    HeaderName::from_static("x-goog-api-key"),
];
/// Begins the subprotocol in which OpenAI's clients send a key from a browser, which can set no headers of a WebSocket.
pub(crate) const SUBPROTOCOL_KEY: &str = "openai-insecure-api-key.";
/// Query parameter in which Google's clients send a key.
pub(crate) const KEY_PARAMETER: &str = "key";

/// Keys of one request that are looked at. SDKs send one, some of them in two places.
const KEYS_MAX: usize = 8;

/// A key that is known.
#[derive(Debug)]
pub struct Known<C> {
    /// Whose it is.
    pub caller: C,
    /// True if the gateway made it, so that nobody has guessed it.
    pub is_generated: bool,
}

/// Whose request it is.
#[derive(Debug, PartialEq, Eq)]
pub enum Admitted<C> {
    /// It has the server's one key.
    Shared,
    /// It has a caller's own key, this one.
    Caller(C, Secret),
}

/// Checks the key of every request. Cheap to clone.
#[derive(Clone, Default)]
pub struct Auth {
    pub(crate) guesses: Arc<Guesses>,
    /// Those of the key of those who run the gateway, apart: an address that has been right with a client's key may not guess on.
    pub(crate) admin_guesses: Arc<Guesses>,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Auth")
    }
}

impl Auth {
    /// Lets a request with the right key pass, wherever it stands: that of the server, or one that `find` knows. Wrong ones are refused,
    /// and counted against the address that they come from; behind the limit a right one is refused as well
    /// ([`Fault::KeysFailedTooOften`]), unless the address has lately been right. `vouched`: the connection has shown a right key
    /// before, and is one client's.
    pub fn check<C>(
        &self,
        server: &config::Server,
        headers: &HeaderMap,
        query: Option<&str>,
        (address, vouched): (Option<IpAddr>, bool),
        find: impl Fn(&[u8]) -> Option<Result<Known<C>, Fault>>,
    ) -> Result<Admitted<C>, Fault> {
        let is_shared = |given: &[u8]| server.api_key.as_ref().is_some_and(|key| key.matches(given));
        // Nearly all put it there, and need no look at the other places.
        if let Some(value) = headers.get(header::AUTHORIZATION)
            && is_shared(bare(value.as_bytes()))
        {
            return self.let_in(server, address, vouched).map(|()| Admitted::Shared);
        }
        let limit = server.failed_keys_per_minute;
        let (mut is_given, mut too_often) = (false, false);
        for key in keys_given(headers, query).take(KEYS_MAX) {
            if is_shared(&key) {
                return self.let_in(server, address, vouched).map(|()| Admitted::Shared);
            }
            if let Some(known) = find(&key) {
                let Known { caller, is_generated } = known?;
                // Nobody has guessed one that the gateway made.
                self.let_in(server, address, vouched || is_generated)?;
                return Ok(Admitted::Caller(caller, Secret::new(String::from_utf8_lossy(&key))));
            }
            // Each is a guess, or many could be tried behind one that is always the same.
            too_often |= address.is_some_and(|address| self.guesses.wrong(address, &key, limit));
            is_given = true;
        }
        Err(match (is_given, too_often) {
            (false, _) => Fault::KeyMissing,
            (true, false) => Fault::KeyWrong,
            (true, true) => Fault::KeysFailedTooOften,
        })
    }

    /// Lets a request with the key of those who run the gateway pass. Behind the limit a right one is refused as well, unless the address
    /// has lately been right.
    pub(crate) fn check_admin(
        &self,
        (key, limit): (&Secret, u32),
        headers: &HeaderMap,
        address: Option<IpAddr>,
    ) -> Result<(), Fault> {
        let mut refused = Fault::AdminKeyMissing;
        for given in keys_given(headers, None).take(KEYS_MAX) {
            match self.check_admin_key((key, limit), &given, address) {
                Ok(()) => return Ok(()),
                Err(fault) => refused = fault,
            }
        }
        Err(refused)
    }

    /// The same for one key.
    pub(crate) fn check_admin_key(
        &self,
        (key, limit): (&Secret, u32),
        given: &[u8],
        address: Option<IpAddr>,
    ) -> Result<(), Fault> {
        self.check_admin_address(limit, address)?;
        let (guesses, limit) = (&self.admin_guesses, admin_limit(limit));
        if key.matches(given) {
            if let Some(address) = address {
                guesses.right(address);
            }
            return Ok(());
        }
        if address.is_some_and(|address| guesses.wrong(address, given, limit)) {
            return Err(Fault::KeysFailedTooOften);
        }
        Err(Fault::AdminKeyWrong)
    }

    /// Refuses an address that has shown too many wrong admin keys.
    pub(crate) fn check_admin_address(&self, limit: u32, address: Option<IpAddr>) -> Result<(), Fault> {
        let guesses = &self.admin_guesses;
        let is_behind = |address: IpAddr| guesses.is_behind(address, admin_limit(limit)) && !guesses.was_right(address);
        if address.is_some_and(is_behind) { Err(Fault::KeysFailedTooOften) } else { Ok(()) }
    }

    fn let_in(&self, server: &config::Server, address: Option<IpAddr>, vouched: bool) -> Result<(), Fault> {
        let Some(address) = address.filter(|_| !vouched) else { return Ok(()) };
        if self.guesses.is_behind(address, server.failed_keys_per_minute) && !self.guesses.was_right(address) {
            return Err(Fault::KeysFailedTooOften);
        }
        self.guesses.right(address);
        Ok(())
    }
}

/// The keys that a request carries, in the order of the places where they may stand.
fn keys_given<'a>(headers: &'a HeaderMap, query: Option<&'a str>) -> impl Iterator<Item = Cow<'a, [u8]>> {
    let of_headers = KEY_HEADERS.into_iter().flat_map(|name| headers.get_all(name)).map(|value| bare(value.as_bytes()));
    let offered = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    let of_subprotocols = offered
        .flat_map(|value| value.split(','))
        .filter_map(|protocol| protocol.trim().strip_prefix(SUBPROTOCOL_KEY))
        .map(str::as_bytes);
    let pairs = query.into_iter().flat_map(|query| query.split('&')).filter_map(|pair| pair.split_once('='));
    let of_query = pairs.filter(|(name, _)| *name == KEY_PARAMETER);
    let of_query = of_query.map(|(_, value)| Cow::from(percent_decode(value.as_bytes())));
    of_headers.chain(of_subprotocols).map(Cow::Borrowed).chain(of_query).filter(|key| !key.is_empty())
}

/// The key of a header's value: `Bearer KEY`, or the bare key.
fn bare(value: &[u8]) -> &[u8] {
    let value = value.trim_ascii();
    let key = match value.split_at_checked(7) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => key.trim_ascii(),
        _ => value,
    };
    if key.eq_ignore_ascii_case(b"bearer") { b"" } else { key }
}

/// The client's address: the peer's, or, where the peer is a trusted proxy, the last hop of `X-Forwarded-For` that is
/// not one.
pub fn client_address(server: &config::Server, headers: &HeaderMap, peer: Option<IpAddr>) -> Option<IpAddr> {
    let trusted = |address: &IpAddr| is_trusted(server, *address);
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

/// Wrong admin keys that an address may show in a minute. They have a limit even where clients' keys have none.
fn admin_limit(of_clients: u32) -> u32 {
    const WITHOUT: u32 = 10;
    if of_clients == 0 { WITHOUT } else { of_clients }
}

/// True for a reverse proxy that says whose requests it passes on.
pub(crate) fn is_trusted(server: &config::Server, address: IpAddr) -> bool {
    let address = address.to_canonical();
    server.trusted_proxies.iter().any(|network| network.contains(address))
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

    fn key_of(server: &config::Server) -> String {
        server.api_key.as_ref().unwrap().expose().to_owned()
    }

    /// Checks a request where no caller has a key of its own.
    fn check_shared(
        auth: &Auth,
        server: &config::Server,
        headers: &HeaderMap,
        query: Option<&str>,
        from: (Option<IpAddr>, bool),
    ) -> Result<(), Fault> {
        auth.check::<()>(server, headers, query, from, |_| None).map(|admitted| assert_eq!(admitted, Admitted::Shared))
    }

    #[test]
    fn every_usual_way_to_send_the_key() {
        let server = config("[]").server;
        let key = key_of(&server);
        let auth = Auth::default();
        let places = [
            ("authorization", format!("Bearer {key}")),
            ("authorization", format!("bearer  {key}")),
            ("authorization", key.clone()),
            ("x-api-key", key.clone()),
            ("api-key", key.clone()),
            ("x-goog-api-key", key.clone()),
            ("sec-websocket-protocol", format!("realtime, openai-insecure-api-key.{key}, openai-beta.realtime-v1")),
        ];
        for (name, value) in &places {
            assert_eq!(
                check_shared(&auth, &server, &headers(&[(name, value)]), None, (None, false)),
                Ok(()),
                "{name}: {value}"
            );
            // Whatever stands in the other places, and before it in the same.
            for (other, _) in &places {
                let mixed = headers(&[(other, "wrong"), (name, value)]);
                assert_eq!(
                    check_shared(&auth, &server, &mixed, Some("key=wrong"), (None, false)),
                    Ok(()),
                    "{other}, {name}: {value}"
                );
            }
        }
        let wrong = headers(&[("authorization", "Bearer wrong")]);
        for query in [format!("key={key}"), format!("a=1&key={}&b=2", key.replace('-', "%2D"))] {
            assert_eq!(check_shared(&auth, &server, &wrong, Some(&query), (None, false)), Ok(()), "{query}");
        }
        for value in ["", "Bearer", "Bearer ", "Bearer"] {
            let none = headers(&[("authorization", value)]);
            assert_eq!(check_shared(&auth, &server, &none, Some("key=&a"), (None, false)), Err(Fault::KeyMissing));
        }
        for value in ["Bearer wrong", "Basic abc", &key[1..], &format!("{key}x")] {
            let wrong = headers(&[("authorization", value)]);
            assert_eq!(check_shared(&auth, &server, &wrong, Some("keys=a"), (None, false)), Err(Fault::KeyWrong));
        }
    }

    #[test]
    fn behind_the_limit_a_right_key_is_refused_like_a_wrong_one() {
        let server = server(r#"{"failedKeysPerMinute": 3}"#);
        let right = headers(&[("authorization", &format!("Bearer {}", key_of(&server)))]);
        let guess = |number: u8| headers(&[("authorization", &format!("Bearer wrong{number}"))]);
        let (new, known): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let auth = Auth::default();
        let check = |headers: &HeaderMap, address, vouched| {
            check_shared(&auth, &server, headers, None, (Some(address), vouched))
        };
        assert_eq!(check(&right, known, false), Ok(()));
        for address in [new, known] {
            for number in 0..3 {
                assert_eq!(check(&guess(number), address, false), Err(Fault::KeyWrong));
                assert_eq!(check(&guess(number), address, false), Err(Fault::KeyWrong), "the same guess again");
            }
            assert_eq!(check(&guess(3), address, false), Err(Fault::KeysFailedTooOften));
            assert_eq!(check(&guess(0), address, false), Err(Fault::KeysFailedTooOften));
        }
        assert_eq!(check(&right, new, false), Err(Fault::KeysFailedTooOften), "it would tell that the guess is right");
        assert_eq!(check(&right, known, false), Ok(()), "it was right before");
        assert_eq!(check(&right, new, true), Ok(()), "its connection was");
        assert_eq!(check(&HeaderMap::new(), new, false), Err(Fault::KeyMissing), "no key is no guess");

        // Behind a key that is always the same, in other places, and many at once.
        let behind =
            |number: u8| headers(&[("authorization", "Bearer dummy"), ("x-api-key", &format!("guess{number}"))]);
        let third: IpAddr = "192.0.2.3".parse().unwrap();
        assert_eq!(
            (0..9).find(|number| check(&behind(*number), third, false) == Err(Fault::KeysFailedTooOften)),
            Some(2)
        );
        let right_behind = headers(&[("authorization", "Bearer dummy"), ("x-api-key", &key_of(&server))]);
        assert_eq!(check(&right_behind, third, false), Err(Fault::KeysFailedTooOften));
        let fourth = Some("192.0.2.4".parse().unwrap());
        let many: Vec<String> = (0..50).map(|number| format!("key=guess{number}")).collect();
        let many = format!("{}&key={}", many.join("&"), key_of(&server));
        let none = HeaderMap::new();
        assert_eq!(check_shared(&auth, &server, &none, Some(&many), (fourth, false)), Err(Fault::KeysFailedTooOften));
    }

    #[test]
    fn a_callers_own_key_opens_and_one_that_was_made_here_is_not_slowed() {
        let server = server(r#"{"failedKeysPerMinute": 1}"#);
        let auth = Auth::default();
        let address = Some("192.0.2.9".parse().unwrap());
        let check = |value: &str| {
            let find = |key: &[u8]| match key {
                b"sk-ada" => Some(Ok(Known { caller: "ada", is_generated: false })),
                b"sk-at-agent" => Some(Ok(Known { caller: "agent", is_generated: true })),
                b"sk-old" => Some(Err(Fault::KeyEnded { name: "old".into(), why: "has expired" })),
                _ => None,
            };
            auth.check(&server, &headers(&[("x-api-key", value)]), None, (address, false), find)
        };
        assert_eq!(check("sk-ada"), Ok(Admitted::Caller("ada", Secret::new("sk-ada"))));
        assert_eq!(check(&key_of(&server)), Ok(Admitted::Shared));
        assert!(matches!(check("sk-old"), Err(Fault::KeyEnded { .. })), "no guess");
        let new = Some("192.0.2.10".parse().unwrap());
        let check = |value: &str, is_generated| {
            let find = |key: &[u8]| (key == b"right").then_some(Ok(Known { caller: (), is_generated }));
            auth.check(&server, &headers(&[("x-api-key", value)]), None, (new, false), find).map(drop)
        };
        assert_eq!(check("wrong", false), Err(Fault::KeyWrong));
        assert_eq!(check("wronger", false), Err(Fault::KeysFailedTooOften));
        assert_eq!(check("right", false), Err(Fault::KeysFailedTooOften));
        assert_eq!(check("right", true), Ok(()));
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
