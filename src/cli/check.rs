//! `api-together check`: everything that is wrong with a config file.

use std::process::ExitCode;

use anstream::{eprintln, println};

use super::files::ConfigFile;
use crate::config::{self, Environment, Flags, Problem, ProblemKind};
use crate::server::check_certificate;

/// Prints every problem of the file. Unknown keys are errors here.
pub(super) fn check(file: &ConfigFile) -> ExitCode {
    let shown = file.path.display();
    for warning in file.warnings() {
        eprintln!("warning: {warning}");
    }
    let environment = Environment::from_process(&file.path, &Flags::default());
    let (loaded, problems) = match config::load(&file.path, &environment) {
        Ok(loaded) => match check_certificate(&loaded.config.server) {
            Ok(()) => (true, loaded.warnings),
            Err(why) => {
                let problem = Problem { file: Some(shown.to_string()), ..Problem::error("", why) };
                (false, loaded.warnings.into_iter().chain([problem]).collect())
            }
        },
        Err(problems) => (false, problems.iter().cloned().collect()),
    };
    let wrong = |problem: &&Problem| problem.kind != ProblemKind::Warning;
    for problem in &problems {
        if wrong(&problem) { eprintln!("{problem}") } else { eprintln!("warning: {problem}") }
    }
    let errors = problems.iter().filter(wrong).count();
    if loaded && errors == 0 {
        println!("{shown}: ok");
        return ExitCode::SUCCESS;
    }
    eprintln!("{shown}: {errors} error{}", if errors == 1 { "" } else { "s" });
    ExitCode::FAILURE
}
