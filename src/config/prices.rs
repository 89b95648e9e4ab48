//! Prices of models, as the config has them.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use genai_prices::{Calculator, ProviderInfo};
use jiff::civil::Date;

use super::checked::Check;
use super::endpoint::check_pattern;
use super::file::PriceFile;
use super::problem::join;
use super::schema_check::likeliest;

/// Entries of `prices`.
pub(super) const PRICES_MAX: usize = 1000;

/// Price of each kind of tokens, in 1e-9 US dollars for a million of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    /// Tokens of the prompt.
    pub input: u64,
    /// Those of them that come from a cache.
    pub cached: u64,
    /// Those of them that are written to one.
    pub cache_written: u64,
    /// Audio of the prompt.
    pub audio_input: u64,
    /// Tokens of the answer.
    pub output: u64,
    /// Those of them that are reasoning.
    pub reasoning: u64,
    /// Audio of the answer.
    pub audio_output: u64,
}

/// Prices of the models that a pattern names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PriceEntry {
    /// A name, a prefix with `*` behind it, or `*`.
    pub pattern: String,
    /// The prices.
    pub rates: Rates,
    /// Day of which they are.
    pub as_of: Option<Date>,
}

impl PriceEntry {
    /// True if it is of this model.
    pub fn matches(&self, model: &str) -> bool {
        match self.pattern.strip_suffix('*') {
            Some(beginning) => model.starts_with(beginning),
            None => self.pattern == model,
        }
    }
}

/// Checks `prices`. The entries come out with the closest one first.
pub(super) fn prices(typed: Option<BTreeMap<String, PriceFile>>, path: &str, check: &mut Check<'_>) -> Vec<PriceEntry> {
    let typed = typed.unwrap_or_default();
    if typed.len() > PRICES_MAX {
        let message = format!("has {} entries", typed.len());
        check.report.error(path, message, &format!("use {PRICES_MAX} at most; a prefix covers many models"));
    }
    let mut entries = Vec::with_capacity(typed.len());
    for (pattern, typed) in typed {
        let path = join(path, &pattern);
        check_pattern(&pattern, &path, check);
        let as_of = as_of(typed.as_of.as_deref(), &join(&path, "asOf"), check);
        entries.extend(rates(&typed, &path, check).map(|rates| PriceEntry { pattern, rates, as_of }));
    }
    entries.sort_by_key(|entry| (entry.pattern.ends_with('*'), Reverse(entry.pattern.len())));
    entries
}

/// Checks the name of a provider, which the table of prices has to have.
pub(super) fn provider(typed: Option<String>, path: &str, check: &mut Check<'_>) -> Option<String> {
    let id = typed?;
    if Calculator::bundled().find_provider(Some(&id), None).is_ok_and(|found| found.is_some()) {
        return Some(id);
    }
    let known: Vec<&str> = Calculator::bundled().providers().map(ProviderInfo::id).collect();
    let hint = match likeliest(&id, &known) {
        Some(meant) => format!("did you mean `{meant}`? Or set its prices with `prices`"),
        None => format!("use one of {}, or set its prices with `prices`", known.join(", ")),
    };
    check.report.error(path, format!("{id:?} is no provider of the price table"), &hint);
    None
}

/// Bounds were checked with the shape.
fn rates(typed: &PriceFile, path: &str, check: &mut Check<'_>) -> Option<Rates> {
    let mut required = |number: Option<f64>, key: &str| {
        if number.is_none() {
            let hint = "write US dollars for a million tokens; 0 for what is free";
            check.report.error(&join(path, key), "is missing", hint);
        }
        number.map(nano)
    };
    let (input, output) = (required(typed.input, "input"), required(typed.output, "output"));
    let (input, output) = (input?, output?);
    Some(Rates {
        input,
        cached: typed.cached_input.map_or(input, nano),
        cache_written: typed.cache_write.map_or(input, nano),
        audio_input: typed.audio_input.map_or(input, nano),
        output,
        reasoning: typed.reasoning.map_or(output, nano),
        audio_output: typed.audio_output.map_or(output, nano),
    })
}

/// Dollars as 1e-9 dollars.
pub(super) fn nano(dollars: f64) -> u64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is bounded by its callers")]
    let nano = (dollars * 1e9).round() as u64;
    nano
}

fn as_of(typed: Option<&str>, path: &str, check: &mut Check<'_>) -> Option<Date> {
    let text = typed?;
    let date = text.trim().parse().ok();
    if date.is_none() {
        check.report.error(path, format!("{text:?} is no day"), "write a day such as 2026-11-30");
    }
    date
}
