//! Decodes compressed bodies: requests, and a copy of answers whose endpoints compress although they are asked not to. The
//! client gets those bytes as they came.

use std::fmt;
use std::io::Write;

use bytes::Bytes;
use http::{HeaderMap, header};

/// Bytes decoded at once, and the largest expansion of them. Text compresses to a tenth; input that expands further is
/// made to exhaust its reader, and is not read.
const STEP_BYTES: usize = 4 * 1024;
const EXPANSION_MAX: usize = 256;

/// Compression of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// RFC 1952.
    Gzip,
    /// RFC 1950.
    Deflate,
    /// RFC 7932.
    Brotli,
    /// RFC 8878.
    Zstd,
    /// Twice, or in a way not known here: it is not read.
    Unknown,
}

impl Encoding {
    /// Returns the compression by a message's headers; `None` if it is plain.
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let value = headers.get(header::CONTENT_ENCODING)?.to_str().unwrap_or("?").trim().to_ascii_lowercase();
        match value.as_str() {
            "" | "identity" => None,
            "gzip" | "x-gzip" => Some(Self::Gzip),
            "deflate" => Some(Self::Deflate),
            "br" => Some(Self::Brotli),
            "zstd" => Some(Self::Zstd),
            _ => Some(Self::Unknown),
        }
    }
}

/// Decodes one body.
pub(crate) struct Decoder(DecoderState);

enum DecoderState {
    Gzip(Box<flate2::write::MultiGzDecoder<Sink>>),
    Zlib(Box<flate2::write::ZlibDecoder<Sink>>),
    Brotli(Box<brotli::DecompressorWriter<Sink>>),
    Zstd(Box<zstd::stream::write::Decoder<'static, Sink>>),
    /// The data is invalid, or expands beyond the bound.
    Broken,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Decoder").finish_non_exhaustive()
    }
}

/// Bytes that were decoded and not yet taken.
#[derive(Default)]
struct Sink(Vec<u8>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > STEP_BYTES * EXPANSION_MAX {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Decoder {
    /// Returns a decoder for this compression.
    pub(crate) fn new(encoding: Encoding) -> Self {
        Self(match encoding {
            Encoding::Gzip => DecoderState::Gzip(Box::new(flate2::write::MultiGzDecoder::new(Sink::default()))),
            Encoding::Deflate => DecoderState::Zlib(Box::new(flate2::write::ZlibDecoder::new(Sink::default()))),
            Encoding::Brotli => {
                DecoderState::Brotli(Box::new(brotli::DecompressorWriter::new(Sink::default(), STEP_BYTES)))
            }
            Encoding::Zstd => zstd::stream::write::Decoder::new(Sink::default())
                .map_or(DecoderState::Broken, |decoder| DecoderState::Zstd(Box::new(decoder))),
            Encoding::Unknown => DecoderState::Broken,
        })
    }

    /// True if nothing more can be read.
    pub(crate) fn is_broken(&self) -> bool {
        matches!(self.0, DecoderState::Broken)
    }

    /// Takes the next piece, and passes what it decodes to to `each`.
    pub(crate) fn feed(&mut self, piece: &[u8], mut each: impl FnMut(Bytes)) {
        for step in piece.chunks(STEP_BYTES) {
            let written = match &mut self.0 {
                DecoderState::Gzip(decoder) => decoder.write_all(step).and_then(|()| decoder.flush()),
                DecoderState::Zlib(decoder) => decoder.write_all(step).and_then(|()| decoder.flush()),
                DecoderState::Brotli(decoder) => decoder.write_all(step).and_then(|()| decoder.flush()),
                DecoderState::Zstd(decoder) => decoder.write_all(step).and_then(|()| decoder.flush()),
                DecoderState::Broken => return,
            };
            let decoded = match &mut self.0 {
                DecoderState::Gzip(decoder) => std::mem::take(&mut decoder.get_mut().0),
                DecoderState::Zlib(decoder) => std::mem::take(&mut decoder.get_mut().0),
                DecoderState::Brotli(decoder) => std::mem::take(&mut decoder.get_mut().0),
                DecoderState::Zstd(decoder) => std::mem::take(&mut decoder.get_mut().0),
                DecoderState::Broken => return,
            };
            if !decoded.is_empty() {
                each(decoded.into());
            }
            if written.is_err() {
                self.0 = DecoderState::Broken;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(encoding: &str, text: &[u8]) -> Vec<u8> {
        match encoding {
            "gzip" => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
                encoder.write_all(text).unwrap();
                encoder.finish().unwrap()
            }
            "deflate" => {
                let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
                encoder.write_all(text).unwrap();
                encoder.finish().unwrap()
            }
            "br" => {
                let mut encoded = Vec::new();
                brotli::CompressorWriter::new(&mut encoded, 4096, 5, 20).write_all(text).unwrap();
                encoded
            }
            "zstd" => zstd::encode_all(text, 3).unwrap(),
            other => panic!("{other}"),
        }
    }

    fn decoder(encoding: &str) -> Option<Decoder> {
        let headers = HeaderMap::from_iter([(header::CONTENT_ENCODING, encoding.parse().unwrap())]);
        Encoding::from_headers(&headers).map(Decoder::new)
    }

    fn decode(encoding: &str, bytes: &[u8], piece_bytes: usize) -> Vec<u8> {
        let mut decoder = decoder(encoding).unwrap();
        let mut plain = Vec::new();
        bytes.chunks(piece_bytes).for_each(|piece| decoder.feed(piece, |part| plain.extend_from_slice(&part)));
        plain
    }

    #[test]
    fn each_encoding_is_read_however_it_is_cut() {
        let text: Vec<u8> = (0..5000).flat_map(|n| format!("data: {n}\n\n").into_bytes()).collect();
        for encoding in ["gzip", "deflate", "br", "zstd"] {
            let encoded = encode(encoding, &text);
            assert!(encoded.len() < text.len());
            for piece_bytes in [1, 1000, 1_000_000] {
                assert!(decode(encoding, &encoded, piece_bytes) == text, "{encoding}, {piece_bytes}");
            }
        }
    }

    #[test]
    fn what_is_plain_needs_no_decoder() {
        assert!(Encoding::from_headers(&HeaderMap::new()).is_none());
        assert!(decoder("identity").is_none());
    }

    #[test]
    fn what_is_broken_or_unknown_is_not_read() {
        for encoding in ["gzip", "deflate", "br", "zstd", "gzip, br", "compress"] {
            let noise: Vec<u8> = (0..10_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
            assert!(decode(encoding, &noise, 100).len() < 1000, "{encoding}");
        }
    }

    #[test]
    fn what_expands_without_end_is_given_up() {
        for encoding in ["gzip", "deflate", "br", "zstd"] {
            let bomb = encode(encoding, &vec![0; 64 * 1024 * 1024]);
            let mut decoder = decoder(encoding).unwrap();
            let mut plain = 0;
            decoder.feed(&bomb, |part| plain += part.len());
            assert!(plain <= STEP_BYTES * EXPANSION_MAX, "{encoding}: {plain}");
        }
    }
}
