//! The config file that is meant, and the folders in which the process that runs with it is found.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Folders in which a config file is looked for, and its names there.
const FOLDERS: [&str; 2] = ["conf", PACKAGED_FOLDER];
const NAMES: [&str; 3] = ["apis.json", "apis.yaml", "apis.yml"];
/// Variable that names the config file, for want of a flag.
const VARIABLE: &str = "API_TOGETHER_CONFIG";
/// The folder for sockets and the pid file, beside the config file.
const RUNTIME_FOLDER: &str = "run";
/// Folder of the packaged service's config.
const PACKAGED_FOLDER: &str = "/etc/api-together";
/// Folder of the packaged service's state.
const PACKAGED_STATE_FOLDER: &str = "/var/lib/api-together";
/// Runtime folder of the packaged service.
const PACKAGED_RUNTIME_FOLDER: &str = "/run/api-together";

/// A config file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ConfigFile {
    /// Its path.
    pub(super) path: PathBuf,
    /// Files that could have been meant as well, and are not read.
    pub(super) unread: Vec<PathBuf>,
    /// True if nobody named one, and none was found.
    is_guess: bool,
}

impl ConfigFile {
    /// The one that a flag or the variable names, or else the first that is there.
    pub(super) fn find(named: Option<PathBuf>) -> Self {
        let variable = || std::env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
        match named.or_else(variable) {
            Some(path) => Self { path, unread: Vec::new(), is_guess: false },
            None => Self::first_of(&FOLDERS.map(Path::new)),
        }
    }

    fn first_of(folders: &[&Path]) -> Self {
        for folder in folders {
            let mut there = NAMES.iter().map(|name| folder.join(name)).filter(|path| is_there(path));
            if let Some(path) = there.next() {
                return Self { path, unread: there.filter(|path| path.exists()).collect(), is_guess: false };
            }
        }
        let [folder, ..] = FOLDERS;
        let [name, ..] = NAMES;
        Self { path: Path::new(folder).join(name), unread: Vec::new(), is_guess: true }
    }

    /// A sentence about each file that is not read.
    pub(super) fn warnings(&self) -> impl Iterator<Item = String> {
        let path = self.path.display();
        self.unread.iter().map(move |other| {
            format!("{} is not read, since {path} is there too; remove one, or name one with --config", other.display())
        })
    }

    /// Folder for the state of the packaged service, if that is whose config this is. systemd tells only the service itself.
    pub(super) fn state_folder(&self) -> Option<&'static Path> {
        self.path.starts_with(PACKAGED_FOLDER).then_some(Path::new(PACKAGED_STATE_FOLDER))
    }

    /// Folders from which its process may run. The packaged service's is one only if its config is meant: nobody who names another
    /// wants to stop the service.
    pub(super) fn runtime_folders(&self) -> Vec<PathBuf> {
        let mut folders = vec![runtime_folder(&self.path)];
        if self.is_guess || self.path.starts_with(PACKAGED_FOLDER) {
            folders.push(PACKAGED_RUNTIME_FOLDER.into());
        }
        folders
    }
}

/// One in a folder that this user may not look into is there, too: what reads it says so.
fn is_there(path: &Path) -> bool {
    match path.try_exists() {
        Ok(exists) => exists,
        Err(error) => error.kind() == ErrorKind::PermissionDenied,
    }
}

/// Runtime folder of a config file: beside it, or the one that systemd has made.
pub(super) fn runtime_folder(config: &Path) -> PathBuf {
    let beside = || config.parent().unwrap_or(Path::new("")).join(RUNTIME_FOLDER);
    let folder = std::env::var_os("RUNTIME_DIRECTORY").map_or_else(beside, PathBuf::from);
    // In the background the working directory is another.
    std::path::absolute(&folder).unwrap_or(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_is_there_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
        std::fs::create_dir(&second).unwrap();
        let find = || ConfigFile::first_of(&[&first, &second]);
        assert_eq!(find().path, Path::new("conf/apis.json"), "the one to make, if there is none");
        let touch = |path: &Path| std::fs::write(path, "").unwrap();
        touch(&second.join("apis.yml"));
        assert_eq!(find(), ConfigFile { path: second.join("apis.yml"), unread: Vec::new(), is_guess: false });
        touch(&second.join("apis.json"));
        let both = find();
        assert_eq!(
            both,
            ConfigFile { path: second.join("apis.json"), unread: vec![second.join("apis.yml")], is_guess: false }
        );
        let [warning] = both.warnings().collect::<Vec<_>>().try_into().unwrap();
        assert!(warning.contains("apis.yml is not read"), "{warning}");
        std::fs::create_dir(&first).unwrap();
        touch(&first.join("apis.yaml"));
        assert_eq!(find(), ConfigFile { path: first.join("apis.yaml"), unread: Vec::new(), is_guess: false });
    }
}
