//! The pid file of a process in the background, and of those that it is replaced by.

use std::path::PathBuf;
use std::sync::Arc;

use super::RunOptions;

/// Pid file, if the process has one. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct PidFile(Option<Arc<PathBuf>>);

impl PidFile {
    /// That of a process which goes into the background, or takes over from one that has it.
    pub(super) fn new(path: &str, options: &RunOptions) -> Self {
        let path = PathBuf::from(path);
        let has_one = options.daemon || options.upgrade && path.exists();
        Self((has_one && !options.test).then(|| Arc::new(path)))
    }

    /// Writes this process's pid into it. Pingora has, if the process went into the background itself.
    pub(super) fn write(&self) {
        let Some(path) = &self.0 else { return };
        let pid = std::process::id().to_string();
        if self.names().is_some_and(|named| named == pid) {
            return;
        }
        if let Err(error) = std::fs::write(path.as_path(), format!("{pid}\n")) {
            log::warn!("the pid file {}: {error}", path.display());
        }
    }

    /// Removes it at the end of the process, if no other process has it by then.
    pub(super) fn remove(&self) {
        if let (Some(path), true) = (&self.0, self.names() == Some(std::process::id().to_string())) {
            // It may lie where only root may write.
            std::fs::remove_file(path.as_path()).unwrap_or_default();
        }
    }

    fn names(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.0.as_ref()?.as_path()).ok()?;
        Some(text.trim().to_owned())
    }
}
