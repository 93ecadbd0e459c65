//! What the dispatcher is told, what it answers, and what it refuses.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;

use infera_protocol::bytes::{Address, EvmSignature, Hash32, NodeId, Signature};
use infera_protocol::evidence::{Reveal, SignedCommitment, SignedDecline, Terms};
use infera_protocol::identity::Domain;
use infera_protocol::registry::{Model, Registry};
use infera_protocol::slashing::Contradiction;
use infera_protocol::vrf::VrfSecret;
use infera_wire::convert::Funded;
use infera_wire::v1;
use uuid::Uuid;

use super::nodes::Connected;
use super::peers::PeerReport;
use super::trials::Ended;
use super::trust::Ledger;

/// Longest delta frame, tokens.
pub const MAX_DELTA_TOKENS: usize = 4_096;

/// The registry that holds, and what it and those before said about each model: what was funded under one of a model that
/// is withdrawn now is finished.
#[derive(Debug, Clone)]
pub struct InForce {
    registry: Registry,
    terms: BTreeMap<Hash32, Terms>,
}

/// What the service goes by. The registry alone changes while it runs.
pub struct Rules {
    pub domain: Domain,
    pub key: VrfSecret,
    pub registry: InForce,
    pub lease_ms: i64,
    pub reveal_ms: i64,
    /// How long a referee has for its report.
    pub referee_ms: i64,
    /// Silence after which a collected message is sent again; doubled by each repeat.
    pub verdict_ms: i64,
    /// Attempts with a new set that this replica makes before it reports what it has. One that found the
    /// nodes full or gone does not count: those are repeated until the request's deadline.
    pub max_tries: u32,
    /// After the deadline, how long to wait for the verdict before asking for it; and between asking,
    /// doubled each time.
    pub close_grace_ms: i64,
    /// How long a request waits here before a replica that has room for it gets it.
    pub hand_back_ms: i64,
    pub max_requests: usize,
    /// Share of jobs that are canaries, 10^-6.
    pub canary_ppm: u32,
    /// Newcomers are tried before they are drawn.
    pub entry_trials: bool,
}

/// A request that the mempool offered.
#[derive(Debug, Clone)]
pub struct Offer {
    pub funded: Funded,
    /// As it came, to be passed on.
    pub wire: v1::RequestFunded,
    pub request_hash: Hash32,
    /// Attempts that this replica began, without those below.
    pub tries: u32,
    /// Attempts whose missing nodes had no room or were not there.
    pub waits: u32,
}

impl Offer {
    pub fn new(funded: Funded, wire: v1::RequestFunded, domain: &Domain) -> Self {
        let request_hash = funded.submitted.request.hash(domain);
        Self { funded, wire, request_hash, tries: 0, waits: 0 }
    }

    pub fn id(&self) -> Uuid {
        self.funded.submitted.request.id
    }

    pub fn model(&self) -> Hash32 {
        self.funded.submitted.request.model_root
    }

    pub fn deadline_ms(&self) -> i64 {
        self.funded.submitted.deadline_ms
    }

    pub(super) fn k(&self) -> usize {
        self.funded.submitted.k as usize
    }
}

/// What happened.
#[derive(Debug)]
pub enum Command {
    NodeJoined(Connected),
    NodeLeft {
        node: NodeId,
        session: Uuid,
    },
    NodeDraining {
        node: NodeId,
        session: Uuid,
    },
    Offered(Box<Offer>),
    /// The attempt's number is on disk: only now may anything be leased.
    AttemptStored {
        request: Uuid,
        attempt: u32,
        traceparent: String,
    },
    Committed {
        node: NodeId,
        request: Uuid,
        attempt: u32,
        commit: SignedCommitment,
        /// The bound signer's, for the contracts.
        statement: EvmSignature,
    },
    Revealed {
        node: NodeId,
        request: Uuid,
        attempt: u32,
        reveal: Box<Reveal>,
        statement: EvmSignature,
    },
    Declined {
        node: NodeId,
        request: Uuid,
        attempt: u32,
        decline: SignedDecline,
    },
    /// One report for each answer of the referee's job, in their order.
    Refereed {
        node: NodeId,
        request: Uuid,
        attempt: u32,
        reports: Vec<SignedScores>,
    },
    Deltas {
        node: NodeId,
        request: Uuid,
        attempt: u32,
        offset: u32,
        tokens: Vec<u32>,
    },
    /// The bus confirmed a collected message.
    Confirmed {
        request: Uuid,
        attempt: u32,
        round: u32,
    },
    MoreNodes {
        request: Uuid,
        attempt: u32,
        round: u32,
        count: u32,
    },
    MoreReferees {
        request: Uuid,
        attempt: u32,
        round: u32,
        count: u32,
        /// By [`infera_protocol::request::Output::hash`].
        answers: Vec<Hash32>,
    },
    /// What is known of the operators has changed.
    Trust(Box<Ledger>),
    /// The holders have decided.
    Registry(Box<Registry>),
    /// A closing verdict, whatever attempt it is about.
    Closed {
        request: Uuid,
    },
    /// What another replica has room for.
    Peer {
        replica: String,
        report: PeerReport,
    },
    Tick,
}

