//! The few fields of a request's JSON body that decide its way.
//!
//! The body is validated as JSON but no tree is built: `model`, `stream` and `stream_options` are found in one pass,
//! and everything else is skipped over. Their places in the bytes are kept, so that a rewrite can splice them.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde::de::{Deserializer as _, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::session_name::SessionFields;
use crate::fault::Fault;
use crate::json::members::{self, member};
use crate::json::part;
use crate::json::scan::{self, Key};

/// Edit of a request's body that asks a stream for its usage, if the client did not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageEdit {
    /// These bytes of the body are replaced;
    pub range: Range<usize>,
    /// by these.
    pub with: &'static str,
}

/// The fields of a JSON body that decide where it goes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Fields {
    /// The model asked for.
    pub model: Option<Model>,
    /// Place of a model that is null or empty, which some clients send for none.
    pub unnamed: Option<ModelPlace>,
    /// True if the answer is to be streamed.
    pub stream: bool,
    /// Edit that asks for the usage; `None` if the client asks itself, or if it cannot be done.
    pub usage_edit: Option<UsageEdit>,
    /// What it says of storing the answer.
    pub store: Option<bool>,
    /// Tier of service that it asks for, if that has prices of its own.
    pub tier: Option<ServiceTier>,
    /// Members that tell its session.
    pub session: SessionFields,
    /// True if the name of a member of the JSON body is written with an escape.
    pub has_escaped_names: bool,
    /// Fields of a form that may be ids of objects.
    pub objects: Vec<Range<usize>>,
}

/// A tier of service that costs more or less than the usual one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceTier {
    /// Slower, and cheaper.
    Flex,
    /// Faster, and dearer.
    Priority,
    /// The same under its later name.
    Fast,
}

impl ServiceTier {
    /// Its word in requests.
    pub fn word(self) -> &'static str {
        match self {
            Self::Flex => "flex",
            Self::Priority => "priority",
            Self::Fast => "fast",
        }
    }

    fn of_json(value: &[u8]) -> Option<Self> {
        let Key(word) = serde_json::from_slice(value).ok()?;
        [Self::Flex, Self::Priority, Self::Fast].into_iter().find(|tier| tier.word() == word)
    }
}

/// A model's name as the client sent it, and its place in the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// Name.
    pub name: Arc<str>,
    /// Place.
    pub place: ModelPlace,
}

/// Place of a model's name in a body, which says how another one is written there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelPlace {
    /// A JSON string, quotes included.
    Json(Range<usize>),
    /// A JSON `null`.
    Null(Range<usize>),
    /// The text of a form's field.
    Form(Range<usize>),
    /// A parameter of the query.
    Query,
    /// Behind the bracket of a JSON object that has none; `is_only` if it has no other member either.
    NewMember {
        /// Place behind the bracket.
        at: usize,
        /// True if the object is empty.
        is_only: bool,
    },
    /// Before the parts of a form that has none, with this boundary.
    NewPart(Arc<str>),
}

impl ModelPlace {
    /// The place of a member that a JSON object does not have yet.
    pub fn new_member(json: &[u8]) -> Option<Self> {
        let at = json.iter().position(|byte| *byte == b'{')? + 1;
        let is_only = part(json, at..).trim_ascii_start().starts_with(b"}");
        Some(Self::NewMember { at, is_only })
    }
}

/// Finds the fields of a JSON body, and refuses one that no endpoint could understand.
pub fn scan(body: &[u8]) -> Result<Fields, Fault> {
    match walk(body) {
        Some(found) => found.locate(body),
        None => parse(body)?.locate(body).map(|fields| Fields { has_escaped_names: true, ..fields }),
    }
}

/// Finds them fast; none if that cannot be done, or if the body is not valid.
fn walk(body: &[u8]) -> Option<Found> {
    let mut found = Found::default();
    members::members(body, |key, range| found.take(key, || range))?;
    Some(found)
}

/// Finds them slowly, and says what is wrong with the body.
fn parse(body: &[u8]) -> Result<Found, Fault> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    deserializer
        .deserialize_any(FieldsVisitor { body })
        .and_then(|found| deserializer.end().map(|()| found))
        .map_err(|error| Fault::RequestInvalid { problem: explain(&error) })
}

fn explain(error: &serde_json::Error) -> String {
    if error.is_data() {
        format!("The request body must be a JSON object: {error}.")
    } else {
        format!("The request body is not valid JSON: {error}.")
    }
}

