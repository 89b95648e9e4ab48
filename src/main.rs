//! The `api-together` program. What it does is in the library.

use std::process::ExitCode;

use api_together::cli::Cli;
use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // The allocator has the kernel back its memory with pages of 2 MiB, of which most streams touch a few KiB. A kernel that
    // cannot do without them only costs memory.
    #[cfg(target_os = "linux")]
    rustix::thread::disable_transparent_huge_pages(true).unwrap_or_default();
    Cli::parse().execute()
}
