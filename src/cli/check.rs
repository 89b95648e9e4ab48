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
    let (loaded, problems): (bool, Vec<Problem>) = match config::load(&file.path, &environment) {
        Ok(loaded) => {
            let server = &loaded.config.server;
            let certificate = check_certificate(server)
                .map_err(|why| vec![Problem { file: Some(shown.to_string()), ..Problem::error("", why) }]);
            let keys = config::load_keys(server).map(drop).map_err(|problems| problems.iter().cloned().collect());
            let wrong: Vec<Problem> = [certificate, keys].into_iter().filter_map(Result::err).flatten().collect();
            (wrong.is_empty(), loaded.warnings.into_iter().chain(wrong).collect())
        }
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
