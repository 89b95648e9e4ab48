//! Limits, balance, retry, health and ledger together, on a clock of their own, against a plain model that keeps every moment
//! at which a request was sent.
//!
//! Each schedule is drawn from a seed: endpoints, their limits and those of their models, bursts, slow connects, failures, reloads, crashes, two processes
//! on one ledger, a ledger that fails, clocks that are set, days that turn, machines that start anew. A failure prints the seed;
//! `SIM_SEED=n cargo test sim` runs that schedule alone.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

use api_together::config::{
    self, Config, Environment, Format, LedgerOnError, LedgerSync, Limit, LimitKind, ModelLimits, PerLimit, Queue,
    Strategy,
};
use api_together::exchange::judge::{Terms, UsageTerms};
use api_together::exchange::{AskedModel, Attempt};
use api_together::fault::{Fault, HeldBy};
use api_together::ledger::budgets::{BudgetKind, BudgetRows, OthersReservation, ReservationRow, SpentInstead, Totals};
use api_together::ledger::claims::{Claims, Verdict};
use api_together::ledger::notices::Notice;
use api_together::ledger::places::{Place, PlaceChange, Thing, ThingKind};
use api_together::ledger::sqlite::{Opening, SqliteLedger};
use api_together::ledger::{
    AccountId, AccountSet, Allocator, CallerDraw, CallerId, Change, Client, FaultKind, Ledger, LedgerError,
    LimitedAccount, ModelList, Permit, QueuedBy, Rows, Spent, Tally,
};
use api_together::limit::{Calendar, Clock, Counts, Days, LimitReason, Limits, SPAN, Slot, Stamp, Unknown};
use api_together::request::call::Call;
use api_together::routing::admission::{self, Choice};
use api_together::routing::balance::{KeyWish, Options};
use api_together::routing::health;
use api_together::routing::health_record::HealthRecord;
use api_together::routing::pool::Pool;
use api_together::routing::retry::{self, Outcome};
use api_together::routing::router::Tried;
use fastrand::Rng;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use serde_json::json;

/// Schedules over the ledger in memory: `SIM_SCHEDULES=10000` for as many as are promised.
const SCHEDULES: u64 = 500;
/// Schedules after which the numbers below are expected.
const SCHEDULES_COUNTED: u64 = 10_000;
/// Schedules over the one in a file.
const SCHEDULES_IN_FILE: u64 = 300;
const STEPS_MAX: usize = 70;
/// Models that clients ask for, and the patterns that may have limits of their own.
const MODELS: [&str; 3] = ["m1", "m2", "n"];
const PATTERNS: [&str; 4] = ["m1", "m*", "*", "n"];
/// Callers with keys of their own, beside those that have none.
const CALLERS: [&str; 2] = ["ada", "e0"];
const ZONES: [&str; 4] = ["UTC", "America/Los_Angeles", "Asia/Kolkata", "Europe/Berlin"];

#[test]
fn no_limit_is_passed_and_no_permit_withheld() {
    let folder = tempfile::tempdir().unwrap();
    if let Ok(seed) = std::env::var("SIM_SEED") {
        let seed = seed.parse().unwrap();
        run(seed, None);
        run(seed, Some(folder.path()));
        return;
    }
    let base = fastrand::u64(..1 << 40);
    let schedules = std::env::var("SIM_SCHEDULES").map_or(SCHEDULES, |text| text.parse().unwrap());
    let mut seen = Seen::default();
    std::thread::scope(|scope| {
        let halves = [0, 1].map(|half| {
            let folder = folder.path();
            scope.spawn(move || {
                let mut seen = Seen::default();
                for number in (half..schedules).step_by(2) {
                    seen.merge(&run(base + number, None));
                }
                for number in (half..SCHEDULES_IN_FILE).step_by(2) {
                    seen.merge(&run(base + number, Some(folder)));
                }
                seen
            })
        });
        for half in halves {
            seen.merge(&half.join().unwrap());
        }
    });
    eprintln!("{schedules} schedules and {SCHEDULES_IN_FILE} in a file: {seen:?}");
    // What never happens is not tested.
    let Seen { sent, refused, failed, swapped, crashes, reboots, turned, waited, unavailable, in_two_accounts, .. } =
        seen;
    let Seen { with_a_key, refused_by_a_key, with_another_key, .. } = seen;
    for (what, often, least) in [
        ("sent", sent, 100_000),
        ("refused", refused, 10_000),
        ("failed", failed, 10_000),
        ("swapped", swapped, 1000),
        ("crashes", crashes, 1000),
        ("reboots", reboots, 500),
        ("days turned", turned, 1000),
        ("waited", waited, 1000),
        ("without the ledger", unavailable, 100),
        ("in two accounts", in_two_accounts, 10_000),
        ("with another key of an endpoint", with_another_key, 1000),
        ("sent with a key of their own", with_a_key, 10_000),
        ("refused by a key's own limits", refused_by_a_key, 10_000),
    ] {
        // In a few schedules half as many are enough.
        let least = least * schedules.min(SCHEDULES_COUNTED) / SCHEDULES_COUNTED / 2;
        assert!(often >= least, "{what}: {often} times only");
    }
}

/// Asks a zone's calendar, one for each thread.
fn with_calendar<T>(zone: &str, ask: impl FnOnce(&Calendar) -> T) -> T {
    thread_local! {
        static CALENDARS: Vec<(&'static str, Calendar)> =
            ZONES.iter().map(|zone| (*zone, Calendar::new(TimeZone::get(zone).unwrap()))).collect();
    }
    CALENDARS.with(|calendars| ask(&calendars.iter().find(|(name, _)| *name == zone).unwrap().1))
}

/// How often things happened.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    sent: u64,
    refused: u64,
    failed: u64,
    swapped: u64,
    crashes: u64,
    reboots: u64,
    turned: u64,
    waited: u64,
    unavailable: u64,
    in_two_accounts: u64,
    with_another_key: u64,
    with_a_key: u64,
    refused_by_a_key: u64,
}

impl Seen {
    fn merge(&mut self, other: &Self) {
        self.sent += other.sent;
        self.refused += other.refused;
        self.failed += other.failed;
        self.swapped += other.swapped;
        self.crashes += other.crashes;
        self.reboots += other.reboots;
        self.turned += other.turned;
        self.waited += other.waited;
        self.unavailable += other.unavailable;
        self.in_two_accounts += other.in_two_accounts;
        self.with_another_key += other.with_another_key;
        self.with_a_key += other.with_a_key;
        self.refused_by_a_key += other.refused_by_a_key;
    }
}

/// A config of an endpoint with one key, and one with five. Made once, as reading one takes longer than running a schedule.
fn template() -> Config {
    static TEMPLATE: OnceLock<Config> = OnceLock::new();
    let read = || {
        let api = json!({ "id": "e", "baseUrl": "http://127.0.0.1:9", "apiKey": "sk-x", "models": MODELS });
        let keys: Vec<_> = (0..5).map(|key| json!({ "key": format!("sk-{key}"), "name": format!("k{key}") })).collect();
        let pool = json!({ "id": "p", "baseUrl": "http://127.0.0.1:9", "apiKeys": keys });
        let text = json!({ "server": { "apiKey": "sk-y", "timezone": "UTC" }, "apis": [api, pool] }).to_string();
        let environment = Environment::fixed::<&str, &str>([]);
        config::check_str(&text, Format::Json, &environment, Path::new("")).unwrap_or_else(|e| panic!("{e}")).config
    };
    TEMPLATE.get_or_init(read).clone()
}

