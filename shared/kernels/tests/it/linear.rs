use half::{bf16, f16};
use infera_kernels::{Cpu, Isa, Matrix, Precision, Quants};
use proptest::prelude::*;

use crate::{Numbers, assert_bits};

fn halves(numbers: &mut Numbers, n: usize) -> Vec<f32> {
    (0..n).map(|_| f16::from_f32(numbers.float() * 0.1).to_f32()).collect()
}

/// One matrix of each storage, with scales of half precision and of full precision.
fn matrices(rows: usize, cols: usize, seed: u64) -> Vec<(&'static str, Matrix)> {
    let mut n = Numbers::new(seed);
    let count = rows * cols;
    let four: Vec<u8> = (0..count).map(|_| (n.bits() & 15) as u8).collect();
    let eight: Vec<i8> = (0..count).map(|_| n.bits() as i8).collect();
    let full = n.floats(count);
    let half: Vec<u16> = full.iter().map(|x| f16::from_f32(*x).to_bits()).collect();
    let brain: Vec<u16> = full.iter().map(|x| bf16::from_f32(*x).to_bits()).collect();
    let (scales, mins) = (halves(&mut n, count / 16), halves(&mut n, count / 16));
    let (wide_scales, wide_mins) = (n.floats(count / 16), n.floats(count / 16));
    let pack = |quants| Matrix::pack(rows, cols, quants).unwrap();
    vec![
        (
            "four",
            pack(Quants::Four { values: &four, scales: &scales[..count / 32], mins: &mins[..count / 32] }),
        ),
        (
            "four wide",
            pack(Quants::Four {
                values: &four,
                scales: &wide_scales[..count / 32],
                mins: &wide_mins[..count / 32],
            }),
        ),
        ("eight 16", pack(Quants::Eight { values: &eight, scales: &scales, mins: &mins, group: 16 })),
        (
            "eight 32 wide",
            pack(Quants::Eight {
                values: &eight,
                scales: &wide_scales[..count / 32],
                mins: &wide_mins[..count / 32],
                group: 32,
            }),
        ),
        ("half", pack(Quants::Half(&half))),
        ("bf16", pack(Quants::Bf16(&brain))),
        ("full", pack(Quants::Full(&full))),
    ]
}

/// The f32 product as the documentation defines it.
fn defined(w: &Matrix, x: &[f32]) -> Vec<f32> {
    let mut y = Vec::new();
    let mut row = vec![0f32; w.cols()];
    for x in x.chunks(w.cols()) {
        for j in 0..w.padded_rows() {
            let mut sum = 0f32;
            if j < w.rows() {
                w.row(j, &mut row);
                for (w, x) in row.iter().zip(x) {
                    sum = w.mul_add(*x, sum);
                }
            }
            y.push(sum);
        }
    }
    y
}

/// Without the rows that only fill up the last tile: for those the sum of zeros may have either sign.
fn real(w: &Matrix, y: &[f32]) -> Vec<f32> {
    y.chunks(w.padded_rows()).flat_map(|row| row[..w.rows()].to_vec()).collect()
}

fn product(cpu: &mut Cpu, w: &Matrix, x: &[f32], precision: Precision) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len() / w.cols() * w.padded_rows()];
    cpu.linear(w, x, &mut y, false, precision);
    real(w, &y)
}

