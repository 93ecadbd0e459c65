//! The layers.

use tch::{Kind, TchError, Tensor};

use super::super::cpu::Span;
use super::super::error::EngineError;
use super::super::logits::Top;
use super::super::shape::{Activation, Shape};
use super::super::source::Source;
use super::places::Move;
use super::weights::{Layer, Numerics, Rotary, Weights, head_kind};

/// What a batch of next tokens gives.
pub(super) struct Output {
    /// f32 [batch, vocabulary], valid until the next batch: all have the same memory.
    pub logits: Tensor,
    /// f32 [batch, 2 n + 1]: the n largest logits, their tokens (exact, below 2^24), and the logarithm of the sum of all
    /// exponentials.
    pub top: Option<Tensor>,
}

/// A model on a device, with its cache.
pub(super) struct Net {
    pub shape: Shape,
    numerics: Numerics,
    weights: Weights,
    /// Of each layer [places * context + 1, 2 * key width]: keys and values side by side; the last row is written by
    /// idle rows of a batch.
    cache: Vec<Tensor>,
    /// f32 [places, vocabulary]: the logits of next tokens. Each graph with some of its own would add up.
    logits: Tensor,
    pub places: usize,
    /// Tokens of a place.
    pub context: usize,
    /// 0, 1, ... to the context.
    steps: Tensor,
}

/// Which keys the rows of an attention do not see, as numbers that are added to the scores: of the layers that see
/// everything, and of those with a window. `None`: each sees those up to its own.
type Masks = [Option<Tensor>; 2];

/// Factors of the rotary embedding for the rows of a step.
type Turns = [Option<(Tensor, Tensor)>; 2];

impl Net {
    pub fn load(
        source: &Source,
        numerics: Numerics,
        places: usize,
        context: usize,
    ) -> Result<Self, EngineError> {
        let (shape, options) = (source.shape(), (numerics.kind, numerics.device));
        let rows = (places * context + 1) as i64;
        let cache: Result<Vec<Tensor>, TchError> = (0..shape.layers)
            .map(|_| Tensor::f_zeros([rows, 2 * shape.kv_width() as i64], options))
            .collect();
        Ok(Self {
            shape,
            numerics,
            weights: Weights::load(source, numerics, context)?,
            cache: cache?,
            logits: Tensor::f_zeros(
                [places as i64, shape.vocabulary as i64],
                (Kind::Float, numerics.device),
            )?,
            places,
            context,
            steps: Tensor::f_arange(context as i64, (Kind::Int64, numerics.device))?,
        })
    }

    /// The row of the cache for a position of a place.
    pub fn row(&self, place: usize, position: usize) -> i64 {
        (place * self.context + position) as i64
    }

    pub fn spare_row(&self) -> i64 {
        (self.places * self.context) as i64
    }

    pub fn copy(&self, m: Move) -> Result<(), EngineError> {
        for cache in &self.cache {
            let part = |place| cache.f_narrow(0, self.row(place as usize, 0), m.tokens as i64);
            part(m.to)?.f_copy_(&part(m.from)?)?;
        }
        Ok(())
    }

    /// A token for each of the first `batch` places, whose attention goes over `reach` tokens; `inputs` are tokens,
    /// positions and rows of the cache, one after another.
    pub fn next_tokens(
        &self,
        inputs: &Tensor,
        batch: usize,
        reach: usize,
        cut: bool,
    ) -> Result<Output, EngineError> {
        let part = |i: usize| inputs.f_narrow(0, (i * batch) as i64, batch as i64);
        let (tokens, positions, rows) = (part(0)?, part(1)?, part(2)?);
        let masks = self.masks(&positions, reach)?.map(|m| m.map(|m| m.unsqueeze(1).unsqueeze(1)));
        let x = self.layers(&tokens, &positions, &rows, &|layer, q| {
            let all = self.cache[layer].f_narrow(0, 0, (batch * self.context) as i64)?;
            let s = &self.shape;
            let (b, heads, size) = (batch as i64, s.kv_heads as i64, s.head as i64);
            let all = all.f_view([b, self.context as i64, 2, heads, size])?.f_narrow(1, 0, reach as i64)?;
            let of = |i| all.f_select(2, i)?.f_transpose(1, 2);
            // The queries that share a head of keys stand where a sequence's queries usually do.
            let q = q.f_view([b, heads, (s.heads / s.kv_heads) as i64, size])?;
            let seen = self.attend((&q, &of(0)?, &of(1)?), self.mask(&masks, layer))?;
            seen.f_reshape([b, s.query_width() as i64])
        })?;
        let mut logits = self.logits.f_narrow(0, 0, batch as i64)?;
        logits.f_copy_(&self.head(&x)?)?;
        let top = if cut { Some(pack(&logits)?) } else { None };
        Ok(Output { logits, top })
    }

