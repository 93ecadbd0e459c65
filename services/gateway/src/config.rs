//! Configuration; the commented defaults are in `gateway.toml`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use infera_protocol::request::{MAX_REPLICAS, MAX_TOKENS, MIN_REPLICAS};
use infera_protocol::siwe::Origin;
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
    pub public_url: String,
    pub receipts_url: String,
    pub settlement_url: String,
    pub settlement_timeout_secs: u64,
    pub settlement_max_mib: u64,
    pub settlement_max_open: usize,
    pub public_per_minute: u64,
    pub signing_key_path: PathBuf,
    pub sign_in_origins: Vec<String>,
    pub sign_ins_per_minute: u64,
    pub trust_forwarded_for: bool,
    pub nonce_secs: u64,
    pub session_hours: u64,
    pub max_keys: u64,
    pub max_key_days: u64,
    pub replicas: u32,
    pub deadline_secs: u64,
    pub deadline_grace_secs: u64,
    pub default_max_tokens: u32,
    pub requests_per_minute: u64,
    pub max_prompts: usize,
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
        within("replicas", self.replicas.into(), MIN_REPLICAS.into(), MAX_REPLICAS.into())?;
        within("deadline_secs", self.deadline_secs, 1, 24 * 3600)?;
        within("deadline_grace_secs", self.deadline_grace_secs, 0, 600)?;
        within("default_max_tokens", self.default_max_tokens.into(), 1, MAX_TOKENS.into())?;
        within("heartbeat_secs", self.heartbeat_secs, 1, 10)?;
        within("poll_ms", self.poll_ms, 50, 60_000)?;
        within("drain_secs", self.drain_secs, 0, 8)?;
        within("keep_hours", self.keep_hours, 1, 24 * 365)?;
        within("prefetch", self.prefetch.into(), 1, 4096)?;
        within("max_prompts", self.max_prompts as u64, 1, 65_536)?;
        within("max_waiting", self.max_waiting as u64, 1, 1_000_000)?;
        if self.common.database_url.is_empty() {
            return bad("`database_url` must be set to sqlite://... or postgres://...".into());
        }
        if let Some(replica) = &self.replica
            && !is_word(replica)
        {
            return bad(format!("`replica` must be 1 to 64 of A-Z, a-z, 0-9, _ and -, got `{replica}`"));
        }
        self.validate_accounts()
    }

    /// What belongs to accounts: where they are reached, and how people sign in.
    fn validate_accounts(&self) -> Result<(), ConfigError> {
        let bad = |message: String| Err(ConfigError::invalid("gateway", message));
        let web = |url: &str| url.starts_with("http://") || url.starts_with("https://");
        for (key, value) in [("public_url", &self.public_url), ("receipts_url", &self.receipts_url)] {
            let may_be_empty = key == "receipts_url";
            if !(web(value) || may_be_empty && value.is_empty()) {
                return bad(format!("`{key}` must start with http:// or https://, got `{value}`"));
            }
        }
        if !(self.settlement_url.is_empty() || self.settlement_url.starts_with("http://")) {
            return bad(format!(
                "`settlement_url` must start with http:// (this build speaks no TLS), or be empty, got `{}`",
                self.settlement_url
            ));
        }
        for (key, origin) in self.origin_texts() {
            if web(origin) && Origin::of(origin).is_some() {
                continue;
            }
            return bad(format!("`{key}` must be SCHEME://HOST[:PORT], got `{origin}`"));
        }
        if self.signs_in() && self.common.manifest_path.as_os_str().is_empty() {
            return bad(
                "`manifest_path` must be set where `signing_key_path` is: a sign-in is for one chain".into(),
            );
        }
        within("settlement_timeout_secs", self.settlement_timeout_secs, 1, 300)?;
        within("settlement_max_mib", self.settlement_max_mib, 1, 65_536)?;
        within("settlement_max_open", self.settlement_max_open as u64, 1, 65_536)?;
        within("public_per_minute", self.public_per_minute, 1, 1_000_000)?;
        within("sign_ins_per_minute", self.sign_ins_per_minute, 1, 1_000_000)?;
        within("nonce_secs", self.nonce_secs, 10, 3_600)?;
        within("session_hours", self.session_hours, 1, 24 * 90)?;
        within("max_keys", self.max_keys, 1, 1_000)?;
        within("max_key_days", self.max_key_days, 1, 3_650)
    }

    fn origin_texts(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let more = self.sign_in_origins.iter().map(|origin| ("sign_in_origins", origin.as_str()));
        std::iter::once(("public_url", self.public_url.as_str())).chain(more)
    }

    /// The places that a sign-in may be for: this gateway first.
    pub(crate) fn origins(&self) -> Vec<Origin> {
        self.origin_texts().filter_map(|(_, text)| Origin::of(text)).collect()
    }

    /// Whether wallets may sign in here.
    pub(crate) fn signs_in(&self) -> bool {
        !self.signing_key_path.as_os_str().is_empty()
    }

    /// Base of the receipts' addresses.
    pub(crate) fn receipts_base(&self) -> &str {
        if self.receipts_url.is_empty() { &self.public_url } else { &self.receipts_url }
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

fn within(key: &str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(ConfigError::invalid("gateway", format!("`{key}` must be {min} to {max}, got {value}")))
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
        assert!(error(|c| c.public_url = String::new()).contains("`public_url`"));
        assert!(error(|c| c.public_url = "http://a@b".into()).contains("`public_url`"));
        assert!(error(|c| c.sign_in_origins = vec!["app.example.org".into()]).contains("`sign_in_origins`"));
        assert!(error(|c| c.settlement_url = "https://s".into()).contains("`settlement_url`"));
        assert!(error(|c| c.signing_key_path = "k.pem".into()).contains("`manifest_path`"));
        assert!(error(|c| c.nonce_secs = 1).contains("`nonce_secs` must be 10 to 3600, got 1"));
        assert!(error(|c| c.common.database_url = "".into()).contains("`database_url`"));
        assert!(error(|c| c.drain_secs = 9).contains("`drain_secs`"));
    }

    #[test]
    fn receipts_are_where_the_gateway_is_unless_told_otherwise() {
        let mut config = defaults();
        assert_eq!(config.receipts_base(), "http://127.0.0.1:8080");
        config.receipts_url = "https://receipts.example.org".into();
        assert_eq!(config.receipts_base(), "https://receipts.example.org");
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
