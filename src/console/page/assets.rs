//! The page's style sheet, script and icon, which are a part of the program.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Write as _;
use std::sync::{LazyLock, OnceLock};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;

/// A file that the page needs.
pub(super) struct Asset {
    pub(super) path: &'static str,
    pub(super) content_type: &'static str,
    pub(super) text: &'static str,
    compressed: OnceLock<Bytes>,
}

impl Asset {
    const fn new(path: &'static str, content_type: &'static str, text: &'static str) -> Self {
        Self { path, content_type, text, compressed: OnceLock::new() }
    }

    /// It compressed, which is done once: anybody may ask for it.
    pub(super) fn compressed(&self) -> Bytes {
        self.compressed.get_or_init(|| compressed(self.text.as_bytes())).clone()
    }
}

/// A text compressed by gzip.
pub(super) fn compressed(text: &[u8]) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    // A vector takes everything.
    encoder.write_all(text).unwrap_or_default();
    encoder.finish().unwrap_or_default().into()
}

static ASSETS: [Asset; 3] = [
    Asset::new("/dashboard/page.css", "text/css; charset=utf-8", include_str!("assets/page.css")),
    Asset::new("/dashboard/page.js", "text/javascript; charset=utf-8", include_str!("assets/page.js")),
    Asset::new("/dashboard/icon.svg", "image/svg+xml", include_str!("assets/icon.svg")),
];

/// A short name of this build, by which a page of another one is noticed after an upgrade.
pub(super) static BUILD: LazyLock<String> = LazyLock::new(|| {
    let mut hasher = DefaultHasher::new();
    env!("CARGO_PKG_VERSION").hash(&mut hasher);
    for asset in &ASSETS {
        asset.text.hash(&mut hasher);
    }
    format!("{:016x}", hasher.finish())
});

/// The file of a path.
pub(super) fn find(path: &str) -> Option<&'static Asset> {
    ASSETS.iter().find(|asset| asset.path == path)
}
