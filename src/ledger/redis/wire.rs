//! The words of a batch: what is written to the server's script (`batch.lua`), and its reply.

use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use jiff::civil::Date;
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

use crate::config::{BudgetPeriod, Limit};
use crate::ledger::budgets::{BudgetKind, ReservationRow};
use crate::ledger::claims::{Ahead, Claim, Claims, Grown, Growth, LimitedPart, Part};
use crate::ledger::notices::Notice;
use crate::ledger::{AccountId, AccountSet, Change, LimitedAccount};
use crate::limit::{CountedAt, Days};

/// Characters that separate the parts of a name, or that people who look at keys would stumble over.
const SEPARATORS: &AsciiSet =
    &CONTROLS.add(b' ').add(b'%').add(b':').add(b'{').add(b'}').add(b'"').add(b'\'').add(b'\\');
/// Time for which a budget's row is kept once its period is over: the last one of a month is still there to be looked at.
const KEPT: Duration = Duration::from_hours(35 * 24);

/// Arguments of a call.
#[derive(Clone, Debug, Default)]
pub struct Arguments(pub(super) Vec<Vec<u8>>);

impl Arguments {
    pub(super) fn text(&mut self, text: &str) -> &mut Self {
        self.0.push(text.as_bytes().to_vec());
        self
    }

    pub(super) fn number(&mut self, number: impl itoa::Integer) -> &mut Self {
        self.0.push(itoa::Buffer::new().format(number).as_bytes().to_vec());
        self
    }

    pub(super) fn dates(&mut self, days: Days) -> &mut Self {
        self.number(days.each().count());
        for date in days.each() {
            self.text(&date.to_string());
        }
        self
    }

    fn limit(&mut self, limit: Limit) -> &mut Self {
        match limit {
            Limit::AtMost(limit) => self.number(limit),
            Limit::Unlimited | Limit::Off => self.number(-1),
        }
    }

    /// Adds what is the same for all claims of a process, and the claims.
    pub(super) fn claims(&mut self, claims: &Claims) {
        for claim in &claims.draws {
            self.claim(claims, claim);
        }
        for growth in &claims.growths {
            self.growth(claims.owner, growth);
        }
    }

    fn claim(&mut self, claims: &Claims, claim: &Claim) {
        self.text("claim").number(claim.draws).number(claim.tokens);
        self.number(claim.ahead.endpoint).number(claim.ahead.caller);
        for set in [&claim.endpoint, &claim.caller] {
            let accounts = set.as_deref().map(AccountSet::accounts).unwrap_or_default();
            self.number(accounts.len());
            for of in accounts {
                self.account(of, claim.counted, claims);
            }
        }
        self.number(claims.owner);
        let (id, parts) = claim.reservation.as_ref().map_or((0, &[][..]), |made| (made.id, &made.parts[..]));
        self.number(parts.len());
        for part in parts {
            self.part(id, part);
        }
    }

    fn account(&mut self, of: &LimitedAccount, counted: CountedAt, claims: &Claims) {
        let LimitedAccount { account, limits } = of;
        let by = limits.by_kind;
        self.text(&account_name(account.id())).limit(by.rpm).limit(by.rpd).limit(by.tpm).limit(by.tpd);
        if of.shares_concurrency() {
            // Those of this batch are counted on the way.
            let claimed: u64 = claims.draws.iter().map(|claim| claim.draws_of(account)).sum();
            let own = account.mirror().quota.own_in_flight();
            self.limit(by.max_concurrent).number(own.saturating_sub(claimed));
        } else {
            self.number(-1).number(0);
        }
        self.dates(limits.counted(counted).days);
    }

    fn growth(&mut self, owner: i64, Growth { id, parts }: &Growth) {
        self.text("grow").number(owner).number(parts.len());
        for part in parts {
            self.part(*id, part);
        }
    }

    fn part(&mut self, id: i64, LimitedPart { row, more, limit }: &LimitedPart) {
        let is_five_hours = row.kind.period == BudgetPeriod::FiveHours;
        self.text(&budget_name(&row.key, row.kind)).text(if is_five_hours { "1" } else { "0" });
        self.number(row.period.number).number(forgotten_at(row)).number(row.amount).number(row.known);
        self.number(*more).number(*limit).text(&part_name(id, row.kind));
    }
}

/// A change that is written without a condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Write {
    /// Counts of an account, in one of the server's slots and in days.
    Counts { account: String, slot: u64, days: Days, change: Change },
    /// What is spent and reserved of a budget.
    Budget { row: ReservationRow, spent: i64, reserved: i64 },
    /// A reservation that was granted.
    Reserve { owner: i64, id: i64, part: LimitedPart },
    /// A part of a reservation that ends.
    Settle { owner: i64, id: i64, row: ReservationRow, spent: i64, if_gone: i64 },
    /// The owner of reservations is alive.
    Hear { owner: i64 },
    /// Requests of an account that this process has in flight.
    InFlight { account: String, own: u64 },
    /// What is said to other processes.
    Notice(Notice),
    /// Token statistics.
    Tokens { table: &'static str, moment: Option<i64>, kept: Duration, field: String, used: i64, columns: Vec<u64> },
}

