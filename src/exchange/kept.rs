//! An endpoint's error answer, kept while other endpoints are tried.

use std::borrow::Cow;
use std::mem;

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING};
use pingora::http::ResponseHeader;
use pingora::protocols::http::HttpTask;
use serde_json::Value;

use crate::fault::{ErrorShape, excerpt};
use crate::response::decode::{Decoder, Encoding};
use crate::response::redact::{Redactor, Secrets};

/// An endpoint's error answer, kept in case that no other endpoint does better.
#[derive(Debug)]
pub struct Kept {
    /// Header, ready for the client.
    pub header: Box<ResponseHeader>,
    /// Body; `None` if it was too large to keep or incomplete.
    pub body: Option<Bytes>,
}

impl Kept {
    /// Returns the body as the data of an event, if it is JSON that readers of streams take for an error.
    pub fn error_object(&self, shape: ErrorShape) -> Option<String> {
        let mut value: Value = serde_json::from_slice(self.body.as_ref()?).ok()?;
        let members = value.as_object_mut().filter(|members| members.get("error").is_some_and(Value::is_object))?;
        if shape == ErrorShape::Anthropic {
            // The endpoint may speak another vendor's shape.
            members.entry("type").or_insert_with(|| "error".into());
        }
        Some(value.to_string())
    }

    /// The endpoint's words, or the beginning of its body, on one line.
    pub fn words(&self) -> Option<String> {
        let body = self.body.as_ref()?;
        let value: Option<Value> = serde_json::from_slice(body).ok();
        let message = value.as_ref().and_then(|value| {
            let error = value.get("error").unwrap_or(value);
            error.get("message").or(Some(error))?.as_str()
        });
        let text = message.map_or_else(|| String::from_utf8_lossy(body), Cow::Borrowed);
        Some(excerpt(&text.split_whitespace().collect::<Vec<_>>().join(" "))).filter(|text| !text.is_empty())
    }

    /// Keeps an error that stood in a 200, as an answer with the status that it says itself.
    pub(super) fn of_error(tasks: Vec<HttpTask>, status: u16, body: &[u8], secrets: &Secrets) -> Option<Self> {
        let header = tasks.into_iter().find_map(|task| match task {
            HttpTask::Header(header, _) => Some(header),
            _ => None,
        });
        let mut header = header?;
        let body = Redactor::new(secrets.clone()).piece(body, true);
        header.remove_header(&TRANSFER_ENCODING);
        header.remove_header(&CONTENT_ENCODING);
        header.set_status(status).ok()?;
        header.insert_header(CONTENT_TYPE, "application/json").ok()?;
        header.insert_header(CONTENT_LENGTH, body.len()).ok()?;
        Some(Self { header, body: Some(body) })
    }

    /// Keeps the header and body of an error answer, framed again, with the endpoint's secrets redacted.
    pub(super) fn new(tasks: Vec<HttpTask>, encoding: Option<Encoding>, secrets: &Secrets) -> Option<Self> {
        let mut kept: Option<Self> = None;
        let mut body = Vec::new();
        let mut ended = false;
        for task in tasks {
            match task {
                HttpTask::Header(mut header, end) => {
                    header.remove_header(&TRANSFER_ENCODING);
                    ended |= end;
                    kept = Some(Self { header, body: None });
                }
                HttpTask::Body(piece, end) => {
                    body.extend_from_slice(&piece.unwrap_or_default());
                    ended |= end;
                }
                HttpTask::Done | HttpTask::Trailer(_) => ended = true,
                _ => {}
            }
        }
        let mut kept = kept?;
        if let Some(encoding) = encoding {
            let encoded = mem::take(&mut body);
            let mut decoder = Decoder::new(encoding);
            decoder.feed(&encoded, |plain| body.extend_from_slice(&plain));
            // A body that cannot be decoded cannot be searched for secrets.
            ended &= !decoder.is_broken();
        }
        if ended {
            let body = Redactor::new(secrets.clone()).piece(&body, true);
            kept.header.insert_header(CONTENT_LENGTH, body.len()).ok()?;
            kept.body = Some(body);
        }
        Some(kept)
    }
}
