//! Attention over a cache of keys and values in blocks of 16 positions.
//!
//! A block holds, for each layer and each key-value head, 16 keys with the positions in the lanes (`[head][16]`) and 16
//! values with the dimensions in the lanes (`[16][head]`). Scores are thus chains over the head's dimensions with one
//! position a lane, and values are added position by position: no sum depends on how many positions or queries there are.

use crate::buffer::Aligned;
use crate::elementwise::exp_lanes;
use crate::linear::Scratch;
use crate::pool::Pool;
use crate::simd::{Isa, LANES, Simd, kernel};

/// Positions of a block.
pub(crate) const BLOCK: usize = LANES;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvElement {
    /// As computed.
    F32,
    /// Half precision: half the memory and half the traffic.
    F16,
}

/// Memory for keys and values of many sequences.
#[derive(Debug)]
pub struct KvPool {
    element: KvElement,
    layers: usize,
    heads: usize,
    head: usize,
    /// `head` filled up to whole registers.
    padded: usize,
    blocks: usize,
    data: Aligned<u16>,
}

/// Consecutive queries of one sequence. Row `first_row + i` of the inputs stands at position `position + i` and sees
/// the positions up to its own, or the last `window` of them.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a> {
    /// The sequence's blocks, in order.
    pub blocks: &'a [u32],
    /// Position of the first query.
    pub position: usize,
    /// Queries.
    pub count: usize,
    /// Row of the first query.
    pub first_row: usize,
    /// Positions that a query sees at most, its own included.
    pub window: Option<usize>,
}

impl KvPool {
    /// Positions of a block.
    pub const BLOCK: usize = BLOCK;

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(element: KvElement, layers: usize, heads: usize, head: usize) -> usize {
        let each = BLOCK * (head + head.next_multiple_of(LANES));
        layers * heads * each * if element == KvElement::F32 { 4 } else { 2 }
    }

    /// Room for `blocks` blocks.
    #[must_use]
    pub fn new(element: KvElement, layers: usize, heads: usize, head: usize, blocks: usize) -> Self {
        let data = Aligned::zeroed(Self::block_bytes(element, layers, heads, head) / 2 * blocks);
        Self { element, layers, heads, head, padded: head.next_multiple_of(LANES), blocks, data }
    }

    /// Blocks in all.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Where the keys of a head begin, in numbers; the values follow after `head * 16`.
    fn place(&self, block: usize, layer: usize, head: usize) -> usize {
        ((block * self.layers + layer) * self.heads + head) * BLOCK * (self.head + self.padded)
    }

    /// Writes keys and values (`heads * head` numbers each) of one position.
    ///
    /// # Panics
    /// If there is no such block or layer, or sizes do not fit.
    pub fn store(&mut self, layer: usize, block: u32, offset: usize, k: &[f32], v: &[f32]) {
        let (block, size) = (block as usize, self.heads * self.head);
        assert!(block < self.blocks && layer < self.layers && offset < BLOCK, "no such block");
        assert!(k.len() == size && v.len() == size, "keys of another size");
        for head in 0..self.heads {
            let keys = self.place(block, layer, head);
            let values = keys + self.head * BLOCK + offset * self.padded;
            for d in 0..self.head {
                self.write(keys + d * BLOCK + offset, k[head * self.head + d]);
                self.write(values + d, v[head * self.head + d]);
            }
        }
    }

    fn write(&mut self, at: usize, x: f32) {
        match self.element {
            KvElement::F16 => self.data[at] = half::f16::from_f32(x).to_bits(),
            KvElement::F32 => {
                let bits = x.to_bits();
                self.data[2 * at] = bits as u16;
                self.data[2 * at + 1] = (bits >> 16) as u16;
            }
        }
    }
}

/// A view that tasks share.
#[derive(Clone, Copy)]
struct View {
    data: *const u8,
    half: bool,
    layers: usize,
    kv_heads: usize,
    head: usize,
    padded: usize,
    layer: usize,
    heads: usize,
    q: *const f32,
    /// Distance of two rows of `q`.
    stride: usize,
    out: *mut f32,
}

