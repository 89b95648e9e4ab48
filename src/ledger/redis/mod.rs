//! The ledger of many machines: a Redis or Valkey server. A process proposes what it draws by the counts that it knows, and the server's
//! script has the last word, so that no limit is passed however many processes draw at once.
//!
//! Each batch is one call of the script and has a number. A batch whose reply was lost is sent again with the same number, and the
//! server, which notes the last number of each process, does it once. What a server has lost, since it is one that took over or began
//! anew without the last writes, is offered to it again before it grants anything.
//!
//! | module | owns |
//! |---|---|
//! | `wire` | the words of a batch and of its reply |
//! | `batch.lua` | the script |
//! | `offers` | what this process has written of late, for a server that has lost it |
//! | `connection` | the way to the server |
//! | `budgets` | rows of budgets |
//! | `statistics` | token statistics, as they are read |

mod budgets;
pub mod connection;
mod offers;
mod statistics;
mod wire;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

use jiff::civil::Date;

use super::claims::{Claim, Claims, Grown, Part, Verdict};
use super::notices::Notice;
use super::places::{CHANGES_MAX, Place, PlaceChange, Thing, ThingKind};
use super::stats::{DAYS_KEPT, HOURS_KEPT, Spent};
use super::{AccountId, Change, FaultKind, Ledger, LedgerError, LimitedAccount, ModelList, Rows};
use crate::limit::{Clock, Counts, Days, SLOT, SPAN, Slot, Stamp, Unknown};
use offers::Offers;
pub use statistics::ServerStatistics;
use wire::{AccountField, Row, Status, Write, account_name, budget_name, joined};
pub use wire::{Arguments, Reply};

/// Longest time after which a server hears of this process again: another one may have taken its place, and waits for what this process
/// has written of late.
pub const TOUCH_EVERY: Duration = Duration::from_millis(500);
/// Time in which all processes offer what a server that has just begun may have lost, beside the longest wait for one that does not
/// answer; limited accounts have no permits meanwhile. A process finds out that its server is gone, comes back, and is heard.
pub const GRACE: Duration =
    Duration::from_millis(500).saturating_add(TOUCH_EVERY).saturating_add(connection::PAUSE_MAX);
/// Time after which a process that was not heard of has no requests in flight any more.
const DEAD_AFTER: Duration = Duration::from_secs(30);
/// Changes of places that are written with one batch.
const PLACES_AT_ONCE: usize = 200;
/// Times that a batch is sent to a server that has lost what came before it.
const OFFERS_MAX: usize = 4;
/// The part of what is left that may be drawn ahead, as [`prefetch`](super::prefetch) has it.
const PART_OF_LEFT: u64 = super::prefetch::PART_OF_LEFT;

/// A way to the server.
pub trait Server: fmt::Debug {
    /// Calls the script.
    fn batch(&mut self, arguments: Arguments) -> Result<Reply, LedgerError>;
    /// Runs commands that may be done twice, each of keys with one hash tag. Returns their replies.
    fn run(&mut self, commands: Vec<Arguments>) -> Result<Vec<redis::Value>, LedgerError>;
    /// The server's address, without a secret.
    fn name(&self) -> &str;
}

/// Difference between the server's clock and this machine's time since boot, in milliseconds.
#[derive(Debug)]
pub struct ServerClock(AtomicI64);

/// What the difference is while it is not known.
const UNKNOWN: i64 = i64::MIN;

impl Default for ServerClock {
    fn default() -> Self {
        Self(AtomicI64::new(UNKNOWN))
    }
}

impl ServerClock {
    /// Returns the clocks with the time of day as the server has it, once that is known.
    pub fn read(&self) -> Clock {
        let clock = Clock::read();
        match self.0.load(Ordering::Relaxed) {
            UNKNOWN => clock,
            ahead => {
                let since = i64::try_from(clock.boot.0).unwrap_or(i64::MAX).saturating_add(ahead);
                let since = Duration::from_millis(u64::try_from(since).unwrap_or_default());
                Clock { wall: SystemTime::UNIX_EPOCH + since, ..clock }
            }
        }
    }
}

