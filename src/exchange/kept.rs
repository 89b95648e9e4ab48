//! An endpoint's error answer, kept while other endpoints are tried.

use std::mem;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use pingora::http::ResponseHeader;
use pingora::protocols::http::HttpTask;

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
