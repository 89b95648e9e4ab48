//! Starts the program itself, as a process of its own.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use tempfile::TempDir;

use crate::harness::until;

/// The program in a folder of its own, so that no `.env` and no `conf/` of ours is found.
pub(crate) fn program(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_api-together"));
    command.current_dir(folder).stdin(Stdio::null());
    let ours = ["API_TOGETHER_CONFIG", "API_TOGETHER_HOST", "API_TOGETHER_PORT"];
    for name in ["PORT", "RUST_LOG", "RUNTIME_DIRECTORY", "STATE_DIRECTORY"].into_iter().chain(ours) {
        command.env_remove(name);
    }
    command
}

/// A number that may be set for a longer run of a test.
pub(crate) fn setting<T: std::str::FromStr>(name: &str, default: T) -> T {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

pub(crate) fn run(folder: &Path, arguments: &[&str]) -> (i32, String, String) {
    texts(&program(folder).args(arguments).output().unwrap())
}

pub(crate) fn texts(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

pub(crate) fn folder_with(name: &str, text: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(name), text).unwrap();
    folder
}

/// A running program. It is killed when dropped.
pub(crate) struct Running {
    child: Child,
    pub address: SocketAddr,
    output: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
    pub folder: TempDir,
}

impl Running {
    pub(crate) fn start(config: &str, log: &str) -> Self {
        let folder = folder_with("apis.json", config);
        let mut command = program(folder.path());
        command.args(["--config", "apis.json"]).env("RUST_LOG", log);
        Self::of(command, folder)
    }

    pub(crate) fn of(mut command: Command, folder: TempDir) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let output = Arc::new(Mutex::new(String::new()));
        let errors = collect(child.stderr.take().unwrap(), &output);
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        let address = loop {
            line.clear();
            let read = lines.read_line(&mut line).unwrap();
            assert!(read > 0, "it does not start: {}", output.lock().unwrap());
            output.lock().unwrap().push_str(&line);
            if let Some((_, address)) = line.split_once("listening   ").and_then(|(_, url)| url.split_once("://")) {
                break address.split(' ').next().unwrap().parse().unwrap();
            }
        };
        let readers = vec![errors, collect(lines, &output)];
        Self { child, address, output, readers, folder }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) async fn ready(&self) {
        until("it listens", || std::net::TcpStream::connect(self.address).is_ok()).await;
    }

    /// Waits for the log to say this.
    pub(crate) async fn logs(&self, text: &str) -> String {
        until(text, || self.output.lock().unwrap().contains(text)).await;
        let output = self.output.lock().unwrap();
        output.lines().find(|line| line.contains(text)).unwrap().to_owned()
    }

    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    pub(crate) async fn exit(&mut self) -> ExitStatus {
        let child = Mutex::new(&mut self.child);
        until("it stops", || child.lock().unwrap().try_wait().unwrap().is_some()).await;
        self.child.wait().unwrap()
    }

    /// Everything it printed, once it has been killed.
    pub(crate) fn killed(mut self) -> String {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        for reader in self.readers.drain(..) {
            reader.join().unwrap();
        }
        self.output.lock().unwrap().clone()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have stopped already.
        self.child.kill().unwrap_or_default();
        self.child.wait().map(drop).unwrap_or_default();
    }
}

fn collect(from: impl Read + Send + 'static, output: &Arc<Mutex<String>>) -> JoinHandle<()> {
    let output = Arc::clone(output);
    std::thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            let mut output = output.lock().unwrap();
            output.push_str(&line);
            output.push('\n');
        }
    })
}
