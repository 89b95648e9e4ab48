//! Callers: who has which key, and what it opens. The one key of the server, `server.apiKey`, is not among them.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use tokio::sync::watch;

use crate::config::{CallKind, CallSet, ClientKey, KeyDigest, Secret, Server};
use crate::fault::{Fault, excerpt};
use crate::ledger::Client;
use crate::ledger::budgets::BudgetSet;
use crate::request::auth::Known;
use crate::routing::caller_accounts::CallerAccounts;
use crate::routing::generated_key::GENERATED_PREFIX;
use crate::telemetry::key_metrics::KeyCounters;

/// All callers of one moment. Immutable, and swapped as a whole.
#[derive(Debug, Default)]
pub struct Callers {
    by_digest: HashMap<KeyDigest, Arc<Caller>, BuildHasherDefault<AsItIs>>,
    by_name: BTreeMap<Arc<str>, Arc<Caller>>,
    /// Number of those whose keys open something, whatever the time.
    opening: usize,
    zone: Option<TimeZone>,
}

/// Takes a number for its hash: a digest's part is as random as can be.
#[derive(Debug, Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, byte| hash.rotate_left(8) ^ u64::from(*byte));
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }
}

/// The callers of the process, whichever are current: those of the config and those of the file of keys. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Keyring {
    current: Arc<ArcSwap<Callers>>,
    parts: Arc<Mutex<Parts>>,
    ledger: Client,
}

/// Keys by where they stand.
#[derive(Debug)]
struct Parts {
    config: Vec<ClientKey>,
    file: Vec<ClientKey>,
    /// Time zone whose midnight ends a day.
    zone: TimeZone,
}

impl Keyring {
    /// One without keys, whose callers count in this ledger.
    pub fn new(ledger: Client) -> Self {
        let parts = Parts { config: Vec::new(), file: Vec::new(), zone: TimeZone::UTC };
        Self { current: Arc::default(), parts: Arc::new(Mutex::new(parts)), ledger }
    }

    /// The callers as they are now.
    pub fn load(&self) -> arc_swap::Guard<Arc<Callers>> {
        self.current.load()
    }

    /// Puts the keys of this config in the place of those before. Returns the names of those of the file that it has as well.
    pub fn set_config(&self, server: &Server) -> Vec<Arc<str>> {
        let mut parts = self.lock();
        (parts.config, parts.zone) = (server.keys.clone(), server.timezone.clone());
        self.renew(&parts)
    }

    /// Puts these keys in the place of the file's. Returns the names of those that the config has as well, and that are overlooked.
    pub fn set_file(&self, keys: Vec<ClientKey>) -> Vec<Arc<str>> {
        let mut parts = self.lock();
        parts.file = keys;
        self.renew(&parts)
    }

    /// True if any of them stands in the file.
    pub fn has_file_keys(&self) -> bool {
        !self.lock().file.is_empty()
    }

    fn renew(&self, parts: &Parts) -> Vec<Arc<str>> {
        let before = self.current.load_full();
        let (callers, overlooked) = Callers::new(parts, &before, &self.ledger);
        callers.end_others(&before);
        self.current.store(Arc::new(callers));
        overlooked
    }

    fn lock(&self) -> MutexGuard<'_, Parts> {
        // Nothing panics while it is held.
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A caller that has a key of its own.
#[derive(Debug)]
pub struct Caller {
    /// Its key, and what that opens.
    pub key: ClientKey,
    /// Distinguishes it from every other one of this process, earlier ones of its name included.
    pub number: u64,
    /// What it is in the queue, where it stays the same if its key changes.
    pub queue_number: u64,
    /// True if its key stands in the config, false if it stands in the file of keys.
    pub is_of_config: bool,
    /// Accounts of its requests, with the limits of its key.
    pub accounts: CallerAccounts,
    /// Its budgets, if it has any.
    pub budgets: Option<Arc<BudgetSet>>,
    /// Metrics of its key, whatever that opens.
    pub counters: Arc<KeyCounters>,
    /// Says that its key opens nothing any more, to its requests that are still here.
    pub ending: Arc<Ending>,
}

/// The end of a key, for requests that came before.
#[derive(Debug)]
pub struct Ending(watch::Sender<EndStage>);

/// How far a key is at its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum EndStage {
    #[default]
    Opens,
    /// It opens nothing any more: who waits for a permit does in vain.
    Ended,
    /// What runs is cut off.
    Cut,
}

