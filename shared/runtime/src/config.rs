//! Configuration of a service: embedded commented defaults, then a TOML file, then the environment.
//!
//! `INFERA_DISPATCHER__LEASE_SECS=20` sets `lease_secs` of the service `dispatcher`; a second `__`
//! goes one table deeper. Give every config `#[serde(deny_unknown_fields)]`: a typing error is then
//! an error that names the key and where it stands, not a default that is silently used.
//! Command-line flags are applied by the caller on the loaded value.

use std::fmt;
use std::path::{Path, PathBuf};

use figment::Figment;
use figment::providers::{Env, Format, Toml};
use serde::de::{self, DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The named file is not there or cannot be read.
    #[error("the configuration file {} cannot be read: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    /// A key is unknown, missing or has the wrong type; the message names it and its source.
    #[error("the configuration of {service} is not usable: {message}")]
    Invalid { service: String, message: String },
}

impl ConfigError {
    /// For a service's own checks across fields: `message` names the field and the remedy.
    pub fn invalid(service: &str, message: impl Into<String>) -> Self {
        Self::Invalid { service: service.to_owned(), message: message.into() }
    }
}

/// Loads the configuration of `service` (lowercase, as in `INFERA_<SERVICE>__KEY`).
///
/// # Errors
/// [`ConfigError`]; every problem that is found is in its message.
pub fn load<T: DeserializeOwned>(
    service: &str,
    defaults_toml: &'static str,
    file: Option<&Path>,
) -> Result<T, ConfigError> {
    let mut figment = Figment::from(Toml::string(defaults_toml));
    if let Some(path) = file {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::File { path: path.to_owned(), source })?;
        check_toml(service, path, &text)?;
        figment = figment.merge(Toml::string(&text));
    }
    let prefix = env_prefix(service);
    figment.merge(Env::prefixed(&prefix).split("__")).extract().map_err(|errors| {
        let message =
            errors.into_iter().map(|error| explain(&error, file, &prefix)).collect::<Vec<_>>().join("; ");
        ConfigError::invalid(service, message)
    })
}

/// `config` as TOML, with secrets redacted: what `infera config dump` shows.
///
/// # Errors
/// [`ConfigError::Invalid`] when a value has no form in TOML.
pub fn dump<T: Serialize>(service: &str, config: &T) -> Result<String, ConfigError> {
    toml::to_string(config).map_err(|error| ConfigError::invalid(service, error.to_string()))
}

/// `INFERA_<SERVICE>__`, the prefix of the service's environment variables.
pub fn env_prefix(service: &str) -> String {
    format!("INFERA_{}__", service.to_uppercase().replace('-', "_"))
}

/// TOML's own message is a drawing over several lines; this is one sentence.
fn check_toml(service: &str, path: &Path, text: &str) -> Result<(), ConfigError> {
    text.parse::<toml::Table>().map(drop).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        ConfigError::invalid(service, format!("{} line {line}: {}", path.display(), error.message()))
    })
}

fn explain(error: &figment::Error, file: Option<&Path>, prefix: &str) -> String {
    let key = error.path.join(".");
    let file = file.map_or("the defaults".to_owned(), |path| format!("{} or the defaults", path.display()));
    // A flattened table loses where its keys came from.
    let place = match error.metadata.as_ref().map(|metadata| metadata.name.contains("environment")) {
        Some(true) => format!("the environment, {prefix}..."),
        Some(false) => file,
        None => format!("the environment, {prefix}..., or {file}"),
    };
    if key.is_empty() {
        format!("{} (in {place})", error.kind)
    } else {
        format!("`{key}`: {} (in {place})", error.kind)
    }
}

/// A value that is never shown: `Debug` and `Serialize` print `[redacted]`.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Secret(String);

impl Secret {
    /// Wraps `value`.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself; the name makes its uses easy to find.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// True when there is nothing to hide.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<&str> for Secret {
    fn from(value: &str) -> Self {
        Self::new(value)
    }
}

impl From<String> for Secret {
    fn from(value: String) -> Self {
        Self(value)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SecretVisitor)
    }
}

/// Takes text only. From the environment, digits arrive as a number that has lost its leading zeros, and
/// serde's own message would show it.
struct SecretVisitor;

impl Visitor<'_> for SecretVisitor {
    type Value = Secret;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text")
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Secret, E> {
        Ok(Secret::new(value))
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Secret, E> {
        Err(E::custom(QUOTE_IT))
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Secret, E> {
        Err(E::custom(QUOTE_IT))
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Secret, E> {
        Err(E::custom(QUOTE_IT))
    }
}

const QUOTE_IT: &str = "a secret of digits must stand in double quotes, also in the environment";

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("[redacted]")
    }
}

/// What most services need. Put it into a config with `#[serde(flatten)] pub common: Common` and
/// the keys into the service's defaults ([`Common::default`] fills in what they leave out).
///
/// URLs may carry passwords, hence [`Secret`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
pub struct Common {
    /// Address of the HTTP server; port 0 takes a free one.
    pub http_bind: String,
    /// `sqlite://PATH?mode=rwc` or `postgres://USER:PASSWORD@HOST/NAME`.
    pub database_url: Secret,
    /// PostgreSQL schema of this service; without a meaning for SQLite.
    pub database_schema: Option<String>,
    /// `amqp://USER:PASSWORD@HOST:PORT/%2f`; empty in the embedded network.
    pub bus_url: Secret,
    /// Put before every queue and exchange name, so that several networks share one broker.
    pub bus_prefix: String,
    /// `redis://...`; `None` keeps counters in this process's memory.
    pub kv_url: Option<Secret>,
    /// gRPC address of an OTLP collector, as `http://127.0.0.1:4317`; `None` exports no traces.
    pub otlp_endpoint: Option<String>,
    /// Which log lines are written, in `tracing_subscriber::EnvFilter` syntax.
    pub log_filter: String,
    /// The network's manifest.
    pub manifest_path: PathBuf,
    /// The registry of models.
    pub registry_path: PathBuf,
    /// The public keys that API keys are checked with.
    pub jwks_path: PathBuf,
}

impl Default for Common {
    fn default() -> Self {
        Self {
            http_bind: "127.0.0.1:0".to_owned(),
            database_url: Secret::default(),
            database_schema: None,
            bus_url: Secret::default(),
            bus_prefix: "infera".to_owned(),
            kv_url: None,
            otlp_endpoint: None,
            log_filter: "info".to_owned(),
            manifest_path: PathBuf::new(),
            registry_path: PathBuf::new(),
            jwks_path: PathBuf::new(),
        }
    }
}