impl Write {
    /// Adds the numbers of another row of the same field.
    pub(super) fn merge_tokens(&mut self, other: &Self) {
        let (Self::Tokens { used, columns, .. }, Self::Tokens { used: later, columns: more, .. }) = (self, other)
        else {
            return;
        };
        *used = (*used).max(*later);
        for (column, more) in columns.iter_mut().zip(more) {
            *column = column.saturating_add(*more);
        }
    }

    pub(super) fn encode(&self, to: &mut Arguments) {
        match self {
            Self::Counts { account, slot, days, change } => {
                to.text("add").text(account).number(*slot).dates(*days).number(change.attempts).number(change.tokens);
            }
            Self::Budget { row, spent, reserved } => {
                to.text("budget").text(&budget_name(&row.key, row.kind)).number(row.period.number);
                to.number(forgotten_at(row)).number(*spent).number(*reserved);
            }
            Self::Reserve { owner, id, part } => {
                to.text("reserve").number(*owner).part(*id, part);
            }
            Self::Settle { owner, id, row, spent, if_gone } => {
                to.text("settle").number(*owner).text(&part_name(*id, row.kind));
                to.text(&budget_name(&row.key, row.kind)).number(row.period.number).number(forgotten_at(row));
                to.number(row.amount).number(*spent).number(*if_gone);
            }
            Self::InFlight { account, own } => {
                to.text("flight").text(account).number(*own);
            }
            Self::Notice(Notice { subject, text, until }) => {
                to.text("notice").text(subject).number(*until).text(text);
            }
            Self::Hear { owner } => {
                to.text("hear").number(*owner);
            }
            Self::Tokens { table, moment, kept, field, used, columns } => {
                to.text("tokens").text(table).text(&moment.map(|moment| moment.to_string()).unwrap_or_default());
                to.number(kept.as_secs()).text(field).number(*used).number(columns.len());
                for column in columns {
                    to.number(*column);
                }
            }
        }
    }
}

/// Moment at which a budget's row is forgotten, in seconds of Unix time; 0 for never.
fn forgotten_at(row: &ReservationRow) -> u64 {
    let seconds = |moment: SystemTime| moment.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    row.period.ends.map_or(0, |ends| seconds(ends + KEPT))
}

fn escaped(text: &str) -> Cow<'_, str> {
    utf8_percent_encode(text, SEPARATORS).into()
}

fn unescaped(text: &str) -> Option<String> {
    percent_decode_str(text).decode_utf8().ok().map(Cow::into_owned)
}

/// Name of an account in keys.
pub(super) fn account_name(id: &AccountId) -> String {
    match id {
        AccountId::Endpoint(endpoint) => format!("endpoint:{}", escaped(endpoint)),
        AccountId::Models { endpoint, models } => format!("models:{}:{}", escaped(endpoint), escaped(models)),
        AccountId::Lane { endpoint, lane } => format!("lane:{}:{}", escaped(endpoint), escaped(lane)),
        AccountId::Caller(caller) => format!("key:{}", escaped(caller)),
        AccountId::CallerModels { caller, models } => format!("key-models:{}:{}", escaped(caller), escaped(models)),
    }
}

/// The account of some models that a name is of.
pub(super) fn models_of_name(name: &str) -> Option<AccountId> {
    let (endpoint, models) = name.strip_prefix("models:")?.split_once(':')?;
    Some(AccountId::Models { endpoint: unescaped(endpoint)?.into(), models: unescaped(models)?.into() })
}

/// Name of a budget in keys.
pub(super) fn budget_name(key: &str, kind: BudgetKind) -> String {
    format!("{}:{kind}", escaped(key))
}

/// The budget that a name is of.
pub(super) fn budget_of_name(name: &str) -> Option<(String, BudgetKind)> {
    let (key, kind) = name.rsplit_once(':')?;
    Some((unescaped(key)?, BudgetKind::parse(kind)?))
}

/// Name of a part of a reservation.
fn part_name(id: i64, kind: BudgetKind) -> String {
    format!("{id}:{kind}")
}

/// Number and budget of a part of a reservation.
pub(super) fn part_of_name(name: &str) -> Option<(i64, BudgetKind)> {
    let (id, kind) = name.split_once(':')?;
    Some((id.parse().ok()?, BudgetKind::parse(kind)?))
}

/// Name of texts that belong together, and those of it.
pub(super) fn joined(parts: &[&str]) -> String {
    parts.iter().map(|part| escaped(part)).collect::<Vec<_>>().join(":")
}

/// The texts of a joined name.
pub(super) fn split(name: &str) -> Option<Vec<String>> {
    name.split(':').map(unescaped).collect()
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// It is done.
    Done,
    /// It was done before. The verdict is that of then.
    Known,
    /// One that came after it was done before, so its verdict is gone.
    Old,
    /// The server has lost what the process wrote last.
    Behind,
    /// Either it came late, or the server's clock was set. Nothing is done.
    Late,
}

