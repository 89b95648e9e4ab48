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
    /// Accounts of a request without a model, or for one without limits of its own.
    without_model: Arc<AccountSet>,
    exact: HashMap<Box<str>, Arc<AccountSet>>,
    /// By the beginning of the name, the longest first.
    prefixes: Vec<(Box<str>, Models)>,
    singles: Singles,
    /// Of the models that the config has: one of these sets at least is drawn from by any request that the config foresees.
    foreseen: Vec<Arc<AccountSet>>,
}

/// The models whose names begin alike.
#[derive(Debug)]
struct Models {
    /// Accounts of all of them together.
    together: Arc<AccountSet>,
    /// True if each of them has an account of its own.
    each: bool,
}

/// Accounts of single models that the config does not name, made when a model is first asked for. There are [`MODELS_MAX`] at
/// most; further models share the account of their prefix.
#[derive(Debug)]
struct Singles {
    /// Filled from the front and never emptied, so that readers need no lock; empty if no prefix asks for any.
    named: Box<[OnceLock<Single>]>,
    /// Held while one is added.
    adds: Mutex<()>,
    config: u64,
    ledger: Client,
}

/// A model, and the accounts of its requests.
type Single = (Box<str>, Arc<AccountSet>);

impl EndpointAccounts {
    /// Returns the accounts of an endpoint, `account` being the one of all its requests, under the config of this number.
    pub fn new(
        endpoint: &config::Endpoint,
        account: &Arc<Account>,
        zone: &TimeZone,
        (config, ledger): (u64, &Client),
    ) -> Self {
        account.look_again();
        let whole = LimitedAccount { account: Arc::clone(account), limits: Arc::new(Limits::new(endpoint, zone)) };
        let mut exact = HashMap::new();
        let mut prefixes = Vec::new();
        for (pattern, ModelLimits { limits, each }) in &endpoint.model_limits {
            let limits = Arc::new(Limits::in_days_of(endpoint, *limits, zone));
            let together = set_of_models(&whole, pattern, &limits, ledger);
            match pattern.strip_suffix('*') {
                Some(prefix) => prefixes.push((prefix.into(), Models { together, each: *each })),
                None => drop(exact.insert(Box::from(pattern.as_str()), together)),
            }
        }
        prefixes.sort_by_key(|(prefix, _): &(Box<str>, _)| std::cmp::Reverse(prefix.len()));
        let places = if prefixes.iter().any(|(_, models)| models.each) { MODELS_MAX } else { 0 };
        let singles = Singles {
            named: std::iter::repeat_with(OnceLock::new).take(places).collect(),
            adds: Mutex::default(),
            config,
            ledger: ledger.clone(),
        };
        let without_model = Arc::new(AccountSet::new(vec![whole.clone()]));
        let mut accounts = Self { whole, without_model, exact, prefixes, singles, foreseen: Vec::new() };
        accounts.foresee(endpoint);
        accounts
    }

    /// Makes the accounts of the models that the config names, which nobody can crowd out, and notes what any request draws from
    /// that the config foresees.
    fn foresee(&mut self, endpoint: &config::Endpoint) {
        for sent in endpoint.sent_models() {
            if let Some((_, Models { together, each: true })) = self.prefix_of(sent)
                && !sent.ends_with('*')
                && !self.exact.contains_key(sent)
                && let [whole, models] = together.accounts()
            {
                let single = set_of_models(whole, sent, &models.limits, &self.singles.ledger);
                self.exact.insert(sent.into(), single);
            }
            let closest = Arc::clone(self.of_model(sent, || false));
            self.note_foreseen(closest);
            // Of what a pattern serves, narrower entries may have limits of their own.
            let Some(beginning) = sent.strip_suffix('*') else { continue };
            let exact = self.exact.iter().filter(|(name, _)| name.starts_with(beginning)).map(|(_, set)| set);
            let prefixes = self.prefixes.iter().filter(|(prefix, _)| prefix.starts_with(beginning));
            let narrower: Vec<_> = exact.chain(prefixes.map(|(_, models)| &models.together)).cloned().collect();
            for set in narrower {
                self.note_foreseen(set);
            }
        }
        if self.foreseen.is_empty() {
            self.foreseen.push(Arc::clone(&self.without_model));
        }
    }

    fn note_foreseen(&mut self, set: Arc<AccountSet>) {
        if !self.foreseen.iter().any(|known| Arc::ptr_eq(known, &set)) {
            self.foreseen.push(set);
        }
    }

    /// Returns the account of all its requests.
    pub fn whole(&self) -> &LimitedAccount {
        &self.whole
    }

    /// Returns the accounts of a request that names no model.
    pub fn without_model(&self) -> &Arc<AccountSet> {
        &self.without_model
    }

    /// Returns the accounts of the models that the config has, and of others that were asked for: while one of them has room,
    /// the endpoint has.
    pub fn in_use(&self) -> impl Iterator<Item = &Arc<AccountSet>> {
        self.foreseen.iter().chain(self.singles.all().map(|(_, set)| set))
    }

    /// Returns the accounts of a request for a model. A name gets an account of its own only if it is known to be a model's,
    /// since clients can make up any number of them.
    pub fn of_model(&self, name: &str, is_known: impl FnOnce() -> bool) -> &Arc<AccountSet> {
        if name.is_empty() || !self.has_model_limits() {
            return &self.without_model;
        }
        self.exact.get(name).unwrap_or_else(|| match self.prefix_of(name) {
            None => &self.without_model,
            Some((_, Models { together, each: false })) => together,
            Some((_, Models { together, each: true })) => self.singles.of(name, is_known, together).unwrap_or(together),
        })
    }

