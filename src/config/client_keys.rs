//! Keys of clients: one for each person, program or agent, and what it opens.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use ring::digest::{SHA256, digest};
use subtle::ConstantTimeEq as _;

use super::budgets::{Budget, OnOverrun, budgets};
use super::calls::{CallKind, CallSet};
use super::checked::Check;
use super::cidr::Cidr;
use super::endpoint::{check_pattern, limit};
use super::file::{self, CallerModelLimitsFile, ClientKeyFile};
use super::key_strength;
use super::limits::{Limit, PerLimit};
use super::problem::join;
use crate::config::secret::Secret;

/// Keys at most.
const KEYS_MAX: usize = 100_000;
/// Entries of `modelLimits`.
const MODEL_LIMITS_MAX: usize = 64;
/// Longest name of a key, in characters.
const NAME_CHARS_MAX: usize = 64;
/// What stands before a digest in the config.
pub(crate) const DIGEST_PREFIX: &str = "sha256:";

/// The SHA-256 of a key. It opens nothing, but a key that can be guessed can be guessed from it, so it is not shown either.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyDigest([u8; 32]);

impl KeyDigest {
    /// The digest of a key.
    pub fn of(key: &[u8]) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest(&SHA256, key).as_ref());
        Self(bytes)
    }

    /// Compares in constant time.
    pub fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }

    /// As the config has it: `sha256:` and 64 hexadecimal digits.
    pub(crate) fn text(&self) -> String {
        let digits = self.0.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        let digits = digits.filter_map(|digit| char::from_digit(digit.into(), 16));
        DIGEST_PREFIX.chars().chain(digits).collect()
    }

    /// The digest of such a text.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let digits = text.trim().strip_prefix(DIGEST_PREFIX)?;
        let mut bytes = [0; 32];
        if digits.len() != 2 * bytes.len() {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self(bytes))
    }
}

/// Any part of a digest is as good as a hash of all of it.
impl Hash for KeyDigest {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0.first_chunk().copied().map_or(0, u64::from_le_bytes));
    }
}

impl fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyDigest")
    }
}

/// A digest, and until when it opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyHash {
    /// Digest.
    pub digest: KeyDigest,
    /// When it stops to open, if another one takes its place.
    pub until: Option<Timestamp>,
}

/// A client's key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "switches of the config, each of its own")]
pub struct ClientKey {
    /// Name.
    pub name: Arc<str>,
    /// What opens it: one key, or two while one takes the place of the other.
    pub hashes: Vec<KeyHash>,
    /// Models that it may ask for, by names and prefixes (`gpt-4o*`); any if none are named.
    pub models: Option<Vec<String>>,
    /// Calls that it may make.
    pub calls: CallSet,
    /// Ids of the endpoints that its requests may go to; any if none are named.
    pub endpoints: Option<Vec<String>>,
    /// Limits of its requests.
    pub limits: PerLimit<Limit>,
    /// Limits for some models, by the name that is asked for or a prefix.
    pub model_limits: BTreeMap<String, PerLimit<Limit>>,
    /// What its requests may take in an hour, a day or longer.
    pub budgets: Vec<Budget>,
    /// What becomes of a stream that a budget has no room for.
    pub on_overrun: OnOverrun,
    /// When it stops to open.
    pub expires: Option<Timestamp>,
    /// Addresses that it may be used from; any if none are named.
    pub allow_from: Vec<Cidr>,
    /// Turns in the queue that it has for each one of a key of weight 1.
    pub weight: u32,
    /// Labels.
    pub tags: Vec<String>,
    /// True if the request log keeps its bodies.
    pub log_bodies: bool,
    /// False while it is switched off.
    pub enabled: bool,
    /// True once it has been revoked.
    pub revoked: bool,
    /// True if its requests were cut off then.
    pub cut: bool,
    /// Last characters of the key, for lists.
    pub last_four: Option<String>,
}

impl ClientKey {
    /// False once it opens nothing any more, whatever the time.
    pub fn opens(&self) -> bool {
        self.enabled && !self.revoked
    }

    /// True if it may ask for a model of this name.
    pub fn allows_model(&self, name: &str) -> bool {
        let matches = |pattern: &String| match pattern.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => pattern == name,
        };
        self.models.as_ref().is_none_or(|patterns| patterns.iter().any(matches))
    }

    /// True if its requests may go to the endpoint of this id.
    pub fn allows_endpoint(&self, id: &str) -> bool {
        self.endpoints.as_ref().is_none_or(|ids| ids.iter().any(|allowed| allowed == id))
    }
}

