//! One configuration file per service and node, the same in both profiles.

use std::{collections::BTreeMap, fs, path::Path, process::ExitCode};

use infera_runtime::config::ConfigError;
use serde::Serialize;

use crate::{
    cli::{ConfigArgs, Profile},
    layout::{Layout, SERVICES, cache, write_secret},
    say,
};

/// Credit of the demo account on a devnet, 10^-6 INFER.
const DEMO_CREDIT_MICRO: i64 = 1_000_000_000_000;

/// Addresses of a network on one machine: ten ports from `base`.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    base: u16,
}

impl Ports {
    pub fn new(base: u16) -> Self {
        Self { base }
    }

    pub fn of(self, service: &str) -> u16 {
        let place = SERVICES.iter().position(|name| *name == service).unwrap_or(SERVICES.len());
        self.base + u16::try_from(place).unwrap_or(0)
    }

    pub fn chain(self) -> u16 {
        self.base + 9
    }

    pub fn url(self, service: &str) -> String {
        format!("http://127.0.0.1:{}", self.of(service))
    }

    pub fn rpc_url(self) -> String {
        format!("http://127.0.0.1:{}", self.chain())
    }

    /// Every port with what it is for.
    pub fn all(self) -> Vec<(u16, &'static str)> {
        let mut all: Vec<_> = SERVICES.iter().map(|name| (self.of(name), *name)).collect();
        all.push((self.chain(), "chain"));
        all
    }
}

/// What differs between networks.
pub struct Setting<'a> {
    pub layout: &'a Layout,
    pub ports: Ports,
    pub profile: Profile,
    pub otlp: Option<&'a str>,
    pub qdrant: Option<&'a str>,
    /// AMQP_URL, REDIS_URL and PG_URL of the private servers, in the cluster profile.
    pub servers: BTreeMap<String, String>,
}

impl Setting<'_> {
    fn common(&self, service: &str) -> toml::Table {
        let mut table = toml::Table::new();
        let mut set = |key: &str, value: String| table.insert(key.to_owned(), value.into());
        set("http_bind", format!("127.0.0.1:{}", self.ports.of(service)));
        set("manifest_path", text(&self.layout.manifest()));
        set("registry_path", text(&self.layout.registry()));
        set("jwks_path", text(&self.layout.jwks()));
        if let Some(otlp) = self.otlp {
            set("otlp_endpoint", otlp.to_owned());
        }
        match self.profile {
            Profile::Embedded => {
                let file = self.layout.database(service);
                set("database_url", format!("sqlite://{}?mode=rwc", file.display()));
            }
            Profile::Cluster => {
                let server = |name: &str| self.servers.get(name).cloned().unwrap_or_default();
                set("database_url", server("PG_URL"));
                set("database_schema", service.to_owned());
                set("bus_url", server("AMQP_URL"));
                set("kv_url", server("REDIS_URL"));
            }
        }
        table
    }

    /// The one place that the verifier writes to and the explorer searches.
    fn vectors(&self) -> toml::Table {
        let mut table = toml::Table::new();
        match self.profile {
            Profile::Embedded => {
                let url = format!("sqlite://{}?mode=rwc", self.layout.database("vectors").display());
                table.insert("database_url".into(), url.into());
            }
            Profile::Cluster => {
                let url = self.servers.get("PG_URL").cloned().unwrap_or_default();
                table.insert("database_url".into(), url.into());
            }
        }
        if let Some(qdrant) = self.qdrant {
            table.insert("qdrant_url".into(), qdrant.into());
        }
        table
    }

    /// Writes the configuration files of all services.
    pub fn write_services(&self, settler_key: &str) -> Result<(), String> {
        let model = text(&chat_model());
        let mut gateway = self.common("gateway");
        gateway.insert("public_url".into(), self.ports.url("gateway").into());
        gateway.insert("settlement_url".into(), self.ports.url("settlement").into());
        gateway.insert("signing_key_path".into(), text(&self.layout.key(crate::keys::SIGNER)).into());
        let mut models = toml::Table::new();
        models.insert(crate::models::DEFAULT_MODEL.into(), model.clone().into());
        gateway.insert("models".into(), models.clone().into());
        gateway.insert("model_folder".into(), text(&self.layout.model_folder()).into());
        let mut settlement = self.common("settlement");
        let mut chain = toml::Table::new();
        chain.insert("rpc_url".into(), self.ports.rpc_url().into());
        chain.insert("settler_key".into(), settler_key.into());
        settlement.insert("chain".into(), chain.into());
        let mut governance = toml::Table::new();
        governance.insert("contracts_path".into(), text(&self.layout.contracts()).into());
        settlement.insert("governance".into(), governance.into());
        let mut credit = toml::Table::new();
        credit.insert("id".into(), "devnet-demo".into());
        credit.insert("account".into(), "demo".into());
        credit.insert("amount_micro".into(), DEMO_CREDIT_MICRO.into());
        settlement.insert("prepaid_credits".into(), vec![credit].into());
        let mut dispatcher = self.common("dispatcher");
        dispatcher.insert("key_path".into(), text(&self.layout.key("dispatcher.key")).into());
        let mut verifier = self.common("verifier");
        verifier.insert("models".into(), models.into());
        verifier.insert("model_folder".into(), text(&self.layout.model_folder()).into());
        verifier.insert("embedder_path".into(), text(&embedder()).into());
        verifier.insert("vectors".into(), self.vectors().into());
        let mut explorer = self.common("explorer");
        explorer.insert("embedder_path".into(), text(&embedder()).into());
        explorer.insert("receipts_url".into(), self.ports.url("gateway").into());
        explorer.insert("vectors".into(), self.vectors().into());
        let tables = [
            ("gateway", gateway),
            ("settlement", settlement),
            ("mempool", self.common("mempool")),
            ("dispatcher", dispatcher),
            ("verifier", verifier),
            ("explorer", explorer),
        ];
        for (service, table) in tables {
            self.write(service, &table)?;
        }
        Ok(())
    }

    fn write(&self, name: &str, table: &toml::Table) -> Result<(), String> {
        let path = self.layout.config(name);
        let text = format!("# Written by `infera up` at every start.\n{table}");
        // The settler's key and the servers' passwords are in these files.
        write_secret(&path, text.as_bytes()).map_err(|e| format!("cannot write {}: {e}", path.display()))
    }
}

