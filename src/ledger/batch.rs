//! Decisions on one batch of draws: each draw counts for the first endpoint of its list that has a permit.

use std::collections::HashSet;
use std::sync::Arc;

use super::account::{Entry, Mirror};
use super::account_set::{HeldAccount, NextFree};
use super::allocator::Spending;
use super::budgets::{BudgetKind, HeldBudget, Spends};
use super::claims::{Ahead, Claim, Claims, Verdict};
use super::messages::{CallerDraw, Draw, HeldEndpoint, Otherwise};
use super::prefetch::spare;
use super::{Account, AccountId, AccountSet, Change, Ledger, LedgerError, LimitedAccount, Rows, Wanted};
use crate::limit::{Clock, CountedAt, Counts, Days, Held, LimitReason, Minute, Slot, Unknown};

/// Claims that a draw's own is compared with.
const CLAIMS_COMPARED: usize = 64;

/// A draw and its decision.
pub(super) struct Served {
    pub(super) draw: Draw,
    pub(super) decision: Decision,
}

pub(super) enum Decision {
    Granted(Granted),
    Held(Vec<HeldEndpoint>),
    /// The caller's own account is at a limit.
    HeldByCaller(HeldAccount),
    /// The caller's budget has no room for it.
    HeldByBudget(HeldBudget),
    /// It is held by counts that may have changed since they were read.
    Doubtful,
}

/// A permit that a draw gets.
#[derive(Clone, Copy)]
pub(super) struct Granted {
    /// Position of the endpoint in the list.
    pub(super) at: usize,
    pub(super) counted: CountedAt,
    /// Numbers of permits prefetched with it.
    pub(super) ahead: Ahead,
    /// Number of what is reserved of budgets.
    pub(super) reserved: Option<u64>,
    /// Position of its claim, if the ledger counts it.
    pub(super) claim: Option<usize>,
}

/// What holds a draw, and may have changed since it was read.
#[derive(Debug, Default)]
pub(super) struct Doubtful {
    accounts: Vec<LimitedAccount>,
    budgets: Vec<(Arc<str>, BudgetKind)>,
}

/// State of one batch.
pub(super) struct Batch<'a> {
    pub(super) ledger: &'a mut dyn Ledger,
    pub(super) generation: u64,
    pub(super) clock: Clock,
    /// What is drawn.
    pub(super) claims: Vec<Claim>,
    /// Accounts from which permits were drawn.
    pub(super) drawn: Vec<Arc<Account>>,
    /// Budgets, and what is reserved of them in this batch.
    pub(super) spending: Spending,
    pub(super) doubtful: Doubtful,
    /// True if counts are taken as they are known, however old they are.
    pub(super) is_last_round: bool,
    /// True if permits may be prefetched: no draw waits in the queue and the thread is not closing.
    pub(super) may_prefetch: bool,
}

