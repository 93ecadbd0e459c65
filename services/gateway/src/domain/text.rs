//! From tokens to the text that a client may see.
//!
//! A stop string belongs to the tokens (section 5: the last token completes it) and not to the text: it
//! is cut off, and in a stream nothing is shown that might still become one.

use infera_prompt::{Tokenizer, Utf8Stream};

/// Turns tokens into visible text, piece by piece.
#[derive(Debug)]
pub struct TextStream {
    bytes: Utf8Stream,
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl TextStream {
    /// Text that ends before the first of `stops`.
    pub fn new(stops: Vec<String>) -> Self {
        Self { bytes: Utf8Stream::default(), stops, held: String::new(), stopped: false }
    }

    /// The text that `tokens` make visible: may be empty.
    pub fn push(&mut self, tokenizer: &Tokenizer, tokens: &[u32]) -> String {
        let mut shown = String::new();
        // Token by token: the first token to complete a stop string decides where the text is cut.
        for token in tokens {
            let text = self.bytes.push(tokenizer.token_bytes(*token));
            shown.push_str(&self.show(&text));
        }
        shown
    }

    /// What is left at the end.
    pub fn finish(&mut self) -> String {
        let rest = self.bytes.finish();
        let mut text = self.show(&rest);
        if !self.stopped {
            text.push_str(&std::mem::take(&mut self.held));
        }
        text
    }

    fn show(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(end) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.stopped = true;
            self.held.truncate(end);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }
}

/// Length in bytes of the longest end of `text` that `stop` begins with.
fn overlap(text: &str, stop: &str) -> usize {
    let bytes = text.as_bytes();
    (1..stop.len().min(bytes.len() + 1)).rev().find(|&n| bytes.ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
}

/// The visible text of a whole answer.
pub fn visible(tokenizer: &Tokenizer, tokens: &[u32], stops: &[String]) -> String {
    let mut stream = TextStream::new(stops.to_vec());
    let mut text = stream.push(tokenizer, tokens);
    text.push_str(&stream.finish());
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shown(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String) {
        let mut stream = TextStream::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let steps = pieces.iter().map(|piece| stream.show(piece)).collect();
        (steps, stream.finish())
    }

    #[test]
    fn without_stops_nothing_is_held() {
        assert_eq!(shown(&[], &["a", "", "b"]), (vec!["a".into(), "".into(), "b".into()], String::new()));
    }

    #[test]
    fn a_stop_over_several_pieces_is_never_shown() {
        let (steps, rest) = shown(&["END"], &["hi E", "N", "D and more", "x"]);
        assert_eq!(steps, ["hi ", "", "", ""]);
        assert_eq!(rest, "");
    }

    #[test]
    fn what_only_began_as_a_stop_is_shown_later() {
        let (steps, rest) = shown(&["END"], &["E", "NE", "X"]);
        assert_eq!(steps, ["", "EN", "EX"]);
        assert_eq!(rest, "");
        assert_eq!(shown(&["END"], &["EN"]).1, "EN");
    }

    #[test]
    fn the_earliest_of_several_stops_counts() {
        assert_eq!(shown(&["c", "b"], &["abc"]).0, ["a"]);
        assert_eq!(shown(&["é!"], &["caf", "é", "!"]).0, ["caf", "", ""]);
    }

    proptest! {
        #[test]
        fn the_first_piece_to_complete_a_stop_decides(
            pieces in proptest::collection::vec("[ab\u{e9}]{0,4}", 0..8),
            stops in proptest::collection::vec("[ab\u{e9}]{1,3}", 0..3),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let mut whole = String::new();
            for piece in &pieces {
                whole.push_str(piece);
                if let Some(end) = stops.iter().filter_map(|stop| whole.find(stop)).min() {
                    whole.truncate(end);
                    break;
                }
            }
            let (steps, rest) = shown(&stops, &pieces);
            prop_assert_eq!(steps.concat() + &rest, whole);
        }
    }
}
