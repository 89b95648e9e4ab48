//! Budgets of a key: what its requests may take in an hour, a day or longer, in US dollars or tokens.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checked::Check;
use super::client_keys::moment;
use super::file::{BudgetFile, LIMIT_MAX, RaiseFile};
use super::prices::nano;
use super::problem::join;
use super::server::timezone;

/// Budgets of one key.
pub(super) const BUDGETS_MAX: usize = 12;
/// Raises of one budget that are kept; of those that are over, the oldest leave first.
pub(crate) const RAISES_MAX: usize = 32;
/// Dollars of a budget.
pub(super) const USD_MAX: u32 = 1_000_000_000;

/// What a budget counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BudgetUnit {
    /// 1e-9 US dollars.
    NanoUsd,
    /// Tokens.
    Tokens,
}

/// The time that a budget is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, JsonSchema)]
pub enum BudgetPeriod {
    /// A clock hour.
    #[serde(rename = "hour")]
    Hour,
    /// Five hours from the first request on.
    #[serde(rename = "5h")]
    FiveHours,
    /// A calendar day.
    #[serde(rename = "day")]
    Day,
    /// A week, from Monday on.
    #[serde(rename = "week")]
    Week,
    /// A calendar month.
    #[serde(rename = "month")]
    Month,
    /// All time.
    #[serde(rename = "total")]
    Total,
}

impl BudgetPeriod {
    const ALL: [Self; 6] = [Self::Hour, Self::FiveHours, Self::Day, Self::Week, Self::Month, Self::Total];

    /// Its word in the config.
    pub fn word(self) -> &'static str {
        match self {
            Self::Hour => "hour",
            Self::FiveHours => "5h",
            Self::Day => "day",
            Self::Week => "week",
            Self::Month => "month",
            Self::Total => "total",
        }
    }

    /// The period of this word.
    pub fn named(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|period| period.word() == word)
    }
}

/// More of a budget, for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raise {
    /// How much more, in the budget's unit.
    pub by: u64,
    /// Until when.
    pub until: Timestamp,
}

/// A budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    /// What it counts.
    pub unit: BudgetUnit,
    /// How much of it there is, without raises.
    pub limit: u64,
    /// The time that it is for.
    pub period: BudgetPeriod,
    /// Time zone of that.
    pub timezone: TimeZone,
    /// The share that is warned at, in thousandths.
    pub warn_at: Option<u64>,
    /// More of it, for a while.
    pub raises: Vec<Raise>,
}

/// What becomes of a stream that takes more than could be foreseen, once the budget has no room for that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum OnOverrun {
    /// It goes on to its end, and the budget is passed by as much.
    #[default]
    Finish,
    /// It is cut off.
    Cut,
}

/// Checks the budgets of a key. `around`: the time zone of the server.
pub(super) fn budgets(
    typed: Option<Vec<BudgetFile>>,
    path: &str,
    around: &TimeZone,
    check: &mut Check<'_>,
) -> Vec<Budget> {
    let typed = typed.unwrap_or_default();
    if typed.len() > BUDGETS_MAX {
        let message = format!("has {} entries", typed.len());
        check.report.error(path, message, &format!("use {BUDGETS_MAX} at most, each of another unit or period"));
    }
    let mut budgets: Vec<Budget> = Vec::with_capacity(typed.len());
    for (index, typed) in typed.into_iter().enumerate() {
        let path = format!("{path}[{index}]");
        let Some(budget) = budget(typed, &path, around, check) else { continue };
        if budgets.iter().any(|other| (other.unit, other.period) == (budget.unit, budget.period)) {
            let message = format!("is a second budget of the same unit for {}", budget.period.word());
            check.report.error(&path, message, "what was spent is kept by unit and period, so leave one of them out");
        }
        budgets.push(budget);
    }
    budgets
}

