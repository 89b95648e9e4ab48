//! Headers of our own that every answer carries.

use http::{HeaderMap, HeaderValue, header};

use crate::request::id::REQUEST_ID;
use crate::routing::rate_headers::Rates;

/// Headers of our own for the answers to one request.
#[derive(Clone, Debug, Default)]
pub struct OwnHeaders {
    /// Request id, the client's own or ours.
    pub id: Option<HeaderValue>,
    /// The origin that may read the answer, for `Access-Control-Allow-Origin`.
    pub origin: Option<HeaderValue>,
    /// Rates of the model that it asks for.
    pub rates: Rates,
}

impl OwnHeaders {
    /// Adds them to an answer's headers.
    pub fn add_to(&self, headers: &mut HeaderMap) {
        /// Usual number of these headers, so that the map grows once at most.
        const COUNT: usize = 8;
        headers.reserve(COUNT);
        if let Some(id) = &self.id {
            headers.insert(REQUEST_ID, id.clone());
        }
        if let Some(origin) = &self.origin {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("*"));
            if origin != "*" {
                headers.append(header::VARY, HeaderValue::from_static("origin"));
            }
        }
        for (name, value) in self.rates.headers() {
            headers.insert(name, value);
        }
    }
}
