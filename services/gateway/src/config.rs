//! Configuration; the commented defaults are in `gateway.toml`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use infera_protocol::request::{MAX_REPLICAS, MAX_TOKENS, MIN_REPLICAS};
use infera_runtime::config::{Common, ConfigError, load};
use serde::{Deserialize, Serialize};

/// The commented defaults.
pub const DEFAULTS: &str = include_str!("gateway.toml");

/// Everything that can be set; see `gateway.toml` for units and meaning.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    #[serde(flatten)]
    pub common: Common,
    #[serde(default)]
    pub replica: Option<String>,
    pub receipts_url: String,
    pub replicas: u32,
    pub deadline_secs: u64,
    pub deadline_grace_secs: u64,
    pub default_max_tokens: u32,
    pub requests_per_minute: u64,
    pub max_waiting: usize,
    pub heartbeat_secs: u64,
    pub poll_ms: u64,
    pub drain_secs: u64,
    pub cancel_on_disconnect: bool,
    pub keep_hours: u64,
    pub prefetch: u16,
    pub models: BTreeMap<String, PathBuf>,
    pub model_folder: Option<PathBuf>,
}

impl Config {
    /// The defaults, then `file`, then the environment; checked.
    ///
    /// # Errors
    /// Names every key that cannot be used.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let config: Self = load("gateway", DEFAULTS, file)?;
        config.validate()?;
        Ok(config)
    }

    /// Checks what types cannot say.
    ///
    /// # Errors
    /// Names the key and what it must be.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let bad = |message: String| Err(ConfigError::invalid("gateway", message));
        let within = |key: &str, value: u64, min: u64, max: u64| {
            if (min..=max).contains(&value) {
                return Ok(());
            }
            Err(ConfigError::invalid("gateway", format!("`{key}` must be {min} to {max}, got {value}")))
        };
        within("replicas", self.replicas.into(), MIN_REPLICAS.into(), MAX_REPLICAS.into())?;
        within("deadline_secs", self.deadline_secs, 1, 24 * 3600)?;
        within("deadline_grace_secs", self.deadline_grace_secs, 0, 600)?;
        within("default_max_tokens", self.default_max_tokens.into(), 1, MAX_TOKENS.into())?;
        within("heartbeat_secs", self.heartbeat_secs, 1, 10)?;
        within("poll_ms", self.poll_ms, 50, 60_000)?;
        within("drain_secs", self.drain_secs, 0, 8)?;
        within("keep_hours", self.keep_hours, 1, 24 * 365)?;
        within("prefetch", self.prefetch.into(), 1, 4096)?;
        within("max_waiting", self.max_waiting as u64, 1, 1_000_000)?;
        if self.common.database_url.is_empty() {
            return bad("`database_url` must be set to sqlite://... or postgres://...".into());
        }
        if let Some(replica) = &self.replica
            && !is_word(replica)
        {
            return bad(format!("`replica` must be 1 to 64 of A-Z, a-z, 0-9, _ and -, got `{replica}`"));
        }
        if !(self.receipts_url.starts_with("http://") || self.receipts_url.starts_with("https://")) {
            return bad(format!(
                "`receipts_url` must start with http:// or https://, got `{}`",
                self.receipts_url
            ));
        }
        Ok(())
    }

    pub(crate) fn heartbeat(&self) -> Duration {
        Duration::from_secs(self.heartbeat_secs)
    }

    pub(crate) fn poll(&self) -> Duration {
        Duration::from_millis(self.poll_ms)
    }

    pub(crate) fn deadline_ms(&self) -> i64 {
        i64::try_from(self.deadline_secs).unwrap_or(i64::MAX / 2000).saturating_mul(1000)
    }
}

impl AsRef<Common> for Config {
    fn as_ref(&self) -> &Common {
        &self.common
    }
}

/// One word of a routing key.
fn is_word(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults() -> Config {
        load("gateway_defaults", DEFAULTS, None).unwrap()
    }

    #[test]
    fn the_defaults_are_valid() {
        defaults().validate().unwrap();
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |change: fn(&mut Config)| {
            let mut config = defaults();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(error(|c| c.replicas = 2).contains("`replicas` must be 3 to 7, got 2"));
        assert!(error(|c| c.heartbeat_secs = 11).contains("`heartbeat_secs`"));
        assert!(error(|c| c.replica = Some("a.b".into())).contains("`replica`"));
        assert!(error(|c| c.receipts_url = "localhost".into()).contains("`receipts_url`"));
        assert!(error(|c| c.common.database_url = "".into()).contains("`database_url`"));
        assert!(error(|c| c.drain_secs = 9).contains("`drain_secs`"));
    }

    #[test]
    fn a_key_that_is_none_is_refused() {
        let file = std::env::temp_dir().join(format!("gateway-{}.toml", uuid::Uuid::now_v7()));
        std::fs::write(&file, "replica_count = 3").unwrap();
        let error = load::<Config>("gateway_unknown", DEFAULTS, Some(&file)).unwrap_err().to_string();
        std::fs::remove_file(&file).unwrap();
        assert!(error.contains("replica_count"), "{error}");
    }

    #[test]
    fn secrets_are_not_shown() {
        let mut config = defaults();
        config.common.database_url = "postgres://u:hunter2@h/d".into();
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}
