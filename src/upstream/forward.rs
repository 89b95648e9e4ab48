//! The way to an endpoint in plain text through a proxy: the proxy itself is asked, with the endpoint's whole URL, and sends
//! the request on (RFC 9112, 3.2.2). Proxies commonly refuse `CONNECT` to ports other than 443.

use std::io;
use std::sync::Arc;

use http::HeaderValue;
use pingora::upstreams::peer::HttpPeer;

use crate::config::{self, BaseUrl, ProxyScheme};
use crate::upstream::group_key;
use crate::upstream::tunnel::Tunnel;

/// How a proxy is asked to send a request on.
#[derive(Debug)]
pub struct Forward {
    /// What stands before the path: `http://host:port`.
    origin: String,
    /// `Proxy-Authorization`.
    pub login: Option<HeaderValue>,
    /// The peer, which is the proxy.
    pub(super) template: HttpPeer,
}

impl Forward {
    /// Returns it if the endpoint is spoken to in plain text through a proxy that speaks HTTP. `tunnelled` is the peer of
    /// the other way.
    pub(super) fn new(endpoint: &config::Endpoint, base: &BaseUrl, tunnelled: &HttpPeer) -> io::Result<Option<Self>> {
        let Some(proxy) = &endpoint.proxy else { return Ok(None) };
        // Between a proxy and its client there is no HTTP/2 in plain text.
        if base.tls || endpoint.http2 == Some(true) || proxy.scheme == ProxyScheme::Socks5 {
            return Ok(None);
        }
        let mut template = tunnelled.clone();
        template.options.custom_l4 = match proxy.scheme {
            ProxyScheme::Https => Some(Arc::new(Tunnel::new(proxy.clone(), None)?)),
            ProxyScheme::Http | ProxyScheme::Socks5 => None,
        };
        // Its connections carry requests to any endpoint, but with one login; and none may be taken for a tunnel.
        template.group_key = group_key(&("forward", proxy.to_string(), proxy.login.as_ref().map(|login| &login.0)));
        let login = proxy.basic().map(|basic| HeaderValue::from_str(&basic)).transpose().map_err(io::Error::other)?;
        let login = login.map(|mut login| {
            login.set_sensitive(true);
            login
        });
        Ok(Some(Self { origin: format!("http://{}", base.authority()), login, template }))
    }

    /// The target of a request to the endpoint.
    pub fn target(&self, path_and_query: &str) -> Vec<u8> {
        [self.origin.as_bytes(), path_and_query.as_bytes()].concat()
    }
}
