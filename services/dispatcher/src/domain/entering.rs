//! How a node that has joined comes to be drawn: through its entry trial, where somebody can judge it.

use super::nodes::Connected;
use super::trials::{self, Court, Entry, Kind, Outcome};
use super::{Effect, Rules, State, frames};

/// When a node whose entry trial could not be begun or was not decided is tried again, ms.
const TRY_ENTRY_AGAIN_MS: i64 = 5_000;
/// What the operator of a node that failed its entry trial is told.
const TRIAL_FAILED: &str = "the answer to a fresh prompt is not the model's within this class, or did not come in time: \
                            check the model file, the class and the load of the machine";

impl State {
    /// Lets in, or sends away, whoever was tried by the effects from `first` on.
    pub(super) fn after_trials(&mut self, first: usize, now: i64, out: &mut Vec<Effect>) {
        let mut refused = Vec::new();
        for effect in &out[first..] {
            let Effect::Tried(ended) = effect else { continue };
            match (ended.kind, ended.outcome) {
                (Kind::Canary, _) => {}
                (Kind::Entry, Outcome::Passed) => self.nodes.set_on_trial(&ended.node, None),
                (Kind::Entry, Outcome::Declined | Outcome::Void) => {
                    self.nodes.set_on_trial(&ended.node, Some(now + TRY_ENTRY_AGAIN_MS));
                }
                (Kind::Entry, Outcome::Failed) => refused.push(ended.node),
            }
        }
        for node in refused {
            out.push(Effect::Send { node, frame: frames::refused("trial_failed", TRIAL_FAILED) });
        }
    }

    /// Tries a node that has joined, if there is anybody to judge it.
    pub(super) fn enter(&mut self, info: &Connected, now: i64, out: &mut Vec<Effect>) {
        let Self { rules, nodes, trials, trust, .. } = self;
        if !rules.entry_trials {
            return nodes.set_on_trial(&info.node, None);
        }
        match trials.entry(info, trust, &mut Court { rules, nodes, now, out }) {
            Entry::Tried => {
                // It is only a deadline where a trial was lost.
                nodes.set_on_trial(&info.node, Some(now + longest_trial_ms(rules)));
            }
            Entry::Wait => nodes.set_on_trial(&info.node, Some(now + TRY_ENTRY_AGAIN_MS)),
            Entry::NoJudge => nodes.let_in_untried(&info.node),
        }
    }

    /// Tries those whose time has come, and, one after the other, those that were let in while nobody could judge them: all
    /// at once would leave nobody to draw.
    pub(super) fn enter_later(&mut self, now: i64, out: &mut Vec<Effect>) {
        for info in self.nodes.to_be_tried(now) {
            self.enter(&info, now, out);
        }
        let Self { rules, nodes, trials, trust, tried_late, .. } = self;
        let waits = tried_late.is_some_and(|(node, until_ms)| now < until_ms && nodes.is_on_trial(&node));
        if waits || !trials.has_room_for_entry() {
            return;
        }
        let excluded = |info: &Connected| {
            trials.enters(&info.operator) || rules.registry.by_root(&info.model_root).is_none()
        };
        if let Some(info) = nodes.untried(trust, excluded) {
            // A full node declines and has a place when its leases are over; who declines even then keeps nobody waiting.
            let again_ms = rules.lease_ms + TRY_ENTRY_AGAIN_MS;
            *tried_late = Some((info.node, now + again_ms + longest_trial_ms(rules)));
            self.enter(&info, now, out);
        }
    }
}

/// From the lease of an entry trial to its last referee's report.
fn longest_trial_ms(rules: &Rules) -> i64 {
    rules.lease_ms + rules.reveal_ms + rules.referee_ms * trials::MAX_REFEREES as i64
}
