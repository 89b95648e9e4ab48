//! Replies to the clients of the allocator.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::promised::Told;
use super::{Allocator, RENEW, SCAN};
use crate::config::LedgerOnError;
use crate::ledger::account_set::HeldAccount;
use crate::ledger::batch::{Decision, Granted, Served, enter, keep_place, next_free};
use crate::ledger::budgets::{BudgetHold, HeldBudget};
use crate::ledger::messages::{
    CallerDraw, CallerId, Draw, Drawn, HeldEndpoint, Messages, Otherwise, Refusal, Wanted, may_end_by,
};
use crate::ledger::{Account, AccountSet, Permit, prefetch};
use crate::limit::{Clock, CountedAt, Stamp};

impl Allocator {
    /// Replies to all draws, now that they count. Publishes the views first, so that a client that gets its reply finds
    /// its own permit counted in them.
    pub(super) fn answer(&mut self, served: Vec<Served>, clock: &Clock) {
        let mut seen: HashSet<*const Account> = HashSet::new();
        let wanted = served.iter().flat_map(|served| &served.draw.wanted).map(|wanted| &wanted.accounts);
        let callers = served.iter().filter_map(|served| Some(&served.draw.caller.as_ref()?.accounts));
        for of in wanted.chain(callers).flat_map(|accounts| accounts.accounts()) {
            if seen.insert(Arc::as_ptr(&of.account)) {
                of.publish(clock);
            }
        }
        if !seen.is_empty() {
            self.renew_at = self.renew_at.min(clock.boot + RENEW);
        }
        for Served { draw, decision } in served {
            match decision {
                Decision::Granted(Granted { at, counted, ahead, reserved, claim: _ }) => {
                    let endpoint = draw.wanted.get(at).map(|wanted| &wanted.accounts);
                    let caller = draw.caller.as_ref().map(|caller| &caller.accounts);
                    for (accounts, permits) in [(endpoint, ahead.endpoint), (caller, ahead.caller)] {
                        if let Some(accounts) = accounts.filter(|_| permits > 0) {
                            self.keep_prefetched(accounts, counted, permits, clock);
                        }
                    }
                    self.grant(draw, at, Some(counted), reserved);
                }
                Decision::Held(held) => self.refuse(draw, held, clock),
                Decision::HeldByCaller(held) => refuse_for_caller(draw, held, clock),
                Decision::HeldByBudget(budget) => refuse_for_budget(draw, budget),
                // None is left once a batch is done.
                Decision::Doubtful => self.refuse(draw, Vec::new(), clock),
            }
        }
    }

    /// Keeps prefetched permits for the requests that come next.
    fn keep_prefetched(&mut self, accounts: &Arc<AccountSet>, counted: CountedAt, permits: u64, clock: &Clock) {
        // The permits that are there have expired.
        self.give_back_prefetched(accounts, clock);
        accounts.prefetch.put(counted, permits);
        // The moment noted for the previous permits does not apply to these, which are younger.
        self.prefetched.retain(|(known, _)| !Arc::ptr_eq(known, accounts));
        self.prefetched.push((Arc::clone(accounts), counted.boot + prefetch::USABLE));
    }

    fn grant(&mut self, draw: Draw, at: usize, counted: Option<CountedAt>, reserved: Option<u64>) {
        let Some(Wanted { accounts, spends, .. }) = draw.wanted.get(at) else { return };
        let mut permit = Permit::granted(&self.client, accounts, counted);
        if let Some(CallerDraw { accounts, tokens }) = &draw.caller {
            let of_caller = Permit::granted(&self.client, accounts, counted);
            permit.set_caller(of_caller.with_reserved(counted.map(|at| (at, *tokens))));
        }
        if let (Some(id), Some(set)) = (reserved, &draw.budgets) {
            permit.set_budgets(BudgetHold::new(&self.client, id, Arc::clone(set), *spends));
        }
        self.turns.served(&draw);
        // If the client is gone, the permit is dropped, which gives it back.
        drop(draw.reply.send(Drawn::Granted(at, permit)));
    }

    fn refuse(&mut self, draw: Draw, held: Vec<HeldEndpoint>, clock: &Clock) {
        let first = held.iter().map(|endpoint| endpoint.held.until).min().unwrap_or(clock.boot + SCAN);
        let free_at = match draw.otherwise {
            Otherwise::Wait { until, end, .. } if until > clock.boot && may_end_by(&held, end) => {
                if !draw.reply.is_closed() {
                    self.scan_at = self.scan_at.min(first).min(until).min(clock.boot + SCAN);
                    self.waiting.insert(draw.ticket, draw);
                }
                return;
            }
            Otherwise::LookElsewhere | Otherwise::Wait { .. } => first,
            Otherwise::Refuse(caller) => self.promise(caller, &draw, first, clock).unwrap_or(first),
        };
        let refusal = Refusal { wait: clock.boot.until(free_at), held, caller: None, budget: None };
        // A client that is gone needs no reply.
        drop(draw.reply.send(Drawn::Refused(refusal)));
    }

