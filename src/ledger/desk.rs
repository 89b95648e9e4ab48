//! Who gets a permit. All who ask at one moment are served in one group: decided one after the other, written together,
//! and answered once it is committed.
//!
//! The desk keeps a mirror of what the ledger counts for each endpoint, so that a group reads only what another process has
//! changed since the last one.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::account::{Entry, Mirror};
use super::client::{Bill, Draw, Messages, Return};
use super::stats::{self, DAYS_KEPT, HOURS_KEPT, MODELS_MAX, OTHER_MODELS};
use super::{Account, Change, Client, Drawn, FaultKind, Ledger, LedgerError, Permit, Refusal, Spent, Wanted};
use crate::config::LedgerOnError;
use crate::limit::{Clock, Counted, Counts, Held, Limits, Minute, Slot, Stamp, View};

use super::client::Otherwise;

/// What is written behind is written after this time.
const WRITE_BEHIND: Duration = Duration::from_millis(100);
/// Views are renewed so often while anything counts, so that they show what has freed and what other processes did.
const RENEW: Duration = Duration::from_secs(1);
/// Those who wait are looked through at least so often, as another process may give permits back.
const SCAN: Duration = Duration::from_millis(250);
/// Slots that no longer count are removed so often, and statistics that are too old.
const CLEAN: Duration = Duration::from_secs(10);
/// Token counts that wait to be written while the ledger cannot be; more are lost, and told.
const SPENT_MAX: usize = 10_000;

/// What the desk did without the ledger, or could not do.
#[derive(Debug, Default)]
pub struct Tally {
    /// Draws that were refused because the ledger could not be used.
    pub denied: AtomicU64,
    /// Attempts that went on without a permit because of that.
    pub uncounted: AtomicU64,
    /// Answers whose tokens were lost because of that.
    pub lost: AtomicU64,
}

/// Serves the permits of one process.
#[derive(Debug)]
pub struct Desk {
    client: Client,
    on_error: LedgerOnError,
    tally: Arc<Tally>,
    /// The endpoints of the current config, and those of earlier ones that are still in use.
    endpoints: Vec<(Arc<Account>, Arc<Limits>)>,
    /// Those who wait for their turn, in the order of arrival; as many as the queue has places.
    waiting: BTreeMap<u64, Draw>,
    scan_at: Stamp,
    /// Accounts with something to be written behind.
    unwritten: Vec<Arc<Account>>,
    spent: HashMap<SpentKey, Spent>,
    /// Models that were seen, by endpoint; at most [`MODELS_MAX`] of each.
    models: HashMap<Arc<str>, HashSet<Arc<str>>>,
    write_at: Stamp,
    renew_at: Stamp,
    clean_at: Stamp,
}

/// Endpoint, model, hour, day.
type SpentKey = (Arc<str>, Arc<str>, i64, i64);

/// One draw, and what came of it.
struct Served {
    draw: Draw,
    outcome: Outcome,
}

enum Outcome {
    Granted(usize, Counted),
    Held(Vec<(usize, Held)>),
}

/// What one group of work needs.
struct Group<'a> {
    ledger: &'a mut dyn Ledger,
    generation: u64,
    clock: Clock,
    /// Accounts that something was drawn from.
    drawn: Vec<Arc<Account>>,
}

impl Desk {
    /// A desk for the clients of this inbox.
    pub fn new(client: Client, on_error: LedgerOnError, tally: Arc<Tally>) -> Self {
        Self {
            client,
            on_error,
            tally,
            endpoints: Vec::new(),
            waiting: BTreeMap::new(),
            scan_at: Stamp::NEVER,
            unwritten: Vec::new(),
            spent: HashMap::new(),
            models: HashMap::new(),
            write_at: Stamp::NEVER,
            renew_at: Stamp::NEVER,
            clean_at: Stamp::default(),
        }
    }

    /// When there is something to do even if nobody asks.
    pub fn next_due(&self) -> Stamp {
        self.scan_at.min(self.write_at).min(self.renew_at)
    }

    /// Whether everything that was counted is in the ledger.
    pub fn is_all_written(&self) -> bool {
        self.unwritten.is_empty() && self.spent.is_empty()
    }

