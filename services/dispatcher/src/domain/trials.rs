//! Trials: leases whose answers nobody waits for, scored by referees to see whether a node computes what it says.
//!
//! ```text
//!  Leased ─commitment─> Committed ─> Asked ─reveal─> Scored ─report─> kept or refuted by two of three ─> conduct
//! ```
//!
//! A canary (protocol section 8) stands beside the k of an attempt and looks like one of its leases; see
//! [`infera_protocol::canary`]. Its reveal is asked for when those of the attempt are.
//!
//! The entry trial (section 2) comes before a node is drawn for the first time of its session: a prompt that nobody has
//! seen, scored by trusted referees of its class. Where nobody is trusted yet a node works without, everything that it
//! answers is refereed, and it is tried once somebody can judge it.
//!
//! Trials live in memory: one that is lost with the process says nothing about anybody.

mod entry;
mod trial;

use std::collections::BTreeSet;
use std::sync::Arc;

use infera_protocol::assignment::{Eligible, draw_referees, operators};
use infera_protocol::bytes::{Address, EvmSignature, Hash32, NodeId};
use infera_protocol::canary;
use infera_protocol::commitment;
use infera_protocol::evidence::{Reveal, SignedCommitment};
use infera_protocol::hash::keccak;
use infera_protocol::ids::id_beside;
use infera_protocol::judgement::Conduct;
use infera_protocol::request::check_output;
use infera_protocol::trust::Reason;
use infera_protocol::vrf;
use infera_wire::v1::from_dispatcher::Message;
use uuid::Uuid;

pub use entry::Entry;
use trial::{Stage, Step, Trial, Verdict};

use super::attempt::{Attempt, Desk};
use super::nodes::Nodes;
use super::statements::Stand;
use super::{Effect, Rejection, Rules, SignedScores};

/// Most trials at a time; while there are so many, no further ones begin.
const MAX_TRIALS: usize = 64;
/// Most of them that are entry trials: newcomers that say nothing never take the places of canaries.
const MAX_ENTRIES: usize = 48;
/// Most referees of one trial.
pub const MAX_REFEREES: usize = 5;

/// What trials work with.
pub struct Court<'a> {
    pub rules: &'a Rules,
    pub nodes: &'a mut Nodes,
    pub now: i64,
    pub out: &'a mut Vec<Effect>,
}

/// Why a node is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Canary,
    Entry,
}

impl Kind {
    /// Its name on `/metrics`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Canary => "canary",
            Self::Entry => "entry",
        }
    }
}

/// Whether a node computes what it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    Failed,
    /// It declined: at another time.
    Declined,
    /// Nobody could judge it, or it may have known what it was.
    Void,
}

impl Outcome {
    /// Its name on `/metrics`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Declined => "declined",
            Self::Void => "void",
        }
    }
}

/// What came of a trial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    pub kind: Kind,
    pub request: Uuid,
    pub node: NodeId,
    pub outcome: Outcome,
    /// The node's, then the referees'. Empty where nothing follows.
    pub conduct: Vec<Conduct>,
}

/// All that are under way.
#[derive(Debug, Default)]
pub struct Trials {
    live: Vec<Trial>,
    /// Of the last attempt that began: what a referee's job usually brings.
    traceparent: String,
}

