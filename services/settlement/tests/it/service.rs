//! The running service between a bus, a database and a client.

use std::{path::Path, sync::Mutex, thread::JoinHandle, time::Duration};

use infera_bus::{Bus, Envelope, Subscription, Topology};
use infera_runtime::{
    CancellationToken,
    config::Secret,
    jwt::{Claims, Signer},
};
use infera_settlement::{
    Config, Deps, Error,
    config::{AUDIENCE, Credit},
};
use infera_testkit::{TempDir, cluster, eventually, sqlite_url, unique};
use infera_wire::topology::kind;
use uuid::Uuid;

use crate::network::{Network, submitted_bytes, verdict_bytes};

pub const DEADLINE: Duration = Duration::from_secs(60);

/// The two columns of the plan's table of ports.
#[derive(Clone, Copy)]
pub enum Column {
    Embedded,
    Cluster,
}

/// A place to run the service in: its bus, database, keys and files.
pub struct Place {
    pub network: Network,
    pub bus: Bus,
    pub config: Config,
    signer: Signer,
    pub dir: TempDir,
}

impl Place {
    pub async fn new(column: Column, network: Network) -> Self {
        let dir = TempDir::new().unwrap();
        let mut config = Config::load(None).unwrap();
        let bus = match column {
            Column::Embedded => {
                config.common.database_url = Secret::new(sqlite_url(&dir));
                Bus::in_process()
            }
            Column::Cluster => {
                let cluster = cluster();
                config.common.database_url = Secret::new(cluster.pg_url.clone());
                config.common.database_schema = Some(unique("settlement"));
                Bus::rabbit(&cluster.amqp_url, &unique("settlement")).await.unwrap()
            }
        };
        bus.declare(&Topology::network()).await.unwrap();
        let signer = Signer::load_or_create(&dir.path().join("key.pem")).unwrap();
        config.common.jwks_path = dir.path().join("jwks.json");
        signer.write_jwks(&config.common.jwks_path).unwrap();
        config.common.http_bind = "127.0.0.1:0".into();
        config.common.manifest_path = dir.path().join("manifest.json");
        config.common.registry_path = dir.path().join("registry.json");
        config.prepaid_credits = vec![credit("alice", 10_000), credit("bob", 500)];
        let place = Self { network, bus, config, signer, dir };
        place.write_network();
        place
    }

    fn write_network(&self) {
        let write = |path: &Path, value: &dyn erased::Json| std::fs::write(path, value.json()).unwrap();
        write(&self.config.common.manifest_path, &self.network.manifest);
        write(&self.config.common.registry_path, &self.network.registry);
    }

    pub fn key(&self, account: &str) -> String {
        self.key_for(account, &["chat", "receipts"])
    }

    pub fn key_for(&self, account: &str, scopes: &[&str]) -> String {
        self.signer.issue(&Claims::new(account, AUDIENCE, scopes, 600)).unwrap()
    }

    pub async fn start(&self) -> Service {
        Service::start(self.config.clone(), self.bus.clone()).await
    }

    /// Publishes without waiting: in process the confirm comes with the last consumer's ack.
    pub fn publish(&self, key: &str, id: Uuid, body: Vec<u8>) {
        let envelope = Envelope::new(id, kind(key), body);
        let (bus, key) = (self.bus.clone(), key.to_owned());
        tokio::spawn(async move { bus.publish(&key, envelope).await });
    }

    pub fn submit(&self, submitted: &infera_wire::convert::Submitted) {
        let (id, body) = submitted_bytes(submitted);
        self.publish("request.submitted", id, body);
    }

    pub fn decide(&self, verdict: &infera_wire::v1::Verdict) {
        let (id, body) = verdict_bytes(verdict);
        self.publish("verdict.gw-1", id, body);
    }

    pub async fn listen(&self, queue: &str) -> Listener {
        Listener(self.bus.subscribe(queue, 64).await.unwrap())
    }
}

