//! Times as people type and read them.

use std::time::Duration;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, ZonedDateTime};

/// A time such as 24h, 7d, 90m or 0s.
pub(super) fn parse_time(text: &str) -> Result<Duration, String> {
    let span: Span = text.parse().map_err(|_| format!("{text:?} is no time such as 24h, 7d or 0s"))?;
    let seconds = span.total((jiff::Unit::Second, jiff::SpanRelativeTo::days_are_24_hours()));
    seconds
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| format!("{text:?} is no time such as 24h, 7d or 0s"))
}

/// A moment, such as 2027-03-31T18:00:00Z, a day's beginning here, or a time ago such as 1h.
pub(super) fn parse_since(text: &str) -> Result<Timestamp, String> {
    if let Ok(moment) = text.parse() {
        return Ok(moment);
    }
    if let Ok(day) = text.parse::<Date>() {
        return TimeZone::system().to_timestamp(day.at(0, 0, 0, 0)).map_err(|error| error.to_string());
    }
    let ago = parse_time(text).map_err(|_| {
        format!("{text:?} is no time ago such as 1h or 7d, no day such as 2027-03-31, no moment such as 2027-03-31T18:00:00Z")
    })?;
    Timestamp::now().checked_sub(ago).map_err(|error| error.to_string())
}

/// A moment as people say it: with its date only if that is another.
pub(super) fn moment(at: Timestamp, now: &ZonedDateTime) -> String {
    let at = at.to_zoned_datetime(now.time_zone().clone());
    let form = if at.date() == now.date() { "%H:%M:%S" } else { "%Y-%m-%d %H:%M:%S" };
    at.strftime(form).to_string()
}

/// Milliseconds as people say them.
pub(super) fn millis(ms: f64) -> String {
    match ms {
        ..10.0 => format!("{ms:.1} ms"),
        ..1000.0 => format!("{ms:.0} ms"),
        _ => format!("{:.1} s", ms / 1000.0),
    }
}
