//! A gateway with everything around it that it needs: files, keys, a bus, and a network of one in the
//! test's hands, which reads what is submitted and says how it ends.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Duration;

use infera_bus::{Bus, Envelope, Topology};
use infera_gateway::{Config, DEFAULTS, Deps, Error};
use infera_prompt::Prompt;
use infera_protocol::bytes::{Address, Hash32, NodeId};
use infera_protocol::fingerprint::{Entry, Fingerprint};
use infera_protocol::identity::Domain;
use infera_protocol::ids::message_id;
use infera_protocol::registry::{Manifest, Model, Registry};
use infera_protocol::request::{Finish, Output};
use infera_runtime::CancellationToken;
use infera_runtime::config::load;
use infera_runtime::jwt::{Claims, Signer};
use infera_runtime::kv::Kv;
use infera_testkit::{TempDir, cluster, eventually, model_path, sqlite_url, unique};
use infera_wire::topology::{keys, queues};
use infera_wire::{Message, decode, v1};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

/// Long enough for a busy machine; never waited for when things work.
pub const DEADLINE: Duration = Duration::from_secs(30);
pub const MODEL: &str = "smollm2-135m-instruct";
pub const WEIGHTS: Hash32 = Hash32([0x11; 32]);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Column {
    Embedded,
    Cluster,
}

/// Tokenizer and template of the real model; loaded once.
pub fn prompt() -> &'static Prompt {
    static PROMPT: OnceLock<Prompt> = OnceLock::new();
    PROMPT.get_or_init(|| Prompt::load(&model_path()).unwrap())
}

/// Token ids of an answer: its text and the end token.
pub fn answer(text: &str) -> Vec<u32> {
    let mut tokens = prompt().tokenizer().encode(text).unwrap();
    tokens.push(prompt().end_tokens()[0]);
    tokens
}

pub fn node(n: u8) -> NodeId {
    NodeId([n; 32])
}

/// The files that a gateway reads: registry, manifest, keys.
pub struct Files {
    pub dir: TempDir,
    pub signer: Signer,
}

impl Files {
    pub fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let registry = Registry {
            models: vec![Model {
                id: MODEL.into(),
                weights_root: WEIGHTS,
                weights_bytes: 1 << 20,
                tokenizer_hash: Hash32(prompt().tokenizer_hash()),
                template_hash: Hash32(prompt().template_hash()),
                end_tokens: prompt().end_tokens().to_vec(),
                vocab_size: prompt().vocab_size() as u32,
                context_length: 2_048,
                similarity_threshold_millionths: 600_000,
                price_micro: 2,
                created_secs: 1_790_000_000,
            }],
            releases: Vec::new(),
            calibration: infera_testkit::evidence::calibration(),
            replaces: None,
        };
        let manifest = Manifest {
            network: "infera-test".into(),
            domain: Domain { chain_id: 31_337, contract: Address([1; 20]) },
            rpc_url: "http://127.0.0.1:1".into(),
            dispatchers: vec![],
            registry_hash: registry.hash().unwrap(),
        };
        write(&dir.path().join("models.json"), &serde_json::to_vec(&registry).unwrap());
        write(&dir.path().join("network.json"), &serde_json::to_vec(&manifest).unwrap());
        let signer = Signer::load_or_create(&dir.path().join("keys/api.pem")).unwrap();
        signer.write_jwks(&dir.path().join("jwks.json")).unwrap();
        Self { dir, signer }
    }

    pub fn config(&self, column: Column, name: &str) -> Config {
        let mut config: Config = load("gateway_test", DEFAULTS, None).unwrap();
        let path = |name: &str| self.dir.path().join(name);
        config.common.http_bind = "127.0.0.1:0".into();
        config.common.registry_path = path("models.json");
        config.common.manifest_path = path("network.json");
        config.common.jwks_path = path("jwks.json");
        config.common.bus_prefix = name.to_owned();
        match column {
            Column::Embedded => config.common.database_url = sqlite_url(&self.dir).into(),
            Column::Cluster => {
                config.common.database_url = cluster().pg_url.clone().into();
                config.common.database_schema = Some(name.to_owned());
                config.common.bus_url = cluster().amqp_url.clone().into();
                config.common.kv_url = Some(cluster().redis_url.clone().into());
            }
        }
        config.models = [(MODEL.to_owned(), model_path())].into();
        config.public_url = "http://gateway.test".into();
        config.receipts_url = "http://receipts.test".into();
        config.settlement_url = String::new();
        config.signing_key_path = path("keys/api.pem");
        // Tests share one address and one Redis.
        config.sign_ins_per_minute = 100_000;
        config.public_per_minute = 100_000;
        config.poll_ms = 200;
        config.drain_secs = 1;
        config
    }

    /// A key of `account`, and its id.
    pub fn key(&self, account: &str) -> (String, String) {
        let claims = Claims::new(account, infera_gateway::keys::AUDIENCE, &["chat", "receipts"], 600);
        (self.signer.issue(&claims).unwrap(), claims.jti)
    }
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
}

