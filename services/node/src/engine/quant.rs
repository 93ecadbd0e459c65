//! Matrices as a model file stores them, and what their blocks mean.

use std::fs::File;
use std::os::unix::fs::FileExt;

use half::f16;
use infera_prompt::gguf::{GgmlType, Gguf};

use super::error::EngineError;

/// Numbers that share a scale.
pub(super) const GROUP: usize = 32;

/// A matrix as the file stores it: `rows` outputs of `cols` inputs.
pub(super) struct Raw {
    pub rows: usize,
    pub cols: usize,
    pub kind: GgmlType,
    pub bytes: Vec<u8>,
}

/// Nibbles, scale and zero of each group: value = (q - 8) * scale + zero.
pub(super) struct Groups {
    pub nibbles: Vec<i32>,
    pub scales: Vec<f32>,
    pub zeros: Vec<f32>,
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

impl Raw {
    /// Reads a matrix and checks its shape.
    pub fn read(gguf: &Gguf, file: &File, name: &str, rows: usize, cols: usize) -> Result<Self, EngineError> {
        let info = gguf.tensor(name)?;
        let expected = if rows == 1 { vec![cols as u64] } else { vec![cols as u64, rows as u64] };
        if info.dims != expected {
            let text = format!("tensor {name} has shape {:?}, expected {expected:?}", info.dims);
            return Err(EngineError::Unsupported(text));
        }
        if info.kind.block().is_none() {
            let text =
                format!("tensor {name} is stored as {:?}; known are F32, F16, Q4_0, Q4_1, Q8_0", info.kind);
            return Err(EngineError::Unsupported(text));
        }
        let mut bytes = vec![0u8; info.bytes as usize];
        file.read_exact_at(&mut bytes, info.start)?;
        Ok(Self { rows, cols, kind: info.kind, bytes })
    }

    /// Undoes the order of rows that GGUF gives to queries and keys, so that the rotary embedding turns the first half
    /// of a head against the second: row `2i + j` of a head becomes row `j * half + i`.
    pub fn unpermute(mut self, heads: usize) -> Self {
        let row = self.bytes.len() / self.rows;
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
        let mut out = Vec::with_capacity(self.rows * self.cols);
        match self.kind {
            GgmlType::F32 => {
                out.extend(self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
            }
            GgmlType::F16 => out.extend(self.bytes.chunks_exact(2).map(|b| half_at(b, 0))),
            GgmlType::Q8_0 => {
                for block in self.bytes.chunks_exact(34) {
                    let d = half_at(block, 0);
                    out.extend(block[2..].iter().map(|q| f32::from(i8::from_le_bytes([*q])) * d));
                }
            }
            GgmlType::Q4_0 | GgmlType::Q4_1 => {
                let per = if self.kind == GgmlType::Q4_0 { 18 } else { 20 };
                for block in self.bytes.chunks_exact(per) {
                    let d = half_at(block, 0);
                    let m = if per == 20 { half_at(block, 2) } else { -8.0 * d };
                    let quants = &block[per - 16..];
                    out.extend(quants.iter().map(|b| f32::from(b & 15) * d + m));
                    out.extend(quants.iter().map(|b| f32::from(b >> 4) * d + m));
                }
            }
            GgmlType::Other(_) => {}
        }
        out
    }

    /// Groups of 32, where the storage has them.
    pub fn groups(&self) -> Option<Groups> {
        let per = match self.kind {
            GgmlType::Q4_0 => 18,
            GgmlType::Q4_1 => 20,
            _ => return None,
        };
        let blocks = self.bytes.len() / per;
        let mut groups = Groups {
            nibbles: Vec::with_capacity(blocks * GROUP),
            scales: Vec::with_capacity(blocks),
            zeros: Vec::with_capacity(blocks),
        };
        for block in self.bytes.chunks_exact(per) {
            let d = half_at(block, 0);
            groups.scales.push(d);
            groups.zeros.push(if per == 20 { half_at(block, 2) + 8.0 * d } else { 0.0 });
            let quants = &block[per - 16..];
            groups.nibbles.extend(quants.iter().map(|b| i32::from(b & 15)));
            groups.nibbles.extend(quants.iter().map(|b| i32::from(b >> 4)));
        }
        Some(groups)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn raw(kind: GgmlType, rows: usize, cols: usize, bytes: Vec<u8>) -> Raw {
        Raw { rows, cols, kind, bytes }
    }

    pub fn f16_bytes(x: f32) -> [u8; 2] {
        f16::from_f32(x).to_le_bytes()
    }

    /// A block with d = 0.5, m = -3 and the nibbles 0, 1, .. 15, 0, 1, .. 15.
    pub fn q4_block(kind: GgmlType) -> Vec<u8> {
        let mut block = f16_bytes(0.5).to_vec();
        if kind == GgmlType::Q4_1 {
            block.extend(f16_bytes(-3.0));
        }
        block.extend((0..16u8).map(|i| i | (i << 4)));
        block
    }

    #[test]
    fn blocks_hold_the_low_nibbles_first() {
        let q: Vec<f32> = (0..32).map(|i| (i % 16) as f32).collect();
        let got = raw(GgmlType::Q4_1, 1, 32, q4_block(GgmlType::Q4_1)).dequantise();
        assert_eq!(got, q.iter().map(|q| q * 0.5 - 3.0).collect::<Vec<_>>());
        let got = raw(GgmlType::Q4_0, 1, 32, q4_block(GgmlType::Q4_0)).dequantise();
        assert_eq!(got, q.iter().map(|q| (q - 8.0) * 0.5).collect::<Vec<_>>());
        let mut block = f16_bytes(0.25).to_vec();
        block.extend((0..32i8).map(|i| (i - 16).to_le_bytes()[0]));
        let got = raw(GgmlType::Q8_0, 1, 32, block).dequantise();
        assert_eq!(got, (0..32).map(|i| (i as f32 - 16.0) * 0.25).collect::<Vec<_>>());
        let halves: Vec<u8> = [1.5, -2.0].iter().flat_map(|x| f16_bytes(*x)).collect();
        assert_eq!(raw(GgmlType::F16, 1, 2, halves).dequantise(), [1.5, -2.0]);
    }

    #[test]
    fn rows_of_heads_are_sorted_into_halves() {
        // Two heads of four rows, one number each.
        let bytes: Vec<u8> = (0..8).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let got = raw(GgmlType::F32, 8, 1, bytes).unpermute(2).dequantise();
        assert_eq!(got, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    }
}
