//! The forward pass of a Llama model.
//!
//! Residuals, norms, rotary embedding, attention and logits are f32 in both classes; the class decides what the
//! matrices of the layers are. Attention runs for each sequence alone, so that its shape depends on that sequence only.

use std::fs::File;

use infera_prompt::gguf::Gguf;
use tch::{Device, Kind, TchError, Tensor};

use super::Class;
use super::error::EngineError;
use super::quant::Raw;
use super::shape::Shape;
use super::weights::{Linear, ROWS};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

#[derive(Debug)]
struct Layer {
    attention_norm: Tensor,
    qkv: Linear,
    output: Linear,
    ffn_norm: Tensor,
    gate_up: Linear,
    down: Linear,
}

/// A loaded model.
#[derive(Debug)]
pub(super) struct Model {
    shape: Shape,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Linear,
    cos: Tensor,
    sin: Tensor,
}

/// Keys and values of one sequence.
#[derive(Debug)]
pub(super) struct Cache {
    /// Per layer: [kv heads, capacity, head].
    layers: Vec<(Tensor, Tensor)>,
    /// Tokens in it.
    pub length: usize,
}

/// One sequence's next token in a decoding step.
pub(super) struct Step<'a> {
    pub token: u32,
    pub cache: &'a mut Cache,
}

/// What a layer does with queries, keys and values of all rows: the attention of the real ones.
type Attend<'a> = dyn FnMut(usize, &Tensor, &Tensor, &Tensor) -> Result<Tensor, TchError> + 'a;

fn vector(gguf: &Gguf, file: &File, name: &str, size: usize) -> Result<Tensor, EngineError> {
    Ok(Tensor::f_from_slice(&Raw::read(gguf, file, name, 1, size)?.dequantise())?)
}

fn load_layer(gguf: &Gguf, file: &File, i: usize, s: &Shape, class: Class) -> Result<Layer, EngineError> {
    let raw = |name: &str, rows, cols| Raw::read(gguf, file, &format!("blk.{i}.{name}.weight"), rows, cols);
    let linear = |parts: &[Raw]| match class {
        Class::Exact => Linear::f32(parts),
        Class::Fast => Linear::int4(parts),
    };
    let kv = s.kv_heads * s.head;
    Ok(Layer {
        attention_norm: vector(gguf, file, &format!("blk.{i}.attn_norm.weight"), s.width)?,
        qkv: linear(&[
            raw("attn_q", s.width, s.width)?.unpermute(s.heads),
            raw("attn_k", kv, s.width)?.unpermute(s.kv_heads),
            raw("attn_v", kv, s.width)?,
        ])?,
        output: linear(&[raw("attn_output", s.width, s.width)?])?,
        ffn_norm: vector(gguf, file, &format!("blk.{i}.ffn_norm.weight"), s.width)?,
        gate_up: linear(&[raw("ffn_gate", s.ffn, s.width)?, raw("ffn_up", s.ffn, s.width)?])?,
        down: linear(&[raw("ffn_down", s.width, s.ffn)?])?,
    })
}

/// Cosines and sines of the rotary embedding, [positions, head], computed in f64.
fn rotary(s: &Shape, positions: usize) -> Result<(Tensor, Tensor), TchError> {
    let half = s.head / 2;
    let mut cos = Vec::with_capacity(positions * s.head);
    let mut sin = Vec::with_capacity(positions * s.head);
    let speeds: Vec<f64> =
        (0..half).map(|i| libm::pow(s.rope_base, -2.0 * i as f64 / s.head as f64)).collect();
    for position in 0..positions {
        for i in 0..s.head {
            let angle = position as f64 * speeds[i % half];
            cos.push(libm::cos(angle) as f32);
            // The first half is turned by -sin, the second by +sin.
            let sign = if i < half { -1.0 } else { 1.0 };
            sin.push((sign * libm::sin(angle)) as f32);
        }
    }
    let table = |v: &[f32]| Tensor::f_from_slice(v)?.f_view([positions as i64, 1, s.head as i64]);
    Ok((table(&cos)?, table(&sin)?))
}

impl Model {
    /// Reads the weights. Positions from `max_context` on have no rotary embedding.
    pub fn load(
        gguf: &Gguf,
        file: &File,
        shape: Shape,
        class: Class,
        max_context: usize,
    ) -> Result<Self, EngineError> {
        let embedding =
            Linear::f32(&[Raw::read(gguf, file, "token_embd.weight", shape.vocabulary, shape.width)?])?;
        let Linear::F32(embedding) = embedding else {
            return Err(EngineError::Unsupported("token_embd.weight".into()));
        };
        let head = if shape.tied {
            Linear::F32(embedding.shallow_clone())
        } else {
            Linear::f32(&[Raw::read(gguf, file, "output.weight", shape.vocabulary, shape.width)?])?
        };
        let layers: Result<Vec<Layer>, EngineError> =
            (0..shape.layers).map(|i| load_layer(gguf, file, i, &shape, class)).collect();
        let (cos, sin) = rotary(&shape, max_context)?;
        let norm = vector(gguf, file, "output_norm.weight", shape.width)?;
        Ok(Self { shape, embedding, layers: layers?, norm, head, cos, sin })
    }