// SAFETY: `data` and `q` are only read, and tasks write disjoint parts of `out`.
unsafe impl Sync for View {}
// SAFETY: as above.
unsafe impl Send for View {}

impl View {
    #[inline(always)]
    unsafe fn keys(&self, block: u32, head: usize) -> *const u8 {
        let place = (block as usize * self.layers + self.layer) * self.kv_heads + head;
        let size = if self.half { 2 } else { 4 };
        // SAFETY: `check` has looked at every block.
        unsafe { self.data.add(place * BLOCK * (self.head + self.padded) * size) }
    }

    #[inline(always)]
    unsafe fn values(&self, block: u32, head: usize) -> *const u8 {
        let size = if self.half { 2 } else { 4 };
        // SAFETY: as above.
        unsafe { self.keys(block, head).add(self.head * BLOCK * size) }
    }
}

#[inline(always)]
unsafe fn element<S: Simd, const HALF: bool>(p: *const u8, at: usize) -> S::F {
    // SAFETY: the caller's promise.
    unsafe { if HALF { S::load_half(p.cast::<u16>().add(at)) } else { S::load(p.cast::<f32>().add(at)) } }
}

/// Rows that are computed together.
const ROWS: usize = 3;
/// Blocks whose scores are computed together.
const WIDE: usize = 4;
/// Registers of a head's dimensions that are added together.
const DIMS: usize = 4;

/// One row of a task: where its query is and which positions it sees.
#[derive(Clone, Copy)]
struct Row {
    q: *const f32,
    out: *mut f32,
    from: usize,
    to: usize,
}

