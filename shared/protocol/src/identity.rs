//! Identities (protocol section 1): nodes sign with Ed25519, operators bind nodes with EIP-712.

use crate::{
    bytes::{Address, EvmSignature, Hash32, NodeId, Signature},
    hash::Encoder,
    typed,
};
use ed25519_dalek::{Signer, SigningKey, VerifyingKey};
use k256::ecdsa::SigningKey as EvmKey;
use serde::{Deserialize, Serialize};

/// The network that a signature is for: signatures of one network are worthless on another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Domain {
    pub chain_id: u64,
    /// The settlement contract.
    pub contract: Address,
}

impl Domain {
    pub(crate) fn encode(&self, encoder: Encoder) -> Encoder {
        encoder.u64(self.chain_id).fixed(&self.contract.0)
    }
}

/// A signature that doesn't hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("the node key is not a valid Ed25519 key")]
    BadKey,
    #[error("the Ed25519 signature does not match")]
    BadSignature,
    #[error("the operator's EIP-712 signature can't be recovered")]
    BadEvmSignature,
    #[error("the binding was signed by {actual}, not by operator {expected}")]
    WrongOperator { expected: Address, actual: Address },
    #[error(
        "the binding expired at {expiry_ms} ms: connect again with a new one, which a node signs for each session"
    )]
    Expired { expiry_ms: i64 },
}

/// Signs a digest with a node's (or dispatcher's) Ed25519 key.
pub fn sign(key: &SigningKey, digest: &Hash32) -> Signature {
    Signature(key.sign(&digest.0).to_bytes())
}

/// The public id of a key.
pub fn node_id(key: &SigningKey) -> NodeId {
    NodeId(key.verifying_key().to_bytes())
}

/// Strict verification: no small-order keys, no malleable signatures.
pub fn verify(node: &NodeId, digest: &Hash32, signature: &Signature) -> Result<(), IdentityError> {
    let key = VerifyingKey::from_bytes(&node.0).map_err(|_| IdentityError::BadKey)?;
    let signature = ed25519_dalek::Signature::from_bytes(&signature.0);
    key.verify_strict(&digest.0, &signature).map_err(|_| IdentityError::BadSignature)
}

/// The longest that a binding lasts, ms. Evidence against a node costs the stake until its binding has been over for the
/// unbonding time of the contract (`InferaStaking`), so that it has to be kept for so much longer.
pub const MAX_BINDING_MS: i64 = 30 * 24 * 3_600 * 1_000;

/// What an operator signs to own a node: EIP-712 `NodeBinding`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeBinding {
    pub node: NodeId,
    /// The node's own secp256k1 address, for what a contract must check.
    pub signer: Address,
    pub expiry_ms: i64,
}

impl NodeBinding {
    /// The EIP-712 digest in the domain {name "Infera", version "1", chainId, verifyingContract}.
    pub fn digest(&self, domain: &Domain) -> Hash32 {
        let expiry_ms = u64::try_from(self.expiry_ms).unwrap_or(0);
        let words = [self.node.0, typed::word_address(&self.signer), typed::word_u64(expiry_ms)];
        typed::digest(domain, "NodeBinding(bytes32 node,address signer,uint256 expiryMs)", &words)
    }

    /// Signs as the operator.
    pub fn sign(&self, domain: &Domain, operator: &EvmKey) -> Result<EvmSignature, IdentityError> {
        typed::sign(&self.digest(domain), operator)
    }

    /// Checks that `operator` signed this binding and that it holds at `now_ms`.
    pub fn verify(
        &self,
        domain: &Domain,
        operator: &Address,
        signature: &EvmSignature,
        now_ms: i64,
    ) -> Result<(), IdentityError> {
        if self.expiry_ms <= now_ms {
            return Err(IdentityError::Expired { expiry_ms: self.expiry_ms });
        }
        let actual = typed::recover(&self.digest(domain), signature)?;
        if actual == *operator {
            Ok(())
        } else {
            Err(IdentityError::WrongOperator { expected: *operator, actual })
        }
    }
}

/// The EVM address of a secp256k1 key.
pub fn evm_address(key: &EvmKey) -> Address {
    typed::address_of(key.verifying_key())
}

/// What a node says of itself when its session starts; its signature covers the challenge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HelloClaims {
    pub node: NodeId,
    pub operator: Address,
    pub binding: NodeBinding,
    pub release_hash: Hash32,
    pub weights_root: Hash32,
    /// Numerics class, `exact` or `fast`.
    pub class: String,
    pub slots: u32,
}

/// The digest that a hello's Ed25519 signature covers.
pub fn hello_digest(domain: &Domain, nonce: &[u8; 32], claims: &HelloClaims) -> Hash32 {
    domain
        .encode(Encoder::new("infera.hello.v1"))
        .fixed(nonce)
        .fixed(&claims.node.0)
        .fixed(&claims.operator.0)
        .fixed(&claims.binding.signer.0)
        .u64(u64::try_from(claims.binding.expiry_ms).unwrap_or(0))
        .fixed(&claims.release_hash.0)
        .fixed(&claims.weights_root.0)
        .bytes(claims.class.as_bytes())
        .u32(claims.slots)
        .keccak()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain() -> Domain {
        Domain { chain_id: 31337, contract: Address([9; 20]) }
    }

    #[test]
    fn a_binding_holds_for_its_operator_network_and_time_only() {
        let operator = EvmKey::from_slice(&[7; 32]).unwrap();
        let binding = NodeBinding { node: NodeId([1; 32]), signer: Address([2; 20]), expiry_ms: 1_000 };
        let signature = binding.sign(&domain(), &operator).unwrap();
        let address = evm_address(&operator);
        assert_eq!(binding.verify(&domain(), &address, &signature, 999), Ok(()));
        assert_eq!(
            binding.verify(&domain(), &address, &signature, 1_000),
            Err(IdentityError::Expired { expiry_ms: 1_000 })
        );
        let elsewhere = Domain { chain_id: 1, ..domain() };
        assert!(binding.verify(&elsewhere, &address, &signature, 0).is_err());
        let other = NodeBinding { node: NodeId([3; 32]), ..binding };
        assert!(other.verify(&domain(), &address, &signature, 0).is_err());
        assert!(binding.verify(&domain(), &Address([8; 20]), &signature, 0).is_err());
    }

    #[test]
    fn the_address_of_a_known_key() {
        // The first account of anvil and hardhat.
        let key = hex::decode("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80").unwrap();
        assert_eq!(
            evm_address(&EvmKey::from_slice(&key).unwrap()).to_string(),
            "0xf39fd6e51aad88f6f4ce6ab8827279cfffb92266"
        );
    }

    #[test]
    fn a_signature_of_another_digest_fails() {
        let key = SigningKey::from_bytes(&[5; 32]);
        let signature = sign(&key, &Hash32([1; 32]));
        assert_eq!(verify(&node_id(&key), &Hash32([1; 32]), &signature), Ok(()));
        assert_eq!(verify(&node_id(&key), &Hash32([2; 32]), &signature), Err(IdentityError::BadSignature));
    }
}
