//! A running dispatcher, and what is said to it and heard from it.

use std::net::SocketAddr;
use std::time::Duration;

use infera_bus::{Bus, Envelope, Subscription, Topology};
use infera_dispatcher::domain::trust::Ledger;
use infera_dispatcher::{Config, Deps};
use infera_protocol::assignment::{Eligible, assign_message, beta, draw, eligible_root, epoch_of, freeze};
use infera_protocol::bytes::{Hash32, NodeId};
use infera_protocol::evidence::{Evidence, SlotOutcome, Terms};
use infera_protocol::ids::message_id;
use infera_protocol::request::Request;
use infera_protocol::sampling::SamplingParams;
use infera_runtime::kv::Kv;
use infera_runtime::{CancellationToken, clock};
use infera_testkit::evidence::{DISPATCHER_SEED, Network};
use infera_testkit::synthetic::SyntheticNode;
use infera_testkit::{TempDir, cluster, sqlite_url, unique};
use infera_wire::convert::{Funded, Submitted, funded_to_wire};
use infera_wire::topology::{DEAD_LETTERS, keys, queues};
use infera_wire::v1::{self, verdict::Outcome};
use infera_wire::{Message, convert};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use uuid::Uuid;

/// Long enough for a loaded machine; only a failing test waits for it.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// The gateway replica that waits for every request.
pub const GATEWAY: &str = "gw-1";

/// Which adapters a test runs on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum On {
    Embedded,
    Cluster,
}

/// What survives a restart of the dispatcher.
pub struct World {
    pub network: Network,
    pub bus: Bus,
    pub kv: Kv,
    pub dir: TempDir,
    pub prefix: String,
    pub database_url: String,
    pub schema: String,
    collected: Subscription,
    closes: Subscription,
    dead: Subscription,
}

/// The dispatcher while it runs; on a thread of its own, as in the embedded network.
pub struct Running {
    pub address: SocketAddr,
    stop: CancellationToken,
    thread: Option<std::thread::JoinHandle<Result<(), String>>>,
}

/// A request that was offered. `published` resolves in process once the offer is acked.
pub struct Offered {
    pub id: Uuid,
    pub published: JoinHandle<()>,
}

