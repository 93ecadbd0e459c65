//! What proposals do: calls of the model registry, and others that only stand as they are.

use alloy::{
    primitives::{Bytes, U256, hex},
    sol_types::{SolCall, SolInterface},
};
use infera_protocol::{
    bytes::{Address, Hash32},
    governed::ModelTerms,
};
use serde::{Deserialize, Serialize};

use super::super::{ModelRegistry, ModelRegistry::ModelRegistryCalls};

impl From<ModelTerms> for ModelRegistry::Model {
    fn from(terms: ModelTerms) -> Self {
        Self {
            weightsRoot: terms.weights_root.0.into(),
            tokenizerHash: terms.tokenizer_hash.0.into(),
            templateHash: terms.template_hash.0.into(),
            endTokensHash: terms.end_tokens_hash.0.into(),
            vocabSize: terms.vocab_size,
            contextLength: terms.context_length,
            similarityThreshold: terms.similarity_threshold_millionths,
            priceCap: terms.price_cap_micro,
            active: terms.active,
        }
    }
}

impl From<ModelRegistry::Model> for ModelTerms {
    fn from(model: ModelRegistry::Model) -> Self {
        Self {
            weights_root: Hash32(model.weightsRoot.0),
            tokenizer_hash: Hash32(model.tokenizerHash.0),
            template_hash: Hash32(model.templateHash.0),
            end_tokens_hash: Hash32(model.endTokensHash.0),
            vocab_size: model.vocabSize,
            context_length: model.contextLength,
            similarity_threshold_millionths: model.similarityThreshold,
            price_cap_micro: model.priceCap,
            active: model.active,
        }
    }
}

/// A change of the model registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "snake_case")]
pub enum RegistryCall {
    AdmitModel { id: String, terms: ModelTerms },
    SetTerms { id: String, similarity_threshold_millionths: u32, price_cap_micro: u64 },
    WithdrawModel { id: String },
    ApproveRelease { release: Hash32, name: String },
    WithdrawRelease { release: Hash32 },
    SetCalibration { hash: Hash32 },
}

impl RegistryCall {
    /// What the contract is sent.
    pub fn encode(&self) -> Bytes {
        match self.clone() {
            Self::AdmitModel { id, terms } => {
                ModelRegistry::admitModelCall { id, model_: terms.into() }.abi_encode()
            }
            Self::SetTerms { id, similarity_threshold_millionths, price_cap_micro } => {
                ModelRegistry::setTermsCall {
                    id,
                    similarityThreshold: similarity_threshold_millionths,
                    priceCap: price_cap_micro,
                }
                .abi_encode()
            }
            Self::WithdrawModel { id } => ModelRegistry::withdrawModelCall { id }.abi_encode(),
            Self::ApproveRelease { release, name } => {
                ModelRegistry::approveReleaseCall { release: release.0.into(), name }.abi_encode()
            }
            Self::WithdrawRelease { release } => {
                ModelRegistry::withdrawReleaseCall { release: release.0.into() }.abi_encode()
            }
            Self::SetCalibration { hash } => {
                ModelRegistry::setCalibrationCall { hash: hash.0.into() }.abi_encode()
            }
        }
        .into()
    }

    /// None for what is no change of a registry, or is not encoded as [`RegistryCall::encode`] does it: decoders may
    /// differ about loose encodings.
    pub fn decode(data: &[u8]) -> Option<Self> {
        let call = ModelRegistryCalls::abi_decode_validate(data).ok()?;
        let change = match call {
            ModelRegistryCalls::admitModel(c) => Self::AdmitModel { id: c.id, terms: c.model_.into() },
            ModelRegistryCalls::setTerms(c) => Self::SetTerms {
                id: c.id,
                similarity_threshold_millionths: c.similarityThreshold,
                price_cap_micro: c.priceCap,
            },
            ModelRegistryCalls::withdrawModel(c) => Self::WithdrawModel { id: c.id },
            ModelRegistryCalls::approveRelease(c) => {
                Self::ApproveRelease { release: Hash32(c.release.0), name: c.name }
            }
            ModelRegistryCalls::withdrawRelease(c) => Self::WithdrawRelease { release: Hash32(c.release.0) },
            ModelRegistryCalls::setCalibration(c) => Self::SetCalibration { hash: Hash32(c.hash.0) },
            _ => return None,
        };
        (change.encode().as_ref() == data).then_some(change)
    }
}

