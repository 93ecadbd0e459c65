use infera_kernels::{Gate, Isa, exp, gate, norm, rotate};

use crate::{Numbers, assert_bits};

#[test]
fn exp_is_within_two_units_in_the_last_place() {
    let inputs: Vec<f32> = (0..200_000).map(|i| -87.0 + i as f32 * (175.0 / 200_000.0)).collect();
    let mut expected = inputs.clone();
    exp(Isa::Portable, &mut expected);
    for (x, got) in inputs.iter().zip(&expected) {
        let want = f64::from(*x).exp();
        let unit = f64::from(f32::from_bits((want as f32).to_bits() + 1)) - f64::from(want as f32);
        assert!((f64::from(*got) - want).abs() <= 2.0 * unit, "exp({x}) is {got}, should be {want}");
    }
    for isa in Isa::available() {
        let mut got = inputs.clone();
        exp(isa, &mut got);
        assert_bits(&got, &expected, isa.name());
    }
}

#[test]
fn exp_has_a_value_everywhere() {
    for isa in Isa::available() {
        let mut x = [f32::NEG_INFINITY, -1e30, -87.5, -0.0, 0.0, 88.0, 1e30, f32::INFINITY];
        exp(isa, &mut x);
        assert_eq!(x[..5], [0.0, 0.0, 0.0, 1.0, 1.0], "{}", isa.name());
        assert!(x[5].is_finite() && x[5] == x[6] && x[6] == x[7], "{x:?}");
    }
}

#[test]
fn rows_are_the_same_on_every_instruction_set_and_near_the_formulas() {
    for n in [8, 16, 40, 64, 576] {
        let mut numbers = Numbers::new(n as u64);
        let (x, weight, both) = (numbers.floats(n), numbers.floats(n), numbers.floats(2 * n));
        let (cos, sin) = (numbers.floats(n / 2), numbers.floats(n / 2));
        let run = |isa| {
            let (mut normed, mut silu, mut gelu, mut turned) =
                (vec![0f32; n], vec![0f32; n], vec![0f32; n], x.clone());
            norm(isa, &x, &weight, 1e-5, &mut normed);
            gate(isa, Gate::Silu, &both, &mut silu);
            gate(isa, Gate::GeluTanh, &both, &mut gelu);
            rotate(isa, &mut turned, &cos, &sin, 0.125);
            [normed, silu, gelu, turned]
        };
        let expected = run(Isa::Portable);
        for isa in Isa::available() {
            for (got, expected) in run(isa).iter().zip(&expected) {
                assert_bits(got, expected, &format!("{n} numbers, {}", isa.name()));
            }
        }
        let wide = |x: f32| f64::from(x);
        let mean = x.iter().map(|x| wide(*x) * wide(*x)).sum::<f64>() / n as f64;
        for i in 0..n {
            let near =
                |got: f32, want: f64| assert!((wide(got) - want).abs() < 1e-5, "{n}/{i}: {got} {want}");
            near(expected[0][i], wide(x[i]) / (mean + 1e-5).sqrt() * wide(weight[i]));
            let (g, up) = (wide(both[i]), wide(both[n + i]));
            near(expected[1][i], g / (1.0 + (-g).exp()) * up);
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
            near(expected[2][i], 0.5 * g * (1.0 + inner.tanh()) * up);
            let (h, j) = (n / 2, i % (n / 2));
            let (a, b, c, s) = (wide(x[j]), wide(x[h + j]), wide(cos[j]), wide(sin[j]));
            near(expected[3][i], if i < h { a * c - b * s } else { b * c + a * s } * 0.125);
        }
    }
}