/// What a key's entry is checked against.
pub(super) struct Around<'a> {
    /// Time zone whose midnight ends a day.
    pub timezone: &'a TimeZone,
    /// The key that all have.
    pub shared: Option<&'a Secret>,
    /// The key of those who run the gateway.
    pub admin: Option<&'a Secret>,
}

impl Around<'_> {
    /// Nothing around it.
    pub(super) fn alone() -> Self {
        static UTC: TimeZone = TimeZone::UTC;
        Self { timezone: &UTC, shared: None, admin: None }
    }
}

/// Checks the keys of `server.keys`, or of a file of keys. No two have one name, or one key.
pub(super) fn client_keys(
    typed: Vec<ClientKeyFile>,
    path: &str,
    around: &Around<'_>,
    check: &mut Check<'_>,
) -> Vec<ClientKey> {
    let mut names: BTreeMap<Arc<str>, String> = BTreeMap::new();
    let mut digests: HashMap<KeyDigest, String> = HashMap::new();
    if let Some(shared) = around.shared {
        digests.insert(KeyDigest::of(shared.expose().as_bytes()), "server.apiKey".into());
    }
    if let Some(admin) = around.admin {
        digests.insert(KeyDigest::of(admin.expose().as_bytes()), "server.adminKey".into());
    }
    if typed.len() > KEYS_MAX {
        let message = format!("has {} entries", typed.len());
        check.report.error(path, message, &format!("use {KEYS_MAX} at most"));
    }
    let mut keys = Vec::with_capacity(typed.len());
    for (index, typed) in typed.into_iter().enumerate() {
        let path = format!("{path}[{index}]");
        let Some(key) = client_key(typed, &path, around, check) else { continue };
        if let Some(first) = names.insert(Arc::clone(&key.name), path.clone()) {
            let hint = "what a key has used and made is kept by its name, so each needs its own";
            check.report.error(&join(&path, "name"), format!("{:?} is the name of {first} already", key.name), hint);
        }
        for KeyHash { digest, .. } in &key.hashes {
            if let Some(first) = digests.insert(*digest, path.clone()) {
                check.report.error(&path, format!("has the key of {first}"), "give each a key of its own");
            }
        }
        keys.push(key);
    }
    keys
}

fn client_key(typed: ClientKeyFile, path: &str, around: &Around<'_>, check: &mut Check<'_>) -> Option<ClientKey> {
    let at = |key: &str| join(path, key);
    let name = name(typed.name, &at("name"), check);
    let hashes = hashes(typed.key, typed.key_hash, typed.hashes, path, (around, check));
    for (index, model) in typed.models.iter().flatten().enumerate() {
        check_pattern(model, &format!("{}[{index}]", at("models")), check);
    }
    for (index, call) in typed.calls.iter().flatten().enumerate().filter(|(_, call)| CallKind::named(call).is_none()) {
        let names: Vec<_> = CallKind::ALL.iter().map(|kind| kind.name()).collect();
        let hint = format!("use one of {}", names.join(", "));
        check.report.error(&format!("{}[{index}]", at("calls")), format!("{call:?} names no calls"), &hint);
    }
    let calls =
        typed.calls.map_or(CallSet::ALL, |calls| calls.iter().filter_map(|name| CallKind::named(name)).collect());
    let typed_limits = PerLimit {
        rpm: typed.rpm,
        rpd: typed.rpd,
        tpm: typed.tpm,
        tpd: typed.tpd,
        max_concurrent: typed.max_concurrent,
    };
    let limits = limits(typed_limits, path, check);
    let model_limits = model_limits(typed.model_limits.unwrap_or_default(), &at("modelLimits"), check);
    let budgets = budgets(typed.budget, &at("budget"), around.timezone, check);
    let expires = moment(typed.expires.as_deref(), &at("expires"), around.timezone, check);
    let mut allow_from = Vec::new();
    for (index, text) in typed.allow_from.unwrap_or_default().iter().enumerate() {
        match text.trim().parse() {
            Ok(range) => allow_from.push(range),
            Err(_) => check.report.error(
                &format!("{}[{index}]", at("allowFrom")),
                format!("{text:?} is not a range of IP addresses"),
                "write an address such as ::1, or a range such as 10.0.0.0/8",
            ),
        }
    }
    Some(ClientKey {
        name: name?.into(),
        hashes: hashes?,
        models: typed.models,
        calls,
        endpoints: typed.endpoints,
        limits,
        model_limits,
        budgets,
        on_overrun: typed.on_overrun.unwrap_or_default(),
        expires: expires?,
        allow_from,
        weight: weight(typed.weight, &at("weight"), check),
        tags: typed.tags.unwrap_or_default(),
        log_bodies: typed.log_bodies.unwrap_or(file::LOG_BODIES_DEFAULT),
        enabled: typed.enabled.unwrap_or(file::ENABLED_DEFAULT),
        revoked: typed.revoked.unwrap_or_default(),
        cut: typed.cut.unwrap_or_default(),
        last_four: typed.last_four,
    })
}

