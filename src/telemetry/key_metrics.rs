//! Metrics by caller's key: who asks for how much, in requests and in tokens.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use prometheus::{Counter, CounterVec, IntCounter, IntCounterVec, Opts, Registry};

use super::metrics::{OK, keep, once};
use crate::usage::Cost;
use crate::usage::prices::NanoUsd;

/// Names of keys that are labels at most, over the whole life of the process. Those that come later are `(other)`.
pub(crate) const KEYS_MAX: usize = 256;

/// Label of those. No key has a name with brackets.
const OTHERS: &str = "(other)";

/// Metrics of requests with callers' own keys.
#[derive(Debug)]
pub(crate) struct KeyMetrics {
    requests: IntCounterVec,
    tokens: IntCounterVec,
    estimated: IntCounterVec,
    cost: CounterVec,
    labels: Mutex<BTreeSet<Arc<str>>>,
}

/// Metrics of one key, looked up by their labels once.
#[derive(Debug)]
pub struct KeyCounters {
    name: Arc<str>,
    label: OnceLock<Arc<str>>,
    requests: OnceLock<IntCounter>,
    prompt: OnceLock<IntCounter>,
    completion: OnceLock<IntCounter>,
    cost: OnceLock<Counter>,
}

impl KeyCounters {
    /// Those of a key, by its name.
    pub fn new(name: &Arc<str>) -> Self {
        Self {
            name: Arc::clone(name),
            label: OnceLock::new(),
            requests: OnceLock::new(),
            prompt: OnceLock::new(),
            completion: OnceLock::new(),
            cost: OnceLock::new(),
        }
    }
}

impl KeyMetrics {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let counter =
            |name: &str, help: &str, labels: &[&str]| keep(registry, IntCounterVec::new(Opts::new(name, help), labels));
        Ok(Self {
            requests: counter(
                "api_together_key_requests_total",
                "Requests with a caller's own key that have ended, by outcome.",
                &["key", "outcome"],
            )?,
            tokens: counter(
                "api_together_key_tokens_total",
                "Tokens that endpoints reported for requests with a caller's own key.",
                &["key", "kind"],
            )?,
            estimated: counter(
                "api_together_key_estimated_tokens_total",
                "Tokens estimated where endpoints reported none for such a request.",
                &["key", "kind"],
            )?,
            cost: keep(
                registry,
                CounterVec::new(
                    Opts::new(
                        "api_together_key_cost_usd_total",
                        "What answers to requests with a caller's own key cost, in US dollars, estimates included.",
                    ),
                    &["key"],
                ),
            )?,
            labels: Mutex::default(),
        })
    }

    /// Counts a request that has ended.
    pub(crate) fn request(&self, key: &KeyCounters, outcome: &str) {
        let counter = Some(&key.requests).filter(|_| outcome == OK);
        once(counter, IntCounter::inc, || self.requests.with_label_values(&[self.label(key), outcome]));
    }

    /// Counts the tokens of an answer.
    pub(crate) fn spent(&self, key: &KeyCounters, cost: &Cost) {
        let (exact, estimated) = (cost.exact.tokens, cost.estimated.tokens);
        let reported = [("prompt", exact.prompt, &key.prompt), ("completion", exact.completion, &key.completion)];
        for (kind, tokens, counter) in reported.into_iter().filter(|(_, tokens, _)| *tokens > 0) {
            let add = |counter: &IntCounter| counter.inc_by(tokens);
            once(Some(counter), add, || self.tokens.with_label_values(&[self.label(key), kind]));
        }
        let estimated = [("prompt", estimated.prompt), ("completion", estimated.completion)];
        for (kind, tokens) in estimated.into_iter().filter(|(_, tokens)| *tokens > 0) {
            self.estimated.with_label_values(&[self.label(key), kind]).inc_by(tokens);
        }
        if cost.money.spent > NanoUsd(0) {
            let add = |counter: &Counter| counter.inc_by(cost.money.spent.dollars());
            once(Some(&key.cost), add, || self.cost.with_label_values(&[self.label(key)]));
        }
    }

    /// The key's name, if there is room for it.
    fn label<'a>(&self, key: &'a KeyCounters) -> &'a str {
        key.label.get_or_init(|| {
            // Nothing panics while it is held.
            let mut labels = self.labels.lock().unwrap_or_else(PoisonError::into_inner);
            if labels.len() >= KEYS_MAX && !labels.contains(&key.name) {
                return OTHERS.into();
            }
            labels.insert(Arc::clone(&key.name));
            Arc::clone(&key.name)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::{Speed, Tokens};
    use prometheus::{Encoder, TextEncoder};

    #[test]
    fn keys_are_counted_by_name_and_those_beyond_the_bound_together() {
        let registry = Registry::new();
        let metrics = KeyMetrics::new(&registry).unwrap();
        let key = |number: usize| KeyCounters::new(&format!("key-{number}").into());
        let tokens = Tokens { prompt: 5, completion: 2, ..Tokens::default() };
        let first = key(0);
        for _ in 0..2 {
            metrics.request(&first, OK);
            metrics.spent(&first, &Cost::exact(tokens, Speed::default()));
        }
        metrics.request(&first, "key_limits_reached");
        metrics.spent(&first, &Cost::estimated(3, 4));
        (1..KEYS_MAX + 3).for_each(|number| metrics.request(&key(number), OK));
        // One that is loaded anew goes on.
        metrics.request(&key(0), OK);
        let mut text = Vec::new();
        TextEncoder::new().encode(&registry.gather(), &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        for line in [
            r#"api_together_key_requests_total{key="key-0",outcome="ok"} 3"#,
            r#"api_together_key_requests_total{key="key-0",outcome="key_limits_reached"} 1"#,
            r#"api_together_key_requests_total{key="key-255",outcome="ok"} 1"#,
            r#"api_together_key_requests_total{key="(other)",outcome="ok"} 3"#,
            r#"api_together_key_tokens_total{key="key-0",kind="prompt"} 10"#,
            r#"api_together_key_tokens_total{key="key-0",kind="completion"} 4"#,
            r#"api_together_key_estimated_tokens_total{key="key-0",kind="prompt"} 3"#,
        ] {
            assert!(text.lines().any(|told| told == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("key-256"));
    }
}