    /// All rows of pieces, and the logits that they want, one after another; `None` if they want none.
    pub fn pieces(&self, spans: &[&Span<'_>]) -> Result<Option<Tensor>, EngineError> {
        let (mut tokens, mut positions, mut rows, mut wanted) = (vec![], vec![], vec![], vec![]);
        for span in spans {
            let count = span.tokens.len();
            tokens.extend(span.tokens.iter().map(|t| i64::from(*t)));
            positions.extend((span.position..span.position + count).map(|p| p as i64));
            rows.extend((0..count).map(|i| self.row(span.blocks[0] as usize, span.position + i)));
            wanted.extend((tokens.len() - span.logits..tokens.len()).map(|i| i as i64));
        }
        let place = |values: &[i64]| Tensor::f_from_slice(values)?.f_to_device(self.numerics.device);
        let positions = place(&positions)?;
        let masks = self.masks_of_pieces(spans, &positions)?;
        let x = self.layers(&place(&tokens)?, &positions, &place(&rows)?, &|layer, q| {
            let mut first = 0;
            let mut seen = Vec::with_capacity(spans.len());
            for (span, masks) in spans.iter().zip(&masks) {
                let count = span.tokens.len() as i64;
                seen.push(self.attend_piece(layer, &q.f_narrow(0, first, count)?, span, masks)?);
                first += count;
            }
            Tensor::f_cat(&seen, 0)
        })?;
        if wanted.is_empty() {
            return Ok(None);
        }
        Ok(Some(self.head(&x.f_index_select(0, &place(&wanted)?)?)?))
    }

    /// Masks [rows, reach] for rows at these positions.
    fn masks(&self, positions: &Tensor, reach: usize) -> Result<Masks, TchError> {
        let keys = self.steps.f_narrow(0, 0, reach as i64)?.f_unsqueeze(0)?;
        let positions = positions.f_unsqueeze(1)?;
        let later = keys.f_gt_tensor(&positions)?;
        let mask = |hidden: &Tensor| {
            let options = (self.numerics.kind, self.numerics.device);
            let mut mask = Tensor::f_zeros(hidden.size(), options)?;
            mask.f_masked_fill_(hidden, f64::NEG_INFINITY)
        };
        let windowed = match self.shape.window {
            Some(window) => {
                let earlier = keys.f_le_tensor(&positions.f_sub_scalar(window.size as i64)?)?;
                Some(mask(&later.f_logical_or(&earlier)?)?)
            }
            None => None,
        };
        Ok([Some(mask(&later)?), windowed])
    }

    fn masks_of_pieces(&self, spans: &[&Span<'_>], positions: &Tensor) -> Result<Vec<Masks>, TchError> {
        let mut first = 0;
        let group = (self.shape.heads / self.shape.kv_heads) as i64;
        let of = |span: &&Span<'_>| -> Result<Masks, TchError> {
            let count = span.tokens.len();
            let rows = positions.f_narrow(0, first, count as i64)?;
            first += count as i64;
            let window = self.shape.window.map_or(usize::MAX, |w| w.size);
            let from_the_start = span.position == 0;
            if from_the_start && count <= window {
                return Ok([None, None]);
            }
            let mut masks = self.masks(&rows, self.reach(span))?;
            if from_the_start {
                masks[0] = None;
            }
            // The queries that share a head of keys, one group after another.
            let grouped = |m: Tensor| m.f_repeat([group, 1])?.f_unsqueeze(0)?.f_unsqueeze(0);
            let [full, windowed] = masks;
            Ok([full.map(grouped).transpose()?, windowed.map(grouped).transpose()?])
        };
        spans.iter().map(of).collect()
    }

    /// Keys that a piece's attention goes over: aligned, as kernels with a mask want it.
    fn reach(&self, span: &Span<'_>) -> usize {
        (span.position + span.tokens.len()).next_multiple_of(16).min(self.context)
    }

    fn mask<'a>(&self, masks: &'a Masks, layer: usize) -> Option<&'a Tensor> {
        masks[usize::from(self.weights.layers[layer].windowed)].as_ref()
    }

    fn attend_piece(
        &self,
        layer: usize,
        q: &Tensor,
        span: &Span<'_>,
        masks: &Masks,
    ) -> Result<Tensor, TchError> {
        let s = &self.shape;
        let mask = self.mask(masks, layer);
        let count = span.tokens.len() as i64;
        let (heads, size, group) = (s.kv_heads as i64, s.head as i64, (s.heads / s.kv_heads) as i64);
        let reach = if mask.is_some() { self.reach(span) } else { span.tokens.len() };
        let all = self.cache[layer].f_narrow(0, self.row(span.blocks[0] as usize, 0), reach as i64)?;
        let all = all.f_view([1, reach as i64, 2, heads, size])?;
        let of = |i| all.f_select(2, i)?.f_transpose(1, 2);
        let (k, v) = (of(0)?, of(1)?);
        if mask.is_none() {
            let q = q.f_view([1, count, s.heads as i64, size])?.f_transpose(1, 2)?;
            let scale = f64::from(s.attention_scale);
            let none = None::<Tensor>;
            let seen = Tensor::f_scaled_dot_product_attention(&q, &k, &v, none, 0.0, true, scale, group > 1)?;
            return seen.f_transpose(1, 2)?.f_reshape([count, s.query_width() as i64]);
        }
        let q = q.f_view([count, heads, group, size])?.f_permute([1, 2, 0, 3])?;
        let q = q.f_reshape([1, heads, group * count, size])?;
        let seen = self.attend((&q, &k, &v), mask)?.f_reshape([heads, group, count, size])?;
        seen.f_permute([2, 0, 1, 3])?.f_reshape([count, s.query_width() as i64])
    }

    /// Attention of [batch, key heads, queries, head], with a mask.
    fn attend(
        &self,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        mask: Option<&Tensor>,
    ) -> Result<Tensor, TchError> {
        let scale = f64::from(self.shape.attention_scale);
        Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, false, scale, false)
    }

    /// The residual stream after all layers; `attend` gives what a layer's queries see once keys and values are written.
    fn layers(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        rows: &Tensor,
        attend: &dyn Fn(usize, &Tensor) -> Result<Tensor, TchError>,
    ) -> Result<Tensor, TchError> {
        let s = &self.shape;
        let mut x = self.weights.embedding.f_index_select(0, tokens)?;
        if s.embedding_scale != 1.0 {
            x = x.f_mul_scalar(f64::from(s.embedding_scale))?;
        }
        let turn = |rotary: &Option<Rotary>| -> Result<_, TchError> {
            let Some(r) = rotary else { return Ok(None) };
            Ok(Some((r.cos.f_index_select(0, positions)?, r.sin.f_index_select(0, positions)?)))
        };
        let turns: Turns = [turn(&self.weights.rotary[0])?, turn(&self.weights.rotary[1])?];
        let (q_width, kv_width) = (s.query_width() as i64, s.kv_width() as i64);
        for (i, layer) in self.weights.layers.iter().enumerate() {
            let mut qkv = self.normed(&x)?.f_linear(&layer.qkv, None::<Tensor>)?;
            if let Some(bias) = &layer.qkv_bias {
                let _ = qkv.f_add_(bias)?;
            }
            self.turn(layer, &qkv, &turns)?;
            let kv = qkv.f_narrow(1, q_width, 2 * kv_width)?;
            let _ = self.cache[i].shallow_clone().f_index_copy_(0, rows, &kv)?;
            let seen = attend(i, &qkv.f_narrow(1, 0, q_width)?)?;
            self.add(&mut x, &seen, &layer.output, layer.post_attention_norm.as_ref())?;
            let gated = self.gated(&self.normed(&x)?.f_linear(&layer.gate_up, None::<Tensor>)?)?;
            self.add(&mut x, &gated, &layer.down, layer.post_ffn_norm.as_ref())?;
        }
        Ok(x)
    }

    /// Without factors: those are in the matrix behind it.
    fn normed(&self, x: &Tensor) -> Result<Tensor, TchError> {
        x.f_rms_norm([self.shape.width as i64], None::<Tensor>, self.shape.norm_eps)
    }

    /// Queries and keys, in place: normalised, and turned in f32.
    fn turn(&self, layer: &Layer, qkv: &Tensor, turns: &Turns) -> Result<(), TchError> {
        let s = &self.shape;
        let Some((cos, sin)) = &turns[usize::from(layer.windowed)] else { return Ok(()) };
        let (heads, size) = ((s.heads + s.kv_heads) as i64, s.head as i64);
        let mut place = qkv.f_narrow(1, 0, heads * size)?.f_view([-1, heads, size])?;
        let plain = match &layer.qk_norm {
            Some(factors) => {
                let x = place.f_to_kind(Kind::Float)?;
                x.f_rms_norm([size], None::<Tensor>, s.norm_eps)?.f_mul(factors)?
            }
            None => place.shallow_clone(),
        };
        let half = |x: &Tensor, i: i64| x.f_narrow(2, i * size / 2, size / 2);
        let turned = plain.f_mul(cos)?;
        for (i, other) in [(0, 1), (1, 0)] {
            let _ = half(&turned, i)?.f_addcmul_(&half(&plain, other)?, &half(sin, i)?)?;
        }
        place.f_copy_(&turned)
    }

    fn gated(&self, both: &Tensor) -> Result<Tensor, TchError> {
        let ffn = self.shape.ffn as i64;
        let gate = both.f_narrow(1, 0, ffn)?;
        let gate = match self.shape.activation {
            Activation::Silu => gate.f_silu()?,
            Activation::GeluTanh => gate.f_gelu("tanh")?,
        };
        gate.f_mul(&both.f_narrow(1, ffn, ffn)?)
    }

    /// `x += y w`, normalised before it is added if the layer does so.
    fn add(&self, x: &mut Tensor, y: &Tensor, w: &Tensor, norm: Option<&Tensor>) -> Result<(), TchError> {
        let _ = match norm {
            None => x.f_addmm_(y, w)?,
            Some(factors) => {
                let more = y.f_matmul(w)?.f_to_kind(Kind::Float)?;
                let width = self.shape.width as i64;
                x.f_add_(&more.f_rms_norm([width], Some(factors), self.shape.norm_eps)?)?
            }
        };
        Ok(())
    }

    /// f32 logits of rows of the residual stream.
    fn head(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let (n, w) = (self.numerics, &self.weights);
        let x = x.f_to_kind(Kind::Float)?;
        let x = x.f_rms_norm([self.shape.width as i64], Some(&w.norm), self.shape.norm_eps)?;
        let x = x.f_to_kind(n.kind)?;
        match head_kind(n) {
            Kind::Float => x.f_to_kind(Kind::Float)?.f_matmul(&w.head),
            _ => x.f_mm_dtype(&w.head, Kind::Float),
        }
    }
}

