//! Weights from the model's files to what libtorch multiplies with.

use tch::{Device, Kind, TchError, Tensor};

use super::Class;
use super::error::EngineError;
use super::quant::{GROUP, Groups, Raw, is_four_bit};
use super::source::{Name, Source};

/// Rows that decoding always computes together; see [`Linear::forward`].
pub(super) const ROWS: usize = 4;

/// Rows that are brought to another form at once: what loading needs on top of the result is bounded by it. A multiple
/// of the 64 rows that the 4-bit kernel packs together.
const PIECE: usize = 1024;

/// A matrix that activations are multiplied with.
#[derive(Debug)]
pub(super) enum Linear {
    /// Plain f32.
    F32(Tensor),
    /// libtorch's 4-bit packing: bf16 activations and results.
    Int4 { packed: Tensor, scales_and_zeros: Tensor },
    /// Stacked matrices in different forms.
    Stacked(Vec<Linear>),
}

fn empty(rows: usize, cols: usize) -> Result<Tensor, TchError> {
    Tensor::f_empty([rows as i64, cols as i64], (Kind::Float, Device::Cpu))
}

/// A vector in f32.
pub(super) fn vector(source: &Source, name: Name, size: usize) -> Result<Tensor, EngineError> {
    Ok(Tensor::f_from_slice(&source.matrix(name, 1, size)?.dequantise())?)
}

/// A matrix in f32, read in pieces: a vocabulary's is by far the largest of a small model.
pub(super) fn table(source: &Source, name: Name, rows: usize, cols: usize) -> Result<Tensor, EngineError> {
    let all = empty(rows, cols)?;
    for first in (0..rows).step_by(PIECE) {
        let count = PIECE.min(rows - first);
        let values = source.rows(name, (rows, cols), first, count)?.dequantise();
        let piece = Tensor::f_from_slice(&values)?.f_view([count as i64, cols as i64])?;
        all.f_narrow(0, first as i64, count as i64)?.f_copy_(&piece)?;
    }
    Ok(all)
}

impl Linear {
    /// Matrices that share their inputs, stacked: in f32, or in the class `Fast` in 4 bits where the file has 4 bits.
    pub fn new(parts: &[Raw], class: Class) -> Result<Self, EngineError> {
        // The kernel's blocks: 16 rows, and inputs in groups of 32.
        let packs = |p: &Raw| {
            let fits = p.rows.is_multiple_of(16) && p.cols.is_multiple_of(GROUP);
            class == Class::Fast && is_four_bit(p.kind) && fits
        };
        let stacks: Result<Vec<Self>, EngineError> = parts
            .chunk_by(|a, b| packs(a) == packs(b))
            .map(|stack| if packs(&stack[0]) { Self::int4(stack) } else { Self::f32(stack) })
            .collect();
        let mut stacks = stacks?;
        match stacks.len() {
            1 => Ok(stacks.remove(0)),
            _ => Ok(Self::Stacked(stacks)),
        }
    }

    fn f32(parts: &[Raw]) -> Result<Self, EngineError> {
        let all = empty(parts.iter().map(|p| p.rows).sum(), parts[0].cols)?;
        let mut at = 0;
        for part in parts {
            for first in (0..part.rows).step_by(PIECE) {
                let count = PIECE.min(part.rows - first);
                let values = part.dequantise_rows(first, count);
                let piece = Tensor::f_from_slice(&values)?.f_view([count as i64, part.cols as i64])?;
                all.f_narrow(0, at, count as i64)?.f_copy_(&piece)?;
                at += count as i64;
            }
        }
        Ok(Self::F32(all))
    }

    fn int4(parts: &[Raw]) -> Result<Self, EngineError> {
        let rows: usize = parts.iter().map(|p| p.rows).sum();
        let cols = parts[0].cols;
        let groups: Vec<Groups> = parts.iter().filter_map(Raw::groups).collect();
        let scales: Vec<f32> = groups.iter().flat_map(|g| g.scales.iter().copied()).collect();
        // The kernel computes (nibble - 8) * scale + zero.
        let zeros: Vec<f32> =
            groups.iter().flat_map(|g| g.mins.iter().zip(&g.scales).map(|(m, d)| m + 8.0 * d)).collect();
        let turned = |all: &[f32]| -> Result<Tensor, TchError> {
            Tensor::f_from_slice(all)?.f_view([rows as i64, (cols / GROUP) as i64])?.f_transpose(0, 1)
        };
        let scales_and_zeros = Tensor::f_stack(&[turned(&scales)?, turned(&zeros)?], -1)?
            .f_to_kind(Kind::BFloat16)?
            .f_contiguous()?;
        let nibbles: Vec<u8> = groups.iter().flat_map(|g| g.nibbles.iter().copied()).collect();
        drop(groups);
        let pieces: Result<Vec<Tensor>, TchError> = nibbles
            .chunks(PIECE * cols)
            .map(|piece| {
                Tensor::f_from_slice(piece)?
                    .f_view([-1, cols as i64])?
                    .f_to_kind(Kind::Int)?
                    .f_internal_convert_weight_to_int4pack_for_cpu(2)
            })
            .collect();
        Ok(Self::Int4 { packed: Tensor::f_cat(&pieces?, 0)?, scales_and_zeros })
    }

