//! Problems of a configuration, reported all at once and with a way out.

use std::cmp::Ordering;
use std::fmt::{self, Write as _};

use super::places::Places;
use super::secret::without_keys;

/// Severity of a [`Problem`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProblemKind {
    /// The configuration cannot be used.
    Error,
    /// It can be used, but probably does not do what was meant.
    Warning,
    /// A key that the program does not know: a warning when running, an error for `check`.
    UnknownKey,
}

impl fmt::Display for ProblemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning | Self::UnknownKey => "warning",
        })
    }
}

/// A problem and its place: `apis.json:12: endpoint "main", apis[2].baseUrl: message (hint)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file's path, once it is known.
    pub file: Option<String>,
    /// The line, from 1.
    pub line: Option<usize>,
    /// Id of the endpoint that the place is in.
    pub endpoint: Option<String>,
    /// The place in the configuration (`apis[2].baseUrl`), or empty for the whole text.
    pub path: String,
    /// Problem, as the rest of a sentence about the place.
    pub message: String,
    /// The way out.
    pub hint: Option<String>,
    /// The line's text with a mark, for errors of syntax.
    pub excerpt: Option<String>,
    /// Severity.
    pub kind: ProblemKind,
}

impl Problem {
    /// A problem without a hint.
    pub fn new(kind: ProblemKind, path: impl Into<String>, message: impl Into<String>) -> Self {
        let (file, line, endpoint, excerpt) = (None, None, None, None);
        Self { file, line, endpoint, path: path.into(), message: message.into(), hint: None, excerpt, kind }
    }

    /// A problem that keeps the configuration from being used.
    pub fn error(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(ProblemKind::Error, path, message)
    }

    /// A problem with which the configuration can still be used.
    pub fn warning(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(ProblemKind::Warning, path, message)
    }

    /// Adds the way out.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl Problem {
    /// Names the file, unless the problem is another one's.
    #[must_use]
    pub(super) fn in_file(mut self, file: &str) -> Self {
        self.file.get_or_insert_with(|| file.to_owned());
        self
    }

    /// Adds the line, and its text with a mark.
    #[must_use]
    pub(super) fn at(mut self, line: usize, excerpt: Option<String>) -> Self {
        (self.line, self.excerpt) = (Some(line), excerpt);
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, self.line) {
            (Some(file), Some(line)) => write!(f, "{file}:{line}: ")?,
            (Some(file), None) => write!(f, "{file}: ")?,
            (None, Some(line)) => write!(f, "line {line}: ")?,
            (None, None) => {}
        }
        let mut said = String::new();
        if let Some(endpoint) = &self.endpoint {
            write!(said, "endpoint {endpoint:?}, ")?;
        }
        if !self.path.is_empty() {
            write!(said, "{}: ", self.path)?;
        }
        said.push_str(&self.message);
        f.write_str(&without_keys(&said))?;
        if let Some(hint) = &self.hint {
            write!(f, " ({hint})")?;
        }
        match &self.excerpt {
            Some(excerpt) => write!(f, "\n{excerpt}"),
            None => Ok(()),
        }
    }
}

/// Everything found wrong in a configuration that cannot be used, warnings included: an unknown key is
/// often the reason why another one is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// Problems in the order of their places.
    pub fn iter(&self) -> std::slice::Iter<'_, Problem> {
        self.0.iter()
    }

    /// Names the file that the problems are in.
    pub(super) fn in_file(self, file: &str) -> Self {
        Self(self.0.into_iter().map(|problem| problem.in_file(file)).collect())
    }
}

impl<'a> IntoIterator for &'a Problems {
    type Item = &'a Problem;
    type IntoIter = std::slice::Iter<'a, Problem>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self(vec![problem])
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// Collects problems, one for each place.
#[derive(Debug, Default)]
pub(super) struct Report {
    problems: Vec<Problem>,
    broken: Vec<String>,
    endpoints: Vec<EndpointNote>,
}

/// What is known of an endpoint's entry before it is checked.
#[derive(Debug)]
pub(super) struct EndpointNote {
    /// Its id, if it has one.
    pub(super) id: Option<String>,
    /// True if it is switched off.
    pub(super) is_off: bool,
}

impl Report {
    /// Adds a problem, unless a value at or above its place was found broken before: a value that could
    /// not be read must not be called missing as well.
    pub(super) fn add(&mut self, problem: Problem) {
        if !self.broken.iter().any(|above| covers(above, &problem.path)) {
            self.problems.push(problem);
        }
    }

    /// Adds an error, and drops later problems of the same place.
    pub(super) fn add_broken(&mut self, problem: Problem) {
        let path = problem.path.clone();
        self.add(problem);
        self.broken.push(path);
    }

    pub(super) fn error(&mut self, path: &str, message: impl Into<String>, hint: &str) {
        self.add(Problem::error(path, message).hint(hint));
    }

    pub(super) fn warning(&mut self, path: &str, message: impl Into<String>, hint: &str) {
        self.add(Problem::warning(path, message).hint(hint));
    }

