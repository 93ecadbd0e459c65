//! A network's contracts: where they are, who acts on them, and what a devnet gives for nothing.

use std::{fs, path::Path};

use alloy::primitives::{Address, U256};
use infera_runtime::network;
use infera_settlement::chain::{Contracts, operator::Operator};
use serde::de::DeserializeOwned;

/// Gas money that an account gets on a devnet, where nobody can buy any.
const DEVNET_WEI: u128 = 10 * 10_u128.pow(18);
/// anvil's chain id: a devnet.
const DEVNET: u64 = 31_337;
/// A key file has 67 bytes.
const MAX_KEY_BYTES: u64 = 1024;

/// An endpoint and the contracts behind it.
#[derive(Debug, Clone)]
pub struct Place {
    pub rpc: String,
    pub contracts: Contracts,
}

impl Place {
    /// What is named, and for the rest what the files in the data folder say.
    pub fn find(folder: &Path, contracts: Option<&Path>, rpc: Option<&str>) -> Result<Self, String> {
        let path = contracts.map_or_else(|| folder.join("contracts.json"), Path::to_owned);
        let contracts = read_json(&path).map_err(|e| {
            format!(
                "{e}; name the contracts' addresses with --contracts, or the network's folder with --data"
            )
        })?;
        let rpc = match rpc {
            Some(rpc) => rpc.to_owned(),
            None => {
                network::manifest(&folder.join("network.json"))
                    .map_err(|e| format!("{e}; name the chain's endpoint with --rpc"))?
                    .rpc_url
            }
        };
        Ok(Self { rpc, contracts })
    }

    pub fn is_devnet(&self) -> bool {
        self.contracts.chain_id == DEVNET
    }

    /// Whoever has `key`. A devnet's time stands still between transactions: its clock is set before it is looked at.
    pub async fn connect(&self, key: &str) -> Result<Operator, String> {
        let who = Operator::connect(&self.rpc, key, self.contracts).await.map_err(|e| e.to_string())?;
        if self.is_devnet() {
            who.devnet_pass(0).await.map_err(|e| e.to_string())?;
        }
        Ok(who)
    }

    /// On a devnet: money for gas, where there is none; true if it was given.
    pub async fn gas(&self, who: &Operator) -> Result<bool, String> {
        let me = who.address();
        if !self.is_devnet() || !who.gas_money(me).await.map_err(|e| e.to_string())?.is_zero() {
            return Ok(false);
        }
        who.devnet_gas(me, U256::from(DEVNET_WEI)).await.map_err(|e| e.to_string())?;
        Ok(true)
    }

    /// On a devnet: tokens of its treasury, whose key is in the data folder.
    pub async fn treasury_gives(&self, folder: &Path, to: Address, micro: u128) -> Result<(), String> {
        let key = secret("the treasury's key", &folder.join("keys/treasury.key"), "only a devnet has one")?;
        let treasury = self.connect(&key).await?;
        treasury.transfer(to, micro).await.map(drop).map_err(|e| e.to_string())
    }
}

/// A key as its file has it. One that others can read is refused.
pub fn secret(what: &str, path: &Path, remedy: &str) -> Result<String, String> {
    let unreadable = |e: std::io::Error| format!("cannot read {what} {}: {e}; {remedy}", path.display());
    let meta = fs::metadata(path).map_err(unreadable)?;
    if std::os::unix::fs::PermissionsExt::mode(&meta.permissions()) & 0o077 != 0 {
        return Err(format!("the key {} can be read by others: run chmod 600 on it", path.display()));
    }
    if meta.len() > MAX_KEY_BYTES {
        return Err(format!("{} is too large for a key: write 0x and 64 hex digits", path.display()));
    }
    fs::read_to_string(path).map_err(unreadable)
}

pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, String> {
    let bytes = fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    serde_json::from_slice(&bytes).map_err(|e| format!("{} is damaged: {e}", path.display()))
}
