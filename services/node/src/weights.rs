//! The weights file, and proofs that it is at hand.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use infera_protocol::{
    admission::{MAX_RANGES, Tree},
    bytes::Hash32,
};
use infera_wire::v1;

/// A file, hashed when the node started.
pub struct Weights {
    path: PathBuf,
    tree: Tree,
    /// What the node says that it has.
    declared: Hash32,
}

impl Weights {
    /// Hashes the file in one pass.
    ///
    /// # Errors
    /// It can't be read.
    pub fn read(path: &Path) -> io::Result<Self> {
        let tree = Tree::read(File::open(path)?)?;
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

    /// Slices of the file for the ranges of a challenge. The file is opened anew: what counts is what lies there now.
    ///
    /// # Errors
    /// Too many ranges, one that is none, or a file that can't be read or has changed.
    pub fn prove(&self, challenge: &v1::RangeChallenge) -> io::Result<v1::RangeProof> {
        if challenge.ranges.len() > MAX_RANGES {
            let text = format!("{} ranges, at most {MAX_RANGES}", challenge.ranges.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let file = File::open(&self.path)?;
        let slice = |range: &v1::Range| {
            self.tree.slice((range.offset, range.length), |offset, out| file.read_exact_at(out, offset))
        };
        let slices = challenge.ranges.iter().map(slice).collect::<io::Result<_>>()?;
        Ok(v1::RangeProof { nonce: challenge.nonce.clone(), slices })
    }
}

/// BLAKE3 of a file, as the registry lists weights and releases.
///
/// # Errors
/// The file can't be read.
pub fn weights_root(path: &Path) -> io::Result<Hash32> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(Hash32(*hasher.finalize().as_bytes()))
}
