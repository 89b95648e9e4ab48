//! Quota: the counts of one account, and what they leave free.

use std::time::{Duration, SystemTime};

use jiff::civil::Date;

use super::promise::{HORIZON, Promises};
use super::{Clock, Days, LimitReason, Limits, Minute, Slot, Stamp};
use crate::config::{Limit, LimitKind, PerLimit};

/// Assumed time until a request in flight ends. Clients that are refused because of `maxConcurrent` are asked to come
/// back after it.
const IN_FLIGHT_GUESS: Duration = Duration::from_secs(1);

/// Attempts and tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Attempts.
    pub attempts: u64,
    /// Tokens.
    pub tokens: u64,
}

/// Counts of one account.
#[derive(Clone, Debug, Default)]
pub struct Quota {
    attempts: Minute,
    tokens: Minute,
    /// Counts of the days last loaded: one day, or two at the turn of the day.
    days: Vec<(Date, Counts)>,
    concurrent: u64,
    /// Requests that other processes have in flight, where these are limited together.
    others_concurrent: u64,
    unknown: Unknown,
    promises: Promises,
}

/// Moments until which counts are unknown, and count as full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unknown {
    /// Those of the minute.
    pub minute_until: Stamp,
    /// All.
    pub all_until: Stamp,
}

/// Moment of an attempt that is counted, by the clocks of the minute and of the day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CountedAt {
    /// For its age.
    pub boot: Stamp,
    /// For the minute.
    pub slot: Slot,
    /// For the day, which each account's calendar makes of it.
    pub wall: SystemTime,
}

impl CountedAt {
    /// An attempt of this moment.
    pub fn now(clock: &Clock) -> Self {
        Self { boot: clock.boot, slot: Slot::new(clock.boot), wall: clock.wall }
    }
}

/// One attempt as an account counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Slot of the minute that it counts in.
    pub slot: Slot,
    /// Days that it counts in.
    pub days: Days,
}

/// Reason why an account takes no requests, and the moment at which it will.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The limit that lasts longest.
    pub by: LimitReason,
    /// Moment at which it takes requests again, if no other request takes the permit first.
    pub until: Stamp,
}

/// A limit and how much of it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gauge {
    /// The limit.
    pub limit: u64,
    /// Used part.
    pub used: u64,
    /// Moment at which everything that counts now has expired; `None` if nothing counts, and for concurrent requests.
    pub resets: Option<Stamp>,
}

impl View {
    /// The share that is left of what the account may use by the minute and by the day, from 0 to 1: the smallest of its limits'.
    pub fn share_left(&self, now: Stamp) -> f64 {
        let PerLimit { rpm, rpd, tpm, tpd, max_concurrent: _ } = &self.gauges;
        let share = |gauge: &Gauge| {
            // What has expired since counts no more.
            let used = if gauge.resets.is_some_and(|resets| resets <= now) { 0 } else { gauge.used };
            let limit = gauge.limit.max(1);
            #[expect(clippy::cast_precision_loss, reason = "a share need not be exact")]
            let share = limit.saturating_sub(used) as f64 / limit as f64;
            share
        };
        [rpm, rpd, tpm, tpd].into_iter().flatten().map(share).fold(1.0, f64::min)
    }
}

impl Gauge {
    /// Returns the remaining part.
    pub fn left(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }
}

/// Limits of an account and what is left of them, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Counts of each kind, limited or not.
    pub used: PerLimit<u64>,
    /// Use of each limit; `None` for kinds without one.
    pub gauges: PerLimit<Option<Gauge>>,
    /// Reason why the account takes no requests; `None` if it does.
    pub held: Option<Held>,
}

impl Quota {
    /// Replaces the counts with those of the ledger. Requests in flight and promises belong to this process and stay.
    pub fn load(&mut self, attempts: Minute, tokens: Minute, days: Vec<(Date, Counts)>, unknown: Unknown) {
        self.attempts = attempts;
        self.tokens = tokens;
        self.days = days;
        self.unknown = unknown;
    }

