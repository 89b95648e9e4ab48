//! A bare Pingora proxy: it sends every request to one address. It has the same features of Pingora as api-together, as many threads,
//! and the same kind of listener.

use std::net::{Ipv4Addr, SocketAddr};

use async_trait::async_trait;
use pingora::Result;
use pingora::apps::HttpServerOptions;
use pingora::server::Server;
use pingora::server::configuration::ServerConf;
use pingora::upstreams::peer::HttpPeer;
use pingora_proxy::{ProxyHttp, ProxyServiceBuilder, Session};

struct Bare(SocketAddr);

#[async_trait]
impl ProxyHttp for Bare {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, _session: &mut Session, (): &mut ()) -> Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(self.0, false, String::new())))
    }
}

pub(crate) fn main() {
    let mut ports = std::env::args().skip(1).filter_map(|port| port.parse::<u16>().ok());
    let (Some(port), Some(upstream)) = (ports.next(), ports.next()) else {
        eprintln!("usage: bare PORT UPSTREAM_PORT");
        std::process::exit(2);
    };
    let conf = ServerConf {
        threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    let mut http = HttpServerOptions::default();
    http.h2c = true;
    let bare = Bare((Ipv4Addr::LOCALHOST, upstream).into());
    let mut service = ProxyServiceBuilder::new(&server.configuration, bare).name("bare").server_options(http).build();
    service.add_tcp(&format!("127.0.0.1:{port}"));
    server.add_service(service);
    server.run_forever();
}
