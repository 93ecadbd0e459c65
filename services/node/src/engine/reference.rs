//! The forward pass written with libtorch, in f32 and without a cache: what the kernels are held against.

use std::path::Path;

use tch::{Device, Kind, TchError, Tensor};

use super::error::EngineError;
use super::shape::{Activation, Shape};
use super::source::{Name, Part, Source};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

struct Reference {
    source: Source,
    shape: Shape,
    /// Cosines and sines [tokens, 1, head / 2]: of the layers that see everything, and of those with a window.
    tables: [(Tensor, Tensor); 2],
}

/// Logits after every token, computed by libtorch in one pass over all of them.
///
/// # Errors
/// The model cannot be loaded, or libtorch refuses an operation.
#[doc(hidden)]
pub fn reference_logits(path: &Path, tokens: &[u32]) -> Result<Vec<Vec<f32>>, EngineError> {
    let _guard = tch::no_grad_guard();
    let source = Source::open(path)?;
    let speeds = source.speeds()?;
    let table = |speeds: &[f64]| -> Result<(Tensor, Tensor), TchError> {
        let positions = Tensor::f_arange(tokens.len() as i64, (Kind::Double, Device::Cpu))?;
        let angles = positions.f_outer(&Tensor::f_from_slice(speeds)?)?.f_unsqueeze(1)?;
        Ok((angles.f_cos()?.f_to_kind(Kind::Float)?, angles.f_sin()?.f_to_kind(Kind::Float)?))
    };
    let tables = [table(&speeds.full)?, table(&speeds.windowed)?];
    Reference { shape: source.shape(), source, tables }.logits(tokens)
}

impl Reference {
    fn matrix(&self, name: Name, rows: usize, cols: usize) -> Result<Tensor, EngineError> {
        let values = self.source.matrix(name, rows, cols)?.dequantise();
        Ok(Tensor::f_from_slice(&values)?.f_view([rows as i64, cols as i64])?)
    }