impl Trials {
    /// Leases a canary beside an attempt that has just begun, where one is due and somebody is free for it. `asked` names
    /// operators that know the seed of the request from earlier attempts, `other` is a prompt of an earlier request.
    pub fn canary(
        &mut self,
        attempt: &mut Attempt,
        set: &Arc<Vec<Eligible>>,
        (asked, other): (&BTreeSet<Address>, Option<&[u32]>),
        desk: &mut Desk,
    ) {
        self.traceparent = attempt.traceparent().to_owned();
        let beta = attempt.beta();
        let k = desk.offer.funded.submitted.k;
        let due = canary::is_due(&beta, k, operators(set.iter()), desk.rules.canary_ppm);
        if !due || self.live.len() >= MAX_TRIALS {
            return;
        }
        let drawn = |operator: &_| attempt.slots().iter().any(|slot| slot.who.operator == *operator);
        let found = canary::order(&beta, set, |operator| drawn(operator) || asked.contains(operator))
            .into_iter()
            .find(|e| desk.nodes.is_free(&e.node) && desk.nodes.serves(e, &desk.offer.model()));
        let Some(who) = found.cloned() else { return };
        let original = &desk.offer.funded.submitted.request;
        let mut request = canary::request(&beta, original);
        if !canary::follows_seed(&original.sampling) {
            // Nothing that differs is known yet.
            let Some(other) = other else { return };
            request.prompt = other.to_vec();
        }
        let order = draw_referees(&keccak(&[b"infera.trial.v1", &beta.0]), set, |operator| {
            *operator == who.operator || drawn(operator)
        });
        let referees = order.into_iter().take(MAX_REFEREES).rev().cloned().collect();
        attempt.stands_beside(who.operator);
        let secret = vrf::beta(&desk.rules.key.prove(&keccak(&[b"infera.canary.job.v1", &beta.0])));
        let trial = Trial {
            kind: Kind::Canary,
            hash: request.hash(&desk.rules.domain),
            job: id_beside(request.id, &secret),
            job_traceparent: traceparent_like(attempt.traceparent(), &secret),
            secret,
            checked: Vec::new(),
            attempt: attempt.number,
            peers: Vec::new(),
            is_void: false,
            stage: Stage::Leased { until_ms: desk.now + desk.rules.lease_ms },
            stream: desk.offer.funded.submitted.stream,
            traceparent: attempt.traceparent().to_owned(),
            who,
            request,
            referees,
        };
        let mut court = Court { rules: desk.rules, nodes: desk.nodes, now: desk.now, out: desk.out };
        self.lease(trial, &mut court);
    }

    fn lease(&mut self, trial: Trial, court: &mut Court) {
        trial.send(court);
        court.out.push(Effect::SlotsChanged);
        self.live.push(trial);
    }

    /// Whether this is about the lease of a trial.
    pub fn has(&self, node: &NodeId, request: Uuid, attempt: u32) -> bool {
        self.find(node, request, attempt).is_some()
    }

    /// Whether the node still computes in a trial: what it declines then is its lease.
    pub fn is_leased(&self, node: &NodeId, request: Uuid, attempt: u32) -> bool {
        self.find(node, request, attempt)
            .is_some_and(|at| matches!(self.live[at].stage, Stage::Leased { .. }))
    }

    /// Whether this node was asked to score a trial's answer under this id.
    pub fn asks(&self, node: &NodeId, job: Uuid) -> bool {
        self.asking(node, job).is_some()
    }

    fn find(&self, node: &NodeId, request: Uuid, attempt: u32) -> Option<usize> {
        let is = |t: &Trial| t.who.node == *node && t.request.id == request && t.attempt == attempt;
        self.live.iter().position(is)
    }

    fn asking(&self, node: &NodeId, job: Uuid) -> Option<usize> {
        self.live.iter().position(|t| t.job == job && t.asked().is_some_and(|who| who.node == *node))
    }

    /// A commitment in a trial. A newcomer is asked for its reveal at once, a canary by [`Trials::ask`].
    ///
    /// # Errors
    /// As for any slot.
    pub fn commit(
        &mut self,
        node: &NodeId,
        (request, attempt): (Uuid, u32),
        (commit, signature): (SignedCommitment, EvmSignature),
        court: &mut Court,
    ) -> Result<(), Rejection> {
        let at = self.find(node, request, attempt).ok_or(Rejection::NotLeased)?;
        let trial = &mut self.live[at];
        let stand = Stand::new(court.rules, court.nodes, &trial.who, trial.place())?;
        let pledge = stand.commits(commit, signature)?;
        let first = match &trial.stage {
            Stage::Leased { until_ms } if court.now < *until_ms => {
                trial.stage = Stage::Committed(pledge);
                court.nodes.kept_up(node, request);
                if trial.kind == Kind::Entry {
                    trial.ask_reveal(court);
                }
                court.out.push(Effect::SlotsChanged);
                return Ok(());
            }
            Stage::Leased { .. } | Stage::Scored { .. } => return Err(Rejection::Late),
            Stage::Committed(first) | Stage::Asked { pledge: first, .. } => first,
        };
        if first.commit.digest == pledge.commit.digest {
            return Ok(());
        }
        let evidence = Box::new(stand.equivocation(first, &pledge));
        court.out.push(Effect::Contradicted { request, operator: trial.who.operator, evidence });
        Err(Rejection::Equivocation)
    }

