//! Matrices as a model file stores them, and what their blocks mean.
//!
//! Every quantised storage is brought to one form, `value = q * scale + min` with a scale and a minimum for each group:
//! the formulas of ggml's `dequantize_row_*`, bit for bit (a product and a sum, each rounded to f32).

use half::{bf16, f16};
use infera_prompt::gguf::GgmlType;

/// Numbers that share a scale in 4-bit matrices.
pub(super) const GROUP: usize = 32;

/// A matrix as the file stores it: `rows` outputs of `cols` inputs, row after row. A vector has one row.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Raw {
    pub rows: usize,
    pub cols: usize,
    pub kind: GgmlType,
    pub bytes: Vec<u8>,
}

/// A matrix of 4-bit numbers: `value = nibble * scale + min`, a scale and a minimum for each [`GROUP`].
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Groups {
    /// 0 to 15, row after row.
    pub nibbles: Vec<u8>,
    pub scales: Vec<f32>,
    pub mins: Vec<f32>,
}

/// A matrix of integers of at most 8 bits: `value = q * scale + min`, a scale and a minimum for each `group` numbers.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Bytes8 {
    /// 16 or 32; never crosses a row.
    pub group: usize,
    /// -128 to 127, row after row; Q5 storages use 0 to 31 or -16 to 15, Q6 -32 to 31.
    pub values: Vec<i8>,
    pub scales: Vec<f32>,
    pub mins: Vec<f32>,
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn signed(q: u8) -> i8 {
    i8::from_le_bytes([q])
}

/// The `j`-th pair of 6-bit scale and minimum of a K block, from its 12 bytes.
fn scale_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let (low, high) = (packed[j + 4], (packed[j - 4] >> 6, packed[j] >> 6));
        ((low & 15) | (high.0 << 4), (low >> 4) | (high.1 << 4))
    };
    (f32::from(scale), f32::from(min))
}

impl Bytes8 {
    fn new(group: usize, numbers: usize) -> Self {
        let groups = numbers / group;
        Self {
            group,
            values: Vec::with_capacity(numbers),
            scales: Vec::with_capacity(groups),
            mins: Vec::with_capacity(groups),
        }
    }

    fn scale(&mut self, scale: f32, min: f32) {
        self.scales.push(scale);
        self.mins.push(min);
    }

    /// Low nibbles first, then the high ones, less `zero`.
    fn nibbles(&mut self, quants: &[u8], zero: i8) {
        self.values.extend(quants.iter().map(|b| signed(b & 15) - zero));
        self.values.extend(quants.iter().map(|b| signed(b >> 4) - zero));
    }

    /// A block of Q5_0 or Q5_1 after its scale: 32 fifth bits and 32 nibbles.
    fn fives(&mut self, block: &[u8], zero: i8) {
        let high = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        for j in 0..GROUP {
            let b = block[4 + j % 16];
            let low = if j < 16 { b & 15 } else { b >> 4 };
            let fifth = (high >> j) as u8 & 1;
            self.values.push(signed(low | (fifth << 4)) - zero);
        }
    }

    /// A block of Q4_K or, with fifth bits, of Q5_K.
    fn pairs(&mut self, block: &[u8], fifths: Option<&[u8]>, quants: &[u8]) {
        let (d, dmin) = (half_at(block, 0), half_at(block, 2));
        for j in 0..8 {
            let (scale, min) = scale_min(&block[4..16], j);
            self.scale(d * scale, -(dmin * min));
            for i in 0..GROUP {
                let b = quants[j / 2 * 32 + i];
                let low = if j % 2 == 0 { b & 15 } else { b >> 4 };
                let fifth = fifths.map_or(0, |f| (f[i] >> j) & 1);
                self.values.push(signed(low | (fifth << 4)));
            }
        }
    }

    /// A block of Q6_K.
    fn sixes(&mut self, block: &[u8]) {
        let d = half_at(block, 208);
        for s in &block[192..208] {
            self.scale(d * f32::from(signed(*s)), 0.0);
        }
        for (low, high) in block[..128].chunks_exact(64).zip(block[128..192].chunks_exact(32)) {
            for part in 0..4 {
                for (i, upper) in high.iter().enumerate() {
                    let b = low[part % 2 * 32 + i];
                    let nibble = if part < 2 { b & 15 } else { b >> 4 };
                    let upper = (upper >> (2 * part)) & 3;
                    self.values.push(signed(nibble | (upper << 4)) - 32);
                }
            }
        }
    }

