//! Configuration: `defaults.toml`, then a file, then `INFERA_MEMPOOL__<KEY>`.

use std::path::Path;

use infera_runtime::config::{self, Common, ConfigError};
use serde::{Deserialize, Serialize};

const SERVICE: &str = "mempool";

/// What the mempool can be told; `defaults.toml` explains every key.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    #[serde(flatten)]
    pub common: Common,
    pub replica: String,
    pub max_requests: usize,
    pub prefetch: u16,
    pub unheld_secs: u32,
    pub close_repeat_secs: u32,
}

impl Config {
    /// Loads and checks it.
    ///
    /// # Errors
    /// [`ConfigError`], naming the key and the remedy.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let config: Self = config::load(SERVICE, include_str!("../defaults.toml"), file)?;
        config.validate()?;
        Ok(config)
    }

    /// Checks what types can't say.
    ///
    /// # Errors
    /// [`ConfigError`] for the first key that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let numbers = [
            ("max_requests", self.max_requests as u64, 1, 10_000_000),
            ("prefetch", u64::from(self.prefetch), 1, 1_024),
            ("unheld_secs", u64::from(self.unheld_secs), 1, 3_600),
            ("close_repeat_secs", u64::from(self.close_repeat_secs), 1, 3_600),
        ];
        for (key, value, least, most) in numbers {
            if !(least..=most).contains(&value) {
                let message = format!("`{key}` is {value}: set it to {least} to {most}");
                return Err(ConfigError::invalid(SERVICE, message));
            }
        }
        let word = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
        if self.replica.len() > 64 || !self.replica.bytes().all(word) {
            return Err(ConfigError::invalid(
                SERVICE,
                "`replica` must be at most 64 letters, digits, - and _; leave it empty to have one made up",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_ranges_are_checked() {
        let config = Config::load(None).unwrap();
        assert_eq!((config.prefetch, config.unheld_secs), (64, 30));
        let error = Config { prefetch: 0, ..config.clone() }.validate().unwrap_err().to_string();
        assert!(error.contains("`prefetch` is 0: set it to 1 to 1024"), "{error}");
        let error = Config { replica: "a.b".into(), ..config }.validate().unwrap_err().to_string();
        assert!(error.contains("`replica`"), "{error}");
    }
}
