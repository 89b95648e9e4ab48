//! The log: on standard error, as text (time, level, message) or as one JSON object a line.
//!
//! While the process serves, the lines of requests are written a few milliseconds later by a thread of its own ([`log_writer`]);
//! every other line is written at once, after those that came before it.

use std::cell::Cell;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{IsTerminal as _, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anstyle::{AnsiColor, Style};
use env_logger::Target;
use jiff::Timestamp;
use log::{Level, LevelFilter, Log, Metadata, Record};
use serde_json::json;

use super::log_writer;
use crate::config::{Environment, LogFormat};

/// Default levels: ours are info, those of libraries warnings.
const LEVEL_DEFAULT: &str = "info";
/// These log request headers, and so keys, at debug and below.
const TALKATIVE: [&str; 5] = ["pingora", "h2", "hyper", "rustls", "reqwest"];
/// Beginnings of what the framework calls errors although anybody who reaches the port can cause it, or each upgrade does. They are
/// debug lines of ours.
const ORDINARY: [&str; 8] = [
    "No incoming socket transfer",
    "Downstream handshake",
    "H2 handshake error",
    "HTTP server fails to",
    "failed to send error response to downstream",
    "Error finish sending body to downstream",
    "Fail to proxy",
    "H2 fd:",
];
/// Target of such a line.
const ORDINARY_TARGET: &str = "api_together::server";
/// The target of a request's own line: its message is the members of a JSON object, if lines are JSON.
pub(crate) const REQUEST_TARGET: &str = "api_together::request";
/// Time within which an equal warning is counted instead of logged; the next one shows the number.
const FOLD_TIME: Duration = Duration::from_secs(10);
/// Different warnings that are remembered for it.
const FOLDED_MAX: usize = 64;

static IS_JSON: AtomicBool = AtomicBool::new(false);

/// Sets the format of lines from now on.
pub(crate) fn set_format(format: LogFormat) {
    IS_JSON.store(format == LogFormat::Json, Ordering::Relaxed);
}

/// True if lines are JSON.
pub(crate) fn is_json() -> bool {
    IS_JSON.load(Ordering::Relaxed)
}

/// Starts logging as the variable `RUST_LOG` says, or else `LOG_LEVEL`. `framework_debug` lets the framework's own debug lines
/// through, which print keys.
pub(crate) fn start(environment: &Environment, framework_debug: bool) {
    let (filter, complaint) = filter(|name| environment.value(name).map(str::to_owned));
    let coloured = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let logger = env_logger::Builder::new()
        .parse_filters(&filter)
        .target(Target::Pipe(Box::new(log_writer::LogPipe)))
        .format(move |out, record| {
            let level = record.level();
            let moment = LogTime::new(SystemTime::now());
            if is_json() {
                return writeln!(out, "{}", json_line(moment.as_str(), record));
            }
            out.write_all(&moment.0)?;
            if coloured {
                let style = colour(level);
                write!(out, " {style}{level:<5}{style:#} ")?;
            } else {
                out.write_all(padded(level).as_bytes())?;
            }
            out.write_fmt(*record.args())?;
            out.write_all(b"\n")
        })
        .build();
    let level = logger.filter();
    let logger = Capped { logger, framework_debug, folder: Mutex::default() };
    // A second start in one process, as tests do, changes nothing.
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(level);
    }
    if let Some(complaint) = complaint {
        log::warn!("{complaint}");
    }
}

/// A moment as lines show it, with its milliseconds (RFC 3339, UTC).
#[derive(Clone, Copy)]
struct LogTime([u8; 24]);

/// Part of it that changes once a second.
const SECOND_BYTES: usize = "1970-01-01T00:00:00".len();

thread_local! {
    /// A second of Unix time, and how its moments are written.
    static SECOND: Cell<(u64, LogTime)> = const { Cell::new((u64::MAX, LogTime(*b"1970-01-01T00:00:00.000Z"))) };
}

impl LogTime {
    fn new(time: SystemTime) -> Self {
        let since_1970 = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let (known, mut moment) = SECOND.get();
        if known != since_1970.as_secs() {
            let begins = Timestamp::try_from(SystemTime::UNIX_EPOCH + Duration::from_secs(since_1970.as_secs()));
            let text = begins.unwrap_or_default().strftime("%Y-%m-%dT%H:%M:%S").to_string();
            if let (Some(second), Some(text)) =
                (moment.0.first_chunk_mut::<SECOND_BYTES>(), text.as_bytes().first_chunk::<SECOND_BYTES>())
            {
                *second = *text;
            }
            SECOND.set((since_1970.as_secs(), moment));
        }
        let millis = since_1970.subsec_millis();
        let digit = |value: u32| b'0' + u8::try_from(value % 10).unwrap_or_default();
        let [.., hundreds, tens, ones, _] = &mut moment.0;
        (*hundreds, *tens, *ones) = (digit(millis / 100), digit(millis / 10), digit(millis));
        moment
    }

    fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// `RUST_LOG` as it is; `LOG_LEVEL` is the level of our own lines. Also returns what is wrong with it, if anything is.
fn filter(variable: impl Fn(&str) -> Option<String>) -> (String, Option<String>) {
    if let Some(filter) = variable("RUST_LOG") {
        return (filter, None);
    }
    let (mut level, mut complaint) = (LEVEL_DEFAULT.to_owned(), None);
    if let Some(typed) = variable("LOG_LEVEL") {
        match typed.trim().parse::<LevelFilter>() {
            Ok(known) => level = known.to_string().to_ascii_lowercase(),
            Err(_) => {
                complaint = Some(format!(
                    "LOG_LEVEL is {typed:?}, which is none of error, warn, info, debug, trace and off; {LEVEL_DEFAULT} is used"
                ));
            }
        }
    }
    (format!("warn,api_together={level}"), complaint)
}

fn json_line(time: &str, record: &Record<'_>) -> String {
    let level = record.level().as_str();
    let message = record.args().to_string();
    // One that was made while lines were still text is a message like any other.
    if record.target() == REQUEST_TARGET && message.starts_with('"') {
        return format!(r#"{{"time":"{time}","level":"{level}","event":"request",{message}}}"#);
    }
    json!({ "time": time, "level": level, "event": "message", "target": record.target(), "message": message })
        .to_string()
}

/// A level between its spaces, all of one width.
fn padded(level: Level) -> &'static str {
    match level {
        Level::Error => " ERROR ",
        Level::Warn => " WARN  ",
        Level::Info => " INFO  ",
        Level::Debug => " DEBUG ",
        Level::Trace => " TRACE ",
    }
}

fn colour(level: Level) -> Style {
    let colour = match level {
        Level::Error => AnsiColor::Red,
        Level::Warn => AnsiColor::Yellow,
        Level::Info => AnsiColor::Green,
        Level::Debug => AnsiColor::Blue,
        Level::Trace => AnsiColor::Cyan,
    };
    colour.on_default()
}

/// Warnings and errors of late.
#[derive(Default)]
struct Folder(HashMap<u64, Folded>);

struct Folded {
    since: Instant,
    more: u64,
}

/// Treatment of a line.
#[derive(Debug, PartialEq, Eq)]
enum Fold {
    /// It is written; so many like it were not before it.
    Write(u64),
    /// It is counted.
    Count,
}

impl Folder {
    fn fold(&mut self, text: &str, now: Instant) -> Fold {
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        let key = hasher.finish();
        if let Some(folded) = self.0.get_mut(&key) {
            if now.saturating_duration_since(folded.since) < FOLD_TIME {
                folded.more += 1;
                return Fold::Count;
            }
            folded.since = now;
            return Fold::Write(std::mem::take(&mut folded.more));
        }
        if self.0.len() >= FOLDED_MAX {
            // What was counted of them is lost only if nothing like it comes again.
            self.0.retain(|_, folded| now.saturating_duration_since(folded.since) < FOLD_TIME);
        }
        if self.0.len() < FOLDED_MAX {
            self.0.insert(key, Folded { since: now, more: 0 });
        }
        Fold::Write(0)
    }
}

struct Capped {
    logger: env_logger::Logger,
    framework_debug: bool,
    folder: Mutex<Folder>,
}

impl Capped {
    fn is_capped(&self, metadata: &Metadata<'_>) -> bool {
        !self.framework_debug
            && metadata.level() > LevelFilter::Info
            && TALKATIVE.iter().any(|target| metadata.target().starts_with(target))
    }

    /// Returns the words of a framework's error that is none.
    fn ordinary(record: &Record<'_>) -> Option<String> {
        if record.level() != Level::Error || !record.target().starts_with("pingora") {
            return None;
        }
        let text = record.args().to_string();
        ORDINARY.iter().any(|begins| text.starts_with(begins)).then_some(text)
    }

    fn write_folded(&self, record: &Record<'_>) {
        let text = record.args().to_string();
        let fold = self.folder.lock().unwrap_or_else(PoisonError::into_inner).fold(&text, Instant::now());
        match fold {
            Fold::Count => {}
            Fold::Write(0) => self.logger.log(record),
            Fold::Write(more) => {
                self.logger.log(
                    &Record::builder()
                        .metadata(record.metadata().clone())
                        .args(format_args!("{text} (and {more} more times since it was last logged)"))
                        .build(),
                );
            }
        }
    }
}

impl Log for Capped {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        !self.is_capped(metadata) && self.logger.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if self.is_capped(record.metadata()) {
            return;
        }
        if let Some(text) = Self::ordinary(record) {
            let mut line = Record::builder();
            line.level(Level::Debug).target(ORDINARY_TARGET);
            return self.logger.log(&line.args(format_args!("{text}")).build());
        }
        // Lines of requests are all different, and each is wanted.
        if record.level() <= Level::Warn && record.target() != REQUEST_TARGET && self.logger.matches(record) {
            self.write_folded(record);
        } else {
            self.logger.log(record);
        }
        if record.target() != REQUEST_TARGET {
            self.flush();
        }
    }

