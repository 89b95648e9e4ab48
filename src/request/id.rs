//! Request ids, in the `x-request-id` header.

use http::{HeaderName, HeaderValue};
use uuid::Builder;
use uuid::fmt::Hyphenated;

/// The header that carries a request's id, both ways.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The client's own request id if it is a sane one, else a new one.
pub fn request_id(given: Option<&HeaderValue>) -> HeaderValue {
    const BYTES_MAX: usize = 128;
    let sane = |id: &&HeaderValue| {
        let bytes = id.as_bytes();
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(byte);
        !bytes.is_empty() && bytes.len() <= BYTES_MAX && bytes.iter().all(plain)
    };
    given.filter(sane).cloned().unwrap_or_else(|| uuid(fastrand::u128(..)))
}

/// A random UUID (RFC 9562, 5.4), since some servers refuse any other request id.
fn uuid(random: u128) -> HeaderValue {
    let mut text = [0; Hyphenated::LENGTH];
    let id = Builder::from_random_bytes(random.to_be_bytes()).into_uuid();
    let id = id.hyphenated().encode_lower(&mut text);
    HeaderValue::from_str(id).unwrap_or_else(|_| HeaderValue::from_static("0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_kept_if_sane() {
        let id = |given: &[u8]| {
            let given = HeaderValue::from_bytes(given).unwrap();
            request_id(Some(&given)).to_str().unwrap().to_owned()
        };
        assert_eq!(id(b"abc-1.2_3:4"), "abc-1.2_3:4");
        for insane in [&b""[..], b"a b", b"a\"b", "é".as_bytes(), &[b'x'; 129]] {
            let made = id(insane);
            assert_eq!(made.len(), 36, "{made}");
        }
        assert_ne!(request_id(None), request_id(None));
        assert_eq!(uuid(0), "00000000-0000-4000-8000-000000000000");
        assert_eq!(uuid(u128::MAX), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_eq!(uuid(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef), "01234567-89ab-4def-8123-456789abcdef");
    }
}