impl Batch<'_> {
    /// Commits what was decided, and reads what is doubtful with it. Returns the claims, and what was granted of them.
    pub(super) fn commit(&mut self) -> Result<(Claims, Verdict), LedgerError> {
        let claims = Claims {
            owner: self.spending.owner(),
            draws: std::mem::take(&mut self.claims),
            growths: self.spending.growths(),
        };
        let Doubtful { accounts, budgets } = std::mem::take(&mut self.doubtful);
        let rows = Rows { accounts: accounts.iter().map(|of| of.row(&self.clock)).collect(), budgets };
        let verdict = self.ledger.commit(&claims, &rows)?;
        for of in &accounts {
            of.account.mirror().read_at = None;
        }
        self.spending.read_again_rows(&rows.budgets);
        self.drawn.drain(..).for_each(|account| account.mirror().drawn.clear());
        self.spending.committed();
        Ok((claims, verdict))
    }

    /// Counts the draw for the first endpoint of its list all of whose accounts have a permit.
    pub(super) fn decide(&mut self, draw: &Draw) -> Result<Decision, LedgerError> {
        if let Some(CallerDraw { accounts, tokens }) = &draw.caller {
            self.refresh_all(accounts)?;
            if let Err(held) = accounts.check_room(&self.clock, *tokens) {
                let is_doubtful = self.doubts(accounts);
                return Ok(if is_doubtful { Decision::Doubtful } else { Decision::HeldByCaller(held) });
            }
        }
        let (mut held, mut held_budget, mut is_doubtful) = (Vec::new(), None, false);
        for (at, wanted) in draw.wanted.iter().enumerate() {
            if let Some(set) = &draw.budgets {
                let Unknown { all_until, .. } = self.ledger.unknown();
                if all_until > self.clock.boot {
                    let held_until = Held { by: LimitReason::LedgerBegins, until: all_until };
                    held.push(HeldEndpoint { at, account: None, held: held_until });
                    continue;
                }
                let here = (&mut *self.ledger, self.generation, &self.clock);
                held_budget = self.spending.check(set, wanted.spends.reserved, here)?;
                if let Some(HeldBudget { key, view, .. }) = &held_budget {
                    let rows = (!self.is_last_round).then_some(&mut self.doubtful.budgets);
                    is_doubtful |= self.spending.doubts((key, view.kind), self.generation, rows);
                    continue;
                }
            }
            self.refresh_all(&wanted.accounts)?;
            match take(at, wanted, &self.clock) {
                Ok(counted) => return Ok(Decision::Granted(self.grant(draw, (at, wanted), counted))),
                Err(by) => {
                    is_doubtful |= by.account.is_some() && self.doubts(&wanted.accounts);
                    held.push(by);
                }
            }
        }
        if is_doubtful {
            return Ok(Decision::Doubtful);
        }
        keep_place(draw);
        match held_budget.filter(|_| held.is_empty()) {
            Some(budget) => Ok(Decision::HeldByBudget(budget)),
            None => Ok(Decision::Held(held)),
        }
    }

    /// Counts a draw for an endpoint whose own accounts have counted it already.
    fn grant(&mut self, draw: &Draw, (at, wanted): (usize, &Wanted), counted: CountedAt) -> Granted {
        let accounts = &wanted.accounts;
        let may_prefetch = self.may_prefetch && is_first_choice(draw);
        let ahead_of = |accounts| if may_prefetch { prefetch(accounts, counted, &self.clock) } else { 0 };
        let mut ahead = Ahead { endpoint: ahead_of(accounts), caller: 0 };
        if let Some(CallerDraw { accounts, tokens }) = &draw.caller {
            accounts.count(&self.clock, *tokens);
            ahead.caller = if *tokens == 0 { ahead_of(accounts) } else { 0 };
            self.note_drawn(accounts, counted, 1 + ahead.caller, *tokens);
        }
        self.note_drawn(accounts, counted, 1 + ahead.endpoint, 0);
        let Spends { reserved, known } = wanted.spends;
        let reserved = draw.budgets.as_ref().map(|set| self.spending.reserve(set, reserved, known));
        let claim = self.claim(draw, accounts, counted, ahead, reserved);
        Granted { at, counted, ahead, reserved, claim }
    }

    /// Claims what a draw takes, together with others that take the same. Returns the claim's position; `None` if the ledger counts
    /// nothing of it.
    fn claim(
        &mut self,
        draw: &Draw,
        endpoint: &Arc<AccountSet>,
        counted: CountedAt,
        ahead: Ahead,
        reserved: Option<u64>,
    ) -> Option<usize> {
        let of_ledger = |accounts: &Arc<AccountSet>| accounts.in_ledger().then(|| Arc::clone(accounts));
        let endpoint = of_ledger(endpoint);
        let caller = draw.caller.as_ref().and_then(|caller| of_ledger(&caller.accounts));
        let tokens = draw.caller.as_ref().map_or(0, |caller| caller.tokens);
        if endpoint.is_none() && caller.is_none() && reserved.is_none() {
            return None;
        }
        if reserved.is_none() {
            let is_same = |one: &Option<Arc<AccountSet>>, other: &Option<Arc<AccountSet>>| match (one, other) {
                (Some(one), Some(other)) => Arc::ptr_eq(one, other),
                (one, other) => one.is_none() && other.is_none(),
            };
            let same = |claim: &Claim| {
                is_same(&claim.endpoint, &endpoint)
                    && is_same(&claim.caller, &caller)
                    && claim.tokens == tokens
                    && claim.reservation.is_none()
            };
            // Those that take the same mostly come one after the other.
            let recent = self.claims.iter_mut().enumerate().rev().take(CLAIMS_COMPARED);
            if let Some((at, claim)) = recent.into_iter().find(|(_, claim)| same(claim)) {
                claim.draws += 1;
                claim.ahead.endpoint += ahead.endpoint;
                claim.ahead.caller += ahead.caller;
                return Some(at);
            }
        }
        let reservation = reserved.and_then(|id| self.spending.new_reservation(id));
        self.claims.push(Claim { endpoint, caller, counted, draws: 1, tokens, ahead, reservation });
        Some(self.claims.len() - 1)
    }

    /// Notes what is drawn until it is committed, for counts that are read before.
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

    fn refresh_all(&mut self, accounts: &AccountSet) -> Result<(), LedgerError> {
        if !accounts.in_ledger() {
            return Ok(());
        }
        accounts.accounts().iter().try_for_each(|of| self.refresh(of))
    }

    /// Brings an account's counts up to date, as far as a draw needs it: where `commit` has the last word, older counts do.
    fn refresh(&mut self, of: &LimitedAccount) -> Result<(), LedgerError> {
        if of.is_known(&*self.ledger, &self.clock) {
            return Ok(());
        }
        self.read_fresh(of)
    }

    /// Reads the counts of an account from the ledger if another process may have written since the last read, or if the
    /// day has changed.
    pub(super) fn read_fresh(
        &mut self,
        LimitedAccount { account, limits }: &LimitedAccount,
    ) -> Result<(), LedgerError> {
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
        mirror.quota.load(attempts, tokens, counted, self.ledger.unknown());
        if account.shares_concurrency() && limits.is_concurrency_limited() {
            mirror.quota.set_others_in_flight(self.ledger.others_in_flight(account.id())?);
        }
        let Mirror { quota, unwritten, drawn, .. } = &mut *mirror;
        for entry in unwritten.iter().chain(drawn.iter()) {
            quota.change(entry.slot, entry.days, entry.change.attempts, entry.change.tokens);
        }
        mirror.read_at = Some(self.generation);
        Ok(())
    }

    /// True if one of these accounts has counts that may have changed since they were read. They are to be read again.
    fn doubts(&mut self, accounts: &AccountSet) -> bool {
        if self.is_last_round || !accounts.in_ledger() {
            return false;
        }
        let mut is_doubtful = false;
        for of in accounts.accounts() {
            if of.account.mirror().read_at != Some(self.generation) {
                is_doubtful = true;
                let same = |known: &LimitedAccount| Arc::ptr_eq(&known.account, &of.account);
                if !self.doubtful.accounts.iter().any(same) {
                    self.doubtful.accounts.push(of.clone());
                }
            }
        }
        is_doubtful
    }

    /// Writes how many requests of an account are in flight, without those that this batch claims.
    pub(super) fn write_in_flight(&mut self, account: &Account) -> Result<(), LedgerError> {
        let own = account.mirror().quota.own_in_flight();
        let claimed: u64 = self.claims.iter().map(|claim| claim.draws_of(account)).sum();
        self.ledger.set_in_flight(account.id(), own.saturating_sub(claimed))
    }

    /// Takes in what the ledger has granted. Returns the draws that have to be decided anew.
    pub(super) fn settle(&mut self, claims: &Claims, verdict: Verdict, served: &mut Vec<Served>) -> Vec<Draw> {
        self.spending.grown(verdict.growths);
        let mut parts = verdict.draws;
        for (claim, part) in claims.draws.iter().zip(parts.iter().flatten()) {
            if part.draws < claim.draws || part.ahead != claim.ahead {
                // What was counted here and not there is gone once they are read again.
                claim.changes().for_each(|(of, _)| of.account.mirror().read_at = None);
            }
        }
        let mut again = Vec::new();
        let decided = std::mem::take(served);
        for Served { draw, mut decision } in decided {
            let is_settled = match &mut decision {
                Decision::Doubtful => false,
                Decision::Granted(granted) => {
                    if let Some((boot, slot)) = verdict.counted.filter(|_| granted.claim.is_some()) {
                        granted.counted = CountedAt { boot, slot, ..granted.counted };
                    }
                    let part = granted.claim.and_then(|claim| parts.as_mut()?.get_mut(claim));
                    part.is_none_or(|part| part.take(&mut granted.ahead))
                }
                Decision::Held(_) | Decision::HeldByCaller(_) | Decision::HeldByBudget(_) => true,
            };
            if is_settled {
                served.push(Served { draw, decision });
                continue;
            }
            if let Decision::Granted(granted) = decision {
                self.take_back(&draw, &granted);
            }
            if self.is_last_round {
                keep_place(&draw);
                served.push(Served { draw, decision: Decision::Held(Vec::new()) });
            } else {
                again.push(draw);
            }
        }
        again
    }

    /// Takes back a grant that the ledger did not confirm.
    fn take_back(&mut self, draw: &Draw, granted: &Granted) {
        if let Some(wanted) = draw.wanted.get(granted.at) {
            wanted.accounts.release();
            draw.caller.iter().for_each(|caller| caller.accounts.release());
        }
        granted.reserved.iter().for_each(|id| self.spending.take_back(*id));
    }

    /// Undoes the draws of a batch that failed. `is_kept`: everything else is written nevertheless.
    pub(super) fn undo(&mut self, served: &[Served], is_kept: bool) {
        self.claims.clear();
        for account in self.drawn.drain(..) {
            let mut mirror = account.mirror();
            mirror.drawn.clear();
            mirror.read_at = None;
        }
        self.spending.undo(is_kept);
        for Served { draw, decision } in served {
            // None is held by what failed before it was decided.
            if matches!(decision, Decision::Held(held) if !held.is_empty())
                && let (true, Some(wanted)) = (draw.keeps_place, draw.wanted.first())
            {
                wanted.accounts.release();
            }
            if let Decision::Granted(granted) = decision
                && let Some(wanted) = draw.wanted.get(granted.at)
            {
                wanted.accounts.release();
                draw.caller.iter().for_each(|caller| caller.accounts.release());
            }
        }
    }
}

