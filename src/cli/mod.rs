//! The command line: flags, subcommands, exit codes.

mod banner;
mod check;
mod demo;
mod files;
mod keys;
mod log;
mod manual;
mod serve;
mod status;
mod stop;
mod table;
mod test;
mod times;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anstream::{eprintln, print, println};
use anstyle::{AnsiColor, Style};
use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

use crate::config::{self, Language};
use crate::fault::reference;
use crate::server::control;
use crate::server::handover::{self, Starter};
use files::ConfigFile;
use serve::Run;
use status::Output;

const NAME: &str = "api-together";

/// A self-hosted, OpenAI-compatible LLM gateway.
#[derive(Debug, Parser)]
#[command(name = NAME, version, about)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[arg(
        short,
        long,
        global = true,
        value_name = "FILE",
        help = "The config file, JSON or YAML [env: API_TOGETHER_CONFIG] [default: conf/apis.json, .yaml or .yml, then the same in \
                /etc/api-together]"
    )]
    config: Option<PathBuf>,
    #[command(flatten)]
    run: Run,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve requests (the default).
    Run(Run),
    /// Check a config file and print every error, each with its place in the file. Exit code 1 if there are any.
    Check {
        /// The file; like --config.
        file: Option<PathBuf>,
    },
    /// Print a config that does what a file of another program does: LiteLLM's config.yaml, uni-api's api.yaml, or a list of one-api's
    /// channels. Keys become ${NAME}; what could not be taken over is said on standard error.
    Import {
        /// The file, JSON or YAML.
        file: PathBuf,
    },
    /// Print the JSON Schema of the config file, or its reference as a Markdown table.
    Schema {
        /// Output format.
        #[arg(long, value_enum, default_value_t = SchemaFormat::Json)]
        format: SchemaFormat,
        /// Language of the table.
        #[arg(long, value_enum, default_value_t = SchemaLanguage::En)]
        language: SchemaLanguage,
    },
    /// Replace the running process by this binary without losing a request. If anything fails, the old process keeps serving and the
    /// exit code is 1.
    Upgrade,
    /// Have the running process read its config again, and say what came of it. If the config has an error, nothing changes and the
    /// exit code is 1.
    Reload,
    /// Ask endpoints step by step: name, connection, TLS, key, list of models, one token of one model. Says which step failed and
    /// what to do. Costs a permit of each endpoint, and what the vendor charges for a token. Exit code 1 if an endpoint fails.
    Test {
        /// The endpoint's id [default: all that are switched on].
        endpoint: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show the running process: its endpoints, how full their limits are, who cools down or rests and until when, the last errors.
    Status {
        /// Print what GET /v1/status answers.
        #[arg(long)]
        json: bool,
        /// Show it again every two seconds.
        #[arg(long)]
        watch: bool,
    },
    /// List the model names that clients of the running process may ask for, and the endpoints that serve them.
    Models {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show requests of the request log, those that ended last, or one of them with all that is known of it.
    Log(Box<log::ShowLog>),
    /// Make, list, rotate and revoke keys of clients. The running process uses what is changed at once.
    Keys {
        #[command(subcommand)]
        command: keys::KeysCommand,
    },
    /// Stop the running process, and wait until it has ended: it finishes the requests that are open.
    Stop {
        /// Cut open requests off. Counts are written all the same.
        #[arg(long)]
        now: bool,
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
    /// Print the reference of the gateway's own errors, as Markdown.
    #[command(hide = true)]
    Errors,
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

/// Runs the command line of a program that was built from this commit.
pub fn run(commit: Option<&str>) -> ExitCode {
    let version = match commit.filter(|commit| !commit.is_empty()) {
        Some(commit) => format!("{} ({commit})", env!("CARGO_PKG_VERSION")),
        None => env!("CARGO_PKG_VERSION").to_owned(),
    };
    // Lives as long as the program.
    let command = Cli::command().version(&*version.leak());
    match Cli::from_arg_matches(&command.get_matches()) {
        Ok(cli) => cli.execute(),
        Err(error) => error.exit(),
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SchemaLanguage {
    En,
    #[value(name = "zh-CN")]
    ZhCn,
}

impl Cli {
    fn execute(self) -> ExitCode {
        let Self { command, config, run } = self;
        if command.is_some() && run != Run::default() {
            let say = "flags of `run` stand behind it, or alone: `api-together run --daemon`, `api-together --daemon`";
            Self::command().error(ErrorKind::ArgumentConflict, say).exit()
        }
        let command = command.unwrap_or(Command::Run(run));
        let file = |config| ConfigFile::find(config);
        match command {
            Command::Run(run) => done(run.execute(&file(config))),
            Command::Check { file: Some(_) } if config.is_some() => {
                let say = "the file is named twice, by --config and without; name it once";
                Self::command().error(ErrorKind::ArgumentConflict, say).exit()
            }
            Command::Check { file: named } => check::check(&file(named.or(config))),
            Command::Import { file } => done(import(&file)),
            Command::Schema { format, language } => show(schema(format, language)),
            Command::Upgrade => tell(handover::ask(&file(config).runtime_folders())),
            Command::Reload => tell(control::ask(&file(config).runtime_folders(), &control::Request::Reload)),
            Command::Test { endpoint, json } => test::test(&file(config), endpoint, Output::new(json)),
            Command::Status { json, watch } => {
                done(status::show(&file(config).runtime_folders(), Output::new(json), watch))
            }
            Command::Models { json } => done(status::show_models(&file(config).runtime_folders(), Output::new(json))),
            Command::Log(asked) => done(log::show(&file(config), &asked)),
            Command::Keys { command } => done(keys::run(&file(config), command)),
            Command::Stop { now } => done(stop::stop(&file(config).runtime_folders(), now)),
            Command::StartSuccessor { result, socket, command } => done(Starter { result, socket, command }.run()),
            Command::Errors => show(format!("{}\n{}", reference::shapes(), reference::markdown())),
            Command::Completions { shell } => {
                let mut text = Vec::new();
                clap_complete::generate(shell, &mut Self::command(), NAME, &mut text);
                show(String::from_utf8_lossy(&text))
            }
            Command::Man => match manual::page(&Self::command()) {
                Ok(page) => show(String::from_utf8_lossy(&page)),
                Err(error) => fail(&error.to_string()),
            },
            Command::Demo => done(demo::run()),
        }
    }
}

fn import(file: &Path) -> Result<(), String> {
    let imported = config::import(file).map_err(|problems| problems.to_string())?;
    println!("{:#}", imported.config);
    for note in imported.notes {
        eprintln!("{note}");
    }
    Ok(())
}

fn schema(format: SchemaFormat, language: SchemaLanguage) -> String {
    match (format, language) {
        (SchemaFormat::Json, _) => format!("{:#}\n", config::schema()),
        (SchemaFormat::Markdown, SchemaLanguage::En) => config::schema_markdown(Language::English),
        (SchemaFormat::Markdown, SchemaLanguage::ZhCn) => config::schema_markdown(Language::Chinese),
    }
}

fn show(text: impl std::fmt::Display) -> ExitCode {
    print!("{text}");
    ExitCode::SUCCESS
}

/// Prints what the running process says.
fn tell(told: Result<String, String>) -> ExitCode {
    done(told.map(|told| println!("{told}")))
}

fn done(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => fail(&why),
    }
}

/// Prints the reason why nothing runs on standard error.
fn fail(why: &str) -> ExitCode {
    const ERROR: Style = AnsiColor::Red.on_default().bold();
    eprintln!("{ERROR}error{ERROR:#}: {why}");
    ExitCode::FAILURE
}
