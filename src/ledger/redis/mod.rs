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
//! | `calls` | the conversation with the server: numbers of batches, doubts, offers |
//! | `clock` | the server's time |
//! | `batch.lua` | the script |
//! | `offers` | what this process has written of late, for a server that has lost it |
//! | `connection` | the way to the server |
//! | `budgets` | rows of budgets |
//! | `kept` | places of objects and sessions, and statistics that are reset |
//! | `statistics` | token statistics, as they are read |

mod budgets;
mod calls;
mod clock;
pub mod connection;
mod kept;
mod offers;
mod statistics;
mod wire;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::time::Duration;

use jiff::civil::Date;

use super::claims::{Claims, Verdict};
use super::notices::Notice;
use super::places::{Place, PlaceChange, Thing, ThingKind};
use super::stats::{DAYS_KEPT, HOURS_KEPT, Spent};
use super::{AccountId, Change, FaultKind, Ledger, LedgerError, ModelList, Rows};
use crate::limit::{Counts, Days, SLOT, Slot, Stamp, Unknown};
pub use clock::{ServerClock, Time};
use kept::places_of;
use offers::Offers;
pub use statistics::ServerStatistics;
use wire::{AccountField, Row, Write, account_name, budget_name, joined};
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
    /// Places that wait to be written.
    queued_places: VecDeque<Arguments>,
    /// Endpoints (`None` for all) whose statistics this batch resets, and those of batches that are done.
    resets: Vec<Option<String>>,
    due_resets: VecDeque<Option<String>>,
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
            due_resets: VecDeque::new(),
            heard: Vec::new(),
            heard_to: 0,
            offers: Offers::default(),
        };
        ledger.call(0, "first", &Arguments::default())?;
        Ok(ledger)
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
        // Before anything is taken out: if it fails, what is given back waits for the next batch.
        self.queue_places();
        self.write_places(PLACES_AT_ONCE)?;
        let mut writes = std::mem::take(&mut self.returned);
        writes.append(&mut self.writes);
        if writes.is_empty() && claims.is_empty() && rows.is_empty() {
            if self.time.boot() - self.heard_at >= TOUCH_EVERY / 2 {
                self.read(&Rows::default())?;
            }
            self.finish_resets();
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
        self.finish_resets();
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
        if !self.returned.is_empty() {
            // What is given back is not kept from the others until there is something else to do.
            return self.commit(&Claims::default(), &Rows::default()).map(drop);
        }
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
