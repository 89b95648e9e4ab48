//! The keys of an endpoint: one, or a pool of them, from the config itself, from files and from variables. Each key of a pool is a lane,
//! with limits of its own.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::checked::Check;
use super::client_keys::KeyDigest;
use super::endpoint::{NAME_CHARS_MAX, check_label, check_pattern, limit};
use super::file::{self, ApiKeyFile, LaneFile};
use super::limits::{Limit, PerLimit};
use super::problem::join;
use super::{check_ordinary, read_bounded};
use crate::config::secret::Secret;

/// Keys of one endpoint. Each takes some kilobytes of memory.
pub(super) const LANES_MAX: usize = 20_000;
/// A shorter key shows none of its characters.
const SHOWN_CHARS_MIN: usize = 20;
/// Characters of a longer one that are shown, its last.
const SHOWN_CHARS: usize = 4;
/// Problems of one file or variable that are reported; more are alike.
const PROBLEMS_MAX: usize = 10;

/// A key of an endpoint, and what belongs to it alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lane {
    /// The key.
    pub key: Secret,
    /// Its name, or else a digest of the key: the place in a list says nothing, so that counts do not move with it.
    pub id: Arc<str>,
    /// What may be shown of it: its name, and the last characters of a key that is long enough.
    pub label: Arc<str>,
    /// Limits; none of them is [`Limit::Off`].
    pub limits: PerLimit<Limit>,
    /// Share among the keys of its endpoint, from 1 to 65535.
    pub weight: u32,
    /// Models that it is for, as the endpoint is sent them: exact names, and beginnings that end in `*`. All, if there are none.
    pub models: Vec<String>,
    /// The organisation whose objects it reaches.
    pub organization: Arc<str>,
}

impl Lane {
    /// True if it is for a model. A request without one may use any key.
    pub fn has_model(&self, model: &str) -> bool {
        let matches = |pattern: &String| match pattern.strip_suffix('*') {
            Some(beginning) => model.starts_with(beginning),
            None => pattern == model,
        };
        self.models.is_empty() || model.is_empty() || self.models.iter().any(matches)
    }
}

/// Keys of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointKeys {
    /// The keys in the order of the config, at least one.
    pub lanes: Vec<Lane>,
    /// True if they stand in `apiKeys`, so that each has counts and a health of its own.
    pub is_pool: bool,
    /// Files that they were read from.
    pub files: Vec<PathBuf>,
}

/// An endpoint, as far as its keys need to know it.
#[derive(Clone, Copy)]
pub(super) struct Of<'a> {
    /// Its id, if it has a good one.
    pub id: &'a str,
    /// The organisation that it names.
    pub organization: Option<&'a str>,
    /// Path of it in the config.
    pub path: &'a str,
}

/// The keys of an endpoint: exactly one of `apiKey` and `apiKeys`.
pub(super) fn check(
    (one, several): (Option<Secret>, Option<Vec<ApiKeyFile>>),
    of: Of<'_>,
    check: &mut Check<'_>,
) -> Option<EndpointKeys> {
    let path = join(of.path, "apiKeys");
    match (one, several) {
        (one, None) => {
            let key = endpoint_key(one, &join(of.path, "apiKey"), check)?;
            let organization = of.organization.unwrap_or(of.id).into();
            let (id, label) = (lane_digest(&key).into(), shown(None, &key, 1));
            let (limits, weight) = (PerLimit::default(), file::WEIGHT_DEFAULT.into());
            let lane = Lane { key, id, label, limits, weight, models: Vec::new(), organization };
            Some(EndpointKeys { lanes: vec![lane], is_pool: false, files: Vec::new() })
        }
        (Some(_), Some(_)) => {
            check.report.error(&path, "stands beside apiKey", "keep one of the two; apiKeys can hold that key as well");
            None
        }
        (None, Some(typed)) => {
            let mut pool = Pool { of, lanes: Vec::new(), files: Vec::new(), is_whole: true, places: HashMap::new() };
            for (index, typed) in typed.into_iter().enumerate() {
                pool.add(typed, &format!("{path}[{index}]"), check);
            }
            pool.finish(&path, check)
        }
    }
}

/// A pool while it is read.
struct Pool<'a> {
    of: Of<'a>,
    lanes: Vec<Lane>,
    files: Vec<PathBuf>,
    /// False once an error was reported.
    is_whole: bool,
    /// Where each key, by its digest, and each name was first found.
    places: HashMap<Arc<str>, String>,
}

