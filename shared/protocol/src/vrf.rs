//! Verifiable random draws (protocol sections 4 and 8): for a key and an input there is exactly one output and anyone can
//! check it, so that whoever draws can't try until a draw suits.
//!
//! ECVRF-RISTRETTO255-SHA512 of <https://c2sp.org/vrf-r255>, which is the construction of RFC 9381.

use crate::{
    bytes::{Hash32, VrfKey, VrfProof},
    hash::keccak,
};
use sha2::{Digest, Sha512};
use vrf_r255::{Proof, PublicKey, SecretKey};

const SUITE: &[u8] = b"\xFFc2sp.org/vrf-r255";

/// A dispatcher's secret.
#[derive(Clone)]
pub struct VrfSecret(SecretKey);

impl std::fmt::Debug for VrfSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("VrfSecret").field(&self.key()).finish()
    }
}

/// A proof that doesn't hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VrfError {
    #[error("the key is not a point of ristretto255")]
    Key,
    #[error("the proof does not hold for this key and input")]
    Proof,
}

impl VrfSecret {
    /// The secret that belongs to 32 random bytes; `None` for the one seed in 2^252 that has none.
    pub fn from_seed(seed: &[u8; 32]) -> Option<Self> {
        let mut scalar = blake3::derive_key("infera 2026 dispatcher's draws", seed);
        // Below 2^252, and so below the order of the group.
        scalar[31] &= 0x0f;
        Option::from(SecretKey::from_bytes(scalar)).map(Self)
    }

    pub fn key(&self) -> VrfKey {
        VrfKey(PublicKey::from(self.0).to_bytes())
    }

    /// The proof for an input; the same one every time.
    pub fn prove(&self, input: &Hash32) -> VrfProof {
        VrfProof(self.0.prove(&input.0).to_bytes())
    }
}

/// Checks a proof.
///
/// # Errors
/// [`VrfError`].
pub fn verify(key: &VrfKey, input: &Hash32, proof: &VrfProof) -> Result<(), VrfError> {
    let key = PublicKey::from_bytes(key.0).ok_or(VrfError::Key)?;
    let proof = Proof::from_bytes(proof.0).ok_or(VrfError::Proof)?;
    let output: Option<[u8; 64]> = key.verify(&input.0, &proof).into();
    output.map(drop).ok_or(VrfError::Proof)
}

/// The randomness of a proof that holds: keccak of its VRF output, which is a function of its first 32 bytes alone.
pub fn beta(proof: &VrfProof) -> Hash32 {
    let output = Sha512::new()
        .chain_update(SUITE)
        .chain_update([0x03])
        .chain_update(&proof.0[..32])
        .chain_update([0x00])
        .finalize();
    keccak(&[b"infera.beta.v2", &output])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_its_key_and_input_only() {
        let secret = VrfSecret::from_seed(&[7; 32]).unwrap();
        let (key, input) = (secret.key(), Hash32([1; 32]));
        let proof = secret.prove(&input);
        assert_eq!(secret.prove(&input), proof);
        assert_eq!(verify(&key, &input, &proof), Ok(()));
        assert_eq!(verify(&key, &Hash32([2; 32]), &proof), Err(VrfError::Proof));
        let other = VrfSecret::from_seed(&[8; 32]).unwrap();
        assert_eq!(verify(&other.key(), &input, &proof), Err(VrfError::Proof));
        assert_eq!(verify(&VrfKey([0xff; 32]), &input, &proof), Err(VrfError::Key));
        for at in 0..VrfProof::LEN {
            let mut changed = proof;
            changed.0[at] ^= 1;
            assert_eq!(verify(&key, &input, &changed), Err(VrfError::Proof), "byte {at}");
        }
        assert_ne!(beta(&proof), beta(&secret.prove(&Hash32([2; 32]))));
    }

    #[test]
    fn the_output_is_that_of_the_suite() {
        // https://c2sp.org/vrf-r255, test vector.
        let secret = "3431c2b03533e280b23232e280b34e2c3132c2b03238e280b23131e280b34500";
        let secret: [u8; 32] = hex::decode(secret).unwrap().try_into().unwrap();
        let proof =
            Option::<SecretKey>::from(SecretKey::from_bytes(secret)).unwrap().prove(b"c2sp.org/vrf-r255");
        let output = "dd653f0879b48c3ef69e13551239bec4cbcc1c18fe8894de2e9e1c790e18273603bf1c6c25d7a797aeff3c43fd32b974d\
                      3fcbd4bcce916007097922a3ea3a794";
        let output = hex::decode(output).unwrap();
        assert_eq!(beta(&VrfProof(proof.to_bytes())), keccak(&[b"infera.beta.v2", &output]));
    }
}