    /// True if there is neither an error nor a warning.
    pub(super) fn is_empty(&self) -> bool {
        self.problems.is_empty()
    }

    /// The first error.
    pub(super) fn first(self) -> Option<Problem> {
        self.problems.into_iter().find(|problem| problem.kind == ProblemKind::Error)
    }

    /// Notes what is known of the endpoints' entries.
    pub(super) fn note_endpoints(&mut self, endpoints: Vec<EndpointNote>) {
        self.endpoints = endpoints;
    }

    /// True if the endpoint at this place is switched off. It need not be finished then.
    pub(super) fn is_off(&self, index: usize) -> bool {
        self.endpoints.get(index).is_some_and(|endpoint| endpoint.is_off)
    }

    /// The warnings, or everything if there is an error, each with its line in the text.
    pub(super) fn finish(mut self, text: &str) -> Result<Vec<Problem>, Problems> {
        let places = if self.problems.is_empty() { Places::default() } else { Places::of(text) };
        for problem in self.problems.iter_mut().filter(|problem| problem.file.is_none()) {
            if problem.line.is_none() && !problem.path.is_empty() {
                problem.line = places.line(&problem.path);
            }
            let Some(endpoint) = endpoint_of(&problem.path).and_then(|index| self.endpoints.get(index)) else {
                continue;
            };
            problem.endpoint.clone_from(&endpoint.id);
            if endpoint.is_off {
                problem.kind = ProblemKind::Warning;
            }
        }
        self.problems.sort_by(|a, b| natural_order(&a.path, &b.path));
        if self.problems.iter().any(|p| p.kind == ProblemKind::Error) {
            return Err(Problems(self.problems));
        }
        Ok(self.problems)
    }
}

/// The number of the endpoint that a place is in.
fn endpoint_of(path: &str) -> Option<usize> {
    path.strip_prefix("apis[")?.split_once(']')?.0.parse().ok()
}

fn covers(above: &str, path: &str) -> bool {
    path.strip_prefix(above).is_some_and(|rest| rest.is_empty() || above.is_empty() || rest.starts_with(['.', '[']))
}

/// Like text, but `apis[2]` before `apis[10]`.
fn natural_order(a: &str, b: &str) -> Ordering {
    let split = |text: &str| -> Vec<(String, u64)> {
        text.split('[')
            .map(|part| match part.split_once(']') {
                Some((index, rest)) => (rest.to_owned(), index.parse().unwrap_or(u64::MAX)),
                None => (part.to_owned(), 0),
            })
            .collect()
    };
    let key =
        |text: &str| -> Vec<(u64, String)> { split(text).into_iter().map(|(rest, index)| (index, rest)).collect() };
    key(a).cmp(&key(b)).then_with(|| a.cmp(b))
}

/// `apis[0]` + `baseUrl` = `apis[0].baseUrl`; a key that is not a plain word is quoted in brackets.
pub(super) fn join(path: &str, key: &str) -> String {
    let plain = !key.is_empty() && key.chars().all(|c| c.is_alphanumeric() || "_$-".contains(c));
    match (plain, path.is_empty()) {
        (true, true) => key.to_owned(),
        (true, false) => format!("{path}.{key}"),
        (false, _) => format!("{path}[{key:?}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_prints_place_message_and_hint() {
        let problem = Problem::error("apis[2].baseUrl", "is missing").hint("add it");
        assert_eq!(problem.to_string(), "apis[2].baseUrl: is missing (add it)");
        assert_eq!(Problem::error("", "no").to_string(), "no");
        let problems = Problems(vec![problem, Problem::error("", "no")]);
        assert_eq!(problems.to_string(), "apis[2].baseUrl: is missing (add it)\nno");
    }

    #[test]
    fn a_broken_place_is_not_reported_twice() {
        let mut report = Report::default();
        report.add_broken(Problem::error("apis[1]", "expected an object"));
        report.error("apis[1].id", "is missing", "");
        report.error("apis[1]", "is odd", "");
        report.error("apis[10].id", "is missing", "");
        report.error("apis[0].id", "is missing", "");
        let paths: Vec<_> = report.finish("").unwrap_err().iter().map(|p| p.path.clone()).collect();
        assert_eq!(paths, ["apis[0].id", "apis[1]", "apis[10].id"]);
    }

    #[test]
    fn places_sort_by_number() {
        let mut paths = ["server.port", "apis[10].id", "apis[2].name", "apis", "", "apis[2].id"];
        paths.sort_by(|a, b| natural_order(a, b));
        assert_eq!(paths, ["", "apis", "apis[2].id", "apis[2].name", "apis[10].id", "server.port"]);
    }

    #[test]
    fn odd_keys_are_quoted_in_a_path() {
        assert_eq!(join("", "apis"), "apis");
        assert_eq!(join("apis[0]", "名字"), "apis[0].名字");
        assert_eq!(join("a", "gpt-3.5"), "a[\"gpt-3.5\"]");
        assert_eq!(join("a", "x\n"), "a[\"x\\n\"]");
    }
}
