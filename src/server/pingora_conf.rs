//! Pingora's own settings: its server conf file, with what we need of it.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use pingora::server::configuration::ServerConf;
use serde_yaml::Value;

use super::runtime_folder::make_private;
use super::{RunOptions, StartError};
use crate::config::{Config, likeliest};

/// Pingora has one limit of tries for all requests. Ours are bounded request by request, so this only has to be larger than any
/// of those: a hundred attempts, each at sixteen addresses, repeated twice, and once without `stream_options`.
const PINGORA_TRIES_MAX: usize = 100 * (16 + 2 + 1);
/// Idle connections to endpoints that each thread keeps, unless the server conf says otherwise: after many streams at once, the
/// next ones should find connections.
const IDLE_CONNECTIONS_MAX: usize = 1024;
/// A stopping process waits this long for its open requests, unless the server conf says otherwise.
const GRACE_PERIOD_SECONDS: u64 = 600;
/// Pingora's own wait for open requests: longer than ours ever is.
const PINGORA_GRACE: Duration = Duration::from_hours(10 * 365 * 24);
/// Keys of our own config at its top, which Pingora would ignore.
const KEYS_OF_OURS: [&str; 2] = ["server", "apis"];

/// Returns the settings of a process, and its longest wait for open requests.
pub(super) fn for_process(config: &Config, options: &RunOptions) -> Result<(ServerConf, Duration), StartError> {
    let mut conf = match &options.server_conf {
        Some(path) => read(path)?,
        None => ServerConf::default(),
    };
    let defaults = ServerConf::default();
    let folder = &options.runtime_folder;
    let private = |name: &str| folder.join(name).to_string_lossy().into_owned();
    // Pingora's defaults lie in the folder for temporary files, where anybody could put something in their place.
    if conf.upgrade_sock == defaults.upgrade_sock {
        conf.upgrade_sock = private("upgrade.sock");
    }
    if conf.pid_file == defaults.pid_file {
        conf.pid_file = private("api-together.pid");
    }
    let is_needed = options.upgrade || options.daemon;
    // A test makes nothing.
    if !options.test
        && (is_needed || options.arguments.is_some())
        && let Err(error) = make_private(folder)
    {
        let problem = format!("{}: {error}; upgrades need a folder of their own", folder.display());
        if is_needed {
            return Err(StartError(problem));
        }
        log::warn!("{problem}");
    }
    if options.daemon {
        // Otherwise Pingora would throw the log away.
        conf.error_log.get_or_insert_with(|| private("api-together.log"));
    }
    if options.daemon && conf.working_directory.is_none() {
        // A relative path, as that of `.env`, means the same in the background.
        conf.working_directory = Some(options.start_folder.clone());
    }
    if conf.upstream_keepalive_pool_size == defaults.upstream_keepalive_pool_size {
        conf.upstream_keepalive_pool_size = IDLE_CONNECTIONS_MAX;
    }
    let grace = Duration::from_secs(conf.grace_period_seconds.unwrap_or(GRACE_PERIOD_SECONDS));
    // Pingora would end the process without a word, and before its counts are written.
    conf.grace_period_seconds = Some(PINGORA_GRACE.as_secs());
    conf.threads = config.server.threads;
    conf.max_retries = PINGORA_TRIES_MAX;
    Ok((conf, grace))
}

/// Reads a server conf file. Pingora itself ignores keys that it does not know.
fn read(path: &Path) -> Result<ServerConf, StartError> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string());
    let conf = text.and_then(|text| parse(&text)).map_err(|why| StartError(format!("{}: {why}", path.display())))?;
    conf.validate().map_err(|error| StartError(format!("{}: {error}", path.display())))
}

fn parse(text: &str) -> Result<ServerConf, String> {
    let Value::Mapping(keys) = serde_yaml::from_str(text).map_err(|error| error.to_string())? else {
        return Err("is not a Pingora server conf, which has lines such as `grace_period_seconds: 600`".to_owned());
    };
    let keys: Vec<_> = keys.keys().filter_map(Value::as_str).collect();
    if keys.iter().any(|key| KEYS_OF_OURS.contains(key)) {
        return Err("this is the config of api-together, not a Pingora server conf; name it with --config".to_owned());
    }
    let known = known_keys()?;
    for key in keys {
        if !known.contains(key) {
            let known: Vec<_> = known.iter().map(String::as_str).collect();
            let hint = likeliest(key, &known).map_or_else(String::new, |known| format!(" (did you mean `{known}`?)"));
            return Err(format!("Pingora has no setting `{key}`{hint}"));
        }
    }
    serde_yaml::from_str(text).map_err(|error| error.to_string())
}

/// Keys of a server conf.
fn known_keys() -> Result<BTreeSet<String>, String> {
    let defaults = serde_yaml::to_value(ServerConf::default()).map_err(|error| error.to_string())?;
    let keys = defaults.as_mapping().into_iter().flat_map(|keys| keys.keys());
    Ok(keys.filter_map(Value::as_str).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_server_conf_is_refused_by_name() {
        let refused = |text: &str| parse(text).unwrap_err();
        assert!(refused(r#"{"server":{},"apis":[]}"#).contains("--config"));
        assert!(refused("apis: []").contains("--config"));
        assert!(refused("grace_period_secs: 1").contains("did you mean `grace_period_seconds`?"));
        assert!(refused("listen: 3001").contains("no setting `listen`"));
        assert!(refused("").contains("is not a Pingora server conf"));
        assert!(refused("- a").contains("is not a Pingora server conf"));
        assert!(refused("threads: many").contains("threads"));
    }

    #[test]
    fn every_setting_is_known() {
        let text = serde_yaml::to_string(&ServerConf::default()).unwrap();
        assert_eq!(parse(&text).unwrap(), ServerConf::default());
        assert_eq!(parse("version: 1\nerror_log: /tmp/log\n").unwrap().error_log.unwrap(), "/tmp/log");
    }
}
