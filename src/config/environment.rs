//! The variables a configuration may name, as an explicit value: the process's own, then `.env` files.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use super::problem::Problem;
use super::{check_ordinary, read_bounded};

/// Paths of `.env` files: in the working directory and beside the configuration.
const FILE_NAME: &str = ".env";

/// Variables that win over `server.host` and `server.port`. `PORT` is the old program's, and stands behind ours.
pub(super) const HOST: &str = "API_TOGETHER_HOST";
pub(super) const PORTS: [&str; 2] = ["API_TOGETHER_PORT", "PORT"];

/// Flags of the command line that stand for variables, and win over them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// `--host`.
    pub host: Option<String>,
    /// `--port`.
    pub port: Option<u16>,
}

/// Variables by name. The first source that has a value wins; an empty value counts as none.
#[derive(Clone, Default)]
pub struct Environment {
    variables: BTreeMap<String, Variable>,
    problems: Vec<Problem>,
}

#[derive(Clone)]
struct Variable {
    value: String,
    source: String,
}

impl Environment {
    /// The flags, then the process environment, then `.env` in the working directory, then `.env` beside the
    /// configuration file. The process environment itself is never changed.
    pub fn from_process(config_path: &Path, flags: &Flags) -> Self {
        let process =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        let mut environment = Self::default();
        let [port, ..] = PORTS;
        environment.add(HOST.to_owned(), flags.host.clone().unwrap_or_default(), "--host");
        environment.add(port.to_owned(), flags.port.map(|port| port.to_string()).unwrap_or_default(), "--port");
        environment.add_all(process, &Self::files(config_path));
        environment
    }

    /// The `.env` files that are read for a configuration file, whether they are there or not.
    pub fn files(config_path: &Path) -> Vec<PathBuf> {
        let here = PathBuf::from(FILE_NAME);
        let beside = config_path.with_file_name(FILE_NAME);
        let one_file = here.canonicalize().ok() == beside.canonicalize().ok();
        if one_file { vec![here] } else { vec![here, beside] }
    }

    /// These variables and no others.
    pub fn fixed<N: Into<String>, V: Into<String>>(variables: impl IntoIterator<Item = (N, V)>) -> Self {
        let variables = variables.into_iter().map(|(name, value)| (name.into(), value.into()));
        Self::layered(variables, &[])
    }

    fn layered(process: impl Iterator<Item = (String, String)>, files: &[PathBuf]) -> Self {
        let mut environment = Self::default();
        environment.add_all(process, files);
        environment
    }

    fn add_all(&mut self, process: impl Iterator<Item = (String, String)>, files: &[PathBuf]) {
        for (name, value) in process {
            self.add(name, value, "the environment");
        }
        for file in files {
            self.add_file(file);
        }
    }

    fn add(&mut self, name: String, value: String, source: &str) {
        if !value.is_empty() {
            let source = source.to_owned();
            self.variables.entry(name).or_insert(Variable { value, source });
        }
    }

    fn add_file(&mut self, file: &Path) {
        let shown = file.display().to_string();
        let read = check_ordinary(file).and_then(|()| read_bounded(file));
        let text = match read.and_then(|bytes| String::from_utf8(bytes).map_err(io::Error::other)) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return,
            Err(error) => {
                let message = format!("cannot be read: {error}");
                self.problems.push(Problem::warning("", message).hint("it is left out").in_file(&shown));
                return;
            }
        };
        let text = text.trim_start_matches('\u{feff}');
        // Bounded, in case the parser ever fails to advance after an error.
        let entries_max = text.lines().count() + 1;
        let line_number = Cell::new(0);
        let lines = EnvLines { rest: text.as_bytes(), line_number: &line_number };
        let (mut seen, mut found) = (BTreeMap::new(), BTreeMap::new());
        for entry in dotenvy::from_read_iter(lines).take(entries_max) {
            match entry {
                Ok((name, value)) => {
                    let line = line_number.get();
                    if let Some(before) = seen.insert(name.clone(), line) {
                        let message = format!("{name} is given twice, first in line {before}");
                        let problem = Problem::warning("", message).hint("the last one counts; remove the other");
                        self.problems.push(problem.in_file(&shown).at(line, None));
                    }
                    // Of one file the last counts, as everywhere; a source before it wins.
                    found.insert(name, value);
                }
                Err(_) => self.problems.push(syntax_problem(&shown, line_number.get())),
            }
        }
        for (name, value) in found {
            self.add(name, value, &shown);
        }
    }

    /// The value of a variable.
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(|v| v.value.as_str())
    }

    /// Source of a variable's value: `the environment` or a file's path.
    pub(super) fn source(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(|v| v.source.as_str())
    }

    /// Errors of the `.env` files.
    pub(super) fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// `text` with each `${NAME}` replaced by the variable's value. `$${` stands for a plain `${`.
    pub(super) fn expand(&self, text: &str) -> Result<String, Unexpanded> {
        let mut expanded = String::with_capacity(text.len());
        let mut missing = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("${") {
            if let Some(before) = before.strip_suffix('$') {
                expanded.push_str(before);
                expanded.push_str("${");
                rest = after;
                continue;
            }
            let (name, after) = after.split_once('}').ok_or(Unexpanded::Malformed)?;
            if !is_variable_name(name) {
                return Err(Unexpanded::Malformed);
            }
            expanded.push_str(before);
            match self.value(name) {
                Some(value) => expanded.push_str(value),
                None => missing.push(name.to_owned()),
            }
            rest = after;
        }
        expanded.push_str(rest);
        if missing.is_empty() { Ok(expanded) } else { Err(Unexpanded::NotSet(missing)) }
    }
}

