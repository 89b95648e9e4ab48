//! Connections to endpoints: addresses, TLS, protocol, timeouts.
//!
//! Names are resolved here and never by Pingora, whose own look-up blocks the worker and panics when it fails.

mod connect_error;
pub(crate) mod cork;
mod forward;
mod tunnel;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use http::request::Parts;
use http::{HeaderName, HeaderValue, header};
use pingora::http::RequestHeader;
use pingora::protocols::tls::CaType;
use pingora::protocols::{ALPN, TcpKeepalive};
use pingora::tls::{CertificateDer, RootCertStore};
use pingora::upstreams::peer::HttpPeer;
use pingora::utils::tls::{WrappedX509, parse_x509};
use pingora::{Error, ErrorType};
use rustls_pki_types::pem::PemObject;

use crate::config::{self, AuthHeader, BaseUrl, Door, Secret, VersionPath};
use crate::request::rewrite;
use crate::upstream::forward::Forward;
use crate::upstream::tunnel::Tunnel;
pub(crate) use connect_error::{ConnectError, ConnectStage};

/// Interval of name look-ups.
pub(crate) const RESOLVE_INTERVAL: Duration = Duration::from_secs(30);
/// A look-up that takes longer is given up; the last good answer stays.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Addresses kept of one name.
const ADDRESSES_MAX: usize = 16;
/// Idle connections are kept this long for the next request.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(90);
const FRESH_IDLE_TIMEOUT: Duration = Duration::from_secs(1);
/// Requests that share one HTTP/2 connection to an endpoint: the least that RFC 9113 recommends servers to allow.
const H2_STREAMS_MAX: usize = 100;
/// A silent HTTP/2 connection is probed at this interval, so that a dead one is found before a request is.
const H2_PING_INTERVAL: Duration = Duration::from_secs(30);
/// Probes of silent TCP connections: NAT boxes commonly forget one after a few minutes.
const KEEPALIVE: TcpKeepalive = TcpKeepalive {
    idle: Duration::from_mins(1),
    interval: Duration::from_secs(15),
    count: 4,
    #[cfg(target_os = "linux")]
    user_timeout: Duration::ZERO,
};

/// Address of an endpoint, and how it is connected to.
#[derive(Debug)]
pub struct Upstream {
    /// `Host` header.
    pub authority: HeaderValue,
    /// Path of the base URL, which stands in place of the client's `/v1`.
    base_path: String,
    /// Name for messages.
    name: String,
    /// Host that is connected to: the endpoint, or its proxy.
    host: String,
    port: u16,
    template: HttpPeer,
    /// The other way to the endpoint: requests that its proxy sends on.
    forward: Option<Forward>,
    resolved: ArcSwapOption<Vec<SocketAddr>>,
}

/// A key of an endpoint, in its place.
#[derive(Debug)]
pub enum Credential {
    /// A header of this name.
    Header(HeaderName, HeaderValue),
    /// A parameter of the query, percent-encoded.
    Query([(String, Secret); 1]),
}

impl Credential {
    /// A key where the endpoint wants it; none if no header can carry it.
    pub fn new(key: &Secret, place: &AuthHeader) -> Option<Self> {
        let (name, value) = match place {
            AuthHeader::Query(name) => return Some(Self::Query([(name.clone(), rewrite::query_value(key))])),
            AuthHeader::Authorization => (header::AUTHORIZATION, rewrite::bearer(key.expose())?),
            AuthHeader::Header(name) => (name.clone(), HeaderValue::from_str(key.expose()).ok()?),
        };
        let mut value = value;
        value.set_sensitive(true);
        Some(Self::Header(name, value))
    }
}

impl Upstream {
    /// The upstream of an endpoint. Fails if its CA file cannot be used.
    pub fn new(endpoint: &config::Endpoint) -> io::Result<Self> {
        Self::at(endpoint, &endpoint.base_url)
    }

    /// The upstream of the calls of an endpoint that have an address of their own.
    pub fn of_door(endpoint: &config::Endpoint, door: &Door) -> io::Result<Self> {
        Self::at(endpoint, &door.base_url)
    }

    fn at(endpoint: &config::Endpoint, base: &BaseUrl) -> io::Result<Self> {
        // A proxy resolves the endpoint's name itself.
        let (host, port) = match &endpoint.proxy {
            Some(proxy) => (&proxy.host, proxy.port),
            None => (&base.host, base.port),
        };
        let resolved = host.parse::<IpAddr>().ok().map(|ip| Arc::new(vec![SocketAddr::new(ip, port)]));
        let authority = HeaderValue::from_str(&base.authority()).map_err(io::Error::other)?;
        let template = template(endpoint, base)?;
        Ok(Self {
            authority,
            base_path: base.path.clone(),
            name: match &endpoint.proxy {
                Some(proxy) => format!("{} through the proxy {proxy}", base.host),
                None => base.host.clone(),
            },
            host: host.clone(),
            port,
            forward: Forward::new(endpoint, base, &template)?,
            template,
            resolved: ArcSwapOption::new(resolved),
        })
    }

