//! A running process is replaced by the binary that now lies where its own lay, without a request being lost.
//!
//! ```text
//! api-together upgrade        the running process              a starter                 its successor
//! ── SIGUSR2 ───────────────► checks: binary --test
//!                             starts: itself, start-successor ► starts: binary --upgrade ► waits at the upgrade socket
//!                                                               says so, and ends
//!                             SIGQUIT to itself: hands its sockets over ─────────────────► serves, writes running.json
//! ◄── outcome.json ────────── finishes what it has, leaves
//! ```
//!
//! The running process starts its successor itself, so that it has the same environment, user, sandbox, control group and log. Until
//! the last step nothing has changed, and whatever fails leaves the running process as it was.
//!
//! The starter is between them because systemd takes a main process that is not its own child for somebody else's: it does not wait
//! for its end, and kills it at once when the service is stopped. When the starter ends, the successor becomes the child of systemd.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use pingora::server::ShutdownWatch;
use pingora::services::background::BackgroundService;
use rustix::process::{Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

use super::runtime_folder::{Found, Running, began, read, write};
use crate::console::Console;
use crate::console::sessions::KeptSessions;
use crate::request::auth::Auth;
use crate::request::guesses::RightAddresses;

/// File with the result of the last upgrade.
const OUTCOME_FILE: &str = "outcome.json";
/// File with which the starter says what came of it.
const STARTED_FILE: &str = "started.json";
/// File with the addresses that have been right, for the successor.
const CALLERS_FILE: &str = "callers.json";
/// Longest time of the check by the new binary; a longer one has failed.
const CHECK_MAX: Duration = Duration::from_secs(30);
/// Longest time until a successor waits for the sockets.
const START_MAX: Duration = Duration::from_secs(20);
/// Longest time of the starter, which has a bound of its own.
const STARTER_MAX: Duration = START_MAX.saturating_add(Duration::from_secs(5));
/// Longest time of an upgrade as a whole, for the command that asked for it.
const UPGRADE_MAX: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(20);
/// Bytes of the output of a failing program that are kept, from its end.
const TOLD_BYTES_MAX: usize = 4000;

/// Result of an upgrade, or of the start of a successor.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct HandoverResult {
    /// The successor, if one took over.
    pid: Option<u32>,
    /// Error, if no successor took over.
    error: Option<String>,
}

impl From<Result<u32, String>> for HandoverResult {
    fn from(result: Result<u32, String>) -> Self {
        match result {
            Ok(pid) => Self { pid: Some(pid), error: None },
            Err(error) => Self { pid: None, error: Some(error) },
        }
    }
}

/// Replaces this process at SIGUSR2.
#[derive(Clone, Debug)]
pub struct Successor {
    /// The program, where it lay when this process was started.
    pub program: PathBuf,
    /// Arguments, without those that say how to take over.
    pub arguments: Vec<OsString>,
    /// Folder that this process was started in, whatever folder it is in now.
    pub start_folder: PathBuf,
    /// Socket at which the successor waits.
    pub upgrade_sock: PathBuf,
    /// Runtime folder of both.
    pub runtime_folder: PathBuf,
    /// Listening address of this process.
    pub address: SocketAddr,
    /// Listening address for metrics.
    pub metrics_listen: Option<SocketAddr>,
    /// Listening address for the page and the admin API.
    pub admin_listen: Option<SocketAddr>,
    /// What it knows of addresses.
    pub auth: Auth,
    /// The admin API, whose sessions its successor takes over.
    pub(super) console: Arc<Console>,
}

#[async_trait]
impl BackgroundService for Successor {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        let Ok(mut asked) = signal(SignalKind::user_defined2())
            .inspect_err(|error| log::error!("SIGUSR2 cannot be heard, so no upgrade is possible: {error}"))
        else {
            return;
        };
        loop {
            tokio::select! {
                _ = asked.recv() => {}
                _ = shutdown.changed() => return,
            }
            let this = self.clone();
            let started = tokio::task::spawn_blocking(move || this.start_successor()).await;
            let outcome = HandoverResult::from(started.unwrap_or_else(|error| Err(error.to_string())));
            if let Err(error) = write(&self.runtime_folder.join(OUTCOME_FILE), &outcome) {
                log::error!("{}: {error}", self.runtime_folder.display());
            }
            match outcome {
                HandoverResult { error: Some(error), .. } => {
                    log::error!("upgrade failed, this process keeps serving: {error}");
                }
                HandoverResult { pid, .. } => {
                    log::info!("upgrade: process {} takes over", pid.unwrap_or_default());
                    let callers = self.runtime_folder.join(CALLERS_FILE);
                    if let Err(error) = write(&callers, &KnownCallers::of(&self.auth, &self.console)) {
                        log::warn!("{}: {error}", callers.display());
                    }
                    // From here on Pingora hands the sockets over.
                    if let Err(error) = kill_process(rustix::process::getpid(), Signal::QUIT) {
                        log::error!("upgrade: this process cannot signal itself: {error}");
                    }
                    return;
                }
            }
        }
    }
}

