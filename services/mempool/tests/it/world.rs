//! A running mempool, and what is said to it and heard from it.

use std::net::SocketAddr;
use std::time::Duration;

use infera_bus::{Bus, Envelope, Subscription, Topology};
use infera_mempool::{Config, Deps};
use infera_protocol::bytes::Hash32;
use infera_protocol::ids::message_id;
use infera_protocol::request::Request;
use infera_protocol::sampling::SamplingParams;
use infera_runtime::{CancellationToken, clock};
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
pub const MODEL: Hash32 = Hash32([0x11; 32]);

/// Which adapters a test runs on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum On {
    Embedded,
    Cluster,
}

/// What survives a restart of the mempool.
pub struct World {
    pub bus: Bus,
    pub dir: TempDir,
    pub prefix: String,
    pub schema: String,
    database_url: String,
    offers: Subscription,
    closes: Subscription,
    dead: Subscription,
}

/// The mempool while it runs; on a thread of its own, as in the embedded network.
pub struct Running {
    pub address: SocketAddr,
    stop: CancellationToken,
    thread: Option<std::thread::JoinHandle<Result<(), String>>>,
}

impl World {
    pub async fn new(on: On) -> Self {
        let dir = TempDir::new().unwrap();
        let prefix = unique("t");
        let (bus, database_url) = match on {
            On::Embedded => (Bus::in_process(), sqlite_url(&dir)),
            On::Cluster => {
                let cluster = cluster();
                (Bus::rabbit(&cluster.amqp_url, &prefix).await.unwrap(), cluster.pg_url.clone())
            }
        };
        bus.declare(&Topology::network()).await.unwrap();
        let offers = bus.subscribe(queues::DISPATCHER_OFFERED, 256).await.unwrap();
        let closes = bus.subscribe(queues::VERIFIER_CLOSE, 256).await.unwrap();
        let dead = bus.subscribe(DEAD_LETTERS, 64).await.unwrap();
        // On the in-process bus a verdict is confirmed when every queue has acked it.
        for queue in [queues::SETTLEMENT_VERDICT, queues::GATEWAY_VERDICT, queues::DISPATCHER_CONDUCT] {
            let mut other = bus.subscribe(queue, 64).await.unwrap();
            tokio::spawn(async move {
                while let Some(delivery) = other.next().await {
                    let _ = delivery.ack().await;
                }
            });
        }
        let schema = unique("mempool");
        Self { bus, dir, prefix, schema, database_url, offers, closes, dead }
    }

    pub fn config(&self) -> Config {
        let mut config = Config::load(None).unwrap();
        config.common.http_bind = "127.0.0.1:0".to_owned();
        config.common.database_url = self.database_url.clone().into();
        config.common.database_schema = Some(self.schema.clone());
        config
    }

    pub async fn start(&self) -> Running {
        let (bound, address) = oneshot::channel();
        let (config, deps) = (self.config(), Deps { bus: self.bus.clone(), bound: Some(bound) });
        let stop = CancellationToken::new();
        let token = stop.clone();
        let thread = std::thread::spawn(move || {
            let run = infera_mempool::run(config, deps, token);
            actix_rt::System::new().block_on(run).map_err(|error| error.to_string())
        });
        match address.await {
            Ok(address) => Running { address, stop, thread: Some(thread) },
            Err(_) => panic!("the mempool did not start: {:?}", thread.join()),
        }
    }

    /// Publishes until it is confirmed: in process, until the mempool has acked it.
    pub async fn publish(&self, key: &str, id: Uuid, message: &impl Message) {
        let envelope = Envelope::new(id, key, message.encode_to_vec());
        self.bus.publish(key, envelope).await.unwrap();
    }

    pub async fn fund(&self, funded: &Funded) {
        let id = message_id(keys::REQUEST_FUNDED, funded.submitted.request.id, 1);
        self.publish(keys::REQUEST_FUNDED, id, &funded_to_wire(funded)).await;
    }

    pub async fn cancel(&self, request: Uuid, account: &str) {
        let cancel =
            v1::CancelRequested { request_id: request.as_bytes().to_vec(), account: account.to_owned() };
        self.publish(keys::CANCEL_REQUESTED, Uuid::now_v7(), &cancel).await;
    }