    /// Drops counts and promises that have expired.
    pub fn forget(&mut self, now: Stamp) {
        self.attempts.forget(now);
        self.tokens.forget(now);
        self.promises.forget(now);
    }

    /// Adds to the counts of the minute and of the days.
    pub fn add(&mut self, when: Counted, counts: Counts) {
        self.attempts.add(when.slot, counts.attempts);
        self.tokens.add(when.slot, counts.tokens);
        for date in when.days.each() {
            if let Some(day) = self.day_mut(date) {
                day.attempts = day.attempts.saturating_add(counts.attempts);
                day.tokens = day.tokens.saturating_add(counts.tokens);
            }
        }
    }

    /// Adds a change, which may be negative, to the counts of the minute and of the days.
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

    /// Counts a request as in flight, if these limits count those.
    pub fn enter(&mut self, limits: &Limits) {
        self.concurrent += u64::from(limits.is_concurrency_limited());
    }

    /// Returns the limit of concurrent requests if it is reached; all other limits are ignored.
    pub fn concurrency_holds(&self, limits: &Limits, now: Stamp) -> Option<Held> {
        match limits.by_kind.max_concurrent {
            Limit::AtMost(limit) if self.in_flight() >= limit => {
                Some(Held { by: LimitReason::Full(LimitKind::MaxConcurrent, limit), until: now + IN_FLIGHT_GUESS })
            }
            _ => None,
        }
    }

    /// Requests in flight, those of other processes included where these are limited together.
    fn in_flight(&self) -> u64 {
        self.concurrent.saturating_add(self.others_concurrent)
    }

    /// Requests that this process has in flight.
    pub fn own_in_flight(&self) -> u64 {
        self.concurrent
    }

    /// Sets how many requests other processes have in flight.
    pub fn set_others_in_flight(&mut self, others: u64) {
        self.others_concurrent = others;
    }

    /// Ends a request that [`Quota::enter`] counted by the same limits.
    pub fn release(&mut self, limits: &Limits) {
        self.concurrent = self.concurrent.saturating_sub(u64::from(limits.is_concurrency_limited()));
    }

    /// Returns why the account takes no requests; `None` if it does.
    pub fn held(&mut self, limits: &Limits, clock: &Clock) -> Option<Held> {
        self.held_for(limits, clock, 0)
    }

    /// The same for a request that takes this many tokens, or as many as the limit allows at all.
    pub fn held_for(&mut self, limits: &Limits, clock: &Clock, tokens: u64) -> Option<Held> {
        self.forget(clock.boot);
        let minute = self.minute_holds(limits, clock.boot, tokens);
        let day = self.day_holds(limits, clock, tokens);
        minute.into_iter().chain(day).flatten().max_by_key(|held| held.until)
    }

    fn minute_holds(&self, limits: &Limits, now: Stamp, tokens: u64) -> [Option<Held>; 5] {
        let over = |limit: Limit, used: u64| match limit {
            Limit::AtMost(limit) if used >= limit => Some(limit),
            _ => None,
        };
        let tokens_over = match limits.by_kind.tpm {
            Limit::AtMost(limit) if self.tokens.total() >= least_full(limit, tokens) => Some(limit),
            _ => None,
        };
        let per_minute = limits.by_kind.rpm != Limit::Unlimited || limits.by_kind.tpm != Limit::Unlimited;
        [
            over(limits.by_kind.rpm, self.attempts.total()).map(|limit| Held {
                by: LimitReason::Full(LimitKind::Rpm, limit),
                until: self.attempts.below(limit, now),
            }),
            tokens_over.map(|limit| Held {
                by: LimitReason::Full(LimitKind::Tpm, limit),
                until: self.tokens.below(least_full(limit, tokens), now),
            }),
            self.concurrency_holds(limits, now),
            (per_minute && self.unknown.minute_until > now)
                .then_some(Held { by: LimitReason::MinuteUnknown, until: self.unknown.minute_until }),
            ((limits.in_ledger() || limits.is_concurrency_limited()) && self.unknown.all_until > now)
                .then_some(Held { by: LimitReason::LedgerBegins, until: self.unknown.all_until }),
        ]
    }

