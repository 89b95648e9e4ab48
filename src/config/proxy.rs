//! A proxy on the way to an endpoint: from the endpoint's own setting, or from the variables that every HTTP client goes by.

use std::fmt;
use std::net::IpAddr;

use base64::Engine as _;
use percent_encoding::percent_decode_str;

use super::base_url::{BaseUrl, BaseUrlError};
use super::cidr::Cidr;
use super::environment::Environment;
use crate::config::secret::Secret;

/// Protocol of a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProxyScheme {
    /// HTTP in plain text.
    Http,
    /// HTTP within TLS.
    Https,
    /// RFC 1928; names are resolved by the proxy.
    Socks5,
}

/// A proxy. Printing it shows no password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Protocol.
    pub scheme: ProxyScheme,
    /// Lower-case; an IPv6 address has no brackets.
    pub host: String,
    /// The scheme's own unless another was given.
    pub port: u16,
    /// User and password.
    pub login: Option<(String, Secret)>,
}

const EXAMPLE: &str = "such as http://user:password@10.0.0.1:3128 or socks5://127.0.0.1:1080; \"none\" for no proxy";

impl Proxy {
    /// Reads an address as people write it.
    pub fn parse(text: &str) -> Result<Self, BaseUrlError> {
        let text = text.trim();
        let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
        let (scheme, port) = match scheme.to_ascii_lowercase().as_str() {
            "http" => (ProxyScheme::Http, 80),
            "https" => (ProxyScheme::Https, 443),
            "socks5" | "socks5h" => (ProxyScheme::Socks5, 1080),
            _ => return Err(BaseUrlError { message: "has an unsupported scheme", hint: EXAMPLE }),
        };
        // A password may have an `@` in it.
        let (login, address) = match rest.rsplit_once('@') {
            Some((login, address)) => (Some(login), address),
            None => (None, rest),
        };
        // The parts of an address are read as an endpoint's are; a proxy has no path.
        let address = address.trim_end_matches('/');
        let base = BaseUrl::parse(&format!("http://{address}"))?;
        if address.is_empty() || !base.path.is_empty() {
            return Err(BaseUrlError { message: "is not the address of a proxy", hint: EXAMPLE });
        }
        let has_port = address.rsplit_once(':').is_some_and(|(_, port)| !port.contains(']'));
        let login = login.map(|login| {
            let (user, password) = login.split_once(':').unwrap_or((login, ""));
            let decoded = |part| percent_decode_str(part).decode_utf8_lossy().into_owned();
            (decoded(user), Secret::new(decoded(password)))
        });
        Ok(Self { scheme, host: base.host, port: if has_port { base.port } else { port }, login })
    }

    /// The user and password as `Proxy-Authorization` has them.
    pub fn basic(&self) -> Option<String> {
        let (user, password) = self.login.as_ref()?;
        let login = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{}", password.expose()));
        Some(format!("Basic {login}"))
    }

    /// The variable that names the proxy for an endpoint, and what it says, if one does and `NO_PROXY` does not except it.
    /// Endpoints on this machine are always excepted.
    pub(super) fn of_environment<'a>(environment: &'a Environment, to: &BaseUrl) -> Option<(&'static str, &'a str)> {
        let own = if to.tls { ["https_proxy", "HTTPS_PROXY"] } else { ["http_proxy", "HTTP_PROXY"] };
        let names = own.into_iter().chain(["all_proxy", "ALL_PROXY"]);
        let found = names
            .filter_map(|name| Some((name, environment.value(name)?)))
            .find(|(_, text)| !text.trim().is_empty())?;
        let excepted = ["no_proxy", "NO_PROXY"].into_iter().find_map(|name| environment.value(name)).unwrap_or("");
        (!is_here(&to.host) && !is_excepted(excepted, to)).then_some(found)
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.scheme {
            ProxyScheme::Http => "http",
            ProxyScheme::Https => "https",
            ProxyScheme::Socks5 => "socks5",
        };
        if self.host.contains(':') {
            write!(f, "{scheme}://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{scheme}://{}:{}", self.host, self.port)
        }
    }
}

