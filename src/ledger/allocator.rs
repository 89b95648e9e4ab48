//! Who gets a permit. All who ask at one moment are served in one batch: decided one after the other, written together,
//! and answered once it is committed.
//!
//! The allocator keeps a mirror of what the ledger counts for each endpoint, so that a batch reads only what another process has
//! changed since the last one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::account::Entry;
use super::batch::{Batch, Decision, Served, decide_without_ledger, enter, is_first_choice, needs_ledger, promise};
use super::client::{Bill, Draw, Messages, Otherwise, Return};
use super::prefetch::{self, PrefetchedPermits};
use super::stats::{self, DAYS_KEPT, HOURS_KEPT};
use super::write_behind::WriteBehind;
use super::{Account, Change, Client, Drawn, FaultKind, Ledger, LedgerError, Permit, Refusal, Wanted};
use crate::config::LedgerOnError;
use crate::limit::{Clock, Counted, Counts, Held, Limits, Slot, Stamp, View};

/// Views are renewed so often while anything counts, so that they show what has freed and what other processes did.
const RENEW: Duration = Duration::from_secs(1);
/// Those who wait are looked through at least so often, as another process may give permits back.
const SCAN: Duration = Duration::from_millis(250);
/// Slots that no longer count are removed so often.
const CLEAN: Duration = Duration::from_secs(10);
/// Statistics that are too old, so often.
const CLEAN_STATS: Duration = Duration::from_hours(1);

/// What the allocator did without the ledger, or could not do.
#[derive(Debug, Default)]
pub struct Tally {
    /// Draws that were refused because the ledger could not be used.
    pub denied: AtomicU64,
    /// Attempts that went on without a permit because of that; they are counted once it can be written again.
    pub uncounted: AtomicU64,
    /// Answers whose tokens were lost because of that.
    pub lost: AtomicU64,
}

/// Serves the permits of one process.
#[derive(Debug)]
pub struct Allocator {
    client: Client,
    on_error: LedgerOnError,
    tally: Arc<Tally>,
    /// The endpoints of the current config, and those of earlier ones that are still in use.
    endpoints: Vec<(Arc<Account>, Arc<Limits>)>,
    /// Those who wait for their turn, in the order of arrival; as many as the queue has places.
    waiting: BTreeMap<u64, Draw>,
    scan_at: Stamp,
    write_behind: WriteBehind,
    /// Accounts with permits drawn ahead, and when those are given back.
    prefetched: Vec<(Arc<Account>, Stamp)>,
    renew_at: Stamp,
    clean_at: Stamp,
    clean_stats_at: Stamp,
}

/// Whether serving took the ledger, so that it is known to work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Used {
    /// It did, and all went well.
    Ledger,
    /// There was nothing that needed it.
    Nothing,
}

/// What of the work behind the permits is due, by the clock at which the messages were taken in.
#[derive(Clone, Copy, Debug)]
struct Due {
    writes: bool,
    renews: bool,
}

impl Allocator {
    /// A allocator for the clients of this inbox.
    pub fn new(client: Client, on_error: LedgerOnError, tally: Arc<Tally>) -> Self {
        Self {
            client,
            on_error,
            tally,
            endpoints: Vec::new(),
            waiting: BTreeMap::new(),
            scan_at: Stamp::NEVER,
            write_behind: WriteBehind::default(),
            prefetched: Vec::new(),
            renew_at: Stamp::NEVER,
            clean_at: Stamp::default(),
            clean_stats_at: Stamp::default(),
        }
    }

    /// When there is something to do even if nobody asks.
    pub fn next_due(&self) -> Stamp {
        let stale_at = self.prefetched.iter().map(|(_, until)| *until).min().unwrap_or(Stamp::NEVER);
        self.scan_at.min(self.write_behind.due_at).min(self.renew_at).min(stale_at)
    }

    /// Whether everything that was counted is in the ledger.
    pub fn is_all_written(&self) -> bool {
        self.write_behind.is_empty() && self.prefetched.is_empty()
    }

    /// Serves whatever has come and whatever is due, with the ledger or, if it cannot be used, without. The error says that
    /// it could not; everybody was answered all the same.
    pub fn serve(&mut self, ledger: Option<&mut dyn Ledger>) -> Result<Used, LedgerError> {
        let messages = self.client.take_messages();
        self.serve_messages(ledger, messages)
    }

    pub(super) fn serve_messages(
        &mut self,
        ledger: Option<&mut dyn Ledger>,
        mut messages: Messages,
    ) -> Result<Used, LedgerError> {
        let clock = self.client.clock();
        self.clear_prefetched(&messages, &clock);
        self.take_in(&mut messages, &clock);
        let due = Due { writes: clock.boot >= self.write_behind.due_at, renews: clock.boot >= self.renew_at };
        if due.writes {
            self.collect_unwritten(&clock);
        }
        let draws = self.draws_due(std::mem::take(&mut messages.draws), &clock);
        let asks = !messages.looks.is_empty() || !messages.resets.is_empty() || !messages.flushes.is_empty();
        if !due.writes && !due.renews && !asks && !draws.iter().any(needs_ledger) {
            let served = draws.into_iter().map(|draw| decide_without_ledger(draw, &clock)).collect();
            self.answer(served, &clock);
            return Ok(Used::Nothing);
        }
        let unusable = || LedgerError { kind: FaultKind::Unusable, message: String::new() };
        let done = match ledger {
            Some(ledger) => self.batch(ledger, draws, &messages, due),
            None => Err((unusable(), draws)),
        };
        match done {
            Ok((served, clock)) => {
                self.client.set_down(false);
                self.answer(served, &clock);
                answer_others(messages, &clock, true);
                Ok(Used::Ledger)
            }
            Err((error, draws)) => {
                self.client.set_down(self.on_error == LedgerOnError::Deny);
                self.serve_without_ledger(draws, &clock);
                answer_others(messages, &clock, false);
                // Not again at once.
                self.write_behind.postpone(&clock);
                self.renew_at = self.renew_at.max(clock.boot + RENEW);
                Err(error)
            }
        }
    }

