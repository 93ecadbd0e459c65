//! Single commands of `infera`, without a network or against its remains.

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::{Child, Command},
    time::Duration,
};

use infera_bus::{
    Bus, Topology,
    outbox::{self, Relay},
};
use infera_protocol::{
    document::{Document, Status},
    registry::{Manifest, Registry, Replaced},
};
use infera_runtime::{CancellationToken, db};
use infera_testkit::{TempDir, eventually, evidence};
use uuid::Uuid;

use crate::network::{Network, infera, text};

const DEADLINE: Duration = Duration::from_secs(150);

/// A folder with the manifest, the registry in force and a receipt with its evidence that was made under the first
/// version, before price and calibration changed.
struct Folder {
    dir: TempDir,
    former: Registry,
}

impl Folder {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let network = evidence::Network::new();
        let case = evidence::Case::new(&network);
        let mut current = network.registry.clone();
        current.models[0].price_micro += 1;
        current.calibration.pairs[0].bounds.near_tie_milli += 1;
        current.replaces = Some(Replaced {
            registry_hash: network.registry.hash().unwrap(),
            at_ms: case.submitted_at_ms + 60_000,
        });
        let manifest = Manifest { registry_hash: current.hash().unwrap(), ..network.manifest.clone() };
        let document = Document {
            receipt: case.receipt(),
            status: Status::Pending,
            anchor: None,
            evidence: Some(case.evidence()),
        };
        fs::write(dir.path().join("receipt.json"), document.canonical().unwrap()).unwrap();
        fs::write(dir.path().join("network.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
        fs::write(dir.path().join("models.json"), serde_json::to_vec(&current).unwrap()).unwrap();
        Self { dir, former: network.registry }
    }

    /// Keeps `content` as the version before.
    fn keep(&self, content: &Registry) {
        let kept = self.dir.path().join("registries");
        fs::create_dir_all(&kept).unwrap();
        let name = format!("{}.json", self.former.hash().unwrap());
        fs::write(kept.join(name), serde_json::to_vec(content).unwrap()).unwrap();
    }

    fn verify(&self) -> (Option<i32>, String) {
        run(&["verify", "receipt.json", "--data", "."], self.dir.path())
    }
}

/// One node is enough to see that nodes end as well.
const ONE_NODE: [&str; 2] = ["--nodes", "1"];

/// Waits until `infera up` in the foreground is ready.
async fn ready(network: &Network, up: &mut Child) {
    eventually(DEADLINE, || {
        let ended = up.try_wait().unwrap();
        assert!(ended.is_none(), "infera up ended: {ended:?}\n{}\n{}", network.terminal(), network.logs());
        let ready = network.data().join("up.json").exists();
        async move { ready }
    })
    .await;
}

/// Ends `up` by a signal as a terminal or a supervisor sends it; its exit status.
async fn signal(up: &mut Child, name: &str) -> Option<i32> {
    let status = Command::new("kill").args([name, &up.id().to_string()]).status().unwrap();
    assert!(status.success());
    let mut code = None;
    eventually(DEADLINE, || {
        let ended = up.try_wait().unwrap();
        code = ended.and_then(|status| status.code());
        async move { ended.is_some() }
    })
    .await;
    code
}

async fn nothing_left(network: &Network) {
    eventually(DEADLINE, || {
        let left = network.processes();
        async move { if left.is_empty() { Ok(()) } else { Err(left) } }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_everything_and_a_killed_start_is_taken_over() {
    let network = Network::new("embedded", &ONE_NODE);
    let mut up = network.foreground(&[]);
    ready(&network, &mut up).await;
    // The supervisor, the services, the node and the chain.
    assert!(network.processes().len() >= 4, "{:?}", network.processes());
    assert!(network.data().join("bin/infera").canonicalize().unwrap() == infera().canonicalize().unwrap());

    let data = network.data().to_str().unwrap();
    let other_base = network.port_base().to_string();
    let (status, said) = run(&["up", "--data", data, "--port-base", &other_base], network.data());
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("a network already runs in") && said.contains("`make down`"), "{said}");
    assert_eq!(said.trim().lines().count(), 1, "{said}");

    assert_eq!(signal(&mut up, "-INT").await, Some(0), "{}", network.terminal());
    nothing_left(&network).await;
    assert!(!network.data().join("up.json").exists());

    // Killed without a word: the next start takes over what is left, and its ledger.
    let mut killed = network.foreground(&[]);
    ready(&network, &mut killed).await;
    assert_eq!(signal(&mut killed, "-KILL").await, None);
    let mut again = network.foreground(&[]);
    eventually(DEADLINE, || {
        let said = network.terminal();
        let ended = again.try_wait().unwrap();
        assert!(ended.is_none(), "infera up ended: {said}\n{}", network.logs());
        async move { said.contains("The network is up") }
    })
    .await;
    let audit = network.get(&format!("{}/v1/ledger/audit", network.url("settlement_url"))).await;
    assert_eq!(audit["ok"], true, "{audit}");

    // And `infera down` ends what a killed one left.
    assert_eq!(signal(&mut again, "-KILL").await, None);
    network.down();
    nothing_left(&network).await;
}

#[test]
fn a_taken_port_is_one_sentence() {
    let network = Network::new("embedded", &ONE_NODE);
    let taken = network.port_base() + 2;
    let _listener = TcpListener::bind(("127.0.0.1", taken)).unwrap();
    let mut up = network.foreground(&[]);
    assert_eq!(up.wait().unwrap().code(), Some(1));
    let said = network.terminal();
    assert_eq!(said.trim().lines().count(), 1, "{said}");
    assert!(
        said.contains(&format!("port {taken} (mempool) is taken")) && said.contains("--port-base"),
        "{said}"
    );
    assert!(network.processes().is_empty(), "{:?}", network.processes());
}

/// What `infera up` leaves in its folder of the services that have an outbox; the databases are still to be made.
fn configured() -> TempDir {
    let dir = TempDir::new().unwrap();
    for folder in ["config", "db"] {
        fs::create_dir_all(dir.path().join(folder)).unwrap();
    }
    for service in ["gateway", "settlement", "mempool", "verifier"] {
        let text = format!("database_url = {:?}\n", database(&dir, service));
        fs::write(dir.path().join("config").join(format!("{service}.toml")), text).unwrap();
    }
    dir
}

fn database(dir: &TempDir, service: &str) -> String {
    format!("sqlite://{}/db/{service}.sqlite?mode=rwc", dir.path().display())
}

#[tokio::test]
async fn dead_letters_of_an_embedded_network_are_shown_and_tried_again() {
    let dir = configured();
    let db = db::connect(&database(&dir, "gateway"), None).await.unwrap();
    db::migrate::<infera_gateway::Migrator>(&db).await.unwrap();
    let bus = Bus::in_process();
    bus.declare(&Topology::network()).await.unwrap();
    let stop = CancellationToken::new();
    let relay = Relay::start(db.clone(), bus.clone(), stop.clone());
    let id = Uuid::now_v7();
    outbox::enqueue(&db, "request.submitted", id, &"secret words".to_owned()).await.unwrap();
    relay.wake();
    let mut submitted = bus.subscribe("settlement.submitted", 1).await.unwrap();
    let delivery = submitted.next().await.unwrap();
    delivery.dead_letter("field `k` is missing\n\u{1b}[2J").await.unwrap();
    eventually(Duration::from_secs(30), || async { outbox::dead_letters(&db).await.unwrap() == 1 }).await;

    let (status, said) = run(&["dead", "list", "--data", "."], dir.path());
    assert_eq!(status, Some(0), "{said}");
    let line = format!("{id}  request.submitted  in settlement.submitted  14 bytes  field `k` is missing");
    assert!(said.starts_with(&line) && said.trim_end().lines().count() == 1, "{said}");
    assert!(!said.contains("secret") && !said.contains('\u{1b}'), "{said}");
    let (status, said) = run(&["dead", "replay", "--data", "."], dir.path());
    assert_eq!(status, Some(2), "{said}");
    let other = Uuid::now_v7().to_string();
    let (status, said) = run(&["dead", "replay", &other, "--data", "."], dir.path());
    assert!(status == Some(1) && said.contains("0 of 1 were there"), "{said}");

    // The network runs meanwhile: its relay finds it.
    let (status, said) = run(&["dead", "replay", &id.to_string(), "--data", "."], dir.path());
    assert!(status == Some(0) && said.contains("1 put back"), "{said}");
    let delivery = submitted.next().await.unwrap();
    assert_eq!(delivery.envelope.id, id);
    delivery.ack().await.unwrap();
    let (status, said) = run(&["dead", "list", "--data", "."], dir.path());
    assert!(status == Some(0) && said.contains("no dead letters"), "{said}");
    stop.cancel();
    relay.stopped().await;
}

fn run(args: &[&str], folder: &Path) -> (Option<i32>, String) {
    let output = Command::new(infera()).args(args).current_dir(folder).output().unwrap();
    (output.status.code(), text(&output))
}

#[test]
fn what_a_node_finds_in_its_environment_hinders_no_operator() {
    let folder = TempDir::new().unwrap();
    let node = |args: &[&str]| {
        let mut command = Command::new(infera());
        command.env("INFERA_NODE__LOG_FILTER", "info").env("INFERA_NODE__DEVICE", "cpu");
        let output = command.arg("node").args(args).current_dir(folder.path()).output().unwrap();
        (output.status.code(), text(&output))
    };
    for args in [&["earnings"][..], &["claim", "--node", "1"], &["stake", "5"]] {
        let (status, said) = node(&[args, &["--data", "."]].concat());
        assert!(status == Some(1) && said.contains("contracts.json"), "only the network is missing: {said}");
    }
    for args in [&[][..], &["--model", "m.gguf", "earnings"]] {
        let (status, said) = node(args);
        assert!(status == Some(2) && said.contains("--model"), "{said}");
    }
}

#[test]
fn a_receipt_is_checked_against_the_registry_of_its_time() {
    let folder = Folder::new();
    let (status, said) = folder.verify();
    assert_eq!(status, Some(3), "{said}");
    let missing = format!("skipped  model: the registry {}", folder.former.hash().unwrap());
    assert!(said.contains(&missing), "{said}");

    folder.keep(&folder.former);
    let (status, said) = folder.verify();
    // It is not anchored; everything else holds.
    assert_eq!(status, Some(3), "{said}");
    assert!(said.contains("ok       model") && said.contains("ok       calibration"), "{said}");
    assert_eq!(said.matches("skipped").count(), 1, "{said}");

    let mut forged = folder.former.clone();
    forged.models[0].price_micro = 9;
    folder.keep(&forged);
    let (status, said) = folder.verify();
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("FAILED   registry"), "{said}");
}
