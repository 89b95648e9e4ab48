//! Client of the ledger's thread: sends messages to it and returns permits.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::account::lock;
use super::budgets::{Amount, BudgetSet, BudgetView, Unreserved};
use super::messages::{
    Bill, BudgetLook, CallerDraw, Draw, Drawn, Find, Listed, Look, Messages, Otherwise, OwnDraw, QueuedBy, Reset,
    Return, Wanted,
};
use super::notices::{NOTICES_MAX, Notice};
use super::places::{Place, PlaceChange, Thing};
use super::write_behind::WRITE_DELAY;
use super::{Account, AccountId, AccountSet, LimitedAccount, ModelList, Permit, Spent};
use crate::limit::{Clock, Stamp, View};
use crate::telemetry::metrics::metrics;

/// Upper bound on the draws that wait for the ledger's thread, which serves them in one batch. Messages that follow an
/// attempt (a permit given back, its end, its tokens) always have room: there is at most one of each for every open
/// request.
const DRAWS_MAX: usize = 65_536;

/// Longest wait for a reply of the ledger's thread, unless the config has another one.
const WAIT_DEFAULT: Duration = Duration::from_secs(3);

/// State that the allocator and its clients share.
#[derive(Debug, Default)]
struct Inbox {
    messages: Mutex<(Messages, Sleep)>,
    wake: Condvar,
    accounts: Mutex<Accounts>,
    /// Accounts of models that were in the ledger when it was opened.
    known: RwLock<HashSet<AccountId>>,
    /// Lists of models that were in the ledger when it was opened.
    model_lists: RwLock<Arc<HashMap<Arc<str>, Arc<str>>>>,
    /// What other processes have said, until somebody looks at it.
    heard: Mutex<Vec<Notice>>,
    /// True if several machines share the ledger, which then counts requests in flight as well.
    shares_concurrency: AtomicBool,
    /// Longest wait for a reply, in milliseconds; 0 for the default.
    wait_ms: AtomicU64,
    configs: AtomicU64,
    tickets: AtomicU64,
    queued: Mutex<Queued>,
    down: AtomicBool,
}

/// Requests in the queue: all of them, and those of each caller that has any.
#[derive(Debug, Default)]
struct Queued {
    all: usize,
    by_caller: HashMap<u64, usize>,
}

/// Accounts in use, and some that no config has any more: they are dropped when there are twice as many as after the last time.
#[derive(Debug, Default)]
struct Accounts {
    by_id: HashMap<AccountId, Weak<Account>>,
    in_use: usize,
}

/// State of the thread, so that it is woken only if it sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sleep {
    #[default]
    Awake,
    /// Asleep until this moment, unless it is woken.
    Until(Stamp),
    /// The thread has ended; there are no more replies.
    Gone,
}

/// Handle to the ledger's thread. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    inbox: Arc<Inbox>,
    clocks: Arc<dyn Fn() -> Clock + Send + Sync>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

/// A draw before it is sent.
struct Asked {
    ticket: u64,
    wanted: Vec<Wanted>,
    own: OwnDraw,
    otherwise: Otherwise,
    instead_of: Option<Return>,
}

/// A place in the queue for a permit. Dropping it frees the place.
#[derive(Debug)]
pub struct QueuePlace {
    inbox: Arc<Inbox>,
    caller: u64,
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        let mut queued = lock(&self.inbox.queued);
        queued.all -= 1;
        if let Some(own) = queued.by_caller.get_mut(&self.caller) {
            *own -= 1;
            if *own == 0 {
                queued.by_caller.remove(&self.caller);
            }
        }
    }
}

impl Client {
    /// Returns a client for a ledger that uses these clocks.
    pub fn new(clocks: impl Fn() -> Clock + Send + Sync + 'static) -> Self {
        Self { inbox: Arc::default(), clocks: Arc::new(clocks) }
    }