/// Reply of the server's script.
#[derive(Clone, Debug)]
pub struct Reply {
    pub(super) status: Status,
    /// The ledger's time, in milliseconds.
    pub(super) now: u64,
    /// The time of day, in milliseconds of Unix time.
    pub(super) wall: u64,
    /// Changes whenever another server, or the same one started anew, has answered.
    pub(super) epoch: String,
    /// The moment before which limited accounts have no permits, by the ledger's time.
    pub(super) open_at: u64,
    /// The last batch of this process that the server has.
    pub(super) stored: u64,
    pub(super) verdict: String,
    /// The ledger's time when what the verdict grants was counted.
    pub(super) counted_at: u64,
    pub(super) rows: Vec<Row>,
}

/// A row that was read.
#[derive(Clone, Debug)]
pub(super) enum Row {
    Account {
        name: String,
        fields: Vec<(String, String)>,
    },
    Budget {
        name: String,
        fields: Vec<(String, String)>,
    },
    /// What another process has said.
    Notice(Notice),
    /// Number of the last notice that was looked at.
    Heard(u64),
}

impl Reply {
    /// Reads a reply; `None` if it is none of the script's.
    pub(super) fn parse(value: redis::Value) -> Option<Self> {
        let redis::Value::Array(parts) = value else { return None };
        let [status, now, wall, epoch, open_at, stored, verdict, counted_at, rows] =
            <[redis::Value; 9]>::try_from(parts).ok()?;
        let status = match text(status)?.as_str() {
            "ok" => Status::Done,
            "known" => Status::Known,
            "old" => Status::Old,
            "behind" => Status::Behind,
            "late" => Status::Late,
            _ => return None,
        };
        let number = |value| text(value)?.parse().ok();
        let redis::Value::Array(rows) = rows else { return None };
        Some(Self {
            status,
            now: number(now)?,
            wall: number(wall)?,
            epoch: text(epoch)?,
            open_at: number(open_at)?,
            stored: number(stored)?,
            verdict: text(verdict)?,
            counted_at: number(counted_at)?,
            rows: rows.into_iter().map(row).collect::<Option<_>>()?,
        })
    }

    /// Reads the verdict on claims.
    pub(super) fn parts(&self, claims: &Claims) -> Option<(Vec<Part>, Vec<Grown>)> {
        let mut words = self.verdict.split(';').filter(|word| !word.is_empty());
        let mut parts = Vec::with_capacity(claims.draws.len());
        for _ in &claims.draws {
            let mut numbers = words.next()?.split(',').map(|number| number.parse().ok());
            let mut number = || numbers.next().flatten();
            let (draws, endpoint, caller) = (number()?, number()?, number()?);
            parts.push(Part { draws, ahead: Ahead { endpoint, caller } });
        }
        let mut growths = Vec::with_capacity(claims.growths.len());
        for _ in &claims.growths {
            growths.push(match words.next()? {
                "done" => Grown::Done,
                "gone" => Grown::Gone,
                _ => Grown::NoRoom,
            });
        }
        Some((parts, growths))
    }
}

fn row(value: redis::Value) -> Option<Row> {
    let redis::Value::Array(parts) = value else { return None };
    let mut parts = parts.into_iter().map(text);
    let (kind, name) = (parts.next()??, parts.next()??);
    if kind == "notice" {
        let mut next = || parts.next()?;
        let (until, text) = (next()?.parse().ok()?, next()?);
        return Some(Row::Notice(Notice { subject: name.into(), text: text.into(), until }));
    }
    if kind == "heard" {
        return name.parse().ok().map(Row::Heard);
    }
    let mut fields = Vec::new();
    while let Some(field) = parts.next() {
        fields.push((field?, parts.next()??));
    }
    match kind.as_str() {
        "account" => Some(Row::Account { name, fields }),
        "budget" => Some(Row::Budget { name, fields }),
        _ => None,
    }
}

/// The text of a simple value.
pub(super) fn text(value: redis::Value) -> Option<String> {
    match value {
        redis::Value::BulkString(bytes) => String::from_utf8(bytes).ok(),
        redis::Value::SimpleString(text) => Some(text),
        redis::Value::Int(number) => Some(number.to_string()),
        _ => None,
    }
}

/// The number and counts that a field of an account's row holds.
pub(super) enum AccountField {
    Attempts(u64, u64),
    Tokens(u64, u64),
    Day(Date, u64, u64),
    /// Requests that other processes have in flight.
    OthersInFlight(u64),
}

impl AccountField {
    pub(super) fn parse(name: &str, value: &str) -> Option<Self> {
        let (kind, rest) = name.split_at_checked(1)?;
        Some(match kind {
            "a" => Self::Attempts(rest.parse().ok()?, value.parse().ok()?),
            "t" => Self::Tokens(rest.parse().ok()?, value.parse().ok()?),
            "d" => {
                let (attempts, tokens) = value.split_once(' ')?;
                Self::Day(rest.parse().ok()?, attempts.parse().ok()?, tokens.parse().ok()?)
            }
            "f" => Self::OthersInFlight(value.parse().ok()?),
            _ => return None,
        })
    }
}
