//! The webhook: where alerts are sent.

use std::fmt;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::base_url::BaseUrl;
use super::checked::Check;
use super::file::WebhookFile;
use crate::config::secret::Secret;

/// Kind of an alert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AlertEvent {
    /// An endpoint refuses its key or account.
    KeyRefused,
    /// None of the keys of an endpoint that has several can be used.
    PoolEmpty,
    /// A budget has reached its warning.
    BudgetWarning,
    /// A budget is used up.
    BudgetExhausted,
    /// The ledger cannot be used, or can be again.
    Ledger,
    /// A changed config was refused.
    ConfigRefused,
}

impl AlertEvent {
    const ALL: [Self; 6] = [
        Self::KeyRefused,
        Self::PoolEmpty,
        Self::BudgetWarning,
        Self::BudgetExhausted,
        Self::Ledger,
        Self::ConfigRefused,
    ];

    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Self::KeyRefused => "key_refused",
            Self::PoolEmpty => "pool_empty",
            Self::BudgetWarning => "budget_warning",
            Self::BudgetExhausted => "budget_exhausted",
            Self::Ledger => "ledger",
            Self::ConfigRefused => "config_refused",
        }
    }
}

impl fmt::Display for AlertEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Form of what is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WebhookFormat {
    /// An object with type, time and data, signed as Standard Webhooks are.
    #[default]
    Standard,
    /// A text, as Slack's incoming webhooks and those that are like them take it.
    Slack,
}

/// The webhook. Printing it shows neither its URL, which may be a secret, nor its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Webhook {
    /// URL that events are sent to.
    pub url: Secret,
    /// What they are signed with.
    pub secret: Option<Secret>,
    /// The events that are sent.
    pub events: Vec<AlertEvent>,
    /// Their form.
    pub format: WebhookFormat,
}

/// Checks `server.webhook`. The outer none is an error that was reported.
#[expect(clippy::option_option, reason = "absent, and wrong, are two things")]
pub(super) fn webhook(typed: Option<WebhookFile>, check: &mut Check<'_>) -> Option<Option<Webhook>> {
    const URL: &str = "server.webhook.url";
    const SECRET: &str = "server.webhook.secret";
    let Some(typed) = typed else { return Some(None) };
    let hint = "name where the events are sent to, such as https://alerts.example/api-together";
    let Some(url) = typed.url.filter(|url| !url.expose().trim().is_empty()) else {
        check.report.error(URL, "is missing", hint);
        return None;
    };
    // Nothing of it is shown: the path is the secret of many such services.
    let problem = match BaseUrl::parse(url.expose().split(['?', '#']).next().unwrap_or_default()) {
        Err(error) => Some(error.message),
        Ok(base) if base.host.parse().is_ok_and(is_link_local) => Some("is a link-local address"),
        Ok(_) => None,
    };
    if let Some(problem) = problem {
        check.report.error(URL, problem, hint);
        return None;
    }
    let format = typed.format.unwrap_or_default();
    let secret = typed.secret.filter(|secret| !secret.expose().is_empty());
    if format == WebhookFormat::Standard && secret.is_none() {
        let hint = "set a random text that the receiver knows too: `openssl rand -base64 32`, with whsec_ before it or without";
        check.report.error(SECRET, "is missing, so that nobody could tell our events from others'", hint);
        return None;
    }
    let events = typed.events.filter(|events| !events.is_empty()).unwrap_or_else(|| AlertEvent::ALL.to_vec());
    Some(Some(Webhook { url, secret, events, format }))
}

/// True for addresses of the local link, where clouds tell their machines' secrets.
pub fn is_link_local(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::{config_of, problems_of};
    use serde_json::json;

    #[test]
    fn a_webhook_is_read_and_shows_no_secret() {
        let of = |webhook: serde_json::Value| config_of(&json!({ "webhook": webhook }), "[]").server.webhook;
        assert_eq!(of(json!(null)), None);
        let url = "https://hooks.example/services/T0/B0/xyz?x=1";
        let webhook = of(json!({ "url": url, "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw" })).unwrap();
        assert_eq!((webhook.events.len(), webhook.format), (AlertEvent::ALL.len(), WebhookFormat::Standard));
        let shown = format!("{webhook:?}");
        assert!(!shown.contains("xyz") && !shown.contains("MfKQ"), "{shown}");
        let slack = of(json!({ "url": url, "format": "slack", "events": ["ledger"] })).unwrap();
        assert_eq!((slack.events, slack.secret), (vec![AlertEvent::Ledger], None));
    }

    #[test]
    fn what_is_wrong_is_named_without_the_url() {
        for (webhook, wrong) in [
            (json!({ "secret": "x" }), "url"),
            (json!({ "url": "https://a.example/secret-path" }), "secret"),
            (json!({ "url": "ftp://a.example/secret-path", "secret": "x" }), "url"),
            (json!({ "url": "http://169.254.169.254/secret-path", "secret": "x" }), "link-local"),
            (json!({ "url": "http://[fe80::1]/secret-path", "secret": "x" }), "link-local"),
            (json!({ "url": "https://a.example/", "secret": "x", "events": ["fire"] }), "events"),
        ] {
            let problems = problems_of(&json!({ "webhook": webhook }));
            assert!(problems.contains(wrong) && !problems.contains("secret-path"), "{webhook}: {problems}");
        }
    }
}
