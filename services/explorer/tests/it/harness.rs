//! A running explorer on real adapters.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use infera_bus::{Bus, Envelope, Subscription, Topology};
use infera_embed::{Embedder, Exact, Index};
use infera_explorer::{Config, Deps};
use infera_protocol::bytes::Hash32;
use infera_protocol::ids::message_id;
use infera_protocol::merkle::MerkleTree;
use infera_protocol::receipt::Receipt;
use infera_runtime::CancellationToken;
use infera_testkit::evidence::{Case, Network, model};
use infera_testkit::{TempDir, cluster, embedder_path, eventually, sqlite_url_named, unique};
use infera_wire::topology::{DEAD_LETTERS, keys};
use infera_wire::{Message, v1};
use tokio::sync::oneshot;
use uuid::Uuid;

pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn embedder() -> Embedder {
    static EMBEDDER: OnceLock<Embedder> = OnceLock::new();
    EMBEDDER.get_or_init(|| Embedder::load(&embedder_path()).unwrap()).clone()
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum On {
    Embedded,
    Cluster,
}

/// What survives a restart of the explorer.
pub struct World {
    pub network: Network,
    pub bus: Bus,
    pub index: Arc<dyn Index>,
    dead: Subscription,
    dir: TempDir,
    database_url: String,
    schema: String,
}

pub struct Running {
    pub url: String,
    stop: CancellationToken,
    thread: Option<std::thread::JoinHandle<Result<(), String>>>,
}

impl World {
    pub async fn new(on: On) -> Self {
        let dir = TempDir::new().unwrap();
        let network = Network::serving(vec![
            model("synthetic", Hash32([0x11; 32])),
            model("other", Hash32([0x12; 32])),
        ]);
        network.write(dir.path());
        let (bus, database_url) = match on {
            On::Embedded => (Bus::in_process(), sqlite_url_named(&dir, "explorer")),
            On::Cluster => {
                let cluster = cluster();
                (Bus::rabbit(&cluster.amqp_url, &unique("t")).await.unwrap(), cluster.pg_url.clone())
            }
        };
        bus.declare(&Topology::network()).await.unwrap();
        let dead = bus.subscribe(DEAD_LETTERS, 64).await.unwrap();
        let index = Arc::new(Exact::open(&sqlite_url_named(&dir, "vectors"), None).await.unwrap());
        Self { network, bus, index, dead, dir, database_url, schema: unique("explorer") }
    }

    pub async fn start(&self) -> Running {
        self.start_with(|_| {}).await
    }

    pub async fn start_with(&self, change: impl FnOnce(&mut Config)) -> Running {
        let mut config = Config::load(None).unwrap();
        config.common.http_bind = "127.0.0.1:0".to_owned();
        config.common.database_url = self.database_url.clone().into();
        config.common.database_schema = Some(self.schema.clone());
        config.common.manifest_path = self.dir.path().join("network.json");
        config.max_searches = 256;
        change(&mut config);
        let (bound, address) = oneshot::channel::<SocketAddr>();
        let deps = Deps {
            embedder: Some(embedder()),
            index: Some(self.index.clone()),
            bound: Some(bound),
            ..Deps::new(self.bus.clone())
        };
        let stop = CancellationToken::new();
        let token = stop.clone();
        let thread = std::thread::spawn(move || {
            actix_rt::System::new()
                .block_on(infera_explorer::run(config, deps, token))
                .map_err(|error| error.to_string())
        });
        match address.await {
            Ok(address) => Running { url: format!("http://{address}"), stop, thread: Some(thread) },
            Err(_) => panic!("the explorer did not start: {:?}", thread.join()),
        }
    }

    pub async fn issue(&self, case: &Case) {
        self.issue_as(&case.receipt_issued(), case.request.id, 0).await;
    }

    pub async fn issue_as(&self, receipt: &v1::ReceiptIssued, id: Uuid, nth: u64) {
        self.say(keys::RECEIPT, message_id("receipt", id, nth), receipt.encode_to_vec()).await;
    }

    pub async fn anchor(&self, sequence: u64, receipts: &[Receipt]) {
        let batch = anchored(sequence, receipts);
        self.say(keys::BATCH_ANCHORED, message_id("batch", Uuid::nil(), sequence), batch.encode_to_vec())
            .await;
    }

    pub async fn say(&self, key: &str, id: Uuid, body: Vec<u8>) {
        let envelope = Envelope::new(id, key, body);
        let (bus, key) = (self.bus.clone(), key.to_owned());
        tokio::spawn(async move { bus.publish(&key, envelope).await.unwrap() });
    }

    pub async fn dead_letter(&mut self) -> (String, String) {
        let delivery =
            tokio::time::timeout(PATIENCE, self.dead.next()).await.expect("a dead letter").unwrap();
        let letter = delivery.dead_letter.clone().unwrap();
        delivery.ack().await.unwrap();
        (letter.origin_queue, letter.reason)
    }
}

pub fn anchored(sequence: u64, receipts: &[Receipt]) -> v1::BatchAnchored {
    let leaves: Vec<Hash32> = receipts.iter().map(Receipt::leaf).collect();
    v1::BatchAnchored {
        sequence,
        receipts_root: MerkleTree::new(&leaves).map_or(Hash32::ZERO, |tree| tree.root()).to_vec(),
        request_ids: receipts.iter().map(|receipt| receipt.id.as_bytes().to_vec()).collect(),
        transaction: vec![0xee; 32],
        block_number: 40 + sequence,
        anchored_at_ms: 1_790_000_005_000,
    }
}

impl Running {
    pub async fn stop(mut self) {
        self.stop.cancel();
        let thread = self.thread.take().unwrap();
        tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap().unwrap();
    }

    pub async fn get(&self, path: &str) -> (u16, serde_json::Value) {
        let (status, text) = self.text(path).await;
        let json = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}: {text}"));
        (status, json)
    }

    pub async fn text(&self, path: &str) -> (u16, String) {
        let response = reqwest::get(format!("{}{path}", self.url)).await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    /// Ids of `/v1/history` with these parameters.
    pub async fn ids(&self, query: &str) -> Vec<Uuid> {
        let (status, page) = self.get(&format!("/v1/history?{query}")).await;
        assert_eq!(status, 200, "{query}: {page}");
        page["data"].as_array().unwrap().iter().map(|r| r["id"].as_str().unwrap().parse().unwrap()).collect()
    }

    pub async fn until_receipts(&self, count: i64) {
        eventually(PATIENCE, || async { self.get("/v1/stats").await.1["receipts"] == count }).await;
    }

    pub async fn until_anchored(&self, count: i64) {
        eventually(PATIENCE, || async { self.get("/v1/stats").await.1["anchored"] == count }).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
