//! Base URLs of endpoints.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An `http` or `https` address with an optional path. The path stands in place of a client's `/v1`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BaseUrl {
    /// True for `https`.
    pub tls: bool,
    /// Lower-case; an IPv6 address has no brackets.
    pub host: String,
    /// The scheme's own unless another was given.
    pub port: u16,
    /// Empty or `/api/v3`: it begins with a slash and never ends with one.
    pub path: String,
}

/// Error of a text that is not a base URL. It never quotes the text, which may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseUrlError {
    /// Problem, as the rest of a sentence.
    pub message: &'static str,
    /// The way out.
    pub hint: &'static str,
}

/// Paths of calls, which some people paste with the base URL. Longer ones first.
const CALL_PATHS: [&str; 9] = [
    "/chat/completions",
    "/completions",
    "/embeddings",
    "/moderations",
    "/responses",
    "/images/generations",
    "/audio/speech",
    "/audio/transcriptions",
    "/v1/models",
];

const EXAMPLE: &str = "such as https://api.openai.com or https://host/api/v3";

impl BaseUrl {
    /// Reads an address as people write it.
    pub fn parse(text: &str) -> Result<Self, BaseUrlError> {
        let text = text.trim();
        let (scheme, rest) =
            text.split_once("://").ok_or(BaseUrlError { message: "has no scheme", hint: "begin it with https://" })?;
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "https" => true,
            "http" => false,
            _ => return refuse("is neither https:// nor http://", EXAMPLE),
        };
        let (authority, path) = match rest.find('/') {
            Some(slash) => rest.split_at(slash),
            None => (rest, ""),
        };
        refuse_extras(rest)?;
        let (host, port) = split_authority(authority)?;
        let port = match port {
            Some(port) => parse_port(port)?,
            None => default_port(tls),
        };
        let (host, path) = (parse_host(host)?, parse_path(path)?);
        Ok(Self { tls, host, port, path })
    }

    /// The host as a `Host` header names it: the scheme's own port is left out, IPv6 is in brackets.
    pub fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        if self.port == default_port(self.tls) { host } else { format!("{host}:{}", self.port) }
    }

    /// True if the host is on this machine or on a private network, as far as its name shows.
    pub(super) fn is_private(&self) -> bool {
        if let Ok(ip) = self.host.parse::<IpAddr>() {
            return match ip.to_canonical() {
                IpAddr::V4(ip) => is_private_v4(ip),
                IpAddr::V6(ip) => is_private_v6(ip),
            };
        }
        // A name without a dot is known only to the local resolver, such as a container's.
        !self.host.contains('.')
            || [".localhost", ".local", ".internal", ".lan", ".home.arpa"]
                .iter()
                .any(|ending| self.host.ends_with(ending))
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.path)
    }
}

fn refuse<T>(message: &'static str, hint: &'static str) -> Result<T, BaseUrlError> {
    Err(BaseUrlError { message, hint })
}

fn default_port(tls: bool) -> u16 {
    if tls { 443 } else { 80 }
}

fn refuse_extras(rest: &str) -> Result<(), BaseUrlError> {
    if rest.contains('?') {
        return refuse("has a query", "put what follows the `?` into `query`, as in {\"api-version\": \"2024-10-21\"}");
    }
    if rest.contains('#') {
        return refuse("has a fragment", "leave off the `#` and what follows");
    }
    if rest.contains('@') {
        return refuse("has a user name or an `@`", "put the key into `apiKey`, or a header into `headers`");
    }
    Ok(())
}

/// Host (with brackets taken off an IPv6 address) and port as text.
fn split_authority(authority: &str) -> Result<(&str, Option<&str>), BaseUrlError> {
    let Some(bracketed) = authority.strip_prefix('[') else {
        return Ok(match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        });
    };
    let unclosed = BaseUrlError { message: "has a bad IPv6 address", hint: "write it as https://[::1]:8080" };
    let (host, rest) = bracketed.split_once(']').ok_or(unclosed)?;
    host.parse::<Ipv6Addr>().map_err(|_| unclosed)?;
    match (rest.is_empty(), rest.strip_prefix(':')) {
        (true, _) => Ok((host, None)),
        (false, Some(port)) => Ok((host, Some(port))),
        (false, None) => Err(unclosed),
    }
}

fn parse_port(port: &str) -> Result<u16, BaseUrlError> {
    match port.parse() {
        Ok(number) if number > 0 && !port.starts_with('+') => Ok(number),
        _ => refuse("has a bad port", "a port is a number from 1 to 65535; an IPv6 address needs [brackets]"),
    }
}

/// Returns the host in ASCII and lower case: international names are encoded. `url` knows the rules for names and IPv4
/// addresses.
fn parse_host(host: &str) -> Result<String, BaseUrlError> {
    if host.is_empty() {
        return refuse("has no host", EXAMPLE);
    }
    if host.parse::<Ipv6Addr>().is_ok() {
        return Ok(host.to_ascii_lowercase());
    }
    let is_name = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    match url::Host::parse(host) {
        Ok(url::Host::Domain(name)) if is_name(&name) && !name.starts_with('.') && !name.contains("..") => Ok(name),
        Ok(url::Host::Ipv4(address)) => Ok(address.to_string()),
        _ => refuse("has a bad host name", "use letters, digits, `-` and `.`"),
    }
}

