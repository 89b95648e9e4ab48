//! The config file: shown with its secrets masked, checked, applied whole or not at all, and put back.

use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::{Value, json};

use super::Request;
use crate::config::{
    self, Config, Environment, Format, Loaded, MaskedText, Problem, ProblemKind, Problems, Versions, changes,
    check_str, mask, needs_upgrade, read_bounded, unmask, without_keys,
};
use crate::fault::{Fault, excerpt};
use crate::process::ConfigSource;

/// Another text, and which one it was made out of.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    /// The text, with masks where secrets stay.
    text: String,
    /// `tag` of the text that it was made out of; without it nobody else's change is noticed.
    tag: Option<String>,
}

/// The file as it is now.
struct Current {
    source: ConfigSource,
    text: String,
}

impl Current {
    async fn read(request: &Request<'_>) -> Result<Self, Fault> {
        let source = request
            .actions()?
            .config_source()
            .ok_or_else(|| conflict("config_read_only", "This process reads no config file.".to_owned()))?;
        let path = source.path.clone();
        let read = tokio::task::spawn_blocking(move || {
            config::check_ordinary(&path)?;
            String::from_utf8(read_bounded(&path)?).map_err(io::Error::other)
        });
        let text = read.await.map_err(|_| Fault::Internal)?;
        let text =
            text.map_err(|error| conflict("config_unreadable", format!("The config file cannot be read: {error}.")))?;
        Ok(Self { source, text })
    }

    fn format(&self) -> Format {
        Format::from_path(&self.source.path)
    }

    /// Checks another text in its place.
    fn check(&self, text: &str) -> Result<Loaded, Problems> {
        let ConfigSource { path, flags } = &self.source;
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let base = absolute.parent().unwrap_or(Path::new(""));
        check_str(text, self.format(), &Environment::from_process(path, flags), base)
    }

    /// Another text with the secrets of this one in place of their masks.
    fn unmasked(&self, text: &str) -> Result<String, Fault> {
        unmask(text, &self.text, self.format())
            .map_err(|why| conflict("secret_needed", format!("{}.", without_keys(&why))))
    }
}

fn conflict(code: &'static str, problem: String) -> Fault {
    Fault::AdminConflict { code, problem }
}

/// A short name of a text. It says nothing about it, and is another one in each process.
fn tag(text: &str) -> String {
    static SEED: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    format!("{:016x}", SEED.hash_one(text))
}

pub(super) async fn show(request: &Request<'_>) -> Result<Value, Fault> {
    let current = Current::read(request).await?;
    let MaskedText { text, not_editable } = mask(&current.text);
    let path = current.source.path.clone();
    let obstacle = tokio::task::spawn_blocking(move || obstacle(&path)).await.map_err(|_| Fault::Internal)?;
    let state = request.from.process.config.file();
    Ok(json!({
        "path": current.source.path.display().to_string(),
        "format": if current.format() == Format::Json { "json" } else { "yaml" },
        "text": text,
        "tag": tag(&current.text),
        "notEditable": obstacle.or(not_editable.map(ToOwned::to_owned)),
        "version": request.from.pool.version,
        "loadedAt": jiff::Timestamp::try_from(request.from.pool.loaded_at).unwrap_or_default(),
        "error": state.error,
        "needsUpgrade": state.needs_upgrade,
    }))
}

pub(super) async fn check(request: &Request<'_>) -> Result<Value, Fault> {
    let Text { text, tag: _ } = request.body()?;
    let current = Current::read(request).await?;
    let text = match current.unmasked(&text) {
        Ok(text) => text,
        Err(Fault::AdminConflict { problem, .. }) => {
            let problem = json!({ "kind": "error", "message": problem });
            return Ok(json!({ "ok": false, "problems": [problem], "changes": [], "needsUpgrade": [] }));
        }
        Err(other) => return Err(other),
    };
    Ok(match current.check(&text) {
        Ok(Loaded { config, warnings }) => {
            let pool = request.from.pool;
            let before: Vec<_> = pool.endpoints.iter().map(|endpoint| &endpoint.config).collect();
            let Config { server, endpoints } = &config;
            let after: Vec<_> = endpoints.iter().collect();
            json!({
                "ok": true,
                "problems": warnings.iter().map(shown).collect::<Vec<_>>(),
                "changes": changes((&pool.server, &before), (server, &after)),
                "needsUpgrade": needs_upgrade(&pool.server, server),
            })
        }
        Err(problems) => {
            let problems: Vec<_> = problems.iter().map(shown).collect();
            json!({ "ok": false, "problems": problems, "changes": [], "needsUpgrade": [] })
        }
    })
}

fn shown(problem: &Problem) -> Value {
    let Problem { file: _, line, endpoint, path, message, hint, excerpt, kind } = problem;
    json!({
        "kind": if *kind == ProblemKind::Error { "error" } else { "warning" },
        "line": line,
        "endpoint": endpoint,
        "path": path,
        "message": without_keys(message),
        "hint": hint,
        "excerpt": excerpt,
    })
}

pub(super) async fn apply(request: &Request<'_>) -> Result<Value, Fault> {
    let Text { text, tag: based_on } = request.body()?;
    let current = Current::read(request).await?;
    if based_on.is_some_and(|based_on| based_on != tag(&current.text)) {
        let problem = "The config file was changed meanwhile. Read it again, and make your change to what it is now.";
        return Err(conflict("config_changed", problem.to_owned()));
    }
    let text = current.unmasked(&text)?;
    put(request, &current, text, "config.apply", "").await
}

