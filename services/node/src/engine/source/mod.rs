//! The weights of a model, whatever they are stored in: a GGUF file, or safetensors with a config.json beside them.
//!
//! What a reader of weights need not know stays here: how each format names a matrix, that GGUF permutes the queries and
//! keys of Llama models, that the safetensors of Gemma hold its norms less 1. The files may come from anybody: opening
//! compares every tensor that the shape asks for, and refuses those that nothing would compute with, before anything is
//! allocated for weights.

mod config;
mod family;
mod gguf;
mod safetensors;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use infera_prompt::gguf::{GgmlType, Gguf};

use super::cpu::packed_bytes;
use super::error::EngineError;
use super::quant::{GROUP, Raw};
use super::rounding::Rounding;
use super::shape::{Scaling, Shape, unsupported};
use family::Family;
pub(super) use family::{Name, Part};
pub(crate) use safetensors::weight_files;

/// A tensor in a file, already compared with the file's length.
#[derive(Debug, Clone)]
struct Tensor {
    /// Which file.
    file: usize,
    /// `None`: a storage that is not computed with, called so.
    kind: Result<GgmlType, String>,
    /// Rows first, as in safetensors.
    dims: Vec<u64>,
    start: u64,
    bytes: u64,
}

/// Angles of the rotary embedding per position, one for each pair of a head.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Speeds {
    /// Of the layers that see everything.
    pub full: Vec<f64>,
    /// Of the layers with a window; empty if there are none.
    pub windowed: Vec<f64>,
}

/// An opened model.
#[derive(Debug)]
pub(super) struct Source {
    shape: Shape,
    family: &'static Family,
    files: Vec<File>,
    tensors: BTreeMap<String, Tensor>,
    gguf: Option<Gguf>,
    rounding: Option<Rounding>,
}

fn broken<T>(text: String) -> Result<T, EngineError> {
    Err(EngineError::Format(text))
}

/// Opens an ordinary file; gives its length too.
fn open(path: &Path) -> Result<(File, u64), EngineError> {
    let named = |e: std::io::Error| std::io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    // Asked first: opening a pipe would wait for a writer.
    let about = std::fs::metadata(path).map_err(named)?;
    if !about.is_file() {
        return broken(format!("{} is not a file", path.display()));
    }
    let file = File::open(path).map_err(named)?;
    let length = file.metadata().map_err(named)?.len();
    Ok((file, length))
}

impl Source {
    /// Opens a GGUF file, a safetensors file with a config.json beside it, or a folder that holds both, with
    /// `model.safetensors` in one piece or in shards with an index.
    ///
    /// # Errors
    /// A file is missing or broken, a tensor that the model needs is missing or has other sides, or the model has
    /// something that the engine does not compute.
    pub fn open(path: &Path) -> Result<Self, EngineError> {
        let is_gguf = !path.is_dir() && {
            let mut magic = [0u8; 4];
            let mut file = open(path)?.0;
            file.read_exact(&mut magic).is_ok() && &magic == b"GGUF"
        };
        let mut source = if is_gguf { gguf::open(path)? } else { safetensors::open(path)? };
        source.check()?;
        source.shape.packed = source.count()?;
        Ok(source)
    }

    /// The same model with cheaper matrices in its layers.
    pub fn rounded(self, rounding: Option<Rounding>) -> Self {
        Self { rounding, ..self }
    }

    /// The numbers of the model.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The header, if the model is a GGUF file.
    pub fn gguf(&self) -> Option<&Gguf> {
        self.gguf.as_ref()
    }

    fn file_name(&self, name: Name) -> String {
        if self.gguf.is_some() { self.family.in_gguf(name) } else { self.family.in_safetensors(name) }
    }

    /// Every tensor of the shape is there, and no other.
    fn check(&self) -> Result<(), EngineError> {
        let mut known = std::collections::BTreeSet::new();
        for (name, rows, cols) in Name::all(&self.shape) {
            self.find(name, rows, cols)?;
            known.insert(self.file_name(name));
        }
        // The first is written although it is tied, the second can be computed.
        let harmless =
            |name: &str| name == self.file_name(Name::Head) || name.ends_with("rotary_emb.inv_freq");
        let table = |name: &str| self.shape.scaling == Scaling::Table && name == gguf::FACTORS;
        match self.tensors.keys().find(|n| !known.contains(*n) && !harmless(n) && !table(n)) {
            Some(name) => {
                unsupported(format!("tensor {name} in a model of the architecture {}", self.family.gguf))
            }
            None => Ok(()),
        }
    }

