//! Budgets as the allocator has them: what is taken of each, which reservations are this process's, and those of dead ones.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use crate::config::{AlertEvent, Budget, BudgetPeriod};
use crate::ledger::budgets::{
    Amount, BudgetKind, BudgetSet, BudgetTerms as _, BudgetView, Extend, HeldBudget, OthersReservation, ReservationRow,
    Settled, SpentInstead, Totals, Unreserved,
};
use crate::ledger::claims::{Grown, Growth, LimitedPart, NewReservation};
use crate::ledger::{FaultKind, Ledger, LedgerError};
use crate::limit::{Clock, Period, Stamp};
use crate::telemetry::alerts;

/// Interval in which a process with reservations says that it is alive.
const HEARD_EVERY: Duration = Duration::from_secs(2);
/// Time after which a process that was not heard of is dead. A disk may hang for some seconds, which holds up all processes alike.
const DEAD_AFTER: Duration = Duration::from_secs(30);
/// Interval in which reservations of other processes are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Interval in which what budgets have reserved is compared with their reservations.
const RECONCILE_EVERY: Duration = Duration::from_hours(1);
/// Time after which what is known of a budget is dropped if nobody asks for it.
const KEPT: Duration = Duration::from_hours(1);

/// Budgets of one process.
#[derive(Debug)]
pub(in crate::ledger) struct Spending {
    /// Distinguishes this process's reservations from all others'.
    owner: i64,
    next_id: u64,
    known: HashMap<(Arc<str>, BudgetKind), Known>,
    /// Reservations of this process, each with its parts.
    open: HashMap<u64, Vec<ReservationRow>>,
    /// Reservations that are made in the current batch.
    made: Vec<u64>,
    /// Those that are to grow in it, by their numbers.
    growing: BTreeMap<u64, Growing>,
    /// Reservations that are settled, and wait to be written.
    settled: Vec<(u64, Vec<SettledRow>)>,
    /// What was taken without a reservation, and waits to be written.
    unreserved: Vec<Unreserved>,
    /// True once these two are written in the current batch.
    has_written_settled: bool,
    heard_at: Option<Stamp>,
    look_at: Stamp,
    reconcile_at: Stamp,
    /// True if other processes had reservations when they were last looked at.
    others: bool,
}

/// A reservation that is to grow.
#[derive(Debug)]
struct Growing {
    /// Its parts, as they are to be.
    parts: Vec<LimitedPart>,
    /// What is to be set if a budget has no room for it.
    overrun: Vec<Arc<AtomicBool>>,
}

/// A part of a reservation, and what was taken in its place.
#[derive(Debug)]
struct SettledRow {
    row: ReservationRow,
    spent: u64,
}

/// What is known of a budget: a copy of its row, with what is not written yet.
#[derive(Debug)]
struct Known {
    period: Period,
    /// Since when the period is known to be this one.
    since: SystemTime,
    totals: Totals,
    /// Generation of the ledger that it was read from; `None` if it has to be read.
    read_at: Option<u64>,
    used_at: Stamp,
    /// How much of the budget there is.
    limit: u64,
    /// What is warned at.
    warns_at: Option<u64>,
    /// Period in which its end was logged.
    told_end: Option<i64>,
}

impl Known {
    /// Adds what was spent, and logs that the budget has reached its warning by that.
    fn spend(&mut self, row: &ReservationRow, spent: u64) {
        let before = self.totals.spent;
        self.totals.spent = before.saturating_add(spent);
        if self.warns_at.is_some_and(|limit| before < limit && self.totals.spent >= limit) {
            let [spent, at] = [self.totals.spent, self.warns_at.unwrap_or_default()].map(|of| row.kind.amount(of));
            let (key, kind) = (&row.key, row.kind);
            let message = format!(
                "key {key}: its budget {kind} has reached its warning (warnAt): {spent} are spent, it warns at {at}"
            );
            log::warn!("{message}");
            alerts::raise(AlertEvent::BudgetWarning, key, message);
        }
    }
}

