//! Examination of a ledger before it is used: whether it could be opened and written, without making or changing anything.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use super::file::{explain, explain_unusable, unusable};
use super::{SCHEMA, check_pages};
use crate::database::open_as_it_is;
use crate::ledger::LedgerError;

const WAY_OUT: &str = "; let this program write to the file and its folder, or name another in server.ledger";

/// Returns an error if the ledger could not be used. Nobody else in this process may have it open: closing a file that SQLite
/// has open as well would release its locks.
pub fn examine(path: &Path) -> Result<(), LedgerError> {
    let fail = |error: io::Error| unusable(path, &format!("{error}{WAY_OUT}"));
    match fs::canonicalize(path) {
        // As SQLite does, beside what a link leads to.
        Ok(file) => examine_file(path, &file, fail),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let is_there = |path: &&Path| path.as_os_str().is_empty() || path.symlink_metadata().is_ok();
            let nearest = path.ancestors().find(is_there).unwrap_or(Path::new(""));
            if nearest == path || !nearest.as_os_str().is_empty() && !nearest.exists() {
                return Err(unusable(path, &format!("{} is a link that leads nowhere{WAY_OUT}", nearest.display())));
            }
            may_create_in(nearest).map_err(fail)
        }
        Err(error) => Err(fail(error)),
    }
}

fn examine_file(path: &Path, file: &Path, fail: impl Fn(io::Error) -> LedgerError) -> Result<(), LedgerError> {
    if !file.is_file() {
        return Err(unusable(path, "is no file; name one in server.ledger"));
    }
    OpenOptions::new().append(true).open(file).map_err(&fail)?;
    may_create_in(file.parent().unwrap_or(Path::new(""))).map_err(&fail)?;
    let connection = open_as_it_is(file).map_err(|error| explain(path, &error))?;
    check_pages(&connection, path)?;
    SCHEMA.version(&connection).map(|_| ()).map_err(|why| explain_unusable(path, &why))
}

/// Tries whether a file could be made in a folder: by one that has no name and is gone when it is closed, or else by one that is
/// removed at once.
fn may_create_in(folder: &Path) -> io::Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    #[cfg(target_os = "linux")]
    {
        let nameless = rustix::fs::OFlags::TMPFILE.bits().cast_signed();
        match OpenOptions::new().write(true).custom_flags(nameless).mode(0o600).open(folder) {
            Ok(_) => return Ok(()),
            // Not every file system knows such files; nor does every one that has none let anything be made.
            Err(error) if matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::IsADirectory) => {}
            Err(error) => return Err(error),
        }
    }
    let file = folder.join(format!(".api-together-{}-{}", std::process::id(), fastrand::u64(..)));
    OpenOptions::new().create_new(true).write(true).mode(0o600).open(&file)?;
    fs::remove_file(&file)
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::*;
    use crate::config::LedgerSync;
    use crate::ledger::sqlite::{Opening, SqliteLedger};
    use crate::limit::Stamp;

    /// Everything in a folder, with its content.
    fn content(folder: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
        let mut all: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.clone(), fs::read(&path).unwrap_or_default()))
            .collect();
        all.sort();
        all
    }

    #[test]
    fn an_examination_makes_and_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a folder?/ledger.db");
        examine(&path).unwrap();
        assert_eq!(content(folder.path()), []);
        let opening = Opening { boot_id: Some("boot"), now: Stamp(0), minute_unknown: false };
        let ledger = SqliteLedger::open(&path, LedgerSync::Normal, &opening).unwrap();
        let before = content(path.parent().unwrap());
        examine(&path).unwrap();
        assert_eq!(content(path.parent().unwrap()).len(), before.len(), "while it is in use");
        drop(ledger);
        let before = content(path.parent().unwrap());
        examine(&path).unwrap();
        assert_eq!(content(path.parent().unwrap()), before);
    }

    #[test]
    fn links_are_followed_as_sqlite_does() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("real/ledger.db"), folder.path().join("link.db"));
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(examine(&link).unwrap_err().message.contains("leads nowhere"));
        assert!(examine(&link.join("below/ledger.db")).unwrap_err().message.contains("leads nowhere"));
        let opening = Opening { boot_id: Some("boot"), now: Stamp(0), minute_unknown: false };
        let ledger = SqliteLedger::open(&path, LedgerSync::Normal, &opening).unwrap();
        examine(&link).unwrap();
        drop(ledger);
        examine(&link).unwrap();
        assert_eq!(content(path.parent().unwrap()).len(), 1);
    }

    #[test]
    fn what_is_wrong_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let of = |path: &Path| examine(path).unwrap_err().message;
        assert!(of(folder.path()).contains("is no file"));
        // Not even root can make anything there.
        assert!(of(Path::new("/proc/api-together/ledger.db")).contains("server.ledger"));
        let garbage = folder.path().join("garbage.db");
        fs::write(&garbage, [0xA5; 8192]).unwrap();
        assert!(of(&garbage).contains("not a database"), "{}", of(&garbage));
        let newer = folder.path().join("newer.db");
        let connection = Connection::open(&newer).unwrap();
        connection
            .execute_batch("CREATE TABLE t (x); PRAGMA application_id = 1634759783; PRAGMA user_version = 99")
            .unwrap();
        drop(connection);
        assert!(of(&newer).contains("schema version 99"), "{}", of(&newer));
    }
}
