//! Possession of the weights (protocol section 2): ranges of the file, chosen in the moment, come back with what shows
//! that they are part of it.
//!
//! BLAKE3 hashes a file as a tree over chunks of 1 KiB. Whoever holds the file and the hashes above its groups of 16
//! chunks proves a group by the hashes beside its path to the root, and the root is the file's plain BLAKE3 hash, as the
//! registry lists it. The hashes take 0.4% of the file.
//!
//! A slice has no length fields: for each group that the range touches, in their order, the group's bytes and the hashes
//! beside its path, lowest first. Its length follows from the file's, so that a checker allocates nothing that it was
//! told to.
//!
//! That a node has the file does not show that it computes with it: a trial asks it for an answer to a prompt that nobody
//! has seen, which a trusted node then scores like any answer.

use crate::{assignment::number, bytes::Hash32, registry::Model, request::Request, sampling::SamplingParams};
use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use std::io::{self, Read};
use uuid::Uuid;

/// Bytes of a group: 16 chunks.
pub const GROUP_BYTES: u64 = 16 * 1024;
/// Longest range, bytes.
pub const MAX_RANGE_BYTES: u32 = 16 * 1024;
/// Most ranges of one challenge.
pub const MAX_RANGES: usize = 8;
/// Tokens of a trial's prompt, and of its answer at most.
pub const TRIAL_TOKENS: u32 = 24;

const HASH_BYTES: usize = Hash32::LEN;

/// Bytes of a file: (offset, length).
pub type Range = (u64, u32);

/// A range that is none, or a slice that proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdmissionError {
    #[error(
        "range {offset}+{length} of a file of {file_bytes} bytes; allowed are 1 to {MAX_RANGE_BYTES} bytes within it"
    )]
    Range { offset: u64, length: u32, file_bytes: u64 },
    #[error("the slice has {actual} bytes, this range's has {expected}")]
    Length { expected: usize, actual: usize },
    #[error("the slice does not lead to the root")]
    Root,
}

/// The request of a trial, by randomness that the node does not know before: tokens of the vocabulary, drawn evenly, so
/// that no two trials are alike.
pub fn trial(beta: &Hash32, id: Uuid, model: &Model) -> Request {
    let token = |i: u32| {
        let drawn = number(beta, &[b"prompt".as_slice(), &i.to_be_bytes()].concat(), model.vocab_size.into());
        u32::try_from(drawn).unwrap_or(0)
    };
    let room = (model.context_length / 2).clamp(1, TRIAL_TOKENS);
    Request {
        id,
        model_root: model.weights_root,
        prompt: (0..room).map(token).collect(),
        sampling: SamplingParams::default(),
        max_tokens: room,
        stop: Vec::new(),
        seed: number(beta, b"seed", u64::MAX),
        grammar: None,
    }
}

/// The groups that a range touches, first and last.
fn groups((offset, length): Range, file_bytes: u64) -> Result<std::ops::RangeInclusive<u64>, AdmissionError> {
    let end = offset.checked_add(u64::from(length)).filter(|end| *end <= file_bytes);
    match end {
        Some(end) if (1..=MAX_RANGE_BYTES).contains(&length) => {
            Ok(offset / GROUP_BYTES..=(end - 1) / GROUP_BYTES)
        }
        _ => Err(AdmissionError::Range { offset, length, file_bytes }),
    }
}

/// Bytes of a group: only the last one may have fewer.
fn group_bytes(group: u64, file_bytes: u64) -> usize {
    (file_bytes - group * GROUP_BYTES).min(GROUP_BYTES) as usize
}

fn group_hash(group: u64, bytes: &[u8]) -> ChainingValue {
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(group * GROUP_BYTES).update(bytes).finalize_non_root()
}

/// The places on a node's way to the root that have a neighbour: (the level's number, the node's number in it). A level
/// has half the nodes of the one below; an odd last one goes up as it is.
fn path(group: u64, file_bytes: u64) -> impl Iterator<Item = (usize, u64)> {
    let mut width = file_bytes.div_ceil(GROUP_BYTES);
    let mut at = group;
    (0..)
        .map_while(move |level| {
            let place = (width > 1).then_some((level, at, width));
            (at, width) = (at / 2, width.div_ceil(2));
            place
        })
        .filter(|(_, at, width)| at ^ 1 < *width)
        .map(|(level, at, _)| (level, at))
}

