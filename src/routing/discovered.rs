//! Models that an endpoint lists itself: what they are called, and what it says of them. They show what the patterns of the config
//! match; they decide nothing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use serde_json::{Map, Value};

/// Models of one endpoint that are kept; the largest router lists some hundreds.
const MODELS_MAX: usize = 10_000;
/// Time after which an endpoint that gave no list is asked again, unless it is to be asked sooner anyway; it doubles each time, as each
/// takes a permit.
const RETRY_AFTER: Duration = Duration::from_mins(5);

/// What an endpoint says of its models, by their names there.
pub type ModelList = BTreeMap<Box<str>, Map<String, Value>>;

/// The last list of one endpoint. It outlives every reload.
#[derive(Debug, Default)]
pub struct Discovered {
    list: ArcSwapOption<ModelList>,
    next_at: Mutex<Option<Instant>>,
    /// Times in a row that there was none.
    failures: AtomicU32,
}

impl Discovered {
    /// The last list; none if there has been none.
    pub fn list(&self) -> Option<Arc<ModelList>> {
        self.list.load_full()
    }

    /// Sets the list that an earlier process has had, unless there is one.
    pub fn recall(&self, text: &str) {
        if self.list.load().is_none()
            && let Some(list) = parse(text.as_bytes())
        {
            self.list.store(Some(Arc::new(list)));
        }
    }

    /// Takes a new list in. False if it is none.
    pub fn take(&self, text: &[u8]) -> bool {
        let Some(list) = parse(text) else { return false };
        self.list.store(Some(Arc::new(list)));
        true
    }

    /// True if it is time to ask; then it is not for a while.
    pub fn is_due(&self, now: Instant, interval: Duration) -> bool {
        let mut next_at = self.next_at.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = next_at.is_none_or(|next_at| next_at <= now);
        if is_due {
            *next_at = now.checked_add(interval);
        }
        is_due
    }

    /// Notes that there was no list. True if there was one the time before.
    pub fn failed(&self, now: Instant, interval: Duration) -> bool {
        let before = self.failures.fetch_add(1, Ordering::Relaxed);
        let wait = RETRY_AFTER.saturating_mul(1 << before.min(16)).min(interval);
        *self.next_at.lock().unwrap_or_else(PoisonError::into_inner) = now.checked_add(wait);
        before == 0
    }

    /// Notes that there was one.
    pub fn succeeded(&self) {
        self.failures.store(0, Ordering::Relaxed);
    }

    /// Has it asked for soon: the endpoint may be another one.
    pub fn ask_soon(&self) {
        *self.next_at.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Reads a list in OpenAI's shape, or a bare array.
fn parse(text: &[u8]) -> Option<ModelList> {
    let mut value: Value = serde_json::from_slice(text).ok()?;
    let list = match value.get_mut("data").map(Value::take) {
        Some(data) => data,
        None => value,
    };
    let Value::Array(list) = list else { return None };
    let named = |model: Value| {
        let Value::Object(mut model) = model else { return None };
        let Some(Value::String(id)) = model.remove("id") else { return None };
        Some((id.into(), model))
    };
    Some(list.into_iter().filter_map(named).take(MODELS_MAX).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_in_either_shape() {
        let names =
            |text: &str| parse(text.as_bytes()).map(|list| list.into_keys().map(String::from).collect::<Vec<_>>());
        let expected = Some(vec!["a".to_owned(), "b".to_owned()]);
        assert_eq!(names(r#"{"object":"list","data":[{"id":"b"},{"id":"a","context_length":9},{"x":1},7]}"#), expected);
        assert_eq!(names(r#"[{"id":"a"},{"id":"b"}]"#), expected);
        for none in ["", "{}", "7", r#"{"data":7}"#, "<html>"] {
            assert_eq!(names(none), None, "{none}");
        }
    }

    #[test]
    fn an_endpoint_is_asked_now_and_then() {
        let (discovered, now, hour) = (Discovered::default(), Instant::now(), Duration::from_hours(1));
        assert!(discovered.is_due(now, hour) && !discovered.is_due(now, hour));
        assert!(discovered.is_due(now + hour, hour));
        assert!(discovered.failed(now, hour) && !discovered.failed(now, hour), "it is logged once");
        assert!(!discovered.is_due(now + RETRY_AFTER, hour) && discovered.is_due(now + 2 * RETRY_AFTER, hour));
        discovered.succeeded();
        assert!(discovered.failed(now, hour) && discovered.is_due(now + RETRY_AFTER, hour));
        for _ in 0..40 {
            discovered.failed(now, hour);
        }
        assert!(!discovered.is_due(now + RETRY_AFTER, hour) && discovered.is_due(now + hour, hour));
        discovered.ask_soon();
        assert!(discovered.is_due(now, hour));
        assert!(discovered.take(br#"[{"id":"a"}]"#));
        discovered.recall(r#"[{"id":"old"}]"#);
        assert!(discovered.list().unwrap().contains_key("a"), "an earlier list is older");
    }
}
