//! Requests: those of the request log, and those that are under way.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use super::{Request, invalid, shown};
use crate::exchange::running::{Progress, RunningRequest};
use crate::fault::{Fault, excerpt};
use crate::request_log::logged::{Logged, LoggedBody};
use crate::request_log::reader::{Filter, From, PAGE_MAX, Reader, StatusWanted};

/// Requests of a page, unless said otherwise.
const PAGE_DEFAULT: usize = 50;

pub(super) async fn search(request: &Request<'_>) -> Result<Value, Fault> {
    let moment = |name: &str| -> Result<Option<i64>, Fault> {
        Ok(request.parsed::<Timestamp>(name, "a moment such as 2027-03-31T18:00:00Z")?.map(Timestamp::as_millisecond))
    };
    let session = request.parameter("session").map(|text| u64::from_str_radix(&text, 16));
    let filter = Filter {
        key: request.parameter("key"),
        endpoint: request.parameter("endpoint"),
        model: request.parameter("model"),
        status: request.parsed::<StatusWanted>("status", "a status such as 429, or a class such as 5xx")?,
        failed: request.parsed::<bool>("failed", "true or false")?.unwrap_or_default(),
        session: session.transpose().map_err(|_| invalid("The parameter session has to be 16 hexadecimal digits."))?,
        id: request.parameter("id"),
        since: moment("since")?,
        until: moment("until")?,
    };
    let before = request.parsed::<i64>("before", "the `next` of the page before")?;
    let from = before.map_or(From::Newest, From::Before);
    let count = request.parsed::<usize>("limit", "a number")?.unwrap_or(PAGE_DEFAULT).clamp(1, PAGE_MAX);
    let page = read(request, move |log| log.page(&filter, from, count)).await?;
    shown(&RequestsPage { data: page.requests, next: page.next })
}

pub(super) async fn one(request: &Request<'_>) -> Result<Value, Fault> {
    let id = request.name.to_owned();
    let row = request.parsed::<i64>("row", "the `row` of a request")?;
    let found = read(request, move |log| {
        let found = match row {
            // Clients choose ids, so there may be several of one.
            Some(row) => log.row(row)?.filter(|found| found.id == id),
            None => log.request(&id)?,
        };
        let Some(found) = found else { return Ok(None) };
        let bodies = log.bodies(found.row)?;
        Ok(Some((found, bodies)))
    });
    let Some((found, [body, answer])) = found.await? else {
        return Err(Fault::AdminNotFound { what: format!("request {} in the log", excerpt(request.name)) });
    };
    let shown_of = |body: Option<LoggedBody>| body.as_ref().map(LoggedBody::shown);
    shown(&RequestWhole { request: found, request_body: shown_of(body), answer_body: shown_of(answer) })
}

/// Reads the log beside those who serve requests.
async fn read<T: Send + 'static>(
    request: &Request<'_>,
    read: impl FnOnce(&mut Reader) -> Result<T, String> + Send + 'static,
) -> Result<T, Fault> {
    let problem = |problem: String| Fault::AdminConflict { code: "request_log_unreadable", problem };
    let log = request.from.process.request_log.state();
    let log = log.ok_or_else(|| problem("Requests are not logged (server.requestLog).".to_owned()))?;
    let read = tokio::task::spawn_blocking(move || read(&mut Reader::open(&log.path)?)).await;
    read.map_err(|_| Fault::Internal)?.map_err(|why| problem(format!("{why}.")))
}

pub(super) fn running(request: &Request<'_>) -> Result<Value, Fault> {
    first_running(request, usize::MAX)
}

/// The oldest of them.
pub(super) fn first_running(request: &Request<'_>, most: usize) -> Result<Value, Fault> {
    let all = request.from.process.running.list();
    let data = all.iter().take(most).map(|(number, running)| RunningRow::of(*number, running)).collect();
    shown(&RunningList { data, count: all.len() })
}

/// When the program began to answer such calls, by both clocks: a moment by one of them is one by the other.
static CLOCKS: LazyLock<(Instant, Timestamp)> = LazyLock::new(|| (Instant::now(), Timestamp::now()));

fn wall_clock(at: Instant) -> Timestamp {
    let (instant, moment) = *CLOCKS;
    let span = |duration: Duration| SignedDuration::try_from(duration).unwrap_or_default();
    let moment = match at.checked_duration_since(instant) {
        Some(later) => moment.checked_add(span(later)),
        None => moment.checked_sub(span(instant.saturating_duration_since(at))),
    };
    Timestamp::from_millisecond(moment.unwrap_or_default().as_millisecond()).unwrap_or_default()
}

impl RunningRow {
    fn of(number: u64, running: &RunningRequest) -> Self {
        let RunningRequest { id, came, key, address, method, path, model, stream, exchange: _ } = running;
        let (progress, endpoint, endpoint_key) = running.progress();
        Self {
            number,
            id: id.as_ref().and_then(|id| id.to_str().ok()).map(ToOwned::to_owned),
            began: wall_clock(*came),
            age_ms: u64::try_from(came.elapsed().as_millis()).unwrap_or(u64::MAX),
            key: key.clone(),
            address: address.map(|address| address.to_string()),
            method: method.as_str().to_owned(),
            path: path.to_string(),
            model: model.clone(),
            stream: *stream,
            state: match progress {
                Progress::Queued => "queued",
                Progress::Asked => "asked",
                Progress::Answered => "answered",
            },
            endpoint,
            endpoint_key,
        }
    }
}

/// A page of the request log.
#[derive(Serialize, JsonSchema)]
pub(super) struct RequestsPage {
    data: Vec<Logged>,
    /// What `before` has to be for the next page; null if there is none.
    next: Option<i64>,
}

/// A request with all that is known of it.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct RequestWhole {
    #[serde(flatten)]
    request: Logged,
    /// Its body, if it is kept, with keys masked.
    request_body: Option<String>,
    /// The answer's, likewise.
    answer_body: Option<String>,
}

/// Requests that are under way.
#[derive(Serialize, JsonSchema)]
pub(super) struct RunningList {
    data: Vec<RunningRow>,
    /// Number of them.
    count: usize,
}

/// A request that is under way.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
struct RunningRow {
    /// Its number in this process: clients choose ids.
    number: u64,
    /// Its id.
    id: Option<String>,
    /// When it came.
    #[schemars(with = "String")]
    began: Timestamp,
    /// For how long it has been here, in milliseconds.
    age_ms: u64,
    /// Name of the client's key.
    key: Option<Arc<str>>,
    /// The client's address.
    address: Option<String>,
    method: String,
    path: String,
    /// The model that it asks for.
    model: Option<Arc<str>>,
    /// True if it asks for a stream.
    stream: bool,
    /// `queued`: it waits for a permit; `asked`: an endpoint is asked; `answered`: the answer is on its way.
    state: &'static str,
    /// The endpoint that is asked.
    endpoint: Option<Arc<str>>,
    /// What is shown of the key that it is sent, if it has several.
    endpoint_key: Option<Arc<str>>,
}

/// Ends a request that is under way.
pub(super) async fn cancel(request: &Request<'_>) -> Result<Value, Fault> {
    let number = request.parsed::<u64>("number", "a number")?;
    if request.from.process.running.cancel(request.name, number) == 0 {
        return Err(Fault::AdminNotFound { what: format!("request {} under way", excerpt(request.name)) });
    }
    request.done("requests.cancel", request.name, Ok("cancelled".to_owned())).await
}