    /// A reveal in a trial: if it opens the commitment, referees are asked.
    ///
    /// # Errors
    /// As for any slot.
    pub fn reveal(
        &mut self,
        node: &NodeId,
        (request, attempt): (Uuid, u32),
        (reveal, signature): (Reveal, EvmSignature),
        court: &mut Court,
    ) -> Result<(), Rejection> {
        let at = self.find(node, request, attempt).ok_or(Rejection::NotLeased)?;
        let trial = &mut self.live[at];
        let pledge = match &trial.stage {
            Stage::Asked { pledge, .. } => *pledge,
            Stage::Leased { .. } | Stage::Committed(_) => return Err(Rejection::NotAsked),
            Stage::Scored { .. } => return Ok(()),
        };
        let place = trial.place();
        let stand = Stand::new(court.rules, court.nodes, &trial.who, place)?;
        let statement = stand.reveals(&reveal, signature)?;
        let digest = commitment::commitment(&court.rules.domain, &place, &reveal.output, &reveal.salt);
        let opens = digest == pledge.commit.digest;
        if !opens {
            let evidence = Box::new(stand.false_reveal(&pledge, &reveal, statement));
            court.out.push(Effect::Contradicted { request, operator: trial.who.operator, evidence });
        }
        let end_tokens = court.rules.end_tokens(&trial.request.model_root);
        let formed = check_output(&trial.request, &reveal.output, end_tokens).is_ok();
        let step = if opens && formed {
            trial.stage = Stage::Scored { output: reveal.output, votes: Vec::new(), asked: None };
            trial.ask(court)
        } else {
            Step::Ends(Verdict::Bad(Reason::Mismatch))
        };
        self.after(at, step, court);
        Ok(())
    }

    /// A node that still computes does not take part ([`Trials::is_leased`]), or a referee does not.
    ///
    /// # Errors
    /// [`Rejection::NotLeased`].
    pub fn decline(
        &mut self,
        node: &NodeId,
        (request, attempt): (Uuid, u32),
        court: &mut Court,
    ) -> Result<(), Rejection> {
        if let Some(at) = self.asking(node, request) {
            let step = self.live[at].ask(court);
            self.after(at, step, court);
            return Ok(());
        }
        let at = self.find(node, request, attempt).ok_or(Rejection::NotLeased)?;
        self.after(at, Step::Ends(Verdict::Declined), court);
        Ok(())
    }

    /// A referee's report about a trial's answer. One that is none is passed over.
    ///
    /// # Errors
    /// [`Rejection::NotLeased`], [`Rejection::BadSignature`].
    pub fn refereed(
        &mut self,
        node: &NodeId,
        job: Uuid,
        reports: &[SignedScores],
        court: &mut Court,
    ) -> Result<(), Rejection> {
        let at = self.asking(node, job).ok_or(Rejection::NotLeased)?;
        let step = self.live[at].take(reports, court)?;
        self.after(at, step, court);
        Ok(())
    }

    /// What an attempt revealed, so that a copy can be told from any other wrong answer.
    pub fn note_peers(&mut self, request: Uuid, attempt: &Attempt) {
        for trial in &mut self.live {
            if trial.request.id == request && trial.attempt == attempt.number {
                trial.peers =
                    attempt.slots().iter().filter_map(|s| s.reveal()).map(|r| r.output.hash()).collect();
            }
        }
    }