/// One call of a proposal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Action {
    Registry(RegistryCall),
    /// A call of something else, or one that is not known here.
    Other {
        target: Address,
        /// Wei that go along, in decimal.
        value: String,
        /// The first four bytes of the call, in hex; shorter if the call is.
        selector: String,
        /// Length of the whole call.
        bytes: usize,
    },
}

impl Action {
    /// `registry` is where the network's registry is: the same call of another contract changes nothing here.
    pub(super) fn of(registry: alloy::primitives::Address, call: &RawCall) -> Self {
        let known = (call.target == registry && call.value.is_zero())
            .then(|| RegistryCall::decode(&call.data))
            .flatten();
        known.map_or_else(
            || Self::Other {
                target: Address(call.target.into()),
                value: call.value.to_string(),
                selector: hex::encode_prefixed(&call.data[..call.data.len().min(4)]),
                bytes: call.data.len(),
            },
            Self::Registry,
        )
    }
}

/// A call as it stands in a proposal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RawCall {
    pub target: alloy::primitives::Address,
    pub value: U256,
    pub data: Bytes,
}

#[cfg(test)]
mod tests {
    use infera_protocol::governed::end_tokens_hash;

    use super::*;

    fn terms() -> ModelTerms {
        ModelTerms {
            weights_root: Hash32([1; 32]),
            tokenizer_hash: Hash32([2; 32]),
            template_hash: Hash32([3; 32]),
            end_tokens_hash: end_tokens_hash(&[2, 0]),
            vocab_size: 9,
            context_length: 10,
            similarity_threshold_millionths: 11,
            price_cap_micro: 12,
            active: true,
        }
    }

    #[test]
    fn every_change_is_read_as_it_was_written() {
        let id = || "gemma".to_owned();
        let release = Hash32([4; 32]);
        let calls = [
            RegistryCall::AdmitModel { id: id(), terms: terms() },
            RegistryCall::SetTerms { id: id(), similarity_threshold_millionths: 5, price_cap_micro: 6 },
            RegistryCall::WithdrawModel { id: id() },
            RegistryCall::ApproveRelease { release, name: "0.3.1".into() },
            RegistryCall::WithdrawRelease { release },
            RegistryCall::SetCalibration { hash: Hash32([5; 32]) },
        ];
        let registry = alloy::primitives::Address::repeat_byte(7);
        for call in calls {
            let data = call.encode();
            assert_eq!(RegistryCall::decode(&data), Some(call.clone()));
            assert_eq!(RegistryCall::decode(&data[..data.len() - 1]), None, "{call:?} cut short");
            let mut raw = RawCall { target: registry, value: U256::ZERO, data };
            assert_eq!(Action::of(registry, &raw), Action::Registry(call));
            raw.target = alloy::primitives::Address::repeat_byte(8);
            assert!(matches!(Action::of(registry, &raw), Action::Other { .. }), "of another contract");
        }
    }

    #[test]
    fn other_calls_stand_as_they_are() {
        let registry = alloy::primitives::Address::repeat_byte(7);
        let call = ModelRegistry::transferOwnershipCall { newOwner: registry };
        let raw = RawCall { target: registry, value: U256::from(5), data: call.abi_encode().into() };
        let other = Action::Other {
            target: Address([7; 20]),
            value: "5".into(),
            selector: "0xf2fde38b".into(),
            bytes: 36,
        };
        assert_eq!(Action::of(registry, &raw), other);
        let empty = RawCall { data: Bytes::new(), ..raw };
        assert!(matches!(Action::of(registry, &empty), Action::Other { selector, .. } if selector == "0x"));
    }
}
