//! The network's manifest and its model registries, from their files.
//!
//! `network.json` names the registry in force by its hash; `models.json` is that registry; `registries/<hash>.json`
//! beside it holds each former version, so that what was made under it can be checked for ever. `stakes.json`, where
//! somebody follows the chain's stakes, says who may work.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use infera_protocol::bytes::Hash32;
use infera_protocol::registry::{History, HistoryError, Manifest, Registry, Replaced};
use infera_protocol::stakes::Stakes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Largest manifest or registry that is read, bytes.
pub const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;
/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// The folder of former registries, beside the one in force.
const FORMER: &str = "registries";

/// Why the files cannot be used. One sentence each.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{what} {} cannot be used: {reason}", path.display())]
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
    follow(json("the registry", path)?, path)
}

fn follow(current: Registry, path: &Path) -> Result<History, NetworkError> {
    History::follow(current, |hash| match read(&former(path, hash)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.to_string()),
    })
    .map_err(|source| NetworkError::History { path: path.to_owned(), source })
}

/// Reads both, which must belong together. Where a new registry is written and the manifest names the one before still,
/// that one is in force.
///
/// # Errors
/// [`NetworkError`].
pub fn load(manifest_path: &Path, registry_path: &Path) -> Result<(Manifest, History), NetworkError> {
    let manifest = manifest(manifest_path)?;
    let expected = manifest.registry_hash;
    let registries = registries(registry_path)?;
    let actual = hash(registry_path, registries.current())?;
    if actual == expected {
        return Ok((manifest, registries));
    }
    let replaced = registries.current().replaces.map(|former| former.registry_hash);
    let before = former(registry_path, &expected);
    if replaced == Some(expected) && before.is_file() {
        let current: Registry = json("the registry", &before)?;
        if hash(&before, &current)? == expected {
            return Ok((manifest, follow(current, registry_path)?));
        }
    }
    Err(NetworkError::NotNamed { path: registry_path.to_owned(), actual, expected })
}

fn hash(path: &Path, registry: &Registry) -> Result<Hash32, NetworkError> {
    registry.hash().map_err(|error| file("the registry", path, &error))
}

/// Makes `wanted` the registry at `path`, whose content says since when (`now_ms`) and what it replaces; what is there is
/// kept under its hash. The same content as before changes nothing. Returns what is at `path` then. The manifest is to be
/// written afterwards.
///
/// # Errors
/// [`NetworkError::File`].
pub fn replace(path: &Path, wanted: &Registry, now_ms: i64) -> Result<Registry, NetworkError> {
    let stored: Registry = json("the registry", path)?;
    let same = stored.models == wanted.models && stored.releases == wanted.releases;
    if same && stored.calibration == wanted.calibration {
        return Ok(stored);
    }
    let registry_hash = hash(path, &stored)?;
    write_json(&former(path, &registry_hash), &stored)?;
    // A clock that was set back must not make the new one older than what it replaces.
    let after = stored.replaces.map_or(i64::MIN, |former| former.at_ms.saturating_add(1));
    let replaces = Some(Replaced { registry_hash, at_ms: now_ms.max(after) });
    let registry = Registry { replaces, ..wanted.clone() };
    write_json(path, &registry)?;
    Ok(registry)
}

/// Writes a value as compact JSON, whole or not at all.
///
/// # Errors
/// [`NetworkError::File`].
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), NetworkError> {
    let failed = |reason: &dyn std::fmt::Display| file("the file", path, reason);
    let bytes = serde_json::to_vec(value).map_err(|error| failed(&error))?;
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|error| failed(&error))?;
    }
    write_atomically(path, &bytes).map_err(|error| failed(&error))
}

/// Writes a file so that a reader, or a start after a crash, sees the former content or the new one.
///
/// # Errors
/// The file system's.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    io::Write::write_all(&mut file, bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

/// Where the version `hash` is kept once another took its place in the file `registry`.
pub fn former(registry: &Path, hash: &Hash32) -> PathBuf {
    registry.with_file_name(FORMER).join(format!("{hash}.json"))
}

/// Where the stakes are, beside the manifest.
pub fn stakes_path(manifest: &Path) -> PathBuf {
    manifest.with_file_name("stakes.json")
}

