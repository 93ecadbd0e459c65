//! EIP-712: what is signed with secp256k1 so that the network's contracts can check it.
//!
//! One domain for all of it: {name "Infera", version "1", chainId, verifyingContract = the settlement contract}. The
//! contracts are `services/settlement/contracts/src/{InferaSettlement,InferaStaking}.sol`; their tests hold the same
//! golden values as the tests here.

use crate::{
    bytes::{Address, EvmSignature, Hash32},
    commitment::Slot,
    hash::keccak,
    identity::{Domain, IdentityError},
    request::Output,
};
use k256::ecdsa::{
    RecoveryId, Signature as EcdsaSignature, SigningKey as EvmKey, VerifyingKey as EvmVerifyingKey,
};

/// The digest of a message in the network's domain. `type_string` is EIP-712's encodeType, `words` its fields, each as
/// one ABI word.
pub(crate) fn digest(domain: &Domain, type_string: &str, words: &[[u8; 32]]) -> Hash32 {
    let separator = keccak(&[
        &keccak(&[b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"]).0,
        &keccak(&[b"Infera"]).0,
        &keccak(&[b"1"]).0,
        &word_u64(domain.chain_id),
        &word_address(&domain.contract),
    ]);
    let type_hash = keccak(&[type_string.as_bytes()]);
    let mut parts: Vec<&[u8]> = vec![&type_hash.0];
    parts.extend(words.iter().map(<[u8; 32]>::as_slice));
    let message = keccak(&parts);
    keccak(&[b"\x19\x01", &separator.0, &message.0])
}

/// What a node's bound signer signs along with its commitment, so that two different ones are evidence.
pub fn slot_commitment_digest(domain: &Domain, slot: &Slot, commitment: &Hash32) -> Hash32 {
    let words = [slot.request_hash.0, word_u64(slot.attempt.into()), slot.node.0, commitment.0];
    digest(
        domain,
        "SlotCommitment(bytes32 requestHash,uint32 attempt,bytes32 node,bytes32 commitment)",
        &words,
    )
}

/// What a node's bound signer signs along with its reveal, so that one that contradicts its commitment is evidence.
pub fn slot_reveal_digest(domain: &Domain, slot: &Slot, output: &Output, salt: &Hash32) -> Hash32 {
    let roots = [&output.tokens_root(), &output.fingerprint_root()];
    slot_reveal_digest_of(domain, slot, roots, output.finish.code(), salt)
}

/// The same of an output of which only the roots are known: of its tokens and of its fingerprints.
pub(crate) fn slot_reveal_digest_of(
    domain: &Domain,
    slot: &Slot,
    [tokens_root, fingerprint_root]: [&Hash32; 2],
    finish: u8,
    salt: &Hash32,
) -> Hash32 {
    let words = [
        slot.request_hash.0,
        word_u64(slot.attempt.into()),
        slot.node.0,
        tokens_root.0,
        fingerprint_root.0,
        word_u64(finish.into()),
        salt.0,
    ];
    let type_string = "SlotReveal(bytes32 requestHash,uint32 attempt,bytes32 node,bytes32 tokensRoot,\
                       bytes32 fingerprintRoot,uint8 finish,bytes32 salt)";
    digest(domain, type_string, &words)
}

/// Signs a digest: r, s, v with v 27 or 28.
///
/// # Errors
/// [`IdentityError::BadEvmSignature`] if the key cannot sign.
pub fn sign(digest: &Hash32, key: &EvmKey) -> Result<EvmSignature, IdentityError> {
    let (signature, recovery) =
        key.sign_prehash_recoverable(&digest.0).map_err(|_| IdentityError::BadEvmSignature)?;
    let mut bytes = [0; 65];
    bytes[..64].copy_from_slice(&signature.to_bytes());
    bytes[64] = 27 + recovery.to_byte();
    Ok(EvmSignature(bytes))
}

/// Who signed a digest, by the rules of the contracts.
///
/// # Errors
/// [`IdentityError::BadEvmSignature`] for a signature in a second form (high s, EIP-2) or none at all.
pub fn recover(digest: &Hash32, signature: &EvmSignature) -> Result<Address, IdentityError> {
    let parsed =
        EcdsaSignature::from_slice(&signature.0[..64]).map_err(|_| IdentityError::BadEvmSignature)?;
    if parsed.normalize_s().is_some() {
        return Err(IdentityError::BadEvmSignature);
    }
    let recovery = signature.0[64]
        .checked_sub(27)
        .and_then(RecoveryId::from_byte)
        .ok_or(IdentityError::BadEvmSignature)?;
    let key = EvmVerifyingKey::recover_from_prehash(&digest.0, &parsed, recovery)
        .map_err(|_| IdentityError::BadEvmSignature)?;
    Ok(address_of(&key))
}

pub(crate) fn address_of(key: &EvmVerifyingKey) -> Address {
    let point = key.to_encoded_point(false);
    let hash = keccak(&[&point.as_bytes()[1..]]);
    let mut address = [0; 20];
    address.copy_from_slice(&hash.0[12..]);
    Address(address)
}

pub(crate) fn word_u64(value: u64) -> [u8; 32] {
    let mut word = [0; 32];
    word[24..].copy_from_slice(&value.to_be_bytes());
    word
}

pub(crate) fn word_address(address: &Address) -> [u8; 32] {
    let mut word = [0; 32];
    word[12..].copy_from_slice(&address.0);
    word
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{bytes::NodeId, commitment::commitment, identity::evm_address, request::Finish};

    fn domain() -> Domain {
        Domain { chain_id: 31_337, contract: Address([9; 20]) }
    }

    /// The contracts' tests hold these values too (`Staking.t.sol`, `Rewards.t.sol`).
    #[test]
    fn the_contracts_compute_the_same() {
        let slot = Slot { request_hash: Hash32([1; 32]), attempt: 2, node: NodeId([3; 32]) };
        let output = Output { tokens: vec![5, 6], fingerprints: vec![7; 16], finish: Finish::Eos };
        let salt = Hash32([6; 32]);
        let hex = |hash: Hash32| hash.to_string();
        assert_eq!(
            hex(output.tokens_root()),
            "0x41ba5dd80c26b0b008fea16f8e4b6e530bced44bfcde3070fb23a6aacf7bfd40"
        );
        assert_eq!(
            hex(output.fingerprint_root()),
            "0x933b6c3495d1fa1af37039cb1ad2bfe96ddb21cfc388dce7ddb9a737bdfb526d"
        );
        let committed = commitment(&domain(), &slot, &output, &salt);
        assert_eq!(hex(committed), "0x830ea93d385484d0c7450d7c3452462a760a07b1d3bdf17c75802a68ef21eac2");
        assert_eq!(
            hex(slot_commitment_digest(&domain(), &slot, &committed)),
            "0x6f168a2eda7e2101c9894f220904ba1fa21136a60ce251f1d29591d0051fd827"
        );
        assert_eq!(
            hex(slot_reveal_digest(&domain(), &slot, &output, &salt)),
            "0xc7fecd5f0fe1416fb777e575e9abc78e7e96efd86bff473cca06554f3105f3ad"
        );
    }

    #[test]
    fn a_signature_names_its_signer_in_one_form_only() {
        let key = EvmKey::from_slice(&[7; 32]).unwrap();
        let digest = keccak(&[b"some words"]);
        let signature = sign(&digest, &key).unwrap();
        assert_eq!(recover(&digest, &signature), Ok(evm_address(&key)));
        let other = keccak(&[b"other words"]);
        assert_ne!(recover(&other, &signature), Ok(evm_address(&key)));
        let parsed = EcdsaSignature::from_slice(&signature.0[..64]).unwrap();
        let (r, s) = parsed.split_scalars();
        let high = EcdsaSignature::from_scalars(r, -s).unwrap();
        let mut flipped = signature;
        flipped.0[..64].copy_from_slice(&high.to_bytes());
        flipped.0[64] = 27 + 28 - signature.0[64];
        assert_eq!(recover(&digest, &flipped), Err(IdentityError::BadEvmSignature));
        let mut unknown = signature;
        unknown.0[64] = 0;
        assert_eq!(recover(&digest, &unknown), Err(IdentityError::BadEvmSignature));
    }
}
