//! Decisions on one batch of draws: each draw counts for the first endpoint of its list that has a permit.

use std::sync::Arc;

use super::account::{Entry, Mirror};
use super::account_set::{HeldAccount, NextFree};
use super::allocator::Spending;
use super::budgets::{HeldBudget, Spends};
use super::messages::{CallerDraw, Draw, HeldEndpoint, Otherwise};
use super::prefetch::spare;
use super::{Account, AccountSet, Change, Ledger, LedgerError, LimitedAccount, Wanted};
use crate::limit::{Clock, CountedAt, Counts, Held, LimitReason, Minute, Slot};

/// A draw and its decision.
pub(super) struct Served {
    pub(super) draw: Draw,
    pub(super) decision: Decision,
}

pub(super) enum Decision {
    /// Granted by the endpoint at this position in the list; when it was counted; numbers of permits prefetched with it; number of what
    /// is reserved of budgets.
    Granted(usize, CountedAt, Ahead, Option<u64>),
    Held(Vec<HeldEndpoint>),
    /// The caller's own account is at a limit.
    HeldByCaller(HeldAccount),
    /// The caller's budget has no room for it.
    HeldByBudget(HeldBudget),
}

/// Permits that were prefetched together with one.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ahead {
    pub(super) endpoint: u64,
    pub(super) caller: u64,
}

/// State of one batch.
pub(super) struct Batch<'a> {
    pub(super) ledger: &'a mut dyn Ledger,
    pub(super) generation: u64,
    pub(super) clock: Clock,
    /// Accounts from which permits were drawn.
    pub(super) drawn: Vec<Arc<Account>>,
    /// Budgets, and what is reserved of them in this batch.
    pub(super) spending: Spending,
    /// True if permits may be prefetched: no draw waits in the queue and the thread is not closing.
    pub(super) may_prefetch: bool,
}

