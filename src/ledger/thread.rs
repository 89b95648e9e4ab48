//! The ledger's thread: it runs the allocator, opens the ledger and handles its errors. A second thread writes
//! checkpoints.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use super::allocator::{Allocator, Tally, Used};
use super::messages::Messages;
use super::redis::connection::{Connection, ConnectionOptions};
use super::redis::{GRACE, RedisLedger, ServerClock, ServerStatistics, TOUCH_EVERY, Time};
use super::sqlite::{self, FileStatistics, Opening, SqliteLedger};
use super::stats::Statistics;
use super::{Client, FaultKind, Ledger, LedgerError};
use crate::config::{self, AlertEvent, LedgerOnError, LedgerSync, SharedLedger};
use crate::database;
use crate::limit::{Clock, Stamp};
use crate::telemetry::alerts;

/// Pause after an error of the ledger; meanwhile requests do not wait for it.
const RETRY_AFTER: Duration = Duration::from_millis(250);
/// Longest wait of a batch for another program's lock, once a batch has waited its full time in vain.
const LOCK_WAIT_FAILING: Duration = Duration::from_millis(20);
/// Shortest time between two checks whether the file was replaced.
const LOOK_AT_FILE: Duration = Duration::from_secs(1);
/// A batch with this many draws shows that more are arriving continuously. The next batch then begins [`LINGER`] later
/// and serves more of them for the price of one; at such a rate, requests wait for the CPU anyway.
const BUSY_DRAWS: usize = 4;
const LINGER: Duration = Duration::from_micros(250);
/// Interval of log lines about an error that lasts.
const TELL_AGAIN: Duration = Duration::from_mins(1);
/// Time between the first commit in the write-ahead log and the checkpoint that writes it back.
const CHECKPOINT_AFTER: Duration = Duration::from_secs(1);

/// Owner of the ledger of one process: its thread, and the handle to it.
#[derive(Debug)]
pub struct Keeper {
    client: Client,
    options: LedgerOptions,
    state: LedgerState,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Clone, Debug)]
struct LedgerOptions {
    path: PathBuf,
    sync: LedgerSync,
    /// The server that holds it in place of the file.
    server: Option<ServerOptions>,
    on_error: LedgerOnError,
}

/// Where a ledger on a server is.
#[derive(Clone, Debug)]
struct ServerOptions {
    shared: SharedLedger,
    wait: Duration,
    clock: Arc<ServerClock>,
}

/// State of the ledger. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LedgerState {
    path: Arc<Path>,
    name: Arc<str>,
    statistics: Arc<dyn Statistics>,
    on_error: LedgerOnError,
    tally: Arc<Tally>,
    fault: Arc<Mutex<Option<Failing>>>,
}

/// An error that persists.
#[derive(Clone, Debug)]
pub struct Failing {
    /// Time of its first occurrence.
    pub since: SystemTime,
    /// Message of its last occurrence.
    pub message: String,
    told: Instant,
}

impl LedgerState {
    /// Returns the path of the file. If the ledger is on a server, it is where this machine's own files are.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the file's path, or the server's address.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns a reader of its token statistics.
    pub fn statistics(&self) -> &Arc<dyn Statistics> {
        &self.statistics
    }

    /// Returns the config's `ledgerOnError`: the behaviour of limited endpoints while the ledger cannot be used.
    pub fn on_error(&self) -> LedgerOnError {
        self.on_error
    }

    /// Returns the counts of requests that were served or refused without the ledger.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Returns the error that makes the ledger unusable; `None` if it works.
    pub fn fault(&self) -> Option<Failing> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Failing>> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn works(&self) {
        let Some(fault) = self.lock().take() else { return };
        let seconds = fault.since.elapsed().unwrap_or_default().as_secs_f64();
        let (denied, uncounted) = (&self.tally.denied, &self.tally.uncounted);
        let name = &self.name;
        let message = format!(
            "ledger {name}: works again after {seconds:.1} s; since the start {} requests were refused without it, and {} attempts \
             went on without a permit",
            denied.load(Ordering::Relaxed),
            uncounted.load(Ordering::Relaxed),
        );
        log::info!("{message}");
        alerts::raise(AlertEvent::Ledger, name, message);
    }

