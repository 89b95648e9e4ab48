//! The sliding minute, counted in slots of a quarter of a second.

use std::collections::VecDeque;
use std::time::Duration;

use super::Stamp;

/// Width of a slot in milliseconds.
const SLOT_MS: u64 = 250;
/// The same.
pub const SLOT: Duration = Duration::from_millis(SLOT_MS);
/// Slots for which a count lasts: 60 seconds, one slot more because the attempt may have come at the end of its own
/// slot, and another one for the time between counting and sending and for jitter on the way to the endpoint. A permit
/// therefore becomes free up to half a second late, never early.
const SLOTS: u64 = 60 * 1000 / SLOT_MS + 2;

/// Age at which an unsent permit is swapped for a fresh one. It uses half of the second spare slot; the other half
/// covers the time from the check of the age until the endpoint counts the request.
pub const PERMIT_AGE_MAX: Duration = Duration::from_millis(SLOT_MS / 2);

/// Time for which a count lasts.
pub const SPAN: Duration = Duration::from_millis(SLOTS * SLOT_MS);

/// A quarter of a second, numbered from the machine's boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u64);

impl Slot {
    /// Returns the slot of a moment.
    pub fn new(stamp: Stamp) -> Self {
        Self(stamp.0 / SLOT_MS)
    }

    /// Returns the oldest slot that still counts at this moment.
    pub fn oldest_that_counts(now: Stamp) -> Self {
        Self((Self::new(now).0 + 1).saturating_sub(SLOTS))
    }

    /// Returns the moment at which counts of this slot expire.
    pub fn frees(self) -> Stamp {
        Stamp(self.0.saturating_add(SLOTS).saturating_mul(SLOT_MS))
    }
}

/// Counts of the last 60 seconds by slot. A minute has a fixed number of slots, which bounds its size.
#[derive(Clone, Debug, Default)]
pub struct Minute {
    slots: VecDeque<(Slot, u64)>,
    total: u64,
}

impl Minute {
    /// Adds to the count of a slot.
    pub fn add(&mut self, slot: Slot, count: u64) {
        if count == 0 {
            return;
        }
        self.total = self.total.saturating_add(count);
        // Nearly always the newest slot.
        let at = self.slots.partition_point(|(other, _)| *other < slot);
        match self.slots.get_mut(at) {
            Some((same, counted)) if *same == slot => *counted = counted.saturating_add(count),
            _ => self.slots.insert(at, (slot, count)),
        }
    }

    /// Takes back a count of a slot, as far as the slot still holds it.
    pub fn remove(&mut self, slot: Slot, count: u64) {
        let at = self.slots.partition_point(|(other, _)| *other < slot);
        if let Some((same, counted)) = self.slots.get_mut(at)
            && *same == slot
        {
            let count = count.min(*counted);
            *counted -= count;
            self.total = self.total.saturating_sub(count);
        }
    }

    /// Drops the slots that have expired.
    pub fn forget(&mut self, now: Stamp) {
        let oldest = Slot::oldest_that_counts(now);
        while let Some((slot, count)) = self.slots.front().copied()
            && slot < oldest
        {
            self.total = self.total.saturating_sub(count);
            self.slots.pop_front();
        }
    }

    /// Returns the total as of the last [`Minute::forget`].
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Returns the moment at which everything that counts now has expired; `None` if nothing counts.
    pub fn empties(&self) -> Option<Stamp> {
        self.slots.iter().rev().find(|(_, count)| *count > 0).map(|(slot, _)| slot.frees())
    }

    /// Returns the moment, not before `now`, at which less than `limit` counts if nothing is added.
    pub fn below(&self, limit: u64, now: Stamp) -> Stamp {
        let mut left = self.total;
        let mut frees = now;
        for (slot, count) in &self.slots {
            if left < limit {
                break;
            }
            left = left.saturating_sub(*count);
            frees = slot.frees();
        }
        frees.max(now)
    }

    /// Returns slots and their counts, newest first.
    pub fn newest_first(&self) -> impl Iterator<Item = (Slot, u64)> {
        self.slots.iter().rev().copied()
    }

    /// Returns the number of slots held.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// True if no slot is held.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn minute(stamps: &[u64]) -> Minute {
        let mut minute = Minute::default();
        for stamp in stamps {
            minute.add(Slot::new(Stamp(*stamp)), 1);
        }
        minute
    }

    #[test]
    fn a_permit_frees_after_sixty_seconds_and_not_much_later() {
        let mut minute = minute(&[249]);
        assert_eq!(minute.below(1, Stamp(300)), Stamp(60_500));
        minute.forget(Stamp(60_499));
        assert_eq!(minute.total(), 1);
        minute.forget(Stamp(60_500));
        assert_eq!((minute.total(), minute.len()), (0, 0));
    }

    #[test]
    fn the_wait_is_that_of_the_first_permit_to_free() {
        let minute = minute(&[0, 1000, 2000]);
        let now = Stamp(10_000);
        assert_eq!(minute.below(4, now), now);
        assert_eq!(minute.below(3, now), Stamp(60_500));
        assert_eq!(minute.below(1, now), Stamp(62_500));
        assert_eq!(minute.empties(), Some(Stamp(62_500)));
    }

    #[test]
    fn what_comes_out_of_order_is_counted_in_its_place() {
        let mut minute = minute(&[5000, 0, 2500, 5000]);
        assert_eq!(minute.newest_first().map(|(slot, n)| (slot.0, n)).collect::<Vec<_>>(), [(20, 2), (10, 1), (0, 1)]);
        minute.remove(Slot(10), 5);
        assert_eq!(minute.total(), 3, "no more than was there");
        minute.remove(Slot(11), 1);
        assert_eq!(minute.total(), 3);
    }

    proptest! {
        /// Compares with a plain model that keeps every moment. Counted attempts are sent up to a slot later; the
        /// attempts sent in any 60 seconds never exceed the limit.
        #[test]
        fn no_sixty_seconds_hold_more_than_the_limit(
            limit in 1u64..6,
            steps in prop::collection::vec((0u64..9_000, 0u64..=250, any::<bool>()), 1..200),
        ) {
            let mut minute = Minute::default();
            let mut counted: Vec<u64> = Vec::new();
            let mut sent: Vec<u64> = Vec::new();
            let mut now = 0;
            for (step, late, give_back) in steps {
                now += step;
                minute.forget(Stamp(now));
                if minute.total() < limit {
                    let slot = Slot::new(Stamp(now));
                    minute.add(slot, 1);
                    if give_back {
                        minute.remove(slot, 1);
                    } else {
                        counted.push(now);
                        sent.push(now + late);
                    }
                    let in_a_minute = |at: &u64| sent.iter().filter(|other| (*at..at + 60_000).contains(other)).count();
                    prop_assert!(sent.iter().all(|at| in_a_minute(at) as u64 <= limit));
                } else {
                    let model = counted.iter().filter(|at| now - **at < 60_500).count() as u64;
                    prop_assert!(model >= limit, "refused while a permit was free");
                    let below = minute.below(limit, Stamp(now));
                    prop_assert!(below > Stamp(now), "full until now");
                    let mut then = minute.clone();
                    then.forget(below);
                    prop_assert!(then.total() < limit, "still full when it was to be free");
                }
                prop_assert!(minute.len() as u64 <= SLOTS + 1);
            }
        }
    }
}