    /// Gives back what was drawn ahead: once it is old, and before anybody is told what is left.
    fn clear_prefetched(&mut self, messages: &Messages, clock: &Clock) {
        if self.prefetched.is_empty() {
            return;
        }
        let clears_all = messages.closing || messages.endpoints.is_some() || !messages.flushes.is_empty();
        let looked_at = messages.looks.iter().flat_map(|look| &look.accounts).map(|(account, _)| account);
        let drawn_from = messages.draws.iter().filter(|draw| !is_first_choice(draw)).flat_map(|draw| &draw.wanted);
        let asked: Vec<&Arc<Account>> = looked_at.chain(drawn_from.map(|wanted| &wanted.account)).collect();
        let is_due = |(account, until): &mut (Arc<Account>, Stamp)| {
            clears_all || *until <= clock.boot || asked.iter().any(|asked| Arc::ptr_eq(asked, account))
        };
        let cleared: Vec<Arc<Account>> = self.prefetched.extract_if(.., is_due).map(|(account, _)| account).collect();
        for account in &cleared {
            self.give_back_prefetched(account, clock);
        }
    }

    fn give_back_prefetched(&mut self, account: &Arc<Account>, clock: &Clock) {
        let Some(PrefetchedPermits { counted, permits, .. }) = account.prefetch.take_all() else { return };
        let attempts = i64::try_from(permits).unwrap_or(i64::MAX);
        let entry = Entry::new(counted, Change { attempts: -attempts, tokens: 0 });
        account.mirror().usage.change(entry.slot, entry.days, -attempts, 0);
        account.look_again();
        self.write_behind.add(account, entry);
        self.write_behind.due_at = clock.boot;
    }

    /// Takes in what asks for no answer.
    fn take_in(&mut self, messages: &mut Messages, clock: &Clock) {
        if let Some(endpoints) = messages.endpoints.take() {
            self.set_endpoints(endpoints);
            self.renew_at = clock.boot;
        }
        if messages.unwritten {
            self.write_behind.due_soon(clock);
        }
        if !messages.flushes.is_empty() || !messages.resets.is_empty() || messages.closing {
            self.write_behind.due_at = clock.boot;
        }
        if !messages.returns.is_empty() {
            self.scan_at = self.scan_at.min(clock.boot);
        }
        for returned in messages.returns.drain(..) {
            self.take_back(returned, clock);
        }
        for bill in merged(messages.bills.drain(..)) {
            self.take_bill(bill, clock);
        }
    }

    fn set_endpoints(&mut self, endpoints: Vec<(Arc<Account>, Arc<Limits>)>) {
        let before = std::mem::replace(&mut self.endpoints, endpoints);
        for (account, limits) in before {
            let is_known = self.endpoints.iter().any(|(known, _)| Arc::ptr_eq(known, &account));
            if !is_known {
                self.endpoints.push((account, limits));
            }
        }
    }

    fn take_back(&mut self, returned: Return, clock: &Clock) {
        let Return { account, counted, concurrent } = returned;
        if concurrent {
            account.mirror().usage.release();
        }
        account.look_again();
        let Some(counted) = counted else { return };
        account.mirror().usage.give_back(counted);
        self.write_behind.add(&account, Entry::new(counted, Change { attempts: -1, tokens: 0 }));
        // At once, as after a kill it would count for an attempt that nobody made.
        self.write_behind.due_at = clock.boot;
    }

    fn take_bill(&mut self, bill: Bill, clock: &Clock) {
        let Bill { account, limits, spent } = bill;
        let now = Counted { at: clock.boot, days: limits.calendar.days(clock.wall) };
        account.mirror().usage.add(now, Counts { attempts: 0, tokens: spent.cost.tokens() });
        let tokens = i64::try_from(spent.cost.tokens()).unwrap_or(i64::MAX);
        self.write_behind.add(&account, Entry::new(now, Change { attempts: 0, tokens }));
        account.publish(account.mirror().usage.view(&limits, clock), clock.boot);
        self.write_behind.add_spent(spent, &self.tally);
        self.write_behind.due_soon(clock);
        self.renew_at = self.renew_at.min(clock.boot + RENEW);
    }

    /// Attempts that needed no permit.
    fn collect_unwritten(&mut self, clock: &Clock) {
        for (account, limits) in &self.endpoints {
            let attempts = account.take_unwritten();
            if attempts > 0 {
                let now = Counted { at: clock.boot, days: limits.calendar.days(clock.wall) };
                let mut mirror = account.mirror();
                mirror.usage.forget(clock.boot);
                mirror.usage.add(now, Counts { attempts, tokens: 0 });
                drop(mirror);
                let attempts = i64::try_from(attempts).unwrap_or(i64::MAX);
                self.write_behind.add(account, Entry::new(now, Change { attempts, tokens: 0 }));
                self.renew_at = self.renew_at.min(clock.boot + RENEW);
            }
        }
    }

    /// First those who swap a permit for another, then whoever waits, if it is time to look through them, then the newcomers; but
    /// for those who are gone.
    fn draws_due(&mut self, newcomers: Vec<Draw>, clock: &Clock) -> Vec<Draw> {
        let (mut draws, newcomers): (Vec<_>, Vec<_>) =
            newcomers.into_iter().partition(|draw| draw.instead_of.is_some());
        for draw in &mut draws {
            if let Some(returned) = draw.instead_of.take() {
                self.take_back(returned, clock);
                self.scan_at = self.scan_at.min(clock.boot);
            }
        }
        if clock.boot >= self.scan_at {
            self.scan_at = Stamp::NEVER;
            draws.extend(std::mem::take(&mut self.waiting).into_values());
        }
        draws.extend(newcomers);
        draws.retain(|draw| !draw.reply.is_closed());
        draws
    }

