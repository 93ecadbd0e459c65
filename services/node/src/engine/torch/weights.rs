//! A model's weights as tensors on a device.
//!
//! Every storage is brought to one type, bf16 (f32 to compare with other implementations). The factors of a norm are
//! multiplied into the matrix behind it before that is rounded: what a norm gives then needs no product of its own, and
//! the factors lose nothing.

use tch::{Device, Kind, TchError, Tensor};

use super::super::error::EngineError;
use super::super::shape::Shape;
use super::super::source::{Name, Part, Source};

/// Where and in which type a model is computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Numerics {
    pub device: Device,
    /// Of matrices, activations, keys and values.
    pub kind: Kind,
}

#[derive(Debug)]
pub(super) struct Layer {
    /// Queries, keys and values, one after another: [outputs, width].
    pub qkv: Tensor,
    /// f32.
    pub qkv_bias: Option<Tensor>,
    /// f32, of every head of queries and keys: [heads, head].
    pub qk_norm: Option<Tensor>,
    /// Transposed, as a product that is added wants it: [inputs, width].
    pub output: Tensor,
    /// f32.
    pub post_attention_norm: Option<Tensor>,
    /// Gate and up, one after another: [2 * ffn, width].
    pub gate_up: Tensor,
    /// Transposed: [ffn, width].
    pub down: Tensor,
    /// f32.
    pub post_ffn_norm: Option<Tensor>,
    pub windowed: bool,
}

/// Factors of the rotary embedding, f32 [positions, 1, head]: a head is multiplied by `cos`, and the head with its halves
/// exchanged, multiplied by `sin`, is added.
#[derive(Debug)]
pub(super) struct Rotary {
    pub cos: Tensor,
    pub sin: Tensor,
}

#[derive(Debug)]
pub(super) struct Weights {
    /// [vocabulary, width].
    pub embedding: Tensor,
    pub layers: Vec<Layer>,
    /// f32.
    pub norm: Tensor,
    /// Transposed: [width, vocabulary].
    pub head: Tensor,
    /// Of layers that see everything, and of those with a window.
    pub rotary: [Option<Rotary>; 2],
}

struct Loader<'a> {
    source: &'a Source,
    numerics: Numerics,
}

impl Loader<'_> {
    /// f32, on the processor.
    fn full(&self, name: Name, rows: usize, cols: usize) -> Result<Tensor, EngineError> {
        let values = self.source.matrix(name, rows, cols)?.dequantise();
        Ok(Tensor::f_from_slice(&values)?.f_view([rows as i64, cols as i64])?)
    }

    fn vector(&self, name: Name, size: usize) -> Result<Tensor, EngineError> {
        Ok(self.full(name, 1, size)?.f_view([size as i64])?)
    }

    fn place(&self, x: &Tensor, kind: Kind) -> Result<Tensor, TchError> {
        x.f_to_kind(kind)?.f_to_device(self.numerics.device)
    }

    fn matrix(&self, x: &Tensor) -> Result<Tensor, TchError> {
        self.place(x, self.numerics.kind)
    }

    fn maybe(
        &self,
        there: bool,
        layer: usize,
        part: Part,
        size: usize,
    ) -> Result<Option<Tensor>, EngineError> {
        if !there {
            return Ok(None);
        }
        Ok(Some(self.place(&self.vector(Name::Layer(layer, part), size)?, Kind::Float)?))
    }

    /// Matrices that share their inputs, which `norm` gives: its factors are theirs.
    fn behind_norm(&self, layer: usize, norm: Part, parts: &[(Part, usize)]) -> Result<Tensor, EngineError> {
        let width = self.source.shape().width;
        let factors = self.vector(Name::Layer(layer, norm), width)?;
        let all: Result<Vec<Tensor>, EngineError> =
            parts.iter().map(|(part, rows)| self.full(Name::Layer(layer, *part), *rows, width)).collect();
        Ok(self.matrix(&Tensor::f_cat(&all?, 0)?.f_mul(&factors)?)?)
    }

    /// A matrix whose product is added to the residual stream, transposed.
    fn added(&self, layer: usize, part: Part, cols: usize) -> Result<Tensor, EngineError> {
        let rows = self.source.shape().width;
        Ok(self.matrix(&self.full(Name::Layer(layer, part), rows, cols)?)?.f_transpose(0, 1)?)
    }

    fn layer(&self, i: usize) -> Result<Layer, EngineError> {
        let s = self.source.shape();
        let (q, kv) = (s.query_width(), s.kv_width());
        let mut qkv_bias = None;
        if s.qkv_bias {
            let parts = [(Part::QBias, q), (Part::KBias, kv), (Part::VBias, kv)];
            let all: Result<Vec<Tensor>, EngineError> =
                parts.iter().map(|(part, size)| self.vector(Name::Layer(i, *part), *size)).collect();
            qkv_bias = Some(self.place(&Tensor::f_cat(&all?, 0)?, Kind::Float)?);
        }
        let mut qk_norm = None;
        if s.qk_norm {
            let of = |part, heads: usize| -> Result<Tensor, EngineError> {
                let norm = self.vector(Name::Layer(i, part), s.head)?;
                Ok(norm.f_unsqueeze(0)?.f_repeat([heads as i64, 1])?)
            };
            let all = [of(Part::QNorm, s.heads)?, of(Part::KNorm, s.kv_heads)?];
            qk_norm = Some(self.place(&Tensor::f_cat(&all, 0)?, Kind::Float)?);
        }
        Ok(Layer {
            qkv: self.behind_norm(i, Part::AttnNorm, &[(Part::Q, q), (Part::K, kv), (Part::V, kv)])?,
            qkv_bias,
            qk_norm,
            output: self.added(i, Part::Output, q)?,
            post_attention_norm: self.maybe(s.post_norms, i, Part::PostAttnNorm, s.width)?,
            gate_up: self.behind_norm(i, Part::FfnNorm, &[(Part::Gate, s.ffn), (Part::Up, s.ffn)])?,
            down: self.added(i, Part::Down, s.ffn)?,
            post_ffn_norm: self.maybe(s.post_norms, i, Part::PostFfnNorm, s.width)?,
            windowed: s.reach(i).is_some(),
        })
    }

    /// The factors for `speeds`, computed in f64.
    fn rotary(&self, speeds: &[f64], positions: usize) -> Result<Option<Rotary>, TchError> {
        if speeds.is_empty() {
            return Ok(None);
        }
        let positions = Tensor::f_arange(positions as i64, (Kind::Double, Device::Cpu))?;
        let angles = positions.f_outer(&Tensor::f_from_slice(speeds)?)?.f_unsqueeze(1)?;
        let (cos, sin) = (angles.f_cos()?, angles.f_sin()?);
        Ok(Some(Rotary {
            cos: self.place(&Tensor::f_cat(&[&cos, &cos], 2)?, Kind::Float)?,
            sin: self.place(&Tensor::f_cat(&[&sin.f_neg()?, &sin], 2)?, Kind::Float)?,
        }))
    }
}

