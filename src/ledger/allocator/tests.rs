use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::{Instant, SystemTime};

use super::*;
use crate::config::test_support::config;
use crate::config::{LedgerSync, LimitKind, RedisAddress};
use crate::ledger::budgets::Spends;
use crate::ledger::redis::connection::{Connection, ConnectionOptions};
use crate::ledger::redis::{RedisLedger, ServerStatistics, Time};
use crate::ledger::sqlite::{FileStatistics, Opening, SqliteLedger};
use crate::ledger::stats::{MODELS_MAX, OTHER_MODELS, Statistics};
use crate::ledger::write_behind::WRITE_DELAY;
use crate::ledger::{AccountId, CallerId, Drawn, Otherwise, Permit, QueuedBy, Refusal, Spent, Wanted, prefetch};
use crate::limit::{LimitReason, Limits};
use crate::usage::{Cost, Speed, Tokens};
use jiff::tz::TimeZone;

mod budgets;
mod callers;
mod kept;
mod servers;
mod sets;

/// 2026-11-25, 12:00 UTC.
const NOON: u64 = 1_795_608_000;

/// Everybody who is refused, unless a test says otherwise.
const CALLER: CallerId = CallerId(1);

/// One process: an allocator, its ledger, and a clock that a test moves.
struct Process {
    client: Client,
    allocator: Allocator,
    ledger: Box<dyn Ledger>,
    now_ms: Arc<AtomicU64>,
    /// Runtime for timeouts. None of them ever ends, since the tests do not let its clock run.
    runtime: Arc<tokio::runtime::Runtime>,
}

type Answer = std::pin::Pin<Box<dyn Future<Output = Drawn>>>;

impl Process {
    fn new(folder: &std::path::Path, now_ms: &Arc<AtomicU64>, on_error: LedgerOnError) -> Self {
        let clock = {
            let (now_ms, base) = (Arc::clone(now_ms), Instant::now());
            move || {
                let since = Duration::from_millis(now_ms.load(Ordering::Relaxed));
                let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(NOON) + since;
                Clock { now: base + since, boot: Stamp(now_ms.load(Ordering::Relaxed)), wall }
            }
        };
        let client = Client::new(clock);
        let client = if server_tested().is_some() { client.sharing_concurrency() } else { client };
        let ledger = open_ledger(folder, &client);
        let allocator = Allocator::new(client.clone(), on_error, Arc::default());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        Self { client, allocator, ledger, now_ms: Arc::clone(now_ms), runtime: Arc::new(runtime) }
    }

    fn alone() -> (tempfile::TempDir, Self) {
        let folder = tempfile::tempdir().unwrap();
        let process = Self::new(folder.path(), &Arc::new(AtomicU64::new(1_000_000)), LedgerOnError::Deny);
        (folder, process)
    }

    /// Another program that uses the file, whose lock is not waited for; `None` if the ledger is no file.
    fn other_holder(&mut self, folder: &std::path::Path) -> Option<rusqlite::Connection> {
        let path = file_of(folder)?;
        let opening = Opening { boot_id: Some("boot"), now: self.client.clock().boot, minute_unknown: false };
        let ledger = SqliteLedger::open(&path, LedgerSync::Normal, &opening).unwrap();
        ledger.set_lock_wait(Duration::from_millis(1));
        self.ledger = Box::new(ledger);
        Some(rusqlite::Connection::open(path).unwrap())
    }

    fn wanted(&self, id: &str, limits: &str) -> Wanted {
        wanted([self.limited(&AccountId::Endpoint(id.into()), limits)])
    }

