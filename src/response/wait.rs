//! How long an endpoint asks to be left alone: in its headers, or in the words of its error. Pure; the wall clock is passed in.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderValue};
use jiff::Timestamp;

/// Longest wait, whatever an endpoint asks for: longer than any daily quota takes to come back.
pub(crate) const WAIT_MAX: Duration = Duration::from_hours(24);

/// Returns the wait that the headers of an error of this status ask for: `retry-after-ms`, else `Retry-After` in seconds or as
/// a date (RFC 9110, 10.2.3), else, of a refusal by a rate limit (429), the reset of one that is used up.
pub(crate) fn in_headers(headers: &HeaderMap, status: u16, now: SystemTime) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let millis = text("retry-after-ms").and_then(|text| seconds(text, 1e-3));
    let asked = millis.or_else(|| {
        let text = text("retry-after")?;
        seconds(text, 1.0).or_else(|| duration(text)).or_else(|| until_date(text, now))
    });
    // Vendors send their resets with every answer, whatever it says.
    let reset = || if status == 429 { of_rate_limits(headers, now) } else { None };
    asked.or_else(reset).map(|wait| wait.min(WAIT_MAX))
}

/// Returns how long nothing is left of a rate limit, by the headers of a good answer: of one that says how much is left.
pub(crate) fn until_room(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    resets(headers, now, |remaining| remaining.is_some_and(is_zero))
        .filter(|wait| !wait.is_zero())
        .map(|wait| wait.min(WAIT_MAX))
}

/// Time until the rate limits that are used up are reset. One that is not used up did not refuse the request.
fn of_rate_limits(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    resets(headers, now, |remaining| remaining.is_none_or(is_zero))
}

fn is_zero(value: &HeaderValue) -> bool {
    value.to_str().is_ok_and(|text| text.trim() == "0")
}

/// Longest time until the reset of the rate limits whose rest is as it is asked for. Vendors name each limit's rest and reset alike:
/// `x-ratelimit-remaining-tokens` and `x-ratelimit-reset-tokens`, `anthropic-ratelimit-tokens-remaining` and
/// `anthropic-ratelimit-tokens-reset`.
fn resets(
    headers: &HeaderMap,
    now: SystemTime,
    is_asked_for: impl Fn(Option<&HeaderValue>) -> bool,
) -> Option<Duration> {
    let resets = headers.iter().filter_map(|(name, value)| {
        let name = name.as_str();
        if !name.contains("ratelimit") || !name.contains("reset") {
            return None;
        }
        let remaining = headers.get(name.replace("reset", "remaining"));
        let reset = value.to_str().ok()?.trim();
        is_asked_for(remaining).then(|| moment(reset, now)).flatten()
    });
    resets.max()
}

/// Time until a reset, however it is written: a duration, a date, or a number, which is seconds from now if it is small, else
/// Unix time in seconds or milliseconds.
fn moment(text: &str, now: SystemTime) -> Option<Duration> {
    const SECONDS_MAX: f64 = 1e9;
    const UNIX_SECONDS_MAX: f64 = 1e11;
    let Ok(number) = text.parse::<f64>() else {
        return duration(text).or_else(|| until_date(text, now));
    };
    let wait = if number < SECONDS_MAX {
        Duration::try_from_secs_f64(number).ok()?
    } else {
        let unix = if number < UNIX_SECONDS_MAX { number } else { number / 1e3 };
        let at = SystemTime::UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(unix).ok()?)?;
        at.duration_since(now).unwrap_or_default()
    };
    Some(wait)
}

fn until_date(text: &str, now: SystemTime) -> Option<Duration> {
    if let Ok(date) = httpdate::parse_http_date(text) {
        return Some(date.duration_since(now).unwrap_or_default());
    }
    let date = text.parse::<Timestamp>().ok()?;
    let wait = date.duration_since(Timestamp::try_from(now).ok()?);
    Some(Duration::try_from(wait).unwrap_or_default())
}

fn seconds(text: &str, unit: f64) -> Option<Duration> {
    let value: f64 = text.parse().ok()?;
    Duration::try_from_secs_f64(value * unit).ok()
}

/// Reads a duration such as `2m59.5s`, `250ms`, `1h0m0s`, `7 minutes`, `20 seconds`.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    let (duration, rest) = leading_duration(text)?;
    rest.trim().is_empty().then_some(duration)
}

/// Reads the duration that a text begins with, and returns what follows it.
fn leading_duration(text: &str) -> Option<(Duration, &str)> {
    let mut total = None;
    let mut rest = text.trim_start();
    loop {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        // A full stop behind the last unit ends the sentence.
        let Ok(number) = rest.get(..digits)?.trim_end_matches('.').parse::<f64>() else { break };
        let after = rest.get(digits..)?.trim_start();
        let letters = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
        let unit = match after.get(..letters)? {
            "ms" | "millisecond" | "milliseconds" => 1e-3,
            "s" | "sec" | "secs" | "second" | "seconds" => 1.0,
            "m" | "min" | "mins" | "minute" | "minutes" => 60.0,
            "h" | "hr" | "hour" | "hours" => 3600.0,
            "d" | "day" | "days" => 86_400.0,
            _ => break,
        };
        let part = Duration::try_from_secs_f64(number * unit).ok()?;
        total = Some(total.unwrap_or(Duration::ZERO).checked_add(part)?);
        rest = after.get(letters..)?;
        if !rest.trim_start().starts_with(|c: char| c.is_ascii_digit()) {
            break;
        }
        rest = rest.trim_start();
    }
    total.map(|total| (total, rest))
}

