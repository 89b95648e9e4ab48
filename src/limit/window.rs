//! The two windows.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use jiff::civil::Date;

/// The width of a slot of the minute.
const SLOT: Duration = Duration::from_millis(250);
/// An attempt counts from its slot until this many slots later: 60 seconds, one slot because it may have come at the end of
/// its own, and one more against jitter on the way to the endpoint. So a permit frees up to half a second late, never early.
const SLOTS: u64 = 60 * 4 + 2;

/// Attempts in any 60 seconds, in slots of a quarter of a second; at most [`SLOTS`] of them.
#[derive(Debug)]
pub(super) struct Minute {
    epoch: Instant,
    slots: VecDeque<(u64, u64)>,
    total: u64,
}

impl Minute {
    pub(super) fn new(epoch: Instant) -> Self {
        Self { epoch, slots: VecDeque::new(), total: 0 }
    }

    /// Counts an attempt; returns its slot.
    pub(super) fn add(&mut self, now: Instant) -> u64 {
        self.forget(now);
        // Two threads may come with their readings of the clock in the other order.
        let slot = self.slots.back().map_or(0, |(last, _)| *last).max(self.slot(now));
        match self.slots.back_mut() {
            Some((last, count)) if *last == slot => *count += 1,
            _ => self.slots.push_back((slot, 1)),
        }
        self.total += 1;
        slot
    }

    /// Takes an attempt back that was counted in this slot, if it still counts.
    pub(super) fn remove(&mut self, slot: u64) {
        if let Ok(at) = self.slots.binary_search_by_key(&slot, |(slot, _)| *slot)
            && let Some((_, count)) = self.slots.get_mut(at)
            && *count > 0
        {
            *count -= 1;
            self.total -= 1;
        }
    }

    pub(super) fn count(&mut self, now: Instant) -> u64 {
        self.forget(now);
        self.total
    }

    /// How long until fewer than `limit` attempts count; none if it is so now.
    pub(super) fn full_for(&mut self, limit: u64, now: Instant) -> Option<Duration> {
        let mut count = self.count(now);
        for (slot, in_slot) in &self.slots {
            if count < limit {
                return None;
            }
            count -= in_slot;
            if count < limit {
                return Some(self.start_of(slot + SLOTS).saturating_duration_since(now));
            }
        }
        None
    }

    fn forget(&mut self, now: Instant) {
        let now = self.slot(now);
        while let Some((slot, count)) = self.slots.front().copied()
            && slot + SLOTS <= now
        {
            self.total -= count;
            self.slots.pop_front();
        }
    }

    fn slot(&self, now: Instant) -> u64 {
        let slots = now.saturating_duration_since(self.epoch).as_millis() / SLOT.as_millis();
        u64::try_from(slots).unwrap_or(u64::MAX)
    }

    fn start_of(&self, slot: u64) -> Instant {
        let slots = u32::try_from(slot).unwrap_or(u32::MAX);
        self.epoch.checked_add(SLOT.saturating_mul(slots)).unwrap_or(self.epoch)
    }
}

/// Attempts of one calendar day.
#[derive(Debug, Default)]
pub(super) struct Day {
    date: Date,
    total: u64,
}

impl Day {
    pub(super) fn add(&mut self, today: Date) {
        self.total = self.count(today) + 1;
        self.date = today;
    }

    pub(super) fn remove(&mut self, day: Date) {
        if self.date == day {
            self.total = self.total.saturating_sub(1);
        }
    }

    pub(super) fn count(&self, today: Date) -> u64 {
        if self.date == today { self.total } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_permit_frees_after_sixty_seconds_and_not_much_later() {
        let start = Instant::now();
        let mut minute = Minute::new(start);
        minute.add(start + Duration::from_millis(249));
        let wait = minute.full_for(1, start + Duration::from_millis(300)).unwrap();
        assert_eq!(wait, Duration::from_millis(60_500 - 300));
        assert_eq!(minute.count(start + Duration::from_millis(60_499)), 1);
        assert_eq!(minute.count(start + Duration::from_millis(60_500)), 0);
    }

    #[test]
    fn the_wait_is_that_of_the_first_permit_to_free() {
        let start = Instant::now();
        let mut minute = Minute::new(start);
        for second in 0..3 {
            minute.add(start + Duration::from_secs(second));
        }
        let now = start + Duration::from_secs(10);
        assert_eq!(minute.full_for(4, now), None);
        assert_eq!(minute.full_for(3, now), Some(Duration::from_millis(50_500)));
        assert_eq!(minute.full_for(1, now), Some(Duration::from_millis(52_500)));
    }

    proptest! {
        /// Against a plain model that keeps every moment.
        #[test]
        fn no_sixty_seconds_hold_more_than_the_limit(
            limit in 1u64..6,
            steps in prop::collection::vec((0u64..9_000, any::<bool>()), 1..200),
        ) {
            let start = Instant::now();
            let mut minute = Minute::new(start);
            let mut taken: Vec<u64> = Vec::new();
            let mut now_ms = 0;
            for (step, give_back) in steps {
                now_ms += step;
                let now = start + Duration::from_millis(now_ms);
                let model = taken.iter().filter(|at| now_ms - **at < 60_500).count() as u64;
                match minute.full_for(limit, now) {
                    None => {
                        let slot = minute.add(now);
                        taken.push(now_ms);
                        let in_a_minute = taken.iter().filter(|at| now_ms - **at <= 60_000).count() as u64;
                        prop_assert!(in_a_minute <= limit);
                        if give_back {
                            minute.remove(slot);
                            taken.pop();
                        }
                    }
                    Some(_) => prop_assert!(model >= limit, "refused while a permit was free"),
                }
                prop_assert!(minute.slots.len() as u64 <= SLOTS + 1);
            }
        }
    }
}