impl Batch<'_> {
    /// Writes the permits drawn in this batch.
    pub(super) fn write_drawn(&mut self) -> Result<(), LedgerError> {
        self.drawn.iter().try_for_each(|account| write(self.ledger, account, &account.mirror().drawn))
    }

    /// Clears the list of drawn permits after the commit.
    pub(super) fn forget_drawn(&mut self) {
        self.drawn.drain(..).for_each(|account| account.mirror().drawn.clear());
    }

    /// Counts the draw for the first endpoint of its list all of whose accounts have a permit.
    pub(super) fn decide(&mut self, draw: &Draw) -> Result<Decision, LedgerError> {
        if let Some(CallerDraw { accounts, tokens }) = &draw.caller {
            if accounts.in_ledger() {
                accounts.accounts().iter().try_for_each(|of| self.refresh(of))?;
            }
            if let Err(held) = accounts.check_room(&self.clock, *tokens) {
                return Ok(Decision::HeldByCaller(held));
            }
        }
        let (mut held, mut held_budget) = (Vec::new(), None);
        for (at, wanted) in draw.wanted.iter().enumerate() {
            if let Some(set) = &draw.budgets {
                let here = (&mut *self.ledger, self.generation, &self.clock);
                held_budget = self.spending.check(set, wanted.spends.reserved, here)?;
                if held_budget.is_some() {
                    continue;
                }
            }
            let accounts = &wanted.accounts;
            if accounts.in_ledger() {
                accounts.accounts().iter().try_for_each(|of| self.refresh(of))?;
            }
            match take(at, wanted, &self.clock) {
                Err(by) => held.push(by),
                Ok(counted) => {
                    let may_prefetch = self.may_prefetch && is_first_choice(draw);
                    let ahead = |accounts| if may_prefetch { prefetch(accounts, counted, &self.clock) } else { 0 };
                    let mut permits = Ahead { endpoint: ahead(accounts), caller: 0 };
                    if let Some(CallerDraw { accounts, tokens }) = &draw.caller {
                        accounts.count(&self.clock, *tokens);
                        permits.caller = if *tokens == 0 { ahead(accounts) } else { 0 };
                        self.note_drawn(accounts, counted, 1 + permits.caller, *tokens);
                    }
                    self.note_drawn(accounts, counted, 1 + permits.endpoint, 0);
                    let Spends { reserved, known } = wanted.spends;
                    let reserved = draw.budgets.as_ref().map(|set| self.spending.reserve(set, reserved, known));
                    return Ok(Decision::Granted(at, counted, permits, reserved));
                }
            }
        }
        keep_place(draw);
        match held_budget.filter(|_| held.is_empty()) {
            Some(budget) => Ok(Decision::HeldByBudget(budget)),
            None => Ok(Decision::Held(held)),
        }
    }

    /// Notes what [`Batch::write_drawn`] writes.
    fn note_drawn(&mut self, accounts: &AccountSet, counted: CountedAt, attempts: u64, tokens: u64) {
        if !accounts.in_ledger() {
            return;
        }
        let [attempts, tokens] = [attempts, tokens].map(|count| i64::try_from(count).unwrap_or(i64::MAX));
        for LimitedAccount { account, limits } in accounts.accounts() {
            let mut mirror = account.mirror();
            if mirror.drawn.is_empty() {
                self.drawn.push(Arc::clone(account));
            }
            Entry::new(limits.counted(counted), Change { attempts, tokens }).merge_into(&mut mirror.drawn);
        }
    }

    /// Reads the counts of an account from the ledger if another process has written since the last read, or if the
    /// day has changed.
    pub(super) fn refresh(&mut self, LimitedAccount { account, limits }: &LimitedAccount) -> Result<(), LedgerError> {
        let mut mirror = account.mirror();
        let days = limits.calendar.days(self.clock.wall);
        if mirror.read_at == Some(self.generation) && mirror.quota.knows(days) {
            return Ok(());
        }
        let (mut attempts, mut tokens) = (Minute::default(), Minute::default());
        for (slot, counts) in self.ledger.minute(account.id(), Slot::oldest_that_counts(self.clock.boot))? {
            attempts.add(slot, counts.attempts);
            tokens.add(slot, counts.tokens);
        }
        let mut counted = Vec::with_capacity(2);
        for date in days.each() {
            counted.push((date, self.ledger.day(account.id(), date)?));
        }
        mirror.quota.load(attempts, tokens, counted, self.ledger.unknown_until());
        let Mirror { quota, unwritten, drawn, .. } = &mut *mirror;
        for entry in unwritten.iter().chain(drawn.iter()) {
            quota.change(entry.slot, entry.days, entry.change.attempts, entry.change.tokens);
        }
        mirror.read_at = Some(self.generation);
        Ok(())
    }

    /// Undoes the draws of a batch that failed.
    pub(super) fn undo(&mut self, served: &[Served]) {
        for account in self.drawn.drain(..) {
            let mut mirror = account.mirror();
            mirror.drawn.clear();
            mirror.read_at = None;
        }
        self.spending.undo();
        for Served { draw, decision } in served {
            // None is held by what failed before it was decided.
            if matches!(decision, Decision::Held(held) if !held.is_empty())
                && let (true, Some(wanted)) = (draw.keeps_place, draw.wanted.first())
            {
                wanted.accounts.release();
            }
            if let Decision::Granted(at, ..) = decision
                && let Some(wanted) = draw.wanted.get(*at)
            {
                wanted.accounts.release();
                draw.caller.iter().for_each(|caller| caller.accounts.release());
            }
        }
    }
}

/// True if the ledger keeps any limit of the draw's endpoints.
pub(super) fn needs_ledger(draw: &Draw) -> bool {
    let of_caller = draw.caller.as_ref().is_some_and(|caller| caller.accounts.in_ledger());
    of_caller || draw.budgets.is_some() || draw.wanted.iter().any(|wanted| wanted.accounts.in_ledger())
}

