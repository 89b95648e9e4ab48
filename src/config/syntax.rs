//! Errors of syntax, shown with their line and what may have been meant.

use super::Format;
use super::problem::Problem;

/// Characters of the line that are shown to either side of the error.
const SHOWN_CHARS: usize = 50;
/// Words as long as this may be keys.
const SECRET_CHARS_MIN: usize = 12;

/// Returns the problem of a text that cannot be read. Line and column count from 1; column 0 is unknown.
pub(super) fn problem(text: &str, format: Format, (line, column): (usize, usize), message: &str) -> Problem {
    let name = match format {
        Format::Json => "JSON",
        Format::Yaml => "YAML",
    };
    let at = line.checked_sub(1).and_then(|index| text.lines().nth(index)).unwrap_or_default();
    let before = at.get(..column.saturating_sub(1)).unwrap_or_default();
    let found = at.get(before.len()..).and_then(|rest| rest.chars().next());
    let problem = Problem::error("", format!("is not valid {name}: {message}"));
    let problem = match hint(text, format, at, before, found, message) {
        Some(hint) => problem.hint(hint),
        None => problem,
    };
    if line == 0 || at.trim().is_empty() {
        problem
    } else {
        problem.at(line, Some(excerpt(at, before.chars().count())))
    }
}

/// What may have been meant.
fn hint(
    text: &str,
    format: Format,
    at: &str,
    before: &str,
    found: Option<char>,
    message: &str,
) -> Option<&'static str> {
    if text.trim().is_empty() {
        return Some("it is empty; copy conf/apis.example.json into it");
    }
    if [before.chars().next_back(), found].into_iter().flatten().any(is_of_another_keyboard) {
        return Some("there are full-width or curly signs; write plain ones: \" : , { } [ ]");
    }
    match format {
        Format::Yaml if at.contains('\t') => Some("indent by spaces, not by tabs"),
        Format::Yaml if text.contains('：') => Some("`：` is a full-width colon; write `: `"),
        Format::Yaml => None,
        Format::Json => {
            let rest = at.get(before.len()..).unwrap_or_default();
            let last = before.trim_end().chars().next_back().or_else(|| last_before(text, at));
            match found {
                Some('/' | '#') if rest.starts_with("//") || rest.starts_with("/*") || rest.starts_with('#') => Some(
                    "JSON has no comments; take it out, or write the file as YAML (apis.yaml), which has them behind `#`",
                ),
                Some('\'') => Some("JSON has text in double quotes: \"…\""),
                Some('}' | ']') if last == Some(',') || message.contains("trailing comma") => {
                    Some("take the comma before it out")
                }
                _ if !text.trim_start().starts_with(['{', '[']) => {
                    Some("it does not begin with {; if it is YAML, let its name end in .yaml")
                }
                Some(c) if message.contains("key must be a string") && (c.is_alphanumeric() || c == '_') => {
                    Some("put the key in double quotes")
                }
                _ if message.contains("expected `,`") => Some("is there a comma missing before it?"),
                _ if message.contains("EOF") => {
                    Some("it ends too early; is there a bracket or a quotation mark missing?")
                }
                _ => None,
            }
        }
    }
}

/// The last sign that stands before a line.
fn last_before(text: &str, line: &str) -> Option<char> {
    let begin = (line.as_ptr() as usize).checked_sub(text.as_ptr() as usize)?;
    text.get(..begin)?.trim_end().chars().next_back()
}

fn is_of_another_keyboard(sign: char) -> bool {
    matches!(
        sign,
        '“' | '”'
            | '„'
            | '‘'
            | '’'
            | '«'
            | '»'
            | '：'
            | '，'
            | '｛'
            | '｝'
            | '［'
            | '］'
            | '＂'
            | '＇'
            | '、'
            | '\u{a0}'
            | '\u{3000}'
    )
}

/// The line around a character, with a mark under it. What may be a key is covered.
fn excerpt(line: &str, at: usize) -> String {
    let covered = covered(line);
    let from = at.saturating_sub(SHOWN_CHARS);
    let shown: String =
        covered.chars().skip(from).take(2 * SHOWN_CHARS).map(|c| if c == '\t' { ' ' } else { c }).collect();
    format!("  {}\n  {}^", shown.trim_end(), " ".repeat(at - from))
}

/// The line with stars in place of long words that have a digit, and of all values of keys that are secrets.
fn covered(line: &str) -> String {
    let is_of_word = |c: char| c.is_alphanumeric() || "-_+/=.~".contains(c);
    let lower = line.to_ascii_lowercase();
    let has_secret =
        ["key", "token", "secret", "password", "authorization", "headers"].iter().any(|word| lower.contains(word));
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(begin) = rest.find(is_of_word) {
        let (before, word) = rest.split_at(begin);
        out.push_str(before);
        let end = word.find(|c| !is_of_word(c)).unwrap_or(word.len());
        let (word, after) = word.split_at(end);
        let is_name = after.trim_start_matches(['"', '\'', '“', '”']).trim_start().starts_with([':', '：']);
        let may_be_key = word.chars().count() >= SECRET_CHARS_MIN && word.contains(|c: char| c.is_ascii_digit());
        let is_url = before.ends_with("://") || word.starts_with("//");
        if !is_name && !is_url && (has_secret || may_be_key) {
            out.extend(word.chars().map(|_| '*'));
        } else {
            out.push_str(word);
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_a_key_is_covered() {
        for (line, shown) in [
            (r#"  "apiKey": "sk-abc" "rpm": 5"#, r#"  "apiKey": "******" "rpm": *"#),
            (r#"  "port": 3001, // the port"#, r#"  "port": 3001, // the port"#),
            (r#"  "baseUrl": "https://api.openai.com/v1","#, r#"  "baseUrl": "https://api.openai.com/v1","#),
            (r#"  "id": "abcdefgh12345678" x"#, r#"  "id": "****************" x"#),
            ("  authorization: Bearer abc", "  authorization: ****** ***"),
        ] {
            assert_eq!(covered(line), shown);
        }
    }

    #[test]
    fn the_mark_stands_under_the_character() {
        assert_eq!(excerpt("\tab: x", 3), "   ab: x\n     ^");
        let long = format!("{}!", "x ".repeat(200));
        let shown = excerpt(&long, 400);
        let (line, mark) = shown.split_once('\n').unwrap();
        assert_eq!(line.find('!'), mark.find('^'), "{shown}");
    }
}
