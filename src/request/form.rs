//! The few fields of a multipart form (RFC 7578) that decide a request's way: `model` and `stream`, wherever they stand.
//!
//! The form is walked from one delimiter to the next, with vector instructions over what lies between, and nothing of it is
//! copied: pictures and recordings are most of its bytes.

use std::ops::Range;

use memchr::memmem;

use super::fields::{self, Fields, Model, ModelPlace};
use super::references::{ID_BYTES_MAX, is_field_of_object};
use crate::fault::Fault;
use crate::json::part;
use crate::json::scan::Key;

/// Bytes that the headers of one part may take up. Those of a real one are two or three short lines.
const PART_HEADERS_MAX: usize = 8 * 1024;
/// Longest boundary that is understood; RFC 2046 (5.1.1) allows 70 characters.
const BOUNDARY_MAX: usize = 256;

/// Finds the fields of a form's body, and refuses one that no endpoint could understand. `content_type` is its label.
pub fn scan(content_type: &str, body: &[u8]) -> Result<Fields, Fault> {
    let boundary = boundary(content_type).ok_or_else(|| {
        invalid("Its Content-Type says multipart/form-data without a boundary; let the HTTP client set that header.")
    })?;
    let mut fields = Fields::default();
    let mut parts = Parts::new(body, &boundary);
    let mut is_form = false;
    let mut of_session = None;
    while let Some(Part { headers, content }) = parts.next_part() {
        is_form = true;
        match field_name(part(body, headers)) {
            Some(name) if name == b"model" => {
                if fields.model.is_some() {
                    return Err(invalid("It has two fields named `model`."));
                }
                fields.model = model(body, content.clone())?;
                fields.unnamed = fields.model.is_none().then_some(ModelPlace::Form(content));
            }
            Some(name) if name == b"session" => of_session = session_model(body, content)?,
            // As many as there are: the body bounds them, and those that are too many to be looked for must be known as such.
            Some(name) if is_field_of_object(&name) => {
                fields.objects.extend(Some(content).filter(|content| content.len() <= ID_BYTES_MAX));
            }
            Some(name) if name == b"stream" => fields.stream = part(body, content).eq_ignore_ascii_case(b"true"),
            _ => {}
        }
    }
    if parts.is_broken {
        return Err(invalid("The headers of one of its parts do not end."));
    }
    fields.model = fields.model.or(of_session);
    if is_form || parts.has_ended {
        return Ok(fields);
    }
    Err(invalid("No part of it begins with the boundary that its Content-Type names."))
}

fn invalid(problem: &str) -> Fault {
    Fault::RequestInvalid { problem: format!("The request body is not a valid form. {problem}") }
}

/// The model that a field names; none if it is empty, as some clients send it.
fn model(body: &[u8], range: Range<usize>) -> Result<Option<Model>, Fault> {
    let Ok(name) = std::str::from_utf8(part(body, range.clone())) else {
        return Err(invalid("Its field `model` is not UTF-8."));
    };
    Ok((!name.is_empty()).then(|| Model { name: name.into(), place: ModelPlace::Form(range) }))
}

/// The model of a realtime call, whose settings are one field in JSON.
fn session_model(body: &[u8], range: Range<usize>) -> Result<Option<Model>, Fault> {
    let Some(place) = fields::session_model(body, range) else { return Ok(None) };
    let Ok(Key(name)) = serde_json::from_slice(part(body, place.clone())) else {
        return Err(invalid("The `model` in its field `session` is not a string."));
    };
    Ok((!name.is_empty()).then(|| Model { name: name.into(), place: ModelPlace::Json(place) }))
}

/// The boundary that a content type names.
pub fn boundary(content_type: &str) -> Option<Vec<u8>> {
    let parameters = content_type.split_once(';')?.1;
    parameter(parameters.as_bytes(), b"boundary").filter(|boundary| (1..=BOUNDARY_MAX).contains(&boundary.len()))
}

/// The name of a part that is a field. A part with a file's name is a file, whatever it is called.
fn field_name(headers: &[u8]) -> Option<Vec<u8>> {
    let disposition = headers.split(|byte| *byte == b'\n').find_map(|line| {
        let colon = memchr::memchr(b':', line)?;
        let (name, value) = line.split_at_checked(colon)?;
        name.trim_ascii().eq_ignore_ascii_case(b"content-disposition").then_some(value)
    })?;
    let parameters = disposition.split_at_checked(memchr::memchr(b';', disposition)? + 1)?.1;
    let is_file = [&b"filename"[..], b"filename*"].iter().any(|name| parameter(parameters, name).is_some());
    if is_file { None } else { parameter(parameters, b"name") }
}

