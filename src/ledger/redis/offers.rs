//! What this process has written of late, for a server that has lost it.
//!
//! A server that takes over, or begins anew, may lack the last writes of the one before it. They are a tail: whatever it has, it has all
//! of what came before. So the number of the last batch that it has tells what it lacks.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use jiff::civil::Date;

use super::wire::Write;
use crate::ledger::Change;
use crate::ledger::budgets::{BudgetKind, ReservationRow};
use crate::ledger::claims::LimitedPart;
use crate::limit::{Days, SPAN, Stamp};

/// Time for which batches are kept one by one. Of what is older only whole pieces can be offered.
const EACH: Duration = Duration::from_secs(20);
/// Writes that are kept one by one.
const WRITES_MAX: usize = 100_000;
/// Time for which pieces are kept: as long as a day can count.
const KEPT: Duration = Duration::from_hours(50);
/// Pieces in which older writes are kept; each is twice as long as the one after it, or shorter.
const PIECES_MAX: usize = 64;

/// Writes in the order of their batches.
#[derive(Debug, Default)]
pub(super) struct Offers {
    /// Older ones, merged. The newest is last.
    pieces: VecDeque<Piece>,
    /// Batches of the last seconds.
    batches: VecDeque<Batch>,
    writes: usize,
    /// Requests in flight, by account: the latest number counts.
    in_flight: BTreeMap<String, u64>,
}

#[derive(Debug)]
struct Batch {
    number: u64,
    at: Stamp,
    writes: Vec<Write>,
}

/// A budget, and what is added to what is spent and reserved of it.
type BudgetChange = (ReservationRow, i64, i64);

/// Batches that are merged.
#[derive(Debug, Default)]
struct Piece {
    /// Number of the last batch.
    last: u64,
    /// When the first and the last one were done.
    from: Stamp,
    to: Stamp,
    /// By account and days: slots that may still count, and what counts in the days.
    counts: BTreeMap<(String, Date, Date), BTreeMap<u64, Change>>,
    /// By key, kind and period: what is spent and reserved.
    budgets: BTreeMap<(Arc<str>, BudgetKind, i64), BudgetChange>,
    /// By owner, number and kind: reservations that did not end in it.
    reserved: BTreeMap<(i64, i64, BudgetKind), LimitedPart>,
    /// Ends of reservations that were made before it.
    settled: Vec<Write>,
    /// By table, moment and field.
    tokens: BTreeMap<(&'static str, Option<i64>, String), Write>,
}

impl Offers {
    /// Takes in what a batch has written.
    pub(super) fn push(&mut self, number: u64, at: Stamp, writes: Vec<Write>) {
        for write in &writes {
            match write {
                Write::InFlight { account, own: 0 } => drop(self.in_flight.remove(account)),
                Write::InFlight { account, own } => drop(self.in_flight.insert(account.clone(), *own)),
                _ => {}
            }
        }
        self.writes += writes.len();
        self.batches.push_back(Batch { number, at, writes });
        while let Some(oldest) = self.batches.front()
            && (at - oldest.at > EACH || self.writes > WRITES_MAX && self.batches.len() > 1)
        {
            let Some(batch) = self.batches.pop_front() else { break };
            self.writes -= batch.writes.len();
            self.merge(batch);
        }
        while self.pieces.front().is_some_and(|piece| at - piece.to > KEPT) {
            self.pieces.pop_front();
        }
    }

    /// Returns everything that was written after a batch, and what cannot be told apart from it.
    pub(super) fn since(&self, stored: u64) -> Vec<Write> {
        let pieces = self.pieces.iter().filter(|piece| piece.last > stored).flat_map(Piece::writes);
        let batches = self.batches.iter().filter(|batch| batch.number > stored);
        pieces.chain(batches.flat_map(|batch| batch.writes.iter().cloned())).chain(self.in_flight()).collect()
    }

    /// Returns what is in flight.
    pub(super) fn in_flight(&self) -> impl Iterator<Item = Write> {
        self.in_flight.iter().map(|(account, own)| Write::InFlight { account: account.clone(), own: *own })
    }

    fn merge(&mut self, batch: Batch) {
        let is_open = |piece: &Piece| batch.at - piece.from <= EACH;
        if !self.pieces.back().is_some_and(is_open) {
            self.pieces.iter_mut().filter(|piece| batch.at - piece.to > SPAN).for_each(Piece::forget_slots);
            self.pieces.push_back(Piece::new(&batch));
        }
        if let Some(piece) = self.pieces.back_mut() {
            piece.add(batch);
        }
        if self.pieces.len() > PIECES_MAX {
            self.merge_pieces();
        }
    }

    /// Merges the two neighbours whose time together is shortest for how long ago they were.
    fn merge_pieces(&mut self) {
        let Some(newest) = self.pieces.back().map(|piece| piece.to) else { return };
        let weight = |at: usize| {
            let (Some(one), Some(next)) = (self.pieces.get(at), self.pieces.get(at + 1)) else { return u128::MAX };
            let length = (next.to - one.from).as_millis().max(1);
            length * 1000 / (newest - one.from).as_millis().max(1)
        };
        let Some(at) = (0..self.pieces.len().saturating_sub(1)).min_by_key(|at| weight(*at)) else { return };
        let (Some(next), Some(one)) = (self.pieces.remove(at + 1), self.pieces.get_mut(at)) else { return };
        one.join(&next, newest);
    }
}

impl Piece {
    fn new(batch: &Batch) -> Self {
        let (number, at) = (batch.number, batch.at);
        Self { last: number, from: at, to: at, ..Self::default() }
    }