/// Bytes of the slice that proves `range`.
///
/// # Errors
/// [`AdmissionError::Range`].
pub fn slice_bytes(file_bytes: u64, range: Range) -> Result<usize, AdmissionError> {
    let one = |group| group_bytes(group, file_bytes) + path(group, file_bytes).count() * HASH_BYTES;
    Ok(groups(range, file_bytes)?.map(one).sum())
}

/// Checks a slice of the file with this BLAKE3 root; gives the range's bytes.
///
/// # Errors
/// [`AdmissionError`].
pub fn verify_slice(
    root: &Hash32,
    file_bytes: u64,
    range: Range,
    slice: &[u8],
) -> Result<Vec<u8>, AdmissionError> {
    let touched = groups(range, file_bytes)?;
    let expected = slice_bytes(file_bytes, range)?;
    let wrong_length = AdmissionError::Length { expected, actual: slice.len() };
    if slice.len() != expected {
        return Err(wrong_length);
    }
    let skip = (range.0 - touched.start() * GROUP_BYTES) as usize;
    let mut bytes = Vec::with_capacity(slice.len());
    let mut rest = slice;
    for group in touched {
        let (own, more) =
            rest.split_at_checked(group_bytes(group, file_bytes)).ok_or(wrong_length.clone())?;
        let beside = path(group, file_bytes).count();
        let (hashes, more) = more.split_at_checked(beside * HASH_BYTES).ok_or(wrong_length.clone())?;
        if root_of(group, file_bytes, own, hashes) != *root {
            return Err(AdmissionError::Root);
        }
        bytes.extend_from_slice(own);
        rest = more;
    }
    bytes.drain(..skip);
    bytes.truncate(range.1 as usize);
    Ok(bytes)
}

/// The root to which a group leads with the hashes beside its path.
fn root_of(group: u64, file_bytes: u64, bytes: &[u8], hashes: &[u8]) -> Hash32 {
    if file_bytes <= GROUP_BYTES {
        return Hash32(*blake3::hash(bytes).as_bytes());
    }
    let (hashes, _) = hashes.as_chunks::<HASH_BYTES>();
    let mut hash = group_hash(group, bytes);
    let mut places = path(group, file_bytes).zip(hashes).peekable();
    while let Some(((_, at), other)) = places.next() {
        let (left, right) = if at % 2 == 0 { (&hash, other) } else { (other, &hash) };
        if places.peek().is_none() {
            return Hash32(*merge_subtrees_root(left, right, Mode::Hash).as_bytes());
        }
        hash = merge_subtrees_non_root(left, right, Mode::Hash);
    }
    Hash32(hash)
}

/// The hashes above the groups of a file: what a node keeps beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    file_bytes: u64,
    root: Hash32,
    /// Those of the groups first; each level has half as many as the one before, down to two.
    levels: Vec<Vec<ChainingValue>>,
}

impl Tree {
    /// Hashes a file from its beginning to its end, in one pass.
    ///
    /// # Errors
    /// Reading fails.
    pub fn read(mut file: impl Read) -> io::Result<Self> {
        let (mut file_bytes, mut group) = (0u64, Vec::with_capacity(GROUP_BYTES as usize));
        let mut hashes = Vec::new();
        let mut only = *blake3::hash(b"").as_bytes();
        loop {
            group.clear();
            let read = file.by_ref().take(GROUP_BYTES).read_to_end(&mut group)? as u64;
            if read == 0 {
                break;
            }
            if file_bytes == 0 {
                only = *blake3::hash(&group).as_bytes();
            }
            hashes.push(group_hash(file_bytes / GROUP_BYTES, &group));
            file_bytes += read;
        }
        let mut levels = vec![hashes];
        while let Some(below) = levels.last().filter(|level| level.len() > 2) {
            let above = below.chunks(2).map(|pair| match pair {
                [left, right] => merge_subtrees_non_root(left, right, Mode::Hash),
                rest => rest[0],
            });
            let above = above.collect();
            levels.push(above);
        }
        let root = match levels.last().map(Vec::as_slice) {
            Some([left, right]) => *merge_subtrees_root(left, right, Mode::Hash).as_bytes(),
            _ => only,
        };
        Ok(Self { file_bytes, root: Hash32(root), levels })
    }

    /// The file's BLAKE3 hash.
    pub fn root(&self) -> Hash32 {
        self.root
    }