impl Default for Spending {
    fn default() -> Self {
        Self {
            owner: i64::from_ne_bytes(fastrand::u64(..).to_ne_bytes()),
            next_id: 1,
            known: HashMap::new(),
            open: HashMap::new(),
            made: Vec::new(),
            growing: BTreeMap::new(),
            settled: Vec::new(),
            unreserved: Vec::new(),
            has_written_settled: false,
            heard_at: None,
            look_at: Stamp::default(),
            reconcile_at: Stamp::default(),
            others: false,
        }
    }
}

/// What was looked up a moment ago is there.
const NOT_THERE: LedgerError = LedgerError { kind: FaultKind::Unusable, message: String::new() };

/// Where a batch is: its ledger, the ledger's generation, and its clock.
pub(in crate::ledger) type At<'a, 'l> = (&'a mut (dyn Ledger + 'l), u64, &'a Clock);

impl Spending {
    /// True if nothing waits to be written.
    pub(super) fn is_written(&self) -> bool {
        self.settled.is_empty() && self.unreserved.is_empty()
    }

    /// True if anything is reserved in this batch.
    pub(super) fn has_made(&self) -> bool {
        !self.made.is_empty() || !self.growing.is_empty()
    }

    /// True while there are reservations, which have to be looked after.
    pub(super) fn is_busy(&self) -> bool {
        !self.open.is_empty() || self.others
    }

    /// Reads what is taken of a key's budgets.
    pub(in crate::ledger) fn views(
        &mut self,
        set: &BudgetSet,
        (ledger, generation, clock): At<'_, '_>,
    ) -> Result<Vec<BudgetView>, LedgerError> {
        set.budgets.iter().map(|budget| self.view(&set.key, budget, (&mut *ledger, generation, clock))).collect()
    }

    fn view(&mut self, key: &Arc<str>, budget: &Budget, at: At<'_, '_>) -> Result<BudgetView, LedgerError> {
        let clock = at.2;
        let known = self.refresh(key, budget, at)?;
        let limit = budget.limit_at(clock.wall);
        Ok(BudgetView { kind: budget.kind(), limit, totals: known.totals, ends: known.period.ends })
    }

    /// Returns the budget that has no room for a request, if there is one. The one that is full for longest says most.
    pub(in crate::ledger) fn check(
        &mut self,
        set: &BudgetSet,
        wanted: Amount,
        (ledger, generation, clock): At<'_, '_>,
    ) -> Result<Option<HeldBudget>, LedgerError> {
        let mut held: Option<HeldBudget> = None;
        for budget in &set.budgets {
            let view = self.view(&set.key, budget, (&mut *ledger, generation, clock))?;
            let wanted = wanted.of(budget.unit);
            let is_full = wanted > 0 && view.totals.taken().saturating_add(wanted) > view.limit;
            let is_longer = |before: &HeldBudget| match (before.view.ends, view.ends) {
                (None, _) => false,
                (Some(_), None) => true,
                (Some(before), Some(ends)) => ends > before,
            };
            if is_full && held.as_ref().is_none_or(is_longer) {
                held = Some(HeldBudget { key: Arc::clone(&set.key), view, wanted });
            }
        }
        if let Some(held) = &held {
            self.tell_end(held);
        }
        Ok(held)
    }

    /// Logs that a budget has no room any more, once in a period. Where nothing but requests under way are in the way, or one that no
    /// budget of that size has room for, it may have room for the next one.
    fn tell_end(&mut self, HeldBudget { key, view, wanted }: &HeldBudget) {
        let Some(known) = self.known.get_mut(&(Arc::clone(key), view.kind)) else { return };
        let (number, spent) = (known.period.number, view.totals.spent);
        let is_used_up = spent >= view.limit || *wanted <= view.limit && spent.saturating_add(*wanted) > view.limit;
        if is_used_up && known.told_end.replace(number) != Some(number) {
            let [limit, spent, wanted] = [view.limit, spent, *wanted].map(|amount| view.kind.amount(amount));
            let message = format!(
                "key {key}: its budget {} is used up: {spent} of {limit} are spent, and a request was refused that may take \
                 up to {wanted}",
                view.kind
            );
            log::warn!("{message}");
            alerts::raise(AlertEvent::BudgetExhausted, key, message);
        }
    }

