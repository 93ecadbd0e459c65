//! What a network needs before its first service starts: keys, a chain with the contract, manifest and registry.

use std::{fs, path::Path};

use alloy::{
    primitives::{Address as EvmAddress, U256},
    providers::{Provider, ProviderBuilder},
};
use infera_protocol::{
    bytes::Address,
    identity::Domain,
    registry::{Manifest, Registry},
    vrf::VrfSecret,
};
use infera_runtime::{clock, jwt::Signer, network};
use infera_settlement::chain::{ChainReader, Deployment, deploy, parse_key};

use super::registry;
use crate::{
    keys,
    layout::{Layout, write_secret},
};

/// anvil's usual chain id.
pub const CHAIN_ID: u64 = 31_337;
const NETWORK: &str = "infera-devnet";
/// Ether that settler, treasury and guardian each get on the devnet for gas.
const GAS_WEI: u128 = 1_000 * 10_u128.pow(18);
/// Days that the printed API key lasts; a new one is made in its last day.
const KEY_DAYS: i64 = 30;
/// The models of a devnet, as `infera models --inspect` computes them.
const MODELS: &str = include_str!("../../../../deploy/models.json");

/// Secret keys of the network, made at the first start.
pub struct Keys {
    pub dispatcher: VrfSecret,
    pub settler: String,
    /// Deploys the contracts and has the supply.
    pub treasury: String,
    /// May veto rewards and pause: another key than the settler's, as on a public network.
    pub guardian: String,
    pub api_key: String,
}

/// Makes or loads the keys, and the public key set.
pub fn keys(layout: &Layout) -> Result<Keys, String> {
    let signer = Signer::load_or_create(&layout.key(keys::SIGNER)).map_err(|e| e.to_string())?;
    signer.write_jwks(&layout.jwks()).map_err(|e| e.to_string())?;
    let dispatcher =
        infera_dispatcher::load_or_create_key(&layout.key("dispatcher.key")).map_err(|e| e.to_string())?;
    let settler = load_or_create_secret(&layout.key("settler.key"))?;
    let treasury = load_or_create_secret(&layout.treasury_key())?;
    let guardian = load_or_create_secret(&layout.key("guardian.key"))?;
    let api_key = api_key(layout, &signer)?;
    Ok(Keys { dispatcher, settler, treasury, guardian, api_key })
}

fn api_key(layout: &Layout, signer: &Signer) -> Result<String, String> {
    let path = layout.key("demo.jwt");
    if let Ok(stored) = fs::read_to_string(&path) {
        let verifier =
            infera_runtime::jwt::Verifier::from_jwks_file(&layout.jwks()).map_err(|e| e.to_string())?;
        let last_day = clock::now_ms() / 1_000 + 86_400;
        if verifier
            .verify(stored.trim(), infera_gateway::keys::AUDIENCE)
            .is_ok_and(|claims| claims.exp > last_day)
        {
            return Ok(stored.trim().to_owned());
        }
    }
    let key = keys::create(signer, "demo", KEY_DAYS)?;
    write_secret(&path, key.as_bytes()).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    Ok(key)
}

fn load_or_create_secret(path: &Path) -> Result<String, String> {
    if let Ok(stored) = fs::read_to_string(path) {
        return Ok(stored.trim().to_owned());
    }
    let bytes: [u8; 32] = rand::random();
    let text = format!("0x{}", hex::encode(bytes));
    write_secret(path, text.as_bytes()).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    Ok(text)
}

/// Makes sure that the contracts stand on the devnet, and writes manifest and registry. The contracts' addresses lie
/// beside the manifest, in contracts.json.
///
/// # Errors
/// One sentence; also if the folder's ledger belongs to a chain that is gone.
pub async fn chain(layout: &Layout, keys: &Keys, rpc_url: &str) -> Result<(), String> {
    let wanted: Registry = serde_json::from_str(MODELS).map_err(|e| format!("deploy/models.json: {e}"))?;
    let former = read_manifest(layout)?;
    let address =
        |name, key: &str| Ok::<_, String>(parse_key(name, key).map_err(|e| e.to_string())?.address());
    let settler = address("settler key", &keys.settler)?;
    let guardian = address("guardian key", &keys.guardian)?;
    fund(rpc_url, &[settler, guardian, address("treasury key", &keys.treasury)?]).await?;
    let contract = match &former {
        Some(manifest) => {
            let contract = EvmAddress::from(manifest.domain.contract.0);
            ChainReader::connect(rpc_url, contract).await.map_err(|e| {
                format!(
                    "the chain of {} is gone ({e}), but its ledger is not: start anew with `make clean-data`",
                    layout.root().display()
                )
            })?;
            manifest.domain.contract
        }
        None => {
            let terms = Deployment::devnet(settler, guardian);
            let contracts =
                deploy::deploy(rpc_url, &keys.treasury, &wanted, &terms).await.map_err(|e| e.to_string())?;
            write_json(&layout.contracts(), &contracts)?;
            Address(contracts.settlement.into_array())
        }
    };
    let registry = registry::put_in_force(layout, former.as_ref(), &wanted, clock::now_ms())?;
    let manifest = Manifest {
        network: NETWORK.into(),
        domain: Domain { chain_id: CHAIN_ID, contract },
        rpc_url: rpc_url.to_owned(),
        dispatchers: vec![keys.dispatcher.key()],
        registry_hash: registry.hash().map_err(|e| e.to_string())?,
    };
    write_json(&layout.manifest(), &manifest)
}

fn read_manifest(layout: &Layout) -> Result<Option<Manifest>, String> {
    match fs::read(layout.manifest()) {
        Ok(text) => {
            serde_json::from_slice(&text).map(Some).map_err(|e| registry::unreadable(&layout.manifest(), &e))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("cannot read {}: {error}", layout.manifest().display())),
    }
}

pub(super) fn write_json<T: serde::Serialize>(path: &Path, value: &T) -> Result<(), String> {
    network::write_json(path, value).map_err(|e| e.to_string())
}

async fn fund(rpc_url: &str, accounts: &[EvmAddress]) -> Result<(), String> {
    let url = rpc_url.parse().map_err(|e| format!("{rpc_url} is not a URL: {e}"))?;
    let provider = ProviderBuilder::new().connect_http(url);
    for account in accounts {
        provider
            .raw_request::<_, ()>("anvil_setBalance".into(), (account, U256::from(GAS_WEI)))
            .await
            .map_err(|e| format!("the devnet does not fund {account}: {e}"))?;
    }
    Ok(())
}
