//! Accounts of a caller's own key: one of all its requests, and those of models that have limits of their own.

use std::sync::Arc;

use jiff::tz::TimeZone;

use crate::config::{ClientKey, Limit, PerLimit};
use crate::ledger::{AccountId, AccountSet, Client, LimitedAccount};
use crate::limit::Limits;

/// Accounts of a caller under one config. A request counts in the sets of them once, wherever it goes and however often it is tried.
#[derive(Debug)]
pub struct CallerAccounts {
    /// Those of a request for a model without limits of its own; none if nothing is limited.
    usual: Option<Arc<AccountSet>>,
    /// By the names and prefixes that are asked for, exact names first, then the longest prefix.
    models: Vec<(Box<str>, Arc<AccountSet>)>,
}

impl CallerAccounts {
    /// The accounts of a key, whose day changes in this zone, under the config of this number.
    pub fn new(key: &ClientKey, zone: &TimeZone, (config, ledger): (u64, &Client)) -> Self {
        let account = |id: &AccountId, limits: PerLimit<Limit>| {
            let account = ledger.account(id);
            account.look_again();
            let of = LimitedAccount { account, limits: Arc::new(Limits::in_days(limits, zone)) };
            ledger.list_account(config, of.clone());
            of
        };
        if !is_limited(key) {
            return Self { usual: None, models: Vec::new() };
        }
        let whole = account(&AccountId::Caller(Arc::clone(&key.name)), key.limits);
        let of_models = |(pattern, limits): (&String, &PerLimit<Limit>)| {
            let id = AccountId::CallerModels { caller: Arc::clone(&key.name), models: pattern.as_str().into() };
            let set = AccountSet::new(vec![whole.clone(), account(&id, *limits)]);
            (pattern.as_str().into(), Arc::new(set))
        };
        let mut models: Vec<(Box<str>, Arc<AccountSet>)> = key.model_limits.iter().map(of_models).collect();
        models.sort_by_key(|(pattern, _)| (pattern.ends_with('*'), std::cmp::Reverse(pattern.len())));
        Self { usual: Some(Arc::new(AccountSet::new(vec![whole]))), models }
    }

    /// The accounts of a request for a model; none if nothing of it is limited.
    pub fn of_model(&self, model: Option<&str>) -> Option<&Arc<AccountSet>> {
        let matches = |pattern: &str| match (model, pattern.strip_suffix('*')) {
            (None, _) => false,
            (Some(model), Some(beginning)) => model.starts_with(beginning),
            (Some(model), None) => model == pattern,
        };
        let closest = self.models.iter().find(|(pattern, _)| matches(pattern)).map(|(_, set)| set);
        closest.or(self.usual.as_ref())
    }

    /// Each account with the models that it is of; none for that of all requests, which is the first.
    pub fn all(&self) -> impl Iterator<Item = &LimitedAccount> {
        let whole = self.usual.iter().filter_map(|set| set.accounts().first());
        whole.chain(self.models.iter().filter_map(|(_, set)| set.accounts().last()))
    }
}

fn is_limited(key: &ClientKey) -> bool {
    let limits = key.model_limits.values().chain([&key.limits]);
    limits.flat_map(PerLimit::each).any(|(_, limit)| limit != Limit::Unlimited)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::config_of;
    use crate::limit::Clock;
    use serde_json::{Value, json};

    fn accounts(more: &Value) -> CallerAccounts {
        let mut key = json!({ "name": "ada", "key": "sk-ada-0f6c1d93be5a7724" });
        key.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let config = config_of(&json!({ "keys": [key] }), "[]");
        CallerAccounts::new(&config.server.keys[0], &TimeZone::UTC, (1, &Client::new(Clock::read)))
    }

    fn ids(accounts: &CallerAccounts, model: Option<&str>) -> Vec<String> {
        let set = accounts.of_model(model).map_or(&[][..], |set| set.accounts());
        set.iter().map(|of| of.account.id().to_string()).collect()
    }

    #[test]
    fn the_closest_models_count_beside_the_key_itself() {
        assert!(ids(&accounts(&json!({})), Some("m")).is_empty(), "nothing is limited");
        let limited = accounts(
            &json!({ "rpm": 9, "modelLimits": { "*": { "rpm": 8 }, "gpt-4o*": { "rpd": 7 }, "gpt-4o": { "tpm": 6 } } }),
        );
        for (model, of) in [
            (Some("gpt-4o"), vec!["key ada", "key ada, model gpt-4o"]),
            (Some("gpt-4o-mini"), vec!["key ada", "key ada, model gpt-4o*"]),
            (Some("o9"), vec!["key ada", "key ada, model *"]),
            (None, vec!["key ada"]),
        ] {
            assert_eq!(ids(&limited, model), of, "{model:?}");
        }
        assert_eq!(limited.all().count(), 4);
        let of_models = accounts(&json!({ "modelLimits": { "o9": { "rpm": 1 } } }));
        assert_eq!(ids(&of_models, Some("m")), ["key ada"], "without a limit, and counted");
        assert!(!of_models.of_model(Some("m")).unwrap().is_limited());
    }
}
