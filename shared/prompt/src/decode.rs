//! Token ids to text.

use crate::tokenizer::Tokenizer;

/// Turns a stream of tokens into text, giving out complete characters only. Bytes that are no UTF-8 become U+FFFD, one
/// for each sequence that `String::from_utf8_lossy` would replace.
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    bytes: Utf8Stream,
}

/// The part of a decoder that does not borrow the tokenizer: bytes in, complete characters out.
#[derive(Debug, Default, Clone)]
pub struct Utf8Stream {
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// The characters that `bytes` completes.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut out = String::new();
        let mut done = 0;
        for chunk in self.pending.utf8_chunks() {
            out.push_str(chunk.valid());
            done += chunk.valid().len();
            let rest = chunk.invalid();
            if rest.is_empty() {
                continue;
            }
            // A sequence that is cut off by the end may still be completed; anything else never will.
            let cut_off = done + rest.len() == self.pending.len()
                && std::str::from_utf8(rest).is_err_and(|e| e.error_len().is_none());
            if cut_off {
                break;
            }
            out.push('\u{FFFD}');
            done += rest.len();
        }
        self.pending.drain(..done);
        out
    }

    /// What is left at the end: empty or one U+FFFD.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }
}

impl<'a> StreamDecoder<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, bytes: Utf8Stream::default() }
    }

    /// The text that `token` completes: may be empty.
    pub fn push(&mut self, token: u32) -> String {
        self.bytes.push(self.tokenizer.token_bytes(token))
    }

    /// What is left at the end.
    pub fn finish(&mut self) -> String {
        self.bytes.finish()
    }
}

impl Tokenizer {
    /// The text of `tokens`; control tokens add nothing.
    #[must_use]
    pub fn decode(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|t| self.token_bytes(*t)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A decoder for a stream of tokens.
    #[must_use]
    pub fn stream_decoder(&self) -> StreamDecoder<'_> {
        StreamDecoder::new(self)
    }
}
