//! Products of activations and packed matrices.

use crate::buffer::Aligned;
use crate::matrix::{Format, GROUP, Matrix};
use crate::pool::Pool;
use crate::simd::{Isa, LANES, Simd, kernel};

/// Rows of inputs rounded in groups of 32 to integers of at most [`MOST`], each as `128 * high + low` of two bytes.
#[derive(Debug, Default)]
pub(crate) struct Rounded {
    high: Aligned<i8>,
    low: Aligned<i8>,
    /// `max|x| / MOST` of each group.
    scales: Aligned<f32>,
    /// Scale times the sum of the group's integers.
    sums: Aligned<f32>,
}

/// The largest rounded input: `127 * 128`. Thirty-two of them times 15 are less than 2^24, which f32 holds exactly.
const MOST: f32 = 16_256.0;

#[derive(Clone, Copy)]
struct Integers {
    high: *mut i8,
    low: *mut i8,
    scales: *mut f32,
    sums: *mut f32,
}

// SAFETY: tasks write disjoint rows, later ones only read.
unsafe impl Sync for Integers {}
// SAFETY: as above.
unsafe impl Send for Integers {}

#[inline(always)]
unsafe fn quantise_body<S: Simd>(x: *const f32, to: Integers, first: usize, groups: usize) {
    // SAFETY: the caller promises `groups * 32` inputs and room for the results behind `first` groups.
    unsafe {
        let part = S::splat(1.0 / 128.0);
        for g in 0..groups {
            let (a, b) = (S::load(x.add(g * GROUP)), S::load(x.add(g * GROUP + LANES)));
            let most = S::largest(S::max(S::abs(a), S::abs(b)));
            let inverse = S::splat(if most > 0.0 { MOST / most } else { 0.0 });
            let (a, b) = (S::round(S::mul(a, inverse)), S::round(S::mul(b, inverse)));
            let at = (first + g) * GROUP;
            for (q, at) in [(a, at), (b, at + LANES)] {
                let high = S::round(S::mul(q, part));
                S::store_i8(to.high.add(at), high);
                S::store_i8(to.low.add(at), S::fma(high, S::splat(-128.0), q));
            }
            let scale = most / MOST;
            *to.scales.add(first + g) = scale;
            // Integers of at most 32 * 16256: exact in any order.
            *to.sums.add(first + g) = scale * S::sum(S::add(a, b));
        }
    }
}
kernel! { unsafe fn quantise_kernel(x: *const f32, to: Integers, first: usize, groups: usize) = quantise_body; }

/// Where results go and how: raw parts, so that threads may write different columns of one row.
#[derive(Clone, Copy)]
struct Out {
    y: *mut f32,
    /// Distance of two rows.
    stride: usize,
    add: bool,
}

// SAFETY: tasks write disjoint columns.
unsafe impl Sync for Out {}
// SAFETY: as above.
unsafe impl Send for Out {}

#[derive(Clone, Copy)]
struct Inputs {
    x: *const f32,
    rows: usize,
}

// SAFETY: only read.
unsafe impl Sync for Inputs {}
// SAFETY: only read.
unsafe impl Send for Inputs {}

/// Scales and minima at the head of a group.
#[inline(always)]
unsafe fn head<S: Simd>(p: *const u8, wide: bool) -> (S::F, S::F) {
    // SAFETY: the packing puts them there.
    unsafe {
        if wide {
            (S::load(p.cast()), S::load(p.add(64).cast()))
        } else {
            (S::load_half(p.cast()), S::load_half(p.add(32).cast()))
        }
    }
}

/// Writes a tile's results of one row.
#[inline(always)]
unsafe fn emit<S: Simd>(out: Out, row: usize, tile: usize, acc: S::F) {
    // SAFETY: rows and tiles of the matrix lie inside `y`.
    unsafe {
        let p = out.y.add(row * out.stride + tile * LANES);
        S::store(p, if out.add { S::add(S::load(p), acc) } else { acc });
    }
}

