//! The forward pass of a decoder; what distinguishes the families is in its [`Shape`].
//!
//! Residuals, norms, rotary embedding, attention and logits are f32 in both classes; the class decides what the
//! matrices of the layers are. Attention runs for each sequence alone, so that its shape depends on that sequence only.

use std::ops::Range;
use std::path::Path;

use tch::{Device, Kind, TchError, Tensor};

use super::Class;
use super::error::EngineError;
use super::shape::{Activation, Shape};
use super::source::{Name, Part, Source};
use super::weights::{Linear, ROWS, table, vector};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

#[derive(Debug)]
struct Layer {
    attention_norm: Tensor,
    qkv: Linear,
    /// Of queries, keys and values, one after another.
    qkv_bias: Option<Tensor>,
    /// Of a head of queries and of keys.
    qk_norm: Option<(Tensor, Tensor)>,
    output: Linear,
    post_attention_norm: Option<Tensor>,
    ffn_norm: Tensor,
    gate_up: Linear,
    down: Linear,
    post_ffn_norm: Option<Tensor>,
    /// How many tokens back it sees, the present one included; `None`: all.
    reach: Option<usize>,
}

/// Cosines and sines of the rotary embedding, [positions, 1, head].
#[derive(Debug)]
struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

/// A loaded model.
#[derive(Debug)]
pub(super) struct Model {
    shape: Shape,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Linear,
    /// For layers that see everything.
    full: Rotary,
    /// For layers with a window.
    windowed: Option<Rotary>,
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

fn load_layer(source: &Source, i: usize, class: Class) -> Result<Layer, EngineError> {
    let s = source.shape();
    let (q, kv) = (s.query_width(), s.kv_width());
    let raw = |part, rows, cols| source.matrix(Name::Layer(i, part), rows, cols);
    let vector = |part, size| vector(source, Name::Layer(i, part), size);
    let maybe = |there: bool, part| there.then(|| vector(part, s.width)).transpose();
    let qkv_bias = match s.qkv_bias {
        true => Some(Tensor::f_cat(
            &[vector(Part::QBias, q)?, vector(Part::KBias, kv)?, vector(Part::VBias, kv)?],
            0,
        )?),
        false => None,
    };
    let qk_norm = match s.qk_norm {
        true => Some((vector(Part::QNorm, s.head)?, vector(Part::KNorm, s.head)?)),
        false => None,
    };
    Ok(Layer {
        attention_norm: vector(Part::AttnNorm, s.width)?,
        qkv: Linear::new(
            &[raw(Part::Q, q, s.width)?, raw(Part::K, kv, s.width)?, raw(Part::V, kv, s.width)?],
            class,
        )?,
        qkv_bias,
        qk_norm,
        output: Linear::new(&[raw(Part::Output, s.width, q)?], class)?,
        post_attention_norm: maybe(s.post_norms, Part::PostAttnNorm)?,
        ffn_norm: vector(Part::FfnNorm, s.width)?,
        gate_up: Linear::new(&[raw(Part::Gate, s.ffn, s.width)?, raw(Part::Up, s.ffn, s.width)?], class)?,
        down: Linear::new(&[raw(Part::Down, s.width, s.ffn)?], class)?,
        post_ffn_norm: maybe(s.post_norms, Part::PostFfnNorm)?,
        reach: s.reach(i),
    })
}

/// The tables for `speeds`, computed in f64.
fn rotary(speeds: &[f64], positions: usize) -> Result<Rotary, TchError> {
    let half = speeds.len();
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    for position in 0..positions {
        for i in 0..2 * half {
            let angle = position as f64 * speeds[i % half];
            cos.push(libm::cos(angle) as f32);
            // The first half is turned by -sin, the second by +sin.
            let sign = if i < half { -1.0 } else { 1.0 };
            sin.push((sign * libm::sin(angle)) as f32);
        }
    }
    let table = |v: &[f32]| Tensor::f_from_slice(v)?.f_view([positions as i64, 1, 2 * half as i64]);
    Ok(Rotary { cos: table(&cos)?, sin: table(&sin)? })
}

impl Rotary {
    fn at(&self, places: &Tensor) -> Result<Self, TchError> {
        Ok(Self { cos: self.cos.f_index_select(0, places)?, sin: self.sin.f_index_select(0, places)? })
    }