/// Prints the seed of a schedule that fails.
struct TellSeed(u64, bool);

impl Drop for TellSeed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "the schedule that failed is SIM_SEED={} ({})",
                self.0,
                if self.1 { "in a file" } else { "in memory" }
            );
        }
    }
}

fn run(seed: u64, folder: Option<&Path>) -> Seen {
    // Its time is the real one and stands still here: what waits, waits for the simulation's clock.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let _entered = runtime.enter();
    let _tell = TellSeed(seed, folder.is_some());
    let mut world = World::new(seed, folder);
    let steps = world.rng.usize(20..STEPS_MAX);
    for _ in 0..steps {
        world.step();
    }
    world.settle();
    world.seen()
}

/// The clocks of the machine, in milliseconds. `true_ms` never stands still or jumps; it is the model's own.
#[derive(Debug)]
struct Clocks {
    true_ms: AtomicU64,
    boot_began: AtomicU64,
    wall_off: AtomicI64,
    base: Instant,
}

impl Clocks {
    fn read(&self) -> Clock {
        let true_ms = self.true_ms.load(Ordering::Relaxed);
        let off = self.wall_off.load(Ordering::Relaxed);
        let wall_ms = true_ms.checked_add_signed(off).unwrap();
        Clock {
            now: self.base + Duration::from_millis(true_ms),
            boot: Stamp(true_ms - self.boot_began.load(Ordering::Relaxed)),
            wall: SystemTime::UNIX_EPOCH + Duration::from_millis(wall_ms),
        }
    }
}

/// What the model knows of one account: an endpoint, or some of its models.
#[derive(Debug, Default)]
struct Model {
    rpm: Option<u64>,
    rpd: Option<u64>,
    zone: String,
    /// When each request was sent, in true time.
    sent: Vec<u64>,
    by_day: HashMap<Date, u64>,
    /// The same, with what was sent within a second of the turn in both days.
    by_day_at_most: HashMap<Date, u64>,
    /// Permits that are held at this moment.
    held: u64,
}

/// True if a name matches a pattern.
fn covers(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |prefix| name.starts_with(prefix))
}

/// The accounts that a request for a model counts in.
fn accounts_of(endpoint: &config::Endpoint, model: &str) -> Vec<AccountId> {
    let closest = endpoint.model_limits.iter().filter(|(pattern, _)| covers(pattern, model));
    let closest = closest.max_by_key(|(pattern, _)| (!pattern.ends_with('*'), pattern.len()));
    let of_models = closest.map(|(pattern, limits)| AccountId::Models {
        endpoint: Arc::clone(&endpoint.id),
        models: if limits.each { model.into() } else { pattern.as_str().into() },
    });
    std::iter::once(AccountId::Endpoint(Arc::clone(&endpoint.id))).chain(of_models).collect()
}

fn limit(limit: Option<u64>) -> Limit {
    limit.map_or(Limit::Unlimited, Limit::AtMost)
}

fn number(limit: Limit) -> Option<u64> {
    u64::try_from(limit.as_number()).ok()
}

/// The looser of each two.
fn largest(one: PerLimit<Limit>, other: PerLimit<Limit>) -> PerLimit<Limit> {
    one.zip(other).map(|(one, other)| limit(number(one).and_then(|one| Some(one.max(number(other)?)))))
}

/// Limits of an account by the next config: limits may be lowered and raised, so the highest that was ever set counts.
fn account(models: &mut BTreeMap<AccountId, Model>, id: &AccountId, zone: &str, rng: &mut Rng) -> PerLimit<Limit> {
    let is_known = models.contains_key(id);
    let model = models.entry(id.clone()).or_default();
    if !is_known {
        model.rpm = rng.bool().then(|| rng.u64(1..6));
        model.rpd = (rng.u8(..) < 80).then(|| rng.u64(3..20));
        zone.clone_into(&mut model.zone);
    } else if let (Some(rpm), true) = (model.rpm, rng.u8(..) < 20) {
        model.rpm = Some(rpm + 1);
    }
    PerLimit {
        rpm: limit(model.rpm),
        rpd: limit(model.rpd),
        tpm: limit((rng.u8(..) < 20).then_some(1_000_000)),
        tpd: Limit::Unlimited,
        max_concurrent: limit((rng.u8(..) < 40).then(|| rng.u64(1..4))),
    }
}

impl Model {
    fn sent(&mut self, id: &AccountId, now: u64, wall: SystemTime) {
        self.sent.push(now);
        if let Some(rpm) = self.rpm {
            let in_a_minute = self.sent.iter().filter(|at| now - **at < 60_000).count() as u64;
            assert!(in_a_minute <= rpm, "{id}: {in_a_minute} sent within 60 s, and rpm is {rpm}");
        }
        let (days, date) = with_calendar(&self.zone, |calendar| (calendar.days(wall), calendar.date(wall)));
        for date in days.each() {
            *self.by_day_at_most.entry(date).or_default() += 1;
        }
        let on_this_day = self.by_day.entry(date).or_default();
        *on_this_day += 1;
        if let Some(rpd) = self.rpd {
            assert!(*on_this_day <= rpd, "{id}: {on_this_day} sent on {date}, and rpd is {rpd}");
        }
    }

    /// A caller's request was sent, whose permit was drawn at this moment: that is what its key's limits are about.
    fn sent_as_drawn(&mut self, id: &AccountId, drawn: u64, wall: SystemTime) {
        self.sent.push(drawn);
        self.sent.sort_unstable();
        if let Some(rpm) = self.rpm {
            let rpm = usize::try_from(rpm).unwrap();
            let is_kept = self.sent.windows(rpm + 1).all(|some| some[rpm] - some[0] >= 60_000);
            assert!(is_kept, "{id}: more than {rpm} drawn within 60 s: {:?}", self.sent);
        }
        let (days, date) = with_calendar(&self.zone, |calendar| (calendar.days(wall), calendar.date(wall)));
        for date in days.each() {
            *self.by_day_at_most.entry(date).or_default() += 1;
        }
        let on_this_day = self.by_day.entry(date).or_default();
        *on_this_day += 1;
        if let Some(rpd) = self.rpd {
            assert!(*on_this_day <= rpd, "{id}: {on_this_day} drawn on {date}, and rpd is {rpd}");
        }
    }

    fn raise(&mut self, limits: PerLimit<Limit>) {
        (self.rpm, self.rpd) = (number(limits.rpm), number(limits.rpd));
    }
}

/// Somebody was refused though by the model permits were free: they must have been given back about then.
#[derive(Debug)]
struct Excuse {
    id: AccountId,
    at: u64,
    missing: u64,
}

/// What requests report to.
#[derive(Debug, Default)]
struct Shared {
    models: BTreeMap<AccountId, Model>,
    seen: Seen,
    /// Until then the ledger may hold more than the model knows: permits of a process that was killed.
    doubtful_until: u64,
    /// The days on which it may.
    doubtful_days: Vec<Date>,
    /// Until then what was given back may not be written yet.
    failing_until: u64,
    /// What held whoever was refused just now.
    refusals: Vec<(AccountId, LimitReason)>,
    excuses: Vec<Excuse>,
    rng: Rng,
}

struct Process {
    client: Client,
    allocator: Allocator,
    ledger: Box<Watched>,
    pool: Rc<RefCell<Arc<Pool>>>,
    callers: Vec<CallerDraw>,
    requests: Vec<Pin<Box<dyn Future<Output = ()>>>>,
}

