//! The other end of a node's session, frame by frame.

use std::path::Path;
use std::time::Duration;

use clap::Parser;
use futures::{SinkExt, StreamExt};
use infera_node::Args;
use infera_prompt::{Message as ChatMessage, Prompt};
use infera_protocol::bytes::{Address, Hash32, Signature};
use infera_protocol::identity::{Domain, MAX_BINDING_MS, hello_digest, verify};
use infera_protocol::referee::{Report, report_digest};
use infera_protocol::registry::Manifest;
use infera_protocol::request::{Output, Request};
use infera_protocol::sampling::SamplingParams;
use infera_runtime::{CancellationToken, clock};
use infera_wire::{Message as _, convert, v1};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, accept_async};
use uuid::Uuid;

use crate::model_path;

pub use v1::from_dispatcher::Message as Say;
pub use v1::from_node::Message as Heard;

/// Long enough for a loaded machine; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(60);

pub const DOMAIN: Domain = Domain { chain_id: 31_337, contract: Address([9; 20]) };

pub struct Dispatcher {
    listener: TcpListener,
    pub data: TempDir,
}

/// A node that runs in this process.
pub struct Node {
    task: JoinHandle<Result<(), infera_node::Error>>,
    pub stop: CancellationToken,
    pub pause: watch::Sender<bool>,
}

impl Node {
    pub async fn end(self) {
        self.stop.cancel();
        timeout(PATIENCE, self.task).await.expect("the node ends").unwrap().unwrap();
    }

    /// Why it ends by itself.
    pub async fn fails(self) -> infera_node::Error {
        timeout(PATIENCE, self.task).await.expect("the node ends").unwrap().unwrap_err()
    }
}

pub struct Session {
    socket: WebSocketStream<TcpStream>,
    pub hello: convert::Hello,
}

impl Dispatcher {
    pub async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let data = TempDir::new().unwrap();
        let manifest = Manifest {
            network: "test".into(),
            domain: DOMAIN,
            rpc_url: "http://127.0.0.1:1".into(),
            dispatchers: Vec::new(),
            registry_hash: Hash32([0; 32]),
        };
        std::fs::write(data.path().join("network.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
        Self { listener, data }
    }

    pub fn data(&self) -> &Path {
        self.data.path()
    }

    /// Starts a node whose keys and journal lie in this dispatcher's folder.
    pub fn node(&self, more: &[&str]) -> Node {
        let url = format!("ws://{}", self.listener.local_addr().unwrap());
        let manifest = self.data().join("network.json");
        let model = model_path();
        let data = self.data().join("node");
        let mut line = vec!["infera-node", "--class", "fast", "--dispatcher", &url];
        for (name, path) in [("--manifest", &manifest), ("--model", &model), ("--data", &data)] {
            if !more.contains(&name) {
                line.extend([name, path.to_str().unwrap()]);
            }
        }
        line.extend(more);
        let (args, stop) = (Args::parse_from(line), CancellationToken::new());
        let (pause, pauses) = watch::channel(false);
        let task = tokio::spawn(infera_node::run(args, stop.clone(), pauses));
        Node { task, stop, pause }
    }

    pub async fn accept(&self) -> WebSocketStream<TcpStream> {
        let (stream, _) = timeout(PATIENCE, self.listener.accept()).await.expect("a node connects").unwrap();
        accept_async(stream).await.unwrap()
    }

    /// A session after its handshake, with everything in the hello checked.
    pub async fn open(&self) -> Session {
        let mut session = self.greet().await;
        session.say(Say::Welcome(v1::Welcome { session: vec![1; 16], heartbeat_secs: 30 })).await;
        session
    }

    /// A session up to the hello.
    pub async fn greet(&self) -> Session {
        let mut socket = self.accept().await;
        let nonce = [7; 32];
        say(&mut socket, challenge(nonce, DOMAIN)).await;
        let Some(Heard::Hello(hello)) = hear(&mut socket).await else { panic!("no hello") };
        let hello = convert::hello(&hello).unwrap();
        let claims = &hello.claims;
        verify(&claims.node, &hello_digest(&DOMAIN, &nonce, claims), &hello.signature).unwrap();
        claims.binding.verify(&DOMAIN, &claims.operator, &hello.binding_signature, clock::now_ms()).unwrap();
        assert!(claims.binding.expiry_ms <= clock::now_ms() + MAX_BINDING_MS, "as long as it is accepted");
        Session { socket, hello }
    }
}

pub fn challenge(nonce: [u8; 32], domain: Domain) -> Say {
    Say::Challenge(v1::Challenge {
        nonce: nonce.to_vec(),
        session: Uuid::now_v7().as_bytes().to_vec(),
        chain_id: domain.chain_id,
        contract: domain.contract.to_vec(),
    })
}

pub async fn say(socket: &mut WebSocketStream<TcpStream>, message: Say) {
    let frame = v1::FromDispatcher { message: Some(message) };
    socket.send(Message::binary(frame.encode_to_vec())).await.unwrap();
}

/// The next frame of the node; None once the connection is closed.
pub async fn hear(socket: &mut WebSocketStream<TcpStream>) -> Option<Heard> {
    loop {
        match timeout(PATIENCE, socket.next()).await.expect("the node says something") {
            Some(Ok(Message::Binary(bytes))) => {
                return Some(v1::FromNode::decode(bytes.as_ref()).unwrap().message.unwrap());
            }
            Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
            Some(Ok(_)) => {}
        }
    }
}

impl Session {
    pub async fn say(&mut self, message: Say) {
        say(&mut self.socket, message).await;
    }

