//! Notices when a configuration may have changed on the disk.
//!
//! Folders are watched, not files: editors write a new file and rename it over the old one, and Kubernetes swaps a symbolic link
//! in the folder. Changes that no watch reports (a link's target in another folder, a network file system, a folder that is
//! itself replaced) are found by a check every few seconds.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use notify::event::ModifyKind;
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// Quiet time before a change is reported, so that a program that writes twice has finished.
const QUIET: Duration = Duration::from_millis(200);
/// Longest time before a change is reported, even if the files never become quiet.
const QUIET_WAIT_MAX: Duration = Duration::from_secs(2);
/// Interval of the checks without an event.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// The names of files whose contents matter.
type Names = Arc<Mutex<BTreeSet<OsString>>>;

/// True if an event may be about one of the files. Writes to other files, such as a log beside the config, are not; a
/// file that comes, goes or is renamed may be a link on the way to one.
fn matters(event: &Event, names: &Names) -> bool {
    match event.kind {
        // Our own reads must not count as events, or each check would cause another.
        EventKind::Access(_) => false,
        EventKind::Modify(ModifyKind::Name(_)) => true,
        EventKind::Modify(_) => {
            let names = names.lock().unwrap_or_else(PoisonError::into_inner);
            event.paths.iter().filter_map(|path| path.file_name()).any(|name| names.contains(name))
        }
        _ => true,
    }
}

/// Watches the folders of some files.
#[derive(Debug)]
pub struct Watch {
    files: Vec<PathBuf>,
    /// Paths of the files, and of what they link to.
    names: Names,
    watcher: Option<RecommendedWatcher>,
    watched: BTreeSet<PathBuf>,
    events: mpsc::Receiver<()>,
}

impl Watch {
    /// Watches these files, some of which may not exist.
    pub fn new(files: Vec<PathBuf>) -> Self {
        // One waiting event says as much as many.
        let (tell, events) = mpsc::channel(1);
        let names = Names::default();
        let known = Arc::clone(&names);
        let told = move |event: notify::Result<Event>| {
            if event.is_ok_and(|event| matters(&event, &known)) {
                tell.try_send(()).unwrap_or_default();
            }
        };
        let watcher = notify::recommended_watcher(told)
            .inspect_err(|error| log::warn!("files cannot be watched, so changes are noticed late: {error}"));
        let mut watch = Self { files, names, watcher: watcher.ok(), watched: BTreeSet::new(), events };
        watch.follow();
        watch
    }

    /// Watches other files from now on.
    pub fn set_files(&mut self, files: Vec<PathBuf>) {
        self.files = files;
        self.follow();
    }

    /// Waits until something may have changed, and for it to be quiet again.
    pub async fn changed(&mut self) {
        if timeout(LOOK_INTERVAL, self.events.recv()).await.is_ok() {
            let latest = Instant::now() + QUIET_WAIT_MAX;
            while Instant::now() < latest
                && timeout_at(latest.min(Instant::now() + QUIET), self.events.recv()).await == Ok(Some(()))
            {
                // A file that is written without a pause must not keep this busy.
                sleep(QUIET / 20).await;
            }
        }
        self.follow();
    }

    /// Watches the folders in which the files are now, and those that they link to.
    fn follow(&mut self) {
        let Some(watcher) = &mut self.watcher else { return };
        let folder = |path: &Path| match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let targets = self.files.iter().filter_map(|file| file.canonicalize().ok());
        let files: Vec<PathBuf> = self.files.iter().cloned().chain(targets).collect();
        *self.names.lock().unwrap_or_else(PoisonError::into_inner) =
            files.iter().filter_map(|file| file.file_name()).map(ToOwned::to_owned).collect();
        let folders: BTreeSet<PathBuf> = files.iter().map(|file| folder(file)).collect();
        for gone in self.watched.difference(&folders) {
            // It may be gone from the disk as well.
            watcher.unwatch(gone).unwrap_or_default();
        }
        self.watched.retain(|known| folders.contains(known));
        for folder in folders {
            if !self.watched.contains(&folder) && watcher.watch(&folder, RecursiveMode::NonRecursive).is_ok() {
                self.watched.insert(folder);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write as _;

    /// Far below the interval of the looks that would hide a watch which does not work.
    const SOON: Duration = Duration::from_secs(3);

    async fn notices(watch: &mut Watch, what: &str, change: impl FnOnce()) {
        // What is left of the last change.
        while timeout(QUIET * 2, watch.events.recv()).await.is_ok() {}
        change();
        timeout(SOON, watch.changed()).await.unwrap_or_else(|_| panic!("{what} is not noticed"));
    }

    #[tokio::test]
    async fn every_way_of_writing_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("apis.json");
        fs::write(&file, "1").unwrap();
        let mut watch = Watch::new(vec![file.clone()]);
        notices(&mut watch, "a write", || fs::write(&file, "2").unwrap()).await;
        notices(&mut watch, "a rename over it", || {
            fs::write(folder.path().join("new"), "3").unwrap();
            fs::rename(folder.path().join("new"), &file).unwrap();
        })
        .await;
        notices(&mut watch, "a removal", || fs::remove_file(&file).unwrap()).await;
        notices(&mut watch, "a new file", || fs::write(&file, "4").unwrap()).await;
    }

    #[tokio::test]
    async fn a_link_is_followed() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        // As Kubernetes has it: apis.json → ..data/apis.json, ..data → a folder of its own for each version.
        for version in ["..1", "..2"] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("apis.json"), version).unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/apis.json", at("apis.json")).unwrap();
        let mut watch = Watch::new(vec![at("apis.json")]);
        notices(&mut watch, "a swap of the folder", || {
            symlink("..2", at("..new")).unwrap();
            fs::rename(at("..new"), at("..data")).unwrap();
        })
        .await;
        notices(&mut watch, "a change of the target", || fs::write(at("..2").join("apis.json"), "x").unwrap()).await;
    }

    #[tokio::test]
    async fn a_log_beside_it_holds_nothing_up() {
        let folder = tempfile::tempdir().unwrap();
        let (file, log) = (folder.path().join("apis.json"), folder.path().join("log"));
        fs::write(&file, "1").unwrap();
        fs::write(&log, "").unwrap();
        let mut watch = Watch::new(vec![file.clone()]);
        let busy = async {
            loop {
                fs::OpenOptions::new().append(true).open(&log).and_then(|mut log| log.write_all(b"line\n")).unwrap();
                tokio::time::sleep(QUIET / 20).await;
            }
        };
        let begun = Instant::now();
        fs::write(&file, "2").unwrap();
        tokio::select! {
            () = watch.changed() => {}
            () = busy => {}
        }
        assert!(begun.elapsed() < QUIET_WAIT_MAX / 2, "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn two_writes_in_a_row_are_one_change() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("apis.json");
        fs::write(&file, "1").unwrap();
        let mut watch = Watch::new(vec![file.clone()]);
        let writes = async {
            for text in ["2", "3", "4"] {
                fs::write(&file, text).unwrap();
                tokio::time::sleep(QUIET / 4).await;
            }
        };
        tokio::join!(watch.changed(), writes);
        assert!(timeout(QUIET * 2, watch.events.recv()).await.is_err(), "it was told before it was quiet");
    }
}
