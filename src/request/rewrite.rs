//! Rewriting of a request for an endpoint: path, key, model. Bodies are spliced, never serialised anew, so
//! every byte but the model's name stays as it came.

use std::borrow::Cow;
use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};
use http::HeaderValue;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::fields::ModelPlace;
use crate::config::Secret;

/// The path an endpoint is asked for. A base URL without a path leaves the client's own; one with a path puts it in place
/// of the client's `/v1`.
pub fn path_and_query<'a>(base_path: &str, client: &'a str) -> Cow<'a, str> {
    const OURS: &str = "/v1";
    let rest = client.strip_prefix(OURS);
    if base_path.is_empty() || base_path == OURS && rest.is_some() {
        return client.into();
    }
    [base_path, rest.unwrap_or(client)].concat().into()
}

/// The path an endpoint without a version in its paths is asked for, if its base URL has none either.
pub fn without_version(client: &str) -> Cow<'_, str> {
    match client.strip_prefix("/v1") {
        Some(rest) if rest.starts_with('/') => rest.into(),
        Some(rest) => format!("/{rest}").into(),
        None => client.into(),
    }
}

/// The target with these parameters, in place of those of the same name.
pub fn with_query(target: &str, parameters: &[(String, Secret)]) -> String {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let plain = |name: &str| percent_decode_str(&name.replace('+', " ")).collect::<Vec<u8>>();
    let is_ours = |pair: &&str| {
        let theirs = plain(pair.split('=').next().unwrap_or_default());
        parameters.iter().any(|(name, _)| plain(name) == theirs)
    };
    let kept = query.split('&').filter(|pair| !pair.is_empty() && !is_ours(pair)).map(str::to_owned);
    let ours = parameters.iter().map(|(name, value)| format!("{name}={}", value.expose()));
    format!("{path}?{}", kept.chain(ours).collect::<Vec<_>>().join("&"))
}

/// The target with another model in its query.
pub fn with_model(target: &str, model: &str) -> String {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let is_other = |pair: &&str| !matches!(pair.split('=').next(), Some("" | "model" | "deployment"));
    let others = query.split('&').filter(is_other).map(str::to_owned);
    let model = format!("model={}", utf8_percent_encode(model, NOT_PLAIN));
    format!("{path}?{}", std::iter::once(model).chain(others).collect::<Vec<_>>().join("&"))
}

/// True if a path would leave the part of the endpoint that it is meant for, however an endpoint's server may read it:
/// encoded dots and slashes, backslashes, and parameters behind a segment.
pub fn steps_out(path: &str) -> bool {
    // Without a dot behind a slash, as nearly all are, only what is read as one of the two can do it.
    if !path.contains("/.") && memchr::memchr3(b'%', b'\\', b';', path.as_bytes()).is_none() {
        return false;
    }
    let path = path.split('?').next().unwrap_or_default().to_ascii_lowercase();
    let plain = path.replace("%2e", ".").replace("%2f", "/").replace("%5c", "/").replace('\\', "/");
    plain
        .split('/')
        .map(|segment| segment.split(';').next().unwrap_or_default())
        .any(|name| name == ".." || name == ".")
}

/// What does not stand for itself in a query (RFC 3986, 2.3).
const NOT_PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A key as the value of a query's parameter.
pub fn query_value(key: &Secret) -> Secret {
    Secret::new(utf8_percent_encode(key.expose(), NOT_PLAIN).to_string())
}

/// The header value that carries an endpoint's key.
pub fn bearer(key: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(&format!("Bearer {key}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// One replacement in a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit<'a> {
    /// These bytes are replaced;
    pub range: Range<usize>,
    /// by these.
    pub with: Cow<'a, str>,
}

/// The replacement of the model's name, which stands at this place.
pub fn model_edit<'a>(place: &ModelPlace, model: &'a str) -> Edit<'a> {
    let quoted = match place {
        ModelPlace::Json(quoted) => quoted,
        // It stands in no body.
        ModelPlace::Query => return Edit { range: 0..0, with: "".into() },
        ModelPlace::Null(range) => {
            return Edit { range: range.clone(), with: serde_json::Value::from(model).to_string().into() };
        }
        ModelPlace::Form(range) => return Edit { range: range.clone(), with: model.into() },
        ModelPlace::NewMember { at, is_only } => {
            let comma = if *is_only { "" } else { "," };
            let with = format!("\"model\":{}{comma}", serde_json::Value::from(model));
            return Edit { range: *at..*at, with: with.into() };
        }
        ModelPlace::NewPart(boundary) => {
            let head = "Content-Disposition: form-data; name=\"model\"";
            let with = format!("--{boundary}\r\n{head}\r\n\r\n{model}\r\n");
            return Edit { range: 0..0, with: with.into() };
        }
    };
    // Nearly all names need no escapes.
    let is_plain = model.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\'));
    if is_plain && quoted.len() >= 2 {
        return Edit { range: quoted.start + 1..quoted.end - 1, with: model.into() };
    }
    Edit { range: quoted.clone(), with: serde_json::Value::from(model).to_string().into() }
}

