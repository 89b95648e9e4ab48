//! Notifies systemd of the process's state (`Type=notify`), if it asks for that.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;

/// The process serves; it is the service's main process from now on.
pub(super) fn ready() {
    tell(&format!("READY=1\nMAINPID={}\n", std::process::id()));
}

/// The process finishes its open requests, and takes no more.
pub(super) fn stopping() {
    tell("STOPPING=1\n");
}

fn tell(what: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(Path::new(&path)),
    };
    let told = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(what.as_bytes(), &address));
    if let Err(error) = told {
        log::warn!("systemd cannot be told {}: {error}", what.lines().next().unwrap_or_default());
    }
}
