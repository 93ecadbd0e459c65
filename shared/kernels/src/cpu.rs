//! The processor: instruction set, threads and their memory.

use crate::attention::{self, KvPool, Queries};
use crate::buffer::Aligned;
use crate::linear::{self, Rounded, Scratch};
use crate::matrix::Matrix;
use crate::pool::Pool;
use crate::simd::Isa;

/// What 4-bit matrices are multiplied with; the others always see f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// The inputs as they are.
    F32,
    /// Inputs rounded to 15 bits in groups of 32, products in integers: more than twice as fast.
    Integer,
}

/// Runs kernels, one after the other, on a fixed number of threads.
#[derive(Debug)]
pub struct Cpu {
    isa: Isa,
    pool: Pool,
    scratch: Vec<Aligned<f32>>,
    rounded: Rounded,
}

impl Cpu {
    /// `threads` threads, the caller's included, with the best instruction set.
    ///
    /// # Errors
    /// The system has no more threads.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        Self::with_isa(threads, Isa::detect())
    }

    /// The same with another instruction set that this processor has.
    ///
    /// # Errors
    /// The system has no more threads.
    ///
    /// # Panics
    /// If the processor does not have it.
    pub fn with_isa(threads: usize, isa: Isa) -> std::io::Result<Self> {
        assert!(Isa::available().contains(&isa), "this processor has no {}", isa.name());
        let pool = Pool::new(threads.max(1))?;
        let scratch = (0..pool.threads()).map(|_| Aligned::default()).collect();
        Ok(Self { isa, pool, scratch, rounded: Rounded::default() })
    }

    /// The instruction set in use.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    fn scratch(&mut self, floats: usize) -> Scratch {
        Scratch(
            self.scratch
                .iter_mut()
                .map(|s| {
                    s.grow(floats);
                    s.as_mut_ptr()
                })
                .collect(),
        )
    }

    /// `y = x w^T`, or `y += x w^T`: rows of `w.cols()` inputs to as many rows of [`Matrix::padded_rows`] results.
    ///
    /// # Panics
    /// If sizes do not fit.
    pub fn linear(&mut self, w: &Matrix, x: &[f32], y: &mut [f32], add: bool, precision: Precision) {
        self.linear_into(w, x, (y, w.padded_rows(), 0), add, precision);
    }

    /// Attention of some queries to what the pool holds for their sequences: `q` has rows of `heads * head` numbers that
    /// begin every `stride` numbers, `out` the same rows without gaps. Head `h` looks at key-value head
    /// `h / (heads / kv heads)`.
    ///
    /// # Panics
    /// If sizes do not fit.
    pub fn attend(
        &mut self,
        kv: &KvPool,
        layer: usize,
        queries: &[Queries<'_>],
        heads: usize,
        q: (&[f32], usize),
        out: &mut [f32],
    ) {
        let longest = attention::check(kv, layer, queries, heads, q, out);
        let scratch = self.scratch(attention::scratch(kv, longest));
        attention::attend(self.isa, &mut self.pool, &scratch, kv, layer, queries, heads, q, out);
    }

    /// `y += x w^T` or `y = x w^T` where a row of `y` is `stride` numbers long and the results begin at number `offset`.
    ///
    /// # Panics
    /// If sizes do not fit.
    pub fn linear_into(
        &mut self,
        w: &Matrix,
        x: &[f32],
        (y, stride, offset): (&mut [f32], usize, usize),
        add: bool,
        precision: Precision,
    ) {
        let rows = x.len() / w.cols();
        assert!(rows * w.cols() == x.len() && y.len() == rows * stride, "product of other sizes");
        assert!(offset + w.padded_rows() <= stride, "results beyond their row");
        let scratch = self.scratch(linear::scratch(rows));
        let rounded = (precision == Precision::Integer && w.is_four_bit()).then_some(&mut self.rounded);
        linear::linear(self.isa, &mut self.pool, &scratch, rounded, w, x, (y, stride, offset), add);
    }

    /// Calls `task` for each row of `x` (of `width` numbers) with its number, several at once if there are many.
    ///
    /// # Panics
    /// If `x` is not a number of rows.
    pub fn each_row(&mut self, x: &mut [f32], width: usize, task: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        let rows = x.len() / width;
        assert!(rows * width == x.len(), "rows of another width");
        let chunk = if rows < 4 { rows.max(1) } else { rows.div_ceil(2 * self.pool.threads()) };
        let start = Start(x.as_mut_ptr());
        self.pool.run(rows.div_ceil(chunk), &|i, _| {
            for row in i * chunk..rows.min((i + 1) * chunk) {
                // SAFETY: rows are disjoint and inside `x`.
                task(row, unsafe { std::slice::from_raw_parts_mut(start.at(row * width), width) });
            }
        });
    }

    /// Calls `task` for every number below `tasks` on any thread.
    pub fn each(&mut self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.pool.run(tasks, &|i, _| task(i));
    }
}

struct Start(*mut f32);

// SAFETY: tasks take disjoint rows.
unsafe impl Sync for Start {}

impl Start {
    /// # Safety
    /// There are more than `i` numbers.
    unsafe fn at(&self, i: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(i) }
    }
}