    /// Bytes of all matrices once they are packed.
    fn count(&self) -> Result<u64, EngineError> {
        let all = Name::all(&self.shape).into_iter().filter(|(_, rows, _)| *rows > 1);
        all.map(|(name, rows, cols)| Ok(packed_bytes(self.find(name, rows, cols)?.1, rows, cols))).sum()
    }

    fn find(&self, name: Name, rows: usize, cols: usize) -> Result<(&Tensor, GgmlType), EngineError> {
        let text = self.file_name(name);
        let Some(tensor) = self.tensors.get(&text) else {
            return broken(format!("tensor {text} is missing"));
        };
        let expected = if rows == 1 { vec![cols as u64] } else { vec![rows as u64, cols as u64] };
        // A matrix with one row is written with both sides by some.
        if tensor.dims != expected && (rows != 1 || tensor.dims != [1, cols as u64]) {
            return broken(format!(
                "tensor {text} has the shape {:?}, rows first; its place in the model asks for {expected:?}",
                tensor.dims
            ));
        }
        match &tensor.kind {
            Ok(kind) => Ok((tensor, *kind)),
            Err(kind) => unsupported(format!(
                "tensor {text} is stored as {kind}; known are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K"
            )),
        }
    }

    /// A matrix of `rows` outputs of `cols` inputs, or a vector of `cols` numbers if `rows` is 1. Queries and keys are in
    /// the order in which the rotary embedding turns the first half of a head against the second; norms are factors.
    ///
    /// # Errors
    /// It is not in the file in this shape, or reading fails.
    pub fn matrix(&self, name: Name, rows: usize, cols: usize) -> Result<Raw, EngineError> {
        let raw = self.stored(name, rows, cols)?;
        Ok(match (self.rounding, name) {
            (Some(rounding), Name::Layer(..)) if rows > 1 && cols.is_multiple_of(GROUP) => {
                raw.rounded(rounding)
            }
            _ => raw,
        })
    }

    /// As the file has it.
    fn stored(&self, name: Name, rows: usize, cols: usize) -> Result<Raw, EngineError> {
        let (tensor, kind) = self.find(name, rows, cols)?;
        let mut bytes = vec![0u8; tensor.bytes as usize];
        self.files[tensor.file].read_exact_at(&mut bytes, tensor.start)?;
        let raw = Raw { rows, cols, kind, bytes };
        let heads = match name {
            Name::Layer(_, Part::Q | Part::QBias) => self.shape.heads,
            Name::Layer(_, Part::K | Part::KBias) => self.shape.kv_heads,
            _ if self.gguf.is_none() && self.family.norms_less_one && name.is_norm() => {
                let bytes = raw.dequantise().iter().flat_map(|x| (x + 1.0).to_le_bytes()).collect();
                return Ok(Raw { kind: GgmlType::F32, bytes, ..raw });
            }
            _ => return Ok(raw),
        };
        if self.gguf.is_none() || !self.family.permuted_in_gguf {
            return Ok(raw);
        }
        if rows > 1 {
            return Ok(raw.unpermute(heads));
        }
        let column = Raw { rows: cols, cols: 1, ..raw }.unpermute(heads);
        Ok(Raw { rows, cols, ..column })
    }

    /// The speeds of the rotary embedding.
    ///
    /// # Errors
    /// The file has a table of them that cannot be read or used.
    pub fn speeds(&self) -> Result<Speeds, EngineError> {
        let mut factors = Vec::new();
        if self.shape.scaling == Scaling::Table {
            factors = self.factors()?;
        }
        let (full, windowed) = self.shape.speeds(&factors);
        Ok(Speeds { full, windowed })
    }

    fn factors(&self) -> Result<Vec<f64>, EngineError> {
        let name = gguf::FACTORS;
        let cols = self.shape.head / 2;
        let tensor =
            self.tensors.get(name).filter(|t| t.dims == [cols as u64] && t.kind == Ok(GgmlType::F32));
        let Some(tensor) = tensor else {
            return broken(format!("tensor {name} is not a list of {cols} f32"));
        };
        let mut bytes = vec![0u8; cols * 4];
        self.files[tensor.file].read_exact_at(&mut bytes, tensor.start)?;
        let raw = Raw { rows: 1, cols, kind: GgmlType::F32, bytes };
        let factors: Vec<f64> = raw.dequantise().into_iter().map(f64::from).collect();
        match factors.iter().find(|f| !(1e-6..=1e6).contains(*f)) {
            Some(factor) => broken(format!("tensor {name} has the factor {factor}")),
            None => Ok(factors),
        }
    }
}

#[cfg(test)]
mod tests;
