//! What the dispatcher trusts: its own key, the network's manifest and the registry of models.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use infera_protocol::bytes::Hash32;
use infera_protocol::vrf::VrfSecret;
use infera_runtime::network::Live;

use crate::error::Error;

/// The files, read and checked against each other.
pub struct Roots {
    pub key: VrfSecret,
    pub live: Live,
}

impl Roots {
    /// Reads all three.
    ///
    /// # Errors
    /// [`Error::Key`], [`Error::KeyExposed`], [`Error::UnknownDispatcher`], [`Error::Network`].
    pub fn load(key: &Path, manifest: &Path, registry: &Path) -> Result<Self, Error> {
        let key = load_or_create_key(key)?;
        let live = Live::load(manifest, registry)?;
        if !live.now().manifest.dispatchers.contains(&key.key()) {
            return Err(Error::UnknownDispatcher { path: manifest.to_owned(), key: key.key() });
        }
        Ok(Self { key, live })
    }
}

/// The dispatcher's secret at `path`: 32 bytes as `0x` hex. Made with mode 0600 if it is missing.
///
/// # Errors
/// [`Error::Key`] and [`Error::KeyExposed`].
pub fn load_or_create_key(path: &Path) -> Result<VrfSecret, Error> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => create_key(path)?,
        Err(error) => return Err(file(path, &error)),
        Ok(_) => {}
    }
    let meta = fs::metadata(path).map_err(|e| file(path, &e))?;
    if meta.permissions().mode() & 0o077 != 0 {
        return Err(Error::KeyExposed { path: path.to_owned() });
    }
    let text = fs::read_to_string(path).map_err(|e| file(path, &e))?;
    let seed: Hash32 = text.trim().parse().map_err(|e| file(path, &format!("{e}; expected 32 bytes")))?;
    VrfSecret::from_seed(&seed.0).ok_or_else(|| file(path, &"these bytes have no secret"))
}

fn create_key(path: &Path) -> Result<(), Error> {
    let failed = |error: io::Error| file(path, &error);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    match created {
        // Somebody else was first: theirs is read.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(mut key) => {
            writeln!(key, "{}", Hash32(rand::random())).and_then(|()| key.sync_all()).map_err(failed)
        }
    }
}

fn file(path: &Path, reason: &dyn std::fmt::Display) -> Error {
    Error::Key { path: path.to_owned(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_kept_from_others() {
        let path = std::env::temp_dir().join(format!("infera-{}", uuid::Uuid::now_v7())).join("key");
        let first = load_or_create_key(&path).unwrap();
        assert_eq!(load_or_create_key(&path).unwrap().key(), first.key());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(load_or_create_key(&path), Err(Error::KeyExposed { .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "0x12").unwrap();
        let error = load_or_create_key(&path).unwrap_err().to_string();
        assert!(error.contains("expected 32 bytes"), "{error}");
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }
}
