//! What counts for one endpoint, and what that leaves free.

use std::time::{Duration, SystemTime};

use jiff::civil::Date;

use super::promise::{HORIZON, Promises};
use super::{Clock, Days, Hold, Limits, Minute, Slot, Stamp};
use crate::config::Limit;

/// When a request in flight ends is not known; whoever waits for that is told to come back after this time.
const IN_FLIGHT_GUESS: Duration = Duration::from_secs(1);

/// Attempts and tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Attempts.
    pub attempts: u64,
    /// Tokens.
    pub tokens: u64,
}

/// What counts for one endpoint.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    attempts: Minute,
    tokens: Minute,
    /// The days that were asked for last: one, or two at the turn.
    days: Vec<(Date, Counts)>,
    concurrent: u64,
    /// Until then the minute counts as full.
    unknown_until: Stamp,
    promises: Promises,
}

/// One attempt that was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// When.
    pub at: Stamp,
    /// In which days.
    pub days: Days,
}

impl Counted {
    /// The slot of the minute.
    pub fn slot(&self) -> Slot {
        Slot::of(self.at)
    }
}

/// Why an endpoint cannot be asked, and until when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The limit that holds it longest.
    pub by: Hold,
    /// When it may be asked, if nobody else is faster.
    pub until: Stamp,
}

/// One kind of limit, as far as it is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gauge {
    /// The limit.
    pub limit: u64,
    /// What counts.
    pub used: u64,
    /// When nothing that counts now does any more.
    pub resets: Option<Stamp>,
}

impl Gauge {
    /// What is left.
    pub fn left(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }
}

/// An endpoint's limits and what is left of them, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Attempts and tokens of the last minute.
    pub minute: Counts,
    /// Of the day.
    pub day: Counts,
    /// `rpm`.
    pub rpm: Option<Gauge>,
    /// `rpd`.
    pub rpd: Option<Gauge>,
    /// `tpm`.
    pub tpm: Option<Gauge>,
    /// `tpd`.
    pub tpd: Option<Gauge>,
    /// `maxConcurrent`.
    pub concurrent: Option<Gauge>,
    /// What keeps the endpoint from being asked.
    pub held: Option<Held>,
}

impl Usage {
    /// Takes over what the ledger holds; requests in flight and promises are this process's own and stay.
    pub fn load(&mut self, attempts: Minute, tokens: Minute, days: Vec<(Date, Counts)>, unknown_until: Stamp) {
        self.attempts = attempts;
        self.tokens = tokens;
        self.days = days;
        self.unknown_until = unknown_until;
    }

    /// Drops what no longer counts.
    pub fn forget(&mut self, now: Stamp) {
        self.attempts.forget(now);
        self.tokens.forget(now);
        self.promises.forget(now);
    }

    /// Counts an attempt, if every limit allows one.
    pub fn take(&mut self, limits: &Limits, clock: &Clock) -> Result<Counted, Held> {
        match self.held(limits, clock) {
            Some(held) => Err(held),
            None => Ok(self.count(limits, clock)),
        }
    }

    fn count(&mut self, limits: &Limits, clock: &Clock) -> Counted {
        let counted = Counted { at: clock.boot, days: limits.calendar.days(clock.wall) };
        // Attempts that need no permit of the ledger are counted when they are sent.
        self.add(counted, Counts { attempts: u64::from(limits.in_ledger()), tokens: 0 });
        self.concurrent += u64::from(matches!(limits.max_concurrent, Limit::AtMost(_)));
        counted
    }

    /// Adds to what counts, in the minute and in the days.
    pub fn add(&mut self, when: Counted, counts: Counts) {
        self.attempts.add(when.slot(), counts.attempts);
        self.tokens.add(when.slot(), counts.tokens);
        for date in when.days.each() {
            if let Some(day) = self.day_mut(date) {
                day.attempts += counts.attempts;
                day.tokens += counts.tokens;
            }
        }
    }

