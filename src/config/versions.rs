//! Versions of the config file that were in use: the last ones are kept, so that there is a way back.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use jiff::Timestamp;

use super::{Format, read_bounded};

/// Versions that are kept.
const KEPT_MAX: usize = 10;

/// The folder of kept versions: beside the ledger, for its owner alone, since they have the keys in them.
#[derive(Debug, Clone)]
pub struct Versions(PathBuf);

/// A kept version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeptVersion {
    /// When it was kept first.
    pub at: Timestamp,
    /// Its name.
    pub name: String,
}

impl Versions {
    /// Those of a gateway with this ledger.
    pub fn new(ledger: &Path) -> Self {
        Self(ledger.with_file_name("config-versions"))
    }

    /// Keeps a text, unless it is the latest already, and forgets the oldest of more than ten.
    pub fn keep(&self, text: &str, format: Format) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.0)?;
        let kept = self.list()?;
        if let Some(latest) = kept.last()
            && self.read(&latest.name).is_ok_and(|before| before == text)
        {
            return Ok(());
        }
        let millis = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let ending = match format {
            Format::Json => "json",
            Format::Yaml => "yaml",
        };
        let path = self.0.join(format!("{millis}.{ending}"));
        let mut file = fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
        file.write_all(text.as_bytes())?;
        let surplus = (kept.len() + 1).saturating_sub(KEPT_MAX);
        kept.iter().take(surplus).try_for_each(|old| fs::remove_file(self.0.join(&old.name)))
    }

    /// The kept versions, the oldest first.
    pub fn list(&self) -> io::Result<Vec<KeptVersion>> {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut all = Vec::new();
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if let Some(at) = moment(&name) {
                all.push(KeptVersion { at, name });
            }
        }
        all.sort();
        Ok(all)
    }

    /// The text of a kept version.
    pub fn read(&self, name: &str) -> io::Result<String> {
        if moment(name).is_none() {
            return Err(io::ErrorKind::NotFound.into());
        }
        String::from_utf8(read_bounded(&self.0.join(name))?).map_err(io::Error::other)
    }
}

/// The moment in a version's name. No other file of the folder is one.
fn moment(name: &str) -> Option<Timestamp> {
    let (millis, ending) = name.split_once('.')?;
    let is_number = !millis.is_empty() && millis.bytes().all(|byte| byte.is_ascii_digit());
    let is_version = is_number && matches!(ending, "json" | "yaml");
    Timestamp::from_millisecond(millis.parse().ok().filter(|_| is_version)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ten_are_kept_for_their_owner_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let versions = Versions::new(&folder.path().join("ledger.db"));
        assert_eq!(versions.list().unwrap(), []);
        for number in 0..13 {
            for _ in 0..2 {
                versions.keep(&format!("text {number}"), Format::Yaml).unwrap();
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let kept = versions.list().unwrap();
        assert_eq!(kept.len(), 10);
        assert_eq!(
            (versions.read(&kept[0].name).unwrap(), versions.read(&kept[9].name).unwrap()),
            ("text 3".into(), "text 12".into())
        );
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let inside = folder.path().join("config-versions");
        assert_eq!((mode(&inside), mode(&inside.join(&kept[0].name))), (0o700, 0o600));
        for name in ["../ledger.db", "x.json", "1.txt", "", "1"] {
            assert!(versions.read(name).is_err(), "{name}");
        }
    }
}