impl Default for Ending {
    fn default() -> Self {
        Self(watch::Sender::new(EndStage::Opens))
    }
}

impl Ending {
    fn come(&self, stage: EndStage) {
        self.0.send_if_modified(|now| {
            let is_later = stage > *now;
            *now = stage.max(*now);
            is_later
        });
    }

    /// True if the key opens nothing any more.
    pub fn has_come(&self) -> bool {
        *self.0.borrow() >= EndStage::Ended
    }

    /// Waits until the key opens nothing any more.
    pub async fn ended(&self) {
        self.reached(EndStage::Ended).await;
    }

    /// Waits until what runs with the key is cut off.
    pub async fn cut(&self) {
        self.reached(EndStage::Cut).await;
    }

    async fn reached(&self, stage: EndStage) {
        // The sender lives as long as this does.
        self.0.subscribe().wait_for(|now| *now >= stage).await.map(drop).unwrap_or_default();
    }
}

/// Whose request it is, where it has a caller's own key.
#[derive(Debug)]
pub struct Named {
    /// The caller.
    pub caller: Arc<Caller>,
    /// The key, which goes no further.
    pub key: Secret,
}

impl Callers {
    /// The callers of these keys, and the names of those of the file that the config has as well, by their name or by their key. `before`: those
    /// of the moment before, whose requests are still here.
    fn new(parts: &Parts, before: &Self, ledger: &Client) -> (Self, Vec<Arc<str>>) {
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        let (mut callers, mut overlooked) = (Self { zone: Some(parts.zone.clone()), ..Self::default() }, Vec::new());
        let same_days = before.zone.as_ref() == Some(&parts.zone);
        let config = ledger.next_config();
        let of_config = parts.config.iter().map(|key| (key, true));
        for (key, is_of_config) in of_config.chain(parts.file.iter().map(|key| (key, false))) {
            let is_known = callers.by_name.contains_key(&key.name)
                || key.hashes.iter().any(|hash| callers.by_digest.contains_key(&hash.digest));
            if is_known {
                overlooked.push(Arc::clone(&key.name));
                continue;
            }
            let caller = match before.by_name.get(&key.name) {
                Some(known) if known.key == *key && known.is_of_config == is_of_config && same_days => {
                    Arc::clone(known)
                }
                known => {
                    let counters = known
                        .map_or_else(|| Arc::new(KeyCounters::new(&key.name)), |known| Arc::clone(&known.counters));
                    let still_opens = known.filter(|known| known.key.opens());
                    let ending = still_opens.map_or_else(Arc::default, |known| Arc::clone(&known.ending));
                    let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
                    let queue_number = known.map_or(number, |known| known.queue_number);
                    let accounts = CallerAccounts::new(key, &parts.zone, (config, ledger));
                    let budgets = (!key.budgets.is_empty())
                        .then(|| Arc::new(BudgetSet { key: Arc::clone(&key.name), budgets: key.budgets.clone() }));
                    Arc::new(Caller {
                        budgets,
                        key: key.clone(),
                        number,
                        queue_number,
                        is_of_config,
                        accounts,
                        counters,
                        ending,
                    })
                }
            };
            callers.by_digest.extend(key.hashes.iter().map(|hash| (hash.digest, Arc::clone(&caller))));
            callers.by_name.insert(Arc::clone(&key.name), caller);
        }
        callers.opening = callers.by_name.values().filter(|caller| caller.key.opens()).count();
        (callers, overlooked)
    }

