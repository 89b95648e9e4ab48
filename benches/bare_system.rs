//! The same with the system's allocator, the yardstick for memory: `bare_system PORT UPSTREAM_PORT`.

#[path = "bare/proxy.rs"]
mod proxy;

fn main() {
    proxy::main();
}