    /// Serves whatever has come and whatever is due, with the ledger or, if it cannot be used, without. The error says that
    /// it could not; everybody was answered all the same.
    pub fn serve(&mut self, ledger: Option<&mut dyn Ledger>) -> Result<(), LedgerError> {
        let messages = self.client.receive(Some(Duration::ZERO));
        self.serve_messages(ledger, messages)
    }

    pub(super) fn serve_messages(
        &mut self,
        ledger: Option<&mut dyn Ledger>,
        mut messages: Messages,
    ) -> Result<(), LedgerError> {
        let clock = self.client.clock();
        self.take_in(&mut messages, &clock);
        let draws = self.draws_due(std::mem::take(&mut messages.draws), clock.boot);
        let is_due = clock.boot >= self.write_at.min(self.renew_at);
        let asks = !messages.looks.is_empty() || !messages.resets.is_empty() || !messages.flushes.is_empty();
        let needs_ledger = is_due || asks || draws.iter().any(needs_ledger);
        if !needs_ledger {
            let served = draws.into_iter().map(|draw| decide_here(draw, &clock)).collect();
            self.answer(served, &clock);
            return Ok(());
        }
        let unusable = || LedgerError { kind: FaultKind::Unusable, message: String::new() };
        let grouped = match ledger {
            Some(ledger) => self.group(ledger, draws, &messages),
            None => Err((unusable(), draws)),
        };
        match grouped {
            Ok((served, clock)) => {
                self.client.set_down(false);
                self.answer(served, &clock);
                answer_others(messages, &clock, true);
                Ok(())
            }
            Err((error, draws)) => {
                self.client.set_down(self.on_error == LedgerOnError::Deny);
                self.serve_without_ledger(draws, &clock);
                answer_others(messages, &clock, false);
                // Not again at once.
                self.write_at = self.write_at.max(clock.boot + WRITE_BEHIND);
                self.renew_at = self.renew_at.max(clock.boot + RENEW);
                Err(error)
            }
        }
    }

