//! `Content-Type`, of requests and answers.

use crate::json::part;

/// True for a stream of server-sent events.
pub(crate) fn is_event_stream(content_type: Option<&str>) -> bool {
    content_type.is_some_and(|value| essence(value).eq_ignore_ascii_case(b"text/event-stream"))
}

/// True if an answer is JSON.
pub(crate) fn is_json(content_type: Option<&str>) -> bool {
    content_type
        .is_some_and(|value| essence(value).last_chunk::<4>().is_some_and(|end| end.eq_ignore_ascii_case(b"json")))
}

/// A content type without its parameters.
fn essence(content_type: &str) -> &[u8] {
    let bytes = content_type.as_bytes();
    let end = bytes.iter().position(|byte| *byte == b';').unwrap_or(bytes.len());
    part(bytes, ..end).trim_ascii()
}

/// True if a request's body is JSON. Without a content type it is taken for JSON, as every call of the API but the uploads is.
pub(crate) fn is_json_request(content_type: Option<&str>) -> bool {
    let Some(value) = content_type else { return true };
    let essence = essence(value);
    let begins = |start: &[u8]| essence.get(..start.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(start));
    let is_suffixed = || essence.last_chunk::<5>().is_some_and(|end| end.eq_ignore_ascii_case(b"+json"));
    essence.eq_ignore_ascii_case(b"application/json") || begins(b"application/") && is_suffixed()
}

/// True for a multipart form.
pub(crate) fn is_form(content_type: &str) -> bool {
    essence(content_type).eq_ignore_ascii_case(b"multipart/form-data")
}

/// True for text and simple forms, which is what browsers and `curl -d` call JSON.
pub(crate) fn is_text(content_type: Option<&str>) -> bool {
    content_type.map(essence).is_some_and(|essence| {
        let is = |known: &[u8]| essence.eq_ignore_ascii_case(known);
        is(b"text/plain") || is(b"application/x-www-form-urlencoded")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_types() {
        assert!(is_json_request(None));
        assert!(is_json_request(Some("application/json; charset=utf-8")));
        assert!(is_json_request(Some("Application/Problem+JSON")));
        assert!(!is_json_request(Some("multipart/form-data; boundary=x")));
        assert!(is_form("Multipart/Form-Data; boundary=x") && !is_form("multipart/mixed; boundary=x"));
        assert!(is_text(Some("Text/Plain;charset=UTF-8")) && is_text(Some("application/x-www-form-urlencoded")));
        assert!(!is_text(Some("application/octet-stream")) && !is_text(None));
    }
}
