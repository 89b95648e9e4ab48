//! Files of other programs, which are recognised by their keys instead of being refused key by key.

use serde_json::Value;

/// Program that a file was written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Foreign {
    /// Pingora's server conf.
    Pingora,
    /// LiteLLM's `config.yaml`.
    LiteLlm,
    /// uni-api's `api.yaml`.
    UniApi,
    /// A list of one-api's channels, or of those of its descendants.
    OneApi,
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
        if channels(file).is_some() {
            return Some(Self::OneApi);
        }
        let keys = file.as_object()?;
        if keys.contains_key("server") || keys.contains_key("apis") {
            return None;
        }
        if keys.contains_key("model_list") {
            return Some(Self::LiteLlm);
        }
        if keys.get("providers").is_some_and(Value::is_array) {
            return Some(Self::UniApi);
        }
        keys.keys().any(|key| PINGORA.contains(&key.as_str())).then_some(Self::Pingora)
    }

    /// What the file is, as the rest of a sentence about it, and the way out.
    pub(super) fn told(self) -> (&'static str, &'static str) {
        const IMPORT: &str = "`api-together import FILE` writes a config of ours from it";
        match self {
            Self::Pingora => {
                ("is a server conf of Pingora", "name it with --conf FILE; --config, or -c, is for `server` and `apis`")
            }
            Self::LiteLlm => ("is a config of LiteLLM", IMPORT),
            Self::UniApi => ("is a config of uni-api", IMPORT),
            Self::OneApi => ("is a list of one-api's channels", IMPORT),
        }
    }
}

/// The channels of an export: the list itself, or within an answer of the program's API.
pub(super) fn channels(file: &Value) -> Option<&Vec<Value>> {
    let data = file.get("data").unwrap_or(file);
    let list = data.get("items").or(data.get("channels")).unwrap_or(data).as_array()?;
    let is_channel =
        |channel: &Value| channel.get("type").is_some_and(Value::is_number) && channel.get("models").is_some();
    (!list.is_empty() && list.iter().all(is_channel)).then_some(list)
}