/// The value of a header's parameter.
fn parameter(parameters: &[u8], wanted: &[u8]) -> Option<Vec<u8>> {
    let mut rest = parameters;
    while let Some(at) = memchr::memchr2(b'=', b';', rest) {
        let name = part(rest, ..at).trim_ascii();
        rest = part(rest, at..);
        if let Some(given) = rest.strip_prefix(b"=") {
            let (value, behind) = parameter_value(given)?;
            if name.eq_ignore_ascii_case(wanted) {
                return Some(value);
            }
            rest = behind;
        }
        rest = part(rest, memchr::memchr(b';', rest).map_or(rest.len(), |semicolon| semicolon + 1)..);
    }
    None
}

/// A parameter's value, a token or a quoted string (RFC 9110, 5.6.6), and what follows it.
fn parameter_value(given: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let given = given.trim_ascii_start();
    if let Some(quoted) = given.strip_prefix(b"\"") {
        return unquote(quoted);
    }
    let (token, behind) = given.split_at_checked(memchr::memchr(b';', given).unwrap_or(given.len()))?;
    Some((token.trim_ascii().to_vec(), behind))
}

/// A quoted string's text, and what follows its end. None if it has none.
fn unquote(quoted: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut text = Vec::new();
    let mut bytes = quoted.iter().enumerate();
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'"' => return Some((text, part(quoted, at + 1..))),
            b'\\' => text.push(*bytes.next()?.1),
            byte => text.push(*byte),
        }
    }
    None
}

/// One part of a form, by its place in the body.
struct Part {
    headers: Range<usize>,
    content: Range<usize>,
}

/// The parts of a form, in their order.
struct Parts<'a> {
    body: &'a [u8],
    /// The line break, two hyphens and the boundary that stand between two parts.
    delimiter: memmem::Finder<'static>,
    /// Where the next part begins, behind the line of its delimiter; none until the first one is found, and after the last.
    at: Option<usize>,
    /// True once the delimiter that ends the form has been found.
    has_ended: bool,
    /// True if a part's headers are longer than any real ones.
    is_broken: bool,
}

impl<'a> Parts<'a> {
    fn new(body: &'a [u8], boundary: &[u8]) -> Self {
        let delimiter = memmem::Finder::new(&[b"\r\n--", boundary].concat()).into_owned();
        let mut parts = Self { body, delimiter, at: None, has_ended: false, is_broken: false };
        // The first one needs no line break before it, and may have a preamble.
        let first = part(parts.delimiter.needle(), 2..);
        let behind = if body.starts_with(first) { parts.behind(first.len()) } else { None };
        parts.at = behind.or_else(|| parts.next_delimiter(0).and_then(|(_, behind)| behind));
        parts
    }

    fn next_part(&mut self) -> Option<Part> {
        let begins = self.at.take()?;
        let Some(headers) = self.headers(begins) else {
            self.is_broken = self.body.len() - begins > PART_HEADERS_MAX;
            return None;
        };
        // An empty line and nothing else stands before a part without headers.
        let content = if headers.is_empty() { begins + 2 } else { headers.end + 4 };
        // A form whose end is missing has a last part all the same.
        let (ends, behind) = self.next_delimiter(content.saturating_sub(2)).unwrap_or((self.body.len(), None));
        self.at = behind;
        Some(Part { headers, content: content..ends.max(content) })
    }

    /// The lines before a part's empty line. None if there is no such line within bounds.
    fn headers(&self, begins: usize) -> Option<Range<usize>> {
        let text = self.body.get(begins..)?;
        if text.starts_with(b"\r\n") {
            return Some(begins..begins);
        }
        let text = part(text, ..text.len().min(PART_HEADERS_MAX));
        memmem::find(text, b"\r\n\r\n").map(|length| begins..begins + length)
    }

