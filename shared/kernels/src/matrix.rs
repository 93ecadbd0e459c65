//! Weights, packed in tiles of 16 outputs.
//!
//! A tile is one stream of bytes in the order in which the kernels read it: for each group of inputs the scales and the
//! minima of the 16 outputs, then the quants. Four-bit quants lie as 64 bytes for 8 inputs: byte `4 * output + i` holds
//! input `i` in its low and input `i + 4` in its high nibble. Others lie as 16 outputs for each input.

use half::f16;
use thiserror::Error;

use crate::buffer::Aligned;
use crate::simd::LANES;

/// Inputs that share a scale in 4-bit matrices and in quantised activations.
pub(crate) const GROUP: usize = 32;

/// What a matrix is made from: `rows * cols` numbers, row after row (one row is one output), and for quantised ones a
/// scale and a minimum for each group of a row: `value = q * scale + min`.
#[derive(Debug, Clone, Copy)]
pub enum Quants<'a> {
    /// Numbers from 0 to 15, groups of 32.
    Four {
        /// One number a byte.
        values: &'a [u8],
        /// `rows * cols / 32`.
        scales: &'a [f32],
        /// `rows * cols / 32`.
        mins: &'a [f32],
    },
    /// Signed bytes, groups of 16 or 32.
    Eight {
        /// One number a byte.
        values: &'a [i8],
        /// `rows * cols / group`.
        scales: &'a [f32],
        /// `rows * cols / group`.
        mins: &'a [f32],
        /// 16 or 32.
        group: usize,
    },
    /// IEEE half precision, as bits.
    Half(&'a [u16]),
    /// bfloat16, as bits.
    Bf16(&'a [u16]),
    /// f32.
    Full(&'a [f32]),
}

/// Numbers and shape do not fit together.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("a matrix of {rows} rows and {cols} columns: {reason}")]
pub struct MatrixError {
    rows: usize,
    cols: usize,
    reason: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Four,
    Eight { group: usize },
    Half,
    Bf16,
    Full,
}

/// A packed matrix.
#[derive(Debug)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    pub(crate) format: Format,
    /// Scales and minima are f32; otherwise half precision, which loses nothing.
    pub(crate) wide: bool,
    /// Bytes of a tile.
    pub(crate) stride: usize,
    pub(crate) data: Aligned<u8>,
}

fn exact_half(values: &[f32]) -> bool {
    values.iter().all(|x| f16::from_f32(*x).to_f32().to_bits() == x.to_bits())
}

impl Matrix {
    /// Packs; the rows of the last tile are filled up with zeros.
    ///
    /// # Errors
    /// Counts that do not fit, or columns that are no multiple of the group.
    pub fn pack(rows: usize, cols: usize, quants: Quants<'_>) -> Result<Self, MatrixError> {
        let check = |ok: bool, reason| if ok { Ok(()) } else { Err(MatrixError { rows, cols, reason }) };
        check(rows > 0 && cols > 0, "it is empty")?;
        let count = rows * cols;
        let (format, values, scales, mins): (_, _, &[f32], &[f32]) = match quants {
            Quants::Four { values, scales, mins } => (Format::Four, values.len(), scales, mins),
            Quants::Eight { values, scales, mins, group } => {
                check(group == 16 || group == 32, "groups must be of 16 or 32")?;
                (Format::Eight { group }, values.len(), scales, mins)
            }
            Quants::Half(v) => (Format::Half, v.len(), &[], &[]),
            Quants::Bf16(v) => (Format::Bf16, v.len(), &[], &[]),
            Quants::Full(v) => (Format::Full, v.len(), &[], &[]),
        };
        check(values == count, "another count of numbers")?;
        if let Format::Four | Format::Eight { .. } = format {
            let group = if let Format::Eight { group } = format { group } else { GROUP };
            check(cols.is_multiple_of(group), "columns are no multiple of the group")?;
            check(scales.len() == count / group && mins.len() == count / group, "another count of scales")?;
        }
        let wide = !(exact_half(scales) && exact_half(mins));
        let mut matrix = Self { rows, cols, format, wide, stride: 0, data: Aligned::default() };
        matrix.stride = matrix.group_bytes() * cols.div_ceil(matrix.group());
        matrix.data = Aligned::zeroed(matrix.stride * matrix.tiles());
        match quants {
            Quants::Four { values, scales, mins } => matrix.fill_four(values, scales, mins),
            Quants::Eight { values, scales, mins, .. } => matrix.fill_eight(values, scales, mins),
            Quants::Half(v) | Quants::Bf16(v) => matrix.fill_plain(v, u16::to_le_bytes),
            Quants::Full(v) => matrix.fill_plain(v, f32::to_le_bytes),
        }
        Ok(matrix)
    }

    /// Outputs.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Outputs with the filling of the last tile: the length of a row of results.
    #[must_use]
    pub fn padded_rows(&self) -> usize {
        self.tiles() * LANES
    }

    /// Inputs.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Whether [`crate::Precision::Integer`] makes a difference.
    #[must_use]
    pub fn is_four_bit(&self) -> bool {
        self.format == Format::Four
    }

    /// Bytes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    pub(crate) fn tiles(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// Inputs of one group, 1 where there are no scales.
    pub(crate) fn group(&self) -> usize {
        match self.format {
            Format::Four => GROUP,
            Format::Eight { group } => group,
            _ => 1,
        }
    }

    /// Bytes of scales and minima of a group.
    pub(crate) fn head_bytes(&self) -> usize {
        match self.format {
            Format::Four | Format::Eight { .. } => LANES * if self.wide { 8 } else { 4 },
            _ => 0,
        }
    }

    /// Bytes of a group.
    pub(crate) fn group_bytes(&self) -> usize {
        self.head_bytes()
            + match self.format {
                Format::Four => GROUP * LANES / 2,
                Format::Eight { group } => group * LANES,
                Format::Half | Format::Bf16 => LANES * 2,
                Format::Full => LANES * 4,
            }
    }

    /// Writes scale and minimum of `row` in group `g`; gives where the group's quants begin.
    fn fill_head(&mut self, row: usize, g: usize, scale: f32, min: f32) -> usize {
        let (lane, start) = (row % LANES, row / LANES * self.stride + g * self.group_bytes());
        if self.wide {
            self.data[start + lane * 4..][..4].copy_from_slice(&scale.to_le_bytes());
            self.data[start + 64 + lane * 4..][..4].copy_from_slice(&min.to_le_bytes());
        } else {
            self.data[start + lane * 2..][..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            self.data[start + 32 + lane * 2..][..2].copy_from_slice(&f16::from_f32(min).to_le_bytes());
        }
        start + self.head_bytes()
    }

    fn fill_four(&mut self, values: &[u8], scales: &[f32], mins: &[f32]) {
        let groups = self.cols / GROUP;
        for row in 0..self.rows {
            for g in 0..groups {
                let at = row * groups + g;
                let start = self.fill_head(row, g, scales[at], mins[at]);
                for (c, q) in values[at * GROUP..][..GROUP].iter().enumerate() {
                    let byte = start + c / 8 * 64 + row % LANES * 4 + c % 4;
                    self.data[byte] |= (q & 15) << (c % 8 / 4 * 4);
                }
            }
        }
    }

    fn fill_eight(&mut self, values: &[i8], scales: &[f32], mins: &[f32]) {
        let group = self.group();
        let groups = self.cols / group;
        for row in 0..self.rows {
            for g in 0..groups {
                let at = row * groups + g;
                let start = self.fill_head(row, g, scales[at], mins[at]);
                for (c, q) in values[at * group..][..group].iter().enumerate() {
                    self.data[start + c * LANES + row % LANES] = q.to_le_bytes()[0];
                }
            }
        }
    }

    fn fill_plain<T: Copy, const N: usize>(&mut self, values: &[T], bytes: fn(T) -> [u8; N]) {
        for row in 0..self.rows {
            let start = row / LANES * self.stride + row % LANES * N;
            for c in 0..self.cols {
                let value = bytes(values[row * self.cols + c]);
                self.data[start + c * LANES * N..][..N].copy_from_slice(&value);
            }
        }
    }

    /// The weights of one output as the f32 product sees them.
    ///
    /// # Panics
    /// If there is no such row or `out` has another length than a row.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of {} x {}", self.rows, self.cols);
        let tile = &self.data[row / LANES * self.stride..][..self.stride];
        let lane = row % LANES;
        let half = |at: usize| f16::from_le_bytes([tile[at], tile[at + 1]]).to_f32();
        let full = |at: usize| f32::from_le_bytes([tile[at], tile[at + 1], tile[at + 2], tile[at + 3]]);
        let group = self.group();
        for (c, w) in out.iter_mut().enumerate() {
            let (start, i) = (c / group * self.group_bytes(), c % group);
            let (scale, min) = match (self.head_bytes(), self.wide) {
                (0, _) => (1.0, 0.0),
                (_, true) => (full(start + lane * 4), full(start + 64 + lane * 4)),
                (_, false) => (half(start + lane * 2), half(start + 32 + lane * 2)),
            };
            let quants = start + self.head_bytes();
            *w = match self.format {
                Format::Four => {
                    let byte = tile[quants + i / 8 * 64 + lane * 4 + i % 4];
                    f32::from(byte >> (i % 8 / 4 * 4) & 15).mul_add(scale, min)
                }
                Format::Eight { .. } => {
                    f32::from(i8::from_le_bytes([tile[quants + i * LANES + lane]])).mul_add(scale, min)
                }
                Format::Half => half(c * 32 + lane * 2),
                Format::Bf16 => {
                    let at = c * 32 + lane * 2;
                    half::bf16::from_le_bytes([tile[at], tile[at + 1]]).to_f32()
                }
                Format::Full => full(c * 64 + lane * 4),
            };
        }
    }
}
