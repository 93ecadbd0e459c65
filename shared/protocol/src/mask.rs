//! Which tokens a draw may choose: a set of token ids, one bit each.

/// Tokens of one word.
const BITS: usize = u64::BITS as usize;

/// A set of token ids. Ids at and above [`Mask::vocabulary`] are never in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    /// Bit `t % 64` of word `t / 64` is token `t`; bits beyond the vocabulary are 0.
    words: Vec<u64>,
    vocabulary: usize,
}

impl Mask {
    /// No token of a vocabulary of that size.
    #[must_use]
    pub fn none(vocabulary: usize) -> Self {
        Self { words: vec![0; vocabulary.div_ceil(BITS)], vocabulary }
    }

    /// The tokens whose bits are set: bit `t % 32` of word `t / 32` is token `t`. Missing words count as 0, bits beyond
    /// the vocabulary are ignored.
    #[must_use]
    pub fn from_u32_words(words: &[u32], vocabulary: usize) -> Self {
        let mut mask = Self::none(vocabulary);
        for (word, pair) in mask.words.iter_mut().zip(words.chunks(2)) {
            let high = pair.get(1).copied().unwrap_or(0);
            *word = u64::from(pair[0]) | u64::from(high) << 32;
        }
        let rest = vocabulary % BITS;
        if rest > 0
            && let Some(last) = mask.words.last_mut()
        {
            *last &= (1 << rest) - 1;
        }
        mask
    }

    /// Adds a token; one outside the vocabulary is left out.
    pub fn allow(&mut self, token: u32) {
        let at = token as usize;
        if at < self.vocabulary {
            self.words[at / BITS] |= 1 << (at % BITS);
        }
    }

    /// Whether the draw may choose `token`.
    #[must_use]
    pub fn allows(&self, token: u32) -> bool {
        self.word(token as usize / BITS) >> (token as usize % BITS) & 1 == 1
    }

    /// Tokens in the set.
    #[must_use]
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The size of the vocabulary that it was made for.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Tokens `64 at` to `64 at + 63`; 0 beyond the vocabulary.
    pub(crate) fn word(&self, at: usize) -> u64 {
        self.words.get(at).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_outside_the_vocabulary_is_never_allowed() {
        let mut mask = Mask::none(65);
        for token in [0, 63, 64, 65, u32::MAX] {
            mask.allow(token);
        }
        assert_eq!((mask.count(), mask.vocabulary()), (3, 65));
        assert!(mask.allows(64) && !mask.allows(65) && !mask.allows(u32::MAX) && !mask.allows(1));
        assert_eq!(Mask::from_u32_words(&[u32::MAX; 9], 65).count(), 65);
        assert_eq!(Mask::from_u32_words(&[u32::MAX], 65).count(), 32);
        assert_eq!(Mask::from_u32_words(&[], 0).count(), 0);
    }

    proptest! {
        #[test]
        fn words_mean_the_same_bits(words in prop::collection::vec(any::<u32>(), 0..8), vocabulary in 0usize..300) {
            let mask = Mask::from_u32_words(&words, vocabulary);
            let mut one_by_one = Mask::none(vocabulary);
            for token in 0..words.len() * 32 {
                if words[token / 32] >> (token % 32) & 1 == 1 {
                    one_by_one.allow(token as u32);
                }
            }
            prop_assert_eq!(mask, one_by_one);
        }
    }
}
