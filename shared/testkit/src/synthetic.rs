//! Nodes that speak the real protocol over a real WebSocket, and answer without a model.
//!
//! ```text
//! SyntheticNode::new(&network, 1).run(address, Behaviour::Honest)   plays a whole session
//! SyntheticNode::new(&network, 1).dial(address) -> Socket           frame by frame
//! ```
//!
//! Honest nodes give equal answers: [`answer`] depends on the request alone.

mod player;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use ed25519_dalek::SigningKey;
use futures::{SinkExt, StreamExt};
use infera_protocol::admission::Tree;
use infera_protocol::bytes::{Address, Hash32, NodeId};
use infera_protocol::commitment::{Slot, commitment, decline_digest};
use infera_protocol::fingerprint::Fingerprint;
use infera_protocol::hash::keccak;
use infera_protocol::identity::{
    Domain, HelloClaims, MAX_BINDING_MS, NodeBinding, evm_address, hello_digest, node_id, sign,
};
use infera_protocol::referee::{Report, TokenScore, report_digest};
use infera_protocol::request::{Finish, Output, Request};
use infera_protocol::typed;
use infera_wire::v1::{self, from_dispatcher, from_node};
use infera_wire::{Message as _, convert};
use k256::ecdsa::SigningKey as EvmKey;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};
use uuid::Uuid;

use player::Player;

use crate::evidence::{END_TOKEN, Network, fingerprint, key, output, weights};

/// Long enough for a loaded machine; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Who a node is and what it says of itself. Change the fields at will before it connects.
#[derive(Clone)]
pub struct SyntheticNode {
    pub key: SigningKey,
    pub operator: EvmKey,
    pub domain: Domain,
    pub weights_root: Hash32,
    pub class: String,
    pub slots: u32,
    pub expiry_ms: i64,
}

/// How a node answers its leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Commits to [`answer`] and reveals it.
    Honest,
    /// As honest, with an answer of its own.
    Garbage,
    /// Takes leases and says nothing.
    Silent,
    /// Commits and does not reveal.
    NoReveal,
    /// Reveals something else than it committed to.
    Mismatch,
    Decline,
    /// Commits twice to one slot, and reveals the first.
    Equivocate,
    /// Ends its session when it gets its first lease.
    Vanish,
    /// Gives the answer of whoever else shares, where there is one already, whatever the seed.
    Share,
}

/// A node that plays its session in a task of its own.
pub struct Running {
    pub node: NodeId,
    pub operator: Address,
    frames: Arc<Mutex<Vec<from_dispatcher::Message>>>,
    gate: Arc<Semaphore>,
    task: JoinHandle<()>,
}

impl SyntheticNode {
    /// The n-th node of the network, with an operator of its own; serves the first model with 4 slots.
    pub fn new(network: &Network, n: u8) -> Self {
        let now = SystemTime::UNIX_EPOCH.elapsed().expect("a clock that is set");
        let now_ms = i64::try_from(now.as_millis()).expect("a clock that is set");
        Self {
            key: key(n),
            operator: operator_key(n),
            domain: network.manifest.domain,
            weights_root: network.registry.models[0].weights_root,
            class: "exact".to_owned(),
            slots: 4,
            expiry_ms: now_ms + MAX_BINDING_MS,
        }
    }

    pub fn id(&self) -> NodeId {
        node_id(&self.key)
    }

    pub fn operator(&self) -> Address {
        evm_address(&self.operator)
    }

    /// The hello that answers a challenge with this nonce.
    pub fn hello(&self, nonce: &[u8; 32]) -> v1::Hello {
        let signer = evm_address(&self.signer());
        let binding = NodeBinding { node: self.id(), signer, expiry_ms: self.expiry_ms };
        let claims = HelloClaims {
            node: self.id(),
            operator: self.operator(),
            binding,
            release_hash: Hash32([9; 32]),
            weights_root: self.weights_root,
            class: self.class.clone(),
            slots: self.slots,
        };
        let bound = binding.sign(&self.domain, &self.operator).expect("a binding can be signed");
        v1::Hello {
            node: claims.node.to_vec(),
            operator: claims.operator.to_vec(),
            signer: binding.signer.to_vec(),
            binding_expiry_ms: binding.expiry_ms,
            binding_signature: bound.to_vec(),
            release_hash: claims.release_hash.to_vec(),
            weights_root: claims.weights_root.to_vec(),
            class: claims.class.clone(),
            slots: claims.slots,
            version: "synthetic".to_owned(),
            signature: sign(&self.key, &hello_digest(&self.domain, nonce, &claims)).to_vec(),
        }
    }

