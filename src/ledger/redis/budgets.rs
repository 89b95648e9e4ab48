//! Rows of budgets and their reservations.

use std::collections::HashMap;

use super::wire::{self, Write, budget_name, budget_of_name};
use super::{DEAD_AFTER, RedisLedger, Server, pairs, texts};
use crate::ledger::budgets::{BudgetKind, BudgetRows, OthersReservation, ReservationRow, SpentInstead, Totals};
use crate::ledger::{Ledger as _, LedgerError, Rows};
use crate::limit::{Period, Stamp};

/// Parts of reservations of dead processes that are settled together; the rest have their turn after these.
const DEAD_MAX: usize = 1000;

impl<S: Server> RedisLedger<S> {
    fn budget_row(&mut self, key: &str, kind: BudgetKind) -> Result<&HashMap<String, String>, LedgerError> {
        let name = budget_name(key, kind);
        if !self.budgets.contains_key(&name) {
            self.read(&Rows { accounts: Vec::new(), budgets: vec![(key.into(), kind)] })?;
        }
        self.budgets
            .get(&name)
            .ok_or_else(|| super::unusable(self.server.name(), "does not answer what it was asked for"))
    }

    /// Names of the processes that have reservations.
    fn owners(&mut self) -> Result<Vec<i64>, LedgerError> {
        let owners = texts(self.run_one(&["SMEMBERS", &self.key("owners")])?);
        Ok(owners.iter().filter_map(|owner| owner.parse().ok()).collect())
    }
}

impl<S: Server> BudgetRows for RedisLedger<S> {
    fn budget(&mut self, key: &str, kind: BudgetKind, period: i64) -> Result<Totals, LedgerError> {
        let row = self.budget_row(key, kind)?;
        let number = |field: String| row.get(&field).and_then(|value| value.parse().ok()).unwrap_or_default();
        Ok(Totals { spent: number(format!("s{period}")), reserved: number(format!("r{period}")) })
    }

    fn latest_period(&mut self, key: &str, kind: BudgetKind, now: i64) -> Result<Option<i64>, LedgerError> {
        let periods = self.budget_row(key, kind)?.keys().filter_map(|field| field.strip_prefix('e')?.parse().ok());
        Ok(periods.filter(|period: &i64| *period <= now).max())
    }

    fn change_budget(&mut self, row: &ReservationRow, spent: i64, reserved: i64) -> Result<(), LedgerError> {
        self.writes.push(Write::Budget { row: row.clone(), spent, reserved });
        Ok(())
    }

    // Reservations are made and grow as parts of claims.

    fn put_reservation(&mut self, _owner: i64, _id: i64, _row: &ReservationRow) -> Result<(), LedgerError> {
        Ok(())
    }

    fn grow_reservation(&mut self, _owner: i64, _id: i64, _row: &ReservationRow) -> Result<bool, LedgerError> {
        Ok(true)
    }

    fn settle_reservation(
        &mut self,
        owner: i64,
        id: i64,
        row: &ReservationRow,
        spent: SpentInstead,
    ) -> Result<bool, LedgerError> {
        let SpentInstead { of_it, if_gone } = spent;
        self.writes.push(Write::Settle { owner, id, row: row.clone(), spent: of_it, if_gone });
        Ok(true)
    }

    fn hear(&mut self, owner: i64, _now: Stamp) -> Result<(), LedgerError> {
        self.writes.push(Write::Hear { owner });
        Ok(())
    }

    fn has_others_reservations(&mut self, owner: i64) -> Result<bool, LedgerError> {
        Ok(self.owners()?.iter().any(|other| *other != owner))
    }

    fn dead_reservations(&mut self, owner: i64, since: Stamp) -> Result<Vec<OthersReservation>, LedgerError> {
        // While the server could not be reached, nobody could say that it is alive.
        let is_in_touch = self.in_touch_since.is_some_and(|began| self.time.boot() - began >= DEAD_AFTER);
        if !is_in_touch || self.unknown().all_until > self.time.boot() {
            return Ok(Vec::new());
        }
        let since = super::signed(since.0).saturating_add(self.ahead_ms.unwrap_or_default());
        let mut found = Vec::new();
        for other in self.owners()?.into_iter().filter(|other| *other != owner) {
            let name = other.to_string();
            let heard = wire::text(self.run_one(&["HGET", &self.key("heard"), &name])?);
            if heard.and_then(|heard| heard.parse::<i64>().ok()).is_some_and(|heard| heard >= since) {
                continue;
            }
            let rows = texts(self.run_one(&["HGETALL", &self.key(&format!("reserved:{name}"))])?);
            if rows.is_empty() {
                self.run_one(&["SREM", &self.key("owners"), &name])?;
            }
            found.extend(pairs(&rows).filter_map(|(field, value)| reservation(other, field, value)));
            if found.len() >= DEAD_MAX {
                found.truncate(DEAD_MAX);
                break;
            }
        }
        Ok(found)
    }

    fn reconcile_budgets(&mut self) -> Result<usize, LedgerError> {
        // What is reserved and its reservations change in one step of the server, and a server that has lost one has lost both.
        Ok(0)
    }

    fn forget_budgets(&mut self, _since: Stamp, _now: i64) -> Result<(), LedgerError> {
        Ok(())
    }
}

/// A part of a reservation as its field and value have it.
fn reservation(owner: i64, field: &str, value: &str) -> Option<OthersReservation> {
    // Of a later version's kinds this one knows nothing.
    let (id, _) = wire::part_of_name(field)?;
    let mut words = value.split(' ');
    let (key, kind) = budget_of_name(words.next()?)?;
    let mut number = || words.next()?.parse::<i64>().ok();
    let period = Period { number: number()?, ends: None };
    let mut amount = || u64::try_from(number()?).ok();
    let (amount, known) = (amount()?, amount()?);
    Some(OthersReservation { owner, id, row: ReservationRow { key: key.into(), kind, period, amount, known } })
}
