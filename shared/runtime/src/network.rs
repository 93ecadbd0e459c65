//! The network's manifest and its model registries, from their files.
//!
//! `network.json` names the registry in force by its hash; `models.json` is that registry; `registries/<hash>.json`
//! beside it holds each former version, so that what was made under it can be checked for ever.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use infera_protocol::bytes::Hash32;
use infera_protocol::registry::{History, HistoryError, Manifest, Registry};
use serde::de::DeserializeOwned;

/// Largest manifest or registry that is read, bytes.
pub const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;
/// The folder of former registries, beside the one in force.
const FORMER: &str = "registries";

/// Why the files cannot be used. One sentence each.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{what} {} cannot be read: {reason}", path.display())]
    File { what: &'static str, path: PathBuf, reason: String },
    #[error(
        "the registry {} is not the one that the manifest names: its hash is {actual}, expected {expected}; both must \
         come from the same network",
        path.display()
    )]
    NotNamed { path: PathBuf, actual: Hash32, expected: Hash32 },
    #[error("the registries before {} are not what it names: {source}", path.display())]
    History { path: PathBuf, source: HistoryError },
}

/// Reads a manifest.
///
/// # Errors
/// [`NetworkError::File`].
pub fn manifest(path: &Path) -> Result<Manifest, NetworkError> {
    json("the manifest", path)
}

/// Reads a registry and the versions before it, as far as they are there. What a manifest names is the caller's to
/// compare.
///
/// # Errors
/// [`NetworkError::File`] and [`NetworkError::History`].
pub fn registries(path: &Path) -> Result<History, NetworkError> {
    let current: Registry = json("the registry", path)?;
    History::follow(current, |hash| match read(&former(path, hash)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.to_string()),
    })
    .map_err(|source| NetworkError::History { path: path.to_owned(), source })
}

/// Reads both, which must belong together.
///
/// # Errors
/// [`NetworkError`].
pub fn load(manifest_path: &Path, registry_path: &Path) -> Result<(Manifest, History), NetworkError> {
    let manifest = manifest(manifest_path)?;
    let registries = registries(registry_path)?;
    let unreadable = |error: serde_json::Error| file("the registry", registry_path, &error);
    let actual = registries.current().hash().map_err(unreadable)?;
    if actual != manifest.registry_hash {
        return Err(NetworkError::NotNamed {
            path: registry_path.to_owned(),
            actual,
            expected: manifest.registry_hash,
        });
    }
    Ok((manifest, registries))
}

/// Where the version `hash` is kept once another took its place in the file `registry`.
pub fn former(registry: &Path, hash: &Hash32) -> PathBuf {
    registry.with_file_name(FORMER).join(format!("{hash}.json"))
}

fn json<T: DeserializeOwned>(what: &'static str, path: &Path) -> Result<T, NetworkError> {
    let bytes = read(path).map_err(|error| file(what, path, &error))?;
    serde_json::from_slice(&bytes).map_err(|error| file(what, path, &error))
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let size = fs::metadata(path)?.len();
    if size > MAX_FILE_BYTES {
        return Err(io::Error::other(format!("{size} bytes, at most {MAX_FILE_BYTES} are read")));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn file(what: &'static str, path: &Path, reason: &dyn std::fmt::Display) -> NetworkError {
    NetworkError::File { what, path: path.to_owned(), reason: reason.to_string() }
}
