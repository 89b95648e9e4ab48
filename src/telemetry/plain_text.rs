//! Text from outside, as terminals and spreadsheets may have it.

/// A text on one line, without what steers a terminal or turns the direction of text.
pub(crate) fn on_one_line(text: &str) -> String {
    let steers = |c: char| c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().map(|c| if steers(c) { '\u{fffd}' } else { c }).collect()
}

/// A field by RFC 4180. One that a spreadsheet would take for a formula is kept from that: clients name models.
pub(crate) fn csv_field(field: &str) -> String {
    let is_formula = field.starts_with(['=', '+', '-', '@', '\t', '\r']);
    let field = on_one_line(field);
    let field = if is_formula { format!("'{field}") } else { field };
    if field.contains([',', '"']) { format!("\"{}\"", field.replace('"', "\"\"")) } else { field }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_send_steers_neither_terminals_nor_spreadsheets() {
        let evil = "a\u{1b}[2J\nb\u{9b}c\u{202e}d";
        assert_eq!(on_one_line(evil), "a\u{fffd}[2J\u{fffd}b\u{fffd}c\u{fffd}d");
        assert_eq!(csv_field(evil), on_one_line(evil));
        assert_eq!(csv_field("=1,\"2\""), "\"'=1,\"\"2\"\"\"");
    }
}
