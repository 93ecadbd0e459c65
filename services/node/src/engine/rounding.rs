//! Cheaper weights, for tests of the network alone: how well does it notice that a node rounds its model?
//!
//! A cheater who wants to be fast and unseen keeps the embedding, which is mostly the head too, as it is: that is what
//! makers of small files do. So every matrix of the layers is rounded, nothing else.

use half::f16;
use infera_prompt::gguf::GgmlType;

use super::quant::{GROUP, Raw};

/// How far the matrices of the layers are rounded when the model is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// 8 values in each group of 32 weights.
    ThreeBits,
    /// 4 values in each group of 32 weights.
    TwoBits,
}

/// Shares of a group's range that are tried: outliers may be cut off for a finer grid.
const SPANS: [f32; 5] = [1.0, 0.9, 0.8, 0.7, 0.6];

impl Rounding {
    /// The highest number that a weight may be stored as.
    fn most(self) -> f32 {
        match self {
            Self::ThreeBits => 7.0,
            Self::TwoBits => 3.0,
        }
    }
}

/// `value = q * scale + min`, scale and minimum as Q4_1 stores them.
struct Grid {
    scale: f16,
    min: f16,
    most: f32,
}

impl Grid {
    /// The share `span` of the range of `values`, around its middle.
    fn over(values: &[f32], span: f32, most: f32) -> Self {
        let low = values.iter().copied().fold(f32::INFINITY, f32::min);
        let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (middle, half) = ((low + high) / 2.0, (high - low) / 2.0 * span);
        Self { scale: f16::from_f32(2.0 * half / most), min: f16::from_f32(middle - half), most }
    }

    fn nearest(&self, value: f32) -> f32 {
        let scale = self.scale.to_f32();
        if scale > 0.0 { ((value - self.min.to_f32()) / scale).round().clamp(0.0, self.most) } else { 0.0 }
    }

    fn error(&self, values: &[f32]) -> f32 {
        let (scale, min) = (self.scale.to_f32(), self.min.to_f32());
        values.iter().map(|v| (self.nearest(*v) * scale + min - v).powi(2)).sum()
    }

    /// A block of Q4_1.
    fn encode(&self, values: &[f32], out: &mut Vec<u8>) {
        out.extend_from_slice(&self.scale.to_le_bytes());
        out.extend_from_slice(&self.min.to_le_bytes());
        let (low, high) = values.split_at(GROUP / 2);
        out.extend(low.iter().zip(high).map(|(l, h)| self.nearest(*l) as u8 | (self.nearest(*h) as u8) << 4));
    }
}

impl Raw {
    /// Every group of [`GROUP`] weights on a grid of fewer values, as Q4_1: never larger than what it was.
    pub fn rounded(self, rounding: Rounding) -> Self {
        let most = rounding.most();
        let values = self.dequantise();
        let mut bytes = Vec::with_capacity(values.len() / GROUP * 20);
        for group in values.chunks_exact(GROUP) {
            let grids = SPANS.map(|span| Grid::over(group, span, most));
            let best = grids.iter().min_by(|a, b| a.error(group).total_cmp(&b.error(group)));
            if let Some(grid) = best {
                grid.encode(group, &mut bytes);
            }
        }
        Self { kind: GgmlType::Q4_1, bytes, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn distinct(values: &[f32]) -> usize {
        values.iter().map(|v| v.to_bits()).collect::<std::collections::BTreeSet<_>>().len()
    }

    #[test]
    fn groups_keep_few_values_near_their_own() {
        let values: Vec<f32> = (0..128).map(|i| libm::sinf(i as f32 * 1.7) * (1 + i / 32) as f32).collect();
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let raw = Raw { rows: 2, cols: 64, kind: GgmlType::F32, bytes };
        let error = |rounded: &[f32]| -> f32 {
            values.iter().zip(rounded).map(|(a, b)| (a - b).powi(2)).sum::<f32>()
        };
        // Half a step at most, each: a grid over the whole range is among those that are tried.
        let most = |values_of_a_group: f32| -> f32 {
            (1..=4).map(|range| 32.0 * (range as f32 / (values_of_a_group - 1.0)).powi(2)).sum()
        };
        let (three, two) = (
            raw.clone().rounded(Rounding::ThreeBits).dequantise(),
            raw.rounded(Rounding::TwoBits).dequantise(),
        );
        for (rounded, count) in [(&three, 8), (&two, 4)] {
            assert_eq!(rounded.len(), values.len());
            assert!(rounded.chunks_exact(GROUP).all(|group| (2..=count).contains(&distinct(group))));
            assert!(error(rounded) < most(count as f32), "{} with {count} values", error(rounded));
        }
        assert!(error(&three) * 3.0 < error(&two), "{} {}", error(&three), error(&two));
    }

    #[test]
    fn equal_weights_stay_equal() {
        let bytes = [0.5f32; 32].iter().flat_map(|v| v.to_le_bytes()).collect();
        let raw = Raw { rows: 1, cols: 32, kind: GgmlType::F32, bytes };
        assert_eq!(raw.rounded(Rounding::TwoBits).dequantise(), vec![0.5; 32]);
    }
}