fn budget(typed: BudgetFile, path: &str, around: &TimeZone, check: &mut Check<'_>) -> Option<Budget> {
    let at = |key: &str| join(path, key);
    let hint = "write `usd` or `tokens`, such as { \"usd\": 10, \"per\": \"month\" }";
    let unit = match (typed.usd, typed.tokens) {
        (Some(_), None) => Some(BudgetUnit::NanoUsd),
        (None, Some(_)) => Some(BudgetUnit::Tokens),
        (None, None) => {
            check.report.error(path, "does not say how much", hint);
            None
        }
        (Some(_), Some(_)) => {
            check.report.error(path, "has two amounts", "write two budgets, one for each");
            None
        }
    };
    let limit = match unit? {
        BudgetUnit::NanoUsd => amount_of_usd(typed.usd, &at("usd"), check),
        BudgetUnit::Tokens => amount_of_tokens(typed.tokens, &at("tokens"), check),
    };
    let period = typed.per.as_deref().and_then(BudgetPeriod::named);
    if period.is_none() {
        let words: Vec<&str> = BudgetPeriod::ALL.into_iter().map(BudgetPeriod::word).collect();
        let message = typed.per.as_ref().map_or_else(|| "is missing".to_owned(), |per| format!("is {per:?}"));
        check.report.error(&at("per"), message, &format!("use one of {}", words.join(", ")));
    }
    let zone = timezone(typed.timezone.as_deref(), &at("timezone"), check)?.unwrap_or_else(|| around.clone());
    let warn_at = typed.warn_at.and_then(|share| {
        let is_share = share > 0.0 && share <= 1.0;
        if !is_share {
            check.report.error(&at("warnAt"), format!("is {share}"), "write a share of the budget, such as 0.8");
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is a share")]
        is_share.then(|| (share * 1000.0).round() as u64)
    });
    let mut raises = Vec::new();
    for (index, typed) in typed.raises.unwrap_or_default().into_iter().enumerate() {
        raises.extend(raise(&typed, unit?, &format!("{}[{index}]", at("raises")), around, check));
    }
    Some(Budget { unit: unit?, limit: limit?, period: period?, timezone: zone, warn_at, raises })
}

fn raise(typed: &RaiseFile, unit: BudgetUnit, path: &str, around: &TimeZone, check: &mut Check<'_>) -> Option<Raise> {
    let by = match unit {
        BudgetUnit::NanoUsd => amount_of_usd(typed.by, &join(path, "by"), check),
        #[expect(clippy::cast_possible_truncation, reason = "it is checked")]
        BudgetUnit::Tokens => amount_of_tokens(typed.by.map(|by| by as i64), &join(path, "by"), check),
    };
    let until = moment(typed.until.as_deref(), &join(path, "until"), around, check)?;
    if until.is_none() {
        check.report.error(&join(path, "until"), "is missing", "write a day or a moment, such as 2027-03-31");
    }
    Some(Raise { by: by?, until: until? })
}

fn amount_of_usd(typed: Option<f64>, path: &str, check: &mut Check<'_>) -> Option<u64> {
    let dollars = typed.filter(|dollars| *dollars > 0.0 && *dollars <= USD_MAX.into());
    if dollars.is_none() {
        check.report.error(path, "is no amount of US dollars", &format!("write a number above 0, {USD_MAX} at most"));
    }
    dollars.map(nano)
}

fn amount_of_tokens(typed: Option<i64>, path: &str, check: &mut Check<'_>) -> Option<u64> {
    let tokens = typed.filter(|tokens| (1..=LIMIT_MAX).contains(tokens));
    if tokens.is_none() {
        check.report.error(path, "is no number of tokens", "write a whole number above 0");
    }
    tokens.and_then(|tokens| u64::try_from(tokens).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::{config_of, problems_of};
    use serde_json::{Value, json};

    fn key(budget: &Value) -> Value {
        json!({ "keys": [{ "name": "ada", "key": "sk-ada-0f6c1d93be5a7724", "budget": budget }] })
    }

    #[test]
    fn budgets_are_read_with_their_periods_and_raises() {
        let typed = json!([
            { "usd": 2.5, "per": "day", "timezone": "Asia/Shanghai", "warnAt": 0.8,
              "raises": [{ "by": 0.5, "until": "2027-03-31T00:00:00Z" }] },
            { "tokens": 1_000_000, "per": "5h" },
        ]);
        let config = config_of(&key(&typed), "[]");
        let [usd, tokens] = &config.server.keys[0].budgets[..] else { panic!("two") };
        assert_eq!((usd.unit, usd.limit, usd.period), (BudgetUnit::NanoUsd, 2_500_000_000, BudgetPeriod::Day));
        assert_eq!((usd.warn_at, usd.timezone.iana_name()), (Some(800), Some("Asia/Shanghai")));
        assert_eq!(usd.raises, [Raise { by: 500_000_000, until: "2027-03-31T00:00:00Z".parse().unwrap() }]);
        assert_eq!(
            (tokens.unit, tokens.limit, tokens.period),
            (BudgetUnit::Tokens, 1_000_000, BudgetPeriod::FiveHours)
        );
    }

    #[test]
    fn what_is_wrong_with_a_budget_is_named() {
        for (wrong, place) in [
            (json!([{ "per": "day" }]), "budget[0]"),
            (json!([{ "usd": 1, "tokens": 1, "per": "day" }]), "budget[0]"),
            (json!([{ "usd": 0, "per": "day" }]), "usd"),
            (json!([{ "tokens": 0, "per": "day" }]), "tokens"),
            (json!([{ "usd": 1 }]), "per"),
            (json!([{ "usd": 1, "per": "day", "warnAt": 0 }]), "warnAt"),
            (json!([{ "usd": 1, "per": "day", "timezone": "Mars" }]), "timezone"),
            (json!([{ "usd": 1, "per": "day" }, { "usd": 2, "per": "day" }]), "budget[1]"),
            (json!([{ "usd": 1, "per": "day", "raises": [{ "by": 1 }] }]), "until"),
            (json!([{ "usd": 1, "per": "day", "raises": [{ "by": -1, "until": "2027-03-31" }] }]), "by"),
        ] {
            let problems = problems_of(&key(&wrong));
            assert!(problems.contains(place), "{wrong}: {problems}");
        }
        let unknown = problems_of(&key(&json!([{ "usd": 1, "per": "year" }])));
        assert!(unknown.contains("per") && unknown.contains("`month`"), "{unknown}");
    }
}