    fn flush(&self) {
        log_writer::flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_rfc_3339_says() {
        let now = |millis| LogTime::new(SystemTime::UNIX_EPOCH + Duration::from_millis(millis)).as_str().to_owned();
        assert_eq!(now(1_795_608_000_007), "2026-11-25T12:00:00.007Z");
        assert_eq!(now(1_795_608_000_999), "2026-11-25T12:00:00.999Z");
        assert_eq!(now(1_795_607_999_999), "2026-11-25T11:59:59.999Z", "a clock that is set back");
    }

    #[test]
    fn the_framework_is_capped_at_info_however_it_is_named() {
        let enabled = |framework_debug, target: &str, level| {
            let logger = env_logger::Builder::new().parse_filters("trace,pingora_core::protocols=trace").build();
            Capped { logger, framework_debug, folder: Mutex::default() }
                .enabled(&Metadata::builder().target(target).level(level).build())
        };
        assert!(!enabled(false, "pingora_core::protocols::http", Level::Debug));
        assert!(!enabled(false, "h2::codec", Level::Trace));
        assert!(enabled(false, "pingora_proxy", Level::Info));
        assert!(enabled(false, "api_together::proxy", Level::Debug));
        assert!(enabled(true, "h2::codec", Level::Trace));
    }

    #[test]
    fn levels_come_from_either_variable() {
        let of = |set: &[(&str, &str)]| {
            filter(|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
        };
        let plain = |filter: &str| (filter.to_owned(), None);
        assert_eq!(of(&[]), plain("warn,api_together=info"));
        assert_eq!(of(&[("LOG_LEVEL", " DEBUG")]), plain("warn,api_together=debug"));
        assert_eq!(of(&[("LOG_LEVEL", "verbos"), ("RUST_LOG", "error")]), plain("error"));
        let (filter, complaint) = of(&[("LOG_LEVEL", "verbos")]);
        assert_eq!(filter, "warn,api_together=info");
        assert!(complaint.unwrap().contains("\"verbos\""));
    }

    #[test]
    fn a_line_of_json_is_an_object() {
        let line = |target: &str, message: &str| {
            let text = json_line(
                "now",
                &Record::builder().target(target).level(Level::Warn).args(format_args!("{message}")).build(),
            );
            serde_json::from_str::<serde_json::Value>(&text).unwrap()
        };
        let plain = line("api_together::routing::pool", "a \"quoted\"\nline");
        assert_eq!((&plain["level"], &plain["message"]), (&json!("WARN"), &json!("a \"quoted\"\nline")));
        let request = line(REQUEST_TARGET, r#""id":"x","status":200"#);
        assert_eq!(
            (&request["event"], &request["id"], &request["status"]),
            (&json!("request"), &json!("x"), &json!(200))
        );
    }

    #[test]
    fn what_anybody_can_cause_is_no_error() {
        let ordinary = |target: &str, level, text: &str| {
            Capped::ordinary(&Record::builder().target(target).level(level).args(format_args!("{text}")).build())
                .is_some()
        };
        let transfer = "No incoming socket transfer, sleep 1s and try again";
        assert!(ordinary("pingora_core::server::transfer_fd", Level::Error, transfer));
        assert!(ordinary("pingora_core::apps", Level::Error, "H2 handshake error  HandshakeError"));
        assert!(!ordinary("pingora_core::server", Level::Error, "Bootstrap failed on error"));
        assert!(!ordinary("api_together::server", Level::Error, transfer));
    }

    #[test]
    fn a_burst_of_equal_warnings_is_one() {
        let (mut folder, begun) = (Folder::default(), Instant::now());
        let mut fold = |text: &str, seconds| folder.fold(text, begun + Duration::from_secs(seconds));
        assert_eq!(fold("a", 0), Fold::Write(0));
        assert_eq!((fold("a", 1), fold("b", 1), fold("a", 9)), (Fold::Count, Fold::Write(0), Fold::Count));
        assert_eq!((fold("a", 10), fold("a", 11), fold("b", 11)), (Fold::Write(2), Fold::Count, Fold::Write(0)));
        for number in 0..1000 {
            assert_eq!(fold(&number.to_string(), 12), Fold::Write(0), "more than are remembered are all written");
        }
        assert!(folder.0.len() <= FOLDED_MAX);
    }
}