impl Successor {
    /// Starts a process that waits for the sockets. Everything that can be wrong with it is found before.
    fn start_successor(&self) -> Result<u32, String> {
        log::info!("upgrade: checking {}", self.program.display());
        self.check()?;
        // What an earlier one left would look like the new one's.
        let result = self.runtime_folder.join(STARTED_FILE);
        for left in [&self.upgrade_sock, &result] {
            std::fs::remove_file(left).unwrap_or_default();
        }
        let cannot = |error: std::io::Error| format!("the successor's starter cannot be started: {error}");
        // This process's own program, whatever lies in its place by now.
        let mut starter = Command::new("/proc/self/exe")
            .arg("start-successor")
            .arg("--result")
            .arg(&result)
            .arg("--socket")
            .arg(&self.upgrade_sock)
            .arg("--")
            .arg(&self.program)
            .args(&self.arguments)
            .arg("--upgrade")
            .current_dir(&self.start_folder)
            .stdin(Stdio::null())
            .spawn()
            .map_err(cannot)?;
        let status = end_within(&mut starter, STARTER_MAX).map_err(cannot)?;
        let outcome: HandoverResult = read(&result).ok_or_else(|| match status {
            Some(status) => format!("the successor's starter ended without a word ({status})"),
            None => format!("the successor's starter took more than {} s", STARTER_MAX.as_secs()),
        })?;
        let pid = match outcome {
            HandoverResult { pid: Some(pid), error: None } => pid,
            HandoverResult { error, .. } => return Err(error.unwrap_or_default()),
        };
        // It may end just after; this is the last check before the sockets are handed over.
        std::thread::sleep(POLL);
        began(pid).ok_or("the new process ended just after its start; what it said is in the log")?;
        Ok(pid)
    }

    /// Has the new program check the config, and itself.
    fn check(&self) -> Result<(), String> {
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .arg("--test")
            .current_dir(&self.start_folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{} cannot be started: {error}", self.program.display()))?;
        let status = end_within(&mut child, CHECK_MAX)
            .map_err(|error| format!("the new program's check: {error}"))?
            .ok_or_else(|| format!("the new program's check took more than {} s", CHECK_MAX.as_secs()))?;
        let (told, complaint) = (all(child.stdout.take()), all(child.stderr.take()));
        if !status.success() {
            return Err(format!("the new program's check failed ({status}): {}", complaint.trim()));
        }
        let listens: Option<SocketAddr> =
            told.lines().find_map(|line| line.strip_prefix(LISTENS)).and_then(|text| text.trim().parse().ok());
        let others = [
            ("server.metricsListen", METRICS_ON, self.metrics_listen),
            ("server.adminListen", ADMIN_ON, self.admin_listen),
        ];
        for (setting, prefix, now) in others {
            let then =
                told.lines().find_map(|line| line.strip_prefix(prefix)).and_then(|text| text.trim().parse().ok());
            if let Some(address) = then.filter(|_| then != now) {
                TcpListener::bind(address)
                    .map_err(|error| format!("{setting}: {address} cannot be listened on: {error}"))?;
            }
        }
        match listens {
            Some(address) if address == self.address => Ok(()),
            Some(address) => Err(format!(
                "the config asks for {address}, and this process listens on {}: sockets can be handed over, but not changed; \
                 change the address back, or restart",
                self.address
            )),
            None => Err("the new program does not say where it would listen".into()),
        }
    }
}

/// Text before the listening address in the output of `--test`.
pub const LISTENS: &str = "would listen on ";
/// Text before the address of the metrics.
pub const METRICS_ON: &str = "would tell metrics on ";
/// Text before the address of the page and the admin API.
pub const ADMIN_ON: &str = "would serve the admin API on ";

/// A process between this one and its successor, which ends as soon as the successor is ready for the sockets.
#[derive(Debug)]
pub struct Starter {
    /// File to say in what came of it.
    pub result: PathBuf,
    /// Socket at which the successor waits.
    pub socket: PathBuf,
    /// The successor's program, and its arguments.
    pub command: Vec<OsString>,
}

impl Starter {
    /// Starts the successor, and waits until it is ready or has ended.
    pub fn run(&self) -> Result<(), String> {
        let result = HandoverResult::from(self.start());
        write(&self.result, &result).map_err(|error| format!("{}: {error}", self.result.display()))
    }

    fn start(&self) -> Result<u32, String> {
        let (program, arguments) = self.command.split_first().ok_or("no program is named")?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .map_err(|error| format!("{} cannot be started: {error}", Path::new(program).display()))?;
        let begun = Instant::now();
        while !self.socket.exists() {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(format!("the new process ended at its start ({status}); what it said is in the log"));
            }
            if begun.elapsed() > START_MAX {
                end(&mut child);
                return Err(format!("the new process did not come up within {} s", START_MAX.as_secs()));
            }
            std::thread::sleep(POLL);
        }
        Ok(child.id())
    }
}