    /// Takes back what was counted for an attempt that was never sent.
    pub fn give_back(&mut self, counted: Counted) {
        self.change(counted.slot(), counted.days, -1, 0);
    }

    /// Adds to what counts, or takes back.
    pub fn change(&mut self, slot: Slot, days: Days, attempts: i64, tokens: i64) {
        for (minute, change) in [(&mut self.attempts, attempts), (&mut self.tokens, tokens)] {
            if change < 0 {
                minute.remove(slot, change.unsigned_abs());
            } else {
                minute.add(slot, change.unsigned_abs());
            }
        }
        for date in days.each() {
            if let Some(day) = self.day_mut(date) {
                day.attempts = day.attempts.saturating_add_signed(attempts);
                day.tokens = day.tokens.saturating_add_signed(tokens);
            }
        }
    }

    /// Counts a request as in flight, if there is room for it; whatever else the limits say.
    pub fn enter(&mut self, limits: &Limits) -> bool {
        let Limit::AtMost(limit) = limits.max_concurrent else { return true };
        let has_room = self.concurrent < limit;
        self.concurrent += u64::from(has_room);
        has_room
    }

    /// A request that was counted as in flight has ended.
    pub fn release(&mut self) {
        self.concurrent = self.concurrent.saturating_sub(1);
    }

    /// What keeps the endpoint from being asked; none if it may be.
    pub fn held(&mut self, limits: &Limits, clock: &Clock) -> Option<Held> {
        self.forget(clock.boot);
        let minute = self.minute_holds(limits, clock.boot);
        let day = self.day_holds(limits, clock);
        minute.into_iter().chain(day).flatten().max_by_key(|held| held.until)
    }

    fn minute_holds(&self, limits: &Limits, now: Stamp) -> [Option<Held>; 4] {
        let over = |limit: Limit, used: u64| match limit {
            Limit::AtMost(limit) if used >= limit => Some(limit),
            _ => None,
        };
        let per_minute = limits.rpm != Limit::Unlimited || limits.tpm != Limit::Unlimited;
        [
            over(limits.rpm, self.attempts.total())
                .map(|limit| Held { by: Hold::RequestsPerMinute(limit), until: self.attempts.below(limit, now) }),
            over(limits.tpm, self.tokens.total())
                .map(|limit| Held { by: Hold::TokensPerMinute(limit), until: self.tokens.below(limit, now) }),
            over(limits.max_concurrent, self.concurrent)
                .map(|limit| Held { by: Hold::Concurrent(limit), until: now + IN_FLIGHT_GUESS }),
            (per_minute && self.unknown_until > now)
                .then_some(Held { by: Hold::MinuteUnknown, until: self.unknown_until }),
        ]
    }

    fn day_holds(&self, limits: &Limits, clock: &Clock) -> [Option<Held>; 2] {
        if matches!((limits.rpd, limits.tpd), (Limit::Unlimited, Limit::Unlimited)) {
            return [None, None];
        }
        let days = limits.calendar.days(clock.wall);
        let over = |limit: Limit, used: fn(Counts) -> u64, by: fn(u64) -> Hold| {
            let Limit::AtMost(limit) = limit else { return None };
            let full = days.each().filter(|date| used(self.day(*date)) >= limit).last()?;
            Some(Held { by: by(limit), until: stamp_of(limits.calendar.clear_of(full), clock) })
        };
        [
            over(limits.rpd, |counts| counts.attempts, Hold::RequestsPerDay),
            over(limits.tpd, |counts| counts.tokens, Hold::TokensPerDay),
        ]
    }

    /// The moment at which the next permit frees that is not promised to anybody yet, not before the one given.
    pub fn next_free(&mut self, limits: &Limits, clock: &Clock, not_before: Stamp) -> Stamp {
        let first = self.held(limits, clock).map_or(clock.boot, |held| held.until).max(not_before);
        let at = self.next_unpromised(first, limits, clock);
        if at - first <= HORIZON {
            return at;
        }
        self.promises.clear();
        self.next_unpromised(first, limits, clock)
    }

