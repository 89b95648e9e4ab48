//! The config file: shown with its secrets masked, checked, applied whole or not at all, and put back.

use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::Mutex;

use super::Request;
use crate::config::{
    self, Config, Environment, Format, KeptVersion, Loaded, Problem, ProblemKind, Problems, UnmaskError, Versions,
    changes, check_str, differs_by_hand, mask, needs_upgrade, read_bounded, unmask, without_keys,
};
use crate::fault::{Fault, excerpt};
use crate::process::ConfigSource;

/// Held while the file is changed: read, compared, written and taken in.
static CHANGING: Mutex<()> = Mutex::const_new(());

/// Another text, and which one it was made out of.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Text {
    /// The text, with masks where secrets stay.
    text: String,
    /// `tag` of the text that it was made out of. It has to be there to apply it.
    tag: Option<String>,
}

/// The file as it is now.
struct Current {
    source: ConfigSource,
    text: String,
}

impl Current {
    async fn read(request: &Request<'_>) -> Result<Arc<Self>, Fault> {
        let source = request
            .actions()?
            .config_source()
            .ok_or_else(|| conflict("config_read_only", "This process reads no config file.".to_owned()))?;
        let path = source.path.clone();
        let read = move || {
            config::check_ordinary(&path)?;
            String::from_utf8(read_bounded(&path)?).map_err(io::Error::other)
        };
        let text = aside(read)
            .await?
            .map_err(|error| conflict("config_unreadable", format!("The config file cannot be read: {error}.")))?;
        Ok(Arc::new(Self { source, text }))
    }

    fn format(&self) -> Format {
        Format::from_path(&self.source.path)
    }

    /// Checks another text in its place.
    async fn check(self: &Arc<Self>, text: &str) -> Result<Result<Loaded, Problems>, Fault> {
        let (current, text) = (Arc::clone(self), text.to_owned());
        aside(move || current.check_here(&text)).await
    }

    fn check_here(&self, text: &str) -> Result<Loaded, Problems> {
        let ConfigSource { path, flags } = &self.source;
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let base = absolute.parent().unwrap_or(Path::new(""));
        check_str(text, self.format(), &Environment::from_process(path, flags), base)
    }

    /// Another text with the secrets of this one in place of their masks. One that cannot be read stays as it is.
    async fn unmasked(self: &Arc<Self>, text: String) -> Result<String, Fault> {
        let current = Arc::clone(self);
        let unmasked = aside(move || (unmask(&text, &current.text, current.format()), text)).await?;
        match unmasked {
            (Ok(text), _) | (Err(UnmaskError::Syntax), text) => Ok(text),
            (Err(UnmaskError::Refused(why)), _) => Err(conflict("secret_needed", format!("{}.", without_keys(&why)))),
        }
    }
}

/// Runs what takes a while, or waits for a disk, aside from the threads that serve.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Fault> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Fault::Internal)
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
    let masking = Arc::clone(&current);
    let (text, not_shown) = match aside(move || mask(&masking.text, masking.format())).await? {
        Ok(text) => (Some(text), None),
        Err(why) => (None, Some(why)),
    };
    let path = current.source.path.clone();
    let obstacle = aside(move || obstacle(&path)).await?;
    let state = request.from.process.config.file();
    let format = match current.format() {
        Format::Json => "json",
        Format::Yaml => "yaml",
    };
    let loaded_at = Timestamp::try_from(request.from.pool.loaded_at).unwrap_or_default();
    super::shown(&ConfigShown {
        path: current.source.path.display().to_string(),
        format,
        text,
        tag: tag(&current.text),
        not_editable: not_shown.or(obstacle),
        version: request.from.pool.version,
        loaded_at,
        error: state.error,
        needs_upgrade: state.needs_upgrade,
    })
}

/// The config file as it may be shown.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ConfigShown {
    /// The file.
    path: String,
    /// `json` or `yaml`.
    format: &'static str,
    /// Its text, with a mask in place of each secret; null if it cannot be shown so.
    text: Option<String>,
    /// A short name of the text, by which a change of somebody else is noticed.
    tag: String,
    /// Why it cannot be changed here; null if it can be.
    not_editable: Option<String>,
    /// Number of the config that is in use.
    version: u64,
    /// When that was loaded.
    #[schemars(with = "String")]
    loaded_at: Timestamp,
    /// Why the file is not in use, if it is not.
    error: Option<String>,
    /// Changes in it that are not in use yet, each with what it waits for.
    needs_upgrade: Vec<String>,
}

/// What a text is worth.
#[derive(Default, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Checked {
    /// True if it could be used.
    ok: bool,
    /// What is wrong with it.
    problems: Vec<ShownProblem>,
    /// What would change, in words.
    changes: Vec<String>,
    /// What of that would wait for an upgrade or a restart.
    needs_upgrade: Vec<String>,
}

/// A problem of a text.
#[derive(Default, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct ShownProblem {
    /// `error` or `warning`.
    kind: &'static str,
    /// Its line, from 1.
    line: Option<usize>,
    /// Id of the endpoint that it is about.
    endpoint: Option<String>,
    /// Its place, such as `apis[2].baseUrl`.
    path: String,
    /// What is wrong.
    message: String,
    /// The way out.
    hint: Option<String>,
    /// The line with a mark, for errors of syntax.
    excerpt: Option<String>,
}

