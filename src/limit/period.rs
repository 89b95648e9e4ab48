//! Periods of budgets in a time zone: which one a moment is in, and when that ends.

use std::time::{Duration, SystemTime};

use jiff::civil::{Date, DateTime, Weekday};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan as _};

use crate::config::BudgetPeriod;

/// Length of the one that begins with its first request.
const FIVE_HOURS: i64 = 5 * 3600;

/// A period of a budget. Its number is that of its calendar (2026113007 for an hour, 20261130 for a day and a week from that day on,
/// 202611 for a month, 0 for all time), or the second of Unix time that it began with (five hours).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Period {
    /// Number.
    pub number: i64,
    /// Moment at which it ends; none for all time.
    pub ends: Option<SystemTime>,
}

impl Period {
    /// The period that a moment is in. `latest`: the number of the latest one of five hours that has begun, if there was any.
    pub fn of(period: BudgetPeriod, zone: &TimeZone, wall: SystemTime, latest: Option<i64>) -> Self {
        let now = Timestamp::try_from(wall).unwrap_or_default();
        if period == BudgetPeriod::FiveHours {
            let second = now.as_second();
            let running = latest.filter(|began| (*began..began.saturating_add(FIVE_HOURS)).contains(&second));
            let began = running.unwrap_or(second);
            return Self { number: began, ends: Some(at(began.saturating_add(FIVE_HOURS))) };
        }
        let local = zone.to_datetime(now);
        let (date, day) = (local.date(), number_of(local.date()));
        let monday = || date.checked_sub(i64::from(date.weekday().since(Weekday::Monday)).days()).unwrap_or(date);
        let (number, next) = match period {
            BudgetPeriod::Hour => {
                let begins = date.at(local.hour(), 0, 0, 0);
                (day * 100 + i64::from(local.hour()), begins.checked_add(1.hour()).ok())
            }
            BudgetPeriod::Day => (day, midnight(date.tomorrow().ok())),
            BudgetPeriod::Week => (number_of(monday()), midnight(monday().checked_add(1.week()).ok())),
            BudgetPeriod::Month => (day / 100, midnight(date.first_of_month().checked_add(1.month()).ok())),
            BudgetPeriod::Total | BudgetPeriod::FiveHours => return Self { number: 0, ends: None },
        };
        // The clock may show the end earlier than it comes, where it is put back.
        let ends = next.and_then(|next| zone.to_ambiguous_timestamp(next).later().ok());
        Self { number, ends: Some(ends.map_or(wall + Duration::from_hours(1), |ends| at(ends.as_second()))) }
    }

    /// True while a moment is in it.
    pub fn lasts(&self, wall: SystemTime) -> bool {
        self.ends.is_none_or(|ends| wall < ends)
    }
}

fn number_of(date: Date) -> i64 {
    i64::from(date.year()) * 10_000 + i64::from(date.month()) * 100 + i64::from(date.day())
}

fn midnight(date: Option<Date>) -> Option<DateTime> {
    date.map(|date| date.at(0, 0, 0, 0))
}

fn at(second: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(second.unsigned_abs())
}

#[cfg(test)]
#[expect(clippy::unreadable_literal, reason = "they are dates")]
mod tests {
    use super::*;
    use BudgetPeriod::{Day, FiveHours, Hour, Month, Total, Week};

    fn of(period: BudgetPeriod, zone: &str, moment: &str) -> (i64, Option<String>) {
        let wall = at(moment.parse::<Timestamp>().unwrap().as_second());
        let Period { number, ends } = Period::of(period, &TimeZone::get(zone).unwrap(), wall, None);
        (number, ends.map(|ends| Timestamp::try_from(ends).unwrap().to_string()))
    }

    #[test]
    fn each_period_has_a_number_and_an_end() {
        let monday = "2026-11-30T07:12:00Z";
        for (period, zone, number, ends) in [
            (Hour, "UTC", 2026113007, "2026-11-30T08:00:00Z"),
            (Hour, "Asia/Kolkata", 2026113012, "2026-11-30T07:30:00Z"),
            (Day, "UTC", 20261130, "2026-12-01T00:00:00Z"),
            (Day, "America/Los_Angeles", 20261129, "2026-11-30T08:00:00Z"),
            (Week, "UTC", 20261130, "2026-12-07T00:00:00Z"),
            (Week, "America/Los_Angeles", 20261123, "2026-11-30T08:00:00Z"),
            (Month, "Asia/Shanghai", 202611, "2026-11-30T16:00:00Z"),
            (FiveHours, "UTC", 1_796_022_720, "2026-11-30T12:12:00Z"),
        ] {
            assert_eq!(of(period, zone, monday), (number, Some(ends.to_owned())), "{period:?} {zone}");
        }
        assert_eq!(of(Total, "UTC", monday), (0, None));
        assert_eq!(of(Month, "UTC", "2026-12-31T23:59:59Z"), (202612, Some("2027-01-01T00:00:00Z".to_owned())));
    }

    #[test]
    fn an_hour_that_comes_twice_is_one_period() {
        let first = of(Hour, "Europe/Berlin", "2026-10-25T00:30:00Z");
        let second = of(Hour, "Europe/Berlin", "2026-10-25T01:30:00Z");
        assert_eq!((first.0, second.0), (2026102502, 2026102502));
        assert_eq!(second.1.as_deref(), Some("2026-10-25T02:00:00Z"));
    }

    #[test]
    fn five_hours_begin_with_the_first_request_behind_the_last_ones() {
        let at = |second: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(second);
        let number = |second: u64, latest| Period::of(FiveHours, &TimeZone::UTC, at(second), latest).number;
        assert_eq!(number(1000, None), 1000);
        assert_eq!(number(1000 + 5 * 3600 - 1, Some(1000)), 1000);
        assert_eq!(number(1000 + 5 * 3600, Some(1000)), 1000 + 5 * 3600);
        assert_eq!(number(999, Some(1000)), 999, "the clock has been put back");
    }
}
