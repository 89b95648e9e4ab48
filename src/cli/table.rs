//! Tables in plain text.

use std::fmt::Write as _;

use anstyle::Style;

const HEAD: Style = Style::new().bold();
/// Space between two columns.
const GAP: usize = 2;

/// Rows of one table, each with as many cells as the head.
#[derive(Debug)]
pub(super) struct Table {
    rows: Vec<Vec<Cell>>,
    /// Least widths of the columns.
    least: Vec<usize>,
}

#[derive(Debug)]
struct Cell {
    text: String,
    style: Style,
}

impl Table {
    /// A table without rows.
    pub(super) fn new(head: &[&str]) -> Self {
        let head = head.iter().map(|text| Cell { text: (*text).to_owned(), style: HEAD }).collect();
        Self { rows: vec![head], least: Vec::new() }
    }

    /// Adds a row.
    pub(super) fn row(&mut self, cells: Vec<(String, Style)>) {
        self.rows.push(cells.into_iter().map(|(text, style)| Cell { text, style }).collect());
    }

    /// True if it has only its head.
    pub(super) fn is_empty(&self) -> bool {
        self.rows.len() <= 1
    }

    /// Makes columns as wide as those of another table, at least.
    pub(super) fn widen(&mut self, widths: &[usize]) {
        self.least = widths.to_vec();
    }

    /// The widths of its columns.
    pub(super) fn widths(&self) -> Vec<usize> {
        let columns = self.rows.first().map_or(0, Vec::len);
        let cells = |column: usize| self.rows.iter().filter_map(move |row| row.get(column)).map(Cell::width);
        (0..columns).map(|column| cells(column).chain(self.least.get(column).copied()).max().unwrap_or(0)).collect()
    }

    /// The text, in which each column is as wide as its widest cell.
    pub(super) fn text(&self) -> String {
        let widths = self.widths();
        let mut text = String::new();
        for row in &self.rows {
            for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let Cell { text: shown, style } = cell;
                // Writing to a string cannot fail.
                write!(text, "{style}{shown}{style:#}").unwrap_or_default();
                if index + 1 < row.len() {
                    text.extend(std::iter::repeat_n(' ', width - cell.width() + GAP));
                }
            }
            // Empty cells at the end of a row.
            text.truncate(text.trim_end_matches(' ').len());
            text.push('\n');
        }
        text
    }
}

impl Cell {
    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["NAME", "N"]);
        for (name, number) in [("a", "10000"), ("深度求索-long", "1")] {
            table.row(vec![(name.to_owned(), Style::new()), (number.to_owned(), Style::new())]);
        }
        let plain = anstream::adapter::strip_str(&table.text()).to_string();
        assert_eq!(plain, "NAME       N\na          10000\n深度求索-long  1\n");
    }
}
