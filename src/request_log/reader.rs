//! Reading the log, beside the process that writes it: pages of requests, the newest first, and one request with all of it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::types::{ToSql, Value, ValueRef};
use rusqlite::{Connection, OptionalExtension as _, Row};
use serde::Serialize;

use super::entry::BODY_BYTES_MAX;
use super::logged::{Logged, LoggedAttempt, LoggedBody, Millis};
use super::store::{ATTEMPT_IDS, SCHEMA, explain, number_of};
use crate::database::{self, Unusable};
use crate::fault::reference::CLIENT_GONE;
use crate::usage::prices::NanoUsd;

/// Requests of one page.
pub const PAGE_MAX: usize = 1000;
/// Requests that are looked at for one page. A search that finds fewer than a page among them says so, and goes on from there.
const SEARCHED_MAX: i64 = 1_000_000;
/// Bytes of a kept body's text at most; it may be somewhat longer than the body was, with keys masked.
const TEXT_BYTES_MAX: usize = 4 * BODY_BYTES_MAX;
/// Longest wait for the writer's lock.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(2);

/// Requests that are looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Name of the client's key.
    pub key: Option<String>,
    /// Endpoint that was asked, last or before.
    pub endpoint: Option<String>,
    /// Model that was asked for.
    pub model: Option<String>,
    /// Status, or its hundreds.
    pub status: Option<StatusWanted>,
    /// Those only that failed: their client got an error or a broken answer, or, with `endpoint`, the attempt there failed.
    pub failed: bool,
    /// Hash of the session's name.
    pub session: Option<u64>,
    /// Request id.
    pub id: Option<String>,
    /// Those only that ended at this moment or later, in milliseconds of Unix time.
    pub since: Option<i64>,
    /// Those only that ended before this moment.
    pub until: Option<i64>,
}

/// A status, or all of a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusWanted {
    /// This one.
    One(u16),
    /// Those of these hundreds.
    Class(u16),
}

impl std::str::FromStr for StatusWanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no status such as 429, and no class such as 5xx");
        if let Some(class) = text.strip_suffix("xx") {
            let class = class.parse().ok().filter(|class| (1..=5).contains(class));
            return class.map(Self::Class).ok_or_else(wrong);
        }
        text.parse().ok().filter(|status| (100..600).contains(status)).map(Self::One).ok_or_else(wrong)
    }
}

/// Where a page begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// With the newest.
    Newest,
    /// With the newest of those before this row.
    Before(i64),
    /// With the oldest of those after this row.
    After(i64),
}

/// A page of the log.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Page {
    /// Requests; the newest first, but for those after a row, which are in the order in which they ended.
    pub requests: Vec<Logged>,
    /// Row before which the search goes on; none if there is nothing left to look at.
    pub next: Option<i64>,
    /// The newest row that was looked at.
    #[serde(skip)]
    pub searched_to: i64,
}

/// The log, opened to be read.
#[derive(Debug)]
pub struct Reader {
    connection: Connection,
    names: HashMap<i64, Arc<str>>,
}

impl Reader {
    /// Opens the log, whether its process runs or not.
    pub fn open(path: &Path) -> Result<Self, String> {
        if !path.exists() {
            return Err(format!("there is no request log at {} yet", path.display()));
        }
        let fail = |error: &rusqlite::Error| explain(path, error).message;
        let connection = database::open_as_it_is(path).map_err(|error| fail(&error))?;
        connection.busy_timeout(LOCK_WAIT_MAX).map_err(|error| fail(&error))?;
        match SCHEMA.version(&connection) {
            Ok(version) if version.number == 0 => Err(format!("the request log {} is empty", path.display())),
            Ok(_) => Ok(Self { connection, names: HashMap::new() }),
            Err(Unusable::Sqlite(error)) => Err(fail(&error)),
            Err(Unusable::Foreign(why)) => Err(format!("request log {}: {why}", path.display())),
        }
    }

    /// A page of the requests that are looked for, at most so many.
    pub fn page(&mut self, filter: &Filter, from: From, count: usize) -> Result<Page, String> {
        self.find(filter, from, count.min(PAGE_MAX)).map_err(|error| format!("the request log cannot be read: {error}"))
    }

    /// A request with all of it, by its id; the latest, if several had the same.
    pub fn request(&mut self, id: &str) -> Result<Option<Logged>, String> {
        let filter = Filter { id: Some(id.to_owned()), ..Filter::default() };
        let mut from = From::Newest;
        loop {
            let mut page = self.page(&filter, from, 1)?;
            match (page.requests.pop(), page.next) {
                (None, Some(next)) => from = From::Before(next),
                (found, _) => return Ok(found),
            }
        }
    }

