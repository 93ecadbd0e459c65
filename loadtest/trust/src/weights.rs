//! Draws by weight from thousands, in a dozen steps each.

/// Sums of weights (a Fenwick tree), so that a draw takes a dozen steps. Drawing one after the other by weight is the
/// order of `assignment::draw`: the lowest of exponential clocks.
pub struct Weights {
    sums: Vec<u64>,
    values: Vec<u32>,
}

impl Weights {
    pub fn new(count: usize) -> Self {
        Self { sums: vec![0; count + 1], values: vec![0; count] }
    }

    pub fn push(&mut self) {
        let at = self.sums.len();
        let low = at & at.wrapping_neg();
        let covered: u64 = (at - low + 1..at).map(|i| u64::from(self.values[i - 1])).sum();
        self.sums.push(covered);
        self.values.push(0);
    }

    pub fn set(&mut self, at: usize, weight: u32) {
        let old = std::mem::replace(&mut self.values[at], weight);
        let mut i = at + 1;
        while i < self.sums.len() {
            self.sums[i] = self.sums[i] + u64::from(weight) - u64::from(old);
            i += i & i.wrapping_neg();
        }
    }

    pub fn total(&self) -> u64 {
        let mut i = self.values.len();
        let mut sum = 0;
        while i > 0 {
            sum += self.sums[i];
            i -= i & i.wrapping_neg();
        }
        sum
    }

    /// Where the sum of weights passes `point`.
    pub fn find(&self, mut point: u64) -> usize {
        let mut at = 0;
        let mut step = self.values.len().next_power_of_two();
        while step > 0 {
            if at + step < self.sums.len() && self.sums[at + step] <= point {
                at += step;
                point -= self.sums[at];
            }
            step /= 2;
        }
        at
    }
}
