//! A running verifier on real adapters, and what is said to it and heard from it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use infera_bus::{Bus, Delivery, Envelope, Subscription, Topology, outbox};
use infera_embed::{Embedder, Exact, Index};
use infera_prompt::Prompt;
use infera_protocol::bytes::Hash32;
use infera_protocol::ids::message_id;
use infera_runtime::{CancellationToken, db};
use infera_testkit::evidence::{Case, Network, model};
use infera_testkit::{TempDir, cluster, embedder_path, eventually, model_path, sqlite_url_named, unique};
use infera_verifier::{Config, Deps};
use infera_wire::topology::{DEAD_LETTERS, keys, queues};
use infera_wire::{Message, v1};
use tokio::sync::oneshot;
use uuid::Uuid;

/// Long enough for a loaded machine; only a failing test waits for it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// One embedder for all tests of this binary.
pub fn embedder() -> Embedder {
    static EMBEDDER: OnceLock<Embedder> = OnceLock::new();
    EMBEDDER.get_or_init(|| Embedder::load(&embedder_path()).unwrap()).clone()
}

/// A network that serves one model with the real tokenizer, so that texts are texts.
pub fn network() -> Network {
    let mut model = model("smollm2", Hash32([0x44; 32]));
    model.tokenizer_hash = Hash32(prompt().tokenizer_hash());
    model.end_tokens = prompt().end_tokens().to_vec();
    Network::serving(vec![model])
}

fn prompt() -> &'static Prompt {
    static PROMPT: OnceLock<Prompt> = OnceLock::new();
    PROMPT.get_or_init(|| Prompt::load(&model_path()).unwrap())
}

/// Tokens of a text in the model's own tokenizer, with its end token.
pub fn tokens(text: &str) -> Vec<u32> {
    let mut ids = prompt().tokenizer().encode(text).unwrap();
    ids.push(prompt().end_tokens()[0]);
    ids
}

/// Which adapters a test runs on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum On {
    Embedded,
    Cluster,
}

/// What survives a restart of the verifier.
pub struct World {
    pub network: Network,
    pub bus: Bus,
    pub dir: TempDir,
    pub index: Arc<dyn Index>,
    verdicts: Subscription,
    dead: Subscription,
    database_url: String,
    schema: String,
    prefix: String,
}

/// The verifier while it runs; on a thread of its own, as in the embedded network.
pub struct Running {
    pub url: String,
    stop: CancellationToken,
    thread: Option<std::thread::JoinHandle<Result<(), String>>>,
}

impl World {
    pub async fn new(on: On) -> Self {
        let dir = TempDir::new().unwrap();
        let network = network();
        network.write(dir.path());
        let prefix = unique("t");
        let (bus, database_url) = match on {
            On::Embedded => (Bus::in_process(), sqlite_url_named(&dir, "verifier")),
            On::Cluster => {
                let cluster = cluster();
                (Bus::rabbit(&cluster.amqp_url, &prefix).await.unwrap(), cluster.pg_url.clone())
            }
        };
        bus.declare(&Topology::network()).await.unwrap();
        let verdicts = bus.subscribe(queues::GATEWAY_VERDICT, 64).await.unwrap();
        let dead = bus.subscribe(DEAD_LETTERS, 64).await.unwrap();
        // On the in-process bus a verdict is confirmed when every queue has acked it.
        for queue in [queues::SETTLEMENT_VERDICT, queues::MEMPOOL_VERDICT, queues::DISPATCHER_CONDUCT] {
            let mut other = bus.subscribe(queue, 64).await.unwrap();
            tokio::spawn(async move {
                while let Some(delivery) = other.next().await {
                    let _ = delivery.ack().await;
                }
            });
        }
        let index = Arc::new(Exact::open(&sqlite_url_named(&dir, "vectors"), None).await.unwrap());
        Self { network, bus, dir, index, verdicts, dead, database_url, schema: unique("verifier"), prefix }
    }

    pub fn config(&self) -> Config {
        let mut config = Config::load(None).unwrap();
        config.common.http_bind = "127.0.0.1:0".to_owned();
        config.common.database_url = self.database_url.clone().into();
        config.common.database_schema = Some(self.schema.clone());
        config.common.manifest_path = self.dir.path().join("network.json");
        config.common.registry_path = self.dir.path().join("models.json");
        config.models = BTreeMap::from([("smollm2".to_owned(), model_path())]);
        config
    }