    /// Asks canaries that have committed for their reveals, where `waits` does not say that the attempt still waits for
    /// commitments: earlier than anybody else, they would know what they are.
    pub fn ask(&mut self, waits: impl Fn(Uuid, u32) -> bool, court: &mut Court) {
        for trial in &mut self.live {
            if matches!(trial.stage, Stage::Committed(_)) && !waits(trial.request.id, trial.attempt) {
                trial.ask_reveal(court);
            }
        }
    }

    /// The attempt ends without a verdict, and whoever still computes beside it may be drawn for the next one, under the
    /// seed of the request and the same id.
    pub fn give_up(&mut self, request: Uuid, court: &mut Court) {
        let mut at = 0;
        while let Some(trial) = self.live.get(at) {
            let computes = trial.request.id == request && matches!(trial.stage, Stage::Leased { .. });
            if !self.after(at, if computes { Step::Ends(Verdict::Open) } else { Step::Goes }, court) {
                at += 1;
            }
        }
    }

    /// Looks at what is sent: an operator that is asked to referee the attempt beside which it is tried sees both seeds.
    pub fn watch(&mut self, nodes: &Nodes, out: &[Effect]) {
        if self.live.is_empty() {
            return;
        }
        for effect in out {
            let Effect::Send { node, frame } = effect else { continue };
            let Some(Message::RefereeLease(lease)) = &frame.message else { continue };
            let Some(operator) = nodes.get(node).map(|info| info.operator) else { continue };
            let id = lease.request.as_ref().map(|request| request.id.as_slice());
            for trial in &mut self.live {
                let early = matches!(trial.stage, Stage::Leased { .. });
                if early && trial.who.operator == operator && id == Some(trial.request.id.as_bytes()) {
                    trial.is_void = true;
                }
            }
        }
    }

    /// The node's session ended: a referee is replaced. Whoever is tried has until its deadlines, as in any slot.
    pub fn left(&mut self, node: &NodeId, court: &mut Court) {
        let mut at = 0;
        while let Some(trial) = self.live.get_mut(at) {
            let asked = trial.asked().is_some_and(|who| who.node == *node);
            let step = if asked { trial.ask(court) } else { Step::Goes };
            if !self.after(at, step, court) {
                at += 1;
            }
        }
    }

    /// The node is back under the same key: what it was asked is sent again, as in any slot.
    pub fn resumed(&mut self, node: &NodeId, court: &mut Court) {
        let mut at = 0;
        while let Some(trial) = self.live.get(at) {
            let step = if trial.who.node == *node { trial.resume(court) } else { Step::Goes };
            if !self.after(at, step, court) {
                at += 1;
            }
        }
    }

    /// Ends what is overdue.
    pub fn tick(&mut self, court: &mut Court) {
        let mut at = 0;
        while let Some(trial) = self.live.get_mut(at) {
            let step = match &trial.stage {
                Stage::Leased { until_ms } | Stage::Asked { until_ms, .. } if *until_ms <= court.now => {
                    Step::Ends(Verdict::Missed)
                }
                Stage::Scored { asked: Some(asked), .. } if asked.until_ms <= court.now => trial.ask(court),
                _ => Step::Goes,
            };
            if !self.after(at, step, court) {
                at += 1;
            }
        }
    }

    /// True if the trial at `at` is over, and gone.
    fn after(&mut self, at: usize, step: Step, court: &mut Court) -> bool {
        let Step::Ends(verdict) = step else { return false };
        let trial = self.live.swap_remove(at);
        trial.end(verdict, court);
        true
    }
}

/// A trace of its own in the form of another one: referees are not to know a trial by it. Empty where that is.
fn traceparent_like(other: &str, secret: &Hash32) -> String {
    // `00-<32 hex>-<16 hex>` and the flags.
    let Some(flags) = other.get(52..) else { return String::new() };
    let hex: String = secret.0[8..].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("00-{}-{}{flags}", &hex[..32], &hex[32..])
}
