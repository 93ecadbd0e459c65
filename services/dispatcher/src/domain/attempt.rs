//! One attempt of a request: the frozen set, the draw, its slots and the rounds of the verifier.

use std::sync::Arc;

use infera_protocol::assignment::{self, Eligible};
use infera_protocol::bytes::{Address, EvmSignature, Hash32, NodeId, VrfProof};
use infera_protocol::commitment;
use infera_protocol::evidence::{Reveal, SignedCommitment, SignedDecline, SlotOutcome};
use infera_protocol::identity::verify;
use infera_protocol::request::check_output;
use infera_wire::convert::MAX_SLOTS;
use infera_wire::v1;

mod collected;

use collected::Collected;

use super::nodes::{Connected, Nodes};
use super::referees::Referees;
use super::slot::{Slot, SlotState};
use super::statements::Stand;
use super::{Effect, Offer, Rejection, Rules, SignedScores, frames};

/// Room for reveals and reports in one `ResultsCollected`, bytes: the rest of the bus's 4 MiB is for the prompt,
/// the eligible set and the frames around them. Seven of the largest reveals fit.
const MAX_RESULTS_BYTES: usize = 7 * 512 * 1024;

/// A node's reason to decline when all its slots are taken.
const FULL: &str = "full";

/// What an attempt works with.
pub struct Desk<'a> {
    pub rules: &'a Rules,
    pub offer: &'a Offer,
    pub nodes: &'a mut Nodes,
    pub now: i64,
    pub out: &'a mut Vec<Effect>,
}

/// A live attempt.
#[derive(Debug)]
pub struct Attempt {
    pub number: u32,
    pub round: u32,
    epoch: u64,
    class: String,
    eligible: Arc<Vec<Eligible>>,
    assign_proof: VrfProof,
    /// The second draw and the slots that it covers: made when results are first complete.
    post: Option<(VrfProof, u32)>,
    /// All that can be drawn, one node per operator; `slots` are its first ones.
    drawn: Vec<Eligible>,
    slots: Vec<Slot>,
    referees: Referees,
    /// Whose node works on the same as a canary.
    canary: Option<Address>,
    /// Results that this round is to have.
    wanted: usize,
    traceparent: String,
    collected: Option<Collected>,
}

/// What an attempt begins with. `eligible` is frozen; at least k operators of `class` in it are free.
pub struct Begun {
    pub number: u32,
    pub epoch: u64,
    pub class: String,
    pub eligible: Arc<Vec<Eligible>>,
    pub traceparent: String,
}

/// What became of an attempt that has nothing left to wait for.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// Waits for nodes or for the verdict.
    Open,
    /// Everybody was drawn and no majority is possible: try again with a new set.
    Exhausted,
    /// As `Exhausted`, but whoever is missing had no room or was not there: a try that does not count.
    NoRoom,
}

impl Attempt {
    /// Draws and leases the first k.
    pub fn begin(begun: Begun, desk: &mut Desk) -> Self {
        let Begun { number, epoch, class, eligible, traceparent } = begun;
        let message = assignment::assign_message(
            &desk.rules.domain,
            desk.offer.id(),
            &desk.offer.request_hash,
            desk.offer.funded.submitted.k,
            number,
            epoch,
            &assignment::eligible_root(&eligible),
        );
        let assign_proof = desk.rules.key.prove(&message);
        let beta = assignment::beta(&assign_proof);
        let drawn = assignment::draw(&beta, assignment::of_class(&eligible, &class));
        let drawn = drawn.into_iter().take(MAX_SLOTS).cloned().collect();
        let mut attempt = Self {
            number,
            round: 1,
            epoch,
            class,
            eligible,
            assign_proof,
            post: None,
            drawn,
            slots: Vec::new(),
            referees: Referees::default(),
            canary: None,
            wanted: desk.offer.k(),
            traceparent,
            collected: None,
        };
        attempt.lease_missing(desk);
        attempt
    }

    /// The randomness of the draw.
    pub fn beta(&self) -> Hash32 {
        assignment::beta(&self.assign_proof)
    }

    pub fn traceparent(&self) -> &str {
        &self.traceparent
    }