    /// The request of a row, if it is still there.
    pub fn row(&mut self, row: i64) -> Result<Option<Logged>, String> {
        self.read(row).optional().map_err(|error| format!("the request log cannot be read: {error}"))
    }

    /// The kept bodies of the request of a row: its own, and its answer's.
    pub fn bodies(&self, row: i64) -> Result<[Option<LoggedBody>; 2], String> {
        const SQL: &str = "SELECT length, kept, zstd FROM body WHERE id = ?1";
        let body = |id: i64| {
            let row = |row: &Row<'_>| {
                let text = zstd::bulk::decompress(row.get_ref(2)?.as_blob()?, TEXT_BYTES_MAX).unwrap_or_default();
                Ok(LoggedBody {
                    length: row.get(0)?,
                    kept: row.get(1)?,
                    text: String::from_utf8_lossy(&text).into_owned(),
                })
            };
            let read = self.connection.prepare_cached(SQL).and_then(|mut sql| sql.query_row([id], row).optional());
            read.map_err(|error| format!("the request log cannot be read: {error}"))
        };
        Ok([body(row * 2)?, body(row * 2 + 1)?])
    }

    fn find(&mut self, filter: &Filter, from: From, count: usize) -> rusqlite::Result<Page> {
        let Some((oldest, newest)) = self.ends()? else { return Ok(Page::default()) };
        let first = match filter.since {
            None => oldest,
            Some(since) => self.first_ended(since, (oldest, newest))?,
        };
        let past = match filter.until {
            None => newest + 1,
            Some(until) => self.first_ended(until, (oldest, newest))?,
        };
        let (low, high, order) = match from {
            From::Newest => (first.max(past - SEARCHED_MAX), past, "DESC"),
            From::Before(row) => (first.max(row.min(past) - SEARCHED_MAX), row.min(past), "DESC"),
            From::After(row) => {
                let low = first.max(row.saturating_add(1));
                (low, past.min(low.saturating_add(SEARCHED_MAX)), "ASC")
            }
        };
        let mut search = Search::new(low, high);
        self.add_terms(&mut search, filter)?;
        let rows = search.rows(&self.connection, order, count)?;
        let is_whole = rows.len() == count;
        let next = match rows.last() {
            Some(last) if is_whole => (*last > first).then_some(*last),
            _ => (low > first).then_some(low),
        };
        let requests = rows.into_iter().map(|row| self.read(row)).collect::<rusqlite::Result<_>>()?;
        let next = next.filter(|_| !matches!(from, From::After(_)));
        Ok(Page { requests, next, searched_to: high - 1 })
    }

    /// The first and the last row; none if there is none.
    fn ends(&self) -> rusqlite::Result<Option<(i64, i64)>> {
        let end = |order: &str| {
            let sql = format!("SELECT id FROM request ORDER BY id {order} LIMIT 1");
            self.connection.prepare_cached(&sql)?.query_row([], |row| row.get::<_, i64>(0)).optional()
        };
        Ok(end("ASC")?.zip(end("DESC")?))
    }

    /// The first row that ended at a moment or later. Rows are in that order but for a moment here and there: the clock may be set,
    /// and two processes write during an upgrade.
    fn first_ended(&self, moment: i64, (oldest, newest): (i64, i64)) -> rusqlite::Result<i64> {
        let mut statement =
            self.connection.prepare_cached("SELECT ended FROM request WHERE id >= ?1 ORDER BY id LIMIT 1")?;
        let (mut low, mut high) = (oldest, newest + 1);
        while low < high {
            let middle = low + (high - low) / 2;
            let ended: Option<i64> = statement.query_row([middle], |row| row.get(0)).optional()?;
            if ended.is_none_or(|ended| ended >= moment) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        Ok(low)
    }

    fn add_terms(&self, search: &mut Search, filter: &Filter) -> rusqlite::Result<()> {
        let Filter { key, endpoint, model, status, failed, session, id, since: _, until: _ } = filter;
        for (column, text) in [("key", key), ("model", model)] {
            if let Some(text) = text {
                let value = self.stored(text)?;
                search.term(&format!("{column} IN (?, ?)"), [value, Value::Text(text.clone())]);
            }
        }
        // A client that has gone is no failure.
        let gone = self.stored(CLIENT_GONE)?;
        let is_failed = "(status >= 400 OR fault IS NOT NULL AND fault IS NOT ?)";
        if let Some(endpoint) = endpoint {
            let name = self.stored(endpoint)?;
            let before = match &name {
                Value::Integer(name) => format!("%,{name},%"),
                _ => "no name".to_owned(),
            };
            let (last, failing) = if *failed { (is_failed, Some(gone)) } else { ("1", None) };
            let term = format!("(endpoint IN (?, ?) AND {last} OR tried LIKE ?)");
            let values = [name, Value::Text(endpoint.clone())].into_iter().chain(failing);
            search.term(&term, values.chain([Value::Text(before)]));
        } else if *failed {
            search.term(is_failed, [gone]);
        }
        match status {
            None => {}
            Some(StatusWanted::One(status)) => search.term("status = ?", [Value::Integer((*status).into())]),
            Some(StatusWanted::Class(class)) => {
                let first = i64::from(*class) * 100;
                search.term("status BETWEEN ? AND ?", [Value::Integer(first), Value::Integer(first + 99)]);
            }
        }
        if let Some(session) = session {
            search.term("session = ?", [Value::Integer(session.cast_signed())]);
        }
        if let Some(id) = id {
            let of_id = "number = ? AND (SELECT request_id FROM detail WHERE detail.id = request.id) = ?";
            search.term(of_id, [Value::Integer(number_of(id).into()), Value::Text(id.clone())]);
        }
        Ok(())
    }

    /// The id of a name, or nothing that stands in a row.
    fn stored(&self, text: &str) -> rusqlite::Result<Value> {
        let mut statement = self.connection.prepare_cached("SELECT id FROM name WHERE text = ?1")?;
        let id = statement.query_row([text], |row| row.get(0)).optional()?;
        Ok(id.map_or(Value::Null, Value::Integer))
    }

    fn read(&mut self, id: i64) -> rusqlite::Result<Logged> {
        const SQL: &str = "SELECT * FROM request JOIN detail USING (id) WHERE id = ?1";
        let Self { connection, names } = self;
        let names = &mut Names { connection, known: names };
        let attempts = attempts(connection, names, id)?;
        let mut statement = connection.prepare_cached(SQL)?;
        statement.query_row([id], |row| logged(row, names, attempts))
    }
}

