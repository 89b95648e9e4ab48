//! Keys that look wrong, and those of clients that can be guessed by somebody who reaches the port.

use super::checked::Check;
use crate::config::secret::Secret;

/// The key is the user's own, so it is taken all the same.
pub(super) fn warn_of_a_weak_key(key: Option<&Secret>, path: &str, check: &mut Check<'_>) {
    if let Some(why) = key.and_then(|key| weakness(key.expose())) {
        let hint = "make a new one with `openssl rand -hex 24`; clients of OpenAI take any text";
        check.report.warning(path, format!("can be guessed: {why}"), hint);
    }
}

/// What looks wrong about any key, and the way out. It is sent as it is.
pub(super) fn oddity(key: &str) -> Option<(&'static str, &'static str)> {
    let is_name = |name: &str| {
        name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    if key.strip_prefix('$').is_some_and(is_name) {
        return Some(("looks like the name of a variable", "write ${NAME} to have the variable's value put in"));
    }
    if key.strip_prefix('%').and_then(|rest| rest.strip_suffix('%')).is_some_and(is_name) {
        return Some(("looks like the name of a variable", "write ${NAME} to have the variable's value put in"));
    }
    if key.get(..7).is_some_and(|begin| begin.eq_ignore_ascii_case("bearer ")) {
        return Some(("begins with `Bearer`", "leave it out: it is put before the key anyway"));
    }
    if key.starts_with("http://") || key.starts_with("https://") {
        return Some(("is an address", "put the address into baseUrl, and here the key that goes with it"));
    }
    if key.starts_with(['"', '\'', '`']) || key.ends_with(['"', '\'', '`']) {
        return Some(("has quotation marks around it", "leave out those that are not the file's own"));
    }
    None
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_look_wrong_are_told() {
        for (key, says) in [
            ("$OPENAI_API_KEY", "variable"),
            ("%OPENAI_API_KEY%", "variable"),
            ("Bearer sk-abc", "Bearer"),
            ("\"sk-abc\"", "quotation"),
            ("'sk-abc", "quotation"),
            ("https://api.example.com", "address"),
        ] {
            assert!(oddity(key).unwrap().0.contains(says), "{key}");
        }
        for key in ["sk-abc", "$ecret-with-a-dollar", "none", "a.b/c+d=="] {
            assert_eq!(oddity(key), None, "{key}");
        }
    }
}
