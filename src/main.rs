//! The `api-together` program. What it does is in the library.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The commit that the program was built from, if the build knew it. Here, so that the library is not built anew for each.
const COMMIT: Option<&str> = option_env!("API_TOGETHER_COMMIT");

fn main() -> ExitCode {
    // The allocator has the kernel back its memory with pages of 2 MiB, of which most streams touch a few KiB. A kernel that
    // cannot do without them only costs memory.
    #[cfg(target_os = "linux")]
    rustix::thread::disable_transparent_huge_pages(true).unwrap_or_default();
    api_together::cli::run(COMMIT)
}
