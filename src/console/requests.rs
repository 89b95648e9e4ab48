//! Requests: those of the request log, and those that are under way.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::{Request, invalid};
use crate::exchange::running::{Progress, RunningRequest};
use crate::fault::{Fault, excerpt};
use crate::request_log::reader::{Filter, From, LoggedBody, PAGE_MAX, Reader, StatusWanted};

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
    Ok(json!({ "data": page.requests, "next": page.next }))
}

pub(super) async fn one(request: &Request<'_>) -> Result<Value, Fault> {
    let id = request.name.to_owned();
    let found = read(request, move |log| {
        let Some(found) = log.request(&id)? else { return Ok(None) };
        let bodies = log.bodies(found.row)?;
        Ok(Some((found, bodies)))
    });
    let Some((found, [body, answer])) = found.await? else {
        return Err(Fault::AdminNotFound { what: format!("request {} in the log", excerpt(request.name)) });
    };
    let mut value = serde_json::to_value(found).map_err(|_| Fault::Internal)?;
    if let Some(members) = value.as_object_mut() {
        for (name, body) in [("requestBody", body), ("answerBody", answer)] {
            members.insert(name.to_owned(), body.as_ref().map(LoggedBody::shown).into());
        }
    }
    Ok(value)
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

pub(super) fn running(request: &Request<'_>) -> Value {
    let all = request.from.process.running.list();
    json!({ "data": all.iter().map(|running| shown(running)).collect::<Vec<_>>() })
}

fn shown(running: &RunningRequest) -> Value {
    let RunningRequest { id, came, key, address, method, path, model, stream, exchange: _ } = running;
    let (progress, endpoint, lane) = running.progress();
    let age = came.elapsed();
    let began = Timestamp::now().checked_sub(SignedDuration::try_from(age).unwrap_or_default()).unwrap_or_default();
    json!({
        "id": id.as_ref().and_then(|id| id.to_str().ok()),
        "began": Timestamp::from_millisecond(began.as_millisecond()).unwrap_or_default(),
        "ageMs": u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
        "key": key,
        "address": address,
        "method": method.as_str(),
        "path": path,
        "model": model,
        "stream": stream,
        "state": match progress {
            Progress::Queued => "queued",
            Progress::Asked => "asked",
            Progress::Answered => "answered",
        },
        "endpoint": endpoint,
        "endpointKey": lane,
    })
}

/// Ends a request that is under way.
pub(super) async fn cancel(request: &Request<'_>) -> Result<Value, Fault> {
    if request.from.process.running.cancel(request.name) == 0 {
        return Err(Fault::AdminNotFound { what: format!("request {} under way", excerpt(request.name)) });
    }
    request.done("requests.cancel", request.name, Ok("cancelled".to_owned())).await
}
