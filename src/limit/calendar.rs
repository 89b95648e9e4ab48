//! Which day it is, and when it ends, in a time zone.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwapOption;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ZonedDateTime};

use super::Clock;

/// A time zone's calendar. The day is worked out when it turns, or when the clock is set, and not for every request.
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
}

impl Calendar {
    /// The calendar of a time zone.
    pub fn new(zone: TimeZone) -> Self {
        Self { zone, today: ArcSwapOption::empty() }
    }

    /// Both clocks, read together.
    pub fn clock(&self, now: Instant, wall: SystemTime) -> Clock {
        let today = self.today(wall);
        let day_left = today.ends.duration_since(wall).unwrap_or_default();
        Clock { now, date: today.date, day_left }
    }

    fn today(&self, wall: SystemTime) -> Today {
        match self.today.load().as_deref() {
            Some(today) if (today.begins..today.ends).contains(&wall) => *today,
            _ => {
                let today = work_out(&self.zone, wall);
                self.today.store(Some(Arc::new(today)));
                today
            }
        }
    }
}

fn work_out(zone: &TimeZone, wall: SystemTime) -> Today {
    let now = Timestamp::try_from(wall).unwrap_or_default().to_zoned_datetime(zone.clone());
    let moment = |zoned: Result<ZonedDateTime, jiff::Error>| zoned.ok().map(|zoned| wall_clock(zoned.timestamp()));
    Today {
        date: now.date(),
        begins: moment(now.start_of_day()).unwrap_or(wall),
        // At the end of the calendar there is no tomorrow; an hour from now is as good.
        ends: moment(now.tomorrow().and_then(|tomorrow| tomorrow.start_of_day()))
            .unwrap_or(wall + Duration::from_hours(1)),
    }
}

fn wall_clock(timestamp: Timestamp) -> SystemTime {
    let seconds = u64::try_from(timestamp.as_second()).unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wall(text: &str) -> SystemTime {
        wall_clock(text.parse().unwrap())
    }

    #[test]
    fn the_day_turns_at_midnight_of_the_zone_also_when_clocks_change() {
        let calendar = Calendar::new(TimeZone::get("Europe/Berlin").unwrap());
        let clock = |text| {
            let clock = calendar.clock(Instant::now(), wall(text));
            (clock.date.to_string(), clock.day_left)
        };
        // Summer time begins on this day, which has 23 hours.
        assert_eq!(clock("2026-03-28T23:00:00Z"), ("2026-03-29".into(), Duration::from_hours(23)));
        assert_eq!(clock("2026-03-28T22:59:59Z"), ("2026-03-28".into(), Duration::from_secs(1)), "a clock set back");
        assert_eq!(clock("2026-03-29T22:00:00Z"), ("2026-03-30".into(), Duration::from_hours(24)));
        // And ends on this one, which has 25.
        assert_eq!(clock("2026-10-24T22:00:00Z"), ("2026-10-25".into(), Duration::from_hours(25)));
    }
}