/// A referee's scores of one answer, encoded, and its signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedScores {
    pub scores: Vec<u8>,
    pub signature: Signature,
}

impl Rules {
    /// What the registry says that a verdict about this model depends on.
    pub fn terms(&self, model: &Hash32) -> Option<Terms> {
        self.registry.terms.get(model).cloned()
    }

    /// The model's; none of a model that the registry has never listed.
    pub fn end_tokens(&self, model: &Hash32) -> &[u32] {
        self.registry.terms.get(model).map_or(&[], |terms| &terms.end_tokens)
    }
}

impl InForce {
    /// Of every model that is or was listed.
    pub fn roots(&self) -> impl Iterator<Item = &Hash32> {
        self.terms.keys()
    }

    /// Takes another registry over.
    pub fn replace(&mut self, registry: Registry) {
        let terms = |model: &Model| (model.weights_root, Terms::of(&registry, model));
        self.terms.extend(registry.models.iter().map(terms));
        self.registry = registry;
    }
}

impl From<Registry> for InForce {
    fn from(registry: Registry) -> Self {
        let mut in_force = Self { registry: registry.clone(), terms: BTreeMap::new() };
        in_force.replace(registry);
        in_force
    }
}

impl Deref for InForce {
    type Target = Registry;

    fn deref(&self) -> &Registry {
        &self.registry
    }
}

/// What is to be done.
#[derive(Debug, Clone)]
pub enum Effect {
    /// Write attempt + 1 of the request to disk, then say [`Command::AttemptStored`].
    StoreAttempt {
        request: Uuid,
    },
    /// Nothing happens if the node is not connected.
    Send {
        node: NodeId,
        frame: v1::FromDispatcher,
    },
    Delta {
        reply_to: String,
        entry: v1::DeltaEntry,
    },
    Publish {
        request: Uuid,
        attempt: u32,
        round: u32,
        repeat: u32,
        message: Arc<v1::ResultsCollected>,
    },
    /// Past its deadline and no verdict came: ask the verifier to close it, for the `n`-th time.
    AskClose {
        request: Uuid,
        submitted: Box<v1::RequestSubmitted>,
        n: u32,
    },
    /// Forgotten here: note it as closed, then ack the offer.
    Closed {
        request: Uuid,
    },
    /// Forgotten here: give the offer back to the bus, for another replica.
    HandBack {
        request: Uuid,
    },
    /// Proof that a node signed what contradicts itself.
    Contradicted {
        request: Uuid,
        operator: Address,
        evidence: Box<Contradiction>,
    },
    /// A trial is over: take what follows into the records.
    Tried(Box<Ended>),
    /// Free slots, nodes or offers held are no longer what the last report says.
    SlotsChanged,
}

/// Why a command changed nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    #[error("the request is held already")]
    AlreadyHeld,
    #[error("as many requests as allowed are held")]
    Full,
    #[error("the request or this attempt of it is not live here")]
    Stale,
    #[error("the node has no slot in this attempt")]
    NotLeased,
    #[error("too late for this slot")]
    Late,
    #[error("the reveal was not asked for")]
    NotAsked,
    #[error("the signature does not match")]
    BadSignature,
    #[error("a second, different commitment for one slot")]
    Equivocation,
    #[error("deltas must have 1 to {MAX_DELTA_TOKENS} tokens within max_tokens")]
    BadDeltas,
}