    fn add(&mut self, batch: Batch) {
        (self.last, self.to) = (batch.number, batch.at);
        for write in batch.writes {
            self.add_write(write);
        }
    }

    fn add_write(&mut self, write: Write) {
        match write {
            Write::Counts { account, slot, days, change } => {
                let slots = self.counts.entry((account, days.first, days.last)).or_default();
                slots.entry(slot).or_default().merge(change);
            }
            Write::Budget { row, spent, reserved } => self.add_budget(row, spent, reserved),
            Write::Reserve { owner, id, mut part } => {
                let key = (owner, id, part.row.kind);
                // One that has grown adds to what it had.
                let before = self.reserved.get(&key).map_or(0, |before| before.more);
                part.more = part.more.saturating_add(before);
                self.reserved.insert(key, part);
            }
            Write::Settle { owner, id, row, spent, if_gone } => {
                if self.reserved.remove(&(owner, id, row.kind)).is_some_and(|part| part.more == part.row.amount) {
                    self.add_budget(row, spent, 0);
                } else {
                    self.settled.push(Write::Settle { owner, id, row, spent, if_gone });
                }
            }
            Write::Tokens { table, moment, kept, field, used, columns } => {
                let key = (table, moment, field.clone());
                let added = Write::Tokens { table, moment, kept, field, used, columns };
                match self.tokens.get_mut(&key) {
                    Some(before) => before.merge_tokens(&added),
                    None => drop(self.tokens.insert(key, added)),
                }
            }
            // What is said is said again when it changes.
            Write::Hear { .. } | Write::InFlight { .. } | Write::Notice(_) => {}
        }
    }

    fn add_budget(&mut self, row: ReservationRow, spent: i64, reserved: i64) {
        let key = (Arc::clone(&row.key), row.kind, row.period.number);
        let (_, of_spent, of_reserved) = self.budgets.entry(key).or_insert((row, 0, 0));
        *of_spent = of_spent.saturating_add(spent);
        *of_reserved = of_reserved.saturating_add(reserved);
    }

    fn join(&mut self, next: &Self, now: Stamp) {
        (self.last, self.to) = (next.last, next.to);
        for write in next.writes() {
            self.add_write(write);
        }
        if now - self.to > SPAN {
            self.forget_slots();
        }
    }

    /// Keeps only what counts in days, since no slot of it counts any more.
    fn forget_slots(&mut self) {
        for slots in self.counts.values_mut() {
            let mut all = Change::default();
            for change in slots.values() {
                all.merge(*change);
            }
            *slots = BTreeMap::from([(0, all)]);
        }
    }