    /// Does everything that is due as one step of the ledger. If that fails, nothing of it was done.
    fn batch(
        &mut self,
        ledger: &mut dyn Ledger,
        draws: Vec<Draw>,
        messages: &Messages,
        due: Due,
    ) -> Result<(Vec<Served>, Clock), (LedgerError, Vec<Draw>)> {
        let generation = match ledger.begin() {
            Ok(generation) => generation,
            Err(error) => return Err((error, draws)),
        };
        // Read now, since another process's batch may have been waited for.
        let clock = self.client.clock();
        let may_prefetch = self.waiting.is_empty() && !messages.closing;
        let mut batch = Batch { ledger, generation, clock, drawn: Vec::new(), may_prefetch };
        let mut served = Vec::with_capacity(draws.len());
        let mut draws = draws.into_iter();
        let done = loop {
            let Some(draw) = draws.next() else { break self.finish_batch(&mut batch, messages, due) };
            match batch.decide(&draw) {
                Ok(decision) => served.push(Served { draw, decision }),
                Err(error) => {
                    served.push(Served { draw, decision: Decision::Held(Vec::new()) });
                    break Err(error);
                }
            }
        };
        if let Err(error) = done {
            batch.ledger.roll_back();
            batch.undo(&served);
            let draws = served.into_iter().map(|served| served.draw).chain(draws).collect();
            return Err((error, draws));
        }
        batch.forget_drawn();
        self.forget_written(&clock, due);
        Ok((served, clock))
    }

    /// Writes what was drawn and what is due, and commits. Whatever is read comes before: what is read after it was written
    /// would count twice.
    fn finish_batch(&mut self, batch: &mut Batch<'_>, messages: &Messages, due: Due) -> Result<(), LedgerError> {
        for look in &messages.looks {
            look.accounts.iter().try_for_each(|(account, limits)| batch.refresh(account, limits))?;
        }
        if due.renews {
            self.renew(batch)?;
        }
        batch.write_drawn()?;
        if due.writes {
            self.write_behind.write(batch.ledger)?;
        }
        for reset in &messages.resets {
            batch.ledger.reset_tokens(reset.endpoint.as_deref())?;
        }
        batch.ledger.commit()
    }

    fn forget_written(&mut self, clock: &Clock, due: Due) {
        if due.writes {
            self.write_behind.forget_written();
        }
        if due.renews {
            let is_moving = self.endpoints.iter().any(|(account, _)| account.mirror().usage.is_moving());
            self.renew_at = if is_moving { clock.boot + RENEW } else { Stamp::NEVER };
        }
    }

    /// Views show what has freed meanwhile; what is too old goes.
    fn renew(&mut self, batch: &mut Batch<'_>) -> Result<(), LedgerError> {
        let clock = batch.clock;
        let cleans = clock.boot >= self.clean_at;
        for (account, limits) in &self.endpoints {
            let is_known = account.mirror().read_at.is_some();
            if is_known && !account.mirror().usage.is_moving() {
                continue;
            }
            batch.refresh(account, limits)?;
            account.publish(account.mirror().usage.view(limits, &clock), clock.boot);
            if cleans {
                batch.ledger.forget(account.id(), Slot::oldest_that_counts(clock.boot))?;
            }
        }
        if cleans {
            self.clean_at = clock.boot + CLEAN;
            // Endpoints that no config and no request has any more, and that have nothing left to be written.
            self.endpoints.retain(|(account, _)| Arc::strong_count(account) > 1 || account.has_unwritten());
        }
        if clock.boot >= self.clean_stats_at {
            self.clean_stats_at = clock.boot + CLEAN_STATS;
            let second = jiff::Timestamp::try_from(clock.wall).unwrap_or_default().as_second();
            batch.ledger.forget_tokens(stats::oldest(second, HOURS_KEPT), stats::oldest(second, DAYS_KEPT))?;
        }
        Ok(())
    }

    /// Tells everybody, now that it counts; the views first, so that whoever is told sees its own part in them.
    fn answer(&mut self, served: Vec<Served>, clock: &Clock) {
        let mut seen: Vec<*const Account> = Vec::new();
        for Wanted { account, limits, .. } in served.iter().flat_map(|served| &served.draw.wanted) {
            if !seen.contains(&Arc::as_ptr(account)) {
                seen.push(Arc::as_ptr(account));
                account.publish(account.mirror().usage.view(limits, clock), clock.boot);
            }
        }
        if !seen.is_empty() {
            self.renew_at = self.renew_at.min(clock.boot + RENEW);
        }
        for Served { draw, decision } in served {
            match decision {
                Decision::Granted(at, counted, ahead) => {
                    if ahead > 0 {
                        self.keep_prefetched(&draw, at, counted, ahead, clock);
                    }
                    self.grant(draw, at, Some(counted));
                }
                Decision::Held(held) => self.refuse(draw, &held, clock),
            }
        }
    }

    /// What was drawn ahead is there for whoever comes next.
    fn keep_prefetched(&mut self, draw: &Draw, at: usize, counted: Counted, permits: u64, clock: &Clock) {
        let Some(Wanted { account, limits, .. }) = draw.wanted.get(at) else { return };
        // What is there holds no more, be it for another config's limits.
        self.give_back_prefetched(account, clock);
        account.prefetch.put(counted, limits, permits);
        // When the last one would have been too old, this one is not.
        self.prefetched.retain(|(known, _)| !Arc::ptr_eq(known, account));
        self.prefetched.push((Arc::clone(account), counted.at + prefetch::USABLE));
    }