/// Decides a draw none of whose endpoints has a limit that the ledger keeps.
pub(super) fn decide_without_ledger(draw: Draw, clock: &Clock) -> Served {
    if let Some(CallerDraw { accounts, tokens }) = &draw.caller
        && let Err(held) = accounts.check_room(clock, *tokens)
    {
        return Served { draw, decision: Decision::HeldByCaller(held) };
    }
    let mut held = Vec::new();
    for (at, wanted) in draw.wanted.iter().enumerate() {
        match take(at, wanted, clock) {
            Ok(counted) => {
                if let Some(caller) = &draw.caller {
                    caller.accounts.count(clock, caller.tokens);
                }
                return Served { draw, decision: Decision::Granted(at, counted, Ahead::default(), None) };
            }
            Err(by) => held.push(by),
        }
    }
    keep_place(&draw);
    Served { draw, decision: Decision::Held(held) }
}

/// Counts the request of a permit that could not be swapped as in flight again, before anybody else can take its place.
pub(super) fn keep_place(draw: &Draw) {
    if let (true, Some(wanted)) = (draw.keeps_place, draw.wanted.first()) {
        wanted.accounts.enter_all();
    }
}

/// True if a draw is for the strategy's first choice, which is nearly always granted. All other draws need the exact
/// number of permits left.
pub(super) fn is_first_choice(draw: &Draw) -> bool {
    draw.wanted.len() == 1 && draw.otherwise == Otherwise::LookElsewhere
}

/// Counts additional permits for the requests expected next, and returns their number. Permits of accounts that limit
/// concurrent requests are never prefetched: such a request has to be counted when it begins.
fn prefetch(accounts: &AccountSet, counted: CountedAt, clock: &Clock) -> u64 {
    if !accounts.in_ledger() || accounts.is_concurrency_limited() {
        return 0;
    }
    let all_spare = || accounts.accounts().iter().filter_map(|of| spare(&of.count_up(clock))).min();
    let ahead = accounts.demand().drawn(&accounts.prefetch, || all_spare().unwrap_or_default(), clock.boot);
    if ahead > 0 {
        accounts.add(counted, Counts { attempts: ahead, tokens: 0 });
    }
    ahead
}

fn take(at: usize, wanted: &Wanted, clock: &Clock) -> Result<CountedAt, HeldEndpoint> {
    rests(at, wanted, clock)?;
    wanted.accounts.take(clock).map_err(|by| full(at, by))
}

/// Counts a request as in flight without the ledger: checks only the endpoint's rest and `maxConcurrent`.
pub(super) fn enter(at: usize, wanted: &Wanted, clock: &Clock) -> Result<(), HeldEndpoint> {
    rests(at, wanted, clock)?;
    wanted.accounts.enter(clock).map_err(|by| full(at, by))
}

fn rests(at: usize, wanted: &Wanted, clock: &Clock) -> Result<(), HeldEndpoint> {
    if wanted.not_before > clock.boot {
        let held = Held { by: LimitReason::Rest, until: wanted.not_before };
        return Err(HeldEndpoint { at, account: None, held });
    }
    Ok(())
}

fn full(at: usize, (account, held): HeldAccount) -> HeldEndpoint {
    HeldEndpoint { at, account: Some(account), held }
}

/// Returns the first moment at which one of the endpoints has a free permit that is not promised yet.
pub(super) fn next_free<'a>(wanted: &'a [Wanted], clock: &Clock) -> Option<NextFree<'a>> {
    let next = |wanted: &'a Wanted| wanted.accounts.next_free(clock, wanted.not_before.max(clock.boot));
    wanted.iter().map(next).min_by_key(|free| free.at)
}

/// Writes the entries of an account, without those that change nothing.
pub(super) fn write(ledger: &mut dyn Ledger, account: &Account, entries: &[Entry]) -> Result<(), LedgerError> {
    let changes = entries.iter().filter(|entry| !entry.change.is_none());
    changes.into_iter().try_for_each(|entry| ledger.add(account.id(), entry.slot, entry.days, entry.change))
}