fn weight(typed: Option<u16>, path: &str, check: &mut Check<'_>) -> u32 {
    let weight = typed.unwrap_or(file::WEIGHT_DEFAULT);
    if !(1..=file::KEY_WEIGHT_MAX).contains(&weight) {
        let hint =
            format!("use 1 to {}; a key of weight 2 has two turns for each one of weight 1", file::KEY_WEIGHT_MAX);
        check.report.error(path, format!("is {weight}"), &hint);
    }
    weight.into()
}

/// Limits of a key. None switches it off: `enabled` does.
fn limits(typed: PerLimit<Option<i64>>, path: &str, check: &mut Check<'_>) -> PerLimit<Limit> {
    for (kind, number) in typed.each() {
        if number.is_some_and(|number| number < -1) {
            check.report.error(&join(path, kind.key()), "is less than -1", "write -1 for no limit");
        }
    }
    let limits = typed.map(limit);
    for (kind, limit) in limits.each() {
        if limit == Limit::Off {
            let hint = "write -1 for no limit; `enabled: false` switches a key off, `models` says what it may ask for";
            check.report.error(&join(path, kind.key()), "is 0, so nothing could be asked for", hint);
        }
    }
    limits
}

fn model_limits(
    typed: BTreeMap<String, CallerModelLimitsFile>,
    path: &str,
    check: &mut Check<'_>,
) -> BTreeMap<String, PerLimit<Limit>> {
    if typed.len() > MODEL_LIMITS_MAX {
        let message = format!("has {} entries", typed.len());
        check.report.error(path, message, &format!("use {MODEL_LIMITS_MAX} at most; a prefix covers many models"));
    }
    let mut all = BTreeMap::new();
    for (pattern, typed) in typed {
        let path = join(path, &pattern);
        check_pattern(&pattern, &path, check);
        let CallerModelLimitsFile { rpm, rpd, tpm, tpd, max_concurrent } = typed;
        all.insert(pattern, limits(PerLimit { rpm, rpd, tpm, tpd, max_concurrent }, &path, check));
    }
    all
}

fn name(typed: Option<String>, path: &str, check: &mut Check<'_>) -> Option<String> {
    let name = check.required(typed, path, "name who or what has the key, such as ada or nightly-agent")?;
    match name_problem(&name) {
        None => Some(name),
        Some(problem) => {
            check.report.error(path, format!("{name:?} {problem}"), "such as ada, team-search or nightly_agent.2");
            None
        }
    }
}

/// What is wrong with the name of a key. It stands in log lines, labels and commands.
pub(crate) fn name_problem(name: &str) -> Option<&'static str> {
    let is_fitting = |c: char| c.is_alphanumeric() || "-_.@+".contains(c);
    if name.is_empty() || !name.chars().all(is_fitting) {
        return Some("is not made of letters, digits and - _ . @ +");
    }
    if name.starts_with('-') {
        return Some("begins with a hyphen, as a command's flag does");
    }
    (name.chars().count() > NAME_CHARS_MAX).then_some("has more than 64 characters")
}