impl Pool<'_> {
    fn add(&mut self, typed: ApiKeyFile, path: &str, check: &mut Check<'_>) {
        let LaneFile { key, file, env, name, rpm, rpd, tpm, tpd, max_concurrent, weight, models, organization } =
            match typed {
                ApiKeyFile::Key(key) => LaneFile { key: Some(key), ..LaneFile::default() },
                ApiKeyFile::Lane(typed) => *typed,
            };
        let limits = PerLimit { rpm, rpd, tpm, tpd, max_concurrent }.map(limit);
        let models = models.unwrap_or_default();
        for (index, model) in models.iter().enumerate() {
            self.is_whole &= check_pattern(model, &format!("{}[{index}]", join(path, "models")), check);
        }
        let organization = organization.filter(|text| !text.trim().is_empty());
        if let Some(organization) = &organization {
            self.is_whole &= check_label(organization, NAME_CHARS_MAX, &join(path, "organization"), check);
        }
        let terms = Terms {
            limits,
            weight: weight.unwrap_or(file::WEIGHT_DEFAULT).into(),
            models,
            organization: organization.as_deref().or(self.of.organization).map(Arc::from),
        };
        if name.is_some() && key.is_none() {
            let hint = "leave it out: each key of a file or a variable shows by its last characters";
            self.error(&join(path, "name"), "names one key, where there may be many", hint, check);
        }
        match (key, file, env) {
            (Some(key), None, None) => match endpoint_key(Some(key), path, check) {
                Some(key) => self.lane(key, name, &terms, path, check),
                None => self.is_whole = false,
            },
            (None, Some(file), None) => self.file(&file, &terms, &join(path, "file"), check),
            (None, None, Some(env)) => self.variable(&env, &terms, &join(path, "env"), check),
            _ => {
                let hint = "write \"key\": \"…\", \"file\": \"keys.txt\" or \"env\": \"NAME\", one of the three";
                self.error(path, "does not say where its key is", hint, check);
            }
        }
    }

    fn file(&mut self, typed: &str, terms: &Terms, path: &str, check: &mut Check<'_>) {
        let file = check.base_dir.join(typed);
        // It is watched even while it cannot be read, so that it is found once it is there.
        self.files.push(file.clone());
        let read = check_ordinary(&file).and_then(|()| read_bounded(&file));
        match read.and_then(|bytes| String::from_utf8(bytes).map_err(std::io::Error::other)) {
            Ok(text) => {
                let text = text.trim_start_matches('\u{feff}');
                let lines = text.lines().enumerate().map(|(index, line)| (format!("line {}", index + 1), line));
                self.texts(lines, terms, (path, typed), check);
            }
            Err(error) => {
                let hint = "a relative path starts from the folder of the configuration file";
                self.error(path, format!("cannot read {typed:?}: {error}"), hint, check);
            }
        }
    }

    fn variable(&mut self, name: &str, terms: &Terms, path: &str, check: &mut Check<'_>) {
        let Some(value) = check.environment.value(name).map(str::to_owned) else {
            let hint = "set it where api-together is started, or in a file .env beside the config";
            return self.error(path, format!("the variable {name} is not set"), hint, check);
        };
        let texts = value.split([',', '\n']).enumerate().map(|(index, text)| (format!("entry {}", index + 1), text));
        self.texts(texts, terms, (path, name), check);
    }

    /// Keys of a file or a variable: blank ones and comments are left out, and what is wrong with one is said with its place.
    fn texts<'t>(
        &mut self,
        texts: impl Iterator<Item = (String, &'t str)>,
        terms: &Terms,
        (path, source): (&str, &str),
        check: &mut Check<'_>,
    ) {
        let (mut found, mut problems) = (0, 0);
        for (place, text) in texts {
            let text = text.trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            found += 1;
            if problems >= PROBLEMS_MAX || self.lanes.len() > LANES_MAX {
                continue;
            }
            // A comment may stand behind a key, which has no blank in it.
            let (key, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
            let what = if !rest.trim_start().is_empty() && !rest.trim_start().starts_with('#') {
                Some("has a space in it")
            } else if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                Some("has a character that a header cannot carry")
            } else if key.contains([',', '"', '\'', '`']) || is_assignment(key) {
                Some("is more than a key: leave out names, quotation marks and commas")
            } else {
                None
            };
            if let Some(what) = what {
                problems += 1;
                let hint = "one key a line, and comments behind a #; was the key copied whole?";
                self.error(path, format!("{place} of {source} {what}"), hint, check);
                continue;
            }
            self.lane(Secret::new(key), None, terms, &format!("{path} ({place})"), check);
        }
        if found == 0 {
            let hint = "write one key a line, or leave the entry out";
            self.error(path, format!("{source} has no key in it"), hint, check);
        }
    }

    /// Another key, unless it is there already.
    fn lane(&mut self, key: Secret, name: Option<String>, terms: &Terms, path: &str, check: &mut Check<'_>) {
        let name = name.filter(|name| !name.trim().is_empty());
        if let Some(name) = &name {
            self.is_whole &= check_label(name, NAME_CHARS_MAX, &join(path, "name"), check);
        }
        let digest: Arc<str> = lane_digest(&key).into();
        if let Some(first) = self.places.get(&digest) {
            let message = format!("has the key of {first}");
            check.report.warning(path, message, "leave it out: a vendor counts a key once, wherever it stands");
            return;
        }
        self.places.insert(Arc::clone(&digest), path.to_owned());
        let id = name.as_deref().map_or(digest, Arc::from);
        if name.is_some()
            && let Some(first) = self.places.insert(Arc::clone(&id), path.to_owned())
        {
            let message = format!("{id:?} is the name of {first} already");
            let hint = "counts are kept by name, so each key needs its own";
            return self.error(&join(path, "name"), message, hint, check);
        }
        // 0 switches a key off, as it does an endpoint.
        if terms.limits.each().any(|(_, limit)| limit == Limit::Off) {
            return;
        }
        let label = shown(name.as_deref(), &key, self.lanes.len() + 1);
        let Terms { limits, weight, models, organization } = terms.clone();
        let organization = organization.unwrap_or_else(|| format!("{}/{id}", self.of.id).into());
        self.lanes.push(Lane { key, id, label, limits, weight, models, organization });
    }

    fn error(&mut self, path: &str, message: impl Into<String>, hint: &str, check: &mut Check<'_>) {
        self.is_whole = false;
        check.report.error(path, message, hint);
    }

    /// Numbers those that would show alike.
    fn tell_apart(&mut self) {
        let mut shown: HashMap<Arc<str>, usize> = HashMap::new();
        for lane in &mut self.lanes {
            let times = shown.entry(Arc::clone(&lane.label)).or_default();
            *times += 1;
            if *times > 1 {
                lane.label = format!("{} #{times}", lane.label).into();
            }
        }
    }

    fn finish(mut self, path: &str, check: &mut Check<'_>) -> Option<EndpointKeys> {
        if self.lanes.len() > LANES_MAX {
            let hint = format!("use {LANES_MAX} at most, and another endpoint for the others");
            self.error(path, "has too many keys", &hint, check);
        }
        if self.lanes.is_empty() && self.is_whole {
            self.error(
                path,
                "has no key that is switched on",
                "it is a list of keys that the endpoint gave you",
                check,
            );
        }
        self.tell_apart();
        self.is_whole.then_some(EndpointKeys { lanes: self.lanes, is_pool: true, files: self.files })
    }
}