/// The chat model that `deploy/setup` installs.
pub fn chat_model() -> std::path::PathBuf {
    cache().join("models/smollm2-135m-instruct-q4_1.gguf")
}

/// The embedder that `deploy/setup` installs.
pub fn embedder() -> std::path::PathBuf {
    cache().join("models/all-minilm-l6-v2")
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// `infera config`: defaults, file and environment as the service would read them.
pub fn dump(args: &ConfigArgs) -> Result<ExitCode, String> {
    let layout = Layout::existing(&args.data.data)?;
    let file = layout.config(&args.service);
    let file = fs::exists(&file).unwrap_or(false).then_some(file);
    let file = file.as_deref();
    match args.service.as_str() {
        "gateway" => show(infera_gateway::Config::load(file)),
        "settlement" => show(infera_settlement::Config::load(file)),
        "mempool" => show(infera_mempool::Config::load(file)),
        "dispatcher" => show(infera_dispatcher::Config::load(file)),
        "verifier" => show(infera_verifier::Config::load(file)),
        "explorer" => show(infera_explorer::Config::load(file)),
        other => Err(format!("there is no service `{other}`: name one of {}", SERVICES.join(", "))),
    }
}

fn show<C: Serialize>(config: Result<C, ConfigError>) -> Result<ExitCode, String> {
    let config = config.map_err(|e| e.to_string())?;
    say(toml::to_string_pretty(&config).map_err(|e| e.to_string())?);
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Services started by hand on their defaults find each other where `infera up` would put them.
    #[test]
    fn defaults_are_the_ports_of_up() {
        let ports = Ports::new(8080);
        let binds = [
            ("gateway", infera_gateway::Config::load(None).unwrap().common.http_bind),
            ("settlement", infera_settlement::Config::load(None).unwrap().common.http_bind),
            ("mempool", infera_mempool::Config::load(None).unwrap().common.http_bind),
            ("dispatcher", infera_dispatcher::Config::load(None).unwrap().common.http_bind),
            ("verifier", infera_verifier::Config::load(None).unwrap().common.http_bind),
            ("explorer", infera_explorer::Config::load(None).unwrap().common.http_bind),
        ];
        for (service, bind) in binds {
            assert_eq!(bind, format!("127.0.0.1:{}", ports.of(service)), "{service}");
        }
    }
}