    /// Connects and receives the challenge.
    pub async fn dial(&self, address: SocketAddr) -> Socket {
        let url = format!("ws://{address}/v1/node/session");
        let (stream, _) = connect_async(&url).await.expect("the dispatcher accepts connections");
        let mut socket = Socket { stream, nonce: [0; 32] };
        let Some(from_dispatcher::Message::Challenge(challenge)) = socket.next().await else {
            panic!("the first frame is a challenge");
        };
        socket.nonce = challenge.nonce.try_into().expect("a nonce has 32 bytes");
        socket
    }

    /// Connects, says hello and is welcomed.
    pub async fn connect(&self, address: SocketAddr) -> Socket {
        let mut socket = self.dial(address).await;
        let hello = self.hello(&socket.nonce);
        socket.send(from_node::Message::Hello(hello)).await;
        let challenge = match socket.next().await {
            Some(from_dispatcher::Message::RangeChallenge(challenge)) => challenge,
            other => panic!("not asked for the weights: {other:?}"),
        };
        socket.send(from_node::Message::RangeProof(self.prove(&challenge))).await;
        match socket.next().await {
            Some(from_dispatcher::Message::Welcome(_)) => socket,
            other => panic!("not welcomed: {other:?}"),
        }
    }

    /// The answer to a challenge, from [`weights`].
    pub fn prove(&self, challenge: &v1::RangeChallenge) -> v1::RangeProof {
        let file = weights();
        let tree = Tree::read(file.as_slice()).expect("bytes can be read");
        let read_at = |offset: u64, buffer: &mut [u8]| {
            let offset = usize::try_from(offset).expect("a small file");
            buffer.copy_from_slice(&file[offset..offset + buffer.len()]);
            Ok(())
        };
        let slice = |range: &v1::Range| {
            tree.slice((range.offset, range.length), read_at).expect("a range of the file")
        };
        v1::RangeProof {
            nonce: challenge.nonce.clone(),
            slices: challenge.ranges.iter().map(slice).collect(),
        }
    }

    /// Connects and answers leases in a task of its own.
    pub async fn run(&self, address: SocketAddr, behaviour: Behaviour) -> Running {
        self.play(address, behaviour, Arc::new(Semaphore::new(Semaphore::MAX_PERMITS))).await
    }

    /// As [`SyntheticNode::run`], but every commitment waits for a [`Running::let_commit`].
    pub async fn run_gated(&self, address: SocketAddr, behaviour: Behaviour) -> Running {
        self.play(address, behaviour, Arc::new(Semaphore::new(0))).await
    }

    async fn play(&self, address: SocketAddr, behaviour: Behaviour, gate: Arc<Semaphore>) -> Running {
        let socket = self.connect(address).await;
        let frames: Arc<Mutex<Vec<from_dispatcher::Message>>> = Arc::default();
        let player = Player {
            node: self.clone(),
            behaviour,
            socket,
            frames: frames.clone(),
            gate: gate.clone(),
            leases: Vec::new(),
        };
        let task = tokio::spawn(player.play());
        Running { node: self.id(), operator: self.operator(), frames, gate, task }
    }

    /// The frame that commits to `output` in a lease, and the salt that opens it.
    pub fn commit(&self, lease: &v1::Lease, output: &Output) -> (v1::Commit, Hash32) {
        let (request, slot) = self.slot(lease);
        let salt = keccak(&[b"synthetic salt", &self.id().0, request.id.as_bytes()]);
        let digest = commitment(&self.domain, &slot, output, &salt);
        let commit = v1::Commit {
            request_id: request.id.as_bytes().to_vec(),
            attempt: lease.attempt,
            commitment: digest.to_vec(),
            signature: sign(&self.key, &digest).to_vec(),
            statement: self.state(&typed::slot_commitment_digest(&self.domain, &slot, &digest)),
        };
        (commit, salt)
    }