    fn grant(&self, draw: Draw, at: usize, counted: Option<Counted>) {
        let Some(Wanted { account, limits, .. }) = draw.wanted.get(at) else { return };
        let counted = counted.filter(|_| limits.in_ledger());
        let permit = Permit::new(&self.client, account, limits, counted);
        let permit = if limits.is_concurrency_limited() { permit.in_flight() } else { permit };
        // Whoever is gone meanwhile drops the permit, which gives it back.
        drop(draw.reply.send(Drawn::Granted(at, permit)));
    }

    fn refuse(&mut self, draw: Draw, held: &[(usize, Held)], clock: &Clock) {
        let first = held.iter().map(|(_, held)| held.until).min().unwrap_or(clock.boot);
        let free_at = match draw.otherwise {
            Otherwise::WaitUntil(until) if until > clock.boot => {
                if !draw.reply.is_closed() {
                    self.scan_at = self.scan_at.min(first).min(until).min(clock.boot + SCAN);
                    self.waiting.insert(draw.ticket, draw);
                }
                return;
            }
            Otherwise::LookElsewhere | Otherwise::WaitUntil(_) => first,
            Otherwise::Refuse => promise(&draw.wanted, clock).unwrap_or(first),
        };
        let held = held.iter().map(|(at, held)| (*at, held.by)).collect();
        let refusal = Refusal { wait: clock.boot.until(free_at), held };
        // Whoever is gone meanwhile needs no answer.
        drop(draw.reply.send(Drawn::Refused(refusal)));
    }

    /// Endpoints that need no ledger are asked all the same; the others by what the config says.
    fn serve_without_ledger(&mut self, draws: Vec<Draw>, clock: &Clock) {
        for mut draw in draws {
            let may_go = |wanted: &Wanted| !wanted.limits.in_ledger() || self.on_error == LedgerOnError::Allow;
            let mut held = Vec::new();
            let mut granted = None;
            for (at, wanted) in draw.wanted.iter().enumerate().filter(|(_, wanted)| may_go(wanted)) {
                match enter(wanted, clock) {
                    Ok(()) => {
                        granted = Some((at, wanted.limits.in_ledger()));
                        break;
                    }
                    Err(by) => held.push((at, by)),
                }
            }
            if let Some((at, without_permit)) = granted {
                self.tally.uncounted.fetch_add(u64::from(without_permit), Ordering::Relaxed);
                self.grant(draw, at, None);
            } else if held.is_empty() {
                self.tally.denied.fetch_add(1, Ordering::Relaxed);
                // Whoever is gone meanwhile needs no answer.
                drop(draw.reply.send(Drawn::Unavailable));
            } else {
                // Nothing is promised: those that need the ledger may seem free, and are not.
                if draw.otherwise == Otherwise::Refuse {
                    draw.otherwise = Otherwise::LookElsewhere;
                }
                self.refuse(draw, &held, clock);
            }
        }
    }
}

/// Bills of the same kind as one: when many come together, most are.
fn merged(bills: impl Iterator<Item = Bill>) -> Vec<Bill> {
    /// Kinds that are looked through for each bill.
    const KINDS_MAX: usize = 32;
    let mut merged: Vec<Bill> = Vec::new();
    for bill in bills {
        let same = |known: &&mut Bill| {
            Arc::ptr_eq(&known.account, &bill.account)
                && Arc::ptr_eq(&known.limits, &bill.limits)
                && known.spent.is_kind_of(&bill.spent)
        };
        match merged.iter_mut().rev().take(KINDS_MAX).find(same) {
            Some(known) => known.spent.merge(&bill.spent),
            None => merged.push(bill),
        }
    }
    merged
}

