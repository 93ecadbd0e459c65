//! The header of a GGUF file: metadata and the list of tensors, without the weights.
//!
//! The file may come from anybody. Every count and length is bounded before it is used, memory grows only with bytes
//! that were really read, and whatever does not fit is an error that says what and where.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use thiserror::Error;

/// Largest header read, in bytes. Tokenizers of 256k tokens take about 10 MB.
pub const MAX_HEADER_BYTES: u64 = 64 << 20;
/// Most metadata entries.
pub const MAX_ENTRIES: u64 = 4096;
/// Most tensors.
pub const MAX_TENSORS: u64 = 65_536;
/// Most elements of all arrays together. Gemma's tokenizer has 0.8 million, Llama 3's 0.5 million.
pub const MAX_ARRAY: u64 = 4 << 20;
/// Longest text, in bytes.
pub const MAX_STRING: u64 = 1 << 20;
/// Longest key or name of a tensor, in bytes.
pub const MAX_NAME: u64 = 256;
/// Most dimensions of a tensor.
pub const MAX_DIMS: u32 = 4;

/// Why a file is not usable as GGUF.
#[derive(Debug, Error)]
pub enum GgufError {
    /// Reading failed.
    #[error("cannot read the model file: {0}")]
    Io(#[from] std::io::Error),
    /// Not GGUF or not a version that this reader knows.
    #[error("not a usable GGUF file: {0}")]
    Format(String),
    /// A count or a length above its limit.
    #[error("GGUF {what} is {got}, the limit is {limit}")]
    Limit {
        /// Which number.
        what: &'static str,
        /// Its value.
        got: u64,
        /// The limit.
        limit: u64,
    },
    /// A metadata key that is needed is absent or of another type.
    #[error("GGUF metadata key {key} {problem}")]
    Key {
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor is absent or its description is impossible.
    #[error("GGUF tensor {name}: {problem}")]
    Tensor {
        /// The tensor's name.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// A metadata value. Integers of all widths are widened.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Unsigned integer.
    Unsigned(u64),
    /// Signed integer.
    Signed(i64),
    /// Float.
    Float(f64),
    /// Boolean.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Array of one element type; arrays of arrays are refused.
    Array(Vec<Value>),
}

/// How a tensor's numbers are stored. The layouts are ggml's (`ggml-quants.c`); `d`, `m` and `dmin` are f16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgmlType {
    /// 4 bytes a number.
    F32,
    /// 2 bytes a number.
    F16,
    /// 2 bytes a number: the upper half of an f32.
    BF16,
    /// Blocks of 32: d, 16 bytes of nibbles; value = (q - 8) d.
    Q4_0,
    /// Blocks of 32: d, m, 16 bytes of nibbles; value = q d + m.
    Q4_1,
    /// Blocks of 32: d, 32 fifth bits, 16 bytes of nibbles; value = (q - 16) d.
    Q5_0,
    /// Blocks of 32: d, m, 32 fifth bits, 16 bytes of nibbles; value = q d + m.
    Q5_1,
    /// Blocks of 32: d, 32 signed bytes.
    Q8_0,
    /// Blocks of 256: d, dmin, 8 pairs of 6 bits (s, t) for groups of 32, 128 bytes of nibbles; value = q (d s) - dmin t.
    Q4K,
    /// Like `Q4K`, with 256 fifth bits before the nibbles.
    Q5K,
    /// Blocks of 256: 128 bytes of nibbles, 64 bytes of upper bit pairs, 16 signed bytes s for groups of 16, d;
    /// value = (q - 32) (d s).
    Q6K,
    /// Known to GGUF, not to this reader.
    Other(u32),
}

impl GgmlType {
    fn of(id: u32) -> Self {
        match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::BF16,
            other => Self::Other(other),
        }
    }

    /// (numbers, bytes) of a block; `None` for a type that this reader does not know.
    #[must_use]
    pub fn block(self) -> Option<(u64, u64)> {
        match self {
            Self::F32 => Some((1, 4)),
            Self::F16 | Self::BF16 => Some((1, 2)),
            Self::Q4_0 => Some((32, 18)),
            Self::Q4_1 => Some((32, 20)),
            Self::Q5_0 => Some((32, 22)),
            Self::Q5_1 => Some((32, 24)),
            Self::Q8_0 => Some((32, 34)),
            Self::Q4K => Some((256, 144)),
            Self::Q5K => Some((256, 176)),
            Self::Q6K => Some((256, 210)),
            Self::Other(_) => None,
        }
    }
}

/// Where a tensor lies and what shape it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Dimensions, the fastest first: a weight matrix is `[inputs, outputs]`.
    pub dims: Vec<u64>,
    /// Storage.
    pub kind: GgmlType,
    /// First byte, from the beginning of the file.
    pub start: u64,
    /// Bytes; 0 for a storage that this reader does not know.
    pub bytes: u64,
}

