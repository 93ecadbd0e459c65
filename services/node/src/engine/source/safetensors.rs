//! Safetensors: 8 bytes with the length of a JSON header, the header, and the numbers.
//!
//! The format's rules (<https://github.com/huggingface/safetensors#format>) are checked before anything is read: the
//! header lies in the file, every tensor has the bytes that its shape and storage say, the tensors fill the rest of the
//! file without gaps and do not overlap, and no name occurs twice.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use infera_prompt::gguf::GgmlType;
use serde::de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::super::error::EngineError;
use super::config::Config;
use super::{Source, Tensor, broken};

/// Largest header, in bytes; the largest published ones have about 10 MB.
const MAX_HEADER: u64 = 32 << 20;
/// Largest index of shards, in bytes.
const MAX_INDEX: u64 = 16 << 20;
/// Largest config.json, in bytes.
const MAX_CONFIG: u64 = 1 << 20;
const MAX_TENSORS: usize = 65_536;
const MAX_NAME: usize = 256;
const MAX_DIMS: usize = 8;
const MAX_DTYPE: usize = 16;
const MAX_SHARDS: usize = 1024;

pub(super) fn open(path: &Path) -> Result<Source, EngineError> {
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
    let config = Config::read(&small(&folder.join("config.json"), MAX_CONFIG)?)?;
    let family = config.family()?;
    let shape = config.shape(family)?;
    let (files, tensors) = if path.is_dir() { of_folder(path)? } else { single(path)? };
    Ok(Source { shape, family, files, tensors, gguf: None, rounding: None })
}

/// All of a small file.
fn small(path: &Path, limit: u64) -> Result<Vec<u8>, EngineError> {
    let (file, length) = super::open(path)?;
    if length > limit {
        return broken(format!("{} has {length} bytes, the limit is {limit}", path.display()));
    }
    let mut bytes = Vec::with_capacity(length as usize);
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

type Opened = (Vec<File>, BTreeMap<String, Tensor>);

fn single(path: &Path) -> Result<Opened, EngineError> {
    let (file, tensors) = read(path, 0)?;
    Ok((vec![file], tensors))
}

/// Where the tensors of a folder lie, if they are in more than one file.
const INDEX: &str = "model.safetensors.index.json";
/// Where they lie otherwise.
const WHOLE: &str = "model.safetensors";

/// The shards that an index names, once each.
fn shards(index: &Path) -> Result<(Index, BTreeSet<String>), EngineError> {
    let place: Index = serde_json::from_slice(&small(index, MAX_INDEX)?)
        .map_err(|e| EngineError::Format(format!("{}: {e}", index.display())))?;
    let names: BTreeSet<String> = place.weight_map.0.iter().map(|(_, file)| file.clone()).collect();
    if names.len() > MAX_SHARDS {
        return broken(format!("{} shards, the limit is {MAX_SHARDS}", names.len()));
    }
    // A name from the index must not lead out of the folder.
    let is_shard = |name: &String| name.ends_with(".safetensors") && !name.contains(['/', '\\', '\0', '\n']);
    match names.iter().find(|name| !is_shard(name)) {
        Some(name) => broken(format!("{} names the shard {name:?}", index.display())),
        None => Ok((place, names)),
    }
}

/// Names of the files in a folder from which the tensors are read, and of the index that says so.
///
/// # Errors
/// The index can't be read.
pub fn weight_files(folder: &Path) -> Result<BTreeSet<String>, EngineError> {
    let index = folder.join(INDEX);
    if !index.exists() {
        return Ok([WHOLE.to_owned()].into());
    }
    let (_, mut names) = shards(&index)?;
    names.insert(INDEX.to_owned());
    Ok(names)
}

fn of_folder(folder: &Path) -> Result<Opened, EngineError> {
    let index = folder.join(INDEX);
    if !index.exists() {
        return single(&folder.join(WHOLE));
    }
    let (place, names) = shards(&index)?;
    let (mut files, mut tensors) = (Vec::new(), BTreeMap::new());
    for name in &names {
        let (file, found) = read(&folder.join(name), files.len())?;
        files.push(file);
        for (tensor, place) in found {
            if let Some(before) = tensors.insert(tensor.clone(), place) {
                return broken(format!("tensor {tensor} is in shard {} and in {name}", before.file));
            }
        }
    }
    match place.weight_map.0.iter().find(|(name, _)| !tensors.contains_key(name)) {
        Some((name, file)) => broken(format!("tensor {name} is not in the shard {file}")),
        None => Ok((files, tensors)),
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: Unique<String>,
}

/// The entries of a JSON object in their order, at most [`MAX_TENSORS`] with short names; a repeated name is an error.
struct Unique<T>(Vec<(String, T)>);

struct UniqueVisitor<T>(std::marker::PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for UniqueVisitor<T> {
    type Value = Unique<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a tensor's name for each key")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        let mut names = BTreeSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if name.len() > MAX_NAME || entries.len() >= MAX_TENSORS {
                return Err(A::Error::custom(format!(
                    "more than {MAX_TENSORS} tensors, or a name of more than {MAX_NAME} bytes"
                )));
            }
            if !names.insert(name.clone()) {
                return Err(A::Error::custom(format!("tensor {name} occurs twice")));
            }
            entries.push((name, map.next_value()?));
        }
        Ok(Unique(entries))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Unique<T> {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        input.deserialize_map(UniqueVisitor(std::marker::PhantomData))
    }
}

/// A shape; a list that is longer than any shape is not collected.
struct Dims(Vec<u64>);

struct DimsVisitor;

impl<'de> Visitor<'de> for DimsVisitor {
    type Value = Dims;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MAX_DIMS} whole numbers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Dims, A::Error> {
        let mut dims = Vec::new();
        while let Some(next) = list.next_element()? {
            if dims.len() >= MAX_DIMS {
                return Err(A::Error::custom(format!("a shape of more than {MAX_DIMS} dimensions")));
            }
            dims.push(next);
        }
        Ok(Dims(dims))
    }
}

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        input.deserialize_seq(DimsVisitor)
    }
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Dims,
    data_offsets: [u64; 2],
}