    /// Reserves of a key's budgets, which have room for it. Returns the reservation's number.
    pub(in crate::ledger) fn reserve(&mut self, set: &BudgetSet, reserved: Amount, known: Amount) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let mut rows = Vec::with_capacity(set.budgets.len());
        for budget in &set.budgets {
            let kind = budget.kind();
            let Some(of) = self.known.get_mut(&(Arc::clone(&set.key), kind)) else { continue };
            let amount = reserved.of(budget.unit);
            of.totals.reserved = of.totals.reserved.saturating_add(amount);
            let (key, known) = (Arc::clone(&set.key), known.of(budget.unit).min(amount));
            rows.push(ReservationRow { key, kind, period: of.period, amount, known });
        }
        self.open.insert(id, rows);
        self.made.push(id);
        id
    }

    /// Reserves more for what takes more than was foreseen. If a budget has no room for it, it is told so; what it takes counts in any
    /// case.
    pub(in crate::ledger) fn extend(
        &mut self,
        extend: &Extend,
        (ledger, generation, clock): At<'_, '_>,
    ) -> Result<(), LedgerError> {
        // One that grows twice in a batch goes on from what it has become.
        let limited = |row: &ReservationRow| LimitedPart { row: row.clone(), more: 0, limit: u64::MAX };
        let open = || self.open.get(&extend.id).map(|rows| rows.iter().map(limited).collect());
        let growing = self.growing.get(&extend.id).map(|growing| growing.parts.clone());
        let Some(mut parts) = growing.or_else(open) else { return Ok(()) };
        let set = Arc::clone(&extend.set);
        let views = self.views(&set, (&mut *ledger, generation, clock))?;
        for part in &mut parts {
            let view = views.iter().find(|view| view.kind == part.row.kind);
            part.limit = view.map_or(u64::MAX, |view| view.limit);
        }
        let has_room = |part: &LimitedPart| {
            let view = views.iter().find(|view| view.kind == part.row.kind);
            let more = extend.more.of(part.row.kind.unit);
            view.is_none_or(|view| more == 0 || view.totals.taken().saturating_add(more) <= view.limit)
        };
        // Where others write meanwhile, the ledger says whether it fits.
        let fits = !ledger.is_exclusive() || parts.iter().all(has_room);
        for part in &mut parts {
            let more = if fits { extend.more.of(part.row.kind.unit) } else { 0 };
            part.row.amount = part.row.amount.saturating_add(more);
            part.row.known = extend.known.of(part.row.kind.unit);
            part.more = part.more.saturating_add(more);
            if let Some(of) = self.known_mut(&part.row) {
                of.totals.reserved = of.totals.reserved.saturating_add(more);
            }
        }
        let growing = self.growing.entry(extend.id).or_insert(Growing { parts: Vec::new(), overrun: Vec::new() });
        growing.parts = parts;
        if fits {
            growing.overrun.push(Arc::clone(&extend.overrun));
        } else {
            extend.overrun.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Distinguishes this process's reservations from all others'.
    pub(in crate::ledger) fn owner(&self) -> i64 {
        self.owner
    }

    /// Returns a reservation that was made in this batch, as the ledger is to write it.
    pub(in crate::ledger) fn new_reservation(&self, id: u64) -> Option<NewReservation> {
        let part = |row: &ReservationRow| {
            let known = self.known.get(&(Arc::clone(&row.key), row.kind));
            LimitedPart { row: row.clone(), more: row.amount, limit: known.map_or(u64::MAX, |known| known.limit) }
        };
        let parts = self.open.get(&id)?.iter().map(part).collect();
        Some(NewReservation { id: signed(id), parts })
    }

    /// Returns what is to grow in this batch.
    pub(in crate::ledger) fn growths(&self) -> Vec<Growth> {
        let growth = |(id, growing): (&u64, &Growing)| Growth { id: signed(*id), parts: growing.parts.clone() };
        self.growing.iter().map(growth).collect()
    }

    /// Takes in what came of what was to grow.
    pub(in crate::ledger) fn grown(&mut self, grown: Vec<Grown>) {
        for ((id, Growing { parts, overrun }), grown) in std::mem::take(&mut self.growing).into_iter().zip(grown) {
            match grown {
                Grown::Done => {
                    let Some(open) = self.open.get_mut(&id) else { continue };
                    for LimitedPart { row, .. } in parts {
                        if let Some(part) = open.iter_mut().find(|part| part.kind == row.kind) {
                            *part = row;
                        }
                    }
                }
                Grown::NoRoom => {
                    for overrun in overrun {
                        overrun.store(true, Ordering::Relaxed);
                    }
                    self.read_again();
                }
                // It stays what it was when another process has settled it, so that what it took beyond that counts at its end.
                Grown::Gone => self.read_again(),
            }
        }
    }

    /// Takes back a reservation that the ledger had no room for.
    pub(in crate::ledger) fn take_back(&mut self, id: u64) {
        for row in self.open.remove(&id).unwrap_or_default() {
            if let Some(known) = self.known.get_mut(&(row.key, row.kind)) {
                known.read_at = None;
            }
        }
        self.made.retain(|made| *made != id);
    }

    /// True if what is known of a budget may have changed since it was read. It is then put to what is to be read again; without a place
    /// for that nothing is doubted.
    pub(in crate::ledger) fn doubts(
        &self,
        (key, kind): (&Arc<str>, BudgetKind),
        generation: u64,
        rows: Option<&mut Vec<(Arc<str>, BudgetKind)>>,
    ) -> bool {
        let Some(rows) = rows else { return false };
        let row = (Arc::clone(key), kind);
        if self.known.get(&row).is_some_and(|known| known.read_at == Some(generation)) {
            return false;
        }
        if !rows.contains(&row) {
            rows.push(row);
        }
        true
    }

    /// Returns the budgets of these sets that nothing is known of.
    pub(super) fn unknown<'a>(
        &self,
        sets: impl Iterator<Item = &'a Arc<BudgetSet>>,
        trusted_since: u64,
    ) -> Vec<(Arc<str>, BudgetKind)> {
        let mut rows = Vec::new();
        for set in sets {
            for budget in &set.budgets {
                let row = (Arc::clone(&set.key), budget.kind());
                let is_known = self.known.get(&row).is_some_and(|known| known.read_at >= Some(trusted_since));
                if !is_known && !rows.contains(&row) {
                    rows.push(row);
                }
            }
        }
        rows
    }

    /// Settles a reservation at what was taken. It is written a little later.
    pub(super) fn settle(&mut self, Settled { id, amount }: Settled) {
        let Some(rows) = self.open.remove(&id) else { return };
        let mut settled = Vec::with_capacity(rows.len());
        for row in rows {
            let spent = amount.of(row.kind.unit);
            if let Some(of) = self.known_mut(&row) {
                of.totals.reserved = of.totals.reserved.saturating_sub(row.amount);
                of.spend(&row, spent);
            }
            settled.push(SettledRow { row, spent });
        }
        self.settled.push((id, settled));
    }

    /// What is known of the budget and period that a part of a reservation is of.
    fn known_mut(&mut self, row: &ReservationRow) -> Option<&mut Known> {
        let known = self.known.get_mut(&(Arc::clone(&row.key), row.kind))?;
        (known.period.number == row.period.number).then_some(known)
    }

    /// Brings what is known of a budget up to date.
    fn refresh(
        &mut self,
        key: &Arc<str>,
        budget: &Budget,
        (ledger, generation, clock): At<'_, '_>,
    ) -> Result<&Known, LedgerError> {
        let (kind, id) = (budget.kind(), (Arc::clone(key), budget.kind()));
        let is_five_hours = budget.period == BudgetPeriod::FiveHours;
        let is_current = self.known.get(&id).is_some_and(|known| {
            let is_read = if ledger.is_exclusive() {
                known.read_at == Some(generation)
            } else {
                known.read_at >= Some(ledger.trusted_since())
            };
            is_read
                && known.since <= clock.wall
                && known.period.lasts(clock.wall)
                // One that nothing was taken in has not begun.
                && (!is_five_hours || known.totals.taken() > 0)
        });
        if !is_current {
            let latest = if is_five_hours {
                ledger.latest_period(key, kind, clock.seconds_after(Duration::ZERO))?
            } else {
                None
            };
            let period = Period::of(budget.period, &budget.timezone, clock.wall, latest);
            let mut totals = ledger.budget(key, kind, period.number)?;
            let is_of_it =
                |row: &ReservationRow| row.key == *key && row.kind == kind && row.period.number == period.number;
            for SettledRow { row, spent } in
                self.settled.iter().flat_map(|(_, rows)| rows).filter(|of| is_of_it(&of.row))
            {
                totals.reserved = totals.reserved.saturating_sub(row.amount);
                totals.spent = totals.spent.saturating_add(*spent);
            }
            let told_end = self.known.get(&id).and_then(|known| known.told_end);
            let read_at = Some(generation);
            let known = Known {
                period,
                since: clock.wall,
                totals,
                read_at,
                used_at: clock.boot,
                limit: 0,
                warns_at: None,
                told_end,
            };
            self.known.insert(id.clone(), known);
            self.others |= totals.reserved > 0;
        }
        let known = self.known.get_mut(&id).ok_or(NOT_THERE)?;
        known.used_at = clock.boot;
        let limit = budget.limit_at(clock.wall);
        known.limit = limit;
        known.warns_at = budget.warn_at.map(|share| (limit / 1000).saturating_mul(share) + limit % 1000 * share / 1000);
        Ok(known)
    }

    /// Says that this process is alive, if it has reservations and it is time for that.
    pub(super) fn write_alive(&mut self, ledger: &mut dyn Ledger, clock: &Clock) -> Result<(), LedgerError> {
        let is_due = self.heard_at.is_none_or(|heard| clock.boot - heard >= HEARD_EVERY);
        if is_due && !self.open.is_empty() {
            ledger.hear(self.owner, clock.boot)?;
            self.heard_at = Some(clock.boot);
        }
        Ok(())
    }

    /// Takes in what was taken without a reservation.
    pub(super) fn take_unreserved(&mut self, unreserved: Unreserved) {
        self.unreserved.push(unreserved);
    }

    /// Writes what was taken without a reservation.
    fn write_unreserved(&mut self, (ledger, generation, clock): At<'_, '_>) -> Result<(), LedgerError> {
        let all = std::mem::take(&mut self.unreserved);
        let mut written = Ok(());
        for Unreserved { set, amount } in &all {
            for budget in &set.budgets {
                let spent = amount.of(budget.unit);
                written = written.and_then(|()| {
                    let period = self.refresh(&set.key, budget, (&mut *ledger, generation, clock))?.period;
                    let (key, kind) = (Arc::clone(&set.key), budget.kind());
                    let row = ReservationRow { key, kind, period, amount: 0, known: 0 };
                    ledger.change_budget(&row, signed(spent), 0)?;
                    // What was read before it was written is read again.
                    if let Some(known) = self.known_mut(&row) {
                        known.spend(&row, spent);
                        known.read_at = None;
                    }
                    Ok(())
                });
            }
        }
        // Until the batch is committed it may yet fail.
        self.unreserved = all;
        written
    }

    /// Writes what was settled, and what was taken without a reservation.
    pub(super) fn write_settled(&mut self, (ledger, generation, clock): At<'_, '_>) -> Result<(), LedgerError> {
        self.write_unreserved((&mut *ledger, generation, clock))?;
        self.has_written_settled = true;
        let mut was_taken_for_dead = false;
        for (id, rows) in &self.settled {
            for SettledRow { row, spent } in rows {
                // If it is gone, another process has settled it at what was known.
                let if_gone = signed(*spent).saturating_sub(signed(row.known));
                let spent = SpentInstead { of_it: signed(*spent), if_gone };
                was_taken_for_dead |= !ledger.settle_reservation(self.owner, signed(*id), row, spent)?;
            }
        }
        if was_taken_for_dead {
            self.read_again();
        }
        Ok(())
    }

    /// Looks at the reservations of other processes, if it is time for that, and settles those of dead ones.
    pub(super) fn look_after_others(&mut self, ledger: &mut dyn Ledger, clock: &Clock) -> Result<(), LedgerError> {
        if clock.boot < self.look_at {
            return Ok(());
        }
        self.look_at = clock.boot + LOOK_EVERY;
        // Of a process that began with the machine nothing could be heard earlier.
        let since = Stamp(clock.boot.0.saturating_sub(u64::try_from(DEAD_AFTER.as_millis()).unwrap_or(u64::MAX)));
        self.others = ledger.has_others_reservations(self.owner)?;
        let dead = if self.others { ledger.dead_reservations(self.owner, since)? } else { Vec::new() };
        let settled = dead.len();
        for OthersReservation { owner, id, row } in dead {
            let spent = SpentInstead { of_it: signed(row.known), if_gone: 0 };
            ledger.settle_reservation(owner, id, &row, spent)?;
        }
        if settled > 0 {
            self.read_again();
            log::warn!("{settled} reservations of budgets of a process that has died were settled at what was known");
        }
        if clock.boot >= self.reconcile_at {
            self.reconcile_at = clock.boot + RECONCILE_EVERY;
            if ledger.reconcile_budgets()? > 0 {
                self.read_again();
                log::warn!("budgets had more reserved than their reservations come to; that is corrected");
            }
        }
        ledger.forget_budgets(since, clock.seconds_after(Duration::ZERO))
    }

    /// The batch is committed: what it has made and written is so.
    pub(in crate::ledger) fn committed(&mut self) {
        self.made.clear();
        if std::mem::take(&mut self.has_written_settled) {
            self.settled.clear();
            self.unreserved.clear();
        }
    }

    /// The batch has failed: none of it was done, or nothing was reserved in it if all else is kept.
    pub(in crate::ledger) fn undo(&mut self, is_kept: bool) {
        for id in std::mem::take(&mut self.made) {
            self.open.remove(&id);
        }
        self.growing.clear();
        if is_kept {
            self.committed();
        }
        self.has_written_settled = false;
        self.heard_at = None;
        self.read_again();
    }

    /// Drops what nobody has asked for in a while.
    pub(super) fn clean(&mut self, now: Stamp) {
        self.known.retain(|_, known| now - known.used_at < KEPT);
    }

    /// What is known of a key's budgets is read again before it is used.
    pub(super) fn read_again_of(&mut self, set: &BudgetSet) {
        for budget in &set.budgets {
            if let Some(known) = self.known.get_mut(&(Arc::clone(&set.key), budget.kind())) {
                known.read_at = None;
            }
        }
    }

    /// The same for these budgets.
    pub(in crate::ledger) fn read_again_rows(&mut self, rows: &[(Arc<str>, BudgetKind)]) {
        for row in rows {
            if let Some(known) = self.known.get_mut(row) {
                known.read_at = None;
            }
        }
    }

    fn read_again(&mut self) {
        self.known.values_mut().for_each(|known| known.read_at = None);
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
