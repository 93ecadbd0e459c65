//! The forward pass on a CPU, of any mix of rows: pieces of prompts, next tokens, answers to be scored.
//!
//! All sequences' rows go through each matrix together, so that its weights are read once a step; attention runs for each
//! sequence with its own length. `infera_kernels` promises that a row's numbers do not depend on the others.

use std::path::Path;

use infera_kernels::{Aligned, Cpu, Gate, Isa, KvElement, KvPool, Matrix, Precision, Quants, Queries};
use infera_prompt::gguf::GgmlType;

use super::error::EngineError;
use super::logits::Logits;
use super::quant::{GROUP, Raw, is_four_bit};
use super::shape::{Activation, Shape};
use super::source::{Name, Part, Source};
use super::{Class, MAX_SCORERS, MAX_SLOTS};

/// Rows of a step at most.
pub(super) const STEP_ROWS: usize = 256;
/// Rows of a step whose logits are computed at most: one for each sequence at least.
pub(super) const LOGIT_ROWS: usize = MAX_SLOTS + MAX_SCORERS;

/// Matrices that share their inputs, their outputs side by side.
#[derive(Debug)]
struct Linear {
    /// Where the outputs of each begin.
    parts: Vec<(usize, Matrix)>,
    /// Outputs in all, with the filling of the last tile.
    width: usize,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Vec<f32>,
    qkv: Linear,
    /// Of queries, keys and values, one after another; empty if there is none.
    qkv_bias: Vec<f32>,
    /// Of a head of queries and of keys.
    qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    output: Matrix,
    post_attention_norm: Option<Vec<f32>>,
    ffn_norm: Vec<f32>,
    gate_up: Linear,
    down: Matrix,
    post_ffn_norm: Option<Vec<f32>>,
    /// How many tokens back it sees, the present one included; `None`: all.
    reach: Option<usize>,
}

/// Cosines and sines, `[positions][head / 2]`.
#[derive(Debug)]
struct Rotary {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span<'a> {
    pub tokens: &'a [u32],
    /// Position of the first.
    pub position: usize,
    pub blocks: &'a [u32],
    /// How many of the last tokens' logits are wanted.
    pub logits: usize,
    /// Whether all numbers of these rows are, or only those that a plain draw looks at.
    pub whole: bool,
}

/// Memory of a step.
#[derive(Debug, Default)]
struct Buffers {
    x: Aligned<f32>,
    normed: Aligned<f32>,
    qkv: Aligned<f32>,
    seen: Aligned<f32>,
    both: Aligned<f32>,
    gated: Aligned<f32>,
    /// What a block gives before it is normalised and added.
    more: Aligned<f32>,
    logits: Aligned<f32>,
}

/// A loaded model with its cache.
#[derive(Debug)]
pub(super) struct Model {
    shape: Shape,
    precision: Precision,
    cpu: Cpu,
    kv: KvPool,
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    /// Where it differs from the embedding.
    head: Option<Matrix>,
    /// Of layers that see everything.
    full: Rotary,
    /// Of layers with a window.
    windowed: Rotary,
    buffers: Buffers,
}

fn failed(e: infera_kernels::MatrixError) -> EngineError {
    EngineError::Unsupported(e.to_string())
}

/// A matrix as the file stores it, without a loss.
fn pack(raw: &Raw) -> Result<Matrix, EngineError> {
    let (rows, cols) = (raw.rows, raw.cols);
    let bits =
        || -> Vec<u16> { raw.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect() };
    if let Some(g) = raw.groups() {
        let quants = Quants::Four { values: &g.nibbles, scales: &g.scales, mins: &g.mins };
        return Matrix::pack(rows, cols, quants).map_err(failed);
    }
    if let Some(b) = raw.bytes8() {
        let quants = Quants::Eight { values: &b.values, scales: &b.scales, mins: &b.mins, group: b.group };
        return Matrix::pack(rows, cols, quants).map_err(failed);
    }
    match raw.kind {
        GgmlType::F16 => Matrix::pack(rows, cols, Quants::Half(&bits())),
        GgmlType::BF16 => Matrix::pack(rows, cols, Quants::Bf16(&bits())),
        _ => Matrix::pack(rows, cols, Quants::Full(&raw.dequantise())),
    }
    .map_err(failed)
}

