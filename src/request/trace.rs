//! Traces across programs: `traceparent` and `tracestate` (W3C Trace Context, level 1). A client's trace goes on at the endpoint, with a
//! span of each attempt's own; where a client has none, one begins here.

use std::fmt::Write as _;

use http::{HeaderMap, HeaderName, HeaderValue};

/// The header that carries a trace.
pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// What tracing systems add to it, which means nothing without it.
pub(crate) const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// The trace that a request belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Its id.
    pub id: u128,
    /// The client's span; none if the trace begins here.
    pub parent: Option<u64>,
    /// Flags: the lowest bit says that somebody records it.
    flags: u8,
}

impl Trace {
    /// The client's, if it sent one as it should be; else a new one, which others are asked to record if we do.
    pub fn of(headers: &HeaderMap, samples: impl Fn(u128) -> bool) -> Self {
        let mut given = headers.get_all(TRACEPARENT).iter();
        let trace = given.next().and_then(parse).filter(|_| given.next().is_none());
        trace.unwrap_or_else(|| {
            let id = fastrand::u128(1..);
            Self { id, parent: None, flags: u8::from(samples(id)) }
        })
    }

    /// True if it is recorded.
    pub fn is_recorded(&self) -> bool {
        self.flags & 1 == 1
    }

    /// The header for an attempt, which is this span of it.
    pub fn header(&self, span: u64) -> HeaderValue {
        const LENGTH: usize = 55;
        let mut text = String::with_capacity(LENGTH);
        // A string takes everything.
        write!(text, "00-{:032x}-{span:016x}-{:02x}", self.id, self.flags).unwrap_or_default();
        HeaderValue::from_str(&text).unwrap_or_else(|_| HeaderValue::from_static(""))
    }
}

/// A new span. None is all zeros.
pub(crate) fn span() -> u64 {
    fastrand::u64(1..)
}

/// Reads `VERSION-TRACE-PARENT-FLAGS`. A later version may have more behind them.
fn parse(header: &HeaderValue) -> Option<Trace> {
    let text = header.to_str().ok()?;
    let mut parts = text.splitn(5, '-');
    let mut hex = |digits: usize| {
        let part = parts.next()?;
        let is_hex = part.len() == digits && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        is_hex.then_some(part)
    };
    let (version, id, parent, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    if version == "ff" || version == "00" && parts.next().is_some() {
        return None;
    }
    let id = u128::from_str_radix(id, 16).ok().filter(|id| *id != 0)?;
    let parent = u64::from_str_radix(parent, 16).ok().filter(|parent| *parent != 0)?;
    Some(Trace { id, parent: Some(parent), flags: u8::from_str_radix(flags, 16).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[&str]) -> Trace {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(TRACEPARENT, value.parse().unwrap());
        }
        Trace::of(&headers, |_| false)
    }

    #[test]
    fn a_trace_goes_on() {
        let trace = of(&["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"]);
        assert_eq!((trace.id, trace.parent), (0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736, Some(0x00f0_67aa_0ba9_02b7)));
        assert_eq!(trace.header(0xabc), "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000abc-01");
        let later = of(&["cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-comes-then"]);
        assert_eq!(later.parent, Some(0x00f0_67aa_0ba9_02b7));
    }

    #[test]
    fn what_is_none_begins_another() {
        const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let wrong = [
            "",
            "00-1-2-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e47360-0f067aa0ba902b7-01",
        ];
        for text in wrong {
            let trace = of(&[text]);
            assert!(trace.parent.is_none() && trace.id != 0, "{text}");
            assert!(
                trace.header(1).to_str().unwrap().ends_with("-0000000000000001-00"),
                "nobody is asked to record it"
            );
        }
        assert!(of(&[GOOD, GOOD]).parent.is_none(), "two are none");
        assert_ne!(of(&[]).id, of(&[]).id);
        assert_ne!(span(), span());
    }
}
