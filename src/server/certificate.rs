//! The certificate that clients are shown. It is read again while the process serves, since most are renewed every few
//! weeks.

use std::path::Path;
use std::sync::Arc;

use arc_swap::ArcSwap;
use pingora::tls::sign::CertifiedKey;
use pingora::tls::{CertificateDer, ClientHello, CryptoProvider, PrivateKeyDer, ResolvesServerCert};
use rustls_pki_types::pem::PemObject;

use crate::config::ServerTls;

/// Certificate that new connections are shown. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Certificate(Arc<ArcSwap<CertifiedKey>>);

impl Certificate {
    /// Reads the certificate from its files. The error names the file.
    pub(super) fn new(files: &ServerTls) -> Result<Self, String> {
        Ok(Self(Arc::new(ArcSwap::from_pointee(read(files)?))))
    }

    /// Reads files again, for [`Certificate::show`].
    pub(super) fn read(files: &ServerTls) -> Result<CertifiedKey, String> {
        read(files)
    }

    /// Shows this from now on. Returns true if it is another certificate.
    pub(super) fn show(&self, read: CertifiedKey) -> bool {
        let is_another = self.0.load().cert != read.cert;
        self.0.store(Arc::new(read));
        is_another
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

fn read(files: &ServerTls) -> Result<CertifiedKey, String> {
    let fail = |file: &Path, why: String| format!("server.tls: {}: {why}", file.display());
    pingora::tls::install_default_crypto_provider();
    let chain = CertificateDer::pem_file_iter(&files.cert_file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| fail(&files.cert_file, error.to_string()))?;
    if chain.is_empty() {
        return Err(fail(&files.cert_file, "no certificate in it".into()));
    }
    let key =
        PrivateKeyDer::from_pem_file(&files.key_file).map_err(|error| fail(&files.key_file, error.to_string()))?;
    let provider = CryptoProvider::get_default().ok_or("no cryptography is installed")?;
    CertifiedKey::from_der(chain, key, provider).map_err(|error| {
        fail(&files.cert_file, format!("{error} (does the key in {} belong to it?)", files.key_file.display()))
    })
}