    /// This operator works on the same request as a canary: it can't replace anybody here.
    pub fn stands_beside(&mut self, operator: Address) {
        self.canary = Some(operator);
    }

    pub fn class(&self) -> &str {
        &self.class
    }

    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Of all nodes that were sent the request, or its answers.
    pub fn operators(&self) -> impl Iterator<Item = Address> {
        self.slots.iter().map(|slot| slot.who.operator).chain(self.referees.operators()).chain(self.canary)
    }

    /// Waits for the verdict.
    pub fn is_collected(&self) -> bool {
        self.collected.is_some()
    }

    fn slot_mut(&mut self, node: &NodeId) -> Option<&mut Slot> {
        self.slots.iter_mut().find(|slot| slot.who.node == *node)
    }

    fn alive(&self) -> usize {
        self.slots.iter().filter(|slot| slot.is_alive()).count()
    }

    fn revealed(&self) -> usize {
        self.slots.iter().filter(|slot| slot.is_revealed()).count()
    }

    /// No further operator can be drawn.
    fn is_exhausted(&self) -> bool {
        self.slots.len() == self.drawn.len()
    }

    /// A commitment. The first one of a slot counts; a second, different one is equivocation.
    pub fn commit(
        &mut self,
        node: &NodeId,
        (commit, signature): (SignedCommitment, EvmSignature),
        desk: &mut Desk,
    ) -> Result<Progress, Rejection> {
        let request = desk.offer.id();
        let resumable = self.resumable(node, desk);
        let now = desk.now;
        let place = self.place(node, desk);
        let slot = self.slot_mut(node).ok_or(Rejection::NotLeased)?;
        let stand = Stand::new(desk.rules, desk.nodes, &slot.who, place)?;
        let pledge = stand.commits(commit, signature)?;
        if let Some(first) = slot.pledge() {
            if first.commit.digest == pledge.commit.digest {
                return Ok(Progress::Open);
            }
            let evidence = Box::new(stand.equivocation(first, &pledge));
            desk.out.push(Effect::Contradicted { request, operator: slot.who.operator, evidence });
            return Err(Rejection::Equivocation);
        }
        let resumes = resumable && slot.may_resume(now);
        if !(slot.is_leased() && now < slot.lease_until_ms || resumes) {
            return Err(Rejection::Late);
        }
        slot.state = SlotState::Committed(pledge);
        slot.no_room = false;
        slot.detail.clear();
        desk.nodes.kept_up(node, request);
        desk.out.push(Effect::SlotsChanged);
        Ok(self.advance(desk))
    }

    /// A reveal that was asked for; one that does not open its commitment or breaks the request's
    /// limits is kept as a mismatch.
    pub fn reveal(
        &mut self,
        node: &NodeId,
        (reveal, signature): (Reveal, EvmSignature),
        desk: &mut Desk,
    ) -> Result<Progress, Rejection> {
        let room = self.room_for(&reveal);
        let request_asked = &desk.offer.funded.submitted.request;
        let end_tokens = desk.rules.end_tokens(&request_asked.model_root);
        let limits = check_output(request_asked, &reveal.output, end_tokens);
        let place = self.place(node, desk);
        let slot = self.slot_mut(node).ok_or(Rejection::NotLeased)?;
        let pledge = match &slot.state {
            SlotState::Asked { pledge, .. } => *pledge,
            SlotState::Revealed { .. } => return Ok(Progress::Open),
            SlotState::Leased | SlotState::Committed(_) => return Err(Rejection::NotAsked),
            SlotState::Ended { .. } => return Err(Rejection::Late),
        };
        let stand = Stand::new(desk.rules, desk.nodes, &slot.who, place)?;
        let statement = stand.reveals(&reveal, signature)?;
        let digest = commitment::commitment(&desk.rules.domain, &place, &reveal.output, &reveal.salt);
        let opens = digest == pledge.commit.digest;
        if !opens {
            let evidence = Box::new(stand.false_reveal(&pledge, &reveal, statement));
            let request = desk.offer.id();
            desk.out.push(Effect::Contradicted { request, operator: slot.who.operator, evidence });
        }
        if !room {
            slot.end(SlotOutcome::NoReveal, "the reveals of this attempt exceed what a message carries");
        } else if opens && limits.is_ok() {
            slot.state = SlotState::Revealed { pledge, reveal };
        } else {
            let broken = limits.err().filter(|_| opens);
            slot.end(SlotOutcome::Mismatch, broken.unwrap_or("the reveal does not open the commitment"));
            if let SlotState::Ended { reveal: kept, .. } = &mut slot.state {
                *kept = Some(reveal);
            }
        }
        Ok(self.advance(desk))
    }

