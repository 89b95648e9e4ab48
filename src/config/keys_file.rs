//! The file of clients' keys, which commands change while the process serves. It holds digests only, and is its owner's alone.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::{Offset, TimeZone};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::budgets::RAISES_MAX;
use super::checked::Check;
use super::client_keys::{Around, ClientKey, client_keys};
use super::environment::Environment;
use super::file::ClientKeyFile;
use super::problem::{Problem, Problems, Report};
use super::secret::without_keys;
use super::{check_ordinary, read};

/// Longest wait for another command that changes the file.
const LOCK_MAX: Duration = Duration::from_secs(10);
/// Pause between two looks at whether it has ended.
const LOCK_PAUSE: Duration = Duration::from_millis(20);
/// Digests of one key: of those that have ended the latest stay, so that their users are told what became of them.
const HASHES_MAX: usize = 8;

/// Place of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeysFile {
    /// Its path.
    pub path: PathBuf,
    /// True if the config names it, so that it has to be there.
    pub is_named: bool,
}

/// The file as it is typed.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct KeysText {
    keys: Vec<ClientKeyFile>,
}

/// A change of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "camelCase")]
pub enum KeysChange {
    /// Another key, with what it opens as the file has it.
    Add {
        /// Its entry.
        entry: Map<String, Value>,
    },
    /// Another key in place of one.
    Rotate {
        /// Name.
        name: String,
        /// Digest of the new one.
        hash: String,
        /// Its last characters, for lists.
        last_four: String,
        /// When the ones before stop opening.
        until: String,
    },
    /// More of a budget, for a while.
    Raise {
        /// Name.
        name: String,
        /// How much more, in the budget's unit.
        by: f64,
        /// That unit, `usd` or `tokens`, if it is named.
        unit: Option<String>,
        /// Period of the budget, if it is named.
        per: Option<String>,
        /// Until when.
        until: String,
    },
    /// A key that opens nothing any more.
    Revoke {
        /// Name.
        name: String,
        /// True if its requests that are running are cut off.
        now: bool,
    },
}

impl KeysChange {
    /// The name of the key that it is about.
    pub fn name(&self) -> &str {
        match self {
            Self::Add { entry } => entry.get("name").and_then(Value::as_str).unwrap_or_default(),
            Self::Rotate { name, .. } | Self::Raise { name, .. } | Self::Revoke { name, .. } => name,
        }
    }

    /// What is done, for the audit log.
    pub fn action(&self) -> &'static str {
        match self {
            Self::Add { .. } => "keys.add",
            Self::Rotate { .. } => "keys.rotate",
            Self::Raise { .. } => "keys.raise",
            Self::Revoke { .. } => "keys.revoke",
        }
    }

    /// The endpoints that a new key is for, if it is not for all.
    pub(super) fn endpoints(&self) -> impl Iterator<Item = &str> {
        let entry = if let Self::Add { entry } = self { Some(entry) } else { None };
        let ids = entry.and_then(|entry| entry.get("endpoints")).and_then(Value::as_array);
        ids.into_iter().flatten().filter_map(Value::as_str)
    }
}

impl KeysFile {
    /// The keys of the file; none if it is not there.
    pub(super) fn load(&self, around: &Around<'_>) -> Result<Vec<ClientKey>, Problems> {
        let shown = self.path.display().to_string();
        // One in a folder that may not be looked into is there, for all that is known.
        if !self.is_named && matches!(self.path.try_exists(), Ok(false)) {
            return Ok(Vec::new());
        }
        let hint = "make it with `api-together keys add NAME`, or leave server.keysFile out";
        let refused =
            |error: io::Error| Problems::from(Problem::error("", format!("cannot be read: {error}")).hint(hint));
        let text = check_ordinary(&self.path).map_err(refused).and_then(|()| read(&self.path, hint));
        text.and_then(|text| parse(&text, around)).map_err(|problems| problems.in_file(&shown))
    }

    /// What is wrong with who may read it.
    pub fn openness(&self) -> Option<String> {
        let mode = std::fs::metadata(&self.path).ok()?.permissions().mode() & 0o777;
        (mode & 0o077 != 0)
            .then(|| format!("{} can be read or written by others (mode {mode:o}); chmod 600 it", self.path.display()))
    }

    /// Changes the file as a whole, or not at all. Returns what was done, in words.
    pub fn change(&self, change: KeysChange) -> Result<String, String> {
        let path = std::fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let fail = |error: io::Error| format!("{}: {error}", path.display());
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(fail)?;
        let _lock = lock(folder).map_err(fail)?;
        let mut file = match std::fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => json!({ "keys": [] }),
            Err(error) => return Err(fail(error)),
        };
        let done = apply(change, &mut file).map_err(|why| format!("{}: {why}", path.display()))?;
        let text = format!("{file:#}\n");
        // Nothing is written that could not be read again.
        parse(&text, &Around::alone()).map_err(|problems| problems.to_string())?;
        replace(&path, folder, &text).map_err(fail)?;
        Ok(done)
    }
}

