//! The control socket, in the runtime folder: commands ask the running process for something by it, and are answered in words. Only the
//! process's own user, and root, can open it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pingora::server::ShutdownWatch;
use pingora::services::background::BackgroundService;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::commands::Commands;
use super::runtime_folder::Found;
use crate::config::KeysChange;

/// The socket in the runtime folder.
const SOCKET: &str = "control.sock";
/// Commands that are served at once; more wait in the socket's backlog.
pub(super) const CONNECTIONS_MAX: usize = 8;
/// Longest request, in bytes.
const REQUEST_BYTES_MAX: u64 = 64 * 1024;
/// Longest reply, in bytes: the status of many endpoints with many models.
const REPLY_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Longest time for a request to come, and for a reply to be taken.
const TRANSFER_MAX: Duration = Duration::from_secs(10);
/// Longest time that a command waits for its reply.
const REPLY_MAX: Duration = Duration::from_mins(1);
/// The same for a test of many endpoints, some of which do not answer.
const TESTS_MAX: Duration = Duration::from_mins(30);
/// Pause after the socket failed, as it does while no descriptor is free.
const PAUSE: Duration = Duration::from_millis(100);

/// What a command asks for: one line of JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "camelCase")]
pub enum Request {
    /// Read the config again.
    Reload,
    /// Say what `GET /v1/status` says.
    Status,
    /// Test an endpoint, or all that are switched on; the answer is a list of [`Tested`](super::endpoint_test::Tested).
    Test {
        /// Its id.
        endpoint: Option<String>,
    },
    /// List the keys of clients; the answer is a list of [`ListedKey`](super::keys::ListedKey).
    Keys,
    /// Change the file of keys.
    ChangeKeys(KeysChange),
    /// End.
    Stop {
        /// Cut open requests off.
        now: bool,
    },
}

impl Request {
    fn reply_max(&self) -> Duration {
        match self {
            Self::Test { .. } => TESTS_MAX,
            Self::Reload | Self::Status | Self::Keys | Self::ChangeKeys(_) | Self::Stop { .. } => REPLY_MAX,
        }
    }
}

/// The answer: one line of JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Reply {
    ok: bool,
    message: String,
}

impl From<Result<String, String>> for Reply {
    fn from(result: Result<String, String>) -> Self {
        let ok = result.is_ok();
        Self { ok, message: result.unwrap_or_else(|why| why) }
    }
}

/// Serves the control socket.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) runtime_folder: PathBuf,
    pub(super) commands: Commands,
}

#[async_trait]
impl BackgroundService for Control {
    async fn start(&self, _shutdown: ShutdownWatch) {
        let path = self.runtime_folder.join(SOCKET);
        let listener = match listen(&path) {
            Ok(listener) => listener,
            Err(error) => {
                return log::warn!(
                    "{}: {error}; commands such as `api-together reload` will not reach this process",
                    path.display()
                );
            }
        };
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            // Never closed.
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            // To the end of the process: one that waits for its last requests can be looked at, and cut short.
            match listener.accept().await {
                Ok((stream, _)) => {
                    let commands = self.commands.clone();
                    tokio::spawn(async move {
                        // The one that asked may have gone.
                        serve(stream, &commands).await.unwrap_or_default();
                        drop(place);
                    });
                }
                Err(error) => {
                    log::warn!("{}: {error}", path.display());
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// Listens in the place of a process that ran before, or still does: during an upgrade commands reach the successor.
fn listen(path: &Path) -> std::io::Result<UnixListener> {
    let fresh = path.with_extension(format!("{}", std::process::id()));
    std::fs::remove_file(&fresh).unwrap_or_default();
    let listener = UnixListener::bind(&fresh)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&fresh, path)?;
    Ok(listener)
}

async fn serve(mut stream: UnixStream, commands: &Commands) -> std::io::Result<()> {
    let mut line = String::new();
    let (reading, mut writing) = stream.split();
    let mut reading = tokio::io::BufReader::new(reading.take(REQUEST_BYTES_MAX));
    timeout(TRANSFER_MAX, reading.read_line(&mut line)).await??;
    let done = match serde_json::from_str(&line) {
        Ok(request) => tokio::select! {
            done = commands.answer(request) => done,
            // The one that asked has gone; a test of many endpoints would go on for minutes.
            _ = reading.read_u8() => return Ok(()),
        },
        Err(error) => Err(format!("the running process does not know this command: {error}")),
    };
    let mut reply = serde_json::to_vec(&Reply::from(done))?;
    reply.push(b'\n');
    timeout(TRANSFER_MAX, writing.write_all(&reply)).await?
}

/// Asks the process that runs from the first of these folders from which one does, and returns what it says.
pub fn ask(folders: &[PathBuf], request: &Request) -> Result<String, String> {
    ask_found(&Found::in_one_of(folders)?, request)
}

/// Asks this process.
pub fn ask_found(found: &Found<'_>, request: &Request) -> Result<String, String> {
    let path = found.folder.join(SOCKET);
    let fail = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            format!("{}: {error}; use sudo, or be the user of the service", path.display())
        }
        std::io::ErrorKind::NotFound => format!(
            "{}: process {} (version {}) does not listen there; an older version knows only signals",
            path.display(),
            found.running.pid,
            found.running.version
        ),
        _ => format!("{}: {error}", path.display()),
    };
    let mut stream = BlockingStream::connect(&path).map_err(fail)?;
    stream
        .set_read_timeout(Some(request.reply_max()))
        .and_then(|()| stream.set_write_timeout(Some(TRANSFER_MAX)))
        .map_err(fail)?;
    let mut line = serde_json::to_vec(request).map_err(|error| error.to_string())?;
    line.push(b'\n');
    stream.write_all(&line).map_err(fail)?;
    let mut reply = String::new();
    let told = std::io::Read::take(stream, REPLY_BYTES_MAX);
    BufReader::new(told).read_line(&mut reply).map_err(fail)?;
    let Reply { ok, message } =
        serde_json::from_str(&reply).map_err(|_| format!("process {} ended before it answered", found.running.pid))?;
    if ok { Ok(message) } else { Err(message) }
}