    fn place(&self, node: &NodeId, desk: &Desk) -> commitment::Slot {
        commitment::Slot { request_hash: desk.offer.request_hash, attempt: self.number, node: *node }
    }

    fn room_for(&self, reveal: &Reveal) -> bool {
        self.results_bytes() + size(reveal) <= MAX_RESULTS_BYTES
    }

    /// Bytes of the reveals and reports so far.
    fn results_bytes(&self) -> usize {
        self.slots.iter().filter_map(Slot::reveal).map(size).sum::<usize>() + self.referees.bytes()
    }

    /// The node does not compute: replaced at once. A referee declines in the same way.
    pub fn decline(
        &mut self,
        node: &NodeId,
        decline: SignedDecline,
        desk: &mut Desk,
    ) -> Result<Progress, Rejection> {
        let place = self.place(node, desk);
        let digest = commitment::decline_digest(&desk.rules.domain, &place, &decline.reason);
        let signed = verify(node, &digest, &decline.signature).map_err(|_| Rejection::BadSignature);
        let Some(slot) = self.slot_mut(node) else {
            if !self.referees.is_asked(node) {
                return Err(Rejection::NotLeased);
            }
            signed?;
            self.referees.declined(node, &decline.reason);
            return Ok(self.advance(desk));
        };
        signed?;
        if !slot.is_leased() {
            return Err(Rejection::Late);
        }
        slot.end(SlotOutcome::Declined, decline.reason.as_str());
        slot.no_room = decline.reason == FULL;
        let full = slot.no_room;
        slot.decline = Some(decline);
        if full {
            desk.nodes.fell_behind(node, desk.offer.id());
        } else {
            desk.nodes.release(node, desk.offer.id());
        }
        desk.out.push(Effect::SlotsChanged);
        Ok(self.advance(desk))
    }

    /// A referee's reports, one for each answer that it was asked about.
    pub fn refereed(
        &mut self,
        node: &NodeId,
        reports: Vec<SignedScores>,
        desk: &mut Desk,
    ) -> Result<Progress, Rejection> {
        let room = MAX_RESULTS_BYTES.saturating_sub(self.results_bytes());
        self.referees.reported(node, reports, room, self.number, desk)?;
        Ok(self.advance(desk))
    }

    /// Whether deltas of the node are to be relayed.
    pub fn streams(&self, node: &NodeId) -> Result<(), Rejection> {
        let slot = self.slots.iter().find(|slot| slot.who.node == *node).ok_or(Rejection::NotLeased)?;
        if slot.is_leased() { Ok(()) } else { Err(Rejection::Late) }
    }

    /// The node's session ended: a slot without a commitment is replaced, one with a commitment may
    /// still be revealed after a reconnect.
    pub fn disconnected(&mut self, node: &NodeId, desk: &mut Desk) -> Progress {
        if self.referees.left(node) {
            return self.advance(desk);
        }
        let Some(slot) = self.slot_mut(node).filter(|slot| slot.is_leased()) else { return Progress::Open };
        slot.end(SlotOutcome::Disconnected, "session lost before the commitment");
        self.advance(desk)
    }

    /// Whether a slot that lost its node may go on with it: nobody could take its place, no reveal was
    /// asked for yet, and the node is still the one that was drawn.
    fn resumable(&self, node: &NodeId, desk: &Desk) -> bool {
        let same = desk.nodes.get(node).is_some_and(|info| {
            info.class == self.class && info.model_root == desk.offer.model() && self.draws(info)
        });
        same && self.is_computing() && self.alive() < self.wanted
    }