    /// Promises the permit that frees at this moment, which is what [`Usage::next_free`] said.
    pub fn promise(&mut self, at: Stamp, limits: &Limits, clock: &Clock) {
        self.promises.add(at, limits.calendar.days(wall_of(at, clock)));
    }

    fn next_unpromised(&self, first: Stamp, limits: &Limits, clock: &Clock) -> Stamp {
        // The minute and the day can push each other on, but every round ends in another day.
        const ROUNDS_MAX: usize = 4;
        let mut at = first.max(self.promises.last().unwrap_or_default());
        for _ in 0..ROUNDS_MAX {
            if let Limit::AtMost(rpm) = limits.rpm {
                at = at.max(self.minute_has_room(rpm));
            }
            let Limit::AtMost(rpd) = limits.rpd else { break };
            let days = limits.calendar.days(wall_of(at, clock));
            let full = days.each().filter(|date| self.day(*date).attempts + self.promises.on(*date) >= rpd).last();
            let Some(full) = full else { break };
            at = at.max(stamp_of(limits.calendar.clear_of(full), clock));
        }
        at
    }

    /// When a minute has room for one more after everything counted and promised: when the `rpm`-th from the end has freed.
    fn minute_has_room(&self, rpm: u64) -> Stamp {
        let mut seen = 0;
        for (slot, count) in self.promises.newest_first().chain(self.attempts.newest_first()) {
            seen += count;
            if seen >= rpm {
                return slot.frees();
            }
        }
        Stamp::default()
    }

    /// Everything that can be told about the endpoint's limits at this moment.
    pub fn view(&mut self, limits: &Limits, clock: &Clock) -> View {
        let held = self.held(limits, clock);
        let today = limits.calendar.date(clock.wall);
        let day = self.day(today);
        let minute = Counts { attempts: self.attempts.total(), tokens: self.tokens.total() };
        let gauge = |limit, used, resets| match limit {
            Limit::AtMost(limit) => Some(Gauge { limit, used, resets }),
            Limit::Unlimited | Limit::Off => None,
        };
        let turn = || Some(stamp_of(limits.calendar.clear_of(today), clock));
        View {
            minute,
            day,
            rpm: gauge(limits.rpm, minute.attempts, self.attempts.empties()),
            rpd: gauge(limits.rpd, day.attempts, (day.attempts > 0).then(turn).flatten()),
            tpm: gauge(limits.tpm, minute.tokens, self.tokens.empties()),
            tpd: gauge(limits.tpd, day.tokens, (day.tokens > 0).then(turn).flatten()),
            concurrent: gauge(limits.max_concurrent, self.concurrent, None),
            held,
        }
    }

    /// Whether anything still counts that will free by itself.
    pub fn is_moving(&self) -> bool {
        !self.attempts.is_empty() || !self.tokens.is_empty()
    }

    /// Whether the counts of these days are known.
    pub fn knows(&self, days: Days) -> bool {
        days.each().all(|date| self.days.iter().any(|(known, _)| *known == date))
    }

    fn day(&self, date: Date) -> Counts {
        self.days.iter().find(|(known, _)| *known == date).map(|(_, counts)| *counts).unwrap_or_default()
    }

    fn day_mut(&mut self, date: Date) -> Option<&mut Counts> {
        self.days.iter_mut().find(|(known, _)| *known == date).map(|(_, counts)| counts)
    }
}

/// The moment at which the machine's clock will show this time, unless it is set.
fn stamp_of(wall: SystemTime, clock: &Clock) -> Stamp {
    clock.boot + wall.duration_since(clock.wall).unwrap_or_default()
}

fn wall_of(stamp: Stamp, clock: &Clock) -> SystemTime {
    clock.wall + (stamp - clock.boot)
}