    /// `x` [rows, heads, head]: the first half of each head turned against the second.
    fn turn(&self, x: &Tensor, head: i64) -> Result<Tensor, TchError> {
        let half = head / 2;
        let swapped = Tensor::f_cat(&[x.f_narrow(2, half, half)?, x.f_narrow(2, 0, half)?], 2)?;
        x.f_mul(&self.cos)?.f_add(&swapped.f_mul(&self.sin)?)
    }
}

/// Which tokens of a cache a piece of a prompt sees: those from `from` on, as far as the additive mask says.
struct Sight {
    from: usize,
    mask: Tensor,
}

impl Model {
    /// Reads the weights. Positions from `max_context` on have no rotary embedding.
    pub fn load(source: &Source, class: Class, max_context: usize) -> Result<Self, EngineError> {
        let shape = source.shape();
        let embedding = table(source, Name::Embedding, shape.vocabulary, shape.width)?;
        let head = match shape.tied {
            true => embedding.shallow_clone(),
            false => table(source, Name::Head, shape.vocabulary, shape.width)?,
        };
        let layers: Result<Vec<Layer>, EngineError> =
            (0..shape.layers).map(|i| load_layer(source, i, class)).collect();
        let speeds = source.speeds()?;
        let windowed = shape.window.map(|_| rotary(&speeds.windowed, max_context)).transpose()?;
        let full = rotary(&speeds.full, max_context)?;
        let norm = vector(source, Name::Norm, shape.width)?;
        Ok(Self { shape, embedding, layers: layers?, norm, head: Linear::F32(head), full, windowed })
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
        let full = self.sight(count, start, None)?;
        let window = self.shape.window.map(|w| self.sight(count, start, Some(w.size))).transpose()?;
        let hidden = self.layers(tokens, &positions, &mut |layer, q, k, v| {
            let narrow = window.as_ref().filter(|_| self.layers[layer].reach.is_some());
            self.attend_piece(&mut cache.layers[layer], (q, k, v), (count, start), narrow.unwrap_or(&full))
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
                let from = self.layers[layer].reach.map_or(0, |reach| (at + 1).saturating_sub(reach));
                rows.push(self.attend_one(
                    &mut step.cache.layers[layer],
                    (&row(q)?, &row(k)?, &row(v)?),
                    from..at + 1,
                )?);
            }
            Tensor::f_cat(&rows, 0)
        })?;
        steps.iter_mut().for_each(|s| s.cache.length += 1);
        self.logits(&hidden, count)
    }

    /// What the queries of `count` new tokens after `start` old ones see, once for each head of a group.
    fn sight(&self, count: usize, start: usize, reach: Option<usize>) -> Result<Sight, TchError> {
        let from = reach.map_or(0, |reach| (start + 1).saturating_sub(reach));
        let (n, old) = (count as i64, (start - from) as i64);
        let all = Tensor::f_ones([n, old + n], (Kind::Bool, Device::Cpu))?;
        let mut hidden = all.f_triu(old + 1)?;
        if let Some(reach) = reach {
            hidden = hidden.f_logical_or(&all.f_tril(old - reach as i64)?)?;
        }
        let mask = Tensor::f_zeros([n, old + n], F32)?.f_masked_fill(&hidden, f64::NEG_INFINITY)?;
        let mask = mask.f_repeat([(self.shape.heads / self.shape.kv_heads) as i64, 1])?;
        Ok(Sight { from, mask })
    }

    /// q [m, heads, head], k and v [m, kv heads, head] of which the first `count` rows are real, after `start` old
    /// tokens; gives [count, heads * head].
    fn attend_piece(
        &self,
        cache: &mut (Tensor, Tensor),
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        (count, start): (usize, usize),
        sight: &Sight,
    ) -> Result<Tensor, TchError> {
        let s = &self.shape;
        let (n, at) = (count as i64, start as i64);
        let (kv, group, head) = (s.kv_heads as i64, (s.heads / s.kv_heads) as i64, s.head as i64);
        let new = |t: &Tensor| t.f_narrow(0, 0, n)?.f_transpose(0, 1);
        cache.0.f_narrow(1, at, n)?.f_copy_(&new(k)?)?;
        cache.1.f_narrow(1, at, n)?.f_copy_(&new(v)?)?;
        let queries = q.f_narrow(0, 0, n)?.f_view([n, kv, group, head])?;
        let queries = queries.f_permute([1, 2, 0, 3])?.f_reshape([1, kv, group * n, head])?;
        let out = self.attention(&queries, cache, sight.from..start + count, Some(&sight.mask))?;
        out.f_reshape([kv, group, n, head])?.f_permute([2, 0, 1, 3])?.f_reshape([n, kv * group * head])
    }