    pub async fn bytes(&mut self, bytes: &'static [u8]) {
        self.socket.send(Message::binary(bytes)).await.unwrap();
    }

    pub async fn hear(&mut self) -> Heard {
        hear(&mut self.socket).await.expect("the session is open")
    }

    pub async fn closed(&mut self) -> bool {
        hear(&mut self.socket).await.is_none()
    }

    pub async fn lease(&mut self, request: &Request, attempt: u32) {
        self.lease_until(request, attempt, clock::now_ms() + 120_000).await;
    }

    pub async fn lease_until(&mut self, request: &Request, attempt: u32, commit_deadline_ms: i64) {
        let lease = v1::Lease {
            request: Some(convert::request_to_wire(request)),
            attempt,
            commit_deadline_ms,
            stream: true,
            traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into(),
        };
        self.say(Say::Lease(lease)).await;
    }

    /// Deltas up to the commitment: the tokens and the commitment.
    pub async fn committed(&mut self) -> (Vec<u32>, v1::Commit) {
        let mut tokens: Vec<u32> = Vec::new();
        loop {
            match self.hear().await {
                Heard::Deltas(deltas) => {
                    assert_eq!(deltas.offset as usize, tokens.len(), "deltas have no gaps");
                    tokens.extend(deltas.tokens);
                }
                Heard::Commit(commit) => return (tokens, commit),
                other => panic!("unexpected {other:?}"),
            }
        }
    }

    pub async fn revealed(&mut self, request: &Request, attempt: u32) -> v1::Reveal {
        self.say(Say::RevealRequest(v1::RevealRequest {
            request_id: request.id.as_bytes().to_vec(),
            attempt,
            reveal_deadline_ms: clock::now_ms() + 10_000,
        }))
        .await;
        match self.hear().await {
            Heard::Reveal(reveal) => reveal,
            other => panic!("unexpected {other:?}"),
        }
    }

    /// Asks for scores of answers.
    pub async fn referee(&mut self, request: &Request, attempt: u32, subjects: &[(Vec<u32>, v1::Finish)]) {
        let subject = |(tokens, finish): &(Vec<u32>, v1::Finish)| v1::Subject {
            tokens: tokens.clone(),
            finish: (*finish).into(),
        };
        let lease = v1::RefereeLease {
            request: Some(convert::request_to_wire(request)),
            attempt,
            subjects: subjects.iter().map(subject).collect(),
            deadline_ms: clock::now_ms() + 120_000,
            traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into(),
        };
        self.say(Say::RefereeLease(lease)).await;
    }

    /// The scores of these answers, with their signatures checked.
    pub async fn scored(
        &mut self,
        request: &Request,
        attempt: u32,
        subjects: &[(Vec<u32>, v1::Finish)],
    ) -> Vec<Report> {
        self.referee(request, attempt, subjects).await;
        let report = loop {
            match self.hear().await {
                Heard::RefereeReport(report) => break report,
                Heard::Deltas(_) => {}
                other => panic!("unexpected {other:?}"),
            }
        };
        self.check_report(request, &report, subjects)
    }

    pub fn check_report(
        &self,
        request: &Request,
        report: &v1::RefereeReport,
        subjects: &[(Vec<u32>, v1::Finish)],
    ) -> Vec<Report> {
        assert_eq!(report.request_id, request.id.as_bytes());
        assert_eq!(report.reports.len(), subjects.len());
        let node = self.hello.claims.node;
        let one = |(report, (tokens, finish)): (&v1::SubjectReport, &(Vec<u32>, v1::Finish)), attempt| {
            let finish = convert::finish("finish", (*finish).into()).unwrap();
            let subject = Output { tokens: tokens.clone(), fingerprints: Vec::new(), finish }.hash();
            let digest =
                report_digest(&DOMAIN, &request.hash(&DOMAIN), attempt, &node, &subject, &report.scores);
            verify(&node, &digest, &Signature::try_from(report.signature.as_slice()).unwrap()).unwrap();
            let scores = Report::decode(&report.scores).unwrap();
            assert_eq!(scores.scores.len(), tokens.len());
            scores
        };
        report.reports.iter().zip(subjects).map(|pair| one(pair, report.attempt)).collect()
    }

    pub async fn declined(&mut self) -> v1::Decline {
        loop {
            match self.hear().await {
                Heard::Decline(decline) => return decline,
                Heard::Deltas(_) => {}
                other => panic!("unexpected {other:?}"),
            }
        }
    }
}

/// A request for this model.
pub fn request(text: &str, max_tokens: u32) -> Request {
    let prompt = Prompt::load(&model_path()).unwrap();
    Request {
        id: Uuid::now_v7(),
        model_root: infera_node::measure(&model_path()).unwrap().0,
        prompt: prompt.render(&[ChatMessage::new("user", text)]).unwrap(),
        sampling: SamplingParams::greedy(),
        max_tokens,
        stop: Vec::new(),
        seed: 1,
        grammar: None,
    }
}