/// The header of a GGUF file.
#[derive(Debug, Clone)]
pub struct Gguf {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
    file_bytes: u64,
}

struct Reader<R> {
    inner: R,
    at: u64,
    end: u64,
    /// Array elements that the file may still have.
    elements: u64,
}

/// Fewest bytes of a value of this type.
fn smallest(kind: u32) -> u64 {
    match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        _ => 8,
    }
}

fn limit(what: &'static str, got: u64, limit: u64) -> Result<(), GgufError> {
    if got > limit { Err(GgufError::Limit { what, got, limit }) } else { Ok(()) }
}

impl<R: Read> Reader<R> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut out = [0u8; N];
        self.fill(&mut out)?;
        Ok(out)
    }

    /// Refuses what needs `bytes` more than the file has, before memory is taken for it.
    fn has(&self, bytes: u64) -> Result<u64, GgufError> {
        let next = self.at.saturating_add(bytes);
        limit("header in bytes", next, MAX_HEADER_BYTES)?;
        if next > self.end {
            return Err(GgufError::Format(format!("the header is cut off at byte {}", self.end)));
        }
        Ok(next)
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<(), GgufError> {
        let next = self.has(out.len() as u64)?;
        self.inner.read_exact(out)?;
        self.at = next;
        Ok(())
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn string(&mut self, what: &'static str, most: u64) -> Result<String, GgufError> {
        let length = self.u64()?;
        limit(what, length, most)?;
        self.has(length)?;
        let mut bytes = vec![0u8; length as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes)
            .map_err(|_| GgufError::Format(format!("{what} before byte {} is not UTF-8", self.at)))
    }

    fn scalar(&mut self, kind: u32) -> Result<Value, GgufError> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.bytes()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.bytes()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.bytes()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.bytes()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.bytes()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.bytes()?).into()),
            7 => match self.bytes::<1>()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [b] => return Err(GgufError::Format(format!("a boolean before byte {} is {b}", self.at))),
            },
            8 => Value::String(self.string("length of a string", MAX_STRING)?),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.bytes()?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            other => return Err(GgufError::Format(format!("value type {other} before byte {}", self.at))),
        })
    }

    fn value(&mut self) -> Result<Value, GgufError> {
        let kind = self.u32()?;
        if kind != 9 {
            return self.scalar(kind);
        }
        let element = self.u32()?;
        let count = self.u64()?;
        if element == 9 || element > 12 {
            return Err(GgufError::Format(format!(
                "value type {element} in an array before byte {}",
                self.at
            )));
        }
        limit("length of an array", count, MAX_ARRAY)?;
        limit("number of array elements", MAX_ARRAY - self.elements + count, MAX_ARRAY)?;
        self.elements -= count;
        self.has(count * smallest(element))?;
        let mut items = Vec::with_capacity(count.min(1024) as usize);
        for _ in 0..count {
            items.push(self.scalar(element)?);
        }
        Ok(Value::Array(items))
    }

    fn tensor(&mut self) -> Result<(String, TensorInfo), GgufError> {
        let name = self.string("length of a tensor's name", MAX_NAME)?;
        let problem = |problem: String| GgufError::Tensor { name: name.clone(), problem };
        let n = self.u32()?;
        if n == 0 || n > MAX_DIMS {
            return Err(problem(format!("{n} dimensions, expected 1 to {MAX_DIMS}")));
        }
        let mut dims = Vec::with_capacity(n as usize);
        for _ in 0..n {
            dims.push(self.u64()?);
        }
        let kind = GgmlType::of(self.u32()?);
        let start = self.u64()?;
        let numbers = dims.iter().try_fold(1u64, |a, d| a.checked_mul(*d));
        let numbers = numbers.filter(|n| *n > 0).ok_or_else(|| problem(format!("shape {dims:?}")))?;
        let bytes = match kind.block() {
            None => 0,
            Some((per, _)) if dims[0] % per != 0 => {
                return Err(problem(format!("{} columns do not fill blocks of {per}", dims[0])));
            }
            Some((per, bytes)) => {
                (numbers / per).checked_mul(bytes).ok_or_else(|| problem(format!("shape {dims:?}")))?
            }
        };
        Ok((name, TensorInfo { dims, kind, start, bytes }))
    }
}

