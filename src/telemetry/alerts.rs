//! Alerts: what needs an operator. The module that notices it raises it here and goes on; a webhook sends it, if there is one.

use std::sync::OnceLock;
use std::time::SystemTime;

use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::config::AlertEvent;

/// Alerts that wait to be told. Further ones are lost, and logged like all others.
const WAITING_MAX: usize = 1000;

/// Something that wants somebody's hands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Alert {
    /// What it is.
    pub event: AlertEvent,
    /// What or whom it is about: an endpoint, a key, a file.
    pub subject: String,
    /// What has happened, in words without a secret.
    pub message: String,
    /// When.
    pub at: SystemTime,
}

static LISTENER: OnceLock<Sender<Alert>> = OnceLock::new();

/// Says what has happened, without waiting.
pub(crate) fn raise(event: AlertEvent, subject: &str, message: String) {
    let Some(listener) = LISTENER.get() else { return };
    let alert = Alert { event, subject: subject.to_owned(), message, at: SystemTime::now() };
    if listener.try_send(alert).is_err() {
        log::warn!("an alert of {subject} is not sent to the webhook: too many wait");
    }
}

/// Listens to what is said from now on. There is one listener in a process; later ones hear nothing.
pub(crate) fn listen() -> Option<Receiver<Alert>> {
    let (sender, receiver) = channel(WAITING_MAX);
    LISTENER.set(sender).is_ok().then_some(receiver)
}
