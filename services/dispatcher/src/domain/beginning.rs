//! How a request that waits comes to its attempt: the frozen set, the class, and a canary beside it.

use std::sync::Arc;

use infera_protocol::assignment::{self, Eligible};
use infera_protocol::bytes::Hash32;
use uuid::Uuid;

use super::attempt::{Attempt, Begun, Desk};
use super::{Effect, Phase, State};

/// The nodes of one model that may be drawn in an epoch.
pub(super) struct Frozen {
    epoch: u64,
    /// [`Nodes::changes`] when it was frozen.
    changes: u64,
    set: Arc<Vec<Eligible>>,
}

impl State {
    /// Begins what waits, in order of arrival, as far as operators have free slots.
    pub(super) fn begin_waiting(&mut self, now: i64, out: &mut Vec<Effect>) {
        let mut waiting: Vec<(u64, Uuid)> = self
            .requests
            .iter()
            .filter(|(_, held)| {
                matches!(held.phase, Phase::Waiting { not_before_ms, .. } if not_before_ms <= now)
                    && now < held.offer.deadline_ms()
            })
            .map(|(id, held)| (held.arrival, *id))
            .collect();
        waiting.sort_unstable();
        for (_, request) in waiting {
            self.begin(request, now, out);
        }
    }

    fn begin(&mut self, request: Uuid, now: i64, out: &mut Vec<Effect>) {
        let Some(held) = self.requests.get(&request) else { return };
        let (model, k) = (held.offer.model(), held.offer.k());
        // A gateway's clock may be ahead of this one; no draw is older than its request.
        let epoch = assignment::epoch_of(now.max(held.offer.funded.submitted.submitted_at_ms));
        let Some((class, eligible)) = self.set_for(&model, k, epoch) else { return };
        let Some(held) = self.requests.get_mut(&request) else { return };
        let Phase::Waiting { attempt, traceparent, .. } = &held.phase else { return };
        let set = eligible.clone();
        let begun = Begun { number: *attempt, epoch, class, eligible, traceparent: traceparent.clone() };
        let mut desk = Desk { rules: &self.rules, offer: &held.offer, nodes: &mut self.nodes, now, out };
        let mut attempt = Attempt::begin(begun, &mut desk);
        let other = self.prompts.other(&attempt.beta(), &held.offer, &self.rules);
        self.trials.canary(&mut attempt, &set, (&held.asked, other), &mut desk);
        self.prompts.note(&held.offer);
        held.phase = Phase::Working(Box::new(attempt));
    }

    /// The set of this epoch, and the class to draw from. One that can't serve the request, because nodes have come or
    /// gone since, is frozen anew.
    fn set_for(&mut self, model: &Hash32, k: usize, epoch: u64) -> Option<(String, Arc<Vec<Eligible>>)> {
        let changes = self.nodes.changes();
        if let Some(frozen) = self.frozen.get(model).filter(|frozen| frozen.epoch == epoch) {
            let class = self.nodes.class_for(&frozen.set, k);
            if class.is_some() || frozen.changes == changes {
                return class.map(|class| (class, frozen.set.clone()));
            }
        }
        let set = Arc::new(assignment::freeze(self.nodes.eligible(model, &self.trust)));
        self.frozen.insert(*model, Frozen { epoch, changes, set: set.clone() });
        self.nodes.class_for(&set, k).map(|class| (class, set))
    }
}
