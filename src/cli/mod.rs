//! The command line: flags, subcommands, exit codes.

mod banner;
mod demo;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anstream::{eprintln, print, println};
use anstyle::{AnsiColor, Style};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::config::{self, Environment, Loaded, Problem, ProblemKind};
use crate::server::handover::{self, Starter};
use crate::server::{Prepared, RunOptions, control};
use crate::telemetry::logger;
use banner::Banner;

const NAME: &str = "api-together";
/// Path of the config file unless the command line names one.
const CONFIG_DEFAULT: &str = "conf/apis.json";
/// Pingora's own settings, used if the file is there.
const SERVER_CONF_DEFAULT: &str = "conf/pingora.yaml";
/// The folder for the upgrade socket and the pid file, beside the config file.
const RUNTIME_FOLDER: &str = "run";
/// Runtime folder of the packaged service.
const PACKAGED_RUNTIME_FOLDER: &str = "/run/api-together";

/// A self-hosted, OpenAI-compatible LLM gateway.
#[derive(Debug, Parser)]
#[command(name = NAME, version, about, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Run,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve requests (the default).
    Run(Run),
    /// Check a config file and print every error, each with its place in the file. Exit code 1 if there are any.
    Check {
        /// The file, JSON or YAML.
        file: PathBuf,
    },
    /// Print the JSON Schema of the config file, or its reference as a Markdown table.
    Schema {
        /// Output format.
        #[arg(long, value_enum, default_value_t = SchemaFormat::Json)]
        format: SchemaFormat,
    },
    /// Replace the running process by this binary without losing a request. If anything fails, the old process keeps serving and the
    /// exit code is 1.
    Upgrade {
        /// The config file that it runs with.
        #[arg(long, value_name = "FILE", default_value = CONFIG_DEFAULT)]
        config: PathBuf,
    },
    /// Have the running process read its config again, and say what came of it. If the config has an error, nothing changes and the
    /// exit code is 1.
    Reload {
        /// The config file that it runs with.
        #[arg(long, value_name = "FILE", default_value = CONFIG_DEFAULT)]
        config: PathBuf,
    },
    /// Start a successor of the running process, which asks for that itself.
    #[command(hide = true)]
    StartSuccessor {
        /// File to write the result into.
        #[arg(long)]
        result: PathBuf,
        /// Socket at which the successor will wait.
        #[arg(long)]
        socket: PathBuf,
        /// The successor's program and arguments.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Print a shell completion script.
    Completions {
        /// Shell to complete in.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man,
    /// Serve a demo with three simulated endpoints, one healthy, one slow, one that fails often, and print commands to try.
    Demo,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SchemaFormat {
    Json,
    Markdown,
}

#[derive(Args, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own on the command line")]
struct Run {
    /// The config file, JSON or YAML.
    #[arg(long, value_name = "FILE", default_value = CONFIG_DEFAULT)]
    config: PathBuf,
    /// Pingora's server conf file [default: conf/pingora.yaml, if it is there].
    #[arg(short, long, value_name = "FILE")]
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

impl Cli {
    /// Runs the command line.
    pub fn execute(self) -> ExitCode {
        match self.command.unwrap_or(Command::Run(self.run)) {
            Command::Run(run) => run.execute(),
            Command::Check { file } => check(&file),
            Command::Schema { format: SchemaFormat::Json } => {
                println!("{:#}", config::schema());
                ExitCode::SUCCESS
            }
            Command::Schema { format: SchemaFormat::Markdown } => {
                print!("{}", config::schema_markdown());
                ExitCode::SUCCESS
            }
            Command::Upgrade { config } => tell(handover::ask(&runtime_folders(&config))),
            Command::Reload { config } => tell(control::ask(&runtime_folders(&config), control::Request::Reload)),
            Command::StartSuccessor { result, socket, command } => {
                Starter { result, socket, command }.run().map_or_else(|why| fail(&why), |()| ExitCode::SUCCESS)
            }
            Command::Completions { shell } => {
                let mut text = Vec::new();
                clap_complete::generate(shell, &mut Self::command(), NAME, &mut text);
                print!("{}", String::from_utf8_lossy(&text));
                ExitCode::SUCCESS
            }
            Command::Man => manual(),
            Command::Demo => demo::run().map_or_else(|why| fail(&why), |()| ExitCode::SUCCESS),
        }
    }
}

fn manual() -> ExitCode {
    let mut text = Vec::new();
    match clap_mangen::Man::new(Cli::command()).render(&mut text) {
        Ok(()) => {
            print!("{}", String::from_utf8_lossy(&text));
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error.to_string()),
    }
}

fn check(file: &Path) -> ExitCode {
    let environment = Environment::from_process(file);
    let (loaded, problems) = match config::load(file, &environment) {
        Ok(loaded) => (true, loaded.warnings),
        Err(problems) => (false, problems.iter().cloned().collect()),
    };
    let wrong = |problem: &&Problem| problem.kind != ProblemKind::Warning;
    for problem in &problems {
        if wrong(&problem) { eprintln!("{problem}") } else { eprintln!("warning: {problem}") }
    }
    let errors = problems.iter().filter(wrong).count();
    if loaded && errors == 0 {
        println!("{}: ok", file.display());
        return ExitCode::SUCCESS;
    }
    eprintln!("{}: {errors} error{}", file.display(), if errors == 1 { "" } else { "s" });
    ExitCode::FAILURE
}

impl Run {
    fn execute(self) -> ExitCode {
        logger::start(self.log_framework_headers);
        let environment = Environment::from_process(&self.config);
        let Loaded { config, warnings } = match config::load(&self.config, &environment) {
            Ok(loaded) => loaded,
            Err(problems) => return fail(&format!("{problems}")),
        };
        logger::set_format(config.server.log_format);
        for warning in &warnings {
            log::warn!("{}: {warning}", self.config.display());
        }
        let options = self.options();
        let banner = Banner::new(&config);
        let mut prepared = match Prepared::new(config, &options) {
            Ok(prepared) => prepared,
            Err(error) => return fail(&error.to_string()),
        };
        if self.test {
            println!("{}: ok", self.config.display());
            println!("{}{}", handover::LISTENS, prepared.address);
            if let Some(address) = prepared.pool.load().server.metrics_listen {
                println!("{}{address}", handover::METRICS_ON);
            }
        } else {
            prepared.announce(banner.text(prepared.address));
        }
        prepared.bootstrap();
        prepared.serve();
        ExitCode::SUCCESS
    }

    /// Arguments of a successor: the same config and options, without those that say how this process came to be.
    fn successors_arguments(&self) -> Vec<OsString> {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).into_os_string();
        let mut arguments = vec!["--config".into(), absolute(&self.config)];
        if let Some(conf) = &self.conf {
            arguments.extend(["--conf".into(), absolute(conf)]);
        }
        if self.log_framework_headers {
            arguments.push("--log-framework-headers".into());
        }
        arguments
    }

    fn options(&self) -> RunOptions {
        let found = || Some(PathBuf::from(SERVER_CONF_DEFAULT)).filter(|path| path.exists());
        // The process may go into the background, where the working directory is another.
        let config_file = std::path::absolute(&self.config).unwrap_or_else(|_| self.config.clone());
        RunOptions {
            config_file: Some(config_file),
            start_folder: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
            arguments: Some(self.successors_arguments()),
            runtime_folder: runtime_folder(&self.config),
            upgrade: self.upgrade,
            daemon: self.daemon,
            test: self.test,
            server_conf: self.conf.clone().or_else(found),
        }
    }
}

/// Runtime folder: beside the config file, or the one that systemd has made.
fn runtime_folder(config: &Path) -> PathBuf {
    let beside = || config.parent().unwrap_or(Path::new("")).join(RUNTIME_FOLDER);
    let folder = std::env::var_os("RUNTIME_DIRECTORY").map_or_else(beside, PathBuf::from);
    // In the background the working directory is another.
    std::path::absolute(&folder).unwrap_or(folder)
}

/// Folders from which the process of a config may run.
fn runtime_folders(config: &Path) -> [PathBuf; 2] {
    [runtime_folder(config), PACKAGED_RUNTIME_FOLDER.into()]
}

/// Prints what the running process says.
fn tell(told: Result<String, String>) -> ExitCode {
    match told {
        Ok(told) => {
            println!("{told}");
            ExitCode::SUCCESS
        }
        Err(why) => fail(&why),
    }
}

/// Prints the reason why nothing runs on standard error.
fn fail(why: &str) -> ExitCode {
    const ERROR: Style = AnsiColor::Red.on_default().bold();
    eprintln!("{ERROR}error{ERROR:#}: {why}");
    ExitCode::FAILURE
}