/// Bytes of a packed matrix at most: its scales take half or full precision, as they need.
pub(super) fn packed_bytes(kind: GgmlType, rows: usize, cols: usize) -> u64 {
    let count = (rows.next_multiple_of(16) * cols) as u64;
    match kind {
        _ if is_four_bit(kind) => {
            count / 2 + count / GROUP as u64 * if kind == GgmlType::Q4K { 8 } else { 4 }
        }
        GgmlType::Q8_0 | GgmlType::Q5_0 | GgmlType::Q5_1 => count + count / 8,
        GgmlType::Q5K => count + count / 4,
        GgmlType::Q6K => count + count / 2,
        GgmlType::F16 | GgmlType::BF16 => 2 * count,
        _ => 4 * count,
    }
}

/// Bytes that one step needs beside weights and cache.
pub(super) fn step_bytes(s: &Shape) -> u64 {
    let row = 3 * s.width.next_multiple_of(16) + 2 * s.query_width() + 2 * s.kv_width() + 3 * s.ffn + 64;
    4 * (STEP_ROWS * row + LOGIT_ROWS * s.vocabulary.next_multiple_of(16)) as u64
}

impl Linear {
    fn new(parts: Vec<Raw>) -> Result<Self, EngineError> {
        let same = parts.iter().all(|p| p.kind == parts[0].kind);
        let whole = parts.iter().all(|p| p.rows.is_multiple_of(16));
        let cols = parts[0].cols;
        let rows: usize = parts.iter().map(|p| p.rows).sum();
        let parts = if same {
            let kind = parts[0].kind;
            let bytes = parts.into_iter().flat_map(|p| p.bytes).collect();
            vec![(0, pack(&Raw { rows, cols, kind, bytes })?)]
        } else if whole {
            let mut at = 0;
            let mut place = |p: &Raw| {
                at += p.rows;
                at - p.rows
            };
            parts.iter().map(|p| Ok((place(p), pack(p)?))).collect::<Result<_, EngineError>>()?
        } else {
            let values: Vec<f32> = parts.iter().flat_map(Raw::dequantise).collect();
            let matrix = Matrix::pack(rows, cols, Quants::Full(&values));
            vec![(0, matrix.map_err(|e| EngineError::Unsupported(e.to_string()))?)]
        };
        Ok(Self { width: rows.next_multiple_of(16), parts })
    }

    fn forward(&self, cpu: &mut Cpu, x: &[f32], y: &mut [f32], precision: Precision) {
        for (offset, matrix) in &self.parts {
            cpu.linear_into(matrix, x, (y, self.width, *offset), false, precision);
        }
    }
}

fn vector(source: &Source, name: Name, size: usize) -> Result<Vec<f32>, EngineError> {
    Ok(source.matrix(name, 1, size)?.dequantise())
}

fn load_layer(source: &Source, i: usize) -> Result<Layer, EngineError> {
    let s = source.shape();
    let (q, kv) = (s.query_width(), s.kv_width());
    let raw = |part, rows, cols| source.matrix(Name::Layer(i, part), rows, cols);
    let vector = |part, size| vector(source, Name::Layer(i, part), size);
    let maybe = |there: bool, part, size| there.then(|| vector(part, size)).transpose();
    let mut qkv_bias = Vec::new();
    if s.qkv_bias {
        qkv_bias = [vector(Part::QBias, q)?, vector(Part::KBias, kv)?, vector(Part::VBias, kv)?].concat();
    }
    Ok(Layer {
        attention_norm: vector(Part::AttnNorm, s.width)?,
        qkv: Linear::new(vec![
            raw(Part::Q, q, s.width)?,
            raw(Part::K, kv, s.width)?,
            raw(Part::V, kv, s.width)?,
        ])?,
        qkv_bias,
        qk_norm: maybe(s.qk_norm, Part::QNorm, s.head)?.zip(maybe(s.qk_norm, Part::KNorm, s.head)?),
        output: pack(&raw(Part::Output, s.width, q)?)?,
        post_attention_norm: maybe(s.post_norms, Part::PostAttnNorm, s.width)?,
        ffn_norm: vector(Part::FfnNorm, s.width)?,
        gate_up: Linear::new(vec![raw(Part::Gate, s.ffn, s.width)?, raw(Part::Up, s.ffn, s.width)?])?,
        down: pack(&raw(Part::Down, s.width, s.ffn)?)?,
        post_ffn_norm: maybe(s.post_norms, Part::PostFfnNorm, s.width)?,
        reach: s.reach(i),
    })
}