/// Values may be keys, so only names are shown.
impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.variables.keys()).finish()
    }
}

/// Reason why a text with `${…}` has no value.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unexpanded {
    NotSet(Vec<String>),
    Malformed,
}

impl Unexpanded {
    pub(super) fn at(&self, path: &str) -> Problem {
        match self {
            Self::NotSet(missing) => {
                let names: Vec<_> = missing
                    .iter()
                    .map(|name| format!("environment variable {name} is not set (nor in {FILE_NAME})"))
                    .collect();
                let first = missing.first().map_or("NAME", String::as_str);
                Problem::error(path, names.join("; ")).hint(format!(
                    "write {first}=… into .env; an empty value counts as not set; $${{…}} stands for a literal ${{…}}"
                ))
            }
            Self::Malformed => Problem::error(path, "has a `${` that no variable's name and `}` follow")
                .hint("write ${NAME} with letters, digits and `_`; $${ stands for a literal ${"),
        }
    }
}

fn is_variable_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// A warning, since the old program skipped such lines in silence and its users' files must go on
/// loading; a variable that is needed and thereby missing is an error where it is used. The line itself
/// may hold a key and is not shown.
fn syntax_problem(file: &str, line_number: usize) -> Problem {
    Problem::warning("", "is not NAME=value and is left out")
        .hint("put a value with spaces in quotation marks")
        .in_file(file)
        .at(line_number, None)
}

/// Hands out one line for each read. The parser's errors carry no line number, but it reads no further
/// than it has parsed.
struct EnvLines<'a> {
    rest: &'a [u8],
    line_number: &'a Cell<usize>,
}

