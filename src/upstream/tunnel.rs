//! The way to an endpoint through a proxy: a connection to the proxy, which makes one to the endpoint and passes bytes on.
//! Without an endpoint it ends at the proxy.

use std::fmt;
use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use pingora::connectors::l4::Connect;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::l4::stream::Stream;
use pingora::tls::{ClientConfig, RootCertStore, ServerName, TlsConnector, load_platform_certs_incl_env_into_store};
use pingora::{Error, ErrorType, Result};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_socks::tcp::Socks5Stream;

use crate::config::{Proxy, ProxyScheme};

/// No proxy answers a CONNECT with more than that.
const ANSWER_BYTES_MAX: usize = 8 * 1024;

/// Connects to one endpoint through one proxy, or to the proxy itself.
pub(super) struct Tunnel {
    proxy: Proxy,
    /// The endpoint's host and port, if the tunnel goes on to one.
    to: Option<(String, u16)>,
    /// TLS settings for a proxy that is spoken to in TLS.
    tls: Option<TlsConnector>,
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tunnel({self})")
    }
}

impl fmt::Display for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.to {
            Some((host, port)) => write!(f, "proxy {} to {host}:{port}", self.proxy),
            None => write!(f, "proxy {}", self.proxy),
        }
    }
}

impl Tunnel {
    /// Returns the tunnel to this endpoint through this proxy, or to the proxy.
    pub(super) fn new(proxy: Proxy, to: Option<(String, u16)>) -> io::Result<Self> {
        let tls = match proxy.scheme {
            ProxyScheme::Https => Some(connector()?),
            ProxyScheme::Http | ProxyScheme::Socks5 => None,
        };
        Ok(Self { proxy, to, tls })
    }

    async fn open(&self, address: std::net::SocketAddr) -> io::Result<Stream> {
        let stream = TcpStream::connect(address).await?;
        match (self.proxy.scheme, &self.tls, &self.to) {
            (ProxyScheme::Socks5, _, Some((host, port))) => Ok(self.socks(stream, (host, *port)).await?.into()),
            (_, None, to) => {
                let mut stream = stream;
                if let Some((host, port)) = to {
                    self.connect_through(&mut stream, (host, *port)).await?;
                }
                Ok(stream.into())
            }
            (_, Some(tls), to) => {
                let name = ServerName::try_from(self.proxy.host.clone()).map_err(io::Error::other)?;
                let mut stream = tls.connect(name, stream).await?;
                if let Some((host, port)) = to {
                    self.connect_through(&mut stream, (host, *port)).await?;
                }
                Ok(bridge(stream)?.into())
            }
        }
    }

    async fn socks(&self, stream: TcpStream, target: (&str, u16)) -> io::Result<TcpStream> {
        let connected = match &self.proxy.login {
            None => Socks5Stream::connect_with_socket(stream, target).await,
            Some((user, password)) => {
                Socks5Stream::connect_with_password_and_socket(stream, target, user, password.expose()).await
            }
        };
        connected.map(Socks5Stream::into_inner).map_err(io::Error::other)
    }

    /// RFC 9110, 9.3.6.
    async fn connect_through<S>(&self, stream: &mut S, (host, port): (&str, u16)) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        let mut request = format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n");
        if let Some(login) = self.proxy.basic() {
            request.push_str("Proxy-Authorization: ");
            request.push_str(&login);
            request.push_str("\r\n");
        }
        stream.write_all((request + "\r\n").as_bytes()).await?;
        let mut answer = Vec::new();
        // Byte by byte: what follows the header is the endpoint's.
        while !answer.ends_with(b"\r\n\r\n") {
            if answer.len() >= ANSWER_BYTES_MAX {
                return Err(io::Error::other("it answers CONNECT with more than a header"));
            }
            answer.push(stream.read_u8().await?);
        }
        let line = String::from_utf8_lossy(answer.split(|byte| *byte == b'\r').next().unwrap_or_default()).into_owned();
        let status = line.split(' ').nth(1).unwrap_or_default();
        match status {
            _ if status.len() == 3 && status.starts_with('2') => Ok(()),
            "407" => Err(io::Error::other("it wants another user and password (407)")),
            _ => Err(io::Error::other(format!("it refuses CONNECT: {line:.100}"))),
        }
    }
}

#[async_trait]
impl Connect for Tunnel {
    async fn connect(&self, address: &SocketAddr) -> Result<Stream> {
        let Some(address) = address.as_inet() else {
            return Error::e_explain(ErrorType::InternalError, "a proxy has an address of the internet");
        };
        self.open(*address).await.map_err(|error| Error::explain(ErrorType::ConnectError, format!("{self}: {error}")))
    }
}

fn connector() -> io::Result<TlsConnector> {
    pingora::tls::install_default_crypto_provider();
    let mut roots = RootCertStore::empty();
    load_platform_certs_incl_env_into_store(&mut roots).map_err(io::Error::other)?;
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Pingora wants a socket of the system. What goes through this one goes through the TLS stream, until either side ends.
fn bridge<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(mut through: S) -> io::Result<UnixStream> {
    let (ours, mut theirs) = UnixStream::pair()?;
    tokio::spawn(async move {
        // However it ends, both are closed.
        tokio::io::copy_bidirectional(&mut theirs, &mut through).await.map(drop).unwrap_or_default();
    });
    Ok(ours)
}
