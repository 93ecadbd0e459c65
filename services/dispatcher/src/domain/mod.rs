//! What the dispatcher knows and decides, without I/O, clock or randomness of its own.
//!
//! ```text
//!  Offered ─> Storing ─AttemptStored─> Waiting ─k operators free─> Working ─closing verdict─> gone
//!                ^                                                  │  ^
//!                └────────── no majority possible, tries left ──────┘  └ MoreNodes: next round
//!
//!  a slot of Working: Leased ─> Committed ─> Asked ─> Revealed
//!                        └──────────┴───────────┴──> Ended(outcome), replaced by the next of the draw
//! ```
//!
//! Reveals are asked for only while no slot of the attempt is leased. Who replaces a node that fails to
//! reveal, or is drawn in a later round, computes after that; reveals go to nobody but the verifier.

pub mod attempt;
mod beginning;
mod entering;
pub mod frames;
pub mod nodes;
pub mod peers;
mod prompts;
pub mod referees;
pub mod slot;
mod statements;
pub mod trials;
pub mod trust;
mod types;

use std::collections::{BTreeMap, BTreeSet};

use infera_protocol::bytes::{Address, Hash32, NodeId};
use infera_wire::v1;
use uuid::Uuid;

pub use types::{Command, Effect, MAX_DELTA_TOKENS, Offer, Rejection, Rules, SignedScores};

use attempt::{Attempt, Desk, Progress};
use beginning::Frozen;
use nodes::{Connected, ModelSlots, NodeView, Nodes};
use peers::Peers;
use prompts::Prompts;
use trials::{Court, Trials};
use trust::Ledger;

/// How long to wait before a further try with a new set, per try made, ms: nodes that declined
/// because they were full need a moment.
const TRY_AGAIN_MS: i64 = 500;
/// The longest of those waits, ms.
const LONGEST_TRY_AGAIN_MS: i64 = 2_000;
/// The longest wait for a verdict before it is asked for again, ms.
const LONGEST_PATIENCE_MS: i64 = 300_000;

/// Everything that one replica holds.
pub struct State {
    rules: Rules,
    nodes: Nodes,
    requests: BTreeMap<Uuid, Held>,
    peers: Peers,
    trust: Ledger,
    trials: Trials,
    prompts: Prompts,
    /// Who was let in untried and is tried now, and until when the next one waits for it (ms).
    tried_late: Option<(NodeId, i64)>,
    /// By model.
    frozen: BTreeMap<Hash32, Frozen>,
    arrivals: u64,
}

struct Held {
    offer: Offer,
    /// Operators that know the request's seed from earlier attempts.
    asked: BTreeSet<Address>,
    /// Who waits longest is served first.
    arrival: u64,
    phase: Phase,
    close_asked: u32,
    ask_close_at_ms: i64,
}

enum Phase {
    /// The attempt's number is being written.
    Storing,
    /// Too few operators have free slots, or a further try is not due yet.
    Waiting {
        attempt: u32,
        traceparent: String,
        not_before_ms: i64,
        since_ms: i64,
    },
    Working(Box<Attempt>),
}

