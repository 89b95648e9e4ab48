//! Allocator: grants permits. All draws of one moment are served in one batch: they are decided one after the other,
//! written together, and answered once the batch is committed.
//!
//! The allocator mirrors the ledger's counts of each account, so a batch reads only the counts that another process
//! has changed since the last batch.

mod promised;
mod replies;
mod spending;
mod turns;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use jiff::tz::TimeZone;

use super::account::Entry;
use super::batch::{
    Batch, Decision, Doubtful, Served, decide_without_ledger, is_first_choice, needs_ledger, unknown_rows,
};
use super::messages::{Bill, Draw, Listed, Messages, Return};
use super::places::ThingKind;
use super::prefetch::PrefetchedPermits;
use super::stats::{self, DAYS_KEPT, HOURS_KEPT};
use super::write_behind::WriteBehind;
use super::{Account, AccountId, AccountSet, Change, Client, FaultKind, Ledger, LedgerError, LimitedAccount, Rows};
use crate::config::LedgerOnError;
use crate::limit::{Clock, CountedAt, Counts, Slot, Stamp};
use replies::answer_others;
pub(super) use spending::Spending;

/// Time between two updates of the views while anything counts, so that they show expired counts and the draws of other
/// processes.
const RENEW: Duration = Duration::from_secs(1);
/// Longest time between two passes over the queue, since another process may give permits back.
const SCAN: Duration = Duration::from_millis(250);
/// Time between two removals of slots that no longer count.
const CLEAN: Duration = Duration::from_secs(10);
/// Accounts that are updated at once, since permits wait meanwhile. More are updated one part after the other, all of them in [`RENEW`].
const RENEWED_MAX: usize = 1000;
/// Parts in which accounts are updated; of more than so many parts a round takes longer.
const PARTS_MAX: usize = 50;
/// Rounds of one batch, each of which takes a journey to the ledger where others write it too. Draws that still have nothing certain then are
/// held by what is known.
const ROUNDS_MAX: usize = 4;
/// Time between two removals of statistics that are too old.
const CLEAN_STATS: Duration = Duration::from_hours(1);

/// Draws and answers that were handled without the ledger.
#[derive(Debug, Default)]
pub struct Tally {
    /// Draws refused because the ledger could not be used.
    pub denied: AtomicU64,
    /// Attempts sent without a permit because the ledger could not be used. They are counted once it can be written
    /// again.
    pub uncounted: AtomicU64,
    /// Answers whose tokens were lost because the ledger could not be written.
    pub lost: AtomicU64,
}

/// Allocator of one process.
#[derive(Debug)]
pub struct Allocator {
    client: Client,
    on_error: LedgerOnError,
    tally: Arc<Tally>,
    /// The accounts of the current config, and those of earlier ones that are still in use.
    accounts: HashMap<AccountId, Listed>,
    /// Draws in the queue, in the order of arrival. The places of the queue bound their number.
    waiting: BTreeMap<u64, Draw>,
    turns: turns::Turns,
    spending: Spending,
    /// Moments at which refused callers were told to come back.
    promised: promised::Promised,
    scan_at: Stamp,
    write_behind: WriteBehind,
    /// Account sets with prefetched permits, and the moment at which those are given back.
    prefetched: Vec<(Arc<AccountSet>, Stamp)>,
    renew_at: Stamp,
    clean_at: Stamp,
    clean_stats_at: Stamp,
    /// True while there are more places than may be kept.
    has_surplus: bool,
    /// Accounts that this round of updates has come to; 0 at its end.
    renewed: usize,
    /// True if this round removes what is too old.
    round_cleans: bool,
}

/// Result of [`Allocator::serve`]: it shows whether the ledger works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Used {
    /// The ledger was used without an error.
    Ledger,
    /// The ledger was not needed.
    Nothing,
}

/// What has become of a batch.
#[derive(Debug)]
struct Done {
    clock: Clock,
    /// True if everything but draws is done.
    is_written: bool,
    /// Draws that were not decided.
    failed: Vec<Draw>,
    error: Option<LedgerError>,
}

/// Background work that is due, by the clock at the time the messages were received.
#[derive(Clone, Copy, Debug)]
struct Due {
    writes: bool,
    renews: bool,
}

