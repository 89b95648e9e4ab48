//! A scripted HTTP server in `OpenAI`'s format.
//!
//! The `demo` command, the integration tests and the benches need endpoints that answer, stall,
//! break off and fail on command. The simulator is such an endpoint: a real server on a real
//! socket, with an HTTP implementation (hyper) of its own, so that a mistake in the proxy's HTTP
//! library cannot hide itself by being made on both sides.
//!
//! # Calls
//!
//! `POST …/chat/completions`, `…/completions`, `…/responses` (JSON and SSE), `…/embeddings`,
//! `…/moderations`, `GET …/models`, `…/models/{id}`. Only the end of the path counts, so every
//! prefix works. Other paths answer 404, unless the behaviour has a `body`, `echo` or a status.
//!
//! With [`Options::objects`] also files, batches, stored responses and the other objects that clients make, show, list and delete.
//!
//! # Which behaviour answers
//!
//! The first that exists: the member `sim` of the request's body, a [`Behaviour`] in JSON, so that one prompt fails and others
//! of the model do not; the script of its key (`key:` and the key); that of its model; the model's name itself when it begins with `sim:`; that of
//! `*`; [`Options::default`]. A script hands out one behaviour per request, and its last one for ever. Requests without a model
//! belong to `*`, those with an unreadable body too. A request refused for its key takes nothing from a script.
//!
//! # Behaviour by model name
//!
//! `sim:` and a comma-separated list of `key=value`; values hold no comma. Every field of
//! [`Behaviour`] under its JSON name, and these short forms:
//!
//! | key | meaning |
//! |---|---|
//! | `status=503` | that status with an error body |
//! | `retryAfter=2` | header `retry-after: 2` |
//! | `header=name:value` | that response header |
//! | `stall=header`, `stall=afterHeader`, `stall=3` | silence before / after the header, after 3 events |
//! | `reset=beforeHeader`, `reset=afterHeader`, `reset=3` | breaks off there; after 3 events |
//! | `midEvent=2` | breaks off within the event that follows 2 whole ones |
//! | `resetHow=rst` | breaks off by TCP RST instead of FIN |
//! | `empty=zeroUsage` | see [`Empty`] |
//! | `events=200`, `eventBytes=64` | length of the answer |
//! | `headerDelayMs=`, `firstChunkDelayMs=`, `chunkDelayMs=`, `pingMs=` | times |
//! | `usage=false`, `firstEventError=true`, `chunked=true`, `echo=true`, `drip=7` | as the fields |
//!
//! `early` has no effect here: the model is known only once the body has been read.
//!
//! # Control calls
//!
//! Clients in other languages use `PUT /control/script` with `{"model":"*","behaviours":[…]}`, `GET /control/requests`,
//! and `DELETE /control` (forgets scripts and records). They need no key and are not recorded.

mod answer;
mod behaviour;
mod body;
mod connection;
mod control;
mod embeddings;
mod objects;
mod record;
mod reply;
mod responses;
mod script;
mod shapes;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

pub use self::behaviour::{AnswerAs, Behaviour, Empty, ResetAt, ResetHow, StallAt};
pub use self::connection::{Protocol, serve_stream, serve_with_abort};
pub use self::record::Arrived;

use self::objects::Objects;
use self::record::Records;
use self::script::Scripts;

/// TCP connections served at once; more wait in the kernel's queue. Far above any bench, and
/// below the file descriptors a process may usually get.
const MAX_CONNECTIONS: usize = 16_384;

/// Pause after a failed accept (no file descriptors left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// A running simulator. Dropping it stops everything: the listener and all connections close.
pub struct Simulator {
    handle: Handle,
    /// Every task waits for this sender to go away; dropping it is the stop signal.
    _running: watch::Sender<()>,
}

impl Simulator {
    /// Serves HTTP/1.1 and h2c (prior knowledge) on an already bound listener. To be called
    /// inside a tokio runtime.
    pub fn start(listener: TcpListener, options: Options) -> io::Result<Self> {
        let addr = listener.local_addr()?;
        let (running, stop) = watch::channel(());
        let handle = Handle(Arc::new(Shared::new(addr, options, stop)));
        handle.spawn(accept(handle.clone(), listener));
        Ok(Self { handle, _running: running })
    }

    /// Starts on a free port of 127.0.0.1.
    pub async fn bind_local(options: Options) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        Self::start(listener, options)
    }

    /// A handle that may be cloned and sent; it does not keep the simulator running.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }
}

impl Deref for Simulator {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.handle
    }
}

