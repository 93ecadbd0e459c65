//! How a synthetic node plays its session.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use infera_protocol::bytes::Hash32;
use infera_protocol::request::Output;
use infera_wire::convert;
use infera_wire::v1::{self, from_dispatcher, from_node};
use tokio::sync::Semaphore;
use uuid::Uuid;

use super::{Behaviour, Socket, SyntheticNode, answer};
use crate::evidence::output;

/// Answers of all nodes of this process that share, by request and attempt.
static SHARED: LazyLock<Mutex<HashMap<(Uuid, u32), Output>>> = LazyLock::new(Mutex::default);

/// A lease that was committed to.
pub(super) struct Committed {
    lease: v1::Lease,
    output: Output,
    salt: Hash32,
}

pub(super) struct Player {
    pub node: SyntheticNode,
    pub behaviour: Behaviour,
    pub socket: Socket,
    pub frames: Arc<Mutex<Vec<from_dispatcher::Message>>>,
    pub gate: Arc<Semaphore>,
    pub leases: Vec<Committed>,
}

impl Player {
    pub async fn play(mut self) {
        let (ready, mut leases) = tokio::sync::mpsc::unbounded_channel();
        loop {
            tokio::select! {
                frame = self.socket.next_unhurried() => {
                    let Some(frame) = frame else { return };
                    self.frames.lock().expect("nobody panicked").push(frame.clone());
                    match frame {
                        from_dispatcher::Message::Lease(_) if self.behaviour == Behaviour::Vanish => return,
                        from_dispatcher::Message::Lease(lease) => {
                            let (gate, ready) = (self.gate.clone(), ready.clone());
                            tokio::spawn(async move {
                                gate.acquire().await.expect("the gate stays open").forget();
                                let _ = ready.send(lease);
                            });
                        }
                        from_dispatcher::Message::RevealRequest(asked) => self.reveal(&asked).await,
                        from_dispatcher::Message::RangeChallenge(challenge) => {
                            let proof = self.node.prove(&challenge);
                            self.socket.send(from_node::Message::RangeProof(proof)).await;
                        }
                        from_dispatcher::Message::RefereeLease(lease) if self.behaviour != Behaviour::Silent => {
                            let report = self.node.report(&lease);
                            self.socket.send(from_node::Message::RefereeReport(report)).await;
                        }
                        _ => {}
                    }
                }
                Some(lease) = leases.recv() => self.answer(lease).await,
            }
        }
    }

    async fn answer(&mut self, lease: v1::Lease) {
        let request = convert::request(lease.request.as_ref().expect("a request")).expect("a valid request");
        let honest = answer(&request);
        match self.behaviour {
            Behaviour::Silent | Behaviour::Vanish => return,
            Behaviour::Decline => {
                let decline = self.node.decline(&lease, "full");
                return self.socket.send(from_node::Message::Decline(decline)).await;
            }
            _ => {}
        }
        let output = match self.behaviour {
            Behaviour::Garbage => self.garbage(&honest),
            Behaviour::Share => {
                let mut shared = SHARED.lock().expect("nobody panicked");
                shared.entry((request.id, lease.attempt)).or_insert(honest).clone()
            }
            _ => honest,
        };
        if lease.stream {
            for (offset, token) in (0..).zip(&output.tokens) {
                self.socket
                    .send(from_node::Message::Deltas(v1::Deltas {
                        request_id: request.id.as_bytes().to_vec(),
                        attempt: lease.attempt,
                        offset,
                        tokens: vec![*token],
                    }))
                    .await;
            }
        }
        let (commit, salt) = self.node.commit(&lease, &output);
        self.socket.send(from_node::Message::Commit(commit)).await;
        if self.behaviour == Behaviour::Equivocate {
            let (second, _) = self.node.commit(&lease, &self.garbage(&output));
            self.socket.send(from_node::Message::Commit(second)).await;
        }
        self.leases.push(Committed { lease, output, salt });
    }

    /// An answer that no other node gives.
    fn garbage(&self, honest: &Output) -> Output {
        let mut tokens = honest.tokens.clone();
        tokens[0] = u32::from(self.node.id().0[0]) + 1_000;
        output(&tokens, honest.finish)
    }

    async fn reveal(&mut self, asked: &v1::RevealRequest) {
        let found = self.leases.iter().find(|c| {
            let request = c.lease.request.as_ref().expect("a request");
            request.id == asked.request_id && c.lease.attempt == asked.attempt
        });
        let Some(Committed { lease, output, salt }) = found else { return };
        let reveal = match self.behaviour {
            Behaviour::NoReveal => return,
            Behaviour::Mismatch => self.node.reveal(lease, &self.garbage(output), salt),
            _ => self.node.reveal(lease, output, salt),
        };
        self.socket.send(from_node::Message::Reveal(reveal)).await;
    }
}