fn parse(text: &str, around: &Around<'_>) -> Result<Vec<ClientKey>, Problems> {
    let KeysText { keys } =
        serde_json::from_str(text).map_err(|error| Problem::error("", without_keys(&error.to_string())))?;
    let mut report = Report::default();
    let environment = Environment::fixed::<&str, &str>([]);
    let mut check = Check { report: &mut report, environment: &environment, base_dir: Path::new("") };
    let keys = client_keys(keys, "keys", around, &mut check);
    report.finish(text).map(|_| keys)
}

/// Holds off other commands, by the folder: a file for it would belong to whoever came first. The lock ends with the descriptor.
fn lock(folder: &Path) -> io::Result<File> {
    let file = File::open(folder)?;
    let begun = Instant::now();
    while let Err(error) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
        if error != rustix::io::Errno::WOULDBLOCK || begun.elapsed() > LOCK_MAX {
            return Err(error.into());
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    Ok(file)
}

/// Puts a text in a file's place, for its owner alone: that of the file before, or else of the folder, if root does it for a service.
fn replace(path: &Path, folder: &Path, text: &str) -> io::Result<()> {
    let fresh = path.with_extension("new");
    // One that a command has left, or a link that somebody has put there.
    std::fs::remove_file(&fresh)
        .or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })?;
    let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&fresh)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    let owner = std::fs::metadata(path).or_else(|_| std::fs::metadata(folder))?;
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::fchown(&file, Some(owner.uid()), Some(owner.gid()))?;
    }
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)?;
    File::open(folder)?.sync_all()
}

fn apply(change: KeysChange, file: &mut Value) -> Result<String, String> {
    let keys = file.get_mut("keys").and_then(Value::as_array_mut).ok_or("has no list of keys")?;
    match change {
        KeysChange::Add { entry } => {
            let name = entry.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
            if let Some(known) = keys.iter().find(|key| key["name"] == name) {
                let what = if known["revoked"] == true { "was revoked" } else { "is there already" };
                // Another holder of the name would find its counts, its spend and its objects.
                return Err(format!(
                    "{name} {what}; name another one, or `keys rotate {name}` gives its holder a new key"
                ));
            }
            if let Some(expires) = entry.get("expires").and_then(Value::as_str).filter(|expires| is_past(expires)) {
                return Err(format!(
                    "{expires} is past, so that {name} would open nothing; name a day or a moment to come"
                ));
            }
            keys.push(entry.into());
            Ok(format!("{name} added"))
        }
        KeysChange::Rotate { name, hash, last_four, until } => {
            let key = named(keys, &name)?;
            // What was revoked stays so.
            let is_revoked = key.shift_remove("revoked") == Some(json!(true));
            key.shift_remove("cut");
            let until = if is_revoked { Timestamp::UNIX_EPOCH.to_string() } else { until };
            let mut hashes =
                key.shift_remove("hashes").and_then(|hashes| hashes.as_array().cloned()).unwrap_or_default();
            hashes.extend(key.shift_remove("keyHash").map(|hash| json!({ "hash": hash })));
            for one in &mut hashes {
                // One that is to end earlier does.
                if one.get("until").and_then(Value::as_str).is_none_or(|ends| ends > until.as_str()) {
                    one["until"] = json!(until);
                }
            }
            hashes.push(json!({ "hash": hash }));
            hashes.drain(..hashes.len().saturating_sub(HASHES_MAX));
            key.insert("hashes".into(), hashes.into());
            key.insert("lastFour".into(), last_four.into());
            Ok(if is_revoked {
                format!("{name} opens again, with another key; the one before stays revoked")
            } else {
                format!("{name} has another key; the one before opens until {until}")
            })
        }
        KeysChange::Raise { name, by, unit, per, until } => {
            let budget = one_budget(named(keys, &name)?, &name, unit.as_deref(), per.as_deref())?;
            let per = budget.get("per").and_then(Value::as_str).unwrap_or_default().to_owned();
            let unit = if budget.contains_key("tokens") { "tokens" } else { "usd" };
            if unit == "tokens" && by.fract() != 0.0 {
                return Err(format!("{by} tokens are no number of tokens; leave the fraction out"));
            }
            if is_past(&until) {
                return Err(format!("{until} is past, so that it would raise nothing; name a day or a moment to come"));
            }
            let raises = budget.entry("raises").or_insert_with(|| json!([]));
            let raises = raises.as_array_mut().ok_or("has raises that are no list")?;
            raises.push(json!({ "by": by, "until": until }));
            raises.drain(..raises.len().saturating_sub(RAISES_MAX));
            let of = match per.as_str() {
                "total" => "in all".to_owned(),
                "5h" => "in five hours".to_owned(),
                "hour" => "an hour".to_owned(),
                per => format!("a {per}"),
            };
            Ok(format!("{name} may take {by} {unit} more {of}, until {until}"))
        }
        KeysChange::Revoke { name, now } => {
            let key = named(keys, &name)?;
            key.insert("revoked".into(), json!(true));
            if now {
                key.insert("cut".into(), json!(true));
            }
            Ok(format!("{name} revoked"))
        }
    }
}

