//! A running process is replaced by the binary that now lies where its own lay, without a request being lost.
//!
//! ```text
//! api-together upgrade                the running process                     its successor
//! ── SIGUSR2 ───────────────────────► checks: binary --test
//!                                     starts: binary --upgrade ─────────────► waits at the upgrade socket
//!                                     SIGQUIT to itself: hands its sockets over ──► serves, writes running.json
//! ◄── outcome.json ────────────────── finishes what it has, leaves
//! ```
//!
//! The running process starts its successor itself, so that it has the same environment, user, sandbox, control group and log. Until
//! the last step nothing has changed, and whatever fails leaves the running process as it was.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use pingora::server::ShutdownWatch;
use pingora::services::background::BackgroundService;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

/// File in the runtime folder that describes the running process.
const RUNNING_FILE: &str = "running.json";
/// File with the result of the last upgrade.
const OUTCOME_FILE: &str = "outcome.json";
/// Longest time of the check by the new binary; a longer one has failed.
const CHECK_MAX: Duration = Duration::from_secs(30);
/// Longest time until a successor waits for the sockets.
const START_MAX: Duration = Duration::from_secs(20);
/// Longest time of an upgrade as a whole, for the command that asked for it.
const UPGRADE_MAX: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(20);
/// Bytes of the output of a failing program that are kept, from its end.
const TOLD_BYTES_MAX: usize = 4000;

/// Description of the running process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// The process.
    pub pid: u32,
    /// When it began, in the kernel's ticks since boot, since a pid is used again.
    began: u64,
    /// Listening address.
    pub address: SocketAddr,
    /// Version.
    pub version: String,
    /// True if it listens with TLS.
    pub tls: bool,
}

/// Result of an upgrade.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct HandoverResult {
    /// The successor, if one took over.
    pid: Option<u32>,
    /// Error, if no successor took over.
    error: Option<String>,
}

/// Creates a folder that only its owner can look into.
pub fn make_private(folder: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))
}

impl Running {
    /// This process.
    pub fn this(address: SocketAddr, tls: bool) -> Self {
        let pid = std::process::id();
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self { pid, began: began(pid).unwrap_or_default(), address, version, tls }
    }

    /// Writes it into the runtime folder, for commands that upgrade or signal the process.
    pub fn write(&self, folder: &Path) -> std::io::Result<()> {
        write(&folder.join(RUNNING_FILE), self)
    }

    /// The process that runs from this runtime folder, if one does.
    pub fn read(folder: &Path) -> Option<Self> {
        let running: Self = read(&folder.join(RUNNING_FILE))?;
        running.is_alive().then_some(running)
    }

    fn is_alive(&self) -> bool {
        began(self.pid) == Some(self.began) && pid_of(self.pid).is_some_and(|pid| test_kill_process(pid).is_ok())
    }
}

/// The 22nd field of `/proc/PID/stat`; the second, a name in brackets, may have anything in it.
fn began(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn pid_of(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(pid).ok()?)
}

/// Written whole or not at all.
fn write<T: Serialize>(path: &Path, value: &T) -> std::io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
    file.write_all(serde_json::to_string(value)?.as_bytes())?;
    std::fs::rename(&fresh, path)
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
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
            let outcome = match started.unwrap_or_else(|error| Err(error.to_string())) {
                Ok(pid) => HandoverResult { pid: Some(pid), error: None },
                Err(error) => HandoverResult { pid: None, error: Some(error) },
            };
            if let Err(error) = write(&self.runtime_folder.join(OUTCOME_FILE), &outcome) {
                log::error!("{}: {error}", self.runtime_folder.display());
            }
            match outcome {
                HandoverResult { error: Some(error), .. } => {
                    log::error!("upgrade failed, this process keeps serving: {error}");
                }
                HandoverResult { pid, .. } => {
                    log::info!("upgrade: process {} takes over", pid.unwrap_or_default());
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
        // A socket that an earlier one left would look like the new one's.
        std::fs::remove_file(&self.upgrade_sock).unwrap_or_default();
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .arg("--upgrade")
            .current_dir(&self.start_folder)
            .stdin(Stdio::null())
            .spawn()
            .map_err(|error| format!("{} cannot be started: {error}", self.program.display()))?;
        let begun = Instant::now();
        while !self.upgrade_sock.exists() {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(format!("the new process ended at its start ({status}); what it said is in the log"));
            }
            if begun.elapsed() > START_MAX {
                end(&mut child);
                return Err(format!("the new process did not come up within {} s", START_MAX.as_secs()));
            }
            std::thread::sleep(POLL);
        }
        // It may end just after; this is the last check before the sockets are handed over.
        std::thread::sleep(POLL);
        match child.try_wait() {
            Ok(None) => Ok(child.id()),
            _ => Err("the new process ended just after its start; what it said is in the log".into()),
        }
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
        let begun = Instant::now();
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if begun.elapsed() < CHECK_MAX => std::thread::sleep(POLL),
                Ok(None) => {
                    end(&mut child);
                    return Err(format!("the new program's check took more than {} s", CHECK_MAX.as_secs()));
                }
                Err(error) => return Err(format!("the new program's check: {error}")),
            }
        };
        let (told, complaint) = (all(child.stdout.take()), all(child.stderr.take()));
        if !status.success() {
            return Err(format!("the new program's check failed ({status}): {}", complaint.trim()));
        }
        let listens: Option<SocketAddr> =
            told.lines().find_map(|line| line.strip_prefix(LISTENS)).and_then(|text| text.trim().parse().ok());
        let metrics: Option<SocketAddr> =
            told.lines().find_map(|line| line.strip_prefix(METRICS_ON)).and_then(|text| text.trim().parse().ok());
        if let Some(address) = metrics.filter(|_| metrics != self.metrics_listen) {
            std::net::TcpListener::bind(address)
                .map_err(|error| format!("server.metricsListen: {address} cannot be listened on: {error}"))?;
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
    let shown = || folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(" or ");
    let nobody = || format!("no process runs from {}; start one, or name its config with --config", shown());
    let found = folders.iter().find_map(|folder| Some((folder, Running::read(folder)?)));
    let (folder, old) = found.ok_or_else(nobody)?;
    let pid = pid_of(old.pid).ok_or_else(nobody)?;
    let outcome_file = folder.join(OUTCOME_FILE);
    std::fs::remove_file(&outcome_file).unwrap_or_default();
    kill_process(pid, Signal::USR2).map_err(|error| format!("process {} cannot be signalled: {error}", old.pid))?;
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
        if let Some(new) = Running::read(folder).filter(|running| Some(running.pid) == outcome.pid)
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
    let Ok(mut stream) = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(2)) else { return false };
    if running.tls {
        return true;
    }
    let asked = stream
        .set_read_timeout(Some(Duration::from_secs(2)))
        .and_then(|()| stream.write_all(b"GET /health HTTP/1.0\r\nhost: localhost\r\n\r\n"));
    let mut answer = [0; 12];
    asked.is_ok() && stream.read_exact(&mut answer).is_ok() && answer.ends_with(b" 200")
}
