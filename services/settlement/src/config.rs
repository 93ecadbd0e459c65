//! This service's configuration; `config.default.toml` has the defaults and says what each key does.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use infera_runtime::config::{Common, ConfigError, Secret, load};
use serde::{Deserialize, Serialize};

use crate::{
    chain::{
        self,
        port::{Finality, MIN_BUMP_PERCENT},
    },
    ledger,
};

/// Charges in a transaction: some 30,000 gas each, below any chain's limit.
const MOST_CHARGES: u64 = 256;

/// The embedded, commented defaults.
pub const DEFAULTS: &str = include_str!("config.default.toml");
/// The service's name: in `INFERA_SETTLEMENT__KEY`, in health and traces.
pub const SERVICE: &str = "settlement";
/// The audience of API keys: people get them for the gateway, and other services take the same ones.
pub const AUDIENCE: &str = "infera";

/// What `run` needs to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    #[serde(flatten)]
    pub common: Common,
    /// Messages in work at a time, per queue.
    pub prefetch: u16,
    pub chain: ChainConfig,
    pub batch: BatchConfig,
    pub rewards: RewardsConfig,
    pub exposure: ExposureConfig,
    pub escrow: EscrowConfig,
    pub holds: HoldsConfig,
    pub governance: GovernanceConfig,
    #[serde(default)]
    pub prepaid_credits: Vec<Credit>,
}

/// Whether this service keeps the registry of its deployment.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GovernanceConfig {
    /// contracts.json; empty: the registry's files are kept by somebody else.
    pub contracts_path: PathBuf,
    pub poll_ms: u64,
}

/// How batches reach the chain.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChainConfig {
    /// JSON-RPC endpoint; empty takes the manifest's.
    pub rpc_url: String,
    /// Key of the settler role; empty anchors nothing.
    pub settler_key: Secret,
    /// Which block counts as final.
    pub finality: Finality,
    /// Blocks, the batch's own included, after which it counts as anchored; for finality by depth.
    pub confirmations: u64,
    pub from_block: u64,
    pub poll_ms: u64,
    pub resend_ms: i64,
    /// After so long in no block a transaction is replaced by one that pays more.
    pub bump_ms: i64,
    pub bump_percent: u32,
    /// The most that is ever offered, 10^9 wei per gas.
    pub max_fee_gwei: u64,
}

/// When reward roots are queued.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardsConfig {
    pub queue: bool,
    pub interval_secs: u32,
}

/// How much may be charged and not final on the chain.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExposureConfig {
    /// 10^-6 INFER; 0 for no cap.
    pub cap_micro: u64,
    pub check_ms: u64,
}

/// How consumers' escrows are followed and charged.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EscrowConfig {
    /// Blocks whose log is asked for at a time.
    pub log_blocks: u64,
    /// Accounts that one transaction charges at most.
    pub charges: u64,
    /// An account that owes less is not charged yet, unless it withdraws; 10^-6 INFER.
    pub charge_min_micro: u64,
    /// Escrow is not spent when the chain was not seen for so long.
    pub stale_secs: u32,
    /// What settling, posting and a block may take after a request's deadline.
    pub margin_secs: u32,
    /// What accounts may owe beyond their escrow without `/readyz` saying so, 10^-6 INFER.
    pub short_cap_micro: u64,
}

/// When a batch is formed.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchConfig {
    pub size: u64,
    pub age_ms: i64,
    pub limit: u64,
}

/// When a hold counts as forgotten.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HoldsConfig {
    pub grace_secs: u32,
    pub check_secs: u32,
}

/// Prepaid credit.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credit {
    /// Names this credit: it is given once.
    pub id: String,
    pub account: String,
    /// 10^-6 INFER.
    pub amount_micro: u64,
}