    fn writes(&self) -> Vec<Write> {
        let of_account = |((account, first, last), slots): (&(String, _, _), &BTreeMap<u64, Change>)| {
            let days = Days { first: *first, last: *last };
            let write = |(slot, change): (&u64, &Change)| Write::Counts {
                account: account.clone(),
                slot: *slot,
                days,
                change: *change,
            };
            slots.iter().map(write).collect::<Vec<_>>()
        };
        let budget = |(row, spent, reserved): &BudgetChange| Write::Budget {
            row: row.clone(),
            spent: *spent,
            reserved: *reserved,
        };
        let reserve = |((owner, id, _), part): (&(i64, i64, _), &LimitedPart)| Write::Reserve {
            owner: *owner,
            id: *id,
            part: part.clone(),
        };
        let counts = self.counts.iter().flat_map(of_account);
        let budgets = self.budgets.values().map(budget).chain(self.settled.iter().cloned());
        let reserved = self.reserved.iter().map(reserve);
        counts.chain(budgets).chain(reserved).chain(self.tokens.values().cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BudgetPeriod, BudgetUnit};
    use crate::limit::Period;
    use jiff::civil::date;

    fn counts(slot: u64, attempts: i64) -> Write {
        let days = Days { first: date(2026, 11, 25), last: date(2026, 11, 25) };
        Write::Counts { account: "endpoint:a".into(), slot, days, change: Change { attempts, tokens: 0 } }
    }

    fn attempts(writes: &[Write]) -> i64 {
        let of = |write: &Write| match write {
            Write::Counts { change, .. } => change.attempts,
            _ => 0,
        };
        writes.iter().map(of).sum()
    }

    fn row(amount: u64) -> ReservationRow {
        let kind = BudgetKind { unit: BudgetUnit::Tokens, period: BudgetPeriod::Total };
        ReservationRow { key: "ada".into(), kind, period: Period { number: 0, ends: None }, amount, known: 1 }
    }

    fn reserve(id: i64, amount: u64, more: u64) -> Write {
        Write::Reserve { owner: 1, id, part: LimitedPart { row: row(amount), more, limit: 1000 } }
    }

    fn settle(id: i64, amount: u64, spent: i64) -> Write {
        Write::Settle { owner: 1, id, row: row(amount), spent, if_gone: spent - 1 }
    }

    /// What a budget comes to if these are done on a server that has some reservations already.
    fn budget(writes: &[Write], mut there: BTreeMap<i64, u64>) -> (i64, i64) {
        let (mut total_spent, mut total_reserved) = (0, 0);
        for write in writes {
            match write {
                Write::Budget { spent, reserved, .. } => {
                    total_spent += spent;
                    total_reserved += reserved;
                }
                Write::Reserve { id, part, .. } => {
                    there.insert(*id, part.row.amount);
                    total_reserved += i64::try_from(part.more).unwrap();
                }
                Write::Settle { id, spent, if_gone, .. } => match there.remove(id) {
                    Some(amount) => {
                        total_spent += spent;
                        total_reserved -= i64::try_from(amount).unwrap();
                    }
                    None => total_spent += if_gone,
                },
                _ => {}
            }
        }
        (total_spent, total_reserved)
    }

    #[test]
    fn of_the_last_seconds_exactly_what_is_lost_is_offered_and_of_before_whole_pieces() {
        let mut offers = Offers::default();
        let mut stamps = Vec::new();
        // Three hours, a batch every 200 ms.
        for number in 1..=54_000_u64 {
            let at = Stamp(number * 200);
            offers.push(number, at, vec![counts(at.0 / 250, 1)]);
            stamps.push(at);
        }
        for lost in [0, 1, 20, 99] {
            assert_eq!(attempts(&offers.since(54_000 - lost)), i64::try_from(lost).unwrap(), "exactly");
        }
        for lost in [150_u64, 1000, 5000, 20_000, 53_999] {
            let offered = attempts(&offers.since(54_000 - lost));
            let lost = i64::try_from(lost).unwrap();
            assert!((lost..=2 * lost + 200).contains(&offered), "{offered} for {lost}");
        }
        assert_eq!(attempts(&offers.since(0)), 54_000, "all of it");
        assert!(offers.pieces.len() <= PIECES_MAX && offers.writes <= 110, "{}", offers.pieces.len());
        // Slots that count no more are one.
        assert!(offers.since(0).len() < 1500, "{}", offers.since(0).len());
        let later = Stamp(54_000 * 200) + KEPT + EACH + EACH;
        offers.push(54_001, later, Vec::new());
        assert_eq!(attempts(&offers.since(0)), 0, "nobody asks for it any more");
    }

    #[test]
    fn reservations_come_to_the_same_in_pieces() {
        // Made, grown and settled, far apart or not; the reservation 2 stays.
        for apart in [Duration::ZERO, Duration::from_secs(30), Duration::from_mins(5)] {
            let mut offers = Offers::default();
            let steps: [&[Write]; 4] =
                [&[reserve(1, 100, 100), reserve(2, 40, 40)], &[reserve(1, 150, 50)], &[settle(1, 150, 120)], &[]];
            let mut at = Stamp(1_000_000);
            for (number, writes) in (1..).zip(steps) {
                offers.push(number, at, writes.to_vec());
                at = at + apart;
            }
            // A server that has the first batch has both reservations.
            let (of_first, there) = (offers.since(1), BTreeMap::from([(1, 100), (2, 40)]));
            assert_eq!(budget(&of_first, there), (120, -100), "{apart:?}: {of_first:?}");
            for number in 5..200 {
                offers.push(number, at, Vec::new());
                at = at + Duration::from_secs(10);
            }
            assert_eq!(budget(&offers.since(0), BTreeMap::new()), (120, 40), "{apart:?}");
        }
    }

    #[test]
    fn statistics_of_one_field_are_one() {
        let mut offers = Offers::default();
        for number in 1..=2000_u64 {
            let write = Write::Tokens {
                table: "total",
                moment: None,
                kept: Duration::ZERO,
                field: "a:m".into(),
                used: i64::try_from(number).unwrap(),
                columns: vec![1, 3],
            };
            offers.push(number, Stamp(number * 1000), vec![write]);
        }
        let offered = offers.since(0);
        let (mut sums, mut last) = ([0, 0], 0);
        for write in &offered {
            let Write::Tokens { used, columns, .. } = write else { panic!("{write:?}") };
            sums = [sums[0] + columns[0], sums[1] + columns[1]];
            last = last.max(*used);
        }
        assert_eq!((sums, last), ([2000, 6000], 2000));
        assert!(offered.len() < 100, "{}", offered.len());
    }

    #[test]
    fn what_is_in_flight_is_the_last_number() {
        let mut offers = Offers::default();
        let flight = |own| vec![Write::InFlight { account: "endpoint:a".into(), own }];
        offers.push(1, Stamp(1), flight(3));
        offers.push(2, Stamp(2), flight(2));
        assert_eq!(offers.in_flight().collect::<Vec<_>>(), flight(2));
        offers.push(3, Stamp(3), flight(0));
        assert_eq!(offers.in_flight().count(), 0);
    }
}
