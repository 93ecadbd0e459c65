//! The models that this gateway serves: what the registry says of them, and their tokenizers.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use infera_grammar::Vocabulary;
use infera_prompt::Prompt;
use infera_protocol::bytes::Hash32;
use infera_protocol::registry::{Model, Registry};
use infera_runtime::CancellationToken;
use infera_runtime::models::{ModelFiles, Seen};
use infera_runtime::network::{self, Live};
use parking_lot::RwLock;
use tokio::task::spawn_blocking;

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

/// Served models by id; clones share them. Which they are follows the registry: a model is served while it is listed and
/// its file is here.
#[derive(Debug, Clone)]
pub struct Catalog {
    files: Arc<ModelFiles>,
    /// `None`: the registry's file alone was given, and is not followed.
    live: Option<Live>,
    models: Arc<RwLock<BTreeMap<String, Arc<Served>>>>,
}

impl Catalog {
    /// Reads registry, manifest and the tokenizers of all listed models that have a file here. Takes about 0.3 s a model
    /// and blocks: call it in `spawn_blocking`.
    ///
    /// # Errors
    /// One sentence: a file that is missing, or that is not what the registry lists.
    pub fn load(config: &Config) -> Result<Self, Error> {
        let common = &config.common;
        let mut catalog = Self {
            files: Arc::new(ModelFiles::new(config.models.clone(), config.model_folder.clone())),
            live: None,
            models: Arc::default(),
        };
        if common.manifest_path.as_os_str().is_empty() {
            catalog.update(network::registries(&common.registry_path)?.current())?;
        } else {
            let live = Live::load(&common.manifest_path, &common.registry_path)?;
            catalog.update(live.now().registries.current())?;
            catalog.live = Some(live);
        }
        if catalog.models.read().is_empty() {
            tracing::warn!(
                "no listed model has a file here: every request will be answered with model_not_found"
            );
        }
        Ok(catalog)
    }

    /// The model that clients call `id`.
    pub fn get(&self, id: &str) -> Option<Arc<Served>> {
        self.models.read().get(id).cloned()
    }

    /// All models, by id.
    pub fn all(&self) -> Vec<Arc<Served>> {
        self.models.read().values().cloned().collect()
    }

    /// Serves what every registry lists that comes into force, until `stop`. What was asked before is finished. While a
    /// listed model can't be served, its file is looked for.
    pub async fn follow(&self, stop: CancellationToken) {
        let Some(live) = &self.live else { return stop.cancelled().await };
        let taken_over = async {
            let mut changes = live.watch();
            // It may have changed since it was loaded.
            changes.mark_changed();
            let mut lacking = None;
            loop {
                tokio::select! {
                    changed = changes.changed() => if changed.is_err() { return },
                    () = self.file_comes(lacking.as_ref()) => {}
                }
                let (catalog, roots) = (self.clone(), changes.borrow_and_update().clone());
                let registry = roots.registries.current().clone();
                let seen = self.files.seen(&registry);
                let updated = spawn_blocking(move || catalog.update(roots.registries.current())).await;
                let updated = updated.map_err(|error| Error::Models(error.to_string())).flatten();
                if let Err(error) = &updated {
                    tracing::error!(%error, "a model of the registry can't be served here");
                }
                let all = registry.models.iter().all(|model| self.get(&model.id).is_some());
                lacking = (!all).then_some((registry, seen));
            }
        };
        tokio::select! {
            () = live.follow(stop.clone()) => {}
            () = taken_over => {}
        }
    }

    /// Waits for the file of a model that could not be served; for ever if all were.
    async fn file_comes(&self, lacking: Option<&(Registry, Seen)>) {
        match lacking {
            Some((registry, seen)) => self.files.changed(registry, seen).await,
            None => std::future::pending().await,
        }
    }

    /// Serves what `registry` lists. A model that can't be served is left out, and the first one's error returned.
    fn update(&self, registry: &Registry) -> Result<(), Error> {
        let (mut models, mut failed) = (BTreeMap::new(), Ok(()));
        for model in &registry.models {
            let id = &model.id;
            let known = self.get(id).filter(|known| known.model == *model);
            let served = match (known, self.files.of(id)) {
                (Some(known), _) => Ok(known),
                (None, Some(path)) => served(model, &path).map(Arc::new),
                (None, None) => {
                    tracing::warn!(
                        model = id,
                        "the registry lists a model that has no file here: not served"
                    );
                    continue;
                }
            };
            match served {
                Ok(served) => drop(models.insert(id.clone(), served)),
                Err(error) => failed = failed.and(Err(error)),
            }
        }
        for id in self.files.named().filter(|id| registry.by_id(id).is_none()) {
            tracing::warn!(
                model = id,
                "`models.{id}` is not in the registry: not served until the holders admit it"
            );
        }
        for id in self.models.read().keys().filter(|id| !models.contains_key(*id)) {
            tracing::info!(model = id, "model is not served any more");
        }
        *self.models.write() = models;
        failed
    }
}

fn served(model: &Model, path: &Path) -> Result<Served, Error> {
    let id = &model.id;
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
    tracing::info!(model = %id, context_length = model.context_length, "model is served");
    Ok(Served { model: model.clone(), prompt, vocabulary, longest_token })
}