/// Inputs that one pass over a panel takes: weights of two tiles stay in the first-level cache.
const PANEL: usize = 128;
/// Rows that one pass over a panel computes.
const PANEL_ROWS: usize = 12;

/// The weights of inputs `from..to` of a tile as f32, at `panel[(c - from) * TILES * 16]`.
#[inline(always)]
unsafe fn unpack<S: Simd>(w: &Matrix, tile: *const u8, from: usize, to: usize, panel: *mut f32, step: usize) {
    // SAFETY: the tile has the matrix's stride, and the panel room for `to - from` inputs.
    unsafe {
        match w.format {
            Format::Four => {
                for g in from / GROUP..to / GROUP {
                    let p = tile.add(g * w.group_bytes());
                    let (scale, min) = head::<S>(p, w.wide);
                    let quants = p.add(w.head_bytes());
                    for k in 0..4 {
                        let q = S::load_q(quants.add(k * 64));
                        for j in 0..8usize {
                            let weight = S::fma(S::nibble(q, (j % 4 * 8 + j / 4 * 4) as u32), scale, min);
                            S::store(panel.add((g * GROUP + k * 8 + j - from) * step), weight);
                        }
                    }
                }
            }
            Format::Eight { group } => {
                for g in from / group..to / group {
                    let p = tile.add(g * w.group_bytes());
                    let (scale, min) = head::<S>(p, w.wide);
                    let quants = p.add(w.head_bytes()).cast::<i8>();
                    for i in 0..group {
                        let weight = S::fma(S::load_i8(quants.add(i * LANES)), scale, min);
                        S::store(panel.add((g * group + i - from) * step), weight);
                    }
                }
            }
            Format::Half => {
                for c in from..to {
                    S::store(panel.add((c - from) * step), S::load_half(tile.add(c * 32).cast()));
                }
            }
            Format::Bf16 => {
                for c in from..to {
                    S::store(panel.add((c - from) * step), S::load_bf16(tile.add(c * 32).cast()));
                }
            }
            Format::Full => {
                for c in from..to {
                    S::store(panel.add((c - from) * step), S::load(tile.add(c * 64).cast()));
                }
            }
        }
    }
}

/// `M` rows times `T` tiles of a panel, on top of what `acc[row][tile][lane]` holds.
#[inline(always)]
unsafe fn block<S: Simd, const M: usize, const T: usize>(
    x: *const f32,
    cols: usize,
    panel: *const f32,
    count: usize,
    acc: *mut f32,
) {
    // SAFETY: the caller's sizes.
    unsafe {
        let mut sum = [[S::splat(0.0); T]; M];
        for (m, row) in sum.iter_mut().enumerate() {
            for (t, s) in row.iter_mut().enumerate() {
                *s = S::load(acc.add((m * T + t) * LANES));
            }
        }
        for c in 0..count {
            let mut weights = [S::splat(0.0); T];
            for (t, w) in weights.iter_mut().enumerate() {
                *w = S::load(panel.add((c * T + t) * LANES));
            }
            for (m, row) in sum.iter_mut().enumerate() {
                let x = S::splat(*x.add(m * cols + c));
                for (t, s) in row.iter_mut().enumerate() {
                    *s = S::fma(weights[t], x, *s);
                }
            }
        }
        for (m, row) in sum.iter().enumerate() {
            for (t, s) in row.iter().enumerate() {
                S::store(acc.add((m * T + t) * LANES), *s);
            }
        }
    }
}