    fn day_holds(&self, limits: &Limits, clock: &Clock, tokens: u64) -> [Option<Held>; 2] {
        if matches!((limits.by_kind.rpd, limits.by_kind.tpd), (Limit::Unlimited, Limit::Unlimited)) {
            return [None, None];
        }
        let days = limits.calendar.days(clock.wall);
        let over = |kind, limit: Limit, wanted: u64, used: fn(Counts) -> u64| {
            let Limit::AtMost(limit) = limit else { return None };
            let full = days.each().filter(|date| used(self.day(*date)) >= least_full(limit, wanted)).last()?;
            Some(Held { by: LimitReason::Full(kind, limit), until: stamp_of(limits.calendar.clear_of(full), clock) })
        };
        [
            over(LimitKind::Rpd, limits.by_kind.rpd, 0, |counts| counts.attempts),
            over(LimitKind::Tpd, limits.by_kind.tpd, tokens, |counts| counts.tokens),
        ]
    }

    /// Returns the moment, not before `not_before`, at which the next permit becomes free that is not promised yet.
    pub fn next_free(&mut self, limits: &Limits, clock: &Clock, not_before: Stamp) -> Stamp {
        let first = self.held(limits, clock).map_or(clock.boot, |held| held.until).max(not_before);
        let at = self.next_unpromised(first, limits, clock);
        if at - first <= HORIZON {
            return at;
        }
        self.promises.clear();
        self.next_unpromised(first, limits, clock)
    }

    /// Promises the permit that becomes free at this moment, as returned by [`Quota::next_free`].
    pub fn promise(&mut self, at: Stamp, limits: &Limits, clock: &Clock) {
        self.promises.add(at, limits.calendar.days(wall_of(at, clock)));
    }

    /// Takes a promise back, so that the permit is free for another one.
    pub fn withdraw(&mut self, at: Stamp) {
        self.promises.remove(at);
    }

    fn next_unpromised(&self, first: Stamp, limits: &Limits, clock: &Clock) -> Stamp {
        // Minute and day can push the moment further in turn, but each round moves to another day.
        const ROUNDS_MAX: usize = 4;
        let mut at = first.max(self.promises.last().unwrap_or_default());
        for _ in 0..ROUNDS_MAX {
            if let Limit::AtMost(rpm) = limits.by_kind.rpm {
                at = at.max(self.minute_has_room(rpm));
            }
            let Limit::AtMost(rpd) = limits.by_kind.rpd else { break };
            let days = limits.calendar.days(wall_of(at, clock));
            let full = days.each().filter(|date| self.day(*date).attempts + self.promises.on(*date) >= rpd).last();
            let Some(full) = full else { break };
            at = at.max(stamp_of(limits.calendar.clear_of(full), clock));
        }
        at
    }

    /// Returns when the minute has room for one more attempt after everything counted and promised: when the `rpm`-th
    /// newest of them expires.
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

    /// Returns the state of the account's limits at this moment.
    pub fn view(&mut self, limits: &Limits, clock: &Clock) -> View {
        let held = self.held(limits, clock);
        let (today, clear) = limits.calendar.today_and_clear(clock.wall);
        let day = self.day(today);
        let minute = Counts { attempts: self.attempts.total(), tokens: self.tokens.total() };
        let gauge = |limit, used, resets| match limit {
            Limit::AtMost(limit) => Some(Gauge { limit, used, resets }),
            Limit::Unlimited | Limit::Off => None,
        };
        let turn = || Some(stamp_of(clear, clock));
        let limits = limits.by_kind;
        View {
            used: PerLimit {
                rpm: minute.attempts,
                rpd: day.attempts,
                tpm: minute.tokens,
                tpd: day.tokens,
                max_concurrent: self.in_flight(),
            },
            gauges: PerLimit {
                rpm: gauge(limits.rpm, minute.attempts, self.attempts.empties()),
                rpd: gauge(limits.rpd, day.attempts, (day.attempts > 0).then(turn).flatten()),
                tpm: gauge(limits.tpm, minute.tokens, self.tokens.empties()),
                tpd: gauge(limits.tpd, day.tokens, (day.tokens > 0).then(turn).flatten()),
                max_concurrent: gauge(limits.max_concurrent, self.in_flight(), None),
            },
            held,
        }
    }

