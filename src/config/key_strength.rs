//! Whether the clients' key can be guessed by somebody who reaches the port.

use super::checked::Check;
use crate::config::secret::Secret;

/// The key is the user's own, so it is taken all the same.
pub(super) fn warn_of_a_weak_key(key: Option<&Secret>, check: &mut Check<'_>) {
    if let Some(why) = key.and_then(|key| weakness(key.expose())) {
        let hint = "make a new one with `openssl rand -hex 24`; clients of OpenAI take any text";
        check.report.warning("server.apiKey", format!("can be guessed: {why}"), hint);
    }
}

/// Reason why a key is easily guessed.
fn weakness(key: &str) -> Option<String> {
    /// Characters behind a prefix such as `sk-`; of random letters and digits, 16 are 95 bits.
    const CHARS_MIN: usize = 16;
    /// Different characters of them.
    const DIFFERENT_MIN: usize = 7;
    const WORDS: [&str; 11] = [
        "changeme",
        "change-me",
        "password",
        "example",
        "placeholder",
        "your-key",
        "your_key",
        "yourkey",
        "123456789",
        "abcdefgh",
        "qwerty",
    ];
    let lower = key.to_ascii_lowercase();
    if WORDS.iter().any(|word| lower.contains(word)) {
        return Some("it has a common word or sequence in it".to_owned());
    }
    let body = ["sk-", "pk-", "key-", "token-"].iter().find_map(|prefix| lower.strip_prefix(prefix)).unwrap_or(&lower);
    let length = body.chars().count();
    if length < CHARS_MIN {
        return Some(format!("it is only {length} long{}", if body == lower { "" } else { " without its prefix" }));
    }
    let different = body.chars().collect::<std::collections::BTreeSet<_>>().len();
    (different < DIFFERENT_MIN).then(|| format!("it has only {different} different characters"))
}
