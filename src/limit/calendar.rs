//! Calendar days in a time zone: the day of a moment, and its end.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan as _};

/// Margin around the turn of the day. An attempt within it counts in both days, since the endpoint's clock may differ.
const TURN_MARGIN: Duration = Duration::from_secs(1);
/// Assumed time to the end of the day if the calendar has no next day. Any value would do.
const NO_TOMORROW: Duration = Duration::from_hours(1);

/// Calendar of a time zone. The day is computed when it changes or when the clock is set, not for each request.
#[derive(Debug)]
pub struct Calendar {
    zone: TimeZone,
    today: ArcSwapOption<Today>,
}

#[derive(Clone, Copy, Debug)]
struct Today {
    date: Date,
    begins: SystemTime,
    ends: SystemTime,
    /// Period in which an attempt counts in this day only.
    only: (SystemTime, SystemTime),
}

/// Days that an attempt counts in: one, or two at the turn of the day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Days {
    /// The day, or the earlier of two.
    pub first: Date,
    /// The day, or the later of two.
    pub last: Date,
}

impl Days {
    /// True if an attempt that was counted in these days needs no other days.
    pub fn cover(&self, other: &Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    /// Returns each day once.
    pub fn each(self) -> impl Iterator<Item = Date> {
        std::iter::once(self.first).chain((self.last != self.first).then_some(self.last))
    }
}

impl Calendar {
    /// Returns the calendar of a time zone.
    pub fn new(zone: TimeZone) -> Self {
        Self { zone, today: ArcSwapOption::empty() }
    }

    /// Returns the days that an attempt at this moment counts in.
    pub fn days(&self, wall: SystemTime) -> Days {
        let Today { date, begins, ends, only } = self.today(wall);
        if only.0 <= wall && wall < only.1 {
            return Days { first: date, last: date };
        }
        let is_near = |moment: SystemTime| {
            let apart = wall.duration_since(moment).unwrap_or_else(|before| before.duration());
            apart < TURN_MARGIN
        };
        if is_near(ends) {
            Days { first: date, last: date.tomorrow().unwrap_or(date) }
        } else if is_near(begins) {
            Days { first: date.yesterday().unwrap_or(date), last: date }
        } else {
            Days { first: date, last: date }
        }
    }

    /// True if an attempt that was counted at one moment needs no other days at another.
    pub fn covers(&self, counted: SystemTime, now: SystemTime) -> bool {
        let (begins, ends) = self.today(now).only;
        let is_within = |moment: SystemTime| begins <= moment && moment < ends;
        is_within(counted) && is_within(now) || self.days(counted).cover(&self.days(now))
    }

    /// Returns the first moment at which an attempt no longer counts in this day.
    pub fn clear_of(&self, date: Date) -> SystemTime {
        let ends = date.checked_add(1.day()).ok().and_then(|next| self.begin_of(next));
        // No day has more than 25 hours.
        let last = || self.begin_of(date).unwrap_or(SystemTime::UNIX_EPOCH) + Duration::from_hours(25);
        ends.unwrap_or_else(last) + TURN_MARGIN
    }

    /// Returns today, and the first moment at which an attempt no longer counts in it.
    pub fn today_and_clear(&self, wall: SystemTime) -> (Date, SystemTime) {
        let Today { date, ends, .. } = self.today(wall);
        (date, ends + TURN_MARGIN)
    }

    /// Returns the moment at which a day begins.
    pub fn begin_of(&self, date: Date) -> Option<SystemTime> {
        // Midnight, or the first moment after it if the clocks go forward at midnight.
        date.to_zoned_datetime(self.zone.clone()).ok()?.start_of_day().ok().map(|zoned| wall_clock(zoned.timestamp()))
    }

    /// Returns the day of a moment.
    pub fn date(&self, wall: SystemTime) -> Date {
        self.today(wall).date
    }

    /// Returns the name of the time zone; `None` if it has none.
    pub fn zone_name(&self) -> Option<&str> {
        self.zone.iana_name()
    }

    fn today(&self, wall: SystemTime) -> Today {
        match self.today.load().as_deref() {
            Some(today) if (today.begins..today.ends).contains(&wall) => *today,
            _ => {
                let today = self.work_out(wall);
                self.today.store(Some(Arc::new(today)));
                today
            }
        }
    }