    /// True if counts of the minute will expire.
    pub fn is_moving(&self) -> bool {
        !self.attempts.is_empty() || !self.tokens.is_empty()
    }

    /// True if the counts of these days are loaded.
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

/// The least use of a limit that leaves no room for this much more. What is more than the limit takes all of it.
fn least_full(limit: u64, wanted: u64) -> u64 {
    if wanted == 0 { limit } else { limit.saturating_sub(wanted).saturating_add(1) }
}

/// Returns the stamp at which the wall clock will show this time, unless it is set.
fn stamp_of(wall: SystemTime, clock: &Clock) -> Stamp {
    clock.boot + wall.duration_since(clock.wall).unwrap_or_default()
}

fn wall_of(stamp: Stamp, clock: &Clock) -> SystemTime {
    clock.wall + (stamp - clock.boot)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::limit::{Calendar, SPAN};
    use jiff::civil::date;
    use jiff::tz::TimeZone;

    /// 2026-11-25, 12:00 UTC.
    const NOON: u64 = 1_795_608_000;

    impl Quota {
        /// Counts an attempt if every limit allows it, as an account of its own.
        fn take(&mut self, limits: &Limits, clock: &Clock) -> Result<Counted, Held> {
            if let Some(held) = self.held(limits, clock) {
                return Err(held);
            }
            let counted = limits.counted(CountedAt::now(clock));
            self.add(counted, Counts { attempts: u64::from(limits.in_ledger()), tokens: 0 });
            self.enter(limits);
            Ok(counted)
        }
    }

    fn limits(rpm: u64, rpd: u64) -> Limits {
        let limit = |limit| if limit == 0 { Limit::Unlimited } else { Limit::AtMost(limit) };
        let by_kind = PerLimit { rpm: limit(rpm), rpd: limit(rpd), ..PerLimit::default() };
        Limits { by_kind, calendar: Calendar::new(TimeZone::UTC) }
    }

    /// Returns the clock this many milliseconds after boot, which was at noon.
    fn at(boot_ms: u64) -> Clock {
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(NOON) + Duration::from_millis(boot_ms);
        Clock { now: Instant::now(), boot: Stamp(boot_ms), wall }
    }

    fn quota(days: impl IntoIterator<Item = i8>) -> Quota {
        let mut quota = Quota::default();
        let days = days.into_iter().map(|day| (date(2026, 11, day), Counts::default())).collect();
        quota.load(Minute::default(), Minute::default(), days, Unknown::default());
        quota
    }

    #[test]
    fn every_limit_is_taken_in_one_step() {
        let (limits, mut quota) = (limits(2, 3), quota([25]));
        assert!(quota.take(&limits, &at(0)).is_ok());
        assert!(quota.take(&limits, &at(0)).is_ok());
        let held = quota.take(&limits, &at(100)).unwrap_err();
        assert_eq!(held, Held { by: LimitReason::Full(LimitKind::Rpm, 2), until: Stamp(60_500) });
        assert_eq!(quota.view(&limits, &at(100)).used.rpd, 2, "what is refused is not counted");
        assert!(quota.take(&limits, &at(61_000)).is_ok());
        let held = quota.take(&limits, &at(61_000)).unwrap_err();
        // Twelve hours after noon, plus the second in which an attempt counts in both days.
        assert_eq!(held, Held { by: LimitReason::Full(LimitKind::Rpd, 3), until: Stamp(12 * 3_600_000 + 1000) });
    }

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let (limits, mut quota) = (limits(1, 1), quota([25]));
        let counted = quota.take(&limits, &at(0)).unwrap();
        assert!(quota.take(&limits, &at(0)).is_err());
        quota.change(counted.slot, counted.days, -1, 0);
        assert!(quota.take(&limits, &at(0)).is_ok());
    }