    fn logits(&self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, EngineError> {
        let s = &self.shape;
        let ids: Vec<i64> = tokens.iter().map(|t| i64::from(*t)).collect();
        let embedding = self.matrix(Name::Embedding, s.vocabulary, s.width)?;
        let mut x = embedding.f_index_select(0, &Tensor::f_from_slice(&ids)?)?;
        x = x.f_mul_scalar(f64::from(s.embedding_scale))?;
        for layer in 0..s.layers {
            let seen = self.attention(layer, &self.norm(&x, Name::Layer(layer, Part::AttnNorm))?)?;
            x = x.f_add(&self.after(seen, layer, Part::PostAttnNorm)?)?;
            let more = self.feed_forward(layer, &self.norm(&x, Name::Layer(layer, Part::FfnNorm))?)?;
            x = x.f_add(&self.after(more, layer, Part::PostFfnNorm)?)?;
        }
        let x = self.norm(&x, Name::Norm)?;
        let head = if s.tied { embedding } else { self.matrix(Name::Head, s.vocabulary, s.width)? };
        let all = x.f_matmul(&head.f_transpose(0, 1)?)?.f_contiguous()?;
        let mut flat = vec![0f32; tokens.len() * s.vocabulary];
        all.f_copy_data(&mut flat, tokens.len() * s.vocabulary)?;
        Ok(flat.chunks_exact(s.vocabulary).map(<[f32]>::to_vec).collect())
    }

    fn norm(&self, x: &Tensor, name: Name) -> Result<Tensor, EngineError> {
        let width = x.size().last().copied().unwrap_or(0);
        let weight = self.matrix(name, 1, width as usize)?.f_view([width])?;
        Ok(x.f_rms_norm([width], Some(weight), self.shape.norm_eps)?)
    }

    fn after(&self, x: Tensor, layer: usize, part: Part) -> Result<Tensor, EngineError> {
        if self.shape.post_norms { self.norm(&x, Name::Layer(layer, part)) } else { Ok(x) }
    }

    fn linear(&self, layer: usize, part: Part, x: &Tensor, rows: usize) -> Result<Tensor, EngineError> {
        let cols = x.size()[1] as usize;
        Ok(x.f_matmul(&self.matrix(Name::Layer(layer, part), rows, cols)?.f_transpose(0, 1)?)?)
    }

    /// Queries, keys or values as [tokens, heads, head].
    fn heads(
        &self,
        layer: usize,
        (part, bias, norm): (Part, Part, Option<Part>),
        x: &Tensor,
        heads: usize,
    ) -> Result<Tensor, EngineError> {
        let s = &self.shape;
        let mut all = self.linear(layer, part, x, heads * s.head)?;
        if s.qkv_bias {
            all = all.f_add(&self.matrix(Name::Layer(layer, bias), 1, heads * s.head)?)?;
        }
        let all = all.f_view([-1, heads as i64, s.head as i64])?;
        match norm.filter(|_| s.qk_norm) {
            Some(norm) => self.norm(&all, Name::Layer(layer, norm)),
            None => Ok(all),
        }
    }

    /// The first half of each head turned against the second.
    fn turn(&self, x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor, TchError> {
        let half = self.shape.head as i64 / 2;
        let (a, b) = (x.f_narrow(2, 0, half)?, x.f_narrow(2, half, half)?);
        let first = a.f_mul(cos)?.f_sub(&b.f_mul(sin)?)?;
        Tensor::f_cat(&[first, b.f_mul(cos)?.f_add(&a.f_mul(sin)?)?], 2)
    }

    fn attention(&self, layer: usize, x: &Tensor) -> Result<Tensor, EngineError> {
        let s = &self.shape;
        let table = &self.tables[usize::from(s.reach(layer).is_some())];
        let q = self.heads(layer, (Part::Q, Part::QBias, Some(Part::QNorm)), x, s.heads)?;
        let k = self.heads(layer, (Part::K, Part::KBias, Some(Part::KNorm)), x, s.kv_heads)?;
        let v = self.heads(layer, (Part::V, Part::VBias, None), x, s.kv_heads)?;
        let group = (s.heads / s.kv_heads) as i64;
        let by_head = |t: &Tensor, times: i64| {
            t.f_repeat_interleave_self_int(times, 1, None)?.f_transpose(0, 1)?.f_unsqueeze(0)
        };
        let (q, k) = (by_head(&self.turn(&q, table)?, 1)?, by_head(&self.turn(&k, table)?, group)?);
        let count = x.size()[0];
        let all = Tensor::f_ones([count, count], (Kind::Bool, Device::Cpu))?;
        let mut hidden = all.f_triu(1)?;
        if let Some(reach) = s.reach(layer) {
            hidden = hidden.f_logical_or(&all.f_tril(-(reach as i64))?)?;
        }
        let mask = Tensor::f_zeros([count, count], F32)?.f_masked_fill(&hidden, f64::NEG_INFINITY)?;
        let scale = f64::from(s.attention_scale);
        let v = by_head(&v, group)?;
        let seen = Tensor::f_scaled_dot_product_attention(&q, &k, &v, Some(&mask), 0.0, false, scale, false)?;
        let seen = seen.f_squeeze_dim(0)?.f_transpose(0, 1)?.f_reshape([count, s.query_width() as i64])?;
        self.linear(layer, Part::Output, &seen, s.width)
    }

    fn feed_forward(&self, layer: usize, x: &Tensor) -> Result<Tensor, EngineError> {
        let s = &self.shape;
        let gate = self.linear(layer, Part::Gate, x, s.ffn)?;
        let gate = match s.activation {
            Activation::Silu => gate.f_silu()?,
            Activation::GeluTanh => gate.f_gelu("tanh")?,
        };
        let both = gate.f_mul(&self.linear(layer, Part::Up, x, s.ffn)?)?;
        self.linear(layer, Part::Down, &both, s.width)
    }
}
