//! Accounts of an endpoint: the one that all its requests count in, and those of models that have limits of their own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use jiff::tz::TimeZone;

use crate::config::{self, ModelLimits};
use crate::ledger::{Account, AccountId, AccountSet, Client, LimitedAccount};
use crate::limit::Limits;
use crate::routing::health::MODELS_MAX;

/// Accounts of an endpoint under one config.
#[derive(Debug)]
pub struct EndpointAccounts {
    /// The account of all its requests.
    whole: LimitedAccount,
    /// Accounts of requests for models without limits of their own.
    endpoint: Arc<AccountSet>,
    exact: HashMap<Box<str>, Models>,
    /// By the beginning of the name, the longest first.
    prefixes: Vec<(Box<str>, Models)>,
    singles: Singles,
}

/// The models that match a pattern.
#[derive(Debug)]
struct Models {
    /// Accounts of all of them together.
    together: Arc<AccountSet>,
    /// True if each of them has an account of its own.
    each: bool,
}

/// Accounts of single models, made when a model is first asked for. There are [`MODELS_MAX`] at most; further models share
/// the account of their pattern.
#[derive(Debug)]
struct Singles {
    /// Filled from the front and never emptied, so that readers need no lock; empty if no pattern asks for any.
    named: Box<[OnceLock<Single>]>,
    /// Held while one is added.
    adds: Mutex<()>,
    ledger: Client,
}

/// A model, and the accounts of its requests.
type Single = (Box<str>, Arc<AccountSet>);

impl EndpointAccounts {
    /// Returns the accounts of an endpoint, `account` being the one of all its requests.
    pub fn new(config: &config::Endpoint, account: &Arc<Account>, zone: &TimeZone, ledger: &Client) -> Self {
        account.look_again();
        let endpoint = LimitedAccount { account: Arc::clone(account), limits: Arc::new(Limits::new(config, zone)) };
        let mut exact: HashMap<Box<str>, Models> = HashMap::new();
        let mut prefixes = Vec::new();
        for (pattern, ModelLimits { limits, each }) in &config.model_limits {
            let limits = Arc::new(Limits::in_days_of(config, *limits, zone));
            let together = set_of_models(&endpoint, pattern, &limits, ledger);
            match pattern.strip_suffix('*') {
                Some(prefix) => prefixes.push((prefix.into(), Models { together, each: *each })),
                None => drop(exact.insert(Box::from(pattern.as_str()), Models { together, each: false })),
            }
        }
        prefixes.sort_by_key(|(prefix, _): &(Box<str>, _)| std::cmp::Reverse(prefix.len()));
        let places = if prefixes.iter().any(|(_, models)| models.each) { MODELS_MAX } else { 0 };
        let singles = Singles {
            named: std::iter::repeat_with(OnceLock::new).take(places).collect(),
            adds: Mutex::default(),
            ledger: ledger.clone(),
        };
        let whole = endpoint.clone();
        Self { whole, endpoint: Arc::new(AccountSet::new(vec![endpoint])), exact, prefixes, singles }
    }

    /// Returns the account of all its requests.
    pub fn whole(&self) -> &LimitedAccount {
        &self.whole
    }

    /// Returns the accounts of a request that names no model, or one without limits of its own.
    pub fn of_endpoint(&self) -> &Arc<AccountSet> {
        &self.endpoint
    }

    /// Returns the accounts of a request for a model. A name gets an account of its own only if it is known to be a model's,
    /// since clients can make up any number of them.
    pub fn of_model(&self, name: &str, is_known: impl FnOnce() -> bool) -> &Arc<AccountSet> {
        if name.is_empty() || !self.has_model_limits() {
            return &self.endpoint;
        }
        let by_prefix = || self.prefixes.iter().find(|(prefix, _)| name.starts_with(prefix.as_ref()));
        match self.exact.get(name).or_else(|| by_prefix().map(|(_, models)| models)) {
            None => &self.endpoint,
            Some(Models { together, each: false }) => together,
            Some(Models { together, each: true }) => self.singles.of(name, is_known, together).unwrap_or(together),
        }
    }

    /// True if there are models with limits of their own.
    pub fn has_model_limits(&self) -> bool {
        !self.exact.is_empty() || !self.prefixes.is_empty()
    }

    /// Returns the accounts of models, first those of the patterns.
    pub fn models(&self) -> impl Iterator<Item = &LimitedAccount> {
        let patterns = self.exact.values().chain(self.prefixes.iter().map(|(_, models)| models));
        let together = patterns.map(|models| &models.together);
        together.chain(self.singles.all().map(|(_, set)| set)).filter_map(|set| set.accounts().last())
    }

    /// Returns every account, the endpoint's first.
    pub fn all(&self) -> impl Iterator<Item = &LimitedAccount> {
        std::iter::once(&self.whole).chain(self.models())
    }
}