/// What opens a key: itself, its digest, or digests with their ends.
fn hashes(
    key: Option<Secret>,
    digest: Option<String>,
    ending: Option<Vec<file::KeyHashFile>>,
    path: &str,
    (around, check): (&Around<'_>, &mut Check<'_>),
) -> Option<Vec<KeyHash>> {
    let hint = "write `key`, or `keyHash` in its place: sha256: and the 64 digits of `printf %s KEY | sha256sum`";
    match (key, digest, ending) {
        (Some(key), None, None) => {
            let key = check.key(Some(key), &join(path, "key"), hint)?;
            key_strength::warn_of_a_weak_key(Some(&key), &join(path, "key"), check);
            Some(vec![KeyHash { digest: KeyDigest::of(key.expose().as_bytes()), until: None }])
        }
        (None, Some(text), None) => {
            let digest = KeyDigest::parse(&text);
            if digest.is_none() {
                check.report.error(&join(path, "keyHash"), "is not sha256: and 64 hexadecimal digits", hint);
            }
            Some(vec![KeyHash { digest: digest?, until: None }])
        }
        (None, None, Some(ending)) => {
            let mut hashes = Vec::new();
            for (index, typed) in ending.into_iter().enumerate() {
                let path = format!("{}[{index}]", join(path, "hashes"));
                let digest = KeyDigest::parse(&typed.hash.unwrap_or_default());
                if digest.is_none() {
                    check.report.error(&join(&path, "hash"), "is not sha256: and 64 hexadecimal digits", hint);
                }
                let until = moment(typed.until.as_deref(), &join(&path, "until"), around.timezone, check);
                hashes.push(KeyHash { digest: digest?, until: until? });
            }
            Some(hashes)
        }
        (None, None, None) => {
            check.report.error(path, "has no key", hint);
            None
        }
        _ => {
            check.report.error(path, "has its key twice", hint);
            None
        }
    }
}

/// A moment: with its time and offset, or a day, to whose end it goes. The outer none is an error that was reported.
#[expect(clippy::option_option, reason = "absent, and wrong, are two things")]
pub(super) fn moment(
    typed: Option<&str>,
    path: &str,
    timezone: &TimeZone,
    check: &mut Check<'_>,
) -> Option<Option<Timestamp>> {
    let Some(text) = typed else { return Some(None) };
    let moment = parse_moment(text, timezone);
    if moment.is_none() {
        let hint = "write a day, to whose end it goes, such as 2027-03-31, or a moment such as 2027-03-31T18:00:00Z";
        check.report.error(path, format!("{text:?} is no moment"), hint);
    }
    moment.map(Some)
}

/// The moment that a text names.
pub(crate) fn parse_moment(text: &str, timezone: &TimeZone) -> Option<Timestamp> {
    let text = text.trim();
    if let Ok(moment) = text.parse::<Timestamp>() {
        return Some(moment);
    }
    // A date and a time without an offset would be taken for a date.
    let is_day = text.len() == "2027-03-31".len();
    let day: Date = text.parse().ok().filter(|_| is_day)?;
    let begins = day.tomorrow().ok()?.at(0, 0, 0, 0);
    timezone.to_ambiguous_timestamp(begins).compatible().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_read_as_it_is_written() {
        let digest = KeyDigest::of(b"abc");
        let text = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest.text(), text);
        assert_eq!(KeyDigest::parse(text), Some(digest));
        for wrong in ["", "sha256:", &text[..70], &format!("{text}0"), &text.replace("ba", "xy"), &text[7..]] {
            assert_eq!(KeyDigest::parse(wrong), None, "{wrong}");
        }
        assert_eq!(format!("{digest:?}"), "KeyDigest");
    }

    #[test]
    fn names_of_keys() {
        for fits in ["ada", "Team-Search_2", "a.b@c.example", "名字"] {
            assert_eq!(name_problem(fits), None, "{fits}");
        }
        for wrong in ["", "a b", "-x", "a\n", "\"", &"x".repeat(65)] {
            assert!(name_problem(wrong).is_some(), "{wrong:?}");
        }
    }

    #[test]
    fn moments() {
        let berlin = TimeZone::get("Europe/Berlin").unwrap();
        let of = |text: &str| parse_moment(text, &berlin).map(|moment| moment.to_string());
        assert_eq!(of("2027-03-31").as_deref(), Some("2027-03-31T22:00:00Z"), "to the end of the day, in summer time");
        assert_eq!(of("2027-03-31T18:00:00+02:00").as_deref(), Some("2027-03-31T16:00:00Z"));
        for wrong in ["", "soon", "2027-02-30", "2027-03-31T18:00:00", "1"] {
            assert_eq!(of(wrong), None, "{wrong}");
        }
    }
}
