//! What a node's signer says along with a commitment or a reveal, so that a contradiction costs the stake (protocol
//! section 10). A frame without it counts as one with a bad signature.

use infera_protocol::bytes::{EvmSignature, NodeId};
use infera_protocol::commitment::Slot;
use infera_protocol::evidence::{Reveal, SignedCommitment};
use infera_protocol::identity::{Domain, verify};
use infera_protocol::slashing::{AccusedCommitment, AccusedReveal, Contradiction, SignedBinding, Statement};

use super::nodes::Nodes;
use super::{Rejection, Rules};

/// A slot, and the binding of the session that speaks for it.
pub struct Stand<'a> {
    domain: &'a Domain,
    slot: Slot,
    bound: SignedBinding,
}

impl<'a> Stand<'a> {
    /// # Errors
    /// [`Rejection::NotLeased`] if the node is not connected.
    pub fn new(rules: &'a Rules, nodes: &Nodes, slot: Slot) -> Result<Self, Rejection> {
        let bound = nodes.get(&slot.node).ok_or(Rejection::NotLeased)?.bound;
        Ok(Self { domain: &rules.domain, slot, bound })
    }

    fn node(&self) -> &NodeId {
        &self.slot.node
    }

    /// # Errors
    /// [`Rejection::BadSignature`]: the node's own, or its signer's.
    pub fn commits(&self, to: &SignedCommitment, signature: EvmSignature) -> Result<Statement, Rejection> {
        verify(self.node(), &to.digest, &to.signature).map_err(|_| Rejection::BadSignature)?;
        let statement = Statement { signature, bound: self.bound };
        let is_said = statement.is_of_commitment(self.domain, &self.slot, &to.digest);
        is_said.then_some(statement).ok_or(Rejection::BadSignature)
    }

    /// # Errors
    /// [`Rejection::BadSignature`].
    pub fn reveals(&self, reveal: &Reveal, signature: EvmSignature) -> Result<Statement, Rejection> {
        let statement = Statement { signature, bound: self.bound };
        let is_said = statement.is_of_reveal(self.domain, &self.slot, &reveal.output, &reveal.salt);
        is_said.then_some(statement).ok_or(Rejection::BadSignature)
    }

    /// Of two different commitments.
    pub fn equivocation(
        &self,
        first: (&SignedCommitment, Statement),
        second: (&SignedCommitment, Statement),
    ) -> Contradiction {
        let accused = |(commit, statement): (&SignedCommitment, Statement)| {
            AccusedCommitment::new(commit.digest, statement)
        };
        Contradiction::TwoCommitments { slot: self.slot, first: accused(first), second: accused(second) }
    }

    /// Of a reveal that does not open the commitment.
    pub fn false_reveal(
        &self,
        (commit, committed): (&SignedCommitment, Statement),
        (reveal, revealed): (&Reveal, Statement),
    ) -> Contradiction {
        Contradiction::FalseReveal {
            slot: self.slot,
            committed: AccusedCommitment::new(commit.digest, committed),
            revealed: AccusedReveal::new(&reveal.output, reveal.salt, revealed),
        }
    }
}