    /// The same for a ledger that counts requests in flight, since several machines share it.
    #[must_use]
    pub fn sharing_concurrency(self) -> Self {
        self.inbox.shares_concurrency.store(true, Ordering::Relaxed);
        self
    }

    /// The same with another longest wait for a reply.
    #[must_use]
    pub fn with_wait(self, wait: Duration) -> Self {
        self.inbox.wait_ms.store(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self
    }

    /// Longest wait for a reply of the ledger's thread: a disk or a server may hang, and a client must not wait for it.
    fn wait(&self) -> Duration {
        match self.inbox.wait_ms.load(Ordering::Relaxed) {
            0 => WAIT_DEFAULT,
            millis => Duration::from_millis(millis),
        }
    }

    /// Returns the current clocks.
    pub fn clock(&self) -> Clock {
        (self.clocks)()
    }

    /// Returns an account. There is only one for each id, even if it leaves the config and comes back while old requests
    /// still use it: two accounts would not see each other's draws.
    pub fn account(&self, id: &AccountId) -> Arc<Account> {
        let mut accounts = self.inbox.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(account) = accounts.by_id.get(id).and_then(Weak::upgrade) {
            return account;
        }
        if accounts.by_id.len() >= 2 * accounts.in_use {
            accounts.by_id.retain(|_, account| account.strong_count() > 0);
            accounts.in_use = accounts.by_id.len() + 1;
        }
        let account = Arc::new(Account::new(id.clone(), self.is_shared()));
        accounts.by_id.insert(id.clone(), Arc::downgrade(&account));
        account
    }

    /// True if the account was in the ledger when it was opened.
    pub fn is_known(&self, id: &AccountId) -> bool {
        self.inbox.known.read().unwrap_or_else(PoisonError::into_inner).contains(id)
    }

    /// Sets the accounts of models that are in the ledger, a thousand at most.
    pub(crate) fn set_known(&self, ids: Vec<AccountId>) {
        *self.inbox.known.write().unwrap_or_else(PoisonError::into_inner) = ids.into_iter().collect();
    }

    /// Returns the next number in the order of arrival.
    pub fn ticket(&self) -> u64 {
        self.inbox.tickets.fetch_add(1, Ordering::Relaxed)
    }

    /// Returns the number that the next one gets.
    pub(super) fn next_ticket(&self) -> u64 {
        self.inbox.tickets.load(Ordering::Relaxed)
    }

    /// Returns a place in the queue for a permit, if fewer than `max` places are taken, and fewer than `own_max` by the same caller.
    pub fn enter_queue(&self, QueuedBy { caller, .. }: QueuedBy, max: usize, own_max: usize) -> Option<QueuePlace> {
        let mut queued = lock(&self.inbox.queued);
        let own = queued.by_caller.get(&caller).copied().unwrap_or_default();
        if queued.all >= max || own >= own_max {
            return None;
        }
        queued.all += 1;
        queued.by_caller.insert(caller, own + 1);
        Some(QueuePlace { inbox: Arc::clone(&self.inbox), caller })
    }

    /// Returns the number of requests in the queue for a permit.
    pub fn queued(&self) -> usize {
        lock(&self.inbox.queued).all
    }

    /// True if the ledger could not be used the last time and limited endpoints take no requests without it.
    pub fn is_down(&self) -> bool {
        self.inbox.down.load(Ordering::Relaxed)
    }

    pub(super) fn set_down(&self, down: bool) {
        self.inbox.down.store(down, Ordering::Relaxed);
    }

    /// Draws a permit from the first endpoint in the list that has one.
    pub async fn draw(&self, ticket: u64, wanted: Vec<Wanted>, otherwise: Otherwise) -> Drawn {
        self.draw_for(ticket, wanted, OwnDraw::default(), otherwise).await
    }

    /// The same together with what is drawn of a caller's own, or neither.
    pub async fn draw_for(&self, ticket: u64, wanted: Vec<Wanted>, own: OwnDraw, otherwise: Otherwise) -> Drawn {
        self.send_draw(Asked { ticket, wanted, own, otherwise, instead_of: None }).await
    }

    /// Draws a fresh permit in place of one that is too old, or that was spent on an attempt that has to be repeated.
    /// The old permit is given back in the same step, so that no other request can take it in between.
    pub async fn swap(&self, old: &mut Permit) -> Drawn {
        let wanted = vec![old.wanted()];
        let returned = old.take_return();
        let (ticket, otherwise) = (self.ticket(), Otherwise::LookElsewhere);
        let was_in_flight = returned.as_ref().is_some_and(|returned| returned.concurrent);
        let own = OwnDraw::default();
        let drawn = self.send_draw(Asked { ticket, wanted, own, otherwise, instead_of: returned }).await;
        if was_in_flight && matches!(drawn, Drawn::Refused(_)) {
            old.stays_in_flight();
        }
        drawn
    }

    async fn send_draw(&self, asked: Asked) -> Drawn {
        let (reply, answer) = oneshot::channel();
        let Asked { ticket, wanted, own: OwnDraw { caller, budgets }, otherwise, instead_of } = asked;
        let draw = Draw { ticket, wanted, caller, budgets, otherwise, instead_of, keeps_place: false, reply };
        let patience = match otherwise {
            Otherwise::Wait { until, .. } => self.wait() + self.clock().boot.until(until),
            Otherwise::LookElsewhere | Otherwise::Refuse(_) => self.wait(),
        };
        let pushed = self.push(|messages| {
            let has_room = messages.draws.len() < DRAWS_MAX;
            if has_room {
                messages.draws.push(draw);
            } else {
                messages.returns.extend(draw.instead_of);
            }
            has_room
        });
        if pushed != Some(true) {
            return Drawn::Unavailable;
        }
        let begun = Instant::now();
        let drawn = match tokio::time::timeout(patience, answer).await {
            Ok(Ok(drawn)) => drawn,
            // A permit that is granted later finds no client and gives itself back.
            Ok(Err(_)) | Err(_) => Drawn::Unavailable,
        };
        if let (Some(metrics), false) = (metrics(), matches!(otherwise, Otherwise::Wait { .. })) {
            metrics.permit(begun.elapsed());
        }
        drawn
    }

    /// Takes prefetched permits of an endpoint and of a caller's own accounts, if there are both, without waiting.
    pub fn draw_both_at_once(&self, accounts: &Arc<AccountSet>, caller: &CallerDraw, clock: &Clock) -> Option<Permit> {
        let has = |accounts: &AccountSet| accounts.prefetch.has(clock);
        // One that is taken in vain would have to be given back.
        if caller.tokens > 0 || !has(&caller.accounts) || accounts.is_limited() && !has(accounts) {
            return None;
        }
        let mut permit =
            if accounts.is_limited() { self.draw_at_once(accounts, clock)? } else { self.unlimited(accounts) };
        permit.set_caller(self.draw_at_once(&caller.accounts, clock)?);
        Some(permit)
    }

    /// Takes a prefetched permit, if there is one, without waiting.
    pub fn draw_at_once(&self, accounts: &Arc<AccountSet>, clock: &Clock) -> Option<Permit> {
        let counted = accounts.prefetch.take(clock, |counted| accounts.days_last(counted, clock))?;
        Some(Permit::new(self, accounts, Some(counted)))
    }

    /// Returns a permit of accounts without limits.
    pub fn unlimited(&self, accounts: &Arc<AccountSet>) -> Permit {
        Permit::new(self, accounts, None)
    }

    /// Counts the tokens of an answer that has just ended.
    pub fn spend_tokens(&self, accounts: &Arc<AccountSet>, caller: Option<&Arc<AccountSet>>, spent: Spent, now: Stamp) {
        let endpoint = Arc::clone(&spent.endpoint);
        let bill = Bill { accounts: Arc::clone(accounts), caller: caller.cloned(), spent };
        if self.push_until(now + WRITE_DELAY, |messages| messages.bills.push(bill)).is_none() {
            log::error!("endpoint {endpoint}: an answer's tokens are not counted: the ledger is closed");
        }
    }

    /// Returns the counts of these accounts from the ledger; `None` if it is closed.
    pub async fn look(&self, accounts: Vec<LimitedAccount>) -> Option<Vec<View>> {
        let (reply, answer) = oneshot::channel();
        self.push(|messages| messages.looks.push(Look { accounts, reply }))?;
        answer.await.ok()
    }

    /// Counts what was taken of a key's budgets without a reservation: it has begun by itself.
    pub fn spend_unreserved(&self, set: &Arc<BudgetSet>, amount: Amount) {
        let unreserved = Unreserved { set: Arc::clone(set), amount };
        if self.push_behind(|messages| messages.unreserved.push(unreserved)).is_none() {
            log::error!("key {}: what an answer took is not counted in its budgets: the ledger is closed", set.key);
        }
    }

    /// Returns the state of a key's budgets; `None` if the ledger cannot be read.
    pub async fn look_at_budgets(&self, set: &Arc<BudgetSet>) -> Option<Vec<BudgetView>> {
        let (reply, answer) = oneshot::channel();
        let look = BudgetLook { set: Arc::clone(set), found: Vec::new(), reply };
        self.push(|messages| messages.budget_looks.push(look))?;
        tokio::time::timeout(self.wait(), answer).await.ok()?.ok()?
    }

    /// Returns the places of each of these things, of all owners; `None` if the ledger cannot be read.
    pub async fn find_places(&self, things: Vec<Thing>) -> Option<Vec<Vec<Place>>> {
        let (reply, answer) = oneshot::channel();
        self.push(|messages| messages.finds.push(Find { things, found: Vec::new(), reply }))?;
        tokio::time::timeout(self.wait(), answer).await.ok()?.ok()?
    }

    /// Notes where a thing is, or that it is nowhere any more. It is found from now on, and written a little later.
    pub fn change_place(&self, change: PlaceChange) {
        // `None`: the thread has ended, and the process with it.
        self.push_behind(|messages| messages.places.push(change));
    }

    /// Keeps the list of models of an endpoint for the next start.
    pub fn keep_models(&self, endpoint: Arc<str>, list: Arc<str>) {
        // `None`: the thread has ended, and the process with it.
        self.push_behind(|messages| messages.model_lists.push((endpoint, list)));
    }

    /// True if other machines share the ledger, so that there is somebody to talk to.
    pub fn is_shared(&self) -> bool {
        self.inbox.shares_concurrency.load(Ordering::Relaxed)
    }

    /// Says something to the other processes that share the ledger.
    pub fn tell(&self, notice: Notice) {
        // `None`: the thread has ended, and the process with it.
        self.push_behind(|messages| messages.notices.push(notice));
    }

    /// Takes out what the others have said since the last time.
    pub fn take_heard(&self) -> Vec<Notice> {
        std::mem::take(&mut *lock(&self.inbox.heard))
    }

    pub(super) fn hear(&self, notices: Vec<Notice>) {
        if notices.is_empty() {
            return;
        }
        let mut heard = lock(&self.inbox.heard);
        heard.extend(notices);
        let surplus = heard.len().saturating_sub(NOTICES_MAX);
        heard.drain(..surplus);
    }

    /// Lists of models that were in the ledger when it was opened, by endpoint.
    pub fn models_known(&self) -> Arc<HashMap<Arc<str>, Arc<str>>> {
        Arc::clone(&self.inbox.model_lists.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn set_models_known(&self, lists: Vec<ModelList>) {
        let lists = Arc::new(lists.into_iter().collect());
        *self.inbox.model_lists.write().unwrap_or_else(PoisonError::into_inner) = lists;
    }

    /// Deletes the token statistics of one endpoint, or of all if `None`. Returns false if the ledger could not be
    /// written.
    pub async fn reset_tokens(&self, endpoint: Option<Arc<str>>) -> bool {
        let (reply, answer) = oneshot::channel();
        let sent = self.push(|messages| messages.resets.push(Reset { endpoint, reply }));
        sent.is_some() && answer.await.unwrap_or(false)
    }

    /// Waits until everything counted so far is written. Returns false if it could not be written.
    pub async fn flush(&self) -> bool {
        let (reply, answer) = oneshot::channel();
        let sent = self.push(|messages| messages.flushes.push(reply));
        sent.is_some() && answer.await.unwrap_or(false)
    }

    /// Returns the number of a config that is being made.
    pub fn next_config(&self) -> u64 {
        self.inbox.configs.fetch_add(1, Ordering::Relaxed)
    }

    /// Lists the accounts of a new config.
    pub fn list_accounts(&self, config: u64, accounts: impl Iterator<Item = LimitedAccount>) {
        // `None`, here and below: the thread has ended and does not need to know.
        self.push(|messages| {
            messages.new_config = true;
            messages.listed.extend(accounts.map(|of| Listed { config, of }));
        });
    }

    /// Lists an account that a config has had only since it was asked for.
    pub fn list_account(&self, config: u64, of: LimitedAccount) {
        self.push_behind(|messages| messages.listed.push(Listed { config, of }));
    }

    /// Asks the thread to write everything and to end.
    pub(super) fn close(&self) {
        self.push(|messages| messages.closing = true);
    }

    /// Sends a message that is handled at once. Returns `None` if the thread has ended.
    pub(super) fn push<T>(&self, add: impl FnOnce(&mut Messages) -> T) -> Option<T> {
        self.push_until(Stamp::default(), add)
    }

    /// Sends a message that can wait for the next write behind, so that not every answer wakes the thread. Returns
    /// `None` if the thread has ended.
    pub(super) fn push_behind<T>(&self, add: impl FnOnce(&mut Messages) -> T) -> Option<T> {
        self.push_until(self.clock().boot + WRITE_DELAY, add)
    }

    /// Sends a message, and wakes the thread unless it wakes before `moment` anyway.
    fn push_until<T>(&self, moment: Stamp, add: impl FnOnce(&mut Messages) -> T) -> Option<T> {
        let mut guard = self.lock();
        let (messages, sleep) = &mut *guard;
        if *sleep == Sleep::Gone {
            return None;
        }
        let added = add(messages);
        if let Sleep::Until(wakes_at) = *sleep
            && wakes_at > moment
        {
            *sleep = Sleep::Awake;
            self.inbox.wake.notify_one();
        }
        Some(added)
    }

    fn lock(&self) -> MutexGuard<'_, (Messages, Sleep)> {
        // The code that holds the lock does not panic.
        self.inbox.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Methods for the ledger's thread.
impl Client {
    /// Takes all messages. If there are none, waits for one until `until` at most.
    pub(super) fn receive(&self, until: Stamp) -> Messages {
        let wait = self.clock().boot.until(until);
        let mut guard = self.lock();
        if guard.0.is_empty() && wait > Duration::ZERO {
            guard.1 = Sleep::Until(until);
            let asleep = |(_, sleep): &mut (Messages, Sleep)| matches!(sleep, Sleep::Until(_));
            guard = if until == Stamp::NEVER {
                self.inbox.wake.wait_while(guard, asleep).unwrap_or_else(PoisonError::into_inner)
            } else {
                self.inbox.wake.wait_timeout_while(guard, wait, asleep).unwrap_or_else(PoisonError::into_inner).0
            };
            guard.1 = Sleep::Awake;
        }
        std::mem::take(&mut guard.0)
    }

    /// Takes all messages without waiting.
    pub(super) fn take_messages(&self) -> Messages {
        std::mem::take(&mut self.lock().0)
    }

    /// Closes the inbox: later messages are refused. Returns those that came in before.
    pub(super) fn end(&self) -> Messages {
        let mut guard = self.lock();
        guard.1 = Sleep::Gone;
        std::mem::take(&mut guard.0)
    }
}