/// Names by their ids, read as they are needed.
struct Names<'a> {
    connection: &'a Connection,
    known: &'a mut HashMap<i64, Arc<str>>,
}

impl Names<'_> {
    /// The text of a column that holds a name's id, or the text itself.
    fn text(&mut self, row: &Row<'_>, column: &str) -> rusqlite::Result<Option<Arc<str>>> {
        match row.get_ref(column)? {
            ValueRef::Null => Ok(None),
            ValueRef::Integer(id) => self.name(id).map(Some),
            other => Ok(Some(other.as_str()?.into())),
        }
    }

    fn name(&mut self, id: i64) -> rusqlite::Result<Arc<str>> {
        if let Some(name) = self.known.get(&id) {
            return Ok(Arc::clone(name));
        }
        let mut statement = self.connection.prepare_cached("SELECT text FROM name WHERE id = ?1")?;
        let name: Option<String> = statement.query_row([id], |row| row.get(0)).optional()?;
        let name: Arc<str> = name.unwrap_or_else(|| "?".to_owned()).into();
        self.known.insert(id, Arc::clone(&name));
        Ok(name)
    }
}

fn attempts(connection: &Connection, names: &mut Names<'_>, id: i64) -> rusqlite::Result<Vec<LoggedAttempt>> {
    let mut statement = connection.prepare_cached("SELECT * FROM attempt WHERE id >= ?1 AND id < ?2 ORDER BY id")?;
    let mut rows = statement.query([id * ATTEMPT_IDS, (id + 1) * ATTEMPT_IDS])?;
    let mut attempts = Vec::new();
    while let Some(row) = rows.next()? {
        let unknown = || Arc::from("?");
        attempts.push(LoggedAttempt {
            began_ms: Millis(row.get("began")?),
            took_ms: Millis(row.get("took")?),
            first_byte_ms: row.get::<_, Option<i64>>("first_byte")?.map(Millis),
            endpoint: names.text(row, "endpoint")?.unwrap_or_else(unknown),
            endpoint_key: names.text(row, "lane")?,
            model: names.text(row, "model")?,
            span: format!("{:016x}", row.get::<_, i64>("span")?.cast_unsigned()),
            outcome: names.text(row, "outcome")?.unwrap_or_else(unknown),
            status: row.get("status")?,
            trouble: names.text(row, "trouble")?,
            rule: names.text(row, "rule")?,
            passed_over: list(row.get::<_, Option<String>>("passed_over")?.as_deref()),
        });
    }
    Ok(attempts)
}