struct World {
    rng: Rng,
    clocks: Arc<Clocks>,
    shared: Rc<RefCell<Shared>>,
    disk: Disk,
    given_back: GivenBack,
    processes: Vec<Process>,
    boots: u64,
    endpoints: usize,
}

enum Disk {
    Memory(Arc<Mutex<Pages>>),
    File(std::path::PathBuf),
}

impl World {
    fn new(seed: u64, folder: Option<&Path>) -> Self {
        let mut rng = Rng::with_seed(seed);
        // Half of the schedules are near a turn of the day somewhere, a summer time's among them.
        let days = [
            "2026-03-28T22:59:00Z",
            "2026-10-25T22:59:20Z",
            "2026-11-25T07:59:10Z",
            "2026-11-24T18:29:30Z",
            "2026-11-25T12:00:00Z",
        ];
        let wall: jiff::Timestamp = rng.choice(days).unwrap().parse().unwrap();
        let clocks = Arc::new(Clocks {
            true_ms: AtomicU64::new(1_000_000),
            boot_began: AtomicU64::new(0),
            wall_off: AtomicI64::new(wall.as_millisecond() - 1_000_000),
            base: Instant::now(),
        });
        let disk = match folder {
            None => Disk::Memory(Arc::default()),
            Some(folder) => Disk::File(folder.join(format!("{seed}.db"))),
        };
        let endpoints = rng.usize(1..=4);
        let shared = Shared { rng: rng.fork(), ..Shared::default() };
        let mut world = Self {
            rng,
            clocks,
            shared: Rc::new(RefCell::new(shared)),
            disk,
            given_back: Rc::default(),
            processes: Vec::new(),
            boots: 1,
            endpoints,
        };
        world.start_process();
        world
    }

    /// A config, and what it means to the model.
    fn config(&mut self) -> Config {
        let mut config = template();
        let template = config.endpoints.remove(0);
        let keys = config.endpoints.remove(0).keys;
        let mut shared = self.shared.borrow_mut();
        for number in 0..self.endpoints {
            // Now and then one is left out, and comes back later.
            if number > 0 && self.rng.u8(..) < 30 {
                continue;
            }
            let id = AccountId::Endpoint(format!("e{number}").into());
            let zone = *self.rng.choice(&ZONES).unwrap();
            let limits = account(&mut shared.models, &id, zone, &mut self.rng);
            let zone = shared.models[&id].zone.clone();
            let mut endpoint = template.clone();
            endpoint.id = Arc::clone(id.owner());
            endpoint.limits = limits;
            for pattern in PATTERNS {
                // They come and go with the configs: what was sent without them does not count in them.
                if self.rng.u8(..) < 40 {
                    let each = pattern.ends_with('*') && self.rng.bool();
                    let matched = MODELS.iter().filter(|model| each && covers(pattern, model));
                    let names = if each { matched.copied().collect() } else { vec![pattern] };
                    let of =
                        |models: &str| AccountId::Models { endpoint: Arc::clone(id.owner()), models: models.into() };
                    let limits =
                        names.into_iter().map(|name| account(&mut shared.models, &of(name), &zone, &mut self.rng));
                    // Each of them has the same limits, so for the model the largest that any has had.
                    let limits = limits.reduce(largest).unwrap();
                    if each {
                        for model in MODELS.iter().filter(|model| covers(pattern, model)) {
                            shared.models.get_mut(&of(model)).unwrap().raise(limits);
                        }
                    }
                    endpoint.model_limits.insert(pattern.to_owned(), ModelLimits { limits, each });
                }
            }
            if self.rng.u8(..) < 100 {
                endpoint.keys = keys.clone();
                // One of them or another is left out, and they come in any order.
                let kept = self.rng.usize(1..=endpoint.keys.lanes.len());
                self.rng.shuffle(&mut endpoint.keys.lanes);
                endpoint.keys.lanes.truncate(kept);
                for lane in &mut endpoint.keys.lanes {
                    let of = AccountId::Lane { endpoint: Arc::clone(id.owner()), lane: Arc::clone(&lane.id) };
                    lane.limits = account(&mut shared.models, &of, &zone, &mut self.rng);
                    lane.weight = self.rng.u32(1..4);
                    // So that a refusal names it as its account is named.
                    lane.label = Arc::clone(&lane.id);
                }
            }
            endpoint.timezone = Some(TimeZone::get(&zone).unwrap());
            endpoint.priority = self.rng.u32(..2);
            endpoint.weight = self.rng.u32(1..4);
            config.endpoints.push(endpoint);
        }
        let strategies = [
            Strategy::Random,
            Strategy::RoundRobin,
            Strategy::LeastBusy,
            Strategy::Fastest,
            Strategy::MostLeft,
            Strategy::FillFirst,
        ];
        config.server.strategy = *self.rng.choice(&strategies).unwrap();
        config
    }

    /// The accounts of the callers' keys by the next config.
    fn callers(&mut self, client: &Client) -> Vec<CallerDraw> {
        let config = client.next_config();
        let mut shared = self.shared.borrow_mut();
        let of_caller = |name: &&str| {
            let id = AccountId::Caller((*name).into());
            let zone = *self.rng.choice(&ZONES).unwrap();
            let limits = account(&mut shared.models, &id, zone, &mut self.rng);
            let zone = TimeZone::get(&shared.models[&id].zone).unwrap();
            let of = LimitedAccount { account: client.account(&id), limits: Arc::new(Limits::in_days(limits, &zone)) };
            of.account.look_again();
            client.list_account(config, of.clone());
            CallerDraw { accounts: Arc::new(AccountSet::new(vec![of])), tokens: 0 }
        };
        CALLERS.iter().map(of_caller).collect()
    }

    fn start_process(&mut self) {
        let clocks = Arc::clone(&self.clocks);
        let client = Client::new(move || clocks.read());
        let boot = self.clocks.read().boot;
        let boot_id = self.boots.to_string();
        let ledger: Box<dyn Ledger> = match &self.disk {
            Disk::Memory(pages) => Box::new(MemoryLedger::open(pages, &boot_id)),
            Disk::File(path) => {
                let opening = Opening { boot_id: Some(&boot_id), now: boot, minute_unknown: false };
                Box::new(SqliteLedger::open(path, LedgerSync::Normal, &opening).unwrap())
            }
        };
        let pool = Pool::new(self.config(), client.clone(), None).unwrap();
        let callers = self.callers(&client);
        let allocator = Allocator::new(client.clone(), LedgerOnError::Deny, Arc::new(Tally::default()));
        let pool = Rc::new(RefCell::new(Arc::new(pool)));
        let (clocks, given_back) = (Arc::clone(&self.clocks), Rc::clone(&self.given_back));
        let ledger = Watched { inner: ledger, clocks, given_back, calls_left: None };
        let ledger = Box::new(ledger);
        self.processes.push(Process { client, allocator, ledger, pool, callers, requests: Vec::new() });
    }

    fn step(&mut self) {
        let wait = match self.rng.u8(..) {
            0..60 => 0,
            60..170 => self.rng.u64(..120),
            170..235 => self.rng.u64(..3000),
            _ => self.rng.u64(..62_000),
        };
        // A thread that is slow to come takes its time in pieces, so that permits grow old on the way.
        self.pass(wait);
        match self.rng.u8(..) {
            0..140 => self.burst(),
            140..160 => self.reload(),
            160..170 => self.kill(),
            170..180 if self.processes.len() < 2 => self.start_process(),
            180..190 => self.set_clock(),
            190..195 => self.reboot(),
            195..202 => self.fail_ledger(),
            202..210 => self.leave(),
            _ => {}
        }
        if self.rng.u8(..) < 190 {
            self.serve();
        }
    }

