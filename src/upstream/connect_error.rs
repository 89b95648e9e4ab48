//! Why no connection could be made, in words: what is wrong with the way to an endpoint, and the way out.

use std::fmt;
use std::io;

use pingora::{Error, ErrorType};

/// Step at which a connection failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnectStage {
    /// The TCP connection, or the proxy on the way.
    Connect,
    /// The TLS handshake.
    Tls,
}

/// A connection that could not be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConnectError {
    /// Step.
    pub(crate) stage: ConnectStage,
    /// Reason.
    pub(crate) what: String,
    /// The way out; empty if none is known.
    pub(crate) way_out: &'static str,
}

/// Words in an error of the TLS library, what they mean, and the way out.
const TLS_ERRORS: [(&str, &str, &str); 14] = [
    (
        "UnknownIssuer",
        "its certificate is signed by an authority that is not trusted here",
        "name that authority's certificate in tls.caFile",
    ),
    (
        "CaUsedAsEndEntity",
        "its certificate is an authority's own (CA:TRUE), which no server may show",
        "make it a certificate with basicConstraints=CA:FALSE, and name the one that signed it in tls.caFile",
    ),
    ("certificate expired", "its certificate has expired", "have it renewed; if it is valid, set this machine's clock"),
    ("not valid yet", "its certificate is not valid yet", "set this machine's clock"),
    ("Revoked", "its certificate is revoked", "have it renewed"),
    (
        "UnsupportedSignatureAlgorithm",
        "its certificate is signed in a way that is not supported",
        "make it a certificate with an ECDSA or RSA key and SHA-256",
    ),
    ("UnsupportedCertVersion", "its certificate is of an old version", "make it a certificate of version 3"),
    (
        "BadSignature",
        "its certificate is not signed by the authority that it names",
        "name the authority that signed it in tls.caFile",
    ),
    (
        "InvalidContentType",
        "what listens there does not speak TLS",
        "write http:// in baseUrl if that is meant, or correct its port",
    ),
    ("handshake eof", "it closed the connection during the TLS handshake", "does TLS begin at this port of baseUrl?"),
    ("UnrecognisedName", "it does not know the host of baseUrl", "correct the host in baseUrl"),
    ("CertificateRequired", "it wants a certificate of its clients, which is not supported", ""),
    ("NoApplicationProtocol", "it does not speak the version of HTTP that is asked for", "leave http2 out"),
    (
        "received fatal alert",
        "it has no version of TLS or no cipher in common with this gateway (TLS 1.2 and 1.3)",
        "let it speak TLS 1.2 or newer",
    ),
];

impl ConnectError {
    /// Explains an error of Pingora's connector.
    pub(crate) fn explain(error: &Error) -> Self {
        let context = error.context.as_ref().map_or("", |context| context.as_str());
        if matches!(error.etype, ErrorType::TLSHandshakeFailure | ErrorType::InvalidCert) {
            return Self::of_tls(context);
        }
        let (what, way_out) = match error.etype {
            ErrorType::ConnectRefused => (
                "nothing listens there: connection refused".to_owned(),
                "is it running, and is the port of baseUrl right?",
            ),
            ErrorType::ConnectNoRoute => {
                ("there is no route to it".to_owned(), "is this machine's network up, IPv6 included?")
            }
            ErrorType::ConnectTimedout => (
                "it was not reached in time".to_owned(),
                "see timeouts.connectMs, and whether a firewall is in between",
            ),
            ErrorType::TLSHandshakeTimedout => {
                let what = "the TLS handshake did not end in time".to_owned();
                return Self { stage: ConnectStage::Tls, what, way_out: "does TLS begin at this port of baseUrl?" };
            }
            _ => (plain(error, context), ""),
        };
        Self { stage: ConnectStage::Connect, what, way_out }
    }

    fn of_tls(context: &str) -> Self {
        let stage = ConnectStage::Tls;
        if let Some((_, names)) = context.split_once("is only valid for ") {
            let names = names.rsplit_once(", SNI").map_or(names, |(names, _)| names);
            let what = format!("its certificate is for {}, not for the host of baseUrl", unquoted(names));
            return Self {
                stage,
                what,
                way_out: "write one of these names in baseUrl, or have the certificate made for it",
            };
        }
        if let Some((_, what, way_out)) = TLS_ERRORS.iter().find(|(words, ..)| context.contains(words)) {
            return Self { stage, what: (*what).to_owned(), way_out };
        }
        let words = context.strip_prefix("TLS connect() failed: ").unwrap_or(context);
        let words = words.rsplit_once(", SNI").map_or(words, |(words, _)| words);
        Self { stage, what: format!("the TLS handshake failed: {words}"), way_out: "" }
    }
}

/// The reason of another error: that of the system if it has one, else what the connector says.
fn plain(error: &Error, context: &str) -> String {
    let mut cause = error.cause.as_deref().map(|cause| cause as &dyn std::error::Error);
    while let Some(inner) = cause {
        if let Some(system) = inner.downcast_ref::<io::Error>() {
            return system.to_string();
        }
        cause = match inner.downcast_ref::<Box<Error>>() {
            Some(error) => error.cause.as_deref().map(|cause| cause as &dyn std::error::Error),
            None => inner.source(),
        };
    }
    if context.is_empty() { error.etype.as_str().to_owned() } else { context.to_owned() }
}

/// Names without the quotation of the TLS library: `DnsName("a")` is `a`.
fn unquoted(names: &str) -> String {
    let quoted: Vec<&str> = names.split('"').skip(1).step_by(2).collect();
    if quoted.is_empty() { names.to_owned() } else { quoted.join(", ") }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if self.way_out.is_empty() { Ok(()) } else { write!(f, " ({})", self.way_out) }
    }
}
