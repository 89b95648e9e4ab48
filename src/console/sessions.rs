//! Sessions of the page: a browser that has signed in with the admin key has a cookie in its place.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom as _, SystemRandom};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq as _;

use crate::config::Secret;

/// Sessions that are kept; of more the one that was used longest ago ends.
const SESSIONS_MAX: usize = 64;
/// Time after its last use for which a session lasts.
pub(super) const IDLE_MAX: Duration = Duration::from_mins(30);
/// Random bytes of a session's cookie: 256 bits.
const TOKEN_BYTES: usize = 32;

type Digest = [u8; 32];

/// A session. What its cookie holds is known to the browser alone.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Session {
    /// Digest of the cookie's value.
    token: Digest,
    /// Digest of the admin key that it was opened with: another one ends it.
    key: Digest,
    /// Host under which it was opened.
    host: String,
    /// Last use, in seconds of Unix time.
    used: u64,
}

/// Sessions that are open.
#[derive(Debug, Default)]
pub(crate) struct Sessions(Mutex<Vec<Session>>);

/// What outlives the process: the sessions, as digests.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct KeptSessions(Vec<Session>);

impl Sessions {
    /// Opens one. Returns the value of its cookie; none if the system gives no random bytes.
    pub(super) fn open(&self, key: &Secret, host: &str) -> Option<String> {
        let mut bytes = [0; TOKEN_BYTES];
        SystemRandom::new().fill(&mut bytes).ok()?;
        let token = BASE64_URL_SAFE_NO_PAD.encode(bytes);
        let session = Session { token: hash(&token), key: hash(key.expose()), host: host.to_owned(), used: seconds() };
        let mut all = self.lock();
        if all.len() >= SESSIONS_MAX
            && let Some(oldest) = (0..all.len()).min_by_key(|place| all.get(*place).map(|session| session.used))
        {
            all.swap_remove(oldest);
        }
        all.push(session);
        Some(token)
    }

    /// True if a cookie's value is that of a session of this admin key and host. It lasts longer by that.
    pub(super) fn uses(&self, token: &str, key: &Secret, host: &str) -> bool {
        let (token, key, now) = (hash(token), hash(key.expose()), seconds());
        let mut all = self.lock();
        all.retain(|session| {
            now.saturating_sub(session.used) < IDLE_MAX.as_secs() && bool::from(session.key.ct_eq(&key))
        });
        let found = all.iter_mut().find(|session| session.token.ct_eq(&token).into());
        let Some(session) = found.filter(|session| session.host == host) else { return false };
        session.used = now;
        true
    }

    /// True as long as a session lasts. Nothing is used by that.
    pub(super) fn is_open(&self, token: &str, key: &Secret, host: &str) -> bool {
        let (token, key, now) = (hash(token), hash(key.expose()), seconds());
        let is_it = |session: &Session| {
            bool::from(session.token.ct_eq(&token))
                && bool::from(session.key.ct_eq(&key))
                && session.host == host
                && now.saturating_sub(session.used) < IDLE_MAX.as_secs()
        };
        self.lock().iter().any(is_it)
    }

    /// Ends the session of a cookie's value.
    pub(super) fn close(&self, token: &str) {
        let token = hash(token);
        self.lock().retain(|session| !bool::from(session.token.ct_eq(&token)));
    }

    /// What a successor takes over.
    pub(crate) fn kept(&self) -> KeptSessions {
        KeptSessions(self.lock().clone())
    }

    /// Takes over what a process before this one had.
    pub(crate) fn take_over(&self, kept: KeptSessions) {
        let mut all = self.lock();
        all.extend(kept.0);
        all.truncate(SESSIONS_MAX);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Session>> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The token that a page sends with each change. Others cannot read the page, and so do not know it.
pub(super) fn csrf_token(token: &str) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(hash(&format!("api-together csrf {token}")))
}

fn hash(text: &str) -> Digest {
    let mut found = Digest::default();
    found.copy_from_slice(digest(&SHA256, text.as_bytes()).as_ref());
    found
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_of_its_key_and_host() {
        let sessions = Sessions::default();
        let (key, other) = (Secret::new("sk-admin-1"), Secret::new("sk-admin-2"));
        let token = sessions.open(&key, "gateway:3001").unwrap();
        assert!(sessions.uses(&token, &key, "gateway:3001"));
        assert!(sessions.is_open(&token, &key, "gateway:3001") && !sessions.is_open(&token, &key, "evil.example"));
        assert!(!sessions.is_open(&token, &other, "gateway:3001") && !sessions.is_open("", &key, "gateway:3001"));
        assert!(!sessions.uses(&token, &key, "evil.example"));
        assert!(!sessions.uses("", &key, "gateway:3001") && !sessions.uses("x", &key, "gateway:3001"));
        let successor = Sessions::default();
        successor.take_over(serde_json::from_value(serde_json::to_value(sessions.kept()).unwrap()).unwrap());
        assert!(!serde_json::to_string(&sessions.kept()).unwrap().contains(&token));
        assert!(successor.uses(&token, &key, "gateway:3001"));
        assert!(!successor.uses(&token, &other, "gateway:3001"));
        assert!(!successor.uses(&token, &key, "gateway:3001"), "another admin key has ended it");
        sessions.close(&token);
        assert!(!sessions.uses(&token, &key, "gateway:3001"));
    }

    #[test]
    fn sessions_are_bounded_and_end_by_themselves() {
        let sessions = Sessions::default();
        let key = Secret::new("sk-admin-1");
        let first = sessions.open(&key, "h").unwrap();
        sessions.lock()[0].used -= 10;
        for _ in 0..SESSIONS_MAX {
            sessions.open(&key, "h").unwrap();
        }
        assert_eq!(sessions.lock().len(), SESSIONS_MAX);
        assert!(!sessions.uses(&first, &key, "h"), "the one that was used longest ago");
        let last = sessions.open(&key, "h").unwrap();
        sessions.lock().iter_mut().for_each(|session| session.used -= IDLE_MAX.as_secs());
        assert!(!sessions.is_open(&last, &key, "h"));
        assert!(!sessions.uses(&last, &key, "h"));
        assert!(sessions.lock().is_empty());
        assert_ne!(csrf_token(&first), csrf_token(&last));
    }
}