/// Ranges of the fields in the body, before their values are looked at.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    model: Option<Range<usize>>,
    model_again: Option<Range<usize>>,
    stream: Option<Range<usize>>,
    stream_options: Option<Range<usize>>,
    /// True if one of the two occurs twice, so that it is not clear which one counts.
    stream_again: bool,
    store: Option<Range<usize>>,
    tier: Option<Range<usize>>,
    /// Members that hold the model of a realtime session.
    realtime: [Option<Range<usize>>; 2],
    session: SessionFields,
}

impl Found {
    /// Takes a member in, if it is one of them.
    fn take(&mut self, key: &[u8], range: impl FnOnce() -> Range<usize>) {
        match key {
            b"model" if self.model.is_some() => self.model_again = Some(range()),
            b"model" => self.model = Some(range()),
            b"stream" => {
                self.stream_again |= self.stream.is_some();
                self.stream = Some(range());
            }
            b"stream_options" => {
                self.stream_again |= self.stream_options.is_some();
                self.stream_options = Some(range());
            }
            b"store" => self.store = Some(range()),
            b"service_tier" => self.tier = Some(range()),
            b"session" => self.realtime[0] = Some(range()),
            b"input_audio_transcription" => self.realtime[1] = Some(range()),
            _ => self.session.take(key, range),
        }
    }