impl Singles {
    fn all(&self) -> impl Iterator<Item = &Single> {
        self.named.iter().map_while(OnceLock::get)
    }

    /// Returns the accounts of a model, with the limits of its pattern; `None` if it is not known, or there is no room for it.
    fn of(&self, name: &str, is_known: impl FnOnce() -> bool, pattern: &AccountSet) -> Option<&Arc<AccountSet>> {
        let found = || self.all().find(|(known, _)| known.as_ref() == name).map(|(_, set)| set);
        found().or_else(|| {
            if !is_known() {
                return None;
            }
            let _adds = self.adds.lock().unwrap_or_else(PoisonError::into_inner);
            found().or_else(|| self.add(name, pattern))
        })
    }

    fn add(&self, name: &str, pattern: &AccountSet) -> Option<&Arc<AccountSet>> {
        let free = self.named.iter().find(|place| place.get().is_none())?;
        let [endpoint, together] = pattern.accounts() else { return None };
        let set = set_of_models(endpoint, name, &together.limits, &self.ledger);
        if let Some(account) = set.accounts().last() {
            self.ledger.add_account(account.clone());
        }
        Some(&free.get_or_init(|| (name.into(), set)).1)
    }
}

/// The set of an endpoint's account and one of some of its models.
fn set_of_models(endpoint: &LimitedAccount, models: &str, limits: &Arc<Limits>, ledger: &Client) -> Arc<AccountSet> {
    let id = AccountId::Models { endpoint: Arc::clone(endpoint.account.id().endpoint()), models: models.into() };
    let account = ledger.account(&id);
    account.look_again();
    Arc::new(AccountSet::new(vec![endpoint.clone(), LimitedAccount { account, limits: Arc::clone(limits) }]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::config;
    use crate::limit::Clock;

    fn accounts(model_limits: &str) -> EndpointAccounts {
        let config = config(&format!(r#"[{{"id":"a","modelLimits":{model_limits}}}]"#)).endpoints.remove(0);
        let ledger = Client::new(Clock::read);
        let account = ledger.account(&AccountId::Endpoint("a".into()));
        EndpointAccounts::new(&config, &account, &TimeZone::UTC, &ledger)
    }

    /// The accounts of a request for a model that is known or not, as in an error.
    fn ids(accounts: &EndpointAccounts, model: &str, known: bool) -> Vec<String> {
        accounts.of_model(model, || known).accounts().iter().map(|of| of.account.id().to_string()).collect()
    }

    #[test]
    fn the_closest_pattern_counts_and_its_models_share_an_account() {
        let accounts = accounts(r#"{"*":{"rpm":9}, "gpt-4*":{"rpm":8}, "gpt-4o*":{"rpm":7}, "gpt-4o":{"rpm":6}}"#);
        for (model, pattern) in [
            ("gpt-4o", "gpt-4o"),
            ("gpt-4o-mini", "gpt-4o*"),
            ("gpt-4o-2", "gpt-4o*"),
            ("gpt-4.1", "gpt-4*"),
            ("o1", "*"),
        ] {
            assert_eq!(ids(&accounts, model, false), ["a".to_owned(), format!("a, model {pattern}")], "{model}");
        }
        assert_eq!(ids(&accounts, "", true), ["a"], "no model is none of the models");
        let one = |model| Arc::as_ptr(accounts.of_model(model, || true));
        assert_eq!(one("gpt-4o-mini"), one("gpt-4o-2"), "and what is drawn ahead is drawn for both");
        assert_eq!(accounts.models().count(), 4);
    }

    #[test]
    fn a_model_beside_the_patterns_has_the_limits_of_the_endpoint_only() {
        let accounts = accounts(r#"{"gpt-4*":{"rpm":8}}"#);
        assert_eq!(ids(&accounts, "o1", true), ["a"]);
        assert_eq!(ids(&accounts, "gpt-4", true).len(), 2);
        assert!(!self::accounts("{}").has_model_limits());
    }

    #[test]
    fn each_known_model_has_an_account_and_invented_ones_share_one() {
        let accounts = accounts(r#"{"*":{"rpm":9,"each":true}}"#);
        assert_eq!(ids(&accounts, "m", true), ["a", "a, model m"]);
        assert_eq!(ids(&accounts, "m", false), ["a", "a, model m"], "it has it from then on");
        assert_eq!(ids(&accounts, "x", false), ["a", "a, model *"]);
        for number in 0..2 * MODELS_MAX {
            ids(&accounts, &format!("m{number}"), true);
        }
        assert_eq!(accounts.models().count(), 1 + MODELS_MAX);
        assert_eq!(ids(&accounts, &format!("m{}", 2 * MODELS_MAX), true), ["a", "a, model *"], "no room is left");
        assert_eq!(ids(&accounts, "m", true), ["a", "a, model m"]);
    }
}
