//! `api-together log`: requests of the request log, read from its file beside the running process, or without one.

mod printer;
mod words;

use std::fmt::Write as _;
use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use anstream::stdout;
use clap::Args;
use jiff::{Timestamp, ZonedDateTime};

use super::files::ConfigFile;
use super::times::parse_since;
use crate::config::{self, Environment, Flags};
use crate::request_log::logged::LoggedBody;
use crate::request_log::reader::{Filter, From, Reader, StatusWanted};
use crate::server::runtime_folder::Found;
use printer::{Printer, escaped};
use words::{described, printable};

/// Time between two looks of `--follow`.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(250);
/// Requests that are read at once.
const READ_AT_ONCE: usize = 500;

/// What is shown of the log.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "flags, each of its own")]
pub(super) struct ShowLog {
    /// Name of the client's key.
    #[arg(long)]
    key: Option<String>,
    /// Endpoint that was asked, the last one or one before it.
    #[arg(long)]
    endpoint: Option<String>,
    /// Model that was asked for.
    #[arg(long)]
    model: Option<String>,
    /// Status that the client got, such as 429, or 5xx for all of a class.
    #[arg(long)]
    status: Option<StatusWanted>,
    /// Session, as the log shows it: 16 hexadecimal digits.
    #[arg(long, value_parser = parse_session)]
    session: Option<u64>,
    /// Only requests whose client got an error or a broken answer; with --endpoint also those whose attempt there failed.
    #[arg(long)]
    failed: bool,
    /// Only requests that ended since then: a time ago such as 1h or 7d, a day, or a moment such as 2027-03-31T18:00:00Z.
    #[arg(long, value_parser = parse_since)]
    since: Option<Timestamp>,
    /// Only requests that ended before then, likewise.
    #[arg(long, value_parser = parse_since)]
    until: Option<Timestamp>,
    /// The newest so many requests; 0 for all [default: 50, or all with --since].
    #[arg(long, short = 'n', value_name = "COUNT")]
    limit: Option<usize>,
    /// Go on with requests that end from now on.
    #[arg(long, short, conflicts_with_all = ["until", "id"])]
    follow: bool,
    /// Print one JSON object a line.
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    /// Print comma-separated values, without attempts.
    #[arg(long)]
    csv: bool,
    /// One request with all that is known of it: its attempts, who was passed over and why, and its bodies, if they are kept.
    #[arg(conflicts_with_all = ["key", "endpoint", "model", "status", "session", "failed", "since", "until", "limit", "csv"])]
    id: Option<String>,
}

impl ShowLog {
    fn filter(&self) -> Filter {
        let Self { key, endpoint, model, status, session, failed, since, until, .. } = self;
        Filter {
            key: key.clone(),
            endpoint: endpoint.clone(),
            model: model.clone(),
            status: *status,
            failed: *failed,
            session: *session,
            id: None,
            since: since.map(Timestamp::as_millisecond),
            until: until.map(Timestamp::as_millisecond),
        }
    }

    fn limit(&self) -> usize {
        const LIMIT_DEFAULT: usize = 50;
        match self.limit {
            Some(0) => usize::MAX,
            Some(limit) => limit,
            None if self.since.is_some() => usize::MAX,
            None => LIMIT_DEFAULT,
        }
    }
}

fn parse_session(text: &str) -> Result<u64, String> {
    u64::from_str_radix(text, 16).map_err(|_| format!("{text:?} is no session, which has 16 hexadecimal digits"))
}

/// Shows the log.
pub(super) fn show(file: &ConfigFile, asked: &ShowLog) -> Result<(), String> {
    let path = path(file)?;
    let shown = match &asked.id {
        Some(id) => show_one(&mut Reader::open(&path)?, id, asked.json),
        None => show_all(&path, asked),
    };
    match shown {
        Ok(()) => Ok(()),
        // Nobody reads any more, as behind `| head`.
        Err(LogError::Output(error)) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        Err(LogError::Output(error)) => Err(format!("the log cannot be printed: {error}")),
        Err(LogError::Log(why)) => Err(why),
    }
}

enum LogError {
    Output(std::io::Error),
    Log(String),
}

