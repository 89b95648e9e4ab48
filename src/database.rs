//! SQLite files of our own: making, identifying, migrating, and moving aside those that cannot be trusted.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rusqlite::{Connection, OpenFlags};

/// Schema of a kind of files.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schema<'a> {
    /// Identifies a file as one of this kind.
    pub(crate) application_id: i64,
    /// Steps from one version to the next. A step may add to the schema but must not change what is there: during an
    /// upgrade, the previous version still writes to the same file (it can do so as long as it does not have to open it
    /// again).
    pub(crate) steps: &'a [&'a str],
    /// Key of the config that names the file.
    pub(crate) named_by: &'static str,
}

/// Version of a file's schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Version {
    /// Steps that it has been through.
    pub(crate) number: usize,
    /// True if nothing is in the file.
    pub(crate) is_empty: bool,
}

/// Reason why a file cannot be used.
#[derive(Debug)]
pub(crate) enum Unusable {
    /// SQLite's.
    Sqlite(rusqlite::Error),
    /// It is another program's, or a newer version's.
    Foreign(String),
}

impl From<rusqlite::Error> for Unusable {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl Schema<'_> {
    /// The version of a file. Fails if it is another program's, or too new.
    pub(crate) fn version(&self, connection: &Connection) -> Result<Version, Unusable> {
        let Self { application_id, named_by, .. } = self;
        let number = |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
        let (version, application) = (number("user_version")?, number("application_id")?);
        let tables = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get::<_, u32>(0))?;
        let is_empty = tables == 0;
        if application != *application_id && !is_empty {
            let why = format!("is another program's database; name another file in {named_by}");
            return Err(Unusable::Foreign(why));
        }
        let number = usize::try_from(version).unwrap_or(usize::MAX);
        let newest = self.steps.len();
        if number > newest {
            return Err(Unusable::Foreign(format!(
                "has schema version {version}, and this program knows {newest} at most; run the newer program that wrote it, or \
                 name another file in {named_by}"
            )));
        }
        Ok(Version { number, is_empty })
    }

    /// Brings a file to the newest version, in one transaction. Returns the version before.
    pub(crate) fn migrate(&self, connection: &mut Connection) -> Result<Version, Unusable> {
        let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let before = self.version(&transaction)?;
        let todo = self.steps.get(before.number..).unwrap_or_default();
        for step in todo {
            transaction.execute_batch(step)?;
        }
        if !todo.is_empty() {
            let (id, newest) = (self.application_id, self.steps.len());
            transaction.execute_batch(&format!("PRAGMA application_id = {id}; PRAGMA user_version = {newest}"))?;
        }
        transaction.commit()?;
        Ok(before)
    }
}

/// Creates a file, accessible to its owner only, and its folder. Returns true if the file did not exist.
pub(crate) fn make_file(path: &Path) -> io::Result<bool> {
    if let Some(folder) = path.parent()
        && !folder.as_os_str().is_empty()
    {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    match OpenOptions::new().create_new(true).write(true).mode(0o600).open(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Returns device and inode of a file, which stay the same if it is renamed. Reads them without opening the file:
/// closing it again would release SQLite's locks on it.
pub(crate) fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Moves a file that cannot be trusted aside, together with its write-ahead log and shared memory, unless another
/// process has done so already. Returns the new path.
pub(crate) fn move_aside(path: &Path, seen: Option<(u64, u64)>) -> io::Result<Option<PathBuf>> {
    // The lock is held until it is dropped, so that only one process moves the file.
    let lock = OpenOptions::new().create(true).append(true).mode(0o600).open(beside(path, ".lock"))?;
    lock.lock()?;
    let now = identity(path)?;
    if seen.is_some_and(|seen| seen != now) {
        return Ok(None);
    }
    let aside = beside(path, &format!(".corrupt-{}", Timestamp::now().strftime("%Y%m%dT%H%M%SZ")));
    for ending in ["-wal", "-shm"] {
        match fs::rename(beside(path, ending), beside(&aside, ending)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::rename(path, &aside)?;
    Ok(Some(aside))
}

/// Opens the file to read it. Without a write-ahead log no other process uses it; it is then opened as a file that nothing
/// changes, since SQLite would make the log and a shared memory otherwise.
pub(crate) fn open_as_it_is(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    if beside(path, "-wal").exists() {
        return Connection::open_with_flags(path, flags);
    }
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(byte);
    let escaped = |byte: &u8| if plain(byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") };
    let name: String = path.as_os_str().as_bytes().iter().map(escaped).collect();
    Connection::open_with_flags(format!("file:{name}?immutable=1"), flags | OpenFlags::SQLITE_OPEN_URI)
}

/// The path with an ending behind it.
pub(crate) fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}
