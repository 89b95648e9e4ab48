//! What only a ledger on a server meets: replies that are lost, a server that begins, one that has lost what it had. Without
//! `LEDGER_TESTED` there is no server, and nothing to test.

use std::sync::atomic::AtomicBool;

use super::budgets::{dollars, money, totals};
use super::*;
use crate::ledger::places::{Place, PlaceChange, Thing, ThingKind};
use crate::ledger::redis::{Arguments, Reply, Server};

/// A way to the server on which replies are lost.
#[derive(Debug)]
struct Lossy {
    inner: Connection,
    /// The server does what it is asked for, and its reply does not arrive.
    loses_reply: Arc<AtomicBool>,
    /// What goes beside batches, such as places, does not arrive.
    loses_commands: Arc<AtomicBool>,
}

impl Server for Lossy {
    fn batch(&mut self, arguments: Arguments) -> Result<Reply, LedgerError> {
        let reply = self.inner.batch(arguments)?;
        if self.loses_reply.load(Ordering::Relaxed) {
            return Err(LedgerError { kind: FaultKind::Unusable, message: "the reply is lost".into() });
        }
        Ok(reply)
    }

    fn run(&mut self, commands: Vec<Arguments>) -> Result<Vec<::redis::Value>, LedgerError> {
        if self.loses_commands.load(Ordering::Relaxed) {
            return Err(LedgerError { kind: FaultKind::Unusable, message: "they are lost".into() });
        }
        self.inner.run(commands)
    }

    fn name(&self) -> &str {
        self.inner.name()
    }
}

/// A process on a server that begins with this grace, and the switches that lose its replies and its commands.
fn process(folder: &std::path::Path, grace: Duration) -> Option<(Process, [Arc<AtomicBool>; 2])> {
    let options = server_tested()?;
    let mut process = Process::new(folder, &Arc::new(AtomicU64::new(1_000_000)), LedgerOnError::Deny);
    let [loses_reply, loses_commands] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let switches = [Arc::clone(&loses_reply), Arc::clone(&loses_commands)];
    let server = Lossy { inner: Connection::new(options).unwrap(), loses_reply, loses_commands };
    let clock = process.client.clone();
    let time = Time::Given(Arc::new(move || clock.clock()));
    // Another prefix than the ledger's that the process has opened.
    let prefix = format!("{}-lossy", prefix_of(folder));
    process.ledger = Box::new(RedisLedger::open(server, &prefix, time, grace).unwrap());
    Some((process, switches))
}