    pub async fn verdict(&self, request: Uuid, outcome: Outcome) {
        let verdict = v1::Verdict {
            request_id: request.as_bytes().to_vec(),
            reply_to: "gw-1".to_owned(),
            attempt: 1,
            round: 1,
            account: "alice".to_owned(),
            decided_at_ms: clock::now_ms(),
            outcome: Some(outcome),
            conduct: Vec::new(),
            overturned: false,
        };
        self.publish(&keys::verdict("gw-1"), Uuid::now_v7(), &verdict).await;
    }

    /// A closing verdict.
    pub async fn close(&self, request: Uuid) {
        let failed = v1::Failed { code: "no_quorum".to_owned(), reason: "a test".to_owned() };
        self.verdict(request, Outcome::Failed(failed)).await;
    }

    /// What a dispatcher with five operators says about its slots, until the handle is aborted.
    pub fn report(&self, free: u32, held: &[Uuid]) -> JoinHandle<()> {
        let bus = self.bus.clone();
        let held: Vec<Vec<u8>> = held.iter().map(|id| id.as_bytes().to_vec()).collect();
        tokio::spawn(async move {
            loop {
                let now = clock::now_ms();
                let report = v1::SlotsReport {
                    replica: "d-1".to_owned(),
                    reported_at_ms: now,
                    expires_at_ms: now + 5_000,
                    models: vec![v1::ModelSlots {
                        model_root: MODEL.to_vec(),
                        operators: 5,
                        free,
                        total: 64,
                        offers_held: held.clone(),
                    }],
                };
                let envelope = Envelope::new(Uuid::now_v7(), keys::SLOTS, report.encode_to_vec());
                bus.publish_transient(keys::SLOTS, envelope);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        })
    }

    /// The next offer, acked at once: what a dispatcher holds is up to the reports.
    pub async fn offered(&mut self) -> (Uuid, v1::RequestOffered) {
        let delivery = tokio::time::timeout(PATIENCE, self.offers.next()).await;
        let delivery = delivery.expect("a request is offered").unwrap();
        let id = delivery.envelope.id;
        let offered = v1::RequestOffered::decode(delivery.envelope.body.as_ref()).unwrap();
        delivery.ack().await.unwrap();
        let request = convert::funded(offered.funded.as_ref().unwrap()).unwrap().submitted.request.id;
        assert_eq!(id, message_id(keys::REQUEST_OFFERED, request, u64::from(offered.offer)));
        (request, offered)
    }

    /// The next message that asks for a close: the request and the reason.
    pub async fn close_asked(&mut self) -> (Uuid, String) {
        let delivery = tokio::time::timeout(PATIENCE, self.closes.next()).await;
        let delivery = delivery.expect("a close is asked for").unwrap();
        let close = v1::CloseRequested::decode(delivery.envelope.body.as_ref()).unwrap();
        delivery.ack().await.unwrap();
        let submitted = convert::submitted(close.submitted.as_ref().unwrap()).unwrap();
        (submitted.request.id, close.reason)
    }

    /// The queue and the reason of the next dead letter.
    pub async fn dead_letter(&mut self) -> (String, String) {
        let delivery = tokio::time::timeout(PATIENCE, self.dead.next()).await;
        let delivery = delivery.expect("a dead letter").unwrap();
        let dead = delivery.dead_letter.clone().unwrap();
        delivery.ack().await.unwrap();
        (dead.origin_queue, dead.reason)
    }
}

impl Running {
    pub async fn get(&self, path: &str) -> String {
        let response = reqwest::get(format!("http://{}{path}", self.address)).await.unwrap();
        response.text().await.unwrap()
    }

    /// `GET /v1/mempool`.
    pub async fn mempool(&self) -> serde_json::Value {
        serde_json::from_str(&self.get("/v1/mempool").await).unwrap()
    }

    pub async fn depth(&self) -> u64 {
        self.mempool().await["depth"].as_u64().unwrap()
    }

    /// Ends it as a signal would.
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

/// A request of `account` with a minute to go.
pub fn funded(account: &str) -> Funded {
    let now = clock::now_ms();
    Funded {
        submitted: Submitted {
            request: Request {
                id: Uuid::now_v7(),
                model_root: MODEL,
                prompt: vec![1, 2, 3],
                sampling: SamplingParams::default(),
                max_tokens: 16,
                stop: vec![],
                seed: 7,
                grammar: None,
            },
            account: account.to_owned(),
            model: "synthetic".to_owned(),
            k: 3,
            reply_to: "gw-1".to_owned(),
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

/// The id of a funded request.
pub fn id(funded: &Funded) -> Uuid {
    funded.submitted.request.id
}