    fn block(&mut self, kind: GgmlType, block: &[u8]) {
        match kind {
            GgmlType::Q4_0 => {
                self.scale(half_at(block, 0), 0.0);
                self.nibbles(&block[2..], 8);
            }
            GgmlType::Q4_1 => {
                self.scale(half_at(block, 0), half_at(block, 2));
                self.nibbles(&block[4..], 0);
            }
            GgmlType::Q5_0 => {
                self.scale(half_at(block, 0), 0.0);
                self.fives(&block[2..], 16);
            }
            GgmlType::Q5_1 => {
                self.scale(half_at(block, 0), half_at(block, 2));
                self.fives(&block[4..], 0);
            }
            GgmlType::Q8_0 => {
                self.scale(half_at(block, 0), 0.0);
                self.values.extend(block[2..].iter().map(|q| signed(*q)));
            }
            GgmlType::Q4K => self.pairs(block, None, &block[16..]),
            GgmlType::Q5K => self.pairs(block, Some(&block[16..48]), &block[48..]),
            GgmlType::Q6K => self.sixes(block),
            GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 | GgmlType::Other(_) => {}
        }
    }

    fn dequantise(&self, out: &mut Vec<f32>) {
        let groups = self.values.chunks_exact(self.group).zip(self.scales.iter().zip(&self.mins));
        for (values, (scale, min)) in groups {
            out.extend(values.iter().map(|q| f32::from(*q) * scale + min));
        }
    }
}

/// Whether a storage is one of 4-bit numbers in groups of [`GROUP`].
pub(super) fn is_four_bit(kind: GgmlType) -> bool {
    matches!(kind, GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Q4K)
}

/// Numbers that share a scale; `None` for storages without one.
fn group_of(kind: GgmlType) -> Option<usize> {
    match kind {
        GgmlType::Q6K => Some(16),
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 | GgmlType::Other(_) => None,
        _ => Some(GROUP),
    }
}

impl Raw {
    /// Bytes of a row.
    fn stride(&self) -> usize {
        self.bytes.len() / self.rows.max(1)
    }

    /// Undoes the order of rows that GGUF gives to the queries and keys of Llama models, so that the rotary embedding
    /// turns the first half of a head against the second: row `2i + j` of a head becomes row `j * half + i`.
    pub fn unpermute(mut self, heads: usize) -> Self {
        let row = self.stride();
        let size = self.rows / heads;
        let mut out = Vec::with_capacity(self.bytes.len());
        for head in 0..heads {
            for to in 0..size {
                let (j, i) = (to / (size / 2), to % (size / 2));
                let from = (head * size + 2 * i + j) * row;
                out.extend_from_slice(&self.bytes[from..from + row]);
            }
        }
        self.bytes = out;
        self
    }

    /// Every number as f32, row after row.
    pub fn dequantise(&self) -> Vec<f32> {
        let bytes = &self.bytes;
        let mut out = Vec::with_capacity(self.rows * self.cols);
        match self.kind {
            GgmlType::F32 => {
                out.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
            }
            GgmlType::F16 => out.extend(bytes.chunks_exact(2).map(|b| half_at(b, 0))),
            GgmlType::BF16 => {
                out.extend(bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()));
            }
            kind => {
                if let (Some(group), Some((_, size))) = (group_of(kind), kind.block()) {
                    let mut block = Bytes8::new(group, 256);
                    for bytes in bytes.chunks_exact(size as usize) {
                        block.values.clear();
                        block.scales.clear();
                        block.mins.clear();
                        block.block(kind, bytes);
                        block.dequantise(&mut out);
                    }
                }
            }
        }
        out
    }

    fn integers(&self) -> Option<Bytes8> {
        let (group, (_, size)) = (group_of(self.kind)?, self.kind.block()?);
        let mut all = Bytes8::new(group, self.rows * self.cols);
        self.bytes.chunks_exact(size as usize).for_each(|block| all.block(self.kind, block));
        Some(all)
    }

    /// The matrix as nibbles, where the storage is Q4_0, Q4_1 or Q4_K.
    pub fn groups(&self) -> Option<Groups> {
        if !is_four_bit(self.kind) {
            return None;
        }
        let all = self.integers()?;
        let zero: i8 = if self.kind == GgmlType::Q4_0 { 8 } else { 0 };
        let mins = match zero {
            0 => all.mins,
            _ => all.scales.iter().map(|d| -8.0 * d).collect(),
        };
        let nibbles = all.values.iter().map(|q| (q + zero).unsigned_abs()).collect();
        Some(Groups { nibbles, scales: all.scales, mins })
    }

    /// The matrix as 8-bit integers, where the storage is Q5_0, Q5_1, Q8_0, Q5_K or Q6_K.
    pub fn bytes8(&self) -> Option<Bytes8> {
        if is_four_bit(self.kind) { None } else { self.integers() }
    }
}

#[cfg(test)]
#[path = "quant_tests.rs"]
pub(super) mod tests;