impl Gguf {
    /// Reads the header of the file at `path`.
    ///
    /// # Errors
    /// See [`GgufError`]; a tensor that reaches past the end of the file is one.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        Self::read(BufReader::with_capacity(1 << 16, file), length)
    }

    /// Reads the header of a file of `length` bytes.
    ///
    /// # Errors
    /// See [`Gguf::open`].
    pub fn read(input: impl Read, length: u64) -> Result<Self, GgufError> {
        let mut r = Reader { inner: input, at: 0, end: length, elements: MAX_ARRAY };
        if &r.bytes::<4>()? != b"GGUF" {
            return Err(GgufError::Format("it does not begin with GGUF".into()));
        }
        let version = r.u32()?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Format(format!("version {version}, expected 2 or 3 (little endian)")));
        }
        let tensor_count = r.u64()?;
        let entries = r.u64()?;
        limit("number of tensors", tensor_count, MAX_TENSORS)?;
        limit("number of metadata entries", entries, MAX_ENTRIES)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..entries {
            let key = r.string("length of a key", MAX_NAME)?;
            let value = r.value()?;
            if metadata.contains_key(&key) {
                return Err(GgufError::Key { key, problem: "occurs twice".into() });
            }
            metadata.insert(key, value);
        }
        let mut found = Vec::new();
        for _ in 0..tensor_count {
            found.push(r.tensor()?);
        }
        let mut gguf = Self { metadata, tensors: BTreeMap::new(), file_bytes: length };
        gguf.place(found, r.at)?;
        Ok(gguf)
    }

    /// Turns offsets into positions in the file and checks them.
    fn place(&mut self, found: Vec<(String, TensorInfo)>, header: u64) -> Result<(), GgufError> {
        let alignment = match self.metadata.get("general.alignment") {
            None => 32,
            Some(Value::Unsigned(a)) if a.is_power_of_two() && (8..=65_536).contains(a) => *a,
            Some(other) => {
                let problem = format!("is {other:?}, expected a power of two from 8 to 65536");
                return Err(GgufError::Key { key: "general.alignment".into(), problem });
            }
        };
        let data = header.next_multiple_of(alignment);
        for (name, mut info) in found {
            let problem = |problem: String| GgufError::Tensor { name: name.clone(), problem };
            if info.start % alignment != 0 {
                return Err(problem(format!("offset {} is not a multiple of {alignment}", info.start)));
            }
            let start = data.checked_add(info.start);
            let end = start.and_then(|s| s.checked_add(info.bytes)).filter(|end| *end <= self.file_bytes);
            let (Some(start), Some(_)) = (start, end) else {
                return Err(problem(format!(
                    "reaches past the end of the file of {} bytes",
                    self.file_bytes
                )));
            };
            info.start = start;
            if self.tensors.insert(name.clone(), info).is_some() {
                return Err(GgufError::Tensor { name, problem: "occurs twice".into() });
            }
        }
        self.refuse_overlaps()
    }

    /// Two tensors that share bytes, or begin at the same one.
    fn refuse_overlaps(&self) -> Result<(), GgufError> {
        let mut places: Vec<(u64, u64, &str)> =
            self.tensors.iter().map(|(name, t)| (t.start, t.start + t.bytes.max(1), name.as_str())).collect();
        places.sort_unstable();
        match places.windows(2).find(|pair| pair[1].0 < pair[0].1) {
            None => Ok(()),
            Some(pair) => Err(GgufError::Tensor {
                name: pair[1].2.into(),
                problem: format!("lies where {} lies", pair[0].2),
            }),
        }
    }

    /// A metadata value.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        pick: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T, GgufError> {
        let wrong = |problem: String| GgufError::Key { key: key.into(), problem };
        let value = self.metadata.get(key).ok_or_else(|| wrong("is missing".into()))?;
        pick(value).ok_or_else(|| wrong(format!("is not {expected}")))
    }

    /// Text under a key.
    ///
    /// # Errors
    /// The key is missing or not text.
    pub fn string(&self, key: &str) -> Result<&str, GgufError> {
        self.typed(key, "text", |v| match v {
            Value::String(s) => Some(s.as_str()),
            _ => None,
        })
    }

    /// A number that fits 32 bits without sign.
    ///
    /// # Errors
    /// The key is missing or not such a number.
    pub fn u32(&self, key: &str) -> Result<u32, GgufError> {
        self.typed(key, "an integer from 0 to 2^32 - 1", |v| match v {
            Value::Unsigned(n) => u32::try_from(*n).ok(),
            Value::Signed(n) => u32::try_from(*n).ok(),
            _ => None,
        })
    }

    /// A finite number.
    ///
    /// # Errors
    /// The key is missing or not such a number.
    pub fn f32(&self, key: &str) -> Result<f32, GgufError> {
        self.typed(key, "a finite number", |v| match v {
            Value::Float(x) if x.is_finite() => Some(*x as f32),
            _ => None,
        })
    }

    /// A list of texts.
    ///
    /// # Errors
    /// The key is missing or not such a list.
    pub fn strings(&self, key: &str) -> Result<Vec<&str>, GgufError> {
        self.typed(key, "a list of texts", |v| {
            let Value::Array(items) = v else { return None };
            items.iter().map(|v| if let Value::String(s) = v { Some(s.as_str()) } else { None }).collect()
        })
    }

    /// A list of whole numbers.
    ///
    /// # Errors
    /// The key is missing or not such a list.
    pub fn integers(&self, key: &str) -> Result<Vec<i64>, GgufError> {
        self.typed(key, "a list of integers", |v| {
            let Value::Array(items) = v else { return None };
            items
                .iter()
                .map(|v| match v {
                    Value::Signed(n) => Some(*n),
                    Value::Unsigned(n) => i64::try_from(*n).ok(),
                    _ => None,
                })
                .collect()
        })
    }

    /// A list of finite numbers.
    ///
    /// # Errors
    /// The key is missing or not such a list.
    pub fn floats(&self, key: &str) -> Result<Vec<f64>, GgufError> {
        self.typed(key, "a list of finite numbers", |v| {
            let Value::Array(items) = v else { return None };
            let finite =
                |v: &Value| if let Value::Float(x) = v { Some(*x).filter(|x| x.is_finite()) } else { None };
            items.iter().map(finite).collect()
        })
    }

    /// A tensor's place and shape.
    ///
    /// # Errors
    /// No such tensor.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo, GgufError> {
        self.tensors
            .get(name)
            .ok_or_else(|| GgufError::Tensor { name: name.into(), problem: "is missing".into() })
    }

    /// All tensors by name.
    #[must_use]
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }
}