/// Whose time a ledger goes by.
#[derive(Clone)]
pub enum Time {
    /// The server's.
    Server(Arc<ServerClock>),
    /// One that a test sets.
    Given(Arc<dyn Fn() -> Clock + Send + Sync>),
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Server(_) => "Server",
            Self::Given(_) => "Given",
        })
    }
}

impl Time {
    fn boot(&self) -> Stamp {
        match self {
            Self::Server(_) => Clock::read().boot,
            Self::Given(clock) => clock().boot,
        }
    }
}

/// A ledger on a server.
#[derive(Debug)]
pub struct RedisLedger<S> {
    server: S,
    /// What all its keys begin with, hash tag included.
    prefix: String,
    time: Time,
    grace: Duration,
    /// Distinguishes this process from all others.
    member: String,
    /// Number of the last batch, and of the last one whose reply came.
    sent: u64,
    acknowledged: u64,
    generation: u64,
    trusted_since: u64,
    /// The server's time less this machine's since boot, in milliseconds; `None` before the first reply.
    ahead_ms: Option<i64>,
    /// The server's number of a slot less this process's.
    slots_ahead: i64,
    epoch: String,
    open_at: u64,
    /// What the current batch writes.
    writes: Vec<Write>,
    places: Vec<Arguments>,
    /// What was read for the current batch.
    accounts: HashMap<String, AccountRow>,
    budgets: HashMap<String, HashMap<String, String>>,
    /// A batch that nothing was heard of.
    in_doubt: Option<InDoubt>,
    /// What is given back of such batches, until it is written.
    returned: Vec<Write>,
    /// Since when every call has been answered, and when the last one was.
    in_touch_since: Option<Stamp>,
    heard_at: Stamp,
    /// Places that wait to be written, and statistics to be reset.
    queued_places: VecDeque<Arguments>,
    resets: Vec<Option<String>>,
    /// What others have said, and the number of the last of it.
    heard: Vec<Notice>,
    heard_to: u64,
    offers: Offers,
}

/// What was read of an account.
#[derive(Debug, Default)]
struct AccountRow {
    others_in_flight: u64,
    slots: HashMap<u64, Counts>,
    days: HashMap<Date, Counts>,
}

/// A batch that nothing was heard of: it may be done or not.
#[derive(Debug)]
struct InDoubt {
    writes: Vec<Write>,
    claims: Claims,
}

impl<S: Server> RedisLedger<S> {
    /// Opens the ledger: looks at the server's time and state.
    pub fn open(server: S, prefix: &str, time: Time, grace: Duration) -> Result<Self, LedgerError> {
        let mut ledger = Self {
            server,
            prefix: base_of(prefix),
            time,
            grace,
            member: format!("{:016x}", fastrand::u64(..)),
            sent: 0,
            acknowledged: 0,
            generation: 0,
            trusted_since: 0,
            ahead_ms: None,
            slots_ahead: 0,
            epoch: String::new(),
            open_at: 0,
            writes: Vec::new(),
            places: Vec::new(),
            accounts: HashMap::new(),
            budgets: HashMap::new(),
            in_doubt: None,
            returned: Vec::new(),
            in_touch_since: None,
            heard_at: Stamp::default(),
            queued_places: VecDeque::new(),
            resets: Vec::new(),
            heard: Vec::new(),
            heard_to: 0,
            offers: Offers::default(),
        };
        ledger.call(0, "first", &Arguments::default())?;
        Ok(ledger)
    }

    /// Replaces the way to the server, after it was lost.
    pub fn server_mut(&mut self) -> &mut S {
        &mut self.server
    }

    /// Calls the script, and offers what the server has lost until it takes the call.
    fn call(&mut self, number: u64, mode: &str, operations: &Arguments) -> Result<Reply, LedgerError> {
        let mut is_sure = false;
        for _ in 0..OFFERS_MAX {
            let reply = self.call_once((number, self.acknowledged), (mode, is_sure), operations.clone())?;
            match reply.status {
                Status::Behind => self.offer(reply.stored)?,
                Status::Late => is_sure = true,
                Status::Done | Status::Known | Status::Old => return Ok(reply),
            }
        }
        Err(self.unusable("loses what is written to it again and again"))
    }