    /// Records an error, and logs it if it is new or due again. An empty message means that the previous error
    /// persists.
    fn fails(&self, error: &LedgerError) {
        let mut fault = self.lock();
        let now = Instant::now();
        let tells = if let Some(before) = &mut *fault {
            if !error.message.is_empty() {
                before.message.clone_from(&error.message);
            }
            now.duration_since(before.told) > TELL_AGAIN
        } else {
            *fault = Some(Failing { since: SystemTime::now(), message: error.message.clone(), told: now });
            true
        };
        let Some(fault) = fault.as_mut().filter(|_| tells) else { return };
        fault.told = now;
        let follows = match self.on_error {
            LedgerOnError::Deny => "endpoints with limits take no requests until it works again",
            LedgerOnError::Allow => "endpoints with limits go on WITHOUT PERMITS until it works again",
        };
        let message = format!("{}; {follows} (server.ledgerOnError)", fault.message);
        log::error!("{message}");
        alerts::raise(AlertEvent::Ledger, &self.name, message);
    }
}

impl Keeper {
    /// Returns the keeper of the ledger that a config names. It opens nothing and starts no thread: threads do not
    /// survive the fork into the background.
    pub fn new(server: &config::Server) -> Self {
        let shared = |shared: &SharedLedger| ServerOptions {
            shared: shared.clone(),
            wait: server.ledger_wait,
            clock: Arc::default(),
        };
        let options = LedgerOptions {
            path: server.ledger.clone(),
            sync: server.ledger_sync,
            server: server.shared_ledger.as_ref().map(shared),
            on_error: server.ledger_on_error,
        };
        let state = LedgerState {
            path: options.path.as_path().into(),
            name: options.name().into(),
            statistics: options.statistics(),
            on_error: options.on_error,
            tally: Arc::default(),
            fault: Arc::default(),
        };
        let client = match &options.server {
            None => Client::new(Clock::read),
            Some(server) => {
                let clock = Arc::clone(&server.clock);
                Client::new(move || clock.read()).sharing_concurrency()
            }
        };
        Self { client: client.with_wait(server.ledger_wait), options, state, thread: Mutex::default() }
    }

    /// Returns the handle to the ledger's thread.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Returns the state of the ledger.
    pub fn state(&self) -> &LedgerState {
        &self.state
    }

    /// Checks that the ledger could be used, without making or changing anything. Not to be called once it is started.
    pub fn examine(&self) -> Result<(), LedgerError> {
        match &self.options.server {
            None => sqlite::examine(&self.options.path),
            Some(server) => server.connect()?.examine(),
        }
    }

    /// Starts the thread. Does nothing if it runs already.
    pub fn start(&self) -> std::io::Result<()> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_some() {
            return Ok(());
        }
        // Created first, so that no request waits for a thread that could not be started.
        let ends = EndsWithThread(self.client.clone());
        let (checkpoint, due) = sync_channel(1);
        if self.options.server.is_none() {
            let path = self.options.path.clone();
            std::thread::Builder::new().name("ledger-log".into()).spawn(move || checkpoints(&path, &due))?;
        }
        let mut keeping = Keeping {
            allocator: Allocator::new(self.client.clone(), self.options.on_error, Arc::clone(&self.state.tally)),
            client: self.client.clone(),
            options: self.options.clone(),
            state: self.state.clone(),
            ledger: None,
            retry_at: Stamp::default(),
            look_at: Stamp::default(),
            touch_at: Stamp::NEVER,
            checkpoint,
        };
        let run = move || {
            let _ends = ends;
            keeping.run();
        };
        *thread = Some(std::thread::Builder::new().name("ledger".into()).spawn(run)?);
        Ok(())
    }

    /// Writes everything and ends the thread. Blocks until then: for a second or two at most if the ledger cannot be
    /// written.
    pub fn close(&self) {
        // Held until the thread has ended, so that a second caller waits as well.
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(thread) = thread.take() else { return };
        self.client.close();
        if thread.join().is_err() {
            log::error!("ledger {}: its thread panicked", self.state.name);
        }
    }
}

/// Ends all waiting for replies when the thread ends, for whatever reason.
struct EndsWithThread(Client);

impl Drop for EndsWithThread {
    fn drop(&mut self) {
        self.0.set_down(true);
        // Remaining messages are dropped, and their reply channels with them, which ends the wait of their senders.
        drop(self.0.end());
    }
}

impl LedgerOptions {
    fn name(&self) -> String {
        match &self.server {
            None => self.path.display().to_string(),
            Some(server) => server.shared.address.to_string(),
        }
    }

    fn statistics(&self) -> Arc<dyn Statistics> {
        match &self.server {
            None => Arc::new(FileStatistics(self.path.clone())),
            Some(server) => {
                Arc::new(ServerStatistics { options: server.connection(), prefix: server.shared.prefix.clone() })
            }
        }
    }
}

