//! Text to token ids and back, as the model's own GGUF file says: tokenizer and chat template, without libtorch.
//!
//! The gateway renders a chat once with [`Prompt::render`]; from then on the request is token ids. Nodes, verifier and
//! `infera verify` turn tokens back into text with the same crate.
//!
//! # Messages cannot speak for the template
//!
//! A user may write `<|im_end|>`. Rendering marks every message with a character that occurs nowhere else: at both ends
//! of its text, and inside each spelling of a control token. Control tokens are then looked for in the whole rendered
//! text: those of the template are found, those of a message are broken by the mark and stay letters. The marks are
//! taken out before the text between control tokens is tokenised, in one piece, so that a chat without such spellings
//! gets exactly the ids that transformers gives.

mod decode;
mod error;
pub mod gguf;
mod stop;
mod template;
mod tokenizer;

use std::path::Path;

pub use decode::{StreamDecoder, Utf8Stream};
pub use error::PromptError;
pub use stop::StopMatcher;
pub use template::Message;
pub use tokenizer::Tokenizer;

use gguf::Gguf;
use template::Template;

const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

/// Everything between text and token ids for one model. Cheap to share in an `Arc`; loading takes about 0.1 s.
#[derive(Debug)]
pub struct Prompt {
    tokenizer: Tokenizer,
    template: Template,
    template_hash: [u8; 32],
    source: String,
    context_length: u32,
}

impl Prompt {
    /// Reads tokenizer and chat template of the GGUF file at `path`; the weights are not touched.
    ///
    /// # Errors
    /// The file is no GGUF, has no chat template, or a tokenizer of a kind that this crate does not build.
    pub fn load(path: &Path) -> Result<Self, PromptError> {
        Self::new(&Gguf::open(path)?)
    }

    /// What a header describes.
    ///
    /// # Errors
    /// See [`Prompt::load`].
    pub fn new(gguf: &Gguf) -> Result<Self, PromptError> {
        let tokenizer = Tokenizer::new(gguf)?;
        let source = gguf.string("tokenizer.chat_template")?;
        let architecture = gguf.string("general.architecture")?;
        let eos = gguf.u32("tokenizer.ggml.eos_token_id").ok().and_then(|e| tokenizer.name(e)).unwrap_or("");
        Ok(Self {
            template: Template::new(source, tokenizer.bos_name(), eos)?,
            template_hash: blake3::hash(source.as_bytes()).into(),
            source: source.to_owned(),
            context_length: gguf.u32(&format!("{architecture}.context_length"))?,
            tokenizer,
        })
    }

    /// Token ids of a chat, ending where the assistant's answer begins.
    ///
    /// # Errors
    /// No messages, an unknown role, or messages that the model's template refuses.
    pub fn render(&self, messages: &[Message]) -> Result<Vec<u32>, PromptError> {
        if messages.is_empty() {
            return Err(PromptError::NoMessages);
        }
        if let Some(index) = messages.iter().position(|m| !ROLES.contains(&m.role.as_str())) {
            return Err(PromptError::Role { index, role: messages[index].role.clone() });
        }
        let mark = self.free_mark(messages)?;
        let marked: Vec<Message> = messages
            .iter()
            .map(|m| Message::new(m.role.clone(), self.with_marks(&m.content, mark)))
            .collect();
        self.tokenise(&self.template.render(&marked)?, mark)
    }

    /// A character that neither the messages nor the template use.
    fn free_mark(&self, messages: &[Message]) -> Result<char, PromptError> {
        let mut used = std::collections::BTreeSet::new();
        let texts = messages.iter().map(|m| m.content.as_str()).chain([self.source.as_str()]);
        for text in texts {
            used.extend(text.chars().filter(|c| ('\u{F0000}'..='\u{FFFFD}').contains(c)));
        }
        ('\u{F0000}'..='\u{FFFFD}')
            .find(|c| !used.contains(c))
            .ok_or_else(|| PromptError::Template("the messages use every private character".into()))
    }

    fn with_marks(&self, content: &str, mark: char) -> String {
        let Some(first) = content.find(|c: char| !c.is_whitespace()) else { return content.into() };
        let body = content[first..].trim_end();
        let mut out = String::with_capacity(content.len() + 8);
        out.push_str(&content[..first]);
        out.push(mark);
        let control = self.tokenizer.control();
        for (at, c) in body.char_indices() {
            out.push(c);
            if control.at_start(&body[at..]).is_some() {
                out.push(mark);
            }
        }
        out.push(mark);
        out.push_str(&content[first + body.len()..]);
        out
    }

    fn tokenise(&self, rendered: &str, mark: char) -> Result<Vec<u32>, PromptError> {
        let mut ids: Vec<u32> = Vec::new();
        let control = self.tokenizer.control();
        let mut rest = rendered;
        loop {
            let found = control.first(rest);
            let plain = found.map_or(rest, |(start, _, _)| &rest[..start]);
            self.tokenizer.encode_into(&plain.replace(mark, ""), &mut ids)?;
            let Some((_, end, token)) = found else { break };
            ids.push(token);
            rest = &rest[end..];
        }
        match self.tokenizer.leading_bos() {
            Some(bos) if ids.first() != Some(&bos) => ids.insert(0, bos),
            _ => {}
        }
        Ok(ids)
    }

    /// The text of tokens; control tokens (the end among them) add nothing.
    #[must_use]
    pub fn decode(&self, tokens: &[u32]) -> String {
        self.tokenizer.decode(tokens)
    }

    /// A decoder for a stream of tokens.
    #[must_use]
    pub fn stream_decoder(&self) -> StreamDecoder<'_> {
        self.tokenizer.stream_decoder()
    }

    /// The tokenizer alone.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// BLAKE3 of the tokenizer, as the model registry lists it.
    #[must_use]
    pub fn tokenizer_hash(&self) -> [u8; 32] {
        self.tokenizer.hash()
    }

    /// BLAKE3 of the chat template's source.
    #[must_use]
    pub fn template_hash(&self) -> [u8; 32] {
        self.template_hash
    }

    /// Tokens that end a generation, ascending.
    #[must_use]
    pub fn end_tokens(&self) -> &[u32] {
        self.tokenizer.end_tokens()
    }

    /// Most tokens, prompt and answer together, that the model was made for.
    #[must_use]
    pub fn context_length(&self) -> u32 {
        self.context_length
    }

    /// Number of token ids.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size()
    }
}