/// What several keys have in common.
#[derive(Clone)]
struct Terms {
    limits: PerLimit<Limit>,
    weight: u32,
    models: Vec<String>,
    organization: Option<Arc<str>>,
}

/// True for `NAME=value`, as a file of variables has it.
fn is_assignment(text: &str) -> bool {
    let is_name = |name: &str| name.len() >= 3 && name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_');
    text.split_once('=').is_some_and(|(name, value)| is_name(name) && !value.is_empty())
}

/// What tells keys apart without showing any.
pub(crate) fn lane_digest(key: &Secret) -> String {
    /// Of 64 digits, half tell any number of keys apart.
    const DIGITS: usize = 32;
    KeyDigest::of(key.expose().as_bytes()).text().chars().take("sha256:".len() + DIGITS).collect()
}

/// `at`: its place in the pool, for a key that shows nothing else.
fn shown(name: Option<&str>, key: &Secret, at: usize) -> Arc<str> {
    let chars = key.expose().chars().count();
    let end: String = key.expose().chars().skip(chars.saturating_sub(SHOWN_CHARS)).collect();
    match (name, chars >= SHOWN_CHARS_MIN) {
        (Some(name), true) => format!("{name} (…{end})").into(),
        (Some(name), false) => name.into(),
        (None, true) => format!("…{end}").into(),
        (None, false) => format!("key {at}").into(),
    }
}