#[test]
fn the_f32_product_is_the_chain_of_its_definition() {
    for (rows, cols) in [(16, 32), (20, 64), (100, 160), (193, 320)] {
        for (name, w) in matrices(rows, cols, 7) {
            for m in [1, 2, 3, 4, 5, 8, 9, 12, 13, 30] {
                let x = Numbers::new(m as u64).floats(m * cols);
                let expected = real(&w, &defined(&w, &x));
                for isa in Isa::available() {
                    for threads in [1, 3] {
                        let mut cpu = Cpu::with_isa(threads, isa).unwrap();
                        let got = product(&mut cpu, &w, &x, Precision::F32);
                        let what =
                            format!("{name} {rows}x{cols}, {m} rows, {}, {threads} threads", isa.name());
                        assert_bits(&got, &expected, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn the_integer_product_is_the_same_everywhere_and_near_the_f32_product() {
    let (rows, cols) = (100, 160);
    for (name, w) in matrices(rows, cols, 11).into_iter().take(2) {
        let x = Numbers::new(3).floats(30 * cols);
        let mut reference = Cpu::with_isa(1, Isa::Portable).unwrap();
        let plain = product(&mut reference, &w, &x, Precision::F32);
        let expected: Vec<f32> =
            x.chunks(cols).flat_map(|x| product(&mut reference, &w, x, Precision::Integer)).collect();
        for isa in Isa::available() {
            for m in [1, 2, 3, 5, 6, 7, 13, 30] {
                let mut cpu = Cpu::with_isa(2, isa).unwrap();
                let got: Vec<f32> =
                    x.chunks(m * cols).flat_map(|x| product(&mut cpu, &w, x, Precision::Integer)).collect();
                assert_bits(&got, &expected, &format!("{name}, {m} rows, {}", isa.name()));
            }
        }
        let scale = plain.iter().map(|y| y.abs()).fold(0.0, f32::max);
        let far = plain.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far > 0.0 && far < scale * 1e-3, "{name}: {far} of {scale}");
    }
}

#[test]
fn other_storage_sees_f32_in_both_precisions() {
    for (name, w) in matrices(32, 64, 5).into_iter().skip(2) {
        let x = Numbers::new(1).floats(3 * 64);
        let mut cpu = Cpu::new(2).unwrap();
        let (a, b) =
            (product(&mut cpu, &w, &x, Precision::F32), product(&mut cpu, &w, &x, Precision::Integer));
        assert_bits(&a, &b, name);
    }
}

#[test]
fn zeros_and_large_inputs_are_rounded_without_a_nan() {
    let (_, w) = matrices(32, 64, 5).remove(0);
    for x in [vec![0.0; 64], vec![1e30; 64], (0..64).map(|i| if i == 5 { -3.0 } else { 0.0 }).collect()] {
        for isa in Isa::available() {
            let mut cpu = Cpu::with_isa(1, isa).unwrap();
            assert!(product(&mut cpu, &w, &x, Precision::Integer).iter().all(|y| y.is_finite()), "{x:?}");
        }
    }
}

#[test]
fn results_may_be_added_to_what_is_there() {
    let (_, w) = matrices(48, 64, 9).remove(0);
    let x = Numbers::new(1).floats(64);
    for precision in [Precision::F32, Precision::Integer] {
        let mut cpu = Cpu::new(2).unwrap();
        let alone = product(&mut cpu, &w, &x, precision);
        let mut y: Vec<f32> = (0..48).map(|i| i as f32).collect();
        cpu.linear(&w, &x, &mut y, true, precision);
        let expected: Vec<f32> = alone.iter().enumerate().map(|(i, a)| i as f32 + a).collect();
        assert_bits(&y, &expected, "sum");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let values = [0u8; 64];
    for (rows, cols, scales, text) in [
        (0, 64, 2, "it is empty"),
        (1, 63, 2, "another count of numbers"),
        (1, 64, 1, "another count of scales"),
        (4, 16, 2, "no multiple of the group"),
    ] {
        let scales = vec![0f32; scales];
        let got = Matrix::pack(rows, cols, Quants::Four { values: &values, scales: &scales, mins: &scales });
        let got = got.unwrap_err().to_string();
        assert!(got.contains(text), "{got:?} should contain {text:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A row's results do not depend on the rows around it.
    #[test]
    fn rows_are_independent(seed in any::<u64>(), rows in 1usize..70, groups in 1usize..6, m in 1usize..40, at in 0usize..40) {
        let cols = groups * 32;
        let at = at % m;
        let mut cpu = Cpu::new(2).unwrap();
        let x = Numbers::new(seed).floats(m * cols);
        for (name, w) in matrices(rows, cols, seed) {
            for precision in [Precision::F32, Precision::Integer] {
                let all = product(&mut cpu, &w, &x, precision);
                let one = product(&mut cpu, &w, &x[at * cols..][..cols], precision);
                assert_bits(&all[at * rows..][..rows], &one, name);
            }
        }
    }
}
