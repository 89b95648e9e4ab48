//! Delays the header of a request in its socket until its body is there, so that both leave in one packet.
//!
//! Pingora writes the header, and then the body. On a connection without delay, which this one has to be, that is two packets, and a
//! packet costs more than all that is done with a small request here.

#![expect(unsafe_code, reason = "Pingora hands out the number of an upstream connection's socket, and no more")]

use std::os::fd::{BorrowedFd, RawFd};

use socket2::SockRef;

/// The socket of a connection to an endpoint, as Pingora names it for the time of one exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cork(RawFd);

impl Cork {
    /// Delays bytes that do not fill a packet; without anything to wait for, switches the delay off. The kernel
    /// sends them by itself after 200 ms.
    pub fn put_in(socket: RawFd, waits: bool) -> Option<Self> {
        let cork = Self(socket);
        (cork.set(waits) && waits).then_some(cork)
    }

    /// Sends the delayed bytes, and switches the delay off.
    pub fn pull(self) {
        self.set(false);
    }

    /// False where the system has no such thing; then header and body leave one after the other.
    #[cfg(target_os = "linux")]
    fn set(self, on: bool) -> bool {
        // A bridge to a proxy is no TCP socket.
        if self.0 < 0 {
            return false;
        }
        // SAFETY: the connection that Pingora has named is the exchange's until it ends, and nothing else closes it meanwhile. A
        // closed descriptor makes the call fail, and one that is another socket's sends the bytes which that one holds.
        let socket = unsafe { BorrowedFd::borrow_raw(self.0) };
        SockRef::from(&socket).set_tcp_cork(on).is_ok()
    }

    #[cfg(not(target_os = "linux"))]
    fn set(self, _on: bool) -> bool {
        false
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd as _;

    #[test]
    fn header_and_body_arrive_together() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        ours.set_nodelay(true).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        let mut read = [0; 20];
        let cork = Cork::put_in(ours.as_raw_fd(), true).expect("it is a TCP socket");
        ours.write_all(b"header").unwrap();
        theirs.set_nonblocking(true).unwrap();
        assert!(theirs.read(&mut read).is_err(), "it is kept back");
        ours.write_all(b"body").unwrap();
        cork.pull();
        theirs.set_nonblocking(false).unwrap();
        assert_eq!(theirs.read(&mut read).unwrap(), 10);
        assert_eq!(Cork::put_in(ours.as_raw_fd(), false), None);
        ours.write_all(b"header").unwrap();
        assert_eq!(theirs.read(&mut read).unwrap(), 6, "a request without a body waits for nothing");
        assert_eq!(Cork::put_in(-1, true), None);
    }
}