impl LimitedAccount {
    /// True if its counts have been read, and are good enough to propose what is drawn.
    fn is_known(&self, ledger: &dyn Ledger, clock: &Clock) -> bool {
        let mirror = self.account.mirror();
        let is_trusted = |read_at: u64| !ledger.is_exclusive() && read_at >= ledger.trusted_since();
        mirror.read_at.is_some_and(is_trusted) && mirror.quota.knows(self.limits.calendar.days(clock.wall))
    }

    /// What a ledger reads of it.
    pub(super) fn row(&self, clock: &Clock) -> (AccountId, Days) {
        (self.account.id().clone(), self.limits.calendar.days(clock.wall))
    }
}

/// Rows that a ledger has to read before these draws can be decided.
pub(super) fn unknown_rows(draws: &[Draw], ledger: &dyn Ledger, clock: &Clock) -> Vec<(AccountId, Days)> {
    let of_callers = draws.iter().filter_map(|draw| Some(&draw.caller.as_ref()?.accounts));
    let of_endpoints = draws.iter().flat_map(|draw| &draw.wanted).map(|wanted| &wanted.accounts);
    let in_ledger = of_callers.chain(of_endpoints).filter(|accounts| accounts.in_ledger());
    let mut seen: HashSet<*const Account> = HashSet::new();
    let accounts = in_ledger.flat_map(|accounts| accounts.accounts());
    let unknown = accounts.filter(|of| seen.insert(Arc::as_ptr(&of.account)) && !of.is_known(ledger, clock));
    unknown.map(|of| of.row(clock)).collect()
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
                let ahead = Ahead::default();
                return Served {
                    draw,
                    decision: Decision::Granted(Granted { at, counted, ahead, reserved: None, claim: None }),
                };
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
