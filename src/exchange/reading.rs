//! Reading of an answer's body on its way to the client: it is measured, and parts of it are passed on.

use bytes::Bytes;

use super::judge::Form;
use crate::request::content_type;
use crate::response::decode::{Decoder, Encoding};
use crate::response::redact::{Redactor, Secrets};
use crate::response::relay::Relay;
use crate::response::sse::Splitter;
use crate::usage::Meter;

/// Description of a body by its header.
pub(super) struct BodyHeader<'a> {
    pub(super) status: u16,
    pub(super) content_type: Option<&'a str>,
    /// Form of the body, where it has shown.
    pub(super) form: Option<Form>,
    pub(super) encoding: Option<Encoding>,
    /// True if the gateway asked for the usage in the client's place.
    pub(super) usage_injected: bool,
}

/// Way in which a body is read.
pub(super) enum Reading {
    /// Not read.
    Blind,
    /// An error, in plain text, without the endpoint's secrets.
    Error(Option<Decoder>, Redactor),
    Json,
    Stream(Relay),
    /// Compressed: decoded for the meter only, and passed on as it came.
    EncodedJson(Decoder),
    EncodedStream(Decoder, Splitter),
}

impl Reading {
    pub(super) fn new(header: &BodyHeader<'_>, secrets: &Secrets) -> Self {
        let is_stream = match header.form {
            Some(form) => form == Form::Stream,
            None => content_type::is_event_stream(header.content_type),
        };
        let is_json = header.form == Some(Form::Json) || content_type::is_json(header.content_type);
        match (header.status, header.encoding.map(Decoder::new)) {
            (400.., decoder) => {
                let decoder = decoder.filter(|decoder| !decoder.is_broken());
                Self::Error(decoder, Redactor::new(secrets.clone()))
            }
            (..=199 | 300..=399, _) => Self::Blind,
            (_, None) if is_stream => Self::Stream(Relay::new(header.usage_injected, secrets.clone())),
            (_, Some(decoder)) if is_stream => Self::EncodedStream(decoder, Splitter::default()),
            (_, None) if is_json => Self::Json,
            (_, Some(decoder)) if is_json => Self::EncodedJson(decoder),
            _ => Self::Blind,
        }
    }

    /// Measures a piece, and adds the part of it that is passed on.
    pub(super) fn piece(&mut self, piece: Bytes, meter: &mut Meter, out: &mut Vec<Bytes>) {
        match self {
            Self::Blind => {}
            Self::Error(decoder, redactor) => {
                match decoder {
                    None => out.push(redactor.piece(&piece, false)),
                    Some(decoder) => decoder.feed(&piece, |plain| out.push(redactor.piece(&plain, false))),
                }
                return;
            }
            Self::Json => meter.json(&piece),
            Self::Stream(relay) => return relay.piece(&piece, meter, out),
            Self::EncodedJson(decoder) => decoder.feed(&piece, |plain| meter.json(&plain)),
            Self::EncodedStream(decoder, splitter) => decoder.feed(&piece, |plain| {
                splitter.feed(&plain, |data| {
                    if let Some(data) = data {
                        meter.event(data);
                    }
                });
            }),
        }
        out.push(piece);
    }

    /// Measures and adds the rest at the end of the endpoint's body.
    pub(super) fn end(&mut self, meter: &mut Meter, out: &mut Vec<Bytes>) {
        match self {
            Self::Error(_, redactor) => out.push(redactor.piece(b"", true)),
            Self::Stream(relay) => relay.end(meter, out),
            Self::Json | Self::EncodedJson(_) => meter.json_ended(),
            Self::Blind | Self::EncodedStream(..) => {}
        }
    }

    /// Takes the first event that may be an error.
    pub(super) fn take_error(&mut self) -> Option<Bytes> {
        match self {
            Self::Stream(relay) => relay.take_error(),
            _ => None,
        }
    }

    /// True if it is a stream that events can be added to.
    pub(super) fn takes_events(&self) -> bool {
        matches!(self, Self::Stream(_))
    }

    pub(super) fn is_stream(&self) -> bool {
        matches!(self, Self::Stream(_) | Self::EncodedStream(..))
    }

    /// True if the pieces passed on so far end within an event.
    pub(super) fn is_within_event(&self) -> bool {
        matches!(self, Self::Stream(relay) if relay.is_within_event())
    }
}
