//! Prometheus's usual metrics of a process, read from `/proc` at each scrape.

use std::time::SystemTime;

use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};

use crate::telemetry::metrics::Scrape;

/// Fields of `/proc/self/stat`, counted from the state, which follows the name in brackets (proc(5)).
const USER_TICKS: usize = 11;
const SYSTEM_TICKS: usize = 12;
const THREADS: usize = 17;
const VIRTUAL_BYTES: usize = 20;
const RESIDENT_PAGES: usize = 21;

/// Adds them. What cannot be read is left out.
pub(super) fn add(scrape: &Scrape, started_at: SystemTime) {
    if let Some(stat) = Stat::read() {
        #[expect(clippy::cast_precision_loss, reason = "ticks of a process are far below 2^53")]
        let seconds = (stat.field(USER_TICKS) + stat.field(SYSTEM_TICKS)) as f64 / clock_ticks_per_second() as f64;
        scrape.counter_f64("process_cpu_seconds_total", "Processor time of the process, in seconds.", seconds);
        scrape.gauge("process_threads", "Threads of the process.", stat.field(THREADS));
        let virtual_bytes = stat.field(VIRTUAL_BYTES);
        scrape.gauge("process_virtual_memory_bytes", "Virtual memory of the process, in bytes.", virtual_bytes);
        let resident_bytes = stat.field(RESIDENT_PAGES).saturating_mul(page_size() as u64);
        scrape.gauge("process_resident_memory_bytes", "Resident memory of the process, in bytes.", resident_bytes);
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        // Without the one that reads them.
        let count = open.count().saturating_sub(1) as u64;
        scrape.gauge("process_open_fds", "File descriptors that are open.", count);
    }
    if let Some(most) = getrlimit(Resource::Nofile).current {
        scrape.gauge("process_max_fds", "File descriptors that may be open.", most);
    }
    let started = started_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let help = "When the process was started, in Unix time.";
    scrape.gauge_f64("process_start_time_seconds", help, started.as_secs_f64());
}

struct Stat(Vec<u64>);

impl Stat {
    fn read() -> Option<Self> {
        let text = std::fs::read_to_string("/proc/self/stat").ok()?;
        let (_, fields) = text.rsplit_once(')')?;
        // Negative numbers are none of those that are asked for.
        Some(Self(fields.split_ascii_whitespace().map(|field| field.parse().unwrap_or_default()).collect()))
    }

    fn field(&self, index: usize) -> u64 {
        self.0.get(index).copied().unwrap_or_default()
    }
}
