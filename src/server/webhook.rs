//! Tells alerts to the webhook of the config: signed, retried, and folded where one follows the other.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use jiff::Timestamp;
use pingora::server::ShutdownWatch;
use pingora::services::background::BackgroundService;
use ring::hmac;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::config::{AlertEvent, Secret, Webhook, WebhookFormat, is_link_local};
use crate::routing::pool::Pool;
use crate::telemetry::alerts::{self, Alert};

/// Time over which further alerts of one kind about one thing are sent as one.
const FOLDED: Duration = Duration::from_mins(5);
/// Things whose alerts are folded; alerts of more are sent one by one.
const SUBJECTS_MAX: usize = 1000;
/// Interval in which is looked for alerts whose time to be told together has come.
const TICK: Duration = Duration::from_secs(1);
/// Pauses before each further try.
const PAUSES: [Duration; 5] = [
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(30),
    Duration::from_mins(2),
    Duration::from_mins(10),
];
/// Longest time of one try.
const TRY_MAX: Duration = Duration::from_secs(10);
/// Alerts that are under way at once, those that wait for another try included; of more the latest are lost.
const UNDER_WAY_MAX: usize = 100;

/// Tells alerts to the webhook.
pub(super) struct Webhooks {
    pub(super) pool: Arc<ArcSwap<Pool>>,
}

/// Alerts of one kind about one thing that have come since the last one was told.
struct Folding {
    since: Instant,
    more: u64,
    latest: Option<Alert>,
}

#[async_trait]
impl BackgroundService for Webhooks {
    async fn start(&self, _shutdown: ShutdownWatch) {
        let Some(mut alerts) = alerts::listen() else { return };
        let mut folding: HashMap<(AlertEvent, String), Folding> = HashMap::new();
        let under_way = Arc::new(Semaphore::new(UNDER_WAY_MAX));
        let mut ticks = tokio::time::interval(TICK);
        loop {
            let due = tokio::select! {
                alert = alerts.recv() => match alert {
                    Some(alert) => fold(&mut folding, alert).map(|alert| (alert, 1)).into_iter().collect(),
                    None => return,
                },
                _ = ticks.tick() => unfold(&mut folding),
            };
            for (alert, times) in due {
                self.tell(alert, times, &under_way);
            }
        }
    }
}

/// Returns an alert that is to be sent now; one that follows another of its kind is sent later, with those that follow it.
fn fold(folding: &mut HashMap<(AlertEvent, String), Folding>, alert: Alert) -> Option<Alert> {
    let key = (alert.event, alert.subject.clone());
    if let Some(of) = folding.get_mut(&key) {
        of.more += 1;
        of.latest = Some(alert);
        return None;
    }
    if folding.len() < SUBJECTS_MAX {
        folding.insert(key, Folding { since: Instant::now(), more: 0, latest: None });
    }
    Some(alert)
}

/// Returns what has been folded for long enough, each with how many there were.
fn unfold(folding: &mut HashMap<(AlertEvent, String), Folding>) -> Vec<(Alert, u64)> {
    let mut due = Vec::new();
    folding.retain(|_, of| {
        if of.since.elapsed() < FOLDED {
            return true;
        }
        let Some(latest) = of.latest.take() else { return false };
        due.push((latest, of.more));
        (of.since, of.more) = (Instant::now(), 0);
        true
    });
    due
}

impl Webhooks {
    /// Tells an alert by a task of its own, if the config as it is now wants it told.
    fn tell(&self, alert: Alert, times: u64, under_way: &Arc<Semaphore>) {
        let pool = self.pool.load();
        let Some(webhook) = pool.server.webhook.clone().filter(|webhook| webhook.events.contains(&alert.event)) else {
            return;
        };
        let Ok(permit) = Arc::clone(under_way).try_acquire_owned() else {
            log::warn!("an alert of {} is not sent to the webhook: {UNDER_WAY_MAX} are under way", alert.subject);
            return;
        };
        tokio::spawn(async move {
            let message = Message::new(&webhook, &alert, times);
            for pause in PAUSES.into_iter().map(Some).chain([None]) {
                let Err(why) = message.send(&webhook).await else { break };
                match pause {
                    Some(pause) => {
                        log::info!("webhook: {}: {why}; tried again in {} s", alert.event, pause.as_secs());
                        tokio::time::sleep(pause).await;
                    }
                    None => log::error!("webhook: {} of {} could not be told: {why}", alert.event, alert.subject),
                }
            }
            drop(permit);
        });
    }
}

/// An alert as it is sent, the same each time it is tried.
struct Message {
    id: String,
    timestamp: i64,
    body: String,
}

