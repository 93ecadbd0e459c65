//! A model directory as transformers writes it: `config.json`, `tokenizer.json` and what lies beside them.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::PromptError;
use crate::template::{MAX_TEMPLATE_BYTES, Names};
use crate::tokenizer::{Beside, Tokenizer};

/// Largest `tokenizer.json`, in bytes. Gemma 3's has 33 MB.
pub const MAX_TOKENIZER_FILE_BYTES: u64 = 64 << 20;
/// Largest of the other JSON files. Gemma 3's `tokenizer_config.json` has 1.2 MB.
pub const MAX_CONFIG_FILE_BYTES: u64 = 8 << 20;

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl Ids {
    fn all(self) -> Vec<u32> {
        match self {
            Ids::One(id) => vec![id],
            Ids::Many(ids) => ids,
        }
    }
}

#[derive(Deserialize, Default)]
struct Config {
    max_position_embeddings: Option<u64>,
    vocab_size: Option<u64>,
    eos_token_id: Option<Ids>,
    /// Models for text and images keep the numbers of the language model here.
    text_config: Option<Box<Config>>,
}

#[derive(Deserialize, Default)]
struct GenerationConfig {
    eos_token_id: Option<Ids>,
}

/// A special token: its text, or a record with its text.
#[derive(Deserialize, Clone)]
#[serde(untagged)]
enum Special {
    Text(String),
    Record { content: String },
}

impl Special {
    fn text(self) -> String {
        match self {
            Special::Text(text) | Special::Record { content: text } => text,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Many(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Deserialize, Default)]
struct TokenizerConfig {
    bos_token: Option<Special>,
    eos_token: Option<Special>,
    pad_token: Option<Special>,
    unk_token: Option<Special>,
    #[serde(default)]
    add_bos_token: Option<bool>,
    chat_template: Option<Templates>,
}

/// What a directory holds.
pub(crate) struct Directory {
    pub tokenizer: Tokenizer,
    pub template: String,
    pub names: Names,
    pub context_length: u32,
}

fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, PromptError> {
    let failed =
        |error| PromptError::File { path: path.to_owned(), problem: format!("cannot be read: {error}") };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        let problem = format!("is larger than {limit} bytes");
        return Err(PromptError::File { path: path.to_owned(), problem });
    }
    Ok(Some(bytes))
}

fn json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, PromptError> {
    let Some(bytes) = read(path, MAX_CONFIG_FILE_BYTES)? else { return Ok(None) };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| PromptError::File { path: path.to_owned(), problem: error.to_string() })
}

fn missing<T>(path: &Path, problem: &str) -> Result<T, PromptError> {
    Err(PromptError::File { path: path.to_owned(), problem: problem.into() })
}

/// `chat_template.jinja` if there is one, else what `tokenizer_config.json` holds; of several the one named default.
fn template(path: &Path, config: Option<Templates>) -> Result<String, PromptError> {
    let file = path.join("chat_template.jinja");
    if let Some(bytes) = read(&file, MAX_TEMPLATE_BYTES as u64)? {
        return String::from_utf8(bytes).or_else(|_| missing(&file, "is not UTF-8"));
    }
    let file = path.join("tokenizer_config.json");
    match config {
        Some(Templates::One(source)) => Ok(source),
        Some(Templates::Many(all)) => match all.into_iter().find(|t| t.name == "default") {
            Some(named) => Ok(named.template),
            None => missing(&file, "has chat templates, and none is named default"),
        },
        None => missing(
            &file,
            "has no chat_template, and there is no chat_template.jinja: the model is no chat model",
        ),
    }
}

pub(crate) fn load(path: &Path) -> Result<Directory, PromptError> {
    let file = path.join("config.json");
    let Some(config) = json::<Config>(&file)? else { return missing(&file, "is missing") };
    let text = config.text_config.map(|text| *text).unwrap_or_default();
    let length = config.max_position_embeddings.or(text.max_position_embeddings);
    let length = length.and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0);
    let Some(context_length) = length else {
        return missing(&file, "has no max_position_embeddings from 1 to 2^32 - 1");
    };
    let generation = json::<GenerationConfig>(&path.join("generation_config.json"))?.unwrap_or_default();
    let words = json::<TokenizerConfig>(&path.join("tokenizer_config.json"))?.unwrap_or_default();
    let ends = [generation.eos_token_id, config.eos_token_id, text.eos_token_id];
    let names = Names {
        bos: words.bos_token.map(Special::text),
        eos: words.eos_token.map(Special::text),
        pad: words.pad_token.map(Special::text),
        unk: words.unk_token.map(Special::text),
    };
    let beside = Beside {
        ends: ends.into_iter().flatten().flat_map(Ids::all).collect(),
        end_names: names.eos.iter().cloned().collect(),
        bos: names.bos.clone(),
        add_bos: words.add_bos_token.unwrap_or(false),
        vocabulary: config.vocab_size.or(text.vocab_size),
    };
    let file = path.join("tokenizer.json");
    let Some(bytes) = read(&file, MAX_TOKENIZER_FILE_BYTES)? else { return missing(&file, "is missing") };
    let tokenizer = Tokenizer::from_json(&bytes, &beside)?;
    Ok(Directory { tokenizer, template: template(path, words.chat_template)?, names, context_length })
}