    /// The file's size.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// The slice that proves `range`. `read_at` fills a buffer with the file's bytes from an offset on.
    ///
    /// # Errors
    /// The range is none of this file, reading fails, or the file is not the one that was hashed any more: nothing that
    /// would not verify is returned.
    pub fn slice(
        &self,
        range: Range,
        mut read_at: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<Vec<u8>> {
        let unusable = |e: AdmissionError| io::Error::new(io::ErrorKind::InvalidInput, e);
        let mut slice = Vec::with_capacity(slice_bytes(self.file_bytes, range).map_err(unusable)?);
        for group in groups(range, self.file_bytes).map_err(unusable)? {
            let start = slice.len();
            slice.resize(start + group_bytes(group, self.file_bytes), 0);
            read_at(group * GROUP_BYTES, &mut slice[start..])?;
            for (level, at) in path(group, self.file_bytes) {
                slice.extend_from_slice(&self.levels[level][(at ^ 1) as usize]);
            }
        }
        match verify_slice(&self.root, self.file_bytes, range, &slice) {
            Ok(_) => Ok(slice),
            Err(_) => {
                Err(io::Error::new(io::ErrorKind::InvalidData, "the file has changed since it was hashed"))
            }
        }
    }
}

/// Ranges of a file, drawn from 32 random bytes: as long as allowed, every offset equally likely. At most [`MAX_RANGES`];
/// none of an empty file.
pub fn ranges(nonce: &[u8; 32], file_bytes: u64, count: usize) -> Vec<Range> {
    let length = file_bytes.min(u64::from(MAX_RANGE_BYTES));
    if length == 0 {
        return Vec::new();
    }
    let mut stream =
        blake3::Hasher::new_derive_key("infera 2026 ranges of weights").update(nonce).finalize_xof();
    let mut draw = || {
        let mut bytes = [0; 16];
        stream.fill(&mut bytes);
        // 128 bits against 64: the remainder's bias is below 2^-64.
        let offset = u128::from_be_bytes(bytes) % u128::from(file_bytes - length + 1);
        (offset as u64, length as u32)
    };
    (0..count.min(MAX_RANGES)).map(|_| draw()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| (i / 1_000 + i * 7 + i / 65_536 * 3) as u8).collect()
    }

