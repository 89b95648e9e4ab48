//! How often an endpoint may be asked: permits out of two windows, a sliding minute and a calendar day. Pure; the clock
//! is passed in.

mod calendar;
mod window;

use std::time::{Duration, Instant};

use jiff::civil::Date;

use crate::config::Limit;
pub use calendar::Calendar;
use window::{Day, Minute};

/// What an endpoint may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Attempts in any 60 seconds.
    pub rpm: Limit,
    /// Attempts in a calendar day.
    pub rpd: Limit,
}

/// The clocks that the windows go by.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// For the minute; it never steps.
    pub now: Instant,
    /// For the day, in the time zone in which it turns.
    pub date: Date,
    /// Until that day ends.
    pub day_left: Duration,
}

/// The attempts that one endpoint was asked for.
#[derive(Debug)]
pub struct Usage {
    minute: Minute,
    day: Day,
}

/// One attempt that was counted. Given back if it is never sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permit {
    slot: u64,
    date: Date,
}

impl Permit {
    /// Whether the day has turned since it was counted.
    pub fn is_of_another_day(&self, clock: &Clock) -> bool {
        self.date != clock.date
    }
}

impl Usage {
    /// Nothing was asked for yet.
    pub fn new(now: Instant) -> Self {
        Self { minute: Minute::new(now), day: Day::default() }
    }

    /// Counts one attempt, if both windows have room for it.
    pub fn take(&mut self, quota: Quota, clock: &Clock) -> Option<Permit> {
        if self.full_for(quota, clock).is_some() {
            return None;
        }
        self.day.add(clock.date);
        Some(Permit { slot: self.minute.add(clock.now), date: clock.date })
    }

    /// Takes back what was counted for an attempt that was never sent.
    pub fn give_back(&mut self, permit: Permit) {
        self.minute.remove(permit.slot);
        self.day.remove(permit.date);
    }

    /// How long until both windows have room again; none if they have it now.
    pub fn full_for(&mut self, quota: Quota, clock: &Clock) -> Option<Duration> {
        let minute = match quota.rpm {
            Limit::AtMost(rpm) => self.minute.full_for(rpm, clock.now),
            Limit::Unlimited | Limit::Off => None,
        };
        let day = match quota.rpd {
            Limit::AtMost(rpd) => (self.day.count(clock.date) >= rpd).then_some(clock.day_left),
            Limit::Unlimited | Limit::Off => None,
        };
        minute.max(day)
    }

    /// The attempts of the last minute and of today.
    pub fn used(&mut self, clock: &Clock) -> (u64, u64) {
        (self.minute.count(clock.now), self.day.count(clock.date))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::civil::date;

    fn clock(now: Instant, day: i8) -> Clock {
        Clock { now, date: date(2026, 3, day), day_left: Duration::from_hours(5) }
    }

    #[test]
    fn both_windows_are_taken_in_one_step() {
        let start = Instant::now();
        let quota = Quota { rpm: Limit::AtMost(2), rpd: Limit::AtMost(3) };
        let mut usage = Usage::new(start);
        assert!(usage.take(quota, &clock(start, 1)).is_some());
        assert!(usage.take(quota, &clock(start, 1)).is_some());
        assert!(usage.take(quota, &clock(start, 1)).is_none(), "the minute is full");
        assert_eq!(usage.used(&clock(start, 1)), (2, 2), "what is refused is not counted");
        let later = start + Duration::from_secs(61);
        assert!(usage.take(quota, &clock(later, 1)).is_some());
        assert_eq!(usage.full_for(quota, &clock(later, 1)), Some(Duration::from_hours(5)), "the day is full");
        assert!(usage.take(quota, &clock(later, 2)).is_some(), "a new day");
    }

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let start = Instant::now();
        let quota = Quota { rpm: Limit::AtMost(1), rpd: Limit::AtMost(1) };
        let mut usage = Usage::new(start);
        let permit = usage.take(quota, &clock(start, 1)).unwrap();
        assert!(usage.take(quota, &clock(start, 1)).is_none());
        usage.give_back(permit);
        assert!(usage.take(quota, &clock(start, 1)).is_some());
        // A permit of yesterday is not one of today's.
        assert!(usage.take(Quota { rpm: Limit::Unlimited, ..quota }, &clock(start, 2)).is_some());
        usage.give_back(permit);
        assert_eq!(usage.used(&clock(start, 2)).1, 1);
    }

    #[test]
    fn without_limits_everything_is_counted_and_nothing_refused() {
        let start = Instant::now();
        let quota = Quota { rpm: Limit::Unlimited, rpd: Limit::Unlimited };
        let mut usage = Usage::new(start);
        for _ in 0..1000 {
            assert!(usage.take(quota, &clock(start, 1)).is_some());
        }
        assert_eq!(usage.used(&clock(start, 1)), (1000, 1000));
    }
}
