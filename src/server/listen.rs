//! Listening sockets.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora::listeners::tls::{Acceptor, TlsSettings};
use pingora::listeners::{L4BufferSettings, ListenerConfig, TcpSocketOptions};

use super::runtime_folder::Running;
use super::{RunOptions, StartError};
use crate::config::Server;
use crate::server::certificate::Certificate;

/// Read buffer of a connection with TLS: rustls reads 4 KiB at once, and a record has up to 16.
const TLS_READ_BUFFER_BYTES: usize = 16 * 1024;

/// Listener for clients.
pub(super) struct Listening {
    pub(super) address: SocketAddr,
    pub(super) certificate: Option<Certificate>,
    /// Keeps a free port ours until Pingora has bound it.
    pub(super) reserved: Option<Arc<socket2::Socket>>,
}

impl Listening {
    /// Prepares the listener of a config; every error of it is found here.
    pub(super) fn new(server: &Server, options: &RunOptions) -> Result<Self, StartError> {
        let certificate = server.tls.as_ref().map(Certificate::new).transpose().map_err(StartError)?;
        let takes_over = options.upgrade || options.test;
        let others = [("server.metricsListen", server.metrics_listen), ("server.adminListen", server.admin_listen)];
        for (setting, address) in others {
            if let Some(address) = address.filter(|_| !takes_over) {
                TcpListener::bind(address)
                    .map_err(|error| StartError(format!("{setting}: {}", explain_bind(address, &error, options))))?;
            }
        }
        let wanted = SocketAddr::new(server.host, server.port);
        let (address, reserved) = if takes_over { (wanted, None) } else { free_address(wanted, options)? };
        Ok(Self { address, certificate, reserved: reserved.map(Arc::new) })
    }

    /// Returns the listener for Pingora. It takes connections only; TLS is the guard's, so that a handshake that does not come takes
    /// no memory.
    pub(super) fn config(&self) -> ListenerConfig {
        self.config_of(self.address, self.reserved.is_some())
    }

    /// The same for another address.
    pub(super) fn config_for(&self, address: SocketAddr) -> ListenerConfig {
        self.config_of(address, false)
    }

    fn config_of(&self, address: SocketAddr, is_reserved: bool) -> ListenerConfig {
        let mut socket = TcpSocketOptions::default();
        socket.so_reuseport = is_reserved.then_some(true);
        // Pingora reads headers and bodies into buffers of their own, so one of the connection's would only be copied from, and its
        // 64 KiB would stay for as long as the connection.
        let buffers =
            L4BufferSettings::default().read(if self.certificate.is_some() { TLS_READ_BUFFER_BYTES } else { 0 });
        ListenerConfig::tcp(address.to_string()).tcp_socket_options(socket).l4_buffer(buffers)
    }

    /// Returns what makes TLS of a connection, if it is asked for.
    pub(super) fn tls(&self) -> Result<Option<Acceptor>, StartError> {
        self.certificate.as_ref().map(|certificate| Ok(tls_settings(certificate.clone())?.build())).transpose()
    }
}

/// Finds out whether the address can be listened on before Pingora tries, which would go on without it. Port 0 becomes a
/// free one, kept until Pingora has it.
fn free_address(wanted: SocketAddr, options: &RunOptions) -> Result<(SocketAddr, Option<socket2::Socket>), StartError> {
    let fail = |error: std::io::Error| StartError(explain_bind(wanted, &error, options));
    if wanted.port() != 0 {
        TcpListener::bind(wanted).map_err(fail)?;
        return Ok((wanted, None));
    }
    let socket =
        socket2::Socket::new(socket2::Domain::for_address(wanted), socket2::Type::STREAM, None).map_err(fail)?;
    socket.set_reuse_address(true).map_err(fail)?;
    socket.set_reuse_port(true).map_err(fail)?;
    socket.bind(&wanted.into()).map_err(fail)?;
    let bound = socket.local_addr().map_err(fail)?.as_socket().unwrap_or(wanted);
    Ok((bound, Some(socket)))
}

fn explain_bind(address: SocketAddr, error: &std::io::Error, options: &RunOptions) -> String {
    let way_out = match error.kind() {
        std::io::ErrorKind::AddrInUse => match who_listens(address, options) {
            Some(who) => {
                return format!(
                    "cannot listen on {address}: {who} does already; with --config of its config, `api-together status` shows it, \
                     `upgrade` replaces it and `stop` ends it; or choose another --port"
                );
            }
            None => "another program listens there; stop it, or choose another server.port (or --port)",
        },
        std::io::ErrorKind::PermissionDenied => {
            "ports below 1024 need privileges; choose another server.port (or --port)"
        }
        std::io::ErrorKind::AddrNotAvailable => "this machine has no such address; see server.host",
        _ => "see server.host and server.port",
    };
    format!("cannot listen on {address}: {error}: {way_out}")
}

/// Names the process of this program that listens on an address: by its runtime folder, or by what it answers.
fn who_listens(address: SocketAddr, options: &RunOptions) -> Option<String> {
    if let Some(running) = Running::read(&options.runtime_folder)
        && running.address.port() == address.port()
    {
        return Some(format!("process {} (api-together {})", running.pid, running.version));
    }
    is_ours(callable(address)).unwrap_or_default().then(|| "another api-together".to_owned())
}

/// True if `/health` is answered as this program does.
fn is_ours(address: SocketAddr) -> std::io::Result<bool> {
    /// Time for each step.
    const PATIENCE: Duration = Duration::from_millis(500);
    /// The answer has a few hundred bytes.
    const BYTES_MAX: usize = 4096;
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
    let (mut answer, begun) = (Vec::new(), Instant::now());
    let mut piece = [0; 512];
    // What came before a time-out may be enough.
    while begun.elapsed() < PATIENCE && answer.len() < BYTES_MAX {
        match stream.read(&mut piece) {
            Ok(0) | Err(_) => break,
            Ok(count) => answer.extend_from_slice(piece.get(..count).unwrap_or_default()),
        }
    }
    Ok(memchr::memmem::find(&answer, br#""service":"api-together""#).is_some())
}

fn tls_settings(certificate: Certificate) -> Result<TlsSettings, StartError> {
    let fail = |error: Box<pingora::Error>| StartError(format!("server.tls: {error}"));
    // With a resolver no paths are looked at.
    let mut settings = TlsSettings::intermediate("", "").map_err(fail)?;
    settings.set_cert_resolver(Arc::new(certificate));
    settings.enable_h2();
    Ok(settings)
}

/// The address by which this machine can call a listener: loopback for one that listens on every address.
pub fn callable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
