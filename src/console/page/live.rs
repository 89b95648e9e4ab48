//! Changes of a view, as a stream of events: each second what has changed since, and nothing while nobody looks.

use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use maud::{Markup, PreEscaped, html};
use serde_json::json;
use subtle::ConstantTimeEq as _;

use super::views::{Watched, watch};
use super::words::Language;
use super::{assets, cookie};
use crate::admin::Sources;
use crate::config::Secret;
use crate::console::access::{Author, COOKIE};
use crate::console::{Call, Console, Request};
use crate::fault::Fault;

/// Pages that are kept up to date at once.
const VIEWERS_MAX: usize = 16;
/// Time between two looks at a view; longer where one look takes more than a twentieth of it, up to the second.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);
const INTERVAL_MAX: Duration = Duration::from_secs(10);
/// Time after which a stream without changes says that it is still there.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Longest look at a view. The ledger may not answer.
const LOOK_MAX: Duration = Duration::from_secs(5);

/// A part of a view that changes as one.
pub(super) struct Region {
    id: &'static str,
    html: String,
}

impl Region {
    pub(super) fn new(id: &'static str, markup: Markup) -> Self {
        Self { id, html: markup.into_string() }
    }
}

/// A list of a view whose rows change one by one.
pub(super) struct Rows {
    pub(super) id: &'static str,
    /// Each with its id.
    pub(super) rows: Vec<(String, Markup)>,
}

/// A view, as a document and its changes are made of it.
pub(super) struct View {
    pub(super) fixed: Vec<Region>,
    pub(super) rows: Option<Rows>,
}

/// What a page has been sent: a hash of each of its parts.
#[derive(Default)]
struct Sent {
    parts: HashMap<String, u64>,
    hasher: RandomState,
}

impl Sent {
    /// Notes a part. True if it is another one than before.
    fn is_new(&mut self, id: &str, text: &str) -> bool {
        let hash = self.hasher.hash_one(text);
        match self.parts.get_mut(id) {
            Some(before) => std::mem::replace(before, hash) != hash,
            None => self.parts.insert(id.to_owned(), hash).is_none(),
        }
    }
}

impl View {
    /// A part, to be put into the document.
    pub(super) fn fixed(&self, id: &str) -> PreEscaped<&str> {
        PreEscaped(self.fixed.iter().find(|region| region.id == id).map_or("", |region| &region.html))
    }

    /// The list, to be put into the document.
    pub(super) fn rows(&self) -> Markup {
        html! { @if let Some(Rows { id, rows }) = &self.rows { ul id=(id) class="rows" { @for (_, row) in rows { (row) } } } }
    }