impl World {
    pub async fn new(on: On) -> Self {
        let dir = TempDir::new().unwrap();
        let network = Network::new();
        network.write(dir.path());
        let key = format!("{}\n", Hash32(DISPATCHER_SEED));
        let path = dir.path().join("dispatcher.key");
        std::fs::write(&path, key).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&path, mode).unwrap();
        let prefix = unique("t");
        let (bus, kv, database_url) = match on {
            On::Embedded => (Bus::in_process(), Kv::memory(), sqlite_url(&dir)),
            On::Cluster => {
                let cluster = cluster();
                let bus = Bus::rabbit(&cluster.amqp_url, &prefix).await.unwrap();
                (bus, Kv::redis(&cluster.redis_url).await.unwrap(), cluster.pg_url.clone())
            }
        };
        bus.declare(&Topology::network()).await.unwrap();
        let collected = bus.subscribe(queues::VERIFIER_COLLECTED, 64).await.unwrap();
        let closes = bus.subscribe(queues::VERIFIER_CLOSE, 64).await.unwrap();
        let dead = bus.subscribe(DEAD_LETTERS, 64).await.unwrap();
        let schema = unique("dispatcher");
        Self { network, bus, kv, dir, prefix, database_url, schema, collected, closes, dead }
    }

    /// Short times, so that what is to expire does.
    pub fn config(&self) -> Config {
        let mut config = Config::load(None).unwrap();
        config.common.http_bind = "127.0.0.1:0".to_owned();
        config.common.database_url = self.database_url.clone().into();
        config.common.database_schema = Some(self.schema.clone());
        config.common.manifest_path = self.dir.path().join("network.json");
        config.common.registry_path = self.dir.path().join("models.json");
        config.key_path = self.dir.path().join("dispatcher.key");
        config
    }

    pub async fn start(&self, config: Config) -> Running {
        let (bound, address) = oneshot::channel();
        let deps = Deps { bus: self.bus.clone(), kv: self.kv.clone(), bound: Some(bound) };
        let stop = CancellationToken::new();
        let token = stop.clone();
        let thread = std::thread::spawn(move || {
            let run = infera_dispatcher::run(config, deps, token);
            actix_rt::System::new().block_on(run).map_err(|error| error.to_string())
        });
        match address.await {
            Ok(address) => Running { address, stop, thread: Some(thread) },
            Err(_) => panic!("the dispatcher did not start: {:?}", thread.join()),
        }
    }

    /// A request for `k` replicas with a minute to go.
    pub fn funded(&self, id: Uuid, k: u32) -> Funded {
        let now = clock::now_ms();
        Funded {
            submitted: Submitted {
                request: Request {
                    id,
                    model_root: self.network.registry.models[0].weights_root,
                    prompt: vec![1, 2, 3],
                    sampling: SamplingParams::default(),
                    max_tokens: 16,
                    stop: vec![],
                    seed: 7,
                    grammar: None,
                },
                account: "alice".to_owned(),
                model: self.network.registry.models[0].id.clone(),
                k,
                reply_to: GATEWAY.to_owned(),
                stream: false,
                submitted_at_ms: now,
                deadline_ms: now + 60_000,
                salt: Hash32([5; 32]),
                bid_micro: 0,
            },
            held_micro: 1_000,
            price_micro: 2,
            funded_at_ms: now,
        }
    }

    pub fn offer(&self, funded: &Funded) -> Offered {
        let id = funded.submitted.request.id;
        let offered = v1::RequestOffered {
            funded: Some(funded_to_wire(funded)),
            offer: 1,
            offered_at_ms: clock::now_ms(),
        };
        let mut envelope = Envelope::new(
            message_id(keys::REQUEST_OFFERED, id, 1),
            keys::REQUEST_OFFERED,
            offered.encode_to_vec(),
        );
        envelope.traceparent = Some(traceparent(id));
        let bus = self.bus.clone();
        let published = tokio::spawn(async move {
            bus.publish(keys::REQUEST_OFFERED, envelope).await.unwrap();
        });
        Offered { id, published }
    }

    /// A request whose first attempt draws these nodes in this order first, whichever of the next
    /// epochs it begins in.
    pub fn drawing(&self, nodes: &[SyntheticNode], first: &[NodeId]) -> Funded {
        // Everybody is new.
        let ledger = Ledger::default();
        let set = freeze(
            nodes
                .iter()
                .map(|n| Eligible {
                    node: n.id(),
                    operator: n.operator(),
                    class: n.class.clone(),
                    weight: ledger.weight(&n.operator(), n.slots),
                    audit_ppm: ledger.audit_ppm(&n.operator()),
                    trusted: ledger.is_trusted(&n.operator()),
                })
                .collect(),
        );
        let domain = self.network.manifest.domain;
        let root = eligible_root(&set);
        loop {
            let funded = self.funded(Uuid::now_v7(), 3);
            let request = &funded.submitted.request;
            let hash = request.hash(&domain);
            let epoch = epoch_of(clock::now_ms());
            let fits = (epoch..epoch + 3).all(|epoch| {
                let message = assign_message(&domain, request.id, &hash, 3, 1, epoch, &root);
                let drawn = draw(&beta(&self.network.dispatcher.prove(&message)), &set);
                first.iter().zip(&drawn).all(|(wanted, drawn)| *wanted == drawn.node)
            });
            if fits {
                return funded;
            }
        }
    }

    /// The next results; acked, and checked as a verifier would.
    pub async fn collected(&mut self) -> (v1::ResultsCollected, Evidence) {
        let delivery = tokio::time::timeout(PATIENCE, self.collected.next()).await;
        let delivery = delivery.expect("results are collected").unwrap();
        let collected = v1::ResultsCollected::decode(delivery.envelope.body.as_ref()).unwrap();
        delivery.ack().await.unwrap();
        let domain = self.network.manifest.domain;
        let model = &self.network.registry.models[0];
        let terms = Terms::of(&self.network.registry, model);
        let evidence = convert::evidence(&collected, domain, terms, clock::now_ms()).unwrap();
        evidence.check_assignment().unwrap();
        evidence.check_post().unwrap();
        evidence.check_slots().unwrap();
        evidence.check_referees().unwrap();
        (collected, evidence)
    }

    /// The next message that asks for a close.
    pub async fn close_asked(&mut self) -> v1::CloseRequested {
        let delivery = tokio::time::timeout(PATIENCE, self.closes.next()).await;
        let delivery = delivery.expect("a close is asked for").unwrap();
        let close = v1::CloseRequested::decode(delivery.envelope.body.as_ref()).unwrap();
        delivery.ack().await.unwrap();
        close
    }

    /// The queue and the reason of the next dead letter.
    pub async fn dead_letter(&mut self) -> (String, String) {
        let delivery = tokio::time::timeout(PATIENCE, self.dead.next()).await;
        let delivery = delivery.expect("a dead letter").unwrap();
        let dead = delivery.dead_letter.clone().unwrap();
        delivery.ack().await.unwrap();
        (dead.origin_queue, dead.reason)
    }

    /// Writes manifest and registry anew.
    pub fn write_network(&mut self) {
        self.network.manifest.registry_hash = self.network.registry.hash().unwrap();
        self.network.write(self.dir.path());
    }

    /// A closing verdict with this conduct, through the durable queue.
    pub async fn close_with(&self, offered: &Offered, id: Uuid, conduct: Vec<v1::Conduct>) {
        let failed = v1::Failed { code: "no_quorum".to_owned(), reason: "a test".to_owned() };
        let verdict = v1::Verdict {
            request_id: offered.id.as_bytes().to_vec(),
            reply_to: GATEWAY.to_owned(),
            attempt: 1,
            round: 2,
            account: "alice".to_owned(),
            decided_at_ms: clock::now_ms(),
            outcome: Some(Outcome::Failed(failed)),
            conduct,
            overturned: false,
        };
        let envelope = Envelope::new(id, "verdict", verdict.encode_to_vec());
        self.bus.publish(&keys::direct(queues::DISPATCHER_CONDUCT), envelope).await.unwrap();
        self.fail(offered.id);
    }

    /// Says a verdict to whoever listens.
    pub fn verdict(&self, request: Uuid, attempt: u32, round: u32, outcome: Outcome) {
        let verdict = v1::Verdict {
            request_id: request.as_bytes().to_vec(),
            reply_to: GATEWAY.to_owned(),
            attempt,
            round,
            account: "alice".to_owned(),
            decided_at_ms: clock::now_ms(),
            outcome: Some(outcome),
            conduct: Vec::new(),
            overturned: false,
        };
        let envelope = Envelope::new(Uuid::now_v7(), "verdict", verdict.encode_to_vec());
        self.bus.publish_transient(&keys::verdict(GATEWAY), envelope);
    }

    pub fn fail(&self, request: Uuid) {
        let failed = v1::Failed { code: "no_quorum".to_owned(), reason: "a test".to_owned() };
        self.verdict(request, 1, 1, Outcome::Failed(failed));
    }

    /// One series of `/metrics`; 0 while it has no value.
    pub async fn metric(&self, running: &Running, series: &str) -> f64 {
        let text = running.get("/metrics").await;
        let line = text.lines().find_map(|line| line.strip_prefix(series));
        line.map_or(0.0, |value| value.trim().parse().unwrap())
    }
}

impl Running {
    pub async fn get(&self, path: &str) -> String {
        let response = reqwest::get(format!("http://{}{path}", self.address)).await.unwrap();
        response.text().await.unwrap()
    }

    /// Ends it as a signal would; what it holds is delivered again.
    pub async fn stop(mut self) {
        self.stop.cancel();
        let thread = self.thread.take().unwrap();
        tokio::task::spawn_blocking(move || thread.join().unwrap().unwrap()).await.unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Nodes 1 to `count`.
pub fn nodes(world: &World, count: u8) -> Vec<SyntheticNode> {
    (1..=count).map(|n| SyntheticNode::new(&world.network, n)).collect()
}

/// How the slots ended, in the order of the draw.
pub fn outcomes(evidence: &Evidence) -> Vec<SlotOutcome> {
    evidence.slots.iter().map(|slot| slot.outcome).collect()
}

/// A trace context whose trace id is the request's id.
pub fn traceparent(request: Uuid) -> String {
    format!("00-{}-00f067aa0ba902b7-01", request.simple())
}