impl Message {
    fn new(webhook: &Webhook, alert: &Alert, times: u64) -> Self {
        let at = Timestamp::try_from(alert.at).unwrap_or_default();
        let id = format!("msg_{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
        Self { id, timestamp: Timestamp::now().as_second(), body: body(webhook.format, alert, times, at).to_string() }
    }

    /// What the receiver checks (standardwebhooks.com): id, time and body, so that none can be changed, and none be sent again later.
    fn signature(&self, secret: &Secret) -> String {
        let secret = secret.expose();
        let bytes = secret.strip_prefix("whsec_").and_then(|encoded| BASE64_STANDARD.decode(encoded).ok());
        let key = hmac::Key::new(hmac::HMAC_SHA256, bytes.as_deref().unwrap_or(secret.as_bytes()));
        let signed = format!("{}.{}.{}", self.id, self.timestamp, self.body);
        format!("v1,{}", BASE64_STANDARD.encode(hmac::sign(&key, signed.as_bytes())))
    }

    /// Sends it once. Errors name no part of the URL.
    async fn send(&self, webhook: &Webhook) -> Result<(), String> {
        let url: reqwest::Url = webhook.url.expose().trim().parse().map_err(|_| "its url is none".to_owned())?;
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let port = url.port_or_known_default().unwrap_or(443);
        let found = tokio::time::timeout(TRY_MAX, tokio::net::lookup_host((host.as_str(), port))).await;
        let addresses: Vec<SocketAddr> = match found {
            Ok(Ok(found)) => found.collect(),
            Ok(Err(_)) | Err(_) => return Err("its host cannot be resolved".to_owned()),
        };
        if addresses.is_empty() || addresses.iter().any(|address| is_link_local(address.ip())) {
            return Err("its host has no address, or a link-local one".to_owned());
        }
        let client = reqwest::Client::builder()
            .timeout(TRY_MAX)
            // What it answers is not followed: it could lead anywhere.
            .redirect(reqwest::redirect::Policy::none())
            .resolve_to_addrs(&host, &addresses)
            .build()
            .map_err(|error| error.without_url().to_string())?;
        let mut request = client.post(url).header("content-type", "application/json").body(self.body.clone());
        if let Some(secret) = &webhook.secret {
            request = request
                .header("webhook-id", &self.id)
                .header("webhook-timestamp", self.timestamp.to_string())
                .header("webhook-signature", self.signature(secret));
        }
        let answer = request.send().await.map_err(|error| error.without_url().to_string())?;
        if answer.status().is_success() { Ok(()) } else { Err(format!("it answered {}", answer.status().as_u16())) }
    }
}

fn body(format: WebhookFormat, alert: &Alert, times: u64, at: Timestamp) -> Value {
    let Alert { event, subject, message, .. } = alert;
    match format {
        WebhookFormat::Standard => json!({
            "type": event.word(),
            "timestamp": at.to_string(),
            "data": { "subject": subject, "message": message, "count": times },
        }),
        WebhookFormat::Slack => {
            let count = if times > 1 { format!(" ({times} times)") } else { String::new() };
            json!({ "text": format!("api-together: {message}{count}") })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    fn alert(event: AlertEvent, subject: &str) -> Alert {
        Alert { event, subject: subject.into(), message: format!("{subject} wants hands"), at: SystemTime::UNIX_EPOCH }
    }

    #[test]
    fn the_first_is_told_at_once_and_what_follows_together() {
        let mut folding = HashMap::new();
        let a = || alert(AlertEvent::KeyRefused, "a");
        assert!(fold(&mut folding, a()).is_some());
        assert!(fold(&mut folding, a()).is_none() && fold(&mut folding, a()).is_none());
        assert!(fold(&mut folding, alert(AlertEvent::KeyRefused, "b")).is_some(), "another endpoint's");
        assert!(fold(&mut folding, alert(AlertEvent::Ledger, "a")).is_some(), "something else");
        assert!(unfold(&mut folding).is_empty());
        for of in folding.values_mut() {
            of.since = Instant::now().checked_sub(FOLDED).unwrap();
        }
        assert_eq!(unfold(&mut folding), [(a(), 2)]);
        assert_eq!(folding.len(), 1, "the others are told at once the next time");
    }

    #[test]
    fn a_signature_is_that_of_standard_webhooks() {
        // The example of github.com/standard-webhooks/standard-webhooks, whose libraries check it.
        let message = Message {
            id: "msg_p5jXN8AQM9LWM0D4loKWxJek".into(),
            timestamp: 1_614_265_330,
            body: r#"{"test": 2432232314}"#.into(),
        };
        let secret = Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        assert_eq!(message.signature(&secret), "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        assert_ne!(message.signature(&Secret::new("another")), message.signature(&secret));
    }

    #[test]
    fn both_forms_say_what_and_how_often() {
        let of = |format, times| body(format, &alert(AlertEvent::Ledger, "a"), times, Timestamp::UNIX_EPOCH);
        let data = json!({ "subject": "a", "message": "a wants hands", "count": 3 });
        let standard = json!({ "type": "ledger", "timestamp": "1970-01-01T00:00:00Z", "data": data });
        assert_eq!(of(WebhookFormat::Standard, 3), standard);
        assert_eq!(of(WebhookFormat::Slack, 1), json!({ "text": "api-together: a wants hands" }));
        assert_eq!(of(WebhookFormat::Slack, 3), json!({ "text": "api-together: a wants hands (3 times)" }));
    }
}