/// `T` tiles for all rows through panels.
#[inline(always)]
unsafe fn panels<S: Simd, const T: usize>(
    w: &Matrix,
    first: usize,
    inputs: Inputs,
    out: Out,
    scratch: *mut f32,
) {
    // SAFETY: the scratch has room for a panel and the sums of all rows.
    unsafe {
        let (cols, rows) = (w.cols(), inputs.rows);
        let (panel, acc) = (scratch, scratch.add(PANEL * T * LANES));
        for i in 0..rows * T {
            S::store(acc.add(i * LANES), S::splat(0.0));
        }
        for from in (0..cols).step_by(PANEL) {
            let to = cols.min(from + PANEL);
            for t in 0..T {
                let tile = w.data.as_ptr().add((first + t) * w.stride);
                unpack::<S>(w, tile, from, to, panel.add(t * LANES), T * LANES);
            }
            let mut row = 0;
            while row < rows {
                let m = (rows - row).min(PANEL_ROWS);
                let (x, acc) = (inputs.x.add(row * cols + from), acc.add(row * T * LANES));
                macro_rules! by_rows {
                    ($($n:literal)*) => { match m { $($n => block::<S, $n, T>(x, cols, panel, to - from, acc),)* _ => {} } };
                }
                by_rows!(1 2 3 4 5 6 7 8 9 10 11 12);
                row += m;
            }
        }
        for row in 0..rows {
            for t in 0..T {
                emit::<S>(out, row, first + t, S::load(acc.add((row * T + t) * LANES)));
            }
        }
    }
}

/// Weights of 8 inputs of a group.
#[inline(always)]
unsafe fn eight<S: Simd>(w: &Matrix, quants: *const u8, k: usize, scale: S::F, min: S::F) -> [S::F; 8] {
    // SAFETY: the packing.
    unsafe {
        let mut weights = [S::splat(0.0); 8];
        if w.format == Format::Four {
            let q = S::load_q(quants.add(k * 64));
            for (j, weight) in weights.iter_mut().enumerate() {
                *weight = S::fma(S::nibble(q, (j % 4 * 8 + j / 4 * 4) as u32), scale, min);
            }
        } else {
            for (j, weight) in weights.iter_mut().enumerate() {
                let q = S::load_i8(quants.add((k * 8 + j) * LANES).cast());
                *weight = S::fma(q, scale, min);
            }
        }
        weights
    }
}

/// `T` tiles of a quantised matrix for `M` rows, unpacked in registers.
#[inline(always)]
unsafe fn direct<S: Simd, const M: usize, const T: usize>(
    w: &Matrix,
    first: usize,
    row: usize,
    inputs: Inputs,
    out: Out,
) {
    // SAFETY: tiles and rows exist.
    unsafe {
        let (cols, group) = (w.cols(), w.group());
        let (size, head_bytes) = (w.group_bytes(), w.head_bytes());
        let tiles = w.data.as_ptr().add(first * w.stride);
        let mut acc = [[S::splat(0.0); M]; T];
        for g in 0..cols / group {
            for k in 0..group / 8 {
                for (t, acc) in acc.iter_mut().enumerate() {
                    let p = tiles.add(t * w.stride + g * size);
                    let (scale, min) = head::<S>(p, w.wide);
                    let weights = eight::<S>(w, p.add(head_bytes), k, scale, min);
                    for (j, weight) in weights.iter().enumerate() {
                        for (m, acc) in acc.iter_mut().enumerate() {
                            let x = *inputs.x.add((row + m) * cols + g * group + k * 8 + j);
                            *acc = S::fma(*weight, S::splat(x), *acc);
                        }
                    }
                }
            }
        }
        for (t, acc) in acc.iter().enumerate() {
            for (m, acc) in acc.iter().enumerate() {
                emit::<S>(out, row + m, first + t, *acc);
            }
        }
    }
}