    #[test]
    fn an_attempt_at_the_turn_needs_room_in_both_days() {
        let (limits, mut quota) = (limits(0, 1), quota([25, 26]));
        let midnight = 12 * 3_600_000;
        assert!(quota.take(&limits, &at(midnight - 2000)).is_ok());
        assert!(quota.take(&limits, &at(midnight - 500)).is_err(), "the day that ends is full");
        assert!(quota.take(&limits, &at(midnight + 500)).is_err());
        let counted = quota.take(&limits, &at(midnight + 1000)).unwrap();
        assert_eq!(counted.days, Days { first: date(2026, 11, 26), last: date(2026, 11, 26) });
    }

    #[test]
    fn a_clock_that_is_set_neither_opens_nor_closes_the_minute_and_finds_the_days_counts_again() {
        let (limits, mut quota) = (limits(2, 3), quota([25, 26]));
        let hour = Duration::from_hours(1);
        let set = |boot_ms: u64, forward: Option<u32>, back: Option<u32>| {
            let clock = at(boot_ms);
            Clock { wall: clock.wall + hour * forward.unwrap_or(0) - hour * back.unwrap_or(0), ..clock }
        };
        quota.take(&limits, &at(0)).unwrap();
        quota.take(&limits, &set(1000, None, Some(1))).unwrap();
        for clock in [set(2000, Some(1), None), set(3000, None, Some(1)), set(60_000, Some(1), None)] {
            assert_eq!(quota.take(&limits, &clock).unwrap_err().until, Stamp(60_500), "{clock:?}");
        }
        // Half a day ahead is tomorrow. Back again, today's two attempts still count.
        quota.take(&limits, &set(61_500, Some(13), None)).unwrap();
        quota.take(&limits, &at(62_000)).unwrap();
        let held = quota.take(&limits, &at(200_000)).unwrap_err();
        assert_eq!(held.by, LimitReason::Full(LimitKind::Rpd, 3));
        assert!(quota.take(&limits, &set(200_000, Some(13), None)).is_ok());
    }

    #[test]
    fn tokens_hold_once_they_are_known() {
        let mut limits = limits(0, 0);
        (limits.by_kind.tpm, limits.by_kind.tpd) = (Limit::AtMost(10), Limit::AtMost(100));
        let mut quota = quota([25]);
        let first = quota.take(&limits, &at(0)).unwrap();
        quota.add(first, Counts { attempts: 0, tokens: 9 });
        let second = quota.take(&limits, &at(1000)).unwrap();
        quota.add(second, Counts { attempts: 0, tokens: 5 });
        let held = quota.take(&limits, &at(2000)).unwrap_err();
        assert_eq!(held, Held { by: LimitReason::Full(LimitKind::Tpm, 10), until: Stamp(60_500) }, "5 are left then");
        assert!(quota.take(&limits, &at(60_500)).is_ok());
        quota.add(second, Counts { attempts: 0, tokens: 86 });
        assert_eq!(quota.take(&limits, &at(200_000)).unwrap_err().by, LimitReason::Full(LimitKind::Tpd, 100));
    }

    #[test]
    fn requests_at_once_are_counted_until_they_end() {
        let mut limits = limits(0, 0);
        limits.by_kind.max_concurrent = Limit::AtMost(1);
        let mut quota = quota([25]);
        assert!(quota.take(&limits, &at(0)).is_ok());
        assert_eq!(quota.take(&limits, &at(0)).unwrap_err().by, LimitReason::Full(LimitKind::MaxConcurrent, 1));
        let held = quota.concurrency_holds(&limits, Stamp(0)).unwrap();
        assert_eq!(held.by, LimitReason::Full(LimitKind::MaxConcurrent, 1));
        quota.release(&limits);
        assert!(quota.take(&limits, &at(0)).is_ok());
        assert_eq!(quota.view(&limits, &at(0)).used.rpm, 0, "it is counted when it is sent");
    }