    /// Takes in what asks for no answer.
    fn take_in(&mut self, messages: &mut Messages, clock: &Clock) {
        if let Some(endpoints) = messages.endpoints.take() {
            self.set_endpoints(endpoints);
            self.renew_at = clock.boot;
        }
        if messages.unwritten {
            self.write_at = self.write_at.min(clock.boot + WRITE_BEHIND);
        }
        if !messages.flushes.is_empty() || messages.closing {
            self.write_at = clock.boot;
        }
        if !messages.returns.is_empty() {
            self.scan_at = self.scan_at.min(clock.boot);
        }
        for returned in messages.returns.drain(..) {
            self.take_back(returned, clock);
        }
        for bill in messages.bills.drain(..) {
            self.take_bill(bill, clock);
        }
        if clock.boot >= self.write_at {
            self.collect_unwritten(clock);
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
        self.write_behind(&account, Entry::new(counted, Change { attempts: -1, tokens: 0 }));
        // At once, as after a kill it would count for an attempt that nobody made.
        self.write_at = clock.boot;
    }

    fn take_bill(&mut self, bill: Bill, clock: &Clock) {
        let Bill { account, limits, spent } = bill;
        let now = Counted { at: clock.boot, days: limits.calendar.days(clock.wall) };
        account.mirror().usage.add(now, Counts { attempts: 0, tokens: spent.tokens.total });
        let tokens = i64::try_from(spent.tokens.total).unwrap_or(i64::MAX);
        self.write_behind(&account, Entry::new(now, Change { attempts: 0, tokens }));
        account.publish(account.mirror().usage.view(&limits, clock));
        self.keep_spent(spent);
        self.write_at = self.write_at.min(clock.boot + WRITE_BEHIND);
        self.renew_at = self.renew_at.min(clock.boot + RENEW);
    }

    fn keep_spent(&mut self, mut spent: Spent) {
        let seen = self.models.entry(Arc::clone(&spent.endpoint)).or_default();
        if !seen.contains(&spent.model) {
            if seen.len() < MODELS_MAX {
                seen.insert(Arc::clone(&spent.model));
            } else {
                spent.model = OTHER_MODELS.into();
            }
        }
        let key = (Arc::clone(&spent.endpoint), Arc::clone(&spent.model), spent.hour, spent.day);
        if let Some(kept) = self.spent.get_mut(&key) {
            kept.requests += spent.requests;
            kept.tokens.merge(spent.tokens);
            kept.at_ms = kept.at_ms.max(spent.at_ms);
        } else if self.spent.len() < SPENT_MAX {
            self.spent.insert(key, spent);
        } else if self.tally.lost.fetch_add(1, Ordering::Relaxed) == 0 {
            log::error!("token counts are being lost: the ledger has not been writable for too long");
        }
    }

    /// Attempts that needed no permit.
    fn collect_unwritten(&mut self, clock: &Clock) {
        for (account, limits) in self.endpoints.clone() {
            let attempts = account.take_unwritten();
            if attempts > 0 {
                let now = Counted { at: clock.boot, days: limits.calendar.days(clock.wall) };
                account.mirror().usage.add(now, Counts { attempts, tokens: 0 });
                let attempts = i64::try_from(attempts).unwrap_or(i64::MAX);
                self.write_behind(&account, Entry::new(now, Change { attempts, tokens: 0 }));
                self.renew_at = self.renew_at.min(clock.boot + RENEW);
            }
        }
    }

    fn write_behind(&mut self, account: &Arc<Account>, entry: Entry) {
        let mut mirror = account.mirror();
        if mirror.unwritten.is_empty() {
            self.unwritten.push(Arc::clone(account));
        }
        entry.merge_into(&mut mirror.unwritten);
    }

    /// Whoever waits, if it is time to look through them, and then the newcomers; but for those who are gone.
    fn draws_due(&mut self, newcomers: Vec<Draw>, now: Stamp) -> Vec<Draw> {
        let mut waiting = BTreeMap::new();
        if now >= self.scan_at {
            self.scan_at = Stamp::NEVER;
            waiting = std::mem::take(&mut self.waiting);
        }
        waiting.into_values().chain(newcomers).filter(|draw| !draw.reply.is_closed()).collect()
    }

    /// Does everything that is due as one step of the ledger. If that fails, nothing of it was done.
    fn group(
        &mut self,
        ledger: &mut dyn Ledger,
        draws: Vec<Draw>,
        messages: &Messages,
    ) -> Result<(Vec<Served>, Clock), (LedgerError, Vec<Draw>)> {
        let generation = match ledger.begin() {
            Ok(generation) => generation,
            Err(error) => return Err((error, draws)),
        };
        // Read now, since another process's group may have been waited for.
        let clock = self.client.clock();
        let mut group = Group { ledger, generation, clock, drawn: Vec::new() };
        let mut served = Vec::with_capacity(draws.len());
        let mut draws = draws.into_iter();
        let done = loop {
            let Some(draw) = draws.next() else { break self.finish_group(&mut group, messages) };
            match group.decide(&draw) {
                Ok(outcome) => served.push(Served { draw, outcome }),
                Err(error) => {
                    served.push(Served { draw, outcome: Outcome::Held(Vec::new()) });
                    break Err(error);
                }
            }
        };
        if let Err(error) = done {
            group.ledger.roll_back();
            group.undo(&served);
            let draws = served.into_iter().map(|served| served.draw).chain(draws).collect();
            return Err((error, draws));
        }
        for account in &group.drawn {
            account.mirror().drawn.clear();
        }
        self.forget_written(&clock);
        Ok((served, clock))
    }

    /// Writes what was drawn and what is due, and commits. Whatever is read comes before: what is read after it was written
    /// would count twice.
    fn finish_group(&mut self, group: &mut Group<'_>, messages: &Messages) -> Result<(), LedgerError> {
        for look in &messages.looks {
            look.accounts.iter().try_for_each(|(account, limits)| group.refresh(account, limits))?;
        }
        if group.clock.boot >= self.renew_at {
            self.renew(group)?;
        }
        for account in &group.drawn {
            write(group.ledger, account, &account.mirror().drawn)?;
        }
        if group.clock.boot >= self.write_at {
            for account in &self.unwritten {
                write(group.ledger, account, &account.mirror().unwritten)?;
            }
            self.spent.values().try_for_each(|spent| group.ledger.add_tokens(spent))?;
        }
        for reset in &messages.resets {
            group.ledger.reset_tokens(reset.endpoint.as_deref())?;
        }
        group.ledger.commit()
    }

    fn forget_written(&mut self, clock: &Clock) {
        if clock.boot >= self.write_at {
            for account in self.unwritten.drain(..) {
                account.mirror().unwritten.clear();
            }
            self.spent.clear();
            self.write_at = Stamp::NEVER;
        }
        if clock.boot >= self.renew_at {
            let is_moving = self.endpoints.iter().any(|(account, _)| account.mirror().usage.is_moving());
            self.renew_at = if is_moving { clock.boot + RENEW } else { Stamp::NEVER };
        }
    }

    /// Views show what has freed meanwhile; what is too old goes.
    fn renew(&mut self, group: &mut Group<'_>) -> Result<(), LedgerError> {
        let clock = group.clock;
        let cleans = clock.boot >= self.clean_at;
        for (account, limits) in &self.endpoints {
            let is_known = account.mirror().read_at.is_some();
            if is_known && !account.mirror().usage.is_moving() {
                continue;
            }
            group.refresh(account, limits)?;
            account.publish(account.mirror().usage.view(limits, &clock));
            if cleans {
                group.ledger.forget(account.id(), Slot::oldest_that_counts(clock.boot))?;
            }
        }
        if cleans {
            self.clean_at = clock.boot + CLEAN;
            let second = jiff::Timestamp::try_from(clock.wall).unwrap_or_default().as_second();
            group.ledger.forget_tokens(stats::oldest(second, HOURS_KEPT), stats::oldest(second, DAYS_KEPT))?;
            // Endpoints that no config and no request has any more; what they had to write is written.
            self.endpoints.retain(|(account, _)| Arc::strong_count(account) > 1);
        }
        Ok(())
    }

    /// Tells everybody, now that it counts.
    fn answer(&mut self, served: Vec<Served>, clock: &Clock) {
        let mut seen: Vec<(Arc<Account>, Arc<Limits>)> = Vec::new();
        for Served { draw, outcome } in served {
            for Wanted { account, limits, .. } in &draw.wanted {
                if !seen.iter().any(|(other, _)| Arc::ptr_eq(other, account)) {
                    seen.push((Arc::clone(account), Arc::clone(limits)));
                }
            }
            match outcome {
                Outcome::Granted(at, counted) => self.grant(draw, at, Some(counted)),
                Outcome::Held(held) => self.refuse(draw, &held, clock),
            }
        }
        for (account, limits) in seen {
            account.publish(account.mirror().usage.view(&limits, clock));
            self.renew_at = self.renew_at.min(clock.boot + RENEW);
        }
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
            Otherwise::LookElsewhere => first,
            Otherwise::Refuse | Otherwise::WaitUntil(_) => promise(&draw.wanted, clock).unwrap_or(first),
        };
        let held = held.iter().map(|(at, held)| (*at, held.by)).collect();
        let refusal = Refusal { wait: clock.boot.until(free_at), held };
        // Whoever is gone meanwhile needs no answer.
        drop(draw.reply.send(Drawn::Refused(refusal)));
    }

