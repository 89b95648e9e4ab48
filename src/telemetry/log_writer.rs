//! Log lines, written a little later and many at once, so that no request waits for the reader of the log.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::mem;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::FileType;

/// Longest time between a line and its write; a process that is killed loses no more than that.
const WRITE_BEHIND: Duration = Duration::from_millis(10);
/// Most bytes that wait. Beyond them a request with a line writes them all: a log that is read too slowly slows requests down,
/// and loses nothing.
const WAITING_BYTES_MAX: usize = 1024 * 1024;

static WAITING: WaitingLines =
    WaitingLines { lines: Mutex::new(WriterState::new()), came: Condvar::new(), writing: Mutex::new(()) };

struct WaitingLines {
    lines: Mutex<WriterState>,
    came: Condvar,
    /// Held while lines are written, so that none overtakes another.
    writing: Mutex<()>,
}

struct WriterState {
    bytes: Vec<u8>,
    /// True once a thread is there to write them.
    behind: bool,
}

impl WriterState {
    const fn new() -> Self {
        Self { bytes: Vec::new(), behind: false }
    }
}

/// Starts the thread; from here on lines may wait. Call it in the process that serves: a thread does not survive
/// daemonizing.
pub(crate) fn start() {
    let mut state = lock(&WAITING.lines);
    if state.behind {
        return;
    }
    match std::thread::Builder::new().name("log".into()).spawn(write_behind) {
        Ok(_) => state.behind = true,
        Err(error) => {
            drop(state);
            log::warn!("the log's thread cannot be started, so requests write their own lines: {error}");
        }
    }
}

/// Writes what waits.
pub(crate) fn flush() {
    let _writing = lock(&WAITING.writing);
    let bytes = mem::take(&mut lock(&WAITING.lines).bytes);
    write(&bytes);
}

/// The file that the log goes to, if it is one.
pub(crate) fn file() -> Option<PathBuf> {
    let stderr = io::stderr();
    let is_file = FileType::from_raw_mode(rustix::fs::fstat(&stderr).ok()?.st_mode) == FileType::RegularFile;
    is_file.then(|| std::fs::read_link(format!("/proc/self/fd/{}", stderr.as_raw_fd())).ok()).flatten()
}

/// Goes on in a file of this name, whatever has become of the one that it had. No line is cut.
pub(crate) fn reopen(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().append(true).create(true).mode(0o640).open(path)?;
    let _writing = lock(&WAITING.writing);
    rustix::stdio::dup2_stderr(file).map_err(io::Error::from)
}

fn write_behind() {
    // What was written is room for what comes next.
    let mut bytes = Vec::new();
    loop {
        let state = lock(&WAITING.lines);
        drop(WAITING.came.wait_while(state, |state| state.bytes.is_empty()).unwrap_or_else(PoisonError::into_inner));
        std::thread::sleep(WRITE_BEHIND);
        let _writing = lock(&WAITING.writing);
        mem::swap(&mut bytes, &mut lock(&WAITING.lines).bytes);
        write(&bytes);
        bytes.clear();
    }
}

/// There is no other place to report a log that cannot be written.
fn write(bytes: &[u8]) {
    if !bytes.is_empty() {
        io::stderr().write_all(bytes).unwrap_or_default();
    }
}

/// Takes whole lines in.
#[derive(Debug)]
pub(crate) struct LogPipe;

impl Write for LogPipe {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut state = lock(&WAITING.lines);
        let was_empty = state.bytes.is_empty();
        state.bytes.extend_from_slice(line);
        let waits = state.behind && state.bytes.len() <= WAITING_BYTES_MAX;
        drop(state);
        if !waits {
            flush();
        } else if was_empty {
            WAITING.came.notify_one();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