    fn call_once(
        &mut self,
        (number, acknowledged): (u64, u64),
        (mode, is_sure): (&str, bool),
        operations: Arguments,
    ) -> Result<Reply, LedgerError> {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let (sent_at, mut arguments) = (self.time.boot(), Arguments::default());
        let test_ms = match &self.time {
            Time::Server(_) => 0,
            Time::Given(clock) => millis(clock().wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()),
        };
        let estimate =
            self.ahead_ms.filter(|_| test_ms == 0).map_or(0, |ahead| signed(sent_at.0).saturating_add(ahead));
        arguments.text(&self.prefix).text(&self.member).number(number).number(acknowledged).text(mode);
        arguments.number(millis(SLOT)).number(millis(SPAN) / millis(SLOT)).number(millis(self.grace));
        arguments.number(millis(DEAD_AFTER)).number(PART_OF_LEFT).number(self.heard_to).number(estimate);
        arguments.number(u8::from(is_sure)).number(test_ms);
        arguments.0.extend(operations.0);
        let reply = match self.server.batch(arguments) {
            Ok(reply) => reply,
            Err(error) => {
                self.in_touch_since = None;
                return Err(error);
            }
        };
        let now = self.time.boot();
        self.in_touch_since.get_or_insert(now);
        self.heard_at = now;
        if reply.status != Status::Late {
            self.learn(&reply, sent_at, now);
        }
        Ok(reply)
    }

    /// Takes in what a reply says of the server.
    fn learn(&mut self, reply: &Reply, sent_at: Stamp, received_at: Stamp) {
        // By the moment of sending, so that permits seem rather older than they are.
        let ahead = signed(reply.now).saturating_sub(signed(sent_at.0));
        // By the moment of receiving, so that no slot expires here before it does there.
        let least = signed(reply.now).saturating_sub(signed(received_at.0));
        let slots = least.div_euclid(i64::try_from(SLOT.as_millis()).unwrap_or(i64::MAX));
        let has_moved = self.ahead_ms.is_none() || slots < self.slots_ahead || slots > self.slots_ahead + 1;
        self.ahead_ms = Some(ahead);
        if has_moved {
            self.slots_ahead = slots;
        }
        if let Time::Server(clock) = &self.time {
            clock.0.store(signed(reply.wall).saturating_sub(signed(sent_at.0)), Ordering::Relaxed);
        }
        if has_moved || reply.epoch != self.epoch || reply.open_at != self.open_at {
            // Counts that were read before may be of another server.
            self.trusted_since = self.generation + 1;
            if reply.epoch != self.epoch {
                self.heard_to = 0;
            }
            self.epoch.clone_from(&reply.epoch);
            self.open_at = reply.open_at;
        }
    }

    /// Offers what the server has lost of what this process has written since a batch.
    fn offer(&mut self, stored: u64) -> Result<(), LedgerError> {
        let mut operations = Arguments::default();
        let lost = self.offers.since(stored);
        for write in &lost {
            write.encode(&mut operations);
        }
        let batches = self.acknowledged.saturating_sub(stored);
        log::warn!(
            "ledger {}: the server has lost the last {batches} batches of this process; they are counted again",
            self.server.name()
        );
        self.call_once((stored, self.acknowledged), ("offer", true), operations).map(drop)
    }