    /// Endpoints that need no ledger are asked all the same; the others by what the config says.
    fn serve_without_ledger(&mut self, draws: Vec<Draw>, clock: &Clock) {
        for draw in draws {
            let may_go = |wanted: &Wanted| {
                let allowed = !wanted.limits.in_ledger() || self.on_error == LedgerOnError::Allow;
                allowed && wanted.not_before <= clock.boot && wanted.account.mirror().usage.enter(&wanted.limits)
            };
            let Some(at) = draw.wanted.iter().position(may_go) else {
                self.tally.denied.fetch_add(1, Ordering::Relaxed);
                // Whoever is gone meanwhile needs no answer.
                drop(draw.reply.send(Drawn::Unavailable));
                continue;
            };
            if draw.wanted.get(at).is_some_and(|wanted| wanted.limits.in_ledger()) {
                self.tally.uncounted.fetch_add(1, Ordering::Relaxed);
            }
            self.grant(draw, at, None);
        }
    }
}

fn needs_ledger(draw: &Draw) -> bool {
    draw.wanted.iter().any(|wanted| wanted.limits.in_ledger())
}

/// Decides where no endpoint has limits that the ledger keeps.
fn decide_here(draw: Draw, clock: &Clock) -> Served {
    let mut held = Vec::new();
    for (at, wanted) in draw.wanted.iter().enumerate() {
        let taken = take(wanted, &mut wanted.account.mirror(), clock);
        match taken {
            Ok(counted) => return Served { draw, outcome: Outcome::Granted(at, counted) },
            Err(by) => held.push((at, by)),
        }
    }
    Served { draw, outcome: Outcome::Held(held) }
}