/// A running gateway.
pub struct Gateway {
    pub address: SocketAddr,
    shutdown: CancellationToken,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Gateway {
    pub async fn start(config: Config, bus: Bus) -> Self {
        let (bound, listens) = oneshot::channel();
        let shutdown = CancellationToken::new();
        let token = shutdown.clone();
        let thread = std::thread::spawn(move || {
            actix_rt::System::new().block_on(async move {
                let kv = match &config.common.kv_url {
                    Some(url) => Kv::redis(url.expose()).await.unwrap(),
                    None => Kv::memory(),
                };
                infera_gateway::run(config, Deps { bus, kv, bound: Some(bound) }, token).await
            })
        });
        let address = match tokio::time::timeout(DEADLINE, listens).await.expect("the gateway starts in time")
        {
            Ok(address) => address,
            Err(_) => panic!("the gateway did not start: {:?}", thread.join().unwrap()),
        };
        Self { address, shutdown, thread: Some(thread) }
    }

    /// Drains and ends it.
    pub async fn stop(&mut self) -> Result<(), Error> {
        self.shutdown.cancel();
        let thread = self.thread.take().unwrap();
        tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.shutdown.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A gateway, a key, and the network of one.
pub struct World {
    pub files: Files,
    pub config: Config,
    pub gateway: Gateway,
    pub net: Net,
    pub key: String,
    pub client: reqwest::Client,
    bus: Bus,
}

impl World {
    pub async fn new(column: Column) -> Self {
        Self::with(column, |_| {}).await
    }

    pub async fn with(column: Column, change: impl FnOnce(&mut Config)) -> Self {
        let name = unique("gateway");
        let files = Files::new();
        let mut config = files.config(column, &name);
        change(&mut config);
        let net = Net::new(match column {
            Column::Embedded => Bus::in_process(),
            Column::Cluster => Bus::rabbit(&cluster().amqp_url, &name).await.unwrap(),
        })
        .await;
        // A broker's client is a process' own; in process there is one bus.
        let bus = match column {
            Column::Embedded => net.bus.clone(),
            Column::Cluster => Bus::rabbit(&cluster().amqp_url, &name).await.unwrap(),
        };
        let gateway = Gateway::start(config.clone(), bus.clone()).await;
        let key = files.key("alice").0;
        Self { files, config, gateway, net, key, client: reqwest::Client::new(), bus }
    }

    /// Stops the gateway and starts it on the same database and bus.
    pub async fn restart(&mut self) {
        self.gateway.stop().await.unwrap();
        self.start().await;
    }

    /// Starts the gateway again after a stop.
    pub async fn start(&mut self) {
        self.gateway = Gateway::start(self.config.clone(), self.bus.clone()).await;
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.gateway.address)
    }

    /// A chat request, not yet sent.
    pub fn post(&self, body: &Value) -> reqwest::RequestBuilder {
        self.client
            .post(self.url("/v1/chat/completions"))
            .bearer_auth(&self.key)
            .header("content-type", "application/json")
            .body(body.to_string())
    }

    /// Sends a chat request in the background.
    pub fn send(&self, body: &Value) -> tokio::task::JoinHandle<reqwest::Response> {
        spawn(self.post(body))
    }

    /// A GET of `path` with `key`.
    pub async fn get(&self, path: &str, key: &str) -> reqwest::Response {
        self.client.get(self.url(path)).bearer_auth(key).send().await.unwrap()
    }

    /// A POST of `body` to `path`, with a key if there is one.
    pub async fn post_to(&self, path: &str, key: Option<&str>, body: &Value) -> reqwest::Response {
        let request = self.client.post(self.url(path)).body(body.to_string());
        let request = match key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        request.send().await.unwrap()
    }

    /// Another replica on the same database, bus and key-value store.
    pub async fn replica(&self) -> Gateway {
        Gateway::start(self.config.clone(), self.bus.clone()).await
    }

    pub async fn database(&self) -> sea_orm::DatabaseConnection {
        let common = &self.config.common;
        infera_runtime::db::connect(common.database_url.expose(), common.database_schema.as_deref())
            .await
            .unwrap()
    }
}

/// Sends in the background.
pub fn spawn(request: reqwest::RequestBuilder) -> tokio::task::JoinHandle<reqwest::Response> {
    tokio::spawn(async move { request.send().await.expect("the gateway answers") })
}

/// A usual request, with some fields replaced or added.
pub fn chat(change: Value) -> Value {
    let mut body = json!({
        "model": MODEL,
        "messages": [{ "role": "user", "content": "What is the capital of France?" }],
    });
    let Value::Object(change) = change else { panic!("an object") };
    body.as_object_mut().unwrap().extend(change);
    body
}

/// Settlement, mempool, dispatcher and verifier in one: the test decides.
pub struct Net {
    pub bus: Bus,
    submitted: mpsc::UnboundedReceiver<v1::RequestSubmitted>,
    cancelled: mpsc::UnboundedReceiver<v1::CancelRequested>,
}

impl Net {
    pub async fn new(bus: Bus) -> Self {
        bus.declare(&Topology::network()).await.unwrap();
        let submitted = receive(&bus, queues::SETTLEMENT_SUBMITTED).await;
        let cancelled = receive(&bus, queues::MEMPOOL_CANCEL).await;
        Self { bus, submitted, cancelled }
    }

    /// The next request that was submitted.
    pub async fn next(&mut self) -> v1::RequestSubmitted {
        tokio::time::timeout(DEADLINE, self.submitted.recv()).await.expect("a request is submitted").unwrap()
    }

    /// The next request that is to be cancelled.
    pub async fn next_cancelled(&mut self) -> v1::CancelRequested {
        tokio::time::timeout(DEADLINE, self.cancelled.recv()).await.expect("a request is cancelled").unwrap()
    }

    /// What was submitted besides: nothing, if all is well.
    pub fn more(&mut self) -> Vec<v1::RequestSubmitted> {
        std::iter::from_fn(|| self.submitted.try_recv().ok()).collect()
    }

    /// Whether nothing waits to be cancelled.
    pub fn none_cancelled(&mut self) -> bool {
        self.cancelled.try_recv().is_err()
    }

    pub fn verified(&self, of: &v1::RequestSubmitted, tokens: &[u32], finish: v1::Finish) {
        self.verdict(of, verified(of, tokens, finish));
    }

    /// Verified, with the usual end.
    pub fn answer(&self, of: &v1::RequestSubmitted, text: &str) {
        self.verified(of, &answer(text), v1::Finish::Eos);
    }

    pub fn verdict(&self, of: &v1::RequestSubmitted, outcome: v1::verdict::Outcome) {
        let request = of.request.as_ref().unwrap();
        let verdict = v1::Verdict {
            request_id: request.id.clone(),
            reply_to: of.reply_to.clone(),
            attempt: 1,
            round: 1,
            account: of.account.clone(),
            decided_at_ms: of.submitted_at_ms + 5,
            outcome: Some(outcome),
            conduct: Vec::new(),
            overturned: false,
        };
        self.publish(keys::verdict(&of.reply_to), message_id("verdict", id(of), 1), &verdict);
    }

    pub fn failed(&self, of: &v1::RequestSubmitted, code: &str) {
        let failed = v1::Failed { code: code.to_owned(), reason: "said the test".to_owned() };
        self.verdict(of, v1::verdict::Outcome::Failed(failed));
    }

    pub fn rejected(&self, of: &v1::RequestSubmitted, code: &str) {
        let rejected = v1::RequestRejected {
            request_id: of.request.as_ref().unwrap().id.clone(),
            reply_to: of.reply_to.clone(),
            code: code.to_owned(),
            message: "said the test".to_owned(),
            account: of.account.clone(),
        };
        self.publish(keys::request_rejected(&of.reply_to), message_id("rejected", id(of), 1), &rejected);
    }

    pub fn deltas(&self, of: &v1::RequestSubmitted, entries: &[(u32, u8, u32, &[u32])]) {
        let entries = entries
            .iter()
            .map(|(attempt, n, offset, tokens)| v1::DeltaEntry {
                request_id: of.request.as_ref().unwrap().id.clone(),
                attempt: *attempt,
                node: node(*n).to_vec(),
                offset: *offset,
                tokens: tokens.to_vec(),
            })
            .collect();
        let batch = v1::DeltaBatch { entries };
        let envelope = Envelope::new(Uuid::now_v7(), "deltas", batch.encode_to_vec());
        self.bus.publish_transient(&keys::deltas(&of.reply_to), envelope);
    }

    /// In process a confirm waits for queues that nobody consumes here, hence the task.
    fn publish(&self, key: String, id: Uuid, message: &impl Message) {
        let envelope = Envelope::new(id, infera_wire::topology::kind(&key), message.encode_to_vec());
        let bus = self.bus.clone();
        tokio::spawn(async move { bus.publish(&key, envelope).await });
    }
}

/// Waits until the request is closed in the gateway's database.
pub async fn closed(world: &World, id: Uuid) {
    let db = world.database().await;
    eventually(DEADLINE, async || infera_gateway::store::outcome(&db, id).await.unwrap()).await;
}

pub fn id(of: &v1::RequestSubmitted) -> Uuid {
    Uuid::from_slice(&of.request.as_ref().unwrap().id).unwrap()
}

pub fn verified(of: &v1::RequestSubmitted, tokens: &[u32], finish: v1::Finish) -> v1::verdict::Outcome {
    let output = Output { tokens: tokens.to_vec(), fingerprints: fingerprints(tokens), finish: Finish::Eos };
    let slots =
        json!([{ "node": node(2), "reveal": { "output": output } }, { "node": node(1), "reveal": null }]);
    v1::verdict::Outcome::Verified(v1::Verified {
        evidence: json!({ "slots": slots }).to_string().into_bytes(),
        tokens: tokens.to_vec(),
        finish: finish.into(),
        nodes: [2, 1, 3].iter().map(|n| node(*n).to_vec()).collect(),
        lowest_similarity_millionths: 1_000_000,
        prompt_tokens: of.request.as_ref().unwrap().prompt.len() as u32,
    })
}

/// What a node saw: the token drawn was the second likeliest, -1.5; the next id was likelier, -0.5, an end token was not.
pub fn fingerprints(tokens: &[u32]) -> Vec<u8> {
    let entry = |token, logprob: u16| Entry { token, logprob };
    let end = prompt().end_tokens()[0];
    let print = |token: &u32| {
        let mut entries = vec![entry(*token, 0xbe00), entry(token + 1, 0xb800)];
        if ![*token, token + 1].contains(&end) {
            entries.push(entry(end, 0xc800));
        }
        Fingerprint::new(entries).unwrap().encode()
    };
    tokens.iter().flat_map(print).collect()
}

async fn receive<M: Message + Default + Send + 'static>(
    bus: &Bus,
    queue: &'static str,
) -> mpsc::UnboundedReceiver<M> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let mut subscription = bus.subscribe(queue, 16).await.unwrap();
    tokio::spawn(async move {
        while let Some(delivery) = subscription.next().await {
            if sender.send(decode(queue, &delivery.envelope.body).unwrap()).is_err() {
                return;
            }
            delivery.ack().await.unwrap();
        }
    });
    receiver
}

pub async fn json_of(response: reqwest::Response) -> Value {
    let status = response.status();
    let text = response.text().await.unwrap();
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{status}: {error}: {text}"))
}
