//! The models that this gateway serves: what the registry says of them, and their tokenizers.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use infera_grammar::Vocabulary;
use infera_prompt::Prompt;
use infera_protocol::bytes::Hash32;
use infera_protocol::registry::{Model, Registry};
use infera_runtime::network;

use crate::config::Config;
use crate::error::Error;

/// A model that clients may ask for.
#[derive(Debug)]
pub struct Served {
    pub model: Model,
    pub prompt: Prompt,
    /// Its tokens, prepared for grammars.
    pub vocabulary: Vocabulary,
    /// Bytes of the longest token: a text has at least its length divided by this tokens.
    pub longest_token: usize,
}

/// Served models by id; clones share them.
#[derive(Debug, Clone)]
pub struct Catalog {
    models: Arc<BTreeMap<String, Arc<Served>>>,
}

impl Catalog {
    /// Reads registry, manifest and the tokenizers of all configured models. Takes about 0.3 s a model and
    /// blocks: call it in `spawn_blocking`.
    ///
    /// # Errors
    /// One sentence: a file that is missing, or that is not what the registry lists.
    pub fn load(config: &Config) -> Result<Self, Error> {
        let common = &config.common;
        let registries = if common.manifest_path.as_os_str().is_empty() {
            network::registries(&common.registry_path)?
        } else {
            network::load(&common.manifest_path, &common.registry_path)?.1
        };
        let registry = registries.current();
        let mut models = BTreeMap::new();
        for (id, path) in &config.models {
            models.insert(id.clone(), Arc::new(served(registry, id, path)?));
        }
        if models.is_empty() {
            tracing::warn!("no model is configured: every request will be answered with model_not_found");
        }
        Ok(Self { models: Arc::new(models) })
    }

    /// The model that clients call `id`.
    pub fn get(&self, id: &str) -> Option<Arc<Served>> {
        self.models.get(id).cloned()
    }

    /// All models, by id.
    pub fn iter(&self) -> impl Iterator<Item = &Served> {
        self.models.values().map(AsRef::as_ref)
    }
}

fn served(registry: &Registry, id: &str, path: &Path) -> Result<Served, Error> {
    let model = registry.by_id(id).ok_or_else(|| {
        let known: Vec<&str> = registry.models.iter().map(|model| model.id.as_str()).collect();
        Error::Models(format!("`models.{id}` is not in the registry, which lists {}", known.join(", ")))
    })?;
    let prompt = Prompt::load(path)
        .map_err(|error| Error::Models(format!("`models.{id}` = {}: {error}", path.display())))?;
    let differs = |what: &str, actual: String, listed: String| {
        Error::Models(format!(
            "the {what} of {} is {actual}, the registry lists {listed} for {id}: use the registered file",
            path.display()
        ))
    };
    for (what, actual, listed) in [
        ("tokenizer hash", prompt.tokenizer_hash(), model.tokenizer_hash),
        ("template hash", prompt.template_hash(), model.template_hash),
    ] {
        if Hash32(actual) != listed {
            return Err(differs(what, Hash32(actual).to_string(), listed.to_string()));
        }
    }
    if prompt.vocab_size() as u64 != u64::from(model.vocab_size) {
        return Err(differs("vocabulary", prompt.vocab_size().to_string(), model.vocab_size.to_string()));
    }
    let tokenizer = prompt.tokenizer();
    let longest_token =
        (0..model.vocab_size).map(|token| tokenizer.token_bytes(token).len()).max().unwrap_or(1).max(1);
    let vocabulary = Vocabulary::new(tokenizer, &model.end_tokens)
        .map_err(|error| Error::Models(format!("`models.{id}` = {}: {error}", path.display())))?;
    tracing::info!(model = id, context_length = model.context_length, "model is served");
    Ok(Served { model: model.clone(), prompt, vocabulary, longest_token })
}