fn take(wanted: &Wanted, mirror: &mut Mirror, clock: &Clock) -> Result<Counted, Held> {
    if wanted.not_before > clock.boot {
        return Err(Held { by: crate::limit::Hold::Rest, until: wanted.not_before });
    }
    mirror.usage.take(&wanted.limits, clock)
}

/// The first moment at which any of them frees a permit that nobody else was promised, promised to the one who asks now.
fn promise(wanted: &[Wanted], clock: &Clock) -> Option<Stamp> {
    let next = |wanted: &Wanted| {
        wanted.account.mirror().usage.next_free(&wanted.limits, clock, wanted.not_before.max(clock.boot))
    };
    let (at, first) = wanted.iter().map(|wanted| (next(wanted), wanted)).min_by_key(|(at, _)| *at)?;
    first.account.mirror().usage.promise(at, &first.limits, clock);
    Some(at)
}

fn write(ledger: &mut dyn Ledger, account: &Account, entries: &[Entry]) -> Result<(), LedgerError> {
    let changes = entries.iter().filter(|entry| !entry.change.is_none());
    changes.into_iter().try_for_each(|entry| ledger.add(account.id(), entry.slot, entry.days, entry.change))
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

impl Group<'_> {
    /// Counts the draw for the first endpoint of its list that has a permit.
    fn decide(&mut self, draw: &Draw) -> Result<Outcome, LedgerError> {
        let mut held = Vec::new();
        for (at, wanted) in draw.wanted.iter().enumerate() {
            let in_ledger = wanted.limits.in_ledger();
            if in_ledger {
                self.refresh(&wanted.account, &wanted.limits)?;
            }
            let mut mirror = wanted.account.mirror();
            match take(wanted, &mut mirror, &self.clock) {
                Err(by) => held.push((at, by)),
                Ok(counted) => {
                    if in_ledger {
                        if mirror.drawn.is_empty() {
                            self.drawn.push(Arc::clone(&wanted.account));
                        }
                        Entry::new(counted, Change { attempts: 1, tokens: 0 }).merge_into(&mut mirror.drawn);
                    }
                    return Ok(Outcome::Granted(at, counted));
                }
            }
        }
        Ok(Outcome::Held(held))
    }

    /// Reads what the ledger counts for an endpoint, if anybody else has written since it was read, or the day has turned.
    fn refresh(&mut self, account: &Account, limits: &Limits) -> Result<(), LedgerError> {
        let mut mirror = account.mirror();
        let days = limits.calendar.days(self.clock.wall);
        if mirror.read_at == Some(self.generation) && mirror.usage.knows(days) {
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
        mirror.usage.load(attempts, tokens, counted, self.ledger.unknown_until());
        let Mirror { usage, unwritten, drawn, .. } = &mut *mirror;
        for entry in unwritten.iter().chain(drawn.iter()) {
            usage.change(entry.slot, entry.days, entry.change.attempts, entry.change.tokens);
        }
        mirror.read_at = Some(self.generation);
        Ok(())
    }

    /// Nothing was drawn after all.
    fn undo(&mut self, served: &[Served]) {
        for account in self.drawn.drain(..) {
            let mut mirror = account.mirror();
            mirror.drawn.clear();
            mirror.read_at = None;
        }
        for Served { draw, outcome } in served {
            if let Outcome::Granted(at, _) = outcome
                && let Some(wanted) = draw.wanted.get(*at)
                && wanted.limits.is_concurrency_limited()
            {
                wanted.account.mirror().usage.release();
            }
        }
    }
}