/// `T` tiles of a 4-bit matrix for `M` rounded rows.
#[inline(always)]
unsafe fn integers<S: Simd, const M: usize, const T: usize>(
    w: &Matrix,
    first: usize,
    row: usize,
    inputs: Integers,
    out: Out,
) {
    // SAFETY: tiles and rows exist.
    unsafe {
        let (cols, groups) = (w.cols(), w.cols() / GROUP);
        let (size, head_bytes) = (w.group_bytes(), w.head_bytes());
        let tiles = w.data.as_ptr().add(first * w.stride);
        let mut acc = [[S::splat(0.0); M]; T];
        for g in 0..groups {
            for (t, acc) in acc.iter_mut().enumerate() {
                let p = tiles.add(t * w.stride + g * size);
                let (scale, min) = head::<S>(p, w.wide);
                let quad = |k: usize| S::halves(S::load_q(p.add(head_bytes + k * 64)));
                let weights = [quad(0), quad(1), quad(2), quad(3)];
                for (m, acc) in acc.iter_mut().enumerate() {
                    let at = (row + m) * cols + g * GROUP;
                    let (high, low) = (inputs.high.add(at).cast::<i32>(), inputs.low.add(at).cast::<i32>());
                    let mut dot = S::zero_i();
                    for (k, w) in weights.iter().enumerate() {
                        dot = S::dot(dot, w.0, high.add(2 * k).read_unaligned());
                        dot = S::dot(dot, w.1, high.add(2 * k + 1).read_unaligned());
                    }
                    dot = S::times_128(dot);
                    for (k, w) in weights.iter().enumerate() {
                        dot = S::dot(dot, w.0, low.add(2 * k).read_unaligned());
                        dot = S::dot(dot, w.1, low.add(2 * k + 1).read_unaligned());
                    }
                    let at = (row + m) * groups + g;
                    *acc = S::fma(S::mul(scale, S::splat(*inputs.scales.add(at))), S::to_f(dot), *acc);
                    *acc = S::fma(min, S::splat(*inputs.sums.add(at)), *acc);
                }
            }
        }
        for (t, acc) in acc.iter().enumerate() {
            for (m, acc) in acc.iter().enumerate() {
                emit::<S>(out, row + m, first + t, *acc);
            }
        }
    }
}

/// Rows up to which weights are not unpacked into a panel first.
const DIRECT_ROWS: usize = 2;

/// Tiles that a task computes at most.
const TASK_TILES: usize = 4;

#[inline(always)]
unsafe fn plain_body<S: Simd>(
    w: &Matrix,
    first: usize,
    last: usize,
    inputs: Inputs,
    out: Out,
    scratch: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let quantised = matches!(w.format, Format::Four | Format::Eight { .. });
        let mut tile = first;
        while tile < last {
            let left = last - tile;
            if !quantised || inputs.rows > DIRECT_ROWS {
                let two = left >= 2;
                if two {
                    panels::<S, 2>(w, tile, inputs, out, scratch)
                } else {
                    panels::<S, 1>(w, tile, inputs, out, scratch)
                }
                tile += if two { 2 } else { 1 };
                continue;
            }
            macro_rules! by_rows {
                ($t:literal: $($n:literal)*) => { match inputs.rows { $($n => direct::<S, $n, $t>(w, tile, 0, inputs, out),)* _ => {} } };
            }
            if left >= 4 {
                by_rows!(4: 1 2);
                tile += 4;
            } else if left >= 2 {
                by_rows!(2: 1 2);
                tile += 2;
            } else {
                by_rows!(1: 1 2);
                tile += 1;
            }
        }
    }
}
kernel! {
    unsafe fn plain_kernel(w: &Matrix, first: usize, last: usize, inputs: Inputs, out: Out, scratch: *mut f32) = plain_body;
}