    /// Ends the requests of those of the moment before whose keys open nothing any more.
    fn end_others(&self, before: &Self) {
        for (name, caller) in &before.by_name {
            match self.by_name.get(name) {
                Some(now) if now.key.opens() => {}
                Some(now) if now.key.cut => caller.ending.come(EndStage::Cut),
                _ => caller.ending.come(EndStage::Ended),
            }
        }
    }

    /// All of them, by name.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Caller>> {
        self.by_name.values()
    }

    /// True if there is somebody beside a caller, which is one of them or has the one key of the server, if there is that.
    pub fn are_several(&self, has_shared: bool) -> bool {
        self.opening + usize::from(has_shared) > 1
    }

    /// True if nobody has a key of its own.
    pub fn is_empty(&self) -> bool {
        self.by_digest.is_empty()
    }

    /// The caller that has this key, at this moment. A fault if the key opens nothing any more, or not from this address.
    ///
    /// What is looked up is the key's digest: how long that takes says nothing of the keys.
    pub fn find(
        &self,
        given: &[u8],
        address: Option<IpAddr>,
        now: Timestamp,
    ) -> Option<Result<Known<Arc<Caller>>, Fault>> {
        let digest = KeyDigest::of(given);
        let (known, caller) = self.by_digest.get_key_value(&digest)?;
        if !known.matches(&digest) {
            return None;
        }
        let is_generated = given.starts_with(GENERATED_PREFIX.as_bytes());
        let found = caller.opens(&digest, address, now);
        Some(found.map(|()| Known { caller: Arc::clone(caller), is_generated }))
    }
}

impl Caller {
    /// Name.
    pub fn name(&self) -> &Arc<str> {
        &self.key.name
    }

    fn opens(&self, digest: &KeyDigest, address: Option<IpAddr>, now: Timestamp) -> Result<(), Fault> {
        let key = &self.key;
        let until = key.hashes.iter().find(|hash| hash.digest == *digest).and_then(|hash| hash.until);
        let ended = |moment: Option<Timestamp>| moment.is_some_and(|moment| moment <= now);
        let why = match () {
            () if key.revoked => "was revoked",
            () if !key.enabled => "is switched off",
            () if ended(key.expires) => "has expired",
            () if ended(until) => "has been replaced by another one",
            () => "",
        };
        if !why.is_empty() {
            return Err(Fault::KeyEnded { name: key.name.to_string(), why });
        }
        let is_allowed = |address: IpAddr| key.allow_from.iter().any(|range| range.contains(address));
        if key.allow_from.is_empty() || address.is_some_and(is_allowed) {
            return Ok(());
        }
        Err(Fault::AddressNotAllowed { name: key.name.to_string() })
    }

    /// Checks that its key opens at this moment what it opened earlier.
    pub fn check_still_open(&self, now: Timestamp) -> Result<(), Fault> {
        let why = match () {
            () if self.ending.has_come() => "was revoked",
            () if self.key.expires.is_some_and(|expires| expires <= now) => "has expired",
            () => return Ok(()),
        };
        Err(Fault::KeyEnded { name: self.key.name.to_string(), why })
    }

    /// Checks that it may make a call of this kind.
    pub fn check_call(&self, kind: CallKind, path: &str) -> Result<(), Fault> {
        // Their models stand in a file, or deep within, and are not read here.
        let hides_models = matches!(kind, CallKind::Batches | CallKind::Evals)
            || path.starts_with("/v1/messages/batches")
            || path.starts_with("/v1/fine_tuning/alpha/graders");
        let hides_models = hides_models && self.key.models.is_some() && self.key.calls == CallSet::ALL;
        if self.key.calls.contains(kind) && !hides_models {
            return Ok(());
        }
        Err(Fault::CallNotAllowed { name: self.key.name.to_string(), call: kind.name() })
    }