fn parse_path(path: &str) -> Result<String, BaseUrlError> {
    let path = path.trim_end_matches('/');
    if !path.chars().all(|c| c.is_ascii_graphic() && !"\"<>\\^`{|}".contains(c)) {
        return refuse("has a bad character in its path", "write it percent-encoded, such as %20 for a space");
    }
    if CALL_PATHS.iter().any(|call| path.ends_with(call)) {
        return refuse(
            "ends in the path of a call",
            "leave off /chat/completions and the like; the client's own path is added",
        );
    }
    Ok(path.to_owned())
}

fn is_private_v4(ip: Ipv4Addr) -> bool {
    let [first, second, ..] = ip.octets();
    // 100.64.0.0/10 is shared address space (RFC 6598), which private overlays use.
    let is_shared = first == 100 && (64..128).contains(&second);
    ip.is_loopback() || ip.is_private() || ip.is_link_local() || is_shared
}

fn is_private_v6(ip: Ipv6Addr) -> bool {
    ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(text: &str) -> (bool, String, u16, String) {
        let url = BaseUrl::parse(text).unwrap();
        (url.tls, url.host, url.port, url.path)
    }

    #[test]
    fn it_is_taken_apart() {
        let case = |tls, host: &str, port, path: &str| (tls, host.to_owned(), port, path.to_owned());
        assert_eq!(parsed("https://api.openai.com"), case(true, "api.openai.com", 443, ""));
        assert_eq!(parsed(" HTTPS://API.OpenAI.com/ "), case(true, "api.openai.com", 443, ""));
        assert_eq!(parsed("http://h:8080/API/v3//"), case(false, "h", 8080, "/API/v3"));
        assert_eq!(parsed("http://h/v1"), case(false, "h", 80, "/v1"));
        assert_eq!(parsed("https://h/v1beta/openai/"), case(true, "h", 443, "/v1beta/openai"));
        assert_eq!(parsed("http://[FE80::1]:81/x"), case(false, "fe80::1", 81, "/x"));
        assert_eq!(parsed("https://h/completions-api"), case(true, "h", 443, "/completions-api"));
        assert_eq!(parsed("https://中文.com/v1"), case(true, "xn--fiq228c.com", 443, "/v1"));
        assert_eq!(parsed("http://BÜCHER.example:81"), case(false, "xn--bcher-kva.example", 81, ""));
        assert_eq!(parsed("http://127.1"), case(false, "127.0.0.1", 80, ""));
        assert_eq!(parsed("http://my_host"), case(false, "my_host", 80, ""));
    }

    #[test]
    fn it_is_put_together_again() {
        for (text, authority, shown) in [
            ("https://h:443/", "h", "https://h"),
            ("https://h:80", "h:80", "https://h:80"),
            ("http://h:80/v1/", "h", "http://h/v1"),
            ("http://[::1]:81/v1", "[::1]:81", "http://[::1]:81/v1"),
            ("https://[::1]", "[::1]", "https://[::1]"),
        ] {
            let url = BaseUrl::parse(text).unwrap();
            assert_eq!((url.authority().as_str(), url.to_string().as_str()), (authority, shown));
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, message) in [
            ("", "has no scheme"),
            ("api.openai.com", "has no scheme"),
            ("ftp://h", "is neither https:// nor http://"),
            ("https://", "has no host"),
            ("https:///v1", "has no host"),
            ("https://:80", "has no host"),
            ("https://h:0", "has a bad port"),
            ("https://h:", "has a bad port"),
            ("https://h:+80", "has a bad port"),
            ("https://h:65536", "has a bad port"),
            ("https://::1", "has a bad port"),
            ("https://[::1", "has a bad IPv6 address"),
            ("https://[::1]x", "has a bad IPv6 address"),
            ("https://[h]", "has a bad IPv6 address"),
            ("https://h?a=b", "has a query"),
            ("https://h/v1#x", "has a fragment"),
            ("https://u:p@h/", "has a user name or an `@`"),
            ("https://a b", "has a bad host name"),
            ("https://%00.com", "has a bad host name"),
            ("https://a\\b", "has a bad host name"),
            ("https://1.2.3.256", "has a bad host name"),
            ("https://xn--a.com", "has a bad host name"),
            ("https://a..b", "has a bad host name"),
            ("https://h/a b", "has a bad character in its path"),
            ("https://h/v1/chat/completions/", "ends in the path of a call"),
            ("https://h/v1/embeddings", "ends in the path of a call"),
        ] {
            assert_eq!(BaseUrl::parse(text).unwrap_err().message, message, "{text}");
        }
    }

    #[test]
    fn private_hosts_are_known() {
        let private = |host: &str| BaseUrl::parse(&format!("http://{host}")).unwrap().is_private();
        for host in [
            "localhost",
            "ollama",
            "127.0.0.2",
            "10.1.2.3",
            "192.168.0.1",
            "172.16.0.1",
            "100.64.0.1",
            "[::1]",
            "[fd00::1]",
            "[fe80::1]",
            "[::ffff:10.0.0.1]",
            "nas.local",
            "host.docker.internal",
        ] {
            assert!(private(host), "{host}");
        }
        for host in ["api.openai.com", "8.8.8.8", "100.128.0.1", "[2001:db8::1]", "[::ffff:8.8.8.8]", "local.com"] {
            assert!(!private(host), "{host}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused_and_reads_the_same_again(text in "(https?://)?\\PC{0,30}") {
            if let Ok(url) = BaseUrl::parse(&text) {
                prop_assert_eq!(BaseUrl::parse(&url.to_string()).unwrap(), url);
            }
        }
    }
}