    /// Finds out what became of a batch that nothing was heard of. What it writes is written; what it has drawn is given back.
    fn resolve(&mut self) -> Result<(), LedgerError> {
        let Some(InDoubt { writes, claims }) = self.in_doubt.take() else { return Ok(()) };
        let mut operations = Arguments::default();
        for write in &writes {
            write.encode(&mut operations);
        }
        operations.claims(&claims);
        let reply = match self.call(self.sent, "again", &operations) {
            Ok(reply) => reply,
            Err(error) => {
                self.in_doubt = Some(InDoubt { writes, claims });
                return Err(error);
            }
        };
        self.acknowledged = self.sent;
        let slot = server_slot_of(reply.counted_at);
        let mut written = writes;
        if reply.status == Status::Known
            && let Some((parts, growths)) = reply.parts(&claims)
        {
            written.extend(Self::granted(&claims, &parts, &growths, slot));
            self.returned.extend(Self::given_back(&claims, &parts, &growths, slot));
        }
        // Whatever became of it, what is in flight now is what counts.
        let shared = claims.draws.iter().flat_map(Claim::changes).filter(|(of, _)| of.shares_concurrency());
        let in_flight = shared.map(|(of, _)| Write::InFlight {
            account: account_name(of.account.id()),
            own: of.account.mirror().quota.own_in_flight(),
        });
        self.returned.extend(in_flight);
        self.offers.push(self.sent, self.time.boot(), written);
        Ok(())
    }

    /// What was granted, as writes: for a server that has lost it.
    fn granted(claims: &Claims, parts: &[Part], growths: &[Grown], slot: u64) -> Vec<Write> {
        let mut writes = Vec::new();
        for (claim, part) in claims.draws.iter().zip(parts).filter(|(_, part)| part.draws > 0) {
            let counts = |of: &LimitedAccount, change| Write::Counts {
                account: account_name(of.account.id()),
                slot,
                days: of.limits.counted(claim.counted).days,
                change,
            };
            writes.extend(claim.changes_of(*part).map(|(of, change)| counts(of, change)));
            writes.extend(in_flight_after(claims, parts, claim));
            if let Some(made) = &claim.reservation {
                let reserve = |of: &_| Write::Reserve { owner: claims.owner, id: made.id, part: Clone::clone(of) };
                writes.extend(made.parts.iter().map(reserve));
            }
        }
        for (growth, _) in claims.growths.iter().zip(growths).filter(|(_, grown)| **grown == Grown::Done) {
            let reserve = |part: &_| Write::Reserve { owner: claims.owner, id: growth.id, part: Clone::clone(part) };
            writes.extend(growth.parts.iter().map(reserve));
        }
        writes
    }

    /// What gives back what was granted and nobody knows of.
    fn given_back(claims: &Claims, parts: &[Part], growths: &[Grown], slot: u64) -> Vec<Write> {
        let of = |write| match write {
            Write::Counts { account, slot, days, change } => {
                let change = Change { attempts: -change.attempts, tokens: -change.tokens };
                Some(Write::Counts { account, slot, days, change })
            }
            Write::Reserve { owner, id, part }
                if growths.is_empty() || !claims.growths.iter().any(|of| of.id == id) =>
            {
                Some(Write::Settle { owner, id, row: part.row, spent: 0, if_gone: 0 })
            }
            // What has grown stays reserved until it is settled.
            _ => None,
        };
        Self::granted(claims, parts, growths, slot).into_iter().filter_map(of).collect()
    }

    fn server_slot(&self, slot: Slot) -> u64 {
        u64::try_from(signed(slot.0).saturating_add(self.slots_ahead)).unwrap_or_default()
    }

    fn own_slot(&self, slot: u64) -> Slot {
        Slot(u64::try_from(signed(slot).saturating_sub(self.slots_ahead)).unwrap_or_default())
    }

    fn take_rows(&mut self, rows: Vec<Row>) {
        for row in rows {
            match row {
                Row::Account { name, fields } => {
                    let mut account = AccountRow::default();
                    for (field, value) in fields {
                        match AccountField::parse(&field, &value) {
                            Some(AccountField::Attempts(slot, n)) => {
                                account.slots.entry(slot).or_default().attempts = n;
                            }
                            Some(AccountField::Tokens(slot, n)) => account.slots.entry(slot).or_default().tokens = n,
                            Some(AccountField::Day(date, attempts, tokens)) => {
                                account.days.insert(date, Counts { attempts, tokens });
                            }
                            Some(AccountField::OthersInFlight(n)) => account.others_in_flight = n,
                            None => {}
                        }
                    }
                    self.accounts.insert(name, account);
                }
                Row::Notice(notice) => self.heard.push(notice),
                Row::Heard(number) => self.heard_to = number,
                Row::Budget { name, fields } => {
                    self.budgets.insert(name, fields.into_iter().collect());
                }
            }
        }
    }

