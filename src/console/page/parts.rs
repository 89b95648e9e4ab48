//! Parts that several views show: numbers, moments, bars, forms. Everything that comes from outside is text to them, never markup.

use maud::{Markup, PreEscaped, html};
use serde_json::Value;

/// A text of a value; empty if there is none.
pub(super) fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// A whole number of a value; 0 if there is none.
pub(super) fn count(value: &Value, key: &str) -> u64 {
    value.get(key).and_then(Value::as_u64).unwrap_or_default()
}

/// A number of a value.
pub(super) fn number(value: &Value, key: &str) -> Option<f64> {
    value.get(key).and_then(Value::as_f64)
}

/// A list of a value; empty if there is none.
pub(super) fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// A member of a value.
pub(super) fn member<'a>(value: &'a Value, key: &str) -> &'a Value {
    value.get(key).unwrap_or(&Value::Null)
}

/// True if a member is there, and not null.
pub(super) fn has(value: &Value, key: &str) -> bool {
    !member(value, key).is_null()
}

/// A whole number with its thousands set apart.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() * 4 / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Dollars, to a hundredth of a cent where they are few, and as far as there is something where they are very few.
pub(super) fn dollars(usd: f64) -> String {
    match usd.abs() {
        few if few > 0.0 && few < 0.001 => format!("${usd:.6}"),
        few if few > 0.0 && few < 1.0 => format!("${usd:.4}"),
        _ => format!("${usd:.2}"),
    }
}

/// Milliseconds, as people say them.
pub(super) fn duration(ms: f64) -> String {
    if ms < 10.0 {
        format!("{ms:.1} ms")
    } else if ms < 1000.0 {
        format!("{ms:.0} ms")
    } else if ms < 60_000.0 {
        format!("{:.1} s", ms / 1e3)
    } else {
        format!("{:.1} min", ms / 6e4)
    }
}

/// A part of a whole, in percent.
pub(super) fn percent(part: u64, whole: u64) -> String {
    // Tenths of a percent.
    let tenths = (part.saturating_mul(1000) + whole / 2).checked_div(whole).unwrap_or_default();
    format!("{}.{} %", tenths / 10, tenths % 10)
}

/// A moment; the script says it in the reader's time zone, and counts down to it if it is to come.
pub(super) fn moment(iso: &str) -> Markup {
    // `2027-03-31T18:00:00.000Z` becomes `2027-03-31 18:00:00 UTC`.
    let shown = iso.get(..19).map_or_else(|| iso.to_owned(), |shown| format!("{} UTC", shown.replace('T', " ")));
    html! { time datetime=(iso) { (shown) } }
}

/// A bar of which a part is used.
pub(super) fn bar(used: f64, whole: f64, label: &str) -> Markup {
    let share = if whole > 0.0 { (used / whole).clamp(0.0, 1.0) } else { 1.0 };
    let kind = if share >= 1.0 {
        "bar full"
    } else if share >= 0.8 {
        "bar near"
    } else {
        "bar"
    };
    html! {
        svg class=(kind) viewBox="0 0 100 6" preserveAspectRatio="none" role="img" aria-label=(label) {
            rect class="whole" width="100" height="6" {}
            rect class="used" width=(format!("{:.1}", share * 100.0)) height="6" {}
        }
    }
}

/// A state in a word, with its color. What it is stands in the word, the color only repeats it.
pub(super) fn badge(color: &str, word: &str) -> Markup {
    html! { span class={ "badge " (color) } { (word) } }
}

/// A call of the admin API that a form makes.
pub(super) struct Call<'a> {
    pub(super) method: &'static str,
    pub(super) path: String,
    pub(super) button: &'a str,
    /// A question that is asked before.
    pub(super) confirm: Option<String>,
}

/// A field that has to be filled in.
pub(super) fn needed(label: &str, name: &str, kind: &str, hint: &str) -> Markup {
    PreEscaped(field(label, name, kind, hint).0.replace("<input ", "<input required "))
}

impl Call<'_> {
    /// The form, with these fields before its button.
    pub(super) fn form(&self, fields: &Markup) -> Markup {
        html! {
            form class="call" data-method=(self.method) data-path=(self.path) data-confirm=[self.confirm.as_deref()] {
                (fields)
                button type="submit" { (self.button) }
            }
        }
    }

    /// The form without fields.
    pub(super) fn button(&self) -> Markup {
        self.form(&Markup::default())
    }
}

/// A field of a form, with its label. `kind` says what the script makes of its text: `text`, `number`, `list`, `moment`.
pub(super) fn field(label: &str, name: &str, kind: &str, hint: &str) -> Markup {
    let html_type = match kind {
        "moment" => "datetime-local",
        "number" => "number",
        _ => "text",
    };
    html! {
        label class="field" {
            span { (label) }
            input type=(html_type) name=(name) data-kind=(kind) placeholder=(hint) step="any" autocomplete="off" spellcheck="false";
        }
    }
}

/// A part of a path with whatever is special there escaped.
pub(super) fn in_path(name: &str) -> String {
    percent_encoding::utf8_percent_encode(name, percent_encoding::NON_ALPHANUMERIC).to_string()
}

/// A query with these parameters, without those that are empty.
pub(super) fn query(parameters: &[(&str, &str)]) -> String {
    let given = parameters.iter().filter(|(_, value)| !value.is_empty());
    let query = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(given).finish();
    if query.is_empty() { query } else { format!("?{query}") }
}

/// A row of a list of terms and what they are.
pub(super) fn fact(term: &str, what: &Markup) -> Markup {
    html! { div { dt { (term) } dd { (what) } } }
}

/// A text, or a dash where there is none.
pub(super) fn or_dash(text: &str) -> &str {
    if text.is_empty() { "–" } else { text }
}

/// What is said where nothing is listed.
pub(super) fn nothing(said: &str) -> Markup {
    html! { p class="nothing" { (said) } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_shown_whole() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(
            [0.0, 0.000_012, 0.00123, 0.5, 12.345].map(dollars),
            ["$0.00", "$0.000012", "$0.0012", "$0.5000", "$12.35"]
        );
        assert_eq!([0.44, 12.4, 1500.0, 90_000.0].map(duration), ["0.4 ms", "12 ms", "1.5 s", "1.5 min"]);
    }

    #[test]
    fn text_is_never_markup() {
        let evil = "\"><script>alert(1)</script>";
        for shown in [moment(evil), bar(1.0, 2.0, evil), badge("good", evil), field(evil, evil, "text", evil)] {
            assert!(!shown.0.contains("<script"), "{}", shown.0);
        }
        assert_eq!(in_path("a/b c"), "a%2Fb%20c");
        assert_eq!(query(&[("key", "a&b"), ("model", "")]), "?key=a%26b");
    }
}
