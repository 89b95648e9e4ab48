//! Guesses of the key: how many wrong ones an address has tried, and which addresses have lately sent a right one.
//!
//! Behind the limit a right key and a wrong one are answered alike, so that guessing on tells nothing. An address that has been right
//! within the hour is not touched by it: somebody who guesses from the same office must not lock its callers out.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pingora_limits::rate::Rate;
use serde::{Deserialize, Serialize};

use super::connections::network;

/// Time in which wrong keys are counted.
const INTERVAL: Duration = Duration::from_mins(1);
/// Size of the sketch: 8,192 counters for each of 3 hashes, twice. It errs upwards, by one wrong key for every 3,000 that all addresses
/// send in a minute, and its memory does not grow with the number of addresses.
const HASHES: usize = 3;
const SLOTS: usize = 8192;
/// Wrong keys that are known to have been counted: of two with the same place, the later one is kept, and the other counts again.
const SEEN_MAX: usize = 16_384;
/// Addresses that have been right: of two with the same place, the later one is kept.
const RIGHT_MAX: usize = 4096;
/// For so many minutes an address is known as one that has been right.
const RIGHT_MINUTES: u64 = 60;
/// Requests that are kept waiting at once; more are answered without a wait.
const LATE_MAX: usize = 4096;
/// Wait of an answer behind the limit.
const LATE: Duration = Duration::from_secs(1);

/// Wrong keys and right ones, by address.
pub(crate) struct Guesses {
    /// Different wrong keys of an address.
    wrong: Rate,
    /// Keys that were counted already: a program with an old key repeats it, and guesses nothing.
    seen: Box<[AtomicU64]>,
    seed: AtomicU64,
    /// The minute in which an address was right last, in Unix time, below the upper half of its hash.
    right: Box<[AtomicU64]>,
    late: AtomicUsize,
}

/// What outlives the process: addresses that have been right, as hashes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RightAddresses {
    seed: u64,
    slots: Vec<(usize, u64)>,
}

impl Default for Guesses {
    fn default() -> Self {
        let wrong = Rate::new_with_estimator_config(INTERVAL, HASHES, SLOTS);
        let slots = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect();
        let seed = AtomicU64::new(fastrand::u64(..));
        Self { wrong, seen: slots(SEEN_MAX), seed, right: slots(RIGHT_MAX), late: AtomicUsize::new(0) }
    }
}

impl Guesses {
    /// Takes over what a process before this one has known, before any request has come.
    pub(crate) fn take_over(&self, known: &RightAddresses) {
        self.seed.store(known.seed, Ordering::Relaxed);
        for (slot, value) in &known.slots {
            if let Some(slot) = self.right.get(*slot) {
                slot.store(*value, Ordering::Relaxed);
            }
        }
    }

    /// Notes that an address has sent a right key.
    pub(crate) fn right(&self, address: IpAddr) {
        let (slot, tag) = self.slot(address);
        let value = tag | minute();
        if let Some(slot) = slot
            && slot.load(Ordering::Relaxed) != value
        {
            slot.store(value, Ordering::Relaxed);
        }
    }

    /// True if an address has sent a right key within the hour.
    pub(crate) fn was_right(&self, address: IpAddr) -> bool {
        let (slot, tag) = self.slot(address);
        let value = slot.map_or(0, |slot| slot.load(Ordering::Relaxed));
        let minute_then = value & u64::from(u32::MAX);
        value & !u64::from(u32::MAX) == tag && minute().saturating_sub(minute_then) < RIGHT_MINUTES
    }

    /// Notes a wrong key. True if the address has sent more different ones in a minute than it may.
    pub(crate) fn wrong(&self, address: IpAddr, key: &[u8], limit: u32) -> bool {
        let origin = network(address);
        if self.is_behind(address, limit) {
            return true;
        }
        if self.is_new(self.hash((origin, key))) {
            self.wrong.observe(&origin, 1);
        }
        self.is_behind(address, limit)
    }

    /// True if this guess was not counted within the minute.
    fn is_new(&self, guess: u64) -> bool {
        const MINUTE_BITS: u64 = 0xffff;
        let value = guess & !MINUTE_BITS | minute() & MINUTE_BITS;
        let place = usize::try_from(guess % SEEN_MAX as u64).unwrap_or_default();
        self.seen.get(place).is_none_or(|slot| slot.swap(value, Ordering::Relaxed) != value)
    }