/// Options of a simulator.
#[derive(Clone, Debug)]
pub struct Options {
    /// Sent as `x-sim-name` and as the models' owner, to distinguish several simulators.
    pub name: String,
    /// Models of `GET /v1/models`.
    pub models: Vec<String>,
    /// True if a model not in `models` is answered with 404 `model_not_found`.
    pub strict_models: bool,
    /// Answers every request that no script covers.
    pub default: Behaviour,
    /// Closes connections without an open request after that much silence, as llama.cpp does.
    pub idle_close: Option<Duration>,
    /// Answers 401 unless `authorization` is `Bearer` and this key.
    pub require_key: Option<String>,
    /// Per cent (0 to 100) of the unscripted POST requests that answer 503, evenly spread.
    pub failure_rate_percent: u8,
    /// Shifts which requests those are.
    pub seed: u64,
    /// True if objects are kept: what a client makes can be shown, listed and deleted, and is known to no other simulator.
    pub objects: bool,
    /// True if requests are kept for [`Handle::requests`]. Benches turn it off.
    pub record: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: "simulator".into(),
            models: vec!["sim-model".into()],
            strict_models: false,
            default: Behaviour::default(),
            idle_close: None,
            require_key: None,
            failure_rate_percent: 0,
            seed: 0,
            objects: false,
            record: true,
        }
    }
}

/// Controls and observes a simulator from anywhere.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// The address that is listened on.
    pub fn addr(&self) -> SocketAddr {
        self.0.addr
    }

    /// `http://ADDRESS:PORT`, without a path.
    pub fn base_url(&self) -> String {
        format!("http://{}", self.0.addr)
    }

    /// Replaces the script of a model (`*`: of all models without their own). Each request takes
    /// the next behaviour; the last stays for ever. An empty list removes the script.
    pub fn script(&self, model: &str, behaviours: Vec<Behaviour>) {
        lock(&self.0.scripts).set(model, behaviours);
    }

    /// Replaces what answers requests that no script covers.
    pub fn set_default(&self, behaviour: Behaviour) {
        lock(&self.0.scripts).set_default(behaviour);
    }

    /// The requests that arrived, in the order in which their bodies were complete; the oldest
    /// are forgotten first when there are too many.
    pub fn requests(&self) -> Vec<Arrived> {
        lock(&self.0.records).list()
    }

    /// Forgets scripts and recorded requests. The default behaviour and the counters stay.
    pub fn clear(&self) {
        lock(&self.0.scripts).clear();
        lock(&self.0.records).clear();
    }

    /// Requests being answered at this moment, streams included. Falls when a client leaves.
    pub fn open_requests(&self) -> usize {
        self.0.open.load(Ordering::SeqCst)
    }

    /// Requests whose peer went away before the answer's end. Scripted resets do not count.
    pub fn cancelled(&self) -> u64 {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Connections accepted since the start.
    pub fn connections(&self) -> u64 {
        self.0.connections.load(Ordering::SeqCst)
    }

    /// Runs a task until the simulator stops.
    fn spawn<F>(&self, task: F)
    where
        F: Future + Send + 'static,
        F::Output: Send,
    {
        let stopped = self.stopped();
        tokio::spawn(async move {
            tokio::select! {
                _ = task => {}
                () = stopped => {}
            }
        });
    }

    fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut stop = self.0.stop.clone();
        async move { while stop.changed().await.is_ok() {} }
    }
}

/// State that all connections of one simulator share.
struct Shared {
    addr: SocketAddr,
    options: Options,
    scripts: Mutex<Scripts>,
    records: Mutex<Records>,
    objects: Mutex<Objects>,
    open: AtomicUsize,
    cancelled: AtomicU64,
    connections: AtomicU64,
    /// Requests so far, for the request ids.
    numbered: AtomicU64,
    /// Unscripted POST requests so far, for the failure rate.
    unscripted: AtomicU64,
    started: Instant,
    stop: watch::Receiver<()>,
}

impl Shared {
    fn new(addr: SocketAddr, options: Options, stop: watch::Receiver<()>) -> Self {
        Self {
            addr,
            scripts: Mutex::new(Scripts::new(options.default.clone())),
            records: Mutex::default(),
            objects: Mutex::default(),
            // Ids are made of these numbers.
            numbered: AtomicU64::new(if options.objects { u64::from(fastrand::u32(..)) << 16 } else { 0 }),
            options,
            open: AtomicUsize::new(0),
            cancelled: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            unscripted: AtomicU64::new(0),
            started: Instant::now(),
            stop,
        }
    }
}

async fn accept(handle: Handle, listener: TcpListener) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // The semaphore is never closed, so the loop ends only with the task.
    while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => serve_tcp(&handle, stream, slot),
            Err(error) => {
                log::warn!("simulator: accept failed: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn serve_tcp(handle: &Handle, stream: TcpStream, slot: tokio::sync::OwnedSemaphorePermit) {
    // Without it the kernel would hold small events back.
    if let Err(error) = stream.set_nodelay(true) {
        log::debug!("simulator: TCP_NODELAY: {error}");
    }
    let serving = connection::serving(handle, stream, Protocol::Auto, |tcp: &TcpStream| {
        if let Err(error) = tcp.set_zero_linger() {
            log::warn!("simulator: SO_LINGER: {error}");
        }
    });
    handle.spawn(async move {
        serving.await;
        drop(slot);
    });
}

/// Locks even after a panic elsewhere: the data are plain lists, whole at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
