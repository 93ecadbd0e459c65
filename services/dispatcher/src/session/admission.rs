//! Possession of the weights (protocol section 2): random ranges of the file, proved against the root that the node
//! declares, before its session is open and at random while it is.

use std::time::Duration;

use actix::{AsyncContext, Context};
use infera_protocol::admission::{Range, ranges, verify_slice};
use infera_protocol::bytes::Hash32;
use infera_protocol::trust::Reason;
use infera_runtime::clock;
use infera_wire::v1;
use uuid::Uuid;

use super::NodeSession;
use super::hello::Refusal;
use crate::domain::frames;
use crate::standing::{self, Deed};

/// Ranges of one challenge: who lacks a hundredth of the file fails one in 33 of them, and so does not last.
const RANGES: usize = 3;

/// What was asked of a node, and not answered yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    nonce: [u8; 16],
    ranges: Vec<Range>,
    weights_root: Hash32,
    weights_bytes: u64,
}

impl Challenge {
    /// Of a file of this size, with ranges that nobody could know before.
    pub fn new(weights_root: Hash32, weights_bytes: u64) -> Self {
        let ranges = ranges(&rand::random(), weights_bytes, RANGES);
        Self { nonce: Uuid::now_v7().into_bytes(), ranges, weights_root, weights_bytes }
    }

    pub fn to_wire(&self, deadline_ms: i64) -> v1::RangeChallenge {
        let range = |(offset, length): &Range| v1::Range { offset: *offset, length: *length };
        v1::RangeChallenge {
            nonce: self.nonce.to_vec(),
            ranges: self.ranges.iter().map(range).collect(),
            deadline_ms,
        }
    }

    /// Checks the answer.
    ///
    /// # Errors
    /// Why it proves nothing, for the node's operator.
    pub fn check(&self, proof: &v1::RangeProof) -> Result<(), String> {
        if proof.nonce != self.nonce {
            return Err("the proof is about another challenge".to_owned());
        }
        if proof.slices.len() != self.ranges.len() {
            return Err(format!("{} slices for {} ranges", proof.slices.len(), self.ranges.len()));
        }
        for (range, slice) in self.ranges.iter().zip(&proof.slices) {
            verify_slice(&self.weights_root, self.weights_bytes, *range, slice)
                .map_err(|error| format!("bytes {} and following: {error}", range.0))?;
        }
        Ok(())
    }
}

impl NodeSession {
    /// Asks for ranges of the weights; who does not prove them in time is refused.
    pub(super) fn ask_for_ranges(&mut self, ctx: &mut Context<Self>) {
        let Some(root) = self.hello.as_ref().map(|hello| hello.claims.weights_root) else { return };
        let roots = self.shared.live.now();
        let Some(model) = roots.registries.current().by_root(&root) else {
            let reason = "the holders have withdrawn this model: serve another one";
            return self.refuse(&Refusal::new("model_withdrawn", reason), ctx);
        };
        let challenge = Challenge::new(root, model.weights_bytes);
        let patience = Duration::from_secs(u64::from(self.shared.proof_secs));
        let deadline_ms = clock::now_ms() + i64::from(self.shared.proof_secs) * 1_000;
        self.write(&frames::range_challenge(challenge.to_wire(deadline_ms)), false, ctx);
        self.challenge = Some(challenge.clone());
        ctx.run_later(patience, move |act, ctx| {
            if act.challenge.as_ref() == Some(&challenge) {
                act.unproven("no proof in time".to_owned(), ctx);
            }
        });
    }

    pub(super) fn proof(&mut self, proof: &v1::RangeProof, ctx: &mut Context<Self>) {
        let Some(challenge) = self.challenge.take() else {
            return self.refuse(&Refusal::new("bad_frame", "a proof that nobody asked for"), ctx);
        };
        if let Err(reason) = challenge.check(proof) {
            return self.unproven(reason, ctx);
        }
        // Unforeseeable, and about as often as configured.
        let next =
            Duration::from_secs(u64::from(self.shared.recheck_secs)).mul_f64(rand::random_range(0.5..1.5));
        ctx.run_later(next, Self::ask_for_ranges);
        if self.node.is_none() {
            self.join(ctx);
        }
    }

    fn unproven(&mut self, reason: String, ctx: &mut Context<Self>) {
        // Before it was admitted it only failed to get in.
        if let (Some(node), Some(hello)) = (self.node, &self.hello) {
            let deeds = [Deed::fault(hello.claims.operator, node, Uuid::nil(), Reason::Challenge)];
            let shared = self.shared.clone();
            actix_rt::spawn(async move {
                if let Err(error) = standing::note_now(
                    &shared.db,
                    &shared.live.now().registries.current().calibration,
                    &deeds,
                )
                .await
                {
                    tracing::error!(%error, %node, "a challenge that failed is not noted");
                }
            });
        }
        let reason = format!("the weights are not proved: {reason}; download the model again");
        self.refuse(&Refusal::new("weights_unproven", reason), ctx);
    }
}