    /// Nobody was asked for a reveal yet.
    pub fn is_computing(&self) -> bool {
        let computing = |slot: &Slot| match slot.state {
            SlotState::Leased | SlotState::Committed(_) | SlotState::Ended { .. } => true,
            SlotState::Asked { .. } | SlotState::Revealed { .. } => false,
        };
        self.collected.is_none() && self.slots.iter().all(computing)
    }

    fn draws(&self, info: &Connected) -> bool {
        self.slots.iter().any(|slot| slot.who.node == info.node && slot.who.operator == info.operator)
    }

    /// The node is back under the same key: it goes on where it can.
    pub fn resumed(&mut self, node: &NodeId, desk: &mut Desk) {
        let resumable = self.resumable(node, desk);
        let (request, number, now) = (desk.offer.id(), self.number, desk.now);
        let lease = self.lease_frame(desk.offer);
        let Some(slot) = self.slot_mut(node) else { return };
        if slot.is_leased() || (resumable && slot.may_resume(now)) {
            slot.state = SlotState::Leased;
            slot.no_room = false;
            slot.detail.clear();
            let until_ms = slot.lease_until_ms;
            desk.nodes.lease(node, request);
            desk.out.push(Effect::Send { node: *node, frame: frames::lease(lease(until_ms)) });
        } else if let SlotState::Asked { until_ms, .. } = slot.state {
            desk.out
                .push(Effect::Send { node: *node, frame: frames::reveal_request(request, number, until_ms) });
        } else if slot.outcome().is_some() && slot.commitment().is_none() {
            // It may still compute what it lost.
            let frame = frames::cancel(request, number, "the slot has ended");
            desk.out.push(Effect::Send { node: *node, frame });
        }
    }

    /// Ends what is overdue and sends again what got no verdict.
    pub fn tick(&mut self, desk: &mut Desk) -> Progress {
        if self.collected.is_some() {
            self.repeat(desk);
            return Progress::Open;
        }
        let request = desk.offer.id();
        for slot in &mut self.slots {
            match slot.state {
                SlotState::Leased if slot.lease_until_ms <= desk.now => {
                    slot.end(SlotOutcome::NoCommit, "no commitment before the lease expired");
                    desk.nodes.fell_behind(&slot.who.node, request);
                    desk.out.push(Effect::Send {
                        node: slot.who.node,
                        frame: frames::cancel(request, self.number, "lease expired"),
                    });
                    desk.out.push(Effect::SlotsChanged);
                }
                SlotState::Asked { until_ms, .. } if until_ms <= desk.now => {
                    slot.end(SlotOutcome::NoReveal, "no reveal before its deadline");
                }
                _ => {}
            }
        }
        self.referees.tick(self.number, desk);
        self.advance(desk)
    }

    /// The verifier wants `count` more results. `false`: the verdict is about an earlier round.
    pub fn more_nodes(&mut self, round: u32, count: u32, desk: &mut Desk) -> Option<Progress> {
        if self.collected.is_none() || round != self.round || count == 0 {
            return None;
        }
        self.collected = None;
        self.round += 1;
        self.wanted = self.revealed() + count as usize;
        Some(self.advance(desk))
    }

    /// The verifier wants `count` more referees for these answers. `None`: the verdict is about an earlier round.
    pub fn more_referees(
        &mut self,
        round: u32,
        count: u32,
        answers: Vec<Hash32>,
        desk: &mut Desk,
    ) -> Option<Progress> {
        if round != self.round || count == 0 {
            return None;
        }
        let collected = self.collected.take()?;
        self.round += 1;
        match self.evidence(&collected.message, desk) {
            Some(evidence) => self.referees.want(count as usize, answers, evidence),
            // Its own message can't be read back: nothing better comes of it.
            None => tracing::error!(request = %desk.offer.id(), "collected results are no evidence"),
        }
        Some(self.advance(desk))
    }

    /// The bus has the message of `round`.
    pub fn confirmed(&mut self, round: u32, now: i64) {
        if let Some(collected) = self.collected.as_mut().filter(|_| round == self.round) {
            collected.confirmed_at_ms = Some(now);
        }
    }

