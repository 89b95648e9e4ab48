//! Finished requests as spans, sent by OTLP to a collector: one server span a request, one client span an attempt, never what they say.
//!
//! It is a part of builds with the feature `otlp`, and on where the standard variables name a collector
//! (`OTEL_EXPORTER_OTLP_ENDPOINT`, or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`).

use std::sync::Arc;

use super::entry::Entry;
use crate::request::trace::Trace;

#[cfg(feature = "otlp")]
use super::spans::Exporter;

/// Variables that name a collector.
pub(super) const COLLECTORS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];

/// A build without the feature has none.
#[cfg(not(feature = "otlp"))]
#[derive(Debug)]
enum Exporter {}

#[cfg(not(feature = "otlp"))]
impl Exporter {
    fn from_environment() -> Option<Self> {
        let named = COLLECTORS.into_iter().find(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()));
        if let Some(name) = named {
            log::warn!("{name} is set, but this program was built without the feature otlp: no traces are sent");
        }
        None
    }

    fn samples(&self, _trace: u128) -> bool {
        match *self {}
    }

    fn start(&self) {
        match *self {}
    }

    fn add(&self, _trace: Trace, _entry: &Entry) {
        match *self {}
    }

    fn close(&self) {
        match *self {}
    }

    fn tally(&self) -> Tally {
        match *self {}
    }
}

/// Where traces go, if they go anywhere. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Traces(Option<Arc<Exporter>>);

/// Spans since the process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Sent.
    pub sent: u64,
    /// Not sent, since too many waited.
    pub dropped: u64,
    /// Not taken by the collector, or not reached it.
    pub failed: u64,
}

impl Traces {
    /// Those that the environment asks for.
    pub fn from_environment() -> Self {
        Self(Exporter::from_environment().map(Arc::new))
    }

    /// Starts the thread that sends them. It would be lost if it were started before the process goes into the background.
    pub fn start(&self) {
        self.0.iter().for_each(|exporter| exporter.start());
    }

    /// True if a trace that begins here is to be recorded.
    pub fn samples(&self, trace: u128) -> bool {
        self.0.as_ref().is_some_and(|exporter| exporter.samples(trace))
    }

    /// True if a request's trace is sent.
    pub fn takes(&self, trace: Option<&Trace>) -> bool {
        self.0.is_some() && trace.is_some_and(Trace::is_recorded)
    }

    /// Sends a finished request.
    pub fn add(&self, trace: Trace, entry: &Entry) {
        self.0.iter().for_each(|exporter| exporter.add(trace, entry));
    }

    /// Sends what waits, at the end of the process.
    pub fn close(&self) {
        self.0.iter().for_each(|exporter| exporter.close());
    }

    /// Spans since the start; none if no traces are sent.
    pub fn tally(&self) -> Option<Tally> {
        self.0.as_ref().map(|exporter| exporter.tally())
    }
}