fn logged(row: &Row<'_>, names: &mut Names<'_>, attempts: Vec<LoggedAttempt>) -> rusqlite::Result<Logged> {
    let time = |column: &str| Ok::<_, rusqlite::Error>(row.get::<_, Option<i64>>(column)?.map(Millis));
    let (ended, total): (i64, i64) = (row.get("ended")?, row.get("total")?);
    let came = Timestamp::from_millisecond(ended.saturating_sub(total / 1000)).unwrap_or_default();
    let completion_tokens: Option<u64> = row.get("completion_tokens")?;
    let generation: Option<i64> = row.get("generation")?;
    Ok(Logged {
        row: row.get("id")?,
        id: row.get("request_id")?,
        trace: row.get::<_, Option<[u8; 16]>>("trace")?.map(|id| format!("{:032x}", u128::from_be_bytes(id))),
        time: came,
        key: names.text(row, "key")?,
        tags: list(names.text(row, "tags")?.as_deref()),
        address: row.get("address")?,
        session: row.get::<_, Option<i64>>("session")?.map(|session| format!("{:016x}", session.cast_unsigned())),
        method: names.text(row, "method")?.unwrap_or_else(|| "?".into()),
        path: names.text(row, "path")?.unwrap_or_else(|| "?".into()),
        model: names.text(row, "model")?,
        fallback: names.text(row, "fallback")?,
        endpoint: names.text(row, "endpoint")?,
        endpoint_key: names.text(row, "lane")?,
        endpoint_model: names.text(row, "endpoint_model")?,
        affinity: names.text(row, "affinity")?,
        stream: row.get("stream")?,
        status: row.get("status")?,
        fault: names.text(row, "fault")?,
        trouble: names.text(row, "trouble")?,
        rule: names.text(row, "rule")?,
        cause: row.get("cause")?,
        queued_ms: Millis(row.get("queued")?),
        first_byte_ms: time("first_byte")?,
        first_token_ms: time("first_token")?,
        total_ms: Millis(total),
        tokens_per_second: rate(completion_tokens, generation),
        prompt_tokens: row.get("prompt_tokens")?,
        completion_tokens,
        total_tokens: row.get("total_tokens")?,
        cached_tokens: row.get("cached_tokens")?,
        reasoning_tokens: row.get("reasoning_tokens")?,
        audio_tokens: row.get("audio_tokens")?,
        cost_usd: row.get::<_, Option<u64>>("cost")?.map(|cost| NanoUsd(cost).dollars()),
        request_bytes: row.get("request_bytes")?,
        bytes: row.get("bytes")?,
        config: row.get("config")?,
        attempts,
        held: list(row.get::<_, Option<String>>("held")?.as_deref()),
        outside: list(names.text(row, "outside")?.as_deref()),
    })
}

/// A list that was written by this program; what another version wrote differently is left out.
fn list<T: serde::de::DeserializeOwned>(json: Option<&str>) -> Vec<T> {
    json.and_then(|json| serde_json::from_str(json).ok()).unwrap_or_default()
}

fn rate(tokens: Option<u64>, micros: Option<i64>) -> Option<f64> {
    let time = Duration::from_micros(u64::try_from(micros?).ok()?);
    crate::usage::tokens_per_second(tokens?, time)
}

/// Terms of a search, and their values.
struct Search {
    terms: String,
    values: Vec<Value>,
}

impl Search {
    fn new(low: i64, high: i64) -> Self {
        Self { terms: "id >= ? AND id < ?".to_owned(), values: vec![Value::Integer(low), Value::Integer(high)] }
    }

    fn term(&mut self, term: &str, values: impl IntoIterator<Item = Value>) {
        self.terms.push_str(" AND ");
        self.terms.push_str(term);
        self.values.extend(values);
    }

    fn rows(self, connection: &Connection, order: &str, count: usize) -> rusqlite::Result<Vec<i64>> {
        let Self { terms, mut values } = self;
        values.push(Value::Integer(i64::try_from(count).unwrap_or(i64::MAX)));
        let sql = format!("SELECT id FROM request WHERE {terms} ORDER BY id {order} LIMIT ?");
        let parameters: Vec<&dyn ToSql> = values.iter().map(|value| value as &dyn ToSql).collect();
        connection.prepare_cached(&sql)?.query_map(&parameters[..], |row| row.get(0))?.collect()
    }
}
