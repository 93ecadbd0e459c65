//! Configuration: `defaults.toml`, then a file, then `INFERA_VERIFIER__<KEY>`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use infera_embed::IndexConfig;
use infera_runtime::config::{self, Common, ConfigError};
use serde::{Deserialize, Serialize};

const SERVICE: &str = "verifier";
/// The commented defaults.
pub const DEFAULTS: &str = include_str!("../defaults.toml");

/// What the verifier can be told; `defaults.toml` explains every key.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    #[serde(flatten)]
    pub common: Common,
    pub embedder_path: PathBuf,
    pub prefetch: u16,
    /// Registry id -> GGUF file, or folder with safetensors.
    pub models: BTreeMap<String, PathBuf>,
    pub model_folder: Option<PathBuf>,
    pub vectors: IndexConfig,
}

impl Config {
    /// Loads and checks it.
    ///
    /// # Errors
    /// [`ConfigError`], naming the key and the remedy.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let config: Self = config::load(SERVICE, DEFAULTS, file)?;
        config.validate()?;
        Ok(config)
    }

    /// Checks what types can't say.
    ///
    /// # Errors
    /// [`ConfigError`] for the first key that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let invalid = |message: &str| Err(ConfigError::invalid(SERVICE, message));
        if self.common.database_url.is_empty() {
            return invalid("`database_url` is empty: name a SQLite file or a PostgreSQL database");
        }
        if !(1..=1_024).contains(&self.prefetch) {
            return invalid("`prefetch` must be 1 to 1024");
        }
        if self.vectors.qdrant_url.is_none() && self.vectors.database_url.is_empty() {
            return invalid("`vectors` names no index: set `vectors.qdrant_url` or `vectors.database_url`");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_what_is_wrong_is_named() {
        let config: Config = config::load("verifier_defaults", DEFAULTS, None).unwrap();
        config.validate().unwrap();
        let error = |change: fn(&mut Config)| {
            let mut config = config.clone();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(error(|c| c.prefetch = 0).contains("`prefetch`"));
        assert!(error(|c| c.common.database_url = "".into()).contains("`database_url`"));
        assert!(error(|c| c.vectors.database_url = "".into()).contains("`vectors`"));
    }
}