fn is_here(host: &str) -> bool {
    host == "localhost" || host.ends_with(".localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// True if a list such as `example.com, .internal, 10.0.0.0/8, host:8080` contains the endpoint. A name stands for all
/// names below it as well, with or without a leading dot; `*` means all.
fn is_excepted(list: &str, to: &BaseUrl) -> bool {
    list.split(',').map(str::trim).filter(|entry| !entry.is_empty()).any(|entry| {
        if entry == "*" {
            return true;
        }
        let (name, port) = without_port(entry);
        if port.is_some_and(|port| port != to.port) {
            return false;
        }
        // As in a URL, an IPv6 address may have brackets.
        let bare = name.replace(['[', ']'], "");
        if let (Ok(ip), Ok(range)) = (to.host.parse::<IpAddr>(), bare.parse::<Cidr>()) {
            return range.contains(ip);
        }
        let name = name.trim_start_matches('*').trim_start_matches('.').to_ascii_lowercase();
        let is_below = to.host.strip_suffix(&name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        !name.is_empty() && is_below
    })
}

/// Splits an entry such as `host:8080` or `[::1]:8080`. What follows the last colon of a bare IPv6 address is no port.
fn without_port(entry: &str) -> (&str, Option<u16>) {
    match entry.rsplit_once(':') {
        Some((name, port)) if !name.contains(':') || name.ends_with(']') => match port.parse() {
            Ok(port) => (name, Some(port)),
            Err(_) => (entry, None),
        },
        _ => (entry, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxies_are_read_as_people_write_them() {
        let of = |text: &str| {
            Proxy::parse(text).map(|proxy| {
                let login = proxy.login.clone().map(|(user, password)| format!("{user}/{}", password.expose()));
                (proxy.to_string(), login)
            })
        };
        assert_eq!(of("http://10.0.0.1:3128"), Ok(("http://10.0.0.1:3128".into(), None)));
        assert_eq!(of("proxy.example:8080/"), Ok(("http://proxy.example:8080".into(), None)));
        assert_eq!(of("HTTPS://Proxy.Example"), Ok(("https://proxy.example:443".into(), None)));
        assert_eq!(of("socks5h://me:p%40ss@[::1]"), Ok(("socks5://[::1]:1080".into(), Some("me/p@ss".into()))));
        assert_eq!(of("socks5://代理.example"), Ok(("socks5://xn--mnq481g.example:1080".into(), None)));
        assert_eq!(of("http://u:p@ss@h:80"), Ok(("http://h:80".into(), Some("u/p@ss".into()))));
        for bad in ["ftp://x", "http://", "http://x/path", "", "http://x:99999"] {
            assert!(of(bad).is_err(), "{bad}");
        }
        assert!(!format!("{:?}", Proxy::parse("http://u:secret-word@h")).contains("secret-word"));
    }

    #[test]
    fn variables_are_honoured_as_by_every_client() {
        let of = |set: &[(&str, &str)], to: &str| {
            let environment = Environment::fixed(set.iter().copied());
            Proxy::of_environment(&environment, &BaseUrl::parse(to).unwrap()).map(|(name, _)| name)
        };
        let both = [("HTTPS_PROXY", "http://p"), ("HTTP_PROXY", "http://q")];
        assert_eq!(of(&both, "https://api.example.com"), Some("HTTPS_PROXY"));
        assert_eq!(of(&both, "http://api.example.com"), Some("HTTP_PROXY"));
        assert_eq!(of(&[("all_proxy", "http://p")], "https://api.example.com"), Some("all_proxy"));
        assert_eq!(of(&both, "http://127.0.0.1:8080"), None, "not to this machine");
        assert_eq!(of(&both, "http://localhost"), None);
        for (list, excepted) in [
            ("example.com", true),
            (".example.com", true),
            ("*.example.com", true),
            ("api.example.com:443", true),
            ("api.example.com:80", false),
            ("ample.com", false),
            ("other.com, example.com", true),
            ("*", true),
            ("", false),
        ] {
            let set = [("HTTPS_PROXY", "http://p"), ("NO_PROXY", list)];
            assert_eq!(of(&set, "https://api.example.com").is_none(), excepted, "{list}");
        }
        for (list, excepted) in [
            ("fd00::5", true),
            ("[fd00::5]", true),
            ("[fd00::5]:8080", true),
            ("[fd00::5]:80", false),
            ("fd00::/8", true),
            ("[fd00::]/8", true),
            ("[fe80::]/10, ::1", false),
            ("[fd00::6]", false),
        ] {
            let set = [("HTTP_PROXY", "http://p"), ("NO_PROXY", list)];
            assert_eq!(of(&set, "http://[fd00::5]:8080").is_none(), excepted, "{list}");
        }
        for (list, excepted) in
            [("10.0.0.0/8", true), ("10.1.2.3:80", true), ("10.1.2.3:8080", false), ("[10.1.2.3]", true)]
        {
            let set = [("HTTP_PROXY", "http://p"), ("no_proxy", list)];
            assert_eq!(of(&set, "http://10.1.2.3").is_none(), excepted, "{list}");
        }
    }
}
