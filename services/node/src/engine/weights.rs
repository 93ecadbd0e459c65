//! Weights from the GGUF file to what libtorch multiplies with.

use tch::{Kind, Tensor};

use super::error::EngineError;
use super::quant::{GROUP, Groups, Raw};

/// Rows that decoding always computes together; see [`Linear::forward`].
pub(super) const ROWS: usize = 4;

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
    use infera_prompt::gguf::GgmlType;
    use tch::Device;

    use super::super::quant::tests::{f16_bytes, q4_block, raw};
    use super::*;

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
}
