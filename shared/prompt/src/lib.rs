//! Text to token ids and back, as the model's own files say: tokenizer and chat template, without libtorch.
//!
//! A model is a GGUF file or a directory as transformers writes it. The gateway renders a chat once with
//! [`Prompt::render`]; from then on the request is token ids. Nodes, verifier and `infera verify` turn tokens back into
//! text with the same crate.
//!
//! # Messages cannot speak for the template
//!
//! A user may write `<|im_end|>`. Rendering puts a character that occurs nowhere else inside each spelling of a control
//! token in a message, and at an end of the message whose letter could belong to a control token that the template's
//! text next to it completes. Control tokens are then looked for in the whole rendered text: those of the template are
//! found, those of a message are broken by the mark and stay letters. The marks are taken out before the text between
//! control tokens is tokenised, in one piece, so that a chat without such spellings gets exactly the ids that
//! transformers gives.
//!
//! Tokens that are found in text but are not control tokens (Qwen's `<think>`, Gemma's runs of spaces) are text like
//! any other. A control token of one letter, or with white space at an end, could not be told from text: such ones are
//! never found, not in the template either.
//!
//! # The first token
//!
//! transformers leaves it to the template to write the token that begins a text, and so does a model directory here. A
//! GGUF file may be made for llama.cpp, which adds it: where the file says so and the template does not begin with it,
//! it is added, so that it is there once.
//!
//! # Files from anybody
//!
//! Whatever a file claims is checked before memory is taken for it; the limits are the `MAX_` constants of this crate.

mod decode;
mod directory;
mod error;
pub mod gguf;
mod stop;
mod template;
mod tokenizer;

use std::path::Path;

pub use decode::{StreamDecoder, Utf8Stream};
pub use directory::{MAX_CONFIG_FILE_BYTES, MAX_TOKENIZER_FILE_BYTES};
pub use error::PromptError;
pub use stop::StopMatcher;
pub use template::{
    BUILT_PER_BYTE, FUEL_PER_MESSAGE, MAX_BUILT_BYTES, MAX_FUEL, MAX_RECURSION, MAX_TEMPLATE_BYTES, Message,
};
pub use tokenizer::{
    MAX_MARK_BYTES, MAX_MERGES, MAX_TOKEN_BYTES, MAX_VOCABULARY, MAX_VOCABULARY_BYTES, Tokenizer,
};

use gguf::Gguf;
use template::{Names, Template, is_space};

const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

/// Everything between text and token ids for one model. Cheap to share in an `Arc`; loading takes about 0.1 s.
#[derive(Debug)]
pub struct Prompt {
    tokenizer: Tokenizer,
    template: Template,
    template_hash: [u8; 32],
    source: String,
    context_length: u32,
    adds_bos: bool,
}

/// Milliseconds since 1970.
fn now_ms() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.ok().and_then(|d| i64::try_from(d.as_millis()).ok()).unwrap_or(0)
}

impl Prompt {
    /// Reads tokenizer and chat template of the GGUF file or model directory at `path`; the weights are not touched.
    ///
    /// # Errors
    /// Neither a GGUF file nor a directory with `config.json` and `tokenizer.json`, no chat template, or a tokenizer of
    /// a kind that this crate does not build.
    pub fn load(path: &Path) -> Result<Self, PromptError> {
        if path.is_dir() { Self::from_directory(path) } else { Self::new(&Gguf::open(path)?) }
    }

    /// Reads `config.json`, `tokenizer.json`, and what there is of `tokenizer_config.json`, `chat_template.jinja` and
    /// `generation_config.json`.
    ///
    /// # Errors
    /// See [`Prompt::load`].
    pub fn from_directory(path: &Path) -> Result<Self, PromptError> {
        let model = directory::load(path)?;
        Ok(Self {
            template: Template::new(&model.template, model.names)?,
            template_hash: blake3::hash(model.template.as_bytes()).into(),
            source: model.template,
            context_length: model.context_length,
            tokenizer: model.tokenizer,
            adds_bos: false,
        })
    }