/// Returns the wait that a message asks for, in one of the wordings that vendors use.
pub(crate) fn in_message(message: &str) -> Option<Duration> {
    const WORDINGS: [&str; 12] = [
        "try again in ",
        "Try again in ",
        "retry after ",
        "Retry after ",
        "retry in ",
        "Retry in ",
        "wait for ",
        "wait ",
        "again after ",
        "reset after ",
        "resets in ",
        "reset in ",
    ];
    let after = |wording: &&str| message.split(*wording).nth(1).and_then(leading_duration);
    WORDINGS.iter().find_map(after).map(|(wait, _)| wait.min(WAIT_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderName;
    use proptest::prelude::*;

    fn wall() -> SystemTime {
        httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap()
    }

    fn asked(pairs: &[(&str, &str)]) -> Option<Duration> {
        asked_by(429, pairs)
    }

    fn asked_by(status: u16, pairs: &[(&str, &str)]) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(HeaderName::try_from(*name).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        in_headers(&headers, status, wall())
    }

    macro_rules! secs {
        ($secs:expr) => {
            Some(Duration::from_secs($secs))
        };
    }

    #[test]
    fn headers_say_how_long() {
        assert_eq!(asked(&[("retry-after-ms", "1500"), ("retry-after", "9")]), Some(Duration::from_millis(1500)));
        assert_eq!(asked(&[("retry-after", "9")]), secs!(9));
        assert_eq!(asked(&[("retry-after", "1m30s")]), secs!(90));
        assert_eq!(asked(&[("retry-after", "Sun, 06 Nov 1994 08:50:07 GMT")]), secs!(30));
        assert_eq!(asked(&[("retry-after", "Sun, 06 Nov 1994 08:00:00 GMT")]), secs!(0));
        for nonsense in ["soon", "-3", "1e300", ""] {
            assert_eq!(asked(&[("retry-after", nonsense)]), None, "{nonsense}");
        }
        assert_eq!(asked(&[("retry-after", "999999999")]), Some(WAIT_MAX));
    }

    #[test]
    fn limits_that_are_used_up_say_when_they_are_reset() {
        let groq = [
            ("x-ratelimit-remaining-requests", "14370"),
            ("x-ratelimit-reset-requests", "2m59.56s"),
            ("x-ratelimit-remaining-tokens", "0"),
            ("x-ratelimit-reset-tokens", "7.66s"),
        ];
        assert_eq!(asked(&groq), Some(Duration::from_millis(7660)));
        let anthropic = [
            ("anthropic-ratelimit-tokens-remaining", "0"),
            ("anthropic-ratelimit-tokens-reset", "1994-11-06T08:50:37Z"),
        ];
        assert_eq!(asked(&anthropic), secs!(60));
        assert_eq!(asked(&[("x-ratelimit-reset", "784111837000")]), secs!(60), "OpenRouter: Unix time in milliseconds");
        assert_eq!(asked(&[("x-ratelimit-reset-after", "20")]), secs!(20));
        assert_eq!(asked(&[("x-ratelimit-reset", "784111000000")]), secs!(0), "it has passed");
        assert_eq!(asked(&[("x-ratelimit-remaining", "5"), ("x-ratelimit-reset", "60")]), None);
        assert_eq!(asked(&[("x-ratelimit-reset", "whenever")]), None);
        assert_eq!(asked_by(500, &anthropic), None, "it is no limit that made it fail");
        assert_eq!(asked_by(503, &[("retry-after", "9")]), secs!(9));
    }

    #[test]
    fn durations_are_read_however_they_are_written() {
        for (text, millis) in [
            ("25s", 25_000),
            ("6m0s", 360_000),
            ("2m59.5s", 179_500),
            ("1h2m3s", 3_723_000),
            ("250ms", 250),
            ("20 seconds", 20_000),
            ("7 minutes", 420_000),
            ("1 hour 5 minutes", 3_900_000),
        ] {
            assert_eq!(duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for none in ["", "s", "5", "5 apples", "1.2.3s", "5s later"] {
            assert_eq!(duration(none), None, "{none}");
        }
    }

    #[test]
    fn messages_say_how_long() {
        for (message, wait) in [
            ("Rate limit reached for gpt-4. Please try again in 20s. Visit …", secs!(20)),
            (
                "Rate limit reached … Please try again in 7m12.5s. Need more tokens?",
                Some(Duration::from_millis(432_500)),
            ),
            ("Please try again in 6ms.", Some(Duration::from_millis(6))),
            ("Requests have exceeded call rate limit. Please retry after 26 seconds.", secs!(26)),
            ("Please retry in 31.5s.", Some(Duration::from_millis(31_500))),
            ("Please wait 42 seconds before retrying.", secs!(42)),
            ("Try again later.", None),
            ("try again in a moment", None),
        ] {
            assert_eq!(in_message(message), wait, "{message}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "\\PC{0,40}|(try again in )?[0-9.msh ]{0,20}") {
            in_message(&text);
            duration(&text);
            moment(&text, wall());
        }
    }
}