/// See [`Output::top`].
fn pack(logits: &Tensor) -> Result<Tensor, TchError> {
    let (_, vocabulary) = logits.size2()?;
    let (values, tokens) = logits.f_topk(vocabulary.min(Top::WIDTH as i64), 1, true, false)?;
    let sum = logits.f_logsumexp([1i64].as_slice(), true)?;
    Tensor::f_cat(&[values, tokens.f_to_kind(Kind::Float)?, sum], 1)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn batches_of_all_sizes_have_the_same_memory_for_their_logits() {
        let _guard = tch::no_grad_guard();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama.gguf");
        let numerics = Numerics { device: tch::Device::Cpu, kind: Kind::Float };
        let net = Net::load(&Source::open(&path).unwrap(), numerics, 4, 32).unwrap();
        let first_row = |batch: usize, token: i64| {
            let mut inputs = vec![token; batch];
            inputs.extend(vec![0; batch]);
            inputs.extend((0..batch).map(|place| net.row(place, 0)));
            let output = net.next_tokens(&Tensor::from_slice(&inputs), batch, 16, false).unwrap();
            assert_eq!(output.logits.size(), [batch as i64, net.shape.vocabulary as i64]);
            let row = Vec::<f32>::try_from(output.logits.get(0)).unwrap();
            (output.logits.data_ptr(), row)
        };
        let (one, two, four) = (first_row(1, 5), first_row(2, 6), first_row(4, 5));
        assert!(one.0 == two.0 && two.0 == four.0);
        let apart = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart(&one.1, &four.1) < 1e-4 && apart(&one.1, &two.1) > 1e-3, "each batch's own");
    }
}
