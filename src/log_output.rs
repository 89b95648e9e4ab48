//! Where log lines go and what they look like: time, level, message, on standard error.

use std::io::{IsTerminal as _, Write as _};

use anstyle::{AnsiColor, Style};
use jiff::Timestamp;
use log::{Level, LevelFilter, Log, Metadata, Record};

/// Without `RUST_LOG`: what we say, and of everybody else only what is wrong.
const DEFAULT_FILTER: &str = "warn,api_together=info";
/// These log request headers, and so keys, at debug and below.
const TALKATIVE: [&str; 5] = ["pingora", "h2", "hyper", "rustls", "reqwest"];

/// Starts logging as `RUST_LOG` says. `framework_debug` lets the framework's own debug lines through, which print keys.
pub fn start(framework_debug: bool) {
    let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| DEFAULT_FILTER.into());
    let coloured = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let logger = env_logger::Builder::new()
        .parse_filters(&filter)
        .format(move |out, record| {
            let style = if coloured { colour(record.level()) } else { Style::new() };
            let time = Timestamp::now();
            writeln!(out, "{time:.3} {style}{:<5}{style:#} {}", record.level(), record.args())
        })
        .build();
    let level = logger.filter();
    let logger = Capped { logger, framework_debug };
    // A second start in one process, as tests do, changes nothing.
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(level);
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

struct Capped {
    logger: env_logger::Logger,
    framework_debug: bool,
}

impl Capped {
    fn is_capped(&self, metadata: &Metadata<'_>) -> bool {
        !self.framework_debug
            && metadata.level() > LevelFilter::Info
            && TALKATIVE.iter().any(|target| metadata.target().starts_with(target))
    }
}

impl Log for Capped {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        !self.is_capped(metadata) && self.logger.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.is_capped(record.metadata()) {
            self.logger.log(record);
        }
    }

    fn flush(&self) {
        self.logger.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_framework_is_capped_at_info_however_it_is_named() {
        let enabled = |framework_debug, target: &str, level| {
            let logger = env_logger::Builder::new().parse_filters("trace,pingora_core::protocols=trace").build();
            Capped { logger, framework_debug }.enabled(&Metadata::builder().target(target).level(level).build())
        };
        assert!(!enabled(false, "pingora_core::protocols::http", Level::Debug));
        assert!(!enabled(false, "h2::codec", Level::Trace));
        assert!(enabled(false, "pingora_proxy", Level::Info));
        assert!(enabled(false, "api_together::proxy", Level::Debug));
        assert!(enabled(true, "h2::codec", Level::Trace));
    }
}