impl Read for EnvLines<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let line = self.rest.split_inclusive(|byte| *byte == b'\n').next().unwrap_or_default();
        let count = (&*line).read(buffer)?;
        let (read, rest) = self.rest.split_at(count);
        self.rest = rest;
        if read.ends_with(b"\n") || (rest.is_empty() && count > 0) {
            self.line_number.set(self.line_number.get() + 1);
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_is_put_in_its_place() {
        let environment = Environment::fixed([("A", "1"), ("B_2", "${A}")]);
        assert_eq!(environment.expand("x${A}y${A}z").unwrap(), "x1y1z");
        // A value is not expanded again.
        assert_eq!(environment.expand("${B_2}").unwrap(), "${A}");
        assert_eq!(environment.expand("$A $ $$").unwrap(), "$A $ $$");
    }

    #[test]
    fn a_doubled_dollar_is_literal() {
        let environment = Environment::fixed([("A", "1")]);
        assert_eq!(environment.expand("$${A}").unwrap(), "${A}");
        assert_eq!(environment.expand("$$${A}").unwrap(), "$${A}");
        assert_eq!(environment.expand("$${A}${A}").unwrap(), "${A}1");
    }

    #[test]
    fn missing_and_empty_variables_are_named() {
        let environment = Environment::fixed([("EMPTY", "")]);
        let unexpanded = environment.expand("${EMPTY}${NONE}").unwrap_err();
        let problem = unexpanded.at("apis[0].apiKey");
        assert_eq!(
            problem.message,
            "environment variable EMPTY is not set (nor in .env); \
             environment variable NONE is not set (nor in .env)"
        );
        for malformed in ["${", "${}", "${A", "${1A}", "${A B}", "${A:-x}"] {
            assert_eq!(environment.expand(malformed), Err(Unexpanded::Malformed), "{malformed}");
        }
    }

    #[test]
    fn the_process_wins_over_files_and_the_first_file_over_the_second() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("first"), folder.path().join("second"));
        std::fs::write(&first, "\u{feff}A=first\nB=first # comment\nEMPTY=\n").unwrap();
        std::fs::write(&second, "A=second\nB=second\nC=\"sec ond\"\nEMPTY=second\n").unwrap();
        let process = [("A".to_owned(), "process".to_owned())].into_iter();
        let environment = Environment::layered(process, &[first.clone(), second]);
        let value = |name| environment.value(name).unwrap();
        assert_eq!([value("A"), value("B"), value("C"), value("EMPTY")], ["process", "first", "sec ond", "second"]);
        assert_eq!(environment.source("A"), Some("the environment"));
        assert_eq!(environment.source("B"), Some(first.to_str().unwrap()));
        assert!(environment.problems().is_empty());
    }

    #[test]
    fn the_env_file_beside_the_configuration_is_read_and_the_process_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(".env"), "CFG_ONLY_IN_THE_FILE=yes\n").unwrap();
        let environment = Environment::from_process(&folder.path().join("apis.json"), &Flags::default());
        assert_eq!(environment.value("CFG_ONLY_IN_THE_FILE"), Some("yes"));
        assert!(std::env::var_os("CFG_ONLY_IN_THE_FILE").is_none());
        assert_eq!(environment.source("PATH"), Some("the environment"));
    }

    #[test]
    fn a_flag_wins_over_every_variable() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(".env"), "API_TOGETHER_PORT=1\nAPI_TOGETHER_HOST=10.0.0.1\n").unwrap();
        let config = folder.path().join("apis.json");
        let of = |flags: Flags| {
            let environment = Environment::from_process(&config, &flags);
            let value = |name: &str| environment.value(name).map(str::to_owned);
            (value("API_TOGETHER_HOST").unwrap(), value("API_TOGETHER_PORT").unwrap())
        };
        assert_eq!(of(Flags::default()), ("10.0.0.1".into(), "1".into()));
        let flags = Flags { host: Some("::1".into()), port: Some(2) };
        assert_eq!(of(flags.clone()), ("::1".into(), "2".into()));
        assert_eq!(Environment::from_process(&config, &flags).source("API_TOGETHER_PORT"), Some("--port"));
    }

    #[test]
    fn a_bad_line_is_named_by_file_and_number_and_not_shown() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(".env");
        std::fs::write(&file, "A=1\n\nKEY=sk-secret with spaces\nB=2").unwrap();
        let environment = Environment::layered([].into_iter(), std::slice::from_ref(&file));
        let [problem] = environment.problems() else { panic!("{:?}", environment.problems) };
        assert_eq!((problem.file.as_deref(), problem.line), (file.to_str(), Some(3)));
        assert_eq!(problem.message, "is not NAME=value and is left out");
        assert_eq!(environment.value("B"), Some("2"));
        assert!(!format!("{environment:?}{problem:?}").contains("secret"));
    }

    #[test]
    fn of_a_name_twice_in_a_file_the_last_counts() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(".env");
        std::fs::write(&file, "A=1\nB=1\n\nA=2\nA=\n").unwrap();
        let environment = Environment::layered([].into_iter(), std::slice::from_ref(&file));
        assert_eq!((environment.value("A"), environment.value("B")), (None, Some("1")));
        let told: Vec<_> =
            environment.problems().iter().map(|problem| (problem.line, problem.message.as_str())).collect();
        let twice = |line, before| (Some(line), format!("A is given twice, first in line {before}"));
        let expected = [twice(4, 1), twice(5, 4)];
        assert_eq!(told, expected.iter().map(|(line, text)| (*line, text.as_str())).collect::<Vec<_>>());
    }

    #[test]
    fn an_unreadable_file_is_a_problem() {
        let folder = tempfile::tempdir().unwrap();
        let environment = Environment::layered([].into_iter(), &[folder.path().to_owned()]);
        assert_eq!(environment.problems().len(), 1);
    }
}