impl State {
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            nodes: Nodes::default(),
            requests: BTreeMap::new(),
            peers: Peers::default(),
            trust: Ledger::default(),
            trials: Trials::default(),
            prompts: Prompts::default(),
            tried_late: None,
            frozen: BTreeMap::new(),
            arrivals: 0,
        }
    }

    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    pub fn nodes(&self) -> Vec<NodeView> {
        self.nodes.views()
    }

    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_session(&self, node: &NodeId, session: Uuid) -> bool {
        self.nodes.is_session(node, session)
    }

    pub fn request_count(&self) -> usize {
        self.requests.len()
    }

    /// The live attempt of a request.
    pub fn attempt(&self, request: Uuid) -> Option<&Attempt> {
        match &self.requests.get(&request)?.phase {
            Phase::Working(attempt) => Some(attempt),
            Phase::Storing | Phase::Waiting { .. } => None,
        }
    }

    #[cfg(test)]
    fn tries(&self, request: Uuid) -> u32 {
        self.requests.get(&request).map_or(0, |held| held.offer.tries)
    }

    /// Slots for a model and the requests for it that are held here. What a request that has not begun
    /// will take is not free.
    pub fn model_slots(&self, model: &Hash32) -> (ModelSlots, Vec<Uuid>) {
        let mut slots = self.nodes.model_slots(model);
        let mut ids = Vec::new();
        for (id, held) in self.requests.iter().filter(|(_, held)| held.offer.model() == *model) {
            ids.push(*id);
            if matches!(held.phase, Phase::Storing | Phase::Waiting { .. }) {
                slots.free = slots.free.saturating_sub(held.offer.funded.submitted.k);
            }
        }
        (slots, ids)
    }

    /// Applies what happened at `now` (ms) and says what is to be done, in order. A rejection may
    /// still carry effects, in `out`.
    pub fn apply(&mut self, command: Command, now: i64, out: &mut Vec<Effect>) -> Result<(), Rejection> {
        match command {
            Command::NodeJoined(info) => self.joined(info, now, out),
            Command::NodeLeft { node, session } => {
                if self.nodes.is_session(&node, session) {
                    self.nodes.leave(&node);
                    self.lost(&node, now, out);
                }
            }
            Command::NodeDraining { node, session } => {
                if self.nodes.is_session(&node, session) {
                    self.nodes.drain(&node);
                    out.push(Effect::SlotsChanged);
                }
            }
            Command::Offered(offer) => self.offered(*offer, now, out)?,
            Command::AttemptStored { request, attempt, traceparent } => {
                self.stored(request, attempt, traceparent, now)?;
            }
            Command::Committed { node, request, attempt, commit, statement }
                if self.trials.has(&node, request, attempt) =>
            {
                self.court(now, out, |t, court| {
                    t.commit(&node, (request, attempt), (commit, statement), court)
                })?;
            }
            Command::Committed { node, request, attempt, commit, statement } => {
                self.working(request, attempt, now, out, |a, desk| {
                    a.commit(&node, (commit, statement), desk)
                })?;
            }
            Command::Revealed { node, request, attempt, reveal, statement }
                if self.trials.has(&node, request, attempt) =>
            {
                if let Some(Phase::Working(live)) = self.requests.get(&request).map(|held| &held.phase) {
                    self.trials.note_peers(request, live);
                }
                self.court(now, out, |t, court| {
                    t.reveal(&node, (request, attempt), (*reveal, statement), court)
                })?;
            }
            Command::Revealed { node, request, attempt, reveal, statement } => {
                self.working(request, attempt, now, out, |a, desk| {
                    a.reveal(&node, (*reveal, statement), desk)
                })?;
            }
            Command::Declined { node, request, attempt, .. }
                if self.trials.is_leased(&node, request, attempt) || self.trials.asks(&node, request) =>
            {
                self.court(now, out, |t, court| t.decline(&node, (request, attempt), court))?;
            }
            Command::Declined { node, request, attempt, decline } => {
                self.working(request, attempt, now, out, |a, desk| a.decline(&node, decline, desk))?;
            }
            Command::Refereed { node, request, reports, .. } if self.trials.asks(&node, request) => {
                self.court(now, out, |t, court| t.refereed(&node, request, &reports, court))?;
            }
            Command::Refereed { node, request, attempt, reports } => {
                self.working(request, attempt, now, out, |a, desk| a.refereed(&node, reports, desk))?;
            }
            // Nobody listens.
            Command::Deltas { node, request, attempt, .. } if self.trials.has(&node, request, attempt) => {}
            Command::Deltas { node, request, attempt, offset, tokens } => {
                return self.deltas(node, request, attempt, offset, tokens, out);
            }
            Command::Confirmed { request, attempt, round } => {
                self.working(request, attempt, now, out, |a, desk| {
                    a.confirmed(round, desk.now);
                    Ok(Progress::Open)
                })?;
            }
            Command::MoreNodes { request, attempt, round, count } => {
                self.working(request, attempt, now, out, |a, desk| {
                    a.more_nodes(round, count, desk).ok_or(Rejection::Stale)
                })?;
            }
            Command::MoreReferees { request, attempt, round, count, answers } => {
                self.working(request, attempt, now, out, |a, desk| {
                    a.more_referees(round, count, answers, desk).ok_or(Rejection::Stale)
                })?;
            }
            Command::Trust(ledger) => self.trust = *ledger,
            Command::Registry(registry) => self.rules.registry.replace(*registry),
            Command::Closed { request } => self.closed(request, now, out)?,
            Command::Peer { replica, report } => self.peers.take(replica, report, now),
            Command::Tick => self.tick(now, out),
        }
        self.begin_waiting(now, out);
        self.ask_canaries(now, out);
        self.trials.watch(&self.nodes, out);
        Ok(())
    }

    fn ask_canaries(&mut self, now: i64, out: &mut Vec<Effect>) {
        let Self { rules, nodes, trials, requests, .. } = self;
        let waits = |request: Uuid, attempt| match requests.get(&request).map(|held| &held.phase) {
            Some(Phase::Working(live)) => live.number == attempt && live.is_computing(),
            _ => false,
        };
        trials.ask(waits, &mut Court { rules, nodes, now, out });
    }

    fn court<T>(
        &mut self,
        now: i64,
        out: &mut Vec<Effect>,
        act: impl FnOnce(&mut Trials, &mut Court) -> T,
    ) -> T {
        let Self { rules, nodes, trials, .. } = self;
        let first = out.len();
        let done = act(trials, &mut Court { rules, nodes, now, out });
        self.after_trials(first, now, out);
        done
    }

    fn joined(&mut self, info: Connected, now: i64, out: &mut Vec<Effect>) {
        let node = info.node;
        let other = self.nodes.get(&node).is_some_and(|old| {
            (old.operator, old.model_root, &old.class) != (info.operator, info.model_root, &info.class)
        });
        if other {
            self.nodes.leave(&node);
            self.lost(&node, now, out);
        }
        let is_new = self.nodes.get(&node).is_none();
        self.nodes.join(info.clone());
        self.court(now, out, |trials, court| trials.resumed(&node, court));
        if is_new {
            self.enter(&info, now, out);
        }
        self.each_working(now, out, |attempt, desk| {
            attempt.resumed(&node, desk);
            Progress::Open
        });
        out.push(Effect::SlotsChanged);
    }

    fn lost(&mut self, node: &NodeId, now: i64, out: &mut Vec<Effect>) {
        self.each_working(now, out, |attempt, desk| attempt.disconnected(node, desk));
        self.court(now, out, |trials, court| trials.left(node, court));
        out.push(Effect::SlotsChanged);
    }

    fn offered(&mut self, offer: Offer, now: i64, out: &mut Vec<Effect>) -> Result<(), Rejection> {
        let request = offer.id();
        if self.requests.contains_key(&request) {
            return Err(Rejection::AlreadyHeld);
        }
        if self.requests.len() >= self.rules.max_requests {
            return Err(Rejection::Full);
        }
        self.arrivals += 1;
        let ask_close_at_ms = offer.deadline_ms().max(now) + self.rules.close_grace_ms;
        let (arrival, asked) = (self.arrivals, BTreeSet::new());
        let held = Held { offer, asked, arrival, phase: Phase::Storing, close_asked: 0, ask_close_at_ms };
        self.requests.insert(request, held);
        out.push(Effect::StoreAttempt { request });
        out.push(Effect::SlotsChanged);
        Ok(())
    }

    fn stored(
        &mut self,
        request: Uuid,
        attempt: u32,
        traceparent: String,
        now: i64,
    ) -> Result<(), Rejection> {
        let held = self.requests.get_mut(&request).ok_or(Rejection::Stale)?;
        if !matches!(held.phase, Phase::Storing) {
            return Err(Rejection::Stale);
        }
        let before = i64::from(held.offer.tries.saturating_add(held.offer.waits));
        let not_before_ms = now + TRY_AGAIN_MS.saturating_mul(before).min(LONGEST_TRY_AGAIN_MS);
        held.offer.tries += 1;
        held.phase = Phase::Waiting { attempt, traceparent, not_before_ms, since_ms: now };
        Ok(())
    }

    fn deltas(
        &self,
        node: NodeId,
        request: Uuid,
        attempt: u32,
        offset: u32,
        tokens: Vec<u32>,
        out: &mut Vec<Effect>,
    ) -> Result<(), Rejection> {
        let held = self.requests.get(&request).ok_or(Rejection::Stale)?;
        let live = self.attempt(request).filter(|a| a.number == attempt).ok_or(Rejection::Stale)?;
        live.streams(&node)?;
        let submitted = &held.offer.funded.submitted;
        let end = u64::from(offset) + tokens.len() as u64;
        let fits = end <= u64::from(submitted.request.max_tokens);
        if tokens.is_empty() || tokens.len() > MAX_DELTA_TOKENS || !fits {
            return Err(Rejection::BadDeltas);
        }
        // A node that streams without being asked does no harm, and nobody listens.
        if submitted.stream {
            let request_id = request.as_bytes().to_vec();
            let entry = v1::DeltaEntry { request_id, attempt, node: node.to_vec(), offset, tokens };
            out.push(Effect::Delta { reply_to: submitted.reply_to.clone(), entry });
        }
        Ok(())
    }

    fn closed(&mut self, request: Uuid, now: i64, out: &mut Vec<Effect>) -> Result<(), Rejection> {
        let mut held = self.requests.remove(&request).ok_or(Rejection::Stale)?;
        if let Phase::Working(attempt) = &mut held.phase {
            self.trials.note_peers(request, attempt);
            let mut desk = Desk { rules: &self.rules, offer: &held.offer, nodes: &mut self.nodes, now, out };
            attempt.end("closed", &mut desk);
        }
        out.push(Effect::Closed { request });
        out.push(Effect::SlotsChanged);
        Ok(())
    }

    /// Gives up what waits for nodes here while another replica has them.
    fn hand_back(&mut self, now: i64, out: &mut Vec<Effect>) {
        self.peers.expire(now);
        let due = |held: &Held| match held.phase {
            Phase::Waiting { since_ms, .. } => since_ms + self.rules.hand_back_ms <= now,
            Phase::Storing | Phase::Working(_) => false,
        };
        let waiting: Vec<Uuid> =
            self.requests.iter().filter(|(_, held)| due(held)).map(|(id, _)| *id).collect();
        for request in waiting {
            let offer = self.requests.get(&request).map(|held| &held.offer);
            let Some((model, k)) = offer.map(|o| (o.model(), o.funded.submitted.k)) else { continue };
            if self.peers.take_room(&model, k) {
                self.requests.remove(&request);
                out.push(Effect::HandBack { request });
                out.push(Effect::SlotsChanged);
            }
        }
    }

    fn tick(&mut self, now: i64, out: &mut Vec<Effect>) {
        self.hand_back(now, out);
        self.each_working(now, out, |attempt, desk| attempt.tick(desk));
        self.court(now, out, Trials::tick);
        self.enter_later(now, out);
        for (request, held) in &mut self.requests {
            if held.ask_close_at_ms > now {
                continue;
            }
            held.close_asked += 1;
            held.ask_close_at_ms = now + doubled(self.rules.close_grace_ms, held.close_asked);
            if let Some(submitted) = held.offer.wire.submitted.clone() {
                let (submitted, n) = (Box::new(submitted), held.close_asked);
                out.push(Effect::AskClose { request: *request, submitted, n });
            }
        }
    }

    /// Hands the live attempt of a request to `act`; another attempt is fenced off.
    fn working(
        &mut self,
        request: Uuid,
        attempt: u32,
        now: i64,
        out: &mut Vec<Effect>,
        act: impl FnOnce(&mut Attempt, &mut Desk) -> Result<Progress, Rejection>,
    ) -> Result<(), Rejection> {
        let Self { rules, nodes, requests, trials, .. } = self;
        let held = requests.get_mut(&request).ok_or(Rejection::Stale)?;
        let Phase::Working(live) = &mut held.phase else { return Err(Rejection::Stale) };
        if live.number != attempt {
            return Err(Rejection::Stale);
        }
        let mut desk = Desk { rules, offer: &held.offer, nodes, now, out };
        let progress = act(live, &mut desk)?;
        after(held, progress, trials, rules, nodes, now, out);
        Ok(())
    }

    fn each_working(
        &mut self,
        now: i64,
        out: &mut Vec<Effect>,
        act: impl Fn(&mut Attempt, &mut Desk) -> Progress,
    ) {
        let Self { rules, nodes, requests, trials, .. } = self;
        for held in requests.values_mut() {
            let Phase::Working(live) = &mut held.phase else { continue };
            let mut desk = Desk { rules, offer: &held.offer, nodes, now, out };
            let progress = act(live, &mut desk);
            after(held, progress, trials, rules, nodes, now, out);
        }
    }
}