    pub fn reveal(&self, lease: &v1::Lease, output: &Output, salt: &Hash32) -> v1::Reveal {
        let (request, slot) = self.slot(lease);
        v1::Reveal {
            request_id: request.id.as_bytes().to_vec(),
            attempt: lease.attempt,
            tokens: output.tokens.clone(),
            fingerprints: output.fingerprints.clone(),
            finish: convert::finish_to_wire(output.finish).into(),
            salt: salt.to_vec(),
            statement: self.state(&typed::slot_reveal_digest(&self.domain, &slot, output, salt)),
        }
    }

    /// What the binding names.
    fn signer(&self) -> EvmKey {
        EvmKey::from_slice(&keccak(&[b"synthetic signer", &self.id().0]).0).expect("a key")
    }

    fn state(&self, digest: &Hash32) -> Vec<u8> {
        typed::sign(digest, &self.signer()).expect("a digest can be signed").to_vec()
    }

    pub fn decline(&self, lease: &v1::Lease, reason: &str) -> v1::Decline {
        let (request, slot) = self.slot(lease);
        v1::Decline {
            request_id: request.id.as_bytes().to_vec(),
            attempt: lease.attempt,
            reason: reason.to_owned(),
            signature: sign(&self.key, &decline_digest(&self.domain, &slot, reason)).to_vec(),
        }
    }

    /// A referee's report: every token of [`answer`] is right, every other answer is wrong from its first token on.
    pub fn report(&self, lease: &v1::RefereeLease) -> v1::RefereeReport {
        let request = convert::request(lease.request.as_ref().expect("a lease has a request"));
        let request = request.expect("a lease's request is valid");
        let right = answer(&request).tokens;
        let report = |subject: &v1::Subject| {
            let finish = convert::finish("subject.finish", subject.finish).expect("a known finish");
            let judged = Output { tokens: subject.tokens.clone(), fingerprints: Vec::new(), finish };
            let margin_micro = if judged.tokens == right { 0 } else { u32::MAX };
            let print = Fingerprint::decode_first(&fingerprint(&[0])).expect("one candidate").0;
            let score = TokenScore { margin_micro, fingerprint: print };
            let scores = Report { scores: vec![score; judged.tokens.len()] }.encode();
            let (hash, subject) = (request.hash(&self.domain), judged.hash());
            let digest = report_digest(&self.domain, &hash, lease.attempt, &self.id(), &subject, &scores);
            v1::SubjectReport { scores, signature: sign(&self.key, &digest).to_vec() }
        };
        v1::RefereeReport {
            request_id: request.id.as_bytes().to_vec(),
            attempt: lease.attempt,
            reports: lease.subjects.iter().map(report).collect(),
        }
    }

    fn slot(&self, lease: &v1::Lease) -> (Request, Slot) {
        let request = convert::request(lease.request.as_ref().expect("a lease has a request"));
        let request = request.expect("a lease's request is valid");
        let slot = Slot { request_hash: request.hash(&self.domain), attempt: lease.attempt, node: self.id() };
        (request, slot)
    }
}

/// The operator's key of the n-th node.
pub fn operator_key(n: u8) -> EvmKey {
    EvmKey::from_slice(&keccak(&[b"synthetic operator", &[n]]).0).expect("a hash is a secp256k1 key")
}

/// The honest answer to a request: up to 8 tokens that follow from its seed, the last an end token of
/// [`crate::evidence::model`] where there is room for one.
pub fn answer(request: &Request) -> Output {
    let count = request.max_tokens.min(8);
    let finish = if count == request.max_tokens { Finish::Length } else { Finish::Eos };
    let hash = keccak(&[b"synthetic answer", &request.seed.to_be_bytes()]);
    let mut tokens: Vec<u32> =
        hash.0.iter().take(count as usize).map(|byte| u32::from(*byte) + 100).collect();
    if let (Finish::Eos, Some(last)) = (finish, tokens.last_mut()) {
        *last = END_TOKEN;
    }
    output(&tokens, finish)
}