    fn read(&mut self, rows: &Rows) -> Result<(), LedgerError> {
        let mut operations = Arguments::default();
        encode_rows(rows, &mut operations);
        let reply = self.call(0, "first", &operations)?;
        self.take_rows(reply.rows);
        Ok(())
    }

    fn account_row(&mut self, account: &AccountId, date: Option<Date>) -> Result<&AccountRow, LedgerError> {
        let name = account_name(account);
        let is_read = self.accounts.get(&name).is_some_and(|row| date.is_none_or(|date| row.days.contains_key(&date)));
        if !is_read {
            let date = date.unwrap_or_default();
            self.read(&Rows {
                accounts: vec![(account.clone(), Days { first: date, last: date })],
                budgets: Vec::new(),
            })?;
        }
        self.accounts.get(&name).ok_or_else(|| unusable(self.server.name(), "does not answer what it was asked for"))
    }

    fn unusable(&self, what: &str) -> LedgerError {
        unusable(self.server.name(), what)
    }
}

/// What a claim's accounts have in flight once the parts of all claims are granted.
fn in_flight_after(claims: &Claims, parts: &[Part], claim: &Claim) -> Vec<Write> {
    let of = |(of, _): (&LimitedAccount, Change)| {
        let claimed = claims.draws.iter().zip(parts);
        let refused = claimed.map(|(claim, part)| {
            let draws = claim.draws_of(&of.account);
            if draws == 0 { 0 } else { draws.saturating_sub(part.draws) }
        });
        let own = of.account.mirror().quota.own_in_flight().saturating_sub(refused.sum());
        Write::InFlight { account: account_name(of.account.id()), own }
    };
    claim.changes().filter(|(of, _)| of.shares_concurrency()).map(of).collect()
}

/// What all keys begin with. The hash tag puts them on one node of a cluster, where one script can use them all.
fn base_of(prefix: &str) -> String {
    format!("{{{prefix}}}:")
}

fn unusable(server: &str, what: &str) -> LedgerError {
    LedgerError { kind: FaultKind::Unusable, message: format!("ledger {server}: {what}") }
}

fn encode_rows(rows: &Rows, to: &mut Arguments) {
    for (account, days) in &rows.accounts {
        to.text("read_account").text(&account_name(account)).dates(*days);
    }
    for (key, kind) in &rows.budgets {
        to.text("read_budget").text(&budget_name(key, *kind));
    }
}