impl ServerOptions {
    fn connection(&self) -> ConnectionOptions {
        let SharedLedger { address, prefix: _, ca_file, replicas } = self.shared.clone();
        ConnectionOptions { address, ca_file, wait: self.wait, replicas }
    }

    fn connect(&self) -> Result<Connection, LedgerError> {
        Connection::new(self.connection())
    }

    fn open(&self) -> Result<RedisLedger<Connection>, LedgerError> {
        let time = Time::Server(Arc::clone(&self.clock));
        RedisLedger::open(self.connect()?, &self.shared.prefix, time, self.wait + GRACE)
    }
}

fn open_file(options: &LedgerOptions, now: Stamp, minute_unknown: bool) -> Result<SqliteLedger, LedgerError> {
    let boot_id = sqlite::boot_id();
    let opening = Opening { boot_id: boot_id.as_deref(), now, minute_unknown };
    SqliteLedger::open(&options.path, options.sync, &opening)
}

/// An open ledger.
enum Opened {
    File(SqliteLedger),
    Server(Box<RedisLedger<Connection>>),
}

impl Opened {
    fn ledger(&mut self) -> &mut dyn Ledger {
        match self {
            Self::File(ledger) => ledger,
            Self::Server(ledger) => &mut **ledger,
        }
    }
}

/// State of the ledger's thread.
struct Keeping {
    allocator: Allocator,
    client: Client,
    options: LedgerOptions,
    state: LedgerState,
    ledger: Option<Opened>,
    /// Earliest moment at which the ledger is used again after an error.
    retry_at: Stamp,
    look_at: Stamp,
    /// Latest moment at which a server hears of this process again.
    touch_at: Stamp,
    checkpoint: SyncSender<()>,
}

impl Keeping {
    fn run(&mut self) {
        self.open(false);
        loop {
            let messages = self.client.receive(self.allocator.next_due().min(self.touch_at));
            let (closing, draws) = (messages.closing, messages.draws.len());
            self.serve(messages);
            if closing {
                break;
            }
            if draws >= BUSY_DRAWS {
                std::thread::sleep(LINGER);
            }
        }
        let last = Messages { closing: true, ..self.client.end() };
        self.retry_at = Stamp::default();
        self.serve(last);
        let is_settled = self.ledger.as_mut().is_none_or(|ledger| ledger.ledger().touch().is_ok());
        if !self.allocator.is_all_written() || !is_settled {
            log::error!("ledger {}: the last counts could not be written and are lost", self.state.name);
        }
    }

    fn serve(&mut self, messages: Messages) {
        let now = self.client.clock().boot;
        self.look_at_file(now);
        if self.ledger.is_none() && now >= self.retry_at {
            self.open(false);
        }
        let usable = now >= self.retry_at;
        let ledger = self.ledger.as_mut().filter(|_| usable);
        let is_touched = now >= self.touch_at;
        match self.allocator.serve_messages(ledger.map(Opened::ledger), messages) {
            Ok(Used::Ledger) => self.works(),
            Ok(Used::Nothing) if is_touched => self.touch(usable),
            Ok(Used::Nothing) => {}
            Err(error) => self.fails(&error),
        }
        if let Some(ledger) = &mut self.ledger {
            self.client.hear(ledger.ledger().take_heard());
        }
    }

    /// Lets a server hear of this process, and hears of it, though there is nothing to do.
    fn touch(&mut self, usable: bool) {
        let Some(ledger) = self.ledger.as_mut().filter(|_| usable) else {
            self.touch_at = self.client.clock().boot + TOUCH_EVERY;
            return;
        };
        match ledger.ledger().touch() {
            Ok(()) => self.works(),
            Err(error) => self.fails(&error),
        }
    }

    fn works(&mut self) {
        if self.state.lock().is_some() {
            if let Some(Opened::File(ledger)) = &self.ledger {
                ledger.set_lock_wait(sqlite::LOCK_WAIT_MAX);
            }
            self.client.set_down(false);
            self.state.works();
        }
        if self.options.server.is_some() {
            self.touch_at = self.client.clock().boot + TOUCH_EVERY;
            return;
        }
        // If the channel is full, a checkpoint is due already. If it is closed, the checkpoint thread has ended, after
        // logging its panic; the write-ahead log grows until the next start.
        self.checkpoint.try_send(()).unwrap_or_default();
    }

