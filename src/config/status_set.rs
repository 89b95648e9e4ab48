//! A set of error statuses.

use std::fmt;

use super::file::{StatusClass, StatusFile};

const STATUS_MIN: u16 = 400;
const STATUS_MAX: u16 = 599;
const WORDS: usize = 4;

/// Statuses from 400 to 599, as one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusSet {
    words: [u64; WORDS],
}

impl StatusSet {
    /// No status at all.
    pub const fn empty() -> Self {
        Self { words: [0; WORDS] }
    }

    /// True if the status is in the set; never for one outside 400 to 599.
    pub fn contains(&self, status: u16) -> bool {
        place(status).is_some_and(|(word, bit)| self.words.get(word).is_some_and(|w| w & bit != 0))
    }

    fn insert(&mut self, status: u16) {
        if let Some((word, bit)) = place(status)
            && let Some(word) = self.words.get_mut(word)
        {
            *word |= bit;
        }
    }
}

/// A status outside 400 to 599 is nowhere.
fn place(status: u16) -> Option<(usize, u64)> {
    if !(STATUS_MIN..=STATUS_MAX).contains(&status) {
        return None;
    }
    let index = status - STATUS_MIN;
    Some((usize::from(index / 64), 1 << (index % 64)))
}

impl FromIterator<StatusFile> for StatusSet {
    fn from_iter<I: IntoIterator<Item = StatusFile>>(entries: I) -> Self {
        let mut set = Self::empty();
        for entry in entries {
            let statuses = match entry {
                StatusFile::Status(status) => status..=status,
                StatusFile::Class(StatusClass::Client) => STATUS_MIN..=499,
                StatusFile::Class(StatusClass::Server) => 500..=STATUS_MAX,
            };
            statuses.for_each(|status| set.insert(status));
        }
        set
    }
}

impl Default for StatusSet {
    fn default() -> Self {
        StatusFile::defaults().into_iter().collect()
    }
}

/// As the config file spells it: classes that are whole as one word.
impl fmt::Display for StatusSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = Vec::new();
        for class in [STATUS_MIN..=499, 500..=STATUS_MAX] {
            if class.clone().all(|status| self.contains(status)) {
                shown.push(format!("{}xx", class.start() / 100));
            } else {
                shown.extend(class.filter(|status| self.contains(*status)).map(|status| status.to_string()));
            }
        }
        write!(f, "[{}]", shown.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_holds_what_another_endpoint_may_answer_differently() {
        let set = StatusSet::default();
        for status in [401, 402, 403, 408, 425, 429, 500, 502, 529, 599] {
            assert!(set.contains(status), "{status}");
        }
        for status in [0, 200, 399, 400, 404, 405, 409, 413, 415, 422, 499, 600, u16::MAX] {
            assert!(!set.contains(status), "{status}");
        }
    }

    #[test]
    fn classes_and_numbers_add_up() {
        let set: StatusSet = [StatusFile::Class(StatusClass::Client), StatusFile::Status(599)].into_iter().collect();
        assert!((400..500).all(|status| set.contains(status)));
        assert!((500..599).all(|status| !set.contains(status)) && set.contains(599));
        assert!((0..u16::MAX).all(|status| !StatusSet::empty().contains(status)));
        let two: StatusSet = [StatusFile::Status(404), StatusFile::Status(429)].into_iter().collect();
        assert_eq!(two.to_string(), "[404, 429]");
        assert_eq!(StatusSet::default().to_string(), "[401, 402, 403, 408, 425, 429, 5xx]");
    }
}
