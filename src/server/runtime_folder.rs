//! The runtime folder: which process runs, and files that it and its commands leave for each other. Its owner alone may look into it.

use std::ffi::OsStr;
use std::io::Write;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// File that describes the running process.
const RUNNING_FILE: &str = "running.json";
/// What the kernel adds to the path of a running program whose file was replaced.
const REPLACED: &[u8] = b" (deleted)";

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
    /// File that it counts in. Older versions do not say.
    #[serde(default)]
    pub ledger: Option<PathBuf>,
    /// File that it logs requests in, if it does.
    #[serde(default)]
    pub request_log: Option<PathBuf>,
}

impl Running {
    /// This process.
    pub(super) fn this(address: SocketAddr, tls: bool, ledger: &Path, request_log: Option<&Path>) -> Self {
        let pid = std::process::id();
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let ledger = Some(std::path::absolute(ledger).unwrap_or_else(|_| ledger.to_owned()));
        let request_log = request_log.map(ToOwned::to_owned);
        Self { pid, began: began(pid).unwrap_or_default(), address, version, tls, ledger, request_log }
    }

    /// Writes it into the runtime folder, for commands that look for the process.
    pub(super) fn write(&self, folder: &Path) -> std::io::Result<()> {
        write(&folder.join(RUNNING_FILE), self)
    }

    /// The process that runs from this runtime folder, if one does.
    pub fn read(folder: &Path) -> Option<Self> {
        let running: Self = read(&folder.join(RUNNING_FILE))?;
        running.is_alive().then_some(running)
    }

    /// The process as people know it.
    pub fn shown(&self) -> String {
        let Self { pid, address, version, .. } = self;
        format!("process {pid} (api-together {version}), which listens on {address}")
    }

    /// True until it has ended.
    pub fn is_alive(&self) -> bool {
        began(self.pid) == Some(self.began)
    }
}

/// The process that runs from the first of some runtime folders from which one does.
#[derive(Debug)]
pub struct Found<'a> {
    /// The runtime folder.
    pub folder: &'a Path,
    /// The process.
    pub running: Running,
}

impl<'a> Found<'a> {
    /// Looks into each of these folders. Returns what to say if no process runs from any of them.
    pub fn in_one_of(folders: &'a [PathBuf]) -> Result<Self, String> {
        Self::look(folders)?.ok_or_else(|| {
            let shown = folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(" or ");
            format!("no process runs from {shown}; start one, or name its config with --config")
        })
    }

    /// The same; none if no process runs. An error says why that cannot be found out.
    pub fn look(folders: &'a [PathBuf]) -> Result<Option<Self>, String> {
        for folder in folders {
            if let Some(running) = Running::read(folder) {
                return Ok(Some(Self { folder, running }));
            }
            let file = folder.join(RUNNING_FILE);
            if let Err(error) = std::fs::File::open(&file)
                && error.kind() == std::io::ErrorKind::PermissionDenied
            {
                return Err(format!("{}: {error}; use sudo, or be the user of the service", file.display()));
            }
        }
        Ok(None)
    }

    /// Signals the process, if it is this program under the user whose folder this is: a file says who it is, and one who can write
    /// the file must not have root end a process of somebody else.
    pub fn signal(&self, signal: Signal) -> Result<(), String> {
        let pid = self.running.pid;
        // A descriptor stands for one process, whatever becomes of its number.
        let process = open(pid).map_err(|error| format!("process {pid} cannot be signalled: {error}"))?;
        self.check_ours()?;
        pidfd_send_signal(process, signal).map_err(|error| format!("process {pid} cannot be signalled: {error}"))
    }

    fn check_ours(&self) -> Result<(), String> {
        let (pid, file) = (self.running.pid, self.folder.join(RUNNING_FILE));
        let unknown = |error: std::io::Error| {
            format!(
                "process {pid} is not signalled, since it cannot be looked at: {error}; be the user of the service, or root"
            )
        };
        let (owner, file_owner) = (
            std::fs::metadata(format!("/proc/{pid}")).map_err(unknown)?.uid(),
            std::fs::metadata(&file).map_err(unknown)?.uid(),
        );
        let program = std::fs::read_link(format!("/proc/{pid}/exe")).map_err(unknown)?;
        let bytes = program.as_os_str().as_bytes();
        let path = Path::new(OsStr::from_bytes(bytes.strip_suffix(REPLACED).unwrap_or(bytes)));
        let this = std::env::current_exe().map_err(unknown)?;
        if !self.running.is_alive() {
            return Err(format!("process {pid} has ended meanwhile"));
        }
        if owner != file_owner || path.file_name() != this.file_name() {
            return Err(format!(
                "process {pid} is not signalled: {} says that it is ours, but it is {} of the user {owner}",
                file.display(),
                path.display()
            ));
        }
        Ok(())
    }
}

fn open(pid: u32) -> rustix::io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(rustix::io::Errno::SRCH)?;
    pidfd_open(pid, PidfdFlags::empty())
}

/// When a process began; none if it has ended, even if nobody has buried it. The second field of `/proc/PID/stat`, a name in brackets,
/// may have anything in it; the third is the state, the 22nd the beginning.
pub(super) fn began(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

/// Creates a folder that only its owner can look into.
pub fn make_private(folder: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))
}

/// Written whole or not at all.
pub(super) fn write<T: Serialize>(path: &Path, value: &T) -> std::io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
    file.write_all(serde_json::to_string(value)?.as_bytes())?;
    std::fs::rename(&fresh, path)
}

pub(super) fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}