impl Config {
    /// Loads defaults, file and environment, and checks them.
    ///
    /// # Errors
    /// [`ConfigError`] naming the key and the remedy.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let config: Self = load(SERVICE, DEFAULTS, file)?;
        config.validate()?;
        Ok(config)
    }

    /// Checks across fields.
    ///
    /// # Errors
    /// [`ConfigError`] naming the key and the remedy.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let wrong = |message: String| Err(ConfigError::invalid(SERVICE, message));
        if self.prefetch == 0 {
            return wrong("`prefetch` is 0; it must be at least 1".into());
        }
        if self.chain.confirmations == 0 {
            return wrong("`chain.confirmations` is 0; 1 is the block that holds the batch".into());
        }
        if !self.chain.settler_key.is_empty()
            && let Err(error) = chain::parse_key("chain.settler_key", self.chain.settler_key.expose())
        {
            return wrong(error.to_string());
        }
        if self.chain.resend_ms < 1 || self.chain.poll_ms < 10 || self.batch.age_ms < 0 {
            return wrong(
                "`chain.resend_ms` must be at least 1, `chain.poll_ms` at least 10, `batch.age_ms` not negative".into(),
            );
        }
        if self.chain.bump_ms < 1
            || self.chain.bump_percent < MIN_BUMP_PERCENT
            || self.chain.bump_percent > 1_000
            || self.chain.max_fee_gwei == 0
        {
            return wrong(format!(
                "`chain.bump_ms` and `chain.max_fee_gwei` must be at least 1, `chain.bump_percent` between \
                 {MIN_BUMP_PERCENT} and 1000"
            ));
        }
        if self.exposure.check_ms < 10 || ledger::amount(self.exposure.cap_micro).is_err() {
            return wrong(
                "`exposure.check_ms` must be at least 10, `exposure.cap_micro` at most 10^18".into(),
            );
        }
        if self.governance.poll_ms < 10 {
            return wrong("`governance.poll_ms` must be at least 10".into());
        }
        let escrow = &self.escrow;
        if ledger::amount(escrow.charge_min_micro).is_err() || ledger::amount(escrow.short_cap_micro).is_err()
        {
            return wrong(
                "`escrow.charge_min_micro` and `escrow.short_cap_micro` must be at most 10^18".into(),
            );
        }
        if escrow.log_blocks == 0 || escrow.stale_secs == 0 || !(1..=MOST_CHARGES).contains(&escrow.charges) {
            return wrong(format!(
                "`escrow.log_blocks` and `escrow.stale_secs` must be at least 1, `escrow.charges` between 1 and \
                 {MOST_CHARGES}"
            ));
        }
        if self.batch.size == 0 || self.batch.limit < self.batch.size || self.batch.limit > 65_536 {
            return wrong("`batch.size` must be at least 1 and `batch.limit` between it and 65536".into());
        }
        if self.holds.check_secs == 0 {
            return wrong("`holds.check_secs` is 0; it must be at least 1".into());
        }
        let mut ids = BTreeSet::new();
        for credit in &self.prepaid_credits {
            if credit.id.is_empty() || credit.account.is_empty() || !ids.insert(&credit.id) {
                return wrong(format!(
                    "`prepaid_credits`: id `{}` for account `{}`: both must be there, and ids must differ",
                    credit.id, credit.account
                ));
            }
            if ledger::amount(credit.amount_micro).is_err() {
                return wrong(format!("`prepaid_credits`: the amount of `{}` is too large", credit.id));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(toml: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), toml).unwrap();
        Config::load(Some(file.path()))
    }

    #[test]
    fn defaults_are_usable_and_errors_name_the_key() {
        Config::load(None).unwrap();
        for (toml, named) in [
            ("prefetch = 0", "`prefetch`"),
            ("prefetches = 3", "prefetches"),
            ("[chain]\nconfirmations = 0", "`chain.confirmations`"),
            ("[chain]\nsettler_key = \"0xabc\"", "chain.settler_key"),
            ("[chain]\nbump_percent = 9", "`chain.bump_percent`"),
            ("[chain]\nfinality = \"soon\"", "finality"),
            ("[exposure]\ncheck_ms = 0", "`exposure.check_ms`"),
            ("[batch]\nsize = 0", "`batch.size`"),
            ("[batch]\nsize = 100\nlimit = 99", "`batch.limit`"),
            ("[holds]\ncheck_secs = 0", "`holds.check_secs`"),
            ("[[prepaid_credits]]\nid = \"a\"\naccount = \"\"\namount_micro = 1", "prepaid_credits"),
        ] {
            let error = with(toml).unwrap_err().to_string();
            assert!(error.contains(named), "{toml}: {error}");
        }
    }

    #[test]
    fn the_settlers_key_is_never_shown() {
        let key = "0x59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d";
        let config = with(&format!("[chain]\nsettler_key = \"{key}\"")).unwrap();
        assert!(!format!("{config:?}").contains("59c6995e"));
        assert!(!serde_json::to_string(&config).unwrap().contains("59c6995e"));
    }
}