    /// Returns the addresses of the endpoint: the last good answer, or a look-up if there has been none.
    pub async fn addresses(&self) -> io::Result<Arc<Vec<SocketAddr>>> {
        match self.resolved.load_full() {
            Some(known) => Ok(known),
            None => self.resolve().await,
        }
    }

    /// Looks the name up again. The last good answer stays if that fails.
    pub async fn resolve(&self) -> io::Result<Arc<Vec<SocketAddr>>> {
        if !self.has_name() {
            return self.resolved.load_full().ok_or_else(|| io::Error::other("address lost"));
        }
        let lookup = tokio::net::lookup_host((self.host.as_str(), self.port));
        let found = tokio::time::timeout(RESOLVE_TIMEOUT, lookup)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the name look-up took too long"))??;
        let addresses: Vec<SocketAddr> = found.take(ADDRESSES_MAX).collect();
        if addresses.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        }
        let addresses = Arc::new(addresses);
        self.resolved.store(Some(Arc::clone(&addresses)));
        Ok(addresses)
    }

    /// The endpoint's host, and the proxy on the way to it, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// True if what is connected to is a name, which has to be looked up.
    pub fn has_name(&self) -> bool {
        self.host.parse::<IpAddr>().is_err()
    }

    /// How a proxy is asked to send a request on, if one is.
    pub fn forward(&self, switches_protocol: bool) -> Option<&Forward> {
        // A proxy is asked for a tunnel where what follows need not be HTTP, as by every browser.
        self.forward.as_ref().filter(|_| !switches_protocol)
    }

    /// Makes a request the endpoint's: its host, key and further headers, and the path as the endpoint has it.
    pub fn dress(
        &self,
        mut request: Parts,
        (endpoint, credential): (&config::Endpoint, &Credential),
        target: &str,
        switches_protocol: bool,
    ) -> pingora::Result<RequestHeader> {
        let base = &self.base_path;
        let mut path = match endpoint.version_path {
            VersionPath::None if base.is_empty() => rewrite::without_version(target),
            _ => rewrite::path_and_query(base, target),
        };
        if !endpoint.query.is_empty() {
            path = rewrite::with_query(&path, &endpoint.query).into();
        }
        if let Credential::Query(parameter) = credential {
            path = rewrite::with_query(&path, parameter).into();
        }
        if request.uri != *path {
            request.uri = path.parse().map_err(|_| Error::new_in(ErrorType::InvalidHTTPHeader))?;
        }
        request.headers.insert(header::HOST, self.authority.clone());
        if let Credential::Header(name, value) = credential {
            request.headers.insert(name.clone(), value.clone());
        }
        for (name, value) in &endpoint.headers {
            request.headers.insert(name.clone(), value.clone());
        }
        let forward = self.forward(switches_protocol);
        if let Some(login) = forward.and_then(|forward| forward.login.as_ref()) {
            request.headers.insert(header::PROXY_AUTHORIZATION, login.clone());
        }
        let mut header: RequestHeader = request.into();
        if let Some(forward) = forward {
            header.set_raw_path(&forward.target(&path))?;
        }
        Ok(header)
    }

    /// Number of known addresses.
    pub fn addresses_known(&self) -> usize {
        self.resolved.load().as_ref().map_or(0, |addresses| addresses.len())
    }

    /// The peer at one of the addresses. A request that switches protocols needs HTTP/1.1; one whose pooled connection
    /// turned out to be closed gets a fresh connection. `first_byte` is how long the attempt may wait for an answer.
    pub fn peer(
        &self,
        address: SocketAddr,
        switches_protocol: bool,
        fresh: bool,
        first_byte: Duration,
    ) -> Box<HttpPeer> {
        let template = self.forward(switches_protocol).map_or(&self.template, |forward| &forward.template);
        let mut peer = Box::new(template.clone());
        peer._address = address.into();
        let options = &mut peer.options;
        // While a body is written to an HTTP/2 endpoint no other deadline is looked at.
        options.write_timeout = options.write_timeout.min(Some(first_byte)).or(options.write_timeout);
        if switches_protocol {
            options.alpn = ALPN::H1;
        }
        if fresh {
            // Pingora shares connections by this key, so no other request's fits; nor will this one's fit any later, so it need
            // not be kept.
            peer.group_key = fastrand::u64(..);
            peer.options.idle_timeout = Some(FRESH_IDLE_TIMEOUT);
        }
        peer
    }
}