/// `wait` (ms) after `repeats` repeats: doubled each time, up to [`LONGEST_PATIENCE_MS`].
fn doubled(wait: i64, repeats: u32) -> i64 {
    wait.saturating_mul(1 << repeats.min(16)).min(LONGEST_PATIENCE_MS.max(wait))
}

/// Starts over when an attempt can't reach a majority any more.
fn after(
    held: &mut Held,
    progress: Progress,
    trials: &mut Trials,
    rules: &Rules,
    nodes: &mut Nodes,
    now: i64,
    out: &mut Vec<Effect>,
) {
    if progress == Progress::Open {
        return;
    }
    if let Phase::Working(attempt) = &mut held.phase {
        let request = held.offer.id();
        trials.note_peers(request, attempt);
        trials.give_up(request, &mut Court { rules, nodes, now, out });
        held.asked.extend(attempt.operators());
        let mut desk = Desk { rules, offer: &held.offer, nodes, now, out };
        attempt.end("a new attempt begins", &mut desk);
        if progress == Progress::NoRoom {
            held.offer.tries = held.offer.tries.saturating_sub(1);
            held.offer.waits = held.offer.waits.saturating_add(1);
        }
    }
    held.phase = Phase::Storing;
    out.push(Effect::StoreAttempt { request: held.offer.id() });
}

#[cfg(test)]
mod tests;
