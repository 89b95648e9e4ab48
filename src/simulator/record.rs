//! The requests that arrived.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;
use http::{HeaderMap, Method, Version};
use serde_json::{Map, Value, json};

/// Requests kept; a bench that forgot to turn recording off must not fill the memory.
const MAX_RECORDS: usize = 10_000;

/// Bytes of bodies kept over all records: two bodies of the greatest accepted size.
const MAX_RECORDED_BYTES: usize = 512 << 20;

/// One request as it arrived.
#[derive(Clone, Debug)]
pub struct Arrived {
    /// The method.
    pub method: Method,
    /// Path with the query, byte for byte.
    pub path_and_query: String,
    /// HTTP/1.1 or HTTP/2.
    pub version: Version,
    /// All headers; names in lower case.
    pub headers: HeaderMap,
    /// The whole body; empty if it was answered early.
    pub body: Bytes,
    /// Number of the connection, from 1, in the order of acceptance.
    pub connection: u64,
    /// When the request was complete.
    pub at: Instant,
}

impl Arrived {
    /// Value of a header, if there is one and it is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Request as `echo` and the control calls show it.
    pub(super) fn to_json(&self) -> Value {
        json!({
            "method": self.method.as_str(),
            "path": self.path_and_query,
            "version": format!("{:?}", self.version),
            "headers": self.headers_json(),
            "body": String::from_utf8_lossy(&self.body),
            "bodyBytes": self.body.len(),
            "connection": self.connection,
        })
    }

    /// Repeated headers are joined, as HTTP allows.
    fn headers_json(&self) -> Map<String, Value> {
        let joined = |name| {
            let values = self.headers.get_all(name).iter();
            let texts: Vec<_> = values.map(|v| String::from_utf8_lossy(v.as_bytes())).collect();
            texts.join(", ")
        };
        self.headers.keys().map(|name| (name.to_string(), joined(name).into())).collect()
    }
}

#[derive(Default)]
pub(super) struct Records {
    ring: VecDeque<Arrived>,
    bytes: usize,
}

impl Records {
    pub(super) fn push(&mut self, arrived: Arrived) {
        self.bytes += arrived.body.len();
        self.ring.push_back(arrived);
        while self.ring.len() > MAX_RECORDS || self.bytes > MAX_RECORDED_BYTES {
            let Some(oldest) = self.ring.pop_front() else {
                break;
            };
            self.bytes -= oldest.body.len();
        }
    }

    pub(super) fn list(&self) -> Vec<Arrived> {
        self.ring.iter().cloned().collect()
    }

    pub(super) fn clear(&mut self) {
        self.ring.clear();
        self.bytes = 0;
    }
}
