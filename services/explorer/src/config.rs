//! Configuration: `defaults.toml`, then a file, then `INFERA_EXPLORER__<KEY>`.

use std::path::{Path, PathBuf};

use infera_embed::IndexConfig;
use infera_runtime::config::{self, Common, ConfigError};
use serde::{Deserialize, Serialize};

const SERVICE: &str = "explorer";
/// The commented defaults.
pub const DEFAULTS: &str = include_str!("../defaults.toml");

/// What the explorer can be told; `defaults.toml` explains every key.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    #[serde(flatten)]
    pub common: Common,
    pub receipts_url: String,
    pub embedder_path: PathBuf,
    pub prefetch: u16,
    pub min_score: f32,
    pub max_searches: usize,
    pub max_exports: usize,
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
        let ensure = |holds: bool, message: &str| {
            if holds { Ok(()) } else { Err(ConfigError::invalid(SERVICE, message)) }
        };
        ensure(
            !self.common.database_url.is_empty(),
            "`database_url` is empty: name a SQLite file or a PostgreSQL database",
        )?;
        let web = ["http://", "https://"].iter().any(|scheme| self.receipts_url.starts_with(scheme));
        ensure(web, "`receipts_url` must start with http:// or https://")?;
        ensure((1..=1_024).contains(&self.prefetch), "`prefetch` must be 1 to 1024")?;
        ensure((-1.0..=1.0).contains(&self.min_score), "`min_score` must be -1 to 1")?;
        ensure((1..=256).contains(&self.max_searches), "`max_searches` must be 1 to 256")?;
        ensure((1..=256).contains(&self.max_exports), "`max_exports` must be 1 to 256")?;
        ensure(
            self.vectors.qdrant_url.is_some() || !self.vectors.database_url.is_empty(),
            "`vectors` names no index: set `vectors.qdrant_url` or `vectors.database_url`",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_what_is_wrong_is_named() {
        let config: Config = config::load("explorer_defaults", DEFAULTS, None).unwrap();
        config.validate().unwrap();
        let error = |change: fn(&mut Config)| {
            let mut config = config.clone();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(error(|c| c.min_score = f32::NAN).contains("`min_score`"));
        assert!(error(|c| c.receipts_url = "localhost".into()).contains("`receipts_url`"));
        assert!(error(|c| c.max_exports = 0).contains("`max_exports`"));
        assert!(error(|c| c.vectors.database_url = "".into()).contains("`vectors`"));
    }
}
