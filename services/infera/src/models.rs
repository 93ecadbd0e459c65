//! `infera models`: what the network serves, and the registry entry of a model.

use std::{fs, path::Path, process::ExitCode};

use infera_prompt::Prompt;
use infera_protocol::{
    bytes::Hash32,
    registry::{Model, Registry},
};

/// The model that a devnet serves.
pub const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

use crate::{cli::ModelsArgs, layout::Layout, say};

pub fn models(args: &ModelsArgs) -> Result<ExitCode, String> {
    if let Some(file) = &args.inspect {
        let entry = inspect(file)?;
        say(serde_json::to_string_pretty(&entry).map_err(|e| e.to_string())?);
        return Ok(ExitCode::SUCCESS);
    }
    let layout = Layout::existing(&args.data.data)?;
    let text = fs::read(layout.registry())
        .map_err(|e| format!("cannot read {}: {e}", layout.registry().display()))?;
    let registry: Registry = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    for model in registry.models {
        say(format_args!(
            "{}  {} per 1M tokens and replica  context {}  weights {}",
            model.id,
            crate::client::infer(model.price_micro.saturating_mul(1_000_000)),
            model.context_length,
            model.weights_root
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// The entry that a registry needs for a GGUF file or a folder; id, price and threshold are for the holders to decide.
pub fn inspect(file: &Path) -> Result<Model, String> {
    let prompt = Prompt::load(file).map_err(|e| e.to_string())?;
    // A folder's name may have dots of its own.
    let name = if file.is_dir() { file.file_name() } else { file.file_stem() };
    let (weights_root, weights_bytes) = infera_node::measure(file).map_err(|e| e.to_string())?;
    Ok(Model {
        id: name.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        weights_root,
        weights_bytes,
        tokenizer_hash: Hash32(prompt.tokenizer_hash()),
        template_hash: Hash32(prompt.template_hash()),
        end_tokens: prompt.end_tokens().to_vec(),
        vocab_size: u32::try_from(prompt.vocab_size()).unwrap_or(u32::MAX),
        context_length: prompt.context_length(),
        similarity_threshold_millionths: 600_000,
        price_micro: 1,
        created_secs: 0,
    })
}