    /// An empty cache for at most `capacity` tokens.
    pub fn cache(&self, capacity: usize) -> Result<Cache, TchError> {
        let s = &self.shape;
        let size = [s.kv_heads as i64, capacity as i64, s.head as i64];
        let layers: Result<Vec<_>, TchError> =
            (0..s.layers).map(|_| Ok((Tensor::f_empty(size, F32)?, Tensor::f_empty(size, F32)?))).collect();
        Ok(Cache { layers: layers?, length: 0 })
    }

    /// Appends a piece of a prompt to a cache; returns the logits after its last token if asked for.
    pub fn prefill(
        &self,
        tokens: &[u32],
        cache: &mut Cache,
        logits: bool,
    ) -> Result<Option<Vec<f32>>, TchError> {
        let (count, start) = (tokens.len(), cache.length);
        let positions: Vec<i64> = (start..start + count).map(|p| p as i64).collect();
        let mask = self.mask(count, start)?;
        let hidden = self.layers(tokens, &positions, &mut |layer, q, k, v| {
            self.attend_piece(&mut cache.layers[layer], (q, k, v), count, start, &mask)
        })?;
        cache.length += count;
        if !logits {
            return Ok(None);
        }
        let last = hidden.f_narrow(0, count as i64 - 1, 1)?.f_repeat([ROWS as i64, 1])?;
        Ok(self.logits(&last, 1)?.pop())
    }