#[inline(always)]
unsafe fn integer_body<S: Simd>(
    w: &Matrix,
    first: usize,
    last: usize,
    rows: usize,
    inputs: Integers,
    out: Out,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut tile = first;
        while tile < last {
            let left = last - tile;
            if left >= 4 && rows <= 2 {
                match rows {
                    1 => integers::<S, 1, 4>(w, tile, 0, inputs, out),
                    _ => integers::<S, 2, 4>(w, tile, 0, inputs, out),
                }
                tile += 4;
                continue;
            }
            let two = left >= 2;
            let mut row = 0;
            while row < rows {
                let m = (rows - row).min(6);
                macro_rules! by_rows {
                    ($t:literal: $($n:literal)*) => { match m { $($n => integers::<S, $n, $t>(w, tile, row, inputs, out),)* _ => {} } };
                }
                if two {
                    by_rows!(2: 1 2 3 4 5 6)
                } else {
                    by_rows!(1: 1 2 3 4 5 6)
                }
                row += m;
            }
            tile += if two { 2 } else { 1 };
        }
    }
}
kernel! {
    unsafe fn integer_kernel(w: &Matrix, first: usize, last: usize, rows: usize, inputs: Integers, out: Out) = integer_body;
}

/// Floats of scratch memory that a thread needs to multiply `rows` rows.
pub(crate) fn scratch(rows: usize) -> usize {
    2 * LANES * (PANEL + rows)
}

impl Rounded {
    /// Rounds rows of `cols` numbers, some of them in each thread.
    fn fill(&mut self, isa: Isa, pool: &mut Pool, x: &[f32], cols: usize) -> Integers {
        let (groups, rows) = (cols / GROUP, x.len() / cols);
        self.high.grow(x.len());
        self.low.grow(x.len());
        self.scales.grow(rows * groups);
        self.sums.grow(rows * groups);
        let to = Integers {
            high: self.high.as_mut_ptr(),
            low: self.low.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
        };
        let inputs = Inputs { x: x.as_ptr(), rows };
        let chunk = if rows < 8 { rows.max(1) } else { rows.div_ceil(pool.threads()) };
        pool.run(rows.div_ceil(chunk), &|i, _| {
            let (from, end) = (i * chunk, rows.min((i + 1) * chunk));
            // SAFETY: tasks write disjoint rows of buffers that hold all rows.
            unsafe { quantise_kernel(isa, inputs.at(from * cols), to, from * groups, (end - from) * groups) }
        });
        to
    }
}

impl Inputs {
    /// # Safety
    /// There are more than `i` inputs.
    unsafe fn at(&self, i: usize) -> *const f32 {
        // SAFETY: the caller's promise.
        unsafe { self.x.add(i) }
    }
}

/// The threads' own memory, as pointers that tasks may take.
pub(crate) struct Scratch(pub Vec<*mut f32>);

// SAFETY: a task uses only the buffer of its own thread.
unsafe impl Sync for Scratch {}

#[allow(clippy::too_many_arguments)]
/// One product as [`crate::Cpu::linear_into`] describes it; the sizes were checked.
pub(crate) fn linear(
    isa: Isa,
    pool: &mut Pool,
    scratch: &Scratch,
    rounded: Option<&mut Rounded>,
    w: &Matrix,
    x: &[f32],
    (y, stride, offset): (&mut [f32], usize, usize),
    add: bool,
) {
    let tiles = w.tiles();
    let out = Out { y: y.as_mut_ptr().wrapping_add(offset), stride, add };
    let inputs = Inputs { x: x.as_ptr(), rows: x.len() / w.cols() };
    let integers = rounded.map(|rounded| rounded.fill(isa, pool, x, w.cols()));
    // Few tiles: smaller tasks, so that threads end together.
    let each = if tiles < 16 * pool.threads() * TASK_TILES { TASK_TILES / 2 } else { TASK_TILES };
    let each = if pool.threads() == 1 { tiles } else { each };
    pool.run(tiles.div_ceil(each), &|i, thread| {
        let (first, last) = (i * each, tiles.min((i + 1) * each));
        // SAFETY: the sizes were checked; tasks write disjoint columns; the scratch is the thread's own.
        unsafe {
            match integers {
                Some(integers) => integer_kernel(isa, w, first, last, inputs.rows, integers, out),
                None => plain_kernel(isa, w, first, last, inputs, out, scratch.0[thread]),
            }
        }
    });
}
