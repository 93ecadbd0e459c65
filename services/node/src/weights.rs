//! The weights, and proofs that they are at hand.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use infera_protocol::{
    admission::{MAX_RANGES, Tree},
    bytes::Hash32,
};
use infera_wire::v1;

use crate::pack::Pack;

/// A model, hashed when the node started.
pub struct Weights {
    path: PathBuf,
    tree: Tree,
    /// What the node says that it has.
    declared: Hash32,
}

impl Weights {
    /// Hashes the file or folder in one pass.
    ///
    /// # Errors
    /// It can't be read.
    pub fn read(path: &Path) -> io::Result<Self> {
        let tree = Tree::read(Pack::open(path)?.reader())?;
        Ok(Self { path: path.to_owned(), declared: tree.root(), tree })
    }

    /// For tests of the network: this file under another one's name.
    pub fn declared_as(self, root: Hash32) -> Self {
        Self { declared: root, ..self }
    }

    /// The BLAKE3 root that the hello has.
    pub fn root(&self) -> Hash32 {
        self.declared
    }

    /// Slices of the model for the ranges of a challenge. It is opened anew: what counts is what lies there now.
    ///
    /// # Errors
    /// Too many ranges, one that is none, or a file that can't be read or has changed.
    pub fn prove(&self, challenge: &v1::RangeChallenge) -> io::Result<v1::RangeProof> {
        if challenge.ranges.len() > MAX_RANGES {
            let text = format!("{} ranges, at most {MAX_RANGES}", challenge.ranges.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let model = Pack::open(&self.path)?;
        let slice = |range: &v1::Range| {
            self.tree.slice((range.offset, range.length), |offset, out| model.read_exact_at(out, offset))
        };
        let slices = challenge.ranges.iter().map(slice).collect::<io::Result<_>>()?;
        Ok(v1::RangeProof { nonce: challenge.nonce.clone(), slices })
    }
}

/// What a registry lists of a model's file or folder: BLAKE3 and length in bytes of its one string ([`crate::pack`]).
///
/// # Errors
/// It can't be read.
pub fn measure(path: &Path) -> io::Result<(Hash32, u64)> {
    let model = Pack::open(path)?;
    Ok((hash(model.reader())?, model.bytes()))
}

/// BLAKE3 of a program, as the registry lists releases.
///
/// # Errors
/// The file can't be read.
pub fn release(path: &Path) -> io::Result<Hash32> {
    hash(File::open(path)?)
}

fn hash(bytes: impl io::Read) -> io::Result<Hash32> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(bytes)?;
    Ok(Hash32(*hasher.finalize().as_bytes()))
}
