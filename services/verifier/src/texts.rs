//! What texts need of each model: its tokenizer, and its tokens prepared for grammars. A model that the holders admit is
//! loaded when its registry comes into force; one that they withdraw stays, for what is still open.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use infera_grammar::Vocabulary;
use infera_prompt::Prompt;
use infera_protocol::bytes::Hash32;
use infera_protocol::registry::{Model, Registry};
use infera_runtime::CancellationToken;
use infera_runtime::models::ModelFiles;
use infera_runtime::network::Roots;
use parking_lot::RwLock;
use tokio::sync::watch;

use crate::config::Config;
use crate::error::Error;
use crate::on_a_thread;

/// One model's.
pub(crate) struct Text {
    pub prompt: Arc<Prompt>,
    pub vocabulary: Arc<Vocabulary>,
}

/// All models'; clones share them.
#[derive(Clone)]
pub(crate) struct Texts {
    files: Arc<ModelFiles>,
    loaded: Arc<RwLock<HashMap<Hash32, Arc<Text>>>>,
}

impl Texts {
    /// Loads every model of the registry that has its file here.
    ///
    /// # Errors
    /// The first file that is another one than the registry's; no model has its file here.
    pub async fn load(config: &Config, registry: &Registry) -> Result<Self, Error> {
        let texts = Self {
            files: Arc::new(ModelFiles::new(config.models.clone(), config.model_folder.clone())),
            loaded: Arc::default(),
        };
        let missing = texts.add(registry).await?;
        match missing.into_iter().next() {
            Some(model) if texts.loaded.read().is_empty() => Err(Error::NoModelFile { model }),
            _ => Ok(texts),
        }
    }

    /// By the model's weights.
    pub fn get(&self, model_root: &Hash32) -> Option<Arc<Text>> {
        self.loaded.read().get(model_root).cloned()
    }

    /// Loads the models of every registry that comes into force, until `stop`. While one has no file here, the log says so,
    /// the file is looked for, and what concerns the model waits.
    pub async fn follow(self, mut changes: watch::Receiver<Arc<Roots>>, stop: CancellationToken) {
        loop {
            let roots = changes.borrow_and_update().clone();
            let registry = roots.registries.current();
            let seen = self.files.seen(registry);
            let all = match self.add(registry).await.map(|missing| missing.into_iter().next()) {
                Ok(None) => true,
                Ok(Some(model)) => lacks(&Error::NoModelFile { model }),
                Err(error) => lacks(&error),
            };
            tokio::select! {
                () = stop.cancelled() => return,
                changed = changes.changed() => if changed.is_err() { return },
                () = self.files.changed(registry, &seen), if !all => {}
            }
        }
    }

    /// Loads what is not loaded yet; the ids of the models that have no file here.
    async fn add(&self, registry: &Registry) -> Result<Vec<String>, Error> {
        let mut missing = Vec::new();
        for model in registry.models.iter().filter(|model| self.get(&model.weights_root).is_none()) {
            match self.files.of(&model.id) {
                Some(path) => {
                    let text = read(model, path).await?;
                    self.loaded.write().insert(model.weights_root, Arc::new(text));
                }
                None => missing.push(model.id.clone()),
            }
        }
        Ok(missing)
    }
}

/// Says so; false, because not all are there.
fn lacks(error: &Error) -> bool {
    tracing::error!(%error, "a model of the registry can't be verified here");
    false
}

async fn read(model: &Model, path: PathBuf) -> Result<Text, Error> {
    let id = model.id.clone();
    let prompt = on_a_thread(move || Prompt::load(&path)).await?;
    let prompt = Arc::new(prompt.map_err(|source| Error::Prompt { model: id.clone(), source })?);
    if prompt.tokenizer_hash() != model.tokenizer_hash.0 {
        return Err(Error::WrongTokenizer { model: id });
    }
    let (tokenizer, end_tokens) = (prompt.clone(), model.end_tokens.clone());
    let made = on_a_thread(move || Vocabulary::new(tokenizer.tokenizer(), &end_tokens)).await?;
    let vocabulary = Arc::new(made.map_err(|source| Error::Vocabulary { model: id, source })?);
    Ok(Text { prompt, vocabulary })
}