    /// The configuration of a process of its own on the cluster's servers.
    pub fn process_config(&self) -> std::path::PathBuf {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let vectors = sqlite_url_named(&self.dir, "vectors");
        let text = format!(
            "http_bind = \"127.0.0.1:0\"\ndatabase_url = {:?}\ndatabase_schema = {:?}\nbus_url = {:?}\n\
             bus_prefix = {:?}\nmanifest_path = {:?}\nregistry_path = {:?}\nembedder_path = {:?}\n\
             [models]\nsmollm2 = {:?}\n[vectors]\ndatabase_url = {vectors:?}\n",
            self.database_url,
            self.schema,
            cluster().amqp_url,
            self.prefix,
            path("network.json"),
            path("models.json"),
            embedder_path().display().to_string(),
            model_path().display().to_string(),
        );
        let file = self.dir.path().join("verifier.toml");
        std::fs::write(&file, text).unwrap();
        file
    }

    pub async fn start(&self) -> Running {
        self.start_with(self.index.clone()).await
    }

    pub async fn start_with(&self, index: Arc<dyn Index>) -> Running {
        let (bound, address) = oneshot::channel::<SocketAddr>();
        let deps = Deps {
            embedder: Some(embedder()),
            index: Some(index),
            bound: Some(bound),
            ..Deps::new(self.bus.clone())
        };
        let (config, stop) = (self.config(), CancellationToken::new());
        let token = stop.clone();
        let thread = std::thread::spawn(move || {
            actix_rt::System::new()
                .block_on(infera_verifier::run(config, deps, token))
                .map_err(|error| error.to_string())
        });
        match address.await {
            Ok(address) => Running { url: format!("http://{address}"), stop, thread: Some(thread) },
            Err(_) => panic!("the verifier did not start: {:?}", thread.join()),
        }
    }

    /// Waits until all that was said is confirmed: until then the outbox has it and takes no second one.
    pub async fn settled(&self) {
        let db = db::connect(&self.database_url, Some(&self.schema)).await.unwrap();
        eventually(PATIENCE, || async { outbox::pending(&db).await.unwrap() == 0 }).await;
        db.close().await.unwrap();
    }

    pub async fn collect(&self, case: &Case) {
        self.collect_as(case, 0).await;
    }

    /// `nth`: another message id, as another attempt to say the same has.
    pub async fn collect_as(&self, case: &Case, nth: u64) {
        let round = u64::from(case.attempt) << 8 | u64::from(case.round) | nth << 40;
        let id = message_id("results.collected", case.request.id, round);
        self.say(keys::RESULTS_COLLECTED, id, case.collected().encode_to_vec()).await;
    }

    pub async fn close(&self, case: &Case, reason: &str) {
        let message = v1::CloseRequested { submitted: Some(case.submitted()), reason: reason.to_owned() };
        let id = message_id("close.requested", case.request.id, 0);
        self.say(keys::CLOSE_REQUESTED, id, message.encode_to_vec()).await;
    }

    pub async fn say(&self, key: &str, id: Uuid, body: Vec<u8>) {
        let envelope = Envelope::new(id, key, body);
        let (bus, key) = (self.bus.clone(), key.to_owned());
        // In process a confirm is the consumer's ack: the test does not wait for it here.
        tokio::spawn(async move { bus.publish(&key, envelope).await.unwrap() });
    }

    /// The next verdict: its message id and itself. Acks it.
    pub async fn verdict(&mut self) -> (Uuid, v1::Verdict) {
        let delivery = next(&mut self.verdicts, "a verdict").await;
        let (id, body) = (delivery.envelope.id, delivery.envelope.body.clone());
        delivery.ack().await.unwrap();
        (id, v1::Verdict::decode(body).unwrap())
    }

    /// The next dead letter: its queue and why.
    pub async fn dead_letter(&mut self) -> (String, String) {
        let delivery = next(&mut self.dead, "a dead letter").await;
        let letter = delivery.dead_letter.clone().unwrap();
        delivery.ack().await.unwrap();
        (letter.origin_queue, letter.reason)
    }
}

async fn next(subscription: &mut Subscription, what: &str) -> Delivery {
    tokio::time::timeout(PATIENCE, subscription.next())
        .await
        .unwrap_or_else(|_| panic!("{what} did not come"))
        .unwrap()
}

impl Running {
    /// Stops it and returns what `run` returned.
    pub async fn stop(mut self) {
        self.stop.cancel();
        let thread = self.thread.take().unwrap();
        tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap().unwrap();
    }

    pub async fn get(&self, path: &str) -> (u16, serde_json::Value) {
        let response = reqwest::get(format!("{}{path}", self.url)).await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// The value of a metric, summed over its labels that contain `labels`.
    pub async fn metric(&self, name: &str, labels: &str) -> f64 {
        let text = reqwest::get(format!("{}/metrics", self.url)).await.unwrap().text().await.unwrap();
        text.lines()
            .filter(|line| line.starts_with(name) && line.contains(labels))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