fn endpoint_key(typed: Option<Secret>, path: &str, check: &mut Check<'_>) -> Option<Secret> {
    let hint = "it is the key the endpoint gave you; for one that wants none write any word";
    let key = check.key(typed, path, hint)?;
    if key.expose().contains(char::is_whitespace) {
        check.report.warning(path, "has a space in it", "was something else copied with it?");
    }
    let text = key.expose().to_ascii_lowercase();
    if ["your-", "your_", "-here"].iter().any(|part| text.contains(part)) {
        let hint = "put your real key here, or ${NAME} to take it from the environment";
        check.report.warning(path, "looks like a placeholder", hint);
    }
    Some(key)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::super::{Config, Environment, Format, Problems, check_str};

    const KEY: &str = "sk-0-4be2a90c7d115f38";

    fn loaded(folder: &Path, keys: &Value, more: &Value) -> Result<(Config, Vec<String>), Problems> {
        let mut api = json!({ "id": "a", "baseUrl": "https://api.example.com", "models": ["*"], "apiKeys": keys });
        api.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let text = json!({ "server": { "apiKey": "sk-client-7d1f93a8c05e42b6" }, "apis": [api] }).to_string();
        let environment = Environment::fixed([("KEYS", "sk-1-9c07e52ba8836d41, ,sk-2-e1f34d6078ba9c25\nshort")]);
        let loaded = check_str(&text, Format::Json, &environment, folder)?;
        Ok((loaded.config, loaded.warnings.iter().map(ToString::to_string).collect()))
    }

    fn refused(keys: &Value, more: &Value) -> String {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("env.txt"), "OPENAI_API_KEY=sk-3-70a8cd9be4f2615d\n").unwrap();
        std::fs::write(folder.path().join("empty.txt"), "# none\n\n").unwrap();
        std::fs::write(folder.path().join("torn.txt"), "sk-3-70a8cd9be4f2615d\nsk-4 2f5d81c9\n").unwrap();
        loaded(folder.path(), keys, more).unwrap_err().to_string()
    }

    #[test]
    fn keys_come_from_the_config_from_files_and_from_variables() {
        let folder = tempfile::tempdir().unwrap();
        let text = "\u{feff}# ours\nsk-3-70a8cd9be4f2615d\n\n sk-4-2f5d81c96ae07b34\t# the second\r\n";
        std::fs::write(folder.path().join("keys.txt"), text).unwrap();
        let keys = json!([
            KEY,
            { "file": "keys.txt", "rpm": 7, "weight": 2 },
            { "env": "KEYS", "organization": "acme" },
            { "key": "z", "name": "off", "rpd": 0 },
            { "key": "x", "name": "team", "models": ["m*"] },
        ]);
        let (config, _) = loaded(folder.path(), &keys, &json!({})).unwrap_or_else(|problems| panic!("{problems}"));
        let keys = &config.endpoints[0].keys;
        let shown: Vec<_> =
            keys.lanes.iter().map(|lane| (&*lane.label, lane.limits.rpm.as_number(), lane.weight)).collect();
        let expected = [("…5f38", -1, 1), ("…615d", 7, 2), ("…7b34", 7, 2), ("…6d41", -1, 1), ("…9c25", -1, 1)];
        assert_eq!(shown[..5], expected);
        assert_eq!(shown[5..], [("key 6", -1, 1), ("team", -1, 1)], "a short key shows nothing of itself");
        assert_eq!(keys.files, [folder.path().join("keys.txt")]);
        assert!(keys.is_pool);
        let organizations: Vec<&str> = keys.lanes.iter().map(|lane| &*lane.organization).collect();
        assert_eq!((organizations[3], organizations[6]), ("acme", "a/team"));
        assert!(organizations[0].starts_with("a/sha256:") && organizations[0] != organizations[1]);
        let [.., team] = &keys.lanes[..] else { panic!() };
        assert!(team.has_model("m1") && team.has_model("") && !team.has_model("n"));
        assert!(!format!("{keys:?}").contains(KEY));
    }

    #[test]
    fn counts_move_neither_with_the_order_nor_with_a_new_key_of_a_name() {
        let ids = |keys: Value| -> Vec<String> {
            let (config, _) = loaded(Path::new(""), &keys, &json!({})).unwrap_or_else(|problems| panic!("{problems}"));
            config.endpoints[0].keys.lanes.iter().map(|lane| lane.id.to_string()).collect()
        };
        let (there, back) =
            (ids(json!([KEY, { "key": "x", "name": "n" }])), ids(json!([{ "key": "y", "name": "n" }, KEY])));
        assert_eq!((&there[0], &there[1]), (&back[1], &back[0]));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        for (keys, more, expected) in [
            (json!([]), json!({}), "apis[0].apiKeys: has no key that is switched on"),
            (json!([{ "key": "x", "rpm": 0 }]), json!({}), "apis[0].apiKeys: has no key that is switched on"),
            (json!(["x"]), json!({ "apiKey": "y" }), "apis[0].apiKeys: stands beside apiKey"),
            (json!([{ "rpm": 3 }]), json!({}), "apis[0].apiKeys[0]: does not say where its key is"),
            (json!([{ "key": "x", "env": "KEYS" }]), json!({}), "apis[0].apiKeys[0]: does not say where its key is"),
            (json!([{ "env": "NONE" }]), json!({}), "apis[0].apiKeys[0].env: the variable NONE is not set"),
            (json!([{ "file": "gone.txt" }]), json!({}), "apis[0].apiKeys[0].file: cannot read \"gone.txt\""),
            (json!([{ "file": "empty.txt" }]), json!({}), "apis[0].apiKeys[0].file: empty.txt has no key in it"),
            (json!([{ "file": "env.txt" }]), json!({}), "line 1 of env.txt is more than a key"),
            (json!([{ "file": "torn.txt" }]), json!({}), "line 2 of torn.txt has a space in it"),
            (json!([{ "env": "KEYS", "name": "n" }]), json!({}), "apis[0].apiKeys[0].name: names one key"),
            (json!([{ "key": "x", "name": "n" }, { "key": "y", "name": "n" }]), json!({}), "is the name of"),
            (json!(["x", 7]), json!({}), "apis[0].apiKeys[1]: expected text or an object, found a number"),
            (json!(["x", { "key": "y", "rpm": "many" }]), json!({}), "apis[0].apiKeys[1].rpm"),
            (json!(["x", { "key": "y", "models": ["a*b"] }]), json!({}), "apis[0].apiKeys[1].models[0]"),
        ] {
            let said = refused(&keys, &more);
            assert!(said.contains(expected), "{keys}: {said}");
        }
        let said = refused(&json!([{ "file": "torn.txt" }]), &json!({}));
        assert!(!said.contains("2f5d81c9") && !said.contains("615d"), "{said}");
    }

    #[test]
    fn a_word_that_is_not_known_there_is_told() {
        let keys = json!(["x", { "key": "y", "weigth": 3 }]);
        let (_, warnings) = loaded(Path::new(""), &keys, &json!({})).unwrap();
        let told = |warning: &String| warning.contains("apis[0].apiKeys[1].weigth") && warning.contains("`weight`");
        assert!(warnings.iter().any(told), "{warnings:?}");
    }

    #[test]
    fn a_model_that_no_key_is_for_is_told() {
        let keys = json!([{ "key": "x", "models": ["gpt-*"] }]);
        let (_, warnings) = loaded(Path::new(""), &keys, &json!({ "models": ["gpt-4o", "o1", "*"] })).unwrap();
        let told: Vec<_> = warnings.iter().filter(|warning| warning.contains("no key is for")).collect();
        assert!(told.len() == 1 && told[0].contains("apis[0].apiKeys: no key is for the model \"o1\""), "{warnings:?}");
    }

    #[test]
    fn a_key_that_stands_twice_counts_once() {
        let (config, warnings) = loaded(Path::new(""), &json!([KEY, { "key": KEY, "name": "n" }]), &json!({})).unwrap();
        assert_eq!(config.endpoints[0].keys.lanes.len(), 1);
        assert!(
            warnings.iter().any(|warning| warning.contains("apis[0].apiKeys[1]: has the key of apis[0].apiKeys[0]")),
            "{warnings:?}"
        );
    }
}