/// True if a day or a moment is over everywhere. What is neither is refused where it is read.
fn is_past(text: &str) -> bool {
    let now = Timestamp::now();
    let day = || text.parse::<Date>().is_ok_and(|day| day < TimeZone::fixed(Offset::MIN).to_datetime(now).date());
    text.parse::<Timestamp>().map_or_else(|_| day(), |moment| moment <= now)
}

fn named<'a>(keys: &'a mut [Value], name: &str) -> Result<&'a mut Map<String, Value>, String> {
    let found = keys.iter_mut().filter_map(Value::as_object_mut);
    let mut found = found.filter(|key| key.get("name").and_then(Value::as_str) == Some(name));
    found.next().ok_or_else(|| format!("has no key {name}; those of the config are changed there"))
}

/// The budget of a key that is meant, if there is only one that may be.
fn one_budget<'a>(
    key: &'a mut Map<String, Value>,
    name: &str,
    unit: Option<&str>,
    per: Option<&str>,
) -> Result<&'a mut Map<String, Value>, String> {
    let budgets = key.get_mut("budget").and_then(Value::as_array_mut).map(Vec::as_mut_slice).unwrap_or_default();
    let budgets = budgets.iter_mut().filter_map(Value::as_object_mut);
    let is_meant = |budget: &Map<String, Value>| {
        per.is_none_or(|per| budget.get("per").and_then(Value::as_str) == Some(per))
            && unit.is_none_or(|unit| budget.contains_key(unit))
    };
    let mut meant: Vec<_> = budgets.filter(|budget| is_meant(budget)).collect();
    match (meant.pop(), meant.is_empty()) {
        (Some(budget), true) => Ok(budget),
        (Some(_), false) => Err(format!("{name} has several such budgets; name one, with --per and the unit of --by")),
        (None, _) => Err(format!("{name} has no such budget; `api-together keys list` shows those that it has")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::client_keys::KeyDigest;

    #[test]
    fn a_budget_is_raised_if_it_is_known_which() {
        let folder = tempfile::tempdir().unwrap();
        let file = KeysFile { path: folder.path().join("keys.json"), is_named: false };
        let budgets = json!([{ "usd": 10, "per": "month" }, { "usd": 1, "per": "day" }, { "tokens": 9, "per": "day" }]);
        let KeysChange::Add { mut entry } = entry("ada", "one") else { unreachable!() };
        entry.insert("budget".into(), budgets);
        file.change(KeysChange::Add { entry }).unwrap();
        let raise = |unit: Option<&str>, per: Option<&str>, by: f64| {
            let (unit, per) = (unit.map(str::to_owned), per.map(str::to_owned));
            file.change(KeysChange::Raise { name: "ada".into(), by, unit, per, until: "9000-01-01T00:00:00Z".into() })
        };
        raise(None, Some("month"), 2.5).unwrap();
        raise(Some("tokens"), None, 7.0).unwrap();
        for (unit, per, why) in
            [(None, None, "several"), (None, Some("day"), "several"), (None, Some("week"), "no such budget")]
        {
            let problem = raise(unit, per, 1.0).unwrap_err();
            assert!(problem.contains(why), "{problem}");
        }
        assert!(raise(None, Some("month"), -1.0).is_err());
        assert!(raise(Some("tokens"), None, 1.5).unwrap_err().contains("leave the fraction out"));
        let past = KeysChange::Raise {
            name: "ada".into(),
            by: 1.0,
            unit: None,
            per: Some("month".into()),
            until: "2024-02-29".into(),
        };
        assert!(file.change(past).unwrap_err().contains("2024-02-29 is past"));
        let keys = file.load(&Around::alone()).unwrap();
        let raised: Vec<Vec<u64>> =
            keys[0].budgets.iter().map(|budget| budget.raises.iter().map(|raise| raise.by).collect()).collect();
        assert_eq!(raised, [vec![2_500_000_000], vec![], vec![7]]);
    }

    fn entry(name: &str, key: &str) -> KeysChange {
        let hash = KeyDigest::of(key.as_bytes()).text();
        let Value::Object(entry) = json!({ "name": name, "keyHash": hash, "models": ["m"] }) else { unreachable!() };
        KeysChange::Add { entry }
    }

    fn rotated(name: &str, key: &str, until: &str) -> KeysChange {
        let hash = KeyDigest::of(key.as_bytes()).text();
        KeysChange::Rotate { name: name.into(), hash, last_four: "abcd".into(), until: until.into() }
    }

    #[test]
    fn keys_are_added_rotated_and_revoked() {
        let folder = tempfile::tempdir().unwrap();
        let file = KeysFile { path: folder.path().join("state/keys.json"), is_named: false };
        let load = || file.load(&Around::alone()).unwrap();
        assert!(load().is_empty());
        file.change(entry("ada", "one")).unwrap();
        file.change(entry("bob", "two")).unwrap();
        assert!(file.change(entry("ada", "three")).unwrap_err().contains("ada is there already"));
        assert!(file.change(entry("eve", "two")).unwrap_err().contains("has the key of"), "one key opens one thing");
        assert!(file.change(entry("a b", "four")).is_err());
        let KeysChange::Add { entry: mut late } = entry("eve", "five") else { unreachable!() };
        late.insert("expires".into(), "2024-02-29".into());
        assert!(file.change(KeysChange::Add { entry: late }).unwrap_err().contains("2024-02-29 is past"));
        assert_eq!(std::fs::metadata(&file.path).unwrap().permissions().mode() & 0o777, 0o600);
        let text = std::fs::read_to_string(&file.path).unwrap();
        assert!(!text.contains("one") && text.contains("sha256:"), "{text}");

        file.change(rotated("ada", "new", "2027-01-01T00:00:00Z")).unwrap();
        file.change(rotated("ada", "newer", "2026-12-01T00:00:00Z")).unwrap();
        let [ada, _] = &load()[..] else { panic!() };
        let ends: Vec<_> = ada.hashes.iter().map(|hash| hash.until.map(|until| until.to_string())).collect();
        assert_eq!(ends, [Some("2026-12-01T00:00:00Z".into()), Some("2026-12-01T00:00:00Z".into()), None]);
        for number in 0..20 {
            file.change(rotated("ada", &format!("key {number}"), "2026-12-01T00:00:00Z")).unwrap();
        }
        assert_eq!(load()[0].hashes.len(), HASHES_MAX);

        file.change(KeysChange::Revoke { name: "bob".into(), now: true }).unwrap();
        assert!(load()[1].revoked && load()[1].cut && !load()[0].revoked);
        assert!(file.change(KeysChange::Revoke { name: "eve".into(), now: false }).is_err());
        assert!(file.change(entry("bob", "x")).unwrap_err().contains("keys rotate bob"));
        file.change(rotated("bob", "x", "2027-01-01T00:00:00Z")).unwrap();
        let [_, bob] = &load()[..] else { panic!() };
        let ends: Vec<_> = bob.hashes.iter().map(|hash| hash.until.map(Timestamp::as_second)).collect();
        assert_eq!((bob.revoked, bob.cut, &ends[..]), (false, false, &[Some(0), None][..]), "the revoked one stays so");
    }

    #[test]
    fn a_file_that_cannot_be_read_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = KeysFile { path: folder.path().join("keys.json"), is_named: true };
        assert!(
            file.load(&Around::alone()).unwrap_err().to_string().contains("keys add"),
            "it is named, and is not there"
        );
        for broken in
            ["", "{", "[]", r#"{"keys":[{"name":"a"}]}"#, r#"{"keys":[],"more":1}"#, r#"{"keys":[{"nam":1}]}"#]
        {
            std::fs::write(&file.path, broken).unwrap();
            assert!(file.load(&Around::alone()).is_err(), "{broken}");
            assert!(file.change(entry("ada", "one")).is_err(), "{broken}");
            assert_eq!(std::fs::read_to_string(&file.path).unwrap(), broken);
        }
        std::fs::set_permissions(&file.path, Permissions::from_mode(0o644)).unwrap();
        assert!(file.openness().unwrap().contains("644"));
    }

    #[test]
    fn commands_at_once_lose_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = KeysFile { path: folder.path().join("keys.json"), is_named: false };
        std::thread::scope(|scope| {
            for number in 0..20 {
                let file = &file;
                scope.spawn(move || file.change(entry(&format!("n{number}"), &format!("key {number}"))).unwrap());
            }
        });
        assert_eq!(file.load(&Around::alone()).unwrap().len(), 20);
    }
}
