//! `api-together run`: from flags to a process that serves.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anstream::println;
use clap::Args;

use super::banner::Banner;
use super::files::{ConfigFile, runtime_folder};
use crate::config::{self, Environment, Flags, Loaded};
use crate::server::{Prepared, RunOptions, handover};
use crate::telemetry::logger;

/// Pingora's own settings, used if the file is there.
const SERVER_CONF_DEFAULT: &str = "conf/pingora.yaml";

/// Flags of `run`, which may stand without it.
#[derive(Args, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own on the command line")]
pub(super) struct Run {
    #[arg(
        long,
        value_name = "ADDRESS",
        help = "The IP address to listen on, in place of server.host [env: API_TOGETHER_HOST]"
    )]
    host: Option<String>,
    #[arg(
        long,
        help = "The port to listen on, in place of server.port; 0 takes any free one [env: API_TOGETHER_PORT, then PORT]"
    )]
    port: Option<u16>,
    /// Pingora's server conf file [default: conf/pingora.yaml, if it is there].
    #[arg(long, value_name = "FILE")]
    conf: Option<PathBuf>,
    /// Take over the listening sockets of the running process, which is then sent SIGQUIT.
    #[arg(short, long)]
    upgrade: bool,
    /// Run in the background.
    #[arg(short, long)]
    daemon: bool,
    /// Check everything that a start needs, then exit.
    #[arg(short, long)]
    test: bool,
    /// Let the HTTP libraries log at debug level, too. THIS PRINTS KEYS: they log whole request headers.
    #[arg(long)]
    log_framework_headers: bool,
}

impl Run {
    /// Serves until it is stopped. The error says why it cannot start.
    pub(super) fn execute(self, file: &ConfigFile) -> Result<(), String> {
        let options = self.options(file);
        let environment = Environment::from_process(&file.path, &options.flags);
        logger::start(&environment, self.log_framework_headers);
        let shown = file.path.display();
        for warning in file.warnings() {
            log::warn!("{warning}");
        }
        let Loaded { config, warnings } =
            config::load(&file.path, &environment).map_err(|problems| problems.to_string())?;
        logger::set_format(config.server.log_format);
        for warning in &warnings {
            log::warn!("{warning}");
        }
        let banner = Banner::new(&config);
        let mut prepared = Prepared::new(config, &options).map_err(|error| error.to_string())?;
        if self.test {
            println!("{shown}: ok");
            println!("{}{}", handover::LISTENS, prepared.address);
            if let Some(address) = prepared.pool.load().server.metrics_listen {
                println!("{}{address}", handover::METRICS_ON);
            }
            if let Some(address) = prepared.pool.load().server.admin_listen {
                println!("{}{address}", handover::ADMIN_ON);
            }
        } else {
            if let Some((log, pid_file)) = prepared.background() {
                println!("running in the background; log {log}, pid file {pid_file}");
            }
            prepared.announce(banner.text(prepared.address));
        }
        prepared.bootstrap();
        prepared.serve();
        Ok(())
    }

    fn options(&self, file: &ConfigFile) -> RunOptions {
        let found = || Some(PathBuf::from(SERVER_CONF_DEFAULT)).filter(|path| path.exists());
        RunOptions {
            // The process may go into the background, where the working directory is another.
            config_file: Some(absolute(&file.path)),
            flags: Flags { host: self.host.clone(), port: self.port },
            start_folder: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
            arguments: Some(self.successors_arguments(&file.path)),
            runtime_folder: runtime_folder(&file.path),
            upgrade: self.upgrade,
            daemon: self.daemon,
            test: self.test,
            server_conf: self.conf.clone().or_else(found),
        }
    }

    /// Arguments of a successor: the same config and options, without those that say how this process came to be.
    fn successors_arguments(&self, config: &Path) -> Vec<OsString> {
        let Self { host, port, conf, upgrade: _, daemon: _, test: _, log_framework_headers } = self;
        let mut arguments = vec!["--config".into(), absolute(config).into_os_string()];
        if let Some(host) = host {
            arguments.extend(["--host".into(), host.into()]);
        }
        if let Some(port) = port {
            arguments.extend(["--port".into(), port.to_string().into()]);
        }
        if let Some(conf) = conf {
            arguments.extend(["--conf".into(), absolute(conf).into_os_string()]);
        }
        if *log_framework_headers {
            arguments.push("--log-framework-headers".into());
        }
        arguments
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
