//! One slot: the place in which one drawn node answers one attempt.

use infera_protocol::assignment::Eligible;
use infera_protocol::evidence::{Reveal, SignedCommitment, SignedDecline, SlotOutcome};

use super::statements::Pledge;

/// A drawn node and how far it is.
#[derive(Debug, Clone)]
pub struct Slot {
    pub who: Eligible,
    /// Until when a commitment counts.
    pub lease_until_ms: i64,
    pub state: SlotState,
    pub decline: Option<SignedDecline>,
    /// Ended, and the node never worked on it: it had no room, or was not there.
    pub no_room: bool,
    /// Why the slot ended, for people.
    pub detail: String,
}

/// How far a slot is. It only ever moves down this list, except that a node which lost its
/// connection may take its lease up again.
#[derive(Debug, Clone)]
pub enum SlotState {
    /// The node computes.
    Leased,
    Committed(Pledge),
    /// The reveal was asked for.
    Asked {
        pledge: Pledge,
        until_ms: i64,
    },
    Revealed {
        pledge: Pledge,
        reveal: Reveal,
    },
    /// Without a result; never [`SlotOutcome::Revealed`].
    Ended {
        outcome: SlotOutcome,
        pledge: Option<Pledge>,
        reveal: Option<Reveal>,
    },
}

impl Slot {
    pub fn leased(who: Eligible, lease_until_ms: i64) -> Self {
        Self {
            who,
            lease_until_ms,
            state: SlotState::Leased,
            decline: None,
            no_room: false,
            detail: String::new(),
        }
    }

    /// Counts towards the wanted results: has one, or may still get there.
    pub fn is_alive(&self) -> bool {
        !matches!(self.state, SlotState::Ended { .. })
    }

    pub fn is_leased(&self) -> bool {
        matches!(self.state, SlotState::Leased)
    }

    pub fn is_revealed(&self) -> bool {
        matches!(self.state, SlotState::Revealed { .. })
    }

    /// The commitment, whatever came of it.
    pub fn commitment(&self) -> Option<&SignedCommitment> {
        self.pledge().map(|pledge| &pledge.commit)
    }

    pub fn pledge(&self) -> Option<&Pledge> {
        match &self.state {
            SlotState::Leased => None,
            SlotState::Committed(pledge)
            | SlotState::Asked { pledge, .. }
            | SlotState::Revealed { pledge, .. } => Some(pledge),
            SlotState::Ended { pledge, .. } => pledge.as_ref(),
        }
    }

    pub fn reveal(&self) -> Option<&Reveal> {
        match &self.state {
            SlotState::Revealed { reveal, .. } => Some(reveal),
            SlotState::Ended { reveal, .. } => reveal.as_ref(),
            SlotState::Leased | SlotState::Committed(_) | SlotState::Asked { .. } => None,
        }
    }

    /// `None` while it is open.
    pub fn outcome(&self) -> Option<SlotOutcome> {
        match &self.state {
            SlotState::Revealed { .. } => Some(SlotOutcome::Revealed),
            SlotState::Ended { outcome, .. } => Some(*outcome),
            SlotState::Leased | SlotState::Committed(_) | SlotState::Asked { .. } => None,
        }
    }

    /// Ends the slot without a result; what the node signed stays.
    pub fn end(&mut self, outcome: SlotOutcome, detail: impl Into<String>) {
        self.state =
            SlotState::Ended { outcome, pledge: self.pledge().copied(), reveal: self.reveal().cloned() };
        self.detail = detail.into();
    }

    /// Lost its connection before its commitment, and its lease still runs.
    pub fn may_resume(&self, now: i64) -> bool {
        matches!(self.state, SlotState::Ended { outcome: SlotOutcome::Disconnected, .. })
            && now < self.lease_until_ms
    }
}
