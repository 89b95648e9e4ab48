//! Redis servers of the tests' own: started on free ports of loopback, and ended with the test.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use redis::ConnectionLike as _;
use tempfile::TempDir;

use crate::harness::port;

/// A server, and the folder of its files. It is killed when dropped.
pub(crate) struct RedisServer {
    child: Child,
    pub port: u16,
    folder: TempDir,
    options: Vec<String>,
}

impl RedisServer {
    /// Starts a server that keeps nothing on disk, unless the options say so.
    pub(crate) fn start(options: &[&str]) -> Self {
        let (folder, port) = (TempDir::new().unwrap(), port());
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        let child = spawn(&folder, port, &options);
        Self { child, port, folder, options }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Starts a replica of this server.
    pub(crate) fn replica(&self) -> Self {
        let of = self.port.to_string();
        let replica = Self::start(&["--replicaof", "127.0.0.1", &of]);
        let begun = std::time::Instant::now();
        while !info(&mut replica.connection(), "replication").contains("master_link_status:up") {
            assert!(begun.elapsed() < Duration::from_secs(20), "it does not follow");
            std::thread::sleep(Duration::from_millis(20));
        }
        replica
    }

    /// Ends it as a loss of power would, but for what the system has not written yet.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again, with the files that it has.
    pub(crate) fn restart(&mut self) {
        self.child = spawn(&self.folder, self.port, &self.options);
    }

    /// Stops it in its tracks, or lets it go on.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    pub(crate) fn connection(&self) -> redis::Connection {
        redis::Client::open(self.url()).unwrap().get_connection().unwrap()
    }

    /// The sum of the fields of a hash whose names begin with this.
    pub(crate) fn sum(&self, key: &str, prefix: &str) -> u64 {
        let rows: Vec<(String, String)> =
            redis::cmd("HGETALL").arg(key).query(&mut self.connection()).unwrap_or_default();
        let of_it = rows.iter().filter(|(name, _)| name.starts_with(prefix));
        of_it.filter_map(|(_, value)| value.parse::<u64>().ok()).sum()
    }
}

/// A section of what a server says of itself.
fn info(connection: &mut redis::Connection, section: &str) -> String {
    redis::cmd("INFO").arg(section).query(connection).unwrap()
}

/// Three sentinels that watch a server.
pub(crate) struct Sentinels {
    children: Vec<Child>,
    ports: Vec<u16>,
    _folder: TempDir,
}

impl Sentinels {
    pub(crate) fn watch(server: &RedisServer) -> Self {
        let folder = TempDir::new().unwrap();
        let ports: Vec<u16> = (0..3).map(|_| port()).collect();
        let start = |port: &u16| {
            let path = folder.path().join(format!("{port}.conf"));
            let text = format!(
                "port {port}\nbind 127.0.0.1\ndir {}\nsentinel monitor m 127.0.0.1 {} 2\n\
                 sentinel down-after-milliseconds m 400\nsentinel failover-timeout m 2000\n",
                folder.path().display(),
                server.port
            );
            std::fs::write(&path, text).unwrap();
            let mut command = Command::new("redis-server");
            command.arg(path).arg("--sentinel").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            command.spawn().unwrap()
        };
        let sentinels = Self { children: ports.iter().map(start).collect(), ports, _folder: folder };
        let begun = std::time::Instant::now();
        // They find the replicas and each other by way of the server.
        let knows_all = |port: &u16| {
            let client = redis::Client::open(format!("redis://127.0.0.1:{port}")).unwrap();
            let Ok(mut connection) = client.get_connection() else { return false };
            let text = info(&mut connection, "sentinel");
            text.contains("slaves=1") && text.contains("sentinels=3")
        };
        while !sentinels.ports.iter().all(knows_all) {
            assert!(begun.elapsed() < Duration::from_secs(30), "the sentinels do not find each other");
            std::thread::sleep(Duration::from_millis(50));
        }
        sentinels
    }

    pub(crate) fn url(&self) -> String {
        let hosts: Vec<String> = self.ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        format!("redis+sentinel://{}/m", hosts.join(","))
    }
}

impl Drop for Sentinels {
    fn drop(&mut self) {
        for child in &mut self.children {
            child.kill().unwrap_or_default();
            child.wait().ok();
        }
    }
}

fn spawn(folder: &TempDir, port: u16, options: &[String]) -> Child {
    let mut command = Command::new("redis-server");
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"]).arg(folder.path());
    command.args(options).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().expect("redis-server is installed (apt-get install redis-server)");
    let begun = std::time::Instant::now();
    while !answers(port) {
        assert!(child.try_wait().unwrap().is_none(), "redis-server ends at once: {options:?}");
        assert!(begun.elapsed() < Duration::from_secs(20), "redis-server does not answer");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

/// True if a server answers on the port and has loaded its files.
fn answers(port: u16) -> bool {
    let client = redis::Client::open(format!("redis://127.0.0.1:{port}")).unwrap();
    client
        .get_connection_with_timeout(Duration::from_millis(500))
        .is_ok_and(|mut connection| connection.check_connection())
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.child.kill().unwrap_or_default();
        self.child.wait().ok();
    }
}