/// The server's slot of a moment of its time.
fn server_slot_of(now: u64) -> u64 {
    now / u64::try_from(SLOT.as_millis()).unwrap_or(1)
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

impl<S: Server> Ledger for RedisLedger<S> {
    fn begin(&mut self) -> Result<u64, LedgerError> {
        self.generation += 1;
        self.accounts.clear();
        self.budgets.clear();
        self.resolve()?;
        Ok(self.generation)
    }

    fn is_exclusive(&self) -> bool {
        false
    }

    fn trusted_since(&self) -> u64 {
        self.trusted_since
    }

    fn fetch(&mut self, rows: &Rows) -> Result<(), LedgerError> {
        self.read(rows)
    }

    fn minute(&mut self, account: &AccountId, oldest: Slot) -> Result<Vec<(Slot, Counts)>, LedgerError> {
        let slots: Vec<(u64, Counts)> =
            self.account_row(account, None)?.slots.iter().map(|(slot, counts)| (*slot, *counts)).collect();
        let own = slots.into_iter().map(|(slot, counts)| (self.own_slot(slot), counts));
        Ok(own.filter(|(slot, _)| *slot >= oldest).collect())
    }

    fn day(&mut self, account: &AccountId, date: Date) -> Result<Counts, LedgerError> {
        Ok(self.account_row(account, Some(date))?.days.get(&date).copied().unwrap_or_default())
    }

    fn others_in_flight(&mut self, account: &AccountId) -> Result<u64, LedgerError> {
        Ok(self.account_row(account, None)?.others_in_flight)
    }

    fn set_in_flight(&mut self, account: &AccountId, own: u64) -> Result<(), LedgerError> {
        self.writes.push(Write::InFlight { account: account_name(account), own });
        Ok(())
    }

    fn add(&mut self, account: &AccountId, slot: Slot, days: Days, change: Change) -> Result<(), LedgerError> {
        let (account, slot) = (account_name(account), self.server_slot(slot));
        self.writes.push(Write::Counts { account, slot, days, change });
        Ok(())
    }

    fn add_tokens(&mut self, spent: &Spent) -> Result<(), LedgerError> {
        let columns = spent.cost.to_columns().to_vec();
        let add = |table, moment, kept, names: &[&str]| Write::Tokens {
            table,
            moment,
            kept,
            field: joined(names),
            used: spent.at_ms,
            columns: columns.clone(),
        };
        let names: [&str; 2] = [&spent.endpoint, &spent.model];
        self.writes.push(add("hour", Some(spent.hour), HOURS_KEPT, &names));
        self.writes.push(add("day", Some(spent.day), DAYS_KEPT, &names));
        self.writes.push(add("total", None, Duration::ZERO, &names));
        if let Some(key) = &spent.key {
            let names: [&str; 3] = [key, &spent.endpoint, &spent.model];
            self.writes.push(add("key-day", Some(spent.day), DAYS_KEPT, &names));
            self.writes.push(add("key-total", None, Duration::ZERO, &names));
        }
        Ok(())
    }

    fn reset_tokens(&mut self, endpoint: Option<&str>) -> Result<(), LedgerError> {
        // Once what is to be reset is written.
        self.resets.push(endpoint.map(str::to_owned));
        Ok(())
    }

    // What is too old expires by itself: slots, days, hours of statistics, and places.

    fn forget(&mut self, _account: &AccountId, _oldest: Slot) -> Result<(), LedgerError> {
        Ok(())
    }

    fn forget_tokens(&mut self, _hours: i64, _days: i64) -> Result<(), LedgerError> {
        Ok(())
    }

    fn forget_days(&mut self, _account: &AccountId, _before: Date) -> Result<(), LedgerError> {
        Ok(())
    }

    fn accounts_of_models(&mut self) -> Result<Vec<AccountId>, LedgerError> {
        let names = self.run_one(&["ZREVRANGE", &self.key("models"), "0", "999"])?;
        Ok(texts(names).iter().filter_map(|name| wire::models_of_name(name)).collect())
    }

    fn places(&mut self, things: &[Thing], now: i64) -> Result<Vec<Vec<Place>>, LedgerError> {
        // What was noted before is found.
        self.queue_places();
        while !self.queued_places.is_empty() {
            self.write_places(PLACES_AT_ONCE)?;
        }
        let ask = |thing: &Thing| {
            let mut command = Arguments::default();
            command.text("HGETALL").text(&self.place_key(thing));
            command
        };
        let replies = self.server.run(things.iter().map(ask).collect())?;
        Ok(replies.into_iter().map(|rows| places_of(rows, now)).collect())
    }

    fn change_place(&mut self, change: &PlaceChange) -> Result<(), LedgerError> {
        self.write_place(change);
        Ok(())
    }

    fn forget_places(&mut self, _kind: ThingKind, _now: i64, _surplus: bool) -> Result<bool, LedgerError> {
        Ok(false)
    }

    fn keep_models(&mut self, endpoint: &str, list: &str) -> Result<(), LedgerError> {
        let mut command = Arguments::default();
        command.text("HSET").text(&self.key("model-lists")).text(endpoint).text(list);
        self.places.push(command);
        Ok(())
    }

    fn model_lists(&mut self) -> Result<Vec<ModelList>, LedgerError> {
        let lists = texts(self.run_one(&["HGETALL", &self.key("model-lists")])?);
        Ok(pairs(&lists).map(|(endpoint, list)| (endpoint.into(), list.into())).collect())
    }

    fn commit(&mut self, claims: &Claims, rows: &Rows) -> Result<Verdict, LedgerError> {
        let mut writes = std::mem::take(&mut self.returned);
        writes.append(&mut self.writes);
        let resets = std::mem::take(&mut self.resets);
        self.queue_places();
        self.write_places(PLACES_AT_ONCE)?;
        if writes.is_empty() && claims.is_empty() && rows.is_empty() {
            if self.time.boot() - self.heard_at >= TOUCH_EVERY / 2 {
                self.read(&Rows::default())?;
            }
            resets.iter().try_for_each(|endpoint| self.reset_statistics(endpoint.as_deref()))?;
            return Ok(Verdict::default());
        }
        let mut operations = Arguments::default();
        for write in &writes {
            write.encode(&mut operations);
        }
        operations.claims(claims);
        encode_rows(rows, &mut operations);
        self.sent += 1;
        let done = self.call(self.sent, "first", &operations);
        let understood = done.and_then(|reply| {
            let parts = reply.parts(claims).ok_or_else(|| self.unusable("answers what it was not asked"))?;
            Ok((reply, parts))
        });
        let (reply, (parts, growths)) = match understood {
            Ok(understood) => understood,
            Err(error) => {
                self.in_doubt = Some(InDoubt { writes, claims: claims.clone() });
                return Err(LedgerError { kind: FaultKind::Unanswered, ..error });
            }
        };
        self.acknowledged = self.sent;
        let slot = server_slot_of(reply.counted_at);
        let mut written = writes;
        written.extend(Self::granted(claims, &parts, &growths, slot));
        self.offers.push(self.sent, self.time.boot(), written);
        self.take_rows(reply.rows);
        resets.iter().try_for_each(|endpoint| self.reset_statistics(endpoint.as_deref()))?;
        // By the most that this machine's time may be behind, so that permits seem rather older than they are.
        let counted = signed(reply.counted_at).saturating_sub(self.ahead_ms.unwrap_or_default());
        let counted_at = Stamp(u64::try_from(counted).unwrap_or_default());
        Ok(Verdict { counted: Some((counted_at, self.own_slot(slot))), draws: Some(parts), growths })
    }

    fn tell(&mut self, notice: &Notice) -> Result<(), LedgerError> {
        self.writes.push(Write::Notice(notice.clone()));
        Ok(())
    }

    fn take_heard(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.heard)
    }

    fn touch(&mut self) -> Result<(), LedgerError> {
        self.resolve()?;
        self.read(&Rows::default())
    }

    fn roll_back(&mut self) {
        self.writes.clear();
        self.places.clear();
        self.resets.clear();
    }

    fn unknown(&self) -> Unknown {
        let open_at = signed(self.open_at).saturating_sub(self.ahead_ms.unwrap_or_default());
        Unknown { all_until: Stamp(u64::try_from(open_at).unwrap_or_default()), ..Unknown::default() }
    }
}