/// Whoever does not want a permit.
fn answer_others(messages: Messages, clock: &Clock, written: bool) {
    let view = |(account, limits): &(Arc<Account>, Arc<Limits>)| -> View { account.mirror().usage.view(limits, clock) };
    // Whoever is gone meanwhile needs no answer, here and below.
    for look in messages.looks {
        drop(look.reply.send(look.accounts.iter().map(view).collect()));
    }
    for reset in messages.resets {
        reset.reply.send(written).unwrap_or_default();
    }
    for flush in messages.flushes {
        flush.send(written).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};
    use std::time::{Instant, SystemTime};

    use super::super::Spent;
    use super::super::sqlite::{Opening, SqliteLedger};
    use super::super::stats::{self, MODELS_MAX, OTHER_MODELS};
    use super::super::write_behind::WRITE_DELAY;
    use super::*;
    use crate::config::LedgerSync;
    use crate::config::test_support::config;
    use crate::limit::Hold;
    use crate::usage::{Cost, Speed, Tokens};
    use jiff::tz::TimeZone;

    /// 2026-11-25, noon, in UTC.
    const NOON: u64 = 1_795_608_000;

    /// One process: a allocator, its ledger, and a clock that a test moves.
    struct Process {
        client: Client,
        allocator: Allocator,
        ledger: SqliteLedger,
        now_ms: Arc<AtomicU64>,
        /// For timeouts, which never come here: its own clock stands still.
        runtime: Arc<tokio::runtime::Runtime>,
    }

    type Answer = std::pin::Pin<Box<dyn Future<Output = Drawn>>>;

    impl Process {
        fn new(folder: &std::path::Path, now_ms: &Arc<AtomicU64>, on_error: LedgerOnError) -> Self {
            let clock = {
                let (now_ms, base) = (Arc::clone(now_ms), Instant::now());
                move || {
                    let since = Duration::from_millis(now_ms.load(Ordering::Relaxed));
                    let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(NOON) + since;
                    Clock { now: base + since, boot: Stamp(now_ms.load(Ordering::Relaxed)), wall }
                }
            };
            let client = Client::new(clock);
            let boot = client.clock().boot;
            let opening = Opening { boot_id: Some("boot"), now: boot, minute_unknown: false };
            let ledger = SqliteLedger::open(&folder.join("ledger.db"), LedgerSync::Normal, &opening).unwrap();
            let allocator = Allocator::new(client.clone(), on_error, Arc::default());
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            Self { client, allocator, ledger, now_ms: Arc::clone(now_ms), runtime: Arc::new(runtime) }
        }

        fn alone() -> (tempfile::TempDir, Self) {
            let folder = tempfile::tempdir().unwrap();
            let process = Self::new(folder.path(), &Arc::new(AtomicU64::new(1_000_000)), LedgerOnError::Deny);
            (folder, process)
        }

        fn wanted(&self, id: &str, limits: &str) -> Wanted {
            let endpoint = config(&format!(r#"[{{"id":"{id}",{limits}}}]"#)).endpoints.remove(0);
            let account = self.client.account(&id.into());
            Wanted { account, limits: Arc::new(Limits::of(&endpoint, &TimeZone::UTC)), not_before: Stamp::default() }
        }

        fn ask(&self, wanted: &[Wanted], otherwise: Otherwise) -> Answer {
            let (client, wanted) = (self.client.clone(), wanted.to_vec());
            let _entered = self.runtime.enter();
            let mut answer: Answer = Box::pin(async move { client.draw(client.ticket(), wanted, otherwise).await });
            assert!(poll(&mut answer).is_pending());
            answer
        }

        fn serve(&mut self) {
            self.allocator.serve(Some(&mut self.ledger)).unwrap();
        }

        fn draw(&mut self, wanted: &[Wanted]) -> Drawn {
            let mut answer = self.ask(wanted, Otherwise::Refuse);
            self.serve();
            ready(&mut answer)
        }

        fn pass(&mut self, by: Duration) {
            self.now_ms.fetch_add(u64::try_from(by.as_millis()).unwrap(), Ordering::Relaxed);
            self.serve();
        }

        fn used(&mut self, wanted: &Wanted) -> (u64, u64) {
            let accounts = vec![(Arc::clone(&wanted.account), Arc::clone(&wanted.limits))];
            let client = self.client.clone();
            let mut look = Box::pin(async move { client.look(accounts).await.unwrap()[0] });
            let mut context = Context::from_waker(Waker::noop());
            assert!(look.as_mut().poll(&mut context).is_pending());
            self.serve();
            let Poll::Ready(view) = look.as_mut().poll(&mut context) else { panic!("no answer") };
            (view.minute.attempts, view.day.attempts)
        }
    }

    fn poll(answer: &mut Answer) -> Poll<Drawn> {
        answer.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    }

    fn ready(answer: &mut Answer) -> Drawn {
        match poll(answer) {
            Poll::Ready(drawn) => drawn,
            Poll::Pending => panic!("nobody answers"),
        }
    }

    fn spent(drawn: Drawn) -> usize {
        let Drawn::Granted(at, mut permit) = drawn else { panic!("{drawn:?}") };
        permit.spend();
        at
    }

    fn refused(drawn: Drawn) -> Refusal {
        let Drawn::Refused(refusal) = drawn else { panic!("{drawn:?}") };
        refusal
    }

    #[test]
    fn a_crowd_gets_every_permit_once_and_the_rest_a_moment_each() {
        let (_folder, mut process) = Process::alone();
        let wanted = [process.wanted("a", r#""rpm":100"#), process.wanted("b", r#""rpm":100"#)];
        let mut answers: Vec<_> = (0..1000).map(|_| process.ask(&wanted, Otherwise::Refuse)).collect();
        process.serve();
        let (mut granted, mut waits) = ([0, 0], Vec::new());
        for answer in &mut answers {
            match ready(answer) {
                Drawn::Granted(at, mut permit) => {
                    permit.spend();
                    granted[at] += 1;
                }
                Drawn::Refused(refusal) => {
                    assert_eq!(refusal.held, [(0, Hold::RequestsPerMinute(100)), (1, Hold::RequestsPerMinute(100))]);
                    waits.push(refusal.wait.as_millis());
                }
                Drawn::Unavailable => panic!("the ledger works"),
            }
        }
        assert_eq!(granted, [100, 100]);
        // 200 permits free at once, so 200 are told to come then, the next 200 a minute later, and so on.
        let rounds: Vec<_> = waits.chunk_by(|a, b| a == b).map(<[_]>::len).collect();
        assert_eq!(rounds, [200; 4], "{waits:?}");
        assert_eq!(waits[0], 60_500);
        let used = [process.used(&wanted[0]), process.used(&wanted[1])];
        assert_eq!(used, [(100, 100), (100, 100)]);
        // Whoever comes at the moment it was told gets a permit.
        process.pass(Duration::from_millis(60_500));
        let mut back: Vec<_> = (0..200).map(|_| process.ask(&wanted, Otherwise::Refuse)).collect();
        process.serve();
        assert!(back.iter_mut().all(|answer| matches!(ready(answer), Drawn::Granted(..))));
    }

    #[test]
    fn a_permit_that_nobody_takes_comes_back() {
        let (_folder, mut process) = Process::alone();
        let wanted = [process.wanted("a", r#""rpm":1,"rpd":1"#)];
        let answer = process.ask(&wanted, Otherwise::Refuse);
        process.serve();
        // The client went away between the grant and its hearing of it.
        drop(answer);
        process.serve();
        assert_eq!(process.used(&wanted[0]), (0, 0));
        assert!(matches!(process.draw(&wanted), Drawn::Granted(..)), "and this one is dropped unspent as well");
        assert_eq!(spent(process.draw(&wanted)), 0);
        assert_eq!(refused(process.draw(&wanted)).held, [(0, Hold::RequestsPerDay(1))], "the one that holds longest");
    }

    #[test]
    fn two_processes_share_what_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let now_ms = Arc::new(AtomicU64::new(1_000_000));
        let mut processes = [0, 1].map(|_| Process::new(folder.path(), &now_ms, LedgerOnError::Deny));
        let limits = r#""rpm":10,"rpd":100"#;
        let mut granted = 0;
        for turn in 0..30 {
            let process = &mut processes[turn % 2];
            let wanted = [process.wanted("a", limits)];
            if let Drawn::Granted(_, mut permit) = process.draw(&wanted) {
                permit.spend();
                granted += 1;
            }
        }
        assert_eq!(granted, 10);
        for process in &mut processes {
            let wanted = process.wanted("a", limits);
            assert_eq!(process.used(&wanted), (10, 10), "what is shown is the ledger's, not the process's own");
        }
    }

    #[test]
    fn those_who_wait_are_served_in_the_order_of_arrival() {
        let (_folder, mut process) = Process::alone();
        let wanted = [process.wanted("a", r#""rpm":2"#)];
        for _ in 0..2 {
            spent(process.draw(&wanted));
        }
        let until = process.client.clock().boot + Duration::from_secs(100);
        let mut waiting: Vec<_> = (0..4).map(|_| process.ask(&wanted, Otherwise::WaitUntil(until))).collect();
        process.serve();
        assert!(waiting.iter_mut().all(|answer| poll(answer).is_pending()));
        // One of them leaves; its place goes to the next.
        drop(waiting.remove(0));
        process.pass(Duration::from_mins(1));
        assert!(waiting.iter_mut().all(|answer| poll(answer).is_pending()));
        process.now_ms.fetch_add(500, Ordering::Relaxed);
        // A newcomer at the very moment does not go before them.
        let mut newcomer = process.ask(&wanted, Otherwise::LookElsewhere);
        process.serve();
        assert_eq!(spent(ready(&mut waiting[0])), 0);
        assert_eq!(spent(ready(&mut waiting[1])), 0);
        assert!(poll(&mut waiting[2]).is_pending());
        refused(ready(&mut newcomer));
        // The last one's time is up before another permit frees.
        process.pass(Duration::from_secs(40));
        let refusal = refused(ready(&mut waiting[2]));
        assert_eq!(refusal.wait, Duration::from_millis(20_500));
    }

    /// Draws one permit a millisecond, until permits are prefetched.
    fn busy(process: &mut Process, wanted: &Wanted) -> usize {
        let mut sent = 0;
        while process.client.draw_at_once(&wanted.account, &wanted.limits, &process.client.clock()).is_none() {
            let mut first_choice = process.ask(std::slice::from_ref(wanted), Otherwise::LookElsewhere);
            process.serve();
            spent(ready(&mut first_choice));
            process.now_ms.fetch_add(1, Ordering::Relaxed);
            sent += 1;
            assert!(sent < 100, "nothing is drawn ahead");
        }
        // The last look has taken one, and dropped it.
        process.serve();
        sent
    }

    #[test]
    fn what_is_drawn_ahead_counts_until_it_is_given_back() {
        let (folder, mut process) = Process::alone();
        let wanted = process.wanted("a", r#""rpm":1000000,"rpd":1000000"#);
        let sent = busy(&mut process, &wanted);
        let at_once =
            |process: &Process| process.client.draw_at_once(&wanted.account, &wanted.limits, &process.client.clock());
        for _ in 0..20 {
            at_once(&process).expect("there are more").spend();
        }
        let sent = u64::try_from(sent + 20).unwrap();
        let in_ledger = || {
            let ledger = rusqlite::Connection::open(folder.path().join("ledger.db")).unwrap();
            let sum = |table: &str| {
                let sql = format!("SELECT sum(attempts) FROM {table}");
                ledger.query_row(&sql, [], |row| row.get::<_, u64>(0)).unwrap()
            };
            assert_eq!(sum("minute"), sum("day"));
            sum("day")
        };
        let before = in_ledger();
        assert!(before > sent + 8, "a kill now would waste the rest: {before} of {sent}");
        // Whoever wants to know what is left is told the truth, and the rest is given back.
        assert_eq!(process.used(&wanted), (sent, sent));
        assert!(at_once(&process).is_none());
        assert_eq!(in_ledger(), sent);
        // By itself it is given back when it is old.
        let sent = sent + u64::try_from(busy(&mut process, &wanted)).unwrap();
        assert!(in_ledger() > sent + 8);
        assert!(process.allocator.next_due() <= process.client.clock().boot + prefetch::USABLE);
        process.pass(prefetch::USABLE);
        assert!(at_once(&process).is_none());
        assert_eq!((in_ledger(), process.used(&wanted)), (sent, (sent, sent)));
        // And before the thread ends.
        let sent = sent + u64::try_from(busy(&mut process, &wanted)).unwrap();
        process.client.close();
        process.serve();
        assert_eq!(in_ledger(), sent);
        assert!(process.allocator.is_all_written());
    }

    #[test]
    fn prefetched_permits_that_follow_others_last_as_long() {
        let (_folder, mut process) = Process::alone();
        let wanted = process.wanted("a", r#""rpm":1000000"#);
        let at_once =
            |process: &Process| process.client.draw_at_once(&wanted.account, &wanted.limits, &process.client.clock());
        busy(&mut process, &wanted);
        let first_ends = process.allocator.next_due();
        // It is used up early, and another one follows.
        while let Some(mut permit) = at_once(&process) {
            permit.spend();
        }
        busy(&mut process, &wanted);
        assert!(process.client.clock().boot < first_ends);
        let left = first_ends.0 - process.client.clock().boot.0;
        process.pass(Duration::from_millis(left));
        assert!(at_once(&process).is_some(), "it was given back with the first one");
    }

    #[test]
    fn nobody_is_refused_for_what_was_drawn_ahead() {
        let (_folder, mut process) = Process::alone();
        let wanted = process.wanted("a", r#""rpm":100000"#);
        busy(&mut process, &wanted);
        // Others use up all that is left of the minute.
        let clock = process.client.clock();
        let used = wanted.account.mirror().usage.view(&wanted.limits, &clock).minute.attempts;
        let now = Counted { at: clock.boot, days: wanted.limits.calendar.days(clock.wall) };
        wanted.account.mirror().usage.add(now, Counts { attempts: 100_000 - used, tokens: 0 });
        // Whoever asks to be told when to come back gets one of those that were drawn ahead, which are given back first.
        assert!(matches!(process.draw(std::slice::from_ref(&wanted)), Drawn::Granted(0, _)));
    }

    #[test]
    fn a_permit_is_swapped_without_anybody_coming_between() {
        let (_folder, mut process) = Process::alone();
        let wanted = [process.wanted("a", r#""rpm":1,"maxConcurrent":1"#)];
        let Drawn::Granted(0, mut old) = process.draw(&wanted) else { panic!("it is free") };
        let until = process.client.clock().boot + Duration::from_secs(100);
        let mut waiting = process.ask(&wanted, Otherwise::WaitUntil(until));
        process.serve();
        process.now_ms.fetch_add(1000, Ordering::Relaxed);
        assert!(old.is_stale(&process.client.clock()));
        let client = process.client.clone();
        let mut swapped: Answer = {
            let _entered = process.runtime.enter();
            let mut swapped: Answer = Box::pin(async move { client.swap(&mut old).await });
            assert!(poll(&mut swapped).is_pending());
            swapped
        };
        process.serve();
        let Drawn::Granted(0, mut fresh) = ready(&mut swapped) else { panic!("the one who waits was served first") };
        assert!(!fresh.is_stale(&process.client.clock()));
        assert_eq!(process.used(&wanted[0]), (1, 1), "one was given back for it");
        assert!(poll(&mut waiting).is_pending());
        fresh.spend();
        drop(swapped);
        drop(fresh);
        process.pass(Duration::from_millis(60_500));
        assert_eq!(spent(ready(&mut waiting)), 0);
    }

    #[test]
    fn whoever_waits_takes_what_comes_back_at_once() {
        let (_folder, mut process) = Process::alone();
        let wanted = [process.wanted("a", r#""maxConcurrent":1"#)];
        let Drawn::Granted(0, mut first) = process.draw(&wanted) else { panic!("it is free") };
        first.spend();
        let until = process.client.clock().boot + Duration::from_secs(100);
        let mut waiting = process.ask(&wanted, Otherwise::WaitUntil(until));
        process.serve();
        assert!(poll(&mut waiting).is_pending());
        drop(first);
        process.serve();
        assert!(matches!(ready(&mut waiting), Drawn::Granted(0, _)));
    }

    #[test]
    fn an_endpoint_that_rests_may_be_waited_for() {
        let (_folder, mut process) = Process::alone();
        let mut wanted = process.wanted("a", r#""rpm":1"#);
        wanted.not_before = process.client.clock().boot + Duration::from_secs(3);
        assert_eq!(
            refused(process.draw(&[wanted.clone()])),
            Refusal { wait: Duration::from_secs(3), held: vec![(0, Hold::Rest)] }
        );
        let until = process.client.clock().boot + Duration::from_secs(5);
        let mut waiting = process.ask(&[wanted], Otherwise::WaitUntil(until));
        process.serve();
        process.pass(Duration::from_secs(3));
        assert!(matches!(ready(&mut waiting), Drawn::Granted(0, _)));
    }

    #[test]
    fn attempts_without_limits_and_tokens_are_written_a_little_later() {
        let (folder, mut process) = Process::alone();
        let wanted = process.wanted("a", r#""rpm":-1"#);
        let endpoints = vec![(Arc::clone(&wanted.account), Arc::clone(&wanted.limits))];
        process.client.set_endpoints(endpoints);
        process.serve();
        for _ in 0..3 {
            process.client.unlimited(&wanted.account, &wanted.limits).spend();
        }
        let tokens = Tokens { prompt: 3, completion: 4, total: 7, cached: 1, reasoning: 2, audio: 5 };
        let speed = Speed { streams: 1, tokens: 4, first_token_ms: 10, ms: 20 };
        let wall = process.client.clock().wall;
        for cost in [Cost::exact(tokens, speed), Cost::exact(tokens, speed), Cost::estimated(100, 200)] {
            let spent = Spent::now(wanted.account.id(), "m", cost, &TimeZone::UTC, wall);
            let now = process.client.clock().boot;
            process.client.spend_tokens(&wanted.account, &wanted.limits, spent, now);
        }
        process.serve();
        assert!(!process.allocator.is_all_written());
        process.pass(WRITE_DELAY);
        assert!(process.allocator.is_all_written());
        assert_eq!(process.used(&wanted), (3, 3));
        let stats = stats::read(&folder.path().join("ledger.db"), wall).unwrap();
        let model = &stats["a"]["m"];
        let mut cost = Cost::exact(tokens, speed);
        cost.merge(&Cost::exact(tokens, speed));
        assert_eq!((cost.exact.requests, cost.exact.tokens.total, cost.exact.tokens.audio), (2, 14, 10));
        cost.merge(&Cost::estimated(100, 200));
        assert_eq!((cost.exact.requests, cost.exact.tokens.total), (2, 14), "estimates are not mixed in");
        assert_eq!((model.cost, cost.tokens()), (cost, 314));
        assert_eq!(model.hours.values().sum::<u64>(), 14);
        assert_eq!(model.days.keys().copied().collect::<Vec<_>>(), [i64::try_from(NOON).unwrap() - 12 * 3600]);
    }

    #[test]
    fn models_beyond_the_bound_are_one() {
        let (folder, mut process) = Process::alone();
        let wanted = process.wanted("a", r#""rpm":-1"#);
        let wall = process.client.clock().wall;
        for number in 0..MODELS_MAX + 10 {
            let cost = Cost::exact(Tokens::default(), Speed::default());
            let spent = Spent::now(wanted.account.id(), &format!("m{number}"), cost, &TimeZone::UTC, wall);
            let now = process.client.clock().boot;
            process.client.spend_tokens(&wanted.account, &wanted.limits, spent, now);
        }
        process.serve();
        process.pass(WRITE_DELAY);
        let stats = stats::read(&folder.path().join("ledger.db"), wall).unwrap();
        assert_eq!(stats["a"].len(), MODELS_MAX + 1);
        assert_eq!(stats["a"][OTHER_MODELS].cost.exact.requests, 10);
    }

    #[test]
    fn without_the_ledger_only_endpoints_without_limits_are_asked_unless_the_config_says_otherwise() {
        let now_ms = Arc::new(AtomicU64::new(1_000_000));
        for (on_error, expected) in [(LedgerOnError::Deny, 1), (LedgerOnError::Allow, 0)] {
            let folder = tempfile::tempdir().unwrap();
            let mut process = Process::new(folder.path(), &now_ms, on_error);
            let wanted = [process.wanted("a", r#""rpm":1"#), process.wanted("b", r#""rpm":-1"#)];
            let mut answer = process.ask(&wanted, Otherwise::Refuse);
            assert!(process.allocator.serve(None).is_err());
            assert_eq!(spent(ready(&mut answer)), expected);
            let mut only_limited = process.ask(&wanted[..1], Otherwise::Refuse);
            assert!(process.allocator.serve(None).is_err());
            let drawn = ready(&mut only_limited);
            assert_eq!(matches!(drawn, Drawn::Unavailable), on_error == LedgerOnError::Deny, "{drawn:?}");
            let tally = &process.allocator.tally;
            let counts = [&tally.denied, &tally.uncounted].map(|count| count.load(Ordering::Relaxed));
            assert_eq!(counts, if on_error == LedgerOnError::Deny { [1, 0] } else { [0, 2] });
            assert_eq!(process.client.is_down(), on_error == LedgerOnError::Deny);
            // What went on uncounted is counted once the ledger can be written again.
            process.client.set_endpoints(vec![(Arc::clone(&wanted[0].account), Arc::clone(&wanted[0].limits))]);
            process.pass(RENEW);
            process.pass(RENEW);
            let counted = process.used(&wanted[0]).0;
            assert_eq!(counted, u64::from(on_error == LedgerOnError::Allow));
            assert!(!process.client.is_down());
        }
    }

    #[test]
    fn without_the_ledger_a_refusal_names_a_moment_to_come() {
        let (_folder, mut process) = Process::alone();
        let wanted = [process.wanted("a", r#""rpm":1"#), process.wanted("b", r#""maxConcurrent":1"#)];
        let Drawn::Granted(0, _busy) = process.draw(&wanted[1..]) else { panic!("it is free") };
        let mut answer = process.ask(&wanted, Otherwise::Refuse);
        assert!(process.allocator.serve(None).is_err());
        let refusal = refused(ready(&mut answer));
        assert_eq!(refusal, Refusal { wait: Duration::from_secs(1), held: vec![(1, Hold::Concurrent(1))] });
    }

    #[test]
    fn a_group_that_fails_counts_nothing() {
        let (folder, mut process) = Process::alone();
        let wanted = [process.wanted("a", r#""rpm":2,"maxConcurrent":1"#)];
        let holder = rusqlite::Connection::open(folder.path().join("ledger.db")).unwrap();
        process.ledger.set_lock_wait(Duration::from_millis(1));
        holder.execute_batch("BEGIN IMMEDIATE").unwrap();
        let mut answer = process.ask(&wanted, Otherwise::Refuse);
        let error = process.allocator.serve(Some(&mut process.ledger)).unwrap_err();
        assert_eq!(error.kind, FaultKind::Locked, "{error}");
        assert!(matches!(ready(&mut answer), Drawn::Unavailable));
        holder.execute_batch("ROLLBACK").unwrap();
        assert_eq!(process.used(&wanted[0]), (0, 0));
        assert_eq!(spent(process.draw(&wanted)), 0);
    }

    #[test]
    fn a_waiting_draw_does_not_keep_the_thread_busy() {
        let (_folder, mut process) = Process::alone();
        let wanted = [process.wanted("a", r#""rpm":1"#)];
        spent(process.draw(&wanted));
        let until = process.client.clock().boot + Duration::from_secs(100);
        let waiting = process.ask(&wanted, Otherwise::WaitUntil(until));
        process.serve();
        let now = process.client.clock().boot;
        assert!(process.allocator.next_due() > now, "there is nothing to do at this moment");
        assert!(process.allocator.next_due() <= now + SCAN);
        drop(waiting);
        for _ in 0..100 {
            process.pass(Duration::from_secs(1));
        }
        assert_eq!(process.allocator.next_due(), Stamp::NEVER, "and once all has freed, never again");
    }
}
