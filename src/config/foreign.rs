//! Files of other programs, which are recognised by their keys instead of being refused key by key.

use serde_json::Value;

/// Program that a file was written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Foreign {
    /// Pingora's server conf.
    Pingora,
}

/// Keys of a server conf of Pingora, which people have in it.
const PINGORA: [&str; 8] = [
    "version",
    "error_log",
    "pid_file",
    "upgrade_sock",
    "work_stealing",
    "grace_period_seconds",
    "graceful_shutdown_timeout_seconds",
    "upstream_keepalive_pool_size",
];

impl Foreign {
    /// Returns the program that a file is meant for, if it is known not to be ours.
    pub(crate) fn recognise(file: &Value) -> Option<Self> {
        let keys = file.as_object()?;
        if keys.contains_key("server") || keys.contains_key("apis") {
            return None;
        }
        keys.keys().any(|key| PINGORA.contains(&key.as_str())).then_some(Self::Pingora)
    }

    /// What the file is, as the rest of a sentence about it, and the way out.
    pub(super) fn told(self) -> (&'static str, &'static str) {
        match self {
            Self::Pingora => {
                ("is a server conf of Pingora", "name it with --conf FILE; --config, or -c, is for `server` and `apis`")
            }
        }
    }
}
