//! A simulated endpoint as a separate process, for benchmarks: `simulator PORT`. It keeps no record of its requests.

use std::net::Ipv4Addr;

use api_together::simulator::{Behaviour, Options, Simulator};
use tokio::net::TcpListener;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let port = std::env::args().nth(1).and_then(|port| port.parse().ok()).unwrap_or(9100);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
    let default = Behaviour { events: 12, ..Behaviour::default() };
    let _running = Simulator::start(listener, Options { default, record: false, ..Options::default() })?;
    std::future::pending().await
}
