//! Single commands of `infera`, without a network or against its remains.

use std::{fs, path::Path, process::Command, time::Duration};

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

use crate::network::{infera, text};

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
        current.calibration.near_tie_milli += 1;
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