    fn prove(tree: &Tree, file: &[u8], range: Range) -> io::Result<Vec<u8>> {
        tree.slice(range, |offset, out| {
            let from = file.get(offset as usize..).unwrap_or_default();
            out.copy_from_slice(from.get(..out.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    #[test]
    fn the_root_is_the_plain_hash_of_every_size() {
        let group = GROUP_BYTES as usize;
        let sizes =
            [0, 1, 1_024, group - 1, group, group + 1, 2 * group, 2 * group + 1, 3 * group, 5 * group + 7];
        for size in sizes.into_iter().chain((1..40).map(|groups| groups * group + 100)) {
            let file = file(size);
            let tree = Tree::read(file.as_slice()).unwrap();
            assert_eq!(tree.root().0, *blake3::hash(&file).as_bytes(), "{size} bytes");
            assert_eq!(tree.file_bytes(), size as u64);
        }
    }

    #[test]
    fn the_hashes_take_little_room() {
        let tree = Tree::read(io::repeat(1).take(8 << 20)).unwrap();
        let bytes: usize = tree.levels.iter().map(|level| level.len() * HASH_BYTES).sum();
        assert!(bytes * 250 <= 8 << 20, "{bytes}");
    }

    #[test]
    fn limits_are_named() {
        let root = Hash32([0; 32]);
        for (range, file_bytes) in [
            ((0, 0), 10),
            ((0, 11), 10),
            ((10, 1), 10),
            ((u64::MAX, 1), 10),
            ((0, MAX_RANGE_BYTES + 1), 1 << 40),
            ((0, 1), 0),
        ] {
            let error = verify_slice(&root, file_bytes, range, &[]).unwrap_err();
            assert!(matches!(error, AdmissionError::Range { .. }), "{range:?} of {file_bytes}");
        }
        // A file that nobody has: its slice would be long, and nothing is allocated for it.
        let error = verify_slice(&root, u64::MAX, (u64::MAX - 5, 5), &[1; 10]).unwrap_err();
        assert!(matches!(error, AdmissionError::Length { actual: 10, .. }), "{error}");
    }

    #[test]
    fn a_changed_file_proves_nothing() {
        let mut file = file(100_000);
        let tree = Tree::read(file.as_slice()).unwrap();
        file[70_000] ^= 1;
        assert!(prove(&tree, &file, (0, 16_000)).is_ok());
        let error = prove(&tree, &file, (69_000, 100)).unwrap_err();
        assert!(error.to_string().contains("has changed"), "{error}");
        assert_eq!(
            prove(&tree, &file[..60_000], (90_000, 100)).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
        let error = prove(&tree, &file, (99_999, 2)).unwrap_err();
        assert!(error.to_string().contains("range 99999+2"), "{error}");
    }

    #[test]
    fn ranges_cover_the_whole_file_and_nothing_else() {
        let drawn: Vec<Range> = (0..2_000u32)
            .flat_map(|i| ranges(blake3::hash(&i.to_be_bytes()).as_bytes(), 100_000, 8))
            .collect();
        assert_eq!(drawn.len(), 16_000);
        for quarter in 0..4 {
            let inside = drawn.iter().filter(|(offset, _)| offset / 20_905 == quarter).count();
            assert!((3_600..4_400).contains(&inside), "{inside} begin in quarter {quarter}");
        }
        assert!(
            drawn.iter().all(|(offset, length)| offset + u64::from(*length) <= 100_000 && *length == 16_384)
        );
        assert_eq!(ranges(&[1; 32], 100_000, 8), ranges(&[1; 32], 100_000, 8));
        assert_ne!(ranges(&[1; 32], 100_000, 8), ranges(&[2; 32], 100_000, 8));
        assert_eq!(ranges(&[1; 32], 5, 3), vec![(0, 5); 3]);
        assert_eq!(ranges(&[1; 32], 0, 3), vec![]);
        assert_eq!(ranges(&[1; 32], 1 << 40, 1_000).len(), MAX_RANGES);
    }

    /// A file's size and a range of it.
    fn places() -> impl Strategy<Value = (usize, Range)> {
        (1usize..200_000).prop_flat_map(|size| {
            let range = (0..size as u64).prop_flat_map(move |offset| {
                let most = (size as u64 - offset).min(u64::from(MAX_RANGE_BYTES)) as u32;
                (Just(offset), 1..=most)
            });
            (Just(size), range)
        })
    }

    proptest! {
        #[test]
        fn slices_verify_for_their_range_of_their_file_only((size, range) in places(), at in any::<prop::sample::Index>(), bit in 0u8..8, other in places()) {
            let file = file(size);
            let tree = Tree::read(file.as_slice()).unwrap();
            let slice = prove(&tree, &file, range).unwrap();
            let check = |range, slice: &[u8]| verify_slice(&tree.root(), size as u64, range, slice);
            let bytes = check(range, &slice).unwrap();
            prop_assert_eq!(&bytes[..], &file[range.0 as usize..][..range.1 as usize]);

            let mut changed = slice.clone();
            changed[at.index(slice.len())] ^= 1 << bit;
            prop_assert!(check(range, &changed).is_err());
            prop_assert!(check(range, &slice[..at.index(slice.len())]).is_err());
            prop_assert!(check(range, &[&slice[..], &[0]].concat()).is_err());
            // Of other groups; within the same ones it proves what it says.
            if let (Ok(mine), Ok(others)) = (groups(range, size as u64), groups(other.1, size as u64)) {
                match check(other.1, &slice) {
                    Ok(bytes) => {
                        prop_assert_eq!(mine, others);
                        prop_assert_eq!(&bytes[..], &file[other.1.0 as usize..][..bytes.len()]);
                    }
                    Err(_) => prop_assert_ne!(mine, others),
                }
            }
            prop_assert!(verify_slice(&Hash32([9; 32]), size as u64, range, &slice).is_err());
        }

        #[test]
        fn nothing_that_comes_in_panics(size in any::<u64>(), offset in any::<u64>(), length in any::<u32>(), slice in prop::collection::vec(any::<u8>(), 0..2_000)) {
            prop_assert!(verify_slice(&Hash32([0; 32]), size, (offset, length), &slice).is_err());
            let within = (offset % size.max(1), length % MAX_RANGE_BYTES);
            prop_assert!(verify_slice(&Hash32([0; 32]), size, within, &slice).is_err());
        }
    }
}
