//! Errors of syntax, shown with their line and what may have been meant.

use super::Format;
use super::problem::Problem;

/// Characters of the line that are shown to either side of the error.
const SHOWN_CHARS: usize = 50;

/// Returns the problem of a text that cannot be read. Line and column count from 1; column 0 is unknown.
pub(super) fn problem(text: &str, format: Format, (line, column): (usize, usize), message: &str) -> Problem {
    let name = match format {
        Format::Json => "JSON",
        Format::Yaml => "YAML",
    };
    let at = line.checked_sub(1).and_then(|index| text.lines().nth(index)).unwrap_or_default();
    let before = column.saturating_sub(1);
    // JSON's parser counts bytes, YAML's characters.
    let before = match format {
        Format::Json => at.get(..before),
        Format::Yaml => at.char_indices().nth(before).map_or(Some(at), |(bytes, _)| at.get(..bytes)),
    };
    let before = before.unwrap_or_default();
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

/// The line with stars in place of every value: only keys, numbers and what structures the text stay.
fn covered(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    // Behind a key, until the next entry begins.
    let mut is_value = false;
    while let Some(sign) = rest.chars().next() {
        let token = match sign {
            '"' | '\'' => quoted(rest, sign),
            _ if sign.is_whitespace() => sign.len_utf8(),
            '{' | '}' | '[' | ']' | ',' | ':' | '：' | '，' => {
                is_value = match sign {
                    ':' | '：' => true,
                    ',' | '，' | '{' | '[' => false,
                    _ => is_value,
                };
                sign.len_utf8()
            }
            _ => rest.find(|c: char| c.is_whitespace() || "{}[],\"'：，".contains(c)).unwrap_or(rest.len()),
        };
        let (token, after) = rest.split_at(token);
        rest = after;
        let is_word = !token.trim().is_empty() && !matches!(sign, '{' | '}' | '[' | ']' | ',' | ':' | '：' | '，');
        let name = token.strip_suffix(':').filter(|_| !matches!(sign, '"' | '\''));
        let is_key = !is_value && (name.is_some() || after.trim_start().starts_with([':', '：']));
        let is_plain = token.parse::<f64>().is_ok() || ["true", "false", "null", "-", "//", "#"].contains(&token);
        if is_word && !is_key && !is_plain {
            out.extend(token.chars().map(|c| if matches!(c, '"' | '\'') { c } else { '*' }));
        } else {
            out.push_str(token);
            is_value |= is_key && name.is_some();
        }
    }
    out
}

/// Length of a quoted text, its quotes included; of one that does not end, of the whole rest.
fn quoted(text: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (at, sign) in text.char_indices().skip(1) {
        match sign {
            _ if is_escaped => is_escaped = false,
            '\\' if quote == '"' => is_escaped = true,
            _ if sign == quote => return at + sign.len_utf8(),
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_a_key_is_covered() {
        for (line, shown) in [
            (r#"  "apiKey": "sk-abc" "rpm": 5"#, r#"  "apiKey": "******" "***": 5"#),
            (r#"  "port": 3001, // the port"#, r#"  "port": 3001, // *** ****"#),
            (r#"  "a": "b", "baseUrl": "https://u:p@h/v1","#, r#"  "a": "*", "baseUrl": "****************","#),
            (r#"  "apiKey": "sk-abc:second"  "x":1"#, r#"  "apiKey": "*************"  "*":1"#),
            (r#"    "mypassphraseword""#, r#"    "****************""#),
            (r#"  "a": "it\"s: x", "b": true"#, r#"  "a": "***"****", "b": true"#),
            (r#"  "a": "never ends: x"#, r#"  "a": "*************"#),
            ("  authorization: Bearer abc:", "  authorization: ****** ****"),
            ("  - id: a", "  - id: *"),
            ("  port：3001", "  port：3001"),
            ("  key：sk-abc", "  key：******"),
        ] {
            assert_eq!(covered(line), shown);
        }
    }

    #[test]
    fn the_mark_stands_under_the_character() {
        assert_eq!(excerpt("\tab: x", 3), "   ab: *\n     ^");
        let long = format!("{}}}", "1 ".repeat(200));
        let shown = excerpt(&long, 400);
        let (line, mark) = shown.split_once('\n').unwrap();
        assert_eq!(line.find('}'), mark.find('^'), "{shown}");
    }
}
