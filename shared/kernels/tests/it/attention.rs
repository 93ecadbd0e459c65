use infera_kernels::{Cpu, Isa, KvElement, KvPool, Queries};
use proptest::prelude::*;

use crate::{Numbers, assert_bits};

const LAYERS: usize = 2;

struct Setting {
    kv: KvPool,
    heads: usize,
    kv_heads: usize,
    head: usize,
    /// Keys and values as stored, by position.
    stored: Vec<(Vec<f32>, Vec<f32>)>,
    blocks: Vec<u32>,
}

fn setting(element: KvElement, heads: usize, kv_heads: usize, head: usize, length: usize) -> Setting {
    let count = length.div_ceil(KvPool::BLOCK);
    let mut kv = KvPool::new(element, LAYERS, kv_heads, head, count + 3);
    // Not in order, and not the first ones.
    let blocks: Vec<u32> = (0..count as u32).rev().map(|b| b + 2).collect();
    let mut n = Numbers::new(length as u64);
    let mut stored = Vec::new();
    for position in 0..length {
        let (k, v) = (n.floats(kv_heads * head), n.floats(kv_heads * head));
        kv.store(1, blocks[position / 16], position % 16, &k, &v);
        let round = |x: Vec<f32>| match element {
            KvElement::F32 => x,
            KvElement::F16 => x.iter().map(|x| half::f16::from_f32(*x).to_f32()).collect(),
        };
        stored.push((round(k), round(v)));
    }
    Setting { kv, heads, kv_heads, head, stored, blocks }
}

impl Setting {
    /// Attention of the queries at positions `from..`, cut into pieces of `piece`.
    fn attend(&self, cpu: &mut Cpu, q: &[f32], from: usize, piece: usize, window: Option<usize>) -> Vec<f32> {
        let width = self.heads * self.head;
        let mut out = vec![f32::NAN; q.len()];
        let rows = q.len() / width;
        let queries: Vec<Queries<'_>> = (0..rows)
            .step_by(piece)
            .map(|first_row| Queries {
                blocks: &self.blocks,
                position: from + first_row,
                count: piece.min(rows - first_row),
                first_row,
                window,
            })
            .collect();
        cpu.attend(&self.kv, 1, &queries, self.heads, (q, width), &mut out);
        out
    }

    /// In f64, straight from the formula.
    fn formula(&self, q: &[f32], from: usize, window: Option<usize>) -> Vec<f64> {
        let width = self.heads * self.head;
        let mut out = Vec::new();
        for (i, q) in q.chunks(width).enumerate() {
            let end = from + i + 1;
            let begin = window.map_or(0, |w| end.saturating_sub(w));
            for (h, q) in q.chunks(self.head).enumerate() {
                let at = h / (self.heads / self.kv_heads) * self.head;
                let seen = &self.stored[begin..end];
                let scores: Vec<f64> = seen
                    .iter()
                    .map(|(k, _)| q.iter().zip(&k[at..]).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum())
                    .collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for d in 0..self.head {
                    let x: f64 = weights.iter().zip(seen).map(|(w, (_, v))| w * f64::from(v[at + d])).sum();
                    out.push(x / sum);
                }
            }
        }
        out
    }
}

#[test]
fn attention_is_the_formula_on_every_instruction_set() {
    for (heads, kv_heads, head) in [(9, 3, 64), (4, 4, 16), (2, 1, 24), (8, 1, 128), (2, 2, 80)] {
        for element in [KvElement::F32, KvElement::F16] {
            let s = setting(element, heads, kv_heads, head, 75);
            let q = Numbers::new(1).floats(40 * heads * head);
            for window in [None, Some(1), Some(20), Some(1000)] {
                let formula = s.formula(&q, 35, window);
                let mut first = Cpu::with_isa(1, Isa::Portable).unwrap();
                let expected = s.attend(&mut first, &q, 35, 40, window);
                for (got, want) in expected.iter().zip(&formula) {
                    assert!((f64::from(*got) - want).abs() < 1e-5, "{got} {want}");
                }
                for isa in Isa::available() {
                    for (threads, piece) in [(1, 1), (2, 7), (3, 40)] {
                        let mut cpu = Cpu::with_isa(threads, isa).unwrap();
                        let got = s.attend(&mut cpu, &q, 35, piece, window);
                        let what = format!("{heads}/{kv_heads}x{head} {element:?} {window:?} {}", isa.name());
                        assert_bits(&got, &expected, &what);
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Neither pieces nor how much follows in the cache matter.
    #[test]
    fn cuts_do_not_matter(length in 1usize..200, piece in 1usize..50, from in 0usize..200, window in proptest::option::of(1usize..100)) {
        let from = from % length;
        let s = setting(KvElement::F32, 6, 2, 32, length);
        let q = Numbers::new(9).floats((length - from) * 6 * 32);
        let mut cpu = Cpu::new(2).unwrap();
        let whole = s.attend(&mut cpu, &q, from, length, window);
        let cut = s.attend(&mut cpu, &q, from, piece, window);
        assert_bits(&cut, &whole, "cut");
        let shorter = setting(KvElement::F32, 6, 2, 32, from + 1);
        let mut same = shorter.kv;
        for (position, (k, v)) in s.stored[..=from].iter().enumerate() {
            same.store(1, shorter.blocks[position / 16], position % 16, k, v);
        }
        let shorter = Setting { kv: same, ..shorter };
        let first = shorter.attend(&mut cpu, &q[..6 * 32], from, 1, window);
        assert_bits(&first, &whole[..6 * 32], "what follows");
    }
}

#[test]
#[should_panic(expected = "positions without a block")]
fn a_query_beyond_its_blocks_is_refused() {
    let s = setting(KvElement::F32, 2, 1, 16, 16);
    s.attend(&mut Cpu::new(1).unwrap(), &[0.0; 32], 16, 1, None);
}
