//! Budgets: reserved, settled, shared by processes, and left behind by dead ones.

use super::*;
use crate::config::{Budget, BudgetPeriod, BudgetUnit, Raise};
use crate::ledger::OwnDraw;
use crate::ledger::budgets::{Amount, BudgetHold, BudgetSet, BudgetView, HeldBudget, Totals};

/// A budget of dollars, and one of tokens for all time.
fn budgets(limits: &[(BudgetUnit, u64, BudgetPeriod)]) -> Arc<BudgetSet> {
    let budget = |(unit, limit, period): &(BudgetUnit, u64, BudgetPeriod)| Budget {
        unit: *unit,
        limit: *limit,
        period: *period,
        timezone: TimeZone::UTC,
        warn_at: None,
        raises: Vec::new(),
    };
    Arc::new(BudgetSet { key: "ada".into(), budgets: limits.iter().map(budget).collect() })
}

pub(super) fn dollars(limit: u64) -> Arc<BudgetSet> {
    budgets(&[(BudgetUnit::NanoUsd, limit, BudgetPeriod::Day)])
}

pub(super) fn money(nano_usd: u64) -> Amount {
    Amount { tokens: 0, nano_usd }
}

impl Process {
    /// Draws what may take so much, and takes a part of it at least.
    pub(super) fn reserve(
        &mut self,
        set: &Arc<BudgetSet>,
        reserved: Amount,
        known: Amount,
    ) -> Result<(Permit, BudgetHold), Drawn> {
        let wanted = Wanted { spends: Spends { reserved, known }, ..self.wanted("a", r#""rpm":-1"#) };
        let own = OwnDraw { caller: None, budgets: Some(Arc::clone(set)) };
        let client = self.client.clone();
        let _entered = self.runtime.enter();
        let mut answer: Answer =
            Box::pin(
                async move { client.draw_for(client.ticket(), vec![wanted], own, Otherwise::LookElsewhere).await },
            );
        assert!(poll(&mut answer).is_pending());
        self.serve();
        match ready(&mut answer) {
            Drawn::Granted(_, mut permit) => {
                let hold = permit.take_budgets().unwrap();
                Ok((permit, hold))
            }
            other => Err(other),
        }
    }

    /// What is taken of each budget.
    pub(super) fn totals(&mut self, set: &Arc<BudgetSet>) -> Vec<Totals> {
        self.budget_views(set).iter().map(|view| view.totals).collect()
    }

    fn budget_views(&mut self, set: &Arc<BudgetSet>) -> Vec<BudgetView> {
        let (client, set) = (self.client.clone(), Arc::clone(set));
        let _entered = self.runtime.enter();
        let mut look = Box::pin(async move { client.look_at_budgets(&set).await.unwrap() });
        let mut context = Context::from_waker(Waker::noop());
        assert!(look.as_mut().poll(&mut context).is_pending());
        self.serve();
        let Poll::Ready(views) = look.as_mut().poll(&mut context) else { panic!("no answer") };
        views
    }
}

pub(super) fn totals(spent: u64, reserved: u64) -> Totals {
    Totals { spent, reserved }
}

fn full(refused: Result<(Permit, BudgetHold), Drawn>) -> HeldBudget {
    let Err(Drawn::Refused(Refusal { budget: Some(held), .. })) = refused else { panic!("{refused:?}") };
    *held
}

#[test]
fn what_may_be_taken_is_reserved_and_settled_at_what_was() {
    let (_folder, mut process) = Process::alone();
    let set = dollars(100);
    let (_permit, hold) = process.reserve(&set, money(60), money(10)).unwrap();
    assert_eq!(process.totals(&set), [totals(0, 60)]);
    let refusal = full(process.reserve(&set, money(41), money(1)));
    assert_eq!((refusal.view.totals, refusal.view.limit, refusal.wanted), (totals(0, 60), 100, 41));
    assert_eq!(refusal.view.ends, Some(SystemTime::UNIX_EPOCH + Duration::from_secs(NOON + 12 * 3600)));
    hold.settle(money(25));
    process.write();
    assert_eq!(process.totals(&set), [totals(25, 0)]);
    let (_permit, hold) = process.reserve(&set, money(75), money(1)).unwrap();
    // More than was reserved counts as well.
    hold.settle(money(90));
    process.write();
    assert_eq!(process.totals(&set), [totals(115, 0)]);
    full(process.reserve(&set, money(1), money(1)));
    process.reserve(&set, money(0), money(0)).expect("what costs nothing needs no room");
}

#[test]
fn what_was_never_sent_takes_nothing_and_what_ends_unsettled_what_is_known() {
    let (_folder, mut process) = Process::alone();
    let set = dollars(100);
    drop(process.reserve(&set, money(60), money(10)).unwrap());
    process.write();
    assert_eq!(process.totals(&set), [totals(0, 0)]);
    let (_permit, mut hold) = process.reserve(&set, money(60), money(10)).unwrap();
    hold.set_sent(true);
    drop(hold);
    process.write();
    assert_eq!(process.totals(&set), [totals(10, 0)]);
    let (_permit, mut hold) = process.reserve(&set, money(60), money(10)).unwrap();
    hold.set_sent(true);
    hold.set_sent(false);
    drop(hold);
    let (_permit, mut hold) = process.reserve(&set, money(60), money(10)).unwrap();
    hold.set_sent(true);
    hold.release();
    process.write();
    assert_eq!(process.totals(&set), [totals(10, 0)]);
}

#[test]
fn every_budget_must_have_room() {
    let (_folder, mut process) = Process::alone();
    let set =
        budgets(&[(BudgetUnit::NanoUsd, 1000, BudgetPeriod::Hour), (BudgetUnit::Tokens, 50, BudgetPeriod::Total)]);
    let amount = |tokens, nano_usd| Amount { tokens, nano_usd };
    let (_permit, hold) = process.reserve(&set, amount(30, 30), amount(1, 1)).unwrap();
    let refusal = full(process.reserve(&set, amount(21, 1), amount(1, 1)));
    assert_eq!((refusal.view.kind.to_string().as_str(), refusal.view.ends), ("tokens/total", None));
    assert_eq!(process.totals(&set), [totals(0, 30), totals(0, 30)], "nothing of either is reserved in vain");
    hold.settle(amount(20, 10));
    process.write();
    assert_eq!(process.totals(&set), [totals(10, 0), totals(20, 0)]);
    // The hour begins anew, all time does not.
    process.pass(Duration::from_hours(1));
    assert_eq!(process.totals(&set), [totals(0, 0), totals(20, 0)]);
}

#[test]
fn a_reservation_is_settled_in_the_period_that_it_was_made_in() {
    let (_folder, mut process) = Process::alone();
    let set = budgets(&[(BudgetUnit::NanoUsd, 100, BudgetPeriod::Hour)]);
    process.pass(Duration::from_mins(42));
    let (_permit, hold) = process.reserve(&set, money(100), money(1)).unwrap();
    process.pass(Duration::from_mins(2));
    assert_eq!(process.totals(&set), [totals(0, 0)]);
    hold.settle(money(70));
    process.write();
    assert_eq!(process.totals(&set), [totals(0, 0)], "it is of the hour before");
    process.reserve(&set, money(100), money(1)).unwrap();
}

#[test]
fn five_hours_begin_with_what_is_taken_first() {
    let (_folder, mut process) = Process::alone();
    let set = budgets(&[(BudgetUnit::NanoUsd, 100, BudgetPeriod::FiveHours)]);
    process.totals(&set);
    process.pass(Duration::from_hours(4));
    let (_permit, hold) = process.reserve(&set, money(100), money(1)).unwrap();
    hold.settle(money(100));
    process.write();
    process.pass(Duration::from_hours(4));
    full(process.reserve(&set, money(1), money(1)));
    process.pass(Duration::from_hours(1));
    process.reserve(&set, money(1), money(1)).unwrap();
}

#[test]
fn a_raise_holds_until_its_end() {
    let (_folder, mut process) = Process::alone();
    let until = jiff::Timestamp::from_second(i64::try_from(NOON).unwrap() + 2 * 3600).unwrap();
    let mut raised = Arc::into_inner(dollars(100)).unwrap();
    raised.budgets[0].raises = vec![Raise { by: 50, until }];
    let raised = Arc::new(raised);
    let (_permit, hold) = process.reserve(&raised, money(150), money(1)).unwrap();
    hold.settle(money(120));
    process.write();
    process.reserve(&raised, money(30), money(1)).unwrap();
    process.pass(Duration::from_hours(2));
    assert_eq!(full(process.reserve(&raised, money(1), money(1))).view.limit, 100);
}

#[test]
fn what_takes_more_than_was_reserved_reserves_more_while_there_is_room() {
    let (_folder, mut process) = Process::alone();
    let set = dollars(100);
    let (_permit, mut hold) = process.reserve(&set, money(40), money(10)).unwrap();
    hold.set_sent(true);
    hold.progress(money(40), money(40));
    process.serve();
    assert_eq!(process.totals(&set), [totals(0, 40)], "not yet");
    hold.progress(money(41), money(40));
    process.serve();
    assert_eq!((process.totals(&set), hold.has_overrun()), (vec![totals(0, 80)], false));
    hold.progress(money(81), money(40));
    process.serve();
    assert_eq!((process.totals(&set), hold.has_overrun()), (vec![totals(0, 80)], true));
    drop(hold);
    process.write();
    assert_eq!(process.totals(&set), [totals(81, 0)], "what is known of it counts");
}

#[test]
fn what_begins_by_itself_is_counted_without_a_reservation() {
    let (_folder, mut process) = Process::alone();
    let set = dollars(100);
    process.client.spend_unreserved(&set, money(70));
    process.write();
    process.client.spend_unreserved(&set, money(20));
    process.write();
    assert_eq!(process.totals(&set), [totals(90, 0)]);
    full(process.reserve(&set, money(11), money(1)));
    assert!(process.allocator.is_all_written());
}

#[test]
fn processes_share_budgets_and_settle_what_dead_ones_left() {
    let (folder, mut first) = Process::alone();
    let mut second = Process::new(folder.path(), &first.now_ms.clone(), LedgerOnError::Deny);
    let set = dollars(100);
    let (_permit, mut mine) = first.reserve(&set, money(60), money(15)).unwrap();
    mine.set_sent(true);
    full(second.reserve(&set, money(41), money(1)));
    let (_permit, theirs) = second.reserve(&set, money(40), money(1)).unwrap();
    theirs.settle(money(5));
    second.write();
    assert_eq!(first.totals(&set), [totals(5, 60)]);
    // It says nothing any more, and keeps what it holds for now.
    second.pass(Duration::from_secs(20));
    second.serve();
    assert_eq!(second.totals(&set), [totals(5, 60)]);
    second.pass(Duration::from_secs(15));
    second.serve();
    assert_eq!(second.totals(&set), [totals(20, 0)], "settled at what was known");
    // It was not dead after all, and knows now what was taken.
    mine.settle(money(50));
    first.write();
    assert_eq!(first.totals(&set), [totals(55, 0)], "what it took, once");
    assert_eq!(second.totals(&set), [totals(55, 0)]);
}

#[test]
fn a_process_that_is_busy_for_long_is_not_dead() {
    let (folder, mut first) = Process::alone();
    let mut second = Process::new(folder.path(), &first.now_ms.clone(), LedgerOnError::Deny);
    let set = dollars(100);
    let (_permit, hold) = first.reserve(&set, money(60), money(15)).unwrap();
    for _ in 0..120 {
        first.pass(Duration::from_secs(1));
        first.serve();
        second.serve();
    }
    assert_eq!(second.totals(&set), [totals(0, 60)]);
    hold.settle(money(1));
    first.write();
    assert_eq!(second.totals(&set), [totals(1, 0)]);
}

#[test]
fn what_grows_twice_at_once_leaves_nothing_reserved() {
    let (_folder, mut process) = Process::alone();
    let set =
        budgets(&[(BudgetUnit::NanoUsd, 1000, BudgetPeriod::Day), (BudgetUnit::Tokens, 500, BudgetPeriod::Total)]);
    let amount = |number| Amount { tokens: number, nano_usd: number };
    let (_permit, mut hold) = process.reserve(&set, amount(10), amount(1)).unwrap();
    hold.set_sent(true);
    for known in [20, 40, 60] {
        hold.progress(amount(known), amount(100));
    }
    process.serve();
    assert_eq!(process.totals(&set), [totals(0, 110); 2], "once is enough for all that is known");
    for known in [150, 200, 400] {
        hold.progress(amount(known), amount(100));
    }
    process.serve();
    assert_eq!(process.totals(&set), [totals(0, 410); 2]);
    assert!(!hold.has_overrun());
    hold.progress(amount(450), amount(100));
    process.serve();
    assert_eq!(process.totals(&set), [totals(0, 410); 2], "the budget of tokens has no room");
    assert!(hold.has_overrun());
    hold.settle(amount(460));
    process.write();
    assert_eq!(process.totals(&set), [totals(460, 0); 2]);
}

#[test]
fn what_grows_once_its_process_was_taken_for_dead_counts_once() {
    let (folder, mut first) = Process::alone();
    let mut second = Process::new(folder.path(), &first.now_ms.clone(), LedgerOnError::Deny);
    let set = dollars(1000);
    let (_permit, mut hold) = first.reserve(&set, money(60), money(15)).unwrap();
    hold.set_sent(true);
    second.totals(&set);
    for _ in 0..45 {
        second.pass(Duration::from_secs(1));
    }
    assert_eq!(second.totals(&set), [totals(15, 0)], "it said nothing, and is settled at what was known");
    hold.progress(money(100), money(50));
    first.serve();
    assert_eq!(second.totals(&set), [totals(15, 0)]);
    hold.settle(money(120));
    first.write();
    assert_eq!((first.totals(&set), second.totals(&set)), (vec![totals(120, 0)], vec![totals(120, 0)]));
}

#[test]
fn five_hours_that_begin_tomorrow_are_not_those_that_run() {
    let (folder, mut process) = Process::alone();
    let set = budgets(&[(BudgetUnit::NanoUsd, 100, BudgetPeriod::FiveHours)]);
    let Some(path) = file_of(folder.path()) else { return };
    let ahead = "INSERT INTO budget VALUES ('ada', 'usd/5h', ?1, 90, 0, NULL)";
    let ledger = rusqlite::Connection::open(path).unwrap();
    ledger.execute(ahead, [i64::try_from(NOON + 24 * 3600).unwrap()]).unwrap();
    let mut taken = 0;
    for _ in 0..3 {
        let (_permit, hold) = process.reserve(&set, money(30), money(1)).unwrap();
        hold.settle(money(30));
        taken += 30;
        process.write();
        // Another process has written something.
        ledger.execute("UPDATE budget SET spent = spent WHERE period = 0", []).unwrap();
        ledger.execute("INSERT OR REPLACE INTO budget VALUES ('bob', 'usd/day', 0, ?1, 0, NULL)", [taken]).unwrap();
        process.pass(Duration::from_secs(2));
        assert_eq!(process.totals(&set), [totals(taken, 0)]);
    }
    assert_eq!(full(process.reserve(&set, money(30), money(1))).view.totals, totals(90, 0));
}

#[test]
fn what_is_reserved_by_nobody_is_given_back() {
    let (folder, mut process) = Process::alone();
    let set = dollars(100);
    let (_permit, hold) = process.reserve(&set, money(60), money(1)).unwrap();
    let Some(path) = file_of(folder.path()) else { return };
    let ledger = rusqlite::Connection::open(path).unwrap();
    ledger.execute("UPDATE budget SET reserved = reserved + 35", []).unwrap();
    process.pass(Duration::from_secs(3601));
    process.serve();
    assert_eq!(process.totals(&set), [totals(0, 60)]);
    hold.settle(money(1));
    process.write();
    assert_eq!(process.totals(&set), [totals(1, 0)]);
}

#[test]
fn a_ledger_that_cannot_be_written_opens_no_budget() {
    for on_error in [LedgerOnError::Deny, LedgerOnError::Allow] {
        let folder = tempfile::tempdir().unwrap();
        let mut process = Process::new(folder.path(), &Arc::new(AtomicU64::new(1_000_000)), on_error);
        let set = dollars(100);
        let (_permit, hold) = process.reserve(&set, money(60), money(10)).unwrap();
        let wanted =
            Wanted { spends: Spends { reserved: money(1), known: money(1) }, ..process.wanted("a", r#""rpm":-1"#) };
        let own = OwnDraw { caller: None, budgets: Some(Arc::clone(&set)) };
        let client = process.client.clone();
        let runtime = Arc::clone(&process.runtime);
        let _entered = runtime.enter();
        let mut answer: Answer =
            Box::pin(
                async move { client.draw_for(client.ticket(), vec![wanted], own, Otherwise::LookElsewhere).await },
            );
        assert!(poll(&mut answer).is_pending());
        process.allocator.serve(None).unwrap_err();
        assert!(matches!(ready(&mut answer), Drawn::Unavailable), "{on_error:?}");
        // What was settled meanwhile is written once it can be.
        hold.settle(money(30));
        process.now_ms.fetch_add(1000, Ordering::Relaxed);
        process.allocator.serve(None).unwrap_err();
        process.write();
        process.write();
        assert_eq!(process.totals(&set), [totals(30, 0)], "{on_error:?}");
    }
}

/// What the model knows of a reservation.
struct Running {
    hold: BudgetHold,
    _permit: Permit,
    process: usize,
    reserved: u64,
    known: u64,
    sent: bool,
}

/// One that has been settled, and may not be written yet.
struct Unwritten {
    process: usize,
    taken: u64,
    reserved: u64,
    known: u64,
}

/// Two processes on one ledger, and what a plain model says of one budget.
struct Schedule {
    rng: fastrand::Rng,
    folder: tempfile::TempDir,
    now_ms: Arc<AtomicU64>,
    processes: [Process; 2],
    set: Arc<BudgetSet>,
    running: Vec<Running>,
    unwritten: Vec<Unwritten>,
    spent: u64,
    /// By how much was taken more than reserved.
    passed: u64,
}

impl Schedule {
    const LIMIT: u64 = 1000;

    fn new(seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let now_ms = Arc::new(AtomicU64::new(1_000_000));
        let new = || Process::new(folder.path(), &now_ms, LedgerOnError::Deny);
        Self {
            rng: fastrand::Rng::with_seed(seed),
            processes: [new(), new()],
            set: budgets(&[(BudgetUnit::NanoUsd, Self::LIMIT, BudgetPeriod::Total)]),
            folder,
            now_ms,
            running: Vec::new(),
            unwritten: Vec::new(),
            spent: 0,
            passed: 0,
        }
    }

    fn step(&mut self) {
        let at = self.rng.usize(..2);
        match self.rng.u32(..12) {
            0..=4 => self.draw(at),
            5 | 6 if !self.running.is_empty() => {
                let one = self.rng.usize(..self.running.len());
                self.running[one].hold.set_sent(true);
                self.running[one].sent = true;
            }
            7 | 8 if !self.running.is_empty() => {
                let one = self.running.swap_remove(self.rng.usize(..self.running.len()));
                let taken = self.rng.u64(..=one.reserved * 5 / 4);
                self.end(&one, taken);
                one.hold.settle(money(taken));
            }
            9 if !self.running.is_empty() => {
                let one = self.running.swap_remove(self.rng.usize(..self.running.len()));
                self.end(&one, if one.sent { one.known } else { 0 });
            }
            10 if self.rng.u32(..4) == 0 => self.kill(at),
            _ => {
                let millis = self.rng.u64(..3000);
                self.now_ms.fetch_add(millis, Ordering::Relaxed);
            }
        }
        for process in 0..2 {
            self.processes[process].serve();
            if self.processes[process].allocator.is_all_written() {
                self.unwritten.retain(|one| one.process != process);
            }
        }
    }

    fn draw(&mut self, at: usize) {
        let known = self.rng.u64(..50);
        let reserved = known + self.rng.u64(..200);
        let taken: u64 = self.running.iter().map(|one| one.reserved).sum::<u64>() + self.spent;
        match self.processes[at].reserve(&self.set, money(reserved), money(known)) {
            Ok((permit, hold)) => {
                let most = Self::LIMIT + self.passed;
                assert!(reserved == 0 || taken + reserved <= most, "{taken} are taken, and {reserved} more were given");
                self.running.push(Running { hold, _permit: permit, process: at, reserved, known, sent: false });
            }
            Err(Drawn::Refused(Refusal { budget: Some(held), .. })) => assert_eq!(held.wanted, reserved),
            Err(other) => panic!("{other:?}"),
        }
    }

    fn end(&mut self, one: &Running, taken: u64) {
        let Running { process, reserved, known, .. } = *one;
        self.spent += taken;
        self.passed += taken.saturating_sub(reserved);
        self.unwritten.push(Unwritten { process, taken, reserved, known });
    }

    /// What it had is what is known of it, sent or not, and what it has not written as if it had not been.
    fn kill(&mut self, at: usize) {
        let dead = std::mem::replace(
            &mut self.processes[at],
            Process::new(self.folder.path(), &self.now_ms, LedgerOnError::Deny),
        );
        for one in self.running.extract_if(.., |one| one.process == at) {
            self.spent += one.known;
            // It says nothing any more.
            std::mem::forget(one.hold);
        }
        for one in self.unwritten.extract_if(.., |one| one.process == at) {
            self.spent = self.spent + one.known - one.taken;
            self.passed -= one.taken.saturating_sub(one.reserved);
        }
        drop(dead);
    }

    /// Ends what runs, and lets so much time pass that the dead are known as such.
    fn end_all(&mut self) {
        for one in std::mem::take(&mut self.running) {
            self.spent += one.known;
            one.hold.settle(money(one.known));
        }
        // Who looks at a budget looks after those who had reserved of it.
        let set = Arc::clone(&self.set);
        self.processes[0].totals(&set);
        for _ in 0..50 {
            self.now_ms.fetch_add(1000, Ordering::Relaxed);
            self.processes.iter_mut().for_each(Process::serve);
        }
    }
}

#[test]
fn whatever_comes_no_budget_is_passed_and_nothing_is_left_reserved() {
    let schedules = std::env::var("SIM_SCHEDULES").ok().and_then(|number| number.parse().ok()).unwrap_or(60);
    for seed in 0..schedules {
        let mut schedule = Schedule::new(seed);
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..60 {
                schedule.step();
            }
            schedule.end_all();
            let set = Arc::clone(&schedule.set);
            assert_eq!(schedule.processes[1].totals(&set), [totals(schedule.spent, 0)]);
        }));
        assert!(found.is_ok(), "schedule {seed}");
    }
}
