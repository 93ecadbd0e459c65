//! Configuration: `defaults.toml`, then a file, then `INFERA_DISPATCHER__<KEY>`.

use std::path::{Path, PathBuf};

use infera_runtime::config::{self, Common, ConfigError};
use serde::{Deserialize, Serialize};

const SERVICE: &str = "dispatcher";

/// What the dispatcher can be told; `defaults.toml` explains every key.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    #[serde(flatten)]
    pub common: Common,
    pub replica: String,
    pub key_path: PathBuf,
    pub lease_secs: u32,
    pub reveal_secs: u32,
    pub referee_secs: u32,
    pub verdict_secs: u32,
    pub close_grace_secs: u32,
    pub hand_back_secs: u32,
    pub heartbeat_secs: u32,
    pub hello_secs: u32,
    pub proof_secs: u32,
    pub recheck_secs: u32,
    pub max_requests: u16,
    pub max_tries: u32,
    pub max_sessions: usize,
    pub session_queue: usize,
    pub slots_ttl_secs: u32,
    pub canary_ppm: u32,
    pub entry_trials: bool,
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
        let secs = [
            ("lease_secs", self.lease_secs, 1, 600),
            ("reveal_secs", self.reveal_secs, 1, 120),
            ("referee_secs", self.referee_secs, 1, 600),
            ("verdict_secs", self.verdict_secs, 1, 600),
            ("close_grace_secs", self.close_grace_secs, 1, 600),
            ("hand_back_secs", self.hand_back_secs, 1, 600),
            ("heartbeat_secs", self.heartbeat_secs, 1, 300),
            ("hello_secs", self.hello_secs, 1, 60),
            ("proof_secs", self.proof_secs, 1, 120),
            ("recheck_secs", self.recheck_secs, 1, 86_400),
            ("max_tries", self.max_tries, 1, 16),
            ("slots_ttl_secs", self.slots_ttl_secs, 2, 60),
        ];
        for (key, value, least, most) in secs {
            if !(least..=most).contains(&value) {
                return Err(out_of_range(key, u64::from(value), u64::from(least), u64::from(most)));
            }
        }
        let sizes = [
            ("max_requests", u64::from(self.max_requests), 1, 4_096),
            ("max_sessions", self.max_sessions as u64, 1, 100_000),
            ("session_queue", self.session_queue as u64, 8, 4_096),
            ("canary_ppm", u64::from(self.canary_ppm), 0, 500_000),
        ];
        for (key, value, least, most) in sizes {
            if !(least..=most).contains(&value) {
                return Err(out_of_range(key, value, least, most));
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

fn out_of_range(key: &str, value: u64, least: u64, most: u64) -> ConfigError {
    ConfigError::invalid(SERVICE, format!("`{key}` is {value}: set it to {least} to {most}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_a_typing_error_is_named() {
        let config = Config::load(None).unwrap();
        assert_eq!((config.lease_secs, config.max_requests), (60, 256));
        assert_eq!(config.canary_ppm, infera_protocol::canary::CANARY_PPM, "the protocol's");
        let dir = std::env::temp_dir().join(format!("infera-{}.toml", uuid::Uuid::now_v7()));
        std::fs::write(&dir, "lease_sec = 5\n").unwrap();
        let error = Config::load(Some(&dir)).unwrap_err().to_string();
        assert!(error.contains("lease_sec"), "{error}");
        std::fs::write(&dir, "lease_secs = 0\n").unwrap();
        let error = Config::load(Some(&dir)).unwrap_err().to_string();
        assert!(error.contains("`lease_secs` is 0: set it to 1 to 600"), "{error}");
        std::fs::remove_file(dir).unwrap();
    }
}