/// An open connection.
pub struct Socket {
    stream: WebSocketStream<MaybeTlsStream<TcpStream>>,
    /// Of this connection's challenge.
    pub nonce: [u8; 32],
}

impl Socket {
    /// The next frame; `None` once the connection has ended.
    pub async fn next(&mut self) -> Option<from_dispatcher::Message> {
        let next = tokio::time::timeout(PATIENCE, self.next_unhurried());
        next.await.expect("a frame, or the end of the session")
    }

    /// The next frame that is a lease.
    pub async fn lease(&mut self) -> v1::Lease {
        loop {
            match self.next().await {
                Some(from_dispatcher::Message::Lease(lease)) => return lease,
                Some(_) => {}
                None => panic!("the session ended before a lease came"),
            }
        }
    }

    /// Reads until the dispatcher refuses, and returns the code; the session must end after it.
    pub async fn refusal(&mut self) -> String {
        loop {
            match self.next().await {
                Some(from_dispatcher::Message::Refused(refused)) => {
                    assert_eq!(self.next().await, None, "the session ends after a refusal");
                    return refused.code;
                }
                Some(_) => {}
                None => panic!("the session ended without a refusal"),
            }
        }
    }

    pub async fn send(&mut self, message: from_node::Message) {
        let frame = v1::FromNode { message: Some(message) };
        self.send_raw(Message::binary(frame.encode_to_vec())).await;
    }

    /// Sends any WebSocket message. A connection that the dispatcher ended takes nothing.
    pub async fn send_raw(&mut self, message: Message) {
        let _ = self.stream.send(message).await;
    }

    /// Ends the connection without a word.
    pub fn cut(self) {
        drop(self);
    }

    async fn next_unhurried(&mut self) -> Option<from_dispatcher::Message> {
        loop {
            match self.stream.next().await {
                Some(Ok(Message::Binary(bytes))) => {
                    let frame = v1::FromDispatcher::decode(bytes.as_ref()).expect("a protobuf frame");
                    return Some(frame.message.expect("a known message"));
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
                // Pings are answered by the library.
                Some(Ok(_)) => {}
            }
        }
    }
}

impl Running {
    /// Lets `count` further commitments through, of a gated node.
    pub fn let_commit(&self, count: usize) {
        self.gate.add_permits(count);
    }

    /// All frames received so far.
    pub fn frames(&self) -> Vec<from_dispatcher::Message> {
        self.frames.lock().expect("nobody panicked").clone()
    }

    /// Leases received so far.
    pub fn leases(&self) -> Vec<v1::Lease> {
        let lease = |frame| match frame {
            from_dispatcher::Message::Lease(lease) => Some(lease),
            _ => None,
        };
        self.frames().into_iter().filter_map(lease).collect()
    }

    /// Jobs as a referee received so far.
    pub fn referee_leases(&self) -> Vec<v1::RefereeLease> {
        let lease = |frame| match frame {
            from_dispatcher::Message::RefereeLease(lease) => Some(lease),
            _ => None,
        };
        self.frames().into_iter().filter_map(lease).collect()
    }

    /// Whether the dispatcher cancelled this slot.
    pub fn was_cancelled(&self, request: Uuid, attempt: u32) -> bool {
        self.frames().iter().any(|frame| {
            matches!(frame, from_dispatcher::Message::Cancel(c)
                if c.request_id == request.as_bytes() && c.attempt == attempt)
        })
    }

    /// Whether the dispatcher released this slot.
    pub fn was_released(&self, request: Uuid, attempt: u32) -> bool {
        self.frames().iter().any(|frame| {
            matches!(frame, from_dispatcher::Message::Released(r)
                if r.request_id == request.as_bytes() && r.attempt == attempt)
        })
    }

    /// Whether its session has ended.
    pub fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    /// Ends it without a word.
    pub fn kill(self) {
        self.task.abort();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}