    fn fails(&mut self, error: &LedgerError) {
        self.state.fails(error);
        let now = self.client.clock().boot;
        if now >= self.retry_at {
            self.retry_at = now + RETRY_AFTER;
        }
        if self.options.server.is_some() {
            self.client.set_down(self.options.on_error == LedgerOnError::Deny);
            self.touch_at = now + RETRY_AFTER;
        }
        match (error.kind, &self.ledger) {
            (FaultKind::Corrupt, Some(Opened::File(ledger))) => {
                let seen = ledger.identity();
                self.ledger = None;
                self.replace(Some(seen));
            }
            (_, Some(Opened::File(ledger))) => ledger.set_lock_wait(LOCK_WAIT_FAILING),
            (_, Some(Opened::Server(_)) | None) => {}
        }
    }

    fn open(&mut self, minute_unknown: bool) {
        let seen = database::identity(&self.options.path).ok();
        let now = self.client.clock().boot;
        let opened = match &self.options.server {
            None => open_file(&self.options, now, minute_unknown).map(Opened::File),
            Some(server) => server.open().map(|ledger| Opened::Server(Box::new(ledger))),
        };
        match opened {
            Ok(mut ledger) => {
                self.tell_known_models(ledger.ledger());
                self.ledger = Some(ledger);
                self.retry_at = Stamp::default();
                self.touch_at = if self.options.server.is_some() { now } else { Stamp::NEVER };
            }
            Err(error) => {
                self.state.fails(&error);
                self.client.set_down(self.options.on_error == LedgerOnError::Deny);
                self.retry_at = now + RETRY_AFTER;
                self.touch_at = if self.options.server.is_some() { self.retry_at } else { Stamp::NEVER };
                if error.kind == FaultKind::Corrupt {
                    self.replace(seen);
                }
            }
        }
    }

    /// Tells which models had accounts of their own before this process began, so that they have them from the start.
    fn tell_known_models(&self, ledger: &mut dyn Ledger) {
        match ledger.accounts_of_models() {
            Ok(accounts) => self.client.set_known(accounts),
            Err(error) => {
                log::warn!("{error}; models that the config does not name share limits until they are answered");
            }
        }
        match ledger.model_lists() {
            Ok(lists) => self.client.set_models_known(lists),
            Err(error) => log::warn!("{error}; models are not shown before their endpoints list them again"),
        }
    }

    /// Moves a corrupt ledger aside and begins a new one. `seen` identifies the file that was found to be corrupt.
    fn replace(&mut self, seen: Option<(u64, u64)>) {
        let path = &self.options.path;
        match database::move_aside(path, seen) {
            Ok(Some(aside)) => tell(
                path,
                &format!(
                    "THE FILE IS CORRUPT. It was moved to {} and a new one begun: what was counted today, all token statistics, \
                     and what is spent of BUDGETS begin at 0; endpoints with limits by the minute take no requests for a minute",
                    aside.display()
                ),
            ),
            Ok(None) => log::warn!("ledger {}: another process has replaced the corrupt file", path.display()),
            Err(error) => {
                let message = format!("ledger {}: cannot be moved aside: {error}", path.display());
                self.state.fails(&LedgerError { kind: FaultKind::Unusable, message });
                return;
            }
        }
        match open_file(&self.options, self.client.clock().boot, true) {
            Ok(ledger) => {
                self.ledger = Some(Opened::File(ledger));
                self.retry_at = Stamp::default();
            }
            Err(error) => self.state.fails(&error),
        }
    }

    /// Opens the ledger again if its file was deleted or replaced: no other process would see what is written to the
    /// old one.
    fn look_at_file(&mut self, now: Stamp) {
        if now < self.look_at {
            return;
        }
        self.look_at = now + LOOK_AT_FILE;
        if matches!(&self.ledger, Some(Opened::File(ledger)) if ledger.was_replaced()) {
            tell(
                &self.options.path,
                "THE FILE WAS DELETED OR REPLACED while it was in use. What it counted, and what was spent of BUDGETS, is gone; the \
                 one that is there now is used, and endpoints with limits by the minute take no requests for a minute",
            );
            self.ledger = None;
            self.open(true);
        }
    }
}

fn checkpoints(path: &Path, due: &Receiver<()>) {
    while due.recv().is_ok() {
        std::thread::sleep(CHECKPOINT_AFTER);
        if let Err(error) = sqlite::checkpoint(path) {
            log::warn!("{error}; its write-ahead log could not be written back and grows meanwhile");
        }
    }
}

/// Says that counts are lost: in the log, and to those who run the gateway.
fn tell(path: &Path, what: &str) {
    let path = path.display().to_string();
    let message = format!("ledger {path}: {what}");
    log::error!("{message}");
    alerts::raise(AlertEvent::Ledger, &path, message);
}