    fn work_out(&self, wall: SystemTime) -> Today {
        let date = Timestamp::try_from(wall).unwrap_or_default().to_zoned_datetime(self.zone.clone()).date();
        let next = date.tomorrow().ok().and_then(|next| self.begin_of(next));
        let (begins, ends) = (self.begin_of(date).unwrap_or(wall), next.unwrap_or(wall + NO_TOMORROW));
        Today { date, begins, ends, only: (begins + TURN_MARGIN, ends - TURN_MARGIN) }
    }
}

fn wall_clock(timestamp: Timestamp) -> SystemTime {
    // Days begin at whole milliseconds in every time zone.
    let millis = timestamp.as_millisecond();
    let since_1970 = Duration::from_millis(millis.unsigned_abs());
    if millis < 0 { SystemTime::UNIX_EPOCH - since_1970 } else { SystemTime::UNIX_EPOCH + since_1970 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::civil::date;

    fn wall(text: &str) -> SystemTime {
        wall_clock(text.parse().unwrap())
    }

    fn days(zone: &str, moment: &str) -> (String, String) {
        let days = Calendar::new(TimeZone::get(zone).unwrap()).days(wall(moment));
        (days.first.to_string(), days.last.to_string())
    }

    fn both(day: &str) -> (String, String) {
        (day.into(), day.into())
    }

    #[test]
    fn the_day_turns_at_midnight_of_the_zone_also_when_clocks_change() {
        let calendar = Calendar::new(TimeZone::get("Europe/Berlin").unwrap());
        let hours = |day: Date| {
            let ends = calendar.clear_of(day) - TURN_MARGIN;
            ends.duration_since(calendar.begin_of(day).unwrap()).unwrap().as_secs() / 3600
        };
        assert_eq!(hours(date(2026, 3, 29)), 23, "summer time begins");
        assert_eq!(hours(date(2026, 10, 25)), 25, "and ends");
        assert_eq!(calendar.date(wall("2026-03-28T23:00:00Z")), date(2026, 3, 29));
        assert_eq!(calendar.date(wall("2026-03-28T22:59:59Z")), date(2026, 3, 28), "a clock set back");
        assert_eq!(calendar.date(wall("2026-03-29T22:00:00Z")), date(2026, 3, 30));
        assert_eq!(calendar.date(wall("2026-10-25T22:59:59Z")), date(2026, 10, 25), "the 25th hour");
    }

    #[test]
    fn an_endpoint_may_live_in_another_zone() {
        assert_eq!(days("America/Los_Angeles", "2026-11-25T07:59:00Z"), both("2026-11-24"));
        assert_eq!(days("America/Los_Angeles", "2026-11-25T08:00:02Z"), both("2026-11-25"));
        assert_eq!(days("UTC", "2026-11-25T07:59:00Z"), both("2026-11-25"));
    }

    #[test]
    fn midnight_may_not_exist() {
        // The clocks in Santiago went from 24:00 to 01:00.
        let calendar = Calendar::new(TimeZone::get("America/Santiago").unwrap());
        assert_eq!(calendar.begin_of(date(2026, 9, 6)), Some(wall("2026-09-06T04:00:00Z")));
        assert_eq!(calendar.date(wall("2026-09-06T03:59:59Z")), date(2026, 9, 5));
    }

    #[test]
    fn around_the_turn_an_attempt_counts_in_both_days() {
        let turn = ("2026-11-24".to_owned(), "2026-11-25".to_owned());
        assert_eq!(days("UTC", "2026-11-24T23:59:59Z"), both("2026-11-24"));
        assert_eq!(days("UTC", "2026-11-24T23:59:59.001Z"), turn);
        assert_eq!(days("UTC", "2026-11-25T00:00:00.999Z"), turn);
        assert_eq!(days("UTC", "2026-11-25T00:00:01Z"), both("2026-11-25"));
        assert_eq!(Calendar::new(TimeZone::UTC).clear_of(date(2026, 11, 24)), wall("2026-11-25T00:00:01Z"));
    }
}