/// Bytes of a number; `None` for a storage whose size is not known here.
fn size_of(dtype: &str) -> Option<u64> {
    match dtype {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => Some(1),
        "U16" | "I16" | "F16" | "BF16" => Some(2),
        "U32" | "I32" | "F32" => Some(4),
        "U64" | "I64" | "F64" | "C64" => Some(8),
        _ => None,
    }
}

impl Entry {
    /// Compared with the `data` bytes that follow the header at `header`.
    fn place(self, file: usize, header: u64, data: u64) -> Result<Tensor, String> {
        let [start, end] = self.data_offsets;
        if start > end || end > data {
            return Err(format!("lies at {start} to {end} of {data} bytes"));
        }
        if self.dtype.len() > MAX_DTYPE {
            return Err(format!("has a storage with a name of {} bytes", self.dtype.len()));
        }
        let dims = self.shape.0;
        let numbers = dims.iter().try_fold(1u64, |a, d| a.checked_mul(*d));
        let bytes = numbers.zip(size_of(&self.dtype)).and_then(|(n, size)| n.checked_mul(size));
        if size_of(&self.dtype).is_some() && bytes != Some(end - start) {
            return Err(format!("has {} bytes for the shape {dims:?} in {}", end - start, self.dtype));
        }
        let kind = match self.dtype.as_str() {
            "F32" => Ok(GgmlType::F32),
            "F16" => Ok(GgmlType::F16),
            "BF16" => Ok(GgmlType::BF16),
            _ => Err(self.dtype),
        };
        Ok(Tensor { file, kind, dims, start: header + start, bytes: end - start })
    }
}

/// The header of one file.
fn read(path: &Path, file: usize) -> Result<(File, BTreeMap<String, Tensor>), EngineError> {
    let (mut input, length) = super::open(path)?;
    let tensors = header(&mut input, length, file).map_err(|e| match e {
        HeaderError::Io(e) => EngineError::Io(e),
        HeaderError::Format(text) => EngineError::Format(format!("{}: {text}", path.display())),
    })?;
    Ok((input, tensors))
}

#[derive(Debug)]
pub(super) enum HeaderError {
    Io(std::io::Error),
    Format(String),
}

/// The tensors of a file of `length` bytes.
pub(super) fn header(
    input: &mut impl Read,
    length: u64,
    file: usize,
) -> Result<BTreeMap<String, Tensor>, HeaderError> {
    let wrong = |text: String| Err(HeaderError::Format(text));
    if length < 8 {
        return wrong(format!("{length} bytes are no safetensors file"));
    }
    let mut size = [0u8; 8];
    input.read_exact(&mut size).map_err(HeaderError::Io)?;
    let size = u64::from_le_bytes(size);
    if size > MAX_HEADER {
        return wrong(format!("not safetensors, or a header of {size} bytes; the limit is {MAX_HEADER}"));
    }
    if size > length - 8 {
        return wrong(format!("the header of {size} bytes is cut off at byte {length}"));
    }
    let mut bytes = vec![0u8; size as usize];
    input.read_exact(&mut bytes).map_err(HeaderError::Io)?;
    let entries: Unique<Entry> =
        serde_json::from_slice(&bytes).map_err(|e| HeaderError::Format(format!("the header: {e}")))?;
    drop(bytes);
    let (start, data) = (8 + size, length - 8 - size);
    let mut tensors = BTreeMap::new();
    for (name, entry) in entries.0 {
        match entry.place(file, start, data) {
            Ok(tensor) => drop(tensors.insert(name, tensor)),
            Err(problem) => return wrong(format!("tensor {name} {problem}")),
        }
    }
    let mut places: Vec<(u64, u64, &String)> =
        tensors.iter().map(|(name, t)| (t.start, t.start + t.bytes, name)).collect();
    places.sort_unstable();
    let mut at = start;
    for (from, to, name) in places {
        if from != at {
            return wrong(format!("tensor {name} begins at byte {from}, the one before it ends at {at}"));
        }
        at = to;
    }
    if at != length {
        return wrong(format!("the last tensor ends at byte {at} of {length}"));
    }
    Ok(tensors)
}
