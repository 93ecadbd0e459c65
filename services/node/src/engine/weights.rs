//! Weights from the GGUF file to what libtorch multiplies with.

use std::fs::File;
use std::os::unix::fs::FileExt;

use half::f16;
use infera_prompt::gguf::{GgmlType, Gguf};
use tch::{Kind, Tensor};

use super::error::EngineError;

const GROUP: usize = 32;

/// Rows that decoding always computes together; see [`Linear::forward`].
pub(super) const ROWS: usize = 4;

/// A matrix as the file stores it: `rows` outputs of `cols` inputs.
pub(super) struct Raw {
    pub rows: usize,
    pub cols: usize,
    kind: GgmlType,
    bytes: Vec<u8>,
}

/// Nibbles, scale and zero of each group: value = (q - 8) * scale + zero.
struct Groups {
    nibbles: Vec<i32>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
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
    fn groups(&self) -> Option<Groups> {
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

/// A matrix that activations are multiplied with.
#[derive(Debug)]
pub(super) enum Linear {
    /// Plain f32.
    F32(Tensor),
    /// libtorch's 4-bit packing: bf16 activations and results.
    Int4 { packed: Tensor, scales_and_zeros: Tensor },
}

impl Linear {
    /// Matrices that share their inputs, stacked, in f32.
    pub fn f32(parts: &[Raw]) -> Result<Self, EngineError> {
        let rows: usize = parts.iter().map(|p| p.rows).sum();
        let values: Vec<f32> = parts.iter().flat_map(Raw::dequantise).collect();
        let tensor = Tensor::f_from_slice(&values)?;
        Ok(Self::F32(tensor.f_view([rows as i64, parts[0].cols as i64])?))
    }

    /// The same in 4 bits where the file has 4 bits, otherwise in f32.
    pub fn int4(parts: &[Raw]) -> Result<Self, EngineError> {
        let rows: usize = parts.iter().map(|p| p.rows).sum();
        let cols = parts[0].cols;
        let groups: Option<Vec<Groups>> = parts.iter().map(Raw::groups).collect();
        // The kernel's blocks: 16 rows, and inputs in groups of 32.
        let Some(groups) = groups.filter(|_| rows.is_multiple_of(16) && cols.is_multiple_of(GROUP)) else {
            return Self::f32(parts);
        };
        let join = |pick: fn(&Groups) -> &[f32]| -> Result<Tensor, tch::TchError> {
            let all: Vec<f32> = groups.iter().flat_map(|g| pick(g).iter().copied()).collect();
            Tensor::f_from_slice(&all)?.f_view([rows as i64, (cols / GROUP) as i64])?.f_transpose(0, 1)
        };
        let scales_and_zeros = Tensor::f_stack(&[join(|g| &g.scales)?, join(|g| &g.zeros)?], -1)?
            .f_to_kind(Kind::BFloat16)?
            .f_contiguous()?;
        let nibbles: Vec<i32> = groups.iter().flat_map(|g| g.nibbles.iter().copied()).collect();
        let packed = Tensor::f_from_slice(&nibbles)?
            .f_view([rows as i64, cols as i64])?
            .f_internal_convert_weight_to_int4pack_for_cpu(2)?;
        Ok(Self::Int4 { packed, scales_and_zeros })
    }

    /// `x` [m, inputs] in f32 to [m, outputs] in f32 or bf16.
    ///
    /// In f32, a row's result is the same bit for bit whatever stands in the other rows, wherever it stands among them
    /// and however many threads compute, as long as `m` is a multiple of [`ROWS`]: the kernels of MKL then walk the
    /// inputs in one order. Exactly [`ROWS`] rows, the shape of decoding, are computed from the other side, which reads
    /// the weights faster. `tests/it/engine.rs` holds this to account.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, tch::TchError> {
        match self {
            Self::F32(w) if x.size()[0] == ROWS as i64 => {
                w.f_matmul(&x.f_transpose(0, 1)?)?.f_transpose(0, 1)?.f_contiguous()
            }
            Self::F32(w) => x.f_matmul(&w.f_transpose(0, 1)?),
            Self::Int4 { packed, scales_and_zeros } => x
                .f_to_kind(Kind::BFloat16)?
                .f_internal_weight_int4pack_mm_for_cpu(packed, GROUP as i64, scales_and_zeros),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn raw(kind: GgmlType, rows: usize, cols: usize, bytes: Vec<u8>) -> Raw {
        Raw { rows, cols, kind, bytes }
    }

    fn f16_bytes(x: f32) -> [u8; 2] {
        f16::from_f32(x).to_le_bytes()
    }

    /// A block with d = 0.5, m = -3 and the nibbles 0, 1, .. 15, 0, 1, .. 15.
    fn q4_block(kind: GgmlType) -> Vec<u8> {
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
    fn four_bits_multiply_as_the_dequantised_matrix() {
        let _guard = tch::no_grad_guard();
        // Numbers that bf16 holds exactly, so that nothing but the order of sums may differ.
        for kind in [GgmlType::Q4_0, GgmlType::Q4_1] {
            let matrix = || raw(kind, 32, 64, q4_block(kind).repeat(64));
            let x = Tensor::arange(4 * 64, (Kind::Float, Device::Cpu)).view([4, 64]).remainder(7) - 3;
            let plain = Linear::f32(&[matrix()]).unwrap().forward(&x).unwrap();
            let packed = Linear::int4(&[matrix()]).unwrap();
            assert!(matches!(packed, Linear::Int4 { .. }));
            let packed = packed.forward(&x).unwrap().to_kind(Kind::Float);
            let far = (&plain - &packed).abs().max().double_value(&[]);
            // Results are bf16: 8 bits of up to 512.
            assert!(far <= 1.0, "{kind:?}: {far}");
        }
    }

    #[test]
    fn other_storage_is_multiplied_in_f32() {
        let ones: Vec<u8> = f16_bytes(1.0).repeat(16 * 32);
        let linear = Linear::int4(&[raw(GgmlType::F16, 16, 32, ones)]).unwrap();
        assert!(matches!(linear, Linear::F32(_)));
    }

    #[test]
    fn rows_of_heads_are_sorted_into_halves() {
        // Two heads of four rows, one number each.
        let bytes: Vec<u8> = (0..8).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let got = raw(GgmlType::F32, 8, 1, bytes).unpermute(2).dequantise();
        assert_eq!(got, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    }
}
