//! The arithmetic of a decoder on a CPU, defined so that every machine gets the same bits.
//!
//! Every function here says in which order it adds. The order depends on the numbers' places alone: not on how many rows
//! stand in a batch, not on where a prompt was cut, not on the number of threads, and not on the instruction set. So a
//! token computed alone, in company, from a cached prefix or by a referee's one pass over a finished answer has the same
//! logits, and two honest nodes need no tolerance between them.
//!
//! # The definitions
//!
//! - *f32 product* ([`Precision::F32`]): `y[j] = chain(w[j][c] * x[c])`, one chain of fused multiply-adds over `c`
//!   ascending from 0; a quantised weight is `fma(q, scale, min)`, rounded once.
//! - *Integer product* ([`Precision::Integer`], 4-bit weights): inputs are rounded in groups of 32 to `q * d` with
//!   `d = max|x| / 16256`; sums of a group are integers and exact; groups are chained by two fused multiply-adds each.
//! - *Sums over a row* (norm, softmax) run in 16 lanes, lane `i` taking the places `i mod 16` ascending, and the lanes are
//!   added in a fixed tree.
//! - *Attention*: a score is one chain over the head's dimensions; the weighted values are one chain over positions.
//! - `exp` is a polynomial of our own ([`exp`]): the C library's differs between systems.
//!
//! AVX-512 and AVX2 paths are chosen at run time; [`Isa::Portable`] is plain Rust and the reference in tests.

#![allow(unsafe_code)]

mod attention;
mod buffer;
mod cpu;
mod elementwise;
mod linear;
mod matrix;
mod pool;
mod simd;

pub use attention::{KvElement, KvPool, Queries};
pub use buffer::Aligned;
pub use cpu::{Cpu, Precision};
pub use elementwise::{Gate, exp, gate, norm, rotate};
pub use matrix::{Matrix, MatrixError, Quants};
pub use simd::Isa;
