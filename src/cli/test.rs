//! `api-together test`: whether the endpoints answer, and if not, why.

use std::process::ExitCode;

use anstream::{eprintln, println};
use anstyle::{AnsiColor, Style};

use super::fail;
use super::files::ConfigFile;
use super::status::Output;
use crate::config::{self, Environment, Flags};
use crate::server::control::{self, Request};
use crate::server::endpoint_test::{self, StepResult, Tested};
use crate::server::runtime_folder::Found;

const NAME: Style = Style::new().bold();
const GOOD: Style = AnsiColor::Green.on_default();
const UNKNOWN: Style = AnsiColor::Yellow.on_default();
const BAD: Style = AnsiColor::Red.on_default();

/// Tests endpoints of the running process, or of the config if none runs.
pub(super) fn test(file: &ConfigFile, endpoint: Option<String>, output: Output) -> ExitCode {
    let tested = match run(file, endpoint) {
        Ok(tested) => tested,
        Err(why) => return fail(&why),
    };
    match output {
        Output::Json => println!("{}", serde_json::to_string(&tested).unwrap_or_default()),
        Output::Table => show(&tested),
    }
    if tested.iter().all(Tested::is_well) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(file: &ConfigFile, endpoint: Option<String>) -> Result<Vec<Tested>, String> {
    let folders = file.runtime_folders();
    if let Ok(found) = Found::in_one_of(&folders) {
        let told = control::ask_found(&found, &Request::Test { endpoint })?;
        return serde_json::from_str(&told)
            .map_err(|error| format!("the running process answered something else: {error}"));
    }
    let environment = Environment::from_process(&file.path, &Flags::default());
    let loaded = config::load(&file.path, &environment).map_err(|problems| problems.to_string())?;
    eprintln!("no process runs with {}, so its file is tested", file.path.display());
    endpoint_test::of_config(loaded.config, endpoint.as_deref())
}

fn show(tested: &[Tested]) {
    for Tested { endpoint, base_url, steps } in tested {
        println!("{NAME}{endpoint}{NAME:#}  {base_url}");
        for step in steps {
            let (word, style) = match step.result {
                StepResult::Ok => ("ok", GOOD),
                StepResult::Unknown => ("?", UNKNOWN),
                StepResult::Failed => ("FAILED", BAD),
            };
            println!("  {style}{word:<6}{style:#}  {:<7}  {}", step.name, step.what);
            if !step.way_out.is_empty() {
                println!("{:19}{}", "", step.way_out);
            }
        }
    }
    // One may answer though one of its keys is refused.
    let well = tested.iter().filter(|tested| tested.has_answered()).count();
    println!("{well} of {} answered", tested.len());
}