impl Allocator {
    /// Returns an allocator for the clients of this inbox.
    pub fn new(client: Client, on_error: LedgerOnError, tally: Arc<Tally>) -> Self {
        Self {
            client,
            on_error,
            tally,
            accounts: HashMap::new(),
            waiting: BTreeMap::new(),
            turns: turns::Turns::default(),
            spending: Spending::default(),
            promised: promised::Promised::default(),
            scan_at: Stamp::NEVER,
            write_behind: WriteBehind::default(),
            prefetched: Vec::new(),
            renew_at: Stamp::NEVER,
            clean_at: Stamp::default(),
            clean_stats_at: Stamp::default(),
            has_surplus: false,
            renewed: 0,
            round_cleans: false,
        }
    }

    /// Returns the moment at which there is work to do even without a message.
    pub fn next_due(&self) -> Stamp {
        let stale_at = self.prefetched.iter().map(|(_, until)| *until).min().unwrap_or(Stamp::NEVER);
        self.scan_at.min(self.write_behind.due_at).min(self.renew_at).min(stale_at)
    }

    /// True if everything that was counted is in the ledger.
    pub fn is_all_written(&self) -> bool {
        self.write_behind.is_empty() && self.prefetched.is_empty() && self.spending.is_written()
    }

    /// Serves all messages and all work that is due, with the ledger or, if it cannot be used, without. Returns an
    /// error if the ledger could not be used; every message gets a reply even then.
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
        // What is given back for another permit is written with it.
        let draws = self.draws_due(std::mem::take(&mut messages.draws), &clock);
        let due = Due { writes: clock.boot >= self.write_behind.due_at, renews: clock.boot >= self.renew_at };
        if due.writes {
            self.collect_unwritten(&clock);
        }
        let asks = !messages.looks.is_empty()
            || !messages.resets.is_empty()
            || !messages.finds.is_empty()
            || !messages.budget_looks.is_empty()
            || !messages.extends.is_empty()
            || !messages.flushes.is_empty();
        if !due.writes && !due.renews && !asks && !draws.iter().any(needs_ledger) {
            let served = draws.into_iter().map(|draw| decide_without_ledger(draw, &clock)).collect();
            self.answer(served, &clock);
            return Ok(Used::Nothing);
        }
        let Done { clock, is_written, failed, error } = if let Some(ledger) = ledger {
            self.batch(ledger, draws, &mut messages, due)
        } else {
            let unusable = LedgerError { kind: FaultKind::Unusable, message: String::new() };
            Done { clock, is_written: false, failed: draws, error: Some(unusable) }
        };
        let Some(error) = error else {
            answer_others(messages, &clock, is_written);
            return Ok(Used::Ledger);
        };
        self.client.set_down(self.on_error == LedgerOnError::Deny);
        self.serve_without_ledger(failed, &clock);
        answer_others(messages, &clock, is_written);
        // The write is not retried at once.
        self.write_behind.postpone(&clock);
        self.renew_at = self.renew_at.max(clock.boot + RENEW);
        Err(error)
    }

    /// Gives prefetched permits back: once they are old, before the number of permits left is reported or needed
    /// exactly, and on a new config, a flush and the end of the thread.
    fn clear_prefetched(&mut self, messages: &Messages, clock: &Clock) {
        if self.prefetched.is_empty() {
            return;
        }
        let clears_all = messages.closing || messages.new_config || !messages.flushes.is_empty();
        let looked_at = messages.looks.iter().flat_map(|look| &look.accounts);
        let exact_draws = || messages.draws.iter().filter(|draw| !is_first_choice(draw));
        let of_endpoints = exact_draws().flat_map(|draw| &draw.wanted).map(|wanted| &wanted.accounts);
        let of_callers = exact_draws().filter_map(|draw| Some(&draw.caller.as_ref()?.accounts));
        let drawn_from = of_endpoints.chain(of_callers).flat_map(|accounts| accounts.accounts());
        let asked: HashSet<*const Account> = looked_at.chain(drawn_from).map(|of| Arc::as_ptr(&of.account)).collect();
        let is_asked = |of: &LimitedAccount| asked.contains(&Arc::as_ptr(&of.account));
        let is_due = |(accounts, until): &mut (Arc<AccountSet>, Stamp)| {
            clears_all || *until <= clock.boot || accounts.accounts().iter().any(is_asked)
        };
        let cleared: Vec<Arc<AccountSet>> =
            self.prefetched.extract_if(.., is_due).map(|(accounts, _)| accounts).collect();
        for accounts in &cleared {
            self.give_back_prefetched(accounts, clock);
        }
    }

    fn give_back_prefetched(&mut self, accounts: &AccountSet, clock: &Clock) {
        let Some(PrefetchedPermits { counted, permits }) = accounts.prefetch.take_all() else { return };
        self.give_back(accounts, counted, Counts { attempts: permits, tokens: 0 }, clock);
    }

    /// Takes back attempts that were counted and never sent, and tokens that were reserved.
    fn give_back(&mut self, accounts: &AccountSet, counted: CountedAt, counts: Counts, clock: &Clock) {
        let less = |count: u64| -i64::try_from(count).unwrap_or(i64::MAX);
        let (attempts, tokens) = (less(counts.attempts), less(counts.tokens));
        for LimitedAccount { account, limits } in accounts.accounts() {
            let entry = Entry::new(limits.counted(counted), Change { attempts, tokens });
            account.mirror().quota.change(entry.slot, entry.days, attempts, tokens);
            account.look_again();
            self.write_behind.add(account, entry);
        }
        // Written at once: after a kill, the permits would count for attempts that were never made.
        self.write_behind.due_at = clock.boot;
    }

    /// Handles the messages that need no reply.
    fn take_in(&mut self, messages: &mut Messages, clock: &Clock) {
        for listed in messages.listed.drain(..) {
            self.list(listed);
        }
        if messages.new_config {
            self.renew_at = clock.boot;
        }
        if messages.unwritten {
            self.write_behind.due_soon(clock);
        }
        for change in messages.places.drain(..) {
            self.write_behind.add_place(change);
            self.write_behind.due_soon(clock);
            self.renew_at = self.renew_at.min(clock.boot + RENEW);
        }
        for (endpoint, list) in messages.model_lists.drain(..) {
            self.write_behind.add_models(endpoint, list);
            self.write_behind.due_soon(clock);
        }
        for notice in messages.notices.drain(..) {
            self.write_behind.add_notice(notice);
            self.write_behind.due_soon(clock);
        }
        // What was noted before is written first, and then read.
        if !messages.finds.is_empty() || !messages.flushes.is_empty() || !messages.resets.is_empty() || messages.closing
        {
            self.write_behind.due_at = clock.boot;
        }
        for settled in messages.settled.drain(..) {
            self.spending.settle(settled);
            self.write_behind.due_soon(clock);
        }
        for unreserved in messages.unreserved.drain(..) {
            self.spending.take_unreserved(unreserved);
            self.write_behind.due_soon(clock);
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

    /// Lists an account, with the limits of the newest config that has it.
    fn list(&mut self, listed: Listed) {
        let known = self.accounts.get(listed.of.account.id());
        if known.is_none_or(|known| known.config <= listed.config) {
            self.accounts.insert(listed.of.account.id().clone(), listed);
        }
    }

    fn take_back(&mut self, returned: Return, clock: &Clock) {
        let Return { accounts, counted, concurrent } = returned;
        if concurrent {
            accounts.release();
            accounts.accounts().iter().for_each(|of| of.account.look_again());
            if accounts.accounts().iter().any(LimitedAccount::shares_concurrency) {
                // Others may wait for its place.
                self.write_behind.note_in_flight(&accounts);
                self.write_behind.due_at = clock.boot;
            }
        }
        if let Some((counted, counts)) = counted {
            self.give_back(&accounts, counted, counts, clock);
        }
    }

    fn take_bill(&mut self, bill: Bill, clock: &Clock) {
        let Bill { accounts, caller, spent } = bill;
        let now = CountedAt::now(clock);
        let tokens = spent.cost.tokens();
        let change = Change { attempts: 0, tokens: i64::try_from(tokens).unwrap_or(i64::MAX) };
        let of_caller = caller.iter().flat_map(|accounts| accounts.accounts());
        for of in accounts.accounts().iter().chain(of_caller) {
            let counted = of.limits.counted(now);
            of.account.mirror().quota.add(counted, Counts { attempts: 0, tokens });
            self.write_behind.add(&of.account, Entry::new(counted, change));
            of.publish(clock);
        }
        self.write_behind.add_spent(spent, &self.tally);
        self.write_behind.due_soon(clock);
        self.renew_at = self.renew_at.min(clock.boot + RENEW);
    }

    /// Collects the attempts that were sent without a permit from the ledger.
    fn collect_unwritten(&mut self, clock: &Clock) {
        for LimitedAccount { account, limits } in self.accounts.values().map(|listed| &listed.of) {
            let attempts = account.take_unwritten();
            if attempts > 0 {
                let now = limits.counted(CountedAt::now(clock));
                let mut mirror = account.mirror();
                mirror.quota.forget(clock.boot);
                mirror.quota.add(now, Counts { attempts, tokens: 0 });
                drop(mirror);
                let attempts = i64::try_from(attempts).unwrap_or(i64::MAX);
                self.write_behind.add(account, Entry::new(now, Change { attempts, tokens: 0 }));
                self.renew_at = self.renew_at.min(clock.boot + RENEW);
            }
        }
    }

    /// Returns the draws to serve, without those whose client is gone: first swaps of permits, then the queue if it is
    /// time for a pass over it, then new draws.
    fn draws_due(&mut self, newcomers: Vec<Draw>, clock: &Clock) -> Vec<Draw> {
        let (mut draws, newcomers): (Vec<_>, Vec<_>) =
            newcomers.into_iter().partition(|draw| draw.instead_of.is_some());
        for draw in &mut draws {
            if let Some(returned) = draw.instead_of.take() {
                draw.keeps_place = returned.concurrent;
                self.take_back(returned, clock);
                self.scan_at = self.scan_at.min(clock.boot);
            }
        }
        if self.waiting.is_empty() && self.client.queued() == 0 {
            self.turns.clear();
        }
        if clock.boot >= self.scan_at {
            self.scan_at = Stamp::NEVER;
            draws.extend(self.turns.order(std::mem::take(&mut self.waiting)));
        }
        draws.extend(newcomers);
        draws.retain(|draw| !draw.reply.is_closed());
        draws
    }

    /// Does everything that is due in one transaction of the ledger, and serves the draws; those that have to be decided anew take another
    /// one. What fails was not done.
    fn batch(&mut self, ledger: &mut dyn Ledger, draws: Vec<Draw>, messages: &mut Messages, due: Due) -> Done {
        let generation = match ledger.begin() {
            Ok(generation) => generation,
            Err(error) => {
                return Done { clock: self.client.clock(), is_written: false, failed: draws, error: Some(error) };
            }
        };
        // Read only now: the ledger may have waited for another process's batch.
        let clock = self.client.clock();
        let mut batch = Batch {
            ledger,
            generation,
            clock,
            claims: Vec::new(),
            drawn: Vec::new(),
            spending: std::mem::take(&mut self.spending),
            doubtful: Doubtful::default(),
            is_last_round: false,
            // Nor beside a question for what is used, which asks for what was sent.
            may_prefetch: self.waiting.is_empty() && !messages.closing && messages.looks.is_empty(),
        };
        let mut done = Done { clock, is_written: false, failed: Vec::new(), error: None };
        let mut draws = draws;
        if let Err(error) = self.fetch(&mut batch, &draws, messages, due) {
            batch.ledger.roll_back();
            (done.failed, done.error) = (std::mem::take(&mut draws), Some(error));
        }
        for round in 1..=ROUNDS_MAX {
            if done.error.is_some() || round > 1 && draws.is_empty() {
                break;
            }
            batch.is_last_round = round == ROUNDS_MAX;
            let work = (round == 1).then_some((&mut *messages, due));
            match self.round(&mut batch, std::mem::take(&mut draws), work) {
                Ok((served, again)) => {
                    if round == 1 {
                        done.is_written = true;
                        self.client.set_down(false);
                        self.forget_written(&clock, due);
                    }
                    self.answer(served, &clock);
                    draws = again;
                }
                Err((error, failed)) => {
                    if round == 1 && error.kind == FaultKind::Unanswered {
                        self.forget_written(&clock, due);
                    }
                    (done.failed, done.error) = (failed, Some(error));
                }
            }
        }
        self.spending = batch.spending;
        if self.spending.is_busy() {
            self.renew_at = self.renew_at.min(clock.boot + RENEW);
        }
        done
    }

    /// Decides draws, writes what they take and everything else that is due, and commits. Returns what is decided, and the draws that
    /// have to be decided anew.
    #[expect(clippy::type_complexity, reason = "each part is used once")]
    fn round(
        &mut self,
        batch: &mut Batch<'_>,
        draws: Vec<Draw>,
        work: Option<(&mut Messages, Due)>,
    ) -> Result<(Vec<Served>, Vec<Draw>), (LedgerError, Vec<Draw>)> {
        let mut served = Vec::with_capacity(draws.len());
        let mut draws = draws.into_iter();
        let decided = loop {
            let Some(draw) = draws.next() else { break Ok(()) };
            match batch.decide(&draw) {
                Ok(decision) => served.push(Served { draw, decision }),
                Err(error) => {
                    served.push(Served { draw, decision: Decision::Held(Vec::new()) });
                    break Err(error);
                }
            }
        };
        let written = decided.and_then(|()| match work {
            Some((messages, due)) => self.write_work(batch, messages, due),
            None => write_settled(batch, false),
        });
        match written.and_then(|()| batch.commit()) {
            Ok((claims, verdict)) => {
                let again = batch.settle(&claims, verdict, &mut served);
                // What stays in flight without a new permit was written as ended.
                let stays =
                    |served: &&Served| served.draw.keeps_place && !matches!(served.decision, Decision::Granted(_));
                for wanted in served.iter().filter(stays).filter_map(|served| served.draw.wanted.first()) {
                    self.write_behind.note_in_flight(&wanted.accounts);
                    self.write_behind.due_soon(&batch.clock);
                }
                Ok((served, again))
            }
            Err(error) => {
                batch.ledger.roll_back();
                batch.undo(&served, error.kind == FaultKind::Unanswered);
                Err((error, served.into_iter().map(|served| served.draw).chain(draws).collect()))
            }
        }
    }

    /// Reads what this batch needs, where each row would take a journey of its own.
    fn fetch(
        &mut self,
        batch: &mut Batch<'_>,
        draws: &[Draw],
        messages: &Messages,
        due: Due,
    ) -> Result<(), LedgerError> {
        if batch.ledger.is_exclusive() {
            return Ok(());
        }
        let mut rows = Rows { accounts: unknown_rows(draws, &*batch.ledger, &batch.clock), budgets: Vec::new() };
        let looked_at = messages.looks.iter().flat_map(|look| &look.accounts);
        let renewed = self.accounts.values().skip(self.renewed).take(if due.renews { RENEWED_MAX } else { 0 });
        let renewed = renewed.map(|listed| &listed.of).filter(|of| is_renewed(of));
        let known: HashSet<AccountId> = rows.accounts.iter().map(|(id, _)| id.clone()).collect();
        let fresh = looked_at.chain(renewed).filter(|of| !known.contains(of.account.id()));
        rows.accounts.extend(fresh.map(|of| of.row(&batch.clock)));
        messages.budget_looks.iter().for_each(|look| batch.spending.read_again_of(&look.set));
        let sets = draws.iter().filter_map(|draw| draw.budgets.as_ref());
        let sets = sets.chain(messages.budget_looks.iter().map(|look| &look.set));
        let sets = sets.chain(messages.extends.iter().map(|extend| &extend.set));
        rows.budgets = batch.spending.unknown(sets, batch.ledger.trusted_since());
        if rows.is_empty() { Ok(()) } else { batch.ledger.fetch(&rows) }
    }

    /// Writes everything but the draws. Reading comes before writing: counts that are read after they were written would count twice.
    fn write_work(&mut self, batch: &mut Batch<'_>, messages: &mut Messages, due: Due) -> Result<(), LedgerError> {
        for look in &messages.looks {
            look.accounts.iter().try_for_each(|of| batch.read_fresh(of))?;
        }
        for look in &mut messages.budget_looks {
            look.found = batch.spending.views(&look.set, (&mut *batch.ledger, batch.generation, &batch.clock))?;
        }
        for extend in &messages.extends {
            batch.spending.extend(extend, (&mut *batch.ledger, batch.generation, &batch.clock))?;
        }
        if due.renews {
            self.renew(batch)?;
        }
        batch.spending.write_alive(batch.ledger, &batch.clock)?;
        if due.writes {
            self.write_behind.write(batch)?;
        }
        write_settled(batch, due.writes)?;
        for reset in &messages.resets {
            batch.ledger.reset_tokens(reset.endpoint.as_deref())?;
        }
        let now = batch.clock.seconds_after(Duration::ZERO);
        for find in &mut messages.finds {
            find.found = batch.ledger.places(&find.things, now)?;
        }
        Ok(())
    }

    fn forget_written(&mut self, clock: &Clock, due: Due) {
        if due.writes {
            self.write_behind.forget_written();
        }
        if due.renews {
            let is_moving = self.accounts.values().any(|listed| listed.of.account.mirror().quota.is_moving());
            let goes_on = is_moving || self.has_surplus || self.renewed > 0 || self.spending.is_busy();
            let parts = self.accounts.len().div_ceil(RENEWED_MAX).clamp(1, PARTS_MAX);
            let pause = RENEW / u32::try_from(parts).unwrap_or(1);
            self.renew_at = if goes_on { clock.boot + pause } else { Stamp::NEVER };
        }
    }

    /// Updates the views, which then show expired counts, and removes what is too old.
    fn renew(&mut self, batch: &mut Batch<'_>) -> Result<(), LedgerError> {
        let clock = batch.clock;
        batch.spending.look_after_others(batch.ledger, &clock)?;
        let begins = self.renewed == 0;
        let cleans = begins && clock.boot >= self.clean_at;
        if begins {
            self.round_cleans = cleans;
        }
        for Listed { of, .. } in self.accounts.values().skip(self.renewed).take(RENEWED_MAX) {
            if !is_renewed(of) {
                continue;
            }
            batch.read_fresh(of)?;
            of.publish(&clock);
            if self.round_cleans {
                batch.ledger.forget(of.account.id(), Slot::oldest_that_counts(clock.boot))?;
            }
        }
        self.renewed = Some(self.renewed + RENEWED_MAX).filter(|next| *next < self.accounts.len()).unwrap_or_default();
        if cleans {
            let looks = self.has_surplus || clock.boot >= self.clean_stats_at;
            self.has_surplus = false;
            for kind in ThingKind::ALL {
                self.has_surplus |= batch.ledger.forget_places(kind, clock.seconds_after(Duration::ZERO), looks)?;
            }
            // Piece by piece, since permits wait for each.
            self.clean_at = clock.boot + if self.has_surplus { RENEW } else { CLEAN };
            // Removes accounts that no config and no request uses any more, and that have nothing left to be written.
            let in_use = |of: &LimitedAccount| Arc::strong_count(&of.account) > 1 || of.account.has_unwritten();
            self.accounts.retain(|_, listed| in_use(&listed.of));
            batch.spending.clean(clock.boot);
        }
        if clock.boot >= self.clean_stats_at {
            self.clean_stats_at = clock.boot + CLEAN_STATS;
            let now = jiff::Timestamp::try_from(clock.wall).unwrap_or_default();
            let oldest = |kept| stats::oldest(now.as_second(), kept);
            batch.ledger.forget_tokens(oldest(HOURS_KEPT), oldest(DAYS_KEPT))?;
            let oldest_day = TimeZone::UTC.to_datetime(now.saturating_sub(DAYS_KEPT).unwrap_or(now)).date();
            for Listed { of, .. } in self.accounts.values() {
                batch.ledger.forget_days(of.account.id(), oldest_day)?;
            }
        }
        Ok(())
    }
}

/// Writes what was settled, if it is due or anything is reserved: what is reserved now had room because of what was settled, so both are
/// written or neither.
fn write_settled(batch: &mut Batch<'_>, is_due: bool) -> Result<(), LedgerError> {
    if is_due || batch.spending.has_made() {
        batch.spending.write_settled((&mut *batch.ledger, batch.generation, &batch.clock))?;
    }
    Ok(())
}

/// True if the view of an account has to be updated: its counts expire, or are not known.
fn is_renewed(of: &LimitedAccount) -> bool {
    let mirror = of.account.mirror();
    mirror.read_at.is_none() || mirror.quota.is_moving()
}

/// Merges bills of the same kind: if many arrive together, most are.
fn merged(bills: impl Iterator<Item = Bill>) -> Vec<Bill> {
    /// Number of kinds that each bill is compared with.
    const KINDS_MAX: usize = 32;
    let mut merged: Vec<Bill> = Vec::new();
    for bill in bills {
        let same_caller = |known: &Bill| match (&known.caller, &bill.caller) {
            (None, None) => true,
            (Some(known), Some(caller)) => Arc::ptr_eq(known, caller),
            _ => false,
        };
        let same = |known: &&mut Bill| {
            Arc::ptr_eq(&known.accounts, &bill.accounts) && same_caller(known) && known.spent.is_kind_of(&bill.spent)
        };
        match merged.iter_mut().rev().take(KINDS_MAX).find(same) {
            Some(known) => known.spent.merge(&bill.spent),
            None => merged.push(bill),
        }
    }
    merged
}

#[cfg(test)]
mod tests;