    fn locate(self, body: &[u8]) -> Result<Fields, Fault> {
        let text = |range: &Range<usize>| part(body, range.clone());
        if let Some(again) = self.model_again {
            let at = position(body, again.start);
            let problem = format!("The request body has two `model` keys; the second value is at {at}.");
            return Err(Fault::RequestInvalid { problem });
        }
        let [session, transcription] = &self.realtime;
        let of_session = || session_model(body, session.clone()?);
        let of_transcription = || member(body, transcription.clone()?, "model");
        let found = self.model.or_else(of_session).or_else(of_transcription);
        let (named, unnamed) = match found {
            Some(range) if text(&range) == b"null" => (None, Some(ModelPlace::Null(range))),
            Some(range) if text(&range) == b"\"\"" => (None, Some(ModelPlace::Json(range))),
            found => (found, None),
        };
        let model = named.map(|range| {
            let Ok(Key(value)) = serde_json::from_slice(text(&range)) else {
                let at = position(body, range.start);
                let problem = format!("`model` must be a string, at {at} of the request body.");
                return Err(Fault::RequestInvalid { problem });
            };
            Ok(Model { name: value.into(), place: ModelPlace::Json(range) })
        });
        let stream = self.stream.filter(|range| text(range) == b"true");
        let usage_edit = stream.as_ref().filter(|_| !self.stream_again).and_then(|stream| {
            if let Some(options) = &self.stream_options {
                return within_options(body, options);
            }
            let end = stream.end;
            Some(UsageEdit { range: end..end, with: r#","stream_options":{"include_usage":true}"# })
        });
        let store = self.store.and_then(|range| match text(&range) {
            b"true" => Some(true),
            b"false" => Some(false),
            _ => None,
        });
        let tier = self.tier.and_then(|range| ServiceTier::of_json(text(&range)));
        let model = model.transpose()?;
        let (stream, session) = (stream.is_some(), self.session);
        Ok(Fields {
            model,
            unnamed,
            stream,
            usage_edit,
            store,
            tier,
            session,
            has_escaped_names: false,
            objects: Vec::new(),
        })
    }
}

/// The model of a realtime session's settings, which may be of a transcription alone.
pub(super) fn session_model(body: &[u8], session: Range<usize>) -> Option<Range<usize>> {
    let transcription = || {
        let audio = member(body, session.clone(), "audio")?;
        let transcription = member(body, member(body, audio, "input")?, "transcription")?;
        member(body, transcription, "model")
    };
    member(body, session.clone(), "model").or_else(transcription)
}

/// Returns the edit if there are `stream_options` already.
fn within_options(body: &[u8], range: &Range<usize>) -> Option<UsageEdit> {
    #[derive(Deserialize)]
    struct Options<'a> {
        #[serde(borrow, default, deserialize_with = "scan::even_null")]
        include_usage: Option<&'a RawValue>,
    }
    let options = std::str::from_utf8(body.get(range.clone())?).ok()?;
    if options == "null" {
        return Some(UsageEdit { range: range.clone(), with: r#"{"include_usage":true}"# });
    }
    // Anything but an object is for the endpoint to refuse.
    let inside = options.strip_prefix('{')?.strip_suffix('}')?;
    let Options { include_usage } = serde_json::from_str(options).ok()?;
    match include_usage {
        Some(wish) if matches!(wish.get(), "false" | "null") => {
            Some(UsageEdit { range: range_in(body, wish), with: "true" })
        }
        Some(_) => None,
        None => {
            let is_empty = inside.trim().is_empty();
            let with = if is_empty { r#""include_usage":true"# } else { r#""include_usage":true,"# };
            Some(UsageEdit { range: range.start + 1..range.start + 1, with })
        }
    }
}

/// Returns the range of a value that borrows from the body.
fn range_in(body: &[u8], raw: &RawValue) -> Range<usize> {
    let start = (raw.get().as_ptr() as usize).saturating_sub(body.as_ptr() as usize);
    start..start + raw.get().len()
}

fn position(body: &[u8], offset: usize) -> String {
    let before = part(body, ..offset);
    let line = memchr::memchr_iter(b'\n', before).count() + 1;
    let column = offset - memchr::memrchr(b'\n', before).map_or(0, |newline| newline + 1) + 1;
    format!("line {line} column {column}")
}

struct FieldsVisitor<'a> {
    body: &'a [u8],
}

impl<'de> Visitor<'de> for FieldsVisitor<'_> {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object such as {\"model\": …}")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = Found::default();
        while let Some(Key(key)) = map.next_key()? {
            let value: &RawValue = map.next_value()?;
            found.take(key.as_bytes(), || range_in(self.body, value));
        }
        Ok(found)
    }
}

/// The `model` of a query string, or the `deployment` of Azure's.
pub fn query_model(query: &str) -> Option<Arc<str>> {
    let of = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name));
    let value = of("model=").or_else(|| of("deployment="))?;
    (!value.is_empty()).then(|| percent_decode_str(value).decode_utf8_lossy().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn problem(body: &str) -> String {
        match scan(body.as_bytes()) {
            Err(Fault::RequestInvalid { problem }) => problem,
            other => panic!("{body} gave {other:?}"),
        }
    }

    #[test]
    fn fields_are_found_with_their_place() {
        let body = br#"{"messages":[{"model":"inner"}], "model" : "gpt-4" ,"stream":true}"#;
        let fields = scan(body).unwrap();
        let model = fields.model.unwrap();
        assert_eq!((&*model.name, model.place), ("gpt-4", ModelPlace::Json(43..50)));
        assert_eq!(&body[43..50], b"\"gpt-4\"");
        assert!(fields.stream);
    }

    #[test]
    fn a_tier_of_service_is_known_if_it_has_prices_of_its_own() {
        let of = |tier: &str| scan(format!(r#"{{"service_tier":{tier}}}"#).as_bytes()).unwrap().tier;
        assert_eq!((of(r#""flex""#), of(r#""priorit\u0079""#)), (Some(ServiceTier::Flex), Some(ServiceTier::Priority)));
        for usual in [r#""auto""#, r#""default""#, "null", "1"] {
            assert_eq!(of(usual), None, "{usual}");
        }
    }

    #[test]
    fn a_stream_can_be_made_to_ask_for_its_usage() {
        let asking = |body: &str| {
            let UsageEdit { range, with } = scan(body.as_bytes()).unwrap().usage_edit?;
            let asking = format!("{}{with}{}", &body[..range.start], &body[range.end..]);
            let parsed: serde_json::Value = serde_json::from_str(&asking).unwrap();
            assert_eq!(parsed["stream_options"]["include_usage"], true, "{asking}");
            Some(asking)
        };
        for (body, expected) in [
            (r#"{"stream": true }"#, r#"{"stream": true,"stream_options":{"include_usage":true} }"#),
            (r#"{"stream":true,"stream_options":{}}"#, r#"{"stream":true,"stream_options":{"include_usage":true}}"#),
            (
                r#"{"stream_options": { "include_obfuscation":false},"stream":true}"#,
                r#"{"stream_options": {"include_usage":true, "include_obfuscation":false},"stream":true}"#,
            ),
            (
                r#"{"stream_options":{"a":1,"include_usage": false},"stream":true}"#,
                r#"{"stream_options":{"a":1,"include_usage": true},"stream":true}"#,
            ),
            (
                r#"{"stream_options":{"include_usage":null},"stream":true}"#,
                r#"{"stream_options":{"include_usage":true},"stream":true}"#,
            ),
            (r#"{"stream_options":null,"stream":true}"#, r#"{"stream_options":{"include_usage":true},"stream":true}"#),
        ] {
            assert_eq!(asking(body).as_deref(), Some(expected), "{body}");
        }
        for body in [
            r#"{"stream":false}"#,
            "{}",
            r#"{"stream":"true"}"#,
            r#"{"stream":true,"stream_options":{"include_usage":true}}"#,
            r#"{"stream":true,"stream_options":{"include_usage":1}}"#,
            r#"{"stream":true,"stream_options":7}"#,
            r#"{"stream":true,"stream_options":{},"stream_options":{}}"#,
            r#"{"stream":true,"stream":true}"#,
            r#"{"stream":true,"stream_options":{"include_usage":false,"include_usage":false}}"#,
        ] {
            assert_eq!(asking(body), None, "{body}");
        }
    }

    #[test]
    fn escapes_in_key_and_value_are_understood() {
        let body = br#"{"mod\u0065l":"gpt\u002d4"}"#;
        let model = scan(body).unwrap().model.unwrap();
        assert_eq!((&*model.name, model.place), ("gpt-4", ModelPlace::Json(14..26)));
        assert_eq!(&body[14..26], br#""gpt\u002d4""#);
    }

    #[test]
    fn broken_bodies_say_what_and_where() {
        assert!(problem(r#"{"model":"a""#).contains("line 1 column 12"), "{}", problem(r#"{"model":"a""#));
        assert!(problem("[1]").contains("must be a JSON object"));
        assert!(problem("\"text\"").contains("must be a JSON object"));
        assert!(problem(r#"{"model":"a"} x"#).contains("trailing characters at line 1 column 15"));
        assert_eq!(
            problem("{\"model\":\"a\",\n \"model\":\"b\"}"),
            "The request body has two `model` keys; the second value is at line 2 column 10."
        );
        assert_eq!(problem(r#"{"model":5}"#), "`model` must be a string, at line 1 column 10 of the request body.");
        for none in [r#"{"model":null}"#, r#"{"model":""}"#] {
            assert_eq!(scan(none.as_bytes()).unwrap().model, None, "{none}");
        }
    }

    #[test]
    fn deep_nesting_neither_overflows_nor_fails() {
        let body = format!(r#"{{"x":{}{},"model":"m"}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(&*scan(body.as_bytes()).unwrap().model.unwrap().name, "m");
    }

    #[test]
    fn the_model_of_a_realtime_session_is_found() {
        let transcription =
            r#"{"session":{"type":"transcription","audio":{"input":{"transcription":{"model":"ears"}}}}}"#;
        for (body, model) in [
            (r#"{"expires_after":{"seconds":9},"session":{"type":"realtime","model":"talk"}}"#, Some("talk")),
            (transcription, Some("ears")),
            (r#"{"input_audio_transcription":{"model":"ears"}}"#, Some("ears")),
            (r#"{"session":{"model":"talk"},"model":"first"}"#, Some("first")),
            (r#"{"session":"text"}"#, None),
            (r#"{"session":{"audio":[]}}"#, None),
        ] {
            let found = scan(body.as_bytes()).unwrap().model;
            assert_eq!(found.as_ref().map(|found| &*found.name), model, "{body}");
            if let Some(Model { name, place: ModelPlace::Json(range) }) = found {
                assert_eq!(body[range], format!("\"{name}\""));
            }
        }
    }

    #[test]
    fn model_in_the_query() {
        assert_eq!(query_model("a=1&model=meta%2Fllama-3").as_deref(), Some("meta/llama-3"));
        assert_eq!(query_model("api-version=1&deployment=d").as_deref(), Some("d"));
        assert_eq!(query_model("model="), None);
        assert_eq!(query_model("model=100%zz%2").as_deref(), Some("100%zz%2"), "not an escape");
    }

    proptest! {
        #[test]
        fn fast_or_slow_the_same_is_found(
            members in prop::collection::vec(
                prop::sample::select(vec![
                    r#""model":"a""#, r#" "model" : "b\u0020" "#, r#""stream":true"#, r#""stream":false"#,
                    r#""stream_options":{"include_usage":false}"#, r#""stream_options":null"#, r#""x":{"model":[1,"]"]}"#,
                    r#""m\u006fdel":"c""#, r#""messages":[{"content":"\n\"model\":\"d\""}]"#, "\"y\":\"\n\"", "\"z\":01",
                ]),
                0..6,
            ),
        ) {
            let body = format!("{{{}}}", members.join(","));
            let slow = parse(body.as_bytes());
            match walk(body.as_bytes()) {
                Some(found) => prop_assert_eq!(Ok(found), slow),
                None => prop_assert!(slow.is_err() || body.contains("m\\u006f"), "{}", body),
            }
        }
    }
}