    /// `x` [m, inputs] in f32 to [m, outputs] in f32 or bf16.
    ///
    /// In f32, a row's result is the same bit for bit whatever stands in the other rows, wherever it stands among them
    /// and however many threads compute, as long as `m` is a multiple of [`ROWS`]: the kernels of MKL then walk the
    /// inputs in one order. Exactly [`ROWS`] rows, the shape of decoding, are computed from the other side, which reads
    /// the weights faster. `tests/it/engine.rs` holds this to account.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        match self {
            Self::F32(w) if x.size()[0] == ROWS as i64 => {
                w.f_matmul(&x.f_transpose(0, 1)?)?.f_transpose(0, 1)?.f_contiguous()
            }
            Self::F32(w) => x.f_matmul(&w.f_transpose(0, 1)?),
            Self::Int4 { packed, scales_and_zeros } => x
                .f_to_kind(Kind::BFloat16)?
                .f_internal_weight_int4pack_mm_for_cpu(packed, GROUP as i64, scales_and_zeros),
            Self::Stacked(stacks) => {
                let results: Result<Vec<Tensor>, TchError> =
                    stacks.iter().map(|s| s.forward(x)?.f_to_kind(Kind::Float)).collect();
                Tensor::f_cat(&results?, 1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use infera_prompt::gguf::GgmlType;

    use super::super::quant::tests::{f16_bytes, q4_block, raw};
    use super::*;

    /// Numbers that bf16 holds exactly, so that nothing but the order of sums may differ.
    fn inputs(cols: i64) -> Tensor {
        Tensor::arange(4 * cols, (Kind::Float, Device::Cpu)).view([4, cols]).remainder(7) - 3
    }

    fn farthest(a: &Tensor, b: &Tensor) -> f64 {
        (a - b.to_kind(Kind::Float)).abs().max().double_value(&[])
    }

    #[test]
    fn four_bits_multiply_as_the_dequantised_matrix() {
        let _guard = tch::no_grad_guard();
        for kind in [GgmlType::Q4_0, GgmlType::Q4_1] {
            let matrix = || raw(kind, 32, 64, q4_block(kind).repeat(64));
            let plain = Linear::new(&[matrix()], Class::Exact).unwrap().forward(&inputs(64)).unwrap();
            let packed = Linear::new(&[matrix()], Class::Fast).unwrap();
            assert!(matches!(packed, Linear::Int4 { .. }));
            let far = farthest(&plain, &packed.forward(&inputs(64)).unwrap());
            // Results are bf16: 8 bits of up to 512.
            assert!(far <= 1.0, "{kind:?}: {far}");
        }
    }

    #[test]
    fn other_storage_is_multiplied_in_f32() {
        let ones: Vec<u8> = f16_bytes(1.0).repeat(16 * 32);
        let linear = Linear::new(&[raw(GgmlType::F16, 16, 32, ones)], Class::Fast).unwrap();
        assert!(matches!(linear, Linear::F32(_)));
    }

    #[test]
    fn storages_may_differ_within_a_stack() {
        let _guard = tch::no_grad_guard();
        let four = || raw(GgmlType::Q4_0, 32, 64, q4_block(GgmlType::Q4_0).repeat(64));
        let other = || raw(GgmlType::F16, 16, 64, f16_bytes(0.5).repeat(16 * 64));
        let parts = [four(), four(), other(), four()];
        let plain = Linear::new(&parts, Class::Exact).unwrap().forward(&inputs(64)).unwrap();
        let mixed = Linear::new(&parts, Class::Fast).unwrap();
        assert!(matches!(&mixed, Linear::Stacked(s) if s.len() == 3));
        assert!(farthest(&plain, &mixed.forward(&inputs(64)).unwrap()) <= 1.0);
    }

    #[test]
    fn packing_in_pieces_changes_nothing() {
        let _guard = tch::no_grad_guard();
        let rows = 2 * PIECE + 16;
        let nibbles = (0..rows * 64).map(|i| (i * 7 % 16 + i / 64 % 16) as u8 % 16);
        let bytes: Vec<u8> = nibbles
            .collect::<Vec<_>>()
            .chunks(32)
            .flat_map(|g| {
                let pairs = (0..16).map(|i| g[i] | (g[i + 16] << 4));
                f16_bytes(0.5).into_iter().chain(pairs).collect::<Vec<u8>>()
            })
            .collect();
        let matrix = || raw(GgmlType::Q4_0, rows, 64, bytes.clone());
        let plain = Linear::new(&[matrix()], Class::Exact).unwrap().forward(&inputs(64)).unwrap();
        let packed = Linear::new(&[matrix()], Class::Fast).unwrap().forward(&inputs(64)).unwrap();
        assert!(farthest(&plain, &packed) <= 1.0, "{}", farthest(&plain, &packed));
    }
}