    /// What has changed since: parts by their ids.
    fn changes(&self, sent: &mut Sent) -> Vec<(&str, Cow<'_, str>)> {
        let mut changes: Vec<(&str, Cow<'_, str>)> = Vec::new();
        for Region { id, html } in &self.fixed {
            if sent.is_new(id, html) {
                changes.push((*id, Cow::Borrowed(html)));
            }
        }
        let Some(Rows { id, rows }) = &self.rows else { return changes };
        let order: Vec<&str> = rows.iter().map(|(id, _)| id.as_str()).collect();
        let is_other_list = sent.is_new(id, &order.join(" "));
        if is_other_list {
            // Rows that are gone need not be remembered.
            sent.parts.retain(|part, _| self.fixed.iter().any(|region| region.id == part) || part == id);
        }
        let mut others: Vec<(&str, Cow<'_, str>)> = Vec::new();
        for (id, row) in rows {
            if sent.is_new(id, &row.0) {
                others.push((id, Cow::Borrowed(&row.0)));
            }
        }
        if is_other_list {
            changes.push((*id, Cow::Owned(self.rows().into_string())));
        } else {
            changes.append(&mut others);
        }
        changes
    }
}

/// A page among those that are kept up to date.
struct Viewer(Arc<AtomicUsize>);

impl Drop for Viewer {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Who watches, for as long as that is so.
enum Watcher {
    /// A session of the page, with the host that it is of.
    Session(String, String),
    /// A program with the key.
    Key(Secret),
}

/// The stream of one page.
pub(crate) struct Live {
    watched: Watched,
    language: Language,
    watcher: Watcher,
    author: Author,
    sent: Sent,
    began: bool,
    /// The last look failed.
    is_troubled: bool,
    spoke: Instant,
    _viewer: Viewer,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Live")
    }
}

/// The next piece of a stream.
pub(crate) enum Next {
    /// More will come.
    Piece(Bytes),
    /// It is the last.
    Last(Bytes),
}

impl Console {
    /// Begins to watch a view.
    pub(crate) fn live(&self, from: Sources<'_>, call: &Call<'_>, author: Author) -> Result<Live, Fault> {
        let key = from.pool.server.admin_key.as_ref().ok_or(Fault::AdminOff)?;
        let watcher = match cookie(call.headers, COOKIE).filter(|_| author.is_session()) {
            Some(token) => Watcher::Session(token.to_owned(), call.authority.to_owned()),
            None => Watcher::Key(key.clone()),
        };
        let before = self.viewers.fetch_add(1, Ordering::Relaxed);
        let viewer = Viewer(Arc::clone(&self.viewers));
        if before >= VIEWERS_MAX {
            let problem = format!("{VIEWERS_MAX} pages are kept up to date already. Close one of them.");
            return Err(Fault::AdminConflict { code: "too_many_viewers", problem });
        }
        Ok(Live {
            watched: Watched::of(call.query)?,
            language: Language::of(call.headers),
            watcher,
            author,
            sent: Sent::default(),
            began: false,
            is_troubled: false,
            spoke: Instant::now(),
            _viewer: viewer,
        })
    }
}

impl Live {
    /// Waits for the next piece. The config may be another one than at the piece before.
    pub(crate) async fn next(&mut self, console: &Console, from: Sources<'_>) -> Next {
        let over = |why: &str| Next::Last(event("over", &json!(why).to_string()));
        if from.process.draining.is_on() {
            return over("restart");
        }
        if !self.may_watch(console, from) {
            return over("signed_out");
        }
        let mut piece = Vec::new();
        if !self.began {
            self.began = true;
            piece.extend_from_slice(b"retry: 1000\n");
            let now = jiff::Timestamp::now().as_millisecond();
            let hello = json!({ "build": assets::BUILD.as_str(), "now": now });
            piece.extend_from_slice(&event("hello", &hello.to_string()));
        }
        let request = Request { from, author: &self.author, query: None, name: "", body: &Bytes::new() };
        let look = tokio::time::timeout(LOOK_MAX, watch(&request, self.language, &mut self.watched)).await;
        match look.unwrap_or(Err(Fault::LedgerUnavailable)) {
            Ok(view) => piece.extend_from_slice(&self.change(view).await),
            Err(fault) => {
                self.is_troubled = true;
                piece.extend_from_slice(&event("problem", &json!(fault.message()).to_string()));
            }
        }
        if piece.is_empty() && self.spoke.elapsed() >= SILENCE_MAX {
            piece.extend_from_slice(&event("tick", "null"));
        }
        if !piece.is_empty() {
            self.spoke = Instant::now();
        }
        Next::Piece(piece.into())
    }

    /// What has changed, found out aside from the threads that serve: a view may have thousands of parts.
    async fn change(&mut self, view: View) -> Bytes {
        let mut sent = std::mem::take(&mut self.sent);
        let found = tokio::task::spawn_blocking(move || {
            let changes = view.changes(&mut sent);
            let event = if changes.is_empty() { Bytes::new() } else { event("change", &json!(changes).to_string()) };
            (sent, event)
        });
        // After a failure everything is sent anew.
        let (sent, change) = found.await.unwrap_or_default();
        self.sent = sent;
        // The page stops to say that there is trouble.
        let is_over = std::mem::take(&mut self.is_troubled) && change.is_empty();
        if is_over { event("tick", "null") } else { change }
    }

    /// Time to wait after a look that took so long.
    pub(crate) fn pause(&self, took: Duration) -> Duration {
        pause(self.watched.interval(), took)
    }

    fn may_watch(&self, console: &Console, from: Sources<'_>) -> bool {
        let Some(key) = &from.pool.server.admin_key else { return false };
        match &self.watcher {
            Watcher::Session(token, host) => console.sessions.is_open(token, key, host),
            Watcher::Key(given) => given.expose().as_bytes().ct_eq(key.expose().as_bytes()).into(),
        }
    }
}

fn pause(interval: Duration, took: Duration) -> Duration {
    (took * 20).clamp(interval, INTERVAL_MAX)
}

fn event(name: &str, data: &str) -> Bytes {
    format!("event: {name}\ndata: {data}\n\n").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(alerts: &str, rows: &[(&str, &str)]) -> View {
        let rows = rows.iter().map(|(id, text)| ((*id).to_owned(), html! { li id=(id) { (text) } })).collect();
        View { fixed: vec![Region::new("alerts", html! { (alerts) })], rows: Some(Rows { id: "list", rows }) }
    }

    fn ids(view: &View, sent: &mut Sent) -> Vec<String> {
        view.changes(sent).into_iter().map(|(id, _)| id.to_owned()).collect()
    }

    #[test]
    fn only_what_has_changed_is_sent() {
        let mut sent = Sent::default();
        assert_eq!(ids(&view("a", &[("1", "x"), ("2", "y")]), &mut sent), ["alerts", "list"]);
        assert!(ids(&view("a", &[("1", "x"), ("2", "y")]), &mut sent).is_empty());
        assert_eq!(ids(&view("a", &[("1", "x"), ("2", "z")]), &mut sent), ["2"]);
        assert_eq!(ids(&view("b", &[("1", "x"), ("2", "z")]), &mut sent), ["alerts"]);
        let fewer = view("b", &[("2", "z")]);
        assert_eq!(ids(&fewer, &mut sent), ["list"], "whole, where there are other rows or another order");
        assert_eq!(sent.parts.len(), 3);
        assert!(ids(&fewer, &mut sent).is_empty());
    }

    #[test]
    fn pauses_are_bounded() {
        assert_eq!(pause(INTERVAL, Duration::from_millis(3)), INTERVAL);
        assert_eq!(pause(INTERVAL, Duration::from_millis(100)), Duration::from_secs(2));
        assert_eq!(pause(INTERVAL, Duration::from_secs(9)), INTERVAL_MAX);
    }
}