    /// The next delimiter from a place on: where it begins, and where the part behind it does; none behind the last one.
    fn next_delimiter(&mut self, from: usize) -> Option<(usize, Option<usize>)> {
        let mut from = from;
        loop {
            let begins = from + self.delimiter.find(self.body.get(from..)?)?;
            let ends = begins + self.delimiter.needle().len();
            let behind = self.behind(ends);
            if behind.is_some() || self.has_ended {
                return Some((begins, behind));
            }
            // A longer word begins like it.
            from = ends;
        }
    }

    /// Where the line ends whose delimiter ends here. None if it is the last one, or none at all.
    fn behind(&mut self, ends: usize) -> Option<usize> {
        let rest = self.body.get(ends..)?;
        if rest.starts_with(b"--") {
            self.has_ended = true;
            return None;
        }
        let blanks = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
        part(rest, blanks..).starts_with(b"\r\n").then_some(ends + blanks + 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LABEL: &str = "multipart/form-data; boundary=xyz";

    fn form(parts: &[&str]) -> String {
        let parts: Vec<_> =
            parts.iter().map(|part| ["--xyz\r\nContent-Disposition: form-data; ", part, "\r\n"].concat()).collect();
        parts.concat() + "--xyz--\r\n"
    }

    fn problem(label: &str, body: &str) -> String {
        match scan(label, body.as_bytes()) {
            Err(Fault::RequestInvalid { problem }) => problem,
            other => panic!("{body} gave {other:?}"),
        }
    }

    /// The model that is found, and the bytes at its place.
    fn found(label: &str, body: &str) -> Option<(String, String)> {
        let model = scan(label, body.as_bytes()).unwrap_or_else(|fault| panic!("{body:?}: {fault:?}")).model?;
        let ModelPlace::Form(range) = model.place else { panic!("{:?}", model.place) };
        Some((model.name.to_string(), body[range].to_owned()))
    }

    #[test]
    fn fields_before_it_hide_no_object() {
        let mut parts = vec!["name=\"junk[id]\"\r\n\r\nq"; 5000];
        parts.push("name=\"video[id]\"\r\n\r\nvideo_1");
        let body = form(&parts);
        let objects = scan(LABEL, body.as_bytes()).unwrap().objects;
        assert_eq!(objects.last().map(|range| &body[range.clone()]), Some("video_1"));
    }

    #[test]
    fn the_model_is_found_wherever_it_stands() {
        let file =
            "name=\"file\"; filename=\"a.mp3\"\r\nContent-Type: audio/mpeg\r\n\r\n--xyzw\r\nname=\"model\"\r\n--x\r\n";
        let model = "name=\"model\"\r\n\r\nwhisper-1";
        for parts in [&[model, file][..], &[file, model], &[file, "name=\"prompt\"\r\n\r\n", model], &[model]] {
            let body = form(parts);
            assert_eq!(found(LABEL, &body), Some(("whisper-1".into(), "whisper-1".into())), "{body}");
        }
        assert_eq!(found(LABEL, &form(&[file])), None);
        for none in ["name=\"model\"\r\n\r\n", "name=\"model\"; filename=\"m\"\r\n\r\nm", "name=\"the model\"\r\n\r\nm"]
        {
            assert_eq!(found(LABEL, &form(&[none])), None, "{none}");
        }
    }

    #[test]
    fn headers_may_be_written_in_any_way_that_is_allowed() {
        for part in [
            "--xyz\r\ncontent-disposition:form-data;name=model\r\n\r\nm\r\n--xyz--",
            "--xyz  \r\nContent-Type: text/plain; charset=utf-8\r\nCONTENT-DISPOSITION: form-data ; NAME = \"mod\\el\"\r\n\r\nm\r\n--xyz--",
            "a preamble\r\n--xyz\r\nContent-Disposition: form-data; x; name=\"model\"\r\n\r\nm\r\n--xyz\r\n\r\nno headers\r\n--xyz--\r\nan epilogue",
            "--xyz\r\n\r\nno headers\r\n--xyz\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm",
        ] {
            assert_eq!(found(LABEL, part), Some(("m".into(), "m".into())), "{part}");
        }
        let body = form(&["name=\"model\"\r\n\r\nm"]);
        for label in ["Multipart/Form-Data;charset=x; Boundary=\"xyz\"", "multipart/form-data; boundary=xyz ; a=b"] {
            assert_eq!(found(label, &body).unwrap().0, "m", "{label}");
        }
        let odd = body.replace("xyz", "a; b=\"c");
        assert_eq!(found("multipart/form-data; boundary=\"a; b=\\\"c\"", &odd).unwrap().0, "m");
    }

    #[test]
    fn a_realtime_call_has_its_model_in_its_settings() {
        let settings = r#"{"type":"realtime","model":"talk"}"#;
        let body = form(&["name=\"sdp\"\r\n\r\nv=0", &format!("name=\"session\"\r\n\r\n{settings}")]);
        let model = scan(LABEL, body.as_bytes()).unwrap().model.unwrap();
        let ModelPlace::Json(range) = model.place else { panic!("{:?}", model.place) };
        assert_eq!((&*model.name, &body[range]), ("talk", "\"talk\""));
        let both = ["name=\"model\"\r\n\r\nwalk", &format!("name=\"session\"\r\n\r\n{settings}")];
        for parts in [both, [both[1], both[0]]] {
            assert_eq!(found(LABEL, &form(&parts)).unwrap().0, "walk", "{parts:?}");
        }
    }

    #[test]
    fn a_form_may_ask_for_a_stream() {
        for (value, asked) in [("true", true), ("True", true), ("false", false), ("", false)] {
            let body = form(&[&format!("name=\"stream\"\r\n\r\n{value}")]);
            assert_eq!(scan(LABEL, body.as_bytes()).unwrap().stream, asked, "{value}");
        }
    }

    #[test]
    fn broken_forms_say_what_is_wrong() {
        assert!(problem("multipart/form-data", "x").contains("without a boundary"));
        assert!(problem("multipart/form-data; boundary=", "x").contains("without a boundary"));
        assert!(problem(LABEL, "model=whisper-1").contains("No part of it begins"));
        let twice = form(&["name=\"model\"\r\n\r\na", "name=\"model\"\r\n\r\nb"]);
        let endless = form(&[&format!("name=\"x\"\r\n{}", "y".repeat(PART_HEADERS_MAX)), "name=\"model\"\r\n\r\na"]);
        assert!(problem(LABEL, &endless).contains("do not end"));
        assert!(problem(LABEL, &twice).contains("two fields named `model`"));
        assert_eq!(scan(LABEL, b"--xyz--").unwrap(), Fields::default(), "a form without fields is one");
        let latin = b"--xyz\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n\xff\r\n--xyz--";
        assert!(scan(LABEL, latin).is_err());
    }

    proptest! {
        #[test]
        fn only_the_model_changes(
            boundary in "[0-9A-Za-z'()+_,./:=?-]{1,70}",
            before in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..4),
            after in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..4),
            name in "[a-z0-9./-]{1,30}",
            mapped in "[a-z0-9./-]{1,30}",
        ) {
            let file = |number: usize, content: &[u8]| {
                let head = format!("--{boundary}\r\nContent-Disposition: form-data; name=\"f{number}\"; filename=\"{number}\"\r\n\r\n");
                [head.as_bytes(), content, b"\r\n"].concat()
            };
            let with = |model: &str| {
                let files = |list: &[Vec<u8>]| list.iter().enumerate().flat_map(|(n, content)| file(n, content)).collect::<Vec<u8>>();
                let field = format!("--{boundary}\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n{model}\r\n");
                [&files(&before)[..], field.as_bytes(), &files(&after), format!("--{boundary}--\r\n").as_bytes()].concat()
            };
            let delimiter = format!("\r\n--{boundary}");
            let quotes = |content: &Vec<u8>| memmem::find(&[b"\r\n", &content[..], b"\r\n"].concat(), delimiter.as_bytes()).is_some();
            prop_assume!(!before.iter().chain(&after).any(quotes));
            let body = bytes::Bytes::from(with(&name));
            let label = format!("multipart/form-data; boundary=\"{boundary}\"");
            let model = scan(&label, &body).unwrap().model.unwrap();
            prop_assert_eq!(&*model.name, name.as_str());
            let edit = crate::request::rewrite::model_edit(&model.place, &mapped);
            let sent = crate::request::rewrite::spliced(&body, &mut [edit]).concat();
            prop_assert_eq!(sent, with(&mapped));
        }

        #[test]
        fn whatever_comes_it_does_not_panic(body in prop::collection::vec(prop::sample::select(b"\r\n-xyz:;=\"\\ name".to_vec()), 0..200)) {
            scan(LABEL, &body).ok();
        }
    }
}