/// The type in which the head is multiplied: a processor's products of bf16 have bf16 sums, and logits are f32.
pub(super) fn head_kind(numerics: Numerics) -> Kind {
    if numerics.device == Device::Cpu { Kind::Float } else { numerics.kind }
}

impl Weights {
    /// Reads them, one matrix after the other.
    pub fn load(source: &Source, numerics: Numerics, positions: usize) -> Result<Self, EngineError> {
        let loader = Loader { source, numerics };
        let s = source.shape();
        let matrix = |name| -> Result<Tensor, EngineError> {
            Ok(loader.matrix(&loader.full(name, s.vocabulary, s.width)?)?)
        };
        let embedding = matrix(Name::Embedding)?;
        let head = if s.tied { embedding.shallow_clone() } else { matrix(Name::Head)? };
        let layers: Result<Vec<Layer>, EngineError> = (0..s.layers).map(|i| loader.layer(i)).collect();
        let speeds = source.speeds()?;
        Ok(Self {
            embedding,
            layers: layers?,
            norm: loader.place(&loader.vector(Name::Norm, s.width)?, Kind::Float)?,
            head: head.f_to_kind(head_kind(numerics))?.f_transpose(0, 1)?,
            rotary: [loader.rotary(&speeds.full, positions)?, loader.rotary(&speeds.windowed, positions)?],
        })
    }
}

/// Bytes of all weights as [`Weights::load`] places them in bf16, with factors for `positions`.
pub(super) fn weight_bytes(s: &Shape, device: Device, positions: usize) -> u64 {
    let head = (s.vocabulary * s.width) as u64;
    let matrices: u64 =
        Name::all(s).iter().filter(|(_, rows, _)| *rows > 1).map(|(_, r, c)| (r * c) as u64).sum();
    let vectors = s.layers
        * (2 * s.width + s.query_width() + 2 * s.kv_width() + (s.heads + s.kv_heads) * s.head)
        + s.width;
    let kinds = if s.window.is_some() { 2 } else { 1 };
    let tables = kinds * 2 * positions * s.head;
    // A processor's head is f32; the embedding stays as it is.
    let more = match (device, s.tied) {
        (Device::Cpu, true) => 4 * head,
        (Device::Cpu, false) => 2 * head,
        _ => 0,
    };
    2 * matrices + more + 4 * (vectors + tables) as u64
}