/// Parts of a body up to this size are joined with their neighbours, since a copy is cheaper than one more piece to send.
const JOINED_BYTES_MAX: usize = 16 * 1024;

/// Returns the body with these replacements, which do not overlap, in the pieces that it is sent in; none is empty. A place
/// outside of the body is ignored.
pub fn spliced(body: &Bytes, edits: &mut [Edit<'_>]) -> Vec<Bytes> {
    if edits.is_empty() {
        return Some(body.clone()).filter(|body| !body.is_empty()).into_iter().collect();
    }
    edits.sort_by_key(|edit| edit.range.start);
    let more: usize = edits.iter().map(|edit| edit.with.len()).sum();
    let rest = Edit { range: body.len()..body.len(), with: "".into() };
    let mut pieces = Vec::with_capacity(2 * edits.len() + 1);
    let mut joined = BytesMut::new();
    let mut from = 0;
    for Edit { range, with } in edits.iter().chain([&rest]) {
        let Some(stretch) = body.get(from..range.start).filter(|_| range.start <= range.end) else {
            return vec![body.clone()];
        };
        if stretch.len() > JOINED_BYTES_MAX {
            pieces.push(joined.split().freeze());
            pieces.push(body.slice(from..range.start));
        } else {
            if joined.is_empty() {
                joined.reserve((body.len() - from).min(JOINED_BYTES_MAX) + more);
            }
            joined.put_slice(stretch);
        }
        joined.put_slice(with.as_bytes());
        from = range.end;
    }
    pieces.push(joined.freeze());
    pieces.retain(|piece| !piece.is_empty());
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_urls_and_paths() {
        for (base, client, expected) in [
            ("", "/v1/chat/completions", "/v1/chat/completions"),
            ("/v1", "/v1/chat/completions", "/v1/chat/completions"),
            ("/api/v3", "/v1/chat/completions", "/api/v3/chat/completions"),
            ("/v1beta/openai", "/v1/chat/completions?a=/v1", "/v1beta/openai/chat/completions?a=/v1"),
            ("/openai/deployments/x", "/v1/embeddings", "/openai/deployments/x/embeddings"),
            ("/v1", "/v1", "/v1"),
            ("/api/v1", "/v1/files/file-1/content", "/api/v1/files/file-1/content"),
            ("/api/paas/v4", "/v1/v1/x", "/api/paas/v4/v1/x"),
        ] {
            assert_eq!(path_and_query(base, client), expected, "{base} + {client}");
        }
    }

    #[test]
    fn versions_and_parameters() {
        for (client, expected) in [
            ("/v1/chat/completions?a=1", "/chat/completions?a=1"),
            ("/v1", "/"),
            ("/v1?a=1", "/?a=1"),
            ("/other", "/other"),
        ] {
            assert_eq!(without_version(client), expected);
        }
        let parameters = [("api-version".to_owned(), Secret::new("1")), ("k".to_owned(), Secret::new("a%26b"))];
        assert_eq!(with_model("/v1/realtime?a=1&deployment=x&b", "y/z 1"), "/v1/realtime?model=y%2Fz%201&a=1&b");
        assert_eq!(with_model("/v1/realtime?model=x", "y"), "/v1/realtime?model=y");
        assert_eq!(with_query("/x", &parameters), "/x?api-version=1&k=a%26b");
        assert_eq!(with_query("/x?k=2&b=3&api%2Dversion=9&api-version", &parameters), "/x?b=3&api-version=1&k=a%26b");
    }

    #[test]
    fn only_the_model_changes() {
        let body = Bytes::from_static(
            b"{ \"z\":1.0,\"model\" :\"a\\u002db\", \"n\":1 ,\"x\":1e5,\"unknown\":{\"model\":\"a\"},\"t\":\"\\u00e9\\/\" }\n",
        );
        let place = crate::request::fields::scan(&body).unwrap().model.unwrap().place;
        let spliced = spliced(&body, &mut [model_edit(&place, "new \"name\"")]);
        assert_eq!(spliced.len(), 1);
        assert_eq!(
            &spliced[0][..],
            b"{ \"z\":1.0,\"model\" :\"new \\\"name\\\"\", \"n\":1 ,\"x\":1e5,\"unknown\":{\"model\":\"a\"},\"t\":\"\\u00e9\\/\" }\n"
        );
    }

    #[test]
    fn several_places_are_replaced() {
        let body = Bytes::from_static(br#"{"stream":true,"model":"a"}"#);
        let asks = Edit { range: 14..14, with: ",1".into() };
        let mut edits = [model_edit(&ModelPlace::Json(23..26), "b"), asks];
        assert_eq!(spliced(&body, &mut edits), [&br#"{"stream":true,1,"model":"b"}"#[..]]);
        assert_eq!(spliced(&body, &mut [])[0].as_ptr(), body.as_ptr(), "nothing is copied for nothing");
        assert_eq!(
            spliced(&body, &mut [model_edit(&ModelPlace::Json(90..99), "b")]),
            [&body],
            "a place that is not there is left alone"
        );
        assert!(spliced(&Bytes::new(), &mut []).is_empty());
    }

    #[test]
    fn a_model_is_written_where_there_was_none() {
        for (body, expected) in [("{}", r#"{"model":"m\"n"}"#), (r#" { "a" : 1 }"#, r#" {"model":"m\"n", "a" : 1 }"#)] {
            let place = ModelPlace::new_member(body.as_bytes()).unwrap();
            let sent = spliced(&Bytes::from(body), &mut [model_edit(&place, "m\"n")]).concat();
            assert_eq!(String::from_utf8(sent).unwrap(), expected);
        }
        let form = Bytes::from("--b\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n1\r\n--b--\r\n");
        let sent = spliced(&form, &mut [model_edit(&ModelPlace::NewPart("b".into()), "m")]).concat();
        let model = crate::request::form::scan("multipart/form-data; boundary=b", &sent).unwrap().model.unwrap();
        assert_eq!(&*model.name, "m");
    }

    #[test]
    fn long_stretches_are_not_copied() {
        let body = Bytes::from((0..=u8::MAX).cycle().take(3 * JOINED_BYTES_MAX).collect::<Vec<_>>());
        let edit = |range, with: &'static str| Edit { range, with: with.into() };
        let sent = |edits: &mut [Edit<'_>]| {
            let pieces = spliced(&body, edits);
            let mut expected = body.to_vec();
            for Edit { range, with } in edits.iter().rev() {
                expected.splice(range.clone(), with.bytes());
            }
            assert_eq!(pieces.concat(), expected);
            // Where those stand in the body that were not copied.
            let lies = |piece: &Bytes| {
                Some(piece.as_ptr().addr().wrapping_sub(body.as_ptr().addr())).filter(|at| *at < body.len())
            };
            pieces.iter().map(|piece| (lies(piece), piece.len())).collect::<Vec<_>>()
        };
        let (long, all) = (2 * JOINED_BYTES_MAX, body.len());
        assert_eq!(sent(&mut [edit(5..7, "ab"), edit(0..0, "first")]), [(None, 12), (Some(7), all - 7)]);
        assert_eq!(sent(&mut [edit(long..long + 2, "abc")]), [(Some(0), long), (None, JOINED_BYTES_MAX + 1)]);
        assert_eq!(sent(&mut [edit(all - 2..all - 1, "abc")]), [(Some(0), all - 2), (None, 4)]);
        assert_eq!(sent(&mut [edit(0..2, ""), edit(all - 2..all, "")]), [(Some(2), all - 4)]);
        assert_eq!(
            sent(&mut [edit(0..1, "a"), edit(long - 1..long, "b"), edit(long + 9..long + 9, "c")]),
            [(None, 1), (Some(1), long - 2), (None, JOINED_BYTES_MAX + 2)]
        );
        let longest = JOINED_BYTES_MAX + 1;
        assert_eq!(spliced(&body.slice(..longest), &mut [edit(longest..longest, "a")]).len(), 2);
        assert_eq!(spliced(&body.slice(..longest - 1), &mut [edit(0..0, "a")]).len(), 1);
    }

    #[test]
    fn paths_that_step_out() {
        for path in [
            "/v1/../admin",
            "/v1/%2e%2E/admin",
            "/v1/./x",
            "/v1/a/..",
            "/v1/..\\x",
            "/v1/..%2fx",
            "/v1/..%5cx",
            "/v1/..;a/x",
        ] {
            assert!(steps_out(path), "{path}");
        }
        for path in ["/v1/models/gpt-4..5", "/v1/files/a.b?x=../..", "/v1/models/meta%2Fllama-3.1"] {
            assert!(!steps_out(path), "{path}");
        }
    }

    #[test]
    fn keys_travel_as_sensitive_headers() {
        let value = bearer("sk-1").unwrap();
        assert_eq!(value.to_str().unwrap(), "Bearer sk-1");
        assert!(!format!("{value:?}").contains("sk-1"));
    }
}
