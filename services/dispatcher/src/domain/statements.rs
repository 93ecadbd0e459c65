//! What a node's signer says along with a commitment or a reveal, so that a contradiction costs the stake (protocol
//! section 10). A frame without it counts as one with a bad signature.

use infera_protocol::assignment::Eligible;
use infera_protocol::bytes::EvmSignature;
use infera_protocol::commitment::Slot;
use infera_protocol::evidence::{Reveal, SignedCommitment};
use infera_protocol::identity::{Domain, verify};
use infera_protocol::slashing::{AccusedCommitment, AccusedReveal, Contradiction, SignedBinding, Statement};

use super::nodes::Nodes;
use super::{Rejection, Rules};

/// A commitment, and what the node's signer says of it.
#[derive(Debug, Clone, Copy)]
pub struct Pledge {
    pub commit: SignedCommitment,
    statement: Statement,
}

impl From<&Pledge> for AccusedCommitment {
    fn from(pledge: &Pledge) -> Self {
        Self::new(pledge.commit.digest, pledge.statement)
    }
}

/// A slot, and the binding of the session that speaks for it: by the operator that was drawn, because two statements cost
/// a stake only if both are bound to one.
pub struct Stand<'a> {
    domain: &'a Domain,
    slot: Slot,
    bound: SignedBinding,
}

impl<'a> Stand<'a> {
    /// # Errors
    /// [`Rejection::NotLeased`] if the node is not connected, or is another operator's by now.
    pub fn new(rules: &'a Rules, nodes: &Nodes, who: &Eligible, slot: Slot) -> Result<Self, Rejection> {
        let info = nodes.get(&slot.node).filter(|info| info.operator == who.operator);
        let bound = info.ok_or(Rejection::NotLeased)?.bound;
        Ok(Self { domain: &rules.domain, slot, bound })
    }

    /// # Errors
    /// [`Rejection::BadSignature`]: the node's own, or its signer's.
    pub fn commits(&self, commit: SignedCommitment, signature: EvmSignature) -> Result<Pledge, Rejection> {
        verify(&self.slot.node, &commit.digest, &commit.signature).map_err(|_| Rejection::BadSignature)?;
        let statement = Statement { signature, bound: self.bound };
        let is_said = statement.is_of_commitment(self.domain, &self.slot, &commit.digest);
        is_said.then_some(Pledge { commit, statement }).ok_or(Rejection::BadSignature)
    }

    /// # Errors
    /// [`Rejection::BadSignature`].
    pub fn reveals(&self, reveal: &Reveal, signature: EvmSignature) -> Result<Statement, Rejection> {
        let statement = Statement { signature, bound: self.bound };
        let is_said = statement.is_of_reveal(self.domain, &self.slot, &reveal.output, &reveal.salt);
        is_said.then_some(statement).ok_or(Rejection::BadSignature)
    }

    /// Of two different commitments.
    pub fn equivocation(&self, first: &Pledge, second: &Pledge) -> Contradiction {
        Contradiction::TwoCommitments { slot: self.slot, first: first.into(), second: second.into() }
    }

    /// Of a reveal that does not open the commitment.
    pub fn false_reveal(&self, pledge: &Pledge, reveal: &Reveal, revealed: Statement) -> Contradiction {
        Contradiction::FalseReveal {
            slot: self.slot,
            committed: pledge.into(),
            revealed: AccusedReveal::new(&reveal.output, reveal.salt, revealed),
        }
    }
}
