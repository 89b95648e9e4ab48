//! Keys of clients that the gateway makes.

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jiff::Timestamp;
use ring::rand::{SecureRandom as _, SystemRandom};
use serde_json::{Map, Value};

use crate::config::{KeyDigest, KeysChange, Secret};

/// How they begin. They are 256 random bits, so nobody guesses one.
pub const GENERATED_PREFIX: &str = "sk-at-";
/// Random bytes of a key: 256 bits.
const KEY_BYTES: usize = 32;
/// Characters of a key that lists show.
const SHOWN_CHARS: usize = 4;

/// A new key. It is shown once, and then only its digest is kept.
#[derive(Debug)]
pub struct GeneratedKey(Secret);

impl GeneratedKey {
    /// Makes one.
    pub fn new() -> Result<Self, String> {
        let mut bytes = [0; KEY_BYTES];
        SystemRandom::new().fill(&mut bytes).map_err(|_| "the system gives no random bytes".to_owned())?;
        Ok(Self(Secret::new(format!("{GENERATED_PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(bytes)))))
    }

    /// The key itself, for the one to whom it is given.
    pub fn expose(&self) -> &str {
        self.0.expose()
    }

    /// The change that adds it, with what it opens as the file of keys has it.
    pub fn add(&self, mut entry: Map<String, Value>) -> KeysChange {
        entry.insert("keyHash".into(), self.digest().into());
        entry.insert("lastFour".into(), self.last_four().into());
        entry.insert("created".into(), seconds_of(Timestamp::now()).into());
        KeysChange::Add { entry }
    }

    /// The change that puts it in place of another key, which stops opening at this moment.
    pub fn rotate(&self, name: String, until: Timestamp) -> KeysChange {
        let until = seconds_of(until);
        KeysChange::Rotate { name, hash: self.digest(), last_four: self.last_four(), until }
    }

    fn digest(&self) -> String {
        KeyDigest::of(self.expose().as_bytes()).text()
    }

    fn last_four(&self) -> String {
        let key = self.expose();
        key.chars().skip(key.chars().count().saturating_sub(SHOWN_CHARS)).collect()
    }
}

/// A moment in whole seconds, not later.
fn seconds_of(moment: Timestamp) -> String {
    Timestamp::from_second(moment.as_second()).unwrap_or(moment).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_random_and_kept_as_its_digest() {
        let (one, other) = (GeneratedKey::new().unwrap(), GeneratedKey::new().unwrap());
        assert_ne!(one.expose(), other.expose());
        assert!(one.expose().starts_with(GENERATED_PREFIX) && one.expose().len() == GENERATED_PREFIX.len() + 43);
        let KeysChange::Add { entry } = one.add(Map::new()) else { panic!("another change") };
        assert_eq!(entry["keyHash"], KeyDigest::of(one.expose().as_bytes()).text());
        assert!(one.expose().ends_with(entry["lastFour"].as_str().unwrap()));
        assert!(!format!("{entry:?}{one:?}").contains(one.expose()));
    }
}