/// The tables for `speeds`, computed in f64.
fn rotary(speeds: &[f64], positions: usize) -> Rotary {
    let angles = || (0..positions).flat_map(|p| speeds.iter().map(move |s| p as f64 * s));
    Rotary {
        cos: angles().map(|a| libm::cos(a) as f32).collect(),
        sin: angles().map(|a| libm::sin(a) as f32).collect(),
    }
}

impl Rotary {
    fn at(&self, position: usize, half: usize) -> (&[f32], &[f32]) {
        let range = position * half..(position + 1) * half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// How the cache of a class stores keys and values.
pub(super) fn kv_element(class: Class) -> KvElement {
    match class {
        Class::Fast => KvElement::F16,
        _ => KvElement::F32,
    }
}

/// `out = norm(x)` for each row; rows of `x` begin every `stride` numbers.
fn normalise(cpu: &mut Cpu, (x, stride): (&[f32], usize), weight: &[f32], eps: f64, out: &mut [f32]) {
    let (isa, width) = (cpu.isa(), weight.len());
    cpu.each_row(out, width, &|row, out| {
        infera_kernels::norm(isa, &x[row * stride..][..width], weight, eps as f32, out);
    });
}

/// `x += w y`, normalised before it is added if the layer does so; `more` and `normed` are memory for that.
fn add(
    cpu: &mut Cpu,
    (w, precision): (&Matrix, Precision),
    y: &[f32],
    x: &mut [f32],
    norm: Option<(&[f32], f64)>,
    (more, normed): (&mut Aligned<f32>, &mut [f32]),
) {
    let Some((weight, eps)) = norm else { return cpu.linear(w, y, x, true, precision) };
    let stride = w.padded_rows();
    more.grow(x.len());
    let more = &mut more[..x.len()];
    cpu.linear(w, y, more, false, precision);
    normalise(cpu, (more, stride), weight, eps, normed);
    let (normed, width) = (&*normed, weight.len());
    cpu.each_row(x, stride, &|row, x| {
        x.iter_mut().zip(&normed[row * width..][..width]).for_each(|(x, y)| *x += y);
    });
}

/// One row of queries and keys, as attention takes them: with bias, normalised, turned, queries scaled.
fn prepare(isa: Isa, s: &Shape, layer: &Layer, (cos, sin): (&[f32], &[f32]), row: &mut [f32]) {
    row.iter_mut().zip(&layer.qkv_bias).for_each(|(x, b)| *x += b);
    let heads = &mut row[..s.query_width() + s.kv_width()];
    if let Some(norms) = &layer.qk_norm {
        normalise_heads(isa, s, norms, heads);
    }
    for (h, x) in heads.chunks_exact_mut(s.head).enumerate() {
        infera_kernels::rotate(isa, x, cos, sin, if h < s.heads { s.attention_scale } else { 1.0 });
    }
}

/// Each head of a row of queries and keys.
fn normalise_heads(isa: Isa, s: &Shape, (of_queries, of_keys): &(Vec<f32>, Vec<f32>), row: &mut [f32]) {
    let mut plain = [0f32; 1 << 10];
    let plain = &mut plain[..s.head];
    for (h, x) in row.chunks_exact_mut(s.head).enumerate() {
        plain.copy_from_slice(x);
        let weight = if h < s.heads { of_queries } else { of_keys };
        infera_kernels::norm(isa, plain, weight, s.norm_eps as f32, x);
    }
}

impl Model {
    /// Reads the weights. Positions from `max_context` on have no rotary embedding.
    pub fn load(
        source: &Source,
        class: Class,
        threads: usize,
        max_context: usize,
        blocks: usize,
    ) -> Result<Self, EngineError> {
        let s = source.shape();
        let matrix = |name| pack(&source.matrix(name, s.vocabulary, s.width)?);
        let layers: Result<Vec<Layer>, EngineError> = (0..s.layers).map(|i| load_layer(source, i)).collect();
        let speeds = source.speeds()?;
        Ok(Self {
            shape: s,
            precision: match class {
                Class::Fast => Precision::Integer,
                _ => Precision::F32,
            },
            cpu: Cpu::new(threads)?,
            kv: KvPool::new(kv_element(class), s.layers, s.kv_heads, s.head, blocks),
            embedding: matrix(Name::Embedding)?,
            layers: layers?,
            norm: vector(source, Name::Norm, s.width)?,
            head: if s.tied { None } else { Some(matrix(Name::Head)?) },
            full: rotary(&speeds.full, max_context),
            windowed: rotary(&speeds.windowed, max_context),
            buffers: Buffers::default(),
        })
    }

    /// Bytes of all matrices.
    #[cfg(test)]
    pub fn packed(&self) -> usize {
        let parts = |l: &Linear| l.parts.iter().map(|(_, m)| m.bytes()).sum::<usize>();
        let layers =
            self.layers.iter().map(|l| parts(&l.qkv) + l.output.bytes() + parts(&l.gate_up) + l.down.bytes());
        layers.sum::<usize>() + self.embedding.bytes() + self.head.as_ref().map_or(0, Matrix::bytes)
    }

    /// One step: writes keys and values of all tokens to the cache and computes the wanted logits.
    ///
    /// At most [`STEP_ROWS`] tokens and [`LOGIT_ROWS`] rows of logits.
    pub fn forward(&mut self, spans: &[Span<'_>]) {
        let mut positions = Vec::new();
        let mut queries = Vec::with_capacity(spans.len());
        for span in spans {
            let (position, count) = (span.position, span.tokens.len());
            queries.push(Queries {
                blocks: span.blocks,
                position,
                count,
                first_row: positions.len(),
                window: None,
            });
            positions.extend((position..position + count).map(|p| (p, span.blocks[p / KvPool::BLOCK])));
        }
        self.embed(spans, positions.len());
        for i in 0..self.shape.layers {
            let reach = self.layers[i].reach;
            queries.iter_mut().for_each(|q| q.window = reach);
            self.attention(i, &queries, &positions);
            self.feed_forward(i, positions.len());
        }
        self.head(spans);
    }

    /// The logits of the last step, and the processor to work on them.
    pub fn logits(&mut self) -> (Logits<'_>, &mut Cpu) {
        let stride = self.head.as_ref().unwrap_or(&self.embedding).padded_rows();
        let vocabulary = self.shape.vocabulary;
        let logits = Logits { rows: &self.buffers.logits, stride, vocabulary, places: None };
        (logits, &mut self.cpu)
    }

    fn embed(&mut self, spans: &[Span<'_>], rows: usize) {
        let (width, stride) = (self.shape.width, self.shape.width.next_multiple_of(16));
        let (scale, embedding, x) = (self.shape.embedding_scale, &self.embedding, &mut self.buffers.x);
        x.grow(STEP_ROWS.max(rows) * stride);
        let tokens: Vec<u32> = spans.iter().flat_map(|s| s.tokens).copied().collect();
        self.cpu.each_row(&mut x[..rows * stride], stride, &|row, x| {
            embedding.row(tokens[row] as usize, &mut x[..width]);
            if scale != 1.0 {
                x.iter_mut().for_each(|x| *x *= scale);
            }
        });
    }

    fn attention(&mut self, i: usize, queries: &[Queries<'_>], positions: &[(usize, u32)]) {
        let (s, layer, cpu, b) = (&self.shape, &self.layers[i], &mut self.cpu, &mut self.buffers);
        let (rows, stride) = (positions.len(), s.width.next_multiple_of(16));
        let (q_width, kv_width, qkv_width) = (s.query_width(), s.kv_width(), layer.qkv.width);
        b.normed.grow(STEP_ROWS.max(rows) * s.width);
        b.qkv.grow(STEP_ROWS.max(rows) * qkv_width);
        b.seen.grow(STEP_ROWS.max(rows) * q_width);
        let (x, normed) = (&mut b.x[..rows * stride], &mut b.normed[..rows * s.width]);
        let qkv = &mut b.qkv[..rows * qkv_width];
        normalise(cpu, (x, stride), &layer.attention_norm, s.norm_eps, normed);
        layer.qkv.forward(cpu, normed, qkv, self.precision);
        let rotary = if layer.reach.is_some() { &self.windowed } else { &self.full };
        let isa = cpu.isa();
        cpu.each_row(qkv, qkv_width, &|row, qkv| {
            prepare(
                isa,
                s,
                layer,
                rotary.at(positions[row].0, s.head / 2),
                &mut qkv[..q_width + 2 * kv_width],
            );
        });
        for (row, (position, block)) in qkv.chunks_exact(qkv_width).zip(positions) {
            let (k, v) = row[q_width..q_width + 2 * kv_width].split_at(kv_width);
            self.kv.store(i, *block, position % KvPool::BLOCK, k, v);
        }
        let seen = &mut b.seen[..rows * q_width];
        cpu.attend(&self.kv, i, queries, s.heads, (qkv, qkv_width), seen);
        let norm = layer.post_attention_norm.as_deref().map(|w| (w, s.norm_eps));
        add(cpu, (&layer.output, self.precision), seen, x, norm, (&mut b.more, normed));
    }

    fn feed_forward(&mut self, i: usize, rows: usize) {
        let (s, layer, cpu, b) = (&self.shape, &self.layers[i], &mut self.cpu, &mut self.buffers);
        let (stride, ffn, both_width) = (s.width.next_multiple_of(16), s.ffn, layer.gate_up.width);
        b.both.grow(STEP_ROWS.max(rows) * both_width);
        b.gated.grow(STEP_ROWS.max(rows) * ffn);
        let (x, normed) = (&mut b.x[..rows * stride], &mut b.normed[..rows * s.width]);
        let both = &mut b.both[..rows * both_width];
        normalise(cpu, (x, stride), &layer.ffn_norm, s.norm_eps, normed);
        layer.gate_up.forward(cpu, normed, both, self.precision);
        let kind = match s.activation {
            Activation::Silu => Gate::Silu,
            Activation::GeluTanh => Gate::GeluTanh,
        };
        let (isa, both, gated) = (cpu.isa(), &*both, &mut b.gated[..rows * ffn]);
        cpu.each_row(gated, ffn, &|row, out| {
            infera_kernels::gate(isa, kind, &both[row * both_width..][..2 * ffn], out);
        });
        let norm = layer.post_ffn_norm.as_deref().map(|w| (w, s.norm_eps));
        add(cpu, (&layer.down, self.precision), gated, x, norm, (&mut b.more, normed));
    }

    fn head(&mut self, spans: &[Span<'_>]) {
        let (s, cpu, b) = (&self.shape, &mut self.cpu, &mut self.buffers);
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let stride = s.width.next_multiple_of(16);
        let wanted: usize = spans.iter().map(|s| s.logits).sum();
        if wanted == 0 {
            return;
        }
        b.logits.grow(wanted * head.padded_rows());
        let (mut end, mut to) = (0, 0);
        for span in spans {
            end += span.tokens.len();
            for row in end - span.logits..end {
                let x = &b.x[row * stride..][..s.width];
                infera_kernels::norm(
                    cpu.isa(),
                    x,
                    &self.norm,
                    s.norm_eps as f32,
                    &mut b.normed[to..to + s.width],
                );
                to += s.width;
            }
        }
        let rows = &mut b.logits[..wanted * head.padded_rows()];
        cpu.linear(head, &b.normed[..to], rows, false, Precision::F32);
    }
}

/// Logits after each token from the one at `prefilled - 1` on, as the engine computes them: the first `prefilled` tokens
/// in one piece, the others one by one. For comparing with other implementations.
///
/// # Errors
/// The model cannot be loaded, or `prefilled` is not 1 to the number of tokens.
#[doc(hidden)]
pub fn engine_logits(
    path: &Path,
    class: Class,
    tokens: &[u32],
    prefilled: usize,
) -> Result<Vec<Vec<f32>>, EngineError> {
    super::in_range("prefilled", "1 to the number of tokens", prefilled, tokens.len())?;
    let count = tokens.len().div_ceil(KvPool::BLOCK);
    let mut model = Model::load(&Source::open(path)?, class, 1, tokens.len(), count)?;
    let blocks: Vec<u32> = (0..count as u32).collect();
    let mut all = Vec::new();
    let mut position = 0;
    while position < tokens.len() {
        let end = if position == 0 { prefilled } else { position + 1 };
        let tokens = &tokens[position..end];
        model.forward(&[Span { tokens, position, blocks: &blocks, logits: 1, whole: true }]);
        all.push(model.logits().0.row(0).whole().to_vec());
        position = end;
    }
    Ok(all)
}