    fn limited(&self, id: &AccountId, limits: &str) -> LimitedAccount {
        let endpoint = config(&format!(r#"[{{"id":"a",{limits}}}]"#)).endpoints.remove(0);
        LimitedAccount { account: self.client.account(id), limits: Arc::new(Limits::new(&endpoint, &TimeZone::UTC)) }
    }

    /// A draw of an endpoint's account and of one of some of its models.
    fn wanted_of_models(&self, id: &str, limits: &str, models: &str, model_limits: &str) -> Wanted {
        let of_models = AccountId::Models { endpoint: id.into(), models: models.into() };
        wanted([self.limited(&AccountId::Endpoint(id.into()), limits), self.limited(&of_models, model_limits)])
    }

    fn ask(&self, wanted: &[Wanted], otherwise: Otherwise) -> Answer {
        let (client, wanted) = (self.client.clone(), wanted.to_vec());
        let _entered = self.runtime.enter();
        let mut answer: Answer = Box::pin(async move { client.draw(client.ticket(), wanted, otherwise).await });
        assert!(poll(&mut answer).is_pending());
        answer
    }

    fn ask_to_swap(&self, mut old: Permit) -> Answer {
        let client = self.client.clone();
        let _entered = self.runtime.enter();
        let mut answer: Answer = Box::pin(async move { client.swap(&mut old).await });
        assert!(poll(&mut answer).is_pending());
        answer
    }

    fn serve(&mut self) {
        self.allocator.serve(Some(&mut *self.ledger)).unwrap();
    }

    fn draw(&mut self, wanted: &[Wanted]) -> Drawn {
        let mut answer = self.ask(wanted, Otherwise::Refuse(CALLER));
        self.serve();
        ready(&mut answer)
    }

    fn pass(&mut self, by: Duration) {
        self.now_ms.fetch_add(u64::try_from(by.as_millis()).unwrap(), Ordering::Relaxed);
        self.serve();
    }

    /// Writes what is written a little later.
    fn write(&mut self) {
        self.serve();
        self.pass(WRITE_DELAY);
    }

    fn used(&mut self, wanted: &Wanted) -> (u64, u64) {
        self.used_of(&whole(wanted))
    }

    fn used_of(&mut self, account: &LimitedAccount) -> (u64, u64) {
        let accounts = vec![account.clone()];
        let client = self.client.clone();
        let mut look = Box::pin(async move { client.look(accounts).await.unwrap()[0] });
        let mut context = Context::from_waker(Waker::noop());
        assert!(look.as_mut().poll(&mut context).is_pending());
        self.serve();
        let Poll::Ready(view) = look.as_mut().poll(&mut context) else { panic!("no answer") };
        (view.used.rpm, view.used.rpd)
    }
}

/// The ledger's file; `None` if the ledger that the tests are about is none.
fn file_of(folder: &std::path::Path) -> Option<std::path::PathBuf> {
    server_tested().is_none().then(|| folder.join("ledger.db"))
}

/// The server that the tests are about, if it is one: `LEDGER_TESTED` names it (`redis://…`), and `LEDGER_TESTED_CA` its certificates.
fn server_tested() -> Option<ConnectionOptions> {
    let address = RedisAddress::parse(&std::env::var("LEDGER_TESTED").ok()?).unwrap();
    let ca_file = std::env::var("LEDGER_TESTED_CA").ok().map(Into::into);
    Some(ConnectionOptions { address, ca_file, wait: Duration::from_secs(5), replicas: 0 })
}

/// Prefix of a folder's ledger on a server.
fn prefix_of(folder: &std::path::Path) -> String {
    folder.file_name().unwrap().to_str().unwrap().to_owned()
}

fn statistics_of(folder: &std::path::Path) -> Box<dyn Statistics> {
    match server_tested() {
        Some(options) => Box::new(ServerStatistics { options, prefix: prefix_of(folder) }),
        None => Box::new(FileStatistics(folder.join("ledger.db"))),
    }
}

/// Opens the ledger that the tests are about.
fn open_ledger(folder: &std::path::Path, client: &Client) -> Box<dyn Ledger> {
    let Some(options) = server_tested() else {
        let opening = Opening { boot_id: Some("boot"), now: client.clock().boot, minute_unknown: false };
        return Box::new(SqliteLedger::open(&folder.join("ledger.db"), LedgerSync::Normal, &opening).unwrap());
    };
    let clock = client.clone();
    let time = Time::Given(Arc::new(move || clock.clock()));
    let connection = Connection::new(options).unwrap();
    Box::new(RedisLedger::open(connection, &prefix_of(folder), time, Duration::ZERO).unwrap())
}

impl Drawn {
    fn is_granted(&self) -> bool {
        matches!(self, Self::Granted(..))
    }
}

fn wanted<const N: usize>(accounts: [LimitedAccount; N]) -> Wanted {
    let accounts = Arc::new(AccountSet::new(accounts.into()));
    Wanted { accounts, not_before: Stamp::default(), spends: Spends::default() }
}

/// The endpoint's own account.
fn whole(wanted: &Wanted) -> LimitedAccount {
    wanted.accounts.accounts()[0].clone()
}

fn poll(answer: &mut Answer) -> Poll<Drawn> {
    answer.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

fn ready(answer: &mut Answer) -> Drawn {
    match poll(answer) {
        Poll::Ready(drawn) => drawn,
        Poll::Pending => panic!("nobody answers"),
    }
}

fn spent(drawn: Drawn) -> usize {
    let Drawn::Granted(at, mut permit) = drawn else { panic!("{drawn:?}") };
    permit.spend();
    at
}

fn reasons(refusal: &Refusal) -> Vec<(usize, LimitReason)> {
    refusal.held.iter().map(|endpoint| (endpoint.at, endpoint.held.by)).collect()
}

fn refused(drawn: Drawn) -> Refusal {
    let Drawn::Refused(refusal) = drawn else { panic!("{drawn:?}") };
    refusal
}

#[test]
fn a_crowd_gets_every_permit_once_and_the_rest_a_moment_each() {
    let (_folder, mut process) = Process::alone();
    let wanted = [process.wanted("a", r#""rpm":100"#), process.wanted("b", r#""rpm":100"#)];
    let mut answers: Vec<_> = (0..1000).map(|_| process.ask(&wanted, Otherwise::Refuse(CALLER))).collect();
    process.serve();
    let (mut granted, mut waits) = ([0, 0], Vec::new());
    for answer in &mut answers {
        match ready(answer) {
            Drawn::Granted(at, mut permit) => {
                permit.spend();
                granted[at] += 1;
            }
            Drawn::Refused(refusal) => {
                assert_eq!(
                    reasons(&refusal),
                    [(0, LimitReason::Full(LimitKind::Rpm, 100)), (1, LimitReason::Full(LimitKind::Rpm, 100))]
                );
                waits.push(refusal.wait.as_millis());
            }
            Drawn::Unavailable => panic!("the ledger works"),
        }
    }
    assert_eq!(granted, [100, 100]);
    // 200 permits become free together, so 200 clients are sent to that moment, the next 200 a minute later, and so on.
    let rounds: Vec<_> = waits.chunk_by(|a, b| a == b).map(<[_]>::len).collect();
    assert_eq!(rounds, [200; 4], "{waits:?}");
    assert_eq!(waits[0], 60_500);
    let used = [process.used(&wanted[0]), process.used(&wanted[1])];
    assert_eq!(used, [(100, 100), (100, 100)]);
    // A client that comes back at its promised moment gets a permit.
    process.pass(Duration::from_millis(60_500));
    let mut back: Vec<_> = (0..200).map(|_| process.ask(&wanted, Otherwise::Refuse(CALLER))).collect();
    process.serve();
    assert!(back.iter_mut().all(|answer| matches!(ready(answer), Drawn::Granted(..))));
}

#[test]
fn who_asks_again_and_again_is_told_the_same_moment() {
    let (_folder, mut process) = Process::alone();
    let wanted = [process.wanted("a", r#""rpm":1"#)];
    spent(process.draw(&wanted));
    let ask = |process: &mut Process, caller| {
        let mut answer = process.ask(&wanted, Otherwise::Refuse(CallerId(caller)));
        process.serve();
        refused(ready(&mut answer)).wait.as_millis()
    };
    let first = ask(&mut process, 1);
    assert_eq!(first, 60_500);
    let others = [ask(&mut process, 2), ask(&mut process, 3)];
    assert!(first < others[0] && others[0] < others[1], "each caller has a moment of its own: {others:?}");
    for _ in 0..5 {
        process.pass(Duration::from_secs(1));
        let again = [ask(&mut process, 1), ask(&mut process, 2), ask(&mut process, 3)];
        assert!(again[0] < first && again[1] < others[0] && again[2] < others[1], "{again:?}");
    }
    // Many clients behind one address, that ask at once, get a moment each, and keep those.
    let crowd = |process: &mut Process| {
        let mut answers: Vec<_> = (0..4).map(|_| process.ask(&wanted, Otherwise::Refuse(CallerId(4)))).collect();
        process.serve();
        answers.iter_mut().map(|answer| refused(ready(answer)).wait.as_millis()).collect::<Vec<_>>()
    };
    let moments = crowd(&mut process);
    assert!(moments.is_sorted_by(|a, b| a < b), "{moments:?}");
    assert_eq!(crowd(&mut process), moments);
}

#[test]
fn a_permit_that_nobody_takes_comes_back() {
    let (_folder, mut process) = Process::alone();
    let wanted = [process.wanted("a", r#""rpm":1,"rpd":1"#)];
    let answer = process.ask(&wanted, Otherwise::Refuse(CALLER));
    process.serve();
    // The client disconnects between the grant and the reply.
    drop(answer);
    process.serve();
    assert_eq!(process.used(&wanted[0]), (0, 0));
    assert!(matches!(process.draw(&wanted), Drawn::Granted(..)), "and this one is dropped unspent as well");
    assert_eq!(spent(process.draw(&wanted)), 0);
    assert_eq!(
        reasons(&refused(process.draw(&wanted))),
        [(0, LimitReason::Full(LimitKind::Rpd, 1))],
        "the one that holds longest"
    );
}

#[test]
fn two_processes_share_what_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let now_ms = Arc::new(AtomicU64::new(1_000_000));
    let mut processes = [0, 1].map(|_| Process::new(folder.path(), &now_ms, LedgerOnError::Deny));
    let limits = r#""rpm":10,"rpd":100"#;
    let mut granted = 0;
    for turn in 0..30 {
        let process = &mut processes[turn % 2];
        let wanted = [process.wanted("a", limits)];
        if let Drawn::Granted(_, mut permit) = process.draw(&wanted) {
            permit.spend();
            granted += 1;
        }
    }
    assert_eq!(granted, 10);
    for process in &mut processes {
        let wanted = process.wanted("a", limits);
        assert_eq!(process.used(&wanted), (10, 10), "what is shown is the ledger's, not the process's own");
    }
}

#[test]
fn those_who_wait_are_served_in_the_order_of_arrival() {
    let (_folder, mut process) = Process::alone();
    let wanted = [process.wanted("a", r#""rpm":2"#)];
    for _ in 0..2 {
        spent(process.draw(&wanted));
    }
    let until = process.client.clock().boot + Duration::from_secs(100);
    let mut waiting: Vec<_> =
        (0..4).map(|_| process.ask(&wanted, Otherwise::Wait { until, end: until, by: QueuedBy::default() })).collect();
    process.serve();
    assert!(waiting.iter_mut().all(|answer| poll(answer).is_pending()));
    // One of them disconnects; the next one takes its place.
    drop(waiting.remove(0));
    process.pass(Duration::from_mins(1));
    assert!(waiting.iter_mut().all(|answer| poll(answer).is_pending()));
    process.now_ms.fetch_add(500, Ordering::Relaxed);
    // A new draw at the same moment does not overtake them.
    let mut newcomer = process.ask(&wanted, Otherwise::LookElsewhere);
    process.serve();
    assert_eq!(spent(ready(&mut waiting[0])), 0);
    assert_eq!(spent(ready(&mut waiting[1])), 0);
    refused(ready(&mut newcomer));
    // No other permit can be free within the last one's time in the queue, so it is not kept waiting.
    let refusal = refused(ready(&mut waiting[2]));
    assert_eq!(refusal.wait, Duration::from_millis(60_500));
}

#[test]
fn callers_take_turns_in_the_queue() {
    let (_folder, mut process) = Process::alone();
    let wanted = [process.wanted("a", r#""maxConcurrent":1"#)];
    let Drawn::Granted(_, mut held) = process.draw(&wanted) else { panic!("it is free") };
    let until = process.client.clock().boot + Duration::from_secs(100);
    let wait = |caller| Otherwise::Wait { until, end: until, by: QueuedBy { caller, weight: 1 } };
    let mut waiting: Vec<_> = (0..6).map(|_| (1, process.ask(&wanted, wait(1)))).collect();
    process.serve();
    waiting.extend((0..2).map(|_| (2, process.ask(&wanted, wait(2)))));
    process.serve();
    let mut served = Vec::new();
    while !waiting.is_empty() {
        drop(held);
        process.serve();
        let mut granted = None;
        waiting.retain_mut(|(caller, answer)| match poll(answer) {
            Poll::Pending => true,
            Poll::Ready(Drawn::Granted(_, permit)) => {
                served.push(*caller);
                granted = Some(permit);
                false
            }
            Poll::Ready(other) => panic!("{other:?}"),
        });
        held = granted.expect("somebody waits, and it is free");
    }
    drop(held);
    assert_eq!(served, [1, 2, 1, 2, 1, 1, 1, 1]);
}

#[test]
fn one_caller_does_not_take_every_place_of_the_queue() {
    let client = Client::new(Clock::read);
    let enter = |caller| client.enter_queue(QueuedBy { caller, weight: 1 }, 5, 3);
    let places: Vec<_> = (0..9).map_while(|_| enter(1)).collect();
    assert_eq!(places.len(), 3, "as many as one may have");
    let others = [enter(2), enter(3)];
    assert!(others.iter().all(Option::is_some) && enter(4).is_none(), "there are no more");
    assert_eq!(client.queued(), 5);
    drop(places);
    assert!(enter(4).is_some() && enter(1).is_some());
    drop(others);
    assert_eq!(client.queued(), 0);
}

/// Draws one permit per millisecond until permits are prefetched.
fn busy(process: &mut Process, wanted: &Wanted) -> usize {
    let mut sent = 0;
    while process.client.draw_at_once(&wanted.accounts, &process.client.clock()).is_none() {
        let mut first_choice = process.ask(std::slice::from_ref(wanted), Otherwise::LookElsewhere);
        process.serve();
        spent(ready(&mut first_choice));
        process.now_ms.fetch_add(1, Ordering::Relaxed);
        sent += 1;
        assert!(sent < 100, "nothing is drawn ahead");
    }
    // The last check of the loop has taken one, and dropped it.
    process.serve();
    sent
}

#[test]
fn what_is_drawn_ahead_counts_until_it_is_given_back() {
    let (folder, mut process) = Process::alone();
    let wanted = process.wanted("a", r#""rpm":1000000,"rpd":1000000"#);
    let sent = busy(&mut process, &wanted);
    let at_once = |process: &Process| process.client.draw_at_once(&wanted.accounts, &process.client.clock());
    for _ in 0..20 {
        at_once(&process).expect("there are more").spend();
    }
    let sent = u64::try_from(sent + 20).unwrap();
    let Some(path) = file_of(folder.path()) else { return };
    let in_ledger = || {
        let ledger = rusqlite::Connection::open(&path).unwrap();
        let sum = |table: &str| {
            let sql = format!("SELECT sum(attempts) FROM {table}");
            ledger.query_row(&sql, [], |row| row.get::<_, u64>(0)).unwrap()
        };
        assert_eq!(sum("minute"), sum("day"));
        sum("day")
    };
    let before = in_ledger();
    assert!(before > sent + 8, "a kill now would waste the rest: {before} of {sent}");
    // A question for the counts gets the exact number, and the rest is given back.
    assert_eq!(process.used(&wanted), (sent, sent));
    assert!(at_once(&process).is_none());
    assert_eq!(in_ledger(), sent);
    // Without a question it is given back when it is old.
    let sent = sent + u64::try_from(busy(&mut process, &wanted)).unwrap();
    assert!(in_ledger() > sent + 8);
    assert!(process.allocator.next_due() <= process.client.clock().boot + prefetch::USABLE);
    process.pass(prefetch::USABLE);
    assert!(at_once(&process).is_none());
    assert_eq!((in_ledger(), process.used(&wanted)), (sent, (sent, sent)));
    // It is given back before the thread ends, too.
    let sent = sent + u64::try_from(busy(&mut process, &wanted)).unwrap();
    process.client.close();
    process.serve();
    assert_eq!(in_ledger(), sent);
    assert!(process.allocator.is_all_written());
}

#[test]
fn prefetched_permits_that_follow_others_last_as_long() {
    let (_folder, mut process) = Process::alone();
    let wanted = process.wanted("a", r#""rpm":1000000"#);
    let at_once = |process: &Process| process.client.draw_at_once(&wanted.accounts, &process.client.clock());
    busy(&mut process, &wanted);
    let first_ends = process.allocator.next_due();
    // The buffer is used up early, and another one follows.
    while let Some(mut permit) = at_once(&process) {
        permit.spend();
    }
    busy(&mut process, &wanted);
    assert!(process.client.clock().boot < first_ends);
    let left = first_ends.0 - process.client.clock().boot.0;
    process.pass(Duration::from_millis(left));
    assert!(at_once(&process).is_some(), "it was given back with the first one");
}

#[test]
fn nobody_is_refused_for_what_was_drawn_ahead() {
    let (_folder, mut process) = Process::alone();
    let wanted = process.wanted("a", r#""rpm":100000"#);
    busy(&mut process, &wanted);
    // Other clients use up the rest of the minute.
    let clock = process.client.clock();
    let used = whole(&wanted).count_up(&clock).used.rpm;
    wanted.accounts.add(CountedAt::now(&clock), Counts { attempts: 100_000 - used, tokens: 0 });
    // A draw that asks for a moment to come back gets one of the prefetched permits, which are given back first.
    assert!(matches!(process.draw(std::slice::from_ref(&wanted)), Drawn::Granted(0, _)));
}

#[test]
fn a_permit_is_swapped_without_anybody_coming_between() {
    let (_folder, mut process) = Process::alone();
    let wanted = [process.wanted("a", r#""rpm":1,"maxConcurrent":1"#)];
    let Drawn::Granted(0, old) = process.draw(&wanted) else { panic!("it is free") };
    let until = process.client.clock().boot + Duration::from_secs(100);
    let mut waiting = process.ask(&wanted, Otherwise::Wait { until, end: until, by: QueuedBy::default() });
    process.serve();
    process.now_ms.fetch_add(1000, Ordering::Relaxed);
    assert!(old.is_stale(&process.client.clock()));
    let mut swapped = process.ask_to_swap(old);
    process.serve();
    let Drawn::Granted(0, mut fresh) = ready(&mut swapped) else { panic!("the one who waits was served first") };
    assert!(!fresh.is_stale(&process.client.clock()));
    assert_eq!(process.used(&wanted[0]), (1, 1), "one was given back for it");
    assert!(poll(&mut waiting).is_pending());
    fresh.spend();
    drop(swapped);
    drop(fresh);
    process.pass(Duration::from_millis(60_500));
    assert_eq!(spent(ready(&mut waiting)), 0);
}

#[test]
fn whoever_waits_takes_what_comes_back_at_once() {
    let (_folder, mut process) = Process::alone();
    let wanted = [process.wanted("a", r#""maxConcurrent":1"#)];
    let Drawn::Granted(0, mut first) = process.draw(&wanted) else { panic!("it is free") };
    first.spend();
    let until = process.client.clock().boot + Duration::from_secs(100);
    let mut waiting = process.ask(&wanted, Otherwise::Wait { until, end: until, by: QueuedBy::default() });
    process.serve();
    assert!(poll(&mut waiting).is_pending());
    drop(first);
    process.serve();
    assert!(matches!(ready(&mut waiting), Drawn::Granted(0, _)));
}

#[test]
fn an_endpoint_that_rests_may_be_waited_for() {
    let (_folder, mut process) = Process::alone();
    let mut wanted = process.wanted("a", r#""rpm":1"#);
    wanted.not_before = process.client.clock().boot + Duration::from_secs(3);
    let refusal = refused(process.draw(&[wanted.clone()]));
    assert_eq!((refusal.wait, reasons(&refusal)), (Duration::from_secs(3), vec![(0, LimitReason::Rest)]));
    assert_eq!(refusal.held[0].held.until, wanted.not_before);
    let until = process.client.clock().boot + Duration::from_secs(5);
    let mut waiting = process.ask(&[wanted], Otherwise::Wait { until, end: until, by: QueuedBy::default() });
    process.serve();
    process.pass(Duration::from_secs(3));
    assert!(matches!(ready(&mut waiting), Drawn::Granted(0, _)));
}

#[test]
fn attempts_without_limits_and_tokens_are_written_a_little_later() {
    let (folder, mut process) = Process::alone();
    let wanted = process.wanted("a", r#""rpm":-1"#);
    process.client.list_accounts(1, [whole(&wanted)].into_iter());
    process.serve();
    for _ in 0..3 {
        process.client.unlimited(&wanted.accounts).spend();
    }
    let tokens = Tokens { prompt: 3, completion: 4, total: 7, cached: 1, reasoning: 2, audio: 5 };
    let speed = Speed { streams: 1, tokens: 4, first_token_ms: 10, ms: 20 };
    let wall = process.client.clock().wall;
    for cost in [Cost::exact(tokens, speed), Cost::exact(tokens, speed), Cost::estimated(100, 200)] {
        let spent = Spent::now(&"a".into(), "m", cost, &TimeZone::UTC, wall);
        let now = process.client.clock().boot;
        process.client.spend_tokens(&wanted.accounts, None, spent, now);
    }
    process.serve();
    assert!(!process.allocator.is_all_written());
    process.pass(WRITE_DELAY);
    assert!(process.allocator.is_all_written());
    assert_eq!(process.used(&wanted), (3, 3));
    let (stats, _) = statistics_of(folder.path()).read(wall).unwrap();
    let model = &stats["a"]["m"];
    let mut cost = Cost::exact(tokens, speed);
    cost.merge(&Cost::exact(tokens, speed));
    assert_eq!((cost.exact.requests, cost.exact.tokens.total, cost.exact.tokens.audio), (2, 14, 10));
    cost.merge(&Cost::estimated(100, 200));
    assert_eq!((cost.exact.requests, cost.exact.tokens.total), (2, 14), "estimates are not mixed in");
    assert_eq!((model.cost, cost.tokens()), (cost, 314));
    assert_eq!(model.hours.values().map(|part| part.tokens).sum::<u64>(), 14);
    assert_eq!(model.days.keys().copied().collect::<Vec<_>>(), [i64::try_from(NOON).unwrap() - 12 * 3600]);
}

#[test]
fn models_beyond_the_bound_are_one() {
    let (folder, mut process) = Process::alone();
    let wanted = process.wanted("a", r#""rpm":-1"#);
    let wall = process.client.clock().wall;
    for number in 0..MODELS_MAX + 10 {
        let cost = Cost::exact(Tokens::default(), Speed::default());
        let spent = Spent::now(&"a".into(), &format!("m{number}"), cost, &TimeZone::UTC, wall);
        let now = process.client.clock().boot;
        process.client.spend_tokens(&wanted.accounts, None, spent, now);
    }
    process.serve();
    process.pass(WRITE_DELAY);
    let (stats, _) = statistics_of(folder.path()).read(wall).unwrap();
    assert_eq!(stats["a"].len(), MODELS_MAX + 1);
    assert_eq!(stats["a"][OTHER_MODELS].cost.exact.requests, 10);
}

#[test]
fn without_the_ledger_only_endpoints_without_limits_are_asked_unless_the_config_says_otherwise() {
    let now_ms = Arc::new(AtomicU64::new(1_000_000));
    for (on_error, expected) in [(LedgerOnError::Deny, 1), (LedgerOnError::Allow, 0)] {
        let folder = tempfile::tempdir().unwrap();
        let mut process = Process::new(folder.path(), &now_ms, on_error);
        let wanted = [process.wanted("a", r#""rpm":1"#), process.wanted("b", r#""rpm":-1"#)];
        let mut answer = process.ask(&wanted, Otherwise::Refuse(CALLER));
        assert!(process.allocator.serve(None).is_err());
        assert_eq!(spent(ready(&mut answer)), expected);
        let mut only_limited = process.ask(&wanted[..1], Otherwise::Refuse(CALLER));
        assert!(process.allocator.serve(None).is_err());
        let drawn = ready(&mut only_limited);
        assert_eq!(matches!(drawn, Drawn::Unavailable), on_error == LedgerOnError::Deny, "{drawn:?}");
        let tally = &process.allocator.tally;
        let counts = [&tally.denied, &tally.uncounted].map(|count| count.load(Ordering::Relaxed));
        assert_eq!(counts, if on_error == LedgerOnError::Deny { [1, 0] } else { [0, 2] });
        assert_eq!(process.client.is_down(), on_error == LedgerOnError::Deny);
        // Attempts that were sent uncounted are counted once the ledger can be written again.
        process.client.list_accounts(1, [whole(&wanted[0])].into_iter());
        process.pass(RENEW);
        process.pass(RENEW);
        let counted = process.used(&wanted[0]).0;
        assert_eq!(counted, u64::from(on_error == LedgerOnError::Allow));
        assert!(!process.client.is_down());
    }
}

#[test]
fn without_the_ledger_a_refusal_names_a_moment_to_come() {
    if server_tested().is_some() {
        // Requests in flight are counted there as well.
        return;
    }
    let (_folder, mut process) = Process::alone();
    let wanted = [process.wanted("a", r#""rpm":1"#), process.wanted("b", r#""maxConcurrent":1"#)];
    let Drawn::Granted(0, _busy) = process.draw(&wanted[1..]) else { panic!("it is free") };
    let mut answer = process.ask(&wanted, Otherwise::Refuse(CALLER));
    assert!(process.allocator.serve(None).is_err());
    let refusal = refused(ready(&mut answer));
    let full = LimitReason::Full(LimitKind::MaxConcurrent, 1);
    assert_eq!((refusal.wait, reasons(&refusal)), (Duration::from_secs(1), vec![(1, full)]));
}

#[test]
fn a_group_that_fails_counts_nothing() {
    let (folder, mut process) = Process::alone();
    let Some(holder) = process.other_holder(folder.path()) else { return };
    let wanted = [process.wanted("a", r#""rpm":2,"maxConcurrent":1"#)];
    holder.execute_batch("BEGIN IMMEDIATE").unwrap();
    let mut answer = process.ask(&wanted, Otherwise::Refuse(CALLER));
    let error = process.allocator.serve(Some(&mut *process.ledger)).unwrap_err();
    assert_eq!(error.kind, FaultKind::Locked, "{error}");
    assert!(matches!(ready(&mut answer), Drawn::Unavailable));
    holder.execute_batch("ROLLBACK").unwrap();
    assert_eq!(process.used(&wanted[0]), (0, 0));
    assert_eq!(spent(process.draw(&wanted)), 0);
}

#[test]
fn processes_share_what_is_in_flight_if_several_machines_share_the_ledger() {
    let folder = tempfile::tempdir().unwrap();
    let now_ms = Arc::new(AtomicU64::new(1_000_000));
    let mut processes = [(); 2].map(|()| Process::new(folder.path(), &now_ms, LedgerOnError::Deny));
    let wanted = processes.each_ref().map(|process| [process.wanted("a", r#""maxConcurrent":3"#)]);
    let mut permits = Vec::new();
    for at in [0, 1, 0] {
        let Drawn::Granted(0, mut permit) = processes[at].draw(&wanted[at]) else { panic!("there is a place") };
        permit.spend();
        permits.push(permit);
    }
    let of_file = server_tested().is_none();
    assert_eq!(processes[1].draw(&wanted[1]).is_granted(), of_file, "a file's processes count their own");
    if of_file {
        return;
    }
    // What ends at one process leaves a place at the other.
    drop(permits.remove(0));
    processes[0].serve();
    assert!(processes[1].draw(&wanted[1]).is_granted());
    // What a dead process had in flight is free once it has not been heard of for long.
    let [dead, mut other] = processes;
    permits.drain(1..).for_each(std::mem::forget);
    std::mem::forget(dead);
    assert!(other.draw(&wanted[1]).is_granted(), "the one before was given back");
    let places = |other: &mut Process| {
        (0..4)
            .filter(|_| match other.draw(&wanted[1]) {
                Drawn::Granted(_, permit) => {
                    std::mem::forget(permit);
                    true
                }
                _ => false,
            })
            .count()
    };
    assert_eq!(places(&mut other), 1);
    other.pass(Duration::from_secs(31));
    assert_eq!(places(&mut other), 1, "its own are in flight still");
}

#[test]
fn a_waiting_draw_does_not_keep_the_thread_busy() {
    let (_folder, mut process) = Process::alone();
    let wanted = [process.wanted("a", r#""rpm":1"#)];
    spent(process.draw(&wanted));
    let until = process.client.clock().boot + Duration::from_secs(100);
    let waiting = process.ask(&wanted, Otherwise::Wait { until, end: until, by: QueuedBy::default() });
    process.serve();
    let now = process.client.clock().boot;
    assert!(process.allocator.next_due() > now, "there is nothing to do at this moment");
    assert!(process.allocator.next_due() <= now + SCAN);
    drop(waiting);
    for _ in 0..100 {
        process.pass(Duration::from_secs(1));
    }
    assert_eq!(process.allocator.next_due(), Stamp::NEVER, "and once all has freed, never again");
}
