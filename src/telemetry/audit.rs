//! The audit log: a line for every change that somebody made to the running gateway, with its author.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Size at which the file is set aside for a new one; one before it is kept.
const BYTES_MAX: u64 = 8 * 1024 * 1024;
/// Lines that are read at most.
pub(crate) const LINES_MAX: usize = 1000;
/// Characters of a text of a line.
const TEXT_CHARS_MAX: usize = 500;

/// A change, or an attempt at one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(crate) struct AuditLine {
    /// When.
    #[schemars(with = "String")]
    pub(crate) at: Timestamp,
    /// Who: by the admin key, by a session of the page, or by a command.
    pub(crate) author: String,
    /// What was done, such as `keys.revoke`.
    pub(crate) action: String,
    /// What it was done to: the id of an endpoint, the name of a key.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) subject: String,
    /// What came of it.
    pub(crate) result: String,
    /// True if it was done.
    pub(crate) ok: bool,
}

/// The file of it. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Audit(Arc<AuditFile>);

#[derive(Debug)]
struct AuditFile {
    path: PathBuf,
    writing: Mutex<()>,
}

impl Audit {
    /// The one beside the ledger.
    pub(crate) fn new(ledger: &Path) -> Self {
        Self(Arc::new(AuditFile { path: ledger.with_file_name("audit.jsonl"), writing: Mutex::default() }))
    }

    /// Adds a line, here and in the log. It never has a secret in it, since what is done with keys is told without them.
    pub(crate) async fn add(&self, author: &str, action: &str, subject: &str, result: &Result<String, String>) {
        let told = result.as_ref().unwrap_or_else(|why| why);
        let line = AuditLine {
            at: Timestamp::now(),
            author: author.to_owned(),
            action: action.to_owned(),
            subject: cut(subject),
            result: cut(told),
            ok: result.is_ok(),
        };
        log::info!("audit: {author}: {action} {:?}: {}", line.subject, line.result);
        let file = Arc::clone(&self.0);
        let written = tokio::task::spawn_blocking(move || file.append(&line)).await;
        if let Ok(Err(error)) = written {
            log::error!("audit log {}: {error}; the line above stands in no file", self.0.path.display());
        }
    }

    /// The newest lines, the newest first.
    pub(crate) async fn newest(&self, count: usize) -> io::Result<Vec<AuditLine>> {
        let file = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || file.newest(count.min(LINES_MAX))).await.map_err(io::Error::other)?
    }
}

impl AuditFile {
    fn append(&self, line: &AuditLine) -> io::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path)?;
        if file.metadata()?.len() > BYTES_MAX {
            std::fs::rename(&self.path, self.before())?;
            file = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path)?;
        }
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        // In one piece: another process may write as well.
        file.write_all(&text)
    }

    fn before(&self) -> PathBuf {
        self.path.with_extension("jsonl.1")
    }

    fn newest(&self, count: usize) -> io::Result<Vec<AuditLine>> {
        let mut lines = std::collections::VecDeque::with_capacity(count);
        for path in [self.before(), self.path.clone()] {
            let file = match File::open(path) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            for line in BufReader::new(file).lines() {
                // Another version may write what this one cannot read.
                if let Ok(line) = serde_json::from_str(&line?) {
                    if lines.len() == count {
                        lines.pop_front();
                    }
                    lines.push_back(line);
                }
            }
        }
        Ok(lines.into_iter().rev().collect())
    }
}

fn cut(text: &str) -> String {
    text.chars().take(TEXT_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_lines_are_read_first() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let audit = Audit::new(&folder.path().join("ledger.db"));
        assert_eq!(audit.newest(10).await.unwrap(), []);
        audit.add("the command line", "keys.add", "ada", &Ok("added".into())).await;
        std::fs::rename(folder.path().join("audit.jsonl"), folder.path().join("audit.jsonl.1")).unwrap();
        audit.add("the admin key from 127.0.0.1", "reload", "", &Err("x".repeat(1000))).await;
        let lines = audit.newest(10).await.unwrap();
        let shown: Vec<_> = lines.iter().map(|line| (line.action.as_str(), line.ok, line.result.len())).collect();
        assert_eq!(shown, [("reload", false, 500), ("keys.add", true, 5)]);
        assert_eq!(audit.newest(1).await.unwrap().len(), 1);
        let mode = std::fs::metadata(folder.path().join("audit.jsonl")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