    /// Time passes, in steps that are short while anything waits, as the thread would come in between.
    fn pass(&mut self, wait: u64) {
        let mut left = wait;
        while left > 0 {
            let days = self.days();
            let piece = left.min(self.rng.u64(1..=900));
            self.clocks.true_ms.fetch_add(piece, Ordering::Relaxed);
            left -= piece;
            self.shared.borrow_mut().seen.turned += u64::from(self.days() != days);
            if left > 0 || self.rng.bool() {
                self.serve();
            }
        }
    }

    fn seen(&self) -> Seen {
        self.shared.borrow().seen
    }

    /// Those that an attempt counts in at this moment, in all zones: near their turn both.
    fn days(&self) -> Vec<Date> {
        let wall = self.clocks.read().wall;
        let days = |zone: &&str| with_calendar(zone, |calendar| calendar.days(wall)).each().collect::<Vec<_>>();
        ZONES.iter().flat_map(days).collect()
    }

    /// The allocators serve whoever asks, and the requests go on.
    fn serve(&mut self) {
        for process in &mut self.processes {
            // Requests come and go on one after the other, and several groups are needed for one that is retried.
            for _ in 0..3 {
                process.go_on();
                process.allocator.serve(Some(process.ledger.as_mut())).unwrap();
            }
            process.go_on();
        }
        self.check_refusals();
    }

    /// Once everybody knows what became of the group in which they were served.
    fn check_refusals(&self) {
        let mut shared = self.shared.borrow_mut();
        let given_back = self.given_back.borrow();
        // What comes back while the disk is full is written later.
        let is_failing = shared.failing_until > self.clocks.true_ms.load(Ordering::Relaxed);
        let due = if is_failing { Vec::new() } else { std::mem::take(&mut shared.excuses) };
        for Excuse { id, at, missing } in due {
            let back = given_back.iter().filter(|(other, when)| *other == id && *when + 1000 > at).count();
            assert!(back as u64 >= missing, "{id}: refused at {at} though {missing} were free, and {back} came back");
        }
        for (id, hold) in std::mem::take(&mut shared.refusals) {
            let missing = shared.free_by_the_model(&id, hold, &self.clocks);
            if missing > 0 {
                shared.excuses.push(Excuse { id, at: self.clocks.true_ms.load(Ordering::Relaxed), missing });
            }
        }
    }

    fn burst(&mut self) {
        let at = self.rng.usize(..self.processes.len());
        let count = self.rng.usize(1..12);
        for _ in 0..count {
            let process = &mut self.processes[at];
            let pool = Arc::clone(&process.pool.borrow());
            let queue = (self.rng.u8(..) < 40).then(|| Queue {
                wait_max: Duration::from_millis(self.rng.u64(1..70_000)),
                requests_max: 5,
                requests_per_key_max: 3,
            });
            let model = *self.rng.choice(&MODELS).unwrap();
            let caller = self.rng.usize(..2 * CALLERS.len());
            let own = process.callers.get(caller).cloned();
            let queued_by = QueuedBy { caller: caller as u64, weight: self.rng.u32(1..4) };
            let own = own.filter(|own| own.accounts.is_limited());
            let request =
                request(pool, (model, own), (queue, queued_by), Arc::clone(&self.clocks), Rc::clone(&self.shared));
            process.requests.push(Box::pin(request));
        }
    }

    fn reload(&mut self) {
        let config = self.config();
        let at = self.rng.usize(..self.processes.len());
        let client = self.processes[at].client.clone();
        self.processes[at].callers = self.callers(&client);
        let process = &self.processes[at];
        let before = Arc::clone(&process.pool.borrow());
        let pool = Pool::new(config, process.client.clone(), Some(&before)).unwrap();
        *process.pool.borrow_mut() = Arc::new(pool);
    }

    /// Clients go away.
    fn leave(&mut self) {
        for process in &mut self.processes {
            let keep = self.rng.usize(..=process.requests.len());
            process.requests.truncate(keep);
        }
    }

    /// A process ends where it stands: nothing in its memory is written.
    fn kill(&mut self) {
        let at = self.rng.usize(..self.processes.len());
        let process = self.processes.swap_remove(at);
        self.doubt();
        let Process { allocator, ledger, requests, pool, callers, client } = process;
        drop((allocator, ledger));
        // What the requests give back goes into an inbox that nobody reads any more.
        drop((requests, pool, callers, client));
        self.shared.borrow_mut().seen.crashes += 1;
        if self.processes.is_empty() {
            self.start_process();
        }
    }

    /// From now on the ledger may count attempts that were never sent.
    fn doubt(&mut self) {
        let mut shared = self.shared.borrow_mut();
        shared.doubtful_until = self.clocks.true_ms.load(Ordering::Relaxed) + 62_000;
        // What was to come back may have died with its process.
        shared.excuses.clear();
        let days = self.days();
        shared.doubtful_days.extend(days);
    }

    fn reboot(&mut self) {
        while let Some(process) = self.processes.pop() {
            drop((process.allocator, process.ledger, process.requests));
        }
        self.doubt();
        // The machine is down for a while, and comes up with another clock.
        let down = self.rng.u64(100..40_000);
        let now = self.clocks.true_ms.fetch_add(down, Ordering::Relaxed) + down;
        let uptime = self.rng.u64(..20_000).min(down);
        self.clocks.boot_began.store(now - uptime, Ordering::Relaxed);
        self.boots += 1;
        // What was not on the disk yet is gone; the day's counts are taken to be there, as `ledgerSync` can have it.
        if let Disk::Memory(pages) = &self.disk {
            pages.lock().unwrap().minutes.retain(|_, _| self.rng.bool());
        }
        self.shared.borrow_mut().seen.reboots += 1;
        self.doubt();
        self.start_process();
    }

    /// Back or forward, by up to two hours.
    fn set_clock(&mut self) {
        let by = self.rng.i64(-7_200_000..7_200_000);
        self.clocks.wall_off.fetch_add(by, Ordering::Relaxed);
        self.doubt();
    }

    /// The disk is full for one group.
    fn fail_ledger(&mut self) {
        let at = self.rng.usize(..self.processes.len());
        let process = &mut self.processes[at];
        process.go_on();
        process.ledger.calls_left = Some(self.rng.u32(..6));
        // What it could not write comes a little later. It may well have had nothing to write.
        self.shared.borrow_mut().failing_until = self.clocks.true_ms.load(Ordering::Relaxed) + 1000;
        process.allocator.serve(Some(process.ledger.as_mut())).map(drop).unwrap_or_default();
        process.ledger.calls_left = None;
        process.go_on();
        self.check_refusals();
    }