    /// True if an address has sent more wrong keys than it may.
    pub(crate) fn is_behind(&self, address: IpAddr, limit: u32) -> bool {
        limit > 0 && self.wrong.observe(&network(address), 0) > isize::try_from(limit).unwrap_or(isize::MAX)
    }

    /// Waits before the answer behind the limit.
    pub(crate) async fn keep_waiting(&self) {
        if self.late.fetch_add(1, Ordering::Relaxed) < LATE_MAX {
            tokio::time::sleep(LATE).await;
        }
        self.late.fetch_sub(1, Ordering::Relaxed);
    }

    /// Addresses that have been right, for a successor.
    pub(crate) fn right_addresses(&self) -> RightAddresses {
        let slots = self.right.iter().enumerate().map(|(place, slot)| (place, slot.load(Ordering::Relaxed)));
        RightAddresses {
            seed: self.seed.load(Ordering::Relaxed),
            slots: slots.filter(|(_, value)| *value != 0).collect(),
        }
    }

    fn hash(&self, value: impl Hash) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.seed.load(Ordering::Relaxed).hash(&mut hasher);
        value.hash(&mut hasher);
        hasher.finish()
    }

    /// The place of an address, and the upper half of its hash.
    fn slot(&self, address: IpAddr) -> (Option<&AtomicU64>, u64) {
        let hash = self.hash(network(address));
        let place = usize::try_from(hash & u64::from(u32::MAX)).unwrap_or_default() % RIGHT_MAX;
        (self.right.get(place), hash & !u64::from(u32::MAX))
    }
}

/// Minutes of Unix time.
fn minute() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / 60
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn different_wrong_keys_count_and_the_same_one_does_not() {
        let guesses = Guesses::default();
        let one = address("192.0.2.1");
        for _ in 0..100 {
            assert!(!guesses.wrong(one, b"old", 3), "one wrong key is no guessing");
        }
        for key in [b"a", b"b"] {
            assert!(!guesses.wrong(one, key, 3));
        }
        assert!(guesses.wrong(one, b"c", 3));
        assert!(guesses.is_behind(one, 3) && guesses.wrong(one, b"old", 3));
        assert!(!guesses.is_behind(address("192.0.2.2"), 3));
        assert!(!guesses.is_behind(one, 0), "0 is no limit");
    }

    #[test]
    fn many_guesses_hide_nobodys() {
        let guesses = Guesses::default();
        for number in 0..100_000_u32 {
            guesses.is_new(u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
        let one = address("192.0.2.1");
        let refused = (0..20_u8).find(|key| guesses.wrong(one, &[*key], 5));
        assert_eq!(refused, Some(5), "each of its guesses counts");
    }

    #[test]
    fn an_ipv6_network_is_one_address() {
        let guesses = Guesses::default();
        for last in 0..5_u8 {
            guesses.wrong(address(&format!("2001:db8:1:2::{last}")), &[last], 3);
        }
        assert!(guesses.is_behind(address("2001:db8:1:2:ffff::1"), 3));
        assert!(!guesses.is_behind(address("2001:db8:1:3::1"), 3));
        guesses.right(address("2001:db8:1:2::9"));
        assert!(guesses.was_right(address("2001:db8:1:2::10")));
    }

    #[test]
    fn addresses_that_were_right_are_known_to_a_successor() {
        let before = Guesses::default();
        for last in 0..200 {
            before.right(IpAddr::from([192, 0, 2, last]));
        }
        let text = serde_json::to_string(&before.right_addresses()).unwrap();
        assert!(!text.contains("192.0"), "they are hashes: {text:.100}");
        let after = Guesses::default();
        after.take_over(&serde_json::from_str(&text).unwrap());
        let known = (0..200).filter(|last| after.was_right(IpAddr::from([192, 0, 2, *last]))).count();
        assert!(known > 180, "{known}");
        assert!(!after.was_right(address("198.51.100.1")));
    }

    #[test]
    fn many_addresses_that_guess_take_nobody_else_with_them() {
        let guesses = Guesses::default();
        for number in 0..2000_u32 {
            for key in 0..8_u8 {
                guesses.wrong(IpAddr::from(number.to_be_bytes()), &[key], 30);
            }
        }
        let taken = (0..=255).filter(|last| guesses.is_behind(IpAddr::from([192, 0, 2, *last]), 30)).count();
        assert_eq!(taken, 0);
    }
}
