//! Evidence that costs an operator its stake: two statements for one slot that contradict each other, each signed by the
//! node's bound signer (protocol section 10). `InferaStaking` checks the same, so that anybody can report it.

use serde::{Deserialize, Serialize};

use crate::{
    bytes::{Address, EvmSignature, Hash32},
    commitment::{Slot, commitment_of},
    identity::{Domain, IdentityError, NodeBinding},
    request::Output,
    typed,
};

/// By what a node's signer is its operator's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedBinding {
    pub binding: NodeBinding,
    /// The operator's.
    pub signature: EvmSignature,
}

/// What a node's bound signer put its name to, along with a commitment or a reveal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statement {
    pub signature: EvmSignature,
    pub bound: SignedBinding,
}

impl Statement {
    /// Whether the bound signer signed this commitment for this slot.
    pub fn is_of_commitment(&self, domain: &Domain, slot: &Slot, commitment: &Hash32) -> bool {
        self.is_of(&typed::slot_commitment_digest(domain, slot, commitment))
    }

    /// Whether the bound signer signed this reveal for this slot.
    pub fn is_of_reveal(&self, domain: &Domain, slot: &Slot, output: &Output, salt: &Hash32) -> bool {
        self.is_of(&typed::slot_reveal_digest(domain, slot, output, salt))
    }

    fn is_of(&self, digest: &Hash32) -> bool {
        typed::recover(digest, &self.signature).is_ok_and(|signer| signer == self.bound.binding.signer)
    }
}

/// A commitment that the node's bound signer signed (`SlotCommitment`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccusedCommitment {
    pub commitment: Hash32,
    pub signature: EvmSignature,
    pub bound: SignedBinding,
}

impl AccusedCommitment {
    pub fn new(commitment: Hash32, Statement { signature, bound }: Statement) -> Self {
        Self { commitment, signature, bound }
    }
}

/// A reveal that the node's bound signer signed (`SlotReveal`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccusedReveal {
    pub tokens_root: Hash32,
    pub fingerprint_root: Hash32,
    pub finish: u8,
    pub salt: Hash32,
    pub signature: EvmSignature,
    pub bound: SignedBinding,
}

impl AccusedReveal {
    pub fn new(output: &Output, salt: Hash32, Statement { signature, bound }: Statement) -> Self {
        Self {
            tokens_root: output.tokens_root(),
            fingerprint_root: output.fingerprint_root(),
            finish: output.finish.code(),
            salt,
            signature,
            bound,
        }
    }
}

/// What costs an operator half of its stake; as JSON, the file that `infera operator slash` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Contradiction {
    TwoCommitments { slot: Slot, first: AccusedCommitment, second: AccusedCommitment },
    TwoReveals { slot: Slot, first: AccusedReveal, second: AccusedReveal },
    FalseReveal { slot: Slot, committed: AccusedCommitment, revealed: AccusedReveal },
}

/// Why evidence proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ContradictionError {
    #[error("the two statements say the same")]
    None,
    #[error("a statement is not signed by the signer that its binding names")]
    Signer,
    #[error("a binding is of another node than the slot's")]
    Node,
    #[error("the bindings were signed by different operators: {0} and {1}")]
    Operators(Address, Address),
    #[error(transparent)]
    Signature(#[from] IdentityError),
}