impl std::convert::From<std::io::Error> for LogError {
    fn from(error: std::io::Error) -> Self {
        Self::Output(error)
    }
}

impl std::convert::From<String> for LogError {
    fn from(why: String) -> Self {
        Self::Log(why)
    }
}

/// The file: the running process's, or else the config's.
fn path(file: &ConfigFile) -> Result<PathBuf, String> {
    let folders = file.runtime_folders();
    if let Some(Found { running, .. }) = Found::look(&folders)? {
        let off = || format!("{} logs no requests (server.requestLog)", running.shown());
        return running.request_log.clone().ok_or_else(off);
    }
    let environment = Environment::from_process(&file.path, &Flags::default());
    let config = config::load(&file.path, &environment).map_err(|problems| problems.to_string())?.config;
    let log = config.server.request_log.ok_or("requests are not logged (server.requestLog.enabled is false)")?;
    match (file.state_folder(), log.path.file_name()) {
        // Of the packaged service, which alone knows its folder.
        (Some(state), Some(name)) if !log.path.exists() => Ok(state.join(name)),
        _ => Ok(log.path),
    }
}

fn show_all(path: &std::path::Path, asked: &ShowLog) -> Result<(), LogError> {
    let filter = asked.filter();
    let mut printer = Printer::new(asked);
    let mut reader = Reader::open(path)?;
    let newest = reader.page(&Filter::default(), From::Newest, 1)?.requests.first().map_or(0, |newest| newest.row);
    // The newest of them are looked for from the end, and shown from the beginning.
    let (mut rows, mut from) = (Vec::new(), From::Before(newest.saturating_add(1)));
    while rows.len() < asked.limit() {
        let count = READ_AT_ONCE.min(asked.limit() - rows.len());
        let page = reader.page(&filter, from, count)?;
        rows.extend(page.requests.iter().map(|request| request.row));
        match page.next {
            Some(next) => from = From::Before(next),
            None => break,
        }
    }
    for chunk in rows.rchunks(READ_AT_ONCE) {
        let requests = chunk.iter().rev().filter_map(|row| reader.row(*row).transpose());
        printer.print(&requests.collect::<Result<Vec<_>, _>>()?)?;
    }
    if rows.is_empty() && !asked.follow {
        return printer.print_none();
    }
    let mut last = newest;
    if !asked.follow {
        return Ok(());
    }
    loop {
        std::thread::sleep(FOLLOW_INTERVAL);
        // Opened anew each time: the file may have been begun anew, and nothing is to keep its process from tidying it.
        let page = Reader::open(path).and_then(|mut reader| reader.page(&filter, From::After(last), READ_AT_ONCE));
        let page = match page {
            Ok(page) => page,
            Err(error) => {
                eprintln!("{error}; it is tried again");
                continue;
            }
        };
        printer.print(&page.requests)?;
        last = match page.requests.last() {
            Some(request) if page.requests.len() == READ_AT_ONCE => request.row,
            // A new file, which is shown from its beginning.
            _ if page.searched_to < last => 0,
            _ => page.searched_to,
        };
    }
}

fn show_one(reader: &mut Reader, id: &str, as_json: bool) -> Result<(), LogError> {
    let request = reader.request(id)?.ok_or_else(|| format!("the log has no request {id}"))?;
    let [body, answer] = reader.bodies(request.row)?;
    if as_json {
        let mut value = serde_json::to_value(&request).map_err(|error| error.to_string())?;
        if let Some(members) = value.as_object_mut() {
            for (name, body) in [("requestBody", &body), ("answerBody", &answer)] {
                members.insert(name.to_owned(), body.as_ref().map(LoggedBody::shown).into());
            }
        }
        writeln!(stdout(), "{}", escaped(&format!("{value:#}")))?;
        return Ok(());
    }
    let mut text = described(&request, &ZonedDateTime::now());
    for (name, body) in [("its body", body), ("the answer's body", answer)] {
        if let Some(body) = body {
            writeln!(text, "\n{name}, {} bytes:\n{}", body.length, printable(&body.shown())).unwrap_or_default();
        }
    }
    write!(stdout(), "{text}")?;
    Ok(())
}