    /// Appends one token to each of at most [`ROWS`] sequences; returns the logits of each.
    pub fn decode(&self, steps: &mut [Step<'_>]) -> Result<Vec<Vec<f32>>, TchError> {
        let count = steps.len();
        let tokens: Vec<u32> = steps.iter().map(|s| s.token).collect();
        let positions: Vec<i64> = steps.iter().map(|s| s.cache.length as i64).collect();
        let hidden = self.layers(&tokens, &positions, &mut |layer, q, k, v| {
            let mut rows = Vec::with_capacity(count);
            for (i, step) in steps.iter_mut().enumerate() {
                let at = step.cache.length;
                let row = |t: &Tensor| t.f_get(i as i64);
                rows.push(self.attend_one(
                    &mut step.cache.layers[layer],
                    (&row(q)?, &row(k)?, &row(v)?),
                    at,
                )?);
            }
            Tensor::f_cat(&rows, 0)
        })?;
        steps.iter_mut().for_each(|s| s.cache.length += 1);
        self.logits(&hidden, count)
    }

    /// Additive causal mask for the queries of `count` new tokens after `start` old ones, once for each head of a group.
    fn mask(&self, count: usize, start: usize) -> Result<Tensor, TchError> {
        let (count, start) = (count as i64, start as i64);
        let ahead = Tensor::f_ones([count, start + count], (Kind::Bool, Device::Cpu))?.f_triu(start + 1)?;
        let mask = Tensor::f_zeros([count, start + count], F32)?.f_masked_fill(&ahead, f64::NEG_INFINITY)?;
        mask.f_repeat([(self.shape.heads / self.shape.kv_heads) as i64, 1])
    }

    /// q [m, heads, head], k and v [m, kv heads, head] of which the first `count` rows are real; gives [count, width].
    fn attend_piece(
        &self,
        cache: &mut (Tensor, Tensor),
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        count: usize,
        start: usize,
        mask: &Tensor,
    ) -> Result<Tensor, TchError> {
        let s = &self.shape;
        let (n, at) = (count as i64, start as i64);
        let (kv, group, head) = (s.kv_heads as i64, (s.heads / s.kv_heads) as i64, s.head as i64);
        let new = |t: &Tensor| t.f_narrow(0, 0, n)?.f_transpose(0, 1);
        cache.0.f_narrow(1, at, n)?.f_copy_(&new(k)?)?;
        cache.1.f_narrow(1, at, n)?.f_copy_(&new(v)?)?;
        let queries = q.f_narrow(0, 0, n)?.f_view([n, kv, group, head])?;
        let queries = queries.f_permute([1, 2, 0, 3])?.f_reshape([1, kv, group * n, head])?;
        let out = attention(&queries, cache, at + n, Some(mask))?;
        out.f_reshape([kv, group, n, head])?.f_permute([2, 0, 1, 3])?.f_reshape([n, kv * group * head])
    }

    /// q [heads, head], k and v [kv heads, head] of one token; gives [1, width].
    fn attend_one(
        &self,
        cache: &mut (Tensor, Tensor),
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        start: usize,
    ) -> Result<Tensor, TchError> {
        let s = &self.shape;
        let at = start as i64;
        let (kv, group, head) = (s.kv_heads as i64, (s.heads / s.kv_heads) as i64, s.head as i64);
        cache.0.f_select(1, at)?.f_copy_(k)?;
        cache.1.f_select(1, at)?.f_copy_(v)?;
        let out = attention(&q.f_reshape([1, kv, group, head])?, cache, at + 1, None)?;
        out.f_reshape([1, kv * group * head])
    }

    /// All layers over some rows. `attend(layer, q, k, v)` gets all rows and gives the real ones.
    fn layers(&self, tokens: &[u32], positions: &[i64], attend: &mut Attend<'_>) -> Result<Tensor, TchError> {
        let s = &self.shape;
        let rows = tokens.len().next_multiple_of(ROWS);
        let padding = (rows - tokens.len()) as i64;
        let mut ids: Vec<i64> = tokens.iter().map(|t| i64::from(*t)).collect();
        ids.resize(rows, 0);
        let mut places = positions.to_vec();
        places.resize(rows, 0);
        let places = Tensor::f_from_slice(&places)?;
        let (cos, sin) = (self.cos.f_index_select(0, &places)?, self.sin.f_index_select(0, &places)?);
        let mut x = self.embedding.f_index_select(0, &Tensor::f_from_slice(&ids)?)?;
        let (m, head, width) = (rows as i64, s.head as i64, s.width as i64);
        let (q, kv, ffn) = (s.heads as i64, s.kv_heads as i64, s.ffn as i64);
        for (i, layer) in self.layers.iter().enumerate() {
            let qkv = layer.qkv.forward(&self.normalise(&x, &layer.attention_norm)?)?;
            let qkv = qkv.f_to_kind(Kind::Float)?.f_view([m, q + 2 * kv, head])?;
            let turned = rotate(&qkv.f_narrow(1, 0, q + kv)?, &cos, &sin, head)?;
            let keys = turned.f_narrow(1, q, kv)?;
            let mut seen = attend(i, &turned.f_narrow(1, 0, q)?, &keys, &qkv.f_narrow(1, q + kv, kv)?)?;
            if padding > 0 {
                seen = Tensor::f_cat(&[&seen, &Tensor::f_zeros([padding, width], F32)?], 0)?;
            }
            x = x.f_add(&layer.output.forward(&seen)?)?;
            let both =
                layer.gate_up.forward(&self.normalise(&x, &layer.ffn_norm)?)?.f_to_kind(Kind::Float)?;
            let gate = both.f_narrow(1, 0, ffn)?.f_contiguous()?.f_silu()?;
            x = x.f_add(&layer.down.forward(&gate.f_mul(&both.f_narrow(1, ffn, ffn)?)?)?)?;
        }
        Ok(x)
    }

    fn normalise(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor, TchError> {
        x.f_rms_norm([self.shape.width as i64], Some(weight), self.shape.norm_eps)
    }

    /// Logits of the first `count` of [`ROWS`] rows.
    fn logits(&self, hidden: &Tensor, count: usize) -> Result<Vec<Vec<f32>>, TchError> {
        let all = self.head.forward(&self.normalise(hidden, &self.norm)?)?;
        (0..count)
            .map(|i| {
                let row = all.f_get(i as i64)?.f_contiguous()?;
                let mut out = vec![0f32; self.shape.vocabulary];
                row.f_copy_data(&mut out, self.shape.vocabulary)?;
                Ok(out)
            })
            .collect()
    }
}

/// `q` [1, kv heads, queries, head] against the first `length` tokens of a cache; the same shape comes back.
///
/// With fewer than [`ROWS`] queries libtorch would split the keys among its threads, and the sums would depend on their
/// number: such a block is filled up.
fn attention(
    q: &Tensor,
    cache: &(Tensor, Tensor),
    length: i64,
    mask: Option<&Tensor>,
) -> Result<Tensor, TchError> {
    let keys = cache.0.f_narrow(1, 0, length)?.f_unsqueeze(0)?;
    let values = cache.1.f_narrow(1, 0, length)?.f_unsqueeze(0)?;
    let queries = q.size()[2];
    let missing = ROWS as i64 - queries;
    if missing <= 0 {
        return Tensor::f_scaled_dot_product_attention(q, &keys, &values, mask, 0.0, false, None, false);
    }
    let q = q.f_constant_pad_nd([0, 0, 0, missing])?;
    let mask = mask.map(|m| m.f_constant_pad_nd([0, 0, 0, missing])).transpose()?;
    let out =
        Tensor::f_scaled_dot_product_attention(&q, &keys, &values, mask.as_ref(), 0.0, false, None, false)?;
    out.f_narrow(2, 0, queries)
}

/// `x` [rows, heads, head]: the first half of each head turned against the second.
fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, head: i64) -> Result<Tensor, TchError> {
    let half = head / 2;
    let swapped = Tensor::f_cat(&[x.f_narrow(2, half, half)?, x.f_narrow(2, 0, half)?], 2)?;
    x.f_mul(cos)?.f_add(&swapped.f_mul(sin)?)
}
