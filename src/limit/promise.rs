//! Moments that were promised to refused clients.

use std::collections::VecDeque;
use std::time::Duration;

use jiff::civil::Date;

use super::{Days, Slot, Stamp};

/// Latest promise after the next permit frees: a crowd of clients that keep asking would push all promises out for ever. Beyond
/// it promises begin again at the first permit.
pub(super) const HORIZON: Duration = Duration::from_mins(10);

/// The permits that were promised, each to one of a crowd, so that they do not all come back for the first one. Bounded by
/// [`HORIZON`], as permits free by slots.
#[derive(Clone, Debug, Default)]
pub(super) struct Promises(VecDeque<Promise>);

#[derive(Clone, Copy, Debug)]
struct Promise {
    at: Stamp,
    days: Days,
    count: u64,
}

impl Promises {
    /// Drops those whose moment has come.
    pub(super) fn forget(&mut self, now: Stamp) {
        while self.0.front().is_some_and(|promise| promise.at <= now) {
            self.0.pop_front();
        }
    }

    /// Promises a permit at this moment, which is not before any promised one.
    pub(super) fn add(&mut self, at: Stamp, days: Days) {
        match self.0.back_mut() {
            Some(last) if last.at == at => last.count += 1,
            _ => self.0.push_back(Promise { at, days, count: 1 }),
        }
    }

    /// The last moment that was promised.
    pub(super) fn last(&self) -> Option<Stamp> {
        self.0.back().map(|promise| promise.at)
    }

    /// The slots in which those promised are going to count, newest first.
    pub(super) fn newest_first(&self) -> impl Iterator<Item = (Slot, u64)> {
        self.0.iter().rev().map(|promise| (Slot::new(promise.at), promise.count))
    }

    /// Number of promises on a day.
    pub(super) fn on(&self, date: Date) -> u64 {
        let on_it = |promise: &&Promise| promise.days.first <= date && date <= promise.days.last;
        self.0.iter().filter(on_it).map(|promise| promise.count).sum()
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}
