//! Shares with their uncertainty.

use serde::Serialize;

/// A share of `count`, with the Wilson interval of 95 %, in percent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Share {
    pub hits: usize,
    pub count: usize,
    pub pct: f64,
    pub low_pct: f64,
    pub high_pct: f64,
}

/// The 97.5 % quantile of the normal distribution.
const Z: f64 = 1.959_963_985;

impl Share {
    pub fn of(hits: usize, count: usize) -> Self {
        let n = count.max(1) as f64;
        let p = hits as f64 / n;
        let (middle, spread) =
            (p + Z * Z / (2.0 * n), Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt());
        let scale = 100.0 / (1.0 + Z * Z / n);
        let round = |x: f64| (x * 1e4).round() / 1e4;
        Self {
            hits,
            count,
            pct: round(100.0 * p),
            low_pct: round(((middle - spread) * scale).max(0.0)),
            high_pct: round(((middle + spread) * scale).min(100.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wilson's interval as in Newcombe (1998), table I: 81 of 263 and 0 of 20.
    #[test]
    fn intervals_are_those_of_the_literature() {
        let near = |a: f64, b: f64| (a - b).abs() < 0.01;
        let share = Share::of(81, 263);
        assert!(near(share.low_pct, 25.53) && near(share.high_pct, 36.62), "{share:?}");
        let none = Share::of(0, 20);
        assert!(near(none.low_pct, 0.0) && near(none.high_pct, 16.11), "{none:?}");
    }
}