fn template(endpoint: &config::Endpoint, base: &BaseUrl) -> io::Result<HttpPeer> {
    // An address is put in for each attempt; the name is set even where it is an IP address, as an empty one would switch
    // the certificate's verification off.
    let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
    let mut peer = HttpPeer::new(nowhere, base.tls, base.host.clone());
    let timeouts = &endpoint.timeouts;
    let options = &mut peer.options;
    options.connection_timeout = Some(timeouts.connect);
    options.total_connection_timeout = Some(timeouts.connect);
    // No deadline for reading: the wrapped session keeps those of a response, with one timer for all of its reads, and the client's
    // connection those of a WebSocket.
    options.write_timeout = Some(timeouts.idle);
    options.idle_timeout = Some(POOL_IDLE_TIMEOUT);
    options.tcp_keepalive = Some(KEEPALIVE);
    options.max_h2_streams = H2_STREAMS_MAX;
    options.h2_ping_interval = Some(H2_PING_INTERVAL);
    options.alpn = match (endpoint.http2, base.tls) {
        (Some(true), _) => ALPN::H2,
        (None, true) => ALPN::H2H1,
        (Some(false), _) | (None, false) => ALPN::H1,
    };
    options.verify_cert = !endpoint.tls.insecure;
    options.verify_hostname = !endpoint.tls.insecure;
    if let Some(proxy) = &endpoint.proxy {
        options.custom_l4 = Some(Arc::new(Tunnel::new(proxy.clone(), Some((base.host.clone(), base.port)))?));
    }
    if let Some(file) = &endpoint.tls.ca_file {
        options.ca = Some(load_ca(file)?);
    }
    // Pingora looks at neither when it shares connections.
    if endpoint.tls.ca_file.is_some() || endpoint.proxy.is_some() {
        let proxy =
            endpoint.proxy.as_ref().map(|proxy| (proxy.to_string(), proxy.login.as_ref().map(|login| &login.0)));
        peer.group_key = group_key(&(&endpoint.tls.ca_file, proxy, &base.host, base.port));
    }
    Ok(peer)
}

fn load_ca(file: &Path) -> io::Result<Arc<CaType>> {
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {why}", file.display()));
    let certificates: Vec<CertificateDer<'static>> =
        CertificateDer::pem_file_iter(file).and_then(Iterator::collect).map_err(|error| invalid(error.to_string()))?;
    // Pingora panics on a certificate it cannot parse, so each is tried first.
    let mut store = RootCertStore::empty();
    for certificate in &certificates {
        store.add(certificate.clone()).map_err(|error| invalid(error.to_string()))?;
    }
    if certificates.is_empty() {
        return Err(invalid("no certificate in it".into()));
    }
    Ok(certificates.into_iter().map(|der| WrappedX509::new(der.to_vec(), parse_x509)).collect())
}

fn group_key(parts: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::config;
    use pingora::upstreams::peer::Peer;

    fn upstream(api: &str) -> Upstream {
        Upstream::new(&config(&format!("[{api}]")).endpoints[0]).unwrap()
    }

    #[test]
    fn the_name_is_always_set_so_that_certificates_are_verified() {
        for host in ["https://api.example.com", "https://127.0.0.1", "https://[::1]:8443"] {
            let upstream = upstream(&format!(r#"{{"baseUrl":"{host}"}}"#));
            let peer = upstream.peer(SocketAddr::from(([127, 0, 0, 1], 1)), false, false, Duration::from_secs(1));
            assert!(!peer.sni().is_empty(), "{host}");
            assert!(peer.verify_cert() && peer.verify_hostname(), "{host}");
        }
    }

    #[tokio::test]
    async fn addresses_need_no_look_up_and_names_keep_the_last_answer() {
        let literal = upstream(r#"{"baseUrl":"http://127.0.0.1:9"}"#);
        assert_eq!(*literal.addresses().await.unwrap(), [SocketAddr::from(([127, 0, 0, 1], 9))]);
        let name = upstream(r#"{"baseUrl":"http://localhost:9"}"#);
        assert!(name.addresses().await.unwrap().iter().all(|address| address.ip().is_loopback()));
        let nowhere = upstream(r#"{"baseUrl":"http://nowhere.invalid"}"#);
        assert!(nowhere.addresses().await.is_err());
        let kept = Arc::new(vec![SocketAddr::from(([127, 0, 0, 1], 80))]);
        nowhere.resolved.store(Some(Arc::clone(&kept)));
        assert!(nowhere.resolve().await.is_err());
        assert_eq!(nowhere.addresses().await.unwrap(), kept);
    }

    #[test]
    fn a_ca_file_keeps_connections_apart() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        std::fs::write(&file, rcgen::generate_simple_self_signed(["localhost".into()]).unwrap().cert.pem()).unwrap();
        let own = upstream(&format!(r#"{{"baseUrl":"https://localhost","tls":{{"caFile":{file:?}}}}}"#));
        let system = upstream(r#"{"baseUrl":"https://localhost"}"#);
        let address = SocketAddr::from(([127, 0, 0, 1], 443));
        assert_ne!(
            own.peer(address, false, false, Duration::from_secs(1)).reuse_hash(),
            system.peer(address, false, false, Duration::from_secs(1)).reuse_hash()
        );
        std::fs::write(&file, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
        assert!(load_ca(&file).is_err());
        std::fs::write(&file, "nothing").unwrap();
        assert!(load_ca(&file).is_err());
    }
}