pub(super) async fn versions(request: &Request<'_>) -> Result<Value, Fault> {
    let versions = Versions::new(request.from.process.ledger.path());
    let list = tokio::task::spawn_blocking(move || versions.list()).await.map_err(|_| Fault::Internal)?;
    let list =
        list.map_err(|error| conflict("versions_unreadable", format!("Kept versions cannot be read: {error}.")))?;
    let rows = list.iter().rev().map(|version| json!({ "name": version.name, "at": version.at }));
    Ok(json!({ "data": rows.collect::<Vec<_>>() }))
}

pub(super) async fn version(request: &Request<'_>) -> Result<Value, Fault> {
    let text = kept(request).await?;
    let MaskedText { text, .. } = mask(&text);
    Ok(json!({ "name": request.name, "text": text }))
}

/// Goes back to a kept version. Its secrets are its own.
pub(super) async fn restore(request: &Request<'_>) -> Result<Value, Fault> {
    let text = kept(request).await?;
    let current = Current::read(request).await?;
    put(request, &current, text, "config.restore", request.name).await
}

async fn kept(request: &Request<'_>) -> Result<String, Fault> {
    let versions = Versions::new(request.from.process.ledger.path());
    let name = request.name.to_owned();
    let read = tokio::task::spawn_blocking(move || versions.read(&name)).await.map_err(|_| Fault::Internal)?;
    read.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Fault::AdminNotFound { what: format!("version {}", excerpt(request.name)) },
        _ => conflict("versions_unreadable", format!("The version cannot be read: {error}.")),
    })
}

/// Writes a text, and has it read. If it is refused then, the one before is put back.
async fn put(
    request: &Request<'_>,
    current: &Current,
    text: String,
    action: &str,
    subject: &str,
) -> Result<Value, Fault> {
    if let Err(problems) = current.check(&text) {
        return refused(request, action, subject, ("config_invalid", problems.to_string())).await;
    }
    let path = &current.source.path;
    if let Err(why) = write(path.clone(), text).await? {
        return refused(request, action, subject, ("config_read_only", why)).await;
    }
    let reloaded = request.actions()?.reload().await;
    if let Err(why) = reloaded {
        if let Err(error) = write(path.clone(), current.text.clone()).await? {
            log::error!("config {}: the text before could not be put back: {error}", path.display());
        }
        request.actions()?.reload().await.map(drop).unwrap_or_default();
        return refused(request, action, subject, ("config_invalid", why)).await;
    }
    request.done(action, subject, reloaded).await
}

async fn refused(
    request: &Request<'_>,
    action: &str,
    subject: &str,
    (code, why): (&'static str, String),
) -> Result<Value, Fault> {
    let problem = without_keys(&why);
    request.from.process.audit.add(&request.author.to_string(), action, subject, &Err(problem.clone())).await;
    Err(conflict(code, problem))
}

/// Writes the file, whole or not at all, for the owner and with the rights that it has. An inner error says why it may not be written.
async fn write(path: PathBuf, text: String) -> Result<Result<(), String>, Fault> {
    let write = move || {
        if let Some(obstacle) = obstacle(&path) {
            return Err(obstacle);
        }
        replace(&path, &text).map_err(|error| format!("{} cannot be written: {error}.", path.display()))
    };
    tokio::task::spawn_blocking(write).await.map_err(|_| Fault::Internal)
}

fn replace(path: &Path, text: &str) -> io::Result<()> {
    let before = std::fs::metadata(path)?;
    let mut fresh = tempfile_beside(path)?;
    let write = |fresh: &mut Fresh| -> io::Result<()> {
        fresh.file.write_all(text.as_bytes())?;
        fresh.file.set_permissions(std::fs::Permissions::from_mode(before.mode() & 0o7777))?;
        let mine = fresh.file.metadata()?;
        if (mine.uid(), mine.gid()) != (before.uid(), before.gid()) {
            chown(&fresh.path, Some(before.uid()), Some(before.gid()))?;
        }
        fresh.file.sync_all()?;
        std::fs::rename(&fresh.path, path)
    };
    let written = write(&mut fresh);
    if written.is_err() {
        std::fs::remove_file(&fresh.path).unwrap_or_default();
    }
    written
}

/// A new file in the folder of another one.
struct Fresh {
    path: PathBuf,
    file: std::fs::File,
}

fn tempfile_beside(path: &Path) -> io::Result<Fresh> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let path = path.with_file_name(format!(".{name}.{}-{:08x}", std::process::id(), fastrand::u32(..)));
    let mut options = std::fs::OpenOptions::new();
    std::os::unix::fs::OpenOptionsExt::mode(options.write(true).create_new(true), 0o600);
    Ok(Fresh { file: options.open(&path)?, path })
}

/// What keeps the file from being replaced; none if nothing does.
fn obstacle(path: &Path) -> Option<String> {
    let shown = path.display();
    match path.symlink_metadata() {
        Ok(found) if found.is_symlink() => {
            return Some(format!("{shown} is a link, as a ConfigMap mounts one: change what it is made from."));
        }
        Err(error) => return Some(format!("{shown}: {error}.")),
        Ok(_) => {}
    }
    match tempfile_beside(path) {
        Ok(fresh) => {
            std::fs::remove_file(&fresh.path).unwrap_or_default();
            None
        }
        Err(error) => Some(format!(
            "The folder of {shown} cannot be written to by this process ({error}), as it is with the Debian package and in a container. \
             Change the file as its owner; it is read as soon as it is saved."
        )),
    }
}
