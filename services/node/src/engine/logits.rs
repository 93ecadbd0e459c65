//! What a step tells about next tokens: whole rows of logits, or what a draw needs of them.

use infera_protocol::mask::Mask;
use infera_protocol::sampling::{Candidate, Counts, MAX_TOP_K, SampleError, SamplingParams, candidates};

/// The largest logits of a row: as many as a draw may consider. A device makes them, so that a row need not be copied.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Top {
    /// Ascending token ids.
    tokens: Vec<u32>,
    /// Their logits.
    logits: Vec<f32>,
    /// The logarithm of the sum of the exponentials of all logits of the row.
    log_sum: f64,
}

impl Top {
    /// Logits that a device has to give: one more than a draw considers shows whether the last one is a tie.
    pub const WIDTH: usize = MAX_TOP_K as usize + 1;

    /// Of `found`, the [`Top::WIDTH`] largest logits of a row with their tokens, or all if there are fewer, in any order.
    /// `None` if the row has to be seen as a whole: more tokens than were found may have the least of these logits, and
    /// the draw prefers the lowest token ids.
    pub fn new(mut found: Vec<(u32, f32)>, log_sum: f32) -> Option<Self> {
        found.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if let [.., before, last] = &found[..]
            && found.len() == Self::WIDTH
        {
            if before.1 == last.1 {
                return None;
            }
            found.pop();
        }
        found.sort_by_key(|(token, _)| *token);
        let (tokens, logits) = found.into_iter().unzip();
        Some(Self { tokens, logits, log_sum: f64::from(log_sum) })
    }

    /// [`candidates`] of the row that these are the largest logits of, for parameters without bias and penalties.
    fn candidates(&self, params: &SamplingParams) -> Result<Vec<Candidate>, SampleError> {
        // Ids in order keep their order as places, so that ties are resolved as in the whole row.
        let mut found =
            candidates(&self.logits, params, &Counts::new(), None).map_err(|e| self.with_its_id(e))?;
        for candidate in &mut found {
            let raw = (f64::from(candidate.logit) - self.log_sum) as f32;
            candidate.raw_logprob = raw.min(0.0);
            candidate.token = self.tokens[candidate.token as usize];
        }
        Ok(found)
    }

    fn with_its_id(&self, error: SampleError) -> SampleError {
        match error {
            SampleError::NonFinite { token, value } => {
                SampleError::NonFinite { token: self.tokens[token as usize], value }
            }
            other => other,
        }
    }
}

/// What is known about one next token.
#[derive(Debug, Clone, Copy)]
pub(super) enum Row<'a> {
    /// All logits.
    Whole(&'a [f32]),
    Top(&'a Top),
}

/// Whether a draw with these parameters looks at more than a row's largest logits: bias, penalties and grammars bring
/// others forward.
pub(super) fn needs_all(params: &SamplingParams, has_grammar: bool) -> bool {
    has_grammar
        || !params.logit_bias.is_empty()
        || params.frequency_penalty != 0.0
        || params.presence_penalty != 0.0
}

impl<'a> Row<'a> {
    pub fn candidates(
        self,
        params: &SamplingParams,
        emitted: &Counts,
        mask: Option<&Mask>,
    ) -> Result<Vec<Candidate>, SampleError> {
        match self {
            Self::Whole(logits) => candidates(logits, params, emitted, mask),
            Self::Top(top) => top.candidates(params),
        }
    }

    /// All logits; none if only the largest are known.
    pub fn whole(self) -> &'a [f32] {
        match self {
            Self::Whole(logits) => logits,
            Self::Top(_) => &[],
        }
    }
}

/// Where a row is.
#[derive(Debug, Clone)]
pub(super) enum Place {
    /// This one of the whole rows.
    Whole(usize),
    Top(Top),
}

/// Rows of logits, in the order of the spans.
pub(super) struct Logits<'a> {
    pub rows: &'a [f32],
    pub stride: usize,
    pub vocabulary: usize,
    /// `None`: all rows are whole and in order.
    pub places: Option<&'a [Place]>,
}

impl Logits<'_> {
    pub fn row(&self, i: usize) -> Row<'_> {
        let whole = |i: usize| Row::Whole(&self.rows[i * self.stride..][..self.vocabulary]);
        match self.places.map(|places| &places[i]) {
            None => whole(i),
            Some(Place::Whole(i)) => whole(*i),
            Some(Place::Top(top)) => Row::Top(top),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As a device does it: any of equal logits may be among the largest.
    fn top(logits: &[f32], turn: usize) -> Option<Top> {
        let mut all: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
        all.rotate_left(turn % logits.len());
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        all.truncate(Top::WIDTH);
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = logits.iter().map(|z| (z - most).exp()).sum();
        Top::new(all, most + sum.ln())
    }

    proptest! {
        #[test]
        fn draws_from_the_largest_logits_are_those_from_all(
            // Steps of a quarter: many ties, at the border of the candidates too.
            steps in prop::collection::vec(-40i32..40, 1..300),
            spread in prop::sample::select(vec![0.0f32, 1e-3]),
            (turn, top_k, top_p, min_p) in (0usize..300, 1u32..=64, 0.1f32..=1.0, 0f32..0.2),
        ) {
            let logits: Vec<f32> =
                steps.iter().enumerate().map(|(i, s)| *s as f32 / 4.0 + i as f32 * spread).collect();
            let params = SamplingParams { top_k, top_p, min_p, ..SamplingParams::default() };
            let expected = candidates(&logits, &params, &Counts::new(), None).unwrap();
            if let Some(top) = top(&logits, turn) {
                let got = Row::Top(&top).candidates(&params, &Counts::new(), None).unwrap();
                prop_assert_eq!(got.len(), expected.len());
                for (got, expected) in got.iter().zip(&expected) {
                    prop_assert_eq!((got.token, got.logit), (expected.token, expected.logit));
                    prop_assert!((got.raw_logprob - expected.raw_logprob).abs() < 1e-5);
                }
            } else {
                prop_assert!(logits.len() > 64, "only a tie at the border asks for the whole row");
            }
        }
    }

    #[test]
    fn a_tie_at_the_border_asks_for_the_whole_row() {
        let mut logits: Vec<f32> = (0..100).map(|i| i as f32).collect();
        assert!(top(&logits, 0).is_some());
        logits[35] = logits[36];
        assert!(top(&logits, 0).is_none(), "the 64th and the 65th are equal");
        logits[35] = 35.0;
        logits[30] = logits[29];
        assert!(top(&logits, 0).is_some(), "beyond the border ties do not matter");
        assert!(top(&logits[..64], 3).is_some(), "all are known");
    }

    #[test]
    fn a_number_that_is_none_is_named_by_its_token() {
        let found = vec![(7, f32::NAN), (3, 1.0)];
        let error = Row::Top(&Top::new(found, 1.0).unwrap())
            .candidates(&SamplingParams::default(), &Counts::new(), None)
            .unwrap_err();
        assert!(matches!(error, SampleError::NonFinite { token: 7, .. }), "{error}");
    }

    #[test]
    fn what_brings_others_forward_asks_for_all() {
        let plain = SamplingParams::default();
        assert!(!needs_all(&plain, false));
        assert!(needs_all(&plain, true));
        assert!(needs_all(&SamplingParams { presence_penalty: 0.5, ..plain.clone() }, false));
        assert!(needs_all(&SamplingParams { frequency_penalty: -0.5, ..plain.clone() }, false));
        assert!(needs_all(&SamplingParams { logit_bias: [(3, 1.0)].into(), ..plain }, false));
    }
}