    /// q [heads, head], k and v [kv heads, head] of the last token of those that it sees; gives [1, heads * head].
    fn attend_one(
        &self,
        cache: &mut (Tensor, Tensor),
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        seen: Range<usize>,
    ) -> Result<Tensor, TchError> {
        let s = &self.shape;
        let at = seen.end as i64 - 1;
        let (kv, group, head) = (s.kv_heads as i64, (s.heads / s.kv_heads) as i64, s.head as i64);
        cache.0.f_select(1, at)?.f_copy_(k)?;
        cache.1.f_select(1, at)?.f_copy_(v)?;
        let out = self.attention(&q.f_reshape([1, kv, group, head])?, cache, seen, None)?;
        out.f_reshape([1, kv * group * head])
    }

    /// `q` [1, kv heads, queries, head] against some tokens of a cache; the same shape comes back.
    ///
    /// libtorch gives a thread at least one head and up to 32 queries of it. With fewer than [`ROWS`] queries, and with
    /// a single such task, it would instead split sums among its threads, and they would depend on their number: the
    /// queries are filled up, and those of a single head are shown as two heads with the same keys.
    fn attention(
        &self,
        q: &Tensor,
        cache: &(Tensor, Tensor),
        seen: Range<usize>,
        mask: Option<&Tensor>,
    ) -> Result<Tensor, TchError> {
        let scale = f64::from(self.shape.attention_scale);
        let (kv, queries, head) = (self.shape.kv_heads as i64, q.size()[2], self.shape.head as i64);
        let shown = kv.max(2);
        let length = seen.len() as i64;
        let part = |t: &Tensor| {
            let part = t.f_narrow(1, seen.start as i64, length)?.f_unsqueeze(0)?;
            part.f_expand([1, shown, length, head], true)
        };
        let (keys, values) = (part(&cache.0)?, part(&cache.1)?);
        let step = ROWS as i64 * (shown / kv);
        let filled = match shown == kv {
            true => queries.max(step),
            false => (queries + step - 1) / step * step,
        };
        let fill = |t: &Tensor| match filled - queries {
            0 => Ok(t.shallow_clone()),
            missing => t.f_constant_pad_nd([0, 0, 0, missing]),
        };
        let each = filled * kv / shown;
        let mask = mask.map(|m| fill(m)?.f_reshape([1, shown / kv, each, length])).transpose()?;
        let q = fill(q)?.f_reshape([1, shown, each, head])?;
        Tensor::f_scaled_dot_product_attention(&q, &keys, &values, mask.as_ref(), 0.0, false, scale, false)?
            .f_reshape([1, kv, filled, head])?
            .f_narrow(2, 0, queries)
    }

    /// All layers over some rows. `attend(layer, q, k, v)` gets all rows and gives the real ones.
    fn layers(&self, tokens: &[u32], positions: &[i64], attend: &mut Attend<'_>) -> Result<Tensor, TchError> {
        let rows = tokens.len().next_multiple_of(ROWS);
        let mut ids: Vec<i64> = tokens.iter().map(|t| i64::from(*t)).collect();
        ids.resize(rows, 0);
        let mut places = positions.to_vec();
        places.resize(rows, 0);
        let places = Tensor::f_from_slice(&places)?;
        let full = self.full.at(&places)?;
        let windowed = self.windowed.as_ref().map(|w| w.at(&places)).transpose()?;
        let mut x = self.embedding.f_index_select(0, &Tensor::f_from_slice(&ids)?)?;
        if self.shape.embedding_scale != 1.0 {
            x = x.f_mul_scalar(f64::from(self.shape.embedding_scale))?;
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let rotary = windowed.as_ref().filter(|_| layer.reach.is_some()).unwrap_or(&full);
            let (q, k, v) = self.queries_keys_values(layer, &x, rotary)?;
            let mut seen = attend(i, &q, &k, &v)?;
            let padding = rows as i64 - seen.size()[0];
            if padding > 0 {
                seen = seen.f_constant_pad_nd([0, 0, 0, padding])?;
            }
            x = self.add(&x, layer.output.forward(&seen)?, layer.post_attention_norm.as_ref())?;
            x = self.add(&x, self.feed_forward(layer, &x)?, layer.post_ffn_norm.as_ref())?;
        }
        Ok(x)
    }

