//! Commitments on disk before they are sent: one file per slot, with the commitment and what opens it. A slot that is
//! closed leaves an empty file in `closed/`, since a second answer to it would cost the stake (protocol section 10).

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use infera_protocol::ids;
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

/// What is known of a slot.
#[derive(Debug, Clone, PartialEq)]
pub enum Entry {
    Open(Box<Promise>),
    /// There was a promise.
    Closed,
}

/// The folder.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
    closed: PathBuf,
}

impl Journal {
    pub fn open(folder: &Path) -> io::Result<Self> {
        let closed = folder.join("closed");
        fs::create_dir_all(&closed)?;
        Ok(Self { folder: folder.to_owned(), closed })
    }

    fn path(&self, key: Key) -> PathBuf {
        self.folder.join(name_of(key))
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

    /// What was promised for a slot, if anything was.
    pub fn read(&self, key: Key) -> io::Result<Option<Entry>> {
        let bytes = match fs::read(self.path(key)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let is_closed = self.closed.join(name_of(key)).try_exists()?;
                return Ok(is_closed.then_some(Entry::Closed));
            }
            Err(error) => return Err(error),
        };
        let mut rest = bytes.as_slice();
        let damaged = |e: prost::DecodeError| io::Error::new(io::ErrorKind::InvalidData, e);
        let commit = v1::Commit::decode_length_delimited(&mut rest).map_err(damaged)?;
        let reveal = v1::Reveal::decode_length_delimited(&mut rest).map_err(damaged)?;
        Ok(Some(Entry::Open(Box::new(Promise { commit, reveal }))))
    }

    /// All promises that are open.
    pub fn all(&self) -> io::Result<Vec<(Key, Promise)>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let Some(key) = key_of(&name) else { continue };
            match self.read(key) {
                Ok(Some(Entry::Open(promise))) => all.push((key, *promise)),
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, file = name, "a promise of the journal is damaged"),
            }
        }
        Ok(all)
    }

    /// The request is closed: nobody asks for the promise any more.
    pub fn close(&self, key: Key) {
        let closed = self.closed.join(name_of(key));
        let done = fs::rename(self.path(key), &closed).and_then(|()| File::create(&closed));
        if let Err(error) = done
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "a promise stays in the journal");
        }
    }

    /// Forgets closed slots of requests that were made before this moment, ms.
    pub fn forget(&self, before_ms: u64) -> io::Result<()> {
        for entry in fs::read_dir(&self.closed)? {
            let entry = entry?;
            let key = key_of(&entry.file_name().to_string_lossy());
            if key.is_some_and(|(request, _)| ids::time_ms(request) < before_ms) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

fn name_of((request, attempt): Key) -> String {
    format!("{request}-{attempt}")
}

fn key_of(name: &str) -> Option<Key> {
    let (request, attempt) = name.rsplit_once('-')?;
    Some((request.parse().ok()?, attempt.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use infera_protocol::bytes::Hash32;

    use super::*;

    #[test]
    fn a_closed_slot_is_known_until_its_time_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let commit = v1::Commit { attempt: 1, commitment: vec![7; 32], ..v1::Commit::default() };
        let promise = Promise { commit, reveal: v1::Reveal::default() };
        let [old, new, open] = [10, 20, 10].map(|ms| (ids::id_at(ms, &Hash32([ms as u8; 32])), 1));
        let open = (open.0, 2);
        for key in [old, new, open] {
            journal.write(key, &promise).unwrap();
        }
        for key in [old, new, (new.0, 3)] {
            journal.close(key);
        }
        let all = |journal: &Journal| [old, new, open, (new.0, 3)].map(|key| journal.read(key).unwrap());
        let is_open = Some(Entry::Open(Box::new(promise.clone())));
        assert_eq!(all(&journal), [Some(Entry::Closed), Some(Entry::Closed), is_open.clone(), None]);
        let journal = Journal::open(dir.path()).unwrap();
        assert_eq!(journal.all().unwrap(), [(open, promise)]);
        journal.forget(20).unwrap();
        assert_eq!(all(&journal), [None, Some(Entry::Closed), is_open, None]);
    }
}
