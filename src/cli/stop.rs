//! `api-together stop`.

use std::path::PathBuf;
use std::time::Duration;

use anstream::println;

use crate::server::control::{self, Request};
use crate::server::runtime_folder::Found;

/// Time between two looks at a process that ends.
const POLL: Duration = Duration::from_millis(50);

/// Has the running process end, and waits for it. It ends by itself when its grace period is over.
pub(super) fn stop(folders: &[PathBuf], now: bool) -> Result<(), String> {
    let found = Found::in_one_of(folders)?;
    let said = control::ask_found(&found, &Request::Stop { now })?;
    println!("process {}: {said}", found.running.pid);
    while found.running.is_alive() {
        std::thread::sleep(POLL);
    }
    println!("stopped");
    Ok(())
}