    /// Queries [m, heads, head] and keys [m, kv heads, head], turned, and values.
    fn queries_keys_values(
        &self,
        layer: &Layer,
        x: &Tensor,
        rotary: &Rotary,
    ) -> Result<(Tensor, Tensor, Tensor), TchError> {
        let s = &self.shape;
        let (q, kv, head) = (s.heads as i64, s.kv_heads as i64, s.head as i64);
        let mut all =
            layer.qkv.forward(&self.normalise(x, &layer.attention_norm)?)?.f_to_kind(Kind::Float)?;
        if let Some(bias) = &layer.qkv_bias {
            all = all.f_add(bias)?;
        }
        let all = all.f_view([-1, q + 2 * kv, head])?;
        let turned = match &layer.qk_norm {
            None => rotary.turn(&all.f_narrow(1, 0, q + kv)?, head)?,
            Some((of_queries, of_keys)) => {
                let norm = |at, count, weight| {
                    all.f_narrow(1, at, count)?.f_contiguous()?.f_rms_norm([head], Some(weight), s.norm_eps)
                };
                rotary.turn(&Tensor::f_cat(&[norm(0, q, of_queries)?, norm(q, kv, of_keys)?], 1)?, head)?
            }
        };
        Ok((turned.f_narrow(1, 0, q)?, turned.f_narrow(1, q, kv)?, all.f_narrow(1, q + kv, kv)?))
    }

    fn feed_forward(&self, layer: &Layer, x: &Tensor) -> Result<Tensor, TchError> {
        let ffn = self.shape.ffn as i64;
        let both = layer.gate_up.forward(&self.normalise(x, &layer.ffn_norm)?)?.f_to_kind(Kind::Float)?;
        let gate = activate(&both.f_narrow(1, 0, ffn)?.f_contiguous()?, self.shape.activation)?;
        layer.down.forward(&gate.f_mul(&both.f_narrow(1, ffn, ffn)?)?)
    }

    fn add(&self, x: &Tensor, more: Tensor, norm: Option<&Tensor>) -> Result<Tensor, TchError> {
        match norm {
            None => x.f_add(&more),
            Some(norm) => x.f_add(&self.normalise(&more.f_to_kind(Kind::Float)?, norm)?),
        }
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

/// Numbers that go through an activation at once. From 32768 on libtorch would cut them among its threads anywhere, and at
/// a cut a few are computed by another formula.
const AT_ONCE: i64 = 16_384;

fn activate(gate: &Tensor, activation: Activation) -> Result<Tensor, TchError> {
    let one = |part: &Tensor| match activation {
        Activation::Silu => part.f_silu(),
        Activation::GeluTanh => part.f_gelu("tanh"),
    };
    let flat = gate.f_view([-1])?;
    if flat.size()[0] <= AT_ONCE {
        return one(gate);
    }
    let parts: Result<Vec<Tensor>, TchError> = flat.f_split(AT_ONCE, 0)?.iter().map(one).collect();
    Tensor::f_cat(&parts?, 0)?.f_view_as(gate)
}

/// Logits after each token from the one at `prefilled - 1` on: the first `prefilled` tokens are computed at once, the
/// others one by one. For comparing with other implementations; the engine itself goes through `Engine`.
///
/// # Errors
/// The model cannot be loaded, or `prefilled` is not 1 to the number of tokens.
#[doc(hidden)]
pub fn reference_logits(
    path: &Path,
    class: Class,
    tokens: &[u32],
    prefilled: usize,
) -> Result<Vec<Vec<f32>>, EngineError> {
    super::in_range("prefilled", "1 to the number of tokens", prefilled, tokens.len())?;
    let _guard = tch::no_grad_guard();
    let model = Model::load(&Source::open(path)?, class, tokens.len())?;
    let mut cache = model.cache(tokens.len())?;
    let mut all: Vec<Vec<f32>> = model.prefill(&tokens[..prefilled], &mut cache, true)?.into_iter().collect();
    for token in &tokens[prefilled..] {
        all.extend(model.decode(&mut [Step { token: *token, cache: &mut cache }])?);
    }
    Ok(all)
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