    #[test]
    fn an_unknown_minute_is_a_full_one() {
        let mut quota = Quota::default();
        let unknown = Unknown { minute_until: Stamp::default() + SPAN, ..Unknown::default() };
        quota.load(Minute::default(), Minute::default(), Vec::new(), unknown);
        let held = quota.take(&limits(5, 0), &at(1000)).unwrap_err();
        assert_eq!(held, Held { by: LimitReason::MinuteUnknown, until: Stamp(60_500) });
        assert!(quota.take(&limits(0, 0), &at(1000)).is_ok(), "without limits by the minute it does not matter");
        assert!(quota.take(&limits(5, 0), &at(60_500)).is_ok());
    }

    #[test]
    fn while_nothing_is_known_no_limit_has_room() {
        let mut quota = Quota::default();
        let unknown = Unknown { all_until: Stamp(5000), ..Unknown::default() };
        quota.load(Minute::default(), Minute::default(), vec![(date(2026, 11, 25), Counts::default())], unknown);
        for limits in [limits(5, 0), limits(0, 5)] {
            let held = quota.take(&limits, &at(1000)).unwrap_err();
            assert_eq!(held, Held { by: LimitReason::LedgerBegins, until: Stamp(5000) });
            assert!(quota.held(&limits, &at(5000)).is_none());
        }
        assert!(quota.take(&limits(0, 0), &at(1000)).is_ok(), "without limits it does not matter");
    }

    /// Waits of a crowd of refused clients, in seconds from now.
    fn crowd(quota: &mut Quota, limits: &Limits, clock: &Clock, count: usize) -> Vec<u64> {
        let one = |_| {
            let at = quota.next_free(limits, clock, clock.boot);
            quota.promise(at, limits, clock);
            clock.boot.until(at).as_secs()
        };
        (0..count).map(one).collect()
    }

    #[test]
    fn each_of_a_crowd_is_told_the_moment_of_a_permit_of_its_own() {
        let (limits, mut quota) = (limits(3, 0), quota([25]));
        for second in [0, 10, 20] {
            quota.take(&limits, &at(second * 1000)).unwrap();
        }
        let told = crowd(&mut quota, &limits, &at(30_000), 8);
        assert_eq!(told, [30, 40, 50, 91, 101, 111, 151, 161], "then those that they free in turn");
        // A client that comes back at its promised moment gets its permit, and the others keep theirs.
        assert!(quota.take(&limits, &at(60_500)).is_ok());
        assert_eq!(crowd(&mut quota, &limits, &at(60_500), 1), [141]);
    }

    #[test]
    fn a_crowd_that_comes_again_and_again_does_not_wait_for_ever() {
        let (limits, mut quota) = (limits(1, 0), quota([25]));
        quota.take(&limits, &at(0)).unwrap();
        let told = crowd(&mut quota, &limits, &at(0), 1000);
        assert_eq!(told[..3], [60, 121, 181]);
        assert!(told.iter().all(|seconds| *seconds <= 60 + 600), "{told:?}");
        assert!(told.iter().filter(|seconds| **seconds == 60).count() > 50);
    }

    #[test]
    fn a_crowd_at_a_full_day_is_spread_over_the_minutes_of_the_next() {
        let (limits, mut quota) = (limits(2, 3), quota([25]));
        for minute in [0, 2, 4] {
            quota.take(&limits, &at(minute * 60_000)).unwrap();
        }
        let turn = 12 * 3600 - 300 + 1;
        let told = crowd(&mut quota, &limits, &at(300_000), 4);
        assert_eq!(told, [turn, turn, turn + 60, turn], "the day after next is too far to be told: it begins anew");
    }

    #[test]
    fn a_view_says_what_is_left_and_when_it_resets() {
        let (limits, mut quota) = (limits(3, 10), quota([25]));
        quota.take(&limits, &at(0)).unwrap();
        quota.take(&limits, &at(5000)).unwrap();
        let view = quota.view(&limits, &at(6000));
        let rpm = view.gauges.rpm.unwrap();
        assert_eq!((rpm.left(), rpm.resets), (1, Some(Stamp(65_500))));
        let rpd = view.gauges.rpd.unwrap();
        assert_eq!((rpd.left(), rpd.resets), (8, Some(Stamp(12 * 3_600_000 + 1000))));
        assert_eq!((view.gauges.tpm, view.held), (None, None));
    }
}