mod erased {
    pub trait Json {
        fn json(&self) -> Vec<u8>;
    }
    impl<T: serde::Serialize> Json for T {
        fn json(&self) -> Vec<u8> {
            serde_json::to_vec(self).unwrap()
        }
    }
}

pub fn credit(account: &str, amount_micro: u64) -> Credit {
    Credit { id: format!("welcome-{account}"), account: account.into(), amount_micro }
}

/// Takes messages from a queue that another service would consume.
pub struct Listener(Subscription);

impl Listener {
    pub async fn next<M: prost::Message + Default>(&mut self) -> M {
        let delivery = tokio::time::timeout(DEADLINE, self.0.next()).await.expect("a message").unwrap();
        let message = M::decode(delivery.envelope.body.clone()).unwrap();
        delivery.ack().await.unwrap();
        message
    }

    /// The reason of the next dead letter.
    pub async fn dead(&mut self) -> String {
        let delivery = tokio::time::timeout(DEADLINE, self.0.next()).await.expect("a dead letter").unwrap();
        let reason = delivery.dead_letter.clone().unwrap().reason;
        delivery.ack().await.unwrap();
        reason
    }
}

/// The service on a thread of its own.
pub struct Service {
    pub url: String,
    stop: CancellationToken,
    thread: Mutex<Option<JoinHandle<Result<(), Error>>>>,
    http: reqwest::Client,
}

impl Service {
    pub async fn start(config: Config, bus: Bus) -> Self {
        let stop = CancellationToken::new();
        let (bound, address) = tokio::sync::oneshot::channel();
        let token = stop.clone();
        let thread = std::thread::spawn(move || {
            let deps = Deps { bus, bound: Some(bound) };
            actix_rt::System::new().block_on(infera_settlement::run(config, deps, token))
        });
        let address = match tokio::time::timeout(DEADLINE, address).await.expect("the service starts") {
            Ok(address) => address,
            Err(_) => panic!("the service ended: {:?}", thread.join().unwrap()),
        };
        let (url, http) = (format!("http://{address}"), reqwest::Client::new());
        Self { url, stop, thread: Mutex::new(Some(thread)), http }
    }

    pub async fn stop(self) {
        self.stop.cancel();
        let thread = self.thread.lock().unwrap().take().unwrap();
        tokio::task::spawn_blocking(|| thread.join().unwrap().unwrap()).await.unwrap();
    }

    pub async fn get(&self, path: &str, key: Option<&str>) -> (u16, Vec<u8>) {
        let mut request = self.http.get(format!("{}{path}", self.url));
        if let Some(key) = key {
            request = request.bearer_auth(key);
        }
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.bytes().await.unwrap().to_vec())
    }

    pub async fn post(&self, path: &str, key: &str, body: &serde_json::Value) -> (u16, serde_json::Value) {
        let request = self.http.post(format!("{}{path}", self.url)).bearer_auth(key).json(body);
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    pub async fn json(&self, path: &str, key: Option<&str>) -> serde_json::Value {
        let (status, body) = self.get(path, key).await;
        assert_eq!(status, 200, "{path}: {}", String::from_utf8_lossy(&body));
        serde_json::from_slice(&body).unwrap()
    }

    /// (available, held) of an account.
    pub async fn balance(&self, place: &Place, account: &str) -> (i64, i64) {
        let json = self.json("/v1/balance", Some(&place.key(account))).await;
        (json["available_micro"].as_i64().unwrap(), json["held_micro"].as_i64().unwrap())
    }

    pub async fn wait_balance(&self, place: &Place, account: &str, expected: (i64, i64)) {
        eventually(DEADLINE, async || {
            let actual = self.balance(place, account).await;
            if actual == expected { Ok(()) } else { Err(actual) }
        })
        .await;
    }

    pub async fn audit(&self) -> serde_json::Value {
        let audit = self.json("/v1/ledger/audit", None).await;
        assert_eq!(audit["ok"], true, "{audit}");
        audit
    }
}