    /// At the end: the ledger counts at least what was sent.
    fn settle(&mut self) {
        self.serve();
        self.serve();
        let clock = self.clocks.read();
        let now = self.clocks.true_ms.load(Ordering::Relaxed);
        let booted = self.clocks.boot_began.load(Ordering::Relaxed);
        let ledger = self.processes[0].ledger.as_mut();
        ledger.begin().unwrap();
        for (id, model) in &self.shared.borrow().models {
            if model.rpm.is_none() && model.rpd.is_none() {
                continue;
            }
            let oldest = Slot::oldest_that_counts(clock.boot);
            let counted: u64 = ledger.minute(id, oldest).unwrap().iter().map(|(_, counts)| counts.attempts).sum();
            let sent = model.sent.iter().filter(|at| **at + 60_000 > now && **at > booted).count();
            assert!(counted >= sent as u64, "{id}: the ledger counts {counted} of {sent} that were sent");
            for (day, sent) in &model.by_day {
                let counted = ledger.day(id, *day).unwrap().attempts;
                assert!(counted >= *sent, "{id}, {day}: the ledger counts {counted} of {sent} that were sent");
            }
        }
        ledger.roll_back();
    }
}

impl Process {
    fn go_on(&mut self) {
        let mut context = Context::from_waker(Waker::noop());
        self.requests.retain_mut(|request| request.as_mut().poll(&mut context).is_pending());
    }
}

/// Ready once the simulation's clock has come there.
async fn sleep(clocks: &Clocks, wait_ms: u64) {
    let until = clocks.true_ms.load(Ordering::Relaxed) + wait_ms;
    std::future::poll_fn(
        |_| {
            if clocks.true_ms.load(Ordering::Relaxed) >= until { Poll::Ready(()) } else { Poll::Pending }
        },
    )
    .await;
}

/// Counts a permit as held for the model, until its request is sent or given up.
struct HeldPermit {
    shared: Rc<RefCell<Shared>>,
    accounts: Vec<AccountId>,
}

impl Drop for HeldPermit {
    fn drop(&mut self) {
        let mut shared = self.shared.borrow_mut();
        for id in &self.accounts {
            shared.models.get_mut(id).unwrap().held -= 1;
        }
    }
}

/// The permit of a caller's own limits, for as long as the request lasts.
struct OwnPermit {
    permit: Permit,
    drawn: (u64, SystemTime),
    /// Until its first attempt is sent.
    held: Option<HeldPermit>,
    shared: Rc<RefCell<Shared>>,
}

impl OwnPermit {
    fn new(permit: Permit, clocks: &Clocks, shared: &Rc<RefCell<Shared>>) -> Self {
        let accounts: Vec<AccountId> = permit.accounts().accounts().iter().map(|of| of.account.id().clone()).collect();
        for id in &accounts {
            shared.borrow_mut().models.get_mut(id).unwrap().held += 1;
        }
        let drawn = (clocks.true_ms.load(Ordering::Relaxed), clocks.read().wall);
        let held = Some(HeldPermit { shared: Rc::clone(shared), accounts });
        Self { permit, drawn, held, shared: Rc::clone(shared) }
    }

    fn sent(&mut self) {
        let Some(held) = self.held.take() else { return };
        let accounts = held.accounts.clone();
        drop(held);
        self.permit.spend();
        let mut shared = self.shared.borrow_mut();
        shared.seen.with_a_key += 1;
        for id in accounts {
            shared.models.get_mut(&id).unwrap().sent_as_drawn(&id, self.drawn.0, self.drawn.1);
        }
    }
}

