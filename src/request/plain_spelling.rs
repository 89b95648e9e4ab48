//! Plain spelling: where a key opens a part of the gateway only, or owns what it makes, nothing may be read in one way here and in another
//! by the endpoint. What a client of any SDK writes is plain; what is not is refused.

use std::collections::BTreeSet;

use memchr::memmem;
use percent_encoding::percent_decode_str;

use crate::fault::Fault;
use crate::request::fields::Fields;

/// Checks the path, as it is meant: its first segment is a word of the API, and no other one is encoded or has parameters.
pub(crate) fn check_path(path: &str) -> Result<(), Fault> {
    let segments = path.strip_prefix("/v1/").unwrap_or(path);
    // Names of models have any character.
    if segments.starts_with("models/") {
        return Ok(());
    }
    let is_word =
        |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
    let first = segments.split('/').next().unwrap_or_default();
    if is_word(first) && !segments.contains([';', '%', '\\']) {
        return Ok(());
    }
    refuse("The path has an encoded character, a parameter, or a capital in its first segment")
}

/// Checks the query: the parameters that say where a request goes stand in it once, under their plain names.
pub(crate) fn check_query(query: &str) -> Result<(), Fault> {
    let mut seen = BTreeSet::new();
    for pair in query.split('&') {
        let name = pair.split('=').next().unwrap_or_default();
        let decoded = percent_decode_str(name).decode_utf8_lossy();
        if !matches!(&*decoded, "model" | "deployment" | "call_id") {
            continue;
        }
        if decoded != name || !seen.insert(name) {
            return refuse("The query names its model, or the call that it joins, twice or in an encoded way");
        }
    }
    Ok(())
}

/// Checks a JSON body: no letter, digit or `_` is escaped, as those of the names of its members would have to be to be overlooked.
pub(crate) fn check_json(body: &[u8]) -> Result<(), Fault> {
    for at in memmem::find_iter(body, br"\u00") {
        let digits = body.get(at + 4..at + 6).and_then(|digits| std::str::from_utf8(digits).ok());
        let letter = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()).unwrap_or_default();
        if letter.is_ascii_alphanumeric() || letter == b'_' {
            return refuse("The body has an escaped letter, such as \\u0061, that needs no escape");
        }
    }
    Ok(())
}

/// Checks that no name of a member of a JSON body is written with an escape, as none needs one: what comes behind it is overlooked here.
pub(crate) fn check_names(fields: &Fields) -> Result<(), Fault> {
    if fields.has_escaped_names {
        return refuse("The name of a member of the body has an escaped character, such as \\n");
    }
    Ok(())
}

fn refuse(what: &str) -> Result<(), Fault> {
    Err(Fault::RequestInvalid { problem: format!("{what}. With a caller's key that is refused; write it plainly.") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_endpoint_could_read_otherwise_is_refused() {
        for good in
            ["/v1/files", "/v1/files/file-Ab_1/content", "/v1/fine_tuning/jobs", "/v1/models/a:b", "/v1/models/a%2Fb"]
        {
            assert_eq!(check_path(good), Ok(()), "{good}");
        }
        for bad in ["/v1/Files", "/v1/%66iles", "/v1/files;x", "/v1/files/a%2Fb", "/v1/files/x;y", "/v1/files\\x"] {
            assert!(check_path(bad).is_err(), "{bad}");
        }
        for good in ["", "limit=1&after=file-1", "model=a%2Fb", "model=a&x=model", "call_id=rtc_1"] {
            assert_eq!(check_query(good), Ok(()), "{good}");
        }
        for bad in ["model=a&model=b", "model=a&%6dodel=b", "call%5Fid=x", "model=a&x=1&model"] {
            assert!(check_query(bad).is_err(), "{bad}");
        }
        for good in [r#"{"a":"\u4e2d\u003cb\u003e\u0026 \u000a"}"#, "{}", r"\u00", r"\u00zz"] {
            assert_eq!(check_json(good.as_bytes()), Ok(()), "{good}");
        }
        for bad in
            [r#"{"previous\u005fresponse_id":1}"#, r#"{"\u006dodel":"x"}"#, r#"{"a":"\u0041"}"#, r#"{"\u0031":1}"#]
        {
            assert!(check_json(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