impl<S: Server> RedisLedger<S> {
    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn run_one(&mut self, command: &[&str]) -> Result<redis::Value, LedgerError> {
        let mut arguments = Arguments::default();
        for word in command {
            arguments.text(word);
        }
        let replies = self.server.run(vec![arguments])?;
        replies.into_iter().next().ok_or_else(|| self.unusable("does not answer"))
    }

    /// Key of a thing's places. It has a hash tag of its own, so that the nodes of a cluster share them.
    fn place_key(&self, thing: &Thing) -> String {
        let tag = self.prefix.trim_end_matches(':').trim_matches(['{', '}']).to_owned();
        format!("{{{tag}:{}:{}}}:place", thing.kind.name(), joined(&[&thing.name]))
    }

    /// Takes the places of this batch into the queue. They may be written twice, so they need not be a part of a batch.
    fn queue_places(&mut self) {
        self.queued_places.extend(self.places.drain(..));
        let surplus = self.queued_places.len().saturating_sub(CHANGES_MAX);
        if surplus > 0 {
            log::error!("ledger {}: where {surplus} objects and sessions are is not noted", self.server.name());
            self.queued_places.drain(..surplus);
        }
    }

    /// Writes so many places of the queue.
    fn write_places(&mut self, count: usize) -> Result<(), LedgerError> {
        let some: Vec<Arguments> = self.queued_places.iter().take(count).cloned().collect();
        if some.is_empty() {
            return Ok(());
        }
        let written = some.len();
        self.server.run(some)?;
        self.queued_places.drain(..written);
        Ok(())
    }

