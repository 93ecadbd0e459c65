use super::*;

pub fn raw(kind: GgmlType, rows: usize, cols: usize, bytes: Vec<u8>) -> Raw {
    Raw { rows, cols, kind, bytes }
}

pub fn f16_bytes(x: f32) -> [u8; 2] {
    f16::from_f32(x).to_le_bytes()
}

/// A block with d = 0.5, m = -3 and the nibbles 0, 1, .. 15, 0, 1, .. 15.
pub fn q4_block(kind: GgmlType) -> Vec<u8> {
    let mut block = f16_bytes(0.5).to_vec();
    if kind == GgmlType::Q4_1 {
        block.extend(f16_bytes(-3.0));
    }
    block.extend((0..16u8).map(|i| i | (i << 4)));
    block
}

#[test]
fn blocks_hold_the_low_nibbles_first() {
    let q: Vec<f32> = (0..32).map(|i| (i % 16) as f32).collect();
    let got = raw(GgmlType::Q4_1, 1, 32, q4_block(GgmlType::Q4_1)).dequantise();
    assert_eq!(got, q.iter().map(|q| q * 0.5 - 3.0).collect::<Vec<_>>());
    let got = raw(GgmlType::Q4_0, 1, 32, q4_block(GgmlType::Q4_0)).dequantise();
    assert_eq!(got, q.iter().map(|q| (q - 8.0) * 0.5).collect::<Vec<_>>());
    let mut block = f16_bytes(0.25).to_vec();
    block.extend((0..32i8).map(|i| (i - 16).to_le_bytes()[0]));
    let got = raw(GgmlType::Q8_0, 1, 32, block).dequantise();
    assert_eq!(got, (0..32).map(|i| (i as f32 - 16.0) * 0.25).collect::<Vec<_>>());
    let halves: Vec<u8> = [1.5, -2.0].iter().flat_map(|x| f16_bytes(*x)).collect();
    assert_eq!(raw(GgmlType::F16, 1, 2, halves).dequantise(), [1.5, -2.0]);
    let halves: Vec<u8> = [1.5, -2.0].iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
    assert_eq!(raw(GgmlType::BF16, 1, 2, halves).dequantise(), [1.5, -2.0]);
}

#[test]
fn rows_of_heads_are_sorted_into_halves() {
    // Two heads of four rows, one number each.
    let bytes: Vec<u8> = (0..8).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let got = raw(GgmlType::F32, 8, 1, bytes).unpermute(2).dequantise();
    assert_eq!(got, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
}
