//! Charts, as SVG: a line for a row of times, and stacked columns over time. They carry their numbers as text, too.

use maud::{Markup, html};

/// A small line without axes; nothing is drawn where a value is missing.
pub(super) fn sparkline(values: &[Option<f64>], label: &str) -> Markup {
    const WIDTH: f64 = 120.0;
    const HEIGHT: f64 = 24.0;
    let largest = values.iter().flatten().copied().fold(f64::MIN_POSITIVE, f64::max);
    let step = WIDTH / f64::from(u32::try_from(values.len().max(2) - 1).unwrap_or(u32::MAX));
    let mut lines: Vec<String> = Vec::new();
    let mut x = 0.0;
    let mut goes_on = false;
    for value in values {
        if let Some(value) = value {
            let point = format!("{x:.1},{:.1}", HEIGHT - 2.0 - (HEIGHT - 4.0) * value / largest);
            match lines.last_mut().filter(|_| goes_on) {
                Some(line) => {
                    line.push(' ');
                    line.push_str(&point);
                }
                None => lines.push(point),
            }
        }
        goes_on = value.is_some();
        x += step;
    }
    html! {
        svg class="spark" viewBox="0 0 120 24" role="img" aria-label=(label) {
            @for line in &lines {
                // One point alone is drawn as a dot, by a line of no length with round ends.
                polyline points=(if line.contains(' ') { line.clone() } else { format!("{line} {line}") }) {}
            }
        }
    }
}

/// A column: its label, and its parts from the bottom up, by the place of their series.
pub(super) struct Column {
    pub(super) label: String,
    pub(super) parts: Vec<(usize, f64)>,
}

impl Column {
    pub(super) fn sum(&self) -> f64 {
        self.parts.iter().map(|(_, value)| value).sum()
    }
}

/// Stacked columns. `shown` says what a value is in words.
pub(super) fn columns(columns: &[Column], names: &[String], shown: impl Fn(f64) -> String, label: &str) -> Markup {
    const HEIGHT: f64 = 160.0;
    let largest = columns.iter().map(Column::sum).fold(f64::MIN_POSITIVE, f64::max);
    let width = columns.len().max(1) * 10;
    let placed = columns.iter().enumerate().map(|(place, column)| {
        let mut y = HEIGHT;
        let parts: Vec<_> = column
            .parts
            .iter()
            .map(|(series, value)| {
                let height = HEIGHT * value / largest;
                y -= height;
                (*series, *value, y, height)
            })
            .collect();
        (place * 10 + 1, column, parts)
    });
    html! {
        svg class="columns" viewBox={ "0 0 " (width) " 160" } preserveAspectRatio="none" role="img" aria-label=(label) {
            @for (x, column, parts) in placed {
                g {
                    title { (column.label) ": " (shown(column.sum())) }
                    @for (series, value, y, height) in parts {
                        rect class={ "s" (series) } x=(x) width="8" y=(format!("{y:.2}")) height=(format!("{height:.2}")) {
                            title { (column.label) ", " (names.get(series).map_or("", String::as_str)) ": " (shown(value)) }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_not_drawn_over() {
        let line = sparkline(&[None, Some(1.0), Some(2.0), None, Some(4.0)], "times").0;
        assert_eq!(line.matches("<polyline").count(), 2, "{line}");
        assert!(line.contains("90.0") || line.contains("120.0"), "{line}");
        assert!(!line.contains("NaN"), "{line}");
        assert!(!sparkline(&[], "").0.contains("NaN"));
    }

    #[test]
    fn columns_are_as_high_as_their_values() {
        let names = ["<b>".to_owned()];
        let drawn = columns(
            &[
                Column { label: "1".into(), parts: vec![(0, 5.0)] },
                Column { label: "2".into(), parts: vec![(0, 10.0)] },
            ],
            &names,
            |value| value.to_string(),
            "x",
        );
        assert!(drawn.0.contains("height=\"80.00\"") && drawn.0.contains("height=\"160.00\""), "{}", drawn.0);
        assert!(!drawn.0.contains("<b>"), "{}", drawn.0);
    }
}