impl Contradiction {
    /// As the JSON names it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::TwoCommitments { .. } => "two_commitments",
            Self::TwoReveals { .. } => "two_reveals",
            Self::FalseReveal { .. } => "false_reveal",
        }
    }

    pub fn slot(&self) -> &Slot {
        match self {
            Self::TwoCommitments { slot, .. }
            | Self::TwoReveals { slot, .. }
            | Self::FalseReveal { slot, .. } => slot,
        }
    }

    /// Who is to pay, if this proves anything. Whether a binding is too old by now is the chain's to say.
    ///
    /// # Errors
    /// The first thing that does not hold.
    pub fn operator(&self, domain: &Domain) -> Result<Address, ContradictionError> {
        let slot = self.slot();
        let of_commitment = |said: &AccusedCommitment| {
            let digest = typed::slot_commitment_digest(domain, slot, &said.commitment);
            (digest, said.signature, said.bound)
        };
        let of_reveal = |said: &AccusedReveal| {
            let roots = [&said.tokens_root, &said.fingerprint_root];
            (
                typed::slot_reveal_digest_of(domain, slot, roots, said.finish, &said.salt),
                said.signature,
                said.bound,
            )
        };
        let (differ, said) = match self {
            Self::TwoCommitments { first, second, .. } => {
                (first.commitment != second.commitment, [of_commitment(first), of_commitment(second)])
            }
            Self::TwoReveals { first, second, .. } => {
                let said = [of_reveal(first), of_reveal(second)];
                (said[0].0 != said[1].0, said)
            }
            Self::FalseReveal { committed, revealed, .. } => {
                let roots = [&revealed.tokens_root, &revealed.fingerprint_root];
                let opened = commitment_of(domain, slot, roots, revealed.finish, &revealed.salt);
                (opened != committed.commitment, [of_commitment(committed), of_reveal(revealed)])
            }
        };
        if !differ {
            return Err(ContradictionError::None);
        }
        let [first, second] = said.map(|(digest, signature, bound)| {
            let binding = &bound.binding;
            if binding.node != slot.node {
                return Err(ContradictionError::Node);
            }
            if typed::recover(&digest, &signature)? != binding.signer {
                return Err(ContradictionError::Signer);
            }
            Ok(typed::recover(&binding.digest(domain), &bound.signature)?)
        });
        match (first?, second?) {
            (first, second) if first == second => Ok(first),
            (first, second) => Err(ContradictionError::Operators(first, second)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{bytes::NodeId, commitment::commitment, identity::evm_address, request::Finish};
    use k256::ecdsa::SigningKey as EvmKey;

    const DOMAIN: Domain = Domain { chain_id: 31_337, contract: Address([9; 20]) };
    const SLOT: Slot = Slot { request_hash: Hash32([1; 32]), attempt: 2, node: NodeId([3; 32]) };

    fn key(n: u8) -> EvmKey {
        EvmKey::from_slice(&[n; 32]).unwrap()
    }

    fn bound(node: NodeId, signer: u8, operator: u8) -> SignedBinding {
        let binding = NodeBinding { node, signer: evm_address(&key(signer)), expiry_ms: 1_000 };
        SignedBinding { binding, signature: binding.sign(&DOMAIN, &key(operator)).unwrap() }
    }

    fn commits(n: u8, signer: u8, bound: SignedBinding) -> AccusedCommitment {
        let commitment = Hash32([n; 32]);
        let digest = typed::slot_commitment_digest(&DOMAIN, &SLOT, &commitment);
        AccusedCommitment::new(
            commitment,
            Statement { signature: typed::sign(&digest, &key(signer)).unwrap(), bound },
        )
    }

    fn reveals(token: u32, salt: u8, bound: SignedBinding) -> (Output, AccusedReveal) {
        let output = Output { tokens: vec![token], fingerprints: vec![1; 7], finish: Finish::Eos };
        let digest = typed::slot_reveal_digest(&DOMAIN, &SLOT, &output, &Hash32([salt; 32]));
        let statement = Statement { signature: typed::sign(&digest, &key(5)).unwrap(), bound };
        assert!(statement.is_of_reveal(&DOMAIN, &SLOT, &output, &Hash32([salt; 32])));
        let accused = AccusedReveal::new(&output, Hash32([salt; 32]), statement);
        (output, accused)
    }

    #[test]
    fn only_contradictions_of_one_operator_count() {
        let own = bound(SLOT.node, 5, 6);
        let two = |first, second| Contradiction::TwoCommitments { slot: SLOT, first, second };
        let first = commits(1, 5, own);
        let operator = evm_address(&key(6));
        let other_operator = bound(SLOT.node, 5, 7);
        for (evidence, expected) in [
            (two(first, commits(2, 5, own)), Ok(operator)),
            (two(first, commits(2, 5, bound(SLOT.node, 5, 6))), Ok(operator)),
            (two(first, first), Err(ContradictionError::None)),
            (two(first, commits(2, 8, own)), Err(ContradictionError::Signer)),
            (two(first, commits(2, 5, bound(NodeId([4; 32]), 5, 6))), Err(ContradictionError::Node)),
            (
                two(first, commits(2, 5, other_operator)),
                Err(ContradictionError::Operators(operator, evm_address(&key(7)))),
            ),
        ] {
            assert_eq!(evidence.operator(&DOMAIN), expected);
            let text = serde_json::to_string(&evidence).unwrap();
            assert_eq!(serde_json::from_str::<Contradiction>(&text).unwrap(), evidence);
        }
    }

    #[test]
    fn a_reveal_contradicts_what_it_does_not_open() {
        let own = bound(SLOT.node, 5, 6);
        let (output, revealed) = reveals(7, 1, own);
        let said = |commitment: Hash32| {
            let digest = typed::slot_commitment_digest(&DOMAIN, &SLOT, &commitment);
            let statement = Statement { signature: typed::sign(&digest, &key(5)).unwrap(), bound: own };
            assert!(statement.is_of_commitment(&DOMAIN, &SLOT, &commitment));
            AccusedCommitment::new(commitment, statement)
        };
        let right = commitment(&DOMAIN, &SLOT, &output, &Hash32([1; 32]));
        let of = |committed| Contradiction::FalseReveal { slot: SLOT, committed, revealed };
        assert_eq!(of(said(right)).operator(&DOMAIN), Err(ContradictionError::None));
        assert_eq!(of(said(Hash32([8; 32]))).operator(&DOMAIN), Ok(evm_address(&key(6))));
        let other = reveals(8, 1, own).1;
        let both = |second| Contradiction::TwoReveals { slot: SLOT, first: revealed, second };
        assert_eq!(both(other).operator(&DOMAIN), Ok(evm_address(&key(6))));
        assert_eq!(both(revealed).operator(&DOMAIN), Err(ContradictionError::None));
    }
}