/// Texts that were in use.
#[derive(Serialize, JsonSchema)]
pub(super) struct VersionsList {
    data: Vec<VersionRow>,
}

#[derive(Serialize, JsonSchema)]
struct VersionRow {
    /// Its name.
    name: String,
    /// When it came into use.
    #[schemars(with = "String")]
    at: Timestamp,
}

/// A text that was in use.
#[derive(Serialize, JsonSchema)]
pub(super) struct VersionShown {
    name: String,
    /// The text, with a mask in place of each secret.
    text: String,
}

pub(super) async fn check(request: &Request<'_>) -> Result<Value, Fault> {
    let Text { text, tag: _ } = request.body()?;
    let current = Current::read(request).await?;
    let text = match current.unmasked(text).await {
        Ok(text) => text,
        Err(Fault::AdminConflict { problem, .. }) => {
            let problem = ShownProblem { kind: "error", message: problem, ..ShownProblem::default() };
            return super::shown(&Checked { problems: vec![problem], ..Checked::default() });
        }
        Err(other) => return Err(other),
    };
    super::shown(&match current.check(&text).await? {
        Ok(Loaded { config, warnings }) => {
            let pool = request.from.pool;
            let before: Vec<_> = pool.endpoints.iter().map(|endpoint| &endpoint.config).collect();
            let Config { server, endpoints } = &config;
            let after: Vec<_> = endpoints.iter().collect();
            Checked {
                ok: true,
                problems: warnings.iter().map(ShownProblem::of).collect(),
                changes: changes((&pool.server, &before), (server, &after)),
                needs_upgrade: needs_upgrade(&pool.server, server),
            }
        }
        Err(problems) => Checked { problems: problems.iter().map(ShownProblem::of).collect(), ..Checked::default() },
    })
}

impl ShownProblem {
    fn of(problem: &Problem) -> Self {
        let Problem { file: _, line, endpoint, path, message, hint, excerpt, kind } = problem;
        Self {
            kind: if *kind == ProblemKind::Error { "error" } else { "warning" },
            line: *line,
            endpoint: endpoint.clone(),
            path: path.clone(),
            message: without_keys(message),
            hint: hint.clone(),
            excerpt: excerpt.clone(),
        }
    }
}

pub(super) async fn apply(request: &Request<'_>) -> Result<Value, Fault> {
    let Text { text, tag: based_on } = request.body()?;
    let _only_one = CHANGING.lock().await;
    let current = Current::read(request).await?;
    if based_on.is_none_or(|based_on| based_on != tag(&current.text)) {
        let problem = "The config file was changed meanwhile. Read it again, and make your change to what it is now.";
        return Err(conflict("config_changed", problem.to_owned()));
    }
    let text = match current.unmasked(text).await {
        Ok(text) => text,
        Err(Fault::AdminConflict { code, problem }) => {
            return refused(request, "config.apply", "", (code, problem)).await;
        }
        Err(other) => return Err(other),
    };
    put(request, &current, text, "config.apply", "").await
}

pub(super) async fn versions(request: &Request<'_>) -> Result<Value, Fault> {
    let versions = Versions::new(request.from.process.ledger.path());
    let list = aside(move || versions.list()).await?;
    let list =
        list.map_err(|error| conflict("versions_unreadable", format!("Kept versions cannot be read: {error}.")))?;
    let row = |KeptVersion { at, name }| VersionRow { name, at };
    super::shown(&VersionsList { data: list.into_iter().rev().map(row).collect() })
}

pub(super) async fn version(request: &Request<'_>) -> Result<Value, Fault> {
    let text = kept(request).await?;
    let format = Format::from_path(Path::new(request.name));
    let text = aside(move || mask(&text, format)).await?.map_err(|why| conflict("not_shown", why))?;
    super::shown(&VersionShown { name: request.name.to_owned(), text })
}

/// Goes back to a kept version. Its secrets are its own.
pub(super) async fn restore(request: &Request<'_>) -> Result<Value, Fault> {
    let text = kept(request).await?;
    let _only_one = CHANGING.lock().await;
    let current = Current::read(request).await?;
    let (kept, now, format) = (text.clone(), Arc::clone(&current), Format::from_path(Path::new(request.name)));
    let by_hand = move || differs_by_hand((&kept, format), (&now.text, now.format()));
    if let Some(setting) = aside(by_hand).await? {
        let problem = format!("{setting}: differs there, and is changed in the file itself");
        return refused(request, "config.restore", request.name, ("secret_needed", problem)).await;
    }
    put(request, &current, text, "config.restore", request.name).await
}

async fn kept(request: &Request<'_>) -> Result<String, Fault> {
    let versions = Versions::new(request.from.process.ledger.path());
    let name = request.name.to_owned();
    aside(move || versions.read(&name)).await?.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Fault::AdminNotFound { what: format!("version {}", excerpt(request.name)) },
        _ => conflict("versions_unreadable", format!("The version cannot be read: {error}.")),
    })
}

/// Writes a text, and has it read. If it is refused then, the one before is put back.
async fn put(
    request: &Request<'_>,
    current: &Arc<Current>,
    text: String,
    action: &str,
    subject: &str,
) -> Result<Value, Fault> {
    if let Err(problems) = current.check(&text).await? {
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
    aside(write).await
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