    fn write_place(&mut self, change: &PlaceChange) {
        let mut command = Arguments::default();
        match change {
            PlaceChange::Forget(thing, owner) => {
                let key = self.place_key(thing);
                command
                    .text("EVAL")
                    .text(include_str!("forget_place.lua"))
                    .number(1)
                    .text(&key)
                    .text(&joined(&[owner]));
            }
            PlaceChange::Note(thing, Place { owner, endpoint, organization, until }) => {
                let key = self.place_key(thing);
                let is_session = thing.kind == ThingKind::Session;
                command.text("EVAL").text(include_str!("note_place.lua")).number(1).text(&key);
                command.text(&joined(&[owner])).text(&joined(&[endpoint])).text(&joined(&[organization]));
                command.number(*until).text(if is_session { "1" } else { "0" });
            }
        }
        self.places.push(command);
    }

    /// Deletes token statistics piece by piece, so that nobody waits for long.
    fn reset_statistics(&mut self, endpoint: Option<&str>) -> Result<(), LedgerError> {
        for (table, at) in [("hour", 0), ("day", 0), ("total", 0), ("key-day", 1), ("key-total", 1)] {
            let key = self.key(&format!("tokens:{table}"));
            let mut keys = vec![key.clone()];
            if !table.ends_with("total") {
                let moments = texts(self.run_one(&["ZRANGE", &key, "0", "-1"])?);
                keys = moments.iter().map(|moment| format!("{key}:{moment}")).collect();
            }
            if endpoint.is_none() {
                keys.push(key.clone());
            }
            for key in keys {
                let Some(endpoint) = endpoint else {
                    self.run_one(&["UNLINK", &key])?;
                    continue;
                };
                let fields = texts(self.run_one(&["HKEYS", &key])?);
                let of_it = |field: &&String| {
                    wire::split(field).is_some_and(|names| names.get(at).is_some_and(|name| name == endpoint))
                };
                for field in fields.iter().filter(of_it) {
                    self.run_one(&["HDEL", &key, field])?;
                }
            }
        }
        Ok(())
    }
}

/// The places in a reply that are not over, those that were used last first.
fn places_of(rows: redis::Value, now: i64) -> Vec<Place> {
    let rows = texts(rows);
    let mut places: Vec<Place> = pairs(&rows).filter_map(|(field, value)| place(field, value)).collect();
    places.retain(|place| place.until > now);
    places.sort_by_key(|place| std::cmp::Reverse(place.until));
    places
}

/// A place as its field and value have it.
fn place(field: &str, value: &str) -> Option<Place> {
    let names = wire::split(field)?;
    let [owner, endpoint] = <[String; 2]>::try_from(names).ok()?;
    let (until, organization) = value.split_once(' ')?;
    let organization = wire::split(organization)?.into_iter().next()?;
    Some(Place {
        owner: owner.into(),
        endpoint: endpoint.into(),
        organization: organization.into(),
        until: until.parse().ok()?,
    })
}

/// Fields and values that follow each other.
fn pairs(texts: &[String]) -> impl Iterator<Item = (&str, &str)> {
    texts.as_chunks::<2>().0.iter().map(|[field, value]| (field.as_str(), value.as_str()))
}

/// The texts of a list.
fn texts(value: redis::Value) -> Vec<String> {
    match value {
        redis::Value::Array(values) | redis::Value::Set(values) => values.into_iter().filter_map(wire::text).collect(),
        redis::Value::Map(pairs) => {
            pairs.into_iter().flat_map(|(key, value)| [key, value]).filter_map(wire::text).collect()
        }
        _ => Vec::new(),
    }
}
