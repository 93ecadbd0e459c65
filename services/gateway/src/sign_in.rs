//! Sign-in with Ethereum: nonces that are given out once and taken once, and the API keys that signatures buy.
//!
//! Nonces live in the key-value store, so that one replica takes what another gave out. Without that store nobody signs
//! in; keys that exist go on working.

use std::time::Duration;

use infera_protocol::siwe::Origin;
use infera_runtime::jwt::{Claims, Signer, Verifier};
use infera_runtime::kv::{Kv, KvError};
use infera_runtime::network;
use rand::Rng;
use rand::distr::Alphanumeric;

use crate::config::Config;
use crate::error::Error;
use crate::keys::AUDIENCE;

/// Letters and digits of a nonce: 142 bits.
const NONCE_CHARS: usize = 24;

/// What signing in needs.
pub(crate) struct SignIn {
    signer: Signer,
    /// The places that a message may be for; this gateway is the first.
    pub origins: Vec<Origin>,
    pub chain_id: u64,
}

impl SignIn {
    /// `None` where no signing key is configured.
    ///
    /// # Errors
    /// One sentence: a file cannot be read, or nobody would accept the keys that are signed here.
    pub(crate) fn load(config: &Config, verifier: &Verifier) -> Result<Option<Self>, Error> {
        if !config.signs_in() {
            return Ok(None);
        }
        let signer = Signer::load(&config.signing_key_path)?;
        let probe = signer.issue(&Claims::new("probe", AUDIENCE, &[], 60))?;
        verifier.verify(&probe, AUDIENCE).map_err(|error| {
            Error::SigningKey(format!(
                "`signing_key_path` = {}: {error}; put its public half into {}",
                config.signing_key_path.display(),
                config.common.jwks_path.display()
            ))
        })?;
        let manifest = network::manifest(&config.common.manifest_path)?;
        Ok(Some(Self { signer, origins: config.origins(), chain_id: manifest.domain.chain_id }))
    }

    /// An API key that says `claims`.
    pub(crate) fn key(&self, claims: &Claims) -> Result<String, Error> {
        Ok(self.signer.issue(claims)?)
    }
}

/// Gives out a nonce that lasts for `life`.
pub(crate) async fn nonce(kv: &Kv, life: Duration) -> Result<String, KvError> {
    let nonce: String = rand::rng().sample_iter(Alphanumeric).take(NONCE_CHARS).map(char::from).collect();
    kv.set(&given(&nonce), b"1", life).await?;
    Ok(nonce)
}

/// Takes a nonce: true for the first one who brings it while it lasts. `life` is that of [`nonce`].
pub(crate) async fn take(kv: &Kv, nonce: &str, life: Duration) -> Result<bool, KvError> {
    // Counting is what the store does in one step, so that of two replicas one is first. The count outlives the nonce.
    if kv.get(&given(nonce)).await?.is_none() {
        return Ok(false);
    }
    Ok(kv.incr(&format!("gateway.nonce.taken.{nonce}"), 1, life * 2).await? == 1)
}

fn given(nonce: &str) -> String {
    format!("gateway.nonce.given.{nonce}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_nonce_is_taken_once() {
        let kv = Kv::memory();
        let life = Duration::from_secs(60);
        let (a, b) = (nonce(&kv, life).await.unwrap(), nonce(&kv, life).await.unwrap());
        assert!(a != b && a.len() == NONCE_CHARS && a.bytes().all(|byte| byte.is_ascii_alphanumeric()));
        assert!(!take(&kv, "neverGivenOut", life).await.unwrap());
        assert!(take(&kv, &a, life).await.unwrap());
        assert!(!take(&kv, &a, life).await.unwrap());
        assert!(take(&kv, &b, life).await.unwrap());
        assert!(!take(&kv, &format!("taken.{a}"), life).await.unwrap_or(false));
    }
}
