//! GGUF headers made here.

use std::path::PathBuf;

pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/it/fixtures").join(name)
}

pub fn string(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

pub fn header(version: u32, tensors: u64, entries: u64) -> Vec<u8> {
    [&b"GGUF"[..], &version.to_le_bytes(), &tensors.to_le_bytes(), &entries.to_le_bytes()].concat()
}

pub fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut out = string(name);
    out.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
    out.extend(kind.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out
}

/// Metadata in the making.
#[derive(Default)]
pub struct Metadata {
    entries: u64,
    bytes: Vec<u8>,
}

impl Metadata {
    fn key(&mut self, key: &str, kind: u32) {
        self.entries += 1;
        self.bytes.extend(string(key));
        self.bytes.extend(kind.to_le_bytes());
    }

    pub fn text(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        self.bytes.extend(string(value));
    }

    pub fn number(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.bytes.extend(value.to_le_bytes());
    }

    pub fn flag(&mut self, key: &str, value: bool) {
        self.key(key, 7);
        self.bytes.push(value.into());
    }

    fn array(&mut self, key: &str, kind: u32, count: usize) {
        self.key(key, 9);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((count as u64).to_le_bytes());
    }

    pub fn texts(&mut self, key: &str, values: &[String]) {
        self.array(key, 8, values.len());
        values.iter().for_each(|v| self.bytes.extend(string(v)));
    }

    pub fn numbers(&mut self, key: &str, values: &[i32]) {
        self.array(key, 5, values.len());
        values.iter().for_each(|v| self.bytes.extend(v.to_le_bytes()));
    }

    pub fn floats(&mut self, key: &str, values: &[f32]) {
        self.array(key, 6, values.len());
        values.iter().for_each(|v| self.bytes.extend(v.to_le_bytes()));
    }

    pub fn file(&self) -> Vec<u8> {
        [header(3, 0, self.entries), self.bytes.clone()].concat()
    }
}

/// A tokenizer in the making: tokens, their kinds, and merges (gpt2) or scores (llama).
pub struct Vocabulary {
    pub model: &'static str,
    pub pre: &'static str,
    pub tokens: Vec<(String, i32)>,
    pub merges: Vec<String>,
    pub scores: Vec<f32>,
    pub bos: Option<u32>,
    pub eos: u32,
    pub add_bos: Option<bool>,
}

impl Vocabulary {
    /// The control tokens, then one letter for each byte of ASCII; the first is bos, the last control token eos.
    pub fn small(control: &[&str]) -> Self {
        let mut tokens: Vec<(String, i32)> = control.iter().map(|c| ((*c).to_owned(), 3)).collect();
        tokens.extend(('!'..='~').chain(['Ġ', 'Ċ']).map(|c| (c.to_string(), 1)));
        let (bos, eos) = (Some(0), control.len() as u32 - 1);
        Self { model: "gpt2", pre: "gpt-2", tokens, merges: vec![], scores: vec![], bos, eos, add_bos: None }
    }

    pub fn metadata(&self, template: &str) -> Metadata {
        let mut m = Metadata::default();
        m.text("general.architecture", "llama");
        m.number("llama.context_length", 2048);
        m.text("tokenizer.ggml.model", self.model);
        m.text("tokenizer.ggml.pre", self.pre);
        m.texts("tokenizer.ggml.tokens", &self.tokens.iter().map(|t| t.0.clone()).collect::<Vec<_>>());
        m.numbers("tokenizer.ggml.token_type", &self.tokens.iter().map(|t| t.1).collect::<Vec<_>>());
        if self.model == "gpt2" {
            m.texts("tokenizer.ggml.merges", &self.merges);
        } else {
            m.floats("tokenizer.ggml.scores", &self.scores);
        }
        self.bos.into_iter().for_each(|bos| m.number("tokenizer.ggml.bos_token_id", bos));
        m.number("tokenizer.ggml.eos_token_id", self.eos);
        self.add_bos.into_iter().for_each(|add| m.flag("tokenizer.ggml.add_bos_token", add));
        m.text("tokenizer.chat_template", template);
        m
    }

    pub fn gguf(&self, template: &str) -> Vec<u8> {
        self.metadata(template).file()
    }
}

/// A header with this template and these special tokens.
pub fn gguf_with_template(template: &str, bos: Option<&str>, eos: Option<&str>) -> Vec<u8> {
    let control: Vec<&str> = bos.into_iter().chain(eos).collect();
    let mut vocabulary = Vocabulary::small(&control);
    vocabulary.bos = bos.map(|_| 0);
    vocabulary.gguf(template)
}
