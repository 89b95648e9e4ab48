//! Promises: the moments at which refused clients were asked to come back.

use std::collections::VecDeque;
use std::time::Duration;

use jiff::civil::Date;

use super::{Days, Slot, Stamp};

/// Longest time between the next free permit and a promised moment. Clients that keep asking, whatever they are
/// promised, would otherwise push all promises out without end. Beyond it, promises begin again at the next free
/// permit.
pub(super) const HORIZON: Duration = Duration::from_mins(10);

/// Promised permits, each to another one of many clients, so that not all of them come back for the first permit.
/// [`HORIZON`] bounds their number, since permits become free by slots.
#[derive(Clone, Debug, Default)]
pub(super) struct Promises(VecDeque<Promise>);

#[derive(Clone, Copy, Debug)]
struct Promise {
    at: Stamp,
    days: Days,
    count: u64,
}

impl Promises {
    /// Drops promises whose moment has come.
    pub(super) fn forget(&mut self, now: Stamp) {
        while self.0.front().is_some_and(|promise| promise.at <= now) {
            self.0.pop_front();
        }
    }

    /// Promises a permit at this moment, which must not be earlier than any promised one.
    pub(super) fn add(&mut self, at: Stamp, days: Days) {
        match self.0.back_mut() {
            Some(last) if last.at == at => last.count += 1,
            _ => self.0.push_back(Promise { at, days, count: 1 }),
        }
    }

    /// Takes back one promise of this moment, if there is one.
    pub(super) fn remove(&mut self, at: Stamp) {
        let Some(place) = self.0.iter().position(|promise| promise.at == at) else { return };
        if let Some(promise) = self.0.get_mut(place) {
            promise.count -= 1;
            if promise.count == 0 {
                self.0.remove(place);
            }
        }
    }

    /// Returns the last promised moment.
    pub(super) fn last(&self) -> Option<Stamp> {
        self.0.back().map(|promise| promise.at)
    }

    /// Returns the slots in which the promised permits will count, and how many in each, newest first.
    pub(super) fn newest_first(&self) -> impl Iterator<Item = (Slot, u64)> {
        self.0.iter().rev().map(|promise| (Slot::new(promise.at), promise.count))
    }

    /// Returns the number of permits promised on a day.
    pub(super) fn on(&self, date: Date) -> u64 {
        let on_it = |promise: &&Promise| promise.days.first <= date && date <= promise.days.last;
        self.0.iter().filter(on_it).map(|promise| promise.count).sum()
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}