/// Who has enough at stake; without a file nobody needs any.
///
/// # Errors
/// [`NetworkError::File`].
fn stakes(manifest_path: &Path) -> Result<Stakes, NetworkError> {
    let path = stakes_path(manifest_path);
    if path.is_file() { json("the stakes", &path) } else { Ok(Stakes::default()) }
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

/// The files as they were at one moment, belonging together.
#[derive(Debug, Clone)]
pub struct Roots {
    pub manifest: Manifest,
    pub registries: History,
    pub stakes: Stakes,
}

/// The network's roots as they are now, in a process that goes on while holders vote: whoever follows the chain writes a
/// new registry and then the manifest that names it, and everybody else takes them over from the files.
#[derive(Debug, Clone)]
pub struct Live {
    manifest_path: PathBuf,
    registry_path: PathBuf,
    publish: Arc<watch::Sender<Arc<Roots>>>,
}

impl Live {
    /// Reads the files. They are followed by [`Live::follow`].
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn load(manifest_path: &Path, registry_path: &Path) -> Result<Self, NetworkError> {
        let (manifest, registries) = load(manifest_path, registry_path)?;
        let stakes = stakes(manifest_path)?;
        let (publish, _) = watch::channel(Arc::new(Roots { manifest, registries, stakes }));
        Ok(Self {
            manifest_path: manifest_path.to_owned(),
            registry_path: registry_path.to_owned(),
            publish: Arc::new(publish),
        })
    }

    /// Roots that nobody replaces, where there are no files to follow.
    #[must_use]
    pub fn fixed(roots: Roots) -> Self {
        let (publish, _) = watch::channel(Arc::new(roots));
        Self { manifest_path: PathBuf::new(), registry_path: PathBuf::new(), publish: Arc::new(publish) }
    }

    /// What is in force now.
    #[must_use]
    pub fn now(&self) -> Arc<Roots> {
        self.publish.borrow().clone()
    }

    /// Sees every change from now on; several in a row may be seen as one.
    pub fn watch(&self) -> watch::Receiver<Arc<Roots>> {
        self.publish.subscribe()
    }

    /// Takes changes of the registry and of stakes over until `stop`. Of the manifest nothing else may change while a
    /// process runs: such a file is not taken over, and the log says so. So it does of stakes that can't be read; the
    /// former ones stay in force.
    pub async fn follow(&self, stop: CancellationToken) {
        let mut seen = None;
        let mut is_said = false;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let stakes_path = stakes_path(&self.manifest_path);
            let written = [&self.manifest_path, &self.registry_path, &stakes_path].map(|path| {
                let meta = fs::metadata(path).ok()?;
                Some((meta.len(), meta.modified().ok()?))
            });
            if seen == Some(written) {
                continue;
            }
            match load(&self.manifest_path, &self.registry_path) {
                Ok((manifest, registries)) => {
                    let stakes = stakes(&self.manifest_path);
                    seen = stakes.is_ok().then_some(written);
                    let is_said_before = std::mem::replace(&mut is_said, stakes.is_err());
                    let stakes = stakes.unwrap_or_else(|error| {
                        if !is_said_before {
                            tracing::error!(%error, "the former stakes stay in force");
                        }
                        self.now().stakes.clone()
                    });
                    self.take(Roots { manifest, registries, stakes });
                }
                // Between two writes the files do not belong together: the next look finds that they do.
                Err(error) => tracing::debug!(%error, "the network's files are not taken over"),
            }
        }
    }

    fn take(&self, found: Roots) {
        let now = self.now();
        let same = Manifest { registry_hash: now.manifest.registry_hash, ..found.manifest.clone() };
        if same != now.manifest {
            return tracing::error!(
                path = %self.manifest_path.display(),
                "the manifest differs in more than its registry: restart to take it over"
            );
        }
        let is_voted = found.manifest.registry_hash != now.manifest.registry_hash;
        if is_voted {
            tracing::info!(registry = %found.manifest.registry_hash, "another registry is in force");
        }
        if is_voted || found.stakes != now.stakes {
            self.publish.send_replace(Arc::new(found));
        }
    }
}