#[test]
fn a_batch_whose_reply_is_lost_is_done_once_and_its_draws_are_given_back() {
    let folder = tempfile::tempdir().unwrap();
    let Some((mut process, [loses_reply, _])) = process(folder.path(), Duration::ZERO) else { return };
    let wanted = [process.wanted("a", r#""rpm":5,"rpd":5,"maxConcurrent":2"#)];
    let first = process.draw(&wanted);
    assert!(first.is_granted());
    let set = dollars(100);
    let (_permit, hold) = process.reserve(&set, money(40), money(1)).unwrap();
    let wall = process.client.clock().wall;
    for round in 1..=3 {
        // Tokens of an answer, a draw, and a growth of a reservation go out with one batch.
        let cost = Cost::exact(Tokens { total: 7, ..Tokens::default() }, Speed::default());
        let spent = Spent::now(&"a".into(), "m", cost, &TimeZone::UTC, wall);
        process.client.spend_tokens(&wanted[0].accounts, None, spent, process.client.clock().boot);
        process.serve();
        process.now_ms.fetch_add(100, Ordering::Relaxed);
        let mut answer = process.ask(&wanted, Otherwise::Refuse(CALLER));
        loses_reply.store(true, Ordering::Relaxed);
        let error = process.allocator.serve(Some(&mut *process.ledger)).unwrap_err();
        assert_eq!(error.kind, FaultKind::Unanswered);
        assert!(matches!(ready(&mut answer), Drawn::Unavailable));
        // Nor does it learn of it the next time.
        process.now_ms.fetch_add(1000, Ordering::Relaxed);
        process.allocator.serve(Some(&mut *process.ledger)).unwrap_err();
        loses_reply.store(false, Ordering::Relaxed);
        process.pass(Duration::from_secs(1));
        process.write();
        assert_eq!(process.used(&wanted[0]), (1, 1), "round {round}");
        let tokens = process.tokens_of(&wanted[0]);
        assert_eq!(tokens, 7 * round, "counted once each");
    }
    let second = process.draw(&wanted);
    assert!(second.is_granted(), "one place is in use, not two");
    assert!(!process.draw(&wanted).is_granted(), "of two");
    hold.settle(money(3));
    process.write();
    assert_eq!(process.totals(&set), [totals(3, 0)]);
}

#[test]
fn what_is_given_back_outlasts_a_batch_that_fails() {
    let folder = tempfile::tempdir().unwrap();
    let Some((mut process, [loses_reply, loses_commands])) = process(folder.path(), Duration::ZERO) else { return };
    let wanted = [process.wanted("a", r#""rpm":1,"rpd":1"#)];
    // Its counts are known, so the draw takes one call.
    assert_eq!(process.used(&wanted[0]), (0, 0));
    let mut answer = process.ask(&wanted, Otherwise::Refuse(CALLER));
    loses_reply.store(true, Ordering::Relaxed);
    process.allocator.serve(Some(&mut *process.ledger)).unwrap_err();
    assert!(matches!(ready(&mut answer), Drawn::Unavailable));
    // The batch that finds out what became of it fails, since a place cannot be written.
    loses_reply.store(false, Ordering::Relaxed);
    loses_commands.store(true, Ordering::Relaxed);
    let thing = Thing { kind: ThingKind::Session, name: "s".into() };
    let place = Place { owner: "o".into(), endpoint: "a".into(), organization: "o".into(), until: 4_000_000_000 };
    process.client.change_place(PlaceChange::Note(thing, place));
    process.now_ms.fetch_add(1000, Ordering::Relaxed);
    let client = process.client.clone();
    let mut flush = Box::pin(async move { client.flush().await });
    assert!(flush.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    process.allocator.serve(Some(&mut *process.ledger)).unwrap_err();
    loses_commands.store(false, Ordering::Relaxed);
    process.pass(Duration::from_secs(1));
    process.ledger.touch().unwrap();
    assert!(process.draw(&wanted).is_granted(), "nobody has the permit");
}

#[test]
fn while_a_server_begins_nothing_with_a_limit_is_granted() {
    let folder = tempfile::tempdir().unwrap();
    let Some((mut process, _)) = process(folder.path(), Duration::from_secs(5)) else { return };
    let set = dollars(100);
    for limits in [r#""rpm":5"#, r#""rpd":5"#, r#""tpm":5"#, r#""maxConcurrent":5"#] {
        let wanted = [process.wanted(limits, limits)];
        let refusal = refused(process.draw(&wanted));
        assert_eq!(reasons(&refusal), [(0, LimitReason::LedgerBegins)], "{limits}");
        assert_eq!(refusal.wait, Duration::from_secs(5), "{limits}");
    }
    let refusal = match process.reserve(&set, money(1), money(1)) {
        Err(drawn) => refused(drawn),
        Ok(_) => panic!("a budget is open"),
    };
    assert_eq!(reasons(&refusal), [(0, LimitReason::LedgerBegins)]);
    let unlimited = [process.wanted("free", r#""rpm":-1"#)];
    assert!(process.draw(&unlimited).is_granted());
    process.pass(Duration::from_secs(5));
    for limits in [r#""rpm":5"#, r#""rpd":5"#, r#""tpm":5"#, r#""maxConcurrent":5"#] {
        let wanted = [process.wanted(limits, limits)];
        assert!(process.draw(&wanted).is_granted(), "{limits}");
    }
    assert!(process.reserve(&set, money(1), money(1)).is_ok());
}

impl Process {
    /// The tokens of an account in the minute.
    fn tokens_of(&mut self, wanted: &Wanted) -> u64 {
        self.used(wanted);
        whole(wanted).account.view().used.tpm
    }
}

/// What becomes of the next call of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Fate {
    #[default]
    Well,
    /// It does not arrive.
    Lost,
    /// It is done, and its reply does not arrive.
    ReplyLost,
    /// It is done twice.
    Twice,
    /// It arrives some time after its process has given it up.
    Late,
    /// It is well, and what goes beside it, such as places, is lost.
    CommandsLost,
}

/// A way on which calls meet their fates.
#[derive(Debug)]
struct Way {
    inner: Connection,
    fate: Arc<std::sync::Mutex<Fate>>,
    late: Arc<std::sync::Mutex<Vec<Arguments>>>,
}

impl Server for Way {
    fn batch(&mut self, arguments: Arguments) -> Result<Reply, LedgerError> {
        let lost = || LedgerError { kind: FaultKind::Unusable, message: "it is lost".into() };
        match *self.fate.lock().unwrap() {
            Fate::Well | Fate::CommandsLost => self.inner.batch(arguments),
            Fate::Lost => Err(lost()),
            Fate::ReplyLost => self.inner.batch(arguments).and(Err(lost())),
            Fate::Twice => {
                let first = self.inner.batch(arguments.clone());
                self.inner.batch(arguments)?;
                first
            }
            Fate::Late => {
                self.late.lock().unwrap().push(arguments);
                Err(lost())
            }
        }
    }

    fn run(&mut self, commands: Vec<Arguments>) -> Result<Vec<::redis::Value>, LedgerError> {
        if *self.fate.lock().unwrap() == Fate::CommandsLost {
            return Err(LedgerError { kind: FaultKind::Unusable, message: "they are lost".into() });
        }
        self.inner.run(commands)
    }

    fn name(&self) -> &str {
        self.inner.name()
    }
}

/// Time in which processes offer what a server has lost.
const GRACE_MS: u64 = 2000;
const RPM: u64 = 6;
const RPD: u64 = 30;
const CONCURRENT: usize = 2;

/// One process of the schedule.
struct One {
    process: Process,
    wanted: [Wanted; 3],
    fate: Arc<std::sync::Mutex<Fate>>,
    late: Arc<std::sync::Mutex<Vec<Arguments>>>,
    /// Requests in flight to the third endpoint.
    in_flight: Vec<Permit>,
}

/// Several processes on one server that loses replies, writes and calls, and what a plain model says.
struct Faults {
    rng: fastrand::Rng,
    folder: tempfile::TempDir,
    options: ConnectionOptions,
    now_ms: Arc<AtomicU64>,
    all: Vec<One>,
    /// Moments at which attempts were sent to the first endpoint, and how many to the second.
    sent_in_minute: Vec<u64>,
    sent_on_day: u64,
    /// Permits that a killed process may have taken with it.
    wasted: u64,
    /// What the server had at a moment: a server that takes over may have no more.
    copy: Vec<(Vec<u8>, i64, Vec<u8>)>,
    copied_at: u64,
    rollbacks: u64,
}

impl Faults {
    fn new(seed: u64, options: ConnectionOptions) -> Self {
        let mut faults = Self {
            rng: fastrand::Rng::with_seed(seed),
            folder: tempfile::tempdir().unwrap(),
            options,
            now_ms: Arc::new(AtomicU64::new(1_000_000)),
            all: Vec::new(),
            sent_in_minute: Vec::new(),
            sent_on_day: 0,
            wasted: 0,
            copy: Vec::new(),
            copied_at: 0,
            rollbacks: 0,
        };
        for _ in 0..3 {
            let one = faults.start();
            faults.all.push(one);
        }
        faults.pass(GRACE_MS);
        faults.take_copy();
        faults
    }

    fn prefix(&self) -> String {
        format!("{}-faults", prefix_of(self.folder.path()))
    }

    fn start(&self) -> One {
        let mut process = Process::new(self.folder.path(), &self.now_ms, LedgerOnError::Deny);
        let (fate, late) = (Arc::default(), Arc::default());
        let way = Way {
            inner: Connection::new(self.options.clone()).unwrap(),
            fate: Arc::clone(&fate),
            late: Arc::clone(&late),
        };
        let clock = process.client.clone();
        let time = Time::Given(Arc::new(move || clock.clock()));
        let grace = Duration::from_millis(GRACE_MS);
        process.ledger = Box::new(RedisLedger::open(way, &self.prefix(), time, grace).unwrap());
        let wanted = [
            process.wanted("a", &format!(r#""rpm":{RPM}"#)),
            process.wanted("b", &format!(r#""rpd":{RPD}"#)),
            process.wanted("c", &format!(r#""maxConcurrent":{CONCURRENT},"rpm":100000"#)),
        ];
        One { process, wanted, fate, late, in_flight: Vec::new() }
    }

    fn connection(&self) -> ::redis::Connection {
        let (host, port) = &self.options.address.hosts[0];
        ::redis::Client::open(format!("redis://{host}:{port}")).unwrap().get_connection().unwrap()
    }

    /// All keys of the ledger, with their times to live and contents.
    fn keys(&self) -> Vec<(Vec<u8>, i64, Vec<u8>)> {
        let mut connection = self.connection();
        let pattern = format!("{{{}*", self.prefix());
        let names: Vec<Vec<u8>> = ::redis::cmd("KEYS").arg(pattern).query(&mut connection).unwrap();
        let read = |name: Vec<u8>| {
            let left: i64 = ::redis::cmd("PTTL").arg(&name).query(&mut connection).unwrap();
            let content: Vec<u8> = ::redis::cmd("DUMP").arg(&name).query(&mut connection).unwrap();
            (name, left.max(0), content)
        };
        names.into_iter().map(read).collect()
    }

    fn take_copy(&mut self) {
        (self.copy, self.copied_at) = (self.keys(), self.now());
    }

    /// Another server takes over, which has what there was at the moment of the copy.
    fn roll_back(&mut self) {
        let mut connection = self.connection();
        for (name, ..) in self.keys() {
            let _: () = ::redis::cmd("DEL").arg(name).query(&mut connection).unwrap();
        }
        for (name, left, content) in &self.copy {
            let _: () = ::redis::cmd("RESTORE").arg(name).arg(left).arg(content).query(&mut connection).unwrap();
        }
        let state = format!("{{{}}}:state", self.prefix());
        let _: () = ::redis::cmd("HSET").arg(state).arg("epoch").arg("another").query(&mut connection).unwrap();
        self.rollbacks += 1;
        // One fault at a time: every process is heard before the grace is over.
        self.heal();
        for one in &mut self.all {
            one.process.ledger.touch().unwrap();
        }
    }

    fn heal(&self) {
        for one in &self.all {
            *one.fate.lock().unwrap() = Fate::Well;
        }
    }

    fn now(&self) -> u64 {
        self.now_ms.load(Ordering::Relaxed)
    }

    /// Time passes, and every process does what it has to do.
    fn pass(&mut self, millis: u64) {
        if millis > 5000 {
            // What is not heard of for half a minute has nothing in flight.
            self.heal();
        }
        let mut left = millis;
        while left > 0 {
            let piece = left.min(500);
            left -= piece;
            self.now_ms.fetch_add(piece, Ordering::Relaxed);
            for One { process, .. } in &mut self.all {
                process.allocator.serve(Some(&mut *process.ledger)).map(drop).unwrap_or_default();
                process.ledger.touch().unwrap_or_default();
            }
        }
    }

    fn step(&mut self) {
        let at = self.rng.usize(..self.all.len());
        match self.rng.u8(..20) {
            0..8 => self.draw(at),
            8 | 9 => {
                let in_flight = &mut self.all[at].in_flight;
                if !in_flight.is_empty() {
                    drop(in_flight.swap_remove(0));
                }
            }
            10 | 11 => {
                let fates = [Fate::Lost, Fate::ReplyLost, Fate::Twice, Fate::Late, Fate::CommandsLost, Fate::Well];
                *self.all[at].fate.lock().unwrap() = *self.rng.choice(&fates).unwrap();
            }
            12 => self.deliver(at),
            13 => self.take_copy(),
            // Of what is older than that, whole pieces are counted again.
            14 if self.now() - self.copied_at < 15_000 && self.rng.u8(..3) == 0 => self.roll_back(),
            15 if self.rng.u8(..4) == 0 => self.kill(at),
            16 if self.rng.u8(..4) == 0 => self.pass(61_000),
            _ => {
                let millis = self.rng.u64(..1500);
                self.pass(millis);
            }
        }
        self.check();
    }

    fn deliver(&mut self, at: usize) {
        let late: Vec<Arguments> = std::mem::take(&mut *self.all[at].late.lock().unwrap());
        let mut connection = Connection::new(self.options.clone()).unwrap();
        for arguments in late {
            connection.batch(arguments).unwrap();
        }
    }

    fn draw(&mut self, at: usize) {
        let now = self.now();
        let of = self.rng.usize(..3);
        let is_sent = self.rng.u8(..4) > 0;
        let one = &mut self.all[at];
        let thing = Thing { kind: ThingKind::Session, name: "s".into() };
        let place = Place { owner: "o".into(), endpoint: "a".into(), organization: "o".into(), until: 4_000_000_000 };
        one.process.client.change_place(PlaceChange::Note(thing, place));
        let mut answer = one.process.ask(&one.wanted[of..=of], Otherwise::Refuse(CALLER));
        one.process.allocator.serve(Some(&mut *one.process.ledger)).map(drop).unwrap_or_default();
        let Drawn::Granted(_, mut permit) = ready(&mut answer) else { return };
        if !is_sent {
            return;
        }
        permit.spend();
        match of {
            0 => self.sent_in_minute.push(now),
            1 => self.sent_on_day += 1,
            _ => one.in_flight.push(permit),
        }
    }

    fn kill(&mut self, at: usize) {
        let again = self.start();
        let dead = std::mem::replace(&mut self.all[at], again);
        // What it had not given back, and what it did not know that it had.
        self.wasted += 10;
        dead.in_flight.into_iter().for_each(std::mem::forget);
        // One fault at a time: what it has written is on all servers.
        self.take_copy();
    }

    fn check(&self) {
        let now = self.now();
        let in_minute = self.sent_in_minute.iter().filter(|at| **at + 60_000 > now).count() as u64;
        assert!(in_minute <= RPM, "{in_minute} in a minute");
        assert!(self.sent_on_day <= RPD, "{} on a day", self.sent_on_day);
        let in_flight: usize = self.all.iter().map(|one| one.in_flight.len()).sum();
        assert!(in_flight <= CONCURRENT, "{in_flight} at once");
    }

    /// All is well again for long enough: nothing is left of the faults.
    fn end(&mut self) {
        self.heal();
        for at in 0..self.all.len() {
            self.deliver(at);
            self.all[at].in_flight.clear();
        }
        for _ in 0..80 {
            self.pass(1000);
        }
        let (sent, wasted) = (self.sent_on_day, self.wasted);
        let one = &mut self.all[0];
        let (_, used) = one.process.used(&one.wanted[1]);
        assert!(used >= sent && used <= sent + wasted, "{used} are counted of {sent} and {wasted} wasted");
        let mut free = Vec::new();
        while let Drawn::Granted(_, mut permit) = one.process.draw(&one.wanted[2..]) {
            permit.spend();
            free.push(permit);
            assert!(free.len() <= CONCURRENT);
        }
        assert_eq!(free.len(), CONCURRENT, "a place is left taken");
        let mut minute = 0;
        while let Drawn::Granted(_, mut permit) = one.process.draw(&one.wanted[..1]) {
            permit.spend();
            minute += 1;
        }
        assert_eq!(minute, RPM, "a permit of the minute is left taken");
    }
}

#[test]
fn whatever_is_lost_no_limit_is_passed_and_nothing_is_left_taken() {
    let Some(options) = server_tested() else { return };
    if options.address.tls
        || options.address.kind != crate::config::RedisKind::One
        || options.address.username.is_some()
    {
        // It needs the whole of a server.
        return;
    }
    let only = std::env::var("SIM_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    let schedules = std::env::var("SIM_SCHEDULES").ok().and_then(|number| number.parse().ok()).unwrap_or(40);
    let base = only.unwrap_or_else(|| fastrand::u64(..1 << 40));
    let (mut sent, mut rollbacks) = (0, 0);
    for seed in base..base + only.map_or(schedules, |_| 1) {
        let mut faults = Faults::new(seed, options.clone());
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..80 {
                faults.step();
            }
            faults.end();
        }));
        assert!(found.is_ok(), "SIM_SEED={seed}");
        sent += faults.sent_in_minute.len() as u64 + faults.sent_on_day;
        rollbacks += faults.rollbacks;
    }
    eprintln!("{schedules} schedules, {sent} sent, {rollbacks} servers that had lost writes");
    assert!(only.is_some() || sent > 5 * schedules && rollbacks > schedules / 4, "{sent}, {rollbacks}");
}
