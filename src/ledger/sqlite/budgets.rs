//! Rows of budgets and their reservations.

use std::time::{Duration, SystemTime};

use rusqlite::types::ToSql;
use rusqlite::{OptionalExtension, params};

use super::{SqliteLedger, explain};
use crate::ledger::LedgerError;
use crate::ledger::budgets::{BudgetKind, BudgetRows, OthersReservation, ReservationRow, SpentInstead, Totals};
use crate::limit::{Period, Stamp};

/// Time for which a budget's row is kept once its period is over: the last one of a month is still there to be looked at.
const KEPT: Duration = Duration::from_hours(35 * 24);
/// Parts of reservations of dead processes that are settled together; the rest have their turn after these.
const DEAD_MAX: u32 = 10_000;

impl BudgetRows for SqliteLedger {
    fn budget(&mut self, key: &str, kind: BudgetKind, period: i64) -> Result<Totals, LedgerError> {
        const SQL: &str =
            "SELECT max(spent, 0), max(reserved, 0) FROM budget WHERE key = ?1 AND kind = ?2 AND period = ?3";
        let read = || -> rusqlite::Result<Option<Totals>> {
            let row = |row: &rusqlite::Row<'_>| Ok(Totals { spent: row.get(0)?, reserved: row.get(1)? });
            self.connection.prepare_cached(SQL)?.query_row(params![key, kind.to_string(), period], row).optional()
        };
        read().map(Option::unwrap_or_default).map_err(|error| explain(&self.path, &error))
    }

    fn latest_period(&mut self, key: &str, kind: BudgetKind, now: i64) -> Result<Option<i64>, LedgerError> {
        const SQL: &str = "SELECT max(period) FROM budget WHERE key = ?1 AND kind = ?2 AND period <= ?3";
        let read = || -> rusqlite::Result<Option<i64>> {
            self.connection.prepare_cached(SQL)?.query_row(params![key, kind.to_string(), now], |row| row.get(0))
        };
        read().map_err(|error| explain(&self.path, &error))
    }

    fn change_budget(&mut self, row: &ReservationRow, spent: i64, reserved: i64) -> Result<(), LedgerError> {
        // A lost reservation leaves a difference, and it must not become negative.
        const SQL: &str = "INSERT INTO budget (key, kind, period, spent, reserved, until) \
             VALUES (?1, ?2, ?3, max(?4, 0), max(?5, 0), ?6) \
             ON CONFLICT DO UPDATE SET spent = max(spent + ?4, 0), reserved = max(reserved + ?5, 0)";
        let ReservationRow { key, kind, period, .. } = row;
        let until = period.ends.map(|ends| seconds(ends + KEPT));
        self.run(SQL, &[key, &kind.to_string(), &period.number, &spent, &reserved, &until])
    }

    fn put_reservation(&mut self, owner: i64, id: i64, row: &ReservationRow) -> Result<(), LedgerError> {
        const SQL: &str = "INSERT OR REPLACE INTO reservation (owner, id, key, kind, period, amount, known) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
        let ReservationRow { key, kind, period, amount, known } = row;
        self.run(SQL, &[&owner, &id, key, &kind.to_string(), &period.number, amount, known])
    }

    fn grow_reservation(&mut self, owner: i64, id: i64, row: &ReservationRow) -> Result<bool, LedgerError> {
        const SQL: &str = "UPDATE reservation SET amount = ?4, known = ?5 WHERE owner = ?1 AND id = ?2 AND kind = ?3";
        self.changed(SQL, &[&owner, &id, &row.kind.to_string(), &row.amount, &row.known]).map(|rows| rows > 0)
    }

    fn settle_reservation(
        &mut self,
        owner: i64,
        id: i64,
        row: &ReservationRow,
        spent: SpentInstead,
    ) -> Result<bool, LedgerError> {
        const SQL: &str = "DELETE FROM reservation WHERE owner = ?1 AND id = ?2 AND kind = ?3";
        let is_there = self.changed(SQL, &[&owner, &id, &row.kind.to_string()])? > 0;
        if is_there {
            let reserved = i64::try_from(row.amount).unwrap_or(i64::MAX);
            self.change_budget(row, spent.of_it, -reserved)?;
        } else {
            self.change_budget(row, spent.if_gone, 0)?;
        }
        Ok(is_there)
    }

    fn hear(&mut self, owner: i64, now: Stamp) -> Result<(), LedgerError> {
        self.run("INSERT OR REPLACE INTO reservation_owner (owner, heard) VALUES (?1, ?2)", &[&owner, &now.0])
    }

    fn has_others_reservations(&mut self, owner: i64) -> Result<bool, LedgerError> {
        const SQL: &str = "SELECT EXISTS (SELECT 1 FROM reservation WHERE owner <> ?1)";
        let read = || self.connection.prepare_cached(SQL)?.query_row([owner], |row| row.get(0));
        read().map_err(|error| explain(&self.path, &error))
    }

    fn reconcile_budgets(&mut self) -> Result<usize, LedgerError> {
        const SUM: &str = "(SELECT coalesce(sum(amount), 0) FROM reservation \
             WHERE (reservation.key, reservation.kind, reservation.period) = (budget.key, budget.kind, budget.period))";
        self.changed(&format!("UPDATE budget SET reserved = {SUM} WHERE reserved > 0 AND reserved <> {SUM}"), &[])
    }

    fn dead_reservations(&mut self, owner: i64, since: Stamp) -> Result<Vec<OthersReservation>, LedgerError> {
        const SQL: &str = "SELECT owner, id, key, kind, period, amount, known \
             FROM reservation LEFT JOIN reservation_owner USING (owner) \
             WHERE owner <> ?1 AND coalesce(heard, 0) < ?2 LIMIT ?3";
        let read = || -> rusqlite::Result<Vec<_>> {
            let row = |row: &rusqlite::Row<'_>| {
                let kind: String = row.get(3)?;
                // Of a later version's kinds this one knows nothing.
                let Some(kind) = BudgetKind::parse(&kind) else { return Ok(None) };
                let period = Period { number: row.get(4)?, ends: None };
                let part = ReservationRow {
                    key: row.get::<_, String>(2)?.into(),
                    kind,
                    period,
                    amount: row.get(5)?,
                    known: row.get(6)?,
                };
                Ok(Some(OthersReservation { owner: row.get(0)?, id: row.get(1)?, row: part }))
            };
            let mut statement = self.connection.prepare_cached(SQL)?;
            let rows = statement.query_map(params![owner, since.0, DEAD_MAX], row)?;
            rows.filter_map(Result::transpose).collect()
        };
        read().map_err(|error| explain(&self.path, &error))
    }

    fn forget_budgets(&mut self, since: Stamp, now: i64) -> Result<(), LedgerError> {
        const OWNERS: &str = "DELETE FROM reservation_owner WHERE heard < ?1 \
             AND owner NOT IN (SELECT owner FROM reservation)";
        self.run(OWNERS, &[&since.0])?;
        self.run("DELETE FROM budget WHERE until < ?1", &[&now])
    }
}

impl SqliteLedger {
    /// Runs a statement. Returns how many rows it has changed.
    fn changed(&self, sql: &str, parameters: &[&dyn ToSql]) -> Result<usize, LedgerError> {
        let ran = self.connection.prepare_cached(sql).and_then(|mut statement| statement.execute(parameters));
        ran.map_err(|error| explain(&self.path, &error))
    }
}

fn seconds(moment: SystemTime) -> i64 {
    let seconds = moment.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    i64::try_from(seconds).unwrap_or(i64::MAX)
}