    /// Promises a caller the first moment at which one of the endpoints has a free permit that is not promised yet; or the
    /// one that it was promised before, if that is not later.
    fn promise(&mut self, caller: CallerId, draw: &Draw, first: Stamp, clock: &Clock) -> Option<Stamp> {
        let known_from = self.client.next_ticket();
        let before = self.promised.take(caller, draw.ticket, &draw.wanted, clock.boot);
        let free = next_free(&draw.wanted, clock)?;
        if let Some(before) = before {
            if first <= before.at && before.at <= free.at {
                let at = before.at;
                self.promised.note(caller, before.known_from(known_from), clock.boot);
                return Some(at);
            }
            before.withdraw();
        }
        free.promise(clock);
        self.promised.note(caller, Told::new(&free, known_from), clock.boot);
        Some(free.at)
    }

    /// Serves draws without the ledger: endpoints that need no ledger as usual, the others as the config's
    /// `ledgerOnError` says.
    pub(super) fn serve_without_ledger(&mut self, draws: Vec<Draw>, clock: &Clock) {
        for mut draw in draws {
            let may_use = |accounts: &AccountSet| !accounts.in_ledger() || self.on_error == LedgerOnError::Allow;
            let is_caller_held = draw.caller.as_ref().is_some_and(|caller| !may_use(&caller.accounts));
            // Nobody may spend what cannot be written down.
            let may_go = |wanted: &Wanted| !is_caller_held && draw.budgets.is_none() && may_use(&wanted.accounts);
            if let Some(caller) = &draw.caller
                && let Err(held) = caller.accounts.check_concurrency(clock)
            {
                refuse_for_caller(draw, held, clock);
                continue;
            }
            let mut held = Vec::new();
            let mut granted = None;
            for (at, wanted) in draw.wanted.iter().enumerate().filter(|(_, wanted)| may_go(wanted)) {
                match enter(at, wanted, clock) {
                    Ok(()) => {
                        granted = Some((at, wanted.accounts.in_ledger()));
                        break;
                    }
                    Err(by) => held.push(by),
                }
            }
            if let Some((at, without_permit)) = granted {
                if let Some(caller) = &draw.caller {
                    // There was room a moment ago, and nothing comes between.
                    caller.accounts.enter(clock).unwrap_or_default();
                }
                self.tally.uncounted.fetch_add(u64::from(without_permit), Ordering::Relaxed);
                self.grant(draw, at, None, None);
            } else if held.is_empty() {
                self.tally.denied.fetch_add(1, Ordering::Relaxed);
                // A client that is gone needs no reply.
                drop(draw.reply.send(Drawn::Unavailable));
            } else {
                // Nothing is promised: endpoints that need the ledger may seem to have permits, but cannot be used.
                keep_place(&draw);
                if matches!(draw.otherwise, Otherwise::Refuse(_)) {
                    draw.otherwise = Otherwise::LookElsewhere;
                }
                self.refuse(draw, held, clock);
            }
        }
    }
}

/// Refuses a draw whose caller's own account is at a limit. It does not wait in the queue: that is the caller's own affair.
fn refuse_for_caller(draw: Draw, (account, held): HeldAccount, clock: &Clock) {
    let refusal =
        Refusal { wait: clock.boot.until(held.until), held: Vec::new(), caller: Some((account, held)), budget: None };
    // A client that is gone needs no reply.
    drop(draw.reply.send(Drawn::Refused(refusal)));
}

/// Refuses a draw whose caller's budget has no room for it. Nor does it wait in the queue.
fn refuse_for_budget(draw: Draw, budget: HeldBudget) {
    let refusal = Refusal { wait: Duration::ZERO, held: Vec::new(), caller: None, budget: Some(Box::new(budget)) };
    // A client that is gone needs no reply.
    drop(draw.reply.send(Drawn::Refused(refusal)));
}

/// Replies to messages that do not ask for a permit.
pub(super) fn answer_others(messages: Messages, clock: &Clock, written: bool) {
    // A client that is gone needs no reply, here and below.
    for look in messages.looks {
        drop(look.reply.send(look.accounts.iter().map(|of| of.count_up(clock)).collect()));
    }
    for reset in messages.resets {
        reset.reply.send(written).unwrap_or_default();
    }
    for look in messages.budget_looks {
        drop(look.reply.send(written.then_some(look.found)));
    }
    for find in messages.finds {
        drop(find.reply.send(written.then_some(find.found)));
    }
    for flush in messages.flushes {
        flush.send(written).unwrap_or_default();
    }
}
