//! A bare Pingora proxy, the yardstick of the benchmarks, with the allocator and the build profile of api-together:
//! `bare PORT UPSTREAM_PORT`.

#[path = "bare/proxy.rs"]
mod proxy;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    #[cfg(target_os = "linux")]
    rustix::thread::disable_transparent_huge_pages(true).unwrap_or_default();
    proxy::main();
}
