//! Stop strings: where a text ends (section 5: the last token is the first to complete a stop string).

/// Watches a generated text for the first stop string, across the borders of tokens. Works on bytes, so that a stop
/// string is found whatever the tokens split.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<Vec<u8>>,
    /// The end of the text, one byte shorter than the longest stop string.
    tail: Vec<u8>,
    /// Bytes before the tail.
    before: usize,
}

impl StopMatcher {
    /// A matcher for `stops`; empty strings never match.
    #[must_use]
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|s| !s.is_empty()).map(|s| s.as_bytes().to_vec()).collect();
        Self { stops, tail: Vec::new(), before: 0 }
    }

    /// Takes the bytes of the next token. Some(n) if they complete a stop string for the first time: n is how many bytes
    /// of the whole text stand before it, the earliest one if several are completed.
    pub fn push(&mut self, bytes: &[u8]) -> Option<usize> {
        let longest = self.stops.iter().map(Vec::len).max()?;
        self.tail.extend_from_slice(bytes);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.tail.windows(stop.len()).position(|w| w == stop.as_slice()))
            .min();
        if let Some(at) = found {
            return Some(self.before + at);
        }
        let drop = self.tail.len().saturating_sub(longest - 1);
        self.tail.drain(..drop);
        self.before += drop;
        None
    }

    /// How many bytes at the end of the text so far could be the beginning of a stop string: a stream holds them back.
    #[must_use]
    pub fn held_back(&self) -> usize {
        (1..=self.tail.len())
            .rev()
            .find(|n| {
                let end = &self.tail[self.tail.len() - n..];
                self.stops.iter().any(|s| s.len() > *n && s.starts_with(end))
            })
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matcher(stops: &[&str]) -> StopMatcher {
        StopMatcher::new(&stops.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn finds_a_stop_across_tokens() {
        let mut m = matcher(&["END", "\n\n"]);
        assert_eq!(m.push(b"abc E"), None);
        assert_eq!(m.held_back(), 1);
        assert_eq!(m.push(b"N"), None);
        assert_eq!(m.held_back(), 2);
        assert_eq!(m.push(b"x\n"), None);
        assert_eq!(m.push(b"\nD"), Some(7));
    }

    #[test]
    fn the_earliest_of_several_wins() {
        assert_eq!(matcher(&["cd", "bcde"]).push(b"abcdef"), Some(1));
        assert_eq!(matcher(&[""]).push(b"abc"), None);
        assert_eq!(matcher(&[]).push(b"abc"), None);
    }

    proptest! {
        #[test]
        fn agrees_with_a_search_of_the_whole_text(
            pieces in prop::collection::vec("[ab]{0,4}", 0..20), stops in prop::collection::vec("[ab]{1,5}", 0..3),
        ) {
            let mut m = StopMatcher::new(&stops);
            let mut text = String::new();
            for piece in &pieces {
                text.push_str(piece);
                let expected = stops.iter().filter_map(|s| text.find(s.as_str())).min();
                let got = m.push(piece.as_bytes());
                prop_assert_eq!(got, expected);
                if got.is_some() { break; }
                let held = (1..=text.len()).rev()
                    .find(|n| stops.iter().any(|s| s.len() > *n && s.starts_with(&text[text.len() - n..])));
                prop_assert_eq!(m.held_back(), held.unwrap_or(0));
            }
        }
    }
}