    /// Checks that it may ask for a model.
    pub fn check_model(&self, model: &str) -> Result<(), Fault> {
        if self.key.allows_model(model) {
            return Ok(());
        }
        Err(self.no_model(model))
    }

    /// Checks a request that names no model, though it asks one for something: which one may stand in what was stored at the endpoint.
    pub fn check_without_model(&self) -> Result<(), Fault> {
        if self.key.models.is_none() {
            return Ok(());
        }
        let problem =
            format!("This API key ({}) may ask for some models only, so the request has to name one.", self.key.name);
        Err(Fault::RequestInvalid { problem })
    }

    /// The fault of a request for a model that it may not ask for.
    pub fn no_model(&self, model: &str) -> Fault {
        Fault::ModelNotAllowed { name: self.key.name.to_string(), model: excerpt(model) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::config_of;
    use serde_json::json;

    fn callers(keys: &serde_json::Value) -> Callers {
        let config = config_of(&json!({ "keys": keys }), "[]").server.keys;
        let parts = Parts { config, file: Vec::new(), zone: TimeZone::UTC };
        Callers::new(&parts, &Callers::default(), &Client::new(crate::limit::Clock::read)).0
    }

    fn verdict(callers: &Callers, key: &str, address: &str, now: &str) -> String {
        match callers.find(key.as_bytes(), Some(address.parse().unwrap()), now.parse().unwrap()) {
            None => "unknown".into(),
            Some(Ok(found)) => format!("{} {}", found.caller.name(), found.is_generated),
            Some(Err(fault)) => fault.label().into(),
        }
    }

    #[test]
    fn a_key_opens_until_its_end_and_from_its_addresses() {
        let hash = KeyDigest::of(b"sk-at-generated").text();
        let (old, new) = (KeyDigest::of(b"old").text(), KeyDigest::of(b"new").text());
        let callers = callers(&json!([
            { "name": "ada", "key": "sk-ada-5f1c9e", "expires": "2027-01-01T00:00:00Z" },
            { "name": "agent", "keyHash": hash, "allowFrom": ["10.0.0.0/8", "::1"] },
            { "name": "off", "key": "sk-off-7d21aa", "enabled": false },
            { "name": "gone", "key": "sk-gone-7d21aa", "revoked": true },
            { "name": "turned", "hashes": [{ "hash": old, "until": "2026-12-01T00:00:00Z" }, { "hash": new }] },
        ]));
        let of = |key: &str, address: &str, now: &str| verdict(&callers, key, address, now);
        assert_eq!(of("sk-ada-5f1c9e", "1.2.3.4", "2026-12-31T23:59:59Z"), "ada false");
        assert_eq!(of("sk-ada-5f1c9e", "1.2.3.4", "2027-01-01T00:00:00Z"), "key_ended");
        assert_eq!(of("sk-at-generated", "10.9.8.7", "2026-12-31T00:00:00Z"), "agent true");
        assert_eq!(of("sk-at-generated", "11.9.8.7", "2026-12-31T00:00:00Z"), "address_not_allowed");
        assert_eq!(of("sk-off-7d21aa", "::1", "2026-12-31T00:00:00Z"), "key_ended");
        assert_eq!(of("sk-gone-7d21aa", "::1", "2026-12-31T00:00:00Z"), "key_ended");
        assert_eq!(of("old", "::1", "2026-11-30T23:59:59Z"), "turned false");
        assert_eq!(of("old", "::1", "2026-12-01T00:00:00Z"), "key_ended");
        assert_eq!(of("new", "::1", "2026-12-01T00:00:00Z"), "turned false");
        for unknown in ["", "sk-ada-5f1c9", "sk-ada-5f1c9e ", &hash] {
            assert_eq!(of(unknown, "::1", "2026-12-01T00:00:00Z"), "unknown", "{unknown}");
        }
    }
}
