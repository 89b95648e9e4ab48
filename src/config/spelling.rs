//! Checked values as the config file spells them, for messages.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

/// A number, an address.
pub(super) fn plain<T: ToString + ?Sized>(value: &T) -> String {
    value.to_string()
}

/// A file's path.
pub(super) fn path<P: AsRef<Path>>(path: &P) -> String {
    path.as_ref().display().to_string()
}

/// A word such as `round_robin`, a truth value.
pub(super) fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        Ok(other) => other.to_string(),
        Err(error) => error.to_string(),
    }
}

/// A duration whose key ends in `Ms`.
pub(super) fn millis(value: &Duration) -> String {
    value.as_millis().to_string()
}

/// A duration whose key ends in `Seconds`.
pub(super) fn seconds(value: &Duration) -> String {
    value.as_secs().to_string()
}

/// A value that need not be there.
pub(super) fn optional<T>(value: Option<&T>, spell: impl Fn(&T) -> String) -> String {
    value.map_or_else(|| "not set".to_owned(), spell)
}

/// A list.
pub(super) fn list<T: ToString>(values: &[T]) -> String {
    format!("[{}]", values.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))
}
