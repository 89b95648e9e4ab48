//! Cool-downs and rests of endpoints and their keys, told to the other processes that share the ledger, and taken in from them: what one
//! has found out, the others need not find out at the price of a request each.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::health::Closing;
use super::health_record::HealthRecord;
use super::pool::Pool;
use crate::ledger::notices::Notice;
use crate::limit::Clock;

/// Beginning of the subjects.
const ABOUT: &str = "health";
/// Time for which the word that something is open again is kept.
const OPEN_KEPT: Duration = Duration::from_hours(1);

/// What is known of the health of all endpoints, and was told or heard.
#[derive(Debug, Default)]
pub struct SharedHealth {
    /// By endpoint, key (empty for the endpoint's own record) and model (empty for all): what is closed.
    closed: HashMap<Subject, Closing>,
}

/// Endpoint, key and model.
type Subject = (Arc<str>, Arc<str>, Box<str>);

/// What processes say to each other of a subject.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Told {
    /// End of the cool-down, in milliseconds of Unix time.
    #[serde(skip_serializing_if = "Option::is_none")]
    cooling_until: Option<u64>,
    /// End of the rest.
    #[serde(skip_serializing_if = "Option::is_none")]
    resting_until: Option<u64>,
    /// True if the length of the rest is a guess.
    guessed: bool,
    errors: u32,
    refusals: u32,
}

impl SharedHealth {
    /// Takes in what others have told, and returns what has changed here since the last time.
    pub fn round(&mut self, pool: &Pool, heard: &[Notice], clock: &Clock) -> Vec<Notice> {
        let records = records(pool);
        for notice in heard {
            if let Some((subject, told)) = read(notice)
                && let Some(record) = records.get(&(Arc::clone(&subject.0), Arc::clone(&subject.1)))
            {
                let closing = told.closing(clock);
                record.take_over(&subject.2, &closing, clock.now);
                // What is known of others is not told to them again.
                if closing.is_open() {
                    self.closed.remove(&subject);
                } else {
                    self.closed.insert(subject, closing);
                }
            }
        }
        let now = closed_now(&records, clock.now);
        let is_news = |(subject, closing): &(&Subject, &Closing)| {
            self.closed.get(*subject).is_none_or(|before| closing.lasts_longer_than(before))
        };
        // Of what is over by itself all know that it is.
        let has_opened = |(subject, before): &(&Subject, &Closing)| {
            let (endpoint, lane, _) = subject;
            let is_here = records.contains_key(&(Arc::clone(endpoint), Arc::clone(lane)));
            !now.contains_key(*subject) && before.ends_after(clock.now) && is_here
        };
        let closed = now.iter().filter(is_news).map(|(subject, closing)| notice(subject, closing, clock));
        let opened =
            self.closed.iter().filter(has_opened).map(|(subject, _)| notice(subject, &Closing::default(), clock));
        let told = closed.chain(opened).collect();
        self.closed = now;
        told
    }
}

/// The records of all endpoints and their keys.
fn records(pool: &Pool) -> HashMap<(Arc<str>, Arc<str>), Arc<HealthRecord>> {
    let mut records = HashMap::new();
    for endpoint in &pool.endpoints {
        let id = &endpoint.config.id;
        records.insert((Arc::clone(id), Arc::from("")), Arc::clone(&endpoint.live.health));
        for (name, record) in endpoint.lanes.health_records() {
            records.insert((Arc::clone(id), name), record);
        }
    }
    records
}

fn closed_now(records: &HashMap<(Arc<str>, Arc<str>), Arc<HealthRecord>>, now: Instant) -> HashMap<Subject, Closing> {
    let mut closed = HashMap::new();
    for ((endpoint, lane), record) in records.iter().filter(|(_, record)| record.is_troubled()) {
        let health = record.read();
        let whole = [("", health.whole())];
        for (model, health) in whole.into_iter().chain(health.models()) {
            let closing = health.closing();
            if closing.ends_after(now) {
                closed.insert((Arc::clone(endpoint), Arc::clone(lane), model.into()), closing);
            }
        }
    }
    closed
}

fn notice((endpoint, lane, model): &Subject, closing: &Closing, clock: &Clock) -> Notice {
    let Closing { cooling, resting, guessed, errors_in_row, refusals } = *closing;
    let unix = |moment: Instant| {
        let wall = clock.wall + moment.saturating_duration_since(clock.now);
        u64::try_from(wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
    };
    let told = Told {
        cooling_until: cooling.map(unix),
        resting_until: resting.map(unix),
        guessed,
        errors: errors_in_row,
        refusals,
    };
    let last = cooling.into_iter().chain(resting).max().map(|moment| moment.saturating_duration_since(clock.now));
    let subject = serde_json::to_string(&(ABOUT, endpoint, lane, model)).unwrap_or_default();
    let text = serde_json::to_string(&told).unwrap_or_default();
    Notice { subject: subject.into(), text: text.into(), until: clock.seconds_after(last.unwrap_or(OPEN_KEPT)) }
}

fn read(notice: &Notice) -> Option<(Subject, Told)> {
    let (about, endpoint, lane, model): (String, Arc<str>, Arc<str>, Box<str>) =
        serde_json::from_str(&notice.subject).ok()?;
    if about != ABOUT {
        return None;
    }
    Some(((endpoint, lane, model), serde_json::from_str(&notice.text).ok()?))
}

impl Told {
    fn closing(&self, clock: &Clock) -> Closing {
        let moment = |unix: u64| {
            let wall = SystemTime::UNIX_EPOCH + Duration::from_millis(unix);
            clock.now.checked_add(wall.duration_since(clock.wall).unwrap_or_default())
        };
        Closing {
            cooling: self.cooling_until.and_then(moment),
            resting: self.resting_until.and_then(moment),
            guessed: self.guessed,
            errors_in_row: self.errors,
            refusals: self.refusals,
        }
    }
}
