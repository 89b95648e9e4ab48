//! Lines of a text at which the places of its configuration begin. YAML's parser reads JSON as well.

use std::collections::HashMap;
use std::ops::Range;

use saphyr_parser::{Event, Parser};

use super::problem::join;

/// Line of each place, such as `apis[2].baseUrl`.
#[derive(Debug, Default)]
pub(super) struct Places(HashMap<String, usize>);

/// A mapping or sequence that the walk is in.
enum Inside {
    /// Path, and the key whose value comes next.
    Mapping(String, Option<String>),
    /// Path, and the number of the next item.
    Sequence(String, usize),
}

impl Inside {
    /// Path of the value that comes next; `None` if a key comes.
    fn next(&mut self) -> Option<String> {
        match self {
            Self::Mapping(path, key) => key.take().map(|key| join(path, &key)),
            Self::Sequence(path, number) => {
                *number += 1;
                Some(format!("{path}[{}]", *number - 1))
            }
        }
    }
}

/// What a walk through a text comes to.
pub(super) enum Stop<'a> {
    /// The key or the beginning of the value of a place.
    Place { path: &'a str, line: usize },
    /// A value that is no mapping or sequence, and the characters of the text that it takes.
    Scalar { path: &'a str, chars: Range<usize> },
}

/// Walks through a text, as far as it can be read. True if that is to its end, and nothing in it stands for something at another place.
pub(super) fn walk(text: &str, mut visit: impl FnMut(Stop<'_>)) -> bool {
    let mut inside: Vec<Inside> = Vec::new();
    let (mut has_ended, mut has_anchors) = (false, false);
    for (event, span) in Parser::new_from_str(text).map_while(Result::ok) {
        has_ended = matches!(event, Event::StreamEnd);
        has_anchors |= match &event {
            Event::Alias(_) => true,
            Event::Scalar(_, _, anchor, _) | Event::SequenceStart(anchor, _) | Event::MappingStart(anchor, _) => {
                *anchor > 0
            }
            _ => false,
        };
        let (line, chars) = (span.start.line(), span.start.index()..span.end.index());
        match event {
            Event::Scalar(word, ..) => match inside.last_mut() {
                Some(Inside::Mapping(path, key @ None)) => {
                    visit(Stop::Place { path: &join(path, &word), line });
                    *key = Some(word.into_owned());
                }
                Some(value) => {
                    let is_item = matches!(value, Inside::Sequence(..));
                    let path = value.next().unwrap_or_default();
                    if is_item {
                        visit(Stop::Place { path: &path, line });
                    }
                    visit(Stop::Scalar { path: &path, chars });
                }
                None => {}
            },
            Event::MappingStart(..) | Event::SequenceStart(..) => {
                let path = inside.last_mut().and_then(Inside::next).unwrap_or_default();
                visit(Stop::Place { path: &path, line });
                inside.push(match event {
                    Event::MappingStart(..) => Inside::Mapping(path, None),
                    _ => Inside::Sequence(path, 0),
                });
            }
            Event::MappingEnd | Event::SequenceEnd => drop(inside.pop()),
            Event::Alias(_) => drop(inside.last_mut().and_then(Inside::next)),
            _ => {}
        }
    }
    has_ended && !has_anchors
}

impl Places {
    /// Finds the places of a text, as far as it can be read.
    pub(super) fn of(text: &str) -> Self {
        let mut lines = HashMap::new();
        let _whole = walk(text, |stop| {
            if let Stop::Place { path, line } = stop {
                // A value's place begins at its key.
                lines.entry(path.to_owned()).or_insert(line);
            }
        });
        Self(lines)
    }

    /// Line of a place; of one that is missing, of what it is missing in.
    pub(super) fn line(&self, path: &str) -> Option<usize> {
        let mut path = path;
        loop {
            if let Some(line) = self.0.get(path) {
                return Some(*line);
            }
            let (above, _) = path.rsplit_once(['.', '['])?;
            path = above;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_json_and_yaml_have_their_lines() {
        let json = "{\n\t\"server\": {\"port\":1,\n\t\t\"apiKey\" : \"x\"},\n\t\"apis\": [\n\t\t{\"id\":\"a\",\n\t\t \"models\":[\"m\",\n\t\t\"n\"]}\n\t]\n}\n";
        let places = Places::of(json);
        for (path, line) in [
            ("server", 2),
            ("server.port", 2),
            ("server.apiKey", 3),
            ("apis", 4),
            ("apis[0]", 5),
            ("apis[0].models", 6),
            ("apis[0].models[1]", 7),
            ("apis[0].apiKey", 5),
            ("server.retry.attempts", 2),
        ] {
            assert_eq!(places.line(path), Some(line), "{path}");
        }
        assert_eq!(places.line("nothing"), None);
        let yaml = "# comment\nserver:\n  port: 1\napis:\n  - id: a\n    modelMapping:\n      gpt-3.5: b\n  - {id: b,\n     rpm: 2}\n";
        let places = Places::of(yaml);
        for (path, line) in [
            ("server.port", 3),
            ("apis[0].id", 5),
            ("apis[0].modelMapping[\"gpt-3.5\"]", 7),
            ("apis[1]", 8),
            ("apis[1].rpm", 9),
        ] {
            assert_eq!(places.line(path), Some(line), "{path}");
        }
    }

    #[test]
    fn what_is_no_configuration_has_no_places_and_does_no_harm() {
        for text in ["", "[", "{\"a\":", "a: b: c", "- - - -", "\u{0}", "&a [*a]", "{? [a]: b}"] {
            Places::of(text);
        }
    }
}
