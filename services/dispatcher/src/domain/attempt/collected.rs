//! What an attempt sends to the verifier, and sends again while no verdict comes.

use std::sync::Arc;

use infera_protocol::assignment;
use infera_protocol::bytes::Hash32;
use infera_protocol::commitment::commitments_root;
use infera_protocol::evidence::{Evidence, SlotOutcome};
use infera_wire::convert;
use infera_wire::v1;
use uuid::Uuid;

use super::{Attempt, Desk};
use crate::domain::{Effect, doubled, frames};

/// What was sent to the verifier and waits for its verdict.
#[derive(Debug)]
pub(super) struct Collected {
    pub message: Arc<v1::ResultsCollected>,
    pub repeats: u32,
    /// When the bus confirmed it; `None` while it is under way.
    pub confirmed_at_ms: Option<i64>,
}

impl Attempt {
    pub(super) fn evidence(&self, message: &v1::ResultsCollected, desk: &Desk) -> Option<Evidence> {
        let terms = desk.rules.terms(&desk.offer.model())?;
        convert::evidence(message, desk.rules.domain, terms, desk.now).ok()
    }

    pub(super) fn collect(&mut self, desk: &mut Desk) {
        let request = desk.offer.id();
        let (post_proof, post_slots) = match self.post {
            Some(post) => post,
            None => {
                let slots = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
                let hash = &desk.offer.request_hash;
                let post = assignment::post_message(&desk.rules.domain, hash, self.number, &self.root());
                *self.post.insert((desk.rules.key.prove(&post), slots))
            }
        };
        let message = v1::ResultsCollected {
            funded: Some(desk.offer.wire.clone()),
            attempt: self.number,
            round: self.round,
            epoch: self.epoch,
            class: self.class.clone(),
            eligible: self.eligible.iter().map(convert::eligible_to_wire).collect(),
            dispatcher: desk.rules.key.key().to_vec(),
            assign_proof: self.assign_proof.to_vec(),
            post_proof: post_proof.to_vec(),
            post_slots,
            slots: self.slots.iter().map(|s| frames::slot_result(request, self.number, s)).collect(),
            referees: self.referees.to_wire(),
            collected_at_ms: desk.now,
            exhausted: self.is_exhausted(),
        };
        self.collected = Some(Collected { message: Arc::new(message), repeats: 0, confirmed_at_ms: None });
        self.publish(request, desk);
    }

    /// What the second draw is made from: every slot with its outcome and commitment.
    fn root(&self) -> Hash32 {
        let slots: Vec<_> = self
            .slots
            .iter()
            .map(|slot| {
                let commitment = slot.commitment().map_or(Hash32::ZERO, |commit| commit.digest);
                (slot.who.node, slot.outcome().unwrap_or(SlotOutcome::NoCommit).code(), commitment)
            })
            .collect();
        commitments_root(&slots)
    }

    /// No verdict came: it may have been missed, so ask for it by saying the same again.
    pub(super) fn repeat(&mut self, desk: &mut Desk) {
        let Some(collected) = &mut self.collected else { return };
        let patience = doubled(desk.rules.verdict_ms, collected.repeats);
        let due = collected.confirmed_at_ms.is_some_and(|at| at + patience <= desk.now);
        if due {
            collected.repeats += 1;
            collected.confirmed_at_ms = None;
            self.publish(desk.offer.id(), desk);
        }
    }

    fn publish(&self, request: Uuid, desk: &mut Desk) {
        if let Some(collected) = &self.collected {
            desk.out.push(Effect::Publish {
                request,
                attempt: self.number,
                round: self.round,
                repeat: collected.repeats,
                message: collected.message.clone(),
            });
        }
    }
}
