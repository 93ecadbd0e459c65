//! A consumer's permission to be charged (section 10), signed so that the settlement contract can check it.

use crate::{
    bytes::{Address, EvmSignature, Hash32},
    identity::{Domain, IdentityError},
    typed,
};
use k256::ecdsa::SigningKey as EvmKey;

/// The most that may ever be charged to `account`, over its lifetime. A later voucher says more; an earlier one that is
/// shown again says nothing new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Voucher {
    pub account: Address,
    /// 10^-6 INFER.
    pub cumulative_micro: u64,
}

impl Voucher {
    /// EIP-712 `Voucher(address account,uint256 cumulative)` in the network's domain.
    pub fn digest(&self, domain: &Domain) -> Hash32 {
        let words = [typed::word_address(&self.account), typed::word_u64(self.cumulative_micro)];
        typed::digest(domain, "Voucher(address account,uint256 cumulative)", &words)
    }

    /// Signs with the account's key. Nothing here makes sure that it is the account's.
    ///
    /// # Errors
    /// [`IdentityError::BadEvmSignature`] if the key cannot sign.
    pub fn sign(&self, domain: &Domain, key: &EvmKey) -> Result<EvmSignature, IdentityError> {
        typed::sign(&self.digest(domain), key)
    }

    /// That the account signed this voucher for this network, by the rules of the contract.
    ///
    /// # Errors
    /// [`IdentityError::BadEvmSignature`]: signed by somebody else, for another chain, contract, account or amount, or in
    /// another form.
    pub fn check(&self, domain: &Domain, signature: &EvmSignature) -> Result<(), IdentityError> {
        match typed::recover(&self.digest(domain), signature) {
            Ok(signer) if signer == self.account => Ok(()),
            _ => Err(IdentityError::BadEvmSignature),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::evm_address;
    use k256::ecdsa::Signature;
    use proptest::prelude::*;

    fn domain() -> Domain {
        Domain { chain_id: 31_337, contract: Address([9; 20]) }
    }

    fn key(seed: u8) -> EvmKey {
        EvmKey::from_slice(&[seed; 32]).unwrap()
    }

    /// The contracts' tests hold this value too (`Rewards.t.sol`).
    #[test]
    fn the_contract_computes_the_same() {
        let voucher = Voucher { account: Address([0x11; 20]), cumulative_micro: 1_234_567 };
        assert_eq!(
            voucher.digest(&domain()).to_string(),
            "0x65f8834fc15ce2e0c4953dab67bc894146fdf6efeefc5eb036fd8351e3d6c18f"
        );
    }

    #[test]
    fn only_the_accounts_own_words_count() {
        let (key, other) = (key(7), key(8));
        let voucher = Voucher { account: evm_address(&key), cumulative_micro: 500 };
        let signature = voucher.sign(&domain(), &key).unwrap();
        assert_eq!(voucher.check(&domain(), &signature), Ok(()));

        let more = Voucher { cumulative_micro: 501, ..voucher };
        let less = Voucher { cumulative_micro: 499, ..voucher };
        let others = Voucher { account: evm_address(&other), ..voucher };
        let chain = Domain { chain_id: 1, ..domain() };
        let contract = Domain { contract: Address([8; 20]), ..domain() };
        let refused = [
            ("another amount", more.check(&domain(), &signature)),
            ("a smaller amount", less.check(&domain(), &signature)),
            ("another account", others.check(&domain(), &signature)),
            ("another chain", voucher.check(&chain, &signature)),
            ("another contract", voucher.check(&contract, &signature)),
            ("another's signature", voucher.check(&domain(), &voucher.sign(&domain(), &other).unwrap())),
            ("nothing", voucher.check(&domain(), &EvmSignature::ZERO)),
        ];
        for (what, checked) in refused {
            assert_eq!(checked, Err(IdentityError::BadEvmSignature), "{what}");
        }
    }

    #[test]
    fn a_signature_has_one_form() {
        let key = key(7);
        let voucher = Voucher { account: evm_address(&key), cumulative_micro: 500 };
        let signature = voucher.sign(&domain(), &key).unwrap();
        let (r, s) = Signature::from_slice(&signature.0[..64]).unwrap().split_scalars();
        let mut high = signature;
        high.0[..64].copy_from_slice(&Signature::from_scalars(r, -s).unwrap().to_bytes());
        high.0[64] = 27 + 28 - signature.0[64];
        assert_eq!(voucher.check(&domain(), &high), Err(IdentityError::BadEvmSignature), "high s (EIP-2)");
        for v in (0..=u8::MAX).filter(|v| *v != signature.0[64]) {
            let mut other = signature;
            other.0[64] = v;
            assert_eq!(voucher.check(&domain(), &other), Err(IdentityError::BadEvmSignature), "v = {v}");
        }
        let text = signature.to_string();
        assert_eq!(text.parse(), Ok(signature));
        // EIP-2098's 64 bytes, one byte too many, no 0x, capitals.
        let capitals = format!("0x{}", text[2..].to_ascii_uppercase());
        for malformed in [&text[..130], &format!("{text}00"), &text[2..], &capitals, "0x", ""] {
            assert!(malformed.parse::<EvmSignature>().is_err(), "{malformed}");
        }
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_refused(amount in any::<u64>(), at in 0_usize..65, change in 1_u8..) {
            let key = key(7);
            let voucher = Voucher { account: evm_address(&key), cumulative_micro: amount };
            let mut signature = voucher.sign(&domain(), &key).unwrap();
            prop_assert!(voucher.check(&domain(), &signature).is_ok());
            signature.0[at] ^= change;
            prop_assert!(voucher.check(&domain(), &signature).is_err());
        }
    }
}