    /// What a header describes.
    ///
    /// # Errors
    /// See [`Prompt::load`].
    pub fn new(gguf: &Gguf) -> Result<Self, PromptError> {
        let tokenizer = Tokenizer::new(gguf)?;
        let source = gguf.string("tokenizer.chat_template")?;
        let architecture = gguf.string("general.architecture")?;
        let name = |key: &str| {
            let id = gguf.u32(&format!("tokenizer.ggml.{key}_token_id")).ok()?;
            tokenizer.name(id).map(str::to_owned)
        };
        let names = Names {
            bos: tokenizer.bos_name().map(str::to_owned),
            eos: name("eos"),
            pad: name("padding"),
            unk: name("unknown"),
        };
        Ok(Self {
            template: Template::new(source, names)?,
            template_hash: blake3::hash(source.as_bytes()).into(),
            source: source.to_owned(),
            context_length: gguf.u32(&format!("{architecture}.context_length"))?,
            adds_bos: tokenizer.leading_bos().is_some(),
            tokenizer,
        })
    }

    /// Token ids of a chat, ending where the assistant's answer begins. Templates that write the day write today's, UTC.
    ///
    /// # Errors
    /// No messages, an unknown role, or messages that the model's template refuses.
    pub fn render(&self, messages: &[Message]) -> Result<Vec<u32>, PromptError> {
        self.render_at(messages, now_ms())
    }

    /// Like [`Prompt::render`], on the day of `now_ms`: milliseconds since 1970.
    ///
    /// # Errors
    /// See [`Prompt::render`].
    pub fn render_at(&self, messages: &[Message], now_ms: i64) -> Result<Vec<u32>, PromptError> {
        check(messages)?;
        let mark = self.free_mark(messages)?;
        let marked: Vec<Message> = messages
            .iter()
            .map(|m| Message::new(m.role.clone(), self.with_marks(&m.content, mark)))
            .collect();
        self.tokenise(&self.template.render(&marked, now_ms)?, mark)
    }

    /// The text of a chat as the template writes it, control tokens spelled out: what transformers'
    /// `apply_chat_template(tokenize=False, add_generation_prompt=True)` gives. For people and tests: this text does not
    /// tell a message's letters from the template's tokens.
    ///
    /// # Errors
    /// See [`Prompt::render`].
    pub fn render_text_at(&self, messages: &[Message], now_ms: i64) -> Result<String, PromptError> {
        check(messages)?;
        self.template.render(messages, now_ms)
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

    /// `content` with marks where it could otherwise be taken for the template's. White space stays at its ends, where
    /// templates strip it.
    fn with_marks(&self, content: &str, mark: char) -> String {
        let (control, body) = (self.tokenizer.control(), content.trim_matches(is_space));
        let (Some(first), Some(last)) = (body.chars().next(), body.chars().next_back()) else {
            return content.into();
        };
        let start = content.len() - content.trim_start_matches(is_space).len();
        let broken = control.starts(body);
        let mut out = String::with_capacity(content.len() + 8 + 4 * broken.len());
        out.push_str(&content[..start]);
        out.extend(control.continues_with(first).then_some(mark));
        let mut done = 0;
        for at in broken {
            let next = at + body[at..].chars().next().map_or(0, char::len_utf8);
            out.push_str(&body[done..next]);
            out.push(mark);
            done = next;
        }
        out.push_str(&body[done..]);
        out.extend(control.continues_after(last).then_some(mark));
        out.push_str(&content[start + body.len()..]);
        out
    }

    fn tokenise(&self, rendered: &str, mark: char) -> Result<Vec<u32>, PromptError> {
        let mut ids: Vec<u32> = Vec::new();
        let control = self.tokenizer.control();
        let mut rest = rendered;
        let mut first = true;
        loop {
            let found = control.first(rest);
            let plain = found.map_or(rest, |(start, _, _)| &rest[..start]);
            self.tokenizer.encode_into(&plain.replace(mark, ""), first, &mut ids)?;
            let Some((_, end, token)) = found else { break };
            ids.push(token);
            rest = &rest[end..];
            first = false;
        }
        match self.tokenizer.leading_bos() {
            Some(bos) if self.adds_bos && ids.first() != Some(&bos) => ids.insert(0, bos),
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

    /// The tokenizer, without the rest.
    #[must_use]
    pub fn into_tokenizer(self) -> Tokenizer {
        self.tokenizer
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

fn check(messages: &[Message]) -> Result<(), PromptError> {
    if messages.is_empty() {
        return Err(PromptError::NoMessages);
    }
    match messages.iter().position(|m| !ROLES.contains(&m.role.as_str())) {
        Some(index) => Err(PromptError::Role { index, role: messages[index].role.clone() }),
        None => Ok(()),
    }
}
