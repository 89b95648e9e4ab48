//! Endpoints that were switched off beside the config: each until somebody switches it on, or until a moment. Kept in a file of their own,
//! so that a restart or an upgrade forgets none, and the config stays as its owner wrote it.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::checked::Config;
use super::{file, read_bounded};

/// An end that may never come by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchedOff {
    /// When it is switched on again; none if somebody has to do that.
    pub until: Option<Timestamp>,
}

impl SwitchedOff {
    fn is_over(&self, now: Timestamp) -> bool {
        self.until.is_some_and(|until| until <= now)
    }
}

/// Endpoints that are switched off, by their ids.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Switches(BTreeMap<String, SwitchedOff>);

/// The file of them: beside the ledger, since both are the state of a gateway.
pub fn switches_file(ledger: &Path) -> PathBuf {
    ledger.with_file_name(file::SWITCHES_FILE)
}

impl Switches {
    /// Reads them. A file that is not there has none.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = match read_bounded(path) {
            Ok(text) => text,
            // No folder either: a ledger whose place cannot exist says so itself.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(Self::default());
            }
            Err(error) => return Err(format!("switches {}: {error}", path.display())),
        };
        serde_json::from_slice(&text)
            .map_err(|error| format!("switches {}: {error}; correct or remove it", path.display()))
    }

    /// Writes them, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<(), String> {
        let fresh = path.with_extension("new");
        let write = || -> std::io::Result<()> {
            let mut file =
                std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.sync_all()?;
            std::fs::rename(&fresh, path)
        };
        write().map_err(|error| format!("switches {}: {error}", path.display()))
    }

    /// Switches an endpoint off.
    pub fn switch_off(&mut self, endpoint: &str, off: SwitchedOff) {
        self.0.insert(endpoint.to_owned(), off);
    }

    /// Switches an endpoint on. False if it was not off.
    pub fn switch_on(&mut self, endpoint: &str) -> bool {
        self.0.remove(endpoint).is_some()
    }

    /// Forgets those whose time is over.
    pub fn forget(&mut self, now: Timestamp) {
        self.0.retain(|_, off| !off.is_over(now));
    }

    /// Has a config's endpoints switched off.
    pub fn apply(&self, config: &mut Config, now: Timestamp) {
        for endpoint in &mut config.endpoints {
            if let Some(off) = self.0.get(&*endpoint.id).filter(|off| !off.is_over(now)) {
                endpoint.switched_off = Some(*off).filter(|_| endpoint.enabled);
                endpoint.enabled = false;
            }
        }
    }
}