    fn prefix_of(&self, name: &str) -> Option<&(Box<str>, Models)> {
        self.prefixes.iter().find(|(prefix, _)| name.starts_with(prefix.as_ref()))
    }

    /// True if there are models with limits of their own.
    pub fn has_model_limits(&self) -> bool {
        !self.exact.is_empty() || !self.prefixes.is_empty()
    }

    /// Returns the accounts of models: of those that the config names, of prefixes, and of others that were asked for.
    pub fn models(&self) -> impl Iterator<Item = &LimitedAccount> {
        let prefixes = self.prefixes.iter().map(|(_, models)| &models.together);
        let sets = self.exact.values().chain(prefixes).chain(self.singles.all().map(|(_, set)| set));
        sets.filter_map(|set| set.accounts().last())
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

    /// Returns the accounts of a model, with the limits of its prefix; `None` if it is not known, or there is no room for it.
    fn of(&self, name: &str, is_known: impl FnOnce() -> bool, prefix: &AccountSet) -> Option<&Arc<AccountSet>> {
        let found = || self.all().find(|(known, _)| known.as_ref() == name).map(|(_, set)| set);
        found().or_else(|| {
            if !is_known() && !self.was_counted(name, prefix) {
                return None;
            }
            let _adds = self.adds.lock().unwrap_or_else(PoisonError::into_inner);
            found().or_else(|| self.add(name, prefix))
        })
    }

    /// True if the model had an account of its own before this process began.
    fn was_counted(&self, name: &str, prefix: &AccountSet) -> bool {
        prefix.accounts().first().is_some_and(|whole| self.ledger.is_known(&id_of_models(whole, name)))
    }

    fn add(&self, name: &str, prefix: &AccountSet) -> Option<&Arc<AccountSet>> {
        let free = self.named.iter().find(|place| place.get().is_none())?;
        let [whole, models] = prefix.accounts() else { return None };
        let set = set_of_models(whole, name, &models.limits, &self.ledger);
        if let Some(account) = set.accounts().last() {
            self.ledger.list_account(self.config, account.clone());
        }
        Some(&free.get_or_init(|| (name.into(), set)).1)
    }
}

fn id_of_models(whole: &LimitedAccount, models: &str) -> AccountId {
    AccountId::Models { endpoint: Arc::clone(whole.account.id().owner()), models: models.into() }
}

/// The set of an endpoint's account and one of some of its models.
fn set_of_models(whole: &LimitedAccount, models: &str, limits: &Arc<Limits>, ledger: &Client) -> Arc<AccountSet> {
    let account = ledger.account(&id_of_models(whole, models));
    account.look_again();
    Arc::new(AccountSet::new(vec![whole.clone(), LimitedAccount { account, limits: Arc::clone(limits) }]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::config;
    use crate::limit::Clock;

    fn accounts(model_limits: &str) -> EndpointAccounts {
        let text = format!(r#"[{{"id":"a","models":["named","*"],"modelLimits":{model_limits}}}]"#);
        let config = config(&text).endpoints.remove(0);
        let ledger = Client::new(Clock::read);
        let account = ledger.account(&AccountId::Endpoint("a".into()));
        EndpointAccounts::new(&config, &account, &TimeZone::UTC, (1, &ledger))
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
        let in_ledger = |models: &str| AccountId::Models { endpoint: "a".into(), models: models.into() };
        accounts.singles.ledger.set_known(vec![in_ledger("y")]);
        assert_eq!(ids(&accounts, "y", false), ["a", "a, model y"], "an earlier process knew it");
        for number in 0..2 * MODELS_MAX {
            ids(&accounts, &format!("m{number}"), true);
        }
        assert_eq!(
            accounts.models().count(),
            2 + MODELS_MAX,
            "the prefix, the one that the config names, and the others"
        );
        assert_eq!(ids(&accounts, &format!("m{}", 2 * MODELS_MAX), true), ["a", "a, model *"], "no room is left");
        assert_eq!(ids(&accounts, "m", true), ["a", "a, model m"]);
        assert_eq!(ids(&accounts, "named", false), ["a", "a, model named"], "the config's own need no room");
    }

    #[test]
    fn what_the_config_foresees_is_known_beforehand() {
        let foreseen = |model_limits: &str| {
            let accounts = accounts(model_limits);
            let last = |set: &Arc<AccountSet>| set.accounts().last().unwrap().account.id().to_string();
            accounts.in_use().map(last).collect::<Vec<_>>()
        };
        assert_eq!(foreseen("{}"), ["a"]);
        assert_eq!(foreseen(r#"{"named":{"rpm":1}}"#), ["a, model named", "a"]);
        assert_eq!(foreseen(r#"{"*":{"rpm":1}}"#), ["a, model *"]);
        assert_eq!(foreseen(r#"{"*":{"rpm":1},"gpt*":{"rpm":2}}"#), ["a, model *", "a, model gpt*"]);
        assert_eq!(foreseen(r#"{"*":{"rpm":1,"each":true}}"#), ["a, model named", "a, model *"]);
    }
}