/// One client's request, as the proxy runs it.
async fn request(
    pool: Arc<Pool>,
    (model, own): (&'static str, Option<CallerDraw>),
    (queue, queued_by): (Option<Queue>, QueuedBy),
    clocks: Arc<Clocks>,
    shared: Rc<RefCell<Shared>>,
) {
    let Some(candidates) = pool.router.find(model) else { return };
    let mut tried = Vec::new();
    let mut own_permit: Option<OwnPermit> = None;
    let caller = CallerId(shared.borrow_mut().rng.u64(..3));
    let began = clocks.true_ms.load(Ordering::Relaxed);
    let number_of_session = Some(shared.borrow_mut().rng.u64(..)).filter(|number| number % 3 == 0);
    loop {
        let queue = queue.filter(|_| tried.is_empty());
        let admission = admission::Request {
            budget: None,
            options: Options {
                pool: &pool,
                candidates,
                model: Some(model),
                shape: None,
                tried: &tried,
                preferred: None,
                keys: KeyWish { session: number_of_session, organizations: &[] },
            },
            queue,
            queued_by,
            caller,
            own: own.as_ref().filter(|_| own_permit.is_none()),
            fallbacks: &[],
        };
        let mut choice = match admission::admit(admission).await {
            Ok(choice) => choice,
            Err(Fault::LimitsReached { held, wait }) => {
                let mut shared = shared.borrow_mut();
                shared.seen.refused += 1;
                let waited = clocks.true_ms.load(Ordering::Relaxed) - began;
                shared.seen.waited += u64::from(queue.is_some() && waited > 0);
                assert!(wait > Duration::ZERO, "refused, and told to come at once");
                let limits = held.into_iter().filter(|held| held.reason != LimitReason::CoolingDown);
                let account = |held: &HeldBy| match (Arc::clone(&held.endpoint), held.models.clone(), held.key.clone())
                {
                    (endpoint, None, None) => AccountId::Endpoint(endpoint),
                    (endpoint, Some(models), _) => AccountId::Models { endpoint, models },
                    (endpoint, None, Some(lane)) => AccountId::Lane { endpoint, lane },
                };
                shared.refusals.extend(limits.map(|held| (account(&held), held.reason)));
                return;
            }
            Err(Fault::KeyLimitsReached { name, reason, wait, .. }) => {
                let mut shared = shared.borrow_mut();
                shared.seen.refused_by_a_key += 1;
                assert!(wait > Duration::ZERO, "refused, and told to come at once");
                shared.refusals.push((AccountId::Caller(name.into()), reason));
                return;
            }
            Err(Fault::LedgerUnavailable) => {
                shared.borrow_mut().seen.unavailable += 1;
                return;
            }
            Err(Fault::NoneAvailable) => return,
            Err(fault) => panic!("{fault:?}"),
        };
        if let Some(permit) = choice.permit.take_caller() {
            own_permit = Some(OwnPermit::new(permit, &clocks, &shared));
        }
        assert_eq!(own.is_some(), own_permit.is_some(), "a request with a limited key has a permit of it");
        let asked = (model, own_permit.as_mut());
        let outcome = attempt(&pool, asked, choice, &mut tried, candidates, &clocks, &shared).await;
        let attempts = u32::try_from(tried.len()).unwrap();
        let is_retryable = outcome.is_retryable(&pool.server.retry);
        if !is_retryable || !retry::may_begin(&pool.server.retry, attempts, Duration::ZERO) {
            return;
        }
    }
}

async fn attempt(
    pool: &Pool,
    (model, own): (&str, Option<&mut OwnPermit>),
    choice: Choice,
    tried: &mut Vec<Tried>,
    candidates: &api_together::routing::router::Candidates,
    clocks: &Arc<Clocks>,
    shared: &Rc<RefCell<Shared>>,
) -> Outcome {
    let candidate = &candidates.list()[choice.candidate];
    let endpoint = &pool.endpoints[candidate.endpoint];
    let is_first_key = !tried.iter().any(|tried| tried.is(candidate));
    assert!(endpoint.lanes.is_pool() || is_first_key, "asked twice with one key");
    let is_same = tried.iter().any(|tried| tried.is(candidate) && tried.lane == choice.lane);
    assert!(!is_same, "asked twice with the same key");
    tried.push(candidate.tried(choice.lane, !endpoint.lanes.is_pool()));
    let lane = &endpoint.lanes.list()[choice.lane];
    let mut accounts = accounts_of(&endpoint.config, model);
    accounts.extend(lane.limited().map(|of| of.account.id().clone()));
    let trial_in = |record: &Arc<HealthRecord>| choice.trial.as_ref().and_then(|trial| trial.scope_in(record));
    let trial = trial_in(&endpoint.live.health);
    let lane_trial = lane.live().and_then(|live| trial_in(&live.health));
    let (record, lane_record) = (endpoint.live.health.number(), lane.live().map_or(0, |live| live.health.number()));
    let is_of_pool = endpoint.lanes.is_pool();
    for id in &accounts {
        shared.borrow_mut().models.get_mut(id).unwrap().held += 1;
    }
    let held = HeldPermit { shared: Rc::clone(shared), accounts: accounts.clone() };
    let terms = Terms {
        call: Call::Completion,
        streams: false,
        expects_body: true,
        more: true,
        more_keys: false,
        more_if_empty: true,
        searches: false,
        usage: UsageTerms::default(),
    };
    let asked = AskedModel { mapped: None, named: Some(model.into()), in_config: true };
    let began = pool.clock().now;
    let mut attempt = Attempt::new(endpoint, asked.clone(), terms, choice, &pool.server, began);
    let drawn: Vec<AccountId> = attempt.accounts().accounts().iter().map(|of| of.account.id().clone()).collect();
    assert_eq!(drawn, accounts, "{model}");
    let (connect_ms, fate, answer_ms) = {
        let rng = &mut shared.borrow_mut().rng;
        let connect_ms = if rng.u8(..) < 180 { 0 } else { rng.u64(1..2000) };
        (connect_ms, rng.u8(..), rng.u64(..5000))
    };
    sleep(clocks, connect_ms).await;
    let outcome = if fate < 20 {
        Outcome::ConnectFailed
    } else {
        let was_stale = connect_ms >= 125;
        if attempt.send(&pool.ledger).await.is_ok() {
            drop(held);
            shared.borrow_mut().seen.swapped += u64::from(was_stale);
            shared.borrow_mut().sent(&accounts, clocks);
            if let Some(own) = own {
                own.sent();
            }
            sleep(clocks, answer_ms).await;
            match fate {
                20..50 => Outcome::of_status(500, None),
                50..60 => Outcome::of_status(429, (fate < 55).then_some(Duration::from_secs(3))),
                60..70 => Outcome::Broken,
                _ => Outcome::of_status(200, None),
            }
        } else {
            Outcome::LimitReached
        }
    };
    shared.borrow_mut().seen.failed += u64::from(outcome.is_retryable(&pool.server.retry));
    let effect = outcome.effect(|| Duration::from_hours(1));
    let (now, breaker) = (|| clocks.read().now, &pool.server.breaker);
    let is_keys = is_of_pool && outcome.is_of_key();
    if let Some(live) = lane.live() {
        let well = matches!(effect, health::Effect::Success);
        let effect = if is_keys || well { effect } else { health::Effect::Neutral };
        live.learn((model, None), &health::Seen { effect, began, trial: lane_trial }, lane_record, now, breaker);
        shared.borrow_mut().seen.with_another_key += u64::from(!is_first_key);
    }
    let effect = if is_keys { health::Effect::Answers } else { effect };
    endpoint.live.learn(asked.name(), &health::Seen { effect, began, trial }, record, now, breaker);
    if let Some(tried) = tried.last_mut() {
        tried.is_over |= !outcome.may_try_another_key() && outcome != Outcome::LimitReached;
    }
    outcome
}

impl Shared {
    /// The header of a request goes out.
    fn sent(&mut self, accounts: &[AccountId], clocks: &Clocks) {
        self.seen.sent += 1;
        self.seen.in_two_accounts += u64::from(accounts.len() > 1);
        let (now, wall) = (clocks.true_ms.load(Ordering::Relaxed), clocks.read().wall);
        for id in accounts {
            self.models.get_mut(id).unwrap().sent(id, now, wall);
        }
    }

    /// Somebody was refused because of this limit: how many permits were free by the model. None, usually.
    fn free_by_the_model(&self, id: &AccountId, hold: LimitReason, clocks: &Clocks) -> u64 {
        let now = clocks.true_ms.load(Ordering::Relaxed);
        let model = &self.models[id];
        let clock = clocks.read();
        if self.failing_until > now {
            return 0;
        }
        match hold {
            LimitReason::Full(LimitKind::Rpm, rpm) if self.doubtful_until <= now => {
                let counting = model.sent.iter().filter(|at| **at + 60_500 > now).count() as u64;
                rpm.saturating_sub(counting + model.held)
            }
            LimitReason::Full(LimitKind::Rpd, rpd) => {
                let days = with_calendar(&model.zone, |calendar| calendar.days(clock.wall));
                let most = days.each().map(|date| model.by_day_at_most.get(&date).copied().unwrap_or(0)).max().unwrap();
                let is_doubtful = days.each().any(|date| self.doubtful_days.contains(&date)) || days.first != days.last;
                if is_doubtful { 0 } else { rpd.saturating_sub(most + model.held) }
            }
            LimitReason::MinuteUnknown => {
                assert!(clock.boot < Stamp::default() + SPAN, "{id}: unknown for no reason");
                0
            }
            _ => 0,
        }
    }
}

/// A ledger that is watched for what comes back to it, and whose disk is full when the simulation says so.
struct Watched {
    inner: Box<dyn Ledger>,
    clocks: Arc<Clocks>,
    given_back: GivenBack,
    /// After so many calls the disk is full.
    calls_left: Option<u32>,
}

impl Watched {
    fn call(&mut self) -> Result<(), LedgerError> {
        match &mut self.calls_left {
            None => Ok(()),
            Some(0) => Err(LedgerError { kind: FaultKind::Unusable, message: "the disk is full".into() }),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }
}

/// Whose permits came back, and when, in true time.
type GivenBack = Rc<RefCell<Vec<(AccountId, u64)>>>;

impl Ledger for Watched {
    fn begin(&mut self) -> Result<u64, LedgerError> {
        self.call()?;
        self.inner.begin()
    }

    fn minute(&mut self, account: &AccountId, oldest: Slot) -> Result<Vec<(Slot, Counts)>, LedgerError> {
        self.call()?;
        self.inner.minute(account, oldest)
    }

    fn day(&mut self, account: &AccountId, date: Date) -> Result<Counts, LedgerError> {
        self.call()?;
        self.inner.day(account, date)
    }

    fn others_in_flight(&mut self, account: &AccountId) -> Result<u64, LedgerError> {
        self.inner.others_in_flight(account)
    }

    fn set_in_flight(&mut self, account: &AccountId, own: u64) -> Result<(), LedgerError> {
        self.call()?;
        self.inner.set_in_flight(account, own)
    }

    fn add(&mut self, account: &AccountId, slot: Slot, days: Days, change: Change) -> Result<(), LedgerError> {
        self.call()?;
        let now = self.clocks.true_ms.load(Ordering::Relaxed);
        for _ in change.attempts..0 {
            self.given_back.borrow_mut().push((account.clone(), now));
        }
        self.inner.add(account, slot, days, change)
    }

    fn add_tokens(&mut self, spent: &Spent) -> Result<(), LedgerError> {
        self.call()?;
        self.inner.add_tokens(spent)
    }

    fn reset_tokens(&mut self, endpoint: Option<&str>) -> Result<(), LedgerError> {
        self.inner.reset_tokens(endpoint)
    }

    fn forget(&mut self, account: &AccountId, oldest: Slot) -> Result<(), LedgerError> {
        self.inner.forget(account, oldest)
    }

    fn forget_tokens(&mut self, hours: i64, days: i64) -> Result<(), LedgerError> {
        self.inner.forget_tokens(hours, days)
    }

    fn forget_days(&mut self, account: &AccountId, before: Date) -> Result<(), LedgerError> {
        self.inner.forget_days(account, before)
    }

    fn accounts_of_models(&mut self) -> Result<Vec<AccountId>, LedgerError> {
        self.inner.accounts_of_models()
    }

    fn places(&mut self, things: &[Thing], now: i64) -> Result<Vec<Vec<Place>>, LedgerError> {
        self.inner.places(things, now)
    }

    fn change_place(&mut self, change: &PlaceChange) -> Result<(), LedgerError> {
        self.inner.change_place(change)
    }

    fn forget_places(&mut self, kind: ThingKind, now: i64, surplus: bool) -> Result<bool, LedgerError> {
        self.inner.forget_places(kind, now, surplus)
    }

    fn keep_models(&mut self, endpoint: &str, list: &str) -> Result<(), LedgerError> {
        self.inner.keep_models(endpoint, list)
    }

    fn model_lists(&mut self) -> Result<Vec<ModelList>, LedgerError> {
        self.inner.model_lists()
    }

    fn is_exclusive(&self) -> bool {
        self.inner.is_exclusive()
    }

    fn trusted_since(&self) -> u64 {
        self.inner.trusted_since()
    }

    fn fetch(&mut self, rows: &Rows) -> Result<(), LedgerError> {
        self.call()?;
        self.inner.fetch(rows)
    }

    fn commit(&mut self, claims: &Claims, rows: &Rows) -> Result<Verdict, LedgerError> {
        // Each of its steps may fail.
        let verdict = claims.write(self)?;
        self.call()?;
        self.inner.commit(&Claims::default(), rows)?;
        Ok(verdict)
    }

    fn tell(&mut self, notice: &Notice) -> Result<(), LedgerError> {
        self.inner.tell(notice)
    }

    fn take_heard(&mut self) -> Vec<Notice> {
        self.inner.take_heard()
    }

    fn touch(&mut self) -> Result<(), LedgerError> {
        self.inner.touch()
    }

    fn roll_back(&mut self) {
        self.inner.roll_back();
    }

    fn unknown(&self) -> Unknown {
        self.inner.unknown()
    }
}

/// What a disk holds.
#[derive(Clone, Debug, Default)]
struct Pages {
    /// By key, kind and period: spent and reserved.
    budgets: BTreeMap<(Arc<str>, BudgetKind, i64), (i64, i64)>,
    reservations: BTreeMap<(i64, i64, BudgetKind), ReservationRow>,
    heard: BTreeMap<i64, Stamp>,
    version: u64,
    boot_id: String,
    unknown_until: Stamp,
    minutes: BTreeMap<(AccountId, Slot), Counts>,
    days: BTreeMap<(AccountId, Date), Counts>,
}

/// A ledger in memory, which outlives the processes that write it.
struct MemoryLedger {
    pages: Arc<Mutex<Pages>>,
    group: Option<Pages>,
    unknown_until: Stamp,
    /// The version after this one's own last commit, and how often another one was found.
    own: u64,
    generation: u64,
}

impl MemoryLedger {
    fn open(pages: &Arc<Mutex<Pages>>, boot_id: &str) -> Self {
        let mut disk = pages.lock().unwrap();
        if disk.boot_id != boot_id {
            // The first boot of all left nothing behind.
            disk.unknown_until = if disk.boot_id.is_empty() { Stamp::default() } else { Stamp::default() + SPAN };
            boot_id.clone_into(&mut disk.boot_id);
            disk.minutes.clear();
            disk.heard.clear();
            disk.version += 1;
        }
        let unknown_until = disk.unknown_until;
        drop(disk);
        Self { pages: Arc::clone(pages), group: None, unknown_until, own: 0, generation: 0 }
    }

    fn group(&mut self) -> &mut Pages {
        self.group.as_mut().expect("no group has begun")
    }
}

fn change(counts: &mut Counts, change: Change) {
    counts.attempts = counts.attempts.checked_add_signed(change.attempts).expect("fewer than none");
    counts.tokens = counts.tokens.checked_add_signed(change.tokens).expect("fewer than none");
}

impl Ledger for MemoryLedger {
    fn begin(&mut self) -> Result<u64, LedgerError> {
        let pages = self.pages.lock().unwrap().clone();
        if pages.version != self.own {
            self.own = pages.version;
            self.generation += 1;
        }
        assert!(self.group.replace(pages).is_none(), "two groups at once");
        Ok(self.generation)
    }

    fn minute(&mut self, account: &AccountId, oldest: Slot) -> Result<Vec<(Slot, Counts)>, LedgerError> {
        let minutes = self.group().minutes.iter().filter(|((id, slot), _)| id == account && *slot >= oldest);
        Ok(minutes.map(|((_, slot), counts)| (*slot, *counts)).collect())
    }

    fn day(&mut self, account: &AccountId, date: Date) -> Result<Counts, LedgerError> {
        Ok(self.group().days.get(&(account.clone(), date)).copied().unwrap_or_default())
    }

    fn others_in_flight(&mut self, _account: &AccountId) -> Result<u64, LedgerError> {
        Ok(0)
    }

    fn set_in_flight(&mut self, _account: &AccountId, _own: u64) -> Result<(), LedgerError> {
        Ok(())
    }

    fn add(&mut self, account: &AccountId, slot: Slot, days: Days, by: Change) -> Result<(), LedgerError> {
        let group = self.group();
        if by.attempts >= 0 || group.minutes.contains_key(&(account.clone(), slot)) {
            change(group.minutes.entry((account.clone(), slot)).or_default(), by);
        }
        for date in days.each() {
            change(group.days.entry((account.clone(), date)).or_default(), by);
        }
        Ok(())
    }

    fn add_tokens(&mut self, _spent: &Spent) -> Result<(), LedgerError> {
        Ok(())
    }

    fn reset_tokens(&mut self, _endpoint: Option<&str>) -> Result<(), LedgerError> {
        Ok(())
    }

    fn forget(&mut self, account: &AccountId, oldest: Slot) -> Result<(), LedgerError> {
        self.group().minutes.retain(|(id, slot), _| id != account || *slot >= oldest);
        Ok(())
    }

    fn forget_tokens(&mut self, _hours: i64, _days: i64) -> Result<(), LedgerError> {
        Ok(())
    }

    fn forget_days(&mut self, account: &AccountId, before: Date) -> Result<(), LedgerError> {
        self.group().days.retain(|(id, day), _| id != account || *day >= before);
        Ok(())
    }

    fn accounts_of_models(&mut self) -> Result<Vec<AccountId>, LedgerError> {
        Ok(Vec::new())
    }

    fn places(&mut self, things: &[Thing], _now: i64) -> Result<Vec<Vec<Place>>, LedgerError> {
        Ok(vec![Vec::new(); things.len()])
    }

    fn change_place(&mut self, _change: &PlaceChange) -> Result<(), LedgerError> {
        Ok(())
    }

    fn forget_places(&mut self, _kind: ThingKind, _now: i64, _surplus: bool) -> Result<bool, LedgerError> {
        Ok(false)
    }

    fn keep_models(&mut self, _endpoint: &str, _list: &str) -> Result<(), LedgerError> {
        Ok(())
    }

    fn model_lists(&mut self) -> Result<Vec<ModelList>, LedgerError> {
        Ok(Vec::new())
    }

    fn is_exclusive(&self) -> bool {
        true
    }

    fn trusted_since(&self) -> u64 {
        u64::MAX
    }

    fn fetch(&mut self, _rows: &Rows) -> Result<(), LedgerError> {
        Ok(())
    }

    fn commit(&mut self, claims: &Claims, _rows: &Rows) -> Result<Verdict, LedgerError> {
        let verdict = claims.write(self)?;
        let mut group = self.group.take().expect("no group has begun");
        group.version += 1;
        self.own = group.version;
        *self.pages.lock().unwrap() = group;
        Ok(verdict)
    }

    fn tell(&mut self, _notice: &Notice) -> Result<(), LedgerError> {
        Ok(())
    }

    fn take_heard(&mut self) -> Vec<Notice> {
        Vec::new()
    }

    fn touch(&mut self) -> Result<(), LedgerError> {
        Ok(())
    }

    fn roll_back(&mut self) {
        self.group = None;
    }

    fn unknown(&self) -> Unknown {
        Unknown { minute_until: self.unknown_until, ..Unknown::default() }
    }
}

impl BudgetRows for Watched {
    fn budget(&mut self, key: &str, kind: BudgetKind, period: i64) -> Result<Totals, LedgerError> {
        self.call()?;
        self.inner.budget(key, kind, period)
    }

    fn latest_period(&mut self, key: &str, kind: BudgetKind, now: i64) -> Result<Option<i64>, LedgerError> {
        self.call()?;
        self.inner.latest_period(key, kind, now)
    }

    fn change_budget(&mut self, row: &ReservationRow, spent: i64, reserved: i64) -> Result<(), LedgerError> {
        self.call()?;
        self.inner.change_budget(row, spent, reserved)
    }

    fn put_reservation(&mut self, owner: i64, id: i64, row: &ReservationRow) -> Result<(), LedgerError> {
        self.call()?;
        self.inner.put_reservation(owner, id, row)
    }

    fn grow_reservation(&mut self, owner: i64, id: i64, row: &ReservationRow) -> Result<bool, LedgerError> {
        self.call()?;
        self.inner.grow_reservation(owner, id, row)
    }

    fn settle_reservation(
        &mut self,
        owner: i64,
        id: i64,
        row: &ReservationRow,
        spent: SpentInstead,
    ) -> Result<bool, LedgerError> {
        self.call()?;
        self.inner.settle_reservation(owner, id, row, spent)
    }

    fn hear(&mut self, owner: i64, now: Stamp) -> Result<(), LedgerError> {
        self.call()?;
        self.inner.hear(owner, now)
    }

    fn has_others_reservations(&mut self, owner: i64) -> Result<bool, LedgerError> {
        self.call()?;
        self.inner.has_others_reservations(owner)
    }

    fn dead_reservations(&mut self, owner: i64, since: Stamp) -> Result<Vec<OthersReservation>, LedgerError> {
        self.call()?;
        self.inner.dead_reservations(owner, since)
    }

    fn reconcile_budgets(&mut self) -> Result<usize, LedgerError> {
        self.call()?;
        self.inner.reconcile_budgets()
    }

    fn forget_budgets(&mut self, since: Stamp, now: i64) -> Result<(), LedgerError> {
        self.inner.forget_budgets(since, now)
    }
}

impl BudgetRows for MemoryLedger {
    fn budget(&mut self, key: &str, kind: BudgetKind, period: i64) -> Result<Totals, LedgerError> {
        let (spent, reserved) = self.group().budgets.get(&(key.into(), kind, period)).copied().unwrap_or_default();
        let [spent, reserved] = [spent, reserved].map(|amount| u64::try_from(amount).expect("less than nothing"));
        Ok(Totals { spent, reserved })
    }

    fn latest_period(&mut self, key: &str, kind: BudgetKind, now: i64) -> Result<Option<i64>, LedgerError> {
        let of_kind = self.group().budgets.keys().filter(|(of, its_kind, _)| **of == *key && *its_kind == kind);
        Ok(of_kind.map(|(_, _, period)| *period).filter(|period| *period <= now).max())
    }

    fn change_budget(&mut self, row: &ReservationRow, spent: i64, reserved: i64) -> Result<(), LedgerError> {
        let id = (Arc::clone(&row.key), row.kind, row.period.number);
        let totals = self.group().budgets.entry(id).or_default();
        *totals = (totals.0 + spent, totals.1 + reserved);
        assert!(totals.0 >= 0 && totals.1 >= 0, "less than nothing is spent or reserved: {totals:?}");
        Ok(())
    }

    fn put_reservation(&mut self, owner: i64, id: i64, row: &ReservationRow) -> Result<(), LedgerError> {
        self.group().reservations.insert((owner, id, row.kind), row.clone());
        Ok(())
    }

    fn grow_reservation(&mut self, owner: i64, id: i64, row: &ReservationRow) -> Result<bool, LedgerError> {
        let part = self.group().reservations.get_mut(&(owner, id, row.kind));
        Ok(part.map(|part| *part = row.clone()).is_some())
    }

    fn settle_reservation(
        &mut self,
        owner: i64,
        id: i64,
        row: &ReservationRow,
        spent: SpentInstead,
    ) -> Result<bool, LedgerError> {
        let is_there = self.group().reservations.remove(&(owner, id, row.kind)).is_some();
        let reserved = i64::try_from(row.amount).unwrap();
        let (spent, reserved) = if is_there { (spent.of_it, -reserved) } else { (spent.if_gone, 0) };
        self.change_budget(row, spent, reserved)?;
        Ok(is_there)
    }

    fn hear(&mut self, owner: i64, now: Stamp) -> Result<(), LedgerError> {
        self.group().heard.insert(owner, now);
        Ok(())
    }

    fn has_others_reservations(&mut self, owner: i64) -> Result<bool, LedgerError> {
        Ok(self.group().reservations.keys().any(|(of, ..)| *of != owner))
    }

    fn dead_reservations(&mut self, owner: i64, since: Stamp) -> Result<Vec<OthersReservation>, LedgerError> {
        let group = self.group();
        let is_dead = |of: &i64| *of != owner && group.heard.get(of).is_none_or(|heard| *heard < since);
        let dead = group.reservations.iter().filter(|((of, ..), _)| is_dead(of));
        let part = |((owner, id, _), row): (&(i64, i64, BudgetKind), &ReservationRow)| OthersReservation {
            owner: *owner,
            id: *id,
            row: row.clone(),
        };
        Ok(dead.map(part).collect())
    }

    fn reconcile_budgets(&mut self) -> Result<usize, LedgerError> {
        let group = self.group();
        for ((key, kind, period), (_, reserved)) in &group.budgets {
            let of_it = |row: &&ReservationRow| row.key == *key && row.kind == *kind && row.period.number == *period;
            let sum: u64 = group.reservations.values().filter(of_it).map(|row| row.amount).sum();
            assert_eq!(*reserved, i64::try_from(sum).unwrap(), "reserved of {key} {kind}, and its reservations");
        }
        Ok(0)
    }

    fn forget_budgets(&mut self, since: Stamp, _now: i64) -> Result<(), LedgerError> {
        let group = self.group();
        let alive: Vec<i64> = group.reservations.keys().map(|(owner, ..)| *owner).collect();
        group.heard.retain(|owner, heard| *heard >= since || alive.contains(owner));
        Ok(())
    }
}
