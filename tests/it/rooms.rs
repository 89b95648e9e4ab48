//! The order of the rooms of `src/`: each imports only rooms below it, and only a few of them import Pingora.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Every room, from the top down. `src/lib.rs` and `ARCHITECTURE.md` show the same order.
const ROOMS: [&str; 22] = [
    "cli",
    "server",
    "proxy",
    "console",
    "admin",
    "process",
    "billing",
    "exchange",
    "routing",
    "ledger",
    "request_log",
    "telemetry",
    "response",
    "usage",
    "upstream",
    "request",
    "fault",
    "limit",
    "json",
    "config",
    "database",
    "simulator",
];

/// Files and folders that may import Pingora.
const ON_PINGORA: [&str; 9] = [
    "server/",
    "proxy/",
    "exchange/kept.rs",
    "exchange/session.rs",
    "exchange/hold.rs",
    "exchange/outlet.rs",
    "exchange/own_call.rs",
    "upstream/",
    "request/guesses.rs",
];

/// Files and folders that read no clock, no file and no socket.
const PURE: [&str; 15] = [
    "exchange/judge.rs",
    "exchange/timers.rs",
    "routing/balance.rs",
    "routing/health.rs",
    "routing/retry.rs",
    "routing/router.rs",
    "response/",
    "usage/",
    "limit/calendar.rs",
    "limit/period.rs",
    "limit/promise.rs",
    "limit/quota.rs",
    "limit/window.rs",
    "json/",
    "fault/",
];
const IMPURE: [&str; 5] = ["Instant::now", "SystemTime::now", "tokio::", "std::fs", "std::net"];

/// A source file: its path below `src/`, and its code without comments and tests.
struct Source {
    path: String,
    code: String,
}

impl Source {
    fn room(&self) -> &str {
        self.path.split('/').next().map_or("", |first| first.trim_end_matches(".rs"))
    }

    fn is_within(&self, places: &[&str]) -> bool {
        places.iter().any(|place| self.path == *place || place.ends_with('/') && self.path.starts_with(place))
    }

    /// Rooms that it imports or names.
    fn imports(&self) -> BTreeSet<&str> {
        let word = |text: &str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
        let mut rooms = BTreeSet::new();
        for (_, after) in self.code.match_indices("crate::").map(|(at, path)| (at, &self.code[at + path.len()..])) {
            match after.strip_prefix('{') {
                None => drop(rooms.insert(&after[..word(after)])),
                Some(list) => {
                    let mut depth = 0;
                    for part in list.split_inclusive(['{', '}', ',']) {
                        if depth == 0 {
                            let part = part.trim_start();
                            rooms.insert(&part[..word(part)]);
                        }
                        match part.chars().last() {
                            Some('{') => depth += 1,
                            Some('}') if depth == 0 => break,
                            Some('}') => depth -= 1,
                            _ => {}
                        }
                    }
                }
            }
        }
        rooms.retain(|room| !room.is_empty());
        rooms
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<Source> {
    let (mut folders, mut files) = (vec![root().join("src")], Vec::<PathBuf>::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() { folders.push(entry) } else { files.push(entry) }
        }
    }
    let is_code = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "rs");
    let is_test = |path: &PathBuf| path.ends_with("tests.rs") || path.ends_with("test_support.rs");
    let source = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        let (code, _) = text.split_once("#[cfg(test)]\nmod tests {").unwrap_or((&text, ""));
        let code: Vec<&str> = code.lines().map(|line| line.split_once("//").map_or(line, |(code, _)| code)).collect();
        let path = path.strip_prefix(root().join("src")).unwrap().to_str().unwrap().to_owned();
        Source { path, code: code.join("\n") }
    };
    let sources: Vec<Source> = files.into_iter().filter(|path| is_code(path) && !is_test(path)).map(source).collect();
    assert!(sources.len() > 80, "only {} files were found", sources.len());
    sources
}

/// Rooms of a table in a document: the first word in backticks of each row.
fn rooms_of_table(text: &str) -> Vec<&str> {
    fn first_name(line: &str) -> Option<&str> {
        line.trim_start_matches("//! ").strip_prefix("| ")?.split('`').nth(1)
    }
    text.lines()
        .filter_map(first_name)
        .map(|name| name.trim_end_matches('/'))
        .filter(|name| ROOMS.contains(name))
        .collect()
}

#[test]
fn each_room_imports_only_rooms_below_it() {
    let floor = |room: &str| ROOMS.iter().position(|known| *known == room);
    let mut arrows = BTreeSet::new();
    for source in sources().iter().filter(|source| !["lib.rs", "main.rs"].contains(&source.path.as_str())) {
        let room = source.room();
        let own = floor(room).unwrap_or_else(|| panic!("src/{} lies in no room of the table", source.path));
        assert!(!source.code.contains("super::super::"), "src/{} leaves its room by super::super", source.path);
        for imported in source.imports().into_iter().filter(|imported| *imported != room) {
            let other = floor(imported).unwrap_or_else(|| panic!("src/{} imports {imported}, no room", source.path));
            assert!(other > own, "src/{} imports {imported}, which stands above {room}", source.path);
            arrows.insert((room.to_owned(), imported.to_owned()));
        }
    }
    // A reader of imports that finds none would pass as well.
    assert!(arrows.len() > 50, "only {} arrows were found", arrows.len());
    println!("{} rooms, {} arrows", ROOMS.len(), arrows.len());
}

#[test]
fn the_documents_show_the_same_order() {
    for (name, min) in [("src/lib.rs", ROOMS.len()), ("ARCHITECTURE.md", ROOMS.len())] {
        let text = fs::read_to_string(root().join(name)).unwrap();
        assert_eq!(rooms_of_table(&text).get(..min), Some(&ROOMS[..]), "{name}");
    }
}

#[test]
fn pingora_is_imported_only_where_the_table_says() {
    let uses = |source: &Source| source.code.contains("pingora::") || source.code.contains("pingora_");
    let importers: Vec<Source> = sources().into_iter().filter(uses).collect();
    for source in &importers {
        assert!(source.is_within(&ON_PINGORA), "src/{} imports Pingora", source.path);
    }
    for place in ON_PINGORA {
        assert!(importers.iter().any(|source| source.is_within(&[place])), "{place} needs no Pingora any more");
    }
}

#[test]
fn pure_modules_read_no_clock_and_do_no_input_or_output() {
    let sources = sources();
    for source in sources.iter().filter(|source| source.is_within(&PURE)) {
        for word in IMPURE {
            assert!(!source.code.contains(word), "src/{} is pure and uses {word}", source.path);
        }
    }
    for place in PURE {
        assert!(sources.iter().any(|source| source.is_within(&[place])), "{place} is not there");
    }
}