    /// Ends the attempt at the nodes.
    pub fn end(&mut self, reason: &str, desk: &mut Desk) {
        let request = desk.offer.id();
        for slot in &self.slots {
            let node = slot.who.node;
            if slot.is_leased() {
                desk.nodes.release(&node, request);
                let frame = frames::cancel(request, self.number, reason);
                desk.out.push(Effect::Send { node, frame });
            }
            desk.out.push(Effect::Send { node, frame: frames::released(request, self.number) });
        }
        self.referees.end(reason, self.number, desk);
        desk.out.push(Effect::SlotsChanged);
    }

    /// Replaces, asks for reveals, collects: whatever is due. Called after every change.
    fn advance(&mut self, desk: &mut Desk) -> Progress {
        if self.collected.is_some() {
            return Progress::Open;
        }
        self.lease_missing(desk);
        if self.slots.iter().any(Slot::is_leased) {
            return Progress::Open;
        }
        if self.ask_for_reveals(desk) {
            return Progress::Open;
        }
        let majority = desk.offer.k() / 2 + 1;
        let may_retry = self.round == 1 && desk.now < desk.offer.deadline_ms();
        if self.revealed() < majority && may_retry {
            if self.slots.iter().all(|slot| slot.is_alive() || slot.no_room) {
                return Progress::NoRoom;
            }
            if desk.offer.tries < desk.rules.max_tries {
                return Progress::Exhausted;
            }
        }
        if self.referees.lease_missing(self.number, &self.traceparent, desk) {
            return Progress::Open;
        }
        self.collect(desk);
        Progress::Open
    }

    fn lease_missing(&mut self, desk: &mut Desk) {
        while self.alive() < self.wanted {
            let Some(who) = self.drawn.get(self.slots.len()).cloned() else { return };
            let node = who.node;
            let until_ms = desk.now + desk.rules.lease_ms;
            let refereed = self.referees.has(&who.operator);
            let busy = self.canary == Some(who.operator) || !desk.nodes.is_free(&node);
            let there = desk.nodes.serves(&who, &desk.offer.model());
            let mut slot = Slot::leased(who, until_ms);
            if refereed {
                slot.end(SlotOutcome::Refereed, "refereed this attempt before it was drawn");
            } else if !there {
                slot.end(SlotOutcome::Disconnected, "not connected when drawn");
                slot.no_room = true;
            } else if busy {
                slot.end(SlotOutcome::Busy, "no free place when drawn");
                slot.no_room = true;
            } else {
                desk.nodes.lease(&node, desk.offer.id());
                let lease = self.lease_frame(desk.offer)(until_ms);
                desk.out.push(Effect::Send { node, frame: frames::lease(lease) });
                desk.out.push(Effect::SlotsChanged);
            }
            self.slots.push(slot);
        }
    }

    fn lease_frame(&self, offer: &Offer) -> impl FnOnce(i64) -> v1::Lease + use<> {
        let request = offer.wire.submitted.as_ref().and_then(|s| s.request.clone());
        let (attempt, stream) = (self.number, offer.funded.submitted.stream);
        let traceparent = self.traceparent.clone();
        move |commit_deadline_ms| v1::Lease { request, attempt, commit_deadline_ms, stream, traceparent }
    }

    /// True while a reveal is awaited.
    fn ask_for_reveals(&mut self, desk: &mut Desk) -> bool {
        let until_ms = desk.now + desk.rules.reveal_ms;
        let mut awaited = false;
        for slot in &mut self.slots {
            match &slot.state {
                SlotState::Committed(pledge) => {
                    slot.state = SlotState::Asked { pledge: *pledge, until_ms };
                    desk.out.push(Effect::Send {
                        node: slot.who.node,
                        frame: frames::reveal_request(desk.offer.id(), self.number, until_ms),
                    });
                    awaited = true;
                }
                SlotState::Asked { .. } => awaited = true,
                _ => {}
            }
        }
        awaited
    }
}

fn size(reveal: &Reveal) -> usize {
    reveal.output.fingerprints.len() + 5 * reveal.output.tokens.len()
}