/// Scores of `R` rows against `B` blocks, at `scores[row * stride + position]`.
#[inline(always)]
unsafe fn score<S: Simd, const HALF: bool, const R: usize, const B: usize>(
    rows: &[Row],
    keys: [*const u8; B],
    head: usize,
    scores: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's sizes.
    unsafe {
        let mut acc = [[S::splat(0.0); B]; R];
        for d in 0..head {
            let mut k = [S::splat(0.0); B];
            for (k, keys) in k.iter_mut().zip(keys) {
                *k = element::<S, HALF>(keys, d * BLOCK);
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let q = S::splat(*rows.get_unchecked(r).q.add(d));
                for (b, acc) in acc.iter_mut().enumerate() {
                    *acc = S::fma(k[b], q, *acc);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (b, acc) in acc.iter().enumerate() {
                S::store(scores.add(r * stride + b * BLOCK), *acc);
            }
        }
    }
}

/// Softmax of one row's scores in place, unnormalised, with zeros where it does not see; gives the sum.
#[inline(always)]
unsafe fn soften<S: Simd>(scores: *mut f32, first: usize, count: usize, row: &Row) -> f32 {
    // SAFETY: the caller's sizes.
    unsafe {
        let lanes = |b: usize| {
            let start = first + b * BLOCK;
            (row.from.saturating_sub(start).min(BLOCK), row.to.saturating_sub(start).min(BLOCK))
        };
        let mut most = S::splat(f32::NEG_INFINITY);
        for b in 0..count {
            let p = scores.add(b * BLOCK);
            let (from, to) = lanes(b);
            let s = S::between(S::load(p), from, to, f32::NEG_INFINITY);
            S::store(p, s);
            most = S::max(s, most);
        }
        let most = S::splat(S::largest(most));
        let mut sum = S::splat(0.0);
        for b in 0..count {
            let p = scores.add(b * BLOCK);
            let e = exp_lanes::<S>(S::sub(S::load(p), most));
            S::store(p, e);
            sum = S::add(sum, e);
        }
        S::sum(sum)
    }
}

/// `D` registers of dimensions of the weighted values of `R` rows.
#[inline(always)]
unsafe fn weigh<S: Simd, const HALF: bool, const R: usize, const D: usize>(
    view: &View,
    blocks: &[u32],
    kv_head: usize,
    scores: *const f32,
    stride: usize,
    dim: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's sizes.
    unsafe {
        let mut acc = [[S::splat(0.0); D]; R];
        for (b, block) in blocks.iter().enumerate() {
            let values = view.values(*block, kv_head);
            for t in 0..BLOCK {
                let mut v = [S::splat(0.0); D];
                for (i, v) in v.iter_mut().enumerate() {
                    *v = element::<S, HALF>(values, t * view.padded + dim + i * LANES);
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let p = S::splat(*scores.add(r * stride + b * BLOCK + t));
                    for (i, acc) in acc.iter_mut().enumerate() {
                        *acc = S::fma(v[i], p, *acc);
                    }
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (i, acc) in acc.iter().enumerate() {
                S::store(out.add(r * view.padded + dim + i * LANES), *acc);
            }
        }
    }
}

#[inline(always)]
unsafe fn rows_body<S: Simd, const HALF: bool, const R: usize>(
    view: &View,
    blocks: &[u32],
    kv_head: usize,
    rows: &[Row],
    scratch: *mut f32,
) {
    // SAFETY: the caller's sizes.
    unsafe {
        let (mut low, mut high) = (usize::MAX, 0);
        for row in rows {
            low = low.min(row.from / BLOCK);
            high = high.max(row.to.div_ceil(BLOCK));
        }
        let blocks = &blocks[low..high];
        let (count, stride) = (blocks.len(), blocks.len() * BLOCK);
        let (sums, scores) = (scratch, scratch.add(ROWS * view.padded));
        let mut b = 0;
        while b < count {
            let to = scores.add(b * BLOCK);
            if count - b >= WIDE {
                let keys = std::array::from_fn::<_, WIDE, _>(|i| view.keys(blocks[b + i], kv_head));
                score::<S, HALF, R, WIDE>(rows, keys, view.head, to, stride);
                b += WIDE;
            } else {
                score::<S, HALF, R, 1>(rows, [view.keys(blocks[b], kv_head)], view.head, to, stride);
                b += 1;
            }
        }
        let mut inverse = [0f32; R];
        for (r, inverse) in inverse.iter_mut().enumerate() {
            *inverse = 1.0 / soften::<S>(scores.add(r * stride), low * BLOCK, count, &rows[r]);
        }
        let mut dim = 0;
        while dim < view.padded {
            if view.padded - dim >= DIMS * LANES {
                weigh::<S, HALF, R, DIMS>(view, blocks, kv_head, scores, stride, dim, sums);
                dim += DIMS * LANES;
            } else {
                weigh::<S, HALF, R, 1>(view, blocks, kv_head, scores, stride, dim, sums);
                dim += LANES;
            }
        }
        for (r, row) in rows.iter().enumerate().take(R) {
            for d in (0..view.head).step_by(LANES) {
                let x = S::mul(S::load(sums.add(r * view.padded + d)), S::splat(inverse[r]));
                S::store_part(row.out.add(d), x, view.head - d);
            }
        }
    }
}

#[inline(always)]
unsafe fn task_body<S: Simd>(
    view: &View,
    queries: &Queries<'_>,
    kv_head: usize,
    from: usize,
    to: usize,
    scratch: *mut f32,
) {
    // SAFETY: the caller's sizes.
    unsafe {
        let group = view.heads / view.kv_heads;
        let row = |i: usize| {
            let (query, head) = (from + i / group, kv_head * group + i % group);
            let (row, at) = (queries.first_row + query, head * view.head);
            let end = queries.position + query + 1;
            let begin = queries.window.map_or(0, |w| end.saturating_sub(w));
            let (q, out) =
                (view.q.add(row * view.stride + at), view.out.add(row * view.heads * view.head + at));
            Row { q, out, from: begin, to: end }
        };
        let total = (to - from) * group;
        let mut i = 0;
        while i < total {
            let n = (total - i).min(ROWS);
            let rows: [Row; ROWS] = std::array::from_fn(|r| row((i + r).min(total - 1)));
            let (rows, blocks) = (&rows[..n], queries.blocks);
            match (n, view.half) {
                (1, false) => rows_body::<S, false, 1>(view, blocks, kv_head, rows, scratch),
                (2, false) => rows_body::<S, false, 2>(view, blocks, kv_head, rows, scratch),
                (_, false) => rows_body::<S, false, 3>(view, blocks, kv_head, rows, scratch),
                (1, true) => rows_body::<S, true, 1>(view, blocks, kv_head, rows, scratch),
                (2, true) => rows_body::<S, true, 2>(view, blocks, kv_head, rows, scratch),
                (_, true) => rows_body::<S, true, 3>(view, blocks, kv_head, rows, scratch),
            }
            i += n;
        }
    }
}
kernel! {
    unsafe fn task_kernel(view: &View, queries: &Queries<'_>, kv_head: usize, from: usize, to: usize, scratch: *mut f32) = task_body;
}

/// Checks every size that the kernels rely on; gives the longest sequence in positions.
pub(crate) fn check(
    kv: &KvPool,
    layer: usize,
    queries: &[Queries<'_>],
    heads: usize,
    (q, stride): (&[f32], usize),
    out: &[f32],
) -> usize {
    assert!(layer < kv.layers && heads.is_multiple_of(kv.heads) && heads > 0, "no such layer or heads");
    let (width, rows) = (heads * kv.head, out.len() / (heads * kv.head));
    assert!(rows * width == out.len() && stride >= width, "rows of another width");
    assert!(rows == 0 || q.len() >= (rows - 1) * stride + width, "queries and results of different sizes");
    let mut longest = 0;
    for query in queries {
        let end = query.position + query.count;
        assert!(query.blocks.len() * BLOCK >= end, "positions without a block");
        assert!(query.first_row + query.count <= rows, "queries without a row");
        assert!(query.window != Some(0), "an empty window");
        assert!(query.blocks.iter().all(|b| (*b as usize) < kv.blocks), "no such block");
        longest = longest.max(end);
    }
    longest
}

/// Floats of scratch memory that a thread needs.
pub(crate) fn scratch(kv: &KvPool, longest: usize) -> usize {
    ROWS * (kv.padded + longest.next_multiple_of(BLOCK))
}

/// Queries of one sequence in a task.
const TASK_QUERIES: usize = 8;

/// See [`crate::Cpu::attend`]; the sizes were checked.
#[allow(clippy::too_many_arguments)]
pub(crate) fn attend(
    isa: Isa,
    pool: &mut Pool,
    scratch: &Scratch,
    kv: &KvPool,
    layer: usize,
    queries: &[Queries<'_>],
    heads: usize,
    (q, stride): (&[f32], usize),
    out: &mut [f32],
) {
    let view = View {
        data: kv.data.as_ptr().cast(),
        half: kv.element == KvElement::F16,
        layers: kv.layers,
        kv_heads: kv.heads,
        head: kv.head,
        padded: kv.padded,
        layer,
        heads,
        q: q.as_ptr(),
        stride,
        out: out.as_mut_ptr(),
    };
    let mut tasks = Vec::new();
    for (i, query) in queries.iter().enumerate() {
        for from in (0..query.count).step_by(TASK_QUERIES) {
            tasks.extend((0..kv.heads).map(|head| (i, head, from, query.count.min(from + TASK_QUERIES))));
        }
    }
    pool.run(tasks.len(), &|i, thread| {
        let (query, head, from, to) = tasks[i];
        // SAFETY: `check` looked at the sizes; tasks write disjoint heads of rows; the scratch is the thread's own.
        unsafe { task_kernel(isa, &view, &queries[query], head, from, to, scratch.0[thread]) }
    });
}
