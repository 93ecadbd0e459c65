//! Frames to nodes, and the message to the verifier.

use infera_protocol::evidence::SlotOutcome;
use infera_wire::convert;
use infera_wire::v1::{self, from_dispatcher::Message};
use uuid::Uuid;

use super::slot::Slot;

fn frame(message: Message) -> v1::FromDispatcher {
    v1::FromDispatcher { message: Some(message) }
}

pub fn challenge(challenge: v1::Challenge) -> v1::FromDispatcher {
    frame(Message::Challenge(challenge))
}

pub fn welcome(session: Uuid, heartbeat_secs: u32) -> v1::FromDispatcher {
    frame(Message::Welcome(v1::Welcome { session: session.as_bytes().to_vec(), heartbeat_secs }))
}

pub fn refused(code: &str, reason: &str) -> v1::FromDispatcher {
    frame(Message::Refused(v1::Refused { code: code.to_owned(), reason: reason.to_owned() }))
}

pub fn lease(lease: v1::Lease) -> v1::FromDispatcher {
    frame(Message::Lease(lease))
}

pub fn range_challenge(challenge: v1::RangeChallenge) -> v1::FromDispatcher {
    frame(Message::RangeChallenge(challenge))
}

pub fn referee_lease(lease: v1::RefereeLease) -> v1::FromDispatcher {
    frame(Message::RefereeLease(lease))
}

pub fn reveal_request(request: Uuid, attempt: u32, reveal_deadline_ms: i64) -> v1::FromDispatcher {
    frame(Message::RevealRequest(v1::RevealRequest {
        request_id: request.as_bytes().to_vec(),
        attempt,
        reveal_deadline_ms,
    }))
}

pub fn cancel(request: Uuid, attempt: u32, reason: &str) -> v1::FromDispatcher {
    frame(Message::Cancel(v1::Cancel {
        request_id: request.as_bytes().to_vec(),
        attempt,
        reason: reason.to_owned(),
    }))
}

pub fn released(request: Uuid, attempt: u32) -> v1::FromDispatcher {
    frame(Message::Released(v1::Released { request_id: request.as_bytes().to_vec(), attempt }))
}

/// A slot as the verifier gets it. A slot that is still open is one without a commitment.
pub fn slot_result(request: Uuid, attempt: u32, slot: &Slot) -> v1::SlotResult {
    let id = request.as_bytes().to_vec();
    let commit = slot.commitment().map(|commit| v1::Commit {
        request_id: id.clone(),
        attempt,
        commitment: commit.digest.to_vec(),
        signature: commit.signature.to_vec(),
        statement: Vec::new(),
    });
    let reveal = slot.reveal().map(|reveal| v1::Reveal {
        request_id: id.clone(),
        attempt,
        tokens: reveal.output.tokens.clone(),
        fingerprints: reveal.output.fingerprints.clone(),
        finish: convert::finish_to_wire(reveal.output.finish).into(),
        salt: reveal.salt.to_vec(),
        statement: Vec::new(),
    });
    v1::SlotResult {
        node: slot.who.node.to_vec(),
        operator: slot.who.operator.to_vec(),
        outcome: convert::outcome_to_wire(slot.outcome().unwrap_or(SlotOutcome::NoCommit)).into(),
        commit,
        reveal,
        decline: slot.decline.as_ref().map(|decline| v1::Decline {
            request_id: id,
            attempt,
            reason: decline.reason.clone(),
            signature: decline.signature.to_vec(),
        }),
        detail: slot.detail.clone(),
    }
}