/// What a process knows of those who call it.
#[derive(Serialize, Deserialize)]
struct KnownCallers {
    /// Addresses that have been right with a client's key.
    #[serde(flatten)]
    clients: RightAddresses,
    /// Those that have been right with the admin key. Older versions do not say.
    #[serde(default)]
    admins: Option<RightAddresses>,
    /// Sessions of the page.
    #[serde(default)]
    sessions: KeptSessions,
}

impl KnownCallers {
    fn of(auth: &Auth, console: &Console) -> Self {
        Self {
            clients: auth.guesses.right_addresses(),
            admins: Some(auth.admin_guesses.right_addresses()),
            sessions: console.sessions.kept(),
        }
    }
}

/// A successor takes over what its predecessor knew of those who call it.
pub(super) fn take_callers_over(runtime_folder: &Path, auth: &Auth, console: &Console) {
    let file = runtime_folder.join(CALLERS_FILE);
    if let Some(KnownCallers { clients, admins, sessions }) = read(&file) {
        auth.guesses.take_over(&clients);
        if let Some(admins) = &admins {
            auth.admin_guesses.take_over(admins);
        }
        console.sessions.take_over(sessions);
        std::fs::remove_file(&file).unwrap_or_default();
    }
}

/// A successor waits for the sockets of a running process. If that process ends before it hands them over, the address becomes free;
/// the successor is then handed nothing, and makes sockets of its own. Watches until the returned flag is set.
pub(super) fn do_without_a_predecessor(address: SocketAddr, upgrade_sock: PathBuf) -> Arc<AtomicBool> {
    let has_sockets = Arc::new(AtomicBool::new(false));
    let done = Arc::clone(&has_sockets);
    let watch = move || {
        let begun = Instant::now();
        while begun.elapsed() < START_MAX && !done.load(Ordering::Relaxed) {
            let is_free = upgrade_sock.exists() && TcpListener::bind(address).is_ok();
            if is_free && UnixStream::connect(&upgrade_sock).is_ok() {
                log::warn!("nobody listens on {address} any more, so this process does without being handed a socket");
                return;
            }
            std::thread::sleep(POLL);
        }
    };
    if let Err(error) = std::thread::Builder::new().name("predecessor".into()).spawn(watch) {
        log::warn!("whether the running process ends is not watched: {error}");
    }
    has_sockets
}

/// Waits for the end of a child, and ends it after this time. Returns none in that case.
fn end_within(child: &mut Child, longest: Duration) -> std::io::Result<Option<ExitStatus>> {
    let begun = Instant::now();
    loop {
        match child.try_wait()? {
            Some(status) => return Ok(Some(status)),
            None if begun.elapsed() < longest => std::thread::sleep(POLL),
            None => {
                end(child);
                return Ok(None);
            }
        }
    }
}

fn end(child: &mut Child) {
    // It may have ended by itself.
    child.kill().unwrap_or_default();
    child.wait().map(drop).unwrap_or_default();
}

fn all(from: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(from) = from {
        from.take(TOLD_BYTES_MAX as u64).read_to_end(&mut bytes).unwrap_or_default();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Asks the process that runs from the first of these folders from which one does to be replaced, and waits until its successor
/// serves. Returns what to say.
pub fn ask(folders: &[PathBuf]) -> Result<String, String> {
    let found = Found::in_one_of(folders)?;
    let old = &found.running;
    let outcome_file = found.folder.join(OUTCOME_FILE);
    std::fs::remove_file(&outcome_file).unwrap_or_default();
    found.signal(Signal::USR2)?;
    let begun = Instant::now();
    let wait = |what: &str| {
        std::thread::sleep(POLL);
        if begun.elapsed() < UPGRADE_MAX { Ok(()) } else { Err(format!("{what}; process {} may still serve", old.pid)) }
    };
    let outcome: HandoverResult = loop {
        if let Some(outcome) = read(&outcome_file) {
            break outcome;
        }
        if !old.is_alive() {
            return Err(format!("process {} has ended meanwhile", old.pid));
        }
        wait("it does not answer")?;
    };
    if let Some(error) = outcome.error {
        return Err(format!("process {} keeps serving: {error}", old.pid));
    }
    loop {
        if let Some(new) = Running::read(found.folder).filter(|running| Some(running.pid) == outcome.pid)
            && is_healthy(&new)
        {
            return Ok(format!(
                "process {} (version {}) has taken over from {} (version {}), which leaves when its last request has ended",
                new.pid, new.version, old.pid, old.version
            ));
        }
        wait("its successor does not serve yet")?;
    }
}

/// True if it answers. With TLS an established connection is enough.
fn is_healthy(running: &Running) -> bool {
    let address = crate::server::callable(running.address);
    let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(2)) else { return false };
    if running.tls {
        return true;
    }
    let asked = stream
        .set_read_timeout(Some(Duration::from_secs(2)))
        .and_then(|()| stream.write_all(b"GET /health HTTP/1.0\r\nhost: localhost\r\n\r\n"));
    let mut answer = [0; 12];
    asked.is_ok() && stream.read_exact(&mut answer).is_ok() && answer.ends_with(b" 200")
}
