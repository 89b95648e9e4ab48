//! Requests for endpoints that are under way, for those who run the gateway: what each is at, and an end to one of them.

use std::collections::HashMap;
use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Instant;

use atomic_waker::AtomicWaker;
use http::{HeaderValue, Method};

use super::Exchange;

/// Parts of the list, each with a lock of its own.
const PARTS: usize = 16;

/// An end that somebody else can put to a request.
#[derive(Debug, Default)]
pub struct Cancel {
    has_come: AtomicBool,
    /// Task of the request, while it can be ended.
    task: AtomicWaker,
}

impl Cancel {
    /// Ends the request.
    pub fn cancel(&self) {
        self.has_come.store(true, Ordering::Release);
        self.task.wake();
    }

    /// Goes on with something until the request is to end. None then.
    pub(crate) async fn or<T>(&self, going_on: impl Future<Output = T>) -> Option<T> {
        let mut going_on = pin!(going_on);
        poll_fn(|task| {
            self.task.register(task.waker());
            if self.has_come.load(Ordering::Acquire) {
                return Poll::Ready(None);
            }
            going_on.as_mut().poll(task).map(Some)
        })
        .await
    }
}

/// A request that is under way.
#[derive(Debug)]
pub(crate) struct RunningRequest {
    /// Its id.
    pub(crate) id: Option<HeaderValue>,
    /// When it came.
    pub(crate) came: Instant,
    /// Name of the client's key, if it is a caller's own.
    pub(crate) key: Option<Arc<str>>,
    /// The client's address.
    pub(crate) address: Option<IpAddr>,
    /// The method.
    pub(crate) method: Method,
    /// The path.
    pub(crate) path: Box<str>,
    /// The model that it asks for.
    pub(crate) model: Option<Arc<str>>,
    /// True if it asks for a stream.
    pub(crate) stream: bool,
    /// What it is at.
    pub(crate) exchange: Arc<Exchange>,
}

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It waits for a permit.
    Queued,
    /// An endpoint is asked.
    Asked,
    /// Its answer is let through.
    Answered,
}

impl RunningRequest {
    /// How far it has come, and the endpoint and what is shown of the key that is asked now.
    pub(crate) fn progress(&self) -> (Progress, Option<Arc<str>>, Option<Arc<str>>) {
        let state = self.exchange.state();
        let progress = match (&state.attempt, state.committed) {
            (_, Some(_)) => Progress::Answered,
            (Some(_), None) => Progress::Asked,
            (None, None) => Progress::Queued,
        };
        let asked = state.attempt.as_ref().map(|attempt| &attempt.asked);
        let lane = asked.and_then(|asked| asked.lane()).filter(|lane| lane.live().is_some());
        let endpoint = asked.map(|asked| Arc::clone(&asked.endpoint.config.id));
        (progress, endpoint, lane.map(|lane| Arc::clone(&lane.config.label)))
    }
}

type Part = HashMap<u64, Arc<RunningRequest>>;

/// All requests for endpoints that are under way. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct RunningRequests(Arc<List>);

#[derive(Debug, Default)]
struct List {
    parts: [Mutex<Part>; PARTS],
    last: AtomicU64,
}

impl RunningRequests {
    /// Lists a request until the guard is dropped.
    pub(crate) fn enter(&self, request: RunningRequest) -> RunningGuard {
        let number = self.0.last.fetch_add(1, Ordering::Relaxed);
        self.part(number).insert(number, Arc::new(request));
        RunningGuard { all: self.clone(), number }
    }

    /// Those that are under way now with the number of each, the oldest first.
    pub(crate) fn list(&self) -> Vec<(u64, Arc<RunningRequest>)> {
        let parts = self.0.parts.iter().map(lock);
        let one = |(number, request): (&u64, &Arc<RunningRequest>)| (*number, Arc::clone(request));
        let mut all: Vec<_> = parts.flat_map(|part| part.iter().map(one).collect::<Vec<_>>()).collect();
        all.sort_by_key(|(number, request)| (request.came, *number));
        all
    }

    /// Ends those of an id, which clients choose, or of these the one of a number. Returns how many these are.
    pub(crate) fn cancel(&self, id: &str, number: Option<u64>) -> usize {
        let is_it = |(one, request): &(u64, Arc<RunningRequest>)| {
            number.is_none_or(|number| number == *one) && request.id.as_ref().is_some_and(|one| one == id)
        };
        let found = self.list().into_iter().filter(is_it);
        found.inspect(|(_, request)| request.exchange.cancel.cancel()).count()
    }

    fn part(&self, number: u64) -> MutexGuard<'_, Part> {
        let place = usize::try_from(number % PARTS as u64).unwrap_or_default();
        let [first, ..] = &self.0.parts;
        lock(self.0.parts.get(place).unwrap_or(first))
    }
}

/// The place of a request among those that are under way.
#[derive(Debug)]
pub(crate) struct RunningGuard {
    all: RunningRequests,
    number: u64,
}

impl Drop for RunningGuard {
    fn drop(&mut self) {
        self.all.part(self.number).remove(&self.number);
    }
}

fn lock(part: &Mutex<Part>) -> MutexGuard<'_, Part> {
    // Nothing panics while it is held.
    part.lock().unwrap_or_else(PoisonError::into_inner)
}
