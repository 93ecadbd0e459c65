//! Commitments on disk before they are sent: one file per slot, with the commitment and what opens it.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use infera_wire::{Message, v1};
use uuid::Uuid;

/// A slot as (request, attempt).
pub type Key = (Uuid, u32);

/// What was promised for a slot.
#[derive(Debug, Clone, PartialEq)]
pub struct Promise {
    pub commit: v1::Commit,
    pub reveal: v1::Reveal,
}

/// The folder.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
}

impl Journal {
    pub fn open(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        Ok(Self { folder: folder.to_owned() })
    }

    fn path(&self, key: Key) -> PathBuf {
        self.folder.join(format!("{}-{}", key.0, key.1))
    }

    /// Writes a promise; it is on disk when this returns.
    pub fn write(&self, key: Key, promise: &Promise) -> io::Result<()> {
        let mut bytes = promise.commit.encode_length_delimited_to_vec();
        bytes.extend(promise.reveal.encode_length_delimited_to_vec());
        let path = self.path(key);
        let temporary = path.with_extension("new");
        let mut file = File::create(&temporary)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        File::open(&self.folder)?.sync_all()
    }

    /// The promise of a slot, if one was made.
    pub fn read(&self, key: Key) -> io::Result<Option<Promise>> {
        let bytes = match fs::read(self.path(key)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut rest = bytes.as_slice();
        let damaged = |e: prost::DecodeError| io::Error::new(io::ErrorKind::InvalidData, e);
        let commit = v1::Commit::decode_length_delimited(&mut rest).map_err(damaged)?;
        let reveal = v1::Reveal::decode_length_delimited(&mut rest).map_err(damaged)?;
        Ok(Some(Promise { commit, reveal }))
    }

    /// All promises that were not forgotten.
    pub fn all(&self) -> io::Result<Vec<(Key, Promise)>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let Some((request, attempt)) = name.rsplit_once('-') else { continue };
            let (Ok(request), Ok(attempt)) = (request.parse(), attempt.parse()) else { continue };
            match self.read((request, attempt)) {
                Ok(Some(promise)) => all.push(((request, attempt), promise)),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, file = name, "a promise of the journal is damaged"),
            }
        }
        Ok(all)
    }

    /// The request is closed: nobody asks for the promise any more.
    pub fn forget(&self, key: Key) {
        if let Err(error) = fs::remove_file(self.path(key))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "a promise stays in the journal");
        }
    }
}
